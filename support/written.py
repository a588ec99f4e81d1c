"""Answers that the model writes, and their scores, as lm-evaluation-harness 0.4.13 defines them for GSM8K.

A repetition_penalty of generation_config.json, as Qwen2.5 has one, is not applied; transformers, and so the
harness, applies it in greedy decoding too.
"""
import re

import torch

from support.files import InputError
from support.tasks import compare

LONGEST = 256                       # tokens of an answer, the harness's default
LOOK_BACK = 16                      # last tokens that are searched for a stop string
IGNORED = ",", r"\$", r"(?s).*#### ", r"\.$"
EXTRACTIONS = {                     # name: (pattern of the final number, which match of several)
    "strict": (r"#### (\-?[0-9\.\,]+)", 0),
    "flexible": (r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1),
}


def prompts(questions, tok, max_context):
    """[(place, token ids of its context) for each question], and how many lost their beginning to make room
    for the answer."""
    room = max_context - LONGEST
    if room < 1:
        raise InputError(f"an answer may have {LONGEST} tokens, which leaves no room for a question in the"
                         f" model's context of {max_context}; leave this task out")
    texts = [tok.bos_ids + tok.encode(question.contexts[0]) for question in questions]
    n_cut = sum(len(ids) > room for ids in texts)
    return [(place, ids[-room:]) for place, ids in enumerate(texts)], n_cut


class Writing:
    """What the rows of a batch write. For `Llama.generate`'s on_token: it ends when each row has ended, with
    a stop string or a token that ends a text."""

    def __init__(self, tok, stop, n_rows):
        self.tok, self.stop = tok, stop
        self.ids = [[] for _ in range(n_rows)]       # up to each row's end
        self.ended = [False] * n_rows

    def __call__(self, token):
        for row, token_id in enumerate(token.tolist()):
            if not self.ended[row]:
                self.ids[row].append(token_id)
                latest = self.tok.decode(self.ids[row][-LOOK_BACK:])
                self.ended[row] = token_id in self.tok.eos_ids or any(stop in latest for stop in self.stop)
        return all(self.ended)

    def answers(self):
        """[(text, number of tokens, whether it ended) of each row]: the text before the first stop string,
        special tokens left out; the number of what was written until then."""
        special = {*self.tok.special.values(), *self.tok.eos_ids}
        texts = [self.tok.decode(i for i in ids if i not in special) for ids in self.ids]
        for stop in self.stop:
            texts = [text.split(stop)[0] for text in texts]
        return list(zip(texts, map(len, self.ids), self.ended))


def extract(text, pattern, which):
    """The final number of an answer, as text, or "[invalid]"."""
    matches = re.findall(pattern, text)
    if not matches:
        return "[invalid]"
    groups = [matches[which]] if isinstance(matches[which], str) else matches[which]
    return next(filter(None, groups)).strip()


def plain(answer):
    """An answer without what is not compared: commas, $, a worked solution, the final period."""
    for pattern in IGNORED:
        answer = re.sub(pattern, "", answer)
    return answer.lower()


class Scores:
    """One variant's answers to a task's questions, and what follows from them; the metric is the strict one.

    answers: Writing.answers, one per question; seconds: their time, prompts included; numbers: the largest
    absolute values in the residual stream, checked to be finite.
    """

    def __init__(self, questions, answers, seconds, numbers):
        self.questions, self.seconds, self.numbers = questions, seconds, numbers
        self.texts, n_tokens, ended = zip(*answers)
        self.n_tokens, self.n_endless = sum(n_tokens), len(ended) - sum(ended)
        self.gold = [plain(question.continuations[0][1:]) for question in questions]
        self.answers = {}
        for name, (pattern, which) in EXTRACTIONS.items():
            self.answers[name] = [extract(text, pattern, which) for text in self.texts]
        self.right = self.right_by("strict")

    def right_by(self, extraction):
        """Which answers are right, 0 or 1, float64 (n,)."""
        answers = map(plain, self.answers[extraction])
        return torch.tensor([answer == gold for answer, gold in zip(answers, self.gold)]).double()

    def against(self, dense):
        """What changed: see tasks.compare; there are no probabilities to compare."""
        changed = [a != b for a, b in zip(self.answers["strict"], dense.answers["strict"])]
        return compare(self.right, dense.right) | {"changed": sum(changed), "kl": None}

    def note(self):
        return (f"flexible extraction {100 * float(self.right_by('flexible').mean()):.1f}; {self.n_tokens:,}"
                f" tokens written, {self.n_tokens / self.seconds:.1f} per second; {self.n_endless} of"
                f" {len(self.questions)} answers had no end after {LONGEST} tokens")

    def entry(self):
        """As the JSON file has it."""
        items = [{"id": question.id, "gold": gold, "ll": None, "strict": strict, "flexible": flexible,
                  "text": text}
                 for question, gold, strict, flexible, text
                 in zip(self.questions, self.gold, *self.answers.values(), self.texts)]
        accuracies = {name: float(self.right_by(name).mean()) for name in EXTRACTIONS}
        return {"n": len(items), "acc": None, "acc_norm": None, **accuracies, "seconds": self.seconds,
                "tokens_per_s": self.n_tokens / self.seconds, "endless": self.n_endless, "items": items}
