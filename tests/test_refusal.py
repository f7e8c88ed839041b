"""A row given to a model that nobody patched never computes something else without a word: every class there is.

Exhaustive, so marked slow; the six families of test_patching run always.
"""

import pytest
import transformers

from flexreason.proof.selftest import unpatched
from flexreason.proof.tiny import build, causal_classes, default_config, shrink

IMPLEMENTATIONS = ("eager", "sdpa")  # flex_attention: test_patching, since it compiles for half a minute a class


def looks_at_masks(name):
    """Softmax attention through the registry; linear attention carries state, and CpmAnt's own takes no mask at all."""
    cls = getattr(transformers, name)
    model = build(shrink(default_config(cls)), cls)
    attention = any("attention" in type(module).__name__.lower() for module in model.modules())
    return attention and not getattr(model, "_is_stateful", False) and cls._can_set_attn_implementation()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of a hundred families, none of them ours
def test_no_class_with_an_attention_layer_computes_a_row_unpatched():
    silent, built, seen = [], 0, 0
    for name in causal_classes():
        for implementation in IMPLEMENTATIONS:
            found = unpatched(getattr(transformers, name), implementation)
            if found is None:
                print(f"{name:<40} {implementation:<16} cannot be built tiny")
                continue
            built += 1
            with_labels, bare = found["with labels"], found["without labels"]
            attention = looks_at_masks(name)
            seen += attention
            print(f"{name:<40} {implementation:<16} with labels {with_labels:<22} without {bare}")
            if with_labels == "computed" or (bare == "computed" and attention):
                silent.append((name, implementation, with_labels, bare))
    print(f"{built} built, {seen} with attention through the registry, {len(silent)} silent")
    assert seen >= 150
    assert not silent
