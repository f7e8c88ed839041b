"""Sums over rows: they divide a step's loss, and make its logs and its evaluation.

The loss of an optimizer step is the mean over all its targets, however these fall on rows, accumulated passes and
ranks. So a loop must know the weight of all targets of a step before its first pass:

    total = total_weight(rows_of_this_step)                      # over all ranks: sum it there
    model(**row, num_items_in_batch=total).loss.backward()       # for each row; times the number of ranks under DDP

Shapes: S tokens, T targets.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from flexreason.tree.row import IGNORED, NOBODY, Row
from flexreason.tree.sample import Role


def total_weight(rows: Iterable[Row]) -> Tensor:
    """The weight of all targets of some rows, a number on the rows' device.

    >>> import flexreason as fr
    >>> row = fr.collate([fr.lay_out_turns([([1, 2], [10, 11], [20]), ([3], [12], [21])])])
    >>> total_weight([row, row])
    tensor(10.)
    """
    weights = [(row["target_weight"] * (row["labels"] != IGNORED)).sum() for row in rows]
    return sum(weights, torch.zeros((), dtype=torch.float32))


def target_roles(row: Row) -> Tensor:
    """[T] bool: which targets are reasoning; the others are responses.

    A target is the token that predicts the next target of its turn, and so has that one's role; the last of a turn
    closes the response.
    """
    source, turn, document = row["target_source"][0], row["target_turn"][0], row["target_document"][0]
    same = (turn[1:] == turn[:-1]) & (document[1:] == document[:-1]) & (turn[1:] != NOBODY)
    reasoning = (row["role"][0][source[1:]] & Role.REASONING).bool()
    return torch.cat([same & reasoning, same.new_zeros(1)])


def tokens_of(row: Row) -> tuple[Tensor, Tensor]:
    """How many tokens the row's trees have, and the samples that they stand for."""
    source, turn, document = row["target_source"][0], row["target_turn"][0], row["target_document"][0]
    last = torch.ones_like(turn, dtype=torch.bool)
    last[:-1] = (turn[1:] != turn[:-1]) | (document[1:] != document[:-1])
    last &= turn != NOBODY
    in_samples = ((row["position_ids"][0][source] + 2) * last).sum()
    return (row["document"] != NOBODY).sum(), in_samples


class Sums:
    """Log-probabilities and tokens of many rows, added up on their device, by role and by turn."""

    TURNS = 8
    """The first ones are told apart; later ones are taken together."""

    def __init__(self, device: torch.device) -> None:
        kind = torch.float32 if device.type == "mps" else torch.float64
        self.tokens = torch.zeros(2, dtype=kind, device=device)
        # by reasoning or response, by turn: weight, weight x nll, targets, nll
        self.targets = torch.zeros(2, self.TURNS + 1, 4, dtype=kind, device=device)

    def add(self, row: Row, logprobs: Tensor | None) -> None:
        self.tokens += torch.stack(tokens_of(row)).to(self.tokens)
        if logprobs is None:
            return
        turn, real = row["target_turn"][0], row["labels"][0] != IGNORED
        weight, nll = row["target_weight"][0].to(self.targets) * real, -logprobs.to(self.targets) * real
        values = torch.stack([weight, weight * nll, real.to(self.targets), nll], dim=-1)
        cell = (~target_roles(row)).long() * (self.TURNS + 1) + turn.clamp(0, self.TURNS)
        self.targets.view(-1, 4).index_add_(0, cell, values)

    def all(self) -> Tensor:
        """Everything in one tensor, for summing over ranks."""
        return torch.cat([self.tokens, self.targets.flatten()])

    def put(self, everything: Tensor) -> None:
        """What `all` gave, summed."""
        self.tokens, self.targets = everything[:2], everything[2:].view_as(self.targets)

    def losses(self) -> dict[str, float]:
        """The mean nll of all targets by weight, and the plain mean of each role and turn that has any."""
        cells = self.targets.cpu()
        by_role, by_turn = cells.sum(1), cells.sum(0)
        weight, nll = cells.sum((0, 1))[:2].tolist()
        means = {"loss": nll / weight} if weight > 0 else {}
        for name, (_, _, n, nll) in zip(("reasoning", "response"), by_role.tolist(), strict=True):
            if n:
                means[f"loss_{name}"] = nll / n
        for turn, (_, _, n, nll) in enumerate(by_turn.tolist()):
            if n:
                means[f"loss_turn_{turn}" + ("_on" if turn == self.TURNS else "")] = nll / n
        return means

    @property
    def n_targets(self) -> int:
        return int(self.targets[..., 2].sum())
