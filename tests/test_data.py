"""Files to samples, samples to batches."""
import json
from itertools import islice

import pytest
import torch
from conftest import write_data

from support.batches import Batch, alternating, batches, epochs, pack
from support.data import DEFAULT_DATA, pieces, read_samples
from support.template import ChatTemplate
from weights import InputError


def test_only_answers_count(tok, tmp_path):
    samples, _ = read_samples(write_data(tmp_path / "d.jsonl"), tok, 512)
    batch = Batch.of(samples[:5], "cpu")
    for b, s in enumerate(samples[:5]):
        n, text = len(s.ids), tok.decode(s.ids)
        scored = [s.ids[t + 1] for t in range(n - 1) if batch.scored[b, t]]
        assert tok.decode(scored) == text.split("<|im_start|>assistant\n")[1].removesuffix("\n")
        assert tok.decode(s.ids[:s.prompt]).endswith("<|im_start|>assistant\n")
        assert not batch.scored[b, n - 1:].any()
    assert len(batch.targets) == int(batch.scored.sum())


def test_batches_use_every_sample_once_an_epoch_within_the_budget(tok, tmp_path):
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
    chat = {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"},
                         {"role": "assistant", "content": "A"}, {"role": "user", "content": "V"},
                         {"role": "assistant", "content": "B"}, {"role": "user", "content": "unanswered"}]}
    (tmp_path / "c.jsonl").write_text(json.dumps(chat))
    (sample,), _ = read_samples(tmp_path / "c.jsonl", tok, 512)
    assert tok.decode([i for i, a in zip(sample.ids, sample.answer) if a]) == "A<|im_end|>B<|im_end|>"
    assert tok.decode(sample.ids[:sample.prompt]).endswith("U<|im_end|>\n<|im_start|>assistant\n")
    assert "unanswered" not in tok.decode(sample.ids)
    text = "The quick brown fox. " * 200
    (tmp_path / "d.txt").write_text(text)
    (tmp_path / "e.jsonl").write_text(json.dumps({"text": text}))
    plain, same = (read_samples(tmp_path / name, tok, 256)[0] for name in ("d.txt", "e.jsonl"))
    assert plain == same and len(plain) > 2
    assert text.startswith(tok.decode([i for s in plain for i in s.ids]))
    assert plain[0].answer == [False] * 64 + [True] * 192 and plain[0].prompt == 64


def test_every_form_of_a_record(tok, tmp_path, capsys):
    """The same chat in the forms that people have; `text` beside them is not taken for the sample."""
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, chat[1] | {"tool_calls": None}]
    records = [
        {"messages": chat, "text": "other"}, {"messages": parts}, {"messages": chat, "instruction": None},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "text": "x"},
        {"instruction": "Q", "input": "", "output": "A", "text": "Below is an instruction: Q A"},
        {"instruction": "Q", "input": None, "output": "A"},
        {"instruction": "Q", "context": "", "response": "A"}, {"prompt": "Q", "completion": "A"},
        {"context": "Q", "response": "A"},
        {"text": None, "prompt": "Q", "completion": "A"}]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8-sig")      # a BOM, too
    samples, _ = read_samples(path, tok, 512)
    assert len(samples) == len(records) and all(sample == samples[0] for sample in samples)
    assert tok.decode(samples[0].ids).count("Q") == 1
    said = capsys.readouterr().err
    assert "3 as chat, 1 as conversations, 3 as instruction, 2 as prompt, 1 as context" in said
    text = {"text": "word " * 200, "messages": None}
    path.write_text(json.dumps(text), "utf-8-sig")
    assert len(read_samples(path, tok, 512)[0]) >= 1 and "1 as text" in capsys.readouterr().err


def test_what_stands_before_a_record(tok, tmp_path):
    """A system message and earlier turns, as Alpaca's and ShareGPT's descendants have them."""
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"},
             {"role": "assistant", "content": "A"}, {"role": "user", "content": "Q"},
             {"role": "assistant", "content": "B"}]
    said = [{"from": m["role"], "value": m["content"]} for m in turns[1:]]
    said[0]["from"], said[1]["from"], said[3]["from"] = "human", "chatgpt", "bing"
    weighted = [m | {"weight": int(m["role"] == "assistant")} for m in turns]
    records = [{"messages": turns}, {"messages": weighted}, {"system": "S", "conversations": said},
               {"system": "S", "messages": turns}, {"system": "S", "messages": turns[1:], "history": []},
               {"system": "S", "history": [["U", "A"]], "instruction": "Q", "output": "B"}]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    samples, _ = read_samples(path, tok, 512)
    assert len(samples) == len(records) and all(sample == samples[0] for sample in samples)
    assert tok.decode(samples[0].ids).startswith("<|im_start|>system\nS")


