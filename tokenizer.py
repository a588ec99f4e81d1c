"""Text to token ids and back, on tiktoken, from the tokenizer files that public models ship.

Notable: byte-level BPE is the same algorithm everywhere, so a tokenizer.json (Hugging Face), Llama 3's
tokenizer.model and a GGUF's metadata all become one tiktoken Encoding: a table bytes -> merge rank, and a
pattern that cuts text into pieces. What tiktoken cannot express (SentencePiece) is handed to `tokenizers`, if
that is installed.
"""
import base64
import json
import unicodedata
from datetime import datetime

import numpy as np
import regex
import tiktoken

from weights import LLAMA3_SPLIT, InputError, open_checkpoint

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2 cuts out single digits, then applies GPT-2's pattern to what lies between; a digit ends a text
DIGITS_GPT2 = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3_SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", *(f"<|reserved_special_token_{i}|>" for i in range(3, 248))]

# how a chat is written: what opens it, what opens a message, what ends its content, and what stands between
CHATML = "", "<|im_start|>{role}\n", "<|im_end|>", "\n"
LLAMA3_CHAT = "<|begin_of_text|>", "<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", ""
PLAIN_CHAT = "{bos}", "<|{role}|>\n", "{eos}", "\n"     # for base models, as in the authors' code


def byte_alphabet():
    """GPT-2's printable stand-in for each byte: {character: byte}."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class Tokenizer:
    """encode(text) -> ids, decode(ids) -> text; `eos_id`, `bos_id` (None: it puts none before a text)."""
    template = None

    @classmethod
    def from_pretrained(cls, name_or_path):
        """The tokenizer of `smollm2-135m`, a Hugging Face folder or a .gguf file. InputError if none."""
        checkpoint = open_checkpoint(name_or_path)
        found = checkpoint.tokenizer()
        try:
            tok = cls(*(from_tiktoken_file(found["ranks"]) if "ranks" in found else from_json(found["json"])))
        except (KeyError, TypeError, AttributeError, IndexError) as e:
            raise InputError(f"{checkpoint.path}: its tokenizer is incomplete ({e!r})") from None
        except Inexpressible as e:
            tok = Foreign(found["json"], f"{checkpoint.path}: tiktoken cannot express its tokenizer ({e})")
        config = found["config"]
        tok.template = config.get("chat_template")
        if isinstance(tok.template, list):          # several, by name
            tok.template = {one["name"]: one["template"] for one in tok.template}.get("default")
        bos, eos = (token["content"] if isinstance(token, dict) else token
                    for token in (config.get("bos_token"), config.get("eos_token")))
        tok.marks = {"bos_token": bos or "", "eos_token": eos or ""}
        tok.eos_id = tok.special.get(eos, config.get("eos_token_id"))
        if isinstance(tok.eos_id, list):   # Llama 3.1 lists all that may end a text
            tok.eos_id = tok.eos_id[0]
        adds_bos = config.get("add_bos_token", "ranks" in found)
        tok.bos_id = tok.special.get(bos, config.get("bos_token_id")) if adds_bos else None
        if "add_bos_token" not in config and "json" in found:
            tok.bos_id = tok.special.get(opening_token(found["json"].get("post_processor")))
        return tok

    def __init__(self, pattern, pieces, ids, special, normalize=None):
        """pattern cuts text; pieces: bytes, by merge rank; ids: their token ids; special: {text: id}."""
        self.special, self.pattern, self.normalize = special, pattern, normalize
        ranks = {piece: rank for rank, piece in enumerate(pieces)}
        # tiktoken wants every byte in its table; those without a token come last, and are dropped on the way
        self.tokenless = bytes(b for b in range(256) if bytes([b]) not in ranks)
        for b in self.tokenless:
            ranks[bytes([b])] = len(ranks)
        n = len(ranks)
        self.encoding = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens={text: n + i for i, text in enumerate(special)})
        self.id_of_rank = np.array([*ids, *[-1] * len(self.tokenless), *special.values()], dtype=np.int64)
        self.bytes_of_id = dict(zip(ids, pieces)) | {i: text.encode() for text, i in special.items()}

    def encode(self, text, special=True):
        """Token ids of a string, nothing added. special=False reads special tokens as plain text."""
        if self.normalize:
            text = unicodedata.normalize(self.normalize, text)
        text = text.encode("utf-8", "replace").decode()   # a lone surrogate has no bytes: it becomes "?"
        if self.tokenless and any(b in self.tokenless for b in text.encode()):
            ranks = self.encode_dropping(text, special)
        else:
            known = "all" if special else set()
            ranks = self.encoding.encode(text, allowed_special=known, disallowed_special=())
        return self.id_of_rank[ranks].tolist() if ranks else []

    def encode_dropping(self, text, special):
        """Bytes without a token vanish from their piece before its merges, as in `tokenizers`."""
        cut = "(" + "|".join(map(regex.escape, sorted(self.special, key=len, reverse=True))) + ")"
        ranks = []
        for i, part in enumerate(regex.split(cut, text) if special and self.special else [text]):
            if i % 2:
                ranks.append(self.encoding.encode_single_token(part))
                continue
            for piece in regex.findall(self.pattern, part):
                piece = piece.encode().translate(None, self.tokenless)
                ranks += self.encoding._core_bpe.encode_single_piece(piece) if piece else []
        return ranks

    def decode(self, ids):
        """The text of token ids (special tokens included); bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.bytes_of_id.get(int(i), b"") for i in ids).decode("utf-8", "replace")

    def encode_chat(self, messages):
        """Token ids of a chat, and for each whether it belongs to an assistant's answer (its end mark
        included).

        messages: [{"role", "content"}, ...]. If the last is not the assistant's, the answer is opened, to be
        generated. The model's own Jinja template is used if it has one and jinja2 is installed, else ChatML,
        Llama 3's format or a plain one, whichever its special tokens are made for.
        """
        parts = self.template and render(self.template, messages, **self.marks)
        if parts:
            ids = [self.encode(text) for text, _ in parts]
            answer = [by_assistant for (_, by_assistant), part in zip(parts, ids) for _ in part]
            return sum(ids, []), answer
        template = PLAIN_CHAT
        if "<|im_start|>" in self.special:
            template = CHATML
        elif "<|start_header_id|>" in self.special:
            template = LLAMA3_CHAT
        text_of = {i: text for text, i in self.special.items()}
        bos, eos = text_of.get(self.bos_id, ""), text_of.get(self.eos_id, "")
        start, opening, ending, between = (s.replace("{bos}", bos).replace("{eos}", eos) for s in template)
        ids = self.encode(start)
        answer = [False] * len(ids)
        for message in messages:
            header = self.encode(opening.format(role=message["role"]))
            body = self.encode(message["content"], special=False) + self.encode(ending)
            tail = self.encode(between)
            ids += header + body + tail
            by_assistant = message["role"] == "assistant"
            answer += [False] * len(header) + [by_assistant] * len(body) + [False] * len(tail)
        if messages[-1]["role"] != "assistant":
            header = self.encode(opening.format(role="assistant"))
            ids, answer = ids + header, answer + [False] * len(header)
        return ids, answer


