"""Break one function of a package, and see whether the tests that should notice do.

A mutation is a function in a module of mutations. It is called in the place of a named function or method, its target,
and is handed the original first:

    @mutation("a token sees its ancestors", "flexreason.tree.interval_rule", "test_layout.py::test_...")
    def a_subtree_ends_one_token_late(original, until):
        return original(until + 1)

A target is named by its folder, so that it may move from file to file. `try_out` runs these tests in a process of its
own, in which this file is a plugin of pytest: the target is broken before tests are collected, wherever the package
holds it. Whoever wants it broken in further processes calls `break_what_is_asked` in them.
"""

import functools
import importlib
import inspect
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent

ASKED = "FLEXREASON_MUTATION"
"""The variable that holds which mutation is asked for: a module's name, a colon, the mutation's name."""

REPORT = "FLEXREASON_MUTATION_REPORT"
"""The variable that holds the file in which the plugin says what it saw."""


@dataclass(frozen=True)
class Mutation:
    """What is broken, and who should notice."""

    promise: str
    target: str  # a function, a method or a property: by the folder that it stands in, or by folder and file
    tests: tuple[str, ...]  # files of tests, or tests in them, from the folder of tests on
    broken: Callable


def mutation(promise: str, target: str, *tests: str) -> Callable[[Callable], Mutation]:
    """Make a mutation of a function that is to be called in the place of `target`."""
    return lambda broken: Mutation(promise, target, tests, broken)


def mutations_of(module) -> dict[str, Mutation]:
    """The mutations that a module holds, by name."""
    return {name: value for name, value in vars(module).items() if isinstance(value, Mutation)}


def find(target: str) -> tuple[object, str, object]:
    """The module or class that holds a target, its name there, and what stands there."""
    parts = target.split(".")
    module, n = import_as_far(parts)
    if n == len(parts):
        raise LookupError(f"{target} is a module, and no function")
    holders = [module]
    if hasattr(module, "__path__"):  # a folder: the one of its files that defines the name
        names = [f"{module.__name__}.{found.name}" for found in pkgutil.iter_modules(module.__path__)]
        files = [importlib.import_module(name) for name in names if not name.endswith("__main__")]
        holders = [file for file in files if getattr(vars(file).get(parts[n]), "__module__", "") == file.__name__]
    if len(holders) != 1:
        raise LookupError(f"{target}: expected one definition, found {len(holders)}")
    holder = holders[0]
    for name in parts[n:-1]:
        holder = vars(holder)[name]
    return holder, parts[-1], vars(holder)[parts[-1]]


def import_as_far(parts: list[str]) -> tuple[ModuleType, int]:
    """The module of the longest beginning of a name that is one, and how many parts that has."""
    for n in reversed(range(1, len(parts) + 1)):
        name = ".".join(parts[:n])
        try:
            return importlib.import_module(name), n
        except ModuleNotFoundError as error:
            if error.name != name and not name.startswith(f"{error.name}."):
                raise  # the module is there, and one that it imports is not
    raise LookupError(f"there is no module in {'.'.join(parts)}")


def put_in_place(mutant: Mutation, calls: list[str]) -> None:
    """Break a mutation's target, wherever modules of its package hold it. `calls` is told of each call."""
    holder, name, found = find(mutant.target)
    original = getattr(found, "fget", None) or getattr(found, "__func__", None) or found

    @functools.wraps(original)
    def broken(*args, **kwargs):
        calls.append(mutant.target)
        return mutant.broken(original, *args, **kwargs)

    made = broken if found is original else type(found)(broken)  # a property, a static method
    setattr(holder, name, made)
    package = mutant.target.partition(".")[0]
    for module in [module for key, module in sys.modules.items() if key.partition(".")[0] == package]:
        for key, value in list(vars(module).items()):
            if value is original:
                setattr(module, key, made)


def break_what_is_asked() -> list[str]:
    """In a process that is to test a mutation: put it in place; the calls of it, as they come."""
    calls: list[str] = []
    if ASKED in os.environ:
        module, name = os.environ[ASKED].split(":")
        put_in_place(mutations_of(importlib.import_module(module))[name], calls)
    return calls


class Plugin:
    """What pytest is given: it breaks the target, and keeps the first failure."""

    def __init__(self):
        self.calls = break_what_is_asked()
        module, name = os.environ[ASKED].split(":")
        self.file = inspect.getfile(mutations_of(importlib.import_module(module))[name].broken)
        self.failure = None

    def pytest_runtest_makereport(self, item, call):
        if self.failure is None and call.excinfo is not None and call.excinfo.typename != "Skipped":
            own = any(self.raised_here(error) for error in chain(call.excinfo.value))
            self.failure = {"test": item.nodeid, "when": call.when, "own": own, "words": call.excinfo.exconly()[:300]}

    def raised_here(self, error) -> bool:
        """Whether an error was raised by the mutation itself, and not by what it broke."""
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        return trace is not None and trace.tb_frame.f_code.co_filename in (self.file, __file__)

    def pytest_sessionfinish(self):
        Path(os.environ[REPORT]).write_text(json.dumps({"failure": self.failure, "calls": len(self.calls)}))


def chain(error):
    """An error, and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def pytest_configure(config):
    if ASKED in os.environ:
        config.pluginmanager.register(Plugin(), "what is broken")


@dataclass(frozen=True)
class Outcome:
    """What came of a mutation: whether it was noticed, and by which test, or in words why not."""

    noticed: bool
    words: str


def try_out(mutant: Mutation, name: str, folder: Path = HERE) -> Outcome:
    """Run the tests that should notice a mutation. `name`: its module and its own, as in `ASKED`.

    It is noticed where a test fails that ran. It is not where all tests pass, where none could be collected or run, or
    where the mutation itself raised because what it is written for has changed.
    """
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary, "report.json")
        done = run_tests(folder, mutant.tests, {ASKED: name, REPORT: str(report)}, "-p", "breaking")
        seen = json.loads(report.read_text()) if report.exists() else {}
    failure, output = seen.get("failure"), (done.stdout + done.stderr).strip()
    if done.returncode == 0:
        never = "" if seen["calls"] else "; what was broken was never called"
        return Outcome(False, f"NOT NOTICED by {', '.join(mutant.tests)}{never}")
    if done.returncode != 1 or failure is None:
        return Outcome(False, f"DOES NOT RUN: {output[-600:]}")
    if failure["when"] != "call":
        return Outcome(False, f"DOES NOT RUN: the {failure['when']} of {failure['test']} fails: {failure['words']}")
    if failure["own"]:
        return Outcome(False, f"RAISES ITSELF in {failure['test']}: {failure['words']}")
    return Outcome(True, failure["test"].removeprefix("tests/"))


def run_tests(folder: Path, tests, more: dict[str, str], *options: str) -> subprocess.CompletedProcess:
    """pytest on some tests of a folder, up to the first that fails."""
    paths = os.pathsep.join([str(folder), str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *options, *tests],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", **more},
    )
