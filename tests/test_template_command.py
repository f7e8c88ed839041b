"""`flexreason template`: what it says of templates is so."""

import json

import pytest

from flexreason.chat.encode import Encoder
from flexreason.chat.facts import describe
from flexreason.cli import main
from flexreason.load import load_tokenizer
from templating import TRL, TRL_TEMPLATES, trl_tokenizer


def facts(name, **options):
    return {fact.key: fact.value for fact in describe(Encoder(trl_tokenizer(name), **options))}


def test_what_real_templates_do():
    assert facts("qwen3")["history"] == "dropped"
    assert facts("qwen3")["tool_loop"] == "kept"
    assert facts("qwen3")["without"] == "empty block"
    assert facts("qwen3")["after_stop"] == "\n"
    assert facts("qwen3_6")["prompt"] == "opens"
    assert facts("qwen3_5_nothink")["prompt"] == "closes"
    assert facts("qwen3_6", preserve_thinking=True)["history"] == "kept"
    assert facts("glm4moe")["history"] == "empty block"
    assert (facts("glm4moe")["stop"], facts("glm4moe")["call_stop"]) == ("<|user|>", "<|observation|>")
    assert facts("gptoss")["closes_differently"]
    assert facts("gptoss")["date"]
    assert facts("gptoss")["history"] == "dropped"
    assert facts("llama3")["fields"] == []
    assert facts("deepseekv3")["arguments"] == "string"
    assert facts("smolvlm")["content"] == "parts"
    assert any("two user messages" in line for line in facts("gemma3")["cannot"])


def test_every_template_can_be_described():
    for name in TRL_TEMPLATES:
        assert {"fields", "history", "prompt", "stop", "content", "arguments"} <= facts(name).keys(), name


def test_the_command_prints_words_and_samples(capsys):
    assert main(["template", str(TRL / "qwen3.jinja")]) == 0
    printed = capsys.readouterr().out
    assert "Reasoning is dropped from history" in printed
    assert "[[<|im_start|>user" in printed
    assert "tokens in the samples" in printed


@pytest.fixture
def chats(tmp_path):
    """Two conversations, and one that has no answer."""
    path = tmp_path / "chats.jsonl"
    chats = [[("user", "hi"), ("assistant", "ho")], [("user", "a"), ("assistant", "b")], [("user", "hi")]]
    entries = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    entries[1]["chat_template_kwargs"] = {"enable_thinking": False}
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_the_command_prints_json(capsys, chats):
    given = ["template", str(TRL / "qwen3_6.jinja"), "--option", "enable_thinking=false", "--json"]
    assert main([*given, "--data", str(chats)]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["facts"]["prompt"] == "closes"
    assert made["example"]["where"] == f"{chats}, line 1"
    assert made["example"]["samples"][0]["target"] == "ho<|im_end|>"


def test_conversations_are_those_that_show_would_show(capsys, chats, tmp_path):
    """By number, of any kind of data, each with its own options of the template."""
    whole = tmp_path / "chat.json"
    whole.write_text(json.dumps([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]))
    for data, more in ((chats, []), (chats, ["--conversation", "1"]), (whole, []), (chats, ["--history", "content"])):
        words = ["--data", str(data), "--conversation", "0", *more, "--json"]
        assert main(["template", str(TRL / "qwen3_6.jinja"), *words]) == 0
        example = json.loads(capsys.readouterr().out)["example"]
        assert main(["show", "--tokenizer", str(TRL / "qwen3_6.jinja"), *words]) == 0
        assert json.loads(capsys.readouterr().out)["conversations"] == [example]
        [sample] = example["samples"]
        assert (sample["message"], sample["tokens"]) == (1, sample["prompt_tokens"] + sample["trained_tokens"])


def test_a_refused_conversation_is_no_success(capsys, chats):
    given = ["template", str(TRL / "qwen3.jinja"), "--data", str(chats), "--conversation"]
    assert main([*given, "2"]) == 1
    assert f"{chats}, line 3 is refused (nothing to train)" in capsys.readouterr().out
    assert main([*given, "3"]) == 2
    assert "there is no conversation 3" in capsys.readouterr().err
    assert main(["template", str(TRL / "qwen3.jinja"), "--conversation", "0"]) == 2
    assert "--conversation is about data; give --data too" in capsys.readouterr().err


def test_what_cannot_be_loaded(capsys, tmp_path):
    assert main(["template", str(tmp_path / "none")]) == 2
    assert "cannot be loaded" in capsys.readouterr().err
    assert main(["template", str(TRL / "qwen3.jinja"), "--option", "x"]) == 2
    assert "NAME=VALUE" in capsys.readouterr().err


def test_a_tokenizer_folder_or_file_is_enough(tmp_path):
    trl_tokenizer("qwen3").save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer, _ = load_tokenizer(str(source))
        assert tokenizer.chat_template == trl_tokenizer("qwen3").chat_template
