"""How near the notebook's training comes to what the machine can do.

    CIFAR10_NPZ=cifar10.npz python benchmarks/throughput.py [NAME=VALUE ...]

Runs the notebook's own cells up to the training (with other knobs, where given), then its `fit`, with augmentation and
the plotter of the curves, over a part of an epoch (BATCHES=20), in turn with PRODUCTS=40 products of float32 matrices
with SIDE=4096 rows and columns. Prints images a second, the network's operations (FLOP) an image, and the share of the
products' rate: medians of five. Training counts three times the forward pass's operations. Then how many images a
second the augmentation makes when nothing else runs, and how long a training stands still between two epochs
(validation aside). (What the other callbacks cost: live_view.py, resume.py.)
"""

import ast
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import keras
import numpy as np
import paths  # noqa: F401
from notebook_cells import cells_before_training, forward_flop, training_flop

from visual_callbacks import AccLossPlotter


class Part(keras.utils.PyDataset):
    """The first batches of a data set."""

    def __init__(self, data, batches):
        super().__init__()
        self.data = data
        self.batches = batches

    def __len__(self):
        return self.batches

    def __getitem__(self, batch):
        return self.data[batch]


class Clock(keras.callbacks.Callback):
    """Notes when each batch of a `fit` ended."""

    def on_train_begin(self, logs=None):
        self.ends = []

    def on_train_batch_end(self, batch, logs=None):
        self.ends.append(time.perf_counter())


def pauses(names, plotter):
    """Seconds from one epoch's last batch to the next one's first, less a batch: ten, after epochs of three batches."""
    train_data = names["train_data"]
    clock = Clock()
    callbacks = [names["starts_epochs"](train_data), plotter, clock]
    part = Part(train_data, 3)
    names["model"].fit(part, epochs=11, shuffle=False, verbose=0, callbacks=callbacks)
    steps = np.diff(clock.ends)
    is_new_epoch = np.arange(1, len(clock.ends)) % 3 == 0
    return steps[is_new_epoch] - np.median(steps[~is_new_epoch])


def seconds(function):
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def main(arguments):
    import tensorflow as tf

    values = dict(argument.split("=", 1) for argument in arguments)
    knobs = {name: ast.literal_eval(value) for name, value in values.items()}
    batches = knobs.pop("BATCHES", 20)
    products = knobs.pop("PRODUCTS", 40)
    side = knobs.pop("SIDE", 4096)
    if os.environ.get("CIFAR10_NPZ"):
        os.environ["CIFAR10_NPZ"] = str(Path(os.environ["CIFAR10_NPZ"]).absolute())
    with tempfile.TemporaryDirectory() as work:  # where the run's folder and pictures go
        os.chdir(work)
        names = cells_before_training(**knobs)
        model = names["model"]
        train_data = names["train_data"]
        part = Part(train_data, batches)
        plotter = next(
            callback for callback in names["callbacks"] if isinstance(callback, AccLossPlotter)
        )
        matrix = tf.random.normal((side, side))
        product = tf.function(lambda: tf.reduce_sum(tf.matmul(matrix, matrix)))
        fit_times, product_times, data_times = [], [], []
        for _ in range(6):  # the first of each warms up
            product_times.append(
                seconds(lambda: [product().numpy() for _ in range(products)]) / products
            )
            fit_times.append(
                seconds(lambda: model.fit(part, shuffle=False, verbose=0, callbacks=[plotter]))
            )
            data_times.append(seconds(lambda: [part[batch] for batch in range(batches)]))
        report(names, batches, 2 * side**3, fit_times[1:], product_times[1:], data_times[1:])
        between = pauses(names, plotter)
        print(f"between two epochs: {np.median(between):.2f} s, at most {between.max():.2f} s")
        os.chdir(paths.ROOT)


def report(names, batches, product_flop, fit_times, product_times, data_times):
    size = names["BATCH_SIZE"]
    whole = forward_flop(names["model"])
    flop = 3 * size * batches * whole
    shares = [
        flop / fit / (product_flop / product) for fit, product in zip(fit_times, product_times)
    ]
    fit_time = statistics.median(fit_times)
    product_rate = product_flop / statistics.median(product_times) / 1e9
    print(
        f"{size * batches / fit_time:.0f} images a second, {whole / 1e9:.3f} GFLOP forward an image"
    )
    print(
        f"training {flop / fit_time / 1e9:.0f} GFLOP/s, matrix product {product_rate:.0f} GFLOP/s"
    )
    print(f"share of the matrix product's rate: {statistics.median(shares):.2f}")
    data_rate = size * batches / statistics.median(data_times)
    print(f"augmentation alone: {data_rate:.0f} images a second")
    print(f"a whole training of {names['EPOCHS']} epochs: {training_flop(names) / 1e15:.3f} PFLOP")


if __name__ == "__main__":
    main(sys.argv[1:])
