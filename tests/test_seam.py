"""Where the model begins to write, where a prompt has what is gone once an answer follows; where it stops; and
templates that look into texts, or throw dice."""

import json
import re

import pytest

from flexreason.chat.dirt import StopInText
from flexreason.chat.encode import Encoder
from flexreason.chat.errors import ConversationError, NotAligned, NotRendered, StopsWithin, TemplateThrowsDice
from flexreason.chat.seam import Seam, find_seam
from templating import TOOLS, answer, byte_level, call, result, trl_tokenizer, user, with_template

TAGS = ("<u>", "</u>", "<a>", "</a>", "<s>", "</s>", "<h>", "</h>", "<r_end>", "<end>", "<last>", "<call>", "</call>")
ADDED = re.compile("|".join(map(re.escape, [*TAGS, "<think>", "</think>"])))
CHAT = [user("one"), answer("two", "why"), user("three"), answer("four", "how")]
LOOP = [user("one"), call(1, "k", "why"), result(1, "r"), call(2, "l"), result(2, "s"), answer("four", "how")]

ROLES = "{% for m in messages %}{% if m.role == 'assistant' %}"
ANSWERED = "<a><think>{{ m.reasoning_content or '' }}</think>{{ m.content }}</a>"


def template(user="<u>{{ m.content }}</u>", answered=ANSWERED, asked="<a>", end=""):
    closes = "{% endif %}{% endfor %}{% if add_generation_prompt %}"
    return f"{ROLES}{answered}{{% else %}}{user}{closes}{asked}{{% endif %}}{end}"


def own(source, eos="</a>", special=TAGS, plain=("<think>", "</think>")):
    return with_template(byte_level(), source, special=special, plain=plain, eos=eos)


def targets(source, messages=CHAT, tools=None, **about):
    return [turn.target for turn in Encoder(own(source, **about)).encoded(messages, tools).texts]


CALLS = (
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{{ c.function.arguments | tojson }}</call>{% endfor %}"
)

WHOLE = ["<think>why</think>two</a>", "<think>how</think>four</a>"]
IN_LAST = "{% if loop.last %}WHAT{% endif %}"


# --- the target never repeats what the prompt already holds


@pytest.mark.parametrize("suffix", [" /think", "/no_think", "\n\nBe brief.", " <u>", "</u>"])
def test_a_suffix_on_the_last_users_text(suffix):
    assert targets(template(user="<u>{{ m.content }}" + IN_LAST.replace("WHAT", suffix) + "</u>")) == WHOLE


@pytest.mark.parametrize("behind", ["<s>tools</s>", "\ntools: probe", "<u>Think first.</u>"])
def test_tools_or_a_reminder_behind_the_last_message(behind):
    assert targets(template(user="<u>{{ m.content }}</u>" + IN_LAST.replace("WHAT", behind))) == WHOLE


@pytest.mark.parametrize("asked", ["<s>Be kind.</s><a>", "<u>Answer as <a>.</u><a>", "<s>two\nlines</s>\n<a>"])
def test_a_turn_before_the_generation_prompt(asked):
    assert targets(template(asked=asked)) == WHOLE


@pytest.mark.parametrize(
    ("header", "asked"),
    [
        ("<h>assistant</h>\n", "<h>assistant effort=high</h>\n"),
        ("<h>assistant\n", "<h>assistant effort=high\n"),
        ("<h>assistant\n", "<s>Be kind.</s><h>assistant (high)\n"),
        ("### Assistant:\n", "### Assistant (high):\n"),
        ("Assistant: ", "Assistant [high]: "),
    ],
)
def test_a_generation_prompt_with_an_attribute(header, asked):
    assert targets(template(answered=ANSWERED.replace("<a>", header), asked=asked)) == WHOLE


def test_a_named_template_for_tools_as_command_r_has_it():
    said = "<s><h>{{ m.content }}</a>"
    with_tools = template("<s><u>{{ m.content }}</a>", said, "<s>Write 'Action:' and then your calls.</a><s><h>")
    tokenizer = own(with_tools)
    tokenizer.chat_template = {"default": template("<s><u>{{ m.content }}</a>", said, "<s><h>"), "tool_use": with_tools}
    chat = [user("one"), answer("two"), user("three"), answer("four")]
    for tools in (None, TOOLS):
        found = Encoder(tokenizer).encoded(chat, tools).texts
        assert [turn.target for turn in found] == ["two</a>", "four</a>"]
        assert ("Action" in found[0].prompt) == (tools is not None)


def test_the_users_message_ends_otherwise_while_it_is_last():
    closes = "<u>{{ m.content }}{% if loop.last %}<last>{% else %}</u>{% endif %}"
    assert targets(template(user=closes)) == WHOLE
    header = ANSWERED.replace("<a>", "<h>assistant</h>")
    assert targets(template(user=closes, answered=header, asked="<h>assistant</h>")) == WHOLE


@pytest.mark.parametrize("suffix", ["", " /think"])
@pytest.mark.parametrize(
    ("header", "asked"),
    [
        ("<h>assistant</h>\n", "<h>model</h>\n"),
        ("<h>assistant\n", "<h>model\n"),
        ("<h>assistant\n", "<h>assistant2\n"),
        ("<a>", "<s>"),
        ("### Assistant:\n", "### Model:\n"),
        ("### Assistant:\n", "I am an Assistant.\n### Model:\n"),
        ("<h>assistant name=bob\n", "<h>assistant\n"),
        ("<h>assistant final json</h>", "<h>assistant analysis json</h>"),
        ("<h> assistant : final </h>", "<h> assistant : analysis </h>"),
        ("<h>\nassistant\n</h>", "<h>\nthinker\n</h>"),
        ("<h>assistant</h>\n", "<h></h>\n"),
        ("<h>\nassistant\n<think>", "<h>\nthinker\n<think>"),
    ],
)
def test_another_role_in_the_prompt_is_refused(header, asked, suffix):
    source = template(
        user="<u>{{ m.content }}" + IN_LAST.replace("WHAT", suffix) + "</u>",
        answered=ANSWERED.replace("<a>", header),
        asked=asked,
    )
    with pytest.raises(NotAligned, match=r"message 1: .* neither goes on from the other"):
        targets(source)


