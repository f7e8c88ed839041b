"""What real templates do, and each line of the table of behaviours, with the shortcut that goes wrong there."""

import re
from datetime import datetime
from functools import lru_cache

import pytest

from flexreason.chat.encode import Encoder
from flexreason.chat.errors import ConversationError, NotAligned, NotRendered, TemplateRaised
from flexreason.chat.render import frozen_clock
from flexreason.tree.sample import Role
from templating import (
    SHAPES,
    TOOLS,
    TRL_TEMPLATES,
    answer,
    byte_level,
    call,
    in_both_fields,
    in_parts,
    reference,
    result,
    samples_of,
    shape,
    trl_tokenizer,
    user,
    with_template,
)

encoder = lru_cache(lambda name: Encoder(trl_tokenizer(name)))


@pytest.mark.parametrize("which", SHAPES)
def test_samples_of_every_trl_template_are_the_reference(which):
    """Prompts as apply_chat_template makes them, targets by the rule; refused only where the call does not show."""
    n_turns, refused, unknown = 0, [], []
    for name in TRL_TEMPLATES:
        tokenizer, messages = trl_tokenizer(name), shape(name, which)
        tools = TOOLS if "tool" in which else None
        try:
            found = encoder(name).encoded(messages, tools)
        except NotRendered as error:
            number = error.message
            text = tokenizer.apply_chat_template(messages[: number + 1], tools=tools, tokenize=False)
            assert messages[number]["tool_calls"][0]["function"]["arguments"]["key"] not in text, name
            refused.append(name)
            continue
        except NotAligned as error:
            unknown.append((name, messages[error.message]["tool_calls"][0]["id"]))
            continue
        for number, turn, sample in zip(found.messages, found.texts, found.samples, strict=True):
            expected = reference(tokenizer, name, messages, number, tools)
            assert (turn.prompt, turn.target) == expected, (name, number)
            ids = tokenizer.apply_chat_template(
                in_both_fields(messages[:number]), tools=tools, add_generation_prompt=True, return_dict=False
            )
            assert list(sample.prompt_ids) == ids, (name, number)
            assert tokenizer.decode([*ids, *sample.target_ids]) == turn.prompt + turn.target, (name, number)
            n_turns += 1
    # a later call is written without the header that its prompt ends with, or without the end of the results
    assert {name for name, _ in unknown} <= {"deepseekv3", "deepseekv3_training"}
    assert all(call_id != "call00001" for _, call_id in unknown)
    if "tool" in which:
        assert n_turns >= 40 * sum(m["role"] == "assistant" for m in SHAPES[which])
    else:
        assert not refused
        assert n_turns == len(TRL_TEMPLATES) * sum(m["role"] == "assistant" for m in SHAPES[which])


# --- templates of our own, one for each line of the table

HEAD = "{% for m in messages %}{% if m.role != 'assistant' %}<u>{{ m.content }}</u>{% else %}"
TAIL = "{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
LAST = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
)
THINK = "<think>{{ m.reasoning_content or '' }}</think>"
DROPS = LAST + HEAD + "<a>{% if loop.index0 > ns.last %}" + THINK + "{% endif %}{{ m.content }}</a>" + TAIL

TAGS = ("<u>", "</u>", "<a>", "</a>", "<end>", "<ret>", "<o>")

THREE = [user("one"), answer("two", "why"), user("three"), answer("four", "how")]
LOOP = [
    user("one"),
    {**answer("", "why"), "tool_calls": call(1, "k")["tool_calls"]},
    result(1, "r"),
    answer("four", "how"),
]


def own(template, eos="</a>", tags=TAGS):
    return with_template(byte_level(), template, special=tags, plain=("<think>", "</think>"), eos=eos)


def targets(template, messages, tools=None, eos="</a>", tags=TAGS, **options):
    return [turn.target for turn in Encoder(own(template, eos, tags), **options).encoded(messages, tools).texts]


def prompts(template, messages, eos="</a>", **options):
    return [turn.prompt for turn in Encoder(own(template, eos), **options).encoded(messages).texts]


def difference(template, messages, eos="</a>"):
    """The shortcut: the rendering with the last message less that without it, by length."""
    tokenizer = own(template, eos)
    before = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    return tokenizer.apply_chat_template(messages, tokenize=False)[len(before) :]


