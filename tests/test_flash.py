"""What is asked of torch's variable-length flash attention is exactly the tree.

The kernels run on GPUs alone, where `tests/gpu` holds them against attention written out. Here their place is taken by
what they are documented to compute, in plain operations and any precision, so that every call and every merge is
checked; and torch's operators are called on tensors without storage.
"""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import flexreason as fr
from attention import inputs, rows, written_out
from flexreason.attention import flash, segments
from flexreason.attention.cover import prefixes
from flexreason.proof.float64 import relative_l2
from flexreason.tree.chains import chains
from strategies import random_tree, random_turns, samples


def sequences(q, k, offsets_q, offsets_k, longest_q, longest_k, causal, left, right):
    """(queries, keys, who sees whom) of every sequence; raises on what the kernels would take amiss."""
    for x, offsets, longest in ((q, offsets_q, longest_q), (k, offsets_k, longest_k)):
        assert x.dim() == 3
        assert x.stride(-1) == 1
        assert offsets.dtype == torch.int32
        assert offsets[0] == 0
        assert offsets[-1] == len(x)
        assert offsets.diff().min() > 0
        assert longest == max(2, int(offsets.diff().max()))
    assert len(offsets_q) == len(offsets_k)
    for i in range(len(offsets_q) - 1):
        of_q, of_k = (slice(int(offsets[i]), int(offsets[i + 1])) for offsets in (offsets_q, offsets_k))
        n_q, n_k = of_q.stop - of_q.start, of_k.stop - of_k.start
        behind = torch.arange(n_q)[:, None] + n_k - n_q - torch.arange(n_k)  # how far a key stands behind its query
        seen = torch.ones(n_q, n_k, dtype=torch.bool)
        if causal or right >= 0:
            assert n_k >= n_q
            seen &= behind >= 0
        if left >= 0:
            seen &= behind <= left
        yield of_q, of_k, seen


def scores(q, k, seen, scale):
    raw = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
    return raw.masked_fill(~seen, -torch.inf)


