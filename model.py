"""The whole Llama in one file: configuration, layers, key/value cache, loading public weights, generation.

Notable:
- every sublayer (Attention, MLP, and the Block made of the two) maps the residual stream to the residual
  stream, x -> x + f(norm(x)), and has the same signature: forward(x, ctx)
- what all layers of one forward pass share (rotary angles, masks, row lengths, the cache) travels in a
  Context
- rows of a batch may have different lengths: they are padded on the right, where causal attention never looks
- grouped-query attention, Llama 3.1's rope scaling, Mistral's sliding window, Qwen2's bias on q, k and v,
  Qwen3's norm on q and k, tied or untied head

Shapes: B rows, T columns (tokens), S keys, C n_embd, H n_head, K n_kv_head, D head_dim, V vocabulary.
"""
import math
import os
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import register_flop_formula

from weights import InputError, open_checkpoint

FAMILIES = "llama", "mistral", "qwen2", "qwen3"     # model_type in config.json


@dataclass(frozen=True)
class Config:
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    intermediate: int
    vocab_size: int
    head_dim: int
    max_context: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None    # Llama 3.1's: the keys of config.json, or a GGUF file's "factors"
    sliding_window: int | None = None   # Mistral 7B v0.1: a token sees this many tokens, itself included
    tie_embeddings: bool = False
    qkv_bias: bool = False              # Qwen2
    qk_norm: bool = False               # Qwen3: every head's query and key is normalized

    @classmethod
    def from_hf(cls, hf, where="config.json"):
        """Config from the keys of a Hugging Face config.json. Refuses, by name, what would be loaded half."""
        family = hf.get("model_type")
        if family not in FAMILIES:
            raise InputError(f"{where}: model_type {family!r} is not supported; {', '.join(FAMILIES)} are")
        for key, plain in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu"),
                           ("use_sliding_window", False)):
            if hf.get(key, plain) != plain:
                raise InputError(f"{where}: {key} {hf[key]!r} is not supported")
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "llama3", "factors"):
            raise InputError(f"{where}: rope type {kind!r} is not supported; 'default' and 'llama3' are")
        try:
            n_head, n_embd = hf["num_attention_heads"], hf["hidden_size"]
            return cls(
                n_layer=hf["num_hidden_layers"], n_head=n_head, n_embd=n_embd, vocab_size=hf["vocab_size"],
                n_kv_head=hf.get("num_key_value_heads") or n_head,
                head_dim=hf.get("head_dim") or n_embd // n_head,
                intermediate=hf["intermediate_size"], max_context=hf.get("max_position_embeddings", 2048),
                norm_eps=hf.get("rms_norm_eps", 1e-6),
                rope_theta=rope.get("rope_theta", hf.get("rope_theta", 10000.0)),
                rope_scaling=rope if kind != "default" else None,
                sliding_window=hf.get("sliding_window") if family == "mistral" else None,
                tie_embeddings=hf.get("tie_word_embeddings", False),
                qkv_bias=family == "qwen2", qk_norm=family == "qwen3")
        except KeyError as e:
            raise InputError(f"{where}: lacks {e}") from None


def rope_frequencies(config):
    """Rotation of each pair of channels in radians a position, float32 (D/2,). RoPE: arXiv 2104.09864."""
    freq = 1 / config.rope_theta ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    r = config.rope_scaling
    if r and "factors" in r:
        return freq / torch.tensor(r["factors"])
    if r:                     # slow pairs turn `factor` times slower, fast ones as before, a ramp between
        turns = r["original_max_position_embeddings"] * freq / (2 * math.pi)   # within the first context
        ramp = (turns - r["low_freq_factor"]) / (r["high_freq_factor"] - r["low_freq_factor"])
        ramp = ramp.clamp(0, 1)
        freq = freq * (ramp + (1 - ramp) / r["factor"])
    return freq


