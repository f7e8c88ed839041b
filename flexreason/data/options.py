"""The options of commands that read data, the same in all of them; and the conversations that these name."""

import argparse
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from flexreason.chat import dirt
from flexreason.chat.encode import HISTORIES
from flexreason.chat.errors import ConversationError
from flexreason.data.files import DATA, read_all
from flexreason.data.folders import DEFAULT_SPLIT, FILES
from flexreason.data.formats import FORMATS, BadInput, Conversation
from flexreason.data.intake import OURS, EntryEncoder, Refusals, Refused
from flexreason.load import load_tokenizer, option_of
from flexreason.talk.telling import each, stage
from flexreason.tree.sample import Sample

READ = 2000
"""Conversations that are read of each source where some are enough, unless --limit says otherwise."""

ENCODED = 32
"""The most of them that are encoded."""

SPLIT, HISTORY = DEFAULT_SPLIT, HISTORIES[0]

OF_SOURCE = ("format", "split")

OF_DATA = ("tokenizer", *OF_SOURCE, "history", "option", "accept", "skip_invalid", "limit")
"""Options that say nothing without --data."""

NEEDED = "needed, unless the data are tokenized"
"""What --tokenizer is where no model has one of its own."""

T = TypeVar("T")


def add_data(parser: argparse._ActionsContainer) -> None:
    """Add `--data FILE`, which may be given several times; `options.data` is a list, or None."""
    parser.add_argument("--data", action="append", metavar="FILE", help=f"{DATA}; again for each of several")


def add_source(parser: argparse._ActionsContainer) -> None:
    """Add the options that say where conversations are."""
    add_data(parser)
    parser.add_argument("--format", choices=FORMATS, help="of the conversations; that of the first if not given")
    parser.add_argument("--split", help=f"of a data set or folder; {SPLIT} if not given")


def add_encoding(parser: argparse._ActionsContainer) -> None:
    """Add the options that say how conversations become samples."""
    parser.add_argument("--history", choices=HISTORIES, help=f"what clients send back; {HISTORY} if not given")
    parser.add_argument("--option", action="append", metavar="NAME=VALUE", help="of the template")
    dirt.add_argument(parser)


def add_conversation(parser: argparse._ActionsContainer, words: str) -> None:
    """Add `--conversation N`, which chooses one."""
    parser.add_argument("--conversation", type=int, metavar="N", help=f"{words}, counted from 0")


def add_arguments(
    parser: argparse.ArgumentParser,
    limit: str = f"the most to read of each FILE; {READ} if not given",
    tokenizer: str = "the model's own if not given",
) -> None:
    """Add all options of data: where conversations are, and how they become samples."""
    data = parser.add_argument_group("data")
    add_source(data)
    data.add_argument("--tokenizer", help=f"a folder, a file or a name; {tokenizer}")
    add_encoding(data)
    data.add_argument("--skip-invalid", action="store_true", help="go on without conversations that are refused")
    data.add_argument("--limit", type=int, help=limit)


def check(options: argparse.Namespace, of_data: Iterable[str] = OF_DATA) -> None:
    """Refuse what can be seen to be wrong before anything is read.

    Args:
        options: Of a command.
        of_data: Those that say nothing without --data.
    """
    if options.data is None and (without_data := [name for name in of_data if is_given(options, name)]):
        raise ValueError(f"--{without_data[0].replace('_', '-')} is about data; give --data too")
    if (limit := getattr(options, "limit", None)) is not None and limit < 1:
        raise ValueError(f"--limit: expected at least 1, found {limit}")
    if (number := getattr(options, "conversation", None)) is not None and number < 0:
        raise ValueError(f"--conversation: expected a number from 0 on, found {number}")


def check_outputs(options: argparse.Namespace, names: Iterable[str]) -> None:
    """Refuse output files that cannot be written, that hold the data, or that would be read as data the next time:
    before the work, and not after it."""
    taken: set[Path] = set()
    for name in names:
        if (named := getattr(options, name)) is None:
            continue
        path = Path(named).resolve()  # a link is not to be removed
        if path in taken:
            raise ValueError(f"--{name}: {named} is named twice; give another file")
        taken.add(path)
        if not path.parent.is_dir():
            raise ValueError(f"--{name}: there is no folder {named.parent}; make it first")
        for source in map(Path, options.data or ()):
            if path == source.resolve():
                raise ValueError(f"--{name}: {named} holds the data, and would be written over; give another file")
            if path.suffix.lower() in FILES and source.is_dir() and source.resolve() in path.parents:
                raise ValueError(f"--{name}: {named} is inside the data, {source}; give a file elsewhere")
        if path.exists() and not path.is_file() and not path.is_dir():
            continue  # a pipe, or a device
        try:
            was_there = path.exists()
            path.open("ab").close()
            if not was_there:
                path.unlink()
        except OSError as error:
            raise ValueError(f"--{name}: {named} cannot be written: {error.strerror}; give another file") from error


