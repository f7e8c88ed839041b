"""Recurrent layers through a tree: plans and beginnings by what a tree is, and whole models against the N samples."""

import copy
import importlib.metadata
import pickle
from statistics import median

import peft
import pytest
import torch
import transformers
from hypothesis import given
from torch import nn

import flexreason as fr
import scans
from exact import EXACT, errors, samples_of
from flexreason.attention.registry import TREE, TreeRow
from flexreason.data.figures import shape_of
from flexreason.model import refuse
from flexreason.proof import oracle, selftest
from flexreason.proof.compare import by_samples, compare, one_pass
from flexreason.proof.float64 import in_float64, relative_l2, saved_bytes, true_float64
from flexreason.proof.tiny import build, default_config, shrink
from flexreason.recurrent import entries, kernels
from flexreason.recurrent import scans as ours
from flexreason.recurrent.convolution import beginnings, convolve
from flexreason.recurrent.decay import decayed
from flexreason.recurrent.plan import best_cuts, plan_of
from flexreason.tree.layout import Layout
from models import checkpoint
from strategies import random_tree, random_turns, samples, turns
from training import trainer_arguments

HYBRIDS = {  # class, without ForCausalLM: its recurrent layers
    "Lfm2": "short convolutions of width 3",
    "Lfm2Moe": "short convolutions, experts",
    "Lfm3": "short convolutions of width 7, which no decorator wraps",
    "Qwen3Next": "gated delta rule",
    "Qwen3_5": "gated delta rule",
    "Qwen3_5Moe": "gated delta rule, experts",
    "OlmoHybrid": "gated delta rule, three convolutions",
    "KimiLinear": "delta rule with a gate a channel",
    "BailingHybrid": "delta rule with a gate a channel",
    "NemotronH": "Mamba-2, dt limited from below",
    "Bamba": "Mamba-2",
    "FalconH1": "Mamba-2 beside attention in every layer",
    "GraniteMoeHybrid": "Mamba-2, experts",
    "Zamba2": "Mamba-2, attention that layers share",
    "Mamba2": "Mamba-2 alone, whose head hands on no keywords",
    "MiniMax": "lightning attention, in the layer's own forward",
    "Zaya": "two convolutions and a delayed value, in a projection that is handed no keywords",
}
ONE_EACH = ["Lfm2", "Qwen3_5", "KimiLinear", "NemotronH", "Mamba2", "MiniMax", "Zaya"]
"""A family of each kind."""


def class_of(name):
    """A family's class, where the installed transformers has it."""
    try:
        return getattr(transformers, f"{name}ForCausalLM")
    except AttributeError:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")


def made(name, seed=0):
    cls = class_of(name)
    return in_float64(build(shrink(default_config(cls)), cls, seed))


def one_token():
    """A document of one token."""
    numbers = {"input_ids": 5, "position_ids": 0, "until": 1, "turn": 0, "role": 1}
    numbers |= {"target_source": 0, "target_ids": 7, "target_turn": 0, "target_weight": 1}
    dtypes = dict.fromkeys(("until", "turn", "role"), torch.int32) | {"target_weight": torch.float32}
    return Layout(**{name: torch.tensor([n], dtype=dtypes.get(name, torch.int64)) for name, n in numbers.items()})


def twigs():
    """Branches of one token and of more, at odd and even places of a short stem; and roots that differ."""
    stem = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3, 3, 8, 3, 2, 7]
    short = [fr.Sample(stem[:k], [40 + k]) for k in (1, 2, 3, 4, 7, 29)]
    longer = [fr.Sample(stem[:k], [50 + k, *stem[:n]]) for k, n in ((1, 1), (5, 9), (6, 2), (23, 20), (30, 30))]
    return fr.lay_out([*short, *longer, fr.Sample([60], [61]), fr.Sample([62, 63], [64, *stem])])


