"""The figures of all conversations of a data set, added up one by one, in memory that does not grow with them.

>>> summary = Summary(16384)
>>> summary.add(Figures("line 1", "messages", 2, 2, 30, 300, 20, 150, 8, 4, 18, [20], [0], 150, [], {"rendered": 2}))
>>> summary.conversations, summary.ratio, summary.rows.n
(1, 1.5, 1)
"""

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

from flexreason.chat.encode import REMARKS
from flexreason.data.figures import SIZES, Amount, Figures, Shape, advice
from flexreason.data.pack import Packer

EXAMPLES = 5
"""Samples longer than a row that are named."""


def bin_of(n: int) -> int:
    """The bin that a number falls into, named by the least number in it.

    Below 16 each number has a bin of its own; above, there are eight bins from any power of two to its double.

    >>> [bin_of(n) for n in (15, 16, 17, 18, 100)]
    [15, 16, 16, 18, 96]
    """
    shift = max(0, n.bit_length() - 4)
    return n >> shift << shift


class Fill:
    """Rows as `Packer` makes them of a stream of sizes, and how full they are."""

    def __init__(self, length: int) -> None:
        self.length, self.packer = length, Packer(length)
        self.waiting: dict[int, tuple[int, int]] = {}  # number -> tokens, of these recomputed
        self.n = self.documents = self.tokens = self.recomputed = 0
        self.last = (0, 0)

    def add(self, tokens: int, recomputed: int = 0) -> None:
        self.waiting[self.documents] = (tokens, recomputed)
        for row in self.packer.add(self.documents, tokens):
            self._take(row)
        self.documents += 1

    def _take(self, row: list[int]) -> None:
        sizes = [self.waiting.pop(number) for number in row]
        self.last = (sum(tokens for tokens, _ in sizes), sum(again for _, again in sizes))
        self.n += 1
        self.tokens += self.last[0]
        self.recomputed += self.last[1]

    def flushed(self) -> "Fill":
        """A copy in which what still waits has become rows."""
        whole = copy.deepcopy(self)
        for row in whole.packer.flush():
            whole._take(row)
        return whole

    @property
    def full(self) -> float | None:
        """How full rows are, without the last one and without recomputed tokens; None if there is one row only."""
        if self.n < 2:
            return None
        return (self.tokens - self.last[0] - self.recomputed + self.last[1]) / (self.length * (self.n - 1))

    @property
    def with_recomputed(self) -> float | None:
        """The same with recomputed tokens."""
        return None if self.n < 2 else (self.tokens - self.last[0]) / (self.length * (self.n - 1))

    @property
    def last_full(self) -> float:
        return (self.last[0] - self.last[1]) / self.length


