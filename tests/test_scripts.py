"""bench.py and sample.py on a tiny model: what they print and write, and what they refuse."""
import json

import pytest
import torch
from conftest import is_one_sentence, train_tokenizer, write_tiny

import bench
import eval as evaluation
import plot
import sample
import train_router
from bench import FIELDS, force, pattern, random_model
from model import Llama
from router import GRANULARITIES, add_routers, capacity, load_routers, routers, save_routers
from samples import QUESTIONS


@pytest.fixture
def router_file(tiny, tmp_path):
    def write(granularity):
        model = add_routers(Llama.from_pretrained(tiny), granularity, "1-3")
        for gate in routers(model).values():
            gate.router.weight.data.normal_(0, 0.3)
            gate.router.bias.data.zero_()
        save_routers(model, tmp_path / "r.safetensors")
        return tmp_path / "r.safetensors"

    return write


# ---------------------------------------------------------------------------------------------------- plot.py


def test_plot_draws_runs_and_evaluations(tiny, call, router_file, tmp_path):
    run = tmp_path / "metrics.jsonl"
    run.write_text("".join(json.dumps({"step": i, "loss": 1 / (i + 1), "capacity": 1 - i / 30, "target": 0.8,
                                       "lr": 0.1}) + "\n" for i in range(10)))  # fmt: skip
    scores = tmp_path / "scores.json"
    call(evaluation.main, "--model", tiny, "--routers", router_file("attn_token"), "--static", 1,
         "--data-dir", QUESTIONS, "--tasks", "piqa,rte", "--limit", 2, "--text",
         train_router.DEFAULT_DATA, "--last", 2, "--json", scores)  # fmt: skip
    keep = json.loads(scores.read_text())["keep"]
    assert list(keep) == ["piqa", "rte", str(train_router.DEFAULT_DATA)]
    for of in keep.values():
        assert list(of) == ["1", "2", "3"] and all(0 <= share <= 1 for share in of.values())
    status, said = call(plot.main, run, scores, "--out", tmp_path / "p")
    assert status == 0
    names = ["curves", "kl", "accuracy", "keep"]
    assert said.split() == [str(tmp_path / "p" / f"{name}.png") for name in names]
    assert all((tmp_path / "p" / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in names)


@pytest.mark.parametrize("text", ["", "{}", "nonsense", '[{"step": 1}]'])
def test_plot_refuses(text, call, tmp_path):
    (tmp_path / "x.json").write_text(text)
    for name in "x.json", "none.json":
        status, said = call(plot.main, tmp_path / name)
        assert status == 1 and is_one_sentence(said) and name in said


# --------------------------------------------------------------------------------------------------- bench.py


def test_bench_writes_every_variant(tiny, call, tmp_path):
    status, said = call(
        bench.main, "--model", tiny, "--device", "cpu", "--phase", "prefill,decode,train", "--batch", 3,
        "--context", 40, "--capacity", "0.5,0.75", "--granularity", "attn_sequence,block_token",
        "--rounds", 2,
        "--against", "transformers,masked", "--json", tmp_path / "b.json",
    )  # fmt: skip
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
                        "--routers", router_file("attn_token"))  # fmt: skip
    assert status == 0 and "routed        attn_token" in said


def test_work_is_counted(tiny):
    """Operations as torch.utils.flop_counter has them; bytes of every weight once."""
    from torch.utils.flop_counter import FlopCounterMode

    model, idx = Llama.from_pretrained(tiny), torch.randint(0, 320, (2, 33))
    with torch.no_grad(), FlopCounterMode(display=False) as theirs, bench.Work() as ours:
        model(idx)
    products = theirs.get_flop_counts()["Global"][torch.ops.aten.mm]
    attention = 4 * (4 * 2 * 6 * 33 * 33 * 8)                                       # of which half is masked
    assert ours.flops == products + attention // 2
    weights = [p for name, p in model.named_parameters() if p.dim() == 2 and name != "embed.weight"]
    cache = 2 * 4 * 2 * 2 * 33 * 8 * 4
    assert ours.bytes == sum(p.nbytes for p in weights) + cache


def test_a_model_that_does_not_fit_is_refused_before_it_is_made(call, monkeypatch):
    monkeypatch.setattr(bench, "free_bytes", lambda device: 8 * 2**30)
    monkeypatch.setattr(bench, "random_model", None)
    status, said = call(bench.main, "--model", "llama3-8b", "--random-weights", "--dtype", "bfloat16")
    assert status == 1 and is_one_sentence(said) and "15.1 GiB" in said and "8.0 GiB" in said


def test_bench_takes_other_capacities_from_the_calibration(tiny, call, router_file, tmp_path):
    model = Llama.from_pretrained(tiny)
    load_routers(model, router_file("attn_token"))
    save_routers(model, tmp_path / "r.safetensors", [(0.0, 1.0), (0.4, 0.8), (0.6, 0.6), (1.0, 0.25)])
    flags = ["--model", tiny, "--phase", "prefill", "--context", 40, "--rounds", 2, "--dtype", "float32"]
    flags += ["--routers", tmp_path / "r.safetensors", "--json", tmp_path / "b.json"]
    flags += ["--plot", tmp_path / "b.png"]
    status, _ = call(bench.main, *flags, "--capacity", "0.3,0.9")
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    used = {r["variant"]: r["capacity"] for r in rows}
    assert status == 0 and used["none"] == 0.25 and used["dense"] is None and (tmp_path / "b.png").exists()
    low, high = (r["capacity"] for r in rows if r["variant"] == "routed")
    assert 0.25 <= low < high < 1
    status, said = call(bench.main, *flags, "--capacity", "0.2")
    assert status == 1 and is_one_sentence(said) and "0.250 to 1.000" in said


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_forced_gates_open_exactly_the_share(granularity, tiny):
    model = add_routers(Llama.from_pretrained(tiny), granularity)
    force(model, 0.25, seed=0)
    with torch.no_grad():
        model(torch.randint(0, 320, (4, 50)))
    assert capacity(model) == 0.25
    assert not torch.equal(pattern((4, 4, 50), 0.25, 0, "cpu"), pattern((4, 4, 50), 0.25, 1, "cpu"))


