"""`verify`: exact models pass, and every planted fault is reported with the right culprit."""

import contextlib
import dataclasses
import json

import pytest
import torch
import transformers
from torch import nn

import flexreason as fr
from flexreason import cli, head
from flexreason.attention import dense, segments
from flexreason.patching import find_patch
from flexreason.proof import verification
from flexreason.proof.shrink import build, default_config, shrink
from models import TINY, checkpoint, tiny
from strategies import random_tree, random_turns

# transformers 5.23 renames what it calls gradient checkpointing; peft 0.21 uses the old names.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing\\w*` is deprecated:FutureWarning")

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
    from flexreason import loss

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

    monkeypatch.setattr(segments._Attend, "backward", staticmethod(without_sinks))
    model = build(shrink(transformers.GptOssConfig()), transformers.GptOssForCausalLM).to(dtype)
    culprit = say(fr.verify(model, [conversation()], float64=False))
    assert "sinks most of all" in culprit


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
    own = verification.Error("samples", "float16", "", 1e-3, 1e-3, gradients, {}, None)
    with pytest.raises(verification.NoVerdict, match="rounding drowns them"):
        verification._Verification(tiny("Qwen3"), [conversation()], None, None, None).limits_from(own, 1e-6)


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
        ("", "no samples in it"),
        ("{", "line 1: no JSON"),
        ('{"prompt_ids": [1]}', "line 1: expected prompt_ids and target_ids"),
        ('{"prompt_ids": [1], "target_ids": []}', "line 1: expected target_ids as a list of token ids, at least one"),
        ('{"prompt_ids": [1], "target_ids": [true]}', "expected target_ids as a list of token ids"),
        ('{"prompt_ids": [1.5], "target_ids": [1]}', "expected prompt_ids as a list of token ids"),
        ("[" * 100000, "line 1: no JSON"),
        ('{"prompt_ids": [1], "target_ids": [4000]}', "vocabulary has 97"),
        ("[1, 2]", "line 1: expected prompt_ids and target_ids"),
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
