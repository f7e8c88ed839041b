"""The command line as a user meets it."""

import subprocess
import sys

import pytest

import flexreason
from flexreason.cli import COMMANDS, main


def test_the_command_is_installed():
    done = subprocess.run([sys.executable, "-m", "flexreason", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"flexreason {flexreason.__version__}\n"


def test_an_unknown_command_is_no_success():
    with pytest.raises(SystemExit) as stop:
        main(["dance"])
    assert stop.value.code == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_it_is_for(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: flexreason {command} " in capsys.readouterr().out
