"""Benchmarks to questions and their scores, as lm-evaluation-harness 0.4 defines them."""
import math
import os
import re
import sys
from collections import namedtuple
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F

from support.checked import check
from support.data import records
from support.files import InputError, read_text

QUESTIONS = Path(__file__).parent.parent / "data" / "questions"


@dataclass
class Task:
    """How a line of a benchmark becomes a question, as in lm-evaluation-harness.

    What is text on the hub should be text: a number in its place is refused, where the harness would write it
    out. An answer may be a number or the text of one.
    """
    hub: tuple                         # the data set's name on the hub and its configuration
    split: str
    shots: int                         # few-shot examples in the paper
    text: callable                     # record -> the context, or a list of contexts, one per choice
    choices: callable                  # record -> the answers to choose from
    gold: callable                     # record -> the right choice's index
    fields: dict                       # those that text and choices read, see support.checked.check
    norm: bool = False                 # is acc_norm defined?
    paper: bool = True                 # one of the paper's eight?
    examples: str = "train"            # the split few-shot examples come from
    group: callable = lambda d: ""     # questions with the same group share examples, and this heading
    target: callable = None            # record -> what is scored after each context; None: the choice
    stop: tuple = ()                   # not empty: the model writes its answer, until one of these strings

    @property
    def metric(self):
        """Its name in eval.py's table and file."""
        if self.stop:
            return "strict"
        return "acc_norm" if self.norm else "acc"


def hellaswag_text(text):
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def mmlu_text(d):
    first, second, third, fourth = d["choices"]
    return f"{d['question'].strip()}\nA. {first}\nB. {second}\nC. {third}\nD. {fourth}\nAnswer:"


def index(labels, answer):
    return labels.index(str(answer).strip())


def number(answer):
    """An answer that is an index."""
    if not isinstance(answer, (int, str)):
        raise ValueError
    return int(answer)


LABELLED = {"text": [str], "label": [str]}


def arc(name, **kind):
    return Task(("allenai/ai2_arc", name), "test", text=lambda d: f"Question: {d['question']}\nAnswer:",
                choices=lambda d: d["choices"]["text"], norm=True,
                fields={"question": str, "choices": LABELLED},
                gold=lambda d: index(d["choices"]["label"], d["answerKey"]), **kind)


def worked_answer(d):
    if not re.search(r"#### \S", d["answer"]):
        raise ValueError("its answer has no line '#### number'")
    return d["answer"]


TASKS = {
    "arc_challenge": arc("ARC-Challenge", shots=25),
    "arc_easy": arc("ARC-Easy", shots=0, paper=False),
    "boolq": Task(
        ("aps/super_glue", "boolq"), "validation", 0,
        lambda d: f"{d['passage']}\nQuestion: {d['question']}?\nAnswer:",
        lambda d: ["no", "yes"], lambda d: number(d["label"]), {"passage": str, "question": str}),
    "gsm8k": Task(
        ("openai/gsm8k", "main"), "test", 5, lambda d: f"Question: {d['question']}\nAnswer:",
        lambda d: [worked_answer(d)], lambda d: 0, {"question": str, "answer": str}, paper=False,
        stop=("Question:", "</s>", "<|im_end|>")),
    "hellaswag": Task(
        ("Rowan/hellaswag", None), "validation", 10,
        lambda d: hellaswag_text(f"{d['activity_label']}: {d['ctx_a']} {d['ctx_b'].capitalize()}"),
        lambda d: [hellaswag_text(ending) for ending in d["endings"]], lambda d: number(d["label"]),
        {"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": [str]}, norm=True),
    "mmlu": Task(
        ("cais/mmlu", "all"), "test", 5, mmlu_text,
        lambda d: ["A", "B", "C", "D"], lambda d: number(d["answer"]),
        {"question": str, "choices": [str], "subject": str}, examples="dev",
        group=lambda d: "The following are multiple choice questions (with answers) about"
                        f" {d['subject'].replace('_', ' ')}.\n\n"),
    "openbookqa": Task(
        ("allenai/openbookqa", "main"), "test", 0, lambda d: d["question_stem"],
        lambda d: d["choices"]["text"], lambda d: index(d["choices"]["label"], d["answerKey"]),
        {"question_stem": str, "choices": LABELLED}, norm=True),
    "piqa": Task(
        ("baber/piqa", None), "validation", 0, lambda d: f"Question: {d['goal']}\nAnswer:",
        lambda d: [d["sol1"], d["sol2"]], lambda d: number(d["label"]),
        {"goal": str, "sol1": str, "sol2": str}, norm=True),
    "rte": Task(
        ("nyu-mll/glue", "rte"), "validation", 0,
        lambda d: f"{d['sentence1']}\nQuestion: {d['sentence2']} True or False?\nAnswer:",
        lambda d: ["True", "False"], lambda d: number(d["label"]), {"sentence1": str, "sentence2": str}),
    "winogrande": Task(
        ("allenai/winogrande", "winogrande_xl"), "validation", 5,
        lambda d: [d["sentence"][:d["sentence"].index("_")] + d[f"option{i}"] for i in (1, 2)],
        lambda d: [d["option1"], d["option2"]], lambda d: index(["1", "2"], d["answer"]),
        {"sentence": str, "option1": str, "option2": str},
        target=lambda d: d["sentence"][d["sentence"].index("_") + 1:].strip()),
}

Question = namedtuple("Question", "id contexts continuations lengths gold group")


