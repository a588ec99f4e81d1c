"""One way to run a model, timed: a Variant of bench.py's comparison.

Its gates are those of a router file on real text, or drawn at random: then exactly as many are open as the
capacity asks for, and the routers' scores are computed all the same.
"""
import copy
import functools
import math
import time

import torch
import torch.nn.functional as F

from losses import backward
from model import Cache, Config, Llama, run_layers, sample
from recipe import overall_penalty
from router import KV_OPEN, add_routers, capacity, load_routers, mindskips
from support.batches import Batch
from support.data import Sample
from support.files import InputError
from support.graph import release, stepper
from support.machine import Work

SHAPES = {
    "smollm2-135m": Config(30, 9, 3, 576, 1536, 49152, 64, 8192, rope_theta=1e5, tie_embeddings=True),
    "llama3.2-1b": Config(16, 32, 8, 2048, 8192, 128256, 64, 131072, rope_theta=5e5, tie_embeddings=True),
    "llama2-7b": Config(32, 32, 32, 4096, 11008, 32000, 128, 4096),
    "mistral-7b": Config(32, 32, 8, 4096, 14336, 32000, 128, 32768),
    "llama3-8b": Config(32, 32, 8, 4096, 14336, 128256, 128, 8192, rope_theta=5e5),
    "llama3.1-8b": Config(32, 32, 8, 4096, 14336, 128256, 128, 131072, rope_theta=5e5),
}
UNTIMED = 4     # warm-up steps of decoding: the first ones pack weights, or capture a CUDA graph


def random_model(config, device, dtype):
    """A Llama with random weights, made on its device in its dtype: right for timing, never for accuracy."""
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    model.to_empty(device=device)
    if config.tie_embeddings:
        model.head.weight = model.embed.weight
    for weight in model.parameters():
        if weight.dim() == 1:                                # a norm's, or a bias
            weight.data.fill_(1)
        else:
            weight.data.normal_(0, 0.02)
    return model.eval()


@functools.cache
def patterns(count, shape, share, seed, device):
    """`count` random 0/1 tensors, each with exactly this share of ones: (count, *shape)."""
    n, generator = math.prod(shape), torch.Generator().manual_seed(seed)
    made = torch.rand(count, n, generator=generator).argsort(1) < round(share * n)
    return made.float().view(count, *shape).to(device)


def override_of(layer, n_layers, share, seed):
    """For MindSkip.override: exactly this share of all layers' gates is open, at random. At token level each
    step of decoding has a pattern of its own. Patterns are made in the warm-up and kept."""
    @functools.cache
    def drawn(count, shape, device):
        steps = patterns(count, (n_layers, *shape), share, seed, device)[:, layer]
        is_on_cpu = device.type == "cpu"                 # where indexing a tuple is cheaper than a slice
        return steps, steps.unbind() if is_on_cpu else steps

    def override(score, ctx):
        count = ctx.cache.max_tokens if ctx.decoding else 1
        steps, each_step = drawn(count, score.shape, score.device)
        if ctx.slots is None:
            wanted = each_step[ctx.end - 1]              # in a prompt end is 0: [-1], its only pattern
        else:                                            # a captured step: the device knows where it is
            wanted = steps.index_select(0, ctx.slots[:1])[0]
        return wanted + (score - score.detach()) if score.requires_grad else wanted
    override.on_device = True
    return override


def open_share(model, share, seed):
    """Open exactly this share of the gates, at random; their scores are computed, then replaced."""
    skips = list(mindskips(model).values())
    for layer, skip in enumerate(skips):
        skip.override = override_of(layer, len(skips), share, seed)


class Removed(torch.nn.Module):
    """In the place of an attention that a static drop removes."""

    def forward(self, x, ctx, h=None):
        return x


