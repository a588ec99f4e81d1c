"""Replayed steps of generation, all but the capture itself."""
import copy
import gc
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, write_tiny
from test_router import LENGTHS, routed, tokens
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import skipping
from model import Cache, Config, Llama, rotate, swiglu
from router import (
    GATES,
    GRANULARITIES,
    LinearRouter,
    add_routers,
    capacity,
    close_all,
    dense,
    mindskips,
    trace,
)
from scoring import Usage
from support import cuda, graph
from support.attention import store
from support.cuda import plain_kernels
from support.kernels import logit
from timing import Removed, open_share


def replay_eagerly(monkeypatch, noted=id):
    """Let steps be replayed without capture: the step runs again, at the same addresses. Returns a list that
    gets noted(replay) of each new replay."""
    notes = []

    class Eager(graph.Replay):
        def capture(self):
            notes.append(noted(self))
            x = self.step()
            return x, lambda: x.copy_(self.step())

    monkeypatch.setattr(graph, "Replay", Eager)
    monkeypatch.setattr(graph, "can_replay", lambda model: True)
    return notes


@pytest.mark.parametrize("family, kind", [
    *product(["grouped queries", "Mistral with a window"], [None, *GRANULARITIES]),
    ("grouped queries", "attn_token open"), ("Qwen3", "block_token open")])
def test_replayed_steps_give_the_same_tokens(family, kind, tmp_path, monkeypatch):
    """All but the capture itself, on a CPU: a step at fixed addresses, with decisions as data."""
    monkeypatch.setattr(graph, "COLUMNS", 16)
    write_tiny(tmp_path, family)
    granularity, _, kv = kind.partition(" ") if kind else (None, "", "")
    model = Llama.from_pretrained(tmp_path)
    if granularity:
        model = routed(tmp_path, granularity, kv=kv or "all")
    prompts = [tokens(seed=1), tokens(seed=2), tokens(seed=1), tokens(seed=1)[:3]]
    lengths = [LENGTHS, LENGTHS, None, LENGTHS[:3]]
    expected, shares = [], []
    for idx, n in zip(prompts, lengths):
        expected.append(model.generate(idx, 9, lengths=n))
        shares.append(capacity(model) if granularity else None)
    made = replay_eagerly(monkeypatch)
    for idx, n, out, share in zip(prompts * 2, lengths * 2, expected * 2, shares * 2):
        assert torch.equal(model.generate(idx, 9, lengths=n), out)
        assert granularity is None or capacity(model) == pytest.approx(share)
    assert len(made) == 2                                  # a graph for each number of rows
    assert len(graph.graphs_of[model]) <= graph.KEPT_GRAPHS


def test_a_graph_is_not_used_after_the_angles_that_it_reads_were_replaced(tmp_path, monkeypatch):
    """40 + 8 tokens, 600 + 8, then 40 + 8 again: in between the model made longer tables of angles, and let
    the first ones go. A graph keeps what it reads; it is captured anew where the model reads other tables."""
    monkeypatch.setitem(TINY, "max_position_embeddings", 2048)
    write_tiny(tmp_path)
    tables = replay_eagerly(monkeypatch, lambda replay: weakref.ref(replay.model.angles[0]))
    model, replays = Llama.from_pretrained(tmp_path), []
    for length in 40, 600, 40, 40:
        model.generate(torch.randint(0, 320, (1, length)), 8)
        replays.append(list(graph.graphs_of[model].values())[-1])
    assert len(tables) == 3 and replays[2] is replays[3]
    assert replays[0].angles[0] is not model.angles[0] and replays[2].angles[0] is model.angles[0]
    assert all(table() is not None for table in tables)        # alive as long as their graphs are kept


