"""How a model is scored: loss and KL of held-out text, and answers to a benchmark's questions, by
log-likelihood of their choices, or written.

The choices of a question branch off from its context in one row; each sees the context and itself alone. A
prefix that all questions of a group share is computed once, and kept as keys and values. Gates of sequences
read the whole context, so with them questions share no prefix; with pool="all" (they read even the answer) or
kv="open" choices share nothing either.
"""
import math
import time
from collections import Counter, namedtuple
from dataclasses import replace
from itertools import chain

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from losses import chunks, cross_entropy, hidden_states, kl, log_probabilities
from model import Cache, run_layers
from router import decisions_on, mindskips, overall_capacity, trace
from support import parallel, written
from support.attention import additive_mask
from support.batches import common_prefix, pack
from support.checked import check_ids
from support.cuda import to_device
from support.files import InputError
from support.graph import release
from support.memory import rows_that_fit
from support.tasks import TASKS, Scores

SHARED = 32                                     # tokens from which a common beginning is worth keeping
TOKENS = {"cpu": 512, "cuda": 16384}            # per batch
WRITTEN_TOKENS = {"cpu": 8192, "cuda": 65536}   # where answers are written, a token per row at a time


# ---------------------------------------------------------------------------------------------- held-out text
class Usage:
    """How often the gates were open over many passes, in all processes: call `add` after each."""

    def __init__(self, model):
        self.model, self.opened, self.seen = model, Counter(), Counter()

    def add(self):
        for i, skip in mindskips(self.model).items():
            self.opened[i] += skip.opened            # on CUDA a tensor: no sync here
            self.seen[i] += skip.seen

    def summary(self):
        """{"capacity": overall, "routed_capacity", "keep": {layer: share}}."""
        layers = sorted(set(parallel.gathered(list(self.opened))))
        opened = parallel.summed(*(int(self.opened[i]) for i in layers))
        seen = parallel.summed(*(self.seen[i] for i in layers))
        keep = {i: n_open / n_seen for i, n_open, n_seen in zip(layers, opened, seen)}
        shares, n_layer = list(keep.values()), self.model.config.n_layer
        routed = overall_capacity(shares, len(shares)) if shares else 1.0
        return {"capacity": overall_capacity(shares, n_layer), "routed_capacity": routed, "keep": keep}


@torch.no_grad()
def evaluate(model, batches, teacher=None):
    """Dense and routed loss and KL(dense || routed) in nats per token, capacity on all tokens and on answers,
    and how often each layer ran. batches: an iterable of Batch, which processes share; the model skips (it is
    set to eval mode)."""
    model.eval()
    teacher = teacher or model
    sums = torch.zeros(3, dtype=torch.float64, device=model.embed.weight.device)
    tokens, usage = 0, Usage(model)
    n_open = n_decisions = 0                                             # on answers' tokens
    for batch, is_counted in parallel.share(batches):
        with trace(model) as decisions:
            x, reference = hidden_states(model, batch, teacher)
        if not is_counted:
            continue
        if decisions:
            is_open = decisions_on(decisions, batch.scored.cpu())
            n_open, n_decisions = n_open + int(is_open.sum()), n_decisions + len(is_open)
        for chunk in chunks(x):
            targets = batch.targets[chunk]
            log_p, log_q = log_probabilities(teacher, reference[chunk]), log_probabilities(model, x[chunk])
            losses = [cross_entropy(log_p, targets, None), cross_entropy(log_q, targets, None),
                      kl(log_q, targets, log_p)]
            sums += torch.stack([loss.sum() for loss in losses])
        tokens += len(x)
        usage.add()
    n_open, n_decisions, tokens, *sums = parallel.summed(n_open, n_decisions, tokens, *sums.tolist())
    dense_loss, loss, divergence = [total / tokens for total in sums]
    share = n_open / n_decisions if n_decisions else 1.0
    answers = overall_capacity([share] * len(mindskips(model)), model.config.n_layer)
    return {"tokens": tokens, "dense_loss": dense_loss, "loss": loss, "kl": divergence,
            "answer_capacity": answers} | usage.summary()


def perplexity(loss):
    """exp(loss), as text of at most 12 characters."""
    return f"{math.exp(loss):.3f}" if loss < 18 else f"10^{loss / math.log(10):.1f}"


# -------------------------------------------------------------------------------------------------- questions
def answer(name, questions, model, tok, tokens, usage):
    """(a task's tasks.Scores or written.Scores, tokens run, a note, often empty); processes share the
    questions.

    tokens: per batch, None: what suits the device; usage: a Usage, to which what the gates did is added.
    """
    task, device = TASKS[name], model.embed.weight.device.type
    if task.stop:
        return write(questions, task.stop, model, tok, tokens or WRITTEN_TOKENS[device], usage)
    values, n_cut, n_tokens = log_likelihoods(model, questions, tok, tokens or TOKENS[device], usage)
    return Scores(questions, values, task.norm), n_tokens, cut_note(n_cut, model.config.max_context)