def test_reasoning_dropped_from_history():
    assert prompts(DROPS, THREE)[1] == "<u>one</u><a>two</a><u>three</u><a>"
    assert targets(DROPS, THREE) == ["<think>why</think>two</a>", "<think>how</think>four</a>"]
    # the shortcut: one rendering of the whole conversation, every answer a target
    assert "why" not in own(DROPS).apply_chat_template(THREE, tokenize=False)


def test_everything_kept():
    kept = HEAD + "<a>" + THINK + "{{ m.content }}</a>" + TAIL
    layout = Encoder(own(kept)).layout(THREE)
    whole = own(kept).apply_chat_template(THREE, return_dict=False)
    assert layout.input_ids.tolist() == whole  # one chain; the shortcut of a branch a turn costs as much again
    assert layout.sample_tokens > len(whole)


def test_an_empty_block_in_history():
    block = (
        LAST
        + HEAD
        + "<a>{% if loop.index0 > ns.last %}"
        + THINK
        + "{% else %}<think></think>{% endif %}{{ m.content }}</a>"
        + TAIL
    )
    assert prompts(block, THREE)[1] == "<u>one</u><a><think></think>two</a><u>three</u><a>"
    # the shortcut: history is the target without its reasoning
    assert "<a>two</a>" not in prompts(block, THREE)[1]


OPENS = DROPS.replace("<a>{% endif %}", "<a><think>{% endif %}")


def test_the_prompt_opens_the_block():
    assert targets(OPENS, THREE) == ["why</think>two</a>", "how</think>four</a>"]
    assert "<think>" + targets(OPENS, THREE)[0] != targets(OPENS, THREE)[0]  # the shortcut opens it twice


NEVER = HEAD + "<a>{{ m.content }}</a>" + TAIL


def test_reasoning_never_read():
    assert targets(NEVER, THREE) == ["<think>\nwhy\n</think>\n\ntwo</a>", "<think>\nhow\n</think>\n\nfour</a>"]
    assert prompts(NEVER, THREE)[1] == "<u>one</u><a>two</a><u>three</u><a>"
    assert difference(NEVER, THREE) == "four</a>"  # the shortcut: a prefix check passes, without the reasoning


def test_inline_reasoning_is_in_the_target_only_where_the_template_would_show_it_in_history():
    inline = [user("one"), answer("<think>\nwhy\n</think>\n\ntwo"), user("three"), answer("four")]
    assert targets(NEVER, inline) == ["<think>\nwhy\n</think>\n\ntwo</a>", "four</a>"]
    assert "why" not in prompts(NEVER, inline)[1]
    assert "why" in own(NEVER).apply_chat_template(inline[:3], tokenize=False)  # the shortcut


def inline(message):
    """The message with its reasoning in its content."""
    block = f"<think>\n{message.get('reasoning_content')}\n</think>\n\n" if "reasoning_content" in message else ""
    return {key: value for key, value in message.items() if key != "reasoning_content"} | {
        "content": block + message["content"]
    }


@pytest.mark.parametrize("name", [name for name in TRL_TEMPLATES if name.startswith(("idefics3", "llava", "smolvlm"))])
def test_inline_reasoning_is_taken_out_of_history_where_contents_are_parts_too(name):
    """A text where parts are wanted comes out as nothing, and two of these are alike."""
    chat, tokenizer = SHAPES["reasoning chat"], trl_tokenizer(name)
    bare = in_parts([{key: text for key, text in m.items() if key != "reasoning_content"} for m in chat])
    given = list(map(inline, chat))
    given[1]["train"] = False
    for messages in (given, in_parts(given)):
        for number, turn in zip((3, 5), encoder(name).encoded(messages).texts, strict=True):
            before, behind = bare[:number], bare[: number + 1]
            prompt = tokenizer.apply_chat_template(before, add_generation_prompt=True, tokenize=False)
            whole = tokenizer.apply_chat_template(behind, tokenize=False)
            assert turn.prompt == prompt
            thought = f"<think>\n{chat[number]['reasoning_content']}\n</think>\n\n"
            assert turn.target == thought + whole.removeprefix(prompt).rstrip()


