"""Refuses code of the user's own in a patched model that computes something else in a row than in the samples.

Two kinds of code are checked: hooks, whenever they were registered; and modules and functions that were put into the
model after `fr.patch`. What was there before is covered by the self-test or by `fr.verify`.

Each is checked once, at the first row that has a branch: it is called again with the tokens of one path alone, and has
to give them what it gave them in the row. Code that looks at other tokens, or counts places in storage, fails this and
is refused. Code that cannot be called again is refused until `fr.verify` has passed. A hook that changes nothing is
not checked. Code that draws at random is taken, as dropout is.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from flexreason.model.find import dropouts_of
from flexreason.model.holders import is_verifying
from flexreason.model.some_tokens import PLACES, copied, equal, n_tokens, only, some_tokens, versions_of
from flexreason.model.whose_code import HOOKS, called_by, code_of, hooks_of_accelerate, is_somebodys, name_of, state_of

_verified: WeakKeyDictionary[nn.Module, set[Any]] = WeakKeyDictionary()
"""The code in modules of models that `fr.verify` passed on."""

REMEDY = "run fr.verify on the model: once that has passed, it is taken"


class AddedCode:
    def __init__(self, root: PreTrainedModel) -> None:
        self.root = root
        self.modules: list[nn.Module] = []
        self.known: WeakKeyDictionary[nn.Module, set[Any]] = WeakKeyDictionary()  # code that needs no check any more
        self.passed: set[Any] = set()  # hooks that passed their check
        self.seen: list[tuple] = []  # the state of all modules at the last row
        self.waiting: list[nn.Module] = []  # modules with something to check
        self.row: Mapping[str, Tensor] = {}
        self.undoing: list[Callable[[], Any]] = []
        self.is_checking = False  # what is called meanwhile is not checked itself

    def look(self) -> None:
        """List the modules of the model. The code that they have at the first look is not checked."""
        first, self.modules = not self.modules, list(self.root.modules())
        if first:
            self.known.update({module: set(code_of(module)) for module in self.modules})

    def watch(self, row: Mapping[str, Tensor], anew: bool) -> None:
        """Before a row: hook what has not been checked yet. `anew` says that modules were added since the last row."""
        self.stop()
        if anew or not self.modules:  # a copy of a model has not looked at its own
            self.look()
        now = [state_of(module) for module in self.modules]
        now += [tuple(map(id, called_by(kind))) for kind in {type(module): None for module in self.modules}]
        if is_verifying():
            return
        if now != self.seen:
            inside = (part for module in self.modules if isinstance(module, ParametrizationList) for part in module)
            left_out = {self.root, *inside}  # asking.py checks the root; parametrizations compute weights, not tokens
            self.seen, self.waiting = now, [module for module in self.modules if module not in left_out]
        self.waiting = [module for module in self.waiting if self.watch_module(module)]
        self.row = {key: row[key] for key in PLACES if key in row}

    def watch_module(self, module: nn.Module) -> bool:
        """Hook what has not been checked in one module. Returns whether there is anything."""
        before = len(self.undoing)
        known = {*self.known.get(module, ()), *_verified.get(module, ()), *self.passed}
        if new := [code for code in (*code_of(module), *hooks_of_accelerate(module)) if code not in known]:
            hook = module.register_forward_hook(partial(self.check_module, new), with_kwargs=True, prepend=True)
            self.undoing.append(hook.remove)
        for hooks in (getattr(module, name) for name in HOOKS):
            for number, hook in list(hooks.items()):
                if is_somebodys(hook) and hook not in known:
                    hooks[number] = partial(self.check_hook, hook)
                    self.undoing.append(partial(_put_back, hooks, number, hook))
        return len(self.undoing) > before

    def stop(self) -> None:
        """Remove what `watch` put into the modules."""
        while self.undoing:
            self.undoing.pop()()

    def check_module(self, new: list[Any], module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Called behind a module that was put in, or that runs code which was."""
        if self.is_checking:
            return
        where = "" if type(module) in new else f" in {type(module).__name__}"
        what = f"{name_of(new[0])}{where}, which was put into the model,"
        with _without_dropout(module):
            if self.check(lambda given: module.forward(*given[0], **given[1]), (args, kwargs), output, what):
                self.known.setdefault(module, set()).update(new)

    def check_hook(self, hook: Any, module: nn.Module, *given: Any) -> Any:
        """Called in the place of a hook: calls the hook, and checks it if it changed something."""
        if self.is_checking:
            return hook(module, *given)
        before, versions = copied(given), versions_of(given)
        result = hook(module, *given)

        def again(given: tuple) -> Any:
            found = hook(module, *given)
            return given if found is None else found

        changes = result is not None or versions_of(given) != versions
        found = given if result is None else result
        if not changes or self.check(again, before, found, f"{name_of(hook)}, a hook of {type(module).__name__},"):
            self.passed.add(hook)
        return result

    @torch.compiler.disable
    def check(self, call: Callable[[Any], Any], given: Any, found: Any, what: str) -> bool:
        """Raise unless `call` gives some tokens alone what it gave them in the row, which is `found`.

        Returns whether it could be checked: a row without a branch tells nothing.
        """
        first_given = next((leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor) and leaf.dim() > 1), None)
        n = 0 if first_given is None else n_tokens(first_given)
        choices = some_tokens(n, self.row)
        if first_given is None or not choices:
            return False
        devices = [first_given.device] if first_given.device.type == "cuda" else []
        self.is_checking = True
        try:
            with torch.no_grad(), torch.random.fork_rng(devices):
                alone = [(some, call(only(some, n, given))) for some in choices]

                def is_right(found: Any) -> bool:
                    return all(equal(one, only(some, n, found)) for some, one in alone)

                right = is_right(found)
                if not right:
                    first, second = call(copied(given)), call(copied(given))
                    right = not equal(first, second) or is_right(first)  # or it draws at random
        except Exception as error:
            self.stop()
            said = f"{type(error).__name__}: {error}"[:200]
            raise ValueError(
                f"row: {what} cannot be called with the tokens of one sample ({said}); {REMEDY}"
            ) from error
        finally:
            self.is_checking = False
        if not right:
            self.stop()
            raise ValueError(
                f"row: {what} gives tokens something else in a row than in their samples: it looks at other tokens, or "
                "goes by places in storage; let it look at one token at a time, or train on the N samples"
            )
        return True


def note_verified_code(root: nn.Module) -> None:
    """Remember that the code in a model has passed `fr.verify`."""
    for module in root.modules():
        hooks = [hook for name in HOOKS for hook in getattr(module, name).values() if is_somebodys(hook)]
        if codes := {*code_of(module), *hooks_of_accelerate(module), *hooks}:
            _verified[module] = codes


def _put_back(hooks: dict[int, Any], number: int, hook: Any) -> None:
    if number in hooks:
        hooks[number] = hook


@contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    """Dropout is off meanwhile. Afterwards the buffers of the module hold what they held before."""
    dropouts = [dropout for dropout in dropouts_of(module).values() if dropout.training]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    for part in dropouts:
        part.training = False
    try:
        yield
    finally:
        for part in dropouts:
            part.training = True
        for buffer, before in buffers:
            buffer.data.copy_(before)
