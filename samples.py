"""Files to what a model reads: instructions (Alpaca), chats and plain text to samples and batches, benchmarks
to questions."""
import json
import re
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import torch

from weights import InputError

PLAIN_PIECE = 512     # plain text is cut into pieces of this many tokens
PLAIN_PROMPT = 64     # of which so many stand in for a prompt, and are not learned from


@dataclass
class Sample:
    ids: list[int]
    answer: list[bool]      # for each token, whether it is to be learned from
    prompt: int             # tokens before the first answer


def read_samples(path, tok, context):
    """Samples of an Alpaca JSON or JSONL file, chat JSONL ("messages"), text JSONL ("text") or plain text.

    Returns (samples, how many were cut to `context` tokens). InputError names the line or the field that is
    wrong.
    """
    try:
        text = Path(path).read_text("utf-8")
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; give JSON, JSONL or plain text") from None
    if not text.strip() or "\0" in text:
        raise InputError(f"{path}: {'binary' if text.strip() else 'empty'}; give JSON, JSONL or plain text")
    if text.lstrip()[0] not in "[{":
        return plain_samples(text, tok, min(PLAIN_PIECE, context)), 0
    samples, cut = [], 0
    for where, record in records(text, path):
        for sample in sample_of(record, where, tok, context):
            cut += len(sample.ids) > context
            sample = Sample(sample.ids[:context], sample.answer[:context], min(sample.prompt, context))
            if any(sample.answer):
                samples.append(sample)
    return samples, cut


def records(text, path):
    """(where, value) of each record of a JSON array or of JSON lines."""
    if text.lstrip().startswith("["):
        try:
            yield from ((f"{path}, record {i}", record) for i, record in enumerate(json.loads(text), 1))
        except ValueError as e:
            raise InputError(f"{path}: not valid JSON ({e})") from None
        return
    for i, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}, line {i}", json.loads(line)
            except ValueError as e:
                raise InputError(f"{path}, line {i}: not valid JSON ({e})") from None


def sample_of(record, where, tok, context):
    """The samples of one record: one for a chat or an instruction, as many as needed for a text."""
    def field(of, name, kind=str):
        if not isinstance(of, dict) or not isinstance(of.get(name), kind):
            raise InputError(f"{where}: lacks the field {name!r}, or it is not a {kind.__name__}")
        return of[name]
    if isinstance(record, dict) and "text" in record:
        return plain_samples(field(record, "text"), tok, min(PLAIN_PIECE, context))
    if isinstance(record, dict) and "messages" in record:
        messages = [{"role": field(m, "role"), "content": field(m, "content")}
                    for m in field(record, "messages", list)]
        if not any(m["role"] == "assistant" for m in messages):
            raise InputError(f"{where}: none of its messages has the role 'assistant'")
        while messages[-1]["role"] != "assistant":
            messages.pop()
    else:
        question = field(record, "instruction")
        if record.get("input"):
            question += "\n\n" + field(record, "input")
        messages = [{"role": "user", "content": question},
                    {"role": "assistant", "content": field(record, "output")}]
    ids, answer = tok.encode_chat(messages)
    return [Sample(ids, answer, max(answer.index(True), 1))]


def plain_samples(text, tok, piece):
    """A text in pieces; the first 64 tokens of each stand in for a prompt and are not learned from."""
    ids = ([] if tok.bos_id is None else [tok.bos_id]) + tok.encode(text)
    pieces = [ids[i:i + piece] for i in range(0, len(ids), piece)]
    return [Sample(p, [i >= PLAIN_PROMPT for i in range(len(p))], PLAIN_PROMPT)
            for p in pieces if len(p) > PLAIN_PROMPT]


def pieces(text, size):
    """Samples of at most `size` tokens from rows of token ids (n, T); all are learned from, and the first 64
    of each are its prompt."""
    return [Sample(p, [True] * len(p), min(len(p), PLAIN_PROMPT))
            for row in text.tolist() for i in range(0, len(row), size) if len(p := row[i:i + size]) > 1]


def batches(samples, budget, seed):
    """Lists of samples, forever: of similar lengths, at most `budget` tokens with padding, shuffled."""
    rng = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(samples), generator=rng).tolist()
        packed = []
        for i in range(0, len(order), 256):
            pool = [samples[j] for j in order[i:i + 256]]
            packed += pack(pool, budget)
        yield from (packed[i] for i in torch.randperm(len(packed), generator=rng).tolist())


