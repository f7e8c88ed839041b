"""The command line: `flexreason NAME` is the module `flexreason.commands.NAME`.

All commands have one form: a docstring, which is the command's help; `add_arguments(parser)`; and `run(options)`, which
returns 0 only where the command did its job, and raises a ValueError about what the user can correct. A command that
leaves something behind when it is stopped has `when_stopped(options)`, which says what.
"""

import argparse
import atexit
import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from flexreason.talk import telling
from flexreason.talk.interrupt import resend_ignored_interrupts
from flexreason.talk.nearest import did_you_mean
from flexreason.talk.parsing import Parser

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

DONE, WRONG, TO_CORRECT, STOPPED = 0, 1, 2, 130

EXIT_CODES = {
    DONE: "it did its job",
    WRONG: "it found that something is wrong: not exact, refused, no number; or it failed, and shows where",
    TO_CORRECT: "it was given something wrong: an option, a setting, a file. One line says it; refused data are listed",
    STOPPED: "it was stopped by Ctrl-C. One line says what is left to go on from",
}

NOTHING_KEPT = "nothing was written, and the same command begins anew"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 only when it did its job."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = next((word for word in words if word in COMMANDS), None)
    was_stopped: list[bool] = []
    if arguments is None:
        atexit.register(_leave, was_stopped)  # first of all, and so it is the last to be called
        resend_ignored_interrupts()
    title, options = f"flexreason {name or ''}".strip(), argparse.Namespace()
    try:
        with telling.of(title):
            with telling.stage("importing torch and transformers") as importing:
                importing.pause = 8.0  # every command begins so: it is worth a plain line only where it is slow
                options = parse(words, name)
            code = command(options.command).run(options)
            if sys.stdout is not None:
                sys.stdout.flush()  # while it can still be told that nobody reads it, or that there is no room for it
            return code
    except KeyboardInterrupt:
        was_stopped.append(True)
        if arguments is None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # another one would only stop this one line
        if os.environ.get("RANK", "0") == "0":
            print(f"{title}: stopped; {what_is_left(options)}", file=sys.stderr)
        return STOPPED
    except BrokenPipeError:  # whoever read the output, such as head, has gone
        _write_nowhere(sys.stdout)
        return WRONG
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("transformers", "torch"):
            raise
        older = "this flexreason may be older than what it stands on: pip install --upgrade flexreason"
        print(f"{title}: {error}; {older}", file=sys.stderr)
        return TO_CORRECT
    except (ValueError, OSError, NotImplementedError) as error:
        print(f"{title}: {error}", file=sys.stderr)
        return TO_CORRECT
    finally:
        if arguments is None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done, and Python's own end is no moment to stop at


def _leave(was_stopped: list[bool]) -> None:
    """Leave without a word, and with our exit code. Python would complain of what it cannot write, and end by a signal
    where a Ctrl-C came while C code ran Python code, though it was caught in the end."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError, AttributeError):  # it was closed, or there never was one
            try:
                stream.flush()
            except OSError:
                _write_nowhere(stream)
    if was_stopped:
        if util := sys.modules.get("multiprocessing.util"):  # who imported it before us has it end too late
            util._exit_function()
        os._exit(STOPPED)


def _write_nowhere(stream: Any) -> None:
    """Let what is left of a stream go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def parse(words: list[str], name: str | None) -> argparse.Namespace:
    """The options of a command. Raises SystemExit where they are wrong, or where help or versions are all that is
    asked."""
    codes = "\n".join(f"  {code:<5}{meaning}" for code, meaning in EXIT_CODES.items())
    parser = Parser(
        prog="flexreason",
        description="Train on every turn of a multi-turn reasoning conversation in one pass.\n\n    flexreason show",
        epilog=f"exit codes:\n{codes}\n\nflexreason COMMAND --help tells more, with examples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Versions, help="show what a report of a fault needs, and exit")
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    of_commands = {known: parsers.add_parser(known, help=purpose) for known, purpose in COMMANDS.items()}
    if name is None:
        if wrong := next((word for word in words if not word.startswith("-")), None):
            parser.error(f"unknown command {wrong!r}{did_you_mean(wrong, COMMANDS)}")
        parser.refuse_unknown(words)
    else:  # the others are not even imported: transformers takes seconds
        at = words.index(name)
        parser.refuse_unknown(words[:at])
        of_commands[name].formatter_class = argparse.RawDescriptionHelpFormatter
        of_commands[name].description = command(name).__doc__
        command(name).add_arguments(of_commands[name])
        of_commands[name].refuse_unknown(words[at + 1 :])
    options, left = parser.parse_known_args(words)
    if left:
        of_commands[options.command].error(f"too many words: {' '.join(left)}")
    return options


class _Versions(argparse.Action):
    """What --version does."""

    def __init__(self, **about: Any) -> None:
        super().__init__(**{**about, "nargs": 0, "dest": argparse.SUPPRESS, "default": argparse.SUPPRESS})

    def __call__(self, *about: Any) -> NoReturn:
        from flexreason.talk.versions import lines

        print("\n".join(lines()))
        raise SystemExit(DONE)


def what_is_left(options: argparse.Namespace) -> str:
    """What is there to go on from when a command was stopped."""
    if not vars(options):  # before it had begun
        return NOTHING_KEPT
    when_stopped = getattr(command(options.command), "when_stopped", None)
    try:
        return str(when_stopped(options)) if when_stopped else NOTHING_KEPT
    except ValueError:  # what it was given is wrong, and it had not come to that yet
        return NOTHING_KEPT


def command(name: str) -> Any:
    """The module of a command."""
    return importlib.import_module(f"flexreason.commands.{name}")


if __name__ == "__main__":
    sys.exit(main())
