"""Decoding, one token per row and step: eager, or on CUDA a captured graph.

    with stepper(model, cache, rows) as step:
        x = step(token, positions)       # token (B,), positions: a list; the residual stream (B, C)

Plain form: model.step(token, model.step_context(cache, positions)).
"""
import functools
import weakref
from contextlib import contextmanager
from dataclasses import replace

import torch

from support.cuda import choices, to_device, triton_module
from support.kernels import packed_weights

KEPT_GRAPHS, KEPT_BYTES = 4, 2**32                  # per model: most graphs, and most bytes of their caches
COLUMNS = 256                                       # caches have a multiple of this: one graph, many prompts
graphs_of = weakref.WeakKeyDictionary()             # {model: {key: Replay}}, the last used last


def release(model):
    """Forget a model's graphs, and the caches that they hold."""
    graphs_of.pop(model, None)


def active_skips(model):
    """The MindSkips of a model, but for those that are bypassed."""
    return [module for module in model.modules() if hasattr(module, "bypass") and not module.bypass]


def can_replay(model):
    """Whether a step of generation can be captured, on CUDA, and is worth it."""
    if model.embed.weight.device.type != "cuda" or not choices.triton:
        return False
    if torch.is_autocast_enabled("cuda"):            # its casts would be captured, but are not in the key
        return False
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return False                                 # a replayed step calls none
    return all(can_capture(skip, model.config.sliding_window) for skip in active_skips(model))


def can_capture(skip, window):
    """Not with a trace, which needs Python in every step; nor an override that may read the host, nor a
    `merge`, which may gather tokens; nor a window with kv="open", where columns are not positions; nor
    without Triton, where a closed gate would save nothing."""
    on_device = skip.override is None or getattr(skip.override, "on_device", False)
    on_device = on_device and skip.trace is None and not skip.merges
    return on_device and (skip.kv == "all" or not window) and triton_module()


@contextmanager
def stepper(model, cache, rows):
    """How to continue `cache`, see above. A graph is kept for later generations of as many rows."""
    if not can_replay(model):
        with packed_weights(model, rows):
            yield lambda token, positions: model.step(token, model.step_context(cache, positions))
        return
    columns = min(-(-cache.max_tokens // COLUMNS) * COLUMNS, model.config.max_context)
    model.make_angles(columns)
    settings = tuple((skip, skip.threshold, skip.override) for skip in active_skips(model))
    tensors = *model.parameters(), *model.buffers(), *model.angles
    addresses = tuple(tensor.data_ptr() for tensor in tensors)
    key = (addresses, rows, columns, settings)                  # all that a captured step depends on
    graphs, replay = graphs_of.setdefault(model, {}), None

    def step(token, positions):
        nonlocal replay
        if replay is None:                                      # only now: a generation may have no step
            kept = graphs.pop(key, None)                        # taken out: no other generation may use it
            while len(graphs) >= KEPT_GRAPHS or sum(r.cache.bytes() for r in graphs.values()) > KEPT_BYTES:
                del graphs[next(iter(graphs))]
            kept = kept or Replay(model, type(cache), rows, columns)
            kept.begin(cache)
            replay = kept
        return replay(token, positions)
    try:
        yield step
    finally:
        if replay:
            replay.count()
            graphs[key] = replay


@functools.cache
def side_stream(device):
    """The stream for captures, one per device: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


class Replay:
    """A decoding step as a CUDA graph: captured once, its kernels run again without Python. They use fixed
    addresses, so a Replay owns its cache, tokens, positions and decisions. Each step advances the positions,
    and attends to all columns, masked."""

    @torch.inference_mode(False)                                # its tensors outlive the caller's mode
    @torch.no_grad()
    def __init__(self, model, make_cache, rows, columns):
        self.model = weakref.proxy(model)                       # weak: graphs must not keep a model alive
        self.angles = model.angles                              # which the model replaces when it needs more
        weight, config = model.embed.weight, model.config
        self.token = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        self.positions = torch.zeros_like(self.token)
        self.cache = make_cache(config, columns)
        for memory in self.cache.k, self.cache.v:
            for layer in range(config.n_layer):
                memory[layer] = weight.new_zeros(rows, config.n_kv_head, columns, config.head_dim)
        self.skips = active_skips(model)
        self.is_open = {skip: self.token.bool() for skip in self.skips if skip.scope == "sequence"}
        self.n_open = {skip: self.token.clone() for skip in self.skips if skip.kv == "open"}
        self.decisions = {}                                     # token level: {MindSkip: (rows,)} of the step
        self.cache.routing = {"is open": self.is_open, "n open": self.n_open, "decisions": self.decisions}
        self.opened = torch.zeros(len(self.skips), dtype=torch.int64, device=weight.device)
        self.x, self.launch = self.capture()

    def step(self):
        ctx = self.model.ragged_context(self.cache, self.positions, self.cache.max_tokens)
        x = self.model.step(self.token, replace(ctx, captured=True))
        self.positions += 1
        if self.decisions:
            self.opened += torch.stack(list(self.decisions.values())).sum(1)
        return x

    def capture(self):
        with torch.cuda.device(self.token.device):
            side = side_stream(self.token.device)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.step()                          # a first run, for what is allocated and chosen only once
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                x = self.step()
        return x, graph.replay

    def begin(self, cache):
        """Copy a prompt's keys, values and decisions; its cache then uses this one's memory."""
        open_rows = {skip: to_device(rows, self.token.device)               # sequence level
                     for skip, rows in cache.routing["open rows"].items()}
        stored = {skip.attn.layer: rows for skip, rows in open_rows.items() if skip.attn}
        for mine, theirs in (self.cache.k, cache.k), (self.cache.v, cache.v):
            for layer, memory in enumerate(theirs):
                n = min(memory.shape[2], self.cache.max_tokens) if memory is not None else 0
                if n and layer in stored:                       # only the rows that are open
                    mine[layer][:, :, :n].index_copy_(0, stored[layer], memory[:, :, :n])
                elif n:
                    mine[layer][:, :, :n] = memory[:, :, :n]
                mine[layer][:, :, n:] = 0                       # masked, but old numbers could be NaN
                theirs[layer] = mine[layer]
        for skip, is_open in self.is_open.items():
            is_open.zero_().index_fill_(0, open_rows[skip], True)
        for skip, n_open in self.n_open.items():
            n_open.copy_(to_device(torch.tensor(cache.routing["open keys"][skip].n), n_open.device))
        self.opened.zero_()
        self.n_steps, self.next_positions = 0, None

    def __call__(self, token, positions):
        self.token.copy_(token)
        if positions != self.next_positions:                    # the first step of a generation
            self.positions.copy_(to_device(torch.tensor(positions), self.positions.device))
        self.next_positions = [position + 1 for position in positions]
        self.n_steps += 1
        self.launch()
        return self.x

    def count(self):
        """Tell the MindSkips how many were open in this generation."""
        if self.decisions:
            for skip, n_open in zip(self.skips, self.opened.tolist()):
                skip.opened += n_open
                skip.seen += self.n_steps * len(self.token)
