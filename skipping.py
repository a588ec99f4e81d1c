"""What inference computes of a gated sublayer: the open rows or tokens, gathered, run and put back.

    run_sequences one gate per sequence: closed rows compute nothing and store nothing
    run_tokens    one gate per token, kv="all": a closed token gets a key and a value, and nothing else
    run_all       run_tokens for short prompts on CUDA, where computing everything beats a device sync
    run_step      one gate per token, in a step of generation: attention's matmuls run for all rows
    run_single    run_step for one row on a CPU, in as few operations as possible
    run_captured  a step of generation in a CUDA graph: no tensor is read on the host

With kv="open" a prompt is read in open_keys.py, whose OpenKeys give a step its Context.

`skip` is the MindSkip (router.py), x (B, T, C) the residual stream before its sublayer and h = norm(x). What
a running generation has to know of earlier tokens is kept in its cache, in cache.routing[name][skip]:

    "open rows"   sequence level: indices, on the host, of the rows whose prompt opened the gate
    "pending"     token level, kv="all": [(x_or_h, rms, cos, sin)] of steps without an open token, whose keys
                  and values are deferred, see `defer`
    "open keys"   kv="open": an OpenKeys (open_keys.py)
    "single"      what run_single looks up once per generation

and in a CUDA graph, (B,) each, on the device, made by support/graph.py:

    "is open"     sequence level: what the prompt decided
    "decisions"   token level: what this step decides
    "n open"      kv="open": how many tokens were open before this step
"""
import math
from dataclasses import replace

import numpy as np
import torch

from model import merge_heads, rotate, split_heads
from support.attention import additive_mask, attention_of_some, fill, is_native_bfloat16
from support.cuda import fused, is_asynchronous, only_for, to_device, to_host
from support.kernels import logit_of_token, normalized, root_mean_square

PENDING = 32        # most steps whose deferred keys and values are computed in one matmul
GATHERED_FROM = 2**37   # B * T * C * (T + C): on CUDA smaller prompts use run_all (measured on an H200)


# ----------------------------------------------------------------------------------------- gates of sequences
def run_sequences(skip, x, ctx, h, is_open):
    """The sublayer on the open rows only, is_open (B,), from their prompt on."""
    rows = open_indices(to_host(is_open)())           # the last call waits: the one device sync
    skip.count(len(rows), ctx)
    if ctx.cache is not None:
        ctx.cache.routing["open rows"][skip] = rows
    return run_rows(skip, x, ctx, rows, h)


def open_indices(decided):
    """Indices (n,) of what is open, from decisions (N,) on the host."""
    return decided.nonzero().squeeze(1)


def run_rows(skip, x, ctx, rows, h=None):
    """The sublayer on some rows only: `rows`, their indices (n,) on the host."""
    if len(rows) == 0:
        return skip.replacement(x)
    h = skip.norm(x) if h is None else h
    if len(rows) == len(x):
        return skip.sublayer(x, ctx, h)
    rows = to_device(rows, x.device)
    y = skip.sublayer(x[rows], select_rows(ctx, rows), h[rows])
    return skip.replacement(x).index_copy(0, rows, y)


def select_rows(ctx, rows):
    """The Context of some rows of the batch, given by their indices (n,), as a sublayer reads it."""
    def select(t):
        # per row: (B,), (B, 1, T, D), (B, 1, T, S); the same for all rows: (T, D), (1, 1, T, S)
        has_rows = t is not None and t.dim() in (1, 4) and len(t) > 1
        return t[rows] if has_rows else t
    names = "cos", "sin", "mask", "slots"                    # per row, and read by a sublayer
    return replace(ctx, **{name: select(getattr(ctx, name)) for name in names})


