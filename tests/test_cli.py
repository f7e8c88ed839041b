"""The command line as a user meets it."""

import argparse
import inspect
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import flexreason
from flexreason.bench.measure import measure
from flexreason.cli import COMMANDS, EXIT_CODES, command, main
from flexreason.commands.models import find
from terminal import command_of, in_pipe
from training import environment, write_data, write_model

DOCS = Path(flexreason.__file__).parents[1] / "docs"

QUIET = {**environment(), "FLEXREASON_PROGRESS": "off"}
"""For commands whose stderr is compared: on a busy machine importing is told of."""


def test_the_version_is_what_a_report_of_a_fault_needs():
    done = subprocess.run([sys.executable, "-m", "flexreason", "--version"], capture_output=True, text=True, check=True)
    told = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert told["flexreason"] == flexreason.__version__
    assert told["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert torch.__version__.startswith(told["torch"])  # which may add what it was built for
    assert told["transformers"] == transformers.__version__
    assert {"trl", "peft", "accelerate"} < told.keys()
    assert ("cpu" in told["device"]) != torch.cuda.is_available()


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
    said = capsys.readouterr().out
    assert f"usage: flexreason {name} " in said
    assert all(f"    {example}\n" in said for example in examples(name))


def test_what_the_user_can_mend_is_one_line_and_2(monkeypatch, capsys):
    for kind in (ValueError, FileNotFoundError, NotImplementedError):

        def run(options, kind=kind):
            raise kind("--data: there is no such file")

        monkeypatch.setattr(command("show"), "run", run)
        assert main(["show"]) == 2
        assert capsys.readouterr().err == "flexreason show: --data: there is no such file\n"


def test_only_the_command_that_is_asked_for_is_imported():
    code = "import sys\nfrom flexreason.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "print(*sorted(name for name in sys.modules if name.startswith('flexreason.commands.')))"
    for words, imported in (["--help"], ""), (["demo", "--help"], "flexreason.commands.demo"):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == imported


def test_help_is_there_before_torch_is():
    code = "import sys\nfrom flexreason.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


# --- examples


def examples(name):
    """The command lines in a command's help."""
    return re.findall(r"^    (flexreason .*)$", command(name).__doc__, re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Everything that examples name, small: a model under the name of a larger one, its tokenizer, and data."""
    from datasets import Dataset

    from flexreason.load import load_model

    folder = tmp_path_factory.mktemp("examples")
    named = write_model(folder / "Qwen" / "Qwen3-0.6B")
    load_model(str(named), "float32", "cpu", 0, False)[0].save_pretrained(named)
    (folder / "config.json").write_text((named / "config.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(named)
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "chat_template.jinja").write_text(tokenizer.chat_template)
    write_data(folder / "chats.jsonl", n=20)
    lines = [json.loads(line) for line in (folder / "chats.jsonl").read_text().splitlines()]
    Dataset.from_list(lines).to_parquet(folder / "more.parquet")
    settings = {"model": "Qwen/Qwen3-0.6B", "data": "chats.jsonl", "output": "runs/file", "length": 256}
    (folder / "config.yaml").write_text(json.dumps(settings))
    return folder


LONG = {"flexreason demo"}
"""Examples that take minutes, and are run by tests of their own."""


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # peft asks for it by its old name
@pytest.mark.parametrize("line", [line for name in COMMANDS for line in examples(name) if line not in LONG])
def test_every_example_runs_as_it_stands(line, folder, monkeypatch, capsys):
    """But for repeats: what is timed is timed once."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("flexreason.commands.bench.measure", lambda case, ways, repeats: measure(case, ways, 1))
    assert main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    assert said.out or said.err  # where figures are all for people, as of train, they go to stderr


def test_every_command_has_an_example_that_is_run():
    assert all(set(examples(name)) - LONG for name in COMMANDS)


# --- near misses


def refused(words, capsys):
    """What is said of a wrong command line, in one line."""
    try:
        code = main(words)
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    assert code == 2
    assert said.out == ""
    [line] = said.err.splitlines()
    return line


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("train --learning_rate 1e-4", "unknown option --learning_rate; did you mean --learning-rate?"),
        ("train --lr 1e-4", "unknown option --lr; did you mean --learning-rate?"),
        ("train --lr=1e-4", "unknown option --lr; did you mean --learning-rate?"),
        ("train --num_train_epochs 2", "did you mean --epochs?"),
        ("train --max_grad_norm 1", "did you mean --clip?"),
        ("train --output_dir x", "did you mean --output?"),
        ("train --gradient_checkpointing", "did you mean --checkpointing?"),
        ("train --per_device_train_batch_size 2", "did you mean --rows-per-step?"),
        ("verify --lenght 3", "unknown option --lenght; flexreason verify --help tells what it takes"),
        ("verify --dtpye bfloat16", "did you mean --dtype?"),
        ("verify --model m", "MODEL is given without a name, as flexreason verify MODEL"),
        ("verify", "missing: model; flexreason verify --help tells what it takes"),
        ("verify a b", "too many words: b"),
        ("verify m --tokens many", "--tokens: expected a whole number, found 'many'"),
        ("verify m --data d --history tempalte", "found 'tempalte'; did you mean 'template'?"),
        ("bench m --ways one-by-on", "found 'one-by-on'; did you mean 'one-by-one'?"),
        ("bench m --turns 3", "unknown option --turns; did you mean --shape?"),
        ("bench m --lengths 64/256/64", "unknown option --lengths; did you mean --shape?"),
        ("bench m --tokens 512", "unknown option --tokens; did you mean --length?"),
        ("template t --messages chat.json", "unknown option --messages; did you mean --data?"),
        ("template --tokenizer t", "TOKENIZER_OR_JINJA is given without a name"),
        ("report -x", "unknown option -x"),
        ("tarin config.yaml", "unknown command 'tarin'; did you mean 'train'?"),
        ("--verison", "unknown option --verison; did you mean --version?"),
    ],
)
def test_what_was_probably_meant_is_said(words, meant, capsys):
    assert meant in refused(words.split(), capsys)


