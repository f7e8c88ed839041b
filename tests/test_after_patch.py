"""What is done to a model after it was patched counts as if it had been done before, or is refused in words."""

import copy
import json
import pickle

import datasets
import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast
from trl import SFTConfig, SFTTrainer

import flexreason as fr
from exact import EXACT, samples_of, single_pass
from flexreason.model import holders
from flexreason.model import hooks as patching
from flexreason.proof import oracle
from flexreason.proof.float64 import relative_l2, true_float64
from flexreason.proof.tiny import build, shrink
from models import TINY, checkpoint, tiny
from strategies import random_turns
from training import trainer_arguments

pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]

LAYOUTS = [fr.lay_out_turns(random_turns([(5, 7, 3), (4, 0, 2), (3, 5, 4)], seed)) for seed in range(2)]
IDS = torch.arange(1, 21).view(2, 10)
PADDED = torch.tensor([[0] * 3 + [1] * 7, [1] * 10])


def a_row():
    return fr.collate(LAYOUTS)


def pair(family="Qwen3", **settings):
    """A model patched, and its untouched copy, in fp64."""
    stock = tiny(family).double().eval()
    return fr.patch(copy.deepcopy(stock), **settings), stock


def assert_exact(model, stock):
    """One pass of a row, loss, log-probabilities and gradients, against the samples by an untouched model."""
    with true_float64():
        expected = oracle.n_samples(stock, samples_of(LAYOUTS))
        loss, logprobs, gradients = single_pass(model, a_row())
    n = expected.n_targets
    assert float(loss) * n == pytest.approx(expected.loss_sum, rel=EXACT)
    assert relative_l2([logprobs], [torch.cat(expected.logprobs)]) <= EXACT
    assert all(not gradient.any() for name, gradient in expected.gradients.items() if name not in gradients)
    assert (
        relative_l2([gradients[name] * n for name in gradients], [expected.gradients[name] for name in gradients])
        <= EXACT
    )


def same(found, wanted):
    """To the bit; eager attention has no numbers in float64 where all is padding."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def assert_ordinary(model, stock, **more):
    """Ordinary batches and generation as by another model, to the bit."""
    batch = {"input_ids": IDS, "attention_mask": PADDED, **more}
    with torch.no_grad():
        found, wanted = model(**batch), stock(**batch)
        assert found.keys() == wanted.keys()
        same(found.logits, wanted.logits)
        settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(**batch, **settings), stock.generate(**batch, **settings))
    return found, wanted


# ---- the name of the attention implementation


def names(model):
    """All that somebody outside reads of it: of the model's config and of every model inside."""
    configs = [m.config for m in model.modules() if isinstance(m, transformers.PreTrainedModel)]
    return {found._attn_implementation for config in configs for found in (config, config.get_text_config())}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_patched_models_config_names_what_others_know(implementation, tmp_path):
    model = tiny("Qwen3", attn_implementation=implementation).double().eval()
    stock, configs = copy.deepcopy(model), [m.config for m in (model, model.model)]
    before = model.config.to_dict()
    fr.patch(model)
    assert names(model) == {implementation}
    assert [m.config for m in (model, model.model)] == configs
    assert model.config is model.model.config
    assert_exact(model, stock)
    assert names(model) == {implementation}  # a row leaves it so, and so does one that raised
    with pytest.raises(ValueError, match="until"):
        model(**{**a_row(), "until": a_row()["until"] * 0})
    assert names(model) == {implementation}
    assert model.config.to_dict() == before
    model.save_pretrained(tmp_path)
    assert "flexreason" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    again = type(model).from_pretrained(tmp_path, attn_implementation=implementation, dtype=torch.float64)
    assert_ordinary(again, stock)


