"""Conversations of a data set as scenes: encoded, with what whoever checks them should see; or refused, with why.

A refusal stops nothing: it is shown where it belongs, and the next conversation comes after it.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from flexreason.chat import dirt
from flexreason.chat.encode import REMARKS, Encoded
from flexreason.chat.errors import ConversationError
from flexreason.chat.messages import TRAINING_KEYS, take_apart
from flexreason.data.formats import BadInput, Conversation
from flexreason.data.intake import EntryEncoder
from flexreason.show.notes import RefusedScene, Remark, Spoken, spoken
from flexreason.show.scene import Scene
from flexreason.tree.merge import lay_out

LONG = 80
"""Characters of reasoning from which on it is looked at whether its last sentence ends."""


def scenes(conversations: Iterable[Conversation | BadInput], encoder: EntryEncoder) -> Iterator[Scene | RefusedScene]:
    """A scene for each conversation, in order."""
    for conversation in conversations:
        try:
            if isinstance(conversation, BadInput):
                raise conversation
            yield scene(conversation, encoder)
        except ConversationError as error:
            if isinstance(conversation, BadInput):
                where, _, words = str(error).partition(": ")
                yield RefusedScene(where, error.reason, words or where)
                continue
            messages = [spoken(number, message) for number, message in enumerate(conversation.messages)]
            yield RefusedScene(conversation.where, error.reason, error.text, messages, error.message)


def scene(conversation: Conversation, encoder: EntryEncoder) -> Scene:
    """The scene of a conversation. Raises where it is refused."""
    encoded = encoder.encoded(conversation)
    tokenized = conversation.samples is not None
    try:
        layout = lay_out(encoded.samples)
    except ValueError as error:
        if tokenized:
            raise BadInput(str(error)) from error
        raise
    if tokenized:
        return Scene(layout, encoder.tokenizer, conversation.where, how=encoded.how)
    untrained = list(_untrained(conversation.messages, encoded))
    remarks = [
        *_of_turns(conversation.messages, encoded),
        *(Remark(one.words, message=one.number) for one in untrained),
    ]
    remarks.sort(key=lambda remark: remark.message or 0)
    return Scene(layout, encoder.tokenizer, conversation.where, encoded.messages, remarks, untrained, encoded.how)


def _untrained(messages: list[Any], encoded: Encoded) -> Iterator[Spoken]:
    """Answers that no turn is, and why."""
    for number, message in enumerate(messages):
        if message.get("role") != "assistant" or number in encoded.messages:
            continue
        key = next((key for key in TRAINING_KEYS if key in message and not message[key]), None)
        words = (
            f"this answer is not trained: {key}: {str(message[key]).lower()}" if key else "this answer is not trained"
        )
        yield spoken(number, message, words)


def _of_turns(messages: list[Any], encoded: Encoded) -> Iterator[Remark]:
    for turn, (number, how) in enumerate(zip(encoded.messages, encoded.how, strict=True)):
        message = take_apart(messages[number])
        if reason := encoded.dirty.get(number):
            yield Remark(f"{dirt.REASONS[reason]}; trained as it is written ({reason})", turn, number)
        if how == "thinking off":
            yield Remark(REMARKS[how], turn, number)
        if message.reasoning.strip() and not (message.response.strip() or message.functions):
            yield Remark("its reasoning is followed by no answer: is it cut off?", turn, number)
        elif _is_cut_off(message.reasoning):
            end = message.reasoning.strip()[-40:].replace("\n", " ")
            yield Remark(f"its reasoning ends within a sentence, “… {end}”: is it cut off?", turn, number)


def _is_cut_off(reasoning: str) -> bool:
    """Whether a text of several sentences ends without an end of one; equations have none."""
    text = reasoning.strip()
    *sentences, last = re.split(r"[.!?:]\s|\n", text)
    return len(text) >= LONG and bool(sentences) and "=" not in last and bool(re.search(r"[a-z,]$", last))
