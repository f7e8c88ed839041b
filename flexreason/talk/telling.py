"""What is being done, how far it is and how long it will still take: told on stderr, of what takes over two seconds.

    with of("verify"):
        with stage("the samples one by one", total=2048, unit="tokens") as going:
            going.add(100)

On a terminal this is one line, which is written over and gone at the end. Elsewhere it is a plain line a stage, and
more of a stage that goes on, ever further apart. A thread of its own tells, so that one long call is not a silence.
What is printed meanwhile is printed `aside`. FLEXREASON_PROGRESS=off tells nothing; of several ranks the first tells.
"""

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

VARIABLE = "FLEXREASON_PROGRESS"

PATIENCE = 2.0
"""Seconds without a word."""

TICK = 0.1
"""Seconds between looks at what is being done."""

LONGEST = 600.0
"""The most seconds between two plain lines about one stage; each pause is twice the one before."""

ERASE = "\r\x1b[K"

T = TypeVar("T")


class Stage:
    """One thing that is being done."""

    def __init__(self, words: str, total: int | None, unit: str, is_name: bool) -> None:
        self.words, self.total, self.unit, self.is_name = words, total, unit, is_name
        self.done = self.skipped = 0
        self.began = self.told_at = time.monotonic()
        self.pause = PATIENCE

    def add(self, n: int = 1) -> None:
        self.done += n

    def say(self, words: str) -> None:
        """Other words from here on, told anew."""
        self.words, self.told_at, self.pause = words, time.monotonic(), PATIENCE

    def skip(self, n: int) -> None:
        """As many were done before, in no time."""
        self.skipped += n
        self.done += n

    def left(self, now: float | None = None) -> float | None:
        """Seconds that it will still take, if it goes on as until now; None where nobody can tell yet."""
        seconds = (time.monotonic() if now is None else now) - self.began
        done = self.done - self.skipped
        if self.total is None or done < 1 or seconds < 1:
            return None
        return max(0.0, seconds * (self.total - self.done) / done)

    def line(self, now: float, head: str = "", width: int | None = None) -> str:
        """The words, how far it is, and times; cut to `width`, in the words where that suffices."""
        of = "" if self.total is None else f" of {self.total:,}"
        figures = f", {self.done:,}{of} {self.unit}" if self.unit else ""
        figures += f", {clock(now - self.began)}"
        if (left := self.left(now)) is not None:
            figures += f", {clock(left)} left"
        if width is None:
            return head + self.words + figures
        return (shortened(head + self.words, max(8, width - len(figures))) + figures)[:width]


def clock(seconds: float) -> str:
    """
    >>> clock(75.2), clock(7384)
    ('1:15', '2:03:04')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def shortened(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


class _Teller:
    """Tells the innermost stage of those that are open. All that is written is written under its lock."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.stages: list[Stage] = []
        self.process = os.getpid()
        self.is_drawn = False
        self.told_at = 0.0
        self.stream: Any = None
        self.over = threading.Event()

    def is_heard(self) -> bool:
        first = os.environ.get("RANK", "0") == "0" and multiprocessing.parent_process() is None
        return first and self.process == os.getpid() and os.environ.get(VARIABLE) != "off" and sys.stderr is not None

    def open(self, stage: Stage) -> None:
        with self.lock:
            self.erase()
            self.stages.append(stage)
            if len(self.stages) == 1:
                self.stream, self.told_at, self.over = sys.stderr, stage.began, threading.Event()
                threading.Thread(target=self.watch, args=(self.over,), name="flexreason telling", daemon=True).start()

    def close(self, stage: Stage) -> None:
        with self.lock:
            self.erase()
            if stage in self.stages:  # unless it was interrupted while it was opened
                self.stages.remove(stage)
            if not self.stages:
                self.over.set()

    def watch(self, over: threading.Event) -> None:
        while not over.wait(TICK):
            with self.lock:
                if self.stages and not over.is_set():
                    self.tell(time.monotonic())

    def tell(self, now: float) -> None:
        stage, first = self.stages[-1], self.stages[0]
        if stage.is_name or now - first.began < PATIENCE:
            return
        head = f"{first.words}: " if first is not stage else ""
        if self.is_terminal():
            if not _bars():
                line = stage.line(now, head, self.width() - 1)
                self.write(f"{ERASE}{line}\r")  # who else writes begins where the line does
                self.is_drawn = True
        elif now - max(self.told_at, stage.told_at) >= stage.pause:
            self.write(f"{stage.line(now, head)}\n")
            stage.told_at = self.told_at = now
            stage.pause = min(2 * stage.pause, LONGEST)

    def is_terminal(self) -> bool:
        return self.stream.isatty() and os.environ.get("TERM") != "dumb"

    def width(self) -> int:
        try:
            return os.get_terminal_size(self.stream.fileno()).columns or 80
        except (OSError, ValueError):
            return 80

    def erase(self) -> None:
        if self.is_drawn:
            self.is_drawn = False
            self.write(ERASE)

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):  # nobody reads stderr any more, or it was closed
            self.stream.write(text)
            self.stream.flush()


_teller = _Teller()

if hasattr(os, "register_at_fork"):  # so that no child inherits a lock that nobody will give back
    os.register_at_fork(
        before=_teller.lock.acquire, after_in_parent=_teller.lock.release, after_in_child=_teller.lock.release
    )


def _bars() -> bool:
    """Whether a bar of tqdm is on the terminal, such as that of a download: two on one line are none."""
    tqdm: Any = getattr(sys.modules.get("tqdm"), "tqdm", None)
    return len(getattr(tqdm, "_instances", ())) > 0


# --- what others call


@contextmanager
def stage(words: str, total: int | None = None, unit: str = "", is_name: bool = False) -> Iterator[Stage]:
    """Tell this as long as the block runs, unless another stage is opened in it.

    Args:
        words: What is being done.
        total: How many there are to do; None if nobody knows.
        unit: What is counted.
        is_name: Not told by itself, but before the words of all stages in it.
    """
    new = Stage(words, total, unit, is_name)
    if not _teller.is_heard():
        yield new
        return
    try:
        _teller.open(new)
        yield new
    finally:
        _teller.close(new)


def of(name: str) -> Any:
    """What the stages in this block belong to. The two seconds count from its beginning."""
    return stage(name, is_name=True)


def each(
    items: Iterable[T], words: str, total: int | None = None, unit: str = "", size: Callable[[T], int] = lambda item: 1
) -> Iterator[T]:
    """The items, while it is told how many of them are done, by size."""
    with stage(words, total, unit) as going:
        for item in items:
            yield item
            going.add(size(item))


@contextmanager
def aside() -> Iterator[None]:
    """Print in here: the line of a terminal is out of the way."""
    with _teller.lock:
        if _teller.stages:
            _teller.erase()
        yield
        _teller.told_at = time.monotonic()
