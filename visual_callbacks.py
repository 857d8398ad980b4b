"""Keras callbacks that show a training as it happens, and save it so that an interruption loses one epoch at most.

Copy this one file beside any Keras 3 notebook or script (TensorFlow, JAX or PyTorch backend). Quick start::

    checkpoint = ResumableCheckpoint("runs/first", settings={"batch_size": 250})
    model.fit(
        x_train,
        y_train,
        batch_size=250,
        epochs=30,
        shuffle=False,
        verbose=0,
        validation_data=(x_val, y_val),
        initial_epoch=checkpoint.restore(model),
        callbacks=[
            early_stopping,
            AccLossPlotter(),
            ConfusionMatrixPlotter(x_val, y_val, classes),
            PredictionPlotter(x_val[:8], y_val[:8], classes),
            checkpoint,
        ],
    )
    replay("runs/first")  # see it again, epoch by epoch
    compare_runs("runs")  # which training was best, and in what it differed

Each callback works alone, and all share one record: the logs of every epoch of a model (`_Recorder`), and what the
plotters have measured (`_Measured`). So a plotter draws the epochs that `ResumableCheckpoint.restore` has brought back,
too. The file goes from the simple to the composed: numbers, metrics and variables, drawing, showing, recording, looking
inside a model, the plotters; then the checkpoint file, what must match, copies, `ResumableCheckpoint` itself; at last,
reading runs back.

A wrong argument is named at once in a ValueError or TypeError. The plotters take the arguments of chasingbob's
keras-visuals. The idea of recording apart from drawing is livelossplot's, that of a backup BackupAndRestore's in Keras.
"""

import atexit
import base64
import collections
import concurrent.futures
import contextlib
import errno
import hashlib
import html
import inspect
import io
import json
import logging
import marshal
import math
import numbers
import os
import pickle
import random
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
import weakref
import zlib
from pathlib import Path
from typing import NamedTuple

import h5py
import keras
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, features

__all__ = [
    "AccLossPlotter",
    "ConfusionMatrixPlotter",
    "PredictionPlotter",
    "ResumableCheckpoint",
    "compare_runs",
    "occlusion_map",
    "plot_confusion_matrix",
    "plot_history",
    "plot_images",
    "plot_predictions",
    "read_run",
    "replay",
    "strongest_patches",
]


# Numbers, metrics and arguments ---------------------------------------------------------------------------------------
# A logged value as a number, whether lower or higher is better, and what Keras does not tell its callbacks.


def _json(value):
    """Plain data as JSON; tuples become lists, arrays and NumPy numbers lists and numbers. Else raises TypeError."""
    return json.dumps(value, default=_as_list_or_number)


def _as_list_or_number(item):
    plain = np.asarray(item).tolist()
    if not isinstance(plain, (list, bool, int, float, str, type(None))):
        raise TypeError(f"{type(item).__name__} is no plain data")
    return plain


def _plain(value):
    """The same as JSON would give it back."""
    return json.loads(_json(value))


# A metric whose name ends in one of these words is better when smaller, or larger. Keras is asked about all others.
_LESS_IS_BETTER = {"loss", "error", "mae", "mse", "rmse", "mape", "msle"}
_MORE_IS_BETTER = {"acc", "accuracy", "auc", "precision", "recall", "f1"}


def _expect(good, argument, wanted, got, error=ValueError):
    if not good:
        raise error(f"{argument}: expected {wanted}, got {got!r}")


def _expect_path(path, argument):
    _expect(isinstance(path, (str, os.PathLike)), argument, "a path", path, TypeError)


def _expect_names(classes):
    is_list = hasattr(classes, "__len__") and not isinstance(classes, str)
    _expect(is_list and len(classes) > 1, "classes", "a list of at least two names", classes)


def _expect_images(images):
    is_right = images.ndim == 4 and images.size > 0
    _expect(is_right, "images", "an array of shape (n, height, width, channels)", images.shape)


def _print(text):
    """Prints a line. Where that fails (a full disk, a closed pipe, letters that a screen lacks), training goes on."""
    with contextlib.suppress(OSError, ValueError):
        try:
            print(text, flush=True)
        except UnicodeEncodeError:
            print(ascii(text), flush=True)


def _number(value):
    """A logged value as one number: the mean of an array, nan for anything that is not a number."""
    if isinstance(value, float):  # first, as NumPy would take its time over thousands of epochs
        return value
    try:
        values = np.asarray(value, float)
    except Exception:  # whatever an object of the user's own raises
        return math.nan
    return float(values.mean()) if values.size else math.nan


def _direction(name, model=None):
    """Which of two logged values is better: "min", the smaller, or "max", the larger; None where nobody knows.

    Args:
        name: of the logged value, such as `"val_accuracy"`.
        model: whose compiled metrics Keras is asked for; they exist from the first batch on.
    """
    last_word = name.lower().split("_")[-1]
    if last_word in _LESS_IS_BETTER:
        return "min"
    if last_word in _MORE_IS_BETTER:
        return "max"
    if model is None or len(getattr(model, "outputs", None) or ()) > 1:
        return None  # with several outputs, metrics are logged under other names than their own
    # EarlyStopping finds out in its first on_epoch_end, and keeps it in `monitor_op`. In epoch 0 it stops nothing.
    asked = keras.callbacks.EarlyStopping(name)
    asked.set_model(model)
    try:
        asked.on_epoch_end(0, {name: 0.0})
    except ValueError:
        return None
    return "max" if asked.monitor_op(1.0, 0.0) else "min"


def _arguments_of(method, model):
    """The arguments of this model's running `fit` or `evaluate`, by name; empty if none is running.

    Keras tells its callbacks nothing about the data. So they are looked up where Keras has them: among the local
    variables of the method that called us.
    """
    for frame, _ in traceback.walk_stack(inspect.currentframe()):
        if frame.f_code.co_name == method and frame.f_locals.get("self") is model:
            return dict(frame.f_locals)
    return {}


def _class_indices(labels, size, count, argument="Y_val"):
    """Labels as class numbers of shape (n,), from integers of shape (n,) or (n, 1) or one-hot rows."""
    given = labels
    labels = np.asarray(labels)
    if labels.shape == (size, count) and count > 1:
        is_one_hot = np.isin(labels, (0, 1)).all(axis=1) & (labels.sum(axis=1) == 1)
        wanted = "one label per image: a single 1 in each one-hot row, all else 0"
        _expect(is_one_hot.all(), argument, wanted, labels[~is_one_hot][:1].tolist())
        labels = labels.argmax(axis=1)
    if labels.shape == (size, 1):
        labels = labels[:, 0]
    wanted = f"shape {(size,)} or, one-hot, {(size, count)}"
    _expect(labels.shape == (size,), argument, wanted, np.shape(given))
    is_class = size > 0 and np.isin(labels, range(count)).all()
    _expect(is_class, argument, f"whole numbers from 0 to {count - 1}", labels)
    return labels.astype(int)


def _callback_list():
    """The keras.callbacks.CallbackList that is calling its callbacks now; None where there is none."""
    for frame, _ in traceback.walk_stack(inspect.currentframe()):
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.callbacks.CallbackList):
            return caller
    return None


# Variables and random numbers -----------------------------------------------------------------------------------------
# All that a model holds, and the global random states: what looking must not change, and what a checkpoint keeps.

torch = sys.modules["torch"] if keras.backend.backend() == "torch" else None


def _checksum_of(arrays):
    """A number that differs for other arrays; not secure, but quick. Of what is no array, only the size counts."""
    checksum = 0
    for values in arrays:
        is_array = isinstance(values, np.ndarray)
        data = np.ascontiguousarray(values) if is_array else np.array(len(values))
        checksum = zlib.crc32(data.reshape(-1).view(np.uint8), checksum)
    return checksum


def _state_variables(model):
    """All variables that are saved apart from the weights, by kind: of the optimizer, seed states, and others."""
    weights = {id(variable) for variable in model.weights}
    seeds = [variable for variable in model.variables if id(variable) not in weights]
    return {
        "optimizer": model.optimizer.variables,
        "seeds": seeds,
        "others": _unlisted_variables(model),
    }


def _insides(model):
    """What a model, its layers, loss and optimizer hold, also in lists: triples of holder, attribute name, item."""
    seen = set()
    losses = keras.tree.flatten(getattr(model, "loss", None))
    waiting = [*losses, *model.layers, model, getattr(model, "optimizer", None)]
    while waiting:
        part = waiting.pop(0)
        if id(part) in seen or not hasattr(part, "__dict__"):
            continue
        seen.add(id(part))
        for name, value in list(vars(part).items()):
            for item in value if isinstance(value, (list, tuple)) else [value]:
                yield part, name, item
                if isinstance(item, (keras.layers.Layer, keras.losses.Loss)):
                    waiting.append(item)


def _unlisted_variables(model):
    """The variables of layers and losses that are not in `model.variables`, such as states of recurrent layers."""
    listed = {id(variable) for variable in [*model.variables, *model.metrics_variables]}
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None:
        listed |= {id(variable) for variable in optimizer.variables}
    found = []
    for _, _, item in _insides(model):
        if isinstance(item, keras.random.SeedGenerator):
            item = item.state
        if isinstance(item, keras.Variable) and id(item) not in listed:
            listed.add(id(item))
            found.append(item)
    return found


def _not_saved(model):
    """What a checkpoint leaves out of what a training may depend on, by name."""
    tensorflow = sys.modules.get("tensorflow")
    found = []
    for part, name, item in _insides(model):
        is_foreign = tensorflow is not None and isinstance(item, tensorflow.Variable)
        is_second = isinstance(item, keras.optimizers.Optimizer) and item is not model.optimizer
        is_inner = part is model.optimizer  # that of a LossScaleOptimizer
        if is_foreign or (is_second and not is_inner):
            found.append(f"{type(part).__name__}.{name}")
    if torch:
        layers = [part for part in model.modules() if isinstance(part, keras.layers.Layer)]
        found += [f"{type(part).__name__}.{name}" for part in layers for name in part._buffers]
    return list(dict.fromkeys(found))


def _checksum_of_weights(model):
    return _checksum_of(keras.ops.convert_to_numpy(variable) for variable in model.weights)


def _checksums(model):
    """A checksum of all weights, of the optimizer's variables, and so on."""
    kinds = {"weights": model.weights, **_state_variables(model)}
    sums = {}
    for kind, variables in kinds.items():
        sums[kind] = _checksum_of(keras.ops.convert_to_numpy(variable) for variable in variables)
    return sums


def _random_state():
    """The global random states of Python, NumPy, PyTorch and Keras as plain data."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(legacy=False), "torch": []}
    if torch:
        states["torch"] = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
    generator = _keras_generator()
    if generator is not None:
        states["keras"] = keras.ops.convert_to_numpy(generator.state)
    return _plain(states)


def _keras_generator():
    """Keras's SeedGenerator for all that draws without a seed; None if nothing has."""
    # No public name leads to it.
    with contextlib.suppress(ImportError, AttributeError):
        from keras.src.backend.common import global_state

        return global_state.get_global_attribute("global_seed_generator")


def _check_random_state(states):
    """Raises what is wrong with random states that were read."""
    version, internal, gauss = states["python"]
    random.Random().setstate((version, tuple(internal), gauss))
    np.random.RandomState().set_state(states["numpy"])


def _set_random_state(states):
    """Puts back what `_random_state` took."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(states["numpy"])
    if torch and states.get("torch"):
        cpu, *devices = (torch.tensor(values, dtype=torch.uint8) for values in states["torch"])
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state_all(devices[: torch.cuda.device_count()])
    if "keras" in states:
        if _keras_generator() is None:
            keras.random.uniform(())  # which makes it
        generator = _keras_generator()
        if generator is not None:
            generator.state.assign(states["keras"])


def _first_not_finite(model):
    """The path of a weight that is nan or infinite; None where none is."""
    for variable in model.weights:
        values = keras.ops.convert_to_numpy(variable)
        if values.dtype.kind == "V":
            values = values.astype("float32")  # NumPy knows no isnan of bfloat16
        # One that is not trained may be a mask, which may be infinite.
        is_bad = ~np.isfinite(values) if variable.trainable else np.isnan(values)
        if is_bad.any():
            return variable.path
    return None


def _expect_finite(model):
    """Raises ValueError where a model's answers would mean nothing."""
    broken = _first_not_finite(model)
    if broken is not None:
        raise ValueError(f"{broken} is nan or infinite, and so is what the model answers")


# Drawing --------------------------------------------------------------------------------------------------------------
# Functions from data to a Matplotlib Figure. They leave pyplot alone and can draw again in a figure that they made.

# Blue and vermilion are Okabe and Ito's, safe for colour-blind readers.
TRAINING, VALIDATION, MUTED = "#0072B2", "#D55E00", "#595959"
_TOO_LARGE_TO_DRAW = 1e100  # Matplotlib's axes fail where the square of a value overflows


def plot_history(
    history, graphs=("acc", "loss"), resumed_at=None, title="", figure=None, validation_freq=None
):
    """Draws one panel per graph: the training curve, the validation curve, the best epoch. Returns a Matplotlib Figure.

    The best epoch is marked where it is known what is better: by the metric's name or, for a History, by Keras.

    Args:
        history: what `fit` returned, or a dict of lists by metric name; `"epoch"` may list the epochs, from 0. Of an
            array that was logged (`F1Score()` has one value per class) the mean is drawn.
        graphs: metric names; `"acc"` finds whatever accuracy was logged.
        resumed_at: epoch (from 0) at which a resumed training began; a vertical line marks it.
        title: text above the panels.
        figure: what an earlier call for the same graphs returned, to draw in it again; quicker than a new one.
        validation_freq: what `fit` got, where it did not validate after each epoch: a History does not tell.

    Raises:
        TypeError: `history` is neither. ValueError: `graphs` is no list of names; or there are fewer values of a metric
            than epochs, and it is not known which epochs they are of.
    """
    named = isinstance(graphs, (list, tuple)) and len(graphs) > 0
    # The validation curve of a metric stands beside its own.
    named = named and all(isinstance(name, str) and name for name in graphs)
    named = named and not any(name.startswith("val_") for name in graphs)
    wanted = 'a list of metric names such as ["acc", "loss"], without "val_"'
    _expect(named, "graphs", wanted, graphs)
    model = None
    if isinstance(history, keras.callbacks.History):
        model = history.model
        history = _as_recorded(history)
    is_dict = isinstance(history, dict)
    _expect(is_dict, "history", "a keras History or a dict of lists", history, TypeError)
    history = _with_gaps(history, graphs, validation_freq)
    return _draw_history(history, graphs, resumed_at, title, figure, _facts(graphs, history, model))


def _as_recorded(history):
    """What a Keras History holds as a dict; where our callbacks were there, too, with None where nothing was logged."""
    epochs = list(getattr(history, "epoch", []))
    records = {} if history.model is None else _Recorder._of_models.get(history.model, {})
    # The record is of the model's last training; this History may be of another one.
    if list(records) == epochs and _is_same_history(_as_history(records), history.history):
        return _with_epochs(records)
    return {**history.history, "epoch": epochs}


def _is_same_history(one, other):
    """Whether two dicts of lists by metric name have the same values, nan included."""
    if one.keys() != other.keys():
        return False
    for name in one:
        sides = [[_number(value) for value in history[name]] for history in (one, other)]
        if not np.array_equal(*sides, equal_nan=True):
            return False
    return True


def _with_gaps(history, graphs, validation_freq):
    """The history with None for each epoch in which there was no validation. Raises ValueError if it is not known."""
    shown = _curves_of(graphs, history)
    epochs = list(history.get("epoch", []))
    if not epochs:
        epochs = list(range(max((len(history[name]) for name in shown), default=0)))
    validated = [epoch for epoch in epochs if _is_validated(epoch, validation_freq)]
    filled = {**history, "epoch": epochs}
    for name in shown:
        values = history[name]
        if len(values) in (0, len(epochs)):
            continue
        if not name.startswith("val_") or len(values) != len(validated):
            problem = f"{name} has {len(values)} values for {len(epochs)} epochs"
            remedy = "if `fit` had a validation_freq, pass it here, too"
            raise ValueError(f"history: {problem}, and it is not known for which; {remedy}")
        by_epoch = dict(zip(validated, values))
        filled[name] = [by_epoch.get(epoch) for epoch in epochs]
    return filled


def _is_validated(epoch, validation_freq):
    """Whether `fit` validates after an epoch (from 0)."""
    if validation_freq is None:
        return False
    if isinstance(validation_freq, numbers.Integral):
        _expect(validation_freq > 0, "validation_freq", "at least 1", validation_freq)
        return (epoch + 1) % validation_freq == 0
    is_list = hasattr(validation_freq, "__contains__") and not isinstance(validation_freq, str)
    _expect(is_list, "validation_freq", "a whole number, or a list of epochs", validation_freq)
    return epoch + 1 in validation_freq


def _facts(graphs, names, model):
    """By metric name: whether less or more is better (None: not known), and the accuracy that guessing gets (or None).

    Args:
        graphs: metric names. names: those that were logged. model: what is asked about them, or None.
    """
    found = {}
    for name in _metrics_of(graphs, names):
        found[name] = {
            "direction": _direction(name, model),
            "guessing": _accuracy_of_guessing(name, model),
        }
    return found


def _draw_history(history, graphs, resumed_at, title, figure, facts, samples=None):
    """Draws what `plot_history` promises.

    `samples` has, by metric name, the x and y of the curve inside of epochs; for `facts` see `_facts`.
    """
    if figure is None:
        figure = _empty_panels(len(graphs))
    _set_figure_title(figure, title)
    for ax, graph in zip(figure.axes, graphs):
        _draw_panel(ax, graph, history, resumed_at, facts, samples or {})
    return figure


def _draw_panel(ax, graph, history, resumed_at, facts, samples):
    """Moves the artists of a panel to where they belong, which is quicker than plotting anew."""
    artists = {artist.get_gid(): artist for artist in [*ax.lines, *ax.texts]}
    names = [name for name in {**history, **samples} if name != "epoch"]
    name = _find_metric(graph, names)  # None where it was not logged: then all curves are empty
    inside = samples.get(name, ([], []))
    artists["inside"].set_data(*inside)
    curves = {"training": _points(history, name), "validation": _points(history, f"val_{name}")}
    for label, (x, y) in curves.items():
        artists[label].set_data(x, y)
        artists[label].set_markersize(3 if len(y) < 25 else 0)

    artists["best"].set_data([], [])
    known = facts.get(name, {"direction": None, "guessing": None})
    best = _best_point(curves, known["direction"])
    if best is not None:
        x, y = best
        artists["best"].set_data([x], [y])
        artists["best"].set_label(f"best {y:.4g}, epoch {x:.0f}")

    artists["seam"].set_data([], [])
    if resumed_at:
        artists["seam"].set_data([resumed_at, resumed_at], [0, 1])
        artists["seam"].set_label(f"resumed after epoch {resumed_at}")

    _mark_guessing(artists, known["guessing"])
    drawn = [*curves.values(), artists["inside"].get_data()]
    _set_limits(ax, name or graph, drawn)
    _set_label(ax, name or graph)
    note = ""
    if len(history.get(name, [])) and not any(len(x) for x, _ in drawn):
        note = "no value is a finite number"
    if names and name is None:
        logged = ",\n".join(names[:8])
        note = f"no {graph!r} was logged, only\n{logged}"
    artists["note"].set_text(note)
    for label in ("training", "validation", "best", "seam"):
        is_drawn = len(artists[label].get_xdata()) > 0
        artists[f"sample of {label}"].set_visible(is_drawn)
        artists[f"name of {label}"].set_text(artists[label].get_label() if is_drawn else "")


def _set_label(ax, name):
    """The name of a metric beside its axis, with the factor of the numbers there, if there is one."""
    formatter = ax.yaxis.get_major_formatter()
    formatter.set_locs(ax.get_yticks())
    factor = formatter.get_offset()
    name = _shortened(name, 16 if factor else 22)
    ax.set_ylabel(f"{name} ({factor})" if factor else name, parse_math=False)


def _mark_guessing(artists, accuracy):
    """Moves the dotted line to the accuracy that guessing gets, if that is known."""
    is_known = accuracy is not None
    artists["guessing"].set_data(
        [0, 1] if is_known else [], [accuracy, accuracy] if is_known else []
    )
    artists["name of guessing"].set_text(f"guessing: {accuracy:.0%}" if is_known else "")
    artists["name of guessing"].set_y(accuracy if is_known else 0)


def _set_limits(ax, name, curves):
    """What a panel's axes span: all of 0 to 1 for an accuracy, unless it has moved over a small part of that only."""
    last = 1.0
    for x, _ in curves:
        if len(x):
            last = max(last, x[-1])
    ax.set_xlim(0, 1.03 * last)
    values = np.concatenate([y for _, y in curves])
    values = values[~np.isnan(values)]
    if len(values) == 0:
        ax.set_ylim(0, 1.02)
        return
    low = values.min()
    high = values.max()
    is_share = _is_accuracy(name) and low >= 0 and high <= 1
    is_narrow = len(values) >= 3 and high - low <= 0.25 and low >= 0.5
    if is_share and not is_narrow:
        ax.set_ylim(0, 1.02)
        return
    margin = 0.06 * (high - low)
    if margin == 0:  # all values are the same
        margin = 0.06 * abs(low) or 0.06
    ax.set_ylim(low - margin, high + margin)


def _find_metric(graph, names):
    """The name under which a graph's metric was logged; None where it was not."""
    if graph in names:
        return graph
    # Keras 2 logged `acc`; Keras 3 logs `accuracy`, `binary_accuracy` and their kin.
    if graph in ("acc", "accuracy"):
        for pattern in ("acc|accuracy", "(?!val_).*accuracy"):
            for name in names:
                if re.fullmatch(pattern, str(name)):
                    return name
    return None


def _in_digits(value):
    """A number with four digits behind the point or, where it is very small or large, with four digits in all."""
    is_usual = value == 0 or 1e-3 <= abs(value) < 1e4
    return f"{value:.4f}" if is_usual else f"{value:.4g}"


def _metrics_of(graphs, names):
    """The metrics among `names` that graphs stand for, each once."""
    found = []
    for graph in graphs:
        name = _find_metric(graph, names)
        if name is not None and name not in found:
            found.append(name)
    return found


def _curves_of(graphs, names):
    """The names of the curves in the panels, training and validation, as far as they were logged."""
    curves = [curve for name in _metrics_of(graphs, names) for curve in (name, f"val_{name}")]
    return [curve for curve in curves if curve in names]


def _listed(values):
    """Logged values, by name, as one text."""
    return "  ".join(f"{name} {_in_digits(_number(value))}" for name, value in values.items())


def _is_accuracy(name):
    return name.lower().split("_")[-1] in ("acc", "accuracy")


def _output_count(model):
    """How many numbers the one output of a built model has; None where that is not known."""
    if model is None or not model.built:
        return None
    shape = getattr(model, "output_shape", None)
    if isinstance(shape, tuple) and isinstance(shape[-1], int):
        return shape[-1]
    return None


def _accuracy_of_guessing(name, model):
    """The accuracy that guessing gets, of a model with one output of classes; None where it is not known."""
    count = _output_count(model)
    is_of_one_class = re.fullmatch("acc|(binary_|(sparse_)?categorical_)?accuracy", name)
    if not is_of_one_class or count is None:  # an accuracy of the best five, say
        return None
    loss = model.loss if isinstance(model.loss, str) else type(model.loss).__name__
    is_binary = count == 1 or "binary" in f"{loss} {name}".lower()
    return 0.5 if is_binary else 1 / count


