"""`import flexreason as fr`: what stands there, and that each of it shows how it is used."""

import doctest
import inspect
import subprocess
import sys

import pytest

import flexreason as fr

CONTRACT = (
    *("encode", "Sample", "Layout", "Role", "lay_out", "lay_out_turns", "unmerge", "dense_mask", "block_mask"),
    *("collate", "patch", "unpatch", "token_logprobs", "verify", "RowTrainer"),
)
"""Names that documents, tools and checks rely on."""


def test_the_door_shows_its_names_and_nothing_else():
    shown = [name for name in dir(fr) if not name.startswith("__")]
    assert sorted(shown) == sorted(fr.__all__)
    assert len(set(fr.__all__)) == len(fr.__all__)


def test_every_name_of_the_contract_is_at_the_door():
    assert set(CONTRACT) <= set(fr.__all__)


def test_every_name_can_be_had_in_a_fresh_process_in_whatever_order():
    """Also the last first: no name waits for another to be imported."""
    code = "import flexreason as fr; print([getattr(fr, name).__name__ for name in reversed(fr.__all__)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{fr.__all__[::-1]}\n"


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'dance'"):
        fr.dance  # noqa: B018


@pytest.mark.parametrize("name", fr.__all__)
def test_every_name_says_what_it_is_and_shows_its_use(name):
    """Its own docstring, not one that it inherits, with an example that pytest runs in the module where it stands."""
    public = getattr(fr, name)
    assert vars(public).get("__doc__") if inspect.isclass(public) else public.__doc__
    examples = doctest.DocTestParser().get_examples(public.__doc__)
    assert examples, f"fr.{name} has no example"
    assert any(name in example.source for example in examples), f"the example of fr.{name} does not use it"
