"""Whether one model is shown to be exact: by the list, by the self-test, or since `verify` passed on it."""

from torch import nn
from transformers import PreTrainedModel

from flexreason.model.refuse import SAMPLES, Reason, model_class, reason_against, reason_against_adapters, refusal
from flexreason.proof import evidence
from flexreason.proof.parts import foreign, parts_of, replaced_parts
from flexreason.proof.selftest import Result

UNTESTED = "cannot be built tiny"
"""The verdict on what nobody could test."""

_trusted: set[tuple] = set()
"""What `fr.verify` passed on, though no test could: class, structure, and what the model is made of."""


def ask(root: PreTrainedModel, backend: str) -> str:
    """Raise if the model is not shown to be exact; where it is, why not in chunks, or nothing."""
    found = _proof(root, backend)
    if doubt := _doubt(root, found):
        raise refusal(root, doubt)
    return _unchunked(found)


def _doubt(root: PreTrainedModel, found: Result) -> Reason | None:
    """Why a model is not taken, after what was found of its class."""
    if found.verdict == "exact":
        changed = replaced_parts(root)
        doubt = changed and f"parts of it were replaced, which no tiny model of its class has: {changed}"
    elif found.verdict == "refused":
        return found.reason, SAMPLES
    else:
        doubt = "nobody has shown it to be exact, and no tiny model of its structure can be built to try "
        doubt += f"({found.reason})"
    if not doubt or _kind(root) in _trusted:
        return None
    return doubt, "run fr.verify on it: once that has passed, patch takes such models until the process ends"


def reason_against_chunks(root: PreTrainedModel) -> str:
    """Why loss="chunked" and token_logprobs are not the samples', as the list or the self-test says; or nothing."""
    return _unchunked(_proof(root))


def _unchunked(found: Result) -> str:
    return found.chunked_reason if found.chunked is False else ""


def standing(root: PreTrainedModel, model: nn.Module | None = None) -> tuple[str, str] | None:
    """What `patch` would say of a model that nobody has trusted: a verdict, "refused" or "cannot be built tiny", and
    the reason; None where it is exact."""
    if against := reason_against_adapters(model or root) or reason_against(root):
        return "refused", against[0]
    found = _proof(root)
    if found.verdict != "exact":
        return found.verdict, found.reason
    changed = replaced_parts(root)
    return (UNTESTED, f"parts of it were replaced: {changed}") if changed else None


def trust(root: PreTrainedModel) -> None:
    """`fr.verify` passed on this model: until the process ends, those of its class, structure and parts are taken where
    no tiny one can be tested. It counts for nothing against a test that failed."""
    _trusted.add(_kind(root))


def _kind(root: PreTrainedModel) -> tuple:
    cls = model_class(root)
    return cls, evidence.structure_of(root.config, cls), frozenset(parts_of(root))


def _proof(root: PreTrainedModel, backend: str = "auto") -> Result:
    """What the list of classes says, or else the self-test on a tiny model of the same structure."""
    return evidence.proof(model_class(root), root.config, edited=foreign(parts_of(root)), backend=backend)
