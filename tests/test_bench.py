"""bench.py on a tiny model: what it prints and writes, and what it refuses."""
import json
import math
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import is_one_sentence, write_tiny
from torch.utils.flop_counter import FlopCounterMode

import bench
import timing
from bench import FIELDS, interval
from model import Llama
from router import GRANULARITIES, add_routers, capacity, load_routers, mindskips, save_routers
from support import cuda
from support.machine import Work


def test_bench_writes_every_variant(tiny, call, tmp_path):
    status, said = call(bench.main, "--model", tiny, "--device", "cpu", "--phase", "prefill,decode,train",
                        "--batch", 3, "--context", 40, "--capacity", "0.5,0.75", "--granularity",
                        "attn_sequence,block_token", "--rounds", 2, "--against", "transformers,masked",
                        "--json", tmp_path / "b.json")
    assert status == 0 and "efficiency" in said and "torch" in said
    table = json.loads((tmp_path / "b.json").read_text())
    assert all(set(row) == set(FIELDS) for row in table["rows"]) and table["machine"]["torch"]
    names = [(r["phase"], r["batch"], r["variant"], r["granularity"], r["capacity"]) for r in table["rows"]]
    assert len(set(names)) == len(names) == 10 + 8 + 2
    for row in table["rows"]:
        assert row["ms"] > 0 and row["speedup"] > 0
        assert row["variant"] == "transformers" or row["peak_bytes"] > 200_000      # more than the weights
        assert (row["efficiency"] is not None) == (row["variant"] == "routed")
        if row["variant"] == "routed" and row["phase"] == "prefill":
            assert row["capacity"] in (pytest.approx(0.5), pytest.approx(0.75))
        if row["variant"] == "dense" and row["phase"] == "prefill":
            assert row["cache_bytes"] == 2 * 4 * row["batch"] * 2 * 40 * 8 * (4 if "float32" in said else 2)
        if row["variant"] == "none" and row["granularity"] == "attn_sequence":
            assert row["cache_bytes"] == 0


def test_bench_with_a_router_file(tiny, call, router_file):
    status, said = call(bench.main, "--model", tiny, "--phase", "prefill", "--context", 40, "--rounds", 2,
                        "--routers", router_file("attn_token"))
    assert status == 0 and "routed        attn_token" in said


@pytest.mark.parametrize("kv", ["all", "open"])
def test_static_and_open_keys(kv, tiny, call, tmp_path, monkeypatch):
    """Without attentions 0 and 2 there are no routers, and half of the cache; so there is with kv open."""
    if kv == "all":
        monkeypatch.setattr(bench, "peak_in_child", lambda *args: None)          # processes of their own
    status, _ = call(bench.main, "--model", tiny, "--context", 40, "--rounds", 2, "--dtype", "float32",
                     "--kv", kv, "--granularity", "attn_token", "--static", "2,1", "--json",
                     tmp_path / "b.json")
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    variants = ["dense", "none", "routed", "static", "static"]
    assert status == 0 and [row["variant"] for row in rows] == variants * 2
    for dense, none, routed, static, one in rows[:5], rows[5:]:
        assert one["capacity"] == 0.75 and one["cache_bytes"] == dense["cache_bytes"] * 3 // 4
        assert static["capacity"] == 0.5 and static["granularity"] is static["limit"] is None
        assert static["cache_bytes"] == dense["cache_bytes"] // 2
        if kv == "all":
            assert none["cache_bytes"] == routed["cache_bytes"] == dense["cache_bytes"]
            continue
        assert min(row["peak_bytes"] for row in rows) > 100_000
        if dense["phase"] == "prefill":
            assert none["cache_bytes"] == 0 < routed["cache_bytes"]


