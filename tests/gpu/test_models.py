"""Whole models, tiny ones of real families, in one pass against the N samples: loss, log-probabilities, gradients.

In fp64 to 1e-9 (backends segments and dense: flex has no fp64), in bf16 and fp32 by the rule of 1.5 (rule.py) against
the samples in the same dtype. Heads have 32 entries, since a kernel's products take no fewer than 16.

A rehearsal has one seed, and what would train with flex trains with segments: it shows nothing about kernels.
"""

import copy

import pytest
import torch

import flexreason as fr
from exact import EXACT, errors, samples_of, single_pass
from flexreason.attention.registry import BACKENDS
from flexreason.proof import oracle
from flexreason.proof.float64 import relative_l2, true_float64
from gpu.rule import FACTOR, general_tree, hold_errors, on, paper, warnings_allowed
from models import tiny
from strategies import random_tree

pytestmark = [pytest.mark.gpu, warnings_allowed]

SIZES = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 96}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 16}  # all of them: no choice to flip
FAMILIES = {
    "Qwen3": {},
    "Llama": {},
    "Mistral": {"sliding_window": 40},
    "Gemma2": {
        "sliding_window": 40,
        "query_pre_attn_scalar": 32,
        "attn_logit_softcapping": 2.0,
        "attn_implementation": "eager",  # transformers 5.17 would take sdpa, which has no softcap, without a word
    },
    "GptOss": {"sliding_window": 40, "num_local_experts": 4, "num_experts_per_tok": 4, "pad_token_id": 0},
    "Qwen3Moe": EXPERTS,
    "Phi3": {"hidden_size": 128, "pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 0},
}
LENGTH = 1024


def made(family, device, dtype, seed=0, **config):
    model = tiny(family, seed, **{**SIZES, **FAMILIES[family], **config})
    if "Moe" in family or family == "GptOss":
        model.set_experts_implementation("eager")  # grouped matrix products take no float64
    return model.to(device, dtype)


def trained_by(backend, rehearsal):
    """flex does not train on CPU."""
    return "segments" if rehearsal and backend == "flex" else backend


def packed(device, seed=0):
    return [layout.to(device) for layout in (fr.lay_out(random_tree(seed)), paper(seed), general_tree(seed, 5))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ["segments", "dense"])
def test_in_fp64_one_pass_is_the_samples(family, backend, device):
    found = errors(made(family, device, torch.float64), packed(device), LENGTH, backend=backend)
    assert max(found.values()) <= EXACT, found


def hold_model(low, layouts, expected_low, right, backend, found):
    """Add one seed's errors to `found`: for every name (ours, the samples')."""
    fr.patch(low, backend)
    try:
        loss, logprobs, gradients = single_pass(low, fr.collate(layouts, LENGTH))
    finally:
        fr.unpatch(low)
    n, wanted = right.n_targets, right.gradients
    assert loss.isfinite()
    assert gradients.keys() == wanted.keys()
    ours = [gradients[name] * n for name in wanted]
    pair = [relative_l2(x, wanted.values()) for x in (ours, expected_low.gradients.values())]
    found.setdefault("gradients", []).append(pair)
    wanted = [torch.cat(right.logprobs)]
    pair = [relative_l2(x, wanted) for x in ([logprobs], [torch.cat(expected_low.logprobs)])]
    found.setdefault("logprobs", []).append(pair)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "n_seeds"), [(torch.bfloat16, 8), (torch.float32, 3)], ids=str)
def test_one_pass_errs_no_more_than_the_samples_do(family, dtype, n_seeds, device, rehearsal):
    """Every seed has its own weights and its own tree; in fp32, where errors scatter less, three are enough."""
    found = {"flex": {}, "segments": {}}
    for seed in range(1 if rehearsal else n_seeds):
        low = made(family, device, dtype, seed)
        layouts = [paper(seed).to(device)]
        with true_float64():
            right = oracle.n_samples(copy.deepcopy(low).double(), samples_of(layouts))
        theirs = oracle.n_samples(low, samples_of(layouts))
        for backend in found:
            hold_model(low, layouts, theirs, right, trained_by(backend, rehearsal), found[backend])
    for backend, pairs in found.items():
        print(backend)
        hold_errors(pairs, dtype, FACTOR)


@pytest.mark.parametrize("family", ["Qwen3", "Gemma2"])
def test_flex_forward_is_dense_in_packed_and_padded_rows(family, device):
    """Log-probabilities alone, which flex gives on CPUs too, of rows with much and with little padding."""
    model = made(family, device, torch.float32)
    for layouts, length in ((packed(device), 1024), ([paper().to(device)], 1024), ([paper().to(device)], 640)):
        row = fr.collate(layouts, length)
        with torch.no_grad():
            found, expected = (fr.patch(model, backend)(**row).logits for backend in ("flex", "dense"))
        assert relative_l2([found], [expected]) <= 1e-5


@pytest.mark.parametrize("backend", ["flex", "segments"])
def test_the_loss_in_chunks_and_token_logprobs_are_the_models_own(backend, device, rehearsal):
    backend = trained_by(backend, rehearsal)
    model, row = made("Gemma2", device, torch.float32), fr.collate(packed(device), LENGTH)
    loss, logprobs, gradients = single_pass(fr.patch(model, backend), row)
    real = row["labels"][0] != -100
    model.zero_grad()
    found = fr.token_logprobs(model, row)
    assert relative_l2([found[real]], [logprobs]) <= 1e-5
    assert not found[~real].any()
    (-found.sum() / real.sum()).backward()
    assert relative_l2([p.grad for p in model.parameters()], gradients.values()) <= 1e-5
    model.zero_grad()
    chunked = fr.patch(model, backend, loss="chunked")(**row).loss
    chunked.backward()
    assert chunked.item() == pytest.approx(loss.item(), rel=1e-5)
    assert relative_l2([p.grad for p in model.parameters()], gradients.values()) <= 1e-5


@pytest.mark.parametrize("backend", ["flex", "segments"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_verify_says_exact(backend, dtype, device, rehearsal):
    model = fr.patch(made("Qwen3", device, dtype), trained_by(backend, rehearsal))
    report = fr.verify(model, [paper(), fr.lay_out(random_tree())])
    assert report.verdict == "exact", report


def test_auto_is_flex_on_a_gpu_and_gradients_of_an_empty_row_are_nothing(device, rehearsal, monkeypatch):
    asked = []
    for name, backend in BACKENDS.items():
        plain = backend.attend
        monkeypatch.setattr(
            backend, "attend", lambda *args, name=name, plain=plain, **more: asked.append(name) or plain(*args, **more)
        )
    model = fr.patch(made("Qwen3", device, torch.bfloat16))
    out = model(**on(fr.collate([], LENGTH), device))
    out.loss.backward()
    assert asked == ["segments" if rehearsal else "flex"] * model.config.num_hidden_layers
    assert out.loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