def rotate(x, cos, sin):
    """Turn each pair (x[i], x[i + D/2]) by its position's angle. x (..., T, D); cos and sin (..., T, D), the
    first half of sin negative."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Cache:
    """Keys and values of a running generation. A layer's memory is allocated when it is first written, for
    the rows that write it: a layer that no row runs has none. `decisions` is where a layer may note, while
    the prompt is read, what should hold for the tokens that follow."""

    def __init__(self, config, columns):
        self.columns = columns                       # the most tokens a row can hold
        self.k = [None] * config.n_layer             # (rows, K, columns, D) each
        self.v = [None] * config.n_layer
        self.decisions = {}

    def prefill(self, layer, k, v):
        """Store a prompt's keys and values, (rows, K, T, D), from column 0 on; returns those to attend to."""
        shape, T = (*k.shape[:2], self.columns, k.shape[3]), k.shape[2]
        try:
            self.k[layer], self.v[layer] = k.new_empty(shape), v.new_empty(shape)
        except RuntimeError as e:
            size = 2 * len(self.k) * math.prod(shape) * k.element_size() / 2**30
            raise InputError(f"out of memory: keys and values of {shape[0]} rows of {self.columns} tokens"
                             f" need {size:.2f} GiB; lower the batch, the prompt or max_new_tokens") from e
        for memory, new in (self.k[layer], k), (self.v[layer], v):
            memory[:, :, :T] = new
            memory[:, :, T:] = 0                     # masked until written, but garbage could be NaN
        return k, v

    def step(self, layer, k, v, ctx):
        """Store a token a row, (rows, K, 1, D), each at its position; returns all keys and values so far."""
        keys, values = self.k[layer], self.v[layer]
        if ctx.columns is None:                      # every row is at the same position
            keys[:, :, ctx.end - 1:ctx.end], values[:, :, ctx.end - 1:ctx.end] = k, v
        else:
            at = ctx.columns[:, None, None, None].expand_as(k)
            keys.scatter_(2, at, k), values.scatter_(2, at, v)
        return keys[:, :, :ctx.end], values[:, :, :ctx.end]

    def copy(self, other):
        """Take over another's keys and values, allocating what it has and this has not yet."""
        for mine, theirs in (self.k, other.k), (self.v, other.v):
            for i, t in enumerate(theirs):
                if t is not None:
                    mine[i] = torch.empty_like(t) if mine[i] is None else mine[i]
                    mine[i].copy_(t)

    def bytes(self):
        """Bytes of keys and values allocated."""
        return sum(t.numel() * t.element_size() for t in (*self.k, *self.v) if t is not None)


@dataclass
class Context:
    """What every layer of one forward pass shares. A row is one sequence of the batch."""
    cos: torch.Tensor                            # (T, D), or (B, 1, T, D) where rows differ in positions
    sin: torch.Tensor
    lengths: torch.Tensor                        # (B,) real tokens of each row in this pass, then padding
    prompt_lengths: torch.Tensor                 # (B,) how many of them are the prompt
    max_prompt: int                              # the largest of those
    sizes: list[int] | None = None               # lengths once more, where the host can read them
    first: list[int] | None = None               # the position of each row's first token in this pass; None:
                                                 # columns are not positions, and the mask alone tells
    mask: torch.Tensor | None = None             # (B or 1, 1, T, S) added to attention's scores; None: causal
    window: int | None = None                    # a token sees so many, itself included; None: all before it
    cache: Cache | None = None
    decoding: bool = False                       # a step that continues the cache, not a prompt
    end: int = 0                                 # decoding: keys to attend to, this step's included
    columns: torch.Tensor | None = None          # decoding: (B,) where a row writes; None: all at end - 1

    def select(self, rows):
        """The same for some rows of the batch only, given by their indices (n,)."""
        def pick(t):
            return t[rows] if t is not None and t.dim() == 4 and t.shape[0] > 1 else t
        return replace(self, cos=pick(self.cos), sin=pick(self.sin), mask=pick(self.mask), sizes=None,
                       first=None, lengths=self.lengths[rows],
                       prompt_lengths=self.prompt_lengths[rows],
                       columns=None if self.columns is None else self.columns[rows])


def recomputed(f, *args):
    """f(*args), whose intermediate results are computed again in the backward pass instead of being kept."""
    if not torch.is_grad_enabled():
        return f(*args)
    return checkpoint(f, *args, use_reentrant=False, preserve_rng_state=False)


