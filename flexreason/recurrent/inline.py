"""Layers that compute their recurrence in their own forward, and not by a function that could be replaced.

MiniMax's lightning attention is linear attention with a fixed decay a head. Zaya's projection has two convolutions, and
values that are half the previous token's: all of it looks at few tokens before, so it is computed as a convolution is.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from flexreason.attention.registry import INSTEAD, TREE, TreeRow
from flexreason.recurrent.convolution import near_ancestors
from flexreason.recurrent.decay import decayed
from flexreason.recurrent.plan import Call, scan


def lightning(
    stock: Callable, tree: TreeRow, layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """`MiniMaxLightningAttention` over a tree."""
    of_heads = (1, hidden_states.shape[1], layer.num_attention_heads, 3 * layer.head_dim)
    q, k, v = layer.act_fn(layer.qkv_proj(hidden_states)).reshape(of_heads).split(layer.head_dim, dim=3)
    rate = layer.slope_rate.flatten()

    def step(call: Call, state: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Any:
        decay = call.neutral(-rate.float().expand(*q.shape[:3]))[..., None]
        inputs = (q.float(), call.neutral(k.float()), v.float()[..., None, :], decay)
        out, state = decayed(*inputs, state, call.chunk(layer.block_size, q.device), bool(call.kept))
        return out.squeeze(3).to(q.dtype), state

    mixed = layer.norm(scan(tree, (q, k, v), step).flatten(2))
    return layer.out_proj(layer.output_gate(hidden_states).sigmoid() * mixed), None


_handed_down: ContextVar[TreeRow | None] = ContextVar("flexreason_handed_down", default=None)
"""The tree that a layer has, for parts of it that it hands no keywords."""


def handed_down() -> TreeRow | None:
    return None if torch.compiler.is_compiling() else _handed_down.get()  # what has a tree is not compiled


def hand_down(stock: Callable, tree: TreeRow, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A layer over a tree, that hands some of its parts no keywords, such as `ZayaAttention` its projection."""
    token = _handed_down.set(tree)
    try:
        return stock(layer, *args, **kwargs, **{TREE: tree})
    finally:
        _handed_down.reset(token)


def zaya_projection(
    stock: Callable, layer: Any, hidden_states: Tensor, cache: Any, conv_mask: Tensor | None = None
) -> Any:
    """`ZayaCCAProjection`, over the tree that the layer around it has. Zeros before a document must stay zeros."""
    row = handed_down()
    if row is None:
        return stock(layer, hidden_states, cache, conv_mask)
    if layer.q_proj.bias is not None:
        raise ValueError(
            f"row: ZayaCCAProjection has biases, which are no zeros before a document's first token{INSTEAD}"
        )
    return near_ancestors(lambda x: stock(layer, x, None, None), row, hidden_states, layer.conv_kernel_size, dim=1)
