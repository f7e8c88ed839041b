"""What the benchmarks share: conversations, cells that are kept, and what a run leaves behind.

A *cell* is the least that is measured by itself: a dict of figures for a dict of conditions. With `--out FOLDER` a cell
is written to `FOLDER/NAME.cells.jsonl` as soon as it is known, and is not measured again by the same code on the same
machine: a run that was killed goes on where it was. At its end it leaves NAME.txt (the tables, under the machine,
versions and command), NAME.json and NAME.svg.
"""

import argparse
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import flexreason as fr
from flexreason.talk.versions import version_of

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent


# ---- conversations


class Shape(NamedTuple):
    """Turns of h (human), t (reasoning) and r (response) tokens."""

    turns: int
    h: int
    t: int
    r: int

    def __str__(self) -> str:
        return f"{self.turns} x {self.h}/{self.t}/{self.r}"

    @property
    def a_turn(self) -> int:
        """Tokens that a turn adds to the tree: its response twice, unless there is no reasoning."""
        return self.h + self.t + self.r * (2 if self.t else 1)

    @property
    def tokens(self) -> int:
        """Of its tree, which stores the last response once."""
        return self.turns * self.a_turn - self.r * bool(self.t)

    def filling(self, tokens: int) -> list[tuple[int, int, int]]:
        """As many such turns as a row holds; the last one reasons on until the row is full."""
        n = max(1, (tokens + self.r * bool(self.t)) // self.a_turn)
        t = self.t + tokens - self._replace(turns=n).tokens
        last = (self.h, t, self.r)
        if t < 0:  # the row is shorter than one turn
            last = (tokens // 3, tokens - 2 * (tokens // 3), tokens // 3)
        return [self[1:]] * (n - 1) + [last]

    def grown(self, tokens: int) -> "Shape":
        """As many turns, all their parts grown or shrunk alike, to a tree that fits a row."""
        factor = tokens / self.tokens
        return Shape(self.turns, *(max(min(n, 1), int(n * factor)) for n in self[1:]))


SHAPES = {
    "chat": Shape(8, 64, 256, 64),
    "reasoning": Shape(16, 64, 1024, 64),
    "tool loop": Shape(30, 150, 60, 30),
    "agent": Shape(60, 300, 150, 50),
}


def shape(text: str) -> Shape:
    """A shape by its name, or as "8 x 64/256/64"."""
    if text in SHAPES:
        return SHAPES[text]
    turns, _, lengths = text.partition(" x ")
    return Shape(int(turns), *map(int, lengths.split("/")))


def conversation(turns: Sequence[tuple[int, int, int]], vocabulary: int = 2048, seed: int = 0) -> fr.Layout:
    """Random tokens."""
    draw = torch.Generator().manual_seed(seed)
    return fr.lay_out_turns([tuple(torch.randint(0, vocabulary, (n,), generator=draw) for n in turn) for turn in turns])


def paths(layout: fr.Layout, most: int = 8) -> list[torch.Tensor]:
    """Which tokens some samples go through, evenly chosen, the last among them."""
    found = []
    every = -(-layout.n_samples // most)
    for turn in range(layout.n_samples - 1, -1, -every):
        last = int(layout.target_source[layout.target_turn == turn].max())
        found.append((layout.until[: last + 1] > last).nonzero().squeeze(1))
    return found


# ---- a run


class Run:
    """One run of a benchmark: what it was told, its cells, and what it printed."""

    def __init__(self, script: str, words: str | None, repeats: int = 5) -> None:
        self.script = Path(script)
        self.name = self.script.stem
        self.parser = argparse.ArgumentParser(
            description=words, formatter_class=argparse.RawDescriptionHelpFormatter, prog=f"benchmarks/{self.name}.py"
        )
        self.parser.add_argument("--out", type=Path, metavar="FOLDER", help="where cells and results are kept")
        self.parser.add_argument("--repeats", type=int, default=repeats, help="of every way, in turn (%(default)s)")
        self.parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        self.parser.add_argument("--seconds", type=float, default=float("inf"), help="no cell is begun after these")
        self.option = self.parser.add_argument
        self.lines: list[str] = []
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self.known: dict[str, dict[str, Any]] = {}

    def start(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        self.options = self.parser.parse_args(arguments)
        self.device = torch.device(self.options.device)
        self.end = time.monotonic() + self.options.seconds
        given = sys.argv[1:] if arguments is None else arguments
        path = self.script.resolve().relative_to(ROOT)
        self.machine = machine()
        self.code = _fingerprint([*(ROOT / "flexreason").rglob("*.py"), HERE / "shared.py", self.script])
        self.say(", ".join(f"{name} {value}" for name, value in self.machine.items()))
        self.say(f"\n$ {shlex.join(['python', str(path), *given])}")
        if self.options.out:
            self.options.out.mkdir(parents=True, exist_ok=True)
            self._load()
        return self.options

    def say(self, text: str) -> None:
        self.lines.append(text)
        print(text, flush=True)

    @property
    def _kept(self) -> Path:
        return self.options.out / f"{self.name}.cells.jsonl"

    def _load(self) -> None:
        """Cells of this code and machine; a line that was cut off is none."""
        if not self._kept.exists():
            return
        lines = self._kept.read_text().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            self._kept.write_text("".join(lines[:-1]))
        for line in lines:
            if line.endswith("\n"):
                entry = json.loads(line)
                if entry["by"] == self._by:
                    self.known[json.dumps(entry["cell"])] = entry["found"]

    @property
    def _by(self) -> dict[str, Any]:
        return {"code": self.code, "repeats": self.options.repeats} | {
            name: value for name, value in self.machine.items() if name != "date"
        }

    def cell(self, conditions: dict[str, Any], measure: Callable[..., dict[str, Any]], *about: Any) -> dict[str, Any]:
        """The conditions with what `measure(*about)` found under them, now or earlier."""
        key = json.dumps(conditions)
        if key not in self.known:
            if time.monotonic() > self.end:
                return {**conditions, "left out": "no time left"}
            found = json.loads(json.dumps(measure(*about)))  # what is not kept in JSON would differ the next time
            self.known[key] = found
            if self.options.out:
                with self._kept.open("a") as file:
                    file.write(json.dumps({"cell": conditions, "found": found, "by": self._by}) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            shown = {name: x for name, x in (conditions | found).items() if not isinstance(x, list | dict)}
            print("  " + "; ".join(f"{name} {in_words(x)}" for name, x in shown.items() if x is not None), flush=True)
        return {**conditions, **self.known[key]}

    def table(self, title: str, rows: list[dict[str, Any]], hidden: Sequence[str] = ()) -> None:
        """Columns in the order in which they first have something to show."""
        self.tables[title] = rows
        names = dict.fromkeys(name for row in rows for name, x in row.items() if x is not None and name not in hidden)
        cells = [list(names), *([in_words(row.get(name)) for name in names] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        self.say(f"\n{title}\n")
        for line in cells:
            first, *rest = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            self.say("  ".join([first.strip().ljust(widths[0]), *rest]).rstrip())

    def finish(self, draw: Callable[[Any], None] | None = None, **figures: Any) -> dict[str, Any]:
        """The JSON line, and all files; `draw` puts the plot into a figure."""
        found = {"benchmark": self.name, **self.machine, "tables": self.tables, **figures}
        print("\n" + json.dumps(found), flush=True)
        if self.options.out:
            at = self.options.out / self.name
            at.with_suffix(".txt").write_text("\n".join(self.lines) + "\n")
            at.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
            if draw is not None:
                _plot(draw, at.with_suffix(".svg"))
        return found


def in_words(value: Any) -> str:
    """A figure as tables show it; three in a list are a median, the least and the most."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    if isinstance(value, list | tuple) and len(value) == 3:
        return "{} ({} to {})".format(*map(in_words, value))
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)


def _plot(draw: Callable[[Any], None], path: Path) -> None:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no plot: pip install 'flexreason[plot]' draws {path}", flush=True)
        return
    with matplotlib.rc_context({"svg.hashsalt": path.name, "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(layout="constrained")
        draw(figure)
        figure.savefig(path, metadata={"Date": None})  # so that the same figures are the same file


def logarithmic(axes: Any, title: str, x: str, y: str, ticks: Sequence[int]) -> None:
    """Both axes, with the x that were measured named."""
    axes.set(xscale="log", yscale="log", title=title, xlabel=x, ylabel=y)
    every = -(-len(ticks) // 7)  # more names would touch one another
    axes.set_xticks(ticks, [in_tokens(n) if at % every == 0 else "" for at, n in enumerate(ticks)])
    axes.minorticks_off()
    axes.yaxis.get_major_locator().set_params(subs=(1.0, 3.0), numticks=9)
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def in_tokens(n: int) -> str:
    """16384 as 16K."""
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if n >= unit and n % unit == 0:
            return f"{n // unit}{name}"
    return str(n)


# ---- where it ran


def machine() -> dict[str, Any]:
    tuned = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_") or name == "LD_PRELOAD"}
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "allocator": shlex.join(f"{name}={value}" for name, value in tuned.items()) or "the default",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version_of("transformers"),
    }
    if torch.cuda.is_available():
        found |= {
            "card": torch.cuda.get_device_name(),
            "driver": _driver(),
            "CUDA": torch.version.cuda,
            "triton": version_of("triton"),
        }
    return found


def _driver() -> str | None:
    if (program := shutil.which("nvidia-smi")) is None:
        return None
    asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return lines[0].strip() if lines else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _fingerprint(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
