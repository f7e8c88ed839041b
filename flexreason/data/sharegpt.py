"""A turn of ShareGPT's, {"from": ..., "value": ...}, as a message.

>>> as_message({"from": "human", "value": "2+3?"}, 0)
{'role': 'user', 'content': '2+3?'}
"""

import json
from typing import Any

from flexreason.chat.messages import CLOSE, OPEN, json_words
from flexreason.talk.nearest import did_you_mean

NO_JSON = (ValueError, RecursionError)
"""What json.loads raises: not only JSONDecodeError, but for a number of thousands of digits, or too deep a nesting."""

SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "call",
    "tool_call": "call",
}
"""ShareGPT's names of who speaks, as roles; a call is an assistant message whose value is the call."""


def is_turn(message: dict[str, Any]) -> bool:
    """Whether a message is a turn of ShareGPT's, by what is filled: sets put together have the keys of both."""
    return message.get("from") is not None and (message.get("value") is not None or message.get("content") is None)


def as_message(turn: Any, at: int) -> dict[str, Any]:
    """The message that turn number `at` is."""
    if not isinstance(turn, dict):
        raise ValueError(f"turn {at}: expected an object with from and value, found {type(turn).__name__}")
    if missing := [key for key in ("from", "value") if key not in turn]:
        raise ValueError(f"turn {at}: {missing[0]!r} is missing; expected from and value")
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if not is_turn(turn) and turn.get("role") is not None:
        return rest  # a message, where other rows have turns
    speaker, value = turn["from"], turn["value"]
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        hint = did_you_mean(speaker, SPEAKERS)
        raise ValueError(f"turn {at}: unknown speaker {speaker!r}; expected one of {', '.join(SPEAKERS)}{hint}")
    is_call = SPEAKERS[speaker] == "call"
    role, content = ("assistant", "") if is_call else (SPEAKERS[speaker], value)
    own = {"role": rest.pop("role", None), "content": rest.pop("content", None)}
    if own["role"] is not None and SPEAKERS.get(own["role"], own["role"]) != role:
        raise ValueError(f"turn {at}: from says {speaker!r}, and role says {own['role']!r}; leave one of them out")
    if not is_call:
        if own["content"] not in (None, "", value):
            raise ValueError(f"turn {at}: value and content are two texts; leave one of them out")
        return {"role": role, "content": content, **rest}
    before, call = _call(value, at)
    if before and own["content"]:
        raise ValueError(f"turn {at}: value has reasoning before the call, and there is content too; leave one out")
    calls = [{"type": "function", "function": one} for one in (call if isinstance(call, list) else [call])]
    return {"role": role, "content": before or own["content"] or "", "tool_calls": calls, **rest}


def _call(value: Any, at: int) -> tuple[str, Any]:
    """The reasoning block before a call, or "", and the call."""
    if not isinstance(value, str):
        raise ValueError(f"turn {at}: value: expected a call as JSON, found {type(value).__name__}")
    block, closing, rest = value.partition(CLOSE) if value.lstrip().startswith(OPEN) else ("", "", value)
    try:
        return block + closing, json.loads(rest if closing else value)
    except NO_JSON as error:
        raise ValueError(f"turn {at}: value: the call is no JSON: {json_words(error)}; correct it") from error
