"""Models by name, folder or bare config: what commands start from."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")

WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json")


def load_model(name: str, dtype: str, device: str, seed: int, trust_remote_code: bool) -> tuple[nn.Module, list[str]]:
    """A causal language model in evaluation mode, and what should be known of how it came about."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, found {dtype!r}")
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if where.type == "meta":
        raise ValueError("device 'meta' holds no weights")
    path, notes = Path(name), []
    bare = path.is_file() or (path.is_dir() and not any(any(path.glob(pattern)) for pattern in WEIGHTS))
    try:
        if bare:
            config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
            torch.manual_seed(seed)
            wanted = getattr(config, "dtype", None) or torch.float32 if dtype == "auto" else getattr(torch, dtype)
            model = AutoModelForCausalLM.from_config(config, dtype=wanted, trust_remote_code=trust_remote_code)
            notes.append("weights are random: there are none beside the config")
        else:
            found: Any = AutoModelForCausalLM.from_pretrained(
                name, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
            )
            model, loading = found
            if missing := sorted(loading["missing_keys"]):
                notes.append(f"weights are random that the checkpoint lacks: {len(missing)} ({missing[0]}, ...)")
    except Exception as error:  # whatever a config, a checkpoint or code that comes with it may raise
        raise ValueError(f"{name} cannot be loaded as a causal language model: {error}") from error
    return model.to(where).eval(), notes
