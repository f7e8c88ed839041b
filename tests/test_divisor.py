"""A row's loss is by its weights and by what divides its step, whatever a class says of itself or does; or the row is
refused before anything is trained on it."""

import copy
import dataclasses
import types

import peft
import pytest
import torch
from torch import nn
from transformers import Qwen3ForCausalLM, Trainer
from transformers.modeling_outputs import CausalLMOutputWithPast

import flexreason as fr
from exact import EXACT, errors, samples_of
from flexreason.model.hooks import apply_patch
from flexreason.proof import oracle
from flexreason.proof.float64 import true_float64
from models import tiny
from strategies import random_turns
from training import fit_by_hand, trainer_arguments, way_gone

LONG = fr.lay_out_turns(random_turns([(5, 30, 3), (4, 20, 2)], 0))
SHORT = fr.lay_out_turns(random_turns([(3, 1, 1)], 1))
LAYOUTS = [LONG, SHORT]


def made(kind=Qwen3ForCausalLM, **more):
    """A tiny model of a class that is derived from Qwen3's, with the same weights as Qwen3's own."""
    stock = tiny("Qwen3", **more)
    model = kind(stock.config)
    model.load_state_dict(stock.state_dict())
    return model.double()


def row_of(*layouts):
    return fr.collate(list(layouts), 128)


def halves(layout):
    weight = torch.ones(len(layout.target_ids))
    weight[::2] = 0.25
    return dataclasses.replace(layout, target_weight=weight)


def by_formula(stock, layout, divisor=None):
    """The loss of a weighted layout, from its samples one by one."""
    with true_float64():
        logprobs = oracle.n_samples(stock, samples_of([layout]), gradients=False).logprobs
    weights = [layout.target_weight[layout.target_turn == turn] for turn in range(layout.n_samples)]
    total = -sum(float((w * each).sum()) for w, each in zip(weights, logprobs, strict=True))
    return total / (float(layout.target_weight.sum()) if divisor is None else divisor)


# ---- what divides a step


class Unsaid(Qwen3ForCausalLM):
    """As the multimodal classes of transformers say it, whose loss function takes a divisor all the same."""

    accepts_loss_kwargs = False


