"""Attention over a tree on a GPU: one layer, forward and backward, against flash attention over the N samples.

    python benchmarks/kernel.py                          # the table; cells in order of importance
    python benchmarks/kernel.py --only 32K               # cells whose name holds these letters
    python benchmarks/kernel.py --sweep                  # the tuning ladder of the flex kernel, on the first cell
    python benchmarks/kernel.py --device cpu --small     # a rehearsal: every line of code that needs no GPU

Ours are *flex* (compiled FlexAttention over closed-form lists) and *segments*. Against them: *packed flash*, the N
samples side by side through torch's variable-length flash attention, which is FA2 unless the name says otherwise;
SDPA's flash and cuDNN kernels on one causal sequence of as many pairs as the tree; *interleaved*, the paper's storage
order (h0 t0 r0 r0' h1 ...) under its own rule, with lists from a compiled `create_block_mask`; and *dense*, SDPA under
an S x S mask. Queries, keys and values are transposed views, as models make them; bf16 on a GPU, fp32 on a CPU.

Every way is held against packed flash before it is timed: outputs and gradients, relative L2. TFLOP/s count visible
pairs alone, 4 x heads x size x pairs forward and 2.5 times that backward, each way over its own pairs. Where the N
samples have more than `PACKED_PAIRS`, packed flash is timed on some of them, evenly chosen: its rate is the same.
*of packed* is a way's rate, forward and backward together, by that of packed flash.
"""

import importlib.util
import inspect
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn

import flexreason as fr
from flexreason.attention import dense, flex, segments
from flexreason.proof.float64 import relative_l2
from flexreason.tree.mask import turn_role_rule
from measure import Budget, free, in_words, on_a_gpu, print_json, print_table, tell, timed

SHAPES = {
    "8 turns": [(64, 256, 64)] * 8,
    "16 turns": [(64, 256, 64)] * 16,
    "30 turns": [(150, 60, 30)] * 30,
    "agent": [(300, 150, 50)] * 60,
}
"""(h, t, r) of every turn, before they are scaled to a row's length."""

PACKED_PAIRS = 10**9
DENSE_FITS = 2**13
"""Tokens up to which dense is timed: its time is that of all S x S pairs, at a twentieth of flash's speed."""

WRONG = {torch.bfloat16: 0.02, torch.float32: 1e-4}
"""A way whose outputs or gradients are further off is not timed."""


@dataclass(frozen=True)
class Cell:
    """A row of the table, but for the way."""

    length: int
    size: int
    heads: int
    groups: int
    shape: str
    interleaved: bool = False  # a compile more

    @property
    def name(self) -> str:
        return f"{in_words(self.length)}, {self.heads} heads of {self.size} over {self.groups}, {self.shape}"


def cells(small: bool) -> list[Cell]:
    if small:
        return [Cell(256, 16, 4, 2, "8 turns", interleaved=True)]
    k = 1024
    first = [Cell(s * k, 128, 32, 8, shape, interleaved=True) for s in (32, 8) for shape in SHAPES]
    some = ("16 turns", "agent")
    more = [(32, 128, 16), (8, 128, 16), (32, 64, 32), (8, 64, 32), (128, 128, 32), (128, 64, 32), (128, 128, 16)]
    return first + [Cell(s * k, size, heads, 8, shape) for s, size, heads in more for shape in some]


# ---- what is attended over


def turns_of(shape: str) -> list[tuple[int, int, int]]:
    """The turns of a shape by its name, or of one like "8 x 64/256/64"."""
    if shape in SHAPES:
        return SHAPES[shape]
    times, turn = shape.split(" x ")
    h, t, r = map(int, turn.split("/"))
    return [(h, t, r)] * int(times)


def scaled(shape: list[tuple[int, int, int]], length: int) -> list[tuple[int, int, int]]:
    """The shape with all parts grown alike, to a tree of at most `length` tokens."""
    factor = length / (sum(h + t + 2 * r for h, t, r in shape) - shape[-1][2])
    return [(max(1, int(h * factor)), max(1, int(t * factor)), max(1, int(r * factor))) for h, t, r in shape]


