"""Gradient checkpointing, torch.compile of the whole model and autocast: the gradients of a plain step, or the rule.

A rehearsal trains with segments in place of flex, and traces where a GPU would compile.
"""

import copy

import pytest
import torch

import flexreason as fr
from exact import samples_of, single_pass
from flexreason.attention.registry import BACKENDS
from flexreason.proof import oracle
from flexreason.proof.float64 import relative_l2, true_float64
from gpu.rule import paper, warnings_allowed
from gpu.test_models import made, trained_by
from models import checkpoint

pytestmark = [pytest.mark.gpu, warnings_allowed]

LENGTH = 640


def close(found, expected, tolerance=1e-5):
    assert found[0].item() == pytest.approx(expected[0].item(), rel=tolerance)
    assert relative_l2([found[1]], [expected[1]]) <= tolerance
    ours = {name.removeprefix("_orig_mod."): gradient for name, gradient in found[2].items()}
    assert ours.keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        assert relative_l2([ours[name]], [gradient]) <= tolerance, name


def step(model, row):
    loss, logprobs, gradients = single_pass(model, row)
    return loss, logprobs, {name: gradient.clone() for name, gradient in gradients.items()}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backend", ["flex", "segments"])
@pytest.mark.parametrize("family", ["Qwen3", "GptOss"])
def test_gradient_checkpointing_changes_nothing(family, backend, reentrant, device, rehearsal):
    model = fr.patch(made(family, device, torch.float32), trained_by(backend, rehearsal)).train()
    row = fr.collate([paper().to(device)], LENGTH)
    expected = step(model, row)
    checkpoint(model, reentrant)
    close(step(model, row), expected)


@pytest.mark.parametrize(
    ("family", "backend", "checkpointing"),
    [("Qwen3", "flex", False), ("Qwen3", "flex", True), ("Gemma2", "flex", False), ("Qwen3", "segments", False)],
)
def test_a_compiled_model_has_the_same_gradients(family, backend, checkpointing, device, rehearsal, compiler):
    """And compiles nothing for other trees of the same length, with as many targets. Segments stay out of what is
    compiled, so that tracing shows all there is to show."""
    model = fr.patch(made(family, device, torch.float32), trained_by(backend, rehearsal)).train()
    if checkpointing:
        checkpoint(model)
    rows = [fr.collate([paper(seed).to(device)], LENGTH) for seed in range(3)]
    expected = [step(model, row) for row in rows]
    compiled = torch.compile(model, backend="aot_eager" if rehearsal or backend == "segments" else "inductor")
    torch._dynamo.utils.counters.clear()
    graphs = set()
    for row, wanted in zip(rows, expected, strict=True):
        close(step(compiled, row), wanted, 1e-4)
        graphs.add(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(graphs) == 1, graphs


@pytest.mark.parametrize("backend", ["flex", "segments"])
def test_under_autocast_attention_is_in_bf16_and_errs_no_more_than_the_samples(backend, device, rehearsal, monkeypatch):
    """Weights in fp32, and norms behind the projections, which leave q and k in fp32: attention gets bf16 all the same.

    One seed for its dtypes, four for the rule.
    """
    backend = trained_by(backend, rehearsal)
    seen, plain = [], BACKENDS[backend].attend
    monkeypatch.setattr(
        BACKENDS[backend],
        "attend",
        lambda q, k, v, *args, **more: seen.append({q.dtype, k.dtype, v.dtype}) or plain(q, k, v, *args, **more),
    )
    ratios = []
    for seed in range(1 if rehearsal else 4):
        model = made("Qwen3", device, torch.float32, seed)
        layouts = [paper(seed).to(device)]
        with true_float64():
            right = oracle.n_samples(copy.deepcopy(model).double(), samples_of(layouts))
        with torch.autocast(device, torch.bfloat16):
            theirs = oracle.n_samples(model, samples_of(layouts))
            _, _, gradients = single_pass(fr.patch(model, backend), fr.collate(layouts, LENGTH))
        ours = [gradients[name] * right.n_targets for name in right.gradients]
        wanted = right.gradients.values()
        ratios.append(relative_l2(ours, wanted) / relative_l2(theirs.gradients.values(), wanted))
    assert all(dtypes == {torch.bfloat16} for dtypes in seen), seen
    assert seen
    assert sorted(ratios)[len(ratios) // 2] <= 1.5, ratios