@pytest.mark.parametrize("which", ["reasoning chat", "mixed"])
def test_prompts_behind_inline_reasoning_are_the_templates_where_it_takes_that_out_itself(which):
    """To the letter: with the line breaks that it leaves."""
    left, messages = set(), [inline(message) for message in SHAPES[which]]
    for name in TRL_TEMPLATES:
        tokenizer = trl_tokenizer(name)
        if encoder(name).template().content_form("assistant") == "parts":
            continue
        for turn, number in enumerate(n for n, message in enumerate(messages) if message["role"] == "assistant"):
            rendered = tokenizer.apply_chat_template(messages[:number], add_generation_prompt=True, tokenize=False)
            if not any(m.get("reasoning_content", "no reasoning") in rendered for m in SHAPES[which][:number]):
                found = encoder(name).encoded(messages[: number + 1], turns=[turn])
                assert found.texts[0].prompt == rendered, (name, number)
                left |= {name} if "\n\ngranite" in rendered else set()
    assert {"deepseek_r1_distill", "deepseekv3", "nemotron_3_nano", "nemotron_3_ultra"} <= left


def test_roles_of_answers_behind_inline_reasoning_that_the_template_takes_out():
    messages = [inline(message) for message in SHAPES["reasoning chat"]]
    tokenizer, found = trl_tokenizer("deepseek_r1_distill"), encoder("deepseek_r1_distill").encoded(messages)
    sample = found.samples[-1]
    seen = [i for i, role in zip(sample.prompt_ids, sample.prompt_roles, strict=True) if role == Role.CONTEXT]
    assert tokenizer.decode(seen).split() == ["granite", "meadow"]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_under_another_name_than_the_template_reads(name):
    reads = DROPS_LATER.replace("m.reasoning_content", "m.reasoning")
    named = [{name if key == "reasoning_content" else key: value for key, value in m.items()} for m in LOOP]
    assert targets(reads, named) == ["<think>why</think>[search{'key': 'k'}]</a>", "<think>how</think>four</a>"]
    assert "<think>why</think>" in prompts(reads, named)[1]


def test_an_empty_block_that_every_answer_has_is_filled():
    block = NEVER.replace("<a>{{ m.content }}", "<a><think></think>{{ m.content }}")
    assert targets(block, THREE) == ["<think>\nwhy\n</think>two</a>", "<think>\nhow\n</think>four</a>"]
    assert prompts(block, THREE)[1] == "<u>one</u><a><think></think>two</a><u>three</u><a>"


def test_own_reasoning_dropped_even_from_the_last_message():
    distill = NEVER.replace("<a>{% endif %}", "<a><think>\n{% endif %}")
    assert targets(distill, THREE) == ["why\n</think>\n\ntwo</a>", "how\n</think>\n\nfour</a>"]
    assert "how" not in difference(distill, THREE)  # the shortcut


DROPS_LATER = (
    "{% set last = messages[-1].role == 'assistant' and not messages[-1].tool_calls %}"
    + HEAD
    + "<a>{% if m.reasoning_content and (loop.last or not last) %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    + "{{ m.content }}{% for c in m.tool_calls or [] %}[{{ c.function.name }}{{ c.function.arguments }}]{% endfor %}"
    + "</a>"
    + TAIL
)


def test_tool_loop_reasoning_dropped_once_an_answer_follows():
    assert prompts(DROPS_LATER, LOOP)[1] == "<u>one</u><a><think>why</think>[search{'key': 'k'}]</a><u>r</u><a>"
    assert targets(DROPS_LATER, LOOP)[1] == "<think>how</think>four</a>"
    assert not difference(DROPS_LATER, LOOP).startswith("<think>how")  # the shortcut


def test_content_that_repeats_the_reasoning():
    same = [user("one"), answer("12", "12"), user("12"), answer("12", "12")]
    assert targets(DROPS, same) == ["<think>12</think>12</a>"] * 2
    assert targets(NEVER, same) == ["<think>\n12\n</think>\n\n12</a>"] * 2
    assert "12" in difference(NEVER, same)  # the shortcut: the reasoning seems to be there


def test_nothing_stops_the_last_message():
    ends = DROPS.replace("</a>", "")
    assert targets(ends, THREE, eos="<ret>")[0] == "<think>why</think>two<u>"  # the next role's token stops it
    assert not difference(ends, THREE).endswith("<u>")  # the shortcut never learns to stop
    without = "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}{% endif %}"
    assert targets(without, [user("one"), answer("two")], eos="<ret>") == ["two<ret>"]


