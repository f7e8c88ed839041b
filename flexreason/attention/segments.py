"""Exact attention over a tree without a mask larger than a tile: the backend that trains on CPU, and one for GPUs.

What is visible is cut into parts that kernels take as they are, views of queries and keys without copies, and their
outputs are merged by log-sum-exp. Nothing is kept for backward but q, k, v, the merged output and its log-sum-exp.

On a GPU the parts are those of `flash`. Elsewhere they are the diagonal tiles and the rectangles of `cover`, each
computed as `pieces` says.

Attention sinks (one logit a head, seen by every query, with no value) only scale the merged output:
out * exp(lse - lse_with_sink). So they need no kernel of their own, and their gradient is
-sum(exp(sink - lse_with_sink) * delta), delta being the row sums of grad * out.

Shapes: S tokens, H query heads, G key heads, D head size of queries and keys, E of values, n tiles of t tokens.
"""

import logging
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from flexreason.attention import flash, pieces
from flexreason.attention.cover import TILE, Rectangle, cover
from flexreason.tree.mask import Tree, mask_mod, per_token


@dataclass(eq=False)
class Segments:
    """The parts of a row under one window and chunk size, for all layers that have them; made when first asked for."""

    tree: Tree
    window: int | None
    chunk: int | None
    additive: dict[torch.dtype, list[tuple[slice, Tensor]]] = field(default_factory=dict)

    @cached_property
    def until(self) -> list[int]:
        """Of the tokens that are not padding, which all stand behind them."""
        n_used = int((per_token(self.tree, "document") >= 0).sum())
        return per_token(self.tree, "until")[:n_used].tolist()

    @cached_property
    def position(self) -> list[int]:
        return per_token(self.tree, "position_ids")[: len(self.until)].tolist()

    @cached_property
    def calls(self) -> flash.Calls | None:
        """What `flash` computes."""
        device = per_token(self.tree, "until").device
        return flash.calls(self.until, self.position, self.window, self.chunk, device)

    @cached_property
    def rectangles(self) -> list[Rectangle]:
        return cover(self.until, self.position, self.window, self.chunk)

    @cached_property
    def diagonal(self) -> list[tuple[slice, Tensor]]:
        """Parts of storage cut into tiles, and who sees whom inside them: bool [n, t, t]. Padding costs its tiles."""
        rule = mask_mod(self.tree, window=self.window, chunk=self.chunk)
        until = per_token(self.tree, "until")
        index = torch.arange(len(until), dtype=torch.int32, device=until.device)
        whole = len(index) // TILE * TILE
        diagonal = []
        for part in (slice(0, whole), slice(whole, len(index))):  # whole tiles, and what is behind the last
            if tokens := part.stop - part.start:
                tiles = index[part].view(-1, min(TILE, tokens))
                diagonal.append((part, rule(index[0], index[0], tiles[:, :, None], tiles[:, None, :])))
        return diagonal

    def masks(self, dtype: torch.dtype) -> list[tuple[slice, Tensor]]:
        """The diagonal as masks to be added to scores, [n, 1, t, t]; made once for all layers."""
        if dtype not in self.additive:
            self.additive[dtype] = [(part, _additive(seen, dtype).unsqueeze(1)) for part, seen in self.diagonal]
        return self.additive[dtype]

    def edge(self, r: Rectangle, dtype: torch.dtype) -> Tensor | None:
        """The mask of a rectangle on the edge of the window, [1, 1, R, K]."""
        if not r.edge or self.window is None:
            return None
        position = per_token(self.tree, "position_ids")
        return _additive(position[r.q, None] - position[None, r.k] < self.window, dtype)[None, None]


def prepare(tree: Tree, mask: str = "interval", window: int | None = None, chunk: int | None = None) -> Segments:
    """The parts of a layout or row."""
    assert mask == "interval"
    return Segments(tree, window, chunk)


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
        how = route(q, k, v, score.softcap, work.window is not None)
        say_route(how)
        if how == "flash":
            out, lse = flash.forward(q, k, v, work.calls, score.scale)
        else:
            out, lse = _forward_tiles(how, q, k, v, work, score)
        if sinks is not None:
            with_sinks = torch.logaddexp(lse, sinks.to(lse.dtype)[None, :, None])
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
        grad = rearrange(grads[0], "b s h e -> b h s e")
        if ctx.how == "flash":
            dq, dk, dv = flash.backward(grad, q, k, v, out, lse, ctx.work.calls, ctx.score.scale)
        else:
            dq, dk, dv = _backward_tiles(ctx.how, grad, q, k, v, out, lse, ctx.work, ctx.score)
        d_sinks = None
        if sinks is not None:
            delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
            taken = (sinks.to(lse.dtype)[None, :, None] - lse).exp_()
            d_sinks = -(taken * delta).sum((0, 2)).to(sinks.dtype)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), d_sinks, None, None