def pack(samples, budget, size=lambda s: len(s.ids)):
    """Samples by length, in groups of at most `budget` tokens with padding (a longer one stands alone)."""
    groups = []
    for s in sorted(samples, key=size, reverse=True):
        if not groups or size(groups[-1][0]) * (len(groups[-1]) + 1) > budget:
            groups.append([])
        groups[-1].append(s)
    return groups


@dataclass
class Batch:
    idx: torch.Tensor               # (B, T) token ids, padded on the right with 0
    lengths: torch.Tensor           # (B,)
    prompt_lengths: torch.Tensor    # (B,)
    scored: torch.Tensor            # (B, T) bool: the next token is part of an answer
    targets: torch.Tensor           # (N,) those next tokens

    @classmethod
    def of(cls, samples, device):
        T = max(len(s.ids) for s in samples)
        idx = torch.tensor([s.ids + [0] * (T - len(s.ids)) for s in samples])
        scored = torch.tensor([s.answer[1:] + [False] * (T - len(s.ids) + 1) for s in samples])
        targets = idx.roll(-1, 1)[scored]
        lengths = torch.tensor([len(s.ids) for s in samples])
        prompts = torch.tensor([s.prompt for s in samples])
        return cls(*(t.to(device) for t in (idx, lengths, prompts, scored, targets)))


# ------------------------------------------------------------------------------------ benchmarks to questions


QUESTIONS = Path(__file__).parent / "data" / "questions"


@dataclass
class Task:
    """How a line of a benchmark becomes a question, as in lm-evaluation-harness."""
    hub: tuple                         # the data set's name on the hub and its configuration
    split: str
    shots: int                         # the paper's
    text: callable                     # the context; a list: one a choice, all followed by `target`
    choices: callable
    gold: callable                     # the right choice's place
    norm: bool = False                 # is acc_norm defined?
    paper: bool = True                 # one of the paper's eight?
    examples: str = "train"            # the split few-shot examples come from
    group: callable = lambda d: ""     # questions with the same group share examples, and this heading
    target: callable = None


def hellaswag_text(text):
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def index(labels, answer):
    return labels.index(str(answer).strip())


def arc(name, **kind):
    return Task(("allenai/ai2_arc", name), "test", text=lambda d: f"Question: {d['question']}\nAnswer:",
                choices=lambda d: d["choices"]["text"], norm=True,
                gold=lambda d: index(d["choices"]["label"], d["answerKey"]), **kind)


TASKS = {
    "arc_challenge": arc("ARC-Challenge", shots=25),
    "arc_easy": arc("ARC-Easy", shots=0, paper=False),
    "boolq": Task(
        ("aps/super_glue", "boolq"), "validation", 0,
        lambda d: f"{d['passage']}\nQuestion: {d['question']}?\nAnswer:",
        lambda d: ["no", "yes"], lambda d: int(d["label"])),
    "hellaswag": Task(
        ("Rowan/hellaswag", None), "validation", 10,
        lambda d: hellaswag_text(f"{d['activity_label']}: {d['ctx_a']} {d['ctx_b'].capitalize()}"),
        lambda d: [hellaswag_text(ending) for ending in d["endings"]], lambda d: int(d["label"]), norm=True),
    "mmlu": Task(
        ("cais/mmlu", "all"), "test", 5,
        lambda d: "{}\nA. {}\nB. {}\nC. {}\nD. {}\nAnswer:".format(d["question"].strip(), *d["choices"]),
        lambda d: ["A", "B", "C", "D"], lambda d: int(d["answer"]), examples="dev",
        group=lambda d: "The following are multiple choice questions (with answers) about"
                        f" {d['subject'].replace('_', ' ')}.\n\n"),
    "openbookqa": Task(
        ("allenai/openbookqa", "main"), "test", 0, lambda d: d["question_stem"],
        lambda d: d["choices"]["text"], lambda d: index(d["choices"]["label"], d["answerKey"]), norm=True),
    "piqa": Task(
        ("baber/piqa", None), "validation", 0, lambda d: f"Question: {d['goal']}\nAnswer:",
        lambda d: [d["sol1"], d["sol2"]], lambda d: int(d["label"]), norm=True),
    "rte": Task(
        ("nyu-mll/glue", "rte"), "validation", 0,
        lambda d: f"{d['sentence1']}\nQuestion: {d['sentence2']} True or False?\nAnswer:",
        lambda d: ["True", "False"], lambda d: int(d["label"])),
    "winogrande": Task(
        ("allenai/winogrande", "winogrande_xl"), "validation", 5,
        lambda d: [d["sentence"][:d["sentence"].index("_")] + d[f"option{i}"] for i in (1, 2)],
        lambda d: [d["option1"], d["option2"]], lambda d: ["1", "2"].index(d["answer"]),
        target=lambda d: d["sentence"][d["sentence"].index("_") + 1:].strip()),
}