RUNNING = (  # a loop is one turn: what follows a tool's result has no header, and the prompt has one
    "{% set ns = namespace(open=false) %}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if not ns.open %}<a>{% endif %}{% set ns.open = true %}"
    "{{ m.content }}" + CALLS + "{% if not m.tool_calls %}</a>{% set ns.open = false %}{% endif %}"
    "{% elif m.role == 'tool' %}[{{ m.content }}]{% else %}<u>{{ m.content }}</u>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def test_messages_of_a_running_turn_without_a_header():
    plain = [{key: value for key, value in m.items() if key != "reasoning_content"} for m in LOOP]
    found = targets(RUNNING, plain, TOOLS)
    assert found == ['<call>search{"key": "k"}</call>', '<call>search{"key": "l"}</call>', "four</a>"]
    thought = "<think>\n{}\n</think>\n\n"
    assert targets(RUNNING, LOOP, TOOLS)[0] == thought.format("why") + found[0]
    assert targets(RUNNING, LOOP, TOOLS)[2] == thought.format("how") + found[2]


def test_messages_of_a_running_turn_that_begin_otherwise_than_behind_a_user_are_refused():
    other = RUNNING.replace("{% if not ns.open %}<a>{% endif %}", "{% if not ns.open %}<a>{% else %}, {% endif %}")
    with pytest.raises(NotAligned, match="message 3"):
        targets(other, LOOP, TOOLS)


@pytest.mark.parametrize(
    ("known", "lead", "held"),
    [
        (" /think</u><a>", "</u><a>", "</u><a>"),
        (" /think</u><a>", "</u><a><think>", "</u><a>"),
        ("</u>\n<h>assistant e=1\n", "</u>\n<h>assistant\n<think>", "</u>\n<h>assistant\n"),
        ("<last><h>assistant</h>", "</u><h>assistant</h>", "</u><h>assistant</h>"),
        (" /x Assistant:", " Assistant: ", " Assistant:"),
        ("<last><h>model</h>", "</u><h>assistant</h>", None),
        (" assistant<last><s>", "</u><h>assistant", None),
        ("</u>\n<a>\nExample</u>\n<s>\n", "</u>\n<a>\n\n", None),
    ],
)
def test_the_seam_is_behind_what_the_prompt_holds(known, lead, held):
    assert find_seam(known, lead, None, "<think>", ADDED) == (None if held is None else Seam(len(held)))


# --- the target ends where generation stops


@pytest.mark.parametrize("between", ["", "\n", " ", "\n\n"])
@pytest.mark.parametrize("special", [True, False])
def test_the_target_ends_at_eos_whatever_stands_before_it(between, special):
    """Special or not, and with white space between it and the special token before it."""
    ends = ANSWERED.replace("</a>", f"<r_end>{between}<end>\n")
    flagged = {"special": TAGS} if special else {"special": [t for t in TAGS if t != "<r_end>"], "plain": ("<r_end>",)}
    assert targets(template(answered=ends), eos="<end>", **flagged)[0] == f"<think>why</think>two<r_end>{between}<end>"


@pytest.mark.parametrize("special", [True, False])
def test_the_target_ends_at_the_token_that_ends_a_users_message_too(special):
    """Where eos_token is one that the template never writes."""
    flagged = {"special": TAGS} if special else {"special": [t for t in TAGS if t != "<end>"], "plain": ("<end>",)}
    for ends in ("<end>", "<end>\n", "<r_end>\n<end>\n"):
        source = template("<u>{{ m.content }}<end>\n", ANSWERED.replace("</a>", ends))
        assert targets(source, eos="<|endoftext|>", **flagged)[0] == "<think>why</think>two" + ends.rstrip()


def test_a_tool_call_ends_at_its_first_eos():
    for ends in ("</a>", "\n</a>", "</a><a></a>"):
        source = template(answered=f"<a>{{{{ m.content }}}}{CALLS}{{{{ {ends!r} }}}}")
        assert targets(source, LOOP, TOOLS)[0].endswith("</call>" + ends[: ends.find("</a>") + 4])


def test_an_end_of_text_behind_the_whole_conversation_does_not_end_an_answer():
    source = template(end="{% if not add_generation_prompt %}<last>{% endif %}")
    assert targets(source, eos="<last>") == WHOLE


# --- templates that look into texts, and that throw dice

THOUGHT = "<think>{{ m.reasoning_content }}</think>"


@pytest.mark.parametrize(
    "said",
    [
        "{% if m.content|length > 5 %}" + THOUGHT + "{% endif %}{{ m.content }}",
        "{% if m.reasoning_content|length > 5 %}" + THOUGHT + "{% endif %}{{ m.content }}",
        THOUGHT + "{% if m.content|length > 5 %}{{ m.content }}{% endif %}",
        THOUGHT + "{{ m.content[:2] }}",
        THOUGHT + "{{ m.content.split('o')[0] }}",
        THOUGHT + "{% if m.content|length > 5 %}long: {% endif %}{{ m.content }}",
        THOUGHT + "{{ m.content }}{% if m.content|length > 5 %} (long){% endif %}",
    ],
)
def test_a_template_that_goes_by_the_length_of_texts_is_refused(said):
    with pytest.raises(NotRendered, match=r"message 1: .*looks into the texts"):
        targets(template(answered=f"<a>{said}</a>"))


@pytest.mark.parametrize("wrap", ["{{ m.content | trim }}", "{{ m.content.lstrip() }}", "{{ m.content | tojson }}"])
def test_a_template_that_changes_the_ends_of_texts_or_quotes_them_is_not(wrap):
    for text in ("two", " two ", "\n\ntwo\n", '"two"'):
        found = targets(template(answered=f"<a>{THOUGHT}{wrap}</a>"), [user("one"), answer(text, "why")])
        whole = own(template(answered=f"<a>{THOUGHT}{wrap}</a>")).apply_chat_template(
            [user("one"), answer(text, "why")], tokenize=False
        )
        assert found == [whole.removeprefix("<u>one</u><a>")]


def test_a_template_that_reads_words_is_taken_where_it_shows_what_it_does_with_these():
    marked = template(answered="<a>{% if 'two' in m.content %}" + THOUGHT + "{% endif %}{{ m.content }}</a>")
    assert targets(marked, CHAT[:2]) == WHOLE[:1]


@pytest.mark.parametrize(
    "dice",
    [
        "{{ ['x', 'y'] | random }}",
        "{% for x in [['x', 'y']] | map('random') %}{{ x }}{% endfor %}",
        "{% filter random %}xy{% endfilter %}",
        "{{ lipsum(n=1) }}",
        "{% set words = lipsum %}{{ words() }}",
        "{% if false %}{{ 'xy' | random }}{% endif %}",
    ],
)
def test_a_template_that_throws_dice_is_refused(dice):
    with pytest.raises(TemplateThrowsDice, match="draws at random"):
        targets(template(answered=ANSWERED + dice))


@pytest.mark.parametrize(
    "dice",
    [
        "{% set f = 'random' %}{{ [['x', 'y']] | map(f) | first }}",
        "{{ [['x', 'y']] | map('ran' ~ 'dom') | join }}",
        "{{ [[['x', 'y']]] | map('map', 'random') | map('first') | first }}",
        "{% macro pick(way) %}{{ [['x', 'y']] | map(way) | list }}{% endmacro %}{{ pick(['ran', 'dom'] | join) }}",
        "{% for f in ['first', 'random'] %}{{ [['x', 'y']] | map(f) | list }}{% endfor %}",
        "{% for f in ['upper', 'random'] %}{% if loop.last %}{{ ['xy'] | map(f) | list }}{% endif %}{% endfor %}",
        "{% set ns = namespace(way='random') %}{{ ['xy'] | map(ns.way) | list }}",
        "{{ ['xy'] | map(how | default('random')) | list }}",
    ],
)
def test_dice_by_another_name_are_refused(dice):
    for place in (
        template(answered=ANSWERED + dice),
        template(user="<u>{{ m.content }}</u>" + dice),
        dice + template(),
    ):
        with pytest.raises(TemplateThrowsDice, match=r"draws at random \(the filter random"):
            targets(place)


def test_dice_where_a_block_is_closed_are_refused():
    block = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}DICE</think>{% endif %}"
    source = template(answered=f"<a>{block}{{{{ m.content }}}}</a>", asked="<a><think>")
    messages = [user("one"), answer("two")]
    assert targets(source.replace("DICE", ""), messages) == ["</think>two</a>"]
    for dice in ("{{ ['xy'] | map('ran' ~ 'dom') | first }}", "{{ m.keys }}"):
        with pytest.raises(TemplateThrowsDice):
            targets(source.replace("DICE", dice), messages)


