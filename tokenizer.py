"""Text to token ids and back, and chats to text, from the files that public models ship.

Notable:
- a tokenizer.json, or what a GGUF file says of its tokenizer, is run by `tokenizers`; Llama 3's
  tokenizer.model, a tiktoken file, by tiktoken
- a chat is rendered by the model's own template, then encoded in one call; where its answers lie in the text
  tells which tokens are learned from
- a special token that somebody wrote into a message is text, and is encoded as text: see `swapped`
"""
import base64
import json
import re
from contextlib import contextmanager
from functools import cached_property

import tiktoken
import tokenizers

from support.files import InputError, reason
from support.gguf import LLAMA3_SPLIT
from support.template import ChatTemplate
from weights import SPECIAL_TOKENS, open_checkpoint, special_tokens

LLAMA3_SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", *(f"<|reserved_special_token_{i}|>" for i in range(3, 248))]


@contextmanager
def as_input_error(sentence):
    """Context manager: errors of the packages' Rust code, panics included, become InputErrors."""
    try:
        yield
    except BaseException as e:
        if isinstance(e, InputError) or not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise InputError(f"{sentence} ({reason(e)})") from None


class TokenizersFile:
    """A tokenizer.json, run by `tokenizers`. marks: texts in its vocabulary that are special tokens too;
    decoder: the added_tokens_decoder of a tokenizer_config.json, which may name more, as those of fine-tunes
    do."""

    def __init__(self, spec, marks=(), decoder=None):
        self.prepends = "Prepend" in json.dumps(spec.get("normalizer"))
        if self.prepends:
            spec = spec | {"added_tokens": [self.findable(token) for token in spec["added_tokens"]]}
        self.inner = tokenizers.Tokenizer.from_str(json.dumps(spec))
        self.inner.no_truncation()
        self.inner.no_padding()
        there = {token.content for token in self.inner.get_added_tokens_decoder().values()}
        for i in sorted(decoder or {}, key=int):
            self.add_missing(int(i), decoder[i], there)
        known = [text for text in marks if text and self.inner.token_to_id(text) is not None]
        self.inner.add_special_tokens([text for text in known if text not in there])
        added = self.inner.get_added_tokens_decoder()                                # {id: AddedToken}
        self.special = {token.content: i for i, token in added.items()
                        if token.special or token.content in known}
        self.spec = spec
        self.id_of = {}                          # {id in self.inner: the model's id}, see `renamed`

    def findable(self, token):
        """A special token's entry, unnormalized: else the space that the normalizer prepends hides it."""
        return token | {"normalized": False} if self.prepends and token.get("special") else token

    def add_missing(self, i, entry, there):
        """Add the token i of a decoder, unless its text is among those that are `there`, or tokenizer.json
        has another text for i."""
        text = entry["content"]
        if text in there or self.inner.id_to_token(i) not in (None, text):
            return
        there.add(text)
        self.inner.add_tokens([tokenizers.AddedToken(**self.findable(entry))])
        if self.inner.token_to_id(text) != i:
            raise ValueError(f"tokenizer_config.json says that {text!r} is token {i}, but tokenizer.json ends"
                             f" before {i - 1}")

    def renamed(self, names):
        """The same tokenizer with other texts for its special tokens: names, {text: other text}."""
        copy = TokenizersFile(self.spec | {"added_tokens": []})
        for i, token in sorted(self.inner.get_added_tokens_decoder().items()):
            token.content = names.get(token.content, token.content)
            copy.inner.add_tokens([token])
            copy.id_of[copy.inner.token_to_id(token.content)] = i
        return copy

    def encode(self, text):
        """(ids, [(first, last + 1) character of each])."""
        encoding = self.inner.encode(text, add_special_tokens=False)
        return [self.id_of.get(i, i) for i in encoding.ids], encoding.offsets

    def decode(self, ids):
        return self.inner.decode(ids, skip_special_tokens=False)

    def opening_id(self):
        """The token that its post-processor puts before a text, or None. As in transformers 5, add_bos_token
        of tokenizer_config.json says nothing."""
        ids, plain = self.inner.encode("a").ids, self.inner.encode("a", add_special_tokens=False).ids
        return ids[0] if ids[:1] != plain[:1] else None


class TiktokenFile:
    """Llama 3's tokenizer.model, run by tiktoken: a line for each token, its bytes in base64 and its rank."""

    def __init__(self, path, names=None):
        self.path = path
        try:
            lines = [line.split() for line in path.read_bytes().splitlines() if line]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        except (OSError, ValueError):
            raise InputError(f"{path}: not a tiktoken file (SentencePiece?); put the model's tokenizer.json"
                             " beside it") from None
        if {*ranks.values()} != {*range(len(ranks))} or not {bytes([b]) for b in range(256)} <= ranks.keys():
            raise InputError(f"{path}: its ranks have gaps, or a byte has none; get it again")
        self.special = {text: len(ranks) + i for i, text in enumerate(LLAMA3_SPECIAL)}
        named = {(names or {}).get(text, text): i for text, i in self.special.items()}
        self.encoding = tiktoken.Encoding("", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks,
                                          special_tokens=named)

    def renamed(self, names):
        return TiktokenFile(self.path, names)

    def encode(self, text):
        ids = self.encoding.encode(text, allowed_special="all")
        starts = self.encoding.decode_with_offsets(ids)[1]
        return ids, list(zip(starts, [*starts[1:], len(text)]))

    def decode(self, ids):
        known = [i for i in ids if i < self.encoding.n_vocab]
        return self.encoding.decode(known)

    def opening_id(self):
        return self.special["<|begin_of_text|>"]


