"""Reasoning that the template does not render: where it goes, and where nobody knows."""

from functools import lru_cache

import pytest

from flexreason.chat.encode import Encoder
from flexreason.chat.errors import NotAligned
from templating import TOOLS, answer, byte_level, call, user, with_template

WITH, WITHOUT = [user("harbour"), answer("granite", "quartz")], [user("harbour"), answer("granite")]
TAGS = ("<|im_start|>", "<|im_end|>", "<|START_RESPONSE|>", "<|channel|>", "<|message|>")


def chatml(asked="<|im_start|>assistant\n", said="{{ m.content }}", suffix="", header="<|im_start|>assistant\n"):
    return (
        "{% for m in messages %}{% if m.role == 'assistant' %}" + header + said + "{% else %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}{% if loop.last %}" + suffix + "{% endif %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}" + asked + "{% endif %}"
    )


@lru_cache(maxsize=1)
def encoder_of(source, **options):
    tokenizer = with_template(byte_level(), source, special=TAGS, plain=("<think>", "</think>"), eos="<|im_end|>")
    return Encoder(tokenizer, **options)


def target(source, messages, tools=None, **options):
    """The last turn's target, behind the prompt of apply_chat_template."""
    encoder = encoder_of(source, **options)
    turn, tokenizer = encoder.encoded(messages, tools).texts[-1], encoder.tokenizer
    rendered = tokenizer.apply_chat_template(messages[:-1], tools=tools, add_generation_prompt=True, tokenize=False)
    assert turn.prompt == rendered
    return turn.target.removesuffix("<|im_end|>")


suffixes = pytest.mark.parametrize("suffix", ["", " /think"])


@suffixes
@pytest.mark.parametrize(
    ("asked", "header"),
    [
        ("<|im_start|>assistant", "<|im_start|>assistant\n"),
        ("<|im_start|>assistant<think>\n", "<|im_start|>assistant\n"),
        ("### Response:", "### Response:\n"),
        ("<|im_start|>assistant", "<|im_start|>assistant\n\n<|START_RESPONSE|>"),
    ],
)
def test_a_headers_line_break_that_the_prompt_lacks_is_not_put_behind_reasoning(asked, header, suffix):
    source = chatml(asked, suffix=suffix, header=header)
    messages = [WITH, WITHOUT] if "think" in asked else [WITH]
    for chat in messages:
        with pytest.raises(NotAligned, match=r"message 1: .*whether the reasoning stands before that or behind it"):
            target(source, chat)
    if "think" not in asked:
        assert target(source, WITHOUT).endswith("granite")


@suffixes
@pytest.mark.parametrize("space", [("\n", ""), ("", "\n")])
def test_who_says_where_the_line_break_stands_is_believed(space, suffix):
    source, think = chatml("<|im_start|>assistant", suffix=suffix), (space[0] + "<t>", "</t>" + space[1])
    assert target(source, WITH, think=think) == f"{space[0]}<t>quartz</t>{space[1]}granite"
    with pytest.raises(NotAligned, match=r"say so with think=\(before, behind\)"):
        target(source, WITH, think=("<t>", "</t>"))


@suffixes
def test_who_says_where_a_space_stands_is_believed(suffix):
    """Where nobody says it, it is the answer's own, as it is in history."""
    source = chatml("Assistant:", suffix=suffix, header="Assistant: ")
    for before, behind in ((" <t>", "</t>"), ("<t>", "</t> ")):
        assert target(source, WITH, think=(before, behind)) == f"{before}quartz{behind}granite"
    assert target(source, WITH, think=("<t>", "</t>")) == "<t>quartz</t> granite"


