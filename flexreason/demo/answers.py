"""What a model answers, turn by turn as at inference: its own earlier answers in the history, without the reasoning.

Several conversations go through `generate` side by side, padded on the left. Each token is the likeliest, so the
answers are the same as one by one.
"""

from collections.abc import Sequence
from typing import Any

import torch

from flexreason.demo.material import THINK
from flexreason.demo.task import Messages

MOST_TOKENS = 40
"""Tokens of an answer with its reasoning; the task's own have fewer than 30."""


def answer(model: Any, tokenizer: Any, conversations: Sequence[Messages], *, at_once: int = 64) -> list[Messages]:
    """The conversations again, with the model's own reasoning and answers in place of theirs."""
    model.eval()
    answered: list[Messages] = []
    for start in range(0, len(conversations), at_once):
        some = conversations[start : start + at_once]
        questions = [[message for message in messages if message["role"] == "user"] for messages in some]
        histories: list[Messages] = [[] for _ in questions]
        for turn in range(max(map(len, questions))):
            going_on = [number for number, asked in enumerate(questions) if turn < len(asked)]
            for number in going_on:
                histories[number].append(questions[number][turn])
            texts = _generate(model, tokenizer, [histories[number] for number in going_on])
            for number, text in zip(going_on, texts, strict=True):
                histories[number].append(as_message(text))
        answered += histories
    return answered


def _generate(model: Any, tokenizer: Any, histories: Sequence[Messages]) -> list[str]:
    prompts = [tokenizer.apply_chat_template(m, add_generation_prompt=True, tokenize=False) for m in histories]
    batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        ids = model.generate(**batch.to(model.device), max_new_tokens=MOST_TOKENS, do_sample=False)
    return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def as_message(text: str) -> dict[str, str]:
    """A generated text, taken apart at the end of its reasoning; without one it is an answer as a whole."""
    before, closed, behind = text.partition(THINK[1])
    if not closed:
        return {"role": "assistant", "content": text}
    return {"role": "assistant", "reasoning_content": before.removeprefix(THINK[0]), "content": behind}


def right(answered: Sequence[Messages], reference: Sequence[Messages]) -> tuple[int, int]:
    """How many answers are right to the letter, and how many there are."""
    pairs = [
        (message["content"], expected["content"])
        for messages, others in zip(answered, reference, strict=True)
        for message, expected in zip(messages, others, strict=True)
        if expected["role"] == "assistant"
    ]
    return sum(content == expected for content, expected in pairs), len(pairs)
