"""Router tuning from end to end on a tiny model, and what its command line refuses."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import is_one_sentence

import train_router
from model import Llama
from router import GRANULARITIES, add_routers, capacity, dense, load_routers, overall, routers, trace
from samples import Batch, batches, pack, pieces, read_samples
from tokenizer import Tokenizer
from train_router import Price, backward, evaluate, main, two_passes
from weights import InputError

ROOT = Path(train_router.__file__).parent


def write_data(path, n=40):
    rows = [
        {
            "instruction": f"Say the number {i}",
            "input": "" if i % 3 else "in words and " + "x " * (i % 7),
            "output": f"It is {i}, and {i * i} is its square." * (1 + i % 4),
        }
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def arguments(tiny, tmp_path):
    """A short run on the tiny model; anything appended overrides."""
    data = write_data(tmp_path / "data.jsonl")
    return [
        "--model",
        tiny,
        "--data",
        data,
        "--out",
        tmp_path / "out",
        "--steps",
        12,
        "--tokens",
        400,
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--capacity",
        0.7,
        "--save-every",
        5,
    ]


@pytest.fixture
def tok(tiny):
    return Tokenizer.from_pretrained(tiny)


# -------------------------------------------------------------------------------------------- the whole path


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_run_writes_what_it_should(granularity, arguments, call, tmp_path, tiny):
    status, said = call(
        main, *arguments, "--granularity", granularity, "--loss", "kl" if "attn" in granularity else "ce"
    )
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
    assert meta["granularity"] == granularity and len(routers(model)) == 4
    assert (tmp_path / "out" / "routers.safetensors").stat().st_size < 10_000
    assert not list((tmp_path / "out").glob("*.tmp"))


@pytest.mark.parametrize("granularity", ["attn_token", "attn_sequence"])
def test_the_model_writes_text_to_learn_from(granularity, arguments, call, monkeypatch):
    """The dense model's own, the same for the same seed, and none of what is calibrated on."""
    seen = []
    monkeypatch.setattr(train_router, "train", lambda model, kinds, *rest: seen.append(kinds))
    monkeypatch.setattr(train_router, "calibrate", lambda model, _, text, *rest: seen.append(text) or [])
    for _ in range(2):
        assert call(main, *arguments, "--granularity", granularity)[0] == 0
    (data, own), held, again, _ = seen
    assert again == [data, own] and held.shape == (24, 256) and len(data) > 20
    assert sum(len(s.ids) for s in own) == 72 * 256 and all(all(s.answer) for s in own)
    answer = sum(sum(s.answer) for s in data) // len(data)
    assert max(len(s.ids) for s in own) == (256 if granularity == "attn_token" else answer)
    texts = [tuple(row.tolist()) for row in held] + [tuple(s.ids) for s in own]
    assert len(set(texts)) == len(texts)
    assert call(main, *arguments, "--granularity", granularity, "--loss", "ce")[0] == 0 and len(seen[-2]) == 1


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
    gates = routers(model).values()
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
    again = evaluate(one, samples[-8:], 400, "cpu", before)
    assert again["kl"] == pytest.approx(held_out["kl"], rel=1e-4) and again["loss"] != held_out["dense_loss"]
    assert again["dense_loss"] == pytest.approx(evaluate(before, samples[-8:], 400, "cpu")["loss"], rel=1e-5)


def meta_of(path):
    from safetensors import safe_open

    return safe_open(str(path), "pt").metadata()


@pytest.mark.parametrize(
    "stop_at, more",
    [
        (5, []),
        (9, []),
        (5, ["--train", "bias"]),
        (9, ["--train", "all"]),
        (5, ["--granularity", "attn_sequence"]),
    ],
)
def test_resume_gives_the_numbers_of_an_uninterrupted_run(
    stop_at, more, arguments, call, tmp_path, monkeypatch
):
    arguments += more
    assert call(main, *arguments)[0] == 0
    whole = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    tuned = (tmp_path / "out" / "routers.safetensors").read_bytes()
    real = train_router.append

    def stop(path, text):  # as Ctrl-C does, in the middle of a step
        if json.loads(text)["step"] == stop_at:
            signal.raise_signal(signal.SIGINT)
        real(path, text)

    monkeypatch.setattr(train_router, "append", stop)
    arguments[5] = tmp_path / "again"
    status, said = call(main, *arguments)
    assert status == 130 and f"stopped after step {stop_at + 1} of 12" in said
    assert len((tmp_path / "again" / "metrics.jsonl").read_text().splitlines()) == stop_at + 1
    monkeypatch.setattr(train_router, "append", real)
    with open(tmp_path / "again" / "metrics.jsonl", "a") as f:
        f.write('{"step": "written after the last checkpoint"}\n')
    assert call(main, *arguments, "--resume")[0] == 0
    assert (tmp_path / "again" / "metrics.jsonl").read_bytes() == whole
    from safetensors.torch import load

    one, two = load(tuned), load((tmp_path / "again" / "routers.safetensors").read_bytes())
    assert all(torch.equal(one[key], two[key]) for key in one)
    status, said = call(main, *arguments, "--resume", "--lr", 0.5)
    assert status == 1 and "--lr" in said and is_one_sentence(said)


