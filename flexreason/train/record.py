"""Which run this is, and from where it goes on: `run.json`, what identifies the data, and which checkpoints are whole.

A run that was stopped goes on when the same command is given again. So three questions are answered here, and only
here: are these the data that the run began with (`key_of`), is it the same run (`go_on_from`), and which of its
checkpoints can be trusted (`is_whole`). A run may be killed while it writes a checkpoint. So a checkpoint counts only
once it is sealed: a last file lists all others with their sizes, and is written when all of them are on the disk.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from flexreason.data.folders import visible_files
from flexreason.data.intake import EntryEncoder, version_of_encoding
from flexreason.model.hooks import find_root
from flexreason.talk.versions import version_of
from flexreason.train.settings import Settings

MAY_CHANGE = {
    *("output", "workers", "log_every", "evaluate_every", "save_every", "keep", "resume", "report_to", "data", "model"),
    *("tokenizer", "evaluation"),
}
"""Settings that a run which goes on may change: they do not change what is trained, or are compared by content."""

PACKAGES = ("flexreason", "torch", "transformers", "accelerate", "peft", "tokenizers")

FINISHED = "finished"

SEAL = "complete.json"
"""The last file of a checkpoint: {file: bytes}."""

CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears when all of it is on the disk, and never in part."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text)
    _sync(unfinished)
    unfinished.replace(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- are these the same data?


def key_of(hashes: Mapping[str, str], encoder: EntryEncoder, how: Mapping[str, Any]) -> str:
    """A name for encoded data: two are the same only if everything is that could change a document.

    Args:
        hashes: The `content_hash` of every source.
        encoder: What makes layouts of conversations, with its tokenizer and options.
        how: How layouts become documents: the length of rows, and what is left out.
    """
    identity = {
        "sources": list(hashes.values()),
        "tokenizer": _tokenizer_hash(encoder.tokenizer),
        "options": repr(sorted(encoder.options.items())),
        "format": encoder.format,
        "turns": encoder.turns,
        **how,
        "versions": [version_of_encoding(), transformers.__version__],
    }
    return _hash(json.dumps(identity, sort_keys=True))[:16]


def content_hash(source: str) -> str:
    """The hash of a file, or of all files of a folder that may be read; a name on the Hub stands for itself."""
    path = Path(source)
    inside = visible_files(path) if path.is_dir() else ()
    files = [path] if path.is_file() else sorted(file for file in inside if file.is_file())
    if not files:
        return f"name {source}"
    content = hashlib.sha256()
    for file in files:
        content.update(f"{file.relative_to(path)}\0".encode())
        with file.open("rb") as opened:
            content.update(hashlib.file_digest(opened, "sha256").digest())
    return content.hexdigest()


def _tokenizer_hash(tokenizer: Any) -> str:
    """The hash of all that decides which ids a text gets, and of the template."""
    if tokenizer is None:
        return "none"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [
        backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items())),
        str(tokenizer.chat_template),
        json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str),
    ]
    return _hash("\0".join(parts))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- is it the same run?


def begin(
    settings: Settings, rows_per_step: int, processes: int, precision: str, model: nn.Module, data: Mapping[str, Any]
) -> dict[str, Any]:
    """What is known of a run before its first step; `data` is what `run` knows of the data."""
    root = find_root(model)
    shapes = [(name, list(p.shape)) for name, p in root.named_parameters()]
    config = {k: v for k, v in root.config.to_dict().items() if not k.startswith("_") and k != "transformers_version"}
    return {
        "settings": _settings(settings),
        "rows_per_step": rows_per_step,
        "processes": processes,
        "precision": precision,
        "versions": {name: version_of(name) for name in PACKAGES},
        "model": _hash(json.dumps([config, shapes], sort_keys=True, default=str))[:16],
        "weights": "" if settings.lora is None else fingerprint(weights_beneath(model)),
        **data,
        "started": now(),
    }


def weights_beneath(model: nn.Module) -> Iterator[Tensor]:
    """What adapters are trained on top of, which is in no checkpoint: all that does not train."""
    yield from (p for _, p in sorted(model.named_parameters()) if not p.requires_grad)
    yield from (buffer for _, buffer in sorted(model.named_buffers()))


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """A short hash of the bits of some tensors: a second or so for each GB, on as many threads as there are cores."""

    def hashed(tensor: Tensor) -> str:
        bits: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(bits).hexdigest()}"

    with ThreadPoolExecutor(os.cpu_count()) as threads:  # hashlib lets others run meanwhile
        return _hash("\n".join(threads.map(hashed, tensors)))[:16]


def go_on_from(output: Path, record: dict[str, Any], resume: str) -> str | None:
    """The last whole checkpoint of this same run, FINISHED if it is over, or None if there is nothing to go on from.
    Raises where the output holds another run."""
    folder, path = output / "checkpoints", output / "run.json"
    whole = whole_checkpoints(folder)
    if not path.exists():
        if whole:
            raise ValueError(
                f"output: there are checkpoints in {folder}, and no run.json says of what; give another output"
            )
        return None
    before = json.loads(path.read_text())
    if not whole and FINISHED not in before:
        return None
    if resume == "never":
        raise ValueError(f"output: {output} holds a run already; use resume: auto to go on with it, or another output")
    _refuse(output, _differences(before, record))
    return FINISHED if FINISHED in before else str(whole[-1])


def refuse_other_settings(output: Path, settings: Settings) -> None:
    """Raise where the output holds a run with other settings: before data are encoded for a run that will not be."""
    try:
        before = json.loads((output / "run.json").read_text())
    except (OSError, ValueError):
        return
    if FINISHED in before or whole_checkpoints(output / "checkpoints"):
        _refuse(output, _other_settings(before["settings"], _settings(settings)))


def _refuse(output: Path, differences: list[str]) -> None:
    if differences:
        raise ValueError(
            f"output: {output} holds another run:\n  "
            + "\n  ".join(differences)
            + "\nGive the same again to go on with it, or another output"
        )


def _differences(before: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """What makes two runs different ones, a line each."""
    lines = _other_settings(before["settings"], record["settings"])
    if before["model"] != record["model"]:
        lines.append("the model's config changed since")
    if before.get("weights", "") != record["weights"]:
        models = [run["settings"].get("model") for run in (before, record)]
        named = f": {models[0]} then, {models[1]} now" if models[0] != models[1] else ""
        lines.append(f"the weights beneath the adapters are others{named}; no checkpoint holds them")
    if before["data"] != record["data"]:
        changed = [source for source, content in record["sources"].items() if before["sources"].get(source) != content]
        named = f": {', '.join(changed)}" if changed else ""
        lines.append(f"the data, the tokenizer, the template, the versions or flexreason's code changed since{named}")
    if before["evaluation"] != record["evaluation"]:
        lines.append("the data to evaluate on changed since")
    for name in ("rows_per_step", "precision"):
        if before[name] != record[name]:
            lines.append(f"{name}: {before[name]} then, {record[name]} now")
    return lines


def _other_settings(before: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    return [
        f"{name}: {before.get(name)!r} then, {value!r} now"
        for name, value in settings.items()
        if name not in MAY_CHANGE and before.get(name) != value
    ]


def _settings(settings: Settings) -> dict[str, Any]:
    """Settings as they are written down: without what is secret."""
    values = dataclasses.asdict(settings)
    values["trainer"] = {k: "***" if k.endswith("_token") else value for k, value in values["trainer"].items()}
    return values


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


# --- which checkpoints are whole?


def seal(checkpoint: Path) -> None:
    """Declare a checkpoint whole, once all of it is on the disk."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and not path.name.startswith(SEAL))
    for path in files:
        _sync(path)
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
    write_whole(checkpoint / SEAL, json.dumps(sizes))
    _sync(checkpoint)


