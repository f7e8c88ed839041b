"""Sequences as an unpatched model takes them: samples padded or side by side, and a row in the paper's order.

Each says where its targets are, and if it must, how its tokens see each other: the attention that layers find under a
name of its own for as long as it is computed, backward included.

Shapes: B sequences of L tokens, T targets.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, PreTrainedModel

from flexreason.tree.mask import in_papers_order
from flexreason.tree.sample import Sample

Attend = Callable[..., Tensor]
"""Attention of queries [1, H, L, D] over keys and values [1, G, L, D], with the keywords of a layer: [1, L, H, D]."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences as an unpatched model takes them, and where their targets are."""

    ids: Tensor  # [B, L]
    sources: Tensor  # [T], places in the B x L tokens
    labels: Tensor  # [T]
    positions: Tensor | None = None  # [B, L], where they are not 0, 1, 2, ...
    attention: Callable[[], Attend] | None = None  # made anew for every forward; the model's own if there is none


def pack(samples: Sequence[Sample], length: int, device: torch.device) -> list[Batch]:
    """Samples in as few packs of a length as they fill in turn; one that is longer has a pack of its own."""
    packs: list[list[Sample]] = [[]]
    free = length
    for sample in samples:
        if len(sample) > free and packs[-1]:
            packs.append([])
            free = length
        packs[-1].append(sample)
        free -= len(sample)
    return [packed_batch(some, device) for some in packs]


def padded_batch(samples: Sequence[Sample], device: torch.device) -> Batch:
    ids = pad_sequence([torch.tensor([*sample.prompt_ids, *sample.target_ids]) for sample in samples], batch_first=True)
    starts = [n * ids.shape[1] for n in range(len(samples))]
    return Batch(ids.to(device), _sources(samples, starts).to(device), _labels(samples).to(device))


def packed_batch(samples: Sequence[Sample], device: torch.device) -> Batch:
    ids = [token for sample in samples for token in (*sample.prompt_ids, *sample.target_ids)]
    positions = torch.cat([torch.arange(len(sample)) for sample in samples])
    starts = [0, *accumulate(map(len, samples))][:-1]
    places = _sources(samples, starts).to(device), _labels(samples).to(device)
    return Batch(torch.tensor([ids], device=device), *places, positions[None].to(device))


def _sources(samples: Sequence[Sample], starts: Sequence[int]) -> Tensor:
    """The token before a target predicts it."""
    ends = [start + len(sample) for start, sample in zip(starts, samples, strict=True)]
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


def side_by_side(batch: Batch) -> Callable[[], Attend]:
    """Attention within each sequence of a pack, backward included."""
    from torch.nn.attention.varlen import varlen_attn

    assert batch.positions is not None
    starts = (batch.positions[0] == 0).nonzero().squeeze(1)
    offsets = torch.cat([starts, starts.new_tensor([batch.positions.shape[1]])]).to(torch.int32)
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


def row_in_papers_order(row: dict[str, Tensor]) -> dict[str, Tensor]:
    """A row of `lay_out_turns` layouts, permuted: document by document, turn by turn, h t r_in r_out.

    `until` means nothing in this order, and is left out of use: the rule is that of turns and roles.
    """
    order = in_papers_order(row)
    new_place = torch.argsort(order)
    moved = {name: x[:, order] for name, x in row.items() if x.dim() == 2 and x.shape[1] == len(order)}
    return {**row, **moved, "target_source": new_place[row["target_source"]]}


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
def attending(root: PreTrainedModel, attention: Callable[[], Attend] | None) -> Iterator[None]:
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
