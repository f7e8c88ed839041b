"""The ways to train on the N samples of conversations: a step each, on the same model, samples and targets.

Exact ways: the samples one by one; padded, in micro-batches; packed side by side; and one pass over the tree under each
backend, or in the paper's order under lists that `create_block_mask` makes. For comparison, two that compute something
else: one plain pass over everything, whose reasoning leaks into later turns, and the tree with shifted labels, where
the first token of a response is predicted from the last token of its context copy.

In every way logits are made for target rows alone, and the loss is the mean over all targets. What a way makes anew
for every batch of data (masks, lists) is made in its step.

Shapes: B sequences of L tokens, T targets.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface, PreTrainedModel

from flexreason.attention import flex
from flexreason.attention.registry import find_decoder
from flexreason.attention.tree_row import choose_backend
from flexreason.head import Head, weighted_nll
from flexreason.layout import Layout, unmerge
from flexreason.mask import mask_mod
from flexreason.patching import find_patch, find_root
from flexreason.proof.conditions import suspended
from flexreason.row import collate
from flexreason.sample import Role, Sample

Attend = Callable[..., Tensor]
"""Attention of queries [1, H, L, D] over keys and values [1, G, L, D], with the keywords of a layer: [1, L, H, D]."""


class UnfitError(ValueError):
    """A way that cannot be gone here, and why."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences as an unpatched model takes them, and where their targets are."""

    ids: Tensor  # [B, L]
    sources: Tensor  # [T], places in the B x L tokens
    labels: Tensor  # [T]
    positions: Tensor | None = None  # [B, L], where they are not 0, 1, 2, ...
    attention: Callable[[], Attend] | None = None  # made anew for every forward; the model's own if there is none


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
    return plain(case, "N samples, one by one", [_padded([sample], case.device) for sample in case.samples])


def padded(case: Case) -> Way:
    """Samples of about one length together, as many as hold no more tokens than the row of one pass does.

    Padding stands behind them, under the causal mask that they have anyway: a mask of its own would cost more.
    """
    groups: list[list[Sample]] = []
    most = case.row["until"].shape[1]
    for sample in sorted(case.samples, key=_length, reverse=True):
        if not groups or (len(groups[-1]) + 1) * _length(groups[-1][0]) > most:
            groups.append([])
        groups[-1].append(sample)
    return plain(case, "N samples, padded", [_padded(group, case.device) for group in groups])


def packed(case: Case) -> Way:
    """Samples side by side through flash attention of variable lengths, in packs of the row's length or a sample's."""
    if why := unfit_to_pack(case.root):
        raise UnfitError(why)
    packs = pack(case.samples, case.row["until"].shape[1], case.device)
    return plain(case, "N samples, packed", [replace(one, attention=side_by_side(one)) for one in packs])


def packed_dense(case: Case) -> Way:
    """All samples in one sequence, under the mask that transformers makes for packing: of all tokens by all tokens."""
    return plain(case, "N samples, packed, dense mask", pack(case.samples, 2**62, case.device))


def pack(samples: Sequence[Sample], length: int, device: torch.device) -> list[Batch]:
    """Samples in as few packs of a length as they fill in turn; one that is longer has a pack of its own."""
    packs: list[list[Sample]] = [[]]
    free = length
    for sample in samples:
        if _length(sample) > free and packs[-1]:
            packs.append([])
            free = length
        packs[-1].append(sample)
        free -= _length(sample)
    return [_side_by_side(some, device) for some in packs]


def _length(sample: Sample) -> int:
    return len(sample.prompt_ids) + len(sample.target_ids)


def _padded(samples: Sequence[Sample], device: torch.device) -> Batch:
    longest = max(map(_length, samples))
    ids = torch.zeros(len(samples), longest, dtype=torch.long)
    for n, sample in enumerate(samples):
        ids[n, : _length(sample)] = torch.tensor([*sample.prompt_ids, *sample.target_ids])
    starts = [n * longest for n in range(len(samples))]
    return Batch(ids.to(device), _sources(samples, starts).to(device), _labels(samples).to(device))


def _side_by_side(samples: Sequence[Sample], device: torch.device) -> Batch:
    ids = [token for sample in samples for token in (*sample.prompt_ids, *sample.target_ids)]
    positions = torch.cat([torch.arange(_length(sample)) for sample in samples])
    starts = [0, *accumulate(map(_length, samples))][:-1]
    places = _sources(samples, starts).to(device), _labels(samples).to(device)
    return Batch(torch.tensor([ids], device=device), *places, positions[None].to(device))


def _sources(samples: Sequence[Sample], starts: Sequence[int]) -> Tensor:
    """The token before a target predicts it."""
    ends = [start + _length(sample) for start, sample in zip(starts, samples, strict=True)]
    ranges = [
        torch.arange(end - 1 - len(sample.target_ids), end - 1) for end, sample in zip(ends, samples, strict=True)
    ]
    return torch.cat(ranges)


def _labels(samples: Sequence[Sample]) -> Tensor:
    return torch.tensor([token for sample in samples for token in sample.target_ids])


