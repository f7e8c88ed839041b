"""What the pages say is so: their blocks run, their commands are taken, their links lead somewhere.

Blocks of `pycon` are run by pytest itself, as doctests. Here are the others: shell commands, scripts that the tutorial
has its reader write, the README's loops, and tables that are made from something.
"""

import argparse
import ast
import contextlib
import io
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import flexreason as fr
from flexreason.cli import COMMANDS, command, main
from flexreason.demo import material
from flexreason.proof.float64 import true_float64
from models import tiny

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]

FENCED = re.compile(r"^```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page):
    """Kind, title and text of a page's fenced blocks."""
    return FENCED.findall((ROOT / page).read_text())


# --- every page


def commands_of(page):
    """Commands a reader is told to give, each in one line; a line that is not finished goes on in the next."""
    lines = [line for kind, _, text in blocks(page) if kind in ("", "sh") for line in text.splitlines()]
    found = []
    for line in lines:
        if found and (found[-1].count('"') % 2 or found[-1].endswith("\\")):
            found[-1] = found[-1].removesuffix("\\") + line
        elif re.match(r"(\w+=\S+ )*(flexreason(?= [a-z]+( |$))|torchrun|python|make|pip|git|cd|\.) ", line):
            found.append(line)
    return found


def check_command(line):
    """As far as can be told without running it: every option is one, every script and target is there."""
    words = shlex.split(line, comments=True)
    if "&&" in words:
        at = words.index("&&")
        check_command(shlex.join(words[:at]))
        return check_command(shlex.join(words[at + 1 :]))
    while re.match(r"\w+=", words[0]):
        words.pop(0)
    if "flexreason" in words and words[0] not in ("pip", "cd", "git"):
        name, *given = words[words.index("flexreason") + 1 :]
        assert name in COMMANDS, line
        parser = argparse.ArgumentParser(exit_on_error=False)
        command(name).add_arguments(parser)
        parser.parse_args(given)
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets), line
    else:
        for word in words:
            if word.startswith(("examples/", "benchmarks/", "tests/")):
                assert (ROOT / word).exists(), line
    return None


@pytest.mark.parametrize("page", NAMES)
def test_commands_are_such_as_are_taken(page):
    for line in commands_of(page):
        check_command(line)


def test_a_command_that_is_none_is_noticed():
    for wrong in ("flexreason trian x", "make nothing", "python examples/none.py", "cd x && make nothing"):
        with pytest.raises(AssertionError):
            check_command(wrong)
    with pytest.raises((SystemExit, argparse.ArgumentError)):
        check_command("torchrun --nproc-per-node 2 -m flexreason train --no-such-option 3")
    assert sum(len(commands_of(page)) for page in NAMES) > 30


@pytest.mark.parametrize("page", NAMES)
def test_blocks_are_of_kinds_that_are_run_or_read(page):
    """`pycon` runs as a doctest; `python` is read here, and run below or in tests/test_examples.py."""
    for kind, _, text in blocks(page):
        assert kind in ("", "sh", "pycon", "python", "yaml", "json", "text"), (kind, text[:80])
        if kind == "python":
            ast.parse(text)
        if kind == "json":
            json.loads(text)
        assert kind == "pycon" or not text.startswith(">>> "), "no doctest finds its end"


def anchors(path):
    """What a heading is called in a link, as mkdocs and code hosts say it."""
    text = FENCED.sub("", path.read_text())
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", NAMES)
def test_links_lead_to_files_and_headings_that_are_there(page):
    path = ROOT / page
    for target, _, anchor in re.findall(r"\]\((?!\w+:)([^)\s#]*)(#([^)\s]+))?\)", FENCED.sub("", path.read_text())):
        there = (path.parent / target).resolve() if target else path
        assert there.exists(), target
        assert there.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(there), f"{target}#{anchor}"


def test_the_site_has_every_page():
    listed = re.findall(r"^ +- .*: ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = {str(path.relative_to(ROOT / "docs")) for path in PAGES[2:]}
    assert set(listed) == pages | {"index.md", "contributing.md", "results/README.md"}
    assert len(listed) == len(set(listed))


# --- the README


def test_the_loop_of_the_readme_and_what_to_write_instead_have_the_same_gradients():
    _, by_loop, by_row = (text for kind, _, text in blocks("README.md") if kind == "python")
    samples = fr.unmerge(fr.lay_out_turns([([1, 2], [10, 11], [20]), ([3], [12], [21, 22]), ([4], [], [23])]))
    pairs = [(sample.prompt_ids, sample.target_ids) for sample in samples]
    found = []
    for text in (by_loop, by_row):
        model = tiny("Qwen3").double()
        with true_float64():
            exec(text, {"model": model, "samples": pairs, "torch": torch, "F": F, "n_targets": 7})
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert sum(len(targets) for _, targets in pairs) == 7
    assert len(found[0]) > 10
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-9, atol=1e-12)


