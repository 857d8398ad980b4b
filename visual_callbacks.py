"""Keras callbacks that show a training as it happens, and save it so that an interruption loses one epoch at most.

Copy this one file beside any Keras 3 notebook or script (TensorFlow, JAX or PyTorch backend). Quick start::

    checkpoint = ResumableCheckpoint("runs/first", callbacks=[early_stopping], settings={"batch_size": 250})
    model.fit(
        x_train,
        y_train,
        batch_size=250,
        epochs=30,
        shuffle=False,
        verbose=0,
        validation_data=(x_val, y_val),
        initial_epoch=checkpoint.restore(model),
        callbacks=[early_stopping, AccLossPlotter(), ConfusionMatrixPlotter(x_val, y_val, classes), checkpoint],
    )

Each callback works alone, and all share one record: the logs of every epoch of a model (`_Recorder`). So a plotter
draws the epochs that `ResumableCheckpoint.restore` has brought back, too. The file goes from the simple to the
composed: numbers and metrics, drawing, showing, recording, the plotters; then the checkpoint file, what must match,
copies, and `ResumableCheckpoint` itself.

A wrong argument is named at once in a ValueError or TypeError. The plotters take the arguments of chasingbob's
keras-visuals. The idea of recording apart from drawing is livelossplot's, that of a backup BackupAndRestore's in Keras.
"""

import contextlib
import hashlib
import inspect
import io
import json
import logging
import math
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
import warnings
import weakref
from pathlib import Path
from typing import NamedTuple

import h5py
import keras
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["AccLossPlotter", "ConfusionMatrixPlotter", "ResumableCheckpoint", "plot_confusion_matrix", "plot_history"]


# Numbers, metrics and arguments ---------------------------------------------------------------------------------------
# A logged value as a number, whether lower or higher is better, and what Keras does not tell its callbacks.

# The last words of the names of which everyone knows what is better; of others, Keras may know (see `_direction`).
_LESS_IS_BETTER = {"loss", "error", "mae", "mse", "rmse", "mape", "msle"}
_MORE_IS_BETTER = {"acc", "accuracy", "auc", "precision", "recall", "f1"}


def _values(variables):
    """Variables of any backend as NumPy arrays."""
    return [np.asarray(keras.ops.convert_to_numpy(variable)) for variable in variables]


def _expect(good, argument, wanted, got, error=ValueError):
    if not good:
        raise error(f"{argument}: expected {wanted}, got {got!r}")


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
    """The arguments of this model's `fit` or `evaluate` that is running now, by name; none where none is.

    Keras tells its callbacks nothing about the data. So they are looked up where Keras has them: among the local
    variables of the method that called us.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == method and frame.f_locals.get("self") is model:
            return dict(frame.f_locals)
        frame = frame.f_back
    return {}


# Drawing --------------------------------------------------------------------------------------------------------------
# Functions from data to a Matplotlib Figure. They leave pyplot alone and can draw again in a figure that they made.

# Okabe and Ito's colours, safe for colour-blind readers.
TRAINING, VALIDATION, MUTED = "#0072B2", "#D55E00", "#595959"
_TOO_LARGE_TO_DRAW = 1e100  # Matplotlib's axes fail where the square of a value overflows


def plot_history(history, graphs=("acc", "loss"), resumed_at=None, title="", figure=None):
    """Draws one panel per graph: the training curve, the validation curve, the best epoch. Returns a Matplotlib Figure.

    The best epoch is marked where it is known what is better: by the metric's name or, for a History, by Keras.

    Args:
        history: what `fit` returned, or a dict of lists by metric name; `"epoch"` may list the epochs, from 0. Of an
            array that was logged (`F1Score()` has one value per class) the mean is drawn.
        graphs: metric names; `"acc"` finds whatever accuracy was logged.
        resumed_at: epoch (from 0) at which a resumed training began; a vertical line marks it.
        title: text above the panels.
        figure: what an earlier call for the same graphs returned, to draw in it again; quicker than a new one.

    Raises:
        TypeError: `history` is neither. ValueError: `graphs` is no list of names.
    """
    model = None
    if isinstance(history, keras.callbacks.History):
        model = history.model
        history = {**history.history, "epoch": getattr(history, "epoch", [])}
    _expect(isinstance(history, dict), "history", "a keras History or a dict of lists", history, TypeError)
    return _draw_history(history, graphs, resumed_at, title, figure, model)


def _draw_history(history, graphs, resumed_at, title, figure, model):
    is_list = not isinstance(graphs, str) and len(graphs) > 0
    named = is_list and all(isinstance(name, str) and name for name in graphs)
    _expect(named, "graphs", 'a list of metric names such as ["acc", "loss"]', graphs)
    if figure is None:
        figure = _empty_panels(len(graphs))
    figure.texts[0].set_text(title)
    for ax, graph in zip(figure.axes, graphs):
        _draw_panel(ax, graph, history, resumed_at, model)
    return figure


def _draw_panel(ax, graph, history, resumed_at, model):
    """Moves the artists of a panel to where they belong, which is quicker than plotting anew."""
    artists = {artist.get_gid(): artist for artist in [*ax.lines, *ax.texts]}
    names = [name for name in history if name != "epoch"]
    name = _find_metric(graph, names)
    curves = {"training": _points(history, name), "validation": _points(history, f"val_{name}")}
    for label, (x, y) in curves.items():
        artists[label].set_data(x, y)
        artists[label].set_markersize(3 if len(y) < 25 else 0)

    artists["best"].set_data([], [])
    best = _best_point(curves, name and _direction(name, model))
    if best is not None:
        x, y = best
        artists["best"].set_data([x], [y])
        artists["best"].set_label(f"best {y:.4g}, epoch {x:.0f}")

    artists["seam"].set_data([], [])
    if resumed_at:
        artists["seam"].set_data([resumed_at + 0.5, resumed_at + 0.5], [0, 1])
        artists["seam"].set_label(f"resumed after epoch {resumed_at}")

    ax.relim()
    ax.set_xlim(0, 1.03 * max(1, ax.dataLim.x1))
    ax.set_ylabel(name or graph, parse_math=False)
    ax.autoscale_view(scalex=False)
    missing = names and not name
    note = f"no {graph!r} was logged, only\n" + ",\n".join(names[:8])
    artists["note"].set_text(note if missing else "")
    for label in ("training", "validation", "best", "seam"):
        is_drawn = len(artists[label].get_xdata()) > 0
        artists[f"sample of {label}"].set_visible(is_drawn)
        artists[f"name of {label}"].set_text(artists[label].get_label() if is_drawn else "")


def _find_metric(graph, names):
    """The name under which a graph's metric was logged; None where it was not."""
    if graph in names:
        return graph
    # Keras 2 logged `acc`; Keras 3 logs `accuracy`, `binary_accuracy` and their kin.
    if graph in ("acc", "accuracy"):
        for name in names:
            if re.fullmatch("acc|(?!val_).*accuracy", str(name)):
                return name
    return None


def _points(history, name):
    """The epochs, from 1, and the values of a metric, without what cannot be drawn: nan, infinite, no number."""
    y = np.array([_number(value) for value in history.get(name, [])], float)
    epochs = history.get("epoch", range(len(y)))
    x = 1.0 + np.asarray(epochs, float)[: len(y)]
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


