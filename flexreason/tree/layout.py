"""Layouts: many samples merged, every shared token stored once.

The idea of the package is here. Samples merge into a *prefix tree*: a node is one token, and two samples
share a token only if everything before it is equal too. So a token has one position (its depth) and one
set of visible tokens (its ancestors), and computing it once is computing it for every sample through it.

The tree is stored in preorder, so that "is an ancestor of" is one integer a token::

    visible(q, kv)  <=>  kv <= q < until[kv]        until[kv]: where the subtree of kv ends

>>> import flexreason as fr
>>> layout = fr.lay_out_turns([([1, 2], [10, 11], [20]), ([3], [12], [21])])
>>> print(fr.draw_layout(layout))
index         0      1   2      3     4    5     6     7    8
token         1      2  20      3    12   21    10    11   20
turn          0      0   0      1     1    1     0     0    0
role     prompt prompt ctx prompt think resp think think resp
position      0      1   2      3     4    5     2     3    4
until         9      9   6      6     6    6     9     9    9
target        .     10   .     12    21    .    11    20    .

Shapes: S tokens, T targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from flexreason.tree.sample import Ids, Role, Sample, as_ids, one_device

PER_TOKEN = {
    "input_ids": torch.int64,
    "position_ids": torch.int64,
    "until": torch.int32,
    "turn": torch.int32,
    "role": torch.int32,
}
PER_TARGET = {
    "target_source": torch.int64,
    "target_ids": torch.int64,
    "target_turn": torch.int64,
    "target_weight": torch.float32,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """One document: a conversation's samples as one tree, stored in preorder.

    Targets are explicit pairs, since shifted labels are wrong in a tree: the token stored before a generated
    response is not the one that predicts it, and one token may predict several. Targets stand in the order of
    their turns, and within a turn in path order.

    >>> layout = lay_out_turns([([1, 2], [10, 11], [20]), ([3], [12], [21])])
    >>> layout
    Layout(9 tokens, 5 targets, 2 samples of 11 tokens)
    >>> list(zip(layout.target_source.tolist(), layout.target_ids.tolist()))
    [(1, 10), (6, 11), (7, 20), (3, 12), (4, 21)]
    >>> isinstance(layout, Layout), len(layout)
    (True, 9)
    """

    input_ids: Tensor  # [S] int64
    position_ids: Tensor  # [S] int64, depth in the tree: what RoPE and windows see
    until: Tensor  # [S] int32, index where the token's subtree ends: all that masks need
    turn: Tensor  # [S] int32
    role: Tensor  # [S] int32, flags of Role
    target_source: Tensor  # [T] int64, index of the token that predicts
    target_ids: Tensor  # [T] int64, the token to predict
    target_turn: Tensor  # [T] int64, index of the sample in the list that was laid out
    target_weight: Tensor  # [T] float32

    def __post_init__(self) -> None:
        one_device(vars(self), "layout")
        for names in (PER_TOKEN, PER_TARGET):
            first = next(iter(names))
            for name, dtype in names.items():
                tensor = getattr(self, name)
                if tensor.dim() != 1 or len(tensor) != len(getattr(self, first)):
                    raise ValueError(
                        f"layout: expected {name} of shape [{len(getattr(self, first))}] like {first}, "
                        f"found {list(tensor.shape)}"
                    )
                if tensor.dtype is not dtype:
                    raise ValueError(f"layout: expected {name} of {dtype}, found {tensor.dtype}")

    def __len__(self) -> int:
        return len(self.input_ids)

    def __repr__(self) -> str:
        return (
            f"Layout({len(self)} tokens, {len(self.target_ids)} targets, {self.n_samples} samples "
            f"of {self.sample_tokens} tokens)"
        )

    def show(self, tokenizer: Any = None, *, html: str | None = None) -> None:
        """Print what is trained on, or write it as a page to the file `html`.

        The tokenizer is that of `fr.encode`, if the layout comes from there; without one tokens are shown as ids.

        >>> lay_out_turns([([1, 2], [10], [20])]).show()  # doctest: +ELLIPSIS
        prompt reasoning response ...
        """
        from flexreason.show.look import show

        show(self, tokenizer, html)

    def _repr_html_(self) -> str:
        from flexreason.show.look import as_html

        return as_html(self)

    @property
    def n_samples(self) -> int:
        return int(self.target_turn.max()) + 1

    @property
    def sample_tokens(self) -> int:
        """Tokens of all samples together: what one pass a sample would compute."""
        last = torch.cat([self.target_turn.diff() != 0, torch.ones_like(self.target_turn[:1], dtype=torch.bool)])
        return int((self.position_ids[self.target_source[last]] + 2).sum())

    @property
    def device(self) -> torch.device:
        return self.input_ids.device

    def to(self, device: torch.device | str) -> "Layout":
        return Layout(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


TOKENIZERS: WeakKeyDictionary[Layout, Any] = WeakKeyDictionary()
"""What layouts were encoded with, where that is known, so that they can be shown as text."""


def lay_out_turns(turns: Sequence[tuple[Ids, Ids, Ids]]) -> Layout:
    """The paper's own layout of a conversation given as `[(h, t, r), ...]`: prompt, reasoning, response.

    First the trunk `h_1 r_1^in h_2 r_2^in ... h_N`, then one branch `t_i r_i^out` a turn, the last turn's
    first. The last `r^in` is not stored, since nothing reads it; nothing else is merged. A turn without
    reasoning (empty t) needs no copy: its response, in the trunk, is both context and target.

    >>> lay_out_turns([([1, 2], [10, 11], [20]), ([3], [], [21])]).input_ids.tolist()
    [1, 2, 20, 3, 21, 10, 11, 20]
    """
    if not isinstance(turns, Sequence) or not turns:
        raise ValueError("lay_out_turns: expected at least one turn (h, t, r), found none")
    parts = [_check_turn(i, turn) for i, turn in enumerate(turns)]
    last = len(parts) - 1
    has_branch = [len(t) > 0 or i == last for i, (_, t, _) in enumerate(parts)]

    # On the trunk, index and position are one: fork[i] is both for the first token after h_i.
    fork, depth = [], 0
    for h, _, r in parts:
        fork.append(depth + len(h))
        depth = fork[-1] + len(r)

    # ends[i]: where the branches of the turns from i on end, and with them the subtree of h_i.
    start, ends, stop = [0] * len(parts), [0] * len(parts), fork[last]
    for i in reversed(range(len(parts))):
        start[i] = stop if has_branch[i] else fork[i]
        stop += len(parts[i][1]) + len(parts[i][2]) if has_branch[i] else 0
        ends[i] = stop

    pieces = []  # (ids, turn, role, first position, until), in storage order
    both = Role.CONTEXT | Role.RESPONSE  # without reasoning there is nothing to tell the copies apart
    for i, (h, t, r) in enumerate(parts):
        pieces.append((h, i, Role.PROMPT, fork[i] - len(h), ends[i]))
        if i < last:
            pieces.append((r, i, Role.CONTEXT if len(t) else both, fork[i], ends[i + 1]))
    for i in reversed(range(len(parts))):
        _, t, r = parts[i]
        if has_branch[i]:
            pieces.append((t, i, Role.REASONING, fork[i], ends[i]))
            pieces.append((r, i, Role.RESPONSE if len(t) else both, fork[i] + len(t), ends[i]))

    generated = [torch.cat([t, r]) for _, t, r in parts]
    sources = [torch.arange(start[i] - 1, start[i] - 1 + len(ids)) for i, ids in enumerate(generated)]
    for i, of_turn in enumerate(sources):
        of_turn[0] = fork[i] - 1  # h_i's last token, not the one stored before, predicts the first
    ids, turns_of, roles, positions, untils = zip(*pieces, strict=True)
    return Layout(
        input_ids=torch.cat(ids).long(),
        position_ids=torch.cat([torch.arange(p, p + len(x)) for x, p in zip(ids, positions, strict=True)]),
        until=_spread(untils, ids),
        turn=_spread(turns_of, ids),
        role=_spread(roles, ids),
        target_source=torch.cat(sources),
        target_ids=torch.cat(generated).long(),
        target_turn=_spread(range(len(parts)), generated).long(),
        target_weight=torch.from_numpy(np.ones(sum(map(len, generated)), np.float32)),
    )


def unmerge(layout: Layout) -> list[Sample]:
    """The samples of a layout again, in the order given, from `until`, ids and targets alone.

    >>> unmerge(lay_out_turns([([1, 2], [10, 11], [20]), ([3], [], [21])]))[1].prompt_ids
    [1, 2, 20, 3]
    """
    by_turn = torch.argsort(layout.target_turn, stable=True)
    sizes = torch.bincount(layout.target_turn).tolist()
    samples = []
    for targets in by_turn.split(sizes):
        sources = layout.target_source[targets]
        first, last = int(sources[0]), int(sources[-1])
        path = (layout.until[: last + 1] > last).nonzero().squeeze(1)
        prompt = layout.input_ids[path[path <= first]]
        samples.append(Sample(prompt.tolist(), layout.target_ids[targets].tolist()))
    return samples


def stretches(position: Tensor, *alike: Tensor) -> list[tuple[int, int]]:
    """Where each stretch of a path begins and ends in storage; the tensors in `alike` do not change inside one either.

    >>> layout = lay_out_turns([([1, 2], [10, 11], [20]), ([3], [12], [21])])
    >>> stretches(layout.position_ids)
    [(0, 6), (6, 9)]
    >>> stretches(layout.position_ids, layout.until, layout.turn)
    [(0, 2), (2, 3), (3, 6), (6, 9)]
    """
    return list(pairwise([*begins_stretch(position, *alike).nonzero()[:, 0].tolist(), len(position)]))


def begins_stretch(position: Tensor, *alike: Tensor) -> Tensor:
    """bool [S]: whether a stretch begins here.

    In preorder, a token whose position is one more than that of the token stored before it is the child of that one.
    """
    begins = torch.ones_like(position, dtype=torch.bool)
    begins[1:] = position.diff() != 1
    for same in alike:
        begins[1:] |= same.diff() != 0
    return begins


def _check_turn(i: int, turn: tuple[Ids, Ids, Ids]) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(turn, Sequence) or len(turn) != 3:
        raise ValueError(f"turn {i}: expected (h, t, r), found {turn!r}")
    one_device(dict(zip("htr", turn, strict=True)), f"turn {i}")
    h, t, r = (as_ids(ids, f"turn {i}: {name}") for ids, name in zip(turn, "htr", strict=True))
    if not len(h):
        raise ValueError(f"turn {i}: h (the prompt) is empty; expected at least one token before the answer")
    if not len(r):
        raise ValueError(f"turn {i}: r (the response) is empty; expected at least one token, such as the stop token")
    return h, t, r


def _spread(values: Sequence[int], over: Sequence[Tensor]) -> Tensor:
    """Each value as often as its tensor is long."""
    lengths = torch.tensor([len(x) for x in over])
    return torch.tensor(list(values), dtype=torch.int32).repeat_interleave(lengths)
