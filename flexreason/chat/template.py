"""What a chat template does, found by probing it: never by its name, and never by looking at users' text."""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from flexreason.chat.markers import KNOWN_MARKERS, Markers
from flexreason.chat.messages import CLOSE, OPEN, REASONING_FIELDS, Message, take_apart
from flexreason.chat.probes import AGAIN, ANSWER, STORED, SYSTEM, THOUGHT, USER, assistant, calling, part, tool, user
from flexreason.chat.render import Messages, Renderer
from flexreason.chat.seam import find_seam, first_part
from flexreason.chat.texts import common_prefix


class Template:
    """One template with its options, and what was found out about it. `render` must be without the user's texts."""

    def __init__(self, render: Renderer, think: tuple[str, str] | None = None) -> None:
        tokenizer = render.tokenizer
        self.render, self.think = render, think
        self._content_forms: dict[str, str] = {}
        self._takes_out: dict[tuple[bool, str], bool] = {}
        self.eos, self.bos = tokenizer.eos_token, tokenizer.bos_token
        added = tokenizer.added_tokens_decoder.values()
        self.special = _any_of([*(str(t.content) for t in added if t.special), *tokenizer.all_special_tokens])
        self.added = _any_of([*(str(t.content) for t in added), *tokenizer.all_special_tokens])

    def probe(self, messages: Messages, prompt: bool = False) -> str | None:
        """The text, or None where the template raises, behind a system message too."""
        text = self.render.attempt(messages, prompt)
        if text is None and messages[0]["role"] != "system":
            for content in (SYSTEM, [{"type": "text", "text": SYSTEM}]):
                text = text or self.render.attempt([{"role": "system", "content": content}, *messages], prompt)
        return text

    # --- which form of a message the template takes

    @cached_property
    def calls_need_content(self) -> bool:
        """Whether a call raises that has no content, and one whose content is empty does not."""
        form = "string" if self.argument_form == "string" else "object"
        asked, empty = self.take([user(USER), calling(form)])
        without = {key: value for key, value in empty.items() if key != "content"}
        return self.probe([asked, without]) is None and self.probe([asked, empty]) is not None

    def content_form(self, role: str) -> str:
        """ "any", "string" or "parts": which contents of this role come out as their texts. Where nothing does, that of
        a user."""
        if role not in self._content_forms:
            text, parts = self._comes_out(role, ANSWER), self._comes_out(role, [part(ANSWER), part(AGAIN)])
            form = "any" if text and parts else "parts" if parts else "string"
            nothing = role != "user" and not (text or parts)
            self._content_forms[role] = self.content_form("user") if nothing else form
        return self._content_forms[role]

    def _comes_out(self, role: str, content: str | list[dict[str, Any]]) -> bool:
        """Whether all texts of a content come out, and nothing of how it is stored, wherever such a message stands."""
        question, call = user(USER), calling("string" if self.argument_form == "string" else "object", value=THOUGHT)
        around: dict[str, list[tuple[Messages, Messages]]] = {
            "user": [([], [])],
            "assistant": [([question], []), ([question], [question])],
            "system": [([], [question])],
            "developer": [([], [question])],
        }
        marks = [content] if isinstance(content, str) else [each["text"] for each in content]
        message = {**tool(""), "role": role, "content": content}
        for before, behind in around.get(role, [([question, call], [])]):
            text = self.probe([*self.take(before), message, *self.take(behind)], True) or ""
            if STORED in text or any(mark not in text for mark in marks):
                return False
        return True

    @cached_property
    def argument_form(self) -> str:
        """ "any", "object" or "string": which tool arguments come out as themselves; "none" where calls never do."""
        objects, texts = (self._with_arguments(form) for form in ("object", "string"))
        if objects and texts:  # a template with a syntax of its own for objects may write a text into it as it is
            return "any" if objects == texts or "{'key'" in objects else "object"
        return "object" if objects else "string" if texts else "none"

    def _with_arguments(self, form: str) -> str | None:
        """A call's rendering, where its arguments come out of it as themselves."""
        call = calling(form)
        without_content = {key: value for key, value in call.items() if key != "content"}
        for message in (call, without_content):
            text = self.probe([user(USER), message])
            if text is not None and ANSWER in text:
                return None if form == "string" and re.search(r'\\+"key\\+"', text) else text
        return None

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The reasoning fields that the template renders in the last message."""
        texts = {name: self.probe([user(USER), assistant(ANSWER, **{name: THOUGHT})]) for name in REASONING_FIELDS}
        shown = tuple(name for name, text in texts.items() if text is not None and THOUGHT in text)
        return shown or tuple(name for name in REASONING_FIELDS if self._around_reasoning(name))

    def _around_reasoning(self, field: str) -> tuple[str, str] | None:
        """What the template writes between the user's text and reasoning, and behind that: before an answer, else
        before an answer with a call, else before a call alone, less what the call itself begins with."""
        form = "string" if self.argument_form == "string" else "object"
        call_alone = calling(form)
        for message in (assistant(ANSWER), calling(form, value=AGAIN, content=ANSWER), call_alone):
            head = self._before_answer(message, {field: THOUGHT})
            if head.count(THOUGHT) != 1 or AGAIN in head:
                continue
            before, behind = head.split(THOUGHT)
            if message is not call_alone:
                return before, behind
            call = self._before_answer(message).removeprefix(self._before_answer(assistant(ANSWER)))
            return (before, behind.removesuffix(call)) if call and behind.endswith(call) else None
        return None

    def _before_answer(self, message: dict[str, Any], more: Mapping[str, Any] | None = None) -> str:
        """What stands between the user's text and ANSWER in a message, with `more` said in it."""
        asked, taken = self.take([user(USER), message])
        text = self.probe([asked, {**taken, **(more or {})}]) or ""
        return text.rpartition(USER)[2].partition(ANSWER)[0] if 0 <= text.rfind(USER) < text.find(ANSWER) else ""

    @cached_property
    def splits_inline(self) -> bool:
        """Whether inline reasoning comes out just as a reasoning field does, in every place."""
        inline = assistant(f"{OPEN}\n{THOUGHT}\n{CLOSE}\n\n{ANSWER}")
        field = assistant(ANSWER, **{(self.fields or REASONING_FIELDS)[0]: THOUGHT})
        [asked, again] = self.take([user(USER), user(AGAIN)])
        forms = [self._in_forms(take_apart(message)).as_dict for message in (inline, field)]
        for around in ([asked, None], [asked, None, again], [asked, None, again, None]):
            texts = [self.probe([message or form for message in around]) or "" for form in forms]
            if texts[0] != texts[1] or ANSWER not in texts[0]:
                return False
        return True

    # --- reasoning

    @cached_property
    def prompt_end(self) -> str:
        """What follows the last user's text in a prompt: the end of that message and the generation prompt."""
        text = self.probe(self.take([user(USER)]), True) or ""
        return text.rpartition(USER)[2]

    @cached_property
    def closed(self) -> str:
        """What follows the last user's text where no generation prompt is asked for."""
        return (self.probe(self.take([user(USER)])) or "").rpartition(USER)[2]

    @cached_property
    def asks(self) -> str:
        """What a prompt ends with because generation is asked for, from its header on."""
        plain = self._before_answer(assistant(ANSWER))
        return self.asked(self.prompt_end, plain, "" if self.appends_always else self.closed)

    def asked(self, known: str, lead: str, closed: str | None) -> str:
        """What of a prompt's end is there only because generation is asked for: all of it where that is unknown, and
        no example of an answer that stands before the header.

        Args:
            known: What follows the last text in the prompt.
            lead: What follows it in a rendering, up to the message's own text.
            closed: What follows it where no generation prompt is asked for.
        """
        closed = closed if closed and known.startswith(closed) else ""
        asked = known[len(closed) :] or known
        closing, header = self.markers.closing, first_part(lead.removeprefix(closed), self.added)
        if header is None or (closing and asked.rstrip().endswith(closing)):  # which may end as a header does
            return asked
        return asked[max(asked.rfind(header.group()), 0) :]

    @cached_property
    def begins(self) -> str:
        """What an answer begins with behind the header that the prompt has; nothing where that is unknown."""
        plain, opening = self._before_answer(assistant(ANSWER)), self.markers.opening
        known = self.closed + self.asks.partition(opening)[0] if opening in self.asks and opening else self.prompt_end
        seam = find_seam(known, plain, self.closed, opening, self.added)
        return plain[seam.end :] if seam and not seam.more.strip() else ""

    @cached_property
    def markers(self) -> Markers:
        """What surrounds reasoning: shown by the template, else of the names that people use."""
        if self.think is not None:
            return Markers(*self.think, origin="option")
        shown = self._shown_markers()
        if shown:
            return shown
        source, tokens = self.render.source, self.render.tokenizer.get_vocab()
        for origin, known in (("template", source), ("vocabulary", tokens)):
            for opening, closing in KNOWN_MARKERS:
                if closing in known and (opening in known or origin == "template"):
                    return Markers(f"{opening}\n", f"\n{closing}\n\n", origin)
        return Markers("<think>\n", "\n</think>\n\n", "text")

    def _shown_markers(self) -> Markers | None:
        if not self.fields or not (around := self._around_reasoning(self.fields[0])):
            return None
        head, close = around
        plain = self._before_answer(assistant(ANSWER))
        header = plain if plain and head.startswith(plain) else head
        seam = find_seam(self.prompt_end, header, self.closed, "", self.added)
        opening = head[seam.end :] if seam else ""
        if not opening.strip():  # the prompt opens the block itself
            word = re.search(r"(<[^<>\s]+>|\[[^\[\]\s]+\])\s*$", head)
            opening = head[len(header) :] or (word.group(0) if word else opening)
            own = head[len(self.shared(head, plain)) :]
            if own.strip() and opening.strip() in plain:  # the same tag ends the header of every answer
                opening = own
        close, begins = self._without_beginning(close, plain, head.removesuffix(opening), opening.strip())
        return Markers(opening, close, "template", begins)

    def _without_beginning(self, close: str, plain: str, header: str, opening: str) -> tuple[str, str]:
        """What closes a block of reasoning, without what every answer begins with, and that.

        Args:
            close: What stands between reasoning and answer.
            plain: What stands before an answer without reasoning, and `header`, before the opening marker.
        """
        begins = plain.removeprefix(header) if plain.startswith(header) else ""
        closing = next((closing for known, closing in KNOWN_MARKERS if known in opening), "")
        if closing and closing in begins:  # an empty block, or what closes it
            begins = begins.partition(closing)[2].lstrip()
        elif opening and opening in begins:
            begins = ""
        rest = close.removesuffix(begins)
        own = begins.strip() and rest != close and rest.strip() and not header.endswith(rest.strip())
        return (rest, begins) if own else (close, "")

    @cached_property
    def appends_always(self) -> bool:
        """Whether the generation prompt comes even when it is not asked for."""
        asked, unasked = (self.probe(self.take([user(USER)]), prompt) for prompt in (True, False))
        return asked is not None and asked == unasked

    def shared(self, one: str, other: str) -> str:
        """What two texts begin with both, no token of them cut, and no tag or word that goes on otherwise."""
        both = self.whole(self.whole(common_prefix(one, other), one), other)
        if both in (one, other):
            return both
        token = max((token.end() for token in self.added.finditer(both)), default=0)
        return both[: max(token, len(re.sub(r"\S+$", "", both)))]

    def whole(self, prefix: str, text: str) -> str:
        """A prefix of a text, cut so that no added token of the text is cut."""
        for token in self.added.finditer(text):
            if token.start() < len(prefix) < token.end():
                return text[: token.start()]
        return prefix

    # --- messages as this template takes them

    def take(self, messages: Messages) -> Messages:
        """Messages of a probe in the forms that the template takes."""
        return [self.in_form(take_apart(message)).as_dict for message in messages]

    def in_history(self, given: Message, message: Message) -> Message:
        """A message, in the form that the template takes, as the prompts of later turns have it: with inline reasoning
        as it was given, where the template takes that out of history itself and leaves its line breaks. Where a prompt
        had opened the block, it was given without its opening tag."""
        opened = bool(message.fields and not given.fields and CLOSE in given.text) and not given.inline
        if not (given.inline or opened) or message.inline or not isinstance(given.as_dict["content"], str):
            return message
        takes_out = self._takes_inline_out(bool(given.functions), "" if opened else f"{OPEN}\n")
        if not takes_out:
            return message
        taken = self._in_forms(message.without_reasoning().changed(content=given.text))
        return replace(taken, reasoning=message.reasoning, response=message.response, inline=True)

    def _takes_inline_out(self, calls: bool, opening: str) -> bool:
        """Whether inline reasoning of an answer, or of one with calls, is left out in history as a field's is, but for
        white space."""
        if (calls, opening) not in self._takes_out:
            form = "string" if self.argument_form == "string" else "object"
            answered = calling(form, value=AGAIN, content=ANSWER) if calls else assistant(ANSWER)
            inline = {**answered, "content": f"{opening}{THOUGHT}\n{CLOSE}\n\n{ANSWER}"}
            field = {**answered, (self.fields or REASONING_FIELDS)[0]: THOUGHT}
            more = [tool(""), assistant("x"), user(USER)] if calls else [user(USER), assistant("x"), user(USER)]
            found = []
            for behind in (more[:1], more):
                texts = [self._in_forms(take_apart(message)).as_dict for message in (inline, field)]
                shown = [self.probe([*self.take([user(USER)]), text, *self.take(behind)], True) or "" for text in texts]
                alike = len({re.sub(r"\s", "", text) for text in shown}) == 1
                found.append(alike and ANSWER in shown[0] and THOUGHT not in shown[0])
            self._takes_out[calls, opening] = all(found)
        return self._takes_out[calls, opening]

    def in_form(self, message: Message) -> Message:
        """The message in the forms that the template takes, changed only where it would come out wrong."""
        if message.inline and not (self.splits_inline and isinstance(message.as_dict["content"], str)):
            message = message.with_field((self.fields or REASONING_FIELDS)[0])
        return self._in_forms(message)

    def _in_forms(self, message: Message) -> Message:
        """The same, but inline reasoning stays inline."""
        if message.functions and "content" not in message.as_dict and self.calls_need_content:
            message = message.changed(content="")
        if message.functions and self.argument_form in ("object", "string"):
            message = message.with_arguments(self.argument_form)
        if message.fields and self.fields and not set(message.fields) & set(self.fields):
            message = message.with_field(self.fields[0])
        content = message.as_dict.get("content")
        if isinstance(content, list) and self.content_form(message.role) == "string":
            return message.changed(content=message.text)
        if isinstance(content, str) and self.content_form(message.role) == "parts":
            return message.changed(content=[{"type": "text", "text": content}])
        return message


def _any_of(texts: list[str]) -> re.Pattern[str]:
    ordered = sorted({text for text in texts if text.strip()}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or "(?!)")