def cut_note(n_cut, most):
    return f"{n_cut} questions lost the beginnings of their contexts, to fit {most} tokens" if n_cut else ""


# --------------------------------------------------------------------------------- log-likelihoods of choices
Row = namedtuple("Row", "question context branches cut")     # branches: {the choice's place: its ids}


def rows_of(questions, tok, max_context, apart):
    """The rows to run for some questions.

    As in the harness, a context's trailing spaces belong to the continuation. Context and continuation are
    encoded together, and the ids after the context's own are the continuation's. A row too long for the model
    loses its first tokens. Choices after the same context share a row, unless kept `apart` or too long.
    """
    rows = []
    for n, q in enumerate(questions):
        by_context = {}                                      # {context's ids: {choice's place: its ids}}
        for place, (context, continuation) in enumerate(zip(q.contexts, q.continuations)):
            ids = tok.bos_ids + tok.encode(context.rstrip())
            whole = tok.bos_ids + tok.encode(context + continuation)
            if not ids or len(whole) <= len(ids):
                raise InputError(f"question {q.id + 1}: its context or a choice has no token of its own")
            by_context.setdefault(tuple(ids), {})[place] = whole[len(ids):]
        for ids, branches in by_context.items():
            row = Row(n, list(ids), branches, False)
            if not apart and size(row) <= max_context:
                rows.append(row)
                continue
            for place, continuation in branches.items():
                room = max_context + 1 - len(continuation)       # + 1: its last token is not run
                if room < 1:
                    raise InputError(f"question {q.id + 1}: a choice has {len(continuation)} tokens,"
                                     f" more than the model's context of {max_context}; leave it out")
                rows.append(Row(n, row.context[-room:], {place: continuation}, len(ids) > room))
    return rows


def size(row):
    """Tokens to run: the context, and every continuation but for its last token, which is never read."""
    return len(row.context) + sum(len(continuation) - 1 for continuation in row.branches.values())


class Prefix:
    """Keys and values of a prefix that many rows share. Used as their cache: `store` puts them first."""

    def __init__(self, model, ids):
        cache = Cache(model.config, len(ids))
        idx = torch.tensor([ids], device=model.embed.weight.device)
        ctx = model.context(idx, None, [len(ids)], cache)
        run_layers(model.layers, model.embed(idx), ctx)
        self.k, self.v, self.length = cache.k, cache.v, len(ids)

    def store(self, layer, k, v, ctx):
        rows = len(k)
        return (torch.cat((self.k[layer].expand(rows, -1, -1, -1), k), 2),
                torch.cat((self.v[layer].expand(rows, -1, -1, -1), v), 2))


def tree(model, rows, prefix):
    """Token ids (B, T) and Context of rows: branches follow their context, and do not see each other."""
    start, device = prefix.length if prefix else 0, model.embed.weight.device
    lengths = [size(row) - start for row in rows]
    tokens = torch.zeros(3, len(rows), max(lengths), dtype=torch.int64)       # ids, positions, branches
    for b, (row, length) in enumerate(zip(rows, lengths)):
        n = len(row.context)
        ids, positions, branches = row.context[start:], list(range(start, n)), [0] * (n - start)
        for i, continuation in enumerate(row.branches.values(), 1):
            n_read = len(continuation) - 1                                 # its last token is never read
            ids = ids + continuation[:-1]
            positions += range(n, n + n_read)
            branches += [i] * n_read
        tokens[:, b, :length] = torch.tensor([ids, positions, branches])
    has_several, end = int(tokens[2].max()) > 1, int(tokens[1].max()) + 1      # branches; read on the host
    idx, position, branch = to_device(tokens, device)
    ctx = model.context(idx, lengths, [len(row.context) - start for row in rows])
    if start or has_several:
        visible = (branch[:, None] == 0) | (branch[:, None] == branch[:, :, None])
        visible = visible.tril()                                                # (B, T, T)
        visible = F.pad(visible, (start, 0), value=True)                              # (B, T, start + T)
        if model.config.sliding_window:
            before = torch.arange(start, device=device).expand(len(rows), -1)
            ago = position[:, :, None] - torch.cat((before, position), 1)[:, None]
            visible = visible & (ago < model.config.sliding_window)
        cos, sin = (t[:, None] for t in model.angles_of(position, end))                      # (B, 1, T, D)
        mask = additive_mask(visible[:, None], model.embed.weight.dtype)
        ctx = replace(ctx, cos=cos, sin=sin, mask=mask, cache=prefix)
    return idx, ctx


