"""`flexreason bench`: ways that compute the same, timed side by side; the packed one's kernel as torch documents it."""

import json
import time
from dataclasses import replace
from itertools import groupby

import pytest
import torch

import flexreason as fr
from flexreason import cli
from flexreason.bench import batches, measure, steps
from flexreason.bench.measure import ratio
from flexreason.commands import bench as command
from flexreason.proof.float64 import relative_l2
from models import TINY, tiny

CONFIG = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], **TINY}
SMALL = ["--shape", "3 x 6/9/4", "--length", "150", "--repeats", "2"]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def figures(capsys, *arguments):
    assert cli.main(["bench", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("loss", ["model", "chunked"])
def test_ways_have_one_loss_and_their_times(config, capsys, loss):
    found = figures(capsys, config, *SMALL, "--loss", loss, "--backend", "segments", "dense", "--checkpointing")
    ways = {one["name"]: one for one in found["ways"]}
    assert list(ways) == ["N samples, one by one", "N samples, padded", "one pass, segments", "one pass, dense"]
    for name, one in ways.items():
        assert name == "N samples, one by one" or one["gradient_error"] < 1e-4
        assert one["loss"] == pytest.approx(found["ways"][0]["loss"], rel=1e-5)
        assert len(one["ms"]) == 2
        assert one["peak"] > 0
    assert 1 in {ways["N samples, one by one"]["speed_up"], ways["N samples, padded"]["speed_up"]}
    assert any(
        "packed: left out, since flash attention of variable lengths is for GPUs" in note for note in found["notes"]
    )


def test_counted_is_what_is_computed(config, capsys):
    """Three turns of 6/9/4 take 48 + 2 x 9 tokens stored once, in samples of 19, 29 and 39."""
    found = figures(capsys, config, *SMALL)
    assert (found["conversations"], found["turns"]) == (2, 6)
    assert found["tree"] == {
        "tokens": 2 * (6 + 4 + 6 + 4 + 6 + 3 * 13),
        "pairs": 2 * pairs_of_tree(),
        "targets": 2 * 39,
    }
    assert found["samples"]["tokens"] == 2 * (19 + 29 + 39)
    assert found["samples"]["pairs"] == 2 * sum(n * (n + 1) // 2 for n in (19, 29, 39))
    assert found["token_ratio"] == pytest.approx(87 / 65)


def pairs_of_tree():
    """Every token sees as many as its position says and itself: the last sample's 39, and what leaves its path."""
    return sum(range(1, 40)) + sum(sum(range(start + 1, start + 14)) for start in (6, 16))


def test_one_pass_that_differs_or_does_not_run_is_no_success(config, capsys, monkeypatch):
    assert cli.main(["bench", str(config), *SMALL, "--backend", "flex"]) == 1  # it has no backward on CPU
    out = capsys.readouterr().out
    assert "forward alone" in out
    assert "One pass did not run" in out
    right = steps.one_pass
    for off in (1.01, 1.0):
        monkeypatch.setitem(steps.WAYS, "one-pass", lambda case, off=off, **more: worse(right(case, **more), case, off))
        assert cli.main(["bench", str(config), *SMALL]) == 1
        assert "which is another" in capsys.readouterr().out


def worse(way, case, off):
    """A step whose loss is off by a factor, and whose gradients are halved."""

    def step():
        loss = way.step()
        for parameter in case.root.parameters():
            parameter.grad /= 2
        return off * loss

    return replace(way, step=step)


def raises(error):
    def step(*args):
        raise error

    return step


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), RuntimeError("no such kernel"), ValueError("row: no")]
)
def test_samples_that_do_not_run_cost_no_more_than_the_comparison(config, capsys, monkeypatch, error):
    fails = steps.Way("N samples, one by one", raises(error))
    monkeypatch.setitem(steps.WAYS, "one-by-one", lambda case: fails)
    few = ["--ways", "one-by-one", "one-pass"]
    found = figures(capsys, config, *SMALL, *few)
    samples, one_pass = found["ways"]
    assert samples["failed"] == f"{type(error).__name__}: {error}"
    assert one_pass["median_ms"] > 0
    assert one_pass["speed_up"] is None
    assert cli.main(["bench", str(config), *SMALL, *few]) == 0
    assert str(error) in capsys.readouterr().out
    monkeypatch.setitem(steps.WAYS, "one-pass", lambda case, backend: replace(fails, name="one pass"))
    assert cli.main(["bench", str(config), *SMALL, *few]) == 1
    assert "One pass did not run" in capsys.readouterr().out


