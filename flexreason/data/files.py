"""Conversations from wherever they lie, one after the other, in one form.

JSONL, JSON and Parquet files are read, data sets that `datasets` has saved, and data sets on the Hub by their names.
Entries may be of four formats, which are told apart by their keys:

    messages   {"messages": [{"role": ..., "content": ...}, ...], "tools": [...]}
    sharegpt   {"conversations": [{"from": "human", "value": ...}, ...]}
    pairs      {"prompt": ..., "completion": ...}, each text or messages
    samples    {"prompt_ids": [...], "target_ids": [...], "conversation": ...}, already tokenized

The format is that of the first entry, unless one is named; every `Conversation` tells it.

>>> [chat] = read_conversations([{"prompt": "2+3?", "completion": "5"}])
>>> chat.format, chat.where, [message["content"] for message in chat.messages]
('pairs', 'entry 0', ['2+3?', '5'])
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flexreason.chat.messages import json_words
from flexreason.chat.render import ConversationError
from flexreason.talk.nearest import did_you_mean, near_file
from flexreason.talk.sources import is_cached_set, is_path, unreachable
from flexreason.tree.sample import Sample

DATA = "conversations: a .jsonl, .json or .parquet file, a folder, a data set's name"
"""What --data takes, in every command."""

FORMATS = ("messages", "sharegpt", "pairs", "samples")

FILES = (".jsonl", ".json", ".parquet")

PACKED = (".gz", ".zst", ".bz2", ".xz", ".zip")

MESSAGE_KEYS = ("messages", "conversation", "conversations")

SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "call",
    "tool_call": "call",
}
"""ShareGPT's names of who speaks, as roles; a call is an assistant message whose value is the call."""


class BadInput(ConversationError):
    """A file or entry that is no conversation; the text names where."""

    reason = "bad input"


class EmptySource(BadInput):
    """A source without a single entry."""


