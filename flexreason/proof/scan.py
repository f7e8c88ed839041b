"""Which classes of transformers take rows exactly: every one tried in turn, and the list that is made of it.

`flexreason models --scan` runs it; `--write` makes what was found the list that `patch` reads, and docs/models.md.
"""

import json
import multiprocessing
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import transformers

from flexreason.proof.evidence import LIST, listed, structure_of
from flexreason.proof.selftest import UNTESTED, check, unpatched
from flexreason.proof.source import source_of
from flexreason.proof.tiny import default_config
from flexreason.recurrent.entries import KINDS
from flexreason.talk.interrupt import deaf

TABLE = Path(__file__).parents[2] / "docs" / "models.md"

PATIENCE = 120.0
"""Seconds that the scan gives one class."""

IMPLEMENTATIONS = ("eager", "sdpa")

RECURRENT = {*KINDS.values()}


def scan(names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every class in turn, in a process of its own that is replaced when a class crashes it or takes too long."""
    context = multiprocessing.get_context("spawn")
    worker = None
    try:
        for name in names:
            if worker is None:
                here, there = context.Pipe()
                worker = context.Process(target=_serve, args=(there,), daemon=True)
                with deaf():
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
                yield name, {"verdict": UNTESTED, "reason": reason, "special": [], "unpatched": {}}
    finally:
        if worker is not None:
            worker.kill()
            worker.join()


def _serve(connection: Any) -> None:
    """What the scan's process does: names in, entries out."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    while True:
        try:
            name = connection.recv()
        except EOFError:
            return
        connection.send(entry_of(name))


def entry_of(name: str) -> dict[str, Any]:
    """What the list is to say of one class."""
    cls = getattr(transformers, name)
    entry = asdict(check(cls))
    del entry["name"]
    entry["unpatched"] = {how: unpatched(cls, how) for how in IMPLEMENTATIONS}
    entry["registry"] = bool(cls._can_set_attn_implementation())
    try:
        config = default_config(cls)
        entry["structure"] = structure_of(config, cls)
        entry["source"] = source_of(cls, config, entry["structure"])
    except Exception as error:
        entry |= {"structure": f"unknown: {type(error).__name__}", "source": ""}
    return entry


def write(written: dict[str, Any]) -> None:
    """Make this the list, from now on."""
    texts = {LIST: json.dumps(written, indent=1) + "\n"}
    if TABLE.parent.is_dir():  # in a checkout
        texts[TABLE] = table(written)
    for path, text in texts.items():
        path.with_name(f"{path.name}.unfinished").write_text(text)
    for path in texts:  # all of them, or none
        path.with_name(f"{path.name}.unfinished").replace(path)
    listed.cache_clear()


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
        "Under another transformers the list holds for the classes whose files are equal to those tested here; the "
        "others are tested when they are first patched ([patching.md](patching.md)).",
        "",
        f"{len(models)} classes: {counts['exact']} exact, {counts['refused']} refused, "
        f"{counts[UNTESTED]} cannot be built tiny. Of the {len(routed)} whose attention goes through "
        f"transformers' registry, {sum(e['verdict'] == 'exact' for e in routed.values())} are exact. "
        f"{sum(e['verdict'] == 'exact' and bool(RECURRENT & {*e['special']}) for e in models.values())} of the exact "
        "ones have recurrent layers ([hybrids.md](hybrids.md)).",
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
    for verdict, title in (("refused", "Refused"), (UNTESTED, "Cannot be built tiny")):
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
    outcomes = {}
    for how, found in (entry.get("unpatched") or {}).items():
        if found:
            with_labels, without = found["with labels"], found["without labels"]
            outcomes[how] = with_labels if with_labels == without else f"{with_labels} (without labels: {without})"
    if len(set(outcomes.values())) == 1:
        return next(iter(outcomes.values()))
    return "; ".join(f"{how}: {outcome}" for how, outcome in outcomes.items()) or "not run"
