"""What is wrong when one pass and the samples differ: the culprit in a sentence.

From the outside in. A layout is held against its samples without any model (`layout_faults`). Then the model is
asked: which positions reached it; whether the hidden states that predict targets are already wrong, or only what
the head or the loss makes of them; and, for the first wrong one, which tokens it depends on. A gradient of
exactly zero says that a token plays no part, so a leak is seen as what it is, wherever it comes from.

Shapes: S tokens, T targets, D hidden size.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flexreason.attention.registry import find_decoder
from flexreason.model.hooks import Patch
from flexreason.proof.conversations import Conversation
from flexreason.proof.float64 import relative_l2
from flexreason.tree.layout import Layout
from flexreason.tree.row import Row
from flexreason.tree.sample import Role, Sample


def layout_faults(layout: Layout, samples: Sequence[Sample]) -> list[str]:
    """Where a layout is not these samples, in words; nothing if it is."""
    parents, faults = _parents(layout), []
    depth: list[int] = []
    for index, parent in enumerate(parents):
        depth.append(depth[parent] + 1 if parent >= 0 else 0)
        if int(layout.position_ids[index]) != depth[index]:
            faults.append(_misplaced(layout, index, _path(parents, index)))
            break
    asked: dict[int, list[tuple[int, int]]] = {}
    for source, token, turn in zip(
        layout.target_source.tolist(), layout.target_ids.tolist(), layout.target_turn.tolist(), strict=True
    ):
        asked.setdefault(turn, []).append((source, token))
    if sorted(asked) != list(range(len(samples))):
        return [*faults, f"the layout has targets of turns {sorted(asked)}, and there are {len(samples)} samples"]
    ids = layout.input_ids.tolist()
    for turn, sample in enumerate(samples):
        prompt, target = list(map(int, sample.prompt_ids)), list(map(int, sample.target_ids))
        if [token for _, token in asked[turn]] != target:
            faults.append(f"turn {turn}: the targets of the layout are not the sample's target_ids")
            continue
        before = -1
        for number, (source, _) in enumerate(asked[turn]):
            if number == 0:
                right = [ids[i] for i in _path(parents, source)] == prompt
            else:  # one step on from where the target before was asked
                right = parents[source] == before and ids[source] == target[number - 1]
            if not right:
                faults.append(_wrong_history(layout, parents, turn, number, source, prompt + target[:number]))
                break
            before = source
    return faults


def _parents(layout: Layout) -> list[int]:
    """The token before each on its path, or -1: by `until` alone."""
    until = layout.until.tolist()
    open_: list[int] = []
    found: list[int] = []
    for index in range(len(until)):
        while open_ and until[open_[-1]] <= index:
            open_.pop()
        found.append(open_[-1] if open_ else -1)
        open_.append(index)
    return found


def _path(parents: list[int], index: int) -> list[int]:
    """The indices that a token sees, itself the last."""
    path = []
    while index >= 0:
        path.append(index)
        index = parents[index]
    return path[::-1]


def _misplaced(layout: Layout, index: int, path: list[int]) -> str:
    position = int(layout.position_ids[index])
    said = f"{say_token(layout, index)} has position {position}, and sees {len(path) - 1} tokens before it"
    turn = int(layout.turn[index])
    leaked = [i for i in path if int(layout.role[i]) & Role.REASONING and int(layout.turn[i]) != turn]
    if leaked:
        return f"reasoning leaks: {said}, among them {say_token(layout, leaked[0])}"
    return f"positions: {said}"


def _wrong_history(layout: Layout, parents: list[int], turn: int, number: int, source: int, history: list[int]) -> str:
    ids, path = layout.input_ids.tolist(), _path(parents, source)
    said = f"target {number} of turn {turn} is asked of {say_token(layout, source)}"
    for index in range(len(ids)):
        if ids[index] == history[-1] and [ids[i] for i in _path(parents, index)] == history:
            return f"target index: {said}; what the sample has before it ends at {say_token(layout, index)}"
    turns = layout.turn.tolist()
    leaked = [i for i in path if int(layout.role[i]) & Role.REASONING and turns[i] != turn]
    if leaked and len(path) > len(history):
        return f"reasoning leaks: {said}, which sees {say_token(layout, leaked[0])}"
    return f"tree: {said}, and no token of the layout has the sample's {len(history)} tokens on its path"


def say_token(layout: Layout | Row, index: int) -> str:
    """A token by its place and what it is."""
    turn, role = (layout.turn, layout.role) if isinstance(layout, Layout) else (layout["turn"][0], layout["role"][0])
    words = " and ".join(flag.name.lower() for flag in Role if flag.name and flag & int(role[index]))
    document = (
        ""
        if isinstance(layout, Layout) or int(layout["document"][0].max()) < 1
        else (f" of conversation {int(layout['document'][0, index])}")
    )
    return f"token {index} ({words} of turn {int(turn[index])}{document})"


def model_fault(model: nn.Module, patch: Patch, row: Row, chosen: Sequence[Conversation], limit: float) -> str | None:
    """The culprit in a patched model, or None if all hidden states that predict a target are those of the samples.

    `row` holds the layouts of `chosen`; `limit` is the relative error of hidden states above which they differ.
    """
    tree = _watch(model, patch, row)
    for name, found in (("input_ids", tree.ids), ("position_ids", tree.positions)):
        if found is not None and not torch.equal(found, row[name]):
            index = int((found != row[name])[0].nonzero()[0])
            return (
                f"{name.removesuffix('_ids')}s: {say_token(row, index)} reached the decoder with {name} "
                f"{int(found[0, index])} in place of {int(row[name][0, index])}: something changes them on the way"
            )
    start, wrong = 0, []
    for layout, samples, _ in chosen:
        plain = [_watch_sample(model, patch, sample) for sample in samples]
        for source, turn in zip(layout.target_source.tolist(), layout.target_turn.tolist(), strict=True):
            position = int(layout.position_ids[source])
            if relative_l2([tree.hidden[0, start + source]], [plain[turn].hidden[0, position]]) > limit:
                wrong.append((position, start + source, plain[turn]))
        start += len(layout)
    if not wrong:
        return None
    _, index, right = min(wrong, key=lambda found: found[:2])
    path = (row["until"][0, : index + 1] > index).nonzero().squeeze(1).tolist()
    return _dependence(row, tree, right, index, path) or _where(tree, right, path, say_token(row, index), limit)


def _dependence(row: Row, tree: "Watched", plain: "Watched", index: int, path: list[int]) -> str | None:
    """What a token depends on and must not, or the other way round."""
    moved = tree.influence(index)
    leaks = moved > 0
    leaks[path] = False
    if bool(leaks.any()):
        leaked = leaks.nonzero().squeeze(1).tolist()
        reasoning = [i for i in leaked if int(row["role"][0, i]) & Role.REASONING]
        return (
            f"{'reasoning leaks' if reasoning else 'mask'}: {say_token(row, index)} depends on "
            f"{say_token(row, (reasoning or leaked)[0])}, which is not on its path ({len(leaked)} such tokens)"
        )
    expected = plain.influence(len(path) - 1)[: len(path)]
    missing = ((moved[path] == 0) & (expected > 0)).nonzero().squeeze(1).tolist()
    if missing:
        return (
            f"mask: {say_token(row, index)} does not depend on {say_token(row, path[missing[0]])}, which is on "
            f"its path ({len(missing)} such tokens)"
        )
    return None


def _where(tree: "Watched", plain: "Watched", path: list[int], token: str, limit: float) -> str:
    """The right tokens are seen, and something else is computed: the first module that does."""
    if relative_l2([tree.embedded[0, path]], [plain.embedded[0, : len(path)]]) > limit:
        return f"embeddings: {token} or one before it is embedded otherwise than in the sample"
    for name, states in tree.modules.items():
        other = plain.modules.get(name)
        if other is None or relative_l2([states[0, path]], [other[0, : len(path)]]) <= limit:
            continue
        last = name.split(".")[-1]
        why = "it depends on something other than the tokens on the path and their positions"
        if "attn" in last or "attention" in last:
            why = f'positions inside it, or its attention under backend "{tree.backend}"'
        return (
            f"{name}: the first whose output differs at {token} or before it, though the right tokens are seen: {why}"
        )
    return f"{token} differs, though every module's output before it is right"


class Watched:
    """One forward: what reached the decoder, what its layers and itself gave, and what that depends on."""

    def __init__(self) -> None:
        self.ids: Tensor | None = None
        self.positions: Tensor | None = None
        self.embedded = torch.empty(0)
        self.hidden = torch.empty(0)
        self.modules: dict[str, Tensor] = {}
        self.backend = ""

    def influence(self, index: int) -> Tensor:
        """[S]: how much each token moves the hidden state at an index; exactly 0 where it plays no part."""
        hidden = self.hidden[0, index]
        direction = torch.linspace(-1, 1, len(hidden), device=hidden.device, dtype=hidden.dtype).cos()
        (gradient,) = torch.autograd.grad(hidden @ direction, self.embedded, retain_graph=True)
        return gradient[0].abs().amax(-1)


@contextmanager
def _watching(root: Any) -> Iterator[Watched]:
    watched, decoder = Watched(), find_decoder(root)

    def embed(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        watched.embedded = output.detach().requires_grad_()
        return watched.embedded

    def given(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        known = {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}
        watched.ids, watched.positions = known.get("input_ids"), known.get("position_ids")

    def hidden(module: nn.Module, args: tuple, output: Any) -> None:
        watched.hidden = output[0]

    def layer(name: str) -> Any:
        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            if isinstance(states, Tensor) and states.dim() == 3:
                watched.modules[name] = states.detach()

        return keep

    with ExitStack() as stack, torch.enable_grad():
        hooks = [
            root.get_input_embeddings().register_forward_hook(embed),
            decoder.register_forward_pre_hook(given, with_kwargs=True),
            decoder.register_forward_hook(hidden, prepend=True),
            *(module.register_forward_hook(layer(name)) for name, module in decoder.named_modules() if _is_part(name)),
        ]
        for hook in hooks:
            stack.callback(hook.remove)
        yield watched


def _is_part(name: str) -> bool:
    """Layers, and what stands in them under any name: their direct parts."""
    steps = name.split(".")
    return any(step.isdigit() for step in steps[-2:])


def _watch(model: nn.Module, patch: Patch, row: Row) -> Watched:
    with _watching(patch.root) as watched:
        model(**row)
    watched.backend = patch.backend_on(row["input_ids"].device)
    return watched


def _watch_sample(model: nn.Module, patch: Patch, sample: Sample) -> Watched:
    ids = torch.tensor([[*map(int, sample.prompt_ids), *map(int, sample.target_ids)]])
    with _watching(patch.root) as watched:
        model(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
    return watched
