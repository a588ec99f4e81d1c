"""What skipping buys: time of prefill, decode and tuning, dense against routed, and what is possible.

    python bench.py                        # attn_sequence and attn_token at capacity 0.5
    python bench.py --device cuda --model llama3-8b --random-weights --context 512,2048,8192 --batch 1,8
    python bench.py --against transformers,masked

All variants run in turns, round after round, in one process, and medians are compared. `none` has every gate
closed: what it takes cannot be skipped, so the limit at routed capacity c is t_dense / (t_none + c (t_dense -
t_none)), and the efficiency of skipping is the measured speedup over that limit. Without --routers the open
gates are drawn at random, exactly as many as the capacity asks for; the routers' scores are computed all the
same.
"""
import argparse
import functools
import json
import math
import platform
import statistics
import time
from itertools import product

import torch
import torch.nn.functional as F

from model import Cache, Config, Llama, pick
from router import (
    GRANULARITIES,
    add_routers,
    capacity,
    capacity_loss,
    load_routers,
    parse_layers,
    remove_routers,
    routers,
)
from samples import Batch, Sample
from tokenizer import Tokenizer
from train_router import DEFAULT_DATA, backward, common_arguments, run_script
from weights import InputError, write_file

SHAPES = {
    "smollm2-135m": Config(30, 9, 3, 576, 1536, 49152, 64, 8192, rope_theta=1e5, tie_embeddings=True),
    "llama3.2-1b": Config(16, 32, 8, 2048, 8192, 128256, 64, 131072, rope_theta=5e5, tie_embeddings=True),
    "llama2-7b": Config(32, 32, 32, 4096, 11008, 32000, 128, 4096),
    "mistral-7b": Config(32, 32, 8, 4096, 14336, 32000, 128, 32768),
    "llama3-8b": Config(32, 32, 8, 4096, 14336, 128256, 128, 8192, rope_theta=5e5),
}
STEPS = 16      # tokens decoded in one measurement
FIELDS = ("phase", "variant", "granularity", "capacity", "batch", "context", "ms", "tokens_per_s", "speedup",
          "limit", "efficiency", "peak_bytes", "cache_bytes")


def random_model(config, device, dtype):
    """A Llama with random weights, made on its device in its dtype: right for timing, never for accuracy."""
    with torch.device("meta"):
        model = Llama(config)
    for name, p in list(model.named_parameters()):
        module, _, leaf = name.rpartition(".")
        w = torch.empty(p.shape, device=device, dtype=dtype)
        w = w.fill_(1) if p.dim() == 1 else w.normal_(0, 0.02)
        setattr(model.get_submodule(module), leaf, torch.nn.Parameter(w))
    if config.tie_embeddings:
        model.head.weight = model.embed.weight
    return model.eval()


@functools.cache
def pattern(shape, share, seed, device):
    """A random 0/1 tensor with exactly this share of ones."""
    n = math.prod(shape)
    ones = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:round(share * n)]
    return torch.zeros(n).index_fill(0, ones, 1.0).view(shape).to(device)


def force(model, share, seed):
    """Open exactly this share of the gates, at random; their scores are computed, then replaced.

    At token level every step of decoding has a pattern of its own. Patterns are made in the warm-up and kept.
    """
    gates = list(routers(model).values())

    def replace(gate, layer):
        def score(h, ctx):
            real = type(gate).score(gate, h, ctx)
            step = ctx.first[0] if gate.scope == "token" else 0
            wanted = pattern((len(gates), *real.shape), share, seed + step, real.device)[layer]
            return wanted + (real - real.detach())       # with the score's gradient
        gate.score = score
    for layer, gate in enumerate(gates):
        replace(gate, layer)


