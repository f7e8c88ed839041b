"""`Collator`: makes one row of a batch, whatever kind of items a data set has.

>>> import flexreason as fr
>>> layout = fr.lay_out_turns([([1, 2], [10, 11], [20]), ([3], [12], [21])])
>>> row = Collator(256)([layout, [layout, layout]])
>>> row["input_ids"].shape, int(row["document"].max()) + 1
(torch.Size([1, 256]), 3)
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flexreason.tree.layout import PER_TARGET, PER_TOKEN, Layout
from flexreason.tree.row import Row, collate


class Collator:
    """Makes one row [1, S] of a batch of any size, for a DataLoader or a Trainer.

    An item may be a layout, a list of layouts (an item of `Rows`; an empty list makes an empty row), or a layout's
    columns as a datasets.Dataset keeps them.

    Args:
        length: Tokens of the row; as many as are needed, in whole blocks, if not given.
        encode: Makes a layout of any other item, such as `EntryEncoder` of a conversation.

    >>> import flexreason as fr
    >>> layout = fr.lay_out_turns([([1, 2], [10, 11], [20])])
    >>> Collator(256)([layout, [layout, layout]])["input_ids"].shape
    torch.Size([1, 256])
    """

    def __init__(self, length: int | None = None, *, encode: Any = None) -> None:
        self.length, self.encode = length, encode

    def __call__(self, batch: Sequence[Any]) -> Row:
        return collate([layout for item in batch for layout in self._layouts(item)], self.length)

    def _layouts(self, item: Any) -> list[Layout]:
        if is_document(item):
            return [item if isinstance(item, Layout) else _from_columns(item)]
        if isinstance(item, list) and all(map(is_document, item)):
            return [layout for part in item for layout in self._layouts(part)]
        if self.encode is None or item == {}:
            raise ValueError(f"Collator: expected layouts, found {_words_for(item)}")
        try:
            return [self.encode(item)]
        except ValueError as error:
            if words := _without_columns(item):
                raise ValueError(f"{error}; Collator: found {words}") from error
            raise


def is_document(item: Any) -> bool:
    """Whether it is a layout, or the columns of one."""
    return isinstance(item, Layout) or (isinstance(item, Mapping) and item.keys() >= {*PER_TOKEN, *PER_TARGET})


def _without_columns(item: Any) -> str | None:
    """What is wrong with an item from which a Trainer took columns out, and how to keep them; None for other items."""
    columns = {*PER_TOKEN, *PER_TARGET}
    if not isinstance(item, Mapping) or (item and not columns & item.keys()):
        return None
    missing = ", ".join(sorted(columns - item.keys()))
    item_words = f"a layout without its columns {missing}" if item else "an item without any columns"
    return f"{item_words}; a Trainer takes columns out unless its arguments say remove_unused_columns=False"


def _words_for(item: Any) -> str:
    if isinstance(item, Mapping) and {"document", "labels"} <= item.keys():
        return "a row of fr.collate, which is a batch by itself; give data_collator=lambda rows: rows[0]"
    keys = f" with the keys {', '.join(map(str, item))}" if isinstance(item, Mapping) else ""
    return _without_columns(item) or f"{type(item).__name__}{keys}; give encode=, which makes a layout of it"


def _from_columns(item: Mapping[str, Any]) -> Layout:
    return Layout(
        **{name: torch.as_tensor(item[name], dtype=dtype) for name, dtype in {**PER_TOKEN, **PER_TARGET}.items()}
    )
