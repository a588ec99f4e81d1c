"""Chat templates: untrusted Jinja, run in a sandbox with limits on time and memory."""
import json
import os
import re
import signal
import threading
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from support.files import InputError, reason

SECONDS, MEGABYTES, CHARACTERS = 10, 512, 10**7     # limits of one chat: time, memory, length of its text
FIRST, END = "\U0010fffe", "\U0010ffff"   # marks around an answer; Unicode assigns them no character

# what stands before and after a role, at the end of a content, and between messages, where a model ships no
# template of its own; {% generation %} is transformers' mark of an answer
BUILT_IN = """\
{{ start }}{% for m in messages %}{{ before }}{{ m.role }}{{ after }}{% if m.role == 'assistant' %}\
{% generation %}{{ m.content }}{{ end }}{% endgeneration %}{% else %}{{ m.content }}{{ end }}{% endif %}\
{{ between }}{% endfor %}{% if add_generation_prompt %}{{ before }}assistant{{ after }}{% endif %}"""
CHATML = dict(start="", before="<|im_start|>", after="\n", end="<|im_end|>", between="\n")
LLAMA3 = dict(start="<|begin_of_text|>", before="<|start_header_id|>", after="<|end_header_id|>\n\n",
              end="<|eot_id|>", between="")


class Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["**"])          # the one operation that no timer interrupts

    def call_binop(self, context, operator, left, right):
        raise TemplateError("powers are not for templates")


class Generation(Extension):
    """{% generation %} ... {% endgeneration %}: the assistant's part."""
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

    def marked(self, caller):
        return FIRST + caller() + END


NO_DEFAULT = "{{ raise_exception('none of its several templates is named default') }}"


class ChatTemplate:
    """render(messages) -> (text, [(first, last + 1) character of each answer]).

    today: the date that the template reads, a datetime; None: that of the clock.
    """
    today = None

    @classmethod
    def of(cls, template, special, marks):
        """The model's template, or the one that its special tokens are made for: ChatML, Llama 3's, or a
        plain one. template: the source, a list of sources by name, or None; special: texts of special
        tokens; marks: {"bos_token": text, ...} for the template to read."""
        if isinstance(template, list):                # several, by name
            by_name = {named["name"]: named["template"] for named in template}
            template = by_name.get("default", NO_DEFAULT)
        if template:
            return cls(template, special, marks)
        parts = dict(start=marks.get("bos_token", ""), before="<|", after="|>\n",
                     end=marks.get("eos_token", ""), between="\n")
        if CHATML["before"] in special:
            parts = CHATML
        elif LLAMA3["before"] in special:
            parts = LLAMA3
        return cls(BUILT_IN, special, parts)

    def __init__(self, source, special, values):
        self.source, self.values = source, dict(values, tools=None, documents=None)
        self.end_mark = re.compile(r"\s*(?:" + "|".join(map(re.escape, special)) + ")")
        self.marks_answers = re.search(r"{%-?\s*generation\b", source)
        environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
        environment.globals |= {"raise_exception": refuse, "strftime_now": self.strftime}
        environment.filters["tojson"] = tojson
        self.environment, self.compiled = environment, None

    def strftime(self, form):
        return (self.today or datetime.now()).strftime(form)

    def render(self, messages):
        """InputError where the template refuses the chat, or fails."""
        opens = messages[-1]["role"] != "assistant"
        if self.marks_answers:
            messages = [m | {"content": unmarked(m["content"])[0]} for m in messages]
            return unmarked(self.text_of(messages, opens))
        text = self.text_of(messages, opens)
        return text, self.answers(messages, text)

    def text_of(self, messages, opens):
        """A chat's text; opens: whether an answer is opened at its end."""
        try:
            with bounded(SECONDS, MEGABYTES):
                if self.compiled is None:
                    self.compiled = self.environment.from_string(self.source)
                text = self.compiled.render(messages=messages, add_generation_prompt=opens, **self.values)
            if len(text) > CHARACTERS:
                raise ValueError(f"it writes {len(text):,} characters")
            return text
        except Exception as e:                        # whatever a stranger's program may run into
            raise InputError(f"the model's chat template refuses this chat ({reason(e)})") from None

    def answers(self, messages, text):
        """Where the answers lie: between the text up to an opened answer and the text up to its end. Where a
        template writes a message otherwise once another follows, its content is looked for."""
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = self.beginning(messages[:i], True), text
            if i + 1 < len(messages):
                after = self.beginning(messages[:i + 1], False)
            question = len(before)
            if not text.startswith(before):
                question = self.end_of_question(messages[:i], message["content"].strip(), before, text)
            if 0 < question <= len(after) and text.startswith(after):
                spans.append((question, len(after)))
                continue
            content, start = message["content"].strip(), max(question, spans[-1][1] if spans else 0)
            if i and not question and messages[i - 1]["role"] != "assistant":    # it may quote the answer
                start = end_of(messages[i - 1]["content"].strip(), text, start) or start
            end = end_of(content, text, start)
            if end and content:
                first, mark = end - len(content), self.end_mark.match(text, end)
                spans.append((first, mark.end() if mark else end))
        return spans

    def end_of_question(self, messages, answer, before, text):
        """Where the answer begins in `text`: where that departs from `before`, the messages with an answer
        opened, if after the messages. (Past answers may lack the thought that opens a new one.) Else 0."""
        shared, unopened = os.path.commonprefix([before, text]), self.beginning(messages, False)
        if not 0 < len(unopened) < len(shared):
            return 0
        ends = range(len(shared), len(unopened), -1)           # an answer may begin as <think> does, with "<"
        return next((end for end in ends if text.startswith(answer, end)), len(shared))

    def beginning(self, messages, opens):
        """text_of a chat's first messages; "" where the template refuses them."""
        try:
            return self.text_of(messages, opens) if messages else ""
        except InputError:
            return ""


def end_of(part, text, start):
    """Where a part of the text ends, looked for from `start` on; 0 where it is not there."""
    first = text.find(part, start)
    return first + len(part) if first >= 0 else 0


def unmarked(text):
    """(text, spans) of a text with FIRST and END around what is the assistant's."""
    parts, spans, first, length = re.split(f"([{FIRST}{END}])", text), [], 0, 0
    for part in parts:
        if part == FIRST:
            first = length
        elif part == END:
            spans.append((first, length))
        else:
            length += len(part)
    return "".join(part for part in parts if part not in (FIRST, END)), spans


def refuse(why):
    raise TemplateError(why)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """As transformers has it: jinja's own would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


@contextmanager
def bounded(seconds, megabytes):
    """Context manager: TimeoutError after `seconds`, MemoryError past `megabytes` of new memory; only in the
    main thread of a Linux process."""
    statm = Path("/proc/self/statm")
    if threading.current_thread() is not threading.main_thread() or not statm.exists():
        yield
        return
    import resource  # Unix alone has it

    def stop(*_):
        raise TimeoutError(f"it takes more than {seconds} s")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(statm.read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        limits = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min([used + megabytes * 2**20, *limits]), hard))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)
