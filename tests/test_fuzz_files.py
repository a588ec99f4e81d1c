"""Files with random damage: a model that works, or one sentence. FUZZ=1000 in the environment tries more."""
import collections
import json
import os
import random
import shutil

import conftest
import pytest
import torch
from test_weights import as_gguf, gguf_tokenizer

from model import Llama
from tokenizer import Tokenizer
from weights import InputError, open_checkpoint

N = int(os.environ.get("FUZZ", 200))        # mutations of each kind of file
ODD = [None, True, False, 0, -1, 1, 2, 3, 7, 48, 320, 1000, 10**12, 10**20, 2.5, -0.5, 1e-40, 1e308,
       float("nan"), float("inf"),
       "", "false", "48", "x" * 5000, "a\0b\n", "../x", "\ud800", [], [1], ["a"], [[[]]], {},
       {"a": 1}, {"content": 3}]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a small model, its tokenizer and all that a folder may have; and a GGUF file of it."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conftest, "TINY", conftest.TINY | dict(num_hidden_layers=1, hidden_size=16, head_dim=8,
                                                             num_attention_heads=2, intermediate_size=16))
        conftest.write_tiny(folder, "Llama 3.1 rope")
    conftest.train_tokenizer(digits=True).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "add_bos_token": False, "bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>"},
        "chat_template": [{"name": "default", "template": "{{ messages[0]['content'] }}"}]}))
    spec = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens, merges = list(spec["vocab"]), [" ".join(merge) for merge in spec["merges"]]
    kinds = [3] * 3 + [1] * (len(tokens) - 3)
    meta = gguf_tokenizer(tokens=tokens, token_type=kinds, merges=merges, eot_token_id=0, add_bos_token=True)
    as_gguf(folder, folder / "m.gguf", "llama", meta=meta)
    return folder


def mutated_json(value):
    """A JSON text with one value or key of `value` changed, or with damaged text."""
    value = json.loads(json.dumps(value))
    if random.random() < 0.1:
        return mutated_bytes(json.dumps(value).encode())
    places = [(value, key) for key in value]
    for holder, key in places:
        if isinstance(holder[key], dict):
            places += [(holder[key], inner) for inner in holder[key]]
        if isinstance(holder[key], list):
            places += [(holder[key], i) for i in range(min(3, len(holder[key])))]
    holder, key = random.choice(places)
    how = random.random()
    if how < 0.1:
        del holder[key]
    elif how < 0.2 and isinstance(holder, dict):
        holder[random.choice(["x", "", "model.norm.bias", "a\n"])] = holder.pop(key)
    elif how < 0.3 and type(holder[key]) in (int, float):
        holder[key] *= random.choice([-1, 0, 2, 0.5, 1e6, 10**6])
    elif how < 0.33:
        holder[key] = "DEEP"
        return json.dumps(value).replace('"DEEP"', "[" * 100_000).encode()
    else:
        holder[key] = random.choice(ODD)
    return json.dumps(value).encode()


def mutated_bytes(data, start=0, end=None):
    """Bytes with some changed between start and end, or cut short."""
    end, data = end or len(data), bytearray(data)
    how = random.random()
    at = random.randrange(start, end)
    if how < 0.1:
        return bytes(data[:at])
    if how < 0.2:
        return bytes(data[:at] + random.randbytes(8) + data[at:])
    if how < 0.5:
        number = random.choice([0, 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1])
        data[at:at + 8] = number.to_bytes(8, "little")
        return bytes(data)
    for _ in range(random.choice([1, 2, 20])):
        data[random.randrange(start, end)] = random.choice([0, 1, 0x7f, 0x80, 0xff, random.randrange(256)])
    return bytes(data)


def mutate_config(folder):
    (folder / "config.json").write_bytes(mutated_json(json.loads((folder / "config.json").read_text())))


def mutate_generation_config(folder):
    generation = {"eos_token_id": [0, 2], "temperature": 0.6}
    (folder / "generation_config.json").write_bytes(mutated_json(generation))


def mutate_tokenizer_config(folder):
    path = folder / "tokenizer_config.json"
    path.write_bytes(mutated_json(json.loads(path.read_text())))


def mutate_index(folder):
    names = sorted(open_checkpoint(folder).names)
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model-1.safetensors")}
    (folder / "model.safetensors.index.json").write_bytes(mutated_json(index))


def mutate_header(folder):
    """A safetensors file is the length of its header in 8 bytes, the header in JSON, and numbers."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if random.random() < 0.3:
        path.write_bytes(mutated_bytes(data, 0, 8 + length))
        return
    header = mutated_json(json.loads(data[8:8 + length]))
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length:])


def mutate_weights(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(mutated_bytes(data, 8 + int.from_bytes(data[:8], "little")))


def mutate_gguf_metadata(folder):
    path = folder / "m.gguf"
    data = path.read_bytes()
    path.write_bytes(mutated_bytes(data, 0, data.index(b"blk.0.ffn_up") + 200))


def mutate_gguf_weights(folder):
    path = folder / "m.gguf"
    data = path.read_bytes()
    path.write_bytes(mutated_bytes(data, len(data) // 2))


MUTATIONS = [mutate_config, mutate_generation_config, mutate_tokenizer_config, mutate_index, mutate_header,
             mutate_weights, mutate_gguf_metadata, mutate_gguf_weights]


def outcome(path):
    """"works" or "refused"; anything else is raised."""
    try:
        model = Llama.from_pretrained(path)
        idx = torch.randint(0, model.config.vocab_size, (2, min(9, model.config.max_context)))
        with torch.no_grad():
            assert torch.isfinite(model(idx)).all()
        tok = Tokenizer.from_pretrained(path)
        assert tok.decode(tok.encode("the fox")) == "the fox"
        ends = open_checkpoint(path).tokenizer()["config"]["eos_token_ids"]
        assert len(ends) == len(set(ends)) and all(type(end) is int and end >= 0 for end in ends)
        return "works"
    except InputError as e:
        assert conftest.is_one_sentence(str(e))
        return "refused"


@pytest.mark.parametrize("mutate", MUTATIONS)
def test_damaged_files_work_or_are_refused_in_a_sentence(mutate, whole, tmp_path):
    counts = collections.Counter()
    for i in range(N):
        random.seed(i)
        folder = shutil.copytree(whole, tmp_path / "m", dirs_exist_ok=True)
        mutate(folder)
        try:
            counts[outcome(folder / "m.gguf" if "gguf" in mutate.__name__ else folder)] += 1
        except BaseException as e:
            e.add_note(f"mutation {i} of {mutate.__name__}")
            raise
        shutil.rmtree(folder)
    print(mutate.__name__, dict(counts))
    assert counts["works"] and counts["refused"] > N // 10