def test_a_model_built_from_a_patched_models_config_is_an_ordinary_one():
    model, stock = pair()
    model(**a_row())
    made = [
        type(model)(model.config),
        transformers.AutoModelForCausalLM.from_config(model.config),
        transformers.AutoModel.from_config(model.model.config),
        type(model)(copy.deepcopy(model.config)),
        type(model)(pickle.loads(pickle.dumps(model.config))),
        type(model)(type(model.config).from_dict(model.config.to_dict())),
    ]
    for other in made:
        assert names(other) == {"sdpa"}
        assert not any(
            "flexreason" in str(m.config._attn_implementation) for m in other.modules() if hasattr(m, "config")
        )
        other.double().load_state_dict(stock.state_dict() if hasattr(other, "lm_head") else stock.model.state_dict())
        with pytest.raises((RuntimeError, ValueError)):
            other(**a_row())
    assert_ordinary(made[0].eval(), stock)
    assert_exact(fr.patch(made[1]), stock)
    assert_exact(model, stock)
    fr.unpatch(model)
    assert_exact(made[1], stock)


def test_a_model_built_from_a_layers_own_view_changes_no_config():
    model, stock = pair()
    made = type(model)(model.model.layers[0].self_attn.config)
    assert names(model) == {"sdpa"}
    with pytest.raises((RuntimeError, ValueError)):
        made(**a_row())
    assert_exact(model, stock)


def test_a_config_within_a_config_is_named_alike():
    """Gemma 3 makes its masks by the text config within the config of its whole model."""
    model = build(shrink(transformers.Gemma3Config()), transformers.Gemma3ForConditionalGeneration).double().eval()
    stock = copy.deepcopy(model)
    before = {id(m.config): m.config.to_dict() for m in model.modules() if isinstance(m, transformers.PreTrainedModel)}
    assert model.config.text_config is not model.config
    assert_exact(fr.patch(model), stock)
    assert names(model) == {"sdpa"}
    model.set_attn_implementation({"text_config": "eager"})
    assert model.config.text_config._attn_implementation == "eager"
    assert_exact(model, stock)
    fr.unpatch(model).set_attn_implementation("sdpa")
    assert {id(m.config): m.config.to_dict() for m in model.modules() if hasattr(m, "config")}.items() >= before.items()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_views_of_their_own_config(how):
    model, stock = pair()
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    fr.unpatch(model)
    assert names(twin) == {"sdpa"}
    twin.set_attn_implementation("eager")
    assert names(model) == {"sdpa"}
    assert_exact(twin, stock)
    fr.unpatch(twin)
    assert names(twin) == {"eager"}
    reads = {m.config._attn_implementation for m in twin.modules() if hasattr(m, "config")}
    assert reads == {"eager"}
    stock.set_attn_implementation("eager")
    assert_ordinary(twin, stock)


def test_output_attentions_may_be_asked_of_a_patched_model():
    stock = tiny("Qwen3", attn_implementation="eager").double().eval()
    model = fr.patch(copy.deepcopy(stock))
    model.config.output_attentions = stock.config.output_attentions = True
    found, wanted = assert_ordinary(model, stock)
    same(found.attentions, wanted.attentions)
    stock.config.output_attentions = False
    assert_exact(model, stock)
    other, stock = pair()
    with pytest.raises(ValueError, match="Please set it to 'eager'"):
        other.config.output_attentions = True
    other.set_attn_implementation("eager")  # as it says
    other.config.output_attentions = True
    assert all(attention is not None for attention in other(input_ids=IDS).attentions)
    assert_exact(other, stock)


