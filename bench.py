"""What skipping buys: time and memory of prefill, decode and tuning, dense against routed, and the limit.

    python bench.py                        # attn_sequence and attn_token at capacity 0.5
    python bench.py --device cuda --model llama3.1-8b --random-weights --context 512,2048,8192
    python bench.py --against transformers,masked
    python bench.py --phase train --layers last:15

All variants run in turns, round after round, in one process (timing.py), and medians are compared; on a CPU
they take turns at every layer of a prompt and every step of decoding, where memory holds all their caches.
Without --routers the open gates are drawn at random, exactly as many as the capacity asks for; the routers'
scores are computed all the same. With it each round reads texts of its own, and capacity is the mean.

    none         every gate closed: what this takes cannot be skipped
    limit        at routed capacity c: t_dense / (t_none + c (t_dense - t_none))
    efficiency   of skipping: the measured speedup over the limit
    of peak      in decode, bytes of weights, keys and values read per second, over the memory's rate; else
                 operations per second, over the rate of one large product. Rates are measured at the start,
                 or the dense model's own where it is higher; round 0, not timed, counts bytes and operations
    peak MiB     weights included; on a CPU each variant is run once more for it, in a process of its own
"""
from support.script import run_script  # isort: skip (must come before torch)

import copy
import functools
import json
import math
import multiprocessing
import os
import platform
import random
import statistics
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from itertools import product, zip_longest
from pathlib import Path

import torch

from losses import LOSSES
from model import Config, Llama
from router import GRANULARITIES, KV_OPEN, load_routers, remove_routers, routed_share
from support.cli import check_reachable, common_arguments, destination, number, numbers, parse_layers, words
from support.cuda import plain_kernels
from support.data import DEFAULT_DATA, read_samples
from support.files import InputError, check_destinations, write_file
from support.machine import device_and_dtype, device_name, rates
from support.memory import bench_bytes, free_bytes, linux_bytes, weight_bytes
from support.run import routers_entry, warn_if_unfinished
from timing import SHAPES, UNTIMED, Transformers, Variant, random_model
from tokenizer import Tokenizer
from weights import open_checkpoint

FIELDS = ("phase", "variant", "granularity", "capacity", "batch", "context", "ms", "tokens_per_s", "speedup",
          "limit", "efficiency", "of_peak", "peak_bytes", "cache_bytes")


def make_variants(model, args, phase, batch, context):
    """What is compared for one phase, batch and context: the first one with all others."""
    def make(name, granularity=None, asked=None, n_removed=0, kind=Variant):
        return kind(model, args, phase, name, batch, context, granularity, asked, n_removed)
    asked = args.capacity or [None]                                       # None: as the router file has it
    if not args.routers:
        n, gates = model.config.n_layer, len(parse_layers(args.layers, model.config.n_layer))
        asked = [routed_share(c, gates, n) for c in args.capacity or [0.5]]
    if phase == "train":
        return [make(name, args.granularity[0], asked[0]) for name in ("train_all", "train_routers")]
    variants = [make("dense")]
    for granularity in args.granularity:
        variants.append(make("none", granularity, None if args.routers else 0.0))
        variants += [make("routed", granularity, c) for c in asked]
        if "masked" in args.against and phase == "prefill":
            variants.append(make("masked", granularity, asked[0]))
    variants += [make("static", n_removed=n) for n in args.static]
    if "transformers" in args.against:
        variants.append(make("transformers", kind=Transformers))
    return variants


