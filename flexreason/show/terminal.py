"""A conversation in a terminal: by turn, with what each part is in the margin, so that nothing is said by colour alone.

    turn 1 ─ message 3: 24 tokens, 19 of them as in turn 0 -> 16 trained ──────
        shared │ <user>2+3?<end><bot>
        prompt │ <user>Twice?<end><bot>
     reasoning ▌ <think>5+5</think>
      response ▌ 10<end>

`▌` marks what is trained, `↵` a line break in the text. What is shared with the sample before is dimmed, and its middle
is left out where it is long; everything else stands whole.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

from flexreason.show.notes import RefusedScene
from flexreason.show.scene import KINDS, Part, Scene, Turn
from flexreason.show.texts import printable, width_of

COLOURS = {
    "prompt": "36",
    "reasoning": "35",
    "response": "32",
    "refused": "31",
    "added": "4",
    "dim": "2",
    "strong": "1",
}

LETTERS = {"prompt": "p", "reasoning": "t", "response": "r"}
"""What stands in a margin that has no room for words; t as in the paper."""

NARROW = 56
"""Columns below which the margin is a letter."""

SHARED = 4
"""Lines that a shared part may have before its middle is left out."""

MOST_TURNS, FIRST, LAST = 12, 6, 2
"""Of a conversation with more turns than that, so many of the first and of the last are shown."""

MOST_LINES = 400
"""Lines of a part, beyond which its middle is left out unless everything is asked for."""

BREAK, BAR, MARK = "↵", "│", "▌"


def wants_colour() -> bool:
    """Whether stdout is a terminal that shows colours; NO_COLOR and FORCE_COLOR say otherwise."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


@dataclass(frozen=True)
class Span:
    """A text in one style."""

    text: str
    style: str = ""


