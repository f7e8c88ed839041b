"""A message with marks in the places of its texts, so that a rendering shows where each of them comes out.

A mark is a text that stands nowhere else. The *base* is what all marks of one message begin with; behind it follows the
name of a *slot*: r for reasoning, c for content, n0, n1 ... for the names of called functions, v0, v1 ... for their
arguments.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from flexreason.chat.arguments import marked_arguments
from flexreason.chat.messages import Message
from flexreason.chat.probes import MARK
from flexreason.chat.texts import forms, places_of

QUOTES = "\"'\\"
"""What templates write around an argument that is text, and leave out around a number."""


@dataclass
class Marked:
    """A message with marks in its slots, in the order r, c, n0, n1 ...; `wanted` are those that must come out."""

    message: dict[str, Any]
    marks: dict[str, str]
    wanted: list[str]


def new_base(texts: Iterable[str]) -> str:
    """A base that none of these texts holds."""
    texts = list(texts)
    bases = (MARK.format(f"s{n}") for n in range(10**6))
    return next(base for base in bases if not any(base in text for text in texts))


def mark(message: Message, base: str, names: bool = True, arguments: bool = True) -> Marked:
    """Put marks for a message's texts. A content that is empty is marked, but need not come out.

    Without `names`, the called functions keep theirs; without `arguments`, they keep these.
    """
    marks, wanted = {}, []
    functions = message.functions if names or arguments else []
    if message.reasoning.strip():
        marks["r"] = base + "r"
        wanted.append("r")
    if message.response or not message.functions or not (marks or functions):
        marks["c"] = base + "c"
        wanted += ["c"] if message.response.strip() else []
    marked = message.with_texts(marks.get("r"), marks.get("c"))
    named = []
    for n, function in enumerate(functions):
        named.append(function)
        if names:
            marks[f"n{n}"] = f"{base}n{n}x"
            wanted.append(f"n{n}")
            named[-1] = {**function, "name": marks[f"n{n}"]}
        if arguments and "arguments" in function:
            named[-1] = {**named[-1], "arguments": marked_arguments(function["arguments"], f"{base}v{n}x")}
    for n, function in enumerate(functions):
        if arguments and _has_arguments(function):
            marks[f"v{n}"] = f"{base}v{n}x"
            wanted.append(f"v{n}")
    return Marked((marked.with_functions(named) if functions else marked).as_dict, marks, wanted)


def _has_arguments(function: dict[str, Any]) -> bool:
    arguments = function.get("arguments")
    return bool(json.loads(arguments or "{}") if isinstance(arguments, str) else arguments)


def stands_for(marked: Marked, shown: str, texts: dict[str, str], whole: str) -> bool:
    """Whether the real rendering is the marked one with the texts in place of the marks.

    Arguments of tool calls need not be texts. So in a message with calls, only what stands before the first call is
    compared, and behind it the texts are looked for.

    Args:
        shown: The rendering of the marked message.
        texts: The texts of the slots r and c.
        whole: The rendering of the message itself.
    """
    if not marked.wanted:
        return bool(marked.marks)  # nothing of it need come out
    values = {mark: texts[slot] for slot, mark in marked.marks.items() if slot in texts}
    calls = [at for slot, mark in marked.marks.items() if slot not in texts and (at := shown.find(mark)) >= 0]
    if not calls:
        return places_of(shown, values, whole)[1] == len(whole)
    begins = places_of(shown[: min(calls)].rstrip(QUOTES), values, whole)[1]
    behind = [text for mark, text in values.items() if mark in shown[min(calls) :]]
    return begins >= 0 and all(any(form in whole[begins:] for form in forms(text)) for text in behind)


def texts_between_marks(base: str, shown: str) -> dict[str, str]:
    """Where a text stands between two marks of its slot, b before it and e behind it: the texts, by slot's mark."""
    return {pair.group(1): pair.group(2) for pair in _pairs(base).finditer(shown)}


def joined(base: str, shown: str) -> str:
    """A rendering in which each pair of marks, with the text between them, is written as one mark."""
    return _pairs(base).sub(r"\1", shown)


def _pairs(base: str) -> re.Pattern[str]:
    return re.compile(f"({base}[rc])b(.*?)\\1e", re.DOTALL)
