"""Families of models, chosen for their differences, through the self-test; and the self-test itself.

The exhaustive scan over all classes is marked slow, and holds the committed list to what it finds.
"""

import dataclasses
import functools
import json
import re
import types
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

import flexreason as fr
from exact import EXACT, errors
from flexreason.attention import segments
from flexreason.attention.registry import BACKENDS, TreeRow
from flexreason.cli import main
from flexreason.model import head, refuse
from flexreason.model import hooks as patching
from flexreason.proof import evidence, selftest
from flexreason.proof.scan import TABLE, scan, table
from flexreason.proof.sizes import HEADS, ORIGINAL, length_constants
from flexreason.proof.source import source_of
from flexreason.proof.tiny import build, causal_classes, default_config, shrink
from models import tiny
from strategies import random_tree, random_turns

FAMILIES = {  # class, without ForCausalLM: why it is here
    "Llama": "the plain one",
    "Mistral": "a window in every layer",
    "Qwen2": "biases of projections",
    "Qwen3Moe": "QK-norm, experts in every layer",
    "Gemma2": "softcap of scores and of logits, windows in every other layer",
    "Gemma3": "two RoPEs, five local layers to a global one",
    "Gemma3n": "per-layer embeddings, layers that share keys, several streams",
    "GptOss": "attention sinks, YaRN, experts, windows in every other layer",
    "Llama4": "chunks, layers without RoPE whose queries are scaled by place, RoPE in complex numbers",
    "Cohere2": "attention and MLP side by side, layers without RoPE, logit scale",
    "SmolLM3": "layers without RoPE",
    "DeepseekV2": "MLA with RoPE in complex numbers",
    "DeepseekV3": "MLA, experts in groups, a dense layer first",
    "MiMoV2Flash": "values of another head size, sinks in windowed layers",
    "Ministral3": "queries scaled by position",
    "Granite": "scales of embeddings, scores, residuals and logits",
    "Mixtral": "experts in every layer",
    "HunYuanMoEV1": "QK-norm behind RoPE, a shared expert",
    "Ernie4_5_Moe": "experts from the second layer on",
    "GPTBigCode": "one key head, learned positions",
    "GPTNeoX": "partial rotary, one projection for q, k and v",
    "Phi3": "one projection for q, k and v",
    "Glm4": "partial rotary in pairs, four norms a layer",
    "Olmo2": "norms behind attention",
    "Olmoe": "clipped projections, experts",
    "DiffLlama": "differences of two attentions",
    "ModernBertDecoder": "two RoPEs, windows, a head with a norm",
    "Laguna": "another number of heads in every layer",
    "Apertus": "an activation with parameters",
    "NanoChat": "norms without weights, softcap of logits",
}


def check(name, **config):
    cls = getattr(transformers, f"{name}ForCausalLM")
    return selftest.check(cls.config_class(**config) if config else default_config(cls), cls)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_chosen_for_their_differences_are_exact(name):
    found = check(name)
    assert found.verdict == "exact", found
    assert max(found.loss, found.logprobs, found.gradients) <= EXACT


@pytest.mark.parametrize("backend", ["segments", "dense"])
@pytest.mark.parametrize("length", [32, 128, 136, 256, 264])
def test_a_layer_that_views_what_attention_gives_takes_rows_of_any_length(length, backend):
    """AFMoE does, and so may a class of anybody: transformers' own attention is contiguous."""
    model = build(shrink(transformers.AfmoeConfig()), transformers.AfmoeForCausalLM).double()
    row = fr.collate([fr.lay_out_turns(random_turns([(3, 4, 5)] * 2))], length=length, block_size=8)
    fr.patch(model, backend)(**row).loss.backward()


# ---- what a self-test is worth: without its special thing, none of these is exact


SPECIAL = [("Mistral", "window"), ("Llama4", "chunk"), ("Gemma2", "softcap"), ("GptOss", "sinks"), ("Gemma3", "window")]


@pytest.mark.parametrize(("name", "thing"), SPECIAL)
def test_a_family_without_its_special_thing_is_not_exact(name, thing, monkeypatch):
    plain = TreeRow.attend

    def without(self, *args, **limits):
        assert thing in limits
        return plain(self, *args, **{**limits, thing: None})

    assert any(thing in word for word in check(name).special)
    monkeypatch.setattr(TreeRow, "attend", without)
    found = check(name)
    assert found.verdict == "refused"
    assert "one pass is not the samples'" in found.reason
    assert found.logprobs > 1e-6