def read_split(name, split, data_dir):
    """[(where, record)] of one split of a task, or None where there is no such split."""
    hub = TASKS[name].hub
    if data_dir:
        path = Path(data_dir) / name / f"{split}.jsonl"
        return list(records(read_text(path), path)) if os.path.exists(path) else None
    try:
        import datasets
    except ImportError:
        raise InputError(f"{name}: give --data-dir DIR with {name}/{split}.jsonl, a line a question with the"
                         " hub's field names (data/questions has a few), or pip install datasets to fetch it"
                         " from the hub") from None
    try:
        lines = datasets.load_dataset(*hub, split=split)
        return [(f"{name}, {split} {i}", dict(line)) for i, line in enumerate(lines)]
    except Exception as e:   # the hub's failures have no common kind
        raise InputError(f"{name}: {hub[0]} could not be fetched from the hub ({e}); give --data-dir") \
            from None


def parse(task, where, record):
    """(contexts, continuations, lengths of the choices in characters, gold, group) of a line; one context a
    choice. InputError names a field that is missing or no text, or an answer that is none."""
    check(record, task.fields, where)
    try:
        text, choices, group = task.text(record), task.choices(record), task.group(record)
        after = [task.target(record)] * len(choices) if task.target else choices
    except ValueError as e:          # no blank to fill in, not four choices, or no number at the end
        raise InputError(f"{where}: not a question of this task ({e})") from None
    contexts = text if isinstance(text, list) else [text] * len(choices)
    lengths = [len(choice) for choice in choices]
    try:
        gold = task.gold(record)
        if not 0 <= gold < len(choices):
            raise ValueError
    except KeyError as e:
        raise InputError(f"{where}: lacks the field {e}") from None
    except ValueError:
        raise InputError(f"{where}: its answer is none of its {len(choices)} choices") from None
    if not all(lengths) or not all(after):
        raise InputError(f"{where}: a choice is empty")
    return contexts, [" " + continuation for continuation in after], lengths, gold, group


def read_task(name, data_dir=None, num_fewshot=None, limit=None):
    """The questions of a task, and how many examples precede each.

    data_dir: a folder with <task>/<split>.jsonl, None: the hub; num_fewshot: None: the paper's number, or
    as many as there are for every question; limit: only so many lines. InputError names what is missing or
    wrong, and where.
    """
    task = TASKS[name]
    lines = read_split(name, task.split, data_dir)
    if not lines:
        where = f" in {data_dir}/{name}" if data_dir else ""
        raise InputError(f"{name}: there is no {task.split}.jsonl{where}, or it is empty; put the task's file"
                         " there, or leave the task out")
    shots = task.shots if num_fewshot is None else num_fewshot
    examples = {}                                                            # {group: texts}
    for where, record in (read_split(name, task.examples, data_dir) or []) if shots else []:
        if len(examples.get("", [])) == shots:           # enough, of a task without groups
            break
        contexts, continuations, _, gold, group = parse(task, where, record)
        examples.setdefault(group, []).append(contexts[gold] + continuations[gold] + "\n\n")
    parsed = [(where, parse(task, where, record)) for where, record in lines[:limit]]
    if num_fewshot is None:
        shots = min(shots, *(len(examples.get(group, [])) for _, (*_, group) in parsed))
    elif shots and not examples:
        print(f"{name}: without {task.examples}.jsonl no examples precede its questions", file=sys.stderr)
        shots = 0
    questions = []
    for i, (where, (contexts, *rest, group)) in enumerate(parsed):
        group_examples = examples.get(group, [])
        if len(group_examples) < shots:
            raise InputError(f"{where}: {shots} examples are asked for, but {task.examples}.jsonl has"
                             f" {len(group_examples)} for it; lower --num-fewshot")
        head = group + "".join(group_examples[:shots])
        questions.append(Question(i, [head + context for context in contexts], *rest, group))
    return questions, shots


# ----------------------------------------------------------------------------------------------------- scores
class Scores:
    """One variant's log-likelihoods for a task's questions, and what follows from them."""

    def __init__(self, questions, lls, norm):
        """lls: [[log-likelihood of each choice] for each question]; norm: whether the task's metric is
        acc_norm."""
        self.questions, self.lls, self.numbers = questions, lls, list(chain.from_iterable(lls))
        gold = torch.tensor([q.gold for q in questions])
        likeliest = torch.tensor([ll.index(max(ll)) for ll in lls])            # the first, where several are
        by_length = [[value / n for value, n in zip(ll, q.lengths)] for q, ll in zip(questions, lls)]
        per_character = torch.tensor([ll.index(max(ll)) for ll in by_length])
        self.answers = per_character if norm else likeliest
        self.right = (self.answers == gold).double()                           # the task's own metric
        self.acc = float((likeliest == gold).double().mean())
        self.acc_norm = float(self.right.mean()) if norm else None

    def entry(self):
        """As the JSON file has it."""
        items = [{"id": q.id, "gold": q.gold, "ll": ll} for q, ll in zip(self.questions, self.lls)]
        return {"n": len(items), "acc": self.acc, "acc_norm": self.acc_norm, "items": items}

    def against(self, dense):
        """What changed: difference of the metric and its 95 % half-width (paired), answers that differ, and
        the mean over questions of KL(dense || this), of the distributions over the choices."""
        kl = 0.0
        for dense_ll, ll in zip(dense.lls, self.lls):
            log_p = torch.tensor(dense_ll).double().log_softmax(0)
            log_q = torch.tensor(ll).double().log_softmax(0)
            kl += float(F.kl_div(log_q, log_p, reduction="sum", log_target=True)) / len(self.lls)
        changed = int((self.answers != dense.answers).sum())
        return compare(self.right, dense.right) | {"changed": changed, "kl": kl}


def compare(right, dense_right):
    """The difference of two means (n,), and its 95 % half-width, paired."""
    difference = right - dense_right
    return {"difference": float(difference.mean()), "interval": 1.96 * standard_error(difference)}


def standard_error(values):
    """Standard error of the mean."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
