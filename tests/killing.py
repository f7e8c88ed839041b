"""Train, be killed, go on: in processes forked from one that has imported everything and computed nothing.

python tests/killing.py FOLDER KILLS SEED
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from flexreason.train import record
from flexreason.train.run import train
from flexreason.train.settings import Settings
from training import write_data, write_model

SETTINGS = {"length": 256, "steps": 24, "rows_per_step": 2, "learning_rate": 1e-2, "save_every": 1, "log_every": 1}


def settings_of(folder, name):
    return Settings(
        model=str(folder / "model"), data=[str(folder / "data.jsonl")], output=str(folder / name), **SETTINGS
    )


def child(settings):
    torch.set_num_threads(1)
    sys.stderr = open(f"{settings.output}.log", "a")  # noqa: SIM115 - it ends with the process
    train(settings)


def start(settings):
    process = multiprocessing.get_context("fork").Process(target=child, args=(settings,))
    process.start()
    return process


def saving(folder):
    """Whether a checkpoint is there that is not whole."""
    return any(not (path / record.SEAL).exists() for path in folder.glob("checkpoints/checkpoint-*"))


def steps_done(folder):
    try:
        return sum('"rows"' in line for line in (folder / "log.jsonl").read_text().splitlines())
    except OSError:
        return 0


def main(folder, kills, seed):
    write_model(folder / "model")
    write_data(folder / "data.jsonl")
    whole = start(settings_of(folder, "whole"))
    whole.join()
    assert whole.exitcode == 0, (folder / "whole.log").read_text()

    draw, settings, output = random.Random(seed), settings_of(folder, "killed"), folder / "killed"
    while_saving = 0
    for number in range(kills):
        process, before = start(settings), steps_done(output)
        while process.is_alive() and steps_done(output) <= before:  # the steps since the checkpoint are dropped first
            before = min(before, steps_done(output))
            time.sleep(0.001)
        if number % 2:
            while process.is_alive() and not saving(output):
                pass
        else:
            time.sleep(draw.random() * 0.3)
        if not process.is_alive():
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        while_saving += saving(output)
    last = start(settings)
    last.join()
    assert last.exitcode == 0, (folder / "killed.log").read_text()
    (folder / "found.json").write_text(json.dumps({"kills": number + 1, "while_saving": while_saving}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
