"""Show what is trained on: your conversations as your tokenizer's chat template renders them, each turn with what it is
sent and what is trained. Without data a small example, which is also held against the N samples on a tiny model.

    flexreason show chats.jsonl --tokenizer ./tokenizer
    flexreason show chats.jsonl --tokenizer ./tokenizer --conversation 7 --mask
    flexreason show chats.jsonl --tokenizer ./tokenizer --html chats.html
    flexreason show chats.jsonl --tokenizer ./tokenizer --json
    flexreason show --paper
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import flexreason as fr
from flexreason.data import options as of_data
from flexreason.data.formats import BadInput, Conversation
from flexreason.load import load_tokenizer
from flexreason.proof import oracle
from flexreason.proof.compare import compare, one_pass
from flexreason.proof.float64 import true_float64
from flexreason.show import page
from flexreason.show.example import WORDS, example_layout, example_picture
from flexreason.show.notes import RefusedScene
from flexreason.show.paper import draw_paper, paper_picture
from flexreason.show.picture import layout_picture
from flexreason.show.plain import plain
from flexreason.show.read import scenes
from flexreason.show.scene import Scene
from flexreason.show.table import folded
from flexreason.show.terminal import Terminal, wants_colour
from flexreason.show.texts import printable

SHOWN = 3
"""Conversations that are printed unless more are asked for."""

PAGE_TOKENS = 100_000
"""Tokens that a page holds at least, before no further conversation is added unless more are asked for."""

MOST_PAGE_TOKENS = 1_000_000
"""Tokens that a page can hold."""

TREE_LINES = 200
"""Lines of --tree."""

OF_DATA = ("conversation", "turn", "all", "tree", "mask", "html")
"""Options of this command that say nothing without data."""

DRAWN = ("tree", "mask", "paper", "html", "svg", "png")
"""Options that draw for people."""

Shown = list[Scene | RefusedScene]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    files = parser.add_argument("data", nargs="+", action="extend", metavar="FILE", help="the same as --data FILE")
    files.required = False  # nargs="*" would not take files that stand behind options
    of_data.add_arguments(
        parser,
        limit=f"the most conversations to show; {SHOWN} if not given, more with --html",
        tokenizer=of_data.NEEDED,
    )
    of_data.add_conversation(parser, "show this one alone")
    parser.add_argument("--turn", metavar="N or N-M", help="show these turns alone")
    parser.add_argument("--all", action="store_true", help="leave nothing out, however long")
    parser.add_argument("--tree", action="store_true", help="the tree as a table: a line for each stretch of tokens")
    parser.add_argument("--mask", action="store_true", help="who sees whom")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write all of it as one page, for a browser")
    parser.add_argument("--paper", action="store_true", help="five turns in the paper's order beside ours")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the mask of a small conversation, or --paper")
    parser.add_argument("--png", type=Path, metavar="FILE", help="the same; needs flexreason[plot]")
    parser.add_argument("--json", action="store_true", help="print samples and their sizes as one JSON object")
    parser.add_argument("--seed", type=int, default=0, help="of the tiny model's random weights, without data")


def run(options: argparse.Namespace) -> int:
    width = shutil.get_terminal_size((100, 24)).columns
    _check(options)
    if options.paper:
        return _paper(options, width)
    if options.data is None:
        return _example(options, width)
    return _yours(options, width)


def _check(options: argparse.Namespace) -> None:
    of_data.check(options)
    if options.data is None:
        for name in OF_DATA:
            if of_data.is_given(options, name):
                raise ValueError(f"--{name} says how to show --data FILE; give it too")
    elif options.paper:
        raise ValueError("--paper draws five turns of its own; leave FILE out, or --paper")
    for name in DRAWN:
        if options.json and of_data.is_given(options, name):
            raise ValueError(f"--{name} draws, and --json is for programs; leave one of them out")
    of_data.check_outputs(options, ("html", "svg", "png"))


# --- conversations of yours


def _yours(options: argparse.Namespace, width: int) -> int:
    tokenizer, notes = (None, []) if options.tokenizer is None else load_tokenizer(options.tokenizer)
    encoder = of_data.encoder_of(options, tokenizer)
    all_scenes = scenes(_chosen(options, tokenizer), encoder)
    for note in notes:
        print(f"{options.tokenizer}: {note}", file=sys.stderr)
    if options.html is not None:
        shown = _as_page(options, all_scenes)
    elif options.svg is not None or options.png is not None:
        shown = _as_picture(options, all_scenes)
    elif options.json:
        shown = _as_json(options, all_scenes)
    else:
        shown = _in_terminal(options, all_scenes, width)
    if not shown:
        of_data.raise_no_such_conversation(options)
    refused = [scene for scene in shown if isinstance(scene, RefusedScene)]
    if len(refused) == len(shown) and not options.json:
        first = refused[0]
        words = first.words
        raise ValueError(f"{first.where}: refused, {first.reason}: {words}")
    return 1 if refused and not options.skip_invalid else 0


def _chosen(options: argparse.Namespace, tokenizer: Any) -> Iterator[Conversation | BadInput]:
    """The conversations that are asked for, where there is a tokenizer for them."""
    for conversation in of_data.chosen(options):
        if tokenizer is None and isinstance(conversation, Conversation) and conversation.samples is None:
            raise ValueError(f"{conversation.where}: messages need a tokenizer with a chat template; give --tokenizer")
        yield conversation


def _as_json(options: argparse.Namespace, all_scenes: Iterator[Scene | RefusedScene]) -> Shown:
    shown = list(islice(all_scenes, options.limit or SHOWN))
    if shown:
        conversations = [plain(scene, _turns_of(options, scene)) for scene in shown]
        more = options.conversation is None and next(all_scenes, None) is not None
        print(json.dumps({"conversations": conversations, "more": more}, ensure_ascii=False))
    return shown


def _in_terminal(options: argparse.Namespace, all_scenes: Iterator[Scene | RefusedScene], width: int) -> Shown:
    terminal = Terminal(width, wants_colour(), everything=options.all)
    limit = options.limit or SHOWN
    shown = list(islice(all_scenes, limit))
    if any(isinstance(scene, Scene) for scene in shown) and not (options.tree or options.mask):
        print(terminal.legend(), end="\n\n")
    for number, scene in enumerate(shown):
        if number:
            print()
        if isinstance(scene, RefusedScene):
            lines = terminal.draw_refused(scene)
        elif options.tree or options.mask:
            lines = _tree_and_mask(options, scene, width)
        else:
            lines = terminal.draw(scene, _turns_of(options, scene))
        for line in lines:
            print(line)
    if options.conversation is None and next(all_scenes, None) is not None:
        print(f"\nMore follow: --limit N shows more than {limit}, --conversation N one, --html FILE a page of them.")
    return shown


def _turns_of(options: argparse.Namespace, scene: Scene | RefusedScene) -> list[int] | None:
    """The turns that are asked for, "3" or "3-5"; None for all, and where there are none."""
    if options.turn is None or isinstance(scene, RefusedScene):
        return None
    text, n = options.turn, len(scene.turns)
    first, _, last = text.partition("-")
    if not first.isdigit() or not (last or first).isdigit():
        raise ValueError(f"--turn: expected a number or two, such as 3 or 3-5, found {text!r}")
    start, end = int(first), int(last or first)
    if not start <= end < n:
        raise ValueError(f"--turn {text}: the conversation has {n} turns; expected numbers from 0 to {n - 1}")
    return list(range(start, end + 1))


def _tree_and_mask(options: argparse.Namespace, scene: Scene, width: int) -> Iterator[str]:
    """The tree as a table, and who sees whom."""
    yield from (printable(scene.where), scene.sizes)

    def decode(ids: list[int]) -> str:
        return printable(scene.reader.text(ids)).replace("\n", "↵").replace("\t", " ").strip("\n")

    if options.tree:
        lines = folded(scene.layout, decode, width).splitlines()
        kept = lines if options.all else lines[: TREE_LINES + 1]
        yield from ("", *kept)
        if len(lines) > len(kept):
            yield f"… {len(lines) - len(kept):,} stretches more; --all prints them, --html FILE draws the tree"
    if options.mask:
        cells = max(16, width - 10)
        side = -(-len(scene.layout) // cells)
        yield from ("", "Each token sees its ancestors (visible(q, kv) <=> kv <= q < until[kv]):")
        if side > 1:
            yield f"a cell is {side} x {side} tokens: █ all visible, ▒ some, · none"
        yield ""
        for index, line in enumerate(fr.draw_mask(scene.layout, width=cells).splitlines()):
            yield f"{index * side:>8} {line}"


def _as_page(options: argparse.Namespace, all_scenes: Iterator[Scene | RefusedScene]) -> Shown:
    shown: Shown = []
    n_tokens, more = 0, False
    for scene in all_scenes:
        if len(shown) == options.limit or (options.limit is None and n_tokens >= PAGE_TOKENS):
            more = True
            break
        shown.append(scene)
        n_tokens += len(scene.layout) if isinstance(scene, Scene) else 0
        if n_tokens > MOST_PAGE_TOKENS:
            raise ValueError(
                f"--html: {n_tokens:,} tokens are too many for a page, which holds {MOST_PAGE_TOKENS:,}; set a lower "
                "--limit, or choose one with --conversation"
            )
    if shown:
        page.write(options.html, page.page(shown))
        kib = options.html.stat().st_size / 1024
        conversations = "1 conversation" if len(shown) == 1 else f"{len(shown):,} conversations"
        n_refused = sum(isinstance(scene, RefusedScene) for scene in shown)
        refused = f", {n_refused:,} refused" if n_refused else ""
        print(f"{options.html}: {conversations}{refused}, {n_tokens:,} tokens, {kib:,.0f} KiB; open it in a browser")
        if more:
            print("More conversations follow: --limit N puts more of them on the page, --conversation N one.")
    return shown


# --- pictures


def _as_picture(options: argparse.Namespace, all_scenes: Iterator[Scene | RefusedScene]) -> Shown:
    shown = list(islice(all_scenes, 1))
    for scene in shown:
        if isinstance(scene, Scene):
            _draw(options, layout_picture(scene.layout, scene.texts))
    return shown


def _paper(options: argparse.Namespace, width: int) -> int:
    if options.svg is None and options.png is None:
        print(draw_paper(width))
    else:
        _draw(options, paper_picture())
    return 0


def _draw(options: argparse.Namespace, picture: Any) -> None:
    for path, write in ((options.svg, picture.write_svg), (options.png, picture.write_png)):
        if path is not None:
            write(path)
            print(path)


# --- the example


def _example(options: argparse.Namespace, width: int) -> int:
    if options.svg is not None or options.png is not None:
        _draw(options, example_picture())
        return 0

    layout = example_layout()
    model = _tiny_model(len(WORDS), options.seed)
    row = fr.collate([layout], block_size=1)  # no padding: a conversation this small is all there is
    with true_float64():
        samples = oracle.n_samples(model, fr.unmerge(layout))
        computed = one_pass(fr.patch(model), row)
        errors = compare(computed, samples)
    n = samples.n_targets
    passes = {
        "n_samples": {"passes": layout.n_samples, "tokens": samples.tokens, "loss": samples.loss_sum / n},
        "one_pass": {"passes": 1, "tokens": row["input_ids"].shape[1], "loss": computed.loss_sum / n},
    }
    apart = errors.largest()["gradients"]

    if options.json:
        tokenizer = SimpleNamespace(decode=lambda ids, **how: "".join(f"{WORDS[token]} " for token in ids))
        figures = {"targets": n, **passes, "gradients_apart": apart, "exact": errors.is_exact}
        print(json.dumps({"conversations": [plain(Scene(layout, tokenizer))], "more": False, **figures}))
        return 0 if errors.is_exact else 1

    print("A conversation of three turns, with reasoning in the first two, is three training sequences:\n")
    for i, sample in enumerate(fr.unmerge(layout)):
        prompt, target = (" ".join(WORDS[t] for t in ids) for ids in (sample.prompt_ids, sample.target_ids))
        print(f"  turn {i}: {prompt}  ->  {target}")
    print("\nflexreason stores every shared token once. The context copy of a response (ctx) stands on the trunk,")
    print("reasoning and the generated copy (resp) on a branch of their own:\n")
    print(fr.draw_layout(layout, WORDS.__getitem__, width=width))
    print("\nEach token sees its ancestors (visible(q, kv) <=> kv <= q < until[kv]):\n")
    for token, line in zip(layout.input_ids.tolist(), fr.draw_mask(layout).splitlines(), strict=True):
        print(f"{WORDS[token]:>8} {line}")

    print("\nA tiny Qwen3 with random weights, in fp64:\n")
    print(f"  {'':<12}{'passes':>7}{'tokens':>8}{'targets':>9}   loss")
    for name, of_way in (("N samples", passes["n_samples"]), ("single pass", passes["one_pass"])):
        print(f"  {name:<12}{of_way['passes']:>7}{of_way['tokens']:>8}{n:>9}   {of_way['loss']:.12f}")
    print(f"\n  largest difference of a parameter's gradient, relative: {apart:.1e}")
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
