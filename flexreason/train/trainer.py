"""`RowTrainer`: transformers' Trainer for rows; and `RowTraining`, the same for other trainers (trl's SFTTrainer).

    trainer = RowTrainer(model=fr.patch(model), args=..., train_dataset=fr.Rows(layouts, 16384),
                         data_collator=fr.Collator(16384))

What differs from the Trainer: a step's loss is the mean over all its targets by weight; the evaluation loss too, with
reasoning, responses and turns apart (the Trainer's is the mean of the rows' means); logs tell these of training, and
tokens a second, of trees and of the samples they stand for; a checkpoint is whole or is none; a loss that is no
number stops the run before anything is saved. Rows come in the order of the data set, since `Rows` has shuffled, and
one of its items is a batch.
"""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, SequentialSampler
from transformers import Trainer

from flexreason.data.rows import Rows
from flexreason.data.stream import RowStream
from flexreason.patching import find_patch
from flexreason.train import checkpoints
from flexreason.train.sums import Sums, total_weight


class Broken(RuntimeError):
    """A run that cannot go on: the loss is no number, or a checkpoint cannot be written."""


class RowTraining:
    """To stand before a trainer class: `class MyTrainer(RowTraining, SFTTrainer)`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if isinstance(kwargs.get("train_dataset"), IterableDataset) and kwargs.get("args") is not None:
            # else accelerate has one rank read, and cuts up what it has read: rows of different shapes
            kwargs["args"].accelerator_config.dispatch_batches = False
        super().__init__(*args, **kwargs)
        me: Any = self
        for data, size in (
            ("train_dataset", "per_device_train_batch_size"),
            ("eval_dataset", "per_device_eval_batch_size"),
        ):
            if isinstance(getattr(me, data), Rows | RowStream):
                setattr(me.args, size, 1)
        me._train_batch_size = me.args.train_batch_size
        if find_patch(me.model) is None:
            raise ValueError("RowTrainer: the model is not patched; call fr.patch(model) first")
        self.keep, me.args.save_total_limit = me.args.save_total_limit, None  # only whole checkpoints count
        me.args.logging_nan_inf_filter = False
        me.args.remove_unused_columns = False
        self._sums = Sums(me.args.device)
        self._since = time.perf_counter()
        self._evaluated: Sums | None = None

    # --- training

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        me: Any = self
        data = me.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(data) if hasattr(data, "__len__") else None

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The rows of one optimizer step, and the weight of all targets in them, on all ranks."""
        rows, _ = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        return rows, self._over_ranks(total_weight(rows).to(device))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        self._sums.add(inputs, self._logprobs())
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        me: Any = self
        if "loss" in logs:
            logs.update(self._of_training())
            bad = [name for name in ("loss", "grad_norm") if name in logs and not _finite(logs[name])]
            if bad:
                raise Broken(
                    f"step {me.state.global_step}: {bad[0]} is {logs[bad[0]]}; nothing was saved since, and the last "
                    "checkpoint is as it was. A lower learning rate, or a look at the data of these steps, may help"
                )
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _of_training(self) -> dict[str, float]:
        """What rows since the last log have held, on all ranks."""
        me: Any = self
        self._sums.put(self._over_ranks(self._sums.all()))
        found = {name: value for name, value in self._sums.losses().items() if not name.startswith("loss_turn")}
        seconds, (in_trees, in_samples) = time.perf_counter() - self._since, self._sums.tokens.tolist()
        found["tree_tokens_per_second"] = in_trees / seconds
        found["sample_tokens_per_second"] = in_samples / seconds
        self._sums, self._since = Sums(me.args.device), time.perf_counter()
        return found

    def _logprobs(self) -> Tensor | None:
        """Of the last row's targets, where the loss was the model's own."""
        me: Any = self
        loss = getattr(find_patch(me.model), "root", me.model).loss_function
        found, loss.logprobs = loss.logprobs, None
        return found

    def _over_ranks(self, values: Tensor) -> Tensor:
        me: Any = self
        return me.accelerator.reduce(values, "sum") if me.args.world_size > 1 else values

    # --- evaluation

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        me: Any = self
        self._evaluated, self._n_evaluated = Sums(me.args.device), 0
        self._rows_to_evaluate = len(dataloader.dataset) if hasattr(dataloader.dataset, "__len__") else None
        prefix, start = kwargs.get("metric_key_prefix", "eval"), time.perf_counter()
        try:
            output = super().evaluation_loop(dataloader, *args, **kwargs)  # type: ignore[misc]
            self._evaluated.put(self._over_ranks(self._evaluated.all()))
            output.metrics.update({f"{prefix}_{name}": value for name, value in self._evaluated.losses().items()})
            output.metrics[f"{prefix}_targets"] = self._evaluated.n_targets
        finally:
            self._evaluated = None
        self._since += time.perf_counter() - start  # which training does not have to answer for
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        me: Any = self
        assert self._evaluated is not None
        inputs = me._prepare_inputs(inputs)
        with torch.no_grad(), me.compute_loss_context_manager():
            loss = model(**inputs).loss
        # accelerate fills the last round of ranks up with rows from the beginning: these do not count again
        number = self._n_evaluated * me.args.world_size + me.args.process_index
        self._n_evaluated += 1
        if self._rows_to_evaluate is None or number < self._rows_to_evaluate:
            logprobs = self._logprobs()
            if logprobs is None:
                raise ValueError(
                    "RowTrainer: the loss was replaced, so evaluation cannot tell targets apart; evaluate with the "
                    "model's own loss"
                )
            self._evaluated.add(inputs, logprobs)
        return loss.detach(), None, None

    # --- checkpoints

    def _save_checkpoint(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        me: Any = self
        bad = next((name for name, p in me.model.named_parameters() if not bool(torch.isfinite(_local(p)).all())), None)
        if bool(self._over_ranks(torch.tensor(float(bad is not None), device=me.args.device))):
            raise Broken(f"step {me.state.global_step}: {bad or 'a weight'} holds no numbers; it is not saved")
        folder, start = Path(me.args.output_dir) / f"checkpoint-{me.state.global_step}", time.perf_counter()
        try:
            super()._save_checkpoint(model, *args, **kwargs)  # type: ignore[misc]
            me.accelerator.wait_for_everyone()
            if me.args.should_save:
                checkpoints.seal(folder)
                checkpoints.keep_latest(folder.parent, self.keep)
        except (
            Exception
        ) as error:  # a full disk comes as OSError, and from safetensors and torch as errors of their own
            last = next(reversed(checkpoints.whole_ones(folder.parent)), None)
            raise Broken(
                f"step {me.state.global_step}: the checkpoint cannot be written: {error}; "
                + (f"the last whole one is {last}" if last else "there is no other yet")
            ) from error
        self._since += time.perf_counter() - start


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def _local(parameter: Tensor) -> Tensor:
    """What this rank has of it."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


class RowTrainer(RowTraining, Trainer):
    """The Trainer, for rows."""
