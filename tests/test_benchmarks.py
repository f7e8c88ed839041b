"""The benchmarks from end to end at small sizes, and what their figures rest on."""

import dataclasses
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import flexreason as fr
from flexreason.bench import measure
from flexreason.bench import steps as ways
from flexreason.model.holders import verifying
from flexreason.proof.float64 import relative_l2

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
CPU = torch.device("cpu")

# torch's own: it instantiates one of its functions when it compiles create_block_mask
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _found(monkeypatch):
    for name in ("card", "."):
        monkeypatch.syspath_prepend(str(BENCHMARKS / name))
    monkeypatch.delitem(sys.modules, "attention", raising=False)  # tests/attention.py, where other tests have been


def module(name):
    return importlib.import_module(name)


def main(name, tmp_path, *options):
    """What a script found, with its files in a folder."""
    return module(name).main(["--repeats", "1", "--device", "cpu", "--out", str(tmp_path), *options])


# ---- the scripts


def test_masks(tmp_path):
    found = main("masks", tmp_path, "--shapes", "3 x 64/128/64", "--lengths", "1024", "--lists", "2048")
    rows = {row["mask"]: row for row in found["rows"] if row["tokens"] == 1024}
    masks = module("masks")
    assert list(rows) == list(masks.COLORS)
    for name, row in rows.items():
        assert row["build ms"][0] > 0
        if name not in masks.COMPILED:
            assert row["error"] < 1e-4
            assert row["attention ms"][0] > 0
    counted = ("skipped", "full", "partial", "area")
    of = {name: [row[column] for column in counted] for name, row in rows.items()}
    assert of["turn/role"] == of["interval"] == of["interval, compiled"] == of["closed form"]
    assert of["interleaved, compiled"] == of["turn/role, interleaved"]
    assert of["closed form"][3] < of["turn/role, interleaved"][3] < rows["dense"]["area"]
    assert sum(of["closed form"][:3]) == 64
    assert not any("attention ms" in row and row["attention ms"] for row in found["rows"] if row["tokens"] == 2048)
    assert (tmp_path / "masks.svg").read_text().startswith("<?xml")
    assert json.loads((tmp_path / "masks.json").read_text())["rows"] == found["rows"]


def test_counts(tmp_path):
    [row] = main("counts", tmp_path, "--lengths", "1000", "--shapes", "3 x 64/128/64")["rows"]
    shared = module("shared")
    grown = shared.shape("3 x 64/128/64").grown(1000)
    layout = shared.conversation([grown[1:]] * 3)
    visible = fr.dense_mask(layout)
    blocks = F.pad(visible, (0, -len(layout) % 128, 0, -len(layout) % 128)).unfold(0, 128, 128).unfold(1, 128, 128)
    assert row["flex computes"] == blocks.any(-1).any(-1).sum() * 128**2 / visible.sum()
    samples = [len(sample) for sample in fr.unmerge(layout)]
    assert row["tokens"] == sum(samples) / len(layout)
    assert 1 < row["work, 0.6B"] < row["tokens"]
    assert row["flash computes"] > 1
    assert row["calls"] == 2


@pytest.mark.parametrize(("n_queries", "n_keys", "causal"), [(300, 300, True), (100, 333, True), (300, 130, False)])
def test_the_tiles_of_a_call_are_those_with_a_visible_pair(n_queries, n_keys, causal):
    from flexreason.attention.flash import Call, Gathered

    queries, keys = (Gathered.of([[(0, n)], [(n, n + 5)]], CPU) for n in (n_queries, n_keys))
    total = 0
    for q, k in ((n_queries, n_keys), (5, 5)):
        visible = torch.ones(q, k).tril(k - q) if causal else torch.ones(q, k)
        tiles = F.pad(visible, (0, -k % 64, 0, -q % 128)).unfold(0, 128, 128).unfold(1, 64, 64)
        total += int(tiles.sum((-1, -2)).bool().sum()) * 128 * 64
    assert module("counts").tiles(Call(queries, keys, causal)) == total


def test_what_does_not_fit_says_so_with_its_arithmetic():
    masks = module("masks")
    assert masks.too_large("dense", 2**20, CPU) == "does not fit: 3 x 1,048,576^2 bytes = 3,072 GiB"
    assert masks.too_large("interval, compiled", 2**20, CPU) == "not run: 1 ns x 1,048,576^2 = 1,100 s"
    assert not masks.too_large("closed form", 2**20, CPU)
    assert not masks.too_large("dense", 2**10, CPU)


