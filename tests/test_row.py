"""Rows: what `collate` makes of layouts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flexreason as fr
from flexreason import Role, Sample
from flexreason.row import round_up_targets
from strategies import random_turns, samples

S_KEYS = {"input_ids", "position_ids", "until", "turn", "role", "document"}
T_KEYS = {"labels", "shift_labels", "target_source", "target_turn", "target_document", "target_weight"}


@given(st.lists(samples(max_samples=3), max_size=4), st.integers(0, 2))
def test_a_row_holds_its_documents_side_by_side_and_nothing_between_them(documents, more):
    layouts = [fr.lay_out(document) for document in documents]
    length = -(-max(1, sum(map(len, layouts))) // 128) * 128 + more * 128
    row = fr.collate(layouts, length)
    assert {k for k, v in row.items() if v.shape == (1, length)} == S_KEYS
    n_targets = row["labels"].shape[1]
    assert n_targets != length
    assert {k for k, v in row.items() if v.shape == (1, n_targets)} == T_KEYS
    assert row["attention_mask"].shape == (1, 1, 0, 0)

    mask = fr.dense_mask(row)
    expected = torch.block_diag(*(fr.dense_mask(layout).int() for layout in layouts), torch.eye(0)).bool()
    used = len(expected)
    assert torch.equal(mask[:used, :used], expected)
    assert torch.equal(mask[used:], torch.eye(length, dtype=torch.bool)[used:])  # padding sees itself alone
    assert not mask[:used, used:].any()

    start = 0
    for number, layout in enumerate(layouts):
        at = row["document"][0] == number
        assert at.nonzero().flatten().tolist() == list(range(start, start + len(layout)))
        for name in ("input_ids", "position_ids", "turn", "role"):
            assert torch.equal(row[name][0, at], getattr(layout, name))
        targets = row["target_document"][0] == number
        assert torch.equal(row["target_source"][0, targets] - start, layout.target_source)
        assert torch.equal(row["labels"][0, targets], layout.target_ids)
        assert torch.equal(row["target_turn"][0, targets], layout.target_turn)
        assert row["target_weight"][0, targets].eq(1).all()
        start += len(layout)
    ignored = row["target_document"][0] < 0
    assert row["labels"][0, ignored].eq(-100).all()
    assert row["target_weight"][0, ignored].eq(0).all()
    assert row["role"][0, start:].eq(int(Role.PAD)).all()
    assert torch.equal(row["labels"], row["shift_labels"])


def test_the_length_is_the_least_multiple_that_holds_everything():
    layout = fr.lay_out_turns(random_turns([(61, 250, 67)]))
    assert fr.collate([layout])["input_ids"].shape == (1, 384)
    assert fr.collate([layout], block_size=64)["input_ids"].shape == (1, 384)
    assert fr.collate([layout], block_size=16)["input_ids"].shape == (1, 384)
    assert fr.collate([layout] * 2, 1024)["input_ids"].shape == (1, 1024)


def test_an_empty_row_has_no_target():
    row = fr.collate([], length=256)
    assert row["input_ids"].shape == (1, 256)
    assert row["labels"].eq(-100).all()
    assert row["target_weight"].sum() == 0
    assert fr.collate([])["input_ids"].shape == (1, 128)


@pytest.mark.parametrize("length", [128, 1024, 7168, 16384, 131072])
def test_the_number_of_targets_takes_few_values_and_never_the_rows_length(length):
    values = {n: round_up_targets(n, length) for n in range(0, length + 1, max(1, length // 997))}
    assert all(rounded >= max(1, n) for n, rounded in values.items())
    assert len(set(values.values())) <= 34
    assert length not in values.values()
    assert round_up_targets(length, length) > length


def test_a_tree_may_have_more_targets_than_tokens():
    row = fr.collate([fr.lay_out([Sample([1], [2, 3])] * 100)])
    assert row["labels"].shape[1] >= 200
    assert row["labels"].ne(-100).sum() == 200


def test_what_does_not_fit_is_named_and_never_cut():
    small, big = (fr.lay_out_turns(random_turns([(n, 10, 10)])) for n in (80, 300))
    with pytest.raises(
        ValueError, match=r"layout 1 has 320 tokens and does not fit into a row of 256 behind 100 tokens"
    ):
        fr.collate([small, big], 256)
    with pytest.raises(ValueError, match=r"layout 0 has 320 tokens .* row of 256; use a longer row, or fewer turns"):
        fr.collate([big], 256)
    with pytest.raises(ValueError, match=r"layout 2 has 100 tokens .* pack it into a row of its own"):
        fr.collate([small, small, small], 256)


def test_bad_rows_are_refused():
    layout = fr.lay_out_turns([([1], [2], [3])])
    with pytest.raises(ValueError, match="expected a length that is a multiple of 128, found 200; try 256"):
        fr.collate([layout], 200)
    with pytest.raises(ValueError, match="expected layouts, found Sample as number 0"):
        fr.collate([Sample([1], [2])])
    with pytest.raises(ValueError, match="collate: expected a list of layouts, found Layout"):
        fr.collate(layout)
    with pytest.raises(
        ValueError, match="collate: expected all tensors on one device, found layout 0 on cpu and layout 1"
    ):
        fr.collate([layout, layout.to("meta")])
