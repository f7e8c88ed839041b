"""Dirty answers are refused where they are trained on, each kind under its reason, and trained as written on demand."""

import json
import pickle

import pytest

import flexreason as fr
from flexreason.chat.dirt import REASONS
from flexreason.chat.encode import Encoder
from flexreason.chat.errors import ConversationError, NotRendered
from flexreason.cli import main
from flexreason.data.formats import BadInput
from flexreason.train.settings import from_mapping
from models import tiny
from templating import (
    TOOLS,
    TRL_TEMPLATES,
    answer,
    byte_level,
    call,
    encode_samples,
    samples_of,
    trl_tokenizer,
    user,
    with_template,
)

QWEN, LLAMA, R1, NEMOTRON = map(trl_tokenizer, ("qwen3", "llama3", "deepseek_r1_distill", "nemotron_3_nano"))

CHAT = [user("harbour"), answer("granite", "quartz"), user("lantern")]

UNCLOSED, UNOPENED, MARKED, DOUBLED, EMPTY, STOPPED = REASONS


def with_call(content):
    return {**call(1, "pebble"), "content": content}


DIRTY = {
    "cut off": (UNCLOSED, answer("<think>\nLet me see, if")),
    "cut off behind white space": (UNCLOSED, answer(" \n<think>Let me see")),
    "nothing but the tag": (UNCLOSED, answer("<think>")),
    "cut off beside a field": (UNCLOSED, answer("<think>\nLet me see", "quartz")),
    "cut off in a second block": (UNCLOSED, answer("<think>\na\n</think>\n<think>\nb")),
    "cut off before a call": (UNCLOSED, with_call("<think>\nLet me see")),
    "cut off in a part": (UNCLOSED, {"role": "assistant", "content": [{"type": "text", "text": "<think>so"}]}),
    "cut off in other markers": (UNCLOSED, answer("[THINK]so")),
    "cut off in words": (UNCLOSED, answer("<thinking>\nso")),
    "closed twice": (UNOPENED, answer("<think>a</think>b</think>c")),
    "closed beside a field": (UNOPENED, answer("a</think>b", "quartz")),
    "closed at the end": (UNOPENED, answer("granite\n</think>", "quartz")),
    "closed before it is opened": (UNOPENED, answer("a</think>b<think>c", "quartz")),
    "closed before a call": (UNOPENED, {**with_call("a</think>"), "reasoning_content": "quartz"}),
    "closed by other markers": (UNOPENED, answer("a</reasoning>b")),
    "both tags in the field": (MARKED, answer("granite", "<think>quartz</think>")),
    "both tags in the field, on lines of their own": (MARKED, answer("granite", "\n<think>\nquartz\n</think>\n\n")),
    "an opening tag that begins the field": (MARKED, answer("granite", "<think>quartz")),
    "a closing tag that ends the field": (MARKED, answer("granite", "quartz\n</think>\n")),
    "a field that holds the answer too": (MARKED, answer("granite", "quartz\n</think>\n\ngranite")),
    "a closing tag in a sentence of the field": (MARKED, answer("granite", "I write </think> and go on")),
    "a closing tag of a block in the field": (MARKED, answer("granite", "like <think>so</think>, that is")),
    "other markers around the field": (MARKED, answer("granite", "<thinking>quartz</thinking>")),
    "another marker that ends the field": (MARKED, answer("granite", "quartz[/THINK]")),
    "tags in another field": (MARKED, {**answer("granite"), "reasoning": "<think>quartz</think>"}),
    "tags in the field of a call": (MARKED, {**with_call(""), "reasoning_content": "<think>quartz</think>"}),
    "an inline block in a block": (MARKED, answer("<think>\n<think>quartz</think>\n\ngranite")),
    "a block beside the field": (DOUBLED, answer("<think>\nsteel\n</think>\n\ngranite", "quartz")),
    "a block with less than the field": (DOUBLED, answer("<think>\nquartz\n</think>\n\ngranite", "quartz and steel")),
    "an empty block beside the field": (DOUBLED, answer("<think>\n\n</think>\n\ngranite", "quartz")),
    "a block alone beside the field": (DOUBLED, answer("<think>steel</think>", "quartz")),
    "a block beside another field": (DOUBLED, {**answer("<think>steel</think>granite"), "thinking": "quartz"}),
    "a block beside the field of a call": (DOUBLED, {**with_call("<think>a</think>"), "reasoning_content": "quartz"}),
    "a block in a part": (
        DOUBLED,
        {**answer("", "quartz"), "content": [{"type": "text", "text": "<think>a</think>b"}]},
    ),
    "empty": (EMPTY, answer("")),
    "white space": (EMPTY, answer(" \n")),
    "an empty block": (EMPTY, answer("<think>\n\n</think>\n\n")),
    "empty fields": (EMPTY, {**answer(""), "thinking": "\n", "tool_calls": []}),
    "empty parts": (EMPTY, {"role": "assistant", "content": [{"type": "text", "text": ""}]}),
}