LAYOUTS = {
    "paper": lambda: [fr.lay_out_turns(random_turns([(11, 20, 5), (3, 0, 5), (20, 30, 9)]))],
    "long": lambda: [fr.lay_out_turns(random_turns([(61, 250, 67), (64, 1, 1), (1, 128, 64), (5, 0, 3), (70, 33, 2)]))],
    "general": lambda: [fr.lay_out(random_tree())],
    "twigs": lambda: [twigs()],
    "packed": lambda: [
        one_token(),
        twigs(),
        one_token(),
        fr.lay_out_turns(random_turns([(2, 3, 1), (1, 0, 1), (30, 17, 40)], seed=3)),
        fr.lay_out([fr.Sample([1], [2])]),
        fr.lay_out(random_tree(seed=4)),
    ],
}


def tree_of(layouts, length=None):
    row = fr.collate(layouts, length)
    return TreeRow(row, row["target_source"], "segments", "interval")


# ---- the rule


def parents(tree):
    """The parent of every token from `until` alone: the last token before it whose subtree holds it, or -1."""
    until = tree.row["until"][0].tolist()
    return [max((kv for kv in range(q) if until[kv] > q), default=-1) for q in range(len(until))]


def most_pieces(made):
    """The most pieces of a chain, of each depth, in all."""
    depth, most = [], {}
    for chain in made.chains:
        depth.append(depth[chain.parent] + 1 if chain.parent >= 0 else 0)
        own = sum(chain.start <= piece.start < chain.stop for piece in made.pieces)
        most[depth[-1]] = max(most.get(depth[-1], 0), own)
    return sum(most.values())


def holds(tree):
    """A plan computes every token once, behind its parent, in as many calls as it says."""
    parent, made, n_tokens = parents(tree), plan_of(tree), int((tree.row["document"] >= 0).sum())
    order, back = made.order.tolist(), made.back.tolist()
    assert [order[place] for place in back[:n_tokens]] == list(range(n_tokens))
    assert back[n_tokens:] == [len(order)] * (len(back) - n_tokens)
    done = set()
    for call in made.calls:
        assert {made.pieces[number].before for number in call.pieces} <= done | {None}
        assert call.before == tuple(b for n in call.pieces if (b := made.pieces[n].before) is not None)
        assert len(call.before) in (0, len(call.pieces))
        done |= set(call.kept)
        assert call.length == max(len(made.pieces[number]) for number in call.pieces)
        if call.real is not None:
            assert call.real.sum(1).tolist() == [len(made.pieces[number]) for number in call.pieces]
    assert len(made.calls) <= most_pieces(made)
    for piece in made.pieces:
        ends_at = -1 if piece.before is None else made.pieces[piece.before].stop - 1
        assert parent[piece.start] == ends_at
        assert all(parent[token] == token - 1 for token in range(piece.start + 1, piece.stop))
    assert sorted(t for p in made.pieces for t in range(p.start, p.stop)) == list(range(n_tokens))
    return made


@given(turns(), samples())
def test_every_token_is_computed_once_and_behind_its_parent(conversation, any_samples):
    holds(tree_of([fr.lay_out_turns(conversation), fr.lay_out(any_samples)]))


@pytest.mark.parametrize("name", LAYOUTS)
def test_plans_of_what_is_tested_below(name):
    holds(tree_of(LAYOUTS[name]()))


def test_branches_that_leave_anywhere_are_one_call_a_depth():
    """Eight pieces of the first chain, which the last turn ends, and seven branches of one length at once."""
    made = holds(tree_of([fr.lay_out_turns(random_turns([(64, 256, 64)] * 8))]))
    assert len(made.calls) == 9
    assert [len(call.pieces) for call in made.calls] == [1] * 8 + [7]
    assert all(call.real is None for call in made.calls)


def test_short_branches_do_not_wait_for_a_long_one():
    shape = [(10, 5, 10)] * 30 + [(10, 2000, 10)]
    made = holds(tree_of([fr.lay_out_turns(random_turns(shape))]))
    n_tokens = sum(len(piece) for piece in made.pieces)
    assert len(made.order) < 1.1 * n_tokens
    assert len(made.calls) <= 31 + 2


