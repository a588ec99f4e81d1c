"""Several processes, as torchrun starts them: each takes its share of the work, what they find is gathered,
and process 0 alone prints and writes.

    torchrun --nproc-per-node 2 train_router.py

With one process, or without torchrun, the functions here do nothing, but `sum_gradients` fills gaps. With
several, each calls `gathered`, and the functions that use it, in the same order. What is gathered goes as
JSON from host to host, by gloo, which notices a process that ended; gradients and the weights of `shard` go
from device to device, by NCCL on CUDA.
"""
import json
import os
import signal
import sys
from datetime import timedelta
from itertools import zip_longest
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F

from support.cuda import choices
from support.files import InputError

PATIENCE = timedelta(minutes=30)     # that one process waits for another
LOST = "ended with the other processes, of which one ended early; its own message or torchrun's says why"
processes = SimpleNamespace(rank=0, world=1, store=None, streams=None)


# ---------------------------------------------------------------------------------------- beginning and end
def start():
    """Join the processes that torchrun started, if it did; all but the first print nowhere from now on."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        return

    def stop(number, frame):
        raise InputError(LOST)

    signal.signal(signal.SIGTERM, stop)
    store, rank, world = next(dist.rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank, world_size=world,
                            timeout=PATIENCE)
    vars(processes).update(rank=rank, world=world, store=store, streams=(sys.stdout, sys.stderr))
    if rank:
        sys.stdout = sys.stderr = open(os.devnull, "w")


def take_card():
    """Let "cuda" mean this process's own card."""
    if processes.world == 1:
        return
    local, cards = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= cards:
        raise InputError(f"process {local} of this machine has no card of its own; start as many as there"
                         f" are, {cards}, or use --device cpu")
    torch.cuda.set_device(local)


def say_once(sentence):
    """The sentence in the first process that ends with one, "" in the others."""
    leave()
    try:
        return sentence if processes.world == 1 or processes.store.add("said", 1) == 1 else ""
    except RuntimeError:                 # the machine that kept count is gone
        return sentence


def peer_failure(error):
    """The message for a RuntimeError caused by another process that ended; None for other errors."""
    if processes.world > 1 and "gloo" in str(error):
        return LOST
    if processes.world > 1 and isinstance(error, dist.DistError):                         # NCCL's
        return f"{LOST} ({str(error).splitlines()[0][:100]})"
    return None


def leave():
    """Before a process ends: it prints again, and ends at once where torchrun tells it to."""
    if processes.streams:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.stdout, sys.stderr = processes.streams


# ------------------------------------------------------------------------------------------------- the share
def is_first():
    return processes.rank == 0


def check_enough(n, where, what):
    """Refuse more processes than there are questions or samples."""
    if n < processes.world:
        raise InputError(f"{where}: {n} {what} cannot be shared by {processes.world} processes; start at most"
                         f" {n}")


def check_same(settings):
    """Refuse processes that differ in settings, {what: its value}."""
    first, *others = gathered([settings])
    for rank, theirs in enumerate(others, 1):
        for what, value in first.items():
            if theirs[what] != value:
                raise InputError(f"process {rank} has {what} {theirs[what]}, process 0 has {value}; give all"
                                 " processes the same")


def own(items):
    """Every world-th item."""
    return items[processes.rank::processes.world]


def share(items):
    """(item, whether it counts) of every world-th item. Every process gets equally many, since with --shard
    all must run the same passes: one that is short gets the first item again, which does not count."""
    if processes.world == 1:
        return ((item, True) for item in items)
    items = list(items)
    mine = [(item, True) for item in own(items)]
    if len(mine) * processes.world < len(items):
        mine.append((items[0], False))
    return mine


def gathered(items):
    """The items of all processes in the order that one process would have them, the inverse of `share`:
    anything that JSON can say, and tensors, which come from other processes as lists."""
    if processes.world == 1:
        return items
    encoded = json.dumps(items, default=torch.Tensor.tolist).encode()
    text = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    lengths = torch.zeros(processes.world, 1, dtype=torch.int64)
    dist.all_gather(list(lengths), torch.tensor([len(text)]))
    texts = torch.zeros(processes.world, int(lengths.max()), dtype=torch.uint8)
    dist.all_gather(list(texts), F.pad(text, (0, texts.shape[1] - len(text))))
    lists = [json.loads(row[:n].numpy().tobytes()) for row, n in zip(texts, lengths)]
    ordered, absent = [], object()
    for turn in zip_longest(*lists, fillvalue=absent):
        ordered += [item for item in turn if item is not absent]
    return ordered


def summed(*numbers):
    """[the sum over the processes of each number]."""
    return [sum(column) for column in zip(*gathered([numbers]), strict=True)]


def from_first(ids):
    """Process 0's token ids (n, T), or None where it has none."""
    first = gathered([ids])[0]
    return None if first is None else torch.as_tensor(first)


def sum_gradients(parameters):
    """Add up each parameter's gradients over the processes. One that no batch used gets zeros, so that AdamW
    has a state of each, to save."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if processes.world > 1:
            dist.all_reduce(parameter.grad)


# ----------------------------------------------------------------------------------------- weights in shares
def shard(model):
    """Let each process hold its part of every layer's weights (FSDP2). A layer that is called, forward or
    backward, fetches the rest and frees it again. Embedding, head and routers, which alone train, stay whole.
    The layers may be on the host: their parts go where the embedding is."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    device = model.embed.weight.device
    mesh = init_device_mesh(device.type, (processes.world,))
    for layer in model.layers:
        of_router = {parameter for parameter in layer.parameters() if parameter.requires_grad}
        for parameter in of_router:
            parameter.data = parameter.data.to(device)
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=of_router)
    choices.triton = False               # no CUDA graphs, which cannot capture the fetching
