"""What a model must learn: samples, and the roles their tokens play.

A *sample* is one plain training sequence: what inference would see (`prompt_ids`), then what the model
must generate (`target_ids`). A conversation of N assistant turns is N samples, and those N samples are
the definition of correct for everything else in this package.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import Any

import numpy as np
import torch
from torch import Tensor

Ids = Sequence[int] | Tensor
"""Token ids as users have them: a list, a tuple, an array or a 1-D integer tensor."""

UNSAID = -1
"""In `Sample.prompt_turns`: this token's turn is not said."""

LARGEST_ID = 2**31 - 1


class Role(IntFlag):
    """What a token is in its conversation. Flags, since a response can be generated and context at once.

    >>> Role.CONTEXT | Role.RESPONSE
    <Role.CONTEXT|RESPONSE: 12>
    """

    PROMPT = 1  # h: system, human, tool, headers
    REASONING = 2  # t
    CONTEXT = 4  # r_in: a response as later turns see it
    RESPONSE = 8  # r_out: a response as it is generated
    PAD = 16  # fills a row; no sample holds it


SAMPLE_ROLES = Role.PROMPT | Role.REASONING | Role.CONTEXT | Role.RESPONSE


@dataclass(frozen=True)
class Sample:
    """One plain training sequence; its length is that of prompt and target together.

    >>> sample = Sample(prompt_ids=[5, 6], target_ids=[7])
    >>> sample
    Sample(prompt_ids=[5, 6], target_ids=[7], prompt_roles=None, target_roles=None, prompt_turns=None)
    >>> len(sample)
    3

    Roles and turns are for reading a layout, and for the paper's own mask rule; they never change what is
    computed for a sample. Unsaid prompts are `Role.PROMPT`, unsaid targets `Role.RESPONSE`; in
    `prompt_turns`, -1 leaves a token's turn unsaid. Nothing is checked here: `lay_out` does that, where it
    can say which sample is meant.
    """

    prompt_ids: Ids
    target_ids: Ids
    prompt_roles: Ids | None = None
    target_roles: Ids | None = None
    prompt_turns: Ids | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.target_ids)


def as_ids(ids: Any, owner: str, *, lowest: int = 0) -> Tensor:
    """The int32 tensor [n] of `ids`, or a ValueError that starts with `owner` ("sample 3: prompt_ids")."""
    if hasattr(ids, "dtype"):
        tensor = torch.as_tensor(ids)
        if tensor.dim() != 1:
            raise ValueError(f"{owner}: expected one dimension, found shape {tuple(tensor.shape)}")
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool:
            raise ValueError(f"{owner}: expected integers, found a tensor of {tensor.dtype}")
        tensor = tensor.cpu()
    else:
        tensor = _from_python(ids, owner)
    values = tensor.numpy()  # and not torch, which shares long lines out among threads; see merge.py
    if len(values):
        low, high = int(values.min()), int(values.max())
        if low < lowest or high > LARGEST_ID:
            at = int(((values < lowest) | (values > LARGEST_ID)).argmax())
            raise ValueError(
                f"{owner}[{at}]: expected an integer from {lowest} to {LARGEST_ID}, found {int(values[at])}"
            )
    return torch.from_numpy(values.astype(np.int32))


def _from_python(ids: Any, owner: str) -> Tensor:
    try:
        packed = array("q", ids)
    except (TypeError, OverflowError):
        if not isinstance(ids, Sequence) or isinstance(ids, str | bytes):
            raise ValueError(
                f"{owner}: expected a list or 1-D tensor of token ids, found {type(ids).__name__}"
            ) from None
        for at, value in enumerate(ids):
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise ValueError(f"{owner}[{at}]: expected an integer, found {value!r}") from None
            if not -(2**63) <= int(value) < 2**63:
                raise ValueError(f"{owner}[{at}]: expected an integer up to {LARGEST_ID}, found {value!r}") from None
        raise
    if not packed:
        return torch.empty(0, dtype=torch.int64)
    return torch.frombuffer(packed, dtype=torch.int64)


def one_device(tensors: dict[str, Any], owner: str) -> torch.device | None:
    """The device that all tensors among `tensors` are on, or a ValueError that names two that differ."""
    devices = {name: t.device for name, t in tensors.items() if isinstance(t, Tensor)}
    if len(set(devices.values())) > 1:
        (name, device), *rest = devices.items()
        other, elsewhere = next((n, d) for n, d in rest if d != device)
        raise ValueError(
            f"{owner}: expected all tensors on one device, found {name} on {device} and {other} on "
            f"{elsewhere}; move them with .to(device) first"
        )
    return next(iter(devices.values()), None)