def test_rows_of_a_call_are_cut_where_that_saves_more_than_a_call():
    assert best_cuts([100]) == [100]
    assert best_cuts([100, 101]) == [101]
    assert best_cuts([10] * 30 + [2000]) == [16, 2000]
    assert len(best_cuts(list(range(1, 5000, 7)))) < 64


def test_chunks_are_as_short_as_pieces():
    made = plan_of(tree_of([fr.lay_out_turns(random_turns([(10, 5, 10)] * 3 + [(64, 256, 64)]))]))
    chunks = {call.length: call.chunk(64, torch.device("cuda")) for call in made.calls}
    assert chunks == {10: 16, 15: 16, 20: 32, 394: 64}
    chunks = {call.length: call.chunk(64, torch.device("cpu")) for call in made.calls}
    assert (chunks[10], chunks[15], chunks[20]) == (16, 16, 20)
    assert all(call.chunk(24, torch.device("cpu")) in (16, 20, 24) for call in made.calls)


# ---- convolutions


def naive_convolution(tree, x, weight):
    parent = parents(tree)
    columns = []
    for token in range(x.shape[2]):
        path = [token]
        while len(path) < weight.shape[-1] and path[-1] >= 0:
            path.append(parent[path[-1]])
        taken = torch.stack([x[0, :, at] if at >= 0 else torch.zeros_like(x[0, :, 0]) for at in path])
        columns.append((taken * weight.flip(1).T[: len(path)]).sum(0))
    return torch.stack(columns, 1)[None]


def plain_convolution(x, weight):
    pad = weight.shape[-1] - 1
    return nn.functional.conv1d(x, weight[:, None], padding=pad, groups=len(weight))[:, :, : x.shape[2]]


