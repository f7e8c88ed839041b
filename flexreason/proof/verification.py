"""Hold one pass against the N samples on a model and data of your own: exact, or the culprit.

Loss, every log-probability and the gradient of every parameter of one pass over the tree are compared with those
of the samples run one by one through the untouched model. In the model's own dtype both are off by rounding, so
there the single pass may be as far from the fp64 samples as the samples themselves are, within a factor; in fp64,
where memory allows, it must be equal. Randomness (dropout) is off meanwhile.

    flexreason verify Qwen/Qwen3-0.6B --data samples.jsonl
    flexreason verify ./my-model-or-its-config.json          # random trees that cross the config's length constants
"""

import argparse
import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flexreason.blocks import BLOCK
from flexreason.layout import Layout, unmerge
from flexreason.logprobs import token_logprobs
from flexreason.loss import is_weighted
from flexreason.memory import available_bytes, peak_bytes
from flexreason.patching import find_patch, find_root, patch, unpatch
from flexreason.proof import oracle
from flexreason.proof.diagnose import layout_faults, model_fault
from flexreason.proof.shrink import length_constants
from flexreason.proof.testing import each_gradient, relative_l2, true_float64
from flexreason.refuse import refuse_rope, standing, trust, untested
from flexreason.row import IGNORED, Row, collate
from flexreason.sample import Sample
from flexreason.tree import lay_out

EXACT = 1e-9
"""The largest relative error in fp64."""

FACTOR = 2.0
"""How much further from the reference the single pass may be than the samples, in a dtype that rounds."""

FLOOR = 1e-4
"""Of the whole gradient's norm: groups of parameters with less are measured against this."""

WORK = 3e11
"""Tokens computed times parameters, of what is chosen for a run: half a minute to a minute on a laptop."""

CONVERSATIONS = 8
"""The most that are chosen."""


GROUP_FACTOR = 4.0
"""The same for the gradient of one group of parameters, which scatters more."""

DROWNED = 0.3
"""Relative error of the samples' own gradients from which on nothing can be told by them."""


class Limits(NamedTuple):
    """Up to which relative error each is called equal."""

    loss: float
    logprobs: float
    gradients: float
    groups: dict[str, float]  # by group of parameters

    def of(self, group: str) -> float:
        return self.groups.get(group, self.gradients)


@dataclass(frozen=True)
class Error:
    """How far one way of computing is from the reference: relative errors."""

    way: str  # "one pass" or "samples"
    dtype: str
    reference: str
    loss: float
    logprobs: float
    gradients: float | None  # of all parameters; None without a backward
    groups: dict[str, float]  # the same by group of parameters
    limits: Limits | None  # None for what sets them

    @property
    def worst(self) -> str | None:
        """The group of parameters that is furthest off, by what is allowed it."""
        limits = self.limits
        return max(
            self.groups, key=lambda group: self.groups[group] / (limits.of(group) if limits else 1.0), default=None
        )

    @property
    def faults(self) -> list[str]:
        """What is above its limit, or no number."""
        if self.limits is None:
            return []
        allowed = [("loss", self.loss, self.limits.loss), ("logprobs", self.logprobs, self.limits.logprobs)]
        if self.gradients is not None:
            allowed.append(("gradients", self.gradients, self.limits.gradients))
        allowed += [("gradients", error, self.limits.of(group)) for group, error in self.groups.items()]
        return list(dict.fromkeys(name for name, error, limit in allowed if not error <= limit))


