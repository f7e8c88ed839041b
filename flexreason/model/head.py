"""The model's own head, some tokens at a time: log-probabilities without T x V logits.

How hidden states become logits (a scale before or behind, a soft cap, a bias, an adapter) is written in each
model's own forward and nowhere else. So it is that forward that makes them here, around a decoder that hands
back the hidden states it is given: nothing is known of any family, and nothing can be forgotten.

A chunk's logits live until the next chunk. Where the weight of every target in the loss is known beforehand, as
it is in training, the gradients are made on the same sweep, so that nothing is computed twice; where it is not
(`logprobs`), backward sweeps again.

Shapes: T targets, n targets of a chunk, D hidden size, V vocabulary.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from flexreason.attention.registry import find_decoder
from flexreason.model.find import beneath_autocast
from flexreason.tree.row import IGNORED

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
        with answering(find_decoder(self.root), answer):
            return beneath_autocast(self.root)(input_ids=ids, use_cache=False, return_dict=True).logits[0]

    def parameters(self, hidden: Tensor) -> list[nn.Parameter]:
        """Those that train and that logits depend on, wherever they are, also outside the model: found by following one
        token's graph."""
        devices = [hidden.device] if hidden.device.type == "cuda" else []
        with torch.enable_grad(), torch.random.fork_rng(devices):  # dropout is to draw as if nobody had asked
            state = hidden[:1].detach().requires_grad_()
            graph = [self(state).grad_fn]
        seen: set[Any] = set()
        leaves: dict[int, Any] = {}
        while graph:
            node = graph.pop()
            if node is not None and node not in seen:
                seen.add(node)
                if (leaf := getattr(node, "variable", state)) is not state:
                    leaves[id(leaf)] = leaf
                graph += [following for following, _ in node.next_functions]
        return list(leaves.values())

    def projection(self, hidden: Tensor) -> nn.Linear | None:
        """The output embeddings, if they are one plain matrix product: then its gradients are made in place, which
        takes half the time and memory of autograd's."""
        linear = self.root.get_output_embeddings()
        if type(linear) is not nn.Linear or "forward" in vars(linear) or type(linear.weight) is not nn.Parameter:
            return None
        plain = linear.weight.dtype == hidden.dtype and not torch.is_autocast_enabled(hidden.device.type)
        return linear if plain else None


def with_states(output: Any, states: Tensor) -> Any:
    """What a decoder gave, with other hidden states."""
    if isinstance(output, tuple):
        return (states, *output[1:])
    return type(output)(**{**output, "last_hidden_state": states})


HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@contextmanager
def answering(decoder: nn.Module, answer: Any) -> Iterator[None]:
    """A decoder that returns `answer`, whatever it is given; its hooks have seen these states already."""
    hooks = {name: getattr(decoder, name) for name in HOOKS}
    for name in HOOKS:
        setattr(decoder, name, OrderedDict())
    try:
        with _forward_of(decoder, lambda *args, **kwargs: answer):
            yield
    finally:
        for name, kept in hooks.items():
            setattr(decoder, name, kept)


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
def weighted_nll(head: Head, hidden: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of weight x nll over targets, and without gradient their log-probabilities: hidden states [T, D],
    labels [T], weight [T]."""
    if torch.is_grad_enabled():
        return _WeightedNll.apply(hidden, labels, weight, head, *head.parameters(hidden))
    logprobs = sweep(head, hidden, labels).logprobs
    return -(logprobs * weight).sum(), logprobs


@torch.compiler.disable
def logprobs(head: Head, hidden: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """The log-probability of every target, [T]; 0 where the label is ignored."""
    if torch.is_grad_enabled():
        return _Logprobs.apply(hidden, labels, temperature, head, *head.parameters(hidden))
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
    linear = head.projection(hidden)
    by_hand = _InPlace(linear, parameters, size) if linear is not None else None
    rest = [p for p in parameters if by_hand is None or id(p) not in by_hand.totals]
    spare: Tensor | None = None
    for start in range(0, len(labels), size):
        chunk = slice(start, start + size)
        states = hidden[chunk].detach().requires_grad_(upstream is not None)
        with torch.set_grad_enabled(upstream is not None):
            logits = head(states) if by_hand is None else by_hand.logits(head, states)
        value = logits.detach() if temperature == 1 else logits.detach().to(high) / temperature
        real = labels[chunk] != IGNORED
        label = labels[chunk].where(real, 0).unsqueeze(1)
        top = value.amax(-1, keepdim=True).to(high)
        chosen = value.gather(1, label) - top
        if by_hand is not None and temperature == 1 and value.dtype == high and by_hand.owns(logits):
            p = value.sub_(top).exp_()  # nothing else reads them; were they saved for backward, autograd would say so
        else:
            spare = value.new_empty(size, value.shape[1], dtype=high) if spare is None else spare
            p = torch.sub(value, top, out=spare[: len(value)]).exp_()
        mass = p.sum(-1, keepdim=True)
        swept.logprobs[chunk] = (chosen - mass.log()).squeeze(1).where(real, 0)
        if upstream is None or swept.hidden is None:
            continue
        factor = (upstream[chunk].to(high) * real / temperature).unsqueeze(1)
        slope = p.mul_(-factor / mass).scatter_add_(1, label, factor)  # factor x (label's one - p)
        wanted = [states, *rest] if by_hand is None else [states, by_hand.anchor, *rest]
        gradients = torch.autograd.grad(logits, wanted, slope.to(logits.dtype), allow_unused=True)
        if gradients[0] is not None:
            swept.hidden[chunk] = gradients[0]
        for p, gradient in zip(rest, gradients[len(wanted) - len(rest) :], strict=True):
            number = next(k for k, other in enumerate(parameters) if other is p)
            swept.parameters[number] = _add(swept.parameters[number], gradient)
    if by_hand is not None:
        for number, p in enumerate(parameters):
            if id(p) in by_hand.totals:
                swept.parameters[number] = by_hand.totals[id(p)]
    return swept


def _add(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """Summed over chunks in fp32 at least."""
    if gradient is None:
        return total
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32)) if total is None else total.add_(gradient)


class _InPlace:
    """One plain matrix product in a buffer that all chunks share, and its gradients summed where they will stay."""

    def __init__(self, linear: nn.Linear, parameters: Sequence[Tensor], size: int) -> None:
        self.linear = linear
        own = {id(linear.weight), id(linear.bias)}
        self.totals: dict[int, Tensor | None] = {id(p): None for p in parameters if id(p) in own}
        self.buffer = linear.weight.new_empty(size, len(linear.weight))
        self.used = False
        self.anchor = torch.zeros((), requires_grad=True)  # so that backward comes by, even where states are detached

    def logits(self, head: Head, states: Tensor) -> Tensor:
        self.used = False
        with _forward_of(self.linear, lambda given: _Product.apply(given, self.anchor, self)):
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
            self.totals[bias] = _add(self.totals[bias], slope.sum(0, dtype=high))


class _Product(torch.autograd.Function):
    """The matrix product of a projection, whose gradients by its own parameters go into their totals at once."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, anchor: Tensor, by_hand: _InPlace) -> Tensor:
        ctx.save_for_backward(given)
        ctx.by_hand = by_hand
        return by_hand.product(given)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (given,) = ctx.saved_tensors
        ctx.by_hand.add(grads[0], given)
        return (grads[0] @ ctx.by_hand.linear.weight.detach() if ctx.needs_input_grad[0] else None), None, None


class _WeightedNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labels: Tensor, weight: Tensor, head: Head, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        largest = float(weight.abs().max()) if hidden.dtype == torch.float16 else 0.0
        ctx.scale = 2.0 ** math.ceil(-math.log2(largest)) if largest else 1.0  # slopes of size 1, for fp16 to hold
        ctx.swept = sweep(head, hidden, labels, upstream=-weight * ctx.scale, parameters=parameters)
        ctx.dtypes = [p.dtype for p in parameters]
        logprobs = ctx.swept.logprobs
        ctx.mark_non_differentiable(logprobs)
        return -(logprobs * weight).sum(), logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.swept is None:
            raise RuntimeError('loss="chunked" has one backward for a forward; use loss="model" for retain_graph')
        swept, ctx.swept = ctx.swept, None
        factor = grads[0] / ctx.scale
        by_parameters = [
            None if gradient is None else gradient.mul_(factor).to(dtype)
            for gradient, dtype in zip(swept.parameters, ctx.dtypes, strict=True)
        ]
        return swept.hidden.mul_(factor), None, None, None, *by_parameters


ANOTHER_HEAD = (
    "token_logprobs: backward runs the head again, and it is another one than when these were computed: {}; call "
    "backward before adapters of the head are switched, merged or frozen, and before train() or eval()"
)


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
        ctx.devices = [hidden.device] if kind == "cuda" else []
        ctx.random = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in ctx.devices]
        ctx.logprobs = sweep(head, hidden, labels, temperature).logprobs
        return ctx.logprobs.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.by_one is not None:
            return ctx.by_one * grads[0].to(ctx.by_one.dtype).unsqueeze(1), None, None, None
        hidden, labels, *parameters = ctx.saved_tensors
        if not all(p.requires_grad for p in parameters):
            raise RuntimeError(ANOTHER_HEAD.format("a parameter that trained does so no more"))
        with torch.random.fork_rng(ctx.devices), torch.autocast(**ctx.autocast):
            torch.set_rng_state(ctx.random[0])  # the same draws, where the head has dropout
            for device, state in zip(ctx.devices, ctx.random[1], strict=True):
                torch.cuda.set_rng_state(state, device)
            swept = sweep(ctx.head, hidden, labels, ctx.temperature, grads[0], parameters)
        if any(gradient is None for gradient in swept.parameters):
            raise RuntimeError(ANOTHER_HEAD.format("a parameter of it takes no part by now"))
        tolerance = 32 * torch.finfo(hidden.dtype).eps
        same = swept.logprobs.isclose(ctx.logprobs, rtol=tolerance, atol=tolerance, equal_nan=True).all()
        if hidden.device.type == "cpu" and not same:
            raise RuntimeError(ANOTHER_HEAD.format("it gives other log-probabilities by now"))
        if swept.hidden is not None:
            swept.hidden.mul_(torch.where(same, 1.0, torch.nan))  # elsewhere nobody waits for the answer
        by_parameters = [
            None if gradient is None else gradient.to(p.dtype)
            for gradient, p in zip(swept.parameters, parameters, strict=True)
        ]
        return swept.hidden, None, None, None, *by_parameters
