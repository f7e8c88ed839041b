"""What is wrong when one pass and the samples differ: the culprit in a sentence.

From the outside in. A layout is held against its samples without any model (`layout_faults`). Then the model is
asked: which positions reached it; whether the hidden states that predict targets are already wrong, or only what
the head or the loss makes of them; and, for the first wrong one, which tokens it depends on. A gradient of
exactly zero says that a token plays no part, so a leak is seen as what it is, wherever it comes from.

Shapes: S tokens, T targets, D hidden size.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flexreason.attention.registry import find_decoder
from flexreason.layout import Layout
from flexreason.patching import Patch
from flexreason.row import Row, collate
from flexreason.sample import Role, Sample
from flexreason.testing import relative_l2


def layout_faults(layout: Layout, samples: Sequence[Sample]) -> list[str]:
    """Where a layout is not these samples, in words; nothing if it is."""
    paths, faults = _paths(layout), []
    for index, path in enumerate(paths):
        position = int(layout.position_ids[index])
        if position != len(path) - 1:
            faults.append(_misplaced(layout, index, path, position))
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
        for number, (source, _) in enumerate(asked[turn]):
            history = prompt + target[:number]
            if [ids[i] for i in paths[source]] != history:
                faults.append(_wrong_history(layout, paths, turn, number, source, history))
                break
    return faults


def _paths(layout: Layout) -> list[list[int]]:
    """The indices that each token sees, itself the last: by `until` alone."""
    until, found = layout.until.tolist(), []
    for index in range(len(until)):
        found.append([other for other in range(index + 1) if until[other] > index])
    return found


def _misplaced(layout: Layout, index: int, path: list[int], position: int) -> str:
    said = f"{say_token(layout, index)} has position {position}, and sees {len(path) - 1} tokens before it"
    turn = int(layout.turn[index])
    leaked = [i for i in path if int(layout.role[i]) & Role.REASONING and int(layout.turn[i]) != turn]
    if leaked:
        return f"reasoning leaks: {said}, among them {say_token(layout, leaked[0])}"
    return f"positions: {said}"


def _wrong_history(
    layout: Layout, paths: list[list[int]], turn: int, number: int, source: int, history: list[int]
) -> str:
    ids = layout.input_ids.tolist()
    right = [i for i, path in enumerate(paths) if len(path) == len(history) and [ids[j] for j in path] == history]
    said = f"target {number} of turn {turn} is asked of {say_token(layout, source)}"
    if right:
        return f"target index: {said}; what the sample has before it ends at {say_token(layout, right[0])}"
    turns = layout.turn.tolist()
    leaked = [i for i in paths[source] if int(layout.role[i]) & Role.REASONING and turns[i] != turn]
    if leaked and len(paths[source]) > len(history):
        return f"reasoning leaks: {said}, which sees {say_token(layout, leaked[0])}"
    return f"tree: {said}, and no token of the layout has the sample's {len(history)} tokens on its path"


def say_token(layout: Layout | Row, index: int) -> str:
    """A token by its place and what it is."""
    turn, role = (layout.turn, layout.role) if isinstance(layout, Layout) else (layout["turn"][0], layout["role"][0])
    words = " and ".join(flag.name.lower() for flag in Role if flag.name and flag & int(role[index]))
    return f"token {index} ({words} of turn {int(turn[index])})"


def model_fault(model: nn.Module, patch: Patch, layout: Layout, samples: Sequence[Sample], limit: float) -> str | None:
    """The culprit in a patched model, or None if all log-probabilities are those of the samples.

    `limit` is the relative error of hidden states above which they count as different.
    """
    row = {key: value.to(next(model.parameters()).device) for key, value in collate([layout]).items()}
    tree = _watch(model, patch, row)
    if not torch.equal(tree.positions.cpu(), row["position_ids"].cpu()):
        index = int((tree.positions != row["position_ids"])[0].nonzero()[0])
        found, expected = int(tree.positions[0, index]), int(row["position_ids"][0, index])
        return (
            f"positions: {say_token(row, index)} reached the decoder with position {found} in place of {expected}: "
            "something changes position_ids on the way"
        )
    sources = layout.target_source.tolist()
    turns = layout.target_turn.tolist()
    plain = [_watch_sample(model, patch, sample) for sample in samples]
    wrong: list[tuple[int, int, int]] = []  # position, index, turn
    for source, turn in zip(sources, turns, strict=True):
        position = int(layout.position_ids[source])
        if relative_l2([tree.hidden[0, source]], [plain[turn].hidden[0, position]]) > limit:
            wrong.append((position, source, turn))
    if not wrong:
        return None
    position, index, turn = min(wrong)
    path = (layout.until[: index + 1] > index).nonzero().squeeze(1).tolist()
    return _dependence(layout, tree, plain[turn], index, path, limit) or _where(
        tree, plain[turn], path, say_token(layout, index), patch, limit
    )


def _dependence(
    layout: Layout, tree: "Watched", plain: "Watched", index: int, path: list[int], limit: float
) -> str | None:
    """What a token depends on and must not, or the other way round."""
    moved = tree.influence(index)
    on_path = torch.zeros(len(moved), dtype=torch.bool, device=moved.device)
    on_path[path] = True
    if bool((leaks := (moved > 0) & ~on_path).any()):
        kinds = layout.role.to(moved.device)[: len(layout)]
        leaked = leaks.nonzero().squeeze(1)
        reasoning = [i for i in leaked.tolist() if i < len(layout) and int(kinds[i]) & Role.REASONING]
        other = reasoning[0] if reasoning else int(leaked[0])
        what = say_token(layout, other) if other < len(layout) else f"token {other} (padding)"
        return (
            f"{'reasoning leaks' if reasoning else 'mask'}: {say_token(layout, index)} depends on {what}, which is not "
            f"on its path ({int(leaks.sum())} such tokens)"
        )
    expected = plain.influence(len(path) - 1)[: len(path)]
    missing = ((moved[path] == 0) & (expected > 0)).nonzero().squeeze(1).tolist()
    if missing:
        return (
            f"mask: {say_token(layout, index)} does not depend on {say_token(layout, path[missing[0]])}, which is on "
            f"its path ({len(missing)} such tokens)"
        )
    return None


def _where(tree: "Watched", plain: "Watched", path: list[int], token: str, patch: Patch, limit: float) -> str:
    """The right tokens are seen, and something else is computed: the first module that does."""
    for name, states in tree.modules.items():
        other = plain.modules.get(name)
        if other is not None and relative_l2([states[0, path]], [other[0, : len(path)]]) > limit:
            return (
                f"{name}: the first whose output differs at {token} or before it, though the right tokens are seen: "
                f'positions inside it, or its attention under backend "{tree.backend}"'
            )
    return f"{token} differs, though every module's output before it is right"


class Watched:
    """One forward: what reached the decoder, what its layers and itself gave, and what that depends on."""

    def __init__(self) -> None:
        self.positions = torch.empty(0)
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

    def positions(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if isinstance(found := kwargs.get("position_ids"), Tensor):
            watched.positions = found

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
            decoder.register_forward_pre_hook(positions, with_kwargs=True),
            decoder.register_forward_hook(hidden, prepend=True),
            *(
                module.register_forward_hook(layer(name))
                for name, module in decoder.named_modules()
                if name.split(".")[-1].isdigit() or "attn" in name.split(".")[-1] or "attention" in name.split(".")[-1]
            ),
        ]
        for hook in hooks:
            stack.callback(hook.remove)
        yield watched


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