def test_attention_under_another_mask_is_not_timed():
    """The check of masks.py: causal attention over the whole row instead of the tree is noticed, in both orders."""
    masks, shared = module("masks"), module("shared")
    layout = shared.conversation(shared.shape("3 x 16/40/16").filling(512))
    row = fr.collate([layout], length=512)
    given = masks.Attention(layout, row)
    dense = fr.dense_mask(row)
    assert given.error(given.over(dense, False), False) < 1e-5
    assert given.error(given.over(dense[given.order][:, given.order], True), True) < 1e-5
    assert given.error(given.over(torch.ones_like(dense).tril(), False), False) > 0.1
    assert given.error(given.over(dense, True), True) > 0.1


@pytest.mark.parametrize("model", ["qwen3_5", "nemotron_h"])
def test_steps_of_models_whose_layers_carry_states(model, tmp_path):
    ways = ("--ways", "loop", "one-pass", "plain-row", "--backends", "segments")
    found = main("steps", tmp_path, "--shapes", "2 x 6/12/6", "--model", model, *ways, "--repeats", "1")
    rows = {row["way"]: row for row in found["cells"][0]["ways"]}
    assert [row["samples"] for row in rows.values()] == ["the same", "the same", "no"]
    lean = rows["a loop over the N samples"]
    assert lean["work"] > 1
    assert lean["by tokens"] == pytest.approx(lean["by one pass"][0] / 60 * 54)
    beside = {row["way"]: row for row in found["cells"][0]["beside a plain row"]}
    assert list(beside) == ["one pass, segments", "a plain row"]
    assert 0 < beside["one pass, segments"]["kept by a plain row's"] < 2
    assert beside["one pass, segments"]["ms by a plain row's"][0] > 0


def test_steps(tmp_path):
    found = main(
        "steps", tmp_path, "--shapes", "3 x 16/40/16", "--model", "tiny", "--backends", "segments", "dense", "flex"
    )
    rows = {row["way"]: row for row in found["cells"][0]["ways"]}
    assert list(rows) == [
        "N samples, one by one",
        "a loop over the N samples",
        "N samples, padded",
        "N samples, packed, dense mask",
        "one pass, segments",
        "one pass, dense",
        "one pass, flex",
        "one pass, interleaved, create_block_mask",
        "one plain pass, leaking",
        "one pass, labels shifted",
        "a plain row",
    ]
    for name, row in rows.items():
        assert row["samples"] == ("no" if "leaking" in name or "shifted" in name or "plain" in name else "the same"), (
            name
        )
        assert row["ms"][0] > 0
        if row.get("by one pass") and row.get("work"):
            assert row["by work"] == pytest.approx(row["by one pass"][0] / row["work"])
    assert {name for name, row in rows.items() if row["forward alone"]} == {
        "one pass, flex",
        "one pass, interleaved, create_block_mask",
    }
    assert rows["one pass, labels shifted"]["gradients off by"] > 0.05
    assert rows["one plain pass, leaking"]["gradients off by"] > 0.05
    assert (tmp_path / "steps.svg").exists()


def test_what_computes_all_pairs_is_left_out_with_its_arithmetic_where_that_is_much(monkeypatch):
    steps, shared = module("steps"), module("shared")
    made, _ = steps.model("tiny", CPU)
    case = ways.Case(made, [shared.conversation([(6, 9, 4)] * 3, 97)])
    names = ["one-by-one", "packed-dense", "one-pass"]
    notes: list[str] = []
    monkeypatch.setattr(steps, "MOST", 80)
    assert [way.name for way in steps.ways_of(case, names, ["dense"], notes)] == ["N samples, one by one"]
    pairs = sum(range(1, 40)) + sum(sum(range(start + 1, start + 14)) for start in (6, 16))
    assert notes[0] == (
        f"N samples, packed, dense mask: not run: 87^2 pairs are {87**2 / pairs:.0f} times those of one pass"
    )
    monkeypatch.setattr(steps, "MOST", 2**20)
    monkeypatch.setattr(steps, "available_bytes", lambda device: 20 * 100**2)
    notes.clear()
    assert len(steps.ways_of(case, names, ["dense"], notes)) == 1
    assert notes == [
        "N samples, packed, dense mask: does not fit: 20 x 87^2 bytes = 0 GiB",
        "one pass, dense: does not fit: 20 x 128^2 bytes = 0 GiB",
    ]


def test_a_way_that_should_be_exact_and_is_not_ends_the_run(tmp_path, monkeypatch):
    right = ways.padded
    monkeypatch.setitem(ways.WAYS, "padded", lambda case: dataclasses.replace(ways.leaking(case), exact=True))
    with pytest.raises(ArithmeticError, match="should be exact is not"):
        main(
            "steps", tmp_path, "--shapes", "3 x 6/12/6", "--model", "tiny", "--ways", "one-by-one", "padded", "one-pass"
        )
    monkeypatch.setitem(ways.WAYS, "padded", right)


