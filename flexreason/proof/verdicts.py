"""The verdict on a class and a config: from the list of transformers' classes, or else from the self-test.

The list (models.json) was written by the self-test, class by class. It holds for the versions it names, and for
configs of the structure that was tested; whatever else there is, the self-test is asked on the spot.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from flexreason.proof.selftest import Result

LIST = Path(__file__).parent / "models.json"


@cache
def listed() -> dict[str, Any]:
    """The list as it was written: versions, and an entry a class."""
    return json.loads(LIST.read_text()) if LIST.exists() else {"transformers": "", "torch": "", "models": {}}


def proof(cls: "type[PreTrainedModel]", config: "PreTrainedConfig", edited: frozenset[str] = frozenset()) -> "Result":
    """The verdict on a class with a config: from the list where it speaks of both, else from the self-test.

    `edited`: what is in a model that transformers did not bring; of such a model the list says nothing.
    """
    import transformers

    known = listed()["models"].get(cls.__name__)
    if not _is_transformers(cls) or listed()["transformers"] != transformers.__version__:
        known = None
    structure = structure_of(config, cls)
    if known and known["structure"] == structure and not edited:
        return _result(cls.__name__, known)
    return _tested(cls, structure, config, edited)


def _is_transformers(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "transformers"


def _result(name: str, entry: dict[str, Any]) -> "Result":
    from flexreason.proof.selftest import Result

    kept: dict[str, Any] = {k: v for k, v in entry.items() if k not in ("unpatched", "registry", "structure")}
    return Result(name, **kept)


_found: dict[tuple, "Result"] = {}


def _tested(
    cls: "type[PreTrainedModel]", structure: str, config: "PreTrainedConfig", edited: frozenset[str] = frozenset()
) -> "Result":
    """The self-test, once a process for each class and structure."""
    from flexreason.proof.selftest import check

    key = (cls, structure, edited)
    if key not in _found:
        _found[key] = check(config, cls)
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

    from flexreason.proof.shrink import shrink

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