@dataclass(frozen=True)
class Report:
    """What `verify` found. `ok` only if every comparison that could be made came out equal."""

    model: str
    dtype: str
    backend: str
    loss: str
    verdict: str  # "exact", "NOT exact", "no verdict"
    errors: list[Error] = field(default_factory=list)
    culprit: str | None = None
    notes: list[str] = field(default_factory=list)
    conversations: int = 0
    turns: int = 0
    sample_tokens: int = 0
    tree_tokens: int = 0
    targets: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0

    @property
    def ok(self) -> bool:
        return self.verdict == "exact"

    def __str__(self) -> str:
        lines = [
            f"{self.model}, {self.dtype}, backend {self.backend}, loss {self.loss}",
            f"{self.conversations} conversations, {self.turns} turns, {self.targets} targets: "
            f"{self.sample_tokens} tokens in samples, {self.tree_tokens} in one pass",
            "",
        ]
        if self.errors:
            lines.append(f"{'relative errors':<28}{'loss':>10}{'log-probs':>12}{'gradients':>12}")
        for e in self.errors:
            lines.append(f"{f'{e.way}, {e.dtype}':<28}" + _figures(e.loss, e.logprobs, e.gradients))
            if e.limits:
                above = f"   above it: {', '.join(e.faults)}" if e.faults else ""
                lines.append(f"{'    limit':<28}{_figures(*e.limits[:3])}{above}")
                if e.worst is not None:
                    lines.append(
                        f"    worst gradient: {e.worst}, {e.groups[e.worst]:.1e} of {e.limits.of(e.worst):.1e}"
                    )
        if references := sorted({e.reference for e in self.errors}):
            lines.append(f"against {'; '.join(references)}")
        lines += [f"note: {note}" for note in self.notes]
        lines.append(f"{self.seconds:.0f} s, peak memory {self.peak_bytes / 2**30:.1f} GiB")
        lines += ["", f"verdict: {self.verdict}"]
        if self.culprit:
            lines.append(f"culprit: {self.culprit}")
        return "\n".join(lines)


def verify(
    model: nn.Module,
    layouts: Sequence[Layout],
    samples: Sequence[Sequence[Sample]] | None = None,
    *,
    tokens: int | None = None,
    float64: bool | None = None,
) -> Report:
    """Hold one pass against the samples, on a patched model as it is patched, or else as `fr.patch` would patch it.

    `samples`: what each layout was made from; by default what `fr.unmerge` makes of it. `tokens`: the most to
    compute, samples and trees together; by default what a laptop does in under a minute. `float64`: whether to
    compare in fp64 too; by default if there is memory for a copy. Once it has passed, `fr.patch` takes models of this
    class, even one that it could not test by itself.
    """
    return _Verification(model, layouts, samples, tokens, float64).run()


def _figures(loss: float, logprobs: float, gradients: float | None) -> str:
    return f"{loss:>10.1e}{logprobs:>12.1e}" + (f"{'-':>12}" if gradients is None else f"{gradients:>12.1e}")


class NoVerdict(Exception):
    """Something that keeps a comparison from meaning anything."""


