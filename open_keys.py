"""kv="open": closed tokens take no part in attention, as in Mixture of Depths. The open ones of a row are a
shorter sequence, whose tokens keep their positions in the text.

    run_open_only       inference: the open tokens only, gathered
    mask_closed_keys    training: everything is computed, and keys are hidden as far as their gates are closed
"""
import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from skipping import open_indices, real_tokens, select_rows
from support.attention import additive_mask
from support.cuda import is_asynchronous, to_device, to_host

GROWTH = 64         # columns by which a cache of open tokens grows
SHAPES = 128        # gathered columns on CUDA are filled up to a multiple: cuDNN plans each new shape


def run_open_only(skip, x, ctx, h, is_open):
    """The sublayer on the open tokens only, is_open (B, T), which attend to open tokens only."""
    if ctx.decoding:
        on_host = open_indices(to_host(is_open)().squeeze(1))            # the one wait for the device
        skip.count(len(on_host), ctx)
        if len(on_host) == 0:
            return x
        rows = to_device(on_host, x.device)
        step = ctx.cache.routing["open keys"][skip].step(rows, on_host.tolist(), select_rows(ctx, rows))
        return x.index_copy(0, rows, skip.sublayer(x[rows], step, h[rows]))

    is_open = is_open & real_tokens(x, ctx)
    n = is_open.sum(1)                                                   # (B,)
    host_n = n.tolist()                                                  # the one wait for the device
    skip.count(sum(host_n), ctx)
    columns = (~is_open).int().argsort(dim=1, stable=True)               # the open ones first, in order
    multiple = SHAPES if is_asynchronous(x) else 1                       # so that lengths recur
    widest = -(-max(host_n) // multiple) * multiple
    columns = columns[:, :widest]                                 # (B, N), rows filled up with closed ones
    is_real = torch.arange(columns.shape[1], device=x.device) < n[:, None]
    mask = ctx.mask
    if mask is not None:                                                 # (1, 1, T, T): a window
        mask = mask[0, 0][columns[:, :, None], columns[:, None]].masked_fill(~is_real[:, None], -math.inf)
        mask = mask[:, None]                                             # (B, 1, N, N)
    shorter = replace(ctx, cos=ctx.cos[columns][:, None], sin=ctx.sin[columns][:, None], mask=mask)
    if ctx.cache is not None:
        shorter.cache = ctx.cache.routing["open keys"][skip] = OpenKeys(ctx.cache, skip.attn, columns, host_n)
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
    log_gate = torch.where(gate > 0, gate.clamp(min=1e-30).log(), -1e4)     # of -inf alone softmax is NaN
    return replace(ctx, mask=mask + log_gate.to(dtype)[:, None, None])                      # (B, 1, T, T)


class OpenKeys:
    """The cache of one layer for its open tokens alone: those of row b are in slots 0 to n[b] - 1, and
    positions[b, slot] is where the token stands in the text. Its tensors (B, K, slots, D) are in the lists of
    the generation's cache. A step of generation calls `step`, then the attention calls `store`."""

    def __init__(self, cache, attn, columns, n):
        """Of a prompt whose open tokens are at `columns` (B, N), n (a list) of each row."""
        self.memories = cache.k, cache.v                                 # not the cache, which refers to this
        self.layer, self.positions, self.n = attn.layer, columns, n
        for memory in self.memories:                                     # a prompt may open no token
            memory[self.layer] = attn.qkv.weight.new_zeros(len(n), attn.n_kv_head, 0, attn.head_dim)

    def step(self, rows, on_host, ctx):
        """The Context of a step in which some rows, given by their indices (R,), a list on the host, are
        open."""
        slots = [self.n[row] for row in on_host]                         # where they write
        end = max(slots) + 1
        self.rows, self.slots = rows, to_device(torch.tensor(slots), rows.device)
        for row in on_host:
            self.n[row] += 1
        keys, values = self.memories
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
        memories = zip(self.memories, (k, v))
        if not ctx.decoding:
            for memory, new in memories:
                memory[layer] = F.pad(new, (0, 0, 0, GROWTH))
            return k, v
        stored = []
        for memory, new in memories:
            memory[layer][self.rows, :, self.slots] = new[:, :, 0]
            keys = memory[layer][:, :, :ctx.end]
            stored.append(keys if len(self.rows) == len(keys) else keys[self.rows])
        return stored
