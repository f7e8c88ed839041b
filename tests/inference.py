"""Chat templates made at random, and an inference loop that knows how each was made.

A template is a list of choices: how turns begin and end, what a prompt has that a history lacks, where reasoning goes.
The same choices are carried out twice. `jinja` writes them as a template. `Inference` plays a serving stack and a
model that has learned the format: it sends what stands before a turn, and the model writes what the format wants of it
from there on. So the target is known without looking at any rendering of it. What nobody could know from the template
is said by `unknowable`.
"""

import json
from dataclasses import dataclass
from random import Random

from templating import byte_level, with_template

KINDS = {  # how a message of a role begins, and how it ends
    "chatml": ("<|im_start|>{role}\n", "<|im_end|>"),
    "tags": ("<|{role}|>\n", "<|end|>"),
    "header": ("<|h|>{role}<|/h|>\n\n", "<|eot|>"),
    "two tokens": ("<|turn|><|{role}|>", "<|turn_end|>"),
    "words": ("### {role}:\n", "</s>"),
    "line": ("{role}: ", "</s>"),
}

BLOCKS = [("<think>\n", "\n</think>\n\n"), ("<think>", "</think>"), ("<reasoning>", "</reasoning>")]


@dataclass(frozen=True)
class Choices:
    kind: str
    gap: str  # between messages
    stop: str  # what stands before the end of an answer
    suffix: str  # behind the last user's text, while it is last
    tools: str  # behind the last user's message, while it is last
    reminder: str  # a system message before the generation prompt
    attribute: str  # in the generation prompt, behind the role
    prompt_role: str  # the assistant's name in the prompt
    no_break: bool  # the generation prompt lacks the header's last white space
    closes: str  # how the user's message ends while it is last
    reasoning: str  # "never", "last" or "always" rendered
    block: tuple[str, str]  # around it
    opens: bool  # the prompt opens the block
    eos: str  # "end", or a token that the template never writes
    special: bool  # whether the end is flagged special
    call: tuple[str, str]  # around a tool call
    begins: str  # what each content begins with, behind reasoning
    named: bool  # the template has the name that transformers takes where tools are given

    @property
    def begin(self):
        return KINDS[self.kind][0]

    @property
    def end(self):
        return KINDS[self.kind][1]

    def header(self, role):
        return self.begin.format(role=role)

    @property
    def asked(self):
        """The generation prompt."""
        header = self.header(self.prompt_role)
        at = header.find(self.prompt_role) + len(self.prompt_role)
        if self.attribute:
            at += len(header[at:]) - len(header[at:].lstrip("|>")) if self.kind in ("tags", "two tokens") else 0
            header = header[:at] + self.attribute + header[at:]
        header = header.rstrip() if self.no_break else header
        return header + (self.block[0] if self.opens else "")

    @property
    def differs(self):
        """Whether a prompt has what the rendering with an answer lacks."""
        return bool(self.suffix or self.tools or self.reminder or self.attribute or self.closes != self.end)

    @property
    def unknowable(self):
        """Why no one can tell what to write behind the prompt, from what the template renders; or nothing."""
        if self.prompt_role != "assistant":
            return "another role's name"
        if self.no_break and self.header("assistant") != self.header("assistant").rstrip():
            if self.attribute:
                return "the header's last line break stands behind an attribute, and not in the prompt"
            if self.opens or self.reasoning == "never":
                return "the header's last line break, or a block of reasoning that no rendering shows: which is first"
        if self.begins and self.reasoning == "never":
            return "what an answer begins with, or words of its header: reasoning may stand before or behind them"
        if self.kind == "two tokens" and self.attribute:
            return "what stands behind a whole header is an attribute, or the beginning of an answer"
        return ""


def draw(random: Random) -> Choices:
    kind = random.choice(list(KINDS))
    end = KINDS[kind][1]
    some = lambda *texts, often=0.3: random.choice(texts) if random.random() < often else ""  # noqa: E731
    return Choices(
        kind=kind,
        gap=random.choice(["\n", "", "\n\n"]) if kind not in ("words", "line") else "\n",
        stop=some("<|resp_end|>", "<|resp_end|>\n", "\n", often=0.4),
        suffix=some(" /think", "/no_think", "\n\nAnswer briefly.", " "),
        tools=some('<|tools|>[{"name": "probe"}]<|/tools|>', "\nTools: probe(key)"),
        reminder=some("Be kind.", "Write 'Action:' next.\nThen stop.", often=0.25),
        attribute=some(" effort=high", " (high)", "<|effort|>high", often=0.25),
        prompt_role="model" if random.random() < 0.12 else "assistant",
        no_break=random.random() < 0.12,
        closes=random.choice(["<|last|>", end + "\n"]) if random.random() < 0.15 else end,
        reasoning=random.choice(["never", "last", "always"]),
        block=random.choice(
            [("<think>\n", "\n</think>\n\n"), ("<think>", "</think>"), ("<reasoning>", "</reasoning>")]
        ),
        opens=random.random() < 0.3,
        eos=random.choice(["end", "end", "<|endoftext|>"]),
        special=random.random() < 0.8,
        call=random.choice([("<tool_call>\n", "\n</tool_call>"), ("<|call|>", "<|call_end|>"), ("Action: ", "")]),
        named=random.random() < 0.2,
        begins=some("<answer>\n", "Answer: ", "**Answer**\n\n", often=0.2),
    )


