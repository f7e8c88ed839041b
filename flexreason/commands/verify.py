"""Hold one pass against the N samples on a model and data of your own: exact, or the culprit.

Your conversations become samples as `fr.encode` makes them, by the model's own chat template; some of them, from all
over the data, are compared. Without data, random trees are, that cross the lengths of the model's config.

    flexreason verify Qwen/Qwen3-0.6B --data chats.jsonl
    flexreason verify ./config.json
"""

import argparse
import dataclasses
import json

import torch

from flexreason.data import options as of_data
from flexreason.load import load_model
from flexreason.model.hooks import apply_patch, find_root, refuse_settings
from flexreason.model.refuse import refuse_model
from flexreason.proof.conversations import random_conversations
from flexreason.proof.evidence import evidence_of_model
from flexreason.proof.verify import verify
from flexreason.tree.merge import lay_out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a name, a folder, or a config.json (random weights)")
    parser.add_argument("--backend", default="auto", help="auto, segments, flex, dense")
    parser.add_argument("--loss", default="model", help="model, chunked")
    parser.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16, float16, float64")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, help="the most tokens to compute, samples and trees together")
    parser.add_argument("--no-float64", action="store_true", help="leave the comparison in fp64 out")
    parser.add_argument("--seed", type=int, default=0, help="of random trees, and of weights where there are none")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    of_data.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    of_data.check(options)
    model, notes = load_model(options.model, options.dtype, options.device, options.seed, options.trust_remote_code)
    root = find_root(model)
    wheres: list[str] = []
    if options.data is None:
        conversations, more = random_conversations(root.config, options.tokens, options.seed)
    else:
        wheres, conversations, more = of_data.some_conversations(options, root.config.get_text_config().vocab_size)
    # Patched without evidence that it is exact, which is to be found now: `verify` refuses what failed its test.
    refuse_settings(options.backend, "interval", options.loss)
    refuse_model(root, model)
    apply_patch(model, options.backend, loss=options.loss, unchunked=evidence_of_model(root).unchunked)
    layouts = [lay_out(samples) for samples in conversations]
    report = verify(model, layouts, conversations, tokens=options.tokens, float64=False if options.no_float64 else None)
    where = [f"conversation {n}: {wheres[number]}" for n, number in enumerate(report.numbers) if wheres]
    report = dataclasses.replace(report, notes=[*notes, *more, *where, *report.notes])
    if options.json:
        print(json.dumps({**dataclasses.asdict(report), "ok": report.ok}))
    else:
        print(report)
    return 0 if report.ok else 1
