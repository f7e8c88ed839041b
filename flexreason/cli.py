"""The command line: `flexreason COMMAND`. Each command is a module with `add_arguments` and `run`."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

import flexreason

COMMANDS = {  # a module of flexreason.commands, and what it is for
    "bench": "time one pass against the N samples on your own machine, model and data",
    "demo": "train a small model from scratch in single passes, and let it answer",
    "models": "tell which models take rows exactly, or one model by name, path or class",
    "report": "say what is in your data, what one pass saves on it, and what is refused",
    "show": "lay out one conversation, a small one or yours, and draw its mask",
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
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    given = list(sys.argv[1:] if arguments is None else arguments)
    chosen = next((word for word in given if word in COMMANDS), None)
    for name, help_text in COMMANDS.items():
        if name == chosen:  # the others are not even imported: transformers takes seconds
            made = importlib.import_module(f"flexreason.commands.{name}")
            made.add_arguments(commands.add_parser(name, help=help_text, description=made.__doc__))
        else:
            commands.add_parser(name, help=help_text)
    options = parser.parse_args(given)
    try:
        return importlib.import_module(f"flexreason.commands.{options.command}").run(options)
    except BrokenPipeError:  # whoever read the output, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ValueError as error:
        print(f"flexreason {options.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
