"""flexreason: train on every turn of a multi-turn reasoning conversation in one pass, exactly.

    layout = fr.encode(messages, tokenizer)   # the N samples of a conversation, merged into a tree
    row = fr.collate([layout])                # tensors for a model
    model = fr.patch(model)                   # an ordinary transformers model, which takes rows from here on
    model(**row).loss.backward()              # the loss and the gradients of the N samples

Everything else that is public is listed below by what it is for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexreason.chat.encode import encode
    from flexreason.data.collator import Collator
    from flexreason.data.intake import EntryEncoder
    from flexreason.data.pack import Packer
    from flexreason.data.rows import Rows, RowStream
    from flexreason.data.splitting import split
    from flexreason.model.logprobs import token_logprobs
    from flexreason.patching import patch, unpatch
    from flexreason.proof.verify import verify
    from flexreason.train.sft import RowSFTTrainer
    from flexreason.train.sums import total_weight
    from flexreason.train.trainer import RowTrainer
    from flexreason.tree.blocks import block_mask
    from flexreason.tree.draw import draw_layout, draw_mask
    from flexreason.tree.layout import Layout, lay_out_turns, unmerge
    from flexreason.tree.mask import dense_mask, mask_mod
    from flexreason.tree.merge import lay_out
    from flexreason.tree.row import collate
    from flexreason.tree.sample import Role, Sample

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 (sorted by what a name is for)
    # the idea
    "Sample",
    "Layout",
    "Role",
    "lay_out",
    "lay_out_turns",
    "unmerge",
    "dense_mask",
    "block_mask",
    "mask_mod",
    "draw_layout",
    "draw_mask",
    # messages and data
    "encode",
    "EntryEncoder",
    "split",
    "collate",
    "Collator",
    "Packer",
    "Rows",
    "RowStream",
    # a model
    "patch",
    "unpatch",
    "token_logprobs",
    # training
    "RowTrainer",
    "RowSFTTrainer",
    "total_weight",
    # proof
    "verify",
]

_NEEDS_TRANSFORMERS = {
    "encode": "flexreason.chat.encode",
    "EntryEncoder": "flexreason.data.intake",
    "patch": "flexreason.patching",
    "unpatch": "flexreason.patching",
    "token_logprobs": "flexreason.model.logprobs",
    "RowTrainer": "flexreason.train.trainer",
    "RowSFTTrainer": "flexreason.train.sft",
    "total_weight": "flexreason.train.sums",
    "verify": "flexreason.proof.verify",
}

_NEEDS_TORCH = {
    "Sample": "flexreason.tree.sample",
    "Layout": "flexreason.tree.layout",
    "Role": "flexreason.tree.sample",
    "lay_out": "flexreason.tree.merge",
    "lay_out_turns": "flexreason.tree.layout",
    "unmerge": "flexreason.tree.layout",
    "dense_mask": "flexreason.tree.mask",
    "block_mask": "flexreason.tree.blocks",
    "mask_mod": "flexreason.tree.mask",
    "draw_layout": "flexreason.tree.draw",
    "draw_mask": "flexreason.tree.draw",
    "split": "flexreason.data.splitting",
    "collate": "flexreason.tree.row",
    "Collator": "flexreason.data.collator",
    "Packer": "flexreason.data.pack",
    "Rows": "flexreason.data.rows",
    "RowStream": "flexreason.data.rows",
}

_HOMES = {**_NEEDS_TORCH, **_NEEDS_TRANSFORMERS}
"""All names are imported when they are first asked for. The command line is there at once, and so is its Ctrl-C."""


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'flexreason' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names alone: not the folders, and not what this file imports for itself."""
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