def test_ctrl_c_in_a_real_process(arguments, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "train_router.py", *map(str, arguments), "--steps", "100000"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
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
    real, calls = train_router.backward, []

    def poisoned(*a):
        calls.append(1)
        return real(*a) * (float("nan") if len(calls) == 8 else 1)

    monkeypatch.setattr(train_router, "backward", poisoned)
    status, said = call(main, *arguments)
    assert status == 1 and "step 7: the loss is nan" in said and is_one_sentence(said)
    assert meta_of(tmp_path / "out" / "checkpoint.safetensors")["step"] == "5"
    monkeypatch.setattr(train_router, "backward", real)
    assert call(main, *arguments, "--resume")[0] == 0


# -------------------------------------------------------------------------------------------------- the loss


def dense_logits(model, batch):
    with torch.no_grad(), dense(model):
        return model(batch.idx, batch.lengths, batch.prompt_lengths)


@pytest.mark.parametrize("kind", ["kl", "ce"])
@pytest.mark.parametrize("layers", ["all", "2-3"])
@pytest.mark.parametrize("train", ["routers", "all"])
def test_chunked_backward_equals_the_plain_one(train, kind, layers, tiny, tok, tmp_path, monkeypatch):
    model = add_routers(Llama.from_pretrained(tiny), "attn_token", layers).train()
    for gate in routers(model).values():
        gate.router.weight.data.normal_(0, 0.5)
        gate.router.bias.data.zero_()
    samples, _ = read_samples(write_data(tmp_path / "d.jsonl"), tok, 512)
    batch = Batch.of(samples[:6], "cpu")
    monkeypatch.setattr(train_router, "HEAD_CHUNK", 7)
    weight = 1 / len(batch.targets)
    teacher = None
    if train == "all":  # the dense model that it began as
        teacher = Llama.from_pretrained(tiny)
        model.requires_grad_(True)
    loss = backward(model, batch, kind, weight, 3.0, teacher)
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    logits = model(batch.idx, batch.lengths, batch.prompt_lengths)
    log_q = logits[:, :-1].log_softmax(-1)
    wanted = batch.idx[:, 1:]
    mask = batch.scored[:, :-1]
    if kind == "ce":
        plain = -log_q.gather(2, wanted[..., None])[..., 0]
    else:
        log_p = dense_logits(model, batch)[:, :-1].log_softmax(-1)
        plain = (log_p.exp() * (log_p - log_q)).sum(-1)
    plain = plain[mask].mean()
    (plain + 3.0 * overall(model)).backward()
    assert float(loss) == pytest.approx(plain.item(), rel=1e-4)
    assert len(grads) == (2 * len(routers(model)) if train == "routers" else len(list(model.parameters())))
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert (p.grad - grads[name]).abs().max() < 1e-4 * p.grad.abs().max() + 1e-7


def test_the_price_settles_where_demand_meets_the_target():
    """Capacity that falls as the price rises, with noise: the target is met, at the price that meets it."""
    price, noise = Price(2.0), torch.Generator().manual_seed(0)
    used = []
    for _ in range(300):
        used.append(1 - 0.1 * price.level + 0.01 * float(torch.randn((), generator=noise)))
        price.update(used[-1] - 0.7)
        assert price.now >= 0 and price.level >= 0
    assert sum(used[-50:]) / 50 == pytest.approx(0.7, abs=0.005) and price.level == pytest.approx(3, abs=0.1)


def test_a_price_moves_once_a_step_by_the_mean_of_its_batches(tiny, monkeypatch):
    model = add_routers(Llama.from_pretrained(tiny), "attn_token")
    args = SimpleNamespace(penalty=2.0, train="routers", granularity="attn_token", lr=0.1, steps=20,
                           loss="kl", accumulate=4, estimator="ramp")
    method, used = train_router.ByGradient(model, args, model, 2), iter([0.9, 0.5, 0.7, 0.7])
    monkeypatch.setattr(train_router, "backward", lambda *_: torch.tensor(0.25))
    monkeypatch.setattr(train_router, "overall", lambda _: torch.tensor(next(used)))
    line = method.step([SimpleNamespace(targets=[1])] * 4, 0, 0.75)
    expected = Price(2.0), Price(2.0)
    expected[0].update(0.8 - 0.75)
    expected[1].update(0.6 - 0.75)
    for price, one in zip(method.prices, expected, strict=True):
        assert vars(price) == pytest.approx(vars(one), abs=1e-6)
    assert line["capacity"] == pytest.approx(0.7) and line["lambda"] == 2.0 and line["loss"] == 1.0


def test_gates_are_ramps_in_training_and_steps_afterwards(arguments, call, monkeypatch):
    widths, real = [], train_router.backward

    def spy(model, *rest):
        widths.append({gate.width for gate in routers(model).values()})
        return real(model, *rest)

    def check(model, *rest):
        assert {gate.width for gate in routers(model).values()} == {0.0}
        return []

    monkeypatch.setattr(train_router, "backward", spy)
    monkeypatch.setattr(train_router, "calibrate", check)
    assert call(main, *arguments)[0] == 0
    widths = [width for one in widths for width in one]
    assert widths == sorted(widths, reverse=True) and (widths[0], widths[-1]) == train_router.RAMP
    widths.clear()
    assert call(main, *arguments, "--estimator", "straight-through")[0] == 0


def test_layers_below_the_first_router_run_once_and_without_a_graph(tiny, tok, tmp_path):
    model = add_routers(Llama.from_pretrained(tiny), "attn_token", "2-3").train()
    runs, graphs = [0] * 4, [None] * 4

    def hook(layer, _, y):
        i = list(model.layers).index(layer)
        runs[i], graphs[i] = runs[i] + 1, y.requires_grad

    for layer in model.layers:
        layer.register_forward_hook(hook)
    samples, _ = read_samples(write_data(tmp_path / "d.jsonl"), tok, 512)
    two_passes(model, Batch.of(samples[:4], "cpu"), model)
    assert runs == [1, 1, 2, 2] and graphs == [False, False, True, True]


def test_only_answers_count(tiny, tok, tmp_path):
    samples, _ = read_samples(write_data(tmp_path / "d.jsonl"), tok, 512)
    batch = Batch.of(samples[:5], "cpu")
    for b, s in enumerate(samples[:5]):
        n, text = len(s.ids), tok.decode(s.ids)
        scored = [s.ids[t + 1] for t in range(n - 1) if batch.scored[b, t]]
        assert tok.decode(scored) == text.split("<|im_start|>assistant\n")[1].removesuffix("\n")
        assert (
            tok.decode(s.ids[: s.prompt]).endswith("<|im_start|>assistant\n")
            and not batch.scored[b, n - 1 :].any()
        )
    assert len(batch.targets) == int(batch.scored.sum())


def test_evaluate_equals_a_plain_loop(tiny, tok, tmp_path):
    model = add_routers(Llama.from_pretrained(tiny), "attn_token")
    for gate in routers(model).values():
        gate.router.weight.data.normal_(0, 0.5)
        gate.router.bias.data.zero_()
    samples, _ = read_samples(write_data(tmp_path / "d.jsonl"), tok, 512)
    result = evaluate(model, samples, 300, "cpu")
    ce = kl = n = opened = tokens = 0
    for s in samples:
        batch = Batch.of([s], "cpu")
        p = dense_logits(model, batch)[batch.scored].double().log_softmax(-1)
        with torch.no_grad():
            q = model(batch.idx, prompt_lengths=batch.prompt_lengths)[batch.scored].double().log_softmax(-1)
        opened, tokens = opened + capacity(model) * len(s.ids), tokens + len(s.ids)
        ce, kl = ce - q.gather(1, batch.targets[:, None]).sum(), kl + (p.exp() * (p - q)).sum()
        n += len(batch.targets)
    assert result["tokens"] == n and result["capacity"] == pytest.approx(opened / tokens, abs=1e-6)
    assert result["loss"] == pytest.approx(float(ce) / n, rel=1e-4)
    assert result["kl"] == pytest.approx(float(kl) / n, rel=1e-3)


# ------------------------------------------------------------------------------------------------------ data


def test_batches_use_every_sample_once_an_epoch_within_the_budget(tiny, tok, tmp_path):
    samples, _ = read_samples(write_data(tmp_path / "d.jsonl", 300), tok, 512)
    source, seen = batches(samples, 500, seed=0), []
    while len(seen) < 300:
        group = next(source)
        assert len(group) == 1 or len(group) * max(len(s.ids) for s in group) <= 500
        seen += map(id, group)
    assert sorted(seen) == sorted(map(id, samples))
    padded = sum(len(g) * len(g[0].ids) for g in pack(samples, 500))
    assert padded < 1.1 * sum(len(s.ids) for s in samples)


def test_formats(tok, tmp_path):
    rows = [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Go.", "output": "Gone."}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    one, two = (read_samples(tmp_path / name, tok, 512)[0] for name in ("a.json", "b.jsonl"))
    assert one == two and "Add.\n\n1 2<|im_end|>" in tok.decode(one[0].ids)
    chat = {
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "U"},
            {"role": "assistant", "content": "A"},
            {"role": "user", "content": "V"},
            {"role": "assistant", "content": "B"},
            {"role": "user", "content": "unanswered"},
        ]
    }
    (tmp_path / "c.jsonl").write_text(json.dumps(chat))
    (sample,), _ = read_samples(tmp_path / "c.jsonl", tok, 512)
    assert tok.decode([i for i, a in zip(sample.ids, sample.answer) if a]) == "A<|im_end|>B<|im_end|>"
    assert tok.decode(sample.ids[: sample.prompt]).endswith("U<|im_end|>\n<|im_start|>assistant\n")
    assert "unanswered" not in tok.decode(sample.ids)
    text = "The quick brown fox. " * 200
    (tmp_path / "d.txt").write_text(text)
    (tmp_path / "e.jsonl").write_text(json.dumps({"text": text}))
    plain, same = (read_samples(tmp_path / name, tok, 256)[0] for name in ("d.txt", "e.jsonl"))
    assert plain == same and len(plain) > 2
    assert text.startswith(tok.decode([i for s in plain for i in s.ids]))
    assert plain[0].answer == [False] * 64 + [True] * 192 and plain[0].prompt == 64


