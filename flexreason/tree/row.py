"""Rows: layouts packed side by side, as the keywords a patched model takes.

>>> from flexreason import Sample, lay_out
>>> row = collate([lay_out([Sample([5, 6], [7])]), lay_out([Sample([8], [9])])])
>>> row["input_ids"][0, :6].tolist(), row["document"][0, :6].tolist(), row["until"][0, :6].tolist()
([5, 6, 7, 8, 9, 0], [0, 0, 0, 1, 1, -1], [3, 3, 3, 5, 5, 6])
>>> row["target_source"][0, :4].tolist(), row["labels"][0, :4].tolist()
([1, 3, 0, 0], [7, 9, -100, -100])

Nothing needs to be said about where a document ends: `until` never reaches beyond it. A padding token sees
itself and is seen by nobody else.

Shapes: S tokens, T targets.
"""

import sys
from collections.abc import Sequence
from itertools import accumulate
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexreason.tree.blocks import BLOCK
from flexreason.tree.layout import Layout
from flexreason.tree.sample import Role, one_device

Row = dict[str, Tensor]

IGNORED = -100
"""The label that losses leave out."""

ROW_KEYS = {
    *("until", "turn", "role", "document"),
    *("target_source", "target_turn", "target_document", "target_weight"),
}
"""What only rows have; a stock model's own keywords are not among them."""

NOBODY = -1
"""Turn and document of padding and of ignored targets."""