def _points(history, name):
    """The epochs, from 1, and the values of a metric, without what cannot be drawn: nan, infinite, no number."""
    y = np.array([_number(value) for value in history.get(name, [])], float)
    if not len(y):
        return y, y
    x = 1.0 + np.asarray(history.get("epoch", range(len(y))), float)
    drawable = np.abs(y) < _TOO_LARGE_TO_DRAW
    return x[drawable], y[drawable]


def _best_point(curves, direction):
    """Epoch and value of the best epoch: by validation, where there is any, else by training."""
    if direction is None:
        return None
    for label in ("validation", "training"):
        x, y = curves[label]
        # An epoch that is going on has a fraction, and cannot be the best yet.
        is_whole = x % 1 == 0
        if is_whole.any():
            x, y = x[is_whole], y[is_whole]
            index = y.argmax() if direction == "max" else y.argmin()
            return x[index], y[index]
    return None


def _shortened(text, most):
    """A text of at most so many letters. What is left out is in its middle: the ends of names tell them apart."""
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - 1 - end]}…{text[-end:]}"


class _Figure(Figure):
    """A Figure that a notebook shows, also where pyplot is not used."""

    def _repr_png_(self):
        return _png(_pixels(self))


def _new_figure(width, height, **options):
    return FigureCanvasAgg(_Figure(figsize=(width, height), dpi=100, **options)).figure


def _set_figure_title(figure, title, margin=0.06):
    """Puts a title above all else, in a smaller font where it would be cut at the edges of the figure."""
    if not figure.texts:
        top = 1 - margin / figure.get_figheight()
        figure.text(0.5, top, "", ha="center", va="top", parse_math=False)
    font = matplotlib.rcParams["font.size"]
    # A letter is about 0.6 times as wide as its font is high.
    needed = max(1, len(title)) * 0.6 * font / 72
    text = figure.texts[0]
    text.set_text(title)
    text.set_fontsize(font * min(1, figure.get_figwidth() / needed))


def _empty_panels(count):
    figure = _new_figure(4.4 * count, 2.3)
    _set_figure_title(figure, "", margin=0.046)
    for index in range(count):
        place = ((index + 0.17) / count, 0.21, 0.8 / count, 0.52)
        _fill_panel(figure.add_axes(place, xlabel="epoch", ymargin=0.06))
    return figure


def _fill_panel(ax):
    """Puts the artists into an empty panel; `_draw_panel` finds them by their group id (gid)."""
    ax.grid(alpha=0.3)
    ax.tick_params(bottom=False, left=False)
    ax.spines[["top", "right"]].set_visible(False)
    ax.locator_params(nbins=5)
    ax.locator_params("x", integer=True)
    # So that no number is as wide as to meet the label, which takes the factor, too: see `_set_label`.
    ax.ticklabel_format(axis="y", scilimits=(-2, 3))
    ax.yaxis.offsetText.set_visible(False)
    ax.yaxis.set_label_coords(-0.14, 0.5)
    curve = {"marker": "o", "ms": 0}
    ax.plot([], [], gid="training", label="training", color=TRAINING, **curve)
    ax.plot([], [], gid="validation", label="validation", color=VALIDATION, ls="--", **curve)
    ring = {"color": matplotlib.rcParams["text.color"], "ms": 8, "mfc": "none", "mew": 1.8}
    ax.plot([], [], "o", gid="best", zorder=3, clip_on=False, **ring)
    ax.axvline(0, gid="seam", color=MUTED, lw=1.2, ls=":")
    _add_key(ax)
    ax.plot([], [], gid="inside", color=TRAINING, lw=1, alpha=0.6)
    ax.axhline(0, gid="guessing", color=MUTED, lw=1, ls=(0, (1, 2)))
    above_the_line = {"transform": ax.get_yaxis_transform(), "ha": "right", "va": "bottom"}
    ax.text(0.99, 0, "", gid="name of guessing", color=MUTED, fontsize=8, **above_the_line)
    middle = {"transform": ax.transAxes, "ha": "center", "va": "center"}
    ax.text(0.5, 0.5, "", gid="note", color=MUTED, parse_math=False, **middle)


def _add_key(ax):
    """The key above the curves, two columns of two rows: Matplotlib's Legend would take a third of a redraw's time."""
    corners = {
        "training": (0, 1.2),
        "validation": (0, 1.08),
        "best": (0.43, 1.2),
        "seam": (0.43, 1.08),
    }
    for line in list(ax.lines):
        name = line.get_gid()
        x, y = corners[name]
        (sample,) = ax.plot([x, x + 0.035, x + 0.07], [y, y, y])
        sample.update_from(line)
        sample.set(transform=ax.transAxes, clip_on=False, markevery=[1], label="_key")
        sample.set_gid(f"sample of {name}")
        beside = {"transform": ax.transAxes, "va": "center", "parse_math": False}
        ax.text(x + 0.09, y, "", gid=f"name of {name}", fontsize=9, **beside)


def plot_confusion_matrix(
    matrix, classes, normalize=False, cmap="Blues", title="Confusion Matrix", ax=None
):
    """Draws a confusion matrix, with each class's recall beside its name. Returns the Matplotlib Figure drawn in.

    Args:
        matrix: counts of shape (classes, classes); `matrix[i, j]` counts the images of class i that were called j.
        classes: the names, in the order of the matrix.
        normalize: show shares of the true class (the row) instead of counts.
        cmap: name of a colormap, or a colormap.
        title: text above the matrix.
        ax: a Matplotlib axes to draw in, instead of a new figure; an earlier drawing in it is changed in place.

    Raises:
        ValueError: fewer than two names, or a matrix of another shape or with negative counts.
    """
    matrix = np.asarray(matrix, float)
    _expect_names(classes)
    count = len(classes)
    is_right = matrix.shape == (count, count) and (matrix >= 0).all()
    _expect(is_right, "matrix", f"{count} x {count} counts", matrix)
    return _draw_matrix(matrix, classes, normalize, cmap, title, ax, cell=0.5)


def _draw_matrix(matrix, classes, normalize, cmap, title, ax, cell):
    """Draws what `plot_confusion_matrix` promises, with cells of so many inches in a new figure.

    Where there is no matrix yet (None), it is an empty frame.
    """
    count = len(classes)
    names = [str(name) for name in classes]
    font = max(4, min(4 + 12 * cell, 420 / count))
    has_bar = cell > 0.3 or count > 20  # where cells are small, their numbers are enough
    if ax is None:
        ax = _matrix_axes(names, font, cell, has_bar)
    if not ax.images:
        _fill_matrix(ax, names, font, cell, cmap, has_bar)
    image = ax.images[0]
    held = image.get_array().shape
    _expect(held == (count, count), "ax", f"one without a matrix, or one of {(count, count)}", held)
    if image.get_cmap() != matplotlib.colormaps.get_cmap(cmap):
        image.set_cmap(cmap)
    if image.colorbar is not None:
        image.colorbar.set_label("share of the true class" if normalize else "images")
    _set_title(ax, title, font=12 if cell > 0.3 else 10)
    if matrix is None:
        ax.set_yticks(range(count), names, fontsize=font, parse_math=False)
        return ax.figure

    recalls = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    shown = recalls if normalize else matrix
    image.set_data(shown)
    image.set_clim(0, 1 if normalize else max(matrix.max(), 1))
    labels = []
    for name, recall, size in zip(names, recalls.diagonal(), matrix.sum(axis=1)):
        told = (
            f"{recall:4.0%}" if size > 0 else "   –"
        )  # of a class without images, nothing is known
        labels.append(f"{name} {told}")
    ax.set_yticks(range(count), labels, fontsize=font, parse_math=False)
    colours = image.cmap(image.norm(shown)).reshape(-1, 4)[:, :3]
    brightness = colours @ (0.299, 0.587, 0.114)
    numbers_in_cells = [f"{value:.2f}" if normalize else f"{value:.0f}" for value in shown.flat]
    # Four digits fit into a cell.
    font = _font_in_cells(cell, count) * min(1, 4 / max(map(len, numbers_in_cells)))
    # There are no texts in a large matrix.
    for text, number, bright in zip(ax.texts, numbers_in_cells, brightness):
        text.set(text=number, fontsize=font, color="white" if bright < 0.5 else "black")
    return ax.figure


def _font_in_cells(cell, count):
    return min(24 * cell, 10, 170 / count)


def _widest(texts, font):
    """The width of the widest of some texts, in inches."""
    figure = _new_figure(1, 1)
    drawn = [figure.text(0, 0, text, fontsize=font, parse_math=False) for text in texts]
    return max(text.get_window_extent().width for text in drawn) / figure.dpi


def _set_title(ax, title, font):
    """Sets a title, in a smaller font than this one where it would be cut at an edge of the figure."""
    ax.set_title(title, fontsize=font, parse_math=False, loc="center")
    figure = ax.figure.canvas.figure  # also where the axes are in a part of one
    middle, _ = ax.transAxes.transform(ax.title.get_position())
    room = 2 * min(middle, figure.bbox.width - middle) / figure.dpi  # in inches
    if title and room > 0:
        needed = 1.03 * _widest([title], font)
        ax.title.set_fontsize(font * min(1, room / needed))


def _matrix_axes(names, font, cell, has_bar):
    """Axes in a new figure, with margins for the longest name: they keep their place from one drawing to the next."""
    side = max(5 * cell, min(cell * len(names), 8.2))
    line = 1.6 * font / 72  # the height of a line of text, in inches
    left = _widest([f"{name} 100%" for name in names], font) + line + 0.2
    below = _widest(names, font) + line + 0.25
    width = left + side + (0.9 if has_bar else 0.15)
    height = below + side + 0.35
    figure = _new_figure(width, height)
    ax = figure.add_axes((left / width, below / height, side / width, side / height))
    ax.title.set_x((width / 2 - left) / side)  # in the middle of the figure
    return ax


def _fill_matrix(ax, names, font, cell, cmap, has_bar):
    count = len(names)
    image = ax.imshow(np.zeros((count, count)), cmap=cmap, vmin=0, vmax=1)
    if has_bar:
        inch = ax.figure.dpi / ax.bbox.width
        ax.figure.colorbar(image, cax=ax.inset_axes((1 + 0.1 * inch, 0, 0.12 * inch, 1)))
    ax.set_xlabel("predicted class", fontsize=font)
    ax.set_ylabel("true class, recall", fontsize=font)
    ax.set_xticks(range(count), names, rotation=90, fontsize=font, parse_math=False)
    ax.tick_params(length=2)
    if count > 20:  # four digits do not fit into a cell any more
        return
    for row, column in np.ndindex(count, count):
        ax.text(column, row, "", ha="center", va="center", fontsize=_font_in_cells(cell, count))


MOST_IMAGES = 12  # in a picture of predictions
_RIGHT, _WRONG = "#00694E", "#B3261E"
_RIGHT_BAR, _OTHER_BAR = "#8FD0BC", "#D9D9D9"
_EVIDENCE = np.array([1.0, 0.5, 0.0])  # orange: red, green and blue


def plot_images(
    images, titles=None, rows=None, columns=8, title="", size=1.0, cmap="gray", limits=None
):
    """Draws images or feature maps in a grid.

    Args:
        images: an array or a list of arrays, each of shape (height, width) or (height, width, channels); with three or
            four channels they are colours, whose values are scaled if they are neither 0 to 1 nor 0 to 255.
        titles: a text above each image.
        rows: a text beside each row.
        columns: how many stand in a row.
        title: text above all.
        size: of an image, in inches.
        cmap: the colormap of those that are no colours.
        limits: the lowest and the highest value that it shows, with a scale beside the images; by default each image's
            own, without one.

    Returns:
        A Matplotlib Figure.

    Raises:
        ValueError: no images, or an argument of another shape.
    """
    images = [np.asarray(image) for image in images]
    _expect(len(images) > 0, "images", "at least one", len(images))
    for shape in (image.shape for image in images):
        is_shown = len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))
        _expect(is_shown, "images", "shapes (height, width) or (height, width, 1, 3 or 4)", shape)
    # All on one scale, so that they can be compared. Bytes are what they are.
    scaled = [i for i, image in enumerate(images) if image.ndim == 3 and image.shape[2] > 1]
    scaled = [i for i in scaled if images[i].dtype != np.uint8 and images[i].size > 0]
    low = min((images[i].min() for i in scaled), default=0)
    high = max((images[i].max() for i in scaled), default=1)
    for i in scaled:
        images[i] = _as_brightness(images[i], low, high)
    is_count = isinstance(columns, numbers.Integral) and columns > 0
    _expect(is_count, "columns", "a whole number from 1 on", columns)
    columns = min(columns, len(images))
    row_count = math.ceil(len(images) / columns)
    for name, texts, count in (("titles", titles, len(images)), ("rows", rows, row_count)):
        _expect(texts is None or len(texts) == count, name, f"{count} texts", texts)
    titles = [] if titles is None else [str(text) for text in titles]
    rows = [] if rows is None else [str(text) for text in rows]
    return _draw_grid(images, titles, rows, (row_count, columns), title, size, cmap, limits)


def _draw_grid(images, titles, rows, shape, title, size, cmap, limits):
    beside = 0.1 + 0.085 * max(map(len, rows)) if rows else 0.1
    above = 0.35 if title else 0.05
    tile = size + (0.22 if titles else 0.06)
    scale = 0 if limits is None else 0.8
    width, height = beside + shape[1] * (size + 0.06) + scale, above + shape[0] * tile + 0.05
    figure = _new_figure(width, height)
    _set_figure_title(figure, title, margin=0.08)
    low, high = (None, None) if limits is None else limits
    for index, image in enumerate(images):
        row, column = divmod(index, shape[1])
        left, bottom = beside + column * (size + 0.06), height - above - (row + 1) * tile
        box = (left / width, (bottom + 0.03) / height, size / width, size / height)
        ax = figure.add_axes(box)
        shown = ax.imshow(image, cmap=cmap, vmin=low, vmax=high)
        ax.set_axis_off()
        if titles:
            ax.set_title(titles[index], fontsize=9, pad=2, parse_math=False)
        if rows and column == 0:
            where = {"ha": "right", "va": "center", "transform": ax.transAxes}
            ax.text(-0.05, 0.5, rows[row], parse_math=False, **where)
    if limits is not None:
        box = ((width - scale + 0.1) / width, 0.1, 0.12 / width, 0.9 - above / height)
        figure.colorbar(shown, cax=figure.add_axes(box))
    return figure


def plot_predictions(
    images, probabilities, classes, labels=None, evidence=None, title="", size=1.2
):
    """Draws what a model thinks of some images: each with its three most probable classes as bars.

    Args:
        images: array of shape (n, height, width, channels), n from 1 to 12; values of any range, which is scaled to
            what can be shown if it is neither 0 to 1 nor 0 to 255.
        probabilities: of the classes, of shape (n, classes); None draws the images alone.
        classes: the names, in the order of the probabilities.
        labels: the right classes, as numbers of shape (n,); their bars are green, and their names stand above.
        evidence: what `occlusion_map` returned, of shape (n, height, width): beside each image stands the same one in
            grey, orange where the evidence lies.
        title: text above all.
        size: width of an image with its bars, in inches.

    Returns:
        A Matplotlib Figure.

    Raises:
        ValueError: an argument of another shape.
    """
    classes = [str(name) for name in classes]
    images = _images_to_show(images)
    thoughts = _checked_thoughts(images, probabilities, classes, labels, evidence)
    return _draw_thoughts(thoughts, classes, title, size)


def _draw_thoughts(thoughts, classes, title, size):
    count = len(thoughts)
    has_evidence = thoughts[0].evidence is not None
    columns = min(count, 4 if count <= 8 else 6)
    rows = math.ceil(count / columns)
    above = 0.32 if title else 0.05
    tile = size * (0.82 if has_evidence else 1.02) + 0.32
    width, height = columns * size * 1.08, rows * tile + above
    figure = _new_figure(width, height)
    # One pair of axes for all, in inches from the top left corner: twenty pairs would take long to draw.
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    ax.set_axis_off()
    _set_figure_title(figure, title)
    for index, thought in enumerate(thoughts):
        row, column = divmod(index, columns)
        left, top = (column + 0.04) * size * 1.08, above + row * tile
        _draw_tile(ax, left, top, size, thought, classes)
    return figure


class _Thought(NamedTuple):
    """What a model thinks of one image; None for what is not known."""

    image: np.ndarray
    probabilities: np.ndarray | None
    label: int | None
    evidence: np.ndarray | None


def _checked_thoughts(images, probabilities, classes, labels, evidence):
    """The arguments of `plot_predictions` as a list of _Thought. Raises ValueError where a shape is wrong."""
    count = len(images)
    nothing = [None] * count
    if probabilities is not None:
        probabilities = np.asarray(probabilities, float)
        wanted = (count, len(classes))
        _expect(
            probabilities.shape == wanted, "probabilities", f"shape {wanted}", probabilities.shape
        )
    if labels is not None:
        labels = _class_indices(labels, count, len(classes), "labels")
    if evidence is not None:
        evidence = np.asarray(evidence, float)
        wanted = images.shape[:3]
        _expect(evidence.shape == wanted, "evidence", f"shape {wanted}", evidence.shape)
    parts = [nothing if part is None else part for part in (probabilities, labels, evidence)]
    return [_Thought(*values) for values in zip(images, *parts)]


def _draw_tile(ax, left, top, size, thought, classes):
    """One image: its right class above, itself, perhaps the evidence beside it, and below the bars."""
    image, probabilities, label, evidence = thought
    order = [] if probabilities is None else np.argsort(-probabilities, kind="stable")[:3]
    words = {"fontsize": 6.2 * size, "parse_math": False, "va": "center"}
    if label is not None:
        mark, colour = "", "black"
        if len(order):
            mark, colour = ("✓ ", _RIGHT) if order[0] == label else ("✗ ", _WRONG)
        right_class = f"{mark}{_shortened(classes[label], 20)}"
        ax.text(left + size / 2, top + 0.06 * size, right_class, ha="center", color=colour, **words)
    top += 0.14 * size
    pictures = [image] if evidence is None else [image, _with_evidence(image, evidence)]
    side = 0.68 * size if evidence is None else 0.48 * size
    gap = 0.04 * size
    x = left + (size - side * len(pictures) - gap * (len(pictures) - 1)) / 2
    for picture in pictures:
        _place_image(ax, picture, x, top, side)
        x += side + gap
    top += side + 0.03 * size
    step = 0.118 * size
    for chosen in order:
        probability = probabilities[chosen]
        colour = _RIGHT_BAR if chosen == label else _OTHER_BAR
        bar = Rectangle((left, top), size * probability, 0.9 * step, color=colour, lw=0)
        ax.add_patch(bar)
        name = _shortened(classes[chosen], 14)
        ax.text(left + 0.02 * size, top + step / 2, name, **words)
        ax.text(left + size, top + step / 2, f"{probability:.0%}", ha="right", **words)
        top += step


def _place_image(ax, image, left, top, side):
    """Draws an image into the middle of a square of these axes, as large as fits."""
    height, width = image.shape[:2]
    across = side * width / max(height, width)
    down = side * height / max(height, width)
    x = left + (side - across) / 2
    y = top + (side - down) / 2
    place = (x, x + across, y + down, y)
    ax.imshow(image, extent=place, interpolation="nearest", vmin=0, vmax=1)
    # imshow has set the limits to the image's.
    ax.set(xlim=(0, ax.figure.get_figwidth()), ylim=(ax.figure.get_figheight(), 0), aspect="auto")


def _as_brightness(images, low, high):
    """Images whose values go from `low` to `high` as what can be shown, from 0 to 1."""
    if low >= 0 and 16 < high <= 255:
        return images / 255
    if low < 0 or high > 1:
        return (images - low) / max(high - low, 1e-12)
    return images


def _images_to_show(images):
    """Images as floats from 0 to 1, of shape (n, height, width, 3)."""
    images = np.nan_to_num(np.asarray(images, "float32"))
    _expect_images(images)
    _expect(len(images) <= MOST_IMAGES, "images", f"at most {MOST_IMAGES}", len(images))
    if _is_channels_first():
        images = np.moveaxis(images, 1, -1)
    images = _as_brightness(images, images.min(), images.max())
    if images.shape[-1] not in (3, 4):  # not colours, but anything else
        images = images.mean(axis=-1, keepdims=True)
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images[..., :3]


def _with_evidence(image, evidence):
    """The image in grey, and orange where evidence lies; white where none was measured yet (nan)."""
    if np.isnan(evidence).any():
        return np.ones_like(image)
    # Less than a tenth of probability is little: it stays pale.
    share = np.clip(evidence / max(evidence.max(), 0.1), 0, 1)[..., None]
    brightness = image.mean(axis=-1, keepdims=True)
    grey = 0.15 + 0.6 * brightness
    orange = (0.5 + 0.5 * brightness) * _EVIDENCE
    return (1 - share) * grey + share * orange


# Showing --------------------------------------------------------------------------------------------------------------
# Where pictures appear: in the cell that runs, where there is a kernel; in a page that can be open beside it; in files.


def _kernel_shell():
    """IPython's shell where there is a kernel (Jupyter, Colab or a notebook runner), else None."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell if hasattr(shell, "kernel") else None


def _call_when_the_cell_ends(function):
    """In a notebook, calls a function once the cell that runs has ended, in whatever way; else when Python exits.

    Returns a function that takes this back.
    """
    shell = _kernel_shell()
    if shell is None:
        atexit.register(function)
        return lambda: atexit.unregister(function)

    def end(result=None):
        take_back()
        function()

    def take_back():
        with contextlib.suppress(ValueError):  # it was called, or taken back
            shell.events.unregister("post_run_cell", end)

    shell.events.register("post_run_cell", end)
    return take_back


class _ShownIn(NamedTuple):
    """Where in a notebook a picture is: the number of the cell, and IPython's handle on the picture."""

    cell: int
    handle: object


class _Board:
    """The pictures of all plotters of a training, side by side, as one picture in the cell and in `live.html`.

    Below each other, three would not fit on a screen.
    """

    WIDTH = 900  # pixels in a row of pictures, which a notebook shows without shrinking them

    def __init__(self, callbacks):
        self.plotters = [callback for callback in callbacks if isinstance(callback, _Plotter)]
        checkpoints = [
            callback for callback in callbacks if isinstance(callback, ResumableCheckpoint)
        ]
        # The page `live.html` is in the directory of a ResumableCheckpoint that takes part.
        self.live_path = checkpoints[0]._files.directory / LIVE if checkpoints else None
        # The number of the cell that trains. It is noted now: when the last picture is shown, after the cell has ended,
        # IPython may count the next one already.
        shell = _kernel_shell()
        self.cell = shell.execution_count if shell else None

    @classmethod
    def of_this_training(cls, plotter):
        """The board of the training that begins now: its first plotter makes it, the others share it."""
        callbacks = getattr(_callback_list(), "callbacks", [])
        if plotter not in callbacks:
            return cls([plotter])
        first = next(callback for callback in callbacks if isinstance(callback, _Plotter))
        return cls(callbacks) if plotter is first else first._board

    def show_after(self, plotter):
        """Shows all pictures if this plotter is the last one: when an epoch ends, they change one after the other."""
        if plotter is self.plotters[-1]:
            self.show()

    def show(self):
        shell = _kernel_shell()
        pictures = [plotter.picture for plotter in self.plotters if plotter.picture is not None]
        if not pictures or not (shell or self.live_path):
            return
        pixels = _side_by_side(pictures, self.WIDTH)
        png = _png(pixels)
        if shell:
            self._show_in_cell(png, pixels.shape)
        if self.live_path is not None:
            _write_quietly(self.live_path, _live_page(png).encode())

    def _show_in_cell(self, png, shape):
        from IPython import display

        image = display.Image(png, width=shape[1], height=shape[0])
        # The same plotters in a second training of the same cell go on with the same picture.
        shown_in, *others = [plotter.shown_in for plotter in self.plotters]
        if (
            shown_in is not None
            and shown_in.cell == self.cell
            and all(other is shown_in for other in others)
        ):
            shown_in.handle.update(image)
            return
        shown_in = _ShownIn(self.cell, display.display(image, display_id=True))
        for plotter in self.plotters:
            plotter.shown_in = shown_in


