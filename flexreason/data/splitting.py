"""A tree that is longer than a row, as several trees that are not: every target once, with its whole history.

Nothing is cut off. Samples are dealt out to parts, and a part stores the tokens that its samples see. So tokens that
samples in different parts share are stored, and computed, once in each part. Samples go together so that these are as
few as can be: up to `EXACTLY` samples every way is tried; above that, neighbours in storage stay together, since they
share most tokens, and the best cuts between them are taken.

>>> import flexreason as fr
>>> layout = fr.lay_out_turns([([1, 2], [10, 11], [20]), ([3], [12], [21]), ([4], [13, 14], [22])])
>>> parts = split(layout, 8)
>>> [len(part) for part in parts.parts], parts.turns, parts.recomputed
([8, 7], [[2], [0, 1]], 4)

Shapes: S tokens, T targets, N samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from torch import Tensor

from flexreason.tree.layout import PER_TARGET, Layout

EXACTLY = 10
"""Samples up to which every way is tried: 3 ** 10 steps."""

TOO_LONG = ("refuse", "drop")


@dataclass(frozen=True)
class Split:
    """The parts of a layout, and which of its samples each part has."""

    parts: list[Layout]
    turns: list[list[int]]  # of the whole, in the order in which the part counts them
    recomputed: int  # tokens that stand in more than one part, counted once for each but the first
    dropped: list[int]  # turns left out, each longer than a row by itself, where that was asked for


def split(layout: Layout, length: int, *, too_long: str = "refuse") -> Split:
    """Split a layout into parts of at most `length` tokens.

    A sample that is longer by itself is refused, or with `too_long="drop"` left out.

    >>> import flexreason as fr
    >>> layout = fr.lay_out_turns([([1, 2], [10, 11], [20]), ([3], [12], [21]), ([4], [13, 14], [22])])
    >>> split(layout, 8).turns
    [[2], [0, 1]]
    """
    if too_long not in TOO_LONG:
        raise ValueError(f"split: too_long: expected one of {', '.join(map(repr, TOO_LONG))}, found {too_long!r}")
    if len(layout) <= length:
        return Split([layout], [list(range(layout.n_samples))], 0, [])
    last, sizes, shared = in_storage(layout)
    dropped = sorted(turn for turn, size in zip(last, sizes, strict=True) if size > length)
    if dropped and too_long == "refuse":
        longest = max(sizes)
        raise ValueError(
            f"split: {len(dropped)} of {len(last)} samples are longer than a row of {length} by themselves (turns "
            f"{', '.join(map(str, dropped[:5]))}{', ...' if len(dropped) > 5 else ''}; the longest has {longest} "
            f'tokens); use a row of {longest} or more, or too_long="drop" to leave them out'
        )
    kept = [number for number, turn in enumerate(last) if turn not in set(dropped)]
    together = _Together([sizes[k] for k in kept], [_least(shared, a, b) for a, b in pairwise(kept)])
    groups = [[list(last)[kept[k]] for k in group] for group in _deal(together, length)]
    groups = [sorted(group) for group in groups]
    parts = [_part(layout, group, last) for group in groups]
    whole = int(seen_from(layout, [last[turn] for group in groups for turn in group]).sum()) if groups else 0
    return Split(parts, groups, sum(map(len, parts)) - whole, dropped)


def in_storage(layout: Layout) -> tuple[dict[int, int], list[int], list[int]]:
    """The samples in storage order: {turn: its last token that predicts}; the tokens that each needs; and the tokens
    that each shares with the next."""
    by_turn: dict[int, int] = {}
    for source, turn in zip(layout.target_source.tolist(), layout.target_turn.tolist(), strict=True):
        by_turn[turn] = max(by_turn.get(turn, 0), source)
    last = dict(sorted(by_turn.items(), key=lambda item: item[1]))
    at = list(last.values())
    sizes = [int(layout.position_ids[i]) + 1 for i in at]
    shared = [int((layout.until[: a + 1] > b).sum()) for a, b in pairwise(at)]
    return last, sizes, shared


def _least(shared: Sequence[int], a: int, b: int) -> int:
    """Tokens that samples a and b share, in storage order: as many as the neighbours between them do."""
    return min(shared[a:b])


class _Together:
    """Tokens of several samples stored together: their own, less what each shares with the one before."""

    def __init__(self, sizes: list[int], shared: list[int]) -> None:
        self.sizes, self.shared = sizes, shared

    def __len__(self) -> int:
        return len(self.sizes)

    def joined(self, tokens: int, before: int | None, number: int) -> int:
        """Tokens, when a sample joins a part whose last sample is `before`."""
        common = 0 if before is None else _least(self.shared, before, number)
        return tokens + self.sizes[number] - common


def _deal(together: _Together, length: int) -> list[list[int]]:
    """Groups of samples, each of at most `length` tokens, with the fewest tokens in all."""
    if not len(together):
        return []
    return _every_way(together, length) if len(together) <= EXACTLY else _neighbours(together, length)


def _every_way(together: _Together, length: int) -> list[list[int]]:
    """The best of all ways. Sets of samples are numbers here: bit k stands for sample k."""
    n = len(together)
    tokens = [0] * 2**n
    for group in range(1, 2**n):
        number = group.bit_length() - 1
        rest = group & ~(1 << number)
        tokens[group] = together.joined(tokens[rest], rest.bit_length() - 1 if rest else None, number)
    best: list[tuple[int, int]] = [(0, 0)] * 2**n  # (tokens, the group that the lowest sample is in)
    for some in range(1, 2**n):
        lowest, least = some & -some, None
        others = some & ~lowest
        choice = others
        while True:
            group = choice | lowest
            if tokens[group] <= length:
                cost = tokens[group] + best[some & ~group][0]
                if least is None or cost < least[0]:
                    least = (cost, group)
            if not choice:
                break
            choice = (choice - 1) & others
        assert least is not None  # a sample alone fits
        best[some] = least
    groups, some = [], 2**n - 1
    while some:
        group = best[some][1]
        groups.append([k for k in range(n) if group >> k & 1])
        some &= ~group
    return groups


def _neighbours(together: _Together, length: int) -> list[list[int]]:
    """The best cuts between neighbours, and then groups joined wherever two fit into one row."""
    best: list[tuple[int, int]] = [(0, 0)]  # for the first k samples: (tokens, where the last group begins)
    for stop in range(1, len(together) + 1):
        tokens, least = 0, None
        for start in range(stop - 1, -1, -1):
            after = None if start == stop - 1 else start + 1
            tokens = together.sizes[start] if after is None else tokens + together.sizes[start] - together.shared[start]
            if tokens > length:
                break
            cost = best[start][0] + tokens
            if least is None or cost < least[0]:
                least = (cost, start)
        assert least is not None
        best.append(least)
    groups, stop = [], len(together)
    while stop:
        start = best[stop][1]
        groups.append(list(range(start, stop)))
        stop = start
    return _joined(together, groups[::-1], length)


def _joined(together: _Together, groups: list[list[int]], length: int) -> list[list[int]]:
    """Groups joined two by two, those first that save most tokens, until no two fit into one row."""

    def size(group: list[int]) -> int:
        tokens, before = 0, None
        for number in sorted(group):
            tokens, before = together.joined(tokens, before, number), number
        return tokens

    def gain(pair: tuple[int, int]) -> int:
        a, b = (groups[k] for k in pair)
        return size(a) + size(b) - size(a + b)

    while True:
        pairs = [(a, b) for b in range(len(groups)) for a in range(b) if size(groups[a] + groups[b]) <= length]
        if not pairs:
            return [sorted(group) for group in groups]
        a, b = max(pairs, key=gain)
        groups[a] = groups[a] + groups.pop(b)


def seen_from(layout: Layout, at: Sequence[int]) -> Tensor:
    """bool [S]: the tokens that these see."""
    needed = torch.zeros(len(layout), dtype=torch.bool, device=layout.device)
    for index in at:
        needed[: index + 1] |= layout.until[: index + 1] > index
    return needed


def _part(layout: Layout, turns: list[int], last: dict[int, int]) -> Layout:
    """The layout of some turns: the tokens they see, in the same order, which is a preorder still."""
    kept = seen_from(layout, [last[turn] for turn in turns])
    index = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.cumsum(0)])  # of each token in the part
    number = torch.full((layout.n_samples,), -1, dtype=torch.int64, device=layout.device)
    number[turns] = torch.arange(len(turns), device=layout.device)
    targets = number[layout.target_turn] >= 0
    tensors = {f.name: getattr(layout, f.name) for f in fields(layout)}
    tensors = {name: x[targets if name in PER_TARGET else kept] for name, x in tensors.items()}
    tensors["until"] = index[tensors["until"].long()].to(torch.int32)
    tensors["target_source"] = index[tensors["target_source"]]
    tensors["target_turn"] = number[tensors["target_turn"]]
    return Layout(**tensors)