def onednn(x, weight, bias):
    """F.linear by oneDNN; the weight may be packed."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def linear(x, weight, bias=None):
    """x (..., T, in) @ weight (out, in).T + bias: F.linear, but by oneDNN where that is faster in float32 on
    a CPU: for single tokens, whose product would run on one thread, and where products are long and wide
    (MKL uses no AVX-512 on AMD's). Not for others, since its sums round to twice the error."""
    if x.dtype == torch.float32 and ONEDNN and x.device.type == "cpu" and not torch.is_grad_enabled():
        T, (out, n) = x.shape[-2], weight.shape
        if T == 1 or T >= 256 and out > 4 * n:
            return onednn(x, weight, bias)
    return F.linear(x, weight, bias)


ONEDNN = torch.backends.mkldnn.is_available()
if ONEDNN:
    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def linear_flops(x, weight, *_, **__):
        return 2 * math.prod(x) * weight[0]                                   # from the shapes


class Linear(nn.Linear):
    packed = None                  # the weight as oneDNN lays it out, within `packed` below

    def forward(self, x):
        if self.packed is not None:
            return onednn(x, self.packed, self.bias)
        return linear(x, self.weight, self.bias)


def packs(size, device, dtype):
    """Are weights of `size` bytes packed for decoding? In bfloat16 on a CPU that computes it, where they are
    less than a quarter of its memory."""
    if dtype != torch.bfloat16 or device.type != "cpu":
        return False
    able = ONEDNN and torch.cpu._is_avx512_bf16_supported() and hasattr(os, "sysconf")
    return able and 4 * size < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def packed(model, rows):
    """Within it weights may exist a second time, laid out for products of so many rows: those of a few rows
    then take half to two thirds of the time."""
    layers, like = [module for module in model.modules() if isinstance(module, Linear)], model.embed.weight
    try:
        if packs(sum(layer.weight.nbytes for layer in layers), like.device, like.dtype):
            for layer in layers:
                layer.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
        yield
    finally:
        for layer in layers:
            layer.packed = None


class RMSNorm(nn.Module):
    def __init__(self, n, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n)), eps

    def forward(self, x):
        return recomputed(F.rms_norm, x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """x -> x + attention(norm(x)): causal, grouped-query, with rotary positions."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        width = (self.n_head + 2 * self.n_kv_head) * self.head_dim
        self.qkv = Linear(config.n_embd, width, bias=config.qkv_bias)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.o = Linear(self.n_head * self.head_dim, config.n_embd, bias=False)

    def forward(self, x, ctx):
        return x + self.change(self.norm(x), ctx)

    def change(self, h, ctx):
        """What is added to x, (B, T, C); h = norm(x)."""
        y = self.heads(self.qkv(h))                                           # (B, H + 2K, T, D)
        qk, v = y[:, :-self.n_kv_head], y[:, -self.n_kv_head:]
        if self.q_norm:
            qk = torch.cat((self.q_norm(qk[:, :self.n_head]), self.k_norm(qk[:, self.n_head:])), 1)
        qk = rotate(qk, ctx.cos, ctx.sin)
        k, v = self.remember(qk[:, self.n_head:], v, ctx)                     # (B, K, S, D)
        q = qk[:, :self.n_head]                                               # (B, H, T, D)
        return self.output(attend(q, k, v, ctx.mask, causal=ctx.mask is None and not ctx.decoding))

    def heads(self, y):
        return y.unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)         # (..., T, HD) -> (..., H, T, D)

    def output(self, y):
        return self.o(y.transpose(-3, -2).flatten(-2))                        # (..., H, T, D) -> (..., T, C)

    def remember(self, k, v, ctx):
        """Store this pass's keys and values in the cache, if there is one; returns all there are."""
        if ctx.decoding:
            return ctx.cache.step(self.layer, k, v, ctx)
        if ctx.cache is not None:
            return ctx.cache.prefill(self.layer, k, v)
        return k, v

    def queries(self, h, cos, sin):
        """Queries alone, (..., H, T, D), for those who need no more; h = norm(x)."""
        q = self.project(h, slice(self.n_head * self.head_dim))
        return rotate(self.q_norm(q) if self.q_norm else q, cos, sin)

    def keys_values(self, h, ctx):
        """Keys and values alone, (B, K, S, D), remembered."""
        y = self.project(h, slice(self.n_head * self.head_dim, None))
        k, v = y[:, :self.n_kv_head], y[:, self.n_kv_head:]
        return self.remember(rotate(self.k_norm(k) if self.k_norm else k, ctx.cos, ctx.sin), v, ctx)

    def project(self, h, rows):
        """Some rows of `qkv`, as heads."""
        bias = None if self.qkv.bias is None else self.qkv.bias[rows]
        return self.heads(linear(h, self.qkv.weight[rows], bias))


def additive(sees, like):
    """What is added to attention's scores, in like's dtype: 0 where a query sees a key (bool), else -inf."""
    return torch.where(sees, like.new_zeros(()), -math.inf)


def attend(q, k, v, mask=None, causal=False):
    """Softmax attention of q (B, H, T, D) over k, v (B, K, S, D), K dividing H. The mask is added to the
    scores (see `additive`); it may be of the last keys only: all see those before."""
    if q.shape[2] == 1:   # one token: the query heads of a key head are as good as its rows, and much faster
        y = F.scaled_dot_product_attention(q.view(*k.shape[:2], -1, q.shape[3]), k, v, attn_mask=mask)
        return y.reshape(q.shape)
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        return recomputed(attend_in_chunks, q, k, v, mask, causal)
    if mask is not None and mask.shape[-1] < k.shape[2]:
        mask = F.pad(mask, (k.shape[2] - mask.shape[-1], 0))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


def attend_in_chunks(q, k, v, mask, causal, n=128):
    """`attend` by plain products, n queries at a time and, where causal, the keys up to the last of them. On
    CPUs PyTorch's fused kernel takes as long in bfloat16 as in float32; this takes less than half."""
    (B, H, T, D), K = q.shape, k.shape[1]
    q = q.mul(D ** -0.5).unflatten(1, (K, -1)).flatten(0, 1)                  # (BK, H/K, T, D)
    k, v = k.flatten(0, 1), v.flatten(0, 1)                                   # (BK, S, D)
    triangle = additive(torch.ones(n, n, dtype=torch.bool).tril(), q) if causal else None
    chunks = []
    for start, some in zip(range(0, T, n), q.split(n, 2)):
        size, end, bias = some.shape[2], k.shape[1], None
        if causal:
            end, bias = start + size, triangle[:size, :size]
        elif mask is not None:
            bias = mask[..., start:start + size, :]
        score = torch.bmm(some.flatten(1, 2), k[:, :end].mT)                  # (BK, H/K size, end)
        if bias is not None:
            score.view(B, H, size, end)[..., end - bias.shape[-1]:] += bias
        chunks.append(torch.bmm(score.softmax(-1), v[:, :end]).view(B, H, size, D))
    return torch.cat(chunks, 2)


def swiglu(gate, up):
    return F.silu(gate) * up


class MLP(nn.Module):
    """x -> x + swiglu(norm(x))."""

    def __init__(self, config):
        super().__init__()
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.gate_up = Linear(config.n_embd, 2 * config.intermediate, bias=False)
        self.down = Linear(config.intermediate, config.n_embd, bias=False)

    def forward(self, x, ctx=None):
        return x + self.change(self.norm(x), ctx)

    def change(self, h, ctx=None):
        gate, up = self.gate_up(h).chunk(2, -1)                               # (..., intermediate) each
        return self.down(recomputed(swiglu, gate, up))


class Block(nn.Module):
    """One layer: attention, then MLP."""

    def __init__(self, config, layer):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x, ctx):
        return self.mlp(self.attn(x, ctx), ctx)


