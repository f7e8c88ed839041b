"""From conversations to packed rows: every target's log-probability is what its sample alone has.

The whole way: messages, a chat template, `fr.encode`, `fr.split` at a length that forces splits, `Packer`, and
`fr.collate`. Log-probabilities are found again by conversation, turn and target, and held against the N samples, run
one by one through the model before it was patched.
"""

import random
from functools import lru_cache

import pytest
import torch

import flexreason as fr
from exact import EXACT
from flexreason.chat.encode import Encoder
from flexreason.data.pack import Packer
from flexreason.proof import oracle
from flexreason.proof.float64 import relative_l2, true_float64
from fuzzing import conversation
from models import tiny
from templating import answer, call, result, samples_of, trl_tokenizer, user

LENGTH = 640

TEMPLATES = ["qwen3", "glm4moe", "nemotron_3_nano", "qwen2_5", "gptoss"]
"""Reasoning dropped from history, an empty block left there, a block opened in the prompt, reasoning never read, and
history that closes differently from the last message."""


def words(draw, n):
    return " ".join(draw.choices(["harbour", "granite", "so", "12", "why?", "it is", "\n\n", "user"], k=n))


def long_chat(draw, turns, longest=60):
    """A conversation whose tree is longer than a row, though none of its samples is."""
    messages = []
    for _ in range(turns):
        messages += [user(words(draw, 3)), answer(words(draw, 3), words(draw, draw.randint(5, longest)))]
    return messages


def tool_loops(draw, loops):
    messages = []
    for _ in range(loops):
        messages.append(user(words(draw, 2)))
        for number in range(draw.randint(1, 2)):
            messages += [call(number, words(draw, 2), words(draw, 4)), result(number, words(draw, 2))]
        messages.append(answer(words(draw, 3), words(draw, 5)))
    return messages


def conversations():
    """Long ones that must be split, short ones beside them, tool loops, texts that mislead."""
    draw = random.Random(0)
    found = [long_chat(draw, turns) for turns in (6, 7, 8)]
    found += [long_chat(draw, 2, longest=25) for _ in range(4)]
    found += [tool_loops(draw, 2) for _ in range(2)]
    return found + [conversation(random.Random(number)) for number in (2, 4, 6)]


@lru_cache
def reference(template):
    """A model, the samples of every conversation, and for all of them what the untouched model says."""
    tokenizer = trl_tokenizer(template)
    encoder = Encoder(tokenizer)
    model = tiny("Qwen3", vocab_size=len(tokenizer)).double()
    kept = [(messages, samples_of(encoder, messages)) for messages in conversations()]
    with true_float64():
        alone = oracle.n_samples(model, [sample for _, samples in kept for sample in samples])
    return model, kept, alone


def documents_of(kept, tokenizer, length):
    """Number of a document -> (conversation, the turns of that conversation that it has, layout)."""
    documents = []
    for number, (messages, _) in enumerate(kept):
        found = fr.split(fr.encode(messages, tokenizer), length)
        documents += [(number, turns, part) for part, turns in zip(found.parts, found.turns, strict=True)]
    return documents


def packed(documents, length, seed):
    """The documents in another order, in rows: lists of their numbers."""
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    packer = Packer(length, pool=6, seed=seed)
    return list(packer.pack((number, len(documents[number][2])) for number in order))


def by_target(model, documents, rows, length):
    """(conversation, turn, target) -> log-probability, every one of which must come once; and the rows' sum."""
    found, total = {}, 0.0
    for numbers in rows:
        row = fr.collate([documents[number][2] for number in numbers], length)
        logprobs = fr.token_logprobs(model, row)
        total = total + logprobs.sum()
        count = {}
        for at, label in enumerate(row["labels"][0].tolist()):
            if label == -100:
                continue
            here, turn = int(row["target_document"][0, at]), int(row["target_turn"][0, at])
            of, turns, _ = documents[numbers[here]]
            key = (of, turns[turn], count.setdefault((here, turn), 0))
            count[here, turn] += 1
            assert key not in found
            found[key] = (label, logprobs[at])
    return found, total


@pytest.mark.parametrize("template", TEMPLATES)
def test_splitting_packing_and_order_change_no_log_probability(template):
    model, kept, alone = reference(template)
    documents = documents_of(kept, trl_tokenizer(template), LENGTH)
    rows = packed(documents, LENGTH, seed=0)
    places = {number: at for at, row in enumerate(rows) for number in row}
    parts = {}
    for number, (of, *_) in enumerate(documents):
        parts.setdefault(of, set()).add(places[number])
    assert len(documents) >= len(kept) + 3  # some were split
    assert any(len(rows_of) > 1 for rows_of in parts.values())  # and their parts stand in different rows
    assert max(len({documents[number][0] for number in row}) for row in rows) > 1

    expected = {
        (number, turn, at): label
        for number, (_, samples) in enumerate(kept)
        for turn, sample in enumerate(samples)
        for at, label in enumerate(sample.target_ids)
    }
    keys = list(expected)
    right = torch.cat(alone.logprobs)
    fr.patch(model)
    try:
        for seed in range(3):
            shuffled = packed(documents, LENGTH, seed)
            assert seed == 0 or shuffled != rows
            with true_float64(), torch.no_grad():
                found, _ = by_target(model, documents, shuffled, LENGTH)
            assert {key: label for key, (label, _) in found.items()} == expected
            ours = torch.stack([found[key][1] for key in keys])
            assert relative_l2([ours], [right]) <= EXACT
            assert float((ours - right).abs().max()) <= EXACT * float(right.abs().max())
    finally:
        fr.unpatch(model)


def test_gradients_over_all_rows_are_those_of_the_samples():
    model, kept, alone = reference("qwen3")
    documents = documents_of(kept, trl_tokenizer("qwen3"), LENGTH)
    rows = packed(documents, LENGTH, seed=5)
    model.zero_grad()
    fr.patch(model)
    try:
        with true_float64():
            _, total = by_target(model, documents, rows, LENGTH)
            (-total).backward()
    finally:
        fr.unpatch(model)
    assert alone.gradients
    for name, gradient in alone.gradients.items():
        assert relative_l2([model.get_parameter(name).grad], [gradient]) <= EXACT, name


def test_what_is_dropped_is_named_and_changes_nothing_else():
    """The last turn of a conversation is longer than a row: it is reported, and all others are there, as they were."""
    tokenizer, draw = trl_tokenizer("qwen3"), random.Random(3)
    messages = [*long_chat(draw, 5), user("more"), answer("so", words(draw, 350))]
    samples = samples_of(Encoder(tokenizer), messages)
    layout = fr.encode(messages, tokenizer)
    with pytest.raises(ValueError, match=r"1 of 6 samples are longer than a row of 640 by themselves \(turns 5;"):
        fr.split(layout, LENGTH)
    found = fr.split(layout, LENGTH, too_long="drop")
    assert found.dropped == [5]
    documents = [(0, turns, part) for part, turns in zip(found.parts, found.turns, strict=True)]
    model = tiny("Qwen3", vocab_size=len(tokenizer)).double()
    with true_float64(), torch.no_grad():
        alone = oracle.n_samples(model, samples[:5], gradients=False)
        fr.patch(model)
        ours, _ = by_target(model, documents, packed(documents, LENGTH, 0), LENGTH)
    assert set(ours) == {(0, turn, at) for turn in range(5) for at in range(len(samples[turn].target_ids))}
    for turn, right in enumerate(alone.logprobs):
        assert relative_l2([torch.stack([ours[0, turn, at][1] for at in range(len(right))])], [right]) <= EXACT
