"""A training whose process stops at the N-th step of its saves: PYTHONPATH=. python tests/crash.py N FOLDER

The steps are the calls by which a file is saved: writing (stops half-way), flushing, fsync, reading back, renaming
(before and after), fsync of the folder.
"""

import builtins
import os
import pathlib
import sys

import training

import visual_callbacks

left = int(sys.argv[1])


def step(name):
    global left
    if left == 0:
        print("stopped at", name, flush=True)
        os._exit(9)
    left -= 1


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
        step(name)
        result = function(*arguments, **options)
        if after:
            step(f"after {name}")
        return result

    return wrapped


def slow_open(path, mode="r", *arguments, **options):
    file = builtins.open(path, mode, *arguments, **options)
    return Slow(file) if mode == "wb" and ".tmp." in str(path) else file


class Files(type(pathlib.Path())):
    def read_bytes(self):
        if ".tmp." in self.name:
            step("read back")
        return super().read_bytes()


training.prepare()
visual_callbacks.open = slow_open
visual_callbacks.Path = Files
os.fsync, os.replace = before("fsync", os.fsync), before("rename", os.replace, after=True)
training.train("sgd", sys.argv[2], monitor="loss")  # which improves with every epoch: two files each
print("finished with", left, "steps left", flush=True)
