"""How messages end: what stops generation behind an answer or a tool call, and what of a message's end belongs to it.

What stands behind an answer whatever follows it, and ends a user's message too, stops generation. Where nothing is
written there, it has to be appended.
"""

import re
from dataclasses import dataclass
from functools import cached_property

from flexreason.chat.probes import AGAIN, ANSWER, USER, assistant, calling, tool, user
from flexreason.chat.render import Messages
from flexreason.chat.seam import first_part
from flexreason.chat.template import Template
from flexreason.chat.texts import common_prefix, common_suffix


@dataclass(frozen=True)
class Stop:
    """How a message ends.

    Args:
        text: What stops generation: it stands behind the message, or has to be appended to it.
        appended: Whether it has to be appended.
        guessed: Whether it is only the first special token there, and nothing else says that it stops generation.
        behind: The text that an appended one has to follow.
    """

    text: str
    appended: bool
    guessed: bool = False
    behind: str = ""


class Endings:
    """How messages end with one template."""

    def __init__(self, template: Template) -> None:
        self.template = template
        self.eos, self.bos = template.eos, template.bos

    @cached_property
    def stop(self) -> Stop | None:
        """How a plain answer ends."""
        return self._find_stop([assistant(ANSWER)], [user(AGAIN)])

    @cached_property
    def call_stop(self) -> Stop | None:
        """How a tool call ends, whatever its arguments are: what is written around a text, and not around a number, is
        no part of that."""
        form = "object" if self.template.argument_form in ("any", "object") else "string"
        number = self._rendered([calling(form, value=7)])
        return self._find_stop([calling(form)], [tool(AGAIN)], number)

    def stops(self, calls: bool) -> list[str]:
        """All that stops generation in an answer, with tool calls in it or without."""
        found = [self.stop, self.call_stop if calls else None]
        return list(dict.fromkeys([*(stop.text for stop in found if stop), *([self.eos] if self.eos else [])]))

    @cached_property
    def tokens(self) -> list[str]:
        """Every token that may stop generation, behind an answer or a tool call."""
        call = self.call_stop if self.template.argument_form != "none" else None
        texts = [*self.stops(False), *([call.text] if call and not call.guessed else [])]
        return list(dict.fromkeys(token for text in texts for token in self.template.added.findall(text) or [text]))

    def of(self, tail: str, calls: bool) -> tuple[int, Stop] | None:
        """How many characters of what a message ends with belong to it, and how it stops."""
        known = [stop for stop in ((self.call_stop if calls else None), self.stop) if stop]
        for stop in known:
            if not stop.appended and (at := tail.find(stop.text)) >= 0:
                return at + len(stop.text), stop
            if stop.appended and re.search(r"\w", common_suffix(stop.behind, tail.rstrip())):
                return len(tail.rstrip()), stop
        if not self.template.appends_always and (run := self._run(tail)):
            stop = self._end_of_turn(tail) or Stop(run, False, guessed=True)
            return tail.find(stop.text) + len(stop.text), stop
        if not known:
            return None
        kept = self._without_prompt(tail) if self.template.appends_always else tail
        stop = next((stop for stop in known if stop.appended), known[0])
        return len(kept.rstrip()), stop

    def _find_stop(self, answer: Messages, more: Messages, with_number: str = "") -> Stop | None:
        tail = self._behind(ANSWER, answer)
        between = self._behind(ANSWER, [*answer, *more]).partition(AGAIN)[0]
        asked = self._behind(ANSWER, answer, prompt=True)
        if with_number:
            around = self._behind_token(tail, len(tail) - len(common_suffix(tail, with_number)))
            if tail[around:].strip() and between.startswith(tail[:around]):
                tail, between, asked = tail[around:], between[around:], asked[around:]
        if self.template.appends_always:
            tail = self._without_prompt(tail)
        always = self.template.whole(common_prefix(tail, between), tail)
        for text in (always, self.template.whole(common_prefix(tail, asked), tail)):
            if stop := self._end_of_turn(text):
                return stop
        if between.startswith(tail) and (stop := self._end_in_history(tail, between)):
            return stop
        if run := self._run(always):
            return Stop(run, False, guessed=True)
        if stop := self._end_of_turn(tail):
            return stop
        if run := self._run(tail):
            return Stop(run, False, guessed=True)
        after_tail = between[len(tail) :] if between.startswith(tail) else between
        if (next_role := self.template.special.match(after_tail.lstrip())) and next_role.group() != self.bos:
            return Stop(next_role.group(), True)
        return Stop(self.eos, True) if self.eos else None

    def _rendered(self, answer: Messages, prompt: bool = False) -> str:
        """A question and these messages; nothing where the template raises."""
        return self.template.probe(self.template.take([user(USER), *answer]), prompt) or ""

    def _behind(self, mark: str, answer: Messages, prompt: bool = False) -> str:
        """What follows the last of a mark where these are rendered; nothing where it does not come out."""
        text = self._rendered(answer, prompt)
        return text.rpartition(mark)[2] if mark in text else ""

    def _end_in_history(self, tail: str, between: str) -> Stop | None:
        """What ends a turn directly behind what a message ends with, and is written once another message follows."""
        stop = self._end_of_turn(between[len(tail) :])
        end = between.find(stop.text, len(tail)) + len(stop.text) if stop else 0
        text = between[len(tail.rstrip()) : end]
        only_tokens = not self.template.added.sub("", text).strip()
        return Stop(text, True, behind=tail.rstrip()) if stop and only_tokens else None

    def _end_of_turn(self, text: str) -> Stop | None:
        """The eos_token, or the first token that ends a user's message too: of what stands behind every answer, these
        stop generation, whether flagged special or not, and whatever stands before them."""
        if self.eos and self.eos in text:
            return Stop(self.eos, False)
        ends = (token for token in self.template.added.findall(text) if token in self._ends_users)
        token = next((token for token in ends if token != self.bos), None)
        return Stop(token, False) if token else None

    @cached_property
    def _ends_users(self) -> list[str]:
        """The token that ends a user's message: the last one there, since others may stand before it that end no turn.
        Where the answer's header cannot be told from that end, all tokens between a user's text and an answer."""
        template = self.template
        closed = self._behind(USER, [])
        between = self._rendered([assistant(ANSWER), user(AGAIN)]).partition(USER)[2].partition(ANSWER)[0]
        size = next((n for n in range(min(len(closed), len(between)), 0, -1) if closed.endswith(between[:n])), 0)
        header = first_part(template.prompt_end.removeprefix(closed), template.added)  # where it begins, if it shows
        at = between.rfind(header.group()) if header and template.prompt_end.startswith(closed) else 0
        for end in (between[:size], between[: max(at, 0)], template.shared(closed, between)):
            tokens = [token for token in template.added.findall(end) if token != self.bos]
            if tokens and not template.appends_always:
                return tokens[-1:]
        return template.added.findall(template.prompt_end + between)

    def _without_prompt(self, tail: str) -> str:
        """The end of a message without a generation prompt that nobody asked for."""
        return tail[: self._behind_token(tail, len(tail) - len(common_suffix(tail, self.template.prompt_end)))]

    def _behind_token(self, text: str, at: int) -> int:
        """A place in a text, or, where it stands within an added token, the place behind that."""
        return next(
            (token.end() for token in self.template.added.finditer(text) if token.start() < at < token.end()), at
        )

    def _run(self, text: str) -> str:
        """The first special tokens in a text that stand side by side, without one that begins a text."""
        special = self.template.special
        first = special.search(text)
        if not first or first.group() == self.bos != self.eos:
            return ""
        end = first.end()
        while (more := special.match(text, end)) and more.group() != self.bos:
            end = more.end()
        return text[first.start() : end]
