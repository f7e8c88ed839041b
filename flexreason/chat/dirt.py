"""Answers that are none: cut off while the model was thinking, stored by halves or with their markers, or empty.

Each kind is refused in messages that are trained on, under a reason of its own; who accepts that reason trains the text
as it is written.

>>> PAIRS = [("<think>", "</think>")]
>>> unclosed("<think>\\nLet me se", PAIRS), unclosed("<think>a</think>b", PAIRS), unclosed("write <think> so", PAIRS)
(('<think>', '</think>'), None, None)
>>> unopened("why</think>so", PAIRS), unopened("<think>a</think>b", PAIRS), unopened("<think>a</think>b</think>", PAIRS)
(('<think>', '</think>'), None, ('<think>', '</think>'))
>>> [marked(text, PAIRS, "</think>") for text in ("<think>a</think>", "a</think>b", "I say <think> here")]
['<think>', '</think>', None]
"""

import argparse
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from flexreason.chat.ending import Endings
from flexreason.chat.errors import ConversationError
from flexreason.chat.markers import KNOWN_MARKERS, Markers
from flexreason.chat.messages import CLOSE, OPEN, REASONING_FIELDS, Message
from flexreason.talk.nearest import did_you_mean

Pair = tuple[str, str]

TAG = re.compile(r"[<\[{◁«]\S*\w\S*[>\]}▷»]")
"""A name in brackets of some kind, which no sentence begins with."""


class UnclosedReasoning(ConversationError):
    reason = "unclosed-reasoning"


class UnopenedReasoning(ConversationError):
    reason = "unopened-reasoning"


class MarkedReasoning(ConversationError):
    reason = "marked-reasoning"


class DoubledReasoning(ConversationError):
    reason = "doubled-reasoning"


class EmptyMessage(ConversationError):
    reason = "empty-message"


class StopInText(ConversationError):
    reason = "stop-in-text"


REASONS = {
    UnclosedReasoning.reason: "content that begins a reasoning block and never closes it",
    UnopenedReasoning.reason: "content that closes a reasoning block which nothing has opened",
    MarkedReasoning.reason: "reasoning that holds the markers which are written around it",
    DoubledReasoning.reason: "a reasoning field beside another one, or beside a block in the content, that says "
    "something else",
    EmptyMessage.reason: "no reasoning, no content and no calls",
    StopInText.reason: "a text that holds the token which stops generation",
}
"""What can be accepted."""


def accepted(reasons: str | Iterable[str]) -> frozenset[str]:
    """The reasons as a set, or an error that names the one that is none."""
    if not isinstance(reasons, str | Iterable):
        raise ConversationError(f"accept: expected reasons ({', '.join(REASONS)}), found {reasons!r}")
    wanted = (reasons,) if isinstance(reasons, str) else tuple(reasons)
    for reason in wanted:
        if reason not in REASONS:
            hint = did_you_mean(reason, REASONS)
            raise ConversationError(f"accept: expected one of {', '.join(REASONS)}, found {reason!r}{hint}")
    return frozenset(wanted)


def add_argument(parser: argparse._ActionsContainer) -> None:
    """--accept, of every command that reads data."""
    words = "; ".join(f"{reason}: {what}" for reason, what in REASONS.items())
    parser.add_argument(
        "--accept", action="append", metavar="REASON", help=f"train such answers as they are written ({words})"
    )


def pairs_with(markers: Markers) -> list[Pair]:
    """The pairs that surround reasoning: the template's or the user's own, and those that people use.

    Markers that the template shows count where they are tags: words like "Answer:" may begin any line of an answer.
    """
    own = (markers.opening, markers.closing)
    counts = all(own) if markers.origin == "option" else all(map(TAG.search, own))
    known = any(closing == own[1] and opening in own[0] for opening, closing in KNOWN_MARKERS)  # with more before it
    return [*([own] if counts and not known else []), *KNOWN_MARKERS]


def unclosed(text: str, pairs: Sequence[Pair]) -> Pair | None:
    """The pair whose block a text begins with, be it behind others, and never closes."""
    return _past_blocks(text, pairs)[1]


def unopened(text: str, pairs: Sequence[Pair]) -> Pair | None:
    """A pair of which a text has a closing marker with no opening one before it. What stands in blocks that the text
    begins with is reasoning, where anything may stand."""
    if not any(closing in text for _, closing in pairs):
        return None
    rest = _past_blocks(text, pairs)[0]
    head = text[: len(text) - len(rest)]
    for opening, closing in pairs:
        if closing not in rest:
            continue
        depth = max(0, head.count(opening) - head.count(closing))
        longest_first = sorted((opening, closing), key=len, reverse=True)
        for marker in re.findall("|".join(map(re.escape, longest_first)), rest):
            depth += 1 if marker == opening else -1
            if depth < 0:
                return opening, closing
    return None