@pytest.mark.parametrize("width", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("name", ["paper", "twigs", "packed"])
def test_a_convolution_sees_a_tokens_ancestors(name, width):
    tree = tree_of(LAYOUTS[name]())
    n_tokens = int((tree.row["document"] >= 0).sum())
    x, weight = torch.randn(1, 5, tree.length).double(), torch.randn(5, width).double()
    found = convolve(plain_convolution, tree, x, weight)[:, :, :n_tokens]
    torch.testing.assert_close(found, naive_convolution(tree, x, weight)[:, :, :n_tokens])


def test_only_the_beginnings_of_chains_are_computed_anew():
    tree = tree_of([fr.lay_out_turns(random_turns([(64, 256, 64)] * 8))])
    first = beginnings(plan_of(tree), 3)
    assert first.stored.shape == (7, 6)
    assert len(first.token) == 7 * 3


def test_behind_a_token_that_forgets_much_decays_keep_their_digits():
    """In single precision, against the state written out in double."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 256, 1, 8, dtype=torch.float64)
    v = torch.randn(1, 256, 1, 2, 8, dtype=torch.float64)
    decay = -0.01 * torch.rand(1, 256, 1, 2, dtype=torch.float64)
    decay[:, ::50] = -2000
    state, expected = torch.zeros(1, 1, 8, 2, 8, dtype=torch.float64), []
    for token in range(256):
        written = torch.einsum("bgd,bgre->bgdre", k[:, token], v[:, token])
        state = state * decay[:, token, :, None, :, None].exp() + written
        expected.append(torch.einsum("bgd,bgdre->bgre", q[:, token], state))
    given = (x.float() for x in (q, k, v, decay))
    found, last = decayed(*given, None, chunk=256)
    assert relative_l2([found], [torch.stack(expected, 1)]) < 2e-6
    assert relative_l2([last], [state]) < 2e-6


# ---- whole models


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids_are_exact(name):
    cls = class_of(name)
    found = selftest.check(default_config(cls), cls)
    assert found.verdict == "exact", found
    assert max(found.loss, found.logprobs, found.gradients) <= EXACT
    assert found.chunked, found.chunked_reason


@pytest.mark.parametrize("layouts", LAYOUTS)
@pytest.mark.parametrize("name", ONE_EACH)
def test_hybrids_are_exact_on_any_tree(name, layouts):
    assert max(errors(made(name), LAYOUTS[layouts]()).values()) <= EXACT


@pytest.mark.parametrize("name", ONE_EACH)
def test_patch_takes_hybrids_and_unpatch_gives_them_back(name):
    model, row = made(name).float(), fr.collate(LAYOUTS["packed"]())
    ids = torch.arange(40)[None]
    before = model(input_ids=ids).logits
    patched = fr.patch(model)
    assert torch.equal(patched(input_ids=ids).logits, before)
    patched(**row).loss.backward()
    assert torch.equal(fr.unpatch(patched)(input_ids=ids).logits, before)


@pytest.mark.parametrize("name", ONE_EACH)
def test_ordinary_batches_and_generation_are_unchanged_to_the_bit(name):
    model = made(name).float()
    ids, mask = torch.randint(0, 80, (2, 24), generator=torch.Generator().manual_seed(0)), torch.ones(2, 24).long()
    mask[0, :9] = 0

    def all_of_it():
        model.zero_grad()
        out = model.train()(input_ids=ids, attention_mask=mask, labels=ids)
        out.loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        written = model.eval().generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        return [out.logits.detach(), *gradients, written]

    before = all_of_it()
    fr.patch(model)
    assert all(torch.equal(a, b) for a, b in zip(before, all_of_it(), strict=True))
    model(**fr.collate(LAYOUTS["paper"]())).loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(before, all_of_it(), strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ONE_EACH)
def test_checkpointing_changes_nothing(name, use_reentrant):
    row = fr.collate(LAYOUTS["packed"]())
    model = fr.patch(made(name)).train()
    model(**row).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    checkpoint(model, use_reentrant)
    if use_reentrant:
        model.enable_input_require_grads()
    model(**row).loss.backward()
    for gradient, p in zip(expected, model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, gradient)


@pytest.mark.parametrize("name", ONE_EACH)
def test_an_empty_row_adds_exactly_nothing(name):
    model = fr.patch(made(name).float())
    loss = model(**fr.collate([])).loss
    loss.backward()
    assert loss == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ONE_EACH)
def test_appending_a_turn_and_padding_change_no_earlier_log_probability(name):
    model, conversation = fr.patch(made(name)), random_turns([(11, 20, 5), (3, 0, 5), (20, 30, 9)])
    with torch.no_grad():
        few = fr.collate([fr.lay_out_turns(conversation[:2])])
        many = fr.collate([fr.lay_out_turns(conversation)], 640)
        earlier = (many["target_turn"][0] < 2) & (many["labels"][0] >= 0)
        real = few["labels"][0] >= 0
        found = fr.token_logprobs(model, many)[earlier]
        torch.testing.assert_close(found, fr.token_logprobs(model, few)[real], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ONE_EACH)
def test_padding_is_computed_by_no_scan_and_influences_nothing(name):
    """Whatever stands in the places of padding."""
    model, row = fr.patch(made(name)), fr.collate([fr.lay_out_turns(random_turns([(5, 6, 7)]))], 256)
    loss = model(**row).loss
    other = row["input_ids"].clone()
    other[row["document"] < 0] = 77
    assert torch.equal(model(**{**row, "input_ids": other}).loss, loss)


# ---- what the model's functions are handed


def test_a_row_comes_to_each_function_once_a_layer():
    model = fr.patch(made("Qwen3_5"))
    seen = []
    for layer in model.modules():
        if entries.names_of(layer):
            layer.register_forward_pre_hook(lambda m, args, kw: seen.append(kw[TREE]), with_kwargs=True)
    model(**fr.collate(LAYOUTS["paper"]()))
    tree = seen[0]
    assert all(other is tree for other in seen)
    assert tree.came == {"causal_conv1d_fn": len(seen), "torch_chunk_gated_delta_rule": len(seen)}


@pytest.mark.parametrize("name", ["Qwen3_5", "NemotronH", "Lfm2"])
def test_a_layer_that_somebody_replaced_is_refused_at_the_first_row(name):
    """As a hub kernel for whole layers does it, or a library that puts its own function in the place of ours."""
    model = fr.patch(made(name).float())
    layer = next(module for module in model.modules() if entries.names_of(module))
    layer.forward = lambda hidden_states, **kwargs: hidden_states
    with pytest.raises(ValueError, match=r"row: of the recurrent layers in .*, 1 did not come to flexreason"):
        model(**fr.collate(LAYOUTS["paper"]()))


def test_the_fused_kernel_is_left_out_for_rows_alone(monkeypatch):
    """On GPUs it is convolution and scan in one: for a row the layer is told that there is none."""
    called = []
    space = vars(transformers.models.nemotron_h.modeling_nemotron_h)
    monkeypatch.setitem(space, "mamba2_split_conv1d_scan_combined", lambda *args, **kwargs: called.append(kwargs))
    model = fr.patch(made("NemotronH").float()).train()  # a class with a function of ours in its file is tested anew
    called.clear()
    model(**fr.collate(LAYOUTS["paper"]()))
    assert not called
    model(input_ids=torch.arange(9)[None], use_cache=False)
    assert called
    assert all(TREE not in kwargs for kwargs in called)


@pytest.mark.parametrize("key", ["past_key_values", "cache_params", "cu_seq_lens_q", "seq_idx"])
@pytest.mark.parametrize("name", ["Qwen3_5", "NemotronH"])
def test_caches_and_lengths_of_sequences_are_refused_with_a_row(name, key):
    model = fr.patch(made(name).float())
    with pytest.raises(ValueError, match=f"row: it came with {key}"):
        model(**fr.collate(LAYOUTS["paper"]()), **{key: torch.zeros(1, dtype=torch.int32)})


@pytest.mark.parametrize("name", [*HYBRIDS, "RecurrentGemma"])
def test_an_unpatched_hybrid_computes_nothing_of_a_row(name):
    model, row = made(name).float(), fr.collate(LAYOUTS["paper"]())
    model.config.use_cache = False  # for a cache RecurrentGemma of transformers 5.17 wants an attention layer
    computed = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_: computed.append(1))
    for given_row in (row, {key: value for key, value in row.items() if "labels" not in key}):
        with pytest.raises((RuntimeError, ValueError), match="not patched"):
            model(**given_row)
    assert not computed


def test_states_are_kept_where_chains_leave_and_nowhere_else():
    made_plan = plan_of(tree_of(LAYOUTS["packed"]()))
    kept = [piece for call in made_plan.calls for piece in call.kept]
    assert sorted(kept) == sorted({piece.before for piece in made_plan.pieces} - {None})


@pytest.mark.parametrize("name", ["Qwen3_5", "NemotronH", "Lfm2", "MiniMax"])
def test_backward_keeps_hardly_more_of_a_row_than_of_a_plain_one(name):
    """Many short turns, whose states are the most that there can be."""
    cls = class_of(name)
    config = shrink(default_config(cls))
    for size in ("linear_key_head_dim", "linear_value_head_dim", "ssm_state_size", "mamba_head_dim", "head_dim"):
        if hasattr(config, size):
            setattr(config, size, 64)
    model, layout = fr.patch(build(config, cls, 0)), fr.lay_out_turns(random_turns([(10, 5, 10)] * 20))
    row = fr.collate([layout], length=len(layout), block_size=1)
    source, labels = row["target_source"][0], row["labels"][0]

    def plain():
        states = model.base_model(input_ids=row["input_ids"], use_cache=False).last_hidden_state[0, source]
        return nn.functional.cross_entropy(model.lm_head(states).float(), labels)

    of_row, of_plain = (saved_bytes(call, model.parameters()) for call in (lambda: model(**row).loss, plain))
    assert of_row <= 1.15 * of_plain, of_row / of_plain


def test_the_oracle_is_the_untouched_function():
    """Samples go through the model's own function with what the model handed it, and nothing of ours."""
    model = fr.patch(made("Qwen3_5"))
    name, calls = "torch_chunk_gated_delta_rule", []
    space = entries.space_of(next(m for m in model.modules() if name in entries.names_of(m)))
    stock = space[name].__wrapped__

    def watched(*args, **kwargs):
        calls.append(kwargs)
        return stock(*args, **kwargs)

    fr.unpatch(model)
    before = oracle.n_samples(model, [fr.Sample([1, 2], [3])])
    try:
        space[name] = watched
        after = oracle.n_samples(model, [fr.Sample([1, 2], [3])])
    finally:
        space[name] = stock
    assert calls
    assert after.loss_sum == before.loss_sum


# ---- what people train with


def test_what_is_left_of_a_patch_compiles_as_a_whole():
    """The functions of layers still look for trees."""
    ids = torch.arange(24).view(2, 12)
    for name in ("Qwen3_5", "FalconH1", "Lfm2"):
        model = fr.unpatch(fr.patch(made(name).float()))
        expected = model(input_ids=ids, use_cache=False).logits
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("name", ["Qwen3_5", "NemotronH"])
def test_lora_adapters_have_the_gradients_of_the_samples(name):
    targets = ["in_proj_qkv", "in_proj_a", "in_proj", "q_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(made(name), config)
    assert max(errors(model, LAYOUTS["packed"]()).values()) <= EXACT


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", ONE_EACH)
def test_a_compiled_hybrid_has_the_gradients_of_the_samples(name):
    """Traced, models hand their layers the empty mask of a row."""
    model, layouts = made(name), LAYOUTS["packed"]()
    row = fr.collate(layouts)
    torch.compiler.reset()
    with true_float64():
        expected = oracle.n_samples(model, samples_of(layouts))
        fr.patch(model).compile(backend="aot_eager")
        found = compare(one_pass(model, row), expected)
    assert max(found.largest().values()) <= EXACT


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ONE_EACH)
def test_in_low_precision_a_row_is_no_further_off_than_the_samples(name, dtype):
    """Errors against fp64 of all log-probabilities, and of all gradients together: the median over 8 seeds."""
    layouts, ratios = LAYOUTS["packed"](), []
    for seed in range(8):
        model = made(name, seed).to(dtype)
        with true_float64():
            exact = oracle.n_samples(in_float64(copy.deepcopy(model)), samples_of(layouts))
        own = compare(by_samples(oracle.n_samples(model, samples_of(layouts))), exact)
        row = compare(one_pass(fr.patch(model), fr.collate(layouts)), exact)
        ratios.append((row.logprobs / own.logprobs, row.gradients / own.gradients))
    assert [median(column) <= 1.5 for column in zip(*ratios, strict=True)] == [True] * 2, ratios


@pytest.mark.parametrize("name", ["Qwen3_5", "NemotronH", "MiniMax"])
def test_verify_says_that_hybrids_are_exact(name):
    report = fr.verify(made(name).float(), [*LAYOUTS["paper"](), *LAYOUTS["twigs"]()])
    assert report.verdict == "exact", report


@pytest.mark.parametrize("name", ["Qwen3_5", "NemotronH", "Lfm2"])
def test_two_steps_of_a_trainer_are_those_of_the_samples(name, tmp_path):
    layouts = [*LAYOUTS["paper"](), *LAYOUTS["general"]()]
    stock = made(name)
    model = fr.patch(copy.deepcopy(stock))
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
    arguments = trainer_arguments(tmp_path, **settings)
    with true_float64():
        rows = [[one] for one in layouts]
        fr.RowTrainer(model=model, args=arguments, train_dataset=rows, data_collator=fr.Collator(256)).train()
        optimizer = torch.optim.SGD(stock.parameters(), lr=arguments.learning_rate)
        for _ in range(2):
            found = oracle.n_samples(stock, samples_of(layouts))
            for name, p in stock.named_parameters():
                p.grad = found.gradients[name] / found.n_targets
            optimizer.step()
    for a, b in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_a_copy_of_a_patched_hybrid_takes_rows_too():
    model, row = fr.patch(made("NemotronH")), fr.collate(LAYOUTS["paper"]())
    expected = model(**row).loss
    assert torch.equal(copy.deepcopy(model)(**row).loss, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(**row).loss, expected)


# ---- kernels


VERSIONS = {
    "old fla": ({"flash-linear-attention": "0.5.3"}, 9, "flash-linear-attention 0.5.3, and before 0.6.0"),
    "no version": ({}, 9, "the package fla, which says no version"),
    "triton on Hopper": ({"flash-linear-attention": "0.6.0", "triton": "3.5.1"}, 9, "triton 3.5.1, whose backward"),
    "triton elsewhere": ({"flash-linear-attention": "0.6.0", "triton": "3.5.1"}, 8, None),
    "later triton": ({"flash-linear-attention": "0.6.1", "triton": "3.8.0"}, 9, None),
}


@pytest.mark.parametrize("which", VERSIONS)
def test_kernels_that_are_known_to_be_wrong_are_refused_by_number(which, monkeypatch):
    installed, capability, says = VERSIONS[which]

    def version(package):
        if package not in installed:
            raise importlib.metadata.PackageNotFoundError(package)
        return installed[package]

    model = made("Qwen3_5").float()
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(kernels.importlib.metadata, "version", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))
    against = refuse.reason_against(model)
    assert (against is None) == (says is None)
    assert says is None or says in against[0]
    assert refuse.reason_against(made("NemotronH").float()) is None