def test_pieces_of_text():
    text = torch.arange(3 * 250).view(3, 250)
    found = pieces(text, 100)
    assert [len(p.ids) for p in found] == 3 * [100, 100, 50] and [p.prompt for p in found] == 3 * [64, 64, 50]
    assert [i for p in found for i in p.ids] == list(range(750)) and all(all(p.answer) for p in found)
    assert [len(p.ids) for p in pieces(text, 249)] == 3 * [249]       # one token predicts nothing


def test_long_samples_are_cut_and_counted(tok, tmp_path):
    rows = [{"instruction": "a", "output": "word " * n} for n in (3, 500, 5, 400)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples, cut = read_samples(tmp_path / "a.jsonl", tok, 100)
    assert cut == 2 and [len(s.ids) for s in samples][1::2] == [100, 100]


@pytest.mark.parametrize(
    "text, named",
    [
        (b"", "empty"),
        (b"  \n\n", "empty"),
        (b"\x89PNG\r\n\x1a\n\0\0\xff", "UTF-8"),
        (b"{}\0{}", "binary"),
        (b'{"instruction": "a", "output": "b"}\n{broken\n', "line 2"),
        (b'{"instruction": "a", "output": "b"}\n\n[1]\n', "line 3: lacks the field 'instruction'"),
        (b'{"instruction": "a"}', "line 1: lacks the field 'output'"),
        (b'{"instruction": "a", "input": 3, "output": "b"}', "'input'"),
        (b'{"output": "b"}', "'instruction'"),
        (b'{"messages": []}', "assistant"),
        (b'{"messages": [{"role": "assistant"}]}', "'content'"),
        (b'{"messages": "hi"}', "'messages'"),
        (b'{"text": 3}', "'text'"),
        (b'[{"instruction": "a", "output": "b"}', "not valid JSON"),
        (
            b'[{"instruction": "a", "output": "b"}, {"instruction": "a"}]',
            "record 2: lacks the field 'output'",
        ),
    ],
)
def test_data_that_is_refused(text, named, tok, tmp_path):
    (tmp_path / "data").write_bytes(text)
    with pytest.raises(InputError, match=named):
        read_samples(tmp_path / "data", tok, 512)


# ---------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    "more, named",
    [
        (["--model", "/nowhere"], "/nowhere: no such model"),
        (["--data", "/nowhere.jsonl"], "/nowhere.jsonl: cannot be read"),
        (["--capacity", 0], "above 0"),
        (["--capacity", 1.5], "at most 1"),
        (["--capacity", "nan"], "above 0"),
        (["--layers", "2-3", "--capacity", 0.4], "least possible is 0.500"),
        (["--layers", "2-4"], "layers 0 to 3"),
        (["--layers", "last:9"], "layers 0 to 3"),
        (["--steps", 0], "--steps"),
        (["--estimator", "harm"], "only for gates at sequence level"),
        (["--lr", -1], "--lr"),
        (["--tokens", 0], "--tokens"),
        (["--out", "/dev/null/out"], "cannot be written"),
        (["--resume"], "there is no"),
    ],
)
def test_refusals_are_one_sentence(more, named, arguments, call):
    status, said = call(main, *arguments, *more)
    assert status == 1 and named in said and is_one_sentence(said)


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


