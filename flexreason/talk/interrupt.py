"""Ctrl-C: asked for once, it is heeded at the next good moment; and processes that only help leave it to their parent.

A terminal sends it to all processes of a command. So helpers are started deaf to it, and end with the one they help.
"""

import contextlib
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator


class Interrupt:
    """The first Ctrl-C is a wish that whoever computes looks for; the second one is as ever."""

    def __init__(self, when_asked: Callable[[], None] = lambda: None) -> None:
        self.is_asked, self.when_asked = False, when_asked

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        """Wait for it in here. Somebody else's handler, and threads, are left alone."""
        ours = threading.current_thread() is threading.main_thread()
        if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _ask(self, *about: object) -> None:
        if self.is_asked:
            raise KeyboardInterrupt
        self.is_asked = True
        self.when_asked()


def resend_ignored_interrupts() -> None:
    """Let a Ctrl-C that comes while an object is deleted come once more. What is raised there, Python only writes down
    and goes on."""
    write_down = sys.unraisablehook

    def hear(about: "sys.UnraisableHookArgs") -> None:
        if about.exc_type is KeyboardInterrupt:
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            write_down(about)

    sys.unraisablehook = hear


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """Processes that are started in here never see Ctrl-C. One that comes meanwhile is heard by us at the end: a
    process that is started by halves would miss the rest, and say so. A mask alone does not keep Ctrl-C away from us,
    since any other thread takes it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    wish = Interrupt()
    try:
        with wish.heeded():
            multiprocessing.resource_tracker.ensure_running()  # which hears again once it is started
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                yield
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
    finally:
        if wish.is_asked:
            raise KeyboardInterrupt
