"""How much a layer is missed: the KL divergence that closing its sublayer causes, and routers that predict
it.

`measure_harm` closes one layer at a time, `close_greedily` one after another; `warm_start` makes of either
the routers that tuning starts from. Closing the layers that are missed least, for all text alike, is the
static baseline of eval.py.
"""
import math
from heapq import heappop, heappush
from itertools import islice

import torch
import torch.nn.functional as F
from tqdm import tqdm

from router import CLOSED, dense, routers
from samples import Batch, batches

HEAD_CHUNK = 128      # tokens whose logits exist at once
WARM_BATCHES, WARM_TOKENS = 4, 1024


def log_probabilities(model, x):
    """Log-probabilities of the next token, float32 (n, V), from the residual stream (n, C)."""
    return model.head(model.norm(x)).float().log_softmax(-1)


def divergence(log_p, log_q):
    """KL(p || q) of each token in nats, (n,)."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def first_target(args):
    """Where the routers start: open, half-way, so that layers compete before they close, or at --capacity."""
    if args.start == "open":
        return 1
    return args.capacity if by_layer(args) else (1 + args.capacity) / 2


def by_layer(args):
    """Does tuning start from gates that are the same for all text?"""
    return args.granularity.endswith("sequence") or args.train == "bias"


@torch.no_grad()
def measure_harm(model, groups, device):
    """How far the output moves when one layer is closed at a time.

    Returns {layer: (what its gate reads (n, C), KL(dense || without it) in nats (n,))}, for each answer token
    of the groups of samples, or each sequence.
    """
    model.eval()
    gates = routers(model)
    reads, harms = {i: [] for i in gates}, {i: [] for i in gates}
    with dense(model):
        for group in tqdm(groups, "harm of each layer", unit="batch"):
            batch = Batch.of(group, device)
            ctx = model.context(batch.idx, batch.lengths, batch.prompt_lengths)
            streams = [model.embed(batch.idx)]                                 # before each layer, (B, T, C)
            for layer in model.layers:
                streams.append(layer(streams[-1], ctx))
            log_p = log_probabilities(model, streams.pop()[batch.scored])
            row = batch.scored.nonzero()[:, 0]
            for i, gate in gates.items():
                x = model.layers[i].attn(streams[i], ctx) if gate.part == "mlp" else streams[i]
                h = gate.pooled(gate.read(x, ctx), ctx)
                threshold, gate.bypass, gate.threshold = gate.threshold, False, CLOSED
                x = model.run(streams[i], ctx, i)[batch.scored]
                gate.bypass, gate.threshold = True, threshold
                harm = divergence(log_p, log_probabilities(model, x))
                if gate.scope == "sequence":
                    harm = torch.stack([harm[row == b].mean() for b in range(len(h))])
                reads[i].append(h if gate.scope == "sequence" else h[batch.scored])
                harms[i].append(harm)
    return {i: (torch.cat(reads[i]), torch.cat(harms[i])) for i in gates}


@torch.no_grad()
def close_greedily(model, groups, device):
    """Close whole layers, half of those with a gate, each time the one that adds least to the harm of those
    already closed.

    Returns {layer: KL(dense || model) that it added, nats a token}, in that order, then the others. The more
    are closed the more harm a further one does, so that an earlier figure is a lower bound: only the layer
    that has the least is measured anew (accelerated greedy, Minoux 1978).
    """
    model.eval()
    gates, measured, order, total = routers(model), [], {}, 0.0
    for group in groups:
        batch = Batch.of(group, device)
        ctx = model.context(batch.idx, batch.lengths, batch.prompt_lengths)
        with dense(model):
            measured.append((batch, ctx, model.run(model.embed(batch.idx), ctx)[batch.scored]))

    def harm_without(layers):
        for i, gate in gates.items():
            gate.bypass, gate.threshold = i not in layers, CLOSED
        kl = []
        for batch, ctx, reference in measured:
            x = model.run(model.embed(batch.idx), ctx)[batch.scored]
            kl.append(divergence(log_probabilities(model, reference), log_probabilities(model, x)))
        return float(torch.cat(kl).mean())

    heap = [(0.0, i, -1) for i in gates]          # (harm it adds, layer, how many were closed when measured)
    with tqdm(total=len(gates) // 2, desc="closing layers", unit="layer") as bar:
        while len(order) < len(gates) // 2:
            harm, i, when = heappop(heap)
            if when < len(order):
                heappush(heap, (harm_without([*order, i]) - total, i, len(order)))
                continue
            order[i], total = harm, total + harm
            bar.update()
    for gate in gates.values():
        gate.bypass, gate.threshold = False, 0.5
    return order | {i: harm for harm, i, _ in sorted(heap)}


@torch.no_grad()
def warm_start(model, samples, args, device):
    """Begin with routers that predict the harm of skipping.

    Gates that are all open would start where the KL has no slope, and fall in step until whole layers close
    at once. Token level: ridge regression of each token's log harm on what the layer's gate reads gives w and
    b, and one threshold for all layers the capacity. Sequence level, and where only biases train: a few dozen
    prompts do not tell which sequences need which layer, so w = 0, and b is the log of the harm a layer adds
    to those that close before it.
    """
    gates = routers(model)
    groups = list(islice(batches(samples, min(args.tokens, WARM_TOKENS), args.seed), WARM_BATCHES))
    free = 1 - len(gates) / model.config.n_layer
    if by_layer(args):
        harm = close_greedily(model, groups, device)
        order = sorted(harm, key=harm.get)
        closed = round((1 - args.capacity) * model.config.n_layer)
        logs = [math.log(max(harm[i], 1e-4)) for i in order]
        level = (logs[max(0, closed - 1)] + logs[min(closed, len(logs) - 1)]) / 2
        for i, log in zip(order, logs):
            gates[i].router.bias.fill_(log - level)
        return
    predicted = []
    for i, (h, harm) in measure_harm(model, groups, device).items():
        y, centred = (harm + 0.01).log(), h - h.mean(0)
        square = centred.T @ centred                                             # (C, C)
        ridge = 0.3 * square.diagonal().mean() * torch.eye(len(square), device=device)
        w = torch.linalg.solve(square + ridge, centred.T @ (y - y.mean()))
        gates[i].router.weight[0], gates[i].router.bias[0] = w, y.mean() - h.mean(0) @ w
        predicted.append(h @ w + gates[i].router.bias)
    closed = (1 - first_target(args)) / (1 - free)                               # of the routed gates
    level = torch.cat(predicted).float().quantile(min(1.0, closed))
    for gate in gates.values():
        gate.router.bias -= level
