"""Five turns in the order of the paper's section 3.1 beside ours: the same mask, permuted.

The paper stores a conversation turn by turn: the prompt h, the reasoning t, the response as later turns see it (r',
which the paper calls r in) and as it is generated (r, which it calls r out). Here the trunk comes first, what all later
turns see, and then the branches. Each token sees the same tokens in both; but long stretches of ours see the same, so
fewer blocks of the mask are seen in part.
"""

from itertools import groupby

import torch
from torch import Tensor

from flexreason.show.picture import CELL, Label, Picture, add_legend, colours_of
from flexreason.tree.layout import Layout, lay_out_turns
from flexreason.tree.mask import dense_mask, in_papers_order
from flexreason.tree.sample import Role

N_TURNS, H, T, R = 5, 2, 3, 2
"""Turns, and tokens of a prompt, a reasoning and a response."""

TILE = 4
"""Tokens of a block whose cells are counted."""

TITLES = ("The paper's order: turn by turn", "Ours: the trunk first, then the branches")


def paper_layout() -> Layout:
    """Five turns of equal lengths; every token is another one."""
    ids = iter(range(N_TURNS * (H + T + R)))

    def some(n: int) -> list[int]:
        return [next(ids) for _ in range(n)]

    return lay_out_turns([(some(H), some(T), some(R)) for _ in range(N_TURNS)])


def orders(layout: Layout) -> list[tuple[Tensor, Tensor]]:
    """The paper's order and ours: indices of tokens, and the mask of tokens that stand so."""
    mask = dense_mask(layout)
    return [(order, mask[order][:, order]) for order in (in_papers_order(layout), torch.arange(len(layout)))]


def tiles(mask: Tensor, side: int = TILE) -> tuple[int, int]:
    """How many square blocks of a mask are seen whole, and how many in part."""
    blocks = [square for band in mask.split(side) for square in band.split(side, dim=1)]
    whole = sum(bool(block.all()) for block in blocks)
    return whole, sum(bool(block.any()) for block in blocks) - whole


def segments(layout: Layout, order: Tensor) -> list[tuple[str, int, int]]:
    """Where each segment begins and ends in an order, and its name: h, t, r' or r, and the turn."""
    names = {Role.PROMPT: "h{}", Role.REASONING: "t{}", Role.CONTEXT: "r{}'", Role.RESPONSE: "r{}"}
    of_token = list(zip(layout.turn[order].tolist(), layout.role[order].tolist(), strict=True))
    found, at = [], 0
    for (turn, role), group in groupby(of_token):
        end = at + len(list(group))
        found.append((names[Role(role)].format(turn), at, end))
        at = end
    return found


def paper_picture() -> Picture:
    """Both masks beside each other."""
    layout = paper_layout()
    colours, side = colours_of(layout), len(layout) * CELL
    left, between, top = 44, 56, 58
    picture = Picture(left + 2 * side + between + 16, top + side + 64, "The paper's mask and ours, permuted")
    for number, (order, mask) in enumerate(orders(layout)):
        x = left + number * (side + between)
        in_order = [colours[index] for index in order.tolist()]
        picture.labels.append(Label(x, 20, TITLES[number], "ink", size=13, is_strong=True))
        whole, part = tiles(mask)
        words = f"blocks of {TILE} x {TILE}: {whole} seen whole, {part} in part, which cost a look at each cell"
        picture.labels.append(Label(x, 36, words, size=10))
        picture.add_mask(mask, in_order, x, top)
        for name, start, end in segments(layout, order):
            middle = (start + end) * CELL / 2
            picture.labels.append(Label(x - 5, top + middle + 3, name, in_order[start], "end"))
            picture.labels.append(Label(x + middle - 0.5, top - 5, name, in_order[start], "middle"))
    y = top + side + 22
    words = (
        "A line is a token, and what is coloured in it is what this token sees: the same "
        f"{int(dense_mask(layout).sum())} cells in both. h is {H} tokens long, t {T}, r {R}."
    )
    picture.labels.append(Label(left, y, words, size=10))
    add_legend(picture, left, y + 22)
    return picture


def draw_paper(width: int) -> str:
    """Both masks as text, beside each other where there is room."""
    layout = paper_layout()
    panels = []
    for title, (order, mask) in zip(TITLES, orders(layout), strict=True):
        whole, part = tiles(mask)
        names = {start: name for name, start, _ in segments(layout, order)}
        lines = [title, f"blocks of {TILE} x {TILE}: {whole} whole, {part} in part", ""]
        for at, row in enumerate(mask.tolist()):
            lines.append(f"{names.get(at, ''):>6} " + "".join("█" if cell else "·" for cell in row))
        panels.append(lines)
    columns = max(map(len, panels[0])) + 4
    if columns + max(map(len, panels[1])) > width:
        return "\n".join([*panels[0], "", *panels[1]])
    return "\n".join(f"{left:<{columns}}{right}".rstrip() for left, right in zip(*panels, strict=True))
