"""Which models take rows exactly: the list of transformers' classes, one model by name or path, or a new scan.

The list (models.json) was written by the self-test, class by class. It holds for the versions it names, and for
configs of the structure that was tested; whatever else there is, the self-test is asked on the spot.
"""

import argparse
import json
import multiprocessing
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from flexreason.proof.selftest import Result

LIST = Path(__file__).parent / "models.json"
TABLE = Path(__file__).parents[2] / "docs" / "models.md"

PATIENCE = 120.0
"""Seconds that the scan gives one class."""

IMPLEMENTATIONS = ("eager", "sdpa")


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


_parts: dict[tuple, set[str]] = {}


def tiny_parts(cls: "type[PreTrainedModel]", config: "PreTrainedConfig", edited: frozenset[str]) -> set[str]:
    """The kinds of modules that a class builds from a config; sizes cut, so it takes milliseconds.

    They are kept as long as `edited` stays the same, since classes can be edited at any time.
    """
    import torch

    from flexreason.proof.shrink import shrink
    from flexreason.refuse import parts_of

    key = (cls, structure_of(config, cls), edited)
    if key not in _parts:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            _parts[key] = parts_of(cls(shrink(config)))
    return _parts[key]


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


# ---- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", help="a class (Qwen3ForCausalLM), a folder with a config.json, or a name on the hub"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--scan", action="store_true", help="test all classes of the installed transformers")
    parser.add_argument("--write", action="store_true", help="with --scan: write the list and docs/models.md")
    parser.add_argument("--only", nargs="+", default=(), metavar="CLASS", help="with --scan: these classes only")


def run(options: argparse.Namespace) -> int:
    if options.write and (not options.scan or options.only):
        raise ValueError("--write writes what a whole --scan found; give --scan, and not --only")
    if options.scan:
        return _scan_command(options)
    return _tell(options) if options.model else _overview(options)


def _overview(options: argparse.Namespace) -> int:
    found = listed()
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    by_verdict: dict[str, list[str]] = {}
    for name, entry in found["models"].items():
        by_verdict.setdefault(entry["verdict"], []).append(name)
    for verdict, names in sorted(by_verdict.items()):
        print(f"{verdict}: {len(names)}\n  " + "\n  ".join(names))
    print(f"with transformers {found['transformers']}, torch {found['torch']}")
    return 0


def _tell(options: argparse.Namespace) -> int:
    """One model: 0 only if it is exact, and its config too."""
    from flexreason.proof.selftest import check
    from flexreason.refuse import reason_against_config

    config, cls, is_default = find(options.model)
    if not is_default:
        _must_build(options.model, config, cls)
    found = proof(cls, config)
    against = reason_against_config(cls, config) if found.verdict == "exact" else None
    if against and not is_default:
        found = replace(found, verdict="refused", reason="; ".join(against), chunked=None)
    special = found.special or check(config, cls).special
    segments = "segments"
    if slower := [why for why in ("softcap", "values and keys differ in head size") if why in special]:
        segments += f" (the slower route: {' and '.join(slower)})"
    told = {
        "model": options.model,
        **found.to_dict(),
        "special": special,
        "auto": {"cpu": segments, "gpu": "flex"} if found.verdict == "exact" else None,
        "note": f"its default config is refused: {'; '.join(against)}" if against and is_default else "",
    }
    if options.json:
        print(json.dumps(told, indent=1))
    else:
        _print(told)
    return 0 if found.verdict == "exact" else 1


def _print(told: dict[str, Any]) -> None:
    print(f"{told['name']}: {told['verdict']}" + (f": {told['reason']}" if told["reason"] else ""))
    if told["gradients"] is not None:
        print(f"  relative errors in fp64: {_numbers(told)}")
    print(f"  special: {', '.join(told['special']) or 'nothing'}")
    if told["note"]:
        print(f"  {told['note']}")
    if told["chunked"] is False:
        print(f'  no loss="chunked", and no token_logprobs: {told["chunked_reason"]}')
    if told["verdict"] == "exact":
        print(f'  backend="auto" takes {told["auto"]["cpu"]} on CPU, flex on GPUs')
    else:
        print("  patch refuses it" + ("" if told["verdict"] == "refused" else " until fr.verify has passed on it"))