def test_work_is_counted(tiny):
    """Operations as torch.utils.flop_counter has them; bytes of every weight once."""
    model, idx = Llama.from_pretrained(tiny), torch.randint(0, 320, (2, 33))
    with torch.no_grad(), FlopCounterMode(display=False) as theirs, Work() as ours:
        model(idx)
    by_kind = theirs.get_flop_counts()["Global"]
    products = by_kind[torch.ops.aten.mm] + by_kind.get(torch.ops.mkldnn._linear_pointwise, 0)
    attention = 4 * (4 * 2 * 6 * 33 * 33 * 8)                                       # of which half is masked
    assert ours.flops == products + attention // 2
    weights = [p for name, p in model.named_parameters() if p.dim() == 2 and name != "embed.weight"]
    cache = 2 * 4 * 2 * 2 * 33 * 8 * 4
    assert ours.bytes == sum(p.nbytes for p in weights) + cache
    q, k, v = (torch.randn(2, 6, 33, 8, requires_grad=True) for _ in range(3))
    with Work() as ours:                                                            # 2 products, then 5
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
    assert ours.flops == 7 * (2 * 2 * 6 * 33 * 33 * 8) // 2


@pytest.mark.parametrize("n", [6, 7, 8, 11, 14, 16, 21, 30, 99])
def test_the_interval_of_a_median_holds_it_95_times_in_100(n):
    """Of n values each lies below the median with probability 1/2, so how many do is binomial."""
    low, high = interval([float(i) for i in range(n, 0, -1)])
    below, above = int(low) - 1, n - int(high)                      # values outside on each side
    assert below == above and interval([1.0] * 5) is None
    assert 1 - 2 * sum(math.comb(n, i) for i in range(below + 1)) / 2**n >= 0.95


def test_decoding_tells_the_capacity_of_what_was_timed(tiny, call, router_file, tmp_path, monkeypatch):
    def load(model, *args):
        meta = load_routers(model, *args)
        for skip in mindskips(model).values():
            skip.override = lambda score, ctx: torch.full_like(score, float(not ctx.decoding))
        return meta
    monkeypatch.setattr(timing, "load_routers", load)
    monkeypatch.setattr(bench, "peak_in_child", lambda *args: None)
    status, _ = call(bench.main, "--model", tiny, "--routers", router_file("attn_token"), "--context", 40,
                     "--rounds", 2, "--json", tmp_path / "b.json", "--device", "cpu")
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    capacities = {row["phase"]: row["capacity"] for row in rows if row["variant"] == "routed"}
    assert status == 0 and capacities == {"prefill": 1, "decode": 0.25}            # a layer has no router


def test_each_round_has_texts_of_its_own_and_capacity_is_their_mean(tiny, call, router_file, tmp_path,
                                                                   monkeypatch):
    ran, run = {}, timing.Variant.run

    def noted(variant, round_):
        yield from run(variant, round_)
        if variant.name == "routed":
            ran.setdefault(tuple(variant.idx.flatten().tolist()), []).append(capacity(variant.model))
    monkeypatch.setattr(timing.Variant, "run", noted)
    monkeypatch.setattr(bench, "peak_in_child", lambda *_: None)
    call(bench.main, "--model", tiny, "--phase", "prefill", "--context", 40, "--batch", 2, "--rounds", 3,
         "--routers", router_file("attn_token"), "--json", tmp_path / "b.json")
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    routed, = (row for row in rows if row["variant"] == "routed")
    timed = [share for text, (share,) in ran.items()][2:]
    assert len(ran) == 5 and len({*timed}) > 1 and routed["capacity"] == pytest.approx(sum(timed) / 3)


