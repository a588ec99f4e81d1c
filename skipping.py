"""What inference computes of a gated sublayer: the open rows or tokens, gathered, run and put back.

    run_sequences one gate per sequence: closed rows compute nothing and store nothing
    run_tokens    one gate per token, kv="all": closed tokens have a key and a value, and nothing else
    run_step      the same, generating: with half of the rows open or more, attention is computed for all
    run_open_only one gate per token, kv="open": closed tokens take no part, as in Mixture of Depths. The open
                  ones of a row are a shorter sequence, whose tokens keep their positions in the text
    run_captured  a step of generation in a CUDA graph, which asks the host nothing

`skip` is the MindSkip (router.py), x (B, T, C) the residual stream before its sublayer and h = norm(x). What
a running generation has to know of earlier decisions is kept in its cache, not in the modules.
"""
import math
from collections import defaultdict
from dataclasses import replace

import torch
import torch.nn.functional as F

from model import merge_heads, rotate, split_heads
from support.attention import additive_mask, attention, attention_of_some
from support.cuda import fused, is_asynchronous, only_for, to_device, to_host
from support.kernels import kernels_of_token

WAITING = 32        # steps of generation whose keys and values may wait
MOSTLY_OPEN = 0.5   # open share of a step's rows from which all are computed: weights are read once for all
NEARLY_OPEN = 0.9   # open share of a prompt's tokens from which all are computed: gathering costs a tenth
GATHERED_FROM = 2**36   # tokens * width^2 of a prompt on CUDA: less takes less time than to wait and gather
GROWTH = 64         # columns by which a cache of open tokens grows


# ----------------------------------------------------------------------------------------- gates of sequences
def open_rows(cache):
    """{MindSkip: indices, on the host, of the rows whose prompt opened its gate}, carried by a generation's
    cache."""
    return cache.routing.setdefault("open_rows", {})


def run_sequences(skip, x, ctx, h, is_open):
    """The sublayer on the open rows only, is_open (B,), from their prompt on."""
    rows = open_indices(to_host(is_open)())                              # the one wait for the device
    skip.count(len(rows), ctx)
    if ctx.cache is not None:
        open_rows(ctx.cache)[skip] = rows
    return run_rows(skip, x, ctx, rows, h)


def run_decided(skip, x, ctx):
    """The sublayer in a step of generation, on the rows whose prompt opened the gate."""
    return run_rows(skip, x, ctx, open_rows(ctx.cache)[skip])


def open_indices(decided):
    """Indices (n,) of what is open, from decisions (N,) on the host."""
    return decided.nonzero().squeeze(1)


def run_rows(skip, x, ctx, rows, h=None):
    """The sublayer on some rows only: `rows`, their indices (n,) on the host."""
    if len(rows) == 0:
        return x
    h = skip.norm(x) if h is None else h
    if len(rows) == len(x):
        return skip.sublayer(x, ctx, h)
    rows = to_device(rows, x.device)
    return x.index_copy(0, rows, skip.sublayer(x[rows], select_rows(ctx, rows), h[rows]))


def select_rows(ctx, rows):
    """The Context of some rows of the batch, given by their indices (n,), as a sublayer reads it."""
    def select(t):
        # (B,), (B, 1, T, D) or (B, 1, T, S); a first dimension of 1 is of all rows, (T, D) has none
        has_rows = t is not None and t.dim() in (1, 4) and len(t) > 1
        return t[rows] if has_rows else t
    names = "cos", "sin", "mask", "positions"                # of what is per row, what a sublayer reads
    return replace(ctx, **{name: select(getattr(ctx, name)) for name in names})


# ------------------------------------------------------------------------ gates of tokens, keys of all tokens
def run_tokens(skip, x, ctx, h, is_open):
    """The sublayer on the open tokens only, is_open (B, T); keys and values are computed of all."""
    if ctx.decoding:
        return run_step(skip, x, ctx, h, is_open)
    if is_asynchronous(x) and x.numel() * x.shape[2] < GATHERED_FROM:
        skip.count((is_open & real_tokens(x, ctx)).sum(), ctx)
        return torch.where(is_open[..., None], skip.sublayer(x, ctx, h), x)
    attn, kv, decided = skip.attn, None, to_host(is_open)
    if attn and is_asynchronous(x):
        kv = keys_values(attn, h, ctx)                                 # while the host waits for decisions
    at, counts = open_tokens(decided(), ctx.host_lengths)
    skip.count(len(at), ctx)
    if len(at) >= NEARLY_OPEN * sum(ctx.host_lengths):
        y = run_with_keys(skip, x, ctx, query_heads(attn, h), *kv) if kv else skip.sublayer(x, ctx, h)
        return y if len(at) == sum(ctx.host_lengths) else torch.where(is_open[..., None], y, x)
    if attn and not kv:
        kv = keys_values(attn, h, ctx)
    return run_gathered(skip, x, ctx, h, at, counts, kv) if len(at) else x


