"""Files to samples: instructions (Alpaca), chats and plain text. batches.py makes batches of them."""
import json
import sys
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from support.files import InputError, read_text

DEFAULT_DATA = Path(__file__).parent.parent / "data" / "instructions.jsonl"
HELD_OUT = 64         # samples at the end of a file that are kept for the final table
PLAIN_PIECE = 512     # tokens of the pieces that plain text is cut into
PLAIN_PROMPT = 64     # of which so many stand in for a prompt, and are not learned from
FIXED_DATE = datetime(2024, 7, 26)     # "today" in chat templates: no sample depends on the date


@dataclass
class Sample:
    ids: list[int]
    answer: list[bool]      # for each token, whether it is to be learned from
    prompt: int             # tokens before the first answer


def read_samples(path, tok, context, piece=PLAIN_PIECE):
    """Samples of a JSON or JSONL file of instructions, chats or texts (see FORMS), or of plain text: what is
    named .txt or .md, or begins with neither [ nor {. piece: tokens of the pieces that texts are cut into.

    Returns (samples, how many were cut to `context` tokens), and prints how many records were read in which
    form, and how many have nothing to learn from. InputError names the line or the field that is wrong.
    """
    tok.template.today = FIXED_DATE
    text = read_text(path, "give a file of JSON, JSONL or plain text in UTF-8")
    if not text.strip() or "\0" in text:
        raise InputError(f"{path}: {'binary' if text.strip() else 'empty'}; give JSON, JSONL or plain text")
    if Path(path).suffix in (".txt", ".md") or text.lstrip()[0] not in "[{":
        print(f"{path}: read as plain text", file=sys.stderr)
        return plain_samples(text, tok, min(piece, context)), 0
    samples, cut, forms, empty = [], 0, Counter(), 0
    for where, record in records(text, path):
        form, record_samples = sample_of(record, where, tok, min(piece, context))
        forms[form] += 1
        cut += sum(len(s.ids) > context for s in record_samples)
        whole = [Sample(s.ids[:context], s.answer[:context], min(s.prompt, context)) for s in record_samples]
        usable = [s for s in whole if any(s.answer[1:])]             # no token predicts the first
        samples += usable
        empty += not usable
    counts = ", ".join(f"{n:,} as {form}" for form, n in forms.items())
    if empty:
        counts += f"; {empty:,} have nothing to learn from (no answer within {context} tokens, or a text of" \
                  f" {PLAIN_PROMPT} tokens or fewer)"
    print(f"{path}: records read: {counts}", file=sys.stderr)
    return samples, cut


def records(text, path):
    """(where, value) of each record of a JSON array or of JSON lines."""
    if text.lstrip().startswith("["):
        try:
            yield from ((f"{path}, record {i}", record) for i, record in enumerate(json.loads(text), 1))
        except (ValueError, RecursionError) as e:
            raise InputError(f"{path}: not valid JSON ({e})") from None
        return
    for i, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}, line {i}", json.loads(line)
            except (ValueError, RecursionError) as e:
                raise InputError(f"{path}, line {i}: not valid JSON ({e}); give an array, or a record a"
                                 " line") from None


ROLES = {"human": "user", **dict.fromkeys(["gpt", "bot", "chatgpt", "bing", "bard"], "assistant")}
FORMS = {     # name: its fields; a record has the first form of which it has all fields
    "chat": ["messages"], "conversations": ["conversations"], "instruction": ["instruction"],
    "prompt": ["prompt", "completion"], "context": ["context", "response"], "text": ["text"]}


def sample_of(record, where, tok, piece):
    """(the form of a record, its samples): one for a chat or an instruction, as many as needed for a text."""
    if not isinstance(record, dict):
        raise InputError(f"{where}: lacks the field 'instruction'; it is not a JSON object")
    record = {key: value for key, value in record.items() if value is not None}     # null: absent
    form = next((form for form, fields in FORMS.items() if record.keys() >= {*fields}), None)
    if form is None:
        forms = "; ".join(" and ".join(map(repr, fields)) for fields in FORMS.values())
        raise InputError(f"{where}: has fields of no form that is read, which are {forms}")
    if form == "text":
        return form, plain_samples(field(record, "text", where), tok, piece)
    messages = messages_of(record, form, where)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        return form, []                              # nothing to learn from
    try:
        ids, answer = tok.encode_chat(messages)
    except InputError as e:
        raise InputError(f"{where}: {e}") from None
    prompt = answer.index(True) if True in answer else len(ids)
    return form, [Sample(ids, answer, max(prompt, 1))]


