"""Tools for proving that a pass is exact."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class true_float64(TorchFunctionMode):
    """Stock models in fp64 throughout.

    `model.double()` alone is not enough: norms, softmax and rotary embeddings cast to float32 inside, which
    moves gradients by 1e-8 to 1e-7. Under this mode a cast to float32 becomes a cast to float64. It holds where
    it is entered, and not in layers that gradient checkpointing runs again during backward. Models with experts
    also need `experts_implementation="eager"`, since grouped matrix products take no float64.

    >>> with true_float64():
    ...     torch.ones(2, dtype=torch.float64).float().dtype
    torch.float64
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


def in_float64(model: nn.Module) -> nn.Module:
    """A model in fp64; what it computed beforehand in float32 is computed anew.

    MiniMax keeps the powers of a decay as numbers of their own: rounded, they are powers of nothing, and what comes out
    depends on where blocks begin.
    """
    for module in model.double().modules():
        if factors := getattr(module, "decay_factors", None):
            module.query_decay, module.key_decay, module.diagonal_decay = factors(module.slope_rate)
    return model


@contextmanager
def each_gradient(model: nn.Module, handle: Callable[[str, Tensor], Any]) -> Iterator[None]:
    """Every backward in here hands its gradients over, parameter by parameter as they come, and keeps none.

    So two sets of gradients are compared without holding both. The model's own `.grad` is as before afterwards.
    """
    hooks, kept = [], []

    def hand_over(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                handle(name, gradient)

        return hook

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kept.append((parameter, parameter.grad))
            parameter.grad = None
            hooks.append(parameter.register_post_accumulate_grad_hook(hand_over(name)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, gradient in kept:
            parameter.grad = gradient


def relative_l2(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """|found - expected| / |expected| over all tensors taken as one vector, in fp64."""
    difference = norm = 0.0
    for a, b in zip(found, expected, strict=True):
        a, b = a.detach().double(), b.detach().double()
        difference += float((a - b).square().sum())
        norm += float(b.square().sum())
    return (difference / norm) ** 0.5 if norm else float(difference > 0)


def saved_bytes(call: Callable[[], Any], skip: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward of `call()`: distinct storages, without those of `skip`."""
    skipped = {tensor.untyped_storage().data_ptr() for tensor in skip}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skipped:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call()
    del out
    return sum(n_bytes for n_bytes, _ in kept.values())
