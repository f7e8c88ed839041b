"""`lay_out`: any samples into the token prefix tree, in storage order.

Sorted as byte strings, samples that share a beginning become neighbours, and the tree is known from the
length that each shares with the one before. Storage order is preorder, the child that most samples share
first (ties: the larger subtree, then the one whose first sample was given first): the trunk stands first
and contiguous, what leaves it last comes next, and masks have few partial blocks.

All of it is numpy: torch would share out every long line of this work among its threads, and thousands of short steps
that wait for each other take many times as long wherever a core has something else to do.

>>> layout = lay_out([Sample([1, 2], [3]), Sample([1, 2, 4], [5, 6])])
>>> layout.input_ids.tolist(), layout.until.tolist()
([1, 2, 4, 5, 6, 3], [6, 6, 5, 5, 5, 6])

Shapes: S tokens, T targets, n tokens of one sample.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from flexreason.tree.layout import PER_TARGET, PER_TOKEN, Layout
from flexreason.tree.sample import SAMPLE_ROLES, UNSAID, Ids, Role, Sample, as_ids, one_device


@dataclass(eq=False)
class _Checked:
    """A sample whose every field is an int32 array, with what was left unsaid filled in."""

    ids: np.ndarray  # [n]
    n_prompt: int
    roles: np.ndarray  # [n]
    turns: np.ndarray  # [n], UNSAID where not said


@dataclass(eq=False)
class _Branch:
    """A stretch of the tree without a fork: tokens from `depth` to `end` of every sample through it."""

    depth: int
    end: int
    sample: int  # any sample through it
    parent: "_Branch | None"
    children: list["_Branch"] = field(default_factory=list)
    ending: list[int] = field(default_factory=list)  # samples whose last token is this branch's
    n_samples: int = 0  # through it
    first_sample: int = 0  # the one given first among them
    size: int = 0  # tokens in its subtree
    start: int = 0  # index of its first token in storage

    def order(self) -> tuple[int, int, int]:
        return (-self.n_samples, -self.size, self.first_sample)


def lay_out(samples: Sequence[Sample]) -> Layout:
    """Merge samples into one tree: nested, sharing targets, equal, or sharing nothing, as they come.

    >>> lay_out([Sample([1, 2], [3]), Sample([1, 2, 4], [5, 6])])
    Layout(6 tokens, 3 targets, 2 samples of 8 tokens)
    """
    if not isinstance(samples, Sequence) or not samples:
        raise ValueError("lay_out: expected at least one sample, found none")
    checked = [_check(i, sample) for i, sample in enumerate(samples)]
    root, leaves = _grow(checked)
    stored = _store(root)

    lengths = [branch.end - branch.depth for branch in stored]
    index = np.arange(sum(lengths))
    shift = np.repeat([branch.start - branch.depth for branch in stored], lengths)  # storage index less position
    until = np.repeat([branch.start + branch.size for branch in stored], lengths)

    role = np.zeros(len(index), dtype=np.int32)
    turn = np.full(len(index), UNSAID, dtype=np.int32)
    first = np.empty(len(index), dtype=np.int32)
    sources = [index] * len(checked)
    for i in reversed(range(len(checked))):  # so that the first sample through a token has the last word
        sample = checked[i]
        path = np.concatenate([index[b.start : b.start + b.end - b.depth] for b in _from_root(leaves[i])])
        role[path] |= sample.roles
        turn[path] = np.where(sample.turns == UNSAID, turn[path], sample.turns)
        first[path] = i
        sources[i] = path[sample.n_prompt - 1 : -1]  # a target is predicted by the token before it on this path

    targets = [sample.ids[sample.n_prompt :] for sample in checked]
    turns = np.repeat(np.arange(len(checked)), [len(ids) for ids in targets])
    arrays = {
        "input_ids": np.concatenate([checked[b.sample].ids[b.depth : b.end] for b in stored]),
        "position_ids": index - shift,
        "until": until,
        "turn": np.where(turn == UNSAID, first, turn),
        "role": role,
        "target_source": np.concatenate(sources),
        "target_ids": np.concatenate(targets),
        "target_turn": turns,
        "target_weight": np.ones(len(turns)),
    }
    kinds = {torch.int32: np.int32, torch.int64: np.int64, torch.float32: np.float32}
    dtypes = {**PER_TOKEN, **PER_TARGET}
    return Layout(**{name: torch.from_numpy(x.astype(kinds[dtypes[name]], copy=False)) for name, x in arrays.items()})


def _check(i: int, sample: Sample) -> _Checked:
    if not isinstance(sample, Sample):
        raise ValueError(f"sample {i}: expected fr.Sample(prompt_ids, target_ids), found {type(sample).__name__}")
    one_device(vars(sample), f"sample {i}")
    prompt = as_ids(sample.prompt_ids, f"sample {i}: prompt_ids").numpy()
    target = as_ids(sample.target_ids, f"sample {i}: target_ids").numpy()
    if not len(prompt):
        raise ValueError(
            f"sample {i}: prompt_ids is empty; expected at least one token, which predicts the first target"
        )
    if not len(target):
        raise ValueError(f"sample {i}: target_ids is empty; expected at least one token to train on")

    def said(name: str, values: Ids | None, ids: str, n: int, unsaid: int, lowest: int) -> np.ndarray:
        if values is None:
            return np.full(n, unsaid, dtype=np.int32)
        array = as_ids(values, f"sample {i}: {name}", lowest=lowest).numpy()
        if len(array) != n:
            raise ValueError(f"sample {i}: expected {name} as long as {ids} ({n}), found {len(array)}")
        return array

    prompt_roles = said("prompt_roles", sample.prompt_roles, "prompt_ids", len(prompt), Role.PROMPT, 0)
    target_roles = said("target_roles", sample.target_roles, "target_ids", len(target), Role.RESPONSE, 0)
    for name, roles in (("prompt_roles", prompt_roles), ("target_roles", target_roles)):
        strange = ((roles & ~int(SAMPLE_ROLES)) != 0) | (roles == 0)
        if strange.any():
            at = int(strange.argmax())
            raise ValueError(
                f"sample {i}: {name}[{at}]: expected flags among PROMPT, REASONING, CONTEXT and RESPONSE, "
                f"found {int(roles[at])}"
            )
    turns = said("prompt_turns", sample.prompt_turns, "prompt_ids", len(prompt), UNSAID, UNSAID)
    return _Checked(
        ids=np.concatenate([prompt, target]),
        n_prompt=len(prompt),
        roles=np.concatenate([prompt_roles, target_roles]),
        turns=np.concatenate([turns, np.full_like(target, UNSAID)]),
    )


def _grow(samples: list[_Checked]) -> tuple[_Branch, list[_Branch]]:
    """The root, which holds no token, and the branch on which each sample ends. Samples are added in sorted order, each
    at the tree's right edge."""
    # Big-endian bytes sort as the non-negative numbers they spell, and a prefix sorts before what it begins.
    keys = [sample.ids.astype(">i4").tobytes() for sample in samples]
    in_order = sorted(range(len(samples)), key=keys.__getitem__)
    shared = [0, *(n_alike(samples[a].ids, samples[b].ids) for a, b in pairwise(in_order))]

    edge = [_Branch(depth=0, end=0, sample=in_order[0], parent=None)]  # root to right-most leaf
    for i, n_shared in zip(in_order, shared, strict=True):
        while len(edge) > 1 and edge[-1].depth >= n_shared:
            edge.pop()
        if edge[-1].end > n_shared:
            _split(edge[-1], n_shared)
        if len(samples[i].ids) > n_shared:
            branch = _Branch(depth=n_shared, end=len(samples[i].ids), sample=i, parent=edge[-1])
            edge[-1].children.append(branch)
            edge.append(branch)
        edge[-1].ending.append(i)

    leaves: list[_Branch] = [edge[0]] * len(samples)
    for branch in _preorder(edge[0]):
        for i in branch.ending:
            leaves[i] = branch
    return edge[0], leaves


