"""The same rule as block lists: a torch BlockMask without ever making an S x S tensor.

In preorder, the queries that see something of one block of keys are one interval of queries, and so are
those that see all of it. With mx and mn the largest and smallest `until` in key block j of size B (query
blocks of the same size), query blocks [j, ceil(mx/B)) see something of it and [j+1, floor(mn/B)) all of it.

A window cuts these intervals by position. There we walk *runs*, stretches of a block with consecutive
positions on one path: each run of queries meets the runs of keys on its path until the window ends, and
of two runs the first and last positions tell whether some or all of their pairs are visible.

Shapes: S tokens, I query blocks, J key blocks.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexreason.tree.layout import begins_stretch
from flexreason.tree.mask import MASK_KEYS, Tree, check_limits, mask_mod, per_token

BLOCK = 128

AT_ONCE = 2**20
"""Cells of an I x J table that are looked at together."""

Cells = Callable[[Tensor, Tensor], Tensor]
"""Is (query block i, key block j) in the list? Both are index tensors that broadcast."""


def block_mask(
    tree: Tree,
    *,
    block_size: int | tuple[int, int] = BLOCK,
    mask: str = "interval",
    window: int | None = None,
    chunk: int | None = None,
    device: torch.device | str | None = None,
) -> BlockMask:
    """The BlockMask of a layout or row, all eight lists, on `device` (default: the tree's own).

    `block_size`: one for queries and keys, or (queries, keys). `mask`, `window` and `chunk` as in
    `dense_mask`; under "turn_role" the lists are the same, and the paper's rule decides inside partial blocks.
    Entries of a list beyond its count are 0.

    >>> import flexreason as fr
    >>> layout = fr.lay_out_turns([([1] * 4, [2] * 4, [3] * 4), ([4] * 4, [5] * 4, [6] * 4)])
    >>> blocks = block_mask(layout, block_size=4)  # of queries, how many key blocks are seen in part and in full
    >>> blocks.kv_num_blocks.tolist(), blocks.full_kv_num_blocks.tolist()
    ([[[1, 1, 1, 1, 1, 1, 1]]], [[[0, 1, 2, 3, 4, 1, 2]]])
    """
    check_limits(mask, window, chunk)
    q_size, kv_size = (block_size, block_size) if isinstance(block_size, int) else block_size
    if min(q_size, kv_size) < 1:
        raise ValueError(f"block_size: expected at least 1, found {block_size}")
    if device is not None:
        tree = {name: per_token(tree, name).to(device)[None] for name in MASK_KEYS}
    until = per_token(tree, "until")
    if window is None and chunk is None:
        partial, full = _intervals(until, q_size, kv_size)
    else:
        partial, full = _walked(until, per_token(tree, "position_ids"), q_size, kv_size, window, chunk)

    i = torch.arange(_ceil(len(until), q_size), dtype=torch.int32, device=until.device)
    j = torch.arange(_ceil(len(until), kv_size), dtype=torch.int32, device=until.device)

    def before(first: int, last: int) -> slice:  # key blocks that query blocks first..last may see
        return slice(0, _ceil((last + 1) * q_size, kv_size))

    def behind(first: int, last: int) -> slice:  # query blocks that may see key blocks first..last
        return slice(first * kv_size // q_size, None)

    kv_num_blocks, kv_indices = _lists(partial, i, j, before)
    full_kv_num_blocks, full_kv_indices = _lists(full, i, j, before)
    q_num_blocks, q_indices = _lists(lambda j, i: partial(i, j), j, i, behind)
    full_q_num_blocks, full_q_indices = _lists(lambda j, i: full(i, j), j, i, behind)
    return BlockMask(
        seq_lengths=(len(until), len(until)),
        kv_num_blocks=kv_num_blocks,
        kv_indices=kv_indices,
        full_kv_num_blocks=full_kv_num_blocks,
        full_kv_indices=full_kv_indices,
        q_num_blocks=q_num_blocks,
        q_indices=q_indices,
        full_q_num_blocks=full_q_num_blocks,
        full_q_indices=full_q_indices,
        BLOCK_SIZE=(q_size, kv_size),
        mask_mod=mask_mod(tree, mask=mask, window=window, chunk=chunk),
    )


def _lists(cells: Cells, rows: Tensor, columns: Tensor, reach: Callable[[int, int], slice]) -> tuple[Tensor, Tensor]:
    """For each row, how many of the columns are in the list, and which, ascending: [1, 1, R] and [1, 1, R, C].

    Rows `first` to `last` have listed columns in `reach(first, last)` only.
    """
    counts = torch.zeros_like(rows)
    indices = torch.zeros(len(rows), len(columns), dtype=torch.int32, device=rows.device)
    at_once = max(1, AT_ONCE // len(columns))
    for first in range(0, len(rows), at_once):
        band = slice(first, min(first + at_once, len(rows)))
        reached = columns[reach(band.start, band.stop - 1)]
        listed = cells(rows[band, None], reached)
        counts[band] = listed.view(torch.uint8).sum(1, dtype=torch.int32)
        to_front = _to_front if listed.device.type == "cpu" else _to_front_unseen
        to_front(indices[band, : len(reached)], listed, counts[band, None], reached)
    return counts[None, None], indices[None, None]


def _to_front(row: Tensor, listed: Tensor, count: Tensor, columns: Tensor) -> None:
    """Write the listed columns to the front of each row of zeros, [R, C]."""
    ahead = torch.arange(len(columns), device=row.device) < count
    row.masked_scatter_(ahead, columns.expand_as(listed)[listed])


def _to_front_unseen(row: Tensor, listed: Tensor, count: Tensor, columns: Tensor) -> None:
    """The same on a GPU, which nobody waits for to count: what is not listed goes behind, as zeros."""
    upto = listed.cumsum(1, dtype=torch.int32)
    behind = count + torch.arange(len(columns), dtype=torch.int32, device=row.device) - upto
    row.scatter_(1, torch.where(listed, upto - 1, behind).long(), columns * listed)


def _intervals(until: Tensor, q_size: int, kv_size: int) -> tuple[Cells, Cells]:
    """The partial and the full cells, in closed form."""
    n_blocks = _ceil(len(until), kv_size)
    # Keys beyond the last token are seen by nobody.
    ends = torch.nn.functional.pad(until, (0, n_blocks * kv_size - len(until))).view(n_blocks, kv_size)
    begin = torch.arange(n_blocks, device=until.device) * kv_size
    first, stop = begin // q_size, _ceil(ends.amax(1), q_size)
    full_first, full_stop = _ceil(begin + kv_size - 1, q_size), ends.amin(1) // q_size
    first, stop, full_first, full_stop = (x.to(torch.int32) for x in (first, stop, full_first, full_stop))

    def full(i: Tensor, j: Tensor) -> Tensor:
        return (full_first[j] <= i) & (i < full_stop[j])

    def partial(i: Tensor, j: Tensor) -> Tensor:
        return (first[j] <= i) & (i < stop[j]) & ~full(i, j)

    return partial, full


def _walked(
    until: Tensor, position: Tensor, q_size: int, kv_size: int, window: int | None, chunk: int | None
) -> tuple[Cells, Cells]:
    """The partial and the full cells under a window or chunks, by walking up from every run."""
    device = until.device
    until, position = until.cpu(), position.cpu()
    n_q, n_kv = _ceil(len(until), q_size), _ceil(len(until), kv_size)
    begin, end, parent = _runs(until, position, q_size, kv_size, chunk)
    low, high = position[begin], position[end - 1]

    seen = torch.zeros(n_q * n_kv, dtype=torch.bool)
    whole = torch.zeros(n_q * n_kv, dtype=torch.int32)  # pairs of runs that are visible whole, in cells of the mask
    q = torch.arange(len(begin))
    kv = q
    while len(q):
        block = begin[q] // q_size * n_kv + begin[kv] // kv_size
        seen[block] = True
        all_visible = (q != kv) | (end[q] - begin[q] == 1)
        if window is not None:
            all_visible &= high[q] - low[kv] < window
        area = (end[q] - begin[q]) * (end[kv] - begin[kv]) * all_visible
        whole.index_add_(0, block, area.to(torch.int32))

        kv = parent[kv]
        reached = kv >= 0
        if window is not None:
            reached &= low[q] - high[kv] < window
        if chunk is not None:
            reached &= low[q] // chunk == low[kv] // chunk
        q, kv = q[reached], kv[reached]

    full_table = (whole == q_size * kv_size).view(n_q, n_kv).to(device)
    seen_table = seen.view(n_q, n_kv).to(device)
    return (lambda i, j: seen_table[i, j] & ~full_table[i, j]), (lambda i, j: full_table[i, j])


def _runs(
    until: Tensor, position: Tensor, q_size: int, kv_size: int, chunk: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Where each run begins and ends, and the run its first token's parent is in (-1: none)."""
    index = torch.arange(len(until))
    starts = begins_stretch(position, until) | (index % q_size == 0) | (index % kv_size == 0)
    if chunk is not None:
        starts |= position % chunk == 0
    begin = starts.nonzero().squeeze(1)
    end = torch.cat([begin[1:], torch.tensor([len(until)])])
    run = starts.cumsum(0) - 1

    # In preorder, a token's parent is the last token before it that is one less deep.
    keys = position * len(until) + index
    in_order, at = keys.sort()
    above = torch.searchsorted(in_order, (position[begin] - 1) * len(until) + begin) - 1
    parent = torch.where(position[begin] > 0, run[at[above.clamp(min=0)]], -1)
    return begin, end, parent


N = TypeVar("N", int, Tensor)


def _ceil(a: N, b: int) -> N:
    return (a + b - 1) // b
