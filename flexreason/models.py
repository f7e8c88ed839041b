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
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from flexreason.selftest import Result

LIST = Path(__file__).parent / "models.json"
TABLE = Path(__file__).parent.parent / "docs" / "models.md"

PATIENCE = 120.0
"""Seconds that the scan gives one class."""

IMPLEMENTATIONS = ("eager", "sdpa")


@cache
def listed() -> dict[str, Any]:
    """The list as it was written: versions, and an entry a class."""
    return json.loads(LIST.read_text()) if LIST.exists() else {"transformers": "", "torch": "", "models": {}}


def proof(cls: "type[PreTrainedModel]", config: "PreTrainedConfig") -> "Result":
    """The verdict on a class with a config: from the list where it speaks of both, else from the self-test."""
    import transformers

    known = listed()["models"].get(cls.__name__)
    if cls.__module__.partition(".")[0] != "transformers" or listed()["transformers"] != transformers.__version__:
        known = None
    structure = structure_of(config)
    if known and known["structure"] == structure:
        return _result(cls.__name__, known)
    found = _tested(cls, structure, config)
    if found.verdict == "cannot be built tiny" and known and known["verdict"] != found.verdict:
        return _result(cls.__name__, known)
    return found


def _result(name: str, entry: dict[str, Any]) -> "Result":
    from flexreason.selftest import Result

    kept: dict[str, Any] = {k: v for k, v in entry.items() if k not in ("unpatched", "registry", "structure")}
    return Result(name, **kept)


_found: dict[tuple[type, str], "Result"] = {}


def _tested(cls: "type[PreTrainedModel]", structure: str, config: "PreTrainedConfig") -> "Result":
    """The self-test, once a process for each class and structure."""
    from flexreason.selftest import check

    if (cls, structure) not in _found:
        _found[cls, structure] = check(config, cls)
    return _found[cls, structure]


UNIMPORTANT = re.compile(
    "num_key_value_heads|tie_word|token_(id|ids|index)$|name_or_path|architectures|version|label|use_cache|dtype|initializer|eps$"
)
"""What configs of one structure may differ in."""


def structure_of(config: "PreTrainedConfig") -> str:
    """What is left of a config when sizes are cut and numbers that change no structure are left out; a short hash."""
    import hashlib

    from flexreason.shrink import shrink

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in sorted(value.items(), key=str) if not UNIMPORTANT.search(str(k))}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if isinstance(value, float) or (isinstance(value, int) and value > 1000):  # a theta, a factor, a scale
            return "number" if value else "none"
        return value if isinstance(value, int | str | None) else str(value)

    try:
        small = shrink(config).to_dict()
    except Exception as error:
        return f"unknown: {type(error).__name__}"
    return hashlib.sha256(json.dumps(plain(small), sort_keys=True).encode()).hexdigest()[:12]


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
    """One model: 0 only if it is exact."""
    from flexreason.selftest import check

    config, cls = find(options.model)
    found = proof(cls, config)
    special = found.special or check(config, cls).special
    segments = "segments"
    if slower := [why for why in ("softcap", "values and keys differ in head size") if why in special]:
        segments += f" (the slower route: {' and '.join(slower)})"
    told = {
        "model": options.model,
        **found.to_dict(),
        "special": special,
        "auto": {"cpu": segments, "gpu": "flex"} if found.verdict == "exact" else None,
    }
    if options.json:
        print(json.dumps(told, indent=1))
    else:
        print(f"{found.name}: {found.verdict}" + (f": {found.reason}" if found.reason else ""))
        if found.gradients is not None:
            print(f"  relative errors in fp64: {_numbers(told)}")
        print(f"  special: {', '.join(special) or 'nothing'}")
        if found.verdict == "exact":
            print(f'  backend="auto" takes {segments} on CPU, flex on GPUs')
        else:
            print("  patch refuses it" + ("" if found.verdict == "refused" else " until fr.verify has passed on it"))
    return 0 if found.verdict == "exact" else 1


def find(model: str) -> "tuple[PreTrainedConfig, type[PreTrainedModel]]":
    """The config and class of a name: a class of transformers, a folder, or a model on the hub."""
    import transformers

    from flexreason.shrink import class_of, default_config

    cls = getattr(transformers, model, None)
    if isinstance(cls, type) and getattr(cls, "config_class", None):
        return default_config(cls), cls
    try:
        config = transformers.AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"{model}: no class of transformers, and no config to be found: {str(error)[:300]}") from error
    return config, class_of(config)


def _numbers(entry: dict[str, Any]) -> str:
    return ", ".join(f"{key} {entry[key]:.0e}" for key in ("loss", "logprobs", "gradients"))


# ---- the scan


def _scan_command(options: argparse.Namespace) -> int:
    import torch
    import transformers

    from flexreason.shrink import causal_classes

    names, start = list(options.only) or causal_classes(), time.monotonic()
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

    from flexreason.selftest import check, unpatched
    from flexreason.shrink import default_config

    cls = getattr(transformers, name)
    entry = check(cls).to_dict()
    del entry["name"]
    entry["unpatched"] = {how: unpatched(cls, how) for how in IMPLEMENTATIONS}
    entry["registry"] = bool(cls._can_set_attn_implementation())
    try:
        entry["structure"] = structure_of(default_config(cls))
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
        f"{written['torch']}. What `patch` reads is flexreason/models.json, written by the same run.*",
        "",
        "Every class of causal language model that transformers has, built tiny from its default config (sizes cut, "
        "structure kept, every length constant so short that the row crosses it), in fp64: one pass over a row against "
        "the N samples, by the backends segments and dense. Exact: loss, every log-probability and every gradient to "
        "1e-9. Errors are relative; a gradient that is zero by construction is measured against all of them together. "
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
            lines.append(f"| {name} | {_cell(', '.join(entry['special']))} | {errors} | {_unpatched(entry)} |")
    for verdict, title in (("refused", "Refused"), ("cannot be built tiny", "Cannot be built tiny")):
        lines += ["", f"## {title}", "", "| class | why | special | unpatched |", "|---|---|---|---|"]
        for name, entry in models.items():
            if entry["verdict"] == verdict:
                special = _cell(", ".join(entry["special"]))
                lines.append(f"| {name} | {_cell(entry['reason'])} | {special} | {_unpatched(entry)} |")
    return "\n".join(lines) + "\n"


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