@pytest.mark.parametrize("how", ["set_attn_implementation", "the config's attribute"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_another_implementation_is_for_ordinary_batches_and_rows_stay_exact(implementation, how):
    model, stock = pair()
    for each in (model, stock):
        if how == "set_attn_implementation":
            each.set_attn_implementation(implementation)
        else:
            each.config._attn_implementation = implementation
    if implementation != "flex_attention":  # which compiles for long
        assert_ordinary(model, stock)
        assert_exact(checkpoint_of(model), stock)
    else:
        stock.set_attn_implementation("sdpa")
        assert_exact(model, stock)
    assert names(model) == {implementation}
    assert names(fr.unpatch(model)) == {implementation}


def checkpoint_of(model):
    """Layers run again in backward, when the hooks around the decoder are long over."""
    checkpoint(model.train())
    for layer in model.model.layers:
        for part in layer.children():
            part.forward = in_float64(part.forward)
    return model


def in_float64(forward):
    def run(*args, **kwargs):
        with true_float64():
            return forward(*args, **kwargs)

    return run


def test_an_implementation_of_somebody_else_is_refused_until_it_is_taken_back():
    def mine(module, query, key, value, attention_mask, **kwargs):
        return torch.zeros_like(query).transpose(1, 2), None

    transformers.AttentionInterface.register("mine", mine)
    transformers.AttentionMaskInterface.register("mine", transformers.masking_utils.sdpa_mask)
    model, stock = pair()
    stock.set_attn_implementation("mine")
    model.set_attn_implementation("mine")
    assert_ordinary(model, stock)
    for loss in ("model", "chunked"):
        with pytest.raises(ValueError, match="the attention implementation is 'mine' by now"):
            model(**a_row())
        with pytest.raises(ValueError, match=r"'mine'"):
            fr.patch(model, loss=loss)
        model.set_attn_implementation("sdpa")
        fr.patch(model, loss=loss)
        model.set_attn_implementation("mine")
    model.set_attn_implementation("sdpa")
    stock.set_attn_implementation("sdpa")
    assert_exact(fr.patch(model), stock)


class OwnAttention(transformers.models.llama.modeling_llama.LlamaAttention):
    """Somebody's subclass, in a module that has no eager attention of its own."""


class CallsSuper(transformers.models.llama.modeling_llama.LlamaAttention):
    """The same with a forward of its own, which leaves attention to the one that it derives from."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("another", [False, True], ids=["none", "another"])
@pytest.mark.parametrize("cls", [OwnAttention, CallsSuper])
def test_a_layer_of_a_derived_class_has_the_eager_attention_that_its_code_finds(cls, another, monkeypatch):
    """Whether the file of the class has none of its own, or another one."""
    if another:
        other = lambda module, query, *args, **kwargs: (torch.zeros_like(query).transpose(1, 2), None)  # noqa: E731
        monkeypatch.setitem(globals(), "eager_attention_forward", other)
    stock = tiny("Llama", attn_implementation="eager").double().eval()
    for layer in stock.model.layers:
        layer.self_attn.__class__ = cls
    model = patching.apply_patch(copy.deepcopy(stock))
    assert_ordinary(model, stock)
    assert_exact(model, stock)


# ---- the loss function


def doubled(logits, labels, vocab_size, **kwargs):
    labels = kwargs["shift_labels"] if kwargs.get("shift_labels") is not None else labels
    return 2 * nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def doubling(of):
    return lambda *args, **kwargs: 2 * of(*args, **kwargs)


@pytest.mark.parametrize("after_a_row", [False, True])
@pytest.mark.parametrize("make", [lambda model: doubled, lambda model: doubling(model.loss_function)])
def test_a_loss_function_set_later_is_the_one_that_counts(make, after_a_row):
    model, row = fr.patch(tiny("Qwen3")), a_row()
    expected = 2 * model(**row).loss if after_a_row else 2 * fr.patch(tiny("Qwen3"))(**row).loss
    model.loss_function = own = make(model)
    for _ in range(2):
        torch.testing.assert_close(model(**row).loss, expected)
    assert float(model(**fr.collate([], 128)).loss.detach()) == 0
    for patched in (model, copy.deepcopy(model)):
        assert fr.token_logprobs(patched, row).shape == row["labels"].shape[1:]
    fr.patch(model, loss="chunked")
    with pytest.raises(ValueError, match="computes the usual loss, and the loss function was replaced"):
        model(**row)
    assert fr.unpatch(model).loss_function is own


def test_a_loss_function_set_later_under_chunked_is_refused_and_set_back_is_right():
    model, row = fr.patch(tiny("Qwen3"), loss="chunked"), a_row()
    expected, ours = model(**row).loss, model.loss_function
    model.loss_function = doubled
    with pytest.raises(ValueError, match="the loss function was replaced"):
        model(**row)
    assert torch.isfinite(fr.token_logprobs(model, row)).all()
    model.loss_function = ours
    torch.testing.assert_close(model(**row).loss, expected)
    model.loss_function = transformers.loss.loss_utils.ForCausalLMLoss
    torch.testing.assert_close(model(**row).loss, expected)


# ---- hooks, and parameters that are elsewhere


def scaled(output, factor):
    return type(output)(**{**output, "last_hidden_state": output.last_hidden_state * factor})


def scale_states(model, factor):
    return model.model.register_forward_hook(lambda module, args, output: scaled(output, factor))


def scale_logits(model, factor):
    return model.lm_head.register_forward_hook(lambda module, args, output: output * factor)


def scale_embeddings(model, factor):
    def hook(module, args, kwargs):
        embeds = module.embed_tokens(kwargs.pop("input_ids")) * factor
        return args, {**kwargs, "inputs_embeds": embeds, "input_ids": None}

    return model.model.register_forward_pre_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("loss", ["model", "chunked"])
@pytest.mark.parametrize("hook", [scale_states, scale_logits, scale_embeddings])
@pytest.mark.parametrize("when", ["before", "behind", "behind, and after a row"])
def test_hooks_registered_later_are_honoured(hook, when, loss):
    stock = tiny("Qwen3").double()
    model = copy.deepcopy(stock)
    factor = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))  # of nobody's module
    if when == "before":
        hook(model, factor)
    patching.apply_patch(model, loss=loss)
    if when == "behind, and after a row":
        model(**a_row())
    if when != "before":
        hook(model, factor)
    of_stock = factor.detach().clone().requires_grad_()
    hook(stock, of_stock)
    with true_float64():
        expected = by_samples(stock, of_stock)
        for value in (lambda: model(**a_row()).loss, lambda: -mean(fr.token_logprobs(model, a_row()))):
            model.zero_grad()
            factor.grad = None
            found = value()
            found.backward()
            assert float(found.detach()) == pytest.approx(expected[0], rel=1e-9)
            gradients = {name: p.grad for name, p in model.named_parameters()}
            assert relative_l2([gradients[name] for name in expected[1]], expected[1].values()) <= EXACT
            assert float(factor.grad) == pytest.approx(float(expected[2]), rel=1e-9)


def mean(logprobs):
    return logprobs.sum() / sum(len(layout.target_ids) for layout in LAYOUTS)


def by_samples(stock, *others):
    """(loss, gradients by name, gradients of `others`) of the mean over all targets, sample by sample."""
    stock.zero_grad()
    total, count = 0.0, 0
    for sample in samples_of(LAYOUTS):
        n = len(sample.prompt_ids)
        ids = torch.tensor([[*sample.prompt_ids, *sample.target_ids]])
        logits = stock(input_ids=ids, use_cache=False).logits[0, n - 1 : -1]
        total, count = total + nn.functional.cross_entropy(logits, ids[0, n:], reduction="sum"), count + len(ids[0, n:])
    (total / count).backward()
    gradients = {name: p.grad.clone() for name, p in stock.named_parameters()}
    return float(total.detach()) / count, gradients, *[other.grad for other in others]


class OfTuples(transformers.Qwen3ForCausalLM):
    """A model whose decoder gives a tuple, as older code does."""

    def __init__(self, config):
        super().__init__(config)
        plain = self.model.forward
        self.model.forward = lambda *args, **kwargs: (plain(*args, **kwargs)[0],)

    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids=input_ids, **kwargs)[0])
        loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_the_decoder_are_refused_where_they_would_be_gone_past(kind):
    model = patching.apply_patch(OfTuples(tiny("Qwen3").config))
    assert torch.isfinite(fr.token_logprobs(model, a_row())).all()
    called = []
    getattr(model.model, kind)(lambda *given: called.append(1))
    model(**a_row()).loss.backward()
    assert called
    with pytest.raises(ValueError, match=r"has backward hooks, which loss=.chunked. and token_logprobs go past"):
        fr.token_logprobs(model, a_row())
    with pytest.raises(ValueError, match="has backward hooks"):
        patching.apply_patch(model, loss="chunked")(**a_row())


class Outside(nn.Module):
    """A head's part that is kept outside the transformers model."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.bias = nn.Parameter(torch.linspace(-1, 1, TINY["vocab_size"], dtype=torch.float64))
        plain = model.lm_head.forward
        model.lm_head.forward = lambda hidden: plain(hidden) + self.bias

    def forward(self, **kwargs):
        return self.model(**kwargs)


def test_a_parameter_of_the_head_outside_the_model_is_trained():
    stock = Outside(tiny("Qwen3").double())
    model = Outside(tiny("Qwen3").double())
    with true_float64():
        expected, _, of_bias = by_samples(stock.model, stock.bias)
        for loss in ("model", "chunked", "logprobs"):
            patching.apply_patch(model, loss=loss.replace("logprobs", "model"))
            model.bias.grad = None
            found = -mean(fr.token_logprobs(model, a_row())) if loss == "logprobs" else model(**a_row()).loss
            found.backward()
            assert float(found.detach()) == pytest.approx(expected, rel=1e-9), loss
            assert relative_l2([model.bias.grad], [of_bias]) <= EXACT, loss


# ---- adapters


ALORA = {"r": 4, "task_type": "CAUSAL_LM", "alora_invocation_tokens": [7]}
PROMPTS = {
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    "multitask": peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=2),
    "alora": peft.LoraConfig(**ALORA),
}
WORDS = r"patch: Qwen3ForCausalLM is refused: its adapter .*(puts virtual tokens before the batch|activated LoRA)"


def sft(model, folder, peft_config):
    tokenizer = Tokenizer(WordLevel({str(i): i for i in range(TINY["vocab_size"])}, unk_token="0"))
    more = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
    return SFTTrainer(
        model=model,
        args=trainer_arguments(folder, SFTConfig, per_device_train_batch_size=1, **more),
        train_dataset=datasets.Dataset.from_dict({"row": [0]}),
        data_collator=lambda found: a_row(),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="0", pad_token="0"),
        peft_config=peft_config,
    )


