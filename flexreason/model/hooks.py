"""How a model is patched: an ordinary Hugging Face model that takes rows, and does all else as before.

What is done to a model, and all that is done:

- its attention layers find an attention function under a new name, in a view of their config that only they have. It
  computes a tree where it is handed one, and otherwise calls what the config names; so do the masks under that name.
- recurrent layers find functions of ours under the names that they call. These compute over a tree where they are
  handed one, and otherwise call what stood there before; they stay there, for all models of a class share them. How
  often a row comes to them is counted.
- before the decoder runs, a hook turns a row's keywords into one `TreeRow`, which every layer is handed;
  after it, a hook keeps the hidden states that predict a target. So the head, and whatever replaced the
  head's loss, see T rows instead of S, and are left alone.
- the model's loss function takes weights, and an empty row.
- before the model, or what holds it, is called with a row, a hook refuses adapters that would change the row, and
  gives the row a `Request`, which says what the forward is to give; behind it, a hook refuses a loss that came
  without the row's weights and divisor.

What is done to a model afterwards counts as if it had been done before: another loss function, another implementation
of attention, hooks, adapters. Adapters are looked for at the first row, and again once modules have been put anywhere
in the process: torch tells of it, so that rows need not look for them.

`fr.patch` itself is in patching.py: what it refuses, and what evidence it asks for.
"""

import inspect
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from flexreason.attention.registry import (
    BACKENDS,
    IMPLEMENTATIONS,
    INSTEAD,
    TREE,
    TreeRow,
    attention_of,
    choose_backend,
    computes,
    current_tree,
    empty_mask,
    find_decoder,
)
from flexreason.model.added_code import AddedCode
from flexreason.model.asking import Answer, ask, loss_of_forward, refuse_answer
from flexreason.model.find import ATTRIBUTE, caller_of, find_root
from flexreason.model.head import with_states
from flexreason.model.holders import is_verifying, note_holders, refuse_embeddings
from flexreason.model.listening import listen
from flexreason.model.loss import LOSSES, REQUEST, Request, TreeLoss
from flexreason.model.refuse import (
    OWN_LOSS,
    asks_loss_function,
    reason_against_adapter,
    reason_against_adapters,
    refusal,
    refuse_unchunked,
)
from flexreason.model.refuse_losses import (
    refuse_another_divisor,
    refuse_mean_of_means,
    refuse_own_mean,
    refuse_weights,
)
from flexreason.model.refuse_rows import (
    real_targets,
    refuse_call,
    refuse_noise,
    refuse_other_layouts,
    refuse_places,
    refuse_row,
    refuse_states,
    replaced_by,
    warn_of_dropout,
)
from flexreason.model.views import Views
from flexreason.recurrent import entries
from flexreason.tree.mask import MASK_KEYS, MASKS
from flexreason.tree.row import NOBODY, ROW_KEYS

Model = TypeVar("Model", bound=nn.Module)

LOSS_KEYWORDS = "accepts_loss_kwargs"
"""What models call it that they hand `num_items_in_batch` to their loss."""

_handed: ContextVar[dict[str, Any] | None] = ContextVar("flexreason_row", default=None)
"""What the root was called with as a row, for decoders whose head hands them no keywords (Mamba-2)."""


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
        refuse_unchunked(root, 'patch: loss="chunked"', unchunked)
    Patch(root, backend, mask, loss, unchunked).apply([m for m in model.modules() if root in m._modules.values()])
    inside = set(root.modules())
    note_holders(root, [m for m in model.modules() if m not in inside and root in set(m.modules())])
    return model


def unpatch(model: Model) -> Model:
    """Undo `patch`, to the last hook; the same object back. A model that is not patched stays as it is.

    >>> import flexreason as fr
    >>> from transformers import Qwen3Config, Qwen3ForCausalLM
    >>> model = Qwen3ForCausalLM(Qwen3Config(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2, head_dim=8))
    >>> unpatch(fr.patch(model)) is model
    True
    """
    if (patch := find_patch(model)) is not None:
        patch.undo()
    return model


def find_patch(model: nn.Module) -> "Patch | None":
    """What was done to a model, or None."""
    patch = vars(find_root(model)).get(ATTRIBUTE)
    return patch if isinstance(patch, Patch) else None