def test_hub_kernels_are_refused_where_layers_are_recurrent():
    model = made("Qwen3_5").float()
    model._use_kernels = True
    with pytest.raises(ValueError, match=r"come from the hub's kernels .*; load it with use_kernels=False"):
        fr.patch(model)


def stands_in(monkeypatch, model, name, kernel):
    """A stand-in of a kernel in the place of a model's function: what it is called with."""
    calls = []

    def watched(*args, **kwargs):
        calls.append(kwargs)
        return kernel(*args, **kwargs)

    layer = next(module for module in model.modules() if name in entries.names_of(module))
    monkeypatch.setitem(entries.space_of(layer), name, watched)
    return calls


@pytest.mark.parametrize("name", ["Qwen3_5", "KimiLinear"])
def test_kernels_of_delta_rules_are_used_through_their_own_arguments(name, monkeypatch):
    """A stand-in is called, and the row is the samples' still."""
    model = made(name)
    function = next(iter({n for m in model.modules() for n in entries.names_of(m)} & kernels.DELTA_RULES))
    calls = stands_in(monkeypatch, model, function, scans.delta_rule)
    assert max(errors(model, LAYOUTS["packed"]()).values()) <= 1e-5  # eps of the norms differ
    begun = [kwargs for kwargs in calls if kwargs.get("initial_state") is not None]
    assert begun
    assert all(kwargs["initial_state"].dim() == 4 for kwargs in begun)
    assert any(kwargs["initial_state"].shape[0] > 1 for kwargs in begun)


