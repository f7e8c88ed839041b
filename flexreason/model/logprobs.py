"""`token_logprobs`: the log-probability of every target of a row, in one pass, for evaluation and for RL.

It calls a patched model, as a trainer does, and nothing of what is done to a model needs it: so it stands beside
hooks.py.
"""

import math
from collections.abc import Mapping

from torch import Tensor, nn

from flexreason.model.hooks import find_patch
from flexreason.model.loss import REQUEST, Request
from flexreason.model.refuse import refuse_unchunked


def token_logprobs(model: nn.Module, row: Mapping[str, Tensor], *, temperature: float = 1.0) -> Tensor:
    """[T] log-probabilities, aligned with `row["target_turn"][0]` and `row["target_document"][0]`.

    With a gradient unless under `torch.no_grad()`. Never more logits at a time than one chunk's. The model's soft
    cap and logit scale are in them; `temperature` divides the logits after these. Targets that fill the row up (label
    -100) have 0.

    >>> import flexreason as fr
    >>> from transformers import Qwen3Config, Qwen3ForCausalLM
    >>> model = fr.patch(Qwen3ForCausalLM(Qwen3Config(vocab_size=40, hidden_size=32, intermediate_size=48,
    ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)))
    >>> row = fr.collate([fr.lay_out_turns([([1, 2], [10, 11], [20]), ([3], [12], [21])])])
    >>> logprobs = token_logprobs(model, row)
    >>> first_turn = logprobs[row["target_turn"][0] == 0]  # of reasoning 10 11, and response 20
    >>> len(first_turn)
    3
    """
    patch = find_patch(model)
    if patch is None:
        raise ValueError("token_logprobs: the model is not patched; call fr.patch(model) first")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"token_logprobs: expected a temperature above 0, found {temperature}")
    missing = sorted({"labels", "shift_labels"} - row.keys())
    if missing:
        raise ValueError(f"token_logprobs: the row lacks {', '.join(missing)}; pass all that fr.collate made")
    refuse_unchunked(patch.root, "token_logprobs", patch.unchunked)
    request = Request(loss=False, temperature=temperature)
    nothing = model(**row, **{REQUEST: request}).loss
    logprobs, request.logprobs = request.logprobs, None  # layers that are checkpointed keep the request for backward
    if logprobs is None:
        raise ValueError(
            f"token_logprobs: the keyword {REQUEST} did not come to the model's loss; what holds the model "
            f"({type(model).__name__}) is to hand all keywords on; call it on the model inside"
        )
    return logprobs + nothing  # so that backward passes what came out of the model, where DDP and FSDP look for it
