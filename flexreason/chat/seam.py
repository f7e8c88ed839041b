"""Where generation begins in a rendering that does not begin with the prompt.

Templates write things that are gone once an answer follows: a suffix on the last user's text, tools behind it, a
reminder in a turn of its own, an attribute in the generation prompt. Both are then seen behind the last text that
they have in common: `known` is what the prompt has there, `lead` what the rendering has before the message's first own
text, and the question is how much of `lead` the prompt holds already.

    known   " /think<end><bot>"      the prompt: suffix, end of the user's message, header
    lead    "<end><bot><think>"      the rendering: the same end and header, and the message's opening marker
                       ^ the seam: from here on it is the model that writes

The header must be found whole in both, and is never guessed: with another role name in the prompt, nobody knows what
the model should write next, and there is no seam.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Seam:
    """Where the model begins to write.

    `end` is how many characters of the lead the prompt holds already. `more` is what the prompt has behind these, and
    the lead has not.
    """

    end: int
    more: str = ""


def find_seam(known: str, lead: str, closed: str | None, opening: str, added: re.Pattern[str]) -> Seam | None:
    """The seam, or None where the prompt does not show it.

    Args:
        closed: what follows the common text where no generation prompt is asked for: the end of that message, where
            the lead begins with it.
        opening: what opens a block of reasoning; no attribute holds it.
        added: finds the tokenizer's added tokens.
    """
    if lead.startswith(known):
        return Seam(len(known))
    if opening and opening in lead and opening not in known:
        lead = lead[: lead.rfind(opening)]  # the block is the model's, even where its tokens end headers too
    prompt = known[len(closed) :] if closed is not None and known.startswith(closed) else ""
    seam = _find(known, lead, closed, prompt, opening, added)
    ended = _overlap(closed or "", lead, added)
    rest = lead[ended:]
    first = first_part(rest, added)
    header = first.group() + re.split(r"\W", rest[first.end() :], maxsplit=1)[0] if first else ""
    if seam and seam.end <= ended and header and header in prompt:
        return None  # the prompt has the header, and something else behind it
    return seam


def _find(known: str, lead: str, closed: str | None, prompt: str, opening: str, added: re.Pattern[str]) -> Seam | None:
    """The seam, if the prompt shows it in one of the ways that templates have. `prompt` is what it asks with."""
    starts = [0, *([len(closed)] if closed and lead.startswith(closed) else [])]
    for start in starts:
        if size := _overlap(known, lead[start:], added):
            return Seam(start + size)
    if known.startswith(lead):
        return Seam(len(lead), known[len(lead) :])
    at = lead.find(prompt)
    if says_something(prompt, added) and lead.count(prompt) == 1 and _between_tokens(lead, at, added):
        return Seam(at + len(prompt))
    if (first := first_part(prompt, added)) and (at := lead.rfind(first.group())) >= 0:
        starts.append(at)
    for start in starts:
        if size := _around_insertion(known, lead[start:], opening, added):
            return Seam(start + size)
    return _from_header(known, lead, opening, added)


def _overlap(known: str, header: str, added: re.Pattern[str]) -> int:
    """The longest beginning of the header, by whole tokens and words, with which the prompt ends."""
    for size in range(min(len(known), len(header)), 0, -1):
        part = header[:size]
        if known.endswith(part) and says_something(part, added):
            begins = len(known) - size
            if _between_tokens(header, size, added) and _between_tokens(known, begins, added):
                return size
    return 0


def _around_insertion(known: str, header: str, opening: str, added: re.Pattern[str]) -> int:
    """How much of the header the prompt holds, if it ends with the header and one text inserted; else 0.

    For example the prompt has `assistant effort=high`, a line break, and the header has `assistant`, a line break.
    """
    first = first_part(header, added)
    if first is None or (start := known.rfind(first.group())) < 0:
        return 0
    asked, header_ = known[start:], header[first.start() :]
    size = next((n for n, (a, b) in enumerate(zip(asked, header_, strict=False)) if a != b), 0)
    while size and not (_between_tokens(header_, size, added) and _between_tokens(asked, size, added)):
        size -= 1
    if not says_something(header_[:size], added):
        return 0
    rest, inserted = header_[size:], asked[size:]
    behind = next((n for n in range(min(len(rest), len(inserted) - 1), 0, -1) if inserted.endswith(rest[:n])), 0)
    attribute = inserted[:-behind] if behind else ""
    if attribute.endswith(">") and not rest[:behind].strip():  # a block of an unknown kind, and its own line break
        return 0
    if not attribute or "\n" in attribute or (opening and opening in attribute):  # whole lines are another message
        return 0
    return first.start() + size + behind


def _from_header(known: str, lead: str, opening: str, added: re.Pattern[str]) -> Seam | None:
    """The seam where one text goes on from the other, counted from the last added token that both texts have.

    Where they share no added token, it is counted from the last line that both have, or else from the last word.
    """
    for pattern in (added, re.compile(r"[^\n]*\w[^\n]*"), re.compile(r"\w+")):
        shared = [match for match in pattern.finditer(known) if match.group() in lead]
        if shared:
            break
    else:
        return None
    start, at = shared[-1].start(), lead.rfind(shared[-1].group())
    if not _between_tokens(lead, at, added):
        return None
    before = _before(known, start, added), _before(lead, at, added)
    in_header = pattern is added and all(begun for _, begun in before)
    names = [text.strip() if in_header else re.split(r"\s", text)[-1] for text, _ in before]
    at_once = bool(opening) and known.startswith(opening, start) and not names[0]  # the block, without any header
    if names[0] != names[1] and (all(names) or (in_header and not at_once)):  # <head>model</head>, <head>robot</head>
        return None
    asked, header = known[start:], lead[at:]
    if header.startswith(asked):
        return Seam(at + len(asked))
    if asked.startswith(header):
        return Seam(len(lead), asked[len(header) :])
    size = _around_insertion(asked, header, opening, added)
    return Seam(at + size) if size else None


def first_part(text: str, added: re.Pattern[str]) -> re.Match[str] | None:
    """The first added token or word of a text: where a header begins."""
    matches = [match for match in (added.search(text), re.search(r"\w+", text)) if match]
    return min(matches, key=lambda match: match.start()) if matches else None


def _before(text: str, at: int, added: re.Pattern[str]) -> tuple[str, bool]:
    """What stands before a place, back to the last added token; and whether there is such a token."""
    begins = max((token.end() for token in added.finditer(text, 0, at)), default=0)
    return text[begins:at], begins > 0


def says_something(text: str, added: re.Pattern[str]) -> bool:
    """Whether a text holds a word or an added token: white space and punctuation show no header."""
    return bool(re.search(r"\w", text) or added.search(text))


def _between_tokens(text: str, at: int, added: re.Pattern[str]) -> bool:
    """Whether a text can be cut at a place without cutting an added token or a word."""
    if any(token.start() < at < token.end() for token in added.finditer(text)):
        return False
    if 0 < at < len(text) and re.match(r"\w\w", text[at - 1 : at + 1]):
        return any(at in token.span() for token in added.finditer(text))
    return True
