"""eval.py against lm-evaluation-harness's figures, against one choice at a time, and against bad input."""
import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import is_one_sentence, open_gates_at_random, train_tokenizer, write_tiny

import eval as evaluation
import scoring
from model import Block, Llama
from router import GRANULARITIES, add_routers, mindskips, save_routers, trace
from scoring import Usage, rows_of, size
from support import written
from support.batches import Batch, common_prefix, pack
from support.tasks import QUESTIONS, TASKS, Question, Scores, read_task
from tokenizer import Tokenizer
from weights import InputError

HERE = Path(__file__).parent


# ------------------------------------------------------------------------------------------------ the harness


@pytest.mark.parametrize("shots", [0, 2])
def test_scores_are_the_harness(shots, smollm2, call, tmp_path):
    theirs = json.loads((HERE / f"lm_eval_{shots}.json").read_text())
    status, said = call(evaluation.main, "--tasks", ",".join(theirs), "--data-dir", QUESTIONS,
                        "--num-fewshot", shots, "--device", "cpu", "--json", tmp_path / "ours.json")
    assert status == 0, said
    ours = json.loads((tmp_path / "ours.json").read_text())
    assert ours["capacity"] == 1 and set(ours["tasks"]) == set(theirs)
    for name, table in ours["tasks"].items():
        items = theirs[name]["items"]
        assert [item["id"] for item in table["items"]] == [item["id"] for item in items]
        for mine, item in zip(table["items"], items):
            assert mine["ll"] == pytest.approx(item["ll"], abs=1e-3)
            assert (mine["ll"][mine["gold"]] == max(mine["ll"])) == item["acc"]
        assert table["n"] == len(items) and table["acc"] == sum(i["acc"] for i in items) / len(items)
        if TASKS[name].norm:
            assert table["acc_norm"] == sum(i["acc_norm"] for i in items) / len(items)
        else:
            assert table["acc_norm"] is None and items[0]["acc_norm"] is None


def test_written_answers_are_the_harness(smollm2, call, tmp_path):
    theirs = json.loads((HERE / "lm_eval_5.json").read_text())["gsm8k"]["items"]
    status, said = call(evaluation.main, "--tasks", "gsm8k", "--data-dir", QUESTIONS, "--device", "cpu",
                        "--json", tmp_path / "ours.json")
    assert status == 0, said
    table = json.loads((tmp_path / "ours.json").read_text())["tasks"]["gsm8k"]
    assert [item["id"] for item in table["items"]] == [item["id"] for item in theirs]
    for mine, item in zip(table["items"], theirs):
        assert {key: mine[key] for key in ("text", "strict", "flexible")} == \
            {key: item[key] for key in ("text", "strict", "flexible")}
        assert mine["ll"] is None and "[invalid]" != mine["gold"] and "," not in mine["gold"]
    for extraction in "strict", "flexible":
        right = [item[f"{extraction} is right"] for item in theirs]
        assert table[extraction] == sum(right) / len(right)
    assert table["acc"] is None and table["acc_norm"] is None and table["n"] == len(theirs)


# --------------------------------------------------------------------------------------- one choice at a time


@pytest.fixture
def question_files(tmp_path):
    """A few questions of every task, with examples for some."""
    for name in TASKS:
        (tmp_path / "data" / name).mkdir(parents=True)
        for path in (QUESTIONS / name).glob("*.jsonl"):
            lines = path.read_text().splitlines(keepends=True)
            few = lines if path.stem in ("train", "dev") else lines[:6:2]
            (tmp_path / "data" / name / path.name).write_text("".join(few))
    return tmp_path / "data"


def test_examples_by_default_are_as_many_as_every_group_has(question_files):
    """mmlu's are of a question's own subject, and one subject may have none."""
    questions, shots = read_task("mmlu", question_files)
    assert shots == 2 and questions[0].contexts[0].count("Answer:") == 3
    dev = question_files / "mmlu" / "dev.jsonl"
    subject = json.loads(dev.read_text().splitlines()[0])["subject"]
    dev.write_text("".join(line for line in dev.read_text().splitlines(keepends=True)
                           if json.loads(line)["subject"] != subject))
    questions, shots = read_task("mmlu", question_files)
    assert shots == 0 and questions[0].contexts[0].count("Answer:") == 1


