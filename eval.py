"""Accuracy on the paper's benchmarks and perplexity of text, dense beside routed, as lm-evaluation-harness
does it.

    python eval.py                             # the questions and the text in data/: no benchmark
    python eval.py --routers routers/smollm2-135m.attn_token.safetensors --static 6
    python eval.py --tasks piqa,arc_challenge --data-dir benchmarks --limit 100 --json scores.json

A question's choices are scored by their log-likelihood after its context; acc takes the likeliest, acc_norm
the likeliest a character. Prompts, splits and metrics are lm-evaluation-harness 0.4's, few-shot examples
the first K of the training split. What is shared is computed once: choices branch off their context in one
row, each seeing the context and itself alone, and a beginning that all questions of a task share is kept as
keys and values. Gates that read a sequence decide on the whole context, so for them nothing is shared
between questions; gates that read even the answer (pool "all") share nothing.
"""
import argparse
import json
import math
import time
from collections import namedtuple
from dataclasses import replace
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from tqdm import tqdm

from harm import log_probabilities, measure
from model import Cache, Llama, additive, pick
from router import CLOSED, Usage, add_routers, load_routers, remove_routers, routers
from samples import QUESTIONS, TASKS, Batch, batches, pack, read_samples, read_task
from tokenizer import Tokenizer
from train_router import (
    DEFAULT_DATA,
    HEAD_CHUNK,
    HELD_OUT,
    common_arguments,
    evaluate,
    run_script,
)
from weights import InputError, write_file

SHARED = 32                                     # tokens from which a common beginning is worth keeping
TOKENS = {"cpu": 512, "cuda": 16384}           # tokens a batch
STATIC_BATCHES, STATIC_TOKENS = 8, 1024         # what the layers of --static are chosen on


# ---------------------------------------------------------------------------------------------------- scoring

Row = namedtuple("Row", "question context branches cut")     # branches: {the choice's place: its ids}


def rows_of(questions, tok, max_context, apart):
    """The rows to run for some questions.

    As in the harness, a context's trailing spaces go to the continuation, which is what follows the context's
    ids in the encoding of both, and a row too long for the model loses its first tokens. Choices after the
    same context share a row, unless they are to be kept `apart` or do not fit.
    """
    bos, rows = [] if tok.bos_id is None else [tok.bos_id], []
    for n, q in enumerate(questions):
        branches = {}                                        # {context's ids: {choice's place: its ids}}
        for place, (context, continuation) in enumerate(zip(q.contexts, q.continuations)):
            ids = bos + tok.encode(context.rstrip())
            whole = bos + tok.encode(context + continuation)
            branches.setdefault(tuple(ids), {})[place] = whole[len(ids):]
        for ids, of in branches.items():
            row = Row(n, list(ids), of, False)
            if not apart and size(row) <= max_context:
                rows.append(row)
                continue
            for place, continuation in of.items():
                room = max_context + 1 - len(continuation)
                rows.append(Row(n, row.context[-room:], {place: continuation}, len(ids) > room))
    return rows


def size(row):
    """Tokens to run: the context, and every continuation but for its last token, which is never read."""
    return len(row.context) + sum(len(continuation) - 1 for continuation in row.branches.values())


class Beginning:
    """Keys and values of a beginning that many rows share. In a cache's place, it puts them before theirs."""

    def __init__(self, model, ids):
        cache = Cache(model.config, len(ids))
        idx = torch.tensor([ids], device=model.embed.weight.device)
        model.run(model.embed(idx), model.context(idx, None, [len(ids)], cache))
        self.k, self.v, self.length = cache.k, cache.v, len(ids)

    def prefill(self, layer, k, v):
        return tuple(torch.cat((old[layer].expand(len(new), -1, -1, -1), new), 2)
                     for old, new in ((self.k, k), (self.v, v)))


def common_beginning(rows):
    """How many ids all contexts start with, leaving each at least one of its own."""
    first, last = min(row.context for row in rows), max(row.context for row in rows)
    n = min(len(row.context) for row in rows) - 1
    return next((i for i in range(n) if first[i] != last[i]), n)


