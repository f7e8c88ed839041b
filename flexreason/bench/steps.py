"""The ways to train on the N samples of conversations: a step each, on the same model, samples and targets.

Exact ways: the samples one by one; padded, in micro-batches; packed side by side; and one pass over the tree under each
backend, or in the paper's order under lists that `create_block_mask` makes. For comparison, what computes something
else: one plain pass over everything, whose reasoning leaks into later turns; the tree with shifted labels, where the
first token of a response is predicted from the last token of its context copy; and a plain row of as many tokens.

In every way logits are made for target rows alone, and the loss is the mean over all targets. What a way makes anew
for every batch of data (masks, lists) is made in its step.

Shapes: L tokens, T targets.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import PreTrainedModel

from flexreason.attention import flex
from flexreason.attention.registry import choose_backend, find_decoder
from flexreason.bench.batches import (
    Attend,
    Batch,
    attending,
    pack,
    padded_batch,
    row_in_papers_order,
    side_by_side,
    unfit_to_pack,
)
from flexreason.model.head import Head, weighted_nll
from flexreason.model.hooks import find_patch, find_root
from flexreason.proof.compare import suspended
from flexreason.tree.layout import Layout, unmerge
from flexreason.tree.mask import mask_mod
from flexreason.tree.row import collate
from flexreason.tree.sample import Role, Sample


class UnfitError(ValueError):
    """A way that cannot be gone here, and why."""


@dataclass(frozen=True, eq=False)
class Way:
    """A step, and what its result is worth."""

    name: str
    step: Callable[[], float]  # forward and backward; the loss
    trains: bool = True  # or forward alone, where kernels have no backward
    exact: bool = True  # whether loss and gradients are those of the samples


@dataclass(frozen=True, eq=False)
class Case:
    """A patched model, and the conversations that every way is given."""

    model: nn.Module
    layouts: Sequence[Layout]
    loss: str = "model"  # or "chunked", in every way

    @property
    def root(self) -> PreTrainedModel:
        return find_root(self.model)

    @property
    def device(self) -> torch.device:
        return self.root.device

    @cached_property
    def row(self) -> dict[str, Tensor]:
        return {name: tensor.to(self.device) for name, tensor in collate(self.layouts).items()}

    @cached_property
    def samples(self) -> list[Sample]:
        return [sample for layout in self.layouts for sample in unmerge(layout)]

    @property
    def n_targets(self) -> int:
        return sum(len(layout.target_ids) for layout in self.layouts)


# ---- the N samples


def one_by_one(case: Case) -> Way:
    """Every sample by itself."""
    return plain(case, "N samples, one by one", [padded_batch([sample], case.device) for sample in case.samples])


def padded(case: Case) -> Way:
    """Samples of about one length together, as many as hold no more tokens than the row of one pass does.

    Padding stands behind them, under the causal mask that they have anyway: a mask of its own would cost more.
    """
    groups: list[list[Sample]] = []
    most = case.row["until"].shape[1]
    for sample in sorted(case.samples, key=len, reverse=True):
        if not groups or (len(groups[-1]) + 1) * len(groups[-1][0]) > most:
            groups.append([])
        groups[-1].append(sample)
    return plain(case, "N samples, padded", [padded_batch(group, case.device) for group in groups])


def packed(case: Case) -> Way:
    """Samples side by side through flash attention of variable lengths, in packs of the row's length or a sample's."""
    if why := unfit_to_pack(case.root):
        raise UnfitError(why)
    packs = pack(case.samples, case.row["until"].shape[1], case.device)
    return plain(case, "N samples, packed", [replace(batch, attention=side_by_side(batch)) for batch in packs])


def packed_dense(case: Case) -> Way:
    """All samples in one sequence, under the mask that transformers makes for packing: of all tokens by all tokens."""
    return plain(case, "N samples, packed, dense mask", pack(case.samples, 2**62, case.device))


# ---- one pass


def one_pass(case: Case, backend: str = "auto") -> Way:
    """All samples in one row. On a CPU flex has no backward: forward alone."""
    chosen = choose_backend(backend, case.device, case.root.dtype)
    trains = chosen != "flex" or case.device.type != "cpu"
    return Way(f"one pass, {chosen}", _over_row(case, chosen, trains), trains)


def interleaved(case: Case) -> Way:
    """The row in the paper's order, h t r_in r_out turn by turn, under its rule, through compiled flex attention.

    Its lists are made as users make them: by `create_block_mask`, from the rule, for every row.
    """
    _check_roles(case)
    row = row_in_papers_order(case.row)
    length = row["until"].shape[1]
    trains = case.device.type != "cpu"

    def attention() -> Attend:
        rule = mask_mod(row, mask="turn_role")
        lists = create_block_mask(rule, None, None, length, length, device=str(case.device))

        def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, **kwargs: Any) -> Tensor:
            if any(kwargs.get(name) is not None for name in ("sliding_window", "softcap", "s_aux")):
                raise NotImplementedError("no windows, softcaps and sinks in the paper's order")
            return flex.attend(query, key, value, lists, scaling)

        return attend

    real = row["labels"][0] >= 0
    batch = Batch(
        row["input_ids"], row["target_source"][0, real], row["labels"][0, real], row["position_ids"], attention
    )
    return plain(case, "one pass, interleaved, create_block_mask", [batch], trains=trains)


# ---- what is not the samples


def leaking(case: Case) -> Way:
    """One plain causal pass over each conversation, nothing twice: what later turns see holds the reasoning."""
    _check_roles(case)
    batches = []
    for layout in case.layouts:
        row = row_in_papers_order(collate([layout], length=len(layout), block_size=1))
        role = row["role"][0]
        once = role != int(Role.CONTEXT)
        ids, role = row["input_ids"][0, once], role[once]
        targets = ((role & int(Role.REASONING | Role.RESPONSE)) != 0).nonzero().squeeze(1)
        ids, sources, labels = (x.to(case.device) for x in (ids, targets - 1, ids[targets]))
        batches.append(Batch(ids[None], sources, labels))
    return plain(case, "one plain pass, leaking", batches, exact=False)


def shifted_labels(case: Case, backend: str = "auto") -> Way:
    """The tree with labels shifted in the paper's order: r_in stands before r_out, and so predicts its first token."""
    _check_roles(case)
    shifted = replace(case, layouts=[with_shifted_labels(layout) for layout in case.layouts])
    chosen = choose_backend(backend, case.device, case.root.dtype)
    return Way("one pass, labels shifted", _over_row(shifted, chosen, True), exact=False)