@pytest.mark.parametrize(("name", "limit"), [("Mistral", "window"), ("Llama4", "chunk")])
def test_windows_and_chunks_in_places_of_storage_are_not_exact(name, limit, monkeypatch):
    def prepare(row, *limits):
        in_storage = torch.arange(row["until"].shape[1])[None]
        return plain({**row, "position_ids": in_storage}, *limits)

    dense = BACKENDS["dense"]
    plain = dense.prepare
    monkeypatch.setattr(dense, "prepare", prepare)
    assert check(name).verdict == "refused"


def test_sinks_without_their_gradient_are_not_exact(monkeypatch):
    plain = segments.attend
    monkeypatch.setattr(
        segments,
        "attend",
        lambda q, k, v, work, scale, softcap=None, sinks=None: plain(
            q, k, v, work, scale, softcap, None if sinks is None else sinks.detach()
        ),
    )
    found = check("GptOss")
    assert found.verdict == "refused"
    assert found.logprobs <= EXACT < found.gradients


def test_llama_4s_temperature_is_by_position(monkeypatch):
    monkeypatch.setattr("flexreason.attention.registry._tempered", lambda module, q, tree: q)
    assert check("Llama4").verdict == "refused"


def test_values_of_another_head_size_are_noticed():
    assert "values and keys differ in head size" in check("DeepseekV3").special


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_by_the_longest_sample_is_exact_on_each_side_and_refused_across(kind, monkeypatch):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 4096}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 64, "long_factor": [3.0] * 64}
    config = {"rope_parameters": rope, "max_position_embeddings": 4096 if kind == "dynamic" else 4 * 4096}
    found = check("Llama", **config)
    assert found.verdict == "exact", found
    assert "refused where samples straddle RoPE's threshold" in found.special
    monkeypatch.setattr("flexreason.model.refuse.ROPE_BY_LONGEST", ())
    assert "a row on both sides of that was not refused" in check("Llama", **config).reason


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_experts_are_the_same_however_they_are_computed(implementation):
    model = tiny("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16).double()
    model.set_experts_implementation(implementation)
    found = errors(model, [fr.lay_out(random_tree()), fr.lay_out_turns(random_turns([(11, 20, 5), (3, 0, 5)]))])
    assert max(found.values()) <= EXACT, found


# ---- configs made small


def test_a_small_config_has_every_kind_of_layer_and_short_lengths():
    small = shrink(transformers.Llama4TextConfig())
    assert small.num_hidden_layers == len(small.layer_types) == 4
    assert {"chunked_attention", "full_attention"} == set(small.layer_types)
    assert 0 in small.no_rope_layers
    assert max(small.attention_chunk_size, small.floor_scale) < 40
    small = shrink(transformers.Gemma3TextConfig())
    assert set(small.layer_types) == {"sliding_attention", "full_attention"}
    assert small.sliding_window < 40
    small = shrink(transformers.DeepseekV3Config())
    assert small.first_k_dense_replace == 1 < small.num_hidden_layers
    small = shrink(transformers.Qwen3Config(num_attention_heads=16, num_key_value_heads=8))
    assert (small.num_attention_heads, small.num_key_value_heads) == (HEADS, HEADS // 2)
    small = shrink(transformers.Phi3Config(
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48,
                         "long_factor": [2.0] * 48, "original_max_position_embeddings": 4096},
        max_position_embeddings=131072, original_max_position_embeddings=4096,
    ))  # fmt: skip
    assert small.rope_parameters["original_max_position_embeddings"] == ORIGINAL
    assert small.max_position_embeddings == 32 * ORIGINAL


def test_what_stays_large_is_not_built():
    with pytest.raises(ValueError, match=r"[\d,]+ parameters are left when all sizes that are known here are cut"):
        build(transformers.LlamaConfig(num_hidden_layers=1))


LATE = {
    "an interval": {"num_hidden_layers": 16, "conv_interval": 14},
    "a list of layers": {"num_hidden_layers": 16, "conv_layers": [13, 15]},
    "a list of layers far behind": {"num_hidden_layers": 40, "conv_layers": [33, 38]},
    "kinds far behind": {"num_hidden_layers": 40, "layer_types": ["full_attention"] * 39 + ["conv"]},
}


@pytest.mark.parametrize("which", LATE)
def test_kinds_of_layers_that_come_late_are_in_the_small_config(which):
    small = shrink(transformers.LlamaConfig(**LATE[which]))
    layers = small.num_hidden_layers
    assert layers <= 24
    if "interval" in which:
        assert layers >= small.conv_interval
    elif "list" in which:
        assert small.conv_layers
        assert set(range(layers)) - set(small.conv_layers)
        assert max(small.conv_layers) < layers
    else:
        assert set(small.layer_types) == {"full_attention", "conv"}
        assert len(small.layer_types) == layers


def test_kinds_of_layers_that_do_not_all_fit_are_said():
    found = check("Llama", num_hidden_layers=40, conv_interval=30)
    assert found.verdict == "cannot be built tiny"
    assert "its kinds of layers are all there in 30 layers only, and at most 24 are tried" in found.reason
    found = check("Llama", num_hidden_layers=40, mixer_layers=list(range(39)), some_blocks=[3])
    assert found.verdict == "exact"  # three kinds fit well


def test_only_what_models_call_dropout_is_set_to_zero():
    given = {"token_drop": 0.5, "token_dropout": 0.5, "resid_pdrop": 0.1, "attention_dropout": 0.1, "dropout_rate": 0.1}
    small = shrink(transformers.LlamaConfig(**given))
    assert (small.token_drop, small.token_dropout) == (0.5, 0.5)
    assert small.resid_pdrop == small.attention_dropout == small.dropout_rate == 0


def test_length_constants_are_told_by_name():
    assert length_constants(transformers.Llama4TextConfig()) == {"attention_chunk_size": 8192, "floor_scale": 8192}
    assert length_constants(transformers.MistralConfig(sliding_window=99)) == {"sliding_window": 99}
    assert length_constants(transformers.Qwen3Config()) == {}
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 4096}
    assert length_constants(transformers.Qwen3Config(rope_parameters=rope)) == {
        "original_max_position_embeddings": 4096
    }
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    dynamic = transformers.LlamaConfig(rope_parameters=rope, max_position_embeddings=77)
    assert length_constants(dynamic) == {"max_position_embeddings": 77}
    assert length_constants(transformers.DeepseekV32Config())["index_topk"] == 2048