def score(model, rows, prefix, out):
    """Run rows, and write each branch's log-likelihood to out[question][place]; returns the tokens run."""
    idx, ctx = tree(model, rows, prefix)
    x = run_layers(model.layers, model.embed(idx), ctx)                                            # (B, T, C)
    at, targets, owners = [], [], []     # flat index that predicts, token predicted, (question, place)
    for b, row in enumerate(rows):
        last = b * idx.shape[1] + len(row.context) - (prefix.length if prefix else 0) - 1
        end = last + 1
        for place, continuation in row.branches.items():
            at += [last, *range(end, end + len(continuation) - 1)]
            targets += continuation
            owners += [(row.question, place)] * len(continuation)
            end += len(continuation) - 1
    check_ids(min(targets), max(targets), model.config.vocab_size)
    at, targets = to_device(torch.tensor([at, targets]), idx.device)
    x = x.flatten(0, 1)[at]
    for part in chunks(x):
        ll = log_probabilities(model, x[part]).gather(1, targets[part, None])[:, 0]
        for (question, place), value in zip(owners[part], ll.tolist()):
            out[question][place] += value
    return sum(ctx.host_lengths)


@torch.no_grad()
def log_likelihoods(model, questions, tok, budget, usage):
    """[[log-likelihood of each choice in nats] for each question], how many questions had a context cut, and
    how many tokens were run; what the gates did is added to `usage`."""
    model.eval()
    skips = mindskips(model).values()
    by_sequence = any(skip.scope == "sequence" for skip in skips)
    reads_answers = by_sequence and any(skip.router.pool == "all" for skip in skips)
    kv_open = any(skip.kv == "open" for skip in skips)          # open_keys.py has no branches or prefix
    rows = rows_of(questions, tok, model.config.max_context, apart=reads_answers or kv_open)
    out = [[0.0] * len(q.contexts) for q in questions]
    with tqdm(total=len(rows) // parallel.processes.world, unit="row", leave=False) as bar:
        tokens = 0

        def run(group, prefix):
            nonlocal tokens
            n_before = prefix.length if prefix else 0
            for batch in pack(parallel.own(group), budget, lambda row: size(row) - n_before):
                tokens += score(model, batch, prefix, out)
                usage.add()
                bar.update(len(batch))

        groups = {}
        for row in rows:                             # those that were cut are a group of their own
            groups.setdefault(None if row.cut else questions[row.question].group, []).append(row)
        for group in groups.values():
            shared, prefix = common_prefix([row.context for row in group]), None
            if shared >= SHARED and len(group) > 1 and not (by_sequence or kv_open or group[0].cut):
                prefix = Prefix(model, group[0].context[:shared])
                if parallel.is_first():              # each process runs it
                    usage.add()
            run(group, prefix)
    tokens, *values = parallel.summed(tokens, *chain.from_iterable(out))  # each row was run by one process
    values = iter(values)
    out = [[next(values) for _ in choices] for choices in out]
    return out, len({row.question for row in rows if row.cut}), tokens


# -------------------------------------------------------------------------------------------- written answers
@torch.no_grad()
def write(questions, stop, model, tok, budget, usage):
    """(written.Scores of what the model writes to answer the questions, tokens run, a note). The likeliest
    tokens are written, until one of the strings `stop`. A row that ended goes on until all of its batch have,
    and `usage` counts its gates."""
    own = parallel.own(questions)
    rows, n_cut = written.prompts(own, tok, model.config.max_context)
    longest = max((len(ids) for _, ids in rows), default=0) + written.LONGEST
    budget = min(budget, longest * rows_that_fit(model, budget, longest))
    answers, start = {}, time.perf_counter()
    with tqdm(total=len(rows), unit="answer", leave=False) as bar:
        for batch in pack(rows, budget, lambda row: len(row[1]) + written.LONGEST):
            texts = [torch.tensor(ids, device=model.embed.weight.device) for _, ids in batch]
            idx, lengths = pad_sequence(texts, batch_first=True), [len(ids) for ids in texts]
            writing = written.Writing(tok, stop, len(batch))
            model.generate(idx, written.LONGEST, lengths=lengths, eos_id=tok.eos_ids, on_token=writing)
            usage.add()
            answers |= {place: answer for (place, _), answer in zip(batch, writing.answers())}
            bar.update(len(batch))
    seconds = time.perf_counter() - start
    model.cache = None
    release(model)
    x = run_layers(model.layers, model.embed(idx), model.context(idx))        # to see that it is finite

    answers = parallel.gathered([answers[place] for place in range(len(own))])
    numbers = parallel.gathered([float(x.abs().max())])
    seconds = max(parallel.gathered([seconds]))
    n_cut, n_prompt_tokens = parallel.summed(n_cut, sum(len(ids) for _, ids in rows))
    scores = written.Scores(questions, answers, seconds, numbers)
    notes = scores.note(), cut_note(n_cut, model.config.max_context - written.LONGEST)
    return scores, n_prompt_tokens + scores.n_tokens, "; ".join(filter(None, notes))
