"""The configs that a patched model's modules read: views of their own, in which attention has our name.

Layers keep their view as long as the model is patched. Models have theirs while a row is on its way, since it is they
that make masks. What is put into a patched model later, a layer or a config, is found at the next row.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from flexreason.attention.registry import Renamed, attention_of, renamed
from flexreason.model.listening import listened


@dataclass(eq=False)
class Views:
    root: PreTrainedModel
    layers: list[tuple[nn.Module, str, Any]] = field(default_factory=list)  # what they had before, by module and name
    models: list[tuple[nn.Module, str, Any, Any]] = field(default_factory=list)  # what they have, and its view
    viewed: list[tuple[nn.Module, str]] = field(default_factory=list)  # all that have a view, also from another patch
    lists: list[tuple[nn.ModuleList, list[nn.Module]]] = field(default_factory=list)  # of layers, and what was in them
    configs: list[Any] = field(default_factory=list)  # each once
    looked: int = -1  # how many modules had been put somewhere at the last look

    def look(self) -> None:
        """Give each layer its view; a second look finds those that came since."""
        self.models, self.viewed, self.lists = [], [], []
        for module in self.root.modules():
            if isinstance(module, nn.ModuleList):
                self.lists.append((module, list(module)))
            for name, config in list(vars(module).items()):
                if not isinstance(config, PreTrainedConfig):
                    continue
                if isinstance(config, Renamed):
                    self.viewed.append((module, name))
                elif isinstance(module, PreTrainedModel):
                    self.models.append((module, name, config, renamed(config)))
                elif attention_of(config) is not None:
                    self.layers.append((module, name, config))
                    self.viewed.append((module, name))
                    vars(module)[name] = renamed(config)
        configs = [held[2] for held in (*self.models, *self.layers)]
        self.configs = list({id(config): config for config in configs}.values())
        self.looked = listened.count

    def are_old(self) -> bool:
        """Whether modules or configs were put somewhere since the last look."""
        return (
            self.looked != listened.count
            or any(vars(module).get(name) is not config for module, name, config, _ in self.models)
            or any(not isinstance(vars(module).get(name), Renamed) for module, name in self.viewed)
            or any(list(modules) != before for modules, before in self.lists)
        )

    def show_models(self) -> None:
        """Give each model its view, for a row."""
        for module, name, _, view in self.models:
            vars(module)[name] = view

    def hide_models(self) -> None:
        """Give each model its config back, unless somebody has set another one since."""
        for module, name, config, view in self.models:
            if vars(module).get(name) is view:
                vars(module)[name] = config

    def undo(self) -> None:
        """Give each layer its config back."""
        for module, name, config in self.layers:
            if isinstance(vars(module).get(name), Renamed):
                vars(module)[name] = config