def _empty_panels(count):
    figure = FigureCanvasAgg(Figure(figsize=(4.8 * count, 4), dpi=100)).figure
    figure.text(0.5, 0.97, "", ha="center", va="top", parse_math=False)
    for index in range(count):
        place = ((index + 0.156) / count, 0.13, 0.812 / count, 0.62)
        _fill_panel(figure.add_axes(place, xlabel="epoch", ymargin=0.06))
    return figure


def _fill_panel(ax):
    """Puts the artists into an empty panel; `_draw_panel` finds them by their group id (gid)."""
    ax.grid(alpha=0.3)
    ax.tick_params(bottom=False, left=False)
    ax.spines[["top", "right"]].set_visible(False)
    ax.locator_params(nbins=5)
    ax.locator_params("x", integer=True)
    ax.plot([], [], color=TRAINING, label="training", gid="training", marker="o", ms=0)
    ax.plot([], [], color=VALIDATION, label="validation", gid="validation", marker="o", ms=0, ls="--")
    ax.plot([], [], "o", color="black", gid="best", ms=8, mfc="none", mew=1.8, zorder=3)
    ax.axvline(0, color=MUTED, gid="seam", lw=1.2, ls=":")
    middle = {"transform": ax.transAxes, "va": "center", "parse_math": False}
    ax.text(0.5, 0.5, "", gid="note", ha="center", color=MUTED, **middle)
    # The key above the curves, two columns of two rows: Matplotlib's Legend would take a third of a redraw's time.
    corners = {"training": (0, 1.16), "validation": (0, 1.08), "best": (0.43, 1.16), "seam": (0.43, 1.08)}
    for line in list(ax.lines):
        x, y = corners[line.get_gid()]
        (sample,) = ax.plot([x, x + 0.035, x + 0.07], [y, y, y])
        sample.update_from(line)
        sample.set(transform=ax.transAxes, clip_on=False, markevery=[1], label="_key")
        sample.set_gid(f"sample of {line.get_gid()}")
        ax.text(x + 0.09, y, "", gid=f"name of {line.get_gid()}", fontsize=9, **middle)


def plot_confusion_matrix(matrix, classes, normalize=False, cmap="Blues", title="Confusion Matrix", ax=None):
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
    count = len(classes)
    _expect(not isinstance(classes, str) and count > 1, "classes", "at least two names", classes)
    _expect(matrix.shape == (count, count) and (matrix >= 0).all(), "matrix", f"{count} x {count} counts", matrix)
    names = [str(name) for name in classes]
    font = max(4, min(10, 420 / count))
    if ax is None:
        ax = _matrix_axes(names, font)
    if not ax.images:
        _fill_matrix(ax, matrix, names, font, normalize, cmap)

    recalls = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    shown = recalls if normalize else matrix
    image = ax.images[0]
    image.set_data(shown)
    image.set_clim(0, 1 if normalize else max(matrix.max(), 1))
    ax.set_title(title, parse_math=False)
    labels = [f"{name} {recall:4.0%}" for name, recall in zip(names, recalls.diagonal())]
    ax.set_yticks(range(count), labels, fontsize=font, parse_math=False)
    colours = image.cmap(image.norm(shown)).reshape(-1, 4)[:, :3]
    brightness = colours @ (0.299, 0.587, 0.114)
    for text, value, bright in zip(ax.texts, shown.flat, brightness):  # no texts in a large matrix
        text.set_text(f"{value:.2f}" if normalize else f"{value:.0f}")
        text.set_color("white" if bright < 0.5 else "black")
    return ax.figure


def _matrix_axes(names, font):
    """Axes in a new figure, with margins for the longest name: they keep their place from one drawing to the next."""
    side = max(2.6, min(0.5 * len(names), 8.2))
    longest = max(len(name) for name in names)
    margin = 0.6 + 0.0088 * font * longest
    width, height = side + margin + 1.3, side + margin + 0.5
    figure = FigureCanvasAgg(Figure(figsize=(width, height), dpi=100)).figure
    return figure.add_axes(((margin + 0.4) / width, margin / height, side / width, side / height))


def _fill_matrix(ax, matrix, names, font, normalize, cmap):
    count = len(names)
    image = ax.imshow(matrix, cmap=cmap)
    inch = ax.figure.dpi / ax.bbox.width
    bar = ax.figure.colorbar(image, cax=ax.inset_axes((1 + 0.1 * inch, 0, 0.12 * inch, 1)))
    bar.set_label("share of the true class" if normalize else "images")
    ax.set(xlabel="predicted class", ylabel="true class, recall")
    ax.set_xticks(range(count), names, rotation=90, fontsize=font, parse_math=False)
    if count > 20:  # four digits do not fit into a cell any more
        return
    for row, column in np.ndindex(count, count):
        ax.text(column, row, "", ha="center", va="center", fontsize=min(10, 170 / count))


# Showing --------------------------------------------------------------------------------------------------------------
# Where a picture appears: in the cell that runs, where there is a kernel, and in a PNG file.


class _Display:
    """One place for one picture, which each new picture takes over.

    Args:
        path: of the PNG file, which is always written where there is no kernel (in a script or a terminal).
        save_graph: write it in a kernel, too.
    """

    def __init__(self, path, save_graph):
        self._path = Path(path)
        self._save_graph = save_graph
        self._handle = None  # IPython's handle on the picture in the cell
        self._cell = None  # the number of that cell

    def show(self, figure):
        buffer = io.BytesIO()
        # A new canvas, as one keeps the size of every text it ever drew; light compression, as more takes longest.
        FigureCanvasAgg(figure).print_png(buffer, pil_kwargs={"compress_level": 1})
        png = buffer.getvalue()
        ipython = sys.modules.get("IPython")
        shell = ipython.get_ipython() if ipython else None
        in_kernel = hasattr(shell, "kernel")  # Jupyter, Colab or a notebook runner
        if in_kernel:
            width, height = (int(pixels) for pixels in figure.bbox.size)
            image = ipython.display.Image(png, width=width, height=height)
            self._show_in_cell(image, ipython, shell.execution_count)
        if self._save_graph or not in_kernel:
            self._write(png)

    def _show_in_cell(self, image, ipython, cell):
        if self._handle is not None and self._cell == cell:
            self._handle.update(image)
            return
        self._handle = ipython.display.display(image, display_id=True)
        self._cell = cell

    def _write(self, png):
        if self._path.exists() and not self._path.is_file():
            return  # a device, say, which is not to be replaced
        partial = self._path.with_name(f"{self._path.stem}.tmp.png")
        with contextlib.suppress(OSError):  # a full disk costs a picture, never the training
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(png)
            partial.replace(self._path)


# Recording ------------------------------------------------------------------------------------------------------------
# The record that all our callbacks share: what was logged in each epoch, also in those before a restart.