def is_given(options: argparse.Namespace, name: str) -> bool:
    """Whether an option was given: 0 is a value, and what is switched on is never switched off."""
    value = getattr(options, name)
    return value is not None and value is not False


def chosen(options: argparse.Namespace) -> Iterator[Conversation | BadInput]:
    """The conversations of all sources one after the other, or the one that --conversation names."""
    sources = (read_all(source, options.format, options.split or SPLIT) for source in options.data)
    start = options.conversation or 0
    end = None if options.conversation is None else start + 1
    return itertools.islice(itertools.chain.from_iterable(sources), start, end)


def raise_no_such_conversation(options: argparse.Namespace) -> NoReturn:
    """Say that there is no conversation of the number that --conversation names."""
    raise ValueError(
        f"{', '.join(options.data)}: there is no conversation {options.conversation or 0}; expected a number from 0 "
        "on, and below theirs"
    )


def encoder_of(options: argparse.Namespace, tokenizer: Any, **more: Any) -> EntryEncoder:
    """What makes layouts of conversations, as the options say."""
    template = template_options(options.option or ())
    ours = {"history": options.history or HISTORY, "accept": options.accept or (), **more}
    return EntryEncoder(tokenizer, format=options.format, **ours, **template)


def template_options(texts: Iterable[str]) -> dict[str, Any]:
    """Options of the template, of texts such as "enable_thinking=false"."""
    named = dict(map(option_of, texts))
    if ours := named.keys() & OURS:
        raise ValueError(f"--option {min(ours)}: expected an option of the template")
    return named


def some_conversations(options: argparse.Namespace, vocabulary: int) -> tuple[list[str], list[list[Sample]], list[str]]:
    """Some conversations of the data, spread over all that is read, for commands that need not look at all of them.

    A refusal ends it, once all others have been looked at; with --skip-invalid it is left out, and listed.

    Args:
        options: Of a command, with those of `add_arguments`, and the `model` whose tokenizer is taken if none is named.
        vocabulary: Token ids must be below this.

    Returns:
        Where the conversations stand, their samples, and what should be known of how they came about.
    """
    template_options(options.option or ())  # what is wrong with these is told before anything is read
    limit = options.limit or READ
    with stage(f"reading {', '.join(options.data)}"):
        some = _read_some(options.data, options.format, options.split or SPLIT, limit, ENCODED)
    n_looked_at = len(some.conversations) + some.refusals.total
    whole = "the first " if some.cut else ""
    notes = [f"looked at {n_looked_at} of {whole}{some.n_read} conversations of {', '.join(options.data)}"]
    tokenizer = None
    if any(conversation.samples is None for conversation in some.conversations):
        tokenizer, more = load_tokenizer(options.tokenizer) if options.tokenizer else _own_tokenizer(options.model)
        notes += more
    encoder = encoder_of(options, tokenizer)
    wheres, of_samples = [], []
    for conversation in each(some.conversations, "encoding", len(some.conversations), "conversations"):
        try:
            samples = encoder.encoded(conversation).samples
        except ConversationError as error:
            some.refusals.add(error.reason, f"{conversation.where}: {error}")
            continue
        _check_ids(samples, vocabulary, conversation.where)
        wheres.append(conversation.where)
        of_samples.append(samples)
    if some.refusals.total and not (options.skip_invalid and of_samples):
        raise Refused(some.refusals, n_looked_at)
    for reason, examples in some.refusals.examples.items():
        notes.append(f"left out, {some.refusals.counts[reason]} ({reason}): {'; '.join(examples)}")
    return wheres, of_samples, notes


@dataclass(frozen=True)
class _Some:
    """Some conversations of some sources."""

    conversations: list[Conversation]  # spread over all that were read
    refusals: Refusals  # what cannot be read, of all
    n_read: int
    cut: bool  # whether a source has more than were read


def _read_some(sources: Iterable[Any], format: str | None, split: str, limit: int, most: int) -> _Some:
    """Read at most `limit` conversations of each source, and keep at most `most` of them, not encoded yet."""
    refusals, n_read, cut = Refusals(), 0, False

    def readable() -> Iterator[Conversation]:
        nonlocal n_read, cut
        for source in sources:
            before = n_read
            for conversation in itertools.islice(read_all(source, format, split), limit):
                n_read += 1
                if isinstance(conversation, BadInput):
                    refusals.add(conversation.reason, str(conversation))
                else:
                    yield conversation
            cut |= n_read - before == limit

    return _Some(spread(readable(), most), refusals, n_read, cut)


def spread(items: Iterable[T], most: int) -> list[T]:
    """Half of `most` or more, up to `most`, of items whose number nobody knows: evenly spread, the first among them.

    >>> spread(range(100), 4)
    [0, 32, 64, 96]
    """
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
    """The tokenizer of a model, which for a config.json is the one beside it."""
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
