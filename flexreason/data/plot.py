"""A summary drawn: what conversations have in common, how long they are beside a row, and what that saves."""

from pathlib import Path
from typing import Any

from flexreason.data.summary import Summary

try:
    from matplotlib.backend_bases import FigureCanvasBase
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
except ImportError as error:
    raise ValueError("--plot: matplotlib is not installed: pip install 'flexreason[plot]'") from error

RATIOS = (1, 2, 4, 8, 16, 32)

DARK, LIGHT, WARN = "#1f4e79", "#9db8d2", "#b03a2e"


def check_name(path: Path) -> None:
    """Refuse a name that ends unlike any kind of picture."""
    if path.suffix[1:].lower() not in FigureCanvasBase.get_supported_filetypes():
        raise ValueError(f"--plot: expected a name that ends in .png, .svg or .pdf, found {path}")


def plot(summary: Summary, path: Path) -> None:
    """Draw three panels into one file; its name ends in .png, .pdf or .svg."""
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _tokens(figure, left, summary)
    _lengths(middle, summary)
    _speed_up(right, summary)
    figure.savefig(path, dpi=120)


def _tokens(figure: Any, axes: Any, summary: Summary) -> None:
    """Conversations by tokens in samples and tree; on a line parallel to the diagonal, equal savings."""
    x, y = ([_middle(cell[side]) for cell in summary.cells] for side in (0, 1))
    counts = list(summary.cells.values())
    dots = axes.scatter(x, y, c=counts, s=14, cmap="viridis", norm="log", zorder=3)
    figure.colorbar(dots, ax=axes, label="conversations")
    low, high, top = 0.7 * min(y), 1.4 * max(x), 1.4 * max(y)
    for ratio in RATIOS:
        if ratio <= 2 * max(a / b for a, b in zip(x, y, strict=True)):
            end = min(high, top * ratio) / 1.08
            axes.plot([low, high], [low / ratio, high / ratio], color="0.75", linewidth=0.8, zorder=1)
            words = f"1/{ratio}" if ratio > 1 else "equal"
            axes.annotate(words, (end, end / ratio), color="0.4", fontsize=8, ha="right", va="top")
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(low, high),
        ylim=(low, top),
        xlabel="tokens in the samples of a conversation",
        ylabel="tokens in its tree",
        title=f"Tokens: {summary.ratio:.2f} in samples for one in trees",
    )
    _plain(axes.xaxis)
    _plain(axes.yaxis)


def _lengths(axes: Any, summary: Summary) -> None:
    for lengths, color, label in (
        (summary.tree_lengths, LIGHT, "tree"),
        (summary.sample_lengths, DARK, "longest sample"),
    ):
        bins = sorted(lengths)
        axes.bar(
            bins,
            [lengths[at] for at in bins],
            [_width(at) for at in bins],
            align="edge",
            color=color,
            alpha=0.75,
            label=label,
        )
    axes.axvline(summary.length, color=WARN, linestyle="--", linewidth=1, label=f"row of {summary.length:,}")
    axes.set(xscale="log", xlabel="tokens", ylabel="conversations", title="Lengths of conversations")
    _plain(axes.xaxis)
    axes.legend()


def _speed_up(axes: Any, summary: Summary) -> None:
    """Work of N samples for that of one pass, by turns, and how many conversations have as many."""
    bins = sorted(summary.turns)
    beside = axes.twinx()
    counts = [summary.turns[at][0] for at in bins]
    beside.bar([_centre(at) for at in bins], counts, [_width(at) for at in bins], color="0.9", edgecolor="white")
    beside.set_ylabel("conversations", color="0.5")
    axes.set_zorder(beside.get_zorder() + 1)
    axes.patch.set_visible(False)
    for shape, color in zip(summary.shapes, ("#7fb3d5", "#2980b9", "#1f618d", "#154360"), strict=False):
        pairs = [(at, *summary.turns[at][1:]) for at in bins if summary.turns[at][2].tokens]
        ratios = [shape.work(samples) / shape.work(one) for _, samples, one in pairs]
        axes.plot([_centre(at) for at, _, _ in pairs], ratios, "o-", markersize=3, color=color, label=shape.name)
    axes.axhline(1, color="0.6", linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="turns", ylabel="work of the N samples / one pass", title="Expected speed-up, by turns")
    axes.legend(title="model")


def _width(at: int) -> int:
    """How many numbers fall into the bin that begins at a number."""
    return 1 << max(0, at.bit_length() - 4)


def _middle(at: int) -> float:
    """The middle of a bin on an axis."""
    return at + _width(at) / 2


def _centre(at: int) -> float:
    """The mean of the whole numbers in a bin."""
    return at + (_width(at) - 1) / 2


def _plain(axis: Any) -> None:
    """Numbers on a logarithmic axis as people write them."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 60 * low else (1,)))
    axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.set_minor_formatter(NullFormatter())
