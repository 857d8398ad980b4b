"""Kills short trainings with SIGKILL at random moments and checks that nothing is ever lost, and nothing falsely told.

    python benchmarks/kill.py [KILLS] [SEED]        prints a line a kill and the sum; exit status 1 if anything was lost

Six kinds of training (rows of exactness.py) share the kills, two at a time. Each process continues the one that was
killed before it. It must begin with the epoch that was running, with the one before it (whose save may have been cut
off), or have nothing left to train. A training that came to its end must have left the same bytes as one that was never
killed, and each of its resumes must have found that it continues exactly as before.
"""

import collections
import concurrent.futures
import multiprocessing
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import paths

EPOCHS = 30
KINDS = {
    "SGD with a schedule": "Optimizers",
    "Adam, averaged weights": "Optimizers",
    "PyDataset that is told the epoch": "Data",
    "LearningRateScheduler(f(epoch, lr)), before it": "Callbacks beside it",
    "SwapEMAWeights(swap_on_epoch=True), before it": "Callbacks beside it",
    "all three plotters": "Callbacks beside it",  # whose record of every epoch is in the same bytes
}


def train(kind, folder, pipe):
    """Trains in a process of its own; tells each epoch that begins, and the verdicts on all resumes at the end."""
    import exactness
    import keras
    import training

    training.prepare()
    report = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: pipe.send(epoch))
    *_, checkpoint = exactness.ROWS[KINDS[kind]][kind].train(folder, epochs=EPOCHS, extra=[report])
    pipe.send(checkpoint.resumes)


def prepare_server():
    """Of the server that processes are forked from: it imports TensorFlow once for all, which takes longest."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *paths.FOLDERS])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["exactness", "training"])
    return context


def start(kind, folder):
    """A process that trains; its end of the pipe."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=train, args=(kind, folder, theirs))
    process.start()
    theirs.close()
    return process, ours


def told(pipe):
    """What a process tells, until it ends."""
    while True:
        try:
            yield pipe.recv()
        except EOFError:
            return


def contents(folder):
    return [(Path(folder) / name).read_bytes() for name in ("saved_model.hdf5", "best_model.hdf5")]


def kill_one_kind(kind, kills, seed, say):
    """Returns how many kills were survived, how many trainings ended, the verdicts, and a list of what went wrong."""
    chance, problems, survived, number, last = random.Random(f"{kind} {seed}"), [], 0, 0, 0
    verdicts = collections.Counter()
    with tempfile.TemporaryDirectory() as work:
        process, pipe = start(kind, f"{work}/whole")
        list(told(pipe))
        process.join()
        expected = contents(f"{work}/whole")
        is_ended = False
        # The last training is left to come to its end.
        while survived + len(problems) < kills or not is_ended:
            process, pipe = start(kind, f"{work}/{number}")
            first, stop_at, last_began, resumes = None, None, last, None
            for message in told(pipe):
                if isinstance(message, list):
                    resumes = message
                    continue
                last_began = message
                if first is None:
                    first, stop_at = message, message + chance.randrange(6)
                if message == stop_at and survived < kills:
                    # An epoch, with its saves, takes about as long.
                    time.sleep(chance.random() * 0.15)
                    process.kill()
            process.join()
            was_killed = process.exitcode == -9
            is_ended = not was_killed
            if first is None and (resumes is not None or was_killed):
                first = EPOCHS  # the kill came between the last save and the exit: nothing was left to train
            lost = first is None or (not last - 1 <= first <= last + 1 and first != EPOCHS)
            if lost:
                problems.append(
                    f"{kind}: expected epoch {last - 1} or {last}, continued with {first}"
                )
            if was_killed:
                survived += not lost
                last = last_began
                say(
                    f"{kind}, kill {survived}: continued with epoch {first}, killed in epoch {last}",
                    flush=True,
                )
                continue
            if resumes is None:
                problems.append(f"{kind}: training {number} died with exit code {process.exitcode}")
            if contents(f"{work}/{number}") != expected:
                problems.append(
                    f"{kind}: training {number} ended with other bytes than the uninterrupted one"
                )
            for resume in resumes or ():
                verdicts[resume["verdict"]] += 1
                if resume["verdict"] == "different":
                    problems.append(f"{kind}: false alarm, {resume}")
            number, last = number + 1, 0
    return survived, number, verdicts, problems


def kill_often(kills, seed=0, say=print):
    """The sums of `kill_one_kind` over all kinds."""
    prepare_server()
    shares = [kills // len(KINDS) + (index < kills % len(KINDS)) for index in range(len(KINDS))]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(kill_one_kind, kind, n, seed, say) for kind, n in zip(KINDS, shares) if n
        ]
        results = [job.result() for job in jobs]
    survived, finished, verdicts, problems = zip(*results)
    return sum(survived), sum(finished), sum(verdicts, collections.Counter()), sum(problems, [])


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:]]
    kills = numbers[0] if numbers else 200
    seed = numbers[1] if len(numbers) > 1 else 0
    survived, finished, verdicts, problems = kill_often(kills, seed)
    print(
        f"{survived} kills survived; {finished} trainings came to their end, byte for byte as uninterrupted"
    )
    print(
        "verdicts on the resumes of these:",
        ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items()),
    )
    sys.exit("\n".join(problems))
