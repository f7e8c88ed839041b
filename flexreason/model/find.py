"""What is found in and around a model: the one with a head inside its wrappers, and who replaced a forward."""

import contextlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial, partialmethod
from typing import Any

from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from flexreason.attention.registry import find_decoder

ATTRIBUTE = "_flexreason"
"""Where a model keeps its `Patch`."""

WRAPPERS = ("functools", "accelerate", "torch", "peft")
"""Packages whose functions, put around a forward, leave what it computes."""


def find_root(model: nn.Module) -> PreTrainedModel:
    """The transformers model with a head inside whatever wraps it (PEFT, compile, DDP).

    Of several, the one that is called by the forward of what holds them; or the one that is patched.
    """
    roots = _roots(model) if isinstance(model, nn.Module) else {}
    if not roots:
        raise ValueError(
            f"patch: expected a transformers model with an LM head (...ForCausalLM), found {type(model).__name__}"
        )
    patched = {name: root for name, root in roots.items() if ATTRIBUTE in vars(root)}
    if len(roots) > 1 and len(patched) != 1:
        raise ValueError(
            f"patch: {type(model).__name__} holds {len(roots)} models with a head ({', '.join(roots)}), and its "
            "forward does not tell which of them takes the rows; give patch that one"
        )
    return next(iter((patched if len(roots) > 1 else roots).values()))


def _roots(model: nn.Module, name: str = "") -> dict[str, PreTrainedModel]:
    """The models with a head inside `model`, by their names in it: those that its forward may call."""
    if isinstance(model, PreTrainedModel) and model.get_output_embeddings() is not None:
        return {name: model}
    below = {own: roots for own, child in model.named_children() if (roots := _roots(child, f"{name}.{own}"))}
    if len(below) > 1:
        with contextlib.suppress(OSError, TypeError):  # no source to read
            source = inspect.getsource(type(model).forward)
            below = {own: roots for own, roots in below.items() if re.search(rf"\bself\.{own}\b", source)} or below
    each = {id(root): (name.lstrip("."), root) for roots in below.values() for name, root in roots.items()}
    return dict(each.values())


def caller_of(decoder: nn.Module) -> PreTrainedModel | None:
    """The model with a head whose forward is calling its decoder just now, or None."""
    frame = sys._getframe(1)
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        module = frame.f_locals.get("self")
        if isinstance(module, PreTrainedModel) and module is not decoder and find_decoder(module) is decoder:
            return module
    return None


def replaced_forward(module: nn.Module, harmless: Sequence[str] = WRAPPERS) -> Any:
    """The function that stands in place of a module's own forward, or None.

    What only wraps the module's own forward, as torch's and accelerate's autocast do, replaces nothing. A class whose
    forward somebody put there from another package counts as replaced too.

    Args:
        harmless: packages whose functions are taken for wrappers.
    """
    for link in links_of(module.forward):
        if getattr(link, "__func__", link) is type(module).forward:
            harmless = (*harmless, *packages_of(type(module)))
        if not is_of(home_of(link), harmless):
            return link
    return None


AUTOCAST = ("torch.amp.autocast_mode", "accelerate.utils.operations")


def beneath_autocast(module: nn.Module) -> Callable:
    """A module's forward without the autocast that was put around it, for whoever calls it inside that forward.

    There autocast is on already. And torch's does not enter twice: the one object in the wrapper would forget what was
    before, and leave autocast on for the rest of the process.
    """
    forward: Any = module.forward
    is_bound = inspect.ismethod(forward)
    while is_of(home_of(forward), AUTOCAST) and hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    return partial(forward, module) if is_bound and not inspect.ismethod(forward) else forward


def links_of(function: Any) -> Iterator[Any]:
    """A function, what it was made of, and so on: wrappers take on the name of what they wrap."""
    links = [function]
    for link in links:
        if isinstance(link, partial | partialmethod):
            links.append(link.func)
        else:
            yield link
        if (wrapped := getattr(link, "__wrapped__", None)) is not None:
            links.append(wrapped)


def put_in_place(module: nn.Module) -> dict[str, Any]:
    """What stands in a module in the place of functions of its class, `forward` among them, by name."""
    kind: Any = type(module)
    return {name: vars(module)[name] for name in _functions_of(kind) & vars(module).keys()}


@cache
def _functions_of(kind: Any) -> set[str]:
    """The names of the functions of a class that its forward may call."""
    callables = {name for base in kind.__mro__ for name, value in vars(base).items() if callable(value)}
    return callables - set(dir(PreTrainedModel)) - set(dir(GenerationMixin)) | {"forward"}


def dropouts_of(model: nn.Module) -> dict[str, Any]:
    """The dropout layers in a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.modules.dropout._DropoutNd)}


def packages_of(cls: type) -> set[str]:
    """The packages that a class and those that it derives from were written in."""
    return {base.__module__.partition(".")[0] for base in cls.__mro__}


def home_of(function: Any) -> str:
    """The module that a function is from, by its globals: wrappers take on the name of what they wrap."""
    function = getattr(function, "__func__", function)
    return getattr(function, "__globals__", {}).get("__name__", type(function).__module__)


def is_of(module: str, packages: Sequence[str]) -> bool:
    """Whether a module, by its name, is one of some packages or inside one."""
    return any(module == package or module.startswith(f"{package}.") for package in packages)
