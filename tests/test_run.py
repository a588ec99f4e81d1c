"""A run's folder: kills, locks, what --resume compares, and what a damaged checkpoint says."""
import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import is_one_sentence, write_data
from safetensors.torch import load_file, save_file

import bench
import eval as evaluation
import sample
import train_router
from support.data import DEFAULT_DATA
from support.run import FILES, weights_hash
from train_router import main

ROOT = Path(train_router.__file__).parent


# Imports torch once, then forks: each line of its input starts train_router.py, whose process id it prints at
# once, and its exit status at the end.
SERVER = """
import json, os, sys
import torch
import calibration, recipe, train_router
torch.set_num_threads(1)
recipe.OWN_TOKENS, recipe.CALIBRATION_TEXTS, calibration.TRAINING_SAMPLES = 64, 24, 8          # sooner
for line in sys.stdin:
    arguments, log = json.loads(line)
    pid = os.fork()
    if pid == 0:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.argv = ["train_router.py", *arguments]
        sys.exit(train_router.run_script("train_router.py", train_router.main))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Server:
    """Real processes that start at once. start() starts one, wait() gives its exit status."""

    def __init__(self, log):
        self.log = log
        self.process = subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def start(self, *arguments):
        self.process.stdin.write(json.dumps([[*map(str, arguments)], str(self.log)]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self):
        return int(self.process.stdout.readline())

    def run(self, *arguments):
        self.start(*arguments)
        assert self.wait() == 0, self.log.read_text()


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path / "log")
    yield server
    server.process.stdin.close()
    server.process.wait()


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def short(arguments):
    """A run of six steps, cheap to repeat: cross-entropy needs no text of the model's own to learn from."""
    return [*arguments, "--steps", 6, "--save-every", 2, "--loss", "ce"]


@pytest.fixture
def unfinished(short, call, tmp_path, monkeypatch):
    """The arguments of a run that was stopped after two of its six steps."""
    tuned = train_router.losses.backward
    calls = []

    def stop(*given):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return tuned(*given)

    monkeypatch.setattr(train_router.losses, "backward", stop)
    assert call(main, *short)[0] == 130
    monkeypatch.setattr(train_router.losses, "backward", tuned)
    return short


# ---------------------------------------------------------------------------------------------------- kills


def kill_and_resume(server, arguments, out, seconds):
    """Kill a run after so many seconds, then end it: resumed if it has a checkpoint, else from the start."""
    pid = server.start(*arguments, "--out", out)
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    status = server.wait()
    resumed = (out / "checkpoint.safetensors").exists()
    server.run(*arguments, "--out", out, *(["--resume"] if resumed else []))
    return status, resumed


def test_killed_at_any_moment_it_ends_as_the_uninterrupted_run(server, short, tmp_path):
    server.run(*short, "--steps", 1, "--out", tmp_path / "warm")
    began = time.monotonic()
    server.run(*short, "--out", tmp_path / "whole")
    seconds = time.monotonic() - began
    for share in 0.4, 0.8:
        kill_and_resume(server, short, tmp_path / f"killed {share}", share * seconds)
        assert_same_run(files_of(tmp_path / f"killed {share}"), files_of(tmp_path / "whole"))


def assert_same_run(found, expected):
    """The same files, no others, and the same numbers; the router file's command names another --out."""
    assert found.keys() == expected.keys() == set(FILES)
    assert found["metrics.jsonl"] == expected["metrics.jsonl"]
    for name in FILES[1:]:
        one, two = (numbers_of(files[name]) for files in (found, expected))
        assert one == two


def numbers_of(data):
    """A safetensors file without the command that it may have."""
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + n])
    header["__metadata__"].pop("command", None)
    return header, data[8 + n:]


