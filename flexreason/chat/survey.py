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

from typing import Any

from flexreason.chat.before import Before
from flexreason.chat.calls import behind_content, lost_call
from flexreason.chat.closed import behind_closed_block
from flexreason.chat.ending import Endings, Stop
from flexreason.chat.errors import ALONE, ConversationError, NoStopToken, NotAligned, NotRendered, StopsWithin
from flexreason.chat.marks import Marked, joined, mark, new_base, stands_for, texts_between_marks
from flexreason.chat.messages import REASONING_FIELDS, Message
from flexreason.chat.render import Messages, Renderer
from flexreason.chat.seam import find_seam
from flexreason.chat.splice import splice
from flexreason.chat.template import Template
from flexreason.chat.texts import common_suffix, places_of
from flexreason.chat.turns import Pattern, Turn, learned

WAYS: tuple[dict[str, bool], ...] = ({}, {"names": False}, {"arguments": False}, {"names": False, "arguments": False})
"""Ways to mark calls: a template may know names, leave them to the ids of calls, or compute with arguments."""


class Turns:
    """Finds turns with one template; patterns learned are kept, each for messages of one shape."""

    def __init__(self, template: Template) -> None:
        self.template, self.endings = template, Endings(template)
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
        survey = _Survey(self.endings, render, before, message, number, prompt, whole)
        turn = survey.turn()
        if survey.pattern:
            self.patterns[shape] = survey.pattern
        return turn


