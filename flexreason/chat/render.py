"""A chat template as a function from messages to text, rendered safely.

Templates come from strangers. They are rendered by `tokenizer.apply_chat_template`, that is, in the sandbox that
transformers uses, and never in plain jinja. Around it stand four guards: the clock is frozen, so that all samples
of a conversation bear one date; what would come out otherwise the next time is refused; a template that runs too long
or takes too much memory is stopped; text beyond a size is refused. What goes wrong is raised as a
`ConversationError`, in the template's own words.
"""

import contextvars
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

from flexreason.chat.bounds import OutOfBounds, bounded, huge_product
from flexreason.chat.errors import (
    CHANGE,
    OTHER,
    BadMessage,
    ConversationError,
    NoTemplate,
    TemplateRaised,
    TemplateRunsAway,
    TemplateThrowsDice,
)
from flexreason.chat.writable import half_character, has_half_character
from flexreason.talk.nearest import misspelt

Messages = list[dict[str, Any]]

LONGEST = 64_000_000
"""Characters that one rendering may have."""

OURS = {
    "add_generation_prompt", "continue_final_message", "conversation", "max_length", "messages", "padding",
    "return_assistant_tokens_mask", "return_dict", "return_tensors", "sanitize_control_tokens", "tokenize",
    "tokenizer_kwargs", "tools", "truncation",
}  # fmt: skip
"""Arguments of apply_chat_template that would change what a sample is."""

OF_ENCODE = ("tools", "history", "turns", "think", "accept")
"""Options of encode that a misspelt one may mean. It would reach the template, which says nothing of it."""

NOT_OPTIONS = {
    "chat_template_kwargs": "give its options one by one",
    "template_options": "give them one by one",
    "skip_invalid": "give it to what goes over all conversations",
    "turns": "give it to encode, or to EntryEncoder",
}
"""What is no template's option, and what to do instead."""

ADDRESS = re.compile(r" at (0x[0-9a-f]+)", re.IGNORECASE)
"""How Python writes an object that has no text of its own: a function, or a filter's result that is no list yet."""

PLACE = re.compile("0x[0-9a-f]+")
"""Such a place, whatever stands before it."""

_NOW: contextvars.ContextVar[datetime | None] = contextvars.ContextVar("flexreason_now", default=None)


_DRAWN: contextvars.ContextVar[str] = contextvars.ContextVar("flexreason_drawn", default="")
"""What a rendering drew at random with."""


@contextmanager
def frozen_clock(at: datetime | None = None) -> Iterator[None]:
    """Within it every rendering sees one moment; the outermost one counts."""
    token = _NOW.set(_NOW.get() or at or datetime.now())
    try:
        yield
    finally:
        _NOW.reset(token)


def _strftime_now(format: str) -> str:
    return (_NOW.get() or datetime.now()).strftime(format)


class Renderer:
    """One tokenizer's template with tools and options: messages to text.

    `plain(messages, prompt)` may raise whatever apply_chat_template raises; `__call__` raises ConversationErrors only.
    With `probing`, texts may be others the next time: what a template does with a probe need not occur with messages.
    """

    def __init__(
        self, tokenizer: Any, tools: list[Any] | None, options: dict[str, Any], *, probing: bool = False
    ) -> None:
        if taken := sorted(OURS & set(options)):
            raise ConversationError(f"{taken[0]} is not an option of the template, and encode decides it; leave it out")
        self.tokenizer, self.tools, self.options, self.probing = tokenizer, tools, options, probing
        self.source = template_source(tokenizer, tools, options)
        self.n_calls, self.seconds = 0, 0.0
        _check_source(self.source)
        variables = _variables(self.source)
        for name in (name for name in options if name not in variables):
            if near := misspelt(name, variables) or misspelt(name, OF_ENCODE, closeness=0.8):
                raise ConversationError(f"the chat template has no option {name!r}; did you mean {near!r}?")
            if hint := NOT_OPTIONS.get(name):
                raise ConversationError(f"{name} is no option of the chat template; {hint}")

    def __call__(self, messages: Messages, prompt: bool, blame: int | None = None) -> str:
        """The text; errors blame message `blame`, or the first with which the rendering fails."""
        try:
            return self._once_for_all(messages, prompt)
        except ConversationError:
            raise
        except Exception as error:
            number = self._first_failing(messages, str(error)) if blame is None else blame
            role = messages[number].get("role") if number < len(messages) else None
            about = f" ({role})" if role else ""
            raise TemplateRaised(f"the chat template raises{about}: {_words(error)}{CHANGE}", number) from error

    def plain(self, messages: Messages, prompt: bool) -> str:
        start = time.perf_counter()
        try:
            with bounded():
                text = self.tokenizer.apply_chat_template(
                    messages, tools=self.tools, add_generation_prompt=prompt, tokenize=False, **self.options
                )
        except OutOfBounds as error:
            raise TemplateRunsAway(f"the chat template was stopped: {error}{OTHER}") from None
        finally:
            self.n_calls += 1
            self.seconds += time.perf_counter() - start
        if not isinstance(text, str):
            raise TemplateRaised(f"expected text of the chat template, found {type(text).__name__}")
        if len(text) > LONGEST:
            raise TemplateRunsAway(
                f"the chat template was stopped: it made {len(text)} characters, more than {LONGEST}{OTHER}"
            )
        if half_character(text) is not None:
            refuse_half(text, next((n for n, message in enumerate(messages) if has_half_character(message)), None))
        return text

    def _once_for_all(self, messages: Messages, prompt: bool) -> str:
        """The text, which would be the same the next time; or, of a probe, any."""
        _DRAWN.set("")
        text = self.plain(messages, prompt)
        if not self.probing and (drawn := _DRAWN.get() or self._address(text, messages)):
            raise _throws_dice(drawn)
        return text

    def _address(self, text: str, messages: Messages) -> str | None:
        """That a text has an object's place in memory which nobody has said; None if it has not."""
        if not any(sign in text for sign in (" at 0x", " AT 0X", " At 0X")):
            return None
        said = set(PLACE.findall(str((messages, self.tools, self.options, self.source)).lower()))
        own = next((found for found in ADDRESS.finditer(text) if found.group(1).lower() not in said), None)
        if own is None:
            return None
        return f"it writes an object by its place in memory, {text[max(0, own.start() - 30) : own.end()]!r}"

    def attempt(self, messages: Messages, prompt: bool) -> str | None:
        """The text, or None where the template raises."""
        try:
            return self._once_for_all(messages, prompt)
        except ConversationError:
            raise
        except Exception:
            return None

    def _first_failing(self, messages: Messages, words: str) -> int:
        """The first message with which the rendering fails in these words."""
        for number in range(len(messages)):
            try:
                self.plain(messages[: number + 1], False)
            except ConversationError:
                break
            except Exception as error:
                if str(error) == words:
                    return number
        return len(messages) - 1


