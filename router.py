"""MindSkip: a Llama whose sublayers stand behind gates, after "Router-Tuning" (He et al., EMNLP 2025, arXiv
2410.13184).

    s = sigmoid(w . pool(norm(x)) + b)      the score, float32
    g = 1 if s >= threshold else 0          the gate
    y = x + g * f(norm(x))                  the routed sublayer: g = 0 leaves the residual stream as it was

`add_routers(model, ...)` puts one linear layer, n_embd + 1 numbers, before a sublayer of each chosen layer
and freezes the rest. In training everything is computed and the gate multiplies it, so that gradients reach w
and b: through the straight-through estimator, or through a ramp that tuning puts in the step's place and
makes steeper. In inference what is closed is not computed at all.

    granularity       what one gate decides over          keys and values where it is closed
    attn_sequence     attention, for a whole sequence     not computed, not stored
    attn_token        attention, for one token            computed, so that later tokens may attend to it
    block_sequence    attention and MLP, a sequence       not computed, not stored
    block_token       attention and MLP, a token          computed
    mlp_sequence      the MLP, for a whole sequence       (it has none)
    mlp_token         the MLP, for one token              (it has none)

A sequence's gate reads the mean over its prompt, so that it is known before the first token is generated, and
holds for all of them. Capacity is the share of sublayers that run: overall counts every layer of the model,
those without a router as 1; routed counts only layers with a router.
"""
import json
import math
from contextlib import contextmanager

import torch
from safetensors.torch import save as safetensors_bytes
from torch import nn

from model import additive, attend, recomputed
from weights import InputError, open_safetensors, write_file

GRANULARITIES = [f"{part}_{scope}" for part in ("attn", "mlp", "block") for scope in ("sequence", "token")]
CLOSED = 2.0        # a threshold that no score reaches
QUERY_CHUNK = 128   # gathered queries attend in chunks, each to the keys up to its last position,
KEY_CHUNK = 32      # and up to the next multiple of this many, so that shapes recur


def straight_through(score, threshold):
    """The gate: exactly 0 or 1 forward, the score's gradient backward (arXiv 1308.3432)."""
    hard = (score >= threshold).to(score.dtype)
    return hard + (score - score.detach())


def ramp(score, threshold, width):
    """A gate between 0 and 1, one half at the threshold: sigmoid((logit(score) - logit(threshold)) / width).

    Tuning starts with it and makes it steeper. It weighs closing a sublayer against opening it, where the
    straight-through gradient has only the slope at the end where the gate stands: near the dense model a loss
    that is least there rises as the square of what is closed, so that the slope is nothing at 1 and twice
    the difference at 0; half-way it is the difference. A Concrete gate (arXiv 1611.00712) without its noise.
    """
    return torch.sigmoid((torch.logit(score, 1e-6) - math.log(threshold / (1 - threshold))) / width)


