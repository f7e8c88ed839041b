"""The longest conversation that trains on one card: time and memory by row length, ours and other ways.

    python benchmarks/longest.py                          # 256K tokens, and a plain row of as many; then the rest
    python benchmarks/longest.py --only long              # doubling to the longest that fits
    python benchmarks/longest.py --device cpu --small     # a rehearsal

A Qwen3 of 0.6B shape in bf16, gradient checkpointing, one whole step: the mask made, forward, the loss in chunks,
backward. *ours* is flex over one tree. *plain* is one causal sequence of as many tokens and targets through flash
attention. *packed* is the N samples side by side through the same. *interleaved* stores the tree as h0 t0 r0 r0' h1 ...
with lists from `create_block_mask`, compiled or as it is; *dense* has an S x S mask. Conversations: *short*, turns of
64/256/64 tokens (h/t/r), as many as fill the row; *long*, turns of 32/4000/100.

GiB is the most that torch had allocated in the step, weights and gradients included. Gradients of the first and the
last layer are compared with ours wherever both ways run. A step that takes seconds is measured once, behind a call of
one layer's attention that compiles. A way that is too slow for what is left of the run is named with its estimate; of
those that make a mask by S x S, one layer's attention is run forward, to see whether that much fits.
"""

import gc
import statistics
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

import flexreason as fr
from flexreason.attention import dense, flex
from flexreason.attention.registry import BACKENDS
from flexreason.proof.float64 import relative_l2
from flexreason.tree.mask import turn_role_rule
from gpu_step import WRONG, Step, flops, gradients, make, over_packs, over_row, pack_samples, plain
from kernel import conversation, flash_name, in_order, last_tokens, listed, pairs_of
from measure import Budget, free, on_a_gpu, peak_gib, print_json, print_table, seconds_of, tell, timed

TURNS = {"short": (64, 256, 64), "long": (32, 4000, 100), "tiny": (6, 20, 6)}

WAYS = ("ours", "plain", "packed", "interleaved", "interleaved, not compiled", "dense")

RATES = {"plain": 300e12, "packed": 300e12, "dense": 10e12}
"""FLOP/s of attention to estimate a step by, of which it is the most; 200e12 for the others."""

MASKED = ("interleaved", "interleaved, not compiled", "dense")


def plan(small: bool) -> list[tuple[str, int, tuple[str, ...]]]:
    """(conversation, tokens, ways) in order of importance."""
    if small:
        return [("tiny", 512, ("ours", "plain")), ("tiny", 256, WAYS)]
    k = 1024
    first = [("short", 256 * k, ("ours", "plain")), ("long", 512 * k, ("ours",)), ("long", 1024 * k, ("ours",))]
    # What does not fit at all says so in a second.
    grown = [("short", n * k, WAYS) for n in (32, 64, 128, 256)]
    return [*first, *grown, ("short", 16 * k, WAYS), ("long", 512 * k, ("plain",)), ("long", 2048 * k, ("ours",))]


