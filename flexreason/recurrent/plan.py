"""A row cut into pieces for recurrent layers, and in which order and company they are computed.

State forking: a chain goes on from the state that its parent left behind. So chains are cut where others leave them,
the state is kept there, and a piece is computed from the state kept behind the one before it::

              f1      f0
    trunk     ──0──┬──1──┬──2──        the state behind 0 is kept, and so is the one behind 1
    branch 1       │     └──3──        goes on from the state behind piece 1
    branch 0       └──4──              goes on from the state behind piece 0

The pieces of a chain follow one another, and the chains of one depth need nothing of each other. So the first pieces of
all chains of a depth are one call, the second pieces are the next, and so on: a call is a batch whose rows go on from a
state each, and a depth has as many calls as the most pieces that one of its chains is cut into. Rows of a call are as
long as the longest, so a long piece is cut where the shorter ones beside it end, when what that saves of padding is
worth another call. Trunks are computed once, and nothing is computed twice.

All of this is plain integers, made once a row and used by every layer. Tokens that are padding are in no chain.

Shapes: S tokens, B rows of a call, L tokens of its longest row.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flexreason.attention.registry import TreeRow
from flexreason.tree.chains import Chain, chains
from flexreason.tree.mask import per_token

CALL = 128
"""What a call costs beside its tokens, in tokens: from timing torch's scans on CPU."""

CHUNK = 16
"""What a chunk costs beside its tokens, in tokens."""

MOST_CUTS = 64
"""Ends of pieces that are considered at a time."""

SIZES = {"cpu": range(16, 257, 4)}
"""Tokens that a chunk may have, by device: torch's scans take any number."""

KERNELS = (16, 32, 64, 128, 256)
"""The same for kernels."""


