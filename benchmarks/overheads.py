"""What a step costs a GPU beside its arithmetic: compiles, waiting for the host, copies, making the mask.

    python benchmarks/overheads.py                          # all tables
    python benchmarks/overheads.py --only crossover         # flex against segments by row length and turns
    python benchmarks/overheads.py --device cpu --small     # a rehearsal

*steps*: training steps of a Qwen3 of 0.6B shape over rows of one length, every step with a new tree. Graphs compiled in
the first step and in all that follow; operations that make the host wait for the device (torch's sync debug mode), and
the places in the code they come from; bytes copied between host and device inside the step (profiler), beside the row
itself; the time to make the mask, by that of the step. *plain* is one causal sequence of as many tokens and targets.
On a CPU flex has no backward: its step is forward alone, and what only a GPU can tell is left empty.

*masks*: the time to make block lists and segments' work lists, by row length.

*crossover*: one layer's attention, forward and backward, with its share of making the mask in a model of 28 layers, for
flex and for segments. The choice of `auto` rests on it. Turns are alike, of h/t/r = 64/256/64 scaled to the row.
"""

import json
import statistics
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import Qwen3ForCausalLM

import flexreason as fr
from flexreason.attention import flex
from flexreason.model.hooks import find_patch
from gpu_step import PLAIN, Step, backends, make, over_packs, over_row, plain
from kernel import Bench, Cell, checked, conversation, scaled, turns_of, work_list
from measure import Budget, free, on_a_gpu, print_json, print_table, tell, timed

LAYERS = 28


def rows_of(length: int, vocabulary: int, device: torch.device, n: int) -> list[dict[str, Tensor]]:
    """Rows of one length, no two with the same tree or the same number of turns."""
    layouts = [conversation(scaled([(64, 256, 64)] * (4 + 3 * k), length), vocabulary, seed=k) for k in range(n)]
    return [
        {name: tensor.to(device) for name, tensor in fr.collate([layout], length=length).items()} for layout in layouts
    ]


# ---- steps


def step_over(m: Qwen3ForCausalLM, way: str, row: dict[str, Tensor]) -> Step:
    if way == "plain":
        return over_packs(m, [plain(row)])
    if way == "flex" and row["until"].device.type == "cpu":
        return forward_over(m, row)
    return over_row(m, row, way)


def forward_over(m: Qwen3ForCausalLM, row: dict[str, Tensor]) -> Step:
    def step() -> Tensor:
        find_patch(m).backend = "flex"
        m.config._attn_implementation = PLAIN
        with torch.no_grad():
            return m(**row).loss

    return step


def n_compiled() -> int:
    return counters["stats"]["unique_graphs"]


def waits(step: Step) -> Counter[str]:
    """Where the host waits for the device, with how often; what torch's debug mode does not see is missing."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [w for w in caught if "called a synchronizing" in str(w.message)]
    return Counter(f"{Path(w.filename).parent.name}/{Path(w.filename).name}:{w.lineno}" for w in found)


def copied(step: Step) -> dict[str, Any]:
    """Copies between host and device, by the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    found: dict[str, Any] = {}
    for name, direction in (("to device", "HtoD"), ("to host", "DtoH")):
        sizes = [e["args"].get("bytes", 0) for e in events if e.get("cat") == "gpu_memcpy" and direction in e["name"]]
        found[f"copies {name}"], found[f"bytes {name}"] = len(sizes), sum(sizes)
    return found


def steps(small: bool, device: torch.device, budget: Budget) -> list[dict[str, Any]]:
    length = 256 if small else 2**14
    m = make("tiny" if small else "0.6B", device)
    rows = rows_of(length, m.config.vocab_size, device, 3 if small else 6)
    table = []
    ways = ["flex", "segments"] if device.type == "cpu" else backends(m, device)
    for way in ("plain", *ways):
        shown: dict[str, Any] = {"way": way, "tokens": length}
        found, failed = budget.attempt(f"steps, {way}", lambda way=way: compiles(m, way, rows))
        shown |= found or {"failed": failed}
        if found:
            shown |= budget.attempt(f"step times, {way}", lambda way=way: mask_share(m, way, rows[0], device))[0] or {}
            if device.type == "cuda":
                step = step_over(m, way, rows[1])
                where, failed = budget.attempt(f"waits, {way}", lambda step=step: waits(step))
                if where is not None:
                    shown["host waits a step"] = sum(where.values())
                    shown["most of them"] = ", ".join(f"{place} x {n}" for place, n in where.most_common(4))
                shown |= budget.attempt(f"copies, {way}", lambda step=step: copied(step))[0] or {}
            shown["bytes of a row"] = sum(tensor.nbytes for tensor in rows[0].values())
        table.append(tell(shown))
        m.zero_grad()
        free()
    return table


