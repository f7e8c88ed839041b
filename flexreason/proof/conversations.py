"""Which conversations are held against the samples: of many the shortest, or some drawn at random."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedConfig

from flexreason.model.refuse import refuse_rope
from flexreason.proof.tiny import length_constants
from flexreason.tree.layout import Layout
from flexreason.tree.merge import lay_out
from flexreason.tree.row import collate
from flexreason.tree.sample import Sample


class Given(NamedTuple):
    """A conversation to compare."""

    layout: Layout
    samples: list[Sample]  # what the layout is to be
    number: int  # among those that were given

    @property
    def cost(self) -> int:
        """Tokens to compute, in the tree and in the samples."""
        return len(self.layout) + sum(map(n_tokens, self.samples))


WORK = 3e11
"""Tokens computed times parameters, of what is chosen for a run: half a minute to a minute on a laptop."""

CONVERSATIONS = 8
"""The most that are chosen."""

LONGEST = 400
"""Tokens in the trunk of a random conversation that need not cross anything."""


def tokens_for(parameters: int) -> int:
    """Tokens to compute on a model with so many parameters."""
    return min(8192, max(64, int(WORK / max(1, parameters))))


def choose(given: Sequence[Given], budget: int, notes: list[str], cut: bool) -> list[Given]:
    """The shortest conversations that fit; where none does, the first turns of the shortest, or if that is not to be
    cut the whole of it. Those of one turn are taken only where there are no others: they share nothing."""
    pool = [one for one in given if one.layout.n_samples > 1]
    if not pool:
        notes.append("no conversation has more than one turn: one pass shares nothing between samples here")
        pool = list(given)
    elif len(pool) < len(given):
        notes.append(f"left out: {len(given) - len(pool)} conversations of one turn, which share nothing")
    pool.sort(key=lambda one: one.cost)
    chosen: list[Given] = []
    for one in pool[:CONVERSATIONS]:
        if sum(other.cost for other in chosen) + one.cost > budget:
            break
        chosen.append(one)
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
        shorter = Given(lay_out(first), first, shortest.number)
        if shorter.cost <= budget or turns <= 2:
            break
    notes.append(
        f"all {len(pool)} conversations are longer than the {budget} tokens to compute; the first {turns} turns of the "
        f"shortest stand for them ({shorter.cost} tokens; tokens= or --tokens takes more)"
    )
    return [shorter]


def one_side_of_rope(config: PreTrainedConfig, chosen: list[Given], notes: list[str]) -> list[Given]:
    """RoPE that reads the longest position of a row: what stands behind its threshold is left out, and said."""
    while True:
        try:
            refuse_rope(config.get_text_config(), collate([one.layout for one in chosen]))
            return chosen
        except ValueError:
            if len(chosen) == 1:
                raise
            longest = max(chosen, key=lambda one: max(map(n_tokens, one.samples)))
            chosen = [one for one in chosen if one is not longest]
            notes.append("a conversation on the other side of RoPE's threshold is left out; verify it by itself")


def what_is_not_crossed(config: PreTrainedConfig, chosen: Sequence[Given]) -> list[str]:
    """The lengths of a config that no sample reaches, so that what is behind them is not compared."""
    longest = max(n_tokens(sample) for one in chosen for sample in one.samples)
    return [
        f"{key} {constant}: no sample here is longer, so what is behind it is not compared"
        for key, constant in length_constants(config).items()
        if longest <= constant
    ]


def n_tokens(sample: Sample) -> int:
    return len(sample.prompt_ids) + len(sample.target_ids)


def random_conversations(
    config: PreTrainedConfig, tokens: int | None, seed: int
) -> tuple[list[list[Sample]], list[str]]:
    """A short conversation, and for every length constant of the config one that crosses it, where that is not long."""
    vocabulary = config.get_text_config().vocab_size
    draw, notes = random.Random(seed), []
    conversations = [_conversation(draw, vocabulary, 24), _conversation(draw, vocabulary, 12)]
    for key, length in sorted(length_constants(config).items()):
        if 4 * length <= (tokens or 4 * LONGEST):
            conversations.append(_conversation(draw, vocabulary, length))
        else:
            notes.append(
                f"{key} {length} is not crossed on this model itself, which would take some {4 * length} tokens "
                f"(--tokens {6 * length} does); `flexreason models` crosses it on a small one of the same structure"
            )
    return conversations, notes


def _conversation(draw: random.Random, vocabulary: int, length: int) -> list[Sample]:
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