@dataclass(frozen=True)
class Piece:
    """Storage [start, stop) of a chain, and the number of the piece whose state it goes on from, or None."""

    start: int
    stop: int
    before: int | None

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Call:
    """Pieces that are computed as the rows of one batch."""

    pieces: tuple[int, ...]  # their numbers
    before: tuple[int, ...]  # the pieces whose states they go on from; none where they are the first of their documents
    kept: tuple[int, ...]  # those of its pieces whose state is asked for later
    length: int  # L
    real: Tensor | None  # bool [B, L], which places hold a token; None where all do

    def neutral(self, x: Tensor) -> Tensor:
        """[B, L, ...] with zeros in the places that hold no token."""
        return x if self.real is None else x * self.real.view(*self.real.shape, *[1] * (x.dim() - 2))

    def chunk(self, largest: int, device: torch.device) -> int:
        """Tokens a chunk of it should have, of at most `largest`, so that all is computed soonest."""
        sizes = [size for size in (*SIZES.get(device.type, KERNELS), largest) if size <= largest]
        return min(sizes, key=lambda size: (-(-self.length // size) * (size + CHUNK), -size))


@dataclass(eq=False)
class Plan:
    """A row's pieces and calls; and its chains, for what needs no states."""

    chains: list[Chain]
    pieces: list[Piece]
    calls: list[Call]
    order: Tensor  # [n] the tokens of all calls in storage, one call behind the other
    back: Tensor  # [S] where a token stands in that; behind its end for padding
    beginnings: dict[int, Any] = field(default_factory=dict)  # of chains, by how far a convolution reaches

    @property
    def sizes(self) -> list[int]:
        return [len(call.pieces) * call.length for call in self.calls]


def plan_of(tree: TreeRow) -> Plan:
    """The plan of a row on its way; made when a layer first asks."""
    if tree.plan is None:
        n_tokens = max(1, int((per_token(tree.row, "document") >= 0).sum()))  # one of padding, where there are none
        until, position = (per_token(tree.row, key)[:n_tokens].tolist() for key in ("until", "position_ids"))
        tree.plan = make_plan(chains(until, position), tree.length, tree.row["until"].device)
    return tree.plan


def make_plan(in_storage: list[Chain], length: int, device: torch.device) -> Plan:
    """The plan of a row of `length` tokens."""
    cuts: list[set[int]] = [{chain.stop} for chain in in_storage]
    levels: list[list[int]] = []  # numbers of chains by depth
    depth: list[int] = []
    for number, chain in enumerate(in_storage):
        depth.append(depth[chain.parent] + 1 if chain.parent >= 0 else 0)
        levels += [[]] if depth[number] == len(levels) else []
        levels[depth[number]].append(number)
        if chain.parent >= 0:
            cuts[chain.parent].add(chain.fork)

    pieces: list[Piece] = []
    groups: list[list[int]] = []
    behind: dict[int, int] = {}  # the piece that ends at a place of storage
    for level in levels:
        before = {n: behind[in_storage[n].fork] if in_storage[n].parent >= 0 else None for n in level}
        place = {n: in_storage[n].start for n in level}
        ahead = {n: sorted(cuts[n]) for n in level}
        while ahead:  # every chain that is not at its end is in every call
            longest = best_cuts([stops[0] - place[n] for n, stops in ahead.items()])[0]
            groups.append([])
            for n, stops in list(ahead.items()):
                stop = min(stops[0], place[n] + longest)
                groups[-1].append(len(pieces))
                pieces.append(Piece(place[n], stop, before[n]))
                behind[stop] = before[n] = len(pieces) - 1
                place[n] = stop
                if stop == stops[0]:
                    ahead[n] = stops[1:]
                if not ahead[n]:
                    del ahead[n]
    return _on_device(in_storage, pieces, groups, length, device)


def best_cuts(lengths: Sequence[int]) -> list[int]:
    """Where to cut rows that begin together so that all is computed soonest: ascending, up to the longest."""
    in_order, step = sorted(lengths), 16
    ends = _rounded(in_order, step)
    while len(ends) > MOST_CUTS:
        step *= 2
        ends = _rounded(in_order, step)
    best: list[tuple[float, int]] = [(0, 0)]  # up to each end: the cost, and which end the last call begins at
    for at, end in enumerate(ends, 1):
        best.append(
            min(
                (best[since][0] + CALL + (len(lengths) - bisect_right(in_order, start)) * (end - start), since)
                for since, start in enumerate((0, *ends[: at - 1]))
            )
        )
    cuts, at = [], len(ends)
    while at:
        cuts.append(ends[at - 1])
        at = best[at][1]
    return cuts[::-1]


def _rounded(lengths: Sequence[int], step: int) -> list[int]:
    """Ends that are worth considering: multiples of `step`, and the longest as it is."""
    return [*sorted({end for length in lengths if (end := -(-length // step) * step) < lengths[-1]}), lengths[-1]]


def _on_device(
    in_storage: list[Chain], pieces: list[Piece], groups: list[list[int]], length: int, device: torch.device
) -> Plan:
    wanted = {piece.before for piece in pieces}
    calls: list[Call] = []
    order: list[Tensor] = []
    back = torch.full((length,), -1)
    n_places = 0
    for group in groups:
        longest = max(len(pieces[number]) for number in group)
        start = torch.tensor([pieces[number].start for number in group])[:, None]
        n_tokens = torch.tensor([len(pieces[number]) for number in group])[:, None]
        place = torch.arange(longest)[None]
        real = place < n_tokens
        index = start + place.minimum(n_tokens - 1)  # a token that is there anyway stands in the places of none
        before = tuple(p for number in group if (p := pieces[number].before) is not None)
        kept = tuple(number for number in group if number in wanted)
        calls.append(Call(tuple(group), before, kept, longest, None if bool(real.all()) else real.to(device)))
        back[index[real]] = n_places + real.flatten().nonzero()[:, 0]
        order.append(index.flatten())
        n_places += index.numel()
    joint = torch.cat(order)
    back[back < 0] = n_places
    return Plan(in_storage, pieces, calls, joint.to(device), back.to(device))


Step = Callable[..., tuple[Tensor, Tensor | None]]
"""What computes a call: (call, states [B, ...] or None, inputs [B, L, ...]) to (outputs [B, L, ...], states behind)."""


def scan(tree: TreeRow, inputs: Sequence[Tensor], step: Step) -> Tensor:
    """Outputs [1, S, ...] of a recurrent layer from its inputs [1, S, ...]; those of padding are zeros."""
    plan = plan_of(tree)
    streams = [x[0].index_select(0, plan.order).split(plan.sizes) for x in inputs]  # one backward for all calls
    states: dict[int, Tensor] = {}
    outputs: list[Tensor] = []
    for call, *parts in zip(plan.calls, *streams, strict=True):
        initial = torch.stack([states[piece] for piece in call.before]) if call.before else None
        out, final = step(call, initial, *(x.unflatten(0, (len(call.pieces), call.length)) for x in parts))
        if call.kept and final is not None:
            of_piece = dict(zip(call.pieces, final.unbind(0), strict=True))
            states.update((piece, of_piece[piece]) for piece in call.kept)
        outputs.append(out.flatten(0, 1))
    outputs.append(torch.zeros_like(outputs[0][:1]))
    return torch.cat(outputs).index_select(0, plan.back)[None]
