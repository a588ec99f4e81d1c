"""Accuracy on benchmarks and perplexity of text as lm-evaluation-harness has them, dense beside routed.

    python eval.py                             # the questions and the text in data/: no benchmark
    python eval.py --routers routers/smollm2-135m.attn_token.safetensors --capacity 0.85,0.73 --static 4,8
    python eval.py --tasks piqa,arc_challenge --data-dir benchmarks --limit 100 --json scores.json

A question's choices are scored by their log-likelihood after its context; acc takes the likeliest, acc_norm
the likeliest per character. In GSM8K the model writes its answer, and the number at its end counts. Prompts,
splits and metrics are lm-evaluation-harness 0.4's, few-shot examples the first K of the training split.
scoring.py computes the answers.
"""
from support.script import run_script  # isort: skip (must come before torch)

import json
import math
import os
import time
from functools import partial
from itertools import islice

import torch
from tqdm import tqdm

import harm
from model import Llama
from router import add_routers, close_all, load_routers, mindskips, remove_routers
from scoring import TOKENS, Usage, answer, evaluate, perplexity
from skipping import real_tokens
from support import parallel
from support.batches import Batch, batches, pack
from support.cli import common_arguments, destination, number, numbers
from support.data import DEFAULT_DATA, HELD_OUT, PLAIN_PIECE, PLAIN_PROMPT, read_samples
from support.files import InputError, check_destinations, write_file
from support.machine import device_and_dtype
from support.run import check_same_data, routers_entry, warn_if_unfinished, weights_hash
from support.tasks import QUESTIONS, TASKS, read_task, standard_error
from tokenizer import Tokenizer

STATIC_BATCHES, STATIC_TOKENS = 8, 1024         # what the layers of --static are chosen on


# --------------------------------------------------------------------------------------------------- variants
def layers_by_harm(model, samples, seed):
    """All layers, least harm first: the KL that closing a layer's attention alone adds on `samples`."""
    add_routers(model, "attn_token")                                       # all open
    groups = islice(batches(samples, STATIC_TOKENS, seed), STATIC_BATCHES)
    total = 0                                                              # (n_layer,)
    for group in tqdm(groups, "harm of each layer", STATIC_BATCHES, unit="batch", leave=False):
        total = total + harm.measure(model, Batch.of(group, model.embed.weight.device))[0].sum(0)
    return total.argsort().tolist()


def override_real(model, function):
    """Replace every gate's scores by function(layer, scores (n,)): those of real tokens, or of sequences."""
    def override(layer, score, ctx):
        real = real_tokens(score, ctx) if score.dim() == 2 else torch.ones_like(score, dtype=torch.bool)
        score[real] = function(layer, score[real])
        return score
    for layer, skip in mindskips(model).items():
        skip.override = partial(override, layer)


class Shuffle:
    """The routed model's scores on a whole text or task, recorded layer by layer, then replayed for other
    tokens or sequences, in random order: each layer opens as many gates as before."""

    def __init__(self, seed):
        self.rng, self.recorded = torch.Generator().manual_seed(seed), {}

    def record(self, layer, scores):
        self.recorded.setdefault(layer, []).append(scores)
        return scores

    def mix(self):
        for layer, scores in self.recorded.items():
            scores = torch.cat(scores)
            self.recorded[layer] = scores[torch.randperm(len(scores), generator=self.rng).to(scores.device)]

    def replay(self, layer, scores):
        replayed, self.recorded[layer] = self.recorded[layer].tensor_split([len(scores)])
        return replayed


def named(name, values):
    """{name: the value} of one value; of several {"name value": each}."""
    return {name: values[0]} if len(values) == 1 else {f"{name} {value}": value for value in values}


