"""The notebook's cells for scripts: what it defines up to its training, and how much arithmetic that training is."""

import contextlib
import math
import shutil
from pathlib import Path

import matplotlib
import nbformat

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "CIFAR_10_Classification.ipynb"


def cells_before_training(**knobs):
    """Executes the notebook up to its training, in this (temporary) folder and with other knobs; returns its names.

    The cells tagged `demo`, which train small networks to explain something, are left out.
    """
    matplotlib.use("Agg")
    shutil.copy(ROOT / "visual_callbacks.py", ".")  # which the notebook wants beside it
    names = {"__name__": "__main__"}
    for cell in nbformat.read(NOTEBOOK, 4).cells:
        if "history = model.fit(" in cell.source:
            break
        tags = cell.metadata.get("tags", ())
        if cell.cell_type == "code" and "demo" not in tags:
            with contextlib.redirect_stdout(None):
                exec(cell.source, names)
        if "parameters" in tags:
            names.update(knobs)
    return names


def forward_flop(model):
    """Multiplications and additions of a network's convolutions and dense layers for one image."""
    flop = 0
    for layer in model.layers:
        if hasattr(layer, "kernel"):
            flop += 2 * math.prod(layer.output.shape[1:-1]) * math.prod(layer.kernel.shape)
    return flop


def training_flop(names):
    """Operations of a whole training by the notebook: three times the forward pass's, for every image that it sees."""
    return 3 * forward_flop(names["model"]) * len(names["y_train"]) * names["EPOCHS"]
