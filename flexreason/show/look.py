"""`layout.show()`, and what a notebook shows of a layout."""

import shutil
from html import escape
from pathlib import Path
from typing import Any

from flexreason.show.page import page, write
from flexreason.show.scene import Scene
from flexreason.show.terminal import Terminal, wants_colour
from flexreason.tree.layout import TOKENIZERS, Layout

FRAME_TOKENS = 20_000
"""Tokens of the largest layout that a notebook shows as a page."""


def show(layout: Layout, tokenizer: Any = None, html: str | Path | None = None) -> None:
    """Print what is trained on, or write it as a page."""
    scene = _scene(layout, tokenizer)
    if html is not None:
        write(Path(html), page([scene]))
        return
    terminal = Terminal(shutil.get_terminal_size((100, 24)).columns, wants_colour())
    print(terminal.legend())
    for line in terminal.draw(scene):
        print(line)


def as_html(layout: Layout) -> str:
    """The page in a frame, which keeps its style and script to itself."""
    if len(layout) > FRAME_TOKENS:
        return f'<p>{escape(repr(layout))}: too large for a notebook; <code>layout.show(html="layout.html")</code></p>'
    return (
        f'<iframe srcdoc="{escape(page([_scene(layout)]))}" sandbox="allow-scripts" '
        'style="width: 100%; height: 560px; border: 1px solid #8884; border-radius: 8px"></iframe>'
    )


def _scene(layout: Layout, tokenizer: Any = None) -> Scene:
    return Scene(layout, tokenizer or TOKENIZERS.get(layout), repr(layout))
