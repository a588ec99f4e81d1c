"""Calibration, after tuning: find the threshold at which the model has the capacity that was asked for."""
import math
import sys

import numpy as np
import torch
from tqdm import tqdm

from model import run_layers
from router import decisions_on, mindskips, overall_capacity, trace
from support import parallel
from support.batches import Batch, common_prefix, pack
from support.data import PLAIN_PROMPT, Sample, pieces

TRAINING_SAMPLES = 24                                # training samples that are run, prompt and answer
PROMPTS = 8 * TRAINING_SAMPLES                       # or prompts alone, where gates read only prompts
LOGITS = 0.5, 0.25, 0.12, 0, -0.12, -0.25, -0.5, -1  # the curve's thresholds, as logits
STRIDE = 4                                           # at token level the curve uses every fourth text
TOLERANCE = 0.003                                    # error of capacity at which the search ends
ATTEMPTS = 12                                        # most thresholds that the search measures
BISECTED_GAP = 0.3                                   # in capacity: bounds farther apart are bisected


@torch.no_grad()
def measured_capacity(model, batches, start=0):
    """Overall capacity on batches, shared among processes: the share of scores that reach the threshold, of
    tokens from column `start` on, or of sequences. No logits are computed."""
    n_open = n_seen = 0
    for batch, is_counted in parallel.share(batches):
        ctx = model.context(batch.idx, batch.lengths, batch.prompt_lengths)
        with trace(model) as decisions:
            run_layers(model.layers, model.embed(batch.idx), ctx)
        if not is_counted:
            continue
        column = torch.arange(batch.idx.shape[1])
        tokens = (column >= start) & (column < batch.lengths.cpu()[:, None])     # (B, T)
        is_open = decisions_on(decisions, tokens)
        n_open += int(is_open.sum())
        n_seen += len(is_open)
    n_open, n_seen = parallel.summed(n_open, n_seen)
    return overall_capacity([n_open / n_seen] * len(mindskips(model)), model.config.n_layer)


def calibration_batches(gates_read_prompts, samples, own_ids, tokens, stride=1):
    """[(batches of training samples, first column that counts), (batches of the model's own text (n, T), 0)]
    of every stride-th text: prompts for gates that read prompts, else whole ones. What all samples begin
    with, the template of a chat, does not count."""
    n_tokens = own_ids.shape[1]
    if gates_read_prompts:
        samples = [Sample(s.ids[:s.prompt], s.answer[:s.prompt], s.prompt) for s in samples]
        n_tokens = PLAIN_PROMPT
    texts = [s.ids for s in samples]
    template = common_prefix(texts) if min(texts) < max(texts) else 0      # 0: all texts are the same
    sources = (samples[::stride], template), (pieces(own_ids[::stride].tolist(), n_tokens), 0)
    return [([Batch.of(group, own_ids.device) for group in pack(source, tokens)], start)
            for source, start in sources]


def calibration_sources(model, samples, own_ids, tokens):
    """(what the curve is measured on, what the search is), see calibration_batches. samples: of the training
    data; own_ids: token ids (n, T) that the model wrote, with equal weight, since other text opens other
    gates."""
    skip = next(iter(mindskips(model).values()))
    gates_read_prompts = skip.scope == "sequence" and skip.router.pool == "prompt"
    samples = samples[:PROMPTS if gates_read_prompts else TRAINING_SAMPLES]
    full = calibration_batches(gates_read_prompts, samples, own_ids, tokens)
    if skip.scope == "sequence":                                         # they have few decisions
        return full, full
    return calibration_batches(gates_read_prompts, samples, own_ids, tokens, STRIDE), full


