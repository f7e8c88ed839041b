"""The verdict on a class and a config: from the list of transformers' classes, or else from the self-test.

The list (models.json) was written by the self-test, class by class. It holds for classes whose source is the one that
was tested, whatever the version is called, and for configs of the structure that was tested; whatever else there is,
the self-test is asked, once a machine (kept.py).
"""

import json
import logging
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from flexreason.proof.selftest import Result

LIST = Path(__file__).parent / "models.json"

log = logging.getLogger("flexreason")


@cache
def listed() -> dict[str, Any]:
    """The list as it was written: versions, and an entry a class."""
    return json.loads(LIST.read_text()) if LIST.exists() else {"transformers": "", "torch": "", "models": {}}


def proof(
    cls: "type[PreTrainedModel]",
    config: "PreTrainedConfig",
    edited: frozenset[str] = frozenset(),
    backend: str = "auto",
) -> "Result":
    """The verdict on a class with a config: from the list where it speaks of both, else from the self-test.

    `edited`: what is in a model that transformers did not bring; of such a model the list says nothing. `backend`: the
    one that is to be used, which is the only one that is tested.
    """
    from flexreason.proof.source import source_of

    structure = structure_of(config, cls)
    source = source_of(cls, config, structure) if _is_transformers(cls) else ""
    known = listed()["models"].get(cls.__name__) if source and not edited else None
    if known and (known.get("structure"), known.get("source")) == (structure, source) and _is_listed_torch():
        return _result(cls.__name__, known)
    return _tested(cls, config, structure, source, edited, "dense" if backend == "dense" else "segments")


def _is_transformers(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "transformers"


def _is_listed_torch() -> bool:
    """Whether torch is the list's, but for fixes: its operations are part of what was tested."""
    import torch

    return torch.__version__.split(".")[:2] == listed()["torch"].split(".")[:2]


def _result(name: str, entry: dict[str, Any]) -> "Result":
    from flexreason.proof.selftest import Result

    kept: dict[str, Any] = {k: v for k, v in entry.items() if k not in ("unpatched", "registry", "structure", "source")}
    return Result(name, **kept)


_found: dict[tuple, "Result"] = {}


def _tested(
    cls: "type[PreTrainedModel]",
    config: "PreTrainedConfig",
    structure: str,
    source: str,
    edited: frozenset[str],
    backend: str,
) -> "Result":
    """The self-test, once a process; and once a machine where the files of transformers say all of what was tested."""
    import torch
    import transformers

    from flexreason.proof import kept
    from flexreason.proof.selftest import check
    from flexreason.proof.source import replaced_in_memory

    def test() -> "Result":
        log.warning(
            f"{cls.__name__} is tested on a tiny model of its structure, for the list of models does not hold "
            f"it as it is here (transformers {transformers.__version__}, torch {torch.__version__}): about a second, "
            "or some for models of very many layers"
        )
        return check(config, cls, (backend,))

    key = (cls, structure, edited, backend)
    if key not in _found:
        if not source or edited or replaced_in_memory(cls, structure):
            _found[key] = test()
        else:
            about = {"name": cls.__name__, "source": source, "structure": structure, "backend": backend}
            _found[key] = kept.recall(about, test)
    return _found[key]


SAME = re.compile(
    r"(.*_)?num_key_value_heads|tie_word_embeddings|(.*_)?token_(id|ids|index)|_?name_or_path|architectures"
    r"|(_flash_)?transformers_version|id2label|label2id|num_labels|label_names|summary_proj_to_labels|use_cache"
    r"|(torch_)?dtype|(.*_)?(cache|kernel|state)_dtype|(.*_)?initializer_(range|factor|cutoff_factor)|(.*_)?eps"
)
"""What configs of one structure may differ in, by whole names."""

NAMES = re.compile(r"_?name_or_path|architectures|transformers_version|id2label|label2id|(torch_)?dtype")
"""The same for classes from outside transformers, where nobody knows what the rest does."""


def structure_of(config: "PreTrainedConfig", cls: type | None = None) -> str:
    """A short hash of a config with its sizes cut. For a class of transformers, numbers that change no structure are
    left out too; for any other, everything that is left counts."""
    import hashlib

    from flexreason.proof.tiny import shrink

    known = cls is None or _is_transformers(cls)

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            left_out = SAME if known else NAMES
            return {str(k): plain(v) for k, v in sorted(value.items(), key=str) if not left_out.fullmatch(str(k))}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        # a theta, a factor, a scale
        if known and (isinstance(value, float) or (isinstance(value, int) and value > 1000)):
            return "number" if value else "none"
        return value if isinstance(value, int | float | str | None) else str(value)

    def hashed(given: Any) -> str:
        return hashlib.sha256(json.dumps(given, sort_keys=True, default=str).encode()).hexdigest()[:12]

    try:
        return hashed(plain(shrink(config).to_dict()))
    except Exception as error:  # so it cannot be cut: only the very same is the same
        return f"unknown: {type(error).__name__} {hashed(config.to_dict())}"
