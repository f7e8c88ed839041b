"""A training loop as small as can be, for ways to make a loss that are held against each other with all else equal:
AdamW, a warm-up, a cosine, as the demo tells `flexreason train` too.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import flexreason as fr
from flexreason.demo.ways import Way

LEARNING_RATE, BETA2, WEIGHT_DECAY, CLIP = 2e-3, 0.95, 0.01, 1.0

WARM_UP = 20
"""Steps in which the learning rate rises."""


@dataclass(frozen=True)
class Step:
    """What a training step gave: the loss that it started from, and how long it took."""

    loss: float
    seconds: float


def start(folder: Path, seed: int, device: str) -> Any:
    """The model of the demo's config, with random weights: the same that `flexreason train` begins with."""
    from flexreason.load import load_model

    return load_model(str(folder / "start"), "float32", device, seed, False)[0]


def fit(model: nn.Module, way: Way, batches: Sequence[Sequence[fr.Layout]]) -> Iterator[Step]:
    """A step for each batch, made when it is asked for; the learning rate falls to 0 over all of them."""
    if way.rows:
        fr.patch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, BETA2), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, len(batches)))
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


def rate(step: int, steps: int) -> float:
    """The learning rate of a step, in parts of the highest."""
    if step < WARM_UP:
        return step / WARM_UP
    return 0.5 + 0.5 * math.cos(math.pi * (step - WARM_UP) / max(1, steps - WARM_UP))