def compiles(m: Qwen3ForCausalLM, way: str, rows: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Graphs compiled in the first step, and in the steps after it."""
    before = n_compiled()
    step_over(m, way, rows[0])()
    first = n_compiled()
    for row in rows[1:]:
        step_over(m, way, row)()
    return {"compiled in step 1": first - before, f"in steps 2 to {len(rows)}": n_compiled() - first}


def mask_share(m: Qwen3ForCausalLM, way: str, row: dict[str, Tensor], device: torch.device) -> dict[str, Any]:
    seconds = statistics.median(timed({"": step_over(m, way, row)}, device, 2.0 if device.type == "cuda" else 0.2)[""])
    found = {"step ms": seconds * 1e3}
    if way != "plain":
        mask = statistics.median(timed({"": lambda: prepared(way, row)}, device, 0.5)[""])
        found |= {"mask ms": mask * 1e3, "mask / step": mask / seconds}
    return found


def prepared(way: str, row: dict[str, Tensor], window: int | None = None) -> Any:
    return flex.prepare(row, "interval", window, None) if way == "flex" else work_list(row, window)


# ---- masks


def masks(small: bool, device: torch.device, budget: Budget) -> list[dict[str, Any]]:
    lengths = (256, 512) if small else tuple(2**n for n in (13, 15, 17, 18))
    table = []
    for length in lengths:
        for shape in ("8 turns", "agent") if not small else ("4 x 64/256/64",):
            layout = conversation(scaled(turns_of(shape), length))
            row = {name: tensor.to(device) for name, tensor in fr.collate([layout], length=length).items()}
            shown: dict[str, Any] = {"tokens": length, "conversation": shape}
            calls = {
                "flex ms": lambda row=row: prepared("flex", row),
                "segments ms": lambda row=row: prepared("segments", row),
                "flex, window of 1024, ms": lambda row=row: prepared("flex", row, 1024),
            }
            for name, call in calls.items():
                found, failed = budget.attempt(
                    f"{name}, {length}, {shape}", lambda call=call: timed({"": call}, device, 0.5)
                )
                shown[name] = statistics.median(found[""]) * 1e3 if found else failed
            table.append(tell(shown))
    return table


# ---- crossover


def crossover(small: bool, device: torch.device, budget: Budget) -> list[dict[str, Any]]:
    lengths = (256,) if small else (1024, 2048, 4096, 8192)
    turns = (2, 4) if small else (2, 4, 8, 16, 30, 60)
    size, heads, groups = (16, 4, 2) if small else (128, 16, 8)
    table = []
    for length in lengths:
        for n in turns:
            cell = Cell(length, size, heads, groups, f"{n} x 64/256/64")
            found, failed = budget.attempt(cell.name, lambda cell=cell: crossed(Bench(cell, device)))
            table.append(tell({"tokens": length, "blocks": length // 128, "turns": n, **(found or {"failed": failed})}))
    return table


def crossed(bench: Bench) -> dict[str, Any]:
    """Both backends on one tree, interleaved; on a CPU forward alone, which is all that flex has there."""
    ways = {"flex": checked(bench, bench.flex(), compare=True), "segments": None}
    ways["segments"] = checked(bench, bench.segments(), compare=True)
    train = ways["flex"].trains
    seconds = timed({name: way.both if train else way.forward for name, way in ways.items()}, bench.device, 0.3)
    found: dict[str, Any] = {"timed": "forward and backward" if train else "forward"}
    for name, way in ways.items():
        found[f"{name} ms"] = statistics.median(seconds[name]) * 1e3
        found[f"{name} mask ms"] = way.figures["mask ms"]
        found[f"{name} a layer ms"] = found[f"{name} ms"] + way.figures["mask ms"] / LAYERS
    found["segments / flex"] = found["segments a layer ms"] / found["flex a layer ms"]
    return found


TABLES = {
    "steps": ("steps with new trees, and what they cost beside arithmetic", steps),
    "crossover": ("flex against segments, one layer of 16 heads of 128 over 8", crossover),
    "masks": ("making the mask", masks),
}


def main(arguments: list[str] | None = None) -> None:
    parser = on_a_gpu(__doc__, seconds=150)
    parser.add_argument("--only", choices=TABLES)
    options = parser.parse_args(arguments)
    budget, device = Budget(options.seconds), torch.device(options.device)
    results = {}
    for name, (title, make_table) in TABLES.items():
        if options.only in (None, name) and budget.allows(name):
            print(f"\n{name}", flush=True)
            results[name] = make_table(options.small, device, budget)
            print_table(title, results[name])
            free()
    budget.tell()
    print_json(benchmark="overheads", left_out=budget.left_out, **results)


if __name__ == "__main__":
    main()
