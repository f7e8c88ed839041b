"""Turns a row of a table back into the entry that was put into the table.

A table of Arrow's has the same keys in all its rows, and in all objects of a list. A key that one of them lacks is
there with None, and a chat template would write it. Where the table says the types of its columns, it is known where
it may have put None; a plain dict may have come from a table, or not.

>>> row = {"messages": [{"role": "user", "content": "hi", "tool_calls": None}], "tools": None}
>>> row_as_entry(row, None, "entry 0")
{'messages': [{'role': 'user', 'content': 'hi'}], 'tools': None}
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flexreason.chat.messages import TRAINING_KEYS
from flexreason.data.formats import MESSAGE_KEYS, SYSTEM_KEYS, BadInput

MESSAGES = (*MESSAGE_KEYS, "prompt", "completion")

AS_WRITTEN = ("arguments", "tools", "chat_template_kwargs")
"""Keys whose objects a template writes as they are, so that the model sees each None in them."""

MAY_BE_NULL = ("default", "const")
"""Keys of a JSON schema that often have the value null on purpose."""

READ = (*MESSAGES, *AS_WRITTEN, *TRAINING_KEYS, *SYSTEM_KEYS, "functions", "prompt_ids", "target_ids", "target_weights")
"""Keys of an entry that are read; what is in other columns may be anything."""


def row_as_entry(row: Any, features: Any, where: str) -> Any:
    """The entry that a row was made of.

    Args:
        row: Of a table, or an entry that is none; arrays and tensors in it become lists and numbers.
        features: The types of the table's columns; None where they are not known.
        where: It stands.
    """
    try:
        if not isinstance(row, Mapping):
            return _without_put_in(_plain(row, where), where)
        row = {
            key: _plain(value, where, key not in TRAINING_KEYS) if key in READ else value for key, value in row.items()
        }
        return _without_put_in(row, where) if features is None else _without_lacking(row, features, False, where)
    except RecursionError as error:
        raise BadInput(f"{where}: nested too deeply; expected messages with a few levels; leave it out") from error


def table_of(data: Any) -> tuple[Any, Any]:
    """A data set that gives values as they were stored, and the types of its columns, or None if it has none.

    A choice of a table's rows (`random_split`, `Subset`) gives plain dicts, so the table of these rows is taken. What
    a transform of the user's makes of rows stays as it is.
    """
    if hasattr(data, "indices") and hasattr(data, "dataset"):
        whole, _ = table_of(data.dataset)
        return table_of(whole.select(map(int, data.indices))) if hasattr(whole, "select") else (data, None)
    if is_transformed(data) or not isinstance(getattr(data, "features", None), Mapping):
        return data, None
    return data.with_format(None) if hasattr(data, "with_format") else data, data.features


def is_transformed(data: Any) -> bool:
    """Whether the user's own function makes the rows that a table gives."""
    form = getattr(data, "format", None)
    return isinstance(form, Mapping) and form.get("type") == "custom"


def check_one_set(data: Any) -> None:
    """Raise where several data sets are given by name, as a `DatasetDict` holds its splits."""
    if isinstance(data, Mapping):
        names = ", ".join(map(repr, data))
        raise BadInput(f"data: expected a list or one data set, found a {type(data).__name__}; give one of {names}")


def features_of(row: Any) -> Any:
    """The types of the columns of a row that `datasets.map` hands out; None of any other row."""
    return getattr(getattr(row, "formatter", None), "features", None)


