"""Finds values that cannot be written as text: numbers of thousands of digits, endless nesting, halves of characters.

Such values are made by models that repeat themselves, and by texts that were cut at a length.
"""

import math
from collections.abc import Iterator
from typing import Any

DEEPEST = 100
"""Lists and objects may lie this deep in each other. Python writes about a thousand, which callers need too."""


def why_unwritable(value: Any) -> str:
    """Why a value cannot be written as text; an empty text if it can.

    >>> why_unwritable({"n": [1, "two"]}), why_unwritable([10**5000])
    ('', 'a number has more digits than Python writes; shorten it')
    """
    for one, depth in _all_in(value):
        if depth > DEEPEST:
            return f"lists and objects lie more than {DEEPEST} deep in each other; shorten it"
        try:
            if isinstance(one, int):
                str(one)
        except ValueError:
            return "a number has more digits than Python writes; shorten it"
    return ""


def kind_without_json(value: Any) -> str:
    """The type of a value in it that JSON does not have, empty where there is none: a template would be given the name
    of the type in its place.

    >>> kind_without_json({"n": [1, None]}), kind_without_json({"n": {3}})
    ('', 'set')
    """
    plain = dict | list | tuple | str | int | float | None
    return next((type(one).__name__ for one, _ in _all_in(value) if not isinstance(one, plain)), "")


def number_without_json(value: Any) -> str:
    """A number in it that JSON cannot write, empty where there is none.

    >>> number_without_json({"n": [1, 0.5]}), number_without_json({"n": float("nan")})
    ('', 'nan')
    """
    return next((str(one) for one, _ in _all_in(value) if isinstance(one, float) and not math.isfinite(one)), "")


def half_character(text: str) -> int | None:
    """The place of the first half character in a text (an emoji that was cut), which no tokenizer takes; else None.

    >>> half_character("so \\ud83d"), half_character("so 🙂")
    (3, None)
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def has_half_character(value: Any) -> bool:
    return any(isinstance(one, str) and half_character(one) is not None for one, _ in _all_in(value))


def _all_in(value: Any) -> Iterator[tuple[Any, int]]:
    """All values in a value, keys too, with how deep each lies."""
    left = [(value, 0)]
    while left:
        one, depth = left.pop()
        yield one, depth
        if isinstance(one, dict):
            left += [(inner, depth + 1) for pair in one.items() for inner in pair]
        elif isinstance(one, list | tuple):
            left += [(inner, depth + 1) for inner in one]
