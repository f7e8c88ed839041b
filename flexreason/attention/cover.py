"""The visible region as few large rectangles: what a tree's attention has to compute, and nothing else.

Storage is cut into diagonal tiles of `TILE` tokens; inside a tile a small mask decides. Everything visible
outside these tiles is covered here by rectangles, every pair exactly once. The storage order makes them
large. A *chain* is a stretch of storage whose every token is the child of the one before (the trunk; a
branch). What hangs off a chain lies right behind it, deepest fork first, so the branches that see a common
prefix of the chain are neighbours, and one rectangle serves them all::

              keys of the trunk
              0          f1        f0
    trunk     ◣
    branch 1  ██████████████████████        [a common prefix]  one rectangle for both branches,
    branch 0  ██████████                    [what is left]     then one for what only branch 1 sees

Whether to share a prefix is decided by the cost of both ways. Under a window, rectangles are cut along the
key positions that all of a tile's queries see; the *edge*, which some see, is a tile with a mask.

Shapes: S tokens. All of this is plain integers, made once a row and used by every layer.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple

from flexreason.tree.chains import Chain, chains, upwards

TILE = 128


class Cost(NamedTuple):
    """What a rectangle costs beside its pairs, in pairs: itself, and reading and writing a row of queries or keys."""

    rectangle: int
    row: int
    key: int

    def __call__(self, rows: int, keys: int) -> int:
        return rows * keys + self.row * rows + self.key * keys + self.rectangle if rows and keys else 0


CPU = Cost(4000, 40, 40)
"""From timing the fused CPU kernels; a factor of two in any of them changes the time by about a percent."""


Span = tuple[int, int]
"""Where a stretch of storage begins, and where it ends."""


class Rectangle(NamedTuple):
    """Queries [q_start, q_stop) see keys [k_start, k_stop): all of them, or those in the window if on its edge."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    edge: bool = False

    @property
    def q(self) -> slice:
        return slice(self.q_start, self.q_stop)

    @property
    def k(self) -> slice:
        return slice(self.k_start, self.k_stop)


def cover(
    until: Sequence[int], position: Sequence[int], window: int | None = None, chunk: int | None = None
) -> list[Rectangle]:
    """Rectangles that hold every visible pair outside the diagonal tiles exactly once."""
    in_storage = chains(until, position)
    if window is not None and window > max(position, default=0):
        window = None
    if window is not None or chunk is not None:
        return [r for c in in_storage for r in _limited(in_storage, c, window, chunk)]
    own = [r for chain in in_storage for r in _staircase(chain)]
    return own + [part for r in prefixes(in_storage, CPU) for part in _outside_tiles(r)]


def prefixes(in_storage: list[Chain], cost: Cost) -> list[Rectangle]:
    """Rectangles that hold exactly once every pair of which query and key are not on one chain. Their queries are
    nested or disjoint."""
    children: list[list[Chain]] = [[] for _ in in_storage]
    for chain in in_storage:
        if chain.parent >= 0:
            children[chain.parent].append(chain)
    return [r for chain, hanging in zip(in_storage, children, strict=True) for r in _shared(chain, hanging, cost)]