class _Verification:
    def __init__(
        self,
        model: nn.Module,
        layouts: Sequence[Layout],
        samples: Sequence[Sequence[Sample]] | None,
        tokens: int | None,
        float64: bool | None,
    ) -> None:
        if not layouts:
            raise ValueError("verify: no layouts; expected at least one conversation")
        self.model, self.root = model, find_root(model)
        for number, layout in enumerate(layouts):
            if not len(layout.target_turn) or int(torch.bincount(layout.target_turn).min()) == 0:
                raise ValueError(f"verify: conversation {number} has a turn without targets")
        given = [unmerge(layout) for layout in layouts] if samples is None else [list(s) for s in samples]
        if len(given) != len(layouts):
            raise ValueError(f"verify: {len(layouts)} layouts and samples for {len(given)}")
        self.notes: list[str] = []
        self.parameters = sum(p.numel() for p in model.parameters())
        if any(is_weighted(layout.target_weight) for layout in layouts):
            self.notes.append("target weights are left out of the comparison: every target counts once")
        self.all = [
            (dataclasses.replace(layout, target_weight=torch.ones_like(layout.target_weight)), of_layout)
            for layout, of_layout in zip(layouts, given, strict=True)
        ]
        if tokens is not None and tokens < 1:
            raise ValueError(f"verify: tokens: expected at least 1, found {tokens}")
        budget = tokens if tokens is not None else min(8192, max(64, int(WORK / max(1, self.parameters))))
        already = find_patch(model)
        self.chosen = choose(self.all, budget, self.notes, cut=already is None or already.mask == "interval")
        self.on_one_side_of_rope()
        self.say_what_is_not_crossed()
        self.float64 = float64
        self.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self.errors: list[Error] = []
        self.culprit: str | None = None
        self.own_patch = find_patch(model) is None

    def on_one_side_of_rope(self) -> None:
        """RoPE that reads the longest position of a row: leave out what stands behind its threshold."""
        config = self.root.config.get_text_config()
        while True:
            try:
                return refuse_rope(config, collate([layout for layout, _ in self.chosen]))
            except ValueError:
                if len(self.chosen) == 1:
                    raise
                longest = max(self.chosen, key=lambda pair: max(map(_length, pair[1])))
                self.chosen.remove(longest)
                self.notes.append(
                    "a conversation on the other side of RoPE's threshold is left out; verify it by itself"
                )

    def say_what_is_not_crossed(self) -> None:
        longest = max(_length(sample) for _, samples in self.chosen for sample in samples)
        for key, length in length_constants(self.root.config).items():
            if longest <= length:
                self.notes.append(f"{key} {length}: no sample here is longer, so what is behind it is not compared")

    def run(self) -> Report:
        start = time.monotonic()
        with ExitStack() as stack:
            meter = stack.enter_context(peak_bytes(next(self.model.parameters()).device))
            faults = [
                f"conversation {number}: {fault}"
                for number, (layout, samples) in enumerate(self.chosen)
                for fault in layout_faults(layout, samples)
            ]
            against = standing(self.root, self.model)
            if against is not None and against[0] == "refused":
                raise ValueError(f"verify: {type(self.root).__name__} is refused by patch: {against[1]}")
            if self.own_patch:
                with untested():
                    patch(self.model)
                stack.callback(unpatch, self.model)
            found = find_patch(self.model)
            assert found is not None
            self.patch = found
            if not any(p.requires_grad for p in self.model.parameters()):
                self.notes.append("gradients are not compared: no parameter is trained")
            if self.forward_only(self.model):
                self.notes.append('gradients are not compared: backend "flex" has no backward on CPU')
            stack.enter_context(_without_dropout(self.model, self.notes))
            if self.dtype == torch.float64 and _set_checkpointing(self.model, False):
                self.notes.append(
                    "gradient checkpointing is off here: what runs again in backward would not be float64"
                )
                stack.callback(_set_checkpointing, self.model, True)
            try:
                if faults:
                    self.culprit = "; ".join(faults[:3])
                else:
                    self.compare()
                verdict = "exact" if self.culprit is None else "NOT exact"
            except NoVerdict as why:
                self.culprit, verdict = str(why), "no verdict"
        if verdict == "exact" and any(e.dtype == "float64" for e in self.errors):
            trust(self.root)
        trees = [layout for layout, _ in self.chosen]
        return Report(
            model=type(self.root).__name__,
            dtype=_name(self.dtype),
            backend=self.patch.backend_on(next(self.model.parameters()).device),
            loss=self.patch.loss,
            verdict=verdict,
            errors=self.errors,
            culprit=self.culprit,
            notes=self.notes,
            conversations=len(self.chosen),
            turns=sum(layout.n_samples for layout in trees),
            sample_tokens=sum(_length(s) for _, samples in self.chosen for s in samples),
            tree_tokens=sum(map(len, trees)),
            targets=sum(len(layout.target_ids) for layout in trees),
            seconds=time.monotonic() - start,
            peak_bytes=meter(),
        )

    def compare(self) -> None:
        """Fill in errors, from the reference down to the model's own dtype; the culprit of the first that fails."""
        self.check_repeatable()
        reference = None
        if self.wants_float64():
            high = self.copy_in(torch.float64)
            with true_float64():
                reference = self.n_samples(high)
                self.judge(high, reference, "the samples in float64", Limits(EXACT, EXACT, EXACT, {}))
            del high
        if self.dtype == torch.float64 or self.culprit:
            return
        if reference is not None:
            self.in_own_dtype(reference, "the samples in float64")
        else:
            self.without_reference()

    def in_own_dtype(self, reference: oracle.Reference, said: str) -> None:
        samples = self.n_samples(self.model)
        own = self.error("samples", self.model, _gradients_of(samples), samples, reference, said, None)
        self.errors.append(own)
        self.judge(self.model, reference, said, self.limits_from(own, 4 * torch.finfo(torch.float32).eps))

    def without_reference(self) -> None:
        """Where nothing more precise fits or exists: other kernels for the same samples show the size of rounding."""
        samples = self.n_samples(self.model)
        said, eps = f"the samples in {_name(self.dtype)}", torch.finfo(self.dtype).eps
        try:
            with _suspended(self.model), _other_attention(self.root) as other:
                again = self.n_samples(self.model)
                own = self.error(f"samples, {other}", self.model, _gradients_of(again), again, samples, said, None)
        except ValueError:
            self.notes.append(
                "rounding is not measured, as this model has no other attention: the limits are fixed ones"
            )
            limits = Limits(4 * eps, 4 * eps, 32 * eps, {})
        else:
            self.errors.append(own)
            limits = self.limits_from(own, eps)
        self.judge(self.model, samples, said, limits)

    def limits_from(self, own: Error, rounding: float) -> Limits:
        """How far one pass may be off, in a dtype in which the samples themselves are off by this much."""
        if own.gradients is not None and not own.gradients < DROWNED:
            raise NoVerdict(
                f"the samples' own gradients are {own.gradients:.1e} off in {own.dtype}: rounding drowns them"
            )
        loss, logprobs = max(own.loss, own.logprobs, rounding), max(own.logprobs, rounding)
        groups = {group: GROUP_FACTOR * max(error, rounding) for group, error in own.groups.items()}
        return Limits(FACTOR * loss, FACTOR * logprobs, FACTOR * max(own.gradients or 0.0, rounding), groups)

    def judge(self, model: nn.Module, reference: oracle.Reference, said: str, limits: Limits) -> None:
        """One pass against a reference; if it fails, find out why."""
        loss, logprobs, gradients = self.single_pass(model)
        found = oracle.Reference(loss_sum=loss, logprobs=logprobs, gradients={}, tokens=0)
        error = self.error("one pass", model, gradients, found, reference, said, limits)
        self.errors.append(error)
        if error.faults:
            self.culprit = self.find_culprit(model, error)

    def single_pass(self, model: nn.Module) -> tuple[float, list[Tensor], Callable | None]:
        """(loss summed over targets, log-probabilities by sample, a run of backward) of the patched model."""
        row = self.row(model)
        forward_only = self.forward_only(model)
        real = row["labels"][0] != IGNORED
        with torch.set_grad_enabled(not forward_only):
            out = model(**row)
        loss, logits = out.loss, out.logits
        if logits is None:  # the loss made them, a chunk at a time
            with torch.no_grad():
                flat = token_logprobs(model, row)[real]
        else:
            logits = logits.detach()[0, real]
            logits = logits if logits.dtype == torch.float64 else logits.float()
            flat = logits.log_softmax(-1).gather(1, row["labels"][0, real, None])[:, 0]
        sizes = [int(n) for layout, _ in self.chosen for n in torch.bincount(layout.target_turn)]
        order = torch.cat([_by_sample(layout, start) for layout, start in _starts(self.chosen)])
        logprobs = list(flat[order.to(flat.device)].split(sizes))
        n = int(real.sum())
        # The same forward serves loss and gradients: `loss` waits for its backward, one parameter at a time.
        total = float(loss.detach()) * n

        def backward(handle: Callable[[str, Tensor], None]) -> None:
            with each_gradient(model, handle):
                (loss * n).backward()

        return total, logprobs, None if forward_only or not loss.requires_grad else backward

    def error(
        self,
        way: str,
        model: nn.Module,
        backward: Callable | None,
        found: oracle.Reference,
        reference: oracle.Reference,
        said: str,
        limits: Limits | None,
    ) -> Error:
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        gradients: float | None = None
        groups: dict[str, float] = {}
        if backward is not None and reference.gradients:
            gradients, groups = _compare_gradients(backward, reference.gradients)
        difference = abs(found.loss_sum - reference.loss_sum)
        return Error(
            way=way,
            dtype=_name(dtype),
            reference=said,
            loss=difference / max(abs(reference.loss_sum), 1e-300) if difference else 0.0,
            logprobs=relative_l2([torch.cat(found.logprobs)], [torch.cat(reference.logprobs)]),
            gradients=gradients,
            groups=groups,
            limits=limits,
        )

    def find_culprit(self, model: nn.Module, error: Error) -> str:
        assert error.limits is not None
        limit = 100 * EXACT if error.dtype == "float64" else 8 * error.limits.logprobs
        found = find_patch(model)
        assert found is not None
        with true_float64() if error.dtype == "float64" else nullcontext():
            if fault := model_fault(model, found, self.row(model), self.chosen, limit):
                return fault
        if "logprobs" in error.faults:
            return (
                "head: the hidden states of all predicting tokens are right, and their log-probabilities are not: a "
                "scale, cap, bias or weight of the head is missing or other than the model's own"
            )
        if "loss" in error.faults:
            return "loss: every log-probability is right, and their mean is not: its weights, or what it is divided by"
        return f"backward: loss and log-probabilities are right, and gradients are not, of {error.worst} most of all"

    def check_repeatable(self) -> None:
        """A model that differs between two identical runs, or has no finite loss, has no single truth to compare."""
        shortest = min((s for _, samples in self.chosen for s in samples), key=_length)
        first, second = (self.n_samples(self.model, [shortest], gradients=False) for _ in range(2))
        if not math.isfinite(first.loss_sum):
            raise NoVerdict(
                f"the loss of a sample alone is {first.loss_sum} in the untouched model; nothing to compare"
            )
        differ = relative_l2(second.logprobs, first.logprobs)
        if differ > 64 * torch.finfo(torch.float32 if self.dtype == torch.float64 else self.dtype).eps:
            raise NoVerdict(
                f"the untouched model gives log-probabilities {differ:.1e} apart in two identical runs; turn its "
                "randomness off first"
            )

    def wants_float64(self) -> bool:
        if self.dtype == torch.float64:
            return True
        if self.float64 is False:
            return False
        reason = None
        device = next(self.model.parameters()).device
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        needed, there = 9 * (self.parameters + trained), available_bytes(device)  # weights, and gradients once
        whole = all(p.is_floating_point() for p in self.model.parameters())
        if not whole or getattr(self.root, "is_quantized", False):
            reason = "its weights are quantised"
        elif len({p.device for p in self.model.parameters()}) > 1:
            reason = "its weights lie on several devices"
        elif device.type == "mps":
            reason = "this device has no float64"
        elif needed > there and not self.float64:
            reason = f"it takes {needed / 2**30:.1f} GiB, and {there / 2**30:.1f} are free"
        if reason:
            self.notes.append(f"not compared in float64: {reason}")
        return reason is None

    def copy_in(self, dtype: torch.dtype) -> nn.Module:
        """The model, patched alike, in another dtype."""
        if dtype == self.dtype:
            return self.model
        made = copy.deepcopy(self.model)
        root = find_root(made)
        _set_checkpointing(made, False)  # what runs again in backward would not be float64 throughout
        if getattr(root.config.get_text_config(), "_experts_implementation", None) not in (None, "eager"):
            root.set_experts_implementation("eager")  # the others have no float64
        return made.to(dtype)

    def row(self, model: nn.Module) -> Row:
        device = next(model.parameters()).device
        block_size = BLOCK if self.patch.backend_on(device) == "flex" else 8  # which pads less
        row = collate([layout for layout, _ in self.chosen], block_size=block_size)
        return {key: value.to(device) for key, value in row.items()}

    def forward_only(self, model: nn.Module) -> bool:
        device = next(model.parameters()).device
        return device.type == "cpu" and self.patch.backend_on(device) == "flex"

    def n_samples(
        self, model: nn.Module, samples: Sequence[Sample] | None = None, gradients: bool = True
    ) -> oracle.Reference:
        """The samples through the model without our patch."""
        if samples is None:
            samples = [s for _, of_layout in self.chosen for s in of_layout]
        with _suspended(model):
            found = oracle.n_samples(model, samples, gradients=gradients and not self.forward_only(model))
        for number, logprobs in enumerate(found.logprobs):
            if not bool(logprobs.isfinite().all()):
                raise NoVerdict(f"sample {number} has a loss that is not finite in the untouched model")
        return found


