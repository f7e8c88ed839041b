"""Which code in a model is somebody's own: not of transformers, nor of another package that is looked at elsewhere."""

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from flexreason.model.find import home_of, is_of, links_of, put_in_place
from flexreason.model.holders import KNOWN

FAMILIAR = (*KNOWN, "flexreason", "builtins")
"""Packages whose code in a model is looked at elsewhere."""

PLAIN = (nn.Linear, nn.Embedding, nn.Identity, nn.Dropout, nn.ModuleList, nn.ModuleDict, nn.ParameterDict)
"""Modules of torch that adapters bring, many to a model."""

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
"""Where torch keeps the hooks of a module."""


def code_of(module: nn.Module) -> Iterator[Any]:
    """The code that a module runs and that is somebody's own: its class, its functions, and what these call by name."""
    kind = type(module)
    if not is_of(kind.__module__, FAMILIAR) or (is_of(kind.__module__, ("torch.nn.modules",)) and kind not in PLAIN):
        yield kind
    for function in (getattr(kind, "forward", None), *called_by(kind), *put_in_place(module).values()):
        for link in links_of(function):
            if not is_of(home_of(link), FAMILIAR):
                yield getattr(link, "__func__", link)


def called_by(kind: Any) -> list[Any]:
    """The functions that the forward of a class calls by name."""
    own: Any = getattr(kind, "forward", None)
    forward = inspect.unwrap(own)
    code, space = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
    values = [space[name] for name in getattr(code, "co_names", ()) if name in space]
    return [value for value in values if callable(value) and not isinstance(value, type)]


def hooks_of_accelerate(module: nn.Module) -> Iterator[Any]:
    """Somebody's own hooks that accelerate put around a forward."""
    hook = vars(module).get("_hf_hook")
    for one in getattr(hook, "hooks", [hook]):
        if not is_of(type(one).__module__, FAMILIAR):
            yield type(one)


def is_somebodys(hook: Any) -> bool:
    return any(not is_of(home_of(link), FAMILIAR) for link in links_of(hook))


def state_of(module: nn.Module) -> tuple:
    """A value that changes when code is put into a module."""
    kind: Any = type(module)
    hooks = [number for name in HOOKS for number in getattr(module, name)]
    held = vars(module)
    return held.get("forward"), getattr(kind, "forward", None), held.get("_hf_hook"), len(held), *hooks


def name_of(code: Any) -> str:
    code = code if isinstance(code, type) else next(links_of(code))
    home = code.__module__ if isinstance(code, type) else home_of(code)
    return f"{home}.{getattr(code, '__qualname__', type(code).__name__)}"
