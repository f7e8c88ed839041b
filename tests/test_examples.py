"""The examples run as commands and take the steps of a loop over the samples; what docs/train.md says is so."""

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import accelerate
import datasets
import peft
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen3Config, TrainingArguments
from trl import SFTConfig, SFTTrainer

import flexreason as fr
from flexreason.cli import main
from flexreason.commands import demo as demo_command
from flexreason.commands import train as train_command
from flexreason.data.documents import weighted
from flexreason.load import stand_in
from flexreason.memory import needed_bytes
from flexreason.proof.float64 import saved_bytes, true_float64
from flexreason.train.arguments import CHECKPOINTING
from flexreason.train.model import with_lora
from flexreason.train.settings import NAMES, from_mapping, from_options, read_yaml
from models import checkpoint, tiny
from training import (
    LEARNING_RATE,
    LENGTH,
    TEMPLATE,
    CollatorAsEver,
    environment,
    fit_by_hand,
    free_port,
    randomized,
    some_layouts,
    steps_of,
    way_gone,
    write_data,
    write_model,
)

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = ["trainer", "sft", "accelerate_loop", "plain"]
GUIDE = (ROOT / "docs" / "train.md").read_text()
GUIDE_OF_SETTINGS = (ROOT / "docs" / "settings.md").read_text()

