"""The state in which the tests on a GPU run: no TF32, nothing compiled before, no memory left over."""

import gc

import pytest
import torch

from flexreason import patching
from flexreason.attention import flex
from flexreason.proof.evidence import Evidence
from gpu.rule import forget_compiled


@pytest.fixture(autouse=True)
def plain_float32(device):
    """Matrix products of fp32 in fp32, in flex's kernels too; a test that asks for TF32 says so itself."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(autouse=True)
def no_questions(monkeypatch):
    """Models are patched without the self-test, which is a matter of CPUs and would take seconds a family: here every
    one of them is held to its samples."""
    monkeypatch.setattr(patching, "evidence_of_model", lambda root, backend: Evidence("exact", None, ""))


@pytest.fixture(autouse=True, scope="module")
def nothing_left_over():
    """One file after the other: neither compiled code nor memory of one weighs on the next."""
    forget_compiled()
    yield
    forget_compiled()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def flex_without_compiler(request, monkeypatch):
    """In a rehearsal flex runs operation by operation, unless a test is about compiling: a kernel takes a compiler for
    CPUs half a minute. It ignores the block lists then, which tests/test_attention.py holds to account on CPUs."""
    if request.config.getoption("--rehearse") and "compiler" not in request.fixturenames:
        monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        monkeypatch.setattr(flex, "_compiled", lambda: flex.flex_attention)


@pytest.fixture
def compiler():
    """A test that names this compiles in rehearsals too, and begins with nothing compiled."""
    forget_compiled()
    yield
    forget_compiled()
