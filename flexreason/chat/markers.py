"""What stands around reasoning, and whether a text has opened or closed a block of it."""

from dataclasses import dataclass

KNOWN_MARKERS = (
    ("<think>", "</think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("[THINK]", "[/THINK]"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
)
"""Pairs that surround reasoning, tried where a template does not show its own by rendering a reasoning field."""


@dataclass(frozen=True)
class Markers:
    """What stands before reasoning, and between reasoning and response."""

    open: str
    close: str
    origin: str  # "template", "vocabulary", "option" or "text"
    begins: str = ""  # what an answer begins with behind them, and without them too

    @property
    def opening(self) -> str:
        """The tag that opens a block, without the white space around it."""
        return self.open.strip()

    @property
    def closing(self) -> str:
        """The tag that closes a block, without what the template writes behind it."""
        close = self.close.strip()
        known = (closing for opening, closing in KNOWN_MARKERS if opening in self.open and close.startswith(closing))
        return next(known, close)

    def opened_by(self, text: str) -> bool:
        """Whether a prompt that ends with `text` leaves a reasoning block open."""
        closed = text.rfind(self.closing) if self.closing else -1
        return bool(self.opening) and text.rfind(self.opening) > closed

    def around(self, text: str) -> bool:
        """Whether a text holds a reasoning block, empty or not."""
        return bool(self.opening) and 0 <= text.find(self.opening) < text.find(self.closing)

    def block(self, text: str) -> bool:
        """Whether a text is an opened block of reasoning, or a closed one without any."""
        left = text.strip().removeprefix(self.opening).strip()
        return bool(self.opening) and text.strip().startswith(self.opening) and left in ("", self.closing)

    def closed_by(self, text: str) -> bool:
        """Whether the last tag in a text closes a block."""
        return bool(self.closing) and text.rfind(self.closing) > text.rfind(self.opening)

    def begin_of_closed(self, text: str) -> int:
        """Where the closed block begins that a prompt ends with; its opening marker may be missing."""
        ends = text.rfind(self.closing)
        begins = text.rfind(self.opening, 0, ends) if self.opening else -1
        return ends if begins < 0 or self.closing in text[begins:ends] else begins

    def rest_of_open(self, prompt: str) -> str:
        """What of `open` a prompt that has opened the block has not written yet."""
        written = prompt[prompt.rfind(self.opening) :]
        return self.open.lstrip()[len(written) :] if self.open.lstrip().startswith(written) else ""
