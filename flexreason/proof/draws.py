"""Makes every random number the same, so that a model which draws random numbers can be compared with itself.

A row and its samples draw different numbers, since they have different numbers of tokens. With all draws equal, what
is left is what the model does in training and not in evaluation.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

DRAWN = 0.5


class SameDraws(TorchDispatchMode):
    """While it is on, torch draws the same number always, and dropout keeps everything."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded not in func.tags or "attention" in func.__name__:  # which is refused
            return found
        if func is torch.ops.aten.native_dropout.default:
            given, p, *_ = args
            return given / (1 - p), torch.ones_like(given, dtype=torch.bool)  # as its backward takes it
        if isinstance(found, torch.Tensor):
            return found.fill_(DRAWN if found.is_floating_point() else 0)
        return found
