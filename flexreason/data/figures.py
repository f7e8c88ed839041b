"""What is counted of a conversation, and how much work a model has with it.

`Figures` are plain numbers, made where a conversation is encoded, that fit on a line of JSON. `Shape` is a model as far
as work is concerned. Counted are the matrix products of a training step, forward and backward, nothing else:

    6 x weights of the layers x tokens + 6 x vocabulary x width x targets + attention x visible pairs

Attention is counted as flash kernels compute it: two products forward and five backward for every pair, head and layer.
Of experts those count that a token goes through. Recurrent layers cost as much for a token whatever stands before it:
their state is read, written and corrected, and the tokens of a chunk meet one another, as in torch's scans. Padding is
not counted, nor is what gradient checkpointing computes again.

>>> shape = dense("toy", width=8, inner=16, layers=2, heads=2, groups=1, size=4, vocabulary=10)
>>> shape.weights, shape.head, shape.pair
(1152, 80, 224)
>>> shape.work(Amount(tokens=5, pairs=15, targets=3)) == 6 * 1152 * 5 + 6 * 80 * 3 + 224 * 15
True

The rule of thumb: one pass is faster by the work of the N samples over the work of the tree. docs/performance.md says
how near measured times come to it.
"""

import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from flexreason.data.intake import Item
from flexreason.data.splitting import Split, in_storage, seen_from, split
from flexreason.talk.sources import CONFIGS, why_missing, why_unusable
from flexreason.tree.layout import Layout
from flexreason.tree.sample import Role, Sample


class Amount(NamedTuple):
    """What work is counted from."""

    tokens: int = 0
    pairs: int = 0  # of tokens, one of which sees the other
    targets: int = 0

    def plus(self, other: "Amount") -> "Amount":
        return Amount(*(a + b for a, b in zip(self, other, strict=True)))


# --- a conversation


@dataclass(frozen=True)
class Figures:
    """What a report needs to know of a conversation, at one length of rows."""

    where: str
    format: str
    answers: int  # assistant messages, trained on or not
    samples: int  # one a turn that is trained on
    sample_tokens: int
    sample_pairs: int  # visible ones, as all below
    tree_tokens: int
    tree_pairs: int
    reasoning: int  # targets that are
    response: int
    longest_sample: int
    parts: list[int]  # tokens of each part; one, unless the tree is longer than a row
    recomputed: list[int]  # of these, tokens that an earlier part has too
    part_pairs: int
    too_long: list[list[int]]  # turn, tokens and targets of every sample that is longer than a row, and in no part
    how: dict[str, int]  # how many turns were found in which way
    dirty: dict[str, int] = field(default_factory=dict)  # answers of each kind of dirt, which are trained all the same
    seconds: float = field(default=0.0, compare=False)  # that encoding took
    render_seconds: float = field(default=0.0, compare=False)  # of these, in the template

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Figures":
        return cls(**values)

    @property
    def targets(self) -> int:
        return self.reasoning + self.response

    @property
    def left_out(self) -> Amount:
        """What the samples are that no row can take."""
        sizes = [tokens for _, tokens, _ in self.too_long]
        return Amount(sum(sizes), sum(map(_triangle, sizes)), sum(targets for _, _, targets in self.too_long))

    @property
    def one_by_one(self) -> Amount:
        """The N samples that rows can take."""
        out = self.left_out
        return Amount(self.sample_tokens - out.tokens, self.sample_pairs - out.pairs, self.targets - out.targets)

    @property
    def one_pass(self) -> Amount:
        """The same samples as parts in rows, with what is computed again."""
        return Amount(sum(self.parts), self.part_pairs, self.targets - self.left_out.targets)


def figures_of(item: Item, length: int, parts: Split | None = None) -> Figures:
    """The figures of a conversation in rows of `length`; `parts`, if it has been split for them already."""
    samples, layout, conversation = item.encoded.samples, item.layout, item.conversation
    sizes = [len(sample) for sample in samples]
    parts = parts or split(layout, length, too_long="drop")
    reasoning = sum(map(_reasoning, samples))
    how = item.encoded.how
    answers = sum(message["role"] == "assistant" for message in conversation.messages)
    return Figures(
        where=conversation.where,
        format=conversation.format,
        answers=len(samples) if conversation.samples is not None else answers,
        samples=len(samples),
        sample_tokens=sum(sizes),
        sample_pairs=sum(map(_triangle, sizes)),
        tree_tokens=len(layout),
        tree_pairs=_pairs(layout),
        reasoning=reasoning,
        response=len(layout.target_ids) - reasoning,
        longest_sample=max(sizes),
        parts=[len(part) for part in parts.parts],
        recomputed=_recomputed(layout, parts),
        part_pairs=sum(map(_pairs, parts.parts)),
        too_long=[[turn, sizes[turn], len(samples[turn].target_ids)] for turn in parts.dropped],
        how={kind: how.count(kind) for kind in sorted(set(how))},
        dirty=dict(Counter(item.encoded.dirty.values())),
        seconds=item.seconds,
        render_seconds=item.encoded.render_seconds,
    )


def _triangle(n: int) -> int:
    """Visible pairs of n tokens in a chain."""
    return n * (n + 1) // 2


def _pairs(layout: Layout) -> int:
    """Visible pairs of a tree: each token is seen from itself to where its subtree ends."""
    return int((layout.until - torch.arange(len(layout))).sum())


def _reasoning(sample: Sample) -> int:
    return 0 if sample.target_roles is None else sum(bool(role & Role.REASONING) for role in sample.target_roles)


