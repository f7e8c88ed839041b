"""What probes are made of: messages whose texts are *marks*, words that occur nowhere else.

Where a mark comes out of a rendering is where the template puts that text; what stands around it is the template's own.
"""

import json
from typing import Any

MARK = "zQ7xV{}Kmark"

USER, ANSWER, THOUGHT, AGAIN, SYSTEM = (MARK.format(letter) for letter in ("u", "b", "a", "w", "y"))

STORED = MARK.format("k")
"""A key of parts that no template asks for: it comes out only where a part is written as it is stored."""

PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "probe",
        "parameters": {"type": "object", "properties": {"key": {"type": "string", "description": "k"}}},
    },
}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text, STORED: ""}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def calling(form: str, key: str = "key", value: str | int = ANSWER, **more: Any) -> dict[str, Any]:
    arguments = {key: value} if form == "object" else json.dumps({key: value})
    call = {"id": "call00001", "type": "function", "function": {"name": "probe", "arguments": arguments}}
    return {"role": "assistant", "content": "", **more, "tool_calls": [call]}


def tool(text: str) -> dict[str, Any]:
    return {"role": "tool", "name": "probe", "tool_call_id": "call00001", "content": text}
