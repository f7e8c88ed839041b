"""Arguments of tool calls: objects, or their JSON.

A template that takes objects only writes what Python has read of the JSON. That is mostly the same. A number with more
digits than a float holds, and a key that stands twice, would come out as something else, so these are refused.

>>> in_form('{"n": 1.50}', "object"), in_form({"n": 1.5}, "string")
({'n': 1.5}, '{"n": 1.5}')
>>> in_form('{"n": 0.30000000000000000001}', "object")
Traceback (most recent call last):
flexreason.chat.errors.BadMessage: arguments: 0.30000000000000000001 is 0.3 in an object, which is what this chat \
template takes; give fewer digits, or a text
"""

import json
import math
from decimal import Decimal, InvalidOperation
from typing import Any

from flexreason.chat.errors import BadMessage


def parsed(text: str) -> Any:
    """What the JSON of arguments says. An empty text says that there are none."""

    def no_json(name: str) -> None:  # which Python reads all the same
        raise BadMessage(f"arguments have the number {name}, which JSON has not; give it as text, or leave it out")

    return json.loads(text or "{}", parse_constant=no_json)


def in_form(arguments: Any, form: str) -> Any:
    """Arguments as an "object" or as a "string"."""
    if form == "object" and isinstance(arguments, str):
        return json.loads(arguments or "{}", parse_float=_same_float, object_pairs_hook=_with_each_key_once)
    if form == "string" and isinstance(arguments, dict):
        return json.dumps(arguments, ensure_ascii=False)
    return arguments


def marked_arguments(arguments: Any, mark: str) -> Any:
    """Arguments of the same form and keys whose every value is the mark."""
    if isinstance(arguments, str):
        return json.dumps(marked_arguments(parsed(arguments), mark))
    return dict.fromkeys(arguments, mark) if isinstance(arguments, dict) else arguments


def _same_float(digits: str) -> float:
    """The number, or a BadMessage where it is written otherwise than by its value."""
    number = float(digits)
    try:
        if math.isfinite(number) and Decimal(digits) == Decimal(repr(number)):
            return number
    except InvalidOperation:  # an exponent beyond all bounds
        pass
    raise BadMessage(
        f"arguments: {digits[:60]} is {number!r} in an object, which is what this chat template takes; give fewer "
        "digits, or a text"
    )


def _with_each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise BadMessage(
                f"arguments: the key {key!r} stands twice in one object, of which this chat template would see the "
                "last value only; leave one out"
            )
        found[key] = value
    return found
