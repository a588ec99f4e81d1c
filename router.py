"""MindSkip: a Llama whose sublayers stand behind gates, after Router-Tuning (EMNLP 2025, arXiv 2410.13184).

    s = sigmoid(w . pool(norm(x)) + b)      the score, float32
    g = 1 if s >= threshold else 0          the gate
    y = x + g * f(norm(x))                  the routed sublayer: g = 0 leaves the residual stream as it was

`add_routers(model, ...)` puts a router, one linear layer, before a sublayer of each chosen layer and freezes
the rest of the model. `model.train()` computes every sublayer and multiplies it by its gate, so that
gradients reach w and b. `model.eval()` skips what is closed, wherever that saves time (skipping.py).

    granularity       what one gate decides over          keys and values where it is closed
    attn_sequence     attention, for a whole sequence     not computed, not stored
    attn_token        attention, for one token            computed, so that later tokens may attend to it (*)
    block_sequence    attention and MLP, a sequence       not computed, not stored
    block_token       attention and MLP, a token          computed (*)
    mlp_sequence      the MLP, for a whole sequence       (it has none)
    mlp_token         the MLP, for one token              (it has none)

(*) With kv="open" not computed, not stored: a closed token takes no part, as in Mixture of Depths.
Where that is faster, what is closed is computed all the same, and dropped: see skipping.py.
The gate of a sequence reads its prompt's mean (pool="all": the whole text's), and holds from then on.
"""
import json
import math
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from safetensors.torch import save as safetensors_bytes
from torch import nn

import open_keys
import skipping
from support.checked import check_choices, open_router_file, tensor_of
from support.cli import parse_layers
from support.files import InputError, write_file
from support.kernels import first_mean, logit, recomputed

GRANULARITIES = [f"{part}_{scope}" for part in ("attn", "mlp", "block") for scope in ("sequence", "token")]
KV_OPEN = "attn_token", "block_token"                 # granularities that may have kv="open"


# -------------------------------------------------------------------------------------------------- the gate
class LinearRouter(nn.Linear):
    """The part of a gate that trains: one linear layer, from the gate's input to the logit of its score. New
    gates are open. scope: "sequence" or "token"; pool: what a sequence's gate reads, "prompt" or "all" (as in
    the authors' code)."""

    def __init__(self, n_embd, scope, pool="prompt", bias=True):
        super().__init__(n_embd, 1, bias=bias, dtype=torch.float32)
        self.scope, self.pool = scope, pool
        nn.init.zeros_(self.weight)
        if bias:
            nn.init.ones_(self.bias)         # a score of 0.73: open at 0.5; MindSkip adds more

    def pooled(self, h, ctx):
        """The gate's input, from h = norm(x) (B, T, C): each token's h, or their mean, float32 (B, C)."""
        if self.scope == "token":
            return h
        if self.pool == "all":
            return recomputed(first_mean, h, ctx.lengths, h.shape[1])
        return recomputed(first_mean, h, ctx.prompt_lengths, ctx.longest_prompt)

    def forward(self, inputs):
        """The logit of the score, float32 (..., 1), from what `pooled` returns."""
        return recomputed(logit, inputs, self.weight, self.bias)


# Kinds of gate, each by the class of its router. To add one, add its name here. A router has
#   __init__(n_embd, scope, pool), and the attribute pool
#   pooled(h, ctx)       the gate's input, from h = norm(x) (B, T, C): (B, ...) at sequence level; at token
#       level (B, T, ...), each token's from its own h alone, since a decoding step has one token per row
#   forward(inputs)      the logit of the score, (..., 1), from what `pooled` returns
# and may have
#   attach(sublayer)     called once, for parameters whose shapes depend on the sublayer
#   replacement(x)       the output of closed tokens x (..., C): a new tensor of x's dtype, each token's from
#       its own x alone; also called for open ones, whose result is discarded
#   merge(skip, x, y, score, is_open)    at token level, replaces x + g * f(h): the residual stream (B, T, C)
#       after the sublayer, from y = x + f(h); in model.eval() closed tokens have y = x
# skipping.run_single computes the score itself if forward and pooled are LinearRouter's. A CUDA graph may
# capture a step of generation, so no method may read a tensor on the host.
GATES = {
    "linear": LinearRouter,                             # open at first
    "unbiased": partial(LinearRouter, bias=False),      # the paper's: scores of 0.5 at first, just open
}
CHOICES = {"granularity": GRANULARITIES, "pool": ("prompt", "all"), "gate": GATES, "kv": ("all", "open")}


def straight_through(score, threshold):
    """The gate: exactly 0 or 1 forward, the gradient of the score backward (arXiv 1308.3432)."""
    return (score >= threshold).to(score.dtype) + (score - score.detach())


def close_all(score, ctx):      # for MindSkip.override, see below
    return torch.zeros_like(score)