def _plain(value: Any, where: str, exact: bool = True) -> Any:
    """The value with Python's own lists and numbers in the place of arrays and tensors."""
    if hasattr(value, "tolist"):
        dtype: Any = getattr(value, "dtype", None)
        if exact and "float" in str(dtype) and dtype.itemsize < 8:
            raise BadInput(
                f"{where}: a number of {dtype}, which may have been rounded; expected numbers as they were "
                "written; use data.with_format(None)"
            )
        return _plain(value.tolist(), where)
    if isinstance(value, Mapping):
        return {key: _plain(item, where, key not in TRAINING_KEYS) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    if isinstance(value, str | int | float | None) or callable(value):  # a tool may be a function
        return value
    raise BadInput(f"{where}: a value of the type {type(value).__name__}, which JSON has not; keep it as text")


def _without_lacking(value: Any, feature: Any, as_written: bool, where: str) -> Any:
    """The value without the keys that Arrow has added. It does that in typed columns only: a column of JSON keeps its
    values as they were written."""
    if isinstance(feature, Mapping) and isinstance(value, Mapping):
        kept = {}
        for key, item in value.items():
            below, inside = feature.get(key), as_written or key in AS_WRITTEN
            if item is None and as_written and getattr(below, "dtype", None) == "null":
                raise BadInput(
                    f"{where}: {key} is null in every row, and the table cannot say in which of them it was written; "
                    "leave it out of all, or keep this column as JSON text"
                )
            if item is not None or below is None:
                kept[key] = _without_lacking(item, below, inside, where)
        return kept
    item_feature = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
    if isinstance(value, list) and item_feature is not None:
        return [_without_lacking(item, item_feature, as_written, where) for item in value]
    return value


def _without_put_in(entry: Any, where: str) -> Any:
    """The entry without each None that a table may have added and that a template would not write.

    A template does write a None in arguments, tools and options. So this raises where there is one, and the entry looks
    as if it came from a table: nobody can tell who wrote it."""
    columns = {key: entry[key] for key in MESSAGES if key in entry} if isinstance(entry, dict) else {"": entry}
    columns = {key: column for key, column in columns.items() if isinstance(column, list) and column}
    if not all(map(_may_be_a_tables, columns.values())):
        return entry
    filled = _holds_none(columns)
    for column in columns.values():
        for arguments in _under("arguments", column):
            if _holds_none(arguments):
                raise _cannot_be_told(where, "the arguments of a call", "arguments")
    if not isinstance(entry, dict):
        return _without_none(entry)
    tools = entry.get("tools")
    if _is_uniform([tools]) and _holds_none(tools, () if filled else MAY_BE_NULL):
        raise _cannot_be_told(where, "tools", "tools")
    if _holds_none(entry.get("chat_template_kwargs")):
        raise _cannot_be_told(where, "chat_template_kwargs", "chat_template_kwargs")
    return {**entry, **{key: _without_none(column) for key, column in columns.items()}}


def _cannot_be_told(where: str, place: str, name: str) -> BadInput:
    return BadInput(
        f"{where}: null in {place}, and a table puts null where a row lacks what others have, so that nobody can tell "
        f"whether it was written; hand in the datasets.Dataset itself, or keep {name} as JSON text"
    )


def _may_be_a_tables(messages: list[Any]) -> bool:
    """Whether messages look as if they came from a table: all of them have the same keys. Another message may have been
    put before them since. So it is enough if those that have the key tool_calls do, and it is None in some."""
    with_calls = [message for message in messages if isinstance(message, dict) and "tool_calls" in message]
    without_any = any(message["tool_calls"] is None for message in with_calls)
    return _is_uniform(with_calls if without_any else messages)


def _is_uniform(values: Iterable[Any]) -> bool:
    """Whether values could be in one column of a table: all have one type, and objects have the same keys in the same
    order."""
    values = [value for value in values if value is not None]
    kinds = {type(value) for value in values}
    if len(kinds) > 1:
        return False
    if kinds == {list}:
        return _is_uniform([item for value in values for item in value])
    if kinds == {dict}:
        keys = {tuple(key for key in value if key not in TRAINING_KEYS) for value in values}
        return len(keys) == 1 and all(_is_uniform([value[key] for value in values]) for key in keys.pop())
    return True


def _holds_none(value: Any, may_be: tuple[str, ...] = ()) -> bool:
    """Whether some object in the value has a None, under another key than these."""
    if isinstance(value, dict):
        return any(key not in may_be if item is None else _holds_none(item, may_be) for key, item in value.items())
    return isinstance(value, list) and any(_holds_none(item, may_be) for item in value)


def _under(key: str, value: Any) -> Iterator[Any]:
    """Every value that the key has, in any object within `value`."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from [item] if name == key else _under(key, item)
    elif isinstance(value, list):
        for item in value:
            yield from _under(key, item)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
