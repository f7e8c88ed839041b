"""Hold one pass against the N samples on a model and data of your own: exact, or the culprit.

Your conversations become samples as `fr.encode` makes them, by the model's own chat template; some of them, from all
over the data, are compared. Without data, random trees are, that cross the lengths of the model's config.

    flexreason verify Qwen/Qwen3-0.6B --data chats.jsonl
    flexreason verify ./my-model-or-its-config.json
"""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from flexreason.chat.encoding import HISTORIES
from flexreason.chat.render import ConversationError
from flexreason.chat.template import load_tokenizer, option_of
from flexreason.data.conversations import FORMATS, BadInput, Conversation, read_all
from flexreason.data.intake import EntryEncoder, Refusals, Refused
from flexreason.load import load_model
from flexreason.patching import apply_patch, find_root
from flexreason.proof.choice import random_conversations
from flexreason.proof.comparison import verify
from flexreason.proof.gate import reason_against_chunks
from flexreason.sample import Sample
from flexreason.tree import lay_out

READ = 2000
"""Conversations that are read, unless --limit says otherwise."""

LOOKED_AT = 32
"""The most of them that are encoded, so that the shortest of these can be compared."""

OF_DATA = ("tokenizer", "format", "split", "history", "option", "skip_invalid", "limit")

T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", help="a name, a folder, or a config.json (random weights)")
    parser.add_argument("--backend", default="auto", help="auto, segments, flex, dense")
    parser.add_argument("--loss", default="model", help="model, chunked")
    parser.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16, float16, float64")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, help="the most tokens to compute, samples and trees together")
    parser.add_argument("--no-float64", action="store_true", help="leave the comparison in fp64 out")
    parser.add_argument("--seed", type=int, default=0, help="of random trees, and of weights where there are none")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    data = parser.add_argument_group("data")
    data.add_argument("--data", help="conversations: a .jsonl, .json or .parquet file, a folder, a name on the Hub")
    data.add_argument("--tokenizer", help="a folder, a file or a name; the model's own if not given")
    data.add_argument("--format", choices=FORMATS, help="of the conversations; that of the first if not given")
    data.add_argument("--split", help="of a data set; train if not given")
    data.add_argument("--history", choices=HISTORIES, help="what clients send back; template if not given")
    data.add_argument("--option", action="append", metavar="NAME=VALUE", help="of the template")
    data.add_argument("--skip-invalid", action="store_true", help="go on without conversations that are refused")
    data.add_argument("--limit", type=int, help=f"the most conversations to read; {READ} if not given")


def run(options: argparse.Namespace) -> int:
    if options.data is None and (given := [name for name in OF_DATA if getattr(options, name)]):
        raise ValueError(f"--{given[0].replace('_', '-')} is about data; give --data too")
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit: expected at least 1, found {options.limit}")
    model, notes = load_model(options.model, options.dtype, options.device, options.seed, options.trust_remote_code)
    config = find_root(model).config
    wheres: list[str] = []
    if options.data is None:
        conversations, more = random_conversations(config, options.tokens, options.seed)
    else:
        wheres, conversations, more = conversations_of(options, config.get_text_config().vocab_size)
    apply_patch(model, options.backend, loss=options.loss, ask=reason_against_chunks)
    layouts = [lay_out(samples) for samples in conversations]
    report = verify(model, layouts, conversations, tokens=options.tokens, float64=False if options.no_float64 else None)
    where = [f"conversation {n}: {wheres[number]}" for n, number in enumerate(report.numbers) if wheres]
    report = dataclasses.replace(report, notes=[*notes, *more, *where, *report.notes])
    if options.json:
        print(json.dumps({**dataclasses.asdict(report), "ok": report.ok}))
    else:
        print(report)
    return 0 if report.ok else 1


def conversations_of(options: argparse.Namespace, vocabulary: int) -> tuple[list[str], list[list[Sample]], list[str]]:
    """Where some conversations of the data stand, spread over all that is read; their samples, as `fr.encode` makes
    them; and what should be known of it.

    A refusal ends it, once all others have been looked at; or it is left out, and listed.
    """
    template = dict(map(option_of, options.option or ()))
    if own := template.keys() & {"tokenizer", "format", "turns", "history"}:
        raise ValueError(f"--option {min(own)}: expected an option of the template")
    refusals, n_read = Refusals(), 0

    def readable() -> Iterator[Conversation]:
        nonlocal n_read
        read = read_all(options.data, options.format, options.split or "train")
        for found in itertools.islice(read, options.limit or READ):
            n_read += 1
            if isinstance(found, BadInput):
                refusals.add(found.reason, str(found))
            else:
                yield found

    kept = spread(readable(), LOOKED_AT)
    n_looked_at = len(kept) + refusals.total
    whole = "" if n_read < (options.limit or READ) else "the first "
    notes = [f"looked at {n_looked_at} of {whole}{n_read} conversations of {options.data}"]
    tokenizer = None
    if any(one.samples is None for one in kept):
        tokenizer, more = load_tokenizer(options.tokenizer) if options.tokenizer else _own_tokenizer(options.model)
        notes += more
    encoder = EntryEncoder(tokenizer, history=options.history or HISTORIES[0], **template)
    wheres, conversations = [], []
    for one in kept:
        try:
            samples = encoder.encoded(one).samples
        except ConversationError as error:
            refusals.add(error.reason, f"{one.where}: {error}")
            continue
        _check_ids(samples, vocabulary, one.where)
        wheres.append(one.where)
        conversations.append(samples)
    if refusals.total and not (options.skip_invalid and conversations):
        raise Refused(refusals, n_looked_at)
    for reason, examples in refusals.examples.items():
        notes.append(f"left out, {refusals.counts[reason]} ({reason}): {'; '.join(examples)}")
    return wheres, conversations, notes


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
