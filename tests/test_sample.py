"""sample.py on a tiny model: what it prints and draws, and what it refuses."""
import json
import re
import shutil
import sys

import pytest
import torch

import sample
from model import Llama
from router import GRANULARITIES
from support.files import InputError
from tokenizer import Tokenizer


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_sample_draws_what_was_skipped(granularity, tiny, call, router_file):
    status, said = call(sample.main, "the quick", "--model", tiny, "--dtype", "float32",
                        "--max-new-tokens", 12, "--routers", router_file(granularity))
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
    tok, model = Tokenizer.from_pretrained(tiny), Llama.from_pretrained(tiny)
    ids = torch.tensor([[tok.bos_id] * (tok.bos_id is not None) + tok.encode("def f(x)")])
    expected = tok.decode(t for t in model.generate(ids, 12)[0, ids.shape[1]:].tolist() if t != tok.eos_id)
    status, said = call(sample.main, "def f(x)", "--plain", "--model", tiny, "--dtype", "float32",
                        "--max-new-tokens", 12)
    assert status == 0 and said.split("--- dense\n")[1].split("\n\n12 tokens in")[0] == expected


def test_words_are_shaded_by_the_layers_that_they_ran(tiny, capsys):
    tok, n = Tokenizer.from_pretrained(tiny), 4
    ids = tok.encode("the quick é")
    ran = range(len(ids) - 1)                                          # the last is written, and never runs
    gates = {i: [torch.tensor([[t % 3 < i for t in ran]])] for i in (1, 2, 3)}
    sample.show_shaded(tok, ids, gates, n)
    said = capsys.readouterr().out
    assert re.sub("\033\\[[0-9;]*m", "", said) == "the quick é\n\n"
    greys = [232 + round(23 * (1 + sum(t % 3 < i for i in (1, 2, 3))) / n) for t in ran]
    assert [int(grey) for grey in re.findall(r"48;5;(\d+)m", said)] == greys


def test_an_empty_prompt_is_refused_before_anything_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sample.py", ""])                  # this model begins no text by itself
    with pytest.raises(InputError, match="the prompt is empty"):
        sample.main()
    assert capsys.readouterr().out == ""


def test_any_of_several_ends_ends_a_text(tiny, tmp_path, call):
    """The second and third tokens of the greedy continuation, declared ends, in turn end it."""
    shutil.copytree(tiny, tmp_path / "m")
    tok, model = Tokenizer.from_pretrained(tiny), Llama.from_pretrained(tiny)
    ids = torch.tensor([tok.encode("def f(x)")])
    new = model.generate(ids, 12)[0, ids.shape[1]:].tolist()
    for n in 2, 3:
        ends = json.dumps({"eos_token_id": [319, new[n - 1]]})
        (tmp_path / "m" / "generation_config.json").write_text(ends)
        _, said = call(sample.main, "def f(x)", "--plain", "--model", tmp_path / "m", "--dtype", "float32")
        assert f"\n{new.index(new[n - 1]) + 1} tokens in" in said


@pytest.mark.parametrize("arguments, named", [
    (["", "--plain"], "empty"), (["hi", "--max-new-tokens", 0], "--max-new-tokens"),
    (["hi", "--max-new-tokens", 600], "context of 512"), (["hi", "--temperature", -1], "--temperature"),
    (["hi", "--top-k", 0], "--top-k"), (["hi", "--top-k", 5], "give a temperature, too"),
    (["hi", "--routers", "a" * 300], "missing"),
    (["hi", "--capacity", 0.5], "--routers"), (["hi", "--routers", "/nowhere"], "missing"),
])
def test_sample_refuses(arguments, named, tiny, call):
    status, said = call(sample.main, *arguments, "--model", tiny)
    assert status in (1, 2) and named in said                                       # 2: by the parser


@pytest.mark.parametrize("columns", ["1", "6", "7", "0", "-5"])
def test_a_very_narrow_terminal(columns, tiny, call, router_file, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    status, said = call(sample.main, "the quick", "--model", tiny, "--max-new-tokens", 4, "--routers",
                        router_file("attn_token"))
    assert status == 0 and "overall capacity" in said and said.count("\n   3 ") >= 1


def test_hardly_any_temperature_is_none(tiny, call):
    texts = []
    for least in 0, 1e-45, 1e-7:
        _, said = call(sample.main, "hi", "--model", tiny, "--max-new-tokens", 8, "--temperature", least)
        texts.append(said.rsplit(" tokens in", 1)[0])
    assert texts[0] == texts[1] == texts[2]