@pytest.mark.parametrize("tokenizer", [QWEN, LLAMA, R1, NEMOTRON], ids=["qwen3", "llama3", "r1", "nemotron"])
@pytest.mark.parametrize("name", DIRTY)
def test_dirt_is_refused_by_message_and_reason_and_only_where_it_is_trained_on(name, tokenizer):
    reason, message = DIRTY[name]
    messages = [*CHAT, message]
    encoder = Encoder(tokenizer)
    with pytest.raises(ConversationError, match=r"^message 3: ") as error:
        samples_of(encoder, messages)
    assert (error.value.reason, error.value.message) == (reason, 3)
    assert f"accept {reason}" in str(error.value)
    assert pickle.loads(pickle.dumps(error.value)).reason == reason
    others = [other for other in REASONS if other != reason]
    with pytest.raises(ConversationError, match=f"accept {reason}"):
        encode_samples(messages, tokenizer, accept=others)
    (only,) = samples_of(encoder, messages, turns=[0])
    assert only == samples_of(encoder, CHAT)[0]
    assert samples_of(encoder, [*CHAT, {**message, "train": False}]) == [only]


CLEAN = {
    "a call without content": call(1, "pebble"),
    "a call whose content is null": {**call(1, "pebble"), "content": None},
    "reasoning alone": answer("", "quartz"),
    "inline reasoning alone": answer("<think>\nquartz\n</think>"),
    "inline reasoning": answer("<think>\nquartz\n</think>\n\npebble"),
    "tags in inline reasoning": answer("<think>\nquartz </reasoning> <think>\n</think>\n\npebble"),
    "a block within a text": answer("pebble <think>quartz</think> granite"),
    "an opening tag within a text": answer("pebble <think> granite"),
    "an opening tag in a sentence of the field": answer("granite", "I begin with <think> and go on"),
    "tags of a format in the field": answer("granite", "in <reasoning>so</reasoning>, or </thinking> at last, I say"),
    "a format in the field's last word": answer("granite", "in the form <reasoning>so</reasoning>"),
    "a format beside the field": answer("<reasoning>so</reasoning> granite", "quartz"),
    "a block within a text beside the field": answer("granite: <think>steel</think>", "quartz"),
    "an answer": answer("0"),
}


@pytest.mark.parametrize("tokenizer", [QWEN, LLAMA, NEMOTRON], ids=["qwen3", "llama3", "nemotron"])
@pytest.mark.parametrize("name", CLEAN)
def test_what_is_no_dirt_needs_no_leave(name, tokenizer):
    tools = None if tokenizer is LLAMA else TOOLS
    if tokenizer is LLAMA and "call" in name:
        pytest.skip("its template has no calls")
    messages = [*CHAT, CLEAN[name]]
    if tokenizer is QWEN and name in ("tags in inline reasoning", "a block within a text"):
        with pytest.raises(NotRendered, match="looks into the texts"):  # it splits at tags, and leaves out the rest
            encode_samples(messages, tokenizer, tools)
        return
    assert encode_samples(messages, tokenizer, tools) == encode_samples(messages, tokenizer, tools, accept=REASONS)


@pytest.mark.parametrize("name", [n for n in DIRTY if "call" not in n and DIRTY[n][0] not in (MARKED, DOUBLED)])
def test_accepted_dirt_is_trained_as_it_is_written(name):
    """By a template that writes contents as they are: what is then trained is known without our code."""
    reason, message = DIRTY[name]
    message = {key: value for key, value in message.items() if key not in ("reasoning_content", "thinking")}
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    tokenizer = with_template(byte_level(), template, special=["<|im_start|>", "<|im_end|>"], eos="<|im_end|>")
    for accept in (reason, [reason], tuple(REASONS)):
        sample = encode_samples([user("harbour"), message], tokenizer, accept=accept)[0]
        text = message["content"] if isinstance(message["content"], str) else message["content"][0]["text"]
        written = "".join(tokenizer.decode(sample.target_ids).split())  # a block's own white space is the rule's
        assert written == "".join(text.split()) + "<|im_end|>"


