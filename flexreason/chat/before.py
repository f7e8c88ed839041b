"""What stands before an assistant message, seen behind its last text.

The prompt and the rendering of the message are compared behind a mark that is put at the end of the last text before
the message. So what the template writes there, and leaves out once an answer follows, is seen by itself; and the *seam*
(seam.py) is where the one goes on from the other.
"""

from functools import cached_property
from typing import Any

from flexreason.chat.errors import ALONE, NotAligned
from flexreason.chat.marks import Marked, joined
from flexreason.chat.probes import user
from flexreason.chat.render import Messages, Renderer
from flexreason.chat.seam import Seam, find_seam, says_something
from flexreason.chat.template import Template


class Before:
    """The messages before assistant message `number`, as one template renders them.

    Args:
        base: What marks begin with.
    """

    def __init__(self, template: Template, render: Renderer, messages: Messages, number: int, base: str) -> None:
        self.template, self.render, self.number, self.base = template, render, number, base
        self.mark = base + "w"
        self.messages = [*messages[:-1], _appended(messages[-1], self.mark)]

    def tails(self, *messages: dict[str, Any]) -> list[str]:
        """What follows the last text before a message: in the prompt, and in the rendering of each of these."""
        texts = [
            self.render.attempt(self.messages, True),
            *(self.render.attempt([*self.messages, message], False) for message in messages),
        ]
        if any(text is None or self.mark not in text for text in texts):
            raise NotAligned(
                "the chat template renders the messages before this one differently once it is there, and does not "
                f"show where they end{ALONE}",
                self.number,
            )
        return [joined(self.base, text.rpartition(self.mark)[2]) for text in texts if text is not None]

    @cached_property
    def closed(self) -> str | None:
        """What follows the last text where no generation prompt is asked for."""
        unasked = self.render.attempt(self.messages, False)
        return unasked.rpartition(self.mark)[2] if unasked and self.mark in unasked else None

    def asked(self, known: str, lead: str) -> str:
        """What of a prompt's end is there only because generation is asked for: all of it where that is unknown, and
        no example of an answer that stands before the header."""
        return self.template.asked(known, lead, self.closed)

    def behind_text(self, prompt: str) -> str:
        """What a prompt ends with because generation is asked for, and none of the texts before that, which may end as
        the template's own does."""
        asks = self.template.asks
        if says_something(asks, self.template.added) and prompt.endswith(asks):
            return asks
        return self.asked(self.tails()[0], "")

    def seam(self, known: str, lead: str, marked: Marked, plain: bool, block: str = "") -> Seam:
        """How much of the lead the prompt holds; its own open block of reasoning stands behind that.

        Args:
            known: What follows the last text in the prompt.
            lead: What follows it in the rendering of the marked message, up to the first mark.
            plain: Whether the message has no reasoning.
            block: What the prompt has behind `known`: a closed block of reasoning.
        """
        opening, added, closed = self.template.markers.opening, self.template.added, self.closed
        seam = find_seam(known, lead, closed, opening, added)
        if seam is None:
            blocks = [text.rfind(opening) if opening in text else len(text) for text in (known, lead)]
            seam = find_seam(known[: blocks[0]], lead[: blocks[1]], closed, opening, added)
            seam = seam and Seam(seam.end, seam.more + known[blocks[0] :])
        if seam is None or not self._is_attribute(seam, lead, closed):
            begun = seam.more.strip() if seam and seam.end == len(lead) else ""
            seam = self._without_header(known, lead, closed, marked, block) or (
                seam if plain and begun and not says_something(begun, added) else None  # a sign opens no block
            )
            if seam is None and begun:
                raise NotAligned(
                    f"the chat template's prompt goes on with {begun[:60]!r} behind the header, and this message does "
                    "not: it may begin an answer or a block of reasoning; if it opens a block, say so with "
                    f"think=(before, behind); else,{ALONE[1:]}",
                    self.number,
                )
        if seam is None:
            raise self.no_seam(known, lead)
        return seam

    def no_seam(self, known: str, lead: str) -> NotAligned:
        return NotAligned(
            f"the chat template's prompt ends with {known[-60:]!r}, and this message begins with {lead[-60:]!r}: "
            f"neither goes on from the other, so what the model must generate here is unknown{ALONE}",
            self.number,
        )

    def _is_attribute(self, seam: Seam, lead: str, closed: str | None) -> bool:
        """Whether the prompt has no more than an attribute that the lead has not: one line without added tokens, behind
        a header that both have. The prompt's own block of reasoning is not counted."""
        markers = self.template.markers
        begins = [at for at in map(seam.more.find, filter(None, (markers.opening, markers.closing))) if at >= 0]
        attribute = seam.more[: min(begins, default=len(seam.more))]
        header = lead[len(closed) if closed and lead.startswith(closed) else 0 : seam.end]
        one_line = not self.template.added.search(attribute) and "\n" not in attribute.strip()
        return not attribute.strip() or (bool(begins) and one_line and says_something(header, self.template.added))

    def _without_header(self, known: str, lead: str, closed: str | None, marked: Marked, block: str) -> Seam | None:
        """The seam where the prompt ends with a header and this message has none, since its turn has already begun.

        The same message is rendered behind a user's text, where it has the header. If it goes on behind that header
        just as it begins here, then only the header is missing here.
        """
        if closed is None or not (known.startswith(closed) and lead.startswith(closed)):
            return None
        mark = self.base + "u"
        question = self.template.take([user(mark)])[0]
        texts = [
            self.render.attempt(messages, prompt)
            for messages, prompt in (([question], False), ([question], True), ([question, marked.message], False))
        ]
        if any(text is None or mark not in text for text in texts):
            return None
        ended, asked, answered = (text.rpartition(mark)[2] for text in texts if text is not None)
        header, begins = ended + known[len(closed) :], lead[len(closed) :] + self.base
        alike = any(answered.startswith(asked_with + begins) for asked_with in (header, header + block))
        return Seam(len(closed)) if alike and asked == header + block else None


def _appended(message: dict[str, Any], mark: str) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list):
        return {**message, "content": [*content, {"type": "text", "text": mark}]}
    return {**message, "content": (content or "") + mark}
