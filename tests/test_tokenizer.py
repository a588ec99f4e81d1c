"""Token ids, against `tokenizers`."""
import base64
import json
import random
import shutil

import gguf
import pytest
import tokenizers
from conftest import CORPUS, train_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_template import sentencepiece
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from support.gguf import LLAMA3_SPLIT as LLAMA3
from support.gguf import QWEN2_SPLIT as QWEN2
from tokenizer import LLAMA3_SPECIAL, Tokenizer
from weights import InputError, open_checkpoint, write_folder

PIECES = ["the", "The", " quick", "ing", "'s", "'ll", "I'VE", "don't", " ", "  ", "   ", "\t", "\n", "\r\n",
          "\n\n ", "0", "7", "42", "1234", "3.14", "x1", "é", "e\u0301", "ñ", "ß", "Ω", "Жук", "漢字", "かな",
          "한국",
          "العربية", "עברית", "हिन्दी", "٣٤", "Ⅷ",
          "½", "²", "😀", "👩‍👩‍👧", "🇫🇷",
          "\u00a0", "\u3000", "\u2028", "\u200b", "\ufeff", "_", "->", "==", "#!/", "{}", "();", "\\n",
          "<|im_start|>", "<|im_end|>",
          "<|endoftext|>", "<|im_start", "<file_sep>", "—", "…", "“"]
PROSE = ["Dr. Ada's report, dated 12 May 1843, runs to 66 pages; nobody'd read it all.",
         "for i in range(10):\n\tprint(i, end=' ')", "SELECT name FROM t WHERE id=42 AND x>=3.5;",
         "  leading and trailing  ", "a1b2 c3  d4   e5\t6 \n7", "", "\n"]
TOKENLESS = [0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)]


def strings(n, seed=0):
    rng = random.Random(seed)
    yield from PROSE
    for _ in range(n):
        yield "".join(rng.choices(PIECES, k=rng.randint(1, 12)))


def letters(text):
    """Without characters that have no token in SmolLM2's vocabulary."""
    return "".join(c for c in text if not set(c.encode()) & set(TOKENLESS))


@pytest.fixture(scope="session")
def pair(smollm2):
    """The real tokenizer, ours and theirs, built from the GGUF's merges with SmolLM2's pre-tokenizer."""
    spec = json.loads((smollm2 / "tokenizer.json").read_text())
    merges = [tuple(merge.split(" ")) for merge in spec["model"]["merges"]]
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(spec["model"]["vocab"], merges))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    theirs.decoder = tokenizers.decoders.ByteLevel()
    theirs.add_special_tokens([t["content"] for t in spec["added_tokens"]])
    return Tokenizer.from_pretrained("smollm2-135m"), theirs


def test_ids_of_the_real_tokenizer(pair):
    ours, theirs = pair
    for text in strings(5000):
        ids = ours.encode(text)
        assert ids == theirs.encode(text).ids, repr(text)
        assert ours.decode(ids) == text


def test_every_token_of_the_vocabulary(pair):
    ours, theirs = pair
    for i in range(theirs.get_vocab_size()):
        text = theirs.decode([i], skip_special_tokens=False)
        assert ours.decode([i]) == text
        assert ours.encode(text) == theirs.encode(text).ids


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.text())
def test_arbitrary_unicode_round_trip(pair, text):
    ours, theirs = pair
    assert ours.encode(text) == theirs.encode(text).ids
    text = letters(text)
    assert ours.decode(ours.encode(text)) == text


def test_bytes_without_a_token_are_dropped_before_the_merges(pair):
    ours, theirs = pair
    for text in ("!\x04!", "a\x06b", "\x13\x14", "\x16 the\x1d", "<|im_start|>!\x04!\x04!<|im_end|>",
                 "\U00050000é \x04"):
        assert ours.encode(text) == theirs.encode(text).ids, repr(text)


