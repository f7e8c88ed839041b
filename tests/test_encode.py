"""fr.encode: options, roles, bad input, templates out of bounds, and a fuzz."""

import json
import pickle
import random
import time

import numpy as np
import pytest
import torch
from tokenizers import AddedToken

import flexreason as fr
from flexreason import Role
from flexreason.chat import bounds, render
from flexreason.chat.dirt import REASONS
from flexreason.chat.encode import Encoder, encode
from flexreason.chat.errors import (
    BadMessage,
    ConversationError,
    NoStopToken,
    NotAligned,
    NoTemplate,
    NothingToTrain,
    NotRendered,
    TemplateRaised,
    TemplateRunsAway,
)
from flexreason.data.files import read_conversations
from flexreason.load import stand_in
from fuzzing import conversation, fault
from templating import (
    SHAPES,
    TOOLS,
    TRL_TEMPLATES,
    answer,
    as_text,
    byte_level,
    call,
    encode_samples,
    in_parts,
    result,
    samples_of,
    source,
    trl_tokenizer,
    user,
    with_template,
)

QWEN = trl_tokenizer("qwen3")
CHAT = SHAPES["reasoning chat"]


def words(sample, tokenizer=QWEN):
    return tokenizer.decode(sample.prompt_ids), tokenizer.decode(sample.target_ids)


def test_encode_is_the_layout_of_the_samples():
    layout, samples = fr.encode(CHAT, QWEN), encode_samples(CHAT, QWEN)
    assert [(s.prompt_ids, s.target_ids) for s in fr.unmerge(layout)] == [(s.prompt_ids, s.target_ids) for s in samples]
    assert len(layout) < layout.sample_tokens


def test_roles_say_what_is_reasoning_response_and_context():
    layout = encode(CHAT, QWEN)
    text = {
        role: QWEN.decode(layout.input_ids[(layout.role & role) != 0])
        for role in (Role.REASONING, Role.RESPONSE, Role.CONTEXT)
    }
    for word in ("quartz", "timber", "walnut"):
        assert word in text[Role.REASONING]
        assert word not in text[Role.RESPONSE] + text[Role.CONTEXT]
    assert text[Role.CONTEXT] == "granitemeadow"
    assert text[Role.RESPONSE].replace("\n", "") == "pebble<|im_end|>meadow<|im_end|>granite<|im_end|>"


def test_roles_change_where_the_response_begins():
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}<a>{{ m.reasoning_content }}</a>"
    )
    tokenizer = small(template + "{{ m.content }}{% endif %}{% endfor %}")
    (sample,) = encode_samples([user("x"), answer("yy", "zz")], tokenizer)
    assert words(sample, tokenizer)[1] == "<a>zz</a>yy</s>"
    assert sample.target_roles == [Role.REASONING] * 4 + [Role.RESPONSE] * 3


def test_history_as_content_has_no_reasoning_even_in_a_tool_loop():
    messages = SHAPES["tool loop"]
    kept, gone = encode_samples(messages, QWEN, TOOLS), encode_samples(messages, QWEN, TOOLS, history="content")
    assert "quartz" in words(kept[1])[0]
    assert "quartz" not in words(gone[1])[0]
    assert words(kept[1])[1] == words(gone[1])[1]
    bare = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in messages[:3]]
    assert gone[1].prompt_ids == QWEN.apply_chat_template(
        bare, tools=TOOLS, add_generation_prompt=True, return_dict=False
    )


def test_template_options_are_passed_on():
    nemotron = trl_tokenizer("nemotron_3_nano")
    assert "quartz" not in words(encode_samples(CHAT, nemotron)[1], nemotron)[0]
    assert "quartz" in words(encode_samples(CHAT, nemotron, truncate_history_thinking=False)[1], nemotron)[0]


def test_turns_can_be_chosen_and_messages_excluded():
    assert [words(s)[1][:14] for s in encode_samples(CHAT, QWEN, turns="last")] == ["<think>\nwalnut"]
    for turns in ([0, -1], np.array([0, -1]), [np.int64(0), np.int32(-1)], torch.tensor([0, -1])):
        assert len(encode_samples(CHAT, QWEN, turns=turns)) == 2
    some = [CHAT[0], {**CHAT[1], "train": False}, *CHAT[2:4], CHAT[4], {**CHAT[5], "weight": 0}]
    (only,) = encode_samples(some, QWEN)
    assert only.prompt_ids == encode_samples(CHAT, QWEN)[1].prompt_ids
    with pytest.raises(NothingToTrain, match="excluded"):
        encode([CHAT[0], {**CHAT[1], "train": False}], QWEN)
    with pytest.raises(ConversationError, match="none of the 3 assistant messages"):
        encode(CHAT, QWEN, turns=[3])