def n_alike(a: np.ndarray, b: np.ndarray) -> int:
    """How many numbers two arrays begin with alike."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    at = int(differs.argmax()) if n else 0
    return at if n and differs[at] else n


def _split(branch: _Branch, depth: int) -> None:
    """Cut a branch at `depth`; the lower part takes its children and the samples that end on it."""
    lower = _Branch(depth, branch.end, branch.sample, branch, branch.children, branch.ending)
    for child in lower.children:
        child.parent = lower
    branch.end, branch.children, branch.ending = depth, [lower], []


def _store(root: _Branch) -> list[_Branch]:
    """All branches below the root in storage order, each told where it starts."""
    for branch in reversed(list(_preorder(root))):  # children before parents
        below = branch.children
        branch.n_samples = len(branch.ending) + sum(child.n_samples for child in below)
        branch.first_sample = min([*branch.ending, *(child.first_sample for child in below)])
        branch.size = branch.end - branch.depth + sum(child.size for child in below)
        below.sort(key=_Branch.order)
    stored, start = list(_preorder(root))[1:], 0
    for branch in stored:
        branch.start = start
        start += branch.end - branch.depth
    return stored


def _preorder(root: _Branch) -> Iterator[_Branch]:
    waiting = [root]
    while waiting:
        branch = waiting.pop()
        yield branch
        waiting.extend(reversed(branch.children))


def _from_root(leaf: _Branch) -> Iterator[_Branch]:
    """The branches from below the root to this one."""
    line, branch = [], leaf
    while branch.parent is not None:
        line.append(branch)
        branch = branch.parent
    return reversed(line)
