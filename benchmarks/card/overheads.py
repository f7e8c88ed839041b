"""What a step costs a GPU beside its arithmetic: compiles, waiting for the host, copies, making the mask.

    python benchmarks/card/overheads.py
    python benchmarks/card/overheads.py --device cpu --model tiny --length 256    # a rehearsal

Training steps over rows of one length, every one with a new tree. Graphs compiled in the first step and in all that
follow; operations that make the host wait for the device (torch's sync debug mode), and the places they come from;
bytes copied between host and device inside the step, beside the row itself; the time to make the mask, by that of the
step. On a CPU flex is forward alone, and what only a GPU can tell is left empty.
"""

import json
import statistics
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from flexreason.attention.registry import BACKENDS
from flexreason.bench import steps as ways
from flexreason.bench.measure import interleaved
from flexreason.bench.steps import Case

sys.path.insert(0, str(Path(__file__).parents[1]))
from shared import Run, conversation, shape
from steps import CONFIGS, model

Step = Callable[[], Any]


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


def copied(step: Step) -> dict[str, int]:
    """Bytes copied between host and device, by the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    copies = [event for event in events if event.get("cat") == "gpu_memcpy"]
    return {
        f"bytes {name}": sum(event["args"].get("bytes", 0) for event in copies if way in event["name"])
        for name, way in (("to the device", "HtoD"), ("to the host", "DtoH"))
    }


def steps(backend: str, cases: list[Case], repeats: int) -> dict[str, Any]:
    before = counters["stats"]["unique_graphs"]
    every: list[Step] = [ways.one_pass(case, backend).step for case in cases]
    compiled = []
    for step in every:
        step()
        compiled.append(counters["stats"]["unique_graphs"] - before)
    case = cases[1]
    prepare = lambda: BACKENDS[backend].prepare(case.row, "interval", None, None)  # noqa: E731
    times = interleaved({"step": every[1], "mask": prepare}, repeats, case.device, case.root.zero_grad)
    step, mask = (statistics.median(times[name]) for name in ("step", "mask"))
    found: dict[str, Any] = {"compiled in step 1": compiled[0], "after it": compiled[-1] - compiled[0]}
    found |= {"step ms": 1e3 * step, "mask ms": 1e3 * mask, "mask / step": mask / step}
    if case.device.type == "cuda":
        where = waits(every[1])
        found |= {"host waits": sum(where.values())} | copied(every[1])
        found["most of them"] = ", ".join(f"{place} x {n}" for place, n in where.most_common(4))
    return found | {"bytes of a row": sum(x.nbytes for x in case.row.values())}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    run = Run(__file__, __doc__)
    run.option("--model", choices=CONFIGS, default="0.6B")
    run.option("--length", type=int, default=2**14)
    run.option("--rows", type=int, default=6, help="no two with the same tree or number of turns")
    options = run.start(arguments)
    made, _ = model(options.model, run.device, "chunked")
    cases = []
    for n in range(options.rows):  # collate fills all of them up to one length
        one = shape(f"{4 + 3 * n} x 64/256/64").grown(options.length)
        cases.append(Case(made, [conversation([one[1:]] * one.turns, made.config.vocab_size, seed=n)], "chunked"))
    assert len({case.row["until"].shape[1] for case in cases}) == 1
    rows = []
    for backend in ("flex", "segments"):
        about = {"backend": backend, "tokens": options.length, "model": options.model}
        rows.append(run.cell(about, steps, backend, cases, options.repeats))
    run.table("steps with new trees, and what they cost beside arithmetic", rows)
    return run.finish(steps=rows)


if __name__ == "__main__":
    main()