# ---- what patch makes of it


class Unchanged(transformers.LlamaForCausalLM):
    """A user's own class that changes nothing."""


class Around(nn.Module):
    def __init__(self, inner, change):
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, x):
        return self.inner(self.change(x))


class Shifting(transformers.LlamaForCausalLM):
    """Every token sees a little of the one before it in storage."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = Around(layer.mlp, lambda x: x + 0.1 * nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])


class Counting(transformers.LlamaForCausalLM):
    """A bias by the place in storage."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = Around(layer.mlp, lambda x: x + 0.01 * torch.arange(x.shape[1], dtype=x.dtype)[None, :, None])


class Training(nn.Module):
    """Something that is done in training only, before an MLP."""

    def __init__(self, inner, *steps):
        super().__init__()
        self.inner, self.steps, self.seen = inner, steps, 0

    def forward(self, x):
        for step in self.steps if self.training else ():
            x = step(self, x)
        return self.inner(x)


def noise(self, x):
    return x * (1 + 0.1 * torch.randn_like(x)) + 0.1 * torch.empty_like(x).uniform_()


def dropout(self, x):
    return nn.functional.dropout(x, 0.2) * torch.bernoulli(torch.full_like(x, 0.9))


def batch_mean(self, x):
    return x - 0.5 * x.mean(1, keepdim=True)


def counted(self, x):
    self.seen += x.shape[1]
    return x * (1 + 0.001 * self.seen)


