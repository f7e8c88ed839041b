"""The rows on which the self-test compares one pass with the samples: a conversation, and a tree with many forks."""

import random

from transformers import PreTrainedModel

from flexreason.model.refuse import ROPE_BY_LONGEST, rope_types
from flexreason.proof.sizes import ORIGINAL, SPECIAL
from flexreason.tree.layout import Layout, lay_out_turns
from flexreason.tree.merge import lay_out
from flexreason.tree.sample import Sample


def rows_for(model: PreTrainedModel) -> tuple[list[list[Layout]], list[Layout] | None]:
    """Rows to hold, and a row that must be refused because its samples straddle RoPE's threshold."""
    mixed = [conversation((11, 20, 5), (3, 0, 5), (20, 30, 9)), _tree()]
    kinds = rope_types(model.config.get_text_config()) & set(ROPE_BY_LONGEST)
    if not kinds:
        return [mixed], None
    short = [conversation((5, 6, 7), (5, 6, 7)), conversation((8, 9, 4))]
    long = [conversation((ORIGINAL + 10, 6, 7), (5, 20, 7))]
    return [short] if "dynamic" in kinds else [short, long], mixed


def some_ids(n: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(SPECIAL), k=n)


def conversation(*shape: tuple[int, int, int]) -> Layout:
    return lay_out_turns(
        [(some_ids(h, 3 * i), some_ids(t, 3 * i + 1), some_ids(r, 3 * i + 2)) for i, (h, t, r) in enumerate(shape)]
    )


def _tree() -> Layout:
    """Nested forks: early ones, and some behind all the lengths that `shrink` leaves."""
    a, b, c, d, e, stem = (some_ids(n, 20 + n) for n in (9, 14, 6, 5, 11, 45))
    return lay_out(
        [
            Sample(a, b + c),
            Sample(a + c, d),
            Sample(a + c + d, e + b),
            Sample(a + c + d, e + c),
            Sample(a + stem, b),
            Sample(a + stem + c, d + e),
            Sample(a + stem[:30], e),
            Sample(d, a),
        ]
    )
