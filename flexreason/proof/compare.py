"""One pass held against the N samples: what it computes, how far off that is, and how far off it may be.

All is summed over targets, as in the oracle. Two sets of gradients are compared while only one of them is held: the
other is taken parameter by parameter, as its backward makes it.

Shapes: T targets, n targets that are not ignored.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flexreason.attention import flex
from flexreason.attention.registry import computes
from flexreason.model.find import dropouts_of
from flexreason.model.hooks import find_patch, find_root
from flexreason.model.logprobs import token_logprobs
from flexreason.proof import oracle
from flexreason.proof.float64 import each_gradient, in_float64, relative_l2
from flexreason.tree.row import IGNORED

EXACT = 1e-9
"""The largest relative error of an exact model, in fp64."""

FACTOR = 2.0
"""How much further from the reference one pass may be than the samples are, in a dtype that rounds."""

GROUP_FACTOR = 4.0
"""The same for the gradient of one group of parameters, which scatters more."""

DROWNED = 0.3
"""The relative error of the samples' own gradients from which on nothing can be told by them."""

PARAMETER_FLOOR = 1e-6
"""Of the whole gradient's norm: parameters with less (key biases have none at all) are measured against this."""

GROUP_FLOOR = 1e-4
"""The same for groups of parameters."""

Handle = Callable[[str, Tensor], None]
"""Takes a parameter's name and its gradient, which is then its own to change."""

Backward = Callable[[Handle], None]
"""Hands over every gradient, one after the other. It can be run once."""


@dataclass(frozen=True)
class Computed:
    """What one way of computing gives for the targets of a row."""

    loss_sum: float
    logprobs: Tensor  # [n], conversation by conversation and turn by turn
    backward: Backward | None  # of the loss sum; None where nothing is trained


@dataclass(frozen=True)
class Errors:
    """How far one way of computing is from the samples: relative errors."""

    loss: float
    logprobs: float
    gradients: float | None  # of all parameters taken as one; None where the samples have none
    parameters: dict[str, float]  # of each parameter's gradient
    groups: dict[str, float]  # of each group's gradient: of one parameter in all layers and experts

    @property
    def worst_parameter(self) -> str:
        """The parameter whose gradient is furthest off, or "" where the samples have no gradients."""
        return max(self.parameters, key=lambda name: _number(self.parameters[name]), default="")

    def largest(self) -> dict[str, float]:
        """The three errors that are at most `EXACT` where one pass is exact: of gradients the worst parameter's."""
        gradients = self.parameters.get(self.worst_parameter, 0.0)
        return {"loss": _number(self.loss), "logprobs": _number(self.logprobs), "gradients": _number(gradients)}

    @property
    def is_exact(self) -> bool:
        return max(self.largest().values()) <= EXACT


def _number(error: float) -> float:
    """What is not a number is not equal to anything."""
    return torch.inf if math.isnan(error) else error


# ---- what is computed


def one_pass(model: nn.Module, row: Mapping[str, Tensor], *, backward: bool = True) -> Computed:
    """A row through a patched model. The same forward serves the loss and, later, its gradients."""
    real = row["labels"][0] != IGNORED
    with torch.set_grad_enabled(backward):
        output = model(**row)
    patch, logits = find_patch(model), output.logits
    if logits is None and patch is not None and patch.loss == "chunked":
        with torch.no_grad():
            logprobs = token_logprobs(model, row)[real]
    else:
        if logits is None:  # a forward that somebody put there makes none beside a loss
            with torch.no_grad():
                logits = model(**{key: value for key, value in row.items() if "labels" not in key}).logits
        logits = logits.detach()[0, real]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logprobs = logits.log_softmax(-1).gather(1, row["labels"][0, real, None])[:, 0]
    n_targets = int(real.sum())
    loss_sum = float(output.loss.detach()) * n_targets
    return Computed(loss_sum, _by_sample(logprobs, row), backward_of(model, output.loss * n_targets))


def logprobs_pass(model: nn.Module, row: Mapping[str, Tensor]) -> Computed:
    """The same by `token_logprobs`, and by its backward."""
    logprobs = token_logprobs(model, row)[row["labels"][0] != IGNORED]
    loss_sum = -logprobs.sum()
    return Computed(float(loss_sum.detach()), _by_sample(logprobs.detach(), row), backward_of(model, loss_sum))


def by_samples(reference: oracle.Reference) -> Computed:
    """The samples themselves, to be held against others. Their gradients are forgotten as they are handed over."""

    def backward(handle: Handle) -> None:
        while reference.gradients:
            handle(*reference.gradients.popitem())

    return Computed(reference.loss_sum, torch.cat(reference.logprobs), backward if reference.gradients else None)


def backward_of(model: nn.Module, loss_sum: Tensor) -> Backward | None:
    """The gradients of a loss, where it has any. The model's own `.grad` stays as it is."""

    def backward(handle: Handle) -> None:
        with each_gradient(model, handle):
            loss_sum.backward()

    return backward if loss_sum.requires_grad else None


