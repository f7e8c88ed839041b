"""Which conversations are held against the samples: the shortest of yours, or some drawn at random."""

import dataclasses
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from flexreason.model.loss import is_weighted
from flexreason.model.refuse import refuse_rope
from flexreason.proof.sizes import length_constants
from flexreason.tree.layout import Layout, unmerge
from flexreason.tree.merge import lay_out
from flexreason.tree.row import collate
from flexreason.tree.sample import Sample


class Conversation(NamedTuple):
    """A conversation to compare."""

    layout: Layout
    samples: list[Sample]  # what the layout is to be
    number: int  # among those that were given

    @property
    def cost(self) -> int:
        """Tokens to compute, in the tree and in the samples."""
        return len(self.layout) + sum(map(len, self.samples))


WORK = 3e11
"""Tokens computed times parameters, of what is chosen for a run: half a minute to a minute on a laptop."""

CONVERSATIONS = 8
"""The most that are chosen."""

LONGEST_RANDOM = 400
"""Tokens in the trunk of a random conversation that need not cross anything."""


def choose(
    layouts: Sequence[Layout],
    samples: Sequence[Sequence[Sample]] | None,
    config: PreTrainedConfig,
    tokens: int,
    notes: list[str],
    cut: bool,
) -> list[Conversation]:
    """The conversations to compare on a model; what is left out is noted.

    Args:
        samples: what each layout is to be; by default what `unmerge` makes of it.
        tokens: the most to compute, in trees and samples together.
        cut: whether the first turns of a conversation may stand for it.
    """
    conversations = _paired(layouts, samples, notes)
    chosen = _one_side_of_rope(config, _shortest(conversations, tokens, notes, cut), notes)
    longest = max(len(sample) for conversation in chosen for sample in conversation.samples)
    notes += [
        f"{key} {constant}: no sample here is longer, so what is behind it is not compared"
        for key, constant in length_constants(config).items()
        if longest <= constant
    ]
    return chosen


def has_fork(layout: Layout) -> bool:
    """Whether some token stands behind another than the one that it follows: else one pass is a sample as it is."""
    return bool((layout.until[:-1] <= torch.arange(1, len(layout))).any())


def tokens_for(parameters: int) -> int:
    """Tokens to compute on a model with so many parameters, where nobody says how many."""
    return min(8192, max(64, int(WORK / max(1, parameters))))


def _paired(
    layouts: Sequence[Layout], samples: Sequence[Sequence[Sample]] | None, notes: list[str]
) -> list[Conversation]:
    """Every layout with its samples, and with weights of one."""
    if not layouts:
        raise ValueError("verify: no layouts; expected at least one conversation")
    for number, layout in enumerate(layouts):
        if not len(layout.target_turn) or int(torch.bincount(layout.target_turn).min()) == 0:
            raise ValueError(f"verify: conversation {number} has a turn without targets")
    samples = [unmerge(layout) for layout in layouts] if samples is None else samples
    if len(samples) != len(layouts):
        raise ValueError(f"verify: {len(layouts)} layouts and samples for {len(samples)}")
    if any(is_weighted(layout.target_weight) for layout in layouts):
        notes.append("target weights are left out of the comparison: every target counts once")
    unweighted = [dataclasses.replace(x, target_weight=torch.ones_like(x.target_weight)) for x in layouts]
    return [Conversation(unweighted[number], list(own), number) for number, own in enumerate(samples)]


def _shortest(conversations: Sequence[Conversation], budget: int, notes: list[str], cut: bool) -> list[Conversation]:
    """The shortest conversations that fit into the budget. Where none does, the first turns of the shortest one, or all
    of it if it may not be cut. Conversations of one turn share nothing: they are taken only where there are no others.
    """
    pool = [conversation for conversation in conversations if conversation.layout.n_samples > 1]
    if not pool:
        notes.append("no conversation has more than one turn: one pass shares nothing between samples here")
        pool = list(conversations)
    elif len(pool) < len(conversations):
        notes.append(f"left out: {len(conversations) - len(pool)} conversations of one turn, which share nothing")
    pool.sort(key=lambda conversation: conversation.cost)
    chosen: list[Conversation] = []
    for conversation in pool[:CONVERSATIONS]:
        if sum(other.cost for other in chosen) + conversation.cost > budget:
            break
        chosen.append(conversation)
    if chosen:
        if len(chosen) < len(pool):
            notes.append(f"the {len(chosen)} shortest of {len(pool)} conversations")
        return chosen
    shortest = pool[0]
    if not cut:
        notes.append(f"the shortest of {len(pool)} conversations, though it is longer than {budget} tokens to compute")
        return [shortest]
    for turns in range(len(shortest.samples), 0, -1):
        first = shortest.samples[:turns]
        shorter = Conversation(lay_out(first), first, shortest.number)
        if shorter.cost <= budget or turns <= 2:
            break
    notes.append(
        f"all {len(pool)} conversations are longer than the {budget} tokens to compute; the first {turns} turns of the "
        f"shortest stand for them ({shorter.cost} tokens; tokens= or --tokens takes more)"
    )
    return [shorter]


def _one_side_of_rope(config: PreTrainedConfig, chosen: list[Conversation], notes: list[str]) -> list[Conversation]:
    """RoPE that reads the longest position of a row: what stands behind its threshold is left out, and said."""
    while True:
        try:
            refuse_rope(config.get_text_config(), collate([conversation.layout for conversation in chosen]))
            return chosen
        except ValueError:
            if len(chosen) == 1:
                raise
            longest = max(chosen, key=lambda conversation: max(map(len, conversation.samples)))
            chosen = [conversation for conversation in chosen if conversation is not longest]
            notes.append("a conversation on the other side of RoPE's threshold is left out; verify it by itself")


def random_conversations(
    config: PreTrainedConfig, tokens: int | None, seed: int
) -> tuple[list[list[Sample]], list[str]]:
    """A short conversation, and for every length constant of the config one that crosses it, where that is not long."""
    vocabulary = config.get_text_config().vocab_size
    draw, notes = random.Random(seed), []
    conversations = [_drawn(draw, vocabulary, 24), _drawn(draw, vocabulary, 12)]
    for key, length in sorted(length_constants(config).items()):
        if 4 * length <= (tokens or 4 * LONGEST_RANDOM):
            conversations.append(_drawn(draw, vocabulary, length))
        else:
            notes.append(
                f"{key} {length} is not crossed on this model itself, which would take some {4 * length} tokens "
                f"(--tokens {6 * length} does); `flexreason models` crosses it on a small one of the same structure"
            )
    return conversations, notes


def _drawn(draw: random.Random, vocabulary: int, length: int) -> list[Sample]:
    """Three turns, the second without reasoning, the last two of which end behind `length`."""

    def ids(n: int) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(n)]

    history: list[int] = ids(max(2, length // 3))
    samples = []
    for reasoning in (max(2, length // 2), 0, max(2, length // 4)):
        answer = ids(6)
        samples.append(Sample(history, [*ids(reasoning), *answer]))
        history = [*history, *answer, *ids(max(2, length // 3))]
    return samples
