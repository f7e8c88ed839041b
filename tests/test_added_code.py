"""Somebody's own code in a patched model gives a row's tokens what it gives them in their samples, or is refused."""

import copy

import accelerate
import pytest
import torch
from torch import nn
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

import flexreason as fr
from exact import samples_of
from flexreason.model import added_code
from flexreason.proof import oracle
from flexreason.proof.compare import compare, one_pass
from flexreason.proof.float64 import true_float64
from models import checkpoint, tiny
from strategies import random_turns

LAYOUTS = [fr.lay_out_turns(random_turns([(5, 7, 3), (4, 0, 2), (3, 5, 4)], seed)) for seed in range(2)]
ROW = fr.collate(LAYOUTS)


def shift(x):
    """The token before, in storage, is added."""
    return x + nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]


def doubled(x):
    return x * 2


def by_place(x):
    return x + torch.arange(x.shape[1], dtype=x.dtype)[None, :, None]


def by_number(x):
    return x / x.shape[1]


class Held(nn.Module):
    def __init__(self, inner, change):
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, *args, **kwargs):
        found = self.inner(*args, **kwargs)
        return (self.change(found[0]), *found[1:]) if isinstance(found, tuple) else self.change(found)


class OfAccelerate(accelerate.hooks.ModelHook):
    def __init__(self, change):
        self.change = change

    def post_forward(self, module, output):
        return self.change(output)


# ---- ways to put a change into a model


def a_module(model, change):
    model.model.layers[0].mlp = Held(model.model.layers[0].mlp, change)


def around_attention(model, change):
    model.model.layers[1].self_attn = Held(model.model.layers[1].self_attn, change)


def a_forward(model, change):
    mlp = model.model.layers[0].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(change(x))


def around_a_layer(model, change):
    layer = model.model.layers[0]
    plain = layer.forward
    layer.forward = lambda states, **kwargs: change(plain(states, **kwargs))


def hook(model, change):
    model.model.layers[0].register_forward_hook(lambda module, args, output: change(output))


def hook_in_place(model, change):
    def edit(module, args, output):
        output.copy_(change(output))

    model.model.layers[0].mlp.register_forward_hook(edit)


def hook_before(model, change):
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: (change(args[0]),))


def hook_of_embeddings(model, change):
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: change(output))


def hook_of_gradients(model, change):
    model.model.layers[0].mlp.register_full_backward_hook(lambda module, given, wanted: (change(given[0]),))


def hook_of_the_head(model, change):
    model.lm_head.register_forward_hook(lambda module, args, output: change(output))


def hook_of_accelerate(model, change):
    accelerate.hooks.add_hook_to_module(model.model.layers[0].mlp, OfAccelerate(change))


HOOKS = [hook, hook_before, hook_of_embeddings, hook_of_gradients, hook_of_the_head, hook_of_accelerate]
LATER = [a_module, around_attention, a_forward, around_a_layer]


def assert_exact(model, stock):
    with true_float64():
        expected = oracle.n_samples(stock, samples_of(LAYOUTS))
        assert compare(one_pass(model, ROW), expected).is_exact


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("put", [*HOOKS, *LATER])
def test_what_looks_at_one_token_goes_on(put, implementation):
    stock = tiny("Qwen3", attn_implementation=implementation).double()
    models = [copy.deepcopy(stock) for _ in range(3)]
    fr.patch(models[0])
    for each in models:
        put(each, doubled)
    if put in LATER:  # before, it is refused until verified
        assert_exact(models[0], models[1])
        assert_exact(models[0], models[1])  # nobody is asked twice
    else:
        assert_exact(fr.patch(models[0], loss="chunked"), models[1])
        assert_exact(fr.patch(models[2]), models[1])


