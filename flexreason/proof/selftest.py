"""Whether rows are exact on a model: asked of a tiny one of the same structure, in fp64, against the samples.

The row holds a conversation and a general tree whose branches leave before and behind every length that the small
config has (window, chunk, the original maximum of RoPE), packed side by side. Loss, every log-probability and every
gradient of one pass must be those of the N samples on the untouched model, to `EXACT`. A token that influences
another it must not see moves that one's log-probability, so leaks of any kind show there. 0.1 to 1 s, on one thread.
"""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedModel

from flexreason.attention.registry import INSTEAD, attention_of
from flexreason.model import head
from flexreason.model.hooks import apply_patch, find_patch, unpatch
from flexreason.model.refuse import (
    OWN_LOSS,
    SOFTCAP,
    reason_against,
    reason_against_layers,
)
from flexreason.proof import oracle
from flexreason.proof.compare import EXACT, Errors, compare, logprobs_pass, one_pass
from flexreason.proof.draws import SameDraws
from flexreason.proof.explain import Notes, cause_of, describe, noting, said
from flexreason.proof.float64 import in_float64, true_float64
from flexreason.proof.rows import conversation, rows_for, some_ids
from flexreason.proof.sizes import VOCABULARY
from flexreason.proof.tiny import build, class_of, default_config, shrink
from flexreason.talk.telling import each
from flexreason.tree.layout import Layout, unmerge
from flexreason.tree.row import Row, collate

BACKENDS = ("segments", "dense")

UNTESTED = "cannot be built tiny"
"""The verdict on what nobody could test; the others are "exact" and "refused"."""


@dataclass(frozen=True)
class Result:
    """What the self-test found. Errors are relative, and None where it did not come to numbers."""

    name: str
    verdict: str
    reason: str = ""
    loss: float | None = None
    logprobs: float | None = None
    gradients: float | None = None
    special: list[str] = field(default_factory=list)
    chunked: bool | None = None
    """Whether loss="chunked" and token_logprobs are exact too."""
    chunked_reason: str = ""


@contextmanager
def _apart() -> Iterator[None]:
    """Whatever the caller has set for a model of its own: it is neither used nor changed.

    One thread is enough for tensors so small. With more, they wait for each other wherever something else uses the
    cores, other ranks most of all: 0.3 s become 9.
    """
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    with (
        warnings.catch_warnings(),
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)


@_apart()
def check(
    what: Any,
    cls: type[PreTrainedModel] | None = None,
    backends: Sequence[str] = BACKENDS,
    switches: Mapping[str, float] = MappingProxyType({}),
) -> Result:
    """The verdict on a config, or on a class with its default config. Never raises, and leaves no trace.

    Args:
        switches: what buffers of one number hold, by name, where that is not what the class begins with.
    """
    name = getattr(cls or what, "__name__", type(what).__name__)
    try:
        if isinstance(what, type):
            what, cls = default_config(what), what
        cls = cls or class_of(what)
        name = cls.__name__
        if layers := reason_against_layers(cls, what.get_text_config()):
            return Result(name, "refused", layers)
        is_own = cls.__module__.partition(".")[0] != "transformers"
        small = shrink(what, every_layer=is_own)
        if getattr(small, SOFTCAP, None) or attention_of(what) == "eager":
            small._attn_implementation = "eager"  # by default it is sdpa below transformers 5.21, which has no softcap
        model = build(small, cls)
        for key, buffer in model.named_buffers():
            if key in switches:
                buffer.fill_(switches[key])
        in_float64(model)
    except Exception as error:  # whatever a config or class raises: it cannot be tested, and that is the answer
        return Result(name, UNTESTED, said(error))
    notes = Notes(describe(model))
    if against := reason_against(model):
        return Result(name, "refused", against[0], special=notes.special)
    try:
        with true_float64():
            largest: dict[str, Any] = _hold(model, notes, backends, both=is_own)
    except _Wrong as wrong:
        return Result(name, "refused", cause_of(model, notes, str(wrong)), special=notes.special)
    except Exception as error:
        reason = f"the tiny model does not run: {said(error)}"
        return Result(name, UNTESTED, reason, special=notes.special)
    if not max(largest.values()) <= EXACT:
        numbers = ", ".join(f"{key} {error:.0e}" for key, error in largest.items())
        symptom = f"one pass is not the samples' (relative errors in fp64: {numbers})"
        cause = symptom if largest["logprobs"] <= EXACT else cause_of(model, notes, symptom)
        if largest["logprobs"] <= EXACT < largest["loss"]:
            cause = f"its loss has more in it than its targets' log-probabilities, which are right: {symptom}"
        return Result(name, "refused", cause, **largest, special=notes.special)
    largest |= {"chunked": not notes.unchunked, "chunked_reason": notes.unchunked}
    return Result(name, "exact", **largest, special=notes.special)


class _Wrong(Exception):
    """A row was refused or computed otherwise than it should."""


