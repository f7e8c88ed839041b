"""Layouts on disk: an Arrow file, mapped into memory, so that data may be larger than that.

>>> import flexreason as fr, tempfile
>>> path = Path(tempfile.mkdtemp()) / "layouts.arrow"
>>> write_documents(path, [(7, fr.lay_out_turns([([1, 2], [10, 11], [20]), ([3], [12], [21])]))])
1
>>> documents = Documents(path)
>>> documents[0], documents.sizes, documents.conversation(0)
(Layout(9 tokens, 5 targets, 2 samples of 11 tokens), array('i', [9]), 7)
"""

import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flexreason.tree.layout import PER_TARGET, PER_TOKEN, Layout

if TYPE_CHECKING:
    import pyarrow

TOGETHER = 64
"""Documents in a record batch."""

COLUMNS = [name for name in (*PER_TOKEN, *PER_TARGET) if name != "target_weight"]

WEIGHTINGS = ("token", "turn")


def _arrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError("data on disk needs pyarrow: pip install 'flexreason[train]'") from error
    return pyarrow


def write_documents(path: Path, documents: Iterable[tuple[int, Layout]]) -> int:
    """Write documents, each with the number of its conversation; how many there were. The file appears when it is
    whole."""
    pa = _arrow()
    ints = pa.list_(pa.int32())
    schema = pa.schema([("conversation", pa.int64()), *((name, ints) for name in COLUMNS)])
    unfinished = path.with_name(path.name + ".unfinished")
    n_written, following = 0, iter(documents)
    with pa.OSFile(str(unfinished), "wb") as file:
        with pa.ipc.new_file(file, schema) as writer:
            for batch in iter(lambda: list(islice(following, TOGETHER)), []):
                columns = [pa.array([number for number, _ in batch], pa.int64())]
                for name in COLUMNS:
                    parts = [getattr(layout, name).to(torch.int32) for _, layout in batch]
                    ends = torch.tensor([0, *map(len, parts)]).cumsum(0).to(torch.int32)
                    columns.append(pa.ListArray.from_arrays(ends.numpy(), torch.cat(parts).numpy()))
                writer.write_batch(pa.record_batch(columns, schema=schema))
                n_written += len(batch)
        file.flush()
    with unfinished.open("rb") as written:
        os.fsync(written.fileno())
    unfinished.replace(path)
    return n_written


class Documents(Sequence[Layout]):
    """The layouts of a file, by number.

    With `weighting="token"` all targets weigh alike; with "turn" all turns do, however many targets they have.
    """

    def __init__(self, path: str | Path, weighting: str = "token") -> None:
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting: expected one of {', '.join(WEIGHTINGS)}, found {weighting!r}")
        self.path, self.weighting = str(path), weighting
        self._reader: Any = None
        self.sizes = array("i")
        for number in range(self._file.num_record_batches):
            lengths = self._file.get_batch(number).column("input_ids").value_lengths()
            self.sizes.extend(lengths.to_pylist())

    @property
    def _file(self) -> "pyarrow.ipc.RecordBatchFileReader":
        if self._reader is None:
            pa = _arrow()
            self._reader = pa.ipc.open_file(pa.memory_map(self.path))
        return self._reader

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_reader": None}

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(f"Documents: no document {number} of {len(self)}")
        batch, within = self._file.get_batch(number // TOGETHER), number % TOGETHER
        dtypes = {**PER_TOKEN, **PER_TARGET}
        columns = {
            name: torch.tensor(batch.column(name)[within].values.to_numpy(zero_copy_only=False), dtype=dtypes[name])
            for name in COLUMNS
        }
        weight = torch.ones(len(columns["target_ids"]), dtype=dtypes["target_weight"])
        return weighted(Layout(**columns, target_weight=weight), self.weighting)

    def conversation(self, number: int) -> int:
        """The number of the conversation that a document is, or is a part of."""
        return self._file.get_batch(number // TOGETHER).column("conversation")[number % TOGETHER].as_py()


def weighted(layout: Layout, weighting: str) -> Layout:
    """The layout with weights: 1 for each target ("token"), or 1 / the number of targets of its turn ("turn")."""
    weight = torch.ones_like(layout.target_weight)
    if weighting == "turn":
        weight /= torch.bincount(layout.target_turn)[layout.target_turn]
    return replace(layout, target_weight=weight)
