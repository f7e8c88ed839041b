"""Scans through a tree, by the model's own functions: the delta rules (GDN, KDA) and Mamba-2.

Each takes what the function of that name takes, and hands it a call's pieces at a time, with the states that they go
on from. The function is the model's own, whatever it is by now: transformers' torch code, or the kernel that
transformers found installed. Places that hold no token must leave a state as it is:

- a delta rule multiplies the state by exp(g) and writes beta times a difference: both are 0 there;
- Mamba-2 multiplies it by exp(dt A) and adds dt times something: dt is 0 there. That holds of dt as it is used, so the
  bias, softplus and limits are applied here: a limit from below would make a step of every place.
"""

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from flexreason.attention.registry import TreeRow
from flexreason.recurrent.decay import decayed
from flexreason.recurrent.plan import Call, scan

DELTA_CHUNK = 64
"""What transformers takes where nothing is said."""


def delta_rule(
    stock: Callable,
    tree: TreeRow,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = DELTA_CHUNK,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The gated delta rule, with a gate a head (GDN) or a gate a channel (KDA)."""
    _refuse_states(initial_state, output_final_state)

    def step(call: Call, state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Any:
        return stock(
            q,
            k,
            v,
            g=call.neutral(g),
            beta=call.neutral(beta),
            chunk_size=call.chunk(chunk_size, v.device),
            initial_state=state,
            output_final_state=bool(call.kept),
            **kwargs,
        )

    return scan(tree, (query, key, value, g, beta), step), None


def mamba2(
    stock: Callable,
    tree: TreeRow,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    **kwargs: Any,
) -> Tensor:
    """Mamba-2's state space model."""
    _refuse_states(initial_states, return_final_states)
    dt = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)

    in_torch = is_torch(stock, "mamba_ssm")

    def step(call: Call, states: Tensor | None, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Any:
        dt, chunk, final = call.neutral(dt), call.chunk(chunk_size, x.device), bool(call.kept)
        if in_torch:
            return mamba2_in_torch(x, dt, A, B, C, states, chunk, final, **kwargs)
        out = stock(x, dt, A, B, C, chunk_size=chunk, initial_states=states, return_final_states=final, **kwargs)
        return out if final else (out, None)

    return scan(tree, (hidden_states, dt, B, C), step)


def is_torch(stock: Callable, package: str) -> bool:
    """Whether a function is transformers' torch code: it found no kernels, and nobody put others in their place."""
    return importlib.util.find_spec(package) is None and inspect.unwrap(stock).__module__.startswith("transformers.")


def mamba2_in_torch(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    states: Tensor | None,
    chunk: int,
    final: bool,
    D: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers' torch code computes. For backward that keeps two states a chunk and two more a call: here one
    a chunk is kept, and none that nothing goes on from."""
    x, heads = x.float(), (B.shape[2], -1)
    written, decay = (part.unflatten(2, heads) for part in (x * dt[..., None], dt * A))
    out, behind = decayed(C.float(), B.float(), written, decay, states, chunk, final)
    return out.flatten(2, 3) if D is None else out.flatten(2, 3) + D[:, None] * x, behind


def _refuse_states(initial: Tensor | None, final: bool) -> None:
    if initial is not None or final:
        raise ValueError("row: it came with states of recurrent layers; a row is whole in itself; leave them out")
