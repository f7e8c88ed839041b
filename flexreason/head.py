"""The model's own head, some tokens at a time: log-probabilities without T x V logits.

How hidden states become logits (a scale before or behind, a soft cap, a bias, an adapter) is written in each
model's own forward and nowhere else. So it is that forward that makes them here, around a decoder that hands
back the hidden states it is given: nothing is known of any family, and nothing can be forgotten.

A chunk's logits live until the next chunk. Where the weight of every target in the loss is known beforehand, as
it is in training, the gradients are made on the same sweep, so that nothing is computed twice; where it is not
(`logprobs`), backward sweeps again.

Shapes: T targets, n targets of a chunk, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexreason.attention.registry import find_decoder
from flexreason.row import IGNORED

CHUNK_LOGITS = 2**26
"""Logits at a time: 256 MiB in fp32. Halving or doubling it changes the time by a few percent."""


class Head:
    """Hidden states [n, D] to logits [n, V], as the model itself does it."""

    def __init__(self, root: PreTrainedModel, decoder_output: Any) -> None:
        self.root = root
        self.decoder_output = decoder_output

    def __call__(self, hidden: Tensor) -> Tensor:
        answer = with_states(self.decoder_output, hidden[None])
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        with _forward_of(find_decoder(self.root), lambda *args, **kwargs: answer):
            return type(self.root).forward(self.root, input_ids=ids, use_cache=False, return_dict=True).logits[0]

    def parameters(self) -> list[nn.Parameter]:
        """Those that train outside the decoder, and the output embeddings, which it may share."""
        inside = {id(p) for p in find_decoder(self.root).parameters()}
        outside = {id(p): p for p in self.root.parameters() if id(p) not in inside}
        outside |= {id(p): p for p in self.root.get_output_embeddings().parameters()}
        return [p for p in outside.values() if p.requires_grad]

    def product(self, hidden: Tensor, parameters: Sequence[Tensor]) -> nn.Linear | None:
        """The output projection, if it is one plain matrix product that holds all parameters: then its gradients are
        made by hand and in place, which takes half the time and memory of autograd's."""
        linear = self.root.get_output_embeddings()
        own = {id(linear.weight), id(linear.bias)} if type(linear) is nn.Linear else set()
        if {id(p) for p in parameters} - own or not own or "forward" in vars(linear):
            return None
        plain = type(linear.weight) is nn.Parameter and linear.weight.dtype == hidden.dtype
        return linear if plain and not torch.is_autocast_enabled(hidden.device.type) else None


def with_states(output: Any, states: Tensor) -> Any:
    """What a decoder gave, with other hidden states."""
    if isinstance(output, tuple):
        return (states, *output[1:])
    return type(output)(**{**output, "last_hidden_state": states})


