"""Commands that meet Ctrl-C at some moments, in processes forked from one that has imported everything and computed
nothing: SIGINT to the whole process group, as a terminal sends it.

python tests/interrupting.py FOLDER MOMENTS WORDS...

The command runs once to its end, to see how much work it is, and then once a moment, each in a folder of its own. What
came of each goes to FOLDER/found.json: its exit code and stderr. With "again" for MOMENTS it is a training run that is
interrupted three times, some steps later each time, and then left to end.

No moment depends on how fast the machine is: moments are counted in work, which is CPU time, or in steps. A command
that comes to its end all the same, or some steps further, waits there for its Ctrl-C.
"""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import torch

import flexreason.cli as cli
from breaking import break_what_is_asked
from terminal import is_empty

PATIENCE = 300.0
"""Seconds in which a moment must have come."""

FURTHER = 3
"""Steps that a training run goes on, at most, while it is interrupted."""


def fork(words, folder, prepare=lambda: None):
    """Start a command in a process group of its own, as from a shell. It ends as Python ends, with all that belongs to
    that, and never comes back from here."""
    folder.mkdir(parents=True, exist_ok=True)
    process = os.fork()
    if process:
        return process
    os.setsid()
    os.chdir(folder)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115 - they end with the process
    torch.set_num_threads(1)
    sys.argv = ["flexreason", *words]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    prepare()
    raise SystemExit(cli.main())


def wait(process, folder):
    """What came of a command."""
    _, status = os.waitpid(process, 0)
    assert is_empty(process), "a process of the command is left"
    return {"code": os.waitstatus_to_exitcode(status), "errors": (folder / "stderr").read_text()}


def until(is_time):
    """Wait until it is time."""
    begun = time.monotonic()
    while not is_time():
        assert time.monotonic() - begun < PATIENCE
        time.sleep(0.005)


def has_ended(process):
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def work_of(process):
    """CPU seconds of a command until now, its helpers with it."""
    while True:
        with contextlib.suppress(psutil.NoSuchProcess):  # one that has just ended
            whole = psutil.Process(process)
            return sum(sum(one.cpu_times()[:4]) for one in (whole, *whole.children(recursive=True)))


def tells_its_end(name, here, pressed=None):
    """Let a command say when all is done but to end, by a file that holds its CPU seconds, its helpers' with them; and
    let it wait there until Ctrl-C was pressed."""
    module = cli.command(name)
    run = module.run

    def run_and_tell(options):
        code = run(options)
        here.write_text(str(sum(os.times()[:4])))
        if pressed is not None:
            until(pressed.exists)
            time.sleep(10)  # one that came while an object was deleted comes again, a moment later
        return code

    module.run = run_and_tell


def at_moments(words, folder, moments):
    its_end = folder / "whole.done"
    whole = fork(words, folder / "whole", lambda: tells_its_end(words[0], folder / "whole.done"))
    found = [wait(whole, folder / "whole")]
    work = float(its_end.read_text())
    for number in range(moments):
        at = work * (number + 0.5) / moments
        its_end, pressed = folder / f"{number}.done", folder / f"{number}.pressed"
        process = fork(words, folder / f"{number}", lambda files=(its_end, pressed): tells_its_end(words[0], *files))
        until(lambda: work_of(process) >= at or its_end.exists() or has_ended(process))  # noqa: B023 - called at once
        os.killpg(process, signal.SIGINT)
        pressed.touch()
        found.append({**wait(process, folder / f"{number}"), "done": its_end.exists()})
    return found


def waits_at_step(step, pressed):
    """Let a training run wait at a step until Ctrl-C was pressed."""
    from flexreason.train.progress import Progress

    log_rows = Progress._log_rows

    def log_and_wait(progress, at):
        log_rows(progress, at)
        if at == step:
            until(pressed.exists)

    Progress._log_rows = log_and_wait


def again_and_again(words, folder):
    found = [wait(fork(words, folder / "whole"), folder / "whole")]
    stopped, pressed = folder / "stopped", folder / "pressed"
    log = stopped / "run" / "log.jsonl"
    for _ in range(3):
        step = steps_in(log) + 3
        process = fork(words, stopped, lambda step=step: waits_at_step(step + FURTHER, pressed))
        until(lambda: steps_in(log) >= step or has_ended(process))  # noqa: B023 - called at once
        os.killpg(process, signal.SIGINT)
        pressed.touch()
        found.append({**wait(process, stopped), "step": steps_in(log)})
        pressed.unlink()
    return [*found, wait(fork(words, stopped), stopped)]


def steps_in(log):
    """Steps that a run has done."""
    try:
        return sum('"rows"' in line for line in log.read_text().splitlines())
    except OSError:
        return 0


def main(folder, moments, words):
    break_what_is_asked()
    cli.command(words[0])
    import transformers.models.auto.modeling_auto  # noqa: F401

    if words[0] in ("train", "demo"):
        import flexreason.train.run  # noqa: F401
    found = again_and_again(words, folder) if moments == "again" else at_moments(words, folder, int(moments))
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