class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.angles = None              # cos and sin of every position so far needed, made on first use
        self.replays = {}               # CUDA: captured steps

    def forward(self, idx, lengths=None, prompt_lengths=None):
        """Logits (B, T, V) of token ids (B, T) int64.

        lengths: (B,) int64, real tokens a row, padding on the right; prompt_lengths: (B,) int64, how many of
        them are the prompt (default: the first 64). Logits at padding are meaningless. InputError past the
        model's context.
        """
        return self.head(self.features(idx, lengths, prompt_lengths))

    def features(self, idx, lengths=None, prompt_lengths=None):
        """What the head turns into logits, (B, T, C): take the positions you need before you call `head`."""
        return self.norm(self.run(self.embed(idx), self.context(idx, lengths, prompt_lengths)))

    def run(self, x, ctx, start=0, stop=None):
        """Layers start to stop - 1 on the residual stream x (B, T, C)."""
        for layer in self.layers[start:stop]:
            x = layer(x, ctx)
        return x

    def context(self, idx, lengths=None, prompt_lengths=None, cache=None):
        """The Context of a pass that reads token ids (B, T) from position 0 on."""
        B, T = idx.shape
        if T > self.config.max_context:
            raise InputError(f"{T} tokens do not fit the model's context of {self.config.max_context};"
                             " shorten the text")
        if T == 0:
            raise InputError("the prompt is empty; give at least one token")
        lengths = checked([T] * B if lengths is None else lengths, "lengths", B, T, idx.device)
        sizes = lengths.tolist()
        if prompt_lengths is None:
            prompt_lengths = lengths.clamp(max=64)   # plain text: its beginning stands in for a prompt
        else:
            prompt_lengths = checked(prompt_lengths, "prompt_lengths", B, lengths, idx.device)
        cos, sin = self.angles_of(slice(0, T), T)
        window, mask = self.config.sliding_window, None
        if window and T > window:
            t = torch.arange(T, device=idx.device)
            ago = t[:, None] - t
            mask = additive((ago >= 0) & (ago < window), self.embed.weight)[None, None]
        return Context(cos, sin, lengths, prompt_lengths, int(prompt_lengths.max()), sizes, [0] * B,
                       mask, window, cache)

    def step_context(self, cache, first, device):
        """The Context of a step that continues `cache` by a token a row, at positions `first` (a list)."""
        end, B, window = max(first) + 1, len(first), self.config.sliding_window
        if min(first) != max(first) or window and end > window:
            return self.ragged_context(cache, torch.tensor(first, device=device), end, first)
        cos, sin = self.angles_of(slice(end - 1, end), end)
        ones = torch.ones(B, dtype=torch.int64, device=device)
        return Context(cos, sin, ones, ones, 1, [1] * B, first, None, window, cache, True, end)

    def ragged_context(self, cache, columns, end, first=None):
        """The same where rows are at positions columns (B,) below `end`, which the host need not know."""
        window, ones, at = self.config.sliding_window, torch.ones_like(columns), columns[:, None, None, None]
        keys = torch.arange(end, device=columns.device)
        sees = (keys <= at) if not window else (keys <= at) & (keys > at - window)
        mask = additive(sees, self.embed.weight)                                            # (B, 1, 1, end)
        cos, sin = (t[:, None, None] for t in self.angles_of(columns, end))                 # (B, 1, 1, D)
        return Context(cos, sin, ones, ones, 1, [1] * len(columns), first, mask, window, cache, True, end,
                       columns)

    def can_replay(self):
        """Is a step of generation always the same kernels, on CUDA?"""
        anew = any(getattr(m, "decides_at_each_step", False) for m in self.modules())
        return self.embed.weight.device.type == "cuda" and not anew

    @contextmanager
    def stepper(self, cache, rows):
        """How to continue `cache`: yields a function of tokens (B,) and their positions (a list) that returns
        the residual stream (B, C). Where it can, it replays a CUDA graph, kept for later generations of the
        same shape and decisions."""
        if not self.can_replay():
            device = self.embed.weight.device
            with packed(self, rows):
                yield lambda token, first: self.run(self.embed(token[:, None]),
                                                    self.step_context(cache, first, device))[:, 0]
            return
        key = (self.embed.weight.data_ptr(), rows, cache.columns, tuple(cache.decisions),
               tuple(tuple(decision.tolist()) for decision in cache.decisions.values()))
        replay = self.replays.pop(key, None) or Replay(self, cache, rows)
        self.replays = dict([*self.replays.items(), (key, replay)][-4:])            # the last four
        replay.cache.copy(cache)
        yield replay

    @torch.no_grad()
    def generate(self, idx, max_new_tokens=32, temperature=0.0, top_k=None, lengths=None, eos_id=None,
                 on_token=None):
        """Continue each row of idx (B, T) by up to max_new_tokens; returns (B, T + max_new_tokens) token ids.

        Row b is its prompt, lengths[b] tokens (default T), then its new tokens, then eos_id, or 0, to the
        end. Rows stop at eos_id, where one is given. temperature 0 takes the likeliest token; else tokens are
        drawn from the top_k likeliest (default: all). on_token, if given, is called with each step's tokens
        (B,). InputError where the result would not fit the context. The cache stays in `self.cache`, for
        those who want to measure it.
        """
        B, T = idx.shape
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens should be at least 1; it is {max_new_tokens}")
        if T + max_new_tokens > self.config.max_context:
            raise InputError(f"{T} prompt tokens and {max_new_tokens} new ones do not fit the model's context"
                             f" of {self.config.max_context}; shorten one of them")
        was_training = self.training
        self.eval()
        try:
            self.cache = cache = Cache(self.config, T + max_new_tokens)
            ctx = self.context(idx, lengths, lengths if lengths is not None else [T] * B, cache)
            sizes, lengths = ctx.sizes, ctx.lengths
            x = self.run(self.embed(idx), ctx)
            x = x[torch.arange(B, device=idx.device), lengths - 1]            # (B, C), each row's last token
            pad = 0 if eos_id is None else eos_id
            out = torch.full((B, T + max_new_tokens), pad, device=idx.device)
            out[:, :T] = torch.where(torch.arange(T, device=idx.device) < lengths[:, None], idx, pad)
            done = torch.zeros(B, dtype=torch.bool, device=idx.device)
            with self.stepper(cache, B) as step:
                for i in range(max_new_tokens):
                    token = draw(self.head(self.norm(x)), temperature, top_k)        # (B,)
                    token = token.masked_fill(done, pad)
                    out.scatter_(1, (lengths + i)[:, None], token[:, None])
                    if on_token:
                        on_token(token)
                    if eos_id is not None:
                        done = done | (token == eos_id)
                        if bool(done.all()):
                            break
                    if i + 1 < max_new_tokens:
                        x = step(token, [n + i for n in sizes])
            return out
        finally:
            self.train(was_training)

    def angles_of(self, positions, end):
        """cos and sin as `rotate` wants them, in the model's dtype, at positions that all lie below `end`."""
        like = self.embed.weight
        if self.angles is None or len(self.angles[0]) < end or self.angles[0].dtype != like.dtype \
                or self.angles[0].device != like.device:
            n = min(self.config.max_context, 1 << max(end - 1, 511).bit_length())
            angle = torch.outer(torch.arange(n).float(), rope_frequencies(self.config))
            cos, sin = angle.cos(), angle.sin()
            self.angles = torch.cat((cos, cos), 1).to(like), torch.cat((-sin, sin), 1).to(like)
        return self.angles[0][positions], self.angles[1][positions]

    @classmethod
    def from_pretrained(cls, name_or_path, device="cpu", dtype=torch.float32):
        """A Llama in eval mode with the weights of `smollm2-135m`, a Hugging Face folder or a
        .gguf file.

        Tensors are read one by one, straight to `device` and `dtype`. InputError names what is missing or
        misshapen.
        """
        checkpoint = open_checkpoint(name_or_path)
        config = Config.from_hf(checkpoint.config, checkpoint.path)
        with torch.device("meta"):
            model = cls(config)
        unused = {name for name in checkpoint.names if not name.endswith("rotary_emb.inv_freq")}
        for name, parameter in list(model.named_parameters()):   # a tied head is not among them
            weight = torch.empty(parameter.shape, device=device, dtype=dtype)
            for source, part in zip(*checkpoint_parts(name, weight, config)):
                if source not in checkpoint.names:
                    raise InputError(f"{checkpoint.path}: tensor {source} is missing; get the model again")
                tensor = checkpoint.tensor(source)
                if tensor.shape != part.shape:
                    raise InputError(f"{checkpoint.path}: tensor {source} has shape {tuple(tensor.shape)},"
                                     f" but the config asks for {tuple(part.shape)}")
                part.copy_(tensor)
                unused.discard(source)
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, nn.Parameter(weight))
        if config.tie_embeddings:
            model.head.weight = model.embed.weight
            unused.discard("lm_head.weight")
        if unused:
            raise InputError(f"{checkpoint.path}: tensor {min(unused)} has no place in this model;"
                             " is the config right?")
        return model.eval()


