"""The source of a class of transformers, in one hash: the whole files of all that the self-test runs of it.

Those are the modules of the class, of its config and of every model inside it, what these take from other models, and
what all models share. Where the files are equal, byte for byte, the self-test would run the same code on the same
numbers, whatever the version is called; so a class with the hash of the list is the class that was tested. Any other
edit counts, a comment's too: a test too many costs less than a second.
"""

import hashlib
import importlib
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flexreason.attention.registry import attention_of
from flexreason.model.find import home_of, links_of
from flexreason.proof.tiny import shrink

MODELS = "transformers.models."

SHARED = tuple(  # what models run outside their own folders; tests/test_newer.py watches the self-test and holds this
    f"transformers.{name}"
    for name in (
        *("activations", "configuration_utils", "initialization", "masking_utils", "modeling_layers"),
        *("modeling_outputs", "modeling_rope_utils", "modeling_utils", "monkey_patching", "pytorch_utils"),
        *("distributed.mixin", "integrations.deepspeed", "integrations.heterogeneity.configuration_utils"),
        *("integrations.hub_kernels", "integrations.moe", "integrations.sdpa_attention", "loss.loss_utils"),
        *("utils.deprecation", "utils.generic", "utils.import_utils", "utils.output_capturing"),
        "utils.type_validators",
    )
)

LEFT_OUT = ("transformers.utils.logging", "transformers.utils.auto_docstring", "transformers.generation")
"""What runs too and enters no number: words, docstrings, and how text is generated."""

USUAL = {
    *("transformers", "torch", "torchvision", "numpy", "huggingface_hub", "safetensors", "tokenizers", "accelerate"),
    *("packaging", "typing_extensions", "kernels", "peft", "deepspeed", "timm", "PIL"),
    *sys.stdlib_module_names,
}
"""Packages whose functions transformers' own files bring in."""


def hash_of(path: Path) -> str:
    """The hash of a file; nothing where it is no longer as it was at first, since nobody knows then which of its texts
    this process runs."""
    stat = path.stat()
    when, first = _first_seen(path)
    if when != (stat.st_mtime_ns, stat.st_size) and first != hashlib.sha256(path.read_bytes()).hexdigest():
        return ""
    return first


@cache
def _first_seen(path: Path) -> tuple[tuple[int, int], str]:
    stat = path.stat()
    return (stat.st_mtime_ns, stat.st_size), hashlib.sha256(path.read_bytes()).hexdigest()


def hash_of_all(files: dict[str, Path]) -> str:
    """Of names and contents; nothing where a file cannot be read, or has changed."""
    try:
        hashes = {name: hash_of(path) for name, path in sorted(files.items())}
    except OSError:
        return ""
    if not all(hashes.values()):
        return ""
    lines = [f"{name} {found}\n" for name, found in hashes.items()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


@cache
def own_source() -> str:
    """The same of flexreason: another flexreason may find something else."""
    root = Path(__file__).parents[1]
    return hash_of_all({str(path.relative_to(root)): path for path in root.rglob("*.py")})


_modules: dict[tuple, list[str]] = {}


def source_of(cls: type[PreTrainedModel], config: PreTrainedConfig, structure: str) -> str:
    """The hash of a class with a config of some structure; nothing where not all of it is transformers', or where it
    cannot be told."""
    key = (cls, structure)
    if key not in _modules:
        _modules[key] = modules_of(cls, config)
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in _modules[key]}
    if not files or not all(files.values()):
        return ""
    return hash_of_all({name: Path(str(path)) for name, path in files.items()})


def modules_of(cls: type[PreTrainedModel], config: PreTrainedConfig) -> list[str]:
    """The names of all modules whose files count; none where part of the class is from elsewhere or cannot be built."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = cls(shrink(config))
    except Exception:  # whatever a class raises: then nothing was ever tested of it
        return []
    configs = [c for module in model.modules() for c in _configs(getattr(module, "config", None))]
    kinds = {cls, type(config)} | {type(part) for part in (*model.modules(), *configs)}
    if any(_package(kind.__module__) not in ("transformers", "torch") for kind in kinds):
        return []
    names = {parent.__module__ for kind in kinds for parent in kind.__mro__ if parent.__module__.startswith(MODELS)}
    waiting = list(names)
    while waiting:
        for value in list(vars(sys.modules[waiting.pop()]).values()):
            home = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            if isinstance(home, str) and home.startswith(MODELS) and home in sys.modules and home not in names:
                names.add(home)
                waiting.append(home)
    return sorted(names) + [name for name in SHARED if _is_there(name)]


def _configs(config: Any) -> Iterator[PreTrainedConfig]:
    """A config and those in it, also of parts that the model does not build."""
    if isinstance(config, PreTrainedConfig):
        yield config
        for value in vars(config).values():
            yield from _configs(value)


def _is_there(name: str) -> bool:
    """Whether a module is of this version; it is imported if it is."""
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _package(module: str) -> str:
    return module.partition(".")[0]


def replaced_in_memory(cls: type[PreTrainedModel], structure: str) -> dict[str, Any]:
    """The functions and classes that a library put into the modules of `source_of`, by name: with one of them, what
    runs is not what the files say, in this process only."""
    found = {}
    for name in _modules.get((cls, structure), ()):
        for key, value in list(vars(sys.modules[name]).items()):
            if key.startswith("__"):  # torch.compile leaves there what its guards look at; no source calls it
                continue
            if any(_package(home) not in USUAL for home in _homes(value, name)):
                found[f"{name}.{key}"] = list(vars(value).values()) if isinstance(value, type) else value
    return found


def replaced_attention(config: PreTrainedConfig) -> dict[str, Any]:
    """What somebody registered in the place of transformers' own attention and masks, under the name that a config
    names."""
    name = attention_of(config) or ""
    registered = {f"attention {name!r}": ALL_ATTENTION_FUNCTIONS, f"masks of {name!r}": ALL_MASK_ATTENTION_FUNCTIONS}
    found = {what: functions[name] for what, functions in registered.items() if name in functions}
    return {what: value for what, value in found.items() if any(_package(home) not in USUAL for home in _homes(value))}


def _homes(value: Any, module: str = "") -> Iterator[str]:
    """The modules that a value's code is from: of a function by its globals, since wrappers take on names; and of a
    class that is of `module`, its functions' too."""
    if not isinstance(value, type):
        for link in links_of(value):
            if isinstance(link, torch.jit.ScriptFunction):
                yield "?"
            elif not getattr(link, "finds_trees", False):  # which is ours, and calls the next for all but rows
                yield home_of(link)
        return
    yield value.__module__
    for own in vars(value).values() if value.__module__ == module else ():
        inner = getattr(own, "fget", None) or getattr(own, "__func__", own)
        if not isinstance(inner, type):
            yield from _homes(inner)
