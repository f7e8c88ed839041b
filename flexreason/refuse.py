"""Everything that is refused, with the reason: models that cannot be exact, and rows that are not whole.

Shapes: S tokens, T targets.
"""

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexreason.attention.registry import before_patching
from flexreason.mask import interval_rule, turn_role_rule

if TYPE_CHECKING:
    from flexreason.proof.selftest import Result

IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")
"""What a model may have used before, and goes on using for ordinary batches."""

ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")

RANDOM = ("dropout", "pdrop", "jitter", "layerdrop")
"""What the names of config entries say that draw at random while training."""

ROPE_BY_LONGEST = ("dynamic", "longrope")
"""RoPE types whose angles depend on the longest position of the whole batch."""


Reason = tuple[str, str]
"""Why, and what can be done."""

SAMPLES = "train on the N samples"

UNTESTED = "cannot be built tiny"
"""The verdict on what nobody could test."""

RECURRENT = "it has recurrent layers, which carry state from token to token past any mask"

_untested: ContextVar[bool] = ContextVar("flexreason_untested", default=False)

_trusted: set[tuple] = set()
"""What `fr.verify` passed on, though no test could: class, structure, and what the model is made of."""


def refuse_model(root: PreTrainedModel, model: nn.Module | None = None) -> None:
    """Raise if the model cannot take rows exactly, naming it, the reason, and what can be done.

    `model` is what wraps it, if anything: some adapters are known by their wrapper only.
    """
    against = reason_against_adapters(model or root) or reason_against(root)
    against = against or (None if _untested.get() else reason_to_doubt(root))
    if against:
        raise ValueError(f"patch: {model_class(root).__name__} is refused: {'; '.join(against)}")


def refuse_own_loss(root: PreTrainedModel, what: str) -> None:
    """Raise if the model's logits cannot be made a chunk at a time: its forward computes its loss itself, or the list
    or the self-test says that what comes out is not the samples'."""
    with contextlib.suppress(OSError, TypeError):  # no source to read
        if "loss_function" not in inspect.getsource(type(root).forward):
            raise ValueError(
                f"{what}: {model_class(root).__name__} computes its loss in its own forward, from all logits; use "
                'loss="model"'
            )
    if _untested.get():
        return
    found = _proof(root)
    if found.chunked is False:
        raise ValueError(f'{what}: {found.name} takes no chunked loss: {found.chunked_reason}; use loss="model"')


@contextmanager
def untested() -> Iterator[None]:
    """Patch without asking for proof: for those who go on to prove it."""
    token = _untested.set(True)
    try:
        yield
    finally:
        _untested.reset(token)


def trust(root: PreTrainedModel) -> None:
    """`fr.verify` passed on this model: until the process ends, those of its class, structure and parts are taken where
    no tiny one can be tested. It counts for nothing against a test that failed."""
    _trusted.add(_kind(root))


def _kind(root: PreTrainedModel) -> tuple:
    from flexreason.proof.models import structure_of

    cls = model_class(root)
    return cls, structure_of(root.config, cls), frozenset(parts_of(root))


def standing(root: PreTrainedModel, model: nn.Module | None = None) -> tuple[str, str] | None:
    """What `patch` would say of a model that nobody has trusted: a verdict, "refused" or "cannot be built tiny", and
    the reason; None where it is exact."""
    if against := reason_against_adapters(model or root) or reason_against(root):
        return "refused", against[0]
    found = _proof(root)
    if found.verdict != "exact":
        return found.verdict, found.reason
    changed = _replaced_parts(root)
    return (UNTESTED, f"parts of it were replaced: {changed}") if changed else None


def model_class(root: nn.Module) -> type:
    """The class that a model was written as: torch makes subclasses of its own for sharded modules."""
    return next(cls for cls in type(root).__mro__ if not cls.__module__.startswith("torch.distributed"))


