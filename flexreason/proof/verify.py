"""Hold one pass against the N samples on a model and data of your own: exact, or the culprit.

Loss, every log-probability and the gradient of every parameter of one pass over the tree are compared with those
of the samples run one by one through the untouched model. In the model's own dtype both are off by rounding, so
there the single pass may be as far from the fp64 samples as the samples themselves are, within a factor; in fp64,
where memory allows, it must be equal. Randomness (dropout) is off meanwhile.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext

import torch
from torch import Tensor, nn

from flexreason.memory import available_bytes, peak_bytes
from flexreason.model.hooks import apply_patch, find_patch, find_root, unpatch
from flexreason.model.logprobs import token_logprobs
from flexreason.model.loss import is_weighted
from flexreason.proof import oracle
from flexreason.proof.conditions import copy_in, other_attention, set_checkpointing, suspended, without_dropout
from flexreason.proof.conversations import Given, choose, n_tokens, one_side_of_rope, tokens_for, what_is_not_crossed
from flexreason.proof.diagnose import layout_faults, model_fault
from flexreason.proof.float64 import each_gradient, relative_l2, true_float64
from flexreason.proof.gradients import Backward, compare_gradients, gradients_of
from flexreason.proof.report import Error, Limits, Report
from flexreason.proof.standing import standing, trust
from flexreason.tree.blocks import BLOCK
from flexreason.tree.layout import Layout, unmerge
from flexreason.tree.row import IGNORED, Row, collate
from flexreason.tree.sample import Sample

EXACT = 1e-9
"""The largest relative error in fp64."""

FACTOR = 2.0
"""How much further from the reference the single pass may be than the samples, in a dtype that rounds."""

GROUP_FACTOR = 4.0
"""The same for the gradient of one group of parameters, which scatters more."""

DROWNED = 0.3
"""Relative error of the samples' own gradients from which on nothing can be told by them."""


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

    >>> import flexreason as fr
    >>> from transformers import Qwen3Config, Qwen3ForCausalLM
    >>> model = Qwen3ForCausalLM(Qwen3Config(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2, head_dim=8))
    >>> layout = fr.lay_out_turns([([1, 2], [10, 11], [20]), ([3], [12], [21])])
    >>> verify(model, [layout]).verdict
    'exact'
    """
    return _Verification(model, layouts, samples, tokens, float64).run()


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
            Given(dataclasses.replace(layout, target_weight=torch.ones_like(layout.target_weight)), of_layout, number)
            for number, (layout, of_layout) in enumerate(zip(layouts, given, strict=True))
        ]
        if tokens is not None and tokens < 1:
            raise ValueError(f"verify: tokens: expected at least 1, found {tokens}")
        most = tokens if tokens is not None else tokens_for(self.parameters)
        already = find_patch(model)
        chosen = choose(self.all, most, self.notes, cut=already is None or already.mask == "interval")
        self.chosen = one_side_of_rope(self.root.config, chosen, self.notes)
        self.notes += what_is_not_crossed(self.root.config, self.chosen)
        self.float64 = float64
        self.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self.errors: list[Error] = []
        self.culprit: str | None = None
        self.own_patch = find_patch(model) is None

    def run(self) -> Report:
        start = time.monotonic()
        with ExitStack() as stack:
            meter = stack.enter_context(peak_bytes(next(self.model.parameters()).device))
            faults = [
                f"conversation {number}: {fault}"
                for number, one in enumerate(self.chosen)
                for fault in layout_faults(one.layout, one.samples)
            ]
            against = standing(self.root, self.model)
            if against is not None and against[0] == "refused":
                raise ValueError(f"verify: {type(self.root).__name__} is refused by patch: {against[1]}")
            if self.own_patch:
                apply_patch(self.model)
                stack.callback(unpatch, self.model)
            found = find_patch(self.model)
            assert found is not None
            self.patch = found
            if not any(p.requires_grad for p in self.model.parameters()):
                self.notes.append("gradients are not compared: no parameter is trained")
            if self.forward_only(self.model):
                self.notes.append('gradients are not compared: backend "flex" has no backward on CPU')
            stack.enter_context(without_dropout(self.model, self.notes))
            if self.dtype == torch.float64 and set_checkpointing(self.model, False):
                self.notes.append(
                    "gradient checkpointing is off here: what runs again in backward would not be float64"
                )
                stack.callback(set_checkpointing, self.model, True)
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
        trees = [one.layout for one in self.chosen]
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
            numbers=[one.number for one in self.chosen],
            turns=sum(layout.n_samples for layout in trees),
            sample_tokens=sum(n_tokens(s) for one in self.chosen for s in one.samples),
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
            high = self.model if self.dtype == torch.float64 else copy_in(self.model, torch.float64, self.notes)
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
        own = self.error("samples", self.model, gradients_of(samples), samples, reference, said, None)
        self.errors.append(own)
        self.judge(self.model, reference, said, self.limits_from(own, 4 * torch.finfo(torch.float32).eps))

    def without_reference(self) -> None:
        """Where nothing more precise fits or exists: other kernels for the same samples show the size of rounding."""
        samples = self.n_samples(self.model)
        said, eps = f"the samples in {_name(self.dtype)}", torch.finfo(self.dtype).eps
        try:
            with suspended(self.model), other_attention(self.root) as other:
                again = self.n_samples(self.model)
                own = self.error(f"samples, {other}", self.model, gradients_of(again), again, samples, said, None)
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

    def single_pass(self, model: nn.Module) -> tuple[float, list[Tensor], Backward | None]:
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
        sizes = [int(n) for one in self.chosen for n in torch.bincount(one.layout.target_turn)]
        order = torch.cat(list(_by_sample([one.layout for one in self.chosen])))
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
        backward: Backward | None,
        found: oracle.Reference,
        reference: oracle.Reference,
        said: str,
        limits: Limits | None,
    ) -> Error:
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        gradients: float | None = None
        groups: dict[str, float] = {}
        if backward is not None and reference.gradients:
            gradients, groups = compare_gradients(backward, reference.gradients)
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
        shortest = min((s for one in self.chosen for s in one.samples), key=n_tokens)
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

    def row(self, model: nn.Module) -> Row:
        device = next(model.parameters()).device
        block_size = BLOCK if self.patch.backend_on(device) == "flex" else 8  # which pads less
        row = collate([one.layout for one in self.chosen], block_size=block_size)
        return {key: value.to(device) for key, value in row.items()}

    def forward_only(self, model: nn.Module) -> bool:
        device = next(model.parameters()).device
        return device.type == "cpu" and self.patch.backend_on(device) == "flex"

    def n_samples(
        self, model: nn.Module, samples: Sequence[Sample] | None = None, gradients: bool = True
    ) -> oracle.Reference:
        """The samples through the model without our patch."""
        if samples is None:
            samples = [s for one in self.chosen for s in one.samples]
        with suspended(model):
            found = oracle.n_samples(model, samples, gradients=gradients and not self.forward_only(model))
        for number, logprobs in enumerate(found.logprobs):
            if not bool(logprobs.isfinite().all()):
                raise NoVerdict(f"sample {number} has a loss that is not finite in the untouched model")
        return found


def _by_sample(layouts: Sequence[Layout]) -> Iterator[Tensor]:
    """Where the targets of layouts side by side stand in their row, sample by sample."""
    start = 0
    for layout in layouts:
        yield start + torch.argsort(layout.target_turn, stable=True)
        start += len(layout.target_ids)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
