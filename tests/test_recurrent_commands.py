"""What people call goes end to end with models whose layers carry states: one of each kind."""

import json

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexreason.cli import main
from flexreason.data.figures import Amount, shape_of
from flexreason.data.files import read_conversations
from flexreason.data.intake import EntryEncoder
from flexreason.proof import oracle
from flexreason.proof.tiny import build, default_config, shrink
from flexreason.tree.layout import unmerge
from training import write_data, write_model


@pytest.fixture(scope="module", params=["Qwen3_5", "NemotronH", "Lfm2"])
def hybrid(request, tmp_path_factory):
    """A folder with a tokenizer and a hybrid with weights, and some conversations."""
    folder = tmp_path_factory.mktemp(request.param)
    write_model(folder / "model")
    cls = getattr(transformers, f"{request.param}ForCausalLM")
    config = shrink(default_config(cls))
    config.vocab_size = len(AutoTokenizer.from_pretrained(folder / "model"))
    build(config, cls, 0).float().save_pretrained(folder / "model")
    return str(folder / "model"), str(write_data(folder / "data.jsonl", n=8))


def layouts_of(model, data):
    encode = EntryEncoder(AutoTokenizer.from_pretrained(model))
    return [encode({"messages": one.messages}) for one in read_conversations(data)]


def printed(capsys, *words):
    """What a command that did its job printed with --json."""
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_verify_finds_a_hybrid_exact_on_its_own_data(hybrid, capsys):
    model, data = hybrid
    found = printed(capsys, "verify", model, "--data", data)
    assert found["verdict"] == "exact"


def test_bench_times_a_hybrid_beside_its_samples(hybrid, capsys):
    model, data = hybrid
    ways = ("--ways", "one-by-one", "one-pass", "--repeats", "1")
    found = printed(capsys, "bench", model, "--data", data, "--length", "512", *ways)
    samples, one_pass = found["ways"]
    assert found["ok"]
    assert one_pass["loss"] == pytest.approx(samples["loss"], rel=1e-5)
    assert one_pass["gradient_error"] < 1e-4
    assert 1 < found["work_ratio"] <= found["token_ratio"] * 1.5


def test_report_estimates_the_work_of_a_hybrid(hybrid, capsys):
    """One pass saves of a layer with states what it saves of a layer's weights."""
    model, data = hybrid
    found = printed(capsys, "report", "--data", data, "--tokenizer", model, "--model", model)
    layouts = layouts_of(model, data)
    lengths = [len(sample) for layout in layouts for sample in unmerge(layout)]
    targets = sum(len(layout.target_ids) for layout in layouts)
    tree = Amount(sum(map(len, layouts)), sum(int((one.position_ids + 1).sum()) for one in layouts), targets)
    samples = Amount(sum(lengths), sum(n * (n + 1) // 2 for n in lengths), targets)
    shape, [work] = shape_of(model), found["all"]["work"]
    assert work["samples"] == shape.work(samples)
    assert work["one_pass"] == shape.work(tree)


def test_train_takes_a_step_of_a_hybrid_with_the_loss_of_its_samples(hybrid, tmp_path, capsys):
    model, data = hybrid
    given = ["--length", "1024", "--steps", "1", "--rows-per-step", "1", "--precision", "fp32", "--log-every", "1"]
    found = printed(capsys, "train", "--model", model, "--data", data, "--output", str(tmp_path / "out"), *given)
    before = AutoModelForCausalLM.from_pretrained(model)
    samples = [sample for layout in layouts_of(model, data) for sample in unmerge(layout)]
    expected = oracle.n_samples(before, samples)
    assert found["losses"] == [pytest.approx(expected.loss_sum / expected.n_targets, rel=1e-4)]
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True):
        if expected.gradients[name].any():
            assert not torch.equal(a, b), name
