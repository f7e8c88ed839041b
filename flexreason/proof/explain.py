"""What is special about a model, and why one pass over a row is not the samples' on it, in words."""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from flexreason.attention.registry import TreeRow, find_decoder
from flexreason.model.refuse import rope_settings, rope_types
from flexreason.recurrent.entries import KINDS, names_of

IN_STORAGE = {  # what modules are called that look at neighbours in storage, past any mask
    "indexer": "a token indexer, which picks keys by scores of its own, past the tree's mask",
    "compressor": "compressed keys, which join neighbours in storage",
    "lightning": "linear attention, which carries state from token to token",
    "conv1d": "a convolution over neighbours in storage",
    "shortconv": "a convolution over neighbours in storage",
}


@dataclass
class Notes:
    """What is seen on the way."""

    special: list[str]
    reached: bool = False  # whether any attention of the model came to ours
    unchunked: str = ""  # why loss="chunked" is not the samples'

    def add(self, word: str) -> None:
        if word not in self.special:
            self.special.append(word)


def said(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def cause_of(model: PreTrainedModel, notes: Notes, symptom: str) -> str:
    """The symptom, and what the model has that would explain it."""
    for module in model.modules():
        kind = type(module).__name__
        if hasattr(module, "create_position_ids_from_input_ids"):
            return f"it counts positions from behind its padding id ({kind}): {symptom}"
        for word, meaning in IN_STORAGE.items():
            if word in kind.lower() and kind != "Conv1D":  # which is a linear layer
                return f"it has {meaning} ({kind}): {symptom}"
    if not (notes.reached or type(model)._can_set_attn_implementation()):
        return "it has attention code of its own, which no mask of ours reaches"
    if symptom.startswith(OURS):  # one of our own refusals, which says why
        return symptom.removeprefix(OURS)
    if "Asked" in symptom:
        return f"it makes more of its mask than a mask, and rows have none ({symptom})"
    if "position_ids" not in inspect.signature(find_decoder(model).forward).parameters:
        return f"it takes no positions, and counts places in storage: {symptom}"
    return symptom


OURS = "ValueError: row: "


@contextmanager
def noting(notes: Notes) -> Iterator[None]:
    """Write down what layers ask of attention while a row is on its way."""
    plain = TreeRow.attend

    def attend(self: TreeRow, q: Tensor, k: Tensor, v: Tensor, scale: float, **limits: Any) -> Tensor:
        notes.reached = True
        for key in ("window", "chunk", "softcap", "sinks"):
            if limits.get(key) is not None:
                notes.add(key)
        if q.shape[-1] != v.shape[-1]:
            notes.add("values and keys differ in head size")
        return plain(self, q, k, v, scale, **limits)

    TreeRow.attend = attend  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        TreeRow.attend = plain  # type: ignore[method-assign]


NOTED = {  # by what configs call it, where it is set
    "final_logit_softcapping": "final softcap",
    "logit_scale": "logit scale",
    "logits_scaling": "logit scale",
    "num_kv_shared_layers": "layers that share keys",
    "hidden_size_per_layer_input": "per-layer embeddings",
    "kv_lora_rank": "MLA",
    "attn_temperature_tuning": "temperature by position",
    "num_nextn_predict_layers": "multi-token prediction, left alone",
    "num_mtp_layers": "multi-token prediction, left alone",
}


def describe(model: nn.Module) -> list[str]:
    """What is special about a model, as far as its config and the names of its parts say."""
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    special = [meaning for key, meaning in NOTED.items() if getattr(config, key, None)]
    called = {name for module in model.modules() for name in names_of(module)}
    special += [kind for name, kind in KINDS.items() if name in called]
    names = {type(module).__name__.lower() for module in model.modules()}
    if any("expert" in name or "moe" in name for name in names):
        special.append("MoE")
    if any(re.search(r"\.(q_norm|k_norm|q_layernorm|qk_norm|query_layernorm)$", n) for n, _ in model.named_modules()):
        special.append("QK-norm")
    if any((part.get("partial_rotary_factor") or 1) != 1 for part in (vars(config), *rope_settings(config))):
        special.append("partial rotary")
    if any(not rope for rope in getattr(config, "no_rope_layers", None) or ()):
        special.append("NoPE layers")
    special += [f"RoPE {kind}" for kind in sorted(rope_types(config) - {"default"})]
    return list(dict.fromkeys(special))
