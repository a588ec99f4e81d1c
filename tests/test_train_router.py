"""Router tuning from end to end on a tiny model, and what its command line refuses."""
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import is_one_sentence, train_tokenizer, write_tiny
from safetensors import safe_open
from safetensors.torch import load, load_file

import bench
import eval as evaluation
import recipe as recipes
import sample
import train_router
from model import Llama
from recipe import DEFAULT, Penalty, choose_recipe
from router import (
    GATES,
    GRANULARITIES,
    LinearRouter,
    add_routers,
    load_routers,
    mindskips,
    save_routers,
    straight_through,
)
from scoring import evaluate
from support import batches
from support.batches import Batch, pack
from support.data import read_samples
from support.run import Run
from support.tasks import QUESTIONS
from tokenizer import Tokenizer
from train_router import main
from weights import InputError

ROOT = Path(train_router.__file__).parent


# -------------------------------------------------------------------------------------------- the whole path


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_run_writes_what_it_should(granularity, arguments, call, tmp_path, tiny):
    loss = "kl" if "attn" in granularity else "ce"
    status, said = call(main, *arguments, "--granularity", granularity, "--loss", loss)
    assert status == 0 and "perplexity" in said and "ran\n   0 " in said and "\n   3 " in said
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(12))
    assert all(math.isfinite(line["loss"]) and 0 <= line["capacity"] <= 1 for line in lines)
    assert lines[-1]["target"] == pytest.approx(0.7)
    assert lines[0]["target"] > 0.9
    if granularity == "attn_sequence":  # measures harm, at no price
        assert not any("lambda" in line for line in lines)
    else:
        assert all(line["lambda"] >= 0 for line in lines)
    model = Llama.from_pretrained(tiny)
    meta = load_routers(model, tmp_path / "out" / "routers.safetensors")
    assert meta["granularity"] == granularity and len(mindskips(model)) == 4
    assert (tmp_path / "out" / "routers.safetensors").stat().st_size < 10_000
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_capacity_comes_down_to_its_target(arguments, call, tmp_path):
    status, _ = call(main, *arguments, "--steps", 100, "--lr", 0.02)
    held_out = json.loads(meta_of(tmp_path / "out" / "routers.safetensors")["held_out"])
    assert status == 0 and abs(held_out["capacity"] - 0.7) < 0.1  # plain text, which has its say, uses more
    assert 0 < held_out["kl"] and held_out["tokens"] > 0


def test_only_biases_train(arguments, call, tmp_path, tiny):
    """The learned static router: the same layers for every token."""
    assert call(main, *arguments, "--train", "bias", "--steps", 100)[0] == 0
    held_out = json.loads(meta_of(tmp_path / "out" / "routers.safetensors")["held_out"])
    assert set(held_out["keep"].values()) == {0.0, 1.0}
    model = Llama.from_pretrained(tiny)
    load_routers(model, tmp_path / "out" / "routers.safetensors")
    gates = mindskips(model).values()
    assert len({round(float(gate.router.bias.detach()), 3) for gate in gates}) == 4
    assert not any(gate.router.weight.any() for gate in gates)


@pytest.mark.parametrize("granularity", ["attn_token", "block_sequence"])
def test_the_whole_model_trains_and_is_kept(granularity, arguments, call, tmp_path, tiny, tok):
    whole = [*arguments, "--train", "all", "--granularity", granularity]
    status, said = call(main, *whole)
    assert status == 0 and str(tmp_path / "out" / "model") in said
    one = Llama.from_pretrained(tmp_path / "out" / "model")
    assert Tokenizer.from_pretrained(tmp_path / "out" / "model").encode("It is 3") == tok.encode("It is 3")
    before = Llama.from_pretrained(tiny)
    moved = [float((p - q).abs().max().detach()) for p, q in zip(one.parameters(), before.parameters())]
    still = sum(m == 0 for m in moved) / len(moved)  # a layer that is closed for all has no gradient
    assert still < 0.3 and max(moved) < 13e-5  # 12 steps of at most 1e-5 in AdamW
    load_routers(one, tmp_path / "out" / "routers.safetensors")
    held_out = json.loads(meta_of(tmp_path / "out" / "routers.safetensors")["held_out"])
    samples, _ = read_samples(arguments[3], tok, 512)
    groups = [Batch.of(group, "cpu") for group in pack(samples[-8:], 400)]
    again = evaluate(one, groups, before)
    assert again["kl"] == pytest.approx(held_out["kl"], rel=1e-4) and again["loss"] != held_out["dense_loss"]
    assert again["dense_loss"] == pytest.approx(evaluate(before, groups)["loss"], rel=1e-5)

    status, said = call(main, *arguments)            # new routers would stand beside a model not theirs
    assert status == 1 and is_one_sentence(said) and "--train all" in said


