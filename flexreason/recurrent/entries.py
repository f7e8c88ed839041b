"""How a model's recurrent layers find a tree: the functions that they call, by the names that transformers gives them.

Layers call functions of their module by name, and hand them the keywords that they were handed themselves. Each name is
made to mean a function of ours that looks for a tree among these keywords, and else calls what the name meant before,
with the same arguments. A keyword alone would not do: transformers' decorators drop those that a kernel does not name.

Whatever a layer could compute with is among the names: what runs on GPUs only, and whole layers in one function, too.
How many of them a model has to come to is counted, so that a layer that somebody replaced is not taken for one of ours.
"""

import functools
import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from flexreason.attention.registry import TREE, TreeRow
from flexreason.recurrent.convolution import convolve
from flexreason.recurrent.inline import hand_down, handed_down, lightning, zaya_projection
from flexreason.recurrent.scans import delta_rule, mamba2

Entry = Callable[..., Any]
"""What computes over a tree in the place of `stock`: (stock, tree, what stock was called with)."""


def _not_fused(stock: Callable, tree: TreeRow, *args: Any, **kwargs: Any) -> None:
    """Convolution and scan in one kernel, which takes no tree: a layer that is given None calls them one by one."""


def _one_token(stock: Callable, tree: TreeRow, *args: Any, **kwargs: Any) -> Any:
    raise ValueError(
        f"row: {getattr(stock, '__name__', 'a kernel')} computes one token behind a cache; pass a row without one"
    )


def _unmasked(stock: Callable, hidden_states: Any, attention_mask: Any) -> Any:
    """A row has padding behind all documents only, and no mask: traced, models hand on the one that says so."""
    is_row = attention_mask is not None and not attention_mask.shape[-1]
    return hidden_states if is_row else stock(hidden_states, attention_mask)


SCANS: dict[str, Entry] = {
    "torch_chunk_gated_delta_rule": delta_rule,
    "chunk_kimi_delta_attention": delta_rule,
    "mamba2_chunk_scan": mamba2,
}

COMPUTED: dict[str, Entry] = {"causal_conv1d_fn": convolve, **SCANS}
"""What every layer that names it comes to exactly once a row."""

ENTRIES: dict[str, Entry] = {
    **COMPUTED,
    "mamba2_split_conv1d_scan_combined": _not_fused,
    "causal_conv1d_update": _one_token,
    "torch_recurrent_gated_delta_rule": _one_token,
    "recurrent_kimi_delta_attention": _one_token,
    "mamba2_selective_state_update": _one_token,
}

UNMASKED = "apply_mask_to_padding_states"

INLINE: dict[str, Entry] = {"MiniMaxLightningAttention": lightning, "ZayaAttention": hand_down}
"""Classes of layers that compute a recurrence in their own forward: it is replaced in the same way."""


KINDS = {
    "torch_chunk_gated_delta_rule": "gated delta rule",
    "chunk_kimi_delta_attention": "KDA",
    "mamba2_chunk_scan": "Mamba-2",
    "causal_conv1d_fn": "short convolutions",
    "MiniMaxLightningAttention": "lightning attention",
    "ZayaAttention": "convolutions before attention",
}
"""What people call the layers that come to a name."""


def names_of(module: nn.Module) -> set[str]:
    """The names in `ENTRIES` and `INLINE` that a layer comes to."""
    forward: Any = getattr(type(module), "forward", None)  # which scripted modules do not have
    forward = inspect.unwrap(forward)
    called = set(getattr(getattr(forward, "__code__", None), "co_names", ())) & ENTRIES.keys()
    called &= getattr(forward, "__globals__", {}).keys()
    return called | ({kind.__name__ for kind in type(module).__mro__} & INLINE.keys())


def space_of(module: nn.Module) -> dict[str, Any]:
    """Where a layer's forward finds what it calls: the module of the class that has it."""
    return inspect.unwrap(type(module).forward).__globals__


def enter(module: nn.Module) -> set[str]:
    """Let a layer find trees, and all others of its class; which of the names it comes to once a row."""
    names = names_of(module)
    if names:
        space = space_of(module)
        for name in names & ENTRIES.keys():
            space[name] = finding(space[name], name, ENTRIES[name], handed=not takes_keywords(module))
        if UNMASKED in space:
            space[UNMASKED] = around(space[UNMASKED], _unmasked)
        for kind in type(module).__mro__:
            if kind.__name__ in INLINE:
                kind.forward = finding(kind.forward, kind.__name__, INLINE[kind.__name__])  # type: ignore[attr-defined]
        if "ZayaAttention" in names:
            projection: Any = type(module.qkv_proj)
            projection.forward = around(projection.forward, zaya_projection)
    return names & (COMPUTED.keys() | INLINE.keys())


def takes_keywords(module: nn.Module) -> bool:
    """Whether a layer takes any keywords, to hand them on. Those of LFM2 did not, in transformers 5.17."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(type(module).forward).parameters.values())


def finding(stock: Callable, name: str, entry: Entry, handed: bool = False) -> Callable:
    """A function that computes over the tree among its keywords, and else calls `stock`.

    Args:
        handed: whether the layer that calls it has no keywords, so that the tree is the one that was handed down.
    """

    def find(stock: Callable, *args: Any, **kwargs: Any) -> Any:
        tree = kwargs.pop(TREE, None) or (handed_down() if handed else None)
        return stock(*args, **kwargs) if tree is None else _over(tree, name, entry, stock, *args, **kwargs)

    return around(stock, find)


def around(stock: Callable, find: Callable) -> Callable:
    """A function that calls `find` with `stock` before its arguments, to find a tree; `stock` itself if it is one."""
    if getattr(stock, "finds_trees", False):
        return stock

    @functools.wraps(stock)
    def finder(*args: Any, **kwargs: Any) -> Any:
        return find(stock, *args, **kwargs)

    finder.finds_trees = True  # type: ignore[attr-defined]
    return finder


@torch.compiler.disable  # the count is not a compiler's business, and what follows goes by the row's plan
def _over(tree: TreeRow, name: str, entry: Entry, stock: Callable, *args: Any, **kwargs: Any) -> Any:
    tree.came[name] += name in COMPUTED or name in INLINE
    return entry(stock, tree, *args, **kwargs)


def expected(root: nn.Module) -> Counter[str]:
    """How often a row has to come to each of the names; all layers of a model find trees from now on."""
    for holder in root.modules():
        if any(names_of(layer) and not takes_keywords(layer) for layer in holder.children()):
            kind: Any = type(holder)
            kind.forward = finding(kind.forward, kind.__name__, hand_down)
    return Counter(name for module in root.modules() for name in enter(module))
