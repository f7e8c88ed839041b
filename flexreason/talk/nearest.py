"""What was probably meant: the nearest right name to a wrong one, for names of any kind, options and files."""

import difflib
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

AS_ELSEWHERE = {  # what transformers' Trainer, trl or other tools call it, or what it was called here
    "lr": "learning_rate",
    "lr_scheduler_type": "schedule",
    "scheduler": "schedule",
    "max_grad_norm": "clip",
    "save_steps": "save_every",
    "eval_steps": "evaluate_every",
    "logging_steps": "log_every",
    "save_total_limit": "keep",
    "per_device_train_batch_size": "rows_per_step",
    "gradient_accumulation_steps": "rows_per_step",
    "batch_size": "rows_per_step",
    "max_seq_length": "length",
    "bf16": "precision",
    "fp16": "precision",
    "attn_implementation": "backend",
    "train_file": "data",
    "messages": "data",
    "tokens": "length",
    "turns": "shape",
    "lengths": "shape",
    "eval_dataset": "evaluation",
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "function": "tool",
}


def nearest(name: Any, known: Iterable[str], closeness: float = 0.6) -> str | None:
    """The nearest of the known names: but for case, dashes and underscores the same; by another tool's word for it; the
    same words among more; or nearly the same letters, as near as `closeness` says.

    >>> options = ["learning_rate", "epochs", "length", "save_every"]
    >>> [nearest(name, options) for name in ("Learning-Rate", "lr", "num_train_epochs", "lenght", "colour")]
    ['learning_rate', 'learning_rate', 'epochs', 'length', None]
    """
    if not isinstance(name, str):
        return None
    plainly = {_plain(one): one for one in known}
    asked = _plain(name)
    elsewhere = AS_ELSEWHERE.get(asked, asked)
    for one in (asked, elsewhere):
        if one in plainly:
            return plainly[one]
    words = set(asked.split("_"))
    if among := [one for one in plainly if set(one.split("_")) <= words]:
        return plainly[max(among, key=len)]
    near = difflib.get_close_matches(asked, plainly, n=1, cutoff=closeness)
    return plainly[near[0]] if near else None


def _plain(name: str) -> str:
    return re.sub(r"[-_\s]+", "_", name.strip("-_ ").lower())


def misspelt(name: str, known: Collection[str], closeness: float = 0.9) -> str | None:
    """The known name that this one is, but for a slip; None for a name of its own, however like another one it is.

    In a short name one slip makes much of a difference, so that such ones need another `closeness`.

    >>> misspelt("enable_thinkng", ["enable_thinking"]), misspelt("thinking", ["enable_thinking"])
    ('enable_thinking', None)
    >>> [misspelt(name, ["history", "turns", "think"], 0.8) for name in ("histroy", "turn", "thinking")]
    ['history', 'turns', None]
    """
    near = [] if name in known else difflib.get_close_matches(_plain(name), known, n=1, cutoff=closeness)
    return near[0] if near else None


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """A hint at the name that is nearest to a wrong one, if any is near."""
    near = nearest(name, known)
    return f"; did you mean {near!r}?" if near else ""


def near_file(path: str | Path) -> str:
    """A hint at the file or folder that is nearest to one that is not there, beside it or one folder further."""
    wanted = Path(path).expanduser()
    folder = wanted.parent
    if not folder.is_dir():
        while not folder.parent.is_dir():
            folder = folder.parent
        return _hint(folder.name, folder.parent) or f"; there is no folder {folder}"
    return _hint(wanted.name, folder)


def _hint(name: str, folder: Path) -> str:
    try:
        there = [path.name for path in folder.iterdir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(name, there, n=1)
    near = near or [other for other in there if Path(other).stem == Path(name).stem][:1]
    return f"; did you mean {folder / near[0]}?" if near else ""
