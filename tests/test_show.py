"""`flexreason show`: its example, and a conversation of the user's own."""

import json

import pytest
import torch
from hypothesis import given

import flexreason as fr
from flexreason.cli import main
from flexreason.commands.show import IN_FULL, fold_mask, folded, shortened
from flexreason.demo.material import make_tokenizer
from flexreason.tree.mask import interval_rule
from strategies import random_turns, samples

MESSAGES = [
    {"role": "user", "content": "2+3?"},
    {"role": "assistant", "reasoning_content": "easy", "content": "5"},
    {"role": "user", "content": "Twice?"},
    {"role": "assistant", "reasoning_content": "5+5", "content": "10"},
]


def test_the_example_is_drawn_and_its_single_pass_is_exact(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["show"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.split("index", 1)[1].splitlines()[1:7]] == [
        "token", "turn", "role", "position", "until", "target",
    ]  # fmt: skip
    assert max(map(len, out.splitlines())) <= 104
    assert "     bot ████························" in out
    losses = [line.split()[-1] for line in out.splitlines() if line.startswith(("  N samples", "  single pass"))]
    assert len(losses) == 2
    assert losses[0] == losses[1]
    assert "the same loss and the same gradients" in out


def test_the_example_fails_when_the_single_pass_is_wrong(capsys, monkeypatch):
    """Here: every token sees all before it."""
    plain = interval_rule
    monkeypatch.setattr("flexreason.tree.mask.interval_rule", lambda until: plain(torch.full_like(until, len(until))))
    assert main(["show"]) == 1
    assert "NOT the same" in capsys.readouterr().out


@pytest.fixture
def data(tmp_path):
    """A file of two conversations, the second long, and a tokenizer's folder."""
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    long = [{**message, "content": message["content"] * 20} for message in MESSAGES]
    lines = [json.dumps({"messages": messages}) for messages in (MESSAGES, long)]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    return ["show", "--data", str(tmp_path / "chats.jsonl"), "--tokenizer", str(tmp_path / "tokenizer")]


def test_a_short_conversation_is_drawn_in_full(data, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")
    assert main(data) == 0
    out = capsys.readouterr().out
    layout = fr.encode(MESSAGES, make_tokenizer())
    assert len(layout) <= IN_FULL
    assert "line 1:\n2 training sequences" in out
    assert "<user>2+3?<end><bot>  ->  <think>easy</think>5<end>" in out
    assert "<user>2+3?<end><bot>5<end><user>Twice?<end><bot>  ->  <think>5+5</think>10<end>" in out
    lines = out.splitlines()
    until = next(line for line in lines if line.startswith("until")).split()[1:]
    assert list(map(int, until)) == layout.until.tolist()
    assert [line.split()[-1] for line in lines[-len(layout) :]] == fr.draw_mask(layout, width=IN_FULL).splitlines()


def test_a_long_conversation_is_folded_and_says_how_long_it_is(data, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main([*data, "--conversation", "1"]) == 0
    out = capsys.readouterr().out
    tokenizer = make_tokenizer()
    messages = [{**message, "content": message["content"] * 20} for message in MESSAGES]
    layout = fr.encode(messages, tokenizer)
    assert len(layout) > IN_FULL
    assert "line 2:\n2 training sequences" in out
    assert f"{len(layout)} tokens" in out
    table = out.split("index", 1)[1].splitlines()[1:]
    rows = [line.split() for line in table[: table.index("")]]
    assert sum(int(row[1]) for row in rows) == len(layout)
    assert sum(int(row[6]) for row in rows) == len(layout.target_ids)
    assert {row[3] for row in rows} == {"prompt", "ctx", "think", "resp"}
    assert max(map(len, out.splitlines()[1:])) <= 100  # the first is the path
    drawn = [line.split()[-1] for line in out.splitlines() if "█" in line or "▒" in line][1:]
    assert drawn == fr.draw_mask(layout, width=64).splitlines()


def test_tokenized_samples_need_no_tokenizer(tmp_path, capsys):
    lines = [{"prompt_ids": [1, 2], "target_ids": [7], "conversation": 0}]
    lines += [{"prompt_ids": [1, 2, 5], "target_ids": [8, 9], "conversation": 0}]
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main(["show", "--data", str(tmp_path / "samples.jsonl")]) == 0
    assert "1 2 5  ->  8 9" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--conversation", "2"], "there is no conversation 2"),
        (["--conversation", "-1"], "expected a number from 0 on"),
        (["--data", "nowhere.jsonl"], "no such file"),
        (["--tokenizer", "nowhere/at.json"], "cannot be loaded"),
    ],
)
def test_what_cannot_be_shown_is_told(data, capsys, more, words):
    assert main([*data, *more]) == 2
    assert words in capsys.readouterr().err


def test_messages_without_a_tokenizer_are_refused(data, capsys):
    assert main(data[:3]) == 2
    assert "give --tokenizer" in capsys.readouterr().err
    assert main(["show", "--conversation", "1"]) == 2
    assert "--data" in capsys.readouterr().err


@given(samples())
def test_the_folded_mask_is_the_mask_folded(found):
    layout = fr.lay_out(found)
    for side in (1, 2, 3, 7, len(layout)):
        width = -(-len(layout) // side)
        if -(-len(layout) // width) == side:  # `draw_mask` chooses the side by the width
            assert fold_mask(layout, side) == fr.draw_mask(layout, width=width)


def test_stretches_hold_every_token_once_and_are_paths():
    layout = fr.lay_out_turns(random_turns([(30, 20, 10), (5, 0, 7), (9, 14, 6)]))
    rows = [line.split() for line in folded(layout, lambda ids: "-".join(map(str, ids)), 1000).splitlines()[1:]]
    at = 0
    for index, tokens, turn, _, position, until, _, text in rows:
        end = at + int(tokens)
        assert int(index) == at
        assert text == "-".join(map(str, layout.input_ids[at:end].tolist()))
        assert layout.position_ids[at:end].tolist() == list(range(int(position), int(position) + int(tokens)))
        assert set(layout.turn[at:end].tolist()) == {int(turn)}
        assert set(layout.until[at:end].tolist()) == {int(until)}
        at = end
    assert at == len(layout)


def test_texts_are_shortened_in_the_middle():
    assert shortened("abc", 3) == "abc"
    assert all(len(shortened("x" * 100, width)) == width for width in range(8, 100))