def collate(layouts: Sequence[Layout], length: int | None = None, *, block_size: int = BLOCK) -> Row:
    """One row of tensors [1, S] and [1, T], for `model(**row)` with a patched model.

    S is `length`, or else the least multiple of `block_size` that holds the layouts. T is the number of targets
    rounded up, with targets that are ignored, so that compiled code sees few shapes; T never equals S. No
    layouts make an empty row, which adds nothing to a loss or gradient.

    `attention_mask` is empty in its last dimensions on purpose: a model that is not patched raises on it
    instead of computing something else, and `NoMask` says why.

    >>> from flexreason import Sample, lay_out
    >>> row = collate([lay_out([Sample([1, 2], [3])]), lay_out([Sample([4], [5])])])
    >>> row["input_ids"].shape, row["input_ids"][0, :6].tolist(), row["document"][0, :6].tolist()
    (torch.Size([1, 128]), [1, 2, 3, 4, 5, 0], [0, 0, 0, 1, 1, -1])
    """
    _check_layouts(layouts)
    starts = [0, *accumulate(len(layout) for layout in layouts)]
    if length is None:
        length = max(1, -(-starts[-1] // block_size)) * block_size
    _check_length(layouts, starts, length, block_size)
    n_padding = length - starts[-1]
    n_targets = sum(len(layout.target_ids) for layout in layouts)
    n_ignored = round_up_targets(n_targets, length) - n_targets

    device = layouts[0].device if layouts else torch.device("cpu")
    documents = [_document(number, starts[number], layout) for number, layout in enumerate(layouts)]
    padding = {
        "input_ids": torch.zeros(n_padding, dtype=torch.int64),
        "position_ids": torch.zeros(n_padding, dtype=torch.int64),
        "until": torch.arange(starts[-1] + 1, length + 1, dtype=torch.int32),
        "turn": torch.full((n_padding,), NOBODY, dtype=torch.int32),
        "role": torch.full((n_padding,), Role.PAD, dtype=torch.int32),
        "document": torch.full((n_padding,), NOBODY, dtype=torch.int32),
        "labels": torch.full((n_ignored,), IGNORED),
        "target_source": torch.zeros(n_ignored, dtype=torch.int64),
        "target_turn": torch.full((n_ignored,), NOBODY),
        "target_document": torch.full((n_ignored,), NOBODY),
        "target_weight": torch.from_numpy(np.zeros(n_ignored, np.float32)),  # whatever dtype is the default one
    }
    row = {
        name: torch.cat([*(document[name] for document in documents), rest.to(device)])[None]
        for name, rest in padding.items()
    }
    row["shift_labels"] = row["labels"]
    row["attention_mask"] = torch.empty(1, 1, 0, 0, device=device).as_subclass(NoMask)
    return row


SIZE = [vars(torch._C.TensorBase)[name].__get__ for name in ("ndim", "shape")]
"""What torch says is called where somebody asks for `tensor.ndim`, or for its shape."""

MAKERS = ("create_recurrent_attention_mask", "_preprocess_mask_arguments")
"""Where transformers asks, before layers compute: for recurrent layers it would take this for no padding at all."""


class NoMask(Tensor):
    """A row's attention_mask. All is done with it as with any empty tensor; where that raises, it is told why.

    What comes of it is a plain tensor, unless it is such a mask itself (moved, cast, sliced); what is saved is one too.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling():
            return super().__torch_function__(func, types, args, kwargs or {})
        try:
            if func is Tensor.__getitem__ and isinstance(args[1], tuple) and len(args[1]) == 4:
                raise IndexError("a mask of no tokens is cut to the keys")  # who does so is about to use it
            if func in SIZE and _asker() in MAKERS:
                raise RuntimeError("a mask of no tokens is taken for one of all tokens; call fr.patch(model) first")
            result = super().__torch_function__(func, types, args, kwargs or {})
        except (RuntimeError, ValueError, IndexError) as error:
            raise RuntimeError(
                "row: this model is not patched, or no longer, and takes no rows: call fr.patch(model) first "
                f"({type(error).__name__}: {error})"
            ) from error
        return result.plain() if type(result) is cls and (result.dim() != 4 or result.numel()) else result

    def __copy__(self) -> Tensor:
        return self.clone()

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().__reduce_ex__(protocol)

    def plain(self) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    def to_other_process(self) -> Any:
        return _from_other_process, (self.plain(),)


def _asker() -> str:
    """The function that asked a mask; modes of torch (`with torch.device(...)`) stand in between."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("torch."):
        frame = frame.f_back
    return frame.f_code.co_name


def _from_other_process(plain: Tensor) -> Tensor:
    return plain.as_subclass(NoMask)


ForkingPickler.register(NoMask, NoMask.to_other_process)


def round_up_targets(n_targets: int, length: int) -> int:
    """The size of a row's target tensors: one of about 32 values, at least one, and never the row's own length."""
    step = max(8, 2 ** (length - 1).bit_length() // 32)
    rounded = max(1, -(-n_targets // step)) * step
    return rounded + step if rounded == length else rounded


def _document(number: int, start: int, layout: Layout) -> Row:
    """A layout's tensors as they stand in a row, from index `start` on."""
    return {
        "input_ids": layout.input_ids,
        "position_ids": layout.position_ids,
        "until": layout.until + start,
        "turn": layout.turn,
        "role": layout.role,
        "document": torch.full_like(layout.turn, number),
        "labels": layout.target_ids,
        "target_source": layout.target_source + start,
        "target_turn": layout.target_turn,
        "target_document": torch.full_like(layout.target_turn, number),
        "target_weight": layout.target_weight,
    }


def _check_layouts(layouts: Sequence[Layout]) -> None:
    if not isinstance(layouts, Sequence):
        raise ValueError(f"collate: expected a list of layouts, found {type(layouts).__name__}")
    for number, layout in enumerate(layouts):
        if not isinstance(layout, Layout):
            raise ValueError(f"collate: expected layouts, found {type(layout).__name__} as number {number}")
    one_device({f"layout {number}": layout.input_ids for number, layout in enumerate(layouts)}, "collate")


def _check_length(layouts: Sequence[Layout], starts: list[int], length: int, block_size: int) -> None:
    if length < 1 or length % block_size:
        raise ValueError(
            f"collate: expected a length that is a multiple of {block_size}, found {length}; "
            f"try {max(1, -(-length // block_size)) * block_size}"
        )
    for number, layout in enumerate(layouts):
        if starts[number + 1] > length:
            taken = f" behind {starts[number]} tokens of the layouts before it" if number else ""
            alone = "put fewer into a row, or let fr.Rows fill rows"
            remedy = alone if len(layout) <= length else "use a longer row, or fr.split it"
            raise ValueError(
                f"collate: layout {number} has {len(layout)} tokens and does not fit into a row of {length}{taken}; "
                f"{remedy} (nothing is ever cut)"
            )
