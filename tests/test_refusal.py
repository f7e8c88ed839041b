"""A row given to a model that nobody patched never computes something else without a word: every class there is.

Exhaustive, so marked slow; the six families of test_patching run always.
"""

import pytest
import torch

import flexreason as fr
from families import build, causal_classes
from strategies import random_turns

IMPLEMENTATIONS = ("eager", "sdpa")  # flex_attention: test_patching, since it compiles for half a minute a class


def outcome(model, row):
    """What became of a row: the exception's name, or "computed"."""
    try:
        with torch.no_grad():
            model(**row)
    except Exception as error:  # any at all will do: the point is that it is not silent
        return type(error).__name__
    return "computed"


def looks_at_masks(model):
    """Softmax attention through the registry; linear attention carries state, and CpmAnt's own takes no mask at all."""
    attention = any("attention" in type(module).__name__.lower() for module in model.modules())
    return attention and not getattr(model, "_is_stateful", False) and type(model)._can_set_attn_implementation()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of a hundred families, none of them ours
def test_no_class_with_an_attention_layer_computes_a_row_unpatched():
    row = fr.collate([fr.lay_out_turns(random_turns([(11, 20, 5), (3, 0, 5), (20, 30, 9)]))])
    without_labels = {key: value for key, value in row.items() if "labels" not in key}
    silent, built, seen = [], 0, 0
    for name in causal_classes():
        for implementation in IMPLEMENTATIONS:
            try:
                model = build(name, attn_implementation=implementation)
            except Exception as error:
                print(f"{name:<40} {implementation:<16} cannot be built tiny: {type(error).__name__}: {error}"[:160])
                continue
            built += 1
            with_labels, bare = outcome(model, row), outcome(model, without_labels)
            attention = looks_at_masks(model)
            seen += attention
            print(f"{name:<40} {implementation:<16} with labels {with_labels:<22} without {bare}")
            if with_labels == "computed" or (bare == "computed" and attention):
                silent.append((name, implementation, with_labels, bare))
    print(f"{built} built, {seen} with attention through the registry, {len(silent)} silent")
    assert seen >= 150
    assert not silent
