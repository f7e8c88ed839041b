"""Documents dealt out to rows: data sets for any loader, one of whose items is the documents of a row.

`Rows` is for documents whose sizes are known. An epoch is every document once, in an order drawn for it, packed into
rows of one length. The rows of all epochs stand one behind the other, so a row's number says all there is to know: to
go on later, on any number of processes, is to begin at a number. Nothing is kept but sizes; the rows of an epoch are
made when it is reached, and are the same each time.

>>> import flexreason as fr
>>> layouts = [fr.lay_out_turns([([1] * n, [2], [3])]) for n in (100, 30, 60, 90, 20)]
>>> rows = Rows(layouts, 128, epochs=2)
>>> [sorted(rows.documents(row)) for row in range(3)], len(rows)
([[0, 4], [2], [1, 3]], 6)

`RowStream` is for documents that come one after the other, from data too large to be read before training.

>>> [len(row) for row in RowStream(layouts, 128, multiple=2)]
[2, 2, 1, 0]
"""

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from flexreason.data.pack import POOL, Packer


class Rows(Dataset):
    """Item i is the list of documents that make row i; `fr.Collator(length)` makes tensors of it.

    Every epoch is filled up with empty rows to a `multiple`, so that no optimizer step spans two epochs, and all ranks
    get equally many rows.

    Args:
        items: The documents: layouts, or what the collator takes for them.
        length: Tokens of a row.
        epochs: How often every document comes.
        steps: Optimizer steps, each of `multiple` rows; there are as many epochs as these take.
        seed: Of the order of documents and of packing.
        multiple: Rows of an optimizer step, on all ranks.
        sizes: Tokens of each document, if `items` cannot be asked cheaply.
        pool: Documents among which the packer chooses.

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
            raise ValueError("Rows: no documents; expected at least one")
        self.items, self.length, self.seed, self.multiple, self.pool = items, length, seed, multiple, pool
        self.sizes = array("q", map(size_of, items)) if sizes is None else sizes
        if len(self.sizes) != len(items):
            raise ValueError(f"Rows: expected a size for each of {len(items)} documents, found {len(self.sizes)} sizes")
        self._packed: tuple[int, _Epoch] | None = None  # the epoch that was asked for last, and its number
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
        """How many epochs have passed before a row; 1.5 is halfway through the second epoch."""
        epoch = self.epoch_of(row)
        n = len(self._epoch(epoch)) if epoch == self.epochs - 1 else self.starts[epoch + 1] - self.starts[epoch]
        return epoch + (row - self.starts[epoch]) / n

    def documents(self, row: int) -> list[int]:
        """The numbers of the documents in a row."""
        epoch = self.epoch_of(row)
        return self._epoch(epoch).row(row - self.starts[epoch])

    def _epoch(self, epoch: int) -> "_Epoch":
        if self._packed is None or self._packed[0] != epoch:
            self._packed = epoch, self._pack(self.seed * 1_000_003 + epoch)
        return self._packed[1]

    def _pack(self, seed: int) -> "_Epoch":
        draw = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.items), generator=draw)
        numbers = (number for some in order.split(4096) for number in some.tolist())
        packed = _Epoch()
        for row in Packer(self.length, pool=self.pool, seed=seed).pack((n, int(self.sizes[n])) for n in numbers):
            packed.add(row)
        shuffled = _Epoch()
        for number in torch.randperm(len(packed), generator=draw).tolist():  # packing leaves short rows for last
            shuffled.add(packed.row(number))
        for _ in range(-len(shuffled) % self.multiple):
            shuffled.add([])
        return shuffled

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_packed": None}


class _Epoch:
    """The rows of an epoch, in a few bytes a document."""

    def __init__(self) -> None:
        self.numbers, self.ends = array("q"), array("q", [0])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def add(self, row: list[int]) -> None:
        self.numbers.extend(row)
        self.ends.append(len(self.numbers))

    def row(self, number: int) -> list[int]:
        return self.numbers[self.ends[number] : self.ends[number + 1]].tolist()


class RowStream(IterableDataset):
    """What `Rows` gives, for any iterable of layouts, in the order in which the packer's pool makes it; once.

    Only the documents in the pool are held. The same iterable and seed give the same rows, so a run that goes on may
    skip those it has seen. The end is filled up with empty rows to a `multiple`: so all ranks get equally many, and
    accelerate has no reason to repeat some, as it does to come out even. A document longer than a row raises.

    >>> import flexreason as fr
    >>> layouts = (fr.lay_out_turns([([1] * n, [2], [3])]) for n in (100, 30, 60, 90, 20))
    >>> [len(row) for row in RowStream(layouts, 128, multiple=2)]
    [2, 2, 1, 0]
    """

    def __init__(
        self, layouts: Iterable[Any], length: int, *, seed: int = 0, multiple: int = 1, pool: int = POOL
    ) -> None:
        if multiple < 1:
            raise ValueError(f"RowStream: expected a multiple of at least 1, found {multiple}")
        Packer(length, pool=pool)  # what is wrong with these is told here
        self.layouts, self.length, self.seed, self.multiple, self.pool = layouts, length, seed, multiple, pool

    def __iter__(self) -> Iterator[list[Any]]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError(
                f"RowStream: {worker.num_workers} loader workers would each give all rows; use one at most, and encode "
                "in processes of its own (Intake's workers)"
            )
        waiting: dict[int, Any] = {}

        def sizes() -> Iterator[tuple[int, int]]:
            for number, layout in enumerate(self.layouts):
                waiting[number] = layout
                yield number, size_of(layout)

        n_rows = 0
        for row in Packer(self.length, pool=self.pool, seed=self.seed).pack(sizes()):
            yield [waiting.pop(number) for number in row]
            n_rows += 1
        for _ in range(-n_rows % self.multiple):
            yield []


def size_of(item: Any) -> int:
    """Tokens of a layout, or of one as columns."""
    return len(item["input_ids"]) if isinstance(item, dict) else len(item)
