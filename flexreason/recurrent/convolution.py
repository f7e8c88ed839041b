"""A short convolution through a tree.

A convolution of width W takes a token and the W - 1 stored before it. For most tokens of a row these are its ancestors,
so the model's own convolution runs over storage once; only the first W - 1 tokens of each chain have other ancestors
than neighbours. Their outputs are computed anew, by the same function, from what stands on their path: the last W - 1
ancestors of the chain (zeros before the first token of a document), and the beginning of the chain itself::

    storage     ... trunk ... fork ... trunk | branch ...
    computed    [W - 1 tokens before fork] [W - 1 tokens of the branch]  ->  the last W - 1 of the outputs

Nothing else is kept for backward than what a plain pass keeps. Convolution states are not used: kernels lose their
gradients in pieces that are shorter than W - 1.

Shapes: D channels, S tokens, n chains, W width.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexreason.attention.registry import TreeRow
from flexreason.recurrent.plan import Plan, plan_of
from flexreason.tree.chains import upwards


class Beginnings(NamedTuple):
    """The first tokens of all chains, on their paths."""

    stored: Tensor  # [n, 2(W - 1)] where they are in storage: ancestors, then the chain's own
    real: Tensor  # bool [n, 2(W - 1)]: not before a document's first token, nor behind a chain's last
    place: Tensor  # [m] which of [n, W - 1] outputs are those of tokens
    token: Tensor  # [m] which tokens they are


def convolve(stock: Callable, tree: TreeRow, x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What `stock(x, weight, ...)` gives for [1, D, S], with every token's ancestors in the place of its neighbours."""
    [out] = near_ancestors(lambda x: (stock(x, weight, *args, **kwargs),), tree, x, weight.shape[-1] - 1, dim=2)
    return out


def near_ancestors(
    stock: Callable[[Tensor], Sequence[Tensor]], tree: TreeRow, x: Tensor, reach: int, dim: int
) -> list[Tensor]:
    """The same for whatever looks at the `reach` tokens before each; tokens are in `dim` of what goes in and comes out.

    Before the first token of a document it must take zeros.
    """
    over_storage = stock(x)
    first = beginnings(plan_of(tree), reach)
    if first is None:
        return list(over_storage)
    windows = x.movedim(dim, 0).index_select(0, first.stored.flatten()).unflatten(0, first.stored.shape)
    windows = (windows * first.real.view(*first.real.shape, *[1] * (windows.dim() - 2))).squeeze(2)
    anew = stock(windows.movedim(1, dim).contiguous())
    return [
        out.index_copy(dim, first.token, _of_tokens(new, first, reach, dim))
        for out, new in zip(over_storage, anew, strict=True)
    ]


def _of_tokens(new: Tensor, first: "Beginnings", reach: int, dim: int) -> Tensor:
    """The outputs of chains' own tokens among those of windows, as one row."""
    own = new.movedim(dim, 1)[:, reach:].flatten(0, 1).index_select(0, first.place)
    return own.unsqueeze(0).movedim(1, dim)


def beginnings(plan: Plan, reach: int) -> Beginnings | None:
    """Where the outputs over storage are not those over the tree; None where they are."""
    if reach not in plan.beginnings:
        plan.beginnings[reach] = _beginnings(plan, reach)
    return plan.beginnings[reach]


def _beginnings(plan: Plan, reach: int) -> Beginnings | None:
    device = plan.order.device
    index, real = [], []
    for chain in plan.chains:
        if chain.start == 0 or not reach:  # before the first token of storage the convolution has zeros, as it should
            continue
        path: list[int] = []
        for _, start, stop in upwards(plan.chains, chain, chain.start, chain.position - reach):
            path = [*range(start, stop), *path]
        own = [*range(chain.start, min(chain.start + reach, chain.stop))]
        before, behind = reach - len(path), reach - len(own)
        index.append([0] * before + path + own + [0] * behind)
        real.append([False] * before + [True] * (len(path) + len(own)) + [False] * behind)
    if not index:
        return None
    indices, reals = torch.tensor(index), torch.tensor(real)
    of_tokens = reals[:, reach:].flatten()
    return Beginnings(
        indices.to(device),
        reals.to(device),
        of_tokens.nonzero()[:, 0].to(device),
        indices[:, reach:].flatten()[of_tokens].to(device),
    )
