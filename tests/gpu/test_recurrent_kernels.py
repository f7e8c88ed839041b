"""What is used of the kernels for recurrent layers, where they are installed: a state to begin from for each row of a
batch, the last state back, gradients of both, and places that leave a state as it is. Held against the definitions."""

import pytest
import torch

import scans
from gpu.rule import warnings_allowed

pytestmark = [pytest.mark.gpu, warnings_allowed]

SHAPE = {"rows": 3, "tokens": 70, "heads": 4, "size": 64}
CLOSE = {"rtol": 2e-2, "atol": 2e-2}  # kernels multiply in tf32 or bf16


def numbers(device, *shape, seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, device=device, generator=generator).requires_grad_()


def held(kernel, defined, inputs, weights):
    """Outputs, last states and gradients of all inputs are those of the definition."""
    found, expected = (function(*inputs) for function in (kernel, defined))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.float(), b.float(), **CLOSE)
    gradients = [
        torch.autograd.grad(sum((o.float() * w).sum() for o, w in zip(out, weights, strict=True)), inputs)
        for out in (found, expected)
    ]
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= 2e-2 * b.norm()


@pytest.mark.parametrize("gate", ["a head", "a channel"])
def test_delta_rules_go_on_from_a_state_for_each_row(gate, device):
    ops = pytest.importorskip("fla.ops")
    rows, tokens, heads, size = SHAPE.values()
    q, k, v = (numbers(device, rows, tokens, heads, size, seed=seed) for seed in range(3))
    gates = (rows, tokens, heads) if gate == "a head" else (rows, tokens, heads, size)
    g = (-numbers(device, *gates, seed=3).detach().exp()).requires_grad_()
    beta = numbers(device, rows, tokens, heads, seed=4).detach().sigmoid().requires_grad_()
    state = numbers(device, rows, heads, size, size, seed=5)
    n_tokens = torch.tensor([tokens, 13, 1], device=device)
    real = (torch.arange(tokens, device=device) < n_tokens[:, None])[..., None]
    function = ops.chunk_gated_delta_rule if gate == "a head" else ops.chunk_kda

    def kernel(q, k, v, g, beta, state, function=function):
        neutral = g * (real if g.dim() == 3 else real[..., None])
        made = function(
            q, k, v, g=neutral, beta=beta * real, initial_state=state, output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        return made[0] * real[..., None], made[1]

    def defined(*inputs):
        return kernel(*inputs, function=scans.delta_rule)

    weights = numbers(device, rows, tokens, heads, size, seed=6), numbers(device, rows, heads, size, size, seed=7)
    held(kernel, defined, [q, k, v, g, beta, state], [w.detach() for w in weights])


def test_mamba2_goes_on_from_a_state_for_each_row(device):
    module = pytest.importorskip("mamba_ssm.ops.triton.ssd_combined")
    rows, tokens, heads, size = SHAPE.values()
    x = numbers(device, rows, tokens, heads, size)
    dt = numbers(device, rows, tokens, heads, seed=1).detach().exp().requires_grad_()
    A = (-numbers(device, heads, seed=2).detach().exp()).requires_grad_()
    B, C = (numbers(device, rows, tokens, 2, 16, seed=seed) for seed in (3, 4))
    state = numbers(device, rows, heads, size, 16, seed=5)
    n_tokens = torch.tensor([tokens, 13, 1], device=device)
    real = (torch.arange(tokens, device=device) < n_tokens[:, None])[..., None]

    def kernel(x, dt, A, B, C, state, function=module.mamba_chunk_scan_combined):
        made = function(x, dt * real, A, B, C, 16, initial_states=state, return_final_states=True)
        return made[0] * real[..., None], made[1]

    def defined(*inputs):
        return kernel(*inputs, function=scans.mamba2)

    weights = numbers(device, rows, tokens, heads, size, seed=6), numbers(device, rows, heads, size, 16, seed=7)
    held(kernel, defined, [x, dt, A, B, C, state], [w.detach() for w in weights])


@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.3, 1.2)])
def test_mamba2_takes_bias_then_softplus_then_limits(limit, device):
    """As samples hand it dt. For rows all of it is done before: see the next test."""
    module = pytest.importorskip("mamba_ssm.ops.triton.ssd_combined")
    rows, tokens, heads, size = SHAPE.values()
    x, dt = numbers(device, rows, tokens, heads, size), numbers(device, rows, tokens, heads, seed=1)
    A = (-numbers(device, heads, seed=2).detach().exp()).requires_grad_()
    B, C = (numbers(device, rows, tokens, 2, 16, seed=seed) for seed in (3, 4))
    bias, state = numbers(device, heads, seed=5), numbers(device, rows, heads, size, 16, seed=6)

    def of(function):
        def call(x, dt, A, B, C, bias, state):
            given = {"dt_bias": bias, "dt_softplus": True, "dt_limit": limit}
            return function(x, dt, A, B, C, 16, **given, initial_states=state, return_final_states=True)

        return call

    weights = numbers(device, rows, tokens, heads, size, seed=7), numbers(device, rows, heads, size, 16, seed=8)
    inputs = [x, dt, A, B, C, bias, state]
    held(of(module.mamba_chunk_scan_combined), of(scans.mamba2), inputs, [w.detach() for w in weights])


def test_a_limit_from_below_makes_a_step_of_a_place_that_holds_no_token(device):
    """Why limits are not left to the kernel: no dt that it could be handed is neutral."""
    module = pytest.importorskip("mamba_ssm.ops.triton.ssd_combined")
    rows, tokens, heads, size = SHAPE.values()
    x, A = numbers(device, rows, tokens, heads, size), -torch.ones(heads, device=device)
    B, C = (numbers(device, rows, tokens, 2, 16, seed=seed) for seed in (3, 4))
    nothing = torch.full((rows, tokens, heads), -torch.inf, device=device)
    begun = numbers(device, rows, heads, size, 16, seed=5)
    given = {"initial_states": begun, "return_final_states": True}
    of_limit = {"dt_softplus": True, "dt_limit": (0.1, float("inf"))}
    behind = module.mamba_chunk_scan_combined(x, nothing, A, B, C, 16, **of_limit, **given)[1]
    assert (behind - begun).norm() > 0.1 * begun.norm()
    behind = module.mamba_chunk_scan_combined(x, torch.zeros_like(nothing), A, B, C, 16, **given)[1]
    torch.testing.assert_close(behind.float(), begun.detach(), **CLOSE)


def test_convolutions_of_rows_of_a_batch_begin_from_zeros(device):
    convolution = pytest.importorskip("causal_conv1d").causal_conv1d_fn
    inputs = [numbers(device, 3, 64, 70), numbers(device, 64, 4, seed=1), numbers(device, 64, seed=2)]

    def of(function):
        return lambda *given: (function(*given, activation="silu"),)

    held(of(convolution), of(scans.convolution), inputs, [numbers(device, 3, 64, 70, seed=3).detach()])