def forward(q, k, v, oq, ok, lq, lk, dropout, causal, debug, *, scale, window_size_left=-1, window_size_right=-1):
    assert dropout == 0
    assert not debug
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], len(q))
    for i, j, seen in sequences(q, k, oq, ok, lq, lk, causal, window_size_left, window_size_right):
        s = scores(q[i], k[j], seen, scale)
        lse[:, i] = s.logsumexp(-1)
        out[i] = torch.einsum("hqk,khd->qhd", s.softmax(-1), v[j].repeat_interleave(q.shape[1] // v.shape[1], 1))
    return out, lse, None, None, None


def backward(
    grad,
    q,
    k,
    v,
    out,
    lse,
    oq,
    ok,
    lq,
    lk,
    dropout,
    causal,
    random,
    unused,
    *,
    scale,
    window_size_left=-1,
    window_size_right=-1,
):
    assert grad.shape == q.shape == out.shape
    assert grad.stride(-1) == out.stride(-1) == 1
    assert lse.shape == (q.shape[1], len(q))
    assert lse.is_contiguous()
    assert random.dtype == torch.uint64
    n = q.shape[1] // k.shape[1]
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for i, j, seen in sequences(q, k, oq, ok, lq, lk, causal, window_size_left, window_size_right):
        weights = (scores(q[i], k[j], seen, scale) - lse[:, i, None]).exp()
        by_weight = torch.einsum("qhd,khd->hqk", grad[i], v[j].repeat_interleave(n, 1))
        by_score = weights * (by_weight - (grad[i] * out[i]).sum(-1).T[..., None]) * scale
        dq[i] = torch.einsum("hqk,khd->qhd", by_score, k[j].repeat_interleave(n, 1))
        dk[j] = torch.einsum("hqk,qhd->khd", by_score, q[i]).unflatten(1, (-1, n)).sum(2)
        dv[j] = torch.einsum("hqk,qhd->khd", weights, grad[i]).unflatten(1, (-1, n)).sum(2)
    return dq, dk, dv


@pytest.fixture
def as_documented(monkeypatch):
    """The kernels' place is taken, and every row is computed through them, sums in fp64."""
    monkeypatch.setattr(flash, "_forward", forward)
    monkeypatch.setattr(flash, "_backward", backward)
    monkeypatch.setattr(flash, "HIGH", torch.float64)
    monkeypatch.setattr(segments, "route", lambda *args: "flash")


def check(row, heads=4, groups=2, sinks=None, **limits):
    """Output and gradients of what is not padding; padding gives and takes nothing."""
    real = row["document"][0] >= 0
    q, k, v = inputs(row["until"].shape[1], heads, groups)
    learned = [q, k, v] + ([] if sinks is None else [sinks])
    found = segments.attend(q, k, v, segments.prepare(row, **limits), 0.4, sinks=sinks)
    expected = written_out(q, k, v, fr.dense_mask(row, **limits), 0.4, sinks=sinks)
    assert not found[:, ~real].any()
    torch.testing.assert_close(found[:, real], expected[:, real], rtol=0, atol=1e-12)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=expected.dtype)
    upstream[:, ~real] = 0
    for a, b in zip(*(torch.autograd.grad(out, learned, upstream) for out in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


LIMITS = [{}, {"window": 1}, {"window": 7}, {"window": 60}, {"chunk": 50}, {"window": 20, "chunk": 32}]


@pytest.mark.usefixtures("as_documented")
@pytest.mark.parametrize("name", rows())
@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("sinks", [False, True])
def test_output_and_gradients_are_those_of_attention_written_out(name, limits, sinks):
    learned = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    check(rows()[name], sinks=learned if sinks else None, **limits)


@pytest.mark.usefixtures("as_documented")
def test_heads_in_groups_are_the_same(monkeypatch):
    row = fr.collate([fr.lay_out_turns(random_turns([(20, 30, 10)] * 6))])
    q, k, _ = inputs(row["until"].shape[1], 6, 2, size=8)
    work = segments.prepare(row).calls
    for at_once, groups in ((6, [(6, 2)]), (4, [(3, 1)] * 2), (2, [(2, 1), (1, 1)] * 2), (0, [(1, 1)] * 6)):
        monkeypatch.setattr(flash, "AT_ONCE", at_once * work.rows * 32)  # the kernels round heads up to 32
        found = [(of_q.stop - of_q.start, of_k.stop - of_k.start) for of_q, of_k in flash._heads(q, k, work)]
        assert found == groups
        check(row, heads=6, groups=2)
    check(row, heads=6, groups=6)


@pytest.mark.usefixtures("as_documented")
def test_documents_and_branches_of_one_token():
    one = fr.lay_out([fr.Sample([1], [2])])
    forked = fr.lay_out([fr.Sample([1, 2, 3], [n]) for n in range(4, 9)])
    check(fr.collate([one, forked, one]))
    work = segments.prepare(fr.collate([one] * 3)).calls
    assert work.first.queries.longest == 2


@pytest.mark.usefixtures("as_documented")
def test_limits_beyond_all_positions_are_none():
    row = rows()["paper"]
    for limits in ({"window": 10**6}, {"chunk": 10**6}, {"window": 2**32}):
        assert segments.prepare(row, **limits).calls.rounds
        check(row, **limits)


@given(st.lists(samples(), min_size=1, max_size=3), st.sampled_from(LIMITS), st.sampled_from([flash.GPU, (1, 1, 1)]))
@example([random_tree()], {}, (1, 1, 1))
def test_any_tree_is_computed_exactly(documents, limits, cost):
    with pytest.MonkeyPatch.context() as patch:
        as_documented.__wrapped__(patch)
        patch.setattr(flash, "GPU", flash.Cost(*cost))
        check(fr.collate([fr.lay_out(document) for document in documents]), heads=2, groups=1, **limits)


def in_float32(kernel):
    """A kernel as those for bfloat16 are: sums in float32, and what it gives rounded, but for the log-sum-exp."""

    def rounded(*args, **more):
        found = kernel(
            *(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args), **more
        )
        return tuple(x.to(args[0].dtype) if x is not None and x.dim() == 3 else x for x in found)

    return rounded


@pytest.mark.parametrize("turns", [[(61, 150, 67), (30, 0, 20), (64, 64, 64)], [(20, 10, 10)] * 30])
def test_what_is_merged_from_rounded_parts_errs_little(turns, monkeypatch):
    """Less than attention written out in bfloat16, and at most 1.6 times what rounding the exact result once would."""
    monkeypatch.setattr(flash, "_forward", in_float32(forward))
    monkeypatch.setattr(flash, "_backward", in_float32(backward))
    monkeypatch.setattr(segments, "route", lambda *args: "flash")
    row = fr.collate([fr.lay_out_turns(random_turns(turns))], block_size=1)
    work, visible = segments.prepare(row), fr.dense_mask(row)
    low = [x.detach().bfloat16() for x in inputs(row["until"].shape[1], heads=8, groups=2, size=64)]
    upstream = torch.randn(1, len(visible), 8, 64, generator=torch.Generator().manual_seed(1)).bfloat16()

    def outcome(attend, dtype):
        tensors = [x.to(dtype).requires_grad_() for x in low]
        out = attend(*tensors)
        return [out.detach(), *torch.autograd.grad(out, tensors, upstream.to(out.dtype))]

    def naive(q, k, v):
        return written_out(q, k, v, visible, 0.125)

    right = outcome(naive, torch.float64)
    ours = outcome(lambda q, k, v: segments.attend(q, k, v, work, 0.125), torch.bfloat16)
    theirs, once = outcome(naive, torch.bfloat16), [x.bfloat16() for x in right]
    for a, b, c, expected in zip(ours, theirs, once, right, strict=True):
        error = relative_l2([a], [expected])
        assert error < relative_l2([b], [expected])
        assert error < 1.6 * relative_l2([c], [expected])


def test_a_conversation_takes_few_rounds_and_each_copies_no_more_keys_than_it_has_tokens():
    layout = fr.lay_out_turns(random_turns([(150, 600, 60)] * 60))
    until, position = layout.until.tolist(), layout.position_ids.tolist()
    work = flash.calls(until, position, None, None, torch.device("cpu"))
    assert 1 < len(work.rounds) <= 1 + math.log2(60)
    assert work.first.keys.index is None
    assert all(call.keys.index is None or len(call.keys.index) <= len(layout) for call in work.rounds)
    assert work.rounds[0].queries.index is None


def test_rounds_hold_every_rectangle_once_and_disjoint_queries():
    layout = fr.lay_out([*random_tree(), *random_tree(1), *random_tree(2)])
    rectangles = prefixes(chains(layout.until.tolist(), layout.position_ids.tolist()), flash.Cost(1, 1, 1))
    found = flash.rounds(rectangles)
    assert sorted(r for disjoint in found for r in disjoint) == sorted(rectangles)
    for disjoint in found:
        assert all(a.q_stop <= b.q_start for a, b in pairwise(disjoint))


@pytest.mark.parametrize("limits", [{}, {"window": 60}, {"chunk": 50}], ids=str)
def test_torch_takes_the_calls(limits):
    """Its operators' arguments and shapes; whether the kernels take them is for a GPU to say."""
    row = rows()["packed"]
    n = int((row["document"] >= 0).sum())
    until, position = (row[name][0, :n].tolist() for name in ("until", "position_ids"))
    work = flash.calls(until, position, limits.get("window"), limits.get("chunk"), torch.device("meta"))
    q, k, v = (x.to("meta") for x in inputs(n, heads=4, groups=2, size=16, dtype=torch.bfloat16))
    out, lse = flash.forward(q, k, v, work, 0.25)
    assert (out.shape, out.dtype, lse.shape) == (q.shape, q.dtype, q.shape[:3])
    gradients = flash.backward(out, q, k, v, out, lse, work, 0.25)
    assert [x.shape for x in gradients] == [x.shape for x in (q, k, v)]


def test_more_sequences_than_a_grid_has_blocks_are_refused():
    n = flash.SEQUENCES
    until, position = [*range(1, n + 1)], [0] * n  # documents of one token
    assert flash.calls(until, position, None, None, torch.device("cpu")).rounds == ()
    with pytest.raises(ValueError, match="takes 65,536 sequences, and flash attention has 65,535 at most"):
        flash.calls([*until, n + 1], [*position, 0], None, None, torch.device("cpu"))
    path = [2 * n + 2] * (2 * n + 2), [*range(2 * n + 2)]
    with pytest.raises(ValueError, match="takes 65,536 sequences"):
        flash.calls(*path, None, 2, torch.device("cpu"))


def test_kernels_that_are_not_there_are_said_by_name():
    q = torch.randn(1, 2, 16, 32)
    assert flash.unfit(q, q, False) == "flash attention has no float32"
    assert flash.unfit(q.bfloat16()[..., :12], q, False) == "flash attention has no head size of 12"
    told = flash.unfit(*[q.bfloat16()] * 2, False)  # torch has none for CPUs
    assert told.startswith(
        "flash attention here raised NotImplementedError: Could not run 'aten::_flash_attention_forward'"
    )


def fault(windowed=False):
    return flash._fault.__wrapped__(torch.device("cpu"), torch.float32, 16, 2, windowed, None)


def test_kernels_that_compute_something_else_are_found_out(monkeypatch):
    """As one would that leaves a window out, or what was merged; and one without windows is asked about none."""
    monkeypatch.setattr(flash, "_forward", forward)
    monkeypatch.setattr(flash, "_backward", backward)
    with torch.inference_mode():
        assert fault() == fault(windowed=True) == ""
    monkeypatch.setattr(flash, "_forward", lambda *args, **more: forward(*args, **{**more, "window_size_left": -1}))
    assert fault() == ""
    assert fault(windowed=True) == "flash attention here computes something else"
    monkeypatch.setattr(flash, "_forward", forward)
    monkeypatch.setattr(
        flash, "_backward", lambda g, q, k, v, out, *args, **more: backward(g, q, k, v, out * 0, *args, **more)
    )
    assert fault() == "flash attention here computes something else"


def test_kernels_that_raise_are_said_but_a_full_card_is_not_taken_for_that(monkeypatch):
    def raises(error):
        def kernel(*args, **more):
            raise error

        monkeypatch.setattr(flash, "_forward", kernel)

    raises(AssertionError())
    assert fault() == "flash attention here raised AssertionError: "
    raises(torch.OutOfMemoryError("full"))
    with pytest.raises(torch.OutOfMemoryError):
        fault()
