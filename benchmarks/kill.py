"""Kills a short training with SIGKILL at random moments and checks that nothing is ever lost.

    python benchmarks/kill.py [KILLS] [SEED]        prints a line a kill and the sum; exit status 1 if anything was lost

Each process continues the one that was killed before it. It must begin with the epoch that was running, with the one
before it (whose save may have been cut off), or have nothing left to train, and a training that came to its end must
have left the same bytes as one that was never killed.
"""

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from paths import ROOT

TRAINING = ROOT / "tests" / "training.py"
EPOCHS = 40


def start(folder):
    arguments = [sys.executable, "-u", str(TRAINING), "sgd", str(folder), str(EPOCHS)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def began(line):
    return int(line.split()[1]) if line.startswith("began") else None


def contents(folder):
    return [(Path(folder) / name).read_bytes() for name in ("saved_model.hdf5", "best_model.hdf5")]


def kill_often(kills, seed=0, say=print):
    """Returns how many kills were survived, and a list of what went wrong."""
    chance, problems, survived = random.Random(seed), [], 0
    with tempfile.TemporaryDirectory() as work:
        process = start(f"{work}/whole")
        process.communicate()
        expected, number, last = contents(f"{work}/whole"), 0, 0
        while survived + len(problems) < kills:
            process = start(f"{work}/{number}")
            first, stop_at = None, None
            for line in process.stdout:
                epoch = began(line)
                if epoch is None:
                    continue
                if first is None:
                    first, stop_at = epoch, epoch + chance.randrange(EPOCHS // 3)
                last_began = epoch
                if epoch == stop_at:
                    time.sleep(chance.random() * 0.15)  # an epoch, with its saves, takes about as long
                    process.kill()
            killed, errors = process.wait() < 0, process.stderr.read()
            if first is None and process.returncode == 0:
                first = EPOCHS  # the kill came between the last save and the exit: nothing was left to train
            lost = first is None or not last - 1 <= first <= last + 1
            if lost:
                problems.append(f"expected epoch {last - 1} or {last}, continued with {first}: {errors[-500:]}")
            if killed:
                survived += not lost
                last = last_began
                say(f"kill {survived}: continued with epoch {first}, killed in epoch {last}", flush=True)
            else:
                if contents(f"{work}/{number}") != expected:
                    problems.append(f"training {number} ended with other bytes than the uninterrupted one")
                number, last = number + 1, 0
    return survived, number, problems


if __name__ == "__main__":
    kills, seed = [*map(int, sys.argv[1:]), 200, 0][:2] if len(sys.argv) < 3 else map(int, sys.argv[1:3])
    survived, finished, problems = kill_often(kills, seed)
    print(f"{survived} kills survived; {finished} trainings came to their end, byte for byte as uninterrupted")
    sys.exit("\n".join(problems))
