"""What a model is made of, beside what a tiny model of its class and structure is made of.

A test of a class knows nothing of what was done to one model since: attention that a library put in its place, a module
of your own around an MLP. So the kinds of modules are compared, and whose `forward` was replaced.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from flexreason.model.refuse import model_class
from flexreason.proof.evidence import structure_of
from flexreason.proof.tiny import shrink

COMMON = (  # packages whose modules stand in for linear layers, wrap others, or share them out
    *("torch", "peft", "accelerate", "deepspeed", "bitsandbytes", "torchao", "gptqmodel", "auto_gptq", "awq", "hqq"),
    *("optimum", "quanto", "eetq", "aqlm", "vptq", "compressed_tensors", "auto_round", "spqr_quant", "fp_quant"),
    "transformers.integrations",
)

MIXING = (nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules of torch that carry something from token to token."""

WRAPPERS = ("functools", "accelerate", "torch", "peft")
"""Packages whose functions, put before a forward, leave what it computes."""

_MANNER = "forward of "


def replaced_parts(root: PreTrainedModel) -> str:
    """What is in a model and not in a tiny one of its class and structure, in words; nothing where that is nothing."""
    parts = parts_of(root)
    return ", ".join(sorted(parts - tiny_parts(model_class(root), root.config, foreign(parts))))


def foreign(parts: set[str]) -> frozenset[str]:
    """Those that neither transformers nor torch brought."""
    return frozenset(part for part in parts if not part.startswith(("transformers.", "torch.")))


def parts_of(root: nn.Module) -> set[str]:
    """The kinds of modules in a model, beside harmless ones, and whose `forward` is not that of their class."""
    kinds: dict[type, nn.Module] = {}
    found = set()
    for module in root.modules():
        kinds.setdefault(type(module), module)
        if module is not root and "forward" in vars(module) and (by := _forward_from(module)):
            found.add(f"{_MANNER}{type(module).__name__}, by {by}")
    for kind, module in kinds.items():
        if module is not root and (isinstance(module, MIXING) or not _is_of(kind.__module__, COMMON)):
            found.add(f"{kind.__module__}.{kind.__qualname__}")
            if by := _written_elsewhere(kind):
                found.add(f"{_MANNER}{kind.__name__}, by {by}")
    return found


_tiny: dict[tuple, set[str]] = {}


def tiny_parts(cls: type[PreTrainedModel], config: PreTrainedConfig, edited: frozenset[str]) -> set[str]:
    """The kinds of modules that a class builds from a config; sizes cut, so it takes milliseconds.

    They are kept as long as `edited` stays the same, since classes can be edited at any time.
    """
    key = (cls, structure_of(config, cls), edited)
    if key not in _tiny:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            _tiny[key] = parts_of(cls(shrink(config)))
    return _tiny[key]


def _is_of(module: str, packages: Sequence[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _home(function: Any) -> str:
    """Where a function is from, by its globals: wrappers take on the name of what they wrap."""
    function = getattr(function, "__func__", function)
    return getattr(function, "__globals__", {}).get("__name__", type(function).__module__)


def _forward_from(module: nn.Module) -> str:
    """What replaced a module's own forward, or nothing where there are only known wrappers around it."""
    forward: Any = vars(module)["forward"]
    while forward is not None:
        inner = getattr(forward, "func", forward)  # of functools.partial
        if getattr(inner, "__func__", None) is type(module).forward:
            return ""
        if not _is_of(_home(inner), WRAPPERS):
            return f"{_home(inner)}.{getattr(inner, '__qualname__', type(inner).__name__)}"
        forward = getattr(forward, "__wrapped__", None)
    return ""


def _written_elsewhere(kind: type) -> str:
    """The package of a forward that was put into a class from outside, or nothing."""
    own = [cls.__module__.partition(".")[0] for cls in kind.__mro__]
    home = _home(inspect.unwrap(kind.forward))  # type: ignore[attr-defined]
    return "" if _is_of(home, [*own, *WRAPPERS]) else home
