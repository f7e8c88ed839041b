"""Splitting: every target once with its whole history, as little computed twice as can be."""

import itertools
import random

import pytest
import torch

import flexreason as fr
from exact import EXACT
from flexreason.data import splitting
from flexreason.proof import oracle
from flexreason.proof.float64 import relative_l2, true_float64
from models import tiny
from strategies import random_tree, random_turns


def pieces(layout):
    """(prompt, target) of every sample."""
    return [(list(s.prompt_ids), list(s.target_ids)) for s in fr.unmerge(layout)]


def random_conversation(seed, turns):
    draw = random.Random(seed)
    shape = [(draw.randint(1, 30), draw.choice([0, draw.randint(1, 60)]), draw.randint(1, 15)) for _ in range(turns)]
    return fr.lay_out_turns(random_turns(shape, seed=seed))


def agent(seed, steps):
    """A general tree: nested forks, samples that are prefixes of others."""
    draw = random.Random(seed)
    samples, history = [], [draw.randrange(90) for _ in range(draw.randint(5, 20))]
    for _ in range(steps):
        target = [draw.randrange(90) for _ in range(draw.randint(1, 25))]
        samples.append(fr.Sample(list(history), target))
        kept = draw.choice([target, target[: draw.randint(0, len(target))], target[-3:]])
        history = [*history[: draw.choice([len(history), len(history) // 2 + 1])], *kept, draw.randrange(90)]
    return fr.lay_out(samples)


def longest(layout):
    return max(len(s.prompt_ids) + len(s.target_ids) - 1 for s in fr.unmerge(layout))


@pytest.mark.parametrize("seed", range(40))
def test_every_sample_is_in_one_part_as_it_was(seed):
    layout = random_conversation(seed, 1 + seed % 14) if seed % 2 else agent(seed, 1 + seed % 13)
    whole = pieces(layout)
    for length in (longest(layout), longest(layout) + 20, len(layout) - 1, len(layout)):
        if length < longest(layout):
            continue
        found = splitting.split(layout, length)
        assert all(len(part) <= length for part in found.parts)
        assert sorted(itertools.chain(*found.turns)) == list(range(layout.n_samples))
        for part, turns in zip(found.parts, found.turns, strict=True):
            assert pieces(part) == [whole[turn] for turn in turns]
            depth = [int((part.until[: i + 1] > i).sum()) - 1 for i in range(len(part))]
            assert part.position_ids.tolist() == depth
        assert not found.dropped
        once = len(splitting._part(layout, list(range(layout.n_samples)), splitting.in_storage(layout)[0]))
        untouched = len(layout) <= length
        assert found.recomputed == (0 if untouched else sum(map(len, found.parts)) - once)


def partitions(items):
    if not items:
        yield []
        return
    first, *rest = items
    for part in partitions(rest):
        yield [[first], *part]
        for k in range(len(part)):
            yield [*part[:k], [first, *part[k]], *part[k + 1 :]]


def brute_force(layout, length):
    """The fewest tokens of all ways, each part counted by building it."""
    last = splitting.in_storage(layout)[0]
    size = {}
    for n in range(1, layout.n_samples + 1):
        for group in itertools.combinations(range(layout.n_samples), n):
            size[group] = int(splitting.seen_from(layout, [last[turn] for turn in group]).sum())
    ways = ([tuple(sorted(g)) for g in way] for way in partitions(list(range(layout.n_samples))))
    return min(sum(size[g] for g in way) for way in ways if all(size[g] <= length for g in way))


@pytest.mark.parametrize("seed", range(16))
def test_what_is_computed_twice_is_least(seed, monkeypatch):
    turns = 3 + seed % 5
    layout = random_conversation(seed, turns) if seed % 2 else agent(seed, turns)
    for length in {longest(layout), (longest(layout) + len(layout)) // 2}:
        if length >= len(layout):
            continue
        best = brute_force(layout, length)
        assert sum(map(len, splitting.split(layout, length).parts)) == best
        with monkeypatch.context() as patch:
            patch.setattr(splitting, "EXACTLY", 0)  # as trees with more branches are split
            assert sum(map(len, splitting.split(layout, length).parts)) <= 1.1 * best


@pytest.mark.parametrize("exactly", [0, splitting.EXACTLY])
def test_parts_that_fit_into_one_row_are_one(exactly, monkeypatch):
    """The longest and the shortest go together, though others are stored between them."""
    monkeypatch.setattr(splitting, "EXACTLY", exactly)
    layout = fr.lay_out([fr.Sample([1], [10 + k] * n) for k, n in enumerate((30, 22, 17, 9))])
    found = splitting.split(layout, 40)
    assert sorted(map(sorted, found.turns)) == [[0, 3], [1, 2]]
    assert sorted(map(len, found.parts)) == [38, 38]
    assert found.recomputed == 1


def test_log_probabilities_do_not_change():
    model, layout = tiny("Qwen3").double(), fr.lay_out(random_tree())
    found = splitting.split(layout, longest(layout))
    assert len(found.parts) > 1
    with true_float64(), torch.no_grad():
        expected = oracle.n_samples(model, fr.unmerge(layout), gradients=False).logprobs
        fr.patch(model)
        for part, turns in zip(found.parts, found.turns, strict=True):
            row = fr.collate([part])
            logprobs = fr.token_logprobs(model, row)
            for here, turn in enumerate(turns):
                assert relative_l2([logprobs[row["target_turn"][0] == here]], [expected[turn]]) <= EXACT


def test_weights_turns_and_roles_go_with_their_tokens():
    layout = random_conversation(3, 6)
    weighted = fr.Layout(**{**vars(layout), "target_weight": torch.arange(len(layout.target_ids)).float()})
    for part, turns in zip(*(lambda s: (s.parts, s.turns))(splitting.split(weighted, longest(layout))), strict=True):
        for here, turn in enumerate(turns):
            for name in ("target_weight", "target_ids"):
                mine = getattr(part, name)[part.target_turn == here]
                assert torch.equal(mine, getattr(weighted, name)[weighted.target_turn == turn])
        assert set(part.turn.tolist()) <= set(layout.turn.tolist())


def test_a_sample_longer_than_a_row_is_refused_by_number_or_dropped_as_asked():
    layout = fr.lay_out_turns(random_turns([(5, 4, 3), (5, 80, 3), (5, 4, 3)]))
    with pytest.raises(ValueError, match=r"1 of 3 samples are longer than a row of 50 by themselves \(turns 1;"):
        splitting.split(layout, 50)
    found = splitting.split(layout, 50, too_long="drop")
    assert found.dropped == [1]
    assert sorted(itertools.chain(*found.turns)) == [0, 2]
    assert splitting.split(layout, 4, too_long="drop").parts == []
    with pytest.raises(ValueError, match="too_long: expected one of"):
        splitting.split(layout, 50, too_long="cut")


def test_hundreds_of_branches_are_split_in_no_time():
    layout = random_conversation(0, 150)
    found = splitting.split(layout, longest(layout) + 500)
    assert sorted(itertools.chain(*found.turns)) == list(range(150))
