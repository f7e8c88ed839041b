"""Whether rows are exact on a model: asked of a tiny one of the same structure, in fp64, against the samples.

The row holds a conversation and a general tree whose branches leave before and behind every length that the small
config has (window, chunk, the original maximum of RoPE), packed side by side. Loss, every log-probability and every
gradient of one pass must be those of the N samples on the untouched model, to `EXACT`. A token that influences
another it must not see moves that one's log-probability, so leaks of any kind show there. 0.1 to 1 s, on one thread.
"""

import inspect
import random
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexreason.attention.registry import INSTEAD, TreeRow, attention_of, find_decoder
from flexreason.model import head
from flexreason.model.hooks import apply_patch, find_patch, unpatch
from flexreason.model.refuse import (
    OWN_LOSS,
    ROPE_BY_LONGEST,
    SOFTCAP,
    reason_against,
    reason_against_layers,
    rope_settings,
    rope_types,
)
from flexreason.proof import oracle
from flexreason.proof.compare import EXACT, Errors, compare, logprobs_pass, one_pass
from flexreason.proof.draws import SameDraws
from flexreason.proof.float64 import in_float64, true_float64
from flexreason.proof.sizes import ORIGINAL, SPECIAL, VOCABULARY
from flexreason.proof.tiny import build, class_of, default_config, shrink
from flexreason.recurrent.entries import KINDS, names_of
from flexreason.talk.telling import each
from flexreason.tree.layout import Layout, lay_out_turns, unmerge
from flexreason.tree.merge import lay_out
from flexreason.tree.row import Row, collate
from flexreason.tree.sample import Sample

BACKENDS = ("segments", "dense")

UNTESTED = "cannot be built tiny"
"""The verdict on what nobody could test; the others are "exact" and "refused"."""

IN_STORAGE = {  # what modules are called that look at neighbours in storage, past any mask
    "indexer": "a token indexer, which picks keys by scores of its own, past the tree's mask",
    "compressor": "compressed keys, which join neighbours in storage",
    "lightning": "linear attention, which carries state from token to token",
    "conv1d": "a convolution over neighbours in storage",
    "shortconv": "a convolution over neighbours in storage",
}


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
    notes = _Notes(describe(model))
    if against := reason_against(model):
        return Result(name, "refused", against[0], special=notes.special)
    try:
        with true_float64():
            largest: dict[str, Any] = _hold(model, notes, backends, both=is_own)
    except _Wrong as wrong:
        return Result(name, "refused", _cause(model, notes, str(wrong)), special=notes.special)
    except Exception as error:
        reason = f"the tiny model does not run: {said(error)}"
        return Result(name, UNTESTED, reason, special=notes.special)
    if not max(largest.values()) <= EXACT:
        numbers = ", ".join(f"{key} {error:.0e}" for key, error in largest.items())
        symptom = f"one pass is not the samples' (relative errors in fp64: {numbers})"
        cause = symptom if largest["logprobs"] <= EXACT else _cause(model, notes, symptom)
        if largest["logprobs"] <= EXACT < largest["loss"]:
            cause = f"its loss has more in it than its targets' log-probabilities, which are right: {symptom}"
        return Result(name, "refused", cause, **largest, special=notes.special)
    largest |= {"chunked": not notes.unchunked, "chunked_reason": notes.unchunked}
    return Result(name, "exact", **largest, special=notes.special)


class _Wrong(Exception):
    """A row was refused or computed otherwise than it should."""


@dataclass
class _Notes:
    """What is seen on the way."""

    special: list[str]
    reached: bool = False  # whether any attention of the model came to ours
    unchunked: str = ""  # why loss="chunked" is not the samples'

    def add(self, word: str) -> None:
        if word not in self.special:
            self.special.append(word)


