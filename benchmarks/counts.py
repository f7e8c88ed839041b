"""What there is to compute for a conversation on a GPU, counted: no GPU is needed.

    python benchmarks/counts.py

Conversations of several shapes, grown to a row's length. *Token* and *work ratio* are the samples' by the tree's, work
for models of two sizes (data.figures). *flex* and *flash* are the pairs computed, by those visible: flex in the
128 x 128 blocks of its lists, segments in the 128 x 64 tiles of flash attention over its calls. *Calls* are those of a
layer forward: one for all chains, one a round. *Rows* and *keys* are what the rounds read, by tokens of the row.
"""

import argparse
from itertools import pairwise

import torch

import flexreason as fr
from flexreason.attention import flash
from flexreason.bench.report import amount
from flexreason.data.figures import SIZES
from kernel import SHAPES, conversation, scaled
from measure import print_json, print_table

ROWS, KEYS = 128, 64
"""A tile of flash attention 2 with heads of 128."""


def tiles(call: flash.Call) -> int:
    """Pairs in the tiles that a call goes through, per head."""
    total = 0
    ends = (offsets.tolist() for offsets in (call.queries.offsets, call.keys.offsets))
    for n_q, n_k in zip(*([b - a for a, b in pairwise(offsets)] for offsets in ends), strict=True):
        for first in range(0, n_q, ROWS):
            seen = min(n_k, n_k - n_q + first + ROWS) if call.causal else n_k
            total += ROWS * -(-seen // KEYS) * KEYS
    return total


def counted(name: str, length: int) -> dict:
    layout = conversation(scaled(SHAPES[name], length))
    samples = amount([fr.lay_out([sample]) for sample in fr.unmerge(layout)])
    tree = amount([layout])
    blocks = fr.block_mask(layout)
    n_blocks = int(blocks.kv_num_blocks.sum() + blocks.full_kv_num_blocks.sum())
    calls = flash.calls(layout.until.tolist(), layout.position_ids.tolist(), None, None, torch.device("cpu"))
    row = {"shape": name, "tokens": len(layout), "token ratio": samples.tokens / tree.tokens}
    row |= {f"work ratio, {s.name}": s.work(samples) / s.work(tree) for s in SIZES if s.name in ("0.6B", "4B")}
    row |= {"flex / visible": n_blocks * 128**2 / tree.pairs}
    row |= {
        "flash / visible": sum(map(tiles, (calls.first, *calls.rounds))) / tree.pairs,
        "calls": 1 + len(calls.rounds),
    }
    for side in ("queries", "keys"):
        read = sum(int(getattr(call, side).offsets[-1]) for call in calls.rounds)
        row["rows" if side == "queries" else "keys"] = read / len(layout)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    options = parser.parse_args()
    results = {}
    for length in options.lengths:
        results[length] = [counted(name, length) for name in SHAPES]
        print_table(f"conversations that fill a row of {length:,} tokens", results[length])
    print_json(benchmark="counts", counts=results)


if __name__ == "__main__":
    main()
