"""What one model is made of: the kinds of its modules, where their `forward` is from, and the values that they hold.

Parts of two models are compared as the objects that they are (identity.py); their words are for people.
"""

import re
from collections.abc import Hashable, Iterator
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig

from flexreason.model.find import WRAPPERS, home_of, is_of, links_of, packages_of, put_in_place
from flexreason.proof.harmless import ADAPTERS, QUANTISED, WRAPPED, code_of, is_harmless, written_as
from flexreason.proof.identity import PLAIN, held_by, identity, is_own, names_in

HEADS = ("trl",)
"""Packages whose heads, put in the place of a model's own forward, take a row's labels as they are, unshifted."""

LIBRARIES = {"torch", *(name.partition(".")[0] for name in (*WRAPPED, *QUANTISED, *ADAPTERS))} - {"transformers"}
"""Packages whose modules stand in for linear layers, wrap others, or share them out."""

DEEPEST = 5
"""Values are looked into this deep."""

STATES = {*vars(nn.Module()), "training", "gradient_checkpointing", "forward"}
"""What modules hold beside what their class gave them."""


class Part(NamedTuple):
    words: str
    what: Hashable = None  # its identity, where neither transformers nor torch brought it

    @property
    def is_foreign(self) -> bool:
        """Whether neither transformers nor torch brought it."""
        return not self.words.startswith(("transformers.", "torch."))


def parts_of(root: nn.Module) -> set[Part]:
    """The kinds of modules in a model, beside harmless ones; the functions that stand in them in the place of those of
    their class; and where somebody's own code is among them, the plain values that it may read."""
    parts, kinds, functions = set[Part](), set[type](), list[Any]()
    for module in root.modules():
        for name, value in put_in_place(module).items():
            if (by := _replaced_by(module, name)) and not (module is root and is_of(by, HEADS)):
                parts.add(Part(f"{name} of {type(module).__name__}, by {by}", identity(value)))
                functions += links_of(value)
        if module is not root and is_harmless(module):
            continue
        kind, code = written_as(type(module)), code_of(module)
        kinds.add(kind)
        if module is not root:
            part = Part(f"{kind.__module__}.{kind.__qualname__}" + (f" (code {code})" if code else ""))
            parts.add(part._replace(what=identity(kind)) if part.is_foreign else part)
        forward: Any = getattr(kind, "forward", None)  # which scripted modules do not have
        if by := _written_elsewhere(kind, forward):
            parts.add(Part(f"forward of {kind.__name__}, by {by}", identity(forward)))
    bases = {base for kind in kinds if _is_own(kind) for base in kind.__mro__ if _is_own(base)}
    functions += [value for base in bases for value in vars(base).values()]
    return parts | set(_values(root, functions))


def _values(root: nn.Module, functions: list[Any]) -> Iterator[Part]:
    """What the modules of a model hold under names that somebody's own functions mention."""
    codes = [f.__code__ for f in map(_function, functions) if f is not None and is_own(home_of(f))]
    named = {name for code in codes for name in names_in(code)} - STATES
    for module in root.modules() if named else ():
        if _package(type(module)) not in LIBRARIES:
            for name in named & vars(module).keys():
                if _is_plain(value := vars(module)[name]):
                    yield Part(f"{type(module).__name__}.{name} = {_short(value)}", identity(value))


def _function(value: Any) -> FunctionType | None:
    value = getattr(value, "fget", None) or getattr(value, "__func__", value)
    while not isinstance(value, FunctionType) and hasattr(value, "__wrapped__"):
        value = value.__wrapped__
    return value if isinstance(value, FunctionType) else None


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Whether a value says something by itself, and holds no module, tensor, config or place."""
    if isinstance(value, nn.Module | torch.Tensor | PreTrainedConfig | torch.device) or depth > DEEPEST:
        return False
    if isinstance(value, PLAIN) or callable(value):
        return True
    inside = list(value) if isinstance(value, list | tuple | set) else []
    inside += value.values() if isinstance(value, dict) else held_by(value).values()
    known = isinstance(value, list | tuple | set | dict) or is_own(type(value).__module__)
    return known and all(_is_plain(one, depth + 1) for one in inside)


def _short(value: Any) -> str:
    return getattr(value, "__qualname__", None) or re.sub(r" at 0x\w+", "", repr(value))[:40]


def _is_own(kind: type) -> bool:
    """Whether neither transformers nor a library brought a class."""
    return _package(kind) not in ("transformers", *LIBRARIES)


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _replaced_by(module: nn.Module, name: str) -> str:
    """What replaced a function of a module's class, or nothing where there are only known wrappers around it."""
    for link in links_of(vars(module)[name]):
        if getattr(link, "__func__", link) is getattr(type(module), name, None):
            return ""
        if not is_of(home_of(link), WRAPPERS):
            return f"{home_of(link)}.{getattr(link, '__qualname__', type(link).__name__)}"
    return ""


def _written_elsewhere(kind: type, forward: Any) -> str:
    """The package of a forward that was put into a class from outside, or around its own; or nothing."""
    harmless = [*packages_of(kind), *WRAPPERS]
    homes = map(home_of, links_of(forward))
    return next((home for home in homes if not is_of(home, harmless)), "")
