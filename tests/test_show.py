"""`flexreason show`: its example, conversations of the user's own in a terminal, and pictures."""

import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flexreason as fr
from flexreason.cli import main
from flexreason.demo.material import make_tokenizer
from flexreason.show import example, paper
from flexreason.show.picture import CELL, colours_of, layout_picture
from flexreason.show.plain import plain
from flexreason.show.read import scenes
from flexreason.show.scene import Scene
from flexreason.show.table import folded, shortened
from flexreason.show.terminal import MOST_TURNS, SHARED, Terminal, wants_colour
from flexreason.show.texts import printable, width_of
from flexreason.tree.mask import interval_rule
from strategies import random_tree, random_turns, samples, turns

MESSAGES = [
    {"role": "user", "content": "2+3?"},
    {"role": "assistant", "reasoning_content": "easy", "content": "5"},
    {"role": "user", "content": "Twice?"},
    {"role": "assistant", "reasoning_content": "5+5", "content": "10"},
]

CODE = re.compile(r"\x1b\[[0-9;]*m")

AT_80 = """\
chats.jsonl, line 1
2 turns · 41 tokens in samples, 34 stored once (1.21 to 1) · 16 trained, 11 of
them reasoning

turn 0 · message 1: 7 tokens -> 8 trained ──────────────────────────────────────
    prompt │ <user>2+3?<end><bot>
 reasoning ▌ <think>easy</think>
  response ▌ 5<end>

turn 1 · message 3: 18 tokens, 7 as in turn 0 -> 8 trained ─────────────────────
   =prompt │ <user>2+3?<end><bot>
  response │ 5
    prompt │ <end><user>Twice?<end><bot>
 reasoning ▌ <think>5+5</think>
  response ▌ 10<end>"""


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


# --- the example without data


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


# --- a scene


@given(samples())
def test_a_scene_is_the_samples(found):
    scene = Scene(fr.lay_out(found))
    for number, (sample, turn) in enumerate(zip(found, scene.turns, strict=True)):
        ids = [*sample.prompt_ids, *sample.target_ids]
        assert scene.layout.input_ids[torch.from_numpy(scene.path(number))].tolist() == ids
        n = len(sample.prompt_ids)
        assert turn.n_prompt == n
        before = [*found[number - 1].prompt_ids, *found[number - 1].target_ids] if number else []
        alike = [one == other for one, other in zip(ids, before, strict=False)]
        assert turn.n_shared == next((at for at, is_alike in enumerate(alike) if not is_alike), len(alike))
        assert turn.trained.tolist() == [False] * n + [True] * (len(ids) - n)
        edges = [part.start for part in turn.parts] + [len(ids)]
        assert edges[0] == 0
        assert [part.end for part in turn.parts] == edges[1:]
        for part in turn.parts:
            assert part.shared == (part.start < turn.n_shared)
            assert part.trained == (part.start >= n)
            assert part.kind == ("response" if part.start >= n else "prompt")
            assert part.end <= (turn.n_shared if part.shared else len(ids))
            assert scene.text(number, part) == "".join(f"{token} " for token in ids[part.start : part.end])
        for one, other in pairwise(turn.parts):
            assert (one.kind, one.trained, one.shared) != (other.kind, other.trained, other.shared)


@given(turns())
def test_parts_have_the_kinds_of_the_paper(found):
    scene = Scene(fr.lay_out_turns(found))
    for number, turn in enumerate(scene.turns):
        expected = []
        for h, _, r in found[:number]:
            expected += ["prompt"] * len(h) + ["response"] * len(r)
        h, t, r = found[number]
        expected += ["prompt"] * len(h) + ["reasoning"] * len(t) + ["response"] * len(r)
        assert [part.kind for part in turn.parts for _ in range(part.start, part.end)] == expected
        assert turn.trained.tolist() == [False] * (len(expected) - len(t) - len(r)) + [True] * (len(t) + len(r))


words = st.text(st.sampled_from("aé漢🙂😀🙃\n <\u0301"), min_size=1, max_size=6)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=4))
def test_text_is_whole_where_samples_part_within_a_character(texts):
    """Bytes are tokens here, and emoji begin with the same three."""
    tokenizer = Bytes()
    found = [fr.Sample(list(prompt.encode()), list(target.encode())) for prompt, target in texts]
    scene = Scene(fr.lay_out(found), tokenizer)
    for number, (prompt, target) in enumerate(texts):
        assert "".join(scene.text(number, part) for part in scene.turns[number].parts) == prompt + target