def make_variants(model, tok, args):
    """{name: a function that turns the model into this variant}; the first is the dense model."""
    setters = {"dense": lambda: remove_routers(model)}
    settings = {f"--{key.replace('_', '-')}": value for key, value in vars(args).items()}
    settings["weights of hash"] = weights_hash(model)
    if args.routers:
        for name, capacity in named("routed", args.capacity).items():
            setters[name] = partial(load_routers, model, args.routers, capacity)
        metas = [setters[name]() for name in setters if name != "dense"]         # refuses a bad file early
        warn_if_unfinished(args.routers, metas[0])
        args.routers_entry = routers_entry(args.routers, metas[0])
        settings["routers of hash"] = args.routers_entry["hash"]
    parallel.check_same(settings)
    if args.static:
        n_layer = model.config.n_layer
        if max(args.static) > n_layer:
            raise InputError(f"--static {max(args.static)}: this model has {n_layer} layers; give fewer")
        samples, _ = read_samples(args.static_data, tok, min(STATIC_TOKENS, model.config.max_context))
        if not samples:
            raise InputError(f"--static-data {args.static_data}: no sample has an answer; give another file")
        ranked = layers_by_harm(model, samples[:-HELD_OUT] or samples, args.seed)
        parallel.check_same({"attentions of least harm": ranked})

        def static(layers):
            add_routers(model, "attn_token", layers)
            for skip in mindskips(model).values():
                skip.override = close_all
        for name, n in named("static", args.static).items():
            layers = ",".join(map(str, sorted(ranked[:n])))
            setters[name] = partial(static, layers)
            print(f"{name}: the model without the attention of {layers}, of least harm on {args.static_data}")
    return setters


def with_shuffled(setters, model, seed):
    """The variants, and "shuffled": each layer's decisions of the routed one, for other tokens."""
    shuffle, load = Shuffle(seed), setters["routed"]

    def routed():
        load()
        shuffle.recorded.clear()
        override_real(model, shuffle.record)

    def shuffled():
        load()
        shuffle.mix()
        override_real(model, shuffle.replay)
    return setters | {"routed": routed, "shuffled": shuffled}


# ----------------------------------------------------------------------------------------------------- script
class Result:
    """What one variant did: its scores by task, its result on the text, how often each layer ran."""

    def __init__(self, model):
        self.tasks, self.text, self.keep, self.usage = {}, None, {}, Usage(model)

    def entry(self):
        """As the JSON file has it."""
        capacity = self.usage.summary()["capacity"] if self.tasks else self.text["capacity"]
        tasks = {name: scores.entry() for name, scores in self.tasks.items()}
        return {"tasks": tasks, "capacity": capacity, "text": self.text, "keep": self.keep}


def save(results, args):
    """Write --json: the entry of the (first) routed model, or of the dense one where none has run, with those
    of the other variants that have."""
    if args.json:                                    # all processes make it, the first writes it
        entries = {variant: result.entry() for variant, result in results.items() if result.keep}
        name = next((v for v in entries if v.startswith("routed")), "dense")
        first = entries.pop(name)
        entries |= {"routers": args.routers_entry} if name != "dense" else {}
        if parallel.is_first():
            write_file(args.json, json.dumps(first | entries, allow_nan=False).encode())


def check_finite(values, what, variant):
    """InputError where a score is not finite."""
    if not all(map(math.isfinite, values)):
        raise InputError(f"{what}: scores of the {variant} model are not finite; use --dtype float32, or"
                         " another model")


def plus_minus(value, width):
    """An interval as text, blank where it is not defined, as for a single question."""
    return f" ±{value:{width}.1f}" if math.isfinite(value) else " " * (width + 2)


def routed_column(used, variant):
    """The column "routed", blank for a static model, whose closed attentions are no routers'."""
    return " " * 8 if variant.startswith("static") else f"{used['routed_capacity']:8.3f}"


def run_task(name, questions, shots, setters, results, model, tok, args):
    """Run a task's questions with every variant, and print one line for each; returns the tokens run."""
    task, n_tokens, notes = TASKS[name], 0, []
    for variant, set_up in setters.items():
        set_up()
        usage, start, result = Usage(model), time.perf_counter(), results[variant]
        scores, n, note = answer(name, questions, model, tok, args.tokens, usage)
        seconds = time.perf_counter() - start
        result.usage.opened.update(usage.opened)     # a Counter's: it adds
        result.usage.seen.update(usage.seen)
        n_tokens += n
        result.tasks[name] = scores
        check_finite(scores.numbers, name, variant)
        beside_dense = " " * 35
        if variant != "dense":
            d = scores.against(results["dense"].tasks[name])
            kl = " " * 10 if d["kl"] is None else f"{d['kl']:10.4f}"
            beside_dense = (f"{100 * d['difference']:+9.1f}{plus_minus(100 * d['interval'], 5)}"
                            f"{d['changed']:9}{kl}")
        percent, used = 100 * float(scores.right.mean()), usage.summary()
        result.keep[name] = used["keep"]
        print(f"{name:14}{len(questions):6}{shots:6} {variant:12}{task.metric:>9}{percent:7.1f}"
              f"{plus_minus(100 * standard_error(scores.right), 4)}{beside_dense}{used['capacity']:9.3f}"
              f"{routed_column(used, variant)}{seconds:9.1f}", flush=True)
        save(results, args)
        notes += [f"{variant}: {note}" if task.stop else note]
    for note in filter(None, dict.fromkeys(notes)):
        print(f"  {note}")
    return n_tokens


