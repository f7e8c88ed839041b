"""Ways to train on conversations: the single pass, the N samples that it stands for, and three shortcuts.

A way says which samples it makes of a conversation, by what `fr.encode` is given, and how a step's layouts become a
loss. The shortcuts are rows like the single pass. The N samples go through the model as anyone would send them: an
ordinary padded batch. All else is equal for all ways, in a training loop as small as can be (`fit`): AdamW, a warm-up
and a cosine, as the demo tells `flexreason train` too.

Shapes: B samples of a padded batch, S tokens of its longest.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import get_cosine_schedule_with_warmup

import flexreason as fr
from flexreason.demo.task import Messages

PER_BATCH = 32
"""Samples of one padded batch. They are sorted by length, so that little of it is padding."""

LEARNING_RATE, BETA2, WEIGHT_DECAY, CLIP = 2e-3, 0.95, 0.01, 1.0

WARM_UP = 20
"""Steps in which the learning rate rises."""


@dataclass(frozen=True)
class Way:
    """How to train on conversations."""

    name: str
    words: str
    backward: Callable[[nn.Module, Sequence[fr.Layout]], float]
    rows: bool = True  # whether it takes a patched model
    options: dict[str, Any] = field(default_factory=dict)  # of fr.encode
    prepare: Callable[[Messages], Messages] = list  # what becomes of the messages before


def row_loss(model: Any, layouts: Sequence[fr.Layout]) -> Tensor:
    """The mean over the targets of all layouts, side by side in one pass of a patched model."""
    return model(**{key: value.to(model.device) for key, value in fr.collate(layouts).items()}).loss


def one_row(model: nn.Module, layouts: Sequence[fr.Layout]) -> float:
    """That mean, and back."""
    loss = row_loss(model, layouts)
    loss.backward()
    return float(loss.detach())


def sample_by_sample(model: nn.Module, layouts: Sequence[fr.Layout]) -> float:
    """The same mean and gradients from every sample as a sequence of its own, in padded batches."""
    samples = sorted((sample for layout in layouts for sample in fr.unmerge(layout)), key=len)
    n_targets = sum(len(sample.target_ids) for sample in samples)
    total, device = 0.0, next(model.parameters()).device
    for first in range(0, len(samples), PER_BATCH):
        ids, labels = (x.to(device) for x in _padded(samples[first : first + PER_BATCH]))
        logits = model(input_ids=ids).logits  # causal: what is padded on the right is seen by no target
        nll = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        loss = nll / n_targets
        loss.backward()
        total += float(loss.detach())
    return total


def _padded(samples: Sequence[fr.Sample]) -> tuple[Tensor, Tensor]:
    """Ids and labels [B, S]; labels of prompts and padding are ignored."""
    ids = [torch.tensor([*sample.prompt_ids, *sample.target_ids]) for sample in samples]
    labels = [torch.tensor([*[-100] * len(sample.prompt_ids), *sample.target_ids]) for sample in samples]
    return pad_sequence(ids, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=-100)


def last_reasoning_only(messages: Messages) -> Messages:
    """A conversation as the template shows it whole: earlier answers are without reasoning, and are trained so."""
    *earlier, last = messages
    return [*({key: message[key] for key in message if key != "reasoning_content"} for message in earlier), last]


SINGLE_PASS = Way("single pass", "all samples of a conversation as one tree", one_row)

N_SAMPLES = Way("N samples", "each of them by itself", sample_by_sample, rows=False)

LAST_TURN = Way("last turn only", "the last sample of each conversation", one_row, options={"turns": "last"})

LEAKING = Way(
    "reasoning kept", "the conversation as it stands, reasoning and all", one_row, options={"preserve_thinking": True}
)

AS_SHOWN = Way(
    "as the template shows it",
    "the conversation as one text of the template, where all answers but the last are without reasoning",
    one_row,
    prepare=last_reasoning_only,
)


@dataclass(frozen=True)
class Step:
    """What a training step gave: the loss that it started from, and how long it took."""

    loss: float
    seconds: float


def fit(model: nn.Module, way: Way, batches: Sequence[Sequence[fr.Layout]]) -> Iterator[Step]:
    """Train a model in one way. Each batch is a step, which is made when it is asked for."""
    if way.rows:
        fr.patch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, BETA2), weight_decay=WEIGHT_DECAY)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARM_UP, len(batches))
    model.train()
    for layouts in batches:
        started = time.perf_counter()
        loss = way.backward(model, layouts)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield Step(loss, time.perf_counter() - started)
    fr.unpatch(model)
