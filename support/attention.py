"""The model's attention, faster than PyTorch's scaled_dot_product_attention, and the write to its cache.

    attention            all tokens of a pass, or one new token per row
    attention_of_token   one token per row, all rows or the open ones
    attention_of_some    a few queries per row, those of open tokens
    store                write a step's keys and values into a cache

On CPUs with instructions for bfloat16 plain matmuls, a chunk of queries or one token at a time, take half the
time of PyTorch's kernel. On CUDA one query per row, and gathered queries, have Triton kernels; the rest uses
flash or cuDNN.
"""
import math
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F

from support import cuda
from support.cuda import fused, to_device
from support.kernels import NATIVE_BFLOAT16, recomputed

CHUNK = 128         # queries per matmul of scores, to bound their memory
CALL = 256          # queries per call of PyTorch's kernel for open tokens: 128 take up to a seventh longer
OPEN_ROWS_FROM = 512    # fewest keys for which a call per run of open rows is faster, on 2 threads
PRODUCTS_FROM = 1024    # fewest keys of all rows for which attention_of_rows uses plain matmuls
PARTS_FROM = 2048   # fewest keys for which attention_by_parts is faster than attention_in_chunks
MULTIPLE = 32       # tokens, queries and keys are filled up to multiples of this, so that shapes recur
CUDNN_FROM = 4096   # fewest queries for cuDNN: half of flash's time, but 30 ms to plan each new shape


@fused
def store(keys, values, k, v, positions):
    """Write k and v (B, K, T, D) into keys and values (B, K, max_tokens, D), row b at columns up to
    positions[b], (B,)."""
    columns = positions[:, None] + torch.arange(1 - k.shape[2], 1, device=k.device)            # (B, T)
    columns = columns[:, None, :, None].expand_as(k)
    keys.scatter_(2, columns, k)
    values.scatter_(2, columns, v)


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
    if mask is not None and mask.shape[-1] < k.shape[2] and (q.shape[2] == 1 or not is_native_bfloat16(q)):
        mask = F.pad(mask, (k.shape[2] - mask.shape[-1], 0))
    kernels = cuda.triton_kernels(q)
    if kernels and q.shape[2] == 1 and kernels_fit(q, k):
        return kernels.attention_of_token(q, k, v, mask, cuda.choices.gate[0])
    if q.shape[2] == 1:        # the query heads of a key head become the rows of one matmul, much faster
        is_open = cuda.choices.gate[0] if q.device.type == "cpu" else None  # on CUDA: a device sync
        y = attention_of_token(q.view(*k.shape[:2], -1, q.shape[3]), k, v, mask, is_open)
        return y.reshape(q.shape)
    if is_native_bfloat16(q):
        return recomputed(attention_by_products, q, k, v, mask, causal)
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.device.type == "cuda" and (mask is not None or q.dtype == torch.float32):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        grouped = False            # only flash takes grouped heads, and it takes no mask and no float32
    if q.is_cuda and mask is not None and mask.requires_grad and not q.requires_grad:
        q = q.detach().requires_grad_()      # else the kernel saves no log-sum-exp, which mask.grad needs
    return pytorch_attention(q, k, v, mask, causal, grouped)


def pytorch_attention(q, k, v, mask=None, causal=False, grouped=False):
    """PyTorch's attention. On CUDA cuDNN is allowed only from CUDNN_FROM queries on, and not where the mask
    needs a gradient, which cuDNN does not compute."""
    call = partial(F.scaled_dot_product_attention, q, k, v, mask, is_causal=causal, enable_gqa=grouped)
    if not q.is_cuda:
        return call()
    outer = torch.backends.cuda.cudnn_sdp_enabled()
    mask_needs_grad = mask is not None and mask.requires_grad
    torch.backends.cuda.enable_cudnn_sdp(q.shape[2] >= CUDNN_FROM and not mask_needs_grad)
    try:
        return call()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(outer)


def attention_of_token(q, k, v, mask, is_open):
    """`attention` of one token per row, q (B, K, H/K, D), to the same shape. is_open (B,), see cuda.only_for,
    or None: all rows. From OPEN_ROWS_FROM keys on, and in bfloat16 if at most half of the rows are open,
    closed rows give 0, and their keys are not read."""
    all_rows = is_open is None or k.shape[2] < OPEN_ROWS_FROM
    if all_rows or (is_native_bfloat16(q) and 2 * int(is_open.sum()) > len(q)):
        return attention_of_rows(q, k, v, mask)
    y = torch.zeros_like(q)
    edges = F.pad(is_open.int(), (1, 1)).diff().nonzero()        # begin, end of each run of open rows
    for first, end in edges.view(-1, 2).tolist():
        rows = slice(first, end)
        row_mask = mask[rows] if mask is not None and len(mask) > 1 else mask
        y[rows] = pytorch_attention(q[rows], k[rows], v[rows], row_mask)
    return y


