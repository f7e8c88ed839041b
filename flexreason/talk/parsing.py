"""Options of the command line. What is wrong is said in one line, with what was probably meant."""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from flexreason.talk.nearest import did_you_mean, nearest


class Parser(argparse.ArgumentParser):
    """argparse's parser, without its line of usage at every error."""

    def error(self, message: str) -> NoReturn:
        message = re.sub(r": invalid int value: ", ": expected a whole number, found ", message)
        message = message.removeprefix("argument ").replace("the following arguments are required: ", "missing: ")
        hint = "" if message.endswith("?") else f"; {self.prog} --help tells what it takes"
        print(f"{self.prog}: {message}{hint}", file=sys.stderr)
        raise SystemExit(2)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(map(str, action.choices))
            words = f"expected one of {', '.join(known)}, found {value!r}{did_you_mean(value, known)}"
            raise argparse.ArgumentError(action, words)

    def refuse_unknown(self, words: Sequence[str]) -> None:
        """Refuse the first option that there is none of. argparse would first say what else is missing."""
        for word in words:
            if word == "--":
                return
            name = word.partition("=")[0]
            if re.fullmatch(r"--?[A-Za-z][\w-]*", name) and not self._knows(name):
                self.error(f"unknown option {name}{self._meant(name)}")

    def _knows(self, name: str) -> bool:
        """Whether it is an option, or the beginning of one."""
        options = self._option_string_actions
        return name in options or (name.startswith("--") and any(option.startswith(name) for option in options))

    def _meant(self, name: str) -> str:
        options = [option for option in self._option_string_actions if option.startswith("--")]
        if near := nearest(name, options):
            return f"; did you mean {near}?"
        for action in self._actions:
            if not action.option_strings and nearest(name, [action.dest]):
                positional = str(action.metavar or action.dest).upper()
                return f"; {positional} is given without a name, as {self.prog} {positional}"
        return ""
