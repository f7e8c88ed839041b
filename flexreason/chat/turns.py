"""One turn of a conversation as text: the prompt that inference sends, and what the model must generate after it.

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

from flexreason.chat import messages as parts
from flexreason.chat.filled import forms, places_of
from flexreason.chat.messages import Message
from flexreason.chat.render import ConversationError, Messages, NoStopToken, NotAligned, NotRendered, Renderer
from flexreason.chat.seam import Seam, find_seam, says_something
from flexreason.chat.template import MARK, Stop, Template, _common_suffix, user

QUOTES = "\"'\\"
"""What templates write around an argument that is text, and leave out around a number."""


@dataclass(frozen=True)
class Turn:
    """A sample as text. `response` is where in `target` the response begins, behind all reasoning."""

    prompt: str
    target: str
    response: int
    how: str  # "rendered", "spliced", "empty block" or "thinking off"


@dataclass(frozen=True)
class Pattern:
    """What stands around reasoning, content and the first call of messages of one shape, behind the prompt."""

    literals: tuple[str, ...]
    slots: str  # a letter a slot: r, c, or n for the first call's name
    end: str  # from the stop token on
    kept: int  # of `end`
    stop: Stop

    def fit(self, prompt: str, whole: str, message: Message) -> Turn | None:
        """The turn, if the rendering is the prompt and then this pattern, filled with the message's own texts."""
        if not whole.startswith(prompt) or not whole.endswith(self.end):
            return None
        at, stop, response = len(prompt), len(whole) - len(self.end), len(prompt)
        values = {"r": parts.reasoning_of(message), "c": parts.response_of(message)}
        calls = parts.calls_of(message)
        if any(self.stop.text in text for text in (*values.values(), *map(str, calls))):
            return None
        for number, slot in enumerate(self.slots):
            if not whole.startswith(self.literals[number], at):
                return None
            at += len(self.literals[number])
            response = at if slot != "r" and "r" not in self.slots[number:] and response == len(prompt) else response
            value = calls[0]["name"] if slot == "n" else values[slot]
            follows = "" if slot == "n" else self.literals[number + 1]
            form = next((form for form in forms(value) if whole.startswith(form + follows, at)), None)
            if form is None:
                return None
            at += len(form)
        for function in calls[1:]:
            at = whole.find(function["name"], at)
            if at < 0:
                return None
        if not calls and whole[at:stop] != self.literals[-1]:
            return None
        target = whole[len(prompt) : stop + self.kept]
        if self.stop.appended:
            target = target + self.stop.text
        response = response - len(prompt) if "r" in self.slots else 0
        return Turn(prompt, target, response, "rendered")


@dataclass
class _Marked:
    """A message with marks in its slots, in the order r, c, n0, n1 ...; `wanted` are those that must come out."""

    message: Message
    marks: dict[str, str]
    wanted: list[str]


class Turns:
    """Finds turns with one template; patterns learned are kept."""

    def __init__(self, template: Template) -> None:
        self.template = template
        self.patterns: dict[Any, Pattern] = {}

    def find(self, render: Renderer, before: Messages, message: Message, number: int, prompt: str) -> Turn:
        """The turn of assistant message `number`, which stands behind `before`; both as the template takes them."""
        whole = render([*before, message], False, blame=None)
        key = self._shape(before, message)
        if (pattern := self.patterns.get(key)) and (turn := pattern.fit(prompt, whole, message)):
            return turn
        return _Survey(self, render, before, message, number, prompt, whole).turn(key)

    def _shape(self, before: Messages, message: Message) -> Any:
        calls = parts.calls_of(message)
        return (
            before[-1]["role"],
            bool(parts.reasoning_of(message).strip()),
            parts.has_field(message),
            bool(parts.response_of(message)),
            isinstance(message.get("content"), list),
            len(calls),
        )


