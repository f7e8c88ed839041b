"""`fr.encode`: a conversation in, its layout out, with exactly the samples that inference would see and generate.

    sample i  =  tok(what stands before assistant message i, with the generation prompt)  ->  what must be generated

The template decides what of earlier turns is seen. See docs/templates.md for the rule, and `flexreason template` for
what a template does.
"""

import logging
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from flexreason.chat import dirt
from flexreason.chat import messages as parts
from flexreason.chat.filled import places_of
from flexreason.chat.messages import Message
from flexreason.chat.render import (
    BadMessage,
    ConversationError,
    Messages,
    NothingToTrain,
    Renderer,
    frozen_clock,
    function_tools,
)
from flexreason.chat.template import MARK, PROBE_TOOL, Template
from flexreason.chat.tokens import Piece, Running, Tokens
from flexreason.chat.turns import Turn, Turns
from flexreason.tree.layout import Layout
from flexreason.tree.merge import lay_out
from flexreason.tree.sample import Role, Sample

HISTORIES = ("template", "content")

log = logging.getLogger("flexreason")


def encode(
    messages: Any,
    tokenizer: Any,
    tools: Any = None,
    *,
    history: str = "template",
    turns: Any = None,
    think: tuple[str, str] | None = None,
    accept: str | Iterable[str] = (),
    **template_options: Any,
) -> Layout:
    """The layout of a conversation: one sample for each assistant message that is trained on.

    `history="template"` leaves reasoning in earlier messages, and the template decides what is seen of it;
    `"content"` takes it out first, as clients do that send back answers only. `turns` chooses turns: "last", or
    their numbers among the assistant messages. `think` is what stands before and behind reasoning, for templates that
    do not render it. `accept` names reasons for which an answer is refused as dirty ("unclosed-reasoning",
    "unopened-reasoning", "empty-message"), and is then trained as it is written. All other options go to the template.

    >>> from flexreason.load import stand_in
    >>> from flexreason.tree.layout import unmerge
    >>> tokenizer = stand_in("{% for m in messages %}<|{{ m.role }}|>{% if loop.last and m.reasoning_content %}<think>"
    ...     "{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|end|>{% endfor %}"
    ...     "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    >>> messages = [{"role": "user", "content": "2+3?"},
    ...     {"role": "assistant", "reasoning_content": "easy", "content": "5"},
    ...     {"role": "user", "content": "Twice?"},
    ...     {"role": "assistant", "reasoning_content": "5+5", "content": "10"}]
    >>> for sample in unmerge(encode(messages, tokenizer)):
    ...     print(tokenizer.decode(sample.prompt_ids), "->", tokenizer.decode(sample.target_ids))
    <|user|>2+3?<|end|><|assistant|> -> <think>easy</think>5<|end|>
    <|user|>2+3?<|end|><|assistant|>5<|end|><|user|>Twice?<|end|><|assistant|> -> <think>5+5</think>10<|end|>
    """
    options = {"history": history, "think": think, "accept": accept, **template_options}
    return encoder_of(tokenizer, **options).layout(messages, tools, turns)


def encode_samples(
    messages: Any, tokenizer: Any, tools: Any = None, *, turns: Any = None, **options: Any
) -> list[Sample]:
    """The samples that `encode` lays out, with roles; arguments as there."""
    return encoder_of(tokenizer, **options).samples(messages, tools, turns)


@dataclass
class Encoded:
    """A conversation's samples, how each was found, and what it took. `samples` hold arrays."""

    samples: list[Sample]
    how: list[str]  # a word a sample: "rendered", "spliced", "empty block" or "thinking off"
    messages: list[int]  # the message that each sample trains on
    texts: list[Turn]
    render_seconds: float
    renderings: int


