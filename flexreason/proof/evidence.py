"""What shows that a model is exact: the list of classes, or the self-test, or a comparison of its own that passed.

The list (models.json) was written by the self-test, class by class. It holds for classes whose source is the one that
was tested, whatever the version is called, and for configs of the structure that was tested. Of everything else the
self-test is asked, once a machine (kept.py).

Both are about a tiny model of a class. They know nothing of what was done to one model since: attention that a library
put in its place, a module of your own around an MLP. So the parts of a model are compared with those of a tiny one, and
where they differ, or where no tiny one can be built, only `fr.verify` on the model itself can show it.
"""

import copy
import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Hashable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedConfig, PreTrainedModel

from flexreason.attention.registry import attention_of
from flexreason.model.refuse import SAMPLES, Reason, model_class
from flexreason.proof import kept, selftest
from flexreason.proof.identity import identity, is_own
from flexreason.proof.parts import Part, parts_of
from flexreason.proof.selftest import UNTESTED, Result
from flexreason.proof.source import replaced_attention, replaced_in_memory, source_of
from flexreason.proof.tiny import shrink

LIST = Path(__file__).parent / "models.json"

log = logging.getLogger("flexreason")


class Evidence(NamedTuple):
    """What is known of a model before it is patched."""

    verdict: str  # "exact", "refused", or UNTESTED where no test could tell
    against: Reason | None  # why it is not shown to be exact, and what can be done; None where it is
    unchunked: str  # why its loss cannot be computed a chunk at a time, or nothing


def evidence_of_model(root: PreTrainedModel, backend: str = "auto") -> Evidence:
    """What is known of one model.

    Args:
        backend: the one that is to be used, which is the only one that is tested.
    """
    parts = parts_of(root)
    result = evidence_of_class(model_class(root), root.config, _foreign(parts), backend, switches_of(root))
    unchunked = result.chunked_reason if result.chunked is False else ""
    if result.verdict == "refused":  # a test that failed, against which nothing counts
        against = newly_refused(model_class(root), root.config, result) if not _foreign(parts) else None
        return Evidence(result.verdict, against or (result.reason, SAMPLES), unchunked)
    verdict, doubt = result.verdict, ""
    if verdict == UNTESTED:
        doubt = "nobody has shown it to be exact, and no tiny model of its structure can be built to try "
        doubt += f"({result.reason})"
    elif replaced := parts - _tiny_parts(model_class(root), root.config, _foreign(parts)):
        verdict = UNTESTED
        words = sorted({part.words for part in replaced})
        doubt = f"parts of it were replaced, which no tiny model of its class has: {', '.join(words)}"
    if not doubt or _kind(root) in _verified:
        return Evidence(verdict, None, unchunked)
    remedy = "run fr.verify on it: once that has passed, patch takes such models until the process ends"
    return Evidence(verdict, (doubt, remedy), unchunked)


# ---- what `verify` passed

_verified: set[tuple] = set()
"""Class, structure and parts of the models that `fr.verify` passed on."""


def note_verified(root: PreTrainedModel) -> None:
    """Models of this one's class, structure and parts are taken until the process ends, where no tiny one can be
    tested. This counts for nothing against a test that failed."""
    _verified.add(_kind(root))


def _kind(root: PreTrainedModel) -> tuple:
    cls = model_class(root)
    return identity(cls), structure_of(root.config, cls), frozenset(parts_of(root)), tuple(switches_of(root).items())


# ---- a class and a config: the list, or else the self-test


@cache
def listed() -> dict[str, Any]:
    """The list as it was written: versions, and an entry a class."""
    return json.loads(LIST.read_text()) if LIST.exists() else {"transformers": "", "torch": "", "models": {}}


def evidence_of_class(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    edited: frozenset[Part] = frozenset(),
    backend: str = "auto",
    switches: Mapping[str, float] = MappingProxyType({}),
) -> Result:
    """The verdict on a class with a config: from the list where it speaks of both, else from the self-test.

    Args:
        edited: what is in a model that transformers did not bring. Of such a model the list says nothing.
        backend: the one that is to be used, which is the only one that is tested.
        switches: what `switches_of` a model found.
    """
    structure = structure_of(config, cls)
    source = source_of(cls, config, structure) if _is_transformers(cls) else ""
    replaced = replaced_attention(config) | (replaced_in_memory(cls, structure) if source else {})
    entry = listed()["models"].get(cls.__name__) if source and not edited and not replaced else None
    if entry and (entry.get("structure"), entry.get("source")) == (structure, source) and _is_listed_torch():
        return Result(cls.__name__, **{key: entry[key] for key in Result.__dataclass_fields__ if key in entry})
    changed = edited, identity(replaced), tuple(switches.items())
    source = "" if edited or replaced else source  # else the files do not say what runs
    used = "dense" if backend == "dense" else "segments"
    result = _tested(cls, config, structure, source, changed, used, {} if _is_transformers(cls) else switches)
    if replaced and result.verdict == "refused":
        others = f"{result.reason}; somebody replaced {', '.join(replaced)} in this process"
        result = dataclasses.replace(result, reason=others)
    return result