class Variant:
    """One way to run the model. `run(round_)` runs it once, on that round's texts, and yields the seconds of
    each part, so that other variants can run in between. Their sum is the measurement (decoding: of one
    step). asked: the capacity to run at, routed if gates are drawn at random, else overall; n_removed: how
    many attentions "static" lacks."""

    def __init__(self, whole, args, phase, name, batch, context, granularity=None, asked=None, n_removed=0):
        self.whole, self.args, self.phase, self.name = whole, args, phase, name
        self.batch, self.context, self.granularity, self.asked = batch, context, granularity, asked
        self.times, self.cache_bytes, self.peak, self.work = [], None, None, Work()
        self.n_removed = n_removed
        self.capacity = self.routed_capacity = None     # as found in the run
        if name == "static":
            self.capacity = 1 - n_removed / whole.config.n_layer
        self.results = []                      # of each measurement: (capacity, routed capacity, cache bytes)

    @functools.cached_property
    def model(self):
        """The model with this variant's gates; its weights are those of `whole`."""
        weights = {id(weight): weight for weight in self.whole.parameters()}
        model = copy.deepcopy(self.whole, weights)                          # a copy of all but these
        if self.granularity and self.args.routers:
            load_routers(model, self.args.routers, self.asked)
        elif self.granularity:
            kv = self.args.kv if self.granularity in KV_OPEN else "all"
            add_routers(model, self.granularity, self.args.layers, kv=kv)
            open_share(model, self.asked, self.args.seed)
        if self.name == "none":
            for skip in mindskips(model).values():
                skip.threshold, skip.override = 2.0, None        # no score reaches it; an override takes time
        if self.name == "static":
            for i in range(self.n_removed):
                model.layers[i * len(model.layers) // self.n_removed].attn = Removed()
        return model

    def run(self, round_):
        """Yields seconds, part by part; in round 0 nan, while operations and bytes are counted."""
        self.begin(round_)
        if self.args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        yield from getattr(self, self.phase)()
        if self.granularity:
            self.capacity = capacity(self.model)
            self.routed_capacity = capacity(self.model, routed=True)
        if self.args.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated() - getattr(self.args, "their_bytes", 0)
            release(self.model)                 # its graph, whose cache would be in the next one's peak

    def begin(self, round_):
        """Each round has texts of its own, (B, T), as far as there are: what routers open depends on them."""
        text = self.args.text
        first = round_ % (len(text) // self.batch) * self.batch
        self.idx = text[first:first + self.batch, :self.context]
        self.is_counted = round_ == 0

    def rate(self, seconds):
        """Bytes per second in decoding, else operations per second. None for gates in a CUDA graph, which
        reads more than round 0 counted, without one."""
        if self.phase != "decode":
            return self.work.flops / seconds
        is_sequence_of_one = self.batch == 1 and self.granularity and self.granularity.endswith("sequence")
        if self.args.device.type == "cuda" and self.granularity and not is_sequence_of_one:
            return None
        return self.work.bytes / self.args.steps / seconds

    def time(self, call):
        """Seconds of call() on the device; nan in round 0, when self.work counts it."""
        if self.is_counted:
            with self.work:
                call()
            return math.nan
        if self.args.device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / 1000
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def time_parts(self, do, n):
        """Yields the seconds of do(0) to do(n - 1), each a part; on a GPU all in one, to sync only once."""
        if self.args.device.type == "cuda":
            yield self.time(lambda: [do(i) for i in range(n)])
        else:
            for i in range(n):
                yield self.time(functools.partial(do, i))

    def time_steps(self, step):
        """Run UNTIMED steps, then n = args.steps timed ones: yields seconds / n, whose sum is the mean."""
        for i in range(UNTIMED):
            step(i)
        skips = mindskips(self.model) if self.granularity else {}
        for skip in skips.values():
            if skip.scope == "token":           # leave the prompt out of the capacity (a CUDA graph adds its
                skip.opened = skip.seen = 0     # warm-up steps later, when it ends)
        yield 0.0                               # a pause: all variants get here before one is timed
        n = self.args.steps
        for seconds in self.time_parts(lambda i: step(UNTIMED + i), n):
            yield seconds / n

    def read_prompt(self, cache):
        """An iterator that reads the prompt a layer at a time; its last value: the next logits, (B, V)."""
        model = self.model.train(self.name == "masked")   # masked: compute all, then multiply
        ctx = model.context(self.idx, None, [self.context] * self.batch, cache)
        x = model.embed(self.idx)
        for layer in model.layers:
            x = layer(x, ctx)
            yield
        yield model.head(model.norm(x[:, -1]))

    @torch.no_grad()
    def prefill(self):
        cache = Cache(self.whole.config, self.context)
        reading = self.read_prompt(cache)
        yield from self.time_parts(lambda _: next(reading), len(self.model.layers) + 1)
        self.cache_bytes = cache.bytes()

    @torch.no_grad()
    def decode(self):
        model, cache = self.model, Cache(self.whole.config, self.context + UNTIMED + self.args.steps)
        *_, logits = self.read_prompt(cache)
        token = sample(logits)
        with stepper(model, cache, self.batch) as next_x:
            def step(i):
                nonlocal token
                x = next_x(token, [self.context + i] * self.batch)
                token = sample(model.head(model.norm(x)))
            yield from self.time_steps(step)
        self.cache_bytes = cache.bytes()

    def train(self):
        """One step on every token: of the routers (--loss), or of the whole model with its routers
        (cross-entropy)."""
        model, idx = self.model.train(), self.idx
        model.requires_grad_(self.name == "train_all")      # in each round: variants share these weights
        for skip in mindskips(model).values():
            skip.router.requires_grad_(True)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.0, fused=idx.device.type == "cuda")    # no temporaries
        samples = [Sample(row, [True] * self.context, min(64, self.context)) for row in idx.tolist()]
        batch = Batch.of(samples, idx.device)

        def step():
            if self.name == "train_routers":
                penalty = functools.partial(overall_penalty, model, 1.0, None)
                backward(model, batch, self.args.loss, 1 / len(batch.targets), penalty)
            else:
                ctx = model.context(batch.idx, batch.lengths)
                x = run_layers(model.layers, model.embed(batch.idx), ctx)
                logits = model.head(model.norm(x)[batch.scored])
                loss = F.cross_entropy(logits.float(), batch.targets)
                (loss + overall_penalty(model, 1.0, None)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        yield self.time(step)


class Transformers(Variant):
    """The same model in transformers, same weights' shapes, dtype and input."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        c, args = self.whole.config, self.args
        if hasattr(args, "theirs"):
            return
        try:
            from transformers import AutoModelForCausalLM, LlamaConfig
        except ImportError:
            raise InputError("--against transformers: not installed; pip install transformers") from None
        config = LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.intermediate,
            num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head,
            head_dim=c.head_dim, max_position_embeddings=c.max_context,
            tie_word_embeddings=c.tie_embeddings)
        with torch.device(args.device):
            args.theirs = AutoModelForCausalLM.from_config(config, dtype=args.dtype).eval()
        args.their_bytes = sum(parameter.nbytes for parameter in args.theirs.parameters())

    def run(self, round_):
        self.begin(round_)
        yield from getattr(self, self.phase)()

    @torch.no_grad()
    def prefill(self):
        yield self.time(lambda: self.args.theirs(self.idx, use_cache=True, logits_to_keep=1))

    @torch.no_grad()
    def decode(self):
        out = self.args.theirs(self.idx, use_cache=True, logits_to_keep=1)

        def step(i):
            nonlocal out
            token = sample(out.logits[:, -1])[:, None]
            out = self.args.theirs(token, past_key_values=out.past_key_values, use_cache=True)
        yield from self.time_steps(step)