class _Recorder(keras.callbacks.Callback):
    """Keeps the epochs of each model for all our callbacks: so plotters know those that `restore` brought back."""

    _of_models = weakref.WeakKeyDictionary()

    @property
    def _records(self):
        """The logs by epoch, from 0, of the model that this callback belongs to."""
        return self._of_models.setdefault(self.model, {})

    def on_epoch_begin(self, epoch, logs=None):
        # A training that begins anew, or further back, forgets what it is going to train again.
        self._of_models[self.model] = {past: kept for past, kept in self._records.items() if past < epoch}

    def on_epoch_end(self, epoch, logs=None):
        # No copy: callbacks later in the list add to it.
        self._records[epoch] = {} if logs is None else logs


def _as_history(records):
    """A record as Keras's History has it: lists of values by name, without the epochs that lack one."""
    names = dict.fromkeys(name for logs in records.values() for name in logs)
    return {name: [logs[name] for logs in records.values() if name in logs] for name in names}


# The plotters ---------------------------------------------------------------------------------------------------------
# When to draw, and what: one picture each. What goes wrong while drawing never ends a training.


class _Plotter(_Recorder):
    """What the plotters share. `figure` is the Matplotlib Figure drawn last; its `savefig` writes it to a file."""

    def __init__(self, path, save_graph):
        super().__init__()
        self.figure = None
        self._display = _Display(path, save_graph)
        self._has_failed = False

    def _draw(self, *situation):
        """Returns the Figure of this situation, as `_redraw` was told of it."""
        raise NotImplementedError

    def _redraw(self, *situation):
        with self._never_ends_training():
            figure = self.figure
            self.figure = None  # should drawing fail, it may be half changed
            self.figure = self._draw(figure, *situation)
            self._display.show(self.figure)

    @contextlib.contextmanager
    def _never_ends_training(self):
        """Whatever goes wrong in this context, a picture is not worth a training. It is said once."""
        try:
            yield
        except Exception as error:
            if not self._has_failed:
                self._has_failed = True
                me = type(self).__name__
                warnings.warn(f"{me} cannot draw: {error!r}. Training goes on; each epoch tries again.")


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
    """Redraws the curves after each epoch, and every two seconds in a long one, with best epoch, seam and time left.

    Args:
        graphs: the panels, by metric name; `"acc"` stands for whatever accuracy is logged.
        save_graph: also keep the picture current in the file `path`. Without a kernel (a plain script) it always is.
        title: text above the panels, before the progress.
        verbose: 1 prints one line per epoch, with the values drawn, 0 nothing.

    Raises:
        ValueError: `graphs` is no list of names, or `verbose` neither 0 nor 1.
    """

    def __init__(self, graphs=("acc", "loss"), save_graph=False, title="", path="training_acc_loss.png", verbose=1):
        super().__init__(path, save_graph)
        _expect(verbose in (0, 1), "verbose", "0 or 1", verbose)
        plot_history({}, graphs)  # which checks them
        self.title = title
        self.verbose = verbose
        self._graphs = list(graphs)
        self._not_drawn = set()  # names of metrics whose values cannot be drawn, once that was said

    def on_train_begin(self, logs=None):
        self._began = time.monotonic()
        self._seconds = []  # that each epoch took
        self._resumed_at = None
        self._redraw("starting")  # the first sign of life: compiling may take a while

    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch, logs)
        if not self._seconds and epoch > 0:
            self._resumed_at = epoch
        self._epoch = epoch
        self._epoch_began = time.monotonic()
        self._epochs = (self.params or {}).get("epochs", epoch + 1)
        self._position = f"{epoch + 1}/{self._epochs}"

    def on_train_batch_end(self, batch, logs=None):
        steps = (self.params or {}).get("steps")
        if steps and time.monotonic() - self._drawn_at >= 2:
            done = (batch + 1) / steps
            # As records count from 0: epoch 0.5 is drawn at 1.5.
            running = {self._epoch + done - 1: logs or {}}
            self._redraw(f"{done:.0%} of epoch {self._position}, {self._left(done)} left", running)

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        self._seconds.append(time.monotonic() - self._epoch_began)
        left = self._left(1)
        self._redraw(f"epoch {self._position}, {left} left")
        with self._never_ends_training():
            values = self._drawn_values(logs or {})
            self._say_what_is_not_drawn(values)
            if self.verbose:
                listed = "  ".join(f"{name} {_number(value):.4f}" for name, value in values.items())
                print(f"epoch {self._position}  {listed}  {_duration(self._seconds[-1])}, {left} left", flush=True)

    def on_train_end(self, logs=None):
        if not self._records:
            self._redraw("nothing was trained")
            return
        progress = f"{max(self._records) + 1} epochs"
        # How long the epochs before a restart took is not known.
        if self._seconds and not self._resumed_at:
            progress += f" in {_duration(time.monotonic() - self._began)}"
        self._redraw(progress)

    def _left(self, done):
        """How long the rest will take, in words, when the share `done` of this epoch is."""
        if self._seconds:
            pace = np.median(self._seconds[-5:])
        else:
            pace = (time.monotonic() - self._epoch_began) / done
        return _duration(pace * (self._epochs - self._epoch - done))

    def _drawn_values(self, logs):
        """What was logged of the metrics that have a panel, by name."""
        names = [_find_metric(graph, logs) for graph in self._graphs]
        drawn = [key for name in names if name for key in (name, f"val_{name}")]
        return {name: logs[name] for name in drawn if name in logs}

    def _say_what_is_not_drawn(self, values):
        for name, value in values.items():
            is_drawn = abs(_number(value)) < _TOO_LARGE_TO_DRAW
            # A loss that is nan or infinite is a training that went wrong, not an odd value in the logs.
            is_nan_or_infinite = isinstance(value, float) and not math.isfinite(value)
            if is_drawn or is_nan_or_infinite or name in self._not_drawn:
                continue
            self._not_drawn.add(name)
            warnings.warn(f"{name} cannot be drawn where it is no number or too large, such as {value!r}.")

    def _draw(self, figure, progress, running=()):
        self._drawn_at = time.monotonic()
        parts = [progress]
        if self.title:
            parts.insert(0, self.title)
        # Not every optimizer has one learning rate.
        with contextlib.suppress(AttributeError, TypeError, ValueError):
            parts.append(f"learning rate {float(self.model.optimizer.learning_rate):.3g}")
        records = self._records | dict(running)
        names = dict.fromkeys(name for logs in records.values() for name in logs)
        history = {name: [logs.get(name) for logs in records.values()] for name in names}
        history["epoch"] = list(records)
        return _draw_history(history, self._graphs, self._resumed_at, " · ".join(parts), figure, self.model)


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
        super().__init__(path, save_graph)
        self._style = (classes, normalize, cmap)
        plot_confusion_matrix(np.zeros((len(classes), len(classes))), *self._style)  # which checks them
        _expect(type(every) is int and every > 0, "every", "a whole number of epochs, at least 1", every)
        self.X_val = X_val
        self.labels = _class_indices(Y_val, len(X_val), len(classes))
        self.title = title
        self.every = every
        self._class_sizes = np.bincount(self.labels, minlength=len(classes))
        # Validation images that were compared with X_val and found to be the same.
        self._same_images = None
        # That a compiled metric held at the end of the last validation pass.
        self._metric_matrix = None
        self._outputs = None  # of the model, as soon as it is built

    def on_train_begin(self, logs=None):
        self._metric_matrix = None
        self._same_images = None
        outputs = getattr(self.model, "output_shape", None) if self.model.built else None
        if isinstance(outputs, tuple) and isinstance(outputs[-1], int):
            self._check_outputs(outputs[-1])
        self._redraw(max(self._records, default=None))  # where a resumed training stands

    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch, logs)
        self._metric_matrix = None  # it was of the epoch before

    def on_test_end(self, logs=None):
        with contextlib.suppress(Exception):  # where it cannot be told, the images are predicted
            self._metric_matrix = self._matrix_held_by_a_metric(logs or {})

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        if (epoch + 1) % self.every == 0:
            self._redraw(epoch)

    def on_train_end(self, logs=None):
        self._metric_matrix = None  # from here on, the model may be changed
        last = max(self._records, default=None)
        if last != self._drawn_epoch:  # `every` left it out
            self._redraw(last)

    def _draw(self, figure, epoch):
        self._drawn_epoch = epoch
        if epoch is None:
            when = "starting"
            matrix = np.zeros((len(self._class_sizes), len(self._class_sizes)))
        else:
            when = f"epoch {epoch + 1}"
            matrix = self.confusion_matrix()
        ax = figure.axes[0] if figure else None
        return plot_confusion_matrix(matrix, *self._style, f"{self.title} · {when}", ax)

    def confusion_matrix(self):
        """Counts of shape (classes, classes), true class by row: of the model as it is now.

        At the end of an epoch it is the matrix of the validation pass, where a compiled metric has counted that.
        """
        if self._metric_matrix is not None and _arguments_of("fit", self.model):
            return self._metric_matrix.copy()
        scores = self.model.predict(self.X_val, batch_size=500, verbose=0)
        if not hasattr(scores, "shape"):
            raise ValueError(f"model: expected one output, got {len(scores)}")
        scores = np.asarray(scores).reshape(len(self.labels), -1)
        self._check_outputs(scores.shape[1])
        if scores.shape[1] == 1:
            predicted = scores[:, 0] > _threshold(self.model, scores)
        else:
            predicted = scores.argmax(axis=1)
        count = len(self._class_sizes)
        pairs = self.labels * count + predicted
        return np.bincount(pairs, minlength=count * count).reshape(count, count)

    def _check_outputs(self, outputs):
        count = len(self._class_sizes)
        if outputs != count and not (count == 2 and outputs == 1):
            raise ValueError(f"classes: {count} names, but the model has {outputs} outputs")
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
            (held,) = _values([metric.total_cm])
            if held.shape == (count, count) and (held.sum(axis=1) == self._class_sizes).all():
                return held
        return None

    def _are_ours(self, images, labels):
        if images is None:
            return False
        if images is not self.X_val and images is not self._same_images:
            arrays = isinstance(images, np.ndarray) and isinstance(self.X_val, np.ndarray)
            if not arrays or not np.array_equal(images, self.X_val):
                return False
            self._same_images = images  # compared once per training, as that takes its time
        try:
            return (_class_indices(labels, len(images), len(self._class_sizes)) == self.labels).all()
        except ValueError:
            return False


