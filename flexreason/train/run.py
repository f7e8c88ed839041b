"""`train`: a whole run, from settings to a trained model; and what of it stands in its folder.

output/run.json          the record: settings, versions, data, what was refused, how it went
       data/             the encoded data
       checkpoints/      those that are whole
       log.jsonl         a line a step, with the conversations it has trained on, and a line a log
       model/            the model, its tokenizer and config, when the run is over
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoTokenizer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import flexreason as fr
from flexreason.data.documents import Documents
from flexreason.data.intake import EntryEncoder
from flexreason.data.rows import Rows
from flexreason.data.summary import Summary
from flexreason.data.work import Shape, shape_of
from flexreason.load import load_model
from flexreason.model.hooks import find_root
from flexreason.train import checkpoints
from flexreason.train.prepare import Prepared, choose_for_evaluation, prepare
from flexreason.train.progress import Along
from flexreason.train.record import FINISHED, begin, go_on_from, now, refuse_other_settings, write
from flexreason.train.settings import Settings
from flexreason.train.trainer import RowTrainer

NOT_FOR_ROWS = {
    *("auto_find_batch_size", "average_tokens_across_devices", "ignore_data_skip", "label_smoothing_factor"),
    *("load_best_model_at_end", "max_steps", "resume_from_checkpoint", "save_only_model", "save_total_limit"),
}
"""Arguments of the Trainer that would contradict settings, or make a run that goes on another one."""

CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)
"""What the Trainer of the transformers that is installed calls it."""

LEARNING_RATES = {False: 1e-5, True: 1e-4}  # with LoRA?


@dataclass
class Outcome:
    """What became of a run."""

    folder: Path
    steps: int
    logs: list[dict[str, Any]]
    metrics: dict[str, float]
    seconds: float

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.logs if "loss" in entry]


def train(
    settings: Settings,
    say: Callable[[str], None] = lambda words: print(words, file=sys.stderr),
    callbacks: Sequence[TrainerCallback] = (),
) -> Outcome:
    """Run it, or go on with it. What could go wrong is looked at before what takes long."""
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    return _Run(settings, say, callbacks).run()


class _Run:
    def __init__(self, settings: Settings, say: Callable[[str], None], callbacks: Sequence[TrainerCallback]) -> None:
        self.callbacks = callbacks
        self.settings, self.folder = settings, Path(settings.output)
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.say = say if self.rank == 0 else (lambda words: None)
        self.rows_per_step = settings.rows_per_step or self.world
        if self.rows_per_step % self.world:
            raise ValueError(
                f"rows_per_step: expected a multiple of the {self.world} processes, found {self.rows_per_step}"
            )
        self.precision = _precision(settings.precision)
        if self.world == 1 and torch.cuda.device_count() > 1 and not settings.trainer.get("use_cpu"):
            raise ValueError(
                f"one process sees {torch.cuda.device_count()} GPUs: start one each with torchrun --nproc-per-node "
                f"{torch.cuda.device_count()} -m flexreason train ..., or let it see one with CUDA_VISIBLE_DEVICES"
            )
        self.check_output()

    def check_output(self) -> None:
        for source in self.settings.data:
            if Path(source).is_dir() and self.folder.resolve().is_relative_to(Path(source).resolve()):
                raise ValueError(
                    f"output: {self.folder} is inside the data, {source}, and would be read as data next time"
                )
        probe = self.folder / f".writable-{self.rank}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise ValueError(f"output: {self.folder} cannot be written to: {error}") from error

    def run(self) -> Outcome:
        start = time.monotonic()
        settings, grouped = self.settings, torch.distributed.is_initialized()
        tokenizer = self.load_tokenizer()
        asked = {"turns": settings.turns, "history": settings.history, "accept": settings.accept}
        encoder = EntryEncoder(tokenizer, format=settings.format, **asked, **settings.template)
        model = self.load_model()
        self.arguments(0)  # what is wrong with these is told before data are encoded
        refuse_other_settings(self.folder, settings)
        data, evaluation = self.prepare(encoder)
        rows, rows_to_evaluate = self.deal(data, evaluation)
        self.check_vocabulary(model, [prepared for prepared in (data, evaluation) if prepared])
        record = begin(settings, self.rows_per_step, self.world, self.precision, model, data, evaluation, rows)
        self.report(data, rows)
        checkpoint = go_on_from(self.folder, record, settings.resume)
        if checkpoint == FINISHED:
            self.say(f"{self.folder}: this run is finished; its model is in {self.folder / 'model'}")
            return self.outcome(json.loads((self.folder / "run.json").read_text()))
        if checkpoint:
            self.say(f"going on from {checkpoint}")
        along = Along(self.folder / "log.jsonl", rows, self.rows_per_step, settings, self.say, self.rank == 0)
        trainer = self.trainer(model, tokenizer, rows, rows_to_evaluate, along)
        if self.rank == 0:
            checkpoints.remove_unfinished(self.folder / "checkpoints")
            along.forget_after(checkpoints.step_of(Path(checkpoint)) if checkpoint else 0)
            write(self.folder / "run.json", record)
        trainer.train(resume_from_checkpoint=checkpoint)
        self.save_model(trainer)
        if not grouped and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if self.rank == 0:
            logs = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
            metrics = next((entry for entry in reversed(logs) if "eval_loss" in entry), {})
            seconds = time.monotonic() - start
            done = trainer.state.global_step == along.last  # and not stopped early by a callback
            record |= {FINISHED if done else "stopped": now(), "steps": trainer.state.global_step}
            record |= {"seconds": round(seconds, 1)}
            record |= {"logs": logs, "metrics": metrics}
            write(self.folder / "run.json", record)
            self.say(f"{trainer.state.global_step} steps in {seconds:.0f} s; the model is in {self.folder / 'model'}")
            return self.outcome(record)
        return Outcome(self.folder, trainer.state.global_step, [], {}, time.monotonic() - start)

    def outcome(self, record: dict[str, Any]) -> Outcome:
        return Outcome(self.folder, record["steps"], record["logs"], record["metrics"], record["seconds"])

    # --- what goes in

    def load_tokenizer(self) -> Any:
        if self.settings.format == "samples" and self.settings.tokenizer is None:
            return None
        name = self.settings.tokenizer or self.settings.model
        path = Path(name)
        try:
            return AutoTokenizer.from_pretrained(
                str(path.parent) if path.is_file() else name, trust_remote_code=self.settings.trust_remote_code
            )
        except Exception as error:  # whatever a tokenizer's files may raise
            raise ValueError(f"tokenizer: {name} cannot be loaded: {error}") from error

    def load_model(self) -> nn.Module:
        settings = self.settings
        dtype = "bfloat16" if self.precision == "bf16-weights" else "float32"
        model, notes = load_model(settings.model, dtype, "cpu", settings.seed, settings.trust_remote_code)
        for note in notes:
            self.say(f"note: {note}")
        if settings.lora is not None:
            if any("random" in note for note in notes):
                raise ValueError(f"lora: the weights beneath would be random, and saved nowhere: {notes[0]}")
            torch.manual_seed(settings.seed)
            model = _with_lora(model, settings.lora)
        if settings.loss != "auto":
            return fr.patch(model, settings.backend, loss=settings.loss)
        try:
            return fr.patch(model, settings.backend, loss="chunked")
        except ValueError as error:
            if "chunked" not in str(error):
                raise
            self.say(f"note: the model's own loss is used, from all logits of targets: {error}")
            return fr.patch(model, settings.backend)

    def prepare(self, encoder: EntryEncoder) -> tuple[Prepared, Prepared | None]:
        settings = self.settings

        def prepared(sources: list[str]) -> Prepared:
            return prepare(
                sources,
                encoder,
                self.folder / "data",
                length=settings.length,
                split=settings.split,
                too_long=settings.too_long,
                skip_invalid=settings.skip_invalid,
                workers=settings.workers,
                rank=self.rank,
            )

        data = prepared(settings.data)
        own = settings.evaluation is not None and _share(settings.evaluation) is None
        evaluation = prepared([str(settings.evaluation)]) if own else None
        for name, found in (("", data), (" of those to evaluate on", evaluation)):
            if found and found.refusals.total:
                lines = found.refusals.lines()
                self.say("\n".join([f"{found.refusals.total} conversations{name} are left out:", *lines]))
            if found and found.left_out:
                self.say(f"{found.left_out} samples{name} are longer than a row, and left out")
        return data, evaluation

    def deal(self, data: Prepared, evaluation: Prepared | None) -> tuple[Rows, Rows | None]:
        settings = self.settings
        documents: Any = Documents(data.documents_path, settings.weighting)
        held: Any = None if evaluation is None else Documents(evaluation.documents_path, settings.weighting)
        share = _share(settings.evaluation)
        if share is not None:
            documents, held = choose_for_evaluation(documents, share, settings.seed)
        rows = Rows(
            documents,
            settings.length,
            epochs=settings.epochs,
            steps=settings.steps,
            seed=settings.seed,
            multiple=self.rows_per_step,
            sizes=documents.sizes,
        )
        if held is None:
            return rows, None
        return rows, Rows(held, settings.length, multiple=self.world, sizes=held.sizes)

    def check_vocabulary(self, model: nn.Module, prepared: list[Prepared]) -> None:
        embeddings: Any = find_root(model).get_input_embeddings()
        vocabulary = embeddings.weight.shape[0]
        largest = max(each.largest_id for each in prepared)
        if largest >= vocabulary:
            raise ValueError(
                f"data: token {largest} is in it, and the model's vocabulary has {vocabulary}: made for another model?"
            )

    def shape(self) -> Shape | None:
        try:
            return shape_of(self.settings.model)
        except ValueError:  # code that comes with the model, or no count of experts: then the usual sizes are told
            return None

    def report(self, data: Prepared, rows: Rows) -> None:
        if self.rank:
            return
        summary = Summary(self.settings.length, self.shape())
        for figures in data.figures():
            summary.add(figures)
        self.say(str(summary))
        self.say(
            f"{len(rows) // self.rows_per_step} steps of {self.rows_per_step} rows of {self.settings.length} tokens, "
            f"{rows.progress(len(rows)):.2f} epochs; history={self.settings.history}, template options "
            f"{self.settings.template or 'none'}"
        )

    # --- the Trainer

    def arguments(self, n_steps: int) -> TrainingArguments:
        settings = self.settings
        arguments: dict[str, Any] = {
            "output_dir": str(self.folder / "checkpoints"),
            "num_train_epochs": 1,  # of Rows, which hold all epochs
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 1,
            "gradient_accumulation_steps": self.rows_per_step // self.world,
            "learning_rate": settings.learning_rate or LEARNING_RATES[settings.lora is not None],
            "lr_scheduler_type": settings.schedule,
            "warmup_steps": settings.warmup if settings.warmup >= 1 else round(settings.warmup * n_steps),
            "weight_decay": settings.weight_decay,
            "max_grad_norm": settings.clip,
            "optim": settings.optimizer,
            "seed": settings.seed,
            "bf16": self.precision == "bf16",
            "fp16": self.precision == "fp16",
            CHECKPOINTING: settings.checkpointing,
            "torch_compile": settings.compile,
            "logging_strategy": "steps",
            "logging_steps": settings.log_every,
            "logging_first_step": True,
            "save_strategy": "no",  # `Along` says when
            "eval_strategy": "no",
            "report_to": settings.report_to or "none",
            "remove_unused_columns": False,
            "disable_tqdm": True,
            "prediction_loss_only": True,
            "dataloader_pin_memory": torch.cuda.is_available() and not settings.trainer.get("use_cpu"),
            "use_cpu": not torch.accelerator.is_available(),
        }
        reserved = sorted(
            (arguments.keys() | NOT_FOR_ROWS) & settings.trainer.keys() - {"use_cpu", "dataloader_pin_memory"}
        )
        if reserved:
            raise ValueError(f"trainer: {', '.join(reserved)} is decided by settings of flexreason; use those")
        try:
            args = TrainingArguments(**{**arguments, **settings.trainer})
        except (TypeError, ValueError, ImportError) as error:
            raise ValueError(f"trainer: {error}") from error
        args.save_total_limit = settings.keep
        return args

    def trainer(
        self, model: nn.Module, tokenizer: Any, rows: Rows, evaluation: Rows | None, along: Along
    ) -> RowTrainer:
        trainer = RowTrainer(
            model=model,
            args=self.arguments(len(rows) // self.rows_per_step),
            train_dataset=rows,
            eval_dataset=evaluation,
            data_collator=fr.Collator(self.settings.length),
            processing_class=tokenizer,
            callbacks=[along, *self.callbacks],
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def save_model(self, trainer: RowTrainer) -> None:
        """The model where the run was heading; it appears when it is whole."""
        final, unfinished = self.folder / "model", self.folder / "model.unfinished"
        trainer.save_model(str(unfinished))
        trainer.accelerator.wait_for_everyone()
        if self.rank == 0:
            shutil.rmtree(final, ignore_errors=True)
            unfinished.replace(final)


def _precision(asked: str) -> str:
    gpu = torch.accelerator.is_available()
    accelerator = torch.accelerator.current_accelerator() if gpu else None
    if asked == "auto":
        return "bf16" if accelerator is not None and accelerator.type == "cuda" else "fp32"
    if asked == "fp16" and not gpu:
        raise ValueError("precision: fp16 needs a GPU, and there is none here; use fp32 or bf16")
    return asked


def _with_lora(model: nn.Module, lora: int | dict[str, Any]) -> nn.Module:
    try:
        import peft
    except ImportError as error:
        raise ValueError("lora: needs peft: pip install 'flexreason[train]'") from error
    given = {"r": lora, "lora_alpha": 2 * lora} if isinstance(lora, int) else lora
    try:
        config = peft.LoraConfig(**{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **given})
        return peft.get_peft_model(model, config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"lora: {error}") from error


def _share(evaluation: str | float | None) -> float | None:
    """The share of conversations that is evaluated on, where that is said."""
    try:
        share = float(evaluation) if evaluation is not None else None
    except ValueError:
        return None
    if share is not None and not 0 < share < 1:
        raise ValueError(f"evaluation: expected a share between 0 and 1, or data, found {evaluation}")
    return share
