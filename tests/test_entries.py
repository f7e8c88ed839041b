"""What stands in an entry beside its messages, and entries of sets that were put together or made by other tools."""

import json
import re

import numpy as np
import pytest

import flexreason as fr
from flexreason.data.files import read_all, read_conversations
from flexreason.data.formats import BadInput
from flexreason.data.intake import EntryEncoder, Intake, Refused
from flexreason.data.sets import encode_set
from templating import TOOLS, answer, trl_tokenizer, user

TURNS = [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]
CHAT = [user("one"), answer("two")]
SYSTEM = {"role": "system", "content": "be brief"}


@pytest.fixture(scope="module")
def tokenizer():
    return trl_tokenizer("qwen3")


def messages_of(entry, **options):
    (found,) = read_conversations([entry], **options)
    return found.messages


# --- system prompts beside messages


BESIDE = {
    "messages": {"messages": CHAT},
    "roles under conversations": {"conversations": CHAT},
    "sharegpt": {"conversations": TURNS},
    "texts": {"prompt": "one", "completion": "two"},
    "pairs": {"prompt": CHAT[:1], "completion": CHAT[1:]},
    "JSON text": {"messages": json.dumps(CHAT)},
}


@pytest.mark.parametrize("key", ["system", "system_prompt"])
@pytest.mark.parametrize("name", BESIDE)
def test_a_system_prompt_beside_messages_is_the_first_message(tokenizer, name, key):
    entry = {**BESIDE[name], key: "be brief"}
    assert messages_of(entry) == [SYSTEM, *CHAT]
    sample = fr.unmerge(EntryEncoder(tokenizer)(entry))[0]
    seen = tokenizer.apply_chat_template([SYSTEM, CHAT[0]], add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(sample.prompt_ids) == seen
    for nothing in ("", " ", None, []):
        assert messages_of({**BESIDE[name], key: nothing}) == CHAT


def test_a_system_prompt_may_be_in_parts(tokenizer):
    parts = [{"type": "text", "text": "be brief"}]
    for turns in (CHAT, TURNS):
        assert messages_of({"system": parts, "conversations": turns}) == [{**SYSTEM, "content": parts}, *CHAT]
    assert messages_of({"system": parts, "messages": [SYSTEM, *CHAT]}) == [SYSTEM, *CHAT]
    for wrong in (5, {"text": "x"}, ["x"], [{"type": "image"}]):
        with pytest.raises(BadInput, match="system: expected text or a list of text parts, found"):
            messages_of({"system": wrong, "messages": CHAT})


@pytest.mark.parametrize(
    "beside",
    [{"system": "be brief"}, {"system_prompt": "be brief\n"}, {"system": "be brief", "system_prompt": "be brief"}],
)
def test_a_system_prompt_that_is_there_twice_is_taken_once(beside):
    turns = [{"from": "system", "value": "be brief"}, *TURNS]
    developer = {"role": "developer", "content": "be brief"}
    assert messages_of({**beside, "conversations": turns}) == [SYSTEM, *CHAT]
    assert messages_of({**beside, "messages": [SYSTEM, *CHAT]}) == [SYSTEM, *CHAT]
    assert messages_of({**beside, "messages": [developer, *CHAT]}) == [developer, *CHAT]
    assert messages_of({**beside, "prompt": [SYSTEM, CHAT[0]], "completion": "two"}) == [SYSTEM, *CHAT]


def test_two_different_system_prompts_are_refused():
    for entry in (
        {"system": "be long", "messages": [SYSTEM, *CHAT]},
        {"system_prompt": "be long", "conversations": [{"from": "system", "value": "be brief"}, *TURNS]},
        {"system": "be long", "system_prompt": "be brief", "messages": CHAT},
    ):
        with pytest.raises(
            BadInput, match="another system prompt than that of the first message; leave one of them out"
        ):
            messages_of(entry)


# --- what is filled is read


NULL_MESSAGES = [{**turn, "role": None, "content": None} for turn in TURNS]
NULL_TURNS = [{**message, "from": None, "value": None} for message in CHAT]


@pytest.mark.parametrize(
    "entry",
    [
        {"messages": None, "conversations": TURNS},
        {"messages": [], "conversations": TURNS},
        {"messages": "", "conversations": TURNS},
        {"messages": json.dumps(CHAT)},
        {"conversations": json.dumps(TURNS)},
        {"conversations": NULL_MESSAGES},
        {"messages": NULL_MESSAGES},
        {"conversations": NULL_TURNS},
        {"messages": NULL_TURNS},
        {"messages": [], "prompt": "one", "completion": "two"},
        {"conversation": 17, "conversations": TURNS},
        {"conversation": "chat 17", "conversations": TURNS},
        {"messages": CHAT, "tools": ""},
        {"messages": CHAT, "tools": "null", "chat_template_kwargs": ""},
        {"messages": CHAT, "functions": "", "weight": None, "train": True},
        {"messages": np.array(CHAT, dtype=object)},
    ],
)
def test_what_is_filled_is_read(tokenizer, entry):
    assert (
        fr.unmerge(EntryEncoder(tokenizer)(entry))[0].target_ids == fr.unmerge(fr.encode(CHAT, tokenizer))[0].target_ids
    )
    (found,) = read_conversations([entry])
    assert ([message["content"] for message in found.messages], found.tools) == (["one", "two"], None)


def test_sets_of_both_forms_put_together_are_read(tmp_path):
    entries = [{"conversations": NULL_MESSAGES}, {"conversations": NULL_TURNS}, {"conversations": CHAT, "messages": []}]
    for given in (entries, entries[::-1], [{"messages": CHAT}, {"messages": TURNS}]):
        found = list(read_conversations(given))
        assert [[(m["role"], m["content"]) for m in chat.messages] for chat in found] == [
            [("user", "one"), ("assistant", "two")]
        ] * len(given)
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(entries)
    assert [chat.messages for chat in read_conversations(table)] == [CHAT] * 3
    assert messages_of({"conversations": NULL_TURNS[:1] + TURNS[1:]}, format="sharegpt")[1] == CHAT[1]


def test_conversations_without_messages_are_refused(tokenizer):
    encoder = EntryEncoder(tokenizer)
    for empty in ({"messages": []}, {"messages": None}, {"conversations": "[]"}):
        with pytest.raises(ValueError, match="the conversation has no messages; expected"):
            encoder(empty)
    for given in ([[], CHAT], [[]]):
        with pytest.raises(
            Refused, match=r"1 of \d conversations are refused:\n.*\n.*entry 0: the conversation has no"
        ):
            encode_set(given, encoder)
    layout = encoder(CHAT)
    for rows in ([[layout], []], [layout, []]):
        assert encode_set(rows, encoder)[0] == rows  # a row may be empty


def test_a_turn_that_says_two_things_is_refused():
    for more in ({"content": "two"}, {"content": ""}, {"role": "assistant"}, {"role": "gpt", "content": None}):
        assert messages_of({"conversations": [TURNS[0], {**TURNS[1], **more}]}) == CHAT
    wrong = {"content": "three"}, "value and content are two texts"
    role = {"role": "user"}, "from says 'gpt', and role says 'user'"
    for more, words in (wrong, role):
        with pytest.raises(BadInput, match=f"turn 1: {words}; leave one of them out"):
            messages_of({"conversations": [TURNS[0], {**TURNS[1], **more}]})


def test_a_call_of_sharegpt_may_have_reasoning_before_it():
    call = {"name": "search", "arguments": {"key": "k"}}
    value = f"<think>\nwhy\n</think>\n\n{json.dumps(call)}"
    turns = [TURNS[0], {"from": "function_call", "value": value}, {"from": "observation", "value": "r"}, TURNS[1]]
    calls = [{"type": "function", "function": call}]
    asked = {"role": "assistant", "content": "<think>\nwhy\n</think>", "tool_calls": calls}
    assert messages_of({"conversations": turns}) == [CHAT[0], asked, {"role": "tool", "content": "r"}, CHAT[1]]
    turns[1] = {"from": "function_call", "value": "<think>why" + json.dumps(call)}
    with pytest.raises(BadInput, match="turn 1: value: the call is no JSON"):
        messages_of({"conversations": turns})


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85", "\x0c", "\x1e"])
def test_lines_of_a_json_file_end_where_lines_end(tmp_path, sign):
    path = tmp_path / "chats.json"
    chats = [[user("one"), answer(f"two{sign}three")], CHAT]
    path.write_text("".join(json.dumps({"messages": chat}, ensure_ascii=False) + "\n" for chat in chats))
    assert [found.messages for found in read_conversations(path)] == chats


def test_a_document_that_is_an_entry_is_read_as_one(tmp_path):
    path = tmp_path / "chats.json"
    other = [{"messages": [user("x"), answer("y")]}]
    for key in ("data", "rows"):
        path.write_text(json.dumps({"id": 7, "messages": CHAT, key: other}))
        assert [found.messages for found in read_conversations(path)] == [CHAT]
        path.write_text(json.dumps({"id": 7, key: other}))
        assert [found.messages for found in read_conversations(path)] == [other[0]["messages"]]


# --- what is said about training


def test_an_entry_that_is_not_to_be_trained_on_is_refused_and_counted(tokenizer):
    encoder = EntryEncoder(tokenizer)
    samples = {"prompt_ids": [1], "target_ids": [2]}
    for said in ({"weight": 0}, {"train": False}, {"weight": 0.0}, {"weight": 0, "train": True}):
        for entry in ({"messages": CHAT}, {"conversations": TURNS}, {"prompt": "a", "completion": "b"}, samples):
            intake = Intake([{**entry, **said}, entry], encoder, skip_invalid=True)
            assert [item.conversation.where for item in intake] == ["entry 1"]
            assert intake.refusals.counts == {"nothing to train": 1}
            with pytest.raises(BadInput, match=r"entry: the entry is excluded from training \((weight|train): "):
                encoder({**entry, **said})
            assert encoder({**entry, "weight": 1, "train": True}).n_samples == 1
    for said in ({"weight": 0.5}, {"train": "yes"}):
        with pytest.raises(BadInput, match=r"(weight|train) of an entry: expected true or false, found"):
            encoder({"messages": CHAT, **said})
    assert encoder({**samples, "target_weights": [1]}).n_samples == 1
    with pytest.raises(BadInput, match="target_weights: weights of targets are not read; expected ones"):
        encoder({**samples, "target_weights": [0]})


def test_functions_in_the_place_of_tools_are_refused():
    functions = [tool["function"] for tool in TOOLS]
    for given in (functions, json.dumps(functions)):
        with pytest.raises(BadInput, match="functions, an older form of tools: expected tools; give"):
            messages_of({"messages": CHAT, "functions": given})
        assert messages_of({"messages": CHAT, "functions": given, "tools": TOOLS}) == CHAT


@pytest.mark.parametrize(
    "name", ["tokenizer", "tools", "conversation", "messages", "history", "think", "turns", "format"]
)
def test_options_of_an_entry_are_the_templates(tokenizer, name):
    entry = {"messages": CHAT, "chat_template_kwargs": {name: ["<a>", "</a>"]}}
    with pytest.raises(BadInput, match=f"chat_template_kwargs: {name} is no option of the template; give it to the"):
        EntryEncoder(tokenizer)(entry)


# --- lines that json cannot read, one of which does not end it all


def nested(levels):
    return "[" * levels + "]" * levels


BAD_LINES = {
    "a number of 5000 digits": ('{"n": ' + "1" * 5000 + "}", "no JSON: a number has more digits"),
    "the same in JSON text": (json.dumps({"messages": CHAT, "tools": f"[{'1' * 5000}]"}), "tools: no JSON: a number"),
    "200,000 levels": ('{"messages": ' + nested(200_000) + "}", "no JSON: it is nested too deeply"),
    "300 levels": (json.dumps({"messages": CHAT})[:-1] + f', "tools": {nested(300)}' + "}", "nested more than 100"),
    "800 levels in JSON text": (json.dumps({"messages": nested(800)}), "nested more than 100"),
    "a call of 5000 digits": (
        json.dumps({"conversations": [{"from": "human", "value": "a"}, {"from": "tool_call", "value": "1" * 5000}]}),
        "turn 1: value: the call is no JSON: a number",
    ),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("name", BAD_LINES)
def test_a_line_that_cannot_be_read_is_refused_alone(tokenizer, tmp_path, name, suffix):
    line, words = BAD_LINES[name]
    path = tmp_path / f"chats{suffix}"
    good = json.dumps({"messages": CHAT})
    path.write_text(f"{good}\n{line}\n{good}\n")
    found = list(read_all(path))
    assert [type(chat).__name__ for chat in found] == ["Conversation", "BadInput", "Conversation"]
    assert re.search(rf"line 2: .*{words}", str(found[1]))
    path.write_text(f"{line}\n{good}\n")
    assert [type(chat).__name__ for chat in read_all(path)] == ["BadInput", "Conversation"]


def test_a_deep_entry_at_hand_is_refused(tokenizer):
    deep = {"messages": CHAT, "tools": json.loads(nested(300))}
    deeper = {"messages": CHAT, "tools": []}
    for _ in range(5000):
        deeper["tools"] = [deeper["tools"]]
    for entry in (deep, deeper):
        with pytest.raises(BadInput, match=r"nested (more than 100 levels|too) deep"):
            EntryEncoder(tokenizer)(entry)


def test_data_sets_by_name_are_refused(tokenizer):
    for data in ({"train": [{"messages": CHAT}], "test": []}, {}):
        for read in (lambda data: encode_set(data, EntryEncoder(tokenizer)), lambda data: list(read_all(data))):
            with pytest.raises(BadInput, match="data: expected a list or one data set, found a dict; give one of"):
                read(data)
    datasets = pytest.importorskip("datasets")
    with pytest.raises(BadInput, match="found a DatasetDict; give one of 'train'"):
        encode_set(
            datasets.DatasetDict({"train": datasets.Dataset.from_list([{"messages": CHAT}])}), EntryEncoder(tokenizer)
        )


def test_an_empty_list_of_tools_says_that_there_are_none():
    template = trl_tokenizer("llama3_1")  # which would write of tools where it is given a list
    for tools in ([], "[]", "", None):
        entry = {"messages": CHAT, "tools": tools}
        prompt = fr.unmerge(EntryEncoder(template)(entry))[0].prompt_ids
        assert template.decode(prompt) == template.apply_chat_template(
            CHAT[:1], add_generation_prompt=True, tokenize=False
        )


def test_what_is_given_in_the_wrong_place_is_told(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="EntryEncoder: tools stand in the entries"):
        EntryEncoder(tokenizer, tools=TOOLS)
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps([{"messages": CHAT}]))
    with pytest.raises(BadInput, match=r"line 1: .*found a list of them; give one a line, or name the file \.json"):
        list(read_conversations(path))
