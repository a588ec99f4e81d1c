"""Two processes of torchrun, on the CPU: what they give is what one gives, and how they end."""
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import OWN_TEXT, is_one_sentence, open_gates_at_random
from safetensors.torch import load_file, save_file

import eval as evaluation
import recipe
import sample
from model import Llama
from router import add_routers, save_routers
from support.parallel import LOST
from support.run import weights_hash
from support.tasks import QUESTIONS
from train_router import main

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]

# Runs several command lines in one start of torchrun, since a start takes seconds. Each process writes what
# each command line ended with, and what --shard let it hold, to FOLDER/RANK.json
DRIVER = """
import json, os, signal, sys
sys.path.insert(0, os.getcwd())
import torch
from torch.distributed import PrefixStore
from torch.distributed.tensor import DTensor
import calibration, eval as evaluation, recipe, train_router
from support import parallel
from support.script import run_script

commands, folder = json.loads(sys.argv[1]), sys.argv[2]
recipe.CALIBRATION_TEXTS, calibration.TRAINING_SAMPLES, calibration.PROMPTS = 24, 8, 64  # short_calibration
torch.set_num_threads(1)
parallel.start()
os.chdir(f"{folder}/{parallel.processes.rank}")          # where a relative path leads to another file
parallel.start = lambda: None
store, rank, ends = parallel.processes.store, parallel.processes.rank, []
memory, real_shard, real_log = {}, parallel.shard, train_router.Run.log


def watched_shard(model):
    layers = [{name: weight for name, weight in layer.named_parameters() if not weight.requires_grad}
              for layer in model.layers]
    memory["layers"] = [sum(weight.nbytes for weight in layer.values()) for layer in layers]
    real_shard(model)
    memory["held"] = sum(weight.to_local().nbytes for weight in model.layers.parameters()
                         if isinstance(weight, DTensor))
    memory["live"], fetched = [], {}

    def look(module, *_):
        fetched[module] = module.weight
        memory["live"].append(sum(weight.untyped_storage().size() > 0 for weight in fetched.values()))
    for layer in model.layers:
        layer.mlp.down.register_forward_pre_hook(look)
        layer.mlp.down.register_full_backward_pre_hook(look)


def log_with_signal(run, step, **numbers):
    real_log(run, step, **numbers)
    if rank == 1 and step == 1:
        os.kill(os.getpid(), signal.SIGINT)


parallel.shard = watched_shard
for i, (script, arguments) in enumerate(commands):
    parallel.processes.store = PrefixStore(str(i), store)
    train_router.Run.log = log_with_signal if "interrupted" in arguments else real_log
    sys.argv = [script, *(arg for arg in arguments if arg != "interrupted")]
    try:
        ends.append(run_script(script, {"eval.py": evaluation, "train_router.py": train_router}[script].main))
    except SystemExit as e:
        ends.append(e.code)
with open(f"{folder}/{rank}.json", "w") as f:
    json.dump([ends, memory], f)
"""


def drive(folder, commands):
    """[what each command line ended with in process 0, in process 1] and what --shard let them hold."""
    commands = [(script, [*map(str, arguments)]) for script, arguments in commands]
    (folder / "driver.py").write_text(DRIVER)
    command = [*TORCHRUN, folder / "driver.py", json.dumps(commands), folder]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1))
    return list(zip(first[0], second[0])), (first[1], second[1]), done.stdout


