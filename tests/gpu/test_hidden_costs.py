"""What a step should not pay for: compiling anew, tables of two dimensions, waiting for the device.

Where the host waits is counted on a GPU by torch itself (`set_sync_debug_mode`). A rehearsal counts the operations that
would make it wait, and compiles for the CPU, forward alone.

Shapes: S tokens.
"""

import traceback
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import metrics
from torch.utils._python_dispatch import TorchDispatchMode

import flexreason as fr
from flexreason.attention import flex
from gpu.rule import LENGTH, Cell, general_tree, on, paper, rows, warnings_allowed
from gpu.test_models import made, trained_by

pytestmark = [pytest.mark.gpu, warnings_allowed]

WAITS = 0
"""How often the host waits for the device in a step."""

LOOKED_AT_ON_A_CPU = 3
"""In a rehearsal: the loss looks at what it divides by, and the row's places are looked at twice; neither is a wait."""

WAITS_WINDOWED = 4
"""Under a window: twice to fetch the tree, and twice to send what was found of its blocks."""


def other_rows(device):
    """Rows of one length, each with another tree, and one without any."""
    trees = [*rows().values(), *(fr.collate([general_tree(seed)], LENGTH) for seed in range(1, 4))]
    return [on(row, device) for row in trees]


def compiled():
    """How often dynamo, autograd and inductor have made something."""
    return (
        counters["stats"]["unique_graphs"],
        counters["aot_autograd"]["total"],
        metrics.generated_kernel_count,
    )


def test_one_kernel_serves_every_tree_of_a_length(device, rehearsal, compiler):
    """Forward and backward are compiled once, and no row makes anything compile again."""
    counters.clear()
    made_so_far = []
    cell = Cell(limits={"window": 100})
    for seed, row in enumerate(other_rows(device)):
        tensors = cell.drawn(LENGTH, seed, device)
        with torch.set_grad_enabled(not rehearsal):
            out = flex.attend(*tensors, cell.table("flex", row), cell.scale)
        if not rehearsal:
            out.sum().backward()
        made_so_far.append(compiled())
    assert made_so_far[0][0] == made_so_far[0][1] == 1, made_so_far
    assert len(set(made_so_far)) == 1, made_so_far


def test_a_model_compiles_in_its_first_step_alone(device, rehearsal, compiler):
    """One kernel a kind of layer: Mistral's layers all have the window."""
    model = fr.patch(made("Mistral", device, torch.bfloat16), "flex")
    counters.clear()
    made_so_far = []
    for seed in range(4):
        row = on(fr.collate([paper(seed)], 640), device)
        with torch.set_grad_enabled(not rehearsal):
            loss = model(**row).loss
        if not rehearsal:
            loss.backward()
        made_so_far.append(compiled())
    assert made_so_far[0][0] == 1, made_so_far
    assert len(set(made_so_far)) == 1, made_so_far


def test_where_torch_would_fall_back_to_scores_of_s_by_s_it_raises(device, compiler, monkeypatch):
    monkeypatch.setattr(flex, "KERNELS", 1)
    row = on(rows()["packed"], device)

    def attend(size):
        with torch.no_grad():
            flex.attend(*Cell(size=size).drawn(LENGTH, 0, device), fr.block_mask(row), 0.1)

    attend(64)
    attend(64)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        attend(128)


@pytest.mark.parametrize("limits", [{}, {"window": 100}, {"chunk": 100}], ids=str)
@pytest.mark.parametrize("mask", ["interval", "turn_role"])
def test_rules_read_tables_of_one_dimension(mask, limits, device):
    """Of 32-bit integers: a table of two dimensions would run over at 46K tokens, and be as large as the scores."""
    row = on(fr.collate([paper()], LENGTH), device)
    found = list(captured(fr.block_mask(row, mask=mask, **limits).mask_mod))
    assert found
    for tensor in found:
        assert tensor.shape == (LENGTH,)
        assert tensor.dtype == torch.int32
        assert tensor.device.type == device


def captured(function):
    """All tensors that a rule holds, and those of the rules it calls."""
    for cell in function.__closure__ or ():
        value = cell.cell_contents
        if isinstance(value, torch.Tensor):
            yield value
        elif callable(value):
            yield from captured(value)


class WouldWait(TorchDispatchMode):
    """Counts operations on the CPU that on a GPU would make the host wait."""

    supports_higher_order_operators = True
    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2", "unique_dim")
    ON_CPU = ("_asked", "refuse_row", "_labels", "_to_front")
    """Functions that ask numbers which are on the CPU anyway, or ask only of rows that are."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "overloadpacket", func).__name__
        by_mask = name in ("index", "index_put_") and any(
            isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1] if x is not None
        )
        if (name in self.NAMES or by_mask) and not any(f.name in self.ON_CPU for f in traceback.extract_stack()):
            self.found.append(f"{name} at {place()}")
        return func(*args, **(kwargs or {}))


def place():
    ours = [f for f in traceback.extract_stack() if "flexreason" in f.filename or "transformers" in f.filename]
    return f"{ours[-1].filename}:{ours[-1].lineno}" if ours else "?"


@contextmanager
def waits(device):
    """Where the host waits for the device in here, as it happens."""
    found = []
    if device == "cpu":
        with WouldWait(found):
            yield found
        return
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [f"{w.filename}:{w.lineno}" for w in said if "synchronizing" in str(w.message)]


def waits_of_a_step(family, backend, n_layers, device, rehearsal):
    """Forward and backward, of a row not seen before, on a model that has compiled all it needs."""
    forward_only = rehearsal and backend == "flex"
    model = fr.patch(made(family, device, torch.bfloat16, num_hidden_layers=n_layers), backend)
    for seed in range(2):
        row = on(fr.collate([paper(seed)], 640), device)
        with waits(device) as found, torch.set_grad_enabled(not forward_only):
            loss = model(**row).loss
            if not forward_only:
                loss.backward()
    return found


@pytest.mark.parametrize(("family", "expected"), [("Qwen3", WAITS), ("Mistral", WAITS_WINDOWED)])
def test_how_often_the_host_waits_for_flex_however_many_layers(family, expected, device, rehearsal):
    few, many = (waits_of_a_step(family, "flex", n_layers, device, rehearsal) for n_layers in (1, 3))
    assert len(few) == len(many), (few, many)
    if family == "Qwen3" or not rehearsal:  # on a CPU nobody can tell what of a window is made on the host
        assert len(few) == expected + rehearsal * LOOKED_AT_ON_A_CPU, few


def test_the_host_waits_for_segments_as_often_however_many_layers(device, rehearsal):
    few, many = (waits_of_a_step("Qwen3", trained_by("segments", rehearsal), n, device, rehearsal) for n in (1, 3))
    assert few
    assert len(few) == len(many), (few, many)
