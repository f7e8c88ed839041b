"""Where the model begins to write, where a prompt has what is gone once an answer follows; where it stops; and
templates that look into texts, or throw dice."""

import re

import pytest

from flexreason.chat.encode import Encoder
from flexreason.chat.render import NotAligned, NotRendered, TemplateThrowsDice
from flexreason.chat.seam import Seam, find_seam
from templating import TOOLS, answer, byte_level, call, result, user, with_template

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
        "{{ dict }}",
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
