"""The settings of a run in the words of transformers' Trainer."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from flexreason.train.settings import Settings

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

LEARNING_RATE, LEARNING_RATE_WITH_LORA = 1e-5, 1e-4


def arguments_of(settings: Settings, folder: Path, precision: str, accumulate: int, n_steps: int) -> TrainingArguments:
    """The Trainer's arguments.

    Args:
        settings: Of the run; their `trainer` holds further arguments, which must not contradict the others.
        folder: Of the run.
        precision: As `precision_of` says it.
        accumulate: Rows of an optimizer step on each process.
        n_steps: Optimizer steps of the run, of which a warm-up may be a share.
    """
    default_rate = LEARNING_RATE if settings.lora is None else LEARNING_RATE_WITH_LORA
    arguments: dict[str, Any] = {
        "output_dir": str(folder / "checkpoints"),
        "num_train_epochs": 1,  # of Rows, which hold all epochs
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": accumulate,
        "learning_rate": settings.learning_rate or default_rate,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": settings.warmup if settings.warmup >= 1 else round(settings.warmup * n_steps),
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.clip,
        "optim": settings.optimizer,
        "seed": settings.seed,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        CHECKPOINTING: settings.checkpointing,
        "torch_compile": settings.compile,
        "logging_strategy": "steps",
        "logging_steps": settings.log_every,
        "logging_first_step": True,
        "save_strategy": "no",  # `Progress` says when
        "eval_strategy": "no",
        "report_to": settings.report_to or "none",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "prediction_loss_only": True,
        "dataloader_pin_memory": torch.cuda.is_available() and not settings.trainer.get("use_cpu"),
        "use_cpu": not torch.accelerator.is_available(),
    }
    ours = (arguments.keys() | NOT_FOR_ROWS) - {"use_cpu", "dataloader_pin_memory"}
    if reserved := sorted(ours & settings.trainer.keys()):
        raise ValueError(f"trainer: {', '.join(reserved)} is decided by settings of flexreason; use those")
    try:
        args = TrainingArguments(**{**arguments, **settings.trainer})
    except (TypeError, ValueError, ImportError) as error:
        raise ValueError(f"trainer: {error}; give arguments of transformers' TrainingArguments") from error
    args.save_total_limit = settings.keep
    return args
