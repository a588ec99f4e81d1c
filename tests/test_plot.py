"""Pictures: what is drawn of which files, and what is refused."""
import json

import pytest
from conftest import is_one_sentence

import eval as evaluation
from router import GRANULARITIES
from support import measurements, plot
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


ROUTERS = {"granularity": "attn_token", "kv": "all", "file": "out/a/r.safetensors", "hash": "1"}
STEP = {"step": 0, "loss": 1.0, "capacity": 0.9, "target": 0.8}
SCORES = {"tasks": {"piqa": {"acc": 0.5, "acc_norm": 0.5}}, "capacity": 0.7, "keep": {"piqa": {"0": 0.5}},
          "text": {"file": "x", "capacity": 0.7, "kl": 0.1}}


ROW = {"phase": "prefill", "variant": "routed", "granularity": "attn_token", "batch": 1, "context": 64,
       "capacity": 0.6, "speedup": 1.2}
BENCH = {"machine": {"kv": "all"}, "rows": [
    ROW, ROW | {"capacity": 0.8, "speedup": 1.1}, ROW | {"variant": "dense", "capacity": None},
    ROW | {"variant": "static", "granularity": None, "capacity": 0.75, "speedup": 1.15}]}


def evaluated(capacity, kl):
    return SCORES | {"text": {"file": "c4/x.jsonl", "capacity": capacity, "kl": kl}}


def test_accuracy_is_of_the_tasks_that_all_have():
    """The shuffled model writes no answers, so gsm8k is left out of all means."""
    rte = {"rte": {"acc": 0.6, "acc_norm": None}}
    both = rte | {"gsm8k": {"acc": 0.2}}
    scores = SCORES | {"tasks": both, "dense": SCORES | {"tasks": both},
                       "shuffled": SCORES | {"tasks": rte}}
    figure = plot.new_figure(8)
    plot.accuracy(figure, [scores, SCORES | {"tasks": both, "capacity": 0.6}, SCORES | {"tasks": {}}])
    assert {value for line in figure.axes[0].lines for value in line.get_ydata()} == {60.0}
    other = SCORES | {"tasks": {"piqa": {"acc": 0.5, "acc_norm": 0.5}}}
    assert plot.accuracy(plot.new_figure(8), [scores, other]) is False


def test_kinds_of_gates():
    """Open keys are of attention's gates at token level; bench.py times others with keys of all."""
    kinds = [measurements.kind_of(granularity, "open") for granularity in GRANULARITIES]
    assert [kind for kind in kinds if "open" in kind] == ["attn_token, kv open", "block_token, kv open"]


def test_speedup_at_equal_harm(call, tmp_path):
    """KL at the capacities that were timed, and the speedup at a KL, by hand; a second setting and text."""
    scores = evaluated(0.7, 0.3) | {"dense": evaluated(1.0, 0.0), "routed 0.5": evaluated(0.5, 0.7),
                                    "static": evaluated(0.75, 0.5),
                                    "routers": ROUTERS}
    points = measurements.tradeoffs([scores], [BENCH])["c4/x.jsonl"]
    dots = points["prefill", 1, 64]
    assert dots["attn_token"] == [(1.1, pytest.approx(0.2)), (1.2, pytest.approx(0.5))]
    assert dots["static"] == [(1.15, pytest.approx(0.5))]
    (tmp_path / "s.json").write_text(json.dumps(scores))
    (tmp_path / "b.json").write_text(json.dumps(BENCH))
    status, said = call(plot.main, tmp_path / "s.json", tmp_path / "b.json", "--out", tmp_path)
    table = {float(line.split()[-3]): line.split()[-2:] for line in said.splitlines() if "batch 1" in line}
    assert status == 0 and table == {0.1: ["-", "-"], 0.2: ["1.100", "-"], 0.4: ["1.167", "-"]}
    assert (tmp_path / "tradeoff.png").read_bytes().startswith(b"\x89PNG")


def test_times_alone_are_no_picture(call, tmp_path):
    (tmp_path / "b.json").write_text(json.dumps(BENCH))
    above = evaluated(0.99, 0.01) | {"dense": evaluated(1.0, 0.0), "routers": ROUTERS}
    (tmp_path / "s.json").write_text(json.dumps(above))      # at no capacity as low as those that were timed
    for files in ["b.json"], ["b.json", "s.json"]:
        status, said = call(plot.main, *(tmp_path / name for name in files), "--out", tmp_path / "p")
        assert status == 1 and is_one_sentence(said) and "eval.py --text" in said
        assert not (tmp_path / "p").exists()


