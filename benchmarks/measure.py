"""How the benchmarks measure: interleaved repeats, medians, peak memory, one table and a JSON line."""

import ctypes
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flexreason.memory import begins_anew, peak_bytes


def interleaved(calls: dict[str, Callable[[], Any]], repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of every call, `repeats` times, one after the other in turn, so that noise falls on all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(warm_up + repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median(call: Callable[[], Any], repeats: int = 5) -> float:
    return statistics.median(interleaved({"": call}, repeats)[""])


def median_ratio(a: list[float], b: list[float]) -> float:
    """The median over repeats of a / b, each pair measured side by side."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def peak_mib(call: Callable[[], Any]) -> float | None:
    """How far a call raises the process's resident memory at its highest; None where that cannot be read."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None or not begins_anew():
        return None
    trim(0)  # so that memory freed earlier is not used again unseen
    with peak_bytes(torch.device("cpu")) as peak:
        before = peak()  # the peak of no time at all is what is in use
        call()
        return (peak() - before) / 2**20


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}\n")
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    for line in [names, *cells]:
        first, *rest = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join([first.strip().ljust(widths[0]), *rest]), flush=True)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)


def machine() -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def print_json(**results: Any) -> None:
    """The last line of every benchmark."""
    print("\n" + json.dumps({**machine(), **results}))
