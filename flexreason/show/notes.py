"""What is said of a conversation beside its tokens: what to look at, messages as they were given, a refusal."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Remark:
    """Something that whoever checks data should see."""

    words: str
    turn: int | None = None
    message: int | None = None

    @property
    def where(self) -> str:
        """The message that it is about, in words, and its turn where it is trained on."""
        if self.message is None:
            return "" if self.turn is None else f"turn {self.turn}"
        return f"message {self.message}" + ("" if self.turn is None else f" (turn {self.turn})")


@dataclass(frozen=True)
class Spoken:
    """A message as it was given, with all that is said in it."""

    number: int
    role: str
    text: str
    words: str = ""  # why it is shown


def spoken(number: int, message: Any, words: str = "") -> Spoken:
    """A message of any form, as far as it has one."""
    if not isinstance(message, Mapping):
        return Spoken(number, "?", str(message), words)
    said = [message.get(key) for key in ("reasoning_content", "reasoning", "thinking", "content", "tool_calls")]
    texts = [
        text if isinstance(text, str) else json.dumps(text, ensure_ascii=False, default=str) for text in said if text
    ]
    return Spoken(number, str(message.get("role", "?")), "\n".join(texts), words)


@dataclass(frozen=True)
class RefusedScene:
    """A conversation that cannot be encoded, with the reason at its message."""

    where: str
    reason: str
    words: str
    messages: Sequence[Spoken] = ()
    message: int | None = None