def unfit_to_pack(root: PreTrainedModel) -> str:
    """Why the samples are not packed here, or nothing."""
    if root.device.type != "cuda":
        return "flash attention of variable lengths is for GPUs"
    if root.dtype not in (torch.bfloat16, torch.float16):
        return f"flash attention has no {str(root.dtype).removeprefix('torch.')}"
    return ""


def side_by_side(one: Batch) -> Callable[[], Attend]:
    """Attention within each sequence of a pack, backward included."""
    from torch.nn.attention.varlen import varlen_attn

    assert one.positions is not None
    starts = (one.positions[0] == 0).nonzero().squeeze(1)
    offsets = torch.cat([starts, starts.new_tensor([one.positions.shape[1]])]).to(torch.int32)
    longest = int(offsets.diff().max())
    # Until torch 2.12 groups of heads are taken as they come; since then they are announced.
    more: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if softcap is not None or s_aux is not None:
            raise NotImplementedError("flash attention of variable lengths has no softcap and no sinks")
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        within = (-1 if sliding_window is None else sliding_window - 1, 0)
        ends = (offsets, offsets, longest, longest)
        out: Any = varlen_attn(q, k, v, *ends, scale=scaling, window_size=within, **more)
        return out[None]

    return lambda: attend


# ---- one pass


def one_pass(case: Case, backend: str = "auto") -> Way:
    """All samples in one row. On a CPU flex has no backward: forward alone."""
    chosen = choose_backend(backend, case.device, case.root.dtype)
    trains = chosen != "flex" or case.device.type != "cpu"
    return Way(f"one pass, {chosen}", _over_row(case, case.row, chosen, trains), trains)


def interleaved(case: Case) -> Way:
    """The row in the paper's order, h t r_in r_out turn by turn, under its rule, through compiled flex attention.

    Its lists are made as users make them: by `create_block_mask`, from the rule, for every row.
    """
    _check_roles(case)
    row = in_paper_order(case.row)
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


def in_paper_order(row: dict[str, Tensor]) -> dict[str, Tensor]:
    """A row of `lay_out_turns` layouts, permuted: document by document, turn by turn, h t r_in r_out.

    `until` means nothing in this order, and is left out of use: the rule is that of turns and roles.
    """
    kind = torch.zeros_like(row["role"][0])
    for number, role in enumerate((Role.PROMPT, Role.REASONING, Role.CONTEXT, Role.RESPONSE)):
        kind[row["role"][0] == int(role)] = number
    kind[row["role"][0] == int(Role.CONTEXT | Role.RESPONSE)] = 3
    document = row["document"][0].long()
    document = torch.where(document < 0, document.max() + 1, document)  # padding stays behind all documents
    by = (document * (int(row["turn"].max()) + 2) + row["turn"][0] + 1) * 4 + kind
    order = torch.argsort(by, stable=True)
    new_place = torch.argsort(order)
    moved = {name: x[:, order] for name, x in row.items() if x.dim() == 2 and x.shape[1] == len(order)}
    return {**row, **moved, "target_source": new_place[row["target_source"]]}


# ---- what is not the samples


def leaking(case: Case) -> Way:
    """One plain causal pass over each conversation, nothing twice: what later turns see holds the reasoning."""
    _check_roles(case)
    batches = []
    for layout in case.layouts:
        row = in_paper_order(collate([layout], length=len(layout), block_size=1))
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
    row = collate([_shifted(layout) for layout in case.layouts])
    chosen = choose_backend(backend, case.device, case.root.dtype)
    row = {name: tensor.to(case.device) for name, tensor in row.items()}
    return Way("one pass, labels shifted", _over_row(case, row, chosen, True), exact=False)


def _shifted(layout: Layout) -> Layout:
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
            for one in batches:
                with _attending(root, one.attention):
                    output = find_decoder(root)(input_ids=one.ids, position_ids=one.positions, use_cache=False)
                    states = output[0].flatten(0, 1)[one.sources]
                    share = _share(Head(root, output), states, one.labels, case)
                    if trains:
                        share.backward()
                    total += share.detach()
        return float(total)

    return Way(name, step, trains, exact)


def _over_row(case: Case, row: dict[str, Tensor], backend: str, trains: bool) -> Callable[[], float]:
    def step() -> float:
        ours = find_patch(case.model)
        assert ours is not None, "the model is not patched"
        ours.backend = backend
        with torch.set_grad_enabled(trains):
            loss = case.model(**row).loss
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


ATTENTION = "flexreason_bench"
"""The name under which a batch's own attention is found by layers."""


class _Attention:
    """Attention of the batch that is being computed, backward included."""

    current: Attend

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        return self.current(query, key, value, **kwargs), None


_attention = _Attention()
AttentionInterface.register(ATTENTION, _attention)


@contextmanager
def _attending(root: PreTrainedModel, attention: Callable[[], Attend] | None) -> Iterator[None]:
    if attention is None:
        yield
        return
    before = root.config._attn_implementation
    _attention.current = attention()
    root.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        root.set_attn_implementation(before)


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
        for more in [{"backend": one} for one in backends] if name == "one-pass" else [{}]:
            try:
                ways.append(WAYS[name](case, **more))
            except UnfitError as why:
                notes.append(f"{name}: left out, since {why}")
    return ways