def attention_of_rows(q, k, v, mask):
    """attention_of_token of all rows. In bfloat16 on CPUs, from PRODUCTS_FROM keys on, by plain matmuls, of
    which the first is keys times queries: the other order takes several times as long."""
    S = k.shape[2]
    if not is_native_bfloat16(q) or len(q) * S < PRODUCTS_FROM:
        return pytorch_attention(q, k, v, mask)
    k, v = (torch.cat((t, t[:, :, :-S % MULTIPLE]), 2) for t in (k, v))       # any keys more: see MULTIPLE
    query = q.mul(q.shape[3] ** -0.5).flatten(0, 1).mT                        # (BK, D, H/K)
    score = torch.bmm(k.flatten(0, 1), query).mT.view(*q.shape[:3], -1)       # (B, K, H/K, S and those more)
    score[..., S:] = -math.inf
    if mask is not None:
        score[..., :S].add_(mask)
    return torch.bmm(score.softmax(-1).flatten(0, 1), v.flatten(0, 1)).view_as(q)


def kernels_fit(q, k):
    """Whether the Triton kernels take these heads: D a power of 2 from 16 on, in blocks that fit the shared
    memory of a T4 or newer; at most 16 query heads per key head."""
    D = q.shape[3]
    width_fits = D >= 16 and D & (D - 1) == 0 and D * q.itemsize <= 256
    return width_fits and q.shape[1] <= 16 * k.shape[1]


def is_native_bfloat16(x):
    """Whether x is bfloat16 on a CPU with instructions for it. There plain matmuls beat PyTorch's attention,
    and each new shape costs time; on others those matmuls take 6 to 20 times as long as that attention."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and NATIVE_BFLOAT16


def fill(at, counts, x):
    """(at, counts), padded to a MULTIPLE of tokens by repeating the last: at (N,), the gathered tokens, of
    which counts[b] are row b's. In bfloat16 oneDNN plans each new shape, for longer than the matmul takes."""
    n_more = -len(at) % MULTIPLE if is_native_bfloat16(x) else 0
    if n_more == 0:
        return at, counts
    row = max(row for row, n in enumerate(counts) if n)
    counts = [n + n_more * (i == row) for i, n in enumerate(counts)]
    return F.pad(at, (0, n_more), value=int(at[-1])), counts


def parts_are_faster(q, S):
    """Whether attention_by_parts serves for queries (1, H, n, D) of S keys: where half or more are open."""
    return 2 * q.shape[2] >= S >= PARTS_FROM and q.device.type == "cpu" and not torch.is_grad_enabled()


def attention_by_products(q, k, v, mask=None, causal=False, positions=None):
    """`attention` by plain matmuls, about CHUNK queries at a time; a causal chunk reads keys up to its last
    query. positions (T,), int32, ascending: query t sees keys 0 to positions[t]; then queries are padded."""
    (B, H, n, D), K = q.shape, k.shape[1]
    n_more = -n % MULTIPLE
    if positions is not None and n_more:
        q = F.pad(q, (0, 0, 0, n_more))
        positions = F.pad(positions, (0, n_more), value=int(positions[-1]))
    T = q.shape[2]
    most = -(-T // max(1, round(T / CHUNK)))             # queries per chunk: chunks of about the same size
    most += -most % MULTIPLE
    q = q.mul(D ** -0.5).unflatten(1, (K, -1)).flatten(0, 1)                  # (BK, H/K, T, D)
    k = k.flatten(0, 1).mT.contiguous()            # (BK, D, S): else bmm lays it out again for each chunk
    v = v.flatten(0, 1)                                                       # (BK, S, D)
    if causal:
        triangle = additive_mask(torch.ones(most, most, dtype=torch.bool).tril(), q.dtype)
    outputs = []
    for start, queries in zip(range(0, T, most), q.split(most, 2)):
        size, end, bias = queries.shape[2], k.shape[2], None
        chunk = slice(start, start + size)
        if causal:
            end, bias = start + size, triangle[:size, :size]
        elif positions is not None:
            end, bias = keys_seen(positions[chunk], positions[chunk], end, q.dtype)
        elif mask is not None:
            bias = mask[..., chunk, :]
        score = torch.bmm(queries.flatten(1, 2), k[..., :end])                # (BK, H/K * size, end)
        if bias is not None and bias.requires_grad:          # open_keys.py's log g, of all keys
            score = (score.view(B, H, size, end) + bias).view_as(score)
        elif bias is not None:
            score.view(B, H, size, end)[..., end - bias.shape[-1]:].add_(bias)    # += would copy the scores
        outputs.append(torch.bmm(score.softmax(-1), v[:, :end]).view(B, H, size, D))
    return torch.cat(outputs, 2)[:, :, :n]


def keys_seen(host_positions, positions, S, dtype):
    """(end, mask): these queries, at ascending positions (n,), see only keys below `end`. All see those up to
    the first query's; mask (n, the last keys), additive, hides what some do not. None for one query."""
    first, last, n = int(host_positions[0]), int(host_positions[-1]), len(host_positions)
    if n == 1:
        return last + 1, None
    end = min(S, last + 1 + -(last + 1) % MULTIPLE)
    begin = (first + 1) // MULTIPLE * MULTIPLE                   # aligned, so that the sum takes less time
    key = torch.arange(begin, end, device=positions.device, dtype=torch.int32)
    return end, additive_mask(key <= positions[:, None], dtype)


def attention_of_some(q, k, v, counts, host_at, at, T, mask=None):
    """Causal attention for some queries only, row by row.

    q (1, H, N, D): the chosen queries of row 0, counts[0] of them, then those of row 1, and so on; k and v
    (B, K, S, D), whose last T keys are this pass's own. at (N,): row * T + column of each query, on the
    device, and host_at on the host. The query at column t sees the keys up to S - T + t or, given a mask (B
    or 1, 1, T, S) that hides at least all later ones, those that the mask shows. Returns (1, H, N, D).
    """
    outputs, done, S = [], 0, k.shape[2]
    kernels = cuda.triton_kernels(q)
    if kernels and mask is None and kernels_fit(q, k):
        firsts = None
        if len(counts) > 1:
            firsts = to_device(torch.tensor([0, *accumulate(counts)], dtype=torch.int32), q.device)
        return kernels.attention_of_some(q, k, v, at, firsts, T, max(counts))
    for row, n in enumerate(counts):
        if n == 0:
            continue
        keys, values, queries = k[row:row + 1], v[row:row + 1], q[:, :, done:done + n]
        host_positions = (host_at[done:done + n] % T + (S - T)).int()
        positions = host_positions if q.device.type == "cpu" else (at[done:done + n] % T + (S - T)).int()
        if n > 1 and mask is None and is_native_bfloat16(q):
            y = attention_by_products(queries, keys, values, positions=positions)
        elif mask is None and parts_are_faster(queries, S):
            y = attention_by_parts(queries, keys, values, positions.long())
        else:
            row_mask = None if mask is None else mask[row if len(mask) > 1 else 0, 0]           # (T, S)
            y = attention_in_chunks(queries, keys, values, host_positions, positions, row_mask)
        outputs.append(y)
        done += n
    return torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]


