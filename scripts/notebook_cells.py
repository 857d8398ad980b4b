"""The notebook's cells for scripts: what it defines up to its training, and how much arithmetic that training is."""

import contextlib
import math
import shutil
from pathlib import Path

import keras
import matplotlib
import nbformat

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "CIFAR_10_Classification.ipynb"


def cells_before_training(**knobs):
    """Executes the notebook up to its training, in this (temporary) folder and with other knobs; returns its names."""
    matplotlib.use("Agg")
    shutil.copy(ROOT / "visual_callbacks.py", ".")  # which the notebook wants beside it
    names = {"__name__": "__main__"}
    for cell in nbformat.read(NOTEBOOK, 4).cells:
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
