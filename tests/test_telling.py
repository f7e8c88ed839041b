"""Progress: told on stderr of what takes long, on a terminal in one line that is gone at the end, elsewhere in plain
lines; and nothing of what is quick."""

import re
import sys

import pytest

from flexreason.talk import telling
from terminal import ERASE, in_pipe, in_terminal
from training import write_data, write_model

SCRIPT = """
import sys, time
from flexreason.talk import telling
telling.PATIENCE, scale = {patience}, {scale}
with telling.of("a command"):
    with telling.stage("the first thing"):
        time.sleep(4 * scale)
    with telling.aside():
        print("a line of its own", file=sys.stderr)
    for number in telling.each(range(40), "counting", 40, "numbers"):
        time.sleep(0.2 * scale)
"""


def script(patience=0.5, scale=0.25):
    return [sys.executable, "-c", SCRIPT.format(patience=patience, scale=scale)]


def test_on_a_terminal_it_is_one_line_that_is_gone_at_the_end():
    told = in_terminal(script())
    assert told.code == 0
    assert told.errors.count("\n") == 1  # of the line of its own
    assert f"{ERASE}a line of its own" in told.errors or "\ra line of its own" in told.errors
    assert any("a command: the first thing, 0:0" in line for line in told.drawn)
    counted = [int(n) for n in re.findall(r"a command: counting, (\d+) of 40 numbers, 0:0\d", told.errors)]
    assert counted == sorted(counted)
    assert len(set(counted)) > 5
    assert re.search(r"counting, \d+ of 40 numbers, 0:0\d, 0:0\d left", told.errors)
    assert told.errors.endswith(f"\r{ERASE}")


def test_a_line_is_no_wider_than_the_terminal():
    told = in_terminal(script(), columns=50)
    lines = [line.removeprefix(ERASE) for line in told.drawn if "a command" in line]
    assert lines
    assert all(len(line) < 50 for line in lines)
    assert any(" left" in line for line in lines)  # it is cut in the words, and not in the figures


def test_elsewhere_it_is_plain_lines_ever_further_apart():
    told = in_pipe(script())
    lines = told.errors.splitlines()
    assert lines[0].startswith("a command: the first thing, 0:0")
    assert "a line of its own" in lines
    counting = [line for line in lines if "counting" in line]
    assert 2 <= len(counting) <= 3  # of two seconds: half a second after what was told before, and once twice as long
    assert set(lines) == {lines[0], "a line of its own", *counting}
    assert not set(told.errors) & {"\r", "\x1b"}


def test_a_terminal_that_can_do_nothing_is_told_in_plain_lines():
    told = in_terminal(script(patience=0.2, scale=0.1), TERM="dumb")
    assert ERASE not in told.errors
    assert [line for line in told.errors.split("\r\n") if re.match(r"a command: counting, \d+ of 40 numbers", line)]


def test_nothing_is_said_of_what_is_quick():
    for run in (in_pipe, in_terminal):
        told = run(script(patience=2.0, scale=0.1))  # 1.2 seconds
        assert told.errors.replace("\r\n", "\n") == "a line of its own\n"


def test_nothing_is_said_by_other_ranks_nor_where_it_is_switched_off():
    quick = script(patience=0.2, scale=0.1)
    assert in_pipe(quick).errors != "a line of its own\n"  # so that the test can fail
    for more in ({"RANK": "1"}, {"FLEXREASON_PROGRESS": "off"}):
        assert in_pipe(quick, **more).errors == "a line of its own\n"


def test_who_reads_no_more_does_not_stop_the_work():
    code = script()[-1] + "\nprint('done')"
    shell = f'{sys.executable} -c "$0" 2> >(head -c 1 > /dev/null); echo $?'
    assert in_pipe(["bash", "-c", shell, code]).code == 0


def test_what_went_on_before_a_run_was_resumed_does_not_count_for_the_time_left():
    stage = telling.Stage("training", 100, "steps", False)
    stage.skip(90)
    assert stage.left(stage.began + 10) is None
    stage.add(5)
    assert stage.left(stage.began + 10) == pytest.approx(10)
    assert stage.line(stage.began + 10) == "training, 95 of 100 steps, 0:10, 0:10 left"


def test_stages_end_with_their_blocks_whatever_ends_these():
    with pytest.raises(KeyError), telling.stage("a"), telling.stage("b"):
        raise KeyError
    assert telling._teller.stages == []
    items = telling.each(range(3), "counting")
    assert next(items) == 0
    assert len(telling._teller.stages) == 1
    items.close()
    assert telling._teller.stages == []


# --- commands

IMPATIENT = "import sys; from flexreason import cli; cli.telling.PATIENCE = 0.5; sys.exit(cli.main(sys.argv[1:]))"


def impatient(*words):
    """A command that tells of what takes half a second, so that a test need not wait for two."""
    return [sys.executable, "-c", IMPATIENT, *map(str, words)]


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory):
    """A model that takes seconds, its tokenizer, and data."""
    folder = tmp_path_factory.mktemp("slow")
    write_model(folder / "model", hidden_size=512, intermediate_size=2048, num_hidden_layers=4)
    write_data(folder / "data.jsonl")
    return folder


@pytest.mark.parametrize("run", [in_pipe, in_terminal])
def test_verify_says_what_it_is_doing(run, slow_model):
    told = run(impatient("verify", slow_model / "model", "--data", slow_model / "data.jsonl"))
    assert told.code == 0, told.errors
    assert "flexreason verify: the samples one by one in float64" in told.errors
    assert re.search(r"[\d,]+ of [\d,]+ tokens, 0:\d\d, 0:\d\d left", told.errors)


def test_report_and_train_say_how_far_they_are(slow_model, tmp_path):
    model, data = slow_model / "model", write_data(tmp_path / "many.jsonl", n=2500)
    told = in_pipe(impatient("report", data, "--tokenizer", model))
    assert told.code == 0, told.errors
    assert re.search(r"flexreason report: encoding, [\d,]+ of 2,500 conversations, 0:\d\d, 0:\d\d left", told.errors)
    words = ["train", "--model", model, "--data", slow_model / "data.jsonl", "--steps", 12, "--length", 512]
    told = in_pipe(impatient(*words, "--output", tmp_path / "run", "--log-every", 4))
    assert told.code == 0, told.errors
    assert re.search(r"^step +8/12 .* tokens/s, .* of samples  0:\d\d left$", told.errors, re.MULTILINE)