# ------------------------------------------------------------------------------------------- gates of tokens
def run_tokens(skip, x, ctx, h, is_open):
    """The sublayer on a prompt's open tokens only, is_open (B, T); keys and values of all are computed."""
    if min(ctx.host_lengths) < x.shape[1]:
        is_open = is_open & real_tokens(x, ctx)                        # padding is closed
    if is_asynchronous(x) and x.numel() * sum(x.shape[1:]) < GATHERED_FROM:      # B * T * C * (T + C)
        return run_all(skip, x, ctx, h, is_open)
    attn, attended = skip.attn, None                                   # attended: (k, v), (B, K, S, D) each
    fetch = to_host(is_open)                                           # starts an asynchronous copy
    if attn and is_asynchronous(x):
        attended = keys_values(attn, ctx, h)                           # the device works during the copy
    decided = fetch()                                                  # (B, T) on the host; waits for it
    at, counts = open_tokens(decided)
    skip.count(len(at), ctx)
    n_real = sum(ctx.host_lengths)
    if few_are_closed(skip, n_real - len(at), n_real, x):    # on CUDA keys and values are then computed twice
        y = skip.sublayer(x, ctx, h)
        if len(at) == n_real:
            return y
        closed_at = to_device(open_indices(~decided.flatten()), x.device)
        return copy_tokens(y, closed_at, skip.replacement(x.flatten(0, 1)[closed_at]))
    if attn and attended is None:
        attended = keys_values(attn, ctx, h)
    return run_gathered(skip, x, ctx, h, at, counts, attended) if len(at) else skip.replacement(x)


def few_are_closed(skip, n_closed, n, x):
    """Whether so few of a prompt's n tokens are closed that gathering the others takes longer than computing
    all: as long as a tenth of them; as a twentieth and 100 in native bfloat16, where attention is fast."""
    return n_closed <= (n / 20 + 100 if skip.part == "attn" and is_native_bfloat16(x) else n / 10)


def run_all(skip, x, ctx, h, is_open):
    """run_tokens without a device sync: everything is computed, and closed tokens' results are discarded."""
    skip.count(is_open.sum(), ctx)
    return torch.where(is_open[..., None], skip.sublayer(x, ctx, h), skip.replacement(x))


def real_tokens(x, ctx):
    """Which tokens of a pass are not padding, (B, T) bool; x (B, T, ...)."""
    return torch.arange(x.shape[1], device=x.device) < ctx.lengths[:, None]


def open_tokens(decided):
    """Indices (N,) among B * T of the open tokens, and how many each row has (a list), from decisions (B, T)
    on the host."""
    return open_indices(decided.flatten()), decided.sum(1).tolist()


def run_gathered(skip, x, ctx, h, host_at, counts, attended):
    """The sublayer on gathered tokens: host_at (N,), counts: see open_tokens; attended: what keys_values
    gives, None for an MLP."""
    attn, n = skip.attn, len(host_at)
    host_at, counts = fill(host_at, counts, x)                           # padded: only n are real
    at = to_device(host_at, x.device)
    open_x = x.flatten(0, 1).index_select(0, at)                         # (N, C), row after row
    open_h = h.flatten(0, 1).index_select(0, at)
    if attn:
        q = queries(attn, open_h, ctx, at)                               # (H, N, D)
        y = attention_of_some(q[None], *attended, counts, host_at, at, x.shape[1], ctx.mask)[0]
        open_x = attn.o(merge_heads(y), plus=open_x)
    else:
        open_x = skip.sublayer(open_x, ctx, open_h)
    if skip.part == "block":
        open_x = skip.sublayer.mlp(open_x)
    return copy_tokens(skip.replacement(x), at[:n], open_x[:n])


def copy_tokens(x, at, tokens):
    """x (B, T, C) with `tokens` (N, C) in the places at (N,), flat indices among B * T."""
    return x.flatten(0, 1).index_copy(0, at, tokens).view_as(x)