close_all.on_device = True      # the host reads no tensor, so that a CUDA graph may capture it


# -------------------------------------------------------------------------------------------------- MindSkip
class MindSkip(nn.Module):
    """In the place of a sublayer x -> x + f(norm(x)): x -> x + g * f(norm(x)). g is 0 or 1, in training also
    between. For a block, f is what attention and MLP add together."""

    def __init__(self, sublayer, granularity, n_embd, threshold=0.5, pool="prompt", gate="linear", kv="all"):
        super().__init__()
        self.part, self.scope = granularity.split("_")
        self.sublayer, self.threshold = sublayer, threshold
        self.gate_name, self.kv = gate, kv
        router = GATES[gate](n_embd, self.scope, pool)
        if isinstance(router, LinearRouter) and router.bias is not None and threshold > 0.5:
            router.bias.data += math.log(threshold / max(1 - threshold, 1e-16))        # so that it is open
        if hasattr(router, "attach"):
            router.attach(sublayer)
        self.router = router.to(next(sublayer.parameters()).device)
        self.merges = hasattr(router, "merge")
        self.replaces = hasattr(router, "replacement")
        methods = type(router).forward, type(router).pooled
        self.is_plain = methods == (LinearRouter.forward, LinearRouter.pooled) and not self.merges
        if self.merges and (self.replaces or self.scope == "sequence"):
            raise InputError(f"gate {gate!r}, {granularity}: merge is for tokens' gates, without replacement")
        self.estimator = straight_through    # (score, threshold) -> the gate in training, with its gradient
        self.override = None                 # (score, ctx) -> the scores to use instead, where a gate decides
        self.bypass = False                  # True, see `dense`: no score is computed, nothing is counted
        self.opened = self.seen = None       # sum of the gates since the last prompt, and their number
        self.gates = None                    # after a training pass: each of them, (B,) or (B, T)
        self.trace = None                    # a list: collects the decisions of every pass
        self.train(sublayer.training)

    @property
    def attn(self):
        """The attention behind the gate, or None."""
        if self.part == "mlp":
            return None
        return self.sublayer.attn if self.part == "block" else self.sublayer

    def forward(self, x, ctx, h=None):                   # h: only to match a sublayer's signature
        if self.bypass:                                                  # the dense model
            return self.sublayer(x, ctx, h)
        if ctx.captured:                                                 # decoding in a CUDA graph
            return skipping.run_captured(self, x, ctx)
        if ctx.decoding and self.scope == "sequence":                    # already decided, by the prompt
            return skipping.run_rows(self, x, ctx, ctx.cache.routing["open rows"][self])
        if ctx.decoding and self.is_single(x):                           # fast path: one row, on a CPU
            return skipping.run_single(self, x, ctx)
        h = self.norm(x)                                                 # all other cases decide here
        score = self.score(h, ctx)                                       # (B,), or (B, T) at token level
        is_open = score >= self.threshold
        if self.trace is not None:
            self.trace.append(is_open)
        if self.training:
            return self.run_gated(x, ctx, h, score, is_open)
        if self.scope == "sequence":
            return skipping.run_sequences(self, x, ctx, h, is_open)
        if ctx.decoding:
            y = skipping.run_step(self, x, ctx, h, is_open)
        elif self.kv == "open":
            y = open_keys.run_open_only(self, x, ctx, h, is_open)
        else:
            y = skipping.run_tokens(self, x, ctx, h, is_open)
        return self.router.merge(self, x, y, score, is_open) if self.merges else y

    def __getstate__(self):
        """For copies: without the autograd graph that a training pass leaves in `opened` and `gates`."""
        opened = self.opened.detach() if torch.is_tensor(self.opened) else self.opened
        return vars(self) | {"opened": opened, "gates": None}

    def _apply(self, fn, recurse=True):
        """Called by .to(), .half() and the like: the router changes its device but keeps its dtype."""
        if recurse:                                      # it has no tensors of its own
            self.sublayer._apply(fn)
            self.router._apply(lambda tensor: tensor.to(fn(tensor).device))
        return self

    @property
    def norm(self):
        """What normalizes the sublayer's input."""
        return (self.attn or self.sublayer).norm

    def is_single(self, x):
        """Whether skipping.run_single serves for a step's x (B, 1, C): inference of one row on a CPU, by the
        linear router, not in float64."""
        if not self.is_plain or self.training or self.router._forward_hooks or self.router._forward_pre_hooks:
            return False
        return len(x) == 1 and x.device.type == "cpu" and x.dtype != torch.float64

    def score(self, h, ctx):
        """The router's score, 0 to 1, float32: (B,) or (B, T); h = norm(x), (B, T, C)."""
        score = torch.sigmoid(self.router(self.router.pooled(h, ctx)).squeeze(-1))
        return self.override(score, ctx) if self.override else score

    def replacement(self, x):
        """The output of closed tokens x (..., C)."""
        return self.router.replacement(x) if self.replaces else x

    def count(self, n_open, ctx, gates=None):
        """Note how many of this pass's gates are open, padding excluded. In training n_open is the sum of the
        gates, `gates` are all of them, and both have gradients."""
        n_seen = sum(ctx.host_lengths) if self.scope == "token" else len(ctx.host_lengths)
        if ctx.decoding:
            n_open, n_seen = self.opened + n_open, self.seen + n_seen
        vars(self).update(opened=n_open, seen=n_seen, gates=gates)       # nn.Module's setattr takes 15 us

    def run_gated(self, x, ctx, h, score, is_open):
        """Training: x + g * f(h), all computed, since dL/dg is the inner product of f(h) and dL/dy."""
        gate = self.estimator(score, self.threshold)                     # (B,) or (B, T)
        if self.scope == "token":
            real_gates = gate * skipping.real_tokens(x, ctx)
            self.count(real_gates.sum(), ctx, real_gates)
            if self.kv == "open":
                ctx = open_keys.mask_closed_keys(ctx, gate, x.dtype)
        else:
            self.count(gate.sum(), ctx, gate)
            gate = gate[:, None]                                         # (B, 1), as (B, T) of tokens
        y = self.sublayer(x, ctx, h)                                     # x + f(h), (B, T, C)
        if self.merges:
            return self.router.merge(self, x, y, score, is_open)
        return torch.lerp(self.replacement(x), y, gate[..., None].to(x.dtype))       # x + g * f(h)


