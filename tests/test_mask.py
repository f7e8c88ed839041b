"""One rule, rendered several ways."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

import flexreason as fr
from flexreason import Role, Sample
from flexreason.tree.mask import mask_mod
from strategies import lengths, random_turns, samples, turns

P, T, C, R = (int(r) for r in (Role.PROMPT, Role.REASONING, Role.CONTEXT, Role.RESPONSE))
B = C | R  # a response without reasoning: context and generated at once


def history_of(extra):
    return lambda i, j: {P, C, B} if j < i else extra if j == i else set()


# PAPER's visibility table, written out once more without flags or tensors: SEEN[role of q](its turn, turn of kv)
SEEN = {P: history_of(set()), T: history_of({P}), C: history_of({P}), B: history_of({P}), R: history_of({P, T})}


@given(turns(length=st.integers(1, 4)))
def test_the_turn_role_rule_is_the_papers_table(conversation):
    layout = fr.lay_out_turns(conversation)
    tokens = list(zip(layout.turn.tolist(), layout.role.tolist(), range(len(layout)), strict=True))

    def sees(q, kv):
        (i, role_q, at_q), (j, role_kv, at_kv) = q, kv
        return at_kv <= at_q if (i, role_q) == (j, role_kv) else role_kv in SEEN[role_q](i, j)

    expected = [[sees(q, kv) for kv in tokens] for q in tokens]
    assert fr.dense_mask(layout, mask="turn_role").tolist() == expected


@given(st.lists(turns(), min_size=1, max_size=3))
def test_the_turn_role_rule_is_the_interval_rule_cell_by_cell_in_packed_rows(conversations):
    row = fr.collate([fr.lay_out_turns(conversation) for conversation in conversations])
    assert torch.equal(fr.dense_mask(row, mask="turn_role"), fr.dense_mask(row))


@given(turns(length=st.integers(1, 4)), st.randoms())
def test_the_turn_role_rule_holds_in_any_order_that_keeps_segments(conversation, random):
    """The paper interleaves its segments; the rule does not care, where the interval rule needs preorder."""
    layout = fr.lay_out_turns(conversation)
    segments = list(dict.fromkeys(zip(layout.turn.tolist(), layout.role.tolist(), strict=True)))
    random.shuffle(segments)
    key = [segments.index(s) for s in zip(layout.turn.tolist(), layout.role.tolist(), strict=True)]
    order = torch.tensor(key).argsort(stable=True)
    moved = {name: getattr(layout, name)[order][None] for name in ("until", "turn", "role")}
    moved["document"] = torch.zeros_like(moved["turn"])
    expected = fr.dense_mask(layout, mask="turn_role")[order][:, order]
    assert torch.equal(fr.dense_mask(moved, mask="turn_role"), expected)


@given(samples(), st.sampled_from([1, 2, 5, 16, 40]), st.booleans())
def test_windows_and_chunks_are_measured_in_positions(given_samples, limit, is_chunk):
    layout = fr.lay_out(given_samples)
    position = layout.position_ids
    q, kv = position[:, None], position[None, :]
    allowed = q // limit == kv // limit if is_chunk else q - kv < limit
    found = fr.dense_mask(layout, **{"chunk" if is_chunk else "window": limit})
    assert torch.equal(found, fr.dense_mask(layout) & allowed)


@settings(max_examples=20)
@given(samples(), st.sampled_from([None, 7]))
def test_the_mask_mod_is_one_that_flex_attention_takes(given_samples, window):
    layout = fr.lay_out(given_samples)
    made = create_mask(mask_mod(layout, window=window), 1, 1, len(layout), len(layout), device="cpu")
    assert torch.equal(made[0, 0], fr.dense_mask(layout, window=window))


@given(turns(max_turns=3), st.tuples(lengths, lengths, lengths))
def test_appending_a_turn_changes_nothing_that_earlier_turns_see(conversation, sizes):
    """Each target's source sees the same tokens at the same positions, whatever comes later."""
    [new] = random_turns([sizes], seed=5)

    def seen(layout, turn):
        mask = fr.dense_mask(layout)
        sources = layout.target_source[layout.target_turn == turn]
        return [
            list(zip(layout.input_ids[m].tolist(), layout.position_ids[m].tolist(), strict=True)) for m in mask[sources]
        ]

    before, after = fr.lay_out_turns(conversation), fr.lay_out_turns([*conversation, new])
    assert all(seen(before, turn) == seen(after, turn) for turn in range(len(conversation)))


@settings(max_examples=30)
@given(st.lists(samples(length=st.integers(1, 4)), min_size=1, max_size=2), st.sampled_from([1, 2, 7, 16, 64]))
def test_a_drawn_mask_is_the_dense_mask_in_squares(documents, width):
    row = fr.collate([fr.lay_out(document) for document in documents], block_size=16)
    dense = fr.dense_mask(row)
    side = -(-len(dense) // width)
    squares = [[square.float().mean() for square in band.split(side, dim=1)] for band in dense.split(side)]
    lines = ["".join("·" if seen == 0 else "█" if seen == 1 else "▒" for seen in line) for line in squares]
    assert fr.draw_mask(row, width=width).splitlines() == lines


def test_unknown_masks_and_limits_are_refused():
    layout = fr.lay_out([Sample([1], [2])])
    with pytest.raises(ValueError, match="mask: expected one of 'interval', 'turn_role', found 'causal'"):
        fr.dense_mask(layout, mask="causal")
    with pytest.raises(ValueError, match="window: expected at least 1 or None, found 0"):
        fr.block_mask(layout, window=0)
    with pytest.raises(ValueError, match=r"row: expected the key 'until' \(fr.collate makes it\), found input_ids"):
        fr.dense_mask({"input_ids": torch.zeros(1, 3)})


@pytest.mark.parametrize("limit", [10**4, 2**30, 2**31 - 1, 2**31, 2**40])
@pytest.mark.parametrize("kind", ["window", "chunk"])
def test_limits_beyond_all_positions_are_none_however_large(kind, limit):
    """Positions are compared in 32 bits."""
    layout = fr.lay_out_turns(random_turns([(6, 9, 4), (3, 0, 5)]))
    assert torch.equal(fr.dense_mask(layout, **{kind: limit}), fr.dense_mask(layout))
    blocks = fr.block_mask(layout, block_size=16, **{kind: limit})
    assert int(blocks.kv_num_blocks.sum() + blocks.full_kv_num_blocks.sum()) == 3
