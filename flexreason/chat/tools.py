"""Tools as a template sees them: JSON schemas, given as such or as the functions that they are made of."""

import inspect
from typing import Any

from flexreason.chat.errors import BadMessage
from flexreason.chat.writable import kind_without_json, why_unwritable


def function_tools(tools: Any) -> list[Any] | None:
    """Tools as schemas, of schemas and functions; None where none are given."""
    if tools is None:
        return None
    if not isinstance(tools, list | tuple):
        raise BadMessage(f"tools: expected a list of JSON schemas or functions, found {type(tools).__name__}")
    for number, tool in enumerate(tools):
        if not (isinstance(tool, dict) or inspect.isfunction(tool) or inspect.ismethod(tool)):
            raise BadMessage(f"tools[{number}]: expected a JSON schema or a function, found {type(tool).__name__}")
        if words := why_unwritable(tool):
            raise BadMessage(f"tools[{number}] cannot be written: {words}")
        if isinstance(tool, dict) and (kind := kind_without_json(tool)):
            words = f"it has a value of the type {kind}, which JSON has not"
            raise BadMessage(f"tools[{number}]: {words}; give it as text or a number")
    return [tool if isinstance(tool, dict) else _schema(number, tool) for number, tool in enumerate(tools)]


def _schema(number: int, function: Any) -> dict[str, Any]:
    """A function's schema, as apply_chat_template makes it of its types and its docstring."""
    from transformers.utils import get_json_schema

    try:
        return get_json_schema(function)
    except Exception as error:
        raise BadMessage(
            f"tools[{number}]: no JSON schema can be made of the function: {error}; correct its types and its "
            "docstring, or give a schema"
        ) from error