# --------------------------------------------------------------------------------------------- a routed model
def mindskips(model):
    """{layer: its MindSkip} of a model, in order."""
    modules = ((i, module) for i, layer in enumerate(model.layers) for module in layer.modules())
    return {i: module for i, module in modules if isinstance(module, MindSkip)}


@contextmanager
def dense(model):
    """Context manager: the model runs dense, all its gates bypassed."""
    outer = {skip: skip.bypass for skip in mindskips(model).values()}
    for skip in outer:
        skip.bypass = True
    try:
        yield
    finally:
        for skip, bypass in outer.items():
            skip.bypass = bypass


@contextmanager
def trace(model):
    """Context manager that records decisions: {layer: [(B,) or (B, T) bool, of each pass that decides]}, on
    their device."""
    skips = mindskips(model)
    outer = {i: skip.trace for i, skip in skips.items()}
    for skip in skips.values():
        skip.trace = []
    try:
        yield {i: skip.trace for i, skip in skips.items()}
    finally:
        for i, skip in skips.items():
            if outer[i] is not None:
                outer[i] += skip.trace
            skip.trace = outer[i]


def decisions_on(decisions, tokens):
    """All layers' decisions (n,) in one traced pass; at token level only of the tokens in a mask (B, T)."""
    decided = torch.stack([is_open for (is_open,) in decisions.values()]).cpu()    # (layers, B) or (.., B, T)
    return (decided[:, tokens] if decided.dim() == 3 else decided).flatten()


def place(model, layer, part, module):
    """Put a module in the place of a layer's sublayer."""
    if part == "block":
        model.layers[layer] = module
    else:
        setattr(model.layers[layer], part, module)


def add_routers(model, granularity="attn_token", layers="all", threshold=0.5, pool="prompt", gate="linear",
                kv="all"):
    """Put a gate before a sublayer of each chosen layer; from then on only the routers' parameters train.

    granularity: one of GRANULARITIES; layers: see parse_layers; pool: see LinearRouter; gate: one of GATES;
    kv: "all", or "open" for attn_token and block_token: which tokens have keys and values. threshold: 0 to 1;
    above 0.5 new gates of another kind than "linear" may be closed. Routers that the model had are replaced.
    Returns the model. InputError names a value that is not one of these.
    """
    check_choices(dict(granularity=granularity, pool=pool, gate=gate, kv=kv), CHOICES)
    if kv == "open" and granularity not in KV_OPEN:
        raise InputError(f"kv 'open': only for {' and '.join(KV_OPEN)}, not for {granularity}")
    if not 0 <= threshold <= 1:
        raise InputError(f"threshold {threshold}: should be from 0 to 1, as scores are")
    chosen = parse_layers(layers, model.config.n_layer)
    remove_routers(model)
    model.requires_grad_(False)
    part = granularity.split("_")[0]
    for i in chosen:
        sublayer = model.layers[i] if part == "block" else getattr(model.layers[i], part)
        place(model, i, part, MindSkip(sublayer, granularity, model.config.n_embd, threshold, pool, gate, kv))
    return model


def remove_routers(model):
    """Put every sublayer back in its place."""
    for i, skip in mindskips(model).items():
        place(model, i, skip.part, skip.sublayer)