def choose(
    all_: Sequence[tuple[Layout, list[Sample]]], budget: int, notes: list[str], cut: bool
) -> list[tuple[Layout, list[Sample]]]:
    """The shortest conversations that fit; where none does, the first turns of the shortest, or if that is not to be
    cut the whole of it."""

    def cost(pair: tuple[Layout, list[Sample]]) -> int:
        return len(pair[0]) + sum(map(_length, pair[1]))

    chosen: list[tuple[Layout, list[Sample]]] = []
    spent = 0
    for pair in sorted(all_, key=cost):
        if spent + cost(pair) > budget or len(chosen) == CONVERSATIONS:
            break
        chosen.append(pair)
        spent += cost(pair)
    if chosen:
        if len(chosen) < len(all_):
            notes.append(f"the {len(chosen)} shortest of {len(all_)} conversations")
        return chosen
    shortest = min(all_, key=cost)
    if not cut:
        notes.append(f"the shortest of {len(all_)} conversations, though it is longer than {budget} tokens to compute")
        return [shortest]
    _, samples = shortest
    for turns in range(len(samples), 0, -1):
        first = samples[:turns]
        shorter = (lay_out(first), first)
        if cost(shorter) <= budget or turns <= 2:
            break
    notes.append(
        f"all {len(all_)} conversations are longer than the {budget} tokens to compute; the first {turns} turns of the "
        f"shortest stand for them ({cost(shorter)} tokens; tokens= or --tokens takes more)"
    )
    return [shorter]


