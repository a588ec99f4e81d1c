"""Pictures: what is drawn of which files, and what is refused."""
import json

import pytest
from conftest import is_one_sentence

import eval as evaluation
from support import plot
from support.data import DEFAULT_DATA
from support.tasks import QUESTIONS


def test_plot_draws_runs_and_evaluations(tiny, call, router_file, tmp_path):
    run = tmp_path / "metrics.jsonl"
    run.write_text("".join(json.dumps({"step": i, "loss": 1 / (i + 1), "capacity": 1 - i / 30, "target": 0.8,
                                       "lr": 0.1}) + "\n" for i in range(10)))
    scores = tmp_path / "scores.json"
    call(evaluation.main, "--model", tiny, "--routers", router_file("attn_token"), "--static", 1,
         "--data-dir", QUESTIONS, "--tasks", "piqa,rte", "--limit", 2, "--text",
         DEFAULT_DATA, "--last", 2, "--json", scores)
    keep = json.loads(scores.read_text())["keep"]
    assert list(keep) == ["piqa", "rte", str(DEFAULT_DATA)]
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
