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

import copy
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, SequentialSampler
from transformers import Trainer

from flexreason.data.rows import Rows, RowStream
from flexreason.model.hooks import find_patch, find_root
from flexreason.model.loss import REQUEST, Request
from flexreason.model.refuse_rows import vocabulary_of
from flexreason.talk.telling import stage
from flexreason.train import record
from flexreason.train.filling import Filled, FilledStream, Filling
from flexreason.train.sums import Sums, total_weight
from flexreason.tree.row import IGNORED, NOBODY

ROWS = (Rows, RowStream)
"""Data sets one of whose items is a row."""


class Broken(RuntimeError):
    """A run that cannot go on: the loss is no number, or a checkpoint cannot be written."""


Base: Any = object
"""Stands for the trainer class behind `RowTraining`, so that a type checker takes what it has on trust."""


class RowTraining(Base):
    """To stand before a trainer class: `class MyTrainer(RowTraining, SFTTrainer)`."""

    args: Any
    data_collator: Any
    model_accepts_loss_kwargs: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._take_rows()

    def _take_rows(self) -> None:
        """What the Trainer's constructor is followed by: its arguments are refused, or set as rows need them. They are
        set in a copy, since who gave them may give them again."""
        self.args = copy.copy(self.args)
        self.args.accelerator_config = copy.copy(self.args.accelerator_config)
        # by default accelerate has one rank read streams, and cuts up what it has read: rows of different shapes
        self.args.accelerator_config.dispatch_batches = self.accelerator.dataloader_config.dispatch_batches = False
        self._refuse()
        if isinstance(self.train_dataset, ROWS):
            self.args.per_device_train_batch_size = self._train_batch_size = 1
        self.keep, self.args.save_total_limit = self.args.save_total_limit, None  # only whole checkpoints count
        self.args.logging_nan_inf_filter = False
        self.args.remove_unused_columns = False
        self.args.average_tokens_across_devices = True  # the weight of a step is summed over ranks
        self.model_accepts_loss_kwargs = True  # what divides a step goes to the model, whatever its class says
        self._sums = Sums(self.args.device)
        self._since = time.perf_counter()
        self._evaluated: Sums | None = None

    def _refuse(self) -> None:
        """Raise where training would be on something else, or would not do what it was asked for."""
        if find_patch(self.model) is None:
            raise ValueError(f"{type(self).__name__}: the model is not patched; call fr.patch(model) first")
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{type(self).__name__}: one process sees {self.args.n_gpu} GPUs, and a row cannot be cut up among "
                "them; start one process each (torchrun --nproc-per-node), or let it see one (CUDA_VISIBLE_DEVICES)"
            )
        if self.label_smoother is not None or self.compute_loss_func is not None:
            raise ValueError(
                f"{type(self).__name__}: label_smoothing_factor and compute_loss_func would shift a row's targets, "
                "which are in their places; leave them out"
            )
        if self.args.neftune_noise_alpha:
            raise ValueError(
                f"{type(self).__name__}: neftune_noise_alpha scales its noise by the length of what a model is given, "
                "which is that of a row and not of its samples; leave it out"
            )
        if self.compute_metrics is not None:
            raise ValueError(
                f"{type(self).__name__}: evaluation keeps no logits, so compute_metrics is never called; leave it out"
            )
        each_eval = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        sorted_ones = [
            data for data in (self.train_dataset, *each_eval) if data is not None and hasattr(data, "__len__")
        ]
        if self.args.train_sampling_strategy == "group_by_length" and not all(map(_tells_lengths, sorted_ones)):
            raise ValueError(
                f'{type(self).__name__}: train_sampling_strategy="group_by_length" reads the length of input_ids in a '
                "table, and here are layouts; leave it out: fr.Rows(layouts, length) fills rows best"
            )
        rows_per_step = self.args.gradient_accumulation_steps * self.args.world_size
        if isinstance(self.train_dataset, ROWS) and self.train_dataset.multiple % rows_per_step:
            raise ValueError(
                f"{type(self.train_dataset).__name__}: multiple: expected a multiple of a step's {rows_per_step} rows "
                f"(gradient_accumulation_steps x processes), found {self.train_dataset.multiple}"
            )

    # --- training

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does; `resume_from_checkpoint=True` goes on from the last whole checkpoint."""
        if resume_from_checkpoint is True:
            whole = record.whole_checkpoints(Path(self.args.output_dir))
            if not whole:
                raise ValueError(
                    f"{type(self).__name__}: no whole checkpoint in {self.args.output_dir}; leave "
                    "resume_from_checkpoint out to begin"
                )
            resume_from_checkpoint = str(whole[-1])
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(data) if isinstance(data, Rows) else super()._get_train_sampler(train_dataset)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The rows of one optimizer step, and the weight of all targets in them, on all ranks."""
        rows, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        total = self._over_ranks(total_weight(rows).to(device))
        if total.device.type == "cpu" and total <= 0 and any((row["labels"] != IGNORED).any() for row in rows):
            raise ValueError(
                f"{type(self).__name__}: the target weights of a step sum to {float(total):.6g}, and its loss is a "
                "mean by weight; use weights above 0, or more rows a step; for advantages a loop that says what "
                "divides them"
            )
        return rows, total

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        request = Request()
        loss = super().training_step(model, {**inputs, REQUEST: request}, *args, **kwargs)
        self._sums.add(inputs, request.logprobs)
        return loss

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        real = inputs["document"] != NOBODY  # a row's own mask is empty
        super()._track_num_input_tokens({**inputs, "attention_mask": real})

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs.update(self._of_training())
            # in fp16 a gradient too large for it makes the step be skipped, and the next one scaled down
            skipped = self.accelerator.optimizer_step_was_skipped
            looked_at = ("loss",) if skipped else ("loss", "grad_norm")
            bad = [name for name in looked_at if name in logs and not _finite(logs[name])]
            if bad:
                raise Broken(
                    f"step {self.state.global_step}: {bad[0]} is {logs[bad[0]]}; nothing was saved since, and the last "
                    "checkpoint is as it was. A lower learning rate may help, or a look at the data of these steps, "
                    "whose weights must sum to more than 0"
                )
        super().log(logs, *args, **kwargs)

    def _of_training(self) -> dict[str, float]:
        """The losses and the speed of all rows since the last log, on all ranks."""
        self._sums.put(self._over_ranks(self._sums.all()))
        logs = {name: value for name, value in self._sums.losses().items() if not name.startswith("loss_turn")}
        seconds, (in_trees, in_samples) = time.perf_counter() - self._since, self._sums.tokens.tolist()
        logs["tree_tokens_per_second"] = in_trees / seconds
        logs["sample_tokens_per_second"] = in_samples / seconds
        self._sums, self._since = Sums(self.args.device), time.perf_counter()
        return logs

    def _over_ranks(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, "sum") if self.args.world_size > 1 else values

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, sampler_fn: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """The Trainer's loader, of data that come out even over all ranks."""
        multiple = batch_size * (1 if self.args.accelerator_config.split_batches else self.args.world_size)
        by_ranks = self.args.train_sampling_strategy == "batch_rebalance"  # whose sampler gives each rank its own
        before, sampler_of = self.data_collator, sampler_fn
        if not self.args.dataloader_drop_last and not by_ranks:
            if isinstance(dataset, IterableDataset):
                # the Trainer cannot see a stream's end coming, and would take what is left into the next epoch's step
                together = self.args.gradient_accumulation_steps if description == "Training" else 1
                dataset = FilledStream(dataset, multiple * together) if self.args.world_size * together > 1 else dataset
            elif self.args.world_size > 1 and len(dataset) % multiple:
                dataset = filled = Filled(dataset, multiple)
                sampler_of = lambda _: filled.sampler(sampler_fn and sampler_fn(filled.data))  # noqa: E731
        self.data_collator = Filling(before, vocabulary_of(find_root(self.model)))
        try:
            return super()._get_dataloader(dataset, description, batch_size, sampler_of, *args, **kwargs)
        finally:
            self.data_collator = before

    # --- evaluation

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        with self._one_at_a_time(self.eval_dataset[data] if isinstance(data, str) else data):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        with self._one_at_a_time(test_dataset):
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _one_at_a_time(self, data: Any) -> Iterator[None]:
        """Evaluate one item at a time where an item is a row, which is a batch by itself."""
        before = self.args.per_device_eval_batch_size
        if isinstance(data, ROWS):
            self.args.per_device_eval_batch_size = 1
        try:
            yield
        finally:
            self.args.per_device_eval_batch_size = before

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        self._evaluated = Sums(self.args.device)
        prefix, start = kwargs.get("metric_key_prefix", "eval"), time.perf_counter()
        try:
            output = super().evaluation_loop(dataloader, *args, **kwargs)
            self._evaluated.put(self._over_ranks(self._evaluated.all()))
            if "loss" not in (losses := self._evaluated.losses()) and self._evaluated.n_targets:
                raise ValueError(
                    f"{type(self).__name__}: the target weights of what is evaluated sum to 0 or less, which gives no "
                    "mean; use weights above 0"
                )
            output.metrics.update({f"{prefix}_{name}": value for name, value in losses.items()})
            output.metrics[f"{prefix}_targets"] = self._evaluated.n_targets
        finally:
            self._evaluated = None
        self._since += time.perf_counter() - start  # evaluation does not count as time of training
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        assert self._evaluated is not None
        inputs, request = self._prepare_inputs(inputs), Request()
        with torch.no_grad(), self.compute_loss_context_manager():
            # what divides the loss is known when all rows are summed
            loss = model(**inputs, num_items_in_batch=1, **{REQUEST: request}).loss
        if request.logprobs is None:
            raise ValueError(
                f"{type(self).__name__}: the loss was replaced, so evaluation cannot tell targets apart; use the "
                "model's own loss to evaluate"
            )
        self._evaluated.add(inputs, request.logprobs)
        return loss.detach(), None, None

    # --- checkpoints

    def _save_checkpoint(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        trained = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad and p.is_floating_point())
        bad = next((name for name, p in trained if not bool(torch.isfinite(_local(p)).all())), None)
        if bool(self._over_ranks(torch.tensor(float(bad is not None), device=self.args.device))):
            raise Broken(
                f"step {self.state.global_step}: {bad or 'a weight'} holds no numbers; it is not saved. A "
                "lower learning rate may help"
            )
        start = time.perf_counter()
        run = Path(self._get_output_dir(trial=args[0] if args else kwargs.get("trial")))
        folder = run / f"checkpoint-{self.state.global_step}"
        try:
            with stage(f"saving {folder.name}"):
                if self.args.should_save:
                    (folder / record.SEAL).unlink(missing_ok=True)
                super()._save_checkpoint(model, *args, **kwargs)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    record.seal(folder)
                    record.keep_latest(run, self.keep, self.state.best_model_checkpoint)
        except Exception as error:  # a full disk is an OSError, or an error of safetensors' or torch's own
            last = next(reversed(record.whole_checkpoints(run)), None)
            raise Broken(
                f"step {self.state.global_step}: the checkpoint cannot be written: {error}; make room, and the "
                "same goes on: " + (f"the last whole one is {last}" if last else "there is no other yet")
            ) from error
        self._since += time.perf_counter() - start


def _tells_lengths(data: Any) -> bool:
    """Whether the Trainer can read how long the entries of a data set are."""
    return not len(data) or isinstance(data[0], Mapping)


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
