"""Conversations and samples to try: small ones with much in common, and lengths on and beside block boundaries.

Everything shrinks to one turn of one token.
"""

import random

import torch
from hypothesis import strategies as st

from flexreason import Sample

VOCABULARY = 97

lengths = st.one_of(st.integers(1, 4), st.sampled_from([15, 16, 17, 32, 33, 61, 64, 67]))


@st.composite
def ids(draw, length=lengths, vocabulary=None):
    """Token ids; few different ones half of the time, so that samples begin alike by chance."""
    n = draw(length)
    size = vocabulary or draw(st.sampled_from([2, VOCABULARY]))
    return random.Random(draw(st.integers(0, 9))).choices(range(size), k=n)


@st.composite
def turns(draw, max_turns=5, length=lengths):
    """A conversation [(h, t, r), ...]; reasoning is empty for about a third of the turns."""
    reasoning = st.one_of(ids(length), ids(length), st.just([]))
    return draw(st.lists(st.tuples(ids(length), reasoning, ids(length)), min_size=1, max_size=max_turns))


@st.composite
def samples(draw, max_samples=6, length=lengths):
    """Any samples: each goes on from a piece of an earlier one, or begins anew; equal ones and prefixes occur."""
    found = []
    for _ in range(draw(st.integers(1, max_samples))):
        stem = []
        if found and draw(st.booleans()):
            whole = [*(earlier := draw(st.sampled_from(found))).prompt_ids, *earlier.target_ids]
            stem = whole[: draw(st.sampled_from([len(whole), len(whole) // 2, len(earlier.prompt_ids), 1]))]
        text = stem + draw(ids(length)) if draw(st.booleans()) or len(stem) < 2 else stem
        text = text if len(text) > 1 else [*text, 0]
        cut = draw(st.integers(1, len(text) - 1))
        found.append(Sample(text[:cut], text[cut:]))
    return found


def random_turns(shape, seed=0, vocabulary=VOCABULARY):
    """[(h, t, r), ...] of the lengths given, filled at random."""
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths) for lengths in shape
    ]


def random_tree(seed=0, vocabulary=VOCABULARY):
    """Samples of a general tree: nested forks, shared targets, a prefix, equal ones, and one that shares nothing."""
    a, b, c, d, e, f = (ids for turn in random_turns([(9, 14, 6), (5, 11, 7)], seed, vocabulary) for ids in turn)
    return [
        Sample(a, b + c),
        Sample(a + c, d),
        Sample(a + c + d, e + f),
        Sample(a + c + d, e + c),
        Sample(a, b + c),
        Sample(a + b, c[:3]),
        Sample(f, a),
    ]
