"""Token ids as the text that they stand for, a piece a token, so that the pieces joined are the text.

A tokenizer cannot be asked for that: a character may be several tokens, and some tokenizers write the space before a
word only where something stands before it.

>>> from flexreason.demo.material import make_tokenizer
>>> tokenizer = make_tokenizer()
>>> Reader(tokenizer).pieces(tokenizer("<bot>né")["input_ids"])
['<bot>', 'n', 'é', '']
>>> Reader(None).pieces([7, 12])
['7 ', '12 ']
"""

import unicodedata
from collections.abc import Sequence
from typing import Any

MISSING = "\ufffd"
"""What decoding gives for bytes that are no whole character."""

MOST = 16
"""Tokens that are tried together to make whole characters."""

JOINERS = "\u200c\u200d"
"""Characters without a form of their own that writing needs: in emoji and in Persian."""


class Reader:
    """Reads token ids with a tokenizer; without one a piece is the id itself."""

    def __init__(self, tokenizer: Any = None) -> None:
        self.tokenizer = tokenizer
        self.added = frozenset(getattr(tokenizer, "added_tokens_decoder", ()))
        """Tokens that stand for themselves: special ones and markers such as <think>."""
        self._alone: dict[int, str] = {}

    def text(self, ids: Sequence[int]) -> str:
        """The text of some tokens."""
        return "".join(self.pieces(ids))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token. A character of several tokens stands at the first of them; the others are empty."""
        pieces: list[str] = []
        while len(pieces) < len(ids):
            at = len(pieces)
            piece, n = self._piece(ids[at]), 1
            if MISSING in piece:
                for end in range(at + 2, min(at + MOST, len(ids)) + 1):
                    together = self._decode(ids[at:end])
                    if MISSING not in together:
                        piece, n = together, end - at
                        break
            pieces += [piece, *[""] * (n - 1)]
        return pieces

    def _piece(self, token: int) -> str:
        """A token's text behind other text: what decoding it twice gives more than decoding it once."""
        if token not in self._alone:
            once = self._decode([token])
            self._alone[token] = self._decode([token, token])[len(once) :] if self.tokenizer is not None else once
        return self._alone[token]

    def _decode(self, ids: Sequence[int]) -> str:
        if self.tokenizer is None:
            return "".join(f"{token} " for token in ids)
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def printable(text: str) -> str:
    """A text whose control characters, which could move a cursor or turn a line around, stand as their names.

    >>> printable("a\\x1b[2J\\u202eb")
    'a⟨U+001B⟩[2J⟨U+202E⟩b'
    """
    if text.isprintable():
        return text
    return "".join(f"⟨U+{ord(c):04X}⟩" if _is_control(c) else c for c in text)


def _is_control(character: str) -> bool:
    if character in "\n\t" or character in JOINERS:
        return False
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def width_of(text: str) -> int:
    """Columns of a terminal that a text takes.

    >>> width_of("né"), width_of("漢字"), width_of("e\\u0301")
    (2, 4, 1)
    """
    if text.isascii():
        return len(text)
    return sum(_columns(character) for character in text)


def _columns(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
