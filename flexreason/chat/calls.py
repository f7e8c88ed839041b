"""Whether a text holds all of a message's tool calls: each name, and each value of their arguments.

Templates write calls as JSON, as XML or as Python, with keys in an order of their own. So the values are looked for,
and not the forms around them: texts without quotes, escapes and white space, numbers by their value. Of a value
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
from decimal import Context, Decimal
from typing import Any

ESCAPES = re.compile(r"\\+[nrtfvb]?|[\s\"']")
"""Backslashes with what they escape, white space and quotes. Templates differ in these, so they are not compared."""

NUMBER = r"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?"

EXACT = Context(prec=1000, traps=[])
"""Makes decimals of whatever looks like a number; what has an exponent beyond all bounds is none."""

SHORT = 4
"""A text of fewer characters may be a part of some other word, so it has to stand by itself."""


def lost_call(functions: list[dict[str, Any]], text: str) -> str | None:
    """What of the calls a text lacks, in words. What stands in them several times, it must have as often."""
    bare, wanted = _bare(text), Counter[str]()
    for function in functions:
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            wanted[arguments] += 1
            arguments = {} if _count(arguments, text, bare) >= wanted[arguments] else json.loads(arguments or "{}")
        for key, value in [("", function["name"]), *_values(arguments or {})]:
            if value is None or (isinstance(value, str | list | dict) and not _bare(str(value or ""))):
                found, needed = _words(key, text, quoted=True), 1
            else:
                wanted[repr(value)] += 1
                needed = wanted[repr(value)]
                is_text = isinstance(value, str)
                found = _count(value, text, bare) if is_text else _words(value, text, quoted=False)
                if found < needed and type(value) in (int, float):
                    found = _numbers(value, text)
            if found < needed:
                return f"tool call's argument {key}={value!r:.60}" if key else f"tool call {value!r:.60}"
    return None


def behind_content(functions: list[dict[str, Any]], content: str, text: str) -> str:
    """The part of a text in which its calls stand: content before them may name the same values."""
    names = [text.find(function["name"]) for function in functions[:1]]
    before = content and names and 0 <= text.find(content) <= names[0]
    return text.partition(content)[2] if before else text


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
    return ESCAPES.sub("", text)


def _count(value: str, text: str, bare: str) -> int:
    """How often a value stands in a text, bare: as it is, or as JSON or Python writes it. A short one by itself."""
    forms = value, json.dumps(value), json.dumps(value, ensure_ascii=False), repr(value)
    found = max(bare.count(_bare(form)) for form in forms)
    return _words(value, text, quoted=True) if found and len(value) < SHORT and re.fullmatch(r"\w+", value) else found


def _words(value: Any, text: str, quoted: bool) -> int:
    """How often a number, a truth value or a word stands by itself, as JSON or as Python writes it; in quotes,
    where another value would be a text, only if it may be `quoted`."""
    word = "|".join(map(re.escape, {str(value), json.dumps(value, default=str).strip('"')}))
    alone = "" if quoted else rf"(?!(?<=[\"'])(?:{word})\\*[\"'])"
    return len(re.findall(rf"(?<![\w-])(?<!\d\.){alone}(?:{word})(?!\w|\.\d)", text))


def _numbers(value: float, text: str) -> int:
    """How often a number stands in a text, not in quotes, whatever its form: 3 may be written as 3.00."""
    numbers = re.findall(rf"(?<![\w.-])(?<!\d\.)([\"']?)({NUMBER})(\\*[\"'])?(?!\w|\.\d)", text)
    values = [EXACT.create_decimal(number) for before, number, behind in numbers if not (before and behind)]
    return values.count(Decimal(repr(value)))
