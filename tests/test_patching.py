"""A patched model takes rows exactly, does all else as before, and refuses what it cannot do."""

import copy
import pickle
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
import transformers

import flexreason as fr
from exact import EXACT, errors, samples_of, single_pass
from flexreason.attention import cover, segments
from flexreason.model.hooks import apply_patch, find_patch
from flexreason.proof import oracle
from flexreason.proof.evidence import Evidence
from flexreason.proof.float64 import relative_l2, saved_bytes, true_float64
from flexreason.proof.tiny import build, default_config, shrink
from models import checkpoint, tiny
from strategies import random_tree, random_turns
from watch import Largest

FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": 20},
    "Qwen3": {},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "Gemma2": {"sliding_window": 20, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    "Phi3": {"pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 0},
}
PAPER = [(11, 20, 5), (3, 0, 5), (20, 30, 9)]


def made(family, seed=0, **config):
    model = tiny(family, seed, **{**FAMILIES[family], **config})
    if family == "Qwen3Moe":
        model.set_experts_implementation("eager")  # grouped matrix products take no float64
    return model


UNSUPPORTED = [("Gemma2", "sdpa")]  # by transformers itself: sdpa has no softcap


def layouts(kind):
    return {
        "paper": [fr.lay_out_turns(random_turns(PAPER))],
        "tree": [fr.lay_out(random_tree())],
        "packed": [fr.lay_out(random_tree()), fr.lay_out_turns(random_turns(PAPER, 1)), fr.lay_out(random_tree(2))],
        "unaligned": [fr.lay_out_turns(random_turns([(61, 150, 67)] * 2))],
    }[kind]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["paper", "tree", "packed", "unaligned"])
@pytest.mark.parametrize("backend", ["segments", "dense"])
def test_one_pass_has_the_loss_log_probabilities_and_gradients_of_the_samples(family, kind, backend):
    found = errors(made(family).double(), layouts(kind), backend=backend)
    assert max(found.values()) <= EXACT, found


def test_the_windows_above_are_crossed_and_the_softcap_bites():
    """The families' special things change the result, so that the test above can fail."""
    for family, without in (
        ("Mistral", {"sliding_window": None}),
        ("Gemma2", {"sliding_window": 4096}),
        ("Gemma2", {"attn_logit_softcapping": None}),
    ):
        with_it, plain = made(family), made(family, **without)
        samples = samples_of(layouts("paper"))
        a, b = (oracle.n_samples(model, samples, gradients=False).loss_sum for model in (with_it, plain))
        assert abs(a / b - 1) > 1e-5, (family, without)


@pytest.mark.parametrize("kind", ["paper", "packed"])
def test_the_papers_rule_by_turns_and_roles_trains_the_same(kind):
    given = {"paper": layouts("paper"), "packed": [fr.lay_out_turns(random_turns(PAPER, seed)) for seed in range(2)]}
    found = errors(made("Gemma2").double(), given[kind], backend="dense", mask="turn_role")
    assert max(found.values()) <= EXACT, found


