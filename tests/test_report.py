"""`flexreason report`: every figure is that of a plain count, and nothing is left unsaid."""

import json
import re
import subprocess
import sys
from collections import Counter
from functools import partial
from itertools import chain

import pytest
import torch
from transformers import DeepseekV3Config, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig

import flexreason as fr
from flexreason.cli import main
from flexreason.data.figures import SIZES, Amount, Figures, dense, figures_of, shape_of
from flexreason.data.formats import BadInput
from flexreason.data.intake import EntryEncoder, Intake, Item
from flexreason.data.pack import Packer
from flexreason.data.report import report
from flexreason.data.summary import Fill, Summary, bin_of
from templating import SHAPES, TOOLS, answer, encode_samples, trl_tokenizer, user

TOY = dense("toy", width=16, inner=32, layers=2, heads=2, groups=1, size=8, vocabulary=50)

CHATS = [{"messages": messages, "tools": TOOLS if "tool" in name else None} for name, messages in SHAPES.items()]


@pytest.fixture(scope="module")
def tokenizer():
    return trl_tokenizer("qwen3")


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(path)
    return str(path)


def write(path, entries):
    path.write_text("".join((entry if isinstance(entry, str) else json.dumps(entry)) + "\n" for entry in entries))
    return str(path)


def figures(tokenizer, length=16384, entries=CHATS, **options):
    return list(Intake(entries, EntryEncoder(tokenizer, **options), then=partial(figures_of, length=length)))


def length_of(sample):
    return len(sample.prompt_ids) + len(sample.target_ids)


def pairs_in(layout):
    """Counted in the mask."""
    return int(fr.dense_mask(layout).sum())


# --- figures


@pytest.mark.parametrize("name", SHAPES)
def test_figures_are_those_of_a_plain_count(tokenizer, name):
    entry = CHATS[list(SHAPES).index(name)]
    (found,) = figures(tokenizer, entries=[entry])
    samples = encode_samples(entry["messages"], tokenizer, entry["tools"])
    roles = Counter(chain(*(sample.target_roles for sample in samples)))
    layout = fr.lay_out(samples)
    assert found.answers == found.samples == len(samples)
    assert found.sample_tokens == sum(map(length_of, samples))
    assert found.sample_pairs == sum(int(torch.ones(n, n).tril().sum()) for n in map(length_of, samples))
    assert found.tree_tokens == len(layout) < found.sample_tokens
    assert found.tree_pairs == found.part_pairs == pairs_in(layout)
    assert (found.reasoning, found.response) == (roles[fr.Role.REASONING], roles[fr.Role.RESPONSE])
    assert found.targets == sum(len(sample.target_ids) for sample in samples)
    assert (found.reasoning > 0) == (name != "chat")
    assert found.longest_sample == max(map(length_of, samples))
    assert (found.parts, found.recomputed, found.too_long) == ([len(layout)], [0], [])
    assert found.how == {"rendered": len(samples)}
    assert 0 < found.render_seconds < found.seconds


SHORTER = [1, 10, 40, 60, 100, 150, 200]