@pytest.mark.parametrize("change", [shift, by_place, by_number])
@pytest.mark.parametrize("put", [*HOOKS, *LATER])
def test_what_looks_at_others_or_goes_by_places_is_refused(put, change):
    model = fr.patch(tiny("Qwen3"))
    model(**ROW)
    put(model, change)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"row: .* gives tokens something else in a row than in their samples"):
            model(**ROW).loss.backward()
    with torch.no_grad(), pytest.raises(ValueError, match="vocabulary"):
        model(**{**ROW, "input_ids": ROW["input_ids"] + 1000})
    model(input_ids=ROW["input_ids"]).logits.sum().backward()  # an ordinary batch is nobody's business


def test_a_hook_that_edits_in_place_is_asked_as_well():
    model = fr.patch(tiny("Qwen3"))
    hook_in_place(model, shift)
    with torch.no_grad(), pytest.raises(ValueError, match="gives tokens something else in a row"):
        model(**ROW)


def test_a_class_that_is_edited_later_is_asked(monkeypatch):
    model, plain = fr.patch(tiny("Qwen3")), Qwen3MLP.forward
    model(**ROW)
    monkeypatch.setattr(Qwen3MLP, "forward", lambda self, x: plain(self, shift(x)))
    with pytest.raises(ValueError, match="gives tokens something else in a row"):
        model(**ROW)


def test_rounding_is_no_fault():
    for dtype in (torch.float32, torch.bfloat16):
        model = fr.patch(tiny("Qwen3", hidden_size=256, intermediate_size=512).to(dtype))
        for put in (*LATER, *HOOKS):
            put(model, doubled)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            model(**ROW).loss.backward()


def test_what_is_inside_of_what_is_asked_is_asked_by_itself():
    stock = tiny("Qwen3").double()
    model = fr.patch(copy.deepcopy(stock))
    for each in (model, stock):
        for put in (*LATER, *HOOKS):
            put(each, doubled)
    assert_exact(model, stock)
    a_module(model, shift)
    around_a_layer(model, doubled)
    with pytest.raises(ValueError, match="Held, which was put into the model, gives tokens something else"):
        model(**ROW)


def test_a_method_that_is_put_in_is_asked():
    model = fr.patch(tiny("Qwen3Moe", num_experts=2, num_experts_per_tok=2, moe_intermediate_size=8))
    model(**ROW)
    experts = model.model.layers[0].mlp.experts
    plain = experts._apply_gate
    experts._apply_gate = lambda states: plain(states) * 2
    model(**ROW)
    del experts._apply_gate
    model.model.layers[0].mlp.experts._apply_gate = lambda states: plain(states) * len(states)
    with pytest.raises(ValueError, match=r"in Qwen3MoeExperts, which was put into the model, gives tokens something"):
        model(**ROW)


def test_another_module_of_a_class_that_has_answered_is_asked_too():
    model = fr.patch(tiny("Qwen3"))
    a_module(model, doubled)
    model(**ROW)
    around_attention(model, shift)
    with pytest.raises(ValueError, match="gives tokens something else in a row"):
        model(**ROW)


@pytest.mark.parametrize("mixes", [False, True])
def test_a_function_that_is_put_into_a_file_later_is_asked(mixes, monkeypatch):
    stock = tiny("Qwen3").double()
    model, plain = fr.patch(copy.deepcopy(stock)), modeling_qwen3.apply_rotary_pos_emb
    model(**ROW)

    def rotary(q, k, cos, sin, **kwargs):
        q, k = plain(q, k, cos, sin, **kwargs)
        return q, k + nn.functional.pad(k, (0, 0, 1, 0))[..., :-1, :] * mixes

    monkeypatch.setattr(modeling_qwen3, "apply_rotary_pos_emb", rotary)
    if not mixes:
        assert_exact(model, stock)
    else:
        with pytest.raises(ValueError, match=r"rotary in Qwen3Attention, .*gives tokens something else in a row"):
            model(**ROW)


