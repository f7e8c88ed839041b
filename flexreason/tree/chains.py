"""The tree as chains: stretches of storage whose every token is the child of the one before (the trunk; a branch).

This is all that a recurrent layer needs of a tree, and the cover of attention's region begins here too: the parent of a
token is the one stored before it, except for the first token of a chain, whose parent is the one before the chain's
*fork*, or nobody.

>>> import flexreason as fr
>>> layout = fr.lay_out_turns([([1, 2], [10, 11], [20]), ([3], [12], [21])])
>>> for chain in chains(layout.until.tolist(), layout.position_ids.tolist()):
...     print(chain.start, chain.stop, chain.parent, chain.fork)
0 6 -1 0
6 9 0 2
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from flexreason.tree.layout import stretches


@dataclass(frozen=True, slots=True)
class Chain:
    """Storage [start, stop), each token the child of the one before."""

    start: int
    stop: int
    position: int  # of its first token
    end: int  # where the subtree of its first token ends
    parent: int  # number of the chain it hangs off, or -1
    fork: int  # behind the index of its first token's parent


def chains(until: Sequence[int], position: Sequence[int]) -> list[Chain]:
    """All chains in storage order."""
    in_storage: list[Chain] = []
    path: list[int] = []  # chains from the root to here
    for start, stop in stretches(torch.tensor(position)):
        while path and in_storage[path[-1]].position >= position[start]:
            path.pop()
        if position[start] == 0:
            path.clear()
        parent = path[-1] if path else -1
        fork = in_storage[parent].start + position[start] - in_storage[parent].position if path else start
        path.append(len(in_storage))
        in_storage.append(Chain(start, stop, position[start], until[start], parent, fork))
    return in_storage


def upwards(in_storage: Sequence[Chain], chain: Chain, stop: int, lowest: int) -> Iterator[tuple[Chain, int, int]]:
    """The path that ends before index `stop` of a chain, up to position `lowest`: chains, and start and stop of the
    stretch of storage that the path has of each. The root's comes last.

    >>> import flexreason as fr
    >>> layout = fr.lay_out_turns([([1, 2], [10, 11], [20]), ([3], [12], [21])])
    >>> trunk, branch = in_storage = chains(layout.until.tolist(), layout.position_ids.tolist())
    >>> [(start, stop) for _, start, stop in upwards(in_storage, branch, branch.stop, lowest=1)]
    [(6, 9), (1, 2)]
    """
    while True:
        yield chain, max(chain.start, lowest + chain.start - chain.position), stop
        if chain.position <= lowest or chain.parent < 0:
            return
        stop = chain.fork
        chain = in_storage[chain.parent]
