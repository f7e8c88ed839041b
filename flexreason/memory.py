"""How much memory there is, how much was used at most, and how much training takes of it."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def available_bytes(device: torch.device) -> int:
    """What is free on a device; on a CPU of unknown kind, half of what there is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if (meminfo := Path("/proc/meminfo")).exists():
        return _field(meminfo, "MemAvailable")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


@contextmanager
def peak_bytes(device: torch.device) -> Iterator[Callable[[], int]]:
    """A meter of the most memory in use since it was entered: of the device, or of this process on a CPU.

    Where the kernel does not begin anew (`begins_anew`), it is the most since the process began.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
        return
    if begins_anew():
        CLEAR.write_text("5")  # from here on the kernel notes a new peak
        yield lambda: _field(STATUS, "VmHWM")
        return
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    yield lambda: unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def begins_anew() -> bool:
    """Whether a process's peak can be forgotten, so that a new one is noted."""
    return os.access(CLEAR, os.W_OK)


@dataclass(frozen=True)
class Needed:
    """Bytes that training takes, whatever the kernels; beside these stand one layer's own, and a chunk of logits."""

    state: int  # weights, gradients and what AdamW keeps of each; shared out among processes by FSDP
    inputs: int  # of all layers, kept for backward from one row, with checkpointing

    def __str__(self) -> str:
        state, inputs = (n / 2**30 for n in (self.state, self.inputs))
        return f"{state:.1f} GiB of weights, gradients and optimizer, {inputs:.1f} GiB of layers' inputs"


def needed_bytes(model: nn.Module, length: int) -> Needed:
    """What training a model takes with rows of a length. Its weights may be on meta."""
    state = 0
    for p in model.parameters():
        state += p.numel() * p.element_size() * (4 if p.requires_grad else 1)  # AdamW: two moments beside the gradient
    known: Any = model
    text, embeddings = known.config.get_text_config(), known.get_input_embeddings().weight
    return Needed(state, text.num_hidden_layers * length * text.hidden_size * embeddings.element_size())


def _field(path: Path, name: str) -> int:
    line = next(line for line in path.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])
