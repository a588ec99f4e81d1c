"""Text to token ids and back, on tiktoken, from the tokenizer files that public models ship.

Notable: byte-level BPE is the same algorithm everywhere, so a tokenizer.json (Hugging Face), Llama 3's tokenizer.model
and a GGUF's metadata all become one tiktoken Encoding: a table bytes -> merge rank, and a pattern that cuts text into
pieces. What tiktoken cannot express (SentencePiece) is handed to `tokenizers`, if that is installed.
"""
import base64
import unicodedata

import numpy as np
import regex
import tiktoken

from weights import InputError, open_checkpoint

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2 cuts out single digits first, then applies GPT-2's pattern to what lies between: a digit ends the text there
DIGITS_GPT2 = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
                  "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
                  "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
LLAMA3_SPECIAL += [f"<|reserved_special_token_{i}|>" for i in range(3, 248)]   # 256 in all

# A chat is a list of {"role", "content"}. For each family: what opens a message, what ends it, what opens the chat.
CHAT = {
    "<|im_start|>": ("<|im_start|>{role}\n", "<|im_end|>", "\n", ""),                                      # ChatML
    "<|start_header_id|>": ("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", "", "<|begin_of_text|>"),
    None: ("<|{role}|>\n", "{eos}", "\n", "{bos}"),                                                        # base models
}


def byte_alphabet():
    """GPT-2's printable stand-in for each byte: {character: byte}."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class Tokenizer:
    """encode(text) -> ids, decode(ids) -> text; `bos_id` (None if this tokenizer puts none before a text), `eos_id`."""

    @classmethod
    def from_pretrained(cls, name_or_path):
        """The tokenizer of `smollm2-135m`, of a Hugging Face folder or of a .gguf file. InputError if there is none."""
        checkpoint = open_checkpoint(name_or_path)
        found = checkpoint.tokenizer()
        try:
            tok = cls(*(from_tiktoken_file(found["ranks"]) if "ranks" in found else from_json(found["json"])))
        except (KeyError, TypeError, AttributeError, IndexError) as e:
            raise InputError(f"{checkpoint.path}: its tokenizer is incomplete ({type(e).__name__}: {e})") from None
        except Inexpressible as e:
            tok = Foreign(found["json"], f"{checkpoint.path}: its tokenizer ({e}) is not byte-level BPE as tiktoken has it")
        config, template = found["config"], found.get("json", {}).get("post_processor")
        name = {key: t["content"] if isinstance(t := config.get(f"{key}_token"), dict) else t for key in ("bos", "eos")}
        ids = {key: tok.special.get(name[key], config.get(f"{key}_token_id")) for key in name}
        tok.eos_id = ids["eos"][0] if isinstance(ids["eos"], list) else ids["eos"]
        adds_bos = config.get("add_bos_token", "ranks" in found or (name["bos"] or "\0") in str(template))
        tok.bos_id = ids["bos"] if adds_bos else None
        return tok

    def __init__(self, pattern, pieces, ids, special, normalize=None):
        """pieces: byte strings by merge rank; ids: their token ids; special: {text: id}; pattern cuts text into pieces."""
        self.special, self.pattern, self.normalize = special, pattern, normalize
        ranks = {piece: rank for rank, piece in enumerate(pieces)}
        # tiktoken wants every byte in its table: bytes without a token come last, and are dropped from the text instead
        self.tokenless = bytes(b for b in range(256) if bytes([b]) not in ranks)
        for b in self.tokenless:
            ranks[bytes([b])] = len(ranks)
        n = len(ranks)
        self.encoding = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens={text: n + i for i, text in enumerate(special)})
        self.id_of_rank = np.array([*ids, *[-1] * len(self.tokenless), *special.values()], dtype=np.int64)
        self.bytes_of_id = dict(zip(ids, pieces)) | {i: text.encode() for text, i in special.items()}

    def encode(self, text, special=True):
        """Token ids of a string, no beginning-of-text token added. special=False reads special tokens as plain text."""
        if self.normalize:
            text = unicodedata.normalize(self.normalize, text)
        text = text.encode("utf-8", "replace").decode()   # a lone surrogate has no bytes: it becomes "?"
        if self.tokenless and any(b in self.tokenless for b in text.encode()):
            ranks = self.encode_dropping(text, special)
        else:
            ranks = self.encoding.encode(text, allowed_special="all" if special else set(), disallowed_special=())
        return self.id_of_rank[ranks].tolist() if ranks else []

    def encode_dropping(self, text, special):
        """Bytes without a token vanish from their piece before its merges, as in `tokenizers`; so cut by hand."""
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
        """Token ids of a chat, and for each whether it belongs to an assistant's answer (its end mark included).

        messages: [{"role", "content"}, ...]. If the last is not the assistant's, the answer is opened, to be generated.
        """
        family = next((mark for mark in CHAT if mark in self.special), None)
        end_text = {i: text for text, i in self.special.items()}
        marks = {"bos": end_text.get(self.bos_id, ""), "eos": end_text.get(self.eos_id, "")}
        opening, ending, between, start = (part.replace("{bos}", marks["bos"]).replace("{eos}", marks["eos"])
                                           for part in CHAT[family])
        ids = self.encode(start)
        answer = [False] * len(ids)
        for message in messages:
            header = self.encode(opening.format(role=message["role"]))
            body = self.encode(message["content"], special=False) + self.encode(ending)
            tail = self.encode(between)
            ids += header + body + tail
            answer += [False] * len(header) + [message["role"] == "assistant"] * len(body) + [False] * len(tail)
        if messages[-1]["role"] != "assistant":
            header = self.encode(opening.format(role="assistant"))
            ids, answer = ids + header, answer + [False] * len(header)
        return ids, answer


class Inexpressible(Exception):
    """tiktoken has no way to say this tokenizer."""


def from_tiktoken_file(path):
    """Llama 3's tokenizer.model: a line a token, its bytes in base64 and its rank."""
    try:
        table = {base64.b64decode(token, validate=True): int(rank)
                 for token, rank in (line.split() for line in path.read_bytes().splitlines() if line)}
    except (OSError, ValueError):
        raise InputError(f"{path}: not a tiktoken file (SentencePiece?); put the model's tokenizer.json beside it") from None
    pieces = sorted(table, key=table.get)
    special = {text: len(pieces) + i for i, text in enumerate(LLAMA3_SPECIAL)}
    return LLAMA3, pieces, [table[piece] for piece in pieces], special


