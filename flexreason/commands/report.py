"""What to know of data before training on it: how much there is, what one pass saves, how full rows are, and every
conversation that is refused. Goes over everything, and keeps none of it.

    flexreason report --data chats.jsonl --tokenizer ./tokenizer
    flexreason report --data chats.jsonl --data more.parquet --tokenizer ./tokenizer --model ./config.json --json
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexreason.data import options as of_data
from flexreason.data.figures import shape_of
from flexreason.data.files import place_of
from flexreason.data.intake import Refusal
from flexreason.data.report import DataReport, report
from flexreason.load import load_tokenizer
from flexreason.show.page import write
from flexreason.show.report import report_page
from flexreason.tree.blocks import BLOCK


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
