"""The products and the attention of the model, faster: every function equals a plain PyTorch call.

    here                      the plain form
    Linear, linear            F.linear
    attention                 F.scaled_dot_product_attention
    attention_of_some         the same, for a few queries per row
    recomputed(f, ...)        f(...)

What is gained, on CPUs: oneDNN multiplies single tokens, and long wide inputs, faster in float32 than MKL;
weights that oneDNN lays out anew ("packed") halve the time of a decoding step in bfloat16; attention by plain
products takes less than half of the time of PyTorch's fused kernel in bfloat16.
"""
import math
import os
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import register_flop_formula

ONEDNN = torch.backends.mkldnn.is_available()
CHUNK = 128         # queries whose scores exist at once
KEY_MULTIPLE = 32   # a chunk's keys are rounded up to this multiple, so that shapes recur

# cuDNN's attention plans every new shape for 25 to 40 ms, and a generation meets a new one with each token
torch.backends.cuda.enable_cudnn_sdp(False)


def recomputed(f, *args):
    """f(*args), whose intermediate results are computed again in the backward pass instead of being kept."""
    if not torch.is_grad_enabled():
        return f(*args)
    return checkpoint(f, *args, use_reentrant=False, preserve_rng_state=False)


# -------------------------------------------------------------------------------------------------- products
def onednn_linear(x, weight, bias):
    """F.linear by oneDNN; the weight may be packed."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


if ONEDNN:
    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def onednn_linear_flops(x_shape, weight_shape, *_, **__):
        return 2 * math.prod(x_shape) * weight_shape[0]


def linear(x, weight, bias=None):
    """x (..., T, in) @ weight (out, in).T + bias (out,), as F.linear.

    In float32 on a CPU, oneDNN is faster for single tokens, which MKL multiplies on one thread, and for long
    wide products (MKL uses no AVX-512 on AMD's processors). Elsewhere it is not used: its sums round to twice
    the error.
    """
    if x.dtype == torch.float32 and ONEDNN and x.device.type == "cpu" and not torch.is_grad_enabled():
        T, (n_out, n_in) = x.shape[-2], weight.shape
        if T == 1 or T >= 256 and n_out > 4 * n_in:
            return onednn_linear(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    packed = None      # within packed_weights(): {outputs: that part of the weight as oneDNN lays it out}
    rows = 1           # of the products that it is laid out for

    def forward(self, x, start=0, end=None):
        """F.linear; start, end: only these outputs."""
        weight, bias = self.weight, self.bias
        if (start, end) != (0, None):            # a slice of all would be a copy more in the backward pass
            weight = weight[start:end]
            bias = None if bias is None else bias[start:end]
        if self.packed is None:
            return linear(x, weight, bias)
        if (start, end) not in self.packed:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), self.rows)
            self.packed[start, end] = packed
        return onednn_linear(x, self.packed[start, end], bias)


def should_pack(n_bytes, device, dtype):
    """Whether weights of n_bytes are packed for decoding: in bfloat16, on a CPU that computes it, where a
    second copy takes less than a quarter of the memory."""
    if dtype != torch.bfloat16 or device.type != "cpu":
        return False
    if not ONEDNN or not torch.cpu._is_avx512_bf16_supported() or not hasattr(os, "sysconf"):
        return False
    return 4 * n_bytes < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def packed_weights(model, rows):
    """Within it every Linear has what is used of its weight a second time, laid out for products of `rows`
    rows, if that pays.

    The copies live no longer than the context: nothing can be stale after a weight was changed.
    """
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    n_bytes = sum(layer.weight.nbytes for layer in layers)
    try:
        if should_pack(n_bytes, layers[0].weight.device, layers[0].weight.dtype):
            for layer in layers:
                layer.packed, layer.rows = {}, rows
        yield
    finally:
        for layer in layers:
            layer.packed = None


# ------------------------------------------------------------------------------------------------- attention
def additive_mask(visible, dtype):
    """What is added to attention's scores: 0 where a query sees a key (`visible`, bool), else -infinity."""
    zero = torch.zeros((), dtype=dtype, device=visible.device)
    return torch.where(visible, zero, -math.inf)


def attention(q, k, v, mask=None, causal=False):
    """Softmax attention of q (B, H, T, D) over k and v (B, K, S, D), where K divides H; (B, H, T, D).

    mask (B or 1, 1, T, S'), added to the scores, see additive_mask; where S' < S it is of the last S' keys,
    and every query sees the keys before those. causal: query t sees the keys up to t; then there is no mask,
    and S = T.
    """
    if q.shape[2] == 1:   # one token: the query heads of a key head are as good as its rows, and much faster
        y = F.scaled_dot_product_attention(q.view(*k.shape[:2], -1, q.shape[3]), k, v, attn_mask=mask)
        return y.reshape(q.shape)
    if products_are_faster(q):
        return recomputed(attention_by_products, q, k, v, mask, causal)
    if mask is not None and mask.shape[-1] < k.shape[2]:
        mask = F.pad(mask, (k.shape[2] - mask.shape[-1], 0))
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.device.type == "cuda" and (mask is not None or q.dtype == torch.float32):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        grouped = False            # the flash kernel alone knows groups, and it knows no mask and no float32
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


def products_are_faster(q):
    return q.dtype == torch.bfloat16 and q.device.type == "cpu"


def attention_by_products(q, k, v, mask=None, causal=False, positions=None):
    """`attention` by plain products, CHUNK queries at a time: causal ones with the keys up to their last.
    positions (T,), int32, rising: query t sees the keys up to positions[t]."""
    (B, H, T, D), K = q.shape, k.shape[1]
    q = q.mul(D ** -0.5).unflatten(1, (K, -1)).flatten(0, 1)                  # (BK, H/K, T, D)
    k, v = k.flatten(0, 1), v.flatten(0, 1)                                   # (BK, S, D)
    if causal:
        triangle = additive_mask(torch.ones(CHUNK, CHUNK, dtype=torch.bool).tril(), q.dtype)
    outputs = []
    for start, queries in zip(range(0, T, CHUNK), q.split(CHUNK, 2)):
        size, end, bias = queries.shape[2], k.shape[1], None
        chunk = slice(start, start + size)
        if causal:
            end, bias = start + size, triangle[:size, :size]
        elif positions is not None:
            end, bias = keys_seen(positions[chunk], positions[chunk], end, q.dtype)
        elif mask is not None:
            bias = mask[..., chunk, :]
        score = torch.bmm(queries.flatten(1, 2), k[:, :end].mT)               # (BK, H/K * size, end)
        if bias is not None and bias.requires_grad:                           # the gates', then of all keys
            score = (score.view(B, H, size, end) + bias).view_as(score)
        elif bias is not None:
            score.view(B, H, size, end)[..., end - bias.shape[-1]:] += bias
        outputs.append(torch.bmm(score.softmax(-1), v[:, :end]).view(B, H, size, D))
    return torch.cat(outputs, 2)


def keys_seen(on_host, positions, S, dtype):
    """How many of S keys are seen by one of the queries at these rising positions (n,), which the host knows
    too, and the mask of the last of these, which not all queries see, (n, last ones); None for one query."""
    first, last, n = int(on_host[0]), int(on_host[-1]), len(on_host)
    if n == 1:
        return last + 1, None
    end = min(S, -(-(last + 1) // KEY_MULTIPLE) * KEY_MULTIPLE)
    key = torch.arange(first + 1, end, device=positions.device, dtype=torch.int32)       # all see `first`
    return end, additive_mask(key <= positions[:, None], dtype)


def attention_of_some(q, k, v, columns, at, T, mask=None):
    """Causal attention for some queries only, row by row.

    q (1, H, N, D): the chosen queries of row 0, then those of row 1, and so on; k and v (B, K, S, D), whose
    last T keys are this pass's own. columns: a list with each row's chosen columns, on the host; at (N,): row
    * T + column of each query, on the device. The query at column t sees the keys up to S - T + t or, given a
    mask (B or 1, 1, T, S) that hides at least all later ones, those that the mask shows. Returns (1, H, N,
    D).
    """
    outputs, done, S = [], 0, k.shape[2]
    for row, row_columns in enumerate(columns):
        n = len(row_columns)
        if n == 0:
            continue
        keys, values, queries = k[row:row + 1], v[row:row + 1], q[:, :, done:done + n]
        on_host = (row_columns + (S - T)).int()
        positions = on_host if q.device.type == "cpu" else (at[done:done + n] % T + (S - T)).int()
        if n > 1 and mask is None and products_are_faster(q):
            y = attention_by_products(queries, keys, values, positions=positions)
        else:
            row_mask = None if mask is None else mask[row if len(mask) > 1 else 0, 0]           # (T, S)
            y = attention_in_chunks(queries, keys, values, on_host, positions, row_mask)
        outputs.append(y)
        done += n
    return torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]


def attention_in_chunks(q, k, v, on_host, positions, mask):
    """attention_of_some for one row, CHUNK queries at a time: q (1, H, n, D), k and v (1, K, S, D), positions
    (n,) of the queries, on the device and on the host, mask (T, S) or None."""
    S, outputs = k.shape[2], []
    chunks = zip(q.split(CHUNK, 2), on_host.split(CHUNK), positions.split(CHUNK))
    for queries, chunk_on_host, chunk in chunks:
        end, bias = keys_seen(chunk_on_host, chunk, S, q.dtype)
        if mask is not None:
            bias = mask[chunk - (S - len(mask)), :end]                                          # (n, end)
        outputs.append(attention(queries, k[:, :, :end], v[:, :, :end], bias))
    return torch.cat(outputs, 2)
