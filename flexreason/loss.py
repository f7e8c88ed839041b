"""The loss of a row: weighted, and nothing for an empty row.

Shapes: T targets, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from flexreason.row import IGNORED, ROW_KEYS


class TreeLoss:
    """The model's loss function; for a row, the sum of w x nll over its targets by the sum of w, or by
    `num_items_in_batch` where that is given. An empty row has loss 0."""

    def __init__(self, root: PreTrainedModel) -> None:
        self.own = vars(root).get("_loss_function")
        self.previous = root.loss_function

    def undo(self, root: PreTrainedModel) -> None:
        if self.own is None:
            del root._loss_function
        else:
            root._loss_function = self.own

    def __call__(self, logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if "target_weight" not in kwargs:
            return self.previous(logits, labels, *args, **kwargs)
        weight = kwargs["target_weight"]
        shifted = kwargs.get("shift_labels", labels)
        if labels.device.type == "cpu" and not torch.equal(labels, shifted):
            raise ValueError("row: labels and shift_labels differ; shift_labels is what counts, so change both alike")
        labels = shifted
        if labels is None or labels.shape != weight.shape or logits.shape[:2] != labels.shape:
            raise ValueError(
                f"row: expected labels and logits for its {weight.shape[1]} targets, found labels of shape "
                f"{None if labels is None else list(labels.shape)} and logits of shape {list(logits.shape)}"
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
        weight = weight[0].to(nll) * (labels[0] != IGNORED).to(nll)
        total = kwargs.get("num_items_in_batch")
        if total is None:
            total = weight.sum()
            total = torch.where(total > 0, total, 1)
        return (nll * weight).sum() / total


def is_weighted(weight: Tensor) -> bool:
    """Whether any target has a weight other than 1; ignored ones have 0."""
    return bool(((weight != 1) & (weight != 0)).any())
