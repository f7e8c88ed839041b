"""What one pass costs on your machine, with your model and data, against the N samples: one by one, padded in
micro-batches, and on a GPU packed side by side through flash attention, which is what one pass has to beat.

    flexreason bench Qwen/Qwen3-0.6B --data chats.jsonl --checkpointing
    flexreason bench ./config.json --shape "16 x 64/256/64"

A step is forward and backward, without an optimizer. Every way has the same targets, makes logits for these alone, and
must give the same loss and gradients. Without data, conversations of random tokens are taken. --ways names others:
packed under a mask of all tokens by all (packed-dense), the paper's order under create_block_mask (interleaved), and
for comparison what is not the samples (leaking, shifted-labels, plain-row).
"""

import argparse
import json
import platform
import random
import re
from collections.abc import Sequence
from typing import Any

import torch

from flexreason.bench.measure import measure
from flexreason.bench.report import Report, amount, amount_of_samples
from flexreason.bench.steps import HONEST, WAYS, Case, chosen
from flexreason.data import options as of_data
from flexreason.data.figures import Shape, shape_of
from flexreason.load import load_model
from flexreason.model.hooks import find_root
from flexreason.patching import patch
from flexreason.proof.compare import without_dropout
from flexreason.tree.layout import Layout
from flexreason.tree.merge import lay_out
from flexreason.tree.sample import Sample

TOKENS = {"cpu": 4096, "cuda": 16384}
"""Of the row, unless --length says otherwise."""

SHAPE = "8 x 64/256/64"
"""Of random conversations, unless --shape says otherwise."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a name, a folder, or a config.json (random weights)")
    parser.add_argument("--backend", nargs="+", default=["auto"], help="one or several of auto, segments, flex, dense")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(HONEST), help="%(default)s if not given")
    parser.add_argument("--loss", choices=["model", "chunked"], default="model", help="in all ways; model if not given")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, in all ways")
    parser.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16, float16, float64")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--length", type=int, help="of the row; what fits is taken")
    parser.add_argument("--repeats", type=int, default=5, help="of every way, in turn (%(default)s)")
    parser.add_argument(
        "--shape",
        metavar="N x H/T/R",
        help=f"of random conversations: turns x tokens of human, reasoning, response; {SHAPE} if not given",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of random conversations, and of weights where there are none"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    of_data.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    of_data.check(options)
    for name in ("length", "repeats"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name}: expected at least 1, found {value}")
    if options.data is not None and options.shape:
        raise ValueError("--shape is of random conversations; leave --data out, or --shape")
    model, notes = load_model(options.model, options.dtype, options.device, options.seed, options.trust_remote_code)
    root = find_root(model)
    vocabulary = root.config.get_text_config().vocab_size
    tokens = options.length or TOKENS.get(root.device.type, TOKENS["cpu"])
    if options.data is None:
        conversations = random_conversations(options, vocabulary, tokens)
    else:
        _, conversations, more = of_data.some_conversations(options, vocabulary)
        notes += more
    layouts = that_fit(conversations, tokens, notes)
    shape = counted(options.model, notes)
    if options.checkpointing:
        enable: Any = getattr(root, "activation_checkpointing_enable", None) or root.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    for backend in options.backend:
        model = patch(model, backend, loss=options.loss)
    with without_dropout(model.train(), notes):
        case = Case(model, layouts, options.loss)
        measured = measure(case, chosen(case, options.ways, options.backend, notes), options.repeats)
    report = Report(
        model=options.model,
        device=_name(root.device),
        dtype=str(root.dtype).removeprefix("torch."),
        torch=torch.__version__,
        conversations=len(layouts),
        turns=sum(layout.n_samples for layout in layouts),
        tree=amount(layouts),
        samples=amount_of_samples(case.samples),
        shape=shape,
        ways=measured,
        notes=notes,
    )
    print(json.dumps(report.as_json()) if options.json else report)
    return 0 if report.ok else 1


def random_conversations(options: argparse.Namespace, vocabulary: int, tokens: int) -> list[list[Sample]]:
    """As many as fill the row, at least one, all of the same lengths."""
    if not (parts := re.fullmatch(r"(\d+) *x *(\d+)/(\d+)/(\d+)", options.shape or SHAPE)):
        raise ValueError(f"--shape: expected turns and tokens as {SHAPE!r}, found {options.shape!r}")
    turns, h, t, r = map(int, parts.groups())
    if not turns or not h or not r:
        raise ValueError(f"--shape: expected turns in which something is said and answered, found {options.shape}")
    draw = random.Random(options.seed)

    def ids(n: int) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(n)]

    def conversation() -> list[Sample]:
        history: list[int] = []
        samples = []
        for _ in range(turns):
            history, response = history + ids(h), ids(r)
            samples.append(Sample(history, ids(t) + response))
            history = history + response
        return samples

    first = conversation()
    return [first, *(conversation() for _ in range(tokens // len(lay_out(first)) - 1))]


def that_fit(conversations: Sequence[list[Sample]], tokens: int, notes: list[str]) -> list[Layout]:
    """Those that fit into a row, as they come; the shortest, if none does."""
    layouts = [lay_out(samples) for samples in conversations]
    chosen, free = [], tokens
    for layout in layouts:
        if len(layout) <= free:
            chosen.append(layout)
            free -= len(layout)
    if not chosen:
        chosen = [min(layouts, key=len)]
        notes.append(f"no conversation fits into {tokens} tokens; the shortest, of {len(chosen[0])}, is taken whole")
    elif len(chosen) < len(layouts):
        notes.append(f"{len(chosen)} of {len(layouts)} conversations, which fit into a row of {tokens} tokens")
    return chosen


def counted(model: str, notes: list[str]) -> Shape | None:
    """What a model's work is counted from, where that can be told."""
    try:
        shape = shape_of(model)
    except ValueError as error:
        notes.append(f"work is not counted: {error}")
        return None
    if shape.note:
        notes.append(f"of work: {shape.note}")
    return shape


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads of a CPU ({platform.machine()})"