def test_router_files_are_told_apart():
    """By the kind of their gates; by their names too, where several have the same kind."""
    file = {"tuned": ROUTERS, "again": ROUTERS | {"file": "out/b/r.safetensors", "hash": "2"},
            "open": ROUTERS | {"kv": "open", "hash": "3"}}
    scores = {name: evaluated(0.7, 0.3) | {"dense": evaluated(1.0, 0.0), "routers": routers}
              for name, routers in file.items()}
    benches = [BENCH | {"machine": {"kv": "all", "routers": routers}} for routers in file.values()]

    def names(*chosen):
        evaluations = [scores[name] for name in chosen]
        [text] = measurements.tradeoffs(evaluations, benches[:len(chosen)]).values()
        return set(text["prefill", 1, 64])
    assert names("tuned") == {"attn_token"}
    assert names("tuned", "again") == {"attn_token, a/r.safetensors", "attn_token, b/r.safetensors"}
    assert names("tuned", "again", "open") == names("tuned", "again") | {"attn_token, kv open"}


@pytest.mark.parametrize("value, named", [
    (BENCH | {"machine": {}}, "'kv'"), (BENCH | {"rows": [5]}, "an object"),
    (BENCH | {"rows": [ROW | {"speedup": None}]}, "'speedup'"),
    (BENCH | {"rows": [ROW | {"granularity": None}]}, "'granularity'"),
    (SCORES | {"routers": {"kv": "all"}}, "'granularity'"), (SCORES | {"static 3": 1}, "object"),
    (BENCH | {"machine": {"kv": "all", "routers": {"granularity": "attn_token", "kv": "all"}}}, "'file'"),
    (STEP | {"loss": "1.0"}, "'loss'"), (STEP | {"loss": None}, "'loss'"),
    (STEP | {"loss": float("nan")}, "'loss'"),
    (STEP | {"capacity": 2}, "'capacity'"), (STEP | {"step": True}, "'step'"),
    (STEP | {"target": []}, "'target'"),
    (SCORES | {"capacity": None}, "'capacity'"), (SCORES | {"tasks": []}, "'tasks'"),
    (SCORES | {"tasks": {"quiz": {"acc": 1}}}, "quiz"),
    (SCORES | {"tasks": {"piqa": {"acc": 1}}}, "acc_norm"),
    (SCORES | {"keep": {"piqa": {"x": 1}}}, "a name"), (SCORES | {"keep": {"piqa": {"0": 5}}}, "from 0 to 1"),
    (SCORES | {"dense": 5}, "object"), (SCORES | {"static": {}}, "tasks"),
    (SCORES | {"text": {"file": 5, "capacity": 1, "kl": 0}}, "'file'"),
])
def test_what_cannot_be_drawn(value, named, call, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(value))
    status, said = call(plot.main, tmp_path / "x.json", "--out", tmp_path / "p")
    assert status == 1 and is_one_sentence(said) and named in said and "x.json" in said
    assert not (tmp_path / "p").exists()


def test_names_with_dollars(call, tmp_path):
    """matplotlib takes what is between two of them for a formula."""
    path = tmp_path / "a$^$b.jsonl"
    path.write_text(json.dumps(STEP))
    (tmp_path / "s.json").write_text(json.dumps(SCORES | {"dense": SCORES, "keep": {"$^$": {"0": 1.0}}}))
    status, _ = call(plot.main, path, tmp_path / "s.json", "--out", tmp_path / "p")
    assert status == 0 and len(list((tmp_path / "p").iterdir())) == 4


@pytest.mark.parametrize("out", ["x.json", "x.json/p", "/dev/null", "a" * 300, "/proc/p"])
def test_plot_where_it_cannot_write(out, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.json").write_text(json.dumps(STEP))
    status, said = call(plot.main, "x.json", "--out", out)
    assert status == 1 and is_one_sentence(said) and "cannot be written" in said
    assert (tmp_path / "x.json").read_text() == json.dumps(STEP)


def test_a_picture_is_written_whole(call, tmp_path, monkeypatch):
    (tmp_path / "curves.png").write_bytes(b"old")
    (tmp_path / "x.json").write_text(json.dumps(STEP))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    status, said = call(plot.main, tmp_path / "x.json", "--out", tmp_path)
    assert status == 1 and is_one_sentence(said) and "No space left" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "x.json"]
    assert (tmp_path / "curves.png").read_bytes() == b"old"
