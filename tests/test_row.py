"""Rows: what `collate` makes of layouts."""

import copy
import pickle
import tempfile

import pytest
import torch
from accelerate.utils import concatenate, convert_to_fp32, find_batch_size, send_to_device, slice_tensors
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

import flexreason as fr
from flexreason import Role, Sample
from flexreason.tree.row import NoMask, round_up_targets
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
    with pytest.raises(ValueError, match=r"layout 0 has 320 tokens .* row of 256; use a longer row, or fr.split it"):
        fr.collate([big], 256)
    with pytest.raises(ValueError, match=r"layout 2 has 100 tokens .* put fewer into a row, or let fr.Rows fill rows"):
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


# --- the mask that says that the model is not patched


def a_mask():
    return fr.collate([fr.lay_out_turns([([1], [2], [3])])])["attention_mask"]


def test_the_mask_stays_what_it_is_wherever_rows_go():
    mask = a_mask()
    kept = [mask.to(torch.bfloat16), mask.to("meta"), mask.clone(), mask.detach(), mask[:1], mask.contiguous()]
    kept += [copy.copy(mask), copy.deepcopy(mask), torch.cat([mask, mask]), mask.requires_grad_(False)]
    kept += [send_to_device({"m": mask}, "cpu")["m"], concatenate([{"m": mask}, {"m": mask}])["m"]]
    kept += [slice_tensors({"m": mask}, slice(0, 1))["m"], convert_to_fp32({"m": mask.half()})["m"]]
    for found in kept:
        assert type(found) is NoMask
        assert found.dim() == 4
        assert not found.numel()
    for found in (mask.sum(), mask.reshape(-1), mask[0]):
        assert type(found) is torch.Tensor
    assert find_batch_size({"m": mask}) == 1
    assert torch.equal(mask, torch.empty(1, 1, 0, 0))


def test_what_is_saved_is_a_plain_tensor(tmp_path):
    """torch.load takes no classes of others, and who reads it need not have us."""
    row = fr.collate([fr.lay_out_turns([([1], [2], [3])])])
    torch.save(row, tmp_path / "row.pt")
    for found in (torch.load(tmp_path / "row.pt", weights_only=True), pickle.loads(pickle.dumps(row))):
        assert type(found["attention_mask"]) is torch.Tensor
        assert all(torch.equal(found[key], row[key]) for key in row)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_hand_the_mask_over(context):
    layouts = [fr.lay_out_turns([([1], [2], [3])])] * 2
    asked = {"num_workers": 1, "multiprocessing_context": context, "collate_fn": fr.Collator(128)}
    assert [type(row["attention_mask"]) for row in DataLoader(layouts, **asked)] == [NoMask, NoMask]


def test_ranks_hand_the_mask_on():
    """In a group of one, over gloo, as accelerate does between ranks."""
    with tempfile.NamedTemporaryFile() as file:
        torch.distributed.init_process_group("gloo", init_method=f"file://{file.name}", rank=0, world_size=1)
    try:
        mask, found = a_mask(), [a_mask()]
        torch.distributed.broadcast(mask, 0)
        torch.distributed.all_gather(found, mask)
        told = [mask]
        torch.distributed.broadcast_object_list(told, 0)
    finally:
        torch.distributed.destroy_process_group()
    assert (type(mask), type(found[0]), told[0].shape) == (NoMask, NoMask, (1, 1, 0, 0))


def test_whoever_uses_the_mask_is_told_to_patch():
    """In the ways of attention: added to scores, handed to the kernel, cut to the keys."""
    mask, scores = a_mask(), torch.zeros(1, 2, 8, 8)
    for use in (
        lambda: scores + mask,
        lambda: mask + scores,
        lambda: scores.masked_fill(mask.bool(), 0),
        lambda: torch.where(mask > 0, scores, scores),
        lambda: nn.functional.scaled_dot_product_attention(scores, scores, scores, attn_mask=mask),
        lambda: mask[:, :, :, :8],
        lambda: mask.expand(1, 2, 8, 8),
    ):
        with pytest.raises(
            RuntimeError, match=r"^row: this model is not patched, .*: call fr\.patch\(model\) first \("
        ):
            use()
