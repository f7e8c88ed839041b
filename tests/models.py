"""Small models with random weights, built from configs."""

import torch
import transformers

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
}


def tiny(family, seed=0, **config):
    """`tiny("Qwen3")`: a Qwen3ForCausalLM with two narrow layers; keywords go to its config."""
    torch.manual_seed(seed)
    made = getattr(transformers, f"{family}Config")(**{**TINY, **config})
    return getattr(transformers, f"{family}ForCausalLM")(made)
