"""flexreason: train on every turn of a multi-turn reasoning conversation in one pass, exactly."""

import importlib
from typing import TYPE_CHECKING, Any

from flexreason.data.collator import Collator
from flexreason.data.pack import Packer
from flexreason.data.rows import Rows
from flexreason.data.splitting import Split, split
from flexreason.data.stream import RowStream
from flexreason.tree.blocks import block_mask
from flexreason.tree.draw import draw_layout, draw_mask
from flexreason.tree.layout import Layout, lay_out_turns, unmerge
from flexreason.tree.mask import dense_mask, mask_mod
from flexreason.tree.merge import lay_out
from flexreason.tree.row import collate
from flexreason.tree.sample import Role, Sample

if TYPE_CHECKING:
    from flexreason.chat.encode import encode
    from flexreason.data.intake import EntryEncoder
    from flexreason.model.logprobs import token_logprobs
    from flexreason.patching import patch, unpatch
    from flexreason.proof.verify import verify
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
    "encode": "flexreason.chat.encode",
    "patch": "flexreason.patching",
    "token_logprobs": "flexreason.model.logprobs",
    "total_weight": "flexreason.train.sums",
    "unpatch": "flexreason.patching",
    "verify": "flexreason.proof.verify",
}
"""Imported when first asked for, since transformers takes seconds to import."""


def __getattr__(name: str) -> Any:
    if name in NEEDS_TRANSFORMERS:
        return getattr(importlib.import_module(NEEDS_TRANSFORMERS[name]), name)
    raise AttributeError(f"module 'flexreason' has no attribute {name!r}")
