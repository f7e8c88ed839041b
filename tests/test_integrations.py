"""Patched models inside what people train with, against the N samples one by one on the untouched model.

Trainers are held to a loop written by hand, everything else to the oracle; in true fp64 unless a test says otherwise.
"""

import copy
import dataclasses
import random
from itertools import chain

import accelerate
import datasets
import peft
import pytest
import torch
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

import flexreason as fr
from exact import EXACT, samples_of, single_pass
from flexreason.attention.registry import TreeRow
from flexreason.proof import oracle
from flexreason.proof.float64 import relative_l2, true_float64
from models import TINY, checkpoint, tiny
from strategies import random_tree, random_turns
from training import fit_by_hand, randomized, trainer_arguments

# dynamo looks at .grad of tensors and hides this warning by itself, which does not work where warnings are errors.
compiles = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

LENGTH = 128
FLOAT32_HEAD = 1e-6  # the backward of trl's fused head adds up in float32 whatever it is given

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


def again_in_float64(model):
    """`model` for checkpointing in true fp64: backward runs layers again, and torch has no modes while it does."""

    def in_float64(forward):
        def run(*args, **kwargs):
            with true_float64():
                return forward(*args, **kwargs)

        return run

    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            for part in layer.children():
                part.forward = in_float64(part.forward)
    return model


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


def assert_trains_as_by_hand(trainer, stock, steps):
    """Losses and the way that every parameter went are those of the loop; SGD, which no scale of the loss escapes."""
    tolerance = FLOAT32_HEAD if type(trainer) is SFTTrainer else EXACT
    start = {name: p.detach().clone() for name, p in stock.named_parameters() if p.requires_grad}
    with true_float64():
        expected = fit_by_hand(stock, steps)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx(expected, rel=1e-6)  # Trainer adds them up in float32
    found, wanted = dict(trainer.model.named_parameters()), dict(stock.named_parameters())
    for name, before in start.items():
        assert not torch.equal(wanted[name], before), name
        assert relative_l2([found[name] - before], [wanted[name] - before]) <= tolerance, name


def arguments(kind, directory, **more):
    own = {"per_device_train_batch_size": 1, "train_sampling_strategy": "sequential", "remove_unused_columns": False}
    return trainer_arguments(directory, kind, **own, **more)


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
    return randomized(peft.get_peft_model(model, config))


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
    trainer = an_sft_trainer(again_in_float64(model), tmp_path, kind, gradient_accumulation_steps=accumulated)
    assert trainer.args.gradient_checkpointing
    steps = [list(chain(*ROWS[i : i + accumulated])) for i in range(0, len(ROWS), accumulated)]
    assert_trains_as_by_hand(trainer, stock, steps)


# peft 0.19 warns of adapters on tied embeddings
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
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
    assert_trains_as_by_hand(make(again_in_float64(model), tmp_path, rows=ROWS[:2]), stock, ROWS[:2])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backend", ["segments", "dense"])
def test_gradient_checkpointing_changes_nothing(backend, reentrant, attended):
    model, stock = a_model(backend=backend)
    attended.clear()  # of a self-test, where the list of models is of other versions
    checkpoint(again_in_float64(model.train()), reentrant)
    assert not wrong(errors(model, stock))
    assert len(attended) == 2 * TINY["num_hidden_layers"]  # every layer ran again during backward


def of_one_shape(seed):
    """A conversation with the same number of targets for every seed, and another tree."""
    generator = random.Random(seed)
    shape = [(12, 5), (0, 7), (30, 4), (9, 9), (20, 4)]
    generator.shuffle(shape)
    return fr.lay_out_turns(random_turns([(generator.randint(5, 40), t, r) for t, r in shape], seed))


@compiles
@pytest.mark.parametrize("backend", ["segments", "dense"])
def test_a_compiled_model_has_the_gradients_of_the_samples(backend):
    """Loss included; the backend aot_eager, which traces forward and backward and generates no code."""
    model, stock = a_model(backend=backend)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    assert not wrong(errors(torch.compile(model, backend=counter), stock, [of_one_shape(0)], length=384))
    assert counter.frame_count


@compiles
@pytest.mark.parametrize("backend", ["segments", "dense"])
def test_a_compiled_model_compiles_nothing_more_for_other_layouts_of_one_shape(backend):
    layouts = [of_one_shape(seed) for seed in range(21)]
    assert len({tuple(layout.until.tolist()) for layout in layouts}) == 21
    assert len({len(layout.target_ids) for layout in layouts}) == 1
    model, stock = a_model(backend=backend)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    counts = set()
    for number, layout in enumerate(layouts):
        with true_float64():
            single_pass(compiled, fr.collate([layout], 384))
        counts.add((counter.frame_count, torch._dynamo.utils.counters["frames"]["total"]))
        assert len(counts) == 1, f"row {number}"
    assert not wrong(errors(compiled, stock, layouts[-1:], length=384))


