"""A layout as a table with a line a stretch: what a terminal can show of any layout, however large."""

from collections.abc import Callable

import torch

from flexreason.tree.draw import role_name
from flexreason.tree.layout import Layout, stretches


def shortened(text: str, width: int) -> str:
    """A text with its middle left out where it is longer than `width`.

    >>> shortened("What is 2 + 3, and what is it times 4?", 20)
    'What is  ... imes 4?'
    """
    if len(text) <= width:
        return text
    behind = (width - 5) // 2
    return f"{text[: width - 5 - behind]} ... {text[len(text) - behind :]}"


def folded(layout: Layout, decode: Callable[[list[int]], str], width: int = 100) -> str:
    """A layout with a line a stretch: tokens one behind the other on one path, of one turn and role."""
    text_width = max(24, width - 56)
    position, until = layout.position_ids, layout.until
    targets = torch.bincount(layout.target_source, minlength=len(layout))
    lines = [["index", "tokens", "turn", "role", "position", "until", "targets", "text"]]
    for start, end in stretches(position, until, layout.turn, layout.role):
        turn, role, n_targets = int(layout.turn[start]), role_name(int(layout.role[start])), targets[start:end].sum()
        text = shortened(decode(layout.input_ids[start:end].tolist()), text_width)
        cells = (start, end - start, turn, role, int(position[start]), int(until[start]), int(n_targets), text)
        lines.append([str(cell) for cell in cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)][:-1]
    return "\n".join("  ".join([*map(str.rjust, line, widths), line[-1]]) for line in lines)
