"""Whether there is anything of a name: a file, a folder, or something on a hub that can be reached.

transformers asks a hub again and again before it says that it did not answer. So it is asked once here, and what can be
told from the name alone is told at once.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flexreason.talk.nearest import near_file, nearest
from flexreason.talk.telling import shortened

FILES = (".json", ".jsonl", ".parquet", ".jinja", ".jinja2", ".j2", ".yaml", ".yml", ".safetensors", ".bin", ".gguf")
"""Endings that no name on a hub has."""

OLD = {"gpt2", "ctrl", "openai-gpt"}
"""Kinds of models whose names are, without an owner, names on the hub too."""

CONFIGS = ("*config.json", "params.json", "*.gguf")
"""Files, of which a model's folder has one."""

TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json", "config.json")
"""Files, of which a tokenizer's folder has one."""

SECONDS = 5.0
"""In which a hub must have begun to answer."""


def is_path(source: str) -> bool:
    """Whether a text can only be meant as a path."""
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or source.lower().endswith(FILES)


def why_missing(source: str) -> str:
    """Why nothing of this name can be found, and what was probably meant: no file, no folder, and no hub that knows it
    can be asked. Nothing where it is there, or where only a hub can tell."""
    if Path(source).exists():
        return ""
    if is_path(source):
        return f"no such file or folder{near_file(source) or '; give one that is there'}"
    if is_cached(source):
        return ""
    if "/" not in source and source not in OLD and (cls := class_like(source)):
        return (
            f"expected a folder, a config.json or a name on the hub (OWNER/NAME); {cls} is a class, of which "
            f"flexreason models {cls} tells"
        )
    if why := unreachable():
        near, otherwise = near_file(source), "; give a folder, or load it once where the hub can be reached"
        hint = near if "did you mean" in near else otherwise
        return f"no such file or folder, and no hub can be asked ({why}){hint}"
    return ""


def why_unusable(source: str, kind: str, files: Iterable[str], error: BaseException) -> str:
    """Why nothing can be loaded of a name under which something is: a folder without such files, or what an error of
    somebody else says, in one line."""
    path = Path(source)
    if path.is_dir() and not any(any(path.glob(pattern)) for pattern in files):
        return f"there is no {kind} in that folder"
    return shortened(" ".join(str(error).split()).rstrip("."), 300)


def class_like(name: str) -> str | None:
    """The class of transformers that is meant by a name that is nearly one, or nearly a kind of models.

    >>> class_like("qwen3"), class_like("Qwen3ForCasualLM"), class_like("roberta-base")
    ('Qwen3ForCausalLM', 'Qwen3ForCausalLM', None)
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    def plain(text: str) -> str:
        return re.sub(r"[\W_]+", "", text.lower())

    by_kind = {plain(kind): cls for kind, cls in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if isinstance(cls, str)}
    known = by_kind | {plain(cls): cls for cls in by_kind.values()}
    meant = nearest(plain(name), known, closeness=0.85)
    return known[meant] if meant else None


def is_cached(name: str) -> bool:
    """Whether files of this name were once loaded from a hub."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        files = ("config.json", "adapter_config.json", "tokenizer_config.json", "tokenizer.json")
        return any(isinstance(try_to_load_from_cache(name, file), str) for file in files)
    except HFValidationError:
        return False


def is_cached_set(name: str) -> bool:
    """Whether a data set of this name was once loaded; `datasets` takes that where no hub answers."""
    try:
        from datasets import config
    except ImportError:
        return False
    folder, kept = Path(config.HF_DATASETS_CACHE), name.replace("/", "___").lower()
    return folder.is_dir() and any(path.name.lower() == kept for path in folder.iterdir())


def unreachable() -> str:
    """Why the hub cannot be asked, or nothing. Whatever it answers, it can be reached."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    why: Any = ""
    for _ in range(2):  # one connection may fail by chance
        try:
            get_session().head(os.environ.get("HF_ENDPOINT") or constants.ENDPOINT, timeout=SECONDS)
            return ""
        except Exception as error:  # whatever a connection raises
            why = error
    return f"{constants.ENDPOINT} does not answer: {type(why).__name__}"
