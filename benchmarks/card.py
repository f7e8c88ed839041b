"""All that is to be shown on a GPU, in parts that each end within ten minutes; what a run prints goes to a file.

    python benchmarks/card.py 1 --out results     # exactness: the tests marked gpu
    python benchmarks/card.py 2 --out results     # attention alone, hidden costs, steps at 0.6B
    python benchmarks/card.py 3 --out results     # steps at 4B, the longest conversation, one curve beside the other
    python benchmarks/card.py 4 --out results     # the tuning ladder
    python benchmarks/card.py 1 2 3 4 --rehearse --out results    # on a CPU, at small sizes: that all of it runs

A file begins with the card, driver and versions, the date and the command, and goes on as the command printed it: it
can be committed as it is. A command that runs over its time is stopped, and its file holds what it had printed. Exit
code 0 only if every command ended well.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from measure import machine

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Run:
    """A command, its time, and what it becomes in a rehearsal."""

    name: str
    command: str
    seconds: int
    rehearsal: str

    @classmethod
    def script(cls, name: str, file: str, seconds: int, *options: str, only: str = "") -> "Run":
        """A benchmark that keeps to its time by itself, and is stopped a minute later."""
        words = [f"benchmarks/{file}.py", *options]
        chosen = ["--only", shlex.quote(only)] if only else []
        command = " ".join([*words, "--seconds", str(seconds), *chosen])
        return cls(name, command, seconds + 60, " ".join([*words, "--device cpu --small --seconds 60"]))


TESTS = "-m pytest -q -W default -p no:cacheprovider --import-mode=importlib"  # warnings of other versions stop nothing

LADDER = ("--sweep", "--ladder", "benchmarks/ladder.json")

PARTS = {
    1: [
        Run("tests", f"{TESTS} -m gpu tests/gpu", 560, f"{TESTS} -m gpu --rehearse tests/gpu/test_ordinary.py"),
    ],
    2: [
        Run.script("kernel", "kernel", 200),
        Run.script("overheads", "overheads", 80),
        Run.script("step-0.6B", "gpu_step", 120, only="0.6B"),
    ],
    3: [
        Run.script("step-4B", "gpu_step", 120, only="4B"),
        Run.script("longest", "longest", 200),
        Run(
            "curve",
            "-m flexreason demo --compare --device cuda --steps 300 --out {out}/curve",
            100,
            "-m flexreason demo --compare --steps 2 --held-out 2 --out {out}/curve",
        ),
    ],
    4: [Run.script(f"sweep-{size}", "kernel", 200, *LADDER, only=f"32K, 32 heads of {size}") for size in (128, 64)],
}


def carry_out(run: Run, out: Path, rehearse: bool) -> int:
    """Run a command, and write what it prints as it comes; its exit code, or 124 if it was stopped."""
    words = (run.rehearsal if rehearse else run.command).replace("{out}", str(out))
    here = machine()
    card = here.get("card", "no-card").lower().replace(" ", "-")
    path = out / f"{here['date']}-{card}-{run.name}.txt"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    started = time.monotonic()
    with path.open("w") as file:
        file.write(", ".join(f"{name} {value}" for name, value in here.items()) + f"\n\n$ python {words}\n\n")
        file.flush()
        try:
            done = subprocess.run(
                [sys.executable, "-u", *shlex.split(words)],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=run.seconds,
            ).returncode
        except subprocess.TimeoutExpired:
            done = 124
            file.write(f"\nstopped after {run.seconds} s\n")
    print(f"{run.name}: {time.monotonic() - started:.0f} s, exit code {done}, {path}", flush=True)
    return done


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", type=int, nargs="+", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True, help="a folder for the files")
    parser.add_argument("--only", nargs="*", help="of the parts' runs, those of these names")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at small sizes")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    runs = [run for part in options.parts for run in PARTS[part] if not options.only or run.name in options.only]
    codes = [carry_out(run, options.out.resolve(), options.rehearse) for run in runs]
    return 1 if any(codes) or not codes else 0


if __name__ == "__main__":
    sys.exit(main())