def test_special_tokens_as_plain_text(pair):
    ours, _ = pair
    assert ours.encode("<|im_end|>") == [2]
    plain = ours.encode("<|im_end|>", special=False)
    assert len(plain) > 1 and ours.decode(plain) == "<|im_end|>"
    assert ours.encode("<|im_end|>\x04", special=False) == plain


def test_ids_of_the_real_tokenizer_outside_the_bpe(pair):
    ours, _ = pair
    assert (ours.bos_id, ours.eos_id) == (None, 2)
    assert ours.encode("\ud800") == ours.encode("?")  # a lone surrogate has no bytes


@pytest.mark.parametrize("pattern, digits", [(None, False), (None, True), (LLAMA3, False), (QWEN2, False)])
def test_tokenizers_trained_here(pattern, digits, tmp_path):
    theirs = train_tokenizer(pattern, digits)
    (tmp_path / "config.json").write_text('{"bos_token_id": 0, "eos_token_id": [2, 0]}')
    theirs.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    ours = Tokenizer.from_pretrained(tmp_path)
    assert ours.eos_id == 2
    for text in [*CORPUS, *strings(1500, seed=1)]:
        assert ours.encode(text) == theirs.encode(text).ids, repr(text)
        assert ours.decode(ours.encode(text)) == text


def folder_with(tmp_path, spec, tokenizer_config=None):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    if tokenizer_config:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return tmp_path


def test_nfc_normalizer_and_bos_from_the_post_processor(tmp_path):
    theirs = train_tokenizer(QWEN2)
    theirs.normalizer = tokenizers.normalizers.NFC()
    theirs.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    folder = folder_with(tmp_path, json.loads(theirs.to_str()), {"bos_token": "<|endoftext|>"})
    ours = Tokenizer.from_pretrained(folder)
    assert ours.bos_id == 0
    assert [0, *ours.encode("cafe\u0301")] == theirs.encode("cafe\u0301").ids


def test_sentencepiece(tmp_path):
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    theirs.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>"])
    theirs.train_from_iterator(CORPUS, trainer)
    folder_with(tmp_path, json.loads(theirs.to_str()), {"bos_token": "<s>"})
    ours = Tokenizer.from_pretrained(tmp_path)
    assert ours.encode("The quick fox") == theirs.encode("The quick fox").ids and ours.bos_id is None
    assert ours.decode(ours.encode("The quick fox")) == "The quick fox"
    assert ours.encode("<s>") == [1] and ours.encode("<s>", special=False) != [1]