def _recomputed(layout: Layout, parts: Split) -> list[int]:
    """For each part, the tokens that an earlier part has too."""
    if len(parts.parts) < 2:
        return [0] * len(parts.parts)
    last, seen, recomputed = in_storage(layout)[0], torch.zeros(len(layout), dtype=torch.bool), []
    for turns in parts.turns:
        needed = seen_from(layout, [last[turn] for turn in turns])
        recomputed.append(int((needed & seen).sum()))
        seen |= needed
    return recomputed


# --- a model


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


LITTLE = 1.15
"""A speed-up from which on one pass pays. Below, what it saves is lost in the noise of most machines."""


def advice(speed_up: float) -> str:
    """What to do where one pass gains nothing; empty where it gains."""
    if speed_up >= LITTLE:
        return ""
    return f"speed-up {speed_up:.2f}: these conversations share too little; train them as they are"


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
"""Where no model is named: dense models of the usual sizes, shaped like Qwen3's."""

TOP_K = re.compile(r"(experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts)$")
"""Names under which configs say how many experts a token goes through."""


def shape_of(source: str) -> Shape:
    """The shape of a model by name, folder or config.json; its weights are not read."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if why := why_missing(source):
        raise ValueError(f"{source}: the shapes of a causal language model cannot be read from it: {why}")
    try:
        config = AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        return shape_of_model(source, model)
    except Exception as error:  # whatever a config may raise
        why = why_unusable(source, "config.json", CONFIGS, error)
        raise ValueError(
            f"{source}: the shapes of a causal language model cannot be read from it: {why}; leave --model out"
        ) from error


def shape_of_model(name: str, model: Any) -> Shape:
    """The shape of a model that is there, with or without weights."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    weights = sum(_products(model.base_model, config, head)) + sum(map(_scan, model.base_model.modules()))
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    plain = getattr(config, "head_dim", None) or config.hidden_size // heads
    layers = _attention_layers(model, layers)
    compressed = all(hasattr(config, f"{part}_head_dim") for part in ("qk_nope", "qk_rope", "v"))  # MLA
    key = config.qk_nope_head_dim + config.qk_rope_head_dim if compressed else plain
    pair = _pair(key, config.v_head_dim if compressed else plain)
    kinds = getattr(config, "layer_types", None) or (["sliding"] if getattr(config, "sliding_window", None) else [])
    windows = any("sliding" in kind or "chunked" in kind for kind in kinds)
    note = "its windows are not counted: every layer as if it saw everything" if windows else ""
    return Shape(name, weights, config.vocab_size * config.hidden_size, layers * heads * pair, note)


def _products(decoder: nn.Module, config: Any, head: nn.Module | None) -> list[int]:
    """The weights of each matrix product that a token goes through; of experts, a token's share."""
    products = []
    experts = {name: len(m) for name, m in decoder.named_modules() if name.endswith("experts") and _is_list(m)}
    for name, module in decoder.named_modules():
        if module is head or isinstance(module, nn.Embedding):
            continue
        n_experts = next((n for prefix, n in experts.items() if name.startswith(prefix + ".")), 0)
        for weight in module.parameters(recurse=False):
            if isinstance(module, nn.modules.conv._ConvNd):
                products.append(weight.numel() if weight.dim() > 1 else 0)
            elif weight.dim() == 3:  # experts in one tensor
                products.append(weight.numel() * _top_k(config) // weight.shape[0])
            elif weight.dim() == 2:
                products.append(weight.numel() * _top_k(config) // n_experts if n_experts else weight.numel())
    return products


def _attention_layers(model: nn.Module, layers: int) -> int:
    """How many of a model's layers attend: all, unless there are recurrent ones among them."""
    if not any(map(_is_recurrent, model.modules())):
        return layers
    return sum(type(m).__name__.endswith("Attention") and not _is_recurrent(m) for m in model.modules())


def _is_recurrent(module: nn.Module) -> bool:
    return _state(module) is not None or (
        hasattr(module, "conv_kernel_size") and any(isinstance(child, nn.Conv1d) for child in module.children())
    )


STATES = {  # what transformers' layers call their heads and the two sizes of a head's state, by what else they have
    "head_v_dim": ("num_v_heads", "head_k_dim", "head_v_dim"),
    "ssm_state_size": ("num_heads", "ssm_state_size", "head_dim"),
    "conv1d": ("num_heads", "head_dim", "head_dim"),
    "slope_rate": ("num_attention_heads", "head_dim", "head_dim"),
}

CHUNK = 64
"""Tokens of a chunk, as torch's delta rules have them."""


def _state(module: nn.Module) -> tuple[int, int, int] | None:
    """Heads and sizes of a recurrent layer's state; None for any other module."""
    names = next((names for mark, names in STATES.items() if hasattr(module, mark)), ())
    sizes = [getattr(module, name, None) for name in names]
    heads, key, value = [*sizes, None, None, None][:3]
    if isinstance(heads, int) and isinstance(key, int) and isinstance(value, int):
        return heads, key, value
    return None


def _scan(module: nn.Module) -> int:
    """What a recurrent layer multiplies for a token beside its weights, as so many more weights.

    The state is read and written, and the tokens of a chunk meet in two products. A delta rule also reads what the
    state has for its key, and solves a triangle of the chunk for keys and values.
    """
    if (state := _state(module)) is None:
        return 0
    heads, key, value = state
    linear = 2 * key * value + CHUNK * (key + value)
    is_delta = not hasattr(module, "ssm_state_size") and not hasattr(module, "slope_rate")
    return heads * (linear + is_delta * (key * value + CHUNK * key + CHUNK * (key + value) // 2))


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) > 1


def _top_k(config: Any) -> int:
    numbers = [value for key, value in config.to_dict().items() if TOP_K.search(key) and isinstance(value, int)]
    if not numbers:
        raise ValueError("its config does not say how many experts a token goes through; expected num_experts_per_tok")
    return numbers[0]
