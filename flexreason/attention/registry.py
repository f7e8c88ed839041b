"""How a model's layers find a tree: attention implementations under names of our own, which only they read.

Ours compute a tree where they are handed one, and otherwise do what the implementation of the plain name does. The mask
function under each name does likewise: for a row it makes no mask, but notes what kind of mask the model asked
for. The model hands that on to its layers in the mask's place, so a layer's window is the one that its own mask
would have had, whatever its config or its keywords say.

A layer reads the name from its config, and so does everybody else. So the config is left as it is, and layers are given
a `Renamed` view of it: the same attributes, in the same dict, and another name of the implementation.

Shapes: S tokens, T targets, H query heads, G key heads, D head size.
"""

import contextlib
import inspect
from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flexreason.attention import dense, flex, segments
from flexreason.attention.eager import eager_of

BACKENDS: dict[str, ModuleType] = {"flex": flex, "segments": segments, "dense": dense}

IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")
"""What a model may use, and goes on using for ordinary batches."""

NAME = "flexreason"
"""What the names of our attention implementations begin with."""

INSTEAD = "; train on the N samples"
"""What can be done with a model that cannot take rows."""

TREE = "flexreason_tree"
"""The keyword that carries a `TreeRow` to the layers."""


def choose_backend(wanted: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that computes rows on `device`, for weights of `dtype`: "auto" chooses flex on a GPU, and segments
    elsewhere and for float64, which flex cannot compute."""
    if wanted != "auto":
        return wanted
    return "flex" if device.type == "cuda" and dtype != torch.float64 else "segments"


def computes(backend: str, mask: str) -> bool:
    """Whether a backend can compute a mask: segments knows the tree alone."""
    return mask == "interval" or backend != "segments"


@dataclass(eq=False)
class TreeRow:
    """A row on its way through the layers: the one object of a forward pass that they are handed.

    It is a keyword argument, and neither a global nor an attribute of the model: so it survives gradient checkpointing,
    which runs a layer again during backward, and wrapping by other libraries.
    """

    row: dict[str, Tensor]  # MASK_KEYS, each [1, S]
    target_source: Tensor  # [1, T]
    backend: str
    mask: str
    root: Any = None  # the model whose row it is: others may share its layers
    tables: dict[tuple[int | None, int | None], Any] = field(default_factory=dict)
    plan: Any = None  # in which pieces recurrent layers compute it
    came: Counter[str] = field(default_factory=Counter)  # how often recurrent layers brought it to each function

    @property
    def length(self) -> int:
        return self.row["until"].shape[1]

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None = None,
        chunk: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of one layer over the tree, [1, S, H, E]. Layers with the same limits share their tables.

        In memory it lies as transformers' own attention gives it, since some layers go on with a view of it.
        """
        backend = BACKENDS[self.backend]
        return backend.attend(q, k, v, self.table(window, chunk), scale, softcap, sinks).contiguous()

    @torch.compiler.disable
    def table(self, window: int | None, chunk: int | None) -> Any:
        if (window, chunk) not in self.tables:
            self.tables[window, chunk] = BACKENDS[self.backend].prepare(self.row, self.mask, window, chunk)
        return self.tables[window, chunk]


current_tree: ContextVar[TreeRow | None] = ContextVar("flexreason_tree", default=None)
"""The row that is on its way through a decoder, for its mask function to find. Layers are handed it instead."""


@dataclass(frozen=True)
class Asked:
    """The mask that a model asked for, for a row: causal, within a window, or within chunks.

    It carries the tree too, since some models hand their layers a mask and no other keywords.
    """

    window: int | None = None
    chunk: int | None = None
    tree: TreeRow | None = field(default=None, compare=False, repr=False)

    def allows(self, q: int, kv: int) -> bool:
        """Whether a token at position q of a plain sequence sees the one at kv."""
        near = self.window is None or q - kv < self.window
        return kv <= q and near and (self.chunk is None or q // self.chunk == kv // self.chunk)


def find_decoder(root: PreTrainedModel) -> nn.Module:
    """The model below the head that the head's forward calls: `base_model`, except where

    - that is lost (Llama 4 names it otherwise): then the one part that is a model;
    - the forward goes past it (OPT, and the decoders of encoder-decoder families): then its `decoder`.
    """
    decoder = root.base_model
    if decoder is root:
        models = [part for part in root.children() if isinstance(part, PreTrainedModel)]
        decoder = models[0] if len(models) == 1 else root
    inner = getattr(decoder, "decoder", None)
    if isinstance(inner, PreTrainedModel):
        with contextlib.suppress(OSError, TypeError):  # no source to read
            if f"self.{root.base_model_prefix}.decoder(" in inspect.getsource(type(root).forward):
                return inner
    return decoder


def empty_mask(device: torch.device) -> Tensor:
    """What stands for a row's mask until the mask function sees it: [1, 0]."""
    return torch.empty(1, 0, device=device)


class Renamed:
    """A view of a config for a patched model's layers: it names our attention implementation, and is else the config
    itself, also when that is changed. Views are made by `renamed`."""

    __slots__ = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Not the config's own, which would make a new kind of config of a view."""

    @property
    def _attn_implementation_internal(self) -> str | None:
        return vars(self)["_attn_implementation_internal"]

    @_attn_implementation_internal.setter
    def _attn_implementation_internal(self, name: str | None) -> None:
        """A model built from a view reads our name and writes it back, into what is the config's too."""
        vars(self)["_attn_implementation_internal"] = name and name.removeprefix(f"{NAME}_")

    @property
    def _attn_implementation(self: Any) -> str | None:
        plain = self._attn_implementation_internal
        return f"{NAME}_{plain}" if plain in IMPLEMENTATIONS else plain

    @_attn_implementation.setter
    def _attn_implementation(self: Any, value: Any) -> None:
        super(Renamed, type(self))._attn_implementation.fset(self, value)  # type: ignore[misc]

    def __eq__(self: Any, other: object) -> bool:
        return self.plain_config == getattr(other, "plain_config", other)

    def __reduce_ex__(self: Any, protocol: Any) -> tuple:
        return renamed, (self.plain_config,)


def attention_of(config: Any) -> str | None:
    """The attention implementation that a config names, by its plain name."""
    return getattr(config, "_attn_implementation_internal", getattr(config, "_attn_implementation", None))


def renamed(config: PreTrainedConfig) -> Any:
    """The view of a config that a patched model's layers are given."""
    for plain in IMPLEMENTATIONS:
        if plain in ALL_MASK_ATTENTION_FUNCTIONS and f"{NAME}_{plain}" not in ALL_ATTENTION_FUNCTIONS:
            AttentionInterface.register(f"{NAME}_{plain}", _attention(plain))
            AttentionMaskInterface.register(f"{NAME}_{plain}", _mask(ALL_MASK_ATTENTION_FUNCTIONS[plain]))
    parts = tuple(name for name, value in vars(config).items() if isinstance(value, PreTrainedConfig))
    view: Any = object.__new__(_renamed_class(type(config), parts))  # type: ignore[arg-type]
    object.__setattr__(view, "__dict__", vars(config))
    object.__setattr__(view, "plain_config", config)
    return view


@cache
def _renamed_class(cls: Any, parts: tuple[str, ...]) -> type:
    """`parts` are the configs within a config, such as that of a text model: seen through the view, they are views."""
    own = {"__slots__": ("plain_config",), "__module__": cls.__module__}
    return type(cls.__name__, (Renamed, cls), {**own, **{name: _part(name) for name in parts}})


def _part(name: str) -> property:
    def get(self: Any) -> Any:
        return renamed(vars(self)[name])

    def put(self: Any, value: Any) -> None:
        vars(self)[name] = value

    return property(get, put)


def _mask(stock: Callable) -> Callable:
    """The mask function under a name of ours: for a row it notes what is asked for, else it does what `stock` does."""

    def mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if attention_mask is not None and attention_mask.dim() == 2 and not attention_mask.shape[1]:
            return _asked(**kwargs)
        return stock(*args, attention_mask=attention_mask, **kwargs)

    return mask


@torch.compiler.disable
def _asked(*, mask_function: Callable, local_size: int | None = None, **kwargs: Any) -> Asked:
    """Tell causal masks, windows and chunks apart by asking at a few places, and refuse any other."""
    size = 10**6 if local_size is None else local_size
    places = [(0, 0), (1, 0), (0, 1), (size - 1, 0), (size, 0), (size, 1), (size, size - 1), (size, size)]
    places += [(size + 7, 8), (size + 8, 8), (2 * size - 1, size), (2 * size, size), (2 * size, 2 * size - 1)]
    zero = torch.zeros((), dtype=torch.int64)
    try:
        visible = [bool(mask_function(zero, zero, zero + q, zero + kv)) for q, kv in places]
    except IndexError:
        raise ValueError(
            f"row: the model asks for a mask that depends on the tokens; it cannot take rows{INSTEAD}"
        ) from None
    tree = current_tree.get()
    candidates = [Asked(tree=tree)]
    if local_size is not None:
        candidates = [Asked(window=size, tree=tree), Asked(chunk=size, tree=tree)]
    for asked in candidates:
        if visible == [asked.allows(q, kv) for q, kv in places]:
            return asked
    raise ValueError(
        "row: the model asks for a mask that is neither causal, nor a causal window, nor causal chunks; it cannot take "
        f"rows{INSTEAD}"
    )


def _attention(previous: str) -> Callable:
    """The attention under a name of ours: over a tree where a layer is handed one, else that of the plain name."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        tree = kwargs.pop(TREE, None) or getattr(attention_mask, "tree", None)
        if tree is not None:
            return _tree_attention(module, query, key, value, attention_mask, tree, *args, **kwargs), None
        if isinstance(attention_mask, Asked) or (isinstance(attention_mask, Tensor) and not attention_mask.numel()):
            raise ValueError(
                f"row: it reached {type(module).__name__} without its tree; the model is not patched, or makes "
                "masks in a way of its own, and cannot take rows; call fr.patch(model) first"
            )
        stock = eager_of(module) if previous == "eager" else ALL_ATTENTION_FUNCTIONS[previous]
        return stock(module, query, key, value, attention_mask, *args, **kwargs)

    return attention


def _tree_attention(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    asked: Any,
    tree: TreeRow,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> Tensor:
    name = type(module).__name__
    if not isinstance(asked, Asked):
        raise ValueError(f"row: the mask of {name} is made in a way of the model's own; it cannot take rows{INSTEAD}")
    if dropout:
        raise ValueError(
            f"row: {name} has attention dropout {dropout}, of which one draw cannot serve all samples; set it to 0"
        )
    if position_bias is not None:
        raise ValueError(f"row: {name} adds a position bias to its scores, which is not supported{INSTEAD}")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise ValueError(f"row: {name} is not causal{INSTEAD}")
    if q.shape[2] != tree.length or k.shape[2] != tree.length:
        raise ValueError(
            f"row: {name} has {q.shape[2]} queries and {k.shape[2]} keys for {tree.length} tokens{INSTEAD}"
        )
    if q.dtype != v.dtype:  # under autocast, norms behind the projections leave q and k in float32
        q, k = q.to(v.dtype), k.to(v.dtype)
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    q = _tempered(module, q, tree)
    return tree.attend(q, k, v, scale, window=asked.window, chunk=asked.chunk, softcap=softcap, sinks=s_aux)


def _tempered(module: nn.Module, q: Tensor, tree: TreeRow) -> Tensor:
    """Llama 4 scales the queries of layers without RoPE by their place, and counts places in storage: scale anew."""
    if type(module).__name__ != "Llama4TextAttention" or module.use_rope or not module.attn_temperature_tuning:
        return q
    floor, scale = float(module.floor_scale), float(module.attn_scale)  # type: ignore[arg-type]
    position = tree.row["position_ids"][0]
    in_storage = torch.arange(len(position), device=position.device)

    def temperature(place: Tensor) -> Tensor:
        return torch.log1p(torch.floor((place.float() + 1) / floor)) * scale + 1

    return q * (temperature(position) / temperature(in_storage)).to(q.dtype)[None, None, :, None]