def tree(model, rows, beginning):
    """Token ids (B, T) and Context of rows: branches follow their context, and do not see each other."""
    start, device = beginning.length if beginning else 0, model.embed.weight.device
    lengths = [size(row) - start for row in rows]
    idx, position, branch = torch.zeros(3, len(rows), max(lengths), dtype=torch.int64)
    for b, (row, length) in enumerate(zip(rows, lengths)):
        n = len(row.context)
        ids, at, of = row.context[start:], list(range(start, n)), [0] * (n - start)
        for i, continuation in enumerate(row.branches.values(), 1):
            ids, more = ids + continuation[:-1], len(continuation) - 1
            at, of = [*at, *range(n, n + more)], of + [i] * more
        idx[b, :length], position[b, :length], branch[b, :length] = map(torch.tensor, (ids, at, of))
    idx, position, branch = idx.to(device), position.to(device), branch.to(device)
    ctx = model.context(idx, lengths, [len(row.context) - start for row in rows])
    if start or int(branch.max()) > 1:                                     # not just one text a row
        sees = ((branch[:, None] == 0) | (branch[:, None] == branch[:, :, None])).tril()           # (B, T, T)
        sees = F.pad(sees, (start, 0), value=True)                              # (B, T, start + T)
        if model.config.sliding_window:
            before = torch.arange(start, device=device).expand(len(rows), -1)
            ago = position[:, :, None] - torch.cat((before, position), 1)[:, None]
            sees = sees & (ago < model.config.sliding_window)
        cos, sin = (t[:, None] for t in model.angles_of(position, int(position.max()) + 1))  # (B, 1, T, D)
        mask = additive(sees[:, None], model.embed.weight)
        ctx = replace(ctx, cos=cos, sin=sin, mask=mask, first=None, cache=beginning)
    return idx, ctx


def score(model, rows, beginning, out):
    """Run rows, and write each branch's log-likelihood to out[question][place]; returns the tokens run."""
    idx, ctx = tree(model, rows, beginning)
    x = model.run(model.embed(idx), ctx)                                            # (B, T, C)
    at, targets, owners = [], [], []                # where a next token is scored, that token, and for whom
    for b, row in enumerate(rows):
        last = b * idx.shape[1] + len(row.context) - (beginning.length if beginning else 0) - 1
        end = last + 1
        for place, continuation in row.branches.items():
            at += [last, *range(end, end + len(continuation) - 1)]
            targets += continuation
            owners += [(row.question, place)] * len(continuation)
            end += len(continuation) - 1
    x, targets = x.flatten(0, 1)[at], torch.tensor(targets, device=idx.device)
    for i in range(0, len(x), HEAD_CHUNK):
        part = slice(i, i + HEAD_CHUNK)
        ll = log_probabilities(model, x[part]).gather(1, targets[part, None])[:, 0]
        for (question, place), value in zip(owners[part], ll.tolist()):
            out[question][place] += value
    return sum(ctx.sizes)


@torch.no_grad()
def log_likelihoods(model, questions, tok, budget, usages):
    """[[log-likelihood of each choice in nats] for each question], how many contexts were cut, and how many
    tokens were run; what the gates did is added to usages."""
    model.eval()
    gates = routers(model).values()
    by_sequence = any(gate.scope == "sequence" for gate in gates)
    rows = rows_of(questions, tok, model.config.max_context,
                   apart=by_sequence and any(gate.pool == "all" for gate in gates))
    out = [[0.0] * len(q.contexts) for q in questions]
    with tqdm(total=len(rows), unit="row", leave=False) as bar:
        tokens = 0

        def count():
            for usage in usages:
                usage.add()

        def run(some, beginning=None):
            shared = beginning.length if beginning else 0
            nonlocal tokens
            for batch in pack(some, budget, lambda row: size(row) - shared):
                tokens += score(model, batch, beginning, out)
                count()
                bar.update(len(batch))
        run([row for row in rows if row.cut])
        groups = {}
        for row in rows:
            if not row.cut:
                groups.setdefault(questions[row.question].group, []).append(row)
        for group in groups.values():
            shared, beginning = common_beginning(group), None
            if shared >= SHARED and len(group) > 1 and not by_sequence:
                beginning = Beginning(model, group[0].context[:shared])
                count()
            run(group, beginning)
    return out, sum(row.cut for row in rows), tokens


# ---------------------------------------------------------------------------------------------------- metrics