def find(model: str) -> "tuple[PreTrainedConfig, type[PreTrainedModel], bool]":
    """The config and class of a name: a class of transformers (True: the config is its default), a folder, or a model
    on the hub."""
    import transformers

    from flexreason.proof.shrink import class_of, default_config

    cls = getattr(transformers, model, None)
    if isinstance(cls, type) and getattr(cls, "config_class", None):
        return default_config(cls), cls, True
    try:
        config = transformers.AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"{model}: no class of transformers, and no config to be found: {str(error)[:300]}") from error
    except Exception as error:  # whatever a config's own checks raise
        raise ValueError(f"{model}: its config cannot be used: {_said(error)}") from error
    return config, class_of(config), False


SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")


def _must_build(model: str, config: "PreTrainedConfig", cls: "type[PreTrainedModel]") -> None:
    """Raise if no model can be made of a config: its sizes are cut before the self-test, and so would go unnoticed."""
    import torch

    text = config.get_text_config()
    for key in SIZES:
        value = getattr(text, key, None)
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{model}: its config cannot be used: {key} is {value}")
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            cls(config)
    except Exception as error:  # whatever a class raises
        raise ValueError(f"{model}: {cls.__name__} cannot be built from its config: {_said(error)}") from error


def _said(error: BaseException) -> str:
    from flexreason.proof.selftest import said

    return said(error)


def _numbers(entry: dict[str, Any]) -> str:
    return ", ".join(f"{key} {entry[key]:.0e}" for key in ("loss", "logprobs", "gradients"))


# ---- the scan


def _scan_command(options: argparse.Namespace) -> int:
    import torch
    import transformers

    from flexreason.proof.shrink import causal_classes

    names, start = list(options.only) or causal_classes(), time.monotonic()
    if unknown := [name for name in names if not getattr(getattr(transformers, name, None), "config_class", None)]:
        raise ValueError(f"--only: transformers has no model of the name {', '.join(unknown)}")
    found: dict[str, Any] = {}
    for name, entry in scan(names):
        found[name] = entry
        line = f"{len(found):>4}/{len(names)} {time.monotonic() - start:5.0f} s  {name:<44} {entry['verdict']}"
        print(f"{line:<100}  {entry['reason']}"[:240], file=sys.stderr, flush=True)
    written = {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0], "models": found}
    if options.write:
        LIST.write_text(json.dumps(written, indent=1) + "\n")
        if TABLE.parent.is_dir():  # in a checkout
            TABLE.write_text(table(written))
        listed.cache_clear()
    if options.json:
        print(json.dumps(written, indent=1))
    counts = Counter(entry["verdict"] for entry in found.values())
    print(", ".join(f"{verdict}: {n}" for verdict, n in sorted(counts.items())), file=sys.stderr)
    return 0


