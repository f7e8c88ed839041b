"""The head a chunk at a time: the chunked loss and token log-probabilities against the samples and the full logits."""

import warnings
from types import MethodType

import peft
import pytest
import torch
import transformers
from accelerate.utils import convert_outputs_to_fp32
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

import flexreason as fr
from exact import EXACT, worst_gradient
from flexreason.model import head
from flexreason.model.hooks import apply_patch
from flexreason.proof import oracle, rows
from flexreason.proof.evidence import listed
from flexreason.proof.float64 import relative_l2, true_float64
from flexreason.proof.tiny import build, default_config, shrink
from models import checkpoint, tiny
from strategies import random_turns
from watch import Largest

FAMILIES = {
    "Qwen3": {},
    "Gemma2": {"final_logit_softcapping": 3.0},  # a soft cap behind the head
    "Cohere": {"logit_scale": 0.25, "eos_token_id": 1, "bos_token_id": 1},  # a scale behind the head, tied embeddings
    "Granite": {"logits_scaling": 3.0},  # a divisor
    "NanoChat": {"final_logit_softcapping": 2.0},
    "Phi": {},  # a bias
    "MiniCPM3": {"dim_model_base": 16, "num_key_value_heads": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8},
}  # the last has a scale before the head

ROWS_A_CHUNK = 4


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(head, "CHUNK_LOGITS", 97 * ROWS_A_CHUNK)


def conversation(seed=0):
    return fr.lay_out_turns(random_turns([(5, 7, 3), (4, 0, 2), (3, 5, 4)], seed=seed))


def worst(model, expected, factor):
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad * factor for name, p in model.named_parameters()}
    return worst_gradient(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_loss_and_logprobs_are_the_samples(family):
    model = tiny(family, **FAMILIES[family]).double()
    layouts = [conversation(), conversation(seed=1)]
    row, samples = fr.collate(layouts), [s for layout in layouts for s in fr.unmerge(layout)]
    with true_float64():
        expected = oracle.n_samples(model, samples)
        fr.patch(model, loss="chunked")
        out = model(**row)
        out.loss.backward()
        n = expected.n_targets
        assert out.logits is None
        assert abs(out.loss.item() * n / expected.loss_sum - 1) <= EXACT
        assert worst(model, expected.gradients, n) <= EXACT

        model.zero_grad()
        logprobs = fr.token_logprobs(model, row)
        (-logprobs.sum()).backward()
        assert relative_l2([logprobs[:n]], [torch.cat(expected.logprobs)]) <= EXACT
        assert worst(model, expected.gradients, 1) <= EXACT
    assert logprobs.shape == row["labels"].shape[1:]
    assert not logprobs[n:].any()


def test_logprobs_are_aligned_with_turn_and_document():
    model, layouts = tiny("Qwen3").double(), [conversation(), conversation(seed=1)]
    row = fr.collate(layouts)
    with true_float64():
        expected = [oracle.n_samples(model, fr.unmerge(layout), gradients=False).logprobs for layout in layouts]
        logprobs = fr.token_logprobs(fr.patch(model), row).detach()
    for document, turns in enumerate(expected):
        for turn, right in enumerate(turns):
            here = (row["target_document"][0] == document) & (row["target_turn"][0] == turn)
            assert relative_l2([logprobs[here]], [right]) <= EXACT


def test_a_gradient_of_any_function_of_the_logprobs():
    """As importance ratios need: other upstream gradients than a loss has, and a temperature."""
    model, row = fr.patch(tiny("Gemma2", final_logit_softcapping=3.0).double()), fr.collate([conversation()])
    real = row["labels"][0] != -100
    with true_float64():
        logits = model(**row).logits[0] / 0.7
        full = logits.log_softmax(-1).gather(1, row["labels"][0].where(real, 0)[:, None])[:, 0].where(real, 0)
        old = full.detach() + torch.linspace(-1, 1, len(full), dtype=full.dtype)

        def objective(logprobs):
            return ((logprobs - old).exp() * real).sum()

        parameters = list(model.parameters())
        expected = torch.autograd.grad(objective(full), parameters)
        found = fr.token_logprobs(model, row, temperature=0.7)
        gradients = torch.autograd.grad(objective(found), parameters)
    assert relative_l2([found], [full]) <= EXACT
    assert relative_l2(gradients, expected) <= EXACT


def test_weights_and_items_in_batch_in_the_chunked_loss():
    turns = [(5, 7, 3), (4, 2, 2)]
    layout = fr.lay_out_turns(random_turns(turns))
    row = fr.collate([layout])
    row["target_weight"] = row["target_weight"] * torch.linspace(0.5, 2, row["labels"].shape[1])
    model = tiny("Qwen3").double()
    for more in ({}, {"num_items_in_batch": torch.tensor(7)}):
        with true_float64():
            expected = fr.patch(model)(**row, **more).loss
            found = fr.patch(model, loss="chunked")(**row, **more).loss
            gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in (found, expected)]
        assert found.item() == pytest.approx(expected.item(), rel=1e-12)
        assert relative_l2(*gradients) <= EXACT