class Wrapped(nn.Module):
    """What holds a model, and does not say that it takes more."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, input_ids=None, labels=None, **others):
        return self.inner(input_ids=input_ids, labels=labels, **others)


Wrapped.accepts_loss_kwargs = False


def trainer_of(kind, model, folder, layouts, accumulate=2):
    more = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulate, "max_steps": 2}
    args = trainer_arguments(folder, train_sampling_strategy="sequential", remove_unused_columns=False, **more)
    if kind is Trainer:
        rows = [row_of(layout) for layout in layouts]
        return Trainer(model, args, train_dataset=rows, data_collator=lambda rows: dict(rows[0]))
    return kind(model=model, args=args, train_dataset=layouts, data_collator=fr.Collator(128))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", [fr.RowTrainer, Trainer])
def test_a_step_is_the_mean_over_its_targets_whatever_a_class_says(kind, lora, tmp_path):
    def model_of(cls):
        model = made(cls)
        if lora:
            torch.manual_seed(0)
            model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
            model = model.double()
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.data.normal_(0, 0.2)
        return model

    stock, model = model_of(Qwen3ForCausalLM), apply_patch(model_of(Unsaid))
    start = {name: p.detach().clone() for name, p in stock.named_parameters() if p.requires_grad}
    trainer = trainer_of(kind, model, tmp_path, LAYOUTS)
    with true_float64():
        fit_by_hand(stock, [LAYOUTS, LAYOUTS])
        trainer.train()
    found = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    wanted = {name: p.detach() for name, p in stock.named_parameters() if p.requires_grad}
    assert way_gone(found, wanted, start) <= 1e-8
    assert "accepts_loss_kwargs" not in vars(fr.unpatch(model))


def test_what_holds_a_model_may_say_nothing_of_a_divisor(tmp_path):
    stock, model = made(), Wrapped(apply_patch(made()))
    start = {name: p.detach().clone() for name, p in stock.named_parameters()}
    trainer = trainer_of(fr.RowTrainer, model, tmp_path, LAYOUTS)
    with true_float64():
        fit_by_hand(stock, [LAYOUTS, LAYOUTS])
        trainer.train()
    assert way_gone(dict(model.inner.named_parameters()), dict(stock.named_parameters()), start) <= 1e-8


def test_a_trainer_that_takes_the_mean_of_rows_means_is_refused(tmp_path):
    for layouts in (LAYOUTS, [halves(LONG), SHORT]):
        trainer = trainer_of(Trainer, Wrapped(apply_patch(made())), tmp_path, layouts)
        with pytest.raises(ValueError, match="the mean of the means of its 2 rows"):
            trainer.train()
    trainer_of(Trainer, Wrapped(apply_patch(made())), tmp_path, LAYOUTS, accumulate=1).train()
    model = made(Unsaid)
    trainer = trainer_of(Trainer, model, tmp_path, LAYOUTS)
    apply_patch(model)  # behind the Trainer's back, who has asked already
    with pytest.raises(ValueError, match=r"fr.RowTrainer, or call fr.patch before the Trainer is made"):
        trainer.train()


def test_what_a_model_said_of_a_divisor_is_there_again():
    model = made()
    model.accepts_loss_kwargs = False
    assert apply_patch(model).accepts_loss_kwargs is True
    assert fr.unpatch(model).accepts_loss_kwargs is False
    assert fr.unpatch(apply_patch(made(Unsaid))).accepts_loss_kwargs is False


# ---- a forward of one's own


class Through(Qwen3ForCausalLM):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Named(Qwen3ForCausalLM):
    """Hands on what it knows by name."""

    handed = ("shift_labels",)

    def forward(self, input_ids=None, labels=None, **kwargs):
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        logits = self.lm_head(hidden)
        given = {name: kwargs[name] for name in self.handed if name in kwargs}
        loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size, **given)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


class Halved(Named):
    """Divides by something else than it was told to."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        if "num_items_in_batch" in kwargs:
            kwargs["num_items_in_batch"] = kwargs["num_items_in_batch"] / 2
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        logits = self.lm_head(hidden)
        loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


class WithoutWeights(Named):
    handed = ("shift_labels", "num_items_in_batch")


class WithoutDivisor(Named):
    handed = ("shift_labels", "target_weight")


class All(Named):
    handed = ("shift_labels", "target_weight", "num_items_in_batch")


UNREADABLE = '''
class Unreadable(Qwen3ForCausalLM):
    def forward(self, input_ids=None, labels=None, shift_labels=None, **kwargs):
        """It has no self.loss_function."""
        logits = self.lm_head(self.model(input_ids=input_ids, **kwargs).last_hidden_state)
        loss = None if labels is None else nn.functional.cross_entropy(logits[0], shift_labels[0])
        return CausalLMOutputWithPast(loss=loss, logits=logits)
'''
exec(UNREADABLE)


@pytest.mark.parametrize("kind", [Through, All])
def test_a_forward_that_hands_all_on_takes_weights_and_divisors(kind):
    stock, model = made(), apply_patch(made(kind))
    layout = halves(LONG)
    with true_float64():
        for divisor in ({}, {"num_items_in_batch": 26}, {"num_items_in_batch": torch.tensor(26.0)}):
            found = float(model(**row_of(layout), **divisor).loss.detach())
            assert found == pytest.approx(by_formula(stock, layout, *map(float, divisor.values())), rel=EXACT)
        assert float(model(**row_of(), num_items_in_batch=3).loss.detach()) == 0
        if kind is Through:
            chunked = apply_patch(made(kind), loss="chunked")
            assert float(chunked(**row_of(layout)).loss.detach()) == pytest.approx(by_formula(stock, layout), rel=EXACT)
            assert fr.token_logprobs(model, row_of(layout)).shape[0] == row_of(layout)["labels"].shape[1]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", [Named, WithoutWeights, WithoutDivisor, Halved, globals()["Unreadable"]])
