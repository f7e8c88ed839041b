"""Compiled FlexAttention over closed-form block lists: the backend for GPUs. On CPU it has no backward.

Shapes: S tokens, H query heads, G key heads, D head size of queries and keys, E of values.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from flexreason.tree.blocks import block_mask
from flexreason.tree.mask import Tree

ADDRESSES = 2**31
"""From here on the kernels' offsets run over, forward or backward (pytorch #190857)."""

KERNELS = 64
"""How many kernels (a kind of layer in a dtype and row length each) one process may compile before it is an error."""


def prepare(tree: Tree, mask: str, window: int | None, chunk: int | None) -> BlockMask:
    return block_mask(tree, mask=mask, window=window, chunk=chunk)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: BlockMask,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of queries [1, H, S, D] over keys [1, G, S, D] and values [1, G, S, E]: [1, S, H, E]."""
    output = q[..., :1].numel() * v.shape[-1]
    if why := unfit(q.device, q.dtype, max(q.numel(), k.numel(), v.numel(), output)):
        raise NotImplementedError(f'{why}; use backend="segments"')
    if q.device.type == "cuda":  # parts of one projection lie far apart
        q, k, v = (x.contiguous() if reach(x) >= ADDRESSES else x for x in (q, k, v))
    if q.device.type == "cpu":
        _check_cpu(q, k, v, sinks)
        q, k, v = q.detach(), k.detach(), v.detach()
    options = {
        "score_mod": None if softcap is None else _capped(softcap),
        "block_mask": visible,
        "scale": scale,
        "enable_gqa": q.shape[1] != k.shape[1],
    }
    if sinks is None:
        return _flex(q, k, v, **options).transpose(1, 2)
    out, aux = _flex(q, k, v, **options, return_aux=AuxRequest(lse=True))
    # One more logit a head, without a value, only scales the output; in fp32, since the factor's gradient needs it.
    factor = torch.sigmoid(aux.lse - sinks.view(1, -1, 1)).unsqueeze(-1)
    return (out * factor).to(out.dtype).transpose(1, 2)


def reach(x: Tensor) -> int:
    """Numbers from the first of a tensor to behind its last, in memory."""
    return 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))


def unfit(device: torch.device, dtype: torch.dtype, numbers: int = 0) -> str:
    """Why it computes nothing in a dtype on a device, for queries, keys or values of so many numbers; or nothing."""
    if device.type != "cuda":
        return ""
    if dtype == torch.float64:
        return 'backend "flex" has no float64 on GPUs'
    if numbers >= ADDRESSES:
        return f'backend "flex" on GPUs has addresses of 32 bits, too few for rows of {numbers:,} numbers in a layer'
    return ""


def _check_cpu(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise NotImplementedError(
            'backend "flex" has no backward on CPU: use backend="segments" to train, or torch.no_grad() to evaluate'
        )
    if sinks is not None:
        raise NotImplementedError('backend "flex" has no attention sinks on CPU: use backend="segments"')


def _flex(*args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():  # the model is compiled as a whole, and flex with it
        return flex_attention(*args, **kwargs)
    with torch._dynamo.config.patch(recompile_limit=KERNELS):
        return _compiled()(*args, **kwargs)


@cache
def _compiled() -> Any:
    """With `fullgraph`, too many recompiles are an error; without, they are a silent fall-back to S x S scores.

    Not `dynamic`: a kernel for one known row length needs no bounds checks.
    """
    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


@cache
def _capped(softcap: float) -> Any:
    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        # The same as softcap * tanh(score / softcap), in two thirds of the instructions.
        return 2 * softcap * torch.sigmoid(score * (2 / softcap)) - softcap

    return capped