@pytest.mark.parametrize("kind", ["LlamaTokenizerFast", "Qwen2TokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("flag", [False, True, None])
def test_what_a_text_begins_with(flag, begins, kind, tmp_path):
    """As in transformers the post-processor of a tokenizer.json says it, also against add_bos_token."""
    theirs = train_tokenizer()
    if begins:
        theirs.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    config = {"bos_token": "<|im_start|>", "tokenizer_class": kind}
    if flag is not None:
        config["add_bos_token"] = flag
    folder_with(tmp_path, json.loads(theirs.to_str()), config)
    ours, reference = Tokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.bos_ids + ours.encode("The fox") == reference("The fox").input_ids
    assert ours.bos_id == (1 if begins else None)


@pytest.mark.parametrize("special", [True, False])
def test_marks_keep_what_the_file_says_of_them(special, tmp_path):
    """Such as the space that they take: Phi-4's added tokens strip both sides. They are special in any
    case."""
    spec = json.loads(train_tokenizer().to_str())
    for token in spec["added_tokens"]:
        token |= {"lstrip": True, "rstrip": True, "special": special}
    folder_with(tmp_path, spec, {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"})
    ours, reference = Tokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in "the fox <|im_end|>\n<|im_start|> jumps", " <|endoftext|> a":
        assert ours.encode(text) == reference(text, add_special_tokens=False).input_ids
    assert (ours.eos_id, ours.special["<|im_start|>"]) == (2, 1)
    assert not {1, 2} & {*ours.encode("<|im_start|>a<|im_end|>", special=False)}


def test_tokens_that_only_the_config_names(tmp_path):
    """As fine-tunes leave them whose tokenizer.json is still their base's."""
    spec = json.loads(train_tokenizer().to_str())
    n = len(spec["model"]["vocab"])
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    decoder = {n + 1: {"content": "<think>", "special": False} | flags,
               n: {"content": "<|sep|>", "special": True} | flags,
               1: {"content": "<|im_start|>", "special": True} | flags}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": decoder}
    folder_with(tmp_path, spec, config)
    ours, reference = Tokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in "the fox<|sep|> jumps", "<|im_start|>a<think>b</think>":
        assert ours.encode(text) == reference(text, add_special_tokens=False).input_ids
    assert ours.special["<|sep|>"] == n and n not in ours.encode("<|sep|>", special=False)
    decoder[n + 7] = decoder.pop(n + 1)
    folder_with(tmp_path, spec, config)
    with pytest.raises(InputError, match=rf"{tmp_path}: .* '<think>' is token {n + 7}"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("config", [{}, {"eos_token": "<|im_start|>"}, {"added_tokens_decoder": {}}])
@pytest.mark.parametrize("token", [
    "<|im_end|>", {"content": "<|im_end|>", "lstrip": False, "normalized": False, "rstrip": False,
                   "single_word": False}])
def test_the_special_tokens_of_older_folders(token, config, tmp_path):
    """special_tokens_map.json counts where tokenizer_config.json has no added_tokens_decoder."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
    folder_with(tmp_path, json.loads(train_tokenizer().to_str()), config)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": token, "pad_token": None}))
    ours, reference = Tokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.eos_id == reference.eos_token_id
    write_folder(tmp_path / "again", open_checkpoint(tmp_path), {})
    assert AutoTokenizer.from_pretrained(tmp_path / "again").eos_token_id == ours.eos_id


def test_a_folder_that_is_replaced_keeps_no_tokenizer_of_before(tmp_path):
    again, config = tmp_path / "again", {"tokenizer_class": "PreTrainedTokenizerFast"}
    again.mkdir()
    for name in "tokenizer.model", "chat_template.jinja", "special_tokens_map.json":
        (again / name).write_text("of another model")
    folder_with(tmp_path, json.loads(train_tokenizer().to_str()), config)
    write_folder(again, open_checkpoint(tmp_path), {})
    assert sorted(path.name for path in again.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json"]


@pytest.mark.parametrize("value", [3, ["x"], {"content": 1}, {}])
def test_special_tokens_that_are_no_text(value, tmp_path):
    folder_with(tmp_path, json.loads(train_tokenizer().to_str()))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": value}))
    with pytest.raises(InputError, match="special_tokens_map.json"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_token_for_whose_id_the_file_has_another_text(tmp_path):
    """As Yi's: the file counts."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {"added_tokens_decoder": {"5": flags | {"content": "<|other|>"}}}
    ours = Tokenizer.from_pretrained(folder_with(tmp_path, json.loads(train_tokenizer().to_str()), config))
    assert "<|other|>" not in ours.special


def test_a_missing_token_behind_a_normalizer_that_prepends(tmp_path):
    spec = sentencepiece()
    n = len(spec["model"]["vocab"])
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False, "special": True}
    config = {"added_tokens_decoder": {str(n): flags | {"content": "<|sep|>"}}}
    ours = Tokenizer.from_pretrained(folder_with(tmp_path, spec, config))
    assert n in ours.encode("the fox<|sep|>the fox") and n not in ours.encode("a<|sep|>", special=False)


def llama3_folder(tmp_path):
    """(A folder with a tokenizer.model, the same vocabulary in `tokenizers`)."""
    theirs = train_tokenizer(LLAMA3, specials=[])
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    lines = []
    for token, i in theirs.get_vocab().items():
        lines.append(base64.b64encode(bytes(byte_of[c] for c in token)) + b" %d" % i)
    folder_with(tmp_path, {})
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    return tmp_path, theirs


def test_llama3_tokenizer_model(tmp_path):
    folder, theirs = llama3_folder(tmp_path)
    n = theirs.get_vocab_size()
    (folder / "config.json").write_text(json.dumps({"bos_token_id": n, "eos_token_id": n + 1}))
    ours = Tokenizer.from_pretrained(folder)
    for text in strings(500):
        text = text.replace("<|", "<")
        assert ours.encode(text) == theirs.encode(text).ids
    assert ours.encode("<|begin_of_text|>a<|eot_id|>") == [n, *theirs.encode("a").ids, n + 9]
    assert len(LLAMA3_SPECIAL) == 256 and (ours.bos_id, ours.eos_ids) == (n, [n + 1])
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0")
    with pytest.raises(InputError, match="SentencePiece"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_tokenizer_of_a_gguf(pre, tmp_path):
    pattern = {"llama-bpe": LLAMA3, "qwen2": QWEN2}.get(pre)
    theirs = train_tokenizer(pattern, digits=pre == "smollm")
    if pre == "qwen2":
        theirs.normalizer = tokenizers.normalizers.NFC()
    model = json.loads(theirs.to_str())["model"]
    w = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    w.add_tokenizer_model("gpt2"), w.add_tokenizer_pre(pre), w.add_token_list(list(model["vocab"]))
    w.add_token_types([3] * 3 + [1] * (len(model["vocab"]) - 3))
    w.add_token_merges([" ".join(m) for m in model["merges"]])
    w.add_bos_token_id(1), w.add_eos_token_id(2)
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file()
    w.close()
    ours = Tokenizer.from_pretrained(tmp_path / "m.gguf")
    assert (ours.bos_id, ours.eos_id) == (1 if pre == "llama-bpe" else None, 2)
    assert ours.eos_ids == [2, 0]                          # <|endoftext|>, which the metadata do not name
    write_folder(tmp_path / "folder", open_checkpoint(tmp_path / "m.gguf"), {})
    assert Tokenizer.from_pretrained(tmp_path / "folder").bos_id == ours.bos_id
    for text in strings(800, seed=2):
        assert ours.encode(text) == theirs.encode(text).ids, repr(text)


def test_a_vocabulary_without_letters(tmp_path):
    spec = {"model": {"type": "WordLevel", "vocab": {"b": 0}, "unk_token": "<unk>"}, "added_tokens": []}
    with pytest.raises(InputError, match="cannot be read"):
        Tokenizer.from_pretrained(folder_with(tmp_path, json.loads(train_tokenizer().to_str()) | spec))


def test_incomplete_tokenizer_json(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        Tokenizer.from_pretrained(folder_with(tmp_path, {"model": {"type": "BPE"}}))


def added(*tokens):
    """A trained tokenizer with more added tokens."""
    spec = json.loads(train_tokenizer().to_str())
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    n = len(spec["model"]["vocab"])
    spec["added_tokens"] += [plain | {"id": n + i} | token for i, token in enumerate(tokens)]
    return spec


@pytest.mark.parametrize("spec, text", [
    (added({"content": "<tool>"}, {"content": "<tool>_call"}, {"content": "<tool>_ca"}),
     "<tool>_call x<tool>_c"),
    (added(*({"content": " " * k, "special": False} for k in (2, 3, 4))), "a    b   c  d "),
    (added({"content": "<|sep|>", "lstrip": True, "rstrip": True}), "a <|sep|>\n\nb<|sep|>"),
    (added({"content": "fox", "single_word": True}), "foxes fox, fox"),
    (added({"content": "caf\u00e9", "normalized": True}) | {"normalizer": {"type": "NFC"}},
     "a cafe\u0301 caf\u00e9"),
    (added({"content": "<think>", "special": False}), "<think>\nso</think>"),
    (added() | {"normalizer": {"type": "Lowercase"}}, "The QUICK Fox"),
    (added() | {"truncation": dict(max_length=3, strategy="LongestFirst", stride=0, direction="Right")},
     "The quick brown fox jumps"),
])
def test_added_tokens_normalizers_and_truncation(spec, text, tmp_path):
    """As `tokenizers` reads the file; a text is never cut."""
    ours = Tokenizer.from_pretrained(folder_with(tmp_path, spec))
    theirs = tokenizers.Tokenizer.from_str(json.dumps(spec))
    theirs.no_truncation()
    for special in True, False:
        theirs.encode_special_tokens = not special
        assert ours.encode(text, special) == theirs.encode(text, add_special_tokens=False).ids


def test_a_pattern_with_gaps_loses_nothing(tmp_path):
    spec = json.loads(train_tokenizer(r" ?[^(\s|[.,!?])]+").to_str())
    ours = Tokenizer.from_pretrained(folder_with(tmp_path, spec))
    for text in "one, two.\n", " (three) | four!?", "\n\n":
        assert ours.decode(ours.encode(text)) == text
        assert ours.encode(text) == tokenizers.Tokenizer.from_str(json.dumps(spec)).encode(text).ids


def test_half_an_emoji_and_runs_of_anything(tiny, tmp_path):
    folder, _ = llama3_folder(tmp_path)
    for tok in Tokenizer.from_pretrained(tiny), Tokenizer.from_pretrained(folder):
        assert tok.encode("hi \ud83d") == tok.encode("hi ?")
        assert tok.encode("\udc80", special=False) == tok.encode("?")
        for run in " ", "a", "\n", "é", "x ":
            assert tok.decode(tok.encode(run * 50_000 + "x")) == run * 50_000 + "x"


def test_special_tokens_that_are_normalized(tmp_path):
    """As in early files of Llama 1 and 2: found wherever they stand, as transformers finds them, though the
    normalizer puts a space before a text, and taken for text where they are text."""
    theirs = sentencepiece()
    theirs["normalizer"] = {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]}
    theirs["pre_tokenizer"] = None
    ids = []
    for normalized in False, True:
        for token in theirs["added_tokens"]:
            token["normalized"] = normalized
        tok = Tokenizer.from_pretrained(folder_with(tmp_path, theirs))
        chat = [{"role": "user", "content": "say </s> x"}, {"role": "assistant", "content": "so</s>"}]
        texts = "a</s>", "<s>The quick</s><s> fox", "x </s>"
        ids.append([*map(tok.encode, texts), tok.encode("a</s>", special=False), tok.encode_chat(chat)])
    assert ids[0] == ids[1] and ids[1][0][-1] == tok.special["</s>"]


@pytest.mark.parametrize("files, ids", [
    ({"config.json": {"eos_token_id": [0, 2]}}, [0, 2]),
    ({"config.json": {"eos_token_id": 2}, "tokenizer_config.json": {"eos_token": "<|im_start|>"}}, [1, 2]),
    ({"config.json": {}, "tokenizer_config.json": {"eos_token": {"content": "<|im_end|>"}}}, [2]),
    ({"config.json": {}, "tokenizer_config.json": {"eos_token": None}}, []),
])
def test_all_that_may_end_a_text(files, ids, tmp_path):
    folder_with(tmp_path, json.loads(train_tokenizer().to_str()))
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps(value))
    tok = Tokenizer.from_pretrained(tmp_path)
    assert tok.eos_ids == ids and tok.eos_id == (ids[0] if ids else None)


@pytest.mark.parametrize("change, named", [
    ({"model": {"type": "BPE"}}, "tokenizer"), ({"added_tokens": "x"}, "cannot be read"),
    ({"added_tokens": [{"id": 10**20, "content": "x"}]}, "cannot be read"),
    ({"model": []}, "cannot be read"),
    ({"pre_tokenizer": dict(type="Split", pattern={"Regex": "(["}, behavior="Isolated", invert=False)},
     "cannot be read"),
    ({"pre_tokenizer": {"type": "Nothing"}}, "cannot be read"), ({"decoder": 3}, "cannot be read"),
])
def test_tokenizer_files_that_are_refused(change, named, tmp_path):
    spec = json.loads(train_tokenizer().to_str()) | change
    with pytest.raises(InputError, match=named):
        Tokenizer.from_pretrained(folder_with(tmp_path, spec))


@pytest.mark.parametrize("config, named", [
    ({"eos_token": ["x"]}, "eos_token"), ({"bos_token": 3}, "bos_token"),
    ({"chat_template": 3}, "chat_template"),
    ({"pad_token": {"content": 1}}, "content should be text"),
    ({"chat_template": [{"name": 1}, 2]}, "chat_template"),
])
def test_tokenizer_configs_that_are_refused(config, named, tmp_path):
    with pytest.raises(InputError, match=named):
        Tokenizer.from_pretrained(folder_with(tmp_path, json.loads(train_tokenizer().to_str()), config))


def test_null_is_absent(tmp_path):
    nothing = dict.fromkeys(("bos_token", "eos_token", "chat_template", "pad_token"))
    tok = Tokenizer.from_pretrained(folder_with(tmp_path, json.loads(train_tokenizer().to_str()), nothing))
    assert tok.bos_id is None and tok.encode_chat([{"role": "user", "content": "a"}])[0][0] == 1


CHAT = [{"role": "user", "content": "Hi <|im_end|>"}, {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"}]


def test_chatml(pair):
    ours, _ = pair
    ids, answer = ours.encode_chat(CHAT)
    assert ours.decode(ids) == (
        "<|im_start|>user\nHi <|im_end|><|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ours.decode([i for i, a in zip(ids, answer) if a]) == "Hello.<|im_end|>"
    assert ids.count(2) == 3  # the one in the text is text


def test_llama3_and_plain_chat(tmp_path):
    ours = Tokenizer.from_pretrained(llama3_folder(tmp_path)[0])
    ids, answer = ours.encode_chat(CHAT[:2])
    assert ours.decode(ids) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi <|im_end|><|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>")
    assert ours.decode([i for i, a in zip(ids, answer) if a]) == "Hello.<|eot_id|>"
    folder = folder_with(tmp_path, json.loads(train_tokenizer(specials=["<s>", "</s>"]).to_str()),
                         {"bos_token": "<s>", "eos_token": "</s>"})
    base = Tokenizer.from_pretrained(folder)
    assert base.decode(base.encode_chat(CHAT[:2])[0]) == \
        "<s><|user|>\nHi <|im_end|></s>\n<|assistant|>\nHello.</s>\n"


SYSTEM_TEMPLATE = """{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system
You are kind.<|im_end|>
{% endif %}{% if m.role == 'nobody' %}{{ raise_exception('nobody may speak') }}{% endif %}
{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>' + '\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.jinja"])
def test_the_models_own_template(file, tiny, tmp_path):
    """Ids are transformers' apply_chat_template; the answers are the assistant's."""
    shutil.copytree(tiny, tmp_path / "m")
    if file == "chat_template.jinja":
        (tmp_path / "m" / file).write_text(SYSTEM_TEMPLATE)
    else:
        (tmp_path / "m" / file).write_text(json.dumps({"chat_template": SYSTEM_TEMPLATE}))
    ours = Tokenizer.from_pretrained(tmp_path / "m")
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "m" / "tokenizer.json"))
    chat = [{"role": "user", "content": "Hi"}, *CHAT[1:]]
    for messages in chat, chat[:2], chat[:1]:
        opened = messages[-1]["role"] != "assistant"
        ids, answer = ours.encode_chat(messages)
        assert ids == theirs.apply_chat_template(messages, chat_template=SYSTEM_TEMPLATE,
                                                 add_generation_prompt=opened, return_dict=False)
        spoken = ours.decode([i for i, a in zip(ids, answer) if a])
        assert spoken == ("Hello.<|im_end|>\n" if len(messages) > 1 else "")
    with pytest.raises(InputError, match="nobody may speak"):
        ours.encode_chat([{"role": "nobody", "content": "x"}])