class _Survey:
    """One message looked at with marks. `pattern` is what was learned of it, if anything."""

    def __init__(
        self,
        endings: Endings,
        render: Renderer,
        before: Messages,
        message: Message,
        number: int,
        prompt: str,
        whole: str,
    ) -> None:
        self.endings, self.template, self.render = endings, endings.template, render
        self.messages, self.message, self.number = before, message, number
        self.prompt, self.whole = prompt, whole
        # templates take white space for none
        self.reasoning = message.reasoning if message.reasoning.strip() else ""
        self.response = message.response if message.response.strip() else ""
        self.pattern: Pattern | None = None
        self.stop: Stop | None = None
        self.base = new_base((whole, prompt, str(message.as_dict)))
        self.before = Before(self.template, render, before, number, self.base)

    def turn(self) -> Turn:
        """The turn, with all calls of the message in it, and nothing behind what stops generation."""
        turn = self._seen()
        functions, said = self.message.functions, turn.target[turn.response :]
        if self.reasoning and turn.how == "rendered" and not turn.response:
            said = said.partition(self.reasoning.strip())[2] or said
        if what := lost_call(functions, behind_content(functions, self.response.strip(), said)):
            raise NotRendered(
                f"the chat template does not render the {what} of this message, or writes it otherwise{ALONE}",
                self.number,
            )
        self._check_stops(turn)
        return turn

    def _check_stops(self, turn: Turn) -> None:
        """Raise where the template writes what stops generation, be it behind messages of another kind, within this one
        too. A stop that is only guessed may be what ends reasoning."""
        own = self.stop
        body = turn.target.removesuffix(own.text) if own else turn.target
        if own and own.guessed:
            body = body.replace(self.template.markers.close, "", 1)
        for stop in self.endings.stops(True):
            if body.count(stop) > sum(said.count(stop) for said in self.message.all_texts):
                raise StopsWithin(
                    f"{stop!r} stops generation, and the chat template writes it within this message too: what stands "
                    f"behind it would never be generated{ALONE}",
                    self.number,
                )

    def _seen(self) -> Turn:
        marked, shown = self._marked()
        if shown.startswith(self.prompt) and self.whole.startswith(self.prompt):
            known, shown_tail, whole_tail = "", shown[len(self.prompt) :], self.whole[len(self.prompt) :]
            ahead = self.prompt
        else:
            known, shown_tail, whole_tail = self.before.tails(marked.message, self.message.as_dict)
            if not (self.prompt.endswith(known) and self.whole.endswith(whole_tail)):
                raise self._looks_before()
            ahead = known
            if shown_tail.startswith(known) and whole_tail.startswith(known):
                shown_tail, whole_tail, known = shown_tail[len(known) :], whole_tail[len(known) :], ""
        return self._behind(marked, known, shown_tail, whole_tail, ahead)

    def _marked(self) -> tuple[Marked, str]:
        """The message with marks that leave its rendering as it is but for their places, and that rendering."""
        texts = {"r": self.reasoning, "c": self.message.response}
        first = None
        for way in WAYS if self.message.functions else WAYS[:1]:
            marked = mark(self.message, self.base, **way)
            shown = self.render.attempt([*self.messages, marked.message], False)
            if shown is not None and stands_for(marked, shown, texts, self.whole):
                first = first or (marked, shown)
                if self._shows_calls(marked, shown):
                    return marked, shown
        return first or self._with_texts()

    def _shows_calls(self, marked: Marked, shown: str) -> bool:
        """Whether all marks in the calls come out; where there are none, whether any comes out, and the calls change
        what is rendered."""
        in_calls = [text for slot, text in marked.marks.items() if slot[0] in "nv"]
        if in_calls or not self.message.functions:
            return all(text in shown for text in in_calls)
        bare = self.message.without("tool_calls").as_dict
        seen = any(text in shown for text in marked.marks.values())
        return seen and self.render.attempt([*self.messages, bare], False) != self.whole

    def _with_texts(self) -> tuple[Marked, str]:
        """The message with a mark before and a mark behind each of its texts, and its rendering.

        So the template sees the texts too. In the rendering, each pair of marks with its text is written as one mark.
        """
        marks = {slot: self.base + slot for slot, text in (("r", self.reasoning), ("c", self.response)) if text}
        if not marks:
            raise self._not_rendered(["n0"])
        bare = self.message.without_reasoning() if self.reasoning else self.message
        # an inline block without reasoning is one for some templates, and text for others
        for marked in (bare.without_reasoning(), bare):
            if "r" in marks:
                names = self.message.fields or REASONING_FIELDS[:1]
                marked = marked.changed(**dict.fromkeys(names, f"{marks['r']}b{self.reasoning}{marks['r']}e"))
            if "c" in marks:
                marked = marked.between(f"{marks['c']}b", f"{marks['c']}e")
            text = self.render.attempt([*self.messages, marked.as_dict], False) or ""
            shown, values = joined(self.base, text), texts_between_marks(self.base, text)
            same = places_of(shown, values, self.whole)[1] == len(self.whole)
            if same and shown.startswith(self.prompt) == self.whole.startswith(self.prompt):  # no text is in the prompt
                return Marked(marked.as_dict, marks, list(marks)), shown
        raise NotRendered(
            "the chat template looks into the texts of this message, at their length or their words, and renders "
            f"others otherwise: what is its own and what the message's cannot be told apart{ALONE}",
            self.number,
        )

    def _behind(self, marked: Marked, known: str, shown: str, whole: str, ahead: str) -> Turn:
        """The turn, from what stands behind the prompt, or, with `known`, behind the text before the prompt's end."""
        places = {slot: shown.find(mark) for slot, mark in marked.marks.items()}
        missing = [slot for slot in marked.wanted if places[slot] < 0]
        said = str(marked.message)  # in which each argument has the same mark
        some = [slot for slot, text in marked.marks.items() if slot[0] == "v" and shown.count(text) < said.count(text)]
        if lost := [slot for slot in missing if slot != "r"] + some:
            raise self._not_rendered(lost)
        for slot in marked.wanted:
            if slot in "rc" and shown.count(marked.marks[slot]) > 1:
                kind = "reasoning" if slot == "r" else "content"
                words = f"the chat template renders the {kind} of this message more than once{ALONE}"
                raise NotAligned(words, self.number)
        if max(places.values()) < 0:
            raise NotRendered(f"the chat template renders nothing of this message{ALONE}", self.number)
        first = min(at for at in places.values() if at >= 0)
        body, kept, stop = self._cut(shown, whole, marked)
        if not known:
            if self.reasoning and "r" in missing:
                return self._splice(self.before.behind_text(ahead), shown[:first], body)
            if not missing and not (set(marked.marks) - set(marked.wanted)):
                self.pattern = learned(self.message, marked, places, shown, whole, kept, stop)
            return Turn(self.prompt, body, self._response(marked, places, shown, body), "rendered")
        lead = shown[:first]
        markers = self.template.markers
        asked, inside = self.before.asked(known, lead), places.get("r", -1) >= 0
        off, opened = markers.closed_by(asked), markers.opened_by(asked)
        if not self.reasoning and (turn := self._close_block(known)):
            return turn
        if off and self.reasoning and inside:
            return self._thinking_off(known)
        if not (marked.wanted or whole.startswith(lead)):  # a mark in an empty content may make another header
            raise self.before.no_seam(known, lead)
        if off:
            rest = behind_closed_block(self.before, known, asked, lead, marked, body)
            return Turn(self.prompt, rest, 0, "thinking off" if self.reasoning else "rendered")
        seam = self.before.seam(known, lead, marked, plain=not self.reasoning)
        rest = body[seam.end :]
        if inside and markers.opening in seam.more:  # both open the block, behind a header that ends otherwise
            begun, own = seam.more[seam.more.find(markers.opening) :], lead.find(markers.opening, seam.end)
            if own < 0 or lead[seam.end : own].strip() or not lead.startswith(begun, own):
                raise self.before.no_seam(known, lead)
            rest = body[own + len(begun) :]
        elif inside and seam.more and not seam.more.strip():
            raise self.before.no_seam(known, lead)
        if inside or not (self.reasoning or opened):
            return Turn(self.prompt, rest, 0, "rendered")
        between = lead[seam.end :]
        if opened and not self.reasoning and markers.closing in between:  # an empty block, which the prompt has begun
            own = between.find(markers.opening)
            begun = asked[asked.rfind(markers.opening) :] if own >= 0 else ""
            rest = rest[own + len(begun) if between.startswith(begun, own) else own + len(markers.opening) :]
            return Turn(self.prompt, rest if own >= 0 else body[seam.end :], 0, "rendered")
        return self._splice(asked, between, rest)

    def _cut(self, shown: str, whole: str, marked: Marked) -> tuple[str, int, Stop]:
        """What the message must generate of `whole`: up to its stop token."""
        last = max(shown.rfind(mark) + len(mark) for mark in marked.marks.values() if mark in shown)
        tail = common_suffix(shown[last:], whole)
        ending = self.endings.of(tail, bool(self.message.functions))
        if ending is None:
            raise NoStopToken(
                "nothing ends this message: the chat template writes no special token behind it, and the tokenizer has "
                "no eos_token; set tokenizer.eos_token",
                self.number,
            )
        kept, stop = ending
        self.stop = stop
        body = whole[: len(whole) - len(tail) + kept]
        return body + stop.text if stop.appended else body, kept, stop

    def _header(self, lead: str) -> str:
        """What of a lead may belong to a header that the model must write: not what begins an answer behind reasoning,
        nor a block of reasoning, and of a call only what begins an answer too."""
        markers = self.template.markers
        if self.message.functions:
            lead = self.template.shared(lead, self.template.begins)
        for marker in filter(None, (markers.opening, markers.closing)):
            lead = lead.partition(marker)[0]
        return lead.removesuffix(markers.begins)

    def _splice(self, asked: str, lead: str, body: str) -> Turn:
        """Reasoning put in by hand, behind all of the header. A token by itself begins the response."""
        markers, header = self.template.markers, self._header(lead)
        if markers.closed_by(asked):
            return Turn(self.prompt, body, 0, "thinking off")
        if header.strip():
            asks = self.prompt != self.render.attempt(self.messages, False) or self.template.appends_always
            if self.template.added.sub(" ", header).strip() or not asks:
                raise self.before.no_seam(asked, lead)
        more = "" if markers.origin == "option" else markers.close.strip().removeprefix(markers.closing)
        if more or (self.message.functions and len(self.template.added.findall(markers.close)) > 1):
            raise NotAligned(
                "the chat template does not render the reasoning of this message, and what it writes behind that of "
                f"others, {markers.close!r}, begins an answer too: what stands before this one is unknown{ALONE}",
                self.number,
            )
        blank = header[: len(header) - len(header.lstrip())]
        said = markers.origin == "option" and (markers.open.startswith(blank) or markers.close.endswith(blank))
        blank = blank if "\n" in blank or said else ""  # a space is the next word's own, for most tokenizers
        text, response = splice(markers, asked, lead, blank, body, self.reasoning, self.number)
        return Turn(self.prompt, text, response, "spliced")

    def _close_block(self, known: str) -> Turn | None:
        """A turn without reasoning behind a prompt that opens a block: rendered with reasoning, and that removed."""
        text = self.base + "e"
        for name in self.template.fields or REASONING_FIELDS[:1]:
            filled = self.message.without_reasoning().changed(**{name: text})
            marked = mark(filled, self.base)
            shown = self.render.attempt([*self.messages, marked.message], False)
            whole = self.render.attempt([*self.messages, filled.as_dict], False)
            if shown is None or whole is None or whole.count(text) != 1 or marked.marks["r"] not in shown:
                continue
            asked, shown, whole = self.before.tails(marked.message, filled.as_dict)
            if not self.prompt.endswith(asked):
                raise self._looks_before()
            lead = shown[: shown.find(marked.marks["r"])]
            if not whole.startswith(lead):
                continue
            if lead.startswith(asked):
                begin = len(asked)
            elif self.template.markers.opened_by(self.before.asked(asked, lead)):
                seam = find_seam(asked, lead, None, self.template.markers.opening, self.template.added)
                begin = seam.end if seam and not seam.more else -1
            else:
                continue
            if begin < 0:
                continue
            body, _, _ = self._cut(shown[begin:], whole[begin:], marked)
            return Turn(self.prompt, body.replace(text, ""), body.find(text), "empty block")
        return None

    def _thinking_off(self, known: str) -> Turn:
        """The prompt has closed the block: what the model generates is the message without reasoning."""
        bare = self.message.without_reasoning()
        whole = self.render([*self.messages, bare.as_dict], False, blame=self.number)
        turn = _Survey(self.endings, self.render, self.messages, bare, self.number, self.prompt, whole).turn()
        return Turn(turn.prompt, turn.target, turn.response, "thinking off")

    def _response(self, marked: Marked, places: dict[str, int], shown: str, body: str) -> int:
        """Where the response begins in the target, for roles only."""
        if places.get("r", -1) < 0:
            return 0
        behind = places["r"] + len(marked.marks["r"])
        following = [at for slot, at in places.items() if slot in ("c", "n0") and at >= behind]
        closes = len(self.template.markers.close) if shown.startswith(self.template.markers.close, behind) else 0
        between = min(following) - behind if following else closes
        text, lead = self.reasoning.strip(), shown[: places["r"]]
        at = body.find(text, len(lead) if body.startswith(lead) else 0)
        return min(len(body), max(0, at) + len(text) + between)

    def _looks_before(self) -> NotAligned:
        return NotAligned(f"the chat template looks into the text before this message{ALONE}", self.number)

    def _not_rendered(self, lost: list[str]) -> ConversationError:
        what = "content" if lost[0] == "c" else "tool call" if lost[0][0] == "n" else "tool call's arguments"
        return NotRendered(f"the chat template does not render the {what} of this message{ALONE}", self.number)
