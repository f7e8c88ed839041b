"""How much memory there is, and how much was used at most."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

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


def _field(path: Path, name: str) -> int:
    line = next(line for line in path.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])
