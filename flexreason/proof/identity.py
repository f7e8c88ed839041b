"""Whether two pieces of code are the same: not because they have one name, but because they run the same.

Within a process a class may be edited in place, and another may take its name: a cell of a notebook that runs again, a
reloaded file, a closure with another argument. So what was found out about a class is kept under its code, the values
and functions that this code names, and the values that its modules hold. Code of torch, transformers and what stands on
them is taken by object; a file of theirs that changed is told by its hash.
"""

import inspect
import weakref
from collections.abc import Hashable, Iterator
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from flexreason.model.find import WRAPPERS, home_of, is_of

TRUSTED = ("transformers", "flexreason", "numpy", "builtins", "typing", "collections", *WRAPPERS)

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

    if isinstance(value, list | tuple) and len(value) <= LONGEST:
        return "list", each(value)
    if isinstance(value, dict) and len(value) <= LONGEST:
        return "table", each(value.keys()), each(value.values())
    if isinstance(value, set | frozenset) and len(value) <= LONGEST:
        return "set", frozenset(_identity(one, {}, depth + 1) for one in value)
    if isinstance(value, property):
        return "property", each((value.fget, value.fset))
    if isinstance(value, partial):
        return "partial", each((value.func, value.args, value.keywords))
    if isinstance(value, MethodType | staticmethod | classmethod):
        return "method", _identity(value.__func__, seen, depth + 1)
    if isinstance(value, FunctionType):
        return "function", value.__code__, each(_beside(value))
    if isinstance(value, type):
        if not is_own(value.__module__):
            return Same(value)
        return "class", value.__module__, value.__qualname__, each(map(_of_class, value.__mro__))
    if not isinstance(value, nn.Module | PreTrainedConfig | torch.Tensor) and is_own(type(value).__module__):
        return "object", each((type(value), getattr(value, "__dict__", None)))
    return Same(value)


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
    yield vars(function).get("__wrapped__")
    if not is_own(home_of(function)):
        return
    named = sorted(names_in(function.__code__))
    for name in named:
        value = function.__globals__.get(name)
        if isinstance(value, ModuleType) and is_own(value.__name__):
            yield [vars(value).get(other) for other in named]  # as in `helpers.shift(x)`
        elif name in function.__globals__:
            yield value


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