class Terminal:
    """Draws for a terminal of a width, with or without colour."""

    def __init__(self, width: int, colour: bool = False, *, everything: bool = False) -> None:
        self.width, self.colour, self.everything = max(width, 20), colour, everything
        self.label = 10 if width >= NARROW else 1
        self.room = self.width - self.label - 3

    def painted(self, text: str, *names: str) -> str:
        codes = ";".join(COLOURS[name] for name in names if name)
        return f"\x1b[{codes}m{text}\x1b[0m" if self.colour and codes and text else text

    # --- a conversation

    def legend(self) -> str:
        """What colours and marks say, in a line if there is room."""
        shared = "dim: as in the turn before" if self.colour else "=: as in the turn before"
        letters = "" if self.label > 1 else "p t r: "
        names = [f"{letters}{' '.join(KINDS)}", f"{MARK} trained", f"{BREAK} line break", shared]
        between = "  " if sum(map(len, names)) + 6 <= self.width else "\n"
        kinds = letters + " ".join(self.painted(kind, kind) for kind in KINDS)
        return between.join([kinds, *names[1:3], self.painted(shared, "dim")])

    def draw(self, scene: Scene, only: Sequence[int] | None = None) -> Iterator[str]:
        """Lines of a conversation, or of some of its turns."""
        yield self.painted(printable(scene.where or "A conversation"), "strong")
        yield from self._folded_words(scene.sizes, "dim")
        for remark in scene.remarks:
            words = f"{remark.where}: {remark.words}" if remark.where else remark.words
            yield from self._folded_words(f"! {printable(words)}", "refused")
        chosen = self._chosen(len(scene.turns)) if only is None else list(only)
        before = -1
        for number in chosen:
            if number > before + 1 and only is None:
                yield ""
                yield from self._left_out(scene, range(before + 1, number))
            yield ""
            yield from self.draw_turn(scene, scene.turns[number])
            before = number

    def _chosen(self, n: int) -> list[int]:
        if n <= MOST_TURNS or self.everything:
            return list(range(n))
        return [*range(FIRST), *range(n - LAST, n)]

    def _left_out(self, scene: Scene, numbers: range) -> Iterator[str]:
        turns = [scene.turns[number] for number in numbers]
        new = sum(len(turn.trained) - turn.n_shared for turn in turns)
        trained = sum(turn.n_trained for turn in turns)
        without = sum(not any(p.trained and p.kind == "reasoning" for p in turn.parts) for turn in turns)
        words = (
            f"… turns {numbers[0]} to {numbers[-1]} are left out: {len(turns)} turns with {new:,} tokens of their own, "
            f"{trained:,} of them trained; {without or 'none'} of them without reasoning. --turn {numbers[0]}-"
            f"{numbers[-1]} shows them, --all everything, --html FILE all on one page."
        )
        yield from self._folded_words(words, "dim")

    def _folded_words(self, words: str, *names: str) -> Iterator[str]:
        return (self.painted(line, *names) for line in _words(words, self.width))

    def draw_turn(self, scene: Scene, turn: Turn) -> Iterator[str]:
        """Lines of a turn: its heading, and its parts."""
        message = f" · message {scene.messages[turn.number]}" if len(scene.messages) else ""
        shared = f", {turn.n_shared:,} as in turn {turn.number - 1}" if turn.n_shared else ""
        head = f"turn {turn.number}{message}: {turn.n_prompt:,} tokens{shared} -> {turn.n_trained:,} trained "
        lines = list(_words(head.strip(), self.width))
        lines[-1] += " " + "─" * (self.width - width_of(lines[-1]) - 1)
        yield from (self.painted(line, "strong") for line in lines)
        for remark in scene.remarks_of(turn.number):
            yield from self._folded_words(f"! {printable(remark.words)}", "refused")
        shared_parts = [part for part in turn.parts if part.shared]
        yield from self._shared(scene, turn, shared_parts)
        for part in turn.parts[len(shared_parts) :]:
            lines = self._margin(part, self._lines(self._spans(scene, turn, part)))
            ways = "--all or --html FILE shows them"
            yield from lines if self.everything else self._middle_out(lines, MOST_LINES, ways)

    def _shared(self, scene: Scene, turn: Turn, parts: list[Part]) -> Iterator[str]:
        """What is shared with the turn before: its beginning and its end. No more than can be seen is even read."""

        def drawn(start: int, end: int) -> list[str]:
            clipped = [replace(p, start=max(p.start, start), end=min(p.end, end)) for p in parts]
            some = (part for part in clipped if part.start < part.end)
            return [line for part in some for line in self._margin(part, self._lines(self._spans(scene, turn, part)))]

        n, ends = turn.n_shared, 2 * self.room
        before = f"as in turn {turn.number - 1}"
        if self.everything:
            yield from drawn(0, n)
        elif n <= 4 * ends:
            yield from self._middle_out(drawn(0, n), SHARED, before, head=1)
        else:
            middle = self._aside(f"… of {n:,} tokens {before} …")
            yield from [*drawn(0, ends)[:1], *middle, *drawn(n - ends, n)[2 - SHARED :]]

    def _middle_out(self, lines: list[str], most: int, words: str, head: int | None = None) -> list[str]:
        if len(lines) <= most:
            return lines
        head = most // 2 if head is None else head
        tail = most - head - 1
        left_out = self._aside(f"… {len(lines) - head - tail:,} lines left out, {words} …")
        return [*lines[:head], *left_out, *lines[len(lines) - tail :]]

    def _aside(self, words: str) -> list[str]:
        return [self.painted(" " * (self.label + 3) + line, "dim") for line in _words(words, self.room)]

    def _spans(self, scene: Scene, turn: Turn, part: Part) -> Iterator[Span]:
        style = "dim" if part.shared else part.kind
        indices = scene.path(turn.number)[part.start : part.end].tolist()
        for index, piece in zip(indices, scene.pieces(turn.number, part), strict=True):
            yield Span(printable(piece).replace("\t", "    "), f"{style} added" if scene.is_added(index) else style)

    def _margin(self, part: Part, lines: Sequence[str]) -> list[str]:
        """Lines with what their part is in front."""
        label = ("=" if part.shared and not self.colour else "") + part.kind
        label = (LETTERS[part.kind] if label == part.kind else "=") if self.label == 1 else label
        return self._labelled(label, lines, MARK if part.trained else BAR, "dim" if part.shared else part.kind)

    def _labelled(self, label: str, lines: Sequence[str], bar: str = BAR, style: str = "") -> list[str]:
        """Lines behind a bar; the label stands in front of the first."""
        margins = [f"{name:>{self.label}}" for name in (label, *[""] * (len(lines) - 1))]
        bar = self.painted(bar, style)
        return [f"{self.painted(margin, style)} {bar} {line}" for margin, line in zip(margins, lines, strict=True)]

    # --- lines

    def _lines(self, spans: Iterable[Span]) -> list[str]:
        """Spans broken into lines of the room beside the margin, between words where that is possible."""
        spans = list(spans)
        text = "".join(span.text for span in spans)
        style = [span.style for span in spans for _ in span.text]  # of each character
        lines = []
        for start, end, is_broken in _broken(text, self.room - 1):
            same = (list(group) for _, group in groupby(range(start, end), style.__getitem__))
            line = "".join(self.painted(text[g[0] : g[-1] + 1], *style[g[0]].split()) for g in same)
            lines.append(line + (self.painted(BREAK, "dim") if is_broken else ""))
        return lines

    # --- what is refused

    def draw_refused(self, scene: RefusedScene) -> Iterator[str]:
        """A conversation that is refused: its messages, and the reason at the one that it is about."""
        yield self.painted(printable(scene.where), "strong")
        refusal = [f"refused, {scene.reason}: {scene.words}"]
        for message in scene.messages:
            lines = self._lines(iter([Span(printable(message.text))]))
            blamed = message.number == scene.message
            shown = lines if self.everything else self._middle_out(lines, 12 if blamed else 3, "--all shows them")
            label = f"{message.number} {message.role}"[: self.label] if self.label > 1 else message.role[:1]
            yield from self._labelled(label, shown)
            if blamed:
                yield from self._refusal(refusal.pop())
        for words in refusal:
            yield from self._refusal(words)

    def _refusal(self, words: str) -> Iterator[str]:
        lines = self._labelled("✗", list(_words(printable(words), self.room)))
        return (self.painted(line, "refused") for line in lines)


def _broken(text: str, room: int) -> Iterator[tuple[int, int, bool]]:
    """Where the lines of a text begin and end, and whether a line break stands behind; at least one."""
    at, lines = 0, text.split("\n")
    for number, line in enumerate(lines):
        if line or not number or number < len(lines) - 1:
            edges = [0, *dict.fromkeys([*_cuts(line, room), len(line)])]
            for start, end in pairwise(edges):
                yield at + start, at + end, end == len(line) and number < len(lines) - 1
        at += len(line) + 1


def _cuts(line: str, room: int) -> Iterator[int]:
    """Where a line is cut so that its parts fit: behind a space, or where as much as fits ends."""
    at = 0
    while width_of(line[at:]) > room:
        fits, columns = at, 0
        while columns + width_of(line[fits]) <= room or fits == at:
            columns += width_of(line[fits])
            fits += 1
        at = line.rfind(" ", at, fits) + 1 or fits
        yield at


def _words(words: str, width: int) -> Iterator[str]:
    """A sentence broken between words."""
    line = ""
    for word in words.split(" "):
        if line and width_of(line) + 1 + width_of(word) > width:
            yield line
            line = word
        else:
            line = f"{line} {word}" if line else word
    yield line