def test_the_data_that_ships():
    rows = [
        json.loads(line) for line in (ROOT / "data" / "instructions.jsonl").read_text("utf-8").splitlines()
    ]
    assert len(rows) >= 320 and all(set(row) == {"instruction", "input", "output"} for row in rows)
    assert len({row["instruction"] for row in rows}) == len(rows)
    words = sorted(len(row["output"].split()) for row in rows)
    assert words[len(rows) // 10] < 12 and words[-len(rows) // 10] > 120


# ---------------------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize("granularity", ["attn_token", "attn_sequence", "block_token"])
def test_calibration_tells_which_threshold_gives_a_capacity(granularity, tiny, arguments):
    args = SimpleNamespace(granularity=granularity, pool="prompt", capacity=0.6, tokens=400)
    tok, model = Tokenizer.from_pretrained(tiny), Llama.from_pretrained(tiny)
    samples, _ = read_samples(arguments[3], tok, 512)
    add_routers(model, granularity)
    for gate in routers(model).values():
        gate.router.weight.data.normal_(0, 0.3)
        gate.router.bias.data.zero_()
    text = torch.randint(0, 320, (24, 256), generator=torch.Generator().manual_seed(1))
    table = sorted(train_router.calibrate(model, samples, text, args, "cpu"))
    used = [capacity for _, capacity in table]
    assert used == sorted(used, reverse=True) and used[0] > 0.6 > used[-1]
    best = min(table, key=lambda pair: abs(pair[1] - 0.6))
    assert abs(best[1] - 0.6) < (0.05 if granularity.endswith("token") else 0.15)
    assert {gate.threshold for gate in routers(model).values()} == {best[0]}
    if granularity == "attn_token":  # by brute force: answers' tokens, both kinds of text with equal weight
        shares = []
        for kind in samples[:24], pieces(text, 256):
            decisions = []
            for s in kind:
                with trace(model) as gates, torch.no_grad():
                    model(torch.tensor([s.ids]))
                scored = [t for t in range(len(s.ids) - 1) if s.answer[t + 1]]
                decisions += [is_open[0, t] for (is_open,) in gates.values() for t in scored]
            shares.append(float(torch.stack(decisions).float().mean()))
        assert best[1] == pytest.approx(sum(shares) / 2, abs=1e-3)


def test_a_tuned_file_serves_other_capacities(arguments, tiny, tmp_path, call):
    call(main, *arguments, "--steps", 40)
    samples, _ = read_samples(arguments[3], Tokenizer.from_pretrained(tiny), 512)
    model, found = Llama.from_pretrained(tiny), []
    for asked in 0.6, 0.75, 0.9:
        load_routers(model, tmp_path / "out" / "routers.safetensors", asked)
        found.append(evaluate(model, samples, 400, "cpu")["capacity"])
    assert found == sorted(found) and max(abs(f - a) for f, a in zip(found, (0.6, 0.75, 0.9))) < 0.12
