"""What a chat template does, in words: with reasoning, at the end of messages, with forms, roles and options."""

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from flexreason.chat.encode import Encoder
from flexreason.chat.ending import Endings
from flexreason.chat.errors import ConversationError
from flexreason.chat.messages import REASONING_FIELDS
from flexreason.chat.probes import AGAIN, ANSWER, PROBE_TOOL, THOUGHT, USER, assistant, calling, tool, user
from flexreason.chat.render import Messages, Renderer, frozen_clock
from flexreason.chat.template import Template

STANDARD = {"messages", "tools", "documents", "add_generation_prompt"}
STANDARD |= {f"{kind}_token" for kind in ("bos", "eos", "pad", "unk")}

FUNCTIONS = {"strftime_now", "raise_exception", "namespace", "range", "dict"}


@dataclass(frozen=True)
class Fact:
    """One thing that a template does: a key for programs, its value, and the sentence for people."""

    key: str
    value: Any
    words: str


def _fact(key: str, value: str) -> Fact:
    return Fact(key, value, WORDS[key][value])


WORDS = {
    "history": {
        "unknown": "It raises on a conversation of two questions, so nothing is known of history.",
        "kept": "Reasoning of earlier turns is kept in history: the samples are one chain, and merge into one path.",
        "empty block": "Reasoning is dropped from history, and an empty block stands in its place.",
        "dropped": "Reasoning is dropped from history: earlier answers stand there without it.",
    },
    "prompt": {
        "opens": "The generation prompt opens the reasoning block itself: targets begin inside it. A turn without "
        "reasoning closes it at once.",
        "closes": "The generation prompt holds a closed reasoning block (thinking is off): no reasoning is in the "
        "targets.",
    },
    "without": {"empty block": "A turn without reasoning has an empty block in its target."},
    "content": {
        "any": "Content may be text or a list of text parts.",
        "string": "It takes content as text only; lists of text parts are joined, one a line.",
        "parts": "It takes content as lists of parts only; text is wrapped into one.",
    },
    "arguments": {
        "any": "Tool arguments may be objects or JSON text.",
        "object": "It takes tool arguments as objects only; JSON text is parsed.",
        "string": "It takes tool arguments as JSON text only; objects are written as JSON.",
        "none": "It shows no tool calls.",
    },
    "tools": {
        "ignored": "Tools that are given are not shown to the model.",
        "last user message": "Tools stand at the last user message, so samples share little: exact, and no faster.",
        "beginning": "Tools stand at the beginning, where all samples share them.",
    },
}
"""What is said of a template whose behaviour has one of a few values."""

CONTENTS = {"any": "text or parts", "string": "text only", "parts": "parts only"}

MARKERS_FROM = {
    "template": "the template knows these markers",
    "vocabulary": "the vocabulary has these markers",
    "option": "as the option think says",
    "text": "no markers are known here, so as text",
}


def describe(encoder: Encoder) -> list[Fact]:
    """Everything found out about the template of an encoder."""
    with frozen_clock():
        template = encoder.template()
        if template.probe(template.take([user(USER)]), True) is None:
            template.render([user(USER)], True)  # raises, in the template's words
        facts = [*_reasoning(template), *_ends(template), *_forms(template, encoder), *_roles(template)]
    return [*facts, *_clock(template), _options(template)]


def _shown(template: Template, messages: Messages, prompt: bool = True) -> str:
    """The rendering, empty where the template raises."""
    return template.probe(template.take(messages), prompt) or ""


def _reasoning(template: Template) -> list[Fact]:
    markers, prompt_end = template.markers, template.prompt_end
    thinking = {(template.fields or REASONING_FIELDS)[0]: THOUGHT}
    around = f"{markers.open!r} and {markers.close!r}"
    if template.fields:
        split = "; inline <think> blocks are read alike" if template.splits_inline else ""
        reads = f"It reads reasoning ({', '.join(template.fields)}) and writes it between {around}{split}."
    else:
        targets = f"targets get it between {around} ({MARKERS_FROM[markers.origin]})"
        reads = f"It never writes reasoning: history has none, and {targets}."
    facts = [Fact("fields", list(template.fields), reads)]

    history = _shown(template, [user(USER), assistant(ANSWER, **thinking), user(AGAIN)])
    bare = _shown(template, [user(USER), assistant(ANSWER), user(AGAIN)])
    if not history:
        kept = "unknown"
    elif THOUGHT in history:
        kept = "kept"
    elif bare and ANSWER in history and markers.around(history.partition(USER)[2].partition(ANSWER)[0]):
        kept = "empty block"
    else:
        kept = "dropped"
    facts += [_fact("history", kept), _tool_loop(template, thinking)]

    opens, closes = markers.opened_by(prompt_end), markers.closed_by(prompt_end)
    if opens or closes:
        facts.append(_fact("prompt", "opens" if opens else "closes"))
    else:
        asked = prompt_end.removeprefix(template.closed)  # the end of the user's message
        words = f"The generation prompt is {_tail(asked)!r}; the model opens the block."
        facts.append(Fact("prompt", "plain", words))
        without = _shown(template, [user(USER), assistant(ANSWER)], False)
        if markers.around(without.rpartition(USER)[2].partition(ANSWER)[0]):
            facts.append(_fact("without", "empty block"))
    return facts