@pytest.mark.parametrize("shorter", SHORTER)
def test_figures_of_what_is_split(tokenizer, shorter):
    entry = CHATS[list(SHAPES).index("several tool loops")]
    layout = fr.encode(entry["messages"], tokenizer, entry["tools"])
    length = len(layout) - shorter
    (found,) = figures(tokenizer, length, [entry])
    samples = encode_samples(entry["messages"], tokenizer, entry["tools"])
    divided = fr.split(layout, length, too_long="drop")
    assert found.parts == list(map(len, divided.parts))
    assert sum(found.recomputed) == divided.recomputed
    assert found.recomputed[0] == 0
    assert found.part_pairs == sum(map(pairs_in, divided.parts))
    whole = [(list(s.prompt_ids), list(s.target_ids)) for s in samples]
    seen = set()  # tokens of earlier parts, as paths: brute force
    for part, again in zip(divided.parts, found.recomputed, strict=True):
        texts = [[*s.prompt_ids, *s.target_ids[:-1]] for s in fr.unmerge(part)]
        paths = {tuple(text[: n + 1]) for text in texts for n in range(len(text))}
        assert len(paths & seen) == again
        assert all((list(s.prompt_ids), list(s.target_ids)) in whole for s in fr.unmerge(part))
        seen |= paths
    lost = {turn for turn, s in enumerate(samples) if length_of(s) - 1 > length}
    assert found.too_long == [[t, length_of(samples[t]), len(samples[t].target_ids)] for t in sorted(lost)]
    kept = [s for turn, s in enumerate(samples) if turn not in lost]
    n = [length_of(s) for s in kept]
    expected = Amount(sum(n), sum(k * (k + 1) // 2 for k in n), sum(len(s.target_ids) for s in kept))
    assert found.one_by_one == expected
    assert found.one_pass == Amount(sum(found.parts), found.part_pairs, expected.targets)


def test_splitting_and_samples_that_are_too_long_did_occur(tokenizer):
    """The cases of the test before are not empty."""
    entry = CHATS[list(SHAPES).index("several tool loops")]
    n = len(fr.encode(entry["messages"], tokenizer, entry["tools"]))
    found = [figures(tokenizer, n - shorter, [entry])[0] for shorter in SHORTER]
    assert any(sum(one.recomputed) for one in found)
    assert any(one.too_long for one in found)
    assert any(len(one.parts) > 1 and not one.too_long for one in found)


def test_figures_fit_on_a_line_of_json(tokenizer):
    for found in figures(tokenizer, 128):
        line = json.dumps(found.as_dict())
        assert len(line) < 1000
        assert Figures.from_dict(json.loads(line)) == found


def test_messages_that_are_not_trained_on(tokenizer):
    messages = [dict(message) for message in SHAPES["mixed"]]
    messages[1]["train"] = False
    (found,) = figures(tokenizer, entries=[messages])
    assert (found.answers, found.samples) == (4, 3)
    (found,) = figures(tokenizer, entries=[messages], turns="last")
    assert (found.answers, found.samples) == (4, 1)
    assert "3 assistant messages besides, not trained on" in str(added([found]))


def test_how_turns_were_found(tokenizer):
    closed = trl_tokenizer("qwen3_5_nothink")
    summary = added(figures(closed, entries=[SHAPES["mixed"]]))
    assert summary.how["thinking off"] == 2  # those that have reasoning
    assert summary.reasoning == 0
    (line,) = [line for line in str(summary).splitlines() if line.startswith("warning")]
    assert "thinking off in 2 turns" in line
    assert "warning" not in str(added(figures(tokenizer)))


# --- summaries


def added(found, length=16384, shape=None):
    summary = Summary(length, shape)
    for one in found:
        summary.add(one)
    return summary


def untimed(summary):
    return {key: value for key, value in summary.as_dict().items() if key != "seconds"}


def test_a_summary_is_the_sum_of_its_figures(tokenizer):
    found = figures(tokenizer, 256)
    summary = added(found, 256, TOY)
    made = summary.as_dict()
    assert made["conversations"] == len(found) == 6
    assert made["turns"] == sum(one.samples for one in found)
    assert made["samples"] == {
        "tokens": sum(one.sample_tokens for one in found),
        "pairs": sum(one.sample_pairs for one in found),
    }
    assert made["trees"]["tokens"] == sum(one.tree_tokens for one in found)
    assert made["ratio"] == made["samples"]["tokens"] / made["trees"]["tokens"]
    assert made["targets"]["all"] == sum(one.targets for one in found)
    longest = max(found, key=lambda one: one.tree_tokens)
    assert made["longest_tree"] == {"tokens": longest.tree_tokens, "where": longest.where}
    assert made["rows"]["tokens"] == sum(sum(one.parts) for one in found)
    assert made["split"]["conversations"] == sum(len(one.parts) > 1 for one in found)
    assert made["too_long"]["samples"] == sum(len(one.too_long) for one in found) > 0
    assert made["too_long"]["examples"][0].startswith(next(one.where for one in found if one.too_long))
    assert sum(made["histograms"]["tree"].values()) == sum(made["histograms"]["turns"].values()) == 6
    one_by_one, one_pass = (
        sum(TOY.work(amount) for amount in amounts)
        for amounts in zip(*((one.one_by_one, one.one_pass) for one in found), strict=True)
    )
    assert made["work"] == [
        {"model": "toy", "samples": one_by_one, "one_pass": one_pass, "speed_up": one_by_one / one_pass}
    ]
    assert sum(shown[0] for shown in summary.turns.values()) == 6


def test_a_summary_can_be_read_at_any_time_and_goes_on(tokenizer):
    found = figures(tokenizer, 512) * 40
    whole, looked_at = added(found, 512), Summary(512)
    for one in found:
        looked_at.add(one)
        assert str(looked_at)
    assert untimed(looked_at) == untimed(whole)
    stored = added([Figures.from_dict(json.loads(json.dumps(one.as_dict()))) for one in found], 512)
    assert stored.as_dict() == whole.as_dict()


def test_rows_are_those_of_the_packer(tokenizer):
    found = figures(tokenizer, 512) * 70
    parts = [size for one in found for size in one.parts]
    again = [size for one in found for size in one.recomputed]
    rows = list(Packer(512).pack(enumerate(parts)))
    fill = added(found, 512).rows
    assert fill.n == len(rows) > 10
    net = [sum(parts[n] - again[n] for n in row) / 512 for row in rows]
    gross = [sum(parts[n] for n in row) / 512 for row in rows]
    assert sum(again)
    assert fill.full == pytest.approx(sum(net[:-1]) / len(net[:-1]))
    assert fill.with_recomputed == pytest.approx(sum(gross[:-1]) / len(gross[:-1]))
    assert fill.last_full == pytest.approx(net[-1])
    assert fill.full < fill.with_recomputed <= 1


def test_data_of_which_no_row_takes_any(tokenizer):
    summary = added(figures(tokenizer, 16), 16)
    made, words = summary.as_dict(), str(summary)
    assert made["too_long"]["samples"] == made["turns"] > len(made["too_long"]["examples"]) == 5
    assert words.count(": turn ") == 5
    assert (made["rows"]["number"], made["rows"]["full"], made["work"][0]["speed_up"]) == (0, None, None)
    assert "rows of 16          none" in words
    assert "speed-up" not in words
    assert f"{summary.samples} samples of 6 conversations, by themselves" in words


@pytest.mark.parametrize(("turns", "gains"), [(1, False), (12, True)])
def test_what_gains_nothing_is_said(tokenizer, turns, gains):
    """One turn shares nothing: its tree is the sample. Of twelve turns nearly all is shared."""
    messages = [user("two and two"), answer("four")] * turns
    summary = added(figures(tokenizer, entries=[{"messages": messages}]), 512)
    speed_up = summary.as_dict()["work"][-1]["speed_up"]
    assert (speed_up > 1.15) == gains
    words = f"Speed-up {speed_up:.2f}: these conversations share too little; train them as they are."
    assert (words in str(summary)) != gains


def test_memory_does_not_grow_with_the_conversations():
    summary, sizes = Summary(4096), []
    for n in range(1, 4001):
        size = 1 + n * 7919 % 4000
        summary.add(
            Figures(f"line {n}", "messages", 3, 1 + n % 90, 2 * size, 9 * size, size, 5 * size, 4, 3, size,
                    [size], [0], 5 * size, [], {"rendered": 3})
        )  # fmt: skip
        held = (summary.cells, summary.turns, summary.tree_lengths, summary.examples, summary._fill.waiting)
        sizes.append(sum(map(len, held)))
    assert max(sizes[2000:]) <= sizes[1999] + 20


def test_one_row_is_not_left_aside():
    fill = Fill(100)
    fill.add(40)
    fill.add(20, 10)
    assert (fill.flushed().n, fill.flushed().full, fill.flushed().last_full) == (1, None, 0.5)
    assert fill.n == 0  # as it was


def test_bins_are_an_eighth_of_a_doubling():
    bins = [bin_of(n) for n in range(5000)]
    assert bins == sorted(bins)
    assert all(at <= n < at * 1.125 + 1 for n, at in enumerate(bins))
    assert bins[:17] == list(range(17))


# --- work


def test_work_is_counted_as_the_benchmark_counts_it():
    """Of plain decoders: 6 x P x tokens + 6 x V x D x targets + 14 x layers x heads x head size x pairs."""
    config = Qwen3Config(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    products = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    assert TOY.work(Amount(11, 70, 5)) == 6 * products * 11 + 6 * 50 * 16 * 5 + 14 * 2 * 2 * 8 * 70
    assert TOY.weights == products


def saved(config, path):
    config.save_pretrained(path)
    return str(path)


def test_shapes_are_read_from_a_config(tmp_path):
    small = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    plain = shape_of(saved(Qwen3Config(**small, **heads), tmp_path / "plain"))
    assert (plain.weights, plain.head, plain.pair) == (TOY.weights, TOY.head, TOY.pair)
    assert shape_of(str(tmp_path / "plain" / "config.json")).weights == plain.weights
    tied = shape_of(saved(Qwen3Config(**small, **heads, tie_word_embeddings=True), tmp_path / "tied"))
    assert (tied.weights, tied.head) == (plain.weights, plain.head)

    moe = Qwen3MoeConfig(**small, **heads, moe_intermediate_size=24, num_experts=8, num_experts_per_tok=2)
    found = shape_of(saved(moe, tmp_path / "moe"))
    attention = 16 * 8 * 2 * (2 + 1)
    assert found.weights == 2 * (attention + 2 * 3 * 16 * 24 + 8 * 16)  # two experts of eight, and the router

    compressed = DeepseekV3Config(
        **small, num_attention_heads=2, num_key_value_heads=2, q_lora_rank=6, kv_lora_rank=4, qk_nope_head_dim=6,
        qk_rope_head_dim=2, v_head_dim=4, moe_intermediate_size=24, n_routed_experts=8, num_experts_per_tok=2,
        n_group=1, topk_group=1, first_k_dense_replace=1,
    )  # fmt: skip
    assert shape_of(saved(compressed, tmp_path / "mla")).pair == 2 * 2 * (8 * 8 + 6 * 4)

    windowed = Qwen3Config(**small, **heads, sliding_window=8, use_sliding_window=True, max_window_layers=1)
    assert "windows are not counted" in shape_of(saved(windowed, tmp_path / "windowed")).note
    with pytest.raises(ValueError, match="none: the shapes of a causal language model cannot be read"):
        shape_of(str(tmp_path / "none"))


def test_usual_sizes_have_their_names():
    for shape in SIZES:
        tied = shape.head if shape.name in ("0.6B", "4B") else 2 * shape.head
        assert (shape.weights + tied) / 1e9 == pytest.approx(float(shape.name[:-1]), rel=0.05)


# --- the command


def run_json(capsys, *arguments):
    code = main(["report", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_command_says_it_in_words(capsys, tmp_path, folder, tokenizer):
    path = write(tmp_path / "chats.jsonl", CHATS)
    assert main(["report", path, "--tokenizer", folder, "--length", "256", "--option", "enable_thinking=true"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    summary = added(figures(tokenizer, 256, enable_thinking=True), 256)
    lines = printed.out.splitlines()
    assert lines[0] == f"{path}: messages (detected), 6 read"
    assert "enable_thinking=True" in printed.out
    assert f"tokens in samples   {summary.in_samples.tokens:,}" in lines
    assert "No conversation is refused." in lines
    assert "longer than a row" in printed.out
    assert f"{path}, line 5: turn " in printed.out  # which samples no row takes
    assert "  8B " in printed.out


def test_the_command_prints_json(capsys, tmp_path, folder, tokenizer):
    path = write(tmp_path / "chats.jsonl", CHATS)
    code, made = run_json(capsys, path, "--tokenizer", folder, "--length", 256, "--history", "content")
    assert code == 0
    expected = untimed(added(figures(tokenizer, 256, [c | {} for c in CHATS], history="content"), 256))
    found = json.loads(json.dumps(expected))
    for name in ("longest_sample", "longest_tree"):
        found[name]["where"] = made["all"][name]["where"]
    found["too_long"]["examples"] = made["all"]["too_long"]["examples"]
    assert {key: value for key, value in made["all"].items() if key != "seconds"} == found
    assert made.keys() == {
        "ok", "tokenizer", "notes", "history", "turns", "options", "accept", "sources", "read",
            "empty", "refused", "all", "seconds",
    }  # fmt: skip
    assert (made["ok"], made["history"], made["read"]) == (True, "content", 6)
    assert [(source["source"], source["format"]) for source in made["sources"]] == [(path, "messages")]
    assert made["all"]["seconds"]["encoding"] > made["all"]["seconds"]["rendering"] > 0


def test_work_is_counted_for_the_model_named(capsys, tmp_path, folder, tokenizer):
    config = Qwen3Config(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, sliding_window=8, use_sliding_window=True, max_window_layers=1,
    )  # fmt: skip
    path, model = write(tmp_path / "chats.jsonl", CHATS), saved(config, tmp_path / "model")
    given = [path, "--tokenizer", folder, "--model", model]
    code, made = run_json(capsys, *given)
    (work,) = made["all"]["work"]
    ((_, one_by_one, one_pass),) = added(figures(tokenizer), shape=TOY).work()
    assert (code, work) == (
        0,
        {"model": model, "samples": one_by_one, "one_pass": one_pass, "speed_up": one_by_one / one_pass},
    )
    assert main(["report", *given]) == 0
    printed = capsys.readouterr().out
    assert model in printed
    assert "windows are not counted" in printed


def test_several_sources_are_taken_together_and_each_said(capsys, tmp_path, folder):
    one = write(tmp_path / "one.jsonl", CHATS[:2])
    two = write(tmp_path / "two.jsonl", [{"prompt": "harbour", "completion": "granite"}, {"prompt": 3}])
    code, made = run_json(capsys, one, two, "--tokenizer", folder)
    assert code == 1
    assert [(s["format"], s["read"], s["refused"], s["conversations"]) for s in made["sources"]] == [
        ("messages", 2, 0, 2),
        ("pairs", 2, 1, 1),
    ]
    assert made["all"]["conversations"] == 3
    assert made["all"]["turns"] == sum(source["turns"] for source in made["sources"])
    assert main(["report", one, two, "--tokenizer", folder]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{one}: messages (detected), 2 read; tokens ")
    assert lines[1].startswith(f"{two}: pairs (detected), 2 read, 1 refused; tokens ")


def test_files_are_named_with_and_without_data_before_and_behind_options(capsys, tmp_path, folder):
    one, two = write(tmp_path / "one.jsonl", CHATS[:2]), write(tmp_path / "two.jsonl", CHATS[2:])
    for arguments in (
        ["--data", one, "--data", two, "--tokenizer", folder],
        [one, two, "--tokenizer", folder],
        ["--tokenizer", folder, one, two],
        ["--tokenizer", folder, one, "--data", two],
    ):
        code, made = run_json(capsys, *arguments)
        assert code == 0
        assert [(source["source"], source["read"]) for source in made["sources"]] == [(one, 2), (two, 4)]
    assert main(["report", "--tokenizer", str(folder)]) == 2
    assert "--data: expected at least one FILE" in capsys.readouterr().err


BAD = [
    [user("harbour")],
    "{broken",
    [user("harbour"), answer("granite"), {"role": "cat", "content": "x"}],
    *([[user("harbour")]] * 4),
]


def test_refusals_are_grouped_and_listed_whole(capsys, tmp_path, folder):
    path = write(tmp_path / "chats.jsonl", [BAD[0], *CHATS[:2], *BAD[1:]])
    code, made = run_json(capsys, path, "--tokenizer", folder)
    assert code == 1
    assert not made["ok"]
    assert (made["read"], made["all"]["conversations"], made["refused"]["number"]) == (9, 2, 7)
    classes = made["refused"]["classes"]
    assert {reason: found["number"] for reason, found in classes.items()} == {
        "nothing to train": 5,
        "bad input": 1,
        "bad message": 1,
    }
    assert classes["nothing to train"]["examples"][0].startswith(f"{path}, line 1: ")
    assert len(classes["nothing to train"]["examples"]) == 3
    assert classes["bad input"]["examples"][0].startswith(f"{path}, line 4: no JSON")
    assert "message 2: unknown role 'cat'" in classes["bad message"]["examples"][0]
    code, made = run_json(capsys, path, "--tokenizer", folder, "--skip-invalid")
    assert (code, made["ok"], made["refused"]["number"]) == (0, True, 7)
    assert main(["report", path, "--tokenizer", folder]) == 1
    assert "7 of 9 conversations refused:\n     5  nothing to train\n" in capsys.readouterr().out


def test_workers_change_nothing(capsys, tmp_path, folder):
    path = write(tmp_path / "chats.jsonl", [*CHATS * 4, *BAD])
    other = write(tmp_path / "more.jsonl", CHATS[:3])
    found = []
    for workers in (0, 2):
        _, made = run_json(capsys, path, other, "--tokenizer", folder, "--length", 256, "--workers", workers)
        for part in (made, made["all"], *made["sources"]):
            part.pop("seconds")
        found.append(made)
    assert found[0] == found[1]
    assert found[0]["all"]["conversations"] == 27


def test_data_that_is_tokenized_needs_no_tokenizer(capsys, tmp_path, folder):
    lines = [
        {"prompt_ids": [1, 2], "target_ids": [3, 4], "conversation": 0},
        {"prompt_ids": [1, 2, 4, 5], "target_ids": [6], "conversation": 0},
        {"prompt_ids": [-1], "target_ids": [1], "conversation": 1},
    ]
    path = write(tmp_path / "samples.jsonl", lines)
    code, made = run_json(capsys, path, "--skip-invalid")
    assert code == 0
    assert made["sources"][0]["format"] == "samples"
    assert (made["all"]["turns"], made["all"]["samples"]["tokens"], made["all"]["trees"]["tokens"]) == (2, 9, 7)
    assert made["all"]["found"] == {"given": 2}
    assert "line 3: sample 0: prompt_ids" in made["refused"]["classes"]["bad input"]["examples"][0]
    assert main(["report", path, "--skip-invalid"]) == 0
    assert "not known which is which" in capsys.readouterr().out
    assert main(["report", path, "--format", "messages", "--tokenizer", folder]) == 1
    assert "3 of 3 conversations refused" in capsys.readouterr().out


def test_a_tokenizer_without_a_template_is_refused(capsys, tmp_path, tokenizer):
    tokenizer = trl_tokenizer.__wrapped__("qwen3")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "bare")
    path = write(tmp_path / "chats.jsonl", CHATS)
    code, made = run_json(capsys, path, "--tokenizer", tmp_path / "bare", "--skip-invalid")
    assert code == 1  # nothing is left
    assert made["refused"]["classes"]["no chat template"]["number"] == 6
    assert main(["report", path, "--tokenizer", str(tmp_path / "bare")]) == 1
    assert "set tokenizer.chat_template" in capsys.readouterr().out


def test_what_cannot_be_read(capsys, tmp_path, folder):
    path, empty = write(tmp_path / "chats.jsonl", CHATS), write(tmp_path / "empty.jsonl", [])
    wrong = {
        "no such file": [tmp_path / "none.jsonl", "--tokenizer", folder],
        "empty.jsonl: nothing in it": [empty, "--tokenizer", folder],
        "--tokenizer is needed": [path],
        "multiple of 128, found 1000; try 1024": [path, "--tokenizer", folder, "--length", "1000"],
        "multiple of 128, found 0; try 128": [path, "--tokenizer", folder, "--length", "0"],
        "--limit: expected at least 1": [path, "--tokenizer", folder, "--limit", "0"],
        "--workers: expected 0 or more": [path, "--tokenizer", folder, "--workers", "-1"],
        "cannot be loaded": [path, "--tokenizer", tmp_path / "none"],
        "shapes of a causal language model": [path, "--tokenizer", folder, "--model", tmp_path / "none"],
        "NAME=VALUE": [path, "--tokenizer", folder, "--option", "x"],
        "there is no folder": [path, "--tokenizer", folder, "--plot", tmp_path / "none" / "x.png"],
    }
    for words, arguments in wrong.items():
        assert main(["report", *map(str, arguments)]) == 2, words
        printed = capsys.readouterr()
        assert words in printed.err
        assert printed.out == ""


def test_an_empty_source_is_told_and_counted_and_stops_nothing(capsys, tmp_path, folder):
    one, two = write(tmp_path / "one.jsonl", CHATS), write(tmp_path / "two.json", CHATS[:1])
    empty = [tmp_path / name for name in ("none.jsonl", "none.json", "none.parquet", "blank.json")]
    for path in empty:
        path.write_text("\n\n" if path.stem == "blank" else "")
    empty = [str(path) for path in empty]
    given = [empty[0], one, *empty[1:], two, "--tokenizer", folder]
    for workers in (0, 1):
        code, made = run_json(capsys, *given, "--workers", workers)
        assert (code, made["ok"], made["read"], made["empty"]) == (1, False, 7, empty)
        assert [source["read"] for source in made["sources"]] == [0, 6, 0, 0, 0, 1]
    assert main(["report", *map(str, given)]) == 1
    printed = capsys.readouterr().out
    assert all(f"{path}: nothing in it\n" in printed for path in empty)
    assert "No conversation is refused.\n4 of 6 sources have nothing in them.\n" in printed
    assert run_json(capsys, *given, "--skip-invalid")[0] == 0
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "one.jsonl", CHATS)
    (tmp_path / "folder" / "none.json").write_text("")
    assert run_json(capsys, tmp_path / "folder", "--tokenizer", folder)[0] == 0
    assert main(["report", *empty, "--tokenizer", str(folder)]) == 2
    assert "nothing in it" in capsys.readouterr().err


def test_every_refusal_is_written_where_it_is_asked_for(capsys, tmp_path, folder):
    """Three a class are named in words; in the file stand all."""
    path, whole = write(tmp_path / "chats.jsonl", [CHATS[0], *BAD * 3]), write(tmp_path / "whole.json", [[[]]])
    for workers in (0, 1):
        given = ["--data", path, "--data", whole, "--tokenizer", folder, "--refused", tmp_path / "refused.jsonl"]
        code, made = run_json(capsys, *given, "--workers", workers)
        lines = [json.loads(line) for line in (tmp_path / "refused.jsonl").read_text().splitlines()]
        assert (code, len(lines)) == (1, made["refused"]["number"])
        assert Counter(line["reason"] for line in lines) == {
            reason: found["number"] for reason, found in made["refused"]["classes"].items()
        }
        assert max(found["number"] for found in made["refused"]["classes"].values()) > 3
        of_file = [line for line in lines if line["source"] == path]
        assert [line["line"] for line in of_file] == list(range(2, len(BAD) * 3 + 2))
        assert [line["message"] for line in of_file if line["reason"] == "bad message"] == [2, 2, 2]
        assert all(line["words"] and path not in line["words"] for line in of_file)
        assert [(line["line"], line["entry"]) for line in lines if line["source"] == whole] == [(None, 0)]


def test_a_broken_file_is_told_and_stops_nothing(capsys, tmp_path, folder):
    good, broken = write(tmp_path / "good.jsonl", CHATS), tmp_path / "broken.parquet"
    broken.write_text(json.dumps(CHATS[0]) + "\n")
    nowhere = str(tmp_path / "nowhere.jsonl")
    for workers in (1, 0):
        given = [nowhere, broken, good, "--tokenizer", folder, "--workers", workers]
        code, made = run_json(capsys, *given)
        assert (code, made["ok"]) == (1, False)
        sizes = [source["read"] for source in made["sources"]]
        assert sizes == [0, 0, len(CHATS)]
        first, second = made["refused"]["files"]
        assert "nowhere.jsonl: no such file" in first
        assert "broken.parquet: no Parquet file" in second
    assert main(["report", *map(str, given)]) == 1
    out = capsys.readouterr().out
    assert "nowhere.jsonl: no such file or folder; did you mean " in out
    assert "broken.parquet: no Parquet file" in out
    assert "Not read, or not to the end: 2 files" in out
    assert run_json(capsys, *given, "--skip-invalid")[0] == 0
    assert main(["report", nowhere, "--tokenizer", folder]) == 2
    assert "no such file" in capsys.readouterr().err


def test_a_broken_or_empty_file_in_a_folder_stops_none_of_the_others(capsys, tmp_path, folder, tokenizer):
    data = tmp_path / "data"
    data.mkdir()
    write(data / "a.jsonl", CHATS[:2])
    write(data / "b.parquet", CHATS[:1])
    (data / "c.jsonl").write_text("")
    write(data / "d.jsonl", CHATS[2:4])
    code, made = run_json(capsys, data, "--tokenizer", folder)
    assert (code, made["read"]) == (1, 4)
    assert ["b.parquet" in words for words in made["refused"]["files"]] == [True]
    assert main(["report", str(data), "--tokenizer", folder]) == 1
    assert f"went on past {data / 'c.jsonl'}: nothing in it" in capsys.readouterr().out
    with pytest.raises(BadInput, match=r"b\.parquet: no Parquet file"):  # whoever trains is not to lose a file
        list(Intake(data, EntryEncoder(tokenizer), skip_invalid=True))


def test_dirt_is_counted_by_kind_refused_or_trained(capsys, tmp_path, folder):
    cut, empty = answer("<think>so"), answer("")
    chats = [[user("a"), cut, user("b"), cut, user("c"), empty], [user("a"), empty], [user("a"), answer("b")]]
    path = write(tmp_path / "chats.jsonl", [{"messages": chat} for chat in chats])
    accept = ["--accept", "empty-message"]
    for more, cut_off, empties in (
        ([], {"refused": 2, "accepted": 0}, {"refused": 2, "accepted": 0}),
        (accept, {"refused": 2, "accepted": 0}, {"refused": 1, "accepted": 1}),
        ([*accept, "--accept", "unclosed-reasoning"], {"refused": 0, "accepted": 2}, {"refused": 0, "accepted": 2}),
    ):
        for workers in (0, 1):
            _, made = run_json(capsys, path, "--tokenizer", folder, *more, "--workers", workers)
            assert made["refused"]["dirty"] == {"empty-message": empties, "unclosed-reasoning": cut_off}
    main(["report", path, "--tokenizer", folder, *accept])
    assert "Dirty answers, empty-message: 1 refused and 1 accepted (" in capsys.readouterr().out


def test_the_report_is_a_page(capsys, tmp_path, folder):
    path = write(tmp_path / "<b>.jsonl", [*CHATS * 3, *BAD])
    page = tmp_path / "report.html"
    _, made = run_json(capsys, path, "--tokenizer", folder, "--html", page, "--length", 256)
    html = page.read_text()
    held = json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])
    assert held == made
    body = html.partition("<body>")[2].partition('<script type="application/json"')[0]
    assert re.findall(r"https?://|url\(|<link|<img", html) == []
    assert "<b>.jsonl" not in body
    assert "&lt;b&gt;.jsonl" in body
    for words in (f"{made['all']['ratio']:.2f} to 1", f"{made['refused']['number']:,}", "no JSON"):
        assert words in body
    bars = dict(re.findall(r"<title>tree, tokens from ([\d,]+): ([\d,]+)</title>", body))
    shown = {int(at.replace(",", "")): int(n) for at, n in bars.items() if n != "0"}
    assert shown == {int(at): n for at, n in made["all"]["histograms"]["tree"].items()}
    empty = write(tmp_path / "bad.jsonl", BAD)
    assert main(["report", empty, "--tokenizer", folder, "--html", str(page)]) == 1
    assert "What is refused" in page.read_text()


def test_a_limit_is_said(capsys, tmp_path, folder):
    path = write(tmp_path / "chats.jsonl", CHATS)
    assert main(["report", path, "--tokenizer", folder, "--limit", "2"]) == 0
    printed = capsys.readouterr().out
    assert "messages (detected), 2 read" in printed
    assert "no more was read than --limit 2 says" in printed


def test_a_plot_is_written(capsys, tmp_path, folder):
    pytest.importorskip("matplotlib")
    path, png = write(tmp_path / "chats.jsonl", CHATS), tmp_path / "chats.png"
    assert main(["report", path, "--tokenizer", folder, "--plot", str(png)]) == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    assert main(["report", path, "--tokenizer", folder, "--plot", str(tmp_path / "x.what")]) == 2
    assert "what" in capsys.readouterr().err


def test_without_matplotlib_the_extra_is_named(tmp_path, folder):
    path = write(tmp_path / "chats.jsonl", CHATS[:1])
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from flexreason.cli import main\n"
        f"raise SystemExit(main(['report', {path!r}, '--tokenizer', {folder!r}, '--plot', 'x.png']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "flexreason[plot]" in done.stderr


def test_a_report_of_entries_at_hand(tokenizer):
    made = report([CHATS[:2], iter(CHATS)], EntryEncoder(tokenizer), 16384, shape=TOY)
    assert [(source.name, source.format, source.n_read) for source in made.sources] == [
        ("entries", "messages", 2),
        ("entries", "messages", 6),
    ]
    assert made.summary.conversations == 8
    assert not made.refusals.total


def test_an_item_is_enough_for_figures(tokenizer):
    """What the training command does with the items that it takes in."""
    (item,) = Intake(CHATS[:1], EntryEncoder(tokenizer))
    assert isinstance(item, Item)
    assert [figures_of(item, 16384)] == figures(tokenizer, entries=CHATS[:1])