def _hold(
    model: PreTrainedModel, notes: _Notes, backends: Sequence[str] = BACKENDS, both: bool = False
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
    modes: tuple[bool, ...], model: PreTrainedModel, notes: _Notes, backends: Sequence[str]
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


def _errors(model: PreTrainedModel, row: Row, samples: oracle.Reference, backend: str, notes: _Notes) -> Errors:
    try:
        with _noting(notes):
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


# ---- the rows


def rows_for(model: PreTrainedModel) -> tuple[list[list[Layout]], list[Layout] | None]:
    """Rows to hold, and a row that must be refused because its samples straddle RoPE's threshold."""
    mixed = [_conversation((11, 20, 5), (3, 0, 5), (20, 30, 9)), _tree()]
    kinds = rope_types(model.config.get_text_config()) & set(ROPE_BY_LONGEST)
    if not kinds:
        return [mixed], None
    short = [_conversation((5, 6, 7), (5, 6, 7)), _conversation((8, 9, 4))]
    long = [_conversation((ORIGINAL + 10, 6, 7), (5, 20, 7))]
    return [short] if "dynamic" in kinds else [short, long], mixed


def _ids(n: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(SPECIAL), k=n)


def _conversation(*shape: tuple[int, int, int]) -> Layout:
    return lay_out_turns(
        [(_ids(h, 3 * i), _ids(t, 3 * i + 1), _ids(r, 3 * i + 2)) for i, (h, t, r) in enumerate(shape)]
    )


def _tree() -> Layout:
    """Nested forks: early ones, and some behind all the lengths that `shrink` leaves."""
    a, b, c, d, e, stem = (_ids(n, 20 + n) for n in (9, 14, 6, 5, 11, 45))
    return lay_out(
        [
            Sample(a, b + c),
            Sample(a + c, d),
            Sample(a + c + d, e + b),
            Sample(a + c + d, e + c),
            Sample(a + stem, b),
            Sample(a + stem + c, d + e),
            Sample(a + stem[:30], e),
            Sample(d, a),
        ]
    )


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
    ids = torch.tensor([_ids(30, 0)])
    first, second = (model(input_ids=ids, use_cache=False).logits for _ in range(2))
    return not torch.equal(first, second)


# ---- what it says


def said(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def _cause(model: PreTrainedModel, notes: _Notes, symptom: str) -> str:
    """The symptom, and what the model has that would explain it."""
    for module in model.modules():
        kind = type(module).__name__
        if hasattr(module, "create_position_ids_from_input_ids"):
            return f"it counts positions from behind its padding id ({kind}): {symptom}"
        for word, meaning in IN_STORAGE.items():
            if word in kind.lower() and kind != "Conv1D":  # which is a linear layer
                return f"it has {meaning} ({kind}): {symptom}"
    if not (notes.reached or type(model)._can_set_attn_implementation()):
        return "it has attention code of its own, which no mask of ours reaches"
    if symptom.startswith(OURS):  # one of our own refusals, which says why
        return symptom.removeprefix(OURS)
    if "Asked" in symptom:
        return f"it makes more of its mask than a mask, and rows have none ({symptom})"
    if "position_ids" not in inspect.signature(find_decoder(model).forward).parameters:
        return f"it takes no positions, and counts places in storage: {symptom}"
    return symptom


OURS = "ValueError: row: "


@contextmanager
def _noting(notes: _Notes) -> Iterator[None]:
    """Write down what layers ask of attention while a row is on its way."""
    plain = TreeRow.attend

    def attend(self: TreeRow, q: Tensor, k: Tensor, v: Tensor, scale: float, **limits: Any) -> Tensor:
        notes.reached = True
        for key in ("window", "chunk", "softcap", "sinks"):
            if limits.get(key) is not None:
                notes.add(key)
        if q.shape[-1] != v.shape[-1]:
            notes.add("values and keys differ in head size")
        return plain(self, q, k, v, scale, **limits)

    TreeRow.attend = attend  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        TreeRow.attend = plain  # type: ignore[method-assign]


NOTED = {  # by what configs call it, where it is set
    "final_logit_softcapping": "final softcap",
    "logit_scale": "logit scale",
    "logits_scaling": "logit scale",
    "num_kv_shared_layers": "layers that share keys",
    "hidden_size_per_layer_input": "per-layer embeddings",
    "kv_lora_rank": "MLA",
    "attn_temperature_tuning": "temperature by position",
    "num_nextn_predict_layers": "multi-token prediction, left alone",
    "num_mtp_layers": "multi-token prediction, left alone",
}


def describe(model: nn.Module) -> list[str]:
    """What is special about a model, as far as its config and the names of its parts say."""
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    special = [meaning for key, meaning in NOTED.items() if getattr(config, key, None)]
    called = {name for module in model.modules() for name in names_of(module)}
    special += [kind for name, kind in KINDS.items() if name in called]
    names = {type(module).__name__.lower() for module in model.modules()}
    if any("expert" in name or "moe" in name for name in names):
        special.append("MoE")
    if any(re.search(r"\.(q_norm|k_norm|q_layernorm|qk_norm|query_layernorm)$", n) for n, _ in model.named_modules()):
        special.append("QK-norm")
    if any((part.get("partial_rotary_factor") or 1) != 1 for part in (vars(config), *rope_settings(config))):
        special.append("partial rotary")
    if any(not rope for rope in getattr(config, "no_rope_layers", None) or ()):
        special.append("NoPE layers")
    special += [f"RoPE {kind}" for kind in sorted(rope_types(config) - {"default"})]
    return list(dict.fromkeys(special))


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
    row = collate([_conversation((11, 20, 5), (3, 0, 5), (20, 30, 9))])
    without = {key: value for key, value in row.items() if "labels" not in key}
    return {"with labels": _outcome(model, row), "without labels": _outcome(model, without)}


@torch.no_grad()
def _outcome(model: PreTrainedModel, row: Row) -> str:
    try:
        model(**row)
    except Exception as error:  # any at all will do: the point is that it is not silent
        return type(error).__name__
    return "computed"
