"""Rows of more than 128K tokens, and rows whose last elements lie beyond 2^31: a few queries, or a few documents, of
such a row against attention written out in fp64.

Upstream gradients are zero but for the queries that are looked at. So gradients by all keys and values are theirs
alone, and known without ever making more than a few lines of scores. The longest rows run in a process of their own
(overflow.py), since an address that has run over is an illegal access, and the end of the process.

A rehearsal has short rows and shows that the bookkeeping is right.
"""

import json

import pytest
import torch

import flexreason as fr
from attention import written_out
from flexreason.attention import flex
from flexreason.attention.registry import BACKENDS
from flexreason.proof.float64 import relative_l2
from flexreason.tree.mask import mask_mod
from gpu.rule import Cell, alone, hold_errors, on, warnings_allowed
from strategies import random_turns

pytestmark = [pytest.mark.gpu, warnings_allowed]

MEMORY = 40 * 2**30


def long_row(rehearsal):
    """A conversation of 16 long turns: 161,792 tokens, and a bit of padding."""
    shape = [(20, 40, 20)] * 6 if rehearsal else [(2048, 4096, 2048)] * 16
    layout = fr.lay_out_turns(random_turns(shape))
    return fr.collate([layout], (len(layout) // 1024 + 1) * 1024)


def looked_at(row, n=32):
    """Queries at both ends of what is not padding, at the ends of some branches, and others anywhere."""
    n_real = int((row["document"] >= 0).sum())
    ends = (row["position_ids"][0, :n_real].diff() != 1).nonzero().flatten()
    anywhere = torch.randint(0, n_real, (n,), generator=torch.Generator().manual_seed(0))
    last = torch.tensor([0, 1, n_real - 1])
    return torch.cat([last, ends[:6], ends[-6:] + 1, anywhere]).unique()


@pytest.mark.parametrize(
    ("backend", "limits"), [("flex", {}), ("flex", {"window": 4096}), ("segments", {})], ids=lambda x: str(x)
)
def test_output_and_gradients_of_queries_of_a_long_row(backend, limits, device, rehearsal):
    """One seed: over so many keys there is little left to chance."""
    row = long_row(rehearsal)
    length, at = row["until"].shape[1], looked_at(row).to(device)
    assert rehearsal or length >= 128 * 1024
    row = on(row, device)
    cell = Cell(heads=8, groups=2, size=128, limits={"window": 70} if rehearsal and limits else limits)
    index = torch.arange(length, dtype=torch.int32, device=device)
    visible = mask_mod(row, **cell.limits)(index[0], index[0], at.int()[:, None], index[None])
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(1, len(at), cell.heads, cell.size, generator=generator).to(device, cell.dtype)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    low = cell.drawn(length, 0, device)
    high = [x.detach().double().requires_grad_() for x in low]

    def naive(tensors):
        q, k, v = tensors
        out = written_out(q[:, :, at], k, v, visible, cell.scale)
        return [x.detach() for x in (out, *torch.autograd.grad(out, tensors, upstream.to(out.dtype)))]

    right, theirs = naive(high), naive(low)
    if device == "cuda":
        assert torch.cuda.max_memory_allocated() <= MEMORY

    forward_only = rehearsal and backend == "flex"
    table = cell.table(backend, row)
    with torch.set_grad_enabled(not forward_only):
        out = BACKENDS[backend].attend(*low, table, cell.scale)
    found = [out.detach()[:, at]]
    if not forward_only:
        found += torch.autograd.grad(out, low, torch.zeros_like(out).index_copy_(1, at, upstream))
    errors = {}
    for name, a, b, expected in zip(("output", "dq", "dk", "dv"), found, theirs, right, strict=False):
        assert a.isfinite().all(), name
        errors[name] = [(relative_l2([a], [expected]), relative_l2([b], [expected]))]
    hold_errors(errors, cell.dtype)


def test_rows_that_go_beyond_2_to_the_31_elements(device, rehearsal):
    """pytorch #190857: 540,672 tokens of 4,096 numbers each, of queries, keys and values."""
    heads, *shape = ["4", "2", "16", "4"] if rehearsal else ["32", "32", "128", "132"]
    errors = json.loads(alone("-m", "gpu.overflow", device, "segments", heads, *shape))
    print(errors)
    assert errors.pop("elements") >= (0 if rehearsal else 2**31)
    assert errors.pop("finite")
    hold_errors(errors, torch.bfloat16)


@pytest.mark.parametrize("groups", [8, 32])
def test_flex_refuses_rows_that_go_beyond_2_to_the_31_elements(groups, device, rehearsal):
    """Its kernels would read elsewhere: in backward even where queries alone are as many."""
    if rehearsal:
        pytest.skip("addresses are the GPU kernels'")
    q, k = (torch.empty(1, device=device, dtype=torch.bfloat16).expand(1, h, 2**19, 128) for h in (32, groups))
    with pytest.raises(NotImplementedError, match=r"addresses of 32 bits.*2,147,483,648"):
        flex.attend(q, k, k, None, 0.1)