class _Survey:
    """One message looked at with marks."""

    def __init__(
        self, turns: Turns, render: Renderer, before: Messages, message: Message, number: int, prompt: str, whole: str
    ) -> None:
        self.turns, self.template, self.render = turns, turns.template, render
        self.before, self.message, self.number = before, message, number
        self.prompt, self.whole = prompt, whole
        self.reasoning, self.calls = parts.reasoning_of(message), bool(parts.calls_of(message))
        self.reasoning = self.reasoning if self.reasoning.strip() else ""  # templates take white space for none
        self.response = parts.response_of(message) if parts.response_of(message).strip() else ""
        self.base = next(
            mark
            for n in range(10**6)
            if (mark := MARK.format(f"s{n}")) not in whole and mark not in prompt and mark not in str(message)
        )

    def turn(self, key: Any) -> Turn:
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
        return self._behind(key, marked, known, shown_tail, whole_tail, ahead)

    def _stands_for(self, marked: _Marked, shown: str) -> bool:
        """Whether the real rendering is the marked one filled in; where there are tool calls, whose arguments need not
        be texts, whether it is up to the first."""
        if not marked.wanted:
            return True  # nothing of it need come out
        texts = {"r": self.reasoning, "c": parts.response_of(self.message)}
        values = {mark: texts[slot] for slot, mark in marked.marks.items() if slot in texts}
        calls = [at for slot, mark in marked.marks.items() if slot not in texts and (at := shown.find(mark)) >= 0]
        if not calls:
            return places_of(shown, values, self.whole)[1] == len(self.whole)
        return places_of(shown[: min(calls)].rstrip(QUOTES), values, self.whole)[1] >= 0

    def _with_texts(self) -> tuple[_Marked, str] | None:
        """The message with marks on both sides of its texts, so that the template sees these too, as if each pair with
        what stands between were one mark; None where it has no texts."""
        marks = {slot: self.base + slot for slot, text in (("r", self.reasoning), ("c", self.response)) if text}
        bare = parts.without_reasoning(self.message) if self.reasoning else self.message
        # an inline block without reasoning is one for some templates, and text for others
        for made in (parts.without_reasoning(bare), bare):
            if "r" in marks:
                names = [name for name in parts.REASONING_FIELDS if name in self.message] or parts.REASONING_FIELDS[:1]
                made = made | dict.fromkeys(names, f"{marks['r']}b{self.reasoning}{marks['r']}e")
            if "c" in marks:
                made = parts.between(made, f"{marks['c']}b", f"{marks['c']}e")
            text = self.render.attempt([*self.before, made], False) or ""
            shown, values = self._joined(text), {found.group(1): found.group(2) for found in self._pairs.finditer(text)}
            same = places_of(shown, values, self.whole)[1] == len(self.whole)
            if same and shown.startswith(self.prompt) == self.whole.startswith(self.prompt):  # no text is in the prompt
                return _Marked(made, marks, list(marks)), shown
        if not marks:
            return None
        raise NotRendered(
            "the chat template looks into the texts of this message, at their length or their words, and renders "
            "others otherwise: what is its own and what the message's cannot be told apart",
            self.number,
        )

    @property
    def _pairs(self) -> re.Pattern[str]:
        """A mark on both sides of a text: the mark, and the text."""
        return re.compile(f"({self.base}[rc])b(.*?)\\1e", re.DOTALL)

    def _joined(self, text: str) -> str:
        """A rendering with one mark for every pair, and what stands between them."""
        return self._pairs.sub(r"\1", text)

    def _behind(self, key: Any, marked: _Marked, known: str, shown: str, whole: str, ahead: str) -> Turn:
        """The turn, from what stands behind the prompt, or, with `known`, behind the text before the prompt's end."""
        found = {slot: shown.find(mark) for slot, mark in marked.marks.items()}
        missing = [slot for slot in marked.wanted if found[slot] < 0]
        if lost := [slot for slot in missing if slot != "r"]:
            raise self._not_rendered(lost)
        for slot in marked.wanted:
            if slot in "rc" and shown.count(marked.marks[slot]) > 1:
                kind = "reasoning" if slot == "r" else "content"
                raise NotAligned(f"the chat template renders the {kind} of this message more than once", self.number)
        if max(found.values()) < 0:
            raise NotRendered("the chat template renders nothing of this message", self.number)
        first = min(at for at in found.values() if at >= 0)
        body, kept, stop = self._cut(shown, whole, max(found.values()))
        if not known:
            if self.reasoning and "r" in missing:
                return self._splice(ahead, body, shown[:first])
            if not missing and not (set(marked.marks) - set(marked.wanted)):
                self._learn(key, marked, found, shown, whole, kept, stop)
            return Turn(self.prompt, body, self._response(marked, found, shown, body), "rendered")
        lead = shown[:first]
        markers = self.template.markers
        off, opened, inside = markers.closed_by(known), markers.opened_by(known), found.get("r", -1) >= 0
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
        """Whether what only the prompt has, its own block of reasoning aside, may stand behind a header: one line
        without added tokens, behind a header that both have."""
        attribute = seam.more.partition(self.template.markers.opening)[0]
        header = lead[len(closed) if closed and lead.startswith(closed) else 0 : seam.end]
        one_line = not self.template.added.search(attribute) and "\n" not in attribute.strip()
        return not attribute.strip() or (one_line and says_something(header, self.template.added))

    def _without_header(self, known: str, lead: str, closed: str | None, marked: _Marked) -> Seam | None:
        """The seam where messages of a running turn have no header, and the prompt has one all the same: shown by the
        same message behind a user's text, where it begins, behind the same header, just as it does here without."""
        if closed is None or not (known.startswith(closed) and lead.startswith(closed)):
            return None
        mark = self.base + "u"
        question = self.template.in_form(user(mark))
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
            "neither goes on from the other, so what the model must generate here is unknown",
            self.number,
        )

    def _cut(self, shown: str, whole: str, last: int) -> tuple[str, int, Stop]:
        """What the message must generate of `whole`: up to its stop token."""
        tail = _common_suffix(shown[last:], whole)
        ending = self.template.ending(tail, self.calls)
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
        for name in self.template.fields or parts.REASONING_FIELDS[:1]:
            filled = {**parts.without_reasoning(self.message), name: mark}
            marked = self._mark(filled)
            shown = self.render.attempt([*self.before, marked.message], False)
            whole = self.render.attempt([*self.before, filled], False)
            if shown is None or whole is None or whole.count(mark) != 1 or marked.marks["r"] not in shown:
                continue
            asked, shown, whole = self._align(marked.message, filled)
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
        bare = parts.without_reasoning(self.message)
        whole = self.render([*self.before, bare], False, blame=self.number)
        turn = _Survey(self.turns, self.render, self.before, bare, self.number, self.prompt, whole).turn(None)
        return Turn(turn.prompt, turn.target, turn.response, "thinking off")

    def _align(self, *messages: Message) -> tuple[str, str, str]:
        """What follows the last text before the message: in the prompt, and in two renderings of the message."""
        mark = self.base + "w"
        before = [*self.before[:-1], self._append(self.before[-1], mark)]
        prompt = self.render.attempt(before, True)
        both = [
            self.render.attempt([*before, message], False)
            for message in (messages[0], *(messages[1:] or (self.message,)))
        ]
        texts = [prompt, *both]
        if any(text is None or mark not in text for text in texts):
            raise NotAligned(
                "the chat template renders the messages before this one differently once it is there, and does not "
                "show where they end",
                self.number,
            )
        tails = [self._joined(text.rpartition(mark)[2]) for text in texts if text is not None]
        if not self.prompt.endswith(tails[0]) or (len(messages) == 1 and not self.whole.endswith(tails[2])):
            raise NotAligned("the chat template looks into the text before this message", self.number)
        return tails[0], tails[1], tails[2]

    def _append(self, message: Message, mark: str) -> Message:
        content = message.get("content")
        if isinstance(content, list):
            return {**message, "content": [*content, {"type": "text", "text": mark}]}
        return {**message, "content": (content or "") + mark}

    def _mark(self, message: Message, calls: bool = True) -> _Marked:
        """The message with marks for its texts; a content that is empty is marked, but need not come out."""
        marks, wanted = {}, []
        reasoning, response = parts.reasoning_of(message), parts.response_of(message)
        made = message
        if reasoning.strip():
            marks["r"] = self.base + "r"
            wanted.append("r")
            name = next((name for name in parts.REASONING_FIELDS if name in message), None)
            made = {**parts.without_reasoning(message), name or parts.REASONING_FIELDS[0]: marks["r"]}
            if name and any(other in message for other in parts.REASONING_FIELDS if other != name):
                made = {**made, **{n: marks["r"] for n in parts.REASONING_FIELDS if n in message}}
        functions = parts.calls_of(message) if calls else []
        if response or not parts.calls_of(message):
            marks["c"] = self.base + "c"
            wanted += ["c"] if response.strip() else []
            made = parts.with_text(made, marks["c"])
        if functions:
            marks |= {f"n{i}": f"{self.base}n{i}x" for i in range(len(functions))}
            wanted += [f"n{i}" for i in range(len(functions))]
            named = [
                {**function, "name": marks[f"n{i}"]}
                | (
                    {"arguments": parts.marked_arguments(function["arguments"], f"{self.base}v{i}x")}
                    if "arguments" in function
                    else {}
                )
                for i, function in enumerate(functions)
            ]
            made = parts.with_calls(made, named)
            marks |= {f"v{i}": f"{self.base}v{i}x" for i, f in enumerate(functions) if _arguments(f)}
            wanted += [f"v{i}" for i, f in enumerate(functions) if _arguments(f)]
        elif not marks:
            marks["c"] = self.base + "c"
            made = parts.with_text(made, marks["c"])
        return _Marked(made, marks, wanted)

    def _learn(
        self, key: Any, marked: _Marked, found: dict[str, int], shown: str, whole: str, kept: int, stop: Stop
    ) -> None:
        slots = [slot for slot in ("r", "c", "n0") if slot in found]
        places = [found[slot] for slot in slots]
        if key is None or places != sorted(places) or (self.calls and "n0" not in slots):
            return
        tail = shown[max(at + len(marked.marks[slot]) for slot, at in found.items()) :]
        if any(marked.marks[slot] in tail for slot in found) or not whole.endswith(tail) or kept > len(tail):
            return
        begin = kept if stop.appended else kept - len(stop.text)
        literals, at = [], 0
        for slot in slots:
            literals.append(shown[at : found[slot]])
            at = found[slot] + len(marked.marks[slot])
        literals.append("" if self.calls else shown[at : len(shown) - len(tail) + begin])
        self.turns.patterns[key] = Pattern(
            tuple(literals), "".join(slot[0] for slot in slots), tail[begin:], kept - begin, stop
        )

    def _response(self, marked: _Marked, found: dict[str, int], shown: str, body: str) -> int:
        """Where the response begins in the target, for roles only."""
        if found.get("r", -1) < 0:
            return 0
        behind = found["r"] + len(marked.marks["r"])
        following = [at for slot, at in found.items() if slot != "r" and at >= behind]
        between = min(following) - behind if following else 0
        text = self.reasoning.strip()
        return min(len(body), max(0, body.find(text)) + len(text) + between)

    def _not_rendered(self, lost: list[str]) -> ConversationError:
        what = "content" if lost[0] == "c" else "tool call" if lost[0][0] == "n" else "tool call's arguments"
        return NotRendered(f"the chat template does not render the {what} of this message", self.number)


def _arguments(function: dict[str, Any]) -> bool:
    arguments = function.get("arguments")
    return bool(json.loads(arguments or "{}") if isinstance(arguments, str) else arguments)
