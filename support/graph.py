"""How a generation is continued by one token per row: an eager step, or on CUDA a captured graph.

    with stepper(model, cache, rows) as step:
        x = step(token, positions)       # token (B,), positions: a list; the residual stream (B, C)

Plain form: run_layers(model.layers, model.embed(token[:, None]), model.step_context(cache, positions,
device)).
"""
import copy
import weakref
from contextlib import contextmanager

import torch

from support.kernels import packed_weights

KEPT_GRAPHS = 4                                     # per model
COLUMNS = 256                                       # of a cache, a multiple: one graph for many prompts
graphs_of = weakref.WeakKeyDictionary()             # {model: {key: Replay}}, the latest last


def release(model):
    """Forget a model's graphs, and the caches that they hold."""
    graphs_of.pop(model, None)


def eager_step(model, token, ctx):
    """The residual stream (B, C) of one token per row."""
    x = model.embed(token[:, None])
    for layer in model.layers:
        x = layer(x, ctx)
    return x[:, 0]


def can_replay(model):
    """Whether a step of generation always runs the same kernels, on CUDA: no gate decides anew for each
    token."""
    decides_each_step = any(getattr(module, "scope", None) == "token" for module in model.modules())
    return model.embed.weight.device.type == "cuda" and not decides_each_step


@contextmanager
def stepper(model, cache, rows):
    """How to continue `cache`, see above. A graph is kept for later generations of the same shape and of the
    same decisions of the gates, which the cache carries."""
    device = model.embed.weight.device
    if not can_replay(model):
        with packed_weights(model, rows):
            def step(token, positions):
                return eager_step(model, token, model.step_context(cache, positions, device))
            yield step
        return
    open_rows = getattr(cache, "open_rows", {})
    decisions = tuple((gate, tuple(indices.tolist())) for gate, indices in open_rows.items())
    columns = min(-(-cache.max_tokens // COLUMNS) * COLUMNS, model.config.max_context)
    model.angles_of(slice(0), columns)                          # makes all that the steps will need
    key = (model.embed.weight.data_ptr(), model.angles[0].data_ptr(), rows, columns, decisions)
    graphs = graphs_of.setdefault(model, {})
    replay = graphs.pop(key, None) or Replay(model, cache, rows, columns)
    graphs[key] = replay
    while len(graphs) > KEPT_GRAPHS:
        del graphs[next(iter(graphs))]
    copy_memory(replay.cache, cache)
    replay.next_positions = None                                # another generation begins
    yield replay


def copy_memory(cache, other):
    """Let `cache` hold another's keys and values, at addresses of its own that stay the same. It may have
    more columns, which are masked until they are written."""
    for mine, theirs in (cache.k, other.k), (cache.v, other.v):
        for i, memory in enumerate(theirs):
            if memory is not None:
                B, K, n, D = memory.shape
                mine[i] = memory.new_zeros(B, K, cache.max_tokens, D) if mine[i] is None else mine[i]
                mine[i][:, :, :n].copy_(memory)


class Replay:
    """A step of generation as a CUDA graph: captured once, its kernels run again without Python. They work at
    fixed addresses: it has a cache, tokens and positions of its own, which advance with each step, and
    attends to all columns, masked."""

    def __init__(self, model, cache, rows, columns):
        self.model = weakref.proxy(model)                       # the model's graphs do not keep the model
        self.cache = copy.copy(cache)                           # the same decisions
        self.cache.max_tokens = columns
        self.cache.k, self.cache.v = [None] * len(cache.k), [None] * len(cache.v)
        copy_memory(self.cache, cache)
        self.angles = model.angles                              # which the model replaces when it needs more
        self.token = torch.zeros(rows, dtype=torch.int64, device=model.embed.weight.device)
        self.positions = torch.zeros_like(self.token)
        self.x, self.replay = self.capture()

    def step(self):
        ctx = self.model.ragged_context(self.cache, self.positions, self.cache.max_tokens)
        x = eager_step(self.model, self.token, ctx)
        self.positions += 1
        return x

    def capture(self):
        with torch.cuda.device(self.token.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.step()                          # a first run, for what is allocated and chosen only once
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                x = self.step()
        return x, graph.replay

    def __call__(self, token, positions):
        self.token.copy_(token)
        if positions != self.next_positions:                    # the first step of a generation
            self.positions.copy_(torch.tensor(positions))
        self.next_positions = [position + 1 for position in positions]
        self.replay()
        return self.x
