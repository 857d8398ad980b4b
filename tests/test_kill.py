"""Trainings whose process stops: at every step of a save, and at random moments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import training
from conftest import ROOT
from kill import contents, kill_often

training.prepare()
NAMES = ["write", "flush", "fsync", "read back", "rename", "after rename", "fsync"]  # of one file


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of both files of an uninterrupted training in a process of its own."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    subprocess.run([sys.executable, str(ROOT / "tests" / "training.py"), "sgd", str(folder)], check=True)
    return contents(folder)


STEPS = range(2 * len(NAMES))
OFTEN = (0, 4, 5, 7, 11)  # half-way through a file, before and after a rename; the others take their time, too


@pytest.mark.xdist_group("one uninterrupted training")
@pytest.mark.parametrize("step", [pytest.param(n, marks=[] if n in OFTEN else pytest.mark.slow) for n in STEPS])
def test_a_process_that_stops_at_any_step_of_a_save_loses_at_most_one_epoch(step, whole):
    """The second epoch's saves: the best file, then the other one."""
    number = 2 * len(NAMES) + step
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "crash.py"), str(number), "run"], stdout=subprocess.PIPE, text=True
    )
    assert result.returncode == 9 and result.stdout.split("stopped at ")[1].strip() == NAMES[step % len(NAMES)]
    rest = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "training.py"), "sgd", "run"],
        capture_output=True,
        text=True,
        check=True,
    )
    first = int(rest.stdout.split("began ")[1].split()[0])
    assert first in (1, 2) and (first == 2) == (step >= len(NAMES) + 5)
    assert contents("run") == whole
    assert not [name for name in os.listdir("run") if "tmp" in name or "unusable" in name]


@pytest.mark.slow
def test_random_kills():
    survived, finished, problems = kill_often(40)
    assert not problems and survived == 40 and finished > 0


def test_the_whole_training_takes_this_many_steps():
    """Were a step of a save not counted above, its number would differ."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "crash.py"), "9999", "run"], stdout=subprocess.PIPE, text=True
    )
    steps = 9999 - int(result.stdout.split("finished with ")[1].split()[0])
    assert steps % len(NAMES) == 0 and steps >= 7 * len(NAMES)
    assert Path("run", "saved_model.hdf5").exists()
