"""`RowTrainer`: transformers' Trainer for rows; and `RowTraining`, the same for other trainers (trl's SFTTrainer).

    trainer = RowTrainer(model=fr.patch(model), args=..., train_dataset=fr.Rows(layouts, 16384),
                         data_collator=fr.Collator(16384))

What differs from the Trainer: a step's loss is the mean over all its targets by weight; the evaluation loss too, with
reasoning, responses and turns apart (the Trainer's is the mean of the rows' means); logs tell these of training, and
tokens a second, of trees and of the samples they stand for; a checkpoint is whole or is none; a loss that is no
number stops the run before anything is saved. What `Rows` gives comes in its order, since it has shuffled, and one of
its items is a batch. Other data (a list, a table, a stream) may be of any length: over several ranks they are filled up
with empty rows, and nothing is trained on or evaluated twice.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, SequentialSampler
from transformers import Trainer

from flexreason.data.rows import Rows
from flexreason.data.stream import RowStream
from flexreason.model.hooks import find_patch, find_root
from flexreason.model.refuse import vocabulary_of
from flexreason.train import checkpoints
from flexreason.train.filling import Filled, FilledStream, Filling
from flexreason.train.sums import Sums, total_weight
from flexreason.tree.row import IGNORED

ROWS = (Rows, RowStream)
"""Data sets one of whose items is a row."""


class Broken(RuntimeError):
    """A run that cannot go on: the loss is no number, or a checkpoint cannot be written."""


class RowTraining:
    """To stand before a trainer class: `class MyTrainer(RowTraining, SFTTrainer)`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        me: Any = self
        # else accelerate has one rank read streams, and cuts up what it has read: rows of different shapes
        me.args.accelerator_config.dispatch_batches = me.accelerator.dataloader_config.dispatch_batches = False
        self._refuse()
        if isinstance(me.train_dataset, ROWS):
            me.args.per_device_train_batch_size = me._train_batch_size = 1
        self.keep, me.args.save_total_limit = me.args.save_total_limit, None  # only whole checkpoints count
        me.args.logging_nan_inf_filter = False
        me.args.remove_unused_columns = False
        me.args.average_tokens_across_devices = True  # the weight of a step is summed over ranks
        self._sums = Sums(me.args.device)
        self._since = time.perf_counter()
        self._evaluated: Sums | None = None

    def _refuse(self) -> None:
        """What would train on something else, or not do what it was asked for."""
        me: Any = self
        if find_patch(me.model) is None:
            raise ValueError("RowTrainer: the model is not patched; call fr.patch(model) first")
        if me.args.n_gpu > 1:
            raise ValueError(
                f"RowTrainer: one process sees {me.args.n_gpu} GPUs, and a row cannot be cut up among them; start one "
                "process each (torchrun --nproc-per-node), or let it see one (CUDA_VISIBLE_DEVICES)"
            )
        if me.label_smoother is not None or me.compute_loss_func is not None:
            raise ValueError(
                "RowTrainer: label_smoothing_factor and compute_loss_func would shift a row's targets, which are in "
                "their places; leave them out"
            )
        if me.compute_metrics is not None:
            raise ValueError("RowTrainer: evaluation keeps no logits, so compute_metrics is never called; leave it out")
        rows_per_step = me.args.gradient_accumulation_steps * me.args.world_size
        if isinstance(me.train_dataset, ROWS) and me.train_dataset.multiple % rows_per_step:
            raise ValueError(
                f"{type(me.train_dataset).__name__}: multiple: expected a multiple of a step's {rows_per_step} rows "
                f"(gradient_accumulation_steps x processes), found {me.train_dataset.multiple}"
            )

    # --- training

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; with `resume_from_checkpoint=True` from the last checkpoint that is whole."""
        me: Any = self
        if resume_from_checkpoint is True:
            whole = checkpoints.whole_ones(Path(me.args.output_dir))
            if not whole:
                raise ValueError(f"RowTrainer: no whole checkpoint in {me.args.output_dir}")
            resume_from_checkpoint = str(whole[-1])
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        me: Any = self
        data = me.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(data) if isinstance(data, Rows) else super()._get_train_sampler(train_dataset)  # type: ignore[misc]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The rows of one optimizer step, and the weight of all targets in them, on all ranks."""
        rows, _ = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        total = self._over_ranks(total_weight(rows).to(device))
        if total.device.type == "cpu" and total <= 0 and any((row["labels"] != IGNORED).any() for row in rows):
            raise ValueError(
                f"RowTrainer: the target weights of a step sum to {float(total):.6g}, and its loss is a mean by "
                "weight; use weights above 0, or more rows a step; for advantages a loop that says what divides them"
            )
        return rows, total

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        self._sums.add(inputs, self._logprobs())
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        me: Any = self
        if "loss" in logs:
            logs.update(self._of_training())
            # in fp16 a gradient too large for it makes the step be skipped, and the next one scaled down
            skipped = me.accelerator.optimizer_step_was_skipped
            looked_at = ("loss",) if skipped else ("loss", "grad_norm")
            bad = [name for name in looked_at if name in logs and not _finite(logs[name])]
            if bad:
                raise Broken(
                    f"step {me.state.global_step}: {bad[0]} is {logs[bad[0]]}; nothing was saved since, and the last "
                    "checkpoint is as it was. A lower learning rate may help, or a look at the data of these steps, "
                    "whose weights must sum to more than 0"
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
        loss = find_patch(me.model).row_loss  # type: ignore[union-attr]
        found, loss.logprobs = loss.logprobs, None
        return found

    def _over_ranks(self, values: Tensor) -> Tensor:
        me: Any = self
        return me.accelerator.reduce(values, "sum") if me.args.world_size > 1 else values

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, sampler_fn: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As the Trainer's, of data that come out even over all ranks."""
        me: Any = self
        multiple = batch_size * (1 if me.args.accelerator_config.split_batches else me.args.world_size)
        by_ranks = me.args.train_sampling_strategy == "batch_rebalance"  # whose sampler gives each rank its own
        before, sampler_of = me.data_collator, sampler_fn
        if me.args.world_size > 1 and not me.args.dataloader_drop_last and not by_ranks:
            if isinstance(dataset, IterableDataset):
                dataset = FilledStream(dataset, multiple)
            elif len(dataset) % multiple:
                dataset = filled = Filled(dataset, multiple)
                sampler_of = lambda _: filled.sampler(sampler_fn and sampler_fn(filled.data))  # noqa: E731
        me.data_collator = Filling(before, vocabulary_of(find_root(me.model)))
        try:
            return super()._get_dataloader(dataset, description, batch_size, sampler_of, *args, **kwargs)  # type: ignore[misc]
        finally:
            me.data_collator = before

    # --- evaluation

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        me: Any = self
        data = me.eval_dataset if eval_dataset is None else eval_dataset
        with self._one_at_a_time(me.eval_dataset[data] if isinstance(data, str) else data):
            return super().get_eval_dataloader(eval_dataset)  # type: ignore[misc]

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        with self._one_at_a_time(test_dataset):
            return super().get_test_dataloader(test_dataset)  # type: ignore[misc]

    @contextmanager
    def _one_at_a_time(self, data: Any) -> Iterator[None]:
        """An item is a batch where it is a row."""
        me: Any = self
        before = me.args.per_device_eval_batch_size
        if isinstance(data, ROWS):
            me.args.per_device_eval_batch_size = 1
        try:
            yield
        finally:
            me.args.per_device_eval_batch_size = before

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        me: Any = self
        self._evaluated = Sums(me.args.device)
        prefix, start = kwargs.get("metric_key_prefix", "eval"), time.perf_counter()
        try:
            output = super().evaluation_loop(dataloader, *args, **kwargs)  # type: ignore[misc]
            self._evaluated.put(self._over_ranks(self._evaluated.all()))
            if "loss" not in (losses := self._evaluated.losses()) and self._evaluated.n_targets:
                raise ValueError(
                    "RowTrainer: the target weights of what is evaluated sum to 0 or less: no mean by weight"
                )
            output.metrics.update({f"{prefix}_{name}": value for name, value in losses.items()})
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
            loss = model(**inputs, num_items_in_batch=1).loss  # what divides it is known when all rows are summed
        logprobs = self._logprobs()
        if logprobs is None:
            raise ValueError(
                "RowTrainer: the loss was replaced, so evaluation cannot tell targets apart; evaluate with the model's "
                "own loss"
            )
        self._evaluated.add(inputs, logprobs)
        return loss.detach(), None, None

    # --- checkpoints

    def _save_checkpoint(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        me: Any = self
        trained = ((name, p) for name, p in me.model.named_parameters() if p.requires_grad and p.is_floating_point())
        bad = next((name for name, p in trained if not bool(torch.isfinite(_local(p)).all())), None)
        if bool(self._over_ranks(torch.tensor(float(bad is not None), device=me.args.device))):
            raise Broken(f"step {me.state.global_step}: {bad or 'a weight'} holds no numbers; it is not saved")
        start = time.perf_counter()
        run = Path(me._get_output_dir(trial=args[0] if args else kwargs.get("trial")))
        folder = run / f"checkpoint-{me.state.global_step}"
        try:
            if me.args.should_save:
                (folder / checkpoints.SEAL).unlink(missing_ok=True)
            super()._save_checkpoint(model, *args, **kwargs)  # type: ignore[misc]
            me.accelerator.wait_for_everyone()
            if me.args.should_save:
                checkpoints.seal(folder)
                checkpoints.keep_latest(run, self.keep, me.state.best_model_checkpoint)
        except (
            Exception
        ) as error:  # a full disk comes as OSError, and from safetensors and torch as errors of their own
            last = next(reversed(checkpoints.whole_ones(run)), None)
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
    """The Trainer, for rows.

    >>> import tempfile
    >>> import flexreason as fr
    >>> from transformers import TrainingArguments
    >>> from transformers import Qwen3Config, Qwen3ForCausalLM
    >>> model = Qwen3ForCausalLM(Qwen3Config(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2, head_dim=8))
    >>> layouts = [fr.lay_out_turns([([1, 2], [10, 11], [20]), ([3], [12], [21])])]
    >>> folder = tempfile.TemporaryDirectory()
    >>> trainer = RowTrainer(
    ...     model=fr.patch(model),
    ...     args=TrainingArguments(folder.name, max_steps=2, save_strategy="no", use_cpu=True, disable_tqdm=True),
    ...     train_dataset=fr.Rows(layouts, 128, steps=2),
    ...     data_collator=fr.Collator(128),
    ... )
    >>> trainer.train().global_step  # doctest: +ELLIPSIS
    {'train_runtime': ...}
    2
    >>> folder.cleanup()
    """
