"""Data whose number is no multiple of the ranks' batches: they are filled up with items that are nothing.

All ranks must take equally many batches of equally many items. Where items are missing, accelerate gives out the first
ones again, which are then trained on twice. Here none are missing, since `Nothing` comes behind the data, and a batch
of it is an empty row, which adds nothing to a loss or a gradient.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.utils.data import Dataset, IterableDataset, RandomSampler, Sampler

from flexreason.data.collator import Collator
from flexreason.model.refuse_rows import refuse_tokens
from flexreason.tree.row import Row, collate


class Nothing:
    """The item that stands for no item."""


class Filled(Dataset):
    """A list of data, with `Nothing` behind it up to a multiple."""

    def __init__(self, data: Any, multiple: int) -> None:
        self.data, self.n = data, len(data)
        self.length = -(-self.n // multiple) * multiple

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Any:
        if not 0 <= number < self.length:
            raise IndexError(f"Filled: no item {number} of {self.length}")
        return self.data[number] if number < self.n else Nothing()

    def sampler(self, of_data: Sampler | None) -> Any:
        """The sampler for these data. A sampler that accelerate shuffles anew has `Nothing` anywhere among the items;
        otherwise it comes last."""
        if isinstance(of_data, RandomSampler):  # which accelerate knows, and makes the same on all ranks
            of_data.data_source = self
            return of_data
        return None if of_data is None else _Then(of_data, range(self.n, self.length))


class _Then(Sampler):
    def __init__(self, first: Sampler, then: range) -> None:
        self.first, self.then = first, then

    def __len__(self) -> int:
        return len(self.first) + len(self.then)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        yield from self.first
        yield from self.then


class FilledStream(IterableDataset):
    """A stream of data, with `Nothing` behind it up to a multiple."""

    def __init__(self, data: Any, multiple: int) -> None:
        self.data, self.multiple = data, multiple

    def __len__(self) -> int:
        return -(-len(self.data) // self.multiple) * self.multiple

    def __iter__(self) -> Iterator[Any]:
        n = 0
        for item in self.data:
            yield item
            n += 1
        for _ in range(-n % self.multiple):
            yield Nothing()

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(epoch)


class Filling:
    """Hands a collator the items that are not `Nothing`, and refuses tokens that the model does not have.

    Tokens are looked at here because rows are on the CPU still; on a GPU it would make every step wait.
    """

    def __init__(self, collator: Callable[[list[Any]], Row], vocabulary: int | None) -> None:
        self.collator, self.vocabulary = collator, vocabulary

    def __call__(self, batch: list[Any]) -> Row:
        items = [item for item in batch if not isinstance(item, Nothing)]
        if not items and not isinstance(self.collator, Collator):  # which makes an empty row of its own length
            return collate([])
        row = self.collator(items)
        if not isinstance(row, Mapping) or not {"until", "target_weight"} <= row.keys():
            found = (
                f"a batch with the keys {', '.join(map(str, row))}" if isinstance(row, Mapping) else type(row).__name__
            )
            raise ValueError(f"data_collator: expected one that makes a row, such as fr.Collator(), found {found}")
        refuse_tokens(row["input_ids"], self.vocabulary)
        return row
