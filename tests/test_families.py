"""Families of models, chosen for their differences, through the self-test; and the self-test itself.

The exhaustive scan over all classes is marked slow, and holds the committed list to what it finds.
"""

import dataclasses
import json

import pytest
import torch
import transformers
from torch import nn

import flexreason as fr
from exact import EXACT, errors
from flexreason import models, refuse, selftest
from flexreason.attention import segments
from flexreason.attention.tree_row import TreeRow
from flexreason.cli import main
from flexreason.shrink import HEADS, ORIGINAL, build, causal_classes, default_config, shrink
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

    dense = selftest.patch.__globals__["BACKENDS"]["dense"]
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
    monkeypatch.setattr("flexreason.refuse.ROPE_BY_LONGEST", ())
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


class Particular(transformers.LlamaForCausalLM):
    """It cannot be made from a config alone."""

    def __init__(self, config, more):
        super().__init__(config)


def made(cls, *args):
    return cls(tiny("Llama").config, *args)


def test_an_unknown_class_is_tested_on_its_own_config_once(monkeypatch):
    calls = []
    monkeypatch.setattr(selftest, "check", lambda *args, plain=selftest.check: calls.append(args) or plain(*args))
    monkeypatch.setattr(models, "_found", {})
    for _ in range(2):
        model = fr.patch(made(Unchanged))
    assert [cls for _, cls in calls] == [Unchanged]
    model(**fr.collate([fr.lay_out_turns(random_turns([(3, 4, 5)] * 2))])).loss.backward()


@pytest.mark.parametrize("cls", [Shifting, Counting])
def test_an_unknown_class_that_reads_its_neighbours_is_refused_with_the_numbers(cls):
    with pytest.raises(
        ValueError, match=rf"{cls.__name__} is refused: one pass is not the samples' .*logprobs \de-.*; train on the N"
    ):
        fr.patch(made(cls))


def test_an_unknown_class_that_cannot_be_built_tiny_is_refused_until_it_is_trusted(monkeypatch):
    monkeypatch.setattr(refuse, "_trusted", set())
    model = made(Particular, 1)
    with pytest.raises(ValueError, match=r"Particular is refused: nobody has .*missing 1 required .*run fr\.verify"):
        fr.patch(model)
    with refuse.untested():
        fr.unpatch(fr.patch(model))
    with pytest.raises(ValueError, match="Particular is refused"):
        fr.patch(model)
    refuse.trust(Particular)
    fr.patch(model)


def test_the_list_is_believed_for_the_version_and_structure_it_was_made_with_only(monkeypatch):
    asked = []
    right = selftest.Result("LlamaForCausalLM", "exact")
    monkeypatch.setattr(models, "_tested", lambda cls, structure, config: asked.append(cls.__name__) or right)
    fr.patch(tiny("Llama"))
    assert not asked
    fr.patch(tiny("Llama", attention_bias=True))
    assert len(asked) == 1
    other = {**models.listed(), "transformers": "0.0"}
    monkeypatch.setattr(models, "listed", lambda: other)
    fr.patch(tiny("Llama"))
    assert len(asked) == 2


def test_the_self_test_leaves_no_trace_and_takes_none():
    """Of random numbers, gradients, autocast, and the config's own settings."""
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert check("Phimoe", output_router_logits=True, return_dict=False).verdict == "exact"
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.rand(1), expected)


def test_classes_that_torch_makes_for_sharding_are_the_users_own_class():
    sharded = type("FSDPLlama", (transformers.LlamaForCausalLM,), {"__module__": "torch.distributed.fsdp"})
    assert refuse.model_class(object.__new__(sharded)) is transformers.LlamaForCausalLM


FAIL_AT_THE_FIRST_ROW = {
    "Doge": "it makes more of its mask than a mask",
    "Bart": "it takes no positions, and counts places in storage",
    "Roberta": "it counts positions from behind its padding id",
    "DeepseekV32": "it has a token indexer",
    "Lfm2": "it has a convolution over neighbours in storage",
    "MiniMax": "it has linear attention",
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


def test_the_committed_list_is_of_this_transformers_and_long_enough():
    found = models.listed()
    assert found["transformers"] == transformers.__version__
    assert set(found["models"]) == set(causal_classes())
    exact = [entry for entry in found["models"].values() if entry["verdict"] == "exact"]
    assert len(exact) >= 92
    assert all(max(entry[key] for key in ("loss", "logprobs", "gradients")) <= EXACT for entry in exact)
    assert all(entry["reason"] for entry in found["models"].values() if entry["verdict"] != "exact")
    assert models.TABLE.read_text() == models.table(found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_new_scan_finds_what_the_list_says():
    for name, entry in models.scan(causal_classes()):
        listed = models.listed()["models"][name]
        for key in ("verdict", "unpatched", "structure", "registry"):
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
    assert (
        f"exact: {sum(e['verdict'] == 'exact' for e in models.listed()['models'].values())}" in capsys.readouterr().out
    )


def test_the_command_reads_a_folders_config(tmp_path, capsys):
    transformers.Gemma2Config().save_pretrained(tmp_path)
    assert main(["models", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "Gemma2ForCausalLM: exact" in out
    assert "segments (the slower route: softcap) on CPU, flex on GPUs" in out
    assert main(["models", str(tmp_path / "nowhere")]) == 2
    assert "no class of transformers, and no config to be found" in capsys.readouterr().err


def test_a_result_says_all_it_found():
    found = check("Llama")
    assert dataclasses.asdict(found) == found.to_dict()
    assert found.name == "LlamaForCausalLM"
