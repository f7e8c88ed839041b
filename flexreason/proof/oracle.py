"""The definition of correct: the samples, one by one, through an untouched model.

This module knows nothing of layouts, masks or rows, so that it cannot share a mistake with them. Beside
the N samples stand the two shortcuts that people take instead: one plain pass over everything, in which
reasoning leaks into later turns, and training on the last turn only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flexreason.proof.float64 import each_gradient


class PromptAndTarget(Protocol):
    """Anything with these two lists of token ids, such as `flexreason.Sample`."""

    @property
    def prompt_ids(self) -> Any: ...

    @property
    def target_ids(self) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a set of sequences gives: everything is a sum over targets, so that it can be divided as one likes."""

    loss_sum: float
    logprobs: list[Tensor]  # one [T_i] a sample
    gradients: dict[str, Tensor]  # of loss_sum, by parameter; empty unless asked for
    tokens: int  # that the model computed

    @property
    def n_targets(self) -> int:
        return sum(len(logprobs) for logprobs in self.logprobs)


def n_samples(model: nn.Module, samples: Sequence[PromptAndTarget], *, gradients: bool = True) -> Reference:
    """Every sample through the model on its own. The model's own `.grad` is left as it was."""
    sequences = []
    for sample in samples:
        ids = [*map(int, sample.prompt_ids), *map(int, sample.target_ids)]
        sequences.append((ids, range(len(sample.prompt_ids), len(ids))))
    return _run(model, sequences, gradients)


def last_turn_only(model: nn.Module, samples: Sequence[PromptAndTarget], *, gradients: bool = True) -> Reference:
    """Right for the last turn, and blind to all others."""
    return n_samples(model, samples[-1:], gradients=gradients)


def plain_pass(model: nn.Module, turns: Sequence[tuple[Any, Any, Any]], *, gradients: bool = True) -> Reference:
    """One plain pass over `[(h, t, r), ...]` as it stands, reasoning and all: wrong from the second turn on."""
    ids: list[int] = []
    scored: list[int] = []
    for h, t, r in turns:
        ids += map(int, h)
        scored += range(len(ids), len(ids) + len(t) + len(r))
        ids += [*map(int, t), *map(int, r)]
    return _run(model, [(ids, scored)], gradients)


def _run(model: nn.Module, sequences: Sequence[tuple[list[int], Sequence[int]]], gradients: bool) -> Reference:
    """Each sequence with the indices of its targets, which the token before each predicts."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total: dict[str, Tensor] = {}

    def add(name: str, gradient: Tensor) -> None:
        total[name] = total[name].add_(gradient) if name in total else gradient

    loss_sum, logprobs = 0.0, []
    device = next(model.parameters()).device
    for ids, scored in sequences:
        with torch.set_grad_enabled(gradients):
            input_ids = torch.tensor([ids], device=device)
            at = torch.tensor(list(scored), device=device)
            logits = model(input_ids=input_ids, use_cache=False).logits[0, at - 1]
            logits = logits if logits.dtype == torch.float64 else logits.float()
            nll = nn.functional.cross_entropy(logits, input_ids[0, at], reduction="none")
        if gradients and parameters:
            with each_gradient(model, add):
                nll.sum().backward()
        loss_sum += float(nll.detach().sum())
        logprobs.append(-nll.detach())
    if gradients:
        total = {name: total[name] if name in total else torch.zeros_like(p) for name, p in parameters.items()}
    tokens = sum(len(ids) for ids, _ in sequences)
    return Reference(loss_sum=loss_sum, logprobs=logprobs, gradients=total, tokens=tokens)