def test_one_graph_serves_prompts_of_many_lengths_and_is_released(tiny, monkeypatch):
    """Ten prompts of ten lengths, one capture; positions are copied once for each generation."""
    copies, real = [], graph.torch.tensor

    def tensor(values, **options):
        copies.append(values)
        return real(values, **options)

    model = Llama.from_pretrained(tiny)
    prompts = [torch.randint(0, 320, (2, n)) for n in range(20, 30)]
    expected = [model.generate(prompt, 7) for prompt in prompts]
    captures = replay_eagerly(monkeypatch, lambda replay: weakref.ref(replay.positions))
    monkeypatch.setattr(graph.torch, "tensor", tensor)
    for prompt, out in zip(prompts, expected):
        copies.clear()
        assert torch.equal(model.generate(prompt, 7), out)
        assert copies.count([prompt.shape[1]] * 2) == 1 and [prompt.shape[1] + 1] * 2 not in copies
    assert len(captures) == 1 and captures[0]() is not None
    graph.release(model)
    gc.collect()                                                # Eager is a cycle
    assert captures[0]() is None and model not in graph.graphs_of


def test_a_generation_of_one_token_captures_nothing(tiny, monkeypatch):
    model = Llama.from_pretrained(tiny)
    captures = replay_eagerly(monkeypatch)
    out = model.generate(tokens(), 1)
    assert not captures and not graph.graphs_of[model]
    assert torch.equal(model.generate(tokens(), 2)[:, :-1], out) and len(captures) == 1


def test_the_caches_of_kept_graphs_are_bounded(tiny, monkeypatch):
    """Batches of ever other numbers of rows make ever new graphs, each with a cache."""
    model = Llama.from_pretrained(tiny)
    replay_eagerly(monkeypatch)
    for kept_bytes, kept in (2**32, 3), (0, 1):
        monkeypatch.setattr(graph, "KEPT_BYTES", kept_bytes)
        for rows in 1, 2, 3:
            model.generate(torch.randint(0, 320, (rows, 20)), 4)
        assert len(graph.graphs_of[model]) == kept


def test_a_generation_within_another(tiny, monkeypatch):
    """Of as many rows: it has a graph of its own."""
    model, idx = routed(tiny, "attn_sequence"), tokens(2, 20)
    expected = model.generate(idx, 8)
    replay_eagerly(monkeypatch)

    def another(token):
        model.generate(idx + 1, 3)
    assert torch.equal(model.generate(idx, 8, on_token=another), expected)


def test_routed_and_dense_generations_in_turns(tiny, monkeypatch):
    """Each replays its own graph."""
    model, idx = routed(tiny, "attn_token"), tokens(2, 20)
    with dense(model):
        dense_out = model.generate(idx, 8)
    out = model.generate(idx, 8)
    assert not torch.equal(out, dense_out)
    made = replay_eagerly(monkeypatch)
    for _ in range(2):
        assert torch.equal(model.generate(idx, 8), out)
        with dense(model):
            assert torch.equal(model.generate(idx, 8), dense_out)
    assert len(made) == 2


def test_a_capture_is_on_its_models_device(monkeypatch):
    """Not on the current one: here cuda:1 is the model's."""
    current = ["cuda:0"]

    @contextmanager
    def device(name):
        outer, current[0] = current[0], name
        yield
        current[0] = outer

    def capturing(made, stream):
        assert current == ["cuda:1"] and stream == "side of cuda:1"
        return nullcontext()
    stream = SimpleNamespace(wait_stream=lambda other: None)
    side = type("Side", (str,), {"wait_stream": lambda self, other: None})
    fakes = {"device": device, "current_stream": lambda: stream, "stream": lambda side: nullcontext(),
             "CUDAGraph": lambda: SimpleNamespace(replay="replay"), "graph": capturing}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(graph, "side_stream", lambda device: side(f"side of {device}"))
    replay = SimpleNamespace(token=SimpleNamespace(device="cuda:1"), step=lambda: current[0])
    assert graph.Replay.capture(replay) == ("cuda:1", "replay") and current == ["cuda:0"]