@pytest.mark.parametrize(
    "printed",
    [
        "{{ ['x'] | map('upper') }}",
        "{{ 'a:' ~ (['x'] | select) }}",
        "{{ m.content.strip }}",
        "{{ [m.keys] | string | upper }}",
        "{{ namespace(made=['x'] | map('upper')) }}",
        "{{ cycler('a', 'b') }}",
        "{{ joiner }}{{ joiner() }}",
        "{{ '%s' % raise_exception }}",
        "{{ [strftime_now] | join }}",
    ],
)
def test_an_object_that_is_written_by_its_place_in_memory_is_refused(printed):
    for place in (template(user="<u>{{ m.content }}</u>" + printed), template(answered=ANSWERED + printed)):
        with pytest.raises(TemplateThrowsDice, match=r"place in memory, .* (at 0x|AT 0X)"):
            targets(place)


@pytest.mark.parametrize(
    "innocent",
    [
        "{% set random = m.random %}",
        "{% set lipsum = '' %}{{ lipsum }}",
        "{{ m.lipsum }}",
        "{% set f = 'random' %}{{ ['xy'] | map('first') | list | length | replace('1', '') }}",
        "{% set way = 'random' if m.role == 'nobody' else 'upper' %}{% set x = ['a'] | map(way) | list %}",
        "{% if m.content is not string %}{{ m.content | map(attribute='text') }}{% endif %}",
        "{% if m.role == 'tool' %}{{ m.items() | map('random') | join }}{% endif %}",
    ],
)
def test_a_name_that_only_sounds_like_dice_is_not(innocent):
    assert targets(template(answered=innocent + ANSWERED)) == WHOLE


def test_a_namespace_is_written_by_what_it_holds():
    written = "<think>why</think>two<Namespace {'a': 1}></a>"
    assert targets(template(answered=ANSWERED.replace("</a>", "{{ namespace(a=1) }}</a>")), CHAT[:2]) == [written]


@pytest.mark.parametrize("text", ["<f at 0x7f12ab34>", "it was at 0xdeadbeef", "AT 0X7F", "<a object at 0x7f9> at 0x"])
def test_places_in_memory_that_somebody_has_said_are_texts(text):
    messages = [user(text), answer(text, text), user("three"), answer("four", "how")]
    assert targets(template(), messages)[0] == f"<think>{text}</think>{text}</a>"
    assert targets(template(asked=text + "<a>", answered=text + ANSWERED))[0] == WHOLE[0]
    tools = [{"type": "function", "function": {"name": "f", "description": text, "parameters": {}}}]
    assert targets("{{ tools | tojson }}" + template(), CHAT, tools) == WHOLE


