"""How ways are compared: the same loss and gradients first, then memory, then times in turn.

Every number that says how much faster is a ratio of two times that stand side by side, repeat by repeat: the median of
these ratios, with the least and the largest. So what slows a machine down for a while slows both.
"""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flexreason.bench.steps import Case, Way
from flexreason.memory import begins_anew, peak_bytes
from flexreason.proof.float64 import relative_l2
from flexreason.talk.telling import Stage, stage

SAME = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.03, torch.float16: 0.01}
"""How far losses of two ways may be apart, relative: no nonsense is to be timed. `flexreason verify` is the proof."""

ALIKE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""How far gradients may be: those under a wrong mask are off by more than half."""

CPU = torch.device("cpu")

SAMPLED = 4096
"""Elements of a parameter's gradient that are kept to be compared."""


@dataclass(frozen=True)
class Measured:
    """What a way took, or why it took nothing."""

    name: str
    loss: float | None = None
    gradient_error: float | None = None  # relative to the first way that ran; None for that, and without backward
    ms: tuple[float, ...] = ()  # of every repeat
    peak: int | None = None  # bytes in use at most
    added: int | None = None  # of these, what the step added, gradients included
    failed: str = ""
    trains: bool = True
    exact: bool = True  # whether it has to have the samples' loss and gradients

    @property
    def median(self) -> float:
        return statistics.median(self.ms)


class Ratio(NamedTuple):
    """A ratio of times, over repeats."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} to {self.most:.2f})"


def ratio(a: Sequence[float], b: Sequence[float]) -> Ratio:
    """How many times longer a takes than b; each pair was measured side by side."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


# ---- times


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


def interleaved(
    calls: dict[str, Callable[[], Any]],
    repeats: int,
    device: torch.device = CPU,
    before: Callable[[], Any] = lambda: None,
    least_seconds: float = 0.0,
) -> dict[str, list[float]]:
    """Seconds of every call, `repeats` times, one after the other in turn. Warming up is the caller's.

    `before` is called before each, outside its time. Calls shorter than `least_seconds` are repeated inside one
    measurement.
    """
    inside = dict.fromkeys(calls, 1)
    if least_seconds:
        inside = {name: max(1, round(least_seconds / seconds_of(call, device))) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            before()
            seconds[name].append(seconds_of(call, device, inside[name]))
    return seconds


# ---- memory


class Peak(NamedTuple):
    """Bytes in use at most during a call: all of them, and those above what was in use before."""

    total: int
    added: int


def peak(call: Callable[[], Any], device: torch.device = CPU) -> Peak:
    """Of a device, or of this process on a CPU. Where a process's peak cannot be forgotten, it is that of its life."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        used = torch.cuda.memory_allocated(device)
    elif trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # so that memory freed earlier is not used again unseen
    with peak_bytes(device) as so_far:
        if device.type != "cuda":
            used = so_far()  # the peak of no time at all is what is in use
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        total = so_far()
    return Peak(total, total - used)


def memory_is_known(device: torch.device) -> bool:
    """Whether what one call added can be told."""
    return device.type == "cuda" or begins_anew()


# ---- ways


def gradients(model: nn.Module) -> list[Tensor]:
    """Of every parameter's gradient some elements, evenly spaced: two sets of them fit beside any model."""
    kept = []
    for parameter in model.parameters():
        if parameter.grad is not None:
            flat = parameter.grad.flatten()
            kept.append(flat[:: -(-len(flat) // SAMPLED)].clone())
    return kept


def measure(case: Case, ways: Sequence[Way], repeats: int) -> list[Measured]:
    """Every way once for its loss and gradients, once for its memory, and then those that are right in turn.

    The first that runs is what the others are held against. A way that is not `exact` is timed whatever it computes.
    """
    root, expected = case.root, None
    measured = {}
    for way in ways:
        with stage(f"{way.name}, once for its gradients and once for its memory"):
            measured[way.name], grads = _tried(way, case, expected)
        if expected is None and grads and way.exact:
            expected = grads
    able = [way for way in ways if not measured[way.name].failed]
    with stage("timing all ways in turn", repeats * len(able), "steps") as going:
        timed = {way.name: _counted(way.step, going) for way in able}
        times = interleaved(timed, repeats, case.device, before=root.zero_grad)
    root.zero_grad()
    return [replace(way, ms=tuple(1e3 * t for t in times.get(name, ()))) for name, way in measured.items()]


def _counted(step: Callable[[], Any], going: Stage) -> Callable[[], Any]:
    def call() -> None:
        step()
        going.add()

    return call


def _tried(way: Way, case: Case, expected: list[Tensor] | None) -> tuple[Measured, list[Tensor] | None]:
    root, bare = case.root, Measured(way.name, trains=way.trains, exact=way.exact)
    try:
        root.zero_grad()
        loss = way.step()
        grads = gradients(root) if way.trains else None
        error = relative_l2(grads, expected) if grads and expected else None
        root.zero_grad()
        total, added = peak(way.step, case.device)
        known = memory_is_known(case.device)
        return replace(bare, loss=loss, gradient_error=error, peak=total, added=added if known else None), grads
    except (RuntimeError, ValueError) as failure:  # out of memory, or kernels not made for this model or device
        text = str(failure).splitlines()[0] if str(failure) else ""
        return replace(bare, failed=f"{type(failure).__name__}: {text}"), None
    finally:
        root.zero_grad()


def wrong(way: Measured, ways: Sequence[Measured], dtype: torch.dtype) -> bool:
    """Whether a way has another loss than the first that ran, or other gradients."""
    losses = [way.loss for way in ways if way.loss is not None and way.exact]
    if way.loss is None or not losses:
        return False
    off = abs(way.loss / losses[0] - 1) > SAME[dtype]
    return off or (way.gradient_error or 0.0) > ALIKE[dtype]