def switches_of(root: PreTrainedModel) -> dict[str, float]:
    """Buffers of one number in somebody's own modules, by name: what such a number is may decide what code does."""
    own = {name: module for name, module in root.named_modules() if is_own(type(module).__module__)}
    return {
        f"{name}.{key}".lstrip("."): float(buffer)
        for name, module in own.items()
        for key, buffer in module._buffers.items()
        if buffer is not None and buffer.numel() == 1 and buffer.device.type != "meta"
    }


def since_the_list(listed_version: str | None = None) -> str:
    """What the transformers here is against that of the list: newer, older, or nothing where it is the same."""
    here, there = Version(transformers.__version__), Version(listed_version or listed()["transformers"])
    return "newer" if here > there else "older" if here < there else ""


def newly_refused(cls: type[PreTrainedModel], config: PreTrainedConfig, result: Result) -> Reason | None:
    """What is said where the list knows a class with such a config as exact, and a newer transformers made it another
    one: in words, since the numbers of a test say nothing of that."""
    entry = listed()["models"].get(cls.__name__, {})
    known = entry.get("verdict") == "exact" and entry.get("structure") == structure_of(config, cls)
    if not known or not _is_transformers(cls) or result.verdict != "refused" or since_the_list() != "newer":
        return None
    symptom = re.sub(r" \(relative errors[^)]*\)", "", result.reason)
    return (
        "the list of models knows it as exact, and in the transformers here, which is newer, it is another one: "
        f"{symptom}",
        f"use the transformers of the list (pip install 'transformers=={listed()['transformers']}'), or {SAMPLES}",
    )


def _why_tested(cls: type) -> str:
    """Why the list does not speak of a class as it is here."""
    if not _is_transformers(cls):
        return "it is no class of transformers"
    if cls.__name__ not in listed()["models"]:
        return "the list of models does not have it"
    if not _is_listed_torch():
        return "the torch here is another than that of the list of models"
    if since := since_the_list():
        return f"the transformers here is {since} than the list of models"
    return "the list of models does not hold it with such a config, or as it is here"


def _is_transformers(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "transformers"


def _is_listed_torch() -> bool:
    """Whether torch is the list's, but for fixes: its operations are part of what was tested."""
    return torch.__version__.split(".")[:2] == listed()["torch"].split(".")[:2]


_results: dict[tuple, Result] = {}
"""What the self-test said in this process."""


def _tested(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    structure: str,
    source: str,
    changed: Hashable,
    backend: str,
    switches: Mapping[str, float],
) -> Result:
    """The self-test, once a process; and once a machine where the files of transformers, `source`, say all of what was
    tested. `changed` is what was changed in memory."""

    def test() -> Result:
        log.warning(
            f"{cls.__name__} is tested on a tiny model of its structure, since {_why_tested(cls)}: about a second, or "
            "some for models of very many layers"
        )
        return selftest.check(config, cls, (backend,), *([switches] if switches else []))

    attention = "eager" if attention_of(config) == "eager" else ""  # which is the class's own code
    key = (identity(cls), structure, changed, backend, attention)
    if key not in _results:
        about = {"name": cls.__name__, "source": source, "structure": structure, "backend": backend}
        about["attention"] = attention
        _results[key] = kept.recall(about, test) if source else test()
    return _results[key]


SAME = re.compile(
    r"(.*_)?num_key_value_heads|tie_word_embeddings|(.*_)?token_(id|ids|index)|_?name_or_path|architectures"
    r"|(_flash_)?transformers_version|id2label|label2id|num_labels|label_names|summary_proj_to_labels|use_cache"
    r"|(torch_)?dtype|(.*_)?(cache|kernel|state)_dtype|(.*_)?initializer_(range|factor|cutoff_factor)|(.*_)?eps"
)
"""What configs of one structure may differ in, by whole names."""

NAMES = re.compile(r"_?name_or_path|architectures|transformers_version|id2label|label2id|(torch_)?dtype")
"""The same for classes from outside transformers, where nobody knows what the rest does."""


def structure_of(config: PreTrainedConfig, cls: type | None = None) -> str:
    """A short hash of a config with its sizes cut. For a class of transformers, numbers that change no structure are
    left out too; for any other class, everything that is left counts."""
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

    def hashed(value: Any) -> str:
        return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]

    try:
        return hashed(plain(shrink(config, every_layer=not known).to_dict()))
    except Exception as error:  # so it cannot be cut: only the very same is the same
        return f"unknown: {type(error).__name__} {hashed(config.to_dict())}"


# ---- what one model is made of


def _foreign(parts: set[Part]) -> frozenset[Part]:
    """Those that neither transformers nor torch brought."""
    return frozenset(part for part in parts if part.is_foreign)


_parts_of_tiny: dict[tuple, set[Part]] = {}


def _tiny_parts(cls: type[PreTrainedModel], config: PreTrainedConfig, edited: frozenset[Part]) -> set[Part]:
    """The parts that a class builds from a config; its sizes are cut, so this takes milliseconds.

    Of a class from outside transformers nothing is cut: the values that its modules hold count, and so do its sizes.
    They are kept as long as `edited` stays the same, since classes can be edited at any time.
    """
    known = _is_transformers(cls)
    size = "" if known else json.dumps(config.to_dict(), sort_keys=True, default=str)
    key = (identity(cls), structure_of(config, cls), edited, size)
    if key not in _parts_of_tiny:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            _parts_of_tiny[key] = parts_of(cls(shrink(config) if known else copy.deepcopy(config)))
    return _parts_of_tiny[key]