def test_a_way_of_the_samples_that_differs_is_no_reference(config, capsys, monkeypatch):
    right = steps.one_by_one

    def at_once(loss):  # whose gradients are those of the way before it, or none
        return lambda case: steps.Way("N samples, padded", lambda: loss, trains=False)

    monkeypatch.setitem(steps.WAYS, "padded", at_once(1.01))
    one_by_one, padded, _ = figures(capsys, config, *SMALL)["ways"]
    assert (one_by_one["speed_up"], padded["differs"]) == (1, True)
    monkeypatch.setitem(
        steps.WAYS, "padded", lambda case: replace(worse(right(case), case, 1.0), name="N samples, padded")
    )
    one_by_one, padded, _ = figures(capsys, config, *SMALL)["ways"]
    assert (one_by_one["speed_up"], padded["differs"]) == (1, True)
    monkeypatch.setitem(steps.WAYS, "one-by-one", lambda case: slower(right(case)))
    monkeypatch.setitem(steps.WAYS, "padded", lambda case: replace(right(case), name="N samples, padded"))
    one_by_one, padded, _ = figures(capsys, config, *SMALL)["ways"]
    assert one_by_one["speed_up"] < 1
    assert padded["speed_up"] == 1


def test_what_gains_nothing_and_what_gains_more_than_the_work_is_said(config, capsys, monkeypatch):
    little = "these conversations share too little; train them as they are"
    more = "more than 100 % of what the work says"
    right = {name: steps.WAYS[name] for name in ("one-by-one", "one-pass")}
    only = ["--ways", *right, "--shape", "1 x 6/9/4", "--repeats", "2"]
    monkeypatch.setitem(steps.WAYS, "one-pass", lambda case, backend: slower(right["one-pass"](case, backend)))
    notes = " ".join(figures(capsys, config, *SMALL, *only)["notes"])
    assert (little in notes, more in notes) == (True, False)
    monkeypatch.undo()
    monkeypatch.setitem(steps.WAYS, "one-by-one", lambda case: slower(right["one-by-one"](case)))
    notes = " ".join(figures(capsys, config, *SMALL, *only)["notes"])
    assert (little in notes, more in notes) == (False, True)


def slower(way):
    return replace(way, step=lambda: (time.sleep(0.3), way.step())[1])


def test_work_that_cannot_be_counted_or_not_in_full_is_said(tmp_path, config, capsys, monkeypatch):
    windowed = tmp_path / "windowed.json"
    windowed.write_text(json.dumps({**CONFIG, "model_type": "mistral", "sliding_window": 9}))
    found = figures(capsys, windowed, *SMALL)
    assert any(note.startswith("of work: its windows are not counted") for note in found["notes"])
    monkeypatch.setattr(command, "shape_of", raises(ValueError("its config does not say")))
    found = figures(capsys, config, *SMALL)
    assert "work is not counted: its config does not say" in found["notes"]
    assert found["work_ratio"] is None


def test_data_of_ones_own(config, tmp_path, capsys):
    path = tmp_path / "samples.jsonl"
    path.write_text(3 * (json.dumps({"prompt_ids": [1, 2, 3], "target_ids": [4, 5]}) + "\n"))
    found = figures(capsys, config, "--data", path, "--length", "12", "--repeats", "1")
    assert (found["conversations"], found["turns"], found["tree"]["tokens"]) == (2, 2, 10)
    assert "2 of 3 conversations, which fit into a row of 12 tokens" in found["notes"]
    found = figures(capsys, config, "--data", path, "--length", "4", "--repeats", "1")
    assert "no conversation fits into 4 tokens; the shortest, of 5, is taken whole" in found["notes"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--shape", "2 x 6/9"], "--shape: expected turns and tokens as '8 x 64/256/64', found '2 x 6/9'"),
        (["--shape", "6/9/4"], "--shape: expected turns and tokens as '8 x 64/256/64', found '6/9/4'"),
        (["--shape", "2 x 0/9/4"], "--shape: expected turns in which something is said and answered, found 2 x 0/9/4"),
        (["--shape", "0x6/9/4"], "--shape: expected turns in which something is said and answered, found 0x6/9/4"),
        (["--repeats", "0"], "--repeats: expected at least 1, found 0"),
        (["--length", "0"], "--length: expected at least 1, found 0"),
        (["--data", "x.jsonl", "--shape", "2 x 6/9/4"], "--shape is of random conversations; leave --data out"),
        (["--tokenizer", "x"], "--tokenizer is about data; give --data too"),
        (["--backend", "fast"], "backend: expected one of"),
    ],
)
def test_bad_arguments_are_refused_by_name(config, capsys, arguments, told):
    assert cli.main(["bench", str(config), *arguments]) == 2
    assert told in capsys.readouterr().err


