"""flexreason: train on every turn of a multi-turn reasoning conversation in one pass, exactly."""

from flexreason.blocks import block_mask
from flexreason.draw import draw_layout, draw_mask
from flexreason.layout import Layout, lay_out_turns, unmerge
from flexreason.mask import dense_mask, mask_mod
from flexreason.row import collate
from flexreason.sample import Role, Sample
from flexreason.tree import lay_out

__version__ = "0.1.0.dev0"

__all__ = [
    "Layout",
    "Role",
    "Sample",
    "block_mask",
    "collate",
    "dense_mask",
    "draw_layout",
    "draw_mask",
    "lay_out",
    "lay_out_turns",
    "mask_mod",
    "unmerge",
]