@pytest.fixture
def arguments(arguments, tiny, tmp_path, monkeypatch):
    """A short run, one thread, with text of the model's own that is there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    folder = tmp_path / "cache" / "router-tuning" / "own_text"
    folder.mkdir(parents=True)
    n, n_tokens = OWN_TEXT                               # as the processes of torchrun have it
    monkeypatch.setattr(recipe, "OWN_TEXTS", n)
    monkeypatch.setattr(recipe, "OWN_TOKENS", n_tokens)
    text = {"ids": torch.randint(320, OWN_TEXT).int()}
    save_file(text, folder / f"{weights_hash(Llama.from_pretrained(tiny))}-0-{n}x{n_tokens}.safetensors")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield [*arguments, "--steps", 4, "--save-every", 1]
    torch.set_num_threads(threads)


def numbers(data):
    """All floats of nested lists and dicts, and everything else."""
    if isinstance(data, dict):
        data = [part for item in sorted(data.items()) for part in item]
    if isinstance(data, list):
        pairs = [numbers(part) for part in data]
        return sum([floats for floats, _ in pairs], []), [rest for _, rest in pairs]
    return ([data], None) if isinstance(data, float) else ([], data)


def without_times(path):
    """What eval.py wrote, but for how long answers took to write."""
    table = json.loads(path.read_text())
    for variant in table, table["dense"]:
        del variant["tasks"]["gsm8k"]["seconds"], variant["tasks"]["gsm8k"]["tokens_per_s"]
    return table


def assert_same_run(one, other):
    """The same routers, log and final table, to rounding."""
    routers = [load_file(folder / "routers.safetensors") for folder in (one, other)]
    for key, tensor in routers[0].items():
        torch.testing.assert_close(routers[1][key], tensor, atol=1e-6, rtol=1e-4)
    logs = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            for folder in (one, other)]
    for line, other_line in zip(*logs, strict=True):
        assert other_line.keys() == line.keys()
        for key in line.keys() - {"run"}:
            assert other_line[key] == pytest.approx(line[key], rel=1e-3, abs=1e-6), key


RUNS = {
    "token": ["--tokens", 200],                                          # KL, two kinds of text, calibration
    "sequence": ["--granularity", "attn_sequence"],                      # measured harm
    "paper": ["--recipe", "paper", "--granularity", "attn_sequence", "--penalty", 0.1, "--tokens", 300,
              "--held-out", 1],                                          # of which one process has none
}


def test_two_processes_do_what_one_does(arguments, tiny, call, tmp_path):
    """Runs, evaluations, interruptions and refusals, all in one start of torchrun."""
    routers, questions = tmp_path / "r.safetensors", ["--data-dir", QUESTIONS, "--limit", 3]
    save_routers(open_gates_at_random(add_routers(Llama.from_pretrained(tiny), "attn_token", "1-3")), routers)
    for rank in 0, 1:
        model = open_gates_at_random(add_routers(Llama.from_pretrained(tiny), "attn_token", "1-3"))
        save_routers(model, tmp_path / str(rank) / "mine")
        lines = arguments[3].read_text().splitlines(keepends=True)
        (tmp_path / str(rank) / "mine.jsonl").write_text("".join(lines[:8][::1 - 2 * rank]))
    model = ["--model", tiny, "--device", "cpu", "--dtype", "float32"]
    scores = [*model, "--routers", routers, *questions, "--text", arguments[3], "--last", 9, "--tokens", 200,
              "--json"]

    alone = {}
    for name, more in RUNS.items():
        twice = [] if name == "paper" else ["--accumulate", 2]
        status, alone[name] = call(main, *arguments, *more, *twice, "--out", tmp_path / f"{name} of one")
        assert status == 0
    assert call(evaluation.main, *scores, tmp_path / "one.json")[0] == 0

    paper = [*arguments, *RUNS["paper"], "--out"]
    tuning = [*arguments, *RUNS["token"], "--out", tmp_path]
    few = tmp_path / "few.jsonl"
    few.write_text("".join(arguments[3].open().readlines()[:2]))
    commands = {
        **{name: ("train_router.py", [*arguments, *more, "--out", tmp_path / name])
           for name, more in RUNS.items()},
        "in parts": ("train_router.py", [*tuning[:-1], tmp_path / "in parts", "--shard"]),
        "paper in parts": ("train_router.py", [*paper, tmp_path / "paper in parts", "--shard"]),
        "stopped": ("train_router.py", [*paper, tmp_path / "resumed", "interrupted"]),
        "resumed": ("train_router.py", [*paper, tmp_path / "resumed", "--resume"]),
        "scores": ("eval.py", [*scores, tmp_path / "two.json"]),
        "few samples": ("train_router.py", [*tuning, "--data", few]),
        "few questions": ("eval.py", [*model, "--tasks", "piqa", "--data-dir", QUESTIONS, "--limit", 1]),
        "two files": ("eval.py", [*model, "--routers", "mine", *questions]),
        "two texts": ("eval.py", [*model, "--text", "mine.jsonl"]),
        "all weights": ("train_router.py", [*tuning, "--shard", "--train", "all"]),
        "parser": ("train_router.py", [*tuning, "--steps", 0]),
    }
    ends, held, said = drive(tmp_path, commands.values())
    ends = dict(zip(commands, ends, strict=True))

    for name in *RUNS, "in parts", "paper in parts", "resumed", "scores":
        assert ends[name] == (None, None), ends[name]
    for name in RUNS:
        assert_same_run(tmp_path / f"{name} of one", tmp_path / name)
        assert alone[name].split("recipe ")[1].split("/")[0] in said                   # the table, once
    assert_same_run(tmp_path / "token of one", tmp_path / "in parts")
    assert_same_run(tmp_path / "paper of one", tmp_path / "paper in parts")
    assert ends["stopped"] == (130, 130)
    assert_same_run(tmp_path / "paper of one", tmp_path / "resumed")
    one, two = (numbers(without_times(tmp_path / f"{name}.json")) for name in ("one", "two"))
    assert two[1] == one[1] and two[0] == pytest.approx(one[0], abs=1e-4)
    for name, words in {"few samples": "at most 1", "few questions": "at most 1", "two files": "routers of",
                        "two texts": "data of hash",
                        "all weights": "--train all"}.items():
        assert sorted(map(type, ends[name]), key=str) == [int, str], name             # only one has spoken
        sentence, = (end for end in ends[name] if end != 1)
        assert is_one_sentence(sentence) and words in sentence
    assert ends["parser"] == (2, 2)

    for memory in held:                                              # a share, and one layer while it runs
        assert memory["held"] == sum(memory["layers"]) / 2
        assert len(memory["live"]) > 100 and set(memory["live"]) == {1}


def test_a_killed_process_ends_the_other(arguments, tmp_path):
    patient = "--monitor-interval", "5"      # else torchrun may end the other before it has spoken
    more = "--steps", "100000", "--loss", "ce"
    command = [*TORCHRUN, *patient, "train_router.py", *map(str, arguments), *more]
    run = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    metrics = tmp_path / "out" / "metrics.jsonl"
    while run.poll() is None and not (metrics.exists() and metrics.read_bytes()):
        time.sleep(0.05)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(children[-1]), signal.SIGKILL)
    _, said = run.communicate(timeout=60)
    ours = [line for line in said.splitlines() if line.startswith("train_router.py: ")]
    assert run.returncode == 1 and ours == [f"train_router.py: {LOST}"]
    assert "gloo" not in said


def test_a_script_for_one_process_refuses_several(tiny, call, monkeypatch):
    """The first of them speaks."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for rank, started, status in ("0", "2", 1), ("1", "2", 1), ("0", "1", 0):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", started)
        ended, said = call(sample.main, "hi", "--model", tiny, "--max-new-tokens", 1)
        assert ended == status
        assert status == 0 or (is_one_sentence(said) and "for one" in said if rank == "0" else not said)


def test_one_process_has_no_parts(arguments, call):
    status, said = call(main, *arguments, "--shard")
    assert status == 1 and is_one_sentence(said) and "torchrun" in said
