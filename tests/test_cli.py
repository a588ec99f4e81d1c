"""How scripts end: on any terminal, into any pipe."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
