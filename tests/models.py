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
    "initializer_range": 0.2,  # with the usual 0.02 attention is all but uniform, and tests of masks half blind
}


def tiny(family, seed=0, **config):
    """`tiny("Qwen3")`: a Qwen3ForCausalLM with two narrow layers; keywords go to its config."""
    torch.manual_seed(seed)
    made = getattr(transformers, f"{family}Config")(**{**TINY, **config})
    if getattr(made, "attn_logit_softcapping", None) and "attn_implementation" not in config:
        made._attn_implementation = "eager"  # by default it is sdpa below transformers 5.21, which has no softcap
    return getattr(transformers, f"{family}ForCausalLM")(made)


def checkpoint(model, use_reentrant=False):
    """Gradient checkpointing on, under whichever name this transformers has."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
