"""The state in which a model is compared: what draws at random or runs again is off meanwhile, and all is put back."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from flexreason.attention import flex
from flexreason.attention.registry import computes
from flexreason.model.hooks import find_patch, find_root


def suspended(model: nn.Module) -> Any:
    """The model without our patch, for a while; it need not have one."""
    found = find_patch(model)
    return nullcontext() if found is None else found.suspended()


@contextmanager
def without_dropout(model: nn.Module, notes: list[str]) -> Iterator[None]:
    """Dropout at 0, and said; the model is otherwise as it was, in training or not."""
    found = [
        (name, module, module.p)
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
    ]
    for _, module, _ in found:
        module.p = 0.0
    if found and model.training:
        notes.append(f"dropout is off here, at {len(found)} places ({found[0][0]}, ...)")
    try:
        yield
    finally:
        for _, module, p in found:
            module.p = p


def set_checkpointing(model: nn.Module, on: bool) -> bool:
    """Gradient checkpointing of every layer that knows of it; whether any was the other way."""
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", on) is not on]
    for layer in layers:
        layer.gradient_checkpointing = on  # type: ignore[assignment]
    return bool(layers)


@contextmanager
def other_attention(root: Any) -> Iterator[str]:
    """The untouched model with another implementation of attention, which rounds in another order."""
    before = root.config._attn_implementation
    other = "sdpa" if before == "eager" else "eager"
    root.set_attn_implementation(other)
    try:
        yield other
    finally:
        root.set_attn_implementation(before)


def copy_in(model: nn.Module, dtype: torch.dtype, notes: list[str]) -> nn.Module:
    """A copy of the model, patched alike, in another dtype, in which it computes throughout."""
    made = copy.deepcopy(model)
    root, ours = find_root(made), find_patch(made)
    if ours is not None and ours.backend_on(root.device) == "flex" and flex.unfit(root.device, dtype):
        ours.backend = "segments" if computes("segments", ours.mask) else "dense"
        notes.append(
            f'in {str(dtype).removeprefix("torch.")} it is backend "{ours.backend}" that is compared, since '
            f"{flex.unfit(root.device, dtype)}"
        )
    set_checkpointing(made, False)  # what runs again in backward would not be float64 throughout
    if getattr(root.config.get_text_config(), "_experts_implementation", None) not in (None, "eager"):
        root.set_experts_implementation("eager")  # the others have no float64
    return made.to(dtype)
