"""Say in plain words what a chat template does with reasoning, show the samples of one small conversation, and list
what the template cannot do. Takes a tokenizer (folder, tokenizer.json or name) or a bare template (.jinja).

    flexreason template Qwen/Qwen3-0.6B
    flexreason template ./chat_template.jinja --option enable_thinking=false
    flexreason template ./tokenizer --data chats.jsonl --conversation 7
"""

import argparse
import json
from typing import Any

from flexreason.chat.encode import Encoder
from flexreason.chat.ending import Endings
from flexreason.chat.facts import Fact, describe
from flexreason.chat.probes import assistant, user
from flexreason.chat.template import Template
from flexreason.data import options as of_data
from flexreason.data.formats import BadInput, Conversation
from flexreason.load import is_bare, load_tokenizer
from flexreason.show.plain import plain
from flexreason.show.read import scenes

EXAMPLE = [
    user("What is 2 + 3?"),
    assistant("5.", reasoning_content="Two and three make five."),
    user("And twice that?"),
    assistant("10.", reasoning_content="Twice five."),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tokenizer", metavar="TOKENIZER_OR_JINJA", help="a tokenizer's folder, file or name; or .jinja")
    of_data.add_encoding(parser)
    of_data.add_source(parser)
    of_data.add_conversation(parser, "which of --data is shown, the first if not given")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    of_data.check(options, (*of_data.OF_SOURCE, "conversation"))
    chosen = _chosen(options)
    tokenizer, notes = load_tokenizer(options.tokenizer)
    encoder = of_data.encoder_of(options, tokenizer)
    of_template = Encoder(tokenizer, **encoder.options)
    facts = describe(of_template)
    if is_bare(options.tokenizer):
        notes += _guesses(of_template.template())
    [example] = map(plain, scenes([chosen], encoder))
    if options.json:
        report = {
            "source": options.tokenizer,
            "notes": notes,
            "facts": {f.key: f.value for f in facts},
            "example": example,
        }
        print(json.dumps(report | {"words": [f.words for f in facts]}, ensure_ascii=False))
    else:
        _print(options.tokenizer, notes, facts, example)
    return 1 if "refused" in example else 0


def _chosen(options: argparse.Namespace) -> Conversation | BadInput:
    """The conversation that is shown."""
    if options.data is None:
        return Conversation(EXAMPLE, None, 0, "the example", "messages")
    conversation = next(of_data.chosen(options), None)
    return of_data.raise_no_such_conversation(options) if conversation is None else conversation


def _guesses(template: Template) -> list[str]:
    """What a real tokenizer may say otherwise: ends of messages that only their being special tells."""
    calls = template.argument_form != "none"
    endings = Endings(template)
    ends = {"an answer": endings.stop, "a tool call": endings.call_stop if calls else None}
    guessed = [f"{what} ({stop.text!r})" for what, stop in ends.items() if stop and (stop.guessed or stop.appended)]
    if not guessed:
        return []
    return [f"the end of {' and of '.join(guessed)} is guessed: a real tokenizer may have another token special there"]


def _print(source: str, notes: list[str], facts: list[Fact], example: dict[str, Any]) -> None:
    print(f"The chat template of {source}\n")
    for line in (*notes, *(fact.words for fact in facts)):
        print(f"  {line}")
    if "refused" in example:
        at = "" if example["message"] is None else f"message {example['message']}: "
        print(f"\n{example['where']} is refused ({example['reason']}): {at}{example['refused']}")
        return
    print(f"\nThe samples of {example['where']}; between [[ and ]] what each shares with the one before:\n")
    for sample in example["samples"]:
        message = "" if sample["message"] is None else f"message {sample['message']}, "
        print(f"  sample {sample['turn']}, {message}{sample['tokens']} tokens, {sample['how']}")
        shared = f"[[{sample['shared']}]]" if sample["shared"] else ""
        print(f"    prompt  {json.dumps(shared + sample['prompt'], ensure_ascii=False)}")
        print(f"    target  {json.dumps(sample['target'], ensure_ascii=False)}")
    print(f"\n  {example['tokens_in_samples']} tokens in the samples, {example['tokens_in_tree']} in the tree")
