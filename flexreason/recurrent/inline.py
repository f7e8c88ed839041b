"""Layers that compute their recurrence in their own forward, and not by a function that could be replaced.

MiniMax's lightning attention is linear attention with a fixed decay a head. Zaya's projection has two convolutions, and
values that are half the previous token's: all of it looks at few tokens before, so it is computed as a convolution is.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from flexreason.attention.registry import TREE, TreeRow
from flexreason.recurrent.convolution import near_ancestors
from flexreason.recurrent.plan import Call, scan


def lightning(
    stock: Callable, tree: TreeRow, layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """`MiniMaxLightningAttention` over a tree."""
    of_heads = (1, hidden_states.shape[1], layer.num_attention_heads, 3 * layer.head_dim)
    q, k, v = layer.act_fn(layer.qkv_proj(hidden_states)).reshape(of_heads).split(layer.head_dim, dim=3)
    rate = layer.slope_rate.flatten()

    def step(call: Call, state: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Any:
        decay = call.neutral(-rate.float().expand(*q.shape[:3]))
        inputs = (q.float(), call.neutral(k.float()), v.float(), decay)
        out, state = decayed(*inputs, state, call.chunk(layer.block_size, q.device))
        return out.to(q.dtype), state

    mixed = layer.norm(scan(tree, (q, k, v), step).flatten(2))
    return layer.out_proj(layer.output_gate(hidden_states).sigmoid() * mixed), None


def decayed(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor | None]:
    """Linear attention [B, L, H, D] whose state decays by exp(decay), [B, L, H], at each token; and the last state."""
    outputs = []
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()[None, :, :, None]
    for q_i, k_i, v_i, decay_i in zip(*(x.split(chunk, 1) for x in (q, k, v, decay)), strict=True):
        n_tokens, total = q_i.shape[1], decay_i.cumsum(1)
        since = (total[:, :, None] - total[:, None]).masked_fill(~causal[:, :n_tokens, :n_tokens], -torch.inf)
        scores = torch.einsum("bihd,bjhd->bijh", q_i, k_i) * since.exp()
        out = torch.einsum("bijh,bjhe->bihe", scores, v_i)
        to_end = (total[:, -1:] - total).exp()
        behind = torch.einsum("bjhd,bjhe->bhde", k_i * to_end[..., None], v_i)
        if state is not None:
            out = out + torch.einsum("bihd,bhde->bihe", q_i * total.exp()[..., None], state)
            behind = behind + state * total[:, -1].exp()[..., None, None]
        state = behind
        outputs.append(out)
    return torch.cat(outputs, 1), state


_projecting: ContextVar[TreeRow | None] = ContextVar("flexreason_projecting", default=None)
"""The tree that an attention layer of Zaya has, for its projection, which is handed none."""


def zaya(stock: Callable, tree: TreeRow, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`ZayaAttention` over a tree."""
    token = _projecting.set(tree)
    try:
        return stock(layer, *args, **kwargs, **{TREE: tree})
    finally:
        _projecting.reset(token)


def zaya_projection(
    stock: Callable, layer: Any, hidden_states: Tensor, cache: Any, conv_mask: Tensor | None = None
) -> Any:
    """`ZayaCCAProjection`, over the tree that the layer around it has. Zeros before a document must stay zeros."""
    row = _projecting.get()
    if row is None:
        return stock(layer, hidden_states, cache, conv_mask)
    if layer.q_proj.bias is not None:
        raise ValueError(
            "row: ZayaCCAProjection has biases, which are no zeros before a document's first token; train on the N "
            "samples"
        )
    return near_ancestors(lambda x: stock(layer, x, None, None), row, hidden_states, layer.conv_kernel_size, dim=1)