def test_work_is_counted_by_hand():
    """Three turns of 6/9/4: samples of 19, 29 and 39 tokens; a tree of 65; a plain pass of 57 and a row of 128."""
    steps, shared = module("steps"), module("shared")
    made, counted = steps.model("tiny", CPU)
    case = ways.Case(made, [shared.conversation([(6, 9, 4)] * 3, 97)])
    products = sum(p.numel() for p in made.model.layers.parameters() if p.dim() == 2)

    def work(lengths, pairs=None):
        pairs = sum(n * (n + 1) // 2 for n in lengths) if pairs is None else pairs
        return 6 * products * sum(lengths) + 6 * 97 * 32 * 39 + 14 * 2 * 4 * 16 * pairs

    tree = work([65], sum(range(1, 40)) + sum(sum(range(start + 1, start + 14)) for start in (6, 16)))
    for name, lengths in (
        ("N samples, padded", [19, 29, 39]),
        ("one plain pass, leaking", [57]),
        ("a plain row", [128]),
    ):
        by_work, by_tokens = steps.work_of(name, case, counted)
        assert by_work == pytest.approx(work(lengths) / tree)
        assert by_tokens == pytest.approx(sum(lengths) / sum(map(len, case.layouts)))
    assert steps.work_of("one pass, dense", case, counted) == (None, None)


def test_growth(tmp_path):
    found = main("growth", tmp_path, "--turns", "1", "2", "16", "32", "--lengths", "4/8/4", "--steps-to", "2")
    assert [row["turns"] for row in found["growth"]["4/8/4"] if row.get("step ms, one")] == [1, 2]
    one, n = found["exponents"]["4/8/4"]
    assert 1.9 < one["pairs"] < 2.0
    assert 2.6 < n["pairs"] < 2.95
    passes = {row["pass"]: row for row in found["passes"]}
    assert [name for name, row in passes.items() if row["equal"] == "yes"] == [
        "N passes",
        "single pass",
        "single pass, the paper's rule",
        "single pass, through patch",
    ]
    assert [name for name, row in passes.items() if row["leaks"] == "yes"] == ["one plain pass"]
    assert all(row["gradients off by"] > 0.1 for row in passes.values() if row["equal"] == "no")


def test_exponents_on_made_data():
    growth = module("growth")
    rows = [
        {"turns": n, "pairs, one": 7.0 * n**2, "pairs, N": 3.0 * n**2.5 if n >= 16 else 1.0} for n in (4, 16, 32, 64)
    ]
    assert growth.slope(rows, "pairs, one") == pytest.approx(2)
    assert growth.slope(rows, "pairs, N") == pytest.approx(2.5)  # what is below 16 turns does not count
    assert growth.slope(rows[:2], "pairs, one") is None


def test_the_number_of_stored_tokens_is_as_said():
    growth = module("growth")
    assert growth.stored([(2, 3, 4), (5, 0, 6), (1, 1, 1)]) == (2 + 3 + 8) + (5 + 6) + (1 + 1 + 1)
    assert growth.stored([(2, 0, 4)]) == 6
    assert growth.lengths(20)["as said"] == 20


def test_long(tmp_path):
    found = main("long", tmp_path, "--lengths", "512", "--model", "tiny", "--shape", "3 x 16/40/16")
    [row] = found["rows"]
    assert row["turns"] > 3
    assert row["gradients off by"] < 1e-4
    assert row["dense: mask GiB"] == 512**2 / 2**30


def test_a_long_conversation_that_is_wrong_is_noticed():
    long, steps, shared = module("long"), module("steps"), module("shared")
    made, _ = steps.model("tiny", CPU, "chunked")
    case = ways.Case(made, [shared.conversation([(6, 9, 4)] * 5, 97)], "chunked")
    assert max(long.three_turns(case)) < 1e-4
    [layout] = case.layouts
    wrong = dataclasses.replace(layout, position_ids=torch.arange(len(layout)))
    with verifying():  # otherwise such places are refused
        assert max(long.three_turns(ways.Case(made, [wrong], "chunked"))) > 1e-3


def test_data(tmp_path):
    few = ("--turns", "2", "--steps", "3", "--tokens", "2000", "4000", "--documents", "500")
    tables = main("data", tmp_path, *few)["tables"]
    assert [row["encode"] for row in next(iter(tables.values()))] == ["chat", "agent"]
    for row in tables["pack"]:
        assert 0.9 < row["full, the last aside"] <= 1
    assert [row["parts"] for row in tables["split"]] == [2, 2, 4]


def test_first_fit_decreasing_is_as_it_is_written():
    data = module("data")
    sizes = list(data.drawn(2000, 4096))
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        at = next((k for k, room in enumerate(rooms) if size <= room), None)
        if at is None:
            rooms.append(4096 - size)
        else:
            rooms[at] -= size
    assert data.first_fit_decreasing(sizes, 4096) == len(rooms)


def test_where(tmp_path):
    [one] = main("where", tmp_path, "--shapes", "3 x 6/12/6", "--model", "tiny")["cells"]
    share = {row["part"]: row["% of the step"] for row in one["parts"]}
    assert sum(share[name] for name in ("lists", "attention", "gather", "head", "the rest")) == pytest.approx(100)


# ---- a run: cells that are kept, and what is left behind

SCRIPT = """
import sys, time
sys.path.insert(0, {benchmarks!r})
from shared import Run
run = Run({file!r}, "words")
run.option("--wait", action="store_true")
options = run.start()
for n in range(3):
    def make():
        if n == 2 and options.wait:
            print("waiting", flush=True)
            time.sleep(60)
        return {{"made": time.time()}}
    run.cell({{"n": n}}, make)
run.finish(rows=[run.cell({{"n": n}}, dict) for n in range(3)])
"""


def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path):
    """Killed at its third cell, whose line is cut off as a crash would leave it."""
    script = BENCHMARKS / "shared.py"
    code = SCRIPT.format(benchmarks=str(BENCHMARKS), file=str(script))
    command = [sys.executable, "-c", code, "--out", str(tmp_path), "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen([*command, "--wait"], stdout=subprocess.PIPE, text=True, env=environment)
    for line in killed.stdout:
        if "waiting" in line:
            break
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    kept = tmp_path / "shared.cells.jsonl"
    first = [json.loads(line)["found"] for line in kept.read_text().splitlines()]
    assert len(first) == 2
    with kept.open("a") as file:
        file.write('{"cell": {"n": 2}, "found": {"ma')
    before = time.time()
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [row["made"] for row in rows[:2]] == [one["made"] for one in first]
    assert rows[2]["made"] > before
    assert json.loads((tmp_path / "shared.json").read_text())["rows"] == rows
    assert len(kept.read_text().splitlines()) == 3


def made_run(tmp_path, *options):
    run = module("shared").Run(str(BENCHMARKS / "masks.py"), "words")
    run.start(["--out", str(tmp_path), "--device", "cpu", *options])
    return run


def test_cells_of_another_code_machine_or_number_of_repeats_are_measured_again(tmp_path, monkeypatch):
    shared = module("shared")
    assert made_run(tmp_path).cell({"n": 1}, lambda: {"x": 1})["x"] == 1
    assert made_run(tmp_path).cell({"n": 1}, lambda: {"x": 2})["x"] == 1
    assert made_run(tmp_path).cell({"n": 2}, lambda: {"x": 2})["x"] == 2
    assert made_run(tmp_path, "--repeats", "7").cell({"n": 1}, lambda: {"x": 3})["x"] == 3
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000")
    run = made_run(tmp_path)
    assert "MALLOC_TRIM_THRESHOLD_=1000" in run.lines[0]
    assert run.cell({"n": 1}, lambda: {"x": 4})["x"] == 4
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    monkeypatch.setattr(shared, "_fingerprint", lambda files: "another")
    assert made_run(tmp_path).cell({"n": 1}, lambda: {"x": 5})["x"] == 5


def test_without_time_no_cell_is_begun(tmp_path):
    assert made_run(tmp_path, "--seconds", "0").cell({"n": 1}, dict) == {"n": 1, "left out": "no time left"}


def test_a_cell_that_fails_leaves_the_others(tmp_path):
    run = made_run(tmp_path)
    run.cell({"n": 1}, lambda: {"x": 1})
    with pytest.raises(ZeroDivisionError):
        run.cell({"n": 2}, lambda: {"x": 1 / 0})
    assert list(made_run(tmp_path).known.values()) == [{"x": 1}]


@pytest.mark.parametrize("name", ["chat", "reasoning", "tool loop", "agent", "3 x 5/0/5"])
@pytest.mark.parametrize("tokens", [12, 128, 1024, 4999])
def test_a_conversation_fills_its_row_to_the_token(name, tokens):
    shared = module("shared")
    layout = shared.conversation(shared.shape(name).filling(tokens))
    assert len(layout) == tokens
    grown = shared.shape(name).grown(max(tokens, 1024))
    assert grown.turns == shared.shape(name).turns
    assert len(shared.conversation([grown[1:]] * grown.turns)) == grown.tokens <= max(tokens, 1024)


def test_paths_are_those_of_the_samples():
    shared = module("shared")
    layout = shared.conversation([(5, 9, 3), (4, 0, 6), (2, 7, 1), (3, 3, 3)])
    samples = [sample.prompt_ids + sample.target_ids for sample in fr.unmerge(layout)]
    found = [layout.input_ids[path].tolist() for path in shared.paths(layout, 4)]
    assert found == [ids[:-1] for ids in samples[::-1]]
    assert len(shared.paths(layout, 2)) == 2


def test_in_words():
    words = module("shared").in_words
    assert [words(x) for x in (1234, 0.012345, 1234.5, None, [2.0, 1.0, 3.0], True, "x")] == [
        "1,234",
        "0.0123",
        "1,234",
        "",
        "2 (1 to 3)",
        "1",
        "x",
    ]


# ---- the card


@pytest.mark.slow
@pytest.mark.parametrize("call", ["call1.sh", "call2.sh"])
def test_a_call_is_rehearsed(call, tmp_path):
    """Every part from end to end on a CPU, each with a file of its own."""
    environment = {**os.environ, "REHEARSE": "1", "OUT": str(tmp_path), "PYTHON": sys.executable}
    done = subprocess.run(["bash", BENCHMARKS / "card" / call], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = {"call1.sh": ["attention", "long", "step", "tests"], "call2.sh": ["fa4", "overheads", "sweep"]}[call]
    assert sorted(path.stem for path in tmp_path.glob("*.txt")) == parts
    for part in parts:
        assert "rc 0 after" in (tmp_path / f"{part}.txt").read_text()


def test_both_calls_end_within_the_time_that_is_lent():
    seconds = []
    for call in ("call1.sh", "call2.sh"):
        lines = (BENCHMARKS / "card" / call).read_text().splitlines()
        seconds += [
            int(line.split("part ", 1)[1].split()[1]) for line in lines if "part " in line and "$PYTHON" in line
        ]
    assert len(seconds) == 7
    assert sum(seconds) <= 750


def test_attention_on_a_card_is_held_against_packed_samples(tmp_path):
    [cell] = main("attention", tmp_path, "--small")["cells"]
    rows = {row["way"]: row for row in cell["ways"]}
    assert list(rows) == ["packed", "flex", "segments", "causal SDPA, flash"]
    attention = module("attention")
    bench = attention.Bench(attention.SMALL[0], CPU)
    flops = 4 * bench.cell.heads * bench.cell.size * bench.pairs
    for name in ("flex", "segments"):
        assert rows[name]["error"] < 1e-4
        assert rows[name]["forward TFLOP/s"] * rows[name]["forward ms"] * 1e9 == pytest.approx(flops)
    assert rows["segments"]["both of packed"] == pytest.approx(
        rows["segments"]["both TFLOP/s"] / rows["packed"]["both TFLOP/s"]
    )
    causal = torch.ones_like(fr.dense_mask(bench.row)).tril()
    with pytest.raises(ArithmeticError, match="off by"):
        bench.over_tree(
            lambda: F.scaled_dot_product_attention(*bench.inputs, causal, enable_gqa=True).transpose(1, 2), True
        )


def test_packed_paths_are_the_samples():
    attention, shared = module("attention"), module("shared")
    layout = shared.conversation([(5, 9, 3), (4, 1, 6), (2, 7, 1)])
    packed = attention.packed_paths(layout, CPU)
    lengths = [len(s) - 1 for s in fr.unmerge(layout)][::-1]
    assert packed.begins.diff().tolist() == lengths
    assert packed.pairs == sum(n * (n + 1) // 2 for n in lengths)
    assert len(set(packed.index[packed.owned].tolist())) == int(packed.owned.sum()) == len(layout) - 3


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


def test_new_trees_compile_nothing_new(tmp_path):
    found = main("overheads", tmp_path, "--model", "tiny", "--length", "256", "--rows", "3")["steps"]
    assert [row["after it"] for row in found] == [0, 0]
    assert all(row["mask / step"] == pytest.approx(row["mask ms"] / row["step ms"]) for row in found)
    assert math.isfinite(found[0]["step ms"])


def test_a_call_that_is_short_is_repeated_inside_its_time():
    a = torch.randn(64, 64)
    calls = {"once": lambda: a @ a, "often": lambda: [a @ a for _ in range(40)]}
    found = measure.interleaved(calls, 3, least_seconds=0.01)
    assert min(found["often"]) > min(found["once"]) > 0
    assert relative_l2([a], [a]) == 0
