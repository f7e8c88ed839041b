"""The one matrix product of a plain head: its logits in memory that all chunks share, its gradients where they stay.

Autograd would make a gradient of D x V for every chunk, and add it to those before.

Shapes: D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@contextmanager
def forward_of(module: nn.Module, forward: Callable) -> Iterator[None]:
    """A module that does something else for a while."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def added(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """Summed over chunks in fp32 at least."""
    if gradient is None:
        return total
    high = torch.promote_types(gradient.dtype, torch.float32)
    return gradient.to(high).contiguous() if total is None else total.add_(gradient)  # no expanded one, to add to


class InPlace:
    """One plain matrix product in a buffer that all chunks share, and its gradients summed where they will stay."""

    def __init__(self, linear: nn.Linear, parameters: Sequence[Tensor], size: int) -> None:
        self.linear = linear
        own = {id(linear.weight), id(linear.bias)}
        self.totals: dict[int, Tensor | None] = {id(p): None for p in parameters if id(p) in own}
        self.buffer = linear.weight.new_empty(size, len(linear.weight))
        self.used = False
        self.anchor = torch.zeros((), requires_grad=True)  # so that backward comes by, even where states are detached

    def logits(self, head: Callable, states: Tensor) -> Tensor:
        self.used = False
        with forward_of(self.linear, lambda given: _Product.apply(given, self.anchor, self)):
            return head(states)

    def owns(self, logits: Tensor) -> bool:
        """Whether these are the product itself, and nothing but it."""
        if logits.data_ptr() != self.buffer.data_ptr():
            return False
        step = logits.grad_fn  # taking the one sequence out of the batch
        return step is None or isinstance(step.next_functions[0][0], _Product._backward_cls)

    def product(self, given: Tensor) -> Tensor:
        flat = given.flatten(0, -2)
        shape = (*given.shape[:-1], self.buffer.shape[1])
        if self.used or len(flat) > len(self.buffer):  # a head that asks twice
            result = self.buffer.new_empty(shape)
        else:  # of the same memory, and no view of it in autograd's eyes, which would forbid to go on in place
            result = self.buffer.new_empty(0).set_(
                self.buffer.untyped_storage(), 0, shape, torch.empty(shape, device="meta").stride()
            )
        self.used = True
        torch.mm(flat, self.linear.weight.detach().t(), out=result.view(len(flat), shape[-1]))
        return result if self.linear.bias is None else result.add_(self.linear.bias.detach())

    def add(self, slope: Tensor, given: Tensor) -> None:
        slope, given = slope.flatten(0, -2), given.flatten(0, -2)
        weight, bias = id(self.linear.weight), id(self.linear.bias)
        high = torch.promote_types(slope.dtype, torch.float32)
        if weight in self.totals:
            total = self.totals[weight]
            if total is None:
                total = torch.zeros_like(self.linear.weight, dtype=high)
            product = total.addmm_ if high == slope.dtype else lambda a, b: total.add_(a @ b)
            self.totals[weight] = product(slope.t(), given)
        if bias in self.totals:
            self.totals[bias] = added(self.totals[bias], slope.sum(0, dtype=high))


class _Product(torch.autograd.Function):
    """The matrix product of a projection, whose gradients by its own parameters go into their totals at once."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, anchor: Tensor, by_hand: InPlace) -> Tensor:
        ctx.save_for_backward(given)
        ctx.by_hand = by_hand
        return by_hand.product(given)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (given,) = ctx.saved_tensors
        ctx.by_hand.add(grads[0], given)
        return (grads[0] @ ctx.by_hand.linear.weight.detach() if ctx.needs_input_grad[0] else None), None, None