@suffixes
@pytest.mark.parametrize("begun", ["Okay, ", "<budget>512</budget>\n"])
def test_a_block_that_the_prompt_has_begun_is_not_opened_again(begun, suffix):
    thought = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    asked = "<|im_start|>assistant\n<think>\n" + begun
    for said in ("{{ m.content }}", thought):
        for chat in (WITH, WITHOUT):
            with pytest.raises(NotAligned, match="message 1"):
                target(chatml(asked, said, suffix), chat)
    found = target(chatml(asked, suffix=suffix), WITH, think=("<think>\n" + begun, "\n</think>\n\n"))
    assert found == "quartz\n</think>\n\ngranite"


@suffixes
@pytest.mark.parametrize("behind", ["\n<answer>\n", "\n\nAnswer: ", "\n\n<|START_RESPONSE|>"])
def test_thinking_is_off_whatever_the_prompt_has_behind_the_closed_block(behind, suffix):
    closed = "<think>\n\n</think>" + behind
    source = chatml("<|im_start|>assistant\n" + closed, closed + "{{ m.content }}", suffix)
    assert [target(source, chat) for chat in (WITH, WITHOUT)] == ["granite", "granite"]


THOUGHT = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
CLOSED = "<|im_start|>assistant\n<think>\n\n</think>\n\n"


@suffixes
@pytest.mark.parametrize("begins", ["<answer>\n", "Answer: ", "<|START_RESPONSE|>", "**Answer**\n\n"])
def test_what_every_answer_begins_with_closes_no_block(begins, suffix):
    said = THOUGHT + begins + "{{ m.content }}"
    off = chatml(CLOSED, said, suffix)
    assert [target(off, chat) for chat in (WITH, WITHOUT)] == [f"{begins}granite"] * 2
    on = chatml(said=said, suffix=suffix)
    thought = f"<think>\nquartz\n</think>\n\n{begins}granite"
    assert [target(on, chat) for chat in (WITH, WITHOUT)] == [thought, f"{begins}granite"]
    opens = chatml(CLOSED.partition("\n\n</think>")[0] + "\n", said, suffix)
    assert target(opens, WITH) == thought.removeprefix("<think>\n")
    assert target(opens, WITHOUT) == f"\n</think>\n\n{begins}granite"


@suffixes
@pytest.mark.parametrize("asked", ["", "<think>\n"])
def test_what_every_answer_begins_with_is_written_once_before_calls(asked, suffix):
    """The template shows reasoning with answers, and not with calls."""
    said = THOUGHT.replace(" %}<think>", " and not m.tool_calls %}<think>")
    said += "{% if m.content %}<answer>\n{{ m.content }}\n</answer>{% endif %}"
    said += "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
    source = chatml("<|im_start|>assistant\n" + asked, said, suffix)
    called = '<call>{"name": "search", "arguments": {"key": "pebble"}}</call>'
    thought = "<think>\nquartz\n</think>\n\n".removeprefix(asked)
    alone, beside = call(1, "pebble", "quartz"), {**call(1, "pebble", "quartz"), "content": "meadow"}
    assert target(source, [user("harbour"), alone], TOOLS) == thought + called
    assert target(source, [user("harbour"), beside], TOOLS) == f"{thought}<answer>\nmeadow\n</answer>{called}"


@suffixes
@pytest.mark.parametrize("asked", ["", "<think>\n"])
def test_an_empty_block_before_each_answer_is_filled(asked, suffix):
    source = chatml("<|im_start|>assistant\n" + asked, "<think>\n\n</think>\n\n{{ m.content }}", suffix)
    assert target(source, WITH) == "<think>\nquartz\n</think>\n\ngranite".removeprefix(asked)
    assert target(source, WITHOUT) == "<think>\n\n</think>\n\ngranite".removeprefix(asked)


@suffixes
def test_reasoning_is_not_put_before_words_of_the_header(suffix):
    header = "<|im_start|>assistant<|channel|>final<|message|>"
    source = chatml("<|im_start|>assistant", suffix=suffix, header=header)
    with pytest.raises(NotAligned, match="neither goes on from the other"):
        target(source, WITH)
    assert target(source, WITHOUT) == "<|channel|>final<|message|>granite"


