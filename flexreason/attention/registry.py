"""How a model's layers find a tree: an attention implementation under a name of our own.

It computes a tree where it is handed one, and otherwise does what the implementation before it did. The mask
function under its name does likewise: for a row it makes no mask, but notes what kind of mask the model asked
for. The model hands that on to its layers in the mask's place, so a layer's window is the one that its own mask
would have had, whatever its config or its keywords say.

Shapes: S tokens, H query heads, G key heads, D head size.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
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


@dataclass(frozen=True)
class Asked:
    """The mask that a model asked for, for a row."""

    window: int | None


def empty_mask(device: torch.device) -> Tensor:
    """What stands for a row's mask until the mask function sees it: [1, 0]."""
    return torch.empty(1, 0, device=device)


def register(previous: str) -> str:
    """The name under which attention does what `previous` did, and trees."""
    name = f"{NAME}_{previous}"
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _attention(previous))
        AttentionMaskInterface.register(name, _mask(ALL_MASK_ATTENTION_FUNCTIONS[previous]))
    return name


def _mask(stock: Callable) -> Callable:
    def mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if attention_mask is not None and attention_mask.dim() == 2 and not attention_mask.shape[1]:
            return _asked(**kwargs)
        return stock(*args, attention_mask=attention_mask, **kwargs)

    return mask


@torch.compiler.disable
def _asked(*, mask_function: Callable, local_size: int | None = None, **kwargs: Any) -> Asked:
    """Tell a causal mask from a causal window by asking at a few places, and refuse any other."""

    def visible(q: int, kv: int) -> bool:
        zero = torch.zeros((), dtype=torch.int64)
        return bool(mask_function(zero, zero, zero + q, zero + kv))

    far = 10**6 if local_size is None else local_size
    expected = {(0, 0): True, (1, 0): far > 1, (0, 1): False, (far - 1, 0): True, (far, 1): True, (far + 7, 8): True}
    expected[far, 0] = local_size is None
    if {place: visible(*place) for place in expected} != expected:
        raise ValueError(
            "row: the model asks for a mask that is neither causal nor a causal window; it cannot take rows"
        )
    return Asked(local_size)


def _attention(previous: str) -> Callable:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        tree = kwargs.pop(TREE, None)
        if tree is not None:
            return _tree_attention(module, query, key, value, attention_mask, tree, *args, **kwargs), None
        if isinstance(attention_mask, Asked) or (isinstance(attention_mask, Tensor) and not attention_mask.numel()):
            raise ValueError(
                f"row: it reached {type(module).__name__} without its tree; the model is not patched, or does not hand "
                "keywords on to its layers, and cannot take rows"
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
    asked: Any,
    tree: TreeRow,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> Tensor:
    name = type(module).__name__
    if not isinstance(asked, Asked):
        raise ValueError(f"row: the mask of {name} is made in a way of the model's own; it cannot take rows")
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
    return tree.attend(q, k, v, scale, window=asked.window, softcap=softcap, sinks=s_aux)