def test_random_model_runs(tmp_path):
    write_tiny(tmp_path, "tied head")
    config = Llama.from_pretrained(tmp_path).config
    model = random_model(config, "cpu", torch.float32)
    assert torch.isfinite(model(torch.arange(9)[None])).all() and model.head.weight is model.embed.weight


@pytest.mark.parametrize("arguments, named", [
    (["--context", 600], "context of 512"), (["--layers", "3", "--capacity", 0.5], "at least 0.750"),
    (["--random-weights"], "is not one of smollm2-135m"), (["--model", "/nowhere"], "no such model"),
    (["--routers", "/nowhere"], "missing"), (["--layers", "9"], "layers 0 to 3"),
])  # fmt: skip
def test_bench_refuses(arguments, named, tiny, call):
    status, said = call(bench.main, "--model", tiny, "--rounds", 2, "--context", 40, *arguments)
    assert status == 1 and named in said and is_one_sentence(said)


@pytest.mark.parametrize("arguments", ["--phase sleep", "--batch 0", "--capacity 2", "--context x"])
def test_bench_refuses_unknown_words_and_numbers(arguments, call):
    flag, value = arguments.split()
    status, said = call(bench.main, flag, value)
    assert status == 2 and value in said and "Traceback" not in said


# -------------------------------------------------------------------------------------------------- sample.py


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_sample_draws_what_was_skipped(granularity, tiny, call, router_file):
    status, said = call(sample.main, "the quick", "--model", tiny, "--dtype", "float32",
                        "--max-new-tokens", 12, "--routers", router_file(granularity))  # fmt: skip
    assert status == 0 and "--- dense" in said and "--- routed" in said and "overall capacity" in said
    if granularity.endswith("token"):
        lines = [line for line in said.splitlines() if line[:5].strip().isdigit()]
        rows = [line[5:] for line in lines if set(line[5:]) <= {*"█·"}]
        assert len(rows) % 4 == 0 and set(rows[0]) == {"█"}
        drawn = "".join(rows)
        share = float(said.split("overall capacity ")[1].split(",")[0])
        assert drawn.count("█") / len(drawn) == pytest.approx(share, abs=0.001)
    else:
        marks = said.split("has no router)\n\n")[1].split("\n")[0]
        assert len(marks) == 4 and marks[0] == "=" and set(marks[1:]) <= set("█·")


def test_sample_without_routers_is_the_greedy_continuation(tiny, call):
    from tokenizer import Tokenizer

    tok, model = Tokenizer.from_pretrained(tiny), Llama.from_pretrained(tiny)
    ids = torch.tensor([[tok.bos_id] * (tok.bos_id is not None) + tok.encode("def f(x)")])
    expected = tok.decode(t for t in model.generate(ids, 12)[0, ids.shape[1]:].tolist() if t != tok.eos_id)
    status, said = call(sample.main, "def f(x)", "--plain", "--model", tiny, "--dtype", "float32",
                        "--max-new-tokens", 12)  # fmt: skip
    assert status == 0 and expected.split("<|im_end|>")[0].strip("\ufffd\n ")[:8] in said


@pytest.mark.parametrize("arguments, named", [
    (["", "--plain"], "empty"), (["hi", "--max-new-tokens", 0], "max_new_tokens"),
    (["hi", "--max-new-tokens", 600], "context of 512"), (["hi", "--temperature", -1], "--temperature"),
    (["hi", "--top-k", 0], "--top-k"),
    (["hi", "--capacity", 0.5], "--routers"), (["hi", "--routers", "/nowhere"], "missing"),
])  # fmt: skip
def test_sample_refuses(arguments, named, tiny, call):
    status, said = call(sample.main, *arguments, "--model", tiny)
    assert status == 1 and named in said


# ---------------------------------------------------------------------------------------------- every family


@pytest.mark.parametrize("family", ["Llama 3.1 rope", "Mistral with a window", "Qwen2", "Qwen3"])
def test_every_script_on_every_family(family, call, tmp_path):
    write_tiny(tmp_path, family)
    train_tokenizer(digits=True).save(str(tmp_path / "tokenizer.json"))
    common = ["--model", tmp_path, "--device", "cpu"]
    data = tmp_path / "text.txt"
    data.write_text("The quick brown fox jumps over the lazy dog by 5 o'clock. " * 90)
    out = tmp_path / "out"
    tuning = ["--data", data, "--steps", 2, "--tokens", 600, "--out", out]
    status, said = call(train_router.main, *common, *tuning)
    assert status == 0 and "perplexity" in said
    routed = [*common, "--routers", out / "routers.safetensors"]
    questions = ["--tasks", "piqa", "--limit", 2, "--data-dir", QUESTIONS]
    status, said = call(evaluation.main, *routed, *questions, "--text", data)
    assert status == 0 and "routed" in said
    status, said = call(bench.main, *routed, "--context", 40, "--rounds", 2)
    assert status == 0 and "efficiency" in said
    status, said = call(sample.main, "hello", *routed, "--max-new-tokens", 4)
    assert status == 0 and "--- routed" in said
