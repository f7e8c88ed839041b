"""Dirty answers are refused where they are trained on, each kind under its reason, and trained as written on demand."""

import json
import pickle

import pytest

import flexreason as fr
from flexreason.chat.dirt import REASONS
from flexreason.chat.encode import Encoder
from flexreason.chat.render import ConversationError, NotRendered
from flexreason.cli import main
from flexreason.data.files import BadInput
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

UNCLOSED, UNOPENED, EMPTY, STOPPED = REASONS


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


@pytest.mark.parametrize("name", [name for name in DIRTY if "call" not in name])
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
    expected = encode_samples(chat, tokenizer, history=history)
    assert encode_samples(list(map(headless, chat)), tokenizer, history=history) == expected
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