def test_which_steps_are_replayed(tiny, monkeypatch):
    """On CUDA all but those whose decisions are traced, and those of kv="open" with a window."""
    monkeypatch.setattr(graph, "triton_module", lambda: cuda)
    model = Llama.from_pretrained(tiny)
    assert not graph.can_replay(model)
    cases = [*product(GRANULARITIES, ["all"], [None, 12]), ("attn_token", "open", None),
             ("block_token", "open", 12)]
    for granularity, kv, window in cases:
        elsewhere = copy.deepcopy(add_routers(model, granularity, kv=kv))
        elsewhere.config = replace(model.config, sliding_window=window)
        del elsewhere.embed
        elsewhere.embed = SimpleNamespace(weight=SimpleNamespace(device=torch.device("cuda")))
        if kv == "open" and window:
            assert not graph.can_replay(elsewhere)
            continue
        assert graph.can_replay(elsewhere)
        with dense(elsewhere):
            assert graph.can_replay(elsewhere)
        with trace(elsewhere):
            assert not graph.can_replay(elsewhere)
        with plain_kernels():
            assert not graph.can_replay(elsewhere)
        with monkeypatch.context() as m:
            m.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
            assert not graph.can_replay(elsewhere)
        hook = elsewhere.layers[2].register_forward_hook(lambda module, args, y: None)
        assert not graph.can_replay(elsewhere)                 # which a replay would not call
        hook.remove()
        gate = graph.active_skips(elsewhere)[0]
        gate.override = close_all                              # reads no number of the host
        assert graph.can_replay(elsewhere)
        gate.override = lambda score, ctx: score * (ctx.end > 9)
        assert not graph.can_replay(elsewhere)
        gate.override = None
        monkeypatch.setattr(graph, "triton_module", lambda: None)
        assert not graph.can_replay(elsewhere)
        monkeypatch.setattr(graph, "triton_module", lambda: cuda)


def test_a_graph_is_not_used_after_the_model_changed(tiny, monkeypatch):
    """A part removed, other weights, another threshold: what was captured is not what would run."""
    changes = [lambda model: setattr(model.layers[1], "attn", Removed()),
               lambda model: setattr(model.layers[2].mlp.down, "weight",
                                     nn.Parameter(2 * model.layers[2].mlp.down.weight)),
               lambda model: [setattr(gate, "threshold", 0.6) for gate in graph.active_skips(model)]]
    model, again, idx = routed(tiny, "attn_token"), routed(tiny, "attn_token"), tokens(2, 20)
    for change in [lambda model: None, *changes]:
        change(model)
        change(again)
        with torch.no_grad(), monkeypatch.context() as patch:
            expected = again.generate(idx, 12)
            replay_eagerly(patch)
            assert torch.equal(model.generate(idx, 12), expected)
    assert len(graph.graphs_of[model]) == 4


def test_a_graph_is_not_used_after_a_gates_buffer_was_replaced(tiny, monkeypatch):
    class Shifted(LinearRouter):
        def __init__(self, *args):
            super().__init__(*args)
            self.register_buffer("shift", torch.zeros(1))

        def forward(self, read):
            return super().forward(read) + self.shift
    monkeypatch.setitem(GATES, "shifted", Shifted)
    model, again = (routed(tiny, "attn_token", gate="shifted") for _ in range(2))
    idx = tokens(2, 20)
    for shift in 0.0, 0.5, -0.5:
        for skip in [*mindskips(model).values(), *mindskips(again).values()]:
            skip.router.shift = torch.full((1,), shift)
        with torch.no_grad(), monkeypatch.context() as patch:
            expected = again.generate(idx, 12)
            replay_eagerly(patch)
            assert torch.equal(model.generate(idx, 12), expected)
    assert len(graph.graphs_of[model]) == 3


def test_graphs_made_in_inference_mode_serve_outside_of_it(tiny, monkeypatch):
    model, idx = routed(tiny, "attn_token"), tokens(2, 20)
    expected = model.generate(idx, 5)
    model.angles = None
    replay_eagerly(monkeypatch)
    with torch.inference_mode():
        assert torch.equal(model.generate(idx, 5), expected)
    assert torch.equal(model.generate(idx, 5), expected)
    model.train()(idx).sum().backward()