def show_averages(scores):
    """The paper's average over those of its tasks that were run, then that over all their questions; scores:
    {variant: {task: scores}}."""
    tasks = [name for name in scores["dense"] if TASKS[name].paper]
    if len(tasks) < 2:
        return
    sizes = [len(scores["dense"][name].right) for name in tasks]
    for what, weights in ((f"average of {len(tasks)} of the paper", [100 / len(tasks)] * len(tasks)),
                          ("average over questions", [100 * n / sum(sizes) for n in sizes])):
        for variant in scores:
            right = [scores[variant][name].right for name in tasks]
            line = f"{what:26} {variant:21}{sum(w * float(r.mean()) for w, r in zip(weights, right)):7.1f}"
            if variant != "dense":
                changes = [r - scores["dense"][name].right for r, name in zip(right, tasks)]
                difference = sum(w * float(c.mean()) for w, c in zip(weights, changes))
                error = math.hypot(*(w * standard_error(c) for w, c in zip(weights, changes)))
                line += f"{'':6}{difference:+9.1f}{plus_minus(1.96 * error, 5)}"
            print(line)


def run_text(samples, setters, results, model, args):
    """Perplexity of a text with every variant, and KL to the dense model."""
    print(f"\n{'text, tokens':>20} {'variant':12}{'loss':>9}{'perplexity':>12}{'KL to dense':>13}"
          f"{'capacity':>10}{'routed':>8}{'of answers':>12}")
    path, device = args.text, model.embed.weight.device
    for variant, set_up in setters.items():
        set_up()
        groups = pack(samples, args.tokens or TOKENS[device.type])
        r = evaluate(model, (Batch.of(group, device) for group in groups))
        check_finite([r["dense_loss"], r["loss"], r["kl"]], path, variant)
        results[variant].text = {"file": path} | r
        results[variant].keep[path] = r["keep"]
        print(f"{r['tokens']:20,} {variant:12}{r['loss']:9.4f}{perplexity(r['loss']):>12}{r['kl']:13.4f}"
              f"{r['capacity']:10.3f}{routed_column(r, variant)}{r['answer_capacity']:12.3f}", flush=True)
        save(results, args)


def tasks_in(data_dir):
    """The tasks that have a folder in data_dir. InputError where it cannot be read, or none has."""
    try:
        there = [entry.name for entry in os.scandir(data_dir) if entry.is_dir()]
    except OSError as e:
        raise InputError(f"--data-dir {data_dir}: {e.strerror}; it has <task>/<split>.jsonl") from None
    names = [name for name in TASKS if name in there]
    if not names:
        raise InputError(f"--data-dir {data_dir}: has no folder of a task, <task>/<split>.jsonl; tasks are"
                         f" {', '.join(TASKS)}")
    return names


