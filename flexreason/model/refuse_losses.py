"""Refuses a row's loss that ignores the weights of targets, or is divided by something else than it should be.

A row's loss is asked for with the weights of its targets and what divides it. What a model's forward, a loss function
or a Trainer made of that is known by what came, and not by what they are called.
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexreason.model.loss import is_weighted
from flexreason.model.refuse_rows import real_targets, replaced_by


def refuse_weights(root: PreTrainedModel, given: Mapping[str, Any], runs_head: bool) -> None:
    """Whatever replaced the model's forward (trl's fused head, Liger) has a loss of its own, without weights; so
    have a few classes; and transformers' Trainer divides by a number of targets, whatever they weigh."""
    by, n_items = replaced_by(root), given.get("num_items_in_batch")
    if by and runs_head:
        raise ValueError(
            f'row: loss="chunked" and token_logprobs need the model\'s own forward, and it was replaced (by {by}); '
            'use loss="model", where that loss is chunked itself'
        )
    if by:
        why = f"the model's forward was replaced (by {by}), whose loss takes none", "the model's own forward"
    elif trainers_count(n_items):
        why = "the Trainer divides a step by its number of targets", "fr.RowTrainer, which divides by their weight"
    else:
        return
    if is_weighted(given["target_weight"], real_targets(given)):
        raise ValueError(f"row: it has target weights other than 1, and {why[0]}; use weights of 1, or {why[1]}")


def refuse_own_mean(root: PreTrainedModel, given: Mapping[str, Any]) -> None:
    """Raise where the model computes the loss itself and the row asks for more than the mean over its own targets: for
    weights, or for another divisor."""
    n_items, n_targets = given.get("num_items_in_batch"), int(real_targets(given).sum())
    how = (
        f"the forward of {type(root).__name__} computes its loss itself, or does not hand all keywords "
        "(target_weight, num_items_in_batch) on to self.loss_function"
    )
    if is_weighted(given["target_weight"], real_targets(given)):
        raise ValueError(f"row: it has target weights other than 1, and {how}; use weights of 1, or hand them on")
    if not n_targets or (n_items is not None and float(n_items) != n_targets):
        raise ValueError(
            f"row: {how}: that is the mean over a row's own targets: here {n_targets}, while num_items_in_batch is "
            f"{n_items}; give it one row a step, and no empty one, or hand all keywords on"
        )


def refuse_another_divisor(root: PreTrainedModel, given: Mapping[str, Any], weight: Tensor, n_items: Any) -> None:
    """Raise if the loss function had other weights than the row, or another divisor than the model was called with."""
    wanted = given.get("num_items_in_batch")
    if weight is not given["target_weight"] and not _equal(weight, given["target_weight"]):
        found, expected = "other target weights than the row's", "as they are"
    elif n_items is not wanted and (n_items is None or wanted is None or not _equal(n_items, wanted)):
        found, expected = f"num_items_in_batch={n_items}", f"as it came, {wanted}"
    else:
        return
    raise ValueError(
        f"row: the forward of {type(root).__name__} gave self.loss_function {found}; pass it on {expected}, with all "
        "other keywords"
    )


def _equal(one: Any, other: Any) -> bool:
    one, other = torch.as_tensor(one), torch.as_tensor(other)
    return one.shape == other.shape and bool((one.to(other.device) == other).all())


def refuse_mean_of_means(n_items: Any) -> None:
    """Raise if a Trainer takes a row's mean and will divide by its number of rows: that is no mean over targets."""
    trainer: Any = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    if n_items is not None or trainer is None:
        return
    frames = _frames_of(trainer)
    step = [frame for frame in frames if frame.f_code is trainer.training_step.__code__]
    if not step or frames[0].f_code is not trainer.compute_loss.__code__:
        return  # nobody trains; or somebody computes the loss differently, and may divide it
    args = step[0].f_locals["self"].args
    n_rows = args.gradient_accumulation_steps * args.world_size
    if n_rows > 1:
        raise ValueError(
            f"row: a step of the Trainer is the mean of the means of its {n_rows} rows, and not the mean over its "
            "targets, since it takes the model for one whose loss takes no divisor (accepts_loss_kwargs); use "
            "fr.RowTrainer, or call fr.patch before the Trainer is made"
        )


def trainers_count(n_items: Any) -> bool:
    """Whether what is to divide a loss is a number of targets that transformers' Trainer counted.

    It is a number like any other, so it is known by where it comes from: the Trainers that are at work above.
    """
    trainer: Any = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    if n_items is None or trainer is None:
        return False
    frames = _frames_of(trainer)
    if not frames:
        return False
    ways = ("get_batch_samples", "_get_num_items_in_batch")
    kind = type(frames[-1].f_locals["self"])
    if any(getattr(kind, way, None) is not getattr(trainer, way, None) for way in ways):
        return False  # somebody counts differently, as RowTrainer does
    count, passed = (frame.f_locals.get("num_items_in_batch") for frame in (frames[-1], frames[0]))
    handed_on = passed is count and frames[0].f_code is trainer.compute_loss.__code__
    return n_items is count or (count is not None and handed_on)


def _frames_of(trainer: Any) -> list[Any]:
    """The calls of Trainers that are at work above, the innermost first."""
    frames: list[Any] = []
    frame: Any = sys._getframe(1)
    while frame is not None:
        if "num_items_in_batch" in frame.f_code.co_varnames and isinstance(frame.f_locals.get("self"), trainer):
            frames.append(frame)
        frame = frame.f_back
    return frames