class Bytes:
    """Decodes bytes."""

    def decode(self, ids, **_):
        return bytes(ids).decode(errors="replace")


def test_pieces_are_the_text_of_a_real_tokenizer(tokenizer):
    layout = fr.encode([{**m, "content": f"{m['content']} né 漢字 🙂"} for m in MESSAGES], tokenizer)
    scene = Scene(layout, tokenizer)
    for number, sample in enumerate(fr.unmerge(layout)):
        whole = tokenizer.decode([*sample.prompt_ids, *sample.target_ids])
        assert "".join(scene.text(number, part) for part in scene.turns[number].parts) == whole
    assert {tokenizer.decode([scene.ids[at]]) for at in range(len(layout)) if scene.is_added(at)} == {
        "<user>", "<bot>", "<end>", "<think>", "</think>",
    }  # fmt: skip


def test_spaces_that_a_tokenizer_leaves_out_at_a_beginning_are_there():
    class Pieces:
        def decode(self, ids, **_):
            return " ".join(("so", "it", "goes")[i] for i in ids)

    assert Scene(fr.lay_out([fr.Sample([0, 1], [2])]), Pieces()).texts == [" so", " it", " goes"]


# --- in a terminal


def drawn(scene, width=80, colour=False, **options):
    return list(Terminal(width, colour, **options).draw(scene))


@pytest.fixture
def scene(tokenizer):
    return Scene(fr.encode(MESSAGES, tokenizer), tokenizer, "chats.jsonl, line 1", [1, 3])


def test_the_terminal_at_80_columns(scene):
    assert "\n".join(drawn(scene)) == AT_80


def test_the_terminal_at_200_columns(scene):
    wide = "\n".join(line.rstrip("─") for line in drawn(scene, 200))
    expected = re.sub("─+", "", AT_80).replace(" of\nthem", " of them")
    assert wide == expected
    assert {len(line) for line in drawn(scene, 200) if "─" in line} == {200}


def test_colours_say_the_same_again(scene):
    plain, coloured = drawn(scene), drawn(scene, colour=True)
    assert [CODE.sub("", line) for line in coloured] == [line.replace("=prompt", " prompt") for line in plain]
    assert "\x1b" not in "".join(plain)
    text = "\n".join(coloured)
    assert "\x1b[35measy\x1b[0m" in text  # reasoning
    assert "\x1b[35;4m</think>\x1b[0m" in text  # a marker in it
    assert "\x1b[32m10\x1b[0m" in text  # a response
    first, second = text.split("turn 1 ·")
    assert "\x1b[36m2+3?\x1b[0m" in first
    assert "\x1b[2m2+3?\x1b[0m" in second  # shared with the turn before


def test_what_is_trained_is_marked_and_nothing_else(scene):
    lines = drawn(scene, 200)
    marked = [line.partition("▌ ")[2] for line in lines if "▌" in line]
    assert marked == ["<think>easy</think>", "5<end>", "<think>5+5</think>", "10<end>"]


@pytest.mark.parametrize("width", [20, 31, 55, 56, 80, 200])
def test_no_line_is_wider_than_the_terminal_and_none_loses_text(tokenizer, width):
    content = "漢字かな交じり文 né " * 4 + "x" * 300 + "\n\n  indented\tand 🙂 so on"
    scene = Scene(fr.encode([{**m, "content": content} for m in MESSAGES], tokenizer), tokenizer, "x" * 15)
    lines = drawn(scene, width)
    assert max(map(width_of, lines)) <= max(width, 20)
    own = [line for line in drawn(scene, width, everything=True) if re.match(r" *\S* *[│▌] ", line)]
    text = "".join(re.sub(r"^.*?[│▌] ", "", line) for line in own)
    expected = "".join(
        scene.text(n, part).replace("\t", "    ").replace("\n", "↵")
        for n, turn in enumerate(scene.turns)
        for part in turn.parts
    )
    assert text == expected