def render(template, messages, **marks):
    """[(text, whether it is the assistant's)] of a chat by a Jinja template; None without jinja2, or where a
    message is written otherwise once another follows. InputError where the template refuses the chat."""
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        return None

    def refuse(why):
        raise TemplateError(why)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {"raise_exception": refuse, "strftime_now": datetime.now().strftime}
    try:
        compiled, done, parts = environment.from_string(template), "", []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before = compiled.render(messages=messages[:i], add_generation_prompt=True, **marks)
                after = compiled.render(messages=messages[:i + 1], add_generation_prompt=False, **marks)
                if not before.startswith(done) or not after.startswith(before):
                    return None
                parts += [(before[len(done):], False), (after[len(before):], True)]
                done = after
        if messages[-1]["role"] != "assistant":
            whole = compiled.render(messages=messages, add_generation_prompt=True, **marks)
            if not whole.startswith(done):
                return None
            parts.append((whole[len(done):], False))
        return parts
    except TemplateError as e:
        raise InputError(f"the model's chat template refuses this chat ({e})") from None


class Inexpressible(Exception):
    """tiktoken has no way to say this tokenizer."""


def from_tiktoken_file(path):
    """Llama 3's tokenizer.model: a line a token, its bytes in base64 and its rank."""
    try:
        table = {base64.b64decode(token, validate=True): int(rank)
                 for token, rank in (line.split() for line in path.read_bytes().splitlines() if line)}
    except (OSError, ValueError):
        raise InputError(f"{path}: not a tiktoken file (SentencePiece?); put the model's tokenizer.json"
                         " beside it") from None
    pieces = sorted(table, key=table.get)
    special = {text: len(pieces) + i for i, text in enumerate(LLAMA3_SPECIAL)}
    return LLAMA3_SPLIT, pieces, [table[piece] for piece in pieces], special


