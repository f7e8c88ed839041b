"""Taking in data: the same layouts by every way in, in any number of processes, and no conversation lost silently."""

import argparse
import itertools
import json
import os
import pickle
import subprocess
import sys
from operator import attrgetter

import pytest
import torch
from torch.utils.data import DataLoader

import flexreason as fr
from flexreason.chat.errors import ConversationError
from flexreason.data import intake, options
from flexreason.data.formats import BadInput
from flexreason.data.intake import AT_A_TIME, EntryEncoder, Intake, Refusals, Refused, start_workers
from flexreason.talk import versions
from templating import SHAPES, TOOLS, answer, call, result, trl_tokenizer, user

CHAT = SHAPES["reasoning chat"]

FORMATS = {
    "messages": {"messages": CHAT},
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": message["content"]}
            if message["role"] == "user"
            else {"from": "gpt", "value": message["content"], "reasoning_content": message["reasoning_content"]}
            for message in CHAT
        ]
    },
    "pairs": {"prompt": CHAT[:-1], "completion": CHAT[-1:]},
    "samples": {"prompt_ids": [5, 6], "target_ids": [7]},
}

TURNS = {"messages": 3, "sharegpt": 3, "pairs": 1, "samples": 1}

BAD = [
    {"messages": [user("harbour")]},  # nothing to train
    {"messages": [user("harbour"), {"role": "cat", "content": "x"}]},
    {"text": "x"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return trl_tokenizer("qwen3")


def chats(n):
    """Conversations that differ, of one to three turns."""
    return [{"messages": [*CHAT[: 2 * (k % 3)], user(f"question {k}"), answer(f"{k}", "why")]} for k in range(n)]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True))


