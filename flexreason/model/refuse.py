"""What is refused of models by looking at them, with the reason.

What must be tried to be known is asked for in patching.py.

Shapes: S tokens, T targets.
"""

import contextlib
import copy
import inspect
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexreason.attention.registry import IMPLEMENTATIONS, attention_of
from flexreason.model.find import dropouts_of
from flexreason.recurrent.entries import INLINE, SCANS, names_of
from flexreason.recurrent.kernels import reason_against_kernels

ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")

SOFTCAP = "attn_logit_softcapping"
"""What configs call the softcap of scores."""

ROPE_BY_LONGEST = ("dynamic", "longrope")
"""RoPE types whose angles depend on the longest position of the whole batch."""


Reason = tuple[str, str]
"""Why, and what can be done."""

SAMPLES = "train on the N samples"

RECURRENT = "it has recurrent layers, which carry state from token to token past any mask"

NO_STATE = f"{RECURRENT}, in a scan that begins from no state: it would take one that begins from a state it is given"

UNSUPPORTED = {  # families whose layers go past masks in ways that no tree goes through yet, and what it would take
    "falcon_mamba": NO_STATE,
    "jamba": NO_STATE,
    "mamba": NO_STATE,
    "zamba": NO_STATE,
    "recurrent_gemma": f"{RECURRENT}, in a scan of its own (RG-LRU) and a convolution of its own: it would take both "
    "from the state of a token's parent",
    "rwkv": f"{RECURRENT}, in kernels of its own that give no gradient to a state: it would take others",
    "xlstm": f"{RECURRENT}, in kernels of its own (mLSTM): it would take them from the state of a token's parent",
    "qwen4_exp": "it hashes a token with its neighbours in storage, and has dilated convolutions and a token indexer: "
    "it would take ancestors in the places of neighbours in all three",
    "glm5_next": "it has a token indexer, which picks keys by scores of its own, past the tree's mask: it would take "
    "one that picks ancestors",
    "inkling": "it adds a position bias to its scores: it would take attention with a bias by distance on the path",
    "inkling2": "it adds a position bias to its scores, and has convolutions with weights of each token's own: it "
    "would take attention with a bias by distance on the path, and ancestors in the places of neighbours",
}


def refuse_model(root: PreTrainedModel, model: nn.Module | None = None) -> None:
    """Raise if a look at the model is enough to say that it cannot take rows exactly.

    `model` is what wraps it, if anything: some adapters are known by their wrapper only.
    """
    if against := reason_against_adapters(model or root) or reason_against(root):
        raise refusal(root, against)


def refusal(root: PreTrainedModel, against: Reason) -> ValueError:
    """The error that names the model, the reason, and what can be done."""
    return ValueError(f"patch: {model_class(root).__name__} is refused: {'; '.join(against)}")


OWN_LOSS = "computes its loss in its own forward, from all logits"


def refuse_unchunked(root: PreTrainedModel, what: str, unchunked: str) -> None:
    """Raise if the model's logits cannot be made a chunk at a time: a test of its class found why (`unchunked`) what
    comes out is not the samples'."""
    if unchunked:
        name = model_class(root).__name__
        raise ValueError(f'{what}: {name} takes no chunked loss: {unchunked}; use loss="model"')


@cache
def asks_loss_function(forward: Any) -> bool:
    """Whether a model's forward, as its class has it, asks the model's loss function, as far as its source says."""
    with contextlib.suppress(OSError, TypeError):  # no source to read
        return "loss_function" in inspect.getsource(forward)
    return False


def model_class(root: nn.Module) -> type:
    """The class that a model was written as: torch makes subclasses of its own for sharded modules."""
    return next(cls for cls in type(root).__mro__ if not cls.__module__.startswith("torch.distributed"))


def reason_against_adapters(model: nn.Module) -> Reason | None:
    """What speaks against the adapters of peft that are in a model or around it."""
    layers = {_kind_of_layer(module): module for module in model.modules() if hasattr(module, "base_layer")}
    found = (reason_against_adapter(module) for module in model.modules())
    return next(filter(None, (*found, *map(_reason_against_layer, layers.values()))), None)


def _kind_of_layer(module: nn.Module) -> tuple:
    """Layers of one class may hold variants of an adapter."""
    variants = getattr(module, "lora_variant", {})
    return type(module), *(type(variant) for _, variant in sorted(variants.items()))


@torch.no_grad()
def _reason_against_layer(module: nn.Module) -> Reason | None:
    """What speaks against a layer with adapters: that what it gives one token, or its gradient, depends on another.

    It is given two tokens, the second of which is no number: that goes wherever it is looked at, whatever the weights.
    """
    p = next((p for p in module.parameters() if p.is_floating_point()), None)
    base, width = module.base_layer, getattr(module, "in_features", None)
    if p is None or p.device.type == "meta" or not isinstance(width, int) or not isinstance(base, nn.Module):
        return None
    modes = {part: part.training for part in module.modules()}
    two = torch.zeros(1, 2, width, dtype=p.dtype, device=p.device)
    two[:, 1] = torch.nan
    try:
        module.eval()
        mixes = bool(module(two)[0, 0].isnan().any()) and not bool(base(two)[0, 0].isnan().any())
    except Exception:  # a layer may ask for more than there is here, or be on several devices
        return None
    finally:
        for part, mode in modes.items():
            part.training = mode
    name = ", ".join(f"{kind.__module__}.{kind.__name__}" for kind in _kind_of_layer(module))
    if mixes:
        return f"its adapter ({name}) lets each token see all others of the batch", "train a LoRA"
    if _mixes_gradients(module, base, width):
        return (
            f"its adapter ({name}) makes the gradient of a token from all tokens of the batch",
            'train a LoRA, or a VeLoRA with init_type="random"',
        )
    return None


