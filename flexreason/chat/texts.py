"""What texts have in common: how far they agree, and where the values stand in a text that is another one filled in."""

import json
import re
from collections.abc import Callable, Iterator, Mapping


def common_prefix(one: str, other: str) -> str:
    return _agree(one, other, lambda text, n: text[:n])


def common_suffix(one: str, other: str) -> str:
    return _agree(one, other, lambda text, n: text[len(text) - n :])


def _agree(one: str, other: str, piece: Callable[[str, int], str]) -> str:
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if piece(one, middle) == piece(other, middle):
            low = middle
        else:
            high = middle - 1
    return piece(one, low)


def forms(value: str) -> Iterator[str]:
    """A text as templates write it: as it is, without white space at an end, or as the inside of a JSON string."""
    without_lines = value.strip("\n"), value.lstrip("\n"), value.rstrip("\n")
    plain = value, value.strip(), *without_lines, value.lstrip(), value.rstrip()
    yield from dict.fromkeys(plain)
    yield from dict.fromkeys(json.dumps(form, ensure_ascii=False)[1:-1] for form in plain)


def places_of(marked: str, values: Mapping[str, str], real: str) -> tuple[list[tuple[int, int, str]], int]:
    """Where the values stand in the real text, as (start, end, mark), as far as it is the marked one filled in; and how
    many characters of it that takes, -1 where the two are not the same at some place.

    >>> places_of("<a>MARK</a>", {"MARK": " five "}, "<a>five</a>")
    ([(3, 7, 'MARK')], 11)
    """
    marks = list(re.finditer("|".join(map(re.escape, values)) or "(?!)", marked))
    places: list[tuple[int, int, str]] = []
    at, done = 0, 0
    for n, mark in enumerate(marks):
        literal = marked[done : mark.start()]
        if not real.startswith(literal, at):
            return places, -1
        at, done = at + len(literal), mark.end()
        follows = marked[done : marks[n + 1].start() if n + 1 < len(marks) else len(marked)]
        form = next((form for form in forms(values[mark.group()]) if real.startswith(form + follows, at)), None)
        if form is None:
            return places, -1
        places.append((at, at + len(form), mark.group()))
        at += len(form)
    rest = marked[done:]
    return places, at + len(rest) if real.startswith(rest, at) else -1
