"""What is in data: how much there is, what one pass saves, how full rows are, and every conversation that is refused.
It goes over everything, and keeps none of it.
"""

import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flexreason.data.figures import Shape, figures_of
from flexreason.data.files import EmptySource, count_entries, read_all
from flexreason.data.formats import BadInput, Conversation
from flexreason.data.intake import EntryEncoder, Intake, Refusal, Refusals, Refused, start_workers
from flexreason.data.summary import Summary
from flexreason.talk.telling import stage


@dataclass
class Source:
    """What was found in one source."""

    name: str
    format: str
    n_read: int
    refusals: Refusals
    summary: Summary
    passed: list[BadInput]  # files in it that cannot be read on, or in which nothing is, and why


@dataclass
class DataReport:
    """What was found in all sources together, and in each."""

    summary: Summary
    sources: list[Source]
    refusals: Refusals
    seconds: float

    @property
    def empty(self) -> list[str]:
        """The sources that nothing was in."""
        return [source.name for source in self.sources if not source.n_read]

    @property
    def broken(self) -> list[BadInput]:
        """Why files cannot be read, or not to their end."""
        return [error for source in self.sources for error in source.passed if not isinstance(error, EmptySource)]

    @property
    def dirty(self) -> dict[str, dict[str, int]]:
        """Answers of each kind of dirt: in conversations that are refused, and trained all the same."""
        kinds = sorted({*self.refusals.dirty, *self.summary.dirty})
        return {
            kind: {"refused": self.refusals.dirty.get(kind, 0), "accepted": self.summary.dirty[kind]} for kind in kinds
        }

    @property
    def n_read(self) -> int:
        return sum(source.n_read for source in self.sources)


def report(
    sources: Iterable[Any],
    encoder: EntryEncoder,
    length: int,
    *,
    shape: Shape | None = None,
    split: str = "train",
    workers: int = 0,
    limit: int | None = None,
    on_refused: Callable[[Refusal], None] | None = None,
) -> DataReport:
    """Go over all sources. Refused conversations, sources without any and files that cannot be read are counted and
    stop nothing. Raises where nothing can be read.

    Args:
        sources: Files, folders, data sets' names, or entries at hand.
        encoder: What makes layouts of conversations.
        length: Tokens of a row.
        shape: The model whose work is counted; without it some usual sizes.
        split: Of data sets.
        workers: Processes that encode.
        limit: The most conversations to read of each source.
        on_refused: Told of every conversation that is refused.
    """
    start, sources = time.perf_counter(), list(sources)
    for source in sources:
        _look_at(source, encoder, split)
    all_of_them, by_source = Summary(length, shape), []
    then = partial(figures_of, length=length)
    pool = start_workers(workers, encoder, then) if workers else None
    with pool or nullcontext(), _progress(sources, limit) as going:
        for source in sources:
            passed: list[BadInput] = []
            intake = Intake(
                source,
                encoder,
                split=split,
                skip_invalid=True,
                limit=limit,
                workers=workers,
                then=then,
                pool=pool,
                on_refused=on_refused,
                on_broken=passed.append,
            )
            summary, n_shown = Summary(length, shape), 0
            with suppress(Refused, EmptySource):  # refused are all of them; the refusals say so
                for figures in intake:
                    all_of_them.add(figures)
                    summary.add(figures)
                    going.add(intake.n_read - n_shown)
                    n_shown = intake.n_read
            name = str(source) if isinstance(source, str | Path) else "entries"
            form = intake.format or "of no known kind"
            by_source.append(Source(name, form, intake.n_read, intake.refusals, summary, passed))
    refusals = Refusals.together(source.refusals for source in by_source)
    data_report = DataReport(all_of_them, by_source, refusals, time.perf_counter() - start)
    for error in data_report.broken:
        if not data_report.n_read:
            raise error
    if sources and not data_report.n_read:
        raise EmptySource(f"{', '.join(data_report.empty)}: nothing in it; expected at least one conversation")
    return data_report


def _look_at(source: Any, encoder: EntryEncoder, split: str) -> None:
    """Raise where there is nothing to read, or no tokenizer for it: before all the rest, not after an hour."""
    if not isinstance(source, str | Path) and iter(source) is source:
        return  # what is looked at would be gone
    entries = read_all(source, encoder.format, split, on_broken=lambda error: None)  # it will be told
    first = None
    with suppress(EmptySource):
        first = next((entry for entry in entries if isinstance(entry, Conversation)), None)
    if encoder.tokenizer is None and first is not None and first.format != "samples":
        raise BadInput(f"{source}: of the kind {first.format}; --tokenizer is needed to encode it")


def _progress(sources: list[Any], limit: int | None) -> Any:
    counts = [count_entries(source) for source in sources]
    known = [count for count in counts if count is not None]
    total = sum(min(count, limit or count) for count in known) if len(known) == len(counts) else None
    return stage("encoding", total, "conversations")
