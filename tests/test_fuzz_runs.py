"""Random damage to the files of a run and to command lines: each ends in a result or in one sentence.

Seeded. `FUZZ=5000 python -m pytest tests/test_fuzz_runs.py` tries more of each kind.
"""
import copy
import json
import os
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import is_one_sentence, open_gates_at_random
from safetensors.torch import load_file, save_file

import bench
import eval as evaluation
import sample
import train_router
from model import Llama
from router import add_routers, load_routers, save_routers
from scoring import rows_of
from support import measurements, plot, run
from support.tasks import QUESTIONS, TASKS, read_task
from weights import InputError

N = int(os.environ.get("FUZZ", 200))
VALUES = [None, True, -1, 0, 1, 2.5, 10**12, -10**30, float("nan"), float("inf"), "", "x", "1", "-1", "nan",
          "1e999", "\ud83d", "0-99999999", "last:99999999", "{", "[" * 5000, "9" * 5000,
          [], [[]], ["x", 1], {}, {"a": None}]


def mutated(rng, value):
    """A copy of a JSON value with one place changed, removed, doubled or moved."""
    value = copy.deepcopy(value)
    places = []

    def visit(inner):
        items = inner.items() if isinstance(inner, dict) else enumerate(inner)
        for key, item in items:
            places.append((inner, key))
            if isinstance(item, (dict, list)):
                visit(item)

    visit(value)
    if not places or rng.random() < 0.05:
        return rng.choice(VALUES)
    inside, key = rng.choice(places)
    action = rng.randrange(4)
    if action == 0:
        del inside[key]
    elif action == 1 and isinstance(inside, dict):
        inside[rng.choice(["", "x", "99999999", "step"])] = inside.pop(key)
    else:
        inside[key] = rng.choice(VALUES)
    return value