def attention_in_chunks(q, k, v, host_positions, positions, mask):
    """attention_of_some for one row, a few queries at a time: q (1, H, n, D), k and v (1, K, S, D), positions
    (n,) of the queries, on the device and on the host, mask (T, S) or None."""
    (_, H, n, D), (_, K, S, _), outputs = q.shape, k.shape, []
    size = CHUNK if is_native_bfloat16(q) else CALL
    if n > 1 and q.device.type == "cpu" and not is_native_bfloat16(q):
        q, k, v = q.view(K, -1, n, D), for_query_heads(k, H), for_query_heads(v, H)
    chunks = zip(q.split(size, 2), host_positions.split(size), positions.split(size))
    for queries, host_chunk, chunk in chunks:
        end, bias = keys_seen(host_chunk, chunk, S, q.dtype)
        if mask is not None:
            bias = mask[chunk - (S - len(mask)), :end]                                          # (n, end)
        outputs.append(attention(queries, k[:, :, :end], v[:, :, :end], bias))
    return torch.cat(outputs, 2).view(1, H, n, D)


def for_query_heads(t, H):
    """A view of keys or values (1, K, S, D) as (K, H/K, S, D), for H query heads, where PyTorch would copy
    them for every query head in every call."""
    _, K, S, D = t.shape
    return t.view(K, 1, S, D).expand(K, H // K, S, D)


def attention_by_parts(q, k, v, at):
    """attention_of_some for one row on a CPU, without mask or gradient, where most of many tokens are open;
    at (n,), int64, their positions, ascending. Among open tokens it is plain causal attention, which PyTorch
    computes in larger blocks from 768 queries on; to closed tokens' keys it is computed in chunks. The two
    results are averaged, weighted by their sums of exponentials."""
    (_, H, n, D), (_, K, S, _) = q.shape, k.shape
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    q = q.view(K, -1, n, D)
    y, lse = kernel(q, *(for_query_heads(t.index_select(2, at), H) for t in (k, v)), 0.0, True)
    n_seen = at - torch.arange(n)                    # (n,) closed keys before each query, ascending
    first = int((n_seen == 0).sum())                 # the first query that sees one
    if first < n:
        others = torch.ones(S, dtype=torch.bool).index_fill(0, at, False).nonzero().squeeze(1)
        k, v = (for_query_heads(t.index_select(2, others), H) for t in (k, v))
        chunks = []
        for queries, some_seen in zip(q[:, :, first:].split(CALL, 2), n_seen[first:].split(CALL)):
            end = int(some_seen[-1])
            mask = additive_mask(torch.arange(end) < some_seen[:, None], q.dtype)
            chunks.append(kernel(queries, k[:, :, :end], v[:, :, :end], attn_mask=mask))
        other_y, other_lse = (torch.cat(outputs, 2) for outputs in zip(*chunks))
        share = torch.sigmoid(other_lse - lse[:, :, first:]).to(y.dtype)[..., None]
        y = torch.cat((y[:, :, :first], torch.lerp(y[:, :, first:], other_y, share)), 2)
    return y.reshape(1, H, n, D)
