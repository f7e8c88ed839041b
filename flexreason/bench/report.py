"""What was computed, on what, and how long it took."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from flexreason.bench.measure import Measured, Ratio, ratio, wrong
from flexreason.data.figures import Amount, Shape, advice
from flexreason.tree.draw import draw_table
from flexreason.tree.layout import Layout
from flexreason.tree.sample import Sample

MORE = 1.05
"""How far a speed-up may be above the ratio of work before it is explained: less is noise."""


@dataclass(frozen=True)
class Report:
    """All ways, and what they computed."""

    model: str
    device: str
    dtype: str
    torch: str
    conversations: int
    turns: int
    tree: Amount
    samples: Amount
    shape: Shape | None
    ways: list[Measured]
    notes: list[str]

    @property
    def token_ratio(self) -> float:
        return self.samples.tokens / self.tree.tokens

    @property
    def work_ratio(self) -> float | None:
        return None if self.shape is None else self.shape.work(self.samples) / self.shape.work(self.tree)

    def differs(self, way: Measured) -> bool:
        """Whether a way is not the first that ran, which are the N samples one by one if they fit."""
        return wrong(way, self.ways, getattr(torch, self.dtype))

    @property
    def reference(self) -> Measured | None:
        """The N samples, as whoever does without us would compute them best: the faster way of those that ran."""
        ran = [way for way in self.ways if way.ms and way.name.startswith("N samples") and not self.differs(way)]
        return min(ran, key=lambda way: way.median, default=None)

    @property
    def ok(self) -> bool:
        """Whether one pass ran, forward and backward, with the samples' loss and gradients wherever it did."""
        ran = [way for way in self.ways if way.ms and way.name.startswith("one pass") and way.exact]
        return any(way.trains for way in ran) and not any(map(self.differs, ran))

    def speed_up(self, way: Measured) -> Ratio | None:
        """By the N samples, repeat by repeat; none for forward alone."""
        if (reference := self.reference) is None or not way.ms or not way.trains:
            return None
        return ratio(reference.ms, way.ms)

    def _on_the_speed_up(self) -> list[str]:
        """Where one pass gains nothing, and where it gains more than the ratio of work says."""
        ours = [way for way in self.ways if way.name.startswith("one pass") and way.exact]
        gains = [speed_up.median for way in ours if (speed_up := self.speed_up(way))]
        if not gains:
            return []
        notes = [words] if (words := advice(max(gains))) else []
        if self.work_ratio and max(gains) > MORE * self.work_ratio:
            more = "more than 100 % of what the work says"
            notes.append(f"{more}: short samples use this machine less well than one row does")
        return notes

    def as_json(self) -> dict[str, Any]:
        ways = []
        for way in self.ways:
            faster = self.speed_up(way)
            shown: dict[str, Any] = {"median_ms": way.median if way.ms else None, "differs": self.differs(way)}
            shown |= {"speed_up": faster and faster.median, "speed_up_range": faster and faster[1:]}
            ways.append({**asdict(way), **shown})
        ratios = {"token_ratio": self.token_ratio, "work_ratio": self.work_ratio, "ok": self.ok}
        named = {"tree": self.tree._asdict(), "samples": self.samples._asdict(), "ways": ways}
        named |= {"notes": [*self.notes, *self._on_the_speed_up()]}
        return {**asdict(self), **named, **ratios}

    def __str__(self) -> str:
        rows = [["", "ms", "speed-up", "of what work says", "memory", "loss"]]
        for way in self.ways:
            if not way.ms:
                rows.append([way.name, "", "", "", "", way.failed])
                continue
            faster, share = self.speed_up(way), ""
            if faster and self.work_ratio and way.name.startswith("one pass") and way.exact:
                share = f"{faster.median / self.work_ratio:.0%}"
            memory = f"{(way.peak or 0) / 2**30:.2f} GiB"
            loss = f"{way.loss:.6f}" + (", which is another" if self.differs(way) else "")
            loss += "" if way.trains else ", forward alone"
            rows.append([way.name, f"{way.median:,.0f}", str(faster or ""), share, memory, loss])
        more = f"{self.token_ratio:.2f} times as many tokens"
        more += f", {self.work_ratio:.2f} times as much work" if self.work_ratio else ""
        lines = [
            f"{self.model}, {self.dtype}, on {self.device}, torch {self.torch}",
            f"{self.turns} turns in {_count(self.conversations)}: {self.tree.tokens:,} tokens in one pass, "
            f"{self.samples.tokens:,} in the samples",
            f"The samples have {more}",
            "",
            draw_table(rows),
            *(["", *(f"- {note}" for note in notes)] if (notes := [*self.notes, *self._on_the_speed_up()]) else []),
        ]
        if not self.ok:
            lines += [
                "",
                "One pass did not run, or has another loss or other gradients: `flexreason verify` tells why.",
            ]
        return "\n".join(lines)


def _count(n: int) -> str:
    return "one conversation" if n == 1 else f"{n} conversations"


def amount(layouts: Sequence[Layout]) -> Amount:
    """What there is to compute for trees."""
    return Amount(
        tokens=sum(map(len, layouts)),
        pairs=sum(int((layout.position_ids + 1).sum()) for layout in layouts),
        targets=sum(len(layout.target_ids) for layout in layouts),
    )


def amount_of_samples(samples: Sequence[Sample]) -> Amount:
    """What there is to compute for samples, each by itself."""
    return Amount(
        tokens=sum(map(len, samples)),
        pairs=sum(len(sample) * (len(sample) + 1) // 2 for sample in samples),
        targets=sum(len(sample.target_ids) for sample in samples),
    )
