"""The record of a run, `run.json`: settings, versions, data, what was refused, how it went; and what it decides:
whether a run that is begun again is the same one, and from which checkpoint it goes on.
"""

import dataclasses
import hashlib
import json
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

from flexreason.data.rows import Rows
from flexreason.model.hooks import find_root
from flexreason.train import checkpoints
from flexreason.train.prepare import Prepared
from flexreason.train.settings import Settings

MAY_CHANGE = {
    *("output", "workers", "log_every", "evaluate_every", "save_every", "keep", "resume", "report_to", "data", "model"),
    *("tokenizer", "evaluation"),
}
"""Settings that a run which goes on may change: they do not change what is trained, or are compared by content."""

PACKAGES = ("flexreason", "torch", "transformers", "accelerate", "peft", "tokenizers")

FINISHED = "finished"


def begin(
    settings: Settings,
    rows_per_step: int,
    processes: int,
    precision: str,
    model: nn.Module,
    data: Prepared,
    evaluation: Prepared | None,
    rows: Rows,
) -> dict[str, Any]:
    """What is known of a run before its first step."""
    root = find_root(model)
    shapes = [(name, list(p.shape)) for name, p in root.named_parameters()]
    config = {k: v for k, v in root.config.to_dict().items() if not k.startswith("_") and k != "transformers_version"}
    return {
        "settings": _settings(settings),
        "rows_per_step": rows_per_step,
        "processes": processes,
        "precision": precision,
        "versions": {name: _version(name) for name in PACKAGES},
        "model": hashlib.sha256(json.dumps([config, shapes], sort_keys=True, default=str).encode()).hexdigest()[:16],
        "data": data.key,
        "evaluation": evaluation.key if evaluation else str(settings.evaluation),
        "sources": data.sources | (evaluation.sources if evaluation else {}),
        "formats": data.formats,
        "conversations": data.conversations,
        "refused": dataclasses.asdict(data.refusals),
        "refused_in_evaluation": dataclasses.asdict(evaluation.refusals) if evaluation else {},
        "documents": len(rows.items),
        "rows": len(rows),
        "started": now(),
    }


def go_on_from(output: Path, record: dict[str, Any], resume: str) -> str | None:
    """The last whole checkpoint of this same run; an error where there is one of another."""
    folder, path = output / "checkpoints", output / "run.json"
    found = checkpoints.whole_ones(folder)
    if not path.exists():
        if found:
            raise ValueError(f"output: there are checkpoints in {folder}, and no run.json says of what")
        return None
    before = json.loads(path.read_text())
    if not found and FINISHED not in before:
        return None
    if resume == "never":
        raise ValueError(f"output: {output} holds a run already; resume: auto goes on with it")
    _refuse(output, _differences(before, record))
    if FINISHED in before:
        return FINISHED
    return str(found[-1])


def refuse_other_settings(output: Path, settings: Settings) -> None:
    """Raise where the output holds a run with other settings: before data are encoded for one that will not be."""
    try:
        before = json.loads((output / "run.json").read_text())
    except (OSError, ValueError):
        return
    if checkpoints.whole_ones(output / "checkpoints") or FINISHED in before:
        _refuse(output, _other_settings(before["settings"], _settings(settings)))


def _refuse(output: Path, differences: list[str]) -> None:
    if differences:
        raise ValueError(
            f"output: {output} holds another run:\n  "
            + "\n  ".join(differences)
            + "\nGive the same again to go on with it, or another output"
        )


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What makes two runs different ones."""
    found = _other_settings(before["settings"], now["settings"])
    for name, words in (
        ("model", "the model's config"),
        ("data", "the data, the tokenizer, the template or the versions"),
    ):
        if before[name] != now[name]:
            changed = [s for s, h in now["sources"].items() if before["sources"].get(s) != h] if name == "data" else []
            found.append(f"{words} changed since" + (f": {', '.join(changed)}" if changed else ""))
    if before["evaluation"] != now["evaluation"]:
        found.append("the data to evaluate on changed since")
    for name in ("rows_per_step", "precision"):
        if before[name] != now[name]:
            found.append(f"{name}: {before[name]} then, {now[name]} now")
    return found


def _other_settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"{name}: {before.get(name)!r} then, {value!r} now"
        for name, value in now.items()
        if name not in MAY_CHANGE and before.get(name) != value
    ]


def _settings(settings: Settings) -> dict[str, Any]:
    """As they are written down: without what is secret."""
    said = settings.as_dict()
    said["trainer"] = {k: "***" if k.endswith("_token") else value for k, value in said["trainer"].items()}
    return said


def write(path: Path, record: dict[str, Any]) -> None:
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(record, indent=1))
    unfinished.replace(path)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