def reason_against_adapters(model: nn.Module) -> Reason | None:
    """What speaks against the adapters of peft that are in a model or around it."""
    for module in model.modules():
        found = getattr(module, "peft_config", None)
        for adapter in found.values() if isinstance(found, Mapping) else [found]:
            name = type(adapter).__name__
            if getattr(adapter, "alora_invocation_tokens", None):
                return (
                    f"its adapter is an activated LoRA ({name}.alora_invocation_tokens), which looks for its "
                    "invocation in storage and not on a token's path",
                    "train it as a LoRA without alora_invocation_tokens",
                )
            if getattr(adapter, "is_prompt_learning", False):
                return (
                    f"its adapter ({name}) puts virtual tokens before the batch, which are no tokens of the row",
                    "train a LoRA",
                )
    return None


def reason_against(root: PreTrainedModel) -> Reason | None:
    """What speaks against a model as it stands, whatever its class."""
    if against := reason_against_config(type(root), root.config):
        return against
    for module in root.modules():
        used = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if used is not None and before_patching(used) not in IMPLEMENTATIONS:
            return (
                f"its attention implementation is {used!r}, which reads its own name",
                'load it with attn_implementation="sdpa"; rows do not use it anyway',
            )
    return None


def reason_against_config(cls: type, config: Any) -> Reason | None:
    """What speaks against a class and its config."""
    text = config.get_text_config()
    if is_recurrent(cls, text):
        return RECURRENT, SAMPLES
    if config.is_encoder_decoder or not getattr(text, "is_causal", True):
        return "it is no causal language model", "use a decoder-only one"
    for key in ATTENTION_DROPOUTS:
        if (getattr(text, key, 0) or 0) > 0:
            return (
                f"{key} is {getattr(text, key)}, and one draw of dropout cannot serve all samples",
                f"load it with {key}=0.0",
            )
    return None


def is_recurrent(cls: type, config: Any) -> bool:
    """Whether a class carries state, unless its config names attention layers alone."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ["unknown"]
    attention_only = all(kind.endswith("attention") and "linear" not in kind for kind in kinds)
    return getattr(cls, "_is_stateful", False) and not attention_only


def reason_to_doubt(root: PreTrainedModel) -> Reason | None:
    """What the list of classes says, or else the self-test on a tiny model of the same structure."""
    found = _proof(root)
    if found.verdict == "exact":
        changed = _replaced_parts(root)
        doubt = changed and f"parts of it were replaced, which no tiny model of its class has: {changed}"
    elif found.verdict == "refused":
        return found.reason, SAMPLES
    else:
        doubt = "nobody has shown it to be exact, and no tiny model of its structure can be built to try "
        doubt += f"({found.reason})"
    if not doubt or _kind(root) in _trusted:
        return None
    return doubt, "run fr.verify on it: once that has passed, patch takes such models until the process ends"


def _proof(root: PreTrainedModel) -> "Result":
    from flexreason.proof.models import proof

    return proof(model_class(root), root.config, edited=_foreign(parts_of(root)))


# ---- what a model is made of


COMMON = (  # packages whose modules stand in for linear layers, wrap others, or share them out
    *("torch", "peft", "accelerate", "deepspeed", "bitsandbytes", "torchao", "gptqmodel", "auto_gptq", "awq", "hqq"),
    *("optimum", "quanto", "eetq", "aqlm", "vptq", "compressed_tensors", "auto_round", "spqr_quant", "fp_quant"),
    "transformers.integrations",
)

MIXING = (nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules of torch that carry something from token to token."""

WRAPPERS = ("functools", "accelerate", "torch", "peft")
"""Packages whose functions, put before a forward, leave what it computes."""

_MANNER = "forward of "


def _foreign(parts: set[str]) -> frozenset[str]:
    """Those that neither transformers nor torch brought."""
    return frozenset(part for part in parts if not part.startswith(("transformers.", "torch.")))


def parts_of(root: nn.Module) -> set[str]:
    """The kinds of modules in a model, beside harmless ones, and whose `forward` is not that of their class."""
    kinds: dict[type, nn.Module] = {}
    found = set()
    for module in root.modules():
        kinds.setdefault(type(module), module)
        if module is not root and "forward" in vars(module) and (by := _forward_from(module)):
            found.add(f"{_MANNER}{type(module).__name__}, by {by}")
    for kind, module in kinds.items():
        if module is not root and (isinstance(module, MIXING) or not _is_of(kind.__module__, COMMON)):
            found.add(f"{kind.__module__}.{kind.__qualname__}")
            if by := _written_elsewhere(kind):
                found.add(f"{_MANNER}{kind.__name__}, by {by}")
    return found


