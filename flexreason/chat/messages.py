"""Messages as users have them: checked, and their parts (reasoning, content, tool calls) found and replaced.

Reasoning stands in a field (`reasoning_content`, `reasoning`, `thinking`) or inline, as `<think>...</think>` at the
very beginning of the content. What stands elsewhere in a text is text.
"""

import difflib
import json
from collections.abc import Iterable, Iterator
from typing import Any

from flexreason.chat.render import BadMessage, Messages

Message = dict[str, Any]

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "context")

OPEN, CLOSE = "<think>", "</think>"

TRAINING_KEYS = ("train", "weight")


def check(messages: Any) -> Messages:
    """The messages as plain dicts without None fields, or a BadMessage that names the first culprit."""
    if not isinstance(messages, list | tuple):
        raise BadMessage(f"expected a list of messages, found {type(messages).__name__}")
    if not messages:
        raise BadMessage("the conversation has no messages")
    return [_check_message(number, message) for number, message in enumerate(messages)]


def _check_message(number: int, message: Any) -> Message:
    if not isinstance(message, dict):
        raise BadMessage(f"expected a dict with role and content, found {type(message).__name__}", number)
    message = {key: value for key, value in message.items() if value is not None}
    role = message.get("role")
    if role not in ROLES:
        hint = "; data with from/value is read by flexreason.data.files" if "from" in message else ""
        hint = hint or did_you_mean(role, ROLES)
        if role is None:
            raise BadMessage(f"it has no role; its keys are {', '.join(map(str, message)) or 'none'}{hint}", number)
        raise BadMessage(f"unknown role {role!r}; expected one of {', '.join(ROLES)}{hint}", number)
    _check_content(number, message)
    fields = [name for name in REASONING_FIELDS if name in message]
    for name in fields:
        if not isinstance(message[name], str):
            raise BadMessage(f"{name}: expected text, found {type(message[name]).__name__}", number)
        if role != "assistant" and message[name]:
            raise BadMessage(f"a {role} message has {name}; only assistant messages can have reasoning", number)
    if message.get("tool_calls"):
        if role != "assistant":
            raise BadMessage(f"a {role} message has tool_calls; only assistant messages can have them", number)
        _check_calls(number, message["tool_calls"])
    elif "content" not in message:
        why = "has reasoning but no content" if fields else "has no content"
        may_be = ' (it may be "")' if fields or role != "assistant" else ""
        raise BadMessage(f"{role} message {why}; add content{may_be}, or leave the message out", number)
    return message


def _check_content(number: int, message: Message) -> None:
    content = message.get("content", "")
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        raise BadMessage(f"content: expected text or a list of text parts, found {type(content).__name__}", number)
    for part in content:
        if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise BadMessage(f"content: expected parts like {{'type': 'text', 'text': ...}}, found {kind!r}", number)


def _check_calls(number: int, calls: Any) -> None:
    if not isinstance(calls, list):
        raise BadMessage(f"tool_calls: expected a list, found {type(calls).__name__}", number)
    for at, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadMessage(f"tool_calls[{at}]: expected a function with a name, found {call!r:.200}", number)
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except json.JSONDecodeError as error:
                raise BadMessage(f"tool_calls[{at}]: arguments are no JSON: {json_words(error)}", number) from error
        if arguments is not None and not isinstance(arguments, dict):
            kind = type(arguments).__name__
            raise BadMessage(f"tool_calls[{at}]: expected arguments as an object or its JSON, found {kind}", number)


def did_you_mean(found: Any, known: Iterable[str]) -> str:
    """A hint at the name that is nearest to a wrong one, if any is near."""
    near = difflib.get_close_matches(found.lower(), known, n=1) if isinstance(found, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""


def json_words(error: Exception) -> str:
    """What is wrong with a JSON text, and where in it: by character, since its line is no line of the file."""
    return f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)


def is_trained(number: int, message: Message) -> bool:
    """Whether the message itself says that it is trained on: `train: false` or `weight: 0` say no."""
    for key in TRAINING_KEYS:
        if key in message:
            if message[key] not in (0, 1):
                raise BadMessage(f"{key}: expected true or false, found {message[key]!r}", number)
            return bool(message[key])
    return True