@pytest.mark.parametrize("backend", ["segments", "dense"])
def test_under_autocast_a_row_is_no_less_exact_than_the_samples_under_autocast(backend, attended):
    """In bf16 both are off by rounding, so both are held against fp64."""
    stock = tiny("Qwen3")
    model = fr.patch(copy.deepcopy(stock), backend=backend)
    normed = []
    model.model.layers[0].self_attn.q_norm.register_forward_hook(lambda _, args, out: normed.append(out.dtype))
    samples = samples_of(PACKED)
    with true_float64():
        exact = oracle.n_samples(copy.deepcopy(stock).double(), samples)
    with torch.autocast("cpu", torch.bfloat16):
        by_hand = oracle.n_samples(stock, samples)
        loss, logprobs, gradients = single_pass(model, fr.collate(PACKED, LENGTH))
    assert normed == [torch.float32]  # which attention would get, and pay for, if it did not cast
    assert attended == [(backend, *[torch.bfloat16] * 3)] * TINY["num_hidden_layers"]
    n, wanted = exact.n_targets, exact.gradients.values()
    assert gradients.keys() == exact.gradients.keys()
    assert relative_l2([g * n for g in gradients.values()], wanted) <= 1.5 * relative_l2(
        by_hand.gradients.values(), wanted
    )
    wanted = [torch.cat(exact.logprobs)]
    assert relative_l2([logprobs], wanted) <= 1.5 * relative_l2([torch.cat(by_hand.logprobs)], wanted)
    assert float(loss) * n == pytest.approx(exact.loss_sum, rel=1e-3)


@pytest.mark.parametrize("backend", ["segments", "dense"])
def test_evaluation_gives_the_log_probabilities_of_the_samples_and_keeps_no_graph(backend):
    model, stock = a_model(backend=backend)
    kept = []
    row = fr.collate(PACKED, LENGTH)
    with true_float64(), torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(kept.append, kept.append):
        expected = oracle.n_samples(stock, samples_of(PACKED), gradients=False)
        out = model.eval()(**row)
        logprobs = out.logits.log_softmax(-1)[0, : expected.n_targets]
    assert out.logits.shape[:2] == row["labels"].shape
    found = logprobs.gather(1, row["labels"][0, : expected.n_targets, None])[:, 0]
    assert relative_l2([found], [torch.cat(expected.logprobs)]) <= EXACT
    assert float(out.loss) == pytest.approx(expected.loss_sum / expected.n_targets, rel=EXACT)
    assert not kept
    assert out.logits.grad_fn is None
    assert out.loss.grad_fn is None


def assert_ordinary(model, stock):
    """An unpatched model: ordinary batches come out as from `stock`, to the bit, and rows are refused."""
    batch = {"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])}
    assert torch.equal(model(**batch).logits, stock(**batch).logits)
    assert model.config._attn_implementation == stock.config._attn_implementation
    assert model.loss_function is stock.loss_function
    with pytest.raises(RuntimeError, match="this model is not patched"):
        model(**fr.collate(PACKED, LENGTH))


def test_a_copy_of_a_patched_model_is_patched_on_its_own():
    model, stock = a_model()
    twin = copy.deepcopy(model)
    assert not wrong(errors(twin, stock))
    fr.unpatch(twin)
    assert_ordinary(twin, stock)
    assert not wrong(errors(model, stock))
    twin = copy.deepcopy(model)
    fr.unpatch(model)
    assert_ordinary(model, stock)
    assert not wrong(errors(twin, stock))


def test_a_patched_model_is_saved_as_the_ordinary_model_it_is(tmp_path):
    model, stock = a_model()
    model.save_pretrained(tmp_path)
    assert "flexreason" not in "".join(path.read_text() for path in tmp_path.glob("*.json"))
    loaded = type(stock).from_pretrained(tmp_path, dtype="auto")
    weights = stock.state_dict()
    assert loaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(loaded.state_dict()[name], weights[name]) for name in weights)
    assert_ordinary(loaded, stock)
    assert not wrong(errors(fr.patch(loaded), stock))
    assert not wrong(errors(model, stock))