# Those of Keras's metrics whose `total_cm` is a confusion matrix of the most probable classes.
_METRICS_WITH_MATRIX = {
    keras.metrics.IoU,
    keras.metrics.MeanIoU,
    keras.metrics.OneHotIoU,
    keras.metrics.OneHotMeanIoU,
}


def _class_indices(labels, size, count):
    """Labels as class numbers of shape (n,), from integers of shape (n,) or (n, 1) or one-hot rows."""
    given = labels
    labels = np.asarray(labels)
    if labels.shape == (size, count) and count > 1:
        is_one_hot = np.isin(labels, (0, 1)).all(axis=1) & (labels.sum(axis=1) == 1)
        wanted = "one label per image: a single 1 in each one-hot row, all else 0"
        _expect(is_one_hot.all(), "Y_val", wanted, labels[~is_one_hot][:1].tolist())
        labels = labels.argmax(axis=1)
    if labels.shape == (size, 1):
        labels = labels[:, 0]
    _expect(labels.shape == (size,), "Y_val", f"shape {(size,)} or, one-hot, {(size, count)}", np.shape(given))
    is_class = size > 0 and np.isin(labels, range(count)).all()
    _expect(is_class, "Y_val", f"whole numbers from 0 to {count - 1}", labels)
    return labels.astype(int)


def _threshold(model, scores):
    """Above which one output means the second class: 0 for logits, 0.5 for probabilities."""
    for loss in keras.tree.flatten(model.loss):
        name = loss if isinstance(loss, str) else type(loss).__name__
        if getattr(loss, "from_logits", False) or "hinge" in name.lower():
            return 0.0
        if isinstance(loss, (str, keras.losses.Loss)):
            return 0.5
    # A function of the user's own, or none: only scores that cannot be probabilities tell.
    return 0.0 if scores.min() < 0 or scores.max() > 1 else 0.5


# The checkpoint file --------------------------------------------------------------------------------------------------
# One HDF5 file that plain Keras opens, with a group of our own for what Keras leaves out:
#
#   model_weights, attributes       what `model.save` writes
#   resumable_checkpoint
#     state                         JSON: epoch, record, best value, counters, random states, fingerprint
#     arrays/optimizer/0 ...        the optimizer's variables
#     arrays/seeds/0 ...            the states of layers that draw at random
#     arrays/callbacks/0/0 ...      the best weights that the first of the callbacks keeps (EarlyStopping)
#     sha256                        a checksum of the whole file, see `_add_checksum`

SAVED, BEST = "saved_model.hdf5", "best_model.hdf5"
_GROUP = "resumable_checkpoint"
_MARK = b"SHA-256 of this file, with zeros for the 64 digits that follow: "
_STATE_KEYS = {"epoch", "next_epoch", "finished", "best", "best_epoch", "counters", "records"}
_STATE_KEYS |= {"random", "fingerprint"}


class _Checkpoint(NamedTuple):
    """A checkpoint file that was read and found to be whole and of this training."""

    path: Path
    state: dict
    arrays: dict  # by their names below `arrays`


def _plain(value):
    """The same as JSON would give it back: tuples as lists, arrays and NumPy numbers as lists and numbers."""
    return json.loads(json.dumps(value, default=lambda item: np.asarray(item).tolist()))


def _all_layers(model):
    """The layers of a model, and those inside its layers."""
    found = []
    for layer in getattr(model, "layers", ()):
        found.append(layer)
        found.extend(_all_layers(layer))
    return found


def _keras_bytes(model, load_again=False):
    """The bytes of the file that `model.save` writes. With `load_again`, raises whatever Keras does on loading it."""
    logger = logging.getLogger("absl")

    def quiet(record):
        return "HDF5" not in record.getMessage()  # which Keras calls a legacy format at each save

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.hdf5")
        logger.addFilter(quiet)
        try:
            # With its optimizer, Keras would strip that from the compile config of the live model.
            model.save(path, include_optimizer=False)
            if load_again:
                own = {type(layer).__name__: type(layer) for layer in _all_layers(model)}
                keras.models.load_model(path, custom_objects=own, compile=False, safe_mode=False)
        finally:
            logger.removeFilter(quiet)
        return path.read_bytes()