def _pixels(figure):
    """A figure as an array of shape (height, width, 3)."""
    canvas = FigureCanvasAgg(figure)  # a new one, as one keeps the size of every text it ever drew
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def _png(pixels):
    return _encoded(pixels, "PNG")


def _encoded(pixels, kind):
    """The bytes of a picture in a format that Pillow knows."""
    buffer = io.BytesIO()
    # Light compression (of PNG), as more takes longest.
    Image.fromarray(pixels).save(buffer, kind, compress_level=1)
    return buffer.getvalue()


def _side_by_side(pictures, most):
    """Pictures in rows of at most so many pixels, as long as that goes."""
    rows = [[]]
    for picture in pictures:
        if rows[-1] and sum(other.shape[1] for other in rows[-1]) + picture.shape[1] > most:
            rows.append([])
        rows[-1].append(picture)
    width = max(sum(picture.shape[1] for picture in row) for row in rows)
    heights = [max(picture.shape[0] for picture in row) for row in rows]
    whole = np.full((sum(heights), width, 3), 255, np.uint8)
    top = 0
    for row, height in zip(rows, heights):
        left = 0
        for picture in row:
            whole[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
            left += picture.shape[1]
        top += height
    return whole


LIVE = "live.html"


def _data_address(data, kind):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _live_page(png):
    """A page with the picture in it, which reads itself anew every two seconds."""
    return (
        '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="2">'
        "<title>Live view of a training</title>"
        '<body style="margin:8px;background:white;font:14px sans-serif">'
        f'<img alt="The pictures of this training" src="{_data_address(png, "png")}"></body></html>'
    )


def _write_quietly(path, data):
    """Puts a small file at a path; whoever reads it meanwhile gets the old one. Training goes on without it."""
    if path.exists() and not path.is_file():
        return  # a device, say, which is not to be replaced
    partial = path.with_name(f"{path.stem}.tmp{path.suffix}")
    with contextlib.suppress(OSError):  # a full disk, say, costs a picture, never the training
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(path)


# Recording ------------------------------------------------------------------------------------------------------------
# The record that all our callbacks share: what was logged in each epoch, also in those before a restart.


MOST_MEASURED = 4 * 2**20  # bytes that are kept of each thing that is measured


class _Measured:
    """What plotters measured in each epoch, so that their pictures can be drawn again.

    Attributes:
        about: plain data that does not change, by the name of what was measured: class names, titles.
        constants: arrays that do not change, by name.
        epochs: by the name of what was measured, arrays by epoch, from 0; all of one name have one shape and type.
    """

    def __init__(self):
        self.about, self.constants, self.epochs = {}, {}, {}
        self._training = None  # a weak reference to the list of callbacks of the training that runs
        self._names = {}  # those of its plotters: the id of each, by name

    def name_for(self, plotter):
        """The name for what a plotter measures: its kind; of the second one of a kind in this training, KIND_2.

        They take their names in the order in which they begin, also inside of other callbacks.
        """
        training = _callback_list()
        if self._training is None or training is None or self._training() is not training:
            self._names = {}
        self._training = None if training is None else weakref.ref(training)
        number = 1
        name = plotter.KIND
        while self._names.setdefault(name, id(plotter)) != id(plotter):
            number += 1
            name = f"{plotter.KIND}_{number}"
        return name

    def describe(self, name, about, notes, **constants):
        """Something is going to be measured under this name. What was measured of something else is forgotten.

        Args:
            about: a dict of plain data: what it is. notes: plain data, which may change. constants: arrays.
        """
        about = _plain(about)
        constants = {f"{name} {key}": values for key, values in constants.items()}
        same_arrays = all(
            np.array_equal(self.constants.get(key), values) for key, values in constants.items()
        )
        before = self.about.get(name)
        if before and (before["about"] != about or not same_arrays):
            self.epochs = {
                key: kept for key, kept in self.epochs.items() if key.split(" ")[0] != name
            }
        self.about[name] = {"about": about, "notes": _plain(notes)}
        self.constants |= constants

    def keep(self, name, epoch, values):
        """Keeps an epoch's values. Where they become too many, those of every second epoch go."""
        kept = self.epochs.setdefault(name, {})
        if any(old.shape != values.shape or old.dtype != values.dtype for old in kept.values()):
            kept.clear()
        kept[epoch] = values
        stride = 1
        while (epoch + 1) // stride * values.nbytes > MOST_MEASURED:
            stride *= 2
        self.epochs[name] = {
            past: kept[past] for past in kept if (past + 1) % stride == 0 or past == epoch
        }

    def forget_from(self, epoch):
        for name, kept in self.epochs.items():
            self.epochs[name] = {past: values for past, values in kept.items() if past < epoch}

    def arrays(self):
        """All of it as arrays by name, and `set_arrays` puts that back."""
        found = {"about": np.frombuffer(_json(self.about).encode(), np.uint8)}
        found |= {f"constants/{name}": values for name, values in sorted(self.constants.items())}
        for name, kept in sorted(self.epochs.items()):  # in the order in which HDF5 gives them back
            if kept:
                found[f"epochs/{name}/epochs"] = np.array(list(kept), np.int32)
                found[f"epochs/{name}/values"] = np.stack(list(kept.values()))
        is_empty = not self.about and len(found) == 1
        return {} if is_empty else found

    def set_arrays(self, arrays):
        """Puts back what `arrays` returned. Raises ValueError, KeyError or TypeError for others."""
        self.about, self.constants, self.epochs = {}, {}, {}
        if not arrays:
            return
        self.about = dict(json.loads(arrays["about"].tobytes()))
        for path, values in arrays.items():
            kind, _, name = path.partition("/")
            if kind == "constants":
                self.constants[name] = values
            elif kind == "epochs" and name.endswith("/epochs"):
                name = name.removesuffix("/epochs")
                kept = arrays[f"epochs/{name}/values"]
                self.epochs[name] = dict(zip(values.tolist(), kept, strict=True))


class _Recorder(keras.callbacks.Callback):
    """Keeps the epochs of each model for all our callbacks: so plotters know those that `restore` brought back."""

    _of_models = weakref.WeakKeyDictionary()
    _measured_of_models = weakref.WeakKeyDictionary()

    @property
    def _records(self):
        """The logs by epoch, from 0, of the model that this callback belongs to."""
        return self._of_models.setdefault(self.model, {})

    @property
    def _measured(self):
        """What the plotters have measured of it, a _Measured."""
        return self._measured_of_models.setdefault(self.model, _Measured())

    def on_epoch_begin(self, epoch, logs=None):
        self._forget_from(epoch)

    def _forget_from(self, epoch):
        """A training that begins anew, or further back, forgets what it is going to train again."""
        kept = {past: logs for past, logs in self._records.items() if past < epoch}
        self._of_models[self.model] = kept
        self._measured.forget_from(epoch)

    def on_epoch_end(self, epoch, logs=None):
        # No copy: callbacks later in the list add to it.
        self._records[epoch] = {} if logs is None else logs


def _as_history(records):
    """A record as Keras's History has it: lists of values by name, without the epochs that lack one."""
    names = dict.fromkeys(name for logs in records.values() for name in logs)
    return {name: [logs[name] for logs in records.values() if name in logs] for name in names}


# Looking inside -------------------------------------------------------------------------------------------------------
# What a trained model goes by, found by its predictions alone: for any model, on any backend, without gradients.


def occlusion_map(model, images, labels=None, size=None, stride=None):
    """Where in each image the evidence for a class lies: a grey square slides over it, and the probability falls.

    By Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks" (2014).

    Args:
        model: a Keras classifier with one output: probabilities, logits, or one number for two classes.
        images: array of shape (n, height, width, channels), as the model takes them.
        labels: the class of each image for which evidence is sought, as numbers of shape (n,); by default the most
            probable one.
        size: of the square, in pixels; by default a quarter of the shorter side.
        stride: by how many pixels it moves; by default half of its size.

    Returns:
        An array of shape (n, height, width): at each pixel by how much the probability falls, on average, when a square
        covers it, from -1 to 1. Where it is negative, the probability rises.

    Raises:
        ValueError: images of another shape, labels out of range, or a square larger than the image.
    """
    images = np.asarray(images)
    _expect_images(images)
    probabilities = _probabilities(model, images)
    if labels is None:
        labels = probabilities.argmax(axis=1)
    labels = _class_indices(labels, len(images), probabilities.shape[1], "labels")
    height, width = _height_and_width(images)
    falls = _falls(model, images, labels, size, stride)
    return _spread(falls, (height, width), size)


def _is_channels_first():
    return keras.config.image_data_format() == "channels_first"


def _height_and_width(images):
    return images.shape[2:4] if _is_channels_first() else images.shape[1:3]


def _square(side, size):
    """The size of the grey square for images of this (shorter) side."""
    size = max(1, side // 4) if size is None else size
    is_inside = isinstance(size, numbers.Integral) and 0 < size <= side
    _expect(is_inside, "size", f"1 to {side} pixels", size)
    return size


def _places(length, size, count):
    """Where `count` squares begin that cover a side of an image evenly, from edge to edge."""
    return np.round(np.linspace(0, length - size, count)).astype(int)


def _falls(model, images, labels, size, stride):
    """By how much the probability of a class falls with the square in each place: shape (n, rows, columns)."""
    height, width = _height_and_width(images)
    size = _square(min(height, width), size)
    stride = max(1, size // 2) if stride is None else stride
    is_length = isinstance(stride, (int, np.integer)) and stride > 0
    _expect(is_length, "stride", "at least 1 pixel", stride)
    rows = math.ceil((height - size) / stride) + 1
    columns = math.ceil((width - size) / stride) + 1
    tops = _places(height, size, rows)
    lefts = _places(width, size, columns)
    # At first, nothing is covered.
    places = [None, *((top, left) for top in tops for left in lefts)]
    grey = images.mean()  # the middle of what these images hold
    scores = []
    for image in images:
        for start in range(0, len(places), 100):
            covered = _covered(image, places[start : start + 100], size, grey)
            scores.append(_scores(model, covered, 100))
    probabilities = _as_probabilities(model, np.concatenate(scores))
    probabilities = probabilities.reshape(len(images), len(places), -1)
    of_class = probabilities[np.arange(len(images)), :, labels]  # shape (n, places)
    falls = of_class[:, :1] - of_class[:, 1:]
    return falls.reshape(len(images), rows, columns).astype("float32")


def _covered(image, places, size, grey):
    """Copies of an image, with a grey square at each of these places (top, left); None leaves a copy as it is."""
    copies = np.repeat(image[None], len(places), axis=0)
    for copy, place in zip(copies, places):
        if place is None:
            continue
        top, left = place
        if _is_channels_first():
            copy[:, top : top + size, left : left + size] = grey
        else:
            copy[top : top + size, left : left + size] = grey
    return copies


def _spread(falls, shape, size=None):
    """From the places of a square to pixels: the mean over all squares that cover a pixel."""
    size = _square(min(shape), size)
    total = np.zeros((len(falls), *shape), "float32")
    number = np.zeros(shape, "float32")
    for row, top in enumerate(_places(shape[0], size, falls.shape[1])):
        for column, left in enumerate(_places(shape[1], size, falls.shape[2])):
            place = slice(top, top + size), slice(left, left + size)
            total[(slice(None), *place)] += falls[:, row, column, None, None]
            number[place] += 1
    return total / np.maximum(number, 1)


@contextlib.contextmanager
def _unchanged(model):
    """Looking changes nothing: puts back what a prediction may change, such as states of recurrent layers."""
    variables = [variable for variable in model.variables if not variable.trainable]
    variables += _unlisted_variables(model)
    before = [keras.ops.convert_to_numpy(variable) for variable in variables]
    randomness = _random_state()  # on PyTorch, each prediction draws from the global one
    try:
        yield
    finally:
        _set_random_state(randomness)
        for variable, old in zip(variables, before):
            if not np.array_equal(old, keras.ops.convert_to_numpy(variable)):
                variable.assign(old)


def _device_count(model):
    """How many devices share a batch."""
    distribution = keras.distribution.distribution()
    if distribution is not None:
        return distribution.device_mesh.devices.size
    strategy = getattr(model, "distribute_strategy", None)  # of TensorFlow
    return 1 if strategy is None else strategy.num_replicas_in_sync


def _scores(model, images, batch_size):
    """What a model with one output says of images, of shape (n, outputs)."""
    # Several devices share each batch: on JAX it must have as many images for each, on TensorFlow one at least.
    devices = _device_count(model)
    count = len(images)
    if count % devices:
        more = np.repeat(images[-1:], devices - count % devices, axis=0)
        images = np.concatenate([images, more])
    batch_size = math.ceil(batch_size / devices) * devices
    with _unchanged(model):
        scores = model.predict(images, batch_size=batch_size, verbose=0)
    if not hasattr(scores, "shape"):
        raise ValueError(f"model: expected one output, got {len(scores)}")
    return np.asarray(scores)[:count].reshape(count, -1)


def _probabilities(model, images):
    """Class probabilities of images, of shape (n, classes)."""
    return _as_probabilities(model, _scores(model, images, 100))


def _as_probabilities(model, scores):
    """What a model says of images as probabilities; of one output, those of the first and of the second class."""
    scores = scores.astype("float64")
    if scores.shape[1] == 1:
        if _threshold(model, scores) == 0:
            scores = 1 / (1 + np.exp(-scores))
        return np.clip(np.concatenate([1 - scores, scores], axis=1), 0, 1)
    if _are_logits(model, scores):
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
    return np.nan_to_num(np.clip(scores, 0, 1))


def _threshold(model, scores):
    """The value above which a single output means the second class: 0 for logits, 0.5 for probabilities."""
    for loss in keras.tree.flatten(model.loss):
        name = loss if isinstance(loss, str) else type(loss).__name__
        if getattr(loss, "from_logits", False) or "hinge" in name.lower():
            return 0.0
        if isinstance(loss, (str, keras.losses.Loss)):
            return 0.5
    # A function of the user's own, or none: only scores that cannot be probabilities tell.
    return 0.0 if scores.min() < 0 or scores.max() > 1 else 0.5


def _are_logits(model, scores):
    """Whether scores are logits: as the loss says, or else as scores show that cannot be probabilities."""
    for loss in keras.tree.flatten(getattr(model, "loss", None)):
        if isinstance(getattr(loss, "from_logits", None), bool):
            return loss.from_logits
        if isinstance(loss, str) and "crossentropy" in loss:
            return False
    return scores.min() < -1e-6 or scores.max() > 1 + 1e-6


def strongest_patches(model, layer, images, channels=8, count=8):
    """For some channels of a layer, the patches of images that excite them most.

    A patch is what the layer sees from the place where the channel's value is highest: its receptive field, which is
    measured, by changing the image row by row and column by column. So it holds for any architecture.

    Args:
        model: a Keras model, Sequential or functional.
        layer: one of its layers, or its name. Its output is a feature map, or has one value a channel.
        images: array of shape (n, height, width, channels), as the model takes them.
        channels: the numbers of the channels, or how many of them, evenly chosen.
        count: how many patches a channel; no two of them of one image.

    Returns:
        An array of shape (channels, count, size, size, colours), the strongest first. A field that reaches beyond an
        image's edge is filled with the image's mean there.

    Raises:
        ValueError: the model has no such layer or channel, or there are fewer images than `count`.
    """
    images = np.asarray(images)
    _expect_images(images)
    part = _up_to(model, layer)
    channels = _channel_numbers(channels, _feature_maps(part, images[:1]).shape[-1])
    _expect(0 < count <= len(images), "count", f"1 to {len(images)}, the number of images", count)
    fields = _receptive_fields(part, images)
    patches = []
    for places in _strongest_places(part, images, channels, count):
        of_channel = []
        for index, row, column in places:
            image = images[index]
            if _is_channels_first():
                image = np.moveaxis(image, 0, -1)
            of_channel.append(_cut_out(image, fields, row, column))
        patches.append(np.stack(of_channel))
    return np.stack(patches)


def _channel_numbers(channels, there_are):
    """`channels` of `strongest_patches` as a list of numbers. Raises ValueError for one that is not there."""
    if isinstance(channels, (int, np.integer)):
        _expect(channels > 0, "channels", "at least one", channels)
        return list(np.linspace(0, there_are - 1, min(channels, there_are)).round().astype(int))
    channels = list(channels)
    are_there = channels and all(0 <= channel < there_are for channel in channels)
    _expect(are_there, "channels", f"numbers from 0 to {there_are - 1}", channels)
    return channels


def _up_to(model, layer):
    """The part of a model from its input to the output of a layer."""
    try:
        layer = model.get_layer(layer) if isinstance(layer, str) else layer
        inputs = model.inputs[0] if len(model.inputs) == 1 else model.inputs
        return keras.Model(inputs, layer.output)
    except Exception as error:
        names = [layer.name for layer in getattr(model, "layers", [])]
        raise ValueError(
            f"layer: expected one of this model's own layers, {names}; for a layer of a model that is used inside this"
            f" one, pass that inner model: {error}"
        ) from error


def _feature_maps(part, images):
    """The output of a layer, of shape (n, rows, columns, channels); of a dense layer, with one row and one column."""
    arrays = []
    with _unchanged(part):
        for start in range(0, len(images), 100):
            # Called as it is, since `predict` would compile each part anew.
            maps = part(images[start : start + 100], training=False)
            arrays.append(keras.ops.convert_to_numpy(maps))
    maps = np.concatenate(arrays).astype("float32")
    if maps.ndim != 4:
        return maps.reshape(len(maps), 1, 1, -1)
    return np.moveaxis(maps, 1, -1) if _is_channels_first() else maps


def _receptive_fields(part, images):
    """What each place of a feature map sees of an image: for rows and for columns, first and last, by place.

    Returns:
        Two pairs of arrays: (first row, last row) by row of the map, (first column, last column) by column of the map.
    """
    height, width = _height_and_width(images)
    rng = np.random.default_rng(0)
    scale = max(np.ptp(images), 1e-6)
    fields = []
    for axis, other_axis, length in ((1, 2, height), (2, 1, width)):
        image_axis = axis + 1 if _is_channels_first() else axis
        seen = []
        # Several images, as maxima and ReLU hide some of what is seen.
        for base in images[rng.integers(0, len(images), 4)]:
            # The first copy stays as it is; in each of the others, one row (or column) is changed.
            changed = np.repeat(base[None].astype("float32"), length + 1, axis=0)
            lines = np.moveaxis(changed, image_axis, 1)  # a view: copy, row (or column), the rest
            for index in range(length):
                noise = rng.normal(size=lines[index + 1, index].shape)
                lines[index + 1, index] += scale * noise
            maps = _feature_maps(part, changed)
            difference = np.abs(maps[1:] - maps[0]).max(axis=-1)
            along = difference.max(axis=other_axis)  # shape (length, rows or columns of the map)
            seen.append(along > 1e-5 * max(np.abs(maps[0]).max(), 1e-12))
        sees = np.any(seen, axis=0)
        nothing = ~sees.any(axis=0)
        first = np.where(nothing, 0, sees.argmax(axis=0))
        last = np.where(nothing, length - 1, length - 1 - sees[::-1].argmax(axis=0))
        fields.append((first, last))
    return fields


def _strongest_places(part, images, channels, count):
    """Image, row and column of the highest values of some channels: shape (channels, count, 3)."""
    best = []
    for start in range(0, len(images), 250):
        features = _feature_maps(part, images[start : start + 250])[..., channels]
        flat = features.reshape(len(features), -1, len(channels))
        places = flat.argmax(axis=1)
        rows, columns = np.divmod(places, features.shape[2])
        index = np.repeat(np.arange(start, start + len(features))[:, None], len(channels), axis=1)
        best.append(np.stack([flat.max(axis=1), index, rows, columns], axis=-1))
    best = np.concatenate(best)
    order = np.argsort(-best[..., 0], axis=0, kind="stable")[:count]
    chosen = np.take_along_axis(best, order[..., None], axis=0)
    return chosen[..., 1:].astype(int).transpose(1, 0, 2)


def _cut_out(image, fields, row, column):
    """A field of an image of shape (height, width, colours); as large as the largest of the layer."""
    size = max((last - first).max() + 1 for first, last in fields)
    starts = []
    for (first, last), place, length in zip(fields, (row, column), image.shape):
        start, end = first[place], last[place]
        whole = (last - first).max() + 1  # of a field that does not reach beyond an edge
        if start == 0 and end < length - 1:
            start = end - whole + 1
        # In the middle of the patch, which is as wide as it is high.
        starts.append(start - (size - whole) // 2)
    patch = np.empty((size, size, image.shape[-1]), image.dtype)
    patch[:] = image.mean(axis=(0, 1))
    inside = [
        slice(max(0, -start), min(size, length - start))
        for start, length in zip(starts, image.shape)
    ]
    source = [
        slice(max(0, start), min(length, start + size))
        for start, length in zip(starts, image.shape)
    ]
    patch[tuple(inside)] = image[tuple(source)]
    return patch


# The plotters ---------------------------------------------------------------------------------------------------------
# When to draw, and what: one picture each. What goes wrong while drawing never ends a training.


class _Plotter(_Recorder):
    """What the plotters share. `figure` is the Matplotlib Figure drawn last; its `savefig` writes it to a file."""

    KIND = ""  # the name under which its measurements are recorded

    def __init__(self, path, save_graph, every=1):
        super().__init__()
        is_count = isinstance(every, numbers.Integral) and every > 0
        _expect(is_count, "every", "a whole number of epochs, at least 1", every)
        self.every = every  # epochs from one drawing to the next
        self.figure = None
        self.picture = None  # its pixels
        self.shown_in = None  # a _ShownIn
        _expect_path(path, "path")
        self._path = Path(path)
        suffix = self._path.suffix.lower() or ".png"
        self._format = Image.registered_extensions().get(suffix)
        wanted = "a picture file such as .png, .jpg or .pdf"
        _expect(self._format in Image.SAVE, "path", wanted, str(path))
        self._save_graph = save_graph
        self._board = None
        self._name = self.KIND
        self._has_failed = False

    def on_train_begin(self, logs=None):
        self._board = _Board.of_this_training(self)
        self._name = self._measured.name_for(self)

    def on_train_end(self, logs=None):
        self._show()

    def _is_due(self, epoch):
        """Whether to measure and draw after this epoch: every so many, and after the last one.

        Which one is the last is known where a callback that stops the training stands before this one.
        """
        is_last = epoch + 1 == (self.params or {}).get("epochs") or self.model.stop_training
        return (epoch + 1) % self.every == 0 or is_last

    def _last_kept(self, name):
        """The last epoch of which something was measured under this name; None where there is none."""
        return max(self._measured.epochs.get(name, {}), default=None)

    def _draw(self, figure, moment):
        """Returns the Figure of this moment, as `_redraw` was told of it; perhaps `figure`, the last one, changed."""
        raise NotImplementedError

    def _redraw(self, moment):
        with self._never_ends_training():
            figure = self.figure
            self.figure = None  # should drawing fail, it may be half changed
            self.figure = self._draw(figure, moment)
            self._keep_picture()

    def _keep_picture(self):
        self.picture = _pixels(self.figure)
        if self._save_graph or not _kernel_shell():
            _write_quietly(self._path, _encoded(self.picture, self._format))

    def _show(self, at_once=False):
        """Shows what was redrawn: with the pictures of the other plotters, once they are redrawn, too, or at once."""
        with self._never_ends_training():
            if at_once:
                self._board.show()
            else:
                self._board.show_after(self)

    @contextlib.contextmanager
    def _never_ends_training(self):
        """Whatever goes wrong in this context, a picture is not worth a training. It is said once."""
        try:
            yield
        except Exception as error:
            if not self._has_failed:
                self._has_failed = True
                me = type(self).__name__
                warnings.warn(
                    f"{me} cannot draw: {error!r}. Training goes on; each epoch tries again."
                )


class _Pace:
    """How fast a training goes, without what is done only once: tracing and compiling, in the first batch of a kind."""

    def __init__(self):
        self._seconds_per_batch = None  # in the last epoch
        # What the last three epochs took for all else: validating, drawing, saving.
        self._seconds_besides = []
        self._steps = None  # batches in an epoch
        # Of this epoch:
        self._batch = 0  # how many have ended
        self._first_batch = None  # the number, from 1, of the first one that was seen to end
        self._first_batch_end = None
        self._last_batch_end = None
        # When the validation began, and when each of its batches ended.
        self._validation_times = []

    def begin_epoch(self, epoch, epochs, steps):
        self.end_epoch()
        self._epoch = epoch
        self._epochs = epochs
        self._epoch_began = time.monotonic()
        self._steps = steps or self._steps
        self._batch = 0
        self._first_batch_end = None

    def end_batch(self, batch):
        self._last_batch_end = time.monotonic()
        self._batch = batch + 1
        if self._first_batch_end is None:
            self._first_batch_end = self._last_batch_end
            self._first_batch = self._batch

    def begin_validation(self):
        self._validation_times = [time.monotonic()]

    def end_validation_batch(self):
        self._validation_times.append(time.monotonic())

    def end_epoch(self):
        """All callbacks have ended the last epoch."""
        if self._first_batch_end is None:
            return
        is_first = not self._seconds_besides
        if is_first:  # in which the validation was compiled, among other things
            besides = self._validation_without_its_first_batch()
        else:
            besides = time.monotonic() - self._last_batch_end
        self._seconds_besides = [*self._seconds_besides[-2:], besides]
        if self._batch == 1 and not is_first:  # too few to leave out the first
            self._seconds_per_batch = self._last_batch_end - self._epoch_began
        self._seconds_per_batch = self._of_this_epoch() or self._seconds_per_batch
        self._steps = self._batch

    def _validation_without_its_first_batch(self):
        """How long a validation takes, judged by all of its batches but the first; 0 where that is not known."""
        batches = len(self._validation_times) - 1
        if batches < 2:
            return 0
        _, first, *_, last = self._validation_times
        return (last - first) / (batches - 1) * batches

    def _of_this_epoch(self):
        """Seconds a batch, judged by all of this epoch's but the first; None where there are none yet."""
        if self._first_batch_end is None or self._batch == self._first_batch:
            return None
        return (self._last_batch_end - self._first_batch_end) / (self._batch - self._first_batch)

    def left(self, is_epoch_over=False):
        """The seconds that are left of the whole training; None where nothing is known yet."""
        per_batch = self._of_this_epoch()
        is_early = self._steps and self._batch < self._steps / 10
        if per_batch is None or (is_early and self._seconds_per_batch is not None):
            per_batch = self._seconds_per_batch
        if per_batch is None or not self._steps:
            return None
        besides = min(self._seconds_besides, default=0)
        epochs_after = self._epochs - self._epoch - 1
        after = epochs_after * (self._steps * per_batch + besides)
        if is_epoch_over:
            return after
        return (self._steps - self._batch) * per_batch + besides + after


def _duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours = minutes // 60
    if hours:
        return f"{hours} h {minutes % 60} min"
    if minutes >= 10:
        return f"{minutes} min"
    if minutes:
        return f"{minutes} min {seconds} s"
    return f"{seconds} s"


class AccLossPlotter(_Plotter):
    """Redraws the curves after each epoch, and every few seconds in a long one, with best epoch, seam and time left.

    A thin line shows the training curve inside of the first epochs, and of the one that runs: at each point the mean of
    this epoch so far, as Keras logs it.

    Args:
        graphs: the panels, by metric name; `"acc"` stands for whatever accuracy is logged.
        save_graph: also keep the picture current in the file `path`. Without a kernel (a plain script) it always is.
        title: text above the panels, before the progress.
        verbose: 1 prints one line per epoch, with the values drawn, unless `fit` prints its own; 0 nothing.

    Raises:
        ValueError: `graphs` is no list of names, or `verbose` neither 0 nor 1.
    """

    KIND = "curves"
    SAMPLES = 20  # points of the curve inside of an epoch
    # The first ones, whose points are kept; later, a curve is known by its epochs.
    SAMPLED_EPOCHS = 15
    _watching = None  # a weak reference to the plotter that waits for its training to be stopped

    def __init__(
        self,
        graphs=("acc", "loss"),
        save_graph=False,
        title="",
        path="training_acc_loss.png",
        verbose=1,
    ):
        super().__init__(path, save_graph)
        _expect(verbose in (0, 1), "verbose", "0 or 1", verbose)
        plot_history({}, graphs)  # this checks `graphs`
        self.title = title
        self.verbose = verbose
        self._graphs = list(graphs)
        self._not_drawn = set()  # names of metrics whose values cannot be drawn, once that was said
        # Takes back what is to be called when the cell ends; None: nothing is.
        self._stop_watching = None
        self._pace = _Pace()

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self._began = time.monotonic()
        self._pace = _Pace()
        self._resumed_at = None
        self._is_first_epoch = True
        self._samples = None  # of the epoch that runs
        self._position = "1"
        self._pause = 2  # seconds between two drawings
        self._watch_for_a_stop()
        self._redraw("starting")  # the first sign of life: compiling may take a while
        self._show()

    def _watch_for_a_stop(self):
        """Keras calls no callback where a training is stopped (■, Ctrl-C) or fails: the end of the cell tells it."""
        if threading.current_thread() is not threading.main_thread():
            return  # IPython's events, and the end of Python, are the main thread's
        if self._stop_watching is not None:  # its own earlier training failed
            self._stop_watching()
        earlier = None
        if AccLossPlotter._watching is not None:
            earlier = AccLossPlotter._watching()  # None where it is gone
        # It waits still: so its training was stopped, and nobody was told.
        was_stopped = earlier is not None and earlier._stop_watching is not None
        if was_stopped and earlier._board is not self._board:
            earlier._stop_watching()
            earlier._say_that_it_stopped()
        AccLossPlotter._watching = weakref.ref(self)
        this = weakref.ref(self)

        def say_that_it_stopped():
            plotter = this()
            if plotter is not None:
                plotter._say_that_it_stopped()

        self._stop_watching = _call_when_the_cell_ends(say_that_it_stopped)

    def _say_that_it_stopped(self):
        self._stop_watching = None
        self._redraw(f"stopped in epoch {self._position}")
        self._show(at_once=True)

    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch, logs)
        if self._is_first_epoch and epoch > 0:
            self._resumed_at = epoch
        self._is_first_epoch = False
        self._epoch = epoch
        self._epoch_began = time.monotonic()
        params = self.params or {}
        epochs = params.get("epochs", epoch + 1)
        self._position = f"{epoch + 1}/{epochs}"
        self._pace.begin_epoch(epoch, epochs, params.get("steps"))
        self._samples = None

    def on_train_batch_end(self, batch, logs=None):
        self._pace.end_batch(batch)
        steps = (self.params or {}).get("steps")
        where = f"batch {batch + 1}"
        if steps:  # of a generator, say, it is not known how many there are
            done = (batch + 1) / steps
            where = f"{done:.0%}"
            with self._never_ends_training():
                self._take_sample(done, logs or {})
        began = time.monotonic()
        if began - self._drawn_at >= self._pause:
            self._redraw(f"{where} of epoch {self._position}{self._left()}")
            self._show(at_once=True)
            # Less than a hundredth of the time is spent on it.
            self._pause = max(2, 150 * (time.monotonic() - began))

    def _take_sample(self, done, logs):
        number = int(done * self.SAMPLES)
        if self._samples is None:
            self._sampled = _metrics_of(self._graphs, logs)
            self._samples = np.full((self.SAMPLES, len(self._sampled)), np.nan, "float32")
        if number and np.isnan(self._samples[number - 1]).all():
            values = [_number(logs[name]) for name in self._sampled]
            is_drawable = np.abs(values) < np.finfo("float32").max
            self._samples[number - 1] = np.where(is_drawable, values, np.nan)

    def on_test_begin(self, logs=None):
        self._pace.begin_validation()

    def on_test_batch_end(self, batch, logs=None):
        self._pace.end_validation_batch()

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        has_samples = self._samples is not None and epoch < self.SAMPLED_EPOCHS
        if has_samples or self._name not in self._measured.about:
            about = {"metrics": self._sampled if has_samples else [], "graphs": self._graphs}
            self._measured.describe(self._name, about, _facts(self._graphs, logs or {}, self.model))
        if has_samples:
            self._measured.keep(f"{self._name} samples", epoch, self._samples)
        self._samples = None
        left = self._left(is_epoch_over=True)
        self._redraw(f"epoch {self._position}{left}")
        self._show()
        with self._never_ends_training():
            values = {name: logs[name] for name in _curves_of(self._graphs, logs or {})}
            self._say_what_is_not_drawn(values)
            keras_prints = (self.params or {}).get("verbose")
            if self.verbose and not keras_prints:
                listed = _listed(values)
                took = _duration(time.monotonic() - self._epoch_began)
                _print(f"epoch {self._position}  {listed}  {took}{left}")

    def on_train_end(self, logs=None):
        if self._stop_watching is not None:
            self._stop_watching()
            self._stop_watching = None
        self._redraw(self._what_was_trained())
        super().on_train_end(logs)

    def _what_was_trained(self):
        if not self._records:
            return "nothing was trained"
        count = max(self._records) + 1
        said = "1 epoch" if count == 1 else f"{count} epochs"
        # How long the epochs before a restart took is not known.
        if not self._is_first_epoch and not self._resumed_at:
            said += f" in {_duration(time.monotonic() - self._began)}"
        return said

    def _left(self, is_epoch_over=False):
        seconds = self._pace.left(is_epoch_over)
        is_over = is_epoch_over and seconds == 0
        return "" if seconds is None or is_over else f", {_duration(seconds)} left"

    def _say_what_is_not_drawn(self, values):
        for name, value in values.items():
            is_drawn = abs(_number(value)) < _TOO_LARGE_TO_DRAW
            # A loss that is nan or infinite is a training that went wrong, not an odd value in the logs.
            is_nan_or_infinite = isinstance(value, float) and not math.isfinite(value)
            if is_drawn or is_nan_or_infinite or name in self._not_drawn:
                continue
            self._not_drawn.add(name)
            warnings.warn(
                f"{name} cannot be drawn where it is no number or too large, such as {value!r}."
            )

    def _draw(self, figure, progress):
        self._drawn_at = time.monotonic()
        parts = [progress]
        if self.title:
            parts.insert(0, self.title)
        # Not every optimizer has one learning rate.
        with contextlib.suppress(AttributeError, TypeError, ValueError):
            parts.append(f"learning rate {float(self.model.optimizer.learning_rate):.3g}")
        history = _with_epochs(self._records)
        samples = dict(self._measured.epochs.get(f"{self._name} samples", {}))
        described = self._measured.about.get(self._name)
        metrics = described["about"]["metrics"] if described else []
        if self._samples is not None:
            samples[self._epoch] = self._samples
            metrics = self._sampled
        facts = _facts(self._graphs, [*history, *metrics], self.model)
        inside = _inside_of_epochs(samples, metrics)
        title = " · ".join(parts)
        return _draw_history(history, self._graphs, self._resumed_at, title, figure, facts, inside)


def _with_epochs(records):
    """A record as `plot_history` takes it: lists of values by name, None where one is missing, and the epochs."""
    names = dict.fromkeys(name for logs in records.values() for name in logs)
    history = {name: [logs.get(name) for logs in records.values()] for name in names}
    history["epoch"] = list(records)
    return history


def _inside_of_epochs(samples, metrics):
    """The curve inside of epochs: x and y by metric name, with gaps between the epochs."""
    inside = {}
    for index, name in enumerate(metrics):
        all_x = []
        all_y = []
        for epoch, values in samples.items():
            if index >= values.shape[1]:
                continue
            x = epoch + np.arange(len(values) + 1) / len(values)
            y = np.concatenate([[np.nan], values[:, index]])
            # Where an epoch has fewer batches than samples, the line goes on over what is missing.
            is_kept = ~np.isnan(y)
            is_kept[0] = True  # the gap before the epoch
            all_x.append(x[is_kept])
            all_y.append(y[is_kept])
        if all_x:
            inside[name] = np.concatenate(all_x), np.concatenate(all_y)
    return inside


class ConfusionMatrixPlotter(_Plotter):
    """Redraws the confusion matrix of a validation set after each epoch.

    Compile `keras.metrics.OneHotMeanIoU(len(classes))` as a metric (for integer labels,
    `MeanIoU(len(classes), sparse_y_pred=False)`), and pass the same arrays here and as `validation_data`: that metric
    then holds the matrix of the validation pass, and nothing is predicted a second time. Otherwise the images are
    predicted.

    Args:
        X_val: images, an array whose first axis counts them.
        Y_val: one label per image: integers of shape (n,) or (n, 1), or one-hot of shape (n, classes).
        classes: the class names, in the order of the labels.
        normalize, cmap, title: as for `plot_confusion_matrix`. save_graph, path: as for `AccLossPlotter`.
        every: redraw after every so many epochs.

    Raises:
        ValueError: labels that are not one class per image, names that do not match them, or, when training begins,
            a model with another number of outputs.
    """

    KIND = "confusion_matrix"

    def __init__(
        self,
        X_val,
        Y_val,
        classes,
        normalize=False,
        cmap="Blues",
        title="Confusion Matrix",
        every=1,
        save_graph=False,
        path="confusion_matrix.png",
    ):
        super().__init__(path, save_graph, every)
        _expect_names(classes)
        # This checks the other arguments.
        plot_confusion_matrix(np.zeros((len(classes), len(classes))), classes, normalize, cmap)
        self._about = {
            "classes": [str(name) for name in classes],
            "normalize": bool(normalize),
            "cmap": getattr(cmap, "name", cmap),
        }
        is_array = hasattr(X_val, "shape")
        _expect(is_array, "X_val", "an array of images", type(X_val).__name__, TypeError)
        self.X_val = X_val
        self.labels = _class_indices(Y_val, len(X_val), len(classes))
        self._about["data"] = _checksum_of([self.labels, X_val])
        self.title = title
        self._cmap = cmap
        self._class_sizes = np.bincount(self.labels, minlength=len(classes))
        # That a compiled metric held at the end of the last validation pass.
        self._metric_matrix = None
        self._outputs = None  # of the model, as soon as it is built

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self._measured.describe(self._name, self._about, self.title)
        self._metric_matrix = None
        outputs = _output_count(self.model)
        if outputs is not None:
            self._check_outputs(outputs)
        self._redraw(self._last_kept(self._name))  # where a resumed training stands
        self._show()

    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch, logs)
        self._metric_matrix = None  # it was of the epoch before

    def on_test_end(self, logs=None):
        with contextlib.suppress(Exception):  # where it cannot be told, the images are predicted
            self._metric_matrix = self._matrix_held_by_a_metric(logs or {})

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        if self._is_due(epoch):
            self._redraw(epoch)
        self._show()

    def on_train_end(self, logs=None):
        self._metric_matrix = None  # from here on, the model may be changed
        super().on_train_end(logs)

    def _draw(self, figure, epoch):
        matrix = None if epoch is None else self._matrix_of(epoch)
        return _draw_kept_matrix(
            self._about, self.title, matrix, epoch, self.every, figure, self._cmap
        )

    def _matrix_of(self, epoch):
        kept = self._measured.epochs.get(self._name, {})
        if epoch not in kept:
            _expect_finite(self.model)
            dtype = np.min_scalar_type(len(self.labels))  # the smallest that can count all images
            self._measured.keep(self._name, epoch, self.confusion_matrix().astype(dtype))
        return self._measured.epochs[self._name][epoch]

    def confusion_matrix(self):
        """Counts of shape (classes, classes), true class by row: of the model as it is now.

        At the end of an epoch it is the matrix of the validation pass, where a compiled metric has counted that.
        """
        if self._metric_matrix is not None and _arguments_of("fit", self.model):
            return self._metric_matrix.copy()
        scores = _scores(self.model, self.X_val, 500)
        self._check_outputs(scores.shape[1])
        if scores.shape[1] == 1:
            predicted = scores[:, 0] > _threshold(self.model, scores)
        else:
            predicted = scores.argmax(axis=1)
        count = len(self._class_sizes)
        pairs = self.labels * count + predicted
        return np.bincount(pairs, minlength=count * count).reshape(count, count)

    def _check_outputs(self, outputs):
        _check_outputs(outputs, len(self._class_sizes))
        self._outputs = outputs

    def _matrix_held_by_a_metric(self, logs):
        """The matrix of a compiled metric after a validation pass of `fit`, if that was over our images, else None."""
        passed = _arguments_of("evaluate", self.model)
        is_validation = passed.get("use_cached_eval_dataset", False)  # not a call by the user
        count = len(self._class_sizes)
        if not is_validation or passed.get("sample_weight") is not None or self._outputs != count:
            return None
        if not self._are_ours(passed.get("x"), passed.get("y")):
            return None
        metrics = []
        for metric in self.model.metrics:  # Keras keeps the compiled ones inside another
            metrics += [metric, *getattr(metric, "metrics", [])]
        for metric in metrics:
            if type(metric) not in _METRICS_WITH_MATRIX:
                continue
            # Another callback may have used it for something else since: then its result is not the logged one.
            if not math.isclose(metric.result(), logs[metric.name], rel_tol=1e-4):
                continue
            held = keras.ops.convert_to_numpy(metric.total_cm)
            if held.shape == (count, count) and (held.sum(axis=1) == self._class_sizes).all():
                return held
        return None

    def _are_ours(self, images, labels):
        if images is None:
            return False
        if images is not self.X_val:
            arrays = isinstance(images, np.ndarray) and isinstance(self.X_val, np.ndarray)
            if not arrays or not np.array_equal(images, self.X_val):
                return False
        try:
            passed = _class_indices(labels, len(images), len(self._class_sizes))
            return (passed == self.labels).all()
        except ValueError:
            return False


def _check_outputs(outputs, count):
    if outputs != count and not (count == 2 and outputs == 1):
        raise ValueError(f"classes: {count} names, but the model has {outputs} outputs")


def _draw_kept_matrix(about, title, matrix, epoch, first, figure=None, cmap=None):
    """The picture of a ConfusionMatrixPlotter, of what is recorded; before the `first` epoch (from 1), nothing is."""
    when = f"after epoch {first}" if matrix is None else f"epoch {epoch + 1}"
    title = f"{title} · {when}"
    ax = figure.axes[0] if figure else None
    # The record has the colormap's name; one of the user's own is unknown where it is read.
    cmap = cmap or (about["cmap"] if about["cmap"] in matplotlib.colormaps else "Blues")
    return _draw_matrix(matrix, about["classes"], about["normalize"], cmap, title, ax, cell=0.23)


# Those of Keras's metrics whose `total_cm` is a confusion matrix of the most probable classes.
_METRICS_WITH_MATRIX = {
    keras.metrics.IoU,
    keras.metrics.MeanIoU,
    keras.metrics.OneHotIoU,
    keras.metrics.OneHotMeanIoU,
}


class PredictionPlotter(_Plotter):
    """Redraws what the model thinks of a few images after each epoch, and where in the image the evidence lies.

    Each image has its three most probable classes as bars, the right one in green. Beside it stands the same one in
    grey, orange where the evidence for its most probable class lies (see `occlusion_map`).

    Args:
        images: up to twelve, an array of shape (n, height, width, channels) as the model takes them.
        labels: one per image: integers of shape (n,) or (n, 1), or one-hot of shape (n, classes).
        classes: the class names, in the order of the labels.
        title: text above them, before the epoch.
        every: redraw after every so many epochs. save_graph, path: as for `AccLossPlotter`.

    Raises:
        ValueError: no images, too many or none of this shape, labels that are not one class per image; or, when
            training begins, a model with another number of outputs or for images of another size.
    """

    KIND = "predictions"

    def __init__(
        self,
        images,
        labels,
        classes,
        title="Predictions",
        every=1,
        save_graph=False,
        path="predictions.png",
    ):
        super().__init__(path, save_graph, every)
        _expect_names(classes)
        self._shown = np.round(255 * _images_to_show(images)).astype(np.uint8)
        self.images = np.asarray(images)
        self.labels = _class_indices(labels, len(self.images), len(classes), "labels")
        self.title = title
        self._about = {"classes": [str(name) for name in classes]}

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self._check_model()
        self._measured.describe(
            self._name, self._about, self.title, images=self._shown, labels=self.labels
        )
        self._redraw(self._last_kept(f"{self._name} falls"))  # where a resumed training stands
        self._show()

    def _check_model(self):
        outputs = _output_count(self.model)
        if outputs is not None:
            _check_outputs(outputs, len(self._about["classes"]))
        taken = getattr(self.model, "input_shape", None) if self.model.built else None
        if not isinstance(taken, tuple):
            return
        given = self.images.shape
        fits = len(taken) == len(given)
        for size, got in zip(taken[1:], given[1:]):
            fits = fits and size in (None, got)
        _expect(fits, "images", f"the shape that the model takes, {taken}", given)

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        if self._is_due(epoch):
            self._redraw(epoch)
        self._show()

    def _draw(self, figure, epoch):
        probabilities = None
        falls = None
        if epoch is not None:
            probabilities, falls = self._measured_in(epoch)
        return _draw_kept_predictions(
            self._about,
            self.title,
            self._shown,
            self.labels,
            probabilities,
            falls,
            epoch,
            self.every,
        )

    def _measured_in(self, epoch):
        """The probabilities and the falls of an epoch: as recorded, else as measured now."""
        names = [f"{self._name} probabilities", f"{self._name} falls"]
        kept = self._measured.epochs
        if not all(epoch in kept.get(name, {}) for name in names):
            _expect_finite(self.model)
            probabilities = _probabilities(self.model, self.images)
            _check_outputs(probabilities.shape[1], len(self._about["classes"]))
            # In so many steps that the most probable class is the same as before.
            self._measured.keep(names[0], epoch, _as_integers(probabilities, np.uint16))
            falls = _falls(self.model, self.images, probabilities.argmax(axis=1), None, None)
            self._measured.keep(names[1], epoch, _as_integers(falls, np.int8))
        return [kept[name][epoch] for name in names]


def _as_integers(shares, kind):
    """Numbers up to 1 as whole numbers of a type, the largest of which stands for 1. `_as_shares` takes them back."""
    return np.round(shares * np.iinfo(kind).max).astype(kind)


def _as_shares(integers):
    return integers / np.iinfo(integers.dtype).max


def _draw_kept_predictions(about, title, images, labels, probabilities, falls, epoch, first):
    """The picture of a PredictionPlotter, of what is recorded; before the `first` epoch (from 1), nothing is."""
    when = f"after epoch {first}" if probabilities is None else f"epoch {epoch + 1}"
    title = f"{title} · {when}"
    evidence = np.full(images.shape[:3], np.nan)
    if falls is not None:
        evidence = _spread(_as_shares(falls), images.shape[1:3])
        probabilities = _as_shares(probabilities)
    thoughts = _checked_thoughts(images / 255, probabilities, about["classes"], labels, evidence)
    return _draw_thoughts(thoughts, about["classes"], title, size=1.13)


# The checkpoint file --------------------------------------------------------------------------------------------------
# One HDF5 file that plain Keras opens, with a group of our own for what Keras leaves out:
#
#   model_weights, attributes       what `model.save` writes
#   resumable_checkpoint
#     state                         JSON: epoch, record, best value, counters, random states, fingerprint, phases
#     arrays/optimizer/0 ...        the optimizer's variables
#     arrays/seeds/0 ...            the states of layers that draw at random
#     arrays/others/0 ...           variables that Keras does not list: of stateful recurrent layers, of a loss
#     arrays/callbacks/0/0 ...      the best weights that a callback keeps (EarlyStopping)
#     measured/about                JSON: of what the plotters have measured, names and settings
#     measured/constants/...        the images and labels of a PredictionPlotter
#     measured/epochs/NAME/...      values by epoch: matrices, probabilities, evidence, as small integers; samples
#     sha256                        a checksum of the whole file, see `_pack`

SAVED, BEST = "saved_model.hdf5", "best_model.hdf5"
FORMAT = 2  # of our group; files of format 1 are read, too
_GROUP = "resumable_checkpoint"
_MARK = b"SHA-256 of this file, with zeros for the 64 digits that follow: "
_MOST_LINKS, _MOST_LEVELS = 100_000, 50  # in a file that is read


def _scope_of(model):
    """Where variables of this model may be made: within its tf.distribute strategy, if it has one."""
    strategy = getattr(model, "distribute_strategy", None)
    if strategy is None or strategy is sys.modules["tensorflow"].distribute.get_strategy():
        return contextlib.nullcontext()
    return strategy.scope()


def _build_optimizer(model):
    with _scope_of(model):
        model.optimizer.build(model.trainable_variables)


def _all_layers(model):
    """The layers of a model, and those inside its layers."""
    found = []
    for layer in getattr(model, "layers", ()):
        found.append(layer)
        found.extend(_all_layers(layer))
    return found


class _FileInMemory(h5py.File):
    """An HDF5 file in memory. Keras goes by the end of a path to choose the format, and takes this for one."""

    def __str__(self):
        return "in memory.hdf5"


@contextlib.contextmanager
def _without_the_advice_on_hdf5():
    """Keras calls HDF5 a legacy format at each save."""
    logger = logging.getLogger("absl")

    def is_other(record):
        return "HDF5" not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _weight_names(model):
    """Where Keras puts the model's weights into an HDF5 file: the names of their datasets, in their order."""
    names = {}
    for layer in model.layers:
        for weight in layer.weights:
            names.setdefault(id(weight), f"model_weights/{layer.name}/{weight.path}")
    return [
        names.get(id(weight), f"model_weights/top_level_model_weights/{weight.path}")
        for weight in model.weights
    ]


# Arguments that came with Keras 3.14 and 3.15, and their defaults. Earlier versions refuse a file that names them.
_GATE = {"sliding_window": None, "use_gate": False}
_AXES = {"input_axes": None, "output_axes": None}
_NEWER_ARGUMENTS = {
    "BatchNormalization": {"renorm": False, "renorm_clipping": None, "renorm_momentum": 0.99},
    "MultiHeadAttention": _GATE,
    "GroupedQueryAttention": _GATE,
    "IntegerLookup": {"oov_method": "floormod", "salt": None},
    "StringLookup": {"oov_method": "floormod", "salt": None},
    "VarianceScaling": _AXES,
    "GlorotNormal": _AXES,
    "GlorotUniform": _AXES,
    "HeNormal": _AXES,
    "HeUniform": _AXES,
    "LecunNormal": _AXES,
    "LecunUniform": _AXES,
}


def _without_newer_arguments(config, own_classes):
    """The config of a model without newer arguments that stand at their defaults, so that Keras 3.13.2 loads it.

    Args:
        own_classes: the names of the user's own classes of layers, whose arguments stay.
    """
    if isinstance(config, list):
        return [_without_newer_arguments(part, own_classes) for part in config]
    if not isinstance(config, dict):
        return config
    kept = {name: _without_newer_arguments(part, own_classes) for name, part in config.items()}
    name = config.get("class_name")
    is_of_keras = name not in own_classes and str(config.get("module", "keras")).startswith("keras")
    if is_of_keras and isinstance(config.get("config"), dict):
        for argument, default in _NEWER_ARGUMENTS.get(name, {}).items():
            if config["config"].get(argument, default) == default:
                kept["config"].pop(argument, None)
    return kept


def _write_model(file, model, with_config):
    """Writes what `model.save` does; without the config, only the weights, as `model.load_weights` reads them."""
    if with_config:
        with _without_the_advice_on_hdf5():
            # With its optimizer, Keras would strip that from the compile config of the live model.
            model.save(file, include_optimizer=False)
        classes = [type(layer) for layer in _all_layers(model)]
        own = {kind.__name__ for kind in classes if not kind.__module__.startswith("keras.")}
        config = json.loads(file.attrs["model_config"])
        file.attrs["model_config"] = json.dumps(_without_newer_arguments(config, own))
        return
    weights = file.create_group("model_weights")
    weights.attrs["layer_names"] = [layer.name.encode() for layer in model.layers]
    for layer in model.layers:
        # The order in which Keras reads them.
        variables = layer.trainable_weights + layer.non_trainable_weights
        _write_weights(weights.create_group(layer.name), variables)
    inside = {id(variable) for layer in model.layers for variable in layer.weights}
    outside = [variable for variable in model.weights if id(variable) not in inside]
    _write_weights(weights.create_group("top_level_model_weights"), outside)


def _write_weights(group, variables):
    """Writes variables as Keras reads them: a dataset for each, and their order in an attribute."""
    group.attrs["weight_names"] = [variable.path.encode() for variable in variables]
    for variable in variables:
        group[variable.path] = keras.ops.convert_to_numpy(variable)


def _pack(model, with_config, state_json, arrays):
    """The bytes of a checkpoint: the file that `model.save` writes, and our group. In memory, as a disk may be full.

    Args:
        with_config: see `_write_model`.
        state_json: what to keep as `state`.
        arrays: pairs of a name below our group and an array, or a variable.
    """
    buffer = io.BytesIO()
    with _FileInMemory(buffer, "w") as file:
        _write_model(file, model, with_config)
        # An attribute could hold 64 KB at most.
        file[f"{_GROUP}/state"] = np.frombuffer(state_json.encode(), np.uint8)
        for name, values in arrays:
            file[f"{_GROUP}/{name}"] = keras.ops.convert_to_numpy(values)
        checksum = np.frombuffer(_MARK + b"0" * 64, np.uint8)
        start = file.create_dataset(f"{_GROUP}/sha256", data=checksum).id.get_offset() + len(_MARK)
    data = buffer.getbuffer()
    # The SHA-256 of the file stands in the file: it is taken while zeros are in its place.
    data[start : start + 64] = hashlib.sha256(data).hexdigest().encode()
    return data


def _check_checksum(data):
    is_right = False
    mark = data.find(_MARK)
    if mark >= 0:
        start = mark + len(_MARK)
        view = memoryview(data)  # whose parts are no copies
        digest = hashlib.sha256(view[:start])
        digest.update(b"0" * 64)
        digest.update(view[start + 64 :])
        is_right = data[start : start + 64] == digest.hexdigest().encode()
    if not is_right:
        raise ValueError(
            "its checksum is missing or wrong: it is empty, cut short, damaged, or not one of ours"
        )


def _vetted_datasets(file, most_bytes):
    """All datasets of a file by name. Raises ValueError where anything in it is not as this module writes it.

    A file from a stranger may hold links to other files, arrays that take no room in the file and terabytes in memory,
    a thousand names for one array, or groups without end.
    """
    datasets, claimed, links = {}, 0, 0
    seen = set()
    groups = [("", file, 0)]
    while groups:
        path, group, level = groups.pop()
        address = h5py.h5o.get_info(group.id).addr
        if address in seen:
            continue
        seen.add(address)
        links += len(group)
        if links > _MOST_LINKS or level > _MOST_LEVELS:
            raise ValueError("it has more groups and links than a checkpoint can have")
        for name in group:
            is_inside = isinstance(group.get(name, getlink=True), h5py.HardLink)
            item = group[name] if is_inside else None
            name = f"{path}{name}"
            if isinstance(item, h5py.Group):
                groups.append((f"{name}/", item, level + 1))
                continue
            if not isinstance(item, h5py.Dataset) or item.is_virtual or item.external:
                raise ValueError(f"{name} takes its data from elsewhere, which is not read")
            claimed += item.nbytes
            is_stored = item.chunks is None and item.id.get_storage_size() == item.nbytes
            if item.dtype.hasobject or not is_stored or claimed > most_bytes:
                raise ValueError(
                    f"{name} claims shape {item.shape} of {item.dtype}, more than the file holds"
                )
            datasets[name] = item
    return datasets


@contextlib.contextmanager
def _opened(path, most_bytes=None):
    """Reads a checkpoint, from this file alone, once every byte was found to be as written.

    Yields its state and its datasets by name, of which none is read yet. Attributes are not read at all: a hostile file
    can make HDF5 read them without end.

    Raises:
        ValueError: it is too large, damaged, hostile, or of a format that this version does not know.
        OSError: the disk does not give it; it may be sound.
    """
    size = path.stat().st_size
    if most_bytes is not None and size > most_bytes:
        raise ValueError(
            f"it has {size:,} bytes; a checkpoint of this model has at most {most_bytes:,}"
        )
    data = path.read_bytes()
    _check_checksum(data)
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(h5py.File(io.BytesIO(data), "r"))
            datasets = _vetted_datasets(file, len(data))
            state = json.loads(datasets[f"{_GROUP}/state"][()].tobytes())
        except OSError as error:  # of HDF5, not of the disk
            raise ValueError(f"HDF5 cannot read it: {error}") from error
        yield _checked_state(state), datasets


_STATE_TYPES = {
    "epoch": int,
    "next_epoch": int,
    "finished": bool,
    "best": (int, float, type(None)),
    "best_epoch": (int, type(None)),
    "callbacks": list,
    "records": list,
    "random": dict,
    "fingerprint": dict,
    "phases": list,
}


def _bring_up_to_date(state):
    """Turns a state of format 1, which kept the counters of the callbacks that were named, into today's."""
    saved = state["fingerprint"]
    names = [name for key, name in saved.items() if key.startswith("callbacks[")]
    state["callbacks"] = []
    for name, counters in zip(names, state["counters"]):
        state["callbacks"].append({"class": name, "counters": counters})
    state["weights"] = None
    state["phases"] = []
    saved["monitor"], saved["mode"] = saved["monitor"].removesuffix(")").split(" (")


def _are_in_order(state):
    """Whether the epochs of a state follow each other as those of a training do."""
    epochs = [record["epoch"] for record in state["records"]]
    if not all(isinstance(epoch, int) and epoch >= 0 for epoch in epochs):
        return False
    if epochs != sorted(set(epochs)):
        return False
    if (state["best"] is None) != (state["best_epoch"] is None):
        return False
    return max([-1, *epochs]) <= state["epoch"] < state["next_epoch"]


def _checked_state(state):
    """A state as it was read, brought to today's format. Raises ValueError where it is not one."""
    if not isinstance(state, dict) or state.get("format") not in (1, FORMAT):
        raise ValueError("its format is unknown to this version of visual_callbacks.py")
    if state["format"] == 1:
        _bring_up_to_date(state)
    for name, kinds in _STATE_TYPES.items():
        if not isinstance(state[name], kinds):
            raise ValueError(f"its {name} is {state[name]!r}")
    for callback in state["callbacks"]:
        if not isinstance(callback["class"], str) or not isinstance(callback["counters"], dict):
            raise ValueError(f"one of its callbacks is {callback!r}")
    for phase in state["phases"]:
        has_epochs = type(phase["epochs"]) is int and type(phase["next_epoch"]) is int
        if not has_epochs or not isinstance(phase["fingerprint"], dict):
            raise ValueError(f"one of its phases is {phase!r}")
    if state["best"] is not None and not math.isfinite(state["best"]):
        raise ValueError("its best value is not finite")
    if not all(isinstance(record["logs"], dict) for record in state["records"]):
        raise ValueError("its record is none")
    if not _are_in_order(state):
        raise ValueError("its epochs are in disorder")
    _check_random_state(state["random"])
    return state


def _write(path, data):
    """Puts `data` at `path` so that, whenever the machine stops, either the old or the new file is there, whole."""
    partial = path.with_name(f"{path.stem}.tmp{path.suffix}")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if not _holds(partial, data):
            raise OSError(f"{partial} reads back differently from what was written")
        os.replace(partial, path)
        # On Windows and some network drives, folders cannot be flushed.
        with contextlib.suppress(OSError):
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # makes the rename last through a power cut
            finally:
                os.close(folder)
    finally:
        # After a failure it is still there. That error is raised, and none from here instead.
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _holds(path, data):
    """Whether a file holds exactly these bytes; read piece by piece, as they may be many."""
    data = memoryview(data)
    position = 0
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            if piece != bytes(data[position : position + len(piece)]):  # views compare slowly
                return False
            position += len(piece)
    return position == len(data)


# What must match ------------------------------------------------------------------------------------------------------
# The fingerprint of a training: all that must be the same for a resumed training to equal an uninterrupted one.

# Parts of a config that are generated, restored apart (seeds), or that depend on the version or the backend.
_LEFT_OUT = {
    "name",
    "seed",
    "shared_object_id",
    "build_config",
    "compile_config",
    "keras_version",
    "backend",
    "module",
    "registered_name",
}
# Where the config of a model refers to its layers by name.
_REFERENCES = {"keras_history", "input_layers", "output_layers"}
_NOT_KNOWN_YET = "not known yet"


def _by_position(value, positions, is_reference=False):
    """A model's config with its layers called by their position: generated names differ in a model built again."""
    if isinstance(value, dict):
        return {
            key: _by_position(item, positions, is_reference or key in _REFERENCES)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_by_position(item, positions, is_reference) for item in value]
    if is_reference and isinstance(value, str):
        return positions.get(value, value)
    return value


def _flat(value, path=""):
    """Pairs of path and value of plain data, without what is left out and the current learning rate."""
    if isinstance(value, dict) and value.get("class_name") == "__lambda__":
        yield f"{path}.lambda".strip("."), _what_a_lambda_does(value["config"])
    elif isinstance(value, dict) and value:
        if value.get("class_name") == "DTypePolicy":
            yield f"{path}.policy".strip("."), value["config"]["name"]
        for key, item in value.items():
            if key not in _LEFT_OUT:
                yield from _flat(item, f"{path}.{key}")
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _flat(item, f"{path}[{index}]")
    elif not (path.endswith(".learning_rate") and isinstance(value, (int, float))):
        yield path.strip("."), value


def _what_a_lambda_does(config):
    """A digest of a lambda's instructions, constants and defaults, but not of the file and line where it stands."""
    parts = config.get("value")
    if not parts:
        parts = config["code"], config["defaults"], config["closure"]
    packed, defaults, closure = parts
    told = [defaults, closure]
    waiting = [marshal.loads(base64.b64decode(packed))]
    while waiting:
        code = waiting.pop(0)
        for constant in code.co_consts:
            if inspect.iscode(constant):
                waiting.append(constant)  # a function inside of this one
            elif isinstance(constant, frozenset):
                told.append(sorted(map(repr, constant)))  # its elements come in any order
            else:
                told.append(repr(constant))
        told += [code.co_code.hex(), code.co_names, code.co_varnames, code.co_freevars]
    return hashlib.sha256(_json(told).encode()).hexdigest()[:16]


def _fingerprint(model, settings, compiled_rate, say):
    """The values that must match, each by its path. `say` is told of those that cannot be compared."""
    parts = {
        "model": lambda: _by_position(_plain(_config_of(model)), _positions(model)),
        "loss": lambda: keras.saving.serialize_keras_object(model.loss),
        "loss_weights": lambda: (model.get_compile_config() or {}).get("loss_weights"),
        "optimizer": lambda: keras.saving.serialize_keras_object(model.optimizer),
    }
    found = {f"settings.{name}": value for name, value in settings.items()}
    found["compiled learning_rate"] = compiled_rate
    for name, get_config in parts.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Keras advises against lambdas
                found |= dict(_flat(_plain({name: get_config()})))
        except Exception as error:  # whatever a class of the user's own raises
            found[name] = "cannot be compared"
            if name != "loss_weights":  # which fail together with the loss or the optimizer
                say(
                    f"Whether the {name} is the same cannot be checked on a resume: Keras says {error!r}"
                )
    return found


def _config_of(model):
    """Its class and config, without what it was compiled with, which need not have a config."""
    return {
        "class_name": type(model).__name__,
        "config": keras.saving.serialize_keras_object(model.get_config()),
    }


def _compiled_learning_rate(optimizer):
    """The learning rate that an optimizer was made with: not known once it has trained, as others may have set it."""
    if keras.ops.convert_to_numpy(optimizer.iterations) > 0:
        return _NOT_KNOWN_YET
    try:
        return float(optimizer.learning_rate)
    except (AttributeError, TypeError, ValueError):  # not every optimizer has one
        return None


def _positions(model):
    """What to call the layers and operations of a model, by their names."""
    # A Functional model has operations that are no layers, such as x * 2.
    operations = getattr(model, "operations", [])
    positions = {operation.name: f"operation {index}" for index, operation in enumerate(operations)}
    return positions | {
        layer.name: f"layer {index}" for index, layer in enumerate(_all_layers(model))
    }


def _differences(saved, now, names):
    """How two fingerprints differ in these names: one line of text for each difference."""
    found = []
    for name in names:
        old = saved.get(name, "none")
        new = now.get(name, "none")
        if _NOT_KNOWN_YET in (old, new):
            continue
        if _json(old) != _json(new):  # as nan is not equal to itself
            found.append(f"  {name}: saved {old!r}, now {new!r}")
    return found


def _is_same(saved, now):
    return not _differences(saved, now, {**saved, **now})


def _compare_fingerprints(state, now):
    """Raises ValueError with the first ten differences between the fingerprint of a state and that of this training."""
    saved = state["fingerprint"]
    names = list({**saved, **now})
    if state["format"] == 1:  # which had other names for some
        in_both = [name for name in names if name in saved and name in now]
        names = [name for name in names if name.startswith("settings.") or name in in_both]
    differences = _differences(saved, now, names)
    if differences:
        listed = differences[:10]
        if len(differences) > 10:
            listed.append(f"  and {len(differences) - 10} more")
        raise ValueError("\n".join(["it belongs to another training:", *listed]))


# What else a training consists of -------------------------------------------------------------------------------------
# What other callbacks count, and the variables of the model that a file's arrays belong to.

# What Keras's callbacks count and compare from epoch to epoch. `min_delta` is left alone: Keras changes its sign later.
_COUNTERS = (
    "best",
    "wait",
    "cooldown_counter",
    "best_epoch",
    "stopped_epoch",
    "best_weights",
    "_ema_weights_in_model",
    "_batches_seen_since_last_saving",
    "_last_batch_seen",
)
# And what they are told to do.
_ARGUMENTS = (
    "monitor",
    "patience",
    "factor",
    "min_lr",
    "cooldown",
    "baseline",
    "restore_best_weights",
    "start_from_epoch",
    "swap_on_epoch",
)


def _pair_variables(model, state, datasets, with_optimizer=True):
    """Pairs of a variable of the model and the dataset that holds its value. Raises ValueError where they differ.

    Args:
        with_optimizer: False for a checkpoint of a later phase, which had another optimizer.
    """
    names = state["weights"] or _weight_names(model)
    count = len(model.weights)
    _expect(len(names) == count, "model.weights", f"{len(names)} as saved", count)
    pairs = list(zip(model.weights, names))
    kinds = _state_variables(model)
    if not with_optimizer:
        del kinds["optimizer"]
    is_old = state["format"] == 1
    for kind, variables in kinds.items():
        start = f"{_GROUP}/arrays/{kind}/"
        saved = sum(name.startswith(start) for name in datasets)
        is_same = len(variables) == saved or (is_old and saved == 0)
        _expect(is_same, f"variables ({kind})", f"{saved} as saved", len(variables))
        pairs += zip(variables, [f"{start}{index}" for index in range(saved)])
    for variable, name in pairs:
        if name not in datasets:
            problem = f"{name} is missing"
            if is_old:
                remedy = "restart the kernel, so that layers get the same names"
                problem += f"; it was written by an older version: {remedy}"
            raise ValueError(problem)
        _check_pair(variable, name, datasets[name])
    return [(variable, datasets[name]) for variable, name in pairs]


# Backends count steps and keep seeds in different ones of these: they are taken for one.
_INTEGERS = {"int32", "int64", "uint32"}


def _check_pair(variable, name, dataset):
    """Raises ValueError if a dataset does not hold values of a variable's shape and type."""
    dtype = dataset.dtype.name
    if dtype == "void16":  # HDF5 has no bfloat16, and keeps its bytes
        dtype = "bfloat16"
    wanted_dtype = keras.backend.standardize_dtype(variable.dtype)
    if dtype in _INTEGERS and wanted_dtype in _INTEGERS:
        dtype = wanted_dtype
    wanted = tuple(variable.shape), wanted_dtype
    got = dataset.shape, dtype
    _expect(got == wanted, name, f"shape and type {wanted}", got)


def _below(start, datasets):
    """The datasets whose names begin so, read, by the rest of their names."""
    return {
        name.removeprefix(start): _values(dataset)
        for name, dataset in datasets.items()
        if name.startswith(start)
    }


def _values(dataset):
    """A dataset, read. HDF5 knows no bfloat16, and gives its bytes."""
    values = dataset[()]
    return values.view("bfloat16") if values.dtype.kind == "V" else values


def _assign_saved(model, pairs):
    for variable, dataset in pairs:
        variable.assign(_values(dataset))
    for layer in _all_layers(model):
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()  # it computes with what follows from its variables


def _callback_states(callbacks, say):
    """What callbacks count, as a list of dicts, and the arrays of their `best_weights` by name."""
    states = []
    arrays = {}
    for callback in callbacks:
        state, weights = _callback_state(callback, say)
        if state is None:
            continue
        for place, values in enumerate(weights):
            arrays[f"callbacks/{len(states)}/{place}"] = values
        states.append(state)
    return states, arrays


def _callback_state(callback, say):
    """What one callback counts, as plain data, and its `best_weights`; None for one that counts nothing.

    A callback with `get_state` tells it by that. And whatever a callback has of the attributes by which Keras's own
    callbacks count, is taken.
    """
    name = type(callback).__name__
    arguments = {}
    if type(callback).__module__.startswith("keras."):
        for argument in _ARGUMENTS:
            if hasattr(callback, argument):
                arguments[argument] = getattr(callback, argument)
    state = {"class": name, "arguments": _plain(arguments), "counters": {}}
    if hasattr(callback, "get_state") and hasattr(callback, "set_state"):
        try:
            state["own"] = _plain_or_none(callback.get_state(), f"{name}.get_state()", say)
        except Exception as error:  # it may be something else of that name
            say(f"{name} is not kept for a resume, as its get_state() fails: {error!r}")
    weights = []
    for counter in _COUNTERS:
        try:
            value = getattr(callback, counter)
        except Exception:  # it has none, or a property that has no value yet
            continue
        if counter == "best_weights" and isinstance(value, (list, tuple)):
            weights = value
            value = len(weights)
        state["counters"][counter] = _plain_or_none(value, f"{name}.{counter}", say)
    is_scheduler = isinstance(callback, keras.callbacks.LearningRateScheduler)
    if state["counters"] or "own" in state or is_scheduler:
        return state, weights
    return None, []


def _has_other_keys(value):
    """Whether there is a dict in plain data whose keys are no texts: JSON makes texts of them."""
    if isinstance(value, dict):
        return any(not isinstance(key, str) or _has_other_keys(value[key]) for key in value)
    return isinstance(value, (list, tuple)) and any(map(_has_other_keys, value))


def _plain_or_none(value, name, say):
    if _has_other_keys(value):
        say(f"{name} has a dict with keys that are no texts: after a resume they are. Use texts.")
    try:
        return _plain(value)
    except (TypeError, ValueError):
        kind = type(value).__name__
        say(
            f"{name} is not kept for a resume, as it is no plain data (numbers, texts, lists, dicts), but {kind}"
        )
        return None


def _set_callback_states(callbacks, states, arrays, may_differ=False):
    """Puts back what `_callback_states` took. Raises ValueError if there are other callbacks now than there were.

    Args:
        may_differ: their arguments may be others now, as in a training that had ended and is extended.
    """
    counting = []  # pairs of a callback and its present state
    for callback in callbacks:
        state, _ = _callback_state(callback, lambda text: None)
        if state is not None:
            counting.append((callback, state))
    _check_callbacks(states, [state for _, state in counting], may_differ)
    for index, saved in enumerate(states):
        found = _counterpart(saved, counting)
        if found is None:
            continue
        counting = [entry for entry in counting if entry is not found]
        callback, _ = found
        for name in _COUNTERS:
            if name in saved["counters"]:
                value = saved["counters"][name]
                if name == "best_weights" and isinstance(value, int):
                    places = range(min(value, len(arrays)))
                    value = [arrays[f"callbacks/{index}/{place}"] for place in places]
                vars(callback)[name] = value  # as a property of that name could not be set
        if "own" in saved:
            callback.set_state(saved["own"])


def _check_callbacks(saved, now, may_differ):
    """Raises ValueError if the callbacks that count now are not those that a checkpoint was saved with."""
    if not all("arguments" in state for state in saved):
        return  # an older version did not keep them
    saved = _descriptions(saved, with_arguments=not may_differ)
    now = _descriptions(now, with_arguments=not may_differ)
    if saved != now:
        raise ValueError(f"callbacks: expected those that it was saved with, {saved}, got {now}")


def _descriptions(states, with_arguments):
    """The callbacks of these states in words, sorted. A ModelCheckpoint changes no training, and is left out."""
    found = []
    for state in states:
        if state["class"] == "ModelCheckpoint":
            continue
        told = [f"{name}={value!r}" for name, value in state["arguments"].items()]
        found.append(f"{state['class']}({', '.join(told)})" if with_arguments else state["class"])
    return sorted(found)


def _counterpart(saved, counting):
    """Of pairs of a callback and its state, the one that a saved state belongs to; None where there is none.

    It is of the same class and, where there are several, was told to do the same.
    """
    of_its_class = [entry for entry in counting if entry[1]["class"] == saved["class"]]
    for entry in of_its_class:
        if entry[1]["arguments"] == saved.get("arguments"):
            return entry
    return of_its_class[0] if of_its_class else None


# What is compared of the attributes of other callbacks. (Figures, files and the like change, too, and mean nothing.)
_PLAIN = (type(None), bool, int, float, str, np.generic, list, tuple, set, dict, np.ndarray)
_PLAIN += (collections.deque, random.Random, np.random.Generator, np.random.RandomState)
_WITH_VARIABLES = (keras.layers.Layer, keras.optimizers.Optimizer, keras.metrics.Metric)


def _attributes_that_count(callbacks, model):
    """The attributes of callbacks that do not tell their state, as checksums by the callback's number and their name.

    Of models, layers and the like, the variables that are not those of `model`.
    """
    found = {}
    others = [*model.variables, *model.metrics_variables, *model.optimizer.variables]
    is_of_model = {id(variable) for variable in others}
    for index, callback in enumerate(callbacks):
        is_known = type(callback).__module__.startswith("keras.") or isinstance(callback, _Recorder)
        if is_known or (hasattr(callback, "get_state") and hasattr(callback, "set_state")):
            continue
        for name, value in vars(callback).items():
            if name in ("params", "min_delta", *_COUNTERS):  # Keras changes the sign of min_delta
                continue
            if isinstance(value, (keras.Variable, *_WITH_VARIABLES)):
                variables = [value] if isinstance(value, keras.Variable) else value.variables
                own = [variable for variable in variables if id(variable) not in is_of_model]
                value = [keras.ops.convert_to_numpy(variable) for variable in own]
            if isinstance(value, _PLAIN):
                with contextlib.suppress(Exception):  # what cannot be pickled is no plain data
                    found[index, f"{type(callback).__name__}.{name}"] = _digest(value)
    return found


def _digest(value):
    """A checksum of plain data, without a copy of the arrays in it."""
    arrays = []
    checksum = zlib.crc32(pickle.dumps(value, protocol=5, buffer_callback=arrays.append))
    for array in arrays:
        checksum = zlib.crc32(array.raw(), checksum)
    return checksum


# Whether it can be exact ----------------------------------------------------------------------------------------------
# Checks before training, of the data and the model; and after a resume, of whether it repeats what it should.


def _check_data(model):
    """Warns of training data that may come in another order after a resume, and refuses it where that is certain."""
    passed = _arguments_of("fit", model)
    data = passed.get("x")
    if isinstance(data, keras.utils.PyDataset) and (data.workers > 1 or data.use_multiprocessing):
        warnings.warn(
            "The data set's workers read ahead, before on_epoch_begin. If a callback tells it the epoch, its data comes"
            " in the wrong order, and a resume is not exact. Use workers=1 and use_multiprocessing=False."
        )
    steps = passed.get("steps_per_epoch")
    adapter = getattr(passed.get("epoch_iterator"), "data_adapter", None)
    batches = getattr(adapter, "num_batches", None)  # None where it is not known
    if steps and batches and steps < batches:
        raise ValueError(
            f"steps_per_epoch: {steps} of {batches} batches. Keras goes on with the next batch in the next epoch, but a"
            " resumed training would begin with the first. Leave steps_per_epoch out, or split the data yourself."
        )
    is_endless = steps and not batches
    is_generator = any(hasattr(passed.get(name), "__next__") for name in ("x", "validation_data"))
    if is_generator or is_endless:
        warnings.warn(
            "Where a generator or an endless data set stands is not saved. A resume is exact only if the data's order"
            " follows from the epoch; whether it is, will be checked. A keras.utils.PyDataset can do that."
        )


def _check_that_hdf5_can_hold(model):
    """Whether the model's config can be saved beside its weights. Raises ValueError if not even the weights can.

    Warns if `keras.models.load_model` will not open the file. A resume does not need it to.
    """
    buffer, problem = _try_to_write(model, with_config=True)
    with_config = problem is None
    if with_config:
        problem = _problem_of_loading(model, buffer)
    else:
        _, problem_of_weights = _try_to_write(model, with_config=False)
        if problem_of_weights is not None:
            remedy = "Has it two layers, or two weights in a layer, of one name?"
            start = f"model: HDF5 cannot hold the weights of {model.name!r}."
            raise ValueError(f"{start} {remedy} It says: {problem_of_weights}")
    if problem is not None:
        warnings.warn(
            f"Training can be continued, but keras.models.load_model cannot open the saved files: {problem}\nTo use"
            " them, build and compile the model by the same code, and call restore(model)."
        )
    return with_config


def _try_to_write(model, with_config):
    """The file that a model makes, in memory, and what is wrong with it; None where nothing is."""
    buffer = io.BytesIO()
    try:
        with _FileInMemory(buffer, "w") as file:
            _write_model(file, model, with_config)
            missing = [name for name in _weight_names(model) if name not in file]
    except Exception as error:  # whatever Keras raises
        return buffer, error
    if missing:
        return buffer, f"model.save has left out {missing}"
    return buffer, None


def _problem_of_loading(model, buffer):
    """What Keras raises when it loads a model from the bytes of an HDF5 file; None where it can."""
    kept = _random_state()
    layers = _all_layers(model)
    layers += [layer.layer for layer in layers if isinstance(layer, keras.layers.Wrapper)]
    own = {type(layer).__name__: type(layer) for layer in layers}
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.hdf5")
            path.write_bytes(buffer.getbuffer())
            keras.models.load_model(path, custom_objects=own, compile=False, safe_mode=False)
    except OSError as error:
        warnings.warn(
            f"Could not try out whether keras.models.load_model opens what is saved: {error}"
        )
    except Exception as error:
        return error
    finally:
        _set_random_state(kept)  # loading made a model, whose weights were drawn at random


CHECK = "resume_check.json"
CHECKED_BATCHES = 5

_LIKELY = {
    "state": "something changed it between restore(model) and the first batch: a callback whose counters are not kept"
    " (give it get_state and set_state), or a learning rate that was set by hand",
    "data": "the data comes in another order or is other data (shuffling, a generator, repeat(), another batch size,"
    " steps_per_epoch that does not divide the data), or a layer draws from a seed that is not saved. Use shuffle=False"
    " and a keras.utils.PyDataset that takes its order from the epoch",
    "device": "the device computes without deterministic operations (TensorFlow has"
    " tf.config.experimental.enable_op_determinism()), a callback whose counters are not kept changed something, or"
    " the data comes in another order",
}


class _SelfCheck:
    """What the epoch that runs began with, in a small file, so that a resume finds out whether it repeats that.

    It holds checksums of weights, optimizer and other variables before the first batch, and what was logged after each
    of the first `CHECKED_BATCHES`: running loss and metrics, to the last bit. And the verdict of every resume so far.
    """

    def __init__(self, path):
        self._path = path
        self._running = None  # the epoch that runs
        self.forget()

    def resume(self, epoch, training, awaits_verdict):
        """A training is continued with this epoch, from 0; `training` identifies it."""
        content = self._read()
        self.resumes = content.get("resumes", [])
        is_this = (content.get("epoch"), content.get("training")) == (epoch, training)
        self._interrupted = content if is_this else None
        self._awaits_verdict = awaits_verdict

    def forget(self):
        """A training begins, of which nothing was saved."""
        self.resumes = []
        self._interrupted = None  # the epoch that was interrupted, as the file has it
        self._awaits_verdict = False  # a resume does

    def begin_epoch(self, epoch, training, checksums):
        self._running = {"epoch": epoch, "training": training, "before": checksums, "batches": []}
        if not self._awaits_verdict:
            self._write()

    @property
    def is_complete(self):
        """Whether enough batches of this epoch were kept."""
        return self._running is None or len(self._running["batches"]) == CHECKED_BATCHES

    def end_batch(self, logs):
        """Keeps what was logged after a batch. Returns a verdict, if there is one now."""
        batches = self._running["batches"]
        batches.append(logs)
        to_compare = 0
        if self._interrupted is not None:
            to_compare = len(self._interrupted["batches"])
        verdict = None
        if self._awaits_verdict and len(batches) >= to_compare:
            verdict = self._judge()
        if not self._awaits_verdict:
            self._write()
        return verdict

    def end_epoch(self):
        """Returns a verdict if there is none yet: this epoch has fewer batches than the interrupted one."""
        return self._judge() if self._awaits_verdict else None

    def _judge(self):
        self._awaits_verdict = False
        verdict = {"epoch": self._running["epoch"], "verdict": "not compared", "batches": 0}
        if self._interrupted is not None:
            difference, likely = self._difference()
            verdict["batches"] = len(self._interrupted["batches"])
            if difference:
                verdict |= {"verdict": "different", "difference": difference, "likely": likely}
            elif any(self._interrupted["batches"]):
                verdict["verdict"] = "equal"
        self._interrupted = None
        self.resumes.append(verdict)
        return verdict

    def _difference(self):
        """The first difference between the epoch as it was and as it is, and what it is likely due to."""
        old_checksums = self._interrupted["before"]
        new_checksums = self._running["before"]
        for part, checksum in old_checksums.items():
            if new_checksums.get(part) != checksum:
                return f"the {part} differs before the first batch", _LIKELY["state"]
        new_batches = self._running["batches"]
        for number, old in enumerate(self._interrupted["batches"]):
            if number == len(new_batches):
                return f"it has {number} batches, and had more", _LIKELY["data"]
            new = new_batches[number]
            for name in {**old, **new}:
                if _json(old.get(name)) != _json(new.get(name)):
                    what = f"after batch {number + 1}, {name} is {new.get(name)} and was {old.get(name)}"
                    return what, _LIKELY["device" if number else "data"]
        return None, None

    def read_resumes(self):
        """The verdicts in the file."""
        return self._read().get("resumes", [])

    def _read(self):
        with contextlib.suppress(Exception):  # a damaged file costs the check, not the training
            if self._path.stat().st_size < 2**24:
                content = json.loads(self._path.read_text())
                content["before"] = dict(content["before"])
                content["batches"] = [dict(batch) for batch in content["batches"]]
                content["resumes"] = [dict(resume) for resume in content["resumes"]]
                return content
        return {}

    def _write(self):
        self._running["resumes"] = self.resumes
        # Should that fail, a resume has nothing to compare with, and says so.
        _write_quietly(self._path, json.dumps(self._running).encode())


def _logged_by(model, logs):
    """The numbers that the model itself has logged: loss and metrics, not what other callbacks add."""
    names = ["loss"]
    for metric in model.metrics:  # Keras keeps the compiled ones inside another
        names += [metric.name, *(inner.name for inner in getattr(metric, "metrics", []))]
    own = {}
    for key, value in logs.items():  # with several outputs, their names come first
        if any(key == name or key.endswith(f"_{name}") for name in names):
            own[key] = _number(value)
    # A train_step of one's own may return values under any names.
    return own or {key: _number(value) for key, value in logs.items()}


def _in_words(verdict):
    epoch = verdict["epoch"] + 1
    if verdict["verdict"] == "equal":
        return f"Continuing with epoch {epoch}, exactly as before, as its first {verdict['batches']} batches show."
    if verdict["verdict"] == "different":
        likely = f"Most likely, {verdict['likely']}."
        return (
            f"Epoch {epoch} does not continue exactly as before: {verdict['difference']}. {likely}"
        )
    why = f"none of its batches was trained before, or logged anything, or {CHECK} is not there"
    return f"Continuing with epoch {epoch}, with nothing to compare: {why}."


# The two files, and their copies --------------------------------------------------------------------------------------
# Where they are, which one to continue from, and copies in a second directory, made in the background.

COPY_PATIENCE = 300  # seconds that the end of a training waits for its copies


# What a checkpoint is to the training that `restore` was called for.
_ITS_OWN = "its own"  # continue it
_PHASE_BEFORE = "of the phase before"  # that one is complete: the next one begins
_LATER_PHASE = "of a later phase"  # this phase is complete: nothing is left to train
_NOT_TO_CONTINUE = "not to continue"  # the best model of an earlier phase, or nothing was trained


class _Match(NamedTuple):
    """How a checkpoint belongs to the training that `restore` was called for."""

    relation: str  # one of the four above
    phase: dict | None = None  # where it is of a later phase: the record of this one


class _Checkpoint(NamedTuple):
    """A checkpoint file that was read and found to be whole and of this training."""

    path: Path
    state: dict
    match: _Match


class _Files:
    """The two files of a training in its directory and, where there is one, in the directory `copy_to`."""

    def __init__(self, directory, copy_to):
        # Absolute, as a training may go to another directory (os.chdir).
        self.directory = Path(directory).absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        self.copy_to = Path(copy_to).absolute() if copy_to else None
        if self.copy_to is not None:
            is_another = self.copy_to.resolve() != self.directory.resolve()
            _expect(is_another, "copy_to", "another directory than the first", str(copy_to))
            # Without its parents: where a Drive is not mounted, that is an error.
            self.copy_to.mkdir(exist_ok=True)
        self._thread = None  # the last one that copied, or still does
        self._is_asked_again = False  # whether that one is to copy once more
        self._copy_error = None  # the error of the last copying

    def existing(self):
        """Paths of the files that are there: of two of one name, that in the directory comes before its copy.

        All saved files come before any best one: what they tell of earlier phases is needed to judge those.
        """
        folders = [self.directory]
        if self.copy_to is not None:
            folders.append(self.copy_to)
        paths = [folder / name for name in (SAVED, BEST) for folder in folders]
        # os.path.exists is False, too, where a Drive does not answer.
        return [path for path in paths if os.path.exists(path)]

    def read(self, most_bytes, check):
        """The files that can be used as a list of _Checkpoint, and what is wrong with the others, by path.

        `check(state, datasets)` returns a _Match, or raises ValueError for a file of another training.

        Raises:
            OSError: the disk fails; whether the file is sound is not known, so nothing is done with it.
        """
        usable, problems = [], {}
        for path in self.existing():
            try:
                with _opened(path, most_bytes) as (state, datasets):
                    match = check(state, datasets)
                usable.append(_Checkpoint(path, state, match))
            except ValueError as error:
                problems[path] = error
            except IsADirectoryError:
                problems[path] = "it is a folder"
            except OSError as error:
                remedy = "Nothing was changed; try again"
                if path.parent == self.copy_to:
                    remedy += ", or leave copy_to out"
                text = f"{path} could not be read: {error.strerror}. {remedy}."
                raise OSError(error.errno or errno.EIO, text) from error
            except MemoryError:
                raise
            except Exception as error:  # whatever HDF5 raises is the reason to pass on
                problems[path] = f"it cannot be used: {error!r}"
        return usable, problems

    def mend(self, chosen, usable, problems):
        """Makes both files whole again, as far as can be, before training goes on. Returns what to say about it.

        Args:
            chosen: the checkpoint to continue from. usable, problems: what `read` returned.
        """
        said = []
        saved, best = self.directory / SAVED, self.directory / BEST
        is_missing = not saved.exists()
        if is_missing and chosen.path.parent == self.directory:
            said.append(f"{saved} is missing.")
        for path, problem in problems.items():  # so that none of them is overwritten
            name = f"{path.stem}.unusable-{time.time_ns()}{path.suffix}"
            try:
                aside = path.replace(path.with_name(name))
            except OSError as error:
                if path.parent != self.copy_to:
                    raise
                said.append(f"{path} cannot be used: {problem}\nIt could not be kept: {error}")
                continue
            said.append(f"{path} cannot be used: {problem}\nIt was kept as {aside}.")
        if chosen.path.parent == self.copy_to:
            self.bring_copies_back()
        elif chosen.path.name == BEST:
            self.write(SAVED, chosen.path.read_bytes())
        best_epoch = chosen.state["best_epoch"]
        if best_epoch is not None and not best.exists():
            said.append(self._make_best_again(best_epoch, usable))
        if saved in problems or (is_missing and chosen.path.name == BEST):
            lost = "what was trained after it (if at all) is lost"
            said.append(
                f"Continuing from {chosen.path}, epoch {chosen.state['epoch'] + 1}; {lost}."
            )
        return " ".join(said)

    def _make_best_again(self, best_epoch, usable):
        """Writes a missing best file from whichever file has the weights of that epoch. Returns what to say."""
        best = self.directory / BEST
        for file in usable:
            is_best = file.path.name == BEST and file.state["epoch"] >= best_epoch
            # At the end of a training, the weights may be averages, or those of another epoch.
            is_of_best = file.state["epoch"] == best_epoch and not file.state["finished"]
            if is_best or is_of_best:
                self.write(BEST, file.path.read_bytes())
                return f"{best} was made again from {file.path}."
        return f"{best}, of epoch {best_epoch + 1}, is missing; the next better epoch writes it."

    def write(self, name, data):
        self.directory.mkdir(parents=True, exist_ok=True)  # should somebody have deleted it
        _write(self.directory / name, data)

    def bring_copies_back(self):
        for name in (BEST, SAVED, CHECK):  # in the order in which they are written
            copy = self.copy_to / name
            if copy.exists():
                self.write(name, copy.read_bytes())

    def start_copying(self, once_more=False):
        """Copies the files in a thread. If one is copying still, it leaves that to the next call.

        Args:
            once_more: do not leave it; the thread that is copying then copies once more.
        """
        if self.copy_to is None:
            return
        if self._thread is not None and self._thread.is_alive():
            # One that waits is enough, however many epochs pass meanwhile: it copies what is newest then.
            self._is_asked_again = self._is_asked_again or once_more
            return
        if self._copy_error is not None:
            why = f"Could not copy to {self.copy_to}: {self._copy_error}."
            warnings.warn(f"{why} Training goes on; each epoch tries again.")
        self._copy_in_thread(None)

    def finish_copying(self):
        """Copies what is newest. Raises what goes wrong, TimeoutError if it takes longer than COPY_PATIENCE."""
        if self.copy_to is None:
            return
        self._copy_in_thread(self._thread)
        if self._thread is not None:
            self._thread.join(COPY_PATIENCE)
        if self._thread is not None and self._thread.is_alive():
            raise TimeoutError(f"it did not answer for {COPY_PATIENCE} s")
        if self._copy_error is not None:
            raise self._copy_error

    def _copy_in_thread(self, earlier):
        # A daemon, as the end of the program must not wait for a Drive that never answers.
        thread = threading.Thread(
            target=self._copy, args=(earlier,), name="copy checkpoints", daemon=True
        )
        try:
            thread.start()
            self._thread = thread
        except RuntimeError as error:  # no more threads can be had
            self._copy_error = error

    def _copy(self, earlier):
        if earlier is not None:
            earlier.join()
        self._copy_once()
        while self._is_asked_again:
            self._is_asked_again = False
            self._copy_once()

    def _copy_once(self):
        try:
            # Read in the opposite order of writing: the copy of the best one may be newer than the other, never older.
            paths = [self.directory / name for name in (CHECK, SAVED, BEST)]
            contents = [(path.name, path.read_bytes()) for path in paths if path.exists()]
            for name, data in reversed(contents):
                copy = self.copy_to / name
                if not copy.exists() or not _holds(copy, data):
                    _write(copy, data)
            self._copy_error = None
        except Exception as error:
            self._copy_error = error


# ResumableCheckpoint --------------------------------------------------------------------------------------------------
# When to save, what to go back to, and what to say, in the order of a training's life.


class _InterruptHandler:
    """What happens at Ctrl-C, or Jupyter's Stop, during training: it is said where training will continue.

    Keras calls no callback then. The checkpoint is known by a weak reference, so that its model can be freed.
    """

    def __init__(self, checkpoint):
        self._checkpoint = weakref.ref(checkpoint)

    def __call__(self, number, frame):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        checkpoint = self._checkpoint()
        if checkpoint is not None:
            checkpoint._say_where_it_stopped()
        stop = KeyboardInterrupt()
        # All that IPython shows: nothing is broken.
        stop._render_traceback_ = lambda: ["KeyboardInterrupt"]
        raise stop

    @classmethod
    def install(cls, checkpoint):
        """Takes the place of Python's own handler or of an earlier training's; leaves any other alone."""
        present = signal.getsignal(signal.SIGINT)
        if present is signal.default_int_handler or isinstance(present, _InterruptHandler):
            with contextlib.suppress(ValueError):  # only the main thread may handle signals
                signal.signal(signal.SIGINT, cls(checkpoint))

    @classmethod
    def remove(cls):
        if isinstance(signal.getsignal(signal.SIGINT), cls):
            with contextlib.suppress(ValueError):
                signal.signal(signal.SIGINT, signal.default_int_handler)


class _AtTheEnd(keras.callbacks.Callback):
    """Stands behind all callbacks of a training, for its ResumableCheckpoint.

    When its `on_train_begin` is called, all others have begun and reset themselves; when its `on_epoch_end` is called,
    all others have ended this epoch and none has begun the next. So it does not matter where in the list the
    checkpoint itself stands.
    """

    def __init__(self, checkpoint):
        super().__init__()
        self._checkpoint = checkpoint

    def on_train_begin(self, logs=None):
        self._checkpoint._all_have_begun()

    def on_epoch_begin(self, epoch, logs=None):
        self._checkpoint._all_have_begun_epoch(epoch)

    def on_epoch_end(self, epoch, logs=None):
        self._checkpoint._all_have_ended_epoch(epoch, logs or {})

    def on_train_end(self, logs=None):
        self._checkpoint._all_have_ended()


def _most_bytes(model):
    """How large a checkpoint of a model may be: several numbers for each of its own, and a GiB for all else."""
    return 2**30 + 48 * sum(math.prod(variable.shape) for variable in model.variables)


class ResumableCheckpoint(_Recorder):
    """Saves a training after every epoch so exactly that continuing it equals never having stopped it.

    `saved_model.hdf5` is renewed after every epoch, `best_model.hdf5` when the monitored value improves. Plain Keras
    opens both, by `load_weights` or `load_model`, which returns an uncompiled model: a group of our own holds the
    optimizer, seed states of layers, epoch, history, best value, counters of the other callbacks, the global random
    states of Python, NumPy and PyTorch, and a SHA-256 of the whole file. What `fit` begins with is saved, too, so that
    a training that is stopped in its first epoch begins anew with the same weights.

    Keras keeps no state of its shuffling, so that data comes in the same order again is the caller's part: pass
    `shuffle=False` and a `keras.utils.PyDataset` that derives order and augmentation from a seed and the epoch, which
    a callback tells it in `on_epoch_begin`. Its `workers` must be 1: more read ahead, before the epoch has begun, and
    give it the order of the epoch before (keras#23283).

    Every resume checks itself: what the interrupted epoch began with, and the loss and metrics of its first batches,
    stand in `resume_check.json`; after the same batches it says whether the training continues exactly as before, or
    what differs and what that is likely due to.

    The counters of Keras's own callbacks are kept. A callback of your own is kept if it has `get_state()`, which
    returns plain data, and `set_state(state)`; if it has not, and changes, that is said.

    Several phases (`fit`, `compile` anew, `fit`) share one directory and one history if each begins with `restore`.
    A phase that is complete is passed over: `restore` then returns the number of its epochs, `epochs` of its `fit`.

    Args:
        directory: where the files live, one directory per training; made if missing.
        monitor: the logged value that `best_model.hdf5` goes by.
        callbacks: callbacks whose counters are kept though `fit` does not get them itself (those inside another one).
        settings: a dict of whatever else must be the same on resuming: batch size, seed, number of epochs, data.
        mode: whether the smallest (`"min"`) or the largest (`"max"`) value is the best. `"auto"` goes by the last word
            of a name that everyone knows (loss, error, accuracy, ...) and asks Keras about compiled metrics.
        verbose: 1 says where training continues, 0 nothing; warnings are given in any case.
        copy_to: a second directory (on Google Drive, say) for copies of the files, made in the background and compared
            byte for byte. While it is slow, full or gone, training goes on; its end waits `COPY_PATIENCE` seconds.
            `restore` takes whichever file is further along.

    Attributes:
        best, best_epoch: value and epoch (from 0) of the best epoch so far, or None.
        resumes: a list of dicts, one for each resume: `"epoch"` (from 0), `"verdict"` (`"equal"`, `"different"` or
            `"not compared"`), the number of `"batches"` compared, and, where it is different, the `"difference"` and
            what is `"likely"` its cause.

    Raises:
        ValueError, TypeError: an argument is not as above. When training begins: the model cannot be saved as HDF5, the
            data is certain to come in another order, or another ResumableCheckpoint has this directory. After the first
            batch: `mode="auto"` cannot tell whether a lower or a higher `monitor` is better. After the first epoch:
            `monitor` was not logged.
        FileNotFoundError: the parent of `copy_to` does not exist.
    """

    # The directories whose training (or phase of it) a model has brought to its end in this process.
    _completed = weakref.WeakKeyDictionary()

    def __init__(
        self,
        directory,
        monitor="val_loss",
        callbacks=(),
        settings=None,
        mode="auto",
        verbose=1,
        copy_to="",
    ):
        super().__init__()
        _expect(isinstance(monitor, str), "monitor", "the name of a logged value", monitor)
        _expect(mode in ("auto", "min", "max"), "mode", '"auto", "min" or "max"', mode)
        _expect_path(directory, "directory")
        _expect(verbose in (0, 1), "verbose", "0 or 1", verbose)
        several = isinstance(callbacks, (list, tuple))
        several = several and all(hasattr(callback, "on_epoch_end") for callback in callbacks)
        _expect(several, "callbacks", "a list of Keras callbacks", callbacks, TypeError)
        try:
            self.settings = _plain(dict(settings or {}))
        except (TypeError, ValueError) as error:
            wanted = "a dict of numbers, strings and lists"
            raise TypeError(f"settings: expected {wanted}, got {settings!r}") from error
        self.monitor = monitor
        self.callbacks = list(callbacks)
        self.verbose = verbose
        self.directory = Path(directory)
        self.saved_path = self.directory / SAVED
        self.best_path = self.directory / BEST
        self._files = _Files(directory, copy_to)
        self._check = _SelfCheck(self._files.directory / CHECK)
        # None until Keras can be asked.
        self._mode = _direction(monitor) if mode == "auto" else mode
        self._fingerprint = None  # of the training that runs
        self._optimizer = None  # the one whose compiled learning rate is known
        self._compiled_rate = None
        self._at_the_end = None  # the _AtTheEnd of this training
        self._failure = None  # why the last save failed
        self._best_unwritten = None  # the bytes of a best file that could not be written yet
        self._said = set()
        self._forget()

    def _forget(self):
        """Forgets what an earlier `restore` or `fit` of this callback has left."""
        self.best = None  # value and epoch of the best one so far
        self.best_epoch = None
        self._phases = []  # those that are complete: their fingerprint and where they ended
        self._restored = None  # the model and the optimizer that a file was loaded into
        self._pending = None  # a state and arrays, of which the rest is put back as training begins
        self._next_epoch = None  # the epoch to continue with, were training to stop now
        self._stopped_after = None  # the last epoch of a training that was stopped early
        self._is_passed = False  # this phase is complete, and a later one has begun
        self._is_unfinished = False  # what was restored lacks what callbacks do in on_train_end
        self._is_training = False
        self._weights_at_the_last_epoch = None
        self._ended = None  # the fingerprint and the end of the last training of this callback
        self._record_texts = {}  # the epochs of the record as JSON, as making it takes its time

    def set_model(self, model):
        super().set_model(model)
        optimizer = getattr(model, "optimizer", None)
        # It is new: no callback has set its learning rate yet.
        if optimizer is not None and optimizer is not self._optimizer:
            self._optimizer = optimizer
            self._compiled_rate = _compiled_learning_rate(optimizer)

    @property
    def resumes(self):
        return self._check.resumes

    # Before training: back to where it stopped

    def restore(self, model):
        """Loads the saved state into a built and compiled model; returns the epoch to pass to `fit` as `initial_epoch`.

        That is 0 where nothing is saved yet, and `epochs` of a `fit` that had finished: nothing more is trained.

        Raises:
            ValueError: the model is not compiled or not built; or model, optimizer, loss or settings differ from the
                saved ones (the first ten differences are listed); or no file can be used. No file is changed then.
            OSError: the disk, or the Drive of `copy_to`, does not give a file, or does not take one.
        """
        is_ready = getattr(model, "compiled", False) and model.built
        # Keras calls some models built whose layers still wait for the first batch.
        is_waiting = is_ready and not (model.weights or all(layer.built for layer in model.layers))
        if not is_ready or is_waiting:
            remedy = (
                "compile it and build it (begin it with keras.Input(shape), or call it on a batch)"
            )
            raise ValueError(f"model: {remedy} before restore(model)")
        self.set_model(model)
        if not model.optimizer.built and self._files.existing():
            _build_optimizer(model)
        self._fingerprint = _fingerprint(model, self.settings, self._compiled_rate, self._say_once)
        # The fingerprints of phases that are complete: `_match` adds to them, file by file, and goes by them.
        self._earlier_phases = []
        usable, problems = self._files.read(_most_bytes(model), self._match)
        self._forget()
        self._records.clear()
        self._measured.set_arrays({})
        self._check.forget()
        usable = [file for file in usable if file.match.relation != _NOT_TO_CONTINUE]
        if problems and not usable:
            raise ValueError(self._why_none_can_be_used(problems))
        if not usable:
            self._next_epoch = 0
            return 0

        # The one that is further along; of two that are equally far, the one that is saved after every epoch.
        chosen = max(usable, key=lambda file: (file.state["epoch"], file.path.name == SAVED))
        self._put_back(chosen)
        said = self._files.mend(chosen, usable, problems)
        if said:
            warnings.warn(said, stacklevel=2)
        # Also of a training that had ended: it may be extended.
        awaits_verdict = chosen.match.relation == _ITS_OWN
        self._check.resume(self._next_epoch, self._training(), awaits_verdict)
        if self.verbose:
            self._say_where_it_continues(chosen)
        return self._next_epoch

    @staticmethod
    def _why_none_can_be_used(problems):
        listed = "\n".join(f"{path}: {problem}" for path, problem in problems.items())
        remedy = "To continue, undo the differences; to start anew, use another directory or move these files away."
        return f"There is no state to continue from, and nothing was changed.\n{listed}\n{remedy}"

    def _fingerprint_now(self):
        return self._fingerprint | {"monitor": self.monitor, "mode": self._mode or _NOT_KNOWN_YET}

    def _match(self, state, datasets):
        """How a checkpoint belongs to this training, a _Match. Raises ValueError if it is of another one."""
        now = self._fingerprint_now()
        try:
            _compare_fingerprints(state, now)
            match = _Match(_ITS_OWN)
        except ValueError:
            match = self._match_of_another_phase(state, now)
            if match is None:
                raise
        if match.relation == _NOT_TO_CONTINUE:
            return match
        self._earlier_phases += [phase["fingerprint"] for phase in state["phases"]]
        if match.relation == _PHASE_BEFORE:
            self._earlier_phases.append(state["fingerprint"])
        if match.relation == _ITS_OWN:
            _pair_variables(self.model, state, datasets)
        return match

    def _match_of_another_phase(self, state, now):
        """The _Match of a checkpoint whose fingerprint is another one; None if it is of another training."""
        saved = _json(state["fingerprint"])
        is_earlier = any(saved == _json(phase) for phase in self._earlier_phases)
        # If neither of the two was trained, nothing can be lost.
        is_untrained = state["epoch"] < 0 and int(self.model.optimizer.iterations) == 0
        if is_earlier or is_untrained:
            return _Match(_NOT_TO_CONTINUE)
        if state["finished"] and self._files.directory in self._completed.get(self.model, ()):
            return _Match(_PHASE_BEFORE)
        for phase in reversed(state["phases"]):
            if _is_same(phase["fingerprint"], now):
                return _Match(_LATER_PHASE, phase)
        return None

    def _put_back(self, chosen):
        """Loads a checkpoint into model, optimizer and record. The rest has to wait until training begins."""
        state = chosen.state
        relation, phase = chosen.match
        self._restored = self.model, self.model.optimizer
        with _opened(chosen.path, _most_bytes(self.model)) as (_, datasets):
            self._put_back_what_was_measured(datasets)
            self._records.update((record["epoch"], record["logs"]) for record in state["records"])
            if relation == _PHASE_BEFORE:
                self._begin_phase(state)
                return
            if relation == _LATER_PHASE:
                self._pass_phase(state, phase, datasets)
                return
            _assign_saved(self.model, _pair_variables(self.model, state, datasets))
            kept_by_callbacks = _below(f"{_GROUP}/arrays/callbacks/", datasets)
        arrays = {f"callbacks/{name}": values for name, values in kept_by_callbacks.items()}
        self._pending = state, arrays
        self._is_unfinished = not state["finished"]
        self._next_epoch = state["next_epoch"]
        if state["next_epoch"] > state["epoch"] + 1:
            self._stopped_after = state["epoch"]
        self._phases = state["phases"]
        self.best = state["best"]
        self.best_epoch = state["best_epoch"]
        if state["fingerprint"].get("mode") in ("min", "max"):
            self._mode = state["fingerprint"]["mode"]
        self._compiled_rate = state["fingerprint"].get("compiled learning_rate", _NOT_KNOWN_YET)
        self._fingerprint["compiled learning_rate"] = self._compiled_rate
        if state["finished"]:
            self._completed.setdefault(self.model, set()).add(self._files.directory)
            _set_random_state(state["random"])  # now, as there may be no further training

    def _put_back_what_was_measured(self, datasets):
        try:
            self._measured.set_arrays(_below(f"{_GROUP}/measured/", datasets))
        except (ValueError, KeyError, TypeError) as error:
            self._measured.set_arrays({})
            warnings.warn(
                f"What the plotters have measured could not be read: {error!r}. Training goes on without."
            )

    def _begin_phase(self, state):
        """The saved phase is complete, and was so in this process: the model has its weights, and is compiled anew."""
        ended = {"next_epoch": state["next_epoch"], "epochs": state["epoch"] + 1}
        self._phases = [*state["phases"], {"fingerprint": state["fingerprint"], **ended}]
        self._next_epoch = state["epoch"] + 1
        if state["fingerprint"]["monitor"] == self.monitor:
            self.best = state["best"]
            self.best_epoch = state["best_epoch"]

    def _pass_phase(self, state, phase, datasets):
        """This phase is complete, and what was saved is of a later one."""
        self._is_passed = True
        self._next_epoch = phase["next_epoch"]
        self._forget_from(phase["epochs"])
        # The later phase may have other variables; it loads them itself.
        with contextlib.suppress(ValueError):
            pairs = _pair_variables(self.model, state, datasets, with_optimizer=False)
            _assign_saved(self.model, pairs)

    def _training(self):
        """Identifies this training in the file of the self-check."""
        constant = {**self._fingerprint, "compiled learning_rate": None}
        return hashlib.sha256(_json(constant).encode()).hexdigest()[:16]

    def _say_where_it_continues(self, chosen):
        state = chosen.state
        if chosen.match.relation == _PHASE_BEFORE:
            said = f"Phase {len(self._phases) + 1} begins after epoch {self._next_epoch}"
        elif chosen.match.relation == _LATER_PHASE:
            said = f"This phase is complete after epoch {self._next_epoch}; the weights are those of a later one"
        elif state["epoch"] < 0:
            said = "Beginning again with the same weights, as no epoch was completed"
        else:
            said = "This training is complete" if state["finished"] else "Continuing"
            said += f" after epoch {state['epoch'] + 1}"
        if self._stopped_after is not None:
            said += f" (it was stopped early; to train on, pass initial_epoch={state['epoch'] + 1})"
        if self.best is not None:
            said += f", best {self.monitor} {_in_digits(self.best)} in epoch {self.best_epoch + 1}"
        _print(f"{said} [{self.directory}]")

    def _say_once(self, text):
        if text not in self._said:
            self._said.add(text)
            warnings.warn(text)

    # When training begins

    def on_train_begin(self, logs=None):
        if self._is_training:
            raise ValueError(
                "The last training was interrupted: call checkpoint.restore(model) before fit"
            )
        if self._restored is not None:
            model, optimizer = self._restored
            if model is not self.model:
                raise ValueError(
                    "restore(model) was called with another model than the one that is now being trained"
                )
            if optimizer is not self.model.optimizer:
                raise ValueError(
                    "The model was compiled after restore(model), which undid it: call compile before"
                )
        self._list = _callback_list()
        if self._list is None:
            raise RuntimeError(
                "ResumableCheckpoint works in the callbacks of `fit`, or in a keras.callbacks.CallbackList"
            )
        if self._at_the_end in self._list.callbacks:  # from an earlier training with the same list
            self._list.callbacks.remove(self._at_the_end)
        self._at_the_end = _AtTheEnd(self)
        self._at_the_end.set_model(self.model)
        self._list.callbacks.append(self._at_the_end)

    def _all_have_begun(self):
        """All callbacks have reset themselves, Keras's History among them: now the rest of the state is put back."""
        first_epoch = _arguments_of("fit", self.model).get("initial_epoch", self._next_epoch or 0)
        # A loop of one's own need not say how many epochs there will be.
        self._epochs = (self.params or {}).get("epochs", math.inf)
        self._will_train = first_epoch < self._epochs
        self._failure = None
        self._best_unwritten = None
        has_variables = bool(self.model.trainable_variables)  # else the first batch makes them
        if self._will_train and has_variables and not self.model.optimizer.built:
            _build_optimizer(self.model)
        if self._will_train or self._is_unfinished:
            self._with_config = _check_that_hdf5_can_hold(self.model)
        if self._will_train:
            self._check_first_epoch(first_epoch)
            self._check_directories()
            _check_data(self.model)
            missing = _not_saved(self.model)
            if missing:
                self._say_once(
                    f"Not saved, so that a resume is not exact: {', '.join(missing)}. Only model.optimizer and Keras's"
                    " own variables are (keras.Variable, add_weight)."
                )
            self._begin_fingerprint()
            _InterruptHandler.install(self)
            # Keras tells no callback of a training that fails; the handler must not outlive it.
            _call_when_the_cell_ends(_InterruptHandler.remove)
        is_restored = self._pending is not None
        if self._is_unfinished and not self._will_train:
            self._weights_at_the_last_epoch = _checksum_of_weights(self.model)
        if is_restored:
            if self._will_train:
                self._warn_if_other_weights_are_extended(self._pending[0])
            self._set_the_rest(*self._pending)
            self._pending = None  # from here on, the live objects are ahead of it
        self._restored = None
        self._extend_what_fit_returns()
        if self._will_train:
            self._attributes = _attributes_that_count(self._neighbours(), self.model)
            self._next_epoch = first_epoch
            if not is_restored:
                self._begin_anew(first_epoch)

    def _extend_what_fit_returns(self):
        """Puts the epochs from before into Keras's History."""
        if self._next_epoch and self._records and hasattr(self.model, "history"):
            self.model.history.history = _as_history(self._records)
            self.model.history.epoch = list(self._records)

    def _begin_anew(self, first_epoch):
        """Forgets what this model trained earlier, and saves what it begins with, so that one can go back to that."""
        self._forget_from(first_epoch)
        self._save(first_epoch - 1, first_epoch)

    def _begin_fingerprint(self):
        self._fingerprint = _fingerprint(
            self.model, self.settings, self._compiled_rate, self._say_once
        )
        ended = self._ended
        self._ended = None
        if ended is not None and not _is_same(ended["fingerprint"], self._fingerprint_now()):
            self._phases = [*self._phases, ended]  # without a `restore` between the two

    def _warn_if_other_weights_are_extended(self, state):
        before = state.get("weights_at_the_last_epoch")
        if before is not None and before != _checksum_of_weights(self.model):
            warnings.warn(
                "The training that is extended had ended with averaged weights, or those of its best epoch. It goes on"
                " from these, with the optimizer of its last epoch, which a training in one go had not done."
            )

    def _set_the_rest(self, state, arrays):
        try:
            _set_callback_states(
                self._neighbours(), state["callbacks"], arrays, may_differ=state["finished"]
            )
        except ValueError:
            if self._will_train:
                raise
        _set_random_state(state["random"])

    def _neighbours(self):
        """The other callbacks of this training."""
        own = (
            _AtTheEnd,
            ResumableCheckpoint,
            keras.callbacks.History,
            keras.callbacks.ProgbarLogger,
        )
        listed = [callback for callback in self._list.callbacks if not isinstance(callback, own)]
        return listed + [callback for callback in self.callbacks if callback not in listed]

    def _check_directories(self):
        """Raises ValueError if another ResumableCheckpoint of this training would overwrite the files of this one."""
        for callback in self._list.callbacks:
            if isinstance(callback, ResumableCheckpoint) and callback is not self:
                is_another = callback._files.directory != self._files.directory
                _expect(is_another, "directory", "one for each checkpoint", str(self.directory))

    def _check_first_epoch(self, epoch):
        """Raises ValueError if `fit` begins anywhere but where `restore` said."""
        if self._is_passed:
            raise ValueError(
                f"This phase is complete after epoch {self._next_epoch}, and a later one was begun in {self.directory}."
                " To train it longer, use another directory."
            )
        if self._stopped_after is not None:
            next_epoch = self._stopped_after + 1
            if epoch != next_epoch:
                raise ValueError(
                    f"This training was stopped early, after epoch {next_epoch}. To train on from there, with more"
                    f" epochs or another patience, use fit(..., initial_epoch={next_epoch})."
                )
        elif epoch != self._next_epoch and self._files.existing():
            remedy = "To continue it, use fit(..., initial_epoch=checkpoint.restore(model)); else, another directory."
            raise ValueError(
                f"fit began at epoch {epoch}, but {self.directory} holds a training unlike that. {remedy}"
            )

    # During training

    def _all_have_begun_epoch(self, epoch):
        self._is_training = True
        self._weights_at_the_last_epoch = None  # a checksum, once that is known to be the last one
        self._last_batch = math.inf  # a loop of one's own may tell no batches
        self._stopped_after = None
        self._record_texts = {
            past: text for past, text in self._record_texts.items() if past < epoch
        }
        self._check.begin_epoch(epoch, self._training(), _checksums(self.model))

    def on_train_batch_end(self, batch, logs=None):
        # Not in _AtTheEnd: as the checkpoint itself has this method, Keras calls it for one batch after the other, and
        # not in threads.
        self._last_batch = batch
        if self._mode is None:
            self._ask_keras()
        if self._check.is_complete:
            return
        self._say_verdict(self._check.end_batch(_logged_by(self.model, logs or {})))
        if self._check.is_complete:
            self._files.start_copying(once_more=True)

    def _say_verdict(self, verdict):
        if verdict is None:
            return
        said = _in_words(verdict)
        if verdict["verdict"] == "different":
            warnings.warn(f"{said} Training goes on.")
        elif self.verbose:
            _print(f"{said} [{self.directory}]")

    def _ask_keras(self):
        """Finds out whether a lower or a higher value is better: after the first batch, Keras has built its metrics."""
        self._mode = _direction(self.monitor, self.model)
        if self._mode is None:
            raise ValueError(
                f"monitor: cannot tell whether a lower or a higher {self.monitor!r} is better; neither can Keras."
                ' Pass mode="min" or mode="max" to ResumableCheckpoint.'
            )

    def _all_have_ended_epoch(self, epoch, logs):
        self._say_verdict(self._check.end_epoch())
        self._warn_of_changed_attributes()
        if self._mode is None:  # in a loop of one's own that tells no batches
            self._ask_keras()
        validated = any(name.startswith("val_") for name in logs)
        may_lack_it = self.monitor.startswith("val_") and not validated  # with `validation_freq`
        was_logged = any(self.monitor in logged for logged in self._records.values())
        if self.monitor not in logs and not may_lack_it and not was_logged:
            raise ValueError(f"monitor: {self.monitor!r} was not logged, only {', '.join(logs)}")
        is_stopped = self.model.stop_training and self._epochs < math.inf
        next_epoch = self._epochs if is_stopped else epoch + 1
        self._weights_at_the_last_epoch = None
        if self.model.stop_training or epoch + 1 == self._epochs:
            self._weights_at_the_last_epoch = _checksum_of_weights(self.model)
        steps = (self.params or {}).get("steps")
        if is_stopped and steps and self._last_batch + 1 < steps:
            warnings.warn(
                f"A callback stopped epoch {epoch + 1} after batch {self._last_batch + 1} of {steps}. It counts as an"
                " epoch: to train on begins with the next one, and is not what a training without this stop had been."
            )
        self._save(epoch, next_epoch, value=_number(logs.get(self.monitor)))

    def _warn_of_changed_attributes(self):
        now = _attributes_that_count(self._neighbours(), self.model)
        changed = {
            name
            for (index, name), text in now.items()
            if self._attributes.get((index, name)) != text
        }
        if changed:
            self._say_once(
                f"A resume will not continue {', '.join(sorted(changed))}: give the class get_state(), which returns"
                " plain data, and set_state(state), if training depends on it."
            )

    def _is_best(self, value):
        if not math.isfinite(value):
            return False
        if self.best is None:
            return True
        return value > self.best if self._mode == "max" else value < self.best

    # After training: the last save, and what is left to say

    def _all_have_ended(self):
        """The weights are final now: averages (EMA), or those of the best epoch (EarlyStopping)."""
        _InterruptHandler.remove()
        if self._will_train or (self._is_unfinished and self._epochs == self._next_epoch):
            last_epoch = max(self._records, default=-1)
            is_open = self._epochs == math.inf
            self._save(
                last_epoch,
                last_epoch + 1 if is_open else max(self._epochs, last_epoch + 1),
                finished=True,
            )
            self._say_what_is_missing()
            ended = {"next_epoch": self._next_epoch, "epochs": last_epoch + 1}
            self._ended = {"fingerprint": self._fingerprint_now(), **ended}
            self._completed.setdefault(self.model, set()).add(self._files.directory)
        self._is_training = False
        self._list = None

    def _say_what_is_missing(self):
        if self.best is None:
            warnings.warn(
                f"{self.monitor} was never logged as a finite number, so there is no {self.best_path}"
            )
        elif not (self._files.directory / BEST).exists():
            lost = f"the best {self.monitor} was that of epoch {self.best_epoch + 1}, but {self.best_path}"
            warnings.warn(f"Training ended; {lost} was lost.")
        if self._failure:
            warnings.warn(
                f"Training ended, but nothing after epoch {self._next_epoch} is saved: {self._failure}"
            )
        try:
            self._files.finish_copying()
        except Exception as error:
            warnings.warn(f"Training ended, but its end is not in {self._files.copy_to}: {error!r}")

    def _say_where_it_stopped(self):
        if self._is_training:
            next_one = self._next_epoch + 1
            _print(f"\nStopped. Run again to continue with epoch {next_one}. [{self.directory}]")

    # Saving

    def _save(self, epoch, next_epoch, finished=False, value=math.nan):
        """Saves what is there after `epoch`, in which `value` was monitored. Whatever goes wrong, training goes on."""
        broken = _first_not_finite(self.model)
        if broken is not None:
            why = (
                f"Nothing after epoch {self._next_epoch} is saved, as {broken} is nan or infinite."
            )
            remedy = "after restore, set a lower model.optimizer.learning_rate"
            warnings.warn(f"{why} An exact resume will meet the same again: {remedy}.")
            return
        try:
            self._write_files(epoch, next_epoch, finished, value)
        except Exception as error:  # a full disk, or what h5py or Keras make of it
            if not self._failure:
                what = "the beginning" if epoch < 0 else f"epoch {epoch + 1}"
                why = f"Could not save {what}: {error}."
                warnings.warn(f"{why} Training goes on; each epoch tries again.")
            self._failure = str(error) or repr(error)
            return
        if self._failure:
            _print(f"Saving works again: epoch {epoch + 1} is in {self.saved_path}.")
        self._failure = None
        self._next_epoch = next_epoch
        if finished:
            self._stopped_after = epoch if next_epoch > epoch + 1 else None
        else:  # at the end, it is waited for
            self._files.start_copying()

    def _write_files(self, epoch, next_epoch, finished, value):
        """Writes the best file, if this epoch is the best one so far, and then the saved one."""
        before = self.best, self.best_epoch
        is_best = self._is_best(value)
        if is_best:
            self.best = value
            self.best_epoch = epoch
        try:
            data = self._packed(epoch, next_epoch, finished)
        except BaseException:
            self.best, self.best_epoch = before  # as no file will have this epoch
            raise
        # The best one first: were it second, a stop in between would leave a state that takes it for written.
        if is_best:
            self._best_unwritten = data
        if self._best_unwritten is not None:
            self._files.write(BEST, self._best_unwritten)
            # Only now, so that a failed save of it is made up for later.
            self._best_unwritten = None
        self._files.write(SAVED, data)

    def _record_text(self, epoch):
        """What was logged in an epoch, as JSON; None stands for what is no plain data."""
        logs = {}
        for name, value in self._records[epoch].items():
            logs[name] = _plain_or_none(value, f"logs[{name!r}]", self._say_once)
        return _json({"epoch": epoch, "logs": logs})

    def _packed(self, epoch, next_epoch, finished):
        """The bytes of a checkpoint of this moment."""
        callbacks, kept_by_callbacks = _callback_states(self._neighbours(), self._say_once)
        state = {
            "format": FORMAT,
            "epoch": epoch,
            "next_epoch": next_epoch,
            "finished": finished,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "callbacks": callbacks,
            "random": _random_state(),
            "weights": _weight_names(self.model),
            "fingerprint": self._fingerprint_now(),
            "phases": self._phases,
        }
        if finished:
            state["weights_at_the_last_epoch"] = self._weights_at_the_last_epoch
        # The record is put in as text, behind all else: to make JSON of thousands of epochs anew would take long.
        for past in self._records:
            if past not in self._record_texts:
                self._record_texts[past] = self._record_text(past)
        records = ", ".join(self._record_texts[past] for past in self._records)
        state_json = _json(state).removesuffix("}") + ', "records": [' + records + "]}"
        arrays = [(f"arrays/{name}", values) for name, values in kept_by_callbacks.items()]
        for kind, variables in _state_variables(self.model).items():
            arrays += [
                (f"arrays/{kind}/{index}", variable) for index, variable in enumerate(variables)
            ]
        arrays += [(f"measured/{name}", values) for name, values in self._measured.arrays().items()]
        data = _pack(self.model, self._with_config, state_json, arrays)
        if len(data) > _most_bytes(self.model):
            raise OSError(
                f"{len(data):,} bytes are more than a checkpoint of this model may have; is the record large?"
            )
        return data


# Reading runs back ----------------------------------------------------------------------------------------------------
# What a directory's files tell of a training, without its model: one run, several side by side, one epoch by epoch.


def read_run(directory):
    """Reads what a ResumableCheckpoint has saved of a training: its record, without the model.

    Args:
        directory: that of the ResumableCheckpoint, of a training that has ended or that is going on.

    Returns:
        A dict of plain data: `"directory"`; `"settings"`; `"monitor"` and its `"mode"` ("min" or "max", or, before the
        first batch, "not known yet"); `"best"` and `"best_epoch"` (from 0; None where there is none); `"epochs"`, how
        many were trained; `"finished"`, whether `fit` came to its end; `"history"`, lists of values by metric name,
        and `"epoch"`, the epochs (from 0) that they belong to; `"resumes"`, as `ResumableCheckpoint.resumes` has them;
        `"measured"`: what the plotters have measured, arrays by name and epoch (from 0).

    Raises:
        FileNotFoundError: nothing is saved there. ValueError: what is saved is damaged, or none of ours.
    """
    run, measured = _read_run(directory, with_measured=True)
    return {**run, "measured": measured.epochs}


def _read_run(directory, with_measured=False):
    """The run, and what was measured, a _Measured."""
    directory = Path(directory)
    path = directory / SAVED
    if not path.exists():
        raise FileNotFoundError(
            f"directory: there is no {SAVED} in {directory}; nothing was saved there"
        )
    measured = _Measured()
    try:
        with _opened(path) as (state, datasets):
            if with_measured:
                measured.set_arrays(_below(f"{_GROUP}/measured/", datasets))
    except OSError:
        raise
    except Exception as error:  # whatever HDF5 raises is the reason to pass on
        raise ValueError(f"{path} cannot be used: {error}") from error
    records = {record["epoch"]: record["logs"] for record in state["records"]}
    saved = state["fingerprint"]
    check = _SelfCheck(directory / CHECK)
    history = _with_epochs(records)
    run = {
        "directory": str(directory),
        "settings": {
            key.removeprefix("settings."): saved[key]
            for key in saved
            if key.startswith("settings.")
        },
        "monitor": saved.get("monitor"),
        "mode": saved.get("mode"),
        "best": state["best"],
        "best_epoch": state["best_epoch"],
        "epochs": state["epoch"] + 1,
        "finished": state["finished"],
        "epoch": history.pop("epoch"),
        "history": history,
        "resumes": check.read_resumes(),
    }
    return run, measured


def compare_runs(directories, monitor=None):
    """Several trainings side by side: their validation curves, and a table of the settings in which they differ.

    Args:
        directories: a folder that holds the directories of several ResumableCheckpoints, or a list of such directories.
        monitor: the value to go by; by default that of most of the runs. Runs that monitor another one are left out.

    Returns:
        A Comparison: a notebook shows it as a picture and a table, `print` as text. `runs` are those of `read_run`
        (without what was measured), the best one first; `left_out` says of each other directory why; `figure` is the
        picture.

    Raises:
        FileNotFoundError: there is no such folder. ValueError: no run can be compared.
    """
    runs, left_out = _read_all(_directories_of_runs(directories))
    monitors = [run["monitor"] for run in runs if run["best"] is not None]
    monitor = monitor or max(monitors, key=monitors.count, default=None)
    compared = []
    for run in runs:
        if run["best"] is None:
            why = "no epoch is complete, or the monitored value was no number"
        elif run["monitor"] != monitor:
            why = f"it monitors {run['monitor']}, not {monitor}"
        else:
            compared.append(run)
            continue
        left_out[run["directory"]] = why
    if not compared:
        listed = "".join(f"\n{directory}: {why}" for directory, why in left_out.items())
        raise ValueError(f"directories: there is no run to compare.{listed}")
    compared.sort(key=lambda run: run["best"], reverse=compared[0]["mode"] == "max")
    return Comparison(compared, left_out)


def _read_all(directories):
    """The runs of several directories, and why others cannot be read, by directory."""
    runs, problems = [], {}
    # Checksums of large files take their time, and are computed side by side.
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = [pool.submit(_read_run, directory) for directory in directories]
    for directory, result in zip(directories, results):
        try:
            run, _ = result.result()
            runs.append(run)
        except (OSError, ValueError) as error:
            problems[str(directory)] = str(error)
    return runs, problems


def _directories_of_runs(directories):
    if isinstance(directories, (str, Path)):
        folder = Path(directories)
        if not folder.is_dir():
            raise FileNotFoundError(f"directories: there is no folder {folder}")
        inside = [
            path
            for path in sorted(folder.iterdir())
            if path.is_dir() and not path.name.startswith(".")
        ]
        return [folder] if (folder / SAVED).exists() else inside
    return list(dict.fromkeys(Path(directory) for directory in directories))


# Okabe and Ito's colours, and how lines are dashed when they are used up.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":", "-.")


def _run_name(run):
    """The last part of its directory, also of one that is given as `.`, say."""
    return os.path.basename(os.path.abspath(run["directory"]))


class Comparison:
    """What `compare_runs` returns."""

    def __init__(self, runs, left_out):
        self.runs = runs
        self.left_out = left_out
        self.figure = self._draw()

    def _name(self, run):
        """The last part of the directory, or all of it where several have the same."""
        names = [_run_name(other) for other in self.runs]
        name = _run_name(run)
        return name if names.count(name) == 1 else run["directory"]

    def _table(self):
        """Rows of texts, the first of them the head."""
        names = dict.fromkeys(name for run in self.runs for name in run["settings"])
        missing = "none"
        differing = [
            name
            for name in names
            if len({_json(run["settings"].get(name)) for run in self.runs}) > 1
        ]
        head = [
            "",
            "run",
            *differing,
            f"best {self.runs[0]['monitor']}",
            "in epoch",
            "epochs",
            "finished",
        ]
        rows = [head]
        for number, run in enumerate(self.runs, 1):
            values = [str(run["settings"].get(name, missing)) for name in differing]
            ended = "yes" if run["finished"] else "no"
            best = [_in_digits(run["best"]), str(run["best_epoch"] + 1), str(run["epochs"]), ended]
            rows.append([str(number), self._name(run), *values, *best])
        return rows

    def _draw(self):
        height = max(3.2, 0.2 + 0.18 * len(self.runs))  # so that all stand in the legend
        figure = _new_figure(8.8, height, layout="constrained")
        ax = figure.add_subplot(xlabel="epoch")
        ax.set_ylabel(self.runs[0]["monitor"], parse_math=False)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.3)
        ax.locator_params("x", integer=True)
        for index, run in enumerate(self.runs):
            x, y = _points({**run["history"], "epoch": run["epoch"]}, run["monitor"])
            style = {
                "color": _COLOURS[index % len(_COLOURS)],
                "ls": _DASHES[index // len(_COLOURS) % len(_DASHES)],
            }
            label = f"{index + 1}  {_shortened(self._name(run), 32)}"
            ax.plot(x, y, marker="o", ms=3 if len(x) < 25 else 0, label=label, **style)
            ax.plot(run["best_epoch"] + 1, run["best"], "o", ms=8, mfc="none", mec=style["color"])
        legend = figure.legend(loc="outside right upper", fontsize=8, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
        return figure

    def __str__(self):
        rows = self._table()
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip()
            for row in rows
        ]
        lines += [f"Left out: {directory}: {why}" for directory, why in self.left_out.items()]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self):
        head, *rows = self._table()
        cells = [f"<tr>{''.join(f'<th>{html.escape(text)}</th>' for text in head)}</tr>"]
        cells += [
            f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in row)}</tr>" for row in rows
        ]
        others = "".join(
            f"<li>{html.escape(f'{name}: {why}')}</li>" for name, why in self.left_out.items()
        )
        picture = _data_address(_png(_pixels(self.figure)), "png")
        left_out = f"<p>Left out:</p><ul>{others}</ul>" if others else ""
        return f'<img alt="Validation curves" src="{picture}"><table>{"".join(cells)}</table>{left_out}'