def test_the_users_own_renderings_may_draw():
    tokenizer = own(template(user="<u>{{ m.content }}{{ [m.content] | map('ran' ~ 'dom') | first }}</u>"))
    with pytest.raises(TemplateThrowsDice):
        Encoder(tokenizer).encoded(CHAT)
    assert tokenizer.apply_chat_template(CHAT[:1], tokenize=False)[:7] in ("<u>oneo", "<u>onen", "<u>onee")


# --- what a hostile reader found


def test_a_token_that_ends_no_turn_stands_before_the_one_that_does_in_every_message():
    for header in ("<h>{}<s>", "<h>{}\n"):
        bot, human = header.format("assistant"), header.format("user")
        said = ANSWERED.replace("<a>", bot).replace("</a>", "<s><end>\n")
        source = template(f"{human}{{{{ m.content }}}}<s><end>\n", said, bot)
        assert targets(source, eos="<|endoftext|>")[0] == "<think>why</think>two<s><end>"


def test_words_about_calls_behind_the_users_text_do_not_say_where_a_call_stops():
    asks = "<u>{{ m.content }}{% if tools %} Write <call>..</call>{% endif %}<end>"
    source = template(asks, f"<a>{{{{ m.content }}}}{CALLS}<end>")
    found = targets(source, LOOP, TOOLS, eos="<|endoftext|>", special=[t for t in TAGS if "call" not in t])
    assert found[0].endswith('<call>search{"key": "k"}</call><end>')


def test_eos_stops_generation_where_more_stands_behind_it_at_the_end():
    ends = "{% if loop.last %}<end><last>{% else %}</a>{% endif %}"
    assert targets(template(answered=ANSWERED.replace("</a>", ends)), eos="<end>")[0] == "<think>why</think>two<end>"


@pytest.mark.parametrize(("asked", "header"), [("<s>", "<s>assistant<h>"), ("", "<s>assistant<h>")])
def test_reasoning_is_not_put_before_a_header_that_the_model_must_write(asked, header):
    with pytest.raises(NotAligned):
        targets(template(answered=header + "{{ m.content }}</a>", asked=asked))


@pytest.mark.parametrize("asked", ["<a><thought>\n", "<a>Sure, ", "<a>Thinking: "])
def test_what_the_prompt_has_behind_the_whole_header_is_not_passed_over(asked):
    with pytest.raises(NotAligned):
        targets(template(answered="<a>{{ m.content }}</a>", asked=asked))


@pytest.mark.parametrize("asked", ["<a><thought>\n", "<a>Sure, "])
def test_a_prefill_that_begins_the_content_or_a_block_is_not_written_twice(asked):
    with pytest.raises(NotAligned):
        targets(template(answered="<a>{{ m.content }}</a>", asked=asked), [user("one"), answer("Sure, two")])


@pytest.mark.parametrize("opening", ["◁think▷", "Thinking: "])
@pytest.mark.parametrize("suffix", ["", " /x"])
def test_a_block_that_the_prompt_opens_with_no_tag(opening, suffix):
    block = "{% if m.reasoning_content and loop.last %}" + opening + "{{ m.reasoning_content }};{% endif %}"
    asks = "<u>{{ m.content }}" + IN_LAST.replace("WHAT", suffix) + "</u>"
    source = template(asks, f"<a>{block}{{{{ m.content }}}}</a>", "<a>" + opening)
    assert targets(source, [*CHAT, user("five"), answer("six")]) == ["why;two</a>", "how;four</a>", ";six</a>"]


def test_an_empty_block_that_the_prompt_has_begun_is_closed_once():
    empty = "<a><think>\n\n</think>\n\n{{ m.content }}</a>"
    source = template(answered=empty, asked="<s>Be kind.</s><a><think>\n")
    assert targets(source, [user("one"), answer("two")]) == ["\n</think>\n\ntwo</a>"]


def test_a_reminder_that_names_the_markers_opens_and_closes_nothing():
    reminder = IN_LAST.replace("WHAT", " Write <think></think>.")
    assert targets(template("<u>{{ m.content }}" + reminder + "</u>")) == WHOLE


@pytest.mark.parametrize("blank", ["", " "])
def test_reasoning_stands_where_it_is_not_blank(blank):
    messages = [user("one"), {**answer("two"), "reasoning_content": blank, "reasoning": "why"}]
    assert targets(template(), messages) == WHOLE[:1]
    messages = [user("one"), {**answer("<think>why</think>two"), "reasoning_content": blank}]
    assert targets(template(asked="<a><think>"), messages) == ["why</think>two</a>"]


def test_a_template_that_must_have_a_system_message():
    needs = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    muses = "<a>{% if m.thinking %}<muse>{{ m.thinking }}</muse>{% endif %}{{ m.content }}<r_end>\n<end>\n"
    source = needs + template("<u>{{ m.content }}<end>\n", muses)
    found = targets(source, [{"role": "system", "content": "s"}, *CHAT], eos="<|endoftext|>")
    assert found[0] == "<muse>why</muse>two<r_end>\n<end>"


# --- nothing of a call is lost, and nothing stands behind what stops generation

NAMED = "<a>{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}(WHAT)</call>{% endfor %}</a>"
ITEMS = "{% for k, v in c.function.arguments | items %}WHAT{% endfor %}"


def calling(*functions, text="", form=dict):
    """A question, and an answer that calls these functions."""
    named = [{"name": name, "arguments": given if form is dict else json.dumps(given)} for name, given in functions]
    return [user("one"), answer(text) | {"tool_calls": [{"type": "function", "function": each} for each in named]}]


def with_arguments(how, messages):
    how = how if "arguments" in how else ITEMS.replace("WHAT", how)
    return targets(template(answered=NAMED.replace("WHAT", how)), messages, TOOLS)