@suffixes
def test_markers_that_are_none_close_nothing(suffix):
    """Reasoning and answer are parted by a blank line only."""
    said = "{% if m.reasoning_content and not m.tool_calls %}{{ m.reasoning_content }}\n\n{% endif %}{{ m.content }}"
    said += "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
    found = target(chatml(said=said, suffix=suffix), [user("harbour"), call(1, "pebble", "quartz")], TOOLS)
    assert found == 'quartz\n\n<call>{"name": "search", "arguments": {"key": "pebble"}}</call>'


CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
MADE = '<call>{"name": "search", "arguments": {"key": "pebble"}}</call>'


@suffixes
@pytest.mark.parametrize("closes", ["", "</think>", "<think></think>", "<think>\n\n</think>\n\n"])
@pytest.mark.parametrize("off", ["</think>", "</think>\n", "<think></think>", "<think>\n\n</think>\n\n"])
def test_a_closed_block_is_closed_once_whatever_the_prompt_and_the_message_close_it_with(off, closes, suffix):
    thought = THOUGHT.replace(" %}<think>", " and not m.tool_calls %}<think>").removesuffix("{% endif %}")
    said = thought + "{% elif loop.last %}" + closes + "{% endif %}{{ m.content }}" + CALLS
    source = chatml("<|im_start|>assistant\n" + off, said, suffix)
    beside = {**call(1, "pebble", "quartz"), "content": "meadow"}
    for message, said in (
        (answer("granite"), "granite"),
        (answer("granite", "quartz"), "granite"),
        (call(1, "pebble"), MADE),
        (call(1, "pebble", "quartz"), MADE),
        (beside, "meadow" + MADE),
    ):
        found = target(source, [user("harbour"), message], TOOLS)
        assert found.lstrip("\n") == said  # of both blocks' line breaks, those that both have stand in the prompt


@suffixes
def test_what_a_prompt_has_begun_behind_the_closed_block_is_written_by_the_message_too(suffix):
    asked = "<|im_start|>assistant\n<think>\n\n</think>\n<answer>\n"
    source = chatml(asked, "{% if loop.last %}<answer>\n{% endif %}{{ m.content }}", suffix)
    assert [target(source, chat) for chat in (WITH, WITHOUT)] == ["granite", "granite"]
    for chat in (WITH, WITHOUT):
        with pytest.raises(NotAligned, match="neither goes on from the other"):
            target(chatml(asked, "{{ m.content }}", suffix), chat)


@suffixes
@pytest.mark.parametrize("opens", [False, True])
def test_what_closes_a_block_before_each_answer_is_not_written_again_behind_reasoning(opens, suffix):
    asked = "<|im_start|>assistant\n" + ("<think>\n" if opens else "")
    source = chatml(asked, "</think>{{ m.content }}" + CALLS, suffix)
    thought = "quartz\n</think>" if opens else "<think>\nquartz\n</think>"
    assert target(source, WITH) == thought + "granite"
    assert target(source, [user("harbour"), call(1, "pebble", "quartz")], TOOLS) == thought + MADE


RESPONSE = "{% if m.reasoning_content and not m.tool_calls %}<think>{{ m.reasoning_content }}</think><response>"
RESPONSE += "{{ m.content }}</response>{% else %}{{ m.content }}{% endif %}" + CALLS


@suffixes
@pytest.mark.parametrize("off", ["<think></think>", "<think>\n\n</think>\n", "</think>"])
def test_a_block_is_closed_by_its_tag_whatever_stands_behind_that_of_reasoning(off, suffix):
    """Granite's form: what stands around an answer behind reasoning does not stand around others."""
    source = chatml("<|im_start|>assistant\n" + off, RESPONSE, suffix)
    assert [target(source, chat) for chat in (WITH, WITHOUT)] == ["granite", "granite"]
    called = [[user("harbour"), call(1, "pebble", reasoning)] for reasoning in (None, "quartz")]
    assert [target(source, chat, TOOLS) for chat in called] == [MADE, MADE]