def _pack(keras_bytes, state, arrays):
    """The bytes of a checkpoint: Keras's file with our group added."""
    buffer = io.BytesIO(keras_bytes)
    with h5py.File(buffer, "r+") as file:
        text = json.dumps(_plain(state)).encode()
        # An attribute could hold 64 KB at most.
        file[f"{_GROUP}/state"] = np.frombuffer(text, np.uint8)
        for name, values in arrays.items():
            file[f"{_GROUP}/arrays/{name}"] = values
        file[f"{_GROUP}/sha256"] = np.frombuffer(_MARK + b"0" * 64, np.uint8)
    return _add_checksum(buffer.getvalue())


def _add_checksum(data):
    """Writes the SHA-256 of a file into that file: it is taken while zeros stand in its place, after `_MARK`."""
    start = data.index(_MARK) + len(_MARK)
    digest = hashlib.sha256(data).hexdigest().encode()
    return data[:start] + digest + data[start + 64 :]


def _check_checksum(data):
    is_right = False
    if _MARK in data:
        start = data.index(_MARK) + len(_MARK)
        with_zeros = data[:start] + b"0" * 64 + data[start + 64 :]
        digest = hashlib.sha256(with_zeros).hexdigest().encode()
        is_right = data[start : start + 64] == digest
    if not is_right:
        raise ValueError("its checksum is missing or wrong: it is empty, cut short, damaged, or not one of ours")


def _vetted_datasets(file, most_bytes):
    """All datasets of a file by name. Raises ValueError if anything in it leads elsewhere or claims absurd sizes.

    A file from a stranger may hold links to other files, or an array of terabytes that takes no room in the file.
    """
    links = []
    file.visititems_links(lambda name, link: links.append((name, link)))  # visits, but follows none
    datasets = {}
    for name, link in links:
        item = file[name] if isinstance(link, h5py.HardLink) else None
        if isinstance(item, h5py.Group):
            continue
        if not isinstance(item, h5py.Dataset) or item.is_virtual or item.external:
            raise ValueError(f"{name} takes its data from elsewhere, which is not read")
        if item.dtype.hasobject or item.nbytes > most_bytes:
            raise ValueError(f"{name} claims shape {item.shape} of {item.dtype}, more than the file holds")
        datasets[name] = item
    return datasets


def _unpack(path, most_bytes):
    """Reads a checkpoint, from this file alone, once every byte was found to be as written.

    Raises:
        ValueError: it is too large, damaged, hostile, or of a format that this version does not know.
    """
    size = path.stat().st_size
    if size > most_bytes:
        raise ValueError(f"it has {size:,} bytes; a checkpoint of this model has at most {most_bytes:,}")
    data = path.read_bytes()
    _check_checksum(data)
    with h5py.File(io.BytesIO(data), "r") as file:
        datasets = _vetted_datasets(file, len(data))
        state = json.loads(datasets[f"{_GROUP}/state"][()].tobytes())
        start = f"{_GROUP}/arrays/"
        arrays = {name.removeprefix(start): datasets[name][()] for name in datasets if name.startswith(start)}
    if state["format"] != 1 or not _STATE_KEYS <= state.keys():
        raise ValueError(f"its format ({state['format']}) is unknown to this version of visual_callbacks.py")
    return _Checkpoint(path, state, arrays)


def _write(path, data):
    """Puts `data` at `path` so that, whenever the machine stops, either the old or the new file is there, whole."""
    partial = path.with_name(f"{path.stem}.tmp{path.suffix}")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if partial.read_bytes() != data:
            raise OSError(f"{partial} reads back differently from what was written")
        os.replace(partial, path)
        # On Windows and some network drives, folders cannot be flushed.
        with contextlib.suppress(OSError):
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)  # makes the rename last through a power cut
            os.close(folder)
    finally:
        partial.unlink(missing_ok=True)  # after a failure; else it was renamed


# What must match ------------------------------------------------------------------------------------------------------
# The fingerprint of a training: all that must be the same for a resumed training to equal an uninterrupted one.

# Parts of a config that are generated, restored apart (seeds), or that depend on the version or the backend.
_LEFT_OUT = {"name", "seed", "shared_object_id", "build_config", "compile_config", "keras_version", "backend"}
_LEFT_OUT |= {"module", "registered_name"}
# Where the config of a model refers to its layers by name.
_REFERENCES = {"keras_history", "input_layers", "output_layers"}


def _by_position(value, positions, is_reference=False):
    """A model's config with its layers called by their position: generated names differ in a model built again."""
    if isinstance(value, dict):
        return {key: _by_position(item, positions, is_reference or key in _REFERENCES) for key, item in value.items()}
    if isinstance(value, list):
        return [_by_position(item, positions, is_reference) for item in value]
    if is_reference and isinstance(value, str):
        return positions.get(value, value)
    return value


def _flat(value, path=""):
    """Pairs of path and value of plain data, without what is left out and the current learning rate."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            if key not in _LEFT_OUT:
                yield from _flat(item, f"{path}.{key}")
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _flat(item, f"{path}[{index}]")
    elif not (path.endswith(".learning_rate") and isinstance(value, (int, float))):
        yield path.strip("."), value


def _fingerprint(model, callbacks, monitor, settings):
    """The values that must match, each by its path."""
    positions = {layer.name: f"layer {index}" for index, layer in enumerate(_all_layers(model))}
    parts = {
        "callbacks": [type(callback).__name__ for callback in callbacks],
        "model": _by_position(json.loads(model.to_json()), positions),
        "loss": keras.saving.serialize_keras_object(model.loss),
        "optimizer": keras.saving.serialize_keras_object(model.optimizer),
        "monitor": monitor,
    }
    named = {f"settings.{name}": value for name, value in settings.items()}
    return named | dict(_flat(_plain(parts)))


def _compare_fingerprints(saved, now):
    """Raises ValueError with the first ten differences between two fingerprints."""
    differences = []
    for name in {**saved, **now}:
        old, new = saved.get(name, "none"), now.get(name, "none")
        if old != new:
            differences.append(f"  {name}: saved {old!r}, now {new!r}")
    if differences:
        listed = differences[:10]
        if len(differences) > 10:
            listed.append(f"  and {len(differences) - 10} more")
        raise ValueError("\n".join(["it belongs to another training:", *listed]))


# What else a training consists of -------------------------------------------------------------------------------------
# The state outside the model's weights: seeds, counters of other callbacks, global random states. Taken and put back.

torch = sys.modules["torch"] if keras.backend.backend() == "torch" else None
# What Keras's callbacks count and compare from epoch to epoch. `min_delta` is left alone: Keras changes its sign later.
_COUNTERS = ("best", "wait", "cooldown_counter", "best_epoch", "stopped_epoch", "best_weights")


def _seeds(model):
    """The states of the seed generators inside layers: variables that are not weights."""
    weights = {id(variable) for variable in model.weights}
    return [variable for variable in model.variables if id(variable) not in weights]


def _counters(callbacks):
    """The counters of these callbacks as a list of dicts, and the arrays among them by name.

    `best_weights`, a list of arrays, becomes their number in the dict.
    """
    counters, arrays = [], {}
    for index, callback in enumerate(callbacks):
        values = {name: getattr(callback, name) for name in _COUNTERS if hasattr(callback, name)}
        best_weights = values.get("best_weights")
        if best_weights is not None:
            values["best_weights"] = len(best_weights)
            arrays |= {f"callbacks/{index}/{i}": weights for i, weights in enumerate(best_weights)}
        counters.append(values)
    return counters, arrays


def _set_counters(callbacks, counters, arrays):
    """Puts back what `_counters` took."""
    for index, (callback, values) in enumerate(zip(callbacks, counters)):
        values = dict(values)
        count = values.get("best_weights")
        if count is not None:
            values["best_weights"] = [arrays[f"callbacks/{index}/{i}"] for i in range(count)]
        vars(callback).update(values)


def _random_state():
    """The global random states of Python, NumPy and PyTorch as plain data."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(legacy=False), "torch": []}
    if torch:
        states["torch"] = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
    return _plain(states)