class Replay:
    """A step of generation as a CUDA graph: captured once, its kernels run again without Python. They work at
    fixed addresses: it has a cache, tokens and positions of its own, and attends to all columns, masked."""

    def __init__(self, model, cache, rows):
        self.model, self.cache = model, Cache(model.config, cache.columns)
        self.cache.copy(cache)
        self.cache.decisions = cache.decisions
        self.token = torch.zeros(rows, dtype=torch.int64, device=model.embed.weight.device)
        self.columns = torch.zeros_like(self.token)
        self.x, self.replay = self.capture()

    def step(self):
        ctx = self.model.ragged_context(self.cache, self.columns, self.cache.columns)
        return self.model.run(self.model.embed(self.token[:, None]), ctx)[:, 0]

    def capture(self):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.step()                              # a first run, for what is allocated and chosen only once
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x = self.step()
        return x, graph.replay

    def __call__(self, token, first):
        self.token.copy_(token)
        self.columns.copy_(torch.tensor(first))
        self.replay()
        return self.x


def checkpoint_parts(name, weight, config):
    """Where Hugging Face checkpoints keep a parameter: (tensor names, the parts of `weight` they fill)."""
    layer, _, rest = name.rpartition(".attn." if ".attn." in name else ".mlp.")
    q, kv, up = config.n_head * config.head_dim, config.n_kv_head * config.head_dim, config.intermediate
    if rest in ("qkv.weight", "qkv.bias"):
        names, rows = [f"self_attn.{part}_proj.{rest[4:]}" for part in "qkv"], [q, kv, kv]
    elif rest == "gate_up.weight":
        names, rows = ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [up, up]
    else:
        known = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
                 "head.weight": "lm_head.weight", ".attn.norm.weight": "input_layernorm.weight",
                 ".attn.q_norm.weight": "self_attn.q_norm.weight",
                 ".attn.k_norm.weight": "self_attn.k_norm.weight",
                 ".attn.o.weight": "self_attn.o_proj.weight", ".mlp.down.weight": "mlp.down_proj.weight",
                 ".mlp.norm.weight": "post_attention_layernorm.weight"}
        names, rows = [known[name[len(layer):]]], [len(weight)]
    return [f"model.{layer}.{part}" if layer else part for part in names], weight.split(rows)