def test_a_token_that_begins_texts_does_not_stop_one():
    """Each question begins with bos; nothing stops an answer but eos."""
    begins = "{% for m in messages %}{% if m.role == 'user' %}<s>[{{ m.content }}]{% else %}{{ m.content }}{% endif %}"
    tokenizer = with_template(byte_level(), begins + "{% endfor %}", special=["<s>", "<ret>"], eos="<ret>")
    assert [turn.target for turn in Encoder(tokenizer).encoded([*THREE[:3], answer("four")]).texts][1] == "four<ret>"


def test_headers_that_begin_alike_are_not_the_same():
    """The prompt ends with a token that no message has: nobody knows what the model should write behind it."""
    begins = NEVER.replace("<a>{{ m.content }}", "<|an|>{{ m.content }}").replace(
        "<a>{% endif %}", "<|ans|>{% endif %}"
    )
    with pytest.raises(NotAligned, match="neither goes on from the other"):
        targets(begins, [user("one"), answer("two")], tags=(*TAGS, "<|an|>", "<|ans|>"))


def test_text_after_the_stop_token():
    behind = DROPS.replace("</a>", "</a>\n")
    assert targets(behind, THREE)[0] == "<think>why</think>two</a>"
    assert difference(behind, THREE).endswith("</a>\n")  # the shortcut
    assert "</a>\n<u>" in prompts(behind, THREE)[1]


def test_the_last_message_closes_differently():
    closes = DROPS.replace("</a>", "{% if loop.last and not add_generation_prompt %}<ret>{% else %}<end>{% endif %}")
    assert targets(closes, THREE, eos="<ret>")[0] == "<think>why</think>two<ret>"
    assert "two<end><u>" in prompts(closes, THREE, eos="<ret>")[1]
    layout = Encoder(own(closes, "<ret>")).layout([user("one"), answer("two"), user("three"), answer("four")])
    ends = own(closes, "<ret>").convert_tokens_to_ids(["<ret>", "<end>"])
    assert [layout.input_ids.tolist().count(token) for token in ends] == [2, 1]  # both copies stand in the tree


def test_a_turn_without_reasoning_where_the_prompt_opens_the_block():
    plain = OPENS.replace(THINK, "{% if m.reasoning_content %}" + THINK + "{% else %}</think>{% endif %}")
    assert targets(plain, [user("one"), answer("two")]) == ["</think>two</a>"]
    assert difference(plain, [user("one"), answer("two")]) != "</think>two</a>"  # the shortcut


def test_an_empty_block_only_where_the_message_is_last():
    assert targets(DROPS, [user("one"), answer("two"), user("three"), answer("four")])[0] == "<think></think>two</a>"
    assert "<a>two</a>" in prompts(DROPS, [user("one"), answer("two"), user("three"), answer("four")])[1]


def test_the_date_is_frozen_once_a_conversation(monkeypatch):
    import flexreason.chat.render as render

    class Clock(datetime):
        n = 0

        @classmethod
        def now(cls, tz=None):
            cls.n += 1
            return datetime(2026, 1, 1 + cls.n)

    dated = "{{ strftime_now('%d %b') }}" + DROPS
    monkeypatch.setattr(render, "datetime", Clock)
    found = prompts(dated, THREE)
    assert len({prompt[:6] for prompt in found}) == 1
    assert prompts(dated, THREE)[0] != found[0]  # the shortcut: the clock goes on between samples


def test_the_clock_can_be_set():
    with frozen_clock(datetime(2001, 2, 3)):
        assert prompts("{{ strftime_now('%Y-%m-%d') }}" + DROPS, THREE)[0].startswith("2001-02-03<u>")


def test_tools_move_to_the_last_user_message():
    moves = LAST + HEAD.replace(
        "<u>", "{% if tools and loop.index0 == ns.last %}[{{ tools[0].function.name }}]{% endif %}<u>"
    )
    moves += "<a>" + THINK + "{{ m.content }}</a>" + TAIL
    encoder = Encoder(own(moves))
    found = encoder.encoded(THREE, TOOLS)
    assert [turn.prompt[:8] for turn in found.texts] == ["[search]", "<u>one</"]
    assert "[search]<u>three" in found.texts[1].prompt
    assert [turn.target for turn in found.texts] == ["<think>why</think>two</a>", "<think>how</think>four</a>"]


