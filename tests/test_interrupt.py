"""Ctrl-C, whenever it comes: one line, exit code 130, nothing broken, no process left, and the truth about what there
is to go on from. It is a SIGINT to the process group of a real command."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flexreason.cli import COMMANDS, NOTHING_KEPT
from flexreason.train import record
from terminal import interrupted
from training import environment, write_data, write_model

HERE = Path(__file__).parent

MOMENTS = 5


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A model, a tokenizer and data with which commands take some seconds."""
    folder = tmp_path_factory.mktemp("material")
    write_model(folder / "model", hidden_size=128, intermediate_size=512, num_hidden_layers=4)
    write_data(folder / "data.jsonl")
    write_data(folder / "many.jsonl", n=1500)
    return folder


def words_of(name, folder):
    """A command that takes a while."""
    model, data, many = (str(folder / one) for one in ("model", "data.jsonl", "many.jsonl"))
    return {
        "bench": ["bench", model, "--data", data, "--length", "1024", "--repeats", "1"],
        "demo": ["demo", "--steps", "30", "--held-out", "8"],
        "models": ["models", "--scan", "--only", "Qwen3ForCausalLM", "LlamaForCausalLM", "GemmaForCausalLM"],
        "report": ["report", "--data", many, "--tokenizer", model],
        "show": ["show", "--data", many, "--tokenizer", model, "--limit", "300"],
        "template": ["template", model],
        "train": ["train", "--model", model, "--data", data, "--output", "run", "--length", "256", "--steps", "30"],
        "verify": ["verify", model, "--data", data],
    }[name]


def press_at_moments(words, folder, moments=MOMENTS):
    done = subprocess.run(
        [sys.executable, str(HERE / "interrupting.py"), str(folder), str(moments), *words],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "found.json").read_text())


def last_line(errors, name):
    """The one line about the interrupt: nothing else of it is said, least of all a traceback."""
    *before, last = errors.splitlines()
    assert "Traceback" not in errors
    assert "KeyboardInterrupt" not in errors
    assert not any("stopped" in line for line in before), errors
    prefix = f"flexreason {name}: stopped; "
    assert last.startswith(prefix), errors
    return last.removeprefix(prefix)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_is_interrupted_says_so_in_a_line_and_leaves_nothing_broken(name, material, tmp_path):
    whole, *found = press_at_moments(words_of(name, material), tmp_path)
    assert whole["code"] == (name == "demo"), whole  # which has not learned it in so few steps
    assert name == "template" or not found[0]["done"], found  # after a tenth of the work, which it has little of
    for number, one in enumerate(found):
        folder = tmp_path / f"{number}"
        assert one["code"] == 130, one
        left = last_line(one["errors"], name)
        if name == "train":
            assert_true(left, folder / "run")
        elif name == "demo":
            assert left in ("flexreason-demo is unfinished, and the same command begins anew", NOTHING_KEPT)
        else:
            assert left == NOTHING_KEPT
            assert {path.name for path in folder.iterdir()} == {"stdout", "stderr"}


def assert_true(left, run):
    """What a stopped run says of itself."""
    whole = record.whole_checkpoints(run.parent / "run" / "checkpoints")
    if named := re.fullmatch(r"the same command goes on from (run/checkpoints/checkpoint-\d+)", left):
        assert whole[-1] == run.parent / named[1]
        assert not list(run.glob("model"))
    elif left.startswith("this run is finished"):
        assert (run / "model" / "model.safetensors").exists()
    else:
        assert left.startswith("no checkpoint is there yet, and the same command begins anew") or left == NOTHING_KEPT
        assert not whole
        assert left.endswith("with the data encoded") == bool(list(run.glob("data/*/prepared.json")))


def test_helpers_end_with_the_command(material, tmp_path):
    """While they are started, while they encode, and at the end; what is left of them would hold the group."""
    whole, *found = press_at_moments([*words_of("report", material), "--workers", "2"], tmp_path, moments=3)
    assert whole["code"] == 0
    for one in found:
        assert one["code"] == 130, one
        assert last_line(one["errors"], "report") == NOTHING_KEPT


@pytest.mark.parametrize("imported", ["flexreason.data", "torch._C", "torch.nn", "transformers"])
def test_it_is_heard_while_python_still_imports(imported, material):
    told = interrupted(["verify", str(material / "model")], imported)
    assert told.code == 130
    assert last_line(told.errors, "verify") == NOTHING_KEPT


