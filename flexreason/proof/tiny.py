"""A tiny model of the same structure as a large one: its config with all sizes cut, and random weights.

What a row could get wrong is in a config's structure: kinds of layers, windows, how RoPE is scaled, experts, what
is shared or capped. All of that stays; sizes.py says what becomes small.
"""

import re
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from flexreason.proof.sizes import shrunk

LARGEST = 3_000_000
"""Parameters. What is larger has sizes under names that are not known here."""

NOT_STRUCTURE = (  # what a config says about storing and calling a model; refused or handled elsewhere
    *("dtype", "torch_dtype", "quantization_config", "auto_map", "transformers_version"),
    *("output_router_logits", "output_hidden_states", "output_attentions", "return_dict"),
)


def shrink(config: PreTrainedConfig, every_layer: bool = False) -> PreTrainedConfig:
    """A tiny config of the same class and structure.

    Args:
        every_layer: keep as many layers as there are, for classes that may make any of them otherwise by its number.

    >>> from transformers import Qwen3Config
    >>> small = shrink(Qwen3Config())
    >>> small.num_hidden_layers, small.num_attention_heads, small.num_key_value_heads, small.head_dim
    (2, 4, 4, 16)
    """
    fields = config.to_dict()
    for key in NOT_STRUCTURE:
        fields.pop(key, None)
    return type(config).from_dict(shrunk(fields, every_layer))


def build(config: PreTrainedConfig, cls: type[PreTrainedModel] | None = None, seed: int = 0) -> PreTrainedModel:
    """A model of a small config, with weights so large that leaving something out shows."""
    cls = cls or class_of(config)
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters are left when all sizes that are known here are cut")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config)
        randomise(model)
    if getattr(model.config, "_experts_implementation", None) is not None:
        model.set_experts_implementation("eager")  # grouped matrix products take no float64
    return model.eval()


def class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The causal language model of a config: the one it names, else transformers' own choice."""
    names = [*(config.architectures or ()), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)]
    for name in names:
        if name and hasattr(transformers, name) and is_causal(name):
            return getattr(transformers, name)
    raise ValueError(f"transformers has no causal language model for {type(config).__name__}; use a decoder-only one")


def default_config(cls: type[PreTrainedModel]) -> PreTrainedConfig:
    """The config that a class has by default, as a causal model where it can also be another kind."""
    config_class: Any = cls.config_class
    config = config_class(**UNSET.get(config_class.__name__, {}))
    if getattr(config, "is_decoder", True) is False:
        config.is_decoder = True
    return config


def is_causal(name: str) -> bool:
    return name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or name.endswith("ForCausalLM")


def causal_classes() -> list[str]:
    """All names of causal language models that transformers has, once each."""
    names = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *(n for n in dir(transformers) if n.endswith("ForCausalLM"))}
    return sorted(
        name
        for name in names
        if not name.startswith("AutoModel") and getattr(getattr(transformers, name, None), "config_class", None)
    )


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Weights of decent size everywhere, also where a model begins with ones, zeros, or nothing at all."""
    for name, p in model.named_parameters():
        if not p.is_floating_point():
            continue
        if p.dim() > 1:
            p.normal_(0, 0.2)
        elif re.search(r"bias|sink", name.rpartition(".")[2]) or not p.isfinite().all():
            p.normal_(0, 0.5)
        else:
            p.add_(torch.randn_like(p) * 0.2)
    for name, buffer in model.named_buffers():
        if re.search(r"correction_bias|expert_bias|router.*bias", name) and buffer.is_floating_point():
            buffer.normal_(0, 0.2)


UNSET: dict[str, dict[str, Any]] = {  # what a class's default config leaves open though its models need it
    "BambaConfig": {"attn_layer_indices": [9, 18, 27]},  # as published
    "CohereCompassTextConfig": {  # RoPE by kinds of layer, of which it has none by default
        "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 10,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")
        },
    },
    "DbrxConfig": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 8, "clip_qkv": 8}},
    "DeepseekV2Config": {"num_experts_per_tok": 6, "n_group": 8, "topk_group": 3, "first_k_dense_replace": 1},
    "Dots1Config": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "GraniteMoeHybridConfig": {  # as published
        "num_hidden_layers": 40,
        "layer_types": (["linear_attention"] * 5 + ["full_attention"] + ["linear_attention"] * 4) * 4,
    },
    "HunYuanDenseV1Config": {"head_dim": 128},
    "HunYuanMoEV1Config": {"head_dim": 128},
    "Lfm2Config": {"full_attn_idxs": [2, 5, 8, 10, 12, 14]},  # all its checkpoints are hybrids
    "Lfm2MoeConfig": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "MiniMaxM3VLTextConfig": {"layer_types": ["full_attention"] * 3 + ["minimax_m3_sparse"] * 57},  # as published
    "MinistralConfig": {"head_dim": 128},
    "NemotronConfig": {"num_key_value_heads": 8},
    "XmodConfig": {"default_language": "en_XX"},
}