def test_a_conversation_that_ends_with_a_user_is_trained_on_its_answers():
    assert [words(s) for s in encode_samples([*CHAT[:4], user("last")], QWEN)] == [
        words(s) for s in encode_samples(CHAT, QWEN)[:2]
    ]


def test_reasoning_in_any_field_and_inline_is_the_same():
    expected = encode_samples(CHAT, QWEN)
    for field in ("reasoning", "thinking"):
        renamed = [{field if k == "reasoning_content" else k: v for k, v in m.items()} for m in CHAT]
        assert encode_samples(renamed, QWEN) == expected
        loop = [{field if k == "reasoning_content" else k: v for k, v in m.items()} for m in SHAPES["tool loop"]]
        for history in ("template", "content"):
            assert encode_samples(loop, QWEN, TOOLS, history=history) == encode_samples(
                SHAPES["tool loop"], QWEN, TOOLS, history=history
            )
    inline = [
        answer(f"<think>\n{m['reasoning_content']}\n</think>\n\n{m['content']}") if "reasoning_content" in m else m
        for m in CHAT
    ]
    assert encode_samples(inline, QWEN) == expected


def test_contents_in_parts_are_their_text():
    assert encode_samples(in_parts(CHAT), QWEN) == encode_samples(CHAT, QWEN)


def test_parts_stand_one_a_line():
    parts = [{"type": "text", "text": text} for text in ("harbour", "lantern")]
    assert encode_samples([{"role": "user", "content": parts}, answer("granite")], QWEN) == encode_samples(
        [user("harbour\nlantern"), answer("granite")], QWEN
    )


def test_none_is_as_if_it_were_not_there():
    """As the clients' own libraries write messages out."""
    made = [{"name": None, "reasoning_content": None, "tool_calls": None, **m} for m in SHAPES["tool loop"]]
    made[1] = {**made[1], "content": None}
    assert encode_samples(made, QWEN, TOOLS) == encode_samples(SHAPES["tool loop"], QWEN, TOOLS)


def test_a_think_tag_that_begins_no_block_is_text():
    cut_off = {"accept": "unclosed-reasoning"}  # what begins with an opening tag is text only for who says so
    for text, more in (("so <think>\nquartz\n</think> it is", {}), ("<think> is where it begins", cut_off)):
        (sample,) = encode_samples([user("harbour"), answer(text)], trl_tokenizer("llama3"), **more)
        assert words(sample, trl_tokenizer("llama3"))[1] == f"{text}<|eot_id|>"


def test_what_is_said_for_training_is_not_seen_by_the_template():
    template = "{% for m in messages %}{{ m.keys() | join(' ') }} {{ m.content }}</a>{% endfor %}"
    (sample,) = encode_samples([user("x"), {**answer("y"), "train": True, "weight": 1}], small(template))
    assert words(sample, small(template)) == ("role content x</a>", "role content y</a>")


def test_context_is_of_the_turn_that_said_it():
    layout = encode(CHAT, QWEN)
    context = layout.role == Role.CONTEXT
    for turn, word in enumerate(("granite", "meadow")):
        assert QWEN.decode(layout.input_ids[context & (layout.turn == turn)]) == word
    assert QWEN.decode(layout.input_ids[context & (layout.turn == 2)]) == ""


def context(layout, turn):
    return QWEN.decode(layout.input_ids[(layout.role == Role.CONTEXT) & (layout.turn == turn)])


def test_context_is_where_an_answer_stands_and_not_where_its_text_does():
    """The first answer's text stands in the system message, in both questions, and in the headers of all messages."""
    said = [{"role": "system", "content": "user"}, user("user"), answer("user"), user("user"), answer("granite")]
    layout = encode(said, QWEN)
    place = layout.role.tolist().index(Role.CONTEXT)
    assert context(layout, 0) == "user"
    before = QWEN.apply_chat_template(said[:3], tokenize=False)
    assert QWEN.decode(layout.input_ids[:place]) == before.removesuffix("user<|im_end|>\n").replace(
        "<think>\n\n</think>\n\n", ""
    )