@pytest.mark.parametrize(
    ("how", "arguments"),
    [
        ("{% if v is string %}{{ k }}={{ v }},{% endif %}", {"k": "x", "n": 3}),
        ("{% if v is string %}{{ k }}={{ v }},{% endif %}", {"k": "x", "n": [1, {"m": 2}]}),
        ("{% if v %}{{ k }}={{ v }},{% endif %}", {"k": "x", "n": 0}),
        ("{% if v %}{{ k }}={{ v }},{% endif %}", {"k": "x", "n": False}),
        ("{% if v %}{{ k }}={{ v }},{% endif %}", {"k": "x", "n": ""}),
        ("{% if v is not none %}{{ k }}={{ v }},{% endif %}", {"k": "x", "n": None}),
        ("{{ k }}={{ v if v is string else v | round(1) }},", {"n": 3.14159}),
        ("{{ k }}={{ v if v is string else v | int }},", {"n": 2.5}),
        ("{{ k }}={{ v if v is string else v[:2] }},", {"n": [1, 2, 3]}),
        ("{{ k }}={{ v if v is string else v | abs }},", {"n": -3}),
        ('"{{ k }}": "{{ v }}",', {"k": "x", "n": 3}),
        ("{{ k }}='{{ v }}'", {"k": "x", "n": True}),
        ("{{ (c.function.arguments | tojson)[:40] }}", {"k": "x" * 60}),
        ("{{ c.function.arguments['k'] }}", {"k": "x", "other": "y"}),
        ("{{ c.function.arguments['k'] }}", {"k": "x", "other": "x"}),
    ],
)
def test_a_template_that_loses_something_of_an_argument_is_refused(how, arguments):
    with pytest.raises(NotRendered, match=r"message 1: .* tool call's argument"):
        with_arguments(how, calling(("f", arguments)))


def test_an_argument_is_not_found_in_what_is_said_beside_the_call():
    some = "{% if v is string %}{{ k }}={{ v }},{% endif %}"
    for said in ({"reasoning_content": "I take 3 results"}, {"content": "3 results of f"}):
        messages = calling(("f", {"k": "x", "n": 3}))
        messages[1] |= said
        with pytest.raises(NotRendered, match=r"message 1: .* tool call's argument n=3"):
            with_arguments(some, messages)


def test_an_argument_is_not_found_in_a_tag():
    for value in ("a", "Paris", 3):
        with pytest.raises(NotRendered, match=r"message 1: .* tool call's arguments"):
            with_arguments("{% if k == 'k' %}{{ v }}{% endif %}", calling(("f", {"k": "Paris", "unit": value})))
    taught = [*calling(("f", {"k": "Paris"})), *calling(("f", {"k": "Paris", "unit": "a"}))]
    with pytest.raises(NotRendered, match=r"message 3: .* tool call's argument"):
        with_arguments("{% if k == 'k' %}{{ v }}{% endif %}", taught)


HALF_ESCAPED = r"""{{ k }}='{{ v | string | replace('\\', '\\\\') | replace("'", "\\'") | replace('\n', '\\n') }}';"""
"""As LFM2's template: tabs, and whatever else there is, as they are."""


@pytest.mark.parametrize(
    "arguments",
    [
        {"place": {"city": "Rome", "zip": None}},
        {"filter": {"name": ""}},
        {"schema": {"properties": {}}},
        {"row": [None, None], "v": ["", ""]},
        {"code": "if x:\n\treturn 'a\\n'"},
        {"list": ["a\u00a0b", "\U0001f469\u200d\U0001f4bb"]},
    ],
)
@pytest.mark.parametrize(
    "how",
    [
        "{{ c.function.arguments | tojson }}",
        "{{ k }}={{ v | string }};",
        HALF_ESCAPED,
    ],
)
def test_arguments_within_arguments_and_half_escaped_are_not_lost(how, arguments):
    assert with_arguments(how, calling(("f", arguments)))


def test_an_argument_is_not_lost_by_what_other_messages_taught_either():
    messages = [*calling(("f", {"k": "x"})), *calling(("f", {"k": 3}))]
    with pytest.raises(NotRendered, match=r"message 3: .* tool call's argument k=3"):
        with_arguments("{% if v is string %}{{ k }}={{ v }}{% endif %}", messages)


@pytest.mark.parametrize(
    ("how", "n", "written"),
    [
        ("{{ k }}={{ v | int }}", 3, "n=3"),
        ("{{ k }}={{ v | float }}", 3, "n=3.0"),
        ("{{ k }}={{ '%.2f' | format(v) }}", 3, "n=3.00"),
        ("{{ k }}={{ '%.3e' | format(v) }}", 0.25, "n=2.500e-01"),
        ("{{ c.function.arguments.n | int }}", 3, "3"),
        ("{{ k }}={{ v + 0 }}", -7, "n=-7"),
        ("{{ k }}={{ [v] | sum }}", 10**20, "n=100000000000000000000"),
    ],
)
def test_numbers_that_a_template_computes_with_come_out(how, n, written):
    """No mark does, since it is no number."""
    assert with_arguments(how, calling(("f", {"n": n}))) == [f"<call>f({written})</call></a>"]
    beside = calling(("f", {"n": n}), text="3 of f")
    assert with_arguments(how, beside) == [f"3 of f<call>f({written})</call></a>"]


@pytest.mark.parametrize("how", ["{{ k }}={{ v | int }}", "{{ k }}={{ v | round(1) }}", "{{ k }}={{ v * 2 }}"])
def test_a_number_that_a_template_computes_to_another_one_is_refused(how):
    with pytest.raises(NotRendered, match=r"tool call's argument n=2.25 of this message, or writes it otherwise; say"):
        with_arguments(how, calling(("f", {"n": 2.25})))


BY_ID = NAMED.replace("{{ c.function.name }}(WHAT)", "{{ c.id }}{{ c.function.arguments | tojson }}")