def is_whole(checkpoint: Path) -> bool:
    """Whether it was sealed, and nothing in it has gone or changed its size since."""
    try:
        sizes = json.loads((checkpoint / SEAL).read_text())
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def step_of(checkpoint: Path) -> int:
    """The step at which a checkpoint was written; -1 for a folder that is none."""
    match = CHECKPOINT.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def whole_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder that are whole, the latest last."""
    whole = [path for path in folder.glob("checkpoint-*") if step_of(path) >= 0 and is_whole(path)]
    return sorted(whole, key=step_of)


def remove_unfinished(folder: Path) -> None:
    """Remove the checkpoints that killed runs have left unfinished."""
    for path in folder.glob("checkpoint-*"):
        if step_of(path) >= 0 and not is_whole(path):
            shutil.rmtree(path, ignore_errors=True)


def what_is_left(settings: Settings) -> str:
    """What a run that was stopped has left behind, and what the same command does with it."""
    folder = Path(settings.output)
    try:
        refuse_other_settings(folder, settings)
        finished = FINISHED in json.loads((folder / "run.json").read_text())
    except OSError:
        finished = False
    except ValueError:
        return f"{folder} is as it was"
    if finished:
        return f"this run is finished; its model is in {folder / 'model'}"
    if whole := whole_checkpoints(folder / "checkpoints"):
        return f"the same command goes on from {whole[-1]}"
    encoded = any(folder.glob("data/*/prepared.json"))
    return f"no checkpoint is there yet, and the same command begins anew{', with the data encoded' if encoded else ''}"


def keep_latest(folder: Path, n: int | None, best: str | None = None) -> None:
    """Remove all whole checkpoints but the latest n and the best one, if that is known; None removes none.

    The seal goes first, so that a checkpoint half removed is not taken for a whole one.
    """
    for path in whole_checkpoints(folder)[:-n] if n else []:
        if best is not None and path.resolve() == Path(best).resolve():
            continue
        (path / SEAL).unlink()
        shutil.rmtree(path)