def test_last_counts_without_tasks_too(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval.py", "--last", "5"])
    assert evaluation.parse_arguments().last == 5


def test_examples_that_are_not_used_are_not_read(question_files):
    """As the harness formats those alone that stand in a prompt."""
    with open(question_files / "winogrande" / "train.jsonl", "a") as f:
        f.write('{"sentence": 5}\n')
    before = questions_of(question_files, "winogrande", shots=2)
    assert before[0].contexts[0].count("\n\n") == 2
    with pytest.raises(InputError, match="train.jsonl, line"):
        questions_of(question_files, "winogrande", shots=99)


def questions_of(folder, name, shots=0, limit=None):
    return read_task(name, folder, shots, limit)[0]


@torch.no_grad()
def brute_force(model, questions, tok):
    """Every choice by itself: the whole text, no padding, nothing shared."""
    bos, out = [] if tok.bos_id is None else [tok.bos_id], []
    for q in questions:
        out.append([])
        for context, continuation in zip(q.contexts, q.continuations):
            n = len(bos + tok.encode(context.rstrip()))
            ids = bos + tok.encode(context.rstrip()) + (bos + tok.encode(context + continuation))[n:]
            room = model.config.max_context + 1
            cut = max(0, len(ids) - room)
            idx = torch.tensor([ids[cut:][:-1]])
            log_p = model(idx, prompt_lengths=torch.tensor([n - cut])).log_softmax(-1)[0]
            targets = torch.tensor(ids[cut:][1:])
            out[-1].append(float(log_p.gather(1, targets[:, None])[n - cut - 1:].sum()))
    return out


def with_gates(model, granularity, pool="prompt", kv="all"):
    add_routers(model, granularity, "1-3", pool=pool, kv=kv)
    torch.manual_seed(1)                                  # gates of which some are open in every task below
    open_gates_at_random(model, 0.5)


@pytest.mark.parametrize("kind", [None, *GRANULARITIES, "attn_sequence all", "attn_token open",
                                  "block_token open"])
@pytest.mark.parametrize("family", ["grouped queries", "Mistral with a window"])
def test_sharing_changes_nothing(kind, family, question_files, tmp_path):
    write_tiny(tmp_path / "m", family)
    train_tokenizer(digits=True).save(str(tmp_path / "m" / "tokenizer.json"))
    tok, model = Tokenizer.from_pretrained(tmp_path / "m"), Llama.from_pretrained(tmp_path / "m")
    if kind:
        granularity, _, other = kind.partition(" ")
        options = {"all": {"pool": "all"}, "open": {"kv": "open"}}.get(other, {})
        with_gates(model, granularity, **options)
    for name, shots in ("arc_challenge", 0), ("mmlu", 1), ("winogrande", 2), ("boolq", 0), ("hellaswag", 0):
        questions = questions_of(question_files, name, shots, limit=3)
        expected = brute_force(model, questions, tok)
        for budget in 1, 700:
            usage = Usage(model)
            lls, _, _ = scoring.log_likelihoods(model, questions, tok, budget, usage)
            for ours, theirs in zip(lls, expected):
                assert ours == pytest.approx(theirs, abs=1e-3), (name, budget)
            if kind:
                assert 0.25 < usage.summary()["capacity"] < 1
    usage = Usage(model)                                    # the same in another order, as a part of more
    again, _, _ = scoring.log_likelihoods(model, questions[::-1] + questions, tok, 300, usage)
    for ours, theirs in zip(again, expected[::-1] + expected):
        assert ours == pytest.approx(theirs, abs=1e-3)


def test_a_beginning_is_run_once(tiny, question_files):
    tok, model = Tokenizer.from_pretrained(tiny), Llama.from_pretrained(tiny)
    questions = questions_of(question_files, "arc_challenge", 1)
    rows = rows_of(questions, tok, 512, apart=False)
    shared = common_prefix([row.context for row in rows])
    assert shared > scoring.SHARED and len(rows) == len(questions)
    _, _, tokens = scoring.log_likelihoods(model, questions, tok, 512, Usage(model))
    assert tokens == sum(size(row) - shared for row in rows)
    with_gates(model, "attn_sequence")                        # a sequence's gate reads its own prompt
    _, _, tokens = scoring.log_likelihoods(model, questions, tok, 512, Usage(model))
    assert tokens == sum(map(size, rows))


def test_single_tokens_need_one_pass(tiny, question_files):
    tok = Tokenizer.from_pretrained(tiny)
    questions = questions_of(question_files, "mmlu")
    for q, row in zip(questions, rows_of(questions, tok, 512, apart=False)):
        extra = sum(len(tok.encode(c)) - 1 for c in q.continuations)
        assert size(row) == len(tok.encode(q.contexts[0])) + extra


def test_a_long_context_loses_its_beginning(tiny, question_files, call):
    path = question_files / "boolq" / "validation.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1]["passage"] *= 30
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tok, model = Tokenizer.from_pretrained(tiny), Llama.from_pretrained(tiny)
    questions = questions_of(question_files, "boolq")
    lls, cut, _ = scoring.log_likelihoods(model, questions, tok, 512, Usage(model))
    assert cut == 1                                                       # with two choices
    for ours, theirs in zip(lls, brute_force(model, questions, tok)):
        assert ours == pytest.approx(theirs, abs=1e-3)
    _, said = call(evaluation.main, "--model", tiny, "--tasks", "boolq", "--data-dir", question_files)
    assert f"1 questions lost the beginnings of their contexts, to fit {model.config.max_context}" in said


# -------------------------------------------------------------------------------------------- written answers


@pytest.mark.parametrize("text, strict, flexible", [
    ("It is 3 + 4 = 7.\n#### 7", "7", "7"),
    ("#### -1,250.5\nso $1,250.", "-1,250.5", "$1,250."),
    ("the answer is 12", "[invalid]", "12"),
    ("#### 3 of 4", "3", "4"),
    ("no number", "[invalid]", "[invalid]"),
    ("#### 5 #### 6", "5", "6"),
    ("", "[invalid]", "[invalid]"),
])
def test_final_numbers(text, strict, flexible):
    """As lm-evaluation-harness's patterns are meant; it says strict-match and flexible-extract."""
    for name, expected in ("strict", strict), ("flexible", flexible):
        assert written.extract(text, *written.EXTRACTIONS[name]) == expected


def test_what_does_not_count_in_an_answer():
    assert written.plain("A: 1 + 2 = 3\n#### $3,000.") == written.plain("3000") == "3000"
    assert written.plain("Seven") == "seven" != written.plain("7")


@torch.no_grad()
def written_one_at_a_time(model, tok, ids, stop):
    """A reference: each next token by the whole text's logits; the text until a stop string."""
    n, text = len(ids), ""
    for _ in range(written.LONGEST):
        ids = ids + [int(model(torch.tensor([ids]), prompt_lengths=torch.tensor([n]))[0, -1].argmax())]
        text = tok.decode(i for i in ids[n:] if i not in tok.special.values())
        if ids[-1] in tok.eos_ids or any(mark in text for mark in stop):
            break
    for mark in stop:
        text = text.partition(mark)[0]
    return text


@pytest.mark.parametrize("granularity", [None, "attn_token", "attn_sequence"])
def test_answers_do_not_depend_on_their_batch(granularity, tiny, question_files, monkeypatch):
    monkeypatch.setattr(written, "LONGEST", 24)
    tok, model = Tokenizer.from_pretrained(tiny), Llama.from_pretrained(tiny)
    if granularity:
        with_gates(model, granularity)
    questions = questions_of(question_files, "gsm8k", 0)
    rows, n_cut = written.prompts(questions, tok, 512)
    assert n_cut == 0 and [place for place, _ in rows] == [0, 1, 2]
    free = [written_one_at_a_time(model, tok, ids, ()) for _, ids in rows]
    stop = tuple(text[5:7] for text in free[:2])                 # of which some end early, and some do not
    expected = [written_one_at_a_time(model, tok, ids, stop) for _, ids in rows]
    assert expected != free
    for budget in 1, 4000:
        usage = Usage(model)
        scores, _, _ = scoring.write(questions, stop, model, tok, budget, usage)
        assert list(scores.texts) == expected
        if granularity:
            assert 0.25 < usage.summary()["capacity"] < 1
    assert scores.n_endless == sum(text == whole for text, whole in zip(expected, free))


def test_written_answers_beside_dense(tiny, question_files, call, tmp_path, monkeypatch):
    monkeypatch.setattr(written, "LONGEST", 24)
    status, said = call(evaluation.main, "--model", tiny, "--tasks", "gsm8k,rte", "--static", 2, "--data-dir",
                        question_files, "--json", tmp_path / "o.json", "--num-fewshot", 0)
    assert status == 0 and "static: flexible extraction" in said, said
    table = json.loads((tmp_path / "o.json").read_text())
    for variant in table, table["static"]:
        entry = variant["tasks"]["gsm8k"]
        assert 1 <= entry["endless"] <= entry["n"] == 3 and entry["seconds"] > 0
        assert 24 < entry["tokens_per_s"] * entry["seconds"] <= 3 * 24
        assert f"{entry['endless']} of 3 answers had no end" in said
    assert table["static"]["capacity"] == pytest.approx(0.5)


def test_a_context_without_room_for_an_answer(question_files, call, tmp_path):
    write_tiny(tmp_path / "m")
    train_tokenizer(digits=True).save(str(tmp_path / "m" / "tokenizer.json"))
    config = json.loads((tmp_path / "m" / "config.json").read_text()) | {"max_position_embeddings": 256}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    status, said = call(evaluation.main, "--model", tmp_path / "m", "--tasks", "gsm8k", "--data-dir",
                        question_files)
    assert status == 1 and is_one_sentence(said) and "256" in said and "leave this task out" in said


def test_long_prompts_lose_their_beginning(tok, question_files):
    questions = questions_of(question_files, "gsm8k", 0)
    whole, _ = written.prompts(questions, tok, 512)
    cut, n_cut = written.prompts(questions, tok, written.LONGEST + 10)
    assert n_cut == 3 and all(ids == all_ids[-10:] for (_, ids), (_, all_ids) in zip(cut, whole))


def test_written_answers_are_not_shuffled(tiny, question_files, call, tmp_path, monkeypatch):
    """Other gates write other texts, of other lengths, for which there are no decisions to deal. None are
    kept of the routed model, whose steps are as free as without --shuffled."""
    monkeypatch.setattr(written, "LONGEST", 24)
    generate, overrides = Llama.generate, []

    def watched(model, *args, **options):
        overrides.extend(skip.override for skip in mindskips(model).values())
        return generate(model, *args, **options)

    monkeypatch.setattr(Llama, "generate", watched)
    model = Llama.from_pretrained(tiny)
    with_gates(model, "attn_token")
    save_routers(model, tmp_path / "r.safetensors")
    status, said = call(evaluation.main, "--model", tiny, "--data-dir", question_files, "--tasks",
                        "gsm8k,rte", "--routers", tmp_path / "r.safetensors", "--shuffled", "--json",
                        tmp_path / "o.json")
    assert status == 0, said
    table = json.loads((tmp_path / "o.json").read_text())
    assert list(table["tasks"]) == ["gsm8k", "rte"] and list(table["shuffled"]["tasks"]) == ["rte"]
    assert overrides and set(overrides) == {None}


# ----------------------------------------------------------------------------------------------- side by side


def test_routed_and_static_beside_dense(tiny, question_files, call, tmp_path):
    model = Llama.from_pretrained(tiny)
    with_gates(model, "attn_token")
    save_routers(model, tmp_path / "r.safetensors", [(0.3, 1.0), (0.5, 0.7), (0.8, 0.0)])
    status, said = call(evaluation.main, "--model", tiny, "--routers", tmp_path / "r.safetensors", "--static",
                        2, "--shuffled", "--capacity", 0.7, "--data-dir", question_files,
                        "--limit", 2, "--text", HERE.parent / "data" / "instructions.jsonl", "--last", 3,
                        "--json", tmp_path / "o.json", "--num-fewshot", 0, "--device", "cpu")
    assert status == 0 and "average of 8" in said and "perplexity" in said
    table = json.loads((tmp_path / "o.json").read_text())
    assert table["static"]["capacity"] == pytest.approx(0.5)
    assert table["dense"]["capacity"] == 1 and 0.25 < table["capacity"] < 1
    assert table["shuffled"]["capacity"] == pytest.approx(table["capacity"], abs=0.1)
    for variant in table, table["dense"], table["static"], table["shuffled"]:
        chosen = [name for name in TASKS if not TASKS[name].stop]
        assert list(variant["tasks"]) == (chosen if variant is table["shuffled"] else list(TASKS))
        assert all(t["n"] == 2 and [i["id"] for i in t["items"]] == [0, 1] for t in variant["tasks"].values())
    assert table["tasks"]["piqa"]["items"] != table["dense"]["tasks"]["piqa"]["items"]
    assert table["dense"]["text"]["kl"] == 0 and table["text"]["kl"] > 0 and table["static"]["text"]["kl"] > 0


def test_text_alone(tiny, call, tmp_path):
    model = Llama.from_pretrained(tiny)
    with_gates(model, "attn_sequence")
    save_routers(model, tmp_path / "r.safetensors")
    (tmp_path / "t.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    status, _ = call(evaluation.main, "--model", tiny, "--routers", tmp_path / "r.safetensors", "--text",
                     tmp_path / "t.txt", "--json", tmp_path / "o.json")
    table = json.loads((tmp_path / "o.json").read_text())
    assert status == 0 and table["tasks"] == {}
    assert table["text"]["dense_loss"] == table["dense"]["text"]["loss"]
    assert table["capacity"] == table["text"]["capacity"] < 1 == table["dense"]["capacity"]


def test_what_changed():
    q = [types.SimpleNamespace(id=i, gold=0, lengths=[1, 3]) for i in range(3)]
    dense = Scores(q, [[-1.0, -2.0], [-2.0, -1.0], [-1.0, -1.5]], norm=False)
    other = Scores(q, [[-1.0, -2.0], [-1.0, -2.0], [-3.0, -1.0]], norm=False)
    found = other.against(dense)
    assert (dense.acc, other.acc, found["changed"]) == (2 / 3, 2 / 3, 2) and found["difference"] == 0
    assert found["interval"] == pytest.approx(1.96 / 3**0.5)                  # of 0, 1 and -1
    p, r = (torch.tensor(lls).double().softmax(1) for lls in (dense.lls, other.lls))
    assert found["kl"] == pytest.approx(float((p * (p / r).log()).sum(1).mean()))
    assert Scores(q, dense.lls, norm=True).acc_norm == pytest.approx(0)     # -2 / 3 beats -1


@pytest.mark.parametrize("granularity", ["attn_token", "attn_sequence"])
def test_shuffled_decisions_go_elsewhere_at_every_layers_rate(granularity, tiny, tmp_path):
    """Across the whole text, not within a batch, whose lengths are alike, and so may be its gates."""
    tok, model = Tokenizer.from_pretrained(tiny), Llama.from_pretrained(tiny)
    with_gates(model, granularity)
    save_routers(model, tmp_path / "r.safetensors")
    samples, _ = evaluation.read_samples(evaluation.DEFAULT_DATA, tok, 512)
    args = types.SimpleNamespace(routers=tmp_path / "r.safetensors", capacity=[None], static=[], seed=0)
    found, said = evaluation.make_variants(model, tok, args), {}
    found = evaluation.with_shuffled(found, model, args.seed)
    for name in "routed", "shuffled", "routed", "shuffled":
        found[name]()
        with trace(model) as decisions:
            groups = [Batch.of(group, "cpu") for group in pack(samples[:20], 100)]
            said[name] = evaluation.evaluate(model, groups), decisions
    routed, shuffled = said["routed"], said["shuffled"]
    assert shuffled[0]["keep"] == routed[0]["keep"] and shuffled[0]["kl"] != routed[0]["kl"]
    moved = 0
    for layer, batches in routed[1].items():
        opened = [[int(batch.sum()) for batch in one] for one in (batches, shuffled[1][layer])]
        assert sum(opened[0]) == sum(opened[1])
        moved += opened[0] != opened[1]
    assert moved


def test_static_drops_what_is_missed_least(tiny):
    """The layer whose attention does nothing is the first to go."""
    tok, model = Tokenizer.from_pretrained(tiny), Llama.from_pretrained(tiny)
    model.layers[2].attn.o.weight.data.zero_()
    args = types.SimpleNamespace(seed=0)
    samples, _ = evaluation.read_samples(evaluation.DEFAULT_DATA, tok, 512)
    assert evaluation.layers_by_harm(model, samples[:20], args.seed)[0] == 2


def test_a_text_in_pieces(tiny, call, tmp_path):
    """The first 64 tokens of each are not scored; of several texts no piece has tokens of two."""
    texts, tok = ["fox " * 300, "The quick brown fox. " * 9], Tokenizer.from_pretrained(tiny)
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    lengths = [len(tok.bos_ids + tok.encode(text)) for text in texts]
    for piece in 70, 150, 512:
        status, _ = call(evaluation.main, "--model", tiny, "--text", path, "--piece", piece, "--json",
                         tmp_path / "o.json")
        pieces = [min(piece, n - i) for n in lengths for i in range(0, n, piece)]
        scored = sum(max(0, n - 64) for n in pieces)
        assert status == 0 and json.loads((tmp_path / "o.json").read_text())["text"]["tokens"] == scored


def test_a_dense_text_is_run_once(tiny, call, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a text of some words " * 60)
    passes, forward = [], Block.forward
    monkeypatch.setattr(Block, "forward", lambda *a: passes.append(a[0]) or forward(*a))
    call(evaluation.main, "--model", tiny, "--text", tmp_path / "a.txt", "--last", 1, "--piece", 128)
    assert len(passes) == 4


def test_without_arguments(tiny, call):
    status, said = call(evaluation.main, "--model", tiny)
    assert status == 0 and "no benchmark" in said and all(name in said for name in TASKS)
    assert "perplexity" in said and "per second" in said


def test_from_the_hub(tiny, call, monkeypatch):
    asked = []

    def load_dataset(*hub, split):
        asked.append((*hub, split))
        return [json.loads(line) for line in (QUESTIONS / "piqa" / "validation.jsonl").open()]
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    status, _ = call(evaluation.main, "--model", tiny, "--tasks", "piqa")
    assert status == 0 and asked == [("baber/piqa", None, "validation")]


@pytest.mark.parametrize("after, kept", [
    (1, {"dense": ["rte"]}), (2, {"routed": ["rte"], "dense": ["rte"]}),
    (3, {"routed": ["rte"], "dense": ["rte", "piqa"]})])
def test_what_finished_is_kept(after, kept, tiny, router_file, question_files, call, tmp_path, monkeypatch):
    """After Ctrl-C in a later task, or in that of a later variant: answers may take hours."""
    answered, real = [], evaluation.answer

    def interrupted(*given):
        if len(answered) == after:
            raise KeyboardInterrupt
        answered.append(given[0])
        return real(*given)
    monkeypatch.setattr(evaluation, "answer", interrupted)
    status, _ = call(evaluation.main, "--model", tiny, "--tasks", "rte,piqa", "--data-dir", question_files,
                     "--routers", router_file("attn_token"), "--json", tmp_path / "o.json")
    table = json.loads((tmp_path / "o.json").read_text())
    first = "routed" if "routed" in kept else "dense"
    tables = {first: table} | {name: table[name] for name in kept if name != first}
    assert status == 130 and {name: list(each["tasks"]) for name, each in tables.items()} == kept
    assert ("routers" in table) == ("routed" in kept)


def test_a_text_that_was_scored_is_kept(tiny, router_file, call, tmp_path, monkeypatch):
    evaluated, real = [], evaluation.evaluate

    def interrupted(*given):
        if len(evaluated) == 2:
            raise KeyboardInterrupt
        evaluated.append(given[0])
        return real(*given)
    monkeypatch.setattr(evaluation, "evaluate", interrupted)
    (tmp_path / "t.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    status, _ = call(evaluation.main, "--model", tiny, "--text", tmp_path / "t.txt", "--static", "1,2",
                     "--routers", router_file("attn_token"), "--json", tmp_path / "o.json")
    table = json.loads((tmp_path / "o.json").read_text())
    assert status == 130 and table["text"]["kl"] > 0 and table["dense"]["text"]["kl"] == 0
    assert not {"static 1", "static 2"} & table.keys()


# -------------------------------------------------------------------------------------------------- bad input


def test_a_choice_that_the_vocabulary_lacks(tiny):
    """Also as its last token, which the model never reads."""
    model, tok = Llama.from_pretrained(tiny), Tokenizer.from_pretrained(tiny)
    question = Question(0, ["The sky"], [" is blue"], [8], 0, "")
    n = model.config.vocab_size
    encode = tok.encode
    tok.encode = lambda text: encode(text) + [n] * text.endswith("blue")
    with pytest.raises(InputError, match=f"token id {n} is not in the model's vocabulary of {n}"):
        scoring.log_likelihoods(model, [question], tok, 512, Usage(model))


def test_a_choice_that_is_longer_than_the_context(tiny):
    model, tok = Llama.from_pretrained(tiny), Tokenizer.from_pretrained(tiny)
    for n, refused in (model.config.max_context, False), (model.config.max_context + 1, True):
        ids = tok.encode("The sky"), tok.encode("The sky") + [5] * n
        tok.encode = lambda text, ids=ids: ids["blue" in text]
        question = Question(6, ["The sky"] * 2, [" is blue", " blue"], [8, 5], 0, "")
        if refused:
            with pytest.raises(InputError, match=f"question 7: a choice has {n} tokens"):
                scoring.log_likelihoods(model, [question], tok, 512, Usage(model))
        else:                                        # one token of the context stays, to predict the first
            assert scoring.log_likelihoods(model, [question], tok, 512, Usage(model))[1] == 1
        tok = Tokenizer.from_pretrained(tiny)


@pytest.mark.parametrize("flags, words", [
    (["--tasks", "piqa,quiz"], ["quiz", "winogrande"]),
    (["--tasks", "piqa", "--data-dir", "nowhere"], ["--data-dir nowhere", "No such file"]),
    (["--data-dir", __file__], ["--data-dir", "Not a directory"]),
    (["--data-dir", Path(__file__).parent], ["--data-dir", "no folder of a task", "piqa"]),
    (["--tasks", "piqa", "--limit", -1], ["--limit", "-1"]),
    (["--tasks", "piqa", "--num-fewshot", -2], ["--num-fewshot"]),
    (["--tasks", "arc_challenge", "--num-fewshot", 40], ["40", "train.jsonl", "--num-fewshot"]),
    (["--tasks", "rte", "--routers", "none.safetensors"], ["none.safetensors"]),
    (["--tasks", "rte", "--shuffled"], ["--routers"]),
    (["--tasks", "rte", "--last", 5], ["--last", "--text"]), (["--tasks", "rte", "--piece", 99], ["--piece"]),
    (["--piece", 99], ["--piece", "--text"]),
    (["--tasks", "rte", "--static-data", "none"], ["--static-data: only with --static"]),
    (["--text", "none", "--limit", 5], ["--limit: only with --tasks"]),
    (["--text", "none", "--num-fewshot", 0], ["--num-fewshot: only with --tasks"]),
    (["--tasks", "rte", "--capacity", 0.5], ["--routers"]),
    (["--tasks", "rte", "--static", 9], ["--static", "4 layers"]),
    (["--text", "nothing.txt"], ["nothing.txt"]), (["--text", "x.txt", "--piece", 64], ["--piece"]),
    (["--data-dir", 300 * "a"], ["--data-dir aaaa", "too long"]),
    (["--tasks", "rte", "--static", 1, "--static-data", "{short}"], ["--static-data", "no sample"]),
])
def test_bad_flags(flags, words, tiny, question_files, call):
    flags = flags if "--data-dir" in flags or "--text" in flags else [*flags, "--data-dir", question_files]
    if "{short}" in flags:                                      # too short to leave an answer
        (question_files / "short.txt").write_text("Hello.")
        flags[flags.index("{short}")] = question_files / "short.txt"
    status, said = call(evaluation.main, "--model", tiny, *flags)
    assert status in (1, 2) and is_one_sentence(said) and all(word in said for word in words), said


@pytest.mark.parametrize("line, words", [
    ('{"goal": "a", ', ["line 2", "JSON"]),
    ('{"goal": "a", "sol1": "b", "label": 0}', ["line 2", "sol2"]),
    ('{"goal": "a", "sol1": "b", "sol2": "c"}', ["line 2", "label"]),
    ('{"goal": "a", "sol1": "b", "sol2": "c", "label": 2}', ["line 2", "answer"]),
    ('{"goal": "a", "sol1": "b", "sol2": "c", "label": "x"}', ["line 2", "answer"]),
    ('{"goal": "a", "sol1": "b", "sol2": "", "label": 1}', ["line 2", "empty"]),
    ('{"goal": "a", "sol1": 5, "sol2": "c", "label": 1}', ["line 2", "'sol1' should be text, not 5"]),
    ('{"goal": 5, "sol1": "b", "sol2": "c", "label": 1}', ["line 2", "'goal' should be text"]),
    ('{"goal": "a", "sol1": ["b"], "sol2": "c", "label": 1}', ["line 2", "should be text, not a list"]),
    ('{"goal": "a", "sol1": null, "sol2": "c", "label": 1}', ["line 2", "'sol1' should be text, not None"]),
    ('{"goal": "a", "sol1": "b", "sol2": "c", "label": 1.7}', ["line 2", "answer"]),
    ('{"goal": "a", "sol1": "b", "sol2": "c", "label": -1}', ["line 2", "answer"]),
    ('{"goal": "a", "sol1": "b", "sol2": "c", "label": null}', ["line 2", "answer"]),
    ("[1, 2]", ["line 2"]),
])
def test_bad_lines(line, words, tiny, question_files, call):
    path = question_files / "piqa" / "validation.jsonl"
    first = path.read_text().splitlines()[0]
    path.write_text(f"{first}\n{line}\n")
    status, said = call(evaluation.main, "--model", tiny, "--tasks", "piqa", "--data-dir", question_files)
    assert status == 1 and is_one_sentence(said) and all(word in said for word in words), said


def test_without_data_or_hub(tiny, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    status, said = call(evaluation.main, "--model", tiny, "--tasks", "piqa")
    assert status == 1 and is_one_sentence(said) and "--data-dir" in said and "piqa/validation.jsonl" in said


@pytest.mark.parametrize("task, change, named", [
    ("arc_easy", {"choices": {"text": "abcd", "label": ["A"]}}, "'text' should be a list"),
    ("arc_easy", {"choices": {"text": ["a", 2], "label": ["A", "B"]}}, "'text'[1] should be text, not 2"),
    ("arc_easy", {"choices": {"text": [], "label": []}}, "none of its 0 choices"),
    ("arc_easy", {"answerKey": "Z"}, "answer"), ("mmlu", {"choices": ["a", "b", "c"]}, "not a question"),
    ("mmlu", {"choices": ["a", "b", "c", "d", "e"]}, "not a question"), ("mmlu", {"subject": 1}, "'subject'"),
    ("mmlu", {"answer": 4}, "answer"), ("winogrande", {"sentence": "no blank"}, "not a question"),
    ("winogrande", {"answer": "3"}, "answer"), ("hellaswag", {"endings": [1, 2, 3, 4]}, "'endings'[0]"),
    ("boolq", {"passage": None}, "'passage'"), ("rte", {"label": "yes"}, "answer"),
    ("openbookqa", {"choices": 5}, "'choices' should be an object"),
    ("gsm8k", {"answer": "It is 7."}, "no line '#### number'"), ("gsm8k", {"answer": 7}, "'answer' should"),
])
def test_records_that_are_no_questions(task, change, named, question_files, tiny, call):
    path = next((question_files / task).glob(f"{TASKS[task].split}.jsonl"))
    record = json.loads(path.read_text().splitlines()[0]) | change
    path.write_text(json.dumps(record))
    status, said = call(evaluation.main, "--model", tiny, "--tasks", task, "--data-dir", question_files,
                        "--num-fewshot", 0)
    assert status == 1 and is_one_sentence(said) and named in said and "line 1" in said, said


@pytest.mark.parametrize("label", [1, "1", " 1"])
def test_an_answer_may_be_a_number_or_its_text(label, question_files):
    for task, field in ("piqa", "label"), ("boolq", "label"), ("winogrande", "answer"):
        path = question_files / task / f"{TASKS[task].split}.jsonl"
        path.write_text(json.dumps(json.loads(path.read_text().splitlines()[0]) | {field: label}))
        assert questions_of(question_files, task)[0].gold == (0 if task == "winogrande" else 1)


@pytest.mark.parametrize("values", [[float("nan"), 0.0], [0.0, float("inf")], [float("-inf"), 0.0]])
@pytest.mark.parametrize("of", ["tasks", "text"])
def test_what_is_not_finite_is_no_result(values, of, tiny, question_files, call, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "log_likelihoods", lambda _, some, *rest: ([values] * len(some), 0, 1))
    real = evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", lambda *a: real(*a) | {"loss": sum(values)})
    flags = ["--tasks", "piqa", "--data-dir", question_files]
    if of == "text":
        flags = ["--text", question_files / "t"]
        (question_files / "t").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    status, said = call(evaluation.main, "--model", tiny, *flags, "--json", tmp_path / "o.json")
    assert status == 1 and is_one_sentence(said) and "not finite" in said
    assert not (tmp_path / "o.json").exists()


def test_averages_over_tasks_and_over_their_questions(capsys):
    rng = torch.Generator().manual_seed(0)
    sizes = {"piqa": 400, "rte": 50, "arc_easy": 70}                     # the last is not one of the paper's
    scores = {"dense": {}, "routed": {}}
    for name, n in sizes.items():
        right, differs = torch.rand(2, n, generator=rng).double()
        scores["dense"][name] = types.SimpleNamespace(right=right.round())
        scores["routed"][name] = types.SimpleNamespace(right=torch.where(differs < 0.2, 1, right).round())
    evaluation.show_averages(scores)
    lines = capsys.readouterr().out.splitlines()
    assert "average of 2 of the paper" in lines[0] and "average over questions" in lines[2]
    piqa, rte = (scores["routed"][name].right - scores["dense"][name].right for name in ("piqa", "rte"))
    drawn = torch.stack([some[torch.randint(len(some), (4000, len(some)), generator=rng)].mean(1)
                         for some in (piqa, rte)])                       # bootstrap: (2, 4000)
    for line, weights in (lines[1], [0.5, 0.5]), (lines[3], [400 / 450, 50 / 450]):
        score, difference, interval = map(float, re.findall(r"[+-]?\d+\.\d", line))
        means = [float(scores["routed"][name].right.mean()) for name in ("piqa", "rte")]
        assert score == pytest.approx(100 * sum(w * m for w, m in zip(weights, means)), abs=0.06)
        totals = 100 * torch.tensor(weights).double() @ drawn
        assert difference == pytest.approx(float(totals.mean()), abs=0.3)
        assert interval == pytest.approx(1.96 * float(totals.std()), rel=0.07)


def test_one_question_has_no_interval(tiny, question_files, call):
    status, said = call(evaluation.main, "--model", tiny, "--tasks", "piqa,rte", "--data-dir", question_files,
                        "--limit", 1, "--static", 1, "--num-fewshot", 0)
    assert status == 0 and "nan" not in said and "average of 2" in said


def test_a_question_without_tokens(tok, question_files):
    question = questions_of(question_files, "openbookqa")[0]
    with pytest.raises(InputError, match="question 1: its context or a choice has no token"):
        rows_of([question._replace(contexts=[" "] * 4)], tok, 512, apart=False)
