"""Conversations read from files of every kind, in one form; errors name file and line."""

import json
import re

import pytest

from flexreason.chat.errors import BadMessage
from flexreason.chat.messages import check
from flexreason.data.files import read_all, read_conversations, read_entries
from flexreason.data.formats import BadInput
from templating import answer, user

CHAT = [user("one"), answer("two", "why")]
ENTRIES = {
    "messages": {"messages": CHAT, "tools": None},
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "one"},
            {"from": "gpt", "value": "two", "reasoning_content": "why"},
        ]
    },
    "pairs": {"prompt": [user("one")], "completion": [answer("two", "why")]},
}


def write(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


@pytest.mark.parametrize("kind", ENTRIES)
def test_every_kind_is_detected_told_and_read(tmp_path, kind):
    path = write(tmp_path / "some.jsonl", [ENTRIES[kind]] * 2)
    found = list(read_conversations(path))
    assert [(c.messages, c.format, c.number) for c in found] == [(CHAT, kind, 0), (CHAT, kind, 1)]
    assert found[1].where == f"{path}, line 2"


def test_pairs_of_texts():
    (found,) = read_conversations([{"prompt": "one", "completion": "two"}])
    assert found.messages == [user("one"), answer("two")]


def test_answers_in_a_prompt_are_not_trained_on():
    (found,) = read_conversations([{"prompt": [*CHAT, user("three")], "completion": "four"}])
    assert [m.get("train") for m in found.messages] == [None, False, None, None]


def test_sharegpt_with_a_system_prompt_and_calls():
    call = {"name": "search", "arguments": {"key": "k"}}
    turns = [("human", "one"), ("function_call", json.dumps(call)), ("observation", "r"), ("gpt", "two")]
    entry = {"system": "be", "conversations": [{"from": who, "value": text} for who, text in turns]}
    (found,) = read_conversations([entry])
    assert [m["role"] for m in found.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert found.messages[2]["tool_calls"][0]["function"] == call


def test_tokenized_samples_are_grouped_by_conversation(tmp_path):
    lines = [{"prompt_ids": [1], "target_ids": [2], "conversation": c} for c in ("a", "a", "b")]
    found = list(read_conversations(write(tmp_path / "s.jsonl", lines)))
    assert [len(c.samples) for c in found] == [2, 1]
    assert found[0].format == "samples"


def test_one_json_document(tmp_path):
    path = tmp_path / "all.json"
    for whole in ([ENTRIES["messages"]], {"data": [ENTRIES["messages"]]}, CHAT, [CHAT]):
        path.write_text(json.dumps(whole, indent=1))
        assert [c.messages for c in read_conversations(path)] == [CHAT]
    write(path, [ENTRIES["messages"]] * 2)
    assert len(list(read_conversations(path))) == 2


def test_tables_and_saved_data_sets(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_list([ENTRIES["messages"], {"messages": CHAT[:1], "tools": None}])
    table.to_parquet(tmp_path / "t.parquet")
    table.save_to_disk(str(tmp_path / "saved"))
    for source in (tmp_path / "t.parquet", tmp_path / "saved", table):
        assert [c.messages for c in read_conversations(source)] == [CHAT, CHAT[:1]]
    assert next(read_conversations(tmp_path / "t.parquet")).where.endswith("t.parquet, row 0")


def test_a_folder_of_files(tmp_path):
    write(tmp_path / "b.jsonl", [ENTRIES["messages"]])
    write(tmp_path / "a.jsonl", [ENTRIES["messages"]])
    assert [c.where[-16:] for c in read_conversations(tmp_path)] == ["/a.jsonl, line 1", "/b.jsonl, line 1"]


def test_the_kind_can_be_said():
    with pytest.raises(BadInput, match="entry 0: not of the kind sharegpt: turn 0: 'from' is missing"):
        list(read_conversations([ENTRIES["messages"]], format="sharegpt"))
    with pytest.raises(BadInput, match="expected one of messages"):
        list(read_conversations([], format="csv"))


BAD = {
    "no JSON": ('{"messages": [}', "line 2: no JSON"),
    "no known keys": ('{"text": "x"}', None),
    "messages of another type": ('{"messages": 3}', "line 2: .*expected a list, found int"),
    "unknown speaker": ('{"conversations": [{"from": "cat", "value": "x"}]}', None),
}


@pytest.mark.parametrize("bad", [5, "text", None, True, 0.5, [5], [[1]], ["text"]])
@pytest.mark.parametrize("kind", [*ENTRIES, "samples"])
def test_entries_of_another_type_are_told_in_words_of_the_data(kind, bad):
    """Wherever they stand, and not in Python's words."""
    good = ENTRIES.get(kind, {"prompt_ids": [1], "target_ids": [2]})
    for entries, number in ([bad], 0), ([good, bad], 1):
        found = list(read_all(entries))[number]
        if isinstance(found, BadInput):
            assert re.match(
                rf"entry {number}: (not of the kind {kind}: turn 0: )?expected an? (object|list)", str(found)
            )
            assert str(found).endswith(
                f"found {'null' if bad is None else type(bad[0] if 'turn' in str(found) else bad).__name__}"
            )
        else:
            with pytest.raises(BadMessage, match="message 0: expected a dict with role and content, found"):
                check(found.messages)


NO_JSON = {  # what follows a good line; where its fault is, counted by hand
    '{"messages": [}': "no JSON: .* at character 15; correct the line",
    '{"messages": [': "no JSON: .* at character 15; correct the line",
    '{"messages": "[x"}': "messages: no JSON: .* at character 2; give it",
    '{"messages": [{"role": "user", "content": "x"}], "tools": "[1,\\n]"}': "tools: no JSON: .* [45]; give it",
    '{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": "{x"}': "kwargs: no JSON: .* 2; give it",
}


@pytest.mark.parametrize("line", NO_JSON)
def test_no_message_has_two_line_numbers(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{json.dumps(ENTRIES['messages'])}\n{line}\n")
    with pytest.raises(BadInput, match=NO_JSON[line]) as error:
        list(read_conversations(path))
    assert re.findall(r"lines? \d+", str(error.value)) == ["line 2"]


@pytest.mark.parametrize("name", ["chats.jsonl", "lines.json"])
def test_a_byte_that_is_no_utf8_is_told_at_its_line_and_ends_nothing(tmp_path, name):
    path, line = tmp_path / name, json.dumps(ENTRIES["messages"], ensure_ascii=False).encode()
    bad = line.replace(b'"user"', b'"user", "name": "Ren\xe9"', 1)  # of a file in Latin-1
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([line, bad, line.replace(b"user", "usér".encode(), 1), line]))
    found = list(read_all(path))
    assert [isinstance(entry, BadInput) for entry in found] == [False, True, False, False]
    assert re.search(rf"{name}, line 2: no UTF-8: the byte e9 at character {bad.find(233) + 1}; ", str(found[1]))
    assert "usér" in str(found[2])


def test_a_document_with_a_byte_that_is_no_utf8_is_told_at_its_line(tmp_path):
    path, text = tmp_path / "whole.json", json.dumps([ENTRIES["messages"]] * 2, indent=1)
    path.write_bytes(text.encode("utf-16"))
    with pytest.raises(BadInput, match=r"whole.json, line 1: no UTF-8: the byte ff at character 1; save"):
        list(read_all(path))
    path.write_bytes(text.encode().replace(b'"content": "', b'"content": "\xe9', 1))
    line = text[: text.find('"content": "')].count("\n") + 1
    with pytest.raises(BadInput, match=rf"whole.json, line {line}: no UTF-8: the byte e9"):
        list(read_all(path))


def test_no_message_about_a_call_or_a_document_has_two_line_numbers(tmp_path):
    calls = [{"function": {"name": "f", "arguments": '{"a":\n]'}}]
    messages = [user("x"), {"role": "assistant", "tool_calls": calls}]
    with pytest.raises(
        BadMessage, match=r"tool_calls\[0\]: arguments are no JSON: Expecting value at character 7; give"
    ):
        check(messages)
    turns = [{"from": "human", "value": "x"}, {"from": "function_call", "value": "{x"}]
    with pytest.raises(BadInput, match=r"turn 1: value: the call is no JSON: .* at character 2; correct it$"):
        list(read_conversations([{"conversations": turns}]))
    path = tmp_path / "all.json"
    path.write_text('[\n {"messages":\n  }\n]')
    with pytest.raises(BadInput, match=r"all.json, line 3: no JSON: Expecting value at character 3; correct it there"):
        list(read_conversations(path))


def test_the_nearest_name_is_told():
    for role, near in (("asistant", "assistant"), ("Assistant", "assistant"), ("usr", "user"), ("Systm", "system")):
        with pytest.raises(BadMessage, match=f"message 0: unknown role '{role}'; expected .*; did you mean '{near}'"):
            check([{"role": role, "content": "x"}])
    for role in ("xyzzy", 5, ["user"]):
        with pytest.raises(BadMessage, match=r"unknown role .*context$"):
            check([{"role": role, "content": "x"}])
    with pytest.raises(
        BadMessage, match=r"message 0: it has no role; its keys are rol, content; give it role and content$"
    ):
        check([{"rol": "user", "content": "x"}])
    for speaker, near in (("GPT", "gpt"), ("asistant", "assistant")):
        with pytest.raises(BadInput, match=f"unknown speaker '{speaker}'; .*; did you mean '{near}'"):
            list(read_conversations([{"conversations": [{"from": speaker, "value": "x"}]}]))


BAD_SHAPES = {
    "turn 0: 'value' is missing": {"conversations": [{"from": "human"}]},
    "turn 0: unknown speaker": {"conversations": [{"from": ["human"], "value": "x"}]},
    "turn 0: value: expected a call as JSON, found int": {"conversations": [{"from": "tool_call", "value": 5}]},
    "prompt: expected text or a list of messages, found 5": {"prompt": 5, "completion": "x"},
    r"prompt: expected text or a list of messages, found \['x'\]": {"prompt": ["x"], "completion": "x"},
    "completion: expected text or a list of messages, found {'": {"prompt": "x", "completion": answer("x")},
}


@pytest.mark.parametrize("words", BAD_SHAPES)
def test_wrong_shapes_are_told(words):
    with pytest.raises(BadInput, match=words):
        list(read_conversations([BAD_SHAPES[words]]))


@pytest.mark.parametrize("name", BAD)
def test_bad_lines_are_named(tmp_path, name):
    line, text = BAD[name]
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(ENTRIES["messages"]) + "\n" + line + "\n")
    with pytest.raises(BadInput, match=f"bad.jsonl, {text or 'line 2: '}"):
        list(read_conversations(path))


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(BadInput, match="no such file"):
        list(read_conversations(tmp_path / "none.jsonl"))
    with pytest.raises(BadInput, match="nothing in it"):
        list(read_conversations(write(tmp_path / "empty.jsonl", [])))
    with pytest.raises(BadInput, match=r"no \.jsonl"):
        list(read_conversations(_empty(tmp_path)))
    with pytest.raises(BadInput, match="neither messages"):
        list(read_conversations([{"text": "x"}]))


def _empty(path):
    (path / "folder").mkdir()
    return path / "folder"


def test_lines_are_read_as_they_are_needed(tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps(ENTRIES["messages"]) + "\n{broken\n")
    entries = read_entries(path)
    assert next(entries)[1]["messages"] == CHAT
    assert isinstance(next(entries)[1], BadInput)  # whoever goes on after a bad line, can


def test_a_data_set_that_was_loaded_before_is_not_refused_where_no_hub_answers(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(BadInput, match=r"someone/chats: no such file or folder, and no hub can be asked"):
        list(read_conversations("someone/chats"))
    (tmp_path / "someone___chats").mkdir()
    with pytest.raises(BadInput, match="someone/chats: cannot be read as a data set"):  # which is empty
        list(read_conversations("someone/chats"))