def keys_values(attn, ctx, h):
    """Keys and values of all tokens, (B, K, S, D) each, stored in the cache if there is one; h (B, T, C)."""
    kv = split_heads(attn.qkv(h, start=attn.n_head * attn.head_dim), attn.head_dim)     # (B, 2K, T, D)
    k, v = kv[:, :attn.n_kv_head], kv[:, attn.n_kv_head:]
    if attn.k_norm:
        k = attn.k_norm(k)
    if attn.rotates:
        k = rotate(k, ctx.cos, ctx.sin)
    return (k, v) if ctx.cache is None else ctx.cache.store(attn.layer, k, v, ctx)


def queries(attn, h, ctx, at):
    """Queries (H, N, D) of gathered tokens h (N, C); at (N,): their indices among the pass's B * T tokens."""
    q = split_heads(attn.qkv(h, end=attn.n_head * attn.head_dim), attn.head_dim)
    if attn.q_norm:
        q = attn.q_norm(q)
    return rotate_some(q, ctx.cos, ctx.sin, at) if attn.rotates else q


@fused
def rotate_some(q, cos, sin, at):
    """`rotate` of gathered tokens q (H, N, D), at (N,): see queries; cos and sin are of all tokens."""
    T = cos.shape[-2]
    row, column = at // T, at % T
    index = column if cos.dim() == 2 else (row, 0, column)                  # of (T, D) or (B, 1, T, D)
    return rotate(q, cos[index], sin[index])


# A step of generation in which no token is open defers its keys and values: they are computed in one matmul
# with those of the next step that has open tokens, or when PENDING steps have deferred theirs.
def defer(attn, pending, x_or_h, rms, ctx):
    """Defer a step's keys and values. x_or_h: its h, with rms None, or its x, with x's root mean square."""
    if len(pending) < PENDING - 1:
        pending.append((x_or_h, rms, ctx.cos, ctx.sin))
    else:
        keys_values(attn, *with_pending(attn, pending, x_or_h, rms, ctx))


def with_pending(attn, pending, x_or_h, rms, ctx):
    """The Context and h (B, n, C) of all pending steps and, last, this one; empties `pending`. x_or_h, rms:
    see `defer`."""
    pending.append((x_or_h, rms, ctx.cos, ctx.sin))
    inputs, all_rms, cos, sin = zip(*pending)
    pending.clear()
    if ctx.cos.dim() == 4:                                # (B, 1, 1, D), but of earlier steps perhaps (1, D)
        cos = [of_step.expand(len(x_or_h), 1, 1, -1) for of_step in cos]
        sin = [of_step.expand(len(x_or_h), 1, 1, -1) for of_step in sin]
    cos, sin, h = torch.cat(cos, -2), torch.cat(sin, -2), torch.cat(inputs, 1)
    if rms is not None:
        h = normalized(h, torch.tensor(all_rms)[:, None], attn.norm.weight)
    return replace(ctx, cos=cos, sin=sin), h


def run_step(skip, x, ctx, h, is_open):
    """The sublayer in a step of generation, one token per row, is_open (B, 1)."""
    attn = skip.attn
    decided = to_host(is_open)().squeeze(1)                              # (B,) on the host
    row_is_open = decided.tolist()
    n_open = sum(row_is_open)
    skip.count(n_open, ctx)
    if not attn:
        return run_rows(skip, x, ctx, open_indices(decided), h)
    pending = ctx.cache.routing["pending"].setdefault(skip, [])          # none with kv="open"
    if n_open == 0:
        if skip.kv == "all":
            defer(attn, pending, h, None, ctx)
        return skip.replacement(x)
    if pending:
        ctx, h = with_pending(attn, pending, h, None, ctx)
    if skip.kv == "open":
        ctx = ctx.cache.routing["open keys"][skip].step(ctx, row_is_open)
    if n_open == len(x):
        return skip.sublayer(x, ctx, h)
    with only_for(is_open.squeeze(1)):      # attention skips closed rows; matmuls do not
        y = attn(x, ctx, h)
    x = torch.where(is_open[..., None], y, skip.replacement(x))
    if skip.part == "block":
        rows = to_device(open_indices(decided), x.device)
        x = x.index_copy(0, rows, skip.sublayer.mlp(x[rows]))
    return x


