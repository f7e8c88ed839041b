"""Train a small model from scratch in single passes, and let it answer: arithmetic with follow-ups on earlier answers,
a byte-level tokenizer whose template drops reasoning from history, no download, under three minutes on two cores.

    flexreason demo
    flexreason demo --compare --steps 20 --held-out 5
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flexreason.talk.telling import aside

STEPS, TO_COMPARE = 1400, 1000

MARK = ".flexreason-demo"
"""An empty file in a folder that the demo has made."""

HELD_OUT = 100
"""Conversations that are asked, each of some five questions."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", dest="out", type=Path, default=Path("flexreason-demo"), help="folder for all files (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the data, their order and the first weights")
    parser.add_argument("--steps", type=int, help=f"of training ({STEPS}, or {TO_COMPARE} a way to compare)")
    parser.add_argument(
        "--held-out", type=int, default=HELD_OUT, metavar="N", help="conversations to ask (%(default)s)"
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="so small a model needs no other (%(default)s)"
    )
    parser.add_argument("--compare", action="store_true", help="instead, ways to train at equal steps and data")
    parser.add_argument("--json", action="store_true", help="print one JSON object; what goes on is told on stderr")


def run(options: argparse.Namespace) -> int:
    steps = options.steps
    if steps is None:
        steps = TO_COMPARE if options.compare else STEPS
    for name, value in (("steps", steps), ("held-out", options.held_out)):
        if value < 1:
            raise ValueError(f"--{name}: expected at least 1, found {value}")
    claim(options.out)

    def say(text: str) -> None:
        with aside():
            print(text, file=sys.stderr if options.json else sys.stdout, flush=True)

    asked_for = (options.out, steps, options.held_out, options.seed, options.device, say)
    is_met = True
    with one_thread():  # what follows takes seconds to import
        if options.compare:
            from flexreason.demo.compare import compare

            figures = compare(*asked_for)
        else:
            started = time.perf_counter()
            from flexreason.commands.train import check_installed

            check_installed()
            from flexreason.demo.learn import demo

            figures, goals = demo(*asked_for, started)
            is_met = all(goal.met for goal in goals)
    if options.json:
        print(json.dumps(figures))
    return 0 if is_met else 1


def when_stopped(options: argparse.Namespace) -> str:
    return f"{options.out} is unfinished, and the same command begins anew"


def claim(out: Path) -> None:
    """Make the folder the demo's own: files of an earlier demo are written over, and other files are refused."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--output: expected a folder, found a file: {out}")
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).exists():
        raise ValueError(f"--output: {out} holds files that are not the demo's; give another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / MARK).touch()
    except OSError as error:
        raise ValueError(f"--output: {out} cannot be written to: {error.strerror}; give another folder") from error


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread: so small a model gains little from more, and loses much on a core that is busy."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
