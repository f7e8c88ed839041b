"""A tree in torch's variable-length flash attention: how `segments` computes on a GPU.

Storage is cut into *chains*, stretches in which each token is the child of the one before. One call computes all
chains, each causal within itself. What they see of the chains they hang off are the rectangles of `prefixes`.
Rectangles whose queries are disjoint make a *round*, and a round is one call; of a conversation's rounds there are
about as many as the logarithm of its turns. Their outputs are merged by log-sum-exp. Backward needs no output of a
round: given the merged output and log-sum-exp, every call yields its own share of the gradients.

Under a window or chunks there is one call alone: every chain reads its own keys behind copies of those of its path that
are still near. These are few where the window is short; where it is long, flex is the better backend.

Padding is left out: its output is 0, and nobody sees it.

Shapes: S tokens, n of them not padding, H query heads, G key heads, D head size, Q queries and K keys of a call.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from flexreason.attention import dense, pieces
from flexreason.attention.cover import TILE, Cost, Rectangle, Span, paths, prefixes
from flexreason.tree.chains import chains
from flexreason.tree.layout import lay_out_turns
from flexreason.tree.mask import dense_mask

GPU = Cost(TILE * TILE, 200, 100)
"""Counted, not timed: a tile, and the bytes of reading and writing a row in the time of so many pairs."""

SEQUENCES = 2**16 - 1
"""The most of a call: as many blocks as a grid has in its second dimension."""

AT_ONCE = 2**28
"""Numbers of queries, or of keys repeated for their queries, that one call computes: heads are gone through in groups.
It bounds what is held in float32 at a time, and keeps offsets inside the kernels, of 32 bits in places, below 2^31."""

CLOSE = 0.03
"""Relative error of bfloat16 that is no more than rounding: some 0.004 to 0.01."""

HIGH = torch.float32
"""The precision in which parts are merged and summed."""

_forward = torch.ops.aten._flash_attention_forward
_backward = torch.ops.aten._flash_attention_backward


@dataclass(frozen=True)
class Gathered:
    """Sequences of tokens, one behind the other."""

    whole: slice  # from the first to the last in storage
    index: Tensor | None  # which they are; None if all of `whole`, in order
    offsets: Tensor  # int32: where each sequence begins, and where the last ends
    longest: int
    total: int

    @classmethod
    def of(cls, sequences: Sequence[Sequence[Span]], device: torch.device) -> "Gathered":
        """Sequences that are each put together from stretches of storage."""
        if len(sequences) > SEQUENCES:
            raise ValueError(
                f"row: its attention takes {len(sequences):,} sequences, and flash attention has {SEQUENCES:,} at "
                'most; use backend="flex", or shorter rows'
            )
        spans = [span for sequence in sequences for span in sequence]
        lengths = [sum(stop - start for start, stop in sequence) for sequence in sequences]
        adjacent = all(a[1] == b[0] for a, b in pairwise(spans))
        return cls(
            whole=slice(spans[0][0], spans[-1][1]),
            index=None if adjacent else _indices(spans, device),
            offsets=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device),
            longest=max(2, *lengths),  # one query a sequence is decoding, for which kernels have ways of their own
            total=sum(lengths),
        )

    def take(self, x: Tensor) -> Tensor:
        """Their rows of [n, ...]; a view, if they are a stretch of storage."""
        return x[self.whole] if self.index is None else x.index_select(0, self.index)

    def put(self, x: Tensor, rows: Tensor) -> None:
        """Write back what `take` gave, changed in place; no token is among them twice."""
        if self.index is not None:
            x.index_copy_(0, self.index, rows)

    def add(self, x: Tensor, rows: Tensor) -> None:
        """Add to their rows of [n, ...]; a token may be among them several times."""
        if self.index is None:
            x[self.whole] += rows
        else:
            x.index_add_(0, self.index, rows.to(x.dtype))


def _indices(spans: Sequence[Span], device: torch.device) -> Tensor:
    starts, stops = torch.tensor(spans, device=device).T
    lengths = stops - starts
    total = sum(stop - start for start, stop in spans)
    shift = torch.repeat_interleave(starts - lengths.cumsum(0) + lengths, lengths, output_size=total)
    return torch.arange(total, device=device) + shift


@dataclass(frozen=True)
class Call:
    """Sequences of queries, each over a sequence of keys: over all of them, or if `causal` up to its own place, where
    the last query stands at the last key; and then over the last `window` of these."""

    queries: Gathered
    keys: Gathered
    causal: bool
    window: int | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Output [Q, H, D] and log-sum-exp [H, Q] of queries [n, H, D] over keys and values [n, G, D]."""
        inputs = self.queries.take(q), self.keys.take(k), self.keys.take(v)
        out, lse, *_ = _forward(*inputs, *self._sequences(), False, **self._limits(scale))
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Its share of the gradients by its queries [Q, H, D], keys and values [K, G, D]; `out` [n, H, D] and `lse`
        [n, H] are the merged ones."""
        grad, q, out, lse = (self.queries.take(x) for x in (grad, q, out, lse))
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        inputs = grad, q, self.keys.take(k), self.keys.take(v), out, lse.T.contiguous()
        return _backward(*inputs, *self._sequences(), *no_dropout, **self._limits(scale))

    def _sequences(self) -> tuple[Any, ...]:
        plain = self.causal and self.window is None
        return self.queries.offsets, self.keys.offsets, self.queries.longest, self.keys.longest, 0.0, plain

    def _limits(self, scale: float) -> dict[str, Any]:
        if self.window is None:  # not even said, since FlashAttention 4 has no windows
            return {"scale": scale}
        return {"scale": scale, "window_size_left": self.window - 1, "window_size_right": 0}


@dataclass(frozen=True)
class Calls:
    """What the tokens of a row that are not padding are computed in: first by all, then in rounds by some."""

    first: Call
    rounds: tuple[Call, ...] = ()

    @property
    def rows(self) -> int:
        """Of the largest tensor in a call: tokens, and a tile for every sequence in the kernels' own sums."""
        every = (self.first, *self.rounds)
        return max(max(call.queries.total, call.keys.total) + TILE * len(call.queries.offsets) for call in every)