@dataclass(eq=False)
class Patch:
    """What was done to one model, and how to undo it. It lies on the model, and is copied with it."""

    root: PreTrainedModel
    backend: str
    mask: str
    loss: str = "model"
    unchunked: str = ""  # why its logits cannot be made a chunk at a time
    hooks: list[Any] = field(default_factory=list)
    expected: Counter[str] = field(default_factory=Counter)  # how often recurrent layers come to us in a row
    warned: bool = False
    said: dict[str, Any] = field(default_factory=dict)  # what the model itself said of its loss before, if it did
    answers: dict[tuple[Any, bool], Answer] = field(default_factory=dict)  # of forwards in the place of the model's own
    awaited: bool = False  # whether a row is on its way through the model, and nobody has looked at its loss yet
    own_loss: bool = False  # whether the last row's loss did not come from our loss function
    views: Views = field(init=False)
    added: AddedCode = field(init=False)
    row_loss: TreeLoss = field(init=False)

    def __post_init__(self) -> None:
        self.views, self.added = Views(self.root), AddedCode(self.root)

    def apply(self, holders: Sequence[nn.Module] = ()) -> None:
        """Put everything in its place; `holders` are the modules that hold the model."""
        decoder = find_decoder(self.root)
        self.hooks = self.hooks or [
            decoder.register_forward_pre_hook(self.before, with_kwargs=True),
            decoder.register_forward_hook(self.after, with_kwargs=True),
            decoder.register_forward_hook(self.done, always_call=True),
            *self.around(self.root),
        ]
        self.row_loss = TreeLoss(self.root)
        self.take_divisor()
        self.root.__dict__[ATTRIBUTE] = self
        for holder in holders:
            self.held_by(holder)
        self.look()
        self.added.look()
        listen()

    def take_divisor(self) -> None:
        """Say that the model takes what divides its loss: Trainers ask, and else take a mean of rows' means.

        Many classes say that they do not, though their loss function does. One without a loss function does not.
        """
        self.said = {LOSS_KEYWORDS: vars(self.root)[LOSS_KEYWORDS]} if LOSS_KEYWORDS in vars(self.root) else {}
        if not getattr(self.root, LOSS_KEYWORDS, True) and asks_loss_function(type(self.root).forward):
            vars(self.root)[LOSS_KEYWORDS] = True

    def look(self) -> None:
        """Give layers their view of the config, and refuse adapters; a second look finds those that came since."""
        if against := reason_against_adapters(self.root):
            raise refusal(self.root, against)
        self.views.look()
        self.expected = entries.expected(self.root)

    def held_by(self, holder: nn.Module) -> None:
        """Hook what holds the model as well: it may have the adapters, or call the model's `forward` past its hooks."""
        if not type(holder).__module__.startswith("torch."):
            self.hooks += self.around(holder)

    def around(self, module: nn.Module) -> list[Any]:
        """Hooks before and behind the model, or what holds it."""
        return [
            module.register_forward_pre_hook(self.called, with_kwargs=True),
            module.register_forward_hook(self.answered, with_kwargs=True),
        ]

    def __getstate__(self) -> dict[str, Any]:
        self.added.stop()
        return {**self.__dict__, "answers": {}, "added": None}  # what is asked is asked again

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy of a patched model is patched too, and so is one that another process wrote."""
        self.__dict__.update(state)
        self.views.looked, self.added = -1, AddedCode(self.root)
        listen()

    def undo(self) -> None:
        """Take everything away again."""
        self.views.undo()
        self.added.stop()
        for hook in self.hooks:
            hook.remove()
        self.row_loss.undo()
        vars(self.root).pop(LOSS_KEYWORDS, None)
        vars(self.root).update(self.said)
        del self.root.__dict__[ATTRIBUTE]
        self.views, self.hooks = Views(self.root), []

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
        """Before the model, or what holds it, is called: give the row a request, unless it came with one."""
        if "target_source" not in kwargs:
            if not torch.compiler.is_compiling():
                self.added.stop()  # whom a row that raised has left waiting
            return None
        refuse_call(kwargs)
        if self.expected:
            refuse_states(kwargs)
        if against := reason_against_adapter(module):
            raise refusal(self.root, against)
        kwargs = {REQUEST: Request(), **kwargs}
        kwargs[REQUEST].root, self.row_loss.took, self.awaited = self.root, None, True
        _handed.set(kwargs)
        if not torch.compiler.is_compiling() and not kwargs[REQUEST].is_known:
            kwargs[REQUEST].is_known = True  # what holds the model comes here too, and first
            self.added.watch(kwargs, self.views.are_old())
        if not torch.compiler.is_compiling() and "target_document" in kwargs and replaced_by(self.root):
            document = kwargs["target_document"]  # what replaced the forward may keep the labels to itself
            kwargs["target_document"] = document.where(real_targets(kwargs), NOBODY)
        return args, kwargs

    @torch.compiler.disable
    def before(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Turn a row's keywords into the one that the layers are handed."""
        given = {**dict(zip(inspect.signature(decoder.forward).parameters, args, strict=False)), **kwargs}
        mask = given.get("attention_mask")
        marked = isinstance(mask, Tensor) and mask.dim() == 4 and not mask.numel()
        if not marked and not ROW_KEYS & given.keys():
            return None
        if not ROW_KEYS & given.keys() and (handed := _handed.get()):
            given, kwargs = {**handed, **given}, {**kwargs, REQUEST: handed[REQUEST]}
        if self.is_of_another(decoder, given.get(REQUEST)):
            return None
        refuse_row(decoder, given, ROW_KEYS | {"position_ids"})
        refuse_embeddings(self.root, given)
        refuse_noise(self.root)
        if not (is_verifying() or torch.compiler.is_compiling()):
            refuse_places(given)
        self.as_it_is_now(decoder)
        refuse_weights(self.root, given, self.runs_head(given))
        if self.loss == "chunked" and REQUEST not in kwargs:
            warnings.warn(
                'row: loss="chunked" makes all logits at once where model.forward(**row) is called; call model(**row)',
                stacklevel=2,
            )
        if decoder.training and not self.warned:
            self.warned = True
            warn_of_dropout(self.root)
        backend = self.backend_on(given["until"].device)
        _check_pair(backend, self.mask)
        row = {key: given[key] for key in MASK_KEYS}
        if self.mask == "turn_role":
            refuse_other_layouts(row)
        kwargs = {key: value for key, value in kwargs.items() if key not in ROW_KEYS}
        kwargs[TREE] = TreeRow(row, given["target_source"], backend, self.mask, self.root)
        current_tree.set(kwargs[TREE])
        kwargs["use_cache"] = False
        kwargs["attention_mask"] = empty_mask(given["until"].device)
        self.views.show_models()
        return args, kwargs

    def is_of_another(self, decoder: nn.Module, request: Request | None) -> bool:
        """Whether a row came by another patched model that has the same decoder; raises if that one is not patched."""
        if request is not None:
            return request.root not in (None, self.root)
        caller = caller_of(decoder)  # whose `forward` was called, past all hooks
        if caller is None or caller is self.root:
            return False
        if ATTRIBUTE in vars(caller):
            return True
        raise ValueError(
            f"row: {type(caller).__name__}, which it was given to, is not patched; its decoder is that of another "
            "model which is; call fr.patch on this one"
        )

    def as_it_is_now(self, decoder: nn.Module) -> None:
        """Take up what was done to the model since."""
        if self.views.are_old():
            self.look()
        if not self.row_loss.in_place:
            now = self.root.loss_function
            self.row_loss = now if isinstance(now, TreeLoss) and now.root is self.root else TreeLoss(self.root)
        for config in self.views.configs:
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
        if TREE not in kwargs or kwargs[TREE].root is not self.root:
            return None
        if not torch.compiler.is_compiling():
            self.refuse_passed_by(decoder, kwargs[TREE])
        source = kwargs[TREE].target_source[0]
        output = with_states(output, output[0][:, source])
        if self.runs_head(kwargs):
            if isinstance(output, tuple) and (decoder._backward_hooks or decoder._backward_pre_hooks):
                raise ValueError(  # of other outputs torch does not call them
                    f'row: {type(decoder).__name__} has backward hooks, which loss="chunked" and token_logprobs go '
                    'past; use loss="model"'
                )
            kwargs[REQUEST].states = output
            return with_states(output, output[0][:, :0])  # so that the model's own forward makes no logits
        if not torch.compiler.is_compiling() and (by := replaced_by(self.root)):
            self.refuse_forward(decoder, output, by)
        return output

    def refuse_forward(self, decoder: nn.Module, output: Any, by: str) -> None:
        """Raise if what stands in place of the model's forward takes a row's targets otherwise than they stand. It is
        asked once, around a decoder that answers with a few numbers."""
        given = _handed.get()
        if given is None or given.get("labels") is None or "input_ids" not in given:
            return

        n_items, forward = given.get("num_items_in_batch"), self.root.forward
        key = getattr(forward, "__func__", forward), n_items is None
        if key not in self.answers:
            took = self.row_loss.took
            try:
                loss = loss_of_forward(self.root, decoder, output, given)
                self.answers[key] = ask(loss, output[0], self.root.config.get_text_config().vocab_size)
            except Exception:  # a forward may ask for more than there is here: it goes on as it is
                self.answers[key] = Answer("")
            self.row_loss.took = took
        what = f"the model's forward was replaced (by {by})"
        refuse_answer(self.answers[key], what, given["labels"], n_items)

    def refuse_passed_by(self, decoder: nn.Module, tree: TreeRow) -> None:
        """Raise if layers computed something else than the tree that they were handed."""
        if not tree.tables and not self.expected:
            raise ValueError(
                f"row: none of the attention in {type(decoder).__name__} came to flexreason: parts of this model were "
                f"replaced by others that compute attention themselves; it cannot take rows{INSTEAD}"
            )
        if missed := self.expected - tree.came:
            raise ValueError(
                f"row: of the recurrent layers in {type(decoder).__name__}, {max(missed.values())} did not come to "
                f"flexreason ({', '.join(missed)}): they were replaced by kernels or layers that take no tree; load "
                "the model without them (use_kernels=False), or train on the N samples"
            )

    @torch.compiler.disable
    def done(self, *forward: Any) -> None:
        """Behind the decoder, also when it raised."""
        current_tree.set(None)
        _handed.set(None)
        self.views.hide_models()

    def runs_head(self, given: dict[str, Any]) -> bool:
        """Whether the loss makes the logits itself, a chunk at a time."""
        request = given.get(REQUEST)
        return request is not None and (self.loss == "chunked" or not request.loss)

    def answered(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Behind the model, or what holds it: is the loss of a row by its weights and divisor?

        Where the loss made the logits, what the model's forward made is empty, and is taken from its output.
        """
        if "target_source" not in kwargs or kwargs[REQUEST].root is not self.root:
            return
        took, self.row_loss.took = self.row_loss.took, None
        self.added.stop()
        if self.awaited and kwargs.get("labels") is not None:
            self.refuse_other_loss(kwargs, took)
        self.awaited = False  # what holds the model comes here too, and has nothing to add
        if self.runs_head(kwargs) and isinstance(output, ModelOutput):
            if output.get("loss") is None:
                raise ValueError(
                    'row: it has no labels, and with loss="chunked" there is nothing else to give; pass labels, or ask '
                    "fr.token_logprobs"
                )
            output["logits"] = None

    @torch.compiler.disable
    def refuse_other_loss(self, given: dict[str, Any], took: tuple[Any, Any] | None) -> None:
        """Raise if the loss of a row is not by its weights and divisor, `took` being what our loss function had."""
        self.own_loss = took is None
        if took is not None:
            refuse_another_divisor(self.root, given, *took)
        elif self.runs_head(given):
            raise ValueError(f'row: {type(self.root).__name__} {OWN_LOSS}; use loss="model"')
        elif not replaced_by(self.root):
            refuse_own_mean(self.root, given)
        refuse_mean_of_means(given.get("num_items_in_batch"))


def _check_pair(backend: str, mask: str) -> None:
    if not computes(backend, mask):
        raise ValueError(
            f'patch: backend "{backend}" cannot compute mask="{mask}"; use backend="flex" (on CPU: no backward) or '
            '"dense", or mask="interval", which is the same mask'
        )