class Scores:
    """One variant's log-likelihoods for a task's questions, and what follows from them."""

    def __init__(self, questions, lls, norm):
        def likeliest(values):
            return max(range(len(values)), key=values.__getitem__)             # the first of equals
        self.questions, self.lls = questions, lls
        gold = torch.tensor([q.gold for q in questions])
        acc = torch.tensor([likeliest(ll) for ll in lls])
        acc_norm = torch.tensor([likeliest([v / n for v, n in zip(ll, q.lengths)])
                                 for q, ll in zip(questions, lls)])
        self.answers = acc_norm if norm else acc
        self.right = (self.answers == gold).double()                           # the task's own metric
        self.acc, self.acc_norm = float((acc == gold).double().mean()), None
        if norm:
            self.acc_norm = float(self.right.mean())

    def entry(self):
        """As the JSON file has it."""
        items = [{"id": q.id, "gold": q.gold, "ll": ll} for q, ll in zip(self.questions, self.lls)]
        return {"n": len(items), "acc": self.acc, "acc_norm": self.acc_norm, "items": items}

    def against(self, dense):
        """What changed: difference of the metric and its 95 % half-width (paired), answers that differ, and
        the mean over questions of KL(dense || this), of the distributions over the choices."""
        p, q = ([torch.tensor(ll).double().log_softmax(0) for ll in lls] for lls in (dense.lls, self.lls))
        kl = sum(float(F.kl_div(b, a, reduction="sum", log_target=True)) for a, b in zip(p, q)) / len(p)
        change = self.right - dense.right
        return {"difference": float(change.mean()), "interval": 1.96 * error(change),
                "changed": int((self.answers != dense.answers).sum()), "kl": kl}


