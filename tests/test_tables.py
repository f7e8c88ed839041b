"""Rows of tables: a null that was written is trained, one that only the table put in is not, and what cannot be told
is refused.

The oracle is `fr.encode` of the messages as they were written, before any table held them.
"""

import json
from datetime import UTC, datetime

import pytest
import torch
from torch.utils.data import DataLoader, Subset, random_split

import flexreason as fr
from flexreason.data.files import read_all
from flexreason.data.formats import BadInput
from flexreason.data.intake import EntryEncoder, Intake, Refused
from flexreason.data.sets import encode_set
from templating import TOOLS, answer, trl_tokenizer, user

datasets = pytest.importorskip("datasets")

needs_json = pytest.mark.skipif(not hasattr(datasets, "Json"), reason="datasets before 5 has no Json columns")


@pytest.fixture(scope="module")
def tokenizer():
    datasets.disable_progress_bars()
    return trl_tokenizer("qwen3")


def chat(arguments):
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return [user("harbour"), {"role": "assistant", "content": "", "tool_calls": [call]}]


def entries(*of_arguments):
    return [{"messages": chat(arguments)} for arguments in of_arguments]


LACKING = entries({"city": "Paris"}, {"date": "Monday"})
"""A table puts a date into the first, and a city into the second."""

WRITTEN = entries({"until": None, "n": 1}, {"until": "x", "n": 2})


def encoded(given, tokenizer):
    return [fr.encode(entry["messages"], tokenizer, entry.get("tools")).input_ids.tolist() for entry in given]


def ids(layouts):
    """Of layouts, in a list, or in a table or stream of their columns."""
    found = (layout["input_ids"] if isinstance(layout, dict) else layout.input_ids for layout in layouts)
    return [torch.as_tensor(these).tolist() for these in found]


def as_set(data, tokenizer):
    return ids(encode_set(data, EntryEncoder(tokenizer))[0])


# --- null that was written


@needs_json
@pytest.mark.parametrize("streaming", [False, True])
def test_null_in_a_json_column_was_written(tokenizer, tmp_path, streaming):
    """Messages that differ in their keys are kept as JSON: nothing is put in there."""
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in WRITTEN))
    right = encoded(WRITTEN, tokenizer)
    data = datasets.load_dataset("json", data_files=str(path), split="train", streaming=streaming)
    assert as_set(data, tokenizer) == right
    assert ids(item.layout for item in Intake(data, EntryEncoder(tokenizer))) == right
    assert ids(item.layout for item in Intake(path, EntryEncoder(tokenizer))) == right
    assert as_set(WRITTEN, tokenizer) == right
    if not streaming:
        assert as_set(list(data), tokenizer) == right
        assert ids(data.map(EntryEncoder(tokenizer).columns)) == right
        data.to_parquet(tmp_path / "chats.parquet")
        found = Intake(tmp_path / "chats.parquet", EntryEncoder(tokenizer))
        assert ids(item.layout for item in found) == right


@needs_json
def test_json_columns_within_typed_ones_and_beside_them(tokenizer):
    text, rest = datasets.Value("string"), datasets.Json()
    call = {"type": text, "function": {"name": text, "arguments": rest}}
    messages = [{"role": text, "content": text, "tool_calls": [call]}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"n": {"default": None}}}}}]
    given = [{**entry, "tools": tools} for entry in WRITTEN]
    features = datasets.Features({"messages": messages, "tools": [rest]})
    assert as_set(datasets.Dataset.from_list(given, features=features), tokenizer) == encoded(given, tokenizer)


def test_null_in_json_text_was_written(tokenizer):
    given = entries('{"until": null, "n": 1}', '{"until": "x", "n": 2}')
    table = datasets.Dataset.from_list(given)
    for data in (table, list(table), given):
        assert as_set(data, tokenizer) == encoded(given, tokenizer)


@pytest.mark.parametrize(
    "entry",
    [
        WRITTEN[0],
        {"messages": [user("one"), answer("two")], "tools": [{"type": "function", "function": {
            "name": "f", "parameters": {"properties": {"n": {"type": "string", "default": None}}}}}]},
        {"messages": [{**user("one"), "tool_calls": None}, {**chat({"a": None})[1], "name": "me"}]},
        {"messages": [user("one"), {**chat({"a": None})[1], "content": None}]},
    ],
)  # fmt: skip
def test_an_entry_that_is_no_row_keeps_its_null(tokenizer, entry):
    assert as_set([entry], tokenizer) == encoded([entry], tokenizer)


