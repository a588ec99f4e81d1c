"""How a generation is continued by one token per row: an eager step, or on CUDA a captured graph.

    with stepper(model, cache, rows) as step:
        x = step(token, positions)       # token (B,), positions: a list; the residual stream (B, C)

Plain form: run_layers(model.layers, model.embed(token[:, None]), model.step_context(cache, positions,
device)).
"""
import weakref
from contextlib import contextmanager
from dataclasses import replace

import torch

from support.cuda import choices, triton_module
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


def gates(model):
    """The MindSkips of a model, but for those that are bypassed."""
    return [module for module in model.modules() if hasattr(module, "bypass") and not module.bypass]


def can_replay(model):
    """Whether a step of generation can be captured, on CUDA, and is worth it."""
    if model.embed.weight.device.type != "cuda" or not choices["triton"]:
        return False
    return all(can_capture(gate, model.config.sliding_window) for gate in gates(model))


def can_capture(gate, window):
    """`trace` copies decisions to the host; an override may read what only the host knows, unless it says so;
    `merge` may gather tokens; a window is of positions, and with kv="open" columns are not positions; and
    without Triton a closed gate would save nothing."""
    on_device = gate.override is None or getattr(gate.override, "on_device", False)
    on_device = on_device and gate.trace is None and not gate.merges
    return on_device and (gate.kv == "all" or not window) and triton_module()


@contextmanager
def stepper(model, cache, rows):
    """How to continue `cache`, see above. A graph is kept for later generations of as many rows."""
    device = model.embed.weight.device
    if not can_replay(model):
        with packed_weights(model, rows):
            def step(token, positions):
                return eager_step(model, token, model.step_context(cache, positions, device))
            yield step
        return
    columns = min(-(-cache.max_tokens // COLUMNS) * COLUMNS, model.config.max_context)
    model.make_angles(columns)
    settings = tuple((gate, gate.threshold, gate.override) for gate in gates(model))
    addresses = tuple(tensor.data_ptr() for tensor in (*model.parameters(), *model.angles))
    key = (addresses, rows, columns, settings)                  # all that a captured step depends on
    graphs = graphs_of.setdefault(model, {})
    replay = graphs.pop(key, None)
    while len(graphs) >= KEPT_GRAPHS:
        del graphs[next(iter(graphs))]
    replay = graphs[key] = replay or Replay(model, type(cache), rows, columns)
    replay.begin(cache)
    try:
        yield replay
    finally:
        replay.count()


class Replay:
    """A step of generation as a CUDA graph: captured once, its kernels run again without Python. They work at
    fixed addresses: it has a cache, tokens, positions and decisions of its own, advances the positions with
    each step, and attends to all columns, masked."""

    @torch.inference_mode(False)                                # they are used again, in whatever mode
    @torch.no_grad()
    def __init__(self, model, make_cache, rows, columns):
        self.model = weakref.proxy(model)                       # the model's graphs do not keep the model
        self.angles = model.angles                              # which the model replaces when it needs more
        weight, config = model.embed.weight, model.config
        self.token = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        self.positions = torch.zeros_like(self.token)
        self.cache = make_cache(config, columns)
        for memory in self.cache.k, self.cache.v:
            for layer in range(config.n_layer):
                memory[layer] = weight.new_zeros(rows, config.n_kv_head, columns, config.head_dim)
        self.gates = gates(model)
        self.cache.is_open = {gate: self.token.bool() for gate in self.gates if gate.scope == "sequence"}
        self.cache.n_open = {gate: self.token.clone() for gate in self.gates if gate.kv == "open"}
        self.cache.decisions = {}                               # token level: {MindSkip: (rows,)} of the step
        self.opened = torch.zeros(len(self.gates), dtype=torch.int64, device=weight.device)
        self.x, self.replay = self.capture()

    def step(self):
        ctx = self.model.ragged_context(self.cache, self.positions, self.cache.max_tokens)
        x = eager_step(self.model, self.token, replace(ctx, captured=True))
        self.positions += 1
        if self.cache.decisions:
            self.opened += torch.stack(list(self.cache.decisions.values())).sum(1)
        return x

    def capture(self):
        with torch.cuda.device(self.token.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.step()                          # a first run, for what is allocated and chosen only once
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                x = self.step()
        return x, graph.replay

    def begin(self, cache):
        """Take over a prompt's keys, values and decisions; its cache holds this one's memory from then on."""
        open_rows = getattr(cache, "open_rows", {})             # sequence level: {MindSkip: indices}
        stored = {gate.attn.layer: rows for gate, rows in open_rows.items() if gate.attn}
        for mine, theirs in (self.cache.k, cache.k), (self.cache.v, cache.v):
            for layer, memory in enumerate(theirs):
                n = min(memory.shape[2], self.cache.max_tokens) if memory is not None else 0
                if n and layer in stored:                       # n is 0: no row opened it
                    mine[layer][:, :, :n].index_copy_(0, stored[layer], memory[:, :, :n])
                elif n:
                    mine[layer][:, :, :n] = memory[:, :, :n]
                theirs[layer] = mine[layer]
        for gate, is_open in self.cache.is_open.items():
            is_open.zero_().index_fill_(0, open_rows[gate], True)
        for gate, n_open in self.cache.n_open.items():
            n_open.copy_(torch.tensor(cache.open_keys[gate].n))
        self.opened.zero_()
        self.n_steps, self.next_positions = 0, None

    def __call__(self, token, positions):
        self.token.copy_(token)
        if positions != self.next_positions:                    # the first step of a generation
            self.positions.copy_(torch.tensor(positions))
        self.next_positions = [position + 1 for position in positions]
        self.n_steps += 1
        self.replay()
        return self.x

    def count(self):
        """Tell the gates how many were open in this generation."""
        if self.cache.decisions:
            for gate, n_open in zip(self.gates, self.opened.tolist()):
                gate.opened += n_open
                gate.seen += self.n_steps * len(self.token)