def template_source(tokenizer: Any, tools: list[Any] | None, options: dict[str, Any]) -> str:
    """The template that apply_chat_template would take."""
    try:
        source = tokenizer.get_chat_template(options.get("chat_template"), tools)
    except Exception as error:
        raise NoTemplate(
            f"the tokenizer has no chat template to use; set tokenizer.chat_template, or pass chat_template=... "
            f"({_words(error)})"
        ) from error
    if not isinstance(source, str) or not source.strip():
        raise NoTemplate("the tokenizer's chat template is empty; set tokenizer.chat_template, or pass chat_template=")
    return source


def unknown_options(tokenizer: Any, options: Mapping[str, Any]) -> list[str]:
    """Options that the template does not ask for; none where there is no template."""
    names = [name for name in options if name not in (*OF_ENCODE, "chat_template")]
    if tokenizer is None or not names:
        return []
    try:
        variables = _variables(template_source(tokenizer, None, dict(options)))
    except NoTemplate:
        return []
    return [name for name in names if name not in variables]


def _words(error: BaseException) -> str:
    text = str(error).strip()
    return f"{text[:500]} [{type(error).__name__}]" if text else type(error).__name__


def _check_source(source: str) -> None:
    """Raise where a template is no jinja, or one whose samples nobody can know; and let it ask our clock."""
    if product := huge_product(source):
        raise TemplateRunsAway(f"the chat template was stopped before it ran: it computes {product!r}{OTHER}")
    try:
        with bounded():
            compiled = _compiled(source)
    except ImportError:
        raise
    except OutOfBounds as error:
        raise TemplateRunsAway(f"the chat template was stopped while it was compiled: {error}{OTHER}") from None
    except Exception as error:
        line = getattr(error, "lineno", None)
        where = f", line {line}" if line else ""
        raise NoTemplate(f"the chat template is no valid jinja{where}: {_words(error)}{OTHER}") from error
    if drawn := _dice(source):
        raise _throws_dice(drawn)
    compiled.environment.filters["random"], compiled.globals["lipsum"] = _noted_dice()
    # not handed in as a variable: transformers makes plain data of variables, and functions are none
    compiled.globals["strftime_now"] = _strftime_now


def _compiled(source: str) -> Any:
    """The compiled template that transformers keeps and renders."""
    from transformers.utils import chat_template_utils

    return chat_template_utils._compile_jinja_template(source)


@lru_cache(maxsize=64)
def _variables(source: str) -> frozenset[str]:
    """What a template takes from outside. Other options mean nothing to it."""
    from jinja2 import meta

    return frozenset(meta.find_undeclared_variables(_compiled(source).environment.parse(source)))


@lru_cache(maxsize=64)
def _dice(source: str) -> str | None:
    """What a template draws at random with, as far as its text names it: so it is refused whatever is rendered."""
    from jinja2 import nodes

    filters = _compiled(source).environment.parse(source).find_all(nodes.Filter)
    if any(filter.name == "random" for filter in filters):
        return "the filter random"
    return "lipsum()" if "lipsum" in _variables(source) else None


@lru_cache(maxsize=1)
def _noted_dice() -> tuple[Any, Any]:
    """The filter random and lipsum() as all templates have them, which leave word that they were called: by whatever
    name, and in the user's own renderings too, which may draw."""
    from jinja2.defaults import DEFAULT_FILTERS, DEFAULT_NAMESPACE

    return _noted(DEFAULT_FILTERS["random"], "the filter random"), _noted(DEFAULT_NAMESPACE["lipsum"], "lipsum()")


def _noted(draw: Any, name: str) -> Any:
    @wraps(draw)
    def noted(*args: Any, **kwargs: Any) -> Any:
        _DRAWN.set(name)
        return draw(*args, **kwargs)

    return noted


def _throws_dice(drawn: str) -> TemplateThrowsDice:
    return TemplateThrowsDice(
        f"the chat template draws at random ({drawn}): each rendering is another one, and there is no telling what "
        "inference will see; set tokenizer.chat_template to one without it"
    )


def refuse_half(text: str, number: int | None) -> None:
    """Raise where a text that is to be tokenized has half a character, which is message `number`'s."""
    if (at := half_character(text)) is not None:
        raise BadMessage(
            f"a text was cut within a character, {text[max(0, at - 20) : at + 1]!r}: half of it is none, and no "
            "tokenizer takes it; leave it out",
            number,
        )
