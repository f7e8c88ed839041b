"""`fr.patch` and `fr.unpatch`: an ordinary Hugging Face model takes rows, or is refused with the reason."""

from typing import TypeVar

from torch import nn

from flexreason.model.hooks import apply_patch, find_root, refuse_settings, unpatch
from flexreason.model.refuse import refusal, refuse_model
from flexreason.proof.evidence import evidence_of_model

__all__ = ["patch", "unpatch"]

Model = TypeVar("Model", bound=nn.Module)


def patch(model: Model, backend: str = "auto", mask: str = "interval", loss: str = "model") -> Model:
    """Make `model` take rows of `collate`; the same object back. Patching again changes the settings.

    Models that cannot be exact are refused with the reason.

    Args:
        model: a transformers model with an LM head, or what wraps one (PEFT, compile, DDP).
        backend: "flex" (GPU), "segments" (trains anywhere), "dense" (for comparison), or "auto".
        mask: "interval", or "turn_role", the paper's own rule, for rows of `lay_out_turns` layouts.
        loss: "model" leaves the head and its loss alone; "chunked" never holds the logits of all targets at once, and
            returns none.

    >>> import flexreason as fr
    >>> from transformers import Qwen3Config, Qwen3ForCausalLM
    >>> model = Qwen3ForCausalLM(Qwen3Config(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2, head_dim=8))
    >>> row = fr.collate([fr.lay_out_turns([([1, 2], [10, 11], [20]), ([3], [12], [21])])])
    >>> model = fr.patch(model)
    >>> model(**row).loss.backward()
    """
    # What a look is enough to refuse.
    refuse_settings(backend, mask, loss)
    root = find_root(model)
    unpatch(root)
    refuse_model(root, model)

    # What must have been tried to be known: by the list of classes, by a test of a tiny model, or by `fr.verify`.
    evidence = evidence_of_model(root, backend)
    if evidence.against is not None:
        raise refusal(root, evidence.against)

    return apply_patch(model, backend, mask, loss, evidence.unchunked)
