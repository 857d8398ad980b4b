"""Trainings whose process stops: at every step of a save, and at random moments."""

import json
import os
from pathlib import Path

import crash
import pytest
import training
from kill import contents, kill_often, prepare_server

from visual_callbacks import read_run

training.prepare()
NAMES = ["write", "flush", "fsync", "read back", "rename", "after rename", "fsync"]  # of one file


def in_a_process(function, *arguments):
    """Calls a function in a process of its own, in this folder; returns the exit status."""
    process = prepare_server().Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of both files of an uninterrupted training in a process of its own."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert in_a_process(training.train_by_itself, "sgd", str(folder)) == 0
    return contents(folder)


# Of the first file all that leave something else behind, of the second, which is saved alike, some.
STEPS = (0, 2, 5, 7, 11, 13)
OFTEN = (5,)  # after the first file's rename; the others take their time, too


@pytest.mark.xdist_group("one uninterrupted training")
@pytest.mark.parametrize(
    "step", [pytest.param(n, marks=[] if n in OFTEN else pytest.mark.slow) for n in STEPS]
)
def test_a_process_that_stops_at_any_step_of_a_save_loses_at_most_one_epoch(step, whole):
    """The second epoch's saves: the best file, then the other one. Before them, there are three more files."""
    number = 3 * len(NAMES) + step
    assert in_a_process(crash.train_until_step, number, "run") == 9
    assert Path("stopped at").read_text() == NAMES[step % len(NAMES)]
    assert in_a_process(training.train_by_itself, "sgd", "run") == 0
    first = read_run("run")["resumes"][0]["epoch"]
    assert first == (2 if step >= 5 else 1)  # either file is enough
    assert contents("run") == whole
    assert not [name for name in os.listdir("run") if "tmp" in name or "unusable" in name]


@pytest.mark.slow
def test_random_kills():
    survived, finished, verdicts, problems = kill_often(40)
    assert not problems and survived == 40 and finished >= 6 and verdicts["equal"] > 0


@pytest.mark.slow
@pytest.mark.xdist_group("one uninterrupted training")
def test_each_file_is_saved_by_these_steps():
    assert in_a_process(crash.train_until_step, None, "run") == 0
    taken = json.loads(Path("steps.json").read_text())
    files = len(taken) // len(NAMES)
    assert taken == NAMES * files
    assert files > training.EPOCHS + 2  # the beginning, one or two an epoch, the end