@pytest.mark.parametrize("adapter", PROMPTS)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # peft's own, of each kind
def test_adapters_that_cannot_be_exact_are_refused_however_late_they_come(adapter, tmp_path):
    given = PROMPTS[adapter]
    with pytest.raises(ValueError, match=WORDS):
        sft(fr.patch(tiny("Qwen3")), tmp_path, copy.deepcopy(given)).train()

    model = fr.patch(tiny("Qwen3"))
    model(**a_row())
    wrapped = peft.get_peft_model(model, copy.deepcopy(given))
    for _ in range(2):
        for row in (a_row(), {key: value for key, value in a_row().items() if "labels" not in key}):
            with pytest.raises(ValueError, match=WORDS):
                wrapped(**row)
    with pytest.raises(ValueError, match=WORDS):
        fr.token_logprobs(wrapped, a_row())
    with pytest.raises(ValueError, match=WORDS):
        copy.deepcopy(wrapped)(**a_row())


@pytest.mark.parametrize("how", ["add_adapter", "of transformers", "inject"])
def test_a_second_adapter_is_looked_at_too(how):
    lora = peft.LoraConfig(r=4, task_type="CAUSAL_LM")
    if how == "add_adapter":
        model = peft.get_peft_model(fr.patch(tiny("Qwen3")), lora)
        model(**a_row())
        model.add_adapter("second", peft.LoraConfig(**ALORA))
    else:
        model = fr.patch(tiny("Qwen3"))
        model(**a_row())
        if how == "inject":
            peft.inject_adapter_in_model(peft.LoraConfig(**ALORA), model)
        else:
            model.add_adapter(peft.LoraConfig(**ALORA))
    for _ in range(2):
        with pytest.raises(ValueError, match="activated LoRA"):
            model(**a_row())