BY_HAND = {  # what makes a trainer take the steps of `fit_by_hand`
    "optim": "sgd",
    "learning_rate": LEARNING_RATE,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "bf16": False,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def example(name):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def one_process():
    """An Accelerator on the CPU; those of other tests set what all share."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield accelerate.Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def start_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_steps(losses, expected, found, wanted, start, tolerance=1e-8):
    assert losses == pytest.approx(expected, rel=1e-6)  # trainers add them up in float32
    assert len(set(expected)) == len(expected) > 3
    assert way_gone(start_of(found), start_of(wanted), start) <= tolerance


def some_rows(layouts, weighting="token", multiple=3):
    return fr.Rows([weighted(layout, weighting) for layout in layouts], LENGTH, epochs=3, multiple=multiple, seed=3)


# weights of 1 / n are float32
@pytest.mark.parametrize(("weighting", "tolerance"), [("token", 1e-8), ("turn", 1e-6)])
@pytest.mark.parametrize("name", ["plain", "accelerate_loop"])
def test_own_loops_take_the_steps_of_the_loop(name, weighting, tolerance, one_process):
    layouts = some_layouts()
    rows = some_rows(layouts, weighting)
    stock, model = tiny("Qwen3").double(), tiny("Qwen3").double()
    start = start_of(stock)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    given = (model, rows, optimizer) if name == "plain" else (one_process, model, rows, optimizer)
    with true_float64():
        expected = fit_by_hand(stock, steps_of(rows, layouts), weighting)
        losses = example(name).train(*given)
    assert_same_steps(losses, expected, model, stock, start, tolerance)


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_trainer_takes_the_steps_of_the_loop(monkeypatch, tmp_path):
    layouts = some_layouts()
    script = example("trainer")
    monkeypatch.setattr(script, "LENGTH", LENGTH)
    stock, model = tiny("Qwen3").double(), tiny("Qwen3").double()
    start = start_of(stock)
    rows = fr.Rows(layouts, LENGTH, epochs=3, multiple=script.ARGUMENTS["gradient_accumulation_steps"])
    with true_float64():
        expected = fit_by_hand(stock, steps_of(rows, layouts))
        trainer = script.train(model, layouts, str(tmp_path), epochs=3, **BY_HAND)
    assert_same_steps(losses_of(trainer), expected, model, stock, start)


def with_adapters(model):
    """LoRA with weights of their own instead of B = 0, which would leave every gradient of A at 0 at first."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    return randomized(peft.get_peft_model(model, config))


@pytest.mark.parametrize(("kind", "tolerance"), [("RowSFTTrainer", 1e-8), ("SFTTrainer", 1e-5)])
def test_the_sft_trainer_takes_the_steps_of_the_loop(kind, tolerance, monkeypatch, tmp_path):
    """Adapters, rows of four conversations, four rows a step, the last step of two. trl's own trainer will do too where
    it is told what rows need; its loss sums in float32."""
    layouts = some_layouts(40)
    script = example("sft")
    columns = datasets.Dataset.from_list([{name: t.numpy() for name, t in vars(layout).items()} for layout in layouts])
    stock, model = with_adapters(tiny("Qwen3").double()), with_adapters(tiny("Qwen3").double())
    start = start_of(stock)
    given = {**BY_HAND, "num_train_epochs": 2, "train_sampling_strategy": "sequential", CHECKPOINTING: False}
    monkeypatch.setattr(fr.RowSFTTrainer, "get_train_dataloader", in_float64(fr.RowSFTTrainer.get_train_dataloader))
    with true_float64():
        expected = fit_by_hand(stock, [layouts[:16], layouts[16:32], layouts[32:]] * 2)
        if kind == "RowSFTTrainer":
            trainer = script.train(model, columns, str(tmp_path), stand_in(TEMPLATE), None, **given)
        else:
            needed = {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
            trainer = SFTTrainer(
                model=fr.patch(model),
                args=SFTConfig(output_dir=str(tmp_path), **{**script.ARGUMENTS, **given, **needed}),
                train_dataset=columns,
                data_collator=CollatorAsEver(),
                processing_class=stand_in(TEMPLATE),
            )
            trainer.train()
    assert isinstance(trainer, SFTTrainer)
    assert_same_steps(losses_of(trainer), expected, trainer.model, stock, start, tolerance)
    assert ("loss_reasoning" in trainer.state.log_history[0]) == (kind == "RowSFTTrainer")
    if kind == "SFTTrainer":
        [turns] = [weighted(layout, "turn") for layout in layouts[:1]]
        with pytest.raises(ValueError, match="use weights of 1, or the model's own forward"):
            trainer.model(**fr.collate([turns]))


def in_float64(get_train_dataloader):
    """The trainer's loader, with a collator that keeps to the float32 of columns."""

    def get(trainer):
        trainer.data_collator = CollatorAsEver()
        return get_train_dataloader(trainer)

    return get


RANKS = """
import sys, torch
from accelerate import Accelerator
import flexreason as fr
from flexreason.proof.float64 import true_float64
from models import tiny
from test_examples import example, some_rows
from training import LEARNING_RATE, some_layouts

weighting, path = sys.argv[1:]
model = tiny("Qwen3").double()
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
rows = some_rows(some_layouts(), weighting, 4)
with true_float64():
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    losses = example("accelerate_loop").train(accelerator, model, rows, optimizer)
if accelerator.is_main_process:
    torch.save({"losses": losses, "model": model.state_dict()}, path)
accelerator.end_training()
"""


def run_command(*arguments, processes=1):
    """A command in a process of its own, or in several by torchrun, on the CPU."""
    launch = []
    if processes > 1:
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(free_port())]
    path = os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, *launch, *map(str, arguments)],
        env={**os.environ, **environment, "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize(("weighting", "tolerance"), [("token", 1e-8), ("turn", 1e-6)])
def test_two_processes_under_accelerate_take_the_steps_of_the_loop(weighting, tolerance, tmp_path):
    """Two real gloo processes, two rows each a step, some of them empty."""
    (tmp_path / "ranks.py").write_text(RANKS)
    run_command(tmp_path / "ranks.py", weighting, tmp_path / "found.pt", processes=2)
    found = torch.load(tmp_path / "found.pt")
    layouts = some_layouts()
    rows = some_rows(layouts, weighting, 4)
    assert [] in [rows.documents(row) for row in range(len(rows))]
    stock, model = tiny("Qwen3").double(), tiny("Qwen3").double()
    start = start_of(stock)
    model.load_state_dict(found["model"])
    with true_float64():
        expected = fit_by_hand(stock, steps_of(rows, layouts), weighting)
    assert_same_steps(found["losses"], expected, model, stock, start, tolerance)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A small model with weights, its tokenizer, and data."""
    folder = tmp_path_factory.mktemp("material")
    model, data = write_model(folder / "model"), write_data(folder / "data.jsonl", n=160)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).save_pretrained(model)
    return model, data


def loss_of(model, data, adapters=None):
    tokenizer, loaded = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    if adapters:
        loaded = peft.PeftModel.from_pretrained(loaded, adapters)
    layouts = [fr.encode(json.loads(line)["messages"], tokenizer) for line in data.read_text().splitlines()]
    with torch.no_grad():
        return float(fr.patch(loaded)(**fr.collate(layouts)).loss)


@pytest.mark.parametrize("name", SCRIPTS)
def test_examples_run_as_commands_and_leave_a_model(name, material, tmp_path):
    model, data = material
    run_command(EXAMPLES / f"{name}.py", model, data, tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja"} <= files
    before = loss_of(model, data)
    if name == "sft":
        assert "adapter_model.safetensors" in files
        assert loss_of(model, data, tmp_path / "out") < before
    else:
        assert "model.safetensors" in files
        assert loss_of(tmp_path / "out", data) < before


def test_the_accelerate_example_in_two_processes_ends_as_in_one(material, tmp_path):
    model, data = material
    said = {}
    for n in (1, 2):
        said[n] = run_command(EXAMPLES / "accelerate_loop.py", model, data, tmp_path / str(n), processes=n)
    found = {n: [re.findall(r"[\d.]+", line) for line in said[n].splitlines() if "loss" in line] for n in (1, 2)}
    assert len(found[1]) == 2
    assert [line[3] for line in found[1]] == [line[3] for line in found[2]]  # targets
    for one, two in zip(found[1], found[2], strict=True):
        assert float(one[2]) == pytest.approx(float(two[2]), abs=2e-6)
    start, one, two = (load_file(path / "model.safetensors") for path in (model, tmp_path / "1", tmp_path / "2"))
    assert way_gone(two, one, start) < 1e-2  # in fp32, where AdamW makes as much of small gradients as of large


# --- the notebook

needs_nbclient = pytest.mark.skipif(
    importlib.util.find_spec("nbclient") is None, reason="nbclient is among requirements-dev.txt, and not installed"
)


@needs_nbclient
def test_the_notebook_runs_from_top_to_bottom(monkeypatch):
    """What it prints is that one pass is exact, that losses fall, and an answer."""
    import nbformat
    from nbclient import NotebookClient

    for name, value in {**environment(), "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in notebook.cells)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    said = "\n".join(o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs)
    assert "verdict: exact" in said
    assert "<bot>" in said.splitlines()[-1]
    losses = re.findall(r"^(eval_loss\w*) +([\d.]+) -> ([\d.]+)$", said, re.MULTILINE)
    assert len(losses) == 3
    assert all(float(after) < 0.7 * float(before) for _, before, after in losses)


# --- settings

SETTINGS = sorted(path.stem for path in (EXAMPLES / "settings").glob("*.yaml"))

QWEN3 = {  # of the models' configs: width, inner width, layers, heads, and whether the head is the embeddings
    "Qwen/Qwen3-0.6B": (1024, 3072, 28, 16, True),
    "Qwen/Qwen3-8B": (4096, 12288, 36, 32, False),
    "Qwen/Qwen3-32B": (5120, 25600, 64, 64, False),
}


def without_weights(given):
    """The model of some settings, on meta, with its adapters."""
    width, inner, layers, heads, tied = QWEN3[given["model"]]
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=tied,
    )
    dtype = torch.bfloat16 if given["precision"] == "bf16-weights" else torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        return with_lora(model, given["lora"]) if "lora" in given else model


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_say_what_memory_they_take(name):
    text = (EXAMPLES / "settings" / f"{name}.yaml").read_text()
    given = from_mapping(read_yaml(EXAMPLES / "settings" / f"{name}.yaml"))
    assert given.checkpointing
    model = without_weights(read_yaml(EXAMPLES / "settings" / f"{name}.yaml"))
    needed = needed_bytes(model, given.length)
    assert f"Counted: {needed} for a row." in text
    assert f"{needed}, rows of {given.length}" in GUIDE
    n_cards, each = re.search(r"For (one|\d+) GPUs? of (\d+) GB", text).groups()
    n_cards = 1 if n_cards == "one" else int(n_cards)
    assert (n_cards > 1) == bool(given.trainer.get("fsdp"))
    assert given.rows_per_step % n_cards == 0
    assert needed.state / n_cards + needed.inputs < 0.8 * int(each) * 1e9  # the rest is for one layer, and logits
    if n_cards > 1:
        whole = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
        assert f"Each process holds {whole:.1f} GiB of weights in the host's memory at first." in text
        more = {**given.trainer, "bf16": False, "use_cpu": True}
        TrainingArguments(output_dir="unused", **more)
    command = " ".join(line.strip("# \\") for line in text.splitlines() if line.startswith("#   "))
    assert command.endswith(f"flexreason train examples/settings/{name}.yaml")


def test_there_are_settings_for_three_sizes_and_two_ways():
    assert sorted(f"qwen3-{size}-{way}" for size in ("0.6b", "8b", "32b") for way in ("full", "lora")) == SETTINGS


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_train(name, material, tmp_path):
    """With a small model, on one process, and rows that it has use for."""
    model, data = material
    out = tmp_path / "out"
    given = ["--model", model, "--data", data, "--output", out, "--length", 1024, "--rows-per-step", 2]
    given += ["--learning-rate", "1e-3", "--trainer", "{use_cpu: true}"]
    assert main(["train", str(EXAMPLES / "settings" / f"{name}.yaml"), *map(str, given)]) == 0
    record = json.loads((out / "run.json").read_text())
    losses = [entry["eval_loss"] for entry in record["logs"] if "eval_loss" in entry]
    assert losses[-1] < losses[0]
    assert (out / "model" / "adapter_model.safetensors").exists() == name.endswith("lora")


@pytest.mark.parametrize("lora", [None, 4])
def test_memory_that_is_counted_is_what_training_holds(lora):
    """What is held between two steps of AdamW, byte by byte; and what checkpointing keeps of a row."""
    model = tiny("Qwen3", num_hidden_layers=3).bfloat16()
    model = with_lora(model, lora) if lora else model
    row = fr.collate(some_layouts(3))
    length = row["input_ids"].shape[1]
    needed = needed_bytes(model, length)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    checkpoint(fr.patch(model.train()))
    skip = [*model.parameters(), *row.values()]
    kept = saved_bytes(lambda: model(**row).loss.backward() or 0, skip) if lora is None else None
    model(**row).loss.backward()
    optimizer.step()
    held = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    held += [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    assert needed.state == sum(t.numel() * t.element_size() for t in held)
    assert needed.inputs == 3 * length * 32 * 2
    assert kept is None or kept >= needed.inputs


# --- DeepSpeed

CONFIGURATIONS = {f"deepspeed_zero{stage}": EXAMPLES / f"deepspeed_zero{stage}.json" for stage in (2, 3)}

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed, and not among requirements"
)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_configurations_leave_to_the_trainer_what_settings_say(stage):
    config = json.loads(CONFIGURATIONS[f"deepspeed_zero{stage}"].read_text())
    assert config["zero_optimization"]["stage"] == stage
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert config[name] == "auto"
    assert config["gradient_clipping"] == config["bf16"]["enabled"] == config["fp16"]["enabled"] == "auto"
    assert not {"optimizer", "scheduler"} & config.keys()
    assert (stage == 3) == config["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save", False)


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_and_evaluates_as_plain_processes_do(stage, material, tmp_path):
    """Two gloo processes on the CPU, a kernel of DeepSpeed's own compiled on the way; takes minutes the first time."""
    model, data = material
    found = {}
    for name, more in (("plain", ""), ("zero", f", deepspeed: {CONFIGURATIONS[f'deepspeed_zero{stage}']}")):
        given = ["--model", model, "--data", data, "--output", tmp_path / name, "--evaluation", "0.2"]
        given += ["--length", 1024, "--rows-per-step", 4, "--steps", 6, "--learning-rate", "1e-2", "--log-every", 1]
        given += ["--precision", "fp32", "--trainer", f"{{use_cpu: true{more}}}"]
        run_command("-m", "flexreason", "train", *given, processes=2)
        record = json.loads((tmp_path / name / "run.json").read_text())
        losses = [entry["loss"] for entry in record["logs"] if "loss" in entry]
        assert len(losses) == 6
        found[name] = losses, record["metrics"]["eval_loss"], load_file(tmp_path / name / "model" / "model.safetensors")
    assert found["zero"][0] == pytest.approx(found["plain"][0], rel=1e-5)
    assert found["zero"][1] == pytest.approx(found["plain"][1], rel=1e-5)
    assert way_gone(found["zero"][2], found["plain"][2], load_file(model / "model.safetensors")) < 1e-4


# --- docs/train.md


def blocks(kind):
    """The blocks of the guide that are fenced as this kind; "" is those of no kind."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
    return [block for name, block in found if name == kind]


def settings_table():
    """The table of docs/settings.md, made from the settings."""
    lines = ["| setting | if not given | what it is |", "|---|---|---|"]
    for name, each in NAMES.items():
        default = each.default if each.default is not dataclasses.MISSING else None
        if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING:
            said = "*needed*"
        elif default is None:
            said = ""
        else:
            said = f"`{str(default).lower() if isinstance(default, bool) else default}`"
        lines.append(f"| `{name}` | {said} | {each.metadata['help']} |")
    return "\n".join(lines) + "\n"


def test_the_settings_of_the_guide_are_those_there_are():
    assert settings_table() in GUIDE_OF_SETTINGS, settings_table()


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_lines_that_the_guide_shows_are_those_of_the_examples(name):
    source = (EXAMPLES / f"{name}.py").read_text()
    lines = [line.strip() for line in source.splitlines() if re.search(r"  # [123](:|$)", line)]
    assert [re.search(r"# (\d)", line)[1] for line in lines] == (["1"] if name == "sft" else ["1", "2", "3"])
    assert sum(all(line in block for line in lines) for block in blocks("python")) == 1


def without_figures(line):
    return re.sub(r" *\d[\d.,e-]*", " N", line)


def test_the_configuration_of_the_guide_trains(material, tmp_path, capsys):
    """With another model, data and output, and rows that such a model has use for."""
    model, data = material
    [block] = blocks("yaml")
    (tmp_path / "config.yaml").write_text(block)
    out = tmp_path / "out"
    given = ["--model", str(model), "--data", str(data), "--output", str(out), "--length", "1024"]
    given = [*given, "--evaluation", "0.2", "--rows-per-step", "2", "--precision", "fp32", "--log-every", "2"]
    command = ["train", str(tmp_path / "config.yaml"), *given]
    assert main(command) == 0
    said = capsys.readouterr().err
    [shown] = [block for block in blocks("") if block.startswith("step ")]
    assert {without_figures(line) for line in shown.splitlines()} <= {
        without_figures(line) for line in said.splitlines()
    }
    [tree] = [block for block in blocks("") if "run.json" in block]
    names = [line.split()[0].rstrip("/") for line in tree.splitlines()[1:]]
    assert sorted(names) == sorted(path.name for path in out.iterdir())
    assert main([*command, "--save-every", "7"]) == 0
    assert "this run is finished" in capsys.readouterr().err
    assert main([*command, "--learning-rate", "2e-5"]) == 2
    [refused] = [block for block in blocks("") if "another run" in block]
    assert capsys.readouterr().err.replace(str(out), "runs/first").endswith(refused)


def test_the_commands_of_the_guide_are_such_as_are_taken():
    """Every one of them is read by the command's own parser, and what it names is there."""
    commands = []
    for line in (line for block in blocks("sh") for line in block.splitlines()):
        if commands and commands[-1].count('"') % 2:
            commands[-1] += line
        else:
            commands.append(line)
    assert len(commands) >= 8
    config = yaml.safe_load(blocks("yaml")[0])
    for command in commands:
        words = shlex.split(command, comments=True)
        scripts = [word for word in words if word.startswith("examples/")]
        assert all((ROOT / word).is_file() for word in scripts), command
        if "train" in words:
            parser = argparse.ArgumentParser()
            train_command.add_arguments(parser)
            options = parser.parse_args(words[words.index("train") + 1 :])
            given = {name: value for name, value in vars(options).items() if name in NAMES and value is not None}
            options.config = None
            for name, value in config.items():
                if name not in given:
                    setattr(options, name, value)
            made = from_options(options)
            if path := made.trainer.get("deepspeed"):
                assert (ROOT / path).is_file()
            if "fsdp" in made.trainer:
                TrainingArguments(output_dir="unused", **{**made.trainer, "bf16": False, "use_cpu": True})
        elif words[:2] == ["flexreason", "demo"]:
            parser = argparse.ArgumentParser()
            demo_command.add_arguments(parser)
            assert parser.parse_args(words[2:]).compare
        else:
            assert scripts or words[:2] == ["pip", "install"], command