def _set_random_state(states):
    """Puts back what `_random_state` took."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(states["numpy"])
    if torch and states.get("torch"):
        cpu, *devices = (torch.tensor(values, dtype=torch.uint8) for values in states["torch"])
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state_all(devices[: torch.cuda.device_count()])


# Whether it can be exact ----------------------------------------------------------------------------------------------
# Checks before and during training: of the data, of the model, of the numbers.


def _warn_of_workers(model):
    """Warns of training data that reads ahead; a warning only, as data that needs no epoch is right all the same."""
    data = _arguments_of("fit", model).get("x")
    if isinstance(data, keras.utils.PyDataset) and (data.workers > 1 or data.use_multiprocessing):
        warnings.warn(
            "The data set's workers read ahead, before on_epoch_begin. If a callback tells it the epoch, its data comes"
            " in the wrong order, and a resume is not exact. Use workers=1 and use_multiprocessing=False."
        )


def _check_that_hdf5_can_hold(model):
    """Raises ValueError if Keras cannot save the model as HDF5 and load it again."""
    kept = _random_state()
    try:
        _keras_bytes(model, load_again=True)
    except OSError as error:
        warnings.warn(f"Could not try out whether this model can be saved: {error}")
    except Exception as error:  # whatever Keras raises is the reason to pass on
        remedy = "Build it as a Sequential or Functional model, from layers only."
        raise ValueError(f"model: HDF5 cannot hold {model.name!r}. {remedy} Keras says: {error}") from error
    finally:
        _set_random_state(kept)  # loading made a model, whose weights were drawn at random


def _first_not_finite(model, loss):
    """What is nan or infinite: "its loss" or the path of a weight; None where nothing is."""
    if not math.isfinite(_number(loss)):
        return "its loss"
    for variable, values in zip(model.weights, _values(model.weights)):
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            return variable.path
    return None


# The two files, and their copies --------------------------------------------------------------------------------------
# Where they are, which one to continue from, and copies of both in a second directory, made in the background.

COPY_PATIENCE = 300  # seconds that the end of a training waits for its copies


class _Files:
    """The two files of a training in its directory and, where there is one, in the directory `copy_to`."""

    def __init__(self, directory, copy_to):
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.copy_to = Path(copy_to) if copy_to else None
        if self.copy_to is not None:
            # Without its parents: where a Drive is not mounted, that is an error.
            self.copy_to.mkdir(exist_ok=True)
        self._thread = None  # the thread
        self._copy_error = None  # the error of the last copying

    def existing(self):
        """Paths of the files that are there: of two of one name, that in the directory comes before its copy."""
        folders = [self.directory]
        if self.copy_to is not None:
            folders.append(self.copy_to)
        paths = [folder / name for name in (SAVED, BEST) for folder in folders]
        return [path for path in paths if path.exists()]

    def read(self, most_bytes, check):
        """The files that can be used as a list of _Checkpoint, and what is wrong with the others, by path.

        `check(checkpoint)` raises ValueError for one of another training.
        """
        usable, problems = [], {}
        for path in self.existing():
            try:
                checkpoint = _unpack(path, most_bytes)
                check(checkpoint)
                usable.append(checkpoint)
            except ValueError as error:
                problems[path] = error
            except Exception as error:  # whatever HDF5 raises is the reason to pass on
                problems[path] = f"it cannot be used: {error!r}"
        return usable, problems

    def set_aside(self, problems, chosen):
        """Renames files that cannot be used, so that none of them is overwritten. Returns what to say about it."""
        said = "" if problems else f"{self.directory / SAVED} is missing. "
        for path, problem in problems.items():
            aside = path.replace(path.with_name(f"{path.stem}.unusable-{time.time_ns()}{path.suffix}"))
            said += f"{path} cannot be used: {problem}\nIt was kept as {aside}. "
        epoch = chosen.state["epoch"] + 1
        return f"{said}Continuing from {chosen.path}, epoch {epoch}; what was trained after it (if at all) is lost."

    def bring_copies_back(self):
        for name in (BEST, SAVED):  # in the order in which a save writes them
            copy = self.copy_to / name
            if copy.exists():
                _write(self.directory / name, copy.read_bytes())

    def start_copying(self):
        """Copies both files in a thread, unless the last copying goes on: then the next call takes what is newest."""
        if self.copy_to is None or (self._thread is not None and self._thread.is_alive()):
            return
        if self._copy_error is not None:
            why = f"Could not copy to {self.copy_to}: {self._copy_error}."
            warnings.warn(f"{why} Training goes on; each epoch tries again.")
        self._copy_in_thread(None)

    def finish_copying(self):
        """Copies what is newest. Raises OSError if that fails or takes longer than COPY_PATIENCE (a TimeoutError)."""
        if self.copy_to is None:
            return
        self._copy_in_thread(self._thread)
        self._thread.join(COPY_PATIENCE)
        if self._thread.is_alive():
            raise TimeoutError(f"it did not answer for {COPY_PATIENCE} s")
        if self._copy_error is not None:
            raise self._copy_error

    def _copy_in_thread(self, earlier):
        # A daemon, as the end of the program must not wait for a Drive that never answers.
        self._thread = threading.Thread(target=self._copy, args=(earlier,), name="copy checkpoints", daemon=True)
        self._thread.start()

    def _copy(self, earlier):
        if earlier is not None:
            earlier.join()
        try:
            # Read in the opposite order of writing: the copy of the best one may be newer than the other, never older.
            paths = [self.directory / name for name in (SAVED, BEST)]
            contents = [(path.name, path.read_bytes()) for path in paths if path.exists()]
            for name, data in reversed(contents):
                copy = self.copy_to / name
                if not copy.exists() or copy.read_bytes() != data:
                    _write(copy, data)
            self._copy_error = None
        except OSError as error:
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

    def install(self):
        """Takes the place of Python's own handler or of an earlier training's; leaves any other alone."""
        present = signal.getsignal(signal.SIGINT)
        if present is signal.default_int_handler or isinstance(present, _InterruptHandler):
            with contextlib.suppress(ValueError):  # only the main thread may handle signals
                signal.signal(signal.SIGINT, self)


class ResumableCheckpoint(_Recorder):
    """Saves a training after every epoch so exactly that continuing it equals never having stopped it.

    `saved_model.hdf5` is renewed after every epoch, `best_model.hdf5` when the monitored value improves. Plain Keras
    opens both, by `load_weights` or `load_model`, which returns an uncompiled model: a group of our own holds the
    optimizer, seed states of layers, epoch, history, best value, counters of `callbacks`, the global random states of
    Python, NumPy and PyTorch, and a SHA-256 of the whole file.

    Keras keeps no state of its shuffling, so that data comes in the same order again is the caller's part: pass
    `shuffle=False` and a `keras.utils.PyDataset` that derives order and augmentation from a seed and the epoch, which
    a callback tells it in `on_epoch_begin`. Its `workers` must be 1: more read ahead, before the epoch has begun, and
    give it the order of the epoch before (keras#23283).

    Args:
        directory: where the two files live, one directory per training; made if missing.
        monitor: the logged value that `best_model.hdf5` goes by.
        callbacks: the other callbacks of this `fit` whose counters are kept (EarlyStopping, ReduceLROnPlateau, ...).
        settings: a dict of whatever else must be the same on resuming: batch size, seed, number of epochs, data.
        mode: whether the smallest (`"min"`) or the largest (`"max"`) value is the best. `"auto"` goes by the last word
            of a name that everyone knows (loss, error, accuracy, ...) and asks Keras about compiled metrics.
        verbose: 1 says where training continues, 0 nothing; warnings are given in any case.
        copy_to: a second directory (on Google Drive, say) for copies of both files, made in the background and compared
            byte for byte. While it is slow, full or gone, training goes on. Of the two `saved_model.hdf5`, `restore`
            takes the one that is further along.

    Raises:
        ValueError, TypeError: an argument is not as above. After the first batch: `mode="auto"` cannot tell whether a
            lower or a higher `monitor` is better. After an epoch: `monitor` was not logged.
        FileNotFoundError: the parent of `copy_to` does not exist.
    """

    def __init__(self, directory, monitor="val_loss", callbacks=(), settings=None, mode="auto", verbose=1, copy_to=""):
        super().__init__()
        _expect(isinstance(monitor, str), "monitor", "the name of a logged value", monitor)
        _expect(mode in ("auto", "min", "max"), "mode", '"auto", "min" or "max"', mode)
        several = isinstance(callbacks, (list, tuple)) and all(hasattr(c, "on_epoch_end") for c in callbacks)
        _expect(several, "callbacks", "a list of Keras callbacks", callbacks, TypeError)
        try:
            self.settings = _plain(dict(settings or {}))
        except (TypeError, ValueError) as error:
            raise TypeError(f"settings: expected a dict of numbers, strings and lists, got {settings!r}") from error
        self.monitor = monitor
        self.callbacks = list(callbacks)
        self.verbose = verbose
        self._files = _Files(directory, copy_to)
        self.directory = self._files.directory
        self.saved_path = self.directory / SAVED
        self.best_path = self.directory / BEST
        self.best = None  # value and epoch of the best one so far
        self.best_epoch = None
        # None until Keras can be asked.
        self._mode = _direction(monitor) if mode == "auto" else mode
        if self._mode is None:
            # As an attribute, so that other trainings have none: for a callback that has this method, Keras waits for
            # every batch.
            self.on_train_batch_end = self._ask_keras
        self._pending = None  # the _Checkpoint whose rest is put back when the first epoch begins
        self._pending_model = None  # the model it was loaded into
        self._next_epoch = None  # the epoch to continue with, were training to stop now
        self._stopped_after = None  # the last epoch of a training that was stopped early
        self._is_training = False
        self._failure = None  # why the last save failed
        self._best_keras_bytes = None  # the bytes of Keras's file of a best epoch, until it is over
        self._best_packed = None  # the bytes of a best file that could not be written yet

    # Before training: back to where it stopped

    def restore(self, model):
        """Loads the saved state into a built and compiled model; returns the epoch to pass to `fit` as `initial_epoch`.

        That is 0 where nothing is saved yet, and the last epoch of a `fit` that had finished: nothing more is trained.

        Raises:
            ValueError: the model is not compiled or not built; or model, optimizer, loss or settings differ from the
                saved ones (the first ten differences are listed); or no file can be used. No file is changed then.
        """
        if not (getattr(model, "compiled", False) and model.built):
            raise ValueError("model: compile it and build it (begin it with keras.Input(shape)) before restore(model)")
        self._pending = None
        self._next_epoch = None
        self._stopped_after = None
        self.best = None
        self.best_epoch = None
        self.set_model(model)
        self._records.clear()
        most_bytes = 2**26 + 12 * sum(values.nbytes for values in _values(model.variables))
        usable, problems = self._files.read(most_bytes, self._check_match)
        if problems and not usable:
            listed = "\n".join(f"{path}: {problem}" for path, problem in problems.items())
            remedy = "To continue, undo the differences; to start anew, use another directory or move these files away."
            raise ValueError(f"There is no state to continue from, and nothing was changed.\n{listed}\n{remedy}")
        if not usable:
            self._next_epoch = 0
            return 0

        # The best one comes second even if it is further: callbacks may have changed the model after it was taken.
        saved = [file for file in usable if file.path.name == SAVED]
        chosen = max(saved or usable, key=lambda file: file.state["epoch"])
        self._put_back(chosen)
        if problems or chosen.path.name == BEST:
            warnings.warn(self._files.set_aside(problems, chosen), stacklevel=2)
        if chosen.path.parent == self._files.copy_to:
            self._files.bring_copies_back()
        if self.verbose:
            self._say_where_it_continues(chosen.state)
        return self._next_epoch

    def _fingerprint_with(self, mode):
        return _fingerprint(self.model, self.callbacks, f"{self.monitor} ({mode})", self.settings)

    def _check_match(self, checkpoint):
        saved = checkpoint.state["fingerprint"]
        # Before Keras can be asked what is better, the file tells how that was decided.
        mode = self._mode or ("max" if saved["monitor"].endswith("(max)") else "min")
        _compare_fingerprints(saved, self._fingerprint_with(mode))

    def _put_back(self, chosen):
        """Loads a checkpoint into model, optimizer and record. The rest has to wait until training begins."""
        model, state = self.model, chosen.state
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        model.load_weights(chosen.path)
        for kind, variables in (("optimizer", model.optimizer.variables), ("seeds", _seeds(model))):
            for index, variable in enumerate(variables):
                variable.assign(chosen.arrays[f"{kind}/{index}"])
        self._records.update((record["epoch"], record["logs"]) for record in state["records"])
        self._pending = chosen
        self._pending_model = model
        self._next_epoch = state["next_epoch"]
        self._stopped_after = self._early_end(state)
        self.best = state["best"]
        self.best_epoch = state["best_epoch"]
        self._mode = "max" if state["fingerprint"]["monitor"].endswith("(max)") else "min"

    def _say_where_it_continues(self, state):
        said = "Continuing"
        if state["finished"]:
            said = "This training is complete"
        said += f" after epoch {state['epoch'] + 1}"
        if self._stopped_after is not None:
            said += f" (it was stopped early; to train on, pass initial_epoch={state['epoch'] + 1})"
        if self.best is not None:
            said += f", best {self.monitor} {self.best:.4f} in epoch {self.best_epoch + 1}"
        print(f"{said} [{self.directory}]", flush=True)

    @staticmethod
    def _early_end(state):
        """The last epoch of a training that was stopped early, else None."""
        stopped = state["finished"] and state["next_epoch"] > state["epoch"] + 1
        return state["epoch"] if stopped else None

    # During training: the epochs

    def on_train_begin(self, logs=None):
        if self._pending is not None and self._pending_model is not self.model:
            raise ValueError("restore(model) was called with another model than the one that is now being trained")
        _warn_of_workers(self.model)
        _check_that_hdf5_can_hold(self.model)
        self._is_training = False
        self._failure = None
        self._best_keras_bytes = None
        self._best_packed = None
        _InterruptHandler(self).install()

    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch, logs)
        # Epoch N is saved when epoch N+1 begins: only then have all callbacks, wherever they stand, finished epoch N.
        if self._is_training:
            self._save()
            return
        self._check_first_epoch(epoch)
        self._is_training = True
        self._next_epoch = epoch
        self._stopped_after = None
        if self._pending is not None:
            # By now every other callback has reset itself in its own on_train_begin, Keras's History among them.
            self._fill_history()
            _set_counters(self.callbacks, self._pending.state["counters"], self._pending.arrays)
            _set_random_state(self._pending.state["random"])
            self._pending = None  # from here on, the live objects are ahead of it
            self._pending_model = None

    def _fill_history(self):
        """Puts the epochs from before into what `fit` returns."""
        self.model.history.history = _as_history(self._records)
        self.model.history.epoch = list(self._records)

    def _check_first_epoch(self, epoch):
        """Raises ValueError if `fit` begins anywhere but where `restore` said."""
        if self._stopped_after is not None:
            next_epoch = self._stopped_after + 1
            if epoch != next_epoch:
                raise ValueError(
                    f"This training was stopped early, after epoch {next_epoch}. To train on from there, with more"
                    f" epochs or another patience, use fit(..., initial_epoch={next_epoch})."
                )
        elif epoch != self._next_epoch and self._files.existing():
            remedy = "To continue it, use fit(..., initial_epoch=checkpoint.restore(model)); else, another directory."
            raise ValueError(f"fit began at epoch {epoch}, but {self.directory} holds a training unlike that. {remedy}")

    def _ask_keras(self, batch, logs=None):
        """Finds out whether a lower or a higher value is better: after the first batch, Keras has built its metrics."""
        if self._mode is None:
            self._mode = _direction(self.monitor, self.model)
        if self._mode is None:
            raise ValueError(
                f"monitor: cannot tell whether a lower or a higher {self.monitor!r} is better; neither can Keras."
                ' Pass mode="min" or mode="max" to ResumableCheckpoint.'
            )

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        logs = logs or {}
        validated = any(name.startswith("val_") for name in logs)
        may_lack_it = self.monitor.startswith("val_") and not validated  # with `validation_freq`
        if self.monitor not in logs and not may_lack_it:
            raise ValueError(f"monitor: {self.monitor!r} was not logged, only {', '.join(logs)}")
        value = _number(logs.get(self.monitor))
        if self._is_best(value):
            self.best = value
            self.best_epoch = epoch
            # Now, as averaged weights (EMA) replace these at the end.
            self._best_keras_bytes = _keras_bytes(self.model)

    def _is_best(self, value):
        if not math.isfinite(value):
            return False
        if self.best is None:
            return True
        return value > self.best if self._mode == "max" else value < self.best

    # After training: the last save, and what is left to say

    def on_train_end(self, logs=None):
        if not self._is_training:  # nothing was left to train
            self._fill_history()
            return
        # What EarlyStopping does in its own on_train_end, which may come after ours.
        for callback in self.callbacks:
            if getattr(callback, "restore_best_weights", False) and callback.best_weights is not None:
                self.model.set_weights(callback.best_weights)
        self._save(epochs_of_fit=self.params["epochs"])
        if self.best is None:
            warnings.warn(f"{self.monitor} was never logged as a finite number, so there is no {self.best_path}")
        if self._failure:
            warnings.warn(f"Training ended, but nothing after epoch {self._next_epoch} is saved: {self._failure}")
        try:
            self._files.finish_copying()
        except OSError as error:  # a timeout is one, too
            warnings.warn(f"Training ended, but its end is not in {self._files.copy_to}: {error!r}")
        self._is_training = False

    def _say_where_it_stopped(self):
        if self._is_training:
            print(f"\nStopped. Run again to continue with epoch {self._next_epoch + 1}. [{self.directory}]", flush=True)

    # Saving

    def _save(self, epochs_of_fit=None):
        """Saves the last epoch. At the end of training, `epochs_of_fit` says where to continue: nothing is left."""
        epoch = max(self._records)
        broken = _first_not_finite(self.model, self._records[epoch].get("loss", 0.0))
        if broken is not None:
            again = "An exact resume will meet the same again: lower the learning rate."
            warnings.warn(f"Nothing after epoch {self._next_epoch} is saved, as {broken} is nan or infinite. {again}")
            return
        state, arrays = self._state(epoch, epochs_of_fit)
        try:
            self._write_files(state, arrays)
        except OSError as error:
            if not self._failure:
                warnings.warn(f"Could not save epoch {epoch + 1}: {error}. Training goes on; each epoch tries again.")
            self._failure = str(error)
            return
        if self._failure:
            print(f"Saving works again: epoch {epoch + 1} is in {self.saved_path}.", flush=True)
        self._failure = None
        self._next_epoch = state["next_epoch"]
        self._stopped_after = self._early_end(state)
        if epochs_of_fit is None:  # at the end, it is waited for
            self._files.start_copying()

    def _state(self, epoch, epochs_of_fit):
        """All that is saved beside Keras's part: plain data, and arrays by name."""
        counters, kept_by_callbacks = _counters(self.callbacks)
        optimizer = _values(self.model.optimizer.variables)
        seeds = _values(_seeds(self.model))
        arrays = {f"optimizer/{index}": values for index, values in enumerate(optimizer)}
        arrays |= {f"seeds/{index}": values for index, values in enumerate(seeds)}
        arrays |= kept_by_callbacks
        state = {
            "epoch": epoch,
            "next_epoch": epochs_of_fit or epoch + 1,
            "finished": epochs_of_fit is not None,
            "format": 1,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "counters": counters,
            "random": _random_state(),
            "records": [{"epoch": past, "logs": logs} for past, logs in self._records.items()],
            "fingerprint": self._fingerprint_with(self._mode),
        }
        return state, arrays

    def _write_files(self, state, arrays):
        # The best one first: were it second, a stop in between would leave a state that takes it for written.
        if self._best_keras_bytes is not None:
            self._best_packed = _pack(self._best_keras_bytes, state, arrays)
            self._best_keras_bytes = None
        if self._best_packed is not None:
            _write(self.best_path, self._best_packed)
            self._best_packed = None  # only now, so that a failed save of it is made up for later
        _write(self.saved_path, _pack(_keras_bytes(self.model), state, arrays))
