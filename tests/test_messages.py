"""Messages as people's data have them: what each of them means is known, or it is refused by name."""

import json
import logging
from functools import cache

import pytest

import flexreason as fr
from flexreason.chat.encode import Encoder
from flexreason.chat.errors import BadMessage, ConversationError
from templating import (
    TOOLS,
    TRL_TEMPLATES,
    answer,
    byte_level,
    encode_samples,
    samples_of,
    trl_tokenizer,
    user,
    with_template,
)

QWEN, QWEN_2_5 = trl_tokenizer("qwen3"), trl_tokenizer("qwen2_5")

DOUBLED = "doubled-reasoning"


def parts(*texts, **more):
    return [{"type": "text", "text": text, **more} for text in texts]


def calling(function, **more):
    return {"role": "assistant", "content": "", **more, "tool_calls": [{"type": "function", "function": function}]}


def target(messages, tokenizer=QWEN, tools=None, **options):
    return tokenizer.decode(encode_samples(messages, tokenizer, tools, **options)[-1].target_ids)


def prompt(messages, tokenizer=QWEN, tools=None, **options):
    return tokenizer.decode(encode_samples(messages, tokenizer, tools, **options)[-1].prompt_ids)


FAMILIES = [name for name in TRL_TEMPLATES if not name.endswith("_training")]


@cache
def encoder(family):
    return Encoder(trl_tokenizer(family))


def outcome(messages, family):
    """The samples, or the class of reasons for which there are none."""
    try:
        return samples_of(encoder(family), messages)
    except ConversationError as error:
        return type(error)


# --- calls


@pytest.mark.parametrize("content", ["", "granite", None])
def test_a_call_in_the_older_form_is_refused_with_the_newer_one(content):
    called = {"role": "assistant", "content": content, "function_call": {"name": "f", "arguments": "{}"}}
    for tokenizer in (QWEN, trl_tokenizer("llama3")):
        with pytest.raises(BadMessage, match=r"^message 1: .* function_call, .* give it as tool_calls") as error:
            encode_samples([user("harbour"), called, user("lantern"), answer("meadow")], tokenizer)
        assert error.value.message == 1
    for key in ("tool_call", "toolCalls", "functionCall", "function_calls"):
        with pytest.raises(BadMessage, match=f"^message 1: it has a call under {key}, "):
            encode_samples([user("harbour"), {**answer("granite"), key: [{"name": "f"}]}], QWEN)
    empty = {**answer("granite"), "function_call": None, "tool_call": []}
    assert encode_samples([user("harbour"), empty], QWEN) == encode_samples([user("harbour"), answer("granite")], QWEN)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_calls_are_none_in_any_form(name):
    chat = [user("harbour"), answer("granite"), user("lantern"), answer("meadow")]
    for none in ([], None):
        messages = [{**m, "tool_calls": none} for m in chat]
        assert outcome(messages, name) == outcome(chat, name)
        untrained = [{**m, "train": False} if n == 1 else m for n, m in enumerate(messages)]
        expected = [{**m, "train": False} if n == 1 else m for n, m in enumerate(chat)]
        assert outcome(untrained, name) == outcome(expected, name)


def test_an_answer_in_history_stands_there_whether_it_has_a_list_of_no_calls_or_not():
    tokenizer = trl_tokenizer("deepseekv3")
    chat = [user("harbour"), {**answer("granite"), "train": False}, user("lantern"), answer("meadow")]
    expected = tokenizer.apply_chat_template(
        [user("harbour"), answer("granite"), user("lantern")], tokenize=False, add_generation_prompt=True
    )
    assert prompt([{**m, "tool_calls": []} for m in chat], tokenizer) == expected