@dataclass(frozen=True)
class Conversation:
    """One conversation: `messages` with `tools`, or, already tokenized, `samples`."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    number: int  # counted from 0
    where: str  # "chats.jsonl, line 7"
    format: str
    options: dict[str, Any] = field(default_factory=dict)  # of the template, from the entry's chat_template_kwargs
    samples: list[Sample] | None = None


def read_conversations(
    source: str | Path | Iterable[Any], format: str | None = None, split: str = "train"
) -> Iterator[Conversation]:
    """The conversations of a source. Raises at the first entry that is none.

    Args:
        source: A file, a folder, a data set's name, or entries.
        format: One of `FORMATS`; that of the first entry if not given.
        split: Of a data set.
    """
    for conversation in read_all(source, format, split):
        if isinstance(conversation, BadInput):
            raise conversation
        yield conversation


def read_all(
    source: str | Path | Iterable[Any],
    format: str | None = None,
    split: str = "train",
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
    for where, entry in read_entries(source, split, on_broken):
        try:
            if isinstance(entry, BadInput):
                raise entry
            format = format or detect(entry, where)
            if format == "samples":
                sample = as_sample(entry, where)
                yield Conversation([], None, 0, where, format, samples=[sample]), entry.get("conversation")
            else:
                yield as_conversation(entry, format, 0, where), None
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
    source: str | Path | Iterable[Any], split: str = "train", on_broken: Callable[[BadInput], None] | None = None
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
        table = hasattr(source, "features")
        for number, entry in enumerate(source):
            yield f"entry {number}", without_none(entry) if table else entry
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
        yield from _entries_of(_loaded_set(source, str(source), split=split, streaming=True), str(source))


def _from_file(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.stat().st_size:
        return
    if path.suffix.lower() in PACKED:
        raise BadInput(f"{path}: compressed files are not read; unpack it")
    if path.suffix.lower() == ".parquet":
        _check_parquet(path)
        data = _loaded_set(path, "parquet", data_files=str(path), split="train", streaming=True)
        yield from _entries_of(data, str(path))
        return
    try:
        with path.open(encoding="utf-8-sig") as file:
            if path.suffix.lower() == ".json" and (whole := _json_document(path)) is not None:
                for number, entry in enumerate(whole):
                    yield f"{path}, entry {number}", entry
                return
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    yield where, json.loads(line.strip())
                except (json.JSONDecodeError, RecursionError) as error:
                    yield (
                        where,
                        BadInput(f"{where}: no JSON: {json_words(error)}; mend the line, or use --skip-invalid"),
                    )
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read: {error}; expected JSON in UTF-8 that you may read") from error


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
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        return []
    try:
        whole = json.loads(text)
    except RecursionError as error:
        raise BadInput(f"{path}: no JSON: {error}; use one entry a line (.jsonl)") from error
    except json.JSONDecodeError as error:
        try:
            json.loads(text.lstrip().splitlines()[0])
        except json.JSONDecodeError:
            words = f"{error.msg} at character {error.colno}"
            raise BadInput(
                f"{path}, line {error.lineno}: no JSON: {words}; mend it there, or use one entry a line"
            ) from error
        return None
    if isinstance(whole, dict):
        whole = next((whole[key] for key in ("data", "rows") if key in whole), whole)
    if isinstance(whole, list) and whole and isinstance(whole[0], dict) and ("role" in whole[0] or "from" in whole[0]):
        return [whole]  # one conversation, not many entries
    return whole if isinstance(whole, list) else [whole]


def _from_folder(path: Path, split: str, on_broken: Callable[[BadInput], None] | None) -> Iterator[tuple[str, Any]]:
    if any((path / name).exists() for name in ("dataset_info.json", "state.json", "dataset_dict.json")):
        data = _datasets(path).load_from_disk(str(path))
        if hasattr(data, "keys"):
            if split not in data:
                raise BadInput(
                    f"{path}: no split {split!r} in it; choose one of {', '.join(data)}{did_you_mean(split, data)}"
                )
            data = data[split]
        yield from _entries_of(data, str(path))
        return
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in FILES)
    if packed := sorted(file for file in path.rglob("*") if file.suffix.lower() in PACKED):
        raise BadInput(f"{packed[0]}: compressed files are not read; unpack it, or move it out of {path}")
    if not files:
        raise BadInput(
            f"{path}: no .jsonl, .json or .parquet file in it, and no data set saved by datasets; give another folder"
        )
    for file in files:
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


def _entries_of(data: Iterable[Any], name: str) -> Iterator[tuple[str, Any]]:
    for number, entry in enumerate(data):
        yield f"{name}, row {number}", without_none(entry)


def detect(entry: Any, where: str) -> str:
    """The format of an entry, by its keys."""
    if isinstance(entry, list):
        return "sharegpt" if entry and isinstance(entry[0], dict) and "from" in entry[0] else "messages"
    _check_kind(entry, "messages", where)
    if "prompt_ids" in entry and "target_ids" in entry:
        return "samples"
    for key in MESSAGE_KEYS:
        if isinstance(messages := entry.get(key), list) and messages:
            return "sharegpt" if isinstance(messages[0], dict) and "from" in messages[0] else "messages"
    if "prompt" in entry and "completion" in entry:
        return "pairs"
    raise BadInput(
        f"{where}: neither messages, nor conversations, nor prompt and completion, nor prompt_ids and target_ids among "
        f"its keys: {', '.join(map(str, entry)) or 'none'}; expected one of these four kinds"
    )


def place_of(where: str) -> tuple[str, str | None, int | None]:
    """What a `where` says: the source, what is counted in it, and the number.

    >>> place_of("chats.jsonl, line 7"), place_of("entry 3")
    (('chats.jsonl', 'line', 7), ('', 'entry', 3))
    """
    found = re.fullmatch(r"(?:(.*), )?(line|entry|row) (\d+)", where, re.DOTALL)
    return (found[1] or "", found[2], int(found[3])) if found else (where, None, None)


def _check_kind(entry: Any, format: str, where: str) -> None:
    """Raise unless an entry can hold something of this format at all."""
    lists = format in ("messages", "sharegpt")
    if not isinstance(entry, dict) and not (lists and isinstance(entry, list)):
        wanted = "an object or a list of messages" if lists else f"an object of the kind {format}"
        raise BadInput(f"{where}: expected {wanted}, found {'null' if entry is None else type(entry).__name__}")


def as_conversation(entry: Any, format: str, number: int, where: str) -> Conversation:
    """The conversation of an entry whose format is messages, sharegpt or pairs."""
    _check_kind(entry, format, where)
    try:
        messages = {"messages": _messages, "sharegpt": _sharegpt, "pairs": _pairs}[format](entry)
        if format == "messages" and messages and isinstance(messages[0], dict) and "from" in messages[0]:
            raise ValueError("from and value, as ShareGPT has them, where role and content are expected")
        about = entry if isinstance(entry, dict) else {}
        tools = _loaded(about.get("tools"), "tools")
        options = _loaded(about.get("chat_template_kwargs"), "chat_template_kwargs") or {}
        if tools is not None and not isinstance(tools, list):
            raise ValueError(f"tools: expected a list, found {type(tools).__name__}")
        if not isinstance(options, dict):
            raise ValueError(f"chat_template_kwargs: expected an object, found {type(options).__name__}")
        if "accept" in options:  # else data would wave its own dirt through
            raise ValueError("chat_template_kwargs: accept is no option of the template; give it to the command")
        if format == "sharegpt" and isinstance(about.get("system"), str) and about["system"]:
            messages = [{"role": "system", "content": about["system"]}, *messages]
        return Conversation(messages, tools, number, where, format, options)
    except (ValueError, KeyError, TypeError) as error:
        words = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) and error.args else str(error)
        raise BadInput(f"{where}: not of the kind {format}: {words}") from error


def as_sample(entry: Any, where: str) -> Sample:
    _check_kind(entry, "samples", where)
    prompt, target = entry.get("prompt_ids"), entry.get("target_ids")
    for ids in (prompt, target):
        if not isinstance(ids, list | tuple) or not all(type(token) is int for token in ids):
            raise BadInput(f"{where}: expected prompt_ids and target_ids, lists of token ids, found {str(ids)[:80]}")
    if not prompt or not target:
        raise BadInput(f"{where}: prompt_ids or target_ids is empty; expected at least one token in each")
    return Sample(list(prompt), list(target))


def _messages(entry: Any) -> list[Any]:
    messages = entry if isinstance(entry, list) else next((entry[k] for k in MESSAGE_KEYS if k in entry), None)
    if messages is None:
        raise ValueError("messages is missing; expected a list of messages under it")
    if not isinstance(messages := _loaded(messages, "messages"), list):
        raise ValueError(f"messages: expected a list, found {type(messages).__name__}")
    first = messages[0] if messages else None
    if isinstance(entry, dict) and isinstance(first, dict) and not {"role", "from"} & first.keys():
        raise ValueError(f"messages: expected objects with role and content, found keys {', '.join(first)}")
    return messages


def _sharegpt(entry: Any) -> list[Any]:
    messages: list[Any] = []
    for at, turn in enumerate(_messages(entry)):
        if not isinstance(turn, dict):
            raise ValueError(f"turn {at}: expected an object with from and value, found {type(turn).__name__}")
        if missing := [key for key in ("from", "value") if key not in turn]:
            raise ValueError(f"turn {at}: {missing[0]!r} is missing; expected from and value")
        speaker = turn["from"]
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            hint = did_you_mean(speaker, SPEAKERS)
            raise ValueError(f"turn {at}: unknown speaker {speaker!r}; expected one of {', '.join(SPEAKERS)}{hint}")
        role = SPEAKERS[speaker]
        extra = {key: value for key, value in turn.items() if key not in ("from", "value")}
        if role == "call":
            call = _call(turn["value"], at)
            calls = [{"type": "function", "function": one} for one in (call if isinstance(call, list) else [call])]
            messages.append({"role": "assistant", "content": "", "tool_calls": calls, **extra})
        else:
            messages.append({"role": role, "content": turn["value"], **extra})
    return messages


def _call(value: Any, at: int) -> Any:
    if not isinstance(value, str):
        raise ValueError(f"turn {at}: value: expected a call as JSON, found {type(value).__name__}")
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"turn {at}: value: the call is no JSON: {json_words(error)}; mend it") from error


def _pairs(entry: Any) -> list[Any]:
    before, after = (
        [{"role": role, "content": entry[name]}] if isinstance(entry[name], str) else entry[name]
        for name, role in (("prompt", "user"), ("completion", "assistant"))
    )
    for name, messages in (("prompt", before), ("completion", after)):
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise ValueError(f"{name}: expected text or a list of messages, found {str(messages)[:80]}")
    earlier = [{**m, "train": False} if m.get("role") == "assistant" else m for m in before]  # part of the prompt
    return earlier + after


def _loaded(value: Any, name: str) -> Any:
    """A value that may have been stored as its JSON."""
    try:
        return json.loads(value) if isinstance(value, str) and value.strip()[:1] in ("[", "{") else value
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{name}: no JSON: {json_words(error)}; give it as it is, or as its JSON") from error


def without_none(value: Any) -> Any:
    """An entry of a table, without the keys that it lacks and that the table has filled with None."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value
