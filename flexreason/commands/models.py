"""Which models take rows exactly: the list of transformers' classes, one model by name or path, or a new scan."""

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from flexreason.proof.evidence import listed, proof
from flexreason.proof.scan import scan, write

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


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
    if (here := version("transformers")) != found["transformers"]:
        print(f"here is transformers {here}: a class whose files are others there is tested when it is first patched")
    return 0


def _tell(options: argparse.Namespace) -> int:
    """One model: 0 only if it is exact, and its config too."""
    from flexreason.model.refuse import reason_against_config
    from flexreason.proof.selftest import check

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

    from flexreason.proof.tiny import class_of, default_config

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


def _scan_command(options: argparse.Namespace) -> int:
    import torch
    import transformers

    from flexreason.proof.tiny import causal_classes

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
        write(written)
    if options.json:
        print(json.dumps(written, indent=1))
    counts = Counter(entry["verdict"] for entry in found.values())
    print(", ".join(f"{verdict}: {n}" for verdict, n in sorted(counts.items())), file=sys.stderr)
    return 0
