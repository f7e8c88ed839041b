"""Commands that meet Ctrl-C at some moments, in processes forked from one that has imported everything and computed
nothing: SIGINT to the whole process group, as a terminal sends it.

python tests/interrupting.py FOLDER MOMENTS WORDS...

The command runs once to its end, to see how long it takes, and then once a moment, each in a folder of its own. What
came of each goes to FOLDER/found.json: its exit code and stderr. With "again" for MOMENTS it is a training run that is
interrupted three times, some steps later each time, and then left to end.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

import flexreason.cli as cli
from breaking import break_what_is_asked
from terminal import is_empty


def fork(words, folder):
    """Start a command in a process group of its own, as from a shell."""
    folder.mkdir(parents=True, exist_ok=True)
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        os.setsid()
        os.chdir(folder)
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115 - they end with the process
        torch.set_num_threads(1)
        sys.argv = ["flexreason", *words]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = cli.main()
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(process, folder):
    _, status = os.waitpid(process, 0)
    assert is_empty(process), "a process of the command is left"
    return {"code": os.waitstatus_to_exitcode(status), "errors": (folder / "stderr").read_text()}


def interrupt(words, folder, after):
    """Run a command, and press Ctrl-C when `after` says so."""
    process = fork(words, folder)
    after()
    os.killpg(process, signal.SIGINT)
    return wait(process, folder)


def at_moments(words, folder, moments):
    seconds = time.monotonic()
    found = [wait(fork(words, folder / "whole"), folder / "whole")]
    seconds = time.monotonic() - seconds
    for number in range(moments):
        pause = seconds * (number + 0.5) / moments
        found.append(interrupt(words, folder / f"{number}", lambda pause=pause: time.sleep(pause)))
    return found


def again_and_again(words, folder):
    found = [wait(fork(words, folder / "whole"), folder / "whole")]
    log = folder / "stopped" / "run" / "log.jsonl"
    for _ in range(3):
        until = steps_in(log) + 3
        found.append(interrupt(words, folder / "stopped", lambda until=until: until_steps(log, until)))
        found[-1]["step"] = steps_in(log)
    return [*found, wait(fork(words, folder / "stopped"), folder / "stopped")]


def steps_in(log):
    """Steps that a run has done."""
    try:
        return sum('"rows"' in line for line in log.read_text().splitlines())
    except OSError:
        return 0


def until_steps(log, steps):
    until = time.monotonic() + 120
    while steps_in(log) < steps:
        assert time.monotonic() < until
        time.sleep(0.002)


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
