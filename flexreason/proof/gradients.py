"""Two sets of gradients, of which only one is held: the other is compared as backward gives it."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flexreason.proof import oracle

FLOOR = 1e-4
"""Of the whole gradient's norm: groups of parameters with less are measured against this."""

Backward = Callable[[Callable[[str, Tensor], None]], None]
"""Hands over a parameter's name and gradient, one after the other."""


def gradients_of(found: oracle.Reference) -> Backward | None:
    """Gradients at hand, given out one by one and forgotten, like a backward's."""

    def backward(handle: Callable[[str, Tensor], None]) -> None:
        while found.gradients:
            handle(*found.gradients.popitem())

    return backward if found.gradients else None


def compare_gradients(backward: Backward, expected: dict[str, Tensor]) -> tuple[float, dict[str, float]]:
    """Error of all, and by group of parameters; one parameter is held at a time."""
    differences: dict[str, float] = {}
    norms: dict[str, float] = {}
    missing = dict.fromkeys(expected)

    def square(x: Tensor) -> float:
        return float(torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))) ** 2

    def handle(name: str, gradient: Tensor) -> None:
        """The gradient is ours now, and nobody needs it again: the difference is made in its place."""
        missing.pop(name, None)
        group, right = _group(name), expected[name]
        high = torch.promote_types(torch.promote_types(gradient.dtype, right.dtype), torch.float32)
        differences[group] = differences.get(group, 0.0) + square(gradient.to(high).sub_(right))

    backward(handle)
    for name, right in expected.items():
        norms[_group(name)] = norms.get(_group(name), 0.0) + square(right)
        if name in missing:  # no gradient at all: the difference is all of it
            differences[_group(name)] = differences.get(_group(name), 0.0) + square(right)
    whole = math.sqrt(sum(norms.values())) or 1.0
    errors = {
        group: math.sqrt(square) / max(math.sqrt(norms[group]), FLOOR * whole) for group, square in differences.items()
    }
    return math.sqrt(sum(differences.values())) / whole, errors


def _group(name: str) -> str:
    """A parameter's name without the numbers of layers and experts."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