def test_a_model_that_is_nearly_named_is_told_at_once(capsys, monkeypatch):
    from flexreason.talk import sources

    monkeypatch.setattr(sources, "unreachable", lambda: pytest.fail("a hub was asked in vain"))
    for wrong in ("qwen3", "Qwen-3", "qwen3forcausallm", "Qwen3ForCasualLM"):
        assert refused(["models", wrong], capsys).endswith("did you mean Qwen3ForCausalLM?")
    assert "Qwen3ForCausalLM is a class" in refused(["verify", "qwen3"], capsys)


def test_names_that_a_hub_may_know_are_not_refused_for_a_class_that_is_like_them(monkeypatch):
    from flexreason.talk import sources

    monkeypatch.setattr(sources, "unreachable", lambda: "")
    for name in ("gpt2", "gpt2-medium", "distilgpt2", "roberta-base", "bert-base-uncased", "Qwen/Qwen3-0.6B"):
        assert sources.why_missing(name) == ""


def test_a_hub_that_does_not_answer_is_asked_twice_and_not_for_ever(monkeypatch, capsys):
    from huggingface_hub import constants

    asked = []

    class Silent:
        def head(self, *about, **more):
            asked.append(more["timeout"])
            raise ConnectionError

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", Silent)
    with pytest.raises(ValueError, match="no hub can be asked"):
        find("Qwen/none-of-this-name")
    assert len(asked) == 2
    assert all(asked)