class Kernels(TorchDispatchMode):
    """Counts what would be launched: PyTorch's operations but for views and allocations, and Triton's
    kernels, in whose place it computes their plain forms."""

    def __init__(self):
        super().__init__()
        self.names, self.plain = [], False

    def rms_norm(self, x, weight, eps):
        return self.one("rms_norm", F.rms_norm, x, weight.shape, weight, eps)

    def linear(self, x, weight, bias, is_open, plus, n_gated):
        def plain(x, weight, bias):
            return F.linear(x, weight, bias) + (0 if plus is None else plus)
        return self.one("linear", plain, x, weight, bias)

    def attention_of_token(self, q, k, v, mask, is_open):
        self.names.append("attention, joined")
        return self.one("attention, in parts", F.scaled_dot_product_attention, q, k, v, mask, 0.0, False,
                        enable_gqa=True)

    def rotate(self, *arguments):
        return self.one("rotate", rotate.__wrapped__, *arguments)

    def swiglu(self, *arguments):
        return self.one("swiglu", swiglu.__wrapped__, *arguments)

    def logit(self, *arguments):
        return self.one("logit", logit.__wrapped__, *arguments)

    def attention_of_some(self, q, *arguments):
        return self.one("attention of some", torch.zeros_like, q)          # only counted

    def rotate_some(self, *arguments):
        return self.one("rotate_some", skipping.rotate_some.__wrapped__, *arguments)

    def store(self, *arguments):
        return self.one("store", store.__wrapped__, *arguments)

    def one(self, name, plain, *arguments, **options):
        self.names.append(name)
        self.plain = True
        try:
            return plain(*arguments, **options)
        finally:
            self.plain = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aliases = [result.alias_info for result in func._schema.returns]
        is_view = all(alias is not None and not alias.is_write for alias in aliases)
        if not self.plain and not is_view and "empty" not in str(func):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("granularity, kv, expected", [
    (None, "all", 11),                       # norm, qkv, rotation, store, attention (2), o; the MLP: 4
    ("attn_sequence", "all", 12),            # also: where
    ("attn_token", "all", 15),               # and logit, sigmoid, >=
    ("block_token", "all", 15), ("mlp_token", "all", 15), ("attn_token", "open", 22),
])
def test_a_captured_step_waits_for_nothing_and_launches_few_kernels(granularity, kv, expected, monkeypatch):
    """On tensors without numbers: what asks for one, or mixes them with the host's, raises."""
    class Eager(graph.Replay):
        def capture(self):
            with Kernels() as self.kernels:
                monkeypatch.setattr(cuda, "triton_kernels", lambda x: self.kernels)
                return self.step(), None

    names = []
    for n_layer in 1, 2:
        config = Config(n_layer, 4, 2, 64, 96, 320, 16, 512)
        with torch.device("meta"), torch.no_grad():
            model = Llama(config).bfloat16().eval()
            if granularity:
                add_routers(model, granularity, kv=kv)
            table = torch.empty(512, 16, dtype=torch.bfloat16)
            model.angles = table, table
        with torch.no_grad():
            names.append(Eager(model, Cache, 1, 256).kernels.names)
    assert len(names[1]) - len(names[0]) == expected, names[0]
    assert len(names[0]) - expected < 16                       # the embedding, the mask, angles, positions


@pytest.mark.parametrize("granularity, kv, gathers, expected", [
    (None, "all", False, 15), ("attn_token", "all", True, 24), ("attn_token", "all", False, 20),
    ("block_token", "all", True, 22), ("attn_token", "open", True, 36)])