def calls(
    until: Sequence[int], position: Sequence[int], window: int | None, chunk: int | None, device: torch.device
) -> Calls | None:
    """None for no tokens."""
    in_storage = chains(until, position)
    if not in_storage:
        return None
    longest = max(position) + 1
    window, chunk = (None if limit is None or limit >= longest else limit for limit in (window, chunk))
    if window is not None or chunk is not None:
        queries, keys = zip(*paths(in_storage, window, chunk), strict=True)
        return Calls(Call(Gathered.of([[span] for span in queries], device), Gathered.of(keys, device), True, window))
    own = Gathered.of([[(chain.start, chain.stop)] for chain in in_storage], device)
    return Calls(
        Call(own, own, causal=True),
        tuple(
            Call(
                Gathered.of([[(r.q_start, r.q_stop)] for r in disjoint], device),
                Gathered.of([[(r.k_start, r.k_stop)] for r in disjoint], device),
                causal=False,
            )
            for disjoint in rounds(prefixes(in_storage, GPU))
        ),
    )


def rounds(rectangles: Sequence[Rectangle]) -> list[list[Rectangle]]:
    """Rectangles by how many others their queries lie in, each list in storage order."""
    by_depth: list[list[Rectangle]] = []
    around: list[int] = []  # where the queries end of those that are around
    for r in sorted(rectangles, key=lambda r: (r.q_start, -r.q_stop)):
        while around and around[-1] <= r.q_start:
            around.pop()
        if len(around) == len(by_depth):
            by_depth.append([])
        by_depth[len(around)].append(r)
        around.append(r.q_stop)
    return by_depth


