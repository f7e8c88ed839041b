"""Who sees whom: the rule, stated once from the tree and once in the paper's words.

Each rule is a FlexAttention `mask_mod(b, h, q, kv)` over indices in storage; `dense_mask` renders it as a
matrix of bools, `flexreason.tree.blocks` as block lists.

Shapes: S tokens; `q` and `kv` broadcast.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from flexreason.tree.layout import Layout
from flexreason.tree.sample import Role

Tree = Layout | Mapping[str, Any]
"""One document, or a row of `collate`."""

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

MASKS = ("interval", "turn_role")

MASK_KEYS = ("until", "position_ids", "turn", "role", "document")
"""What masks are made from, of every token of a row."""

MOST_POSITIONS = 2**30
"""Positions stay below this, in 32 bits with room for a sum."""


def per_token(tree: Tree, name: str) -> Tensor:
    """One per-token tensor [S] of a layout or row."""
    if isinstance(tree, Layout):
        return torch.zeros_like(tree.turn) if name == "document" else getattr(tree, name)
    if name not in tree:
        raise ValueError(f"row: expected the key {name!r} (fr.collate makes it), found {', '.join(tree)}")
    return tree[name][0]


def interval_rule(until: Tensor) -> MaskMod:
    """A token sees its ancestors and itself: in preorder, those whose subtree has not ended yet."""

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv <= q) & (q < until[kv])

    return visible


def turn_role_rule(turn: Tensor, role: Tensor, document: Tensor) -> MaskMod:
    """The paper's visibility table, for rows of `lay_out_turns` layouts, whatever order they are stored in.

    h_i sees h_j and r_j^in of the turns j < i; t_i and r_i^in also h_i; r_i^out also t_i. And every token
    sees its predecessors within its own segment.
    """

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        def q_is(roles: Role) -> Tensor:
            return (role[q] & int(roles)) != 0

        def kv_is(roles: Role) -> Tensor:
            return (role[kv] & int(roles)) != 0

        same_document = document[q] == document[kv]
        same_turn = turn[q] == turn[kv]
        history = (turn[kv] < turn[q]) & kv_is(Role.PROMPT | Role.CONTEXT)
        own_prompt = same_turn & kv_is(Role.PROMPT) & ~q_is(Role.PROMPT)
        own_reasoning = same_turn & kv_is(Role.REASONING) & q_is(Role.RESPONSE)
        own_segment = same_turn & (role[q] == role[kv]) & (kv <= q)
        padding = q_is(Role.PAD) | kv_is(Role.PAD)
        return torch.where(
            padding,
            q == kv,
            same_document & (history | own_prompt | own_reasoning | own_segment),
        )

    return visible


PAPERS_ORDER = (Role.PROMPT, Role.REASONING, Role.CONTEXT, Role.RESPONSE)
"""The segments of a turn, as the paper stores them."""


def in_papers_order(tree: Tree) -> Tensor:
    """[S] The indices of the tokens in the paper's order: h, t, r_in, r_out, turn by turn and document by document.

    For layouts of `lay_out_turns`, and rows of them. Padding stands behind all documents.

    >>> from flexreason import lay_out_turns
    >>> in_papers_order(lay_out_turns([([1], [2], [3]), ([4], [5], [6])])).tolist()
    [0, 5, 1, 6, 2, 3, 4]
    """
    turn, role, document = (per_token(tree, name).long() for name in ("turn", "role", "document"))
    segment = torch.zeros_like(role)
    for number, flag in enumerate(PAPERS_ORDER):
        segment[(role & int(flag)) != 0] = number
    document = torch.where(document < 0, document.max() + 1, document)
    keys = (document * (turn.max() + 2) + turn + 1) * len(PAPERS_ORDER) + segment
    return torch.argsort(keys, stable=True)


def near(position: Tensor, window: int | None, chunk: int | None) -> MaskMod:
    """The layer's own limits, in positions: less than `window` apart, in the same chunk of `chunk`.

    Whatever depends on one token alone is computed here, once for every token. A kernel calls the rule for every
    pair of tokens, and only compares.
    """
    behind = (
        position if window is None else position + min(window, MOST_POSITIONS)
    )  # the first position that is too far
    number = position if chunk is None else position // min(chunk, MOST_POSITIONS)

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        allowed = q == q
        if window is not None:
            allowed = allowed & (position[q] < behind[kv])
        if chunk is not None:
            allowed = allowed & (number[q] == number[kv])
        return allowed

    return visible


def mask_mod(tree: Tree, *, mask: str = "interval", window: int | None = None, chunk: int | None = None) -> MaskMod:
    """The rule for a layout or row as FlexAttention takes it, on the tree's own device.

    `mask`: "interval" (any tree) or "turn_role" (the paper's, for layouts of `lay_out_turns`). `window` and
    `chunk` narrow it as sliding-window and chunked attention do, in positions.

    >>> import flexreason as fr
    >>> layout = fr.lay_out_turns([([1, 2], [10, 11], [20]), ([3], [12], [21])])
    >>> sees = mask_mod(layout)
    >>> [int(sees(0, 0, torch.tensor(7), torch.tensor(kv))) for kv in range(len(layout))]  # reasoning 11 of turn 0
    [1, 1, 0, 0, 0, 0, 1, 1, 0]
    """
    check_limits(mask, window, chunk)
    if mask == "interval":
        rule = interval_rule(per_token(tree, "until").to(torch.int32))
    else:
        rule = turn_role_rule(*(per_token(tree, name).to(torch.int32) for name in ("turn", "role", "document")))
    if window is None and chunk is None:
        return rule
    limits = near(per_token(tree, "position_ids").to(torch.int32), window, chunk)

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return rule(b, h, q, kv) & limits(b, h, q, kv)

    return visible


def check_limits(mask: str, window: int | None, chunk: int | None) -> None:
    if mask not in MASKS:
        raise ValueError(f"mask: expected one of {', '.join(map(repr, MASKS))}, found {mask!r}")
    for name, limit in (("window", window), ("chunk", chunk)):
        if limit is not None and limit < 1:
            raise ValueError(f"{name}: expected at least 1 or None, found {limit}")


def dense_mask(tree: Tree, *, mask: str = "interval", window: int | None = None, chunk: int | None = None) -> Tensor:
    """The rule as a bool matrix [S, S], true where the row's token sees the column's.

    >>> from flexreason import lay_out, Sample
    >>> dense_mask(lay_out([Sample([1], [2]), Sample([1], [3])])).int()
    tensor([[1, 0, 0],
            [1, 1, 0],
            [1, 0, 1]], dtype=torch.int32)
    """
    rule = mask_mod(tree, mask=mask, window=window, chunk=chunk)
    until = per_token(tree, "until")
    index = torch.arange(len(until), device=until.device, dtype=torch.int32)
    nothing = index.new_zeros(())
    return rule(nothing, nothing, index[:, None], index[None, :])
