"""Files of strangers, changed at random: each is read, or refused in one sentence."""
import json
import random

import pytest
from conftest import train_tokenizer, write_data

from support.data import read_samples
from tokenizer import Tokenizer
from weights import InputError

VALUES = [None, True, 0, -1, 10**20, 0.5, "", "x", "\ud800", [], [[]], {}, {"x": 1}, "(" * 50, "a" * 10_000]
N = 150        # changes of each kind of file


def changed(value, rng):
    """A copy of a JSON value with one random change somewhere in it."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.15:
            return value | {rng.choice(list(value)): value[key]}
        return value | {key: changed(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        i = rng.randrange(len(value))
        kind = rng.random()
        if kind < 0.1:
            return value[:i] + value[i + 1:]
        return [*value[:i], changed(value[i], rng), *value[i + 1:]]
    return rng.choice(VALUES)


def garbled(data, rng):
    """Bytes with one random change."""
    i, kind = rng.randrange(len(data)), rng.random()
    if kind < 0.2:
        return data[:i]
    if kind < 0.4:
        return data[:i] + data[i:i + 40] * 2 + data[i + 40:]
    return data[:i] + bytes([rng.randrange(256)]) + data[i + 1:]


def refused(f, *args):
    """Whether f says InputError, in one sentence; else its result has to be right, see the callers."""
    try:
        return None, f(*args)
    except InputError as e:
        assert 20 < len(str(e)) < 700 and len(str(e).splitlines()) == 1, str(e)
        return str(e), None


CHAT = [{"role": "user", "content": "say <|im_end|> é"}, {"role": "assistant", "content": "Hello there."}]


def use(folder):
    tok = Tokenizer.from_pretrained(folder)
    ids, answer = tok.encode_chat(CHAT)
    assert len(ids) == len(answer) and all(isinstance(i, int) for i in tok.encode("The quick fox <|im_end|>"))
    tok.decode(ids)
    return tok


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    (tmp_path / "tokenizer.json").write_text(train_tokenizer().to_str())
    return tmp_path


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizer_files(name, folder):
    rng, outcomes = random.Random(0), []
    value = json.loads((folder / "tokenizer.json").read_text())
    if name == "tokenizer_config.json":
        value = {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>", "lstrip": False},
                 "add_bos_token": True, "chat_template": [{"name": "default", "template": "{{ messages }}"}]}
    for _ in range(N):
        (folder / name).write_text(json.dumps(changed(value, rng)))
        outcomes.append(refused(use, folder)[0])
    text = json.dumps(value).encode()
    for _ in range(N):
        (folder / name).write_bytes(garbled(text, rng))
        outcomes.append(refused(use, folder)[0])
    assert 0 < sum(outcome is None for outcome in outcomes) < 2 * N


def test_templates(folder):
    source = ("{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}{{ m['role'] + '|>' }}"
              "{{ m['content'] | trim }}{% set x = [1, 2] %}{{ x[loop.index0] }}{% endfor %}")
    rng, outcomes = random.Random(1), []
    for _ in range(2 * N):
        (folder / "chat_template.jinja").write_bytes(garbled(source.encode(), rng))
        outcomes.append(refused(use, folder)[0])
    assert 0 < sum(outcome is None for outcome in outcomes) < 2 * N


def test_data(tok, tmp_path):
    rng, outcomes, path = random.Random(2), [], tmp_path / "d.jsonl"
    records = [{"messages": CHAT}, {"text": "word " * 100}, {"prompt": "a", "completion": "b"},
               {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}]
    records += [json.loads(line) for line in write_data(path, 6).read_text().splitlines()]
    for _ in range(N):
        path.write_text("".join(json.dumps(changed(record, rng)) + "\n" for record in records))
        outcomes.append(refused(read_samples, path, tok, 100)[0])
    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    for _ in range(N):
        path.write_bytes(garbled(text, rng))
        said, result = refused(read_samples, path, tok, 100)
        outcomes.append(said)
        assert said or all(len(s.ids) == len(s.answer) <= 100 and any(s.answer) for s in result[0])
    assert 0 < sum(outcome is None for outcome in outcomes) < 2 * N