def test_a_hint_at_the_last_user_message():
    hint = (
        LAST
        + HEAD.replace("</u>", "{% if loop.index0 == ns.last %} /think{% endif %}</u>")
        + "<a>"
        + THINK
        + "{{ m.content }}</a>"
        + TAIL
    )
    assert prompts(hint, THREE)[0] == "<u>one /think</u><a>"
    assert prompts(hint, THREE)[1].startswith("<u>one</u>")


PARTS = "{% for p in m.content %}{{ p.text }}{% endfor %}"
TAKES_PARTS = "{% if m.role == 'ROLE' and m.content is not string %}" + PARTS + "{% else %}{{ m.content }}{% endif %}"


@pytest.mark.parametrize("role", ["user", "assistant", "tool", "system", "nobody"])
@pytest.mark.parametrize(
    "stored", ["{{ m.content }}", "{{ m.content | tojson }}", "{{ m.content | map('string') | join }}"]
)
def test_parts_are_joined_where_the_template_does_not_take_them_from_this_role(role, stored):
    """Others stay as they are: what the template makes of them is no affair of ours."""
    text_else = "{% elif m.content is string %}{{ m.content }}{% else %}" + stored + "{% endif %}"
    takes = TAKES_PARTS.replace("ROLE", role).replace("{% else %}{{ m.content }}{% endif %}", text_else)
    calls = "{% for c in m.tool_calls or [] %}[{{ c.function.name }}{{ c.function.arguments }}]{% endfor %}"
    template = HEAD.replace("{{ m.content }}", takes) + f"<a>{takes}{calls}</a>" + TAIL
    words = [{"role": "system", "content": "willow"}, *LOOP, user("saddle"), answer("zephyr")]
    words = [{key: value for key, value in message.items() if key != "reasoning_content"} for message in words]
    cut, joined = [], []
    for m in words:
        parts = [{"type": "text", "text": text} for text in (m["content"][:2], m["content"][2:])]
        cut.append({**m, "content": parts} if m["content"] else m)
        joined.append(
            cut[-1] if m["role"] == role else {**m, "content": m["content"] and "\n".join(p["text"] for p in parts)}
        )
    found = Encoder(own(template)).encoded(cut)
    for number, turn in zip(found.messages, found.texts, strict=True):
        render = own(template).apply_chat_template
        assert turn.prompt == render(joined[:number], add_generation_prompt=True, tokenize=False)
        assert turn.prompt + turn.target == render(joined[: number + 1], tokenize=False)


@pytest.mark.parametrize("behind", ["", "\n", " ", ", "])
def test_parts_that_come_out_otherwise_than_texts_do_are_left_to_the_template(behind):
    parts = "{% if m.content is string %}{{ m.content }}{% else %}" + PARTS.replace("}}", "}}" + behind) + "{% endif %}"
    template = HEAD.replace("{{ m.content }}", parts) + "<a>" + parts + "</a>" + TAIL
    messages = [{**m, "content": [{"type": "text", "text": text} for text in (m["content"], "x")]} for m in THREE]
    messages = [{"role": m["role"], "content": m["content"]} for m in messages]
    ids = own(template).apply_chat_template(messages[:3], add_generation_prompt=True, return_dict=False)
    encoder = Encoder(own(template))
    assert list(encoder.encoded(messages).samples[1].prompt_ids) == ids
    assert encoder.encoded(messages).texts[1].target == f"four{behind}x{behind}</a>"


@pytest.mark.parametrize("given", [dict, str])
@pytest.mark.parametrize("wanted", ["object", "string"])
def test_tool_arguments_in_the_form_that_the_template_takes(given, wanted):
    show = "{{ c.function.arguments | tojson }}" if wanted == "object" else "{{ '' + c.function.arguments }}"
    template = (
        HEAD
        + "<a>{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}["
        + show
        + "]{% endfor %}</a>"
        + TAIL
    )
    messages = [user("one"), call(1, "k", form=given), result(1, "r"), answer("four")]
    assert targets(template, messages)[0] == 'search[{"key": "k"}]</a>'
    assert 'search[{"key": "k"}]</a><u>r</u>' in prompts(template, messages)[1]


def test_letters_in_tool_arguments_stay_letters():
    template = (
        HEAD + "<a>{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments }}{% endfor %}</a>" + TAIL
    )
    assert targets(template, [user("one"), call(1, "é漢")])[0] == 'search{"key": "é漢"}</a>'