@pytest.mark.parametrize("name", ["NemotronH", "Zamba2", "Mamba2"])
def test_kernels_of_mamba2_are_used_through_their_own_arguments(name, monkeypatch):
    """The stand-in does with bias, softplus and limits as the kernel does; a row leaves it none of them."""
    model = made(name)
    calls = stands_in(monkeypatch, model, "mamba2_chunk_scan", scans.mamba2)
    assert max(errors(model, LAYOUTS["packed"]()).values()) <= EXACT
    begun = [kwargs for kwargs in calls if kwargs.get("initial_states") is not None]
    assert any(kwargs["initial_states"].shape[0] > 1 for kwargs in begun)
    assert all(kwargs["initial_states"].dim() == 4 for kwargs in begun)
    of_samples = [kwargs for kwargs in calls if kwargs.get("dt_bias") is not None]
    of_rows = [kwargs for kwargs in calls if kwargs.get("dt_bias") is None]
    assert all(kwargs["dt_softplus"] for kwargs in of_samples)
    assert of_rows
    assert not any(kwargs.keys() & {"dt_softplus", "dt_limit", "seq_idx", "cu_seqlens"} for kwargs in of_rows)


@pytest.mark.parametrize("name", ["NemotronH", "Lfm2"])
def test_kernels_of_convolutions_are_used_without_states(name, monkeypatch):
    model = made(name)
    calls = stands_in(monkeypatch, model, "causal_conv1d_fn", scans.convolution)
    assert max(errors(model, LAYOUTS["packed"]()).values()) <= EXACT
    assert calls
    states = {"seq_idx", "initial_states", "return_final_states"}
    assert not any(kwargs.get(key) is not None for kwargs in calls for key in states)


