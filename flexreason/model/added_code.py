"""Asks somebody's own code in a patched model whether it gives a row's tokens what it gives them in their samples.

Hooks are asked, whenever they came; and modules and forwards that were put in since `fr.patch`, for those that were
there before are tested or verified. Each is asked once, at the first row with a branch: what it gives the tokens of one
path by themselves has to be what it gives them in the row. So code that looks at other tokens, or goes by places in
storage, is refused; so is what cannot be asked, until `fr.verify` has passed on it. Code that draws at random goes on
as dropout does, and hooks that change nothing are not asked.

Shapes: S tokens of the row, L of the path.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

from flexreason.attention.registry import Asked, TreeRow
from flexreason.model.find import home_of, is_of, links_of, put_in_place
from flexreason.model.holders import KNOWN, is_verifying

FAMILIAR = (*KNOWN, "flexreason", "builtins")
"""Packages whose code in a model is looked at elsewhere."""

PLAIN = (nn.Linear, nn.Embedding, nn.Identity, nn.Dropout, nn.ModuleList, nn.ModuleDict, nn.ParameterDict)
"""Modules of torch that adapters bring, many to a model."""

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")

_verified: WeakKeyDictionary[nn.Module, set[Any]] = WeakKeyDictionary()
"""The code in modules of models that `fr.verify` passed on."""

PLACES = ("until", "position_ids", "document")
"""What tells a row's paths."""

REMEDY = "run fr.verify on the model: once that has passed, it is taken"


