"""Four ways to train on conversations: the single pass, the N samples that it stands for, and two shortcuts.

A way says which samples it makes of a conversation, by options of `fr.encode`, and how a step's layouts become a loss.
The shortcuts are rows like the single pass. The N samples go through the model as anyone would send them: an ordinary
padded batch.

Shapes: B samples of a padded batch, S tokens of its longest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import flexreason as fr

PER_BATCH = 32
"""Samples of one padded batch. They are sorted by length, so that little of it is padding."""


@dataclass(frozen=True)
class Way:
    """How to train on conversations."""

    name: str
    words: str
    backward: Callable[[nn.Module, Sequence[fr.Layout]], float]
    rows: bool = True  # whether it takes a patched model
    options: dict[str, Any] = field(default_factory=dict)  # of fr.encode


def one_row(model: nn.Module, layouts: Sequence[fr.Layout]) -> float:
    """All layouts side by side in one pass of a patched model, and back; the mean over their targets."""
    device = next(model.parameters()).device
    loss = model(**{key: value.to(device) for key, value in fr.collate(layouts).items()}).loss
    loss.backward()
    return float(loss.detach())


def sample_by_sample(model: nn.Module, layouts: Sequence[fr.Layout]) -> float:
    """The same mean and gradients from every sample as a sequence of its own, in padded batches."""
    samples = sorted((sample for layout in layouts for sample in fr.unmerge(layout)), key=_length)
    n_targets = sum(len(sample.target_ids) for sample in samples)
    total, device = 0.0, next(model.parameters()).device
    for start in range(0, len(samples), PER_BATCH):
        ids, labels = (x.to(device) for x in _padded(samples[start : start + PER_BATCH]))
        logits = model(input_ids=ids).logits  # causal: what is padded on the right is seen by no target
        nll = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        loss = nll / n_targets
        loss.backward()
        total += float(loss.detach())
    return total


def _padded(samples: Sequence[fr.Sample]) -> tuple[Tensor, Tensor]:
    """Ids and labels [B, S]; labels of prompts and padding are ignored."""
    ids = torch.zeros(len(samples), max(map(_length, samples)), dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for number, sample in enumerate(samples):
        length, start = _length(sample), len(sample.prompt_ids)
        ids[number, :length] = torch.tensor([*sample.prompt_ids, *sample.target_ids])
        labels[number, start:length] = ids[number, start:length]
    return ids, labels


def _length(sample: fr.Sample) -> int:
    return len(sample.prompt_ids) + len(sample.target_ids)


SINGLE_PASS = Way("single pass", "all samples of a conversation as one tree", one_row)

N_SAMPLES = Way("N samples", "each of them by itself", sample_by_sample, rows=False)

LAST_TURN = Way("last turn only", "the last sample of each conversation", one_row, options={"turns": "last"})

LEAKING = Way(
    "reasoning kept", "the conversation as it stands, reasoning and all", one_row, options={"preserve_thinking": True}
)
