"""The command line as a user meets it."""

import subprocess
import sys

import pytest
import torch

import flexreason
from flexreason.cli import main
from flexreason.mask import interval_rule


def test_demo_draws_a_conversation_and_shows_that_one_pass_is_exact(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.split("index", 1)[1].splitlines()[1:7]] == [
        "token", "turn", "role", "position", "until", "target",
    ]  # fmt: skip
    assert max(map(len, out.splitlines())) <= 104
    assert "     bot ████························" in out
    losses = [line.split()[-1] for line in out.splitlines() if line.startswith(("  N samples", "  single pass"))]
    assert len(losses) == 2
    assert losses[0] == losses[1]
    assert "the same loss and the same gradients" in out


def test_demo_fails_when_the_single_pass_is_wrong(capsys, monkeypatch):
    """Here: every token sees all before it."""
    plain = interval_rule
    monkeypatch.setattr("flexreason.mask.interval_rule", lambda until: plain(torch.full_like(until, len(until))))
    assert main(["demo"]) == 1
    assert "NOT the same" in capsys.readouterr().out


def test_the_command_is_installed():
    done = subprocess.run([sys.executable, "-m", "flexreason", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"flexreason {flexreason.__version__}\n"


def test_an_unknown_command_is_no_success():
    with pytest.raises(SystemExit) as stop:
        main(["dance"])
    assert stop.value.code == 2
