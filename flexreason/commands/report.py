"""What to know of data before training on it: how much there is, what one pass saves, how full rows are, and every
conversation that is refused. Goes over everything, and keeps none of it.

    flexreason report chats.jsonl --tokenizer ./tokenizer
    flexreason report chats.jsonl more.parquet --tokenizer ./tokenizer --model ./config.json --length 32768 --json
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flexreason.chat import dirt
from flexreason.chat.encode import HISTORIES
from flexreason.data.excerpt import template_options
from flexreason.data.figures import Figures, figures_of
from flexreason.data.files import FORMATS, BadInput, Conversation, EmptySource, count_entries, read_all
from flexreason.data.intake import EntryEncoder, Intake, Refusals, Refused, start_workers
from flexreason.data.summary import Summary
from flexreason.data.work import Shape, shape_of
from flexreason.load import load_tokenizer
from flexreason.tree.blocks import BLOCK

__all__ = ["Figures", "Report", "Source", "Summary", "figures_of", "report"]


@dataclass
class Source:
    """One of the sources of a report."""

    name: str
    summary: Summary
    intake: Intake

    @property
    def format(self) -> str:
        return self.intake.format or "of no known kind"

    @property
    def n_read(self) -> int:
        return self.intake.n_read

    @property
    def refusals(self) -> Refusals:
        return self.intake.refusals


@dataclass
class Report:
    """What was found in all sources together, and in each."""

    summary: Summary
    sources: list[Source]
    refusals: Refusals
    seconds: float = 0.0

    @property
    def empty(self) -> list[str]:
        """The sources that nothing was in."""
        return [source.name for source in self.sources if not source.n_read]

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
) -> Report:
    """Go over all sources. Refused conversations, and sources without any, are counted and stop nothing. Raises where
    all are empty."""
    start, sources = time.perf_counter(), list(sources)
    made = Report(Summary(length, shape), [], Refusals())
    for source in sources:
        _look_at(source, encoder, split)
    then = partial(figures_of, length=length)
    pool = start_workers(workers, encoder, then) if workers else None
    with pool or nullcontext(), _progress(sources, limit) as bar:
        for source in sources:
            intake = Intake(
                source, encoder, split=split, skip_invalid=True, limit=limit, workers=workers, then=then, pool=pool
            )
            name = str(source) if isinstance(source, str | Path) else "entries"
            found = Source(name, Summary(length, shape), intake)
            seen = 0
            for figures in _all_of(intake):
                made.summary.add(figures)
                found.summary.add(figures)
                bar.update(intake.n_read - seen)
                seen = intake.n_read
            made.sources.append(found)
            made.refusals.merge(intake.refusals)
    if sources and not made.n_read:
        raise EmptySource(f"{', '.join(source.name for source in made.sources)}: nothing in it")
    made.seconds = time.perf_counter() - start
    return made


def _all_of(intake: Intake) -> Iterator[Figures]:
    try:
        yield from intake
    except (Refused, EmptySource):  # refused are all of them; the refusals say so
        return


def _look_at(source: Any, encoder: EntryEncoder, split: str) -> None:
    """Raises where there is nothing to read, or no tokenizer for it: before all the rest, not after an hour."""
    if not isinstance(source, str | Path) and iter(source) is source:
        return  # what is looked at would be gone
    entries = read_all(source, encoder.format, split)
    first = None
    with suppress(EmptySource):
        first = next((found for found in entries if isinstance(found, Conversation)), None)
    if encoder.tokenizer is None and first is not None and first.format != "samples":
        raise BadInput(f"{source}: of the kind {first.format}; --tokenizer is needed to encode it")


def _progress(sources: list[Any], limit: int | None) -> Any:
    """A bar on a terminal's stderr."""
    from tqdm import tqdm

    counts = [count_entries(source) for source in sources]
    known = [count for count in counts if count is not None]
    total = sum(min(count, limit or count) for count in known) if len(known) == len(counts) else None
    return tqdm(total=total, unit=" conversations", disable=None, leave=False, file=sys.stderr)


# --- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("data", nargs="+", metavar="DATA", help="JSONL, JSON, Parquet, a folder, a data set's name")
    parser.add_argument("--tokenizer", help="folder, file or name; not needed for data that is tokenized")
    parser.add_argument("--model", help="name, folder or config.json whose shapes the work is counted for")
    parser.add_argument("--length", type=int, default=16384, help="of a row (default: %(default)s)")
    parser.add_argument("--format", choices=FORMATS, help="of the data, where it is not to be detected")
    parser.add_argument("--split", default="train", help="of a data set (default: %(default)s)")
    parser.add_argument("--history", choices=HISTORIES, default="template", help="what clients send back")
    parser.add_argument("--turns", choices=("last",), help="train on the last turn only")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the template")
    dirt.add_argument(parser)
    parser.add_argument("--workers", type=int, default=0, help="processes that encode; changes nothing but the time")
    parser.add_argument("--limit", type=int, help="the most conversations to read of each DATA")
    parser.add_argument("--skip-invalid", action="store_true", help="refused conversations are no failure")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it too; needs flexreason[plot]")