@pytest.mark.parametrize("free, together", [(2**33, True), (2**22, False)])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_variants_take_turns_part_by_part(phase, free, together, tiny, call, monkeypatch):
    """Where the memory holds all their caches; else each runs to its end, then the next one."""
    timed, time, whole = [], timing.Variant.time, set()

    def noted(variant, work):
        timed.append(variant.name)
        whole.add(variant.model.layers[0].mlp.down.weight.data_ptr())
        return time(variant, work)
    monkeypatch.setattr(timing.Variant, "time", noted)
    monkeypatch.setattr(bench, "free_bytes", lambda device: free)
    monkeypatch.setattr(bench, "peak_in_child", lambda *_: None)
    status, _ = call(bench.main, "--model", tiny, "--phase", phase, "--batch", 8, "--context", 40,
                     "--rounds", 2, "--granularity", "attn_token", "--device", "cpu", "--dtype", "float32",
                     *["--steps", 3] * (phase == "decode"))
    n_parts, orders = {"prefill": 4 + 1, "decode": 3}[phase], []                 # four layers
    for start in range(0, len(timed), 3 * n_parts):
        round_ = timed[start:start + 3 * n_parts]
        names = round_[:3] if together else ["dense", "none", "routed"]
        parts = names * n_parts if together else [name for name in names for _ in range(n_parts)]
        assert sorted(names) == ["dense", "none", "routed"] and round_ == parts
        orders.append(names)
    assert status == 0 and len(orders) == 4
    assert len({*map(tuple, orders)}) > 1 or not together                     # no one follows the same always
    assert len(whole) == 1                                                      # the weights are shared


def test_a_child_that_is_killed_costs_no_more_than_its_figure(monkeypatch):
    def submit(*args):
        raise BrokenProcessPool
    pool = nullcontext(SimpleNamespace(submit=submit))
    monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda *args: pool)
    assert bench.peak_in_child(SimpleNamespace(), "prefill", 1, 8, 0) is None


def test_transformers_beside_another_family_is_refused(call, tmp_path):
    """A plain Llama of its shape is another model, without the biases that take time."""
    write_tiny(tmp_path, "Qwen2")
    status, said = call(bench.main, "--model", tmp_path, "--against", "transformers", "--context", 40)
    assert status == 1 and is_one_sentence(said) and "plain Llama" in said


def test_a_model_that_does_not_fit_is_refused_before_it_is_made(call, monkeypatch):
    monkeypatch.setattr(bench, "free_bytes", lambda device: 8 * 2**30)
    monkeypatch.setattr(bench, "random_model", None)
    status, said = call(bench.main, "--model", "llama3-8b", "--random-weights", "--dtype", "bfloat16")
    assert status == 1 and is_one_sentence(said) and "30.1 GiB" in said and "8.0 GiB" in said


def test_bench_takes_other_capacities_from_the_calibration(tiny, call, router_file, tmp_path):
    model = Llama.from_pretrained(tiny)
    load_routers(model, router_file("attn_token"))
    save_routers(model, tmp_path / "r.safetensors", [(0.0, 1.0), (0.4, 0.8), (0.6, 0.6), (1.0, 0.25)])
    flags = ["--model", tiny, "--phase", "prefill", "--context", 40, "--rounds", 2, "--dtype", "float32"]
    flags += ["--routers", tmp_path / "r.safetensors", "--json", tmp_path / "b.json"]
    status, _ = call(bench.main, *flags, "--capacity", "0.3,0.9")
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    used = {r["variant"]: r["capacity"] for r in rows}
    assert status == 0 and used["none"] == 0.25 and used["dense"] is None
    low, high = (r["capacity"] for r in rows if r["variant"] == "routed")
    assert 0.25 <= low < high < 1
    status, said = call(bench.main, *flags, "--capacity", "0.2")
    assert status == 1 and is_one_sentence(said) and "0.250 to 1.000" in said


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_forced_gates_open_exactly_the_share(granularity, tiny):
    model = add_routers(Llama.from_pretrained(tiny), granularity)
    timing.open_share(model, 0.25, seed=0)
    with torch.no_grad():
        model(torch.randint(0, 320, (4, 50)))
    assert capacity(model) == 0.25
    first, second = timing.patterns(2, (4, 4, 50), 0.25, 0, "cpu")
    assert first.mean() == second.mean() == 0.25 and not torch.equal(first, second)


