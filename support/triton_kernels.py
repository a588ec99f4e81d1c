"""Triton kernels: one for what PyTorch does in several, or without reads that are not needed.

    here                plain form                                    what is gained
    linear              F.linear of one token                         bandwidth; a closed gate reads no weight
    attention_of_token  F.scaled_dot_product_attention, one query     keys split over the multiprocessors;
                        per row                                       what is masked, or closed, is not read
    attention_of_some   attention.attention_of_some                   one kernel for all rows
    rms_norm, rotate, rotate_some, swiglu, logit, first_mean, store   one kernel instead of two to eight

Each equals its plain form to rounding (tests/test_triton_kernels.py, by Triton's interpreter on a CPU),
computes in float32 and allocates its result. support/cuda.py tells where they run.

A kernel is launched as a grid of programs; each reads and writes blocks through arrays of addresses: b is a
row of the batch, h a head, t a token, s a key, d a channel, and q_h the distance from one head of q to the
next. Channels lie beside each other everywhere.
"""
import torch
import triton
import triton.language as tl

KEY_BLOCK, QUERY_BLOCK = 64, 64   # per block of attention; prompts in float32 take half as many keys
STAGES = 3                        # blocks of keys loaded ahead (num_stages), all in shared memory
LOG2_E = tl.constexpr(1.4426950408889634)         # exp(x) = 2^(x log2(e)), and 2^x is an instruction


