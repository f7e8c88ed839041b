"""Whole documents into rows of one length, as they come: a pool of waiting documents, and rows made from it.

A row begins with one of the pool at random, and is filled up with the longest that still fits, and again, until
nothing does. With a pool of some hundreds there is nearly always one that fits well. Documents are known here by
number and length only. The pool of a stream is bounded, and the same stream and seed always give the same rows, so that
the number of a row is all that a run needs to go on from it.

>>> packer = Packer(10, pool=4, seed=0)
>>> rows = [row for number, size in enumerate([7, 3, 5, 4, 6, 1, 2, 9]) for row in packer.add(number, size)]
>>> sorted(number for row in [*rows, *packer.flush()] for number in row)
[0, 1, 2, 3, 4, 5, 6, 7]
"""

import random
from collections.abc import Iterable, Iterator

POOL = 1024


class Packer:
    """Documents in, rows out.

    Args:
        length: Tokens of a row.
        pool: Documents that wait, at most; when there are so many, a row is made.
        seed: Of the draw that each row begins with.

    >>> packer = Packer(100)
    >>> list(packer.pack([("a", 60), ("b", 50), ("c", 40)]))
    [['b', 'c'], ['a']]
    """

    def __init__(self, length: int, *, pool: int = POOL, seed: int = 0) -> None:
        if length < 1 or pool < 1:
            raise ValueError(f"Packer: expected a length and a pool of at least 1, found {length} and {pool}")
        self.length, self.pool = length, pool
        self.draw = random.Random(seed)
        self.waiting: list[int] = []  # numbers, in no order
        self.at: dict[int, int] = {}  # where a number stands among these
        self.size_of: dict[int, int] = {}
        self.of_size: dict[int, list[int]] = {}  # the other way round
        self.sizes = 0  # bit s: something of size s is waiting

    def add(self, number: int, size: int) -> Iterator[list[int]]:
        """Add a document; gives a row if the pool is full with it."""
        if not 1 <= size <= self.length:
            raise ValueError(
                f"Packer: document {number} has {size} tokens, and a row {self.length}; split it first (fr.split)"
            )
        if number in self.at:
            raise ValueError(f"Packer: document {number} is waiting already; number documents of several epochs anew")
        self.at[number] = len(self.waiting)
        self.waiting.append(number)
        self.size_of[number] = size
        self.of_size.setdefault(size, []).append(number)
        self.sizes |= 1 << size
        if len(self.waiting) >= self.pool:
            yield self._row()

    def flush(self) -> Iterator[list[int]]:
        """Rows of all documents that still wait."""
        while self.waiting:
            yield self._row()

    def pack(self, documents: Iterable[tuple[int, int]]) -> Iterator[list[int]]:
        """Rows of a stream of (number, size), to its end."""
        for number, size in documents:
            yield from self.add(number, size)
        yield from self.flush()

    def _row(self) -> list[int]:
        first = self.waiting[self.draw.randrange(len(self.waiting))]
        row, room = [first], self.length - self._take(first)
        while fitting := self.sizes & ((2 << room) - 1):
            longest = self.of_size[fitting.bit_length() - 1][-1]
            row.append(longest)
            room -= self._take(longest)
        return row

    def _take(self, number: int) -> int:
        """Take a document out of the pool; its size."""
        last = self.waiting.pop()
        at = self.at.pop(number)
        if last != number:
            self.waiting[at], self.at[last] = last, at
        size = self.size_of.pop(number)
        same = self.of_size[size]
        same.remove(number)
        if not same:
            del self.of_size[size]
            self.sizes &= ~(1 << size)
        return size
