"""Laying out and block masks: speed, memory, and how many blocks are computed. No model, no GPU.

python benchmarks/layout.py
"""

import math
import random
import statistics

import torch
from torch.nn.attention.flex_attention import create_block_mask

import flexreason as fr
from flexreason.tree.mask import mask_mod
from measure import median, peak_mib, print_json, print_table

BLOCK = 128
SHAPES = {
    "8 x 64/256/64": [(64, 256, 64)] * 8,
    "16 x 64/256/64": [(64, 256, 64)] * 16,
    "30 x 150/60/30": [(150, 60, 30)] * 30,
    "64 x 300/1500/800": [(300, 1500, 800)] * 64,
    "40 x 40/400/40": [(40, 400, 40)] * 40,
    "8 x 61/250/67": [(61, 250, 67)] * 8,
    "16 x 61/250/67": [(61, 250, 67)] * 16,
    "60 x 61/250/67": [(61, 250, 67)] * 60,
}
FITS_BYTES = 2**30
"""`create_block_mask` is run up to dense masks of this size."""


def conversation(shape: list[tuple[int, int, int]], seed: int = 0) -> list[tuple]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(0, 50_000, (n,), generator=generator).tolist() for n in turn) for turn in shape]


def lay_out_speed() -> list[dict]:
    rows = []
    for tokens in (50_000, 125_000, 250_000, 500_000, 1_000_000):
        a_turn = tokens // 40
        shape = [(a_turn // 10, a_turn // 2, a_turn // 5)] * 40
        samples = fr.unmerge(fr.lay_out_turns(conversation(shape)))
        layout = fr.lay_out(samples)
        assert fr.unmerge(layout) == samples
        seconds = median(lambda samples=samples: fr.lay_out(samples))
        rows.append(
            {
                "turns": 40,
                "tree tokens": len(layout),
                "sample tokens": layout.sample_tokens,
                "ms": seconds * 1e3,
                "million sample tokens / s": layout.sample_tokens / seconds / 1e6,
            }
        )
    return rows


def growth(rows: list[dict]) -> float:
    """The slope of log time over log size: 1 is linear."""
    x = [math.log(row["sample tokens"]) for row in rows]
    y = [math.log(row["ms"]) for row in rows]
    return statistics.linear_regression(x, y).slope


def block_mask_speed() -> list[dict]:
    rows = []
    for tokens in (8 * 1024, 16 * 1024, 128 * 1024, 1024 * 1024):
        n = tokens // 30
        layout = fr.lay_out_turns([([1] * (n // 2), [2] * (n // 4), [3] * (n // 8))] * 30)
        row = fr.collate([layout], tokens)
        peak = peak_mib(lambda row=row: fr.block_mask(row))
        ours = {
            "tokens": tokens,
            "block_mask ms": median(lambda row=row: fr.block_mask(row)) * 1e3,
            "peak MiB": peak,
            "window 4096 ms": median(lambda row=row: fr.block_mask(row, window=4096), 3) * 1e3,
        }
        if tokens**2 <= FITS_BYTES:
            rule = mask_mod(row)

            def theirs(rule=rule, tokens=tokens):
                return create_block_mask(rule, 1, 1, tokens, tokens, device="cpu")

            assert torch.equal(theirs().to_dense(), fr.block_mask(row).to_dense())
            ours["create_block_mask ms"] = median(theirs, 1) * 1e3
            ours["its peak MiB"] = peak_mib(theirs)
        else:
            ours["create_block_mask ms"] = f"does not fit: {tokens:,}^2 bytes = {tokens**2 / 2**30:,.0f} GiB of bools"
        rows.append(ours)
    return rows


def count_blocks(layout: fr.Layout) -> int:
    block_mask = fr.block_mask(layout, block_size=BLOCK)
    return int(block_mask.kv_num_blocks.sum() + block_mask.full_kv_num_blocks.sum())


def interleaved_blocks(shape: list[tuple[int, int, int]]) -> int:
    """Blocks that see anything when segments are stored as the paper writes them: h_1 t_1 r_1^in r_1^out h_2 ..."""
    segments = []  # (turn, kind, start, stop)
    start = 0
    for i, (h, t, r) in enumerate(shape):
        last = i == len(shape) - 1
        for kind, n in (("h", h), ("t", t), ("in", 0 if last or not t else r), ("out", r)):
            kind = "in" if kind == "out" and not t else kind  # without reasoning, the response is both
            segments.append((i, kind, start, start + n))
            start += n
    seen = {"h": "", "t": "h", "in": "h", "out": "ht"}
    n_blocks = -(-start // BLOCK)
    cells = torch.zeros(n_blocks, n_blocks, dtype=torch.bool)
    for i, q_kind, q_start, q_stop in segments:
        rows = slice(q_start // BLOCK, -(-q_stop // BLOCK))
        for j, kv_kind, kv_start, kv_stop in segments:
            if kv_stop > kv_start and q_stop > q_start:
                columns = slice(kv_start // BLOCK, -(-kv_stop // BLOCK))
                if (j < i and kv_kind in ("h", "in")) or (j == i and kv_kind in seen[q_kind]):
                    cells[rows, columns] = True
        size = rows.stop - rows.start
        cells[rows, rows] |= torch.ones(size, size, dtype=torch.bool).tril() if q_stop > q_start else False
    return int(cells.sum())


def visible_pairs(layout: fr.Layout) -> int:
    return int((layout.position_ids + 1).sum())


def areas() -> list[dict]:
    rows = []
    for name, shape in SHAPES.items():
        layout = fr.lay_out_turns(conversation(shape))
        ours, theirs, pairs = count_blocks(layout), interleaved_blocks(shape), visible_pairs(layout)
        rows.append(
            {
                "shape": name,
                "tokens": len(layout),
                "blocks": ours,
                "interleaved": theirs,
                "area": ours * BLOCK**2 / pairs,
                "area interleaved": theirs * BLOCK**2 / pairs,
                "causal area": _causal_area(len(layout)),
            }
        )
        assert ours <= theirs, name
        assert len(layout) <= 16 * 1024 or ours * BLOCK**2 < 1.2 * pairs, name
    return rows


def _causal_area(n: int) -> float:
    """What a plain causal sequence of the same length pays for its blocks."""
    n_blocks = -(-n // BLOCK)
    return n_blocks * (n_blocks + 1) / 2 * BLOCK**2 / (n * (n + 1) / 2)


def random_areas(n_conversations: int = 1000) -> dict:
    """The worst of many random conversations: most blocks beyond interleaved, and largest area above 16K tokens."""
    generator = random.Random(0)
    more, worst, worst_shape, n_long = -(10**9), 0.0, None, 0
    for _ in range(n_conversations):
        most = generator.choice([20, 100, 500, 3000])
        shape = [
            (
                generator.randint(1, most),
                generator.choice([0, 1, 1]) * generator.randint(0, most * generator.choice([1, 4])),
                generator.randint(1, most),
            )
            for _ in range(generator.randint(1, generator.choice([10, 60])))
        ]
        layout = fr.lay_out_turns([([1] * h, [2] * t, [3] * r) for h, t, r in shape])
        blocks = count_blocks(layout)
        more = max(more, blocks - interleaved_blocks(shape))
        area = blocks * BLOCK**2 / visible_pairs(layout)
        if len(layout) > 16 * 1024:
            n_long += 1
            if area > worst:
                worst, worst_shape = area, shape
    assert more <= 3
    return {
        "conversations": n_conversations,
        "above 16K tokens": n_long,
        "most blocks beyond interleaved": more,
        "worst area above 16K": worst,
        "its shape": worst_shape,
    }


def check_interleaved() -> None:
    """The count above against the paper's own rule on a dense mask."""
    for shape in ([(61, 250, 67)] * 4, [(40, 0, 90), (128, 128, 128), (5, 300, 7)]):
        layout = fr.lay_out_turns([([1] * h, [2] * t, [3] * r) for h, t, r in shape])
        kinds = [fr.Role.PROMPT, fr.Role.REASONING, fr.Role.CONTEXT, fr.Role.RESPONSE]
        rank = torch.tensor([[int(k) for k in kinds].index(min(r, 8)) for r in layout.role.tolist()])
        order = (layout.turn * 4 + rank).argsort(stable=True)
        dense = fr.dense_mask(layout, mask="turn_role")[order][:, order]
        padded = torch.nn.functional.pad(dense, (0, -len(dense) % BLOCK, 0, -len(dense) % BLOCK))
        n = len(padded) // BLOCK
        cells = padded.view(n, BLOCK, n, BLOCK).any(3).any(1)
        assert int(cells.sum()) == interleaved_blocks(shape)


def main() -> None:
    check_interleaved()
    speed = lay_out_speed()
    print_table("lay_out", speed)
    print(f"\ngrowth of time with sample tokens: exponent {growth(speed):.2f}")
    masks = block_mask_speed()
    print_table("block_mask, block size 128 (medians; create_block_mask is torch's own)", masks)
    shapes = areas()
    print_table("blocks computed, of 128 x 128 (area = blocks x 128^2 / visible pairs)", shapes)
    worst = random_areas()
    print("\nrandom conversations: " + ", ".join(f"{k} {v}" for k, v in worst.items()))
    print_json(benchmark="layout", lay_out=speed, exponent=growth(speed), block_mask=masks, areas=shapes, random=worst)


if __name__ == "__main__":
    main()