def test_control_characters_are_shown_and_not_sent(tokenizer):
    text = "a\x1b[2Jb\x07\x00\u202ec\u200bd\x9be\r"
    scene = Scene(fr.encode([{"role": "user", "content": text}, MESSAGES[1]], tokenizer), tokenizer, "\x1b[31mred")
    out = "\n".join(drawn(scene, 200))
    assert not [c for c in out if not c.isprintable() and c != "\n"]
    assert "a⟨U+001B⟩[2Jb⟨U+0007⟩⟨U+0000⟩⟨U+202E⟩c⟨U+200B⟩d⟨U+009B⟩e⟨U+000D⟩" in out
    assert printable("né 漢字 🙂👩‍👧\n\t") == "né 漢字 🙂👩‍👧\n\t"


def conversation(n, words=6):
    told = " ".join(["word"] * words)
    pairs = [
        ({"role": "user", "content": f"question {k}, {told}?"}, {**MESSAGES[1], "content": f"{k}"}) for k in range(n)
    ]
    return [message for pair in pairs for message in pair]


def test_two_hundred_turns_are_what_a_person_can_read(tokenizer):
    scene = Scene(fr.encode(conversation(200), tokenizer), tokenizer)
    lines = drawn(scene)
    assert len(lines) < 100
    text = "\n".join(lines).replace("\n", " ")
    assert "turns 6 to 197 are left out: 192 turns" in text
    assert "none of them without reasoning" in text
    assert "--turn 6-197 shows them, --all everything" in text
    shown = [int(n) for n in re.findall(r"^turn (\d+)", "\n".join(lines), re.MULTILINE)]
    assert shown == [0, 1, 2, 3, 4, 5, 198, 199]
    new = sum(len(scene.turns[n].trained) - scene.turns[n].n_shared for n in range(6, 198))
    assert f"{new:,} tokens of their own" in text
    assert sum(line.startswith("turn ") for line in drawn(scene, everything=True)) == 200
    assert len([line for line in lines if "as in turn 198" in line]) >= 1


@pytest.mark.parametrize("n", [1, 2, MOST_TURNS])
def test_few_turns_are_shown_whole(tokenizer, n):
    messages = conversation(n, words=60)
    lines = drawn(Scene(fr.encode(messages, tokenizer), tokenizer))
    text = "".join(re.sub(r"^.*?[│▌] ", "", line) for line in lines)
    assert all(message["content"] in text for message in messages)
    assert "left out" not in "".join(lines[:12])
    for turn in re.split(r"\nturn ", "\n".join(lines))[1:]:
        shared = turn.split("\n    prompt")[0].splitlines()[1:]
        assert len(shared) <= SHARED + 2


# --- conversations of a file


@pytest.fixture
def data(tmp_path):
    """A file of three conversations, the second long, the third refused at message 3, and a tokenizer's folder."""
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    long = [{**message, "content": message["content"] * 20} for message in MESSAGES]
    cut = [*MESSAGES[:3], {"role": "assistant", "content": "<think>so it"}]
    lines = [json.dumps({"messages": messages}) for messages in (MESSAGES, long, cut, MESSAGES)]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    return ["show", "--data", str(tmp_path / "chats.jsonl"), "--tokenizer", str(tmp_path / "tokenizer")]


def test_a_conversation_is_shown(data, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*data, "--conversation", "0"]) == 0
    out = capsys.readouterr().out
    legend, _, rest = out.partition("\n\n")
    assert "▌ trained" in legend
    assert rest.partition("\n")[2].rstrip("\n") == AT_80.partition("\n")[2]
    assert "\x1b" not in out


def test_files_can_stand_without_data(data, capsys):
    assert main([data[0], data[2], *data[3:], "--conversation", "0"]) == 0
    assert "line 1" in capsys.readouterr().out


def test_a_refusal_is_shown_at_its_message_and_stops_nothing(data, capsys):
    assert main([*data, "--limit", "4"]) == 1
    out = capsys.readouterr().out
    assert out.count("turn 0 ·") == 3  # of lines 1, 2 and 4
    refused = out.partition("line 3\n")[2].partition("line 4\n")[0].splitlines()
    at = next(n for n, line in enumerate(refused) if "refused, unclosed-reasoning" in line)
    assert "<think>so it" in refused[at - 1]
    assert "3 assistan" in refused[at - 1]
    assert main([*data, "--limit", "4", "--skip-invalid"]) == 0
    assert main([*data, "--limit", "4", "--accept", "unclosed-reasoning"]) == 0
    assert "! message 3 (turn 1): content that begins a reasoning block and never closes it" in capsys.readouterr().out