def test_a_loss_that_came_without_weights_or_divisor_is_refused(kind, lora):
    model = made(kind)
    if lora:  # peft calls the model's `forward` past its hooks
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config).double()
    apply_patch(model)
    with true_float64():
        expected = by_formula(made(), LONG)
        assert float(model(**row_of(LONG)).loss.detach()) == pytest.approx(expected, rel=EXACT)
        takes_weights = kind in (WithoutDivisor, Halved)
        if not takes_weights:
            with pytest.raises(ValueError, match="target weights other than 1"):
                model(**row_of(halves(LONG)))
        for layout in (LONG, halves(LONG)):
            with pytest.raises(ValueError, match=r"num_items_in_batch|target weights other than 1"):
                model(**row_of(layout), num_items_in_batch=100)
        if kind in (Named, globals()["Unreadable"]):
            with pytest.raises(ValueError, match="no empty one"):
                model(**row_of())


def test_a_loss_in_the_forward_has_no_chunks():
    model = apply_patch(made(globals()["Unreadable"]))
    with pytest.raises(ValueError, match=r"computes its loss in its own forward, from all logits|batch_size"):
        fr.token_logprobs(model, row_of(LONG))


# ---- a loss function of one's own


def shifts(logits, labels, vocab_size, num_items_in_batch=None, **kwargs):
    nll = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return nll if num_items_in_batch is None else nll / num_items_in_batch


def knows(logits, labels, vocab_size, num_items_in_batch=None, shift_labels=None, **kwargs):
    labels = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:] if shift_labels is None else shift_labels
    nll = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=0.1)
    return nll / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def drops_the_first(logits, labels, vocab_size, shift_labels=None, **kwargs):
    return nn.functional.cross_entropy(logits[0, 1:], shift_labels[0, 1:], reduction="sum")


def counts_all(logits, labels, vocab_size, **kwargs):
    return knows(logits, labels, vocab_size, **kwargs) + logits.logsumexp(-1).square().mean()


def by_neighbours(logits, labels, vocab_size, shift_labels=None, **kwargs):
    real = shift_labels[0] != -100
    nll = nn.functional.cross_entropy(logits[0, real], shift_labels[0, real], reduction="none")
    return (nll * torch.arange(1, len(nll) + 1)).mean()


def divides_by_lines(logits, labels, vocab_size, shift_labels=None, **kwargs):
    return nn.functional.cross_entropy(logits[0], shift_labels[0], reduction="none").mean()


def with_loss(loss, kind=None):
    model = made() if kind is None else made(kind)
    model.loss_function = loss
    return model


class Focal(nn.Module):
    def forward(self, logits, labels, vocab_size, shift_labels=None, num_items_in_batch=1.0, **kwargs):
        nll = nn.functional.cross_entropy(logits[0], shift_labels[0], reduction="none", ignore_index=-100)
        return ((1 - (-nll).exp()) ** 2 * nll).sum() / num_items_in_batch


@pytest.mark.parametrize("loss", [shifts, drops_the_first, counts_all, by_neighbours, divides_by_lines])
def test_a_loss_function_that_takes_other_lines_is_refused(loss):
    model = apply_patch(with_loss(loss))
    for _ in range(2):
        for divisor in ({}, {"num_items_in_batch": 7}):
            with pytest.raises(ValueError, match=r"the loss function was replaced .* and this one"):
                model(**row_of(LONG), **divisor)


def test_a_loss_function_that_knows_shift_labels_goes_on():
    with true_float64():
        stock, model = with_loss(knows), apply_patch(with_loss(knows))
        total = 0.0
        for sample in samples_of([LONG, SHORT]):
            ids = torch.tensor([[*sample.prompt_ids, *sample.target_ids]])
            labels = ids.clone()
            labels[:, : len(sample.prompt_ids)] = -100
            total += float(stock(input_ids=ids, labels=labels, num_items_in_batch=9.0).loss.detach())
        found = sum(float(model(**row_of(each), num_items_in_batch=9.0).loss.detach()) for each in LAYOUTS)
        assert found == pytest.approx(total, rel=EXACT)
        model.loss_function = Focal().forward
        before = torch.get_rng_state()
        apart = [model(**row_of(each), num_items_in_batch=9.0).loss for each in LAYOUTS]
        torch.testing.assert_close(model(**row_of(*LAYOUTS), num_items_in_batch=9.0).loss, sum(apart))
        assert torch.equal(torch.get_rng_state(), before)


