"""Messages as users have them: checked, and taken apart once into reasoning, content and tool calls.

Reasoning stands in a field (`reasoning_content`, `reasoning`, `thinking`) or inline, as `<think>...</think>` at the
very beginning of the content. What stands elsewhere in a text is text.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from flexreason.chat.arguments import in_form, parsed
from flexreason.chat.errors import BadMessage
from flexreason.chat.writable import kind_without_json, number_without_json, why_unwritable
from flexreason.talk.nearest import did_you_mean, misspelt

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "context")

OPEN, CLOSE = "<think>", "</think>"

TRAINING_KEYS = ("train", "loss", "weight")
"""What a message says of its own training, here and in other tools' data."""

OLDER_CALL = "function_call"

AS_ARGUMENTS = ("arguments", "parameters", "params", "args", "kwargs", "input")
"""What the arguments of a call are called, here and elsewhere."""


@dataclass(frozen=True)
class Message:
    """A message taken apart. `as_dict` is the message itself, which templates render; a message that is changed is
    another one, taken apart anew.

    >>> message = take_apart({"role": "assistant", "content": "<think>2+3</think>5"})
    >>> message.reasoning, message.response, message.fields, message.inline
    ('2+3', '5', (), True)
    >>> message.without_reasoning().as_dict
    {'role': 'assistant', 'content': '5'}
    """

    as_dict: dict[str, Any]
    text: str  # the content, its parts one a line
    reasoning: str  # wherever it stands; empty where there is none
    response: str  # the content without inline reasoning
    fields: tuple[str, ...]  # those that hold the reasoning
    inline: bool  # whether the content begins with the reasoning, and no field has it
    functions: list[dict[str, Any]]  # that are called: dicts with name and arguments

    @property
    def role(self) -> str:
        return self.as_dict["role"]

    @property
    def all_texts(self) -> list[str]:
        """What the message says, in reasoning, response and calls."""
        return [self.reasoning, self.response, *map(str, self.functions)]

    def changed(self, **fields: Any) -> "Message":
        return take_apart({**self.as_dict, **fields})

    def without(self, *keys: str) -> "Message":
        if not any(key in self.as_dict for key in keys):
            return self
        return take_apart({key: value for key, value in self.as_dict.items() if key not in keys})

    def without_reasoning(self) -> "Message":
        """The message as a client sends it back that never saw the reasoning."""
        block = len(self.text) - len(self.response)
        return self.without_beginning(block) if self.inline else self.without(*self.fields)

    def without_beginning(self, n: int) -> "Message":
        """The message without the first n characters of its text. What is left stands in the parts that it stood in."""
        content = self.as_dict.get("content")
        if not isinstance(content, list):
            return self.changed(content=self.text[n:])
        parts, start = [], 0
        for part in content:
            rest = part["text"][max(n - start, 0) :]
            if rest or start >= n:
                parts.append({**part, "text": rest})
            start += len(part["text"]) + 1  # the line break between two parts of the text
        return self.changed(content=parts or [{"type": "text", "text": ""}])

    def with_field(self, name: str) -> "Message":
        """The message with its reasoning, if it has any, in field `name`, and nowhere else."""
        if not (self.fields or self.inline):
            return self
        bare, is_empty = self.without_reasoning(), self.inline and not self.reasoning.strip()
        if is_empty and not (self.response or self.functions):
            return self  # nothing else is said: it is dirt, and as written if it is accepted
        return bare if is_empty else bare.changed(**{name: self.reasoning})

    def with_texts(self, reasoning: str | None = None, content: str | None = None) -> "Message":
        """The message with other texts in these places; reasoning that stood inline then stands in a field."""
        message = self
        if reasoning is not None:
            message = self.without_reasoning() if self.inline else self
            message = message.changed(**dict.fromkeys(self.fields or REASONING_FIELDS[:1], reasoning))
        if content is not None:
            in_parts = isinstance(message.as_dict.get("content"), list)
            message = message.changed(content=[{"type": "text", "text": content}] if in_parts else content)
        return message

    def with_functions(self, functions: list[dict[str, Any]]) -> "Message":
        """The message with other functions in its tool calls."""
        calls = [
            {**call, "function": function} if "function" in call else function
            for call, function in zip(self.as_dict["tool_calls"], functions, strict=True)
        ]
        return self.changed(tool_calls=calls)

    def with_arguments(self, form: str) -> "Message":
        """The message with all tool arguments in one form: "object" or "string"."""
        if not self.functions:
            return self
        return self.with_functions(
            [
                {**function, "arguments": in_form(function["arguments"], form)} if "arguments" in function else function
                for function in self.functions
            ]
        )

    def between(self, begin: str, end: str) -> "Message":
        """The message with these texts around its content, behind an inline block if there is one."""
        content = self.as_dict.get("content")
        if not isinstance(content, list):
            block = self.text[: len(self.text) - len(self.response)]
            return self.changed(content=f"{block}{begin}{self.response}{end}")
        texts = [{**content[0], "text": begin + content[0]["text"]}, *content[1:]]
        texts[-1] = {**texts[-1], "text": texts[-1]["text"] + end}
        return self.changed(content=texts)


