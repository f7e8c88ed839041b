"""A training step in every honest way: forward and backward over one conversation, the same samples and targets.

    python benchmarks/steps.py                                      # on a CPU: a quarter of an hour
    python benchmarks/steps.py --shapes "8 x 64/256/64" --repeats 3 # one conversation
    python benchmarks/steps.py --model qwen3_5 --ways one-by-one one-pass plain-row --backends segments \\
        --shapes "8 x 64/256/64" "60 x 10/5/10"                     # layers with states; nemotron_h has others
    python benchmarks/steps.py --model 4B --fill 8192               # turns grown alike to a row; on a GPU in bf16

The ways are those of `flexreason bench` (flexreason/bench/steps.py): the N samples one by one, padded, packed; one pass
through S x S masks (dense), through flex with the paper's order and `create_block_mask` (interleaved), through segments
and flex with our lists. Beside them what is not the samples: a plain pass whose reasoning leaks, labels shifted as in
the paper's code, a plain row of as many tokens. *A loop* is the N samples once more, written out here without our code.

Every way makes logits for target rows alone. Loss and gradients are compared before anything is timed. *By one pass* is
a way's time by that of one pass (segments on a CPU, flex on a GPU), repeat by repeat; *work* is the same ratio counted
(flexreason/data/figures.py), *by work* one by the other, *by tokens* the same by tokens, and *TFLOP/s* that work by
time. *Peak* is what a step adds to memory without gradients, by token of the row, and *faults* are the pages that it
asks the system for; the allocator is the default one unless the first line says otherwise. On a CPU flex has no
backward, so that *forward alone* is timed; packing there means a mask of all tokens by all, which is run where it fits.
Models whose layers carry states have a second table: what one pass and a plain row keep for backward, and what the scan
of a layer takes by itself.
"""

import resource
import statistics
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from transformers import NemotronHForCausalLM, PreTrainedModel, Qwen3_5ForCausalLM, Qwen3Config, Qwen3ForCausalLM

import flexreason as fr
from flexreason.bench import steps as ways
from flexreason.bench.measure import Measured, measure, ratio, wrong
from flexreason.bench.report import amount
from flexreason.bench.steps import Case, Way
from flexreason.data.figures import Amount, Shape, dense, shape_of_model
from flexreason.memory import available_bytes
from flexreason.proof.compare import suspended
from shared import Run, conversation, shape
from states import beside_a_plain_row

SHAPES = ("2 x 64/256/64", "4 x 64/256/64", "8 x 64/256/64", "16 x 64/256/64", "30 x 150/60/30")

CONFIGS = {
    "toy": {"width": 256, "inner": 768, "layers": 4, "heads": 8, "groups": 4, "size": 64, "vocabulary": 2048},
    "0.6B": {"width": 1024, "inner": 3072, "layers": 28, "heads": 16, "groups": 8, "size": 128},
    "4B": {"width": 2560, "inner": 9728, "layers": 36, "heads": 32, "groups": 8, "size": 128},
    "small": {"width": 128, "inner": 384, "layers": 2, "heads": 4, "groups": 2, "size": 32, "vocabulary": 2048},
    "tiny": {"width": 32, "inner": 48, "layers": 2, "heads": 4, "groups": 2, "size": 16, "vocabulary": 97},
}
"""Models of Qwen3's kind; the larger ones have its vocabulary."""

HYBRIDS = {
    "qwen3_5": (
        Qwen3_5ForCausalLM,
        {
            "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8,
            "num_key_value_heads": 4, "head_dim": 64, "linear_num_key_heads": 4, "linear_num_value_heads": 4,
            "linear_key_head_dim": 64, "linear_value_head_dim": 64, "vocab_size": 2048,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        },
    ),
    "nemotron_h": (
        NemotronHForCausalLM,
        {
            "hidden_size": 256, "intermediate_size": 768, "hybrid_override_pattern": "M-M-M*M-",
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "mamba_num_heads": 8,
            "mamba_head_dim": 64, "ssm_state_size": 64, "n_groups": 2, "chunk_size": 128, "vocab_size": 2048,
        },
    ),
}  # fmt: skip
"""Models whose layers carry states, of the toy's width."""

DENSE = {"one pass, dense", "one pass, interleaved, create_block_mask", "N samples, packed, dense mask"}

MOST = 2**13
"""Tokens up to which ways that compute S x S are run: a bit more than the largest conversations above."""