def test_inline_reasoning_without_an_answer_does_not_hide_the_roles_of_others():
    block = answer("<think>\nquartz\n</think>\n\n")
    layout = encode([*CHAT[:2], user("saddle"), block, user("orchard"), answer("pebble")], QWEN)
    assert context(layout, 0) == "granite"


def test_parallel_calls():
    two = call(1, "granite", "quartz")
    two["tool_calls"] = two["tool_calls"] + call(2, "meadow")["tool_calls"]
    messages = [user("harbour"), two, result(1, "lantern"), result(2, "orchard"), answer("pebble")]
    first, second = encode_samples(messages, QWEN, TOOLS)
    assert words(first)[1].count("<tool_call>") == 2
    assert "orchard" in words(second)[0]


def test_markers_of_reasoning_can_be_chosen_where_the_template_has_none():
    llama = trl_tokenizer("llama3")
    (sample,) = encode_samples(CHAT[:2], llama, think=("[", "]"))
    assert words(sample, llama)[1] == "[quartz]granite<|eot_id|>"


def test_an_encoder_can_be_pickled_and_does_the_same():
    encoder = Encoder(QWEN, history="content")
    samples_of(encoder, CHAT)
    assert samples_of(pickle.loads(pickle.dumps(encoder)), CHAT) == samples_of(encoder, CHAT)


def test_a_changed_template_is_noticed():
    tokenizer = with_template(byte_level(), source("qwen3"), special=["<|im_start|>", "<|im_end|>"], eos="<|im_end|>")
    before = fr.encode(CHAT[:2], tokenizer)
    tokenizer.chat_template = source("llama3_1")
    assert fr.encode(CHAT[:2], tokenizer).input_ids.tolist() != before.input_ids.tolist()


def test_a_tokenizer_that_has_changed_is_noticed():
    template = "{% for m in messages %}{{ '<a>' if m.role == 'assistant' }}{{ m.content }}<end>{% endfor %}"
    tokenizer = small(template + "{{ '<a>' if add_generation_prompt }}")

    def target():
        [sample] = fr.unmerge(fr.encode([user("x"), answer("y")], tokenizer))
        return words(sample, tokenizer)[1]

    assert target() == "y<end></s>"
    tokenizer.eos_token = "</a>"
    assert target() == "y<end></a>"
    tokenizer.add_tokens([AddedToken("<end>", special=True, normalized=False)], special_tokens=True)
    assert target() == "y<end>"


def test_a_token_that_becomes_special_is_noticed():
    template = "{% for m in messages %}{{ '<a>' if m.role == 'assistant' else '<u>' }}{{ m.content }}"
    template += "{{ '<end>' if m.role == 'assistant' }}\n{% endfor %}{{ '<a>' if add_generation_prompt }}"
    tokenizer = with_template(byte_level(), template, special=["<a>", "<u>"], plain=["<end>"])
    before = fr.encode([user("x"), answer("y")], tokenizer).input_ids.tolist()
    tokenizer.add_tokens(
        [AddedToken("<end>", special=True, normalized=False)], special_tokens=True
    )  # it is there already
    [sample] = fr.unmerge(fr.encode([user("x"), answer("y")], tokenizer))
    assert words(sample, tokenizer)[1] == "y<end>"
    assert sample.prompt_ids + sample.target_ids != before


def test_what_an_entry_says_of_tools_and_options_reaches_the_template():
    """Tables keep both as text."""
    entry = {
        "messages": SHAPES["tool loop"],
        "tools": json.dumps(TOOLS),
        "chat_template_kwargs": '{"enable_thinking": false}',
    }
    (found,) = read_conversations([entry])
    asked = {"tools": TOOLS, "enable_thinking": False}
    assert encode_samples(found.messages, QWEN, found.tools, **found.options) == encode_samples(
        SHAPES["tool loop"], QWEN, **asked
    )
    prompt = QWEN.apply_chat_template(SHAPES["tool loop"][:1], tokenize=False, add_generation_prompt=True, **asked)
    assert "Looks something up" in prompt
    assert prompt.endswith("</think>\n\n")
    assert words(encode_samples(found.messages, QWEN, found.tools, **found.options)[0])[0] == prompt


