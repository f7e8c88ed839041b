"""Block lists in closed form, held against the dense mask pooled by block."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import flexreason as fr
from flexreason.tree import blocks
from strategies import random_tree, random_turns, samples, turns
from watch import Largest

SIZES = [16, 64, 128, (16, 64), (64, 16), (128, 32), (48, 16)]

LISTS = {
    "kv": ("kv_num_blocks", "kv_indices"),
    "full_kv": ("full_kv_num_blocks", "full_kv_indices"),
    "q": ("q_num_blocks", "q_indices"),
    "full_q": ("full_q_num_blocks", "full_q_indices"),
}


def lists(block_mask):
    """{name: [the indices each row really lists]}."""
    found = {}
    for name, (counts, indices) in LISTS.items():
        counts, indices = getattr(block_mask, counts)[0, 0], getattr(block_mask, indices)[0, 0]
        assert counts.dtype == indices.dtype == torch.int32
        assert indices.is_contiguous()
        found[name] = [row[:count].tolist() for row, count in zip(indices, counts.tolist(), strict=True)]
    return found


def pooled(dense, block_size):
    """The same lists from the matrix of bools, and the matrix of cells that see anything."""
    q_size, kv_size = (block_size, block_size) if isinstance(block_size, int) else block_size
    n = len(dense)
    padded = torch.nn.functional.pad(dense, (0, -n % kv_size, 0, -n % q_size))
    cells = padded.view(padded.shape[0] // q_size, q_size, -1, kv_size).permute(0, 2, 1, 3).flatten(2)
    full = cells.all(2)
    partial = cells.any(2) & ~full
    tables = {"kv": partial, "full_kv": full, "q": partial.T, "full_q": full.T}
    return {name: [row.nonzero().flatten().tolist() for row in table] for name, table in tables.items()}


@given(samples(), st.sampled_from(SIZES))
@example(random_tree(), 16)
def test_the_block_mask_of_any_tree_is_its_dense_mask_pooled(given_samples, block_size):
    layout = fr.lay_out(given_samples)
    assert lists(fr.block_mask(layout, block_size=block_size)) == pooled(fr.dense_mask(layout), block_size)


@given(samples(), st.sampled_from(SIZES))
@example(random_tree(), 16)
def test_lists_made_as_on_a_gpu_are_the_same(given_samples, block_size):
    layout = fr.lay_out(given_samples)
    expected = fr.block_mask(layout, block_size=block_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "_to_front", blocks._to_front_unseen)
        found = fr.block_mask(layout, block_size=block_size)
    for name in (name for names in LISTS.values() for name in names):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_a_layout_stays_on_its_device_whatever_the_default_is():
    layout = fr.lay_out(random_tree())
    with torch.device("meta"):
        found = fr.block_mask(layout, block_size=16)
    assert torch.equal(found.kv_indices, fr.block_mask(layout, block_size=16).kv_indices)


@given(st.lists(turns(), min_size=0, max_size=3), st.sampled_from(SIZES), st.integers(0, 2))
def test_the_block_mask_of_a_packed_and_padded_row_is_its_dense_mask_pooled(conversations, block_size, more):
    layouts = [fr.lay_out_turns(conversation) for conversation in conversations]
    length = -(-max(1, sum(map(len, layouts))) // 128) * 128 + more * 128
    row = fr.collate(layouts, length)
    assert lists(fr.block_mask(row, block_size=block_size)) == pooled(fr.dense_mask(row), block_size)


@pytest.mark.parametrize("shape", [(64, 256, 64), (61, 250, 67), (128, 128, 128), (127, 129, 1), (40, 0, 90)])
@pytest.mark.parametrize("block_size", SIZES)
def test_lengths_on_and_beside_block_boundaries(shape, block_size):
    layout = fr.lay_out_turns(random_turns([shape] * 5))
    found = lists(fr.block_mask(layout, block_size=block_size))
    assert found == pooled(fr.dense_mask(layout), block_size)
    assert any(map(len, found["full_kv"]))
    assert any(map(len, found["kv"]))


@given(samples(), st.sampled_from([1, 3, 16, 17, 50, 128]), st.sampled_from(SIZES), st.booleans())
@example(random_tree(), 5, 16, False)
def test_windowed_and_chunked_lists_are_exact(given_samples, limit, block_size, is_chunk):
    limits = {"chunk" if is_chunk else "window": limit}
    row = fr.collate([fr.lay_out(given_samples)] * 2)
    assert lists(fr.block_mask(row, block_size=block_size, **limits)) == pooled(
        fr.dense_mask(row, **limits), block_size
    )


def test_windowed_lists_of_the_long_example_are_exact():
    layout = fr.lay_out_turns(random_turns([(1000, 300, 200)] * 10))
    for window in (128, 200, 1024):
        found = lists(fr.block_mask(layout, window=window))
        assert found == pooled(fr.dense_mask(layout, window=window), 128)


def test_a_table_looked_at_in_many_bands_is_the_same(monkeypatch):
    layout = fr.lay_out_turns(random_turns([(61, 250, 67)] * 6))
    expected = lists(fr.block_mask(layout, block_size=16))
    monkeypatch.setattr("flexreason.tree.blocks.AT_ONCE", 400)
    assert lists(fr.block_mask(layout, block_size=16)) == expected


def test_the_block_mask_is_one_that_torch_takes():
    row = fr.collate([fr.lay_out_turns(random_turns([(61, 250, 67)] * 3))])
    length = row["until"].shape[1]
    for mask in ("interval", "turn_role"):
        block_mask = fr.block_mask(row, mask=mask)
        assert block_mask.shape == (1, 1, length, length)
        assert block_mask.BLOCK_SIZE == (128, 128)
        zero = torch.zeros((), dtype=torch.int32)
        index = torch.arange(length, dtype=torch.int32)
        rendered = block_mask.mask_mod(zero, zero, index[:, None], index[None, :])
        assert torch.equal(rendered, fr.dense_mask(row))


def test_the_block_mask_is_built_on_the_device_asked_for():
    block_mask = fr.block_mask(fr.lay_out_turns(random_turns([(5, 6, 7)])), device="cpu")
    assert block_mask.kv_indices.device.type == "cpu"


def test_no_tensor_of_s_by_s_is_made():
    layout = fr.lay_out_turns(random_turns([(1000, 300, 200)] * 4))
    with Largest() as blocks:
        fr.block_mask(layout)
    with Largest() as dense:  # so that the test can fail
        fr.dense_mask(layout)
    assert blocks.elements < len(layout) ** 2 / 100
    assert dense.elements == len(layout) ** 2


def test_a_block_size_below_one_is_refused():
    with pytest.raises(ValueError, match="block_size: expected at least 1, found 0"):
        fr.block_mask(fr.lay_out_turns([([1], [2], [3])]), block_size=0)