def take_apart(message: dict[str, Any]) -> Message:
    """The parts of a message that has been checked. Only an assistant's has reasoning."""
    text = _text_of(message)
    functions = [call.get("function", call) for call in message.get("tool_calls") or []]
    if message["role"] != "assistant":
        return Message(message, text, "", text, (), False, functions)
    if fields := tuple(name for name in REASONING_FIELDS if name in message):
        return Message(message, text, message[fields[0]], text, fields, False, functions)
    if block := _inline_block(text):
        return Message(message, text, *block, (), True, functions)
    return Message(message, text, "", text, (), False, functions)


def _text_of(message: dict[str, Any]) -> str:
    content = message.get("content")
    return "\n".join(part["text"] for part in content) if isinstance(content, list) else content or ""


def _inline_block(text: str) -> tuple[str, str] | None:
    """Reasoning and rest of a text that begins with a think block; None where it does not."""
    text = text.lstrip()
    if not text.startswith(OPEN):
        return None
    reasoning, closing, rest = text[len(OPEN) :].partition(CLOSE)
    return (reasoning.strip("\n"), rest.lstrip("\n")) if closing else None


def check(messages: Any) -> list[Message]:
    """The messages without None fields, taken apart, or a BadMessage that names the first culprit."""
    if not isinstance(messages, list | tuple):
        raise BadMessage(f"expected a list of messages, found {type(messages).__name__}")
    if not messages:
        raise BadMessage("the conversation has no messages; expected at least a question and an answer")
    return [take_apart(_check_message(number, message)) for number, message in enumerate(messages)]


def _check_message(number: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise BadMessage(f"expected a dict with role and content, found {type(message).__name__}", number)
    message = {key: value for key, value in message.items() if value is not None}
    for key, value in message.items():
        if words := why_unwritable(value):
            raise BadMessage(f"its {key} cannot be written: {words}", number)
    role = message.get("role")
    if role not in ROLES:
        hint = "; data with from/value is read by flexreason.data.files" if "from" in message else ""
        hint = hint or did_you_mean(role, ROLES)
        if role is None:
            keys = ", ".join(map(str, message)) or "none"
            raise BadMessage(f"it has no role; its keys are {keys}{hint or '; give it role and content'}", number)
        raise BadMessage(f"unknown role {role!r}; expected one of {', '.join(ROLES)}{hint}", number)
    called = (key for key, value in message.items() if value and _is_another_calls_key(key))
    if role == "assistant" and (other := next(called, None)):
        raise BadMessage(
            f"it has a call under {other}, which chat templates leave out; give it as tool_calls: "
            "[{'type': 'function', 'function': {'name': ..., 'arguments': ...}}], and its result with the role tool",
            number,
        )
    if isinstance(message.get("content"), list):
        message["content"] = [_text_part(number, part) for part in message["content"]]
    elif not isinstance(message.get("content", ""), str):
        found = type(message["content"]).__name__
        raise BadMessage(f"content: expected text or a list of text parts, found {found}", number)
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)  # none are not some: there are templates that ask only whether it has the key
    fields = [name for name in REASONING_FIELDS if name in message]
    for name in fields:
        if not isinstance(message[name], str):
            raise BadMessage(f"{name}: expected text, found {type(message[name]).__name__}", number)
        if role != "assistant" and message[name]:
            raise BadMessage(
                f"a {role} message has {name}; only assistant messages can have reasoning; leave it out",
                number,
            )
    inline = _inline_block(_text_of(message)) if fields else None
    block = inline[0].strip() if inline else ""
    said = {name for name in fields if message[name].strip() in ("", block)}  # nothing, or what the block says too
    if len(said) < len(fields) or inline:  # the reasoning stands elsewhere, or in a block that is empty
        message = {key: value for key, value in message.items() if key not in said}
    if "tool_calls" in message:
        if role != "assistant":
            raise BadMessage(
                f"a {role} message has tool_calls; only assistant messages can have them; leave them out",
                number,
            )
        message = {**message, "tool_calls": _checked_calls(number, message["tool_calls"])}
    elif "content" not in message:
        why = "has reasoning but no content" if fields else "has no content"
        may_be = ' (it may be "")' if fields or role != "assistant" else ""
        raise BadMessage(f"{role} message {why}; add content{may_be}, or leave the message out", number)
    return message