BAD = {
    "no list": ("hello", "expected a list of messages, found str"),
    "empty": ([], "has no messages"),
    "no dict": (["hello"], "message 0: expected a dict"),
    "unknown role": ([{"role": "human", "content": "x"}, answer("y")], "message 0: unknown role 'human'"),
    "sharegpt": ([{"from": "human", "value": "x"}], "from/value"),
    "no content": ([{"role": "user"}, answer("y")], "message 0: user message has no content"),
    "reasoning only": (
        [user("x"), {"role": "assistant", "reasoning": "y"}],
        "message 1: .*has reasoning but no content",
    ),
    "content of another type": ([{"role": "user", "content": 3}], "message 0: content: expected text"),
    "an image": ([{"role": "user", "content": [{"type": "image"}]}], "message 0: .*'image'"),
    "reasoning of a user": (
        [{**user("x"), "reasoning_content": "y"}],
        "message 0: a user message has reasoning_content",
    ),
    "reasoning of another type": (
        [user("x"), {**answer("y"), "thinking": ["z"]}],
        "message 1: thinking: expected text",
    ),
    "a call without a name": ([user("x"), {"role": "assistant", "tool_calls": [{}]}], r"message 1: tool_calls\[0\]"),
    "arguments that are no JSON": (
        [user("x"), {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
        "message 1: .*no JSON",
    ),
    "arguments that are no object": (
        [user("x"), {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}],
        "message 1: .*found list",
    ),
    "begins with an answer": ([answer("x")], "message 0: .*nothing to answer"),
    "no answer": ([user("x")], "no assistant message"),
    "a strange weight": ([user("x"), {**answer("y"), "weight": 0.5}], "message 1: weight: expected true or false"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_messages_are_named(name):
    messages, text = BAD[name]
    with pytest.raises(ConversationError, match=text) as error:
        encode(messages, QWEN)
    assert isinstance(error.value, ValueError)
    assert error.value.reason in (BadMessage.reason, NothingToTrain.reason)
    assert pickle.loads(pickle.dumps(error.value)).message == error.value.message


def small(template, **more):
    return with_template(byte_level(), template, special=["<a>", "</a>"], **more)


def test_a_tokenizer_without_a_template():
    with pytest.raises(NoTemplate, match="no chat template"):
        encode(CHAT, small(None))
    with pytest.raises(NoTemplate, match="no valid jinja, line 1"):
        encode(CHAT, small("{% if %}"))


class Processor:
    """Of a model for images and texts: it has a tokenizer, and applies its template."""

    tokenizer = trl_tokenizer("qwen3")
    apply_chat_template = tokenizer.apply_chat_template


@pytest.mark.parametrize("tokenizer", [None, "Qwen/Qwen3-0.6B", Processor()])
def test_what_is_no_tokenizer_is_named(tokenizer):
    words = f"tokenizer: expected a tokenizer of transformers, found {type(tokenizer).__name__}; give "
    for encoded in (encode, lambda messages, tokenizer: fr.EntryEncoder(tokenizer)({"messages": messages})):
        with pytest.raises(ConversationError, match=words):
            encoded(SHAPES["chat"], tokenizer)


def test_a_tokenizer_without_a_stop_token():
    with pytest.raises(NoStopToken, match="message 1: nothing ends this message"):
        encode(CHAT[:2], small("{% for m in messages %}{{ m.content }}\n{% endfor %}", eos=None))


def test_the_words_of_a_template_and_the_message_it_fails_at():
    template = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    template += "{{ m.content }}</a>{% endfor %}"
    with pytest.raises(TemplateRaised, match=r"message 2: the chat template raises \(tool\): no tools here"):
        encode([user("a"), answer("b"), result(1, "c"), user("d"), answer("e")], small(template))


def test_a_call_that_is_not_shown():
    with pytest.raises(NotRendered, match="message 1: the chat template does not render the tool call"):
        encode([user("a"), call(1, "b")], small("{% for m in messages %}{{ m.content }}</a>{% endfor %}"))


def test_options_that_would_change_what_a_sample_is():
    with pytest.raises(ConversationError, match="sanitize_control_tokens is not an option of the template"):
        encode(CHAT, QWEN, sanitize_control_tokens=True)
    with pytest.raises(ConversationError, match='expected "template" or "content"'):
        encode(CHAT, QWEN, history="all")


def test_templates_run_in_a_sandbox():
    with pytest.raises(TemplateRaised, match=r"SecurityError|unsafe"):
        encode(CHAT, small("{{ messages.__class__.__mro__[1].__subclasses__() }}"))


def test_a_template_that_never_ends_is_stopped(monkeypatch):
    monkeypatch.setattr(bounds, "SECONDS", 0.3)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    start = time.monotonic()
    with pytest.raises(TemplateRunsAway, match=r"longer than 0.3 s"):
        encode(CHAT, small(loop))
    assert time.monotonic() - start < 5
    assert encode(CHAT, QWEN)  # and the next one runs
    time.sleep(0.2)  # whoever watches has left by now
    with pytest.raises(TemplateRunsAway, match=r"longer than 0.3 s"):
        encode(CHAT, small(loop))


def test_a_template_that_explodes_is_stopped(monkeypatch):
    monkeypatch.setattr(render, "LONGEST", 100_000)
    with pytest.raises(TemplateRunsAway, match="characters"):
        encode(CHAT, small("{% for a in range(99999) %}{{ messages[0].content }}{% endfor %}"))
    with pytest.raises(TemplateRunsAway, match="stopped"):
        encode(CHAT, small("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}"))
    for huge in ("{% for a in range(10 ** 9) %}{% endfor %}", "{{ 'a' * 4000000000 }}", "{{ range(999999) | list }}"):
        with pytest.raises(TemplateRunsAway, match="stopped"):
            encode(CHAT, small(huge))


def test_a_template_that_takes_too_much_memory_is_stopped(monkeypatch):
    monkeypatch.setattr(bounds, "MEMORY", 50_000_000)
    doubles = "{% set ns = namespace(x='ab') %}{% for a in range(27) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
    slowly = "{% for a in range(9999) %}{% for b in range(999) %}{% endfor %}{% endfor %}"
    with pytest.raises(TemplateRunsAway, match="MiB of memory"):
        encode(CHAT, small(doubles + slowly))


ENCODERS: dict = {}


def fuzz(numbers):
    """Conversations of these numbers over all templates: how many came out, were refused, and what was wrong."""
    n_ok, refused, wrong = 0, {}, []
    for number in numbers:
        name, draw = TRL_TEMPLATES[number % len(TRL_TEMPLATES)], random.Random(number)
        if name.startswith(("idefics3", "llava", "smolvlm")):  # these take contents in parts
            continue
        encoder = ENCODERS.setdefault(name, Encoder(trl_tokenizer(name), accept=REASONS))  # any text may be anything
        tools = TOOLS if draw.random() < 0.4 else None
        messages = conversation(draw, tools is not None)
        if name == "deepseekv3":
            messages = [as_text(message) for message in messages]
        try:
            found = encoder.encoded(messages, tools)
        except ConversationError as error:
            refused.setdefault(type(error), []).append((number, name, str(error)))
            continue
        n_ok += 1
        if words := fault(name, encoder, messages, found, tools):
            wrong.append((number, name, words))
    return n_ok, refused, wrong


FOUND = [9, 28, 38, 46, 48, 64, 79, 113, 333, 763, 62_917, 67_759]
"""Numbers that once came out wrong, or were refused without need."""


def test_conversations_made_to_mislead():
    n_ok, refused, wrong = fuzz([*FOUND, *range(10_000, 10_490)])
    assert not wrong
    assert n_ok > 350
    assert set(refused) <= {NotRendered, TemplateRaised, NotAligned}
    assert all(name.startswith("deepseekv3") for _, name, _ in refused.get(NotAligned, []))  # its loops' later calls


@pytest.mark.slow
def test_very_many_conversations_made_to_mislead():
    n_ok, refused, wrong = fuzz(range(100_000))
    assert not wrong
    assert n_ok > 75_000  # of 95,833: the others lose text to the template, or are later calls in loops of DeepSeek V3
    assert set(refused) <= {NotRendered, TemplateRaised, NotAligned}
    assert all(name.startswith("deepseekv3") for _, name, _ in refused.get(NotAligned, []))  # its loops' later calls


def test_an_option_of_the_template_that_is_misspelt_is_refused_and_one_that_means_nothing_to_it_is_not():
    tokenizer = stand_in(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is defined %}!{% endif %}{% endif %}"
    )
    messages = [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]
    for wrong in ("enable_thinkng", "Enable-Thinking", "enable_thinkin"):
        with pytest.raises(ConversationError, match=f"no option '{wrong}'; did you mean 'enable_thinking'"):
            fr.encode(messages, tokenizer, **{wrong: True})
    plain = len(fr.encode(messages, tokenizer))
    assert len(fr.encode(messages, tokenizer, enable_thinking=True)) == plain + 1
    for other in (
        "thinking",
        "preserve_thinking",
        "reasoning_effort",
    ):  # options of other templates, which data may name
        assert len(fr.encode(messages, tokenizer, **{other: True})) == plain