class Encoder:
    """A tokenizer with its template and options, and what was learned about them. Can be pickled."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        history: str = "template",
        think: tuple[str, str] | None = None,
        accept: str | Iterable[str] = (),
        **template_options: Any,
    ) -> None:
        if history not in HISTORIES:
            raise ConversationError(f'history: expected "template" or "content", found {history!r}')
        if think is not None and not (len(think) == 2 and all(isinstance(text, str) and text for text in think)):
            raise ConversationError(f"think: expected (before, behind), two texts, found {think!r}")
        self.tokenizer, self.history, self.think, self.options = tokenizer, history, think, template_options
        self.accept = dirt.accepted(accept)
        self._forget()

    def _forget(self) -> None:
        self._tokens: Tokens | None = None
        self._templates: dict[tuple[str, bool], tuple[Template, Turns]] = {}
        self._told: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    @property
    def tokens(self) -> Tokens:
        self._tokens = self._tokens or Tokens(self.tokenizer)
        return self._tokens

    def template(self, tools: list[Any] | None = None) -> Template:
        """What is known of the template that is used with or without tools."""
        return self._template(Renderer(self.tokenizer, tools, self.options))[0]

    def _template(self, render: Renderer) -> tuple[Template, Turns]:
        key = (render.source, bool(render.tools))
        if key not in self._templates:
            probing = Renderer(self.tokenizer, [PROBE_TOOL] if render.tools else render.tools, self.options)
            template = Template(probing, self.think)
            self._templates[key] = (template, Turns(template))
        return self._templates[key]

    def layout(self, messages: Any, tools: Any = None, turns: Any = None) -> Layout:
        return lay_out(self.encoded(messages, tools, turns).samples)

    def samples(self, messages: Any, tools: Any = None, turns: Any = None) -> list[Sample]:
        return [
            Sample(
                list(sample.prompt_ids),
                list(sample.target_ids),
                None if sample.prompt_roles is None else list(sample.prompt_roles),
                None if sample.target_roles is None else list(sample.target_roles),
                None if sample.prompt_turns is None else list(sample.prompt_turns),
            )
            for sample in self.encoded(messages, tools, turns).samples
        ]

    def encoded(self, messages: Any, tools: Any = None, turns: Any = None) -> Encoded:
        """The samples of a conversation, and how they were found."""
        checked = parts.check(messages)
        trained = choose(checked, turns)
        with frozen_clock():
            render = Renderer(self.tokenizer, function_tools(tools), self.options)
            template, finder = self._template(render)
            made = self._made(render, template, checked, set(trained))
            past = [parts.without_reasoning(message) for message in made] if self.history == "content" else made
            found = [self._turn(render, finder, past, made, number) for number in trained]
            spans = self._history(render, past, trained[-1], found[-1].prompt)
        samples = self._tokenize(found, trained, spans)
        how = [turn.how for turn in found]
        self._tell(set(how))
        return Encoded(samples, how, trained, found, render.seconds, render.n_calls)

    def _made(self, render: Renderer, template: Template, checked: Messages, trained: set[int]) -> Messages:
        """The messages as the template takes them. Raises where one that is trained on is dirty."""
        made: Messages = []
        pairs, end = dirt.pairs_with(template.markers), template.prompt_end
        for number, message in enumerate(checked):
            message = parts.without_training_keys(message)
            if message["role"] == "assistant":
                half = dirt.unopened(parts.text_of(message.get("content")), pairs)
                bare = not parts.reasoning_of(message).strip()
                if half and bare and made and dirt.opened_by(render.attempt(made, True) or "", end, half):
                    message = dirt.with_reasoning_before(message, half[1])
                if number in trained:
                    dirt.refuse(message, number, pairs, self.accept)
            made.append(template.in_form(message))
        return made

    def _turn(self, render: Renderer, finder: Turns, past: Messages, made: Messages, number: int) -> Turn:
        before = past[:number]
        if not before:
            raise BadMessage(
                "the conversation begins with an assistant message, and inference has nothing to answer there; mark it "
                "with train: false",
                number,
            )
        return finder.find(render, before, made[number], number, render(before, True))

    def _tell(self, how: set[str]) -> None:
        for kind in sorted(how & set(REMARKS) - self._told):
            self._told.add(kind)
            log.log(logging.WARNING if kind == "thinking off" else logging.INFO, REMARKS[kind])

    # --- roles

    def _history(self, render: Renderer, past: Messages, last: int, prompt: str) -> list[tuple[int, int, int, Role]]:
        """Where answers and reasoning of earlier turns stand in the longest prompt: (start, end, message, role).

        Seen from a rendering with marks for all of them; empty where the prompt is not that rendering filled in.
        """
        base = next(mark for n in range(10**6) if (mark := MARK.format(f"h{n}")) not in prompt)
        marked, slots = [], {}
        for number, message in enumerate(past[:last]):
            if message["role"] == "assistant":
                reasoning, response = parts.reasoning_of(message), parts.response_of(message)
                if response:
                    mark = f"{base}{number}c"
                    slots[mark] = (number, response, Role.CONTEXT)
                    inline = reasoning and not parts.has_field(message)
                    message = parts.with_text(parts.without_reasoning(message) if inline else message, mark)
                    message = {**message, parts.REASONING_FIELDS[0]: reasoning} if inline else message
                if reasoning:
                    mark = f"{base}{number}r"
                    slots[mark] = (number, reasoning, Role.REASONING)
                    names = [name for name in parts.REASONING_FIELDS if name in message]
                    message = {**message, **dict.fromkeys(names or parts.REASONING_FIELDS[:1], mark)}
            marked.append(message)
        if not slots:
            return []
        try:
            text = render.plain(marked, True)
        except ConversationError:
            raise
        except Exception:
            return []
        found, _ = places_of(text, {mark: value for mark, (_, value, _) in slots.items()}, prompt)
        return [(start, end, slots[mark][0], slots[mark][2]) for start, end, mark in found]

    def _tokenize(self, found: list[Turn], trained: list[int], spans: list[tuple[int, int, int, Role]]) -> list[Sample]:
        turn_of = {number: n for n, number in enumerate(trained)}
        running, samples = Running(self.tokens), []
        running.foresee(turn.prompt + turn.target for turn in found)
        history = _History(spans, found[-1].prompt, running, turn_of)
        for number, turn in zip(trained, found, strict=True):
            try:
                before, target = running.sample(turn.prompt, turn.target)
            except ConversationError as error:
                raise type(error)(error.text, number) from error
            n_prompt = sum(len(piece.ids) for piece in before)
            n_reasoning = 0
            if turn.response:
                n_reasoning = running.count(turn.prompt + turn.target[: turn.response]) - n_prompt
                n_reasoning = min(max(n_reasoning, 0), len(target) - 1)
            roles, turns = history.of(turn.prompt, n_prompt)
            samples.append(
                Sample(
                    _ids(before),
                    array("q", target),
                    roles,
                    _repeated(Role.REASONING, n_reasoning) + _repeated(Role.RESPONSE, len(target) - n_reasoning),
                    turns,
                )
            )
        return samples


REMARKS = {
    "thinking off": "the prompt closes the reasoning block (thinking is off), so the model generates no reasoning "
    "there and none is in the targets; to train on it, pass the template's option that switches thinking on",
    "spliced": "the chat template does not render the reasoning of the message to generate; it was put where the model "
    "must generate it",
    "empty block": "the prompt opens a reasoning block and the message has no reasoning: the target closes it at once",
}
"""What is said once a tokenizer, in the log."""


def choose(messages: Sequence[Message], turns: Any) -> list[int]:
    """The numbers of the messages to train on."""
    assistants = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not assistants:
        raise NothingToTrain("the conversation has no assistant message")
    if turns is None:
        wanted = set(assistants)
    elif turns == "last":
        wanted = {assistants[-1]}
    elif isinstance(turns, Iterable) and not isinstance(turns, str | bytes):
        numbers = list(turns)
        wrong = [n for n in numbers if not isinstance(n, int) or not -len(assistants) <= n < len(assistants)]
        if wrong:
            raise ConversationError(f"turns: {wrong[0]!r} is none of the {len(assistants)} assistant messages")
        wanted = {assistants[n] for n in numbers}
    else:
        raise ConversationError(f'turns: expected "last" or numbers of assistant messages, found {turns!r}')
    found = [number for number in assistants if parts.is_trained(number, messages[number]) and number in wanted]
    if not found:
        raise NothingToTrain("every assistant message is excluded from training")
    return found


def _repeated(value: int, n: int) -> array:
    return array("q", [value]) * n


def _ids(pieces: list[Piece]) -> array:
    made = array("q")
    made.frombytes(b"".join([piece.ids.tobytes() for piece in pieces]))
    return made


class _History:
    """Roles and turns of the longest prompt's tokens, and of others as far as they go along with it."""

    def __init__(
        self, spans: list[tuple[int, int, int, Role]], prompt: str, running: Running, turn_of: dict[int, int]
    ) -> None:
        self.prompt, self.ends, self.counts = prompt, [0], [0]
        pieces = running.pieces(prompt) if spans else []
        self.roles = _repeated(Role.PROMPT, sum(len(piece.ids) for piece in pieces))
        self.turns = _repeated(-1, len(self.roles))
        starts, counts, at, total = [], [], 0, 0
        for piece in pieces:
            starts.append(at)
            counts.append(total)
            at += len(piece.text)
            total += len(piece.ids)

        def index(place: int) -> int:
            n = bisect_right(starts, place) - 1
            inside = place - starts[n]
            return counts[n] + (len(_within(pieces[n], inside, running.tokens)) if inside else 0)

        for start, end, number, role in spans:
            low, high = index(start), min(index(end), total)
            self.roles[low:high] = _repeated(role, high - low)
            if number in turn_of:
                self.turns[low:high] = _repeated(turn_of[number], high - low)
            self.ends.append(end)
            self.counts.append(high)

    def of(self, prompt: str, n: int) -> tuple[array | None, array | None]:
        """Roles and turns of a prompt with n tokens; None where nothing is known of it."""
        common = len(prompt) if self.prompt.startswith(prompt) else _agreed(prompt, self.prompt)
        known = min(self.counts[bisect_right(self.ends, common) - 1], n)
        if not known:
            return None, None
        rest = n - known
        return self.roles[:known] + _repeated(Role.PROMPT, rest), self.turns[:known] + _repeated(-1, rest)


def _within(piece: Piece, n: int, tokens: Tokens) -> Sequence[int]:
    return piece.ids if n >= len(piece.text) else tokens.whole(piece.text[:n])


def _agreed(one: str, other: str) -> int:
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one.startswith(other[:middle]):
            low = middle
        else:
            high = middle - 1
    return low


_encoders: dict[Any, Encoder] = {}

KEPT = 8
"""Encoders that are kept: one a tokenizer and set of options, the ones used last."""


def encoder_of(tokenizer: Any, **options: Any) -> Encoder:
    """The encoder for a tokenizer as it is now, kept from call to call."""
    now = (str(getattr(tokenizer, "chat_template", None)), len(tokenizer), tokenizer.eos_token)
    key = (
        id(tokenizer),
        now,
        repr(sorted(options.items())),
    )  # the encoder holds the tokenizer, so its id stays its own
    encoder = _encoders.pop(key, None) or Encoder(tokenizer, **options)
    _encoders[key] = encoder
    if len(_encoders) > KEPT:
        del _encoders[next(iter(_encoders))]
    return encoder