def forward(q: Tensor, k: Tensor, v: Tensor, work: Calls | None, scale: float) -> tuple[Tensor, Tensor]:
    """Output [1, H, S, D] and log-sum-exp [1, H, S] of queries [1, H, S, D] over keys and values [1, G, S, D]."""
    out, lse = _zeros_like(q), q.new_zeros(1, q.shape[2], q.shape[1], dtype=HIGH).mT
    if work is None:
        return out, lse
    for queries, keys in _heads(q, k, work):
        tensors = _rows(q, queries), _rows(k, keys), _rows(v, keys)
        merged, merged_lse = work.first.forward(*tensors, scale)
        merged_lse = merged_lse.T.contiguous()
        if work.rounds:
            merged = merged.to(HIGH)
        for call in work.rounds:
            more, more_lse = call.forward(*tensors, scale)
            rows, rows_lse = call.queries.take(merged), call.queries.take(merged_lse)
            pieces.merge(rows, rows_lse, more, more_lse.T)
            call.queries.put(merged, rows)
            call.queries.put(merged_lse, rows_lse)
        _rows(out, queries)[: len(merged)] = merged
        lse[0, queries, : len(merged)] = merged_lse.T
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, work: Calls | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by q, k and v, each as large as these; `out` and `lse` are those of `forward`."""
    gradients = _zeros_like(q), _zeros_like(k), _zeros_like(v)
    if work is None:
        return gradients
    for queries, keys in _heads(q, k, work):
        groups = queries, keys, keys
        tensors = _rows(q, queries), _rows(k, keys), _rows(v, keys)
        grad_, out_, lse_ = _rows(grad, queries), _rows(out, queries), lse[0, queries].T
        totals = [torch.zeros_like(x, dtype=HIGH) for x in tensors]
        for call in (work.first, *work.rounds):
            shares = call.backward(grad_, *tensors, out_, lse_, scale)
            for total, share, tokens in zip(totals, shares, (call.queries, call.keys, call.keys), strict=True):
                tokens.add(total, share)
        for gradient, total, heads in zip(gradients, totals, groups, strict=True):
            _rows(gradient, heads).add_(total)  # a key head may be in several groups
    return gradients


def _heads(q: Tensor, k: Tensor, work: Calls) -> Iterator[tuple[slice, slice]]:
    """Query heads with the key heads that they read: several with all of theirs, or some of those of one."""
    n = q.shape[1] // k.shape[1]
    size = -(-q.shape[3] // 32) * 32  # as the kernels round it up
    at_once = max(1, AT_ONCE // (work.rows * size))  # query heads
    if at_once >= n:
        for first in range(0, k.shape[1], at_once // n):
            last = min(first + at_once // n, k.shape[1])
            yield slice(first * n, last * n), slice(first, last)
        return
    for key in range(k.shape[1]):
        for first in range(key * n, (key + 1) * n, at_once):
            yield slice(first, min(first + at_once, (key + 1) * n)), slice(key, key + 1)


def _rows(x: Tensor, heads: slice) -> Tensor:
    """Some heads of [1, H, S, D] as [S, H, D]: a view, where the kernels take it."""
    rows = x[0, heads].transpose(0, 1)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _zeros_like(x: Tensor) -> Tensor:
    """[1, H, S, D], stored as [1, S, H, D]."""
    return x.new_zeros(1, x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def unfit(q: Tensor, k: Tensor, windowed: bool) -> str:
    """Why the kernels do not take these tensors, or nothing."""
    size = q.shape[-1]
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"flash attention has no {str(q.dtype).removeprefix('torch.')}"
    if size > 256 or size % 8:
        return f"flash attention has no head size of {size}"
    return _fault(q.device, q.dtype, size, q.shape[1] // k.shape[1], windowed, _which())


def _which() -> str | None:
    """The kernels that were activated in the place of torch's own ("FA3", "FA4"), if any were."""
    return getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()


@cache
@torch.inference_mode(False)
def _fault(device: torch.device, dtype: torch.dtype, size: int, heads: int, windowed: bool, which: str | None) -> str:
    """What is wrong with the kernels on this device, or nothing. They are asked once, about a small tree, since they
    are not torch's public ones; and about windows where there are any, which not all of them have."""
    layout = lay_out_turns([([0] * 70, [0] * 90, [0] * 40)] * 3)
    window, scale = 100 if windowed else None, size**-0.5
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, n, len(layout), size, generator=generator) for n in (2 * heads, 2, 2, 2 * heads)]
    q, k, v, grad = (x.to(device, dtype) for x in drawn)
    with torch.enable_grad():
        q_, k_, v_ = (x.float().requires_grad_() for x in (q, k, v))
        right = dense.attend(q_, k_, v_, dense_mask(layout, window=window).to(device), scale).transpose(1, 2)
        expected = [right, *torch.autograd.grad(right, (q_, k_, v_), grad.float())]
    try:
        work = calls(layout.until.tolist(), layout.position_ids.tolist(), window, None, device)
        with torch.no_grad():
            out, lse = forward(q, k, v, work, scale)
            results = [out, *backward(grad, q, k, v, out, lse, work, scale)]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever kernels raise that are not made for this device
        return f"flash attention here raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    for a, b in zip(results, expected, strict=True):
        if not (a - b).norm() <= CLOSE * b.norm():
            return "flash attention here computes something else"
    return ""
