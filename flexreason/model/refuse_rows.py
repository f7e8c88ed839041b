"""What is refused of rows, with the reason: those that are not whole, and those that a model or trainer takes wrongly.

Shapes: S tokens, T targets.
"""

import contextlib
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexreason.model.find import WRAPPERS, dropouts_of, home_of, packages_of, replaced_forward
from flexreason.model.refuse import refuse_rope
from flexreason.tree.layout import begins_stretch
from flexreason.tree.mask import MASK_KEYS, interval_rule, turn_role_rule
from flexreason.tree.row import IGNORED, NOBODY

RANDOM = ("dropout", "pdrop", "jitter", "layerdrop")
"""What the names of config entries say that draw at random while training."""


def refuse_call(given: Mapping[str, Any]) -> None:
    """Raise if somebody took a row's labels out, to compute a loss of the logits that shifts them."""
    if given.get("labels") is None and given.get("shift_labels") is not None:
        raise ValueError(
            "row: it came with shift_labels and without labels, as a Trainer gives it that has label_smoothing_factor "
            "or compute_loss_func: these take the labels out, and shift them, which are in their places; leave both "
            "out. For a loss of your own, in which line t of the logits belongs to target t, leave out shift_labels too"
        )


STATES = ("past_key_values", "cache_params", "state", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
"""What tells recurrent layers of tokens before, or of sequences side by side."""


def refuse_states(given: Mapping[str, Any]) -> None:
    """Raise if a row came with what recurrent layers would go on from, or be reset by."""
    for key in STATES:
        if given.get(key) is not None:
            raise ValueError(
                f"row: it came with {key}; recurrent layers go on from the states of a row's own tokens, and where its "
                f"documents begin is in the row: leave {key} out"
            )


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
        raise ValueError("row: input_ids is missing; pass all that fr.collate made")
    if ids is not None:
        refuse_tokens(ids, vocabulary_of(decoder))
    until = given["until"]
    if until.dim() != 2 or until.shape[0] != 1:
        raise ValueError(
            f"row: expected one row, [1, S], found until of shape {list(until.shape)}; collate packs all layouts of a "
            "batch into one row, so use a batch size of 1 and a longer row"
        )
    for key in MASK_KEYS:
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
        raise ValueError(
            "row: it came with an attention_mask of its own; a row's mask follows from its layout; leave the key out"
        )
    if given.get("past_key_values") is not None:
        raise ValueError("row: it came with past_key_values; a row is whole in itself: leave them out")
    config = getattr(decoder.config, "get_text_config", lambda: decoder.config)()
    if given.get("output_router_logits") or getattr(config, "output_router_logits", False):
        raise ValueError(
            "row: output_router_logits is on, but the router's auxiliary loss would count the tokens of the tree, not "
            "of the samples; set config.output_router_logits = False (trl: router_aux_loss_coef=0.0)"
        )
    refuse_rope(config, given)


def refuse_places(given: Mapping[str, Any]) -> None:
    """Raise if a row's tokens do not stand behind each other on their paths: somebody on the way to the decoder gave
    them other places. On a GPU nobody asks: the answer would have to be waited for."""
    position, until = given["position_ids"], given["until"][0]
    if position.device.type != "cpu" or position.shape != given["until"].shape:
        return
    bounds = torch.zeros(len(until) + 1, dtype=torch.int64)
    bounds[1:] += 1
    bounds -= torch.zeros_like(bounds).scatter_add_(
        0, until.long().clamp(max=len(until)), torch.ones_like(until).long()
    )
    beyond = (position[0] - bounds.cumsum(0)[:-1])[given["document"][0] != NOBODY]  # tokens before it on its path
    if len(beyond) and not bool((beyond == beyond[0]).all()):
        raise ValueError(
            "row: its position_ids are not the places of its tokens on their paths: what holds the model, or a hook "
            "before it, changed them; pass them on as fr.collate made them"
        )


def refuse_noise(root: PreTrainedModel) -> None:
    """Raise if a Trainer put NEFTune into the embeddings of a model in training."""
    embeddings: Any = root.get_input_embeddings()
    if getattr(embeddings, "neftune_noise_alpha", None) and embeddings.training:
        raise ValueError(
            "row: neftune_noise_alpha scales its noise by the length of what a model is given, which is that of a row "
            "and not of its samples; leave it out"
        )


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
            "tokenizer? Use the model's own. If tokens were added to it: model.resize_token_embeddings(len(tokenizer))"
        )


def replaced_by(root: PreTrainedModel) -> str:
    """The module whose function stands in place of the model's own forward, or nothing."""
    replaced = replaced_forward(root, (*WRAPPERS, *packages_of(type(root))))
    return "" if replaced is None else home_of(replaced)


def real_targets(given: Mapping[str, Any]) -> Tensor:
    """[1, T] which targets are not ignored; labels do not come as far as the decoder everywhere."""
    labels, document = given.get("shift_labels"), given["target_document"]
    return document != NOBODY if labels is None or labels.shape != document.shape else labels != IGNORED


def refuse_other_layouts(row: Mapping[str, Tensor]) -> None:
    """Raise unless the paper's rule and the tree agree: under mask="turn_role" only `lay_out_turns` layouts do.

    Both rules are the same for all tokens of a run (consecutive positions, one turn, role, document and `until`)
    and all of another, so that one token of each run tells; inside a run both are causal.
    """
    until, *words = (row[key][0] for key in ("until", "turn", "role", "document"))
    first = begins_stretch(row["position_ids"][0], until, *words).nonzero().squeeze(1)
    first = first[row["document"][0, first] >= 0]
    q, kv = first[:, None], first[None, :]
    zero = torch.zeros((), dtype=torch.int64, device=first.device)
    by_tree = interval_rule(until)(zero, zero, q, kv)
    by_words = turn_role_rule(*words)(zero, zero, q, kv)
    differ = by_tree != by_words
    if differ.any():
        at, other = (int(first[i]) for i in differ.nonzero()[0])
        raise ValueError(
            f'row: mask="turn_role" takes rows of lay_out_turns layouts only, and here turns and roles say otherwise '
            f'than the tree whether token {at} sees token {other}; use mask="interval"'
        )


def warn_of_dropout(root: nn.Module) -> None:
    """Say that one draw of dropout is shared by all samples of a row."""
    places = [name for name, dropout in dropouts_of(root).items() if dropout.p > 0 and dropout.training]
    config = root.config.get_text_config() if isinstance(root, PreTrainedModel) else None
    for key, value in (vars(config) if config is not None else {}).items():
        of_decoder = any(word in key for word in RANDOM) and not key.startswith("classifier")
        if of_decoder and isinstance(value, float) and value > 0:
            places.append(f"config.{key} = {value}")
    if places:
        warnings.warn(
            f"flexreason: randomness is on in {len(places)} places ({places[0]}, ...); one draw is shared by all "
            "samples of a row, where N passes would draw N times",
            stacklevel=2,
        )
    if any((getattr(getattr(m, "state", None), "threshold", None) or 0) > 0 for m in root.modules()):
        warnings.warn(  # LLM.int8 of bitsandbytes
            "flexreason: linear layers of 8 bits compute columns with an outlier apart, for all tokens of a row at "
            "once, and round otherwise than the samples do; load the model with llm_int8_threshold=0.0, or in 4 bits",
            stacklevel=2,
        )
