"""The whole Llama in one file: configuration, layers, key/value cache, loading public weights, generation.

Notable:
- every sublayer (Attention, MLP, and the Block of one after the other) maps the residual stream to the
  residual stream, x -> x + f(norm(x)), and has the same signature: forward(x, ctx, h=None), h = norm(x)
- what all layers of one forward pass share, such as rotary angles and the cache, travels in a Context
- rows of a batch may have different lengths: they are padded on the right, where causal attention never looks
- grouped-query attention, Llama 3.1's rope scaling, Mistral's sliding window, Qwen2's bias on q, k and v,
  Qwen3's norm on q and k, SmolLM3's layers without rotary positions, tied or untied head
- support/kernels.py, attention.py and graph.py compute what the plain PyTorch calls do, faster

Shapes: B rows, T tokens, N chosen tokens, S keys, C n_embd, H n_head, K n_kv_head, D head_dim, V vocabulary.
"""
import math
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from support.attention import additive_mask, attention, store
from support.checked import check_ids
from support.cuda import fused, to_device
from support.data import PLAIN_PROMPT
from support.files import NO_MEMORY, InputError, read_list, read_value
from support.graph import stepper
from support.kernels import Linear, recomputed, rms_norm
from weights import checkpoint_parts, open_checkpoint, read_rope, write_folder

