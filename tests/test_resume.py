"""A run that is killed goes on as if nothing had been: the same parameters to the bit, and every conversation once."""

import copy
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from flexreason.train import record
from models import tiny
from training import environment

HERE = Path(__file__).parent


def kill_and_resume(folder, kills, seed):
    done = subprocess.run(
        [sys.executable, str(HERE / "killing.py"), str(folder), str(kills), str(seed)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "found.json").read_text())


def log_of(folder):
    return [entry for line in (folder / "log.jsonl").read_text().splitlines() if "rows" in (entry := json.loads(line))]


def assert_as_if_never_killed(folder):
    whole, killed = (load_file(folder / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    steps = log_of(folder / "killed")
    assert steps == log_of(folder / "whole")
    assert [entry["step"] for entry in steps] == list(range(1, 25))
    for epoch in {entry["epoch"] for entry in steps}:
        seen = Counter(n for entry in steps if entry["epoch"] == epoch for row in entry["rows"] for n in row)
        assert set(seen.values()) == {1}
        if epoch != steps[-1]["epoch"]:  # the last one may be cut by `steps`
            assert len(seen) == 60
    left = list((folder / "killed" / "checkpoints").iterdir())
    assert [path.name for path in sorted(left, key=record.step_of)] == ["checkpoint-23", "checkpoint-24"]
    assert all(map(record.is_whole, left))


def test_a_run_killed_twice_ends_as_one_that_was_not(tmp_path):
    assert kill_and_resume(tmp_path, 2, seed=0)["kills"] == 2
    assert_as_if_never_killed(tmp_path)


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_as_one_that_was_not(tmp_path):
    found = kill_and_resume(tmp_path, 20, seed=1)
    assert found["kills"] == 20
    assert found["while_saving"] >= 5
    assert_as_if_never_killed(tmp_path)


def test_a_checkpoint_is_whole_or_is_none(tmp_path):
    folder = tmp_path / "checkpoint-7"
    (folder / "deep").mkdir(parents=True)
    (folder / "weights").write_bytes(b"12345")
    (folder / "deep" / "more").write_bytes(b"1")
    assert not record.is_whole(folder)
    record.seal(folder)
    assert record.is_whole(folder)
    assert record.whole_checkpoints(tmp_path) == [folder]
    (folder / f"{record.SEAL}.unfinished").write_text("{}")  # a run was killed here, and went on
    record.seal(folder)
    assert record.is_whole(folder)
    (folder / "weights").write_bytes(b"1234")
    assert not record.is_whole(folder)
    (folder / "weights").write_bytes(b"54321")
    assert record.is_whole(folder)
    (folder / "deep" / "more").unlink()
    assert record.whole_checkpoints(tmp_path) == []
    (tmp_path / "checkpoint-mine").mkdir()
    record.remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-mine"]


def test_the_latest_are_kept_by_number_and_not_by_name(tmp_path):
    for step in (9, 10, 8, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        record.seal(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-200").mkdir()  # being written
    assert [path.name for path in record.whole_checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in (8, 9, 10, 100)]
    record.keep_latest(tmp_path, None)
    assert len(record.whole_checkpoints(tmp_path)) == 4
    record.keep_latest(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-100", "checkpoint-200"]


def test_weights_that_no_checkpoint_holds_are_known_by_their_bits():
    model = tiny("Qwen3")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted, again = (peft.get_peft_model(copy.deepcopy(model), config) for _ in range(2))

    def beneath(model):
        return record.fingerprint(record.weights_beneath(model))

    expected = beneath(adapted)
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            p.data.normal_()
    assert beneath(adapted) == beneath(again) == expected
    weight = adapted.base_model.model.model.layers[1].mlp.down_proj.weight
    before = weight[3, 5].clone()
    weight.data[3, 5] = torch.nextafter(before, torch.tensor(9.0))
    assert beneath(adapted) != expected
    weight.data[3, 5] = before
    weight.data[[0, 1]] = weight.data[[1, 0]]  # of the same sum
    assert beneath(adapted) != expected
    weight.data[[0, 1]] = weight.data[[1, 0]]
    assert beneath(adapted) == expected
    assert beneath(adapted.to(torch.bfloat16)) != expected