def test_a_call_whose_name_stands_in_its_id_is_trained():
    """Kimi's form: functions.NAME:0."""
    messages = calling(("search", {"key": "granite"}), ("look", {"key": "quartz"}), text="search granite")
    for at, name in enumerate(("search", "look")):
        messages[1]["tool_calls"][at]["id"] = f"functions.{name}:{at}"
    made = '<call>functions.search:0{"key": "granite"}</call><call>functions.look:1{"key": "quartz"}</call></a>'
    thought = {**messages[1], "reasoning_content": "search granite, look quartz"}
    shown = "<a>{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    by_id = template(answered=BY_ID.replace("<a>", shown))
    assert targets(by_id, messages, TOOLS) == ["search granite" + made]
    assert targets(by_id, [messages[0], thought], TOOLS) == [
        "<think>search granite, look quartz</think>search granite" + made
    ]
    messages[1]["tool_calls"][1]["id"] = "call_1"
    with pytest.raises(NotRendered, match="does not render the tool call 'look'"):
        targets(by_id, messages, TOOLS)


@pytest.mark.parametrize("said", ["f x", "f", "x f x", ""])
def test_a_call_that_is_lost_is_not_found_in_what_is_said_beside_it(said):
    shown = "<a>{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    messages = calling(("f", {"k": "x"}), text=said)
    for thought in ({}, {"reasoning_content": "I call f with x"}):
        for suffix in ("", IN_LAST.replace("WHAT", " /think")):
            source = template("<u>{{ m.content }}" + suffix + "</u>", shown + "{{ m.content }}</a>")
            with pytest.raises(NotRendered, match=r"tool call|renders nothing"):
                targets(source, [messages[0], messages[1] | thought], TOOLS)


@pytest.mark.parametrize("form", [dict, str])
@pytest.mark.parametrize(
    "how",
    [
        "{{ c.function.arguments | tojson }}",
        "{{ k }}={{ v | tojson(ensure_ascii=true) }};",
        "<p={{ k }}>\n{{ v if v is string else v | tojson }}\n</p>",
        "{{ k }} {{ v }}; ",
    ],
)
def test_arguments_of_every_type_come_out_as_the_template_writes_them(how, form):
    arguments = {"k": 'it\'s \\ "é"\n', "n": 3, "x": 1e22, "b": [True, None, {"inner": -0.5}], "e": "", "o": {}}
    messages = calling(("f", arguments), ("f", {}), ("g", {"k": "é", "n": 3}), text="é n", form=form)
    assert with_arguments(how, messages)[0].startswith("é n<call>f(")


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (CALLS + "{% if m.content|length > 5 %}{{ m.content }}{% endif %}", "abc"),
        (CALLS + "{{ m.content[:20] }}", "abc " * 20),
        ("{{ m.content | replace('e', '') }}" + CALLS.replace("m.tool_calls", "(m.tool_calls or [])[:1]"), "the"),
        ("{{ m.content }}" + CALLS.replace("tojson", "tojson | truncate(3)"), "abc"),
    ],
)
def test_what_stands_behind_the_first_call_is_looked_at_too(said, text):
    with pytest.raises(NotRendered, match="message 1: "):
        targets(template(answered=f"<a>{said}</a>"), calling(("f", {"k": "word"}), ("g", {"k": "long"}), text=text))


def test_a_call_whose_name_the_template_knows():
    encoder = Encoder(trl_tokenizer("llama3_1"), builtin_tools=["search"])
    turn = encoder.encoded(calling(("search", {"key": "x"})), TOOLS).texts[0]
    assert turn.target == '<|python_tag|>search.call(key="x")<|eom_id|>'
    with pytest.raises(NotRendered, match="renders nothing of this message"):
        encoder.encoded(calling(("search", {})), TOOLS)


TURN_EACH = CALLS.replace("<call>", "<a><call>").replace("</call>", "</call></a>")


@pytest.mark.parametrize(
    ("answered", "messages"),
    [
        (TURN_EACH, calling(("f", {"k": "1"}), ("g", {"k": "2"}))),
        ("<a>{{ m.content }}</a>" + TURN_EACH, calling(("f", {"k": "1"}), text="let me")),
        ("<a>{{ m.reasoning_content }}</a><a>{{ m.content }}</a>", CHAT),
    ],
)
def test_what_would_stand_behind_the_stop_token_is_refused(answered, messages):
    with pytest.raises(StopsWithin, match=r"message 1: '</a>' stops generation"):
        targets(template(answered=answered), messages, TOOLS)


TWO_MESSAGES = "{% if m.tool_calls %}{% if m.content %}{{ m.content }}</a><a>{% endif %}WHAT<end>{% else %}"


@pytest.mark.parametrize("eos", ["</a>", "<end>", "<|endoftext|>"])
@pytest.mark.parametrize("named", ["<call>{{ m.tool_calls[0].function }}", CALLS])
def test_the_stop_token_of_an_answer_stops_a_call_too(eos, named):
    """Content beside a call is a message of its own, and a call ends with another token."""
    said = "<a>" + TWO_MESSAGES.replace("WHAT", named) + "{{ m.content }}</a>{% endif %}"
    for chat in (LOOP, calling(("f", {"k": "1"}))):
        assert all(target.endswith("<end>") for target in targets(template(answered=said), chat, TOOLS, eos=eos)[:1])
    with pytest.raises(StopsWithin, match=r"message 1: '</a>' stops generation"):
        targets(template(answered=said), calling(("f", {"k": "1"}), text="let me see"), TOOLS, eos=eos)