def drawn(*shapes):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.3, 1.2)])
def test_transformers_mamba2_is_what_its_kernel_is_held_to(limit):
    """Bias, softplus and limits in this order; a state to begin from for each row, and the last one back."""
    stock = transformers.models.nemotron_h.modeling_nemotron_h.mamba2_chunk_scan
    per_token = [(3, 37, 4, 8), (3, 37, 4), (3, 37, 2, 6), (3, 37, 2, 6)]
    of_all = x, dt, B, C, state, A, D, bias = drawn(*per_token, (3, 4, 8, 6), (4,), (4,), (4,))
    given = {"D": D, "dt_bias": bias, "dt_softplus": True, "dt_limit": limit}
    given |= {"initial_states": state, "return_final_states": True}
    with true_float64():
        found = [function(x, dt, -A.exp(), B, C, chunk_size=16, **given) for function in (stock, scans.mamba2)]
    gradients = [torch.autograd.grad(sum((y * y).sum() for y in out), of_all) for out in found]
    for a, b in zip((*found[0], *gradients[0]), (*found[1], *gradients[1]), strict=True):
        torch.testing.assert_close(a, b)


def test_transformers_convolution_is_what_its_kernel_is_held_to():
    stock = transformers.models.nemotron_h.modeling_nemotron_h.causal_conv1d_fn
    given = drawn((2, 5, 9), (5, 4), (5,))
    found = [function(*given, activation="silu") for function in (stock, scans.convolution)]
    gradients = [torch.autograd.grad((out * out).sum(), given) for out in found]
    for a, b in zip((found[0], *gradients[0]), (found[1], *gradients[1]), strict=True):
        torch.testing.assert_close(a, b)


