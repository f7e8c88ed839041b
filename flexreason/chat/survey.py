"""Finding a turn: what the model must generate behind a prompt, seen from renderings with marks.

With P the rendering of the messages before assistant message i, generation prompt included, and S the rendering up
to and with it, the target is mostly S without P, up to the token that stops generation. Mostly is not always, so
nothing is believed: the message is rendered again with *marks* in the places of its reasoning, content and calls,
and only where every mark comes out once, behind the prompt, is S without P the target. Else:

- S does not begin with P, since the template renders earlier messages differently: both are looked at behind the last
  text before message i, marked too, and the *seam* (seam.py) is where the one goes on from the other.
- The template does not render the reasoning: it is put where the model must generate it, behind the opening marker
  (the prompt's own, if it opens the block) and before the closing one.
- The prompt opens a reasoning block and the message has none: the block is closed at once, as the template closes it.
- The prompt has closed the block (thinking is off): the model generates no reasoning, and none is in the target.

And S must be the marked rendering with every mark replaced by its text: else the template looks into the texts, and
what it does with marks says nothing of what it does with them.

The marked rendering of one message teaches how others of its shape look; where S fits that pattern to the letter,
no second rendering is needed.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from flexreason.chat.messages import REASONING_FIELDS, Message, marked_arguments
from flexreason.chat.render import ALONE, ConversationError, Messages, NoStopToken, NotAligned, NotRendered, Renderer
from flexreason.chat.seam import Seam, find_seam, says_something
from flexreason.chat.template import MARK, Stop, Template, user
from flexreason.chat.texts import common_suffix, places_of
from flexreason.chat.turns import Pattern, Turn

QUOTES = "\"'\\"
"""What templates write around an argument that is text, and leave out around a number."""


class Turns:
    """Finds turns with one template; patterns learned are kept, each for messages of one shape."""

    def __init__(self, template: Template) -> None:
        self.template = template
        self.patterns: dict[Any, Pattern] = {}

    def find(self, render: Renderer, before: Messages, message: Message, number: int, prompt: str) -> Turn:
        """The turn of assistant message `number`, which stands behind `before`; both as the template takes them."""
        whole = render([*before, message.as_dict], False)
        shape = (
            before[-1]["role"],
            bool(message.reasoning.strip()),
            bool(message.fields),
            bool(message.response),
            isinstance(message.as_dict.get("content"), list),
            len(message.functions),
        )
        if (pattern := self.patterns.get(shape)) and (turn := pattern.fit(prompt, whole, message)):
            return turn
        survey = _Survey(self.template, render, before, message, number, prompt, whole)
        turn = survey.turn()
        if survey.pattern:
            self.patterns[shape] = survey.pattern
        return turn


@dataclass
class _Marked:
    """A message with marks in its slots, in the order r, c, n0, n1 ...; `wanted` are those that must come out."""

    message: dict[str, Any]
    marks: dict[str, str]
    wanted: list[str]


class _Survey:
    """One message looked at with marks. `pattern` is what was learned of it, if anything."""

    def __init__(
        self,
        template: Template,
        render: Renderer,
        before: Messages,
        message: Message,
        number: int,
        prompt: str,
        whole: str,
    ) -> None:
        self.template, self.render = template, render
        self.before, self.message, self.number = before, message, number
        self.prompt, self.whole = prompt, whole
        # templates take white space for none
        self.reasoning = message.reasoning if message.reasoning.strip() else ""
        self.response = message.response if message.response.strip() else ""
        self.pattern: Pattern | None = None
        texts = (whole, prompt, str(message.as_dict))
        marks = (MARK.format(f"s{n}") for n in range(10**6))
        self.base = next(mark for mark in marks if not any(mark in text for text in texts))

    def turn(self) -> Turn:
        marked = self._mark(self.message)
        shown = self.render.attempt([*self.before, marked.message], False)
        if shown is None:  # the template may know names, or look into contents
            marked = self._mark(self.message, calls=False)
            shown = self.render([*self.before, marked.message], False, blame=self.number)
        if not self._stands_for(marked, shown) and (seen := self._with_texts()):
            marked, shown = seen
        if shown.startswith(self.prompt) and self.whole.startswith(self.prompt):
            known, shown_tail, whole_tail = "", shown[len(self.prompt) :], self.whole[len(self.prompt) :]
            ahead = self.prompt
        else:
            known, shown_tail, whole_tail = self._align(marked.message)
            ahead = known
            if shown_tail.startswith(known) and whole_tail.startswith(known):
                shown_tail, whole_tail, known = shown_tail[len(known) :], whole_tail[len(known) :], ""
        return self._behind(marked, known, shown_tail, whole_tail, ahead)

    def _stands_for(self, marked: _Marked, shown: str) -> bool:
        """Whether the real rendering is the marked one with the texts in place of the marks.

        Arguments of tool calls need not be texts. So in a message with calls, only what stands before the first call
        is compared.
        """
        if not marked.wanted:
            return True  # nothing of it need come out
        texts = {"r": self.reasoning, "c": self.message.response}
        values = {mark: texts[slot] for slot, mark in marked.marks.items() if slot in texts}
        calls = [at for slot, mark in marked.marks.items() if slot not in texts and (at := shown.find(mark)) >= 0]
        if not calls:
            return places_of(shown, values, self.whole)[1] == len(self.whole)
        return places_of(shown[: min(calls)].rstrip(QUOTES), values, self.whole)[1] >= 0

    def _with_texts(self) -> tuple[_Marked, str] | None:
        """The message with a mark before and a mark behind each of its texts, and its rendering.

        So the template sees the texts too. In the rendering, each pair of marks with its text is written as one mark.
        None if the message has no texts.
        """
        marks = {slot: self.base + slot for slot, text in (("r", self.reasoning), ("c", self.response)) if text}
        bare = self.message.without_reasoning() if self.reasoning else self.message
        # an inline block without reasoning is one for some templates, and text for others
        for marked in (bare.without_reasoning(), bare):
            if "r" in marks:
                names = self.message.fields or REASONING_FIELDS[:1]
                marked = marked.changed(**dict.fromkeys(names, f"{marks['r']}b{self.reasoning}{marks['r']}e"))
            if "c" in marks:
                marked = marked.between(f"{marks['c']}b", f"{marks['c']}e")
            text = self.render.attempt([*self.before, marked.as_dict], False) or ""
            shown, values = self._joined(text), {pair.group(1): pair.group(2) for pair in self._pairs.finditer(text)}
            same = places_of(shown, values, self.whole)[1] == len(self.whole)
            if same and shown.startswith(self.prompt) == self.whole.startswith(self.prompt):  # no text is in the prompt
                return _Marked(marked.as_dict, marks, list(marks)), shown
        if not marks:
            return None
        raise NotRendered(
            "the chat template looks into the texts of this message, at their length or their words, and renders "
            f"others otherwise: what is its own and what the message's cannot be told apart{ALONE}",
            self.number,
        )

    @property
    def _pairs(self) -> re.Pattern[str]:
        """Finds a text between its two marks; the groups are the mark and the text."""
        return re.compile(f"({self.base}[rc])b(.*?)\\1e", re.DOTALL)

    def _joined(self, text: str) -> str:
        """A rendering in which each pair of marks, with the text between them, is written as one mark."""
        return self._pairs.sub(r"\1", text)

    def _behind(self, marked: _Marked, known: str, shown: str, whole: str, ahead: str) -> Turn:
        """The turn, from what stands behind the prompt, or, with `known`, behind the text before the prompt's end."""
        places = {slot: shown.find(mark) for slot, mark in marked.marks.items()}
        missing = [slot for slot in marked.wanted if places[slot] < 0]
        if lost := [slot for slot in missing if slot != "r"]:
            raise self._not_rendered(lost)
        for slot in marked.wanted:
            if slot in "rc" and shown.count(marked.marks[slot]) > 1:
                kind = "reasoning" if slot == "r" else "content"
                words = f"the chat template renders the {kind} of this message more than once{ALONE}"
                raise NotAligned(words, self.number)
        if max(places.values()) < 0:
            raise NotRendered(f"the chat template renders nothing of this message{ALONE}", self.number)
        first = min(at for at in places.values() if at >= 0)
        body, kept, stop = self._cut(shown, whole, max(places.values()))
        if not known:
            if self.reasoning and "r" in missing:
                return self._splice(ahead, body, shown[:first])
            if not missing and not (set(marked.marks) - set(marked.wanted)):
                self._learn(marked, places, shown, whole, kept, stop)
            return Turn(self.prompt, body, self._response(marked, places, shown, body), "rendered")
        lead = shown[:first]
        markers = self.template.markers
        off, opened, inside = markers.closed_by(known), markers.opened_by(known), places.get("r", -1) >= 0
        if not self.reasoning and (turn := self._close_block(known)):
            return turn
        if off and self.reasoning and inside:
            return self._thinking_off(known)
        seam = self._seam(known, lead, marked)
        rest = body[seam.end :]
        if inside and markers.opening in seam.more:  # both open the block, behind a header that ends otherwise
            begun, own = seam.more[seam.more.find(markers.opening) :], lead.find(markers.opening, seam.end)
            if own < 0 or lead[seam.end : own].strip() or not lead.startswith(begun, own):
                raise self._no_seam(known, lead)
            rest = body[own + len(begun) :]
        elif inside and seam.more and not seam.more.strip():
            raise self._no_seam(known, lead)
        if off and markers.around(lead):  # both close an empty block, and need not do so with the same white space
            behind = known[known.rfind(markers.closing) :]
            rest = body[lead.rfind(markers.closing) :]
            rest = rest[len(self.template.shared(behind, rest)) :]
        if inside or off or not (self.reasoning or opened):
            return Turn(self.prompt, rest, 0, "thinking off" if off and self.reasoning else "rendered")
        return self._splice(known, rest, "")

    def _seam(self, known: str, lead: str, marked: _Marked) -> Seam:
        """How much of the lead the prompt holds; its own block of reasoning, open or closed, stands behind that."""
        markers, added = self.template.markers, self.template.added
        mark = self.base + "w"
        unasked = self.render.attempt([*self.before[:-1], self._append(self.before[-1], mark)], False)
        closed = unasked.rpartition(mark)[2] if unasked and mark in unasked else None
        seam = find_seam(known, lead, closed, markers.opening, added)
        if seam is None:
            blocks = [text.rfind(markers.opening) if markers.opening in text else len(text) for text in (known, lead)]
            seam = find_seam(known[: blocks[0]], lead[: blocks[1]], closed, markers.opening, added)
            seam = seam and Seam(seam.end, seam.more + known[blocks[0] :])
        if seam is None or not self._is_attribute(seam, lead, closed):
            seam = self._without_header(known, lead, closed, marked) or (None if self.reasoning else seam)
        if seam is None:
            raise self._no_seam(known, lead)
        return seam

    def _is_attribute(self, seam: Seam, lead: str, closed: str | None) -> bool:
        """Whether the prompt has no more than an attribute that the lead has not: one line without added tokens, behind
        a header that both have. The prompt's own block of reasoning is not counted."""
        attribute = seam.more.partition(self.template.markers.opening)[0]
        header = lead[len(closed) if closed and lead.startswith(closed) else 0 : seam.end]
        one_line = not self.template.added.search(attribute) and "\n" not in attribute.strip()
        return not attribute.strip() or (one_line and says_something(header, self.template.added))

    def _without_header(self, known: str, lead: str, closed: str | None, marked: _Marked) -> Seam | None:
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
        alike = asked == ended + known[len(closed) :] and answered.startswith(asked + lead[len(closed) :] + self.base)
        return Seam(len(closed)) if alike else None

    def _no_seam(self, known: str, lead: str) -> NotAligned:
        return NotAligned(
            f"the chat template's prompt ends with {known[-60:]!r}, and this message begins with {lead[-60:]!r}: "
            f"neither goes on from the other, so what the model must generate here is unknown{ALONE}",
            self.number,
        )

    def _cut(self, shown: str, whole: str, last: int) -> tuple[str, int, Stop]:
        """What the message must generate of `whole`: up to its stop token."""
        tail = common_suffix(shown[last:], whole)
        ending = self.template.ending(tail, bool(self.message.functions))
        if ending is None:
            raise NoStopToken(
                "nothing ends this message: the chat template writes no special token behind it, and the tokenizer has "
                "no eos_token; set tokenizer.eos_token",
                self.number,
            )
        kept, stop = ending
        body = whole[: len(whole) - len(tail) + kept]
        return body + stop.text if stop.appended else body, kept, stop

    def _splice(self, ahead: str, body: str, lead: str) -> Turn:
        """Reasoning put in by hand, since the template does not render it."""
        markers, reasoning = self.template.markers, self.reasoning
        end = ahead.rstrip()
        if end.endswith(markers.closing):
            return Turn(self.prompt, body, 0, "thinking off")
        opened = end.endswith(markers.opening)
        if markers.closing in lead and markers.closing:  # the template writes an empty block: fill it
            at = lead.find(markers.closing)
            head = lead[:at].rstrip() if opened else lead[: lead.find(markers.opening)] + markers.open
            text = f"{head}{reasoning}{markers.close.rstrip()}"
            rest = body[at + len(markers.closing) :]
            return Turn(self.prompt, text + rest, len(text), "spliced")
        opening = markers.rest_of_open(ahead) if opened else markers.open
        text = f"{opening}{reasoning}{markers.close}"
        return Turn(self.prompt, text + body, len(text), "spliced")

    def _close_block(self, known: str) -> Turn | None:
        """A turn without reasoning behind a prompt that opens a block: rendered with reasoning, and that removed."""
        mark = self.base + "e"
        for name in self.template.fields or REASONING_FIELDS[:1]:
            filled = self.message.without_reasoning().changed(**{name: mark})
            marked = self._mark(filled)
            shown = self.render.attempt([*self.before, marked.message], False)
            whole = self.render.attempt([*self.before, filled.as_dict], False)
            if shown is None or whole is None or whole.count(mark) != 1 or marked.marks["r"] not in shown:
                continue
            asked, shown, whole = self._align(marked.message, filled.as_dict)
            lead = shown[: shown.find(marked.marks["r"])]
            if not whole.startswith(lead):
                continue
            if lead.startswith(asked):
                begin = len(asked)
            elif self.template.markers.opened_by(asked):
                seam = find_seam(asked, lead, None, self.template.markers.opening, self.template.added)
                begin = seam.end if seam and not seam.more else -1
            else:
                continue
            if begin < 0:
                continue
            last = max(shown.find(text) for text in marked.marks.values())
            body, _, _ = self._cut(shown[begin:], whole[begin:], last - begin)
            return Turn(self.prompt, body.replace(mark, ""), body.find(mark), "empty block")
        return None

    def _thinking_off(self, known: str) -> Turn:
        """The prompt has closed the block: what the model generates is the message without reasoning."""
        bare = self.message.without_reasoning()
        whole = self.render([*self.before, bare.as_dict], False, blame=self.number)
        turn = _Survey(self.template, self.render, self.before, bare, self.number, self.prompt, whole).turn()
        return Turn(turn.prompt, turn.target, turn.response, "thinking off")

    def _align(self, marked: dict[str, Any], filled: dict[str, Any] | None = None) -> tuple[str, str, str]:
        """What follows the last text before the message: in the prompt, and in renderings of the marked message and of
        the message itself, or of another one that is `filled` in."""
        mark = self.base + "w"
        before = [*self.before[:-1], self._append(self.before[-1], mark)]
        prompt = self.render.attempt(before, True)
        messages = (marked, filled or self.message.as_dict)
        texts = [prompt, *(self.render.attempt([*before, message], False) for message in messages)]
        if any(text is None or mark not in text for text in texts):
            raise NotAligned(
                "the chat template renders the messages before this one differently once it is there, and does not "
                f"show where they end{ALONE}",
                self.number,
            )
        tails = [self._joined(text.rpartition(mark)[2]) for text in texts if text is not None]
        if not self.prompt.endswith(tails[0]) or (filled is None and not self.whole.endswith(tails[2])):
            raise NotAligned(f"the chat template looks into the text before this message{ALONE}", self.number)
        return tails[0], tails[1], tails[2]

    def _append(self, message: dict[str, Any], mark: str) -> dict[str, Any]:
        content = message.get("content")
        if isinstance(content, list):
            return {**message, "content": [*content, {"type": "text", "text": mark}]}
        return {**message, "content": (content or "") + mark}

    def _mark(self, message: Message, calls: bool = True) -> _Marked:
        """The message with marks for its texts; a content that is empty is marked, but need not come out."""
        marks, wanted = {}, []
        functions = message.functions if calls else []
        if message.reasoning.strip():
            marks["r"] = self.base + "r"
            wanted.append("r")
        if message.response or not message.functions or not (marks or functions):
            marks["c"] = self.base + "c"
            wanted += ["c"] if message.response.strip() else []
        marked = message.with_texts(marks.get("r"), marks.get("c"))
        named = []
        for n, function in enumerate(functions):
            marks[f"n{n}"] = f"{self.base}n{n}x"
            wanted.append(f"n{n}")
            named.append({**function, "name": marks[f"n{n}"]})
            if "arguments" in function:
                named[-1]["arguments"] = marked_arguments(function["arguments"], f"{self.base}v{n}x")
        for n, function in enumerate(functions):
            if _has_arguments(function):
                marks[f"v{n}"] = f"{self.base}v{n}x"
                wanted.append(f"v{n}")
        return _Marked((marked.with_functions(named) if functions else marked).as_dict, marks, wanted)

    def _learn(self, marked: _Marked, places: dict[str, int], shown: str, whole: str, kept: int, stop: Stop) -> None:
        """Keep what stands around the slots as the pattern, where it shows all of them in order and how it ends."""
        slots = [slot for slot in marked.marks if slot in ("r", "c", "n0")]
        marks = {slot: marked.marks[slot] for slot in slots}
        order = [places[slot] for slot in marks]
        if order != sorted(order) or (self.message.functions and "n0" not in marks):
            return
        last = max(at + len(marked.marks[slot]) for slot, at in places.items())
        tail = shown[last:]
        if any(mark in tail for mark in marked.marks.values()) or not whole.endswith(tail) or kept > len(tail):
            return
        begin = kept if stop.appended else kept - len(stop.text)
        until = places["n0"] + len(marks["n0"]) if self.message.functions else last + begin
        self.pattern = Pattern(shown[:until], marks, tail[begin:], kept - begin, stop)

    def _response(self, marked: _Marked, places: dict[str, int], shown: str, body: str) -> int:
        """Where the response begins in the target, for roles only."""
        if places.get("r", -1) < 0:
            return 0
        behind = places["r"] + len(marked.marks["r"])
        following = [at for slot, at in places.items() if slot != "r" and at >= behind]
        between = min(following) - behind if following else 0
        text = self.reasoning.strip()
        return min(len(body), max(0, body.find(text)) + len(text) + between)

    def _not_rendered(self, lost: list[str]) -> ConversationError:
        what = "content" if lost[0] == "c" else "tool call" if lost[0][0] == "n" else "tool call's arguments"
        return NotRendered(f"the chat template does not render the {what} of this message{ALONE}", self.number)


def _has_arguments(function: dict[str, Any]) -> bool:
    arguments = function.get("arguments")
    return bool(json.loads(arguments or "{}") if isinstance(arguments, str) else arguments)
