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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

import flexreason as fr
from flexreason.data.documents import Documents
from flexreason.data.figures import shape_of
from flexreason.data.intake import EntryEncoder
from flexreason.data.rows import Rows
from flexreason.data.summary import Summary
from flexreason.model.hooks import find_root
from flexreason.talk.telling import aside, stage
from flexreason.train import record
from flexreason.train.arguments import arguments_of
from flexreason.train.model import patched_model_of, precision_of, tokenizer_of
from flexreason.train.prepare import Prepared, choose_for_evaluation, prepare
from flexreason.train.progress import Progress
from flexreason.train.settings import Settings
from flexreason.train.trainer import RowTrainer


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


@dataclass(frozen=True)
class _Plan:
    """What every part of a run asks for: the settings, and what this machine makes of them."""

    settings: Settings
    folder: Path
    rank: int
    processes: int
    rows_per_step: int
    precision: str
    say: Callable[[str], None]


def train(
    settings: Settings,
    say: Callable[[str], None] = lambda words: print(words, file=sys.stderr),
    callbacks: Sequence[TrainerCallback] = (),
) -> Outcome:
    """Run it, or go on with it. What can go wrong is looked at before what takes long.

    Args:
        settings: What is trained, and how.
        say: Is given every line for people; by default they go to stderr.
        callbacks: Further callbacks of the Trainer.
    """
    start, had_group = time.monotonic(), torch.distributed.is_initialized()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    plan = _plan(settings, say)
    say = plan.say
    tokenizer = tokenizer_of(settings)
    ours = {"turns": settings.turns, "history": settings.history, "accept": settings.accept}
    encoder = EntryEncoder(tokenizer, format=settings.format, **ours, **settings.template)
    model = patched_model_of(settings, plan.precision, say)
    accumulate = plan.rows_per_step // plan.processes
    arguments_of(settings, plan.folder, plan.precision, accumulate, 0)  # refuses what is wrong before data are encoded
    record.refuse_other_settings(plan.folder, settings)

    data, evaluation = _prepare(plan, encoder)
    with stage("packing rows"):
        rows, rows_to_evaluate = _rows(plan, data, evaluation)
    _check_vocabulary(model, data, evaluation)
    steps = len(rows) // plan.rows_per_step
    if plan.rank == 0:
        _tell(plan, data, rows, steps)

    known = _about(settings, data, evaluation, rows)
    this_run = record.begin(settings, plan.rows_per_step, plan.processes, plan.precision, model, known)
    checkpoint = record.go_on_from(plan.folder, this_run, settings.resume)
    if checkpoint == record.FINISHED:
        say(f"{plan.folder}: this run is finished; its model is in {plan.folder / 'model'}")
        return _outcome(plan, json.loads((plan.folder / "run.json").read_text()))
    if checkpoint:
        say(f"going on from {checkpoint}")

    first, alone = plan.rank == 0, plan.processes == 1
    progress = Progress(plan.folder / "log.jsonl", rows, plan.rows_per_step, settings, say, first, stops=alone)
    trainer = RowTrainer(
        model=model,
        args=arguments_of(settings, plan.folder, plan.precision, accumulate, steps),
        train_dataset=rows,
        eval_dataset=rows_to_evaluate,
        data_collator=fr.Collator(settings.length),
        processing_class=tokenizer,
        callbacks=[progress, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    if plan.rank == 0:
        record.remove_unfinished(plan.folder / "checkpoints")
        progress.forget_after(record.step_of(Path(checkpoint)) if checkpoint else 0)
        record.write_whole(plan.folder / "run.json", json.dumps(this_run, indent=1))
    with progress.told():
        trainer.train(resume_from_checkpoint=checkpoint)
    if progress.was_stopped:
        raise KeyboardInterrupt
    with stage("saving the model"):
        _save_model(plan, trainer)
    if not had_group and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

    steps_done, seconds = trainer.state.global_step, time.monotonic() - start
    if plan.rank:
        return Outcome(plan.folder, steps_done, [], {}, seconds)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    this_run |= {
        record.FINISHED if steps_done == steps else "stopped": record.now(),  # a callback may stop it early
        "steps": steps_done,
        "seconds": round(seconds, 1),
        "logs": logs,
        "metrics": next((entry for entry in reversed(logs) if "eval_loss" in entry), {}),
    }
    record.write_whole(plan.folder / "run.json", json.dumps(this_run, indent=1))
    say(f"{steps_done} steps in {seconds:.0f} s; the model is in {plan.folder / 'model'}")
    if progress.was_asked:  # during the last step: this run is finished, and whatever would follow it is not wanted
        raise KeyboardInterrupt
    return _outcome(plan, this_run)


def _outcome(plan: _Plan, finished: dict[str, Any]) -> Outcome:
    return Outcome(plan.folder, **{name: finished[name] for name in ("steps", "logs", "metrics", "seconds")})


# --- what the machine and the folder allow


def _plan(settings: Settings, say: Callable[[str], None]) -> _Plan:
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    rows_per_step = settings.rows_per_step or processes
    if rows_per_step % processes:
        raise ValueError(f"rows_per_step: expected a multiple of the {processes} processes, found {rows_per_step}")
    precision, gpus = precision_of(settings.precision), torch.cuda.device_count()
    if processes == 1 and gpus > 1 and not settings.trainer.get("use_cpu"):
        raise ValueError(
            f"one process sees {gpus} GPUs: start one each with torchrun --nproc-per-node {gpus} -m flexreason train "
            "..., or let it see one with CUDA_VISIBLE_DEVICES"
        )
    folder = Path(settings.output)
    _check_output(folder, settings.data, rank)

    def say_aside(words: str) -> None:
        if rank == 0:
            with aside():
                say(words)

    return _Plan(settings, folder, rank, processes, rows_per_step, precision, say_aside)


def _check_output(folder: Path, sources: Sequence[str], rank: int) -> None:
    for source in sources:
        if Path(source).is_dir() and folder.resolve().is_relative_to(Path(source).resolve()):
            raise ValueError(
                f"output: {folder} is inside the data, {source}, and would be read as data next time; give a "
                "folder elsewhere"
            )
    probe = folder / f".writable-{rank}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"output: {folder} cannot be written to: {error}; give another folder") from error


# --- the data


def _prepare(plan: _Plan, encoder: EntryEncoder) -> tuple[Prepared, Prepared | None]:
    """The data to train on, encoded; and those to evaluate on, if they are data of their own."""
    settings = plan.settings

    def prepared(sources: list[str], words: str) -> Prepared:
        data = prepare(
            sources,
            encoder,
            plan.folder / "data",
            length=settings.length,
            split=settings.split,
            too_long=settings.too_long,
            skip_invalid=settings.skip_invalid,
            workers=settings.workers,
            rank=plan.rank,
        )
        if data.refusals.total:
            lines = data.refusals.lines()
            plan.say("\n".join([f"{data.refusals.total} conversations{words} are left out:", *lines]))
        if data.left_out:
            plan.say(f"{data.left_out} samples{words} are longer than a row, and left out")
        return data

    data = prepared(settings.data, "")
    if settings.evaluation is None or settings.evaluation_share is not None:
        return data, None
    return data, prepared([str(settings.evaluation)], " of those to evaluate on")


def _rows(plan: _Plan, data: Prepared, evaluation: Prepared | None) -> tuple[Rows, Rows | None]:
    """The rows to train on, of all epochs, and the rows to evaluate on."""
    settings = plan.settings
    documents: Any = Documents(data.documents_path, settings.weighting)
    held_out: Any = None if evaluation is None else Documents(evaluation.documents_path, settings.weighting)
    if settings.evaluation_share is not None:
        documents, held_out = choose_for_evaluation(documents, settings.evaluation_share, settings.seed)
    rows = Rows(
        documents,
        settings.length,
        epochs=settings.epochs,
        steps=settings.steps,
        seed=settings.seed,
        multiple=plan.rows_per_step,
        sizes=documents.sizes,
    )
    if held_out is None:
        return rows, None
    return rows, Rows(held_out, settings.length, multiple=plan.processes, sizes=held_out.sizes)


def _check_vocabulary(model: nn.Module, data: Prepared, evaluation: Prepared | None) -> None:
    embeddings: Any = find_root(model).get_input_embeddings()
    vocabulary = embeddings.weight.shape[0]
    largest = max(data.largest_id, evaluation.largest_id if evaluation else 0)
    if largest >= vocabulary:
        raise ValueError(
            f"data: token {largest} is in it, and the model's vocabulary has {vocabulary}: made for another model? "
            "Give its own tokenizer"
        )


def _tell(plan: _Plan, data: Prepared, rows: Rows, steps: int) -> None:
    """Say what is in the data, and how long it will be trained on."""
    settings = plan.settings
    try:
        shape = shape_of(settings.model)
    except ValueError:  # code that comes with the model, or no count of experts: then the usual sizes are told
        shape = None
    summary = Summary(settings.length, shape)
    for figures in data.figures():
        summary.add(figures)
    plan.say(str(summary))
    rows_a_step = f"{plan.rows_per_step} row{'s' * (plan.rows_per_step > 1)} of {settings.length} tokens"
    plan.say(
        f"{steps} steps of {rows_a_step}, {rows.progress(len(rows)):.2f} epochs; history={settings.history}, template "
        f"options {settings.template or 'none'}"
    )


def _about(settings: Settings, data: Prepared, evaluation: Prepared | None, rows: Rows) -> dict[str, Any]:
    """What the record says of the data."""
    return {
        "data": data.key,
        "evaluation": evaluation.key if evaluation else str(settings.evaluation),
        "sources": data.sources | (evaluation.sources if evaluation else {}),
        "formats": data.formats,
        "conversations": data.conversations,
        "refused": asdict(data.refusals),
        "refused_in_evaluation": asdict(evaluation.refusals) if evaluation else {},
        "documents": len(rows.items),
        "rows": len(rows),
    }


# --- the end


def _save_model(plan: _Plan, trainer: RowTrainer) -> None:
    """Save the model to the run's folder, where it appears when it is whole."""
    final, unfinished = plan.folder / "model", plan.folder / "model.unfinished"
    trainer.save_model(str(unfinished))
    trainer.accelerator.wait_for_everyone()
    if plan.rank == 0:
        shutil.rmtree(final, ignore_errors=True)
        unfinished.replace(final)