def _length(sample: Sample) -> int:
    return len(sample.prompt_ids) + len(sample.target_ids)


def _starts(chosen: Sequence[tuple[Layout, Any]]) -> Iterator[tuple[Layout, int]]:
    start = 0
    for layout, _ in chosen:
        yield layout, start
        start += len(layout.target_ids)


def _by_sample(layout: Layout, start: int) -> Tensor:
    """Where a layout's targets stand in a row, sample by sample."""
    return start + torch.argsort(layout.target_turn, stable=True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _group(name: str) -> str:
    """A parameter's name without the numbers of layers and experts."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _gradients_of(found: oracle.Reference) -> Callable | None:
    """Gradients at hand, given out one by one and forgotten, like a backward's."""

    def backward(handle: Callable[[str, Tensor], None]) -> None:
        while found.gradients:
            handle(*found.gradients.popitem())

    return backward if found.gradients else None


def _compare_gradients(backward: Callable, expected: dict[str, Tensor]) -> tuple[float, dict[str, float]]:
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


def _suspended(model: nn.Module) -> Any:
    found = find_patch(model)
    return nullcontext() if found is None else found.suspended()


@contextmanager
def _without_dropout(model: nn.Module, notes: list[str]) -> Iterator[None]:
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


def _set_checkpointing(model: nn.Module, on: bool) -> bool:
    """Gradient checkpointing of every layer that knows of it; whether any was the other way."""
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", on) is not on]
    for layer in layers:
        layer.gradient_checkpointing = on  # type: ignore[assignment]
    return bool(layers)


@contextmanager
def _other_attention(root: Any) -> Iterator[str]:
    """The untouched model with another implementation of attention, which rounds in another order."""
    before = root.config._attn_implementation
    other = "sdpa" if before == "eager" else "eager"
    root.set_attn_implementation(other)
    try:
        yield other
    finally:
        root.set_attn_implementation(before)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", help="a name, a folder, or a config.json (random weights)")
    parser.add_argument("--data", type=Path, help="JSONL of samples: prompt_ids, target_ids; conversation groups them")
    parser.add_argument("--backend", default="auto", help="auto, segments, flex, dense")
    parser.add_argument("--loss", default="model", help="model, chunked")
    parser.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16, float16, float64")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, help="the most tokens to compute, samples and trees together")
    parser.add_argument("--no-float64", action="store_true", help="leave the comparison in fp64 out")
    parser.add_argument("--seed", type=int, default=0, help="of random trees, and of weights where there are none")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(options: argparse.Namespace) -> int:
    from flexreason.load import load_model, random_conversations, read_samples

    model, notes = load_model(options.model, options.dtype, options.device, options.seed, options.trust_remote_code)
    if options.data is not None:
        conversations = read_samples(options.data, find_root(model).config.get_text_config().vocab_size)
    else:
        conversations, more = random_conversations(find_root(model).config, options.tokens, options.seed)
        notes += more
    layouts = [lay_out(samples) for samples in conversations]
    with untested():
        patch(model, options.backend, loss=options.loss)
    report = verify(model, layouts, conversations, tokens=options.tokens, float64=False if options.no_float64 else None)
    report = dataclasses.replace(report, notes=[*notes, *report.notes])
    if options.json:
        print(json.dumps({**dataclasses.asdict(report), "ok": report.ok}))
    else:
        print(report)
    return 0 if report.ok else 1