@contextmanager
def _forward_of(module: nn.Module, forward: Callable) -> Iterator[None]:
    """A module that does something else for a while."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@torch.compiler.disable
def weighted_nll(head: Head, hidden: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """The sum of weight x nll over targets: hidden states [T, D], labels [T], weight [T]."""
    if torch.is_grad_enabled():
        return _WeightedNll.apply(hidden, labels, weight, head, *head.parameters())
    return -(sweep(head, hidden, labels).logprobs * weight).sum()


@torch.compiler.disable
def logprobs(head: Head, hidden: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """The log-probability of every target, [T]; 0 where the label is ignored."""
    if torch.is_grad_enabled():
        return _Logprobs.apply(hidden, labels, temperature, head, *head.parameters())
    return sweep(head, hidden, labels, temperature).logprobs


@dataclass
class Swept:
    logprobs: Tensor  # [T]
    hidden: Tensor | None  # gradients, where asked for
    parameters: list[Tensor | None]


def sweep(
    head: Head,
    hidden: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    upstream: Tensor | None = None,
    parameters: Sequence[Tensor] = (),
) -> Swept:
    """Log-probabilities of all targets; given the gradient by each, `upstream` [T], also those by what made them."""
    high = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    swept = Swept(torch.zeros(len(labels), dtype=high, device=hidden.device), None, [None for _ in parameters])
    if upstream is not None:
        swept.hidden = torch.zeros_like(hidden)
    size = min(len(labels), max(1, CHUNK_LOGITS // head.root.config.get_text_config().vocab_size))
    linear = head.product(hidden, parameters)
    make = _Whole(head, parameters) if linear is None else _ByHand(head, linear, parameters, size)
    spare: Tensor | None = None
    for start in range(0, len(labels), size):
        chunk = slice(start, start + size)
        states = hidden[chunk].detach().requires_grad_(upstream is not None)
        with torch.set_grad_enabled(upstream is not None):
            logits = make.logits(states)
        value = logits.detach() if temperature == 1 else logits.detach() / temperature
        real = labels[chunk] != IGNORED
        label = labels[chunk].where(real, 0).unsqueeze(1)
        top = value.amax(-1, keepdim=True).to(high)
        chosen = value.gather(1, label) - top
        if make.in_buffer(value) and value.dtype == high:
            p = value.sub_(top).exp_()  # nothing else reads them
        else:
            spare = value.new_empty(value.shape, dtype=high) if spare is None else spare
            p = torch.sub(value, top, out=spare[: len(value)]).exp_()
        mass = p.sum(-1, keepdim=True)
        swept.logprobs[chunk] = (chosen - mass.log()).squeeze(1).where(real, 0)
        if upstream is not None and swept.hidden is not None:
            factor = (upstream[chunk].to(high) * real / temperature).unsqueeze(1)
            slope = p.mul_(-factor / mass).scatter_add_(1, label, factor)  # factor x (label's one - p)
            swept.hidden[chunk] = make.backward(states, logits, slope.to(logits.dtype), swept.parameters)
    return swept


class _Whole:
    """Whatever a head is made of, through autograd."""

    def __init__(self, head: Head, parameters: Sequence[Tensor]) -> None:
        self.logits = head
        self.parameters = parameters

    def in_buffer(self, value: Tensor) -> bool:
        return False

    def backward(self, states: Tensor, logits: Tensor, slope: Tensor, totals: list[Tensor | None]) -> Tensor:
        """The gradient by hidden states; those by parameters are added to their totals."""
        by_states, *found = torch.autograd.grad(logits, [states, *self.parameters], slope, allow_unused=True)
        for number, gradient in enumerate(found):
            if gradient is not None:
                high = torch.promote_types(gradient.dtype, torch.float32)
                total = totals[number]
                totals[number] = gradient.to(high) if total is None else total.add_(gradient)
        return by_states


class _ByHand:
    """One plain matrix product, in a buffer that all chunks share; what stands around it goes through autograd."""

    def __init__(self, head: Head, linear: nn.Linear, parameters: Sequence[Tensor], size: int) -> None:
        self.head, self.linear = head, linear
        self.wanted = {id(p): number for number, p in enumerate(parameters)}
        self.weight, self.bias = linear.weight.detach(), linear.bias
        self.buffer = self.weight.new_empty(size, len(self.weight))
        self.given = self.product = self.buffer  # of the last chunk

    def logits(self, states: Tensor) -> Tensor:
        def forward(given: Tensor) -> Tensor:
            flat = given.detach().flatten(0, -2)
            product = torch.mm(flat, self.weight.t(), out=self.buffer[: len(flat)])
            if self.bias is not None:
                product += self.bias.detach()
            self.given, self.product = given, product.requires_grad_(states.requires_grad)
            return self.product.view(*given.shape[:-1], -1)

        with _forward_of(self.linear, forward):
            return self.head(states)

    def in_buffer(self, value: Tensor) -> bool:
        """Whether these are the product itself, with nothing behind it that needs them again."""
        return value.data_ptr() == self.product.data_ptr()

    def backward(self, states: Tensor, logits: Tensor, slope: Tensor, totals: list[Tensor | None]) -> Tensor:
        if not self.in_buffer(logits):  # something stands behind the product
            (slope,) = torch.autograd.grad(logits, self.product, slope)
        flat = self.given.detach().flatten(0, -2)
        if (number := self.wanted.get(id(self.linear.weight))) is not None:
            totals[number] = _add_product(totals[number], slope, flat)
        if (number := self.wanted.get(id(self.bias))) is not None:
            total, summed = totals[number], slope.sum(0, dtype=torch.promote_types(slope.dtype, torch.float32))
            totals[number] = summed if total is None else total.add_(summed)
        by_given = (slope @ self.weight).view_as(self.given)
        if self.given.data_ptr() == states.data_ptr():  # nothing stands before it
            return by_given[0]
        return torch.autograd.grad(self.given, states, by_given)[0]


def _add_product(total: Tensor | None, slope: Tensor, given: Tensor) -> Tensor:
    """total + slope^T given, summed in fp32 at least."""
    high = torch.promote_types(slope.dtype, torch.float32)
    if total is None:
        total = torch.zeros(slope.shape[1], given.shape[1], dtype=high, device=slope.device)
    if high == slope.dtype:
        return total.addmm_(slope.t(), given)
    return total.add_(slope.t() @ given)


class _WeightedNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, weight: Tensor, head: Head, *parameters: Tensor) -> Tensor:
        ctx.swept = sweep(head, hidden, labels, upstream=-weight, parameters=parameters)
        ctx.dtypes = [p.dtype for p in parameters]
        return -(ctx.swept.logprobs * weight).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.swept is None:
            raise RuntimeError('loss="chunked" has one backward for a forward; use loss="model" for retain_graph')
        swept, ctx.swept = ctx.swept, None
        by_parameters = [
            None if gradient is None else gradient.mul_(grads[0]).to(dtype)
            for gradient, dtype in zip(swept.parameters, ctx.dtypes, strict=True)
        ]
        return swept.hidden.mul_(grads[0]), None, None, None, *by_parameters


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labels: Tensor, temperature: float, head: Head, *parameters: Tensor
    ) -> Tensor:
        ctx.by_one = None
        if not parameters:  # then the slope by hidden states is all there is, and scales with what comes upstream
            swept = sweep(head, hidden, labels, temperature, upstream=torch.ones_like(labels, dtype=hidden.dtype))
            ctx.by_one = swept.hidden
            return swept.logprobs
        ctx.save_for_backward(hidden, labels, *parameters)
        ctx.head, ctx.temperature = head, temperature
        kind = hidden.device.type
        ctx.autocast = {"device_type": kind, "dtype": torch.get_autocast_dtype(kind)}
        ctx.autocast["enabled"] = torch.is_autocast_enabled(kind)
        return sweep(head, hidden, labels, temperature).logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.by_one is not None:
            return ctx.by_one * grads[0].to(ctx.by_one.dtype).unsqueeze(1), None, None, None
        hidden, labels, *parameters = ctx.saved_tensors
        with torch.autocast(**ctx.autocast):
            swept = sweep(ctx.head, hidden, labels, ctx.temperature, grads[0], parameters)
        by_parameters = [
            None if gradient is None else gradient.to(p.dtype)
            for gradient, p in zip(swept.parameters, parameters, strict=True)
        ]
        return swept.hidden, None, None, None, *by_parameters
