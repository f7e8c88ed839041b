"""One formula, sum of w x nll / divisor, wherever a loss is computed; whatever computes another refuses the row.

The oracle is the samples one by one through the untouched model, and the formula written out.
"""

import copy
import dataclasses

import datasets
import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

import flexreason as fr
from exact import EXACT
from flexreason.proof.float64 import relative_l2, true_float64
from flexreason.proof.tiny import build, shrink
from models import TINY, tiny
from strategies import random_turns
from training import LEARNING_RATE, trainer_arguments

# transformers 5.23 renames what it calls gradient checkpointing; Trainer, peft 0.21 and trl 1.16 use the old names.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`(compute_loss_func|label_smoothing_factor)` is deprecated:FutureWarning"),
    # dynamo looks at .grad of tensors and hides this warning by itself, which does not work where warnings are errors.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

LAYOUTS = [fr.lay_out_turns(random_turns([(5, 7, 3), (4, 0, 2), (3, 5, 4)], seed)) for seed in range(4)]

OTHER = r"target weights other than 1"


def some_weights(kind, n, seed=0):
    drawn = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    return {
        "ones": torch.ones(n),
        "halves": torch.full((n,), 0.5),
        "any": drawn + 0.1,
        "0 and 1": (drawn > 0.4).float(),
        "one 0": torch.ones(n).index_fill(0, torch.tensor([n // 2]), 0.0),
        "signs": drawn - 0.4,
        "negative": -drawn - 0.1,
        "sum to 0": torch.cat([torch.ones(n // 2), -torch.ones(n // 2), torch.zeros(n % 2)]),
        "all 0": torch.zeros(n),
    }[kind]


def weighed(layout, kind, seed=0):
    return dataclasses.replace(layout, target_weight=some_weights(kind, len(layout.target_ids), seed))


def by_hand(stock, layouts, divisor=None):
    """(loss, gradients) of weighted layouts by their samples, in this order of targets: turn by turn."""
    stock.zero_grad()
    total, weight = 0.0, 0.0
    for layout in layouts:
        for turn, sample in enumerate(fr.unmerge(layout)):
            n = len(sample.prompt_ids)
            ids = torch.tensor([[*sample.prompt_ids, *sample.target_ids]])
            nll = torch.nn.functional.cross_entropy(
                stock(input_ids=ids, use_cache=False).logits[0, n - 1 : -1], ids[0, n:], reduction="none"
            )
            w = layout.target_weight[layout.target_turn == turn].to(nll)
            total, weight = total + (w * nll).sum(), weight + float(w.sum())
    loss = total / (weight if divisor is None else divisor)
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in stock.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss", ["model", "chunked"])
@pytest.mark.parametrize("divisor", [None, 7, 0.25, torch.tensor(31), torch.tensor(2.5)])
@pytest.mark.parametrize(
    "kind", ["ones", "halves", "any", "0 and 1", "one 0", "signs", "negative", "sum to 0", "all 0"]
)
def test_the_formula_or_a_refusal(kind, divisor, loss):
    layouts = [weighed(layout, kind, seed) for seed, layout in enumerate(LAYOUTS[:2])]
    stock = tiny("Qwen3").double()
    model, row = fr.patch(copy.deepcopy(stock), loss=loss), fr.collate(layouts)
    more = {} if divisor is None else {"num_items_in_batch": divisor}
    with true_float64():
        if divisor is None and kind in ("negative", "sum to 0", "all 0"):
            with pytest.raises(ValueError, match=r"target weights sum to .*num_items_in_batch"):
                model(**row)
            return
        expected, gradients = by_hand(stock, layouts, divisor)
        out = model(**row, **more)
        out.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert out.loss.shape == ()
    assert float(out.loss.detach()) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    if kind == "all 0":
        assert all((gradient == 0).all() for gradient in found.values())
    else:
        assert relative_l2([found[name] for name in gradients], gradients.values()) <= EXACT


@pytest.mark.parametrize("loss", ["model", "chunked"])
def test_a_divisor_is_a_number_above_0(loss):
    model, row = fr.patch(tiny("Qwen3"), loss=loss), fr.collate(LAYOUTS[:1])
    for divisor in (0, -1, torch.tensor(-2.0), float("nan"), float("inf")):
        with pytest.raises(ValueError, match="num_items_in_batch: expected a number above 0"):
            model(**row, num_items_in_batch=divisor)
    row["target_weight"] = row["target_weight"] * torch.nan
    with pytest.raises(ValueError, match="target weights sum to nan"):
        model(**row)


@pytest.mark.parametrize("loss", ["model", "chunked"])
@pytest.mark.parametrize("divisor", [None, 5, 0, -3])
@pytest.mark.parametrize("how", ["no layouts", "all ignored", "ignored, of negative weight"])
def test_a_row_without_targets_adds_exactly_nothing(how, divisor, loss):
    row = fr.collate([] if how == "no layouts" else LAYOUTS[:1], 128)
    row["labels"] = row["shift_labels"] = torch.full_like(row["labels"], -100)
    if how == "ignored, of negative weight":
        row["target_weight"] = torch.full_like(row["target_weight"], -2.0)
    model = fr.patch(tiny("Qwen3"), loss=loss)
    out = model(**row, **({} if divisor is None else {"num_items_in_batch": divisor}))
    out.loss.backward()
    assert float(out.loss.detach()) == 0
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


def test_what_cannot_be_said_in_words_is_no_number():
    """Compiled code does not branch on numbers, and nobody waits for those of another device."""
    torch.compiler.reset()
    compiled = torch.compile(fr.patch(tiny("Qwen3")), backend="eager")
    assert compiled(**fr.collate([weighed(LAYOUTS[0], "negative")])).loss.isnan()
    assert compiled(**fr.collate([weighed(LAYOUTS[0], "any")])).loss.isfinite()
    assert float(compiled(**fr.collate([], 128)).loss.detach()) == 0


# ---- losses that know no weights


def with_forward_of_another(model):
    original = model.forward
    model.forward = lambda *args, **kwargs: original(*args, **kwargs)
    return model


def with_fused_head(model):
    add_fused_lm_head(model)
    return model


def with_loss_of_another(model):
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: torch.nn.functional.cross_entropy(
        logits[0], kwargs["shift_labels"][0]
    )
    return model


def of_another_class():
    return build(shrink(transformers.WhisperConfig()), transformers.WhisperForCausalLM)


UNWEIGHING = {
    "another forward": lambda: with_forward_of_another(fr.patch(tiny("Qwen3"))),
    "another loss, before": lambda: fr.patch(with_loss_of_another(tiny("Qwen3"))),
    "another loss, behind": lambda: with_loss_of_another(fr.patch(tiny("Qwen3"))),
    "a class with a loss of its own": lambda: fr.patch(of_another_class()),
}


@pytest.mark.parametrize("make", UNWEIGHING)
@pytest.mark.parametrize("kind", ["0 and 1", "one 0", "halves", "signs", "all 0"])
def test_0_is_another_weight_where_the_loss_cannot_weigh(make, kind):
    model, row = UNWEIGHING[make](), fr.collate(LAYOUTS[:1])
    ids = row["input_ids"]
    row["input_ids"] = ids % model.config.get_text_config().vocab_size
    row["labels"] = row["shift_labels"] = row["labels"].where(row["labels"] < 0, row["labels"] % 30)
    ones = float(model(**row).loss.detach())  # those that only fill the row up have 0
    assert ones == ones
    row["target_weight"][0, : len(LAYOUTS[0].target_ids)] = some_weights(kind, len(LAYOUTS[0].target_ids))
    n_targets = len(LAYOUTS[0].target_ids)
    for divisor in ({}, {"num_items_in_batch": n_targets}):
        with pytest.raises(ValueError, match=OTHER):
            model(**row, **divisor)


def test_a_class_with_a_loss_of_its_own_divides_by_the_targets_of_a_row():
    model, row = fr.patch(of_another_class()), fr.collate(LAYOUTS[:1])
    row["input_ids"] = row["input_ids"] % model.config.get_text_config().vocab_size
    row["labels"] = row["shift_labels"] = row["labels"].where(row["labels"] < 0, row["labels"] % 30)
    n_targets = len(LAYOUTS[0].target_ids)
    assert model(**row, num_items_in_batch=torch.tensor(n_targets)).loss == model(**row).loss
    with pytest.raises(ValueError, match=f"mean over a row's own targets: here {n_targets}, while .* is 7"):
        model(**row, num_items_in_batch=7)
    with pytest.raises(ValueError, match="no empty one"):
        model(**fr.collate([], 128))


@pytest.mark.parametrize("make", [with_loss_of_another, with_forward_of_another, lambda model: with_fused_head(model)])
def test_an_ignored_target_may_have_any_weight_where_the_loss_cannot_weigh(make):
    model, row = make(fr.patch(tiny("Qwen3"))), fr.collate(LAYOUTS[:1])
    if make not in (with_loss_of_another, with_forward_of_another):
        row["fused_lm_head"] = True
    row["labels"] = row["shift_labels"] = row["labels"].clone()
    row["labels"][0, 3:6] = -100
    expected = model(**row).loss
    row["target_weight"][0, 3:6] = torch.tensor([0.0, -1.0, 5.0])
    assert model(**row).loss == expected


# ---- trainers


def settings(kind, folder, **more):
    own = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "remove_unused_columns": False}
    own["train_sampling_strategy"] = "sequential"
    return trainer_arguments(folder, kind, **own, **more)


def a_trainer(model, folder, rows, kind=Trainer, compute_loss_func=None, **more):
    return kind(
        model=model,
        args=settings(TrainingArguments, folder, **more),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=lambda rows: dict(rows[0]),
        compute_loss_func=compute_loss_func,
    )


def an_sft_trainer(model, folder, rows, kind=SFTTrainer, compute_loss_func=None, peft_config=None, **more):
    tokenizer = Tokenizer(WordLevel({str(i): i for i in range(TINY["vocab_size"])}, unk_token="0"))
    numbers = datasets.Dataset.from_dict({"row": list(range(len(rows)))})
    return kind(
        model=model,
        args=settings(SFTConfig, folder, dataset_kwargs={"skip_prepare_dataset": True}, **more),
        train_dataset=numbers,
        eval_dataset=numbers,
        data_collator=lambda found: dict(rows[found[0]["row"]]),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="0", pad_token="0"),
        compute_loss_func=compute_loss_func,
        peft_config=peft_config,
    )


class PlainSFTTrainer(SFTTrainer):
    """With the model's own loss and not trl's fused head: the override that trl advises."""

    def compute_loss(self, *args, **kwargs):
        return Trainer.compute_loss(self, *args, **kwargs)


class ThroughSuper(Trainer):
    def compute_loss(self, model, inputs, num_items_in_batch=None, **kwargs):
        return super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch, **kwargs)


def with_lora(model):
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM"))


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("wrap", [lambda model: model, with_lora])
@pytest.mark.parametrize(
    ("kind", "loss"),  # trl replaces the forward, which chunks refuse
    [
        *((kind, "model") for kind in (Trainer, ThroughSuper, SFTTrainer, PlainSFTTrainer)),
        *((kind, "chunked") for kind in (Trainer, ThroughSuper)),
    ],
)
def test_weights_are_refused_where_a_trainer_divides_by_the_number_of_targets(kind, wrap, accumulated, loss, tmp_path):
    make = an_sft_trainer if kind in (SFTTrainer, PlainSFTTrainer) else a_trainer
    rows = [fr.collate([weighed(layout, "0 and 1")], 128) for layout in LAYOUTS]
    trainer = make(
        wrap(fr.patch(tiny("Qwen3"), loss=loss)), tmp_path, rows, kind, gradient_accumulation_steps=accumulated
    )
    with pytest.raises(ValueError, match=OTHER):
        trainer.train()
    with pytest.raises(ValueError, match=OTHER):
        trainer.evaluate()


class OwnCount(Trainer):
    """Divides a step by its weight, as somebody may have written it."""

    def get_batch_samples(self, *args, **kwargs):
        rows, _ = super().get_batch_samples(*args, **kwargs)
        return rows, fr.total_weight(rows)


class OwnLoss(Trainer):
    """A step is a row here, so the row's own mean is the step's."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs, num_items_in_batch=fr.total_weight([inputs])).loss


class OwnMean(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).loss


@pytest.mark.parametrize("kind", [OwnCount, OwnLoss, OwnMean, fr.RowTrainer])
def test_trainers_that_divide_by_weight_take_weights(kind, tmp_path):
    layouts = [weighed(layout, "0 and 1", seed) for seed, layout in enumerate(LAYOUTS)]
    stock = tiny("Qwen3").double()
    model = fr.patch(copy.deepcopy(stock))
    trainer = a_trainer(model, tmp_path, [fr.collate([layout], 128) for layout in layouts], kind)
    if kind is fr.RowTrainer:  # which shuffles what is no `Rows`
        trainer._get_train_sampler = lambda data=None: torch.utils.data.SequentialSampler(trainer.train_dataset)
    optimizer = torch.optim.SGD(stock.parameters(), LEARNING_RATE)
    with true_float64():
        losses = []
        for layout in layouts:
            losses.append(by_hand(stock, [layout])[0])
            optimizer.step()
        trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert found == pytest.approx(losses, rel=1e-6)
    assert relative_l2(model.parameters(), stock.parameters()) <= EXACT


def test_a_trainer_takes_rows_of_weight_1_as_ever(tmp_path):
    rows = [fr.collate([layout], 128) for layout in LAYOUTS]
    a_trainer(fr.patch(tiny("Qwen3")), tmp_path, rows, gradient_accumulation_steps=2).train()


def test_row_trainer_refuses_a_step_that_weighs_nothing_and_evaluates_over_all_rows(tmp_path):
    light, heavy = weighed(LAYOUTS[0], "negative"), weighed(LAYOUTS[1], "any")
    heavy = dataclasses.replace(heavy, target_weight=heavy.target_weight * 5)
    stock = tiny("Qwen3").double()
    trainer = a_trainer(
        fr.patch(copy.deepcopy(stock)), tmp_path, [fr.collate([light]), fr.collate([heavy])], fr.RowTrainer
    )
    with true_float64():
        expected, _ = by_hand(stock, [light, heavy])
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
        with pytest.raises(ValueError, match="RowTrainer: the target weights of a step sum to -"):
            trainer.train()
        with pytest.raises(ValueError, match="what is evaluated sum to 0 or less"):
            trainer.evaluate([fr.collate([light])])
    both = a_trainer(
        fr.patch(copy.deepcopy(stock)),
        tmp_path,
        [fr.collate([light]), fr.collate([heavy])],
        fr.RowTrainer,
        gradient_accumulation_steps=2,
    )
    with true_float64():
        both.train()  # together they weigh enough
    assert both.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-6)


def shifting(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[..., :-1, :]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[..., 1:].flatten())


SHIFTS = {"smoothing": {"label_smoothing_factor": 0.1}, "a function": {"compute_loss_func": shifting}}


@pytest.mark.parametrize("how", SHIFTS)
@pytest.mark.parametrize("wrap", [lambda model: model, with_lora])
@pytest.mark.parametrize("make", [a_trainer, an_sft_trainer])
@pytest.mark.parametrize("loss", ["model", "chunked"])
def test_what_shifts_a_rows_targets_is_refused(make, wrap, how, loss, tmp_path):
    rows = [fr.collate([layout], 128) for layout in LAYOUTS]
    trainer = make(wrap(fr.patch(tiny("Qwen3"), loss=loss)), tmp_path, rows, **SHIFTS[how])
    words = "label_smoothing_factor or compute_loss_func"
    with pytest.raises(ValueError, match=words):
        trainer.train()
    with pytest.raises(ValueError, match=words):
        trainer.evaluate()


def test_a_loss_of_ones_own_from_the_logits_is_right_and_leaves_both_labels_out():
    stock = tiny("Qwen3").double()
    model, row = fr.patch(copy.deepcopy(stock)), fr.collate(LAYOUTS[:2])
    labels, _ = row.pop("labels"), row.pop("shift_labels")
    with true_float64():
        expected, _ = by_hand(stock, LAYOUTS[:2])
        loss = torch.nn.functional.cross_entropy(model(**row).logits[0], labels[0])
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-9)