# --------------------------------------------------------------------------------------------------- matmuls
@triton.jit
def linear_kernel(x, weight, bias, is_open, plus, y, n_in, n_out, n_gated, HAS_BIAS: tl.constexpr,
                  GATED: tl.constexpr, ADDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < n_out
    is_read, reads = is_row, 1
    if GATED:
        first = tl.where(tl.load(is_open) != 0, 0, n_gated)      # the first output to compute
        is_read, reads = is_row & (rows >= first), ((tl.program_id(0) + 1) * ROWS > first).to(tl.int32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if reads != 0:
        for start in range(0, n_in, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            is_column = columns < n_in
            at = rows[:, None].to(tl.int64) * n_in + columns[None]
            w = tl.load(weight + at, mask=is_read[:, None] & is_column[None], other=0.0).to(tl.float32)
            total += w * tl.load(x + columns, mask=is_column, other=0.0).to(tl.float32)[None]
    result = tl.sum(total, 1)
    if HAS_BIAS:
        result += tl.load(bias + rows, mask=is_row, other=0.0).to(tl.float32)
    if ADDS:
        result += tl.load(plus + rows, mask=is_row, other=0.0).to(tl.float32)
    tl.store(y + rows, result.to(y.dtype.element_ty), mask=is_row)


def linear(x, weight, bias=None, is_open=None, plus=None, n_gated=None):
    """F.linear of one token, x (..., in), + plus (..., out). is_open (1,) bool: where it is False, the weight
    is not read and the matmul gives 0, for the first n_gated outputs, or for all if n_gated is None. Bias and
    plus are always added."""
    x, (n_out, n_in), rows, columns = x.contiguous(), weight.shape, 8, 512
    y = x.new_empty(*x.shape[:-1], n_out)
    linear_kernel[(triton.cdiv(n_out, rows),)](
        x, weight, weight if bias is None else bias, weight if is_open is None else is_open,
        weight if plus is None else plus.contiguous(), y, n_in, n_out,
        n_out if n_gated is None else n_gated, HAS_BIAS=bias is not None, GATED=is_open is not None,
        ADDS=plus is not None, ROWS=rows, COLUMNS=columns, num_stages=2)
    return y


@triton.jit
def logit_kernel(h, weight, bias, y, C, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    t, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = d < C
    x = tl.load(h + t * C + d, mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(x * tl.load(weight + d, mask=inside, other=0.0), 0)
    if HAS_BIAS:
        total += tl.load(bias)
    tl.store(y + t, total)


def logit(h, weight, bias=None):
    """F.linear(h.float(), weight, bias), weight (1, C) float32: (..., 1) float32."""
    h = h.contiguous()
    C, y = h.shape[-1], h.new_empty(*h.shape[:-1], 1, dtype=torch.float32)
    logit_kernel[(y.numel(),)](h, weight, weight if bias is None else bias, y, C, HAS_BIAS=bias is not None,
                               BLOCK=triton.next_power_of_2(C))
    return y


@triton.jit
def first_mean_kernel(h, n, y, C, h_b, h_t, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    b, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(n + b).to(tl.int32)
    total = tl.zeros((TOKENS, BLOCK), tl.float32)
    for start in range(0, count, TOKENS):
        t = (start + tl.arange(0, TOKENS)).to(tl.int64)
        inside = (t < count)[:, None] & (d < C)[None]
        total += tl.load(h + b * h_b + t[:, None] * h_t + d[None], mask=inside, other=0.0).to(tl.float32)
    tl.store(y + b * C + d, tl.sum(total, 0) / count, mask=d < C)


def first_mean(h, n, longest):
    """kernels.first_mean: the mean (B, C) float32 of the first n tokens of each row of h (B, T, C)."""
    B, _, C = h.shape
    y, block = h.new_empty(B, C, dtype=torch.float32), 32
    first_mean_kernel[(B, triton.cdiv(C, block))](h, n, y, C, *h.stride()[:2], TOKENS=64, BLOCK=block)
    return y


# ------------------------------------------------------------------------------------------------- attention
@triton.jit
def attention_step(x, bias, values, top, total, result, scale):
    """One block of keys of softmax attention, from their scores x and values: the running maximum, sum of
    weights and weighted sum of values of each query (online softmax, arXiv 2205.14135). bias: added to the
    scores, in units of log2."""
    x = x * (scale * LOG2_E) + bias
    highest = tl.maximum(top, tl.max(x, 1))
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    weights, shrink = tl.exp2(x - safe[:, None]), tl.exp2(top - safe)
    total = total * shrink + tl.sum(weights, 1)
    result = tl.dot(weights.to(values.dtype), values, result * shrink[:, None], input_precision="ieee")
    return highest, total, result


@triton.jit
def split_kernel(q, k, v, mask, is_open, parts, weights, S, split_size, n_splits, q_b, q_h, k_b, k_h, k_s,
                 v_b, v_h, v_s, mask_b, scale, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
                 HAS_MASK: tl.constexpr, GATED: tl.constexpr, KEYS: tl.constexpr):
    b, h, split = tl.program_id(0) // K, tl.program_id(0) % K, tl.program_id(1)
    b = b.to(tl.int64)
    g, d = tl.arange(0, 16), tl.arange(0, D)                      # G query heads of key head h, padded to 16
    is_query = g < G
    queries = h * G + g
    start = split * split_size
    end = tl.minimum(start + split_size, S)
    if GATED:
        end = tl.where(tl.load(is_open + b), end, start)
    query = tl.load(q + b * q_b + queries[:, None] * q_h + d[None], mask=is_query[:, None], other=0.0)
    top = tl.full((16,), float("-inf"), tl.float32)
    total = tl.zeros((16,), tl.float32)
    result = tl.zeros((16, D), tl.float32)
    for first in range(start, end, KEYS):
        s = first + tl.arange(0, KEYS)
        is_key = s < end
        bias = tl.where(is_key, 0.0, float("-inf"))
        if HAS_MASK:
            masked = tl.load(mask + b * mask_b + s, mask=is_key, other=float("-inf")).to(tl.float32)
            bias += masked * LOG2_E
        if tl.max(bias, 0) > float("-inf"):                       # else every key of the block is hidden
            at = s[:, None].to(tl.int64)
            key = tl.load(k + b * k_b + h * k_h + at * k_s + d[None], mask=is_key[:, None], other=0.0)
            value = tl.load(v + b * v_b + h * v_h + at * v_s + d[None], mask=is_key[:, None], other=0.0)
            x = tl.dot(query, tl.trans(key), input_precision="ieee")
            top, total, result = attention_step(x, bias[None], value, top, total, result, scale)
    to = (b * K * G + queries) * n_splits + split
    divisor = tl.where(total == 0.0, 1.0, total)
    tl.store(parts + to[:, None] * D + d[None], result / divisor[:, None], mask=is_query[:, None])
    tl.store(weights + to, tl.where(total == 0.0, float("-inf"), top + tl.log2(divisor)), mask=is_query)


@triton.jit
def join_kernel(parts, weights, y, n_splits, D: tl.constexpr, SPLITS: tl.constexpr):
    row, split, d = tl.program_id(0), tl.arange(0, SPLITS), tl.arange(0, D)
    is_split = split < n_splits
    at = row * n_splits + split
    weight = tl.load(weights + at, mask=is_split, other=float("-inf"))
    highest = tl.max(weight, 0)
    weight = tl.exp2(weight - tl.where(highest == float("-inf"), 0.0, highest))
    part = tl.load(parts + at[:, None] * D + d[None], mask=is_split[:, None], other=0.0)
    total = tl.sum(weight, 0)
    result = tl.sum(part * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(y + row * D + d, result.to(y.dtype.element_ty))


def attention_of_token(q, k, v, mask=None, is_open=None):
    """Softmax attention of one query per row and head, q (B, H, 1, D), over k and v (B, K, S, D): (B, H, 1,
    D).

    mask (B or 1, 1, 1, S), added to the scores. is_open (B,) bool: a row where it is False reads nothing, and
    its result is 0. Keys are split into parts, whose results are joined by their sums of weights.
    """
    (B, H, _, D), K, S = q.shape, k.shape[1], k.shape[2]
    wanted = max(1, 264 // (B * K))                     # two programs per multiprocessor of a Hopper card
    split_size = triton.cdiv(triton.cdiv(S, wanted), KEY_BLOCK) * KEY_BLOCK
    n_splits = triton.cdiv(S, split_size)
    parts = q.new_empty(B * H, n_splits, D, dtype=torch.float32)
    weights = q.new_empty(B * H, n_splits, dtype=torch.float32)
    y = q.new_empty(B, H, 1, D)
    mask_stride = 0 if mask is None or len(mask) == 1 else mask.stride(0)
    split_kernel[(B * K, n_splits)](
        q, k, v, q if mask is None else mask, q if is_open is None else is_open, parts, weights, S,
        split_size, n_splits, *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], mask_stride, D ** -0.5,
        K=K, G=H // K, D=D, HAS_MASK=mask is not None, GATED=is_open is not None, KEYS=KEY_BLOCK,
        num_stages=STAGES)
    join_kernel[(B * H,)](parts, weights, y, n_splits, D=D, SPLITS=triton.next_power_of_2(n_splits))
    return y


@triton.jit
def some_kernel(q, k, v, at, firsts, y, q_n, q_h, k_b, k_h, k_s, v_b, v_h, v_s, scale, H, T, before,
                N, G: tl.constexpr, D: tl.constexpr, ONE_ROW: tl.constexpr, QUERIES: tl.constexpr,
                KEYS: tl.constexpr):
    h, b, d = tl.program_id(1), tl.program_id(2), tl.arange(0, D)
    block = tl.num_programs(0) - 1 - tl.program_id(0)             # blocks with the most keys first
    if ONE_ROW:
        first, last = 0, N
    else:
        first, last = tl.load(firsts + b), tl.load(firsts + b + 1)               # this row's queries
    n = (first + block * QUERIES + tl.arange(0, QUERIES)).to(tl.int64)
    if first + block * QUERIES < last:
        is_query = n < last
        column = tl.load(at + n, mask=is_query, other=b * T).to(tl.int32) - b * T
        position = tl.where(is_query, column + before, -1)
        end = tl.max(position, 0) + 1                             # no query here sees a later key
        all_see = (tl.min(tl.where(is_query, position, end), 0) + 1) // KEYS * KEYS
        query = tl.load(q + n[:, None] * q_n + h * q_h + d[None], mask=is_query[:, None], other=0.0)
        top = tl.full((QUERIES,), float("-inf"), tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        result = tl.zeros((QUERIES, D), tl.float32)
        keys = k + b.to(tl.int64) * k_b + h // G * k_h
        values = v + b.to(tl.int64) * v_b + h // G * v_h
        for start in range(0, end, KEYS):
            s = start + tl.arange(0, KEYS)
            is_key = (s < end)[:, None]
            row = s[:, None].to(tl.int64)
            key = tl.load(keys + row * k_s + d[None], mask=is_key, other=0.0)
            value = tl.load(values + row * v_s + d[None], mask=is_key, other=0.0)
            x = tl.dot(query, tl.trans(key), input_precision="ieee")
            if start >= all_see:
                x = tl.where(s[None] <= position[:, None], x, float("-inf"))
            top, total, result = attention_step(x, 0.0, value, top, total, result, scale)
        result = result / tl.where(total == 0.0, 1.0, total)[:, None]
        to = (n[:, None] * H + h) * D + d[None]
        tl.store(y + to, result.to(y.dtype.element_ty), mask=is_query[:, None])


def attention_of_some(q, k, v, at, firsts, T, longest):
    """attention.attention_of_some without a mask. firsts (B + 1,) int32: where each row's queries begin, and
    N; None for one row; longest: the most that a row has."""
    (_, H, N, D), (B, K, S) = q.shape, k.shape[:3]
    y, keys = q.new_empty(N, H, D), KEY_BLOCK if q.itemsize == 2 else KEY_BLOCK // 2
    some_kernel[(triton.cdiv(longest, QUERY_BLOCK), H, B)](
        q, k, v, at, at if firsts is None else firsts, y, q.stride(2), q.stride(1), *k.stride()[:3],
        *v.stride()[:3], D ** -0.5, H, T, S - T, N, G=H // K, D=D, ONE_ROW=firsts is None,
        QUERIES=QUERY_BLOCK, KEYS=keys, num_stages=STAGES)
    return y.transpose(0, 1)[None]


# ------------------------------------------------------------------------------------------- between products
@triton.jit
def rms_norm_kernel(x, weight, y, C, eps, BLOCK: tl.constexpr):
    t, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = d < C
    row = tl.load(x + t * C + d, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(row * row, 0) / C + eps)
    row = row * scale * tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + t * C + d, row.to(y.dtype.element_ty), mask=inside)


def rms_norm(x, weight, eps):
    """F.rms_norm(x, weight.shape, weight, eps)."""
    x, C = x.contiguous(), x.shape[-1]
    y = torch.empty_like(x)
    rms_norm_kernel[(x.numel() // C,)](x, weight, y, C, eps, BLOCK=triton.next_power_of_2(C),
                                       num_warps=8 if C > 2048 else 4)
    return y


@triton.jit
def rotate_kernel(x, cos, sin, at, y, x_b, x_h, x_t, angle_b, angle_t, H, T, n_angles, D, SOME: tl.constexpr,
                  HEADS: tl.constexpr, BLOCK: tl.constexpr):
    b, t = (tl.program_id(0) // T).to(tl.int64), (tl.program_id(0) % T).to(tl.int64)
    h, d = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    inside = (h < H)[:, None] & (d < D)[None]
    from_ = x + b * x_b + h[:, None] * x_h + t * x_t
    mine = tl.load(from_ + d[None], mask=inside, other=0.0)
    other = tl.load(from_ + ((d + D // 2) % D)[None], mask=inside, other=0.0).to(tl.float32)
    angle = b * angle_b + t * angle_t
    if SOME:
        token = tl.load(at + t)
        angle = token // n_angles * angle_b + token % n_angles * angle_t
    c = tl.load(cos + angle + d, mask=d < D, other=0.0).to(tl.float32)
    s = tl.load(sin + angle + d, mask=d < D, other=0.0).to(tl.float32)
    product = (mine.to(tl.float32) * c[None]).to(mine.dtype).to(tl.float32)      # rounded, as x * cos is
    turned = product + other * s[None]
    tl.store(y + ((b * T + t) * H + h[:, None]) * D + d[None], turned.to(mine.dtype), mask=inside)


def rotate(x, cos, sin, at=None):
    """model.rotate of x (B, H, T, D), by angles (T, D) or (B, 1, T, D); at: see rotate_some."""
    (B, H, T, D), heads = x.shape, 8
    y = x.new_empty(B, T, H, D)
    row_stride = cos.stride(0) if cos.dim() == 4 and len(cos) > 1 else 0
    rotate_kernel[(B * T, triton.cdiv(H, heads))](
        x, cos, sin, cos if at is None else at, y, *x.stride()[:3], row_stride, cos.stride(-2), H, T,
        cos.shape[-2], D, SOME=at is not None, HEADS=heads, BLOCK=triton.next_power_of_2(D), num_warps=1)
    return y.transpose(1, 2)


def rotate_some(q, cos, sin, at):
    """skipping.rotate_some of q (H, N, D)."""
    return rotate(q[None], cos, sin, at)[0]


@triton.jit
def swiglu_kernel(gate, up, y, n, stride, BLOCK: tl.constexpr):
    t, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    g = tl.load(gate + t * stride + i, mask=inside).to(tl.float32)
    u = tl.load(up + t * stride + i, mask=inside)
    silu = (g * tl.sigmoid(g)).to(u.dtype)                                       # rounded, as F.silu is
    tl.store(y + t * n + i, silu * u, mask=inside)


def swiglu(gate, up):
    """F.silu(gate) * up, of the two halves of one product, (..., intermediate) each."""
    n, y = gate.shape[-1], gate.new_empty(gate.shape)
    swiglu_kernel[(y.numel() // n, triton.cdiv(n, 1024))](gate, up, y, n, gate.stride(-2), BLOCK=1024)
    return y


@triton.jit
def store_kernel(keys, values, k, v, positions, memory_b, memory_h, k_b, k_h, k_t, v_b, v_h, v_t, T, D,
                 BLOCK: tl.constexpr):
    b, h, t = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    d = tl.arange(0, BLOCK)
    to = b * memory_b + h * memory_h + (tl.load(positions + b) + t - (T - 1)) * D + d
    tl.store(keys + to, tl.load(k + b * k_b + h * k_h + t * k_t + d, mask=d < D), mask=d < D)
    tl.store(values + to, tl.load(v + b * v_b + h * v_h + t * v_t + d, mask=d < D), mask=d < D)


def store(keys, values, k, v, positions):
    """attention.store: k and v (B, K, T, D) to keys and values (B, K, max_tokens, D)."""
    store_kernel[k.shape[:3]](keys, values, k, v, positions, *keys.stride()[:2], *k.stride()[:3],
                              *v.stride()[:3], *k.shape[2:], BLOCK=triton.next_power_of_2(k.shape[3]),
                              num_warps=1)