def test_an_empty_row_adds_nothing_chunked():
    model = fr.patch(tiny("Qwen3"), loss="chunked")
    out = model(**fr.collate([]))
    out.loss.backward()
    assert out.loss.item() == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
    assert not fr.token_logprobs(model, fr.collate([])).any()


@pytest.mark.parametrize("reentrant", [True, False])
def test_chunked_with_checkpointing_and_frozen_parameters(reentrant):
    model, row = tiny("Qwen3"), fr.collate([conversation()])
    model.lm_head.weight.requires_grad_(False)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(fr.patch(model)(**row).loss, trained)
    checkpoint(model, reentrant)
    fr.patch(model, loss="chunked")(**row).loss.backward()
    assert relative_l2([p.grad for p in trained], expected) < 1e-5
    assert model.lm_head.weight.grad is None


def test_logprobs_of_a_frozen_head():
    """Whose slope by hidden states is made on the way forward."""
    model, row = tiny("Gemma2", final_logit_softcapping=3.0, tie_word_embeddings=False), fr.collate([conversation()])
    model.lm_head.weight.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    upstream = torch.linspace(-1, 1, row["labels"].shape[1])
    found = torch.autograd.grad(fr.token_logprobs(fr.patch(model), row, temperature=0.7) @ upstream, trained)
    model.lm_head.weight.requires_grad_(True)
    expected = torch.autograd.grad(fr.token_logprobs(model, row, temperature=0.7) @ upstream, trained)
    assert relative_l2(found, expected) < 1e-5


def test_autocast_around_a_models_forward_ends_with_it():
    """accelerate wraps a forward in one autocast object, which cannot be entered twice, and the head calls it again."""
    model, layout = fr.patch(tiny("Qwen3"), loss="chunked"), conversation()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(**fr.collate([layout])).loss
    wrapped = convert_outputs_to_fp32(torch.autocast("cpu", dtype=torch.bfloat16)(model.forward.__func__))
    model.forward = MethodType(wrapped, model)
    for _ in range(2):
        loss = model(**fr.collate([layout])).loss
        assert not torch.is_autocast_enabled("cpu")
        loss.backward()
        assert not torch.is_autocast_enabled("cpu")
    fr.token_logprobs(model, fr.collate([layout])).sum().backward()
    assert not torch.is_autocast_enabled("cpu")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_chunked_under_autocast_is_as_the_model_does_it():
    model, row = tiny("Qwen3"), fr.collate([conversation()])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = fr.patch(model)(**row).loss
        expected = (expected.item(), torch.autograd.grad(expected, list(model.parameters())))
        fr.patch(model, loss="chunked")
        loss, logprobs = model(**row).loss, fr.token_logprobs(model, row)
    n = int((row["labels"] != -100).sum())
    assert loss.item() == pytest.approx(expected[0], rel=1e-3)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert relative_l2(gradients, expected[1]) < 0.03
    again = torch.autograd.grad(-logprobs.sum() / n, list(model.parameters()))  # sweeps again, behind autocast's end
    assert relative_l2(again, gradients) < 1e-5


def test_no_tensor_is_as_large_as_all_logits():
    model = fr.patch(tiny("Qwen3", vocab_size=2000), loss="chunked")
    row = fr.collate([fr.lay_out_turns(random_turns([(5, 60, 30)]))])
    n_logits = row["labels"].shape[1] * 2000
    with Largest() as largest:
        model(**row).loss.backward()
        fr.token_logprobs(model, row).sum().backward()
    assert largest.elements < n_logits
    with Largest() as largest:
        fr.patch(model)(**row).loss.backward()
    assert largest.elements >= n_logits


