"""The mutations can be tried: what they break is there, and what should notice is there; and what comes of one is told
apart: noticed, not noticed, and not tried at all."""

import ast
import sys
from textwrap import dedent

import pytest

import breaking
import mutations

MUTATIONS = breaking.mutations_of(mutations)


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_target_is_there(name):
    _, _, found = breaking.find(MUTATIONS[name].target)
    assert callable(getattr(found, "fget", None) or getattr(found, "__func__", None) or found)


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_test_that_should_notice_is_there(name):
    assert MUTATIONS[name].tests
    for test in MUTATIONS[name].tests:
        file, _, function = test.partition("::")
        tree = ast.parse((breaking.HERE / file).read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert function.partition("[")[0] in functions, test


def test_promises_are_broken_in_every_folder_that_makes_them():
    folders = {mutant.target.split(".")[1] for mutant in MUTATIONS.values()}
    assert folders >= {"tree", "attention", "recurrent", "model", "proof", "chat", "data", "train"}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A package, mutations of it and tests, all of a few lines."""

    def write(name, text):
        (tmp_path / name).write_text(dedent(text))

    (tmp_path / "small").mkdir()
    write("small/__init__.py", "from small.sums import double, Number")
    write(
        "small/sums.py",
        """
        def double(x): return 2 * x
        def twice(x): return double(x)
        class Number:
            @property
            def half(self): return 1
            @staticmethod
            def one(): return 1
        """,
    )
    write(
        "broken.py",
        """
        from breaking import mutation
        seen = mutation("", "small.sums.double", "test_small.py::test_twice")(lambda original, x: original(x) + 1)
        elsewhere = mutation("", "small.sums.double", "test_small.py::test_door")(lambda original, x: original(x) + 1)
        held = mutation("", "small.sums.Number.half", "test_small.py::test_number")(lambda original, self: 2)
        unseen = mutation("", "small.sums.double", "test_small.py::test_weak")(lambda original, x: original(x) + 1)
        uncalled = mutation("", "small.sums.double", "test_small.py::test_number")(lambda original, x: 0)
        collection = mutation("", "small.sums.double", "test_import.py")(lambda original, x: original(x) + 1)
        fixture = mutation("", "small.sums.double", "test_small.py::test_fixture")(lambda original, x: original(x) + 1)
        nowhere = mutation("", "small.sums.double", "test_small.py::test_gone")(lambda original, x: original(x) + 1)
        signature = mutation("", "small.sums.double", "test_small.py::test_twice")(lambda original, x, y: original(x))
        inside = mutation("", "small.sums.double", "test_small.py::test_twice")(lambda original, x: x.gone)
        """,
    )
    write(
        "test_small.py",
        """
        import pytest
        from small import Number, double
        from small.sums import twice
        @pytest.fixture
        def four():
            assert double(2) == 4
        def test_twice(): assert twice(2) == 4
        def test_door(): assert double(2) == 4
        def test_number(): assert (Number().half, Number.one()) == (1, 1)
        def test_weak(): assert double(2) > 0
        def test_fixture(four): pass
        """,
    )
    write("test_import.py", "from small import double\nassert double(2) == 4\ndef test_nothing(): pass")
    write("pytest.ini", "[pytest]\naddopts = --import-mode=importlib")
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("broken", "small", "small.sums"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return tmp_path


TOLD = {
    "seen": "test_small.py::test_twice",
    "elsewhere": "test_small.py::test_door",  # whoever imported the function before has the broken one, too
    "held": "test_small.py::test_number",
    "unseen": "NOT NOTICED by test_small.py::test_weak",
    "uncalled": "NOT NOTICED by test_small.py::test_number; what was broken was never called",
    "collection": "DOES NOT RUN: ",
    "fixture": "DOES NOT RUN: the setup of test_small.py::test_fixture fails",
    "nowhere": "DOES NOT RUN: ",
    "signature": "RAISES ITSELF in test_small.py::test_twice",
    "inside": "RAISES ITSELF in test_small.py::test_twice",
}


@pytest.mark.parametrize("name", TOLD)
def test_what_comes_of_a_mutation_is_told_apart(name, small):
    import broken

    outcome = breaking.try_out(getattr(broken, name), f"broken:{name}", small)
    assert outcome.noticed == TOLD[name].startswith("test_")
    assert outcome.words.startswith(TOLD[name]), outcome.words


def test_a_target_that_is_not_there_is_no_success():
    for target in ("flexreason.tree.gone", "flexreason.tree.mask.gone", "flexreason.tree.mask", "gone.mask"):
        with pytest.raises(LookupError):
            breaking.find(target)
