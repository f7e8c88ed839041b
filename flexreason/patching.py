"""How a model is patched: an ordinary Hugging Face model that takes rows, and does all else as before.

What is done to a model, and all that is done:

- its attention layers find an attention function under a new name. It computes a tree where it is handed
  one, and otherwise calls what the model used before; so do the masks registered under that name.
- before the decoder runs, a hook turns a row's keywords into one `TreeRow`, which every layer is handed;
  after it, a hook keeps the hidden states that predict a target. So the head, and whatever replaced the
  head's loss, see T rows instead of S, and are left alone.
- the model's loss function takes weights, and an empty row.

Only what can be seen is refused here. `fr.patch` is in proof/gate.py: it asks for proof as well.
"""

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from flexreason.attention.registry import NAME, TREE, before_patching, current_tree, empty_mask, find_decoder, register
from flexreason.attention.tree_row import BACKENDS, PER_TOKEN, TreeRow, choose_backend
from flexreason.head import with_states
from flexreason.loss import LOSSES, TreeLoss, is_weighted
from flexreason.mask import MASKS
from flexreason.refuse import refuse_model, refuse_other_layouts, refuse_own_loss, refuse_row, warn_of_dropout
from flexreason.row import ROW_KEYS

ATTRIBUTE = "_flexreason"
"""Where a model keeps its `Patch`."""

Model = TypeVar("Model", bound=nn.Module)