ELSEWHERE = {
    "Llama's": {"name": "f", "parameters": {"city": "Paris"}},
    "as text": {"name": "f", "parameters": '{"city": "Paris"}'},
    "LangChain's": {"name": "f", "args": {"city": "Paris"}},
    "Anthropic's": {"name": "f", "input": {"city": "Paris"}},
    "beside none": {"name": "f", "arguments": None, "parameters": {"city": "Paris"}},
    "beside an empty one": {"name": "f", "arguments": {}, "parameters": {"city": "Paris"}},
    "misspelt": {"name": "f", "argument": {"city": "Paris"}},
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_arguments_that_stand_where_no_template_looks_are_refused(name):
    function = ELSEWHERE[name]
    key = next(key for key in function if key != "name" and function[key])
    for called in (calling(function), {"role": "assistant", "content": "", "tool_calls": [function]}):
        for template in ("qwen3_5_think", "gemma4", "llama3_1"):
            words = rf"^message 1: tool_calls\[0\]: arguments stand under '{key}', .* give them as arguments"
            with pytest.raises(BadMessage, match=words):
                encode_samples([user("harbour"), called], trl_tokenizer(template), TOOLS)


def test_arguments_beside_their_function_are_refused_and_a_call_without_any_is_a_call():
    beside = {"type": "function", "function": {"name": "f"}, "arguments": '{"city": "Paris"}'}
    with pytest.raises(BadMessage, match=r"arguments stand under 'arguments', .* of its function"):
        encode_samples([user("harbour"), {"role": "assistant", "tool_calls": [beside]}], QWEN)
    tokenizer = trl_tokenizer("qwen3_5_think")
    for function in ({"name": "f"}, {"name": "f", "arguments": {}}, {"name": "f", "parameters": {}}):
        text = target([user("harbour"), calling(function)], tokenizer, TOOLS)
        assert "<function=f>\n</function>" in text


DIGITS = {
    "beyond floats": ('{"x": 1e400}', "1e400 is inf"),
    "beyond all bounds": ('{"x": 1e-99999999999999999999}', "1e-99999999999999999999 is 0.0"),
    "more digits than floats hold": ('{"x": 12345678901234567.89}', "12345678901234567.89 is 1.23"),
    "more behind the point": ('{"x": [{"y": 0.30000000000000000001}]}', "0.30000000000000000001 is 0.3 "),
    "a key twice": ('{"a": 1, "a": 2}', "the key 'a' stands twice"),
    "an inner key twice": ('{"b": [{"a": 1, "a": 1}]}', "the key 'a' stands twice"),
}


@pytest.mark.parametrize("name", DIGITS)
def test_arguments_that_an_object_would_not_say_are_refused_where_they_must_be_one(name):
    arguments, words = DIGITS[name]
    messages = [user("harbour"), calling({"name": "f", "arguments": arguments})]
    with pytest.raises(BadMessage, match=f"^message 1: arguments: {words}"):
        encode_samples(messages, QWEN_2_5)
    assert arguments in target(messages, QWEN)  # which takes the text as it is


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        ('{"x": 0.1, "y": 1.50, "z": 1E5}', '{"x": 0.1, "y": 1.5, "z": 100000.0}'),
        ('{"n": 123456789012345678901234567890}', '{"n": 123456789012345678901234567890}'),
        ('{"x": 1.7976931348623157e308}', '{"x": 1.7976931348623157e+308}'),
        ('{"x": -0.0, "y": 0e5}', '{"x": -0.0, "y": 0.0}'),
        ("", "{}"),
    ],
)
def test_arguments_that_an_object_says_too_are_taken(arguments, written):
    assert written in target([user("harbour"), calling({"name": "f", "arguments": arguments})], QWEN_2_5)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_does_not_have_are_refused_in_calls(number):
    """Python reads and writes them; no reader of calls does."""
    for arguments in ({"x": [{"y": float(number)}]}, f'{{"x": [{{"y": {number}}}]}}'):
        made = QWEN.apply_chat_template(
            [user("harbour"), calling({"name": "f", "arguments": arguments})], tokenize=False
        )
        assert number in made.partition("<tool_call>")[2]
        with pytest.raises(BadMessage, match=r"^message 1: .*arguments have the number"):
            target([user("harbour"), calling({"name": "f", "arguments": arguments})])
    assert number in target([user("harbour"), calling({"name": "f", "arguments": {"x": number}})])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_call_without_content_is_one_whose_content_is_empty(name):
    """OpenAI's form has content null beside calls. A template that looks for the content is given an empty one."""
    empty = calling({"name": "search", "arguments": {"key": "granite"}})
    empty["tool_calls"][0]["id"] = "call00001"
    if encoder(name).template().argument_form == "string":
        empty["tool_calls"][0]["function"]["arguments"] = '{"key": "granite"}'
    result = {"role": "tool", "name": "search", "tool_call_id": "call00001", "content": "pebble"}
    for behind in ([], [result, answer("meadow")]):
        for without in ({**empty, "content": None}, {key: empty[key] for key in empty if key != "content"}):
            found, expected = (outcome([user("harbour"), each, *behind], name) for each in (without, empty))
            assert found == expected