def error(values):
    """Standard error of the mean."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


# --------------------------------------------------------------------------------------------------- variants

def least_harmful(model, samples, n, args, device):
    """The n layers whose attention the output misses least, closed one at a time on `samples`."""
    add_routers(model, "attn_token")                                       # all open
    groups = islice(batches(samples, STATIC_TOKENS, args.seed), STATIC_BATCHES)
    harm = sum(measure(model, Batch.of(group, device))[0].sum(0) for group in groups)       # (n_layer,)
    return sorted(harm.argsort()[:n].tolist())


def replace_scores(model, change):
    """Let each gate's scores, of a batch's real tokens or its sequences, be change(layer, those scores)."""
    def replace(layer, gate, score):
        def changed(h, ctx):
            s = score(h, ctx)
            real = torch.arange(h.shape[1], device=h.device) < ctx.lengths[:, None] if s.dim() == 2 else ...
            s[real] = change(layer, s[real])
            return s
        gate.score = changed
    for layer, gate in routers(model).items():
        replace(layer, gate, gate.score)


class Shuffle:
    """The routed model's scores on a whole text or task, kept layer by layer, then dealt to other tokens or
    sequences: in every layer as many are open, others."""

    def __init__(self, seed):
        self.rng, self.kept = torch.Generator().manual_seed(seed), {}

    def keep(self, layer, scores):
        self.kept.setdefault(layer, []).append(scores)
        return scores

    def mix(self):
        for layer, scores in self.kept.items():
            scores = torch.cat(scores)
            self.kept[layer] = scores[torch.randperm(len(scores), generator=self.rng).to(scores.device)]

    def deal(self, layer, scores):
        dealt, self.kept[layer] = self.kept[layer].tensor_split([len(scores)])
        return dealt


def draw(share, seed):
    """Gates open at random, as often in every layer."""
    rng = torch.Generator().manual_seed(seed)
    return lambda layer, scores: (torch.rand(scores.shape, generator=rng) < share).to(scores)


def routed_share(meta, capacity, n_layer, path):
    """The share of the gates that are open at an overall capacity, or at that of the router file."""
    table, gates = json.loads(meta["calibration"]), meta["layers"].count(",") + 1
    if capacity is None and not table:
        raise InputError(f"--random: {path} does not tell its capacity; give --capacity")
    if capacity is None:
        capacity = min(table, key=lambda pair: abs(pair[0] - float(meta["threshold"])))[1]
    return 1 - (1 - capacity) * n_layer / gates


def variants(model, tok, args, device):
    """{name: a function that turns the model into it}; the first is the dense model."""
    found = {"dense": lambda: remove_routers(model)}
    if args.routers:
        meta = load_routers(model, args.routers, args.capacity)      # a bad file is told before the work
        load = partial(load_routers, model, args.routers, args.capacity)
        found["routed"] = load
    if args.shuffled:
        shuffle = Shuffle(args.seed)
        found["routed"] = lambda: (load(), shuffle.kept.clear(), replace_scores(model, shuffle.keep))
        found["shuffled"] = lambda: (load(), shuffle.mix(), replace_scores(model, shuffle.deal))
    if args.random:
        share = routed_share(meta, args.capacity, model.config.n_layer, args.routers)
        found["random"] = lambda: (load(), replace_scores(model, draw(share, args.seed)))
    if args.static:
        if args.static > model.config.n_layer:
            raise InputError(f"--static {args.static}: this model has {model.config.n_layer} layers")
        samples, _ = read_samples(args.static_data, tok, model.config.max_context)
        layers = least_harmful(model, samples[:-HELD_OUT] or samples, args.static, args, device)
        names = ",".join(map(str, layers))
        print(f"static: without the attention of layers {names}, which {args.static_data} misses least")
        found["static"] = lambda: add_routers(model, "attn_token", names, threshold=CLOSED)
    return found


# ----------------------------------------------------------------------------------------------------- script

def run_task(name, questions, shots, found, totals, model, tok, budget):
    """Score a task's questions with every variant, and print a line for each; returns {variant: its Scores},
    {variant: {layer: how often it ran}} and the tokens run. What the gates did is added to totals, {variant:
    Usage}."""
    results, keep, tokens = {}, {}, 0
    metric = "acc_norm" if TASKS[name].norm else "acc"
    for variant, become in found.items():
        become()
        usage, start = Usage(model), time.perf_counter()
        lls, cut, n = log_likelihoods(model, questions, tok, budget, (usage, totals[variant]))
        seconds, tokens, change = time.perf_counter() - start, tokens + n, " " * 36
        one = results[variant] = Scores(questions, lls, TASKS[name].norm)
        if variant != "dense":
            d = one.against(results["dense"])
            change = (f"{100 * d['difference']:+9.1f} ±{100 * d['interval']:5.1f}{d['changed']:9}"
                      f"{d['kl']:10.4f}")
        mean, used = 100 * float(one.right.mean()), usage.summary()
        keep[variant] = used["keep"]
        print(f"{name:14}{len(questions):6}{shots:6} {variant:9}{metric:>9}{mean:7.1f}"
              f" ±{100 * error(one.right):4.1f}{change}{used['capacity']:9.3f}{used['routed_capacity']:8.3f}"
              f"{seconds:9.1f}", flush=True)
    if cut:
        print(f"  {cut} contexts were longer than the model's {model.config.max_context} tokens and lost"
              " their beginnings")
    return results, keep, tokens


def show_average(scores):
    """The paper's average over those of its tasks that were run; scores: {variant: {task: Scores}}."""
    tasks = [name for name in scores["dense"] if TASKS[name].paper]
    for variant in scores if len(tasks) > 1 else ():
        def mean(values):
            return 100 * float(sum(values)) / len(tasks)
        changes = [scores[variant][name].right - scores["dense"][name].right for name in tasks]
        interval = 196 * math.sqrt(sum(error(change) ** 2 for change in changes)) / len(tasks)
        average = mean(one.right.mean() for name, one in scores[variant].items() if name in tasks)
        line = f"{f'average of {len(tasks)}':26} {variant:18}{average:7.1f}"
        print(line if variant == "dense" else
              f"{line}{'':6}{mean(change.mean() for change in changes):+9.1f} ±{interval:5.1f}")


def run_text(path, samples, found, model, budget, device):
    """Perplexity of a text with every variant, and KL to the dense model; {variant: `evaluate`'s result}."""
    print(f"\n{'text, tokens':>20} {'variant':9}{'loss':>9}{'perplexity':>12}{'KL to dense':>13}"
          f"{'capacity':>10}{'routed':>8}")
    results = {}
    for variant, become in found.items():
        become()
        r = evaluate(model, samples, budget, device)
        results[variant] = {"file": path} | r
        print(f"{r['tokens']:20,} {variant:9}{r['loss']:9.4f}{math.exp(r['loss']):12.3f}{r['kl']:13.4f}"
              f"{r['capacity']:10.3f}{r['routed_capacity']:8.3f}", flush=True)
    return results