def training(*steps):
    class Made(transformers.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            for layer in self.model.layers:
                layer.mlp = Training(layer.mlp, *steps)

    return Made


RANDOM = {
    (noise,): "exact",
    (dropout,): "exact",
    (noise, dropout): "exact",
    (noise, batch_mean): "refused",
    (batch_mean, dropout): "refused",
    (counted,): "cannot be built tiny",
    (noise, counted): "cannot be built tiny",
}


@pytest.mark.parametrize("steps", RANDOM, ids=lambda steps: "-".join(step.__name__ for step in steps))
def test_what_is_done_in_training_shows_also_where_it_draws_at_random(steps):
    config = tiny("Llama").config
    found = selftest.check(config, training(*steps), ("segments",))
    assert found.verdict == RANDOM[steps], found
    assert ("draws at random in training" in found.special) == (noise in steps or dropout in steps or counted in steps)
    assert torch.rand(3).unique().numel() == 3  # elsewhere draws are draws


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_dtype_changes_nothing(dtype, monkeypatch):
    monkeypatch.setattr(evidence, "_results", {})
    turns = random_turns([(3, 4, 5)] * 2)
    expected = fr.collate([fr.lay_out_turns(turns), fr.lay_out(random_tree())], length=256)
    model = made(Unchanged)
    torch.set_default_dtype(dtype)
    try:
        found = fr.collate([fr.lay_out_turns(turns), fr.lay_out(random_tree())], length=256)
        loss = float(fr.patch(model)(**found).loss.detach())
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    del found["attention_mask"], expected["attention_mask"]  # which are empty
    assert {key: value.dtype for key, value in found.items()} == {key: value.dtype for key, value in expected.items()}
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert loss == pytest.approx(float(model(**expected).loss.detach()), rel=1e-6)


class Particular(transformers.LlamaForCausalLM):
    """It cannot be made from a config alone."""

    def __init__(self, config, more):
        super().__init__(config)


def made(cls, *args):
    return cls(tiny("Llama").config, *args)


def test_an_unknown_class_is_tested_on_its_own_config_once(monkeypatch):
    calls = []
    monkeypatch.setattr(selftest, "check", lambda *args, plain=selftest.check: calls.append(args[:2]) or plain(*args))
    monkeypatch.setattr(evidence, "_results", {})
    for _ in range(2):
        model = fr.patch(made(Unchanged))
    assert [cls for _, cls in calls] == [Unchanged]
    model(**fr.collate([fr.lay_out_turns(random_turns([(3, 4, 5)] * 2))])).loss.backward()


def test_a_loss_with_more_in_it_is_told_from_tokens_that_influence_others():
    config = transformers.BambaConfig(attn_layer_indices=[1], num_hidden_layers=2, z_loss_coefficient=0.1)
    found = selftest.check(config, transformers.BambaForCausalLM, ("segments",))
    assert found.verdict == "refused"
    assert found.reason.startswith("its loss has more in it than its targets' log-probabilities, which are right: one")


@pytest.mark.parametrize("cls", [Shifting, Counting])
def test_an_unknown_class_that_reads_its_neighbours_is_refused_with_the_numbers(cls):
    with pytest.raises(
        ValueError, match=rf"{cls.__name__} is refused: one pass is not the samples' .*logprobs \de-.*; train on the N"
    ):
        fr.patch(made(cls))


def shifted(layer, by):
    layer.mlp = Around(layer.mlp, lambda x: x + by * nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])


class Keeping(transformers.LlamaForCausalLM):
    """Nothing is shifted where it keeps all."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            shifted(layer, 1 - config.keep)


class Versioned(transformers.LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers if config.mixer_version == 2 else ():
            shifted(layer, 0.3)


@pytest.mark.parametrize(("cls", "good", "bad"), [(Keeping, {"keep": 1.0}, {"keep": 0.9}),
                                                  (Versioned, {"mixer_version": 1}, {"mixer_version": 2})])  # fmt: skip
def test_what_was_found_of_one_config_is_not_believed_of_another(cls, good, bad):
    fr.patch(cls(tiny("Llama", **good).config))
    with pytest.raises(ValueError, match=f"{cls.__name__} is refused: one pass is not the samples'"):
        fr.patch(cls(tiny("Llama", **bad).config))


class Dropping(transformers.LlamaForCausalLM):
    """What it calls dropout draws nothing."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            shifted(layer, config.token_drop)


class Late(transformers.LlamaForCausalLM):
    """Neighbours are read in the layers of a list only."""

    def __init__(self, config):
        super().__init__(config)
        for number in config.conv_layers:
            shifted(self.model.layers[number], 0.3)


class OnlyInEval(transformers.LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = Around(layer.mlp, lambda x: x)
            layer.mlp.change = self.change

    def change(self, x):
        return x if self.training else x + 0.3 * nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]


@pytest.mark.parametrize(("cls", "config"), [
    (Dropping, {"token_drop": 0.5}), (OnlyInEval, {}), (Late, {"num_hidden_layers": 16, "conv_layers": [13, 15]}),
    (Late, {"num_hidden_layers": 40, "conv_layers": [33]}),
])  # fmt: skip
def test_what_is_easily_cut_away_is_seen(cls, config):
    with pytest.raises(ValueError, match=f"{cls.__name__} is refused: one pass is not the samples'"):
        fr.patch(cls(tiny("Llama", **config).config))


def test_a_listed_class_whose_other_structure_cannot_be_tried_is_not_believed(monkeypatch):
    monkeypatch.setattr(evidence, "_results", {})
    monkeypatch.setattr(
        selftest, "check", lambda config, cls, backends: selftest.Result(cls.__name__, "cannot be built tiny")
    )
    with pytest.raises(ValueError, match="Qwen3ForCausalLM is refused: nobody has shown it"):
        fr.patch(tiny("Qwen3", attention_bias=True))


# ---- one model is not as its class builds it


