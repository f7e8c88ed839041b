"""Whether two pieces of code are the same: not because they have one name, but because they run the same.

Within a process a class may be edited in place, and another may take its name: a cell of a notebook that runs again, a
reloaded file, a closure with another argument. So what was found out about a class is kept under its code, the values
and functions that this code names, and the values that its modules hold. Code of torch, transformers and what stands on
them is taken by object; a file of theirs that changed is told by its hash.
"""

import inspect
import sys
import weakref
from collections import deque
from collections.abc import Hashable, Iterator
from types import CodeType, FunctionType, MappingProxyType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig

from flexreason.model.find import WRAPPERS, home_of, is_of

TRUSTED = ("transformers", "flexreason", "numpy", "builtins", "typing", "collections", "logging", *WRAPPERS)

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype)

LONGEST = 1000
"""Longer lists and tables are not looked into."""

DEEPEST, MOST = 30, 20_000
"""Values are looked into this deep, and at most so many of them. A value beyond that equals only itself."""


class Same:
    """Stands for an object, and equals only what stands for the same object. It does not keep the object alive."""

    def __init__(self, what: Any) -> None:
        self.number = id(what)
        try:
            self.what: Any = weakref.ref(what)
        except TypeError:  # then it is kept, as numbers are given to others when their object is gone
            self.what = lambda: what

    def __hash__(self) -> int:
        return hash(self.number)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.what() is not None and self.what() is other.what()


def identity(value: Any) -> Hashable:
    """A key for a value. Two values have the same key only if they are one object, or equal plain values, or code that
    was written alike and works with equal values.

    >>> def scaled(by):
    ...     return lambda x: by * x
    >>> identity(scaled(2)) == identity(scaled(2)), identity(scaled(2)) == identity(scaled(3))
    (True, False)
    """
    return _identity(value, {}, 0)


def is_own(home: str) -> bool:
    """Whether a module, by its name, is somebody's own, and not one that all models stand on."""
    return not is_of(home, TRUSTED)


def _identity(value: Any, seen: dict[int, tuple[int, Any]], depth: int) -> Hashable:
    if isinstance(value, PLAIN):
        return type(value).__name__, value
    if id(value) in seen:
        return "again", seen[id(value)][0]
    if depth > DEEPEST or len(seen) > MOST:
        return Same(value)
    seen[id(value)] = len(seen), value  # which keeps it alive: another would get its id

    def each(values: Any) -> tuple[Hashable, ...]:
        return tuple(_identity(one, seen, depth + 1) for one in values)

    held = held_by(value) if is_own(type(value).__module__) else None
    own = () if held is None else each((type(value), *held, *held.values()))
    if isinstance(value, list | tuple | deque) and len(value) <= LONGEST:
        return "list", each(value), own
    if isinstance(value, dict | MappingProxyType) and len(value) <= LONGEST:
        return "table", each(value.keys()), each(value.values()), own
    if isinstance(value, set | frozenset) and len(value) <= LONGEST:
        return "set", frozenset(_identity(one, {}, depth + 1) for one in value), own
    if isinstance(value, property):
        return "property", each((value.fget, value.fset))
    if isinstance(value, MethodType):
        return "method", each((value.__func__, value.__self__))
    if isinstance(value, staticmethod | classmethod):
        return "method", each((value.__func__,))
    if isinstance(value, FunctionType):
        return "function", value.__code__, each(_beside(value))
    if type(value).__module__ == "functools":  # partial, partialmethod, cached_property; of lru_cache the last one
        return type(value).__name__, each(getattr(value, name, None) for name in ("func", "args", "keywords", WRAPPED))
    if isinstance(value, type):
        if not is_own(value.__module__):
            return Same(value)
        return "class", value.__module__, value.__qualname__, each(map(_of_class, value.__mro__))
    if isinstance(value, nn.Module):  # its weights count for nothing, here as anywhere
        return "module", each((type(part), _values_of(part)) for part in value.modules())
    if isinstance(value, PreTrainedConfig):
        return "config", each((type(value), vars(value)))
    if isinstance(value, np.ndarray) and value.size <= LONGEST:
        return "array", str(value.dtype), each(value.tolist() if value.ndim else [value.item()]), value.shape
    if isinstance(value, torch.Tensor) and value.numel() <= LONGEST and _is_value(value):
        return "tensor", value.dtype, tuple(value.shape), tuple(value.detach().flatten().tolist())
    return Same(value) if held is None else ("object", own)


WRAPPED = "__wrapped__"


def held_by(value: Any) -> dict[str, Any]:
    """What an object holds, also where its class names the places (`__slots__`)."""
    slots = [name for base in type(value).__mro__ if is_own(base.__module__) for name in _slots(base)]
    return {**getattr(value, "__dict__", {}), **{name: getattr(value, name, None) for name in slots}}


def _slots(base: type) -> list[str]:
    return [name for name, place in vars(base).items() if isinstance(place, MemberDescriptorType)]


def _values_of(module: nn.Module) -> dict[str, Any]:
    """What somebody's own module holds beside modules and weights; a library's holds much that changes nothing."""
    own = is_own(type(module).__module__)
    return {name: value for name, value in vars(module).items() if name not in BARE} if own else {}


BARE = vars(nn.Module()).keys()
"""What every module holds."""


def _is_value(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds numbers that can be read, and nobody trains them."""
    return not isinstance(tensor, nn.Parameter) and tensor.device.type != "meta" and type(tensor) is torch.Tensor


def _of_class(base: type) -> Any:
    """What other classes inherit from a class."""
    held = {name: value for name, value in sorted(vars(base).items()) if name not in WORDS}
    return held if is_own(base.__module__) else base


WORDS = {
    *("__dict__", "__weakref__", "__doc__", "__annotations__", "__annotate__", "__abstractmethods__", "_abc_impl"),
    *("__firstlineno__", "__static_attributes__", "__module__"),
}
"""Names that every class has, and that no code runs."""


def _beside(function: FunctionType) -> Iterator[Any]:
    """What a function's code works with: its defaults, what it closes over, what it wraps, and, if it is somebody's
    own, what it names."""
    yield function.__defaults__
    yield function.__kwdefaults__
    for cell in function.__closure__ or ():
        yield inspect.getattr_static(cell, "cell_contents", None) if _is_empty(cell) else cell.cell_contents
    if not is_own(home_of(function)):
        yield vars(function).get(WRAPPED)
        return
    yield vars(function)
    named = sorted(names_in(function.__code__))
    spaces, looked_at = [function.__globals__, _imported(named)], set[int]()
    for space in spaces:
        for name in named:
            value = space.get(name)
            if isinstance(value, ModuleType) and is_own(value.__name__):
                if id(value) not in looked_at:
                    looked_at.add(id(value))
                    spaces.append(vars(value))  # as in `helpers.shift(x)`
            elif name in space:
                yield value


def _imported(named: list[str]) -> dict[str, Any]:
    """The modules that code may import where it runs."""
    return {name: sys.modules[name] for name in named if name in sys.modules}


def _is_empty(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def names_in(code: CodeType) -> set[str]:
    """All names and words in code, and in the code inside it."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= names_in(constant)
        elif isinstance(constant, str):
            found.add(constant)
    return found
