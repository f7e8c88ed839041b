"""Every `...ForCausalLM` of the installed transformers, tiny, where its config allows."""

import inspect

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

SMALL = {  # by what configs call their sizes; only keys that a config has are set
    "vocab_size": 97,
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "intermediate_size": 48,
    "n_inner": 48,
    "ffn_dim": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "num_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "layer_types": None,
}

LARGEST = 3_000_000
"""Parameters; what is larger has sizes that SMALL does not know."""


def causal_classes():
    """All names of classes in transformers' own mapping for causal language models, once each."""
    found = {name for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in [names]}
    return sorted(name for name in found if hasattr(transformers, name))


def build(name, **config):
    """A tiny model of a class, or whatever its config raises."""
    made = getattr(transformers, name)
    known = inspect.signature(made.config_class.__init__).parameters
    default = made.config_class()
    keys = {key: value for key, value in SMALL.items() if key in known or hasattr(default, key)}
    config = made.config_class(**{**keys, **config})
    with torch.device("meta"):
        size = sum(p.numel() for p in made(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters with all sizes set that are known here")
    torch.manual_seed(0)
    return made(config).eval()