def test_a_loss_function_that_drops_the_divisor_is_refused_for_steps_of_many_rows():
    model = apply_patch(
        with_loss(
            lambda logits, labels, shift_labels=None, **_: nn.functional.cross_entropy(logits[0], shift_labels[0])
        )
    )
    n_targets = len(LONG.target_ids)
    assert model(**row_of(LONG)).loss == model(**row_of(LONG), num_items_in_batch=n_targets).loss
    with pytest.raises(ValueError, match=f"which is 7, while the row has {n_targets} targets"):
        model(**row_of(LONG), num_items_in_batch=7)


# ---- a loss that is added to


def test_an_adapter_that_adds_to_every_row_is_refused():
    def adapted(weight):
        config = peft.AdaLoraConfig(
            target_r=2, init_r=4, total_step=10, tinit=1, tfinal=1, target_modules=["q_proj"], orth_reg_weight=weight
        )
        return peft.get_peft_model(made(), config)

    with pytest.raises(ValueError, match=r"AdaLoraConfig\) adds a regularisation .* orth_reg_weight=0"):
        fr.patch(adapted(0.5))
    model = fr.patch(adapted(0))
    assert float(model(**row_of(), num_items_in_batch=7).loss.detach()) == 0


# ---- models that share a decoder


def pair():
    one, other = made(), made(seed=1)
    other.model = one.model
    return one, other


def test_a_row_belongs_to_the_model_that_it_is_given_to():
    row = row_of(halves(LONG))
    with true_float64():
        expected = by_formula(pair()[1], halves(LONG))
        one, other = pair()
        apply_patch(one)
        for call in (other, other.forward):
            with pytest.raises(ValueError, match=r"is not patched; its decoder is that of another model .* fr.patch"):
                call(**row)
        apply_patch(other)
        for call in (other, other.forward):
            for given in (row, row_of(SHORT), row):
                call(**given)
            assert float(call(**row).loss.detach()) == pytest.approx(expected, rel=EXACT)
        fr.unpatch(one)
        assert float(other(**row).loss.detach()) == pytest.approx(expected, rel=EXACT)
        apply_patch(one, loss="chunked")
        assert float(other(**row).loss.detach()) == pytest.approx(expected, rel=EXACT)
        fr.unpatch(other)
        mine = by_formula(pair()[0], halves(LONG))
        assert float(one(**row).loss.detach()) == pytest.approx(mine, rel=EXACT)
    fr.unpatch(one)
    assert not any(getattr(module, "_forward_hooks", None) for module in one.modules())


@pytest.mark.skipif(not hasattr(peft, "ShadowConfig"), reason="this peft has no such adapter")
def test_an_adapter_with_a_model_of_its_own_is_refused_by_name():
    model = peft.get_peft_model(made(), peft.ShadowConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"its adapter \(ShadowConfig\) runs a second model over the batch"):
        fr.patch(model)


# ---- a forward in the place of the model's own


def fused(self, input_ids=None, labels=None, **kwargs):
    """As fused losses did before there was shift_labels."""
    n_items = kwargs.pop("num_items_in_batch", 1)
    logits = self.lm_head(self.model(input_ids=input_ids, **kwargs).last_hidden_state[:, :-1])
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / n_items
    return CausalLMOutputWithPast(loss=loss, logits=logits)


def mixing(self, input_ids=None, labels=None, **kwargs):
    hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
    logits = self.lm_head(hidden + nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1])
    return CausalLMOutputWithPast(loss=self.loss_function(logits, labels, 97, **kwargs), logits=logits)


def aligned(self, input_ids=None, labels=None, shift_labels=None, **kwargs):
    n_items = kwargs.pop("num_items_in_batch", None)
    logits = self.lm_head(self.model(input_ids=input_ids, **kwargs).last_hidden_state)
    total = nn.functional.cross_entropy(logits.flatten(0, 1), shift_labels.flatten(), reduction="sum")
    n_targets = (shift_labels != -100).sum()
    return CausalLMOutputWithPast(loss=total / (n_targets if n_items is None else n_items), logits=logits)


