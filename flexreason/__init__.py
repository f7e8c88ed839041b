"""flexreason: train on every turn of a multi-turn reasoning conversation in one pass, exactly."""

import importlib
from typing import TYPE_CHECKING, Any

from flexreason.blocks import block_mask
from flexreason.data.collator import Collator
from flexreason.data.pack import Packer
from flexreason.data.rows import Rows
from flexreason.data.splitting import Split, split
from flexreason.data.stream import RowStream
from flexreason.draw import draw_layout, draw_mask
from flexreason.layout import Layout, lay_out_turns, unmerge
from flexreason.mask import dense_mask, mask_mod
from flexreason.row import collate
from flexreason.sample import Role, Sample
from flexreason.tree import lay_out

if TYPE_CHECKING:
    from flexreason.chat.encoding import encode
    from flexreason.data.intake import EntryEncoder
    from flexreason.logprobs import token_logprobs
    from flexreason.patching import unpatch
    from flexreason.proof.comparison import verify
    from flexreason.proof.gate import patch
    from flexreason.train.sums import total_weight
    from flexreason.train.trainer import RowTrainer

__version__ = "0.1.0.dev0"

__all__ = [
    "Collator",
    "EntryEncoder",
    "Layout",
    "Packer",
    "Role",
    "RowStream",
    "RowTrainer",
    "Rows",
    "Sample",
    "Split",
    "block_mask",
    "collate",
    "dense_mask",
    "draw_layout",
    "draw_mask",
    "encode",
    "lay_out",
    "lay_out_turns",
    "mask_mod",
    "patch",
    "split",
    "token_logprobs",
    "total_weight",
    "unmerge",
    "unpatch",
    "verify",
]

NEEDS_TRANSFORMERS = {
    "EntryEncoder": "flexreason.data.intake",
    "RowTrainer": "flexreason.train.trainer",
    "encode": "flexreason.chat.encoding",
    "patch": "flexreason.proof.gate",
    "token_logprobs": "flexreason.logprobs",
    "total_weight": "flexreason.train.sums",
    "unpatch": "flexreason.patching",
    "verify": "flexreason.proof.comparison",
}
"""Imported when first asked for, since transformers takes seconds to import."""


def __getattr__(name: str) -> Any:
    if name in NEEDS_TRANSFORMERS:
        return getattr(importlib.import_module(NEEDS_TRANSFORMERS[name]), name)
    raise AttributeError(f"module 'flexreason' has no attribute {name!r}")