def look_up(skip, routing):
    """What run_single reads of a MindSkip: (sublayer; its attention, if closed steps defer keys and values;
    the norm's weight and eps; the token's logit; pending steps; an OpenKeys or None)."""
    norm, router = skip.norm, skip.router
    logit = logit_of_token(norm, router.weight, router.bias)
    deferring = skip.attn if skip.kv == "all" else None
    pending, open_keys = routing["pending"].setdefault(skip, []), routing["open keys"].get(skip)
    return skip.sublayer, deferring, norm.weight, norm.eps, logit, pending, open_keys


def run_single(skip, x, ctx):
    """run_step for one row on a CPU, where the overhead of each operation counts: the gate is decided in
    Python floats, from two dot products, one for the norm and one for the logit. What it reads of a MindSkip
    is looked up once per generation: an nn.Module takes microseconds to find an attribute."""
    singles = ctx.cache.routing["single"]
    if skip not in singles:
        singles[skip] = look_up(skip, ctx.cache.routing)
    sublayer, deferring, norm_weight, eps, logit, pending, open_keys = singles[skip]
    token = x.flatten().float()                                          # (C,)
    rms = root_mean_square(token, eps)
    score = 0.5 + 0.5 * math.tanh(logit(token, rms) / 2)                 # sigmoid, without overflow
    if skip.override:
        score = float(skip.override(torch.tensor([[score]]), ctx))
    is_open = bool(np.float32(score) >= np.float32(skip.threshold))      # in float32, as elsewhere
    if skip.trace is not None:
        skip.trace.append(torch.tensor([[is_open]]))
    skip.count(int(is_open), ctx)
    if is_open and pending:
        return sublayer(x, *with_pending(deferring, pending, x, rms, ctx))
    if is_open and open_keys:
        ctx = open_keys.step(ctx, [True])
    if is_open:
        return sublayer(x, ctx, normalized(x, rms, norm_weight))
    if deferring:
        defer(deferring, pending, x, rms, ctx)
    return skip.replacement(x)


# ------------------------------------------------------------------------------------------ a captured step
def run_captured(skip, x, ctx):
    """The sublayer in a step that support/graph.py captures: the same kernels run whichever gates are open.
    They read is_open (B,) on the device: attention skips the keys of closed rows; with B = 1 a closed row's
    matmuls skip their weights, too; with more rows matmuls run for all."""
    attn, h = skip.attn, skip.norm(x)
    n_gated = {}                         # {Linear: n}: its first n outputs are needed only where open
    if skip.scope == "sequence":
        is_open = ctx.cache.routing["is open"][skip]                                # as the prompt decided
    else:
        is_open = skip.score(h, ctx).squeeze(1) >= skip.threshold
        ctx.cache.routing["decisions"][skip] = is_open
        if skip.kv == "open":
            n_open = ctx.cache.routing["n open"][skip]                              # (B,), before this step
            ctx = at_slots(ctx, n_open.clone(), ctx.end)
            n_open += is_open                                            # in place: the graph's own tensor
        elif attn:
            n_gated = {attn.qkv: attn.n_head * attn.head_dim}           # queries; k and v always run
    with only_for(is_open, n_gated):
        y = skip.sublayer(x, ctx, h)
    return torch.where(is_open[:, None, None], y, skip.replacement(x))


def at_slots(ctx, slots, end):
    """The Context of a step with kv="open": each row writes its key and value where its next open token
    belongs, slots (B,), all below `end`, and sees those before. If it is closed, the next open one overwrites
    them."""
    visible = torch.arange(end, device=slots.device) <= slots[:, None, None, None]
    return replace(ctx, slots=slots, end=end, mask=additive_mask(visible, ctx.cos.dtype))