def from_json(spec):
    """Tokenizer's arguments from a tokenizer.json. Inexpressible if it is not byte-level BPE."""
    model, normalizer = spec["model"], spec.get("normalizer")
    kind = model.get("type", "BPE")
    if kind != "BPE" or model.get("byte_fallback"):
        raise Inexpressible(f"{kind} of characters, not of bytes" if kind == "BPE" else kind)
    if normalizer and normalizer["type"] not in ("NFC", "NFKC", "NFD", "NFKD"):
        raise Inexpressible(f"normalizer {normalizer['type']}")
    alphabet, vocab, merges = byte_alphabet(), model["vocab"], model["merges"]
    pattern = pattern_of(spec.get("pre_tokenizer"))
    special = {token["content"]: token["id"] for token in spec.get("added_tokens", [])}
    # bytes first, then what the merges make, in their order
    names = [c for c in alphabet if c in vocab]
    names += ["".join(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    if model.get("ignore_merges"):   # a piece in the vocabulary stands, whether or not merges lead there
        names += sorted(vocab.keys() - set(names) - special.keys(), key=vocab.get)
    names = list(dict.fromkeys(names))
    pieces = [bytes(alphabet[c] for c in name) for name in names]
    return pattern, pieces, [vocab[name] for name in names], special, normalizer and normalizer["type"]


def opening_token(post):
    """The special token that a tokenizer.json's post-processor puts before a text, or None."""
    for step in (post or {}).get("processors", [post or {}]):
        for piece in step.get("single", [])[:1] if step.get("type") == "TemplateProcessing" else []:
            return piece.get("SpecialToken", {}).get("id")
    return None


def pattern_of(pre):
    """The one regular expression that cuts text as a tokenizer.json's pre-tokenizer does."""
    steps = pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre] if pre else []
    kinds, first, last = [step["type"] for step in steps], *(steps[:1] or [{}]), *(steps[-1:] or [{}])
    if not last.get("add_prefix_space"):
        gpt2 = last.get("use_regex", True)
        if kinds == ["ByteLevel"] and gpt2:
            return GPT2
        if kinds == ["Digits", "ByteLevel"] and gpt2 and first.get("individual_digits"):
            return DIGITS_GPT2
        if kinds == ["Split", "ByteLevel"] and not gpt2 and "Regex" in first["pattern"] \
                and first["behavior"] == "Isolated" and not first.get("invert"):
            return first["pattern"]["Regex"]
    raise Inexpressible(f"pre-tokenizer {' + '.join(kinds) or 'none'}")


class Foreign(Tokenizer):
    """A tokenizer that the `tokenizers` package runs, behind the same three calls."""

    def __init__(self, spec, why):
        try:
            import tokenizers
        except ImportError:
            raise InputError(f"{why}; `pip install tokenizers` to use it") from None
        try:
            self.inner = tokenizers.Tokenizer.from_str(json.dumps(spec))
        except Exception as e:   # the package raises no narrower kind
            raise InputError(f"{why}, and `tokenizers` cannot read it either ({e})") from None
        self.special = {token["content"]: token["id"] for token in spec.get("added_tokens", [])}

    def encode(self, text, special=True):
        self.inner.encode_special_tokens = not special
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=False)