def with_own_attention(model):
    def forward(self, hidden_states, **kwargs):
        return self.v_proj(hidden_states), None

    for layer in model.model.layers:
        layer.self_attn.forward = types.MethodType(forward, layer.self_attn)


def with_another_mlp(model):
    shifted(model.model.layers[1], 0.1)


def with_a_convolution(model):
    model.model.layers[0].post_attention_layernorm = nn.Sequential(nn.Conv1d(32, 32, 3, padding=1))


def with_a_wrapped_mlp(model):
    plain = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = functools.wraps(plain)(lambda x: plain(x.roll(1, 1)))


CHANGED = {
    with_own_attention: r"forward of LlamaAttention, by .*with_own_attention",
    with_another_mlp: r"test_families\.Around",
    with_a_convolution: r"torch\.nn\.modules\.conv\.Conv1d",
    with_a_wrapped_mlp: r"forward of LlamaMLP, by .*test_families",
}


@pytest.mark.parametrize("change", CHANGED, ids=lambda change: change.__name__)
def test_a_model_with_replaced_parts_is_refused_until_it_is_trusted(change, monkeypatch):
    monkeypatch.setattr(evidence, "_verified", set())
    model = tiny("Llama")
    change(model)
    with pytest.raises(ValueError, match=f"is refused: parts of it were replaced, .*{CHANGED[change]}.*run fr.verify"):
        fr.patch(model)
    found = evidence.evidence_of_model(model)
    assert found.verdict == "cannot be built tiny"
    assert "parts of it were replaced" in found.against[0]
    evidence.note_verified(model)
    fr.patch(model)
    other = tiny("Llama", num_hidden_layers=3)
    other.model.layers[0].mlp.forward = lambda x: x
    with pytest.raises(ValueError, match="is refused"):
        fr.patch(other)


def test_a_class_that_was_edited_is_tested_whatever_the_list_says(monkeypatch):
    """As libraries do that put their own forward into transformers' classes."""
    monkeypatch.setattr(evidence, "_results", {})
    cls = transformers.models.llama.modeling_llama.LlamaMLP
    plain = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, x: plain(self, x.roll(1, 1)))
    with pytest.raises(ValueError, match="is refused: one pass is not the samples'"):
        fr.patch(tiny("Llama"))
    evidence._results.clear()
    monkeypatch.setattr(cls, "forward", lambda self, x: plain(self, x))
    fr.patch(tiny("Llama"))


def shifting(self, input_ids=None, labels=None, shift_labels=None, num_items_in_batch=None, **kwargs):
    """A loss in one with the head, as libraries wrote before transformers had shift_labels."""
    hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
    if labels is None:
        return CausalLMOutputWithPast(logits=self.lm_head(hidden))
    logits = self.lm_head(hidden[:, :-1]).flatten(0, 1)
    return CausalLMOutputWithPast(loss=nn.functional.cross_entropy(logits, labels[:, 1:].flatten()))


def mixing(self, input_ids=None, labels=None, shift_labels=None, **kwargs):
    hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
    logits = self.lm_head(hidden + nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1])
    loss = None if labels is None else self.loss_function(logits, labels, 97, shift_labels=shift_labels, **kwargs)
    return CausalLMOutputWithPast(loss=loss, logits=logits)


def aligned(self, input_ids=None, labels=None, shift_labels=None, num_items_in_batch=None, **kwargs):
    logits = self.lm_head(self.model(input_ids=input_ids, **kwargs).last_hidden_state)
    loss = None if labels is None else nn.functional.cross_entropy(logits[0], shift_labels[0])
    return CausalLMOutputWithPast(loss=loss, logits=logits if labels is None else None)


@pytest.mark.parametrize("forward", [shifting, mixing, aligned])
def test_a_model_whose_own_forward_was_replaced_is_refused_until_it_is_verified(forward, monkeypatch):
    monkeypatch.setattr(evidence, "_verified", set())
    model, layout = tiny("Llama").double(), fr.lay_out_turns(random_turns([(3, 4, 5)] * 2))
    model.forward = types.MethodType(forward, model)
    words = rf"parts of it were replaced, .*forward of LlamaForCausalLM, .*{forward.__name__}"
    with pytest.raises(ValueError, match=words):
        fr.patch(model)
    if forward is aligned:
        assert fr.verify(model, [layout]).ok
        fr.patch(model)
    else:
        with pytest.raises(ValueError, match=r"the model's forward was replaced .* holds other lines of the logits"):
            fr.verify(model, [layout])
        with pytest.raises(ValueError, match="parts of it were replaced"):
            fr.patch(model)