def _hold(
    model: PreTrainedModel, notes: Notes, backends: Sequence[str] = BACKENDS, both: bool = False
) -> dict[str, float]:
    """The largest errors of one pass over every row, against the samples: in training, or in both modes."""
    modes = (True, False) if both else (True,)
    if not _is_random(model):
        return _hold_in(modes, model, notes, backends)
    notes.add("draws at random in training")
    with SameDraws():
        if not _is_random(model):
            return _hold_in(modes, model, notes, backends)
    if both:
        raise ValueError("two training passes differ, though all draws are the same: it keeps what it saw")
    return _hold_in((False,), model, notes, backends)


def _hold_in(
    modes: tuple[bool, ...], model: PreTrainedModel, notes: Notes, backends: Sequence[str]
) -> dict[str, float]:
    rows, straddling = rows_for(model)
    largest = {"loss": 0.0, "logprobs": 0.0, "gradients": 0.0}
    tests = [(training, layouts) for training in modes for layouts in rows]
    for training, layouts in each(tests, f"testing a tiny {type(model).__name__}", len(tests), "rows"):
        model.train(training)
        samples = oracle.n_samples(model, [sample for layout in layouts for sample in unmerge(layout)])
        if not torch.cat(samples.logprobs).isfinite().all():
            raise ValueError("its random weights give log-probabilities that are not finite")
        row = collate(layouts)
        for backend in backends:
            errors = _errors(model, row, samples, backend, notes).largest()
            largest = {key: max(error, errors[key]) for key, error in largest.items()}
        notes.unchunked = notes.unchunked or _unchunked(model, row, samples)
    if straddling is not None:
        _must_refuse(model, straddling)
        notes.add("refused where samples straddle RoPE's threshold")
    return largest


def _errors(model: PreTrainedModel, row: Row, samples: oracle.Reference, backend: str, notes: Notes) -> Errors:
    try:
        with noting(notes):
            patch = find_patch(apply_patch(model, backend))
            errors = compare(one_pass(model, row), samples)
        if patch is not None and patch.own_loss:
            notes.unchunked = f"it {OWN_LOSS}"
        return errors
    except Exception as error:
        raise _Wrong(said(error).removesuffix(INSTEAD)) from error  # whoever is told of it is told that too
    finally:
        unpatch(model)


CHUNK = 16
"""Targets a chunk of the head while it is tested, so that a row has several."""


def _unchunked(model: PreTrainedModel, row: Row, samples: oracle.Reference) -> str:
    """Why loss="chunked" or token_logprobs are not the samples', or nothing."""
    try:
        with _small_chunks():
            apply_patch(model, "segments", loss="chunked")
            by_loss = compare(one_pass(model, row), samples).largest()
            by_logprobs = compare(logprobs_pass(model, row), samples).largest()
    except Exception as error:
        return re.sub(r'^ValueError: (row|patch: loss="chunked"): ', "", said(error))
    finally:
        unpatch(model)
    errors = {**by_loss, "gradients of logprobs": by_logprobs["gradients"]}
    wrong = ", ".join(f"{key} {error:.0e}" for key, error in errors.items() if not error <= EXACT)
    return f"a chunk at a time it is not the samples' (relative errors in fp64: {wrong})" if wrong else ""


@contextmanager
def _small_chunks() -> Iterator[None]:
    """Several chunks to a row; and fp64 is true in those that run again during backward, too."""
    size, sweep = head.CHUNK_LOGITS, head.sweep

    def truly(*args: Any, **kwargs: Any) -> head.Swept:
        with true_float64():
            return sweep(*args, **kwargs)

    head.CHUNK_LOGITS, head.sweep = CHUNK * VOCABULARY, truly
    try:
        yield
    finally:
        head.CHUNK_LOGITS, head.sweep = size, sweep


def _must_refuse(model: PreTrainedModel, layouts: list[Layout]) -> None:
    try:
        with torch.no_grad():
            apply_patch(model)(**collate(layouts))
    except ValueError as error:
        if "changes with the longest" in str(error):
            return
        raise _Wrong(said(error)) from error
    finally:
        unpatch(model)
    raise _Wrong("its RoPE changes with the longest sample of a row, and a row on both sides of that was not refused")


@torch.no_grad()
def _is_random(model: PreTrainedModel) -> bool:
    """Whether two training passes differ though the dropout that its config names is off."""
    model.train()
    ids = torch.tensor([some_ids(30, 0)])
    first, second = (model(input_ids=ids, use_cache=False).logits for _ in range(2))
    return not torch.equal(first, second)


# ---- what becomes of a row when nobody patched the model


@_apart()
def unpatched(cls: type[PreTrainedModel], implementation: str) -> dict[str, str] | None:
    """What a row does to a model that is not patched: an exception's name, or "computed"; None if there is no model."""
    try:
        small = shrink(default_config(cls))
        small._attn_implementation = implementation
        model = build(small, cls)
    except Exception:
        return None
    row = collate([conversation((11, 20, 5), (3, 0, 5), (20, 30, 9))])
    without = {key: value for key, value in row.items() if "labels" not in key}
    return {"with labels": _outcome(model, row), "without labels": _outcome(model, without)}


@torch.no_grad()
def _outcome(model: PreTrainedModel, row: Row) -> str:
    try:
        model(**row)
    except Exception as error:  # any at all will do: the point is that it is not silent
        return type(error).__name__
    return "computed"