def test_what_a_killed_run_left_is_removed(short, call, tmp_path):
    out = tmp_path / "out"
    (out / "model").mkdir(parents=True)
    left = [out / f".{name}.4711.tmp" for name in FILES] + [out / "model" / ".model.safetensors.4711.tmp"]
    mine = [out / ".notes.4711.tmp", out / "routers.tmp"]
    for path in left + mine:
        path.write_bytes(b"half")
    assert call(main, *short, "--steps", 1)[0] == 0
    assert not any(path.exists() for path in left) and all(path.exists() for path in mine)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends(number, short, call, tmp_path, monkeypatch):
    real = train_router.Run.log
    monkeypatch.setattr(train_router.Run, "log", lambda *a, **k: [real(*a, **k), signal.raise_signal(number)])
    before = signal.getsignal(number)
    status, said = call(main, *short)
    assert status == 128 + number and "stopped after step 1 of 6" in said and "--resume goes on" in said
    assert signal.getsignal(number) == before and (tmp_path / "out" / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("save_every, n_steps", [(1, 2), (100, 6)])
def test_a_signal_during_a_save_ends_the_run(save_every, n_steps, short, call, monkeypatch):
    """The last save included, after which the threshold would be calibrated."""
    real = train_router.Run.save

    def save(*given):
        real(*given)
        signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(train_router.Run, "save", save)
    status, said = call(main, *short, "--save-every", save_every)
    assert status == 130 and f"stopped after step {n_steps} of 6" in said
    monkeypatch.setattr(train_router.Run, "save", real)
    assert call(main, *short, "--save-every", save_every, "--resume")[0] == 0


@pytest.mark.parametrize("then", ["calibrate", "evaluate"])
def test_ctrl_c_after_the_last_step_says_how_to_go_on(then, short, call, tmp_path, monkeypatch):
    real = getattr(train_router, then)
    monkeypatch.setattr(train_router, then, lambda *_: signal.raise_signal(signal.SIGINT))
    status, said = call(main, *short)
    assert status == 130 and "stopped after the last step" in said and "--resume goes on" in said
    monkeypatch.setattr(train_router, then, real)
    assert call(main, *short, "--resume")[0] == 0
    resumed = files_of(tmp_path / "out")
    assert call(main, *short)[0] == 0
    assert_same_run(files_of(tmp_path / "out"), resumed)


# ------------------------------------------------------------------------------------------------ one folder


def test_an_unfinished_run_is_kept_and_a_finished_one_replaced(unfinished, call, tmp_path, monkeypatch):
    before = files_of(tmp_path / "out")
    status, said = call(main, *unfinished)
    assert status == 1 and is_one_sentence(said) and "--resume" in said and "another --out" in said
    assert files_of(tmp_path / "out") == before
    assert call(main, *unfinished, "--resume")[0] == 0
    finished = files_of(tmp_path / "out")
    for more in ["--resume"], []:
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        assert call(main, *unfinished, *more)[0] == 0
        assert ("are done; what follows them is done again" in sys.stderr.getvalue()) == bool(more)
        assert_same_run(files_of(tmp_path / "out"), finished)
    assert call(main, *unfinished, "--steps", 1)[0] == 0
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_full_disk_leaves_the_routers_of_the_finished_run(unfinished, call, tmp_path, monkeypatch):
    assert call(main, *unfinished, "--resume")[0] == 0
    before = files_of(tmp_path / "out")["routers.safetensors"]

    def full(number):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    status, said = call(main, *unfinished)
    assert status == 1 and is_one_sentence(said.splitlines()[-1]) and "No space left" in said, said
    assert files_of(tmp_path / "out")["routers.safetensors"] == before


@pytest.mark.parametrize("script, flags", [
    (sample, ["quick", "--max-new-tokens", 2]), (bench, ["--context", 8, "--rounds", 2]),
    (evaluation, ["--text", DEFAULT_DATA, "--last", 1])])
def test_routers_of_a_run_that_is_not_finished_are_told(script, flags, unfinished, call, tmp_path, tiny,
                                                        monkeypatch, capsys):
    routers = tmp_path / "out" / "routers.safetensors"
    command = ["script.py", *flags, "--model", tiny, "--routers", routers]
    warning = f"{routers}: its run has not finished"

    def said():
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        script.main()
        return capsys.readouterr().err
    assert warning in said()
    assert call(main, *unfinished, "--resume")[0] == 0
    assert warning not in said()


def test_two_runs_at_once(server, short, call, tmp_path):
    pid = server.start(*short, "--steps", 100000)
    metrics = tmp_path / "out" / "metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and metrics.read_bytes():
            break
        time.sleep(0.05)
    for more in [], ["--resume"]:
        status, said = call(main, *short, *more)
        assert status == 1 and is_one_sentence(said) and "another run" in said
    os.kill(pid, signal.SIGKILL)
    assert server.wait() == -signal.SIGKILL
    assert "not finished" in call(main, *short)[1]                                 # the lock is free again


def test_without_locks_it_works(short, call, tmp_path, monkeypatch):
    monkeypatch.setattr("support.files.fcntl", None)
    assert call(main, *short, "--steps", 1)[0] == 0


# --------------------------------------------------------------------------------------------------- --resume


def edit_data(arguments, folder):
    path = folder / "data.jsonl"
    path.write_text(path.read_text().replace("Say the number 3", "Say the number 4", 1))


def shorten_data(arguments, folder):
    write_data(folder / "data.jsonl", 20)


TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' + m.content + '<|im_end|>' }}{% endfor %}"


def edit_template(arguments, folder):
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)


