"""One pass over the tree against the N samples, on stock models that are given the dense mask.

And the known ways to get it wrong, each written down here and shown to be caught.
"""

import dataclasses

import pytest
import torch

import flexreason as fr
from flexreason import Role
from flexreason.proof import oracle
from flexreason.proof.float64 import relative_l2, true_float64
from models import tiny
from strategies import random_tree, random_turns

EXACT = 1e-9

SHAPES = {
    "one token each": [(1, 1, 1)],
    "one turn": [(7, 12, 5)],
    "some without reasoning": [(6, 9, 4), (3, 0, 5), (5, 8, 1), (2, 0, 6)],
    "unaligned": [(61, 250, 67)] * 3,
}


def dense_pass(model, layout):
    """(loss sum, log-probability of every target, gradients of the sum) of the tree in one pass."""
    hidden = model.model(
        input_ids=layout.input_ids[None],
        position_ids=layout.position_ids[None],
        attention_mask=fr.dense_mask(layout)[None, None],
        use_cache=False,
    ).last_hidden_state
    logits = model.lm_head(hidden[0, layout.target_source])
    nll = torch.nn.functional.cross_entropy(logits, layout.target_ids, reduction="none")
    gradients = torch.autograd.grad(nll.sum(), list(model.parameters()))
    return float(nll.detach().sum()), -nll.detach(), gradients


def errors(model, layout, samples):
    """Relative errors of the pass over `layout` against `samples` one by one: loss, log-probs, worst gradient."""
    with true_float64():
        expected = oracle.n_samples(model, samples)
        loss, logprobs, gradients = dense_pass(model, layout)
    worst = max(relative_l2([g], [e]) for g, e in zip(gradients, expected.gradients.values(), strict=True))
    if len(logprobs) != expected.n_targets:
        return {"targets": (len(logprobs), expected.n_targets)}
    return {
        "loss": abs(loss / expected.loss_sum - 1),
        "logprobs": relative_l2([logprobs], [torch.cat(expected.logprobs)]),
        "gradients": worst,
    }


def is_exact(found):
    return "targets" not in found and max(found.values()) <= EXACT


@pytest.mark.parametrize("family", ["Qwen3", "Llama"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_conversation_in_one_pass_is_its_n_samples(family, shape):
    layout = fr.lay_out_turns(random_turns(SHAPES[shape]))
    found = errors(tiny(family).double(), layout, fr.unmerge(layout))
    assert is_exact(found), found


@pytest.mark.parametrize("family", ["Qwen3", "Llama"])
def test_a_general_tree_in_one_pass_is_its_samples(family):
    found = errors(tiny(family).double(), fr.lay_out(random_tree()), random_tree())
    assert is_exact(found), found


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
    assert is_exact(found), found


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
    assert is_exact(errors(model, layout, fr.unmerge(layout)))
    found = errors(model, wrong(layout), fr.unmerge(layout))
    assert not is_exact(found)
    assert "targets" in found or max(found.values()) > 1e-4, found


def test_one_plain_pass_over_everything_is_not_the_n_samples():
    """Reasoning leaks into later turns: the same targets, another loss; right for the first turn alone."""
    model, turns = tiny("Qwen3").double(), random_turns(CONVERSATION)
    samples = fr.unmerge(fr.lay_out_turns(turns))
    with true_float64():
        plain, right = oracle.plain_pass(model, turns), oracle.n_samples(model, samples)
        first = oracle.n_samples(model, samples[:1])
    assert plain.n_targets == right.n_targets
    assert abs(plain.loss_sum / right.loss_sum - 1) > 1e-4
    assert relative_l2([plain.logprobs[0][: first.n_targets]], first.logprobs) < 1e-12


def test_the_last_turn_alone_is_one_of_the_samples():
    model, turns = tiny("Qwen3").double(), random_turns(CONVERSATION)
    samples = fr.unmerge(fr.lay_out_turns(turns))
    last = oracle.last_turn_only(model, samples)
    assert last.n_targets == len(samples[-1].target_ids) < oracle.n_samples(model, samples).n_targets


def test_the_oracle_leaves_the_models_gradients_alone_and_sums():
    model = tiny("Qwen3")
    samples = random_tree()
    whole = oracle.n_samples(model, samples)
    assert all(p.grad is None for p in model.parameters())
    parts = [oracle.n_samples(model, [s]) for s in samples]
    assert whole.loss_sum == pytest.approx(sum(p.loss_sum for p in parts), rel=1e-5)
    assert whole.tokens == sum(len(s.prompt_ids) + len(s.target_ids) for s in samples)
    name, gradient = next(iter(whole.gradients.items()))
    assert relative_l2([sum(p.gradients[name] for p in parts)], [gradient]) < 1e-5
    assert oracle.n_samples(model, samples, gradients=False).gradients == {}


def test_stock_fp64_is_not_true_fp64():
    """Why the mode exists: `.double()` alone leaves float32 steps inside, and gradients off by more than 1e-9."""
    model, layout = tiny("Qwen3").double(), fr.lay_out_turns(random_turns(CONVERSATION))
    expected = oracle.n_samples(model, fr.unmerge(layout))
    _, _, gradients = dense_pass(model, layout)
    assert relative_l2(gradients, expected.gradients.values()) > EXACT