def test_what_a_template_refuses_is_shown_at_its_message(data, capsys, tmp_path):
    with (tmp_path / "chats.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"messages": [*MESSAGES[:2], {"role": "tool", "content": "42"}, *MESSAGES[2:]]}))
    assert main([*data, "--limit", "9"]) == 1
    refused = capsys.readouterr().out.partition("line 5\n")[2].splitlines()
    at = next(n for n, line in enumerate(refused) if "refused, template error" in line)
    assert "2 tool │ 42" in refused[at - 1]
    assert "3 user │ Twice?" in "".join(refused[at:])


def test_where_all_is_refused_nothing_was_shown(data, capsys):
    assert main([*data, "--conversation", "2"]) == 2
    printed = capsys.readouterr()
    assert "<think>so it" in printed.out
    assert "line 3: refused, unclosed-reasoning: its content begins with <think>" in printed.err


def test_a_line_that_is_no_conversation_is_shown_as_such(data, capsys, tmp_path):
    with (tmp_path / "chats.jsonl").open("a") as file:
        file.write('\n{broken\n{"messages": []}\n')
    assert main([*data, "--limit", "9"]) == 1
    out = capsys.readouterr().out
    assert "line 5\n" in out
    assert "refused, bad input: no JSON" in out


def test_more_conversations_are_told(data, capsys):
    assert main([*data]) == 1
    assert "--limit N shows more than 3" in capsys.readouterr().out
    main([*data, "--limit", "4"])
    assert "--limit N" not in capsys.readouterr().out


def test_turns_can_be_chosen(data, capsys):
    assert main([*data, "--conversation", "0", "--turn", "1"]) == 0
    assert re.findall("^turn (.)", capsys.readouterr().out, re.MULTILINE) == ["1"]
    assert main([*data, "--conversation", "0", "--turn", "0-1"]) == 0
    assert re.findall("^turn (.)", capsys.readouterr().out, re.MULTILINE) == ["0", "1"]
    for wrong, told in (("2", "has 2 turns"), ("1-0", "has 2 turns"), ("x", "such as 3 or 3-5")):
        assert main([*data, "--conversation", "0", "--turn", wrong]) == 2
        assert told in capsys.readouterr().err


def test_what_is_to_be_looked_at_is_told_first():
    template_text = "It is so. And then it is twice that, of which one half remains, and from here on we go to the"
    messages = [
        MESSAGES[0], {**MESSAGES[1], "train": False}, MESSAGES[2],
        {"role": "assistant", "reasoning_content": template_text, "content": "10"},
        MESSAGES[0], {"role": "assistant", "reasoning_content": "why", "content": ""},
    ]  # fmt: skip
    from flexreason.data.files import read_conversations
    from flexreason.data.intake import EntryEncoder

    encoder = EntryEncoder(make_tokenizer())
    [scene] = scenes(read_conversations([{"messages": messages}]), encoder)
    told = [(remark.turn, remark.message) for remark in scene.remarks]
    assert told == [(None, 1), (0, 3), (1, 5)]
    first, second, third = (remark.words for remark in scene.remarks)
    assert first == "this answer is not trained: train: false"
    assert second.startswith("its reasoning ends within a sentence, “… ")
    assert "no answer" in third
    lines = drawn(scene)
    assert [line for line in lines[2:6] if line.startswith("! message 1")]
    assert [message.number for message in scene.untrained] == [1]
    [plain] = scenes(read_conversations([{"messages": MESSAGES}]), encoder)
    assert plain.remarks == []


def test_the_tree_is_a_table_and_the_mask_is_folded(data, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main([*data, "--conversation", "1", "--tree", "--mask"]) == 0
    out = capsys.readouterr().out
    messages = [{**message, "content": message["content"] * 20} for message in MESSAGES]
    layout = fr.encode(messages, make_tokenizer())
    table = out.split("index", 1)[1].splitlines()[1:]
    rows = [line.split() for line in table[: table.index("")]]
    assert sum(int(row[1]) for row in rows) == len(layout)
    assert sum(int(row[6]) for row in rows) == len(layout.target_ids)
    assert {row[3] for row in rows} == {"prompt", "ctx", "think", "resp"}
    assert max(map(len, out.splitlines()[1:])) <= 100  # the first is the path
    cells = [line.split()[-1] for line in out.splitlines() if re.fullmatch(r" *\d+ [█▒·]+", line)]
    assert cells == fr.draw_mask(layout, width=90).splitlines()


def test_a_tree_that_is_too_large_for_a_terminal_is_cut_and_told(tmp_path, capsys):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": conversation(200)}))
    given = ["show", str(tmp_path / "chats.jsonl"), "--tokenizer", str(tmp_path / "tokenizer"), "--tree"]
    assert main(given) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) < 210
    assert "stretches more; --all prints them, --html FILE draws the tree" in out
    assert main([*given, "--all"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 600
    assert main([*given[:-1], "--svg", str(tmp_path / "x.svg")]) == 2
    assert "use --html FILE, which shows masks of any size" in capsys.readouterr().err


@given(samples())
def test_plain_data_are_the_samples(found):
    """Of any tree: texts and numbers of tokens, and what is shared is what the sample before begins with."""
    layout = fr.lay_out(found)
    made = plain(Scene(layout))
    before = []
    for one, sample in zip(made["samples"], fr.unmerge(layout), strict=True):
        ids = [*sample.prompt_ids, *sample.target_ids]
        shared, prompt, target = (
            [int(token) for token in one[part].split()] for part in ("shared", "prompt", "target")
        )
        assert (shared + prompt, target) == (sample.prompt_ids, sample.target_ids)
        alike = next(
            (n for n, (a, b) in enumerate(zip(ids, before, strict=False)) if a != b), min(len(ids), len(before))
        )
        assert len(shared) == one["shared_tokens"] == min(alike, len(sample.prompt_ids))
        assert (one["tokens"], one["prompt_tokens"]) == (len(ids), len(sample.prompt_ids))
        before = ids
    assert made["tokens_in_samples"] == sum(one["tokens"] for one in made["samples"])
    assert made["tokens_in_tree"] == len(layout)


def test_what_is_shown_is_there_as_json(data, capsys):
    assert main([*data, "--json", "--limit", "4"]) == 1
    made = json.loads(capsys.readouterr().out)
    assert not made["more"]
    first, _, refused, _ = made["conversations"]
    assert [one["message"] for one in first["samples"]] == [1, 3]
    for number, one in enumerate(first["samples"]):
        answer = MESSAGES[one["message"]]
        assert answer["content"] in one["target"]
        assert one["turn"] == number
        assert one["tokens"] == one["prompt_tokens"] + one["trained_tokens"]
        assert one["how"]
    assert first["trained_tokens"] == sum(one["trained_tokens"] for one in first["samples"])
    assert refused["refused"]
    assert refused["reason"] == "unclosed-reasoning"
    assert main([*data, "--json", "--conversation", "0", "--turn", "1"]) == 0
    [same] = json.loads(capsys.readouterr().out)["conversations"]
    assert same == {**first, "samples": first["samples"][1:]}
    assert main([*data, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["more"]
    for drawn in (["--tree"], ["--mask"], ["--html", "x.html"]):
        assert main([*data, "--json", *drawn]) == 2
        assert f"{drawn[0]} draws, and --json is for programs" in capsys.readouterr().err


def test_figures_of_the_example_are_there_as_json(capsys):
    assert main(["show", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["exact"]
    assert made["one_pass"]["loss"] == pytest.approx(made["n_samples"]["loss"], rel=1e-9)
    [example] = made["conversations"]
    assert made["n_samples"]["tokens"] == example["tokens_in_samples"]
    assert made["one_pass"]["tokens"] == example["tokens_in_tree"]
    assert example["samples"][1]["target"] == "5 x4 20 /think 20 end "


def test_tokenized_samples_need_no_tokenizer(tmp_path, capsys):
    lines = [{"prompt_ids": [1, 2], "target_ids": [7], "conversation": 0}]
    lines += [{"prompt_ids": [1, 2, 5], "target_ids": [8, 9], "conversation": 0}]
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main(["show", "--data", str(tmp_path / "samples.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "=prompt │ 1 2 \n    prompt │ 5 \n  response ▌ 8 9 " in out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--conversation", "4"], "there is no conversation 4"),
        (["--conversation", "-1"], "expected a number from 0 on"),
        (["--data", "nowhere.jsonl", "--limit", "9"], "no such file"),
        (["--tokenizer", "nowhere/at.json"], "cannot be loaded"),
        (["--paper"], "--paper draws five turns of its own"),
        (["--html", "nowhere/at.html"], "there is no folder nowhere"),
        (["--limit", "0"], "expected at least 1"),
    ],
)
def test_what_cannot_be_shown_is_told(data, capsys, more, words):
    assert main([*data, *more]) == 2
    assert words in capsys.readouterr().err


def test_messages_without_a_tokenizer_are_refused(data, capsys):
    assert main(data[:3]) == 2
    assert "give --tokenizer" in capsys.readouterr().err
    for option in (["--conversation", "0"], ["--tokenizer", "x"], ["--tree"], ["--html", "x.html"]):
        assert main(["show", *option]) == 2
        assert "--data" in capsys.readouterr().err


def test_colours_are_for_terminals(monkeypatch):
    def wanted(is_terminal):
        monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: is_terminal))
        return wants_colour()

    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert wanted(True)
    assert not wanted(False)
    monkeypatch.setenv("TERM", "dumb")
    assert not wanted(True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert wanted(False)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wanted(True)


def test_whoever_stops_reading_breaks_nothing(data):
    command = [sys.executable, "-m", "flexreason", *data, "--all"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
        assert process.wait() == 1


def test_a_layout_shows_itself(tokenizer, capsys, tmp_path):
    layout = fr.encode(MESSAGES, tokenizer)
    layout.show()
    out = capsys.readouterr().out
    assert "reasoning ▌ <think>easy</think>" in out
    fr.lay_out_turns([([1, 2], [10, 11], [20])]).show()
    assert "reasoning ▌ 10 11" in capsys.readouterr().out
    fr.lay_out_turns([([1, 2], [10, 11], [20])]).show(tokenizer)
    assert "reasoning ▌" in capsys.readouterr().out
    layout.show(html=str(tmp_path / "x.html"))
    assert "&lt;" not in (tmp_path / "x.html").read_text().partition("<body>")[0]
    assert "Twice?" in "".join(json.loads(data_of((tmp_path / "x.html").read_text()))["conversations"][0]["texts"])
    frame = layout._repr_html_()
    assert frame.startswith("<iframe srcdoc=")
    assert frame.count("<") == 2  # the page is within a text
    assert "too large for a notebook" in fr.lay_out_turns(random_turns([(9000, 9000, 9000)]))._repr_html_()


def data_of(html):
    return re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1]


def test_a_page_holds_what_is_asked_for_and_nothing_from_elsewhere(data, capsys, tmp_path):
    path = tmp_path / "page.html"
    assert main([*data, "--html", str(path)]) == 1
    assert "4 conversations, 1 refused" in capsys.readouterr().out
    html = path.read_text()
    assert re.findall(r"https?://|url\(|@import|<link|<img", html) == []
    assert "default-src 'none'" in html
    made = json.loads(data_of(html))["conversations"]
    assert [one["where"].rpartition(", ")[2] for one in made] == ["line 1", "line 2", "line 3", "line 4"]
    assert made[2]["refused"]["reason"] == "unclosed-reasoning"
    assert made[2]["refused"]["message"] == 3
    assert main([*data, "--html", str(path), "--limit", "2"]) == 0
    assert "More conversations follow" in capsys.readouterr().out
    assert len(json.loads(data_of(path.read_text()))["conversations"]) == 2


# --- the tree as a table


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


# --- pictures


def cells_of(svg, x, y, n, cell=CELL):
    """The cells that a picture shows in the mask whose corner is at (x, y), with their colours."""
    cells = {}
    for colour, path in re.findall(r'<path class="(\w+)" d="(.*?)"/>', svg):
        for left, top, width in re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)", path):
            kv, q = (float(left) - x) / cell, (float(top) - y) / cell
            if float(width) == cell - 1 and 0 <= kv < n and 0 <= q < n:
                assert (kv, q) == (int(kv), int(q))
                cells[int(q), int(kv)] = colour
    return cells


@pytest.mark.parametrize("layout", [fr.lay_out(random_tree()), fr.lay_out_turns(random_turns([(3, 4, 2), (2, 0, 3)]))])
def test_a_picture_shows_the_mask(layout):
    texts = [f"<{token}&>" for token in layout.input_ids.tolist()]
    picture = layout_picture(layout, texts)
    ground = picture.squares[0]
    cells = cells_of(picture.svg(), ground.x, ground.y, len(layout))
    assert sorted(cells) == [tuple(cell) for cell in fr.dense_mask(layout).nonzero().tolist()]
    colours = colours_of(layout)
    assert all(colour == colours[kv] for (_, kv), colour in cells.items())
    assert "&lt;" in picture.svg()


def test_the_paper_and_ours_are_one_mask_permuted():
    layout = paper.paper_layout()
    assert layout.n_samples == 5
    svg, n = paper.paper_picture().svg(), len(layout)
    grounds = [square for square in paper.paper_picture().squares if square.colour == "ground"]
    papers, ours = (cells_of(svg, ground.x, ground.y, n) for ground in grounds)
    order = paper.in_papers_order(layout).tolist()
    assert sorted(order) == list(range(n))
    assert sorted(ours) == [tuple(cell) for cell in fr.dense_mask(layout).nonzero().tolist()]
    assert {(order[q], order[kv]): colour for (q, kv), colour in papers.items()} == ours
    names = [name for name, _, _ in paper.segments(layout, paper.in_papers_order(layout))]
    expected = [f"{s.format(i)}" for i in range(5) for s in ("h{}", "t{}", "r{}'", "r{}")]
    expected.remove("r4'")  # which nothing reads
    assert names == expected


@pytest.mark.parametrize(("name", "draw"), [("paper", paper.paper_picture), ("idea", example.example_picture)])
def test_the_picture_in_the_docs_is_the_one_that_is_drawn(name, draw):
    committed = Path(__file__).parent.parent / "docs" / f"{name}.svg"
    assert committed.read_text() == draw().svg()


def test_the_idea_is_drawn_as_it_is():
    """Samples as they are taken out of the tree, the tree's branches where they part, and its mask."""
    layout, picture = example.example_layout(), example.example_picture()
    samples = [sample.prompt_ids + sample.target_ids for sample in fr.unmerge(layout)]
    ids = layout.input_ids.tolist()
    assert [[ids[index] for index in example.path_of(layout, turn)] for turn in range(3)] == samples
    words = [label for label in picture.labels if label.anchor == "middle"]
    lines = [[label.text for label in words if label.y == y] for y in sorted({label.y for label in words})]
    of_samples, (trunk, *branches) = lines[:3], lines[3:]
    assert of_samples == [[example.WORDS[token] for token in sample] for sample in samples]
    assert trunk == of_samples[2]
    assert branches == [of_samples[1][10:], of_samples[0][4:]]
    at = {label.text: label.x for label in words if label.y == max(label.y for label in words)}
    assert at["so"] == next(label.x for label in words if label.text == "so")  # below the token that it follows
    ground = next(square for square in picture.squares if square.colour == "ground")
    cells = cells_of(picture.svg(), ground.x, ground.y, len(layout), example.CELL)
    assert sorted(cells) == [tuple(cell) for cell in fr.dense_mask(layout).nonzero().tolist()]


def test_the_paper_is_drawn_in_a_terminal_beside_or_below(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["show", "--paper"]) == 0
    out = capsys.readouterr().out
    assert "The paper's order: turn by turn" in out.splitlines()[0]
    assert "Ours: the trunk first" in out.splitlines()[0]
    monkeypatch.setenv("COLUMNS", "70")
    assert main(["show", "--paper"]) == 0
    narrow = capsys.readouterr().out
    assert max(map(len, narrow.splitlines())) <= 70
    mask = fr.dense_mask(paper.paper_layout())
    assert narrow.count("█") == out.count("█") == 2 * int(mask.sum())
    for options in (
        ["--svg", str(tmp_path / "a.svg"), "--png", str(tmp_path / "a.png")],
        ["--svg", str(tmp_path / "b.svg")],
    ):
        assert main(["show", "--paper", *options]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.svg").read_text() == (tmp_path / "b.svg").read_text() == paper.paper_picture().svg()


def test_a_small_conversation_is_a_picture(data, capsys, tmp_path):
    assert main([*data, "--conversation", "0", "--svg", str(tmp_path / "x.svg")]) == 0
    assert "&lt;think&gt;" in (tmp_path / "x.svg").read_text()
    assert main(["show", "--svg", str(tmp_path / "y.svg")]) == 0
    assert ">usr<" in (tmp_path / "y.svg").read_text()


def test_without_matplotlib_the_extra_is_named(data, capsys, monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["show", "--paper", "--png", str(tmp_path / "x.png")]) == 2
    assert "pip install 'flexreason[plot]'" in capsys.readouterr().err
    assert main(["show", "--paper", "--svg", str(tmp_path / "x.svg")]) == 0