def _forward_tiles(
    how: str, q: Tensor, k: Tensor, v: Tensor, work: Segments, score: pieces.Score
) -> tuple[Tensor, Tensor]:
    """Output [1, H, S, E] and log-sum-exp [1, H, S], in high precision."""
    high = torch.promote_types(q.dtype, torch.float32)
    tiles = []
    for part, mask in work.masks(q.dtype):
        q_, k_, v_ = (_tiled(x, part) for x in (q, k, v))
        tiles.append(pieces.forward(how, q_, k_, v_, mask, score))
    out = _untiled([out for out, _ in tiles]).to(high)
    lse = _untiled([lse.unsqueeze(-1) for _, lse in tiles]).squeeze(-1)
    for r in work.rectangles:
        edge = work.edge(r, q.dtype)
        more = pieces.forward(how, q[:, :, r.q], k[:, :, r.k], v[:, :, r.k], edge, score)
        pieces.merge(out[:, :, r.q], lse[:, :, r.q], *more)
    return out, lse


def _backward_tiles(
    how: str,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    work: Segments,
    score: pieces.Score,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by q, k and v, in high precision; `out` and `lse` are those of all parts merged."""
    tiles = []
    for part, mask in work.masks(q.dtype):
        grad_, q_, k_, v_, out_ = (_tiled(x, part) for x in (grad, q, k, v, out))
        lse_ = _tiled(lse.unsqueeze(-1), part).squeeze(-1)
        tiles.append(pieces.backward(how, grad_, q_, k_, v_, out_, lse_, mask, score))
    dq, dk, dv = (_untiled(list(parts)).to(lse.dtype) for parts in zip(*tiles, strict=True))
    for r in work.rectangles:
        q_, out_, lse_, grad_ = (x[:, :, r.q] for x in (q, out, lse, grad))
        edge = work.edge(r, q.dtype)
        more = pieces.backward(how, grad_, q_, k[:, :, r.k], v[:, :, r.k], out_, lse_, edge, score)
        for total, piece in zip((dq[:, :, r.q], dk[:, :, r.k], dv[:, :, r.k]), more, strict=True):
            total += piece
    return dq, dk, dv


def route(q: Tensor, k: Tensor, v: Tensor, softcap: float | None, windowed: bool = False) -> str:
    """ "flash" or "fused", or "tiled: why"."""
    if softcap is not None:
        return "tiled: softcap"
    if v.shape[-1] != q.shape[-1]:
        return "tiled: values and keys differ in head size"
    if q.device.type == "cuda":
        why = flash.unfit(q, k, windowed)
        return f"tiled: {why}" if why else "flash"
    if why := pieces.unfit(q, k):
        return f"tiled: {why}"
    return "fused"


@cache
def say_route(how: str) -> None:
    """Once for every slower route that is taken."""
    if how.startswith("tiled"):
        logging.getLogger("flexreason").warning("segments: attention takes the slower route, %s", how)


def _tiled(x: Tensor, part: slice) -> Tensor:
    """Part of [1, H, S, D] as a batch of tiles [n, H, t, D], a view; a part shorter than a tile is a batch of one."""
    x = x[0, :, part]
    return rearrange(x, "h (n t) d -> n h t d", t=min(TILE, x.shape[1]))


def _untiled(parts: list[Tensor]) -> Tensor:
    """The inverse: [1, H, S, D] from batches of tiles, without a copy where there is but one. In memory a token's heads
    stand together, as stock attention has it: some models take a view of that."""
    joined = [rearrange(x, "n h t d -> 1 (n t) h d") for x in parts]
    return rearrange(joined[0] if len(joined) == 1 else torch.cat(joined, dim=1), "b s h d -> b h s d")


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
