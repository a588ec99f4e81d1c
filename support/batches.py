"""Samples, see data.py, to batches: which are held out, in which order the others come, padded to tensors."""
from dataclasses import dataclass
from itertools import cycle, islice

import torch

from support.cuda import to_device
from support.files import InputError


def common_prefix(texts):
    """How many ids all texts, lists of ids, start with, leaving each at least one of its own."""
    first, last = min(texts), max(texts)
    n = min(map(len, texts)) - 1
    return next((i for i in range(n) if first[i] != last[i]), n)


def hold_out(samples, most, path):
    """(samples to tune on, the last ones, at most `most` and a fifth of all) of the samples of a file."""
    if len(samples) < 2:
        raise InputError(f"{path}: usable samples: {len(samples)}; give at least 2, of which one is held out")
    n = min(most, max(1, len(samples) // 5))
    return samples[:-n], samples[-n:]


def mixture(sources, weights, seed):
    """Samples of several sources, shuffled, as many as all have together: of each its share of the weights,
    some more than once where it has too few. weights None: each sample once. One source stays as it is."""
    if len(sources) == 1:
        return sources[0]
    rng, n = torch.Generator().manual_seed(seed), sum(map(len, sources))
    weights, mixed = weights or [len(samples) for samples in sources], []
    for samples, weight in zip(sources, weights):
        share = max(1, round(n * weight / sum(weights)))
        order = torch.randperm(len(samples), generator=rng).tolist()
        mixed += [samples[i] for i in islice(cycle(order), share)]
    return [mixed[i] for i in torch.randperm(len(mixed), generator=rng).tolist()]


def batches(samples, budget, seed):
    """Lists of samples, forever: of similar lengths, at most `budget` tokens with padding, shuffled."""
    if not samples:
        raise InputError("there are no samples to make batches of")
    rng = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(samples), generator=rng).tolist()
        groups = []
        for i in range(0, len(order), 256):          # sorted by length in windows of 256: little padding
            groups += pack([samples[j] for j in order[i:i + 256]], budget)
        yield from (groups[i] for i in torch.randperm(len(groups), generator=rng).tolist())


def epochs(samples, per_step, budget, seed):
    """For each step, forever: [(0, a group of at most `budget` tokens)] of `per_step` samples, each once per
    epoch. 0: they are all of one kind, see `alternating`."""
    rng = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(samples), generator=rng).tolist()
        for i in range(0, len(order), per_step):
            yield [(0, group) for group in pack([samples[j] for j in order[i:i + per_step]], budget)]


def alternating(samples_by_kind, budget, per_step, seed):
    """For each step, forever: [(kind, samples of a batch)], `per_step` of them, of each kind in turns."""
    endless = [batches(samples, budget, seed) for samples in samples_by_kind]
    turns = cycle(range(len(samples_by_kind)))
    while True:
        yield [(kind, next(endless[kind])) for kind in islice(turns, per_step)]


def pack(samples, budget, size=lambda s: len(s.ids)):
    """Samples by length, in groups of at most `budget` tokens with padding (a longer one stands alone)."""
    groups = []
    for s in sorted(samples, key=size, reverse=True):
        if not groups or size(groups[-1][0]) * (len(groups[-1]) + 1) > budget:
            groups.append([])
        groups[-1].append(s)
    return groups


@dataclass
class Batch:
    idx: torch.Tensor               # (B, T) token ids, padded on the right with 0
    lengths: torch.Tensor           # (B,)
    prompt_lengths: torch.Tensor    # (B,)
    scored: torch.Tensor            # (B, T) bool: the next token is part of an answer
    targets: torch.Tensor           # (N,) those next tokens

    @classmethod
    def of(cls, samples, device):
        T = max(len(s.ids) for s in samples)
        idx = torch.tensor([s.ids + [0] * (T - len(s.ids)) for s in samples])
        scored = torch.tensor([s.answer[1:] + [False] * (T - len(s.ids) + 1) for s in samples])
        targets = idx.roll(-1, 1)[scored]
        lengths = torch.tensor([len(s.ids) for s in samples])
        prompts = torch.tensor([s.prompt for s in samples])
        return cls(*(to_device(t, device) for t in (idx, lengths, prompts, scored, targets)))