def without_divisor(self, *args, num_items_in_batch=None, **kwargs):
    return aligned(self, *args, **kwargs)


@pytest.mark.parametrize("first", ["before", "behind"])
@pytest.mark.parametrize("forward", [fused, mixing, aligned, without_divisor])
def test_a_forward_in_place_of_the_models_own_is_asked(forward, first):
    model = made()
    if first == "behind":
        apply_patch(model)
    model.forward = types.MethodType(forward, model)
    if first == "before":
        apply_patch(model)
    n_targets = len(LONG.target_ids)
    with true_float64():
        if forward in (fused, mixing):
            for _ in range(2):
                with pytest.raises(ValueError, match=r"the model's forward was replaced .* and this one holds other"):
                    model(**row_of(LONG), num_items_in_batch=7)
            return
        for divisor in ({}, {"num_items_in_batch": n_targets}, {"num_items_in_batch": torch.tensor(7)}):
            if forward is without_divisor and divisor.get("num_items_in_batch") == 7:
                with pytest.raises(ValueError, match=f"which is 7, while the row has {n_targets} targets"):
                    model(**row_of(LONG), **divisor)
            else:
                expected = by_formula(made(), LONG, *map(float, divisor.values()))
                assert float(model(**row_of(LONG), **divisor).loss.detach()) == pytest.approx(expected, rel=EXACT)


# ---- what is put into a patched model


def test_a_config_that_is_set_stays():
    model = apply_patch(made())
    expected = model(**row_of(LONG)).loss
    model.config = new = copy.deepcopy(model.config)
    for _ in range(2):
        torch.testing.assert_close(model(**row_of(LONG)).loss, expected)
        assert model.config is new
    fr.unpatch(model)
    assert model.config is new


def test_a_layer_that_was_made_before_takes_rows():
    stock, model = made(), apply_patch(made())
    extra = copy.deepcopy(stock.model.layers[0])
    model(**row_of(LONG))
    stock.model.layers[1], model.model.layers[1] = copy.deepcopy(extra), extra
    with true_float64():
        found = float(model(**row_of(LONG)).loss.detach())
    assert found == pytest.approx(by_formula(stock, LONG), rel=EXACT)


@pytest.mark.skipif(not hasattr(peft, "VeloraConfig"), reason="this peft has no such adapter")
@pytest.mark.parametrize("init_type", ["random", "batch_average", "batch_average_once"])
def test_an_adapter_whose_gradients_go_by_the_batch_is_refused(init_type):
    """Its forward is that of a LoRA; in backward it makes do with averages over all tokens."""
    velora = peft.VeloraConfig(num_groups=4, init_type=init_type)
    config = peft.LoraConfig(target_modules=["q_proj"], velora_config=velora, task_type="CAUSAL_LM")
    model = peft.get_peft_model(made(), config).double()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    if init_type != "random":
        with pytest.raises(ValueError, match=r"VeloraLinearVariant\) makes the gradient of a token from all tokens"):
            fr.patch(model)
    else:
        for name, p in model.named_parameters():
            p.data.add_(0.1 * ("lora_B" in name))
        assert max(errors(model, [LONG]).values()) <= EXACT
        return
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@pytest.mark.skipif(not hasattr(peft, "LilyConfig"), reason="this peft has no such adapter")
def test_an_adapter_that_looks_at_all_tokens_is_refused_before_it_has_learnt_to():
    config = peft.LilyConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(made(), config)
    with pytest.raises(ValueError, match="lets each token see all others of the batch; train a LoRA"):
        fr.patch(model)
    for config in (
        peft.LoraConfig(target_modules=["q_proj"], use_dora=True, lora_dropout=0.1),
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.OFTConfig(oft_block_size=4, r=0, target_modules=["q_proj"]),
    ):
        model = peft.get_peft_model(made(), config)
        modes = {name: part.training for name, part in model.named_modules()}
        fr.patch(model)
        assert {name: part.training for name, part in model.named_modules()} == modes
