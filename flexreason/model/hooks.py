"""How a model is patched: an ordinary Hugging Face model that takes rows, and does all else as before.

What is done to a model, and all that is done:

- its attention layers find an attention function under a new name, in a view of their config that only they have. It
  computes a tree where it is handed one, and otherwise calls what the config names; so do the masks under that name.
- before the decoder runs, a hook turns a row's keywords into one `TreeRow`, which every layer is handed;
  after it, a hook keeps the hidden states that predict a target. So the head, and whatever replaced the
  head's loss, see T rows instead of S, and are left alone.
- the model's loss function takes weights, and an empty row.
- before the model, or what holds it, is called with a row, a hook asks whether the row and its adapters will do.

What is done to a model afterwards counts as if it had been done before: another loss function, another implementation
of attention, hooks, adapters. Adapters are looked for at the first row, and again once modules have been put anywhere
in the process: torch tells of it, so that rows need not look for them.

`fr.patch` itself is in patching.py: what it refuses, and what evidence it asks for.
"""

import contextlib
import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from flexreason.attention.registry import (
    IMPLEMENTATIONS,
    TREE,
    Renamed,
    attention_of,
    current_tree,
    empty_mask,
    find_decoder,
    renamed,
)
from flexreason.attention.tree_row import BACKENDS, PER_TOKEN, TreeRow, choose_backend
from flexreason.model.head import with_states
from flexreason.model.loss import LOSSES, TreeLoss, is_weighted
from flexreason.model.refuse import (
    computes_own_loss,
    reason_against_adapter,
    reason_against_adapters,
    refusal,
    refuse_call,
    refuse_other_layouts,
    refuse_own_loss,
    refuse_row,
    trainers_count,
    warn_of_dropout,
)
from flexreason.tree.mask import MASKS
from flexreason.tree.row import IGNORED, NOBODY, ROW_KEYS

ATTRIBUTE = "_flexreason"
"""Where a model keeps its `Patch`."""

Model = TypeVar("Model", bound=nn.Module)