def jinja(c: Choices) -> str:
    """The choices as a chat template."""

    def quoted(text):
        return "{{ '" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "' }}"

    def header(role):
        before, _, behind = c.begin.partition("{role}")
        return quoted(before) + role + quoted(behind)

    ended = quoted(c.end) + quoted(c.gap)
    thought = quoted(c.block[0]) + "{{ m.reasoning_content }}" + quoted(c.block[1])
    shown = {"never": "false", "last": "loop.last", "always": "true"}[c.reasoning]
    return (
        "{% for m in messages %}"
        "{% if m.role == 'assistant' %}"
        + header("assistant")
        + "{% if m.reasoning_content and "
        + shown
        + " %}"
        + thought
        + "{% endif %}{% if m.content %}"
        + quoted(c.begins)
        + "{{ m.content }}{% endif %}{% for call in m.tool_calls or [] %}"
        + quoted(c.call[0])
        + "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}"
        + quoted(c.call[1])
        + "{% endfor %}"
        + quoted(c.stop)
        + ended
        + "{% else %}"
        + header("{{ m.role }}")
        + "{{ m.content }}{% if loop.last %}"
        + quoted(c.suffix)
        + quoted(c.closes)
        + quoted(c.gap)
        + quoted(c.tools)
        + "{% else %}"
        + ended
        + "{% endif %}{% endif %}{% endfor %}{% if add_generation_prompt %}"
        + (header("system") + quoted(c.reminder) + ended if c.reminder else "")
        + quoted(c.asked)
        + "{% endif %}"
    )


def tokenizer_of(c: Choices):
    marks = ["<|im_start|>", "<|h|>", "<|/h|>", "<|turn|>", "<|resp_end|>", "<|tools|>", "<|/tools|>", "<|last|>"]
    marks += ["<|user|>", "<|assistant|>", "<|model|>", "<|system|>", "<|effort|>"]
    plain = ["<think>", "</think>", *([] if c.special else [c.end])]
    special = [*marks, "<|endoftext|>", *([c.end] if c.special else [])]
    eos = c.end if c.eos == "end" else c.eos
    if not c.special and c.eos == "end":  # a tokenizer's eos_token is special
        plain.remove(c.end)
    marks += ["<|call|>", "<|call_end|>", "<|tool|>"]
    template = {"default": "{{ raise_exception('tools were given') }}", "tool_use": jinja(c)} if c.named else jinja(c)
    return with_template(byte_level(), template, special=special, plain=plain, eos=eos, bos="<bos>")


class Inference:
    """A serving stack and a model that has learned the format."""

    def __init__(self, choices: Choices) -> None:
        self.c = choices

    def history(self, messages, last: bool) -> str:
        """The messages as text; `last`: nothing follows them."""
        c, text = self.c, ""
        for n, m in enumerate(messages):
            end = n == len(messages) - 1 and last
            text += c.header(m["role"])
            if m["role"] == "assistant":
                if m.get("reasoning_content") and c.reasoning == "always":
                    text += c.block[0] + m["reasoning_content"] + c.block[1]
                text += self.said(m) + c.stop + c.end + c.gap
            else:
                text += m["content"] + (c.suffix + c.closes + c.gap + c.tools if end else c.end + c.gap)
        return text

    def prompt(self, messages) -> str:
        c = self.c
        reminder = c.header("system") + c.reminder + c.end + c.gap if c.reminder else ""
        return self.history(messages, True) + reminder + c.asked

    def target(self, message) -> str:
        """What the model writes behind the prompt: the rest of the header, its reasoning, the answer, the end."""
        c = self.c
        rest = c.header("assistant")[len(c.header("assistant").rstrip()) :] if c.no_break and not c.opens else ""
        name = c.block[0].strip("<>\n")
        # where it is never rendered, nobody knows the white space: line breaks are put there
        opening, closing = (f"<{name}>\n", f"\n</{name}>\n\n") if c.reasoning == "never" else c.block
        reasoning = message.get("reasoning_content", "")
        block = opening + reasoning + closing if reasoning else ""
        if c.opens:
            block = opening.removeprefix(c.block[0]) + reasoning + closing
        return rest + block + self.said(message) + c.stop + c.end

    def said(self, message) -> str:
        """Content and calls."""
        functions = [call["function"] for call in message.get("tool_calls", [])]
        calls = [{"name": function["name"], "arguments": function["arguments"]} for function in functions]
        content = message["content"] and self.c.begins + message["content"]
        return content + "".join(self.c.call[0] + json.dumps(call) + self.c.call[1] for call in calls)
