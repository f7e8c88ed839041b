"""What there is to compute for a conversation on a GPU, counted: no GPU is needed.

    python benchmarks/counts.py
    python benchmarks/counts.py --lengths 8192 131072 --shapes agent "30 x 150/60/30"

Conversations of several shapes, all their turns grown alike to a row's length. *Tokens* and *work* are those of the
samples by those of the tree, work for models of two sizes. *Flex computes* and *flash computes* are pairs by visible
pairs: flex computes the 128 x 128 blocks of its lists, `segments` on a GPU the 128 x 64 tiles of flash attention.
*Calls* are those of `segments` in one layer forward: one for all chains, and one for each round.
"""

from itertools import pairwise
from typing import Any

import torch

import flexreason as fr
from flexreason.attention import flash
from flexreason.bench.report import amount, amount_of_samples
from flexreason.data.figures import SIZES
from flexreason.tree.blocks import BLOCK
from shared import Run, Shape, conversation, in_tokens, shape

SHAPES = ("8 x 64/256/64", "16 x 64/256/64", "30 x 150/60/30", "agent")

MODELS = [size for size in SIZES if size.name in ("0.6B", "4B")]

ROWS, KEYS = 128, 64
"""A tile of flash attention 2 with heads of 128."""


def counted(turns: Shape) -> dict[str, Any]:
    layout = conversation([turns[1:]] * turns.turns)
    samples, tree = amount_of_samples(fr.unmerge(layout)), amount([layout])
    lists = fr.block_mask(layout)
    blocks = int(lists.kv_num_blocks.sum() + lists.full_kv_num_blocks.sum())
    calls = flash.calls(layout.until.tolist(), layout.position_ids.tolist(), None, None, torch.device("cpu"))
    assert calls is not None
    return {
        "tokens": samples.tokens / tree.tokens,
        **{f"work, {model.name}": model.work(samples) / model.work(tree) for model in MODELS},
        "flex computes": blocks * BLOCK**2 / tree.pairs,
        "flash computes": sum(map(tiles, (calls.first, *calls.rounds))) / tree.pairs,
        "calls": 1 + len(calls.rounds),
    }


def tiles(call: flash.Call) -> int:
    """Pairs in the tiles that a call goes through, in each head."""
    pairs = 0
    lengths = ([end - start for start, end in pairwise(side.offsets.tolist())] for side in (call.queries, call.keys))
    for n_queries, n_keys in zip(*lengths, strict=True):
        for first in range(0, n_queries, ROWS):
            seen = min(n_keys, n_keys - n_queries + first + ROWS) if call.causal else n_keys
            pairs += ROWS * -(-seen // KEYS) * KEYS
    return pairs


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    run = Run(__file__, __doc__, repeats=1)
    run.option("--lengths", type=int, nargs="+", default=[8192, 32768, 131072], help="of the row")
    run.option("--shapes", nargs="+", default=list(SHAPES), help='by name, or as "8 x 64/256/64"')
    options = run.start(arguments)
    rows = []
    for length in options.lengths:
        of_length = []
        for name in options.shapes:
            turns = shape(name).grown(length)
            of_length.append(run.cell({"row": in_tokens(length), "turns": name}, counted, turns))
        run.table(f"conversations grown to a row of {length:,} tokens", of_length, hidden=["row"])
        rows += of_length
    return run.finish(rows=rows)


if __name__ == "__main__":
    main()
