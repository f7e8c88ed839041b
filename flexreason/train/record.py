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
from flexreason.patching import find_root
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
        "settings": settings.as_dict(),
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
    if not found and "finished" not in before:
        return None
    if resume == "never":
        raise ValueError(f"output: {output} holds a run already; resume: auto goes on with it")
    differences = _differences(before, record)
    if differences:
        raise ValueError(
            f"output: {output} holds another run:\n  "
            + "\n  ".join(differences)
            + "\nGive the same again to go on with it, or another output"
        )
    if "finished" in before:
        return FINISHED
    return str(found[-1])


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What makes two runs different ones."""
    found = [
        f"{name}: {before['settings'].get(name)!r} then, {value!r} now"
        for name, value in now["settings"].items()
        if name not in MAY_CHANGE and before["settings"].get(name) != value
    ]
    for name, words in (("model", "the model's config"), ("data", "the data, the tokenizer or the template")):
        if before[name] != now[name]:
            changed = [s for s, h in now["sources"].items() if before["sources"].get(s) != h] if name == "data" else []
            found.append(f"{words} changed since" + (f": {', '.join(changed)}" if changed else ""))
    if before["evaluation"] != now["evaluation"]:
        found.append("the data to evaluate on changed since")
    if before["rows_per_step"] != now["rows_per_step"]:
        found.append(f"rows_per_step: {before['rows_per_step']} then, {now['rows_per_step']} now")
    return found


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