class Variant:
    """One way to run the model on one input: `run()` does it once and returns its seconds."""

    def __init__(self, model, args, phase, name, batch, context, granularity=None, share=None):
        self.model, self.args, self.phase, self.name = model, args, phase, name
        self.batch, self.context, self.granularity, self.share = batch, context, granularity, share
        self.times, self.cache_bytes, self.peak, self.capacity = [], None, None, None

    def run(self):
        model, cuda = self.model, self.args.device.type == "cuda"
        remove_routers(model)
        model.requires_grad_(False).eval()
        if self.granularity and self.args.routers:
            load_routers(model, self.args.routers)
        elif self.granularity:
            add_routers(model, self.granularity, self.args.layers)
            force(model, self.share, self.args.seed)
        if self.name == "train_all":
            model.requires_grad_(True)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = getattr(self, self.phase)()
        if self.granularity:
            self.capacity = capacity(model)
            self.share = capacity(model, routed=True)
        if cuda:
            self.peak = torch.cuda.max_memory_allocated()
        return seconds

    def time(self, work):
        """Seconds that `work` takes on the device."""
        if self.args.device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / 1000
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def first_token(self, idx, cache):
        """Read the prompt and compute the logits of the first new token, (B, V)."""
        model = self.model.train(self.name == "masked")   # masked: compute all, then multiply
        ctx = model.context(idx, None, [self.context] * self.batch, cache)
        return model.head(model.norm(model.run(model.embed(idx), ctx)[:, -1]))

    @torch.no_grad()
    def prefill(self):
        idx, cache = self.args.text[:self.batch, :self.context], Cache(self.model.config, self.context)
        seconds = self.time(lambda: self.first_token(idx, cache))
        self.cache_bytes = cache.bytes()
        return seconds

    @torch.no_grad()
    def decode(self):
        model, idx = self.model, self.args.text[:self.batch, :self.context]
        cache = Cache(model.config, self.context + STEPS)
        token = self.first_token(idx, cache).argmax(-1)

        def steps(token):
            for i in range(STEPS):
                ctx = model.step_context(cache, [self.context + i] * self.batch, token.device)
                x = model.run(model.embed(token[:, None]), ctx)
                token = model.head(model.norm(x[:, 0])).argmax(-1)
        seconds = self.time(lambda: steps(token))
        self.cache_bytes = cache.bytes()
        return seconds / STEPS

    def train(self):
        """One step, cross-entropy on every token: of the routers only, or of the whole model with its
        routers."""
        model, idx = self.model.train(), self.args.text[:self.batch, :self.context]
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
        samples = [Sample(row, [True] * self.context, min(64, self.context)) for row in idx.tolist()]
        batch = Batch.of(samples, idx.device)

        def step():
            if self.name == "train_routers":
                backward(model, batch, "ce", 1 / len(batch.targets), 0.0, 1.0)
            else:
                logits = model.head(model.features(batch.idx, batch.lengths)[batch.scored])
                (F.cross_entropy(logits.float(), batch.targets) + capacity_loss(model, 0.0)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return self.time(step)


class Transformers(Variant):
    """The same model in transformers, same weights' shapes, dtype and input."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        try:
            from transformers import AutoModelForCausalLM, LlamaConfig
        except ImportError:
            raise InputError("--against transformers: not installed; pip install transformers") from None
        c, args = self.model.config, self.args
        if not hasattr(args, "theirs"):
            config = LlamaConfig(
                vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.intermediate,
                num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head,
                head_dim=c.head_dim, max_position_embeddings=c.max_context,
                tie_word_embeddings=c.tie_embeddings)
            with torch.device(args.device):
                args.theirs = AutoModelForCausalLM.from_config(config, dtype=args.dtype).eval()

    def run(self):
        return getattr(self, self.phase)()

    @torch.no_grad()
    def prefill(self):
        idx = self.args.text[:self.batch, :self.context]
        return self.time(lambda: self.args.theirs(idx, use_cache=True, logits_to_keep=1))

    @torch.no_grad()
    def decode(self):
        idx = self.args.text[:self.batch, :self.context]
        out = self.args.theirs(idx, use_cache=True, logits_to_keep=1)

        def steps(out):
            for _ in range(STEPS):
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                out = self.args.theirs(token, past_key_values=out.past_key_values, use_cache=True)
        return self.time(lambda: steps(out)) / STEPS


def variants(model, args, phase, batch, context):
    """What is to be compared for one phase, batch and context; the first is what the others are compared
    with."""
    def make(name, granularity=None, share=None, kind=Variant):
        return kind(model, args, phase, name, batch, context, granularity, share)
    n, routed_layers = model.config.n_layer, len(parse_layers(args.layers, model.config.n_layer))
    shares = [(c * n - (n - routed_layers)) / routed_layers for c in args.capacity]
    if min(shares) < 0:
        raise InputError(f"--capacity {min(args.capacity)}: {n - routed_layers} of {n} layers have no router"
                         f" and always run; give at least {1 - routed_layers / n:.3f}, or more --layers")
    if phase == "train":
        return [make("train_all", args.granularity[0], 0.5), make("train_routers", args.granularity[0], 0.5)]
    found = [make("dense")]
    for granularity in args.granularity:
        found.append(make("none", granularity, 0.0))
        found += [make("routed", granularity, share) for share in shares]
        if "masked" in args.against and phase == "prefill":
            found.append(make("masked", granularity, shares[0]))
    if "transformers" in args.against:
        found.append(make("transformers", kind=Transformers))
    return found


def measure(model, args, phase, batch, context):
    """Run the variants in turns; returns a row (dict with FIELDS) for each."""
    found = variants(model, args, phase, batch, context)
    for round_ in range(args.rounds + 1):
        for v in found:
            seconds = v.run()
            if round_:                       # the first is a warm-up
                v.times.append(seconds)
    base = statistics.median(found[0].times)
    none = {v.granularity: statistics.median(v.times) for v in found if v.name == "none"}
    rows = []
    for v in found:
        ms, (low, _, high) = statistics.median(v.times), statistics.quantiles(v.times, n=4)
        row = dict.fromkeys(FIELDS) | {
            "phase": phase, "variant": v.name, "granularity": v.granularity, "capacity": v.capacity,
            "batch": batch, "context": context, "ms": 1000 * ms, "speedup": base / ms,
            "tokens_per_s": batch * (1 if phase == "decode" else context) / ms,
            "peak_bytes": v.peak, "cache_bytes": v.cache_bytes, "spread": (high - low) / ms}
        if v.name == "routed":
            row["limit"] = base / (none[v.granularity] + v.share * (base - none[v.granularity]))
            row["efficiency"] = row["speedup"] / row["limit"]
        rows.append(row)
    return rows


def numbers(kind, low, high=math.inf):
    """An argparse type: a comma-separated list of numbers, each from low to high."""
    def parse(text):
        try:
            values = [kind(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: give numbers, separated by commas") from None
        if not all(low <= value <= high for value in values):
            raise argparse.ArgumentTypeError(f"{text!r}: give numbers from {low} to {high}")
        return values
    return parse


def choices(known):
    """An argparse type: a comma-separated list of words."""
    def parse(text):
        words = text.split(",") if text else []
        for word in words:
            if word not in known:
                raise argparse.ArgumentTypeError(f"{word!r}: choose from {', '.join(known)}")
        return words
    return parse


def show(rows):
    """Print rows as a table; ~ marks a speedup that is smaller than the spread of its measurements."""
    print(f"\n{'phase':>8}{'batch':>6}{'context':>8} {'variant':13}{'granularity':15}{'capacity':>8}"
          f"{'ms':>10}{'tokens/s':>10}{'spread':>8}{'speedup':>8} {'limit':>7}"
          f"{'efficiency':>11}{'cache MiB':>10}")
    for r in rows:
        def f(key, form, r=r):
            return "" if r[key] is None else format(r[key], form)
        noise = "~" if abs(r["speedup"] - 1) < r["spread"] and r["speedup"] != 1 else " "
        cache = "" if r["cache_bytes"] is None else f"{r['cache_bytes'] / 2**20:.1f}"
        print(f"{r['phase']:>8}{r['batch']:6d}{r['context']:8d} {r['variant']:13}{r['granularity'] or '':15}"
              f"{f('capacity', '.3f'):>8}{r['ms']:10.2f}{r['tokens_per_s']:10.1f}{r['spread']:8.3f}"
              f"{r['speedup']:8.3f}{noise}{f('limit', '.3f'):>7}{f('efficiency', '.3f'):>11}{cache:>10}")


def machine(args):
    """Where this was measured."""
    name = torch.cuda.get_device_name() if args.device.type == "cuda" else platform.machine()
    if args.device.type == "cpu" and platform.system() == "Linux":
        with open("/proc/cpuinfo") as f:
            name = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), name)
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "python": platform.python_version(), "dtype": str(args.dtype).removeprefix("torch."),
            "model": args.model}


def main():
    p = common_arguments(argparse.ArgumentParser(description=__doc__.split("\n")[0]))
    p.add_argument("--phase", type=choices(("prefill", "decode", "train")), default=["prefill", "decode"])
    p.add_argument("--batch", type=numbers(int, 1), default=[1])
    p.add_argument("--context", type=numbers(int, 2), default=[512])
    p.add_argument("--capacity", type=numbers(float, 0, 1), default=[0.5], help="overall, one or several")
    p.add_argument("--granularity", type=choices(GRANULARITIES), default=["attn_sequence", "attn_token"])
    p.add_argument("--layers", default="all", help="which layers have a gate")
    p.add_argument("--routers", help="a router file: its decisions on real text instead of random ones")
    p.add_argument("--random-weights", action="store_true", help=f"for the shapes {', '.join(SHAPES)}")
    p.add_argument("--against", type=choices(("transformers", "masked")), default=[])
    p.add_argument("--rounds", type=numbers(int, 2), default=[7], help="measurements of each variant")
    p.add_argument("--json", help="write the table there, with the machine's name")
    args = p.parse_args()
    args.rounds = args.rounds[0]
    args.device, args.dtype = pick(args.device, args.dtype)
    torch.manual_seed(args.seed)
    if args.random_weights:
        if args.model not in SHAPES:
            raise InputError(f"--random-weights: {args.model} is not one of {', '.join(SHAPES)}")
        model = random_model(SHAPES[args.model], args.device, args.dtype)
    else:
        model = Llama.from_pretrained(args.model, args.device, args.dtype)
    longest = max(args.context) + (STEPS if "decode" in args.phase else 0)
    if longest > model.config.max_context:
        raise InputError(f"--context {max(args.context)}: {longest} tokens do not fit the model's context of"
                         f" {model.config.max_context}")
    if args.routers:
        args.granularity = [load_routers(model, args.routers)["granularity"]]
        ids = Tokenizer.from_pretrained(args.model).encode(DEFAULT_DATA.read_text("utf-8"))
    else:
        ids = torch.randint(0, model.config.vocab_size, (max(args.batch) * max(args.context),)).tolist()
    n = max(args.batch) * max(args.context)
    args.text = torch.tensor((ids * (n // len(ids) + 1))[:n], device=args.device).view(-1, max(args.context))
    rows = []
    for phase, batch, context in product(args.phase, args.batch, args.context):
        these = measure(model, args, phase, batch, context)
        show(these)
        rows += these
    if args.json:
        table = {"machine": machine(args), "rows": [{key: row[key] for key in FIELDS} for row in rows]}
        write_file(args.json, json.dumps(table, indent=1).encode())
    print("\n" + ", ".join(f"{key} {value}" for key, value in machine(args).items()))


if __name__ == "__main__":
    run_script("bench.py", main)
