"""Dense and block-sparse masks for one conversation in one row: what they cost to make, and what attention costs.

    python benchmarks/masks.py                                     # 1K to 32K tokens with attention, lists to 1M
    python benchmarks/masks.py --lengths 1024 4096 --lists         # shorter, and no lists beyond
    python benchmarks/masks.py --shapes agent --device cuda        # forward and backward

The rule (who sees whom) and the order (how tokens are stored) are told apart, so that the cost of one is not counted as
the other's:

dense                   bool S x S mask, attention through SDPA
turn/role, interleaved  `create_block_mask` from the paper's rule, in the paper's order: h t r_in r_out, by turns
turn/role               the same, stored as we store it: the trunk, then the branches
interval                `create_block_mask` from our rule, kv <= q < until[kv], in our order
closed form             ours: `fr.block_mask`, the lists written down from `until`

*Compiled* is `create_block_mask` under torch.compile: it makes no S x S mask, goes through all pairs, and compiles for
every length (*first ms*).

Conversations go on with turns of a shape (h/t/r tokens) until the row is full. Outputs (on a GPU gradients too) are
held against plain causal attention over each sample by itself before anything is timed. *Blocks* are 128 x 128; *area*
is what the lists let through, by visible pairs. Attention is compiled flex, on a CPU forward alone, which is all it has
there. What would not fit into memory, or take minutes, is not run, with the arithmetic of it.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import flexreason as fr
from flexreason.bench.batches import row_in_papers_order
from flexreason.bench.measure import interleaved, peak
from flexreason.bench.report import amount
from flexreason.memory import available_bytes
from flexreason.proof.float64 import relative_l2
from shared import SHAPES, Run, conversation, in_tokens, logarithmic, paths, shape

LENGTHS, LISTS = [2**n for n in range(10, 16)], [2**n for n in range(16, 21)]

HEADS = {"cpu": (2, 2, 64), "cuda": (16, 8, 128)}
"""Query heads, key heads and their size."""

BYTES = {"dense": 3, "turn/role, interleaved": 11, "turn/role": 11, "interval": 11}
"""Taken at most for one pair of S x S while a mask is made, as measured at 8K tokens and more."""

COMPILED = {"interleaved, compiled": "turn/role, interleaved", "interval, compiled": "interval"}
"""Two of the ways once more, compiled; their lists are the same, so attention is not timed again."""

A_PAIR, PATIENCE = 1e-9, 40
"""Seconds that the compiled ways take for one pair of S x S on a CPU, as measured; and how long is waited."""

WRONG = {torch.float32: 1e-4, torch.bfloat16: 0.02}


def makers(row: dict[str, Tensor], compiled: Callable[..., BlockMask]) -> dict[str, Callable[[], Any]]:
    """Every way to make the mask of a row, by name."""
    size, device = row["until"].shape[1], str(row["until"].device)
    paper = row_in_papers_order(row)
    rules = {
        "turn/role, interleaved": fr.mask_mod(paper, mask="turn_role"),
        "turn/role": fr.mask_mod(row, mask="turn_role"),
        "interval": fr.mask_mod(row),
    }

    def create(make: Callable[..., BlockMask], name: str) -> Callable[[], BlockMask]:
        return lambda: make(rules[name], None, None, size, size, device=device)

    return {
        "dense": lambda: fr.dense_mask(row),
        **{name: create(create_block_mask, name) for name in rules},
        **{name: create(compiled, of) for name, of in COMPILED.items()},
        "closed form": lambda: fr.block_mask(row),
    }


def too_large(way: str, tokens: int, device: torch.device) -> str:
    """Why a mask is not made, or nothing."""
    need, seconds = BYTES.get(way, 0) * tokens**2, A_PAIR * tokens**2
    if need > 0.8 * available_bytes(device):
        return f"does not fit: {BYTES[way]} x {tokens:,}^2 bytes = {need / 2**30:,.0f} GiB"
    if way in COMPILED and device.type == "cpu" and seconds > PATIENCE:
        return f"not run: {1e9 * A_PAIR:.0f} ns x {tokens:,}^2 = {seconds:,.0f} s"
    return ""


def blocks(mask: BlockMask, pairs: int) -> dict[str, Any]:
    partial, full = int(mask.kv_num_blocks.sum()), int(mask.full_kv_num_blocks.sum())
    n_rows, n_columns = mask.kv_indices.shape[-2], -(-mask.seq_lengths[1] // mask.BLOCK_SIZE[1])
    area = (partial + full) * mask.BLOCK_SIZE[0] * mask.BLOCK_SIZE[1] / pairs
    return {"skipped": n_rows * n_columns - partial - full, "full": full, "partial": partial, "area": area}


class Attention:
    """Queries, keys and values of a row, attention over them under any of its masks, and what is right."""

    def __init__(self, layout: fr.Layout, row: dict[str, Tensor]) -> None:
        self.device = row["until"].device
        self.trains = self.device.type == "cuda"
        n_q, n_kv, size = HEADS[self.device.type]
        draw = torch.Generator(self.device).manual_seed(0)
        dtype = torch.bfloat16 if self.trains else torch.float32
        made = [
            torch.randn(1, n, len(layout), size, generator=draw, device=self.device, dtype=dtype)
            for n in (n_q, n_kv, n_kv, n_q)
        ]
        self.inputs, self.upstream = [x.requires_grad_(self.trains) for x in made[:3]], made[3]
        self.paths = [path.to(self.device) for path in paths(layout)]
        names = ("document", "turn", "role", "position_ids", "until")
        paper = row_in_papers_order({**row, "place": torch.arange(len(layout), device=self.device)[None]})
        self.order = paper["place"][0]
        assert all(torch.equal(row[name][0, self.order], paper[name][0]) for name in names)

    def over(self, mask: Any, is_interleaved: bool) -> Callable[[], list[Tensor]]:
        """Output, and on a GPU gradients, in our order."""
        order = self.order if is_interleaved else torch.arange(len(self.order), device=self.device)
        q, k, v = (x.detach()[:, :, order].requires_grad_(self.trains) for x in self.inputs)
        upstream = self.upstream[:, :, order]
        is_grouped = q.shape[1] != k.shape[1]

        def call() -> list[Tensor]:
            if isinstance(mask, Tensor):
                out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=is_grouped)
            else:
                out = self.flex(q, k, v, block_mask=mask, enable_gqa=is_grouped)
            return [out, *torch.autograd.grad(out, [q, k, v], upstream)] if self.trains else [out]

        return call

    def compile(self) -> None:
        """Anew for every length: on a CPU a second one fails to compile in what is left of the first."""
        torch._dynamo.reset()
        self.flex = torch.compile(flex_attention, fullgraph=True, dynamic=False)

    def error(self, call: Callable[[], list[Tensor]], is_interleaved: bool) -> float:
        """Outputs against plain causal attention over some samples, each by itself; gradients by those of all."""
        found = call()
        if is_interleaved:
            found = [x[:, :, torch.argsort(self.order)] for x in found]
        q, k, v = (x.detach() for x in self.inputs)
        is_grouped = q.shape[1] != k.shape[1]
        errors = []
        for path in self.paths:
            q_, k_, v_ = (x[:, :, path] for x in (q, k, v))
            right = F.scaled_dot_product_attention(q_, k_, v_, is_causal=True, enable_gqa=is_grouped)
            errors.append(relative_l2([found[0][:, :, path]], [right]))
        if self.trains:
            self.gradients = getattr(self, "gradients", found[1:])  # of the first way, whose outputs were just compared
            errors.append(relative_l2(found[1:], self.gradients))
        return max(errors)


def cell(run: Run, name: str, tokens: int, with_attention: bool) -> dict[str, Any]:
    """All ways for one conversation."""
    layout = conversation(shape(name).filling(tokens))
    row = {key: x.to(run.device) for key, x in fr.collate([layout], length=tokens).items()}
    pairs, repeats = amount([layout]).pairs, run.options.repeats
    torch._dynamo.reset()
    ways = makers(row, torch.compile(create_block_mask, dynamic=False))
    found: dict[str, dict[str, Any]] = {way: {} for way in ways}
    calls, masks = {}, {}
    for way, make in ways.items():
        if why := too_large(way, tokens, run.device):
            found[way]["left out"] = why
            continue
        start = time.perf_counter()
        made = make()
        found[way]["first ms"] = 1e3 * (time.perf_counter() - start)
        calls[way], masks[way] = make, made if with_attention else None
        if isinstance(made, BlockMask):
            found[way] |= blocks(made, pairs)
        else:
            found[way]["area"] = tokens**2 / pairs
        del made
        found[way]["peak MiB"] = peak(make, run.device).added / 2**20
    for way, seconds in interleaved(calls, repeats, run.device).items():
        found[way]["build ms"] = [1e3 * t for t in summary(seconds)]
    if with_attention:
        for way, figures in attention(layout, row, masks, repeats).items():
            found[way] |= figures
    return {"turns": layout.n_samples, "pairs": pairs, "ways": found}


def attention(layout: fr.Layout, row: dict[str, Tensor], masks: dict[str, Any], repeats: int) -> dict[str, Any]:
    given, calls = Attention(layout, row), {}
    given.compile()
    found: dict[str, dict[str, Any]] = {}
    for way, mask in masks.items():
        if way not in COMPILED:
            is_interleaved = "interleaved" in way
            call = given.over(mask, is_interleaved)
            start = time.perf_counter()
            error = given.error(call, is_interleaved)
            found[way] = {"error": error, "first call s": time.perf_counter() - start}
            if not error < WRONG[given.upstream.dtype]:
                raise ArithmeticError(f"{way}: attention is off by {error:.2g}")
            calls[way] = call
    for way, seconds in interleaved(calls, repeats, given.device).items():
        found[way]["attention ms"] = [1e3 * t for t in summary(seconds)]
    return found


def summary(values: list[float]) -> list[float]:
    return [statistics.median(values), min(values), max(values)]


COLUMNS = ["build ms", "peak MiB", "skipped", "full", "partial", "area", "attention ms", "error", "first ms"]


def flat(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for one in cells:
        about = {"conversation": one["conversation"], "tokens": one["tokens"], "turns": one.get("turns")}
        for way, figures in one.get("ways", {"all": {"left out": one.get("left out")}}).items():
            rows.append({**about, "mask": way, **{name: figures.get(name) for name in [*COLUMNS, "left out"]}})
    return rows


COLORS = {
    "dense": "#b03a2e",
    "turn/role, interleaved": "#d68910",
    "turn/role": "#7d6608",
    "interval": "#5d6d7e",
    "interleaved, compiled": "#af7ac5",
    "interval, compiled": "#9db8d2",
    "closed form": "#1f4e79",
}


def draw(rows: list[dict[str, Any]], figure: Any) -> None:
    """A row of panels a conversation: time to make, memory to make, attention."""
    names = list(dict.fromkeys(row["conversation"] for row in rows))
    figure.set_size_inches(12, 3.2 * len(names))
    panels = figure.subplots(len(names), 3, squeeze=False)
    for name, line in zip(names, panels, strict=True):
        ticks = sorted({row["tokens"] for row in rows if row["conversation"] == name})
        for axes, column in zip(line, ("build ms", "peak MiB", "attention ms"), strict=True):
            shown = [n for n in ticks if column != "attention ms" or n <= max(LENGTHS)]
            logarithmic(axes, f"{name}: {column}", "tokens in the row", column, shown)
            for way, color in COLORS.items():
                drawn = [r for r in rows if r["conversation"] == name and r["mask"] == way and r.get(column)]
                points = [(r["tokens"], r[column] if column == "peak MiB" else r[column][0]) for r in drawn]
                if points := [(x, y) for x, y in points if y > 0.05 or column != "peak MiB"]:
                    axes.plot(*zip(*points, strict=True), marker="o", markersize=3, color=color, label=way)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    run = Run(__file__, __doc__, repeats=3)
    run.option("--lengths", type=int, nargs="*", default=LENGTHS, help="of rows with attention")
    run.option("--lists", type=int, nargs="*", default=LISTS, help="of rows without")
    run.option("--shapes", nargs="+", default=list(SHAPES), help='by name, or as "8 x 64/256/64"')
    options = run.start(arguments)
    cells = []
    for tokens in [*options.lengths, *options.lists]:
        for name in options.shapes if tokens in options.lengths else options.shapes[:1]:
            about = {"conversation": f"{name} ({'/'.join(map(str, shape(name)[1:]))})", "tokens": tokens}
            cells.append(run.cell(about, cell, run, name, tokens, tokens in options.lengths))
    rows = flat(cells)
    for name in dict.fromkeys(row["conversation"] for row in rows):
        shown = [{**row, "tokens": in_tokens(row["tokens"])} for row in rows if row["conversation"] == name]
        run.table(f"masks for one conversation, {name}", shown, hidden=["conversation"])
    return run.finish(lambda figure: draw(rows, figure), rows=rows)


if __name__ == "__main__":
    main()
