"""Capacity as it is asked for: after tuning, the threshold moves until as many gates are open."""
import math

import numpy as np
import torch
from tqdm import tqdm

from model import run_layers
from router import decisions_on, mindskips, overall_capacity, trace
from support import parallel
from support.data import PLAIN_PROMPT, Batch, Sample, common_beginning, pack, pieces

TRAINING_SAMPLES = 24                                # read by the calibration, beside text of the model's own
LOGITS = 0.5, 0.25, 0.12, 0, -0.12, -0.25, -0.5      # of the thresholds that are measured first
ERROR = 0.003                                        # of the capacity, that is small enough


@torch.no_grad()
def measured_capacity(model, batches, start=0):
    """Overall capacity on batches, which processes share, of decisions (score >= threshold): all tokens from
    column `start` on, or all sequences, count. Logits are not computed."""
    n_open = n_seen = 0
    for batch, counts in parallel.share(batches):
        ctx = model.context(batch.idx, batch.lengths, batch.prompt_lengths)
        with trace(model) as decisions:
            run_layers(model.layers, model.embed(batch.idx), ctx)
        if not counts:
            continue
        column = torch.arange(batch.idx.shape[1])
        tokens = (column >= start) & (column < batch.lengths.cpu()[:, None])     # (B, T)
        is_open = decisions_on(decisions, tokens)
        n_open += int(is_open.sum())
        n_seen += len(is_open)
    n_open, n_seen = parallel.summed(n_open, n_seen)
    return overall_capacity([n_open / n_seen] * len(mindskips(model)), model.config.n_layer)


def calibration_batches(gates_read_prompts, samples, own_ids, tokens, device):
    """[(batches of training samples, first column that counts), (batches of the model's own text (n, T), 0)]:
    whole ones for gates that read tokens. For gates that read prompts, the prompts of 8 times as many
    samples: there is one decision per sequence."""
    if gates_read_prompts:
        samples = [Sample(s.ids[:s.prompt], s.answer[:s.prompt], s.prompt)
                   for s in samples[:8 * TRAINING_SAMPLES]]
        own_samples = pieces(own_ids, PLAIN_PROMPT)
    else:
        samples = samples[:TRAINING_SAMPLES]
        own_samples = pieces(own_ids, own_ids.shape[1])
    texts = [s.ids for s in samples]
    template = common_beginning(texts) if min(texts) < max(texts) else 0
    return [([Batch.of(group, device) for group in pack(source, tokens)], start)
            for source, start in ((samples, template), (own_samples, 0))]


def calibrate(model, samples, own_ids, capacity, tokens):
    """Set the threshold that gives an overall capacity; returns all measured [(threshold, capacity)].

    samples: of the training data; own_ids: token ids (n, T) that the model wrote, with equal weight, since
    other text opens other gates. What all samples begin with, the template of a chat, does not count. First a
    grid of thresholds, from which `load_routers` reads other capacities; then the one that lies on the line
    between its neighbours, up to eight times, until it gives the capacity.
    """
    model.eval()
    skips = list(mindskips(model).values())
    gates_read_prompts = skips[0].scope == "sequence" and skips[0].router.pool == "prompt"
    sources = calibration_batches(gates_read_prompts, samples, own_ids, tokens, model.embed.weight.device)
    measured = {}                                                        # {threshold's logit: capacity}
    least = overall_capacity([0.0] * len(skips), model.config.n_layer)

    def set_threshold(logit):
        for skip in skips:
            skip.threshold = 1 / (1 + math.exp(-logit))

    def measure(logit):
        set_threshold(logit)
        capacities = [measured_capacity(model, batches, start) for batches, start in sources]
        measured[logit] = sum(capacities) / len(capacities)
        bar.update()

    def nearest():
        return min(measured, key=lambda logit: abs(measured[logit] - capacity))

    with tqdm(total=len(LOGITS) + 2, desc="calibration", unit="threshold", leave=False) as bar:
        for logit in LOGITS:
            measure(logit)
        for attempt in range(8):
            if abs(measured[nearest()] - capacity) < ERROR:
                break
            end = 4.0 if attempt < 4 else 16.0                           # where all are open, or closed
            known = {-end: 1.0, end: least} | measured
            of_less = min(logit for logit, c in known.items() if c <= capacity)
            of_more = max(logit for logit, c in known.items() if c >= capacity)
            measure(float(np.interp(capacity, [known[of_less], known[of_more]], [of_less, of_more])))
    set_threshold(nearest())
    return [(1 / (1 + math.exp(-logit)), c) for logit, c in measured.items()]