def _past_blocks(text: str, pairs: Sequence[Pair]) -> tuple[str, Pair | None]:
    """What stands behind the blocks that a text begins with, and the pair of one that does not end."""
    rest = text.lstrip()
    while opened := [pair for pair in pairs if rest.startswith(pair[0])]:
        parts = [rest[len(opening) :].partition(closing) for opening, closing in opened]
        if not (behind := [text for _, closed, text in parts if closed]):
            return rest, opened[0]
        rest = max(behind, key=len).lstrip()
    return rest, None


def opened_by(prompt: str, end: str, pair: Pair) -> bool:
    """Whether a prompt leaves a block open. `end` is what the template ends prompts with; before it stand texts."""
    opening, closing = pair
    return prompt.rstrip().endswith(opening) or (
        bool(end) and prompt.endswith(end) and end.rfind(opening) > end.rfind(closing)
    )


def with_reasoning_before(message: Message, closing: str) -> Message:
    """The message of a model whose prompt had opened the block, with what stands before `closing` as its reasoning."""
    reasoning, _, rest = message.text.partition(closing)
    answer = message.without(*message.fields).without_beginning(len(message.text) - len(rest.lstrip("\n")))
    return answer.changed(**{REASONING_FIELDS[0]: reasoning.strip("\n")})


def marked(reasoning: str, pairs: Sequence[Pair], behind: str) -> str | None:
    """The marker that a reasoning holds as if none were put around it: one that opens a block at its beginning, one
    that closes a block at its end, or, anywhere, the one that ends it, which stands in what is written `behind` it.
    Others within a sentence are text."""
    text = reasoning.strip()
    for pair in pairs:
        opening, closing = pair
        if text.startswith(opening):
            return opening
        if closing in text and (closing in behind or (text.endswith(closing) and unopened(text, [pair]))):
            return closing
    return None


def doubled(message: Message, pairs: Sequence[Pair], behind: str) -> str | None:
    """What opens the block that a content begins with, where a field has reasoning too. Blocks are those that end as
    the template ends reasoning, and inline ones; others are a form that somebody asked for."""
    if not (message.fields and message.reasoning.strip()):
        return None
    blocks = [*(pair for pair in pairs if pair[1] in behind), (OPEN, CLOSE)]
    text = message.text.lstrip()
    begins = _past_blocks(text, blocks)[0] != text
    return next(opening for opening, _ in blocks if text.startswith(opening)) if begins else None


def two_fields(message: Message) -> tuple[str, str] | None:
    """Two reasoning fields that say different things; white space around them says nothing."""
    first, *others = message.fields or ("",)
    other = next((o for o in others if message.as_dict[o].strip() != message.as_dict[first].strip()), None)
    return (first, other) if other else None


def find(
    message: Message, one: Message, number: int, pairs: Sequence[Pair], endings: Endings
) -> Iterator[ConversationError]:
    """All that an answer would be refused for as dirty. `one` is the message with one of its reasoning fields."""
    two, message = two_fields(message), one
    template = endings.template
    behind, off = template.markers.close, template.markers.closed_by(template.prompt_end)
    if pair := unclosed(message.text, pairs):
        yield _error(UnclosedReasoning, f"its content begins with {pair[0]} and never closes it", number)
    elif pair := unopened(message.text, pairs):
        words = f"its content has {pair[1]}, and no {pair[0]} before it, nor has the prompt"
        yield _error(UnopenedReasoning, words, number)
    if not off and (marker := marked(message.reasoning, pairs, behind)):  # if thinking is off, no reasoning is trained
        words = f"its reasoning holds {marker}, which is put around it anyway"
        yield _error(MarkedReasoning, words, number)
    if not (off and template.splits_inline) and (opening := doubled(message, pairs, behind)):
        words = f"it has reasoning in {message.fields[0]}, and its content begins with a block of {opening} too"
        yield _error(DoubledReasoning, words, number)
    elif two and not off:
        yield _error(DoubledReasoning, f"it has reasoning in {two[0]}, and other reasoning in {two[1]}", number)
    if not (message.functions or message.response.strip() or (message.reasoning.strip() and not off)):
        yield _error(EmptyMessage, "it has no reasoning, no content and no calls", number)
    texts = [message.response, *map(str, message.functions), *([] if off else [message.reasoning])]
    for stop in endings.tokens:
        if any(stop in text for text in texts):
            words = f"it has {stop!r} in its text, which stops generation: nothing behind it would be generated"
            yield _error(StopInText, words, number)
            break


def _error(kind: type[ConversationError], words: str, number: int) -> ConversationError:
    return kind(f"{words}; correct it, say train: false, or accept {kind.reason} (--accept, accept=)", number)


def refuse(dirty: Mapping[int, ConversationError], accept: frozenset[str]) -> None:
    """Raise for the first dirty answer that is not accepted. The error knows of all dirt of the conversation."""
    for error in dirty.values():
        if error.reason not in accept:
            error.dirty = dict(Counter(other.reason for other in dirty.values()))
            raise error
