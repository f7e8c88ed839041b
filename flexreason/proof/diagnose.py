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
    faults = []
    for index, position in enumerate(layout.position_ids.tolist()):
        path = _path(layout.until, index)
        if position != len(path) - 1:
            faults.append(_misplaced(layout, index, path))
            break
    turns = layout.target_turn.unique().tolist()
    if turns != list(range(len(samples))):
        return [*faults, f"the layout has targets of turns {turns}, and there are {len(samples)} samples"]
    for turn, sample in enumerate(samples):
        prompt, target = list(map(int, sample.prompt_ids)), list(map(int, sample.target_ids))
        of_turn = layout.target_turn == turn
        if layout.target_ids[of_turn].tolist() != target:
            faults.append(f"turn {turn}: the targets of the layout are not the sample's target_ids")
            continue
        ids = torch.tensor(prompt + target, dtype=layout.input_ids.dtype, device=layout.device)
        for number, source in enumerate(layout.target_source[of_turn].tolist()):
            history = ids[: len(prompt) + number]
            if not torch.equal(layout.input_ids[_path(layout.until, source)], history):
                faults.append(_wrong_history(layout, turn, number, source, history))
                break
    return faults


def _path(until: Tensor, index: int) -> Tensor:
    """The indices of the tokens that a token sees, itself the last: by `until` [S] alone."""
    return (until[: index + 1] > index).nonzero().squeeze(1)


def _leaked(layout: Layout, path: Tensor, turn: int) -> list[int]:
    """The reasoning of other turns on a path."""
    is_reasoning = (layout.role[path] & int(Role.REASONING)) != 0
    return path[is_reasoning & (layout.turn[path] != turn)].tolist()


def _misplaced(layout: Layout, index: int, path: Tensor) -> str:
    said = (
        f"{say_token(layout, index)} has position {int(layout.position_ids[index])}, and sees {len(path) - 1} tokens "
        "before it"
    )
    if leaked := _leaked(layout, path, int(layout.turn[index])):
        return f"reasoning leaks: {said}, among them {say_token(layout, leaked[0])}"
    return f"positions: {said}"


def _wrong_history(layout: Layout, turn: int, number: int, source: int, history: Tensor) -> str:
    said = f"target {number} of turn {turn} is asked of {say_token(layout, source)}"
    for index in (layout.input_ids == history[-1]).nonzero().squeeze(1).tolist():
        if torch.equal(layout.input_ids[_path(layout.until, index)], history):
            return f"target index: {said}; what the sample has before it ends at {say_token(layout, index)}"
    path = _path(layout.until, source)
    leaked = _leaked(layout, path, turn)
    if leaked and len(path) > len(history):
        return f"reasoning leaks: {said}, which sees {say_token(layout, leaked[0])}"
    return f"tree: {said}, and no token of the layout has the sample's {len(history)} tokens on its path"


def say_token(layout: Layout | Row, index: int) -> str:
    """A token by its place and what it is."""
    turn, role = (layout.turn, layout.role) if isinstance(layout, Layout) else (layout["turn"][0], layout["role"][0])
    words = " and ".join(flag.name.lower() for flag in Role if flag.name and flag & int(role[index]))
    document = ""
    if not isinstance(layout, Layout) and int(layout["document"][0].max()) > 0:
        document = f" of conversation {int(layout['document'][0, index])}"
    return f"token {index} ({words} of turn {int(turn[index])}{document})"


def model_fault(model: nn.Module, patch: Patch, row: Row, chosen: Sequence[Conversation], limit: float) -> str | None:
    """The culprit in a patched model, or None if all hidden states that predict a target are those of the samples.

    `row` holds the layouts of `chosen`; `limit` is the relative error of hidden states above which they differ.
    """
    tree = _watch(model, patch, row)
    for name, reached in (("input_ids", tree.ids), ("position_ids", tree.positions)):
        if reached is not None and not torch.equal(reached, row[name]):
            index = int((reached != row[name])[0].nonzero()[0])
            return (
                f"{name.removesuffix('_ids')}s: {say_token(row, index)} reached the decoder with {name} "
                f"{int(reached[0, index])} in place of {int(row[name][0, index])}: something changes them on the way"
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
    _, index, right = min(wrong, key=lambda entry: entry[:2])
    path = _path(row["until"][0], index).tolist()
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

    def decoder_inputs(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
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
        parts = [(name, module) for name, module in decoder.named_modules() if _is_part(name)]
        hooks = [
            root.get_input_embeddings().register_forward_hook(embed),
            decoder.register_forward_pre_hook(decoder_inputs, with_kwargs=True),
            decoder.register_forward_hook(hidden, prepend=True),
            *(
                module.register_forward_hook(layer(name))
                for name, module in parts
                if not isinstance(module, torch.jit.ScriptModule)  # which take none
            ),
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