def run(options: argparse.Namespace) -> int:
    _check(options)
    if options.plot is not None:
        from flexreason.data.plot import plot  # tells what is missing before the work, not after
    shape = None if options.model is None else shape_of(options.model)
    tokenizer, notes = (None, []) if options.tokenizer is None else load_tokenizer(options.tokenizer)
    chosen = template_options(options.option)
    asked = {"turns": options.turns, "history": options.history, "accept": options.accept or ()}
    encoder = EntryEncoder(tokenizer, format=options.format, **asked, **chosen)
    made = report(
        options.data,
        encoder,
        options.length,
        shape=shape,
        split=options.split,
        workers=options.workers,
        limit=options.limit,
    )
    left = made.summary.conversations
    ok = bool(left) and (options.skip_invalid or not (made.refusals.total or made.empty))
    if options.plot is not None and left:
        plot(made.summary, options.plot)
    if options.json:
        print(json.dumps(_as_dict(made, options, chosen, notes, ok), ensure_ascii=False))
    else:
        print("\n".join(_words(made, options, [_about(options, tokenizer, chosen), *notes])))
    return 0 if ok else 1


def _check(options: argparse.Namespace) -> None:
    if options.length < 1 or options.length % BLOCK:
        near = max(1, -(-options.length // BLOCK)) * BLOCK
        raise ValueError(f"--length: expected a multiple of {BLOCK}, found {options.length}; try {near}")
    for name, least in (("workers", 0), ("limit", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name}: expected {least} or more, found {value}")
    if options.plot is not None and not options.plot.parent.is_dir():
        raise ValueError(f"--plot: there is no folder {options.plot.parent}")


def _as_dict(
    made: Report, options: argparse.Namespace, chosen: dict[str, Any], notes: list[str], ok: bool
) -> dict[str, Any]:
    refusals = made.refusals
    return {
        "ok": ok,
        "tokenizer": options.tokenizer,
        "notes": notes,
        "history": options.history,
        "turns": options.turns or "all",
        "options": chosen,
        "accept": options.accept or [],
        "sources": [
            {
                "source": source.name,
                "format": source.format,
                "read": source.n_read,
                "refused": source.refusals.total,
                **source.summary.as_dict(),
            }
            for source in made.sources
        ],
        "read": made.n_read,
        "empty": made.empty,
        "refused": {
            "number": refusals.total,
            "classes": {
                reason: {"number": n, "examples": refusals.examples[reason]} for reason, n in refusals.counts.items()
            },
        },
        "all": made.summary.as_dict(),
        "seconds": made.seconds,
    }


def _about(options: argparse.Namespace, tokenizer: Any, chosen: dict[str, Any]) -> str:
    if tokenizer is None:
        return "no tokenizer: the data is tokenized"
    said = ", ".join(f"{name}={value!r}" for name, value in chosen.items()) or "none"
    history = {"template": "as the template shows it", "content": "without reasoning, as plain clients send it"}
    turns = "the last turn only" if options.turns else "all turns"
    turns += f", accepted: {', '.join(options.accept)}" if options.accept else ""
    return (
        f"tokenizer {options.tokenizer} ({type(tokenizer).__name__}, {len(tokenizer):,} tokens)\n"
        f"history {history[options.history]}, template options: {said}, {turns}"
    )


def _words(made: Report, options: argparse.Namespace, notes: list[str]) -> Iterator[str]:
    how = "as told" if options.format else "detected"
    for source in made.sources:
        if not source.n_read:
            yield f"{source.name}: nothing in it"
            continue
        refused = f", {source.refusals.total:,} refused" if source.refusals.total else ""
        line = f"{source.name}: {source.format} ({how}), {source.n_read:,} read{refused}"
        if len(made.sources) > 1 and source.summary.conversations:
            tokens = source.summary.in_samples.tokens, source.summary.in_trees.tokens
            line += f"; tokens {tokens[0]:,} in samples, {tokens[1]:,} in trees, {source.summary.ratio:.2f} to 1"
        yield line
    yield from notes
    yield ""
    if made.summary.conversations:
        yield str(made.summary)
        yield ""
    if made.refusals.total:
        yield f"{made.refusals.total:,} of {made.n_read:,} conversations refused:"
        yield from made.refusals.lines()
    else:
        yield "No conversation is refused."
    if made.empty:
        yield f"{len(made.empty):,} of {len(made.sources):,} sources have nothing in them."
    if options.limit is not None:
        yield f"Of each source no more was read than --limit {options.limit} says."
    seconds, rendering = made.summary.seconds, made.summary.render_seconds
    yield (
        f"{made.seconds:.1f} s; encoding took {seconds:.1f} s, of which the template {rendering:.1f} s"
        f"{f', in {options.workers} processes' if options.workers else ''}"
    )
