"""Which models take rows exactly: the list of transformers' classes, one model by name or path, or a new scan.

A model by its class is told from that class's default config; a config of your own may differ from it.

    flexreason models Qwen3ForCausalLM
    flexreason models ./config.json
    flexreason models --scan --only Qwen3ForCausalLM LlamaForCausalLM
"""

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from flexreason.model.refuse import reason_against_config
from flexreason.proof.evidence import evidence_of_class, listed, newly_refused, since_the_list
from flexreason.proof.explain import said
from flexreason.proof.scan import scan, write
from flexreason.proof.selftest import check
from flexreason.proof.tiny import causal_classes, class_of, default_config
from flexreason.talk import telling
from flexreason.talk.nearest import did_you_mean
from flexreason.talk.sources import CONFIGS, class_like, why_missing, why_unusable


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
    the_list = listed()
    if options.json:
        print(json.dumps(the_list, indent=1))
        return 0
    by_verdict: dict[str, list[str]] = {}
    for name, entry in the_list["models"].items():
        by_verdict.setdefault(entry["verdict"], []).append(name)
    for verdict, names in sorted(by_verdict.items()):
        print(f"{verdict}: {len(names)}\n  " + "\n  ".join(names))
    print(f"with transformers {the_list['transformers']}, torch {the_list['torch']}")
    if since := since_the_list(the_list["transformers"]):
        print(f"The transformers here is {since} than that. The list holds for all classes whose code is the same in")
        print("both; any other is tested when it is first patched, or named here.")
    return 0


def _tell(options: argparse.Namespace) -> int:
    """One model: 0 only if it is exact, and its config too."""
    config, cls, is_default = find(options.model)
    if not is_default:
        _must_build(options.model, config, cls)
    result = evidence_of_class(cls, config)
    if newly := newly_refused(cls, config, result):
        result = replace(result, reason="; ".join(newly))
    against = reason_against_config(cls, config) if result.verdict == "exact" else None
    if against and not is_default:
        result = replace(result, verdict="refused", reason="; ".join(against), chunked=None)
    special = result.special or check(config, cls).special
    segments = "segments"
    if slower := [why for why in ("softcap", "values and keys differ in head size") if why in special]:
        segments += f" (the slower route: {' and '.join(slower)})"
    told = {
        "model": options.model,
        **asdict(result),
        "special": special,
        "auto": {"cpu": segments, "gpu": "flex"} if result.verdict == "exact" else None,
        "note": f"its default config is refused: {'; '.join(against)}" if against and is_default else "",
    }
    if options.json:
        print(json.dumps(told, indent=1))
    else:
        _print(told)
    return 0 if result.verdict == "exact" else 1


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


def find(model: str) -> tuple[PreTrainedConfig, type[PreTrainedModel], bool]:
    """The config and class of a name: a class of transformers (True: the config is its default), a folder, or a model
    on the hub."""
    cls = getattr(transformers, model, None)
    if isinstance(cls, type) and getattr(cls, "config_class", None):
        return default_config(cls), cls, True
    if why := why_missing(model):
        near = f"; did you mean {cls_name}?" if (cls_name := class_like(model)) and "/" not in model else f": {why}"
        raise ValueError(f"{model}: no class of transformers, and no config to be found{near}")
    try:
        config = transformers.AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        why = why_unusable(model, "config.json", CONFIGS, error)
        raise ValueError(
            f"{model}: no class of transformers, and no config to be found: {why}; give a folder"
        ) from error
    except Exception as error:  # whatever a config's own checks raise
        raise ValueError(f"{model}: its config cannot be used: {said(error)}; correct the config.json") from error
    return config, class_of(config), False


SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")


def _must_build(model: str, config: PreTrainedConfig, cls: type[PreTrainedModel]) -> None:
    """Raise if no model can be made of a config: its sizes are cut before the self-test, and so would go unnoticed."""
    text = config.get_text_config()
    for key in SIZES:
        value = getattr(text, key, None)
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{model}: its config cannot be used: {key} is {value}; expected at least 1")
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            cls(config)
    except Exception as error:  # whatever a class raises
        raise ValueError(
            f"{model}: {cls.__name__} cannot be built from its config: {said(error)}; correct the config.json"
        ) from error


def _numbers(entry: dict[str, Any]) -> str:
    return ", ".join(f"{key} {entry[key]:.0e}" for key in ("loss", "logprobs", "gradients"))


def _scan_command(options: argparse.Namespace) -> int:
    names, start = list(options.only) or causal_classes(), time.monotonic()
    if unknown := [name for name in names if not getattr(getattr(transformers, name, None), "config_class", None)]:
        hint = did_you_mean(unknown[0], causal_classes()) or "; flexreason models lists them"
        raise ValueError(f"--only: transformers has no model of the name {', '.join(unknown)}{hint}")
    entries: dict[str, Any] = {}
    for name, entry in telling.each(scan(names), "testing all classes", len(names), "classes"):
        entries[name] = entry
        line = f"{len(entries):>4}/{len(names)} {time.monotonic() - start:5.0f} s  {name:<44} {entry['verdict']}"
        with telling.aside():
            print(f"{line:<100}  {entry['reason']}"[:240], file=sys.stderr, flush=True)
    written = {
        "transformers": transformers.__version__,
        "torch": torch.__version__.partition("+")[0],
        "models": entries,
    }
    if options.write:
        write(written)
    if options.json:
        print(json.dumps(written, indent=1))
    counts = Counter(entry["verdict"] for entry in entries.values())
    print(", ".join(f"{verdict}: {n}" for verdict, n in sorted(counts.items())), file=sys.stderr)
    return 0
