"""Faults of FlexAttention that others reported, each through our masks, so that it would show here.

A rehearsal runs forward alone and compiles nothing but where a test is about that.

Shapes: S tokens, H query heads, G key heads, D head size.
"""

import pytest
import torch

import flexreason as fr
from attention import written_out
from flexreason.attention import flex
from flexreason.proof.float64 import relative_l2
from gpu.rule import LENGTH, Cell, general_tree, hold, hold_errors, on, outcome, paper, rows, warnings_allowed
from strategies import random_turns

pytestmark = [pytest.mark.gpu, warnings_allowed]


def errors_of(ours, naive, tensors, seed=0, backward=True):
    """By name, [(error of ours, of the naive one)]."""
    high = [x.detach().double().requires_grad_() for x in tensors]
    right = outcome(naive, high, seed, backward)
    found, theirs = (outcome(attend, tensors, seed, backward) for attend in (ours, naive))
    for name, gradient in found.items():
        assert gradient.isfinite().all(), name
    return {name: [(relative_l2([found[name]], [x]), relative_l2([theirs[name]], [x]))] for name, x in right.items()}


def striped_row():
    """Branches of four tokens everywhere: hardly a block that is whole, and keys seen here and there."""
    return fr.collate([fr.lay_out_turns(random_turns([(4, 4, 4)] * 50))], LENGTH)


def test_two_masks_in_one_compiled_function(device, rehearsal, compiler):
    """pytorch #158212 (and #135161): dK and dV wrong or not a number where masks are made to measure, under compile,
    with several of them in one graph. As in a compiled model with a window in every other layer; in fp32, where small
    faults show."""
    row, cell = on(striped_row(), device), Cell(dtype=torch.float32)
    limits = [{}, {"window": 9}]
    masks = [fr.block_mask(row, **limit) for limit in limits]
    visible = [fr.dense_mask(row, **limit) for limit in limits]

    def layers(attend, tables):
        def run(q, k, v):
            for table in tables:
                q = attend(q, k, v, table, cell.scale).transpose(1, 2)
            return q.transpose(1, 2)

        return run

    ours = torch.compile(layers(flex.attend, masks), backend="aot_eager" if rehearsal else "inductor", fullgraph=True)
    tensors = cell.drawn(LENGTH, 0, device)
    hold_errors(errors_of(ours, layers(written_out, visible), tensors, backward=not rehearsal), cell.dtype)


STRIDES = {
    "by head": lambda q, k, v: [x.contiguous() for x in (q, k, v)],
    "by token": lambda q, k, v: [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)],
    "out of one projection": lambda q, k, v: (
        torch.cat([q, k, v], 1)
        .transpose(1, 2)
        .contiguous()
        .transpose(1, 2)
        .split([q.shape[1], k.shape[1], v.shape[1]], 1)
    ),
}


@pytest.mark.parametrize("name", STRIDES)
def test_strides_of_every_kind(name, device, rehearsal):
    """pytorch #146377: garbage in K's gradient for certain strides, in the second run of a compiled function. Also with
    nothing but zeros, where K's gradient is zero, and with an upstream gradient that is one number seen everywhere."""
    row, cell = on(rows()["packed"], device), Cell()
    table, visible = fr.block_mask(row), fr.dense_mask(row)
    plain = cell.drawn(LENGTH, 0, device)

    def ours(q, k, v):
        return flex.attend(*STRIDES[name](q, k, v), table, cell.scale)

    def naive(q, k, v):
        return written_out(q, k, v, visible, cell.scale)

    for seed in range(3):
        hold_errors(errors_of(ours, naive, plain, seed, not rehearsal), cell.dtype)
    if rehearsal:
        return
    right = torch.autograd.grad(naive(*plain).sum(), plain)
    for found, expected in zip(torch.autograd.grad(ours(*plain).sum(), plain), right, strict=True):
        assert (found - expected).abs().max() <= 0.05 * right[2].abs().max()
    zeros = [torch.zeros_like(x).requires_grad_() for x in plain]
    for _ in range(3):
        dq, dk, _ = torch.autograd.grad(ours(*zeros).sum(), zeros)
        assert not dq.any()
        assert not dk.any()


def test_another_tree_every_step(device, rehearsal, compiler):
    """pytorch #186775: not a number in the output of a compiled kernel whose mask changes from step to step."""
    trees = [*rows().values(), striped_row(), *(fr.collate([general_tree(seed)], LENGTH) for seed in range(1, 5))]
    for row in trees if not rehearsal else trees[:3]:
        hold(Cell(), on(row, device), "flex", device, [0], not rehearsal)


def test_rows_of_several_lengths_in_one_compiled_function(device, rehearsal, compiler):
    """pytorch #186775 too: it came with `dynamic=True`, to which torch turns by itself at a second length."""
    cell = Cell()

    def ours(q, k, v, table):
        return flex.attend(q, k, v, table, cell.scale)

    compiled = torch.compile(ours, backend="aot_eager" if rehearsal else "inductor", fullgraph=True)
    for length in (640, 1024, 768):
        row = on(fr.collate([paper()], length), device)
        table, visible = fr.block_mask(row), fr.dense_mask(row)
        tensors = cell.drawn(length, 0, device)
        found = errors_of(
            lambda q, k, v, table=table: compiled(q, k, v, table),
            lambda q, k, v, visible=visible: written_out(q, k, v, visible, cell.scale),
            tensors,
            backward=not rehearsal,
        )
        hold_errors(found, cell.dtype)


def test_a_mask_made_for_a_row_of_another_length_raises(device, rehearsal, compiler):
    """pytorch #139462: zeros from a mask that is longer than queries and keys."""
    row = on(rows()["packed"], device)
    table = fr.block_mask(row)
    assert table.seq_lengths == (LENGTH, LENGTH)
    q, k, v = Cell().drawn(LENGTH // 2, 0, device)
    with torch.no_grad(), pytest.raises(Exception, match="block_mask"):
        flex.attend(q, k, v, table, 0.1)


@pytest.mark.parametrize("length", [16, 120])
def test_rows_shorter_than_a_block(length, device, rehearsal):
    """NATTEN #203: gradients that are not numbers, with heads of 64 and at most 32 tokens. Rows shorter than a block go
    to torch's kernel for decoding, which is another one."""
    layout = fr.lay_out_turns([([1], [2], [3]), ([4], [5], [6])])
    hold(Cell(), on(fr.collate([layout], length, block_size=8), device), "flex", device, range(2), not rehearsal)