# --- null that a table has put in


def test_a_choice_of_a_tables_rows_is_a_table(tokenizer):
    table, right = datasets.Dataset.from_list(LACKING), encoded(LACKING, tokenizer)
    first, second = random_split(table, [1, 1], torch.Generator().manual_seed(1))
    for part, numbers in ((first, first.indices), (second, second.indices), (Subset(Subset(table, [1, 0]), [0]), [1])):
        assert as_set(part, tokenizer) == [right[number] for number in numbers]
        found = ids(item.layout for item in Intake(part, EntryEncoder(tokenizer)))
        assert found == [right[number] for number in numbers]


def test_a_plain_row_whose_null_cannot_be_told_is_refused(tokenizer):
    """Both rows are as they would be had the null been written."""
    pandas = pytest.importorskip("pandas")
    table, encoder = datasets.Dataset.from_list(LACKING), EntryEncoder(tokenizer)
    words = "null in the arguments of a call, .*; hand in the datasets.Dataset itself, or keep arguments as JSON text"
    for rows in (list(table), table.to_list(), pandas.DataFrame(table.to_list()).to_dict("records")):
        with pytest.raises(Refused, match=f"2 of 2 conversations are refused:(.|\n)*entry 1: {words}"):
            encode_set(rows, encoder)
        with pytest.raises(Refused, match=words):
            list(Intake(rows, encoder))
    for encode in (encoder, lambda row: fr.Collator(encode=encoder)([row])):
        with pytest.raises(BadInput, match=f"entry: {words}"):
            encode(table[0])
    with pytest.raises(BadInput, match=words):
        next(iter(DataLoader(table, collate_fn=fr.Collator(encode=encoder))))
    first, second = table[0]["messages"]
    system = {"role": "system", "content": "be brief"}
    for changed in ([first, {**second, "train": True}], [system, first, second]):  # as people change rows
        with pytest.raises(BadInput, match=words):
            encoder({"messages": changed})


def test_tools_and_options_of_a_plain_row_whose_null_cannot_be_told_are_refused(tokenizer):
    tools = json.loads(json.dumps(TOOLS))
    other = json.loads(json.dumps(TOOLS).replace('"properties": {', '"properties": {"more": {"type": "string"}, '))
    table = datasets.Dataset.from_list([{"messages": [user("one"), answer("two")], "tools": t} for t in (tools, other)])
    assert table[0]["tools"] != tools
    with pytest.raises(BadInput, match="entry: null in tools, "):
        EntryEncoder(tokenizer)(table[0])
    assert as_set(table.select([0]), tokenizer) == encoded(
        [{"messages": [user("one"), answer("two")], "tools": tools}], tokenizer
    )
    row = {"messages": [user("one"), answer("two")], "chat_template_kwargs": {"enable_thinking": None}}
    with pytest.raises(BadInput, match="null in chat_template_kwargs"):
        EntryEncoder(tokenizer)(row)


