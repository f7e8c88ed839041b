"""Layers that carry states, beside a plain row: the scan of one of them by itself, and what is kept for backward."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flexreason.attention.registry import TREE
from flexreason.bench.measure import interleaved, ratio
from flexreason.bench.steps import Case, one_pass, plain_row
from flexreason.proof.float64 import saved_bytes
from flexreason.recurrent.entries import SCANS, names_of, space_of
from flexreason.tree.row import collate


class Unpadded(Case):
    """Its row has no padding: a plain row computes that too, and a scan over the tree does not."""

    @cached_property
    def row(self) -> dict[str, Tensor]:
        made = collate(self.layouts, sum(map(len, self.layouts)), block_size=1)
        return {name: tensor.to(self.device) for name, tensor in made.items()}


def beside_a_plain_row(case: Case, repeats: int) -> list[dict[str, Any]]:
    """Of one pass and of a plain row of as many tokens: the bytes that backward needs, by token; and the scan of the
    first recurrent layer apart from its layer, forward and backward, on what the layer hands it."""
    case = Unpadded(case.model, case.layouts, case.loss)
    layer = next(module for module in case.root.modules() if names_of(module) & SCANS.keys())
    [name] = names_of(layer) & SCANS.keys()
    space, steps = space_of(layer), {way.name: way.step for way in (one_pass(case), plain_row(case))}
    kept = {way: saved_bytes(step, case.root.parameters()) for way, step in steps.items()}
    called = {way: _first_call(space, name, step) for way, step in steps.items()}
    assert [TREE in kwargs for _, kwargs in called.values()] == [True, False]
    case.root.zero_grad()
    calls = {way: _alone(space[name], *handed) for way, handed in called.items()}
    seconds = interleaved(calls, repeats, case.device, least_seconds=0.2)
    rows = []
    for way, times in seconds.items():
        ms = sorted(1e3 * t for t in times)
        rows.append(
            {
                "way": way,
                "kept B/token": kept[way] / case.row["until"].shape[1],
                "kept by a plain row's": kept[way] / kept["a plain row"],
                "ms of a scan": [ms[len(ms) // 2], ms[0], ms[-1]],
                "ms by a plain row's": list(ratio(times, seconds["a plain row"])),
            }
        )
    return rows


def _first_call(space: dict[str, Any], name: str, step: Callable[[], Any]) -> tuple[tuple, dict[str, Any]]:
    """What a function is called with first in a step."""
    stock, called = space[name], []

    def watched(*args: Any, **kwargs: Any) -> Any:
        called.append((args, kwargs))
        return stock(*args, **kwargs)

    space[name] = watched
    try:
        step()
    finally:
        space[name] = stock
    return called[0]


def _alone(scan: Callable, args: tuple, kwargs: dict[str, Any]) -> Callable[[], None]:
    def leaf(x: Any) -> Any:
        return x.detach().clone().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x

    args, kwargs = tuple(map(leaf, args)), {key: leaf(x) for key, x in kwargs.items()}
    leaves = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad]

    def call() -> None:
        out = scan(*args, **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)

    return call