@pytest.mark.parametrize("record, named", [
    ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]}, "line 1: has tool calls"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "tool calls"),
    ({"messages": [{"role": "assistant", "content": "a", "thinking": "b"}]}, "line 1: has a thought"),
    ({"messages": [{"role": "assistant", "content": "a", "reasoning": "b"}]}, "line 1: has a thought"),
    ({"messages": [{"role": "assistant", "content": "", "function_call": {"name": "f"}}]}, "has tool calls"),
    ({"messages": [], "tools": [{"name": "f"}]}, "line 1: has 'tools'"),
    ({"messages": [], "chat_template_kwargs": {"enable_thinking": False}}, "has 'chat_template_kwargs'"),
    ({"conversations": [], "tools": '[{"name": "f"}]'}, "line 1: has 'tools'"),
    ({"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}, "line 1: 'content' is a list"),
    ({"messages": [{"role": "assistant", "content": [{"type": "text"}]}]}, "line 1: 'content' is a list"),
    ({"instruction": "a", "output": ["one answer", "another"]}, "line 1: 'output' is a list"),
    ({"text": ["one document", "another"]}, r"line 1: 'text' is a list.*\.\.\.'}; give one text"),
    ({"conversations": [{"from": "gpt"}]}, "'value'"), ({"prompt": "a"}, "'instruction'"),
    ({"instruction": "a", "output": None}, "'output'"),
    ({"messages": [{"role": "assistant", "content": "a", "weight": 0}]}, "answer of weight 0"),
    ({"messages": [{"role": "Chat", "content": "a"}]}, "'Chat'"),
    ({"instruction": "a", "output": "b", "history": [["a", 1]]}, "its history"),
    ({"instruction": "a", "output": "b", "history": 5}, "'history'"),
    ({"instruction": "a", "output": "b", "system": {"a": 1}}, "'system'"),
])
def test_records_that_are_refused(record, named, tok, tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps(record))
    with pytest.raises(InputError, match=named):
        read_samples(tmp_path / "d.jsonl", tok, 512)