def parse_arguments():
    p, count = common_arguments(__doc__), number(int, 1)
    p.add_argument("--routers", help="a file that train_router.py wrote")
    p.add_argument("--capacity", type=numbers(float, 0, 1), default=[None],
                   help="overall, one or several; default: what the routers were tuned for")
    p.add_argument("--tasks", help=f"comma-separated, of {', '.join(TASKS)} (default: all of --data-dir)")
    p.add_argument("--data-dir", help="folder with <task>/<split>.jsonl (default: fetch from the hub)")
    p.add_argument("--text", help="perplexity of this file: any that train_router.py --data reads")
    p.add_argument("--piece", type=number(int, PLAIN_PROMPT + 1),
                   help=f"tokens per piece of plain text (default: {PLAIN_PIECE}), the first 64 not scored")
    p.add_argument("--last", type=count, help="only so many samples at the end of --text")
    p.add_argument("--limit", type=count, help="only so many lines at the beginning of each task")
    p.add_argument("--num-fewshot", type=number(int, 0),
                   help="examples before each question (default: the paper's, or what is there)")
    p.add_argument("--static", type=numbers(int, 1), default=[], metavar="N",
                   help="also without the N attentions of least harm, one N or several (minutes on a CPU)")
    p.add_argument("--static-data", help="the text they are chosen on (default: data/instructions.jsonl)")
    p.add_argument("--shuffled", action="store_true",
                   help="also with each layer's decisions shuffled, but where answers are written")
    p.add_argument("--tokens", type=count,
                   help="tokens per batch (default: 512 on a CPU, 16384 on CUDA; 8192 and 65536 where answers"
                        " are written)")
    p.add_argument("--json", type=destination,
                   help="write every log-likelihood and answer, and how often each layer ran")
    args = p.parse_args()
    if (args.shuffled or args.capacity != [None]) and not args.routers:
        raise InputError("--shuffled and --capacity need --routers, whose decisions they change")
    if args.shuffled and len(args.capacity) > 1:
        raise InputError("--shuffled: give one --capacity")
    if not (args.tasks or args.data_dir or args.text or args.piece):
        args.data_dir, args.text, args.last = str(QUESTIONS), str(DEFAULT_DATA), args.last or HELD_OUT
        print("No --tasks: a few questions written for this project, to see that all works. They are no"
              " benchmark.\n")
    static_data = args.static_data or DEFAULT_DATA
    check_destinations(args.json, read=(args.routers, args.text, static_data, args.model, args.data_dir))
    there = tasks_in(args.data_dir) if args.data_dir else []
    args.tasks = list(dict.fromkeys(args.tasks.split(","))) if args.tasks else there
    for flag, other in (("last", "text"), ("piece", "text"), ("static_data", "static"), ("limit", "tasks"),
                        ("num_fewshot", "tasks")):
        if getattr(args, flag) is not None and not getattr(args, other):
            raise InputError(f"--{flag.replace('_', '-')}: only with --{other}; leave it out, or give both")
    args.piece, args.static_data = args.piece or PLAIN_PIECE, args.static_data or str(DEFAULT_DATA)
    for name in args.tasks:
        if name not in TASKS:
            raise InputError(f"--tasks: there is no {name!r}; choose from {', '.join(TASKS)}")
    return args


def main():
    parallel.start()
    args = parse_arguments()
    device, dtype = device_and_dtype(args.device, args.dtype)
    if device.type == "cpu" and args.dtype == "auto":
        dtype = torch.float32                                          # scores are compared with others'
    tasks = {name: read_task(name, args.data_dir, args.num_fewshot, args.limit) for name in args.tasks}
    tok = Tokenizer.from_pretrained(args.model)
    model = Llama.from_pretrained(args.model, device, dtype).requires_grad_(False)
    samples = read_samples(args.text, tok, model.config.max_context, args.piece)[0] if args.text else []
    samples = samples[-args.last:] if args.last else samples
    if args.text and not samples:
        raise InputError(f"{args.text}: nothing to score; a text needs more than 64 tokens, a chat an answer")
    for name, (questions, _) in tasks.items():
        parallel.check_enough(len(questions), name, "questions")
    if args.text:
        parallel.check_enough(len(samples), args.text, "samples")
    unshuffled = setters = make_variants(model, tok, args)
    check_same_data(samples, *(questions for questions, _ in tasks.values()))
    if args.shuffled:
        setters = with_shuffled(setters, model, args.seed)
    results = {variant: Result(model) for variant in setters}
    tokens, start = 0, time.perf_counter()
    if tasks:
        print(f"{'task':14}{'n':>6}{'shots':>6} {'variant':12}{'metric':>9}{'score':>7}{'s.e.':>6}"
              f"{'diff.':>9}{'95 %':>7}{'changed':>9}{'KL':>10}{'capacity':>9}{'routed':>8}{'seconds':>9}")
    for name, (questions, shots) in tasks.items():
        chosen = unshuffled if TASKS[name].stop else setters      # written texts differ: nothing to shuffle
        tokens += run_task(name, questions, shots, chosen, results, model, tok, args)
    show_averages({variant: result.tasks for variant, result in results.items()})
    if samples:
        run_text(samples, setters, results, model, args)
        n_passes = 2 * len(setters) - 1              # all but dense also run the dense model
        tokens += n_passes * sum(len(s.ids) for s in samples)
    seconds = time.perf_counter() - start
    print(f"\n{tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} per second")


if __name__ == "__main__":
    run_script("eval.py", main)