@lru_cache(maxsize=256)
def _is_another_calls_key(key: Any) -> bool:
    """Whether a key is function_call, the older form of tool_calls, or one of the two but for a slip."""
    return key != "tool_calls" and (key == OLDER_CALL or bool(misspelt(str(key), ("tool_calls", OLDER_CALL))))


def _text_part(number: int, part: Any) -> dict[str, Any]:
    """A part of a content, with its type: there are templates that look at nothing else."""
    if not isinstance(part, dict):
        kind = type(part).__name__
    else:
        said = {key: value for key, value in part.items() if value is not None}
        said = said if "type" in said else {"type": "text", **said}
        if said["type"] == "text" and isinstance(said.get("text"), str):
            return said
        kind = said["type"] if "text" in said or "type" in part else ", ".join(map(str, part))
    raise BadMessage(f"content: expected parts like {{'type': 'text', 'text': ...}}, found {kind!r}", number)


def _checked_calls(number: int, calls: Any) -> list[Any]:
    """The calls, each a function under its key; arguments that are an empty text are an empty object's."""
    if not isinstance(calls, list):
        raise BadMessage(f"tool_calls: expected a list, found {type(calls).__name__}", number)
    checked = []
    for at, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadMessage(f"tool_calls[{at}]: expected a function with a name, found {call!r:.200}", number)
        arguments = function.get("arguments")
        if not arguments and (key := _elsewhere(call, function)):
            words = f"arguments stand under {key!r}, where chat templates do not look"
            raise BadMessage(f"tool_calls[{at}]: {words}; give them as arguments of its function", number)
        if isinstance(arguments, str):
            try:
                arguments = parsed(arguments)
            except BadMessage as error:
                raise BadMessage(error.text, number) from error
            except json.JSONDecodeError as error:
                words = f"arguments are no JSON: {json_words(error)}; give them as an object"
                raise BadMessage(f"tool_calls[{at}]: {words}", number) from error
            except (ValueError, RecursionError) as error:
                words = f"arguments cannot be read: {json_words(error)}; shorten it"
                raise BadMessage(f"tool_calls[{at}]: {words}", number) from error
            if words := why_unwritable(arguments):
                raise BadMessage(f"tool_calls[{at}]: arguments cannot be written: {words}", number)
        if arguments is not None and not isinstance(arguments, dict):
            kind = type(arguments).__name__
            raise BadMessage(f"tool_calls[{at}]: expected arguments as an object or its JSON, found {kind}", number)
        if no_number := number_without_json(function.get("arguments")):
            words = f"arguments have the number {no_number}, which JSON has not"
            raise BadMessage(f"tool_calls[{at}]: {words}; give it as text, or leave it out", number)
        if kind := kind_without_json(function):
            words = f"it has a value of the type {kind}, which JSON has not"
            raise BadMessage(f"tool_calls[{at}]: {words}; give it as text or a number", number)
        if function.get("arguments") == "":
            function = {**function, "arguments": "{}"}
        about = call if "function" in call else {"type": "function"}
        checked.append({**about, "function": function})
    return checked


def _elsewhere(call: dict[str, Any], function: dict[str, Any]) -> str | None:
    """The key under which a call without arguments has them nevertheless."""
    for said in (function, call):
        for key, value in said.items():
            if value and (key in AS_ARGUMENTS or misspelt(str(key), AS_ARGUMENTS[:1])):
                return key
    return None


def json_words(error: Exception) -> str:
    """What is wrong with a JSON text, and where in it: by character, since its line is no line of the file."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos + 1}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return "a number has more digits than Python reads" if "digits" in str(error) else str(error)


def is_trained(number: int, message: Message) -> bool:
    """Whether the message itself says that it is trained on: `train: false`, `loss: false` or `weight: 0` say no."""
    said = {key: message.as_dict[key] for key in TRAINING_KEYS if key in message.as_dict}
    for key, value in said.items():
        if value not in (0, 1):
            raise BadMessage(f"{key}: expected true or false, found {value!r}", number)
    if len(set(map(bool, said.values()))) > 1:
        words = " and ".join(f"{key}: {value!r}" for key, value in said.items())
        raise BadMessage(f"{words} contradict each other; leave one of them out", number)
    return all(said.values())


def untrained(message: dict[str, Any]) -> dict[str, Any]:
    """The message with `train: false`, whatever it has said of its training."""
    return {**{key: value for key, value in message.items() if key not in TRAINING_KEYS}, "train": False}