def test_a_prompt_launches_few_kernels(granularity, kv, gathers, expected, monkeypatch):
    """Of one layer, half open; on the path that CUDA takes, but for the copies to the host and back."""
    def on_the_host(function):
        return lambda *arguments: kernels.one("", function, *arguments)

    kernels = Kernels()
    for name in "open_indices", "open_tokens":
        monkeypatch.setattr(skipping, name, on_the_host(getattr(skipping, name)))
    monkeypatch.setattr(skipping, "is_asynchronous", lambda t: True)
    monkeypatch.setattr(skipping, "GATHERED_FROM", 0 if gathers else 2**60)
    names = []
    for n_layer in 1, 2:
        model = Llama(Config(n_layer, 4, 2, 64, 96, 320, 16, 512)).eval()
        if granularity:
            add_routers(model, granularity, kv=kv)
            open_share(model, 0.5, 0)
        model(idx := torch.randint(320, (2, 24)))                            # makes angles, and draws gates
        kernels.names.clear()
        with torch.no_grad(), kernels, monkeypatch.context() as patch:
            patch.setattr(cuda, "triton_kernels", lambda x: kernels)
            model(idx)
        names.append([name for name in kernels.names if name])
    assert len(names[1]) - len(names[0]) == expected, names[0]


class Waits(TorchDispatchMode):
    """Counts where the host reads what a device computed: numbers, and sizes that depend on values."""
    WAITING = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default,
               torch.ops.aten.masked_select.default, torch.ops.aten.equal.default}
    INDEXING = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_}

    def __init__(self, monkeypatch):
        super().__init__()
        self.n = 0
        for name in "tolist", "numpy":                         # these are not dispatched on a CPU
            monkeypatch.setattr(torch.Tensor, name, self.counted(getattr(torch.Tensor, name)))
        monkeypatch.setattr(skipping, "to_host", self.counted(skipping.to_host))
        for name in "open_indices", "open_tokens", "attention_of_some":          # the last is a kernel there
            monkeypatch.setattr(skipping, name, self.uncounted(getattr(skipping, name)))

    def uncounted(self, function):
        """For what reads a copy that the host has."""
        def run(*args):
            before = self.n
            indices = function(*args)
            self.n = before
            return indices
        return run

    def counted(self, function):
        def run(*args):
            self.n += 1
            return function(*args)
        return run

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func in self.WAITING
        if func.overloadpacket in self.INDEXING:               # by a mask, whose ones have to be counted
            self.n += any(index is not None and index.dtype == torch.bool for index in args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("granularity, kv, is_small", [
    *product(GRANULARITIES, ["all"], [False, True]), ("attn_token", "open", True)])
def test_a_prompt_waits_once_for_each_layer_that_decides(granularity, kv, is_small, tiny, monkeypatch):
    """And once for its lengths. On the path that CUDA takes, where keys are computed while the host waits; a
    small prompt does not wait for the gates of its tokens."""
    model, idx = routed(tiny, granularity, kv=kv), tokens()
    waits_for = granularity.endswith("sequence") or kv == "open" or not is_small
    n_routed = len(mindskips(model)) if waits_for else 0
    monkeypatch.setattr(skipping, "is_asynchronous", lambda t: True)
    work = idx.numel() * model.config.n_embd * (idx.shape[1] + model.config.n_embd)
    monkeypatch.setattr(skipping, "GATHERED_FROM", work + is_small)
    with torch.no_grad(), Waits(monkeypatch) as waits:         # (in inference mode .item() is not dispatched)
        with dense(model):
            model(idx, LENGTHS)
        before = waits.n
        model(idx, LENGTHS)
    assert before == 1 and waits.n == 2 + n_routed


def test_usage_waits_in_its_summary_alone(tiny, monkeypatch):
    model = routed(tiny, "attn_token")
    monkeypatch.setattr(skipping, "is_asynchronous", lambda t: True)
    with torch.no_grad(), Waits(monkeypatch) as waits:
        usage = Usage(model)
        for _ in range(2):
            model(tokens(), LENGTHS)
            before = waits.n
            usage.add()
            assert waits.n == before
        assert usage.summary()["capacity"] == pytest.approx(capacity(model))
