"""Whether a text holds all of a message's tool calls: each name, and each value of their arguments.

Templates write calls as JSON, as XML or as Python, with keys in an order of their own. So the values are looked for,
and not the forms around them: texts without quotes, escapes and white space, all else to the last digit. Of a value
that may be written as nothing, its key is looked for.

>>> function = {"name": "search", "arguments": {"key": "two words", "n": 3, "exact": True}}
>>> lost_call([function], '<call>{"name": "search", "key": "two words", "n": 3, "exact": true}</call>')
>>> lost_call([function], "<call>search(key='two words', n=3)</call>")
"tool call's argument exact=True"
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

NOT_BARE = dict.fromkeys(map(ord, " \t\n\r\f\v\\\"'"))


def lost_call(functions: list[dict[str, Any]], text: str) -> str | None:
    """What of the calls a text lacks, in words. What stands in them several times, it must have as often."""
    bare, wanted = _bare(text), Counter[str]()
    for function in functions:
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            wanted[arguments] += 1
            arguments = {} if _count(arguments, bare) >= wanted[arguments] else json.loads(arguments or "{}")
        for key, value in [("", function["name"]), *_values(arguments or {})]:
            blank = value in (None, "", [], {}) or not _bare(str(value))
            sought = key if blank else value
            wanted[repr(sought)] += 1
            found = _count(sought, bare) if sought is value and isinstance(value, str) else _words(sought, text, blank)
            if found < wanted[repr(sought)]:
                return f"tool call's argument {key}={value!r:.60}" if key else f"tool call {value!r:.60}"
    return None


def _values(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """All values in an argument, with the keys that they stand under; a key of an inner object is a value too."""
    if isinstance(value, dict) and value:
        for inner, more in value.items():
            yield from [(inner, inner)] if key else []
            yield from _values(more, inner)
    elif isinstance(value, list) and value:
        for more in value:
            yield from _values(more, key)
    elif key:
        yield key, value


def _bare(text: str) -> str:
    return text.translate(NOT_BARE)


def _count(value: str, bare: str) -> int:
    """How often a text stands in a bare one, as it is or as JSON writes it."""
    forms = value, json.dumps(value), json.dumps(value, ensure_ascii=False)
    return max(bare.count(_bare(form)) for form in forms)


def _words(value: Any, text: str, quoted: bool) -> int:
    """How often a number, a truth value or a key stands in a text by itself, as JSON or as Python writes it; in quotes,
    where another value would be a text, only if it may be `quoted`."""
    word = "|".join(map(re.escape, {str(value), json.dumps(value)}))
    alone = "" if quoted else rf"(?!(?<=[\"'])(?:{word})\\*[\"'])"
    return len(re.findall(rf"(?<![\w-])(?<!\d\.){alone}(?:{word})(?!\w|\.\d)", text))
