"""One piece of attention: some queries, some keys, the output and its log-sum-exp; and the piece backward.

A token's attention over several pieces is their outputs weighted by the exponentials of their log-sum-exps
(`merge`). Backward needs no piece outputs: given the merged output and log-sum-exp, every piece yields its
own share of the gradients.

Two routes compute a piece. `fused` is torch's own flash kernel for CPU; it groups query heads by itself and
makes no matrix of scores. `tiled` is written out in plain operations, for what the kernel lacks: softcap,
values of another size than keys, other devices. It holds no more scores than `TILED_SCORES` at a time.

Shapes: B batch, R queries, K keys, H query heads, G key heads, D head size of queries and keys, E of values.
"""

from dataclasses import dataclass
from functools import cache

import torch
from einops import rearrange, reduce
from torch import Tensor

TILED_SCORES = 2**22

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Score:
    """How a query and a key become a score: scaled, and capped if `softcap` is set."""

    scale: float
    softcap: float | None = None

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        raw = torch.einsum("bgnrd,bgkd->bgnrk", q, k) * self.scale
        return raw if self.softcap is None else self.softcap * torch.tanh(raw / self.softcap)

    def slope(self, score: Tensor) -> Tensor | float:
        """The derivative of a score by its raw product q k."""
        return self.scale if self.softcap is None else self.scale * (1 - (score / self.softcap).square())


def unfit(q: Tensor, k: Tensor) -> str:
    """Why the fused kernel does not take these tensors, or nothing."""
    if q.device.type != "cpu":
        return f"no fused kernel for {q.device.type}"
    if q.shape[1] != k.shape[1] and not _fused_kernel_groups_heads():
        return "this torch's kernel does not group heads"
    return ""


def forward(how: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, score: Score) -> tuple[Tensor, Tensor]:
    """Output [B, H, R, E] and log-sum-exp [B, H, R] of queries [B, H, R, D] over keys [B, G, K, D].

    `mask` [B or 1, 1, R, K] is added to the scores. It is no larger than a tile, and every query sees some key.
    """
    if how == "fused":
        return _fused(q, k, v, attn_mask=mask, scale=score.scale)
    return _tiled_forward(q, k, v, mask, score)


def backward(
    how: str, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, score: Score
) -> tuple[Tensor, Tensor, Tensor]:
    """This piece's share of the gradients by q, k and v; `out` and `lse` are the merged ones of its queries."""
    if how == "fused":
        return _fused_backward(grad, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=score.scale)
    return _tiled_backward(grad, q, k, v, out, lse, mask, score)


def merge(out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> None:
    """Take one more piece into the output [B, H, R, E] and log-sum-exp [B, H, R] of its queries, in place."""
    both = torch.logaddexp(lse, more_lse)
    out.lerp_(more_out.to(out.dtype), (more_lse - both).exp_().unsqueeze(-1))
    lse.copy_(both)


def _tiled_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, score: Score) -> tuple[Tensor, Tensor]:
    high = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(*q.shape[:3], v.shape[-1], dtype=high)
    lse = q.new_empty(q.shape[:3], dtype=high)
    for b, r, tiles in _tiles(q, k):
        for number, c in enumerate(tiles):
            scores = score(_grouped(q[b, :, r], k).to(high), k[b, :, c].to(high))
            if mask is not None:
                scores += _cut(mask, b, r, c).unsqueeze(2)
            tile_lse = scores.logsumexp(-1)
            weights = (scores - tile_lse.unsqueeze(-1)).exp_()
            tile_lse = rearrange(tile_lse, "b g n r -> b (g n) r")
            tile_out = rearrange(
                torch.einsum("bgnrk,bgke->bgnre", weights, v[b, :, c].to(high)), "b g n r e -> b (g n) r e"
            )
            if number == 0:
                out[b, :, r], lse[b, :, r] = tile_out, tile_lse
            else:
                merge(out[b, :, r], lse[b, :, r], tile_out, tile_lse)
    return out, lse


def _tiled_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, score: Score
) -> tuple[Tensor, Tensor, Tensor]:
    high = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.zeros_like(x, dtype=high) for x in (q, k, v))
    delta = (grad.to(high) * out.to(high)).sum(-1)
    for b, r, tiles in _tiles(q, k):
        q_r, grad_r = (_grouped(x[b, :, r], k).to(high) for x in (q, grad))
        lse_r, delta_r = (_grouped(x[b, :, r].unsqueeze(-1), k) for x in (lse, delta))
        for c in tiles:
            k_c, v_c = k[b, :, c].to(high), v[b, :, c].to(high)
            scores = score(q_r, k_c)
            slope = score.slope(scores)
            if mask is not None:
                scores += _cut(mask, b, r, c).unsqueeze(2)
            weights = (scores - lse_r).exp_()
            dv[b, :, c] += torch.einsum("bgnrk,bgnre->bgke", weights, grad_r)
            raw = weights * (torch.einsum("bgnre,bgke->bgnrk", grad_r, v_c) - delta_r) * slope
            dq[b, :, r] += rearrange(torch.einsum("bgnrk,bgkd->bgnrd", raw, k_c), "b g n r d -> b (g n) r d")
            dk[b, :, c] += torch.einsum("bgnrk,bgnrd->bgkd", raw, q_r)
    return dq, dk, dv


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """[B, H, R, D] as [B, G, H / G, R, D]: query heads beside the key head they read."""
    return rearrange(x, "b (g n) r d -> b g n r d", g=k.shape[1])


def _tiles(q: Tensor, k: Tensor) -> list[tuple[slice, slice, list[slice]]]:
    """Slices of the batch and of queries, with the slices of keys that each goes over."""
    batch, heads, rows, _ = q.shape
    keys = min(k.shape[2], 1024)
    n_rows = max(1, min(rows, TILED_SCORES // (heads * keys)))
    n_batch = max(1, TILED_SCORES // (heads * keys * n_rows))
    columns = [slice(c, c + keys) for c in range(0, k.shape[2], keys)]
    return [
        (slice(b, b + n_batch), slice(r, r + n_rows), columns)
        for b in range(0, batch, n_batch)
        for r in range(0, rows, n_rows)
    ]


def _cut(mask: Tensor, b: slice, r: slice, c: slice) -> Tensor:
    return mask[b if len(mask) > 1 else slice(None), :, r, c]


@cache
def _fused_kernel_groups_heads() -> bool:
    """Whether the kernel reads each key head for its group of query heads, forward and backward; asked once."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 3, 8, generator=generator) for heads in (4, 2, 2))
    try:
        out, lse = _fused(q, k, v)
        grouped = _fused_backward(q, q, k, v, out, lse, 0.0, False)
    except RuntimeError:
        return False
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    expected = _fused_backward(q, q, k, v, *_fused(q, k, v), 0.0, False)
    summed = (expected[0], *(reduce(x, "b (g n) k d -> b g k d", "sum", n=2) for x in expected[1:]))
    return all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in zip(grouped, summed, strict=True))
