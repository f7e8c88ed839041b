"""Attention under an S x S mask: what the other backends are compared with. Never chosen by itself.

Shapes: S tokens, H query heads, G key heads, D head size of queries and keys, E of values.
"""

import torch
from torch import Tensor

from flexreason.tree.mask import Tree, dense_mask


def prepare(tree: Tree, mask: str, window: int | None, chunk: int | None) -> Tensor:
    return dense_mask(tree, mask=mask, window=window, chunk=chunk)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of queries [1, H, S, D] over keys [1, G, S, D] and values [1, G, S, E]: [1, S, H, E]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if softcap is None and sinks is None:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, visible, scale=scale).transpose(1, 2)
    scores = (q @ k.transpose(2, 3)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(1, -1, scores.shape[2], 1).to(scores.dtype)], dim=-1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))[..., : k.shape[2]]
    return (weights.to(v.dtype) @ v).transpose(1, 2)