@pytest.mark.parametrize("forward", [shifting, mixing])
def test_a_class_whose_own_forward_was_replaced_is_tested_whatever_the_list_says(forward, monkeypatch):
    monkeypatch.setattr(evidence, "_results", {})
    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", forward)
    with pytest.raises(ValueError, match="is refused: "):
        fr.patch(tiny("Llama"))


def test_what_wraps_a_model_without_changing_it_is_taken():
    model = tiny("Llama")
    mlp = model.model.layers[0].mlp
    plain = mlp.forward
    mlp.forward = functools.partial(plain)  # nothing is known of what it is around
    functools.update_wrapper(mlp.forward, plain)
    model.model.layers[1].mlp = torch.compile(model.model.layers[1].mlp)
    nn.utils.parametrizations.weight_norm(model.model.layers[1].self_attn.q_proj)
    fr.patch(model)


def adapted(config, family="Qwen3"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(tiny(family), config)


def test_adapters_that_are_not_exact_are_refused_by_name():
    lora = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    model = adapted(peft.LoraConfig(**lora, alora_invocation_tokens=[10]))
    for given in (model, model.get_base_model()):
        with pytest.raises(ValueError, match="is refused: its adapter is an activated LoRA"):
            fr.patch(given)
    fr.patch(adapted(peft.LoraConfig(**lora)))
    fr.patch(adapted(peft.LoraConfig(**lora, modules_to_save=["lm_head"])))
    fr.patch(adapted(peft.LoraConfig(**lora, use_dora=True)))
    fr.patch(adapted(peft.LoraConfig(**lora, trainable_token_indices=[1, 2])))


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
def test_adapters_with_virtual_tokens_are_refused_by_name(kind):
    more = {"encoder_hidden_size": 16} if kind == "PromptEncoderConfig" else {}
    model = adapted(getattr(peft, kind)(num_virtual_tokens=4, task_type="CAUSAL_LM", **more), "Llama")
    with pytest.raises(ValueError, match=rf"is refused: its adapter \({kind}\) puts virtual tokens before"):
        refuse.refuse_model(patching.find_root(model), model)
    with pytest.raises(ValueError, match=rf"is refused by patch: its adapter \({kind}\) puts virtual tokens before"):
        fr.verify(model, [fr.lay_out_turns(random_turns([(3, 4, 5)] * 2))])


# ---- the loss in chunks


def test_the_self_test_holds_the_loss_in_chunks_too(monkeypatch):
    plain, sizes = head.sweep, []

    def sweep(given, hidden, labels, *args, **kwargs):
        sizes.append(len(labels) / (head.CHUNK_LOGITS // given.root.config.vocab_size))
        return plain(given, hidden, labels, *args, **kwargs)

    before = head.CHUNK_LOGITS
    monkeypatch.setattr(head, "sweep", sweep)
    assert check("Llama").chunked is True
    assert min(sizes) > 4
    assert before == head.CHUNK_LOGITS

    def off(given, hidden, labels, *args, **kwargs):
        found = plain(given, hidden, labels, *args, **kwargs)
        if found.hidden is not None:
            found.hidden = found.hidden * 1.001
        return found

    monkeypatch.setattr(head, "sweep", off)
    found = check("Llama")
    assert (found.verdict, found.chunked) == ("exact", False)
    assert "gradients 1e-03" in found.chunked_reason


def test_a_class_that_is_exact_but_not_in_chunks_is_refused_by_name(monkeypatch):
    right = selftest.Result("LlamaForCausalLM", "exact", chunked=False, chunked_reason="it is not the samples'")
    monkeypatch.setattr(evidence, "evidence_of_class", lambda *args, **kwargs: right)
    model = fr.patch(tiny("Llama"))
    with pytest.raises(ValueError, match="LlamaForCausalLM takes no chunked loss: it is not the samples'; use loss="):
        fr.patch(model, loss="chunked")
    model, row = fr.patch(tiny("Llama")), fr.collate([fr.lay_out_turns(random_turns([(3, 4, 5)] * 2))])
    with pytest.raises(ValueError, match="token_logprobs: LlamaForCausalLM takes no chunked loss"):
        fr.token_logprobs(model, row)


def test_the_list_says_which_classes_take_no_loss_in_chunks():
    found = evidence.listed()["models"]
    assert found["WhisperForCausalLM"]["chunked"] is False
    assert "no chunked loss" in TABLE.read_text()
    exact = [entry for entry in found.values() if entry["verdict"] == "exact"]
    assert sum(entry["chunked"] for entry in exact) >= 100
    assert all(entry["chunked_reason"] for entry in exact if not entry["chunked"])


def test_an_unknown_class_that_cannot_be_built_tiny_is_refused_until_it_is_trusted(monkeypatch):
    monkeypatch.setattr(evidence, "_verified", set())
    model = made(Particular, 1)
    with pytest.raises(ValueError, match=r"Particular is refused: nobody has .*missing 1 required .*run fr\.verify"):
        fr.patch(model)
    fr.unpatch(patching.apply_patch(model))  # which asks nobody
    with pytest.raises(ValueError, match="Particular is refused"):
        fr.patch(model)
    assert evidence.evidence_of_model(model).verdict == "cannot be built tiny"
    evidence.note_verified(model)
    fr.patch(model)
    found = evidence.evidence_of_model(model)
    assert (found.verdict, found.against) == ("cannot be built tiny", None)
    with pytest.raises(ValueError, match="Particular is refused"):
        fr.patch(Particular(tiny("Llama", attention_bias=True).config, 1))


def test_trust_counts_for_nothing_against_a_test_that_failed(monkeypatch):
    monkeypatch.setattr(evidence, "_verified", set())
    model = made(Shifting)
    evidence.note_verified(model)
    with pytest.raises(ValueError, match="Shifting is refused: one pass is not the samples'"):
        fr.patch(model)
    assert evidence.evidence_of_model(model).verdict == "refused"
    with pytest.raises(ValueError, match="is refused by patch: one pass is not the samples'"):
        fr.verify(model, [fr.lay_out_turns(random_turns([(3, 4, 5)] * 2))])
    assert evidence.evidence_of_model(tiny("Llama")) == ("exact", None, "")


def test_the_list_is_believed_for_the_source_the_structure_and_the_torch_it_was_made_with_only(monkeypatch):
    asked = []
    right = selftest.Result("LlamaForCausalLM", "exact")
    monkeypatch.setattr(evidence, "_tested", lambda cls, *rest: asked.append(cls.__name__) or right)
    structure = evidence.structure_of(transformers.LlamaConfig())
    source = source_of(transformers.LlamaForCausalLM, transformers.LlamaConfig(), structure)
    llama = {**dataclasses.asdict(right), "structure": structure, "source": source}
    del llama["name"]
    written = {"transformers": "0.0", "torch": torch.__version__, "models": {"LlamaForCausalLM": llama}}
    monkeypatch.setattr(evidence, "listed", lambda: written)
    fr.patch(tiny("Llama"))
    assert not asked
    fr.patch(tiny("Llama", attention_bias=True))
    assert len(asked) == 1
    for other in (
        {**written, "torch": "1.13.0"},
        {**written, "models": {"LlamaForCausalLM": {**llama, "source": "x"}}},
    ):
        asked.clear()
        monkeypatch.setattr(evidence, "listed", lambda other=other: other)
        fr.patch(tiny("Llama"))
        assert len(asked) == 1


def test_the_self_test_leaves_no_trace_and_takes_none():
    """Of random numbers, gradients, autocast, and the config's own settings."""
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert check("Phimoe", output_router_logits=True, return_dict=False).verdict == "exact"
        assert not torch.is_grad_enabled()
    assert torch.get_num_threads() == 3
    torch.set_num_threads(threads)
    assert torch.equal(torch.rand(1), expected)


def test_classes_that_torch_makes_for_sharding_are_the_users_own_class():
    sharded = type("FSDPLlama", (transformers.LlamaForCausalLM,), {"__module__": "torch.distributed.fsdp"})
    assert refuse.model_class(object.__new__(sharded)) is transformers.LlamaForCausalLM


FAIL_AT_THE_FIRST_ROW = {
    "Doge": "it makes more of its mask than a mask",
    "Bart": "it takes no positions, and counts places in storage",
    "Roberta": "it counts positions from behind its padding id",
    "DeepseekV32": "it has a token indexer",
    "Inkling": "it adds a position bias to its scores: it would take",
    "Jamba": "it has recurrent layers, .*: it would take",
}


@pytest.mark.parametrize("name", FAIL_AT_THE_FIRST_ROW)
def test_models_that_would_fail_at_the_first_row_are_refused_by_patch(name):
    cls = getattr(transformers, f"{name}ForCausalLM")
    model = build(shrink(default_config(cls)), cls)
    with pytest.raises(ValueError, match=f"{name}ForCausalLM is refused: {FAIL_AT_THE_FIRST_ROW[name]}.*; train on"):
        fr.patch(model)


@pytest.mark.parametrize("name", ["OPT", "Nemotron", "StableLm"])
def test_models_that_hand_their_layers_a_mask_and_no_keywords_are_exact(name):
    assert check(name).verdict == "exact"


LOCKED = dict(line.split("==") for line in (Path(__file__).parents[1] / "requirements-dev.txt").read_text().split())


def test_the_committed_list_is_of_the_locked_transformers_and_long_enough():
    found = evidence.listed()
    assert found["transformers"] == LOCKED["transformers"]
    if transformers.__version__ == LOCKED["transformers"]:
        assert set(found["models"]) == set(causal_classes())
    exact = [entry for entry in found["models"].values() if entry["verdict"] == "exact"]
    assert len(exact) >= 92
    assert all(max(entry[key] for key in ("loss", "logprobs", "gradients")) <= EXACT for entry in exact)
    assert all(entry["reason"] for entry in found["models"].values() if entry["verdict"] != "exact")
    assert TABLE.read_text() == table(found)


@pytest.mark.slow
@pytest.mark.skipif(transformers.__version__ != LOCKED["transformers"], reason="the list is of another transformers")
@pytest.mark.filterwarnings("ignore")
def test_a_new_scan_finds_what_the_list_says():
    for name, entry in scan(causal_classes()):
        listed = evidence.listed()["models"][name]
        for key in ("verdict", "unpatched", "structure", "source", "registry"):
            assert entry[key] == listed[key], (name, entry)


# ---- the command


def test_the_command_tells_about_one_model(capsys):
    assert main(["models", "GptOssForCausalLM", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["verdict"] == "exact"
    assert "sinks" in told["special"]
    assert told["auto"] == {"cpu": "segments", "gpu": "flex"}
    assert main(["models", "MambaForCausalLM"]) == 1
    assert "MambaForCausalLM: refused: it has recurrent layers" in capsys.readouterr().out
    assert main(["models"]) == 0
    exact = sum(entry["verdict"] == "exact" for entry in evidence.listed()["models"].values())
    assert f"exact: {exact}\n" in capsys.readouterr().out


@pytest.mark.parametrize("other", [False, True])
def test_the_command_says_where_its_list_is_of_another_transformers(monkeypatch, capsys, other):
    written = {**evidence.listed(), "transformers": "0.0" if other else transformers.__version__}
    monkeypatch.setattr("flexreason.commands.models.listed", lambda: written)
    assert main(["models"]) == 0
    assert ("is tested when it is first patched" in capsys.readouterr().out) == other


def test_the_command_reads_a_folders_config(tmp_path, capsys):
    transformers.Gemma2Config().save_pretrained(tmp_path)
    assert main(["models", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "Gemma2ForCausalLM: exact" in out
    assert "segments (the slower route: softcap) on CPU, flex on GPUs" in out
    assert main(["models", str(tmp_path / "nowhere")]) == 2
    assert "no class of transformers, and no config to be found" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["attention_dropout", "attn_pdrop"])
def test_the_command_refuses_what_patch_refuses(tmp_path, capsys, key):
    config = tiny("Qwen3").config
    setattr(config, key, 0.1)
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(tmp_path)
    assert main(["models", str(tmp_path)]) == 1
    assert f"Qwen3ForCausalLM: refused: {key} is 0.1" in capsys.readouterr().out
    assert main(["models", str(tmp_path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["verdict"] == "refused"


UNUSABLE = {
    "no number": ({"hidden_size": "abc"}, "its config cannot be used: .*hidden_size"),
    "nothing": ({"hidden_size": None}, "its config cannot be used: .*hidden_size"),
    "no heads": ({"num_attention_heads": 0}, "its config cannot be used: num_attention_heads is 0"),
    "below zero": ({"hidden_size": -4}, "its config cannot be used: hidden_size is -4"),
    "no such RoPE": ({"rope_parameters": {"rope_type": "nonsense", "rope_theta": 1e4}}, "cannot be built"),
    "no such activation": ({"hidden_act": "nonsense"}, "cannot be built from its config: .*nonsense"),
}


@pytest.mark.filterwarnings("ignore")  # torch's, of weights without elements
@pytest.mark.parametrize("which", UNUSABLE)
def test_the_command_says_what_is_wrong_with_a_config(which, tmp_path, capsys):
    changed, says = UNUSABLE[which]
    config = {**tiny("Qwen3").config.to_dict(), **changed}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["models", str(tmp_path)]) == 2
    assert re.search(says, capsys.readouterr().err)


def test_a_scan_of_what_there_is_not_is_no_success(capsys):
    assert main(["models", "--scan", "--only", "LlamaForCausalLM", "Nope"]) == 2
    assert "--only: transformers has no model of the name Nope" in capsys.readouterr().err