@pytest.mark.parametrize("eos", ["</a>", "<|endoftext|>"])
def test_reasoning_in_a_message_of_its_own_is_refused_whatever_eos_is(eos):
    """As what ends it ends a user's message too, it stops generation."""
    said = "{% if m.reasoning_content %}<a>thought\n{{ m.reasoning_content }}</a>{% endif %}<a>{{ m.content }}</a>"
    with pytest.raises(StopsWithin, match=r"message 1: '</a>' stops generation"):
        targets(template("<u>{{ m.content }}</a>", said), CHAT, eos=eos)
    goes_on = said.replace("</a>{% endif %}", "<h>{% endif %}")  # <h> ends reasoning alone
    whole = ["thought\nwhy<h><a>two</a>", "thought\nhow<h><a>four</a>"]
    assert targets(template("<u>{{ m.content }}</a>", goes_on), CHAT, eos=eos) == whole


# --- examples and reminders in the prompt, and where they end


@pytest.mark.parametrize(
    ("asked", "held"),
    [
        ("<a><think>r</think>x</a><u>and</u><a>", ""),
        ("<a><think></think>x</a><u>and</u><a><think>", "<think>"),
        ("<a>x</a><u>and</u><a>", ""),
    ],
)
def test_an_example_of_an_answer_in_the_prompt_is_none(asked, held):
    assert targets(template(asked=asked)) == [target.removeprefix(held) for target in WHOLE]


def test_an_example_of_a_call_in_the_prompt_is_none():
    said = f"<a>{{{{ m.content }}}}{CALLS}</a>"
    found = targets(template(answered=said, asked="<a><call>f{}</call></a><u>and</u><a>"), calling(("f", {"k": "1"})))
    assert found == ['<call>f{"k": "1"}</call></a>']
    words = "Bot: {{ m.content }}" + CALLS.replace("<call>", "CALL ").replace("</call>", "") + "</a>\n"
    source = template("User: {{ m.content }}\n", words, "Bot: CALL name{}\nUser: r\nBot: ")
    assert targets(source, calling(("f", {"k": "1"}))) == ['CALL f{"k": "1"}</a>']


@pytest.mark.parametrize("asked", ["<a><u>Example: <a>x</a></u>", "<s>Write <a></s>"])
@pytest.mark.parametrize("suffix", ["", " /x"])
def test_the_header_is_not_written_again_behind_a_reminder(asked, suffix):
    with pytest.raises(NotAligned):
        targets(template("<u>{{ m.content }}" + IN_LAST.replace("WHAT", suffix) + "</u>", asked=asked))


@pytest.mark.parametrize("behind", ["(be kind)\n", "be kind: "])
def test_a_reminder_behind_a_header_of_words_is_not_guessed_to_be_one(behind):
    source = template("User: {{ m.content }}\n", "Assistant: {{ m.content }}</a>\n", "Assistant: " + behind)
    with pytest.raises(NotAligned):
        targets(source, [user("one"), answer("two")])


def test_a_role_that_ends_as_another_does_is_another():
    source = template("user: {{ m.content }} ", "robot: {{ m.content }}</a>", "bot:")
    with pytest.raises(NotAligned):
        targets(source, [user("one"), answer("two")])


@pytest.mark.parametrize("closes", ["</u>", "<last>"])
@pytest.mark.parametrize("asked", ["<h>", "<h><s><h>"])
def test_a_header_that_ends_as_the_opening_marker_does(closes, asked):
    block = "<h>{% if m.reasoning_content %}<s><h>{{ m.reasoning_content }}</s>{% endif %}{{ m.content }}</a>"
    users = "<u>{{ m.content }}{% if loop.last %}" + closes + "{% else %}</u>{% endif %}"
    opened = asked.removeprefix("<h>")
    found = targets(template(users, block, asked))
    assert found == [f"<s><h>{said}</a>".removeprefix(opened) for said in ("why</s>two", "how</s>four")]


@pytest.mark.parametrize("suffix", ["", " /x"])
def test_a_header_that_ends_as_the_opening_marker_does_behind_a_closed_block(suffix):
    block = "<h>{% if m.reasoning_content and loop.last %}<s><h>{{ m.reasoning_content }}</s><h>{% endif %}"
    users = "<u>{{ m.content }}" + IN_LAST.replace("WHAT", suffix) + "</u>"
    source = template(users, block + "{{ m.content }}</a>", "<h><s><h></s><h>")
    assert targets(source, [*CHAT, user("five"), answer("six")]) == ["two</a>", "four</a>", "six</a>"]


def test_a_closed_block_of_an_unknown_kind_is_no_attribute():
    said = "Bot: {{ m.content }}" + CALLS.replace("<call>", "\n<call>") + "</a>\n"
    users = "{{ m.content }}" + IN_LAST.replace("WHAT", "<last>") + "\n"
    source = template(users, said, "Bot: <thought></thought>\n")
    with pytest.raises(NotAligned):
        targets(source, calling(("f", {"k": "1"})))


NO_PROMPT = ROLES + "{{ m.content }}</a>\n{% else %}{{ m.content }}\n{% endif %}{% endfor %}"


@pytest.mark.parametrize("text", ["what is <think>", "what is </think>", "<think>", "</think> "])
def test_a_marker_at_the_end_of_a_users_text_opens_and_closes_nothing(text):
    spliced = ["<think>\nwhy\n</think>\n\ntwo</a>"]
    assert targets(NO_PROMPT, [user(text), answer("two", "why")]) == spliced
    with pytest.raises(ConversationError, match=r"never closes it|before it"):
        targets(NO_PROMPT, [user(text), answer("why</think>two")])
    opens = NO_PROMPT.replace("{{ m.content }}</a>", "<a>{{ m.content }}</a>")
    opens += "{% if add_generation_prompt %}<a><think>\n{% endif %}"
    assert targets(opens, [user(text), answer("two", "why")]) == ["why\n</think>\n\ntwo</a>"]


def test_markers_that_only_calls_show_are_the_templates():
    muses = "<a>{% if m.tool_calls %}<muse>{{ m.thinking }}</muse>{% endif %}{{ m.content }}" + CALLS + "</a>"
    assert targets(template(answered=muses), CHAT[:2], TOOLS) == ["<muse>why</muse>two</a>"]