def damaged(rng, data):
    """Bytes with a few changed, cut or repeated."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 4))):
        i = rng.randrange(len(data))
        action = rng.randrange(3)
        if action == 0:
            data[i] = rng.randrange(256)
        elif action == 1:
            del data[i:i + rng.choice((1, 8, len(data)))]
        else:
            data[i:i] = data[i:i + 20]
        if not data:
            return b""
    return bytes(data)


def text_of(value):
    return value if isinstance(value, str) else json.dumps(value)


def mutated_tensors(rng, tensors):
    tensors = dict(tensors)
    name = rng.choice(list(tensors))
    old = tensors[name]
    flat = old.reshape(-1).clone()
    if len(flat):
        flat[rng.randrange(len(flat))] = rng.choice((float("nan"), float("inf"), -1e38, 0.0))
    tensors[name] = rng.choice((
        flat.view(old.shape), torch.zeros(0), torch.zeros(()), old.reshape(-1), old[None], old > 0,
        old.to(torch.int64), old.to(torch.float16), old.to(torch.float64), old.to(torch.float8_e4m3fn)))
    if rng.random() < 0.2:
        del tensors[name]
    return tensors


def write_mutated(rng, path, tensors, meta):
    """A safetensors file with damaged tensors, metadata or bytes."""
    kind = rng.randrange(4)
    if kind == 0:
        tensors = mutated_tensors(rng, tensors)
    if kind == 1:
        meta = mutated(rng, meta)
        meta = {str(key): text_of(value) for key, value in meta.items()} if isinstance(meta, dict) else None
        meta = meta and {key: value.encode(errors="replace").decode() for key, value in meta.items()}
    if kind == 2:
        meta = dict(meta)
        key = rng.choice([key for key in meta if meta[key][:1] in "[{"])
        meta[key] = text_of(mutated(rng, json.loads(meta[key]))).encode(errors="replace").decode()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=meta)
    if kind == 3:
        path.write_bytes(damaged(rng, path.read_bytes()))


def outcome(work):
    """True for a result, False for a refusal in one sentence; anything else fails the test."""
    try:
        work()
    except InputError as e:
        assert is_one_sentence(str(e)), str(e)
        return False
    return True


# ------------------------------------------------------------------------------------------------------ files


def test_router_files(tiny, tmp_path):
    rng, model, path = random.Random(1), Llama.from_pretrained(tiny), tmp_path / "r.safetensors"
    open_gates_at_random(add_routers(model, "attn_token", "1-3"))
    save_routers(model, path, [(0.3, 1.0), (0.5, 0.7), (0.8, 0.1)])
    tensors, meta = load_file(path), safe_metadata(path)
    idx, good = torch.arange(20)[None], 0

    def work():
        meta = load_routers(model, path, rng.choice((None, 0.7)))
        assert 0 <= float(meta["threshold"]) <= 1
        with torch.no_grad():
            assert model(idx).isfinite().all()
    for _ in range(N):
        write_mutated(rng, path, tensors, meta)
        good += outcome(work)
    assert 0 < good < N


def safe_metadata(path):
    data = path.read_bytes()
    return json.loads(data[8:8 + int.from_bytes(data[:8], "little")])["__metadata__"]


def test_checkpoints(arguments, call, tmp_path, tiny, monkeypatch):
    """The run is opened, and all it needs is read, as in tuning."""
    rng, path = random.Random(2), tmp_path / "out" / "checkpoint.safetensors"
    assert call(train_router.main, *arguments, "--loss", "ce", "--steps", 3)[0] == 0
    tensors, meta = load_file(path), safe_metadata(path)
    metrics = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    model = add_routers(Llama.from_pretrained(tiny))
    recipe = train_router.choose_recipe("default", "attn_token", loss="ce")
    args = SimpleNamespace(out=tmp_path / "out", steps=3, resume=True, save_every=1, train="routers")
    settings, good = json.loads(meta["arguments"]), 0

    def work():
        opened = run.Run(args, settings, None)
        optimizer = train_router.make_optimizer(model, recipe)
        penalties = [train_router.Penalty(1.0)]
        train_router.restore(model, optimizer, penalties, opened)
        assert 0 < opened.start <= 3 and all(p.isfinite().all() for p in train_router.trained(model).values())
    for i in range(N):
        write_mutated(rng, path, tensors, meta)
        (tmp_path / "out" / "metrics.jsonl").write_bytes(damaged(rng, metrics) if i % 4 == 0 else metrics)
        good += outcome(work)
    assert 0 < good < N


BENCH = {"machine": {"kv": "all"}, "rows": [
    {"phase": "prefill", "variant": variant, "granularity": "attn_token", "batch": 1, "context": 64,
     "capacity": 0.8, "speedup": 1.2} for variant in ("routed", "static")]}
SCORES = {"tasks": {"piqa": {"n": 2, "acc": 0.5, "acc_norm": 0.5, "items": []}}, "capacity": 0.7,
          "text": {"file": "data/x.txt", "capacity": 0.7, "kl": 0.1}, "keep": {"piqa": {"0": 1.0, "1": 0.4}}}


def test_pictures(tmp_path):
    """Every file is read; what is accepted is drawn, some of it to the end."""
    rng, drawn, path = random.Random(3), 0, tmp_path / "x.json"
    steps = [{"step": i, "loss": 1.0 / (i + 1), "capacity": 0.9, "target": 0.8} for i in range(4)]
    scores = SCORES | {"dense": SCORES | {"keep": {}}, "static 2": SCORES, "static 4": SCORES,
                       "routers": {"granularity": "attn_token", "kv": "all", "file": "r", "hash": "1"}}
    for i in range(N):
        rows = (steps, [scores], [BENCH])[i % 3]
        text = "".join(json.dumps(row) + "\n" for row in [*rows[:-1], mutated(rng, rows[-1])])
        data = text.encode(errors="replace")
        path.write_bytes(damaged(rng, data) if i % 5 == 0 else data)

        def work(to_the_end=drawn % 8 == 0):
            value = measurements.read(path)
            if "rows" in value:
                return [*measurements.equal_kl_table(measurements.tradeoffs([scores], [value]))]
            draws = [plot.kl, plot.accuracy, plot.keep] if isinstance(value, dict) else [plot.curves]
            for draw in draws:
                figure = plot.new_figure(4)
                draw(figure, [value] if isinstance(value, dict) else {"$x_{": value})
                if to_the_end:
                    plot.save_figure(figure, tmp_path / "x.png")
        drawn += outcome(work)
    assert 0 < drawn < N


def test_benchmark_lines(tok, tmp_path):
    rng, good = random.Random(4), 0
    for i in range(N):
        name = list(TASKS)[i % len(TASKS)]
        task, folder = TASKS[name], tmp_path / name
        folder.mkdir(exist_ok=True)
        for split in {task.split, task.examples}:
            source = QUESTIONS / name / f"{split}.jsonl"
            if source.exists():
                lines = source.read_text("utf-8").splitlines()[:3]
                lines[i % len(lines)] = json.dumps(mutated(rng, json.loads(lines[i % len(lines)])))
                data = "\n".join(lines).encode()
                (folder / f"{split}.jsonl").write_bytes(damaged(rng, data) if i % 5 == 0 else data)

        def work(name=name):
            questions, _ = read_task(name, tmp_path, rng.choice((None, 0, 1)))
            for question in questions:
                assert 0 <= question.gold < len(question.contexts) == len(question.continuations)
            rows_of(questions[:2], tok, 512, apart=False)
        good += outcome(work)
    assert 0 < good < N


# ---------------------------------------------------------------------------------------------- command lines


SWITCHES = "--resume", "--shard", "--shuffled", "--plain", "--random-weights"
FLAGS = {
    train_router: """--model --data --granularity --layers --capacity --out --tokens --seed --accumulate
        --held-out --save-every --recipe --gate --loss --train --method --steps --lr --penalty --pool --device
        --dtype --init --data-weights --shard --resume""",
    evaluation: """--model --routers --capacity --tasks --data-dir --text --last --limit --num-fewshot
        --static --static-data --shuffled --tokens --json""",
    bench: """--phase --batch --context --capacity --granularity --layers --routers --random-weights --against
        --loss --rounds --steps --json --static --kv --seed""",
    sample: "--model --routers --capacity --max-new-tokens --temperature --top-k --plain",
    plot: "--out",
}
WORDS = """0 -1 1 2 0.5 nan inf -inf 1e38 1e308 1e999 . .. / /dev/null/x x.json x.png x.gif9 all 0-99999999
    3-1 last:2 last:99999999 1,2 , attn_token mlp_sequence piqa piqa,rte \udcff ~nobody/x kl ce paper bias
    harm train prefill cpu \u00e9 %s {}""".split()
WORDS += ["", str(2**70), "9" * 5000, "a" * 5000, "a/" * 3000]


class Reached(Exception):
    """The command line was accepted, and the work would begin."""


def test_command_lines(call, capsys, tmp_path, monkeypatch):
    """Up to where the model would be loaded, or the layers be chosen."""
    rng, accepted = random.Random(5), 0

    def reached(*_, **__):
        raise Reached

    for module in train_router, evaluation, sample:
        monkeypatch.setattr(module.Tokenizer, "from_pretrained", reached)
    monkeypatch.setattr(bench, "open_checkpoint", reached)
    monkeypatch.setattr(bench, "check_fit", reached)
    monkeypatch.chdir(tmp_path)
    for _ in range(N):
        module = rng.choice(list(FLAGS))
        words = [rng.choice(["hello", "", "\udcff"])] if module in (sample, plot) else []
        flags = FLAGS[module].split()
        for flag in rng.sample(flags, min(len(flags), rng.choice((1, 1, 2, 3)))):
            words += [flag] if flag in SWITCHES else [flag, rng.choice(WORDS)]
        try:
            status, said = call(module.main, *words)
        except Reached:
            accepted += 1
            capsys.readouterr()
            continue
        assert status in (1, 2) and is_one_sentence(said), (words, said)
    assert 0 < accepted < N and not list(tmp_path.rglob("*.tmp"))


def test_layers(tiny):
    rng, model = random.Random(6), Llama.from_pretrained(tiny)
    parts = ["all", "last:", "-", ",", "0", "3", "4", "99999999", "9" * 5000, "x", " ", "\u0663", "1-2"]
    for _ in range(N):
        spec = "".join(rng.choice(parts) for _ in range(rng.randrange(5)))
        outcome(lambda spec=spec: add_routers(model, "attn_token", spec))
    with pytest.raises(InputError):
        add_routers(model, "attn_token", "0-99999999")