def with_shifted_labels(layout: Layout) -> Layout:
    """A layout of `lay_out_turns` in which the last context token of a response predicts its first generated one."""
    source = layout.target_source.clone()
    for turn in range(layout.n_samples):
        response, context = (
            ((layout.turn == turn) & (layout.role == int(role))).nonzero().squeeze(1)
            for role in (Role.RESPONSE, Role.CONTEXT)
        )
        if len(response) and len(context):
            source[layout.target_source == response[0] - 1] = context[-1]
    return replace(layout, target_source=source)


def plain_row(case: Case) -> Way:
    """One causal sequence of as many tokens and targets as the row: what any row of its length costs."""
    real = case.row["labels"][0] >= 0
    targets = case.row["target_source"][0, real], case.row["labels"][0, real]
    return plain(case, "a plain row", [Batch(case.row["input_ids"], *targets)], exact=False)


def _check_roles(case: Case) -> None:
    """What is told by roles needs those of the paper's layout: every target has a token of its own."""
    for layout in case.layouts:
        generated = (layout.role & int(Role.REASONING | Role.RESPONSE)) != 0
        if int(generated.sum()) != len(layout.target_ids):
            raise UnfitError("it is for layouts as lay_out_turns makes them, and these merge more, or have no roles")


# ---- steps


def plain(case: Case, name: str, batches: Sequence[Batch], trains: bool = True, exact: bool = True) -> Way:
    """Batches through the untouched model."""

    def step() -> float:
        root, total = case.root, torch.zeros((), device=case.device)
        with suspended(root), torch.set_grad_enabled(trains):
            for batch in batches:
                with attending(root, batch.attention):
                    output = find_decoder(root)(input_ids=batch.ids, position_ids=batch.positions, use_cache=False)
                    states = output[0].flatten(0, 1)[batch.sources]
                    share = _share(Head(root, output), states, batch.labels, case)
                    if trains:
                        share.backward()
                    total += share.detach()
        return float(total)

    return Way(name, step, trains, exact)


def _over_row(case: Case, backend: str, trains: bool) -> Callable[[], float]:
    def step() -> float:
        ours = find_patch(case.model)
        assert ours is not None, "the model is not patched"
        ours.backend = backend
        with torch.set_grad_enabled(trains):
            loss = case.model(**case.row).loss
            if trains:
                loss.backward()
        return float(loss.detach())

    return step


def _share(head: Head, states: Tensor, labels: Tensor, case: Case) -> Tensor:
    """The share that some targets have in the mean over all."""
    if case.loss == "chunked":
        weight = torch.full((len(labels),), 1 / case.n_targets, device=states.device)
        return weighted_nll(head, states, labels, weight)[0]
    return nn.functional.cross_entropy(head(states).float(), labels, reduction="sum") / case.n_targets


# ---- all of them

WAYS: dict[str, Callable[..., Way]] = {
    "one-by-one": one_by_one,
    "padded": padded,
    "packed": packed,
    "packed-dense": packed_dense,
    "one-pass": one_pass,
    "interleaved": interleaved,
    "leaking": leaking,
    "shifted-labels": shifted_labels,
    "plain-row": plain_row,
}

HONEST = ("one-by-one", "padded", "packed", "one-pass")
"""Those that are compared unless others are asked for."""


def chosen(case: Case, names: Sequence[str], backends: Sequence[str], notes: list[str]) -> list[Way]:
    """Ways by name, one pass under each backend; of what cannot be gone here, a note."""
    ways = []
    for name in names:
        for more in [{"backend": backend} for backend in backends] if name == "one-pass" else [{}]:
            try:
                ways.append(WAYS[name](case, **more))
            except UnfitError as why:
                notes.append(f"{name}: left out, since {why}")
    return ways