def model(
    name: str, device: torch.device, loss: str = "model", checkpointing: bool | None = None
) -> tuple[PreTrainedModel, Shape]:
    """Random weights, patched, on a GPU in bf16 and with checkpointing; and what its work is counted from."""
    if name in HYBRIDS:
        kind, settings = HYBRIDS[name]
        torch.manual_seed(0)
        with device:
            hybrid = kind(kind.config_class(**settings, max_position_embeddings=2**16)).train()
        return fr.patch(hybrid, loss=loss), shape_of_model(name, hybrid)
    size = {"vocabulary": 151_936, **CONFIGS[name]}
    config = Qwen3Config(
        vocab_size=size["vocabulary"],
        hidden_size=size["width"],
        intermediate_size=size["inner"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["groups"],
        head_dim=size["size"],
        max_position_embeddings=2**21,
        tie_word_embeddings=device.type == "cuda",
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
    )
    torch.manual_seed(0)
    with device:
        made = Qwen3ForCausalLM._from_config(config).train()
    if device.type == "cuda" if checkpointing is None else checkpointing:
        enable = getattr(made, "activation_checkpointing_enable", None) or made.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return fr.patch(made, loss=loss), dense(name, **size)


def a_loop(case: Case) -> Way:
    """The N samples one by one as anyone would write it, with logits for target rows alone."""
    given = []
    for sample in case.samples:
        ids = torch.tensor([sample.prompt_ids + sample.target_ids], device=case.device)
        given.append((ids, len(sample.prompt_ids), torch.tensor(sample.target_ids, device=case.device)))
    total = sum(len(targets) for _, _, targets in given)

    def step() -> float:
        loss = 0.0
        with suspended(case.root):
            for ids, n_prompt, targets in given:
                hidden = case.root.model(input_ids=ids, use_cache=False).last_hidden_state
                logits = case.root.lm_head(hidden[0, n_prompt - 1 : -1])
                share = F.cross_entropy(logits.float(), targets, reduction="sum") / total
                share.backward()
                loss += float(share.detach())
        return loss

    return Way("a loop over the N samples", step)


def ways_of(case: Case, names: list[str], backends: list[str], notes: list[str]) -> list[Way]:
    """Those that fit here, and a note on what does not: its arithmetic."""
    found = ways.chosen(case, [name for name in names if name in ways.WAYS], backends, notes)
    if "loop" in names:
        found.insert(min(1, len(found)), a_loop(case))
    n_row, n_samples = case.row["until"].shape[1], sum(layout.sample_tokens for layout in case.layouts)
    each = 12 + 4 * case.root.config.num_hidden_layers  # to make a mask, and what every layer keeps of it
    kept = []
    for way in found:
        n = n_samples if way.name.startswith("N samples") else n_row
        need = each * n**2 if way.name in DENSE else 0
        if need > 0.7 * available_bytes(case.device):
            notes.append(f"{way.name}: does not fit: {each} x {n:,}^2 bytes = {need / 2**30:,.0f} GiB")
        elif way.name in DENSE and n > MOST:
            times = n**2 / amount(case.layouts).pairs
            notes.append(f"{way.name}: not run: {n:,}^2 pairs are {times:.0f} times those of one pass")
        else:
            kept.append(way)
    return kept


def work_of(name: str, case: Case, shape: Shape) -> tuple[float | None, float | None]:
    """A way's work and tokens by those of one pass; none for ways that compute more than anyone must."""
    tree = amount(case.layouts)
    if name.startswith(("N samples", "a loop")) and name not in DENSE:
        lengths = [len(sample) for sample in case.samples]
    elif name == "a plain row":
        lengths = [case.row["until"].shape[1]]
    elif "leaking" in name:
        lengths = [len(one) - int((one.role == int(fr.Role.CONTEXT)).sum()) for one in case.layouts]
    else:
        return None, None
    pairs, n_tokens = sum(n * (n + 1) // 2 for n in lengths), sum(lengths)
    return shape.work(Amount(n_tokens, pairs, tree.targets)) / shape.work(tree), n_tokens / tree.tokens


def counting_faults(way: Way, faults: list[int]) -> Way:
    """The way, which writes down how many pages each of its steps asks the system for."""

    def step() -> float:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        loss = way.step()
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        return loss

    return replace(way, step=step)


def row_of(one: Measured, case: Case, found: list[Measured], shape: Shape, faults: list[int]) -> dict[str, Any]:
    usual = f"one pass, {'flex' if case.device.type == 'cuda' else 'segments'}"
    ours = next((way for way in found if way.name == usual and way.ms), None)
    shown: dict[str, Any] = {"way": one.name, "forward alone": None if one.trains else "yes"}
    if one.failed:
        return {**shown, "left out": one.failed}
    times = [one.median, min(one.ms), max(one.ms)]
    work, tokens = work_of(one.name, case, shape)
    by = list(ratio(one.ms, ours.ms)) if one.trains and ours else None
    done = shape.work(amount(case.layouts)) * (work or float(one.name.startswith("one pass")))
    root = case.root
    gradients = sum(p.nbytes for p in root.parameters()) if one.trains else 0
    return {
        **shown,
        "ms": times,
        "by one pass": by,
        "work": work,
        "by work": by[0] / work if by and work else None,
        "by tokens": by[0] / tokens if by and tokens else None,
        "TFLOP/s": done / one.median / 1e9 if done and one.trains else None,
        "peak B/token": None if one.added is None else (one.added - gradients) / case.row["until"].shape[1],
        "faults": int(statistics.median(faults)) if case.device.type == "cpu" else None,
        "loss": one.loss,
        "gradients off by": one.gradient_error,
        "samples": "the same" if not wrong(one, found, root.dtype) else "no" if not one.exact else "WRONG",
    }


def cell(case: Case, shape: Shape, names: list[str], backends: list[str], repeats: int) -> dict[str, Any]:
    notes: list[str] = []
    faults: dict[str, list[int]] = defaultdict(list)
    counted = [counting_faults(way, faults[way.name]) for way in ways_of(case, names, backends, notes)]
    found = measure(case, counted, repeats)
    rows = [row_of(one, case, found, shape, faults[one.name][-repeats:]) for one in found]
    if any(row.get("samples") == "WRONG" for row in rows):
        raise ArithmeticError(f"a way that should be exact is not: {rows}")
    rows += [{"way": way, "left out": why} for way, _, why in (note.partition(": ") for note in notes)]
    tree = amount(case.layouts)
    n_samples = sum(one.sample_tokens for one in case.layouts)
    beside = {"beside a plain row": beside_a_plain_row(case, repeats)} if shape.name in HYBRIDS else {}
    return {"tokens": tree.tokens, "sample tokens": n_samples, "ways": rows, **beside}


def draw(cells: list[dict[str, Any]], figure: Any) -> None:
    """A panel a conversation: every way's time by that of one pass."""
    figure.set_size_inches(3.2 * len(cells) + 2, 3.2)
    panels = figure.subplots(1, len(cells), sharex=True, sharey=True, squeeze=False)[0]
    names = list(dict.fromkeys(row["way"] for one in cells for row in one["ways"] if row.get("by one pass")))
    for axes, one in zip(panels, cells, strict=True):
        for row in one["ways"]:
            if by := row.get("by one pass"):
                color = "#1f4e79" if row["samples"] == "the same" else "0.6"
                at = len(names) - names.index(row["way"])
                axes.errorbar(by[0], at, xerr=[[by[0] - by[1]], [by[2] - by[0]]], fmt="o", color=color, markersize=4)
                if row["work"] and row["samples"] == "the same":
                    axes.plot(row["work"], at, "|", color="#b03a2e", markersize=10)
        axes.axvline(1, color="0.8", zorder=0)
        axes.set(title=one["conversation"], xlabel="time by that of one pass", xscale="log")
        axes.set_xticks(ticks := [0.5, 1, 2, 4, 8], [str(n) for n in ticks])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names), 0, -1), names)
    figure.supxlabel("red: what the work says; grey: not the samples", fontsize=8, color="0.4")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    run = Run(__file__, __doc__)
    run.option("--shapes", nargs="+", default=list(SHAPES), help="conversations, turns x h/t/r")
    run.option("--fill", type=int, metavar="TOKENS", help="of a row, to which the parts of every turn are grown alike")
    run.option("--model", choices=[*CONFIGS, *HYBRIDS], default="toy")
    run.option("--loss", choices=["model", "chunked"], default="model")
    run.option("--ways", nargs="+", choices=["loop", *ways.WAYS], help="all but the one of packed that is not for here")
    run.option("--backends", nargs="+", default=["segments", "flex", "dense"])
    options = run.start(arguments)
    other = "packed-dense" if run.device.type == "cuda" else "packed"
    names = options.ways or [name for name in ("loop", *ways.WAYS) if name != other]
    made, counted = model(options.model, run.device, options.loss)
    cells = []
    for text in options.shapes:
        one = shape(text).grown(options.fill) if options.fill else shape(text)
        layout = conversation([one[1:]] * one.turns, made.config.vocab_size)
        about = {"conversation": str(one), "model": options.model, "loss": options.loss}
        about |= {"ways": names, "backends": options.backends}
        case = Case(made, [layout], options.loss)
        cells.append(run.cell(about, cell, case, counted, names, options.backends, options.repeats))
    for one in cells:
        title = f"{one['conversation']}, {one.get('tokens')} tokens for {one.get('sample tokens')}, {options.model}"
        run.table(title, one.get("ways", [one]))
        if "beside a plain row" in one:
            run.table(f"{title}: beside a plain row", one["beside a plain row"])
    return run.finish(lambda figure: draw([one for one in cells if "ways" in one], figure), cells=cells)


if __name__ == "__main__":
    main()
