"""The command line: `flexreason COMMAND`. Each command is a module with `add_arguments` and `run`."""

import argparse
import importlib
import sys
from collections.abc import Sequence

import flexreason

COMMANDS = {"demo": "see one conversation laid out, and its single pass beside the N samples"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 only when it did its job."""
    parser = argparse.ArgumentParser(
        prog="flexreason", description="Train on every turn of a multi-turn reasoning conversation in one pass."
    )
    parser.add_argument("--version", action="version", version=f"flexreason {flexreason.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {name: importlib.import_module(f"flexreason.{name}") for name in COMMANDS}
    for name, help_text in COMMANDS.items():
        modules[name].add_arguments(commands.add_parser(name, help=help_text, description=modules[name].__doc__))
    options = parser.parse_args(arguments)
    try:
        return modules[options.command].run(options)
    except ValueError as error:
        print(f"flexreason {options.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
