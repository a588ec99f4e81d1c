"""How many bytes a model, a tuning step or a benchmark needs, and what is free."""
from pathlib import Path

import torch

from support import parallel
from support.kernels import should_pack

SHARE = 0.8      # of the free memory that a step may take; the rest is for fragments and the optimizer


def step_bytes(config, n_layers, n_tokens, itemsize, chunk, all_train=False, masked=0):
    """Bytes that a tuning step needs beside the weights, at its peak, in numbers of `itemsize` bytes.

    n_layers: those from the first router on. For each token they keep three times the residual stream (before
    and after the sublayers), queries, keys, values and what attention gives, the MLP's gate and up, and one
    float32 copy that the router reads. chunk: tokens whose logits exist at once, three times, in float32.
    all_train: weights that train also keep what they multiply: the MLP's norm(x) and its inner activations.
    masked: with kv="open" the longest row's tokens, else 0: every layer keeps its own mask, and one layer at
    a time its gradient, per head. With a mask, and in float32, keys and values are kept once per query head.
    """
    C, heads = config.n_embd, config.head_dim * (config.n_head + config.n_kv_head)
    per_layer = itemsize * (3 * C + 2 * heads + 2 * config.intermediate) + 4 * C
    if all_train:
        per_layer += itemsize * (C + config.intermediate)
    if masked or itemsize == 4:
        per_layer += itemsize * (masked + 2 * config.head_dim * (config.n_head - config.n_kv_head))
    logits = 3 * 4 * chunk * config.vocab_size
    return n_tokens * (n_layers * per_layer + itemsize * (2 * C + config.n_head * masked)) + logits


def tokens_that_fit(model, first_trained, most, chunk, all_train=False, masked=0):
    """At most `most` tokens per batch, fewer where the GPU's free memory does not hold a step of so many.
    first_trained: the first layer with something that trains; chunk, masked: as for step_bytes; all_train:
    weights have gradients and AdamW's moments, and the dense model is kept apart."""
    weight = model.embed.weight
    if weight.device.type != "cuda":
        return most
    elsewhere = sum(p.nbytes for p in model.parameters() if p.device != weight.device)
    still_to_come = elsewhere / parallel.processes.world                   # with --shard: this card's part
    if all_train:
        still_to_come += 4 * weight_bytes(model.config, weight.dtype)
    free = SHARE * (free_bytes(weight.device) - still_to_come)
    tokens, n_layers = most, len(model.layers) - first_trained

    def needed():
        return step_bytes(model.config, n_layers, tokens, weight.itemsize, chunk, all_train, masked)
    while tokens > 64 and needed() > free:
        tokens //= 2
    return tokens


def rows_that_fit(model, most, n_tokens):
    """At most `most` rows of a generation, fewer where free memory does not hold their keys and values for
    n_tokens. On CUDA these count three times: the cache, the captured step's own, and that of an earlier,
    larger group, whose graph is kept. On a CPU they count once per process: all share the memory."""
    config, weight = model.config, model.embed.weight
    free = free_bytes(weight.device)
    if free is None:
        return most
    copies = 3 if weight.device.type == "cuda" else parallel.processes.world
    row_bytes = copies * 2 * config.n_layer * config.n_kv_head * config.head_dim * n_tokens * weight.itemsize
    return max(1, min(most, int(SHARE * free / row_bytes)))


def weight_bytes(config, dtype):
    """Bytes of a model's matrices."""
    q, kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    layer = config.n_embd * (2 * q + 2 * kv + 3 * config.intermediate)
    vocabulary = config.vocab_size * config.n_embd * (1 if config.tie_embeddings else 2)
    return (config.n_layer * layer + vocabulary) * dtype.itemsize


def bench_bytes(config, device, dtype, n_tokens, phases):
    """About how many bytes bench.py needs at most for batches of n_tokens: weights, cache and what the layers
    hand on."""
    q, kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    weights, item = weight_bytes(config, dtype), dtype.itemsize
    caches = 2 if device.type == "cuda" and "decode" in phases else 1              # the graph has its own
    total = weights + caches * 2 * config.n_layer * kv * n_tokens * item
    in_one_layer = n_tokens * (4 * config.n_embd + 2 * q + 2 * kv + 4 * config.intermediate) * item
    if "train" in phases:                     # gradients, AdamW's two moments, every layer, logits
        return total + 3 * weights + config.n_layer * in_one_layer + 3 * n_tokens * config.vocab_size * 4
    if "decode" in phases and should_pack(weights, device, dtype):
        total += weights
    return total + in_one_layer


def free_bytes(device):
    """Free memory of the device, or None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.empty_cache()                     # PyTorch keeps what was freed: it is free, too
        return torch.cuda.mem_get_info(device)[0]
    return linux_bytes("MemAvailable", "/proc/meminfo")


def linux_bytes(key, file="/proc/self/status"):
    """Bytes on a line of a file of the Linux kernel's, or None."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key + ":")), None)
