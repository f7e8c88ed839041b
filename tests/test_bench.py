"""`flexreason bench`: ways that compute the same, timed side by side; the packed one's kernel as torch documents it."""

import json

import pytest
import torch

from flexreason import cli
from flexreason.bench import ways
from flexreason.commands import bench as command
from flexreason.proof.float64 import relative_l2
from models import TINY, tiny

CONFIG = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], **TINY}
SMALL = ["--turns", "3", "--lengths", "6/9/4", "--tokens", "150", "--repeats", "2"]


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
    assert list(ways) == ["N samples, one by one", "one pass, segments", "one pass, dense"]
    for one in ways.values():
        assert one["loss"] == pytest.approx(found["ways"][0]["loss"], rel=1e-5)
        assert len(one["ms"]) == 2
        assert one["peak"] > 0
    assert ways["N samples, one by one"]["speed_up"] == 1
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
    assert 'backend "flex" has no backward on CPU' in out
    assert "One pass did not run" in out
    right = ways.one_pass
    monkeypatch.setattr(ways, "one_pass", lambda *args: 1.01 * right(*args))
    assert cli.main(["bench", str(config), *SMALL]) == 1
    assert "which is another" in capsys.readouterr().out


def raises(error):
    def step(*args):
        raise error

    return step


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), RuntimeError("no such kernel"), ValueError("row: no")]
)
def test_samples_that_do_not_run_cost_no_more_than_the_comparison(config, capsys, monkeypatch, error):
    monkeypatch.setattr(ways, "one_by_one", raises(error))
    found = figures(capsys, config, *SMALL)
    samples, one_pass = found["ways"]
    assert samples["failed"] == f"{type(error).__name__}: {error}"
    assert one_pass["median_ms"] > 0
    assert one_pass["speed_up"] is None
    assert cli.main(["bench", str(config), *SMALL]) == 0
    assert str(error) in capsys.readouterr().out
    monkeypatch.setattr(ways, "one_pass", raises(error))
    assert cli.main(["bench", str(config), *SMALL]) == 1
    assert "One pass did not run" in capsys.readouterr().out


def test_a_way_of_the_samples_that_differs_is_no_reference(config, capsys, monkeypatch):
    monkeypatch.setattr(ways, "unfit_to_pack", lambda root: "")
    monkeypatch.setattr(ways, "packed", lambda root, packs, loss: 1.01)  # at once, and wrong
    one_by_one, packed, _ = figures(capsys, config, *SMALL)["ways"]
    assert (one_by_one["speed_up"], packed["name"]) == (1, "N samples, packed")
    monkeypatch.setattr(ways, "packed", lambda root, packs, loss: one_by_one["loss"])  # at once, and right
    assert [one["speed_up"] == 1 for one in figures(capsys, config, *SMALL)["ways"]] == [False, True, False]


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
    found = figures(capsys, config, "--data", path, "--tokens", "12", "--repeats", "1")
    assert (found["conversations"], found["turns"], found["tree"]["tokens"]) == (2, 2, 10)
    assert "2 of 3 conversations, which fit into a row of 12 tokens" in found["notes"]
    found = figures(capsys, config, "--data", path, "--tokens", "4", "--repeats", "1")
    assert "no conversation fits into 4 tokens; the shortest, of 5, is taken whole" in found["notes"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--lengths", "6/9"], "--lengths: expected tokens as 64/256/64, found '6/9'"),
        (["--lengths", "0/9/4"], "--lengths: expected what humans say and what is answered, found 0/9/4"),
        (["--repeats", "0"], "--repeats: expected at least 1, found 0"),
        (["--turns", "0"], "--turns: expected at least 1, found 0"),
        (["--data", "x.jsonl", "--turns", "2"], "--turns and --lengths are of random conversations"),
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


@pytest.mark.parametrize(("family", "config"), [("Qwen3", {}), ("Mistral", {"sliding_window": 7})])
@pytest.mark.parametrize("length", [1, 60, 1000])
def test_packed_samples_are_the_samples(family, config, length, monkeypatch):
    """Packed in any way, loss and gradients are those of the samples one by one; the kernel's place is taken."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn", within)
    model = tiny(family, **config)
    options = type("Options", (), {"lengths": "6/9/4", "turns": 3, "seed": 0})
    samples = command.random_conversations(options, 97, 1)[0]

    def gradients(step):
        model.zero_grad()
        loss = step()
        return loss, [p.grad.clone() for p in model.parameters()]

    expected_loss, expected = gradients(lambda: ways.one_by_one(model, samples, "model"))
    packs = ways.pack(samples, length, torch.device("cpu"))
    assert len(packs) == {1: 3, 60: 2, 1000: 1}[length]
    loss, found = gradients(lambda: ways.packed(model, packs, "model"))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert relative_l2(found, expected) < 1e-5
    assert model.config._attn_implementation == "sdpa"


def test_packing_is_refused_by_name_where_there_are_no_kernels():
    model = tiny("Qwen3")
    assert ways.unfit_to_pack(model) == "flash attention of variable lengths is for GPUs"
    softcapped = tiny("Gemma2", attn_logit_softcapping=2.0, query_pre_attn_scalar=8)
    options = type("Options", (), {"lengths": "6/9/4", "turns": 2, "seed": 0})
    packs = ways.pack(command.random_conversations(options, 97, 1)[0], 100, torch.device("cpu"))
    with pytest.raises(NotImplementedError, match="no softcap and no sinks"):
        ways.packed(softcapped, packs, "model")