class Tokenizer:
    """encode(text) -> ids, decode(ids) -> text.

    special: {text: id} of the special tokens; bos_id: what a text begins with, or None, and the same as a
    list, bos_ids; eos_id, eos_ids: the token that ends a text, or None, and all that may.
    """

    def __init__(self, file, config):
        """file: a TokenizersFile or a TiktokenFile; config: dict, the keys of a tokenizer_config.json."""
        self.file, self.special = file, file.special
        marks = dict.fromkeys(SPECIAL_TOKENS, "") | special_tokens(config, "tokenizer_config.json")
        ends = [self.special.get(marks["eos_token"]), *config["eos_token_ids"]]
        self.eos_ids = list(dict.fromkeys(i for i in ends if i is not None))
        self.eos_id = self.eos_ids[0] if self.eos_ids else None
        self.bos_id = file.opening_id()
        self.bos_ids = [] if self.bos_id is None else [self.bos_id]
        self.template = ChatTemplate.of(config.get("chat_template"), self.special, marks)

    @classmethod
    def from_pretrained(cls, name_or_path):
        """The tokenizer of `smollm2-135m`, a Hugging Face folder, a .gguf file or a hub id. InputError if
        there is none."""
        checkpoint = open_checkpoint(name_or_path)
        contents = checkpoint.tokenizer()
        config = contents["config"]
        if "ranks" in contents:
            return cls(TiktokenFile(contents["ranks"]), config)
        with as_input_error(f"{checkpoint.path}: its tokenizer cannot be read by `tokenizers`; get it again"):
            marks = special_tokens(config, checkpoint.path).values()
            file = TokenizersFile(contents["json"], marks, config.get("added_tokens_decoder"))
            return cls(file, config)

    def encode(self, text, special=True):
        """Token ids of a string, nothing added. special=False reads special tokens as plain text."""
        hidden = not special and self.special_in(text)
        return self.encode_spans(no_guards(text) if hidden else text, hidden)[0]

    def encode_spans(self, text, guarded=False):
        """As TokenizersFile.encode. guarded: special tokens are recognized by their guards alone."""
        text = text.encode("utf-8", "replace").decode()       # a lone surrogate has no bytes: it becomes "?"
        with as_input_error("the model's tokenizer cannot encode this text"):
            return (self.guarded if guarded else self.file).encode(text)

    def decode(self, ids):
        """The text of token ids (special tokens included); bytes that are not UTF-8 become U+FFFD."""
        with as_input_error("the model's tokenizer cannot decode these token ids"):
            return self.file.decode([int(i) for i in ids])

    def encode_chat(self, messages):
        """Token ids of a chat, and for each whether it belongs to an assistant's answer, with what the
        template writes at its end.

        messages: [{"role", "content"}, ...]. If the last is not the assistant's, the answer is opened, to be
        generated. A special token in a message is text. InputError where the template refuses the chat.
        """
        hidden = any(self.special_in(message["content"]) for message in messages)
        if hidden:
            messages = [m | {"content": self.swapped(no_guards(m["content"]))} for m in messages]
        text, answers = self.template.render(messages)
        ids, spans = self.encode_spans(self.swapped(text) if hidden else text, hidden)
        in_answer = bytearray(len(text) + 1)                                    # of each character
        for first, end in answers:
            in_answer[first:end] = b"\1" * (end - first)
        return ids, [any(in_answer[first:max(end, first + 1)]) for first, end in spans]

    # A special token written in a message must stay text. So each has a guard, an unused text of the same
    # length, which replaces it in messages. The template then adds real ones, and the two are swapped: guards
    # now stand for the template's tokens alone, and `guarded` recognizes only guards.
    @cached_property
    def guards(self):
        """{special token: its guard}."""
        return {text: chr(GUARD + n).ljust(len(text), FILLER) for n, text in enumerate(self.special)}

    @cached_property
    def guarded(self):
        """The tokenizer that knows special tokens by their guards."""
        return self.file.renamed(self.guards)

    @cached_property
    def special_or_guard(self):
        longest_first = sorted(self.special, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, [*longest_first, *self.guards.values()])) or "(?!)")

    def special_in(self, text):
        return any(mark in text for mark in self.special)

    def swapped(self, text):
        """The text with each special token in its guard's place, and the other way round."""
        other = self.guards | {guard: mark for mark, guard in self.guards.items()}
        return self.special_or_guard.sub(lambda match: other[match[0]], text)


GUARD, FILLER = 0x100000, "\U0010fffd"       # characters for private use


def no_guards(text):
    """The text without the characters of guards."""
    return re.sub("[\U00100000-\U0010ffff]", "\ufffd", text)
