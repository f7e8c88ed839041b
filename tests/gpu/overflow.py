"""python -m gpu.overflow DEVICE BACKEND HEADS GROUPS SIZE DOCUMENTS: errors of single documents of one very long row.

All documents are the same tree of 4,096 tokens, so that the row is long and attention little work. Looked at are those
at the beginning, just before and behind the place where the queries' elements pass 2^31, and at the end. Prints a line
of JSON: for output and gradients the worst of them, as [ours, naive].
"""

import json
import sys

import torch

import flexreason as fr
from attention import written_out
from flexreason.attention.registry import BACKENDS
from flexreason.proof.float64 import relative_l2
from gpu.rule import Cell, on
from strategies import random_turns

TURNS = [(1000, 724, 200), (500, 1000, 472)]


def main(device, backend, heads, groups, size, documents):
    cell = Cell(heads=heads, groups=groups, size=size)
    layout = fr.lay_out_turns(random_turns(TURNS))
    row = on(fr.collate([layout] * documents), device)
    length = row["until"].shape[1]
    generator = torch.Generator(device).manual_seed(0)

    def drawn(h):
        made = torch.randn(1, length, h, size, device=device, dtype=cell.dtype, generator=generator)
        return made.transpose(1, 2).requires_grad_()

    q, k, v = drawn(heads), drawn(groups), drawn(groups)
    upstream = drawn(heads).detach().transpose(1, 2)
    out = BACKENDS[backend].attend(q, k, v, cell.table(backend, row), cell.scale)
    found = [out.detach(), *(x.transpose(1, 2) for x in torch.autograd.grad(out, [q, k, v], upstream))]
    del out

    visible = fr.dense_mask(layout).to(device)
    edge = min(2**31 // (heads * size) // len(layout), documents - 1)
    names = ("output", "dq", "dk", "dv")
    errors = {name: [] for name in names}
    for number in sorted({0, edge - 1, edge, documents - 1}):
        tokens = slice(number * len(layout), (number + 1) * len(layout))
        for group in (0, groups - 1):
            theirs = slice(group * heads // groups, (group + 1) * heads // groups)
            own = slice(group, group + 1)
            low = [x.detach()[:, h, tokens].requires_grad_() for x, h in ((q, theirs), (k, own), (v, own))]
            right, naive = (
                outcome(tensors, visible, cell.scale, upstream[:, tokens, theirs])
                for tensors in ([x.detach().double().requires_grad_() for x in low], low)
            )
            ours = [x[:, tokens, h] for x, h in zip(found, (theirs, theirs, own, own), strict=True)]
            for name, a, b, expected in zip(names, ours, naive, right, strict=True):
                errors[name].append((relative_l2([a], [expected]), relative_l2([b], [expected])))
    worst = {name: [max(pairs)] for name, pairs in errors.items()}
    finite = all(bool(x.isfinite().all()) for x in found)
    print(json.dumps({**worst, "finite": finite, "elements": length * heads * size}))


def outcome(tensors, visible, scale, upstream):
    """Output and gradients as [1, S, H, D]."""
    out = written_out(*tensors, visible, scale)
    grads = torch.autograd.grad(out, tensors, upstream.to(out.dtype))
    return [out.detach(), *(x.transpose(1, 2) for x in grads)]


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