def test_ordinary_batches_keep_their_logits_when_chunked():
    model, ids = tiny("Qwen3"), torch.randint(97, (2, 9))
    expected = model(input_ids=ids, labels=ids)
    found = fr.patch(model, loss="chunked")(input_ids=ids, labels=ids)
    assert torch.equal(found.logits, expected.logits)
    assert found.loss == expected.loss


def test_what_cannot_be_chunked_is_refused_by_name():
    model, row = fr.patch(tiny("Qwen3"), loss="chunked"), fr.collate([conversation()])
    bare = {key: value for key, value in row.items() if "labels" not in key}
    with pytest.raises(ValueError, match=r"it has no labels, and with loss=\"chunked\""):
        model(**bare)
    with pytest.raises(ValueError, match="the row lacks labels, shift_labels"):
        fr.token_logprobs(model, bare)
    with pytest.raises(ValueError, match="not patched"):
        fr.token_logprobs(tiny("Qwen3"), row)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature"):
            fr.token_logprobs(model, row, temperature=temperature)
    with pytest.raises(ValueError, match="loss: expected one of 'model', 'chunked', found 'liger'"):
        fr.patch(model, loss="liger")
    loss = model(**row).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward for a forward"):
        loss.backward()
    fr.unpatch(model)
    model.loss_function = lambda logits, labels, *args, **kwargs: logits.sum()
    with pytest.raises(ValueError, match="computes the usual loss, and the loss function was replaced"):
        fr.patch(model, loss="chunked")(**row)


class Scaled(torch.autograd.Function):
    """Hands on what it is given, and a tenth of the gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * 0.1


class OwnHead(transformers.LlamaForCausalLM):
    """A head as somebody may have written one."""

    def __init__(self, config):
        super().__init__(config)
        self.model.extra = torch.nn.LayerNorm(config.hidden_size)
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size + 5, bias=True)

    def forward(self, input_ids=None, labels=None, **kwargs):
        kwargs.pop("logits_to_keep", None)
        logits = self.make(self.model(input_ids=input_ids, **kwargs)[0])
        loss = None if labels is None else self.loss_function(logits, labels, logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


def in_place(self, hidden):
    logits = self.lm_head(hidden)
    logits /= 3
    logits[..., 90:] = -30.0
    return logits


HEADS = {
    "asks twice": lambda self, h: self.lm_head(h) - 0.5 * self.lm_head(h.roll(1, -1)),
    "its weight alone": lambda self, h: torch.nn.functional.linear(h, self.lm_head.weight * 2, self.lm_head.bias),
    "its weight again": lambda self, h: self.lm_head(h) + h @ self.lm_head.weight.t() * self.lm_head.weight.sum(),
    "uses a part of the decoder": lambda self, h: self.lm_head(self.model.extra(h)),
    "in place": in_place,
    "a part of a wider one": lambda self, h: self.lm_head(h)[..., :97],
    "detached": lambda self, h: self.lm_head(h.detach()),
    "another gradient before": lambda self, h: self.lm_head(Scaled.apply(h)),
    "another gradient behind": lambda self, h: Scaled.apply(self.lm_head(h)),
    "a cap in place": lambda self, h: self.lm_head(h).div_(3).tanh_(),
}


@pytest.mark.parametrize("which", HEADS)
def test_any_head_in_chunks_is_itself(which):
    torch.manual_seed(0)
    model = type("Made", (OwnHead,), {"make": HEADS[which]})(tiny("Llama").config).double()
    model.model.register_forward_hook(lambda module, args, out: type(out)(**{**out, "last_hidden_state": out[0] * 1.5}))
    row, parameters = fr.collate([conversation(), conversation(seed=1)]), list(model.parameters())
    n = int((row["labels"] != -100).sum())
    settings = {"materialize_grads": True, "allow_unused": True}
    with true_float64():
        loss = apply_patch(model)(**row).loss
        expected = torch.autograd.grad(loss, parameters, **settings)
        chunked = apply_patch(model, loss="chunked")(**row).loss
        logprobs = fr.token_logprobs(model, row)
        for found in (chunked, -logprobs.sum() / n):
            assert found.item() == pytest.approx(loss.item(), rel=1e-9)
            assert relative_l2(torch.autograd.grad(found, parameters, **settings), expected) <= EXACT


class Routed(torch.nn.Module):
    """A head that sends tokens to experts; half of these read the state through a layer of their own."""

    def __init__(self, size, vocabulary):
        super().__init__()
        self.first = torch.nn.ModuleList(torch.nn.Linear(size, size) for _ in range(2))
        self.last = torch.nn.ModuleList(torch.nn.Linear(size, vocabulary) for _ in range(4))

    def forward(self, hidden):
        which = (hidden.sum(-1) * 7).long() % 4
        logits = hidden.new_zeros(*hidden.shape[:-1], self.last[0].out_features)
        for number in which.unique().tolist():
            given = hidden[which == number]
            given = given if number < 2 else self.first[number - 2](given)
            logits = logits.index_put((which == number,), self.last[number](given))
        return logits


@pytest.mark.parametrize("size", [1, ROWS_A_CHUNK, 1000])
@pytest.mark.parametrize("way", ["chunked", "logprobs", "logprobs, frozen but for one"])
def test_a_head_that_sends_tokens_to_experts_trains_all_of_them(way, size, monkeypatch):
    """The first target's token comes to one expert of four: gradients of the others are not to be lost."""
    monkeypatch.setattr(head, "CHUNK_LOGITS", 97 * size)
    torch.manual_seed(0)
    model, layouts = tiny("Qwen3"), [conversation(), conversation(seed=1)]
    model.lm_head = Routed(32, 97)
    model.double()
    if "frozen" in way:
        model.requires_grad_(False).lm_head.last[3].requires_grad_(True)
        model.model.requires_grad_(True)
    with true_float64():
        expected = oracle.n_samples(model, [s for layout in layouts for s in fr.unmerge(layout)])
        apply_patch(model, loss="chunked" if way == "chunked" else "model")
        row = fr.collate(layouts)
        loss = model(**row).loss * expected.n_targets if way == "chunked" else -fr.token_logprobs(model, row).sum()
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if name in expected.gradients and p.grad is not None}
    assert worst_gradient(found, expected.gradients) <= EXACT


