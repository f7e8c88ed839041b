"""Finds out what a user's own loss function, or forward, does with a row's targets: by calling it with a few numbers.

Line t of a row's logits belongs to label t. A function that does not know `shift_labels`, as all were written before
transformers had it, shifts labels by itself: it would hold each line against the label of the next one, and drop one.
Its source does not say which it does, for it may call others; its gradients do.

Shapes: T targets, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from flexreason.model.head import answering, with_states
from flexreason.tree.row import IGNORED, ROW_KEYS

Loss = Callable[[Tensor, Tensor], Tensor]
"""Makes a number of logits [1, T, V] and labels [1, T]."""

REAL = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1], dtype=torch.bool)
"""Which lines have a target. A function that shifts labels, or drops a line, uses other lines than these."""

ROUNDING = 1e-4


class Answer(NamedTuple):
    against: str  # why it is no loss of a row's targets as they stand, or nothing
    adds_up: bool = True  # whether the losses of two rows with one divisor are that of both rows in one


@torch.compiler.disable
def ask(loss: Loss, like: Tensor, vocabulary: int) -> Answer:
    """What a loss function does; `like` are logits [1, T, V], or hidden states, as it is given them."""
    n = len(REAL)
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind = torch.promote_types(like.dtype, torch.float32)
        logits = torch.randn(1, n, like.shape[-1], dtype=kind).to(like.device).requires_grad_()
        labels = torch.randint(vocabulary, (1, n)).where(REAL, IGNORED).to(like.device)
        turned = torch.randperm(n).to(like.device)
        value = loss(logits, labels)
        if not (isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad):
            return Answer("gives no number with a gradient by the logits")
        [slope] = torch.autograd.grad(value, logits, allow_unused=True)
        moved = torch.zeros_like(REAL) if slope is None else (slope[0] != 0).any(-1).cpu()
        if not torch.equal(moved, REAL):
            against = "holds other lines of the logits against labels than those that belong together: it shifts labels"
            return Answer(f"{against} by itself, or counts lines whose label is {IGNORED}")
        if not _equal(loss(logits[:, REAL], labels[:, REAL]), value):
            return Answer(f"goes by lines whose label is {IGNORED}, with which rows are filled up")
        if not _equal(loss(logits[:, turned], labels[:, turned]), value):
            return Answer("depends on the order of a row's targets")
        parts = [loss(logits[:, part], labels[:, part]) for part in (slice(n // 2), slice(n // 2, n))]
        return Answer("", _equal(parts[0] + parts[1], value))


def loss_of_forward(root: Any, decoder: nn.Module, output: Any, given: Mapping[str, Any]) -> Loss:
    """The replaced forward of a model, as a loss of hidden states and labels. It is called as it was with the row
    (`given`), but its decoder answers with other states."""

    def loss(states: Tensor, labels: Tensor) -> Tensor:
        of_tokens = ROW_KEYS | {"position_ids", "input_ids"}
        small = {key: value[:, : labels.shape[1]] for key, value in given.items() if key in of_tokens}
        small |= {"labels": labels, "shift_labels": labels, "attention_mask": None, "use_cache": False}
        with answering(decoder, with_states(output, states.to(output[0].dtype))):
            answer = root.forward(**{**given, **small})
        return answer["loss"] if isinstance(answer, ModelOutput) else answer[0]

    return loss


def refuse_answer(answer: Answer, what: str, labels: Tensor, n_items: Tensor | float | None) -> None:
    """Raise if the function uses other lines than those of a row's targets, or ignores the divisor that it is given."""
    if answer.against:
        raise ValueError(
            f"row: {what}, and this one {answer.against}; write one that takes shift_labels in place of labels where "
            "they are given, or use the model's own"
        )
    if n_items is not None and not answer.adds_up and float(n_items) != (n_targets := int((labels != IGNORED).sum())):
        raise ValueError(
            f"row: {what}, and this one does not divide by num_items_in_batch, which is {n_items}, while the row has "
            f"{n_targets} targets; write one that does, or give it one row a step"
        )


def _equal(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs() <= ROUNDING * other.abs().clamp(min=1e-6))
