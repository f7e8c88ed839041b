"""The one object a forward pass carries about its tree, handed from the decoder to every layer.

A keyword argument, and neither a global nor an attribute of the model: so it survives gradient checkpointing,
which runs a layer again during backward, and wrapping by other libraries.

Shapes: S tokens, T targets.
"""

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flexreason.attention import dense, flex, segments

BACKENDS: dict[str, ModuleType] = {"flex": flex, "segments": segments, "dense": dense}

PER_TOKEN = ("until", "position_ids", "turn", "role", "document")


@dataclass(eq=False)
class TreeRow:
    """A row on its way through the layers."""

    row: dict[str, Tensor]  # PER_TOKEN, each [1, S]
    target_source: Tensor  # [1, T]
    backend: str
    mask: str
    tables: dict[tuple[int | None, int | None], Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return self.row["until"].shape[1]

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None = None,
        chunk: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of one layer over the tree, [1, S, H, E]. Layers with the same limits share their tables."""
        backend = BACKENDS[self.backend]
        return backend.attend(q, k, v, self.table(window, chunk), scale, softcap, sinks)

    @torch.compiler.disable
    def table(self, window: int | None, chunk: int | None) -> Any:
        if (window, chunk) not in self.tables:
            self.tables[window, chunk] = BACKENDS[self.backend].prepare(self.row, self.mask, window, chunk)
        return self.tables[window, chunk]


def choose_backend(wanted: str, device: torch.device, dtype: torch.dtype) -> str:
    """What "auto" means for rows on a device, and weights of a dtype: flex on a GPU, which has no float64, and segments
    elsewhere."""
    if wanted != "auto":
        return wanted
    return "flex" if device.type == "cuda" and dtype != torch.float64 else "segments"
