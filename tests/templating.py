"""What template tests share: tokenizers built here, conversations of unmistakable words, and a plain reference.

The reference knows nothing of marks and probes. Every text in its conversations is a word that occurs nowhere else,
so it may simply look for them, and how each family stops is written down in a table.
"""

import importlib.util
import json
import re
from functools import lru_cache
from os.path import commonprefix
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from flexreason import Sample
from flexreason.chat.encode import encoder_of

TRL = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"

TRL_TEMPLATES = sorted(path.stem for path in TRL.glob("*.jinja"))

CORPUS = [
    "The assistant thinks about the user and answers: so the answer is 12, not 21.\n\nWhy? Because it is so.\n",
    "user assistant system tool think response analysis final commentary functions name arguments\n",
    "a\n\n\n\nb\n\nc\n\n\n\nd\n\n\n\n\n\ne\n\nf" * 9,
    '\n\n \n  {"name": "search", "arguments": {"key": "value"}}\n',
]


def source(name):
    return (TRL / f"{name}.jinja").read_text()


def with_template(backend, template, *, special=(), plain=(), eos="</s>", bos="<s>"):
    """A transformers tokenizer around a `tokenizers` one."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token=bos)
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in special], special_tokens=True)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    tokenizer.chat_template = template
    return tokenizer


def byte_level():
    return Tokenizer.from_str(_byte_level())


@lru_cache
def _byte_level():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend.to_str()


def metaspace(scheme="first"):
    """Like SentencePiece with byte fallback: a space is put before the text, or before every piece of it."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", *(f"<0x{n:02X}>" for n in range(256))], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def word_piece():
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


STOPS = {  # the beginning of a template's name: how an answer stops, how a call stops (None: as an answer does)
    "cohere2": ("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", None),
    "cohere": ("<|END_OF_TURN_TOKEN|>", None),
    "deepseek": ("<\uff5cend▁of▁sentence\uff5c>", None),
    "diffusion_gemma": ("<turn|>", "<|tool_response>"),
    "gemma4_v2": ("<turn|>", None),
    "gemma4": ("<turn|>", "<|tool_response>"),
    "gemma": ("<end_of_turn>", None),
    "glm4moe": ("<|user|>", "<|observation|>"),  # written by the next message only
    "gptoss": ("<|return|>", "<|call|>"),
    "idefics3": ("<end_of_utterance>", None),
    "smolvlm": ("<end_of_utterance>", None),
    "lfm2": ("<|im_end|>", None),
    "llama3": ("<|eot_id|>", None),
    "llava": ("</s>", None),
    "muse": ("<|eot|>", None),
    "nemotron": ("<|im_end|>", None),
    "phi3": ("<|end|>", None),
    "qwen": ("<|im_end|>", None),
}


def stops(name):
    answer, call = next(found for family, found in STOPS.items() if name.startswith(family))
    return answer, call or answer


TAG = re.compile(r"<[|\uff5c]?/?[\w▁.:-]+[|\uff5c]?>|<[|\uff5c][\w▁.:-]+>|\[/?[A-Z_]{3,}\]")

NO_SPECIAL = re.compile(r"think|tool|function|parameter|arg_|IMPORTANT|atem|name|args|recipient")


@lru_cache
def trl_tokenizer(name):
    """A byte-level tokenizer with a trl template, whose tags are added tokens; those of turns are special."""
    text = source(name)
    tags = sorted(set(TAG.findall(text)))
    special = [tag for tag in tags if not NO_SPECIAL.search(tag)]
    special += [tag for stop in stops(name) for tag in TAG.findall(stop)] + ["<|observation|>", "<|user|>"][
        : 2 * ("glm" in name)
    ]
    eos = "<|endoftext|>" if "glm" in name else TAG.findall(stops(name)[0])[-1]
    plain = [tag for tag in tags if NO_SPECIAL.search(tag) and tag not in special]
    return with_template(byte_level(), text, special=sorted(set(special)), plain=plain, eos=eos, bos="<bos>")


def samples_of(encoder, messages, tools=None, turns=None):
    """A conversation's samples, their ids, roles and turns as lists, so that they can be compared."""

    def listed(values):
        return None if values is None else list(values)

    samples = encoder.encoded(messages, tools, turns).samples
    return [
        Sample(*map(listed, (s.prompt_ids, s.target_ids, s.prompt_roles, s.target_roles, s.prompt_turns)))
        for s in samples
    ]


def encode_samples(messages, tokenizer, tools=None, *, turns=None, **options):
    """The samples that `encode` lays out."""
    return samples_of(encoder_of(tokenizer, **options), messages, tools, turns)


def user(text):
    return {"role": "user", "content": text}


def answer(text, reasoning=None):
    return {"role": "assistant", "content": text} | ({"reasoning_content": reasoning} if reasoning else {})


def call(number, value, reasoning=None, form=dict):
    arguments = {"key": value} if form is dict else f'{{"key": "{value}"}}'
    function = {"name": "search", "arguments": arguments}
    message = {"role": "assistant", "content": ""} | ({"reasoning_content": reasoning} if reasoning else {})
    return message | {"tool_calls": [{"id": f"call0000{number}", "type": "function", "function": function}]}


def result(number, text):
    return {"role": "tool", "name": "search", "tool_call_id": f"call0000{number}", "content": text}