def apply_patch(
    model: Model,
    backend: str = "auto",
    mask: str = "interval",
    loss: str = "model",
    ask: Callable[[PreTrainedModel], str] = lambda root: "",
) -> Model:
    """Make `model` take rows of `collate`; the same object back. Settings are those of `fr.patch`.

    `ask` is asked about the model that is found in whatever wraps it: it raises where that is not to be patched, and
    says why its logits cannot be made a chunk at a time, or nothing.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"patch: backend: expected one of 'auto', {', '.join(map(repr, BACKENDS))}, found {backend!r}")
    if mask not in MASKS:
        raise ValueError(f"patch: mask: expected one of {', '.join(map(repr, MASKS))}, found {mask!r}")
    if loss not in LOSSES:
        raise ValueError(f"patch: loss: expected one of {', '.join(map(repr, LOSSES))}, found {loss!r}")
    if backend != "auto":
        _check_pair(backend, mask)
    root = find_root(model)
    unpatch(root)
    refuse_model(root, model)
    unchunked = ask(root)
    if loss == "chunked":
        refuse_own_loss(root, 'patch: loss="chunked"', unchunked)
    Patch(root, backend, mask, loss, unchunked).apply()
    return model


def unpatch(model: Model) -> Model:
    """Undo `patch`, to the last hook; the same object back. A model that is not patched stays as it is."""
    if (found := find_patch(model)) is not None:
        found.undo()
    return model


def find_patch(model: nn.Module) -> "Patch | None":
    """What was done to a model, or None."""
    found = find_root(model).__dict__.get(ATTRIBUTE)
    return found if isinstance(found, Patch) else None


def find_root(model: nn.Module) -> PreTrainedModel:
    """The transformers model with a head inside whatever wraps it (PEFT, compile, DDP)."""
    if isinstance(model, nn.Module):
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
                return module
    raise ValueError(
        f"patch: expected a transformers model with an LM head (...ForCausalLM), found {type(model).__name__}"
    )


@dataclass(eq=False)
class Patch:
    """What was done to one model, and how to undo it. It lies on the model, and is copied with it."""

    root: PreTrainedModel
    backend: str
    mask: str
    loss: str = "model"
    unchunked: str = ""  # why its logits cannot be made a chunk at a time
    configs: list[tuple[Any, str]] = field(default_factory=list)  # with the attention implementation before
    hooks: list[Any] = field(default_factory=list)
    warned: bool = False

    def apply(self) -> None:
        for config in {id(c): c for m in self.root.modules() if (c := getattr(m, "config", None)) is not None}.values():
            if (previous := getattr(config, "_attn_implementation", None)) is not None:
                previous = before_patching(previous)  # a config may be shared with a patched model
                self.configs.append((config, previous))
                config._attn_implementation_internal = register(previous)
        decoder = find_decoder(self.root)
        self.hooks = self.hooks or [
            decoder.register_forward_pre_hook(self.before, with_kwargs=True),
            decoder.register_forward_hook(self.after, with_kwargs=True),
            decoder.register_forward_hook(self.done, always_call=True),
            self.root.register_forward_hook(self.without_logits, with_kwargs=True),
        ]
        self.root.loss_function = TreeLoss(self.root)
        self.root.__dict__[ATTRIBUTE] = self
        _APPLIED.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy of a patched model is patched too."""
        self.__dict__.update(state)
        _APPLIED.add(self)
        for _, previous in self.configs:
            register(previous)  # in the process where it is unpickled, the names may not be known yet

    def undo(self) -> None:
        _APPLIED.discard(self)
        for config, previous in self.configs:
            still_ours = config._attn_implementation.startswith(f"{NAME}_")
            if still_ours and not any(config is shared for other in _APPLIED for shared, _ in other.configs):
                config._attn_implementation_internal = previous
        for hook in self.hooks:
            hook.remove()
        self.root.loss_function.undo()
        del self.root.__dict__[ATTRIBUTE]
        self.configs, self.hooks = [], []

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The model as it was before, for a while. The hooks stay in their places, where only rows wake them."""
        hooks, self.hooks = self.hooks, []
        self.undo()
        try:
            yield
        finally:
            self.hooks = hooks
            self.apply()

    def backend_on(self, device: torch.device) -> str:
        """The backend that computes rows on a device."""
        return choose_backend(self.backend, device, next(self.root.parameters()).dtype)

    @torch.compiler.disable
    def before(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Turn a row's keywords into the one that the layers are handed."""
        given = {**dict(zip(inspect.signature(decoder.forward).parameters, args, strict=False)), **kwargs}
        mask = given.get("attention_mask")
        marked = isinstance(mask, Tensor) and mask.dim() == 4 and not mask.numel()
        if not marked and not ROW_KEYS & given.keys():
            return None
        refuse_row(decoder, given, ROW_KEYS | {"position_ids"})
        self.refuse_replaced(given)
        if decoder.training and not self.warned:
            self.warned = True
            warn_of_dropout(self.root)
        backend = self.backend_on(given["until"].device)
        _check_pair(backend, self.mask)
        row = {key: given[key] for key in PER_TOKEN}
        if self.mask == "turn_role":
            refuse_other_layouts(row)
        kwargs = {key: value for key, value in kwargs.items() if key not in ROW_KEYS}
        kwargs[TREE] = TreeRow(row, given["target_source"], backend, self.mask)
        current_tree.set(kwargs[TREE])
        kwargs["use_cache"] = False
        kwargs["attention_mask"] = empty_mask(given["until"].device)
        return args, kwargs

    def after(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Keep the hidden states of the tokens that predict a target, [1, T, D]."""
        if TREE not in kwargs:
            return None
        if not kwargs[TREE].tables and not torch.compiler.is_compiling():
            raise ValueError(
                f"row: none of the attention in {type(decoder).__name__} came to flexreason: parts of this model were "
                "replaced by others that compute attention themselves; it cannot take rows"
            )
        source = kwargs[TREE].target_source[0]
        output = with_states(output, output[0][:, source])
        if self.runs_head:
            self.root.loss_function.states = output
            return with_states(output, output[0][:, :0])  # so that the model's own forward makes no logits
        return output

    @contextmanager
    def giving_logprobs(self, temperature: float) -> Iterator[None]:
        """In here a row's `loss` is the log-probability of every target, [T]."""
        refuse_own_loss(self.root, "token_logprobs", self.unchunked)
        self.root.loss_function.temperature = temperature
        try:
            yield
        finally:
            self.root.loss_function.temperature = self.root.loss_function.states = None

    @torch.compiler.disable
    def done(self, *forward: Any) -> None:
        """Behind the decoder, also when it raised."""
        current_tree.set(None)

    @property
    def runs_head(self) -> bool:
        """Whether the loss makes the logits itself, a chunk at a time."""
        return self.loss == "chunked" or self.root.loss_function.temperature is not None

    def without_logits(self, root: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Where the loss made the logits, what the model's forward made is empty, and is taken from its output."""
        if "target_source" in kwargs and self.runs_head and isinstance(output, ModelOutput):
            if output.get("loss") is None:
                raise ValueError(
                    'row: it has no labels, and with loss="chunked" there is nothing else to give; pass labels, or ask '
                    "fr.token_logprobs"
                )
            output["logits"] = None

    def refuse_replaced(self, given: dict[str, Any]) -> None:
        """Whatever replaced the model's forward (trl's fused head, Liger) has a loss of its own, without weights."""
        by = replaced_forward(self.root)
        if by and self.runs_head:
            raise ValueError(
                f'row: loss="chunked" and token_logprobs need the model\'s own forward, and it was replaced (by {by}); '
                'use loss="model", where that loss is chunked itself'
            )
        if by and is_weighted(given["target_weight"]):
            raise ValueError(
                f"row: it has target weights other than 1, and the model's forward was replaced (by {by}), whose loss "
                "takes none; use weights of 1, or the model's own forward"
            )


def replaced_forward(root: PreTrainedModel) -> str | None:
    """The module of a function that stands in place of the model's own forward, or None.

    What only wraps the model's own, as torch's and accelerate's autocast do, replaces nothing. Where a function is
    from is asked of its globals, since wrappers take on the name of what they wrap.
    """
    own = {cls.__module__.partition(".")[0] for cls in type(root).__mro__} | {"accelerate", "functools"}
    forward: Any = getattr(root.forward, "__func__", root.forward)
    while forward is not None:
        module = getattr(forward, "__globals__", {}).get("__name__", type(forward).__module__)
        if module.partition(".")[0] not in own:
            return module
        forward = getattr(forward, "__wrapped__", None)
    return None


_APPLIED: "weakref.WeakSet[Patch]" = weakref.WeakSet()
"""All patches in force, since models may share a config: the last to be undone restores it."""


def _check_pair(backend: str, mask: str) -> None:
    if mask not in BACKENDS[backend].MASKS:
        raise ValueError(
            f'patch: backend "{backend}" cannot compute mask="{mask}"; use backend="flex" (on CPU: no backward) or '
            '"dense", or mask="interval", which is the same mask'
        )
