"""kv="open": closed tokens take no part in attention, as in Mixture of Depths. The open ones of a row are a
shorter sequence, whose tokens keep their positions in the text.

    run_open_only       inference: the open tokens only, gathered
    mask_closed_keys    training: everything is computed, and keys are hidden as far as their gates are closed
"""
import copy
import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from skipping import at_slots, copy_tokens, real_tokens
from support.attention import MULTIPLE, additive_mask, is_native_bfloat16
from support.cuda import is_asynchronous, to_device

GROWTH = 64             # columns by which a cache of open tokens grows
CUDA_MULTIPLE = 128     # of gathered columns: cuDNN plans each new shape


def run_open_only(skip, x, ctx, h, is_open):
    """The sublayer on a prompt's open tokens only, is_open (B, T), which attend to open tokens only."""
    is_open = is_open & real_tokens(x, ctx)
    n = is_open.sum(1)                                                   # (B,)
    host_n = n.tolist()                                                  # the one device sync
    skip.count(sum(host_n), ctx)
    order = (~is_open).int().argsort(dim=1, stable=True)                 # (B, T), a row's open tokens first
    multiple = 1                                                         # of columns, so that shapes recur
    if is_asynchronous(x):
        multiple = CUDA_MULTIPLE
    elif is_native_bfloat16(x):
        multiple = MULTIPLE
    widest = -(-max(host_n) // multiple) * multiple
    columns = order[:, :widest]                # (B, N), a short row is filled up with closed ones of its own
    holds_open = torch.arange(columns.shape[1], device=x.device) < n[:, None]
    mask = ctx.mask
    if mask is not None:                                                 # (1, 1, T, T): a window
        mask = mask[0, 0][columns[:, :, None], columns[:, None]].masked_fill(~holds_open[:, None], -math.inf)
        mask.diagonal(dim1=1, dim2=2).zero_()          # a filler that saw no key would have NaN gradients
        mask = mask[:, None]                                             # (B, 1, N, N)
    shorter = replace(ctx, cos=ctx.cos[columns][:, None], sin=ctx.sin[columns][:, None], mask=mask)
    if ctx.cache is not None:
        ctx.cache.routing["open keys"][skip] = OpenKeys(ctx.cache, skip.attn, columns, host_n)
        shorter.cache = copy.copy(ctx.cache)             # the same k and v, allocated for fewer tokens
        shorter.cache.max_tokens = columns.shape[1] + GROWTH
    if not any(host_n):
        return skip.replacement(x)
    (B, T, C), N = x.shape, columns.shape[1]
    at = (columns + T * torch.arange(B, device=x.device)[:, None]).flatten()         # among B * T tokens
    open_x, open_h = (t.flatten(0, 1).index_select(0, at).view(B, N, C) for t in (x, h))
    y = skip.sublayer(open_x, shorter, open_h)
    if min(host_n) < N:
        y = torch.where(holds_open[..., None], y, skip.replacement(open_x))
    return copy_tokens(skip.replacement(x), at, y.flatten(0, 1))


def mask_closed_keys(ctx, gate, dtype):
    """The Context of a training pass in which closed tokens take no part: a token's log g, gate (B, T), is
    added to the scores of its key."""
    T, mask = gate.shape[1], ctx.mask
    if mask is None:
        mask = additive_mask(torch.ones(T, T, dtype=torch.bool, device=gate.device).tril(), dtype)
    log_gate = torch.where(gate > 0, gate.clamp(min=1e-30).log(), -1e4)     # softmax of only -inf is NaN
    return replace(ctx, mask=mask + log_gate.to(dtype)[:, None, None])                      # (B, 1, T, T)


class OpenKeys:
    """Where open tokens stand in the cache of one layer: those of row b are in slots 0 to n[b] - 1. With a
    sliding window positions[b, slot] tells where each stands in the text."""

    def __init__(self, cache, attn, columns, n):
        """Of a prompt whose open tokens are at `columns` (B, N), n (a list) of each row."""
        self.memories, self.layer = (cache.k, cache.v), attn.layer       # to keep the cache would be a cycle
        self.n, self.positions = n, columns if cache.window else None
        if not any(n):
            for memory in self.memories:
                memory[self.layer] = attn.qkv.weight.new_zeros(len(n), attn.n_kv_head, 0, attn.head_dim)

    def step(self, ctx, row_is_open):
        """The Context of a step; row_is_open: a list."""
        slots, end = self.n, max(self.n) + 1
        self.n = [slot + is_open for slot, is_open in zip(slots, row_is_open)]
        for memory in self.memories:
            if end > memory[self.layer].shape[2]:
                memory[self.layer] = F.pad(memory[self.layer], (0, 0, 0, GROWTH))
        if self.positions is None and min(slots) == max(slots):
            return replace(ctx, slots=None, mask=None, end=end)
        slots = to_device(torch.tensor(slots), ctx.cos.device)
        new_ctx = at_slots(ctx, slots, end)
        if self.positions is not None:
            self.note_positions(ctx, slots, end)
            if ctx.mask is not None:                                     # (B or 1, 1, 1, S), of the text
                of_slots = self.positions[:, None, None, :end]
                new_ctx.mask += ctx.mask.expand(len(slots), 1, 1, -1).gather(3, of_slots)
        return new_ctx

    def note_positions(self, ctx, slots, end):
        """Where in the text the tokens stand that are written to slots (B,), all below `end`."""
        if end > self.positions.shape[1]:
            self.positions = F.pad(self.positions, (0, GROWTH))
        positions = ctx.slots                            # in the whole text a token's column is its position
        if positions is None:
            positions = torch.full_like(slots, ctx.end - 1)
        self.positions.scatter_(1, slots[:, None], positions[:, None])
