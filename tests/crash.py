"""A training whose process stops at the N-th step of its saves.

The steps are the calls by which a file is saved: writing (stops half-way), flushing, fsync, reading back, renaming
(before and after), fsync of the folder.
"""

import builtins
import json
import os
from pathlib import Path

import training

import visual_callbacks

taken = []  # the names of the steps so far
last = None  # how many are taken before the process stops


def step(name):
    if len(taken) == last:
        Path("stopped at").write_text(name)
        os._exit(9)
    taken.append(name)


class Slow:
    """A file that can stop half-way through its writing."""

    def __init__(self, file):
        self.file = file

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        step("write")
        self.file.write(data[len(data) // 2 :])

    def flush(self):
        step("flush")
        self.file.flush()

    def fileno(self):
        return self.file.fileno()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def before(name, function, after=False):
    def wrapped(*arguments, **options):
        if "resume_check" in str(arguments[0]):  # of which nothing depends
            return function(*arguments, **options)
        step(name)
        result = function(*arguments, **options)
        if after:
            step(f"after {name}")
        return result

    return wrapped


def slow_open(path, mode="r", *arguments, **options):
    if mode == "rb" and ".tmp." in str(path):
        step("read back")
    file = builtins.open(path, mode, *arguments, **options)
    return Slow(file) if mode == "wb" and ".tmp." in str(path) else file


def train_until_step(number, folder):
    """Trains in this process, which ends after so many steps; or, after the training, writes down all of them."""
    global last
    last = number
    training.prepare()
    visual_callbacks.open = slow_open
    os.fsync = before("fsync", os.fsync)
    os.replace = before("rename", os.replace, after=True)
    # The loss improves with every epoch, so that each writes two files.
    training.train("sgd", folder, monitor="loss")
    Path("steps.json").write_text(json.dumps(taken))
