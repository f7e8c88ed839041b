"""What a template leaves out of messages: all messages of some role, one of two reasoning fields, or reasoning that
stands under another name.

Inference leaves out the same, so the samples are right. But people should know it: perhaps they did not mean it.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any

from flexreason.chat.errors import BadMessage
from flexreason.chat.messages import REASONING_FIELDS, Message
from flexreason.chat.probes import AGAIN, ANSWER, MARK, THOUGHT, USER, assistant, calling, tool, user
from flexreason.chat.template import Template
from flexreason.talk.nearest import misspelt

OF_CALLS = ("tool", "function", "ipython")
"""Roles of results, which stand behind a call."""

AS_REASONING = (
    "chain_of_thought", "cot", "rationale", "reasoning_details", "reasoning_text", "reasoning_trace", "think",
    "thinking_blocks", "thinking_content", "thought", "thoughts",
)  # fmt: skip
"""What reasoning is called elsewhere."""


class LeftOut:
    """What one template leaves out. Each question is put to it once."""

    def __init__(self, template: Template) -> None:
        self.template = template
        self._drops, self._field = cache(self._probe_role), cache(self._probe_fields)

    def roles(self, messages: Iterable[Message]) -> list[str]:
        """The kinds of messages that the template does not write because of their role, in words, each once."""
        found: dict[str, None] = {}
        for number, message in enumerate(messages):
            begins = number == 0 and message.role not in OF_CALLS
            if message.role not in ("user", "assistant") and message.text.strip() and self._drops(message.role, begins):
                found[f"{message.role} messages" + ("" if begins else " behind the first message")] = None
        return list(found)

    def with_one_reasoning(self, message: Message) -> Message:
        """The message with the one of its reasoning fields that the template writes; as it is where that writes more
        than one, or where all say the same."""
        if len({message.as_dict[name] for name in message.fields}) < 2:
            return message
        field = self._field(message.fields)
        return message.without(*(name for name in message.fields if field and name != field))

    def check_reasoning(self, message: Message, number: int) -> None:
        """Raise where a message has its reasoning under a name only that the template does not know."""
        if message.reasoning.strip() or self.template.markers.closed_by(self.template.prompt_end):
            return
        for key, value in message.as_dict.items():
            says_something = value.strip() if isinstance(value, str) else value
            if says_something and _is_for_reasoning(str(key)) and str(key) not in self.template.render.source:
                raise BadMessage(
                    f"it has reasoning under {key!r}, where the chat template does not look, so that an answer without "
                    f"any would be trained; give it as {REASONING_FIELDS[0]}, or leave it out",
                    number,
                )

    def _probe_role(self, role: str, begins: bool) -> bool:
        """Whether nothing comes out of a message of this role, at the beginning or later. Where the template raises,
        nobody knows."""
        said = {"role": role, "content": AGAIN}
        before = [user(USER), self._call()] if role in OF_CALLS else [user(USER), assistant(ANSWER)]
        messages = [said, user(USER)] if begins else [*before, {**tool(AGAIN), **said}, user(THOUGHT)]
        if role in OF_CALLS:
            messages.pop()
        text = self.template.probe(self.template.take(messages), True)
        return text is not None and USER in text and AGAIN not in text

    def _probe_fields(self, names: tuple[str, ...]) -> str | None:
        """Which of these fields comes out where a message has them all: before an answer, else before a call. Where
        none does, the first of them."""
        marks = {name: MARK.format(f"f{n}") for n, name in enumerate(names)}
        for message in (assistant(ANSWER), self._call()):
            asked, taken = self.template.take([user(USER), message])
            text = self.template.probe([asked, {**taken, **marks}]) or ""
            if shown := [name for name in names if marks[name] in text]:
                return shown[0] if len(shown) == 1 else None
        return names[0]

    def _call(self) -> dict[str, Any]:
        return calling("string" if self.template.argument_form == "string" else "object")


@cache
def _is_for_reasoning(key: str) -> bool:
    return key in AS_REASONING or bool(misspelt(key, REASONING_FIELDS))
