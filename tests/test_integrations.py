"""Patched models inside what people train with, against the N samples one by one on the untouched model.

Trainers are held to a loop written by hand, everything else to the oracle; in true fp64 unless a test says otherwise.
"""

import copy
import json
import warnings

import datasets
import peft
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import flexreason as fr
from exact import EXACT, samples_of, single_pass
from flexreason import oracle
from flexreason.attention.tree_row import TreeRow
from flexreason.testing import relative_l2, true_float64
from models import TINY, tiny
from strategies import random_tree, random_turns

LENGTH = 128
LEARNING_RATE = 0.1

CONVERSATION = fr.lay_out_turns(random_turns([(6, 9, 4), (3, 0, 5), (5, 8, 3)]))
TREE = fr.lay_out(random_tree())
SHORT = fr.lay_out_turns(random_turns([(7, 1, 1)], seed=1))
LONG = fr.lay_out_turns(random_turns([(5, 30, 9), (2, 25, 8)], seed=2))

PACKED = [CONVERSATION, TREE]
ROWS = [PACKED, [SHORT], [LONG], [TREE]]


def a_model(family="Qwen3", **settings):
    """A patched model in fp64, and its untouched copy."""
    stock = tiny(family).double()
    return fr.patch(copy.deepcopy(stock), **settings), stock


def errors(model, stock, layouts=PACKED, length=LENGTH):
    """Relative errors of one row through `model` against its samples through `stock`; gradients each on its own."""
    with true_float64():
        expected = oracle.n_samples(stock, samples_of(layouts))
        loss, logprobs, gradients = single_pass(model, fr.collate(layouts, length))
    gradients = {name.removeprefix("_orig_mod."): g for name, g in gradients.items()}
    assert gradients.keys() == expected.gradients.keys()
    n = expected.n_targets
    return {
        "loss": abs(float(loss) * n / expected.loss_sum - 1),
        "logprobs": relative_l2([logprobs], [torch.cat(expected.logprobs)]),
        **{name: relative_l2([g * n], [expected.gradients[name]]) for name, g in gradients.items()},
    }


def wrong(found):
    """What is not exact, which should be nothing."""
    return {name: error for name, error in found.items() if not error <= EXACT}


def fit_by_hand(model, steps):
    """The definition of training: a step of SGD a list of layouts, on their samples one by one; the losses."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], LEARNING_RATE)
    losses = []
    for layouts in steps:
        samples = samples_of(layouts)
        n_targets = sum(len(sample.target_ids) for sample in samples)
        losses.append(0.0)
        for sample in samples:
            n = len(sample.prompt_ids)
            ids = torch.tensor([[*sample.prompt_ids, *sample.target_ids]])
            logits = model(input_ids=ids, use_cache=False).logits[0, n - 1 : -1]
            loss = torch.nn.functional.cross_entropy(logits, ids[0, n:], reduction="sum") / n_targets
            loss.backward()
            losses[-1] += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def assert_trains_as_by_hand(trainer, stock, steps):
    """Losses and the way that every parameter went are those of the loop; SGD, which no scale of the loss escapes."""
    start = {name: p.detach().clone() for name, p in stock.named_parameters() if p.requires_grad}
    with true_float64():
        expected = fit_by_hand(stock, steps)
        trainer.train()
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == pytest.approx(
        expected, rel=EXACT
    )
    found, wanted = dict(trainer.model.named_parameters()), dict(stock.named_parameters())
    for name, before in start.items():
        assert not torch.equal(wanted[name], before), name
        assert relative_l2([found[name] - before], [wanted[name] - before]) <= EXACT, name


def arguments(kind, directory, **more):
    return kind(
        output_dir=str(directory),
        optim="sgd",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        num_train_epochs=1,
        per_device_train_batch_size=1,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
        bf16=False,
        **more,
    )


def a_trainer(model, directory, rows=ROWS, **more):
    return Trainer(
        model=model,
        args=arguments(TrainingArguments, directory, **more),
        train_dataset=[fr.collate(layouts, LENGTH) for layouts in rows],
        data_collator=lambda rows: rows[0],
    )


def an_sft_trainer(model, directory, kind=SFTTrainer, rows=ROWS, **more):
    """SFTTrainer insists on a `datasets.Dataset` and a tokenizer: the dataset numbers rows that the collator has."""
    tokenizer = Tokenizer(WordLevel({str(i): i for i in range(TINY["vocab_size"])}, unk_token="0"))
    return kind(
        model=model,
        args=arguments(SFTConfig, directory, dataset_kwargs={"skip_prepare_dataset": True}, **more),
        train_dataset=datasets.Dataset.from_dict({"row": list(range(len(rows)))}),
        data_collator=lambda found: fr.collate(rows[found[0]["row"]], LENGTH),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="0", pad_token="0"),
    )


class PlainSFTTrainer(SFTTrainer):
    """With the loss of the model itself and not of trl's fused head: the override that trl advises."""

    def compute_loss(self, *args, **kwargs):
        return Trainer.compute_loss(self, *args, **kwargs)


