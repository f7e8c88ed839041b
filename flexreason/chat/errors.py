"""What is said of conversations, templates and tokenizers that cannot be encoded exactly, and what can be done."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

OTHER = "; set tokenizer.chat_template to another one"
"""What can be done about a template."""

ALONE = "; say train: false in this message, or set tokenizer.chat_template to another one"
"""What can be done about a message that a template does not take apart."""

CHANGE = "; change the message to what the template takes, or leave the conversation out"
"""What can be done where a template raises: by its own words, as it means to."""


class ConversationError(ValueError):
    """A conversation, template or tokenizer that cannot be encoded exactly; `reason` names the class it belongs to."""

    reason = "cannot be encoded"
    dirty: Mapping[str, int] = MappingProxyType({})
    """How many dirty answers of each reason the conversation has, where it is refused for one."""

    def __init__(self, text: str, message: int | None = None) -> None:
        self.text, self.message = text, message
        super().__init__(text if message is None else f"message {message}: {text}")

    def __reduce__(self) -> Any:
        return type(self), (self.text, self.message)


class BadMessage(ConversationError):
    reason = "bad message"


class NothingToTrain(ConversationError):
    reason = "nothing to train"


class NoTemplate(ConversationError):
    reason = "no chat template"


class TemplateRaised(ConversationError):
    reason = "template error"


class TemplateRunsAway(ConversationError):
    reason = "template out of bounds"


class TemplateThrowsDice(ConversationError):
    reason = "template draws at random"


class NotRendered(ConversationError):
    reason = "message not rendered by the template"


class NotAligned(ConversationError):
    reason = "prompt and answer do not fit together"


class NoStopToken(ConversationError):
    reason = "no stop token"


class StopsWithin(ConversationError):
    reason = "stop token before the end"


class TokenBoundary(ConversationError):
    reason = "target cannot be tokenized behind its prompt"


@contextmanager
def blaming(number: int) -> Iterator[None]:
    """Within it, errors that name no message name this one."""
    try:
        yield
    except ConversationError as error:
        if error.message is not None:
            raise
        raise type(error)(error.text, number) from error
