"""Bounds for templates, which come from strangers: one that runs too long or takes too much memory is stopped.

Nothing in a template can count its own steps, so a thread looks at it from outside, twenty times a second, and raises
an exception into the thread that renders. The watching thread ends when nothing is rendered any more.
"""

import ctypes
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

SECONDS = 10.0
"""One rendering may take this long."""

MEMORY = 1 << 30
"""Bytes by which the process may grow during one rendering."""


class OutOfBounds(Exception):
    """The template was stopped; the text says at which bound."""


class _Stop(BaseException):
    """Raised into the thread that renders. It is no `Exception`, so that no template can catch it."""


class _Rendering:
    """When a rendering must be over, the memory when it was first looked at, and at which bound it was stopped."""

    def __init__(self) -> None:
        self.deadline = time.monotonic() + SECONDS
        self.memory: int | None = None
        self.stopped = ""


_lock = threading.Lock()
_renderings: dict[int, _Rendering] = {}  # by thread
_watching = False


def _after_fork() -> None:
    """A fork takes no other threads along, and may copy a lock that one of them holds."""
    global _lock, _watching
    _lock, _watching = threading.Lock(), False
    _renderings.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def bounded() -> Iterator[None]:
    """Within it, a template that goes out of bounds ends in `OutOfBounds`."""
    global _watching
    thread, rendering = threading.get_ident(), _Rendering()
    try:
        try:
            with _lock:
                _renderings[thread] = rendering
                if not _watching:
                    _watching = True
                    threading.Thread(target=_watch, daemon=True, name="flexreason-templates").start()
            yield
        finally:
            with _lock:
                _renderings.pop(thread, None)
                if rendering.stopped:  # the exception may not have arrived yet
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None)
    except _Stop:
        raise OutOfBounds(rendering.stopped) from None
    except (MemoryError, RecursionError, OverflowError) as error:
        raise OutOfBounds(f"{str(error).strip()[:500]} [{type(error).__name__}]".lstrip()) from None


def _watch() -> None:
    global _watching
    while True:
        time.sleep(0.05)
        with _lock:
            if not _renderings:
                _watching = False
                return
            used, now = _memory_in_use(), time.monotonic()
            for thread, rendering in _renderings.items():
                if rendering.memory is None:
                    rendering.memory = used
                late, large = now > rendering.deadline, used - rendering.memory > MEMORY
                if (late or large) and not rendering.stopped:
                    took = f"longer than {SECONDS:g} s" if late else f"more than {MEMORY >> 20} MiB of memory"
                    rendering.stopped = f"one rendering took {took}"
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_Stop))


def _memory_in_use() -> int:
    """Bytes that the process holds; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


HUGE = 1_000_000
"""A number of seven digits, as no template multiplies by."""

NO_CODE = ("data", "whitespace", "comment", "comment_begin", "comment_end", "raw_begin", "raw_end")
"""What jinja's lexer calls text of a template that says nothing to be done."""


@lru_cache(maxsize=64)
def huge_product(source: str) -> str | None:
    """A power, or a product with a huge number, in a template's code; real templates have neither. It is computed in
    one step, perhaps while the template is compiled, where nothing can stop it.

    >>> huge_product("{{ 10 ** 9 }}"), huge_product("**{{ '**' ~ call(**options) }}**{# 2 ** 3 #}")
    ('10 ** 9', None)
    """
    from jinja2 import Environment, TemplateSyntaxError

    try:
        code = [token for token in Environment().lex(source) if token[1] not in NO_CODE]
    except TemplateSyntaxError:  # which whoever compiles it will say
        return None
    for (_, _, before), (_, kind, sign), (_, _, behind) in zip(code, code[1:], code[2:], strict=False):
        is_power = sign == "**" and before not in ("(", ",")  # where it hands on arguments by their names
        if kind == "operator" and (is_power or (sign == "*" and (_is_huge(before) or _is_huge(behind)))):
            return f"{before} {sign} {behind}"
    return None


def _is_huge(text: str) -> bool:
    """Whether a text is a huge whole number, as jinja writes these."""
    if not re.fullmatch(r"0[bBoOxX][\da-fA-F_]+|\d[\d_]*", text):
        return False
    return len(text) > 1000 or int(text.replace("_", ""), 0) >= HUGE
