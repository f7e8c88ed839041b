"""How much there is to compute: a model's shapes, and the work of training steps on so many tokens, pairs and targets.

Counted are the matrix products, forward and backward, nothing else:

    6 x weights of the layers x tokens + 6 x vocabulary x width x targets + attention x visible pairs

Attention as flash kernels compute it: two products forward, five backward, a pair, head and layer. Of experts those
count that a token goes through. Padding is not counted, nor is what gradient checkpointing computes again.

>>> shape = dense("toy", width=8, inner=16, layers=2, heads=2, groups=1, size=4, vocabulary=10)
>>> shape.weights, shape.head, shape.pair
(1152, 80, 224)
>>> shape.work(Amount(tokens=5, pairs=15, targets=3)) == 6 * 1152 * 5 + 6 * 80 * 3 + 224 * 15
True
"""

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

TOP_K = re.compile(r"(experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts)$")


class Amount(NamedTuple):
    """What work is counted from."""

    tokens: int = 0
    pairs: int = 0  # of tokens, one of which sees the other
    targets: int = 0

    def plus(self, other: "Amount") -> "Amount":
        return Amount(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Shape:
    """A model as far as work is concerned."""

    name: str
    weights: int  # of the layers' matrix products, as far as one token goes through them
    head: int  # vocabulary x width
    pair: int  # operations of attention for one visible pair, all heads and layers, forward and backward
    note: str = ""

    def work(self, amount: Amount) -> int:
        """Floating-point operations of a step."""
        return 6 * self.weights * amount.tokens + 6 * self.head * amount.targets + self.pair * amount.pairs


def dense(
    name: str, *, width: int, inner: int, layers: int, heads: int, groups: int, size: int, vocabulary: int = 151_936
) -> Shape:
    """A plain decoder with gated feed-forward layers; `groups` key heads of `size`."""
    weights = layers * (width * size * 2 * (heads + groups) + 3 * width * inner)
    return Shape(name, weights, vocabulary * width, layers * heads * _pair(size, size))


def _pair(key: int, value: int) -> int:
    """Operations for one pair in one head: keys meet queries in four of the seven products, values in three."""
    return 8 * key + 6 * value


SIZES = [
    dense("0.6B", width=1024, inner=3072, layers=28, heads=16, groups=8, size=128),
    dense("4B", width=2560, inner=9728, layers=36, heads=32, groups=8, size=128),
    dense("8B", width=4096, inner=12288, layers=36, heads=32, groups=8, size=128),
    dense("32B", width=5120, inner=25600, layers=64, heads=64, groups=8, size=128),
]
"""Where no model is named: dense ones of the usual sizes, shaped like Qwen3's."""


def shape_of(source: str) -> Shape:
    """The shape of a model by name, folder or config.json; its weights are not read."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        return _shape(source, model, config.get_text_config())
    except Exception as error:  # whatever a config may raise
        raise ValueError(f"{source}: the shapes of a causal language model cannot be read from it: {error}") from error


def _shape(name: str, model: Any, config: Any) -> Shape:
    head = model.get_output_embeddings()
    weights = sum(_products(model.base_model, config, head))
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    plain = getattr(config, "head_dim", None) or config.hidden_size // heads
    compressed = all(hasattr(config, f"{part}_head_dim") for part in ("qk_nope", "qk_rope", "v"))  # MLA
    key = config.qk_nope_head_dim + config.qk_rope_head_dim if compressed else plain
    pair = _pair(key, config.v_head_dim if compressed else plain)
    kinds = getattr(config, "layer_types", None) or (["sliding"] if getattr(config, "sliding_window", None) else [])
    windows = any("sliding" in kind or "chunked" in kind for kind in kinds)
    note = "its windows are not counted: every layer as if it saw everything" if windows else ""
    return Shape(name, weights, config.vocab_size * config.hidden_size, layers * heads * pair, note)


def _products(decoder: nn.Module, config: Any, head: nn.Module | None) -> list[int]:
    """The weights of each matrix product that a token goes through; of experts, a token's share."""
    made = []
    experts = {name: len(m) for name, m in decoder.named_modules() if name.endswith("experts") and _is_list(m)}
    for name, module in decoder.named_modules():
        if module is head or isinstance(module, nn.Embedding):
            continue
        n = next((n for prefix, n in experts.items() if name.startswith(prefix + ".")), 0)
        for weight in module.parameters(recurse=False):
            if weight.dim() == 3:  # experts in one tensor
                made.append(weight.numel() * _top_k(config) // weight.shape[0])
            elif weight.dim() == 2:
                made.append(weight.numel() * _top_k(config) // n if n else weight.numel())
    return made


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) > 1


def _top_k(config: Any) -> int:
    found = [value for key, value in config.to_dict().items() if TOP_K.search(key) and isinstance(value, int)]
    if not found:
        raise ValueError("its config does not say how many experts a token goes through")
    return found[0]
