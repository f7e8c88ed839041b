"""How a model's layers find a tree: an attention implementation under a name of our own.

It computes a tree where it is handed one, and otherwise does what the implementation before it did; the mask
function under its name is the one before.

Shapes: S tokens, H query heads, G key heads, D head size.
"""

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flexreason.attention.tree_row import TreeRow

NAME = "flexreason"
"""What the names of our attention implementations begin with."""

TREE = "flexreason_tree"
"""The keyword that carries a `TreeRow` to the layers."""


def before_patching(implementation: str) -> str:
    """The name without ours, of a config that a patched model has."""
    return implementation.removeprefix(f"{NAME}_")


def register(previous: str) -> str:
    """The name under which attention does what `previous` did, and trees."""
    name = f"{NAME}_{previous}"
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _attention(previous))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[previous])
    return name


def _attention(previous: str) -> Callable:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        tree = kwargs.pop(TREE, None)
        if tree is not None:
            return _tree_attention(module, query, key, value, tree, *args, **kwargs), None
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 4 and not attention_mask.numel():
            raise ValueError(
                f"row: it reached {type(module).__name__} without its tree; the model is not patched, or does "
                "not hand keywords on to its layers, and cannot take rows"
            )
        if previous == "eager":
            stock = sys.modules[type(module).__module__].eager_attention_forward
        else:
            stock = ALL_ATTENTION_FUNCTIONS[previous]
        return stock(module, query, key, value, attention_mask, *args, **kwargs)

    return attention


def _tree_attention(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: TreeRow,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> Tensor:
    name = type(module).__name__
    if dropout:
        raise ValueError(f"row: {name} has attention dropout {dropout}, of which one draw cannot serve all samples")
    if position_bias is not None:
        raise ValueError(f"row: {name} adds a position bias to its scores, which is not supported")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise ValueError(f"row: {name} is not causal")
    if q.shape[2] != tree.length or k.shape[2] != tree.length:
        raise ValueError(f"row: {name} has {q.shape[2]} queries and {k.shape[2]} keys for {tree.length} tokens")
    if q.dtype != v.dtype:  # under autocast, norms behind the projections leave q and k in float32
        q, k = q.to(v.dtype), k.to(v.dtype)
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    return tree.attend(q, k, v, scale, window=_window(module, sliding_window), softcap=softcap, sinks=s_aux)


def _window(module: nn.Module, said: int | None) -> int | None:
    """The window of a layer: by its type in the config, as stock masks are made, or else as it says itself."""
    config: Any = getattr(module, "config", None)
    number, kinds = getattr(module, "layer_idx", None), getattr(config, "layer_types", None)
    if not kinds or number is None:
        return said
    return config.sliding_window if kinds[number] == "sliding_attention" else None