def test_a_run_interrupted_again_and_again_ends_as_one_that_was_not(material, tmp_path):
    """Each interrupt leaves a checkpoint at its step, from which the same command goes on, to the bit."""
    words = [*words_of("train", material), "--log-every", "1", "--keep", "9"]
    whole, *stopped, last = press_at_moments(words, tmp_path, "again")
    assert (whole["code"], last["code"]) == (0, 0), (whole, last)
    steps = [one["step"] for one in stopped]
    assert sorted(set(steps)) == steps
    for one in stopped:
        assert one["code"] == 130, one
        step = one["step"]  # nothing that was done is lost
        assert last_line(one["errors"], "train") == f"the same command goes on from run/checkpoints/checkpoint-{step}"
    models = [load_file(tmp_path / one / "run" / "model" / "model.safetensors") for one in ("whole", "stopped")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_a_second_one_stops_at_once():
    """While the step goes on that the first one waits for."""
    code = (
        "import os, signal, sys, time\n"
        "from flexreason.talk.interrupt import Interrupt\n"
        "wish = Interrupt()\n"
        "with wish.heeded():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(0.05)\n"
        "    print(wish.is_asked, flush=True)\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(5)\n"
        "    except KeyboardInterrupt:\n"
        "        print('at once')\n"
        "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.stdout.split("\n") == ["True", "at once", "True", ""]


def test_a_process_that_is_started_deaf_does_not_hear_it():
    from flexreason.talk.interrupt import deaf

    waiting = [sys.executable, "-c", "print('here', flush=True)\nimport time\ntime.sleep(60)"]
    with deaf():
        helper = subprocess.Popen(waiting, stdout=subprocess.PIPE, text=True)
    other = subprocess.Popen(waiting, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for process in (helper, other):
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGINT)
    other.wait(10)
    assert helper.poll() is None
    helper.kill()
    for process in (helper, other):
        process.communicate()


def test_one_that_comes_while_an_object_is_deleted_comes_again():
    code = (
        "import signal, time\n"
        "from flexreason.talk.interrupt import resend_ignored_interrupts\n"
        "resend_ignored_interrupts()\n"
        "class Deleted:\n"
        "    def __del__(self):\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "try:\n"
        "    Deleted()\n"
        "    time.sleep(10)\n"
        "except KeyboardInterrupt:\n"
        "    print('heard')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("heard\n", "")


def test_one_that_comes_while_a_helper_is_started_is_heard():
    from flexreason.talk.interrupt import deaf

    def start():
        with deaf():
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        start()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_one_that_another_thread_takes_waits_until_the_helper_is_started():
    """No mask of ours keeps it from other threads, and a helper that is started by halves says so with a traceback."""
    from flexreason.talk.interrupt import deaf

    there, over, whole = threading.Event(), threading.Event(), []

    def other():
        there.set()
        over.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    there.wait(60)

    def start():
        with deaf():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            whole.append(True)

    try:
        with pytest.raises(KeyboardInterrupt):
            start()
        assert whole
    finally:
        over.set()
        thread.join()


WHO_IS_HELPED_IS_STOPPED = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from breaking import break_what_is_asked
from flexreason.data import intake

if __name__ == "__main__":
    break_what_is_asked()
    encoder = intake.EntryEncoder(None)
    long = {"prompt_ids": list(range(20_000)), "target_ids": [1]}  # results of many are more than a pipe holds
    try:
        with intake.start_workers(2, encoder) as pool:
            reader = pool._result_queue._reader
            receive = reader.recv

            def press_and_receive():  # while a helper is halfway through a result, which goes on when we read it
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
                return receive()

            if sys.argv[2] == "waits":
                reader.recv = press_and_receive
            for _ in intake.Intake(iter(lambda: long, None), encoder, workers=2, pool=pool):
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        print("stopped")
"""


@pytest.mark.parametrize("who", ["waits", "reads"])
def test_one_that_comes_to_who_waits_for_helpers_or_reads_what_they_sent_ends_them_without_a_word(who):
    words = [sys.executable, "-c", WHO_IS_HELPED_IS_STOPPED, str(HERE), who]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr, done.returncode) == ("stopped\n", "", 0)


def test_a_handler_of_somebody_else_is_left_alone():
    from flexreason.talk.interrupt import Interrupt

    heard, before = [], signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda *about: heard.append(1))
    try:
        wish = Interrupt()
        with wish.heeded():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
        assert heard == [1]
        assert not wish.is_asked
    finally:
        signal.signal(signal.SIGINT, before)
