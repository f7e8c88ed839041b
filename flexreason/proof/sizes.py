"""Which numbers of a config are sizes, and how small they may be, by what configs call them.

Layers are cut behind the first of every kind. Every length that something depends on (window, chunk, the original
maximum of RoPE) becomes so short that a tree of 150 tokens crosses it. Configs are read by the names of their fields,
which transformers' models mostly share.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig

VOCABULARY, SPECIAL = 97, 88
"""Token ids from `SPECIAL` on are for padding, images and the like."""

HIDDEN, FFN, HEADS, HEAD, ROPE_HEAD, RANK = 64, 48, 4, 16, 8, 16
WINDOW, CHUNK, FLOOR, ORIGINAL, LENGTH = 20, 24, 16, 40, 512
MOST_LAYERS = 24

Fields = Mapping[str, Any]
"""What a config holds, by name."""


def shrunk(fields: Fields, every_layer: bool = False) -> dict[str, Any]:
    """A config's fields, each as small as its name allows; the number of layers too, unless `every_layer` is kept."""
    layers, chosen = _layers(fields)
    if every_layer and layers:
        chosen = list(range(layers))
    parts = {
        key: shrunk(value, every_layer)
        for key, value in fields.items()
        if isinstance(value, dict) and key not in OWN_RULES and ("model_type" in value or key.endswith("_config"))
    }
    return {key: parts.get(key) or _value(key, value, fields, layers, chosen) for key, value in fields.items()}


OWN_RULES = ("per_layer_config", "rope_parameters")
"""Tables of a config that are no configs of parts."""


DROPOUT = re.compile(
    r"((attention|attn|activation|classifier|hidden|resid|residual|emb|embd|embed|embedding|mlp|ffn|summary_first"
    r"|summary_last|(local_|lsh_)?attention_probs)_)?(dropout|pdrop)(_p|_prob|_rate)?"
    r"|((encoder|decoder)_)?layerdrop|drop_path_rate|(router|input)_jitter_noise"
)
"""Names, as models have them, of what draws at random while training."""


def _value(key: str, value: Any, fields: Fields, layers: int, chosen: list[int]) -> Any:
    if isinstance(value, dict):
        if key == "per_layer_config":
            own = {chosen.index(int(layer)): entry for layer, entry in value.items() if int(layer) in chosen}
            return {i: {k: _value(k, v, {**fields, **e}, layers, chosen) for k, v in e.items()} for i, e in own.items()}
        if key == "rope_parameters":
            return _rope(value, fields)
        return value
    if isinstance(value, list | tuple):
        if _is_index_list(key, value, layers):
            return [number for number, layer in enumerate(chosen) if layer in value]
        if layers and len(value) == layers:
            value = [value[layer] for layer in chosen]
        return [_value(key, item, fields, layers, chosen) for item in value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if DROPOUT.fullmatch(key) and isinstance(value, float):
        return 0.0
    if re.search(LAYERS, key):
        return min(value, len(chosen)) if layers else min(value, 2)
    if key == "num_kv_shared_layers":
        return sum(layer >= layers - value for layer in chosen)
    for pattern, rule in RULES:
        if re.search(pattern, key):
            return rule(value, fields) if callable(rule) else min(value, rule)
    return value


LAYERS = r"^(num_hidden_layers|n_layers?|num_layers|(num_)?(decoder|encoder)_layers|depth)$"
PERIODS = r"_(interval|step|period|pattern|frequency|every_n_layers|n_layers)$"
EARLIER = r"^(first_k_dense_replace|num_dense_layers|moe_layer_start_index|max_window_layers|full_attention_start)$"


def _is_index_list(key: str, value: Any, layers: int) -> bool:
    """Numbers of layers, ascending, and not one entry a layer."""
    if not (layers and value and re.search(r"layer|block|_(idxs?|indices|indexes)$", key)):
        return False
    numbers = all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < layers for i in value)
    return numbers and list(value) == sorted(set(value))


def _layers(fields: Fields) -> tuple[int, list[int]]:
    """How many layers there are, and which to keep: at least 2, and all kinds among them.

    Where few are needed it is the first ones. Else each kind's first is picked out, unless the kinds of layers follow
    from their numbers too.
    """
    counts = [value for key, value in fields.items() if re.search(LAYERS, key) and isinstance(value, int)]
    if not counts:
        return 0, [0, 1]
    layers = fields.get("num_hidden_layers") or max(counts)
    listing = {k: v for k, v in fields.items() if isinstance(v, list | tuple)}
    members = [set(v) for k, v in listing.items() if _is_index_list(k, v, layers)]
    lists = [v for k, v in listing.items() if len(v) == layers and not _is_index_list(k, v, layers)]
    own = {int(layer): entry for layer, entry in (fields.get("per_layer_config") or {}).items()}
    sharing = layers - (fields.get("num_kv_shared_layers") or 0)
    kinds = [repr([[v[i] for v in lists], [i in m for m in members], own.get(i), i >= sharing]) for i in range(layers)]
    firsts = {kinds.index(kind) for kind in kinds}
    periods = [v for k, v in fields.items() if re.search(PERIODS, k) and isinstance(v, int) and v > 1]
    kept = min(max(2, *periods, *(first + 1 for first in firsts)), layers)
    if kept <= MOST_LAYERS:
        return layers, list(range(kept))
    chosen = sorted({0, 1, *firsts})
    if periods or len(chosen) > MOST_LAYERS:
        raise ValueError(
            f"its kinds of layers are all there in {kept} layers only, and at most {MOST_LAYERS} are tried"
        )
    return layers, chosen