def later_steps(model, recipe, sources, held_out, step_tokens):
    """About how many tuning steps of step_tokens take as long as what follows them: calibration on `sources`,
    see calibration_sources, and the final table of held_out. Counted in tokens that are run once, without
    logits: one that is tuned on counts as six (with measured harm as a run of half of the layers per gate),
    one of the table as four."""
    n_tokens = 4 * sum(len(sample.ids) for sample in held_out)
    for texts, n_passes in zip(sources, (len(LOGITS), 3)):               # 3: usually
        n_tokens += n_passes * sum(batch.idx.numel() for batches, _ in texts for batch in batches)
    each = 2 + len(mindskips(model)) / 2 if recipe.method == "harm" else 6
    return n_tokens / (each * step_tokens)


def shifted(curve, exact, least):
    """A curve {threshold's logit: capacity}, moved so that it is `exact` at logit 0; least: the capacity of
    closed gates. Each share s of open gates changes in proportion to sqrt(s (1 - s)), so that 0 and 1
    stay. Where the share at logit 0 is 0 or 1, the curve stays as it is."""
    shares = {logit: (c - least) / (1 - least) for logit, c in curve.items()}
    spreads = {logit: math.sqrt(max(0.0, s * (1 - s))) for logit, s in shares.items()}
    excess = (exact - curve[0]) / (1 - least)
    result = {}
    for logit, s in shares.items():
        if spreads[0]:
            s += excess * spreads[logit] / spreads[0]
        result[logit] = least + (1 - least) * min(1.0, max(0.0, s))
    return result


def calibrate(model, sources, capacity):
    """Set the threshold that gives an overall capacity; returns the curve, [(threshold, capacity)].

    sources: see calibration_sources. First a curve of thresholds, from which `load_routers` reads other
    capacities: at token level estimated on every fourth text, see `shifted`. Then, on all texts, false
    position between the two nearest thresholds, or bisection where these are far apart in capacity. An
    estimate may be wrong, so it is dropped once it has bounded an attempt.
    """
    model.eval()
    skips, (subset, full) = list(mindskips(model).values()), sources

    def set_threshold(logit):
        for skip in skips:
            skip.threshold = 1 / (1 + math.exp(-logit))

    def n_batches(sources):
        return sum(len(batches) for batches, start in sources)

    def measure(logit, sources):
        set_threshold(logit)
        capacities = [measured_capacity(model, batches, start) for batches, start in sources]
        bar.update(n_batches(sources))
        return sum(capacities) / len(sources)

    def nearest():
        return min(measured, key=lambda logit: abs(measured[logit] - capacity))

    least = overall_capacity([0.0] * len(skips), model.config.n_layer)
    total = len(LOGITS) * n_batches(subset) + (subset is not full) * n_batches(full)
    with tqdm(total=total, desc="calibration", unit="batch", leave=False) as bar:
        estimates = {logit: measure(logit, subset) for logit in LOGITS}  # {threshold's logit: capacity}
        measured = dict(estimates) if subset is full else {0: measure(0, full)}          # of all texts
        estimates = shifted(estimates, measured[0], least)
        curve = dict(estimates)
        for attempt in range(ATTEMPTS):
            if abs(measured[nearest()] - capacity) < TOLERANCE:
                break
            # at logits of -end and end all gates count as open, and closed: 4 at first, later 16
            end = 4.0 if attempt < 4 and not {-4.0, 4.0} & measured.keys() else 16.0
            known = estimates | measured | {-end: 1.0, end: least}
            low = max(logit for logit, c in known.items() if c >= capacity)
            high = min(logit for logit, c in known.items() if c <= capacity)
            logit = (low + high) / 2
            if known[low] - known[high] < BISECTED_GAP:
                logit = float(np.interp(capacity, [known[high], known[low]], [high, low]))
            if logit in measured:
                break
            bar.total += n_batches(full)
            measured[logit] = measure(logit, full)
            for bound in low, high:
                estimates.pop(bound, None)
    set_threshold(nearest())
    if abs(measured[nearest()] - capacity) > 0.02:
        print(f"calibration: capacity is {measured[nearest()]:.3f}, not {capacity}: no threshold was found"
              " that comes nearer", file=sys.stderr)
    return [(1 / (1 + math.exp(-logit)), c) for logit, c in (curve | measured).items()]