# --- contents


def written(messages, family, prompt=True):
    """What the template itself writes of messages in parts; nothing where it takes none."""
    try:
        text = trl_tokenizer(family).apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except Exception:
        return ""
    return text if "harbour" in text and "type" not in text else ""  # not the list itself, as Python or JSON


@pytest.mark.parametrize("name", FAMILIES)
def test_a_part_without_its_type_is_text(name):
    said = [{"role": "user", "content": parts("harbour", "lantern")}, answer("granite")]
    for part in ({"text": "harbour"}, {"type": None, "text": "harbour"}, {"text": "harbour", "image_url": None}):
        bare = [{"role": "user", "content": [part, *parts("lantern")]}, answer("granite")]
        found = outcome(bare, name)
        assert found == outcome(said, name)
        if isinstance(found, list):
            text = trl_tokenizer(name).decode(found[0].prompt_ids)
            assert "harbour" in text
            assert text == (written(said[:1], name) or text)


def test_parts_that_are_no_text_are_named():
    for part, found in (({"image": "x"}, "image"), ({"type": "image_url", "text": "x"}, "image_url"), ("x", "str")):
        with pytest.raises(BadMessage, match=f"^message 0: content: expected parts like .*, found '{found}'"):
            encode_samples([{"role": "user", "content": [part]}, answer("granite")], QWEN)


