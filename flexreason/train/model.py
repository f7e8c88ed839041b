"""The model and the tokenizer of a run, as its settings name them: loaded, given adapters, patched."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

import flexreason as fr
from flexreason.load import load_model
from flexreason.talk.sources import TOKENIZERS, why_missing, why_unusable
from flexreason.train.settings import Settings


def precision_of(asked: str) -> str:
    """The precision that a setting stands for on this machine."""
    gpu = torch.accelerator.is_available()
    accelerator = torch.accelerator.current_accelerator() if gpu else None
    if asked == "auto":
        return "bf16" if accelerator is not None and accelerator.type == "cuda" else "fp32"
    if asked == "fp16" and not gpu:
        raise ValueError("precision: fp16 needs a GPU, and there is none here; use fp32 or bf16")
    return asked


def tokenizer_of(settings: Settings) -> Any:
    """The tokenizer, or None where the data are tokenized and none is named."""
    if settings.format == "samples" and settings.tokenizer is None:
        return None
    name = settings.tokenizer or settings.model
    path = Path(name)
    if why := why_missing(name):
        raise ValueError(f"tokenizer: {name} cannot be loaded: {why}")
    try:
        return AutoTokenizer.from_pretrained(
            str(path.parent) if path.is_file() else name, trust_remote_code=settings.trust_remote_code
        )
    except Exception as error:  # whatever a tokenizer's files may raise
        why = why_unusable(name, "tokenizer", TOKENIZERS, error)
        raise ValueError(f"tokenizer: {name} cannot be loaded: {why}; give a folder or a name") from error


def patched_model_of(settings: Settings, precision: str, say: Callable[[str], None]) -> nn.Module:
    """The model with its adapters, ready for rows."""
    dtype = "bfloat16" if precision == "bf16-weights" else "float32"
    model, notes = load_model(settings.model, dtype, "cpu", settings.seed, settings.trust_remote_code)
    for note in notes:
        say(f"note: {note}")
    if settings.lora is not None:
        if any("random" in note for note in notes):
            raise ValueError(
                f"lora: the weights beneath would be random, and saved nowhere: {notes[0]}; give a model with weights"
            )
        torch.manual_seed(settings.seed)
        model = with_lora(model, settings.lora)
    if settings.loss != "auto":
        return fr.patch(model, settings.backend, loss=settings.loss)
    return patch_chunked(model, settings.backend, say)


def patch_chunked(model: nn.Module, backend: str, say: Callable[[str], None]) -> nn.Module:
    """The model patched, with the loss in chunks where it takes that."""
    try:
        return fr.patch(model, backend, loss="chunked")
    except ValueError as error:
        if "chunked" not in str(error):
            raise
        say(f"note: the model's own loss is used, from all logits of targets: {error}")
        return fr.patch(model, backend)


def with_lora(model: nn.Module, lora: int | dict[str, Any]) -> nn.Module:
    """The model with adapters, as the setting says."""
    try:
        import peft
    except ImportError as error:
        raise ValueError("lora: needs peft: pip install 'flexreason[train]'") from error
    arguments = {"r": lora, "lora_alpha": 2 * lora} if isinstance(lora, int) else lora
    try:
        config = peft.LoraConfig(**{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **arguments})
        return peft.get_peft_model(model, config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"lora: {error}; give names and values of peft's LoraConfig") from error