def test_where_kernels_are_installed_no_torch_of_ours_computes_mamba2(monkeypatch):
    model = fr.patch(made("NemotronH").float())
    monkeypatch.setattr(ours, "mamba2_in_torch", None)
    with pytest.raises(TypeError):
        model(**fr.collate(LAYOUTS["paper"]()))
    monkeypatch.setattr(ours.importlib.util, "find_spec", lambda name: name == "mamba_ssm")
    model(**fr.collate(LAYOUTS["paper"]()))


# ---- what reports count


def test_the_work_of_recurrent_layers_is_counted(tmp_path):
    config = shrink(default_config(transformers.Qwen3_5ForCausalLM))
    config.save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path))
    n_recurrent = config.layer_types.count("linear_attention")
    n_attention = len(config.layer_types) - n_recurrent
    assert 0 < n_attention < len(config.layer_types)
    heads, size = config.linear_num_value_heads, config.linear_key_head_dim
    scan = heads * (3 * size * size + 64 * (2 * size + size + size))
    model = transformers.Qwen3_5ForCausalLM(config)
    plain = sum(p.numel() for n, p in model.model.named_parameters() if p.dim() > 1 and "embed" not in n)
    assert shape.weights == plain + n_recurrent * scan
    assert shape.pair == n_attention * config.num_attention_heads * 14 * config.head_dim
