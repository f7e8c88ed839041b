"""What a sliding window costs as a conversation grows: pairs and blocks computed, and the time of one layer.

    python benchmarks/windows.py

Turns of 64/256/64 tokens (h/t/r), one attention layer (8 heads of 64 over 4 key heads, fp32), forward and backward.
A row of twice the length should cost twice as much under a fixed window, and four times as much without one.
*Visible* counts pairs that the mask lets through, *computed* those in the tiles and rectangles of segments;
*blocks* are 128 x 128 ones in the block lists of flex.
"""

import argparse

import torch

import flexreason as fr
from flexreason.attention import segments
from flexreason.attention.cover import TILE
from measure import interleaved, median_ratio, print_json, print_table

HEADS, KEY_HEADS, SIZE = 8, 4, 64


def conversation(turns):
    generator = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(0, 2048, (n,), generator=generator).tolist()

    return fr.lay_out_turns([(ids(64), ids(256), ids(64)) for _ in range(turns)])


def visible_pairs(layout, window):
    """Every token sees as many as its window and its depth allow."""
    depth = layout.position_ids + 1
    return int((depth if window is None else depth.clamp(max=window)).sum())


def layer(row, work):
    q, k, v = (
        torch.randn(1, heads, row["until"].shape[1], SIZE, requires_grad=True)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )

    def step():
        segments.attend(q, k, v, work, SIZE**-0.5).sum().backward()

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--turns", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    rows, calls, layouts = [], {}, {}
    for turns in options.turns:
        layouts[turns] = layout = conversation(turns)
        row = fr.collate([layout])
        for window in (options.window, None):
            work = segments.prepare(row, window=window)
            calls[turns, window] = layer(row, work)
            blocks = fr.block_mask(row, window=window)
            n_blocks = int(blocks.kv_num_blocks.sum() + blocks.full_kv_num_blocks.sum())
            computed = (
                sum((r.q_stop - r.q_start) * (r.k_stop - r.k_start) for r in work.rectangles)
                + len(row["until"][0]) * TILE
            )
            rows.append(
                {
                    "turns": turns,
                    "tokens": len(layout),
                    "window": window or "none",
                    "visible": visible_pairs(layout, window),
                }
            )
            rows[-1] |= {"computed / visible": computed / rows[-1]["visible"], "blocks": n_blocks}
    seconds = interleaved(calls, options.repeats)
    for entry, key in zip(rows, calls, strict=True):
        before = [k for k in calls if k[1] == key[1] and k[0] < key[0]]
        entry["ms"] = 1e3 * sorted(seconds[key])[len(seconds[key]) // 2]
        entry["times the row before"] = median_ratio(seconds[key], seconds[before[-1]]) if before else None
    rows.sort(key=lambda entry: (entry["window"] == "none", entry["turns"]))
    print_table(f"one layer under a window of {options.window} positions, and without", rows)
    print_json(benchmark="windows", windows=rows)


if __name__ == "__main__":
    main()