def test_the_trainer_of_the_readme_trains(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    data, seen = material.make(1, 1, 0), []
    material.save(tmp_path / "model", data)
    material.start(tmp_path / "model", 0, "cpu").save_pretrained(tmp_path / "model" / "start")
    material.save_conversations(tmp_path / "chats.jsonl", data.train)
    text = next(text for kind, _, text in blocks("README.md") if kind == "python")
    for told, here in (
        ("Qwen/Qwen3-0.6B", str(tmp_path / "model" / "start")),
        ('output_dir="runs/sft"', f'output_dir="{tmp_path}", use_cpu=True, max_steps=1, report_to="none"'),
        ("chats.jsonl", str(tmp_path / "chats.jsonl")),
    ):
        assert told in text
        text = text.replace(told, here)
    exec(text, seen := {})
    assert seen["trainer"].state.log_history[-1]["train_loss"] > 1


# --- the tutorial


def spoken(text):
    """Output without figures, and without the time that is left on a slow machine: these depend on it."""
    lines = [re.sub(r"\s+\d+:\d\d left$", "", line) for line in text.splitlines() if line.strip()]
    return [re.sub(r"\d[\d.,e+-]*", "N", line).split() for line in lines]


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """What a reader sees who follows the tutorial in an empty folder: what is shown, and what came."""
    folder, seen, said = tmp_path_factory.mktemp("tutorial"), [], ""
    arguments, path = sys.argv, sys.path[:]
    try:
        with contextlib.chdir(folder):
            for kind, title, text in blocks("docs/tutorial.md"):
                if title:
                    Path(title).write_text(text)
                elif kind == "sh":
                    said = "".join(map(do, text.replace("\\\n", " ").splitlines()))
                elif kind == "text":
                    seen.append((text, said))
    finally:
        sys.argv, sys.path[:] = arguments, path
    return folder, seen


def do(line):
    """Run a line of the shell in this process, and give what it prints."""
    words = shlex.split(line, comments=True)
    printed = io.StringIO()
    if not words or words[0] in ("pip", "git", "cd", "mkdir", "python3", "."):
        return ""  # installing: done already
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        if words[0] == "flexreason":
            assert main(words[1:]) == 0, printed.getvalue()
        else:
            assert words[0] == "python", line
            sys.argv = words[1:]
            runpy.run_path(words[1], run_name="__main__")
    return printed.getvalue()


def test_the_tutorial_shows_what_comes(followed):
    _, seen = followed
    assert len(seen) >= 4
    for shown, came in seen:
        lines = spoken(came)
        for line in spoken(shown):
            assert line == ["..."] or line in lines, (" ".join(line), came)


def test_the_model_of_the_tutorial_has_learned(followed):
    folder, _ = followed
    metrics = json.loads((folder / "runs" / "first" / "run.json").read_text())["metrics"]
    assert metrics["eval_loss"] < 0.2


# --- LoRA and QLoRA


@pytest.mark.filterwarnings("ignore:bitsandbytes.*autograd kernel was not registered:UserWarning")  # of its CPU kernels
def test_qlora_takes_rows_as_the_page_says(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not among the requirements")
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny("Qwen3", hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path)  # in blocks of 64
    [block] = [text for kind, _, text in blocks("docs/howto/lora.md") if kind == "python" and "4bit" in text]
    layouts = [fr.lay_out_turns([([1, 2], [10, 11], [20]), ([3], [12], [21, 22])])]
    given = {"name": str(tmp_path), "layouts": layouts, "fr": fr, "peft": peft}
    given |= {"AutoModelForCausalLM": AutoModelForCausalLM, "BitsAndBytesConfig": BitsAndBytesConfig}
    exec(block.replace('device_map="auto"', 'device_map="cpu"'), given)
    given["model"](**fr.collate(layouts)).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in given["model"].parameters())


# --- tables


@pytest.mark.parametrize(("heading", "verdict"), [("## Supported", "exact"), ("## Not supported", "refused")])
def test_models_at_a_glance_are_those_of_the_list(heading, verdict):
    text = (ROOT / "docs" / "models-at-a-glance.md").read_text()
    part = text[text.index(heading) :].partition("\n## ")[0]
    known = json.loads((ROOT / "flexreason" / "proof" / "models.json").read_text())["models"]
    names = re.findall(r"`(\w+(?:CausalLM|HeadModel))`", part)
    assert len(names) > 20
    assert {name: known[name]["verdict"] for name in names} == dict.fromkeys(names, verdict)


def test_the_commands_at_a_glance_are_those_there_are():
    text = (ROOT / "docs" / "commands.md").read_text()
    assert dict(re.findall(r"^\| `flexreason (\w+)` \| (.*?) \|", text, re.MULTILINE)) == COMMANDS