MISLEADING = {  # (family, config): what the config or the layers say of a window is not what the model's mask does
    "a sliding mask that no layer is told of": (
        "Phimoe", {"sliding_window": 20, "num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0,
                   "router_jitter_noise": 0.0},
    ),
    "layers told of a window that the mask lacks": (
        "Olmoe", {"sliding_window": 20, "num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0},
    ),
    "layer types that the model ignores": ("Mistral", {"sliding_window": 20, "layer_types": ["full_attention"] * 2}),
    "a window of layer types that the model ignores": (
        "Llama", {"sliding_window": 20, "layer_types": ["sliding_attention"] * 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISLEADING)
def test_a_layers_window_is_that_of_the_mask_the_model_would_have_made(case):
    family, config = MISLEADING[case]
    model = tiny(family, **config).double()
    if "experts" in str(config):
        model.set_experts_implementation("eager")
    found = errors(model, layouts("paper"), backend="segments")
    assert max(found.values()) <= EXACT, found


def test_flex_through_a_model_is_dense_by_both_rules():
    model, row = made("Gemma2"), fr.collate(layouts("unaligned"))
    with torch.no_grad():
        expected = fr.patch(model, "dense")(**row)
        for mask in ("interval", "turn_role"):
            found = fr.patch(model, "flex", mask=mask)(**row)
            torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.loss, expected.loss)
    with pytest.raises(NotImplementedError, match='"flex" has no backward on CPU'):
        model(**row)


def test_other_layouts_are_refused_under_the_papers_rule():
    model = fr.patch(made("Qwen3"), "dense", mask="turn_role")
    model(**fr.collate(layouts("paper")))
    for given in (layouts("tree"), layouts("packed")):
        with pytest.raises(ValueError, match='mask="turn_role" takes rows of lay_out_turns layouts only'):
            model(**fr.collate(given))
    with pytest.raises(ValueError, match='backend "segments" cannot compute mask="turn_role"'):
        fr.patch(model, "segments", mask="turn_role")
    with pytest.raises(ValueError, match='backend "segments" cannot compute mask="turn_role"'):
        fr.patch(model, "auto", mask="turn_role")(**fr.collate(layouts("paper")))


@pytest.mark.parametrize("family", ["Qwen3", "Gemma2"])
def test_in_bf16_the_single_pass_errs_no_more_than_the_samples_do(family):
    """Against fp64: relative L2 over all log-probabilities and all gradients, median of 8 seeds, at most 1.5 times."""
    ratios = {"logprobs": [], "gradients": []}
    for seed in range(8):
        low = made(family, seed).bfloat16()
        exact = copy.deepcopy(low).double()
        given = [fr.lay_out_turns(random_turns(PAPER, seed))]
        with true_float64():
            right = oracle.n_samples(exact, samples_of(given))
        naive = oracle.n_samples(low, samples_of(given))
        _, logprobs, gradients = single_pass(fr.patch(low, "segments"), fr.collate(given))
        ours = [gradients[name] * right.n_targets for name in right.gradients]
        theirs, wanted = naive.gradients.values(), right.gradients.values()
        ratios["gradients"].append(relative_l2(ours, wanted) / relative_l2(theirs, wanted))
        theirs, wanted = [torch.cat(naive.logprobs)], [torch.cat(right.logprobs)]
        ratios["logprobs"].append(relative_l2([logprobs], wanted) / relative_l2(theirs, wanted))
    assert all(sorted(found)[4] <= 1.5 for found in ratios.values()), ratios


# ---- training


def trajectory(model, batches, optimizer_steps):
    """Parameters after AdamW steps; `batches(step)` leaves the gradients of a step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(optimizer_steps):
        optimizer.zero_grad()
        batches(step)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def trained(dtype, steps=30):
    """(parameters trained on rows, and on the samples of the same conversations in 5 orders)."""
    conversations = [fr.lay_out_turns(random_turns([(4, 6, 3)] * 8, seed)) for seed in range(6)]

    def start():
        return tiny("Qwen3").to(dtype)

    def by_samples(order):
        model = start()

        def batch(step):
            samples = samples_of(conversations[step % 3 * 2 : step % 3 * 2 + 2])
            found = oracle.n_samples(model, [samples[(order + i) % len(samples)] for i in range(len(samples))])
            for name, p in model.named_parameters():
                p.grad = found.gradients[name] / found.n_targets

        return trajectory(model, batch, steps)

    model = fr.patch(start(), "segments")
    rows = [fr.collate(conversations[i * 2 : i * 2 + 2]) for i in range(3)]
    ours = trajectory(model, lambda step: model(**rows[step % 3]).loss.backward(), steps)
    return ours, [by_samples(order) for order in range(5 if dtype == torch.float32 else 1)]


def test_thirty_steps_over_rows_are_thirty_steps_over_samples_in_fp64():
    with true_float64():
        ours, [expected] = trained(torch.float64)
    assert relative_l2(ours, expected) <= 1e-8


def test_thirty_steps_in_fp32_drift_no_more_than_the_order_of_samples_makes_them():
    ours, orders = trained(torch.float32)
    drift = max(relative_l2(a, b) for i, a in enumerate(orders) for b in orders[:i])
    assert relative_l2(ours, orders[0]) <= 2 * drift


# ---- weights


def test_the_loss_is_the_weighted_mean_over_targets():
    model, [layout] = made("Qwen3").double(), layouts("paper")
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(len(layout.target_ids), generator=generator)
    weighted = fr.Layout(**{**vars(layout), "target_weight": weight})
    with true_float64():
        logprobs = torch.cat(oracle.n_samples(model, fr.unmerge(layout)).logprobs)
        loss, _, _ = single_pass(fr.patch(model), fr.collate([weighted]))
        total = model(**fr.collate([weighted]), num_items_in_batch=torch.tensor(7.0)).loss
    expected = -(weight.double() * logprobs).sum()
    torch.testing.assert_close(loss, expected / weight.double().sum(), rtol=1e-9, atol=0)
    torch.testing.assert_close(total.detach(), expected / 7, rtol=1e-9, atol=0)


def test_every_turn_weighing_the_same_is_the_mean_of_the_samples_means():
    model, [layout] = made("Llama").double(), layouts("paper")
    sizes = layout.target_turn.bincount()
    weighted = fr.Layout(**{**vars(layout), "target_weight": 1 / sizes[layout.target_turn].float()})
    with true_float64():
        parts = [oracle.n_samples(model, [sample]) for sample in fr.unmerge(layout)]
        _, _, gradients = single_pass(fr.patch(model), fr.collate([weighted]))
    expected = [
        sum(part.gradients[name] / part.n_targets for part in parts) / len(parts) for name in parts[0].gradients
    ]
    assert relative_l2(gradients.values(), expected) <= 1e-6  # the weights themselves are fp32


def test_targets_that_the_user_ignores_do_not_count():
    model, [layout] = made("Qwen3").double(), layouts("paper")
    row = fr.collate([layout])
    row["labels"] = row["shift_labels"] = row["labels"].clone()
    row["labels"][0, 3:10] = -100
    with true_float64():
        logprobs = torch.cat(oracle.n_samples(model, fr.unmerge(layout)).logprobs)
        loss = fr.patch(model)(**row).loss.detach()
    expected = -torch.cat([logprobs[:3], logprobs[10:]]).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match="labels and shift_labels differ; shift_labels is what counts"):
        model(**{**row, "labels": fr.collate([layout])["labels"]})


@pytest.mark.parametrize("backend", ["segments", "dense"])
def test_an_empty_row_adds_exactly_nothing(backend):
    for family in FAMILIES:
        model = fr.patch(made(family), backend)
        for total in ({}, {"num_items_in_batch": torch.tensor(5)}):
            loss, _, gradients = single_pass(model, fr.collate([], 128) | total)
            assert float(loss) == 0
            assert gradients
            assert all((gradient == 0).all() for gradient in gradients.values())


def test_weights_that_the_loss_cannot_take_are_refused():
    [layout] = layouts("paper")
    half = fr.Layout(**{**vars(layout), "target_weight": layout.target_weight / 2})
    model = made("Qwen3")
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: torch.nn.functional.cross_entropy(
        logits[0], kwargs["shift_labels"][0]
    )
    fr.patch(model)
    model(**fr.collate([layout]))
    with pytest.raises(ValueError, match="target weights other than 1, and the loss function was replaced"):
        model(**fr.collate([half]))

    model = fr.patch(made("Qwen3"))
    original = model.forward
    model.forward = lambda *args, **kwargs: original(*args, **kwargs)
    model(**fr.collate([layout]))
    with pytest.raises(ValueError, match="target weights other than 1, and the model's forward was replaced"):
        model(**fr.collate([half]))


# ---- ordinary batches


def ordinary(model):
    """Outputs of everything that is not a row: logits and generated tokens."""
    ids = torch.randint(1, 97, (2, 30), generator=torch.Generator().manual_seed(0))
    padded = torch.ones_like(ids)
    padded[0, :7] = 0
    positions = torch.cat([torch.arange(12), torch.arange(18)])[None]
    square = torch.ones(30, 30, dtype=torch.bool).tril()[None, None]
    if model.config._attn_implementation.endswith("eager"):
        square = torch.zeros(1, 1, 30, 30).masked_fill(~square, torch.finfo(torch.float32).min)
    with torch.no_grad():
        found = {
            "plain": model(input_ids=ids).logits,
            "left-padded": model(input_ids=ids, attention_mask=padded).logits,
            "right-padded": model(input_ids=ids, attention_mask=padded.flip(1)).logits,
            "packed": model(input_ids=ids[:1], position_ids=positions, use_cache=False).logits,
            "4-D mask": model(input_ids=ids, attention_mask=square, use_cache=False).logits,
            "loss": model(input_ids=ids, labels=ids).loss,
        }
        for name, options in {
            "greedy": {},
            "beam": {"num_beams": 3},
            "no cache": {"use_cache": False},
            "static cache": {"cache_implementation": "static"},
        }.items():
            found[name] = model.generate(
                input_ids=ids, attention_mask=padded, max_new_tokens=8, do_sample=False, pad_token_id=0, **options
            )
    return found


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2"])
def test_ordinary_batches_are_the_same_to_the_last_bit_before_during_and_after(family, implementation):
    if (family, implementation) in UNSUPPORTED:
        pytest.skip("transformers itself refuses this pair")
    model = made(family, attn_implementation=implementation).eval()
    model.generation_config.eos_token_id = None
    before = ordinary(model)
    fr.patch(model)
    model(**fr.collate(layouts("paper")))
    during = ordinary(model)
    after = ordinary(fr.unpatch(model))
    for name, expected in before.items():
        assert torch.equal(during[name], expected), name
        assert torch.equal(after[name], expected), name


@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")  # transformers' own call
def test_an_ordinary_forward_under_flex_attention_is_the_same():
    torch._dynamo.reset()  # what other tests compiled makes shapes dynamic, which flex on CPU does not compile
    model = made("Llama", attn_implementation="flex_attention").eval()
    ids = torch.randint(1, 97, (1, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        assert torch.equal(fr.patch(model)(input_ids=ids, use_cache=False).logits, before)


def state(model):
    """Everything about a model that patching might leave behind."""
    return {
        "config": model.config.to_dict(),
        "implementations": [
            m.config._attn_implementation for m in model.modules() if getattr(m, "config", None) is not None
        ],
        "hooks": [{key: len(value) for key, value in vars(m).items() if "hooks" in key} for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "loss": model.loss_function,
        "forward": model.forward.__func__,
    }


def test_unpatch_restores_everything_and_patching_twice_is_no_harm():
    model = made("Qwen3")
    before = state(model)
    assert fr.patch(model) is model
    once = state(model)
    assert fr.patch(model, "dense") is model
    assert [{**s, "loss": None} for s in (state(model),)] == [{**once, "loss": None}]
    assert fr.unpatch(model) is model
    assert state(model) == before
    assert fr.unpatch(model) is model
    model.loss_function = own = lambda *args, **kwargs: None
    assert fr.unpatch(fr.patch(model)).loss_function is own


def test_unpatch_keeps_an_implementation_chosen_meanwhile():
    model = fr.patch(made("Llama"))
    model.set_attn_implementation("eager")
    assert fr.unpatch(model).config._attn_implementation == "eager"


def test_a_pickled_patched_model_works_in_a_new_process(tmp_path):
    torch.save(fr.patch(made("Llama")), tmp_path / "model.pt")
    torch.save(fr.collate(layouts("paper")), tmp_path / "row.pt")
    code = (
        "import torch, sys\n"
        "model, row = (torch.load(f'{sys.argv[1]}/{name}.pt', weights_only=False) for name in ('model', 'row'))\n"
        "print(float(model(**row).loss.detach()), model(input_ids=row['input_ids']).logits.shape)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    expected = float(fr.patch(made("Llama"))(**fr.collate(layouts("paper"))).loss.detach())
    assert float(done.stdout.split()[0]) == pytest.approx(expected, rel=1e-5)


def test_models_that_share_a_config_are_patched_and_unpatched_one_by_one():
    first = made("Qwen3")
    second = transformers.Qwen3ForCausalLM(first.config)
    row = fr.collate(layouts("paper"))
    expected = fr.patch(first)(**row).loss
    fr.patch(second, "dense")(**row)
    fr.unpatch(second)
    torch.testing.assert_close(first(**row).loss, expected)
    fr.patch(second)
    fr.unpatch(first)
    second(**row)
    fr.unpatch(second)
    assert first.config._attn_implementation == "sdpa"


# ---- what is refused


def test_a_softcap_that_sdpa_leaves_out_is_refused():
    """Below transformers 5.21, Gemma 2 has sdpa by default, and its samples no softcap."""
    model = made("Gemma2")
    model.config._attn_implementation_internal = "sdpa"
    with pytest.raises(ValueError, match=r'leaves out the softcap of its scores; load it with attn_impl\w+="eager"'):
        fr.patch(model)
    model.config._attn_implementation_internal = "eager"
    assert fr.patch(model) is model


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("with_labels", [True, False])
def test_a_row_given_to_a_model_that_is_not_patched_raises(family, implementation, with_labels):
    if (family, implementation) in UNSUPPORTED:
        pytest.skip("transformers itself refuses this pair")
    model = made(family, attn_implementation=implementation)
    row = fr.collate(layouts("paper"))
    if not with_labels:
        del row["labels"], row["shift_labels"]
    for given in (row, pickled_by_a_loader(row)):
        with (
            torch.set_grad_enabled(implementation != "flex_attention"),  # which has no backward on CPUs
            pytest.raises(RuntimeError, match=r"this model is not patched, .*: call fr\.patch\(model\) first"),
        ):
            model(**given)


def pickled_by_a_loader(row):
    """As a worker process hands it over."""
    return pickle.loads(ForkingPickler.dumps(row))


def test_a_recurrent_model_raises_through_the_size_of_the_loss():
    """It never looks at the mask; only with labels does it notice that T is not S."""
    config = transformers.MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises((RuntimeError, ValueError)):
        transformers.MambaForCausalLM(config)(**fr.collate(layouts("paper")))


@pytest.mark.parametrize(
    "missing", sorted(set(fr.collate([])) - {"labels", "shift_labels", "attention_mask", "input_ids"})
)
def test_a_row_without_one_of_its_keys_is_refused(missing):
    row = fr.collate(layouts("paper"))
    del row[missing]
    with pytest.raises(ValueError, match=f"row: the keys {missing} are missing; pass all that fr.collate made"):
        fr.patch(made("Qwen3"))(**row)


def test_a_row_whose_own_keys_a_trainer_removed_is_refused():
    kept = ("input_ids", "position_ids", "labels", "attention_mask")
    row = {key: value for key, value in fr.collate(layouts("paper")).items() if key in kept}
    with pytest.raises(ValueError, match="with a Trainer: remove_unused_columns=False"):
        fr.patch(made("Qwen3"))(**row)


def test_what_is_not_one_whole_row_is_refused():
    model, row = fr.patch(made("Qwen3")), fr.collate(layouts("paper"))
    two = {key: value.expand(2, *value.shape[1:]) for key, value in row.items()}
    with pytest.raises(
        ValueError, match=r"expected one row, \[1, S\], found until of shape \[2, 128\]; .* batch size of 1"
    ):
        model(**two)
    with pytest.raises(ValueError, match=r"expected turn of shape \[1, 128\] like the tokens, found \[1, 64\]"):
        model(**{**row, "turn": row["turn"][:, :64]})
    with pytest.raises(ValueError, match=r"expected until of integers, found torch\.float32"):
        model(**{**row, "until": row["until"].float()})
    with pytest.raises(ValueError, match="turn is on meta and the model on cpu; move the row"):
        model(**{**row, "turn": row["turn"].to("meta")})
    with pytest.raises(ValueError, match="until does not end behind every token"):
        model(**{**row, "until": torch.zeros_like(row["until"])})
    with pytest.raises(ValueError, match="an attention_mask of its own"):
        model(**{**row, "attention_mask": torch.ones(1, 128)})
    with pytest.raises(ValueError, match=r"expected labels for its \d+ targets, found labels of shape \[1, 8\]"):
        model(**{**row, "labels": row["labels"][:, :8], "shift_labels": row["labels"][:, :8]})
    cache = transformers.DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="past_key_values; a row is whole in itself"):
        model(**row, past_key_values=cache)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("loss", ["model", "chunked"])
def test_tokens_that_the_model_has_not_are_told_at_the_door(family, loss):
    """Wherever they stand: in the prompt, within a target, or last of all, as a stop token that was added."""
    model = fr.patch(made(family), loss=loss)
    known = model.get_input_embeddings().num_embeddings
    assert model(**fr.collate([fr.lay_out([fr.Sample([known - 1, 2], [known - 1])])])).loss > 0
    for sample in (fr.Sample([known, 2], [3, 4]), fr.Sample([1, 2], [known + 5, 4]), fr.Sample([1, 2], [3, known])):
        with pytest.raises(ValueError, match=f"row: it has tokens from 0 to .* the model's vocabulary has {known}: "):
            model(**fr.collate([fr.lay_out([sample])]))
    row = fr.collate(layouts("paper"))
    with pytest.raises(ValueError, match="row: it has tokens from -1 to "):
        model(**{**row, "input_ids": row["input_ids"] - 1})


def test_the_configs_default_cache_and_a_dropped_mask_are_no_error():
    model, row = fr.patch(made("Qwen3")), fr.collate(layouts("paper"))
    assert model.config.use_cache
    expected = model(**row)
    assert expected.past_key_values is None
    del row["attention_mask"]
    assert torch.equal(model(**row).loss, expected.loss)


def test_embeddings_in_place_of_ids_are_the_same_row():
    model, row = fr.patch(made("Qwen3")), fr.collate(layouts("paper"))
    expected = model(**row).loss
    embeds = model.get_input_embeddings()(row.pop("input_ids"))
    torch.testing.assert_close(model(**row, inputs_embeds=embeds).loss, expected)


OWN_ATTENTION = {
    "Bloom": {"n_layer": 1, "n_head": 2, "hidden_size": 16},
    "Falcon": {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16},
    "GPTJ": {"n_layer": 1, "n_head": 2, "n_embd": 16, "rotary_dim": 4},
}
RECURRENT = {"Mamba": {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}}


@pytest.mark.parametrize("family", [*OWN_ATTENTION, *RECURRENT])
def test_models_that_cannot_be_exact_are_refused_by_name(family):
    config = getattr(transformers, f"{family}Config")(vocab_size=97, **OWN_ATTENTION.get(family, RECURRENT.get(family)))
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    reason = "it has attention code of its own" if family in OWN_ATTENTION else "it has recurrent layers"
    with pytest.raises(ValueError, match=f"patch: {family}ForCausalLM is refused: {reason}.*; train on the N samples"):
        fr.patch(model)


def test_attention_dropout_is_refused_and_other_dropout_said_once():
    with pytest.raises(ValueError, match=r"attention_dropout is 0\.1.*load it with attention_dropout=0\.0"):
        fr.patch(tiny("Llama", attention_dropout=0.1))
    model = fr.patch(tiny("Phi3", resid_pdrop=0.1, pad_token_id=0, eos_token_id=0, bos_token_id=0))
    row = fr.collate(layouts("paper"))
    with pytest.warns(UserWarning, match="randomness is on in .* one draw is shared by all samples"):
        model(**row)
    model(**row)  # warnings are errors here: the second time it is silent


def test_router_jitter_is_said_once():
    model = fr.patch(tiny("Mixtral", router_jitter_noise=0.1, num_local_experts=4)).train()
    with pytest.warns(UserWarning, match=r"config\.router_jitter_noise = 0\.1.* one draw is shared"):
        model(**fr.collate(layouts("paper")))


def test_noise_that_goes_by_the_rows_length_is_refused_in_training():
    """As transformers' Trainer puts it into the embeddings."""
    model, row = fr.patch(tiny("Qwen3")), fr.collate(layouts("paper"))
    model.get_input_embeddings().neftune_noise_alpha = 5.0
    model.train()
    with pytest.raises(ValueError, match="row: neftune_noise_alpha scales its noise by the length"):
        model(**row)
    model.eval()(**row)


@pytest.mark.parametrize("family", ["Qwen3", "Gemma2"])
def test_a_second_backward_raises(family):
    """The fused and the tiled route alike; dense has one."""
    model, row = fr.patch(made(family), "segments"), fr.collate(layouts("paper"))
    with pytest.raises(RuntimeError, match=r'"segments" has no second backward: use backend="dense"'):
        torch.autograd.grad(model(**row).loss, list(model.parameters()), create_graph=True)


def test_what_is_no_model_is_refused():
    for thing in (torch.nn.Linear(2, 2), "gpt2", made("Llama").model):
        with pytest.raises(
            ValueError, match=r"patch: expected a transformers model with an LM head \(\.\.\.ForCausalLM\)"
        ):
            fr.patch(thing)
    with pytest.raises(ValueError, match="backend: expected one of 'auto', 'flex', 'segments', 'dense', found 'flash'"):
        fr.patch(made("Llama"), backend="flash")
    with pytest.raises(ValueError, match="mask: expected one of 'interval', 'turn_role', found 'causal'"):
        fr.patch(made("Llama"), mask="causal")


def test_router_losses_are_refused():
    model = fr.patch(made("Qwen3Moe"))
    with pytest.raises(ValueError, match="output_router_logits is on"):
        model(**fr.collate(layouts("paper")), output_router_logits=True)
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits is on"):
        model(**fr.collate(layouts("paper")))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_reads_the_longest_position_is_refused_only_where_samples_straddle_its_threshold(kind):
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 40}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    config = {"rope_parameters": rope, "max_position_embeddings": 40 if kind == "dynamic" else 80}
    short, long = (
        [fr.lay_out_turns(random_turns([(5, 6, 7), (5, 6, 7)]))],
        [fr.lay_out_turns(random_turns([(50, 6, 7)] * 2))],
    )
    assert max(errors(tiny("Llama", **config).double(), short, backend="segments").values()) <= EXACT
    with pytest.raises(ValueError, match=f"RoPE .{kind}. changes with the longest of a batch above 40"):
        fr.patch(tiny("Llama", **config))(**fr.collate([*short, *long]))
    if kind == "longrope":
        assert max(errors(tiny("Llama", **config).double(), long, backend="segments").values()) <= EXACT


def test_dynamic_rope_that_has_seen_a_longer_batch_takes_only_what_it_forgets_that_for():
    """At its threshold the angles of the longer batch stay, and would be those of all samples of a row."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = tiny("Llama", rope_parameters=rope, max_position_embeddings=16).double()
    for longest in (14, 15, 16, 17):
        samples = [fr.Sample([1] * (longest - 6), [1, 2, 3, 4, 5, 6]), fr.Sample([1] * 8, [7, 7, 8, 9])]
        row = fr.collate([fr.lay_out(samples)])
        with true_float64():
            expected = oracle.n_samples(model, samples, gradients=False)
            model(input_ids=torch.arange(39)[None])
            fr.patch(model)
            if longest < 16:
                assert float(model(**row).loss.detach()) * 10 == pytest.approx(expected.loss_sum, rel=EXACT)
            else:
                with pytest.raises(ValueError, match=r"stays so at 16: .*; it takes samples of fewer than 16 tokens"):
                    model(**row)
            fr.unpatch(model)


def test_a_model_may_be_patched_without_chunks_and_without_evidence():
    """Below `fr.patch`, which asks the list of classes and the self-test, stands whatever asks nobody."""
    model, row = made("Qwen3"), fr.collate(layouts("paper"))
    apply_patch(model, unchunked="its chunks are off")
    expected = model(**row).loss
    for patched in (model, copy.deepcopy(model)):
        with pytest.raises(
            ValueError, match="token_logprobs: Qwen3ForCausalLM takes no chunked loss: its chunks are off"
        ):
            fr.token_logprobs(patched, row)
    with pytest.raises(ValueError, match='patch: loss="chunked": Qwen3ForCausalLM takes no chunked loss: its chunks'):
        apply_patch(model, loss="chunked", unchunked="its chunks are off")
    assert torch.equal(apply_patch(model)(**row).loss, expected)  # nobody is asked
    assert len(fr.token_logprobs(model, row)) == row["labels"].shape[1]


def test_what_evidence_speaks_against_is_refused_and_left_unpatched(monkeypatch):
    model = fr.patch(made("Qwen3"))
    against = Evidence("refused", ("not this one", "take another"), "")
    monkeypatch.setattr("flexreason.patching.evidence_of_model", lambda root, backend: against)
    with pytest.raises(ValueError, match="patch: Qwen3ForCausalLM is refused: not this one; take another"):
        fr.patch(model)
    assert find_patch(model) is None


# ---- what it costs


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_decoder_keeps_no_more_for_backward_a_token_than_a_plain_pass(checkpointing):
    model = tiny("Qwen3", hidden_size=64, head_dim=16)
    layout = fr.lay_out_turns(random_turns([(64, 120, 64)] * 6))
    longest = max(fr.unmerge(layout), key=lambda s: len(s.prompt_ids) + len(s.target_ids))
    ids = torch.tensor([longest.prompt_ids + longest.target_ids])
    if checkpointing:
        checkpoint(model)
    model.train()
    skip = list(model.parameters())
    plain = saved_bytes(lambda: model.model(input_ids=ids, use_cache=False).last_hidden_state, skip)
    row = fr.collate([layout])
    fr.patch(model, "segments")
    ours = saved_bytes(lambda: model.model(**{k: v for k, v in row.items() if "labels" not in k}), skip)
    assert ours / row["input_ids"].shape[1] <= 1.1 * plain / ids.shape[1]


def test_no_tensor_of_s_by_s_is_made_anywhere_in_a_step():
    model = tiny("Qwen3", hidden_size=8, num_attention_heads=1, num_key_value_heads=1, intermediate_size=8)
    row = fr.collate([fr.lay_out_turns(random_turns([(64, 120, 64)] * 6))])

    def largest(backend):
        with Largest() as seen:
            fr.patch(model, backend)(**row).loss.backward()
        return seen.elements

    length = row["input_ids"].shape[1]
    assert largest("segments") <= length * segments.TILE  # the masks of the diagonal tiles, all together
    assert largest("dense") >= length**2


def test_the_head_sees_targets_only():
    model, row = fr.patch(made("Qwen3")), fr.collate(layouts("packed"))
    assert model(**row).logits.shape == (1, row["labels"].shape[1], 97)


def test_a_prefix_shared_by_many_branches_is_one_rectangle_for_all(monkeypatch):
    """What makes it fast is in use: fewer pieces than branches times what they see."""
    calls = []
    monkeypatch.setattr(segments, "cover", lambda *args: calls.append(cover.cover(*args)) or calls[-1])
    fr.patch(made("Qwen3"))(**fr.collate([fr.lay_out_turns(random_turns([(60, 30, 20)] * 20))]))
    assert len(calls) == 1  # one work list for both layers


def test_attention_that_goes_past_us_raises():
    """A part replaced after patching, which patch could not see."""
    model, row = fr.patch(tiny("Qwen3")), fr.collate([fr.lay_out_turns(random_turns([(5, 7, 3), (4, 6, 2)]))])

    def own_attention(hidden_states, **kwargs):
        return hidden_states, None

    for layer in model.model.layers:
        layer.self_attn.forward = own_attention
    with pytest.raises(ValueError, match="none of the attention in Qwen3Model came to flexreason"):
        model(**row)


@pytest.mark.parametrize(("n", "taken"), [(39, True), (40, False)])
def test_dynamic_rope_that_has_grown_gives_samples_of_just_the_original_length_other_angles(n, taken):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = made("Llama", rope_parameters=rope, max_position_embeddings=40).double()
    layout = fr.lay_out_turns(random_turns([(5, n - 7, 2)]))
    with true_float64():
        expected = oracle.n_samples(model, samples_of([layout]), gradients=False).loss_sum / len(layout.target_ids)
        model(input_ids=torch.arange(60)[None])  # as generation does, or an ordinary batch
        apply_patch(model)
        if taken:
            assert float(model(**fr.collate([layout])).loss.detach()) == pytest.approx(expected, rel=EXACT)
        else:
            with pytest.raises(ValueError, match="changes with the longest of a batch above 40"):
                model(**fr.collate([layout]))


@pytest.mark.parametrize("length", [8, 128, 136, 384])
def test_what_attention_gives_can_be_viewed_whatever_the_rows_length(length):
    """Afmoe views it as one line a token, as it views what stock attention gives."""
    model = apply_patch(build(shrink(default_config(transformers.AfmoeForCausalLM)), transformers.AfmoeForCausalLM))
    layout = fr.lay_out([fr.Sample([1, 2], [3])])
    expected = model(**fr.collate([layout], block_size=8)).loss
    torch.testing.assert_close(model(**fr.collate([layout], length, block_size=8)).loss, expected)
