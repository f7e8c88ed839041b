"""Models and tokenizers by name, folder, file or bare config: what commands start from."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from flexreason.talk.sources import CONFIGS, TOKENIZERS, why_missing, why_unusable
from flexreason.talk.telling import stage

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
        raise ValueError(
            f"device {device!r} cannot be used here: {str(error).splitlines()[0]}; use cpu, or one that is there"
        ) from error
    if where.type == "meta":
        raise ValueError("device 'meta' holds no weights; use cpu or cuda")
    if why := why_missing(name):
        raise ValueError(f"{name} cannot be loaded as a causal language model: {why}")
    with stage(f"loading {name}"):
        model, notes = _loaded(name, dtype, seed, trust_remote_code)
        return model.to(where).eval(), notes


def _loaded(name: str, dtype: str, seed: int, trust_remote_code: bool) -> tuple[Any, list[str]]:
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
        why = why_unusable(name, "config.json", CONFIGS, error)
        raise ValueError(
            f"{name} cannot be loaded as a causal language model: {why}; give a folder, a config.json or a name on "
            "the hub"
        ) from error
    return model, notes


def option_of(text: str) -> tuple[str, Any]:
    name, given, value = text.partition("=")
    if not given or not name.isidentifier():
        raise ValueError(f"--option: expected NAME=VALUE, found {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def is_bare(source: str) -> bool:
    """Whether the source is a template that comes without a tokenizer."""
    return Path(source).suffix in (".jinja", ".jinja2", ".j2")


def load_tokenizer(source: str) -> tuple[Any, list[str]]:
    """A tokenizer, and what should be known of how it came about."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(source)
    if why := why_missing(source):
        raise ValueError(f"{source}: cannot be loaded as a tokenizer or a template: {why}")
    try:
        if is_bare(source):
            return stand_in(path.read_text()), [
                "a bare template: rendered with a stand-in tokenizer, whose special tokens are the tags in the template"
            ]
        with stage(f"loading the tokenizer {source}"):
            if path.is_file():
                if (path.parent / "tokenizer_config.json").exists():
                    return AutoTokenizer.from_pretrained(str(path.parent)), []
                return PreTrainedTokenizerFast(tokenizer_file=str(path)), ["no tokenizer_config.json beside it"]
            return AutoTokenizer.from_pretrained(source), []
    except Exception as error:  # whatever a tokenizer's files may raise
        why = why_unusable(source, "tokenizer", TOKENIZERS, error)
        raise ValueError(
            f"{source}: cannot be loaded as a tokenizer or a template: {why}; give a folder, a name or a .jinja"
        ) from error


TAG = re.compile(r"<[|\uff5c]?/?[\w▁.:-]+[|\uff5c]?>|\[/?[A-Z_]{3,}\]")


def stand_in(template: str) -> Any:
    """A byte-level tokenizer for a template that comes alone: its tags are tokens, those of turns special."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token="<bos>")
    inner = re.compile(r"think|tool|function|param|arg|name|reason", re.IGNORECASE)
    for tag in sorted(set(TAG.findall(template))):
        special = not inner.search(tag)
        tokenizer.add_tokens([AddedToken(tag, special=special, normalized=False)], special_tokens=special)
    tokenizer.chat_template = template
    return tokenizer
