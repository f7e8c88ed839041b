"""What holds a model: a wrapper of somebody's own may give it other embeddings than those of its tokens.

Embeddings that a wrapper made may be of several tokens each, in storage. Nothing of that is seen from inside the model,
so such a row is refused until `fr.verify` has passed on the wrapper.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from flexreason.model.find import WRAPPERS, is_of

KNOWN = (*WRAPPERS, "deepspeed", "transformers", "trl")
"""Packages whose wrappers hand on what they are given; adapters that do otherwise are refused by name."""

_holders: WeakKeyDictionary[nn.Module, list[type]] = WeakKeyDictionary()
"""Of patched models: the classes of what holds them, but for known ones."""

_verified: set[Any] = set()
"""The forwards of wrappers that `fr.verify` passed on."""

_verifying: ContextVar[bool] = ContextVar("flexreason_verifying", default=False)


def note_holders(root: nn.Module, holders: list[nn.Module]) -> None:
    own = [type(holder) for holder in holders if not is_of(type(holder).__module__, KNOWN)]
    _holders[root] = own


def note_verified_holders(root: nn.Module) -> None:
    """Wrappers of these classes may make embeddings until the process ends."""
    _verified.update(kind.forward for kind in _holders.get(root, ()))  # type: ignore[attr-defined]


@contextmanager
def verifying() -> Iterator[None]:
    """Embeddings of a wrapper's own are taken meanwhile: to find out whether they are exact."""
    token = _verifying.set(True)
    try:
        yield
    finally:
        _verifying.reset(token)


def is_verifying() -> bool:
    return _verifying.get()


def refuse_embeddings(root: nn.Module, given: Mapping[str, Any]) -> None:
    """Raise if a row came with embeddings in the place of its tokens from a wrapper that nobody has verified."""
    if given.get("input_ids") is not None or given.get("inputs_embeds") is None or _verifying.get():
        return
    for kind in _holders.get(root, ()):
        if kind.forward not in _verified:  # type: ignore[attr-defined]
            raise ValueError(
                f"row: it came with inputs_embeds through {kind.__name__}, which holds the model and may have made "
                "them of several tokens each; hand input_ids on, or run fr.verify on it: once that has passed, such "
                "rows are taken until the process ends"
            )
