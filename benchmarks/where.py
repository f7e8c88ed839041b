"""Where the time of a training step over one conversation goes, from samples to the optimizer.

    python benchmarks/where.py
    python benchmarks/where.py --shapes "8 x 64/256/64" --model 0.6B --device cuda

Every part is measured by itself on the tensors that the step gives it, forward and backward: *layout* (samples to a
tree), *collate* (to a row), *transfer* (to the device), *lists* (what attention computes, once a row for all layers),
*attention* (all layers), *gather* (hidden states of the tokens that predict), *head* (logits and loss), *optimizer*
(AdamW). *The rest* is the step without those of them that are in it: projections, feed-forward layers, norms, and what
the parts cost only together. Layout and collating can be done beside the step, by workers that load data.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import flexreason as fr
from flexreason.attention.registry import BACKENDS, choose_backend
from flexreason.bench import steps as ways
from flexreason.bench.measure import interleaved
from flexreason.bench.steps import Case
from shared import Run, conversation, shape
from steps import CONFIGS, model

INSIDE = ("lists", "attention", "gather", "head")
"""Parts of the step itself."""


def parts(case: Case) -> dict[str, Callable[[], Any]]:
    root, row, device = case.root, case.row, case.device
    config, dtype = root.config, root.dtype
    samples = [fr.unmerge(layout) for layout in case.layouts]
    on_host = fr.collate(case.layouts)
    backend = BACKENDS[choose_backend("auto", device, dtype)]
    length = row["until"].shape[1]
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    q, k, v = (
        torch.randn(1, length, n, config.head_dim, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
        for n in heads
    )
    upstream = torch.randn(1, length, heads[0], config.head_dim, device=device, dtype=dtype)
    hidden = torch.randn(1, length, config.hidden_size, device=device, dtype=dtype, requires_grad=True)
    states = torch.randn(1, row["labels"].shape[1], config.hidden_size, device=device, dtype=dtype, requires_grad=True)
    optimizer = torch.optim.AdamW(root.parameters(), lr=0.0, weight_decay=0.0)  # weights stay as they are
    for parameter in root.parameters():
        parameter.grad = torch.zeros_like(parameter)
    kept: dict[str, Any] = {}

    def lists() -> None:
        kept["table"] = backend.prepare(row, "interval", None, None)
        if backend is BACKENDS["segments"]:  # which are made when they are first asked for
            for name in ("calls",) if device.type == "cuda" else ("rectangles", "diagonal"):
                getattr(kept["table"], name)

    def attention() -> None:
        for _ in range(config.num_hidden_layers):
            out = backend.attend(q, k, v, kept["table"], config.head_dim**-0.5)
            torch.autograd.grad(out, [q, k, v], upstream)

    def gather() -> None:
        torch.autograd.grad(hidden[:, row["target_source"][0]].sum(), hidden)

    def head() -> None:
        logits = root.lm_head(states)
        loss = F.cross_entropy(logits[0].float(), row["labels"][0])
        torch.autograd.grad(loss, [states, root.lm_head.weight])

    lists()
    return {
        "layout": lambda: [fr.lay_out(some) for some in samples],
        "collate": lambda: fr.collate(case.layouts),
        "transfer": lambda: {name: x.to(device, copy=True) for name, x in on_host.items()},
        "lists": lists,
        "attention": attention,
        "gather": gather,
        "head": head,
        "optimizer": optimizer.step,
        "the step": ways.one_pass(case).step,
    }


def cell(case: Case, repeats: int) -> dict[str, Any]:
    calls = parts(case)
    for call in calls.values():
        call()
    seconds = interleaved(calls, repeats, case.device, least_seconds=0.005)
    ms = {name: [1e3 * t for t in times] for name, times in seconds.items()}
    inside = [ms[name] for name in INSIDE]
    ms["the rest"] = [whole - sum(some) for whole, *some in zip(ms["the step"], *inside, strict=True)]
    whole = statistics.median(ms["the step"])
    rows = []
    for name in ("layout", "collate", "transfer", *INSIDE, "the rest", "the step", "optimizer"):
        middle = statistics.median(ms[name])
        rows.append({"part": name, "ms": [middle, min(ms[name]), max(ms[name])], "% of the step": 100 * middle / whole})
    return {"tokens": sum(map(len, case.layouts)), "parts": rows}


def draw(cells: list[dict[str, Any]], figure: Any) -> None:
    """One bar a conversation."""
    figure.set_size_inches(8, 1 + 0.5 * len(cells))
    axes = figure.subplots()
    names = ("layout", "collate", "transfer", *INSIDE, "the rest", "optimizer")
    colors = ("#d5d8dc", "#aeb6bf", "#85929e", "#d68910", "#1f4e79", "#b03a2e", "#9db8d2", "#7fb3d5", "#7d6608")
    for at, one in enumerate(reversed(cells)):
        left = 0.0
        share = {row["part"]: row["% of the step"] for row in one["parts"]}
        for name, color in zip(names, colors, strict=True):
            axes.barh(at, share[name], left=left, color=color, label=name if not at else None)
            left += share[name]
    axes.set_yticks(range(len(cells)), [one["conversation"] for one in reversed(cells)])
    axes.set(xlabel="% of the step (forward and backward)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=9, fontsize=7, frameon=False)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    run = Run(__file__, __doc__)
    run.option("--shapes", nargs="+", default=["8 x 64/256/64", "16 x 64/256/64", "30 x 150/60/30"])
    run.option("--model", choices=CONFIGS, default="toy")
    options = run.start(arguments)
    made, _ = model(options.model, run.device)
    cells = []
    for text in options.shapes:
        layout = conversation([shape(text)[1:]] * shape(text).turns, made.config.vocab_size)
        about = {"conversation": text, "model": options.model}
        cells.append(run.cell(about, cell, Case(made, [layout]), options.repeats))
    done = [one for one in cells if "parts" in one]
    for one in done:
        run.table(f"{one['conversation']}, {one['tokens']:,} tokens, model {options.model}", one["parts"])
    return run.finish(lambda figure: draw(done, figure), cells=cells)


if __name__ == "__main__":
    main()