def _by_sample(logprobs: Tensor, row: Mapping[str, Tensor]) -> Tensor:
    """[n] in the order of the samples: a layout may have its targets in any order."""
    real = row["labels"][0] != IGNORED
    order = torch.argsort(row["target_turn"][0, real], stable=True)
    order = order[torch.argsort(row["target_document"][0, real][order], stable=True)]
    return logprobs[order.to(logprobs.device)]


# ---- how far off it is


def compare(computed: Computed, samples: oracle.Reference) -> Errors:
    """The relative errors of what was computed; its backward runs where the samples have gradients."""
    gradients: float | None = None
    parameters: dict[str, float] = {}
    groups: dict[str, float] = {}
    if samples.gradients:
        backward = computed.backward or (lambda handle: None)  # a loss without any is as wrong as gradients can be
        gradients, parameters, groups = gradient_errors(backward, samples.gradients)
    difference = abs(computed.loss_sum - samples.loss_sum)
    same_number = len(computed.logprobs) == samples.n_targets
    return Errors(
        loss=difference / max(abs(samples.loss_sum), 1e-300) if difference else 0.0,
        logprobs=relative_l2([computed.logprobs], [torch.cat(samples.logprobs)]) if same_number else torch.inf,
        gradients=gradients,
        parameters=parameters,
        groups=groups,
    )


def gradient_errors(
    backward: Backward, expected: Mapping[str, Tensor]
) -> tuple[float, dict[str, float], dict[str, float]]:
    """The relative error of all gradients, of each parameter's, and of each group's."""
    differences = {name: _squared(gradient) for name, gradient in expected.items()}  # as if there were none at all
    norms = dict(differences)

    def handle(name: str, gradient: Tensor) -> None:
        high = torch.promote_types(torch.promote_types(gradient.dtype, expected[name].dtype), torch.float32)
        differences[name] = _squared(gradient.to(high).sub_(expected[name]))  # in its place: nobody needs it again

    backward(handle)
    whole = math.sqrt(sum(norms.values())) or 1.0

    def relative(difference: float, norm: float, floor: float) -> float:
        return math.sqrt(difference) / max(math.sqrt(norm), floor * whole)

    parameters = {name: relative(differences[name], norms[name], PARAMETER_FLOOR) for name in expected}
    by_group: dict[str, list[str]] = {}
    for name in expected:
        by_group.setdefault(_group(name), []).append(name)
    groups = {
        group: relative(sum(differences[name] for name in names), sum(norms[name] for name in names), GROUP_FLOOR)
        for group, names in by_group.items()
    }
    return math.sqrt(sum(differences.values())) / whole, parameters, groups


def _squared(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))) ** 2


def _group(name: str) -> str:
    """A parameter's name without the numbers of layers and experts."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


# ---- the state in which both are computed


def suspended(model: nn.Module) -> Any:
    """The model without our patch, for a while; it need not have one."""
    patch = find_patch(model)
    return nullcontext() if patch is None else patch.suspended()


@contextmanager
def without_dropout(model: nn.Module, notes: list[str]) -> Iterator[None]:
    """Dropout is 0 meanwhile, and a note says so; the model is otherwise as it was, in training or not."""
    dropouts = [(name, module, module.p) for name, module in dropouts_of(model).items() if module.p > 0]
    for _, module, _ in dropouts:
        module.p = 0.0
    if dropouts and model.training:
        notes.append(f"dropout is off here, at {len(dropouts)} places ({dropouts[0][0]}, ...)")
    try:
        yield
    finally:
        for _, module, p in dropouts:
            module.p = p


@contextmanager
def other_mode(model: nn.Module) -> Iterator[str]:
    """A model in evaluation that was in training, and the other way round, for a while: which it is in. What it keeps
    of what it sees (batch statistics) is as before then."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.train(not model.training)
    switched = set_checkpointing(model, False)  # what runs again in backward would not be float64
    try:
        yield "in training" if model.training else "in evaluation"
    finally:
        if switched:
            set_checkpointing(model, True)
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def set_checkpointing(model: nn.Module, on: bool) -> bool:
    """Switch gradient checkpointing of every layer that has it; whether this changed any layer."""
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
    twin = copy.deepcopy(model)
    root, patch = find_root(twin), find_patch(twin)
    if patch is not None and patch.backend_on(root.device) == "flex" and flex.unfit(root.device, dtype):
        patch.backend = "segments" if computes("segments", patch.mask) else "dense"
        notes.append(
            f'in {str(dtype).removeprefix("torch.")} it is backend "{patch.backend}" that is compared, since '
            f"{flex.unfit(root.device, dtype)}"
        )
    set_checkpointing(twin, False)  # what runs again in backward would not be float64 throughout
    if getattr(root.config.get_text_config(), "_experts_implementation", None) not in (None, "eager"):
        root.set_experts_implementation("eager")  # the others have no float64
    return in_float64(twin) if dtype == torch.float64 else twin.to(dtype)
