"""Attention over a tree on a GPU, one layer, forward and backward, against flash attention over the N samples.

    python benchmarks/card/attention.py                                # cells in order of importance
    python benchmarks/card/attention.py --only 32K                     # cells whose name holds this
    python benchmarks/card/attention.py --rungs benchmarks/card/few.json --only "32K, 32 heads of 128 over 8, 16"
    python benchmarks/card/attention.py --device cpu --small           # a rehearsal: what it finds means nothing

Ours are *flex* (closed-form lists) and *segments*. Against them: *packed*, the N samples side by side through torch's
variable-length flash attention (FA2 unless another is activated), and SDPA's flash and cuDNN kernels on one causal
sequence of as many pairs. Queries, keys and values are transposed views, as models make them; bf16 on a GPU. Every way
over the tree is held against packed before it is timed, outputs and gradients, relative L2; packed itself against SDPA
in fp32, sample by sample. TFLOP/s count visible pairs alone: 4 x heads x size x pairs forward, 2.5 times that backward,
each way over its own pairs. *Both of packed* is a way's rate, forward and backward together, by that of packed. Packed
is timed on so many of the samples, evenly chosen, as have a billion pairs: its rate is the same. `--rungs` times
settings of the flex kernel.
"""

import inspect
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.attention.varlen import varlen_attn

import flexreason as fr
from flexreason.attention import flex, segments
from flexreason.bench.measure import interleaved
from flexreason.bench.report import amount
from flexreason.proof.float64 import relative_l2

sys.path.insert(0, str(Path(__file__).parents[1]))
from shared import Run, conversation, in_tokens, paths, shape

PACKED_PAIRS = 10**9

WRONG = {torch.bfloat16: 0.02, torch.float32: 1e-4}
"""A way whose outputs or gradients are further off is not timed."""


class Cell(NamedTuple):
    length: int
    heads: int
    groups: int
    size: int
    shape: str

    @property
    def name(self) -> str:
        return f"{in_tokens(self.length)}, {self.heads} heads of {self.size} over {self.groups}, {self.shape}"


SHAPES = ("16 x 64/256/64", "30 x 150/60/30", "8 x 64/256/64", "60 x 300/150/50")

CELLS = [
    *(Cell(2**k, 32, 8, 128, one) for k in (15, 13) for one in SHAPES),
    *(
        Cell(2**k, n, 8, size, one)
        for k, n, size in ((15, 16, 128), (15, 32, 64), (17, 32, 128))
        for one in SHAPES[::3]
    ),
]
SMALL = [Cell(256, 4, 2, 16, "3 x 8/32/8")]