BLOCKS = {
    "in a part of its own": ("<think>\nquartz\n</think>\n\n", "The answer is 1", "0."),
    "before the first text": ("<think>\nquartz\n</think>\n\nThe answer is 1", "0."),
    "in several parts": ("<think>\n", "quartz", "\n</think>", "The answer is 1", "0."),
    "before empty parts": ("<think>quartz</think>", "", "The answer is 1", "", "0."),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("block", BLOCKS)
def test_parts_behind_a_block_come_out_as_the_same_parts_without_it(block, name):
    tokenizer, said = trl_tokenizer(name), BLOCKS[block]
    at = next(n for n, text in enumerate(said) if "The answer" in text)
    left = parts("The answer is 1", *said[at + 1 :])
    for after in ([], [user("lantern"), answer("meadow")]):
        inline = [user("harbour"), {"role": "assistant", "content": parts(*said)}, *after]
        plain = [user("harbour"), {"role": "assistant", "content": left}, *after]
        field = [user("harbour"), {"role": "assistant", "content": left, "reasoning_content": "quartz"}, *after]
        found, expected = outcome(inline, name), outcome(field, name)
        assert found == expected or block == "in several parts"  # whose reasoning has line breaks of its own
        if isinstance(found, list):
            end = tokenizer.decode(outcome(plain, name)[0].target_ids)
            text = tokenizer.decode(found[0].target_ids)
            assert text.endswith(end[end.index("The answer") :])
            assert ("quartz" in text) == ("nothink" not in name)
            answered = written(plain[:2], name, prompt=False)
            assert text[text.index("The answer") :].partition("<")[0] in (
                answered if "The answer" in answered else text
            )


def test_parts_of_a_model_whose_prompt_had_opened_the_block_stay_parts():
    tokenizer = trl_tokenizer("qwen3_5_think")
    said = parts("quartz\n</think>\n\nThe answer is 1", "0.")
    messages = [user("harbour"), {"role": "assistant", "content": said}]
    expected = [user("harbour"), {**answer("", "quartz"), "content": parts("The answer is 1", "0.")}]
    assert encode_samples(messages, tokenizer) == encode_samples(expected, tokenizer)
    assert "The answer is 10." in target(messages, tokenizer)


# --- reasoning in two fields


def two(one, other, names=("reasoning_content", "thinking")):
    return [user("harbour"), {**answer("granite"), **dict(zip(names, (one, other), strict=True))}]


@pytest.mark.parametrize("names", [("reasoning_content", "thinking"), ("thinking", "reasoning")])
@pytest.mark.parametrize("template", ["qwen3", "gptoss", "gemma4", "llama3"])
def test_two_fields_with_different_reasoning_are_refused_and_with_the_same_are_not(template, names):
    tokenizer = trl_tokenizer(template)
    with pytest.raises(ConversationError, match=f"^message 1: .* accept {DOUBLED} ") as error:
        encode_samples(two("quartz", "the full quartz", names), tokenizer)
    assert error.value.reason == DOUBLED
    for name in names:
        assert name in str(error.value)
    expected = encode_samples([user("harbour"), {**answer("granite"), names[0]: "quartz"}], tokenizer)
    for one, other in (("quartz", "quartz"), ("quartz", ""), ("", "quartz"), ("quartz", None)):
        assert encode_samples(two(one, other, names), tokenizer) == expected
    untrained = [*two("quartz", "the full quartz", names), user("lantern"), answer("meadow")]
    untrained[1]["train"] = False
    asked = tokenizer.apply_chat_template(untrained[:3], tokenize=False, add_generation_prompt=True)
    if template != "gptoss":  # whose prompt has the date
        assert prompt(untrained, tokenizer) == asked


@pytest.mark.parametrize(
    ("template", "field", "other"),
    [
        ("qwen3", "reasoning_content", "thinking"),
        ("gptoss", "thinking", "reasoning_content"),
        ("gemma4", "reasoning", "reasoning_content"),  # which it writes before calls only
    ],
)
def test_of_two_fields_that_are_accepted_the_templates_is_trained(template, field, other):
    tokenizer = trl_tokenizer(template)
    messages = two("quartz", "steel", (field, other))
    only = [user("harbour"), {**answer("granite"), field: messages[1][field]}]
    assert encode_samples(two("quartz\n", "quartz"), tokenizer)  # white space says nothing
    assert encode_samples(messages, tokenizer, accept=DOUBLED) == encode_samples(only, tokenizer)
    called = [user("harbour"), {**calling({"name": "f", "arguments": {}}), **messages[1], "content": ""}]
    expected = [user("harbour"), {**calling({"name": "f", "arguments": {}}), field: messages[1][field]}]
    assert encode_samples(called, tokenizer, accept=DOUBLED) == encode_samples(expected, tokenizer)
    marked = [user("harbour"), {**messages[1], field: "<think>steel</think>"}]
    with pytest.raises(ConversationError, match="accept marked-reasoning"):  # in the field that is trained
        encode_samples(marked, tokenizer, accept=DOUBLED)


@pytest.mark.parametrize("name", ["reasoningContent", "thoughts", "reasoning_details", "Thinking", "cot"])
def test_reasoning_under_a_name_that_the_template_does_not_know_is_refused(name):
    """The template writes an empty block for it, as if the answer had none."""
    said = [{"type": "text", "text": "quartz"}] if name == "reasoning_details" else "quartz"
    other = [user("harbour"), {**answer("granite"), name: said}]
    rendered = QWEN.apply_chat_template(other, tokenize=False)
    assert "quartz" not in rendered
    assert "<think>\n\n</think>" in rendered
    with pytest.raises(BadMessage, match=f"message 1: it has reasoning under '{name}'.*give it as reasoning_content"):
        target(other)
    assert "quartz" in target([user("harbour"), {**other[1], "reasoning": "quartz"}])
    assert target([user("harbour"), {**answer("granite"), name: " " if isinstance(said, str) else []}])
    assert target([user("harbour"), {**other[1], "train": False}, user("lantern"), answer("meadow")])
    assert target(other, enable_thinking=False) == "granite<|im_end|>"
    reads = "{% for m in messages %}<a>{{ m.role }}{% if m." + name + " %}<t>{{ m." + name + " }}</t>{% endif %}"
    reads += "{{ m.content }}</a>{% endfor %}{% if add_generation_prompt %}<a>assistant{% endif %}"
    tokenizer = with_template(byte_level(), reads, special=["<a>", "</a>"], eos="</a>")
    assert target(other, tokenizer) == f"<t>{said}</t>granite</a>"


# --- roles


def test_a_role_that_the_template_leaves_out_is_told_once(caplog):
    encoder = Encoder(QWEN)
    for role in ("developer", "context", "developer"):
        for _ in range(2):
            encoder.encoded([{"role": role, "content": "granite"}, user("harbour"), answer("meadow")])
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [text.partition(":")[0] for text in told] == [
        f"the chat template leaves out {role} messages" for role in ("developer", "context")
    ]


LOST = "{% for m in messages %}{% if m.role in ROLES %}<a>{{ m.role }} {{ m.content }}</a>{% endif %}{% endfor %}"
LOST += "{% if add_generation_prompt %}<a>assistant {% endif %}"


@pytest.mark.parametrize("role", ["system", "developer", "tool", "function", "ipython", "context"])
def test_every_role_that_is_left_out_is_told_and_none_that_is_not(role, caplog):
    chat = [
        user("harbour"),
        {**answer("granite"), "train": False},
        {"role": role, "content": "pebble"},
        answer("meadow"),
    ]
    for roles, told in ((["user", "assistant"], 1), (["user", "assistant", role], 0)):
        tokenizer = with_template(byte_level(), LOST.replace("ROLES", str(roles)), special=["<a>", "</a>"], eos="</a>")
        caplog.clear()
        text = prompt(chat, tokenizer)
        assert ("pebble" in text) == (not told)
        assert len([r for r in caplog.records if f"leaves out {role} messages" in r.getMessage()]) == told


def test_a_role_that_is_taken_at_the_beginning_only_is_told_where_it_stands_later(caplog):
    template = LOST.replace("m.role in ROLES", "m.role != 'system' or loop.first")
    encoder = Encoder(with_template(byte_level(), template, special=["<a>", "</a>"], eos="</a>"))
    system = {"role": "system", "content": "pebble"}
    encoder.encoded([system, user("harbour"), answer("meadow")])
    encoder.encoded([user("harbour"), answer("meadow"), system])  # in no prompt
    encoder.encoded([user("harbour"), {**system, "content": " "}, answer("meadow")])
    assert not caplog.records
    encoder.encoded([user("harbour"), system, answer("meadow")])
    assert "leaves out system messages behind the first message" in caplog.text


# --- what is said of training


@pytest.mark.parametrize("no", [{"loss": False}, {"loss": 0}, {"train": False, "loss": 0, "weight": 0.0}])
def test_other_words_for_what_is_not_trained(no):
    chat = [user("harbour"), {**answer("granite"), **no}, user("lantern"), {**answer("meadow"), "loss": True}]
    expected = [user("harbour"), {**answer("granite"), "train": False}, user("lantern"), answer("meadow")]
    assert encode_samples(chat, QWEN) == encode_samples(expected, QWEN)


@pytest.mark.parametrize(
    "marks", [{"train": True, "weight": 0}, {"train": False, "loss": True}, {"loss": 0, "weight": 1}]
)
def test_words_of_training_that_contradict_each_other_are_refused(marks):
    for key in marks:
        with pytest.raises(BadMessage, match=f"^message 1: .*{key}: .* contradict each other; leave one"):
            encode_samples([user("harbour"), {**answer("granite"), **marks}], QWEN)
    with pytest.raises(BadMessage, match=r"message 1: loss: expected true or false, found 0\.5"):
        encode_samples([user("harbour"), {**answer("granite"), "loss": 0.5}], QWEN)


def test_answers_in_a_prompt_are_not_trained_whatever_they_say():
    chat = [user("harbour"), {**answer("granite"), "loss": True, "weight": 1}, user("lantern")]
    entry = {"prompt": chat, "completion": [answer("meadow")]}
    assert len(fr.unmerge(fr.EntryEncoder(QWEN)(entry))) == 1


# --- options


@pytest.mark.parametrize(
    ("name", "meant"),
    [("turn", "turns"), ("histroy", "history"), ("acept", "accept"), ("Accept", "accept"), ("thinks", "think")],
)
def test_a_misspelt_option_of_encode_is_refused_whatever_the_template_knows(name, meant):
    for make in (lambda: fr.encode([user("harbour"), answer("granite")], QWEN, **{name: "last"}),):
        with pytest.raises(ConversationError, match=f"no option '{name}'; did you mean '{meant}'"):
            make()
    with pytest.raises(ConversationError, match=f"did you mean '{meant}'"):
        fr.EntryEncoder(QWEN, **{name: "last"})({"messages": [user("harbour"), answer("granite")]})
    knows = with_template(byte_level(), LOST.replace("m.role in ROLES", name), special=["<a>", "</a>"], eos="</a>")
    assert encode_samples([user("harbour"), answer("granite")], knows, **{name: "last"})


@pytest.mark.parametrize("name", ["skip_invalid", "chat_template_kwargs", "template_options"])
def test_what_is_no_option_of_a_template_is_refused(name):
    with pytest.raises(ConversationError, match=f"^{name} is no option of the chat template; give"):
        fr.encode([user("harbour"), answer("granite")], QWEN, **{name: {}})


def test_options_of_other_templates_mean_nothing_to_this_one():
    chat = [user("harbour"), answer("granite")]
    others = ["thinking", "reasoning_effort", "builtin_tools", "date_string", "custom_tools", "thinking_budget"]
    for other in [*others, "clear_thinking", "add_vision_id", "tools_in_user_message", "documents", "xml_tools"]:
        assert encode_samples(chat, QWEN, **{other: None}) == encode_samples(chat, QWEN)


# --- what nobody can write

HALF = "steel \ud83d"

WRITTEN = {
    "in a question": [user(HALF), answer("granite")],
    "in an answer": [user("harbour"), answer(HALF)],
    "in reasoning": [user("harbour"), answer("granite", HALF)],
    "in a part": [{"role": "user", "content": parts("harbour", HALF)}, answer("granite")],
    "in arguments": [user("harbour"), calling({"name": "f", "arguments": {"x": [HALF]}})],
    "in a key": [user("harbour"), calling({"name": "f", "arguments": {HALF: 1}})],
    "in a name": [user("harbour"), calling({"name": HALF, "arguments": {}})],
    "in JSON": [user("harbour"), calling({"name": "f", "arguments": json.dumps({"x": HALF})})],
}


@pytest.mark.parametrize("where", WRITTEN)
def test_half_a_character_is_refused_where_it_stands(where):
    messages = WRITTEN[where]
    number = 0 if messages[0] != user("harbour") else 1
    with pytest.raises(BadMessage, match=f"^message {number}: a text was cut within a character") as error:
        encode_samples(messages, QWEN_2_5)
    str(error.value).encode()  # it can be printed


def test_half_a_character_that_no_sample_has_is_nobodys_fault():
    encode_samples([user("harbour"), {**answer("granite"), "note": HALF}], QWEN)
    escaped = json.dumps({"x": HALF})
    assert escaped in target([user("harbour"), calling({"name": "f", "arguments": escaped})], QWEN)
    after = [user("harbour"), answer("granite"), user(HALF)]
    assert encode_samples(after, QWEN) == encode_samples(after[:2], QWEN)
    tools = [{"type": "function", "function": {"name": "f", "description": HALF, "parameters": {}}}]
    with pytest.raises(BadMessage, match=r"^a text was cut within a character"):
        encode_samples([user("harbour"), answer("granite")], QWEN, tools)


def nested(depth):
    value = "granite"
    for _ in range(depth):
        value = [value]
    return value


ENDLESS = {
    "a number in JSON": ('{"n": ' + "1" * 5000 + "}", "digits"),
    "a number": ({"n": [10**5000]}, "more digits than Python writes"),
    "nested JSON": ('{"n": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    "JSON that is nested less": (json.dumps({"n": nested(300)}), "100 deep"),
    "nested lists": ({"n": nested(6000)}, "100 deep"),
}


@pytest.mark.parametrize("tokenizer", [QWEN, QWEN_2_5], ids=["any form", "objects"])
@pytest.mark.parametrize("name", ENDLESS)
def test_arguments_without_end_are_refused(name, tokenizer):
    arguments, words = ENDLESS[name]
    with pytest.raises(BadMessage, match=f"^message 1: .*tool_calls.*{words}.*; shorten it"):
        encode_samples([user("harbour"), calling({"name": "f", "arguments": arguments})], tokenizer)


def test_what_is_nested_within_bounds_is_taken():
    for arguments in ({"n": nested(90)}, json.dumps({"n": nested(90)})):
        assert "granite" in target([user("harbour"), calling({"name": "f", "arguments": arguments})], QWEN_2_5)


def test_a_message_that_holds_itself_is_refused():
    message = answer("granite")
    message["note"] = [message]
    with pytest.raises(BadMessage, match=r"^message 1: its note .*100 deep"):
        encode_samples([user("harbour"), message], QWEN)


@pytest.mark.parametrize("think", [5, "ab", {"a": 1, "b": 2}, ["a"], [b"a", b"b"], ("", "b")])
def test_markers_of_another_kind_are_refused(think):
    with pytest.raises(ConversationError, match=r"^think: expected"):
        fr.encode([user("harbour"), answer("granite")], QWEN, think=think)


def test_a_function_that_says_nothing_of_itself_is_no_tool():
    def silent(x: int) -> int:
        return x

    def told(x: int) -> int:
        """Looks.

        Args:
            x: What for.
        """
        return x

    with pytest.raises(BadMessage, match=r"^tools\[1\]: no JSON schema can be made .* docstring") as error:
        fr.encode([user("harbour"), answer("granite")], QWEN, tools=[told, silent])
    assert error.value.message is None
    asked = QWEN.apply_chat_template([user("harbour")], tools=[told], tokenize=False, add_generation_prompt=True)
    assert prompt([user("harbour"), answer("granite")], QWEN, [told]) == asked


# --- what templates compute and draw


def test_two_stars_are_no_power_where_they_stand_in_a_text_or_hand_on_arguments():
    chat = [user("harbour"), answer("granite")]
    macro = "{% macro f(x) %}{{ x }}{% endmacro %}{% set kw = {'x': 'hi'} %}"
    for begin, text in (
        (r'{{ "**Note**: {\"a\": {...}}\n**b** {% c %}" }}', '**Note**: {"a": {...}}\n**b** {% c %}'),
        (macro + "{{ f(**kw) }}", "hi"),
        (macro + "{{ f( ** kw) }}", "hi"),
        ("{# 2 ** 9 #}{% raw %}{{ 2 ** 9 * 99999999 }}{% endraw %}", "{{ 2 ** 9 * 99999999 }}"),
        ("{{ 'x' * 3 }} ** 2", "xxx ** 2"),
    ):
        template = begin + LOST.replace("m.role in ROLES", "true")
        tokenizer = with_template(byte_level(), template, special=["<a>", "</a>"], eos="</a>")
        expected = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
        assert prompt(chat, tokenizer) == expected
        assert expected.startswith(text)


@pytest.mark.parametrize(
    "code",
    [
        "2 ** 9",
        "x**y",
        "(2)**9",
        "'{}}' * 4000000000",
        "0xfffffff * 'a'",
        "'a' * 1_000_000_000",
        "[1][0] ** 2",
        "f(2**9)",
    ],
)
def test_powers_and_huge_products_are_refused_before_they_are_computed(code):
    template = "{% set x = 1 %}{{ " + code + " }}" + LOST.replace("m.role in ROLES", "true")
    tokenizer = with_template(byte_level(), template, special=["<a>", "</a>"], eos="</a>")
    with pytest.raises(ConversationError, match="was stopped before it ran: it computes"):
        encode_samples([user("harbour"), answer("granite")], tokenizer)


def test_a_place_in_memory_that_somebody_has_said_is_a_text():
    spaced = LOST.replace("m.role in ROLES", "true").replace("{{ m.content }}", "{{ ' ' ~ m.content }}")
    tokenizer = with_template(byte_level(), spaced, special=["<a>", "</a>"], eos="</a>")
    for text in ("at 0x401000 it stops", "it stops at 0x7F00AB"):
        chat = [user(text), answer("granite")]
        asked = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
        assert prompt(chat, tokenizer) == asked
    drawn = with_template(byte_level(), "{{ raise_exception }}" + spaced, special=["<a>", "</a>"], eos="</a>")
    with pytest.raises(ConversationError, match="by its place in memory"):
        encode_samples([user("at 0x401000 it stops"), answer("granite")], drawn)
