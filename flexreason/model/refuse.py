"""What is refused by looking at it, with the reason: models that cannot be exact, and rows that are not whole.

What must be tried to be known is asked for in patching.py.

Shapes: S tokens, T targets.
"""

import contextlib
import inspect
import sys
import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexreason.attention.registry import IMPLEMENTATIONS, attention_of
from flexreason.tree.mask import interval_rule, turn_role_rule

ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")

SOFTCAP = "attn_logit_softcapping"
"""What configs call the softcap of scores."""

RANDOM = ("dropout", "pdrop", "jitter", "layerdrop")
"""What the names of config entries say that draw at random while training."""

ROPE_BY_LONGEST = ("dynamic", "longrope")
"""RoPE types whose angles depend on the longest position of the whole batch."""


Reason = tuple[str, str]
"""Why, and what can be done."""

SAMPLES = "train on the N samples"

RECURRENT = "it has recurrent layers, which carry state from token to token past any mask"


def refuse_model(root: PreTrainedModel, model: nn.Module | None = None) -> None:
    """Raise if a look at the model is enough to say that it cannot take rows exactly.

    `model` is what wraps it, if anything: some adapters are known by their wrapper only.
    """
    if against := reason_against_adapters(model or root) or reason_against(root):
        raise refusal(root, against)


def refusal(root: PreTrainedModel, against: Reason) -> ValueError:
    """The error that names the model, the reason, and what can be done."""
    return ValueError(f"patch: {model_class(root).__name__} is refused: {'; '.join(against)}")


def refuse_own_loss(root: PreTrainedModel, what: str, unchunked: str) -> None:
    """Raise if the model's logits cannot be made a chunk at a time: its forward computes its loss itself, or a test
    of its class found why (`unchunked`) what comes out is not the samples'."""
    name = model_class(root).__name__
    if computes_own_loss(type(root).forward):
        raise ValueError(f'{what}: {name} computes its loss in its own forward, from all logits; use loss="model"')
    if unchunked:
        raise ValueError(f'{what}: {name} takes no chunked loss: {unchunked}; use loss="model"')


@cache
def computes_own_loss(forward: Any) -> bool:
    """Whether a model's forward, as its class has it, computes its loss itself, and asks no loss function."""
    with contextlib.suppress(OSError, TypeError):  # no source to read
        return "loss_function" not in inspect.getsource(forward)
    return False


def model_class(root: nn.Module) -> type:
    """The class that a model was written as: torch makes subclasses of its own for sharded modules."""
    return next(cls for cls in type(root).__mro__ if not cls.__module__.startswith("torch.distributed"))


def reason_against_adapters(model: nn.Module) -> Reason | None:
    """What speaks against the adapters of peft that are in a model or around it."""
    return next((against for module in model.modules() if (against := reason_against_adapter(module))), None)


def reason_against_adapter(module: nn.Module) -> Reason | None:
    """What speaks against the adapters that one module knows of."""
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
        config = getattr(module, "config", None)
        used = attention_of(config)
        if used is not None and used not in IMPLEMENTATIONS:
            return (
                f"its attention implementation is {used!r}, which reads its own name",
                'load it with attn_implementation="sdpa"; rows do not use it anyway',
            )
        # transformers below 5.21 lets sdpa drop a softcap without a word; later ones raise
        if used == "sdpa" and getattr(config, SOFTCAP, None):
            return (
                "its attention implementation is 'sdpa', which leaves out the softcap of its scores",
                'load it with attn_implementation="eager", as transformers 5.21 and later do by themselves',
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


def refuse_call(given: Mapping[str, Any]) -> None:
    """Raise if somebody took a row's labels out, to compute a loss of the logits that shifts them."""
    if given.get("labels") is None and given.get("shift_labels") is not None:
        raise ValueError(
            "row: it came with shift_labels and without labels, as a Trainer gives it that has label_smoothing_factor "
            "or compute_loss_func: these take the labels out, and shift them, which are in their places; leave both "
            "out. For a loss of your own, in which line t of the logits belongs to target t, leave out shift_labels too"
        )


def trainers_count(n_items: Any) -> bool:
    """Whether what is to divide a loss is a number of targets that transformers' Trainer counted.

    It is a number like any other, so it is known by where it comes from: the Trainers that are at work above.
    """
    trainer: Any = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    if n_items is None or trainer is None:
        return False
    found, frame = [], sys._getframe(1)
    while frame is not None:
        if "num_items_in_batch" in frame.f_code.co_varnames and isinstance(frame.f_locals.get("self"), trainer):
            found.append(frame)
        frame = frame.f_back  # type: ignore[assignment]
    if not found:
        return False
    ways = ("get_batch_samples", "_get_num_items_in_batch")
    kind = type(found[-1].f_locals["self"])
    if any(getattr(kind, way, None) is not getattr(trainer, way, None) for way in ways):
        return False  # somebody counts differently, as RowTrainer does
    count, passed = (frame.f_locals.get("num_items_in_batch") for frame in (found[-1], found[0]))
    handed_on = passed is count and found[0].f_code is trainer.compute_loss.__code__
    return n_items is count or (count is not None and handed_on)


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
    if ids is not None:
        refuse_tokens(ids, vocabulary_of(decoder))
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


def vocabulary_of(model: nn.Module) -> int | None:
    """How many tokens a model's embedding knows, where it says so."""
    with contextlib.suppress(NotImplementedError, AttributeError):
        return getattr(model.get_input_embeddings(), "num_embeddings", None)  # type: ignore[operator]
    return None


def refuse_tokens(ids: Tensor, known: int | None) -> None:
    """Raise if tokens are none of the `known` ones. On a GPU nobody asks: the answer would have to be waited for."""
    if known is None or ids.device.type != "cpu" or not ids.numel():
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= known:
        raise ValueError(
            f"row: it has tokens from {low} to {high}, and the model's vocabulary has {known}: made with another "
            "tokenizer? If tokens were added to it: model.resize_token_embeddings(len(tokenizer))"
        )


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
