"""The rectangles that attention is computed in hold every visible pair exactly once."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import flexreason as fr
from flexreason.attention import cover as cover_module
from flexreason.attention.cover import cover
from flexreason.tree.chains import chains
from strategies import random_tree, random_turns, samples, turns


def counted(row, limits):
    """How often each pair of tokens is computed: by rectangles, and inside diagonal tiles by their masks."""
    until, position = row["until"][0], row["position_ids"][0]
    n = len(until)
    tile = torch.arange(n) // cover_module.TILE
    dense = fr.dense_mask(row, **limits)
    times = ((tile[:, None] == tile[None, :]) & dense).int()
    window = limits.get("window")
    for r in cover(until.tolist(), position.tolist(), **limits):
        assert r.q_start < r.q_stop
        assert r.k_start < r.k_stop
        block = torch.ones(r.q_stop - r.q_start, r.k_stop - r.k_start, dtype=torch.int32)
        if r.edge:
            assert max(block.shape) <= cover_module.TILE
            assert position[r.q_stop - 1] - position[r.k_stop - 1] < window  # every query sees some key
            block = (position[r.q_start : r.q_stop, None] - position[None, r.k_start : r.k_stop] < window).int()
        times[r.q_start : r.q_stop, r.k_start : r.k_stop] += block
    return times, dense


LIMITS = [{}, {"window": 1}, {"window": 7}, {"window": 40}, {"chunk": 5}, {"chunk": 32}, {"window": 20, "chunk": 32}]


@given(st.lists(samples(), min_size=1, max_size=3), st.sampled_from([8, 32]), st.sampled_from(LIMITS))
@example([random_tree()], 8, {})
@example([random_tree()], 8, {"window": 7})
def test_every_visible_pair_of_any_row_is_computed_exactly_once(documents, tile, limits):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cover_module, "TILE", tile)
        patch.setattr(cover_module, "CPU", cover_module.Cost(10, 40, 40))  # so that small trees share prefixes too
        row = fr.collate([fr.lay_out(document) for document in documents], block_size=32)
        times, dense = counted(row, limits)
    assert torch.equal(times, dense.int())


@given(turns(), st.sampled_from(LIMITS))
def test_every_visible_pair_of_a_conversation_is_computed_exactly_once(conversation, limits):
    times, dense = counted(fr.collate([fr.lay_out_turns(conversation)] * 2), limits)
    assert torch.equal(times, dense.int())


def test_a_conversation_is_a_trunk_and_its_branches():
    layout = fr.lay_out_turns(random_turns([(10, 20, 5)] * 3))
    found = chains(layout.until.tolist(), layout.position_ids.tolist())
    assert [(c.start, c.stop, c.parent, c.fork) for c in found] == [(0, 65, -1, 0), (65, 90, 0, 25), (90, 115, 0, 10)]


def test_neighbouring_branches_share_the_prefix_that_they_all_see():
    layout = fr.lay_out_turns(random_turns([(150, 60, 30)] * 30))
    rectangles = cover(layout.until.tolist(), layout.position_ids.tolist())
    off_trunk = [r for r in rectangles if r.q_start >= 30 * 150 + 29 * 30 and r.k_stop <= 30 * 150 + 29 * 30]
    assert max(r.q_stop - r.q_start for r in off_trunk) > 8 * 90
    assert len(rectangles) < 150


def test_under_a_window_the_work_grows_with_the_window_not_with_the_conversation():
    def pairs(n_turns, window):
        layout = fr.lay_out_turns(random_turns([(150, 60, 30)] * n_turns))
        rectangles = cover(layout.until.tolist(), layout.position_ids.tolist(), window=window)
        return sum((r.q_stop - r.q_start) * (r.k_stop - r.k_start) for r in rectangles) / len(layout)

    assert pairs(30, 512) < 1.1 * pairs(15, 512)
    assert pairs(30, 512) < 1.2 * 512