class MindSkip(nn.Module):
    """A sublayer x -> x + f(norm(x)), and in its place x -> x + g * f(norm(x)), g in {0, 1}."""

    def __init__(self, sublayer, granularity, n_embd, threshold=0.5, pool="prompt"):
        super().__init__()
        self.part, self.scope = granularity.split("_")
        self.sublayer, self.threshold, self.pool = sublayer, threshold, pool
        self.router = nn.Linear(n_embd, 1, device=next(sublayer.parameters()).device, dtype=torch.float32)
        nn.init.zeros_(self.router.weight)
        nn.init.ones_(self.router.bias)      # new gates are open: sigmoid(1) = 0.73
        self.width = 0.0                     # of the ramp that tuning has in the step's place; 0: the step
        self.bypass = False                  # True: the dense model, no gate is asked
        self.opened = self.seen = None       # how many gates were open, of how many, since the last prompt
        self.trace = None                    # a list that collects every decision, for those who want to see
        self.decides_at_each_step = self.scope == "token"

    @property
    def attn(self):
        """The attention behind the gate, or None."""
        return None if self.part == "mlp" else getattr(self.sublayer, "attn", self.sublayer)

    def forward(self, x, ctx):
        if self.bypass:
            return self.sublayer(x, ctx)
        if ctx.decoding and self.scope == "sequence":
            return self.run_open_rows(x, ctx, ctx.cache.decisions[self])
        h = self.norm(x)
        score = recomputed(self.score, h, ctx)                           # (B,) a sequence, or (B, T) a token
        is_open = score >= self.threshold
        if self.trace is not None:
            self.trace.append(is_open.cpu())
        if self.training or torch.is_grad_enabled():
            gate = ramp(score, self.threshold, self.width) if self.width else \
                straight_through(score, self.threshold)
            counted = gate
            if self.scope == "token":
                counted = gate * (torch.arange(x.shape[1], device=x.device) < ctx.lengths[:, None])
            self.count(counted.sum(), ctx)
            gate = gate.to(x.dtype).view(*gate.shape, *[1] * (x.dim() - gate.dim()))
            return torch.lerp(x, self.run(x, ctx, h), gate)              # x + g * f(h)
        if self.scope == "token":
            return self.run_open_tokens(x, ctx, h, is_open)
        rows = is_open.nonzero().squeeze(1)                              # the one wait for the device
        self.count(len(rows), ctx)
        if ctx.cache is not None:
            ctx.cache.decisions[self] = rows                             # the prompt decides for what follows
        return self.run_open_rows(x, ctx, rows, h)

    def norm(self, x):
        """The sublayer's normalized input."""
        return (self.attn or self.sublayer).norm(x)

    def run(self, x, ctx, h):
        """sublayer(x, ctx), given h = norm(x)."""
        if self.part == "block":
            return self.sublayer.mlp(x + self.attn.change(h, ctx))
        return x + self.sublayer.change(h, ctx)

    def pooled(self, h, ctx):
        """What the router reads, float32: each token's h, (B, T, C), or its mean over the prompt, (B, C)."""
        if self.scope == "token":
            return h.float()
        n, longest = (ctx.lengths, h.shape[1]) if self.pool == "all" else (ctx.prompt_lengths, ctx.max_prompt)
        real = torch.arange(longest, device=h.device) < n[:, None]
        return (h[:, :longest].float() * real[..., None]).sum(1) / n[:, None]

    def score(self, h, ctx):
        """How much the sublayer is wanted, 0 to 1, float32: (B,) or (B, T); h = norm(x), (B, T, C)."""
        return torch.sigmoid(self.router(self.pooled(h, ctx)).squeeze(-1))

    def count(self, opened, ctx):
        """Note how many of this pass's gates are open, padding excluded (in training with the gradient)."""
        seen = sum(ctx.sizes) if self.scope == "token" else len(ctx.lengths)
        self.opened, self.seen = (self.opened + opened, self.seen + seen) if ctx.decoding else (opened, seen)

    def run_open_rows(self, x, ctx, rows, h=None):
        """The sublayer on the open rows of x (B, T, C) only; rows: their indices (n,), n from 0 to B;
        h = norm(x), where it is known."""
        if len(rows) == 0:
            return x
        h = self.norm(x) if h is None else h
        if len(rows) == len(x):
            return self.run(x, ctx, h)
        return x.index_copy(0, rows, self.run(x[rows], ctx.select(rows), h[rows]))

    def run_open_tokens(self, x, ctx, h, is_open):
        """The sublayer on the open tokens of x (B, T, C), keys and values of all; h = norm(x)."""
        is_open = is_open.cpu()                                          # (B, T); the one wait for the device
        columns = [row[:n].nonzero().squeeze(1) for row, n in zip(is_open, ctx.sizes)]
        n_open = sum(map(len, columns))
        self.count(n_open, ctx)
        if n_open == sum(ctx.sizes):
            return self.run(x, ctx, h)
        k, v = self.attn.keys_values(h, ctx) if self.attn else (None, None)
        if n_open == 0:
            return x
        at = torch.cat([b * x.shape[1] + c for b, c in enumerate(columns)]).to(x.device)
        open_x, open_h = (t.flatten(0, 1).index_select(0, at) for t in (x, h))     # (N, C), row after row
        open_x = open_x + (self.attend_from(open_h, k, v, ctx, columns, at) if self.attn else
                           self.sublayer.change(open_h))
        if self.part == "block":
            open_x = self.sublayer.mlp(open_x)
        return x.flatten(0, 1).index_copy(0, at, open_x).view_as(x)

    def attend_from(self, h, k, v, ctx, columns, at):
        """Attention's output (N, C) for open tokens, h (N, C), over keys and values (B, K, S, D).

        Where they are: `columns`, for each row, on the host; `at` (N,), through all rows, on the device.
        """
        T = ctx.cos.shape[-2]
        row, column = at // T, at % T
        cos, sin = (t[column] if t.dim() == 2 else t[row, 0, column] for t in (ctx.cos, ctx.sin))  # (N, D)
        q = self.attn.queries(h, cos, sin)[None]                         # (1, H, N, D)
        y, done = torch.empty_like(q), 0
        for b, of_row in enumerate(columns):
            for chunk in of_row.split(QUERY_CHUNK) if len(of_row) else ():
                n, start, end, mask = len(chunk), 0, k.shape[2], None
                if ctx.first is None:
                    mask = ctx.mask[b, 0, chunk]                         # (n, S)
                else:
                    first, last = (int(chunk[i]) + ctx.first[b] for i in (0, -1))
                    start = max(0, first + 1 - (ctx.window or k.shape[2]))
                    end = last + 1                                       # keys that some query here may see
                    if n > 1:
                        end = min(k.shape[2], -(-end // KEY_CHUNK) * KEY_CHUNK)
                        position = (column[done:done + n] + ctx.first[b])[:, None].int()
                        keys = torch.arange(start if ctx.window else first + 1, end, device=h.device,
                                            dtype=torch.int32)
                        sees = keys <= position                          # (n, S'), of the last keys
                        if ctx.window:
                            sees &= keys > position - ctx.window
                        mask = additive(sees, q)
                seen = slice(b, b + 1), slice(None), slice(start, end)
                y[:, :, done:done + n] = attend(q[:, :, done:done + n], k[seen], v[seen], mask)
                done += n
        return self.attn.output(y[0])


def routers(model):
    """{layer: its MindSkip} of a model, in order."""
    found = {}
    for i, layer in enumerate(model.layers):
        for module in (layer, getattr(layer, "attn", None), getattr(layer, "mlp", None)):
            if isinstance(module, MindSkip):
                found[i] = module
    return found


@contextmanager
def dense(model):
    """Within it the model is the dense one: no gate is asked."""
    gates = list(routers(model).values())
    for gate in gates:
        gate.bypass = True
    try:
        yield model
    finally:
        for gate in gates:
            gate.bypass = False


@contextmanager
def trace(model):
    """Within it decisions are kept: yields {layer: [a bool tensor for each forward pass, (B,) or (B, T)]};
    at padding they mean nothing."""
    gates = routers(model)
    for gate in gates.values():
        gate.trace = []
    try:
        yield {i: gate.trace for i, gate in gates.items()}
    finally:
        for gate in gates.values():
            gate.trace = None


def parse_layers(spec, n_layer):
    """The layers that "all", "last:16", "2-29", "3,5,9" or "0,4-7" name, sorted. InputError if none."""
    layers = set()
    try:
        for part in str(spec).split(","):
            if part == "all":
                layers |= set(range(n_layer))
            elif part.startswith("last:"):
                layers |= set(range(n_layer - int(part[5:]), n_layer))
            else:
                first, _, last = part.partition("-")
                layers |= set(range(int(first), int(last or first) + 1))
    except ValueError:
        raise InputError(f"layers {spec!r}: write all, last:16, 2-29 or 3,5,9") from None
    if not layers or min(layers) < 0 or max(layers) >= n_layer:
        raise InputError(f"layers {spec!r}: this model has layers 0 to {n_layer - 1}; name at least one of"
                         " them, and no other")
    return sorted(layers)


def add_routers(model, granularity="attn_token", layers="all", threshold=0.5, pool="prompt"):
    """Put a gate, open at first, before a sublayer of each chosen layer; only the routers' parameters train
    then.

    granularity: one of GRANULARITIES; layers: see parse_layers; pool, at sequence level: "prompt", or "all"
    for the mean over the whole text as in the authors' code. Routers that the model had are replaced. Returns
    the model.
    """
    if granularity not in GRANULARITIES:
        raise InputError(f"granularity {granularity!r}: choose one of {', '.join(GRANULARITIES)}")
    if pool not in ("prompt", "all"):
        raise InputError(f"pool {pool!r}: choose prompt or all")
    chosen = parse_layers(layers, model.config.n_layer)
    remove_routers(model)
    model.requires_grad_(False)
    part = granularity.split("_")[0]
    for i in chosen:
        sublayer = model.layers[i] if part == "block" else getattr(model.layers[i], part)
        gate = MindSkip(sublayer, granularity, model.config.n_embd, threshold, pool).train(model.training)
        if part == "block":
            model.layers[i] = gate
        else:
            setattr(model.layers[i], part, gate)
    return model


def remove_routers(model):
    """Put every sublayer back in its place."""
    for i, gate in routers(model).items():
        if gate.part == "block":
            model.layers[i] = gate.sublayer
        else:
            setattr(model.layers[i], gate.part, gate.sublayer)


def shares(model):
    """{layer: share of its gates that were open} since the last prompt; in training differentiable."""
    found = routers(model)
    if any(gate.opened is None for gate in found.values()):
        raise RuntimeError("capacity: run the model first; it tells what its last forward pass did")
    return {i: gate.opened / gate.seen for i, gate in found.items()}


def overall(model):
    """Overall capacity as a tensor, with its gradient in training: layers without a router count as 1."""
    open_share, n = shares(model), model.config.n_layer
    return torch.as_tensor((sum(open_share.values()) + n - len(open_share)) / n)


def capacity(model, routed=False):
    """Overall capacity, the share of the model's sublayers that ran in the last forward pass (after
    `generate`: since its prompt); routed=True counts only layers with a router."""
    open_share = shares(model)
    mean = sum(open_share.values()) / len(open_share) if routed and open_share else overall(model)
    return float(torch.as_tensor(mean).detach())


class Usage:
    """How often the gates were open, over many passes: call `add` after each."""

    def __init__(self, model):
        self.model, self.opened, self.seen = model, {}, 0

    def add(self):
        for i, gate in routers(self.model).items():
            self.opened[i] = self.opened.get(i, 0) + int(gate.opened)
        self.seen += gate.seen if self.opened else 0

    def summary(self):
        """{"capacity": overall, "routed_capacity", "keep": {layer: share}}."""
        keep, n = {i: opened / self.seen for i, opened in self.opened.items()}, self.model.config.n_layer
        return {"capacity": (sum(keep.values()) + n - len(keep)) / n,
                "routed_capacity": sum(keep.values()) / len(keep) if keep else 1.0, "keep": keep}


def shape_of(model):
    """What a router file must agree on with its model."""
    c = model.config
    return {"n_layer": c.n_layer, "n_embd": c.n_embd, "n_head": c.n_head, "n_kv_head": c.n_kv_head,
            "intermediate": c.intermediate, "vocab_size": c.vocab_size}


def save_routers(model, path, calibration=None, **notes):
    """Write the routers to a safetensors file: layers.N.weight (1, n_embd) and .bias (1,), and what they are
    for.

    calibration: [(threshold, the overall capacity measured with it)], what `load_routers` reads a capacity
    from; notes: strings to keep.
    """
    found = routers(model)
    if not found:
        raise InputError("save_routers: the model has no routers; add_routers first")
    one = next(iter(found.values()))
    meta = {"granularity": f"{one.part}_{one.scope}", "layers": ",".join(map(str, found)), "pool": one.pool,
            "threshold": repr(one.threshold), "model": json.dumps(shape_of(model)),
            "calibration": json.dumps(sorted(calibration or [])), **notes}
    tensors = {f"layers.{i}.{name}": p.detach().float().cpu().contiguous()
               for i, gate in found.items() for name, p in gate.router.named_parameters()}
    write_file(path, safetensors_bytes(tensors, metadata=meta))


def threshold_for(capacity, table, path):
    """The threshold that gives an overall capacity, between the two of the calibration that lie around it."""
    table = sorted((used, threshold) for threshold, used in table)
    if not table or not table[0][0] <= capacity <= table[-1][0]:
        what = f"capacities from {table[0][0]:.3f} to {table[-1][0]:.3f}" if table else "no capacity"
        raise InputError(f"{path}: its calibration has {what}, not {capacity}; ask for one that it has, or"
                         " tune with --capacity")
    for (c0, t0), (c1, t1) in zip(table, [*table[1:], table[-1]]):
        if capacity <= c1:
            return t0 + (t1 - t0) * (capacity - c0) / (c1 - c0) if c1 > c0 else t0


def load_routers(model, path, capacity=None):
    """Add the routers of a file; returns its metadata. capacity: an overall capacity other than the one they
    were tuned for, which moves the threshold. InputError if they are for another model, or cannot give it."""
    file = open_safetensors(path)
    meta = file.metadata() or {}
    missing = {"granularity", "layers", "pool", "threshold", "model"} - meta.keys()
    if missing:
        raise InputError(f"{path}: not a router file (it has no {min(missing)}); train_router.py writes one")
    if json.loads(meta["model"]) != shape_of(model):
        raise InputError(f"{path}: these routers are for a model of another shape, {meta['model']}; this one"
                         f" has {json.dumps(shape_of(model))}")
    add_routers(model, meta["granularity"], meta["layers"], float(meta["threshold"]), meta["pool"])
    for i, gate in routers(model).items():
        for name, p in gate.router.named_parameters():
            key = f"layers.{i}.{name}"
            if key not in file.keys() or tuple(file.get_slice(key).get_shape()) != tuple(p.shape):
                raise InputError(f"{path}: tensor {key} is missing or not of shape {tuple(p.shape)}")
            p.data.copy_(file.get_tensor(key))
        if capacity is not None:
            gate.threshold = threshold_for(capacity, json.loads(meta["calibration"]), path)
    return meta
