"""`fr.patch`: what must be known of a model before it is patched, and then what is done to it.

Nobody is asked for anything below this file: model/hooks.py patches whatever does not look wrong, for those who go on
to prove it (the self-test, `verify`).
"""

from functools import partial
from typing import TypeVar

from torch import nn

from flexreason.model.hooks import apply_patch
from flexreason.proof.standing import ask

Model = TypeVar("Model", bound=nn.Module)


def patch(model: Model, backend: str = "auto", mask: str = "interval", loss: str = "model") -> Model:
    """Make `model` take rows of `collate`; the same object back. Patching again changes the settings.

    `backend`: "flex" (GPU), "segments" (trains anywhere), "dense" (for comparison), or "auto". `mask`: "interval",
    or "turn_role", the paper's own rule, for rows of `lay_out_turns` layouts. `loss`: "model" leaves the head and
    its loss alone; "chunked" never holds the logits of all targets at once, and returns none. Models that cannot be
    exact are refused with the reason.

    >>> import flexreason as fr
    >>> from transformers import Qwen3Config, Qwen3ForCausalLM
    >>> model = Qwen3ForCausalLM(Qwen3Config(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2, head_dim=8))
    >>> row = fr.collate([fr.lay_out_turns([([1, 2], [10, 11], [20]), ([3], [12], [21])])])
    >>> model = fr.patch(model)
    >>> model(**row).loss.backward()
    """
    return apply_patch(model, backend, mask, loss, ask=partial(ask, backend=backend))