@pytest.mark.parametrize("config", ["each its own", "one for both"])
def test_two_patched_models_do_not_get_in_each_others_way(config, attended):
    stocks = [tiny("Qwen3", seed=seed).double() for seed in (0, 1)]
    models = copy.deepcopy(stocks)
    if config == "one for both":
        models[1] = type(models[0])(models[0].config).double()
        models[1].load_state_dict(stocks[1].state_dict())
        assert models[0].config is models[1].config
    backends = ["segments", "dense"]
    for model, backend in zip(models, backends, strict=True):
        fr.patch(model, backend=backend)
    for i in (0, 1, 0, 1):
        attended.clear()
        assert not wrong(errors(models[i], stocks[i]))
        assert {backend for backend, *_ in attended} == {backends[i]}
    fr.unpatch(models[0])
    assert not wrong(errors(models[1], stocks[1]))
    if config == "each its own":  # a shared one still says what the other needs
        assert_ordinary(models[0], stocks[0])
    fr.unpatch(models[1])
    assert_ordinary(models[0], stocks[0])
    assert_ordinary(models[1], stocks[1])


@pytest.mark.parametrize("as_number", [int, torch.tensor])
def test_rows_accumulated_by_hand_add_up_to_the_mean_over_all_of_their_targets(as_number):
    model, stock = a_model()
    rows = [PACKED, [SHORT]]
    with true_float64():
        expected = oracle.n_samples(stock, samples_of(chain(*rows)))
        n = expected.n_targets
        loss = 0.0
        for layouts in rows:
            out = model(**fr.collate(layouts, LENGTH), num_items_in_batch=as_number(n))
            out.loss.backward()
            loss += float(out.loss.detach())
    assert loss == pytest.approx(expected.loss_sum / n, rel=EXACT)
    for name, p in model.named_parameters():
        assert relative_l2([p.grad * n], [expected.gradients[name]]) <= EXACT, name


def test_copies_of_models_that_share_a_config_are_unpatched_one_by_one():
    pair = torch.nn.ModuleList([tiny("Qwen3")])
    pair.append(type(pair[0])(pair[0].config))
    for model in pair:
        fr.patch(model)
    twin = copy.deepcopy(pair)
    row = fr.collate(PACKED, LENGTH)
    fr.unpatch(twin[0])
    assert torch.isfinite(twin[1](**row).loss)
    fr.unpatch(twin[1])
    assert twin[1].config._attn_implementation == "sdpa"
    assert torch.isfinite(pair[0](**row).loss)


def test_a_row_that_went_through_a_datasets_table_says_what_became_of_its_mask():
    row = fr.collate(PACKED, LENGTH)
    table = datasets.Dataset.from_list([{key: value.numpy() for key, value in row.items()}]).with_format("torch")
    with pytest.raises(ValueError, match="attention_mask came as a list, as a table returns empty tensors"):
        fr.patch(tiny("Qwen3"))(**table[0])


def weighted(layout):
    """A layout whose targets weigh 1, 1/2, 1/3, ..."""
    return dataclasses.replace(layout, target_weight=1 / torch.arange(1, len(layout.target_ids) + 1))


def test_weights_are_refused_by_name_where_trls_fused_head_would_drop_them():
    model, _ = a_model()
    add_fused_lm_head(model)
    assert torch.isfinite(model(**fr.collate([CONVERSATION], LENGTH), fused_lm_head=True).loss)
    with pytest.raises(ValueError, match=r"forward was replaced \(by trl\.trainer\.utils\), whose loss takes none"):
        model(**fr.collate([weighted(CONVERSATION)], LENGTH), fused_lm_head=True)


def test_weights_count_in_a_model_that_accelerate_prepared_for_bf16():
    model, stock = a_model()
    row = fr.collate([weighted(CONVERSATION)], LENGTH)
    expected = fr.patch(stock.float())(**row).loss
    AcceleratorState._reset_state(reset_partial_state=True)  # which trainers of other tests have set
    prepared = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model.float())
    AcceleratorState._reset_state(reset_partial_state=True)
    assert "forward" in vars(prepared)
    torch.testing.assert_close(prepared(**row).loss, expected, rtol=0.02, atol=0)
    assert abs(float(expected.detach() / prepared(**fr.collate([CONVERSATION], LENGTH)).loss.detach()) - 1) > 0.02


def test_autocast_does_not_reach_into_the_route_without_a_fused_kernel():
    """Gemma-2's softcap takes the tiled route, which sums in float32 whatever autocast says."""
    ratios = []
    for seed in range(8):
        stock = tiny("Gemma2", seed, attn_logit_softcapping=2.0)
        samples = samples_of(PACKED)
        with true_float64():
            wanted = oracle.n_samples(copy.deepcopy(stock).double(), samples).gradients.values()
        with torch.autocast("cpu", torch.bfloat16):
            by_hand = oracle.n_samples(stock, samples)
            _, _, gradients = single_pass(fr.patch(copy.deepcopy(stock), "segments"), fr.collate(PACKED, LENGTH))
        ours = relative_l2([g * by_hand.n_targets for g in gradients.values()], wanted)
        ratios.append(ours / relative_l2(by_hand.gradients.values(), wanted))
    assert sorted(ratios)[4] <= 1.25, ratios