def real_tokens(x, ctx):
    """Which tokens of a pass are no padding, (B, T) bool; x (B, T, ...)."""
    return torch.arange(x.shape[1], device=x.device) < ctx.lengths[:, None]


def open_tokens(decided, lengths):
    """Indices (N,) among B * T of the open tokens, and how many each row has (a list), from decisions (B, T)
    on the host; lengths (a list): padding is excluded."""
    if min(lengths) < decided.shape[1]:
        decided = decided & (torch.arange(decided.shape[1]) < torch.tensor(lengths)[:, None])
    return open_indices(decided.flatten()), decided.sum(1).tolist()


def run_step(skip, x, ctx, h, is_open):
    """The same in a step of generation, one token per row, is_open (B, 1)."""
    decided, attn = to_host(is_open)().squeeze(1), skip.attn             # (B,) on the host
    n_open, n_rows = sum(decided.tolist()), len(ctx.host_lengths)
    skip.count(n_open, ctx)
    if not attn:
        return run_rows(skip, x, ctx, open_indices(decided), h)
    waiting = waiting_steps(skip, ctx)
    if n_open == 0:
        waiting.append((h, ctx))
        if len(waiting) == WAITING:
            store_waiting(attn, waiting)
        return x
    if n_open >= MOSTLY_OPEN * n_rows:
        y = run_with_waiting(skip, x, ctx, h, waiting) if waiting else skip.sublayer(x, ctx, h)
        return y if n_open == n_rows else torch.where(is_open[..., None], y, x)
    if waiting:
        store_waiting(attn, waiting)
    at, counts = open_tokens(decided[:, None], ctx.host_lengths)
    return run_gathered(skip, x, ctx, h, at, counts, keys_values(attn, h, ctx))


def run_gathered(skip, x, ctx, h, on_host, counts, kv):
    """The sublayer on gathered tokens: on_host (N,), counts: see open_tokens; kv: see keys_values, None for
    an MLP."""
    at, attn = to_device(on_host, x.device), skip.attn
    open_x = x.flatten(0, 1).index_select(0, at)                         # (N, C), row after row
    open_h = h.flatten(0, 1).index_select(0, at)
    if attn:
        q = queries(attn, open_h, ctx, at)                               # (H, N, D)
        y = attention_of_some(q[None], *kv, counts, on_host, at, x.shape[1], ctx.mask)[0]
        open_x = attn.o(merge_heads(y), plus=open_x)
    else:
        open_x = skip.sublayer(open_x, ctx, open_h)
    if skip.part == "block":
        open_x = skip.sublayer.mlp(open_x)
    return x.flatten(0, 1).index_copy(0, at, open_x).view_as(x)


def keys_values(attn, h, ctx):
    """Keys and values of all tokens, (B, K, S, D) each, stored in the cache if there is one; h (B, T, C)."""
    kv = split_heads(attn.qkv(h, start=attn.n_head * attn.head_dim), attn.head_dim)     # (B, 2K, T, D)
    return store_heads(attn, kv, ctx)


def store_heads(attn, kv, ctx):
    """The same, from their heads before the rotation, (B, 2K, T, D)."""
    k, v = kv[:, :attn.n_kv_head], kv[:, attn.n_kv_head:]
    if attn.k_norm:
        k = attn.k_norm(k)
    if attn.rotates:
        k = rotate(k, ctx.cos, ctx.sin)
    return (k, v) if ctx.cache is None else ctx.cache.store(attn.layer, k, v, ctx)


def query_heads(attn, h):
    """Heads of the queries of h (..., T, C), before norm and rotation: (..., H, T, D)."""
    return split_heads(attn.qkv(h, end=attn.n_head * attn.head_dim), attn.head_dim)


def queries(attn, h, ctx, at):
    """Queries (H, N, D) of gathered tokens h (N, C); at (N,): their indices among the pass's B * T tokens."""
    q = query_heads(attn, h)
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