def paths(
    in_storage: list[Chain], window: int | None = None, chunk: int | None = None
) -> list[tuple[Span, tuple[Span, ...]]]:
    """Stretches of queries that stand one behind the other on a path, and the keys that the first of them sees and all
    those behind, in the order of their positions: the last ones are the queries themselves."""
    stretches = []
    for chain in in_storage:
        shift = chain.position - chain.start
        stops = [chain.start, chain.stop]
        if chunk is not None:
            stops[1:1] = range((chain.position // chunk + 1) * chunk - shift, chain.stop, chunk)
        for start, stop in pairwise(stops):
            lowest = 0 if window is None else start + shift - window + 1
            if chunk is not None:
                lowest = max(lowest, (start + shift) // chunk * chunk)
            path = [(first, last) for _, first, last in upwards(in_storage, chain, stop, lowest)]
            stretches.append(((start, stop), tuple(reversed(path))))
    return stretches


def _staircase(chain: Chain) -> Iterator[Rectangle]:
    """A chain's own pairs below its diagonal tiles, halved until a tile is reached."""
    first = chain.start // TILE + 1
    steps = [chain.start, *range(first * TILE, chain.stop, TILE), chain.stop]

    def halve(low: int, high: int) -> Iterator[Rectangle]:
        if high - low > 1:
            middle = (low + high + 1) // 2
            yield Rectangle(steps[middle], steps[high], steps[low], steps[middle])
            yield from halve(low, middle)
            yield from halve(middle, high)

    yield from halve(0, len(steps) - 1)


def _shared(chain: Chain, hanging: list[Chain], cost: Cost) -> Iterator[Rectangle]:
    """What the subtrees hanging off a chain see of it. They stand in storage order, forks not increasing."""

    def rows(low: int, high: int) -> int:
        return hanging[high - 1].end - hanging[low].start

    @cache
    def best(low: int, high: int, seen: int) -> tuple[int, bool]:
        """Cost for the subtrees low..high and the keys from `seen` on, and whether a common prefix comes first."""
        common = hanging[high - 1].fork
        together = cost(rows(low, high), common - seen)
        if hanging[low].fork == common:
            return together, True
        middle = (low + high) // 2
        shared = together + best(low, middle, common)[0] + best(middle, high, common)[0]
        apart = best(low, middle, seen)[0] + best(middle, high, seen)[0]
        return (shared, True) if shared <= apart else (apart, False)

    def emit(low: int, high: int, seen: int) -> Iterator[Rectangle]:
        common, middle = hanging[high - 1].fork, (low + high) // 2
        if best(low, high, seen)[1]:
            if common > seen:
                yield Rectangle(hanging[low].start, hanging[high - 1].end, seen, common)
            seen = common
        if hanging[low].fork > seen:
            yield from emit(low, middle, seen)
            yield from emit(middle, high, seen)

    if hanging:
        yield from emit(0, len(hanging), chain.start)


def _outside_tiles(r: Rectangle) -> Iterator[Rectangle]:
    """A rectangle without the corner that lies in the diagonal tile of its first queries."""
    q_start, q_stop, k_start, k_stop, _ = r
    tile = q_start // TILE * TILE
    if k_stop > tile:
        corner = min(tile + TILE, q_stop)
        if k_start < tile:
            yield Rectangle(q_start, corner, k_start, tile)
        q_start = corner
    if q_start < q_stop and k_start < k_stop:
        yield Rectangle(q_start, q_stop, k_start, k_stop)


def _limited(in_storage: list[Chain], chain: Chain, window: int | None, chunk: int | None) -> Iterator[Rectangle]:
    """What a chain's queries see under a window or chunks: a tile of queries at a time, up the path."""
    shift = chain.position - chain.start
    stops = set(range(chain.start // TILE * TILE, chain.stop, TILE)) | {chain.start, chain.stop}
    if chunk is not None:
        stops |= set(range(-(-(chain.start + shift) // chunk) * chunk - shift, chain.stop, chunk))
    for q_start, q_stop in pairwise(sorted(stop for stop in stops if stop >= chain.start)):
        lowest = 0 if window is None else q_start + shift - window + 1  # position that the first query still sees
        all_see = 0 if window is None else q_stop - 1 + shift - window + 1
        if chunk is not None:
            lowest = max(lowest, (q_start + shift) // chunk * chunk)
        tile = q_start // TILE * TILE
        for above, low, k_stop in upwards(in_storage, chain, tile, lowest):
            k_stop = min(k_stop, tile)
            offset = above.start - above.position
            cut = min(max(low, all_see + offset), k_stop)
            if low < cut and window is not None:  # of the queries, those that see its last key at least
                yield Rectangle(q_start, min(q_stop, cut - 1 - offset + window - shift), low, cut, edge=True)
            if cut < k_stop:
                yield Rectangle(q_start, q_stop, max(cut, low), k_stop)