MOST_FRAMES = 100  # epochs in a replay; of more, some are left out evenly


def replay(directory, path=None):
    """A training that can be seen again, epoch by epoch: one page with a slider, which needs no network and no kernel.

    It shows what the plotters had shown: the curves, and for each epoch the confusion matrix and the predictions that
    were recorded. Arrow keys move the slider, the space bar plays and pauses.

    Args:
        directory: that of the ResumableCheckpoint.
        path: where to write the page; by default `replay.html` in the directory.

    Returns:
        A Replay: a notebook shows the page below the cell; `path` is the file; `save("training.gif")` writes an
        animated picture.

    Raises:
        FileNotFoundError, ValueError: as for `read_run`; ValueError, too, where no epoch is recorded.
    """
    return Replay(directory, path)


def _last_until(epochs, epoch):
    """The last of some epochs that is not after `epoch`; None where there is none."""
    return max((past for past in epochs if past <= epoch), default=None)


class Replay:
    """What `replay` returns."""

    def __init__(self, directory, path):
        self._run, self._measured = _read_run(directory, with_measured=True)
        if not self._run["epoch"]:
            raise ValueError(f"directory: no epoch is recorded in {directory}")
        self._graphs, self._facts, self._inside = self._what_curves_show()
        self._page = self._make_page()
        self.path = Path(path or Path(directory) / "replay.html")
        self.path.write_text(self._page, encoding="utf-8")

    def _what_curves_show(self):
        """The panels, what is known of their metrics, and the curves inside of epochs."""
        kept = self._measured.about.get(AccLossPlotter.KIND)
        if kept:
            samples = self._measured.epochs.get(f"{AccLossPlotter.KIND} samples", {})
            return (
                kept["about"]["graphs"],
                kept["notes"],
                _inside_of_epochs(samples, kept["about"]["metrics"]),
            )
        names = list(self._run["history"])
        graphs = [name for name in ("acc", "loss") if _find_metric(name, names)] or names[:2]
        return graphs, _facts(graphs, names, None), {}

    def _curves(self, last):
        """The picture of the curves up to an epoch (from 0)."""
        epochs = self._run["epoch"]
        count = sum(epoch <= last for epoch in epochs)
        history = {name: values[:count] for name, values in self._run["history"].items()}
        history["epoch"] = epochs[:count]
        inside = {}
        for name, (x, y) in self._inside.items():
            inside[name] = x[x <= last + 1], y[x <= last + 1]
        title = f"epoch {last + 1} of {epochs[-1] + 1}"
        return _draw_history(history, self._graphs, None, title, None, self._facts, inside)

    def _pictures(self, epoch):
        """What the other plotters have shown in an epoch, or in the last one before it that was measured, by name."""
        found = {}
        for name, described in self._measured.about.items():
            kind = re.sub(r"_\d+$", "", name)  # a second plotter of a kind is called KIND_2
            if kind == ConfusionMatrixPlotter.KIND:
                found[name] = _pixels(self._matrix(name, described, epoch))
            elif kind == PredictionPlotter.KIND:
                found[name] = _pixels(self._predictions(name, described, epoch))
        return found

    def _matrix(self, name, described, epoch):
        matrices = self._measured.epochs.get(name, {})
        past = _last_until(matrices, epoch)
        matrix = matrices.get(past)  # None where nothing was measured yet
        first = self._first(matrices)
        return _draw_kept_matrix(described["about"], described["notes"], matrix, past, first)

    def _predictions(self, name, described, epoch):
        probabilities = self._measured.epochs.get(f"{name} probabilities", {})
        falls = self._measured.epochs.get(f"{name} falls", {})
        in_both = probabilities.keys() & falls.keys()
        past = _last_until(in_both, epoch)
        return _draw_kept_predictions(
            described["about"],
            described["notes"],
            self._measured.constants[f"{name} images"],
            self._measured.constants[f"{name} labels"],
            probabilities.get(past),
            falls.get(past),
            past,
            self._first(in_both),
        )

    def _first(self, epochs):
        """The first of some epochs, from 1; the last one of the training where there are none."""
        return min(epochs, default=self._run["epoch"][-1]) + 1

    def _frames(self, most):
        """The epochs to show: all, or evenly chosen ones, the last one among them."""
        epochs = self._run["epoch"]
        # From the last one back, so that one alone is the last.
        chosen = np.linspace(len(epochs) - 1, 0, min(most, len(epochs))).round().astype(int)
        return [epochs[index] for index in reversed(chosen)]

    def save(self, path, seconds=10, most_frames=36):
        """Writes an animated picture (GIF) of the training, so many seconds long."""
        _expect(most_frames >= 1, "most_frames", "at least 1", most_frames)
        _expect(seconds > 0, "seconds", "more than 0", seconds)
        pictures = []
        for epoch in self._frames(most_frames):
            both = [_pixels(self._curves(epoch)), *self._pictures(epoch).values()]
            pictures.append(Image.fromarray(_side_by_side(both, _Board.WIDTH)))
        # One palette for all: the last picture has the most colours.
        palette = pictures[-1].quantize(256)
        frames = [
            picture.quantize(256, palette=palette, dither=Image.Dither.NONE) for picture in pictures
        ]
        each = round(1000 * seconds / len(frames))
        times = [each] * (len(frames) - 1) + [max(each, 2000)]
        frames[0].save(
            path, save_all=True, append_images=frames[1:], duration=times, loop=0, optimize=True
        )

    def _make_page(self):
        epochs = self._frames(MOST_FRAMES)
        figure = self._curves(self._run["epoch"][-1])
        figure.texts[0].set_text("")
        curves = _small_picture(_pixels(figure))
        lines = []
        for ax in figure.axes:
            place, (start, end) = ax.get_position(), ax.get_xlim()
            lines.append([place.x0, place.width / (end - start), 1 - place.y1, place.height])
        others = {}
        for epoch in epochs:
            for name, pixels in self._pictures(epoch).items():
                others.setdefault(name, []).append(_small_picture(pixels))
        data = {
            "epochs": [epoch + 1 for epoch in epochs],
            "lines": lines,
            "logged": [self._logged_text(epoch) for epoch in epochs],
            "others": list(others.values()),
        }
        name = html.escape(_run_name(self._run))
        images = "".join(
            f'<img alt="{html.escape(kind)}" src="{frames[-1]}">' for kind, frames in others.items()
        )
        parts = {
            "TITLE": f"Replay of {name}",
            "CURVES": curves,
            "OTHERS": images,
            "DATA": _json(data).replace("<", "\\u003c"),
        }
        # All in one go, as a name may be one of these words.
        return re.sub("|".join(parts), lambda match: parts[match[0]], _PAGE)

    def _logged_text(self, epoch):
        """What was logged in an epoch, as text."""
        index = self._run["epoch"].index(epoch)
        history = self._run["history"]
        values = {name: _number(history[name][index]) for name in _curves_of(self._graphs, history)}
        return _listed({name: value for name, value in values.items() if math.isfinite(value)})

    def __repr__(self):
        return f"Replay of {self._run['directory']}: {self.path}"

    def _repr_html_(self):
        # A frame of its own, so that neither page disturbs the other.
        height = 640 if self._measured.about.keys() - {AccLossPlotter.KIND} else 350
        page = html.escape(self._page, quote=True)
        return f'<iframe srcdoc="{page}" style="width:100%;max-width:920px;height:{height}px;border:0"></iframe>'


