"""Masks as pictures: a square for each pair of tokens of which one sees the other, in the colour of what is seen.

The SVG is light on light pages and dark on dark ones. A PNG is drawn from the same shapes.

Shapes: S tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from torch import Tensor

from flexreason.show.texts import printable, width_of
from flexreason.tree.layout import Layout
from flexreason.tree.mask import dense_mask
from flexreason.tree.sample import Role

CELL, GAP = 8, 1
"""Of a square, in pixels: from one to the next, and what is left free of it."""

MOST = 160
"""Tokens of a picture in which squares can be told apart."""

LIGHT = {
    "prompt": "#3a5a94", "reasoning": "#c98a2b", "context": "#7fbfa8", "response": "#0c7257",
    "ground": "#f1eee8", "ink": "#24221f", "soft": "#6f6b64", "line": "#d9d4ca", "paper": "#ffffff",
}  # fmt: skip
DARK = {
    "prompt": "#86a5e3", "reasoning": "#e6b566", "context": "#3f8a70", "response": "#74d3af",
    "ground": "#1f2229", "ink": "#e8e5df", "soft": "#9d998f", "line": "#353943", "paper": "#15161a",
}  # fmt: skip

NAMES = {Role.PROMPT: "prompt", Role.REASONING: "reasoning", Role.CONTEXT: "context", Role.RESPONSE: "response"}


@dataclass(frozen=True)
class Square:
    x: float
    y: float
    width: float
    height: float
    colour: str


@dataclass(frozen=True)
class Label:
    x: float
    y: float
    text: str
    colour: str = "soft"
    anchor: str = "start"
    size: float = 8
    is_strong: bool = False


@dataclass
class Picture:
    """Shapes on a sheet; later ones lie above."""

    width: float
    height: float
    title: str
    squares: list[Square] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)

    def add_mask(self, mask: Tensor, colours: Sequence[str], x: float, y: float, cell: int = CELL) -> None:
        """The mask [S, S], each column in the colour of its token, with its upper left corner at (x, y)."""
        side = len(mask) * cell
        self.squares.append(Square(x, y, side, side, "ground"))
        for q, kv in mask.nonzero().tolist():
            self.squares.append(Square(x + kv * cell, y + q * cell, cell - GAP, cell - GAP, colours[kv]))

    def svg(self) -> str:
        """As SVG, the squares of one colour and size in one path."""
        rules = [_rules(LIGHT), f"@media (prefers-color-scheme: dark) {{ {_rules(DARK)} }}"]
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} {self.height:g}" '
            f'width="{self.width:g}" height="{self.height:g}" role="img">',
            f"<title>{escape(printable(self.title))}</title>",
            f"<style>{' '.join(rules)} text {{ font-family: system-ui, sans-serif }}</style>",
        ]
        lines.append('<rect class="paper" width="100%" height="100%" rx="6"/>')
        paths: dict[str, list[str]] = {"ground": []}  # grounds lie below everything
        for s in self.squares:
            path = f"M{s.x:g} {s.y:g}h{s.width:g}v{s.height:g}h-{s.width:g}z"
            paths.setdefault(s.colour, []).append(path)
        lines += [f'<path class="{colour}" d="{"".join(d)}"/>' for colour, d in paths.items() if d]
        for label in self.labels:
            strong = ' font-weight="600"' if label.is_strong else ""
            lines.append(
                f'<text class="{label.colour}" x="{label.x:g}" y="{label.y:g}" font-size="{label.size:g}" '
                f'text-anchor="{label.anchor}"{strong}>{escape(printable(label.text))}</text>'
            )
        return "\n".join([*lines, "</svg>", ""])

    def write_svg(self, path: Path) -> None:
        path.write_text(self.svg(), encoding="utf-8")

    def write_png(self, path: Path) -> None:
        """The same, drawn by matplotlib."""
        try:
            from matplotlib.figure import Figure
            from matplotlib.patches import Rectangle
        except ImportError as error:
            words = "matplotlib is not installed: pip install 'flexreason[plot]'; --svg needs none"
            raise ValueError(f"--png: {words}") from error
        figure = Figure(figsize=(self.width / 100, self.height / 100), facecolor=LIGHT["paper"])
        axes: Any = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, self.width), ylim=(self.height, 0))
        axes.axis("off")
        for s in self.squares:
            axes.add_patch(Rectangle((s.x, s.y), s.width, s.height, color=LIGHT[s.colour], linewidth=0))
        anchors = {"start": "left", "middle": "center", "end": "right"}
        for label in self.labels:
            axes.text(
                label.x, label.y, label.text.replace("$", r"\$"), color=LIGHT[label.colour], fontsize=label.size * 0.72,
                ha=anchors[label.anchor], va="baseline", weight="semibold" if label.is_strong else "normal",
            )  # fmt: skip
        figure.savefig(path, dpi=200, format="png")


def _rules(colours: dict[str, str]) -> str:
    return " ".join(f".{name} {{ fill: {value} }}" for name, value in colours.items())


def colours_of(layout: Layout) -> list[str]:
    """[S] The name of each token's colour; a response that is context too counts as generated."""
    flags = (Role.REASONING, Role.RESPONSE, Role.CONTEXT, Role.PROMPT)
    return [next(NAMES[flag] for flag in flags if role & flag) for role in layout.role.tolist()]


def layout_picture(layout: Layout, texts: Sequence[str]) -> Picture:
    """The mask of a small layout, with the text of each token."""
    n = len(layout)
    if n > MOST:
        raise ValueError(
            f"a picture of {n:,} tokens would show no cell: at most {MOST} fit; use --html FILE, which shows masks of "
            "any size, or --mask, which folds one for a terminal"
        )
    words = [printable(text).replace("\n", "↵") or "·" for text in texts]
    left = 24 + 5.2 * max(width_of(word) for word in words)
    picture = Picture(
        left + n * CELL + 16, n * CELL + 56, "Who sees whom: a row is a token that sees, a column one seen"
    )
    colours = colours_of(layout)
    picture.add_mask(dense_mask(layout), colours, left, 16)
    for at, word in enumerate(words):
        picture.labels.append(Label(left - 6, 16 + at * CELL + 6.5, word, colours[at], "end", 7.5))
    add_legend(picture, left, picture.height - 16)
    return picture


def add_legend(picture: Picture, x: float, y: float) -> None:
    """What the colours mean, in a line."""
    texts = {"prompt": "prompt", "reasoning": "reasoning", "context": "response, as later turns see it"}
    for colour, text in {**texts, "response": "response, as it is generated"}.items():
        picture.squares.append(Square(x, y - 7, 8, 8, colour))
        picture.labels.append(Label(x + 12, y, text, size=9))
        x += 26 + 4.7 * len(text)
    picture.width = max(picture.width, x)