def without_training_keys(message: Message) -> Message:
    return {key: value for key, value in message.items() if key not in TRAINING_KEYS}


def text_of(content: Any) -> str:
    """The text of a content, its parts one a line."""
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content)
    return content or ""


def split_inline(content: Any) -> tuple[str, str] | None:
    """Reasoning and rest of a content that begins with a think block; None where it does not."""
    text = text_of(content)
    if not text.lstrip().startswith(OPEN):
        return None
    head, found, rest = text.lstrip()[len(OPEN) :].partition(CLOSE)
    return (head.strip("\n"), rest.lstrip("\n")) if found else None


def reasoning_of(message: Message) -> str:
    """The reasoning, wherever it stands; empty where there is none."""
    for name in REASONING_FIELDS:
        if name in message:
            return message[name]
    inline = split_inline(message.get("content"))
    return inline[0] if inline else ""


def has_field(message: Message) -> bool:
    return any(name in message for name in REASONING_FIELDS)


def response_of(message: Message) -> str:
    """The content without inline reasoning."""
    inline = None if has_field(message) else split_inline(message.get("content"))
    return inline[1] if inline else text_of(message.get("content"))


def without_reasoning(message: Message) -> Message:
    """The message as a client sends it back that never saw the reasoning."""
    if message["role"] != "assistant":
        return message
    inline = None if has_field(message) else split_inline(message.get("content"))
    bare = {key: value for key, value in message.items() if key not in REASONING_FIELDS}
    return {**bare, "content": inline[1]} if inline else bare


def with_field(message: Message, name: str) -> Message:
    """The message with its reasoning in field `name`, and nowhere else."""
    reasoning = reasoning_of(message)
    if message["role"] != "assistant" or not (has_field(message) or reasoning):
        return message
    return {**without_reasoning(message), name: reasoning}


def calls_of(message: Message) -> list[dict[str, Any]]:
    """The functions called: dicts with name and arguments."""
    return [call.get("function", call) for call in message.get("tool_calls") or []]


def with_calls(message: Message, functions: list[dict[str, Any]]) -> Message:
    """The message with other functions in its tool calls."""
    calls = [
        {**call, "function": function} if "function" in call else function
        for call, function in zip(message["tool_calls"], functions, strict=True)
    ]
    return {**message, "tool_calls": calls}


def with_arguments(message: Message, form: str) -> Message:
    """The message with all tool arguments in one form: "object" or "string"."""
    if not message.get("tool_calls"):
        return message
    functions = []
    for function in calls_of(message):
        arguments = function.get("arguments")
        if form == "object" and isinstance(arguments, str):
            arguments = json.loads(arguments or "{}")
        elif form == "string" and isinstance(arguments, dict):
            arguments = json.dumps(arguments, ensure_ascii=False)
        functions.append(function if arguments is None else {**function, "arguments": arguments})
    return with_calls(message, functions)


def with_text(message: Message, text: str) -> Message:
    """The message with this content, in the form that it has: text, or one text part."""
    parts = isinstance(message.get("content"), list)
    return {**message, "content": [{"type": "text", "text": text}] if parts else text}


def between(message: Message, begin: str, end: str) -> Message:
    """The message with these texts around its content, behind an inline block if there is one."""
    content = message.get("content")
    if not isinstance(content, list):
        content = content or ""
        text = response_of(message)
        return {**message, "content": f"{content[: len(content) - len(text)]}{begin}{text}{end}"}
    texts = [{**content[0], "text": begin + content[0]["text"]}, *content[1:]]
    texts[-1] = {**texts[-1], "text": texts[-1]["text"] + end}
    return {**message, "content": texts}


def marked_arguments(arguments: Any, mark: str) -> Any:
    """Arguments of the same form and keys whose every value is the mark."""
    if isinstance(arguments, str):
        return json.dumps(marked_arguments(json.loads(arguments or "{}"), mark))
    return dict.fromkeys(arguments, mark) if isinstance(arguments, dict) else arguments


def texts(message: Message) -> Iterator[str]:
    """Every text in a message that a user wrote."""
    yield text_of(message.get("content"))
    for name in REASONING_FIELDS:
        yield message.get(name, "")
    for function in calls_of(message):
        yield function["name"]
        yield json.dumps(function.get("arguments"), ensure_ascii=False)
