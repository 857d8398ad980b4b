"""How near the notebook's training comes to what the machine can do.

    CIFAR10_NPZ=cifar10.npz python benchmarks/training.py [NAME=VALUE ...]

Runs the notebook's own cells up to the training (with other knobs, where given), then its `fit`, with augmentation and
the plotter of the curves, over a part of an epoch, in turn with products of two 4096 x 4096 float32 matrices. Prints
images a second, the network's operations (FLOP) an image, and the share of the products' rate: medians of five.
Training counts three times the forward pass's operations. (What the other callbacks cost: live_view.py, resume.py.)
"""

import ast
import contextlib
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import keras
import matplotlib
import nbformat

ROOT = Path(__file__).parent.parent


def cells_before_training(**knobs):
    """Executes the notebook up to its training, in this (temporary) folder and with other knobs; returns its names."""
    matplotlib.use("Agg")
    shutil.copy(ROOT / "visual_callbacks.py", ".")  # which the notebook wants beside it
    names = {"__name__": "__main__"}
    for cell in nbformat.read(ROOT / "CIFAR_10_Classification.ipynb", 4).cells:
        if "history = model.fit(" in cell.source:
            break
        if cell.cell_type == "code":
            with contextlib.redirect_stdout(None):
                exec(cell.source, names)
        if "parameters" in cell.metadata.get("tags", ()):
            names.update(knobs)
    return names


def forward_flop(model, side=32):
    """Multiplications and additions of a network's convolutions and dense layers for an image of side x side pixels."""
    flop = 0
    uncompiled = keras.Model(model.input, model.output)  # as Keras cannot clone an optimizer of our own
    sized = keras.models.clone_model(uncompiled, input_tensors=keras.Input((side, side, 3)))
    for layer in sized.layers:
        if hasattr(layer, "kernel"):
            flop += 2 * math.prod(layer.output.shape[1:-1]) * math.prod(layer.kernel.shape)
    return flop


def training_flop(names):
    """Operations of a whole training by the notebook: three times the forward pass's, for every image that it sees."""
    small = int(names["SMALL_SHARE"] * names["EPOCHS"])
    sides = [24] * small + [32] * (names["EPOCHS"] - small)
    return sum(3 * forward_flop(names["model"], side) * len(names["y_train"]) for side in sides)


def seconds(function):
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def main(batches=20):
    knobs = dict(argument.split("=") for argument in sys.argv[1:])
    data = os.environ.get("CIFAR10_NPZ")
    work = tempfile.TemporaryDirectory()
    sys.path.insert(0, str(ROOT))
    if data:
        os.environ["CIFAR10_NPZ"] = str(Path(data).absolute())
    os.chdir(work.name)  # where the run's folder and pictures go
    names = cells_before_training(**{name: ast.literal_eval(value) for name, value in knobs.items()})
    import tensorflow as tf

    model, train_data, size = names["model"], names["train_data"], names["BATCH_SIZE"]

    class Part(type(train_data)):
        def __len__(self):
            return batches

    train_data.__class__ = Part
    train_data.start_epoch(names["EPOCHS"] - 1)  # one that sees whole images, but for its first batch
    plotter = names["callbacks"][1]
    matrix = tf.random.normal((4096, 4096))
    product = tf.function(lambda: tf.reduce_sum(tf.matmul(matrix, matrix)))
    fit_times, product_times = [], []
    for _ in range(6):  # the first of each warms up
        product_times.append(seconds(lambda: [product().numpy() for _ in range(40)]) / 40)
        fit_times.append(seconds(lambda: model.fit(train_data, shuffle=False, verbose=0, callbacks=[plotter])))
    whole, first = forward_flop(model), forward_flop(model, 24 if names["SMALL_SHARE"] else 32)
    flop = 3 * size * (first + (batches - 1) * whole)
    rates = [flop / f / (2 * 4096**3 / p) for f, p in zip(fit_times[1:], product_times[1:])]
    fit_time, product_time = statistics.median(fit_times[1:]), statistics.median(product_times[1:])
    print(f"{size * batches / fit_time:.0f} images a second, {whole / 1e9:.3f} GFLOP forward an image")
    print(
        f"training {flop / fit_time / 1e9:.0f} GFLOP/s, matrix product {2 * 4096**3 / product_time / 1e9:.0f} GFLOP/s"
    )
    print(f"share of the matrix product's rate: {statistics.median(rates):.2f}")
    print(f"a whole training of {names['EPOCHS']} epochs: {training_flop(names) / 1e15:.3f} PFLOP")


if __name__ == "__main__":
    main()