def test_tools_that_are_none(tok, tmp_path):
    chat = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    rows = [chat, chat | {"tools": "[]"}, chat | {"tools": [], "chat_template_kwargs": {"thinking": None}}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples, _ = read_samples(tmp_path / "d.jsonl", tok, 512)
    assert len(samples) == 3 and samples[0] == samples[1] == samples[2]


def test_what_has_nothing_to_learn_from_is_counted(tok, tmp_path, capsys):
    rows = [{"text": "short"}, {"prompt": "x " * 200, "completion": "cut off"},
            {"prompt": "a", "completion": "b"}, {"conversations": []},
            {"messages": [{"role": "user", "content": "unanswered"}]}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples, _ = read_samples(tmp_path / "d.jsonl", tok, 100)
    said = capsys.readouterr().err
    assert len(samples) == 1 and "1 as conversations, 1 as chat; 4 have nothing to learn from" in said
    silent = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    tok.template = ChatTemplate.of(silent, tok.special, {})                # it shows no answers
    (tmp_path / "d.jsonl").write_text((json.dumps(rows[2]) + "\n") * 3)
    assert read_samples(tmp_path / "d.jsonl", tok, 100) == ([], 0)
    assert "3 have nothing to learn from" in capsys.readouterr().err


def test_a_chat_that_its_template_refuses_is_named_by_its_line(tok, tmp_path):
    strict = ("{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
              "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}")
    tok.template = ChatTemplate.of(strict, tok.special, {})
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    rows = [{"messages": chat}, {"messages": chat[:1] + chat}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="d.jsonl, line 2: .*roles must alternate"):
        read_samples(tmp_path / "d.jsonl", tok, 100)


@pytest.mark.parametrize("text", ["[1] A note.\n", "{curly} text ", "[INST] x ", '{"text": 3}\n'])
def test_a_name_tells_plain_text(text, tok, tmp_path):
    for name in "d.txt", "d.md":
        (tmp_path / name).write_text(text * 200)
        samples, _ = read_samples(tmp_path / name, tok, 512)
        assert tok.decode(samples[0].ids) in text * 200
    (tmp_path / "d.json").write_text(text * 200)
    with pytest.raises(InputError, match="valid JSON|'text'"):
        read_samples(tmp_path / "d.json", tok, 512)


def test_special_tokens_in_text_are_text(tok, tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": "the fox <|endoftext|> <|im_end|> " * 40}))
    (tmp_path / "d.txt").write_text("the fox <|endoftext|> <|im_end|> " * 40)
    for name in "d.jsonl", "d.txt":
        samples, _ = read_samples(tmp_path / name, tok, 512)
        assert samples and not any({*s.ids} & {*tok.special.values()} for s in samples)


def test_pieces_of_text():
    text = torch.arange(3 * 250).view(3, 250)
    found = pieces(text.tolist(), 100)
    assert [len(p.ids) for p in found] == 3 * [100, 100, 50] and [p.prompt for p in found] == 3 * [64, 64, 50]
    assert [i for p in found for i in p.ids] == list(range(750)) and all(all(p.answer) for p in found)
    assert [len(p.ids) for p in pieces(text.tolist(), 249)] == 3 * [249]     # one token predicts nothing


def test_long_samples_are_cut_and_counted(tok, tmp_path):
    rows = [{"instruction": "a", "output": "word " * n} for n in (3, 500, 5, 400)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples, cut = read_samples(tmp_path / "a.jsonl", tok, 100)
    assert cut == 2 and [len(s.ids) for s in samples][1::2] == [100, 100]


@pytest.mark.parametrize("text, named", [
    (b"", "empty"),
    (b"  \n\n", "empty"),
    (b"\x89PNG\r\n\x1a\n\0\0\xff", "UTF-8"),
    (b"{}\0{}", "binary"),
    (b'{"instruction": "a", "output": "b"}\n{broken\n', "line 2"),
    (b'{"instruction": "a", "output": "b"}\n\n[1]\n', "line 3: lacks the field 'instruction'"),
    (b'{"instruction": "a"}', "line 1: lacks the field 'output'"),
    (b'{"instruction": "a", "input": 3, "output": "b"}', "'input'"),
    (b'{"output": "b"}', "'instruction'"),
    (b'{"messages": [{"role": "assistant"}]}', "'content'"),
    (b'{"messages": "hi"}', "'messages'"),
    (b'{"text": 3}', "'text'"),
    (b'[{"instruction": "a", "output": "b"}', "not valid JSON"),
    (b'[{"instruction": "a", "output": "b"}, {"instruction": "a"}]', "record 2: lacks the field 'output'"),
])
def test_data_that_is_refused(text, named, tok, tmp_path):
    (tmp_path / "data").write_bytes(text)
    with pytest.raises(InputError, match=named):
        read_samples(tmp_path / "data", tok, 512)


def test_the_data_that_ships():
    rows = [json.loads(line) for line in DEFAULT_DATA.read_text("utf-8").splitlines()]
    assert len(rows) >= 320 and all(set(row) == {"instruction", "input", "output"} for row in rows)
    assert len({row["instruction"] for row in rows}) == len(rows)
    words = sorted(len(row["output"].split()) for row in rows)
    assert words[len(rows) // 10] < 12 and words[-len(rows) // 10] > 120


def test_epochs_take_each_sample_once(samples):
    """Of PAPER's steps: so many samples each, in groups within the budget, in another order each epoch."""
    steps = list(islice(epochs(samples, 16, 300, seed=0), 6))
    per_step = [[s for kind, group in step for s in group] for step in steps]
    assert [len(some) for some in per_step] == [16, 16, 8] * 2 and len(samples) == 40
    for epoch in per_step[:3], per_step[3:]:
        assert sorted(map(id, sum(epoch, []))) == sorted(map(id, samples))
    assert per_step[0] != per_step[3]
    for step in steps:
        for kind, group in step:
            assert kind == 0 and len(group) * max(len(s.ids) for s in group) <= 300


def test_kinds_of_text_take_turns(samples):
    kinds = [samples[:10], samples[10:]]
    steps = list(islice(alternating(kinds, 200, 3, seed=0), 4))
    assert [[kind for kind, _ in step] for step in steps] == [[0, 1, 0], [1, 0, 1]] * 2
    expected = [batches(some, 200, 0) for some in kinds]
    for kind, group in sum(steps, []):
        assert group == next(expected[kind]) and all(s in kinds[kind] for s in group)


def test_nothing_makes_no_batches():
    with pytest.raises(InputError, match="no samples"):
        next(batches([], 100, 0))
