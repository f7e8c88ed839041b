"""One turn of a conversation as text: the prompt that inference sends, and what the model must generate after it.

With P the rendering of the messages before assistant message i, generation prompt included, and S the rendering up
to and with it, the target is mostly S without P, up to the token that stops generation. Mostly is not always, so
nothing is believed: the message is rendered again with *marks* in the places of its reasoning, content and calls,
and only where every mark comes out once, behind the prompt, is S without P the target. Else:

- S does not begin with P, since the template renders earlier messages differently: both are aligned behind the last
  text before message i, marked too.
- The template does not render the reasoning: it is put where the model must generate it, behind the opening marker
  (the prompt's own, if it opens the block) and before the closing one.
- The prompt opens a reasoning block and the message has none: the block is closed at once, as the template closes it.
- The prompt has closed the block (thinking is off): the model generates no reasoning, and none is in the target.

The marked rendering of one message teaches how others of its shape look; where S fits that pattern to the letter,
no second rendering is needed.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from flexreason.chat import messages as parts
from flexreason.chat.messages import Message
from flexreason.chat.render import ConversationError, Messages, NoStopToken, NotAligned, NotRendered, Renderer
from flexreason.chat.templates import MARK, Stop, Template, _common_suffix

Span = tuple[int, int]


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
            form = next((form for form in _forms(value) if whole.startswith(form + follows, at)), None)
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


def _forms(value: str) -> Iterator[str]:
    """A text as templates write it: as it is, or without white space at an end."""
    return iter(
        dict.fromkeys(
            (
                value,
                value.strip(),
                value.strip("\n"),
                value.lstrip("\n"),
                value.rstrip("\n"),
                value.lstrip(),
                value.rstrip(),
            )
        )
    )


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
        if shown.startswith(self.prompt) and self.whole.startswith(self.prompt):
            known, shown_tail, whole_tail = "", shown[len(self.prompt) :], self.whole[len(self.prompt) :]
            ahead = self.prompt
        else:
            known, shown_tail, whole_tail = self._align(marked.message)
            ahead = known
            if shown_tail.startswith(known) and whole_tail.startswith(known):
                shown_tail, whole_tail, known = shown_tail[len(known) :], whole_tail[len(known) :], ""
        return self._behind(key, marked, known, shown_tail, whole_tail, ahead)

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
        off = markers.closed_by(known)
        if not self.reasoning and (turn := self._close_block(known)):
            return turn
        if off and self.reasoning and found.get("r", -1) >= 0:
            return self._thinking_off(known)
        if off and markers.around(lead):  # both close an empty block, and need not do so with the same white space
            behind = known[known.rfind(markers.closing) :]
            rest = body[lead.rfind(markers.closing) :]
            rest = rest[len(self.template.shared(behind, rest)) :]
            return Turn(self.prompt, rest, 0, "thinking off" if self.reasoning else "rendered")
        opened, inside = markers.opened_by(known), found.get("r", -1) >= 0
        header = known[: known.rfind(markers.opening)] if opened else lead
        if inside and (opened or known.startswith(lead)):
            raise NotAligned(
                f"the chat template's prompt ends with {known[-60:]!r}, and this message begins with {lead[-60:]!r}: "
                "neither goes on from the other, so what the model must generate here is unknown",
                self.number,
            )
        if not (known.startswith(header) and lead.startswith(header)):  # the prompt ends with what no message has
            header = self.template.shared(known, lead)
        rest = body[len(header) :]
        if inside or off or not (self.reasoning or opened):
            return Turn(self.prompt, rest, 0, "thinking off" if off and self.reasoning else "rendered")
        return self._splice(known, rest, "")

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
            known, shown, whole = self._align(marked.message, filled)
            if not (whole.startswith(known) and shown.startswith(known)):
                continue
            last = max(shown.find(text) for text in marked.marks.values())
            body, _, _ = self._cut(shown[len(known) :], whole[len(known) :], last - len(known))
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
        tails = [text.rpartition(mark)[2] for text in texts if text is not None]
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
            wanted += ["c"] if response else []
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