def same_rows(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- an entry to its layout


@pytest.mark.parametrize("format", FORMATS)
def test_an_entry_of_every_format_is_what_encode_makes_of_it(tokenizer, format):
    encoder = EntryEncoder(tokenizer)
    if format == "samples":
        expected = fr.lay_out([fr.Sample([5, 6], [7])])
    else:
        expected = fr.encode(CHAT, tokenizer, turns=None if TURNS[format] == 3 else "last")
    assert expected.n_samples == TURNS[format]
    again = pickle.loads(pickle.dumps(encoder))
    for made in (encoder, EntryEncoder(tokenizer, format=format), again):
        assert same(made(FORMATS[format]), expected)
    (item,) = Intake([FORMATS[format]], encoder)
    assert same(item.layout, expected)
    assert item.conversation.format == format


def test_a_bare_list_of_messages_and_tools_and_options_of_an_entry(tokenizer):
    encoder = EntryEncoder(tokenizer)
    assert same(encoder(CHAT), fr.encode(CHAT, tokenizer))
    loop = SHAPES["tool loop"]
    assert same(encoder({"messages": loop, "tools": TOOLS}), fr.encode(loop, tokenizer, TOOLS))
    assert same(encoder({"messages": loop, "tools": json.dumps(TOOLS)}), fr.encode(loop, tokenizer, TOOLS))
    off = {"enable_thinking": False}
    expected = fr.encode([user("one"), answer("two")], tokenizer, **off)
    entry = {"messages": [user("one"), answer("two")]}
    assert same(encoder(entry | {"chat_template_kwargs": off}), expected)
    assert same(EntryEncoder(tokenizer, **off)(entry), expected)
    assert not same(encoder(entry), expected)


def test_options_are_those_of_encode(tokenizer):
    made = EntryEncoder(tokenizer, turns="last", history="content")({"messages": CHAT})
    assert same(made, fr.encode(CHAT, tokenizer, turns="last", history="content"))
    with pytest.raises(ConversationError, match="history: expected"):
        EntryEncoder(tokenizer, history="none")
    with pytest.raises(BadInput, match="entry: neither messages"):
        EntryEncoder(tokenizer)({"text": "x"})


# --- tables


@pytest.fixture
def table():
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    entries = [*chats(9), {"messages": SHAPES["tool loop"], "tools": TOOLS}]
    return datasets.Dataset.from_list(entries[::-1])  # the first fixes the columns


def test_a_table_is_mapped_in_any_number_of_processes(tokenizer, table):
    encoder = EntryEncoder(tokenizer)
    expected = [item.layout for item in Intake(table, encoder)]
    mapped = {}
    for processes in (None, 2):
        found = table.map(encoder.columns, remove_columns=table.column_names, num_proc=processes)
        row = fr.Collator(2048)([found[n] for n in range(len(found))])
        assert same_rows(row, fr.collate(expected, 2048))
        mapped[processes] = found.to_list()
    assert mapped[None] == mapped[2]


def test_what_a_table_fills_in_is_no_part_of_a_conversation(tokenizer):
    """A table gives every row the keys of all: a template would write the empty ones."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    loops = [[user("harbour"), call(1, "granite"), result(1, "lantern"), answer("pebble")] for _ in range(2)]
    loops[1][1]["tool_calls"][0]["function"]["arguments"] = {"other": "meadow"}
    table = datasets.Dataset.from_list([{"messages": messages} for messages in loops])
    assert table[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"key": "granite", "other": None}
    encoder = EntryEncoder(tokenizer)
    mapped = table.map(encoder.columns, remove_columns=table.column_names)
    taken = [item.layout for item in Intake(table, encoder)]
    for messages, columns, layout in zip(loops, mapped, taken, strict=True):
        expected = fr.encode(messages, tokenizer)
        assert columns["input_ids"] == expected.input_ids.tolist()
        assert same(layout, expected)


MAP = """
import sys; sys.path.insert(0, {tests!r})
import datasets
from flexreason.data.intake import EntryEncoder
from templating import trl_tokenizer
datasets.disable_progress_bars()
table = datasets.load_from_disk({path!r})
made = table.map(EntryEncoder(trl_tokenizer("qwen3")).columns, remove_columns=table.column_names)
print(made.cache_files[0]["filename"])
"""


def test_what_was_mapped_is_found_again(tokenizer, table, tmp_path, monkeypatch):
    """After the tokenizer was used, and by another process; not with another option, template or version."""
    import datasets

    table.save_to_disk(str(tmp_path / "saved"))
    table = datasets.load_from_disk(str(tmp_path / "saved"))

    def mapped(made, **options):
        found = table.map(EntryEncoder(made, **options).columns, remove_columns=table.column_names)
        return found.cache_files[0]["filename"]

    fresh = trl_tokenizer.__wrapped__("qwen3")
    first = mapped(fresh)
    fresh(["some text", "more"], padding=False, truncation=True, max_length=4)
    assert mapped(fresh) == first
    encoder = EntryEncoder(fresh)
    encoder({"messages": CHAT})
    assert table.map(encoder.columns, remove_columns=table.column_names).cache_files[0]["filename"] == first
    tests = os.path.dirname(__file__)
    code = MAP.format(tests=tests, path=str(tmp_path / "saved"))
    written = os.stat(first).st_mtime_ns
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == first
    assert os.stat(first).st_mtime_ns == written
    others = {mapped(fresh, history="content"), mapped(trl_tokenizer("qwen3_6")), mapped(fresh, turns="last")}
    with monkeypatch.context() as other_version:
        other_version.setattr(fr, "__version__", "another")
        others.add(mapped(fresh))
    monkeypatch.setattr(intake, "code_hash", lambda *folders: "another")
    assert len({first, mapped(fresh), *others}) == 6


def test_the_hash_of_the_code_is_another_after_an_edit_and_for_other_folders(monkeypatch, tmp_path):
    for name, text in (("chat/a.py", "x = 1"), ("data/b.py", "y = 1")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(versions, "__file__", str(tmp_path / "talk" / "versions.py"))
    found = []
    for name, text in ((None, ""), ("chat/a.py", "x = 2"), ("chat/a.py", "x = 1"), ("chat/c.py", "x = 1")):
        if name:
            (tmp_path / name).write_text(text)
        found.append(versions.code_hash.__wrapped__("chat", "data"))
    assert found[0] == found[2]
    assert len({*found, versions.code_hash.__wrapped__("data")}) == 4


# --- loaders


@pytest.mark.parametrize("size", [1, 3])
def test_a_loader_encodes_conversations_in_its_workers(tokenizer, size):
    entries = chats(6)
    collator = fr.Collator(512, encode=EntryEncoder(tokenizer))
    layouts = [item.layout for item in Intake(entries, EntryEncoder(tokenizer))]
    expected = [fr.collate(layouts[n : n + size], 512) for n in range(0, 6, size)]
    for workers in (0, 2):
        loader = DataLoader(entries, batch_size=size, collate_fn=collator, num_workers=workers)
        for row, right in zip(loader, expected, strict=True):
            assert same_rows(row, right)


# --- a whole source


def outcome(intake):
    """Layouts' ids, what is refused, and how it ended."""
    found, end = [], None
    try:
        for item in intake:
            found.append((item.conversation.where, item.layout.input_ids.tolist()))
    except Refused as error:
        end = str(error)
    return found, intake.refusals.counts, intake.refusals.examples, intake.n_read, intake.format, end


def test_the_number_of_workers_changes_nothing(tokenizer, tmp_path):
    path = tmp_path / "chats.jsonl"
    entries = chats(5 * AT_A_TIME + 3)
    entries[7:7], entries[30:30] = BAD, BAD
    path.write_text("\n".join(["{broken" if n == 12 else json.dumps(entry) for n, entry in enumerate(entries)]))
    encoder = EntryEncoder(tokenizer)
    expected = [outcome(Intake(path, encoder, skip_invalid=skip)) for skip in (False, True)]
    good = [f"{path}, line {n + 1}" for n, entry in enumerate(entries) if n != 12 and entry not in BAD]
    for (found, counts, *_), given in zip(expected, (good[:7], good), strict=True):
        assert [where for where, _ in found] == given
        assert counts == {"nothing to train": 2, "bad message": 2, "bad input": 3}
    for workers in (1, 2):
        with start_workers(workers, encoder) as pool:
            shared = {"workers": workers, "pool": pool}
            found = [outcome(Intake(path, encoder, skip_invalid=skip, **shared)) for skip in (False, True)]
        assert found == expected


def test_a_refusal_stops_it_when_all_is_known(tokenizer):
    entries = [*chats(3), *BAD, *BAD[:1] * 4, *chats(2)]
    found, intake = [], Intake(entries, EntryEncoder(tokenizer))
    with pytest.raises(Refused) as refused:
        found.extend(intake)
    assert len(found) == 3  # nothing is given out behind the first refusal
    assert refused.value.n_read == intake.n_read == len(entries)
    lines = str(refused.value).splitlines()
    assert lines[0] == "7 of 12 conversations are refused:"
    assert lines[1] == "     5  nothing to train"
    assert lines[2] == "        entry 3: the conversation has no assistant message; leave it out"
    assert lines[5] == "        ..."
    assert lines[-1].startswith("--skip-invalid")
    assert "entry 4: message 1: unknown role 'cat'" in str(refused.value)


def test_refusals_are_skipped_and_listed(tokenizer):
    intake = Intake([*chats(3), *BAD, *chats(2)], EntryEncoder(tokenizer), skip_invalid=True)
    assert [item.conversation.where for item in intake] == [f"entry {n}" for n in (0, 1, 2, 6, 7)]
    assert intake.refusals.total == 3
    with pytest.raises(Refused, match="3 of 3"):  # nothing is left
        list(Intake(BAD, EntryEncoder(tokenizer), skip_invalid=True))


def test_refusals_of_several_sources_add_up(tokenizer):
    entries = [*chats(1), *BAD, *BAD[:1]]
    intakes = [Intake(entries, EntryEncoder(tokenizer), skip_invalid=True) for _ in range(2)]
    assert [len(list(intake)) for intake in intakes] == [1, 1]
    total = Refusals.together(intake.refusals for intake in intakes)
    assert total.counts == {"nothing to train": 4, "bad message": 2, "bad input": 2}
    assert {reason: len(named) for reason, named in total.examples.items()} == {
        "nothing to train": 3,
        "bad message": 2,
        "bad input": 2,
    }
    assert len(intakes[0].refusals.examples["nothing to train"]) == 2  # as they were


def test_some_conversations_are_from_all_over_all_sources(tokenizer, tmp_path):
    """As verify and bench take them: --data twice."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for name, n in (("one", 50), ("two", 70)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in chats(n)))
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    files = [str(tmp_path / f"{name}.jsonl") for name in ("one", "two")]
    given = ["--data", files[0], "--data", files[1], "--tokenizer", str(tmp_path / "tokenizer")]
    wheres, of_samples, notes = options.some_conversations(parser.parse_args(given), len(tokenizer))
    assert wheres == [f"{files[n >= 50]}, line {(n - 50 if n >= 50 else n) + 1}" for n in range(0, 120, 4)]
    assert [len(samples) for samples in of_samples] == [n % 50 % 3 + 1 for n in range(0, 50, 4)] + [
        (n - 50) % 3 + 1 for n in range(52, 120, 4)
    ]
    assert notes[0] == f"looked at 30 of 120 conversations of {files[0]}, {files[1]}"
    wheres, _, notes = options.some_conversations(parser.parse_args([*given, "--limit", "2"]), len(tokenizer))
    assert wheres == [f"{file}, line {line}" for file in files for line in (1, 2)]  # the most of each
    assert notes[0] == f"looked at 4 of the first 4 conversations of {files[0]}, {files[1]}"


def test_tokenized_samples_that_cannot_be_laid_out_are_refused_by_name(tokenizer):
    entries = [{"prompt_ids": [1], "target_ids": [2]}, {"prompt_ids": [-5], "target_ids": [2]}]
    intake = Intake(entries, EntryEncoder(None), skip_invalid=True)
    assert len(list(intake)) == 1
    assert intake.refusals.examples["bad input"][0].startswith("entry 1: sample 0: prompt_ids")


def test_nothing_at_all_is_no_success(tokenizer, tmp_path):
    for source in ([], tmp_path / "none.jsonl"):
        with pytest.raises(BadInput, match=r"nothing in it|no such file"):
            list(Intake(source, EntryEncoder(tokenizer)))
    with pytest.raises(ValueError, match="workers: expected 0 or more"):
        Intake([], EntryEncoder(tokenizer), workers=-1)


@pytest.mark.parametrize("workers", [0, 1])
def test_nobody_reads_far_ahead(tokenizer, workers):
    """An endless source: a limit ends it, and so does whoever has enough."""
    taken = 0

    def endless():
        nonlocal taken
        for entry in itertools.cycle(chats(10)):
            taken += 1
            assert taken < 500  # for whoever reads on and on
            yield entry

    intake = Intake(endless(), EntryEncoder(tokenizer), limit=25, workers=workers)
    assert [item.conversation.number for item in intake] == list(range(25))
    assert taken == 25
    taken = 0
    some = iter(Intake(endless(), EntryEncoder(tokenizer), workers=workers))
    assert [item.conversation.number for item in itertools.islice(some, 3)] == [0, 1, 2]
    assert taken <= (4 * workers + 1) * AT_A_TIME if workers else taken == 3
    some.close()


def test_what_then_makes_is_given_out_and_workers_can_be_shared(tokenizer):
    encoder, number_of = EntryEncoder(tokenizer), attrgetter("conversation.number")
    assert list(Intake(chats(5), encoder, then=number_of)) == [0, 1, 2, 3, 4]
    with start_workers(1, encoder, number_of) as pool:
        for n in (3, 20):
            assert list(Intake(chats(n), encoder, workers=1, then=number_of, pool=pool)) == list(range(n))


def test_an_option_that_the_template_does_not_ask_for_is_told(tokenizer, caplog):
    """Data may name options of other templates, and these are not told."""
    EntryEncoder(tokenizer, enable_thinking=False)(
        {"messages": CHAT, "chat_template_kwargs": {"reasoning_effort": "low"}}
    )
    assert not [line for line in caplog.messages if "has no option" in line]
    EntryEncoder(tokenizer, preserve_thinking=True, reasoning_effort="low", think=("<think>\n", "\n</think>\n\n"))
    [line] = [line for line in caplog.messages if "has no option" in line]
    assert "no option preserve_thinking, reasoning_effort, so that it does nothing" in line
