"""The command line: `flexreason NAME` is the module `flexreason.commands.NAME`.

All commands have one form: a docstring, which is the command's help; `add_arguments(parser)`; and `run(options)`, which
returns 0 only where the command did its job, and raises a ValueError about what the user can mend.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import flexreason

COMMANDS = {  # what each is for
    "bench": "time one pass against the N samples on your own machine, model and data",
    "demo": "train a small model from scratch in single passes, and let it answer",
    "models": "tell which models take rows exactly, or one model by name, path or class",
    "report": "say what is in your data, what one pass saves on it, and what is refused",
    "show": "show what is trained on in your conversations, in the terminal or as one page",
    "template": "say what a chat template does with reasoning, and show samples",
    "train": "train a model on every turn of your conversations",
    "verify": "hold one pass against the N samples on your own model and data",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 only when it did its job."""
    parser = argparse.ArgumentParser(
        prog="flexreason", description="Train on every turn of a multi-turn reasoning conversation in one pass."
    )
    parser.add_argument("--version", action="version", version=f"flexreason {flexreason.__version__}")
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    words = list(sys.argv[1:] if arguments is None else arguments)
    chosen = next((word for word in words if word in COMMANDS), None)
    for name, purpose in COMMANDS.items():
        of_command = parsers.add_parser(name, help=purpose)
        if name == chosen:  # the others are not even imported: transformers takes seconds
            of_command.description = command(name).__doc__
            command(name).add_arguments(of_command)
    options = parser.parse_args(words)
    try:
        return command(options.command).run(options)
    except BrokenPipeError:  # whoever read the output, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ValueError as error:
        print(f"flexreason {options.command}: {error}", file=sys.stderr)
        return 2


def command(name: str) -> Any:
    """The module of a command."""
    return importlib.import_module(f"flexreason.commands.{name}")


if __name__ == "__main__":
    sys.exit(main())