def within(query, key, value, offsets, offsets_k, longest, longest_k, *, scale, window_size, enable_gqa):
    """What torch documents of its variable-length attention, in plain operations."""
    assert torch.equal(offsets, offsets_k)
    assert longest == longest_k == offsets.diff().max()
    assert enable_gqa
    assert window_size[1] == 0
    n = query.shape[1] // key.shape[1]
    sequence = torch.bucketize(torch.arange(len(query)), offsets[1:], right=True)
    behind = torch.arange(len(query))[:, None] - torch.arange(len(query))
    seen = (sequence[:, None] == sequence) & (behind >= 0)
    if window_size[0] >= 0:
        seen &= behind <= window_size[0]
    scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(n, 1)) * scale
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(n, 1))


CONVERSATIONS = [[(5, 9, 3), (4, 0, 6), (2, 7, 1)], [(6, 9, 4)] * 3]


def case_of(model, conversations=CONVERSATIONS):
    generator = torch.Generator().manual_seed(0)
    layouts = [
        fr.lay_out_turns([tuple(torch.randint(0, 97, (n,), generator=generator) for n in turn) for turn in turns])
        for turns in conversations
    ]
    return steps.Case(fr.patch(model), layouts)


def gradients_of(case, way):
    case.root.zero_grad()
    loss = way.step()
    return loss, [p.grad.clone() for p in case.root.parameters()]


@pytest.mark.parametrize("way", [steps.padded, steps.packed_dense, steps.one_pass])
def test_every_exact_way_is_the_samples(way):
    """Against a loop that is written out here."""
    case = case_of(tiny("Qwen3"))
    fr.unpatch(case.model)
    case.model.zero_grad()
    for sample in case.samples:
        ids = torch.tensor([sample.prompt_ids + sample.target_ids])
        logits = case.model(ids).logits[0, len(sample.prompt_ids) - 1 : -1]
        nll = torch.nn.functional.cross_entropy(logits, torch.tensor(sample.target_ids), reduction="sum")
        (nll / case.n_targets).backward()
    expected = [p.grad.clone() for p in case.model.parameters()]
    fr.patch(case.model)
    for made in (steps.one_by_one(case), way(case)):
        assert made.exact
        assert relative_l2(gradients_of(case, made)[1], expected) < 1e-5, made.name
    assert case.root.config._attn_implementation == "sdpa"


def test_padding_is_no_more_than_the_row():
    case = case_of(tiny("Qwen3"), [[(6, 9, 4)] * 9])
    most, shapes = case.row["until"].shape[1], []
    case.root.model.register_forward_pre_hook(
        lambda module, args, given: shapes.append(given["input_ids"].shape), with_kwargs=True
    )
    steps.padded(case).step()
    assert all(b == 1 or b * length <= most for b, length in shapes)
    assert sum(b for b, _ in shapes) == 9
    assert len(shapes) < 9


@pytest.mark.parametrize(("way", "off"), [(steps.leaking, 0.3), (steps.shifted_labels, 0.1)])
def test_what_is_not_the_samples_is_told_by_loss_and_gradients(way, off):
    case = case_of(tiny("Qwen3"))
    right, wrong = measure.measure(case, [steps.one_by_one(case), way(case)], 1)
    assert not wrong.exact
    assert wrong.gradient_error > off
    assert abs(wrong.loss / right.loss - 1) > 1e-3
    assert measure.wrong(wrong, [right, wrong], torch.float32)


def test_the_leaking_pass_holds_every_token_once_and_predicts_every_target():
    case = case_of(tiny("Qwen3"), CONVERSATIONS[:1])
    seen = []
    case.root.model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["input_ids"][0].tolist()), with_kwargs=True
    )
    loss = steps.leaking(case).step()
    [samples] = [fr.unmerge(layout) for layout in case.layouts]
    turns = CONVERSATIONS[0]
    expected = []
    for (n_h, _, _), sample in zip(turns, samples, strict=True):
        expected += sample.prompt_ids[-n_h:] + sample.target_ids
    assert seen == [expected]
    fr.unpatch(case.model)
    logits = case.model(torch.tensor([expected])).logits[0]
    targets, at = [], 0
    for n_h, n_t, n_r in turns:
        targets += range(at + n_h, at + n_h + n_t + n_r)
        at += n_h + n_t + n_r
    plain = torch.nn.functional.cross_entropy(logits[[t - 1 for t in targets]], torch.tensor(expected)[targets])
    assert loss == pytest.approx(float(plain.detach()), rel=1e-5)


