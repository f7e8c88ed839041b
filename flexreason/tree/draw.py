"""Layouts, masks and tables as text, to look at."""

from collections.abc import Callable, Sequence

from flexreason.tree.layout import Layout
from flexreason.tree.mask import Tree, per_token
from flexreason.tree.sample import Role

SHORT = {Role.PROMPT: "prompt", Role.REASONING: "think", Role.CONTEXT: "ctx", Role.RESPONSE: "resp", Role.PAD: "pad"}

NAME_WIDTH = 9


def draw_layout(layout: Layout, decode: Callable[[int], str] = str, *, width: int | None = None) -> str:
    """A layout as aligned rows, one column a token; `decode` turns a token id into text.

    The target under a token is what the token predicts, joined by "/" where it predicts several. Lines longer
    than `width` go on in further blocks.

    >>> from flexreason import lay_out_turns
    >>> print(draw_layout(lay_out_turns([([1], [2], [3])]), lambda token: ".htr"[token]))
    index         0     1    2
    token         h     t    r
    turn          0     0    0
    role     prompt think resp
    position      0     1    2
    until         3     3    3
    target        t     r    .
    """
    targets: list[str] = [""] * len(layout)
    for source, target in zip(layout.target_source.tolist(), layout.target_ids.tolist(), strict=True):
        targets[source] += ("/" if targets[source] else "") + decode(target)
    rows = {
        "index": [str(i) for i in range(len(layout))],
        "token": [decode(token) for token in layout.input_ids.tolist()],
        "turn": [str(turn) for turn in layout.turn.tolist()],
        "role": [role_name(role) for role in layout.role.tolist()],
        "position": [str(position) for position in layout.position_ids.tolist()],
        "until": [str(until) for until in layout.until.tolist()],
        "target": [target or "." for target in targets],
    }
    columns = [[cell.rjust(max(map(len, column))) for cell in column] for column in zip(*rows.values(), strict=True)]
    blocks: list[list[list[str]]] = [[]]
    room = 0
    for column in columns:
        room -= len(column[0]) + 1
        if room < 0 and width is not None and blocks[-1]:
            blocks.append([])
        if not blocks[-1]:
            room = (width or 0) - NAME_WIDTH - len(column[0])
        blocks[-1].append(column)
    return "\n\n".join(
        "\n".join(
            f"{name:<{NAME_WIDTH}}" + " ".join(cells)
            for name, cells in zip(rows, zip(*block, strict=True), strict=True)
        )
        for block in blocks
    )


def role_name(role: int) -> str:
    """The flags of a role in short: "prompt", "ctx+resp"."""
    return "+".join(name for flag, name in SHORT.items() if role & flag)


def draw_mask(tree: Tree, *, width: int = 64) -> str:
    """The mask of a layout or row: a line a query, "█" where it sees a key, "·" where it does not.

    Above `width` tokens one cell stands for a square of them: "█" all visible, "▒" some, "·" none. The mask itself is
    not made: the least and the largest `until` of a block of keys tell which queries see all and some of it.

    >>> from flexreason import lay_out_turns
    >>> layout = lay_out_turns([([1], [2], [3]), ([4], [5], [6])])
    >>> print(draw_mask(layout))
    █······
    ██·····
    ███····
    ████···
    █████··
    █····█·
    █····██
    >>> print(draw_mask(layout, width=4))
    ▒···
    █▒··
    ▒▒▒·
    ▒·▒█
    """
    until = per_token(tree, "until")
    side = -(-len(until) // width)
    blocks = until.split(side)
    least, largest = [int(block.min()) for block in blocks], [int(block.max()) for block in blocks]

    def cell(queries: int, keys: int) -> str:
        start, end = queries * side, min((queries + 1) * side, len(until))
        if keys > queries:
            return "·"
        if least[keys] >= end and (keys < queries or end - start == 1):
            return "█"
        return "▒" if keys == queries or largest[keys] > start else "·"

    numbers = range(len(blocks))
    return "\n".join("".join(cell(queries, keys) for keys in numbers) for queries in numbers)


def draw_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned columns.

    >>> print(draw_table([["way", "ms"], ["one pass", "12"]]))
      way        ms
      one pass   12
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        ("  " + "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip() for row in rows
    )