Question = namedtuple("Question", "id contexts continuations lengths gold group")


def read_split(name, task, split, args):
    """[(where, record)] of one split of a task, or None where there is no such split."""
    if args.data_dir:
        path = Path(args.data_dir) / name / f"{split}.jsonl"
        try:
            return list(records(path.read_text("utf-8"), path)) if path.exists() else None
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(f"{path}: cannot be read ({e})") from None
    try:
        import datasets
    except ImportError:
        raise InputError(f"{name}: give --data-dir DIR with {name}/{split}.jsonl, a line a question with the"
                         " hub's field names, or pip install datasets to fetch it from the hub") from None
    try:
        lines = datasets.load_dataset(*task.hub, split=split)
        return [(f"{name}, {split} {i}", dict(line)) for i, line in enumerate(lines)]
    except Exception as e:   # the hub's failures have no common kind
        raise InputError(f"{name}: {task.hub[0]} could not be fetched from the hub ({e}); give --data-dir") \
            from None


def parse(task, where, record):
    """(contexts, continuations, lengths of the choices in characters, gold, group) of a line; one context a
    choice. InputError names a field that is missing or an answer that is none."""
    try:
        text, choices, group = task.text(record), task.choices(record), task.group(record)
        contexts = text if isinstance(text, list) else [text] * len(choices)
        after = [task.target(record)] * len(choices) if task.target else choices
        lengths = [len(choice) for choice in choices]
    except KeyError as e:
        raise InputError(f"{where}: lacks the field {e}") from None
    except (TypeError, ValueError, AttributeError, IndexError) as e:
        raise InputError(f"{where}: not a question of this task ({e})") from None
    try:
        gold = task.gold(record)
        if not 0 <= gold < len(choices):
            raise ValueError
    except KeyError as e:
        raise InputError(f"{where}: lacks the field {e}") from None
    except (ValueError, TypeError):
        raise InputError(f"{where}: its answer is none of its {len(choices)} choices") from None
    if not all(lengths) or not all(after):
        raise InputError(f"{where}: a choice is empty")
    return contexts, [" " + continuation for continuation in after], lengths, gold, group


def read_task(name, args):
    """The questions of a task, and how many examples precede each."""
    task = TASKS[name]
    lines = read_split(name, task, task.split, args)
    if not lines:
        where = f" in {args.data_dir}/{name}" if args.data_dir else ""
        raise InputError(f"{name}: there is no {task.split}.jsonl{where}, or it is empty")
    shots = task.shots if args.num_fewshot is None else args.num_fewshot
    examples = {}
    for where, record in (read_split(name, task, task.examples, args) or []) if shots else []:
        contexts, continuations, _, gold, group = parse(task, where, record)
        examples.setdefault(group, []).append(contexts[gold] + continuations[gold] + "\n\n")
    if args.num_fewshot is None or not examples:
        shots = min(shots, min(map(len, examples.values()), default=0))
    questions = []
    for i, (where, record) in enumerate(lines[:args.limit]):
        contexts, *rest, group = parse(task, where, record)
        if len(examples.get(group, ())) < shots:
            raise InputError(f"{where}: {shots} examples are asked for, but {task.examples}.jsonl has"
                             f" {len(examples.get(group, ()))} for it; lower --num-fewshot")
        head = group + "".join(examples.get(group, ())[:shots])
        questions.append(Question(i, [head + context for context in contexts], *rest, group))
    return questions, shots
