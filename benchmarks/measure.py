"""How the benchmarks measure: interleaved repeats, medians, peak memory, one table and a JSON line.

On a GPU a call is timed by two CUDA events around it, several calls inside one pair where it is short. A benchmark
there has a budget of seconds, prints every cell as soon as it is known, and goes on past a cell that fails.
"""

import argparse
import ctypes
import gc
import json
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
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


# ---- on a device


def seconds_of(call: Callable[[], Any], device: torch.device, inside: int = 1) -> float:
    """Seconds of one call on a device, the mean of `inside` calls without a pause between them."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(inside):
            call()
        return (time.perf_counter() - start) / inside
    torch.cuda.synchronize(device)  # so that nothing enqueued before is counted
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(inside):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / inside


def timed(
    calls: dict[str, Callable[[], Any]],
    device: torch.device,
    seconds: float = 1.0,
    least: int = 3,
    most: int = 15,
) -> dict[str, list[float]]:
    """Seconds of every call, interleaved, after one call of each to warm up and one to see how long it takes.

    Calls under 5 ms are repeated inside one measurement. The number of repeats is what `seconds` allow, and at least
    `least`; where one round alone takes longer than that, the call that showed it is the measurement.
    """
    for call in calls.values():
        call()
    once = {name: seconds_of(call, device) for name, call in calls.items()}
    round_takes = sum(once.values())
    if round_takes > seconds:
        return {name: [taken] for name, taken in once.items()}
    inside = {name: min(50, max(1, round(5e-3 / taken))) for name, taken in once.items()}
    round_takes = sum(inside[name] * taken for name, taken in once.items())
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(min(most, max(least, int(seconds / round_takes)))):
        for name, call in calls.items():
            found[name].append(seconds_of(call, device, inside[name]))
    return found


FATAL = ("illegal memory access", "device-side assert", "misaligned address", "unspecified launch failure")
"""Said of errors after which nothing on the device succeeds any more."""


def on_a_gpu(words: str | None, seconds: float) -> argparse.ArgumentParser:
    """What every benchmark for GPUs can be told."""
    parser = argparse.ArgumentParser(description=words, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="a rehearsal in seconds; its figures mean nothing")
    parser.add_argument(
        "--seconds", type=float, default=seconds, help="that the run may take; what is left out is named"
    )
    return parser


def in_words(length: int) -> str:
    """16384 as 16K."""
    k, rest = divmod(length, 1024)
    return str(length) if rest else f"{k}K"


class Budget:
    """The seconds a run may take. What no longer fits is named, and not measured."""

    def __init__(self, seconds: float) -> None:
        self.began = time.perf_counter()
        self.end = self.began + seconds
        self.left_out: list[str] = []

    @property
    def left(self) -> float:
        return self.end - time.perf_counter()

    def allows(self, name: str, needs: float = 0.0) -> bool:
        """Whether there is time for a cell that takes about `needs` seconds."""
        if self.left > needs:
            return True
        self.left_out.append(name)
        return False

    def tell(self) -> None:
        if self.left_out:
            print("\nleft out: " + "; ".join(self.left_out), flush=True)

    def attempt(self, name: str, call: Callable[[], Any], needs: float = 0.0) -> tuple[Any, str]:
        """What a cell gave, or else None and why: no time, no memory, or a feature that is not there."""
        if not self.allows(name, needs):
            return None, "no time left"
        reason = ""
        try:
            return call(), ""
        except torch.OutOfMemoryError:
            reason = "out of memory"
        except Exception as error:
            first_line = (str(error).strip().splitlines() or [""])[0]
            reason = f"{type(error).__name__}: {first_line}"[:160]
            if any(said in reason for said in FATAL):
                self.end = time.perf_counter()
            elif "out of memory" in reason or "ALLOC_FAILED" in reason:  # of a library, past torch's allocator
                reason = "out of memory"
        free(name, reason)
        return None, reason


def free(*said: str) -> None:
    """Give back what the last cell held."""
    if any(said):
        print("  " + ": ".join(said), flush=True)
    gc.collect()
    if torch.cuda.is_available():
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:
            print(f"  {error}", flush=True)


def tell(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a table as soon as it is known, so that a run cut off has left its figures; the same row back."""
    print("  " + "; ".join(f"{name} {_cell(value)}" for name, value in row.items() if value is not None), flush=True)
    return row


def peak_gib(call: Callable[[], Any], device: torch.device) -> float | None:
    """The most memory in use on a device during a call, with what was there before it; on a CPU, see `peak_mib`."""
    if device.type != "cuda":
        mib = peak_mib(call)
        return None if mib is None else mib / 2**10
    gc.collect()
    torch.cuda.synchronize(device)
    with peak_bytes(device) as peak:
        call()
        torch.cuda.synchronize(device)
        return peak() / 2**30


# ---- what is printed


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}\n")
    if not rows:
        print("nothing was run", flush=True)
        return
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
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found |= {
            "card": torch.cuda.get_device_name(),
            "memory GiB": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
            "driver": _driver(),
            "CUDA": torch.version.cuda,
            "triton": _version("triton"),
            "transformers": _version("transformers"),
        }
    return found


def _driver() -> str | None:
    if (program := shutil.which("nvidia-smi")) is None:
        return None
    asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return lines[0].strip() if lines else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def print_json(**results: Any) -> None:
    """The last line of every benchmark."""
    print("\n" + json.dumps({**machine(), **results}), flush=True)
