"""The definition of correct: the samples, one by one, through an untouched model.

This module knows nothing of layouts, masks or rows, so that it cannot share a mistake with them.
"""

from collections.abc import Iterable
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
    """What the samples give. Everything is a sum over targets, so that it can be divided as one likes."""

    loss_sum: float
    logprobs: list[Tensor]  # one [T_i] a sample
    gradients: dict[str, Tensor]  # of loss_sum, by parameter; empty unless asked for
    tokens: int  # that the model computed

    @property
    def n_targets(self) -> int:
        return sum(len(logprobs) for logprobs in self.logprobs)


def n_samples(model: nn.Module, samples: Iterable[PromptAndTarget], *, gradients: bool = True) -> Reference:
    """Every sample through the model on its own. The model's own `.grad` is left as it was."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total: dict[str, Tensor] = {}

    def add(name: str, gradient: Tensor) -> None:
        total[name] = total[name].add_(gradient) if name in total else gradient

    loss_sum, logprobs, tokens = 0.0, [], 0
    device = next(model.parameters()).device
    for sample in samples:
        prompt, target = list(map(int, sample.prompt_ids)), list(map(int, sample.target_ids))
        input_ids = torch.tensor([prompt + target], device=device)
        with torch.set_grad_enabled(gradients):
            logits = model(input_ids=input_ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            logits = logits if logits.dtype == torch.float64 else logits.float()
            nll = nn.functional.cross_entropy(logits, input_ids[0, len(prompt) :], reduction="none")
        if gradients and parameters:
            with each_gradient(model, add):
                nll.sum().backward()
        loss_sum += float(nll.detach().sum())
        logprobs.append(-nll.detach())
        tokens += len(prompt) + len(target)
    if gradients:
        total = {name: total[name] if name in total else torch.zeros_like(p) for name, p in parameters.items()}
    return Reference(loss_sum=loss_sum, logprobs=logprobs, gradients=total, tokens=tokens)
