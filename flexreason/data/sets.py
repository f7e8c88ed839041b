"""A data set of conversations, as one of layouts: lists, and tables and streams of `datasets`.

Where all entries are at hand they are encoded once, and those that are refused are told together. A stream is encoded
as it comes. What holds layouts or rows stays as it is, and so do data sets of other classes, whose items the collator
encodes.

>>> layouts, refusals = encode_set([{"prompt_ids": [1, 2], "target_ids": [3]}], EntryEncoder(None))
>>> layouts
[Layout(3 tokens, 1 targets, 1 samples of 3 tokens)]
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from flexreason.chat.errors import ConversationError
from flexreason.data.collator import is_document
from flexreason.data.formats import BadInput
from flexreason.data.intake import EntryEncoder, Refusals, Refused
from flexreason.data.tables import check_one_set, features_of, is_transformed, row_as_entry, table_of
from flexreason.tree.layout import PER_TARGET, PER_TOKEN, Layout

COLUMNS = {**PER_TOKEN, **PER_TARGET}

NOTHING = {name: torch.zeros(0, dtype=dtype).numpy() for name, dtype in COLUMNS.items()}

REASON, WORDS = "refused_for", "refused_in_words"
"""Columns of a table while it is encoded: why an entry is refused, by class and in words; empty where it is not."""


class TooLong(ConversationError):
    reason = "longer than the longest sample"


class Iterated(IterableDataset):
    """Any iterable, as a stream for a loader."""

    def __init__(self, items: Iterable[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        return iter(self.items) if worker is None else islice(self.items, worker.id, None, worker.num_workers)


def encode_set(
    data: Any,
    encoder: EntryEncoder,
    *,
    longest: int | None = None,
    length: int | None = None,
    skip_invalid: bool = False,
    workers: int | None = None,
) -> tuple[Any, Refusals]:
    """The data set with layouts in the place of conversations, and what was refused of it.

    Args:
        data: Conversations, layouts or rows.
        encoder: What makes layouts of conversations.
        longest: The most tokens of a sample; a conversation with a longer one is refused.
        length: Of a row, into which a whole conversation has to fit.
        skip_invalid: Go on without conversations that are refused, unless all are.
        workers: Processes that encode a table.
    """
    check_one_set(data)
    take = partial(_take, encoder, longest, length)
    data, features = table_of(data)
    if isinstance(data, list | tuple):
        are_encoded = any(_is_encoded(item) and not _is_empty(item) for item in data)
        taken = [
            # an empty list is a row without layouts among others, and else a conversation without messages
            item if _is_encoded(item) and (are_encoded or not _is_empty(item)) else take(item, number)
            for number, item in enumerate(data)
        ]
        kept = [item for item in taken if not isinstance(item, ConversationError)]
        return kept, _told([item for item in taken if isinstance(item, ConversationError)], len(taken), skip_invalid)
    if hasattr(data, "map") and hasattr(data, "column_names") and not is_transformed(data):
        if COLUMNS.keys() <= set(data.column_names or ()):
            return data, Refusals()
        columns = partial(_columns, take, features)
        if hasattr(data, "__len__"):
            return _table(data, columns, skip_invalid, workers)
        return _stream(data, columns, skip_invalid), Refusals()
    if isinstance(data, Iterator):
        raise ValueError(
            f"data: a {type(data).__name__} can be gone over once only; give a list, or an object that begins anew at "
            "every iter(...)"
        )
    is_set = hasattr(data, "__getitem__") or isinstance(data, IterableDataset)
    return (data if is_set else Iterated(data)), Refusals()


def _is_encoded(item: Any) -> bool:
    """Whether it is a layout, or the layouts of a row, or a row."""
    is_row = isinstance(item, Mapping) and {"document", "labels"} <= item.keys()
    return is_row or is_document(item) or (isinstance(item, list) and all(map(is_document, item)))


def _is_empty(item: Any) -> bool:
    return isinstance(item, list) and not item


def _take(
    encoder: EntryEncoder, longest: int | None, length: int | None, entry: Any, number: int, features: Any = None
) -> Layout | ConversationError:
    """The layout of an entry, or the reason why it has none, which names it by its number."""
    where = f"entry {number}"
    try:
        layout = encoder.layout(row_as_entry(entry, features, where), where)
    except BadInput as error:  # which says where
        return error
    except ConversationError as error:
        error.args = (f"{where}: {error}",)
        return error
    tokens = int(layout.position_ids[layout.target_source].max()) + 2
    if longest is not None and tokens > longest:
        return TooLong(f"{where}: a sample of {tokens} tokens, where {longest} are the most; nothing is ever cut")
    if length is not None and len(layout) > length:
        return TooLong(f"{where}: a tree of {len(layout)} tokens, in rows of {length}; use longer rows, or fr.split it")
    return layout


def _columns(take: Any, features: Any, entry: Any, number: int) -> dict[str, Any]:
    """The same as columns of a table."""
    if is_document(entry):
        return {**entry, REASON: "", WORDS: ""}
    taken = take(entry, number, features or features_of(entry))
    if isinstance(taken, ConversationError):
        return {**NOTHING, REASON: taken.reason, WORDS: str(taken)}
    return {**{name: tensor.numpy() for name, tensor in vars(taken).items()}, REASON: "", WORDS: ""}


def _table(data: Any, columns: Any, skip_invalid: bool, workers: int | None) -> tuple[Any, Refusals]:
    import datasets

    kinds = {
        name: datasets.Sequence(datasets.Value(str(dtype).removeprefix("torch."))) for name, dtype in COLUMNS.items()
    }
    made = data.map(
        columns,
        with_indices=True,
        remove_columns=data.column_names,
        features=datasets.Features({**kinds, REASON: datasets.Value("string"), WORDS: datasets.Value("string")}),
        num_proc=workers,
        desc="encoding conversations",
    )
    refused = [_named(reason, words) for reason, words in zip(made[REASON], made[WORDS], strict=True) if reason]
    refusals = _told(refused, len(made), skip_invalid)
    if refused:
        made = made.filter(_is_taken, input_columns=REASON)
    return made.remove_columns([REASON, WORDS]), refusals


def _stream(data: Any, columns: Any, skip_invalid: bool) -> Any:
    made = data.map(columns, with_indices=True)
    return made.filter(_is_taken_or_told) if skip_invalid else made.map(_or_raise)


def _is_taken(reason: str) -> bool:
    return not reason


def _is_taken_or_told(entry: dict[str, Any]) -> bool:
    if entry[REASON]:
        warnings.warn(f"flexreason: left out ({entry[REASON]}): {entry[WORDS]}", stacklevel=2)
    return not entry[REASON]


def _or_raise(entry: dict[str, Any]) -> dict[str, Any]:
    if entry[REASON]:
        raise _named(entry[REASON], entry[WORDS])
    return entry


def _named(reason: str, words: str) -> ConversationError:
    error = ConversationError(words)
    error.reason = reason
    return error


def _told(refused: list[ConversationError], n_read: int, skip_invalid: bool) -> Refusals:
    """What was refused, by class; raised unless it may be left out."""
    refusals = Refusals()
    for error in refused:
        refusals.add(error.reason, str(error))
    if refused and (not skip_invalid or len(refused) == n_read):
        raise Refused(refusals, n_read)
    return refusals