def test_the_second_sweep_draws_what_the_first_drew():
    """Dropout on the head: the gradient belongs to the value that was given."""
    torch.manual_seed(0)
    model = type("Made", (OwnHead,), {"make": lambda self, h: self.lm_head(torch.dropout(h, 0.5, self.training))})(
        tiny("Llama").config
    ).double()
    row, weight = fr.collate([conversation()]), model.lm_head.weight
    with true_float64():
        apply_patch(model).train()

        def value():
            torch.manual_seed(1)
            return fr.token_logprobs(model, row).sum()

        (slope,) = torch.autograd.grad(value(), weight)
        with torch.no_grad():
            direction, before = torch.randn_like(weight), value()
            weight += 1e-6 * direction
            after = value()
    assert float((after - before) / 1e-6) == pytest.approx(float((slope * direction).sum()), rel=1e-4)


def test_small_slopes_survive_fp16():
    """The loss is scaled behind the sweep; in fp16 a weight of 1/T times a probability would be lost before it."""
    torch.manual_seed(0)
    hidden = torch.randn(600, 32, dtype=torch.float16)
    labels, weight = torch.randint(0, 97, (600,)), torch.full((600,), 1e-6)
    model = tiny("Qwen3").half()
    own = head.Head(model, BaseModelOutputWithPast())
    expected = torch.autograd.grad(
        2.0**16 * 1e-6 * torch.nn.functional.cross_entropy(own(hidden).float(), labels, reduction="sum"),
        model.lm_head.weight,
    )
    found = torch.autograd.grad(2.0**16 * head.weighted_nll(own, hidden, labels, weight)[0], model.lm_head.weight)
    assert relative_l2(found, expected) < 5e-3


