"""What a layout promises, held against a trie of tuples that is too simple to be wrong."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import flexreason as fr
from flexreason import Role, Sample
from strategies import random_tree, random_turns, samples, turns


def text(sample):
    return (*sample.prompt_ids, *sample.target_ids)


def trie_in_storage_order(given_samples):
    """Every node of the trie, a node being the tuple of tokens from its root."""
    whole = [text(s) for s in given_samples]
    nodes = {t[: n + 1] for t in whole for n in range(len(t))}

    def visit(node):
        def rank(child):
            through = [i for i, t in enumerate(whole) if t[: len(child)] == child]
            size = sum(n[: len(child)] == child for n in nodes)
            return -len(through), -size, through[0]

        children = sorted((n for n in nodes if len(n) == len(node) + 1 and n[:-1] == node), key=rank)
        return [*([node] if node else []), *(x for child in children for x in visit(child))]

    return visit(())


short = st.integers(1, 4)


@given(samples(length=short))
@example(random_tree())
@example([Sample([1, 2], [3]), Sample([1], [2]), Sample([1, 2], [3]), Sample([4], [1])])
def test_lay_out_stores_the_prefix_tree_in_preorder_most_shared_child_first(given_samples):
    layout = fr.lay_out(given_samples)
    nodes = trie_in_storage_order(given_samples)
    index = {node: i for i, node in enumerate(nodes)}
    assert layout.input_ids.tolist() == [node[-1] for node in nodes]
    assert layout.position_ids.tolist() == [len(node) - 1 for node in nodes]
    subtree = [sum(other[: len(node)] == node for other in nodes) for node in nodes]
    assert layout.until.tolist() == [i + size for i, size in enumerate(subtree)]
    expected = [
        (index[text(s)[:n]], text(s)[n], turn)
        for turn, s in enumerate(given_samples)
        for n in range(len(s.prompt_ids), len(text(s)))
    ]
    found = [x.tolist() for x in (layout.target_source, layout.target_ids, layout.target_turn)]
    assert list(zip(*found, strict=True)) == expected
    assert layout.target_weight.tolist() == [1.0] * len(expected)
    through = [[i for i, s in enumerate(given_samples) if text(s)[: len(node)] == node] for node in nodes]
    assert layout.turn.tolist() == [line[0] for line in through]
    assert layout.sample_tokens == sum(len(text(s)) for s in given_samples)
    assert layout.n_samples == len(given_samples)


@given(samples(length=short))
def test_a_token_sees_its_ancestors_and_itself(given_samples):
    nodes = trie_in_storage_order(given_samples)
    mask = fr.dense_mask(fr.lay_out(given_samples)).tolist()
    assert mask == [[q[: len(kv)] == kv for kv in nodes] for q in nodes]


@given(samples())
@example(random_tree())
def test_unmerge_gives_any_samples_back_in_the_order_given(given_samples):
    assert fr.unmerge(fr.lay_out(given_samples)) == given_samples


@given(turns())
def test_unmerge_gives_the_samples_of_a_conversation_back(conversation):
    history, expected = [], []
    for h, t, r in conversation:
        expected.append(Sample(history + h, t + r))
        history = history + h + r
    assert fr.unmerge(fr.lay_out_turns(conversation)) == expected


@given(turns())
def test_unmerge_reads_only_until_ids_and_targets(conversation):
    layout = fr.lay_out_turns(conversation)
    blank = {name: torch.zeros_like(getattr(layout, name)) for name in ("position_ids", "turn", "role")}
    assert fr.unmerge(fr.Layout(**{**vars(layout), **blank})) == fr.unmerge(layout)


@given(turns())
def test_lay_out_turns_is_the_papers_layout(conversation):
    """Trunk h, r_in, h, ... first and contiguous; then t and r_out of the last turn, of the one before, ..."""
    layout = fr.lay_out_turns(conversation)
    last = len(conversation) - 1
    pieces = []  # (ids, turn, role, position)
    depth = 0
    forks = []
    for i, (h, t, r) in enumerate(conversation):
        pieces.append((h, i, Role.PROMPT, depth))
        depth += len(h)
        forks.append(depth)
        if i < last:
            pieces.append((r, i, Role.CONTEXT if t else Role.CONTEXT | Role.RESPONSE, depth))
            depth += len(r)
    for i, (_, t, r) in reversed(list(enumerate(conversation))):
        if t:
            pieces.append((t, i, Role.REASONING, forks[i]))
            pieces.append((r, i, Role.RESPONSE, forks[i] + len(t)))
        elif i == last:
            pieces.append((r, i, Role.CONTEXT | Role.RESPONSE, forks[i]))
    assert layout.input_ids.tolist() == [x for ids, *_ in pieces for x in ids]
    assert layout.turn.tolist() == [turn for ids, turn, *_ in pieces for _ in ids]
    assert layout.role.tolist() == [role for ids, _, role, _ in pieces for _ in ids]
    assert layout.position_ids.tolist() == [start + n for ids, _, _, start in pieces for n in range(len(ids))]


@given(turns(max_turns=4))
def test_lay_out_turns_stores_no_fewer_tokens_than_the_tree_and_the_same_samples(conversation):
    paper = fr.lay_out_turns(conversation)
    assert len(fr.lay_out(fr.unmerge(paper))) <= len(paper)


def test_lay_out_merges_what_turns_begin_alike_with_and_lay_out_turns_does_not():
    conversation = [([1], [7, 2], [7, 3]), ([4], [5], [6])]  # t and r of the first turn begin alike
    paper = fr.lay_out_turns(conversation)
    assert len(fr.lay_out(fr.unmerge(paper))) == len(paper) - 1


def test_roles_are_the_union_and_turns_the_one_said_else_the_first_samples():
    said = Sample([1, 2, 3], [4], prompt_roles=[1, 4, 1], prompt_turns=[-1, 5, -1])
    unsaid = Sample([1], [2, 3, 4, 9], target_roles=[2, 2, 8, 8])
    layout = fr.lay_out([unsaid, said])
    assert layout.input_ids.tolist() == [1, 2, 3, 4, 9]
    roles = [Role.PROMPT, Role.CONTEXT | Role.REASONING, Role.PROMPT | Role.REASONING, Role.RESPONSE, Role.RESPONSE]
    assert layout.role.tolist() == roles
    assert layout.turn.tolist() == [0, 5, 0, 0, 0]
    assert fr.lay_out([said, unsaid]).turn.tolist() == [0, 5, 0, 0, 1]


def test_when_two_samples_say_a_turn_the_first_has_it():
    a, b = (Sample([1, 2], [3], prompt_turns=turn) for turn in ([4, -1], [6, 6]))
    assert fr.lay_out([a, b]).turn.tolist() == [4, 6, 0]


def test_tensors_arrays_and_tuples_are_taken_as_lists_are():
    expected = fr.lay_out([Sample([1, 2], [3])])
    for kind in (tuple, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32).numpy()):
        assert torch.equal(fr.lay_out([Sample(kind([1, 2]), kind([3]))]).input_ids, expected.input_ids)


def test_a_thousand_turns_need_no_recursion():
    conversation = random_turns([(1, 1, 1)] * 1000)
    layout = fr.lay_out(fr.unmerge(fr.lay_out_turns(conversation)))
    assert layout.n_samples == 1000


def test_a_layout_shows_its_size_and_moves_as_a_whole():
    layout = fr.lay_out_turns(random_turns([(3, 4, 2), (3, 4, 2)]))
    assert repr(layout) == "Layout(20 tokens, 12 targets, 2 samples of 23 tokens)"
    moved = layout.to("meta")
    assert {tensor.device.type for tensor in vars(moved).values()} == {"meta"}
    with pytest.raises(AttributeError):
        layout.until = layout.turn


@pytest.mark.parametrize(
    ("given_samples", "words"),
    [
        ([], "lay_out: expected at least one sample, found none"),
        ([Sample([1], [2]), Sample([], [2])], "sample 1: prompt_ids is empty; expected at least one token"),
        ([Sample([1], [])], "sample 0: target_ids is empty; expected at least one token"),
        ([Sample([1, -3], [2])], r"sample 0: prompt_ids\[1\]: expected an integer from 0 to 2147483647, found -3"),
        ([Sample([1], [2, 2**31])], r"sample 0: target_ids\[1\]: expected an integer from 0 .* found 2147483648"),
        ([Sample([1], [2**70])], r"sample 0: target_ids\[0\]: expected an integer up to 2147483647, found 1180591"),
        ([Sample([1, 2.5], [2])], r"sample 0: prompt_ids\[1\]: expected an integer, found 2.5"),
        ([Sample("ab", [2])], "sample 0: prompt_ids: expected a list or 1-D tensor of token ids, found str"),
        ([Sample([[1, 2]], [2])], r"sample 0: prompt_ids\[0\]: expected an integer, found \[1, 2\]"),
        ([Sample(None, [2])], "sample 0: prompt_ids: expected a list or 1-D tensor of token ids, found NoneType"),
        ([Sample(torch.ones(2), [2])], "sample 0: prompt_ids: expected integers, found a tensor of torch.float32"),
        ([Sample(torch.ones(1, 2).int(), [2])], r"sample 0: prompt_ids: expected one dimension, found shape \(1, 2\)"),
        ([Sample([1], [2, 3], target_roles=[8])], r"expected target_roles as long as target_ids \(2\), found 1"),
        ([Sample([1], [2], target_roles=[[8]])], r"sample 0: target_roles\[0\]: expected an integer, found \[8\]"),
        ([Sample([1], [2], prompt_roles=[16])], r"sample 0: prompt_roles\[0\]: expected flags among .* found 16"),
        ([Sample([1], [2], prompt_turns=[-2])], r"sample 0: prompt_turns\[0\]: expected an integer from -1"),
        ([([1], [2])], r"sample 0: expected fr.Sample\(prompt_ids, target_ids\), found tuple"),
        (
            [Sample(torch.tensor([1]), torch.tensor([2], device="meta"))],
            "sample 0: expected all tensors on one device, found prompt_ids on cpu and target_ids on meta",
        ),
    ],
)
def test_bad_samples_are_named(given_samples, words):
    with pytest.raises(ValueError, match=words):
        fr.lay_out(given_samples)


@pytest.mark.parametrize(
    ("conversation", "words"),
    [
        ([], r"lay_out_turns: expected at least one turn \(h, t, r\), found none"),
        ([([1], [2], [3]), ([], [2], [3])], r"turn 1: h \(the prompt\) is empty"),
        ([([1], [2], [])], r"turn 0: r \(the response\) is empty"),
        ([([1], [2], [-1])], r"turn 0: r\[0\]: expected an integer from 0"),
        ([([1], [2])], r"turn 0: expected \(h, t, r\), found"),
        ([([1], torch.tensor([2], device="meta"), torch.tensor([3]))], "turn 0: expected all tensors on one device"),
    ],
)
def test_bad_turns_are_named(conversation, words):
    with pytest.raises(ValueError, match=words):
        fr.lay_out_turns(conversation)


def test_a_layout_of_ragged_tensors_is_refused():
    layout = vars(fr.lay_out([Sample([1], [2])]))
    with pytest.raises(ValueError, match=r"expected until of shape \[2\] like input_ids, found \[1\]"):
        fr.Layout(**{**layout, "until": layout["until"][:1]})
    with pytest.raises(ValueError, match=r"expected until of torch\.int32, found torch\.int64"):
        fr.Layout(**{**layout, "until": layout["until"].long()})