def test_an_adapter_that_only_a_part_knows_of_is_refused_at_every_row():
    model = fr.patch(tiny("Qwen3"))
    model(**a_row())
    layer = model.model.layers[0].self_attn
    layer.q_proj = nn.Sequential(layer.q_proj)
    layer.q_proj.peft_config = peft.LoraConfig(**ALORA)
    for _ in range(2):
        with pytest.raises(ValueError, match="activated LoRA"):
            model(**a_row())


def test_rows_do_not_look_for_adapters_unless_modules_were_put_somewhere(monkeypatch):
    model, looks = fr.patch(tiny("Qwen3")), []
    look = patching.Patch.look
    monkeypatch.setattr(patching.Patch, "look", lambda patch: (looks.append(1), look(patch)))
    for _ in range(3):
        model(**a_row()).loss.backward()
    assert len(looks) <= 1
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM"))
    looks.clear()
    for _ in range(3):
        wrapped(**a_row())
    assert len(looks) == 1


def test_a_layer_put_in_later_takes_rows_too():
    model, stock = pair()
    for each in (model, stock):
        torch.manual_seed(5)
        each.model.layers.append(type(each.model.layers[0])(each.config, 1).double())
        each.config.num_hidden_layers, each.config.layer_types = 3, ["full_attention"] * 3
    assert_exact(model, stock)
    reads = {m.config._attn_implementation for m in fr.unpatch(model).modules() if hasattr(m, "config")}
    assert reads == {"sdpa"}