FAMILIES = {"llama": {}, "mistral": {"sliding_window": 4096}, "phi3": {"rms_norm_eps": 1e-5}, "qwen2": {},
            "qwen3": {}, "smollm3": {"rope_theta": 2e6, "tie_word_embeddings": True}}       # defaults


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
    no_rope: tuple[int, ...] = ()       # SmolLM3: layers whose queries and keys have no rotary positions
    joined: bool = False                # Phi-3: its files hold q, k and v in one tensor, and gate and up

    @classmethod
    def from_hf(cls, hf, where="config.json"):
        """Config from the keys of a Hugging Face config.json. Refuses, by name, what is not implemented."""
        family = read_value(hf, where, "model_type", str)
        if family not in FAMILIES:
            raise InputError(f"{where}: model_type {family!r} is not supported; {', '.join(FAMILIES)} are")
        hf = FAMILIES[family] | hf               # a family's defaults for keys that the file leaves out
        read = partial(read_value, hf, where)
        size = partial(read, kind=int, low=1, high=2**24)
        for key, known in (("attention_bias", False), ("mlp_bias", False), ("use_sliding_window", False),
                           ("hidden_act", "silu"), ("partial_rotary_factor", 1.0), ("is_causal", True)):
            if read(key, type(known), known) != known:
                raise InputError(f"{where}: {key} {hf[key]!r} is not supported")
        n_head, n_embd = size("num_attention_heads", high=2**12), size("hidden_size", high=2**20)
        n_kv_head = size("num_key_value_heads", default=n_head, high=n_head)
        head_dim = size("head_dim", default=n_embd // n_head, high=2**12)
        if n_head % n_kv_head or head_dim % 2 or not head_dim:
            raise InputError(f"{where}: num_attention_heads {n_head}, num_key_value_heads {n_kv_head} and"
                             f" head_dim {head_dim} do not fit together")
        rope_theta, rope_scaling = read_rope(hf, where, head_dim // 2)
        n_layer = size("num_hidden_layers", high=1000)
        has_rope = read_list(hf, where, "no_rope_layers", int) if family == "smollm3" else [1] * n_layer
        if len(has_rope) < n_layer:
            raise InputError(f"{where}: no_rope_layers has {len(has_rope)} entries for {n_layer} layers")
        return cls(
            n_layer=n_layer, n_head=n_head, n_kv_head=n_kv_head, n_embd=n_embd,
            intermediate=size("intermediate_size"), vocab_size=size("vocab_size"), head_dim=head_dim,
            max_context=size("max_position_embeddings", default=2048, high=2**31),
            norm_eps=read("rms_norm_eps", float, 1e-6, 1e-30, 1.0),
            rope_theta=rope_theta, rope_scaling=rope_scaling,
            sliding_window=(size("sliding_window", default=None, high=2**31)
                            if family in ("mistral", "phi3") else None),
            tie_embeddings=read("tie_word_embeddings", bool, False),
            qkv_bias=family == "qwen2", qk_norm=family == "qwen3", joined=family == "phi3",
            no_rope=tuple(layer for layer, has in enumerate(has_rope) if not has))


def rope_frequencies(config):
    """Rotation of each pair of channels in radians a position, float32 (D/2,). RoPE: arXiv 2104.09864."""
    freq = 1 / config.rope_theta ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    r = config.rope_scaling
    if r and "factors" in r:
        return freq / torch.tensor(r["factors"])
    if r:                     # slow pairs turn `factor` times slower, fast ones as before, a ramp between
        turns = r["original_max_position_embeddings"] * freq / (2 * math.pi)      # in the original context
        ramp = (turns - r["low_freq_factor"]) / (r["high_freq_factor"] - r["low_freq_factor"])
        ramp = ramp.clamp(0, 1)
        freq = freq * (ramp + (1 - ramp) / r["factor"])
    return freq


@fused
def rotate(x, cos, sin):
    """Turn each pair of channels (x[i], x[i + D/2]) of x (..., T, D) by the angle of its position.

    cos and sin (..., T, D); the first half of sin is negated: (x, y) turns to (x cos - y sin, y cos +
    x sin).
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Cache:
    """Keys and values of a running generation; a layer's memory is allocated when it first writes."""

    def __init__(self, config, max_tokens):
        self.max_tokens, self.window = max_tokens, config.sliding_window
        self.k = [None] * config.n_layer             # (B, K, columns, D) each; B: the layer's open rows
        self.v = [None] * config.n_layer
        self.routing = defaultdict(dict)             # skipping.py's state: {name: {MindSkip: value}}

    def store(self, layer, k, v, ctx):
        """Store this pass's keys and values (B, K, T, D); returns all to attend to, (B, K, S, D)."""
        return self.store_step(layer, k, v, ctx) if ctx.decoding else self.store_prompt(layer, k, v)

    def store_prompt(self, layer, k, v):
        """Store a prompt's keys and values from column 0 on."""
        B, K, T, D = k.shape
        try:
            self.k[layer], self.v[layer] = k.new_empty(2, B, K, self.max_tokens, D)
        except RuntimeError as e:
            if not any(words in str(e) for words in NO_MEMORY):
                raise                                # on CUDA an earlier kernel's error, which comes up here
            size = 2 * len(self.k) * self.max_tokens * k[:, :, :1].nbytes / 2**30
            raise InputError(f"out of memory: keys and values of {B} rows of {self.max_tokens} tokens need"
                             f" {size:.2f} GiB; lower the batch, the prompt or max_new_tokens") from e
        for memory, new in (self.k[layer], k), (self.v[layer], v):
            memory[:, :, :T] = new
            memory[:, :, T:] = 0                     # masked until written, but garbage could be NaN
        return k, v

    def store_step(self, layer, k, v, ctx):
        """Store T new tokens of each row, (B, K, T, D): those that skipping.py deferred, then this step's."""
        keys, values, T = self.k[layer], self.v[layer], k.shape[2]
        if ctx.slots is None:                        # every row is at the same position
            keys[:, :, ctx.end - T:ctx.end] = k
            values[:, :, ctx.end - T:ctx.end] = v
        else:
            store(keys, values, k, v, ctx.slots)     # support/attention.py's
        return keys[:, :, :ctx.end], values[:, :, :ctx.end]

    def bytes(self):
        """Bytes of keys and values allocated."""
        return sum(t.nbytes for t in (*self.k, *self.v) if t is not None)


@dataclass
class Context:
    """What every layer of one forward pass shares. A row is one sequence of the batch."""
    cos: torch.Tensor                            # (T, D), or (B, 1, T, D) where rows differ in positions
    sin: torch.Tensor
    lengths: torch.Tensor | None                 # (B,) real tokens of each row, then padding; None in a step
    host_lengths: list[int]                      # the same as a list; in a step [1] * B
    prompt_lengths: torch.Tensor | None = None   # (B,) how many of them are the prompt; None in a step
    longest_prompt: int = 0                      # the largest of those
    mask: torch.Tensor | None = None             # (B or 1, 1, T, S) added to scores; None: causal
    cache: Cache | None = None
    decoding: bool = False                       # a step that continues the cache, one token per row
    end: int = 0                                 # decoding: keys to attend to, this step's included
    slots: torch.Tensor | None = None            # decoding: (B,) cache column each row writes; None: end - 1
    captured: bool = False                       # decoding in a CUDA graph: no .item() or .tolist()


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """x -> x + attention(norm(x)): causal, grouped-query, with rotary positions."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.rotates = layer not in config.no_rope
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        width = (self.n_head + 2 * self.n_kv_head) * self.head_dim
        self.qkv = Linear(config.n_embd, width, bias=config.qkv_bias)     # rows: queries, keys, values
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.o = Linear(self.n_head * self.head_dim, config.n_embd, bias=False)

    def forward(self, x, ctx, h=None):
        """(B, T, C) to (B, T, C). h (B, n, C): norm(x), if known, after that of deferred tokens, if any."""
        h = self.norm(x) if h is None else h
        y = split_heads(self.qkv(h), self.head_dim)                           # (B, H + 2K, n, D)
        qk, v = y[:, :-self.n_kv_head], y[:, -self.n_kv_head:]
        if self.q_norm:
            q, k = qk[:, :self.n_head], qk[:, self.n_head:]
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), 1)
        if self.rotates:
            qk = rotate(qk, ctx.cos, ctx.sin)                                 # both at once: fewer kernels
        q, k = qk[:, :self.n_head, -x.shape[1]:], qk[:, self.n_head:]         # no q for deferred tokens
        if ctx.cache is not None:
            k, v = ctx.cache.store(self.layer, k, v, ctx)                     # (B, K, S, D)
        y = attention(q, k, v, ctx.mask, causal=ctx.mask is None and not ctx.decoding)
        return self.o(merge_heads(y), plus=x)                                 # x + o(y), (B, T, C)


def split_heads(y, head_dim):
    return y.unflatten(-1, (-1, head_dim)).transpose(-3, -2)                  # (..., T, HD) -> (..., H, T, D)


def merge_heads(y):
    return y.transpose(-3, -2).flatten(-2)                                    # (..., H, T, D) -> (..., T, HD)


class MLP(nn.Module):
    """x -> x + swiglu(norm(x))."""

    def __init__(self, config):
        super().__init__()
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.gate_up = Linear(config.n_embd, 2 * config.intermediate, bias=False)
        self.down = Linear(config.intermediate, config.n_embd, bias=False)

    def forward(self, x, ctx=None, h=None):
        """(..., C) to (..., C). h: norm(x), if known."""
        h = self.norm(x) if h is None else h
        gate, up = self.gate_up(h).chunk(2, -1)                               # (..., intermediate) each
        return self.down(recomputed(swiglu, gate, up), plus=x)


@fused
def swiglu(gate, up):
    return F.silu(gate) * up


class Block(nn.Module):
    """One layer: attention, then MLP."""

    def __init__(self, config, layer):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x, ctx, h=None):
        """h: the attention's norm(x), if known."""
        return self.mlp(self.attn(x, ctx, h), ctx)


def run_layers(layers, x, ctx):
    """The residual stream x (B, T, C) after some layers, one after the other."""
    for layer in layers:
        x = layer(x, ctx)
    return x


class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        # nn.Embedding's own normal_ would import torch._dynamo on the meta device, which takes seconds
        table = torch.empty(config.vocab_size, config.n_embd).uniform_(-1, 1)
        self.embed = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.angles = self.cache = None     # see make_angles; the Cache of the last generation

    def forward(self, idx, lengths=None, prompt_lengths=None):
        """Logits (B, T, V) of token ids (B, T) int64.

        lengths: (B,) int64, real tokens per row, the rest is padding on the right; prompt_lengths: (B,)
        int64, how many of them are the prompt (default: the first 64). Logits at padding are meaningless.
        InputError past the model's context.
        """
        ctx = self.context(idx, lengths, prompt_lengths)
        x = run_layers(self.layers, self.embed(idx), ctx)                     # (B, T, C)
        return self.head(self.norm(x))

    def context(self, idx, lengths=None, prompt_lengths=None, cache=None):
        """The Context of a pass that reads token ids (B, T) from position 0 on."""
        B, T = idx.shape
        if T > self.config.max_context:
            raise InputError(f"{T} tokens do not fit the model's context of {self.config.max_context};"
                             " shorten the text")
        if B == 0 or T == 0:
            raise InputError("the prompt is empty; give at least one token")
        lengths = one_per_row([T] * B if lengths is None else lengths, "lengths", idx)
        if prompt_lengths is None:
            prompt_lengths = lengths.clamp(max=PLAIN_PROMPT)      # plain text: the first 64 tokens
        prompt_lengths = one_per_row(prompt_lengths, "prompt_lengths", idx)
        # everything that the host needs, in one device sync
        low, high, *host = torch.cat((torch.stack(idx.aminmax()), lengths, prompt_lengths)).tolist()
        host_lengths, host_prompts = host[:B], host[B:]
        check_ids(low, high, self.config.vocab_size)
        if any(not 1 <= prompt <= n <= T for prompt, n in zip(host_prompts, host_lengths)):
            raise InputError(f"lengths {host_lengths}, of which prompts {host_prompts}: should be 1 to {T},"
                             " and no prompt longer than its row")
        window, mask = self.config.sliding_window, None
        if window and T > window:
            visible = torch.ones(T, T, dtype=torch.bool, device=idx.device).tril().triu(1 - window)
            mask = additive_mask(visible, self.embed.weight.dtype)[None, None]
        cos, sin = self.angles_of(slice(0, T), T)
        return Context(cos=cos, sin=sin, lengths=lengths, host_lengths=host_lengths, mask=mask,
                       prompt_lengths=prompt_lengths, longest_prompt=max(host_prompts), cache=cache)

    def step(self, token, ctx):
        """The residual stream (B, C) of one more token per row, token (B,)."""
        return run_layers(self.layers, self.embed(token[:, None]), ctx)[:, 0]

    def step_context(self, cache, positions):
        """The Context of a step that continues `cache` by one token per row, at `positions` (a list)."""
        end, B, window = max(positions) + 1, len(positions), self.config.sliding_window
        if min(positions) != max(positions) or (window and end > window):
            positions = to_device(torch.tensor(positions), self.embed.weight.device)
            return self.ragged_context(cache, positions, end)
        cos, sin = self.angles_of(slice(end - 1, end), end)
        return Context(cos=cos, sin=sin, lengths=None, host_lengths=[1] * B, cache=cache, decoding=True,
                       end=end)

    def ragged_context(self, cache, positions, end):
        """As step_context, at positions (B,) on the device, below `end`: a mask hides the keys after each.
        The host reads `end` alone, so support/graph.py can replay one captured step at any positions."""
        window, B = self.config.sliding_window, len(positions)
        query, key = positions[:, None, None, None], torch.arange(end, device=positions.device)
        visible = key <= query                                                # (B, 1, 1, end)
        if window:
            visible = visible & (key > query - window)
        mask = additive_mask(visible, self.embed.weight.dtype)
        cos, sin = (t[:, None, None] for t in self.angles_of(positions, end))         # (B, 1, 1, D)
        return Context(cos=cos, sin=sin, lengths=None, host_lengths=[1] * B, mask=mask, cache=cache,
                       decoding=True, end=end, slots=positions)

    def angles_of(self, positions, end):
        """cos and sin as `rotate` wants them, in the model's dtype, at positions that all lie below `end`."""
        self.make_angles(end)
        return self.angles[0][positions], self.angles[1][positions]

    def make_angles(self, end):
        """Extend self.angles to all positions below `end`, with room to grow."""
        weight = self.embed.weight
        cos = self.angles[0] if self.angles else None
        if cos is not None and len(cos) >= end and (cos.dtype, cos.device) == (weight.dtype, weight.device):
            return
        n = min(self.config.max_context, max(512, 2 * end))
        with torch.inference_mode(False), torch.no_grad():        # they are used again, in whatever mode
            angle = torch.outer(torch.arange(n).float(), rope_frequencies(self.config))       # (n, D/2)
            cos, sin = angle.cos(), angle.sin()
            self.angles = torch.cat((cos, cos), 1).to(weight), torch.cat((-sin, sin), 1).to(weight)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens=32, temperature=0.0, top_k=None, lengths=None, eos_id=None,
                 on_token=None):
        """Continue each row of idx (B, T) by up to max_new_tokens; returns (B, T + max_new_tokens) token ids.

        Row b holds its prompt, lengths[b] tokens (default T), its new tokens, and padding: the first eos_id,
        or 0. Rows stop at eos_id, one id or several, where given. temperature 0 takes the likeliest token;
        else tokens are sampled from the top_k likeliest (default: all). on_token is called with each step's
        tokens (B,), and ends the generation where it returns True. InputError where the result would not fit
        the context. `self.cache` keeps the cache, until it is set to None.
        """
        B, T = idx.shape
        for name, value, least in (("max_new_tokens", max_new_tokens, 1), ("top_k", top_k or 1, 1),
                                   ("temperature", temperature, 0)):
            if not value >= least:
                raise InputError(f"{name} should be at least {least}; it is {value}")
        if T + max_new_tokens > self.config.max_context:
            raise InputError(f"{T} prompt tokens and {max_new_tokens} new ones do not fit the model's context"
                             f" of {self.config.max_context}; shorten one of them")
        ends = torch.as_tensor([] if eos_id is None else eos_id, dtype=torch.int64).flatten()
        pad = int(ends[0]) if len(ends) else 0
        ends = ends.to(idx.device)
        was_training = self.training
        self.eval()
        try:
            self.cache = cache = Cache(self.config, T + max_new_tokens)
            ctx = self.context(idx, lengths, lengths if lengths is not None else [T] * B, cache)
            x = run_layers(self.layers, self.embed(idx), ctx)
            x = x[torch.arange(B, device=idx.device), ctx.lengths - 1]        # (B, C), each row's last token
            out = torch.full((B, T + max_new_tokens), pad, device=idx.device)
            out[:, :T] = torch.where(torch.arange(T, device=idx.device) < ctx.lengths[:, None], idx, pad)
            done = torch.zeros(B, dtype=torch.bool, device=idx.device)
            with stepper(self, cache, B) as step:
                for i in range(max_new_tokens):
                    token = sample(self.head(self.norm(x)), temperature, top_k)      # (B,)
                    token = token.masked_fill(done, pad)
                    out.scatter_(1, (ctx.lengths + i)[:, None], token[:, None])
                    if on_token and on_token(token):
                        break
                    if len(ends):
                        done = done | torch.isin(token, ends)
                        if bool(done.all()):
                            break
                    if i + 1 < max_new_tokens:
                        known = token.clamp(0, self.config.vocab_size - 1)       # pad may be no vocabulary id
                        x = step(known, [n + i for n in ctx.host_lengths])       # (B, C)
            return out
        finally:
            self.train(was_training)

    @classmethod
    def from_pretrained(cls, name_or_path, device="cpu", dtype=torch.float32):
        """A Llama in eval mode with the weights of `smollm2-135m`, a Hugging Face folder, a .gguf file or a
        hub id, read tensor by tensor. InputError names what is missing or misshapen.
        """
        checkpoint = open_checkpoint(name_or_path)
        config = Config.from_hf(checkpoint.config, checkpoint.path)
        if config.tie_embeddings:
            tied = checkpoint.tie("model.embed_tokens.weight", "lm_head.weight")
            config = replace(config, tie_embeddings=tied)
        with torch.device("meta"):
            model = cls(config).to(dtype)
        parts = [checkpoint_parts(name, weight, config) for name, weight in model.named_parameters()]
        checkpoint.check_tensors({source: part.shape for pairs in parts for source, part in pairs})
        model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))  # to_empty imports SymPy
        if config.tie_embeddings:
            model.head.weight = model.embed.weight             # tie again: _apply untied them
        for name, parameter in model.named_parameters():
            for source, part in checkpoint_parts(name, parameter.detach(), config):
                part.copy_(checkpoint.tensor(source))
        return model.eval()

    def save_pretrained(self, folder, source):
        """Write a Hugging Face folder of a model without routers (router.remove_routers); its config and
        tokenizer are those of `source`, a name or a path."""
        tensors = {}
        for name, parameter in self.named_parameters():
            for theirs, part in checkpoint_parts(name, parameter.detach().cpu(), self.config):
                tensors[theirs] = part.contiguous()
        write_folder(folder, open_checkpoint(source), tensors)


def sample(logits, temperature=0.0, top_k=None):
    """One token id per row, (B,), from logits (B, V)."""
    if temperature < 1e-6:                          # greedy, the limit at 0; avoids dividing by almost 0
        return logits.max(-1).indices               # argmax, but that is slow in bfloat16 on CPUs
    logits = logits.float() / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    cumulative = logits.softmax(-1).cumsum(-1)       # torch.multinomial is ten times slower on CPUs
    level = torch.rand(len(cumulative), 1, device=cumulative.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, level, right=True).squeeze(1).clamp(max=cumulative.shape[1] - 1)


def one_per_row(values, name, idx):
    """Numbers, one for each row of idx (B, T), as (B,) int64 on its device."""
    values = torch.as_tensor(values, dtype=torch.int64)
    if values.shape != (len(idx),):
        raise InputError(f"{name} should be {len(idx)} numbers, one per row, not {values.tolist()}")
    return to_device(values, idx.device)