def test_forced_gates_are_the_same_in_a_captured_step():
    """Where the device alone knows the position."""
    score, override = torch.rand(3, 1), timing.override_of(1, 4, 0.5, 0)
    opened, cache = [], SimpleNamespace(max_tokens=13)
    for position in 10, 11, 12:
        eager = SimpleNamespace(decoding=True, cache=cache, slots=None, end=position + 1)
        captured = SimpleNamespace(decoding=True, cache=cache, slots=torch.full((3,), position))
        opened.append(override(score, captured))
        assert torch.equal(opened[-1], override(score, eager))
    assert not opened[0].equal(opened[1]) or not opened[1].equal(opened[2])


@pytest.mark.parametrize("granularity, batch, rate", [
    (None, 1, 10.0), (None, 8, 10.0), ("attn_sequence", 1, 10.0), ("attn_sequence", 8, None),
    ("attn_token", 1, None)])
def test_rates_are_of_bytes_that_were_counted(granularity, batch, rate):
    """A captured step with gates reads more than the eager one, but for one sequence with its own gates."""
    args = SimpleNamespace(device=torch.device("cuda"), steps=16)
    variant = SimpleNamespace(args=args, phase="decode", batch=batch, granularity=granularity,
                              work=SimpleNamespace(bytes=16 * 20, flops=16))
    assert timing.Variant.rate(variant, 2.0) == rate
    args.device = torch.device("cpu")
    assert timing.Variant.rate(variant, 2.0) == 10.0
    variant.phase = "prefill"
    assert timing.Variant.rate(variant, 2.0) == 8.0


def test_no_share_of_peak_is_above_one(tiny, call, tmp_path, monkeypatch):
    """The dense model's own rate counts where the machine was busy when its peak was measured."""
    monkeypatch.setattr(bench, "rates", lambda device, dtype: (1.0, 1.0))
    monkeypatch.setattr(bench, "peak_in_child", lambda *args: None)
    status, _ = call(bench.main, "--model", tiny, "--device", "cpu", "--context", 40, "--rounds", 2,
                     "--json", tmp_path / "b.json")
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert status == 0 and all(0 < row["of_peak"] <= 1 for row in rows)
    assert [row["of_peak"] for row in rows if row["variant"] == "dense"] == [1, 1]


def test_the_counted_round_has_pytorchs_own_kernels(tiny, call, monkeypatch):
    """Neither Triton's, whose work is not seen, nor a graph's."""
    seen, real = [], bench.run_once
    monkeypatch.setattr(bench, "run_once", lambda group, round_: seen.append((round_, cuda.choices.triton))
                        or real(group, round_))
    monkeypatch.setattr(bench, "peak_in_child", lambda *args: None)
    assert call(bench.main, "--model", tiny, "--context", 40, "--rounds", 2, "--phase", "decode")[0] == 0
    assert seen == [(0, False), (1, True), (2, True), (3, True)]


def test_the_first_steps_are_not_timed(tiny, monkeypatch):
    """Where weights are laid out, or a graph is captured."""
    model = Llama.from_pretrained(tiny)
    args = SimpleNamespace(device=torch.device("cpu"), text=torch.randint(320, (2, 40)), steps=5)
    variant = timing.Variant(model, args, "decode", "dense", 1, 40)
    events = []
    monkeypatch.setattr(Llama, "step", lambda self, token, ctx: events.append("step") or torch.zeros(1, 48))
    monkeypatch.setattr(variant, "time", lambda work: events.append("clock") or work() or 0.0)
    list(variant.run(1))
    assert events == ["step"] * timing.UNTIMED + ["clock", "step"] * 5