def test_ways_that_need_roles_say_so_where_there_are_none():
    layout = fr.lay_out([fr.Sample([1, 2], [3, 4]), fr.Sample([1, 2], [3, 5])])  # shares a target
    case = steps.Case(fr.patch(tiny("Qwen3")), [layout])
    notes = []
    ways = steps.chosen(case, ["one-by-one", "leaking", "shifted-labels", "interleaved"], ["auto"], notes)
    assert [way.name for way in ways] == ["N samples, one by one"]
    assert [note.split(":")[0] for note in notes] == ["leaking", "shifted-labels", "interleaved"]


@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_the_papers_order_is_the_same_tree(turns):
    """Segment by segment, written out here; and its rule sees what the tree sees."""
    layouts = case_of(tiny("Qwen3"), [turns, CONVERSATIONS[0]]).layouts
    row = fr.collate(layouts)
    moved = batches.row_in_papers_order(row)
    at = [(0, i, k) for i, turn in enumerate(turns) for k in kinds(turn, i == len(turns) - 1)]
    at += [(1, i, k) for i, turn in enumerate(CONVERSATIONS[0]) for k in kinds(CONVERSATIONS[0][i], i == 2)]
    found = list(zip(*(moved[name][0].tolist() for name in ("document", "turn", "role")), strict=True))
    assert [key for key, _ in groupby(found) if key[0] >= 0] == at
    dense, again = fr.dense_mask(row), fr.dense_mask(moved, mask="turn_role")
    order = torch.tensor([row_key(row).index(key) for key in row_key(moved)])
    assert torch.equal(again, dense[order][:, order])
    source, real = moved["target_source"][0], row["labels"][0] >= 0
    assert torch.equal(order[source][real], row["target_source"][0][real])


def kinds(turn, is_last):
    """The roles of a turn's segments as they are stored."""
    if not turn[1]:
        return [1, 12]
    return [1, 2, 8] if is_last else [1, 2, 4, 8]


def row_key(row):
    """What tells every token of a row from every other."""
    names = ("document", "turn", "role", "position_ids", "until")
    return list(zip(*(row[name][0].tolist() for name in names), strict=True))


def test_a_ratio_is_taken_repeat_by_repeat():
    assert ratio([2, 9, 4], [1, 3, 4]) == (2, 1, 3)
    assert str(ratio([2, 9, 4], [1, 3, 4])) == "2.00 (1.00 to 3.00)"


def test_calls_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    found = measure.interleaved(calls, 2, before=lambda: order.append("."))
    assert "".join(order) == ".a.b.a.b"
    assert [len(times) for times in found.values()] == [2, 2]


def test_a_peak_is_what_a_call_adds():
    if not measure.memory_is_known(torch.device("cpu")):
        pytest.skip("this kernel does not forget a process's peak")
    held = torch.ones(2**22)
    total, added = measure.peak(lambda: torch.ones(2**25).sum())
    assert added == pytest.approx(2**27, rel=0.05)  # kernels count in batches
    assert total > 2**27 + held.nbytes


@pytest.mark.parametrize(("family", "config"), [("Qwen3", {}), ("Mistral", {"sliding_window": 7})])
@pytest.mark.parametrize("length", [1, 60, 1000])
def test_packed_samples_are_the_samples(family, config, length, monkeypatch):
    """Packed in any way, loss and gradients are those of the samples one by one; the kernel's place is taken."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn", within)
    monkeypatch.setattr(steps, "unfit_to_pack", lambda root: "")
    case = case_of(tiny(family, **config), [[(6, 9, 4)] * 3])
    expected_loss, expected = gradients_of(case, steps.one_by_one(case))
    packs = batches.pack(case.samples, length, torch.device("cpu"))
    assert len(packs) == {1: 3, 60: 2, 1000: 1}[length]
    some = [replace(one, attention=batches.side_by_side(one)) for one in packs]
    for way in (steps.plain(case, "packed", some), steps.packed(case)):
        loss, found = gradients_of(case, way)
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert relative_l2(found, expected) < 1e-5
    assert case.root.config._attn_implementation == "sdpa"


def test_packing_is_refused_by_name_where_there_are_no_kernels(monkeypatch):
    case = case_of(tiny("Qwen3"))
    assert batches.unfit_to_pack(case.root) == "flash attention of variable lengths is for GPUs"
    with pytest.raises(steps.UnfitError, match="is for GPUs"):
        steps.packed(case)
    monkeypatch.setattr(steps, "unfit_to_pack", lambda root: "")
    softcapped = case_of(tiny("Gemma2", attn_logit_softcapping=2.0, query_pre_attn_scalar=8))
    with pytest.raises(NotImplementedError, match="no softcap and no sinks"):
        steps.packed(softcapped).step()
