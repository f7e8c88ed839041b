"""Commands as they meet a terminal, and as they meet Ctrl-C."""

import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

from training import environment


@dataclass
class Told:
    """What a command left behind: its exit code, and what it wrote to stderr."""

    code: int
    errors: str

    @property
    def drawn(self) -> list[str]:
        """What stood on a terminal's line, one after the other."""
        return [part for part in self.errors.replace("\r\n", "\n").split("\r") if part.strip("\r\n") not in ("", ERASE)]


ERASE = "\x1b[K"


def command_of(words):
    return [sys.executable, "-m", "flexreason", *words]


def in_terminal(command, columns=120, **more):
    """Run a command whose stderr is a terminal; stdout is not."""
    ours, theirs = pty.openpty()
    subprocess.run(["stty", "cols", str(columns)], stdin=theirs, check=True)
    environ = {**environment(), "TERM": "xterm", **more}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=environ)
    os.close(theirs)
    written = b""
    while True:
        try:
            if not select.select([ours], [], [], 120)[0]:
                process.kill()
                raise TimeoutError(written.decode())
            some = os.read(ours, 4096)
        except OSError:  # EIO: the other side is closed
            break
        if not some:
            break
        written += some
    os.close(ours)
    return Told(process.wait(), written.decode())


def in_pipe(command, **more):
    done = subprocess.run(command, env={**environment(), **more}, capture_output=True, text=True, timeout=300)
    return Told(done.returncode, done.stderr)


def interrupted(words, imported):
    """Run a command in a process group of its own, to which Ctrl-C comes when it has imported a module. No process of
    it may be left."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "flexreason", *words],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    errors, late = "", threading.Timer(120, os.killpg, (process.pid, signal.SIGKILL))
    late.start()  # for a command that hangs
    with process.stderr as lines:
        for line in lines:
            if not line.startswith("import time:"):
                errors += line
            elif line.rpartition("|")[2].strip() == imported:
                os.killpg(process.pid, signal.SIGINT)
    code = process.wait(120)
    late.cancel()
    assert is_empty(process.pid)
    return Told(code, errors)


def is_empty(group, patience=5.0):
    """Whether nothing of a process group is there any more, soon."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False
