"""`fr.encode`: a conversation in, its layout out, with exactly the samples that inference would see and generate.

    sample i  =  tok(what stands before assistant message i, with the generation prompt)  ->  what must be generated

The template decides what of earlier turns is seen. See docs/templates.md for the rule, and `flexreason template` for
what a template does.
"""

import logging
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from flexreason.chat import dirt
from flexreason.chat.ending import Endings
from flexreason.chat.errors import BadMessage, ConversationError, NothingToTrain, blaming
from flexreason.chat.history import History, Stretch, find_stretches, repeated
from flexreason.chat.left_out import LeftOut
from flexreason.chat.messages import TRAINING_KEYS, Message, check, is_trained
from flexreason.chat.probes import PROBE_TOOL
from flexreason.chat.render import Renderer, frozen_clock, refuse_half
from flexreason.chat.survey import Turns
from flexreason.chat.template import Template
from flexreason.chat.tokens import Running, Tokens, joined
from flexreason.chat.tools import function_tools
from flexreason.chat.turns import Turn
from flexreason.tree.layout import TOKENIZERS, Layout
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
    "unopened-reasoning", "marked-reasoning", "doubled-reasoning", "empty-message", "stop-in-text"), and is then trained
    as it is written. All other options go to the template.

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


@dataclass
class Encoded:
    """A conversation's samples, how each was found, and what it took. `samples` hold arrays."""

    samples: list[Sample]
    how: list[str]  # a word a sample: "rendered", "spliced", "empty block" or "thinking off"
    messages: list[int]  # the message that each sample trains on
    texts: list[Turn]
    render_seconds: float
    renderings: int
    dirty: dict[int, str] = field(
        default_factory=dict
    )  # messages that are accepted though they are dirty, and the reason


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
        if think is not None and not (
            isinstance(think, tuple | list)
            and len(think) == 2
            and all(isinstance(text, str) and text for text in think)
        ):
            raise ConversationError(f"think: expected (before, behind), two texts, found {think!r}")
        self.tokenizer, self.history, self.think, self.options = tokenizer, history, think, template_options
        self.accept = dirt.accepted(accept)
        self._forget()

    def _forget(self) -> None:
        self._tokens: Tokens | None = None
        self._templates: dict[tuple[str, bool], tuple[Template, Turns, LeftOut]] = {}
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

    def _template(self, render: Renderer) -> tuple[Template, Turns, LeftOut]:
        key = (render.source, bool(render.tools))
        if key not in self._templates:
            tools = [PROBE_TOOL] if render.tools else render.tools
            template = Template(Renderer(self.tokenizer, tools, self.options, probing=True), self.think)
            self._templates[key] = (template, Turns(template), LeftOut(template))
        return self._templates[key]

    def layout(self, messages: Any, tools: Any = None, turns: Any = None) -> Layout:
        layout = lay_out(self.encoded(messages, tools, turns).samples)
        TOKENIZERS[layout] = self.tokenizer
        return layout

    def encoded(self, messages: Any, tools: Any = None, turns: Any = None) -> Encoded:
        """The samples of a conversation, and how they were found."""
        checked = check(messages)
        trained = choose(checked, turns)
        with frozen_clock():
            render = Renderer(self.tokenizer, function_tools(tools), self.options)
            _, finder, left_out = self._template(render)
            own, dirty = self._in_form(render, finder.endings, left_out, checked, set(trained))
            if self.history == "content":
                past = [message.without_reasoning() for message in own]
            else:
                past = [finder.template.in_history(*both) for both in zip(checked, own, strict=True)]
            before = [message.as_dict for message in past]
            answered = [self._turn(render, finder, before[:number], own[number], number) for number in trained]
            stretches = find_stretches(render, past[: trained[-1]], answered[-1].prompt)
            dropped = left_out.roles(checked[: trained[-1]])
        samples = self._tokenize(answered, trained, stretches)
        how = [turn.how for turn in answered]
        self._tell(set(how), dropped)
        return Encoded(samples, how, trained, answered, render.seconds, render.n_calls, dirty)

    def _in_form(
        self, render: Renderer, endings: Endings, left_out: LeftOut, messages: list[Message], trained: set[int]
    ) -> tuple[list[Message], dict[int, str]]:
        """The messages as the template takes them, and those that are accepted though they are dirty. Raises where one
        that is trained on is dirty."""
        in_form: list[Message] = []
        dirty: dict[int, ConversationError] = {}
        template = endings.template
        pairs, end = dirt.pairs_with(template.markers), template.prompt_end
        for number, message in enumerate(messages):
            message = message.without(*TRAINING_KEYS)
            if message.role == "assistant":
                half = dirt.unopened(message.text, pairs)
                if half and in_form and not message.reasoning.strip():
                    prompt = render.attempt([earlier.as_dict for earlier in in_form], True) or ""
                    asked = in_form[-1].text.strip()  # a text that ends in a marker opens nothing
                    if dirt.opened_by(prompt, end, half) and not (asked and prompt.rstrip().endswith(asked)):
                        message = dirt.with_reasoning_before(message, half[1])
                one = left_out.with_one_reasoning(message)
                if number in trained:
                    left_out.check_reasoning(message, number)
                    if found := list(dirt.find(message, one, number, pairs, endings)):
                        dirty[number] = next((error for error in found if error.reason not in self.accept), found[0])
                    message = one
            with blaming(number):
                in_form.append(template.in_form(message))
        dirt.refuse(dirty, self.accept)
        return in_form, {number: found.reason for number, found in dirty.items()}

    def _turn(
        self, render: Renderer, finder: Turns, before: list[dict[str, Any]], message: Message, number: int
    ) -> Turn:
        if not before:
            raise BadMessage(
                "the conversation begins with an assistant message, and inference has nothing to answer there; mark it "
                "with train: false",
                number,
            )
        turn = finder.find(render, before, message, number, render(before, True))
        refuse_half(turn.target, number)  # reasoning that the template never writes is rendered nowhere
        return turn

    def _tell(self, how: set[str], dropped: list[str]) -> None:
        for kind in sorted(how & set(REMARKS) - self._told):
            self._told.add(kind)
            log.log(logging.WARNING if kind == "thinking off" else logging.INFO, REMARKS[kind])
        for messages in dropped:
            if messages not in self._told:
                self._told.add(messages)
                log.warning(
                    f"the chat template leaves out {messages}: what they say is in no sample, as it would be in no "
                    "prompt; say it in another role, or take another template"
                )

    def _tokenize(self, answered: list[Turn], trained: list[int], stretches: list[Stretch]) -> list[Sample]:
        turn_of = {number: n for n, number in enumerate(trained)}
        running, samples = Running(self.tokens), []
        running.foresee(turn.prompt + turn.target for turn in answered)
        history = History(stretches, answered[-1].prompt, running, turn_of)
        for number, turn in zip(trained, answered, strict=True):
            with blaming(number):
                before, target = running.sample(turn.prompt, turn.target)
            n_prompt = sum(len(piece.ids) for piece in before)
            n_reasoning = 0
            if turn.response:
                n_reasoning = running.count(turn.prompt + turn.target[: turn.response]) - n_prompt
                n_reasoning = min(max(n_reasoning, 0), len(target) - 1)
            roles, turns = history.of(turn.prompt, n_prompt)
            samples.append(
                Sample(
                    joined(before),
                    array("q", target),
                    roles,
                    repeated(Role.REASONING, n_reasoning) + repeated(Role.RESPONSE, len(target) - n_reasoning),
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
    assistants = [number for number, message in enumerate(messages) if message.role == "assistant"]
    if not assistants:
        raise NothingToTrain("the conversation has no assistant message; leave it out")
    if turns is None:
        wanted = set(assistants)
    elif isinstance(turns, str) and turns == "last":
        wanted = {assistants[-1]}
    elif isinstance(turns, Iterable) and not isinstance(turns, str | bytes):
        numbers = [n.item() if hasattr(n, "item") else n for n in turns]  # of arrays too
        wrong = [n for n in numbers if not isinstance(n, int) or not -len(assistants) <= n < len(assistants)]
        if wrong:
            raise ConversationError(
                f"turns: {wrong[0]!r} is none of the {len(assistants)} assistant messages; give numbers from 0 on"
            )
        wanted = {assistants[n] for n in numbers}
    else:
        raise ConversationError(f'turns: expected "last" or numbers of assistant messages, found {turns!r}')
    trained = [number for number in assistants if is_trained(number, messages[number]) and number in wanted]
    if not trained:
        raise NothingToTrain(
            "every assistant message is excluded from training (train: false, loss: false, weight: 0, or turns); "
            "leave one in"
        )
    return trained


_encoders: dict[Any, Encoder] = {}

KEPT = 8
"""Encoders that are kept: one a tokenizer and set of options, the ones used last."""


def encoder_of(tokenizer: Any, **options: Any) -> Encoder:
    """The encoder for a tokenizer as it is now, kept from call to call."""
    if not hasattr(tokenizer, "added_tokens_decoder"):
        raise ConversationError(
            f"tokenizer: expected a tokenizer of transformers, found {type(tokenizer).__name__}; give "
            "AutoTokenizer.from_pretrained(...), or of a processor its tokenizer"
        )
    tokens = str(tokenizer.added_tokens_decoder), str(tokenizer.special_tokens_map), len(tokenizer)
    now = (str(getattr(tokenizer, "chat_template", None)), *tokens)
    key = (id(tokenizer), now, repr(sorted(options.items())))  # the encoder holds the tokenizer: its id stays its own
    encoder = _encoders.pop(key, None) or Encoder(tokenizer, **options)
    _encoders[key] = encoder
    if len(_encoders) > KEPT:
        del _encoders[next(iter(_encoders))]
    return encoder
