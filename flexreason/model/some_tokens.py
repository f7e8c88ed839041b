"""Some tokens of a row, with whatever a module or a hook was given of them: as if they were a sequence by themselves.

Shapes: S tokens of the row, L of the path.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from flexreason.attention.registry import Asked, TreeRow

PLACES = ("until", "position_ids", "document")
"""What tells a row's paths."""

DIMENSIONS = {1: (0,), 2: (0, 1), 3: (1,), 4: (2, 1)}
"""Which dimensions of a tensor may be its tokens, by how many it has."""

LENGTH = 32
"""How long a path is wanted, where there is a choice."""


def n_tokens(x: Tensor) -> int:
    return x.shape[0] if x.dim() == 2 and x.shape[0] > 1 else x.shape[1]


def some_tokens(n: int, row: Mapping[str, Tensor]) -> list[Tensor]:
    """Lists of tokens to check code with: two paths of the row, [L] each, where it was given all tokens of the row;
    else the second half of its tokens in reverse. No list where the row has no branch, or there are too few tokens."""
    if len(row) < len(PLACES):
        return []
    if n != row["until"].shape[1]:
        return [torch.arange(n - 1, n // 2 - 1, -1)] if n > 1 else []
    until, position, document = (row[key][0].cpu() for key in PLACES)
    place = torch.arange(n)
    start = torch.full((int(document.max()) + 2,), n).scatter_reduce(0, document + 1, place, "amin")[document + 1]
    [branched] = ((place - start != position) & (document >= 0)).nonzero(as_tuple=True)
    if not len(branched):
        return []
    gap = place[branched] - position[branched]
    latest = branched[gap == gap.max()][:LENGTH][-1]  # of the branch that is furthest from its places by itself
    usual = branched[(position[branched] - LENGTH).abs().argmin()]
    return [
        ((document == document[last]) & (place <= last) & (last < until)).nonzero().squeeze(1)
        for last in (latest, usual)
    ]


def only(some: Tensor, n: int, given: Any) -> Any:
    """What is given, with these of its n tokens only, as samples have them: without a tree, and with a mask."""
    like = next(leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor) and leaf.dim() > 1)

    def cut(x: Any) -> Any:
        if isinstance(x, Asked):
            return _mask(x, len(some), like)
        if not isinstance(x, Tensor) or not x.numel():  # the mask that stands for a row's is empty
            return None if isinstance(x, TreeRow | Tensor) else x
        dim = next((dim for dim in DIMENSIONS.get(x.dim(), ()) if x.shape[dim] == n), None)
        return x.detach().clone() if dim is None else x.detach().index_select(dim, some.to(x.device))

    return tree_map(cut, given)


def _mask(asked: Asked, n: int, like: Tensor) -> Tensor:
    """The mask of a plain sequence, [1, 1, L, L], as all implementations of attention take it."""
    kv = torch.arange(n, device=like.device)
    q = kv[:, None]
    near = (kv <= q) & (q - kv < (asked.window or n)) & (q // (asked.chunk or n) == kv // (asked.chunk or n))
    return torch.zeros(1, 1, n, n, dtype=like.dtype, device=like.device).masked_fill(~near, torch.finfo(like.dtype).min)


def copied(given: Any) -> Any:
    return tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, given)


def versions_of(given: Any) -> list[int]:
    return [x._version for x in tree_leaves(given) if isinstance(x, Tensor) and not x.is_inference()]


def equal(found: Any, expected: Any) -> bool:
    """Whether two results are equal but for rounding. What only one of them has, as attention weights, is left out."""
    pairs = list(zip(tree_leaves(found), tree_leaves(expected), strict=False))
    return all(_alike(*pair) for pair in pairs if all(isinstance(one, Tensor) for one in pair))


def _alike(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or not one.is_floating_point():
        return one.shape == other.shape and torch.equal(one, other)
    kind = one.device.type
    rounded = kind != "cpu" or torch.is_autocast_enabled(kind)  # on the way, whatever it is stored in
    eps = torch.finfo(torch.bfloat16 if rounded and one.dtype != torch.float64 else one.dtype).eps
    tolerance = max(1e-8, min(100 * eps, eps**0.5)) * float(other.abs().max()) if other.numel() else 0.0
    return torch.allclose(one, other, rtol=0.0, atol=tolerance, equal_nan=True)