def parse_arguments():
    p = common_arguments(argparse.ArgumentParser(description=__doc__.split("\n")[0]))
    p.add_argument("--routers", help="a file that train_router.py wrote")
    p.add_argument("--capacity", type=float, help="overall; default: what the routers were tuned for")
    p.add_argument("--tasks", help=f"comma-separated, of {', '.join(TASKS)} (default: all of --data-dir)")
    p.add_argument("--data-dir", help="folder with <task>/<split>.jsonl (default: fetch from the hub)")
    p.add_argument("--text", help="perplexity of this file: any that train_router.py --data reads")
    p.add_argument("--last", type=int, help="only so many samples at the end of --text")
    p.add_argument("--limit", type=int, help="only so many lines at the beginning of each task")
    p.add_argument("--num-fewshot", type=int, help="examples before each question (default: the paper's)")
    p.add_argument("--static", type=int, default=0, metavar="N",
                   help="also without the N attentions that are missed least")
    p.add_argument("--static-data", default=str(DEFAULT_DATA), help="the text they are chosen on")
    p.add_argument("--shuffled", action="store_true", help="also with each layer's decisions shuffled")
    p.add_argument("--random", action="store_true",
                   help="also with gates that open at random, as many, and as often in every layer")
    p.add_argument("--tokens", type=int, help="tokens a batch (default: 512 on a CPU, 16384 on CUDA)")
    p.add_argument("--json", help="write every log-likelihood, and how often each layer ran, to this file")
    args = p.parse_args()
    for name, least in ("last", 1), ("limit", 1), ("num_fewshot", 0), ("static", 0), ("tokens", 1):
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} should be at least {least}; it is {value}")
    if (args.shuffled or args.random or args.capacity is not None) and not args.routers:
        raise InputError("--shuffled, --random and --capacity need --routers, whose decisions they change")
    if not (args.tasks or args.data_dir or args.text):
        args.data_dir, args.text, args.last = str(QUESTIONS), str(DEFAULT_DATA), HELD_OUT
        print("No --tasks: a few questions written for this project, to see that all works. They are no"
              " benchmark.\n")
    args.tasks = args.tasks.split(",") if args.tasks else list(TASKS) if args.data_dir else []
    for name in args.tasks:
        if name not in TASKS:
            raise InputError(f"--tasks: there is no {name!r}; choose from {', '.join(TASKS)}")
    return args


def main():
    args = parse_arguments()
    device, dtype = pick(args.device, args.dtype)
    if device.type == "cpu" and args.dtype == "auto":
        dtype = torch.float32                                          # scores are compared with others'
    budget = args.tokens or TOKENS[device.type]
    tasks = {name: read_task(name, args) for name in args.tasks}
    tok = Tokenizer.from_pretrained(args.model)
    model = Llama.from_pretrained(args.model, device, dtype)
    samples = read_samples(args.text, tok, model.config.max_context)[0] if args.text else []
    if args.text and not samples:
        raise InputError(f"{args.text}: nothing to score; a text needs more than 64 tokens, a chat an answer")
    found = variants(model, tok, args, device)
    scores, keeps, text, tokens = {v: {} for v in found}, {v: {} for v in found}, {}, 0
    totals = {v: Usage(model) for v in found}
    start = time.perf_counter()

    def save():
        if not args.json:
            return
        tables = {v: {"tasks": {name: one.entry() for name, one in scores[v].items()},
                      "capacity": (totals[v].summary() if tasks else text[v])["capacity"],
                      "text": text.get(v), "keep": keeps[v]} for v in found}
        first = tables.pop("routed" if args.routers else "dense")
        write_file(args.json, json.dumps(first | tables).encode())
    if tasks:
        print(f"{'task':14}{'n':>6}{'shots':>6} {'variant':9}{'metric':>9}{'score':>7}{'':6}{'difference':>9}"
              f"{'95 %':>7}{'changed':>9}{'KL':>9}{'capacity':>9}{'routed':>8}{'seconds':>9}")
    for name, (questions, shots) in tasks.items():
        results, keep, n = run_task(name, questions, shots, found, totals, model, tok, budget)
        for variant, one in results.items():
            scores[variant][name], keeps[variant][name] = one, keep[variant]
        tokens += n
        save()
    show_average(scores)
    if samples:
        samples = samples[-args.last:] if args.last else samples
        text = run_text(args.text, samples, found, model, budget, device)
        for variant, result in text.items():
            keeps[variant][args.text] = result["keep"]
        tokens += sum(len(s.ids) for s in samples) * (2 * len(found) - 1)
        save()
    seconds = time.perf_counter() - start
    print(f"\n{tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} a second")


if __name__ == "__main__":
    run_script("eval.py", main)