def compare(model, args, phase, batch, context):
    """Run the variants in turns; returns a row (dict with FIELDS, and more for the screen) for each."""
    variants = make_variants(model, args, phase, batch, context)
    groups = [[v] for v in variants]
    if can_take_turns(model.config, args, phase, batch * context, len(variants)):
        groups = [variants]
    for round_ in range(args.rounds + 2):            # round 0 counts the work, round 1 warms up
        with plain_kernels() if round_ == 0 else nullcontext():
            for group in groups:
                order = random.Random(round_).sample(group, len(group))      # whom one follows makes 2 %
                run_once(order, round_)
    for v in variants:
        del v.times[:2], v.results[:2]
    dense = variants[0].times
    none = {v.granularity: v.times for v in variants if v.name == "none"}
    rows = []
    for i, v in enumerate(variants):
        if args.device.type == "cpu" and v.name != "transformers":
            v.peak = peak_in_child(args, phase, batch, context, i)
        seconds = statistics.median(v.times)
        if v.granularity and phase != "train":                # what is open depends on each round's text
            v.capacity, _, v.cache_bytes = (statistics.fmean(values) for values in zip(*v.results))
        speedups = [d / t for d, t in zip(dense, v.times)]               # each within one round
        relative = [t / seconds for t in v.times] if i == 0 else speedups
        low, _, high = statistics.quantiles(relative, n=4)
        row = dict.fromkeys(FIELDS) | {
            "phase": phase, "variant": v.name, "granularity": v.granularity, "capacity": v.capacity,
            "batch": batch, "context": context, "ms": 1000 * seconds, "speedup": statistics.median(speedups),
            "tokens_per_s": batch * (1 if phase == "decode" else context) / seconds,
            "peak_bytes": v.peak, "cache_bytes": v.cache_bytes, "interval": None,
            "spread": high - low}
        if v.name == "routed":
            capacities = [routed_capacity for _, routed_capacity, _ in v.results]
            least = [n + c * (d - n) for d, n, c in zip(dense, none[v.granularity], capacities)]
            row["limit"] = statistics.median(d / t for d, t in zip(dense, least))
            row["efficiency"] = row["speedup"] / row["limit"]
            row["interval"] = interval([best / t for best, t in zip(least, v.times)])
        bound = "bandwidth" if phase == "decode" else "flops"            # the machine's rate that limits v
        rate = v.rate(seconds)
        if v.name == "dense":                   # the machine may have been busy when its rate was measured
            setattr(args, bound, max(getattr(args, bound), rate))
        if rate is not None:
            row["of_peak"] = min(1.0, rate / getattr(args, bound))
        rows.append(row)
    return rows


def can_take_turns(config, args, phase, n_tokens, n_variants):
    """Whether all variants take turns at each layer or step, so that a disturbance of the machine slows all:
    on a CPU, if half of the free memory holds their caches and peak_in_child's model."""
    weights = weight_bytes(config, args.dtype)
    each = bench_bytes(config, args.device, args.dtype, n_tokens, [phase]) - weights
    fits = not args.free_bytes or weights + n_variants * each < args.free_bytes / 2
    return args.device.type == "cpu" and phase != "train" and fits


def run_once(variants, round_):
    """Run variants once, part by part in turns where they are several."""
    parts = zip_longest(*(v.run(round_) for v in variants), fillvalue=0.0)      # zip would let some not end
    for v, seconds in zip(variants, zip(*parts)):
        v.times.append(sum(seconds))
        v.results.append((v.capacity, v.routed_capacity, v.cache_bytes))


def interval(values):
    """The 95 % confidence interval of the median, from the order of the values; None of fewer than 6."""
    if len(values) < 6:
        return None
    values, n = sorted(values), len(values)
    k = max(0, int((n - 1) / 2 - 0.98 * math.sqrt(n)))                   # 0.98 = 1.96 / 2: the sign test's
    return values[k], values[-1 - k]


# ----------------------------------------------------------------------------------------------------- memory
@functools.cache
def forkserver():
    """Starts processes that have torch imported already; they import from this file's folder."""
    folders = str(Path(__file__).parent), os.environ.get("PYTHONPATH")
    os.environ.update(PYTHONSAFEPATH="1", PYTHONPATH=os.pathsep.join(filter(None, folders)))
    start = multiprocessing.get_context("forkserver")
    # script first: it quiets Ctrl-C; torch._dynamo, which optimizers import, would count as 160 MB of a step
    start.set_forkserver_preload(["support.script", "losses", "torch._dynamo"])
    return start


