"""The settings of a training run: of a YAML file, of the command's options, or made in Python, by the same names.

model: Qwen/Qwen3-0.6B
data: chats.jsonl
output: runs/first
length: 16384
lora: 16
"""

import argparse
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from flexreason.chat.dirt import REASONS, accepted
from flexreason.chat.encode import HISTORIES
from flexreason.data.documents import WEIGHTINGS
from flexreason.data.files import DATA
from flexreason.data.intake import OURS
from flexreason.data.options import template_options
from flexreason.talk.nearest import did_you_mean, near_file

PRECISIONS = ("auto", "fp32", "bf16", "bf16-weights", "fp16")
CHOICES = {
    "history": HISTORIES,
    "weighting": WEIGHTINGS,
    "too_long": ("refuse", "drop"),
    "loss": ("auto", "model", "chunked"),
    "precision": PRECISIONS,
    "resume": ("auto", "never"),
}


def _setting(words: str, default: Any = MISSING) -> Any:
    """A setting that has a default or is needed, and the words for what it is."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": words})
    return field(default=default, metadata={"help": words})


@dataclass(kw_only=True)
class Settings:
    """Everything that a run is told. Wrong values are refused here, by the name of their setting."""

    # what is trained
    model: str = _setting("name, folder, or a config.json (random weights)")
    tokenizer: str | None = _setting("name or folder; the model's own if not given", None)
    data: list[str] = _setting(f"{DATA}; one or several")
    output: str = _setting("folder for the model, its checkpoints, the encoded data and the record of the run")
    trust_remote_code: bool = _setting("run code that comes with the model", False)

    # the data
    format: str | None = _setting("messages, sharegpt, pairs or samples; told by the first entry if not given", None)
    split: str = _setting("of data sets that have splits", "train")
    evaluation: str | float | None = _setting(
        "data to evaluate on: like data, or a share such as 0.05 of the conversations", None
    )
    history: str = _setting(
        "template: the template decides what is seen of earlier reasoning; content: it is taken out", "template"
    )
    turns: str | None = _setting('which turns are trained on: all, or "last"', None)
    template: dict[str, Any] = _setting("options for the chat template, such as enable_thinking", {})
    accept: list[str] = _setting(
        "reasons for which dirty answers are refused, and which are then trained as written: " + ", ".join(REASONS), []
    )
    skip_invalid: bool = _setting("go on without conversations that are refused, and list them", False)
    too_long: str = _setting("a sample that is longer than a row: refuse, or drop that sample", "refuse")
    length: int = _setting("tokens in a row", 16384)
    workers: int = _setting("processes that encode; 0: none but this one", 0)

    # the step
    epochs: int = _setting("how often every document is seen", 1)
    steps: int | None = _setting("optimizer steps, instead of epochs", None)
    rows_per_step: int | None = _setting("rows in an optimizer step, over all processes; one each if not given", None)
    weighting: str = _setting("token: every target counts alike; turn: every turn does", "token")
    learning_rate: float | None = _setting("1e-5 if not given, 1e-4 with LoRA", None)
    schedule: str = _setting("as Trainer's lr_scheduler_type", "cosine")
    warmup: float = _setting("steps of warm-up; below 1, their share of all", 0.05)
    weight_decay: float = _setting("of the optimizer", 0.0)
    clip: float = _setting("largest norm of the gradient; 0: not clipped", 1.0)
    optimizer: str = _setting("as Trainer's optim", "adamw_torch")
    seed: int = _setting("of order, packing, and weights where there are none", 0)

    # the model
    lora: int | dict[str, Any] | None = _setting(
        "rank, or the arguments of peft's LoraConfig; all weights if not given", None
    )
    precision: str = _setting(
        "fp32; bf16 or fp16: autocast over fp32 weights; bf16-weights: weights in bf16 too; auto: bf16 on GPUs", "auto"
    )
    backend: str = _setting("auto, segments, flex, dense", "auto")
    loss: str = _setting("model: its own; chunked: no full logits; auto: chunked where the model takes it", "auto")
    checkpointing: bool = _setting("gradient checkpointing: less memory, a third more time", False)
    compile: bool = _setting("torch.compile", False)

    # along the way
    log_every: int = _setting("steps between logs", 10)
    evaluate_every: int | None = _setting("steps between evaluations; at the end of every epoch if not given", None)
    save_every: int | None = _setting("steps between checkpoints; at the end of every epoch if not given", None)
    keep: int | None = _setting("checkpoints that are kept, the latest; all if not given", 2)
    resume: str = _setting(
        "auto: go on from the last whole checkpoint in the output; never: begin, and refuse if there is one", "auto"
    )
    report_to: list[str] = _setting("where Trainer logs to: tensorboard, wandb, ...", [])
    trainer: dict[str, Any] = _setting("further arguments of transformers' TrainingArguments: fsdp, deepspeed, ...", {})

    def __post_init__(self) -> None:
        for name in ("data", "report_to", "accept"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        for each in fields(self):
            _check(each.name, getattr(self, each.name), each.type)
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, found {getattr(self, name)!r}")
        for name in ("length", "epochs", "steps", "rows_per_step", "log_every", "evaluate_every", "save_every", "keep"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "clip", "workers", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected 0 or more, found {getattr(self, name)}")
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate: expected a number above 0, found {self.learning_rate}")
        if self.length % 128:
            raise ValueError(
                f"length: expected a multiple of 128, found {self.length}; try {-(-self.length // 128) * 128}"
            )
        if twice := sorted({source for source in self.data if self.data.count(source) > 1}):
            raise ValueError(f"data: {twice[0]} is named twice, and would be used once; use epochs, or a copy")
        if not self.data:
            raise ValueError("data: expected at least one file")
        if self.steps is not None and self.epochs != 1:
            raise ValueError(f"steps and epochs contradict each other: found {self.steps} and {self.epochs}; give one")
        if self.evaluate_every is not None and self.evaluation is None:
            raise ValueError("evaluate_every: there is nothing to evaluate on; give evaluation")
        self.accept = sorted(accepted(self.accept))
        _ = self.evaluation_share  # which tells a share that is none
        if own := self.template.keys() & OURS:
            raise ValueError(f"template: {min(own)} is no option of the template; give it as a setting of its own")
        if self.turns not in (None, "last"):
            raise ValueError(f'turns: expected "last" or nothing, found {self.turns!r}')

    @property
    def evaluation_share(self) -> float | None:
        """The share of the conversations that is evaluated on; None if there is nothing, or data of their own."""
        try:
            share = None if self.evaluation is None else float(self.evaluation)
        except ValueError:
            return None
        if share is not None and not 0 < share < 1:
            raise ValueError(f"evaluation: expected a share between 0 and 1, or data, found {self.evaluation}")
        return share


NAMES = {each.name: each for each in fields(Settings)}


def _check(name: str, value: Any, kind: Any) -> None:
    """Raise unless a value is of the type of its setting."""
    allowed = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    plain = tuple(typing.get_origin(one) or one for one in allowed)
    fits = isinstance(value, plain) or (float in plain and isinstance(value, int))
    if isinstance(value, bool) and bool not in plain:
        fits = False
    if fits and list in plain and isinstance(value, list):
        fits = all(isinstance(item, str) for item in value)
    if not fits:
        words = {
            str: "text",
            int: "a whole number",
            float: "a number",
            bool: "true or false",
            dict: "names with values",
        }
        wanted = " or ".join("nothing" if one is type(None) else words.get(one, "a list of texts") for one in plain)
        raise ValueError(f"{name}: expected {wanted}, found {value!r}")


def from_mapping(values: Mapping[str, Any], where: str = "settings") -> Settings:
    """The settings of names and values. A wrong name is refused with the nearest right one.

    >>> from_mapping({"model": "m", "data": "chats.jsonl", "output": "o", "lenght": 512}, "run.yaml")
    Traceback (most recent call last):
    ValueError: run.yaml: unknown setting 'lenght'; did you mean 'length'?
    """
    for name in values:
        if name not in NAMES:
            raise ValueError(f"{where}: unknown setting {name!r}{did_you_mean(name, NAMES)}")
    missing = [each.name for each in NAMES.values() if _required(each) and values.get(each.name) is None]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} missing")
    return Settings(**values)


def _required(each: Any) -> bool:
    return each.default is MISSING and each.default_factory is MISSING


def read_yaml(path: Path) -> dict[str, Any]:
    import yaml  # transformers brings it

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = near_file(path) if isinstance(error, FileNotFoundError) else ""
        raise ValueError(f"{path}: cannot be read: {error}{hint or '; give a YAML file of settings'}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        words = " ".join(str(error).split())
        raise ValueError(f"{path}: no YAML: {words}; expected lines of NAME: VALUE, and data as --data FILE") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected names with values, found {type(values).__name__}")
    return {name: value if _is_text(name) else _numbers(value) for name, value in values.items()}


def _is_text(name: str) -> bool:
    return name not in NAMES or NAMES[name].type in (str, str | None)


def _numbers(value: Any) -> Any:
    """1e-4 is text to YAML, and a number to everybody else."""
    if isinstance(value, dict):
        return {name: _numbers(item) for name, item in value.items()}
    try:
        return float(value) if isinstance(value, str) and "e" in value.lower() else value
    except ValueError:
        return value


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for every setting; `from_options` lets them go before the file."""
    for each in NAMES.values():
        name, words = f"--{each.name.replace('_', '-')}", each.metadata["help"]
        default = None if _required(each) or each.default is MISSING else each.default
        words += "" if default in (None, False) else f" (default {default})"
        kind = each.type
        if kind is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=None, help=words)
        elif kind == list[str]:
            metavar = "FILE" if each.name == "data" else "X"
            parser.add_argument(name, action="extend", nargs="+", metavar=metavar, help=words)
        else:
            parser.add_argument(name, metavar="X", help=words.replace("%", "%%"))


def from_options(options: argparse.Namespace) -> Settings:
    """Settings of a file, if one is named, and of options, which go first."""
    import yaml

    values = read_yaml(Path(options.config)) if options.config else {}
    for name in NAMES:
        value = getattr(options, name, None)
        if isinstance(value, str) and not _is_text(name):
            try:
                value = _numbers(yaml.safe_load(value))
            except yaml.YAMLError as error:
                raise ValueError(f"{name}: {value!r} is no value: {error}; expected one as in YAML") from error
        if value is not None:
            values[name] = value
    if of_template := template_options(getattr(options, "option", None) or ()):
        values["template"] = {**(values.get("template") or {}), **of_template}
    return from_mapping(values, str(options.config or "options"))
