"""The command line as a user meets it."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import flexreason
from flexreason.cli import COMMANDS, command, main


def test_the_command_is_installed():
    done = subprocess.run([sys.executable, "-m", "flexreason", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"flexreason {flexreason.__version__}\n"


def test_an_unknown_command_is_no_success():
    with pytest.raises(SystemExit) as stop:
        main(["dance"])
    assert stop.value.code == 2


def test_a_command_is_a_module_of_commands_and_the_other_way_round():
    folder = Path(flexreason.__file__).parent / "commands"
    assert {path.stem for path in folder.glob("*.py")} - {"__init__"} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_one_form(name):
    module = command(name)
    assert module.__doc__
    assert list(inspect.signature(module.add_arguments).parameters) == ["parser"]
    assert list(inspect.signature(module.run).parameters) == ["options"]
    assert inspect.signature(module.run).return_annotation is int


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_is_for(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: flexreason {name} " in capsys.readouterr().out


def test_what_the_user_can_mend_is_one_line_and_2(monkeypatch, capsys):
    def run(options):
        raise ValueError("--data: there is no such file")

    monkeypatch.setattr(command("show"), "run", run)
    assert main(["show"]) == 2
    assert capsys.readouterr().err == "flexreason show: --data: there is no such file\n"


def test_only_the_command_that_is_asked_for_is_imported():
    code = "import sys\nfrom flexreason.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "print(*sorted(name for name in sys.modules if name.startswith('flexreason.commands.')))"
    for words, imported in (["--help"], ""), (["demo", "--help"], "flexreason.commands.demo"):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == imported
