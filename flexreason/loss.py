"""The loss of a row: weighted, and nothing for an empty row.

Shapes: T targets, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from flexreason.head import Head, logprobs, weighted_nll
from flexreason.row import IGNORED, ROW_KEYS

LOSSES = ("model", "chunked")


class TreeLoss:
    """The model's loss function; for a row, the sum of w x nll over its targets by the sum of w, or by
    `num_items_in_batch` where that is given. An empty row has loss 0.

    In place of logits it can be left what the decoder gave: then it runs the head itself, a chunk at a time.
    """

    def __init__(self, root: PreTrainedModel) -> None:
        self.root = root
        self.own = vars(root).get("_loss_function")
        self.previous = root.loss_function
        self.states: Any = None  # what the decoder gave, where the loss runs the head
        self.temperature: float | None = None  # set while log-probabilities are wanted in place of a loss
        self.logprobs: Tensor | None = None  # [T] of the last row's targets, without gradient: for whoever logs

    def undo(self) -> None:
        if self.own is None:
            del self.root._loss_function
        else:
            self.root._loss_function = self.own

    def __call__(self, logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if "target_weight" not in kwargs:
            return self.previous(logits, labels, *args, **kwargs)
        states, self.states = self.states, None
        weight = kwargs["target_weight"]
        labels = _labels(labels, kwargs.get("shift_labels", labels), weight)
        if states is not None:
            head, hidden = Head(self.root, states), states[0]
            if self.temperature is not None:
                return logprobs(head, hidden[0], labels[0].to(hidden.device), self.temperature)
            if self.previous is not ForCausalLMLoss:
                raise ValueError(
                    f'row: loss="chunked" computes the usual loss, and the loss function was replaced (by '
                    f'{self.previous}); use loss="model"'
                )
            w, total = _weights(weight, labels, hidden, kwargs.get("num_items_in_batch"))
            loss, self.logprobs = weighted_nll(head, hidden[0], labels[0].to(hidden.device), w / total)
            return loss
        if logits.shape[:2] != labels.shape:
            raise ValueError(
                f"row: expected logits for its {weight.shape[1]} targets, found logits of shape {list(logits.shape)}"
            )
        if self.previous is not ForCausalLMLoss:
            if is_weighted(weight):
                raise ValueError(
                    f"row: it has target weights other than 1, and the loss function was replaced (by {self.previous}) "
                    "and takes none; use weights of 1, or the model's own loss"
                )
            if not (labels != IGNORED).any():
                return logits.sum() * 0.0
            kwargs = {key: value for key, value in kwargs.items() if key not in ROW_KEYS}
            return self.previous(logits, labels, *args, **kwargs)
        nll = nn.functional.cross_entropy(
            logits[0].float(), labels[0].to(logits.device), ignore_index=IGNORED, reduction="none"
        )
        self.logprobs = -nll.detach()
        w, total = _weights(weight, labels, nll, kwargs.get("num_items_in_batch"))
        return (nll * w).sum() / total


def _labels(labels: Tensor | None, shifted: Tensor | None, weight: Tensor) -> Tensor:
    """A row's labels, [1, T], which come under two names."""
    if shifted is None or labels is None or shifted.shape != weight.shape or labels.shape != weight.shape:
        found = None if shifted is None else list(shifted.shape)
        raise ValueError(f"row: expected labels for its {weight.shape[1]} targets, found labels of shape {found}")
    if labels.device.type == "cpu" and not torch.equal(labels, shifted):
        raise ValueError("row: labels and shift_labels differ; shift_labels is what counts, so change both alike")
    return shifted


def _weights(weight: Tensor, labels: Tensor, like: Tensor, n_items: Tensor | float | None) -> tuple[Tensor, Tensor]:
    """The weight of every target, [T], in the precision of a loss from what is `like`; and what the loss divides by."""
    w = weight[0].to(like.device, torch.promote_types(like.dtype, torch.float32)) * (labels[0] != IGNORED)
    total = w.sum() if n_items is None else torch.as_tensor(n_items, device=w.device)
    return w, torch.where(total > 0, total, 1)


def is_weighted(weight: Tensor) -> bool:
    """Whether any target has a weight other than 1; ignored ones have 0."""
    return bool(((weight != 1) & (weight != 0)).any())