def filled(kind: str, length: int, vocabulary: int) -> fr.Layout:
    """As many turns as a row of some length holds."""
    h, t, r = TURNS[kind]
    return conversation([(h, t, r)] * ((length + r) // (h + t + 2 * r)), vocabulary)


# ---- ways


def lists_by(compiled: bool) -> SimpleNamespace:
    """A backend for rows that are stored in another order, with lists from `create_block_mask`.

    On a CPU, where flex has no backward, the same rule as a dense mask.
    """

    def prepare(tree: dict[str, Tensor], mask: str, window: int | None, chunk: int | None) -> Any:
        index = torch.arange(tree["until"].shape[1], device=tree["until"].device)
        if index.device.type == "cpu":
            rule = turn_role_rule(*(tree[name][0] for name in ("turn", "role", "document")))
            return rule(index[0], index[0], index[:, None], index[None, :])
        return listed(tree, index, compiled)

    def attend(q: Tensor, k: Tensor, v: Tensor, visible: Any, *rest: Any) -> Tensor:
        return (dense if isinstance(visible, Tensor) else flex).attend(q, k, v, visible, *rest)

    return SimpleNamespace(MASKS=("interval",), prepare=prepare, attend=attend)


INTERLEAVED = {"interleaved": lists_by(True), "interleaved, not compiled": lists_by(False)}


def interleaved_row(layout: fr.Layout, row: dict[str, Tensor]) -> dict[str, Tensor]:
    """The row in the paper's order. Nothing reads its `until`, which there says nothing."""
    order = in_order(layout, row, interleaved=True)
    names = ("input_ids", "position_ids", "turn", "role", "document")
    stored = {name: row[name][:, order] for name in names}
    source = torch.argsort(order)[row["target_source"]]
    until = torch.arange(1, len(order) + 1, dtype=torch.int32, device=order.device)[None]
    return {**row, **stored, "target_source": source, "until": until}


def step_of(way: str, m: Qwen3ForCausalLM, layout: fr.Layout, row: dict[str, Tensor]) -> Step:
    device = row["until"].device
    if way == "plain":
        return over_packs(m, [plain(row)])
    if way == "packed":
        return over_packs(m, pack_samples(layout, device, 1))
    if way == "ours":
        return over_row(m, row, backend_of(way, device))
    return over_row(m, row if way == "dense" else interleaved_row(layout, row), backend_of(way, device))


def backend_of(way: str, device: torch.device) -> str:
    if way == "ours":
        return "flex" if device.type == "cuda" else "segments"
    return way


def one_layer(way: str, m: Qwen3ForCausalLM, layout: fr.Layout, row: dict[str, Tensor], train: bool = True) -> None:
    """The mask and one layer's attention: what compiles, and what grows with the square of the tokens."""
    device, config = row["until"].device, m.config
    given = interleaved_row(layout, row) if way in INTERLEAVED else row
    backend = BACKENDS[backend_of(way, device)]
    n_heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    q, k, v = (
        torch.randn(1, row["until"].shape[1], n, config.head_dim, device=device, dtype=m.dtype).transpose(1, 2)
        for n in n_heads
    )
    for x in (q, k, v):
        x.requires_grad_(train)
    out = backend.attend(q, k, v, backend.prepare(given, "interval", None, None), config.head_dim**-0.5)
    if train:
        out.sum().backward()


# ---- the table


def estimate(way: str, m: Qwen3ForCausalLM, layout: fr.Layout, length: int, device: torch.device) -> float:
    """Seconds of a step, roughly; nothing on a CPU, where it is a rehearsal."""
    if device.type != "cuda":
        return 0.0
    tokens, pairs = length, pairs_of(layout)
    if way == "plain":
        pairs = length * (length + 1) // 2
    elif way == "dense":
        pairs = length**2
    elif way == "packed":
        lengths = layout.position_ids[last_tokens(layout)] + 1
        tokens, pairs = int(lengths.sum()), int((lengths * (lengths + 1) // 2).sum())
    work = flops(m, tokens, len(layout.target_ids), 0) * 4 / 3 / 300e12  # checkpointing computes forward twice
    attention = (flops(m, 0, 0, pairs)) * 1.5 / RATES.get(way, 200e12)
    return work + attention


def too_large(m: Qwen3ForCausalLM, layout: fr.Layout, device: torch.device) -> bool:
    """Whether what checkpointing keeps of the packed samples is more than the card has: then the attempt is short."""
    kept = m.config.num_hidden_layers * layout.sample_tokens * m.config.hidden_size * m.dtype.itemsize
    return device.type == "cuda" and kept > torch.cuda.get_device_properties(device).total_memory


def measured(
    way: str, m: Qwen3ForCausalLM, layout: fr.Layout, row: dict[str, Tensor], seconds: float
) -> dict[str, Any]:
    """Time, peak of memory, and gradients of one way."""
    device = row["until"].device
    if device.type == "cuda" and way in ("ours", *INTERLEAVED):  # so that the step that is measured compiles nothing
        one_layer(way, m, layout, row)
    m.zero_grad()
    step = step_of(way, m, layout, row)
    free()
    taken: list[float] = []
    peak = peak_gib(lambda: taken.append(seconds_of(step, device)), device)
    if taken[0] < seconds / 2:
        taken = timed({"": step}, device, seconds)[""]
    # Kept off the card, where they would count as memory of the ways that follow.
    return {"ms": statistics.median(taken) * 1e3, "GiB": peak, "gradients": [g.cpu() for g in gradients(m)]}


def cell(
    kind: str,
    length: int,
    ways: tuple[str, ...],
    m: Qwen3ForCausalLM,
    device: torch.device,
    budget: Budget,
    known: dict[tuple[str, int, str], dict[str, Any]],
    seconds: float,
) -> list[dict[str, Any]]:
    layout = filled(kind, length, m.config.vocab_size)
    print(f"\n{kind}, {length:,}: {layout}", flush=True)
    row = {name: tensor.to(device) for name, tensor in fr.collate([layout], length=length).items()}
    ours: list[Tensor] | None = None
    rows = []
    for way in ways:
        shown = {"conversation": kind, "tokens": length, "turns": layout.n_samples, "way": way}
        if (kind, length, way) in known:
            ours = known[kind, length, way].get("gradients", ours) if way == "ours" else ours
            continue
        needs = estimate(way, m, layout, length, device)
        if way == "packed" and too_large(m, layout, device):
            needs = 10.0
        name = f"{kind}, {length:,}, {way} (about {needs:.0f} s)"
        found, failed = budget.attempt(name, lambda way=way: measured(way, m, layout, row, seconds), needs)
        m.zero_grad()
        if found is None:
            if failed == "no time left":
                failed = f"not run, about {needs:.0f} s"
                if way in MASKED and device.type == "cuda":  # too slow for a step, and perhaps too large for one layer
                    alone, full = budget.attempt(
                        f"one layer of {name}",
                        lambda way=way: peak_gib(lambda: one_layer(way, m, layout, row, train=False), device),
                        needs / m.config.num_hidden_layers / 4,
                    )
                    shown["GiB of one layer's attention"] = alone
                    failed = full if full and full != "no time left" else failed
            rows.append(tell({**shown, "failed": failed}))
            continue
        known[kind, length, way] = found
        if way == "ours":
            ours = found["gradients"]
        elif way != "plain" and ours is not None:
            shown["gradients, by ours"] = relative_l2(found["gradients"], ours)
            if not shown["gradients, by ours"] < WRONG[m.dtype]:
                shown["failed"] = "wrong"
        plain_row = known.get((kind, length, "plain"))
        if plain_row and found["GiB"] and plain_row["GiB"]:
            shown["GiB / plain"] = found["GiB"] / plain_row["GiB"]
        rows.append(tell({**shown, "ms": found["ms"], "GiB": found["GiB"]}))
    return rows


def by_plain(rows: list[dict[str, Any]]) -> None:
    """Add to ours what its memory is by that of a plain row of the same length, which ran behind it."""
    for row in rows:
        for other in rows:
            same = (row["conversation"], row["tokens"]) == (other["conversation"], other["tokens"])
            if same and other["way"] == "plain" and row.get("GiB") and other.get("GiB"):
                row["GiB / plain"] = row["GiB"] / other["GiB"]


def main(arguments: list[str] | None = None) -> None:
    parser = on_a_gpu(__doc__, seconds=360)
    parser.add_argument("--each", type=float, default=2.0, help="seconds for the repeats of a step that is short")
    parser.add_argument("--only", choices=["", "short", "long"], default="", help="one kind of conversation")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=WAYS)
    parser.add_argument("--lengths", nargs="*", type=int, help="only rows of these many tokens")
    options = parser.parse_args(arguments)
    budget, device = Budget(options.seconds), torch.device(options.device)
    m = make("tiny" if options.small else "0.6B", device)
    print(f"model made and patched, {budget.left:.0f} s left; {flash_name(device)}", flush=True)
    rows: list[dict[str, Any]] = []
    known: dict[tuple[str, int, str], dict[str, Any]] = {}
    with mock.patch.dict(BACKENDS, INTERLEAVED):
        for kind, length, ways in plan(options.small):
            wanted = tuple(way for way in ways if way in options.ways)
            if options.only in ("", kind) and (not options.lengths or length in options.lengths):
                found, failed = budget.attempt(
                    f"{kind}, {length:,}",
                    lambda kind=kind, length=length, wanted=wanted: cell(
                        kind, length, wanted, m, device, budget, known, options.each
                    ),
                )
                rows += found or [tell({"conversation": kind, "tokens": length, "way": "all", "failed": failed})]
                gc.collect()
    by_plain(rows)
    rows.sort(key=lambda row: (row["conversation"], row["tokens"]))
    print_table("one row of one conversation, one step", rows)
    budget.tell()
    print_json(benchmark="longest", flash=flash_name(device), left_out=budget.left_out, rows=rows)


if __name__ == "__main__":
    main()