def with_lora(model, **settings):
    """LoRA with random weights instead of B = 0, which would leave every gradient of A at 0."""
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


@pytest.fixture
def attended(monkeypatch):
    """(backend, dtypes of q, k and v) of every attention over a tree while the test runs; nothing is replaced."""
    found, attend = [], TreeRow.attend

    def noted(tree, q, k, v, *args, **kwargs):
        found.append((tree.backend, q.dtype, k.dtype, v.dtype))
        return attend(tree, q, k, v, *args, **kwargs)

    monkeypatch.setattr(TreeRow, "attend", noted)
    return found


def test_trainer_takes_the_steps_of_a_loop_over_the_samples(tmp_path):
    model, stock = a_model()
    assert_trains_as_by_hand(a_trainer(model, tmp_path), stock, ROWS)


def test_trainer_divides_an_accumulated_step_by_all_of_its_targets(tmp_path):
    model, stock = a_model()
    assert [sum(len(layout.target_ids) for layout in row) for row in ROWS] == [121, 2, 72, 92]
    trainer = a_trainer(model, tmp_path, gradient_accumulation_steps=2)
    assert_trains_as_by_hand(trainer, stock, [ROWS[0] + ROWS[1], ROWS[2] + ROWS[3]])


@pytest.mark.parametrize("kind", [SFTTrainer, PlainSFTTrainer])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_sft_trainer_takes_the_steps_of_a_loop_over_the_samples(kind, accumulated, tmp_path):
    """With trl's fused head (its default) and with the model's own loss, and gradient checkpointing (its default)."""
    model, stock = a_model()
    trainer = an_sft_trainer(model, tmp_path, kind, gradient_accumulation_steps=accumulated)
    assert trainer.args.gradient_checkpointing
    steps = [sum(ROWS[i : i + accumulated], []) for i in range(0, len(ROWS), accumulated)]
    assert_trains_as_by_hand(trainer, stock, steps)


@pytest.mark.parametrize("first", ["patch", "peft"])
def test_lora_adapters_have_the_gradients_of_the_samples_whichever_comes_first(first):
    """The head has an adapter too."""
    targets = {"target_modules": ["q_proj", "v_proj", "down_proj", "lm_head"]}
    stock = with_lora(tiny("Qwen3").double(), **targets)
    if first == "patch":
        model = with_lora(fr.patch(tiny("Qwen3").double()), **targets)
    else:
        model = fr.patch(with_lora(tiny("Qwen3").double(), **targets))
    found = errors(model, stock)
    assert sum("lora_A" in name for name in found) == sum("lora_B" in name for name in found) == 7
    assert not wrong(found)


@pytest.mark.parametrize("make", [a_trainer, an_sft_trainer])
@pytest.mark.parametrize("first", ["patch", "peft"])
def test_trainers_train_lora_adapters_as_the_loop_does(make, first, tmp_path):
    stock = with_lora(tiny("Qwen3").double())
    if first == "patch":
        model = with_lora(fr.patch(tiny("Qwen3").double()))
    else:
        model = fr.patch(with_lora(tiny("Qwen3").double()))
    assert_trains_as_by_hand(make(model, tmp_path, rows=ROWS[:2]), stock, ROWS[:2])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backend", ["segments", "dense"])
def test_gradient_checkpointing_changes_nothing(backend, reentrant, attended):
    model, stock = a_model(backend=backend)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    assert not wrong(errors(model, stock))
    assert len(attended) == 2 * TINY["num_hidden_layers"]  # every layer ran again during backward