# A step of generation in which no token is open lets its keys and values wait in the cache: what waits is
# computed in one product, with those of the next step that has open tokens, or when there are WAITING.
def waiting_steps(skip, ctx):
    """[(h, ctx) of each step that waits], carried by a generation's cache."""
    return ctx.cache.routing.setdefault("waiting", defaultdict(list))[skip]


def joined(steps):
    """h (B, n, C) of n steps that follow one another, and a Context that has all their angles."""
    h = torch.cat([h for h, _ in steps], 1)
    angles = {}
    for name in "cos", "sin":
        angle_of_steps = [getattr(ctx, name).expand(len(h), 1, 1, -1) for _, ctx in steps]
        angles[name] = torch.cat(angle_of_steps, 2)                                     # (B, 1, n, D)
    return h, replace(steps[-1][1], **angles)


def store_waiting(attn, waiting):
    """Compute and store the keys and values that wait."""
    keys_values(attn, *joined(waiting))
    waiting.clear()


def run_with_waiting(skip, x, ctx, h, waiting):
    """A step that computes every row, and the keys and values that wait, in one product."""
    attn = skip.attn
    all_h, all_ctx = joined([*waiting, (h, ctx)])
    waiting.clear()
    y = split_heads(attn.qkv(all_h), attn.head_dim)                                     # (B, H + 2K, n, D)
    q, kv = y[:, :attn.n_head, -1:], y[:, attn.n_head:]
    return run_with_keys(skip, x, ctx, q, *store_heads(attn, kv, all_ctx))


def run_with_keys(skip, x, ctx, q, k, v):
    """The sublayer of a pass whose keys and values (B, K, S, D) are there; q (B, H, T, D), unrotated."""
    attn = skip.attn
    if attn.q_norm:
        q = attn.q_norm(q)
    if attn.rotates:
        q = rotate(q, ctx.cos, ctx.sin)
    y = attention(q, k, v, ctx.mask, causal=ctx.mask is None and not ctx.decoding)      # (B, H, T, D)
    x = attn.o(merge_heads(y), plus=x)
    return skip.sublayer.mlp(x) if skip.part == "block" else x


# ------------------------------------------------------------------------------------------ a captured step
def run_captured(skip, x, ctx):
    """The sublayer in a step that support/graph.py captures: the same kernels whatever is open. They read the
    decision, is_open (B,), on the device: attention reads no key of a closed row, and with one row products
    read no weight either, and add nothing to x. With several rows products are computed for all."""
    attn, h, kept = skip.attn, skip.norm(x), {}
    if skip.scope == "sequence":
        is_open = ctx.cache.routing["is_open"][skip]                                # as the prompt decided
    else:
        is_open = skip.score(h, ctx).squeeze(1) >= skip.threshold
        ctx.cache.routing["decisions"][skip] = is_open
        if skip.kv == "open":
            ctx = next_slot(skip, ctx, is_open)
        elif attn:
            kept = {attn.qkv: attn.n_head * attn.head_dim}              # from there on, keys and values
    with only_for(is_open, kept):
        y = skip.sublayer(x, ctx, h)
    return y if kernels_of_token(x) else torch.where(is_open[:, None, None], y, x)


def next_slot(skip, ctx, is_open):
    """The Context of a captured step with kv="open": a row writes its key and value where its next open token
    belongs, at n_open[b], and sees those before. If it is closed, the next open one overwrites them."""
    n_open = ctx.cache.routing["n_open"][skip]                                      # (B,), before this step
    slots = n_open.clone()
    n_open += is_open
    visible = torch.arange(ctx.end, device=slots.device) <= slots[:, None, None, None]
    return replace(ctx, positions=slots, mask=additive_mask(visible, skip.attn.qkv.weight.dtype))