def conversation(shape: list[tuple[int, int, int]], vocabulary: int = 1000, seed: int = 0) -> fr.Layout:
    generator = torch.Generator().manual_seed(seed)
    return fr.lay_out_turns(
        [tuple(torch.randint(0, vocabulary, (n,), generator=generator) for n in turn) for turn in shape]
    )


@dataclass(frozen=True, eq=False)
class Packed:
    """Sequences side by side: where each begins, [N + 1], and which token of the tree every token is, [P]."""

    begins: Tensor  # int32
    longest: int
    index: Tensor
    owned: Tensor  # bool [P]: of the copies of a token, one

    @property
    def lengths(self) -> list[int]:
        return self.begins.diff().tolist()

    @property
    def pairs(self) -> int:
        return sum(n * (n + 1) // 2 for n in self.lengths)


def causal(length: int, device: torch.device) -> Packed:
    """One plain sequence."""
    index = torch.arange(length, device=device)
    begins = torch.tensor([0, length], dtype=torch.int32, device=device)
    return Packed(begins, length, index, torch.ones_like(index, dtype=torch.bool))


def packed_samples(layout: fr.Layout, device: torch.device, most_pairs: float = float("inf")) -> Packed:
    """The samples of a layout, or as many of them, evenly chosen, as have no more than `most_pairs`."""
    lasts = last_tokens(layout).flip(0)  # so that the longest is among those that are chosen
    lengths = layout.position_ids[lasts] + 1
    every = 1
    while len(lasts) > every and sum(n * (n + 1) // 2 for n in lengths[::every].tolist()) > most_pairs:
        every += 1
    return packed_paths(layout, lasts[::every].flip(0), device)


def last_tokens(layout: fr.Layout) -> Tensor:
    """The index of every sample's last token: [N]. In these shapes it is stored behind the token that predicts it."""
    ends = torch.cat([layout.target_turn.diff() != 0, torch.ones(1, dtype=torch.bool)])
    return layout.target_source[ends] + 1


def packed_paths(layout: fr.Layout, lasts: Tensor, device: torch.device) -> Packed:
    """The paths from the root to some tokens, side by side."""
    seen = torch.zeros(len(layout), dtype=torch.bool)
    paths, owned = [], []
    for last in lasts.tolist():
        path = (layout.until[: last + 1] > last).nonzero().squeeze(1)
        owned.append(~seen[path])
        seen[path] = True
        paths.append(path)
    sizes = torch.tensor([0, *map(len, paths)])
    return Packed(
        sizes.cumsum(0).to(device, torch.int32),
        int(sizes.max()),
        torch.cat(paths).to(device),
        torch.cat(owned).to(device),
    )


def pairs_of(layout: fr.Layout) -> int:
    return int((layout.position_ids + 1).sum())


def in_order(layout: fr.Layout, row: dict[str, Tensor], interleaved: bool) -> Tensor:
    """The order in which another layout stores a row: [S], indices of the row.

    Interleaved is h0 t0 r0 r0' h1 ...; otherwise the trunk, then the branches with the first turn's first.
    """
    role, turn = layout.role.long(), layout.turn.long()
    place = torch.zeros_like(role)
    kinds = [fr.Role.PROMPT, fr.Role.REASONING, fr.Role.RESPONSE, fr.Role.CONTEXT]
    for number, kind in enumerate(kinds):
        place[role == int(kind)] = number
    # The last turn's response is in no later context, so it has but one copy.
    by = turn * 4 + place
    if not interleaved:
        branch = (role == int(fr.Role.REASONING)) | (role == int(fr.Role.RESPONSE))
        by = by + branch * (4 * (int(turn.max()) + 1))
    order = torch.argsort(by, stable=True)
    return torch.cat([order, torch.arange(len(layout), row["until"].shape[1])]).to(row["until"].device)


def listed(row: dict[str, Tensor], order: Tensor, compiled: bool = True) -> BlockMask:
    """Lists for a row stored in another order: from the paper's rule, by `create_block_mask`."""
    rule = turn_role_rule(*(row[name][0][order].to(torch.int32) for name in ("turn", "role", "document")))
    create = _create_block_mask() if compiled else create_block_mask
    return create(rule, None, None, len(order), len(order), device=str(order.device))


@cache
def _create_block_mask() -> Callable[..., BlockMask]:
    return torch.compile(create_block_mask)


# ---- flash attention over sequences side by side


def flash(q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> Tensor:
    """Causal attention within each sequence: queries [P, H, D] over keys and values [P, G, D]: [P, H, D]."""
    if q.device.type == "cpu":
        return torch.cat([_sdpa(q[a:b], k[a:b], v[a:b]) for a, b in pairwise(packed.begins.tolist())])
    if _repeats_heads():
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return _varlen(q, k, v, packed)


def flash_name(device: torch.device) -> str:
    if device.type == "cpu":
        return "SDPA on CPU, a sample at a time"
    name = f"varlen {current_flash_attention_impl() or 'FA2'}"
    return f"{name}, K and V repeated" if _repeats_heads() else name


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (rearrange(x, "s h d -> 1 h s d") for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return rearrange(out, "1 h s d -> s h d")


def _varlen(q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> Tensor:
    # Until 2.12 groups of heads are taken as they come; since then they must be announced.
    options = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    begins, longest = packed.begins, packed.longest
    return varlen_attn(q, k, v, begins, begins, longest, longest, window_size=(-1, 0), **options)


@cache
def _repeats_heads(device: str = "cuda") -> bool:
    """Whether this torch's variable-length flash needs a key head for every query head; asked once, gradients too."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(300, heads, 64, generator=generator, device=device, dtype=torch.bfloat16).requires_grad_()
        for heads in (4, 2, 2)
    )
    begins = torch.tensor([0, 100, 300], dtype=torch.int32, device=device)
    every = torch.arange(300, device=device)
    packed = Packed(begins, 200, every, every >= 0)
    upstream = torch.randn_like(q)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.cat([_sdpa(*(x[a:b] for x in exact)) for a, b in ((0, 100), (100, 300))])
        gradients = torch.autograd.grad(expected, exact, upstream.double())

    def error(k: Tensor, v: Tensor) -> float:
        out = _varlen(q, k, v, packed)
        found = torch.autograd.grad(out, [q, *leaves], upstream)
        return max(relative_l2([a], [b]) for a, b in zip([out, *found], [expected, *gradients], strict=True))

    leaves = [k, v]
    with suppress(RuntimeError, ValueError):
        if error(k, v) < WRONG[torch.bfloat16]:
            return False
    assert error(*(x.repeat_interleave(2, dim=1) for x in (k, v))) < WRONG[torch.bfloat16], "varlen_attn is wrong"
    return True


def other_flash() -> Iterator[str]:
    """Flash attention implementations beside torch's own, where their packages are installed."""
    for name, package in (("FA3", "flash_attn_interface"), ("FA4", "flash_attn.cute")):
        with suppress(ModuleNotFoundError):
            if importlib.util.find_spec(package) is not None:
                yield name


# ---- ways


@dataclass(eq=False)
class Way:
    """One way to compute attention: what it is called on, and how its result compares with the tree's."""

    forward: Callable[[], Tensor]  # [1, S, H, D], or [P, H, D] for packed sequences
    inputs: list[Tensor]
    upstream: Tensor
    pairs: int
    order: Tensor | None = None  # in which its tokens are stored, if not the tree's
    trains: bool = True
    figures: dict[str, Any] = field(default_factory=dict)

    def backward(self, out: Tensor) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(out, self.inputs, self.upstream, retain_graph=True)

    def both(self) -> Any:
        return torch.autograd.grad(self.forward(), self.inputs, self.upstream)


@dataclass(eq=False)
class Bench:
    """A cell's tree, and what all its ways are given and held against."""

    cell: Cell
    device: torch.device

    def __post_init__(self) -> None:
        cell, device = self.cell, self.device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.layout = conversation(scaled(turns_of(cell.shape), cell.length))
        row = fr.collate([self.layout], length=cell.length)
        self.row = {name: tensor.to(device) for name, tensor in row.items()}
        self.pairs = pairs_of(self.layout)
        self.packed = packed_samples(self.layout, device, PACKED_PAIRS)
        self.generator = torch.Generator(device).manual_seed(0)
        self.inputs = self.heads(cell.length)
        self.upstream = self.random(1, cell.length, cell.heads, cell.size)
        self.expected = self.reference()

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device, dtype=self.dtype)

    def heads(self, length: int) -> list[Tensor]:
        """Queries, keys and values [1, H, S, D] as views of [1, S, H, D]."""
        cell = self.cell
        made = (self.random(1, length, h, cell.size) for h in (cell.heads, cell.groups, cell.groups))
        return [x.transpose(1, 2).requires_grad_() for x in made]

    @property
    def checked(self) -> Tensor:
        """Tokens that some of the packed samples hold, one copy each: [C]."""
        return self.packed.index[self.packed.owned]

    def reference(self) -> list[Tensor]:
        """Outputs of the checked tokens, and gradients when the upstream one is that of these alone: by packed flash.

        Copies of a token are summed in fp32.
        """
        index, owned = self.packed.index, self.packed.owned
        given = [rearrange(x.detach(), "1 h s d -> s h d")[index].requires_grad_() for x in self.inputs]
        out = flash(*given, self.packed)
        upstream = self.upstream[0][index] * owned[:, None, None]
        sums = []
        for gradient in torch.autograd.grad(out, given, upstream):
            total = torch.zeros(self.cell.length, *gradient.shape[1:], device=self.device)
            for a, b in pairwise(self.packed.begins.tolist()):
                total.index_add_(0, index[a:b], gradient[a:b].float())
            sums.append(total)
        return [out.detach()[owned], *sums]

    def error(self, way: Way) -> float:
        """The largest of the relative errors of outputs and gradients."""
        expected_out, *expected = self.expected
        places = self.checked
        if way.order is not None:
            places = torch.argsort(way.order)[places]
        out = way.forward()
        found = [relative_l2([out[0, places]], [expected_out])]
        if way.trains:
            upstream = torch.zeros_like(way.upstream)
            upstream[0, places] = way.upstream[0, places]
            gradients = torch.autograd.grad(out, way.inputs, upstream)
            for gradient, wanted in zip(gradients, expected, strict=True):
                sorted_as = wanted if way.order is None else wanted[way.order]
                found.append(relative_l2([rearrange(gradient, "1 h s d -> s h d")], [sorted_as]))
        return max(found)

    # ---- ours

    def over_tree(self, attend: Callable[..., Tensor], table: Any, **figures: Any) -> Way:
        scale = self.cell.size**-0.5
        trains = self.device.type == "cuda" or attend is not flex.attend
        graph = nullcontext if trains else torch.no_grad  # flex has no backward on CPU

        def forward() -> Tensor:
            with graph():
                return attend(*self.inputs, table, scale)

        return Way(forward, self.inputs, self.upstream, self.pairs, trains=trains, figures=figures)

    def flex(self) -> Way:
        table, seconds = self.prepared(lambda: fr.block_mask(self.row))
        return self.over_tree(flex.attend, table, **computed(table, self.pairs), **{"mask ms": seconds * 1e3})

    def segments(self) -> Way:
        route = segments.route(*self.inputs, None)
        if route.startswith("tiled") and self.device.type == "cuda":
            raise NotImplementedError(f"segments are {route}")
        table, seconds = self.prepared(lambda: work_list(self.row))
        return self.over_tree(segments.attend, table, **{"mask ms": seconds * 1e3})

    def dense(self) -> Way:
        table, seconds = self.prepared(lambda: dense.prepare(self.row, "interval", None, None))
        return self.over_tree(dense.attend, table, **{"mask ms": seconds * 1e3})

    def prepared(self, make: Callable[[], Any]) -> tuple[Any, float]:
        """A table, and how long it takes to make one when it is not the first."""
        make()
        return make(), statistics.median(timed({"": make}, self.device, 0.1)[""])

    # ---- against them

    def interleaved(self, interleaved: bool = True) -> Way:
        order = in_order(self.layout, self.row, interleaved)
        return self.reordered(order)

    def reordered(self, order: Tensor) -> Way:
        table, seconds = self.prepared(lambda: listed(self.row, order))
        q, k, v = (self.in_order(x, order) for x in self.inputs)
        trains = self.device.type == "cuda"

        def forward() -> Tensor:
            with nullcontext() if trains else torch.no_grad():
                return flex.attend(q, k, v, table, self.cell.size**-0.5)

        figures = {**computed(table, self.pairs), "mask ms": seconds * 1e3}
        return Way(forward, [q, k, v], self.upstream[:, order], self.pairs, order, trains, figures)

    def in_order(self, x: Tensor, order: Tensor) -> Tensor:
        return x.detach().transpose(1, 2)[:, order].transpose(1, 2).requires_grad_()

    def packed_flash(self) -> Way:
        q, k, v = (x[0].detach().transpose(0, 1)[self.packed.index].requires_grad_() for x in self.inputs)
        n, n_all = len(self.packed.lengths), self.layout.n_samples
        return Way(
            lambda: flash(q, k, v, self.packed),
            [q, k, v],
            torch.randn_like(q),
            self.packed.pairs,
            figures={} if n == n_all else {"note": f"{n} of {n_all} samples"},
        )

    def causal_sdpa(self, kernel: SDPBackend) -> Way:
        """One causal sequence of as many pairs as the tree; its length a multiple of 8."""
        length = max(8, round((2 * self.pairs) ** 0.5 / 8) * 8)
        q, k, v = self.heads(length)

        repeated = 1

        def forward() -> Tensor:
            keys, values = (x.repeat_interleave(repeated, dim=1) if repeated > 1 else x for x in (k, v))
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(
                    q, keys, values, is_causal=True, enable_gqa=q.shape[1] != keys.shape[1]
                )

        try:
            forward()
        except RuntimeError:  # it may be that this kernel does not group heads
            repeated = q.shape[1] // k.shape[1]
        figures = {"note": "K and V repeated"} if repeated > 1 else {}
        return Way(forward, [q, k, v], torch.randn_like(q), length * (length + 1) // 2, figures=figures)


def work_list(row: dict[str, Tensor], window: int | None = None) -> segments.Segments:
    """What segments compute, which is made when it is first asked for: asked for here."""
    work = segments.prepare(row, window=window)
    for part in ("calls",) if row["until"].device.type == "cuda" else ("rectangles", "diagonal"):
        getattr(work, part)
    return work


def computed(table: BlockMask, pairs: int) -> dict[str, float]:
    """What the lists let through, in visible pairs."""
    blocks = int(table.kv_num_blocks.sum()) + int(table.full_kv_num_blocks.sum())
    return {"computed / visible": blocks * table.BLOCK_SIZE[0] * table.BLOCK_SIZE[1] / pairs}


# ---- the table


def ways_of(bench: Bench) -> dict[str, Callable[[], Way]]:
    """All ways of a cell. Those whose result is compared with packed flash's come before the rest."""
    found: dict[str, Callable[[], Way]] = {"flex": bench.flex, "segments": bench.segments}
    if bench.cell.interleaved:
        found["interleaved"] = bench.interleaved
    if bench.cell.length <= DENSE_FITS:
        found["dense"] = bench.dense
    found["packed flash"] = bench.packed_flash
    found["causal SDPA flash"] = lambda: bench.causal_sdpa(SDPBackend.FLASH_ATTENTION)
    if bench.device.type == "cuda":
        found["causal SDPA cuDNN"] = lambda: bench.causal_sdpa(SDPBackend.CUDNN_ATTENTION)
    return found


def checked(bench: Bench, way: Way, compare: bool) -> Way:
    """The way after its first call, which compiles, with its error where it has one; raises if that is too large."""
    start = time.perf_counter()
    if compare:
        way.figures["error"] = bench.error(way)
    elif way.trains:
        way.both()
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
    way.figures["first call s"] = time.perf_counter() - start
    if compare and not way.figures["error"] < WRONG[bench.dtype]:
        raise ArithmeticError(f"off by {way.figures['error']:.2g}")
    return way


def figures(cell: Cell, way: Way, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Milliseconds and rates of one way; what it takes together is measured, not added up."""
    flops = 4 * cell.heads * cell.size * way.pairs
    found: dict[str, Any] = {}
    for name, times in (("forward", 1.0), ("backward", 2.5), ("both", 3.5)):
        if name in seconds:
            median = statistics.median(seconds[name])
            found[f"{name} ms"] = median * 1e3
            found[f"{name} TFLOP/s"] = flops * times / median / 1e12
    return {**found, **way.figures}


def time_ways(bench: Bench, ways: dict[str, Way], seconds: float) -> dict[str, dict[str, Any]]:
    """All ways timed in turn: forward, backward, and both."""
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, way in ways.items():
        calls[name, "forward"] = way.forward
        if way.trains:
            calls[name, "backward"] = way.backward(way.forward())
            calls[name, "both"] = way.both
    found = timed({f"{name}\n{part}": call for (name, part), call in calls.items()}, bench.device, seconds)
    return {
        name: figures(bench.cell, way, {part: found[f"{name}\n{part}"] for other, part in calls if other == name})
        for name, way in ways.items()
    }


PARTS = ("forward", "backward", "both")
COLUMNS = [
    *("cell", "way", "rung", "of packed", "forward of packed", "backward of packed"),
    *(f"{part} ms" for part in PARTS),
    *(f"{part} TFLOP/s" for part in PARTS),
    *("computed / visible", "mask ms", "error", "first call s", "note", "failed"),
]


def of_packed(row: dict[str, Any], packed: dict[str, Any]) -> dict[str, Any]:
    """The row in the order of its columns, with its rates by packed flash's."""
    for part, title in zip(PARTS, ("forward of packed", "backward of packed", "of packed"), strict=True):
        if f"{part} TFLOP/s" in row and f"{part} TFLOP/s" in packed:
            row[title] = row[f"{part} TFLOP/s"] / packed[f"{part} TFLOP/s"]
    return {name: row[name] for name in COLUMNS if name in row}


def table(cell: Cell, device: torch.device, budget: Budget, seconds: float) -> list[dict[str, Any]]:
    print(f"\n{cell.name}", flush=True)
    bench, failed = budget.attempt("reference", lambda: Bench(cell, device))
    if bench is None:
        return [tell({"cell": cell.name, "way": "all", "failed": failed})]
    ways, rows = {}, []
    for name, make in ways_of(bench).items():
        compare = name in ("flex", "segments", "interleaved", "dense")
        way, failed = budget.attempt(
            f"{cell.name}, {name}", lambda make=make, compare=compare: checked(bench, make(), compare)
        )
        if way is None:
            rows.append(tell({"cell": cell.name, "way": name, "failed": failed}))
        else:
            ways[name] = way
    found, failed = budget.attempt(f"{cell.name}, times", lambda: time_ways(bench, ways, seconds))
    found = found or {}
    if failed == "out of memory":  # together; so one by one, which is less fair and says more
        for name, way in ways.items():
            alone, failed = budget.attempt(name, lambda name=name, way=way: time_ways(bench, {name: way}, seconds))
            found |= alone or {name: {"failed": failed}}
    for name in other_flash() if device.type == "cuda" else ():
        alone, failed = budget.attempt(name, lambda name=name: time_other(bench, name, seconds))
        found |= alone or {f"packed {name}": {"failed": failed}}
    packed = found.get("packed flash", {})
    for name, row in found.items():
        shown = f"{name} ({flash_name(device)})" if name == "packed flash" else name
        rows.append(tell(of_packed({"cell": cell.name, "way": shown, **row}, packed)))
    return rows


def time_other(bench: Bench, implementation: str, seconds: float) -> dict[str, dict[str, Any]]:
    activate_flash_attention_impl(implementation)
    try:
        way = checked(bench, bench.packed_flash(), compare=False)
        return time_ways(bench, {f"packed {implementation}": way}, seconds)
    finally:
        restore_flash_attention_impl()


# ---- the tuning ladder

AUTOTUNED = "max-autotune-no-cudagraphs"


@dataclass(frozen=True)
class Rung:
    """A setting of the flex kernel. Forward and backward are kernels of their own: one rung tries one of each."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    block: int | tuple[int, int] = 128
    mask: str = "interval"
    mode: str | None = None
    lists: str = "ours"  # "descending", "interleaved", "first turn first"


def forward_as(m: int, n: int, warps: int, stages: int) -> dict[str, int]:
    return {"fwd_BLOCK_M": m, "fwd_BLOCK_N": n, "fwd_num_warps": warps, "fwd_num_stages": stages}


def backward_as(m1: int, n1: int, m2: int, n2: int, warps: int, stages: int) -> dict[str, int]:
    """n1 must be a multiple of m1, and m2 of n2."""
    blocks = {"bwd_BLOCK_M1": m1, "bwd_BLOCK_N1": n1, "bwd_BLOCK_M2": m2, "bwd_BLOCK_N2": n2}
    return {**blocks, "bwd_num_warps": warps, "bwd_num_stages": stages}


def tried(name: str, forward: tuple[int, ...], backward: tuple[int, ...], **options: Any) -> Rung:
    return Rung(name, {**forward_as(*forward), **backward_as(*backward), **options})


LADDER = [
    Rung("as it is"),
    Rung("PRESCALE_QK", {"PRESCALE_QK": True}),
    Rung("FLASH", {"BACKEND": "FLASH"}),
    Rung("autotuned", mode=AUTOTUNED),
    Rung("lists of 256 x 128", block=(256, 128)),
    Rung("lists of 128 x 256", block=(128, 256)),
    Rung("lists of 256", block=256),
    tried("f 128x128 w8 s3, b 64 128 128 64 w8 s2", (128, 128, 8, 3), (64, 128, 128, 64, 8, 2)),
    tried("f 128x128 w8 s2, b 128 128 128 128 w8 s2", (128, 128, 8, 2), (128, 128, 128, 128, 8, 2)),
    tried("f 128x64 w4 s3, b 64 64 64 64 w4 s3", (128, 64, 4, 3), (64, 64, 64, 64, 4, 3)),
    tried("f 128x64 w8 s4, b 64 128 128 64 w4 s3", (128, 64, 8, 4), (64, 128, 128, 64, 4, 3)),
    tried("f 64x128 w4 s3, b 32 128 128 32 w8 s3", (64, 128, 4, 3), (32, 128, 128, 32, 8, 3)),
    tried("f 64x64 w4 s3, b 64 64 64 64 w4 s2", (64, 64, 4, 3), (64, 64, 64, 64, 4, 2)),
    tried("f 128x32 w4 s4, b 32 64 64 32 w4 s4", (128, 32, 4, 4), (32, 64, 64, 32, 4, 4)),
    tried("f 64x128 w8 s2, b 128 128 128 128 w8 s1", (64, 128, 8, 2), (128, 128, 128, 128, 8, 1)),
    tried("f 128x64 w8 s2, b 64 128 128 64 w8 s4", (128, 64, 8, 2), (64, 128, 128, 64, 8, 4)),
    Rung("USE_TMA", {"USE_TMA": True}),
    Rung("USE_TMA forward alone", {"fwd_USE_TMA": True}),
    Rung("WRITE_DQ off", {"WRITE_DQ": False}),
    Rung("turn_role", mask="turn_role"),
    Rung("lists descending", lists="descending"),
    Rung("first turn first", lists="first turn first", mask="turn_role"),
    Rung("interleaved", lists="interleaved", mask="turn_role"),
    # The kernel's own choice for backward is 128 wide, which smaller lists exclude: they must be autotuned.
    Rung("lists of 64, autotuned", block=64, mode=AUTOTUNED),
    Rung("lists of 128 x 64, autotuned", block=(128, 64), mode=AUTOTUNED),
    Rung("lists of 64 x 128, autotuned", block=(64, 128), mode=AUTOTUNED),
    Rung("lists of 256, autotuned", block=256, mode=AUTOTUNED),
]
"""BLOCKS_ARE_CONTIGUOUS is not among them: a branch's ancestors are not, and the result would be wrong."""


def ladder(path: str | None, cell: Cell, device: torch.device) -> list[Rung]:
    """The rungs for a cell; those of a file, `[{"name", "block_size", "kernel_options"}]`, come behind the first.

    On a CPU, which has other kernels, only those without options.
    """
    rungs = LADDER
    if path is not None:
        given = [
            entry for entry in json.loads(Path(path).read_text()) if entry.get("head_size", cell.size) == cell.size
        ]
        found = [Rung(e["name"], e.get("kernel_options", {}), _block(e.get("block_size", 128))) for e in given]
        rungs = [LADDER[0], *found, *LADDER[1:]]
    return rungs if device.type == "cuda" else [rung for rung in rungs if not rung.options and not rung.mode]


def _block(size: int | list[int]) -> int | tuple[int, int]:
    return size if isinstance(size, int) else (size[0], size[1])


def climb(bench: Bench, rung: Rung) -> Way:
    """A rung's way: flex compiled for it alone, with the settings of the package."""
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False, mode=rung.mode)
    trains = bench.device.type == "cuda"
    order = None
    if rung.lists in ("interleaved", "first turn first"):
        order = in_order(bench.layout, bench.row, rung.lists == "interleaved")
        table = listed(bench.row, order)
    else:
        table = fr.block_mask(bench.row, block_size=rung.block, mask=rung.mask)
        table = descending(table) if rung.lists == "descending" else table
    inputs = bench.inputs if order is None else [bench.in_order(x, order) for x in bench.inputs]
    given = inputs if trains else [x.detach() for x in inputs]
    options = {"block_mask": table, "scale": bench.cell.size**-0.5, "kernel_options": rung.options or None}

    def forward() -> Tensor:
        return compiled(*given, enable_gqa=bench.cell.heads != bench.cell.groups, **options).transpose(1, 2)

    upstream = bench.upstream if order is None else bench.upstream[:, order]
    return Way(forward, inputs, upstream, bench.pairs, order, trains, computed(table, bench.pairs))


def descending(table: BlockMask) -> BlockMask:
    """The same lists from the last block to the first."""

    def turned(counts: Tensor, indices: Tensor) -> Tensor:
        at = torch.arange(indices.shape[-1], device=indices.device)
        last = counts.unsqueeze(-1) - 1
        return indices.gather(-1, (last - at).clamp(min=0).long()).where(at <= last, 0).contiguous()

    names = ("kv", "full_kv", "q", "full_q")
    lists: dict[str, Any] = {}
    for name in names:
        counts = getattr(table, f"{name}_num_blocks")
        lists[f"{name}_num_blocks"] = counts
        lists[f"{name}_indices"] = turned(counts, getattr(table, f"{name}_indices"))
    return BlockMask(seq_lengths=table.seq_lengths, BLOCK_SIZE=table.BLOCK_SIZE, mask_mod=table.mask_mod, **lists)


def sweep(cell: Cell, device: torch.device, budget: Budget, seconds: float, rungs: list[Rung]) -> list[dict[str, Any]]:
    print(f"\nthe flex kernel, {cell.name}", flush=True)
    bench, failed = budget.attempt("reference", lambda: Bench(cell, device))
    if bench is None:
        return [tell({"rung": "all", "failed": failed})]

    def row(way: Way) -> dict[str, Any]:
        return time_ways(bench, {"": way}, seconds)[""]

    rows: list[dict[str, Any]] = []
    packed, _ = budget.attempt("packed flash", lambda: row(checked(bench, bench.packed_flash(), compare=False)))
    if packed:
        rows.append(tell(of_packed({"rung": f"packed flash ({flash_name(device)})", **packed}, packed)))
    for rung in rungs:
        found, failed = budget.attempt(
            f"rung: {rung.name}", lambda rung=rung: row(checked(bench, climb(bench, rung), compare=True))
        )
        rows.append(tell(of_packed({"rung": rung.name, **(found or {"failed": failed})}, packed or {})))
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = on_a_gpu(__doc__, seconds=300)
    parser.add_argument("--each", type=float, default=2.0, help="seconds for the repeats of a cell")
    parser.add_argument("--only", default="", help="only cells whose name holds this, such as 32K or agent")
    parser.add_argument("--sweep", action="store_true", help="the tuning ladder of the flex kernel, on the first cell")
    parser.add_argument("--ladder", metavar="FILE", help="with --sweep: more rungs, which are tried first")
    options = parser.parse_args(arguments)
    budget, device = Budget(options.seconds), torch.device(options.device)
    chosen = [cell for cell in cells(options.small) if options.only in cell.name]
    results: dict[str, Any] = {}
    # A backward that is timed many times over one forward must not be given the buffers that forward kept.
    with torch._functorch.config.patch(donated_buffer=False):
        if options.sweep:
            rungs = ladder(options.ladder, chosen[0], device)
            results["sweep"] = sweep(chosen[0], device, budget, options.each, rungs)
            print_table(f"the flex kernel, {chosen[0].name}", results["sweep"])
        else:
            results["attention"] = []
            for cell in chosen:
                if budget.allows(cell.name, needs=0 if options.small else 15):
                    results["attention"] += table(cell, device, budget, options.each)
                    free()
            print_table("attention of one layer", results["attention"])
    budget.tell()
    print_json(benchmark="kernel", left_out=budget.left_out, **results)


if __name__ == "__main__":
    main()
