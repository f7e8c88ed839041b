"""Models by name, folder or bare config, and samples from a file or at random: what commands start from."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from flexreason.sample import Sample

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")

WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json")

LENGTHS = ("sliding_window", "attention_chunk_size", "original_max_position_embeddings")
"""Config entries at which something changes with the length of a sample."""

LONGEST = 400
"""Tokens in the trunk of a random conversation that need not cross anything."""


def load_model(name: str, dtype: str, device: str, seed: int, trust_remote_code: bool) -> tuple[nn.Module, list[str]]:
    """A causal language model in evaluation mode, and what should be known of how it came about."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, found {dtype!r}")
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
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code)
        return model.to(device).eval(), notes
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ValueError(f"{name} cannot be loaded as a causal language model: {error}") from error


def read_samples(path: Path, vocabulary: int) -> list[list[Sample]]:
    """Conversations from JSONL, a sample a line: prompt_ids, target_ids, and conversation, by which they are grouped.

    Neighbouring lines with the same `conversation` belong together; a line without one is a conversation by itself.
    """
    found: list[list[Sample]] = []
    last: Any = None
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            sample = Sample(entry["prompt_ids"], entry["target_ids"])
            ids = [*map(int, sample.prompt_ids), *map(int, sample.target_ids)]
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: no JSON: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}, line {number}: expected prompt_ids and target_ids, lists of token ids: {error!r}"
            ) from error
        if not sample.target_ids or not sample.prompt_ids:
            raise ValueError(f"{path}, line {number}: prompt_ids or target_ids is empty")
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            raise ValueError(
                f"{path}, line {number}: token ids from {min(ids)} to {max(ids)}, and the model's vocabulary has "
                f"{vocabulary}: made with another tokenizer?"
            )
        group = entry.get("conversation")
        if found and group is not None and group == last:
            found[-1].append(sample)
        else:
            found.append([sample])
        last = group
    if not found:
        raise ValueError(f"{path}: no samples in it")
    return found


def random_conversations(
    config: PreTrainedConfig, tokens: int | None, seed: int
) -> tuple[list[list[Sample]], list[str]]:
    """A short conversation, and for every length constant of the config one that crosses it, where that is not long."""
    text, notes = config.get_text_config(), []
    draw = random.Random(seed)
    ropes = getattr(text, "rope_parameters", None) or {}
    settings = [text.to_dict(), *([ropes] if "rope_type" in ropes else ropes.values())]
    lengths = {
        (key, value)
        for found in settings
        if isinstance(found, dict)
        for key in LENGTHS
        if isinstance(value := found.get(key), int) and value > 0
    }
    conversations = [_conversation(draw, text.vocab_size, 24), _conversation(draw, text.vocab_size, 12)]
    for key, length in sorted(lengths):
        if 4 * length <= (tokens or 4 * LONGEST):
            conversations.append(_conversation(draw, text.vocab_size, length))
        else:
            notes.append(
                f"{key} {length} is not crossed on this model itself, which would take some {4 * length} tokens "
                f"(--tokens {6 * length} does); `flexreason models` crosses it on a small one of the same structure"
            )
    return conversations, notes


def _conversation(draw: random.Random, vocabulary: int, length: int) -> list[Sample]:
    """Three turns, the second without reasoning, the last two of which end behind `length`."""

    def ids(n: int) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(n)]

    history: list[int] = ids(max(2, length // 3))
    samples = []
    for reasoning in (max(2, length // 2), 0, max(2, length // 4)):
        answer = ids(6)
        samples.append(Sample(history, [*ids(reasoning), *answer]))
        history = [*history, *answer, *ids(max(2, length // 3))]
    return samples