def _small_picture(pixels):
    """A picture as an address: in few colours or by lossy compression, whichever takes fewer bytes."""
    image = Image.fromarray(pixels)
    few = image.quantize(32, dither=Image.Dither.NONE)
    if not features.check("webp"):
        buffer = io.BytesIO()
        few.save(buffer, "PNG", optimize=True)
        return _data_address(buffer.getvalue(), "png")
    versions = []
    for version, options in ((few, {"lossless": True}), (image, {"quality": 35})):
        buffer = io.BytesIO()
        version.save(buffer, "WEBP", method=4, **options)
        versions.append(buffer.getvalue())
    return _data_address(min(versions, key=len), "webp")


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>TITLE</title>
<style>
  body { margin: 8px; background: white; color: black; font: 14px sans-serif; max-width: 900px }
  #bar { display: flex; align-items: center; gap: 10px; margin-bottom: 4px }
  #epoch { flex: 1 } #where { min-width: 8em } button { width: 5em; font: inherit }
  img { max-width: 100%; display: block }
  #curves { position: relative; width: fit-content; max-width: 100% }
  #curves div { position: absolute; width: 2px; background: #cc79a7 }
  #others { display: flex; flex-wrap: wrap; align-items: flex-start } #logged { min-height: 1.3em; font-size: 12px }
