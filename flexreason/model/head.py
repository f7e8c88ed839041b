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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from flexreason.attention.registry import find_decoder
from flexreason.model.find import beneath_autocast
from flexreason.model.product import InPlace, added, forward_of
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
        token's graph. Other tokens may come to more (a head with experts): `sweep` tells of them."""
        devices = [hidden.device] if hidden.device.type == "cuda" else []
        with torch.enable_grad(), torch.random.fork_rng(devices):  # dropout is to draw as if nobody had asked
            state = hidden[:1].detach().requires_grad_()
            return [leaf for leaf in _leaves(self(state)) if leaf is not state]

    def projection(self, hidden: Tensor) -> nn.Linear | None:
        """The output embeddings, if they are one plain matrix product: then its gradients are made in place, which
        takes half the time and memory of autograd's."""
        linear = self.root.get_output_embeddings()
        if type(linear) is not nn.Linear or "forward" in vars(linear) or type(linear.weight) is not nn.Parameter:
            return None
        plain = linear.weight.dtype == hidden.dtype and not torch.is_autocast_enabled(hidden.device.type)
        return linear if plain else None


def _leaves(result: Tensor) -> list[Any]:
    """What gradients of a result come to, by its graph."""
    graph, seen = [result.grad_fn], set[Any]()
    leaves: dict[int, Any] = {}
    while graph:
        node = graph.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if (leaf := getattr(node, "variable", None)) is not None:
                leaves[id(leaf)] = leaf
            graph += [following for following, _ in node.next_functions]
    return list(leaves.values())


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
        with forward_of(decoder, lambda *args, **kwargs: answer):
            yield
    finally:
        for name, kept in hooks.items():
            setattr(decoder, name, kept)


@torch.compiler.disable
def weighted_nll(head: Head, hidden: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of weight x nll over targets, and without gradient their log-probabilities: hidden states [T, D],
    labels [T], weight [T]."""
    if torch.is_grad_enabled():
        return _with_all_parameters(_WeightedNll, hidden, labels, weight, head)
    logprobs = sweep(head, hidden, labels).logprobs
    return -(logprobs * weight).sum(), logprobs


@torch.compiler.disable
def logprobs(head: Head, hidden: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """The log-probability of every target, [T]; 0 where the label is ignored."""
    if torch.is_grad_enabled():
        return _with_all_parameters(_Logprobs, hidden, labels, temperature, head)
    return sweep(head, hidden, labels, temperature).logprobs


class _MoreParameters(Exception):
    """Some tokens' logits depend on parameters that were not named: these."""

    def __init__(self, parameters: list[Any]) -> None:
        super().__init__()
        self.parameters = parameters


def _with_all_parameters(function: Any, hidden: Tensor, labels: Tensor, by_target: Any, head: Head) -> Any:
    """Autograd has to be told beforehand what a result depends on; where that turns out to be more, once more."""
    parameters: list[Any] = head.parameters(hidden)
    while True:
        try:
            return function.apply(hidden, labels, by_target, head, *parameters)
        except _MoreParameters as more:
            parameters = parameters + more.parameters


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
    follow: bool = False,
) -> Swept:
    """Log-probabilities of all targets; given the gradient by each, `upstream` [T], also those by what made them.

    Args:
        follow: whether to look for more parameters than these where no gradient is asked for; else it is done anyway.
    """
    follow = follow or upstream is not None
    high = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    swept = Swept(torch.zeros(len(labels), dtype=high, device=hidden.device), None, [None for _ in parameters])
    if upstream is not None:
        swept.hidden = torch.zeros_like(hidden)
    size = min(len(labels), max(1, CHUNK_LOGITS // head.root.config.get_text_config().vocab_size))
    linear = head.projection(hidden)
    by_hand = InPlace(linear, parameters, size) if linear is not None else None
    own = {} if by_hand is None else by_hand.totals
    rest = [p for p in parameters if id(p) not in own]
    spare: Tensor | None = None
    known, more = {id(p) for p in parameters}, dict[int, Any]()
    for start in range(0, len(labels), size):
        chunk = slice(start, start + size)
        states = hidden[chunk].detach().requires_grad_(follow)
        with torch.set_grad_enabled(follow):
            logits = head(states) if by_hand is None else by_hand.logits(head, states)
        ours = known | {id(states), id(by_hand and by_hand.anchor)}
        leaves = {id(leaf): leaf for leaf in _leaves(logits)}
        more |= {number: leaf for number, leaf in leaves.items() if number not in ours}
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
        again = [leaves[number] for number in own if number in leaves]
        gradients = torch.autograd.grad(logits, wanted + again, slope.to(logits.dtype), allow_unused=True)
        if gradients[0] is not None:
            swept.hidden[chunk] = gradients[0]
        for p, gradient in zip(again, gradients[len(wanted) :], strict=True):  # what the head uses in another way too
            own[id(p)] = added(own[id(p)], gradient)
        for p, gradient in zip(rest, gradients[len(wanted) - len(rest) : len(wanted)], strict=True):
            number = next(k for k, other in enumerate(parameters) if other is p)
            swept.parameters[number] = added(swept.parameters[number], gradient)
    if more:
        raise _MoreParameters(list(more.values()))
    for number, p in enumerate(parameters):
        if id(p) in own:
            swept.parameters[number] = own[id(p)]
    return swept


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
        ctx.logprobs = sweep(head, hidden, labels, temperature, parameters=parameters, follow=True).logprobs
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
            try:
                swept = sweep(ctx.head, hidden, labels, ctx.temperature, grads[0], parameters)
            except _MoreParameters:
                raise RuntimeError(ANOTHER_HEAD.format("it has parameters that it had not")) from None
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