IN_BLOCKS = "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}</u>{% else %}<a>"
IN_BLOCKS += "{% if m.reasoning_content %}OPEN{{ m.reasoning_content }}CLOSE{% endif %}{{ m.content }}</a>"
IN_BLOCKS += "{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


def in_blocks(opening, closing):
    """A tokenizer whose template writes reasoning between these, and all texts as they are."""
    source = IN_BLOCKS.replace("OPEN", opening).replace("CLOSE", closing)
    return with_template(byte_level(), source, special=["<a>", "</a>", "<u>", "</u>"], eos="</a>")


@pytest.mark.parametrize(
    ("reason", "content", "reasoning"),
    [
        (MARKED, "5", "<musing>2+3</musing>"),
        (MARKED, "5", "<musing>2+3"),
        (MARKED, "5", "2+3</musing>"),
        (MARKED, "5", "2</musing>+3"),
        (MARKED, "5", "<think>2+3"),
        (MARKED, "5", "<musing>"),
        (DOUBLED, "<musing>3+2</musing>5", "2+3"),
        (DOUBLED, "<think>3+2</think>5", "2+3"),
    ],
)
def test_markers_in_a_field_are_those_of_the_template_and_are_trained_as_they_stand_if_accepted(
    reason, content, reasoning
):
    messages, tokenizer = [user("harbour"), answer(content, reasoning)], in_blocks("<musing>", "</musing>")
    with pytest.raises(ConversationError, match=f"^message 1: .* accept {reason} "):
        encode_samples(messages, tokenizer)
    (sample,) = encode_samples(messages, tokenizer, accept=reason)
    assert tokenizer.decode(sample.target_ids) == f"<musing>{reasoning}</musing>{content}</a>"


@pytest.mark.parametrize(
    "own", [("◁think▷", "◁/think▷"), ("[[thought]]\n", "\n[[/thought]]\n"), ("<think depth=3>", "</think>\n<answer>")]
)
def test_markers_in_a_field_are_told_in_brackets_of_any_kind(own):
    opening, closing = (text.strip() for text in own)
    for reasoning in (f"{opening}2+3{closing}", f"2+3\n{closing}", f"2 {closing} 3"):
        with pytest.raises(ConversationError, match=f"accept {MARKED}"):
            encode_samples([user("harbour"), answer("5", reasoning)], in_blocks(*own))


def test_reasoning_that_ends_at_no_tag_may_name_tags_and_words():
    for own in (("<musing>", "</musing>"), ("Thought: ", "\nAnswer: ")):
        for reasoning in ("so </think> it", "Answer: so", "Thought: so", "it is </b> <i>"):
            (sample,) = encode_samples([user("harbour"), answer("5", reasoning)], in_blocks(*own))
            assert in_blocks(*own).decode(sample.target_ids) == f"{own[0]}{reasoning}{own[1]}5</a>"


@pytest.mark.parametrize("history", ["template", "content"])
@pytest.mark.parametrize("name", TRL_TEMPLATES)
def test_reasoning_that_a_field_and_a_block_both_say_is_said_once(name, history):
    tokenizer = trl_tokenizer(name)
    inline = [user("harbour"), answer("<think>\nquartz\n</think>\n\ngranite"), user("lantern"), answer("pebble")]
    twice = [{**m, "reasoning_content": "quartz\n"} if "think" in m["content"] else m for m in inline]
    try:
        expected = encode_samples(inline, tokenizer, history=history)
    except ConversationError as error:
        with pytest.raises(type(error)):
            encode_samples(twice, tokenizer, history=history)
        return
    assert encode_samples(twice, tokenizer, history=history) == expected
    assert (
        encode_samples([twice[0], {**twice[1], "thinking": "quartz"}, *twice[2:]], tokenizer, history=history)
        == expected
    )


def test_reasoning_alone_is_an_empty_answer_where_thinking_is_off():
    """Nothing of it is trained but the stop token."""
    chat = [user("harbour"), answer("", "quartz")]
    assert encode_samples(chat, QWEN)
    with pytest.raises(ConversationError, match=r"message 1: .*accept empty-message"):
        encode_samples(chat, QWEN, enable_thinking=False)
    assert encode_samples([*chat[:1], answer("granite", "quartz")], QWEN, enable_thinking=False)


