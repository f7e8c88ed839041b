"""One conversation in figures: plain numbers, made where it is encoded, that fit on a line of JSON."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from flexreason.data.intake import Item
from flexreason.data.splitting import Split, in_storage, seen_from, split
from flexreason.data.work import Amount
from flexreason.tree.layout import Layout
from flexreason.tree.sample import Role, Sample


@dataclass(frozen=True)
class Figures:
    """What a report needs to know of a conversation, at one length of rows."""

    where: str
    format: str
    answers: int  # assistant messages, trained on or not
    samples: int  # one a turn that is trained on
    sample_tokens: int
    sample_pairs: int  # visible ones, as all below
    tree_tokens: int
    tree_pairs: int
    reasoning: int  # targets that are
    response: int
    longest_sample: int
    parts: list[int]  # tokens of each part; one, unless the tree is longer than a row
    recomputed: list[int]  # of these, tokens that an earlier part has too
    part_pairs: int
    too_long: list[list[int]]  # turn, tokens and targets of every sample that is longer than a row, and in no part
    how: dict[str, int]  # how many turns were found in which way
    seconds: float = field(default=0.0, compare=False)  # that encoding took
    render_seconds: float = field(default=0.0, compare=False)  # of these, in the template

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Figures":
        return cls(**values)

    @property
    def targets(self) -> int:
        return self.reasoning + self.response

    @property
    def left_out(self) -> Amount:
        """What samples that no row can take would be."""
        sizes = [tokens for _, tokens, _ in self.too_long]
        return Amount(sum(sizes), sum(map(_triangle, sizes)), sum(targets for _, _, targets in self.too_long))

    @property
    def one_by_one(self) -> Amount:
        """The N samples that rows can take."""
        out = self.left_out
        return Amount(self.sample_tokens - out.tokens, self.sample_pairs - out.pairs, self.targets - out.targets)

    @property
    def one_pass(self) -> Amount:
        """The same samples as parts in rows, with what is computed again."""
        return Amount(sum(self.parts), self.part_pairs, self.targets - self.left_out.targets)


def figures_of(item: Item, length: int, found: Split | None = None) -> Figures:
    """The figures of a conversation in rows of `length`; `found`, if it has been split for them already."""
    samples, layout, where = item.encoded.samples, item.layout, item.conversation
    sizes = [len(sample.prompt_ids) + len(sample.target_ids) for sample in samples]
    found = found or split(layout, length, too_long="drop")
    reasoning = sum(map(_reasoning, samples))
    how = item.encoded.how
    answers = sum(message["role"] == "assistant" for message in where.messages)
    return Figures(
        where=where.where,
        format=where.format,
        answers=len(samples) if where.samples is not None else answers,
        samples=len(samples),
        sample_tokens=sum(sizes),
        sample_pairs=sum(map(_triangle, sizes)),
        tree_tokens=len(layout),
        tree_pairs=_pairs(layout),
        reasoning=reasoning,
        response=len(layout.target_ids) - reasoning,
        longest_sample=max(sizes),
        parts=[len(part) for part in found.parts],
        recomputed=_recomputed(layout, found),
        part_pairs=sum(map(_pairs, found.parts)),
        too_long=[[turn, sizes[turn], len(samples[turn].target_ids)] for turn in found.dropped],
        how={kind: how.count(kind) for kind in sorted(set(how))},
        seconds=item.seconds,
        render_seconds=item.encoded.render_seconds,
    )


def _triangle(n: int) -> int:
    """Visible pairs of n tokens in a chain."""
    return n * (n + 1) // 2


def _pairs(layout: Layout) -> int:
    """Visible pairs of a tree: each token is seen from itself to where its subtree ends."""
    return int((layout.until - torch.arange(len(layout))).sum())


def _reasoning(sample: Sample) -> int:
    return 0 if sample.target_roles is None else sum(bool(role & Role.REASONING) for role in sample.target_roles)


def _recomputed(layout: Layout, found: Split) -> list[int]:
    """By part, the tokens that an earlier part has too."""
    if len(found.parts) < 2:
        return [0] * len(found.parts)
    last, seen, made = in_storage(layout)[0], torch.zeros(len(layout), dtype=torch.bool), []
    for turns in found.turns:
        needed = seen_from(layout, [last[turn] for turn in turns])
        made.append(int((needed & seen).sum()))
        seen |= needed
    return made