class AddedCode:
    def __init__(self, root: PreTrainedModel) -> None:
        self.root = root
        self.modules: list[nn.Module] = []
        self.known: WeakKeyDictionary[nn.Module, set[Any]] = WeakKeyDictionary()  # code not to be asked, or that was
        self.answered: set[Any] = set()  # the hooks that have answered
        self.seen: list[tuple] = []  # what tells whether anything has changed
        self.waiting: list[nn.Module] = []  # where there is somebody to ask
        self.row: Mapping[str, Tensor] = {}
        self.undoing: list[Callable[[], Any]] = []
        self.is_asking = False  # what is inside of what is asked is not asked meanwhile

    def look(self) -> None:
        """Look at what modules there are. The code that they have when they are first looked at is not asked."""
        first, self.modules = not self.modules, list(self.root.modules())
        if first:
            self.known.update({module: set(code_of(module)) for module in self.modules})

    def watch(self, row: Mapping[str, Tensor], anew: bool) -> None:
        """Wait for those that have not been asked, where a row comes to them; `anew` is whether modules were put
        somewhere since."""
        self.stop()
        if anew or not self.modules:  # which a copy of a model has not looked at
            self.look()
        now = [_state(module) for module in self.modules]
        now += [tuple(map(id, called_by(kind))) for kind in {type(module): None for module in self.modules}]
        if is_verifying():
            return
        if now != self.seen:
            inside = (part for module in self.modules if isinstance(module, ParametrizationList) for part in module)
            left_out = {self.root, *inside}  # asking.py asks the one, and the others work on weights
            self.seen, self.waiting = now, [module for module in self.modules if module not in left_out]
        self.waiting = [module for module in self.waiting if self.watch_module(module)]
        self.row = {key: row[key] for key in PLACES if key in row}

    def watch_module(self, module: nn.Module) -> bool:
        """Wait at a module for what has not been asked; whether there is anything."""
        before = len(self.undoing)
        known = {*self.known.get(module, ()), *_verified.get(module, ()), *self.answered}
        if new := [code for code in (*code_of(module), *_of_accelerate(module)) if code not in known]:
            hook = module.register_forward_hook(partial(self.ask_module, new), with_kwargs=True, prepend=True)
            self.undoing.append(hook.remove)
        for hooks in (getattr(module, name) for name in HOOKS):
            for number, hook in list(hooks.items()):
                if _is_foreign(hook) and hook not in known:
                    hooks[number] = partial(self.ask_hook, hook)
                    self.undoing.append(partial(_put_back, hooks, number, hook))
        return len(self.undoing) > before

    def stop(self) -> None:
        """What was put in places for a row is taken away."""
        while self.undoing:
            self.undoing.pop()()

    def ask_module(self, new: list[Any], module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Behind a module that was put in, or works by code that was."""
        if self.is_asking:
            return
        where = "" if type(module) in new else f" in {type(module).__name__}"
        what = f"{_named(new[0])}{where}, which was put into the model,"
        with _without_dropout(module):
            if self.ask(lambda given: module.forward(*given[0], **given[1]), (args, kwargs), output, what):
                self.known.setdefault(module, set()).update(new)

    def ask_hook(self, hook: Any, module: nn.Module, *given: Any) -> Any:
        """In the place of a hook: it does what it does, and is asked if that changes something."""
        if self.is_asking:
            return hook(module, *given)
        before, versions = _copied(given), _versions(given)
        result = hook(module, *given)

        def again(given: tuple) -> Any:
            found = hook(module, *given)
            return given if found is None else found

        changes = result is not None or _versions(given) != versions
        found = given if result is None else result
        if not changes or self.ask(again, before, found, f"{_named(hook)}, a hook of {type(module).__name__},"):
            self.answered.add(hook)
        return result

    @torch.compiler.disable
    def ask(self, call: Callable[[Any], Any], given: Any, found: Any, what: str) -> bool:
        """Raise unless `call` gives tokens by themselves what it gave them in the row, `found`; whether that could be
        asked."""
        first_given = next((leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor) and leaf.dim() > 1), None)
        n = 0 if first_given is None else _tokens(first_given)
        choices = _some_of(n, self.row)
        if first_given is None or not choices:
            return False
        devices = [first_given.device] if first_given.device.type == "cuda" else []
        self.is_asking = True
        try:
            with torch.no_grad(), torch.random.fork_rng(devices):
                alone = [(some, call(_only(some, n, given))) for some in choices]

                def is_right(found: Any) -> bool:
                    return all(_equal(one, _only(some, n, found)) for some, one in alone)

                right = is_right(found)
                if not right:
                    first, second = call(_copied(given)), call(_copied(given))
                    right = not _equal(first, second) or is_right(first)  # or it draws at random
        except Exception as error:
            self.stop()
            said = f"{type(error).__name__}: {error}"[:200]
            raise ValueError(f"row: {what} cannot be asked what it gives a sample ({said}); {REMEDY}") from error
        finally:
            self.is_asking = False
        if not right:
            self.stop()
            raise ValueError(
                f"row: {what} gives tokens something else in a row than in their samples: it looks at other tokens, or "
                "goes by places in storage; let it look at one token at a time, or train on the N samples"
            )
        return True


def note_verified_code(root: nn.Module) -> None:
    """The code in a model is taken from now on."""
    for module in root.modules():
        hooks = [hook for name in HOOKS for hook in getattr(module, name).values() if _is_foreign(hook)]
        if codes := {*code_of(module), *_of_accelerate(module), *hooks}:
            _verified[module] = codes


def code_of(module: nn.Module) -> Iterator[Any]:
    """The code of a module that neither transformers nor another package that is looked at elsewhere brought."""
    kind = type(module)
    if not is_of(kind.__module__, FAMILIAR) or (is_of(kind.__module__, ("torch.nn.modules",)) and kind not in PLAIN):
        yield kind
    for function in (getattr(kind, "forward", None), *called_by(kind), *put_in_place(module).values()):
        for link in links_of(function):
            if not is_of(home_of(link), FAMILIAR):
                yield getattr(link, "__func__", link)


def called_by(kind: Any) -> list[Any]:
    """The functions that the forward of a class finds under the names that it calls."""
    own: Any = getattr(kind, "forward", None)
    forward = inspect.unwrap(own)
    code, space = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
    values = [space[name] for name in getattr(code, "co_names", ()) if name in space]
    return [value for value in values if callable(value) and not isinstance(value, type)]


def _of_accelerate(module: nn.Module) -> Iterator[Any]:
    """Hooks of somebody's own that accelerate put around a forward."""
    hook = vars(module).get("_hf_hook")
    for one in getattr(hook, "hooks", [hook]):
        if not is_of(type(one).__module__, FAMILIAR):
            yield type(one)


def _is_foreign(hook: Any) -> bool:
    return any(not is_of(home_of(link), FAMILIAR) for link in links_of(hook))


def _state(module: nn.Module) -> tuple:
    """What tells whether code was put into a module since."""
    kind: Any = type(module)
    hooks = [number for name in HOOKS for number in getattr(module, name)]
    held = vars(module)
    return held.get("forward"), getattr(kind, "forward", None), held.get("_hf_hook"), len(held), *hooks


def _named(code: Any) -> str:
    code = code if isinstance(code, type) else next(links_of(code))
    home = code.__module__ if isinstance(code, type) else home_of(code)
    return f"{home}.{getattr(code, '__qualname__', type(code).__name__)}"


def _put_back(hooks: dict[int, Any], number: int, hook: Any) -> None:
    if number in hooks:
        hooks[number] = hook


@contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    """Dropout is off meanwhile, and what a module keeps of what it sees is as before then."""
    dropouts = [part for part in module.modules() if isinstance(part, nn.modules.dropout._DropoutNd) and part.training]
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


# ---- tokens of whatever is given


def _tokens(x: Tensor) -> int:
    return x.shape[0] if x.dim() == 2 and x.shape[0] > 1 else x.shape[1]


def _some_of(n: int, row: Mapping[str, Tensor]) -> list[Tensor]:
    """Which of n tokens to ask with: paths of the row, [L] each, where these are all of its tokens; else half of them,
    turned round. None where there is no branch, or too few."""
    if len(row) < len(PLACES):
        return []
    if n != row["until"].shape[1]:
        return [torch.arange(n - 1, n // 2 - 1, -1)] if n > 1 else []
    until, position, document = (row[key][0].cpu() for key in PLACES)
    place = torch.arange(n)
    start = torch.full((int(document.max()) + 2,), n).scatter_reduce(0, document + 1, place, "amin")[document + 1]
    [branched] = ((place - start != position) & (document >= 0)).nonzero(as_tuple=True)
    if not len(branched):
        return []
    gap = place[branched] - position[branched]
    latest = branched[gap == gap.max()][:LENGTH][-1]  # of the branch that is furthest from its places by itself
    usual = branched[(position[branched] - LENGTH).abs().argmin()]
    return [
        ((document == document[last]) & (place <= last) & (last < until)).nonzero().squeeze(1)
        for last in (latest, usual)
    ]


def _only(some: Tensor, n: int, given: Any) -> Any:
    """What is given, with these of its n tokens only, as samples have them: without a tree, and with a mask."""
    like = next(leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor) and leaf.dim() > 1)

    def cut(x: Any) -> Any:
        if isinstance(x, Asked):
            return _mask(x, len(some), like)
        if not isinstance(x, Tensor) or not x.numel():  # the mask that stands for a row's is empty
            return None if isinstance(x, TreeRow | Tensor) else x
        dim = next((dim for dim in DIMENSIONS.get(x.dim(), ()) if x.shape[dim] == n), None)
        return x.detach().clone() if dim is None else x.detach().index_select(dim, some.to(x.device))

    return tree_map(cut, given)


def _mask(asked: Asked, n: int, like: Tensor) -> Tensor:
    """The mask of a plain sequence, [1, 1, L, L], as all implementations of attention take it."""
    kv = torch.arange(n, device=like.device)
    q = kv[:, None]
    near = (kv <= q) & (q - kv < (asked.window or n)) & (q // (asked.chunk or n) == kv // (asked.chunk or n))
    return torch.zeros(1, 1, n, n, dtype=like.dtype, device=like.device).masked_fill(~near, torch.finfo(like.dtype).min)


DIMENSIONS = {1: (0,), 2: (0, 1), 3: (1,), 4: (2, 1)}
"""Which dimensions of a tensor may be its tokens, by how many it has."""

LENGTH = 32
"""With how many tokens of a path, or of its branch, is asked where there is a choice."""


def _copied(given: Any) -> Any:
    return tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, given)


def _versions(given: Any) -> list[int]:
    return [x._version for x in tree_leaves(given) if isinstance(x, Tensor) and not x.is_inference()]


def _equal(found: Any, expected: Any) -> bool:
    """But for rounding; and for what only one of them gives, as eager attention gives its weights."""
    pairs = list(zip(tree_leaves(found), tree_leaves(expected), strict=False))
    return all(_alike(*pair) for pair in pairs if all(isinstance(one, Tensor) for one in pair))


def _alike(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or not one.is_floating_point():
        return one.shape == other.shape and torch.equal(one, other)
    kind = one.device.type
    rounded = kind != "cpu" or torch.is_autocast_enabled(kind)  # on the way, whatever it is stored in
    eps = torch.finfo(torch.bfloat16 if rounded and one.dtype != torch.float64 else one.dtype).eps
    tolerance = max(1e-8, min(100 * eps, eps**0.5)) * float(other.abs().max()) if other.numel() else 0.0
    return torch.allclose(one, other, rtol=0.0, atol=tolerance, equal_nan=True)
