"""Ways to compute a step: one pass, and the N samples one by one or packed."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from flexreason.attention.registry import find_decoder
from flexreason.model.head import Head, weighted_nll
from flexreason.model.hooks import find_patch
from flexreason.proof.compare import suspended
from flexreason.tree.sample import Sample

PACKED = "packed_samples"
"""The name of attention over sequences that lie side by side."""


def one_pass(model: nn.Module, row: dict[str, Tensor], backend: str, loss: str) -> float:
    """All samples in one row."""
    if (ours := find_patch(model)) is not None:
        ours.backend = backend
    out = model(**row).loss
    out.backward()
    return float(out.detach())


def one_by_one(root: PreTrainedModel, samples: Sequence[Sample], loss: str) -> float:
    """Every sample by itself through the untouched model."""
    n_targets = sum(len(sample.target_ids) for sample in samples)
    total = 0.0
    with suspended(root):
        for sample in samples:
            ids = torch.tensor([[*sample.prompt_ids, *sample.target_ids]], device=root.device)
            output = find_decoder(root)(input_ids=ids, use_cache=False)
            states = output[0][0, len(sample.prompt_ids) - 1 : -1]
            labels = torch.tensor(sample.target_ids, device=root.device)
            total += _back(Head(root, output), states, labels, n_targets, loss)
    return total


@dataclass(frozen=True, eq=False)
class Pack:
    """Samples side by side: P tokens, of which T predict."""

    ids: Tensor  # [1, P]
    positions: Tensor  # [1, P]
    offsets: Tensor  # int32 [samples + 1]
    longest: int
    sources: Tensor  # [T]
    labels: Tensor  # [T]


def pack(samples: Sequence[Sample], length: int, device: torch.device) -> list[Pack]:
    """Samples in as few packs of a length as they fill in turn; one that is longer has a pack of its own."""
    packs: list[list[Sample]] = [[]]
    free = length
    for sample in samples:
        n = len(sample.prompt_ids) + len(sample.target_ids)
        if n > free and packs[-1]:
            packs.append([])
            free = length
        packs[-1].append(sample)
        free -= n
    return [_packed(some, device) for some in packs]


def _packed(samples: Sequence[Sample], device: torch.device) -> Pack:
    whole = [[*sample.prompt_ids, *sample.target_ids] for sample in samples]
    offsets = [0, *accumulate(map(len, whole))]
    sources = [
        torch.arange(stop - 1 - len(sample.target_ids), stop - 1)
        for stop, sample in zip(offsets[1:], samples, strict=True)
    ]
    return Pack(
        ids=torch.tensor([[token for ids in whole for token in ids]], device=device),
        positions=torch.cat([torch.arange(len(ids)) for ids in whole])[None].to(device),
        offsets=torch.tensor(offsets, dtype=torch.int32, device=device),
        longest=max(map(len, whole)),
        sources=torch.cat(sources).to(device),
        labels=torch.tensor([token for sample in samples for token in sample.target_ids], device=device),
    )


def packed(root: PreTrainedModel, packs: Sequence[Pack], loss: str) -> float:
    """The samples side by side through the model with attention of variable lengths, as those who pack have it."""
    n_targets = sum(len(one.labels) for one in packs)
    total = 0.0
    with suspended(root):
        before = root.config._attn_implementation
        root.set_attn_implementation(PACKED)
        try:
            for one in packs:
                _side_by_side.current = one
                output = find_decoder(root)(input_ids=one.ids, position_ids=one.positions, use_cache=False)
                total += _back(Head(root, output), output[0][0, one.sources], one.labels, n_targets, loss)
        finally:
            root.set_attn_implementation(before)
    return total


def unfit_to_pack(root: PreTrainedModel) -> str:
    """Why the samples are not packed here, or nothing."""
    if root.device.type != "cuda":
        return "flash attention of variable lengths is for GPUs"
    if root.dtype not in (torch.bfloat16, torch.float16):
        return f"flash attention has no {str(root.dtype).removeprefix('torch.')}"
    return ""


class _SideBySide:
    """Attention within each sequence of the pack that is being computed, backward included."""

    current: Pack

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        from torch.nn.attention.varlen import varlen_attn

        if softcap is not None or s_aux is not None:
            raise NotImplementedError("flash attention of variable lengths has no softcap and no sinks")
        # Until torch 2.12 groups of heads are taken as they come; since then they are announced.
        more: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
        one = self.current
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        within = (-1 if sliding_window is None else sliding_window - 1, 0)
        ends = (one.offsets, one.offsets, one.longest, one.longest)
        out: Any = varlen_attn(q, k, v, *ends, scale=scaling, window_size=within, **more)
        return out[None], None


_side_by_side = _SideBySide()
AttentionInterface.register(PACKED, _side_by_side)


def _back(head: Head, states: Tensor, labels: Tensor, n_targets: int, loss: str) -> float:
    """Backward of the share that some targets have in the mean over all; that share."""
    if loss == "chunked":
        weight = torch.full((len(labels),), 1 / n_targets, device=states.device)
        share = weighted_nll(head, states, labels, weight)[0]
    else:
        share = nn.functional.cross_entropy(head(states).float(), labels, reduction="sum") / n_targets
    share.backward()
    return float(share.detach())