def from_json(spec):
    """Hugging Face's tokenizer.json, if it is byte-level BPE: pattern, pieces in merge order, ids, special tokens."""
    model, normalizer = spec["model"], spec.get("normalizer")
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        raise Inexpressible(f"{model.get('type', 'BPE')} with byte fallback" if model.get("byte_fallback") else model["type"])
    if normalizer and normalizer["type"] not in ("NFC", "NFKC", "NFD", "NFKD"):
        raise Inexpressible(f"normalizer {normalizer['type']}")
    pattern = pattern_of(spec.get("pre_tokenizer"))
    alphabet, vocab = byte_alphabet(), model["vocab"]
    special = {token["content"]: token["id"] for token in spec.get("added_tokens", [])}
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    # bytes first, then what the merges make, in their order; with ignore_merges a whole piece in the vocabulary stands
    names = [c for c in alphabet if c in vocab] + [a + b for a, b in merges]
    if model.get("ignore_merges"):
        names += sorted(vocab.keys() - set(names) - special.keys(), key=vocab.get)
    names = list(dict.fromkeys(names))
    return (pattern, [bytes(alphabet[c] for c in name) for name in names], [vocab[name] for name in names], special,
            normalizer and normalizer["type"])


def pattern_of(pre):
    """The one regular expression that cuts text as a tokenizer.json's pre-tokenizer does."""
    steps = pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre] if pre else []
    kinds = [step["type"] for step in steps]
    if steps and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space"):
        if kinds == ["ByteLevel"] and steps[-1].get("use_regex", True):
            return GPT2
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[-1].get("use_regex", True):
            return DIGITS_GPT2
        if kinds == ["Split", "ByteLevel"] and not steps[-1].get("use_regex", True) and "Regex" in steps[0]["pattern"] \
                and steps[0]["behavior"] == "Isolated" and not steps[0].get("invert"):
            return steps[0]["pattern"]["Regex"]
    raise Inexpressible(f"pre-tokenizer {' + '.join(kinds) or 'none'}")


class Foreign(Tokenizer):
    """A tokenizer that the `tokenizers` package runs, behind the same three calls."""

    def __init__(self, spec, why):
        try:
            import tokenizers
        except ImportError:
            raise InputError(f"{why}; `pip install tokenizers` to use it") from None
        import json
        self.inner = tokenizers.Tokenizer.from_str(json.dumps(spec))
        self.special = {token["content"]: token["id"] for token in spec.get("added_tokens", [])}

    def encode(self, text, special=True):
        self.inner.encode_special_tokens = not special
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=False)