# ----------------------------------------------------------------------- gates of tokens, keys of open tokens
def run_open_only(skip, x, ctx, h, is_open):
    """The sublayer on the open tokens only, is_open (B, T), which attend to open tokens only."""
    if ctx.decoding:
        rows = is_open.squeeze(1).nonzero().squeeze(1)                   # the one wait for the device
        skip.count(len(rows), ctx)
        if len(rows) == 0:
            return x
        step = open_keys(ctx.cache)[skip].step(rows, select_rows(ctx, rows))
        return x.index_copy(0, rows, skip.sublayer(x[rows], step, h[rows]))

    is_open = is_open & real_tokens(x, ctx)
    n = is_open.sum(1)                                                   # (B,)
    host_n = n.tolist()                                                  # the one wait for the device
    skip.count(sum(host_n), ctx)
    columns = (~is_open).int().argsort(dim=1, stable=True)               # the open ones first, in order
    columns = columns[:, :max(host_n)]                            # (B, N), rows filled up with closed ones
    is_real = torch.arange(columns.shape[1], device=x.device) < n[:, None]
    mask = ctx.mask
    if mask is not None:                                                 # (1, 1, T, T): a window
        mask = mask[0, 0][columns[:, :, None], columns[:, None]].masked_fill(~is_real[:, None], -math.inf)
        mask = mask[:, None]                                             # (B, 1, N, N)
    shorter = replace(ctx, cos=ctx.cos[columns][:, None], sin=ctx.sin[columns][:, None], mask=mask)
    if ctx.cache is not None:
        shorter.cache = open_keys(ctx.cache)[skip] = OpenKeys(ctx.cache, skip.attn, columns, host_n)
    if not any(host_n):
        return x
    at = columns[..., None].expand(-1, -1, x.shape[2])                   # (B, N, C)
    open_x = x.gather(1, at)
    y = skip.sublayer(open_x, shorter, h.gather(1, at))
    return x.scatter(1, at, torch.where(is_real[..., None], y, open_x))


def mask_closed_keys(ctx, gate, dtype):
    """The Context of a training pass in which closed tokens take no part: log g, gate (B, T), is added to the
    scores of a token's key."""
    T, mask = gate.shape[1], ctx.mask
    if mask is None:
        mask = additive_mask(torch.ones(T, T, dtype=torch.bool, device=gate.device).tril(), dtype)
    return replace(ctx, mask=mask + gate.clamp(min=1e-30).log().to(dtype)[:, None, None])   # (B, 1, T, T)


def open_keys(cache):
    """{MindSkip: its OpenKeys}, carried by a generation's cache."""
    return cache.routing.setdefault("open_keys", {})


class OpenKeys:
    """The cache of one layer for its open tokens alone: those of row b are in slots 0 to n[b] - 1, and
    positions[b, slot] is where the token stands in the text. Its tensors (B, K, slots, D) are in the lists of
    the generation's cache. A step of generation calls `step`, then the attention calls `store`."""

    def __init__(self, cache, attn, columns, n):
        """Of a prompt whose open tokens are at `columns` (B, N), n (a list) of each row."""
        self.cache, self.layer, self.positions, self.n = cache, attn.layer, columns, n
        for memory in cache.k, cache.v:                                  # a prompt may open no token
            memory[self.layer] = attn.qkv.weight.new_zeros(len(n), attn.n_kv_head, 0, attn.head_dim)

    def step(self, rows, ctx):
        """The Context of a step in which some rows, given by their indices (R,), are open."""
        self.rows, host_rows = rows, rows.tolist()
        slots = [self.n[row] for row in host_rows]                       # where they write
        self.slots, end = torch.tensor(slots, device=rows.device), max(slots) + 1
        for row in host_rows:
            self.n[row] += 1
        keys, values = self.cache.k, self.cache.v
        if end > keys[self.layer].shape[2]:
            for memory in keys, values:
                memory[self.layer] = F.pad(memory[self.layer], (0, 0, 0, GROWTH))
        if end > self.positions.shape[1]:
            self.positions = F.pad(self.positions, (0, GROWTH))
        self.positions[rows, self.slots] = ctx.end - 1 if ctx.positions is None else ctx.positions
        mask, dtype = ctx.mask, keys[self.layer].dtype
        if mask is not None:                                             # of all positions, (R or 1, 1, 1, S)
            of_row = mask.expand(len(rows), 1, 1, -1)
            mask = of_row.gather(3, self.positions[rows, None, None, :end])
        if min(slots) < max(slots):
            is_key = torch.arange(end, device=rows.device) <= self.slots[:, None, None, None]
            own = additive_mask(is_key, dtype)
            mask = own if mask is None else mask + own
        return replace(ctx, cache=self, mask=mask, end=end)

    def store(self, layer, k, v, ctx):
        """As Cache.store, for the open tokens."""
        stored = []
        for memory, new in (self.cache.k, k), (self.cache.v, v):
            if not ctx.decoding:
                memory[layer] = F.pad(new, (0, 0, 0, GROWTH))
                stored.append(new)
                continue
            memory[layer][self.rows, :, self.slots] = new[:, :, 0]
            keys = memory[layer][:, :, :ctx.end]
            stored.append(keys if len(self.rows) == len(keys) else keys[self.rows])
        return stored