def put_in(model, layer):
    model.model.layers[1] = layer


def append(model, layer):
    layer.self_attn.layer_idx = 2  # its place in the cache
    model.model.layers.append(layer)
    model.config.num_hidden_layers, model.config.layer_types = 3, ["full_attention"] * 3


def exchange_attention(model, layer):
    model.model.layers[1].self_attn = layer.self_attn


def exchange_config(model, layer):
    model.model.layers[1].self_attn.config = copy.deepcopy(model.config)


@pytest.mark.parametrize("how", [put_in, append, exchange_attention, exchange_config])
@pytest.mark.parametrize("after_a_row", [False, True])
def test_what_was_made_before_and_is_put_in_later_takes_rows_too(how, after_a_row):
    model, stock = pair()
    torch.manual_seed(5)
    layer = type(stock.model.layers[0])(stock.config, 1).double()
    if after_a_row:
        model(**a_row())
    for each in (model, stock):
        how(each, copy.deepcopy(layer))
    assert_exact(model, stock)
    assert_ordinary(model, stock)
    reads = {m.config._attn_implementation for m in fr.unpatch(model).modules() if hasattr(m, "config")}
    assert reads == {"sdpa"}


def test_a_layer_of_two_models_is_found_by_the_one_that_is_still_patched():
    models = [tiny("Qwen3", seed).double().eval() for seed in range(2)]
    models[1].model.layers[0] = models[0].model.layers[0]
    stocks = copy.deepcopy(models)
    for model in models:
        fr.patch(model)
    fr.unpatch(models[0])
    assert_exact(models[1], stocks[1])
    assert_ordinary(models[0], stocks[0])
    fr.unpatch(models[1])
    for model, stock in zip(models, stocks, strict=True):
        assert names(model) == {"sdpa"}
        assert_ordinary(model, stock)
        assert {type(m.config) for m in model.modules() if hasattr(m, "config")} == {type(model.config)}


@pytest.mark.parametrize("then", ["a row", "an ordinary batch", "a row that raises"])
def test_a_config_that_is_set_later_stays(then, tmp_path):
    model, stock = pair()
    model(**a_row())
    model.config = new = copy.deepcopy(model.config)
    new.mine = "kept"
    if then == "a row":
        assert_exact(model, stock)
    elif then == "an ordinary batch":
        assert_ordinary(model, stock)
    else:
        with pytest.raises(ValueError, match="until"):
            model(**{**a_row(), "until": a_row()["until"] * 0})
    assert model.config is new
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["mine"] == "kept"
    assert fr.unpatch(model).config is new
    assert_ordinary(model, stock)


# ---- a wrapper that holds two models


class First(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, **kwargs):
        return self.a(**kwargs)


class Second(First):
    def forward(self, **kwargs):
        return self.b(**kwargs)


class Both(First):
    def forward(self, **kwargs):
        return self.b(**kwargs) if self.training else self.a(**kwargs)


