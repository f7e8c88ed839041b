"""Verdicts of the self-test in the user's cache folder: each is found once a machine, and not once a process.

A file says what it is about (all that a verdict depends on) and what was found. It is believed only where it is whole
and about exactly what is asked. Of several ranks that ask at once, one tests, and the others wait for its file. What
cannot be read or written costs a test, and a word.
"""

import hashlib
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from flexreason.proof.compare import EXACT
from flexreason.proof.selftest import Result
from flexreason.proof.source import own_source

VARIABLE = "FLEXREASON_CACHE"
"""A folder to use instead, or "off"."""

PATIENCE = 60.0
"""Seconds that a rank waits for another's test before it goes on by itself."""

log = logging.getLogger("flexreason")


def folder() -> Path | None:
    """Where verdicts are kept, or None where nothing is."""
    chosen = os.environ.get(VARIABLE)
    if chosen == "off":
        return None
    try:
        if chosen:
            return Path(chosen).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flexreason"
    except RuntimeError:  # nobody's home
        return None


def surroundings() -> dict[str, str]:
    """What a verdict depends on beside the model: the code of flexreason, what it stands on, and the machine."""
    return {
        "flexreason": own_source(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def recall(about: dict[str, str], test: Callable[[], Result]) -> Result:
    """What is kept of this, else what `test` says.

    That is kept where it came to numbers. What raised may have been the machine's fault (memory, a missing package),
    and is asked anew.

    Args:
        about: what is tested: its name, source, structure and backend.
    """
    about = {**about, **surroundings()}
    where = folder()
    if where is None or not about["flexreason"]:
        return test()
    path = where / "verdicts" / f"{about['name']}-{_digest(about)[:20]}.json"
    if known := _read(path, about):
        return known
    with _alone(path.parent):
        if known := _read(path, about):  # by another rank, meanwhile
            return known
        result = test()
        if result.loss is not None:
            _write(path, about, result)
    return result


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read(path: Path, about: dict[str, str]) -> Result | None:
    try:
        written = json.loads(path.read_bytes())
        if _is_whole(written) and written["about"] == about:
            return Result(**written["found"])
        why = "it is not what was written there"
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # whatever a broken file gives
        why = f"{type(error).__name__}: {error}"
    _say(f"{path} is not believed, and the test is made again ({why})")
    return None


def _is_whole(written: Any) -> bool:
    """Whether a file is as `_write` left it, and its verdict the one that its numbers give."""
    if not isinstance(written, dict) or set(written) != {"about", "found", "digest"}:
        return False
    if written["digest"] != _digest([written["about"], written["found"]]):
        return False
    errors = [written["found"][key] for key in ("loss", "logprobs", "gradients")]
    return written["found"]["verdict"] == ("exact" if max(errors) <= EXACT else "refused")


def _write(path: Path, about: dict[str, str], result: Result) -> None:
    """All at once: whoever reads meanwhile finds no file, or a whole one."""
    fields = asdict(result)
    text = json.dumps({"about": about, "found": fields, "digest": _digest([about, fields])}, indent=1)
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as part:
            part.write(text)
        os.replace(part.name, path)
    except OSError as error:
        with suppress(OSError):
            os.unlink(part.name if part else "")
        _say(
            f"the verdict cannot be kept in {path.parent} ({error}), and every process will test again; "
            f'{VARIABLE} names another folder, or "off"'
        )


@cache
def _say(words: str) -> None:
    """Once a process."""
    log.warning(words)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While no other process tests. A lock that ends with its process, whatever ends it; where there are none (not on
    this system, not on this disk, not in a folder that cannot be made), all test."""
    opened = None
    with suppress(ImportError, OSError):
        import fcntl

        folder.mkdir(parents=True, exist_ok=True)
        opened = os.open(folder, os.O_RDONLY)
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
    try:
        yield
    finally:
        if opened is not None:
            os.close(opened)
