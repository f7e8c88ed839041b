"""`RowStream`: rows of documents that come one after the other, from data too large to be read before training.

>>> import flexreason as fr
>>> layouts = [fr.lay_out_turns([([1] * n, [2], [3])]) for n in (100, 30, 60, 90, 20)]
>>> [len(row) for row in RowStream(layouts, 128, multiple=2)]
[2, 2, 1, 0]
"""

from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from flexreason.data.pack import POOL, Packer
from flexreason.data.rows import size_of


class RowStream(IterableDataset):
    """What `Rows` gives, for any iterable of layouts, in the order in which the packer's pool makes it; once.

    Nothing but the pool is held. The same iterable and seed give the same rows, so a run that goes on may skip those
    it has seen. The end is filled up with empty rows to a `multiple`: so all ranks get equally many, and whoever shares
    rows out has no reason to repeat some (accelerate does, to come out even). A document longer than a row raises.

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
        packer, waiting, n = Packer(self.length, pool=self.pool, seed=self.seed), {}, 0
        for number, layout in enumerate(self.layouts):
            waiting[number] = layout
            for row in packer.add(number, size_of(layout)):
                yield [waiting.pop(taken) for taken in row]
                n += 1
        for row in packer.flush():
            yield [waiting.pop(taken) for taken in row]
            n += 1
        for _ in range(-n % self.multiple):
            yield []