class Listed(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.models = nn.ModuleList([a, b])

    def forward(self, **kwargs):
        return self.models[1](**kwargs)


@pytest.mark.parametrize("kind", [First, Second])
@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: First(model, nn.Linear(1, 1))])
def test_of_two_models_the_one_that_is_called_is_patched(kind, wrap):
    stocks = [tiny("Qwen3", seed).double() for seed in range(2)]
    wrapped = fr.patch(wrap(kind(*copy.deepcopy(stocks))))
    called, other = stocks if kind is First else stocks[::-1]
    with true_float64():
        expected = oracle.n_samples(called, samples_of(LAYOUTS), gradients=False)
        found = wrapped(**a_row()).loss
        logprobs = fr.token_logprobs(wrapped, a_row())
    assert float(found.detach()) * expected.n_targets == pytest.approx(expected.loss_sum, rel=EXACT)
    assert relative_l2([logprobs[: expected.n_targets]], [torch.cat(expected.logprobs)]) <= EXACT
    roots = [m for m in wrapped.modules() if isinstance(m, type(other))]
    assert [patching.ATTRIBUTE in vars(root) for root in roots] == [kind is First, kind is Second]
    fr.unpatch(wrapped)
    assert not any(patching.ATTRIBUTE in vars(root) for root in roots)


class Embedding(nn.Module):
    """A wrapper that gives its model embeddings of its own making."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids=None, **kwargs):
        embeds = self.model.get_input_embeddings()(input_ids)
        return self.model(inputs_embeds=self.change(embeds), **kwargs)

    def change(self, embeds):
        return embeds * 1.5


class MixingEmbedding(Embedding):
    def forward(self, input_ids=None, **kwargs):
        embeds = self.model.get_input_embeddings()(input_ids)
        return self.model(inputs_embeds=embeds + nn.functional.pad(embeds, (0, 0, 1, 0))[:, :-1], **kwargs)


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: First(model, nn.Linear(1, 1))])
@pytest.mark.parametrize("adapter", [False, True])
def test_a_wrapper_that_makes_embeddings_is_refused_until_it_is_verified(wrap, adapter, monkeypatch):
    monkeypatch.setattr(holders, "_verified", set())

    def inside():
        model = tiny("Qwen3")
        return peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM")) if adapter else model

    for kind in (MixingEmbedding, Embedding):
        wrapped = wrap(kind(inside())).double()
        with pytest.raises(ValueError, match=rf"came with inputs_embeds through ({kind.__name__}|First), which holds"):
            fr.patch(wrapped)(**a_row())
        report = fr.verify(wrapped, LAYOUTS)
        assert report.ok == (kind is Embedding), str(report)
    fr.patch(wrapped)
    with true_float64():
        loss = float(wrapped(**a_row()).loss.detach())
        expected = oracle.n_samples(fr.unpatch(wrapped), samples_of(LAYOUTS), gradients=False)
    assert loss * expected.n_targets == pytest.approx(expected.loss_sum, rel=EXACT)


def test_one_model_that_is_held_twice_is_one():
    root = tiny("Qwen3")
    held = First(First(root, nn.Linear(1, 1)), root)
    assert torch.isfinite(fr.patch(held)(**a_row()).loss)
    assert patching.find_root(Both(held, root)) is root


@pytest.mark.parametrize("kind", [Both, Listed])
def test_of_two_models_that_may_be_called_none_is_guessed(kind):
    stocks = [tiny("Qwen3", seed).double() for seed in range(2)]
    wrapped = kind(*copy.deepcopy(stocks))
    with pytest.raises(ValueError, match=f"patch: {kind.__name__} holds 2 models with a head .*give patch that one"):
        fr.patch(wrapped)
    with pytest.raises(ValueError, match=r"is not patched|holds 2 models"):
        fr.token_logprobs(wrapped, a_row())
    fr.patch(wrapped.b if kind is Both else wrapped.models[1])
    with true_float64():
        expected = oracle.n_samples(stocks[1], samples_of(LAYOUTS), gradients=False)
        logprobs = fr.token_logprobs(wrapped.train(), a_row())
    assert relative_l2([logprobs[: expected.n_targets]], [torch.cat(expected.logprobs)]) <= EXACT