def other_weights(arguments, folder):
    tensors = load_file(folder / "model" / "model.safetensors")
    tensors["model.layers.2.self_attn.q_proj.weight"] *= 1.01
    save_file(tensors, folder / "model" / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("shape", [(64, 64), (96, 576), (1024, 256), (510, 64)])
def test_the_hash_of_weights_sees_most_columns(shape):
    """A stride that is a multiple of the width would read a single one."""
    layer = torch.nn.Linear(shape[1], shape[0], bias=False)
    layer.config = None
    layer.weight.data.zero_()
    hashes = set()
    for column in range(0, shape[1], shape[1] // 16):
        layer.weight.data[:, column:column + shape[1] // 16] = 1.0
        hashes.add(weights_hash(layer))
    assert len(hashes) == 16


def fewer_layers(arguments, folder):
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    tensors = load_file(folder / "model" / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if ".layers.3." not in name}
    save_file(tensors, folder / "model" / "model.safetensors", metadata={"format": "pt"})


def other_rope(arguments, folder):
    config = json.loads((folder / "model" / "config.json").read_text())
    config["rms_norm_eps"] = 1e-3
    (folder / "model" / "config.json").write_text(json.dumps(config))


def more_threads(arguments, folder):
    torch.set_num_threads(torch.get_num_threads() + 1)


def other_metrics(arguments, folder):
    path = folder / "out" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"run": "', '"run": "0'))


def damaged_metrics(arguments, folder):
    (folder / "out" / "metrics.jsonl").write_text('{"step": 0, \n{"step": 1}\n')


def other_flag(arguments, folder):
    arguments += ["--lr", 0.5]


@pytest.mark.parametrize("change, named", [
    (edit_data, "data of hash"), (shorten_data, "data of hash"), (edit_template, "data of hash"),
    (other_weights, "weights of hash"), (other_rope, "weights of hash"),
    (fewer_layers, "a model of shape 4 x 48"), (more_threads, "threads"), (other_flag, "--lr 0.004"),
    (other_metrics, "another run"), (damaged_metrics, "moved away"), (damaged_metrics, "a line"),
])
def test_resume_names_what_differs(change, named, tiny, short, call, tmp_path, request):
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    shutil.copytree(tiny, tmp_path / "model")
    short += ["--model", tmp_path / "model"]
    assert call(main, *short)[0] == 0
    change(short, tmp_path)
    before = files_of(tmp_path / "out")
    status, said = call(main, *short, "--resume")
    assert status == 1 and is_one_sentence(said) and named in said, said
    assert files_of(tmp_path / "out") == before


def test_metrics_that_were_lost_do_not_matter(unfinished, call, tmp_path):
    (tmp_path / "out" / "metrics.jsonl").unlink()
    assert call(main, *unfinished, "--resume")[0] == 0
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 3, 4, 5]


def test_a_step_that_was_logged_but_not_saved_is_logged_once(unfinished, call, tmp_path):
    """Also where earlier lines were lost: which are kept follows from their steps, not from how many."""
    path = tmp_path / "out" / "metrics.jsonl"
    last = json.loads(path.read_text().splitlines()[-1])
    path.write_text("".join(json.dumps(last | {"step": step}) + "\n" for step in (1, 2)))
    assert call(main, *unfinished, "--resume")[0] == 0
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("change, named", [
    (lambda meta, tensors: meta.pop("step"), "not a checkpoint"),
    (lambda meta, tensors: meta.update(step="-1"), "its step"),
    (lambda meta, tensors: meta.update(step="7"), "from 1 to 6"),
    (lambda meta, tensors: meta.update(step="nan"), "its step"),
    (lambda meta, tensors: meta.update(arguments="{"), "its arguments"),
    (lambda meta, tensors: meta.update(arguments="[" * 100000), "its arguments"),
    (lambda meta, tensors: meta.update(arguments="[]"), "its arguments"),
    (lambda meta, tensors: meta.update(arguments="{}"), "another version"),
    (lambda meta, tensors: tensors.pop("penalties"), "tensor penalties is missing"),
    (lambda meta, tensors: tensors.update(penalties=torch.zeros(5, 2)), "shape (1, 2)"),
    (lambda meta, tensors: tensors.update(penalties=torch.tensor([[float("nan"), 1]])), "not finite"),
    (lambda meta, tensors: tensors.pop("layers.1.attn.router.bias.m"), "router.bias.m is missing"),
    (lambda meta, tensors: tensors.update({"layers.1.attn.router.weight": torch.zeros(1, 47)}), "(1, 48)"),
])
def test_a_damaged_checkpoint(change, named, unfinished, call, tmp_path):
    path = tmp_path / "out" / "checkpoint.safetensors"
    tensors, meta = load_file(path), header_of(path)["__metadata__"]
    change(meta, tensors)
    save_file(tensors, path, metadata=meta)
    status, said = call(main, *unfinished, "--resume")
    assert status == 1 and is_one_sentence(said) and named in said and "checkpoint.safetensors" in said, said


def header_of(path):
    data = path.read_bytes()
    return json.loads(data[8:8 + int.from_bytes(data[:8], "little")])


# ------------------------------------------------------------------------------------------------- not finite


def test_a_step_that_ends_in_infinity_replaces_nothing(unfinished, call, tmp_path, monkeypatch):
    before = files_of(tmp_path / "out")
    real = train_router.Run.log

    def poisoned(run, step, **numbers):
        real(run, step, **numbers)
        model = run.save_result.args[0]
        next(iter(train_router.mindskips(model).values())).router.weight.data[0, 3] = float("inf")

    monkeypatch.setattr(train_router.Run, "log", poisoned)
    status, said = call(main, *unfinished, "--resume", "--save-every", 1)
    assert status == 1 and is_one_sentence(said) and "lower --lr" in said and "checkpoint in" in said
    after = files_of(tmp_path / "out")
    assert all(after[name] == before[name] for name in FILES[1:])


@pytest.mark.parametrize("granularity", ["attn_token", "attn_sequence"])
def test_a_model_that_gives_nan_leaves_no_router_file(granularity, short, call, tmp_path, monkeypatch):
    """Nothing is kept, and it is not said to be; the learning rate is not to blame."""
    real = train_router.Run.check_finite
    monkeypatch.setattr(train_router.Run, "check_finite", lambda run, step, _: real(run, step, float("nan")))
    status, said = call(main, *short, "--loss", "kl", "--granularity", granularity)
    assert status == 1 and is_one_sentence(said.splitlines()[-1]) and "step 0: the loss is nan" in said
    assert "kept" not in said and "--lr" not in said
    assert not (tmp_path / "out" / "routers.safetensors").exists()


def test_one_gate_and_one_sequence(short, call, tmp_path):
    """Whose standard deviation is not defined."""
    status, _ = call(main, *short, "--loss", "kl", "--granularity", "attn_sequence", "--layers", 3,
                     "--capacity", 1, "--tokens", 1, "--steps", 1)
    tensors = load_file(tmp_path / "out" / "routers.safetensors")
    assert status == 0 and all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    assert float(tensors["layers.3.bias"]) > 0                                                       # open


# ------------------------------------------------------------------------------------------ before and after


@pytest.mark.parametrize("blocked", FILES)
def test_what_cannot_be_written_is_told_before_the_work(blocked, short, call, tmp_path, monkeypatch):
    (tmp_path / "out" / blocked).mkdir(parents=True)
    monkeypatch.setattr(train_router.Llama, "from_pretrained", None)
    status, said = call(main, *short)
    assert status == 1 and is_one_sentence(said) and f"{blocked}: cannot be written (it is a folder)" in said


def test_closed_and_full_streams(short, tmp_path):
    """A closed stderr changes nothing; a full disk behind stdout is told after everything is saved."""
    command = " ".join(map(str, [sys.executable, "train_router.py", *short, "--steps", 1]))
    done = subprocess.run(f"{command} 2>&-", shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "perplexity" in done.stdout
    if Path("/dev/full").exists():
        done = subprocess.run(f"{command} >/dev/full", shell=True, cwd=ROOT, capture_output=True, text=True)
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 1 and "No space left" in last and "Traceback" not in done.stderr
        assert "held_out" in header_of(tmp_path / "out" / "routers.safetensors")["__metadata__"]