def test_files_that_are_nearly_named_are_told(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for words, meant in (
        ("train confg.yaml", "config.yaml"),
        ("report chat.jsonl --tokenizer ./tokenizer", "chats.jsonl"),
        ("report chats.jsonl --tokenizer ./tokeniser", "tokenizer"),
        ("verify ./confgi.json", "config.json"),
        ("verify Qwen/Qwen3-0.6", "Qwen/Qwen3-0.6B"),
        ("template ./chat_templates.jinja", "chat_template.jinja"),
        ("template ./tokenizer --data chats.json", "chats.jsonl"),
    ):
        assert f"did you mean {meant}?" in refused(words.split(), capsys), words


MISTAKES = {  # a command, and what its one line says
    "verify nothing": "there is no config.json in that folder",
    "bench kind.json": "model type `qwen33`",
    "models kind.json": "model type `qwen33`",
    "report chats.jsonl --tokenizer tokenizer --model kind.json": "model type `qwen33`",
    "report chats.jsonl --tokenizer nothing": "there is no tokenizer in that folder",
    "report chats.jsonl --tokenizer word.txt": "cannot be loaded as a tokenizer",
    "template word.txt": "cannot be loaded as a tokenizer",
    "train --model nothing --data chats.jsonl --output runs/x": "there is no tokenizer in that folder",
    "train chats.jsonl": "expected lines of NAME: VALUE, and data as --data FILE",
    "report word.parquet --tokenizer tokenizer": "no Parquet file: expected PAR1",
    "report chats.jsonl.gz --tokenizer tokenizer": "compressed files are not read; unpack it",
    "report chats.jsonl --tokenizer tokenizer --refused chats.jsonl": "chats.jsonl holds the data",
    "report data --tokenizer tokenizer --refused data/sub/refused.jsonl": "is inside the data, data",
    "report chats.jsonl --tokenizer tokenizer --html nothing": "--html: nothing cannot be written: Is a directory",
    "report chats.jsonl --tokenizer tokenizer --html /proc/x.html": "--html: /proc/x.html cannot be written",
    "report chats.jsonl --tokenizer tokenizer --plot x.xyz": "--plot: expected a name that ends in .png, .svg or .pdf",
    "show chats.jsonl --tokenizer tokenizer --html chats.jsonl": "chats.jsonl holds the data",
    "show --svg nothing": "--svg: nothing cannot be written: Is a directory",
    "demo --output word.txt/x": "--output: word.txt/x cannot be written to: Not a directory",
}


@pytest.fixture
def mistaken(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "nothing").mkdir(exist_ok=True)
    (folder / "data" / "sub").mkdir(parents=True, exist_ok=True)
    (folder / "data" / "chats.jsonl").write_text((folder / "chats.jsonl").read_text())
    (folder / "kind.json").write_text('{"model_type": "qwen33"}')
    for name in ("word.txt", "word.parquet", "chats.jsonl.gz"):
        (folder / name).write_text("hello world")
    return folder


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_told_in_one_line_and_nothing_is_lost(line, mistaken, capsys):
    before = {path: path.read_bytes() for path in mistaken.rglob("*") if path.is_file()}
    assert MISTAKES[line] in refused(shlex.split(line), capsys)
    assert {path: path.read_bytes() for path in mistaken.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("words", "code"), [("template chat_template.jinja", 1), ("--help", 0)])
def test_whoever_stops_reading_hears_no_more(words, code, folder):
    """However little there is to write: what waits until the end is noticed there, too."""
    process = subprocess.Popen(
        command_of(words.split()), cwd=folder, env=QUIET, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(120) == code
    process.stderr.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_what_finds_no_room_is_told(folder):
    with open("/dev/full", "w") as full:
        words = command_of(["template", "chat_template.jinja"])
        done = subprocess.run(words, cwd=folder, env=QUIET, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "flexreason template: [Errno 28] No space left on device\n")


# --- exit codes


def test_exit_codes_are_in_the_help_and_in_the_docs(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said, docs = capsys.readouterr().out, (DOCS / "errors.md").read_text()
    for code, meaning in EXIT_CODES.items():
        assert f"  {code:<5}{meaning}\n" in said
        assert f"| {code} | {meaning} |\n" in docs


def test_every_exit_code_is_given_by_a_real_command(folder, tmp_path):
    """Further ones of the same code are tested without a process each, and 130 in test_interrupt.py."""
    model, data = str(folder / "Qwen" / "Qwen3-0.6B"), str(folder / "chats.jsonl")
    empty = tmp_path / "none.jsonl"
    empty.write_text('{"messages": [{"role": "user", "content": "?"}]}\n')
    for code, words in (
        (0, ["template", model]),
        (1, ["report", data, str(empty), "--tokenizer", model]),
        (2, ["train", "--lr", "1"]),
    ):
        assert in_pipe(command_of(words)).code == code, words


def test_what_transformers_no_longer_has_is_told_in_words(monkeypatch, capsys):
    def run(options):
        from transformers import ThereWasOnceSuchAThing  # noqa: F401

    monkeypatch.setattr(command("show"), "run", run)
    assert main(["show"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "ThereWasOnceSuchAThing" in line
    assert "pip install --upgrade flexreason" in line


def test_roles_that_are_nearly_named_are_told(folder, monkeypatch, tmp_path, capsys):
    for wrong, meant in (("assistent", "assistant"), ("bot", "assistant"), ("human", "user"), ("User", "user")):
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        messages.insert(0 if meant == "user" else 1, {"role": wrong, "content": "."})
        path = tmp_path / "chats.jsonl"
        path.write_text(json.dumps({"messages": messages}) + "\n")
        assert main(["report", str(path), "--tokenizer", str(folder / "tokenizer")]) == 1
        assert f"did you mean {meant!r}?" in capsys.readouterr().out


def parser_of(name):
    parser = argparse.ArgumentParser()
    command(name).add_arguments(parser)
    return parser


def test_options_of_a_template_are_given_alike_in_every_command():
    """train, which has them as a setting, takes them as the others do, too."""
    from flexreason.train.settings import from_options

    needed = ["--model", "m", "--data", "d", "--output", "o"]
    given = ["--template", "{a: 1, b: 2}", "--option", "b=3", "--option", "c=true"]
    assert from_options(parser_of("train").parse_args([*needed, *given])).template == {"a": 1, "b": 3, "c": True}
    for name in ("verify", "bench", "report", "template", "train"):
        assert "--option" in parser_of(name)._option_string_actions, name


@pytest.mark.parametrize("name", COMMANDS)
def test_figures_are_there_as_json(name):
    assert "--json" in parser_of(name)._option_string_actions


def test_an_option_takes_the_same_in_every_command():
    """One word for one thing: a number here and a name there would be two."""
    from flexreason.train.settings import NAMES

    kinds = {}
    for name in COMMANDS:
        for action in parser_of(name)._actions:
            kind = "nothing" if action.nargs == 0 else "a number" if action.type is int else "a text"
            if name == "train" and action.dest in NAMES and kind != "nothing":
                kind = "a number" if NAMES[action.dest].type in (int, int | None) else "a text"
            for option in action.option_strings:
                kinds.setdefault(option, {}).setdefault(kind, []).append(name)
    assert {option: found for option, found in kinds.items() if len(found) > 1} == {}


def test_every_command_that_takes_data_takes_the_same():
    """Where they are, of which format, how they become samples; train has more to say of each."""
    of_data = {"--data", "--format", "--split", "--history", "--option", "--accept"}
    taking = []
    for name in COMMANDS:
        options = parser_of(name)._option_string_actions
        if "--data" in options:
            taking.append(name)
            assert of_data <= options.keys(), name
    assert taking == ["bench", "report", "show", "template", "train", "verify"]
