"""Text to tokens as inference has them: the prompt alone, the target behind it.

`prompt_ids` are the tokens of the prompt alone, since inference tokenizes it before anything is generated. Where they
begin the tokens of prompt and target together, the target is the rest of these; where not (two line breaks that meet
there would be one token), the target is encoded by itself so that prompt and target decode to the same text.

Renderings of one conversation have most text in common. Where probes show that this tokenizer takes the text between
two added tokens by itself, it is tokenized once and its tokens are used again; other tokenizers get the whole text
every time.
"""

import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from flexreason.chat.errors import NoStopToken, TokenBoundary

AWKWARD = (
    "", " ", "  ", "\n", "\n\n", " \n", "\t", "a", " a", "a ", "Word", "1", "12 ", ".", "'s", "é", "\u0301x",
    "x\u0300", "漢字", "🙂", "\u200d", "<", ">", "</", "|", "_", "▁", "##a", "\r\n", "\u00a0",
)  # fmt: skip
"""What may stand beside an added token: texts that tokenizers join, strip or normalise."""


@dataclass(frozen=True)
class Piece:
    """A stretch of text that is tokenized by itself."""

    text: str
    ids: array  # of "q"


NO_IDS = array("q")


class Tokens:
    """One tokenizer, and whether its tokens can be put together from pieces."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.added: dict[str, int] = tokenizer.added_tokens_encoder
        self.splitter, self.longest = self._splitter()

    def whole(self, text: str) -> list[int]:
        """The tokens of a text, as apply_chat_template makes them."""
        return self.many([text])[0]

    def many(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        if not getattr(self.tokenizer, "is_fast", False):
            return [self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
        return self.tokenizer(texts, add_special_tokens=False, verbose=False, padding=False, truncation=False)[
            "input_ids"
        ]

    def _splitter(self) -> tuple[re.Pattern[str] | None, int]:
        """A pattern that finds the added tokens before which a text can be cut, or None where probes show otherwise."""
        if not getattr(self.tokenizer, "is_fast", False):
            return None, 0
        added = self.tokenizer.added_tokens_decoder.values()
        first = [token for token in added if not token.normalized and token.content]
        clean = {
            t.content for t in first if not (t.lstrip or t.rstrip or t.single_word or t.content != t.content.strip())
        }
        if not clean or any(token.single_word for token in added):  # which looks at what stands behind it
            return None, 0
        # leftmost and longest among all tokens found before normalising, as the tokenizer itself does
        ordered = sorted((token.content for token in first), key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, ordered)))
        longest = max(map(len, ordered))
        self.clean = clean
        return (pattern, longest) if self._cuts_are_safe(sorted(clean)) else (None, 0)

    def _cuts_are_safe(self, clean: list[str]) -> bool:
        """Whether texts before an added token, and from it on, have the tokens that they have alone."""
        some = clean if len(clean) <= 4 else [clean[0], clean[len(clean) // 3], clean[2 * len(clean) // 3], clean[-1]]
        right = [(token, text) for token in some for text in AWKWARD]
        pairs = [
            (left, token + text) for token, text in right for left in (*AWKWARD[:: max(1, len(some) // 2)], some[0])
        ]
        pairs += [("a", token + text) for token in clean for text in ("a", " ", "")]
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        alone = dict(zip(texts, self.many(texts), strict=True))
        together = self.many([left + tail for left, tail in pairs])
        return all(ids == alone[left] + alone[tail] for ids, (left, tail) in zip(together, pairs, strict=True))

    def cut(self, text: str) -> list[str]:
        """The text in pieces, each but the first beginning with an added token."""
        if self.splitter is None:
            return [text] if text else []
        places = [token.start() for token in self.splitter.finditer(text) if token.group() in self.clean]
        edges = [0, *places, len(text)]
        return [text[start:end] for start, end in pairwise(edges) if end > start]


class Running:
    """Tokenizes the renderings of one conversation one after the other, taking over what they share."""

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        self.last: list[Piece] = []
        self.known: dict[str, Piece] = {}

    def foresee(self, texts: Iterable[str]) -> None:
        """Tokenize what is new in all of these texts at once, which the tokenizer shares out among its threads."""
        before: list[Piece] = self.last
        new: dict[str, None] = {}
        for text in texts:
            shared, at = self._shared(text)
            fresh = self.tokens.cut(text[at:])
            new.update(dict.fromkeys(fresh))
            self.last = shared + [Piece(part, NO_IDS) for part in fresh]
        self.last = before
        self._learn(new)

    def _learn(self, parts: Iterable[str]) -> None:
        missing = [part for part in dict.fromkeys(parts) if part not in self.known]
        for part, ids in zip(missing, self.tokens.many(missing), strict=True):
            self.known[part] = Piece(part, array("q", ids))

    def pieces(self, text: str) -> list[Piece]:
        """The text in pieces with their tokens."""
        shared, at = self._shared(text)
        fresh = self.tokens.cut(text[at:])
        self._learn(fresh)
        self.last = shared + [self.known[part] for part in fresh]
        return self.last

    def _shared(self, text: str) -> tuple[list[Piece], int]:
        """The pieces of the last text that this one begins with, and where the first other one begins.

        The last that agree are cut anew: what follows may make another token of their ends.
        """
        at, count, agreed = 0, 0, self.last
        if self.tokens.splitter is None:
            return [], 0
        while count < len(agreed) and text.startswith(agreed[count].text, at):
            at += len(agreed[count].text)
            count += 1
        reach = at
        while count and reach - at < self.tokens.longest + 1:
            count -= 1
            at -= len(agreed[count].text)
        return agreed[:count], at

    def sample(self, prompt: str, target: str) -> tuple[list[Piece], Sequence[int]]:
        """The prompt's pieces, and the tokens of the target behind it."""
        before = self.pieces(prompt)
        both = self.pieces(prompt + target)
        same = 0
        while same < len(before) and before[same] is both[same]:
            same += 1
        rest, all_ = joined(before[same:]), joined(both[same:])
        if all_[: len(rest)] == rest and len(all_) > len(rest):
            ids: Sequence[int] = all_[len(rest) :]
        else:
            ids = self._behind(before, target)
        self._check_end(target, ids)
        return before, ids

    def _check_end(self, target: str, ids: Sequence[int]) -> None:
        """Raise unless the token that the target ends with is its last one: generation stops at an id, not at a text,
        and some tokenizers spell a token out."""
        added = self.tokens.added
        stop = max((text for text in added if text and target.endswith(text)), key=len, default=None)
        if stop is not None and ids[-1] != added[stop]:
            raise NoStopToken(
                f"the target ends with {stop!r}, and the tokenizer does not make the token {added[stop]} of that here, "
                "so nothing would stop generation; add it as AddedToken(..., special=True, normalized=False)"
            )

    def _behind(self, before: list[Piece], target: str) -> Sequence[int]:
        """Tokens of the target that decode, behind the prompt's, to prompt and target."""
        near = before[-1:]
        text, ids = "".join(piece.text for piece in near), joined(near).tolist()
        decode = self.tokens.tokenizer.decode
        wanted = {text + target, _decode(decode, self.tokens.whole(text + target))}
        for candidate in self._candidates(target):
            if candidate and _decode(decode, ids + candidate) in wanted:
                return array("q", candidate)
        raise TokenBoundary(
            f"no tokens of {target[:40]!r}... behind a prompt that ends with {text[-40:]!r} decode to the same "
            "text; say train: false in that message"
        )

    def _candidates(self, target: str) -> list[list[int]]:
        """Ways to encode a target by itself: behind something that can be taken off again."""
        candidates = [self.tokens.whole(target)]
        special = getattr(self.tokens, "clean", None) or set(self.tokens.tokenizer.all_special_tokens)
        for anchor in [*sorted(special)[:3], "\n", ".", "x", "é"]:
            alone, both = self.tokens.whole(anchor), self.tokens.whole(anchor + target)
            if both[: len(alone)] == alone:
                candidates.append(both[len(alone) :])
        for size in (1, 2):  # the beginning by itself, and what follows behind it
            head = self.tokens.whole(target[:size])
            both = self.tokens.whole(target[:size] + target[size:])
            if both[: len(head)] != head and len(target) > size:
                candidates.append(head + self.tokens.whole(target[size:]))
        return candidates

    def count(self, text: str) -> int:
        """How many tokens a text that begins the last one has: for roles, where a token on the edge does not matter."""
        at, total = 0, 0
        for piece in self.last:
            if at + len(piece.text) > len(text):
                rest = text[at:]
                return total + (len(self.tokens.whole(rest)) if rest else 0)
            at += len(piece.text)
            total += len(piece.ids)
        return total


def joined(pieces: list[Piece]) -> array:
    """The tokens of all pieces."""
    ids = array("q")
    ids.frombytes(b"".join([piece.ids.tobytes() for piece in pieces]))
    return ids


def _decode(decode: Any, ids: list[int]) -> str:
    return decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
