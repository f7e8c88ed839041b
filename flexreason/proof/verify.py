"""Hold one pass against the N samples on a model and data of your own: exact, or the culprit.

Loss, every log-probability and the gradient of every parameter of one pass over the tree are compared with those
of the samples run one by one through the untouched model. In the model's own dtype both are off by rounding, so
there the single pass may be as far from the fp64 samples as the samples themselves are, within a factor; in fp64,
where memory allows, it must be equal. Randomness (dropout) is off meanwhile.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from flexreason.memory import available_bytes, peak_bytes
from flexreason.model.added_code import note_verified_code
from flexreason.model.holders import note_verified_holders, verifying
from flexreason.model.hooks import Patch, apply_patch, find_patch, find_root, unpatch
from flexreason.model.refuse import reason_against, reason_against_adapters
from flexreason.proof import oracle
from flexreason.proof.compare import (
    EXACT,
    Computed,
    by_samples,
    compare,
    copy_in,
    one_pass,
    other_attention,
    other_mode,
    set_checkpointing,
    suspended,
    without_dropout,
)
from flexreason.proof.conversations import Conversation, choose, has_fork, tokens_for
from flexreason.proof.diagnose import layout_faults, model_fault
from flexreason.proof.draws import SameDraws
from flexreason.proof.evidence import Evidence, evidence_of_model, note_verified
from flexreason.proof.float64 import relative_l2, true_float64
from flexreason.proof.selftest import UNTESTED
from flexreason.proof.verdict import Error, Limits, NoVerdict, Report, limits_from
from flexreason.talk import telling
from flexreason.tree.blocks import BLOCK
from flexreason.tree.layout import Layout
from flexreason.tree.row import Row, collate
from flexreason.tree.sample import Sample


def verify(
    model: nn.Module,
    layouts: Sequence[Layout],
    samples: Sequence[Sequence[Sample]] | None = None,
    *,
    tokens: int | None = None,
    float64: bool | None = None,
) -> "Report":
    """Hold one pass against the samples, on a patched model as it is patched, or else as `fr.patch` would patch it.

    Once it has passed, `fr.patch` takes models of this class, even one that it could not test by itself.

    Args:
        samples: what each layout was made from; by default what `fr.unmerge` makes of it.
        tokens: the most to compute, samples and trees together; by default what a laptop does in under a minute.
        float64: whether to compare in fp64 too; by default if there is memory for a copy.

    >>> import flexreason as fr
    >>> from transformers import Qwen3Config, Qwen3ForCausalLM
    >>> model = Qwen3ForCausalLM(Qwen3Config(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2, head_dim=8))
    >>> layout = fr.lay_out_turns([([1, 2], [10, 11], [20]), ([3], [12], [21])])
    >>> fr.verify(model, [layout]).verdict
    'exact'
    """
    start, root, notes = time.monotonic(), find_root(model), list[str]()
    if tokens is not None and tokens < 1:
        raise ValueError(f"verify: tokens: expected at least 1, found {tokens}")
    most = tokens if tokens is not None else tokens_for(sum(p.numel() for p in model.parameters()))
    patched_before = find_patch(model)
    cut = patched_before is None or patched_before.mask == "interval"
    chosen = choose(layouts, samples, root.config, most, notes, cut)
    faults = [
        f"conversation {number}: {fault}"
        for number, conversation in enumerate(chosen)
        for fault in layout_faults(conversation.layout, conversation.samples)
    ]
    known = evidence_of_model(root)
    if refused := _reason_refused(root, model, known):
        raise ValueError(f"verify: {type(root).__name__} is refused by patch: {refused}")
    with ExitStack() as stack:
        for context in (torch.inference_mode(False), torch.enable_grad(), verifying(), telling.of("verify")):
            stack.enter_context(context)
        meter = stack.enter_context(peak_bytes(next(model.parameters()).device))
        if patched_before is None:
            apply_patch(model)
            stack.callback(unpatch, model)
        patch = find_patch(model)
        assert patch is not None
        comparison = _Comparison(model, patch, chosen, float64, notes)
        comparison.both_modes = known.verdict == UNTESTED
        stack.enter_context(comparison.quiet())
        verdict, culprit = "exact", None
        try:
            culprit = "; ".join(faults[:3]) or comparison.culprit()
            verdict = "exact" if culprit is None else "NOT exact"
        except NoVerdict as why:
            verdict, culprit = "no verdict", str(why)
        backend = patch.backend_on(next(model.parameters()).device)
    if verdict == "exact":
        why_not = comparison.why_not_for_all_data()
        if not why_not:
            note_verified(root)
            note_verified_holders(root)
            note_verified_code(root)
        elif known.against is not None:
            notes.append(f"this does not count for fr.patch, which goes on to refuse the model: {why_not}")
    trees = [conversation.layout for conversation in chosen]
    return Report(
        model=type(root).__name__,
        dtype=_name(comparison.dtype),
        backend=backend,
        loss=patch.loss,
        verdict=verdict,
        errors=comparison.errors,
        culprit=culprit,
        notes=notes,
        conversations=len(chosen),
        numbers=[conversation.number for conversation in chosen],
        turns=sum(layout.n_samples for layout in trees),
        sample_tokens=sum(len(sample) for conversation in chosen for sample in conversation.samples),
        tree_tokens=sum(map(len, trees)),
        targets=sum(len(layout.target_ids) for layout in trees),
        seconds=time.monotonic() - start,
        peak_bytes=meter(),
    )


def _reason_refused(root: Any, model: nn.Module, known: Evidence) -> str:
    """Why `patch` refuses a model whatever is found here, or nothing."""
    if against := reason_against_adapters(model) or reason_against(root):
        return against[0]
    return known.against[0] if known.verdict == "refused" and known.against else ""


class _Reference(NamedTuple):
    """The samples that something is held against, and what the report calls them."""

    name: str
    samples: oracle.Reference


class _Comparison:
    """One pass and the samples on a patched model, from the reference down to the model's own dtype."""

    def __init__(
        self, model: nn.Module, patch: Patch, chosen: list[Conversation], float64: bool | None, notes: list[str]
    ) -> None:
        self.both_modes = self.is_random = False  # whether to look at training and evaluation, and one is random
        self.model, self.patch, self.root = model, patch, patch.root
        self.chosen, self.float64, self.notes = chosen, float64, notes
        self.samples = [sample for conversation in chosen for sample in conversation.samples]
        self.device = next(model.parameters()).device
        self.dtype = _dtype_of(model)
        self.forward_only = self.device.type == "cpu" and patch.backend_on(self.device) == "flex"
        self.errors: list[Error] = []

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """What draws at random or runs again in backward is off, and said."""
        if not any(p.requires_grad for p in self.model.parameters()):
            self.notes.append("gradients are not compared: no parameter is trained")
        if self.forward_only:
            self.notes.append('gradients are not compared: backend "flex" has no backward on CPU')
        with without_dropout(self.model, self.notes):
            switched = self.dtype == torch.float64 and set_checkpointing(self.model, False)
            if switched:
                self.notes.append(
                    "gradient checkpointing is off here: what runs again in backward would not be float64"
                )
            try:
                yield
            finally:
                if switched:
                    set_checkpointing(self.model, True)

    def culprit(self) -> str | None:
        """What is wrong with the first comparison that fails; None where all are equal."""
        self.check_repeatable()
        if not self.wants_float64():
            return self.without_float64()
        with telling.stage("copying the model in float64"):
            high = self.model if self.dtype == torch.float64 else copy_in(self.model, torch.float64, self.notes)
        with true_float64():
            reference = _Reference("the samples in float64", self.run_samples(high))
            culprit = self.judge(high, reference, Limits(EXACT, EXACT, EXACT, {})) or self.in_the_other_mode(high)
        del high
        if culprit or self.dtype == torch.float64:
            return culprit
        own = self.error("samples", self.model, by_samples(self.run_samples(self.model)), reference)
        return self.judge(self.model, reference, limits_from(own, 4 * torch.finfo(torch.float32).eps))

    def in_the_other_mode(self, model: nn.Module) -> str | None:
        """What is wrong in evaluation of a model in training, or the other way round, where nobody tested it."""
        if not self.both_modes:
            return None
        with other_mode(model) as mode, SameDraws():
            try:
                self.check_repeatable(model)
                reference = _Reference(f"the samples in float64, {mode}", self.run_samples(model))
            except NoVerdict:
                self.is_random = True
                return None
            culprit = self.judge(model, reference, Limits(EXACT, EXACT, EXACT, {}))
        return culprit and f"{mode}: {culprit}"

    def why_not_for_all_data(self) -> str:
        """Why what was found here says nothing of other data, or nothing."""
        if not any(error.dtype == "float64" for error in self.errors):
            return "it was not compared in float64"
        if not any(has_fork(conversation.layout) for conversation in self.chosen):
            return "no branch leaves the trunk here, so one pass is a sample as it stands; give it one with branches"
        return "in its other mode, of training and evaluation, two passes differ" if self.is_random else ""

    def without_float64(self) -> str | None:
        """Where nothing more precise fits or exists: other kernels for the same samples show the size of rounding."""
        reference = _Reference(f"the samples in {_name(self.dtype)}", self.run_samples(self.model))
        eps = torch.finfo(self.dtype).eps
        try:
            with suspended(self.model), other_attention(self.root) as other:
                again = by_samples(self.run_samples(self.model))
                own = self.error(f"samples, {other}", self.model, again, reference)
        except ValueError:
            self.notes.append(
                "rounding is not measured, as this model has no other attention: the limits are fixed ones"
            )
            limits = Limits(4 * eps, 4 * eps, 32 * eps, {})
        else:
            limits = limits_from(own, eps)
        return self.judge(self.model, reference, limits)

    def judge(self, model: nn.Module, reference: "_Reference", limits: Limits) -> str | None:
        """One pass against a reference; if it fails, what is wrong with it."""
        row = self.row(model)
        with telling.stage(f"one pass in {_name(_dtype_of(model))}"):
            computed = one_pass(model, row, backward=not self.forward_only)
            error = self.error("one pass", model, computed, reference, limits)
        if not error.faults:
            return None
        with telling.stage("it is not equal; looking for the culprit"):
            return self.find_culprit(model, row, error, limits)

    def error(
        self,
        way: str,
        model: nn.Module,
        computed: Computed,
        reference: "_Reference",
        limits: "Limits | None" = None,
    ) -> Error:
        """How far one way of computing is from a reference, for the report."""
        errors, dtype = compare(computed, reference.samples), _name(_dtype_of(model))
        self.errors.append(
            Error(way, dtype, reference.name, errors.loss, errors.logprobs, errors.gradients, errors.groups, limits)
        )
        return self.errors[-1]

    def find_culprit(self, model: nn.Module, row: Row, error: Error, limits: Limits) -> str:
        limit = 100 * EXACT if error.dtype == "float64" else 8 * limits.logprobs
        patch = find_patch(model)
        assert patch is not None
        with true_float64() if error.dtype == "float64" else nullcontext():
            if fault := model_fault(model, patch, row, self.chosen, limit):
                return fault
        if "logprobs" in error.faults:
            return (
                "head: the hidden states of all predicting tokens are right, and their log-probabilities are not: a "
                "scale, cap, bias or weight of the head is missing or other than the model's own"
            )
        if "loss" in error.faults:
            return "loss: every log-probability is right, and their mean is not: its weights, or what it is divided by"
        return f"backward: loss and log-probabilities are right, and gradients are not, of {error.worst} most of all"

    def check_repeatable(self, model: nn.Module | None = None) -> None:
        """A model that differs between two identical runs, or has no finite loss, has no single truth to compare."""
        shortest = min(self.samples, key=len)
        model = self.model if model is None else model
        first, second = (self.run_samples(model, [shortest], gradients=False) for _ in range(2))
        if not math.isfinite(first.loss_sum):
            raise NoVerdict(
                f"the loss of a sample alone is {first.loss_sum} in the untouched model; nothing to compare. Look "
                "at its weights and dtype"
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
        parameters = list(self.model.parameters())
        numbers = sum(p.numel() for p in parameters) + sum(p.numel() for p in parameters if p.requires_grad)
        needed, there = 9 * numbers, available_bytes(self.device)  # weights, and gradients once
        if not all(p.is_floating_point() for p in parameters) or getattr(self.root, "is_quantized", False):
            reason = "its weights are quantised"
        elif len({p.device for p in parameters}) > 1:
            reason = "its weights lie on several devices"
        elif self.device.type == "mps":
            reason = "this device has no float64"
        elif needed > there and not self.float64:
            reason = f"it takes {needed / 2**30:.1f} GiB, and {there / 2**30:.1f} are free"
        if reason:
            self.notes.append(f"not compared in float64: {reason}")
        return reason is None

    def row(self, model: nn.Module) -> Row:
        block_size = BLOCK if self.patch.backend_on(self.device) == "flex" else 8  # which pads less
        row = collate([conversation.layout for conversation in self.chosen], block_size=block_size)
        return {key: value.to(self.device) for key, value in row.items()}

    def run_samples(
        self, model: nn.Module, samples: Sequence[Sample] | None = None, gradients: bool = True
    ) -> oracle.Reference:
        """The samples through the model without our patch."""
        samples = self.samples if samples is None else samples
        words, total = f"the samples one by one in {_name(_dtype_of(model))}", sum(map(len, samples))
        with suspended(model):
            told = telling.each(samples, words, total, "tokens", len)
            reference = oracle.n_samples(model, told, gradients=gradients and not self.forward_only)
        for number, logprobs in enumerate(reference.logprobs):
            if not bool(logprobs.isfinite().all()):
                raise NoVerdict(
                    f"sample {number} has a loss that is not finite in the untouched model; look at its "
                    "weights and dtype, or use float64"
                )
        return reference


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