@pytest.mark.parametrize("text", ["a<er>b", "a<et>b"])
def test_one_token_of_a_stop_that_is_a_run_of_tokens_may_stop_it_too(text):
    template = "{% for m in messages %}{{ '<a>' if m.role == 'assistant' else '<u>' }}{{ m.content }}"
    template += "{{ '<er><et>' if m.role == 'assistant' }}{% endfor %}{{ '<a>' if add_generation_prompt }}"
    tokenizer = with_template(byte_level(), template, special=["<a>", "<u>", "<er>", "<et>"])
    assert encode_samples([user("harbour"), answer("ab")], tokenizer)
    with pytest.raises(ConversationError, match=r"message 1: .*accept stop-in-text"):
        encode_samples([user("harbour"), answer(text)], tokenizer)


def test_what_stops_a_call_stops_an_answer_too():
    glm = trl_tokenizer("glm4moe")
    assert encode_samples([user("harbour"), answer("granite")], glm)
    with pytest.raises(ConversationError, match=r"message 1: .*<\|observation\|>.*accept stop-in-text"):
        encode_samples([user("harbour"), answer("granite <|observation|> so")], glm)


def test_reasoning_that_is_not_trained_since_thinking_is_off_may_hold_anything():
    for template, more in (("qwen3", {"enable_thinking": False}), ("qwen3_5_nothink", {})):
        tokenizer = trl_tokenizer(template)
        expected = encode_samples([user("harbour"), answer("granite", "quartz")], tokenizer, **more)
        for reasoning in ("<think>quartz</think>", "quartz</think>", "<think>quartz"):
            assert encode_samples([user("harbour"), answer("granite", reasoning)], tokenizer, **more) == expected
    block = [user("harbour"), answer("<think>steel</think>granite", "quartz")]
    assert encode_samples(block, trl_tokenizer("qwen3_5_nothink")) == expected  # its template takes the block out
    with pytest.raises(ConversationError, match=DOUBLED):
        encode_samples(
            block,
            with_template(
                byte_level(),
                IN_BLOCKS.replace("OPEN", "<think>")
                .replace("CLOSE", "</think>")
                .replace("add_generation_prompt %}<a>", "add_generation_prompt %}<a><think></think>"),
                special=["<a>", "</a>"],
            ),
        )


def test_each_reason_of_a_message_must_be_accepted():
    message = answer("a</think>b", "<think>quartz</think>")
    for accept in ((), UNOPENED, MARKED):
        with pytest.raises(ConversationError) as error:
            encode_samples([user("harbour"), message], LLAMA, accept=accept)
        assert error.value.reason == (MARKED if accept == UNOPENED else UNOPENED)
    assert encode_samples([user("harbour"), message], LLAMA, accept=[UNOPENED, MARKED])


# --- where the prompt opens the block

OPENING = [
    name
    for name in TRL_TEMPLATES
    if trl_tokenizer(name)
    .apply_chat_template([user("x")], tokenize=False, add_generation_prompt=True)
    .endswith("<think>\n")
]


def headless(message):
    """As a server answers whose prompt has written the opening tag."""
    reasoning = message.get("reasoning_content")
    return answer(f"{reasoning}\n</think>\n\n{message['content']}") if reasoning else message


@pytest.mark.parametrize("history", ["template", "content"])
@pytest.mark.parametrize("name", OPENING)
def test_what_a_model_answers_to_a_prompt_that_opens_the_block_is_reasoning_and_answer(name, history):
    tokenizer = trl_tokenizer(name)
    chat = [*CHAT, answer("meadow", "timber"), user("orchard"), answer("pebble", "walnut")]
    expected, given = encode_samples(chat, tokenizer, history=history), list(map(headless, chat))
    found = encode_samples(given, tokenizer, history=history)
    assert [sample.target_ids for sample in found] == [sample.target_ids for sample in expected]
    for at, sample, same in zip((1, 3, 5), found, expected, strict=True):
        prompt = tokenizer.apply_chat_template(given[:at], add_generation_prompt=True, return_dict=False)
        shown = tokenizer.decode(prompt)
        takes_out = "\n\ngranite" in shown and "</think>" not in shown
        if history == "template" and takes_out:  # the block, and not its line breaks
            assert sample.prompt_ids == prompt
        else:
            assert sample == same
    expected = found
    texts = [tokenizer.decode(sample.target_ids) for sample in expected]
    assert all(text.startswith(word) for text, word in zip(texts, ("quartz", "timber", "walnut"), strict=True))
    untrained = [{**headless(m), "train": m["content"] == "pebble"} if m["role"] == "assistant" else m for m in chat]
    assert encode_samples(untrained, tokenizer, history=history)[0].prompt_ids == expected[-1].prompt_ids