class Packed(NamedTuple):
    """Sequences side by side: where each begins, [N + 1], and which token of the tree every token is, [P]."""

    begins: Tensor
    index: Tensor
    owned: Tensor  # bool [P]: of the copies of a token, one

    @property
    def pairs(self) -> int:
        return sum(n * (n + 1) // 2 for n in self.begins.diff().tolist())


def packed_paths(layout: fr.Layout, device: torch.device) -> Packed:
    most = layout.n_samples
    while most > 1 and sum(len(p) * (len(p) + 1) // 2 for p in paths(layout, most)) > PACKED_PAIRS:
        most = most * 3 // 4
    seen, owned = torch.zeros(len(layout), dtype=torch.bool), []
    chosen = paths(layout, most)
    for path in chosen:
        owned.append(~seen[path])
        seen[path] = True
    begins = torch.tensor([0, *map(len, chosen)]).cumsum(0).to(device, torch.int32)
    return Packed(begins, torch.cat(chosen).to(device), torch.cat(owned).to(device))


def flash(q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> Tensor:
    """Causal attention within each sequence: queries [P, H, D] over keys and values [P, G, D]: [P, H, D]."""
    if q.device.type == "cpu":
        return torch.cat([one_by_one(q[a:b], k[a:b], v[a:b]) for a, b in pairwise(packed.begins.tolist())])
    options = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    longest = int(packed.begins.diff().max())
    return varlen_attn(q, k, v, packed.begins, packed.begins, longest, longest, window_size=(-1, 0), **options)


def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


@dataclass(eq=False)
class Way:
    """What is called on what; its output is [1, S, H, D], or [P, H, D] for packed sequences."""

    forward: Callable[[], Tensor]
    inputs: list[Tensor]
    upstream: Tensor
    pairs: int
    trains: bool = True
    figures: dict[str, Any] = field(default_factory=dict)

    def calls(self) -> dict[str, Callable[[], Any]]:
        if not self.trains:
            return {"forward": self.forward}
        out = self.forward()
        return {
            "forward": self.forward,
            "backward": lambda: torch.autograd.grad(out, self.inputs, self.upstream, retain_graph=True),
            "both": lambda: torch.autograd.grad(self.forward(), self.inputs, self.upstream),
        }


class Bench:
    """A cell's tree, and what all its ways are given and held against."""

    def __init__(self, cell: Cell, device: torch.device) -> None:
        self.cell, self.device = cell, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        one = shape(cell.shape).grown(cell.length)
        self.layout = conversation([one[1:]] * one.turns)
        self.row = {name: x.to(device) for name, x in fr.collate([self.layout], length=cell.length).items()}
        self.pairs, self.packed = amount([self.layout]).pairs, packed_paths(self.layout, device)
        self.inputs = self.heads(cell.length)
        self.upstream = self.random(cell.length, cell.heads)
        self.expected = self.reference()

    def random(self, length: int, heads: int) -> Tensor:
        return torch.randn(1, length, heads, self.cell.size, device=self.device, dtype=self.dtype)

    def heads(self, length: int) -> list[Tensor]:
        numbers = (self.cell.heads, self.cell.groups, self.cell.groups)
        return [self.random(length, n).transpose(1, 2).requires_grad_() for n in numbers]

    def reference(self) -> list[Tensor]:
        """Outputs of the packed tokens, one copy each, and gradients where the upstream one is that of these alone."""
        index, owned = self.packed.index, self.packed.owned
        given = [x[0].detach().transpose(0, 1)[index].requires_grad_() for x in self.inputs]
        out = flash(*given, self.packed)
        for a, b in list(pairwise(self.packed.begins.tolist()))[-2:]:
            error = relative_l2([out[a:b]], [one_by_one(*(x[a:b].detach().float() for x in given))])
            assert error < WRONG[self.dtype], f"packed is off by {error:.2g}"
        sums = []
        for gradient in torch.autograd.grad(out, given, self.upstream[0][index] * owned[:, None, None]):
            total = torch.zeros(self.cell.length, *gradient.shape[1:], device=self.device)
            sums.append(total.index_add_(0, index, gradient.float()))
        return [out.detach()[owned], *sums]

    def checked(self, way: Way) -> Way:
        """The way after its first call, which compiles, with its error; raises if that is too large."""
        places = self.packed.index[self.packed.owned]
        out = way.forward()
        errors = [relative_l2([out[0, places]], self.expected[:1])]
        if way.trains:
            upstream = torch.zeros_like(way.upstream)
            upstream[0, places] = way.upstream[0, places]
            found = torch.autograd.grad(out, way.inputs, upstream)
            errors += [relative_l2([a[0].transpose(0, 1)], [b]) for a, b in zip(found, self.expected[1:], strict=True)]
        way.figures["error"] = max(errors)
        if not max(errors) < WRONG[self.dtype]:
            raise ArithmeticError(f"off by {max(errors):.2g}")
        return way

    def over_tree(self, attend: Callable[[], Tensor], trains: bool, **figures: Any) -> Way:
        def forward() -> Tensor:
            with torch.set_grad_enabled(trains):
                return attend()

        return self.checked(Way(forward, self.inputs, self.upstream, self.pairs, trains, figures))

    def flex(self) -> Way:
        table = fr.block_mask(self.row)
        attend = lambda: flex.attend(*self.inputs, table, self.cell.size**-0.5)  # noqa: E731
        return self.over_tree(attend, self.device.type == "cuda", **self.computed(table))

    def computed(self, table: Any) -> dict[str, float]:
        blocks = int(table.kv_num_blocks.sum()) + int(table.full_kv_num_blocks.sum())
        return {"computed / visible": blocks * table.BLOCK_SIZE[0] * table.BLOCK_SIZE[1] / self.pairs}

    def segments(self) -> Way:
        why = segments.route(*self.inputs, None)
        if why.startswith("tiled") and self.device.type == "cuda":
            raise NotImplementedError(f"segments are {why}")
        work = segments.prepare(self.row)
        return self.over_tree(lambda: segments.attend(*self.inputs, work, self.cell.size**-0.5), True)

    def packed_flash(self) -> Way:
        given = [x[0].detach().transpose(0, 1)[self.packed.index].requires_grad_() for x in self.inputs]
        n = len(self.packed.begins) - 1
        figures = {} if n == self.layout.n_samples else {"note": f"{n} of {self.layout.n_samples} samples"}
        upstream = torch.randn_like(given[0])
        return Way(lambda: flash(*given, self.packed), given, upstream, self.packed.pairs, figures=figures)

    def causal(self, kernel: SDPBackend) -> Way:
        """One causal sequence of as many pairs as the tree; its length a multiple of 8."""
        length = max(8, round((2 * self.pairs) ** 0.5 / 8) * 8)
        q, k, v = self.heads(length)
        upstream = self.random(length, self.cell.heads).transpose(1, 2)

        def forward() -> Tensor:
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        return Way(forward, [q, k, v], upstream, length * (length + 1) // 2)

    def rung(self, setting: dict[str, Any]) -> Way:
        """Flex compiled anew under a setting of its kernel."""
        torch._dynamo.reset()
        compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
        size = setting.get("block_size", 128)
        table = fr.block_mask(self.row, block_size=size if isinstance(size, int) else tuple(size))
        options = {"scale": self.cell.size**-0.5, "kernel_options": setting.get("kernel_options"), "enable_gqa": True}
        trains = self.device.type == "cuda"
        inputs = self.inputs if trains else [x.detach() for x in self.inputs]
        attend = lambda: compiled(*inputs, block_mask=table, **options).transpose(1, 2)  # noqa: E731
        return self.over_tree(attend, trains, **self.computed(table))


def attempt(call: Callable[[], Any]) -> tuple[Any, str]:
    """What a call gave, or else None and why: no memory, or a feature that is not there."""
    try:
        return call(), ""
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:160]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"  {reason}", flush=True)
        return None, reason


def rows_of(bench: Bench, makers: dict[str, Callable[[], Way]], repeats: int) -> list[dict[str, Any]]:
    """All ways timed in turn: forward, backward, and both."""
    calls: dict[str, Callable[[], Any]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, make in makers.items():
        way, failed = attempt(make)
        some = attempt(way.calls)[0] if way else None
        rows[name] = {"way": name, **(way.figures if way else {}), "left out": failed or None}
        if some:
            calls |= {f"{name}\n{part}": call for part, call in some.items()}
            rows[name]["pairs"] = way.pairs
            for call in some.values():
                call()
    times, failed = attempt(lambda: interleaved(calls, repeats, bench.device, least_seconds=5e-3))
    for name, row in rows.items():
        for part, share in (("forward", 1.0), ("backward", 2.5), ("both", 3.5)):
            if seconds := (times or {}).get(f"{name}\n{part}"):
                middle = statistics.median(seconds)
                row[f"{part} ms"] = 1e3 * middle
                flops = 4 * share * bench.cell.heads * bench.cell.size * row["pairs"]
                row[f"{part} TFLOP/s"] = flops / middle / 1e12
    packed = rows.get("packed", {})
    for row in rows.values():
        for part in ("forward", "backward", "both"):
            if f"{part} TFLOP/s" in row and f"{part} TFLOP/s" in packed:
                row[f"{part} of packed"] = row[f"{part} TFLOP/s"] / packed[f"{part} TFLOP/s"]
    return list(rows.values())


def table(cell: Cell, device: torch.device, repeats: int, rungs: list[dict[str, Any]]) -> dict[str, Any]:
    bench, failed = attempt(lambda: Bench(cell, device))
    if bench is None:
        return {"left out": failed}
    makers: dict[str, Callable[[], Way]] = {"packed": bench.packed_flash}
    if rungs:
        makers["as it is"] = lambda: bench.rung({})
        makers |= {one["name"]: lambda one=one: bench.rung(one) for one in rungs}
    else:
        makers |= {"flex": bench.flex, "segments": bench.segments}
        makers["causal SDPA, flash"] = lambda: bench.causal(SDPBackend.FLASH_ATTENTION)
        if device.type == "cuda":
            makers["causal SDPA, cuDNN"] = lambda: bench.causal(SDPBackend.CUDNN_ATTENTION)
    return {"ways": rows_of(bench, makers, repeats)}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    run = Run(__file__, __doc__)
    run.option("--only", default="", help="cells whose name holds this")
    run.option("--small", action="store_true", help="a rehearsal")
    run.option("--rungs", type=Path, metavar="FILE", help="settings of the flex kernel, for heads of a cell's size")
    options = run.start(arguments)
    chosen = SMALL if options.small else [cell for cell in CELLS if options.only in cell.name]
    cells = []
    for cell in chosen:
        rungs = json.loads(options.rungs.read_text()) if options.rungs else []
        if run.device.type == "cuda":
            rungs = [one for one in rungs if one.get("head_size", cell.size) == cell.size]
        else:  # whose kernels are others
            rungs = [{"name": one["name"]} for one in rungs[:1]]
        about = {"cell": cell.name, "rungs": [one["name"] for one in rungs]}
        cells.append(run.cell(about, table, cell, run.device, options.repeats, rungs))
        run.table(cell.name, cells[-1].get("ways", [cells[-1]]), hidden=["pairs", "cell", "rungs"])
    return run.finish(cells=cells)


if __name__ == "__main__":
    main()
