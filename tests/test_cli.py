"""How scripts begin and end, on any terminal and into any pipe; what their parser and destinations refuse."""
import argparse
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import is_one_sentence

import bench
import eval as evaluation
import sample
import train_router
from model import Llama
from scoring import perplexity
from support import script
from support.cli import number, numbers, parse_layers
from support.files import check_destinations
from support.machine import device_and_dtype
from weights import InputError

ROOT = Path(__file__).parent.parent
SCRIPT = "from support.script import run_script\ndef main():\n    {}\nrun_script('x.py', main)"


def run(body, **environment):
    return subprocess.run([sys.executable, "-c", SCRIPT.format(body)], capture_output=True, cwd=ROOT,
                          env=os.environ | environment, timeout=120)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_what_the_encoding_lacks_is_printed_as_a_question_mark(encoding):
    done = run("print('3 \u2588 \u2192 caf\u00e9')", PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.decode(encoding).strip() == "3 █ → café".encode(encoding, "replace").decode(encoding)


def test_a_reader_that_goes_away_ends_it_quietly():
    command = [sys.executable, "-c", SCRIPT.format("[print('x' * 1000, flush=True) for _ in range(10000)]")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(60) == 0 and process.stderr.read() == b""


def test_bad_input_is_one_sentence():
    done = run("from weights import InputError; raise InputError('a: wrong; do this')")
    assert done.returncode == 1 and done.stderr == b"x.py: a: wrong; do this\n"


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="this system has no Unix sockets")
def test_a_sentence_is_written_at_once_as_other_processes_may_write_between():
    reader, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)               # keeps writes apart
    body = "from weights import InputError; raise InputError('a: wrong; do this')"
    subprocess.run([sys.executable, "-u", "-c", SCRIPT.format(body)], stderr=writer, cwd=ROOT, timeout=120)
    reader.settimeout(10)
    assert reader.recv(1000) == b"x.py: a: wrong; do this\n"
    reader.close()
    writer.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_stdout_is_one_sentence(unbuffered):
    command = f'"{sys.executable}" -c "{SCRIPT.format("print(1)")}" >/dev/full'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    assert done.returncode == 1 and is_one_sentence(done.stderr)
    assert "refused to print or go on (No space left" in done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_change_nothing(closed, tmp_path):
    body = f"import sys; sys.stderr.write('x'); print(1); open('{tmp_path}/done', 'w').close()"
    command = f'"{sys.executable}" -c "{SCRIPT.format(body)}" {closed}'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and (tmp_path / "done").exists() and "Traceback" not in done.stderr