def _is_of(module: str, packages: Sequence[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _home(function: Any) -> str:
    """Where a function is from, by its globals: wrappers take on the name of what they wrap."""
    function = getattr(function, "__func__", function)
    return getattr(function, "__globals__", {}).get("__name__", type(function).__module__)


def _forward_from(module: nn.Module) -> str:
    """What replaced a module's own forward, or nothing where there are only known wrappers around it."""
    forward: Any = vars(module)["forward"]
    while forward is not None:
        inner = getattr(forward, "func", forward)  # of functools.partial
        if getattr(inner, "__func__", None) is type(module).forward:
            return ""
        if not _is_of(_home(inner), WRAPPERS):
            return f"{_home(inner)}.{getattr(inner, '__qualname__', type(inner).__name__)}"
        forward = getattr(forward, "__wrapped__", None)
    return ""


def _written_elsewhere(kind: type) -> str:
    """The package of a forward that was put into a class from outside, or nothing."""
    own = [cls.__module__.partition(".")[0] for cls in kind.__mro__]
    home = _home(inspect.unwrap(kind.forward))  # type: ignore[attr-defined]
    return "" if _is_of(home, [*own, *WRAPPERS]) else home


def _replaced_parts(root: PreTrainedModel) -> str:
    """What is in a model and not in a tiny one of its class and structure."""
    from flexreason.proof.models import tiny_parts

    parts = parts_of(root)
    return ", ".join(sorted(parts - tiny_parts(model_class(root), root.config, _foreign(parts))))


def refuse_row(decoder: nn.Module, given: Mapping[str, Any], required: set[str]) -> None:
    """Raise if what the decoder was given is not one whole row that fits its input."""
    missing = sorted(key for key in required if given.get(key) is None)
    if missing:
        raise ValueError(
            f"row: the keys {', '.join(missing)} are missing; pass all that fr.collate made, as model(**row) "
            "(with a Trainer: remove_unused_columns=False)"
        )
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    tokens = ids if ids is not None else embeds
    if tokens is None:
        raise ValueError("row: input_ids is missing")
    until = given["until"]
    if until.dim() != 2 or until.shape[0] != 1:
        raise ValueError(
            f"row: expected one row, [1, S], found until of shape {list(until.shape)}; collate packs all layouts of a "
            "batch into one row, so use a batch size of 1 and a longer row"
        )
    for key in ("until", "position_ids", "turn", "role", "document"):
        if given[key].shape != tokens.shape[:2]:
            raise ValueError(
                f"row: expected {key} of shape {list(tokens.shape[:2])} like the tokens, found {list(given[key].shape)}"
            )
        if given[key].is_floating_point():
            raise ValueError(f"row: expected {key} of integers, found {given[key].dtype}")
    if until.device.type == "cpu" and not bool((until[0] > torch.arange(until.shape[1])).all()):
        raise ValueError("row: until does not end behind every token; pass what fr.collate made, unchanged")
    weight = next(decoder.parameters())
    for key in required:
        if given[key].device != weight.device and weight.device.type != "meta":
            raise ValueError(f"row: {key} is on {given[key].device} and the model on {weight.device}; move the row")
    mask = given.get("attention_mask")
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError(
            f"row: its attention_mask came as a {type(mask).__name__}, as a table returns empty tensors; keep layouts "
            "in a datasets.Dataset and call fr.collate in the data collator, or leave the key out"
        )
    if mask is not None and (mask.dim() != 4 or mask.numel()):
        raise ValueError("row: it came with an attention_mask of its own; a row's mask follows from its layout")
    if given.get("past_key_values") is not None:
        raise ValueError("row: it came with past_key_values; a row is whole in itself and takes no cache")
    config = getattr(decoder.config, "get_text_config", lambda: decoder.config)()
    if given.get("output_router_logits") or getattr(config, "output_router_logits", False):
        raise ValueError(
            "row: output_router_logits is on, but the router's auxiliary loss would count the tokens of the tree, not "
            "of the samples; set config.output_router_logits = False (trl: router_aux_loss_coef=0.0)"
        )
    refuse_rope(config, given)


def rope_settings(config: Any) -> list[dict[str, Any]]:
    """A config's RoPE parameters; some have one set for each kind of layer."""
    found = getattr(config, "rope_parameters", None) or {}
    return [found] if "rope_type" in found else [r for r in found.values() if isinstance(r, dict)]


def rope_types(config: Any) -> set[str]:
    return {rope.get("rope_type", "default") for rope in rope_settings(config)}


def refuse_rope(config: Any, given: Mapping[str, Any]) -> None:
    """RoPE that reads the longest position of a batch is the samples' own only if all are on one side."""
    for rope in rope_settings(config):
        if rope.get("rope_type") not in ROPE_BY_LONGEST:
            continue
        original = config.max_position_embeddings
        if rope["rope_type"] == "longrope":
            original = rope.get("original_max_position_embeddings") or original
        longest = sample_lengths(given)
        short = bool((longest <= original).all())
        if not short and (rope["rope_type"] == "dynamic" or bool((longest <= original).any())):
            raise ValueError(
                f"row: its samples have {int(longest.min())} to {int(longest.max())} tokens, and this model's RoPE "
                f"({rope['rope_type']}) changes with the longest of a batch above {original}: one pass would differ "
                f"from the samples; keep samples on both sides of {original} in different rows"
            )


def sample_lengths(row: Mapping[str, Any]) -> Tensor:
    """Tokens of each sample in a row."""
    real = row["target_document"][0] >= 0
    document, turn = row["target_document"][0, real], row["target_turn"][0, real]
    if not len(turn):
        return torch.zeros(1, dtype=torch.int64)
    _, number = torch.stack([document, turn]).unique(dim=1, return_inverse=True)
    length = row["position_ids"][0, row["target_source"][0, real]] + 2
    return torch.zeros_like(length).scatter_reduce(0, number, length, "amax")[: int(number.max()) + 1]


def refuse_other_layouts(row: Mapping[str, Tensor]) -> None:
    """Raise unless the paper's rule and the tree agree: under mask="turn_role" only `lay_out_turns` layouts do.

    Both rules are the same for all tokens of a run (consecutive positions, one turn, role, document and `until`)
    and all of another, so that one token of each run tells; inside a run both are causal.
    """
    keys = [row[key][0] for key in ("until", "turn", "role", "document")]
    starts = torch.cat([keys[0].new_ones(1, dtype=torch.bool), row["position_ids"][0].diff() != 1])
    for key in keys:
        starts[1:] |= key.diff() != 0
    first = starts.nonzero().squeeze(1)
    first = first[row["document"][0, first] >= 0]
    q, kv = first[:, None], first[None, :]
    zero = torch.zeros((), dtype=torch.int64, device=first.device)
    by_tree = interval_rule(keys[0])(zero, zero, q, kv)
    by_words = turn_role_rule(*keys[1:])(zero, zero, q, kv)
    differ = by_tree != by_words
    if differ.any():
        at, other = (int(first[i]) for i in differ.nonzero()[0])
        raise ValueError(
            f'row: mask="turn_role" takes rows of lay_out_turns layouts only, and here turns and roles say otherwise '
            f'than the tree whether token {at} sees token {other}; use mask="interval"'
        )


def warn_of_dropout(root: nn.Module) -> None:
    """Say that one draw of dropout or embedding noise is shared by all samples of a row."""
    found = [name for name, m in root.named_modules() if isinstance(m, nn.Dropout) and m.p > 0 and m.training]
    config = root.config.get_text_config() if isinstance(root, PreTrainedModel) else None
    for key, value in (vars(config) if config is not None else {}).items():
        of_decoder = any(word in key for word in RANDOM) and not key.startswith("classifier")
        if of_decoder and isinstance(value, float) and value > 0:
            found.append(f"config.{key} = {value}")
    if found:
        warnings.warn(
            f"flexreason: randomness is on in {len(found)} places ({found[0]}, ...); one draw is shared by all samples "
            "of a row, where N passes would draw N times",
            stacklevel=2,
        )
    embeddings = root.get_input_embeddings() if isinstance(root, PreTrainedModel) else None
    if getattr(embeddings, "neftune_noise_alpha", None):
        warnings.warn("flexreason: NEFTune is on; one draw of noise is shared by all samples of a row", stacklevel=2)
