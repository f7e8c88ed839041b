"""Messages in the forms in which people store them, held against the same in the form that templates take."""

from datetime import datetime
from decimal import Decimal

import pytest
import torch

from flexreason.chat.encode import Encoder
from flexreason.chat.errors import BadMessage
from flexreason.chat.messages import check
from templating import TRL_TEMPLATES, answer, encode_samples, result, trl_tokenizer, user

CALLING = [name for name in TRL_TEMPLATES if Encoder(trl_tokenizer(name)).template().argument_form != "none"]

EMPTY_BLOCK = "<think>\n\n</think>\n\n"


def with_call(function, **more):
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function, **more}]}


# ---- blocks of reasoning that are empty, as models write them whose thinking is off


@pytest.mark.parametrize("name", TRL_TEMPLATES)
def test_an_empty_block_before_the_content_is_no_reasoning(name):
    """In history it is left out too, or stands there as the template itself shows it."""
    tokenizer = trl_tokenizer(name)
    if Encoder(tokenizer).template().splits_inline:
        pytest.skip("the template takes inline blocks apart")
    plain, stored = (
        [user("harbour"), answer(before + "granite"), user("lantern"), answer(before + "meadow")]
        for before in ("", EMPTY_BLOCK)
    )
    of_stored, of_plain = encode_samples(stored, tokenizer), encode_samples(plain, tokenizer)
    assert [sample.target_ids for sample in of_stored] == [sample.target_ids for sample in of_plain]
    assert of_stored[0] == of_plain[0]
    if of_stored[1].prompt_ids != of_plain[1].prompt_ids:
        shown = tokenizer.apply_chat_template(stored[:3], add_generation_prompt=True, return_dict=False)
        assert of_stored[1].prompt_ids == shown
        assert "think>\n\n</think" not in tokenizer.decode(shown)


@pytest.mark.parametrize("field", ["", "\n"])
@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "deepseek_r1_distill", "gptoss"])
def test_an_empty_field_beside_an_empty_block_says_nothing(name, field):
    tokenizer = trl_tokenizer(name)
    chat = [user("harbour"), answer(EMPTY_BLOCK + "granite"), user("lantern"), answer(EMPTY_BLOCK + "meadow")]
    both = [{**m, "reasoning_content": field} if m["role"] == "assistant" else m for m in chat]
    assert encode_samples(both, tokenizer) == encode_samples(chat, tokenizer)


# ---- calls


@pytest.mark.parametrize("name", CALLING)
def test_a_call_without_its_wrapping_and_without_arguments_is_the_same_call(name):
    tokenizer = trl_tokenizer(name)
    ways = [
        [user("harbour"), with_call({"name": "lookup", "arguments": arguments}), result(1, "42"), answer("granite")]
        for arguments in ({}, "{}", "")
    ]
    ways.append([*ways[0]])
    ways[3][1] = {"role": "assistant", "content": "", "tool_calls": [{"name": "lookup", "arguments": {}}]}
    first, *others = [encode_samples(messages, tokenizer) for messages in ways]
    assert all(other == first for other in others)


@pytest.mark.parametrize("name", CALLING)
def test_arguments_as_text_are_the_same_arguments(name):
    tokenizer = trl_tokenizer(name)
    samples = [
        encode_samples([user("harbour"), with_call({"name": "lookup", "arguments": arguments})], tokenizer)
        for arguments in ({"key": "pebble"}, '{"key": "pebble"}')
    ]
    assert samples[0] == samples[1]


@pytest.mark.parametrize("value", [datetime(2026, 1, 1), torch.tensor(3), {3}, Decimal("0.1"), b"x"], ids=repr)
def test_a_value_that_json_does_not_have_is_refused_wherever_it_stands(value):
    """transformers would write its type's name into the prompt."""
    kind = type(value).__name__
    function = {"name": "lookup", "arguments": {"n": 1, "at": [{"day": value}]}}
    history = [user("harbour"), with_call(function), result(1, "42"), answer("granite")]
    with pytest.raises(BadMessage, match=rf"message 1: tool_calls\[0\]: it has a value of the type {kind},"):
        check(history)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"n": {"maximum": value}}}}}]
    with pytest.raises(BadMessage, match=rf"tools\[0\]: it has a value of the type {kind},"):
        encode_samples([user("harbour"), answer("granite")], trl_tokenizer("qwen3"), tools)
