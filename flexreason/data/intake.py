"""From any source to layouts: conversations are read and encoded, and those that are refused are counted by reason.

`EntryEncoder` is one step, from an entry to its layout, for DataLoader workers and `datasets.map`. `Intake` goes over a
whole source with it. A refusal stops it once all that is left has been looked at. So nothing is left out silently, and
nobody corrects a file line by line. Or refusals are skipped, and listed.
"""

import itertools
import logging
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch

import flexreason
from flexreason.chat.encode import Encoded, Encoder, encoder_of
from flexreason.chat.errors import ConversationError
from flexreason.chat.render import unknown_options
from flexreason.data.files import read_all
from flexreason.data.formats import BadInput, Conversation, as_conversation, as_sample, detect
from flexreason.data.tables import features_of, row_as_entry
from flexreason.talk.interrupt import deaf
from flexreason.talk.versions import code_hash
from flexreason.tree.layout import Layout
from flexreason.tree.merge import lay_out

EXAMPLES = 3
"""Refused conversations that are named for each class of reasons."""

OURS = {"tokenizer", "format", "turns", "history", "accept"}
"""Options of `EntryEncoder` itself, which are none of a template."""

AT_A_TIME = 8
"""Conversations that a worker takes at a time."""

log = logging.getLogger("flexreason")


def version_of_encoding() -> str:
    """What changes wherever a conversation may be encoded otherwise."""
    return f"{flexreason.__version__} {code_hash('chat', 'data', 'tree')}"


class EntryEncoder:
    """Makes the layout of what a data set's entry holds, in any of the formats of `data.files`.

    Options are those of `fr.encode`. An encoder can be pickled, and gives the same in every process.

    >>> EntryEncoder(None)({"prompt_ids": [1, 2], "target_ids": [3]})
    Layout(3 tokens, 1 targets, 1 samples of 3 tokens)
    """

    def __init__(self, tokenizer: Any, *, format: str | None = None, turns: Any = None, **options: Any) -> None:
        if "tools" in options:
            raise ConversationError("EntryEncoder: tools stand in the entries; give them there, beside the messages")
        self.tokenizer, self.format, self.turns, self.options = tokenizer, format, turns, options
        Encoder(tokenizer, **options)  # wrong options are told here, and not in a worker
        if unknown := unknown_options(tokenizer, options):
            log.warning(
                f"the chat template has no option {', '.join(unknown)}, so that it does nothing; `flexreason template` "
                "lists those that it has"
            )
        # what datasets keeps goes by this object's state, and other code may encode otherwise
        self.versions = [version_of_encoding(), version("transformers"), version("tokenizers")]

    def __call__(self, entry: Any, where: str = "entry") -> Layout:
        return self.layout(row_as_entry(entry, features_of(entry), where), where)

    def layout(self, entry: Any, where: str) -> Layout:
        """The layout of an entry that is known to hold only what was written."""
        format = self.format or detect(entry, where)
        if format == "samples":
            return lay_out([as_sample(entry, where)])
        return lay_out(self.encoded(as_conversation(entry, format, 0, where)).samples)

    def columns(self, entry: Any) -> dict[str, Any]:
        """The layout as columns of a table: `dataset.map(encoder.columns, num_proc=8)`. `Collator` takes them."""
        return {name: tensor.numpy() for name, tensor in vars(self(entry)).items()}

    def encoded(self, conversation: Conversation) -> Encoded:
        """The samples of a conversation, and how they were found."""
        if conversation.samples is not None:
            return Encoded(conversation.samples, ["given"] * len(conversation.samples), [], [], 0.0, 0)
        encoder = encoder_of(self.tokenizer, **{**self.options, **conversation.options})
        return encoder.encoded(conversation.messages, conversation.tools, self.turns)


@dataclass(frozen=True)
class Item:
    """One conversation taken in."""

    conversation: Conversation
    encoded: Encoded
    layout: Layout
    seconds: float = 0.0  # that encoding and laying out took


