"""Hears of modules that are put anywhere in the process, so that rows need not look for them."""

import sys
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from flexreason.model.find import ATTRIBUTE


class Listened:
    """How many modules have been put somewhere since it was first asked."""

    def __init__(self) -> None:
        self.count = 0
        self.listening = False

    def __call__(self, holder: nn.Module, name: str, module: nn.Module | None) -> None:
        if isinstance(holder, nn.ModuleList) and (torch.compiler.is_compiling() or _is_slice()):
            return
        self.count += 1
        patch: Any = getattr(module, "__dict__", {}).get(ATTRIBUTE)
        if hasattr(patch, "held_by"):
            patch.held_by(holder)


listened = Listened()


def listen() -> None:
    if not listened.listening:
        listened.listening = True
        register_module_module_registration_hook(listened)


def _is_slice() -> bool:
    """Whether a list of modules is being made as a part of another, as forwards do that take some of their layers."""
    frame: Any = sys._getframe(2)
    for _ in range(6):
        if frame is None or frame.f_code is nn.ModuleList.__getitem__.__code__:
            return frame is not None
        frame = frame.f_back
    return False
