"""A report as one page: what one pass saves, how long conversations are, how full rows, and what is refused.

It is made of what `flexreason report --json` prints, and holds it.
"""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from flexreason.show.page import HERE, fill

WIDTH, HEIGHT, LEFT, BOTTOM = 900, 230, 46, 36
"""Of a chart, and what its axes take, in pixels."""

THEME = """document.getElementById("theme").onclick = () => {
  const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = (root.dataset.theme || (dark ? "dark" : "light")) === "dark" ? "light" : "dark";
};"""


def report_page(report: Mapping[str, Any]) -> str:
    """The page, as HTML.

    Args:
        report: What `flexreason report --json` prints, before it is JSON: the bins of histograms are numbers.
    """
    body = (HERE / "report.html").read_text().replace("{sections}", "\n".join(_sections(report)))
    return fill("What is in the data", body, report, THEME, more_style=(HERE / "report.css").read_text())


def _sections(report: Mapping[str, Any]) -> Iterator[str]:
    whole, refused = report["all"], report["refused"]
    yield f"<p>{escape(', '.join(source['source'] for source in report['sources']))}</p>"
    yield _facts(report)
    if whole["conversations"]:
        yield from _savings(whole)
        yield from _lengths(whole)
        yield from _packing(whole)
    yield from _refused(report, refused)
    if len(report["sources"]) > 1:
        yield from _sources(report)


def _facts(report: Mapping[str, Any]) -> str:
    whole, refused = report["all"], report["refused"]
    full = whole["rows"]["full"] or whole["rows"]["last_full"]
    wrong = refused["number"] + len(refused["files"]) + len(report["empty"])
    facts = [
        (f"{whole['conversations']:,}", f"conversations, {whole['turns']:,} turns", False),
        (f"{whole['ratio']:.2f} to 1", "tokens in samples to tokens stored once", False),
        (f"{whole['targets']['all']:,}", f"targets, {_share(whole['targets'])} of them reasoning", False),
        (f"{full:.1%}", f"of rows of {whole['length']:,} tokens are full", False),
        (f"{refused['number']:,}", f"of {report['read']:,} conversations refused", bool(wrong)),
    ]
    cells = (f"<div{' class=wrong' * w}><b>{escape(b)}</b><span>{escape(t)}</span></div>" for b, t, w in facts)
    return f'<div class="facts">{"".join(cells)}</div>'


def _share(targets: Mapping[str, int]) -> str:
    return f"{targets['reasoning'] / max(1, targets['all']):.0%}"


def _savings(whole: Mapping[str, Any]) -> Iterator[str]:
    yield "<h2>What one pass saves</h2>"
    yield (
        f"<p>{whole['samples']['tokens']:,} tokens in the samples are {whole['trees']['tokens']:,} where each is "
        "stored once. The speed-up is the ratio of work, counted in operations of matrix products.</p>"
    )
    work = [one for one in whole["work"] if one["speed_up"]]
    yield _bars({one["model"]: one["speed_up"] for one in work}, "{:.2f} times")
    by_turns = list(whole["speed_up_by_turns"].values())
    if by_turns and len(by_turns[-1]) > 1:
        name = list(whole["speed_up_by_turns"])[-1]
        yield f"<p>By turns of a conversation, for a model of {escape(name)}:</p>"
        yield _chart({"speed-up": by_turns[-1]}, whole["histograms"]["turns"], unit="turns")


def _lengths(whole: Mapping[str, Any]) -> Iterator[str]:
    yield "<h2>How long conversations are</h2>"
    yield (
        f"<p>The longest sample has {whole['longest_sample']['tokens']:,} tokens "
        f"({escape(whole['longest_sample']['where'])}), the longest tree {whole['longest_tree']['tokens']:,}.</p>"
    )
    series = {"longest sample": whole["histograms"]["longest_sample"], "tree": whole["histograms"]["tree"]}
    yield _chart(series, unit="tokens", mark=(whole["length"], f"a row, {whole['length']:,}"))


def _packing(whole: Mapping[str, Any]) -> Iterator[str]:
    rows, split, too_long = whole["rows"], whole["split"], whole["too_long"]
    yield "<h2>How full rows are</h2>"
    last = f" (the last {rows['last_full']:.1%})" if rows["full"] is not None else ""
    yield f"<p>{rows['number']:,} rows of {whole['length']:,} tokens{last}.</p>"
    parts = {"conversations": rows["tokens"] - rows["recomputed"], "computed again": rows["recomputed"]}
    parts["padding"] = rows["number"] * whole["length"] - rows["tokens"]
    yield _bars({name: n for name, n in parts.items() if n}, "{:,} tokens")
    if split["conversations"]:
        n = split["conversations"]
        some = "1 conversation is" if n == 1 else f"{n:,} conversations are"
        yield f"<p>{some} longer than a row, and split into {split['parts']:,} parts without loss.</p>"
    if too_long["samples"]:
        yield f"<p>{too_long['samples']:,} samples are longer than a row by themselves, and in no row:</p>"
        yield _list(too_long["examples"])


