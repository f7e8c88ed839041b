"""Lay out one conversation and draw its mask. Without --data a small one, which is also held against the N samples on a
tiny model; with --data one of yours, as your tokenizer's chat template renders it.

    flexreason show
    flexreason show --data chats.jsonl --tokenizer ./tokenizer --conversation 2
"""

import argparse
import json
import shutil
from collections.abc import Callable
from itertools import islice, pairwise
from typing import Any

import torch

import flexreason as fr
from flexreason.chat import dirt
from flexreason.proof import oracle
from flexreason.proof.compare import compare, one_pass
from flexreason.proof.float64 import true_float64
from flexreason.tree.draw import role_name
from flexreason.tree.layout import begins_stretch
from flexreason.tree.sample import Sample

CONVERSATION = [  # (what the user says, what the model thinks, what it answers)
    ("usr 2+3 ? bot", "so 5 /think", "5 end"),
    ("usr x4 ? bot", "5 x4 20 /think", "20 end"),
    ("usr ok bot", "", "bye end"),
]

IN_FULL = 120
"""Tokens up to which every token is drawn; in longer conversations a stretch of them is a line."""

WIDTH = 64
"""Cells of a folded mask."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="FILE", help="conversations: a file, a folder or a data set's name")
    parser.add_argument("--tokenizer", metavar="T", help="with its chat template: a folder, tokenizer.json or name")
    dirt.add_argument(parser)
    parser.add_argument("--conversation", type=int, default=0, metavar="N", help="which one, counted from 0")
    parser.add_argument("--seed", type=int, default=0, help="of the tiny model's random weights, without --data")


def run(options: argparse.Namespace) -> int:
    width = shutil.get_terminal_size((100, 24)).columns
    if options.data is not None:
        return _yours(options, width)
    if options.tokenizer is not None or options.conversation or options.accept:
        raise ValueError("--tokenizer, --conversation and --accept say how to read --data; give it too")
    return _example(options.seed, width)


def _example(seed: int, width: int) -> int:
    words = list(dict.fromkeys(" ".join(part for turn in CONVERSATION for part in turn).split()))

    def encode(text: str) -> list[int]:
        return [words.index(word) for word in text.split()]

    layout = fr.lay_out_turns([(encode(h), encode(t), encode(r)) for h, t, r in CONVERSATION])

    print("A conversation of three turns, with reasoning in the first two, is three training sequences:\n")
    for i, sample in enumerate(fr.unmerge(layout)):
        prompt, target = (" ".join(words[t] for t in ids) for ids in (sample.prompt_ids, sample.target_ids))
        print(f"  turn {i}: {prompt}  ->  {target}")
    print("\nflexreason stores every shared token once. The context copy of a response (ctx) stands on the trunk,")
    print("reasoning and the generated copy (resp) on a branch of their own:\n")
    print(fr.draw_layout(layout, words.__getitem__, width=width))
    print("\nEach token sees its ancestors (visible(q, kv) <=> kv <= q < until[kv]):\n")
    for token, line in zip(layout.input_ids.tolist(), fr.draw_mask(layout).splitlines(), strict=True):
        print(f"{words[token]:>8} {line}")

    model = _tiny_model(len(words), seed)
    row = fr.collate([layout], block_size=1)  # no padding: a conversation this small is all there is
    with true_float64():
        samples = oracle.n_samples(model, fr.unmerge(layout))
        computed = one_pass(fr.patch(model), row)
        errors = compare(computed, samples)
    n, loss_sum = samples.n_targets, computed.loss_sum
    print("\nA tiny Qwen3 with random weights, in fp64:\n")
    print(f"  {'':<12}{'passes':>7}{'tokens':>8}{'targets':>9}   loss")
    print(f"  {'N samples':<12}{layout.n_samples:>7}{samples.tokens:>8}{n:>9}   {samples.loss_sum / n:.12f}")
    print(f"  {'single pass':<12}{1:>7}{row['input_ids'].shape[1]:>8}{n:>9}   {loss_sum / n:.12f}")
    print(f"\n  largest difference of a parameter's gradient, relative: {errors.largest()['gradients']:.1e}")
    print("  the same loss and the same gradients" if errors.is_exact else "  NOT the same: please report this")
    return 0 if errors.is_exact else 1


def _tiny_model(vocabulary: int, seed: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return Qwen3ForCausalLM(config).double()


# --- a conversation of yours


def _yours(options: argparse.Namespace, width: int) -> int:
    from flexreason.load import load_tokenizer

    tokenizer = None if options.tokenizer is None else load_tokenizer(options.tokenizer)[0]
    where, layout = _read(options, tokenizer)

    def decode(ids: list[int]) -> str:
        if tokenizer is None:
            return " ".join(map(str, ids))
        return json.dumps(tokenizer.decode(ids), ensure_ascii=False)[1:-1].replace('\\"', '"')

    sequences = "1 training sequence" if layout.n_samples == 1 else f"{layout.n_samples} training sequences"
    print(f"{where}:\n{sequences} of {layout.sample_tokens} tokens in all\n")
    for turn, sample in enumerate(fr.unmerge(layout)):
        sizes = f"{len(sample.prompt_ids)} -> {len(sample.target_ids)} tokens"
        print(f"  turn {turn}, {sizes}:  {_sides(sample, decode, width - len(sizes) - 14)}")
    fewer = layout.sample_tokens / len(layout)
    print(f"\nStored once each, these are {len(layout)} tokens ({fewer:.2f} times fewer):\n")
    in_full = len(layout) <= IN_FULL
    if in_full:
        print(fr.draw_layout(layout, lambda token: decode([token]), width=width))
    else:
        print(folded(layout, decode, width))
    print("\nEach token sees its ancestors (visible(q, kv) <=> kv <= q < until[kv]):\n")
    side = 1 if in_full else -(-len(layout) // WIDTH)
    if side > 1:
        print(f"  a cell is {side} x {side} tokens: █ all visible, ▒ some, · none\n")
    for index, line in zip(range(0, len(layout), side), fold_mask(layout, side).splitlines(), strict=True):
        label = decode([int(layout.input_ids[index])]) if in_full else str(index)
        print(f"{label:>12} {line}")
    return 0


def _read(options: argparse.Namespace, tokenizer: Any) -> tuple[str, fr.Layout]:
    """Where the conversation that was asked for stands, and its layout."""
    from flexreason.data.files import read_conversations

    if options.conversation < 0:
        raise ValueError(f"--conversation: expected a number from 0 on, found {options.conversation}")
    conversation = next(islice(read_conversations(options.data), options.conversation, None), None)
    if conversation is None:
        raise ValueError(
            f"{options.data}: there is no conversation {options.conversation}; expected a number from 0 on, "
            "and below theirs"
        )
    if conversation.samples is not None:
        return conversation.where, fr.lay_out(conversation.samples)
    if tokenizer is None:
        raise ValueError(f"{options.data}: messages need a tokenizer with a chat template; give --tokenizer")
    of_template = {"accept": options.accept or (), **conversation.options}
    return conversation.where, fr.encode(conversation.messages, tokenizer, conversation.tools, **of_template)


def _sides(sample: Sample, decode: Callable[[list[int]], str], width: int) -> str:
    """A sample as prompt -> target, each shortened in the middle where they do not fit."""
    prompt, target = decode(list(sample.prompt_ids)), decode(list(sample.target_ids))
    room = max(16, (width - 6) // 2)
    if len(prompt) + len(target) + 6 > width:
        prompt, target = shortened(prompt, max(room, width - 6 - len(target))), shortened(target, room)
    return f"{prompt}  ->  {target}"


def shortened(text: str, width: int) -> str:
    """A text with its middle left out where it is longer than `width`.

    >>> shortened("What is 2 + 3, and what is it times 4?", 20)
    'What is  ... imes 4?'
    """
    if len(text) <= width:
        return text
    behind = (width - 5) // 2
    return f"{text[: width - 5 - behind]} ... {text[len(text) - behind :]}"


def folded(layout: fr.Layout, decode: Callable[[list[int]], str], width: int = 100) -> str:
    """A layout with a line a stretch: tokens one behind the other on one path, of one turn and role."""
    text_width = max(24, width - 56)
    position, until = layout.position_ids, layout.until
    starts = [*begins_stretch(position, until, layout.turn, layout.role).nonzero()[:, 0].tolist(), len(layout)]
    targets = torch.bincount(layout.target_source, minlength=len(layout))
    lines = [["index", "tokens", "turn", "role", "position", "until", "targets", "text"]]
    for start, end in pairwise(starts):
        turn, role, n_targets = int(layout.turn[start]), role_name(int(layout.role[start])), targets[start:end].sum()
        text = shortened(decode(layout.input_ids[start:end].tolist()), text_width)
        cells = (start, end - start, turn, role, int(position[start]), int(until[start]), int(n_targets), text)
        lines.append([str(cell) for cell in cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)][:-1]
    return "\n".join("  ".join([*map(str.rjust, line, widths), line[-1]]) for line in lines)


def fold_mask(layout: fr.Layout, side: int) -> str:
    """What `draw_mask` draws, a cell for side x side tokens, without the S x S mask: from each block's least and
    largest `until`.

    >>> layout = fr.lay_out_turns([([1], [2], [3]), ([4], [5], [6])])
    >>> print(fold_mask(layout, 2))
    ▒···
    █▒··
    ▒▒▒·
    ▒·▒█
    """
    blocks = layout.until.split(side)
    least, largest = [int(block.min()) for block in blocks], [int(block.max()) for block in blocks]

    def cell(i: int, j: int) -> str:  # queries i, keys j
        start, end = i * side, min((i + 1) * side, len(layout))
        if j > i:
            return "·"
        if least[j] >= end and (j < i or end - start == 1):
            return "█"
        return "▒" if j == i or largest[j] > start else "·"

    return "\n".join("".join(cell(i, j) for j in range(len(blocks))) for i in range(len(blocks)))