def draw(logits, temperature=0.0, top_k=None):
    """One token id a row, (B,), from logits (B, V)."""
    if temperature == 0:
        return logits.max(-1).indices               # argmax, but that is slow in bfloat16 on CPUs
    logits = logits.float() / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    below = logits.softmax(-1).cumsum(-1)            # torch.multinomial is ten times slower on CPUs
    at = torch.rand(len(below), 1, device=below.device) * below[:, -1:]
    return torch.searchsorted(below, at, right=True).squeeze(1).clamp(max=below.shape[1] - 1)


def checked(values, name, B, most, device):
    """Row lengths as (B,) int64 on `device`, each from 1 to `most`."""
    values = torch.as_tensor(values, device=device, dtype=torch.int64)
    if values.shape != (B,) or bool((values < 1).any()) or bool((values > most).any()):
        raise InputError(f"{name} should be {B} numbers, from 1 to {most}, one a row, not {values.tolist()}")
    return values


def pick(device="auto", dtype="auto"):
    """(torch.device, torch.dtype); auto is CUDA where there is one, and bfloat16 where it is native."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    if dtype == "auto":
        native = torch.cuda.is_bf16_supported() if device == "cuda" else torch.cpu._is_avx512_bf16_supported()
        dtype = "bfloat16" if native else "float32"
    return torch.device(device), getattr(torch, dtype)
