"""What a turn is, as text, and the pattern that turns of one shape have in common."""

from dataclasses import dataclass

from flexreason.chat.calls import lost_call
from flexreason.chat.ending import Stop
from flexreason.chat.marks import Marked
from flexreason.chat.messages import Message
from flexreason.chat.texts import places_of


@dataclass(frozen=True)
class Turn:
    """A sample as text: the prompt that inference sends, and what the model must generate after it."""

    prompt: str
    target: str
    response: int  # where in `target` the response begins, behind all reasoning; 0 where nobody can tell
    how: str  # it was found: "rendered", "spliced", "empty block" or "thinking off"


@dataclass(frozen=True)
class Pattern:
    """What the template writes behind the prompt for messages of one shape, learned from a marked rendering.

    `marked` is that text, with `marks` for the reasoning, the content and the name of the first call, up to the token
    that stops generation; where there are calls, up to the first one's name.
    """

    marked: str
    marks: dict[str, str]  # "r", "c", "n0": the mark
    end: str  # from the stop token on
    kept: int  # characters of `end` that belong to the target
    stop: Stop

    def fit(self, prompt: str, whole: str, message: Message) -> Turn | None:
        """The turn, if the rendering is the prompt and then this pattern, filled with the message's own texts."""
        if not whole.startswith(prompt) or not whole.endswith(self.end):
            return None
        functions = message.functions
        if any(self.stop.text in text for text in message.all_texts):
            return None  # nobody knows which of them stops generation
        texts = {"r": message.reasoning, "c": message.response, "n0": functions[0]["name"] if functions else ""}
        body = whole[len(prompt) : len(whole) - len(self.end)]
        places, at = places_of(self.marked, {mark: texts[slot] for slot, mark in self.marks.items()}, body)
        if at < 0 or (not functions and at < len(body)):
            return None
        if functions and lost_call(functions, body[places[-1][0] :]):
            return None
        target = body + self.end[: self.kept] + (self.stop.text if self.stop.appended else "")
        return Turn(prompt, target, self._response(places), "rendered")

    def _response(self, places: list[tuple[int, int, str]]) -> int:
        marks = [mark for _, _, mark in places]
        behind = marks.index(self.marks["r"]) + 1 if "r" in self.marks else len(marks)
        return places[behind][0] if behind < len(places) else 0


def learned(
    message: Message, marked: Marked, places: dict[str, int], shown: str, whole: str, kept: int, stop: Stop
) -> Pattern | None:
    """What stands around the slots as a pattern, where a rendering shows all of them in order and how it ends.

    Args:
        places: Where the marks stand in what is shown behind the prompt; `whole` is the same of the message itself.
        kept: How many characters of what the message ends with belong to it.
    """
    slots = [slot for slot in marked.marks if slot in ("r", "c", "n0")]
    marks = {slot: marked.marks[slot] for slot in slots}
    order = [places[slot] for slot in marks]
    if order != sorted(order) or (message.functions and "n0" not in marks):
        return None
    last = max(at + len(marked.marks[slot]) for slot, at in places.items())
    tail = shown[last:]
    if any(mark in tail for mark in marked.marks.values()) or not whole.endswith(tail) or kept > len(tail):
        return None
    begin = kept if stop.appended else kept - len(stop.text)
    until = places["n0"] + len(marks["n0"]) if message.functions else last + begin
    return Pattern(shown[:until], marks, tail[begin:], kept - begin, stop)
