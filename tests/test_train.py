"""`flexreason train`: from data and a config to a model that was trained, or a clear error before anything long."""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import flexreason as fr
from flexreason.cli import main
from flexreason.data.documents import Documents, weighted, write_documents
from flexreason.data.files import read_conversations
from flexreason.data.intake import EntryEncoder, Refused
from flexreason.train import prepare, record
from flexreason.train.run import train
from flexreason.train.settings import NAMES, Settings, add_options, from_mapping, from_options, read_yaml
from flexreason.train.trainer import Broken
from strategies import random_turns
from training import environment, free_port, some_layouts, write_data, write_model

GIVEN = {"length": 256, "steps": 4, "rows_per_step": 2, "learning_rate": 1e-2, "log_every": 1}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A model without weights, its tokenizer, and data."""
    folder = tmp_path_factory.mktemp("material")
    return write_model(folder / "model"), write_data(folder / "data.jsonl")


def settings(material, output, **more):
    model, data = material
    return Settings(**{"model": str(model), "data": [str(data)], "output": str(output), **GIVEN, **more})


def silent(words):
    pass


def test_a_run_from_the_command_leaves_a_model_that_loads(material, tmp_path, capsys):
    model, data = material
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {model}\ndata: {data}\noutput: {tmp_path / 'out'}\nlength: 256\nsteps: 30\nrows_per_step: 2\n"
        "learning_rate: 1e-2\nevaluation: 0.2\nweighting: turn\nprecision: fp32\nlog_every: 5\n"
    )
    assert main(["train", str(config), "--steps", "20", "--json"]) == 0
    out, said = capsys.readouterr()
    outcome = json.loads(out)
    assert outcome["steps"] == 20
    assert outcome["losses"][-1] < outcome["losses"][0]
    assert {"eval_loss", "eval_loss_reasoning", "eval_loss_response", "eval_loss_turn_0"} <= outcome["metrics"].keys()
    assert "conversations       60" in said
    assert "20 steps of 2 rows of 256 tokens" in said
    assert re.search(r"step +20/20 .* loss \d.* lr .* tokens/s", said)
    written = json.loads((tmp_path / "out" / "run.json").read_text())
    assert written["conversations"] == 60
    assert written["steps"] == 20
    assert written["versions"]["torch"] == version("torch")
    assert list(written["sources"]) == [str(data)]
    final = tmp_path / "out" / "model"
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {path.name for path in final.iterdir()}
    tokenizer, trained = AutoTokenizer.from_pretrained(final), AutoModelForCausalLM.from_pretrained(final)
    layouts = [EntryEncoder(tokenizer)({"messages": found.messages}) for found in read_conversations(data)]
    fresh = AutoModelForCausalLM.from_config(trained.config)
    row = fr.collate(layouts[:5])
    with torch.no_grad():
        assert fr.patch(trained)(**row).loss < fr.patch(fresh)(**row).loss - 0.5


def test_the_same_command_again_is_the_same_run(material, tmp_path):
    first = train(settings(material, tmp_path / "a"), silent)
    said = []
    again = train(settings(material, tmp_path / "a", log_every=2), said.append)
    assert "this run is finished" in said[-1]
    assert (again.steps, again.losses) == (first.steps, first.losses)
    assert train(settings(material, tmp_path / "b"), silent).losses == first.losses
    assert train(settings(material, tmp_path / "c", seed=1), silent).losses != first.losses


def test_a_run_goes_on_only_as_the_run_it_was(material, tmp_path):
    model, data = material
    own = tmp_path / "data.jsonl"
    shutil.copy(data, own)
    given = {"data": [str(own)], "save_every": 1}
    train(settings(material, tmp_path / "out", **given), silent)
    with pytest.raises(ValueError, match=r"another run:\n  learning_rate: 0.01 then, 0.02 now"):
        train(settings(material, tmp_path / "out", **given, learning_rate=2e-2), silent)
    with pytest.raises(ValueError, match="holds a run already"):
        train(settings(material, tmp_path / "out", **given, resume="never"), silent)
    write_data(own, n=61)
    with pytest.raises(ValueError, match=r"the versions or flexreason's code changed since: .*data.jsonl"):
        train(settings(material, tmp_path / "out", **given), silent)
    shutil.copy(data, own)
    other = tmp_path / "model"
    shutil.copytree(model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(ValueError, match="the model's config changed since"):
        train(settings(material, tmp_path / "out", **given, model=str(other)), silent)
    (tmp_path / "out" / "run.json").unlink()
    with pytest.raises(ValueError, match=r"no run.json says of what"):
        train(settings(material, tmp_path / "out", **given), silent)


def test_adapters_go_on_over_the_weights_that_they_began_on(material, tmp_path):
    """Two models of one config, as a base model and what was made of it."""
    model, _ = material
    for seed, name in enumerate(("one", "other")):
        shutil.copytree(model, tmp_path / name)
        config = AutoConfig.from_pretrained(model)
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
    shutil.copytree(tmp_path / "one", tmp_path / "moved")

    def run(name, out, **given):
        more = {"lora": 4, "save_every": 1, "steps": 2, "model": str(tmp_path / name), **given}
        return train(settings(material, tmp_path / out, **more), silent)

    run("one", "lora")
    run("moved", "lora")
    with pytest.raises(ValueError, match=r"the weights beneath the adapters are others: .*one then, .*other now"):
        run("other", "lora")
    run("one", "all", lora=None)
    run("other", "all", lora=None)  # whose weights are in the checkpoint


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"learnig_rate": 1}, r"unknown setting 'learnig_rate'; did you mean 'learning_rate'\?"),
        ({"xyzzy": 1}, "unknown setting 'xyzzy'$"),
        ({"length": 1000}, "length: expected a multiple of 128, found 1000; try 1024"),
        ({"length": "long"}, "length: expected a whole number, found 'long'"),
        ({"epochs": 2}, "steps and epochs contradict each other"),
        ({"evaluate_every": 5}, "nothing to evaluate on"),
        ({"weighting": "words"}, "weighting: expected one of token, turn, found 'words'"),
        ({"learning_rate": -1.0}, "learning_rate: expected a number above 0"),
        ({"steps": 0}, "steps: expected at least 1"),
        ({"steps": True}, "steps: expected a whole number or nothing, found True"),
        ({"data": []}, "data: expected at least one file"),
        ({"data": [3]}, "data: expected a list of texts"),
        ({"turns": "first"}, 'turns: expected "last"'),
        ({"clip": -1.0}, "clip: expected 0 or more"),
        ({"template": "x"}, "template: expected names with values"),
    ],
)
def test_wrong_settings_are_told_by_name(wrong, words):
    with pytest.raises(ValueError, match=words):
        from_mapping({"model": "m", "data": "d", "output": "o", **GIVEN, **wrong})


def test_numbers_are_numbers_at_any_depth_and_texts_texts(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "model: m\ndata: d\noutput: 1e3\nlearning_rate: 1e-4\ntrainer: {adam_epsilon: 1e-6, hub_token: x}\n"
    )
    with pytest.raises(ValueError, match=r"output: expected text, found 1000\.0"):
        from_mapping({**read_yaml(path), "output": 1e3})
    found = from_mapping(read_yaml(path))
    assert (found.output, found.learning_rate, found.trainer["adam_epsilon"]) == ("1e3", 1e-4, 1e-6)
    assert record._settings(found)["trainer"] == {"adam_epsilon": 1e-6, "hub_token": "***"}


def test_what_is_missing_is_told(tmp_path, capsys):
    with pytest.raises(ValueError, match="settings: model, output missing"):
        from_mapping({"data": "d"})
    assert main(["train", str(tmp_path / "none.yaml")]) == 2
    (tmp_path / "bad.yaml").write_text("a: [")
    assert main(["train", str(tmp_path / "bad.yaml")]) == 2
    (tmp_path / "list.yaml").write_text("- a")
    assert main(["train", str(tmp_path / "list.yaml")]) == 2
    said = capsys.readouterr().err
    assert "none.yaml: cannot be read" in said
    assert "bad.yaml: no YAML" in said
    assert "list.yaml: expected names with values" in said


def test_options_are_the_settings_and_go_first(material, tmp_path):
    parser = argparse.ArgumentParser()
    parser.add_argument("config", nargs="?")
    add_options(parser)
    (tmp_path / "c.yaml").write_text("model: a\ndata: [b, c]\noutput: o\nlora: 8\nlearning_rate: 1e-4\n")
    found = from_options(parser.parse_args([str(tmp_path / "c.yaml"), "--lora", "{r: 4, lora_alpha: 1}", "--compile"]))
    assert (found.data, found.lora, found.learning_rate, found.compile) == (
        ["b", "c"],
        {"r": 4, "lora_alpha": 1},
        1e-4,
        True,
    )
    found = from_options(parser.parse_args(["--model", "1", "--data", "x", "y", "--output", "o", "--warmup", "3"]))
    assert (found.model, found.data, found.warmup) == ("1", ["x", "y"], 3)
    found = from_options(parser.parse_args(["--model", "1", "--data", "x", "--data", "y", "--output", "o"]))
    assert found.data == ["x", "y"]  # as in every other command
    assert {each.metadata["help"] != "" for each in NAMES.values()} == {True}


def test_what_cannot_be_trained_is_told_before_anything_long(material, tmp_path):
    def refused(words, **wrong):
        with pytest.raises(ValueError, match=words):
            train(settings(material, tmp_path / "out", **wrong), silent)
        assert not (tmp_path / "out" / "checkpoints").exists()

    refused("cannot be loaded as a causal language model", model=str(tmp_path / "none"), tokenizer=str(material[0]))
    refused("tokenizer: .* cannot be loaded", tokenizer=str(tmp_path / "none"))
    refused("no such file", data=[str(tmp_path / "none.jsonl")])
    refused("3 samples are longer than a row of 128:", length=128, data=[str(long_data(tmp_path))])
    refused("LoraConfig|lora", lora={"rank": 3})
    refused("optim", trainer={"optim": "sgd"})
    refused("trainer: .*optimus", trainer={"optimus": 1})
    for name in ("max_steps", "save_only_model", "load_best_model_at_end", "label_smoothing_factor"):
        refused(f"trainer: {name} is decided by settings", trainer={name: 1})
    with pytest.raises(ValueError, match="bogus"):
        train(settings(material, tmp_path / "other", schedule="bogus"), silent)
    assert not (tmp_path / "other" / "data").exists()  # nothing was encoded yet
    refused("is named twice", data=[str(material[1]), str(material[1])])
    refused("expected a share between 0 and 1", evaluation="1.5")
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(material[1], folder / "A.JSONL")
    with pytest.raises(ValueError, match="is inside the data"):
        train(settings(material, folder / "out", data=[str(folder)]), silent)
    (folder / "b.jsonl.gz").write_text("")
    refused("b.jsonl.gz: compressed files are not read", data=[str(folder)])
    refused("backend", backend="fast")
    if not torch.accelerator.is_available():
        refused("fp16 needs a GPU", precision="fp16")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    refused("nothing in it", data=[str(empty)])
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"messages": [{"role": "human", "content": "?"}]}) + "\n")
    with pytest.raises(Refused, match="1 of 1 conversations are refused"):
        train(settings(material, tmp_path / "out", data=[str(bad)], skip_invalid=True), silent)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written to"):
        train(settings(material, tmp_path / "file"), silent)


@pytest.mark.parametrize("command", [["train", "--model", "m", "--data", "d", "--output", "o"], ["demo"]])
def test_what_training_needs_is_named_where_it_is_missing(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    right = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "accelerate" else right(name, *rest)
    )
    assert main(command) == 2
    assert "training needs accelerate: pip install 'flexreason[train]'" in capsys.readouterr().err


def test_a_process_that_sees_two_gpus_is_refused_unless_it_uses_none(material, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="one process sees 2 GPUs: start one each with torchrun"):
        train(settings(material, tmp_path / "refused"), silent)
    assert train(settings(material, tmp_path / "out", steps=1, trainer={"use_cpu": True}), silent).steps == 1


def long_data(folder):
    path = folder / "long.jsonl"
    chats = [[{"role": "user", "content": "x" * n}, {"role": "assistant", "content": "y"}] for n in (5, 200, 300, 400)]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return path


def test_samples_longer_than_a_row_are_left_out_only_where_that_is_asked(material, tmp_path):
    data = [str(long_data(tmp_path)), str(material[1])]
    with pytest.raises(
        ValueError, match=r"long.jsonl, line 4, turn 0: 4\d\d tokens\nUse length: 512, or too_long: drop"
    ):
        train(settings(material, tmp_path / "out", length=128, data=data), silent)
    train(settings(material, tmp_path / "out", length=128, data=data, too_long="drop"), silent)
    written = json.loads((tmp_path / "out" / "run.json").read_text())
    assert written["conversations"] == 64
    assert len(written["sources"]) == 2


def test_conversations_that_are_refused_are_left_out_and_listed(material, tmp_path):
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text('{"messages": [\n' + Path(material[1]).read_text())
    with pytest.raises(Refused, match=r"1 of 61 conversations are refused:\n +1  bad input\n .*mixed.jsonl, line 1"):
        train(settings(material, tmp_path / "out", data=[str(mixed)]), silent)
    said = []
    train(settings(material, tmp_path / "out", data=[str(mixed)], skip_invalid=True), said.append)
    assert any("1 conversations are left out" in words and "mixed.jsonl, line 1" in words for words in said)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["refused"]["counts"] == {"bad input": 1}


# transformers 5.23 renames what it calls gradient checkpointing; peft 0.21 uses the old name.
def test_lora_leaves_adapters_and_trains_nothing_else(material, tmp_path):
    with pytest.raises(ValueError, match="lora: the weights beneath would be random, and saved nowhere"):
        train(settings(material, tmp_path / "out", lora=4), silent)
    base = train(settings(material, tmp_path / "base", steps=1), silent).model
    outcome = train(settings(material, tmp_path / "out", model=str(base), lora=4, steps=6), silent)
    assert (outcome.model / "adapter_model.safetensors").exists()
    assert not (outcome.model / "model.safetensors").exists()
    assert outcome.losses[-1] < outcome.losses[0]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to mount a small disk")
def test_a_full_disk_leaves_the_last_checkpoint_whole(material, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1400k", "none", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a small disk here")
    try:
        with pytest.raises(Broken, match=r"the checkpoint cannot be written: .*the last whole one is .*checkpoint-\d"):
            train(settings(material, small / "out", save_every=1, keep=20, steps=20), silent)
        whole = record.whole_checkpoints(small / "out" / "checkpoints")
        assert whole
        for path in whole[:-1]:
            shutil.rmtree(path)
        outcome = train(settings(material, small / "out", save_every=1, keep=1, steps=20), silent)
        assert outcome.steps == 20
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_learning_rate_that_breaks_the_model_stops_the_run(material, tmp_path, capsys):
    model, data = material
    given = ["--model", str(model), "--data", str(data), "--output", str(tmp_path / "out"), "--length", "256"]
    assert main(["train", *given, "--learning-rate", "1e30", "--steps", "8", "--log-every", "1", "--warmup", "0"]) == 1
    assert "loss is nan" in capsys.readouterr().err


def test_documents_come_back_from_disk_as_they_were(tmp_path):
    layouts = [*some_layouts(130), fr.lay_out([fr.Sample([1], [2]), fr.Sample([1, 2, 3], [4]), fr.Sample([7], [8, 9])])]
    n = write_documents(tmp_path / "d.arrow", ((2 * k, layout) for k, layout in enumerate(layouts)))
    found = Documents(tmp_path / "d.arrow")
    assert n == len(found) == 131
    assert list(found.sizes) == list(map(len, layouts))
    for number, layout in enumerate(layouts):
        assert found.conversation(number) == 2 * number
        for name, tensor in vars(layout).items():
            assert torch.equal(getattr(found[number], name), tensor), name
            assert getattr(found[number], name).dtype == tensor.dtype
    by_turn = Documents(tmp_path / "d.arrow", "turn")[3]
    assert torch.equal(by_turn.target_weight, weighted(layouts[3], "turn").target_weight)
    assert float(by_turn.target_weight.sum()) == pytest.approx(layouts[3].n_samples)
    with pytest.raises(IndexError):
        found[131]
    with pytest.raises(ValueError, match="weighting"):
        Documents(tmp_path / "d.arrow", "words")
    with pytest.raises(ZeroDivisionError):
        write_documents(tmp_path / "e.arrow", ((k, layouts[k // (1 - k)]) for k in range(2)))
    assert not (tmp_path / "e.arrow").exists()


def test_what_is_prepared_depends_on_all_that_matters(material, tmp_path):
    model, data = material
    tokenizer = AutoTokenizer.from_pretrained(model)

    def key(encoder=None, length=256, **more):
        encoder = encoder or EntryEncoder(tokenizer)
        return prepare.prepare([str(data)], encoder, tmp_path / "data", length=length, **more).key

    first = key()
    assert key() == first
    changed = {
        key(EntryEncoder(tokenizer, history="content")),
        key(EntryEncoder(tokenizer, turns="last")),
        key(length=384),
    }
    changed |= {key(EntryEncoder(tokenizer, enable_thinking=True)), key(skip_invalid=True), key(too_long="drop")}
    other = AutoTokenizer.from_pretrained(model)
    other.chat_template = other.chat_template.replace("<user>", "<user> ")
    changed |= {key(EntryEncoder(other))}
    assert len(changed) == 7
    assert first not in changed
    assert key(workers=2) == first


def test_trees_longer_than_a_row_are_prepared_whole(material, tmp_path):
    """In parts: every target is in some document, once, and belongs to its conversation."""
    model, data = material[0], write_data(tmp_path / "long.jsonl", n=20, turns=8)
    encoder = EntryEncoder(AutoTokenizer.from_pretrained(model))
    made = prepare.prepare([str(data)], encoder, tmp_path, length=128)
    documents = Documents(made.documents_path)
    assert made.documents == len(documents) > made.conversations == 20
    found = [[] for _ in range(20)]
    for number, layout in enumerate(documents):
        assert len(layout) <= 128
        found[documents.conversation(number)] += [(s.prompt_ids, s.target_ids) for s in fr.unmerge(layout)]
    for conversation, samples in zip(read_conversations(data), found, strict=True):
        whole = fr.unmerge(encoder({"messages": conversation.messages}))
        assert sorted(samples) == sorted((s.prompt_ids, s.target_ids) for s in whole)


def test_rows_hold_every_document_once_an_epoch(tmp_path):
    layouts = some_layouts(50)
    rows = fr.Rows(layouts, 512, epochs=3, multiple=3, seed=1)
    assert len(rows) % 3 == 0
    assert rows.epochs == 3
    seen = []
    for epoch in range(3):
        numbers = [rows.documents(row) for row in range(rows.starts[epoch], rows.starts[epoch + 1])]
        assert sorted(n for row in numbers for n in row) == list(range(50))
        assert all(sum(len(layouts[n]) for n in row) <= 512 for row in numbers)
        assert {rows.epoch_of(row) for row in range(rows.starts[epoch], rows.starts[epoch + 1])} == {epoch}
        assert numbers[-1] == []  # so that no step spans two epochs
        seen.append(numbers)
    assert seen[0] != seen[1] != seen[2]
    again = fr.Rows(layouts, 512, epochs=3, multiple=3, seed=1)
    assert [again.documents(row) for row in reversed(range(len(rows)))][::-1] == [
        row for epoch in seen for row in epoch
    ]
    assert rows.progress(0) == 0
    assert rows.progress(rows.starts[1]) == 1
    assert rows.progress(len(rows)) == 3
    cut = fr.Rows(layouts, 512, steps=7, multiple=3, seed=1)
    assert len(cut) == 21
    assert [cut.documents(row) for row in range(21)] == [rows.documents(row) for row in range(21)]
    assert 0 < cut.progress(21) < cut.epochs
    assert [len(layout) for layout in rows[5]] == [len(layouts[n]) for n in rows.documents(5)]
    for wrong in (-1, len(rows)):
        with pytest.raises(IndexError):
            rows[wrong]
    with pytest.raises(ValueError, match="no documents"):
        fr.Rows([], 512)
    with pytest.raises(ValueError, match="has 6 tokens, and a row 4"):
        fr.Rows([fr.lay_out_turns(random_turns([(2, 2, 2)]))], 4)


def test_two_processes_train_as_one(material, tmp_path):
    model, data = material
    one = train(settings(material, tmp_path / "one", steps=6, evaluation="0.2"), silent)
    options = ["--model", model, "--data", data, "--output", tmp_path / "two", "--evaluation", "0.2", "--steps", 6]
    options += ["--length", 256, "--rows-per-step", 2, "--learning-rate", "1e-2", "--log-every", 1]
    options += ["--trainer", "{use_cpu: true}"]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "flexreason", "train", *map(str, options), "--json"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    two = json.loads((tmp_path / "two" / "run.json").read_text())
    assert two["processes"] == 2
    assert [entry["loss"] for entry in two["logs"] if "loss" in entry] == pytest.approx(one.losses, rel=1e-4)
    assert two["metrics"]["eval_loss"] == pytest.approx(one.metrics["eval_loss"], rel=1e-4)
    assert (tmp_path / "two" / "model" / "model.safetensors").exists()


def test_rows_of_a_step_fall_on_all_processes(material, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="rows_per_step: expected a multiple of the 2 processes, found 3"):
        train(settings(material, tmp_path / "out", rows_per_step=3), silent)


MEMORY = """
import re, sys
from pathlib import Path
from transformers import AutoTokenizer
from flexreason.data.documents import Documents
from flexreason.data.intake import EntryEncoder
from flexreason.data.rows import Rows
from flexreason.train.prepare import prepare

def own_memory():  # without the pages of files that are mapped, which the system takes back when it likes
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

model, folder, *files = sys.argv[1:]
encoder = EntryEncoder(AutoTokenizer.from_pretrained(model))
for file in files:
    made = prepare([file], encoder, Path(folder), length=256)
    documents = Documents(made.documents_path)
    rows = Rows(documents, 256, epochs=2, sizes=documents.sizes)
    most = max(own_memory() for row in range(0, len(rows), 20) if rows[row])
    print(most)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux how much memory there is")
def test_memory_does_not_grow_with_the_data(material, tmp_path):
    """Eight times as many conversations, in one process, one after the other."""
    model, _ = material
    files = [write_data(tmp_path / f"{n}.jsonl", n=n) for n in (299, 300, 2400)]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(model), str(tmp_path / "data"), *map(str, files)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    _, few, many = map(int, done.stdout.split())
    on_disk = sum(path.stat().st_size for path in (tmp_path / "data").rglob("*") if path.is_file())
    assert on_disk > 5 * 2**20
    assert many - few < on_disk / 3