def _mixes_gradients(module: nn.Module, base: nn.Module, width: int) -> bool:
    """Whether an adapter makes the gradients of one token from other tokens too, in training.

    Copies of the adapter with random weights are tried, since weights of zero give no gradient.
    """
    gradients = []
    try:
        for other in (1, 2):
            twin = copy.deepcopy(module, {id(base): base}).train()
            for dropout in dropouts_of(twin).values():
                dropout.training = False
            own = [p for name, p in twin.named_parameters() if not name.startswith("base_layer.") and p.requires_grad]
            with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
                torch.manual_seed(0)
                for p in own:
                    p.data = (torch.randn(p.shape) * 0.1).to(p)
                tokens = torch.randn(1, 3, width)[:, [0, other]].to(own[0])
                gradients.append(torch.autograd.grad(twin(tokens)[0, 0].sum(), own, allow_unused=True))
    except Exception:  # as above
        return False
    pairs = [(one, another) for one, another in zip(*gradients, strict=True) if one is not None and another is not None]
    return not all(torch.allclose(one, another, rtol=1e-2, atol=1e-6) for one, another in pairs)


def reason_against_adapter(module: nn.Module) -> Reason | None:
    """What speaks against the adapters that one module knows of."""
    adapters = getattr(module, "peft_config", None)
    for adapter in adapters.values() if isinstance(adapters, Mapping) else [adapters]:
        name = type(adapter).__name__
        if getattr(adapter, "alora_invocation_tokens", None):
            return (
                f"its adapter is an activated LoRA ({name}.alora_invocation_tokens), which looks for its "
                "invocation in storage and not on a token's path",
                "train it as a LoRA without alora_invocation_tokens",
            )
        if (weight := getattr(adapter, "orth_reg_weight", 0)) > 0:
            return (
                f"its adapter ({name}) adds a regularisation to the loss of every row, which nothing divides: a step "
                f"would depend on how its targets fall on rows (orth_reg_weight is {weight})",
                "give it orth_reg_weight=0, or train a LoRA",
            )
        if hasattr(adapter, "shadow_model"):
            return (
                f"its adapter ({name}) runs a second model over the batch, which takes no rows",
                "train a LoRA",
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
    called = {name for module in root.modules() for name in names_of(module)}
    if called and (against := reason_against_kernels(called, bool(getattr(root, "use_kernels", False)))):
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
    if against := reason_against_layers(cls, text):
        return against, SAMPLES
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


def reason_against_layers(cls: type, config: Any) -> str:
    """Why a class carries something from token to token in ways that go through no tree, or nothing."""
    bases = [base for base in cls.__mro__ if issubclass(base, PreTrainedModel) and base.__module__ in sys.modules]
    families = [base.__module__.split(".")[-2] for base in bases if base.__module__.startswith("transformers.models.")]
    against = next((UNSUPPORTED[family] for family in families if family in UNSUPPORTED), "")
    if not getattr(cls, "_is_stateful", False):
        return against
    takes_trees = any((SCANS.keys() | INLINE.keys()) & vars(sys.modules[base.__module__]).keys() for base in bases)
    return (against or ("" if takes_trees else RECURRENT)) if is_recurrent(cls, config) else ""


def rope_settings(config: Any) -> list[dict[str, Any]]:
    """A config's RoPE parameters; some have one set for each kind of layer."""
    settings = getattr(config, "rope_parameters", None) or {}
    return [settings] if "rope_type" in settings else [rope for rope in settings.values() if isinstance(rope, dict)]


def rope_types(config: Any) -> set[str]:
    return {rope.get("rope_type", "default") for rope in rope_settings(config)}


def refuse_rope(config: Any, given: Mapping[str, Any]) -> None:
    """RoPE that reads the longest position of a batch is the samples' own only if all are on one side; a dynamic one,
    which makes other angles for every length above its threshold, only if all are below."""
    for rope in rope_settings(config):
        if rope.get("rope_type") not in ROPE_BY_LONGEST:
            continue
        is_dynamic = rope["rope_type"] == "dynamic"
        original = config.max_position_embeddings
        if not is_dynamic:
            original = rope.get("original_max_position_embeddings") or original
        longest = sample_lengths(given)
        short = longest < original if is_dynamic else longest <= original
        if bool(short.all()) or not (is_dynamic or bool(short.any())):
            continue
        how = f"changes with the longest of a batch above {original}"
        remedy = f"keep samples on both sides of {original} in different rows"
        if is_dynamic:  # transformers goes back to the angles of short batches below the threshold, not at it
            how, remedy = f"{how}, and stays so at {original}", f"it takes samples of fewer than {original} tokens"
        raise ValueError(
            f"row: its samples have {int(longest.min())} to {int(longest.max())} tokens, and this model's RoPE "
            f"({rope['rope_type']}) {how}: one pass would differ from the samples; {remedy}"
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