def test_second_derivatives_are_refused():
    model, row = fr.patch(tiny("Qwen3"), "dense"), fr.collate([conversation()])
    (gradient,) = torch.autograd.grad(fr.token_logprobs(model, row).sum(), model.lm_head.weight, create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not require grad|once_differentiable"):
        gradient.sum().backward()


def test_a_class_with_a_loss_of_its_own_is_refused_by_name():
    model = build(shrink(transformers.WhisperConfig()), transformers.WhisperForCausalLM)
    with pytest.raises(ValueError, match=r'loss="chunked": WhisperForCausalLM takes no chunked loss: it computes'):
        fr.patch(model, loss="chunked")
    with pytest.raises(
        ValueError, match="token_logprobs: WhisperForCausalLM takes no chunked loss: it computes its loss"
    ):
        fr.token_logprobs(fr.patch(model), fr.collate([conversation()]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of a hundred families, none of them ours
def test_every_exact_class_is_exact_chunked():
    """Or has a loss of its own: on the rows of the self-test, against the same model's full logits."""
    wrong, own_loss, exact = {}, [], 0
    for name in (name for name, entry in listed()["models"].items() if entry["verdict"] == "exact"):
        cls = getattr(transformers, name)
        model = build(shrink(default_config(cls)), cls).double().eval()
        layouts = rows.rows_for(model)[0][0]
        row, parameters = fr.collate(layouts), [p for p in model.parameters() if p.requires_grad]
        real = row["labels"][0] != -100
        with true_float64():
            out = apply_patch(model)(**row)
            expected = torch.autograd.grad(out.loss, parameters, materialize_grads=True, allow_unused=True)
            logprobs = out.logits[0, real].log_softmax(-1).gather(1, row["labels"][0, real, None])[:, 0]
            try:
                apply_patch(model, loss="chunked")
            except ValueError:
                own_loss.append(name)
                continue
            chunked = model(**row)
            found = torch.autograd.grad(chunked.loss, parameters, materialize_grads=True, allow_unused=True)
            found_logprobs = fr.token_logprobs(model, row)[real].detach()
        error = max(
            worst_gradient(*(dict(zip(map(str, range(len(g))), g, strict=True)) for g in (found, expected))),
            relative_l2([found_logprobs], [logprobs]),
            abs(chunked.loss.item() / out.loss.item() - 1),
        )
        exact += error <= EXACT and chunked.logits is None
        if not error <= EXACT:
            wrong[name] = error
    assert not wrong
    assert own_loss == ["WhisperForCausalLM"]
    assert exact >= 100


def test_a_replaced_forward_is_refused_when_the_loss_runs_the_head():
    model, row = fr.patch(tiny("Qwen3"), loss="chunked"), fr.collate([conversation()])
    own = model.forward

    def forward(*args, **kwargs):
        return own(*args, **kwargs)

    model.forward = forward
    with pytest.raises(ValueError, match="need the model's own forward, and it was replaced"):
        model(**row)


def test_after_a_failed_call_the_model_is_as_before():
    model, row = fr.patch(tiny("Qwen3")), fr.collate([conversation()])
    expected = model(**row)
    broken = {**row, "until": row["until"][:, :-1]}
    with pytest.raises(ValueError, match="until"):
        fr.token_logprobs(model, broken)
    found = model(**row)
    assert found.loss == expected.loss
    assert torch.equal(found.logits, expected.logits)


def test_the_loss_stays_a_loss_while_log_probabilities_are_made():
    """Also of the same model, called for another row from within: nothing of a forward stands on the model."""
    model, row = fr.patch(tiny("Qwen3").double()), fr.collate([conversation()])
    with true_float64():
        expected, wanted = model(**row).loss.detach(), fr.token_logprobs(model, row).detach()
    seen = []

    def within(model, args):
        if not seen:
            seen.append(None)  # only the first comes here
            seen[0] = model(**row).loss.detach()

    hooks = [
        model.register_forward_pre_hook(within),
        model.register_forward_hook(lambda module, args, out: seen.append(out.loss.detach())),
    ]
    with true_float64():
        found = fr.token_logprobs(model, row)
    for hook in hooks:
        hook.remove()
    assert torch.equal(found.detach(), wanted)
    assert [loss.shape for loss in seen] == [()] * 3
    assert seen[0] == expected


def test_backward_of_log_probabilities_passes_what_came_out_of_the_model():
    """DDP and FSDP put hooks there, and look there for the weights that take part."""
    model, row, passed = fr.patch(tiny("Qwen3")), fr.collate([conversation()]), []

    def found_at(graph):
        waiting, seen = [graph], set()
        while waiting:
            if (node := waiting.pop()) is not None and node not in seen:
                seen.add(node)
                waiting += [following for following, _ in node.next_functions]
        return {id(node.variable) for node in seen if hasattr(node, "variable")}

    def look(module, args, out):
        out.loss.register_hook(passed.append)
        assert found_at(out.loss.grad_fn) == {id(p) for p in model.parameters()}

    model.register_forward_hook(look)
    fr.token_logprobs(model, row).sum().backward()
    assert len(passed) == 1


def test_where_only_the_forward_is_called_the_loss_is_the_same_and_it_is_said_that_chunks_are_not():
    model, row = fr.patch(tiny("Qwen3").double(), loss="chunked"), fr.collate([conversation()])
    with true_float64():
        expected = model(**row).loss
        with pytest.warns(UserWarning, match="makes all logits at once where model.forward"):
            found = model.forward(**row).loss
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=0)


class Picking(torch.nn.Module):
    """Hands on what it knows, and nothing else."""

    def __init__(self, inner, known):
        super().__init__()
        self.inner, self.known = inner, known

    def forward(self, **given):
        return self.inner(**{key: value for key, value in given.items() if key in self.known})


@pytest.mark.parametrize("patched", ["before", "after"])
def test_log_probabilities_say_so_where_what_holds_the_model_hands_on_a_part_of_the_keywords(patched):
    root, row = tiny("Qwen3"), fr.collate([conversation()])
    if patched == "before":
        fr.patch(root)
    wrapped = Picking(root, row.keys())
    model = wrapped if patched == "before" else fr.patch(wrapped)
    assert torch.isfinite(model(**row).loss)
    with pytest.raises(ValueError, match=r"flexreason_request did not come to the model's loss.*\(Picking\)"):
        fr.token_logprobs(model, row)


# ---- a head that changes before backward


def with_two_adapters(dropout=0.0):
    def config():
        targets = ["lm_head", "q_proj"]
        return peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", lora_dropout=dropout)

    with warnings.catch_warnings(action="ignore"):  # older versions of peft warn of embeddings that the head shares
        model = peft.get_peft_model(tiny("Qwen3"), config())
        model.add_adapter("reference", config())
    torch.manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.normal_(0, 0.3)
    return fr.patch(model.double())


def train_all(model):
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)


def switch(model):
    model.set_adapter("reference")
    train_all(model)


def switch_to_an_equal_one(model):
    weights = dict(model.named_parameters())
    for name, p in weights.items():
        if "default" in name:
            weights[name.replace("default", "reference")].data.copy_(p)
    switch(model)


def freeze(model):
    model.set_adapter("reference")


def change_a_weight_past_autograd(model):
    model.base_model.model.lm_head.base_layer.weight.data.mul_(1.5)


CHANGES = {
    switch: "has parameters that it had not",
    switch_to_an_equal_one: "has parameters that it had not",
    freeze: "trained does so no more",
    lambda model: model.merge_adapter(): "takes no part",
    change_a_weight_past_autograd: "other log-probabilities",
}


@pytest.mark.parametrize("change", CHANGES)
def test_log_probabilities_of_another_head_have_no_backward(change):
    model, row = with_two_adapters(), fr.collate([conversation()])
    logprobs = fr.token_logprobs(model, row)
    change(model)
    with pytest.raises(RuntimeError, match=f"backward runs the head again, .*{CHANGES[change]}"):
        logprobs.sum().backward()


def test_dropout_of_the_head_that_is_turned_off_before_backward_is_seen():
    model, row = with_two_adapters(dropout=0.5).train(), fr.collate([conversation()])
    with pytest.warns(UserWarning, match="randomness is on"):
        logprobs = fr.token_logprobs(model, row)
    model.eval()
    with pytest.raises(RuntimeError, match="other log-probabilities"):
        logprobs.sum().backward()


def test_what_changes_and_changes_back_or_changes_nothing_is_no_harm():
    model, row = with_two_adapters(), fr.collate([conversation()])
    trained = [p for name, p in model.named_parameters() if "default" in name]
    with true_float64():
        expected = torch.autograd.grad(fr.token_logprobs(model, row).sum(), trained)
        logprobs = fr.token_logprobs(model.train(), row)
        switch(model)
        with torch.no_grad():
            fr.token_logprobs(model.eval(), row)
        model.set_adapter("default")
        assert relative_l2(torch.autograd.grad(logprobs.sum(), trained), expected) <= EXACT