# -------------------------------------------------------------------------------------------------- capacity
def overall_capacity(shares, n_layer):
    """The mean over n_layer layers of the share that runs: `shares` in routed layers, 1 in the others."""
    return (sum(shares) + n_layer - len(shares)) / n_layer


def routed_share(capacity, n_routed, n_layer):
    """The routed capacity of n_routed of n_layer layers at which overall capacity is `capacity`."""
    return 1 - (1 - capacity) * n_layer / n_routed


def open_shares(model):
    """[each routed layer's mean gate] since the last prompt: in training with its gradient."""
    skips = mindskips(model).values()
    if any(skip.seen is None for skip in skips):
        raise RuntimeError("capacity: run the model first; it tells what its last forward pass did")
    return [skip.opened / skip.seen for skip in skips]


def capacity(model, routed=False):
    """Overall capacity (routed=True: routed capacity) of the last forward pass that was not dense; after
    `generate`, of its prompt and all steps, rows that had ended included. In training gates are soft."""
    shares = open_shares(model)
    n_layer = len(shares) if routed and shares else model.config.n_layer
    return float(torch.as_tensor(overall_capacity(shares, n_layer)).detach())


# ------------------------------------------------------------------------------------------- the router file
def shape_of(model):
    """What a router file must agree on with its model."""
    keys = "n_layer", "n_embd", "n_head", "n_kv_head", "intermediate", "vocab_size"
    return {key: getattr(model.config, key) for key in keys}


def save_routers(model, path, calibration=None, **notes):
    """Write the routers to a safetensors file: tensors layers.N.weight (1, n_embd), layers.N.bias (1,), or
    what the kind of gate has, and as metadata what they are for. calibration: [(threshold, overall
    capacity)] of `calibrate`, between which `load_routers` interpolates; notes: strings, kept as they are."""
    skips = mindskips(model)
    if not skips:
        raise InputError("save_routers: the model has no routers; add_routers first")
    first = next(iter(skips.values()))
    if len({float(skip.threshold) for skip in skips.values()}) > 1:
        raise InputError("save_routers: a file has one threshold, and these gates have several; set one")
    meta = {"gate": first.gate_name, "granularity": f"{first.part}_{first.scope}",
            "layers": ",".join(map(str, skips)), "pool": first.router.pool, "kv": first.kv,
            "threshold": repr(float(first.threshold)), "model": json.dumps(shape_of(model)),
            "calibration": json.dumps(sorted(calibration or [])), **notes}
    tensors = {}
    for i, skip in skips.items():
        for name, tensor in skip.router.state_dict().items():
            tensors[f"layers.{i}.{name}"] = tensor.float().cpu().clone().contiguous()
    write_file(path, safetensors_bytes(tensors, metadata=meta))


def threshold_for(capacity, meta, path):
    """The threshold in a router file's metadata or, unless capacity is None, the one that gives this overall
    capacity, interpolated in the file's calibration."""
    if capacity is None:
        return float(meta["threshold"])
    # np.interp needs rising capacity; among equal ones the threshold falls
    table = sorted(json.loads(meta["calibration"]), key=lambda pair: (pair[1], -pair[0]))
    if not table:
        raise InputError(f"{path}: has no calibration (its recipe does none, its run did not finish, the"
                         " model was trained after it, or it was saved without one); leave out --capacity")
    thresholds, capacities = zip(*table)
    if not capacities[0] - 5e-4 <= capacity <= capacities[-1] + 5e-4:        # 3 digits are printed
        raise InputError(f"{path}: its calibration has capacities from {capacities[0]:.3f} to"
                         f" {capacities[-1]:.3f}, not {capacity}; ask for one of these, or tune for it")
    return float(np.interp(capacity, capacities, thresholds))


def load_routers(model, path, capacity=None):
    """Add the routers of a file; returns its metadata. capacity: an overall capacity other than the one they
    were tuned for; the threshold moves to give it. InputError where they do not fit, or cannot give it."""
    file, meta = open_router_file(path)
    if json.loads(meta["model"]) != shape_of(model):
        raise InputError(f"{path}: these routers are for a model of another shape, {meta['model']}; this one"
                         f" has {json.dumps(shape_of(model))}")
    threshold = threshold_for(capacity, meta, path)
    try:
        add_routers(model, meta["granularity"], meta["layers"], threshold, meta["pool"], meta["gate"],
                    meta["kv"])
    except InputError as e:
        raise InputError(f"{path}: {e}") from None
    try:
        for i, skip in mindskips(model).items():
            for name, tensor in skip.router.state_dict().items():
                tensor.copy_(tensor_of(file, f"layers.{i}.{name}", tensor.shape, path))
    except InputError:
        remove_routers(model)                # leave no partly loaded routers
        raise
    return meta
