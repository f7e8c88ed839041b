"""Recurrences as they are defined, a token at a time: what kernels promise of the arguments that are used of them."""

import torch
from torch import nn


def delta_rule(query, key, value, g, beta, initial_state=None, output_final_state=False, **kwargs):
    """The gated delta rule [B, L, H, D] with a gate a head, or a gate a channel; from a state for each row."""
    assert not {"cu_seqlens", "seq_idx"} & {name for name, given in kwargs.items() if given is not None}
    group = value.shape[2] // key.shape[2]
    q = nn.functional.normalize(query, dim=-1).repeat_interleave(group, 2) * query.shape[-1] ** -0.5
    k = nn.functional.normalize(key, dim=-1).repeat_interleave(group, 2)
    decay = (g if g.dim() == 4 else g[..., None]).exp()
    state = value.new_zeros(*k[:, 0].shape, value.shape[-1]) if initial_state is None else initial_state
    outputs = []
    for t in range(q.shape[1]):
        state = state * decay[:, t, :, :, None]
        change = (value[:, t] - torch.einsum("bhd,bhde->bhe", k[:, t], state)) * beta[:, t, :, None]
        state = state + torch.einsum("bhd,bhe->bhde", k[:, t], change)
        outputs.append(torch.einsum("bhd,bhde->bhe", q[:, t], state))
    return torch.stack(outputs, 1), state if output_final_state else None


def mamba2(
    x, dt, A, B, C, chunk_size, D=None, dt_bias=None, dt_softplus=False, dt_limit=(0.0, float("inf")),
    initial_states=None, return_final_states=False, seq_idx=None, **kwargs,
):  # fmt: skip
    """Mamba-2 [B, L, H, P]: bias, then softplus, then limits make dt; from a state for each row, [B, H, P, N].

    The chunk is a matter of speed, and `z` a gate that no model leaves to it.
    """
    assert seq_idx is None
    assert kwargs.get("z") is None
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (nn.functional.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    B, C = (part.repeat_interleave(x.shape[2] // part.shape[2], 2) for part in (B, C))
    state = x.new_zeros(*x[:, 0].shape, B.shape[-1]) if initial_states is None else initial_states
    outputs = []
    for t in range(x.shape[1]):
        state = state * (dt[:, t] * A).exp()[..., None, None]
        state = state + torch.einsum("bhp,bhn->bhpn", x[:, t] * dt[:, t, :, None], B[:, t])
        out = torch.einsum("bhpn,bhn->bhp", state, C[:, t])
        outputs.append(out if D is None else out + D[:, None] * x[:, t])
    out = torch.stack(outputs, 1)
    return (out, state) if return_final_states else out


def convolution(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None, **kwargs):
    """A short convolution [B, D, L] by channel: a token and the ones before it, zeros before the first."""
    assert seq_idx is None
    assert initial_states is None
    width = weight.shape[-1]
    padded = nn.functional.pad(x, (width - 1, 0))
    out = sum(weight[:, k, None] * padded[:, :, k : k + x.shape[2]] for k in range(width))
    out = out if bias is None else out + bias[:, None]
    return nn.functional.silu(out) if activation in ("silu", "swish") else out
