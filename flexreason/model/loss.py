"""The loss of a row, which is the same formula everywhere:

    loss = sum of w x nll over the row's targets / divisor

The divisor is `num_items_in_batch` where that is said: the weight of all targets of an optimizer step, or whatever
else is to divide it. Else it is the sum of w over the row's targets. Weights may be of any sign, as advantages are; a
divisor is above 0, so a row whose weights sum to 0 or less needs one that is said. An ignored target (label -100) has
no weight, whatever the row says of it. A row without targets adds exactly nothing, whatever divides it. A loss that
knows no weights is refused unless all of them are 1; 0 is another.

What is refused is said in words on the CPU, where that costs nothing. On other devices nobody waits for numbers, and
compiled code does not branch on them: there the loss is not a number.

Shapes: T targets, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from flexreason.model.asking import Answer, ask, refuse_answer
from flexreason.model.head import Head, logprobs, weighted_nll
from flexreason.tree.row import IGNORED, ROW_KEYS

LOSSES = ("model", "chunked")

REQUEST = "flexreason_request"
"""The keyword that carries a `Request` to the hooks and to the loss."""


class Request:
    """What one forward of a row is to give, and what it leaves for whoever asked.

    It goes with the row as a keyword, as a `TreeRow` goes with the layers, so that nothing of a forward stays on the
    model. It is no dataclass: FSDP and DDP hand on copies of those, and what is left in a copy reaches nobody.

    Args:
        loss: whether a loss is wanted. Else the log-probabilities alone are, with their gradient.
        temperature: divides the logits where log-probabilities alone are wanted.
    """

    def __init__(self, *, loss: bool = True, temperature: float = 1.0) -> None:
        self.loss = loss
        self.temperature = temperature
        self.root: Any = None  # the model that it is for: others may share its layers
        self.is_known = False  # whether the code that a row comes to was looked at for this one
        self.states: Any = None  # what the decoder gave, where the loss makes the logits, until it has made them
        self.logprobs: Tensor | None = None  # [T], of every target; without a gradient where a loss was wanted


class TreeLoss:
    """Stands in the place of a model's loss function, for rows. In place of logits it can find what the decoder gave
    in the `Request`: then it runs the head itself, a chunk at a time.
    """

    def __init__(self, root: PreTrainedModel) -> None:
        self.root = root
        self.own = vars(root).get("_loss_function")
        self.previous = root.loss_function
        self.answers: dict[bool, Answer] = {}  # of that function, by whether it was given no divisor
        self.took: tuple[Tensor, Any] | None = None  # weights and divisor of the row on its way, once they came here
        vars(root)["_loss_function"] = self  # past torch, which keeps a loss that is a module in another place

    @property
    def in_place(self) -> bool:
        """Whether nobody has put another loss function there since."""
        return vars(self.root).get("_loss_function") is self

    def undo(self) -> None:
        if self.in_place:
            del vars(self.root)["_loss_function"]
            if self.own is not None:
                vars(self.root)["_loss_function"] = self.own

    def __call__(self, logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if "target_weight" not in kwargs:
            return self.previous(logits, labels, *args, **kwargs)
        request = kwargs.get(REQUEST) or Request()  # none comes where the model's `forward` is called, past its hooks
        states, request.states = request.states, None
        weight = kwargs["target_weight"]
        self.took = weight, kwargs.get("num_items_in_batch")
        labels = _labels(labels, kwargs.get("shift_labels", labels), weight)
        if states is not None:
            head, hidden = Head(self.root, states), states[0]
            if not request.loss:
                request.logprobs = logprobs(head, hidden[0], labels[0].to(hidden.device), request.temperature)
                everywhere = torch.ones_like(request.logprobs, dtype=torch.bool)
                return request.logprobs.masked_fill(everywhere, 0.0).sum()  # 0, on the same graph
            if self.previous is not ForCausalLMLoss:
                raise ValueError(
                    f'row: loss="chunked" computes the usual loss, and the loss function was replaced (by '
                    f'{self.previous}); use loss="model"'
                )
            w, total = _weights(weight, labels, hidden, kwargs.get("num_items_in_batch"))
            loss, request.logprobs = weighted_nll(head, hidden[0], labels[0].to(hidden.device), w / total)
            return loss
        if logits.shape[:2] != labels.shape:
            raise ValueError(
                f"row: expected logits for its {weight.shape[1]} targets, found logits of shape {list(logits.shape)}"
            )
        if self.previous is not ForCausalLMLoss:
            if is_weighted(weight, labels != IGNORED):
                raise ValueError(
                    f"row: it has target weights other than 1, and the loss function was replaced (by {self.previous}) "
                    "and takes none; use weights of 1, or the model's own loss"
                )
            if not (labels != IGNORED).any():
                return logits.sum() * 0.0
            kwargs = {key: value for key, value in kwargs.items() if key not in ROW_KEYS | {REQUEST}}
            self.refuse_previous(logits, labels, *args, **kwargs)
            return self.previous(logits, labels, *args, **kwargs)
        nll = nn.functional.cross_entropy(
            logits[0].float(), labels[0].to(logits.device, torch.int64), ignore_index=IGNORED, reduction="none"
        )
        if request.loss:
            request.logprobs = -nll.detach()
        w, total = _weights(weight, labels, nll, kwargs.get("num_items_in_batch"))
        return (nll * w).sum() / total

    def refuse_previous(self, logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> None:
        """Raise if the function that stood here before takes a row's targets otherwise than they stand, or divides
        their loss by something else. It is asked once, with a divisor and without."""

        def loss(logits: Tensor, labels: Tensor) -> Tensor:
            shifted = {"shift_labels": labels} if kwargs.get("shift_labels") is not None else {}
            return self.previous(logits, labels, *args, **{**kwargs, **shifted})

        n_items = kwargs.get("num_items_in_batch")
        if (n_items is None) not in self.answers:
            self.answers[n_items is None] = ask(loss, logits, logits.shape[-1])
        refuse_answer(
            self.answers[n_items is None], f"the loss function was replaced (by {self.previous})", labels, n_items
        )


def _labels(labels: Tensor | None, shifted: Tensor | None, weight: Tensor) -> Tensor:
    """A row's labels, [1, T], which come under two names."""
    if shifted is None or labels is None or shifted.shape != weight.shape or labels.shape != weight.shape:
        shape = None if shifted is None else list(shifted.shape)
        raise ValueError(f"row: expected labels for its {weight.shape[1]} targets, found labels of shape {shape}")
    if labels.device.type == "cpu" and not torch.equal(labels, shifted):
        raise ValueError("row: labels and shift_labels differ; shift_labels is what counts, so change both alike")
    return shifted


def _weights(weight: Tensor, labels: Tensor, like: Tensor, n_items: Tensor | float | None) -> tuple[Tensor, Tensor]:
    """The weight of every target, [T], in the precision of a loss from what is `like`; and what the loss divides by."""
    real = labels[0].to(like.device) != IGNORED
    w = weight[0].to(like.device, torch.promote_types(like.dtype, torch.float32)).where(real, 0.0)
    divisor = w.sum() if n_items is None else torch.as_tensor(n_items, dtype=w.dtype, device=w.device)
    good = (divisor > 0) & divisor.isfinite()
    if w.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((good | ~real.any()).all()):
        if n_items is None:
            raise ValueError(
                f"row: its target weights sum to {float(divisor):.6g}, and a mean by weight needs a sum above 0; say "
                "what the loss is to be divided by: model(**row, num_items_in_batch=...)"
            )
        raise ValueError(f"row: num_items_in_batch: expected a number above 0 to divide the loss by, found {n_items}")
    return w, torch.where(good, divisor, torch.where(real.any(), torch.nan, 1.0))


def is_weighted(weight: Tensor, real: Tensor | bool = True) -> bool:
    """Whether any target that is not ignored has a weight other than 1."""
    return bool(((weight != 1) & real).any())