def _set(size: int) -> Callable[[int, Fields], int]:
    """This size whatever it was, except for what is switched off by 0: so that small models end up alike too."""
    return lambda value, fields: size if value else value


def _heads(value: int, fields: Fields) -> int:
    base = fields.get("num_attention_heads")
    return 2 * HEADS if isinstance(base, int) and value > base else min(value, 2) * HEADS // 2


def _kv_heads(value: int, fields: Fields) -> int:
    heads = next((fields[k] for k in ("num_attention_heads", "n_head", "n_heads") if isinstance(fields.get(k), int)), 0)
    return 1 if value == 1 else HEADS if value >= heads else HEADS // 2


def _shared(value: int, others: Any) -> int:
    """Heads that are as many as others, or that some of these share."""
    return HEADS // 2 if isinstance(others, int) and value < others else HEADS


def _expanded(fields: Fields) -> int:
    """The width of state space models, which is all of their heads together."""
    return int(HIDDEN * (fields.get("mamba_expand") or fields.get("expand") or 2))


def _rope_head(value: int, fields: Fields) -> int:
    """In MLA, of the same share as before, since a factor may say it too."""
    return HEAD if value >= (fields.get("qk_nope_head_dim") or 2 * value) else ROPE_HEAD


def _head_dim(value: int, fields: Fields) -> int:
    rope, nope = fields.get("qk_rope_head_dim"), fields.get("qk_nope_head_dim")
    if rope and nope and value == rope + nope:
        return _rope_head(rope, fields) + HEAD
    if rope and value == rope:
        return _rope_head(rope, fields)
    base = fields.get("head_dim")
    if "attention_hidden_size" in fields:  # twice as wide as the rest
        return 2 * HIDDEN // HEADS
    if "expand" in fields and "num_attention_heads" not in fields:  # Mamba-2
        return _expanded(fields) // HEADS
    return 2 * HEAD if isinstance(base, int) and base < value and not rope else HEAD


def _value_head(value: int, fields: Fields) -> int:
    keys = fields.get("qk_nope_head_dim") or fields.get("head_dim") or value
    return HEAD if value >= keys else HEAD // 2


def _experts(value: int, fields: Fields) -> int:
    groups = fields.get("n_group") or fields.get("num_expert_group") or 1
    return min(value, 8 if groups > 1 else 4)


def _rope_types(fields: Fields) -> set[str]:
    ropes = fields.get("rope_parameters") or {}
    return {r.get("rope_type", "default") for r in (ropes, *ropes.values()) if isinstance(r, dict)}


def _maximum(value: int, fields: Fields) -> int:
    """Long enough for trees, unless it is what RoPE reads."""
    if "dynamic" in _rope_types(fields):
        return ORIGINAL
    original = next(_originals(fields), None)
    return LENGTH if original is None else max(ORIGINAL, round(ORIGINAL * value / original))


def _originals(fields: Fields) -> Iterator[int]:
    ropes = fields.get("rope_parameters") or {}
    for rope in (fields, ropes, *ropes.values()):
        if isinstance(rope, dict) and rope.get("original_max_position_embeddings"):
            yield rope["original_max_position_embeddings"]


def _special_token(value: int, fields: Fields) -> int:
    return value if value < 0 else SPECIAL + value % (VOCABULARY - SPECIAL)


WINDOWS = r"(sliding_window|window_size|sliding_window_size|window_len|swa_window|^local_attention)$"
CHUNKS = r"^(attention_chunk_size|.*attn_chunk_length)$"
FLOORS = r"^(floor_scale|log_scaling_n_floor|rel_extent)$"
PICKED = r"^(index_topk|indexer_budget)$"
ORIGINALS = r"^original_max_position_embeddings$"

