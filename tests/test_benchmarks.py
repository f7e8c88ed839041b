"""The GPU benchmarks rehearsed on CPU: every script from end to end at a small size, and what their figures rest on."""

import importlib
import json
import warnings
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import torch

import flexreason as fr
from flexreason.attention.registry import BACKENDS
from flexreason.proof.float64 import relative_l2

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _found(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def module(name):
    return importlib.import_module(name)


def rehearse(capsys, name, *options, seconds=300):
    """A script's JSON line."""
    module(name).main(["--device", "cpu", "--small", "--seconds", str(seconds), *options])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


# ---- the scripts


# torch's own: it instantiates one of its functions when it compiles create_block_mask
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_kernel(capsys):
    rows = {row["way"].split(" (")[0]: row for row in rehearse(capsys, "kernel", "--each", "0.1")["attention"]}
    assert set(rows) == {"flex", "segments", "interleaved", "dense", "packed flash", "causal SDPA flash"}
    assert not [row["failed"] for row in rows.values() if "failed" in row]
    tree = module("kernel").Bench(module("kernel").cells(small=True)[0], CPU)
    flops = 4 * tree.cell.heads * tree.cell.size * tree.pairs
    for name in ("flex", "segments", "interleaved", "dense"):
        assert rows[name]["error"] < 1e-4
        assert rows[name]["forward TFLOP/s"] * rows[name]["forward ms"] * 1e9 == pytest.approx(flops)
    for name in ("segments", "dense", "packed flash", "causal SDPA flash"):
        row = rows[name]
        assert row["backward TFLOP/s"] * row["backward ms"] == pytest.approx(
            2.5 * row["forward TFLOP/s"] * row["forward ms"]
        )
        assert row["of packed"] == pytest.approx(row["both TFLOP/s"] / rows["packed flash"]["both TFLOP/s"])
    assert rows["flex"]["computed / visible"] >= 1


def test_sweep(tmp_path):
    given = [
        {"name": "larger lists", "head_size": 16, "block_size": [256, 128], "kernel_options": {}},
        {"name": "another size", "head_size": 64, "block_size": [128, 128], "kernel_options": {}},
    ]
    (tmp_path / "ladder.json").write_text(json.dumps(given))
    kernel = module("kernel")
    cell = kernel.cells(small=True)[0]
    rungs = kernel.ladder(str(tmp_path / "ladder.json"), cell, torch.device("cuda"))
    assert [rung.name for rung in rungs] == ["as it is", "larger lists", *(r.name for r in kernel.LADDER[1:])]
    assert rungs[1].block == (256, 128)
    rungs = [rung for rung in kernel.ladder(None, cell, CPU) if rung.name in ("as it is", "lists descending")]
    rows = kernel.sweep(cell, CPU, module("measure").Budget(300), 0.1, rungs)
    assert [row["rung"] for row in rows[1:]] == ["as it is", "lists descending"]
    assert all(row["error"] < 1e-4 for row in rows[1:])


def test_gpu_step(capsys):
    before = dict(BACKENDS)
    (row,) = rehearse(capsys, "gpu_step", "--optimizer", "--each", "0.5")["steps"]
    assert "failed" not in row
    assert row["gradient error"] < 1e-4
    assert row["loss error"] < 1e-5
    assert row["token ratio"] > row["work ratio"] > 1
    assert row["by tokens"] == pytest.approx(row["speed-up"] / row["token ratio"])
    assert row["MFU"] / row["plain MFU"] == pytest.approx(row["MFU / plain's"])
    assert row["queries / plain's"] > 0
    assert before == BACKENDS


def test_longest(capsys):
    rows = rehearse(capsys, "longest", "--each", "0.1")["rows"]
    ways = module("longest").WAYS
    assert {row["way"] for row in rows} == set(ways)
    assert not [row["failed"] for row in rows if "failed" in row]
    for row in rows:
        assert row["ms"] > 0
        if row["tokens"] == 256 and row["way"] not in ("ours", "plain"):
            assert row["gradients, by ours"] < 1e-4, row["way"]


def test_overheads(capsys):
    found = rehearse(capsys, "overheads")
    assert [row["way"] for row in found["steps"]] == ["plain", "flex", "segments"]
    assert all(row["in steps 2 to 3"] == 0 for row in found["steps"])
    assert not [row["failed"] for row in found["steps"] + found["crossover"] if "failed" in row]
    for row in found["steps"][1:]:
        assert row["mask / step"] == pytest.approx(row["mask ms"] / row["step ms"])
    for row in found["crossover"]:
        assert row["segments / flex"] == pytest.approx(row["segments a layer ms"] / row["flex a layer ms"])
    assert all(isinstance(row[name], float) for row in found["masks"] for name in ("flex ms", "segments ms"))


def test_card(tmp_path, capsys, monkeypatch):
    """What a part writes, and what is left of a run that takes too long."""
    card = module("card")
    assert card.main(["2", "--only", "overheads", "--rehearse", "--out", str(tmp_path)]) == 0
    [file] = tmp_path.glob("*-overheads.txt")
    first, _, command, *_, last = file.read_text().splitlines()
    assert f"torch {torch.__version__}" in first
    assert command == "$ python benchmarks/overheads.py --device cpu --small --seconds 60"
    assert json.loads(last)["steps"]
    slow = card.Run("slow", """-c 'import time; print("said"); time.sleep(60)'""", 3, "")
    monkeypatch.setitem(card.PARTS, 1, [slow])
    assert card.main(["1", "--out", str(tmp_path)]) == 1
    [file] = tmp_path.glob("*-slow.txt")
    assert file.read_text().splitlines()[-3:] == ["said", "", "stopped after 3 s"]
    assert "exit code 124" in capsys.readouterr().out


def test_a_part_ends_within_ten_minutes():
    for number, runs in module("card").PARTS.items():
        assert sum(run.seconds - 60 * ("--seconds" in run.command) for run in runs) <= 570, number
        for run in runs:
            for words in (run.command, run.rehearsal):
                program = words.split()[0]
                assert program == "-m" or (BENCHMARKS.parent / program).exists()


@pytest.mark.parametrize("name", ["kernel", "gpu_step", "longest", "overheads"])
def test_without_time_all_is_named_and_nothing_run(capsys, name):
    found = rehearse(capsys, name, seconds=0)
    assert found["left_out"]
    assert not any("ms" in row for rows in found.values() if isinstance(rows, list) for row in rows)


# ---- what they rest on


def layout():
    return module("kernel").conversation([(5, 9, 3), (4, 1, 6), (2, 7, 1)])


def test_packed_samples_are_the_samples():
    kernel, samples = module("kernel"), fr.unmerge(layout())
    packed = kernel.packed_samples(layout(), CPU)
    tokens = [sample.prompt_ids + sample.target_ids for sample in samples]
    assert packed.lengths == [len(ids) for ids in tokens]
    assert packed.longest == max(packed.lengths)
    assert layout().input_ids[packed.index].tolist() == [token for ids in tokens for token in ids]
    assert sorted(packed.index[packed.owned].tolist()) == list(range(len(layout())))  # every token once
    few = kernel.packed_samples(layout(), CPU, most_pairs=packed.pairs - 1)
    assert few.pairs < packed.pairs
    assert max(packed.lengths) in few.lengths


@pytest.mark.parametrize("n_packs", [1, 2, 3])
def test_packs_hold_every_target_with_the_token_that_predicts_it(n_packs):
    packs = module("gpu_step").pack_samples(layout(), CPU, n_packs)
    assert len(packs) == n_packs
    assert sum(float(pack.weight.sum()) for pack in packs) == pytest.approx(1)
    assert torch.cat([pack.labels for pack in packs]).tolist() == layout().target_ids.tolist()
    found = torch.cat([pack.packed.index[pack.sources] for pack in packs])
    assert found.tolist() == layout().target_source.tolist()
    for pack in packs:
        assert pack.ids[0, pack.sources + 1].tolist() == pack.labels.tolist()
        begins = pack.packed.begins[:-1].long()
        assert not pack.positions[0, begins].any()


def test_flash_that_groups_no_heads_is_given_repeated_ones(monkeypatch):
    kernel = module("kernel")

    def grouping(q, k, v, packed):
        parts = [(a, b) for a, b in pairwise(packed.begins.tolist())]
        return torch.cat([kernel._sdpa(q[a:b], k[a:b], v[a:b]) for a, b in parts])

    def without_groups(q, k, v, packed):
        if q.shape[1] != k.shape[1]:
            raise ValueError("expected as many key heads")
        return grouping(q, k, v, packed)

    for varlen, repeats in ((grouping, False), (without_groups, True)):
        monkeypatch.setattr(kernel, "_varlen", varlen)
        kernel._repeats_heads.cache_clear()
        assert kernel._repeats_heads("cpu") is repeats
    monkeypatch.setattr(kernel, "_varlen", lambda q, k, v, packed: grouping(q, k * 1.1, v, packed))
    kernel._repeats_heads.cache_clear()
    with pytest.raises(AssertionError, match="varlen_attn is wrong"):
        kernel._repeats_heads("cpu")
    kernel._repeats_heads.cache_clear()


def test_waits_are_counted_by_place(monkeypatch):
    overheads = module("overheads")
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step():
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    ((place, n),) = overheads.waits(step).items()
    assert place.startswith("tests/test_benchmarks.py:")
    assert n == 3
    assert modes == ["warn", "default"]


@pytest.mark.parametrize("interleaved", [True, False])
def test_another_order_is_the_same_tree(interleaved):
    kernel = module("kernel")
    row = fr.collate([layout()])
    order = kernel.in_order(layout(), row, interleaved)
    assert sorted(order.tolist()) == list(range(row["until"].shape[1]))
    rule = kernel.turn_role_rule(*(row[name][0][order] for name in ("turn", "role", "document")))
    index = torch.arange(len(order))
    found = rule(index[0], index[0], index[:, None], index[None, :])
    assert torch.equal(found, fr.dense_mask(row)[order][:, order])
    turn = row["turn"][0, order][: len(layout())]
    assert bool((turn.diff() >= 0).all()) == interleaved


def test_descending_lists_hold_the_same_blocks():
    kernel = module("kernel")
    table = fr.block_mask(kernel.conversation([(64, 256, 64)] * 4))
    turned = kernel.descending(table)
    assert torch.equal(turned.to_dense(), table.to_dense())
    n = int(table.full_kv_num_blocks[0, 0, -1])
    assert turned.full_kv_indices[0, 0, -1, :n].tolist() == table.full_kv_indices[0, 0, -1, :n].tolist()[::-1]


@pytest.mark.parametrize("way", ["ours", "interleaved", "interleaved, not compiled", "dense"])
def test_one_layer_alone(way):
    longest = module("longest")
    m = module("gpu_step").make("tiny", CPU)
    layout = longest.filled("tiny", 256, m.config.vocab_size)
    with mock.patch.dict(BACKENDS, longest.INTERLEAVED):
        longest.one_layer(way, m, layout, fr.collate([layout], length=256))
        longest.one_layer(way, m, layout, fr.collate([layout], length=256), train=False)


def test_what_is_too_slow_is_named_with_its_estimate(capsys, monkeypatch):
    longest = module("longest")
    monkeypatch.setattr(longest, "estimate", lambda way, *rest: 0.0 if way == "ours" else 1e6)
    rows = rehearse(capsys, "longest", "--each", "0.1", "--lengths", "256")["rows"]
    assert [row["way"] for row in rows if "ms" in row] == ["ours"]
    assert {row["failed"] for row in rows if "ms" not in row} == {"not run, about 1000000 s"}


def test_gradients_of_another_mask_are_noticed():
    step = module("gpu_step")
    m = step.make("tiny", CPU)
    case = step.Case(step.Cell("tiny", 256, "8 turns"), m, CPU)
    packed = step.over_packs(m, step.pack_samples(case.layout, CPU, 1))
    loss, wanted = packed(), step.gradients(m)
    ours = step.over_row(m, case.row, "segments")
    assert step.compared(m, ours, loss, wanted, CPU)["gradient error"] < 1e-4
    with pytest.raises(ArithmeticError, match="gradients are off"):
        step.compared(m, step.over_packs(m, [step.plain(case.row)]), loss, wanted, CPU)


def test_a_cell_that_fails_does_not_end_the_run(capsys):
    budget = module("measure").Budget(60)

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    def full_elsewhere():
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")

    def missing():
        raise NotImplementedError("not on this card\nmore")

    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert budget.attempt("a", lambda: 1) == (1, "")
    assert budget.attempt("b", full) == (None, "out of memory")
    assert budget.attempt("c", missing) == (None, "NotImplementedError: not on this card")
    assert budget.attempt("d", lambda: 1, needs=61) == (None, "no time left")
    assert budget.left_out == ["d"]
    assert budget.attempt("e", full_elsewhere) == (None, "out of memory")
    budget.attempt("e", broken)
    assert budget.attempt("f", lambda: 1) == (None, "no time left")  # nothing on the card succeeds any more


def test_a_call_is_timed_by_itself():
    measure = module("measure")
    a = torch.randn(64, 64)
    found = measure.timed({"once": lambda: a @ a, "often": lambda: [a @ a for _ in range(40)]}, CPU, 0.2)
    assert len(found["once"]) == len(found["often"]) >= 3
    assert min(found["often"]) > min(found["once"]) > 0
    assert relative_l2([a], [a]) == 0
    assert measure.machine()["torch"] == torch.__version__
