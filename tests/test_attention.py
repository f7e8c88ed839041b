"""Every backend against attention written out with a matrix: forward, backward, and what it holds in memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

import flexreason as fr
from attention import inputs, rows, written_out
from flexreason.attention import dense, flex, pieces, segments
from flexreason.attention.registry import choose_backend
from flexreason.tree.mask import mask_mod
from strategies import random_turns, samples
from watch import Largest

LIMITS = [{}, {"window": 1}, {"window": 60}, {"chunk": 50}]
EXTRAS = ["plain", "softcap", "sinks", "values of another size"]


@pytest.mark.parametrize("name", rows())
@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("backend", [segments, dense])
def test_output_and_gradients_are_those_of_attention_written_out(name, limits, extra, backend):
    row = rows()[name]
    q, k, v = inputs(row["until"].shape[1], value_size=12 if extra == "values of another size" else None)
    more = {"softcap": 1.5} if extra == "softcap" else {}
    learned = [q, k, v]
    if extra == "sinks":
        more["sinks"] = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
        learned.append(more["sinks"])
    table = backend.prepare(row, "interval", limits.get("window"), limits.get("chunk"))
    found = backend.attend(q, k, v, table, 0.4, **more)
    expected = written_out(q, k, v, fr.dense_mask(row, **limits), 0.4, **more)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert found.is_contiguous() or extra != "plain"  # so that a layer's view of it is no copy
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=expected.dtype)
    for a, b in zip(
        torch.autograd.grad(found, learned, upstream), torch.autograd.grad(expected, learned, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@settings(max_examples=25)
@given(st.lists(samples(), min_size=1, max_size=2), st.sampled_from([None, 3, 60]))
def test_segments_is_exact_on_any_tree(documents, window):
    row = fr.collate([fr.lay_out(document) for document in documents])
    q, k, v = inputs(row["until"].shape[1], heads=2, groups=1, size=4)
    found = segments.attend(q, k, v, segments.prepare(row, window=window), 0.5)
    expected = written_out(q, k, v, fr.dense_mask(row, window=window), 0.5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    upstream = torch.ones_like(expected).cumsum(1)
    for a, b in zip(*(torch.autograd.grad(out, [q, k, v], upstream) for out in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_the_tiled_route_is_exact_however_small_its_tiles(monkeypatch):
    monkeypatch.setattr(pieces, "TILED_SCORES", 2000)
    row = rows()["paper"]
    q, k, v = inputs(row["until"].shape[1])
    found = segments.attend(q, k, v, segments.prepare(row), 0.4, softcap=2.0)
    expected = written_out(q, k, v, fr.dense_mask(row), 0.4, softcap=2.0)
    for a, b in zip(*(torch.autograd.grad(out.sin().sum(), [q, k, v]) for out in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_slower_route_is_said_once_by_name(caplog):
    segments.say_route.cache_clear()
    row = rows()["tree"]
    q, k, v = inputs(row["until"].shape[1])
    for _ in range(2):
        segments.attend(q, k, v, segments.prepare(row), 0.4, softcap=2.0)
        segments.attend(q, k, v, segments.prepare(row), 0.4)
    assert caplog.messages == ["segments: attention takes the slower route, tiled: softcap"]


def test_the_route_is_said_by_name():
    q, k, v = inputs(16)
    assert segments.route(q, k, v, None) == "fused"
    assert segments.route(q, k, v, 30.0) == "tiled: softcap"
    assert segments.route(q, k, torch.cat([v, v], -1), None) == "tiled: values and keys differ in head size"
    assert segments.route(*(x.to("meta") for x in (q, k, v)), None) == "tiled: no fused kernel for meta"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_low_precision_errs_no_more_than_attention_written_out(dtype, softcap):
    """Relative L2 error against fp64 of output and gradients, median over 8 seeds, at most 1.5 times the naive one."""
    row = rows()["paper"]
    visible, work = fr.dense_mask(row), segments.prepare(row)
    ratios = []
    for seed in range(8):
        exact = inputs(row["until"].shape[1], seed=seed)
        low = [x.detach().to(dtype).requires_grad_() for x in exact]
        outcomes = []
        for attend, tensors in (
            (
                lambda q, k, v: written_out(q, k, v, visible, 0.4, softcap),
                [x.detach().double().requires_grad_() for x in low],
            ),
            (lambda q, k, v: written_out(q, k, v, visible, 0.4, softcap), low),
            (lambda q, k, v: segments.attend(q, k, v, work, 0.4, softcap), low),
        ):
            out = attend(*tensors)
            upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(out.dtype)
            found = [out, *torch.autograd.grad(out, tensors, upstream)]
            outcomes.append(torch.cat([x.detach().double().flatten() for x in found]))
        right, naive, ours = outcomes
        ratios.append(float((ours - right).norm() / (naive - right).norm()))
    assert sorted(ratios)[4] <= 1.5, ratios


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_segments_makes_no_tensor_of_s_by_s_forward_or_backward(softcap, monkeypatch):
    monkeypatch.setattr(pieces, "TILED_SCORES", 2**17)
    row = fr.collate([fr.lay_out_turns(random_turns([(200, 300, 100)] * 5))])
    length = row["until"].shape[1]

    def largest(backend):
        q, k, v = inputs(length, heads=1, groups=1, size=4, dtype=torch.float32)
        with Largest() as seen:
            out = backend.attend(q, k, v, backend.prepare(row, "interval", None, None), 0.4, softcap)
            out.sum().backward()
        return seen.elements

    assert largest(segments) <= max(length * segments.TILE, 2**17)
    assert largest(dense) >= length**2


def compiled_rows():
    paper = fr.lay_out_turns(random_turns([(61, 150, 67), (30, 0, 20), (64, 64, 64)]))
    return fr.collate([paper, fr.lay_out_turns(random_turns([(20, 30, 40)]))])


@pytest.mark.parametrize(
    ("mask", "limits", "block_size", "softcap"),
    [
        ("interval", {}, 128, None),
        ("turn_role", {}, 128, None),
        ("interval", {"window": 100}, 128, None),
        ("interval", {"window": 60}, (128, 64), 2.0),
    ],
)
def test_compiled_flex_forward_is_dense_on_cpu(mask, limits, block_size, softcap):
    """Compiled, since eager flex ignores the block lists and would prove nothing about them."""
    row = compiled_rows()
    q, k, v = inputs(row["until"].shape[1], size=16, dtype=torch.float32)
    visible = fr.block_mask(row, block_size=block_size, mask=mask, **limits)
    with torch.no_grad():
        found = flex.attend(q, k, v, visible, 0.25, softcap)
        expected = dense.attend(q, k, v, fr.dense_mask(row, **limits), 0.25, softcap)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_compiled_kernel_does_read_the_lists():
    """So that the test above can fail: with a block taken from the lists, the output differs."""
    row = compiled_rows()
    q, k, v = inputs(row["until"].shape[1], size=16, dtype=torch.float32)
    visible = fr.block_mask(row)
    at = int(visible.full_kv_num_blocks.argmax())
    visible.full_kv_num_blocks[0, 0, at] -= 1
    with torch.no_grad():
        found = flex.attend(q, k, v, visible, 0.25)
        expected = dense.attend(q, k, v, fr.dense_mask(row), 0.25)
    block = slice(at * 128, at * 128 + 128)
    assert not torch.allclose(found[:, block], expected[:, block], rtol=1e-3, atol=1e-3)


def test_flex_on_lists_made_from_the_turn_role_rule_alone_finds_the_same():
    row = compiled_rows()
    length = row["until"].shape[1]
    q, k, v = inputs(length, size=16, dtype=torch.float32)
    by_words = create_block_mask(mask_mod(row, mask="turn_role"), 1, 1, length, length, device="cpu")
    with torch.no_grad():
        found = flex.attend(q, k, v, by_words, 0.25)
        torch.testing.assert_close(found, flex.attend(q, k, v, fr.block_mask(row), 0.25), rtol=0, atol=0)


def test_flex_refuses_what_it_cannot_do_on_cpu():
    row = compiled_rows()
    q, k, v = inputs(row["until"].shape[1], dtype=torch.float32)
    with pytest.raises(NotImplementedError, match='"flex" has no backward on CPU: use backend="segments" to train'):
        flex.attend(q, k, v, fr.block_mask(row), 0.4)
    with pytest.raises(NotImplementedError, match="no attention sinks on CPU"), torch.no_grad():
        flex.attend(q, k, v, fr.block_mask(row), 0.4, sinks=torch.zeros(4))


def test_flex_raises_where_torch_would_fall_back_to_scores_of_s_by_s(monkeypatch):
    """After too many recompiles torch runs eager flex with one warning; here that is an error."""
    monkeypatch.setattr(flex, "KERNELS", 1)
    torch._dynamo.reset()
    flex._compiled.cache_clear()
    row = compiled_rows()

    def attend(size):
        q, k, v = inputs(row["until"].shape[1], size=size, dtype=torch.float32)
        with torch.no_grad():
            flex.attend(q, k, v, fr.block_mask(row, block_size=2 * size), 0.25)

    attend(16)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        attend(32)
    torch._dynamo.reset()
    flex._compiled.cache_clear()


def test_auto_is_flex_on_gpus_and_what_it_cannot_do_there_is_refused():
    def chosen(device, dtype, wanted="auto"):
        return choose_backend(wanted, torch.device(device), dtype)

    assert [chosen("cuda", dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)] == [
        *("flex", "flex", "segments")
    ]
    assert chosen("cpu", torch.float32) == chosen("mps", torch.float32) == "segments"
    assert chosen("cuda", torch.float64, "flex") == "flex"
    assert flex.unfit(torch.device("cuda"), torch.float64) == 'backend "flex" has no float64 on GPUs'
    assert not flex.unfit(torch.device("cuda"), torch.float32, 2**31 - 1)
    told = flex.unfit(torch.device("cuda"), torch.bfloat16, 2**31)
    assert (
        told == 'backend "flex" on GPUs has addresses of 32 bits, too few for rows of 2,147,483,648 numbers in a layer'
    )
    assert not flex.unfit(torch.device("cpu"), torch.float64)


def test_how_far_a_tensor_reaches_in_memory():
    whole = torch.zeros(2, 5, 12)
    assert flex.reach(whole) == 120
    assert flex.reach(whole.transpose(1, 2)) == 120
    assert flex.reach(whole[..., :4]) == 120 - 8  # a part of one projection