def no_space(*_):
    raise InputError("no space left")


def test_a_run_is_finished_when_its_model_is_written(arguments, call, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(train_router.Llama, "save_pretrained", no_space)
        status, said = call(main, *arguments, "--train", "all")
    assert status == 1 and "no space left" in said
    status, said = call(main, *arguments, "--train", "all")               # the checkpoint is not replaced
    assert status == 1 and "--resume" in said
    assert call(main, *arguments, "--train", "all", "--resume")[0] == 0
    assert (tmp_path / "out" / "model" / "config.json").exists()


def test_learning_rate_of_the_model(arguments, call, tiny, tmp_path):
    assert call(main, *arguments, "--train", "all", "--steps", 1, "--model-lr", 1e-3)[0] == 0
    trained, before = Llama.from_pretrained(tmp_path / "out" / "model"), Llama.from_pretrained(tiny)
    moved = [float((p - q).abs().max().detach()) for p, q in zip(trained.parameters(), before.parameters())]
    assert max(moved) == pytest.approx(1e-3, rel=0.01)               # AdamW's first step is the rate
    status, said = call(main, *arguments, "--model-lr", 1e-3, "--out", tmp_path / "other")
    assert status == 1 and is_one_sentence(said) and "--train all" in said


def test_an_aim_that_nothing_aims_at_is_not_refused(arguments, call):
    """The paper's capacity acts through lambda alone, which is 0."""
    few = [*arguments, "--recipe", "paper", "--layers", 3, "--epochs", 1]
    few = [word for i, word in enumerate(few) if "--steps" not in few[max(0, i - 1):i + 1]]
    assert call(main, *few)[0] == 0
    status, said = call(main, *few, "--penalty", 0.1, "--out", "other")
    assert status == 1 and is_one_sentence(said) and "0.750" in said


def meta_of(path):
    return safe_open(str(path), "pt").metadata()


class Unused(LinearRouter):
    """A gate with a parameter that nothing reads."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.spare = torch.nn.Parameter(torch.ones(2))


class Centred(LinearRouter):
    """A gate that reads how far h is from its mean in training, which it keeps in a buffer."""

    def __init__(self, n_embd, *arguments):
        super().__init__(n_embd, *arguments)
        self.register_buffer("mean", torch.zeros(n_embd))

    def forward(self, read):
        if self.training:
            self.mean.lerp_(read.detach().flatten(0, -2).mean(0), 0.2)
        return super().forward(read - self.mean)


@pytest.mark.parametrize("stop_at, more", [
    (5, []),
    (5, ["--gate", "unused"]),
    (5, ["--gate", "centred"]),
    (9, []),
    (5, ["--train", "bias"]),
    (9, ["--train", "all"]),
    (5, ["--granularity", "attn_sequence"]),
])
def test_resume_gives_the_numbers_of_an_uninterrupted_run(stop_at, more, arguments, call, tmp_path,
                                                          monkeypatch):
    monkeypatch.setitem(GATES, "unused", Unused)
    monkeypatch.setitem(GATES, "centred", Centred)
    arguments += more
    assert call(main, *arguments)[0] == 0
    whole = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    tuned = (tmp_path / "out" / "routers.safetensors").read_bytes()
    real = Run.log

    def stop(run, step, **numbers):  # as Ctrl-C does, in the middle of a step
        if step == stop_at:
            signal.raise_signal(signal.SIGINT)
        real(run, step, **numbers)

    monkeypatch.setattr(Run, "log", stop)
    arguments[5] = tmp_path / "again"
    status, said = call(main, *arguments)
    assert status == 130 and f"stopped after step {stop_at + 1} of 12" in said
    assert len((tmp_path / "again" / "metrics.jsonl").read_text().splitlines()) == stop_at + 1
    monkeypatch.setattr(Run, "log", real)
    with open(tmp_path / "again" / "metrics.jsonl", "a") as f:
        f.write('{"step": "written after the last checkpoint"}\n')
    monkeypatch.setattr(recipes, "write_text", lambda *_: pytest.fail("its text is in the checkpoint"))
    assert call(main, *arguments, "--resume")[0] == 0
    assert (tmp_path / "again" / "metrics.jsonl").read_bytes() == whole
    one, two = load(tuned), load((tmp_path / "again" / "routers.safetensors").read_bytes())
    assert all(torch.equal(one[key], two[key]) for key in one)
    if "centred" in more:
        assert one["layers.2.mean"].any()
    status, said = call(main, *arguments, "--resume", "--lr", 0.5)
    assert status == 1 and "--lr" in said and is_one_sentence(said)


def test_ctrl_c_in_a_real_process(arguments, tmp_path):
    process = subprocess.Popen([sys.executable, "train_router.py", *map(str, arguments), "--steps", "100000"],
                               cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "out" / "metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and metrics.read_text().count("\n") > 2:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and "--resume goes on" in err
    assert (tmp_path / "out" / "checkpoint.safetensors").exists()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(arguments, call, tmp_path, monkeypatch):
    real, calls = train_router.losses.backward, []

    def poisoned(*a):
        calls.append(1)
        return real(*a) * (float("nan") if len(calls) == 8 else 1)

    monkeypatch.setattr(train_router.losses, "backward", poisoned)
    status, said = call(main, *arguments)
    assert status == 1 and "step 7: the loss is nan" in said and is_one_sentence(said)
    assert meta_of(tmp_path / "out" / "checkpoint.safetensors")["step"] == "5"
    monkeypatch.setattr(train_router.losses, "backward", real)
    assert call(main, *arguments, "--resume")[0] == 0


# ------------------------------------------------------------------------------------------------------ loop


@pytest.mark.parametrize("more, learns", [
    ([], True), (["--granularity", "attn_sequence"], True), (["--loss", "ce"], False)])
def test_a_run_learns_from_what_the_model_wrote(more, learns, arguments, call, monkeypatch):
    """Where labels are known, as with KL; the threshold is calibrated on the beginnings of texts."""
    calls = {}

    def spy(name, result=None):
        real = getattr(train_router, name)

        def spied(*given):
            calls[name] = given
            return real(*given) if result is None else result
        monkeypatch.setattr(train_router, name, spied)
    spy("make_source")
    spy("calibration_sources")
    spy("calibrate", [])
    assert call(main, *arguments, *more)[0] == 0
    _, (samples, *texts), *_ = calls["make_source"]
    _, same, held, _ = calls["calibration_sources"]
    *_, capacity = calls["calibrate"]
    assert samples is same and len(samples) == 32 and held.shape == (24, 128) and capacity == 0.7
    assert bool(texts) == learns


def test_text_is_tuned_on_in_pieces_as_long_as_asked_for(arguments, call, tmp_path, monkeypatch):
    """Longer than --tokens: each piece is then a batch of its own."""
    arguments[3] = tmp_path / "long.txt"
    arguments[3].write_text("the quick brown fox jumps over the lazy dog, naïve café. " * 60)
    shapes, real = set(), train_router.losses.backward

    def spy(model, batch, *rest):
        shapes.add((*batch.idx.shape, int(batch.scored[0].sum())))
        return real(model, batch, *rest)
    monkeypatch.setattr(train_router.losses, "backward", spy)
    for flags, length in ([], 512), (["--piece", 200], 200):
        shapes.clear()
        assert call(main, *arguments, *flags, "--tokens", 100, "--loss", "ce")[0] == 0
        assert (1, length, length - 64) in shapes
        assert max(columns for _, columns, _ in shapes) == length
    shapes.clear()
    assert call(main, *arguments, "--piece", 300, "--tokens", 100)[0] == 0
    assert (1, 300, 299) in shapes                               # of what the model wrote, in texts of 128
    status, said = call(main, *arguments, "--piece", 64)
    assert status == 2 and "--piece" in said


def test_gates_are_ramps_that_narrow_over_a_run(arguments, call, monkeypatch):
    estimators, real = [], train_router.losses.backward

    def spy(model, *rest):
        estimators.append({skip.estimator for skip in mindskips(model).values()})
        return real(model, *rest)

    monkeypatch.setattr(train_router.losses, "backward", spy)
    assert call(main, *arguments)[0] == 0
    widths = [{estimator.keywords["width"] for estimator in some} for some in estimators]
    assert all(len(some) == 1 for some in widths)
    widths = [width for some in widths for width in some]
    assert widths == sorted(widths, reverse=True) and (widths[0], widths[-1]) == DEFAULT.ramp_widths
    estimators.clear()
    assert call(main, *arguments, "--method", "straight-through")[0] == 0
    assert estimators == [{straight_through}] * len(estimators)


def test_a_price_moves_once_a_step_by_the_mean_of_its_batches(tiny, monkeypatch):
    """Two kinds of text, each with its price; the loss is weighted by tokens, the penalty by batches."""
    model, used, seen, lines = add_routers(Llama.from_pretrained(tiny)), iter([0.9, 0.5, 0.7, 0.7]), [], []
    recipe = choose_recipe("default", "attn_token", penalty=2.0, falls_until=0.0)

    def backward(model, batch, loss, weight, regularizer, teacher):
        seen.append((weight, regularizer.args[1], model.layers[0].attn.estimator.keywords["width"]))
        return torch.tensor(0.25)

    monkeypatch.setattr(train_router.losses, "backward", backward)
    monkeypatch.setattr(train_router, "capacity", lambda _: next(used))
    monkeypatch.setattr(train_router, "Penalty", lambda *a: penalties.append(Penalty(*a)) or penalties[-1])
    penalties, batches = [], [(kind, SimpleNamespace(targets=[1, 2])) for kind in (0, 1, 0, 1)]
    run = SimpleNamespace(checkpoint=None, n_steps=20, steps=lambda: range(1), check_finite=lambda *_: None,
                          log=lambda step, **numbers: lines.append(numbers), is_due=lambda step: False)
    train_router.tune(model, iter([batches]), recipe, 0.75, run, 2)
    assert seen == [(1 / 8, 0.5, recipe.ramp_widths[0])] * 4
    expected = Penalty(2.0), Penalty(2.0)
    expected[0].update(0.8 - 0.75)
    expected[1].update(0.6 - 0.75)
    for price, one in zip(penalties, expected, strict=True):
        assert vars(price) == pytest.approx(vars(one), abs=1e-6)
    line, = lines
    assert line["capacity"] == pytest.approx(0.7) and line["lambda"] == 2.0 and line["loss"] == 1.0


# ---------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("more, named", [
    (["--model", "/nowhere"], "/nowhere: no such model"),
    (["--data", "/nowhere.jsonl"], "/nowhere.jsonl: cannot be read"),
    *((["--capacity", value], "from 0.001 to 1") for value in (0, 1.5, "nan", "0.8,0.6")),
    (["--layers", "2-3", "--capacity", 0.4], "give at least 0.500"),
    (["--layers", "2-3", "--capacity", 0.499], "give at least 0.500"),
    (["--layers", "2-4"], "layers 0 to 3"),
    (["--layers", "last:9"], "layers 0 to 3"),
    (["--steps", 0], "--steps"),
    (["--epochs", 2], "only with --recipe paper"), (["--pool", "all"], "only for gates of sequences"),
    (["--recipe", "paper", "--epochs", 2], "not beside --steps"),           # which `arguments` has
    (["--max-samples", 0], "--max-samples"),
    (["--method", "harm"], "only for linear gates at sequence level"),
    ("--recipe paper --method harm --loss kl --gate linear --granularity attn_sequence --layers 2-3"
     " --capacity 0.4".split(), "give at least 0.500"),
    (["--granularity", "attn_sequence", "--lr", 0.01], "--lr:"),
    (["--granularity", "attn_sequence", "--penalty", 1], "--penalty:"),
    (["--lr", -1], "--lr"),
    (["--tokens", 0], "--tokens"),
    (["--out", "/dev/null/out"], "cannot be written"),
    (["--resume"], "there is no"),
])
def test_refusals_are_one_sentence(more, named, arguments, call):
    status, said = call(main, *arguments, *more)
    assert status in (1, 2) and named in said and is_one_sentence(said)             # 2: by the parser


@pytest.mark.parametrize("out", ["", "/model/..", "/../link"])
def test_a_run_does_not_write_over_its_model(out, arguments, call, tiny, tmp_path):
    """--out is the model's folder, or holds it as model/, by whatever path."""
    (tmp_path / "o").mkdir()
    shutil.copytree(tiny, tmp_path / "o" / "model")
    (tmp_path / "link").symlink_to(tmp_path / "o" / "model")
    model, out = tmp_path / "o" / "model", str(tmp_path / "o") + out
    before = {path: path.read_bytes() for path in model.iterdir()}
    status, said = call(main, *arguments, "--model", model, "--out", out, "--train", "all")
    assert status == 1 and "write over its model" in said and is_one_sentence(said)
    assert {path: path.read_bytes() for path in model.iterdir()} == before


@pytest.mark.parametrize("name", ["link/routers.safetensors", "best.safetensors"])
def test_a_run_does_not_write_over_the_routers_that_it_begins_with(name, arguments, call, tiny, tmp_path):
    """By whatever path; --resume would miss them."""
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    save_routers(add_routers(Llama.from_pretrained(tiny), "attn_token"), tmp_path / name)
    if name == "best.safetensors":
        (tmp_path / "out" / "routers.safetensors").symlink_to(tmp_path / name)
    before = (tmp_path / name).read_bytes()
    status, said = call(main, *arguments, "--init", tmp_path / name)
    assert status == 1 and "write over the routers" in said and is_one_sentence(said)
    assert (tmp_path / name).read_bytes() == before


def test_a_run_does_not_write_over_its_model_through_a_link(arguments, call, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model").symlink_to(tmp_path / "mine")
    status, said = call(main, *arguments, "--model", tmp_path / "mine", "--train", "all")
    assert status == 1 and "write over its model" in said and is_one_sentence(said)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_no_cuda_device(arguments, call):
    status, said = call(main, *arguments, "--device", "cuda")
    assert status == 1 and "--device cpu" in said and is_one_sentence(said)


def test_two_samples_at_least(arguments, call, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"instruction": "a", "output": "b"}')
    status, said = call(main, *arguments, "--data", tmp_path / "one.jsonl")
    assert status == 1 and "at least 2" in said


def test_a_checkpoint_of_something_else(arguments, call, tmp_path, tiny):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint.safetensors").write_bytes((tiny / "model.safetensors").read_bytes())
    status, said = call(main, *arguments, "--resume")
    assert status == 1 and "not a checkpoint" in said


def test_a_tuned_file_serves_other_capacities(arguments, tiny, tmp_path, call):
    call(main, *arguments, "--steps", 40, "--lr", 0.002)
    samples, _ = read_samples(arguments[3], Tokenizer.from_pretrained(tiny), 512)
    groups = [Batch.of(group, "cpu") for group in pack(samples, 400)]
    model, found = Llama.from_pretrained(tiny), []
    for asked in 0.6, 0.75, 0.9:
        load_routers(model, tmp_path / "out" / "routers.safetensors", asked)
        found.append(evaluate(model, groups)["capacity"])
    assert found == sorted(found) and max(abs(f - a) for f, a in zip(found, (0.6, 0.75, 0.9))) < 0.12


@pytest.mark.parametrize("family", ["Llama 3.1 rope", "Mistral with a window", "Qwen2", "Qwen3"])
def test_every_script_on_every_family(family, call, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "peak_in_child", lambda *args: None)          # processes of their own
    write_tiny(tmp_path, family)
    train_tokenizer(digits=True).save(str(tmp_path / "tokenizer.json"))
    common = ["--model", tmp_path, "--device", "cpu"]
    data = tmp_path / "text.txt"
    data.write_text("The quick brown fox jumps over the lazy dog by 5 o'clock. " * 90)
    out = tmp_path / "out"
    tuning = ["--data", data, "--steps", 2, "--tokens", 600, "--out", out]
    status, said = call(main, *common, *tuning)
    assert status == 0 and "perplexity" in said
    routed = [*common, "--routers", out / "routers.safetensors"]
    questions = ["--tasks", "piqa", "--limit", 2, "--data-dir", QUESTIONS]
    status, said = call(evaluation.main, *routed, *questions, "--text", data)
    assert status == 0 and "routed" in said
    status, said = call(bench.main, *routed, "--context", 40, "--rounds", 2)
    assert status == 0 and "efficiency" in said
    status, said = call(sample.main, "hello", *routed, "--max-new-tokens", 4)
    assert status == 0 and "--- routed" in said


def test_the_papers_steps_are_not_accumulated(arguments, call, tmp_path):
    status, said = call(main, *arguments, "--recipe", "paper", "--accumulate", 2)
    assert status == 1 and is_one_sentence(said) and "64 samples" in said


# ----------------------------------------------------------------------------------- routers to begin with
def test_a_run_begins_with_the_routers_of_a_file(arguments, call, tmp_path):
    """Without a step of any size the routers stay those of the file; only the threshold is calibrated."""
    status, _ = call(main, *arguments, "--steps", 3, "--out", tmp_path / "first")
    assert status == 0
    first = tmp_path / "first" / "routers.safetensors"
    status, said = call(main, *arguments, "--steps", 1, "--lr", 0, "--init", first, "--out",
                        tmp_path / "again")
    assert status == 0, said
    expected, tensors = load_file(first), load_file(tmp_path / "again" / "routers.safetensors")
    assert expected.keys() == tensors.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    line = json.loads((tmp_path / "again" / "metrics.jsonl").read_text())
    assert line["target"] == 0.7                     # at once, since the routers know what to close


def test_pooling_does_not_matter_to_gates_of_tokens(arguments, tiny, call, tmp_path):
    """The paper's files say that they pool over all tokens, also where no gate pools."""
    save_routers(add_routers(Llama.from_pretrained(tiny), gate="unbiased", pool="all"), tmp_path / "r")
    status, said = call(main, *arguments, "--init", tmp_path / "r", "--gate", "unbiased", "--steps", 1)
    assert status == 0, said


@pytest.mark.parametrize("flags, words", [
    (["--granularity", "mlp_token"], ["granularity attn_token", "--granularity attn_token"]),
    (["--layers", "1-2"], ["layers 0,1,2,3"]), (["--kv", "open"], ["kv all"]),
    (["--recipe", "paper"], ["gate linear", "--gate linear"]),
    (["--granularity", "attn_sequence"], ["--method ramp"]), (["--init", "none"], ["none"]),
])
def test_routers_of_another_kind_are_refused(flags, words, arguments, tiny, call, tmp_path):
    save_routers(add_routers(Llama.from_pretrained(tiny), "attn_token"), tmp_path / "r")
    status, said = call(main, *arguments, "--init", tmp_path / "r", *flags, "--out", tmp_path / "out")
    assert status == 1 and is_one_sentence(said) and all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


def test_several_files_are_mixed_by_weight(arguments, call, tmp_path, monkeypatch):
    lines = arguments[3].read_text().splitlines(keepends=True)
    for name, some in ("a", lines[:20]), ("b", lines[20:30]):
        (tmp_path / name).write_text("".join(some))
    mixed = []
    monkeypatch.setattr(train_router, "mixture", lambda *a: mixed.append(a) or batches.mixture(*a))
    files = ["--data", tmp_path / "a", tmp_path / "b", "--data-weights", "1,3", "--held-out", 4]
    status, said = call(main, *arguments, *files, "--steps", 1, "--out", tmp_path / "out")
    assert status == 0, said
    (sources, weights, seed), = mixed
    assert [len(samples) for samples in sources] == [18, 8] and weights == [1, 3]
    of_first = sum(sample in sources[0] for sample in batches.mixture(sources, weights, seed))
    assert of_first == round(26 / 4)
    status, said = call(main, *arguments, *files, "--data-weights", 1, "--out", tmp_path / "out")
    assert status == 1 and is_one_sentence(said) and "one for each --data, 2" in said


def test_a_mixture_has_each_sample_once_where_there_are_no_weights():
    sources = [list(range(5)), list(range(5, 12))]
    mixed = batches.mixture(sources, None, 0)
    assert sorted(mixed) == list(range(12)) and mixed == batches.mixture(sources, None, 0) != sorted(mixed)
    assert batches.mixture(sources[:1], [2.0], 0) is sources[0]
    more = batches.mixture(sources, [1, 3], 0)
    assert sum(n >= 5 for n in more) == 9 and {n for n in more if n >= 5} == set(range(5, 12))