@dataclass(frozen=True)
class Refusal:
    """One conversation that is refused."""

    where: str  # "chats.jsonl, line 7"
    message: int | None  # its number in the conversation, where it is one message's fault
    reason: str  # the class of reasons
    words: str
    dirty: Mapping[str, int] = field(default_factory=dict)  # answers of each kind of dirt in it

    @classmethod
    def of(cls, error: ConversationError, where: str | None) -> "Refusal":
        """What is refused by an error; one in reading begins with where it is."""
        if where is None:
            where, _, words = str(error).partition(": ")
            return cls(where, error.message, error.reason, words or where)
        return cls(where, error.message, error.reason, error.text, dict(error.dirty))

    def __str__(self) -> str:
        message = "" if self.message is None else f"message {self.message}: "
        return f"{self.where}: {message}{self.words}" if self.words != self.where else self.words


@dataclass
class Refusals:
    """Refused conversations by class of reasons: how many there are of each, and where the first of them stand."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    dirty: dict[str, int] = field(default_factory=dict)  # answers of each kind of dirt in them

    def add(self, reason: str, words: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        named = self.examples.setdefault(reason, [])
        if len(named) < EXAMPLES:
            named.append(words)

    def count_dirt(self, dirty: Mapping[str, int]) -> None:
        for kind, count in dirty.items():
            self.dirty[kind] = self.dirty.get(kind, 0) + count

    @classmethod
    def together(cls, all_of: Iterable["Refusals"]) -> "Refusals":
        """The refusals of several sources."""
        whole = cls()
        for refusals in all_of:
            whole.count_dirt(refusals.dirty)
            for reason, count in refusals.counts.items():
                whole.counts[reason] = whole.counts.get(reason, 0) + count
                named = whole.examples.setdefault(reason, [])
                named += refusals.examples[reason][: EXAMPLES - len(named)]
        return whole

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def lines(self) -> list[str]:
        """A line for each class, the largest first, and its examples."""
        lines = []
        for reason, count in sorted(self.counts.items(), key=lambda item: (-item[1], item[0])):
            lines.append(f"{count:>6}  {reason}")
            lines += [f"        {words}" for words in self.examples[reason]]
            if count > len(self.examples[reason]):
                lines.append("        ...")
        return lines


class Refused(ValueError):
    """Some conversations of a source are refused; the text says which, by class."""

    def __init__(self, refusals: Refusals, n_read: int) -> None:
        self.refusals, self.n_read = refusals, n_read
        text = f"{refusals.total} of {n_read} conversations are refused:\n" + "\n".join(refusals.lines())
        super().__init__(text + "\n--skip-invalid (skip_invalid=True) goes on without them")


class Intake:
    """The conversations of a source, encoded one after the other, in order; iterate over it once.

    Args:
        source: A file, a folder, a data set's name, or entries.
        encoder: What makes layouts of conversations.
        split: Of a data set.
        skip_invalid: Go on without conversations that are refused, unless all are.
        limit: The most conversations to read.
        workers: Processes that encode; 0 for none but this one. Their number changes nothing but the time.
        then: Makes of an `Item` what is given out; in the worker, so that only this is sent back.
        pool: The workers, where several sources share what `start_workers` started.
        on_refused: Told of every conversation that is refused.
        on_broken: Told of every file that cannot be read on, which then stops nothing.
    """

    def __init__(
        self,
        source: str | Path | Iterable[Any],
        encoder: EntryEncoder,
        *,
        split: str = "train",
        skip_invalid: bool = False,
        limit: int | None = None,
        workers: int = 0,
        then: Callable[[Item], Any] | None = None,
        pool: ProcessPoolExecutor | None = None,
        on_refused: Callable[[Refusal], None] | None = None,
        on_broken: Callable[[BadInput], None] | None = None,
    ) -> None:
        if workers < 0:
            raise ValueError(f"workers: expected 0 or more, found {workers}")
        self.source, self.encoder, self.split = source, encoder, split
        self.skip_invalid, self.limit, self.workers, self.then = skip_invalid, limit, workers, then
        self.pool, self.on_refused, self.on_broken = pool, on_refused, on_broken
        self.refusals = Refusals()
        self.n_read = 0
        self.format: str | None = encoder.format

    def __iter__(self) -> Iterator[Any]:
        for refused, taken in self._encoded():
            self.n_read += 1
            if refused:
                self.refusals.add(taken.reason, str(taken))
                self.refusals.count_dirt(taken.dirty)
                if self.on_refused is not None:
                    self.on_refused(taken)
            elif not self.refusals.total or self.skip_invalid:
                yield taken
        if self.refusals.total and (not self.skip_invalid or self.refusals.total == self.n_read):
            raise Refused(self.refusals, self.n_read)

    def _encoded(self) -> Iterator[tuple[bool, Any]]:
        read = itertools.islice(self._read(), self.limit)
        if self.pool is not None:
            yield from _in_processes(self.pool, self.workers, read)
        elif self.workers:
            with start_workers(self.workers, self.encoder, self.then) as pool:
                yield from _in_processes(pool, self.workers, read)
        else:
            yield from (_take(self.encoder, self.then, conversation) for conversation in read)

    def _read(self) -> Iterator[Conversation | BadInput]:
        for conversation in read_all(self.source, self.encoder.format, self.split, self.on_broken):
            if isinstance(conversation, Conversation):
                self.format = self.format or conversation.format
            yield conversation


def _take(
    encoder: EntryEncoder, then: Callable[[Item], Any] | None, conversation: Conversation | BadInput
) -> tuple[bool, Any]:
    """(False, what `then` makes of the Item), or where it is refused (True, its Refusal)."""
    start = time.perf_counter()
    try:
        if isinstance(conversation, BadInput):
            raise conversation
        encoded = encoder.encoded(conversation)
        item = Item(conversation, encoded, _laid_out(encoded, conversation), time.perf_counter() - start)
    except ConversationError as error:
        return True, Refusal.of(error, None if isinstance(conversation, BadInput) else conversation.where)
    return False, item if then is None else then(item)


def _laid_out(encoded: Encoded, conversation: Conversation) -> Layout:
    try:
        return lay_out(encoded.samples)
    except ValueError as error:
        if conversation.samples is None:
            raise  # samples that we have made
        raise BadInput(str(error)) from error


def start_workers(
    workers: int, encoder: EntryEncoder, then: Callable[[Item], Any] | None = None
) -> ProcessPoolExecutor:
    """Processes for Intakes with this encoder and `then`. They take seconds to start, so several Intakes may share
    them."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's and the tokenizer's threads
    return _Workers(workers, context, _begin, (encoder, then))


