"""Which tokens of a prompt are earlier answers, and which earlier reasoning.

Only the template knows, and it does not say: an answer that is `5` may stand in a dozen other places of a prompt. So
the messages are rendered once more with a mark in the place of every such text, and the longest prompt is held against
that rendering. Other prompts are known as far as they agree with it. Losses need none of this: roles and turns
describe a layout.
"""

from array import array
from bisect import bisect_right
from dataclasses import dataclass

from flexreason.chat.messages import Message
from flexreason.chat.probes import MARK
from flexreason.chat.render import Renderer
from flexreason.chat.texts import common_prefix, places_of
from flexreason.chat.tokens import Piece, Running, Tokens
from flexreason.tree.sample import Role


@dataclass(frozen=True)
class Stretch:
    """A stretch of a prompt's text that an earlier message has said."""

    start: int
    end: int
    message: int
    role: Role


def find_stretches(render: Renderer, messages: list[Message], prompt: str) -> list[Stretch]:
    """Where answers and reasoning stand in the prompt of these messages; none where the prompt is not the marked
    rendering filled in."""
    base = next(mark for n in range(10**6) if (mark := MARK.format(f"h{n}")) not in prompt)
    marked, texts, said = [], {}, {}
    for number, message in enumerate(messages):
        marks = {}
        if message.role == "assistant":
            for role, text in ((Role.REASONING, message.reasoning), (Role.CONTEXT, message.response)):
                if text:
                    marks[role] = f"{base}{number}{role.name}"
                    texts[marks[role]], said[marks[role]] = text, (number, role)
        marked.append(_with_marks(message, marks.get(Role.REASONING), marks.get(Role.CONTEXT)).as_dict)
    if not texts or (rendering := render.attempt(marked, True)) is None:
        return []
    return [Stretch(start, end, *said[mark]) for start, end, mark in places_of(rendering, texts, prompt)[0]]


def _with_marks(message: Message, reasoning: str | None, response: str | None) -> Message:
    """The message with marks for its texts, each where it stood."""
    if not (message.inline and isinstance(message.as_dict["content"], str)):
        return message.with_texts(reasoning, response)
    block = message.text[: len(message.text) - len(message.response)]
    block = block.replace(message.reasoning, reasoning) if reasoning else block
    return message.changed(content=block + (response or ""))


class History:
    """Roles and turns of the longest prompt's tokens, and of others as far as they agree with it."""

    def __init__(self, stretches: list[Stretch], prompt: str, running: Running, turn_of: dict[int, int]) -> None:
        self.prompt, self.ends, self.counts = prompt, [0], [0]  # tokens up to the end of each stretch
        pieces = running.pieces(prompt) if stretches else []
        starts, counts = [0], [0]
        for piece in pieces:
            starts.append(starts[-1] + len(piece.text))
            counts.append(counts[-1] + len(piece.ids))
        self.roles, self.turns = repeated(Role.PROMPT, counts[-1]), repeated(-1, counts[-1])

        def index(place: int) -> int:
            n = bisect_right(starts, place) - 1
            return counts[n] + (_count(pieces[n], place - starts[n], running.tokens) if n < len(pieces) else 0)

        for stretch in stretches:
            low, high = index(stretch.start), min(index(stretch.end), counts[-1])
            self.roles[low:high] = repeated(stretch.role, high - low)
            if stretch.message in turn_of:
                self.turns[low:high] = repeated(turn_of[stretch.message], high - low)
            self.ends.append(stretch.end)
            self.counts.append(high)

    def of(self, prompt: str, n: int) -> tuple[array | None, array | None]:
        """Roles and turns of a prompt with n tokens; None where nothing is known of it."""
        agreed = len(prompt) if self.prompt.startswith(prompt) else len(common_prefix(prompt, self.prompt))
        known = min(self.counts[bisect_right(self.ends, agreed) - 1], n)
        if not known:
            return None, None
        return (
            self.roles[:known] + repeated(Role.PROMPT, n - known),
            self.turns[:known] + repeated(-1, n - known),
        )


def repeated(value: int, n: int) -> array:
    return array("q", [value]) * n


def _count(piece: Piece, characters: int, tokens: Tokens) -> int:
    """How many tokens the piece's first characters are."""
    return len(tokens.whole(piece.text[:characters])) if characters else 0