SHAPES = {
    "chat": [user("harbour"), answer("granite"), user("lantern"), answer("meadow"), user("orchard"), answer("pebble")],
    "reasoning chat": [
        user("harbour"),
        answer("granite", "quartz"),
        user("lantern"),
        answer("meadow", "timber"),
        user("orchard"),
        answer("pebble", "walnut"),
    ],
    "mixed": [
        user("harbour"),
        answer("granite", "quartz"),
        user("lantern"),
        answer("meadow"),
        user("orchard"),
        answer("pebble", "walnut"),
        user("saddle"),
        answer("velvet"),
    ],
    "tool loop": [
        user("harbour"),
        call(1, "granite", "quartz"),
        result(1, "lantern"),
        call(2, "meadow", "timber"),
        result(2, "orchard"),
        answer("pebble", "walnut"),
    ],
    "several tool loops": [
        user("harbour"),
        call(1, "granite", "quartz"),
        result(1, "lantern"),
        answer("meadow", "timber"),
        user("orchard"),
        call(2, "pebble", "walnut"),
        result(2, "saddle"),
        call(3, "velvet"),
        result(3, "willow"),
        answer("zephyr", "yonder"),
    ],
    "trailing tool call": [
        user("harbour"),
        answer("granite", "quartz"),
        user("lantern"),
        call(1, "meadow", "timber"),
        result(1, "orchard"),
        call(2, "pebble", "walnut"),
    ],
}


def in_parts(messages):
    """The messages with every content as a list of one text part."""
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def shape(name, which):
    """A conversation of this shape as the template takes it: some want contents in parts, or arguments as text."""
    if name == "deepseekv3":
        return [as_text(message) for message in SHAPES[which]]
    return in_parts(SHAPES[which]) if name.startswith(("idefics3", "llava", "smolvlm")) else SHAPES[which]


def as_text(message):
    """The message with its tool arguments as JSON text."""
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message.get("tool_calls", [])
    ]
    return {**message, "tool_calls": calls} if calls else message


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Looks something up.",
            "parameters": {
                "type": "object",
                "properties": {"key": {"type": "string", "description": "What to look up."}},
                "required": ["key"],
            },
        },
    }
]


def in_both_fields(messages):
    """As transformers from 5.21 on hands messages to a template: gpt-oss's reads `thinking`."""
    return [{"thinking": m["reasoning_content"], **m} if "reasoning_content" in m else m for m in messages]


def text_after(text, word):
    return text.rpartition(word)[2]


def reference(tokenizer, name, messages, i, tools=None, **options):
    """Prompt and target of assistant message i as texts, by the rule; for conversations of unmistakable words."""

    def render(some, prompt):
        asked = {"tools": tools, "add_generation_prompt": prompt, "tokenize": False}
        return tokenizer.apply_chat_template(in_both_fields(some), **asked, **options)

    message, before = messages[i], messages[:i]
    prompt, whole = render(before, True), render([*before, message], False)
    reasoning, calls = message.get("reasoning_content"), message.get("tool_calls")
    last_text = before[-1]["content"] if isinstance(before[-1]["content"], str) else before[-1]["content"][0]["text"]
    said = (
        re.search("[a-z]+\\W*$", str(calls[0]["function"]["arguments"])).group().strip("\"'}")
        if calls
        else message["content"]
        if isinstance(message["content"], str)
        else message["content"][0]["text"]
    )
    asked, told = text_after(prompt, last_text), text_after(whole, last_text)
    assert said in told

    if not reasoning and not told.startswith(asked) and asked.rstrip().endswith("<think>"):
        probe = render([*before, {**message, "reasoning_content": "zzzz"}], False)
        if "zzzz" in probe:  # the block is closed at once
            told = text_after(probe, last_text).replace("zzzz", "")
    off = asked.rstrip().endswith("</think>")
    if off and reasoning:
        bare = {key: value for key, value in message.items() if key != "reasoning_content"}
        told, reasoning = text_after(render([*before, bare], False), last_text), None
    if told.startswith(asked):
        target = told[len(asked) :]
    else:  # the prompt has opened a block that the rendering lacks
        header = asked.removesuffix("<think>\n")
        if not told.startswith(header):  # the prompt ends with what the rendering lacks
            header = commonprefix([header, told])  # noqa: RUF071
            header = header[: header.rfind("<")] if told[len(header)] not in "<\n" else header
        target = ("\n</think>\n\n" if asked.endswith("<think>\n") and not reasoning else "") + told[len(header) :]
    if reasoning and reasoning not in target:
        opening = "" if asked.endswith("<think>\n") else "<think>\n"
        closing = "</think>"
        if "<|START_THINKING|>" in tokenizer.get_vocab() and "<think>" not in tokenizer.get_vocab():
            opening, closing = "<|START_THINKING|>\n", "<|END_THINKING|>"
        between = "\n\n"
        if (
            name.startswith("gemma4") and name != "gemma4_v2"
        ):  # which the template shows with calls, if not with answers
            opening, closing, between = "<|channel>thought\n", "<channel|>", ""
        target = f"{opening}{reasoning}\n{closing}{between}{target}"
    stop = stops(name)[1 if calls else 0]
    body, _, end = target.rpartition(said)
    if stop in end:
        return prompt, body + said + end[: end.find(stop) + len(stop)]
    return prompt, body + said + end.rstrip() + stop
