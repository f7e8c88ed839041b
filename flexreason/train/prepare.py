"""The data of a run, encoded once and kept on disk: what training reads, and what a later run finds again.

Everything that could change the outcome goes into one key: what stands in the files, the tokenizer with its template,
the options, the length of rows, the versions. The same key means the same documents, so nothing is encoded twice, and
a run that goes on knows whether its data are still those that it began with.
"""

import hashlib
import json
import os
import random
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from tqdm import tqdm

import flexreason
from flexreason.data import splitting
from flexreason.data.documents import Documents, write_documents
from flexreason.data.figures import Figures, figures_of
from flexreason.data.files import count_entries
from flexreason.data.intake import EntryEncoder, Intake, Item, Refusals
from flexreason.tree.layout import Layout

WAIT = 0.2
"""Seconds between looks for what another process prepares."""

AT_MOST = 900.0
"""Seconds until it must have begun."""


@dataclass(frozen=True)
class Prepared:
    """Documents on disk, and what is known of how they came about."""

    folder: Path
    key: str
    sources: dict[str, str]  # each with the hash of what stands in it
    conversations: int  # that were read
    documents: int
    formats: list[str]
    largest_id: int
    left_out: int  # samples longer than a row
    refusals: Refusals

    @property
    def documents_path(self) -> Path:
        return self.folder / "documents.arrow"

    def figures(self) -> Iterator[Figures]:
        """Of every conversation that was taken, in order."""
        with (self.folder / "figures.jsonl").open() as file:
            for line in file:
                yield Figures.from_dict(json.loads(line))


def prepare(
    sources: Iterable[str],
    encoder: EntryEncoder,
    folder: Path,
    *,
    length: int,
    split: str = "train",
    too_long: str = "refuse",
    skip_invalid: bool = False,
    workers: int = 0,
    rank: int = 0,
) -> Prepared:
    """Encode all sources into a folder of its own below `folder`, or find that this was done.

    Rank 0 does it, the others wait for what appears: that may take hours, and no barrier of a process group does.
    """
    hashes = {source: content_hash(source) for source in sources}
    key = key_of(hashes, encoder, length, split, too_long, skip_invalid)
    path, start = folder / key, time.monotonic()
    while not (path / "prepared.json").exists():
        if rank == 0:
            _encode(path, hashes, key, encoder, length, split, too_long, skip_invalid, workers)
        elif not path.exists() and time.monotonic() > start + AT_MOST:
            raise ValueError(f"output: no sign of the first process in {path}; all processes must share this folder")
        else:
            time.sleep(WAIT)
    found = json.loads((path / "prepared.json").read_text())
    return Prepared(**{**found, "folder": path, "refusals": Refusals(**found["refusals"])})


def _encode(
    path: Path,
    hashes: dict[str, str],
    key: str,
    encoder: EntryEncoder,
    length: int,
    split: str,
    too_long: str,
    skip_invalid: bool,
    workers: int,
) -> None:
    path.mkdir(parents=True, exist_ok=True)
    refusals, read, largest = Refusals(), 0, 0
    formats: list[str | None] = []
    long: list[list[Any]] = []  # where, turn, tokens, targets

    def documents(file: Any) -> Iterator[tuple[int, Layout]]:
        nonlocal read, largest
        number = 0
        for source in hashes:
            then = partial(_parts, length)
            intake = Intake(source, encoder, split=split, skip_invalid=skip_invalid, workers=workers, then=then)
            for figures, parts in tqdm(intake, f"encoding {source}", count_entries(source), disable=None, leave=False):
                long.extend([figures.where, *of_sample] for of_sample in figures.too_long)
                file.write(json.dumps(figures.as_dict()) + "\n")
                for part in parts:
                    largest = max(largest, int(part.input_ids.max()), int(part.target_ids.max()))
                    yield number, part
                number += 1
            read += intake.n_read
            refusals.merge(intake.refusals)
            formats.append(intake.format)

    with (path / "figures.jsonl").open("w") as file:
        n = write_documents(path / "documents.arrow", documents(file))
        file.flush()
        os.fsync(file.fileno())
    if long and too_long == "refuse":
        longest = max(tokens for _, _, tokens, _ in long)
        named = "".join(f"\n  {where}, turn {turn}: {tokens} tokens" for where, turn, tokens, _ in long[:5])
        raise ValueError(
            f"length: {len(long)} samples are longer than a row of {length}:{named}"
            + ("\n  ..." if len(long) > 5 else "")
            + f"\nUse length: {-(-longest // 128) * 128}, or too_long: drop to leave these samples out"
        )
    if not n:
        raise ValueError("data: nothing is left to train on; every sample is longer than a row")
    for source, before in hashes.items():
        if content_hash(source) != before:
            raise ValueError(f"{source}: has changed while it was read")
    found = Prepared(path, key, hashes, read, n, sorted(set(map(str, formats))), largest, len(long), refusals)
    unfinished = path / "prepared.json.unfinished"
    unfinished.write_text(json.dumps({**asdict(found), "folder": None}, indent=1))
    unfinished.replace(path / "prepared.json")


def _parts(length: int, item: Item) -> tuple[Figures, list[Layout]]:
    found = splitting.split(item.layout, length, too_long="drop")
    return figures_of(item, length, found), found.parts


def key_of(
    hashes: dict[str, str], encoder: EntryEncoder, length: int, split: str, too_long: str, skip_invalid: bool
) -> str:
    """What names the folder of encoded data."""
    said = {
        "sources": list(hashes.values()),
        "tokenizer": tokenizer_hash(encoder.tokenizer),
        "options": repr(sorted(encoder.options.items())),
        "format": encoder.format,
        "turns": encoder.turns,
        "split": split,
        "length": length,
        "too_long": too_long,
        "skip_invalid": skip_invalid,
        "versions": [flexreason.__version__, transformers.__version__],
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def content_hash(source: str) -> str:
    """Of a file, or of all files of a folder; a name on the Hub stands for itself."""
    path = Path(source)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    if not files:
        return f"name {source}"
    found = hashlib.sha256()
    for file in files:
        found.update(f"{file.relative_to(path)}\0".encode())
        with file.open("rb") as opened:
            found.update(hashlib.file_digest(opened, "sha256").digest())
    return found.hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """Of all that decides which ids a text gets, and of the template."""
    if tokenizer is None:
        return "none"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    said = [
        backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items())),
        str(tokenizer.chat_template),
        json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str),
    ]
    return hashlib.sha256("\0".join(said).encode()).hexdigest()


class Some(Sequence[Layout]):
    """Some of the documents of a file."""

    def __init__(self, documents: Documents, numbers: array) -> None:
        self.all, self.numbers = documents, numbers
        self.sizes = array("i", (documents.sizes[number] for number in numbers))

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: Any) -> Any:
        return self.all[self.numbers[number]]

    def conversation(self, number: int) -> int:
        return self.all.conversation(self.numbers[number])


def choose_for_evaluation(documents: Documents, share: float, seed: int) -> tuple[Some, Some]:
    """Documents to train on, and to evaluate on: conversations go to one or the other whole, each by a draw of its
    own, so that appending some changes nothing for the others."""
    chosen: tuple[array, array] = (array("q"), array("q"))
    for number in range(len(documents)):
        draw = random.Random(f"{seed} {documents.conversation(number)}").random()
        chosen[draw < share].append(number)
    if not all(chosen):
        raise ValueError(
            f"evaluation: a share of {share} of the conversations leaves nothing to train or to evaluate on"
        )
    return Some(documents, chosen[0]), Some(documents, chosen[1])