def field(record, name, where, kind=str):
    """A field of a record, of the right kind; text may be a list of parts {"type": "text", "text": ...}."""
    value = record.get(name) if isinstance(record, dict) else None
    if kind is str and isinstance(value, list):
        texts = [part.get("text") for part in value if isinstance(part, dict) and part.get("type") == "text"]
        if len(texts) < len(value) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{where}: {name!r} is a list, not all of whose parts are {{'type': 'text',"
                             " 'text': '...'}; give one text")
        return "".join(texts)
    if not isinstance(value, kind):
        raise InputError(f"{where}: lacks the field {name!r}, or it is not a {kind.__name__}")
    return value


def messages_of(record, form, where):
    """A record as a chat, [{"role", "content"}, ...]. Its "system" message is put first, unless the chat has
    one."""
    messages = []
    if form in ("chat", "conversations"):
        for name in "tools", "functions", "chat_template_kwargs":
            if has_values(record.get(name)):
                raise InputError(f"{where}: has {name!r} for its template, which are not supported; take such"
                                 " chats out")
        role, content = ("role", "content") if form == "chat" else ("from", "value")
        for m in field(record, FORMS[form][0], where, list):
            name = field(m, role, where)
            calls = m.get("tool_calls") or m.get("function_call")
            if calls or name in ("tool", "function", "function_call"):
                raise InputError(f"{where}: has tool calls, which are not supported; take such chats out")
            if m.get("reasoning_content") or m.get("thinking") or m.get("reasoning"):
                raise InputError(f"{where}: has a thought beside its text, which templates write in ways of"
                                 " their own; put it into the text, or take it out")
            name = ROLES.get(name, name)
            if name not in ("system", "user", "assistant"):
                raise InputError(f"{where}: has a message of {name!r:.40}; roles are system, user,"
                                 " assistant (or human, gpt)")
            if name == "assistant" and m.get("weight") == 0:
                raise InputError(f"{where}: has an answer of weight 0; all answers are learned from, so take"
                                 " such chats out")
            messages.append({"role": name, "content": field(m, content, where)})
    else:
        if form == "instruction":                                        # Alpaca, or Dolly
            dolly = "output" not in record and "response" in record
            extra, answer = ("context", "response") if dolly else ("input", "output")
            question = field(record, "instruction", where)
            if record.get(extra):
                question += "\n\n" + field(record, extra, where)
        else:
            question, answer = field(record, FORMS[form][0], where), FORMS[form][1]
        history = field(record, "history", where, list) if record.get("history") else []
        for pair in history:
            if not isinstance(pair, list) or list(map(type, pair)) != [str, str]:
                raise InputError(f"{where}: its history should be a list of pairs, [question, answer]")
        for asked, answered in [*history, (question, field(record, answer, where))]:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    if record.get("system") and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": field(record, "system", where)})
    return messages


def has_values(value):
    """Whether a field is not empty, also not "[]" as text or an object of nulls, as some files have it."""
    if isinstance(value, dict):
        return any(of_key is not None for of_key in value.values())
    return value not in (None, [], "", "[]", "{}")


def plain_samples(text, tok, size):
    """A text in pieces; what stands in for their prompts is not learned from."""
    return pieces([tok.bos_ids + tok.encode(text, special=False)], size, PLAIN_PROMPT)


def pieces(texts, size, start=0):
    """Samples of at most `size` tokens from lists of token ids. The first 64 of each are its prompt, and it
    is learned from token `start` on."""
    samples = []
    for ids in texts:
        for i in range(0, len(ids), size):
            piece = ids[i:i + size]
            answer = [at >= start for at in range(len(piece))]
            if any(answer[1:]):                                      # no token predicts the first
                samples.append(Sample(piece, answer, min(len(piece), PLAIN_PROMPT)))
    return samples
