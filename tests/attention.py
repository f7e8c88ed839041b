"""Attention written out with a matrix, what is put into it, and rows to try it on."""

import torch

import flexreason as fr
from strategies import random_tree, random_turns


def written_out(q, k, v, visible, scale, softcap=None, sinks=None):
    n = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(n, 1).mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(1, -1, scores.shape[2], 1)], -1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    return (weights @ v.repeat_interleave(n, 1)).transpose(1, 2)


def inputs(length, heads=4, groups=2, size=8, value_size=None, dtype=torch.float64, seed=0):
    """q, k, v as a model makes them: [1, S, H * D] seen as [1, H, S, D]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads, size), (groups, size), (groups, value_size or size)]
    made = [torch.randn(1, length, h, d, generator=generator, dtype=dtype).transpose(1, 2) for h, d in shapes]
    return [x.requires_grad_() for x in made]


def rows():
    paper = fr.lay_out_turns(random_turns([(61, 150, 67), (30, 0, 20), (64, 64, 64)]))
    return {
        "paper": fr.collate([paper]),
        "tree": fr.collate([fr.lay_out(random_tree())]),
        "packed": fr.collate([fr.lay_out(random_tree()), paper, fr.lay_out(random_tree(1))], 1024),
        "shorter than a tile": fr.collate([fr.lay_out_turns([([1], [2], [3]), ([4], [5], [6])])], block_size=16),
        "not whole tiles": fr.collate([paper], block_size=16),
        "empty": fr.collate([], 128),
    }
