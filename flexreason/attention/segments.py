"""Exact attention over a tree without a mask larger than a tile: the backend that trains on CPU.

The visible region is the diagonal tiles and the rectangles of `cover`. Each rectangle reads its queries and
keys as views, and is merged into the output by log-sum-exp. Nothing is kept for backward but q, k, v, the
merged output and its log-sum-exp.

Attention sinks (one logit a head, seen by every query, with no value) only scale the merged output:
out * exp(lse - lse_with_sink). So they need no route of their own, and their gradient is
-sum(exp(sink - lse_with_sink) * delta), delta being the row sums of grad * out.

Shapes: S tokens, H query heads, G key heads, D head size of queries and keys, E of values, n tiles of t tokens.
"""

import logging
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from flexreason.attention import pieces
from flexreason.attention.cover import TILE, Rectangle, cover
from flexreason.mask import Tree, mask_mod, per_token

MASKS = ("interval",)


@dataclass(eq=False)
class Segments:
    """The work list of a row under one window and chunk size, for all layers that have them."""

    position: Tensor  # [S]
    window: int | None
    rectangles: list[Rectangle]
    diagonal: list[
        tuple[slice, Tensor]
    ]  # bool [n, t, t]: who sees whom inside the tiles that a part of storage is cut into
    additive: dict[torch.dtype, list[tuple[slice, Tensor]]] = field(default_factory=dict)

    def masks(self, dtype: torch.dtype) -> list[tuple[slice, Tensor]]:
        """The same as masks to be added to scores, [n, 1, t, t]; made once for all layers."""
        if dtype not in self.additive:
            self.additive[dtype] = [(part, _additive(seen, dtype).unsqueeze(1)) for part, seen in self.diagonal]
        return self.additive[dtype]

    def edge(self, r: Rectangle, dtype: torch.dtype) -> Tensor | None:
        """The mask of a rectangle on the edge of the window, [1, 1, R, K]."""
        if not r.edge or self.window is None:
            return None
        apart = self.position[r.q, None] - self.position[None, r.k]
        return _additive(apart < self.window, dtype)[None, None]


def prepare(tree: Tree, mask: str = "interval", window: int | None = None, chunk: int | None = None) -> Segments:
    """The work list of a layout or row. Padding behind the last document costs nothing but its tiles."""
    assert mask in MASKS
    until, position = per_token(tree, "until"), per_token(tree, "position_ids")
    n_used = int((per_token(tree, "document") >= 0).sum())
    rule = mask_mod(tree, window=window, chunk=chunk)
    index = torch.arange(len(until), dtype=torch.int32, device=until.device)
    whole = len(index) // TILE * TILE
    diagonal = []
    for part in (slice(0, whole), slice(whole, len(index))):  # whole tiles, and what is behind the last
        if tokens := part.stop - part.start:
            tiles = index[part].view(-1, min(TILE, tokens))
            diagonal.append((part, rule(index[0], index[0], tiles[:, :, None], tiles[:, None, :])))
    return Segments(
        position=position,
        window=window,
        rectangles=cover(until[:n_used].tolist(), position[:n_used].tolist(), window, chunk),
        diagonal=diagonal,
    )


@torch.compiler.disable  # it follows the row's work list, for which a compiler would compile anew every time
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    work: Segments,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of queries [1, H, S, D] over keys [1, G, S, D] and values [1, G, S, E]: [1, S, H, E]."""
    with torch.autocast(q.device.type, enabled=False):  # the tiled route's sums are in the precision it asks for
        return _Attend.apply(q, k, v, sinks, work, pieces.Score(scale, softcap))


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, work: Segments, score: pieces.Score
    ) -> Tensor:
        how = pieces.route(q, k, v, score.softcap)
        say_route(how)
        high = torch.float64 if q.dtype == torch.float64 else torch.float32
        found = []
        for part, mask in work.masks(q.dtype):
            q_, k_, v_ = (_tiled(x, part) for x in (q, k, v))
            found.append(pieces.forward(how, q_, k_, v_, mask, score))
        out = _untiled([out for out, _ in found]).to(high)  # [1, H, S, E]
        lse = _untiled([lse.unsqueeze(-1) for _, lse in found]).squeeze(-1)  # [1, H, S]
        for r in work.rectangles:
            edge = work.edge(r, q.dtype)
            more = pieces.forward(how, q[:, :, r.q], k[:, :, r.k], v[:, :, r.k], edge, score)
            pieces.merge(out[:, :, r.q], lse[:, :, r.q], *more)
        if sinks is not None:
            with_sinks = torch.logaddexp(lse, sinks.to(high)[None, :, None])
            out *= (lse - with_sinks).exp_().unsqueeze(-1)
            lse = with_sinks
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.work, ctx.score, ctx.how = work, score, how
        return rearrange(out, "b h s e -> b s h e")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # which it is under create_graph=True alone
            raise RuntimeError('backend "segments" has no second backward: use backend="dense"')
        q, k, v, sinks, out, lse = ctx.saved_tensors
        work, score, how = ctx.work, ctx.score, ctx.how
        grad = rearrange(grads[0], "b s h e -> b h s e")
        found = []
        for part, mask in work.masks(q.dtype):
            grad_, q_, k_, v_, out_ = (_tiled(x, part) for x in (grad, q, k, v, out))
            lse_ = _tiled(lse.unsqueeze(-1), part).squeeze(-1)
            found.append(pieces.backward(how, grad_, q_, k_, v_, out_, lse_, mask, score))
        dq, dk, dv = (_untiled(list(parts)).to(lse.dtype) for parts in zip(*found, strict=True))
        for r in work.rectangles:
            q_, out_, lse_, grad_ = (x[:, :, r.q] for x in (q, out, lse, grad))
            edge = work.edge(r, q.dtype)
            more = pieces.backward(how, grad_, q_, k[:, :, r.k], v[:, :, r.k], out_, lse_, edge, score)
            for total, piece in zip((dq[:, :, r.q], dk[:, :, r.k], dv[:, :, r.k]), more, strict=True):
                total += piece
        d_sinks = None
        if sinks is not None:
            delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
            taken = (sinks.to(lse.dtype)[None, :, None] - lse).exp_()
            d_sinks = -(taken * delta).sum((0, 2)).to(sinks.dtype)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), d_sinks, None, None


@cache
def say_route(how: str) -> None:
    """Once for every slower route that is taken."""
    if how != "fused":
        logging.getLogger("flexreason").warning("segments: attention takes the slower route, %s", how)


def _tiled(x: Tensor, part: slice) -> Tensor:
    """Part of [1, H, S, D] as a batch of tiles [n, H, t, D], a view; a part shorter than a tile is a batch of one."""
    x = x[0, :, part]
    return rearrange(x, "h (n t) d -> n h t d", t=min(TILE, x.shape[1]))


def _untiled(parts: list[Tensor]) -> Tensor:
    """The inverse: [1, H, S, D] from batches of tiles, without a copy where there is but one."""
    joined = [rearrange(x, "n h t d -> 1 h (n t) d") for x in parts]
    return joined[0] if len(joined) == 1 else torch.cat(joined, dim=2)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
