"""Conversations from wherever they lie, one after the other, in one form.

JSONL, JSON and Parquet files are read, data sets that `datasets` has saved, and data sets on the Hub by their names.
Their formats are those of formats.py. The first entry tells which, unless one is named; every `Conversation` says it.

>>> [chat] = read_conversations([{"prompt": "2+3?", "completion": "5"}])
>>> chat.format, chat.where, [message["content"] for message in chat.messages]
('pairs', 'entry 0', ['2+3?', '5'])
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from flexreason.chat.messages import json_words
from flexreason.chat.writable import half_character
from flexreason.data.folders import DEFAULT_SPLIT, PACKED, check_split, files_of
from flexreason.data.formats import FORMATS, TURNS, BadInput, Conversation, as_conversation, as_sample, detect
from flexreason.data.sharegpt import NO_JSON
from flexreason.data.tables import check_one_set, row_as_entry, table_of
from flexreason.talk.nearest import near_file
from flexreason.talk.sources import is_cached_set, is_path, unreachable
from flexreason.tree.sample import Sample

DATA = "conversations: a .jsonl, .json or .parquet file, a folder, a data set's name"
"""What --data takes, in every command."""


class EmptySource(BadInput):
    """A source without a single entry."""


def read_conversations(
    source: str | Path | Iterable[Any], format: str | None = None, split: str = DEFAULT_SPLIT
) -> Iterator[Conversation]:
    """The conversations of a source. Raises at the first entry that is none.

    Args:
        source: A file, a folder, a data set's name, or entries.
        format: One of `FORMATS`; that of the first entry if not given.
        split: Of a data set, or of a folder whose files name splits.
    """
    for conversation in read_all(source, format, split):
        if isinstance(conversation, BadInput):
            raise conversation
        yield conversation


def read_all(
    source: str | Path | Iterable[Any],
    format: str | None = None,
    split: str = DEFAULT_SPLIT,
    on_broken: Callable[[BadInput], None] | None = None,
) -> Iterator[Conversation | BadInput]:
    """The same, but an entry that is no conversation is given as an error, in its place. Raises where nothing can be
    read; `on_broken` is told instead of a file that cannot be read on, or that is empty beside others."""
    if format is not None and format not in FORMATS:
        raise BadInput(f"format: expected one of {', '.join(FORMATS)}, found {format!r}")
    number = 0
    for conversation in _together(_parsed(source, format, split, on_broken)):
        yield replace(conversation, number=number) if isinstance(conversation, Conversation) else conversation
        number += 1
    if number == 0:
        raise EmptySource(
            f"{source if isinstance(source, str | Path) else 'the source'}: nothing in it; expected at least "
            "one conversation"
        )


def _parsed(
    source: Any, format: str | None, split: str, on_broken: Callable[[BadInput], None] | None
) -> Iterator[tuple[Conversation | BadInput, Any]]:
    """Every entry as a conversation, and the conversation that a tokenized sample says it is of."""
    first = format
    for where, entry in read_entries(source, split, on_broken):
        try:
            if isinstance(entry, BadInput):
                raise entry
            first = first or detect(entry, where)
            if first == "samples":
                sample = as_sample(entry, where)
                yield Conversation([], None, 0, where, first, samples=[sample]), entry.get("conversation")
            else:
                either = format is None and first in TURNS  # sets put together have rows of both
                found = detect(entry, where) if either else first
                yield as_conversation(entry, found if found in TURNS else first, 0, where), None
        except BadInput as error:
            yield error, None


def _together(parsed: Iterable[tuple[Conversation | BadInput, Any]]) -> Iterator[Conversation | BadInput]:
    """Tokenized samples that stand one behind the other and are of the same conversation are put together."""
    waiting: Conversation | BadInput | None = None
    samples: list[Sample] = []  # of the conversation that waits for more
    name = None
    for conversation, of in parsed:
        more = conversation.samples or [] if isinstance(conversation, Conversation) else []
        if waiting is not None and of is not None and of == name:
            samples += more
            continue
        if waiting is not None:
            yield waiting
            waiting = None
        if of is None:
            yield conversation
        else:
            waiting, samples, name = conversation, more, of
    if waiting is not None:
        yield waiting


def count_entries(source: Any) -> int | None:
    """How many entries there are, for progress bars; None where that is not quickly known."""
    if not isinstance(source, str | Path):
        return len(source) if hasattr(source, "__len__") else None
    path = Path(source)
    if not path.is_file() or path.suffix in (".json", ".parquet"):
        return None
    with path.open("rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))


def read_entries(
    source: str | Path | Iterable[Any], split: str = DEFAULT_SPLIT, on_broken: Callable[[BadInput], None] | None = None
) -> Iterator[tuple[str, Any]]:
    """(where it stands, entry) for each entry, as they lie in the source; a line that is no JSON is a BadInput."""
    try:
        yield from _entries(source, split, on_broken)
    except BadInput as error:
        if on_broken is None:
            raise
        on_broken(error)


def _entries(
    source: str | Path | Iterable[Any], split: str, on_broken: Callable[[BadInput], None] | None
) -> Iterator[tuple[str, Any]]:
    if not isinstance(source, str | Path):
        check_one_set(source)
        yield from _rows(source, "entry")
        return
    path = Path(source)
    if path.is_file():
        yield from _from_file(path)
    elif path.is_dir():
        yield from _from_folder(path, split, on_broken)
    elif is_path(str(source)):
        raise BadInput(f"{source}: no such file or folder{near_file(source) or '; give one that is there'}")
    elif not is_cached_set(str(source)) and (why := unreachable()):
        raise BadInput(
            f"{source}: no such file or folder, and no hub can be asked for a data set of this name ({why})"
            f"{near_file(source) or '; give a file or a folder'}"
        )
    else:
        yield from _rows(_loaded_set(source, str(source), split=split, streaming=True), f"{source}, row")


def _from_file(path: Path) -> Iterator[tuple[str, Any]]:
    if path.exists() and not path.stat().st_size:
        return
    if path.suffix.lower() in PACKED:
        raise BadInput(f"{path}: compressed files are not read; unpack it")
    if path.suffix.lower() == ".parquet":
        _check_parquet(path)
        data = _loaded_set(path, "parquet", data_files=str(path), split="train", streaming=True)
        yield from _rows(data, f"{path}, row")
        return
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            if path.suffix.lower() == ".json" and (whole := _json_document(path)) is not None:
                for number, entry in enumerate(whole):
                    yield f"{path}, entry {number}", entry
                return
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                if error := _no_utf8(line, where):
                    yield where, error
                    continue
                try:
                    yield where, json.loads(line.strip())
                except NO_JSON as error:
                    yield (
                        where,
                        BadInput(f"{where}: no JSON: {json_words(error)}; correct the line, or use --skip-invalid"),
                    )
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error}; expected JSON that you may read") from error


def _no_utf8(text: str, where: str) -> BadInput | None:
    """What is wrong with a text that was read with "surrogateescape", which writes half a character for a bad byte."""
    if (at := half_character(text)) is None:
        return None
    byte = text[at].encode(errors="surrogateescape").hex()
    return BadInput(
        f"{where}: no UTF-8: the byte {byte} at character {at + 1}; save the file as UTF-8, or use --skip-invalid"
    )


def _check_parquet(path: Path) -> None:
    """Refuse what is none by the name alone: `datasets` says so in lines of its own."""
    try:
        with path.open("rb") as file:
            begin = file.read(4)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error}; expected a Parquet file that you may read") from error
    if begin != b"PAR1":
        raise BadInput(f"{path}: no Parquet file: expected PAR1 at its beginning, found {begin!r}; convert it")


def _json_document(path: Path) -> list[Any] | None:
    """The entries of a file that is one JSON document; None where it is JSON line by line."""
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    if not text.strip():
        return []
    lines = (_no_utf8(line, f"{path}, line {number}") for number, line in enumerate(text.split("\n"), start=1))
    bad = None if half_character(text) is None else next(filter(None, lines))
    try:
        whole = json.loads(text)
    except NO_JSON as error:
        try:
            json.loads(text.lstrip().partition("\n")[0])  # other ends of lines may stand in a text
        except json.JSONDecodeError:
            if bad:
                raise bad from error
            at = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            words = f"{error.msg} at character {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise BadInput(f"{path}{at}: no JSON: {words}; correct it there, or use one entry a line") from error
        except NO_JSON:
            pass  # it will be told where the lines are read
        return None
    if bad:
        raise bad
    if isinstance(whole, dict) and not _is_entry(whole):
        whole = next((whole[key] for key in ("data", "rows") if key in whole), whole)
    if isinstance(whole, list) and whole and isinstance(whole[0], dict) and ("role" in whole[0] or "from" in whole[0]):
        return [whole]  # one conversation, not many entries
    return whole if isinstance(whole, list) else [whole]


def _is_entry(whole: dict[str, Any]) -> bool:
    try:
        return bool(detect(whole, ""))
    except BadInput:
        return False


def _from_folder(path: Path, split: str, on_broken: Callable[[BadInput], None] | None) -> Iterator[tuple[str, Any]]:
    saved = [{"dataset_dict.json"}, {"dataset_info.json", "state.json"}]  # what datasets writes beside its files
    if any(all((path / name).exists() for name in names) for names in saved):
        try:
            data = _datasets(path).load_from_disk(str(path))
        except Exception as error:  # whatever datasets raises of a folder that is not whole
            raise BadInput(f"{path}: cannot be read as a saved data set: {error}; give one that is whole") from error
        if hasattr(data, "keys"):
            check_split(path, split, data)
            data = data[split]
        yield from _rows(data, f"{path}, row")
        return
    for file in files_of(path, split):
        n_read = 0
        try:
            for n_read, entry in enumerate(_from_file(file), start=1):  # noqa: B007 (told where there is none)
                yield entry
            if on_broken is not None and not n_read:
                raise EmptySource(f"{file}: nothing in it; expected at least one conversation")
        except BadInput as error:
            if on_broken is None:
                raise
            on_broken(error)


def _datasets(source: Any) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise BadInput(
            f"{source}: reading this needs the package datasets, which is not installed: pip install datasets"
        ) from error
    return datasets


def _loaded_set(source: Any, name: str, **options: Any) -> Any:
    try:
        return _datasets(source).load_dataset(name, **options)
    except Exception as error:  # whatever datasets raises: no such name or split, no connection, no such file
        raise BadInput(
            f"{source}: cannot be read as a data set: {error}; give a file, a folder or a name on the hub"
        ) from error


def _rows(data: Iterable[Any], name: str) -> Iterator[tuple[str, Any]]:
    """The entries of a table, or of whatever else gives one after the other."""
    data, features = table_of(data)
    for number, row in enumerate(data):
        where = f"{name} {number}"
        try:
            yield where, row_as_entry(row, features, where)
        except BadInput as error:
            yield where, error


def place_of(where: str) -> tuple[str, str | None, int | None]:
    """What a `where` says: the source, what is counted in it, and the number.

    >>> place_of("chats.jsonl, line 7"), place_of("entry 3")
    (('chats.jsonl', 'line', 7), ('', 'entry', 3))
    """
    found = re.fullmatch(r"(?:(.*), )?(line|entry|row) (\d+)", where, re.DOTALL)
    return (found[1] or "", found[2], int(found[3])) if found else (where, None, None)