def test_a_call_behind_reasoning_whose_block_the_prompt_has_opened():
    said = [user("harbour"), call(1, "granite", "quartz")]
    half = {**call(1, "granite"), "content": "quartz\n</think>\n\n"}
    expected = encode_samples(said, NEMOTRON, TOOLS)
    for content in (half["content"], [{"type": "text", "text": half["content"]}]):
        assert encode_samples([said[0], {**half, "content": content}], NEMOTRON, TOOLS) == expected


def test_there_are_templates_that_open_the_block():
    assert len(OPENING) >= 15


def test_a_prompt_that_has_closed_the_block_opens_none():
    """The same template with thinking off, and a user who writes the tag."""
    tokenizer = trl_tokenizer("nemotron_3_nano")
    messages = [user("harbour"), answer("quartz</think>granite")]
    assert encode_samples(messages, tokenizer)
    with pytest.raises(ConversationError, match="</think>") as error:
        encode_samples(messages, tokenizer, enable_thinking=False)
    assert error.value.reason == UNOPENED
    with pytest.raises(ConversationError, match="</think>"):
        encode_samples([user("what is <think>"), messages[1]], QWEN)


# --- whose markers


def test_the_users_own_markers_count():
    own = {"think": ("<<", ">>")}
    for text, reason in (("<< so", UNCLOSED), ("so >> 5", UNOPENED)):
        messages = [user("harbour"), answer(text)]
        assert encode_samples(messages, LLAMA)
        with pytest.raises(ConversationError) as error:
            encode_samples(messages, LLAMA, **own)
        assert error.value.reason == reason
        assert encode_samples(messages, LLAMA, **own, accept=reason)


@pytest.mark.parametrize("behind", ["<response>", "\n<|answer|>\n"])
def test_a_block_is_closed_by_the_known_tag_where_the_template_writes_more_behind_it(behind):
    """Granite's form."""
    shown = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>" + behind + "{% endif %}"
    template = "{% for m in messages %}<a>{{ m.role }} " + shown + "{{ m.content }}</a>{% endfor %}"
    template += "{% if add_generation_prompt %}<a>assistant {% endif %}"
    tokenizer = with_template(byte_level(), template, special=["<a>", "</a>"], eos="</a>")
    [sample] = encode_samples([user("harbour"), answer("<think>\nquartz\n</think>\n\ngranite")], tokenizer)
    assert tokenizer.decode(sample.target_ids) == f"<think>quartz</think>{behind}granite</a>"
    for cut_off in ("<think>quartz", "<think>a</think><think>quartz"):
        with pytest.raises(ConversationError, match="never closes it") as error:
            encode_samples([user("harbour"), answer(cut_off)], tokenizer)
        assert error.value.reason == UNCLOSED


def test_a_known_tag_with_more_before_it_is_that_tag():
    for text in ("so <think>quartz</think> it is", "<think>quartz</think> it is"):
        messages = [user("harbour"), answer(text)]
        assert encode_samples(messages, LLAMA, think=("<|a|>\n<think>\n", "\n</think>\n\n"))
    with pytest.raises(ConversationError, match=f"accept {UNOPENED}"):
        encode_samples([user("harbour"), answer("a</think>b")], LLAMA, think=("<|a|>\n<think>\n", "\n</think>\n\n"))


def test_the_templates_own_tags_count_and_its_words_do_not():
    def shown(before, behind):
        template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}<a>{% else %}"
        template += "{% if m.reasoning_content %}" + before + "{{ m.reasoning_content }}" + behind + "{% endif %}"
        return with_template(
            byte_level(), template + "{{ m.content }}</a>{% endif %}{% endfor %}", special=["<a>", "</a>"]
        )

    for text in ("<musing>so", "so</musing>5"):
        with pytest.raises(ConversationError, match="accept un"):
            encode_samples([user("harbour"), answer(text)], shown("<musing>", "</musing>"))
        assert encode_samples([user("harbour"), answer(text)], shown("Thought: ", "\nAnswer: "))
    for text in ("Thought: so", "so. Answer: 5"):
        assert encode_samples([user("harbour"), answer(text)], shown("Thought: ", "\nAnswer: "))