def test_content_and_reasoning_on_a_call_that_raise():
    template = DROPS_LATER.replace(
        "<a>{% if",
        "{% if m.content and m.reasoning_content and m.tool_calls %}{{ raise_exception('not both') }}{% endif %}"
        "<a>{% if",
    )
    both = [user("one"), {**LOOP[1], "content": "said"}, *LOOP[2:]]
    with pytest.raises(TemplateRaised, match=r"message 1: .*not both") as error:
        targets(template, both)
    assert error.value.message == 1


def test_a_generation_prompt_that_nobody_asked_for():
    always = DROPS.replace("{% if add_generation_prompt %}<a>{% endif %}", "<a>")
    tokenizer = own(always)
    assert tokenizer.apply_chat_template([user("one")], tokenize=False).endswith("<a>")
    assert targets(always, THREE) == ["<think>why</think>two</a>", "<think>how</think>four</a>"]
    assert difference(always, THREE).endswith("</a><a>")  # the shortcut
    assert targets(always.replace("</a>", ""), THREE, eos="<ret>") == [
        "<think>why</think>two<u>",
        "<think>how</think>four<u>",
    ]


@pytest.mark.parametrize(
    "begun", ["Sure: ", "Thought: ", "\u3010\u601d\u8003\u3011\n", "*thinking*\n", "<thought>\n", "{think}"]
)
def test_what_the_prompt_begins_behind_the_header_is_refused_whatever_it_looks_like(begun):
    """It may begin each answer, or open a block of reasoning; who knows that it does can say so."""
    begins = NEVER.replace("<a>{% endif %}", f"<a>{begun}{{% endif %}}")
    plain = [user("one"), answer("two")]
    for messages in (plain, THREE[:2]):
        with pytest.raises(
            NotAligned, match=r"message 1: .* if it opens a block, say so with think=\(before, behind\)"
        ):
            targets(begins, messages)
    think = (begun, ";")
    assert targets(begins, plain, think=think) == [";two</a>"]
    assert targets(begins, THREE[:2], think=think) == ["why;two</a>"]
    assert difference(begins, plain) != "two</a>"  # the shortcut


def test_alternation_demanded():
    strict = (
        "{% if messages|length > 1 and messages[-1].role == messages[-2].role %}"
        "{{ raise_exception('must alternate') }}{% endif %}" + DROPS
    )
    with pytest.raises(TemplateRaised, match=r"message 1: the chat template raises \(user\): must alternate"):
        targets(strict, [user("one"), user("two"), answer("three")])


def test_a_prompt_that_closes_the_block_has_no_reasoning_in_its_targets(caplog):
    closed = DROPS.replace("<a>{% endif %}", "<a><think></think>{% endif %}")
    with caplog.at_level("WARNING", logger="flexreason"):
        assert targets(closed, THREE) == ["two</a>", "four</a>"]
    assert "thinking is off" in caplog.text


def test_an_empty_block_in_prompt_and_message_is_closed_once():
    """Whatever white space each has in it and behind it."""
    prompt = "<a>{% endif %}"
    for ends in ("<think></think>", "<think>\n\n</think>\n\n", "<think>\n</think>\n"):
        for begins in ("<think></think>", "<think>\n</think>\n", "<think>\n\n</think>\n\n"):
            closed = NEVER.replace(prompt, f"<a>{ends}{{% endif %}}").replace("<a>{{ m", f"<a>{begins}{{{{ m")
            for messages in (THREE, [user("one"), answer("two"), user("three"), answer("four")]):
                found = [target.lstrip("\n") for target in targets(closed, messages)]
                assert found == ["two</a>", "four</a>"], (ends, begins)


def test_a_content_that_is_rendered_twice_is_refused():
    twice = HEAD + "<a>{{ m.content }}|{{ m.content }}</a>" + TAIL
    with pytest.raises(ConversationError, match="more than once"):
        targets(twice, [user("one"), answer("two")])


def test_targets_end_with_a_token_that_stops_generation():
    for name in TRL_TEMPLATES:
        tokenizer = trl_tokenizer(name)
        for sample in samples_of(encoder(name), shape(name, "chat")):
            assert re.fullmatch(r"<.*>", tokenizer.decode(sample.target_ids[-1:])), name
