"""An entry of a file as a conversation, or as a sample that is already tokenized.

Entries may be of four formats, which are told apart by their keys:

    messages   {"messages": [{"role": ..., "content": ...}, ...], "tools": [...]}
    sharegpt   {"conversations": [{"from": "human", "value": ...}, ...]}
    pairs      {"prompt": ..., "completion": ...}, each text or messages
    samples    {"prompt_ids": [...], "target_ids": [...], "conversation": ...}, already tokenized

>>> chat = as_conversation({"prompt": "2+3?", "completion": "5"}, "pairs", 0, "entry 0")
>>> [message["content"] for message in chat.messages]
['2+3?', '5']
"""

import json
from dataclasses import dataclass, field
from typing import Any

from flexreason.chat.messages import json_words
from flexreason.chat.render import ConversationError
from flexreason.talk.nearest import did_you_mean
from flexreason.tree.sample import Sample

FORMATS = ("messages", "sharegpt", "pairs", "samples")

MESSAGE_KEYS = ("messages", "conversation", "conversations")

SYSTEM_KEYS = ("system", "system_prompt")
"""What may hold a system prompt, beside messages of any format."""

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


class BadInput(ConversationError):
    """A file or entry that is no conversation; the text names where."""

    reason = "bad input"


@dataclass(frozen=True)
class Conversation:
    """One conversation: `messages` with `tools`, or, already tokenized, `samples`."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    number: int  # counted from 0
    where: str  # "chats.jsonl, line 7"
    format: str
    options: dict[str, Any] = field(default_factory=dict)  # of the template, from the entry's chat_template_kwargs
    samples: list[Sample] | None = None


def detect(entry: Any, where: str) -> str:
    """The format of an entry, by its keys."""
    if isinstance(entry, list):
        return "sharegpt" if entry and isinstance(entry[0], dict) and "from" in entry[0] else "messages"
    _check_kind(entry, "messages", where)
    if "prompt_ids" in entry and "target_ids" in entry:
        return "samples"
    for key in MESSAGE_KEYS:
        if isinstance(messages := entry.get(key), list) and messages:
            return "sharegpt" if isinstance(messages[0], dict) and "from" in messages[0] else "messages"
    if "prompt" in entry and "completion" in entry:
        return "pairs"
    raise BadInput(
        f"{where}: neither messages, nor conversations, nor prompt and completion, nor prompt_ids and target_ids among "
        f"its keys: {', '.join(map(str, entry)) or 'none'}; expected one of these four kinds"
    )


def _check_kind(entry: Any, format: str, where: str) -> None:
    """Raise unless an entry can hold something of this format at all."""
    lists = format in ("messages", "sharegpt")
    if not isinstance(entry, dict) and not (lists and isinstance(entry, list)):
        wanted = "an object or a list of messages" if lists else f"an object of the kind {format}"
        raise BadInput(f"{where}: expected {wanted}, found {'null' if entry is None else type(entry).__name__}")


def as_conversation(entry: Any, format: str, number: int, where: str) -> Conversation:
    """The conversation of an entry whose format is messages, sharegpt or pairs."""
    _check_kind(entry, format, where)
    try:
        messages = {"messages": _messages, "sharegpt": _sharegpt, "pairs": _pairs}[format](entry)
        if format == "messages" and messages and isinstance(messages[0], dict) and "from" in messages[0]:
            raise ValueError("from and value, as ShareGPT has them, where role and content are expected")
        about = entry if isinstance(entry, dict) else {}
        tools = _loaded(about.get("tools"), "tools")
        options = _loaded(about.get("chat_template_kwargs"), "chat_template_kwargs") or {}
        if tools is not None and not isinstance(tools, list):
            raise ValueError(f"tools: expected a list, found {type(tools).__name__}")
        if not isinstance(options, dict):
            raise ValueError(f"chat_template_kwargs: expected an object, found {type(options).__name__}")
        if "accept" in options:  # else data would wave its own dirt through
            raise ValueError("chat_template_kwargs: accept is no option of the template; give it to the command")
        if format == "sharegpt" and isinstance(about.get("system"), str) and about["system"]:
            messages = [{"role": "system", "content": about["system"]}, *messages]
        return Conversation(messages, tools, number, where, format, options)
    except (ValueError, KeyError, TypeError) as error:
        words = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) and error.args else str(error)
        raise BadInput(f"{where}: not of the kind {format}: {words}") from error


def as_sample(entry: Any, where: str) -> Sample:
    _check_kind(entry, "samples", where)
    prompt, target = entry.get("prompt_ids"), entry.get("target_ids")
    for ids in (prompt, target):
        if not isinstance(ids, list | tuple) or not all(type(token) is int for token in ids):
            raise BadInput(f"{where}: expected prompt_ids and target_ids, lists of token ids, found {str(ids)[:80]}")
    if not prompt or not target:
        raise BadInput(f"{where}: prompt_ids or target_ids is empty; expected at least one token in each")
    return Sample(list(prompt), list(target))


def _messages(entry: Any) -> list[Any]:
    messages = entry if isinstance(entry, list) else next((entry[k] for k in MESSAGE_KEYS if k in entry), None)
    if messages is None:
        raise ValueError("messages is missing; expected a list of messages under it")
    if not isinstance(messages := _loaded(messages, "messages"), list):
        raise ValueError(f"messages: expected a list, found {type(messages).__name__}")
    first = messages[0] if messages else None
    if isinstance(entry, dict) and isinstance(first, dict) and not {"role", "from"} & first.keys():
        raise ValueError(f"messages: expected objects with role and content, found keys {', '.join(first)}")
    return messages


def _sharegpt(entry: Any) -> list[Any]:
    messages: list[Any] = []
    for at, turn in enumerate(_messages(entry)):
        if not isinstance(turn, dict):
            raise ValueError(f"turn {at}: expected an object with from and value, found {type(turn).__name__}")
        if missing := [key for key in ("from", "value") if key not in turn]:
            raise ValueError(f"turn {at}: {missing[0]!r} is missing; expected from and value")
        speaker = turn["from"]
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            hint = did_you_mean(speaker, SPEAKERS)
            raise ValueError(f"turn {at}: unknown speaker {speaker!r}; expected one of {', '.join(SPEAKERS)}{hint}")
        role = SPEAKERS[speaker]
        extra = {key: value for key, value in turn.items() if key not in ("from", "value")}
        if role == "call":
            call = _call(turn["value"], at)
            calls = [{"type": "function", "function": one} for one in (call if isinstance(call, list) else [call])]
            messages.append({"role": "assistant", "content": "", "tool_calls": calls, **extra})
        else:
            messages.append({"role": role, "content": turn["value"], **extra})
    return messages


def _call(value: Any, at: int) -> Any:
    if not isinstance(value, str):
        raise ValueError(f"turn {at}: value: expected a call as JSON, found {type(value).__name__}")
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"turn {at}: value: the call is no JSON: {json_words(error)}; mend it") from error


def _pairs(entry: Any) -> list[Any]:
    before, after = (
        [{"role": role, "content": entry[name]}] if isinstance(entry[name], str) else entry[name]
        for name, role in (("prompt", "user"), ("completion", "assistant"))
    )
    for name, messages in (("prompt", before), ("completion", after)):
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise ValueError(f"{name}: expected text or a list of messages, found {str(messages)[:80]}")
    earlier = [{**m, "train": False} if m.get("role") == "assistant" else m for m in before]  # part of the prompt
    return earlier + after


def _loaded(value: Any, name: str) -> Any:
    """A value that may have been stored as its JSON."""
    try:
        return json.loads(value) if isinstance(value, str) and value.strip()[:1] in ("[", "{") else value
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{name}: no JSON: {json_words(error)}; give it as it is, or as its JSON") from error
