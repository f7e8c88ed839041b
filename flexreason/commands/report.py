"""What to know of data before training on it: how much there is, what one pass saves, how full rows are, and every
conversation that is refused. Goes over everything, and keeps none of it.

    flexreason report --data chats.jsonl --tokenizer ./tokenizer
    flexreason report --data chats.jsonl --data more.parquet --tokenizer ./tokenizer --model ./config.json --json
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flexreason.data import options as of_data
from flexreason.data.figures import Figures, Shape, figures_of, shape_of
from flexreason.data.files import EmptySource, count_entries, place_of, read_all
from flexreason.data.formats import BadInput, Conversation
from flexreason.data.intake import EntryEncoder, Intake, Refusal, Refusals, Refused, start_workers
from flexreason.data.summary import Summary
from flexreason.load import load_tokenizer
from flexreason.show.page import write
from flexreason.show.report import report_page
from flexreason.talk.telling import stage
from flexreason.tree.blocks import BLOCK

__all__ = ["DataReport", "Figures", "Source", "Summary", "figures_of", "report"]


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


# --- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    files = parser.add_argument("data", nargs="+", action="extend", metavar="FILE", help="the same as --data FILE")
    files.required = False  # nargs="*" would not take files that stand behind options
    of_data.add_arguments(parser, limit="the most to read of each FILE; all if not given", tokenizer=of_data.NEEDED)
    parser.add_argument("--model", help="name, folder or config.json whose shapes the work is counted for")
    parser.add_argument("--length", type=int, default=16384, help="of a row (default: %(default)s)")
    parser.add_argument("--turns", choices=("last",), help="train on the last turn only")
    parser.add_argument("--workers", type=int, default=0, help="processes that encode; changes nothing but the time")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--refused", type=Path, metavar="FILE", help="write every refusal there, as a line of JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write it as one page with plots, for a browser")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it too; needs flexreason[plot]")


def run(options: argparse.Namespace) -> int:
    _check(options)
    if options.plot is not None:
        from flexreason.data.plot import check_name, plot  # tells what is missing before the work, not after

        check_name(options.plot)
    shape = None if options.model is None else shape_of(options.model)
    tokenizer, notes = (None, []) if options.tokenizer is None else load_tokenizer(options.tokenizer)
    encoder = of_data.encoder_of(options, tokenizer, turns=options.turns)
    with _refusals_to(options.refused) as on_refused:
        data_report = report(
            options.data,
            encoder,
            options.length,
            shape=shape,
            split=options.split or of_data.SPLIT,
            workers=options.workers,
            limit=options.limit,
            on_refused=on_refused,
        )
    left = data_report.summary.conversations
    wrong = data_report.refusals.total or data_report.empty or data_report.broken
    ok = bool(left) and (options.skip_invalid or not wrong)
    if options.html is not None:
        write(options.html, report_page(_as_dict(data_report, options, notes, ok)))
    if options.plot is not None and left:
        plot(data_report.summary, options.plot)
    if options.json:
        print(json.dumps(_as_dict(data_report, options, notes, ok), ensure_ascii=False))
    else:
        print("\n".join(_words(data_report, options, [_about(options, tokenizer), *notes])))
    return 0 if ok else 1


def _check(options: argparse.Namespace) -> None:
    if not options.data:
        raise ValueError("--data: expected at least one FILE; flexreason report FILE is the same")
    options.history = options.history or of_data.HISTORY
    if options.length < 1 or options.length % BLOCK:
        near = max(1, -(-options.length // BLOCK)) * BLOCK
        raise ValueError(f"--length: expected a multiple of {BLOCK}, found {options.length}; try {near}")
    of_data.check(options)
    if options.workers < 0:
        raise ValueError(f"--workers: expected 0 or more, found {options.workers}")
    of_data.check_outputs(options, ("plot", "html", "refused"))


@contextmanager
def _refusals_to(path: Path | None) -> Iterator[Callable[[Refusal], None] | None]:
    """Writes each refusal to a file as it comes: there may be more of them than memory holds."""
    if path is None:
        yield None
        return
    with path.open("w", encoding="utf-8") as file:

        def write_line(refusal: Refusal) -> None:
            source, kind, number = place_of(refusal.where)
            line = {"source": source, "line": None, kind or "line": number, "message": refusal.message}
            line |= {"reason": refusal.reason, "words": refusal.words}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

        yield write_line


def _as_dict(data_report: DataReport, options: argparse.Namespace, notes: list[str], ok: bool) -> dict[str, Any]:
    refusals = data_report.refusals
    return {
        "ok": ok,
        "tokenizer": options.tokenizer,
        "notes": notes,
        "history": options.history,
        "turns": options.turns or "all",
        "options": of_data.template_options(options.option or ()),
        "accept": options.accept or [],
        "sources": [
            {
                "source": source.name,
                "format": source.format,
                "read": source.n_read,
                "refused": source.refusals.total,
                **source.summary.as_dict(),
            }
            for source in data_report.sources
        ],
        "read": data_report.n_read,
        "empty": data_report.empty,
        "refused": {
            "number": refusals.total,
            "classes": {
                reason: {"number": n, "examples": refusals.examples[reason]} for reason, n in refusals.counts.items()
            },
            "dirty": data_report.dirty,
            "files": [str(error) for error in data_report.broken],
        },
        "all": data_report.summary.as_dict(),
        "seconds": data_report.seconds,
    }


def _about(options: argparse.Namespace, tokenizer: Any) -> str:
    """What the data were encoded with."""
    if tokenizer is None:
        return "no tokenizer: the data is tokenized"
    template = of_data.template_options(options.option or ())
    template_words = ", ".join(f"{name}={value!r}" for name, value in template.items()) or "none"
    history = {"template": "as the template shows it", "content": "without reasoning, as plain clients send it"}
    turns = "the last turn only" if options.turns else "all turns"
    turns += f", accepted: {', '.join(options.accept)}" if options.accept else ""
    return (
        f"tokenizer {options.tokenizer} ({type(tokenizer).__name__}, {len(tokenizer):,} tokens)\n"
        f"history {history[options.history]}, template options: {template_words}, {turns}"
    )


def _words(data_report: DataReport, options: argparse.Namespace, notes: list[str]) -> Iterator[str]:
    how = "as told" if options.format else "detected"
    for source in data_report.sources:
        if not source.n_read:
            yield from map(str, source.passed or (f"{source.name}: nothing in it",))
            continue
        refused = f", {source.refusals.total:,} refused" if source.refusals.total else ""
        line = f"{source.name}: {source.format} ({how}), {source.n_read:,} read{refused}"
        if len(data_report.sources) > 1 and source.summary.conversations:
            tokens = source.summary.in_samples.tokens, source.summary.in_trees.tokens
            line += f"; tokens {tokens[0]:,} in samples, {tokens[1]:,} in trees, {source.summary.ratio:.2f} to 1"
        yield line
        yield from (f"  went on past {error}" for error in source.passed)
    yield from notes
    yield ""
    if data_report.summary.conversations:
        yield str(data_report.summary)
        yield ""
    if data_report.refusals.total:
        yield f"{data_report.refusals.total:,} of {data_report.n_read:,} conversations refused:"
        yield from data_report.refusals.lines()
    else:
        yield "No conversation is refused."
    for kind, counts in data_report.dirty.items():
        words = " and ".join(f"{n:,} {what}" for what, n in counts.items() if n)
        yield f"Dirty answers, {kind}: {words} (docs/templates.md#dirty-answers)."
    if data_report.broken:
        yield f"Not read, or not to the end: {len(data_report.broken):,} files, named above."
    if data_report.empty:
        yield f"{len(data_report.empty):,} of {len(data_report.sources):,} sources have nothing in them."
    if options.limit is not None:
        yield f"Of each source no more was read than --limit {options.limit} says."
    seconds, rendering = data_report.summary.seconds, data_report.summary.render_seconds
    yield (
        f"{data_report.seconds:.1f} s; encoding took {seconds:.1f} s, of which the template {rendering:.1f} s"
        f"{f', in {options.workers} processes' if options.workers else ''}"
    )
