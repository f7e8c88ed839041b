"""Checkpoints that are whole or are none.

A run may be killed while it writes one. So a checkpoint counts only once a last file stands in it, which lists the
others with their sizes and is written when all of them are on the disk. Older ones go after that, and the list first.
"""

import json
import os
import re
import shutil
from pathlib import Path

SEAL = "complete.json"
"""The last file of a checkpoint: {file: bytes}."""

NAME = re.compile(r"checkpoint-(\d+)")


def seal(folder: Path) -> None:
    """Declare a checkpoint whole, once all of it is on the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    for path in files:
        _sync(path)
    unfinished = folder / f"{SEAL}.unfinished"
    unfinished.write_text(json.dumps({str(path.relative_to(folder)): path.stat().st_size for path in files}))
    _sync(unfinished)
    unfinished.replace(folder / SEAL)
    _sync(folder)


def is_whole(folder: Path) -> bool:
    """Whether it was sealed, and nothing in it has gone or changed its size since."""
    try:
        sizes = json.loads((folder / SEAL).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def step_of(folder: Path) -> int:
    found = NAME.fullmatch(folder.name)
    return int(found[1]) if found else -1


def whole_ones(folder: Path) -> list[Path]:
    """The checkpoints in a folder that are whole, the latest last."""
    found = [path for path in folder.glob("checkpoint-*") if step_of(path) >= 0 and is_whole(path)]
    return sorted(found, key=step_of)


def remove_unfinished(folder: Path) -> None:
    """What runs that were killed have left."""
    for path in folder.glob("checkpoint-*"):
        if step_of(path) >= 0 and not is_whole(path):
            shutil.rmtree(path, ignore_errors=True)


def keep_latest(folder: Path, n: int | None, best: str | None = None) -> None:
    """Remove all whole checkpoints but the latest n, and the best one where that is known; with None, none."""
    for path in whole_ones(folder)[:-n] if n else []:
        if best is not None and path.resolve() == Path(best).resolve():
            continue
        (path / SEAL).unlink()
        shutil.rmtree(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