class Summary:
    """Figures added up.

    Args:
        length: Tokens of a row.
        shape: The model whose work is counted; without it some usual sizes.
    """

    def __init__(self, length: int, shape: Shape | None = None) -> None:
        self.length, self.shapes = length, SIZES if shape is None else [shape]
        self.conversations = self.answers = self.samples = self.reasoning = self.response = 0
        self.in_samples, self.in_trees = Amount(), Amount()
        self.one_by_one, self.one_pass = Amount(), Amount()
        self.longest_sample, self.longest_tree = (0, ""), (0, "")  # tokens, where
        self.split = self.parts = self.recomputed = 0  # conversations longer than a row, and what they are split into
        self.too_long = self.with_too_long = 0  # samples longer than a row; conversations that have some
        self.examples: list[str] = []
        self.how: Counter[str] = Counter()
        self.dirty: Counter[str] = Counter()  # of answers that are trained all the same
        self.seconds = self.render_seconds = 0.0
        self.sample_lengths: Counter[int] = Counter()  # longest samples of conversations, by bin
        self.tree_lengths: Counter[int] = Counter()
        self.cells: Counter[tuple[int, int]] = Counter()  # by bins of tokens in samples and tree
        self.turns: dict[int, tuple[int, Amount, Amount]] = {}  # by bin: conversations, one by one, one pass
        self._fill = Fill(length)

    def add(self, figures: Figures) -> None:
        self.conversations += 1
        self.answers += figures.answers
        self.samples += figures.samples
        self.reasoning += figures.reasoning
        self.response += figures.response
        self.in_samples = self.in_samples.plus(Amount(figures.sample_tokens, figures.sample_pairs, figures.targets))
        self.in_trees = self.in_trees.plus(Amount(figures.tree_tokens, figures.tree_pairs, figures.targets))
        self.one_by_one = self.one_by_one.plus(figures.one_by_one)
        self.one_pass = self.one_pass.plus(figures.one_pass)
        if figures.longest_sample > self.longest_sample[0]:
            self.longest_sample = figures.longest_sample, figures.where
        if figures.tree_tokens > self.longest_tree[0]:
            self.longest_tree = figures.tree_tokens, figures.where
        for tokens, recomputed in zip(figures.parts, figures.recomputed, strict=True):
            self._fill.add(tokens, recomputed)
        if len(figures.parts) > 1:
            self.split += 1
            self.parts += len(figures.parts)
            self.recomputed += sum(figures.recomputed)
        if figures.too_long:
            self.with_too_long += 1
            self.too_long += len(figures.too_long)
            named = figures.too_long[: EXAMPLES - len(self.examples)]
            self.examples += [f"{figures.where}: turn {turn}, {tokens:,} tokens" for turn, tokens, _ in named]
        self.how.update(figures.how)
        self.dirty.update(figures.dirty)
        self.seconds += figures.seconds
        self.render_seconds += figures.render_seconds
        self.sample_lengths[bin_of(figures.longest_sample)] += 1
        self.tree_lengths[bin_of(figures.tree_tokens)] += 1
        self.cells[bin_of(figures.sample_tokens), bin_of(figures.tree_tokens)] += 1
        n, samples, rows = self.turns.get(at := bin_of(figures.samples), (0, Amount(), Amount()))
        self.turns[at] = n + 1, samples.plus(figures.one_by_one), rows.plus(figures.one_pass)

    @property
    def targets(self) -> int:
        return self.reasoning + self.response

    @property
    def ratio(self) -> float:
        """Tokens in samples for one in the trees."""
        return self.in_samples.tokens / max(1, self.in_trees.tokens)

    @property
    def rows(self) -> Fill:
        return self._fill.flushed()

    def work(self) -> Iterator[tuple[Shape, int, int]]:
        """For each model, the operations of the N samples, and of one pass over the same."""
        for shape in self.shapes:
            yield shape, shape.work(self.one_by_one), shape.work(self.one_pass)

    def as_dict(self) -> dict[str, Any]:
        """Everything, as plain values for JSON."""
        rows = self.rows
        return {
            "length": self.length,
            "conversations": self.conversations,
            "assistant_messages": self.answers,
            "turns": self.samples,
            "samples": {"tokens": self.in_samples.tokens, "pairs": self.in_samples.pairs},
            "trees": {"tokens": self.in_trees.tokens, "pairs": self.in_trees.pairs},
            "ratio": self.ratio,
            "targets": {"all": self.targets, "reasoning": self.reasoning, "response": self.response},
            "longest_sample": {"tokens": self.longest_sample[0], "where": self.longest_sample[1]},
            "longest_tree": {"tokens": self.longest_tree[0], "where": self.longest_tree[1]},
            "rows": {
                "number": rows.n,
                "tokens": rows.tokens,
                "recomputed": rows.recomputed,
                "full": rows.full,
                "full_with_recomputed": rows.with_recomputed,
                "last_full": rows.last_full,
            },
            "split": {"conversations": self.split, "parts": self.parts, "recomputed": self.recomputed},
            "too_long": {"samples": self.too_long, "conversations": self.with_too_long, "examples": self.examples},
            "found": dict(sorted(self.how.items())),
            "work": [
                {"model": shape.name, "samples": samples, "one_pass": one, "speed_up": samples / one if one else None}
                for shape, samples, one in self.work()
            ],
            "seconds": {"encoding": self.seconds, "rendering": self.render_seconds},
            "histograms": {
                "longest_sample": dict(sorted(self.sample_lengths.items())),
                "tree": dict(sorted(self.tree_lengths.items())),
                "turns": {at: self.turns[at][0] for at in sorted(self.turns)},
            },
            "speed_up_by_turns": {
                shape.name: {
                    at: shape.work(samples) / shape.work(one)
                    for at, (_, samples, one) in sorted(self.turns.items())
                    if one.tokens
                }
                for shape in self.shapes
            },
        }

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """Everything in words, with a line for each thing."""
        work = ["", *self._about_work()] if self.one_pass.tokens else []
        return [*self._about(), *self._about_rows(), *work]

    def _about(self) -> Iterator[str]:
        excluded = self.answers - self.samples
        yield _line("conversations", f"{self.conversations:,}")
        yield _line("turns", f"{self.samples:,}, each one sample")
        if excluded:
            yield _line("", f"{_some(excluded, 'assistant message')} besides, not trained on")
        yield _line("tokens in samples", f"{self.in_samples.tokens:,}")
        yield _line("tokens in trees", f"{self.in_trees.tokens:,}; samples have {self.ratio:.2f} times as many")
        yield _line("targets", f"{self.targets:,}: {_share(self.reasoning, self.targets)} reasoning, the rest response")
        if tokenized := self.how["given"]:
            yield _line("", f"of {tokenized:,} tokenized samples it is not known which is which: all count as response")
        yield _line("longest sample", f"{self.longest_sample[0]:,} tokens ({self.longest_sample[1]})")
        yield _line("longest tree", f"{self.longest_tree[0]:,} tokens ({self.longest_tree[1]})")
        ways = ", ".join(f"{n:,} {kind}" for kind, n in self.how.most_common())
        yield _line("turns, how found", f"{ways or 'none'} (docs/templates.md)")
        if off := self.how["thinking off"]:
            yield _line("warning", f"thinking off in {_some(off, 'turn')}: {REMARKS['thinking off']}")

    def _about_rows(self) -> Iterator[str]:
        rows = self.rows
        if not rows.n:
            yield _line(f"rows of {self.length:,}", "none")
        elif rows.full is None:
            yield _line(f"rows of {self.length:,}", f"{rows.n}, {rows.last_full:.1%} full")
        else:
            yield _line(f"rows of {self.length:,}", f"{rows.n:,}, {rows.full:.1%} full, the last aside")
        if self.split:
            yield _line(
                "split",
                f"{_some(self.split, 'conversation')} longer than a row, into {self.parts:,} parts, without loss",
            )
            share = _share(self.recomputed, rows.tokens)
            yield _line("", f"{self.recomputed:,} tokens of history are computed again for it ({share} of all in rows)")
            if rows.with_recomputed is not None:
                yield _line("", f"and not counted as filling rows; with them rows are {rows.with_recomputed:.1%} full")
        if self.too_long:
            yield _line(
                "longer than a row",
                f"{_some(self.too_long, 'sample')} of {_some(self.with_too_long, 'conversation')}, by themselves",
            )
            for example in self.examples:
                yield _line("", f"  {example}")
            if self.too_long > len(self.examples):
                yield _line("", "  ...")
            yield _line("", "training refuses them unless it is told to leave them out; a longer row takes them.")
            yield _line("", "They are not among the rows, nor in the work below")

    def _about_work(self) -> Iterator[str]:
        width = max(28, *(len(shape.name) + 2 for shape in self.shapes))
        yield f"{'work of a pass over the data':<{width}}{'N samples':>12}{'one pass':>12}{'speed-up':>10}"
        for shape, samples, one in self.work():
            yield f"{'  ' + shape.name:<{width}}{samples:>12.2e}{one:>12.2e}{samples / one:>10.2f}"
            if shape.note:
                yield f"    {shape.note}"
        yield "Operations of matrix products, forward and backward: layers by token, attention by visible pair, the"
        yield "head by target in both. N samples one by one or packed into rows are the same work. The speed-up is the"
        yield "ratio of work: what to expect where kernels are equally fast."
        if words := advice(max(samples / one for _, samples, one in self.work())):
            yield words[0].upper() + words[1:] + "."


def _line(label: str, text: str) -> str:
    return f"{label:<20}{text}"


def _share(part: int, whole: int) -> str:
    return f"{part / max(1, whole):.1%}"


def _some(n: int, thing: str) -> str:
    return f"{n:,} {thing}{'' if n == 1 else 's'}"