@suffixes
def test_what_stands_around_an_answer_behind_reasoning_is_not_begun_before_others(suffix):
    thought = "<think>quartz</think><response>granite</response>"
    called = [[user("harbour"), call(1, "pebble", reasoning)] for reasoning in (None, "quartz")]
    plain = chatml(said=RESPONSE, suffix=suffix)
    assert [target(plain, chat) for chat in (WITH, WITHOUT)] == [thought, "granite"]
    assert target(plain, called[0], TOOLS) == MADE
    opens = chatml("<|im_start|>assistant\n<think>", RESPONSE, suffix)
    assert target(opens, WITH) == thought.removeprefix("<think>")
    assert target(opens, WITHOUT) == "</think><response>granite</response>"
    breaks = chatml("<|im_start|>assistant\n<think>\n", RESPONSE, suffix)
    for source, chat in ((plain, called[1]), (opens, called[1]), (opens, called[0]), (breaks, WITHOUT)):
        with pytest.raises(NotAligned, match="begins an answer too: what stands before this one is unknown"):
            target(source, chat, TOOLS)


# --- what a mark shows, and what it does not


ASKS = "<|im_start|>assistant\n"

CALLED = call(1, "v")
CALLED["tool_calls"][0]["function"]["arguments"] = {"n": 3, "key": "v"}
CALLING = [user("harbour"), CALLED]


def test_a_mark_in_an_empty_content_that_makes_another_header_shows_no_seam():
    shown = "{% for c in m.tool_calls or [] %}{% if c.function.name == 'search' %}<call>{{ c.function.name }} "
    shown += (
        "n={{ '%d' | format(c.function.arguments.n) }} k={{ c.function.arguments.key }}</call>{% endif %}{% endfor %}"
    )
    header = "{% if m.tool_calls and not m.content %}to=tool\n{% else %}final\n{% endif %}"
    with pytest.raises(NotAligned, match="neither goes on from the other"):
        target(chatml(ASKS + "final\n", header + "{{ m.content }}" + shown), CALLING, TOOLS)
    same = chatml(ASKS + "final\n", "final\n{{ m.content }}" + shown)
    assert target(same, CALLING, TOOLS) == "<call>search n=3 k=v</call>"


@pytest.mark.parametrize("suffix", ["", " /no_think"])
@pytest.mark.parametrize("again", ["", "<|start|>assistant\n"])
def test_a_prompt_that_is_in_the_channel_of_answers_has_opened_no_reasoning(suffix, again):
    template = "{% for m in messages %}{% if m.role == 'assistant' %}<|start|>assistant\n{% if m.reasoning_content %}"
    template += "<|channel|>analysis<|message|>{{ m.reasoning_content }}<|end|>" + again + "{% endif %}<|channel|>final"
    template += (
        "<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}{% else %}<|start|>{{ m.role }}\n"
    )
    template += "<|message|>{{ m.content }}{% if loop.last %}" + suffix + "{% endif %}<|end|>{% endif %}{% endfor %}"
    template += "{% if add_generation_prompt %}<|start|>assistant\n<|channel|>final<|message|>{% endif %}"
    special = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"]
    tokenizer = with_template(byte_level(), template, special=special, eos="<|return|>")
    [turn] = Encoder(tokenizer).encoded(WITHOUT).texts
    assert turn.target == "granite<|return|>"


@pytest.mark.parametrize("reasoning", ["think", "quartz", "</think", "im_end"])
def test_the_response_begins_behind_the_reasoning_whatever_that_says(reasoning):
    shown = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    tokenizer = with_template(byte_level(), chatml(said=shown), special=TAGS, eos="<|im_end|>")
    [turn] = Encoder(tokenizer).encoded([user("harbour"), answer("granite", reasoning)]).texts
    assert turn.target[turn.response :] == "granite<|im_end|>"