class _Workers(ProcessPoolExecutor):
    """Processes that leave Ctrl-C to us, and are ended at once where the block is not left at its end. No future is
    cancelled one by one: the pool's own thread fails on such a future, and says so, when a process ends."""

    def submit(self, *args: Any, **kwargs: Any) -> Any:
        with deaf():  # which is when they are started
            return super().submit(*args, **kwargs)

    def __exit__(self, kind: type[BaseException] | None, *about: Any) -> bool | None:
        if kind is not None:
            # A process may be ended while it writes a result or reads a task. Whoever is at the other end of that pipe
            # waits as long as anybody holds this end, and we hold it.
            cast(Any, self)._result_queue._writer.close()
            cast(Any, self)._call_queue._reader.close()
            for process in dict(self._processes or {}).values():
                process.terminate()
        return super().__exit__(kind, *about)


def _in_processes(pool: ProcessPoolExecutor, workers: int, read: Iterator[Any]) -> Iterator[tuple[bool, Any]]:
    """What `_take` gives, in order, from processes of their own, which are only a few chunks ahead of who asks."""
    chunks = iter(lambda: list(itertools.islice(read, AT_A_TIME)), [])
    waiting = deque(pool.submit(_take_each, chunk) for chunk in itertools.islice(chunks, 4 * workers))
    while waiting:
        yield from waiting.popleft().result()
        waiting.extend(pool.submit(_take_each, chunk) for chunk in itertools.islice(chunks, 1))


_step: Callable[[Any], tuple[bool, Any]]
"""In a worker process: what it does with a conversation."""


def _begin(encoder: EntryEncoder, then: Callable[[Item], Any] | None) -> None:
    global _step
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _step = partial(_take, encoder, then)


def _take_each(chunk: list[Any]) -> list[tuple[bool, Any]]:
    return [_step(conversation) for conversation in chunk]
