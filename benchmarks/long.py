"""One training step over one very long conversation, on a machine that has no room for S x S.

    python benchmarks/long.py                              # 32K and 128K tokens on a CPU: minutes
    python benchmarks/long.py --lengths 262144 --model 0.6B --device cuda
    python benchmarks/long.py --lengths 4096               # a first look

An ordinary patched model with gradient checkpointing and `loss="chunked"`; forward and backward over the row, which is
one conversation of as many turns as fill it. *Peak* is what the step adds to memory, gradients included. *Dense*:
an S x S mask of bools, and the scores of one layer in the model's precision. Before it is timed, three of
the turns (the first, the middle, the last) are trained on alone: their loss and gradients against those three samples
through the untouched model.
"""

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import flexreason as fr
from flexreason.bench import steps as ways
from flexreason.bench.measure import ALIKE, SAME, gradients, peak, seconds_of
from flexreason.bench.report import amount
from flexreason.bench.steps import Case
from flexreason.proof.float64 import relative_l2
from shared import Run, conversation, in_tokens, logarithmic, shape
from steps import CONFIGS, model

LENGTHS = (2**15, 2**17)


def three_turns(case: Case) -> tuple[float, float]:
    """How far loss and gradients of some turns are off, by these turns' samples."""
    [layout] = case.layouts
    turns = sorted({0, layout.n_samples // 2, layout.n_samples - 1})
    weight = torch.isin(layout.target_turn, torch.tensor(turns)).float()
    weighted = replace(case, layouts=[replace(layout, target_weight=weight)])
    samples = [sample for turn, sample in enumerate(fr.unmerge(layout)) if turn in turns]
    alone = Case(case.model, [fr.lay_out([sample]) for sample in samples], case.loss)
    found: list[tuple[float, list[Tensor]]] = []
    for step in (ways.one_pass(weighted).step, ways.one_by_one(alone).step):
        case.root.zero_grad()
        found.append((step(), gradients(case.root)))
    case.root.zero_grad()
    (ours, a), (theirs, b) = found
    return abs(ours / theirs - 1), relative_l2(a, b)


def cell(case: Case, with_samples: bool) -> dict[str, Any]:
    [layout] = case.layouts
    tokens, root = case.row["until"].shape[1], case.root
    found: dict[str, Any] = {
        "turns": layout.n_samples,
        "sample tokens": layout.sample_tokens,
        "pairs": amount([layout]).pairs,
    }
    if with_samples:
        start = time.perf_counter()
        found["loss off by"], found["gradients off by"] = three_turns(case)
        found["check s"] = time.perf_counter() - start
        if found["loss off by"] > SAME[root.dtype] or found["gradients off by"] > ALIKE[root.dtype]:
            raise ArithmeticError(f"one pass is not the samples: {found}")
    seconds: list[float] = []
    step = ways.one_pass(case).step
    added = peak(lambda: seconds.append(seconds_of(step, case.device)), case.device).added
    heads = root.config.num_attention_heads
    return {
        **found,
        "step s": seconds[0],
        "peak MiB": added / 2**20,
        "peak B/token": added / tokens,
        "dense: mask GiB": tokens**2 / 2**30,
        "dense: scores of one layer GiB": heads * tokens**2 * root.dtype.itemsize / 2**30,
    }


def draw(rows: list[dict[str, Any]], figure: Any) -> None:
    figure.set_size_inches(4, 3.2)
    axes = figure.subplots()
    logarithmic(axes, "one step over one conversation", "tokens in the row", "GiB", [row["tokens"] for row in rows])
    lines = {"peak MiB": "one pass, all of it", "dense: mask GiB": "an S x S mask alone"}
    lines["dense: scores of one layer GiB"] = "S x S scores of one layer"
    for (name, label), color in zip(lines.items(), ("#1f4e79", "#d68910", "#b03a2e"), strict=True):
        values = [row[name] / (2**10 if "MiB" in name else 1) for row in rows]
        axes.plot([row["tokens"] for row in rows], values, marker="o", markersize=3, color=color, label=label)
    axes.legend(fontsize=7, frameon=False)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    run = Run(__file__, __doc__, repeats=1)
    run.option("--lengths", type=int, nargs="+", default=list(LENGTHS))
    run.option("--shape", default="agent", help="its turns, as many as fill the row (%(default)s)")
    run.option("--model", choices=CONFIGS, default="small")
    run.option("--unchecked", action="store_true", help="without the samples of three turns")
    options = run.start(arguments)
    made, _ = model(options.model, run.device, "chunked", checkpointing=True)
    rows = []
    for tokens in options.lengths:
        about = {"tokens": tokens, "conversation": options.shape, "model": options.model}

        def make(tokens: int = tokens) -> dict[str, Any]:
            layout = conversation(shape(options.shape).filling(tokens), made.config.vocab_size)
            return cell(Case(made, [layout], "chunked"), not options.unchecked)

        rows.append(run.cell(about, make))
    title = f"one step over one conversation ({options.shape}), model {options.model}"
    run.table(title, [{**row, "tokens": in_tokens(row["tokens"])} for row in rows], hidden=["conversation", "model"])
    return run.finish(lambda figure: draw([row for row in rows if "step s" in row], figure), rows=rows)


if __name__ == "__main__":
    main()