# --- ways to accept


def test_reasons_that_are_none_are_named():
    with pytest.raises(ConversationError, match=r"found 'empty-mesage'; did you mean 'empty-message'\?"):
        fr.encode(CHAT[:2], QWEN, accept="empty-mesage")
    with pytest.raises(ConversationError, match="accept: expected reasons"):
        fr.EntryEncoder(QWEN, accept=3)
    with pytest.raises(ValueError, match=r"accept: expected one of .* found 'unclosed'"):
        from_mapping({"model": "m", "data": "d", "output": "o", "accept": ["unclosed"]})
    for name in ("accept", "history"):
        with pytest.raises(ValueError, match=f"template: {name} is no option of the template"):
            from_mapping({"model": "m", "data": "d", "output": "o", "template": {name: "content"}})


def test_data_do_not_accept_their_own_dirt():
    entry = {"messages": [user("harbour"), answer("")], "chat_template_kwargs": {"accept": "empty-message"}}
    with pytest.raises(BadInput, match="accept is no option of the template"):
        fr.EntryEncoder(QWEN)(entry)
    del entry["chat_template_kwargs"]
    assert fr.EntryEncoder(QWEN, accept="empty-message")(entry).n_samples == 1


@pytest.fixture
def data(tmp_path):
    """Conversations of which one is good, and two have each kind of dirt; a model to read them."""
    model = tiny("Qwen3", vocab_size=len(QWEN))
    model.save_pretrained(tmp_path / "model")
    QWEN.save_pretrained(tmp_path / "model")
    dirt = {UNCLOSED: answer("<think>so"), UNOPENED: answer("a</think>b", "c"), EMPTY: answer("")}
    dirt[STOPPED] = answer("a<|im_end|>b")
    dirt |= {MARKED: answer("a", "<think>b</think>"), DOUBLED: answer("<think>a</think>b", "c")}
    chats = [[*CHAT, last] for last in (answer("pebble"), *dirt.values(), *dirt.values())]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return str(path), str(tmp_path / "model")


def test_a_report_counts_each_kind(data, capsys):
    path, folder = data
    given = ["report", path, "--tokenizer", folder, "--json"]

    def refused(*more):
        code = main([*given, *more])
        made = json.loads(capsys.readouterr().out)
        assert made["ok"] == (code == 0) == (not made["refused"]["number"])
        return {reason: found["number"] for reason, found in made["refused"]["classes"].items()}

    assert refused() == dict.fromkeys(REASONS, 2)
    assert refused("--workers", "1", "--accept", UNCLOSED) == dict.fromkeys(set(REASONS) - {UNCLOSED}, 2)
    assert refused(*(word for reason in REASONS for word in ("--accept", reason))) == {}
    assert main([*given, "--accept", "everything"]) == 2
    assert "accept: expected one of unclosed-reasoning" in capsys.readouterr().err
    assert main(["report", path, "--tokenizer", folder, "--option", "accept=empty-message"]) == 2
    assert "--option accept: expected an option of the template" in capsys.readouterr().err


def test_every_command_that_reads_data_refuses_and_accepts(data, tmp_path, capsys):
    path, folder = data
    accepted = [word for reason in REASONS for word in ("--accept", reason)]
    given = {
        "verify": [folder, "--data", path, "--no-float64"],
        "bench": [folder, "--data", path, "--repeats", "1", "--length", "512"],
        "show": ["--data", path, "--tokenizer", folder, "--conversation", "3"],
        "train": ["--model", folder, "--data", path, "--length", "512", "--steps", "1", "--loss", "model"],
    }
    given["train"] += ["--output", str(tmp_path / "run"), "--trainer", "{use_cpu: true}", "--precision", "fp32"]
    for command, arguments in given.items():
        assert main([command, *arguments]) == 2, command
        assert "empty-message" in capsys.readouterr().err
        assert main([command, *arguments, *accepted]) == 0, command
        capsys.readouterr()
    for command in ("verify", "show"):
        assert main([command, *([folder] if command == "verify" else []), *accepted]) == 2
        assert "--data" in capsys.readouterr().err