</style></head><body>
<div id="bar"><button id="play">Play</button><input id="epoch" type="range" min="0" aria-label="epoch">
<span id="where"></span></div>
<div id="logged"></div>
<div id="curves"><img alt="Loss and accuracy by epoch" src="CURVES"></div>
<div id="others">OTHERS</div>
<script>
const data = DATA;
const find = name => document.getElementById(name);
const slider = find("epoch"), images = document.querySelectorAll("#others img");
const lines = data.lines.map(() => find("curves").appendChild(document.createElement("div")));
let timer = null;
slider.max = data.epochs.length - 1;
slider.value = slider.max;
function show() {
  const index = Number(slider.value), epoch = data.epochs[index];
  find("where").textContent = "epoch " + epoch + " of " + data.epochs[data.epochs.length - 1];
  find("logged").textContent = data.logged[index];
  images.forEach((image, number) => { image.src = data.others[number][index]; });
  lines.forEach((line, number) => {
    const [left, step, top, height] = data.lines[number];
    line.style.left = 100 * (left + step * epoch) + "%";
    line.style.top = 100 * top + "%";
    line.style.height = 100 * height + "%";
  });
}
function move(step) {
  slider.value = Number(slider.value) + step;
  show();
}
function pause() {
  clearInterval(timer);
  timer = null;
  find("play").textContent = "Play";
}
function play() {
  if (timer !== null) return pause();
  if (slider.value === slider.max) slider.value = 0;
  show();
  find("play").textContent = "Pause";
  timer = setInterval(() => { move(1); if (slider.value === slider.max) pause(); }, 400);
}
slider.oninput = () => { pause(); show(); };
find("play").onclick = play;
document.onkeydown = event => {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const step = {ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1}[event.key];
  if (step) { pause(); move(step); event.preventDefault(); }
  if (event.key === " " && event.target !== find("play")) { play(); event.preventDefault(); }
};
show();
</script></body></html>
"""