# --- ends that only some renderings have


@pytest.mark.parametrize("calls", ["", CALLS])
@pytest.mark.parametrize(
    ("ends", "eos", "target"),
    [
        ("<r_end>{% if not loop.last %}</a>{% endif %}", "</a>", "<r_end></a>"),
        ("{% if not loop.last %}<r_end></a>{% endif %}", "</a>", "<r_end></a>"),
        ("<r_end>{% if loop.last %}</a>{% endif %}", "</a>", "<r_end></a>"),
        ("{% if not loop.last %}<end>{% endif %}", "<|endoftext|>", "<end>"),
    ],
)
def test_an_end_that_only_history_or_only_the_last_answer_has(calls, ends, eos, target):
    source = template("<u>{{ m.content }}<end>", "<a>{{ m.content }}" + calls + ends)
    messages = [user("one"), answer("two"), *(calling(("f", {"k": "1"})) if calls else [])]
    found = targets(source, messages, eos=eos, special=[tag for tag in TAGS if tag != "<end>"], plain=("<end>",))
    assert found == ["two" + target, '<call>f{"k": "1"}</call>' + target][: len(found)]
    assert len(found) == 1 + bool(calls)


@pytest.mark.parametrize("ends", ["</a>\n", "<r_end>{% if not loop.last %}</a>{% endif %}", "\n"])
def test_texts_and_arguments_that_end_as_their_marks_do_end_as_others_do(ends):
    """And whatever was learned from them holds for others. Marks end in letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    said = [answer(f"{letter}{letter}") for letter in letters] + [answer("two"), answer("classic")]
    said += [calling(("f", {"k": value}))[1] for value in ("linux", "lib", 3, "one", None, [], "her")]
    said += [calling(("f", {}))[1], answer("music", "because"), answer("two", "logic")]
    source = template("<u>{{ m.content }}</u>", f"<a>{{{{ m.content }}}}{CALLS}{ends}")
    end = "<r_end></a>" if "r_end" in ends else ends.strip()
    for messages in ([*said], [*reversed(said)]):
        chat = [one for message in messages for one in (user("one"), message)]
        for turn, message in zip(Encoder(own(source)).encoded(chat).texts, messages, strict=True):
            calls = [one["function"] for one in message.get("tool_calls", ())]
            shown = "".join(f"<call>{one['name']}{json.dumps(one['arguments'])}</call>" for one in calls)
            thought = f"<think>\n{message['reasoning_content']}\n</think>\n\n" if "reasoning_content" in message else ""
            comes_next = "" if end or calls else "<u>"
            assert turn.target == f"{thought}{message['content']}{shown}{end}{comes_next}"


def test_what_is_written_around_a_text_stops_no_call():
    """Though it is a special token, as in Gemma 4."""
    quoted = "{% for k, v in c.function.arguments.items() %}{{ k }}:{% if v is string %}<q>{{ v }}<q>{% else %}{{ v }}"
    calls = "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}(" + quoted
    calls += "{% endif %}{% endfor %})</call><last>{% endfor %}{% if not m.tool_calls %}</a>\n{% endif %}"
    source = template("<u>{{ m.content }}</u>", "<a>{{ m.content }}" + calls)
    messages = [*calling(("f", {"k": "x"})), *calling(("f", {"k": 3}))]
    found = targets(source, messages, special=[*TAGS, "<q>"])
    assert found == ["<call>f(k:<q>x<q>)</call><last>", "<call>f(k:3)</call><last>"]


def test_markers_that_a_call_alone_shows_behind_which_content_stands():
    """As Gemma 4's first templates have them: the content behind the call, reasoning with calls only."""
    said = "{% if m.reasoning_content and m.tool_calls %}<h>thought\n{{ m.reasoning_content }}\n</h>{% endif %}"
    source = template(answered=f"<a>{said}{CALLS}{{{{ m.content }}}}</a>")
    found = targets(source, [*CHAT[:2], *calling(("f", {"k": "x"})), answer("so", "because")])
    assert found[0] == "<h>thought\nwhy\n</h>two</a>"
    assert found[-1] == "<h>thought\nbecause\n</h>so</a>"


@pytest.mark.parametrize(("header", "opens"), [("### {}:\n", ""), ("[{}: ", "<think>")])
def test_a_header_in_words_shows_where_the_users_message_ends(header, opens):
    users = header.format("user") + "{{ m.content }}" + IN_LAST.replace("WHAT", " /x<end><s><end>\n<h>tools</h>\n")
    said = ANSWERED.replace("<a>", header.format("assistant")).replace("</a>", "<s><end>\n")
    source = template(users + "{% if not loop.last %}<end>\n{% endif %}", said, header.format("assistant") + opens)
    found = targets(source, eos="<|endoftext|>")
    assert found == [target.removeprefix(opens).replace("</a>", "<s><end>") for target in WHOLE]


@pytest.mark.parametrize(
    ("said", "written"),
    [
        (answer("two</a>"), "two</a></a>"),
        (answer("two</a>three"), "two</a>three</a>"),
        (answer("two", "why</a>"), "why</a></think>two</a>"),
        (calling(("f", {"k": "x</a>"}))[1], '<call>f{"k": "x</a>"}</call></a>'),
    ],
)
def test_a_text_that_holds_the_stop_token_is_dirt(said, written):
    tokenizer = own(template(answered=ANSWERED.replace("</a>", CALLS + "</a>")))
    with pytest.raises(StopInText, match=r"message 1: it has '</a>' in its text, which stops generation"):
        Encoder(tokenizer).encoded([user("one"), said])
    found = Encoder(tokenizer, accept="stop-in-text").encoded([user("one"), said])
    assert found.texts[0].target.endswith(written)
    assert found.dirty == {1: "stop-in-text"}
    Encoder(tokenizer).encoded([user("one"), said | {"train": False}, user("two"), answer("three")])
