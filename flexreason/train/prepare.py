"""The data of a run, encoded once and kept on disk: what training reads, and what a later run finds again.

Everything that could change a document goes into one key (`record.key_of`), which names the folder. So nothing is
encoded twice, and a run that goes on knows whether its data are still those that it began with.
"""

import json
import os
import random
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flexreason.data import splitting
from flexreason.data.documents import Documents, write_documents
from flexreason.data.figures import Figures, figures_of
from flexreason.data.files import count_entries
from flexreason.data.intake import EntryEncoder, Intake, Item, Refusals
from flexreason.talk.telling import each, stage
from flexreason.train.record import content_hash, key_of, write_whole
from flexreason.tree.layout import Layout

WAIT = 0.2
"""Seconds between looks for what another process prepares."""

AT_MOST = 900.0
"""Seconds until that process must have begun."""


@dataclass(frozen=True)
class Prepared:
    """Documents on disk, and what is known of how they came about."""

    folder: Path
    key: str
    sources: dict[str, str]  # each with the hash of its content
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
        """The figures of every conversation that was taken, in order."""
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
    """Encode all sources into a folder of their own below `folder`, or find that this was done.

    Rank 0 encodes. The others wait until the last file appears: that may take hours, and no barrier of a process group
    waits for so long.
    """
    with stage("reading the data for their hash"):
        hashes = {source: content_hash(source) for source in sources}
    how: dict[str, Any] = {"split": split, "length": length, "too_long": too_long, "skip_invalid": skip_invalid}
    key = key_of(hashes, encoder, how)
    path, start = folder / key, time.monotonic()
    while not (path / "prepared.json").exists():
        if rank == 0:
            _encode(path, hashes, encoder, workers, **how)
        elif not path.exists() and time.monotonic() > start + AT_MOST:
            raise ValueError(
                f"output: no sign of the first process in {path}; all processes must share this folder; give "
                "one that they do"
            )
        else:
            time.sleep(WAIT)
    prepared = json.loads((path / "prepared.json").read_text())
    return Prepared(**{**prepared, "folder": path, "refusals": Refusals(**prepared["refusals"])})


def _encode(
    path: Path,
    hashes: Mapping[str, str],
    encoder: EntryEncoder,
    workers: int,
    *,
    length: int,
    split: str,
    too_long: str,
    skip_invalid: bool,
) -> None:
    """Write the documents and the figures, and last `prepared.json`, which declares them whole."""
    path.mkdir(parents=True, exist_ok=True)
    intakes: list[Intake] = []
    long: list[list[Any]] = []  # where, turn, tokens, targets
    largest = 0

    def documents(figures_file: Any) -> Iterator[tuple[int, Layout]]:
        nonlocal largest
        number = 0
        for source in hashes:
            then = partial(_parts, length)
            intake = Intake(source, encoder, split=split, skip_invalid=skip_invalid, workers=workers, then=then)
            intakes.append(intake)
            for figures, parts in each(intake, f"encoding {source}", count_entries(source), "conversations"):
                long.extend([figures.where, *sample] for sample in figures.too_long)
                figures_file.write(json.dumps(figures.as_dict()) + "\n")
                for part in parts:
                    largest = max(largest, int(part.input_ids.max()), int(part.target_ids.max()))
                    yield number, part
                number += 1

    with (path / "figures.jsonl").open("w") as file:
        n_documents = write_documents(path / "documents.arrow", documents(file))
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
    if not n_documents:
        raise ValueError("data: nothing is left to train on; every sample is longer than a row; use a larger length")
    for source, before in hashes.items():
        if content_hash(source) != before:
            raise ValueError(f"{source}: has changed while it was read; start again")
    prepared = Prepared(
        folder=path,
        key=path.name,
        sources=dict(hashes),
        conversations=sum(intake.n_read for intake in intakes),
        documents=n_documents,
        formats=sorted({str(intake.format) for intake in intakes}),
        largest_id=largest,
        left_out=len(long),
        refusals=Refusals.together(intake.refusals for intake in intakes),
    )
    write_whole(path / "prepared.json", json.dumps({**asdict(prepared), "folder": None}, indent=1))


def _parts(length: int, item: Item) -> tuple[Figures, list[Layout]]:
    """The figures of a conversation, and its layout in parts that fit a row."""
    parts = splitting.split(item.layout, length, too_long="drop")
    return figures_of(item, length, parts), parts.parts


class Subset(Sequence[Layout]):
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


def choose_for_evaluation(documents: Documents, share: float, seed: int) -> tuple[Subset, Subset]:
    """Documents to train on, and documents to evaluate on.

    A conversation goes to one or the other as a whole, by a draw of its own. So appending conversations to the data
    changes nothing for the others.
    """
    train, evaluation = array("q"), array("q")
    for number in range(len(documents)):
        draw = random.Random(f"{seed} {documents.conversation(number)}").random()
        (evaluation if draw < share else train).append(number)
    if not train or not evaluation:
        raise ValueError(
            f"evaluation: a share of {share} of the conversations leaves nothing to train or to evaluate on; "
            "choose another, or give data of their own"
        )
    return Subset(documents, train), Subset(documents, evaluation)