RULES: list[tuple[str, int | Callable[[Any, Fields], Any]]] = [  # the first that matches; an int is the most it may be
    (r"(token_id|token_index|eod_token_ids?)$", _special_token),
    (r"type_vocab_size$", 4),
    (r"vocab_size|hash_byte_group_vocab", _set(VOCABULARY)),
    (r"^(hidden_size|n_embd|d_model)$", _set(HIDDEN)),
    (r"^attention_hidden_size$", 2 * HIDDEN),
    (r"^(intermediate_size|moe_intermediate_size|n_inner|ffn_dim)$", _set(FFN)),
    (r"(num_key_value_heads|kv_heads|kv_n_heads)$", _kv_heads),
    (r"^(index_n_heads|indexer_n_heads|indexer_kv_heads|mamba_n_heads|n_mamba_heads|mamba_num_heads)$", HEADS),
    (r"^mamba_(d_head|head_dim|headdim)$", lambda value, fields: _expanded(fields) // HEADS),
    (r"^mamba_d_ssm$", lambda value, fields: _expanded(fields)),
    (r"^(mamba_)?n_?groups$", HEADS // 2),
    (r"(d_state|state_size)$", RANK),
    (r"^linear_num_key_heads$", lambda value, fields: _shared(value, fields.get("linear_num_value_heads"))),
    (r"^linear_num_(value_)?heads$", HEADS),
    (r"(num_heads|n_heads?|attention_heads|attention_heads_per_layer)$", _heads),
    (r"^qk_rope_head_dim$", _rope_head),
    (r"^rotary_dim$", ROPE_HEAD),
    (r"v_head_dim$", _value_head),
    (r"(head_dim|head_size|dim_head|d_head|kv_channels|head_dim_size)$", _head_dim),
    (r"_rank$|lowrank$", RANK),
    (r"(experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts)$", 2),
    (r"^topk_group$", 1),
    (r"^(n_group|num_expert_group)$", 2),
    (r"shared_experts$", 2),
    (r"(num_experts|n_routed_experts|num_local_experts|expert_num)$", _experts),
    (PICKED, 8),
    (r"^index_block_size$", 8),
    (r"^index_topk_blocks$", 2),
    (ORIGINALS, ORIGINAL),
    (r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|max_target_positions)$", _maximum),
    (EARLIER, 1),
    (r"^(num_nextn_predict_layers|num_mtp_layers)$", 1),
    (rf"{WINDOWS}|block_size$", WINDOW),
    (CHUNKS, CHUNK),
    (r"^(mamba_)?chunk_size$", CHUNK),
    (FLOORS, FLOOR),
    (r"^d_rel$", 8),
    (r"^num_blocks$", 2),
    (r"^image_size$", 32),
    (r"(hidden_size_per_layer_input|ple_embed_dim)$", RANK),
    (r"^(intermediate_size.*|.*_intermediate_size|n_inner|.*ffn_dim|dff|dim_ff|feed_forward_size|d_inner)$", FFN),
    (r"^(ffn_hidden_size|.*ffn_hidden_size|moe_latent_size)$", FFN),
    (r"(hidden_size|n_embd|d_model|embed_dim|emb_dim|_size|_dim|_width|_size_global|_channels?)$", HIDDEN),
]


def _rope(fields: dict[str, Any], config: Fields) -> dict[str, Any]:
    """Kinds and factors stay; the original length and what lists one number a frequency become small."""
    if "rope_type" not in fields:
        return {key: _rope(value, config) if isinstance(value, dict) else value for key, value in fields.items()}
    partial = fields.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1
    rope = config.get("qk_rope_head_dim")
    frequencies = (_rope_head(rope, config) if rope else int(HEAD * float(partial))) // 2
    small = dict(fields)
    if small.get("original_max_position_embeddings"):
        small["original_max_position_embeddings"] = ORIGINAL
    for key in ("short_factor", "long_factor"):
        if small.get(key):
            small[key] = (list(small[key]) * frequencies)[:frequencies]  # small models have fewer than 8
    if section := small.get("mrope_section"):
        parts = [max(1, round(part * frequencies / sum(section))) for part in section]
        parts[0] += frequencies - sum(parts)
        small["mrope_section"] = parts
    return small


LENGTHS = "|".join([WINDOWS, CHUNKS, FLOORS, PICKED, ORIGINALS])


def length_constants(config: PreTrainedConfig) -> dict[str, int]:
    """Tokens behind which a model does something else, by what its config calls them: what `shrink` makes short.

    >>> from transformers import Llama4TextConfig
    >>> length_constants(Llama4TextConfig())
    {'attention_chunk_size': 8192, 'floor_scale': 8192}
    """
    fields = config.get_text_config().to_dict()
    ropes = fields.get("rope_parameters") or {}
    lengths: dict[str, int] = {}
    for part in (fields, ropes, *ropes.values()):
        for key, value in part.items() if isinstance(part, dict) else ():
            whole = isinstance(value, int | float) and not isinstance(value, bool) and value > 0 and value == int(value)
            if re.search(LENGTHS, key) and whole:
                lengths[key] = int(value)
    if fields.get("index_topk_blocks") and fields.get("index_block_size"):
        lengths["index_topk_blocks x index_block_size"] = fields["index_topk_blocks"] * fields["index_block_size"]
    if "dynamic" in _rope_types(fields):
        lengths["max_position_embeddings"] = fields["max_position_embeddings"]
    return lengths