def refuse_settings(backend: str, mask: str, loss: str) -> None:
    """Raise unless the settings of `fr.patch` are known ones and go together."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"patch: backend: expected one of 'auto', {', '.join(map(repr, BACKENDS))}, found {backend!r}")
    if mask not in MASKS:
        raise ValueError(f"patch: mask: expected one of {', '.join(map(repr, MASKS))}, found {mask!r}")
    if loss not in LOSSES:
        raise ValueError(f"patch: loss: expected one of {', '.join(map(repr, LOSSES))}, found {loss!r}")
    if backend != "auto":
        _check_pair(backend, mask)


def apply_patch(
    model: Model, backend: str = "auto", mask: str = "interval", loss: str = "model", unchunked: str = ""
) -> Model:
    """Make `model` take rows of `collate`; the same object back. Settings are those of `fr.patch`.

    This neither looks at the model nor asks for evidence: it is for those who have (`fr.patch`), or who go on to find
    out whether it is exact.

    Args:
        unchunked: why the model's logits cannot be made a chunk at a time, or nothing.
    """
    root = find_root(model)
    unpatch(root)
    if loss == "chunked":
        refuse_own_loss(root, 'patch: loss="chunked"', unchunked)
    Patch(root, backend, mask, loss, unchunked).apply([m for m in model.modules() if root in m._modules.values()])
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
    """The transformers model with a head inside whatever wraps it (PEFT, compile, DDP).

    Of several, the one that is called by the forward of what holds them; or the one that is patched.
    """
    found = _roots(model) if isinstance(model, nn.Module) else {}
    if not found:
        raise ValueError(
            f"patch: expected a transformers model with an LM head (...ForCausalLM), found {type(model).__name__}"
        )
    patched = {name: root for name, root in found.items() if ATTRIBUTE in vars(root)}
    if len(found) > 1 and len(patched) != 1:
        raise ValueError(
            f"patch: {type(model).__name__} holds {len(found)} models with a head ({', '.join(found)}), and its "
            "forward does not tell which of them takes the rows; give patch that one"
        )
    return next(iter((patched if len(found) > 1 else found).values()))


def _roots(model: nn.Module, name: str = "") -> dict[str, PreTrainedModel]:
    """Models with a head by their names, inside what wraps them, that its forward may call."""
    if isinstance(model, PreTrainedModel) and model.get_output_embeddings() is not None:
        return {name: model}
    below = {own: found for own, child in model.named_children() if (found := _roots(child, f"{name}.{own}"))}
    if len(below) > 1:
        with contextlib.suppress(OSError, TypeError):  # no source to read
            source = inspect.getsource(type(model).forward)
            below = {own: found for own, found in below.items() if re.search(rf"\bself\.{own}\b", source)} or below
    each = {id(root): (name.lstrip("."), root) for found in below.values() for name, root in found.items()}
    return dict(each.values())


@dataclass(eq=False)
class Patch:
    """What was done to one model, and how to undo it. It lies on the model, and is copied with it."""

    root: PreTrainedModel
    backend: str
    mask: str
    loss: str = "model"
    unchunked: str = ""  # why its logits cannot be made a chunk at a time
    views: list[tuple[nn.Module, str, Any]] = field(default_factory=list)  # what layers had before, by module and name
    # models, which make masks: their config is a view while a row is on its way
    makers: list[tuple[nn.Module, str, Any, Any]] = field(default_factory=list)
    configs: list[Any] = field(default_factory=list)  # each once
    hooks: list[Any] = field(default_factory=list)
    warned: bool = False
    looked: int = -1  # how many modules had been put somewhere at the last look
    row_loss: TreeLoss = field(init=False)

    def apply(self, holders: Sequence[nn.Module] = ()) -> None:
        decoder = find_decoder(self.root)
        self.hooks = self.hooks or [
            decoder.register_forward_pre_hook(self.before, with_kwargs=True),
            decoder.register_forward_hook(self.after, with_kwargs=True),
            decoder.register_forward_hook(self.done, always_call=True),
            self.root.register_forward_hook(self.without_logits, with_kwargs=True),
            self.root.register_forward_pre_hook(self.called, with_kwargs=True),
        ]
        self.row_loss = TreeLoss(self.root)
        self.root.__dict__[ATTRIBUTE] = self
        for holder in holders:
            self.held_by(holder)
        self.look()
        _listen()

    def look(self) -> None:
        """Give layers their view of the config, and refuse adapters; both also where they are new."""
        if against := reason_against_adapters(self.root):
            raise refusal(self.root, against)
        self.makers = []
        for module in self.root.modules():
            for name, config in list(vars(module).items()):
                if not isinstance(config, PreTrainedConfig) or isinstance(config, Renamed):
                    continue
                if isinstance(module, PreTrainedModel):
                    self.makers.append((module, name, config, renamed(config)))
                elif attention_of(config) is not None:
                    self.views.append((module, name, config))
                    vars(module)[name] = renamed(config)
        configs = [held[2] for held in (*self.makers, *self.views)]
        self.configs = list({id(config): config for config in configs}.values())
        self.looked = _listened.count

    def held_by(self, holder: nn.Module) -> None:
        """Ask what holds the model too: it may change a row, or have the adapters."""
        if not type(holder).__module__.startswith("torch."):
            self.hooks.append(holder.register_forward_pre_hook(self.called, with_kwargs=True))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy of a patched model is patched too, and so is one that another process wrote."""
        self.__dict__.update(state)
        self.looked = -1
        _listen()

    def undo(self) -> None:
        for module, name, config in self.views:
            if isinstance(vars(module).get(name), Renamed):
                vars(module)[name] = config
        for hook in self.hooks:
            hook.remove()
        self.row_loss.undo()
        del self.root.__dict__[ATTRIBUTE]
        self.views, self.makers, self.configs, self.hooks = [], [], [], []

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

    def called(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Before the model, or what holds it, is called."""
        if "target_source" not in kwargs:
            return None
        refuse_call(kwargs)
        if against := reason_against_adapter(module):
            raise refusal(self.root, against)
        if torch.compiler.is_compiling() or "target_document" not in kwargs or not replaced_forward(self.root):
            return None
        document = kwargs["target_document"]  # what replaced the forward may keep the labels to itself
        return args, {**kwargs, "target_document": document.where(_real(kwargs), NOBODY)}

    @torch.compiler.disable
    def before(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Turn a row's keywords into the one that the layers are handed."""
        given = {**dict(zip(inspect.signature(decoder.forward).parameters, args, strict=False)), **kwargs}
        mask = given.get("attention_mask")
        marked = isinstance(mask, Tensor) and mask.dim() == 4 and not mask.numel()
        if not marked and not ROW_KEYS & given.keys():
            return None
        refuse_row(decoder, given, ROW_KEYS | {"position_ids"})
        self.as_it_is_now(decoder)
        self.refuse_weights(given)
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
        for module, name, _, view in self.makers:
            vars(module)[name] = view
        return args, kwargs

    def as_it_is_now(self, decoder: nn.Module) -> None:
        """Take up what was done to the model since."""
        if self.looked != _listened.count:
            self.look()
        if not self.row_loss.in_place:
            temperature, now = self.row_loss.temperature, self.root.loss_function
            self.row_loss = now if isinstance(now, TreeLoss) and now.root is self.root else TreeLoss(self.root)
            self.row_loss.temperature = temperature
        for config in self.configs:
            if (name := attention_of(config)) not in (None, *IMPLEMENTATIONS):
                raise ValueError(
                    f"row: the attention implementation is {name!r} by now, which flexreason is not reached through; "
                    'model.set_attn_implementation("sdpa") brings it back'
                )
        hooks: Any = decoder._forward_hooks
        if list(hooks)[-2:] != [hook.id for hook in self.hooks[1:3]]:
            for hook in self.hooks[1:3]:  # behind whoever else changes what the decoder gives
                hooks.move_to_end(hook.id)

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
            if isinstance(output, tuple) and (decoder._backward_hooks or decoder._backward_pre_hooks):
                raise ValueError(  # of other outputs torch does not call them
                    f'row: {type(decoder).__name__} has backward hooks, which loss="chunked" and token_logprobs go '
                    'past; use loss="model"'
                )
            self.row_loss.states = output
            return with_states(output, output[0][:, :0])  # so that the model's own forward makes no logits
        return output

    @contextmanager
    def giving_logprobs(self, temperature: float) -> Iterator[None]:
        """In here a row's `loss` is the log-probability of every target, [T]."""
        refuse_own_loss(self.root, "token_logprobs", self.unchunked)
        self.row_loss.temperature = temperature
        try:
            yield
        finally:
            self.row_loss.temperature = self.row_loss.states = None

    @torch.compiler.disable
    def done(self, *forward: Any) -> None:
        """Behind the decoder, also when it raised."""
        current_tree.set(None)
        for module, name, config, _ in self.makers:
            vars(module)[name] = config

    @property
    def runs_head(self) -> bool:
        """Whether the loss makes the logits itself, a chunk at a time."""
        return self.loss == "chunked" or self.row_loss.temperature is not None

    def without_logits(self, root: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Where the loss made the logits, what the model's forward made is empty, and is taken from its output."""
        if "target_source" in kwargs and self.runs_head and isinstance(output, ModelOutput):
            if output.get("loss") is None:
                raise ValueError(
                    'row: it has no labels, and with loss="chunked" there is nothing else to give; pass labels, or ask '
                    "fr.token_logprobs"
                )
            output["logits"] = None

    def refuse_weights(self, given: dict[str, Any]) -> None:
        """Whatever replaced the model's forward (trl's fused head, Liger) has a loss of its own, without weights; so
        have a few classes; and transformers' Trainer divides by a number of targets, whatever they weigh."""
        by, n_items = replaced_forward(self.root), given.get("num_items_in_batch")
        if by and self.runs_head:
            raise ValueError(
                f'row: loss="chunked" and token_logprobs need the model\'s own forward, and it was replaced (by {by}); '
                'use loss="model", where that loss is chunked itself'
            )
        if by:
            why = f"the model's forward was replaced (by {by}), whose loss takes none", "the model's own forward"
        elif computes_own_loss(type(self.root).forward):
            self.refuse_divisor(given)
            why = f"{type(self.root).__name__} computes its loss in its own forward, which takes none", "another model"
        elif trainers_count(n_items):
            why = "the Trainer divides a step by its number of targets", "fr.RowTrainer, which divides by their weight"
        else:
            return
        if is_weighted(given["target_weight"], _real(given)):
            raise ValueError(f"row: it has target weights other than 1, and {why[0]}; use weights of 1, or {why[1]}")

    def refuse_divisor(self, given: dict[str, Any]) -> None:
        """A forward with a loss of its own divides by the targets of its row."""
        n_items, n_targets = given.get("num_items_in_batch"), int(_real(given).sum())
        if not n_targets or (n_items is not None and float(n_items) != n_targets):
            raise ValueError(
                f"row: {type(self.root).__name__} computes its loss in its own forward, as the mean over a row's own "
                f"targets: here {n_targets}, while num_items_in_batch is {n_items}; give it one row a step, and no "
                "empty one"
            )


def _real(given: dict[str, Any]) -> Tensor:
    """[1, T] which targets are not ignored; labels do not come as far as the decoder everywhere."""
    labels, document = given.get("shift_labels"), given["target_document"]
    return document != NOBODY if labels is None or labels.shape != document.shape else labels != IGNORED


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


class _Listened:
    """How many modules have been put somewhere in this process since it was first asked."""

    def __init__(self) -> None:
        self.count = 0
        self.listening = False

    def __call__(self, holder: nn.Module, name: str, module: nn.Module | None) -> None:
        if isinstance(holder, nn.ModuleList):  # forwards take slices of their layers, which are new lists
            return
        self.count += 1
        patch = getattr(module, "__dict__", {}).get(ATTRIBUTE)
        if isinstance(patch, Patch):
            patch.held_by(holder)


_listened = _Listened()


def _listen() -> None:
    if not _listened.listening:
        _listened.listening = True
        register_module_module_registration_hook(_listened)


def _check_pair(backend: str, mask: str) -> None:
    if mask not in BACKENDS[backend].MASKS:
        raise ValueError(
            f'patch: backend "{backend}" cannot compute mask="{mask}"; use backend="flex" (on CPU: no backward) or '
            '"dense", or mask="interval", which is the same mask'
        )