def _tool_loop(template: Template, thinking: dict[str, str]) -> Fact:
    loop = [user(USER), _call(template, **thinking), tool(AGAIN)]
    running, over = _shown(template, loop), _shown(template, [*loop, assistant(ANSWER + "x"), user("next")])
    if ANSWER not in running:
        return Fact("tool_loop", "no tools", "It shows no tool calls, so there are no tool loops.")
    if THOUGHT not in running:
        return Fact("tool_loop", "dropped", "Within a tool loop, too, earlier reasoning is dropped.")
    later = "and afterwards" if THOUGHT in over else "and dropped once it is over"
    words = f"Within a running tool loop reasoning is kept, {later}: a loop is one branch."
    return Fact("tool_loop", "kept", words)


def _call(template: Template, **more: Any) -> dict[str, Any]:
    return calling("string" if template.argument_form == "string" else "object", **more)


def _tail(text: str, n: int = 40) -> str:
    return text if len(text) <= n else "..." + text[-n:]


def _ends(template: Template) -> list[Fact]:
    endings = Endings(template)
    stop = endings.stop
    if stop is None:
        return [Fact("stop", None, "Nothing stops generation: no special token behind an answer, and no eos_token.")]
    appended = "appended, since the template writes nothing behind the last answer"
    how = appended if stop.appended else "written by the template"
    facts = [Fact("stop", stop.text, f"An answer ends with {stop.text!r} ({how}).")]
    call = endings.call_stop if template.argument_form != "none" else None
    if call and call.text != stop.text:
        facts.append(Fact("call_stop", call.text, f"A tool call ends with {call.text!r}."))
    if not stop.appended:
        last = _shown(template, [user(USER), assistant(ANSWER)], False).rpartition(ANSWER)[2]
        if after := last.partition(stop.text)[2]:
            facts.append(Fact("after_stop", after, f"Behind it stands {after!r}, which no target has."))
        history = _shown(template, [user(USER), assistant(ANSWER), user(AGAIN)]).rpartition(ANSWER)[2]
        if history and not history.startswith(last[: last.find(stop.text) + len(stop.text)]):
            begins = _tail(history[: len(stop.text) + 4])
            words = f"In history the same answer goes on with {begins!r} instead."
            facts.append(Fact("closes_differently", True, words))
    if template.appends_always:
        facts.append(Fact("appends_always", True, "The generation prompt comes even when it is not asked for."))
    return facts


def _forms(template: Template, encoder: Encoder) -> list[Fact]:
    forms = {role: template.content_form(role) for role in ("user", "system", "assistant", "tool")}
    facts = [_fact("content", forms["user"]), _fact("arguments", template.argument_form)]
    if others := {role: form for role, form in forms.items() if form != forms["user"]}:
        takes = "; ".join(f"{role}: {CONTENTS[form]}" for role, form in others.items())
        facts.append(Fact("content_of", others, f"From others than users it takes other contents: {takes}."))
    described = Renderer(encoder.tokenizer, [PROBE_TOOL], encoder.options)
    try:
        text = described.plain(template.take([user(USER), assistant(ANSWER), user(AGAIN)]), True)
    except ConversationError:
        raise
    except Exception as error:
        return [*facts, Fact("tools", "raises", f"It raises when tools are given: {error}")]
    at = text.rfind("probe")
    if at < 0:
        return [*facts, _fact("tools", "ignored")]
    return [*facts, _fact("tools", "last user message" if at > text.find(ANSWER) > 0 else "beginning")]


def _roles(template: Template) -> list[Fact]:
    def system(text: str, role: str = "system") -> dict[str, Any]:
        return {"role": role, "content": text}

    tries = {
        "a system message": [system(AGAIN), user(USER)],
        "a developer message": [system(AGAIN, "developer"), user(USER)],
        "a second system message": [system("one"), user(USER), system(AGAIN), user("x")],
        "two user messages in a row": [user(USER), user(AGAIN)],
        "tool calls and results": [user(USER), _call(template), tool(AGAIN)],
    }
    taken, failed = [], []
    for what, messages in tries.items():
        try:
            text = template.render.plain(template.take(messages), True)
        except ConversationError:
            raise
        except Exception as error:
            failed.append(f"{what}: raises: {str(error)[:120]}")
            continue
        if AGAIN in text and (messages[-1]["role"] != "tool" or ANSWER in text):
            taken.append(what)
        else:
            failed.append(f"{what}: silently left out")
    cannot = "It cannot do: " + "; ".join(failed) + "." if failed else "It can do all that was tried."
    return [
        Fact("takes", taken, f"It takes {', '.join(taken) or 'none of system, developer and tool messages'}."),
        Fact("cannot", failed, cannot),
    ]


def _clock(template: Template) -> list[Fact]:
    texts = set()
    for year in (2001, 2002):
        with frozen_clock(datetime(year, 2, 3)):
            texts.add(_shown(template, [user(USER)]))
    words = "The date stands in the prompt; it is frozen once a conversation."
    return [Fact("date", True, words)] if len(texts) > 1 else []


def _options(template: Template) -> Fact:
    from transformers.utils import chat_template_utils

    source = template.render.source

    def from_outside(name: str) -> bool:
        """Not one of the template's own variables, unless it asks whether that is defined."""
        asked = rf"(?<![.\w]){name}\s+is\s+(not\s+)?defined|(?<![.\w]){name}\s*\|\s*default"
        own = rf"\bset\s+{name}\b|\bmacro\b[^%]*\b{name}\b|\bfor\s+[\w, ]*\b{name}\b"
        return bool(re.search(asked, source)) or not re.search(own, source)

    variables = sorted(chat_template_utils._get_template_variables(source) - STANDARD - FUNCTIONS)
    names = [name for name in variables if from_outside(name)]
    return Fact("options", names, f"It knows the options {', '.join(names)}." if names else "It has no options.")
