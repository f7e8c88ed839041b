"""Train on every turn of every conversation in one pass: from data and a model to a trained checkpoint.

    flexreason train config.yaml
    flexreason train --model Qwen/Qwen3-0.6B --data chats.jsonl --output runs/first --lora 16
    torchrun --nproc-per-node 8 -m flexreason train config.yaml

Settings come from the file, from options, or from both: options go first. A run that was stopped goes on when the same
command is given again. Ctrl-C stops it after the step that it is at, with a checkpoint; a second one stops it at once.
"""

import argparse
import importlib.util
import json
import sys

from flexreason.train.settings import add_options, from_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", help="a YAML file of settings")
    add_options(parser)
    parser.add_argument(
        "--option", action="append", metavar="NAME=VALUE", help="of the template, as other commands say"
    )
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")


def check_installed() -> None:
    """Training takes packages that the rest does without."""
    if missing := [name for name in ("accelerate", "datasets") if importlib.util.find_spec(name) is None]:
        raise ValueError(f"training needs {' and '.join(missing)}: pip install 'flexreason[train]'")


def run(options: argparse.Namespace) -> int:
    settings = from_options(options)
    check_installed()
    from flexreason.train.run import train  # transformers' Trainer takes seconds to import
    from flexreason.train.trainer import Broken

    try:
        outcome = train(settings)
    except Broken as error:
        print(f"flexreason train: {error}", file=sys.stderr)
        return 1
    if options.json:
        said = {"folder": str(outcome.folder), "steps": outcome.steps, "metrics": outcome.metrics}
        print(json.dumps({**said, "losses": outcome.losses, "seconds": outcome.seconds}))
    return 0


def when_stopped(options: argparse.Namespace) -> str:
    from flexreason.train.record import what_is_left

    return what_is_left(from_options(options))