def test_peak_memory_on_cuda_is_the_variants_own(monkeypatch):
    """Without another package's weights, and with no graph left whose cache the next one would find."""
    args = SimpleNamespace(device=torch.device("cuda"), their_bytes=100, text=torch.zeros(2, 40).long())
    variant = timing.Variant(SimpleNamespace(), args, "prefill", "dense", 1, 40)
    vars(variant).update(model="its model", prefill=lambda: iter([0.5]))
    calls = []
    for name, result in ("reset_peak_memory_stats", None), ("max_memory_allocated", 750):
        monkeypatch.setattr(torch.cuda, name, lambda name=name, result=result: calls.append(name) or result)
    monkeypatch.setattr(timing, "release", lambda model: calls.append(f"release {model}"))
    assert list(variant.run(1)) == [0.5] and variant.peak == 650
    assert calls == ["reset_peak_memory_stats", "max_memory_allocated", "release its model"]


@pytest.mark.parametrize("free, routers, model, is_random", [
    (60, None, "llama3-8b", True), (10, None, "llama3.2-1b", True), (0.1, None, "smollm2-135m", True),
    (60, "a file", "smollm2-135m", False)])
def test_which_model_cuda_gets(free, routers, model, is_random, monkeypatch):
    """The largest shape that fits, but for routers the model that they belong to."""
    monkeypatch.setattr(bench, "free_bytes", lambda device: free * 2**30)
    args = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, routers=routers, against=[],
                           phase=["prefill", "decode"], batch=[1], context=[512], random_weights=False,
                           steps=16)
    bench.choose_model(args)
    assert (args.model, args.random_weights) == (model, is_random)


def test_random_model_runs(tmp_path):
    write_tiny(tmp_path, "tied head")
    config = Llama.from_pretrained(tmp_path).config
    model = timing.random_model(config, "cpu", torch.float32)
    assert torch.isfinite(model(torch.arange(9)[None])).all() and model.head.weight is model.embed.weight


@pytest.mark.parametrize("arguments, named", [
    (["--context", 600], "context of 512"), (["--layers", "3", "--capacity", 0.5], "at least 0.750"),
    (["--random-weights"], "is not one of smollm2-135m"), (["--model", "/nowhere"], "no such model"),
    (["--routers", "/nowhere"], "missing"), (["--layers", "9"], "layers 0 to 3"),
    (["--routers", __file__, "--kv", "all"], "--kv:"),
    (["--routers", __file__, "--layers", "1"], "--layers:"),
    (["--routers", __file__, "--granularity", "attn_token"], "--granularity:"),
    (["--phase", "train", "--static", 2], "--static:"), (["--loss", "kl"], "--loss:"),
    (["--phase", "prefill", "--steps", 8], "--steps:"),
    (["--routers", __file__, "--random-weights"], "--random-weights"),
    (["--kv", "open", "--granularity", "attn_sequence"], "--kv open:"),
    (["--kv", "open", "--phase", "train"], "--kv open: --phase train times the first"),
])
def test_bench_refuses(arguments, named, tiny, call):
    status, said = call(bench.main, "--model", tiny, "--rounds", 2, "--context", 40, *arguments)
    assert status == 1 and named in said and is_one_sentence(said)


def test_bench_refuses_before_it_measures(tiny, call, monkeypatch):
    monkeypatch.setattr(bench, "rates", None)
    for arguments in ["--layers", "9"], ["--layers", "3", "--capacity", 0.5]:
        status, said = call(bench.main, "--model", tiny, "--context", 40, *arguments)
        assert status == 1 and is_one_sentence(said)


def test_bench_refuses_routers_without_text(tiny, call, monkeypatch, tmp_path):
    save_routers(add_routers(Llama.from_pretrained(tiny), "attn_token"), tmp_path / "r.safetensors")
    monkeypatch.setattr(bench, "read_samples", lambda *_: ([], 0))
    status, said = call(bench.main, "--model", tiny, "--context", 40, "--routers", tmp_path / "r.safetensors")
    assert status == 1 and "no sample has an answer" in said and is_one_sentence(said)


@pytest.mark.parametrize("arguments", ["--phase sleep", "--batch 0", "--capacity 2", "--context x"])
def test_bench_refuses_unknown_words_and_numbers(arguments, call):
    flag, value = arguments.split()
    status, said = call(bench.main, flag, value)
    assert status == 2 and value in said and "Traceback" not in said
