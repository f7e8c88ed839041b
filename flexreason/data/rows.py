"""`Rows`: documents dealt out to rows, epoch after epoch: a data set for any loader.

An epoch is every document once, in an order drawn for it, packed into rows of one length. Rows of all epochs stand
one behind the other, so a row's number says all there is to know: to go on later, on any number of processes, is to
begin at a number. Nothing is kept but sizes; an epoch's rows are made when it is reached, and again the same.

>>> import flexreason as fr
>>> layouts = [fr.lay_out_turns([([1] * n, [2], [3])]) for n in (100, 30, 60, 90, 20)]
>>> rows = Rows(layouts, 128, epochs=2)
>>> [sorted(rows.documents(row)) for row in range(3)], len(rows)
([[0, 4], [2], [1, 3]], 6)
"""

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from flexreason.data.pack import POOL, Packer


class Rows(Dataset):
    """Item i is the list of documents that make row i; `fr.Collator(length)` makes tensors of it.

    `items`: layouts, or what the collator takes for them; `sizes`, their tokens, if they cannot be asked. Every epoch
    is filled up with empty rows to a `multiple`, the rows of an optimizer step on all ranks, so that no step spans two
    epochs and all ranks get equally many. With `steps`, there are as many epochs as these take.

    >>> import flexreason as fr
    >>> rows = Rows([fr.lay_out_turns([([1] * n, [2], [3])]) for n in (100, 30, 60, 90, 20)], 128, epochs=2)
    >>> len(rows), rows[0]
    (6, [Layout(102 tokens, 2 targets, 1 samples of 102 tokens), Layout(22 tokens, 2 targets, 1 samples of 22 tokens)])
    """

    def __init__(
        self,
        items: Sequence[Any],
        length: int,
        *,
        epochs: int = 1,
        steps: int | None = None,
        seed: int = 0,
        multiple: int = 1,
        sizes: Sequence[int] | None = None,
        pool: int = POOL,
    ) -> None:
        if epochs < 1 or multiple < 1 or (steps is not None and steps < 1):
            raise ValueError(
                f"Rows: expected epochs, steps and multiple of at least 1, found {epochs}, {steps}, {multiple}"
            )
        if not len(items):
            raise ValueError("Rows: no documents")
        self.items, self.length, self.seed, self.multiple, self.pool = items, length, seed, multiple, pool
        self.sizes = array("q", map(size_of, items)) if sizes is None else sizes
        if len(self.sizes) != len(items):
            raise ValueError(f"Rows: {len(items)} documents and {len(self.sizes)} sizes")
        self._made: tuple[int, _Epoch] | None = None
        self.starts = [0]  # where each epoch begins, and the end
        wanted = None if steps is None else steps * multiple
        while len(self.starts) <= epochs if wanted is None else self.starts[-1] < wanted:
            self.starts.append(self.starts[-1] + len(self._epoch(len(self.starts) - 1)))
        if wanted is not None:
            self.starts[-1] = wanted

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, row: int) -> list[Any]:
        if not 0 <= row < len(self):
            raise IndexError(f"Rows: no row {row} of {len(self)}")
        return [self.items[number] for number in self.documents(row)]

    @property
    def epochs(self) -> int:
        return len(self.starts) - 1

    def epoch_of(self, row: int) -> int:
        return min(bisect_right(self.starts, row), self.epochs) - 1

    def progress(self, row: int) -> float:
        """Epochs that are over when all rows before this one are, in parts of the last."""
        epoch = self.epoch_of(row)
        n = len(self._epoch(epoch)) if epoch == self.epochs - 1 else self.starts[epoch + 1] - self.starts[epoch]
        return epoch + (row - self.starts[epoch]) / n

    def documents(self, row: int) -> list[int]:
        """The numbers of the documents in a row."""
        epoch = self.epoch_of(row)
        return self._epoch(epoch).row(row - self.starts[epoch])

    def _epoch(self, epoch: int) -> "_Epoch":
        if self._made is None or self._made[0] != epoch:
            seed = self.seed * 1_000_003 + epoch
            draw = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(self.items), generator=draw)
            numbers = (number for some in order.split(4096) for number in some.tolist())
            packer = Packer(self.length, pool=self.pool, seed=seed)
            rows = _Epoch()
            for row in packer.pack((number, int(self.sizes[number])) for number in numbers):
                rows.add(row)
            made = _Epoch()
            for number in torch.randperm(len(rows), generator=draw).tolist():  # packing leaves short ones for last
                made.add(rows.row(number))
            for _ in range(-len(made) % self.multiple):
                made.add([])
            self._made = epoch, made
        return self._made[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_made": None}


class _Epoch:
    """The rows of an epoch, a few bytes a document."""

    def __init__(self) -> None:
        self.numbers, self.ends = array("q"), array("q", [0])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def add(self, row: list[int]) -> None:
        self.numbers.extend(row)
        self.ends.append(len(self.numbers))

    def row(self, number: int) -> list[int]:
        return self.numbers[self.ends[number] : self.ends[number + 1]].tolist()


def size_of(item: Any) -> int:
    """Tokens of a layout, or of one as columns."""
    return len(item["input_ids"]) if isinstance(item, dict) else len(item)
