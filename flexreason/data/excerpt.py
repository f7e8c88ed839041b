"""Some conversations of a data set, from all over it, as samples: for commands that need not look at all of them."""

import argparse
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from flexreason.chat import dirt
from flexreason.chat.encode import HISTORIES
from flexreason.chat.render import ConversationError
from flexreason.data.files import FORMATS, BadInput, Conversation, read_all
from flexreason.data.intake import OURS, EntryEncoder, Refusals, Refused
from flexreason.load import load_tokenizer, option_of
from flexreason.tree.sample import Sample

READ = 2000
"""Conversations that are read, unless --limit says otherwise."""

LOOKED_AT = 32
"""The most of them that are encoded."""

OF_DATA = ("tokenizer", "format", "split", "history", "option", "accept", "skip_invalid", "limit")

T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("--data", help="conversations: a .jsonl, .json or .parquet file, a folder, a name on the Hub")
    data.add_argument("--tokenizer", help="a folder, a file or a name; the model's own if not given")
    data.add_argument("--format", choices=FORMATS, help="of the conversations; that of the first if not given")
    data.add_argument("--split", help="of a data set; train if not given")
    data.add_argument("--history", choices=HISTORIES, help="what clients send back; template if not given")
    data.add_argument("--option", action="append", metavar="NAME=VALUE", help="of the template")
    dirt.add_argument(data)
    data.add_argument("--skip-invalid", action="store_true", help="go on without conversations that are refused")
    data.add_argument("--limit", type=int, help=f"the most conversations to read; {READ} if not given")


def check(options: argparse.Namespace) -> None:
    """What can be said of the arguments before anything is read."""
    if options.data is None and (given := [name for name in OF_DATA if getattr(options, name)]):
        raise ValueError(f"--{given[0].replace('_', '-')} is about data; give --data too")
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit: expected at least 1, found {options.limit}")


def conversations(options: argparse.Namespace, vocabulary: int) -> tuple[list[str], list[list[Sample]], list[str]]:
    """Where some conversations of the data stand, spread over all that is read; their samples, as `fr.encode` makes
    them; and what should be known of it.

    A refusal ends it, once all others have been looked at; or it is left out, and listed.
    """
    template = template_options(options.option or ())
    refusals, n_read = Refusals(), 0

    def readable() -> Iterator[Conversation]:
        nonlocal n_read
        read = read_all(options.data, options.format, options.split or "train")
        for one in itertools.islice(read, options.limit or READ):
            n_read += 1
            if isinstance(one, BadInput):
                refusals.add(one.reason, str(one))
            else:
                yield one

    kept = spread(readable(), LOOKED_AT)
    n_looked_at = len(kept) + refusals.total
    whole = "" if n_read < (options.limit or READ) else "the first "
    notes = [f"looked at {n_looked_at} of {whole}{n_read} conversations of {options.data}"]
    tokenizer = None
    if any(one.samples is None for one in kept):
        tokenizer, more = load_tokenizer(options.tokenizer) if options.tokenizer else _own_tokenizer(options.model)
        notes += more
    chosen: dict[str, Any] = {"history": options.history or HISTORIES[0], "accept": options.accept or ()}
    encoder = EntryEncoder(tokenizer, **chosen, **template)
    wheres, found = [], []
    for one in kept:
        try:
            samples = encoder.encoded(one).samples
        except ConversationError as error:
            refusals.add(error.reason, f"{one.where}: {error}")
            continue
        _check_ids(samples, vocabulary, one.where)
        wheres.append(one.where)
        found.append(samples)
    if refusals.total and not (options.skip_invalid and found):
        raise Refused(refusals, n_looked_at)
    for reason, examples in refusals.examples.items():
        notes.append(f"left out, {refusals.counts[reason]} ({reason}): {'; '.join(examples)}")
    return wheres, found, notes


def template_options(given: Iterable[str]) -> dict[str, Any]:
    """Options of the template, of texts such as "enable_thinking=false"."""
    found = dict(map(option_of, given))
    if own := found.keys() & OURS:
        raise ValueError(f"--option {min(own)}: expected an option of the template")
    return found


def spread(items: Iterable[T], most: int) -> list[T]:
    """As many as half of `most` to `most`, evenly spread, of items whose number nobody knows; the first among them."""
    kept: list[T] = []
    step = 1
    for number, item in enumerate(items):
        if number % step == 0:
            kept.append(item)
        if len(kept) > most:
            del kept[1::2]
            step *= 2
    return kept


def _own_tokenizer(model: str) -> tuple[Any, list[str]]:
    """That of the model, which for a config.json is what lies beside it."""
    try:
        return load_tokenizer(str(Path(model).parent) if Path(model).is_file() else model)
    except ValueError as error:
        raise ValueError(f"{error}; --tokenizer takes another") from error


def _check_ids(samples: list[Sample], vocabulary: int, where: str) -> None:
    for number, sample in enumerate(samples):
        for name, ids in (("prompt_ids", sample.prompt_ids), ("target_ids", sample.target_ids)):
            if not 0 <= min(ids) <= max(ids) < vocabulary:
                raise ValueError(
                    f"{where}: {name} of sample {number} from {min(ids)} to {max(ids)}, and the model's vocabulary has "
                    f"{vocabulary}: made with another tokenizer? (--tokenizer)"
                )
