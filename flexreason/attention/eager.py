"""The eager attention of a layer, which transformers writes anew in the file of every model."""

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

EAGER = "eager_attention_forward"
"""What its name is, or ends with."""


def eager_of(module: nn.Module) -> Callable:
    """The eager attention of a layer: what its code finds under that name, or one that ends so.

    Code looks where it was written: a class that inherits it may come from a file with another function of that name.
    """
    cls = type(module)
    for method in _methods(module):
        code = getattr(method, "__code__", None)
        for name in getattr(code, "co_names", ()):
            if name.endswith(EAGER) and name in method.__globals__:
                return method.__globals__[name]
    for kind in cls.__mro__:
        if attention := getattr(sys.modules[kind.__module__], EAGER, None):
            return attention
    raise ValueError(f'the eager attention of {cls.__name__} is not found; use set_attn_implementation("sdpa")')


def _methods(module: nn.Module) -> Iterator[Any]:
    """The code of a layer: first what its forward may be, then all else."""
    parts = [vars(module), *map(vars, type(module).__mro__)]
    every = [part["forward"] for part in parts if "forward" in part]
    for part in parts[1:]:
        every += part.values()
    for method in every:
        yield inspect.unwrap(getattr(method, "__func__", method))