def scan(names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every class in turn, in a process of its own that is replaced when a class crashes it or takes too long."""
    context = multiprocessing.get_context("spawn")
    worker = None
    for name in names:
        if worker is None:
            here, there = context.Pipe()
            worker = context.Process(target=_serve, args=(there,), daemon=True)
            worker.start()
            there.close()
        here.send(name)
        try:
            if not here.poll(PATIENCE):
                raise TimeoutError(f"it took longer than {PATIENCE:.0f} s")
            yield name, here.recv()
        except (EOFError, TimeoutError, ConnectionError) as error:
            worker.kill()
            worker.join()
            reason = str(error) or f"it ended the process that tried it (exit code {worker.exitcode})"
            worker = None
            yield name, {"verdict": "cannot be built tiny", "reason": reason, "special": [], "unpatched": {}}
    if worker is not None:
        worker.kill()
        worker.join()


def _serve(connection: Any) -> None:
    """What the scan's process does: names in, entries out."""
    import warnings

    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    while True:
        try:
            name = connection.recv()
        except EOFError:
            return
        connection.send(entry_of(name))


def entry_of(name: str) -> dict[str, Any]:
    """What the list says of one class."""
    import transformers

    from flexreason.proof.selftest import check, unpatched
    from flexreason.proof.shrink import default_config

    cls = getattr(transformers, name)
    entry = check(cls).to_dict()
    del entry["name"]
    entry["unpatched"] = {how: unpatched(cls, how) for how in IMPLEMENTATIONS}
    entry["registry"] = bool(cls._can_set_attn_implementation())
    try:
        entry["structure"] = structure_of(default_config(cls), cls)
    except Exception as error:
        entry["structure"] = f"unknown: {type(error).__name__}"
    return entry


# ---- docs/models.md


def table(written: dict[str, Any]) -> str:
    """The list for people."""
    models = written["models"]
    counts = Counter(entry["verdict"] for entry in models.values())
    routed = {name: entry for name, entry in models.items() if entry.get("registry")}
    lines = [
        "# Models",
        "",
        f"*Written by `flexreason models --scan --write` with transformers {written['transformers']} and torch "
        f"{written['torch']}. What `patch` reads is flexreason/proof/models.json, written by the same run.*",
        "",
        "Every class of causal language model that transformers has, built tiny from its default config (sizes cut, "
        "structure kept, every length constant so short that the row crosses it), in fp64: one pass over a row against "
        "the N samples, by the backends segments and dense. Exact: loss, every log-probability and every gradient to "
        '1e-9; the same holds for loss="chunked" and token_logprobs, where nothing else is said. Errors are relative; '
        "a gradient that is zero by construction is measured against all of them together. "
        "*Unpatched* is what a row does to the same model when nobody patched it, with eager and with sdpa attention: "
        "the error raised with labels, and without where that differs.",
        "",
        f"{len(models)} classes: {counts['exact']} exact, {counts['refused']} refused, "
        f"{counts['cannot be built tiny']} cannot be built tiny. Of the {len(routed)} whose attention goes through "
        f"transformers' registry, {sum(e['verdict'] == 'exact' for e in routed.values())} are exact.",
        "",
        "## Exact",
        "",
        "| class | special | loss | log-probabilities | gradients | unpatched |",
        "|---|---|---|---|---|---|",
    ]
    for name, entry in models.items():
        if entry["verdict"] == "exact":
            errors = " | ".join(f"{entry[key]:.0e}" for key in ("loss", "logprobs", "gradients"))
            lines.append(f"| {name} | {_special(entry)} | {errors} | {_unpatched(entry)} |")
    for verdict, title in (("refused", "Refused"), ("cannot be built tiny", "Cannot be built tiny")):
        lines += ["", f"## {title}", "", "| class | why | special | unpatched |", "|---|---|---|---|"]
        for name, entry in models.items():
            if entry["verdict"] == verdict:
                lines.append(f"| {name} | {_cell(entry['reason'])} | {_special(entry)} | {_unpatched(entry)} |")
    return "\n".join(lines) + "\n"


def _special(entry: dict[str, Any]) -> str:
    without = [f"no chunked loss ({entry['chunked_reason']})"] if entry.get("chunked") is False else []
    return _cell(", ".join([*entry["special"], *without]))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _unpatched(entry: dict[str, Any]) -> str:
    """The same outcome is said once: "RuntimeError", or "eager: A; sdpa: B (without labels: C)"."""
    said = {}
    for how, found in (entry.get("unpatched") or {}).items():
        if found:
            with_labels, without = found["with labels"], found["without labels"]
            said[how] = with_labels if with_labels == without else f"{with_labels} (without labels: {without})"
    if len(set(said.values())) == 1:
        return next(iter(said.values()))
    return "; ".join(f"{how}: {outcome}" for how, outcome in said.items()) or "not run"
