"""Hears of modules that are put anywhere in the process, so that rows need not look for them."""

from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from flexreason.model.find import ATTRIBUTE


class Listened:
    """How many modules have been put somewhere since it was first asked."""

    def __init__(self) -> None:
        self.count = 0
        self.listening = False

    def __call__(self, holder: nn.Module, name: str, module: nn.Module | None) -> None:
        if isinstance(holder, nn.ModuleList):  # forwards take slices, which are new lists: views.py looks at them
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
