"""`flexreason template`: what it says of templates is so."""

import json

from flexreason.chat.encode import Encoder
from flexreason.cli import main
from flexreason.commands.template import describe
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


def test_the_command_prints_json(capsys, tmp_path):
    conversation = tmp_path / "chat.json"
    conversation.write_text(json.dumps([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]))
    given = ["template", str(TRL / "qwen3_6.jinja"), "--option", "enable_thinking=false", "--json", "--messages"]
    assert main([*given, str(conversation)]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["facts"]["prompt"] == "closes"
    assert made["example"]["samples"][0]["target"] == "ho<|im_end|>"


def test_a_refused_conversation_is_no_success(capsys, tmp_path):
    conversation = tmp_path / "chat.json"
    conversation.write_text(json.dumps([{"role": "user", "content": "hi"}]))
    assert main(["template", str(TRL / "qwen3.jinja"), "--messages", str(conversation)]) == 1
    assert "nothing to train" in capsys.readouterr().out


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