@pytest.mark.parametrize("script", ["train_router.py", "eval.py", "sample.py", "bench.py", "support/plot.py"])
def test_ctrl_c_while_torch_is_imported(script):
    """Sent after the script's first import, which does not import torch."""
    lines = (ROOT / script).read_text("utf-8").split("\n")
    first = next(line for line in lines if line.startswith(("import ", "from ")))
    body = f"import signal, sys; sys.modules['torch'] = None; {first.split('#')[0]}; signal.raise_signal(2)"
    done = subprocess.run([sys.executable, "-c", body], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130 and not done.stderr


def test_ctrl_c_in_a_real_process():
    command = [sys.executable, "sample.py", "--help"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(0.4)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode in (130, 0) and not said


@pytest.mark.parametrize("script, given, wanted", [
    ("train_router.py", {}, "3000"), ("eval.py", {"GOMP_SPINCOUNT": "7"}, "7"),
    ("eval.py", {"OMP_WAIT_POLICY": "active"}, "30000000000"),
    ("sample.py", {}, "300000"), ("examples/flexidepth.py bench", {}, "300000")])
def test_threads_that_wait_soon_sleep(script, given, wanted):
    """As GNU's OpenMP tells at its start what it read; after torch was imported it would read nothing. Where
    tokens are decoded one by one they spin on."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("OMP", "GOMP"))}
    done = subprocess.run([sys.executable, *script.split(), "--help"], cwd=ROOT, capture_output=True,
                          text=True, env=ours | given | {"OMP_DISPLAY_ENV": "verbose"})
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this PyTorch has another OpenMP")
    assert f"GOMP_SPINCOUNT = '{wanted}'" in done.stderr


# ---------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("main, flags, named", [
    (train_router.main, ["--seed", 2**70], "--seed"), (train_router.main, ["--lr", "1e38"], "--lr"),
    (train_router.main, ["--lr", "nan"], "--lr"), (train_router.main, ["--penalty", "inf"], "--penalty"),
    (train_router.main, ["--steps", "9" * 5000], "--steps"),
    (train_router.main, ["--out", ""], "--out is empty"),
    (train_router.main, ["--out", "o\udcff"], "UTF-8"),
    (train_router.main, ["--tokens", 1.5], "whole number"),
    (evaluation.main, ["--routers", ""], "--routers is empty"),
    (evaluation.main, ["--limit", 2**70], "--limit"),
    (evaluation.main, ["--capacity", "nan"], "--capacity"),
    (evaluation.main, ["--json", ""], "--json is empty"),
    (sample.main, ["--temperature", "nan"], "--temperature"), (sample.main, ["--top-k", -1], "--top-k"),
    (sample.main, ["caf\udce9"], "UTF-8"), (bench.main, ["--rounds", "1"], "--rounds"),
    (bench.main, ["--batch", "1,0"], "--batch"), (bench.main, ["--context", 10**30], "--context"),
    (bench.main, ["--granularity", "", "--phase", "train"], "--granularity"),
    (sample.main, ["why", "is"], "quote a text"), (train_router.main, ["--foo", 3], "--foo 3; see --help"),
])
def test_what_the_parser_refuses(main, flags, named, call):
    status, said = call(main, *flags)
    assert status == 2 and is_one_sentence(said) and named in said


@pytest.mark.parametrize("main, flags, named", [
    (evaluation.main, ["--json", "."], "it is a folder"),
    (evaluation.main, ["--json", "/dev/null/x"], "/dev/null/x"),
    (evaluation.main, ["--json", "a" * 5000], "too long"),
    (evaluation.main, ["--json", "/proc/x.json"], "/proc"),
    (bench.main, ["--json", "a/" * 3000 + "x"], "too long"),
    (train_router.main, ["--out", "a" * 5000], "too long"),
    (train_router.main, ["--out", "/dev/null"], "written"),
])
def test_destinations_are_refused_before_the_work(main, flags, named, tiny, call, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for module in evaluation, train_router:
        monkeypatch.setattr(module.Tokenizer, "from_pretrained", None)
    status, said = call(main, "--model", tiny, *flags)
    assert status == 1 and is_one_sentence(said) and named in said and not list(tmp_path.iterdir())


@pytest.mark.parametrize("main", [train_router.main, evaluation.main, bench.main, sample.main])
def test_a_missing_router_file_is_refused_before_a_model_is_read(main, call, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Llama, "from_pretrained", None)
    status, said = call(main, "--init" if main is train_router.main else "--routers", "none.safetensors")
    assert status == 1 and is_one_sentence(said) and "none.safetensors: this file is missing" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("main, flags", [(evaluation.main, ["--text"]), (evaluation.main, ["--static-data"]),
                                         (evaluation.main, ["--routers"]), (bench.main, ["--routers"])])
def test_a_file_that_is_read_is_not_written(main, flags, tiny, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_text("kept")
    (tmp_path / "link").symlink_to("a")
    status, said = call(main, "--model", tiny, *flags, "a", "--json", "link")
    assert status == 1 and is_one_sentence(said) and "link: is read" in said
    assert (tmp_path / "a").read_text() == "kept"


def test_a_pipe_is_refused():
    """Results are written more than once, the latest in place of the others."""
    there, here = os.pipe()
    with pytest.raises(InputError, match="it is a pipe"):
        check_destinations(f"/dev/fd/{here}")
    os.close(there), os.close(here)


def test_the_file_that_stdout_goes_to_is_refused(tmp_path):
    """Renamed over it, the results would part it from what is printed."""
    code = "from support.files import check_destinations; print('a table'); check_destinations('/dev/stdout')"
    command = [sys.executable, "-c", code]
    with open(tmp_path / "tables", "w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert "/dev/stdout: cannot be written (the tables are printed there)" in done.stderr
    assert (tmp_path / "tables").read_text() == "a table\n"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "piqa/test.jsonl"])
def test_what_is_read_of_a_folder_is_not_written(name, tmp_path, monkeypatch):
    (tmp_path / "piqa").mkdir()
    (tmp_path / name).write_text("kept")
    (tmp_path / "scores.json").write_text("of before")
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in tmp_path, tmp_path / "link", "~":
        with pytest.raises(InputError, match="is read, and would be lost"):
            check_destinations(tmp_path / name, read=[folder])
        check_destinations(tmp_path / "scores.json", tmp_path / "new" / "config.json", read=[folder])


def test_the_default_questions_are_not_overwritten(call, tiny):
    for file in evaluation.QUESTIONS / "piqa" / "validation.jsonl", evaluation.DEFAULT_DATA:
        status, said = call(evaluation.main, "--model", tiny, "--json", file)
        assert status == 1 and f"{file}: is read, and would be lost" in said
    status, said = call(evaluation.main, "--model", tiny, "--text", __file__, "--static", 1, "--json", file)
    assert status == 1 and f"{file}: is read, and would be lost" in said


def test_home_is_expanded_where_a_shell_does_not(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["eval.py", "--json=~/scores.json"])
    assert evaluation.parse_arguments().json == str(tmp_path / "scores.json")


def test_destinations_that_will_do(tmp_path):
    (tmp_path / "there").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    check_destinations(None, tmp_path / "there", tmp_path / "link", tmp_path / "new" / "x", os.devnull)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "there"]
    assert (tmp_path / "there").read_text() == "kept"


def test_numbers():
    assert number(int, 1)("12") == 12 and number(float, 0, 1)("1e-3") == 0.001
    assert numbers(int, 1)("1,2") == [1, 2]
    for text in "", "x", "0", "1.0", "nan", "1" * 5000, "1000000001":
        with pytest.raises(argparse.ArgumentTypeError):
            number(int, 1)(text)
    for text in "nan", "inf", "-0.1", "1.1":
        with pytest.raises(argparse.ArgumentTypeError):
            number(float, 0, 1)(text)


@pytest.mark.parametrize("spec, layers", [
    ("all", [0, 1, 2, 3]), ("last:2", [2, 3]), ("1-2", [1, 2]), ("0,3", [0, 3]), ("0,2-3", [0, 2, 3])])
def test_layers(spec, layers):
    assert parse_layers(spec, 4) == layers


@pytest.mark.parametrize("spec", [
    "0-99999999", "99999999", "last:99999999", "4", "-1", "3-1", "", "x", "9" * 5000])
def test_layers_that_are_none(spec):
    with pytest.raises(InputError, match="^layers"):
        parse_layers(spec, 4)


@pytest.mark.parametrize("spec", ["3all", "all3", "1-all"])
def test_all_layers_is_a_word_of_its_own(spec):
    with pytest.raises(InputError, match="^layers"):
        parse_layers(spec, 40)


@pytest.mark.parametrize("loss", [0, 2.5, 17.9, 18, 700, 1e4, 1e6])
def test_perplexity(loss):
    text = perplexity(loss)
    if loss < 18:
        assert float(text) == pytest.approx(math.exp(loss), abs=1e-3)
    else:
        assert float(text.removeprefix("10^")) == pytest.approx(loss / math.log(10), abs=0.06)
    assert len(text) <= 12


def test_a_full_gpu_is_told_in_a_sentence(capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
    with pytest.raises(SystemExit) as end:
        script.run_script("bench.py", main)
    said = end.value.code
    assert is_one_sentence(said) and "bench.py: CUDA out of memory; lower --tokens" in said


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("unable to mmap 5 bytes: Cannot allocate memory (12)"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes"),
    RuntimeError("CUDA error: out of memory"),                   # of a card that another process has filled
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")])
def test_no_memory_is_one_sentence(error, call):
    def main():
        raise error
    status, said = call(main)
    assert status == 1 and is_one_sentence(said) and "out of memory; lower --tokens" in said


@pytest.mark.parametrize("native, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_bfloat16_is_taken_where_a_card_has_it(native, dtype, monkeypatch):
    """Not where it is emulated, on cards that are slower at it than at float32."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True:
                        including_emulation or native)
    assert device_and_dtype() == (torch.device("cuda"), dtype)
