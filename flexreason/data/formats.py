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

from flexreason.chat.errors import ConversationError, NothingToTrain
from flexreason.chat.messages import json_words, untrained
from flexreason.data.sharegpt import NO_JSON, as_message, is_turn
from flexreason.tree.sample import Sample

TURNS = ("messages", "sharegpt")

FORMATS = (*TURNS, "pairs", "samples")

MESSAGE_KEYS = ("messages", "conversation", "conversations")

SYSTEM_KEYS = ("system", "system_prompt")
"""What may hold a system prompt, beside messages of any format."""

NOT_OF_TEMPLATE = {
    "accept", "conversation", "format", "history", "messages", "think", "tokenizer", "tools", "turns",
}  # fmt: skip
"""Options that say what is trained, which an entry does not decide, and what stands beside `chat_template_kwargs`."""

DEEPEST = 100
"""Levels of objects and lists in an entry; Python itself gives up at some hundreds."""


class BadInput(ConversationError):
    """A file or entry that is no conversation; the text names where."""

    reason = "bad input"


class NotTrained(BadInput):
    """An entry that says that it is not to be trained on."""

    reason = NothingToTrain.reason


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
    """The format of an entry, by its keys, and by what is filled of them."""
    if isinstance(entry, list):
        return _format_of(entry)
    _check_kind(entry, "messages", where)
    if "prompt_ids" in entry and "target_ids" in entry:
        return "samples"
    try:
        messages = _filled(entry)
    except ValueError as error:
        raise BadInput(f"{where}: messages cannot be read; expected a list: {error}") from error
    if messages is not None:
        return _format_of(messages)
    if "prompt" in entry and "completion" in entry:
        return "pairs"
    if any(key in entry for key in MESSAGE_KEYS):
        return "messages"  # of which there are none
    raise BadInput(
        f"{where}: neither messages, nor conversations, nor prompt and completion, nor prompt_ids and target_ids among "
        f"its keys: {', '.join(map(str, entry)) or 'none'}; expected one of these four kinds"
    )


def _filled(entry: dict[str, Any]) -> Any:
    """What stands under the first key for messages that holds a list of some, or else anything: sets put together have
    several such keys, and some have a number or a name under one."""
    found = [loaded for key in MESSAGE_KEYS if (loaded := _loaded(entry.get(key), key)) not in (None, [])]
    return next((messages for messages in found if isinstance(messages, list)), found[0] if found else None)


def _format_of(messages: Any) -> str:
    first = messages[0] if isinstance(messages, list) and messages else None
    return "sharegpt" if isinstance(first, dict) and is_turn(first) else "messages"


def _check_kind(entry: Any, format: str, where: str) -> None:
    """Raise unless an entry can hold something of this format at all."""
    lists = format in ("messages", "sharegpt")
    if not isinstance(entry, dict) and not (lists and isinstance(entry, list)):
        wanted = "an object or a list of messages" if lists else f"an object of the kind {format}"
        raise BadInput(f"{where}: expected {wanted}, found {'null' if entry is None else type(entry).__name__}")


def as_conversation(entry: Any, format: str, number: int, where: str) -> Conversation:
    """The conversation of an entry whose format is messages, sharegpt or pairs."""
    _check_kind(entry, format, where)
    about = entry if isinstance(entry, dict) else {}
    _check_trained(about, where)
    try:
        messages = {"messages": _messages, "sharegpt": _sharegpt, "pairs": _pairs}[format](entry)
        if format == "messages" and _format_of(messages) == "sharegpt":
            raise ValueError("from and value, as ShareGPT has them, where role and content are expected")
        messages = _with_system(messages, about)
        tools = _loaded(about.get("tools"), "tools")
        options = _loaded(about.get("chat_template_kwargs"), "chat_template_kwargs") or {}
        if tools is not None and not isinstance(tools, list):
            raise ValueError(f"tools: expected a list, found {type(tools).__name__}")
        if not tools and _loaded(about.get("functions"), "functions"):
            raise ValueError(
                "functions, an older form of tools: expected tools; give [{'type': 'function', 'function': ...}, ...]"
            )
        if not isinstance(options, dict):
            raise ValueError(f"chat_template_kwargs: expected an object, found {type(options).__name__}")
        if ours := options.keys() & NOT_OF_TEMPLATE:  # else data would wave its own dirt through
            raise ValueError(
                f"chat_template_kwargs: {min(ours)} is no option of the template; give it to the command, or beside "
                "the messages"
            )
        if _is_deeper([messages, tools, options], DEEPEST):
            raise ValueError(f"nested more than {DEEPEST} levels deep; expected messages with a few; leave it out")
        # an empty list says that there are none, and a template that is given one may speak of tools all the same
        return Conversation(messages, tools or None, number, where, format, options)
    except (ValueError, KeyError, TypeError) as error:
        words = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) and error.args else str(error)
        raise BadInput(f"{where}: not of the kind {format}: {words}") from error