def test_null_that_means_nothing_is_taken_out_of_a_plain_row(tokenizer):
    """In parts and calls it would be seen: a template asks whether a part has an image."""
    part = {"type": "text", "text": "one"}
    call = {"id": None, **chat({"n": 1})[1]["tool_calls"][0]}
    row = {
        "messages": [
            {"role": "user", "content": [{**part, "image": None}], "tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ],
        "tools": None,
    }
    gone = {"messages": [{"role": "user", "content": [part]}, chat({"n": 1})[1]]}
    assert as_set([row], tokenizer) == encoded([gone], tokenizer)
    (found,) = read_all([row])
    assert found.messages[0] == gone["messages"][0]
    assert "id" not in found.messages[1]["tool_calls"][0]


def test_a_column_of_nothing_but_null_cannot_be_told(tokenizer):
    table = datasets.Dataset.from_list(entries({"until": None, "n": 1}, {"n": 2}))
    for read in (as_set, lambda data, _: list(read_all(data))):
        if read is as_set:
            with pytest.raises(Refused, match="until is null in every row, and the table cannot say in which"):
                read(table, tokenizer)
        else:
            assert all(isinstance(found, BadInput) for found in read(table, tokenizer))


# --- formats of values


@pytest.mark.parametrize("form", ["numpy", "torch", "pandas", "arrow"])
def test_a_table_in_another_format_says_the_same(tokenizer, form):
    given = entries({"n": 1, "x": 0.1, "yes": True, "some": [1, 2], "who": "me"}, {"n": 2})
    table = datasets.Dataset.from_list(given).with_format(form)
    assert as_set(table, tokenizer) == encoded(given, tokenizer)
    assert ids(item.layout for item in Intake(table, EntryEncoder(tokenizer))) == encoded(given, tokenizer)
    assert as_set(Subset(table, [1]), tokenizer) == encoded(given[1:], tokenizer)
    samples = datasets.Dataset.from_list([{"prompt_ids": [1, 2], "target_ids": [3]}]).with_format(form)
    assert as_set(samples, tokenizer) == ids([fr.lay_out([fr.Sample([1, 2], [3])])])


@pytest.mark.parametrize("form", ["numpy", "torch"])
def test_arrays_and_tensors_in_plain_rows_are_the_numbers_they_hold(tokenizer, form):
    given = entries({"n": 1, "yes": True, "some": [1, 2], "who": "me"})
    table = datasets.Dataset.from_list(given).with_format(form)
    assert ids([EntryEncoder(tokenizer)(table[0])]) == encoded(given, tokenizer)
    samples = datasets.Dataset.from_list([{"prompt_ids": [1, 2], "target_ids": [3]}]).with_format(form)
    assert ids([EntryEncoder(None)(samples[0])]) == ids([fr.lay_out([fr.Sample([1, 2], [3])])])
    rounded = datasets.Dataset.from_list(entries({"x": 0.1})).with_format("torch")
    with pytest.raises(
        BadInput, match=r"a number of torch.float32, which may have been rounded; .*with_format\(None\)"
    ):
        EntryEncoder(tokenizer)(rounded[0])
    weighed = datasets.Dataset.from_list([{"messages": [user("a"), {**answer("b"), "weight": 1.0}], "score": 0.3}])
    assert ids([EntryEncoder(tokenizer)(weighed.with_format(form)[0])]) == encoded(
        [{"messages": [user("a"), answer("b")]}], tokenizer
    )


def test_what_a_users_transform_makes_of_rows_is_taken_as_it_is(tokenizer):
    given = [{"messages": [user("one"), answer("two")]}]
    table = datasets.Dataset.from_list([{"text": "two"}])
    table = table.with_transform(lambda rows: {"messages": [[user("one"), answer(text)] for text in rows["text"]]})
    encoder = EntryEncoder(tokenizer)
    assert ids(item.layout for item in Intake(table, encoder)) == encoded(given, tokenizer)
    for data in (table, Subset(table, [0])):  # the collator encodes what comes
        rows, _ = encode_set(data, encoder)
        assert fr.Collator(encode=encoder)([rows[0]])["input_ids"][0, :5].tolist() == encoded(given, tokenizer)[0][:5]


def test_values_that_json_has_not_are_refused(tokenizer):
    """transformers would write a placeholder for them."""
    when = datetime(2024, 1, 2, tzinfo=UTC)
    history = [*chat({"when": when}), {"role": "tool", "content": "r"}, answer("done")]
    tools = [{"type": "function", "function": {"name": "f", "since": when}}]
    for entry in ({"messages": history}, {"messages": history[:1] + history[3:], "tools": tools}):
        for data in ([entry], datasets.Dataset.from_list([entry])):
            with pytest.raises(Refused, match="entry 0: a value of the type datetime, which JSON has not"):
                as_set(data, tokenizer)


def test_numbers_in_schemas_of_a_table_in_another_format_are_numbers(tokenizer):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"maximum": 5, "multipleOf": 0.1}}}]
    given = [{"messages": [user("one"), answer("two")], "tools": tools}]
    table = datasets.Dataset.from_list(given)
    for form in ("torch", "numpy"):
        assert as_set(table.with_format(form), tokenizer) == encoded(given, tokenizer)


def test_rows_of_pandas_are_read(tokenizer, tmp_path):
    pandas = pytest.importorskip("pandas")
    given = [{"messages": [user("one"), answer("two", "why")]}, *entries({"n": 1})]
    frame = pandas.DataFrame(given)
    frame.to_parquet(tmp_path / "chats.parquet")
    rows = pandas.read_parquet(tmp_path / "chats.parquet").to_dict("records")
    assert type(rows[0]["messages"]).__name__ == "ndarray"
    assert as_set(rows[:1], tokenizer) == encoded(given[:1], tokenizer)
