"""Plants a difference into each of many resumes and counts how many are told.

    python benchmarks/planted.py [COUNT]        prints a table; exit status 1 if any was not told

A training is interrupted in the middle of its third epoch. Each resume continues it with one difference: the images
come in another order, a layer's seed, the optimizer's step count or the learning rate is another, one bit of a weight
is flipped in memory, or one bit of the file.
"""

import os
import random
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import paths  # noqa: F401

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import exactness
import keras
import numpy as np
from exactness import BATCH, InOrderOfEpoch, dense, interrupt_in, told_the_epoch
from keras import layers

from visual_callbacks import SAVED, ResumableCheckpoint


def train(folder, plant=None):
    """Trains until it is interrupted in its third epoch; `plant` changes model, data or file before a resume."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(1)
    model = dense(layers.Dropout(0.2))
    data = InOrderOfEpoch()
    checkpoint = ResumableCheckpoint(folder, monitor="loss", verbose=0)
    callbacks = [told_the_epoch(data), checkpoint, interrupt_in(exactness.STOP)]
    first_epoch = checkpoint.restore(model)
    if plant:
        plant(model, data)
    try:
        model.fit(
            data, epochs=5, initial_epoch=first_epoch, shuffle=False, verbose=0, callbacks=callbacks
        )
    except exactness.Interruption:
        pass
    return checkpoint


def other_order(chance):
    """Two images change places: of different batches, of the first five."""
    places = [batch * BATCH + chance.randrange(BATCH) for batch in chance.sample(range(5), 2)]

    def plant(model, data):
        start_epoch = data.start_epoch

        def start(epoch):
            start_epoch(epoch)
            data.order[places] = data.order[places[::-1]]

        data.start_epoch = start

    return plant


def other_seed(chance):
    by = chance.randrange(1, 1000)

    def plant(model, data):
        state = model.layers[1].seed_generator.state
        state.assign(np.asarray(state) + np.array([0, by], "uint32"))

    return plant


def other_step_count(chance):
    by = chance.choice([-2, -1, 1, 2])

    def plant(model, data):
        model.optimizer.iterations.assign(int(model.optimizer.iterations) + by)

    return plant


def other_learning_rate(chance):
    factor = 1 + chance.choice([-1, 1]) * 10 ** chance.uniform(-6, -1)

    def plant(model, data):
        model.optimizer.learning_rate = float(model.optimizer.learning_rate) * factor

    return plant


def bit_of_a_weight(chance):
    def plant(model, data):
        weight = chance.choice(model.weights)
        values = np.asarray(weight).copy()
        bits = values.reshape(-1).view("uint32")
        bits[chance.randrange(len(bits))] ^= np.uint32(1 << chance.randrange(31))
        weight.assign(values)

    return plant


KINDS = {
    "two images change places": other_order,
    "seed of a layer": other_seed,
    "step count of the optimizer": other_step_count,
    "learning rate": other_learning_rate,
    "one bit of a weight": bit_of_a_weight,
}


def flip_in_file(path, chance):
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def is_told(start, folder, plant):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(start, folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            checkpoint = train(folder, plant)
        except ValueError:
            return True  # refused
    verdict = checkpoint.resumes[-1]["verdict"] if checkpoint.resumes else None
    said = any(
        "does not continue exactly" in str(w.message) or "cannot be used" in str(w.message)
        for w in caught
    )
    return said and (verdict == "different" or plant is None)


def main(count):
    missed = 0
    print("| difference | resumes | told |")
    print("| --- | ---: | ---: |")
    with tempfile.TemporaryDirectory() as work:
        start, folder = Path(work, "start"), Path(work, "run")
        train(start)
        shutil.copytree(start, folder)
        if train(folder).resumes[-1]["verdict"] != "equal":
            sys.exit("the resume without a difference was not found equal")
        names = [*KINDS, "one bit of the file"]
        for index, name in enumerate(names):
            tries = count // len(names) + (index < count % len(names))
            told = 0
            for number in range(tries):
                chance = random.Random(f"{name} {number}")
                if name in KINDS:
                    told += is_told(start, folder, KINDS[name](chance))
                    continue
                damaged = Path(work, "damaged")
                shutil.rmtree(damaged, ignore_errors=True)
                shutil.copytree(start, damaged)
                flip_in_file(damaged / SAVED, chance)
                told += is_told(damaged, folder, None)
            missed += tries - told
            print(f"| {name} | {tries} | {told} |", flush=True)
    sys.exit(f"{missed} not told" if missed else 0)


if __name__ == "__main__":
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
