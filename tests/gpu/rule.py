"""What the tests on a GPU share: cells of attention to try, rows of one length, and the rule they are held to.

In a dtype that rounds, the relative L2 error against fp64 may be at most 1.5 times that of attention written out
naively in the same dtype on the same device: the median over seeds, for the output and for all gradients as one. Each
gradient on its own may be 3 times off, so that none hides behind the others. In fp32 1e-5 will do, which TF32 misses by
far.

Shapes: S tokens, H query heads, G key heads, D head size.
"""

import os
import random
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import pytest
import torch

import flexreason as fr
from attention import inputs, written_out
from flexreason.attention import flex
from flexreason.attention.registry import BACKENDS
from flexreason.proof.float64 import relative_l2
from strategies import VOCABULARY, random_tree, random_turns

FACTOR = 1.5
ALONE = 2.0
"""How many times more a gradient on its own may be off."""
FLOAT32 = 1e-5
LENGTH = 1024
"""Of every row of attention alone, so that one kernel serves them all."""

# On a GPU torch and transformers warn of many things; of one alone nobody may go on.
warnings_allowed = pytest.mark.filterwarnings("default", "error:flex_attention called without torch.compile")


@dataclass(frozen=True)
class Cell:
    """One kind of attention."""

    size: int = 64
    heads: int = 8
    groups: int = 2
    dtype: torch.dtype = torch.bfloat16
    value_size: int | None = None
    limits: dict = field(default_factory=dict)
    softcap: float | None = None
    sinks: bool = False
    block_size: int | tuple[int, int] = 128
    mask: str = "interval"

    @property
    def scale(self):
        return self.size**-0.5

    def table(self, backend, row):
        """What a backend prepares once a row."""
        if backend == "flex":
            return fr.block_mask(row, block_size=self.block_size, mask=self.mask, **self.limits)
        return BACKENDS[backend].prepare(row, self.mask, self.limits.get("window"), self.limits.get("chunk"))

    def drawn(self, length, seed, device):
        """q, k, v, and sinks where there are any, as a model makes them."""
        made = inputs(length, self.heads, self.groups, self.size, self.value_size, seed=seed)
        if self.sinks:
            made.append(torch.randn(self.heads, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
        return [x.detach().to(device, self.dtype).requires_grad_() for x in made]


NAMES = ("output", "dq", "dk", "dv", "dsinks")


def outcome(attend, tensors, seed, backward=True, real=None):
    """Output and gradients of `attend(q, k, v, sinks=...)`, by name, under an upstream gradient drawn by the seed.

    Where not all tokens are `real`, of those alone: what a backend makes of padding is its own business.
    """
    q, k, v, *sinks = tensors
    with torch.set_grad_enabled(backward):
        out = attend(q, k, v, **({"sinks": sinks[0]} if sinks else {}))
    kept = 1 if real is None else real[None, :, None, None].to(out)
    found = [out * kept]
    if backward:
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found += torch.autograd.grad(out, tensors, upstream.to(tensors[0].dtype).to(out) * kept)
    return dict(zip(NAMES, (x.detach() for x in found), strict=False))


def hold(cell, row, backend, device, seeds, backward=True, factor=FACTOR):
    """Hold a backend to the rule, on one kind of attention over one row."""
    length, real = row["until"].shape[1], row["document"][0] >= 0
    visible, table = fr.dense_mask(row, **cell.limits), cell.table(backend, row)
    more = {"softcap": cell.softcap} if cell.softcap is not None else {}

    def naive(q, k, v, **sinks):
        return written_out(q, k, v, visible, cell.scale, **more, **sinks)

    def ours(q, k, v, **sinks):
        return BACKENDS[backend].attend(q, k, v, table, cell.scale, **more, **sinks)

    errors = {}
    for seed in seeds:
        low = cell.drawn(length, seed, device)
        high = [x.detach().double().requires_grad_() for x in low]
        right = outcome(naive, high, seed, backward, real)
        found, theirs = (outcome(attend, low, seed, backward, real) for attend in (ours, naive))
        for name, expected in list(right.items()):
            assert found[name].dtype == cell.dtype, name
            assert found[name].isfinite().all(), name
            if not expected.any():  # of padding, or of tokens that see but themselves
                assert found[name].abs().max() <= 8 * torch.finfo(cell.dtype).eps, name
                del right[name]
        groups = {name: [name] for name in right}
        if backward:
            groups["gradients"] = [name for name in right if name != "output"]
        for name, parts in groups.items():
            pair = [relative_l2([x[part] for part in parts], [right[part] for part in parts]) for x in (found, theirs)]
            errors.setdefault(name, []).append(pair)
    hold_errors(errors, cell.dtype, factor)


def hold_errors(errors, dtype, factor=FACTOR):
    """`errors`: by name, for every seed (ours, the naive one)."""
    missed = {}
    for name, pairs in errors.items():
        limit = factor if name in ("output", "gradients", "logprobs") else ALONE * factor
        ratio, size = median(ours / max(naive, 1e-300) for ours, naive in pairs), median(ours for ours, _ in pairs)
        # A handful of numbers, whose naive error may be 0 by chance: half a unit in the last place is no fault.
        enough = FLOAT32 if dtype == torch.float32 else torch.finfo(dtype).eps / 2 if name == "dsinks" else 0.0
        print(f"  {name}: {size:.1e}, {ratio:.2f} times the naive error")
        if not (ratio <= limit or size <= enough):
            missed[name] = f"{size:.1e}, which is {ratio:.2f} times the naive error"
    assert not missed, missed


def forget_compiled():
    """Dynamo's code and ours; what inductor has on disk stays."""
    torch.compiler.reset()
    getattr(flex._compiled, "cache_clear", lambda: None)()


def on(row, device):
    return {name: tensor.to(device) for name, tensor in row.items()}


def paper(seed=0):
    """A conversation of three turns, one without reasoning."""
    return fr.lay_out_turns(random_turns([(61, 150, 67), (30, 0, 20), (64, 64, 64)], seed))


def general_tree(seed=0, n_samples=14):
    """Samples that leave each other anywhere, deep and shallow."""
    draw = random.Random(seed)
    found = []
    for _ in range(n_samples):
        stem = []
        if found and draw.random() < 0.9:
            earlier = draw.choice(found)
            whole = [*earlier.prompt_ids, *earlier.target_ids]
            stem = whole[: draw.randint(1, len(whole))]
        text = stem + draw.choices(range(VOCABULARY), k=draw.randint(20, 70))
        cut = draw.randint(1, len(text) - 1)
        found.append(fr.Sample(text[:cut], text[cut:]))
    return fr.lay_out(found)


def rows(length=LENGTH):
    """Rows of one length: a kernel made for one serves all."""
    return {
        "paper": fr.collate([paper()], length),
        "general tree": fr.collate([general_tree()], length),
        "packed": fr.collate([fr.lay_out(random_tree()), paper(), fr.lay_out(random_tree(1))], length),
        "full of small trees": fr.collate([fr.lay_out(random_tree(seed)) for seed in range(length // 128)], length),
        "tokens by themselves": fr.collate([fr.lay_out([fr.Sample([1], [2])])] * (length // 4), length),
        "padding only": fr.collate([], length),
    }


TESTS = Path(__file__).parent.parent


def alone(*arguments):
    """The last line that a Python process of its own prints: for what may take the whole device with it."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]