def _refused(report: Mapping[str, Any], refused: Mapping[str, Any]) -> Iterator[str]:
    yield "<h2>What is refused</h2>"
    if not refused["number"]:
        yield "<p>No conversation is refused.</p>"
    classes = sorted(refused["classes"].items(), key=lambda item: -item[1]["number"])
    if classes:
        yield _bars({reason: found["number"] for reason, found in classes}, "{:,}", "wrong")
    for reason, found in classes:
        yield f"<p>{escape(reason)}</p>" + _list(found["examples"])
    if refused["dirty"]:
        yield "<p>Dirty answers, by kind:</p>"
        rows = [(kind, f"{n['refused']:,}", f"{n['accepted']:,}") for kind, n in refused["dirty"].items()]
        yield _table(("", "refused", "trained as written"), rows)
    if passed := [*refused["files"], *(f"{name}: nothing in it" for name in report["empty"])]:
        yield "<p>Files that are not read, or not to the end:</p>" + _list(passed)


def _sources(report: Mapping[str, Any]) -> Iterator[str]:
    yield "<h2>By source</h2>"
    yield _table(
        ("", "kind", "read", "refused", "turns", "tokens in samples", "stored once"),
        [
            (
                source["source"],
                source["format"],
                *(f"{n:,}" for n in (source["read"], source["refused"], source["turns"])),
                *(f"{source[what]['tokens']:,}" for what in ("samples", "trees")),
            )
            for source in report["sources"]
        ],
    )


# --- pieces


def _list(texts: list[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    titles = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    return f'<div class="scroll"><table><tr>{titles}</tr>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def _bars(values: Mapping[str, float], form: str, name: str = "") -> str:
    """A bar for each value, the largest as wide as there is room."""
    most = max(values.values(), default=1) or 1
    cells = (
        f'<code>{escape(label)}</code><div><i style="width: {100 * value / most:.1f}%"></i></div>'
        f"<span>{form.format(value)}</span>"
        for label, value in values.items()
    )
    return f'<div class="rows {name}">{"".join(cells)}</div>'


def _chart(
    series: Mapping[str, Mapping[int, float]],
    counts: Mapping[int, int] | None = None,
    *,
    unit: str,
    mark: tuple[int, str] | None = None,
) -> str:
    """Bars by bins, side by side for several series; bins stand in their order, and empty ones are left out."""
    bins = sorted({at for values in series.values() for at in values})
    top = max((value for values in series.values() for value in values.values()), default=1) or 1
    step, floor = (WIDTH - LEFT - 8) / max(1, len(bins)), HEIGHT - BOTTOM
    shapes = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH}" y1="{floor}" y2="{floor}"/>']
    for share in (0.5, 1):
        y = floor - share * (floor - 24)
        shapes.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        words = f"{top * share:,.0f}" if top * share >= 10 else f"{top * share:.1f}"
        shapes.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{words}</text>')
    width = step * 0.8 / len(series)
    for number, (name, values) in enumerate(series.items()):
        for place, at in enumerate(bins):
            high = values.get(at, 0) / top * (floor - 24)
            x = LEFT + place * step + step * 0.1 + number * width
            about = f"{name}, {unit} from {at:,}: {values.get(at, 0):,.2f}".removesuffix(".00")
            about += f" ({counts.get(at, 0):,} conversations)" if counts else ""
            shapes.append(
                f'<rect class="{("one", "two")[number % 2]}" x="{x:.1f}" y="{floor - high:.1f}" width="{width:.1f}" '
                f'height="{high:.1f}"><title>{escape(about)}</title></rect>'
            )
    every = max(1, -(-len(bins) // 14))
    for place in range(0, len(bins), every):
        x = LEFT + (place + 0.5) * step
        shapes.append(f'<text x="{x:.1f}" y="{floor + 15}" text-anchor="middle">{bins[place]:,}</text>')
    shapes.append(f'<text x="{WIDTH}" y="{HEIGHT - 4}" text-anchor="end">{escape(unit)}</text>')
    if mark is not None:
        place = sum(at < mark[0] for at in bins)
        x = LEFT + place * step
        shapes.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="16" y2="{floor}"/>')
        side = "end" if place > len(bins) / 2 else "start"
        dx = -5 if side == "end" else 5
        shapes.append(f'<text class="of-mark" x="{x + dx:.1f}" y="20" text-anchor="{side}">{escape(mark[1])}</text>')
    if len(series) > 1:
        for number, name in enumerate(series):
            x, y = LEFT + number * 130, HEIGHT - 12
            shapes.append(f'<rect class="{("one", "two")[number]}" x="{x}" y="{y}" width="9" height="9"/>')
            shapes.append(f'<text x="{x + 14}" y="{y + 9}">{escape(name)}</text>')
    return f'<div class="chart"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(shapes)}</svg></div>'