def test_a_module_of_torch_that_mixes_tokens_is_asked():
    model = fr.patch(tiny("Qwen3"))
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, nn.AvgPool2d((3, 1), 1, (1, 0)))
    with pytest.raises(ValueError, match=r"AvgPool2d, which was put into the model, gives tokens something else"):
        model(**ROW)


class LongOnly(nn.Module):
    def forward(self, x):
        if x.shape[1] < 100:
            raise NotImplementedError("not for so few")
        return x


def test_what_cannot_be_checked_is_refused_until_it_is_verified():
    model = fr.patch(tiny("Qwen3"))
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, LongOnly())
    with pytest.raises(ValueError, match=r"LongOnly.* cannot be called .*not for so few.*; run fr.verify on the model"):
        model(**ROW)
    added_code.note_verified_code(model)
    model(**ROW)


def test_hooks_that_only_look_on_are_called_as_often_as_ever_and_dropout_is_no_fault():
    model, seen = tiny("Qwen3"), []
    model.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output.detach().norm()))
    fr.patch(model.train())
    model.model.layers[1].mlp = nn.Sequential(Held(model.model.layers[1].mlp, doubled), nn.Dropout(0.5))
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output + torch.randn_like(output))
    checkpoint(model)
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="randomness is on"):
        model(**ROW).loss.backward()
    first = model.model.layers[1].mlp[0].inner.down_proj.weight.grad.clone()
    assert len(seen) == 1
    model.zero_grad()
    torch.set_rng_state(state)
    model(**ROW).loss.backward()
    assert torch.equal(model.model.layers[1].mlp[0].inner.down_proj.weight.grad, first)


class ByStorage(nn.Module):
    """Counts places in storage, as wrappers do that know no rows."""

    def __init__(self, inner, distance=None):
        super().__init__()
        self.inner, self.distance = inner, distance

    def forward(self, position_ids=None, **kwargs):
        counted = torch.arange(kwargs["input_ids"].shape[1])[None]
        return self.inner(position_ids=counted if self.distance is None else position_ids + self.distance, **kwargs)


def count_before(model):
    def count(module, args, kwargs):
        return args, {**kwargs, "position_ids": torch.arange(kwargs["input_ids"].shape[1])[None]}

    model.register_forward_pre_hook(count, with_kwargs=True)
    return model


@pytest.mark.parametrize("put", [ByStorage, count_before])
@pytest.mark.parametrize("first", ["patch", "put"])
def test_other_places_on_the_way_to_the_decoder_are_refused(put, first):
    model = put(fr.patch(tiny("Qwen3"))) if first == "patch" else fr.patch(put(tiny("Qwen3")))
    with pytest.raises(ValueError, match="row: its position_ids are not the places of its tokens on their paths"):
        model(**ROW)


def test_a_distance_that_is_the_same_for_all_tokens_is_none():
    stock = tiny("Qwen3").double()
    with true_float64():
        expected = oracle.n_samples(stock, samples_of(LAYOUTS), gradients=False)
        loss = ByStorage(fr.patch(stock), 7)(**ROW).loss
    assert float(loss.detach()) * expected.n_targets == pytest.approx(expected.loss_sum, rel=1e-9)


def test_without_a_branch_there_is_nothing_to_ask():
    model = fr.patch(tiny("Qwen3"))
    a_module(model, shift)
    one = fr.collate([fr.lay_out_turns([([1, 2, 3], [4], [5, 6])])])
    model(**one)
    with pytest.raises(ValueError, match="gives tokens something else"):
        model(**ROW)


def test_a_copy_and_a_model_that_is_patched_anew_are_looked_at_too():
    model = fr.patch(tiny("Qwen3"))
    hook(model, shift)
    for other in (copy.deepcopy(model), fr.patch(model)):
        with pytest.raises(ValueError, match="gives tokens something else"):
            other(**ROW)
    fr.unpatch(model)
    assert not [h for h in model.model.layers[0]._forward_hooks.values() if "partial" in type(h).__name__]