def peak_in_child(args, phase, batch, context, i):
    """Peak memory in bytes of variant i in a process of its own, weights included; None where the system does
    not tell, or has too little for a second model."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    args = copy.copy(args)
    args.theirs = None
    with ProcessPoolExecutor(1, forkserver()) as pool:
        try:
            return pool.submit(peak_here, args, phase, batch, context, i).result()
        except BrokenProcessPool:                           # the system killed it
            return None


def peak_here(args, phase, batch, context, i):
    """What peak_in_child measures, in this process."""
    before = linux_bytes("VmRSS")
    v = make_variants(make_model(args), args, phase, batch, context)[i]
    Path("/proc/self/clear_refs").write_text("5")           # forget the peak of loading
    run_once([v], round_=1)
    return linux_bytes("VmHWM") - before


def check_fit(config, args):
    """InputError, before anything is allocated, where the model or the context will not fit, or transformers'
    plain Llama is no match for the model."""
    is_plain = not (config.qkv_bias or config.qk_norm or config.no_rope or config.sliding_window)
    if "transformers" in args.against and not is_plain:
        raise InputError("--against transformers: builds a plain Llama, which this model is not; leave it"
                         " out")
    there, need = free_bytes(args.device), needed(config, args)
    if there and need > there:
        raise InputError(f"{args.model}, batch {max(args.batch)}, context {max(args.context)}: needs about"
                         f" {need / 2**30:.1f} GiB, and {there / 2**30:.1f} GiB are free; lower --batch or"
                         " --context, or choose a smaller --model")


def needed(config, args):
    n_tokens = max(args.batch) * (max(args.context) + UNTIMED + args.steps)
    other_models = int("transformers" in args.against) + int(args.device.type == "cpu")      # peak_in_child's
    return (other_models * weight_bytes(config, args.dtype)
            + bench_bytes(config, args.device, args.dtype, n_tokens, args.phase))


# ----------------------------------------------------------------------------------------------------- script
def show(rows):
    """Print rows as a table; ~ marks a speedup that is smaller than the spread of its measurements."""
    print(f"\n{'phase':>8}{'batch':>6}{'context':>8} {'variant':14}{'granularity':15}{'capacity':>8}"
          f"{'ms':>10}{'tokens/s':>10}{'spread':>8}{'speedup':>8} {'limit':>7}{'efficiency':>11}{'95 %':>14}"
          f"{'of peak':>8}{'peak MiB':>9}{'cache MiB':>10}")
    for r in rows:
        def cell(key, form, r=r, unit=1):
            return "" if r[key] is None else format(r[key] / unit, form)
        between = "{:.3f}-{:.3f}".format(*r["interval"]) if r["interval"] else ""
        noise = "~" if abs(r["speedup"] - 1) < r["spread"] and r["speedup"] != 1 else " "
        print(f"{r['phase']:>8}{r['batch']:6d}{r['context']:8d} {r['variant']:14}{r['granularity'] or '':15}"
              f"{cell('capacity', '.3f'):>8}{r['ms']:10.2f}{r['tokens_per_s']:10.1f}{r['spread']:8.3f}"
              f"{r['speedup']:8.3f}{noise}{cell('limit', '.3f'):>7}{cell('efficiency', '.3f'):>11}"
              f"{between:>14}{cell('of_peak', '.2f'):>8}{cell('peak_bytes', '.0f', unit=2**20):>9}"
              f"{cell('cache_bytes', '.1f', unit=2**20):>10}", flush=True)


def machine(args):
    """Where this was measured."""
    return {"device": device_name(args.device), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "python": platform.python_version(),
            "dtype": str(args.dtype).removeprefix("torch."), "model": args.model, "kv": args.kv,
            "routers": args.routers_entry,
            "gb_per_s": round(args.bandwidth / 1e9, 1), "tflop_per_s": round(args.flops / 1e12, 2)}


def make_model(args):
    if args.random_weights:
        return random_model(SHAPES[args.model], args.device, args.dtype)
    return Llama.from_pretrained(args.model, args.device, args.dtype)


def choose_model(args):
    """Where none is given: on CUDA the largest shape that fits, with random weights; else smollm2-135m."""
    args.model = "smollm2-135m"
    if args.device.type == "cuda" and not args.routers:
        args.random_weights = True
        longest = longest_text(args)
        fit = [name for name, config in SHAPES.items() if longest <= config.max_context
               and needed(config, args) < free_bytes(args.device)]
        args.model = max(fit, key=lambda name: weight_bytes(SHAPES[name], args.dtype), default=args.model)


def longest_text(args):
    """Tokens of the longest row."""
    return max(args.context) + (UNTIMED + args.steps if "decode" in args.phase else 0)


def parse_arguments():
    p = common_arguments(__doc__)
    p.set_defaults(model=None)
    p.add_argument("--phase", type=words(("prefill", "decode", "train")), default=["prefill", "decode"],
                   help="reading a prompt, one more token after it (both are the default), a tuning step; the"
                        " last for the first --granularity and --capacity alone")
    p.add_argument("--batch", type=numbers(int, 1), default=[1], help="rows, one number or several")
    p.add_argument("--context", type=numbers(int, 2), default=[512], help="tokens per row, one or several")
    p.add_argument("--capacity", type=numbers(float, 0, 1),
                   help="overall, one or several (default: 0.5, or what the --routers were tuned for)")
    p.add_argument("--granularity", type=words(GRANULARITIES), help=f"of {', '.join(GRANULARITIES)}"
                   " (default: attn_sequence,attn_token)")
    p.add_argument("--layers", help="which layers have a gate: all (the default), last:16, 2-29 or 3,5,9")
    p.add_argument("--kv", choices=("all", "open"),
                   help="which tokens have keys and values at token level (default: all)")
    p.add_argument("--routers", help="a router file: its gates, and their decisions on real text")
    p.add_argument("--static", type=numbers(int, 1), default=[], metavar="N",
                   help="also without N attentions, evenly spaced, and without routers; one N or several;"
                        " not of --phase train")
    p.add_argument("--random-weights", action="store_true",
                   help=f"for the shapes {', '.join(SHAPES)}; the default on CUDA, without --model and"
                        " --routers, for the largest that fits")
    p.add_argument("--against", type=words(("transformers", "masked")), default=[],
                   help="also transformers, or all computed and then multiplied by the gates")
    p.add_argument("--loss", choices=LOSSES, help="of a router-tuning step (default: ce)")
    p.add_argument("--rounds", type=number(int, 2), default=7, help="measurements of each variant")
    p.add_argument("--steps", type=number(int, 1), help="tokens decoded in one measurement (default: 16)")
    p.add_argument("--json", type=destination, help="write the table there, with the machine's name")
    args = p.parse_args()
    for flag in "granularity", "layers", "kv":
        if args.routers and getattr(args, flag) is not None:
            raise InputError(f"--{flag}: --routers has gates of its own; leave one of the two out")
    if args.routers and args.random_weights:
        raise InputError("--routers: they were tuned for a model's own weights; leave out --random-weights")
    if args.loss and "train" not in args.phase:
        raise InputError("--loss: only of --phase train")
    if args.steps and "decode" not in args.phase:
        raise InputError("--steps: only of --phase decode")
    if args.granularity is None:
        args.granularity = ["attn_sequence", "attn_token"]
    if args.kv == "open" and not {*KV_OPEN} & {*args.granularity}:
        raise InputError(f"--kv open: only for {' and '.join(KV_OPEN)}; add one to --granularity")
    if args.kv == "open" and "train" in args.phase and args.granularity[0] not in KV_OPEN:
        raise InputError("--kv open: --phase train times the first --granularity alone; put attn_token first")
    if args.static and args.phase == ["train"]:
        raise InputError("--static: not of --phase train, which has nothing to tune without routers")
    if "transformers" in args.against and args.phase == ["train"]:
        raise InputError("--against transformers: not of --phase train; it reads prompts and decodes")
    if "masked" in args.against and "prefill" not in args.phase:
        raise InputError("--against masked: only of --phase prefill, where all can be computed at once")
    args.layers, args.kv, args.loss = args.layers or "all", args.kv or "all", args.loss or "ce"
    args.steps = args.steps or 16
    check_destinations(args.json, read=(args.routers, args.model))
    args.device, args.dtype = device_and_dtype(args.device, args.dtype)
    if args.model is None:
        choose_model(args)
    if args.random_weights and args.model not in SHAPES:
        raise InputError(f"--random-weights: {args.model} is not one of {', '.join(SHAPES)}")
    return args


def save(rows, args):
    """Write --json: what has been measured so far."""
    if args.json:
        table = {"machine": machine(args), "rows": [{key: row[key] for key in FIELDS} for row in rows]}
        write_file(args.json, json.dumps(table).encode())


def main():
    args = parse_arguments()
    torch.manual_seed(args.seed)
    config = SHAPES.get(args.model)
    if not args.random_weights:
        checkpoint = open_checkpoint(args.model)
        config = Config.from_hf(checkpoint.config, checkpoint.path)
    if max(args.static, default=0) > config.n_layer:
        raise InputError(f"--static {max(args.static)}: this model has {config.n_layer} layers; give fewer")
    if not args.routers:
        n_gates = len(parse_layers(args.layers, config.n_layer))
        check_reachable(min(args.capacity or [0.5]), n_gates, config.n_layer)
    longest = longest_text(args)
    if longest > config.max_context:
        raise InputError(f"--context {max(args.context)}: {longest} tokens, with the decoded ones, do not fit"
                         f" the model's context of {config.max_context}; lower it")
    check_fit(config, args)
    args.bandwidth, args.flops = rates(args.device, args.dtype)          # before the model takes its memory
    model, n = make_model(args), max(args.batch) * max(args.context)
    args.free_bytes = free_bytes(args.device)
    args.routers_entry = None
    if args.routers:
        meta = load_routers(model, args.routers)
        warn_if_unfinished(args.routers, meta)
        args.routers_entry = routers_entry(args.routers, meta)
        remove_routers(model)                                    # each Variant has its own
        args.granularity, args.kv = [meta["granularity"]], meta["kv"]
        samples, _ = read_samples(DEFAULT_DATA, Tokenizer.from_pretrained(args.model), config.max_context)
        ids = [i for s in samples for i in s.ids]
        if not ids:
            raise InputError(f"{DEFAULT_DATA}: no sample has an answer within the model's context of"
                             f" {config.max_context}; leave out --routers")
    else:
        ids = torch.randint(0, config.vocab_size, (n,)).tolist()
    n = max(n, len(ids) // max(args.context) * max(args.context))
    args.text = torch.tensor((ids * (n // len(ids) + 1))[:n], device=args.device).view(-1, max(args.context))
    rows = []
    for phase, batch, context in product(args.phase, args.batch, args.context):
        these = compare(model, args, phase, batch, context)
        rows += these
        save(rows, args)
        show(these)
    print("\n~: within the spread of the measurements; 95 %: interval of the efficiency's median")
    if args.kv == "open":
        print("kv open: scores fall with the square of the open share, so efficiency may exceed 1")
    if args.routers:
        print("capacity: mean over the rounds' texts; what --capacity asks for was calibrated on other text")
    print(", ".join(f"{key} {value}" for key, value in machine(args).items() if key != "routers"))


if __name__ == "__main__":
    run_script("bench.py", main)
