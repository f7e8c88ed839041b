"""The data files of a folder, and which split each is of, as the Hub has it.

A file is of a split whose name is a word of its path (`train.jsonl`, `data/validation/a.jsonl`), or stands before its
number (`data/train_sft-00000-of-00003.parquet`). What is hidden is not looked at.

>>> split_of("data/dev-chats.jsonl"), split_of("train_sft-00000-of-00003.parquet"), split_of("latest.jsonl")
('validation', 'train_sft', None)
"""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any

from flexreason.data.formats import BadInput
from flexreason.talk.nearest import did_you_mean

LINES = (".jsonl", ".ndjson", ".jsonlines")

FILES = (*LINES, ".json", ".parquet")

PACKED = (".gz", ".zst", ".bz2", ".xz", ".zip")

NOT_READ = (".arrow", ".feather")

DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json")
"""Files that describe data sets and hold no data."""

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words that name a split, as `datasets` knows them."""

SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}

NUMBERED = re.compile(r"(\w+)-\d{5}-of-\d{5}\b")

DEFAULT_SPLIT = "train"


def split_of(path: str) -> str | None:
    """The split that a path inside a folder names; None if it names none."""
    numbered = NUMBERED.match(PurePath(path).name)
    if numbered and _words(numbered[1]):
        return SPLIT_OF.get(numbered[1], numbered[1])
    if len(found := _words(path)) > 1:
        raise BadInput(f"{path}: its path names several splits, {', '.join(found)}; rename it, or give it by itself")
    return next(iter(found), None)


def _words(path: str) -> list[str]:
    """The splits whose names are words of the path, each once."""
    words = re.split(r"[-._ 0-9/\\]+", path.lower())
    return list(dict.fromkeys(SPLIT_OF[word] for word in words if word in SPLIT_OF))


def files_of(folder: Path, split: str) -> list[Path]:
    """The data files of a split, or all of a folder whose files name no splits, for the default one."""
    try:
        files = sorted(visible_files(folder))
    except OSError as error:
        raise BadInput(f"{folder}: cannot be read: {error}; expected a folder that you may read") from error
    if packed := [file for file in files if file.suffix.lower() in PACKED]:
        raise BadInput(f"{packed[0]}: compressed files are not read; unpack it, or move it out of {folder}")
    if tables := [file for file in files if file.suffix.lower() in NOT_READ]:
        raise BadInput(f"{tables[0]}: files of this kind are not read; use .parquet, or move it out of {folder}")
    files = [file for file in files if file.suffix.lower() in FILES and file.name not in DESCRIPTIONS]
    if not files:
        raise BadInput(
            f"{folder}: no .jsonl, .json or .parquet file in it, and no data set saved by datasets; give another folder"
        )
    by_split: dict[str | None, list[Path]] = {}
    for file in files:
        by_split.setdefault(split_of(str(file.relative_to(folder))), []).append(file)
    nameless, wanted = by_split.pop(None, []), SPLIT_OF.get(split, split)
    if not by_split:
        if wanted != DEFAULT_SPLIT:
            raise BadInput(
                f"{folder}: no split {split!r} in it: its files name no splits; leave it out to read them all"
            )
        return nameless
    if nameless:
        named = next(iter(by_split.values()))[0]
        raise BadInput(
            f"{folder}: {named.name} names a split, and {nameless[0].name} names none; rename one of them, or give the "
            "files by themselves"
        )
    check_split(folder, split, by_split, wanted)
    return by_split[wanted]


def check_split(source: Path, split: str, splits: Iterable[Any], wanted: str | None = None) -> None:
    """Raise unless a split is among those that there are."""
    names = [str(name) for name in splits]
    if (wanted or split) not in names:
        raise BadInput(
            f"{source}: no split {split!r} in it; choose one of {', '.join(names)}{did_you_mean(split, names)}"
        )


def visible_files(folder: Path, seen: set[str] | None = None) -> Iterator[Path]:
    """All files below, without hidden ones, such as what notebooks and datasets keep for themselves. Links to folders
    are followed, each to a folder that was not seen yet."""
    seen = set() if seen is None else seen
    if (place := os.path.realpath(folder)) in seen:
        return
    seen.add(place)
    for path in sorted(folder.iterdir()):
        if path.name.startswith((".", "__")):
            continue
        if path.is_dir():
            yield from visible_files(path, seen)
        elif path.is_file() or path.is_symlink():  # to nothing, which is told when it is read
            yield path
