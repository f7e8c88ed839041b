"""What `verify` finds: how far each way of computing is off, how far it may be, and the report."""

from dataclasses import dataclass, field
from typing import NamedTuple

from flexreason.proof.compare import DROWNED, FACTOR, GROUP_FACTOR


class NoVerdict(Exception):
    """Something that keeps a comparison from meaning anything."""


class Limits(NamedTuple):
    """Up to which relative error each is called equal."""

    loss: float
    logprobs: float
    gradients: float
    groups: dict[str, float]  # by group of parameters

    def of(self, group: str) -> float:
        return self.groups.get(group, self.gradients)


@dataclass(frozen=True)
class Error:
    """How far one way of computing is from the reference: relative errors."""

    way: str  # "one pass" or "samples"
    dtype: str
    reference: str
    loss: float
    logprobs: float
    gradients: float | None  # of all parameters; None without a backward
    groups: dict[str, float]  # the same by group of parameters
    limits: Limits | None  # None for what sets them

    @property
    def worst(self) -> str | None:
        """The group of parameters that is furthest off, by what is allowed it."""
        limits = self.limits
        return max(
            self.groups, key=lambda group: self.groups[group] / (limits.of(group) if limits else 1.0), default=None
        )

    @property
    def faults(self) -> list[str]:
        """What is above its limit, or no number."""
        if self.limits is None:
            return []
        allowed = [("loss", self.loss, self.limits.loss), ("logprobs", self.logprobs, self.limits.logprobs)]
        if self.gradients is not None:
            allowed.append(("gradients", self.gradients, self.limits.gradients))
        allowed += [("gradients", error, self.limits.of(group)) for group, error in self.groups.items()]
        return list(dict.fromkeys(name for name, error, limit in allowed if not error <= limit))


def limits_from(own: Error, rounding: float) -> Limits:
    """How far one pass may be off in a dtype in which the samples themselves are off by `own`, or by `rounding`."""
    if own.gradients is not None and not own.gradients < DROWNED:
        raise NoVerdict(
            f"the samples' own gradients are {own.gradients:.1e} off in {own.dtype}: rounding drowns them; use "
            "--dtype float32 or float64"
        )
    loss, logprobs = max(own.loss, own.logprobs, rounding), max(own.logprobs, rounding)
    groups = {group: GROUP_FACTOR * max(error, rounding) for group, error in own.groups.items()}
    return Limits(FACTOR * loss, FACTOR * logprobs, FACTOR * max(own.gradients or 0.0, rounding), groups)


@dataclass(frozen=True)
class Report:
    """What `verify` found. `ok` only if every comparison that could be made came out equal."""

    model: str
    dtype: str
    backend: str
    loss: str
    verdict: str  # "exact", "NOT exact", "no verdict"
    errors: list[Error] = field(default_factory=list)
    culprit: str | None = None
    notes: list[str] = field(default_factory=list)
    conversations: int = 0
    numbers: list[int] = field(default_factory=list)  # of these conversations, among those that were given
    turns: int = 0
    sample_tokens: int = 0
    tree_tokens: int = 0
    targets: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0

    @property
    def ok(self) -> bool:
        return self.verdict == "exact"

    def __str__(self) -> str:
        lines = [
            f"{self.model}, {self.dtype}, backend {self.backend}, loss {self.loss}",
            f"{self.conversations} conversations, {self.turns} turns, {self.targets} targets: "
            f"{self.sample_tokens} tokens in samples, {self.tree_tokens} in one pass",
            "",
        ]
        if self.errors:
            lines.append(f"{'relative errors':<28}{'loss':>10}{'log-probs':>12}{'gradients':>12}")
        for e in self.errors:
            lines.append(f"{f'{e.way}, {e.dtype}':<28}" + _figures(e.loss, e.logprobs, e.gradients))
            if e.limits:
                above = f"   above it: {', '.join(e.faults)}" if e.faults else ""
                lines.append(f"{'    limit':<28}{_figures(*e.limits[:3])}{above}")
                if e.worst is not None:
                    lines.append(
                        f"    worst gradient: {e.worst}, {e.groups[e.worst]:.1e} of {e.limits.of(e.worst):.1e}"
                    )
        if references := sorted({e.reference for e in self.errors}):
            lines.append(f"against {'; '.join(references)}")
        lines += [f"note: {note}" for note in self.notes]
        lines.append(f"{self.seconds:.0f} s, peak memory {self.peak_bytes / 2**30:.1f} GiB")
        lines += ["", f"verdict: {self.verdict}"]
        if self.culprit:
            lines.append(f"culprit: {self.culprit}")
        return "\n".join(lines)


def _figures(loss: float, logprobs: float, gradients: float | None) -> str:
    return f"{loss:>10.1e}{logprobs:>12.1e}" + (f"{'-':>12}" if gradients is None else f"{gradients:>12.1e}")
