"""Every way once for its loss, once for its memory, and then all in turn for their times."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from flexreason.attention.registry import choose_backend
from flexreason.bench import ways
from flexreason.bench.report import Found
from flexreason.memory import peak_bytes
from flexreason.model.hooks import find_root
from flexreason.patching import patch
from flexreason.tree.layout import Layout, unmerge
from flexreason.tree.row import collate

Step = Callable[[], float]
"""Forward and backward; the loss."""


def measure(
    model: nn.Module, layouts: Sequence[Layout], backends: Sequence[str], loss: str, repeats: int, notes: list[str]
) -> list[Found]:
    """Every way once for its loss, once for its memory, and then all in turn; the N samples one by one come first."""
    root = find_root(model)
    samples = [sample for layout in layouts for sample in unmerge(layout)]
    steps: dict[str, Step] = {"N samples, one by one": partial(ways.one_by_one, root, samples, loss)}
    why = ways.unfit_to_pack(root)
    if why:
        notes.append(f"N samples, packed: left out, since {why}")
    else:
        steps["N samples, packed"] = partial(
            ways.packed, root, ways.pack(samples, sum(map(len, layouts)), root.device), loss
        )
    row = {key: value.to(root.device) for key, value in collate(layouts).items()}
    for backend in backends:
        steps[f"one pass, {patched(model, backend, loss)}"] = partial(ways.one_pass, model, row, backend, loss)
    found = {name: _tried(name, step, root) for name, step in steps.items()}
    running = [name for name, one in found.items() if not one.failed]
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(repeats):
        for name in running:
            root.zero_grad()
            started = _now(root.device)
            steps[name]()
            times[name].append(1e3 * (_now(root.device) - started))
    return [replace(one, ms=tuple(times.get(name, ()))) for name, one in found.items()]


def _tried(name: str, step: Step, root: PreTrainedModel) -> Found:
    try:
        root.zero_grad()
        loss = step()
        root.zero_grad()
        with peak_bytes(root.device) as peak:
            step()
            _now(root.device)
            return Found(name, loss=loss, peak=peak())
    except (RuntimeError, ValueError) as error:  # out of memory, or kernels that are not made for this model or device
        root.zero_grad()
        return Found(name, failed=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def patched(model: nn.Module, backend: str, loss: str) -> str:
    """Patch a model; the backend that "auto" stands for."""
    root = find_root(patch(model, backend, loss=loss))
    return choose_backend(backend, root.device, root.dtype)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