def _check_trained(about: dict[str, Any], where: str) -> None:
    """Raise where an entry says that it is not trained on, or only in part."""
    for key in ("train", "weight"):  # a column named loss holds whatever was measured
        said = about.get(key)
        if said is not None and said not in (0, 1):
            raise BadInput(f"{where}: {key} of an entry: expected true or false, found {said!r}; leave it out")
        if said is not None and not said:
            raise NotTrained(f"{where}: the entry is excluded from training ({key}: {said!r}); leave it out")


def _with_system(messages: list[Any], about: dict[str, Any]) -> list[Any]:
    """The messages with the system prompt that stands beside them, unless they begin with the same."""
    for key in SYSTEM_KEYS:
        if not (said := _system_text(content := about.get(key), key)):
            continue
        first = messages[0] if messages and isinstance(messages[0], dict) else {}
        if first.get("role") not in ("system", "developer"):
            messages = [{"role": "system", "content": content}, *messages]
        elif _system_text(first.get("content"), "content") != said:
            raise ValueError(f"{key}: another system prompt than that of the first message; leave one of them out")
    return messages


def _system_text(content: Any, key: str) -> str:
    parts = content if isinstance(content, list) else [{"text": content or ""}]
    texts: list[Any] = [part.get("text") if isinstance(part, dict) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{key}: expected text or a list of text parts, found {str(content)[:80]}")
    return "\n".join(texts).strip()


def _is_deeper(value: Any, levels: int) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_is_deeper(item, levels - 1) for item in items)


def as_sample(entry: Any, where: str) -> Sample:
    _check_kind(entry, "samples", where)
    _check_trained(entry, where)
    if any(weight != 1 for weight in entry.get("target_weights") or ()):
        raise BadInput(f"{where}: target_weights: weights of targets are not read; expected ones, or leave them out")
    prompt, target = entry.get("prompt_ids"), entry.get("target_ids")
    for ids in (prompt, target):
        if not isinstance(ids, list | tuple) or not all(type(token) is int for token in ids):
            raise BadInput(f"{where}: expected prompt_ids and target_ids, lists of token ids, found {str(ids)[:80]}")
    if not prompt or not target:
        raise BadInput(f"{where}: prompt_ids or target_ids is empty; expected at least one token in each")
    return Sample(list(prompt), list(target))


def _messages(entry: Any) -> list[Any]:
    messages = entry if isinstance(entry, list) else _filled(entry)
    if messages is None and not any(key in entry for key in MESSAGE_KEYS):
        raise ValueError("messages is missing; expected a list of messages under it")
    if not isinstance(messages := messages or [], list):
        raise ValueError(f"messages: expected a list, found {type(messages).__name__}")
    first = messages[0] if messages else None
    if isinstance(entry, list) and isinstance(first, dict) and any(key in first for key in MESSAGE_KEYS):
        raise ValueError("expected one conversation, found a list of them; give one a line, or name the file .json")
    if isinstance(entry, dict) and isinstance(first, dict) and not {"role", "from"} & first.keys():
        raise ValueError(f"messages: expected objects with role and content, found keys {', '.join(first)}")
    return messages


def _sharegpt(entry: Any) -> list[Any]:
    return [as_message(turn, at) for at, turn in enumerate(_messages(entry))]


def _pairs(entry: Any) -> list[Any]:
    before, after = (
        [{"role": role, "content": entry[name]}] if isinstance(entry[name], str) else entry[name]
        for name, role in (("prompt", "user"), ("completion", "assistant"))
    )
    for name, messages in (("prompt", before), ("completion", after)):
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise ValueError(f"{name}: expected text or a list of messages, found {str(messages)[:80]}")
    earlier = [untrained(m) if m.get("role") == "assistant" else m for m in before]  # part of the prompt
    return earlier + after


def _loaded(value: Any, name: str) -> Any:
    """A value that may have been stored as its JSON; empty text is none."""
    if not isinstance(value, str):
        return value
    try:
        text = value.strip()
        return json.loads(text) if text[:1] in ("[", "{") else None if text in ("", "null") else value
    except NO_JSON as error:
        raise ValueError(f"{name}: no JSON: {json_words(error)}; give it as it is, or as its JSON") from error
