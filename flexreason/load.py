"""Models by name, folder or bare config, and samples from a file or at random: what commands start from."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from flexreason.proof.shrink import length_constants
from flexreason.sample import Sample

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")

WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json")

LONGEST = 400
"""Tokens in the trunk of a random conversation that need not cross anything."""


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


def read_samples(path: Path, vocabulary: int) -> list[list[Sample]]:
    """Conversations from JSONL, a sample a line: prompt_ids, target_ids, and conversation, by which they are grouped.

    A line without `conversation` is one by itself.
    """
    found: dict[Any, list[Sample]] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            prompt, target = entry["prompt_ids"], entry["target_ids"]
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: no JSON: {error}") from error
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: expected prompt_ids and target_ids: {error!r}") from error
        for name, ids in (("prompt_ids", prompt), ("target_ids", target)):
            if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
                raise ValueError(f"{path}, line {number}: expected {name} as a list of token ids, at least one")
            if not 0 <= min(ids) <= max(ids) < vocabulary:
                raise ValueError(
                    f"{path}, line {number}: {name} from {min(ids)} to {max(ids)}, and the model's vocabulary has "
                    f"{vocabulary}: made with another tokenizer?"
                )
        group = entry.get("conversation")
        key = ("line", number) if group is None else ("conversation", json.dumps(group))
        found.setdefault(key, []).append(Sample(prompt, target))
    if not found:
        raise ValueError(f"{path}: no samples in it")
    return list(found.values())


def random_conversations(
    config: PreTrainedConfig, tokens: int | None, seed: int
) -> tuple[list[list[Sample]], list[str]]:
    """A short conversation, and for every length constant of the config one that crosses it, where that is not long."""
    vocabulary = config.get_text_config().vocab_size
    draw, notes = random.Random(seed), []
    conversations = [_conversation(draw, vocabulary, 24), _conversation(draw, vocabulary, 12)]
    for key, length in sorted(length_constants(config).items()):
        if 4 * length <= (tokens or 4 * LONGEST):
            conversations.append(_conversation(draw, vocabulary, length))
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
