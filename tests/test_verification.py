"""`verify`: exact models pass, and every planted fault is reported with the right culprit."""

import contextlib
import dataclasses
import itertools
import json
import re

import datasets
import pytest
import torch
import transformers
from torch import nn

import flexreason as fr
from flexreason import cli
from flexreason.attention import dense, flex, segments
from flexreason.commands import verify as verification
from flexreason.data import intake, options
from flexreason.load import stand_in
from flexreason.model import head
from flexreason.model.hooks import find_patch
from flexreason.model.loss import TreeLoss
from flexreason.proof import compare, evidence, selftest
from flexreason.proof.tiny import build, default_config, shrink
from flexreason.proof.verdict import Error, NoVerdict, limits_from
from models import TINY, checkpoint, tiny
from strategies import random_tree, random_turns

TURNS = [(5, 7, 3), (4, 0, 2), (3, 6, 4)]


def conversation(seed=0):
    return fr.lay_out_turns(random_turns(TURNS, seed=seed))


LORA = {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}


def with_lora():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny("Qwen3"), peft.LoraConfig(**LORA))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, and then nothing before it has a gradient
            nn.init.normal_(parameter)
    return model


MODELS = {
    "fp32": lambda: tiny("Qwen3"),
    "bf16": lambda: tiny("Qwen3").bfloat16(),
    "fp16": lambda: tiny("Llama").half(),
    "fp64": lambda: tiny("Qwen3").double(),
    "experts": lambda: tiny("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "window": lambda: tiny("Mistral", sliding_window=9),
    "LoRA": with_lora,
    "patched, dense": lambda: fr.patch(tiny("Qwen3"), "dense"),
    "patched, chunked": lambda: fr.patch(tiny("Granite", logits_scaling=3.0), loss="chunked"),
    "frozen": lambda: tiny("Qwen3").requires_grad_(False),
}


@pytest.mark.parametrize("which", MODELS)
def test_exact_models_pass(which):
    model = MODELS[which]()
    patched = find_patch(model) is not None
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = fr.verify(model, [conversation(), fr.lay_out(random_tree())])
    assert report.ok, str(report)
    assert report.verdict == "exact"
    assert report.culprit is None
    assert {error.dtype for error in report.errors} >= {"float64"}
    assert (report.errors[0].gradients is None) == (which == "frozen")
    assert report.turns == 3 + len(random_tree())
    assert report.peak_bytes > 0
    assert (find_patch(model) is not None) == patched
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


class Int8(nn.Module):
    """A frozen linear layer of eight bits, as quantisation leaves it."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x):
        return x @ (self.weight * self.scale).to(x.dtype).t()


def test_quantised_layers_are_taken_once_verified():
    model = tiny("Qwen3", seed=3)
    for layer in model.model.layers:
        layer.self_attn.q_proj, layer.mlp.up_proj = Int8(layer.self_attn.q_proj), Int8(layer.mlp.up_proj)
    with pytest.raises(ValueError, match=r"parts of it were replaced, .*Int8; run fr\.verify on it"):
        fr.patch(model)
    for float64 in (None, False):
        report = fr.verify(model, [conversation()], float64=float64)
        assert report.ok, str(report)
    assert find_patch(fr.patch(model)) is not None


def test_without_float64_other_kernels_set_the_limit():
    report = fr.verify(tiny("Qwen3").bfloat16(), [conversation()], float64=False)
    assert report.ok, str(report)
    assert [(e.way, e.dtype) for e in report.errors] == [("samples, eager", "bfloat16"), ("one pass", "bfloat16")]


def test_flex_on_cpu_is_compared_forward_only():
    report = fr.verify(fr.patch(tiny("Qwen3", head_dim=16), "flex"), [conversation()], float64=False)
    assert report.ok, str(report)
    assert report.errors[-1].gradients is None
    assert "no backward on CPU" in str(report)


class Balanced(nn.Module):
    """A part that does something over all tokens in one mode only, as balancing losses and batch statistics do."""

    def __init__(self, inner, mode):
        super().__init__()
        self.inner, self.mode = inner, mode

    def forward(self, x):
        if self.training == self.mode:
            x = x - x.mean(1, keepdim=True)
        return self.inner(x)


class Noisy(Balanced):
    def forward(self, x):
        return self.inner(x * (1 + 0.1 * torch.rand_like(x)) if self.training else x)


class Counting(Balanced):
    seen = 0

    def forward(self, x):
        self.seen += self.training
        return self.inner(x * (1 + 0.1 * self.seen) if self.training else x)


def with_mlps(kind, *more):
    model = tiny("Qwen3")
    for layer in model.model.layers:
        layer.mlp = kind(layer.mlp, *more)
    return model.double()


@pytest.mark.parametrize("found_in", [True, False])
@pytest.mark.parametrize("wrong_in", [True, False])
def test_a_part_that_nobody_tested_is_looked_at_in_training_and_in_evaluation(wrong_in, found_in, monkeypatch):
    monkeypatch.setattr(evidence, "_verified", set())
    model = with_mlps(Balanced, wrong_in).train(found_in)
    model.model.layers[0].mlp.train(not found_in)
    modes = [module.training for module in model.modules()]
    report = fr.verify(model, [conversation()])
    assert report.verdict == "NOT exact"
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ValueError, match="parts of it were replaced"):
        fr.patch(model)


def test_what_draws_at_random_in_training_is_looked_at_with_the_same_draws(monkeypatch):
    monkeypatch.setattr(evidence, "_verified", set())
    model = with_mlps(Noisy, True).eval()
    assert fr.verify(model, [conversation()]).ok
    fr.patch(model)


def test_what_differs_from_pass_to_pass_in_training_does_not_count_for_it(monkeypatch):
    monkeypatch.setattr(evidence, "_verified", set())
    model = with_mlps(Counting, True).eval()
    report = fr.verify(model, [conversation()])
    assert report.ok
    assert "does not count for fr.patch, which goes on to refuse the model: in its other mode" in str(report)
    with pytest.raises(ValueError, match="parts of it were replaced"):
        fr.patch(model)


KEPT = [fr.Sample([1, 2, 3], [4, 5]), fr.Sample([1, 2, 3, 4, 5, 6], [7, 8])]  # a conversation that forgets nothing


@pytest.mark.parametrize("layouts", [[fr.lay_out_turns(random_turns([(5, 7, 3)]))] * 2, [fr.lay_out(KEPT)]])
def test_conversations_in_which_nothing_leaves_the_trunk_do_not_count_for_others(layouts, monkeypatch):
    """One pass is a sample as it stands there: a part that mixes neighbours passes."""
    monkeypatch.setattr(evidence, "_verified", set())
    model = with_mlps(Plain)
    report = fr.verify(model, layouts[:1])
    assert report.ok
    assert "does not count for fr.patch, which goes on to refuse the model: no branch leaves the trunk" in str(report)
    with pytest.raises(ValueError, match="parts of it were replaced"):
        fr.patch(model)
    assert fr.verify(model, [conversation()]).ok
    fr.patch(model)


class Plain(nn.Module):
    """A part of somebody's that changes nothing."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_verify_makes_gradients_wherever_it_is_called(mode):
    model = tiny("Qwen3")
    with mode():
        report = fr.verify(model, [conversation()])
    assert report.ok, str(report)
    assert report.errors[0].gradients is not None


# ---- planted faults


def say(report):
    assert not report.ok
    assert report.verdict == "NOT exact"
    return report.culprit


@pytest.mark.parametrize("backend", [segments, dense])
def test_a_mask_that_lets_reasoning_through(monkeypatch, backend):
    right = backend.prepare

    def plainly_causal(tree, *args, **kwargs):
        until = torch.full_like(tree["until"], tree["until"].shape[1])
        positions = torch.arange(until.shape[1])[None]
        return right({**tree, "until": until, "position_ids": positions}, *args, **kwargs)

    monkeypatch.setattr(backend, "prepare", plainly_causal)
    name = backend.__name__.split(".")[-1]
    culprit = say(fr.verify(fr.patch(tiny("Qwen3"), name), [conversation()]))
    assert culprit.startswith("reasoning leaks: token ")
    assert "which is not on its path" in culprit


def test_a_mask_that_hides_tokens_on_the_path(monkeypatch):
    right = dense.prepare

    def nearest_only(tree, mask, window, chunk):
        return right(tree, mask, 2, chunk)

    monkeypatch.setattr(dense, "prepare", nearest_only)
    culprit = say(fr.verify(fr.patch(tiny("Qwen3"), "dense"), [conversation()]))
    assert culprit.startswith("mask: token ")
    assert "which is on its path" in culprit


def test_one_wrong_target_index():
    layout = conversation()
    source = layout.target_source.clone()
    source[4] += 1
    culprit = say(fr.verify(tiny("Qwen3"), [dataclasses.replace(layout, target_source=source)], [fr.unmerge(layout)]))
    right = int(layout.target_source[4])
    assert culprit.startswith("conversation 0: target index: target 4 of turn 0 is asked of token")
    assert f"token {right} (" in culprit


def test_reasoning_that_leaks_in_the_layout():
    layout = conversation()
    leaking = dataclasses.replace(layout, until=torch.full_like(layout.until, len(layout)))
    for samples in (None, [fr.unmerge(layout)]):
        assert "reasoning leaks" in say(fr.verify(tiny("Qwen3"), [leaking], samples))


def test_positions_off_by_one_in_the_layout():
    layout = conversation()
    positions = layout.position_ids + (layout.role == int(fr.Role.REASONING))
    culprit = say(fr.verify(tiny("Qwen3"), [dataclasses.replace(layout, position_ids=positions)], [fr.unmerge(layout)]))
    assert culprit.startswith("conversation 0: positions: token ")


def test_positions_off_by_one_on_the_way_to_the_decoder():
    model = fr.patch(tiny("Qwen3"))

    def shift(module, args, kwargs):
        if {"until", "flexreason_tree"} & kwargs.keys():
            ids = kwargs["position_ids"]
            return args, {**kwargs, "position_ids": ids + (torch.arange(ids.shape[1]) > 12)}
        return None

    model.model.register_forward_pre_hook(shift, with_kwargs=True)
    assert say(fr.verify(model, [conversation()])).startswith("positions: token 13 (")


def test_positions_off_by_one_inside_a_layer():
    model = fr.patch(tiny("Qwen3"))
    rope = model.model.rotary_emb

    def shift(module, args):
        states, positions = args
        return (states, positions * 2) if states.shape[1] == 40 else None  # the row, and no sample

    rope.register_forward_pre_hook(shift)
    culprit = say(fr.verify(model, [conversation()]))
    assert "layers.0.self_attn: the first whose output differs" in culprit
    assert "positions inside it" in culprit


def test_a_head_scale_that_is_dropped(monkeypatch):
    def without_scale(self, hidden):
        return self.root.lm_head(hidden)

    model = fr.patch(tiny("Granite", logits_scaling=3.0), loss="chunked")
    monkeypatch.setattr(head.Head, "__call__", without_scale)
    assert say(fr.verify(model, [conversation()])).startswith("head: ")


def test_a_loss_that_divides_by_something_else(monkeypatch):
    from flexreason.model import loss

    right = loss._weights
    monkeypatch.setattr(loss, "_weights", lambda *given: (right(*given)[0], 3.0))
    assert say(fr.verify(tiny("Qwen3"), [conversation()])).startswith("loss: ")


@pytest.mark.parametrize("dropped", [torch.zeros_like, lambda gradient: None])
@pytest.mark.parametrize("float64", [None, False])
def test_a_gradient_that_is_dropped(monkeypatch, float64, dropped):
    right = segments._Attend.backward

    def without_keys(ctx, *grads):
        dq, dk, *more = right(ctx, *grads)
        return dq, dropped(dk), *more

    monkeypatch.setattr(segments._Attend, "backward", staticmethod(without_keys))
    culprit = say(fr.verify(tiny("Qwen3"), [conversation()], float64=float64))
    assert culprit.startswith("backward: ")
    assert "self_attn.k_" in culprit


def test_a_loss_that_has_no_gradient_at_all(monkeypatch):
    right = TreeLoss.__call__
    monkeypatch.setattr(TreeLoss, "__call__", lambda self, *args, **kwargs: right(self, *args, **kwargs).detach())
    culprit = say(fr.verify(tiny("Qwen3"), [conversation()]))
    assert culprit.startswith("backward: ")


def test_targets_of_a_layout_may_stand_in_any_order_of_turns():
    layout = conversation()
    order = torch.argsort(-layout.target_turn, stable=True)
    names = [name for name in vars(layout) if name.startswith("target")]
    turned = dataclasses.replace(layout, **{name: getattr(layout, name)[order] for name in names})
    report = fr.verify(
        tiny("Qwen3"), [conversation(seed=1), turned], [fr.unmerge(conversation(seed=1)), fr.unmerge(layout)]
    )
    assert report.ok, str(report)


def test_a_small_error_shows_in_a_dtype_that_rounds(monkeypatch):
    right = segments.attend
    monkeypatch.setattr(segments, "attend", lambda *given: right(*given) * 1.001)
    assert say(fr.verify(tiny("Qwen3"), [conversation()], float64=False)).startswith("layers.0.self_attn")


def test_not_a_number_is_not_equal(monkeypatch):
    right = segments.attend
    monkeypatch.setattr(segments, "attend", lambda *given: right(*given) * torch.nan)
    assert say(fr.verify(tiny("Qwen3"), [conversation()]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_group_of_small_gradients_that_is_dropped_shows_in_any_dtype(monkeypatch, dtype):
    right = segments._Attend.backward

    def without_sinks(ctx, *grads):
        dq, dk, dv, d_sinks, *more = right(ctx, *grads)
        return dq, dk, dv, torch.zeros_like(d_sinks), *more

    model = build(shrink(transformers.GptOssConfig()), transformers.GptOssForCausalLM).to(dtype)
    fr.patch(model)  # before: where the list of classes says nothing, its own test would notice
    monkeypatch.setattr(segments._Attend, "backward", staticmethod(without_sinks))
    culprit = say(fr.verify(model, [conversation()], float64=False))
    assert "sinks most of all" in culprit


@pytest.mark.parametrize(("mask", "instead"), [("interval", "segments"), ("turn_role", "dense")])
def test_where_flex_has_no_float64_another_backend_is_compared_in_it_and_that_is_said(mask, instead, monkeypatch):
    """As on GPUs."""
    monkeypatch.setattr(flex, "unfit", lambda device, dtype: "flex has none" if dtype == torch.float64 else "")
    model, notes = fr.patch(tiny("Qwen3"), "flex", mask), []
    made = compare.copy_in(model, torch.float64, notes)
    assert (find_patch(model).backend, find_patch(made).backend) == ("flex", instead)
    assert notes == [f'in float64 it is backend "{instead}" that is compared, since flex has none']
    compare.copy_in(fr.patch(model, "dense"), torch.float64, notes)
    assert len(notes) == 1


def test_a_leak_between_conversations_of_a_row(monkeypatch):
    def first_token_seen_by_all(tree, *args):
        until = tree["until"].clone()
        until[0, 0] = int((tree["document"] >= 0).sum())
        return dense.dense_mask({**tree, "until": until})

    monkeypatch.setattr(dense, "prepare", first_token_seen_by_all)
    culprit = say(fr.verify(fr.patch(tiny("Qwen3"), "dense"), [conversation(), conversation(seed=1)]))
    assert culprit.startswith("mask: ")
    assert "of conversation 1) depends on token 0 (prompt of turn 0 of conversation 0)" in culprit


def test_tokens_changed_on_the_way():
    model = fr.patch(tiny("Qwen3"))

    def change(module, args, kwargs):
        if {"until", "flexreason_tree"} & kwargs.keys():
            return args, {**kwargs, "input_ids": kwargs["input_ids"].roll(1)}
        return None

    model.model.register_forward_pre_hook(change, with_kwargs=True)
    assert say(fr.verify(model, [conversation()])).startswith("inputs: token ")


def test_a_fault_under_the_chunked_loss_is_named_too(monkeypatch):
    right = segments.attend
    monkeypatch.setattr(segments, "attend", lambda *given: right(*given) * 1.001)
    culprit = say(fr.verify(fr.patch(tiny("Qwen3"), loss="chunked"), [conversation()]))
    assert culprit.startswith("layers.0.self_attn")


# torch's own, of reentrant checkpointing under no_grad: the two identical runs that verify begins with
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_in_training_is_no_fault(reentrant):
    model = tiny("Qwen3").train()
    checkpoint(model, reentrant)
    for made in (model, tiny("Qwen3").double().train()):
        report = fr.verify(made, [conversation()])
        assert report.ok, str(report)
    assert all(m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing"))


def test_a_model_without_other_attention_is_held_to_fixed_limits():
    model = tiny("Gemma2").bfloat16()
    report = fr.verify(model, [conversation()], float64=False)
    assert report.ok, str(report)


@pytest.mark.parametrize("gradients", [float("inf"), float("nan"), 0.9])
def test_samples_whose_own_gradients_drown_set_no_limit(gradients):
    own = Error("samples", "float16", "", 1e-3, 1e-3, gradients, {}, None)
    with pytest.raises(NoVerdict, match="rounding drowns them"):
        limits_from(own, 1e-6)


def test_false_alarms_are_rare():
    """Rounding alone, over many draws of weights and both ways to know its size."""
    for seed in range(12):
        for float64 in (None, False):
            model = tiny(["Qwen3", "Phi", "GPTNeoX"][seed % 3], seed=seed).eval()
            report = fr.verify(model, [conversation(seed)], float64=float64)
            assert report.ok, f"{seed}: {report}"


def test_what_is_not_crossed_is_said():
    report = fr.verify(tiny("Mistral", sliding_window=4000), [conversation()])
    assert "sliding_window 4000: no sample here is longer, so what is behind it is not compared" in report.notes
    with pytest.raises(ValueError, match="tokens: expected at least 1"):
        fr.verify(tiny("Qwen3"), [conversation()], tokens=0)


def test_the_papers_rule_is_verified_on_whole_conversations():
    layouts = [fr.lay_out_turns(random_turns([(50, 70, 30), (4, 0, 2), (5, 60, 4)]))]
    report = fr.verify(fr.patch(tiny("Qwen3"), "dense", mask="turn_role"), layouts, tokens=50)
    assert report.ok, str(report)
    assert report.turns == 3


# ---- no verdict, and what is said


def test_a_model_that_differs_between_two_runs_gets_no_verdict():
    model = tiny("Qwen3")
    model.model.norm.register_forward_hook(lambda module, args, out: out + 0.1 * torch.randn_like(out))
    report = fr.verify(model, [conversation()])
    assert report.verdict == "no verdict"
    assert "apart in two identical runs" in report.culprit
    assert not report.ok


def test_a_loss_that_is_not_a_number_gets_no_verdict():
    model = tiny("Qwen3")
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    report = fr.verify(model, [conversation()])
    assert report.verdict == "no verdict"
    assert "not finite in the untouched model" in report.culprit


def test_dropout_is_off_and_named():
    model = with_lora().train()
    report = fr.verify(model, [conversation()])
    assert report.ok, str(report)
    assert any("dropout is off here" in note and "lora_dropout" in note for note in report.notes)
    assert model.training
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.1}


def test_short_conversations_are_chosen_and_long_ones_cut_to_their_first_turns():
    layouts = [fr.lay_out_turns(random_turns([(50, 70, 30)] * 4)), conversation(), conversation(seed=1)]
    report = fr.verify(tiny("Qwen3"), layouts, tokens=200)
    assert report.conversations == 2
    assert any(note == "the 2 shortest of 3 conversations" for note in report.notes)
    report = fr.verify(tiny("Qwen3"), layouts[:1], tokens=200)
    assert report.ok
    assert report.turns == 2
    assert any("the first 2 turns of the shortest stand for them" in note for note in report.notes)


def test_target_weights_are_left_out_and_said():
    layout = conversation()
    weighted = dataclasses.replace(layout, target_weight=torch.linspace(0.5, 2, len(layout.target_ids)))
    report = fr.verify(tiny("Qwen3"), [weighted])
    assert report.ok
    assert any("weights" in note for note in report.notes)


def test_a_class_that_failed_its_test_is_not_exact_because_a_short_row_is():
    """A token indexer that takes all keys of so short a row; behind its limit it would not."""
    cls = transformers.MiniMaxM3VLForCausalLM
    model = build(shrink(default_config(cls)), cls)
    with pytest.raises(ValueError, match="MiniMaxM3VLForCausalLM is refused by patch: it has a token indexer"):
        fr.verify(model, [conversation()])
    with pytest.raises(ValueError, match="token indexer"):
        fr.patch(model)


def test_a_refused_model_is_refused_by_name():
    with pytest.raises(ValueError, match="refused"):
        fr.verify(tiny("Llama", attention_dropout=0.1), [conversation()])
    with pytest.raises(ValueError, match="no layouts"):
        fr.verify(tiny("Llama"), [])


# ---- the command


@pytest.fixture
def folder(tmp_path):
    tiny("Qwen3").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def write(path, layouts):
    lines = [
        json.dumps({"conversation": number, "prompt_ids": list(s.prompt_ids), "target_ids": list(s.target_ids)})
        for number, layout in enumerate(layouts)
        for s in fr.unmerge(layout)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_command_on_a_folder_and_a_file_of_samples(folder, tmp_path, capsys):
    data = write(tmp_path / "samples.jsonl", [conversation(), conversation(seed=1)])
    assert cli.main(["verify", str(folder), "--data", str(data), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert report["conversations"] == 2
    assert report["turns"] == 6
    assert report["errors"][0]["dtype"] == "float64"


def test_the_command_on_a_bare_config_crosses_its_lengths(tmp_path, capsys):
    config = transformers.MistralConfig(**{**TINY, "sliding_window": 40}, architectures=["MistralForCausalLM"])
    config.save_pretrained(tmp_path)
    assert cli.main(["verify", str(tmp_path / "config.json"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["conversations"] == 3
    assert report["tree_tokens"] > 2 * 40
    assert "weights are random: there are none beside the config" in report["notes"]
    config.sliding_window = 4096
    config.save_pretrained(tmp_path)
    assert cli.main(["verify", str(tmp_path)]) == 0
    assert "sliding_window 4096 is not crossed on this model itself" in capsys.readouterr().out


def test_a_planted_fault_ends_the_command_with_1(folder, monkeypatch, capsys):
    monkeypatch.setattr(segments._Attend, "backward", staticmethod(lambda ctx, *grads: (None,) * 6))
    assert cli.main(["verify", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "verdict: NOT exact" in out
    assert "culprit: backward: " in out


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("", "nothing in it"),
        ("{", "line 1: no JSON"),
        ("[" * 100000, "line 1: no JSON"),
        ('{"prompt_ids": [1]}', "line 1: neither messages, nor conversations"),
        ('{"prompt_ids": [1], "target_ids": []}', "line 1: prompt_ids or target_ids is empty"),
        ('{"prompt_ids": [1], "target_ids": [true]}', "line 1: expected prompt_ids and target_ids, lists of token ids"),
        ('{"prompt_ids": [1.5], "target_ids": [1]}', "line 1: expected prompt_ids and target_ids, lists of token ids"),
        (
            '{"prompt_ids": [1], "target_ids": [4000]}',
            "line 1: target_ids of sample 0 from 4000 to 4000, and the model's vocabulary has 97",
        ),
        (
            '{"prompt_ids": [1, -1], "target_ids": [1]}',
            "line 1: prompt_ids of sample 0 from -1 to 1, and the model's vocabulary has 97",
        ),
    ],
)
def test_unusable_data_is_refused_with_the_line(folder, tmp_path, capsys, lines, says):
    (tmp_path / "bad.jsonl").write_text(lines)
    assert cli.main(["verify", str(folder), "--data", str(tmp_path / "bad.jsonl")]) == 2
    assert says in capsys.readouterr().err


def test_a_model_that_cannot_be_loaded(tmp_path, capsys):
    assert cli.main(["verify", str(tmp_path / "nowhere")]) == 2
    assert "cannot be loaded as a causal language model" in capsys.readouterr().err
    with contextlib.suppress(SystemExit):
        cli.main(["verify", "--help"])
    assert "--data" in capsys.readouterr().out


# ---- the command on conversations

TEMPLATE = """{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}</user>{% else %}<bot>
{%- if loop.last and m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}</bot>
{%- endif %}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"""

CHATS = [
    [("2+3?", "easy", "5"), ("Twice?", "5+5", "10")],
    [("Name a bird.", "", "Wren."), ("Another.", "not a wren", "Rook."), ("Thanks!", "", "Bye.")],
    [("Hm?", "what now", "Yes?"), ("No.", "so be it", "Fine.")],
]


def messages(chat):
    made = []
    for asked, thought, answer in chat:
        made.append({"role": "user", "content": asked})
        made.append({"role": "assistant", "content": answer, **({"reasoning_content": thought} if thought else {})})
    return made


@pytest.fixture
def whole(tmp_path):
    """A folder with a model, its tokenizer and its template."""
    tokenizer = stand_in(TEMPLATE)
    tokenizer.save_pretrained(tmp_path / "whole")
    tiny("Qwen3", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


def jsonl(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def as_messages(folder):
    return jsonl(folder / "chats.jsonl", [{"messages": messages(chat)} for chat in CHATS])


def as_one_json(folder):
    path = folder / "chats.json"
    path.write_text(json.dumps([{"messages": messages(chat)} for chat in CHATS]))
    return path


def as_sharegpt(folder):
    def spoken(chat):
        for asked, thought, answer in chat:
            yield {"from": "human", "value": asked}
            yield {"from": "gpt", "value": f"<think>{thought}</think>{answer}" if thought else answer}

    return jsonl(folder / "chats.jsonl", [{"conversations": list(spoken(chat))} for chat in CHATS])


def as_pairs(folder):
    return jsonl(
        folder / "chats.jsonl", [{"prompt": messages(chat[:1])[:1], "completion": messages(chat)[1:]} for chat in CHATS]
    )


def as_samples(folder):
    tokenizer = stand_in(TEMPLATE)
    return write(folder / "chats.jsonl", [fr.encode(messages(chat), tokenizer) for chat in CHATS])


def as_parquet(folder):
    datasets.Dataset.from_list([{"messages": messages(chat)} for chat in CHATS]).to_parquet(folder / "chats.parquet")
    return folder / "chats.parquet"


def as_saved(folder):
    made = datasets.Dataset.from_list([{"messages": messages(chat)} for chat in CHATS])
    datasets.DatasetDict({"train": made.select([0]), "mine": made}).save_to_disk(folder / "saved")
    return folder / "saved"


FORMS = [as_messages, as_one_json, as_sharegpt, as_pairs, as_samples, as_parquet, as_saved]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_the_command_takes_data_of_every_form_as_fr_encode_makes_samples_of_it(whole, tmp_path, capsys, form):
    more = ["--split", "mine"] if form is as_saved else []
    assert cli.main(["verify", str(whole), "--data", str(form(tmp_path)), "--json", *more]) == 0
    report = json.loads(capsys.readouterr().out)
    tokenizer = stand_in(TEMPLATE)
    layouts = [fr.encode(messages(chat), tokenizer) for chat in CHATS]
    assert report["verdict"] == "exact"
    assert report["conversations"] == 3
    assert sorted(report["numbers"]) == [0, 1, 2]
    assert report["turns"] == 7
    assert report["targets"] == sum(len(layout.target_ids) for layout in layouts)
    assert report["tree_tokens"] == sum(map(len, layouts)) < report["sample_tokens"]
    assert any(note.startswith("looked at 3 of 3 conversations of ") for note in report["notes"])


def test_a_fault_on_your_data_is_reported_with_where_the_conversation_stands(whole, tmp_path, monkeypatch, capsys):
    """Here: in the layout, of the second line only."""
    right = verification.lay_out

    def wrong(samples):
        layout = right(samples)
        return (
            dataclasses.replace(layout, until=torch.full_like(layout.until, len(layout)))
            if len(samples) > 2
            else layout
        )

    monkeypatch.setattr(verification, "lay_out", wrong)
    assert cli.main(["verify", str(whole), "--data", str(as_messages(tmp_path)), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    at = report["numbers"].index(1)
    assert report["culprit"].startswith(f"conversation {at}: ")
    assert f"conversation {at}: {tmp_path / 'chats.jsonl'}, line 2" in report["notes"]


def test_options_of_the_template_and_history_are_what_fr_encode_takes(whole, tmp_path, capsys):
    """A template that keeps all reasoning makes one chain of it; history="content" takes it out again."""
    keeps = TEMPLATE.replace("loop.last and ", "(loop.last or keep) and ")
    (whole / "chat_template.jinja").write_text(keeps)
    data, tokens = as_messages(tmp_path), {}
    for name, more in {
        "": [],
        "keep": ["--option", "keep=true"],
        "out": ["--option", "keep=true", "--history", "content"],
    }.items():
        assert cli.main(["verify", str(whole), "--data", str(data), "--json", *more]) == 0
        tokens[name] = json.loads(capsys.readouterr().out)["tree_tokens"]
    assert tokens["keep"] < tokens["out"] == tokens[""]
    assert cli.main(["verify", str(whole), "--data", str(data), "--option", "keep"]) == 2
    assert "--option: expected NAME=VALUE, found 'keep'" in capsys.readouterr().err
    assert cli.main(["verify", str(whole), "--data", str(data), "--option", "history=content"]) == 2
    assert "--option history: expected an option of the template" in capsys.readouterr().err


def test_bad_conversations_are_refused_with_where_and_why_or_skipped_and_listed(whole, tmp_path, capsys):
    bad = [{"role": "user", "content": "?"}, {"role": "human", "content": "!"}]
    entries = [{"messages": m} for m in (messages(CHATS[0]), bad, messages(CHATS[1]), messages(CHATS[2])[:1])]
    data = jsonl(tmp_path / "chats.jsonl", entries)
    with data.open("a") as file:
        file.write("{\n")
    given = ["verify", str(whole), "--data", str(data), "--json"]
    assert cli.main(given) == 2
    said = capsys.readouterr().err
    assert "3 of 5 conversations are refused" in said
    assert re.search(r"1  bad message\n +\S+chats.jsonl, line 2: message 1: unknown role 'human'", said)
    assert re.search(r"1  nothing to train\n +\S+chats.jsonl, line 4: the conversation has no assistant", said)
    assert re.search(r"1  bad input\n +\S+chats.jsonl, line 5: no JSON", said)
    assert cli.main([*given, "--skip-invalid"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["conversations"] == 2
    left_out = [note for note in report["notes"] if note.startswith("left out, 1 (")]
    assert len(left_out) == 3
    assert any("chats.jsonl, line 2: message 1: unknown role 'human'" in note for note in left_out)
    assert cli.main([*given, "--skip-invalid", "--limit", "1"]) == 0
    assert "looked at 1 of the first 1 conversations" in capsys.readouterr().out
    jsonl(data, [{"messages": bad}])
    assert cli.main([*given, "--skip-invalid"]) == 2
    assert "1 of 1 conversations are refused" in capsys.readouterr().err


def test_a_tokenizer_with_more_words_than_the_model_is_a_clear_error(whole, tmp_path, capsys):
    tiny("Qwen3").save_pretrained(tmp_path / "other")
    given = ["verify", str(tmp_path / "other"), "--data", str(as_messages(tmp_path))]
    assert cli.main([*given, "--tokenizer", str(whole)]) == 2
    said = capsys.readouterr().err
    assert re.search(r"chats.jsonl, line 1: prompt_ids of sample 0 from \d+ to 2\d\d, and .* has 97", said)
    assert "made with another tokenizer? (--tokenizer)" in said


def test_of_much_data_some_are_looked_at_from_all_over_it(whole, tmp_path, monkeypatch, capsys):
    looked_at = []
    encoded = intake.EntryEncoder.encoded

    def noted(self, one):
        looked_at.append(one.number)
        return encoded(self, one)

    monkeypatch.setattr(intake.EntryEncoder, "encoded", noted)
    data = jsonl(tmp_path / "many.jsonl", [{"messages": messages(CHATS[n % 3])} for n in range(1000)])
    assert cli.main(["verify", str(whole), "--data", str(data), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(looked_at) == 32
    assert looked_at == list(range(0, 1000, 32))
    assert any(note.startswith("looked at 32 of 1000 conversations of ") for note in report["notes"])
    assert "the 8 shortest of 32 conversations" in report["notes"]
    assert report["conversations"] == 8
    looked_at.clear()
    assert cli.main(["verify", str(whole), "--data", str(data), "--limit", "100", "--tokens", "300"]) == 0
    assert max(looked_at) < 100
    assert f"looked at {len(looked_at)} of the first 100 conversations" in capsys.readouterr().out


@pytest.mark.parametrize("n", [0, 1, 4, 5, 8, 9, 1000])
def test_what_is_spread_is_even_and_begins_with_the_first(n):
    found = options.spread(range(n), 4)
    assert found[:1] == list(range(n))[:1]
    assert len({b - a for a, b in itertools.pairwise(found)}) <= 1
    assert min(n, 2) <= len(found) <= 4
    assert not n or found[-1] >= (n - 1) / 2


def test_conversations_of_one_turn_are_left_out_where_there_are_longer_ones(whole, tmp_path, capsys):
    single = {"messages": messages(CHATS[0][:1])}
    given = ["verify", str(whole), "--json", "--data"]
    data = jsonl(tmp_path / "chats.jsonl", [single, {"messages": messages(CHATS[1])}, single])
    assert cli.main([*given, str(data)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["numbers"], report["turns"]) == ([1], 3)
    assert "left out: 2 conversations of one turn, which share nothing" in report["notes"]
    assert cli.main([*given, str(jsonl(data, [single]))]) == 0
    report = json.loads(capsys.readouterr().out)
    assert any(note.startswith("no conversation has more than one turn") for note in report["notes"])


def test_what_is_about_data_needs_data(folder, tmp_path, capsys):
    for given in (["--tokenizer", "x"], ["--skip-invalid"], ["--option", "a=1"], ["--limit", "3"]):
        assert cli.main(["verify", str(folder), *given]) == 2
        assert f"{given[0]} is about data; give --data too" in capsys.readouterr().err
    assert cli.main(["verify", str(folder), "--data", "x.jsonl", "--limit", "0"]) == 2
    assert "--limit: expected at least 1, found 0" in capsys.readouterr().err
    assert cli.main(["verify", str(folder), "--data", str(tmp_path / "nowhere.jsonl")]) == 2
    assert "nowhere.jsonl: no such file or folder" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_or_a_template_is_a_clear_error(whole, tmp_path, capsys):
    tiny("Llama").save_pretrained(tmp_path / "bare")
    given = ["verify", str(tmp_path / "bare"), "--data", str(as_messages(tmp_path))]
    assert cli.main(given) == 2
    assert re.search(
        r"bare: cannot be loaded as a tokenizer .*; --tokenizer takes another", capsys.readouterr().err, re.S
    )
    (whole / "chat_template.jinja").unlink()
    assert cli.main(["verify", str(whole), *given[2:]]) == 2
    assert re.search(r"3  no chat template\n +\S+chats.jsonl, line 1: ", capsys.readouterr().err)


def test_a_bare_configs_tokenizer_lies_beside_it(whole, tmp_path, capsys):
    (whole / "model.safetensors").unlink()
    assert cli.main(["verify", str(whole / "config.json"), "--data", str(as_messages(tmp_path)), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["turns"] == 7
    assert "weights are random: there are none beside the config" in report["notes"]


def test_a_class_that_is_not_exact_in_chunks_is_not_verified_in_chunks(folder, monkeypatch, capsys):
    found = selftest.Result("Qwen3ForCausalLM", "exact", chunked=False, chunked_reason="it is not the samples'")
    monkeypatch.setattr(evidence, "evidence_of_class", lambda *args, **kwargs: found)
    assert cli.main(["verify", str(folder)]) == 0
    assert cli.main(["verify", str(folder), "--loss", "chunked"]) == 2
    assert "Qwen3ForCausalLM takes no chunked loss: it is not the samples'" in capsys.readouterr().err
