"""One pass over the tree against the N samples, on stock models that are given the dense mask.

And the known ways to get it wrong, each written down here and shown to be caught.
"""

import dataclasses

import pytest
import torch

import flexreason as fr
from exact import plain_pass
from flexreason import Role
from flexreason.proof import oracle
from flexreason.proof.compare import EXACT, Computed, backward_of, compare
from flexreason.proof.float64 import relative_l2, true_float64
from models import tiny
from strategies import random_tree, random_turns

SHAPES = {
    "one token each": [(1, 1, 1)],
    "one turn": [(7, 12, 5)],
    "some without reasoning": [(6, 9, 4), (3, 0, 5), (5, 8, 1), (2, 0, 6)],
    "unaligned": [(61, 250, 67)] * 3,
}


def dense_pass(model, layout):
    """The tree in one pass, without `patch`."""
    hidden = model.model(
        input_ids=layout.input_ids[None],
        position_ids=layout.position_ids[None],
        attention_mask=fr.dense_mask(layout)[None, None],
        use_cache=False,
    ).last_hidden_state
    logits = model.lm_head(hidden[0, layout.target_source])
    nll = torch.nn.functional.cross_entropy(logits, layout.target_ids, reduction="none")
    return Computed(float(nll.detach().sum()), -nll.detach(), backward_of(model, nll.sum()))


def errors(model, layout, samples):
    """Relative errors of the pass over `layout` against `samples` one by one: loss, log-probs, worst gradient."""
    with true_float64():
        expected = oracle.n_samples(model, samples)
        return compare(dense_pass(model, layout), expected)


@pytest.mark.parametrize("family", ["Qwen3", "Llama"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_conversation_in_one_pass_is_its_n_samples(family, shape):
    layout = fr.lay_out_turns(random_turns(SHAPES[shape]))
    found = errors(tiny(family).double(), layout, fr.unmerge(layout))
    assert found.is_exact, found


@pytest.mark.parametrize("family", ["Qwen3", "Llama"])
def test_a_general_tree_in_one_pass_is_its_samples(family):
    found = errors(tiny(family).double(), fr.lay_out(random_tree()), random_tree())
    assert found.is_exact, found


def test_packed_documents_in_one_pass_are_their_samples():
    layouts = [fr.lay_out_turns(random_turns([(5, 7, 3), (4, 6, 2)])), fr.lay_out(random_tree())]
    row = fr.collate(layouts)
    whole = fr.Layout(
        **{name: row[name][0] for name in ("input_ids", "position_ids", "until", "turn", "role")},
        target_source=torch.cat([row["target_source"][0, row["target_document"][0] == d] for d in (0, 1)]),
        target_ids=torch.cat([layout.target_ids for layout in layouts]),
        target_turn=torch.cat([layout.target_turn for layout in layouts]),
        target_weight=torch.cat([layout.target_weight for layout in layouts]),
    )
    found = errors(tiny("Qwen3").double(), whole, [s for layout in layouts for s in fr.unmerge(layout)])
    assert found.is_exact, found


CONVERSATION = [(6, 9, 4), (3, 0, 5), (5, 8, 3)]


def changed(layout, **tensors):
    return dataclasses.replace(layout, **tensors)


def first_response_token_from_the_last_context_token(layout):
    """A known fault: the token stored before the first one of r_out on the trunk, h_i's last, is asked for it."""
    source = layout.target_source.clone()
    is_first_response = (layout.role[source] == int(Role.REASONING)) & (
        layout.role[(source + 1).clamp(max=len(layout) - 1)] == int(Role.RESPONSE)
    )
    assert is_first_response.sum() == 2
    for at in is_first_response.nonzero().flatten().tolist():
        turn = layout.turn == layout.target_turn[at]
        source[at] = (turn & (layout.role == int(Role.PROMPT))).nonzero().max()
    return changed(layout, target_source=source)


def no_loss_for_a_turn_without_reasoning(layout):
    """A known fault: labels only behind a reasoning delimiter, so that the second turn is never learned."""
    kept = layout.target_turn != 1
    assert not kept.all()
    return changed(layout, **{name: getattr(layout, name)[kept] for name in vars(layout) if name.startswith("target")})


def shifted_labels(layout):
    """The token stored before a target's, instead of the one before it on its path."""
    [stored] = [(layout.role[1:] & int(Role.REASONING | Role.RESPONSE) != 0).nonzero().flatten()]
    order = layout.target_source.argsort()
    return changed(
        layout, **{n: getattr(layout, n)[order] for n in ("target_ids", "target_turn")}, target_source=stored
    )


def positions_as_stored(layout):
    return changed(layout, position_ids=torch.arange(len(layout)))


def context_sees_reasoning(layout):
    """Plain causal attention over the tree: branches leak into each other."""
    return changed(layout, until=torch.full_like(layout.until, len(layout)))


@pytest.mark.parametrize(
    "wrong",
    [
        first_response_token_from_the_last_context_token,
        no_loss_for_a_turn_without_reasoning,
        shifted_labels,
        positions_as_stored,
        context_sees_reasoning,
    ],
)
def test_known_wrong_versions_are_caught(wrong):
    model = tiny("Qwen3").double()
    layout = fr.lay_out_turns(random_turns(CONVERSATION))
    assert errors(model, layout, fr.unmerge(layout)).is_exact
    found = errors(model, wrong(layout), fr.unmerge(layout))
    assert not found.is_exact
    assert max(found.largest().values()) > 1e-4, found


def test_one_plain_pass_over_everything_is_not_the_n_samples():
    """Reasoning leaks into later turns: the same targets, another loss; right for the first turn alone."""
    model, turns = tiny("Qwen3").double(), random_turns(CONVERSATION)
    samples = fr.unmerge(fr.lay_out_turns(turns))
    with true_float64():
        plain, right = plain_pass(model, turns), oracle.n_samples(model, samples)
        first = oracle.n_samples(model, samples[:1])
    assert len(plain) == right.n_targets
    assert abs(-float(plain.sum()) / right.loss_sum - 1) > 1e-4
    assert relative_l2([plain[: first.n_targets]], first.logprobs) < 1e-12


def test_the_oracle_leaves_the_models_gradients_alone_and_sums():
    model = tiny("Qwen3")
    samples = random_tree()
    whole = oracle.n_samples(model, samples)
    assert all(p.grad is None for p in model.parameters())
    parts = [oracle.n_samples(model, [s]) for s in samples]
    assert whole.loss_sum == pytest.approx(sum(p.loss_sum for p in parts), rel=1e-5)
    assert whole.tokens == sum(len(s) for s in samples)
    name, gradient = next(iter(whole.gradients.items()))
    assert relative_l2([sum(p.gradients[name] for p in parts)], [gradient]) < 1e-5
    assert oracle.n_samples(model, samples, gradients=False).gradients == {}


def test_stock_fp64_is_not_true_fp64():
    """Why the mode exists: `.double()` alone leaves float32 steps inside, and gradients off by more than 1e-9."""
    model, layout = tiny("Qwen3").double(), fr.lay_out_turns(random_turns(CONVERSATION))
    expected = oracle.n_samples(model, fr.unmerge(layout))
    assert compare(dense_pass(model, layout), expected).gradients > EXACT
