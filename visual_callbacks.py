"""Keras callbacks that show a training as it happens and make sure that it is never lost.

Copy this one file beside any Keras 3 notebook or script (TensorFlow, JAX or PyTorch backend)::

    checkpoint = ResumableCheckpoint("runs/first", settings={"batch_size": 250})
    model.fit(x_train, y_train, batch_size=250, epochs=30, verbose=0, shuffle=False,
              validation_data=(x_val, y_val), initial_epoch=checkpoint.restore(model),
              callbacks=[AccLossPlotter(), ConfusionMatrixPlotter(x_val, y_val, classes), checkpoint])

In a Jupyter or Colab kernel each plotter owns one picture, replaced in place; in a script the pictures are files.
Names, argument order and defaults of the plotters are those of chasingbob/keras-visuals; recording apart from drawing
is an idea of livelossplot, a backup that `fit` continues from one of Keras's BackupAndRestore.
"""

import contextlib
import hashlib
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

import h5py
import keras
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = ["AccLossPlotter", "ConfusionMatrixPlotter", "ResumableCheckpoint", "plot_confusion_matrix", "plot_history"]

TRAINING, VALIDATION, MUTED = "#0072B2", "#D55E00", "#595959"  # Okabe and Ito's colours, safe for colour-blind readers
_RECORDS = weakref.WeakKeyDictionary()


def _records(model):
    """The epochs `model` was trained for: a list of `{"epoch": 0-based, "logs": dict}`, shared by our callbacks.

    This is how a plotter knows of the epochs that `restore` brought back, without being told about the checkpoint.
    """
    return _RECORDS.setdefault(model, [])


class _Recorder(keras.callbacks.Callback):
    """Keeps the records of the model being trained, however many callbacks of this module share them."""

    def on_epoch_begin(self, epoch, logs=None):
        records = _records(self.model)
        records[:] = [record for record in records if record["epoch"] < epoch]

    def on_epoch_end(self, epoch, logs=None):
        records = _records(self.model)
        if not records or records[-1]["epoch"] != epoch:
            # The dict itself, not a copy: callbacks later in the list add to it (the learning rate, say).
            records.append({"epoch": epoch, "logs": {} if logs is None else logs})


def _number(value):
    return float(np.mean(value)) if value is not None and np.size(value) else math.nan


def _higher_is_better(name):
    words = ("acc", "auc", "precision", "recall", "f1", "fbeta", "iou", "r2", "similarity", "true_")
    return any(word in name for word in words)


def _columns(records):
    """Records as `{"epoch": [...], name: [...]}`, with NaN where an epoch did not log a name."""
    names = {name: None for record in records for name in record["logs"]}
    columns = {name: [_number(record["logs"].get(name)) for record in records] for name in names}
    return {**columns, "epoch": [record["epoch"] for record in records]}


def plot_history(history, graphs=("acc", "loss"), resumed_at=None, title=""):
    """Draws one panel a graph: the training curve, the validation curve, the best epoch. Returns a Matplotlib Figure.

    Args:
        history: what `fit` returned, or a dict of lists by metric name, with the epochs (from 0) under `"epoch"` unless
            they begin with the first. NaN is a gap.
        graphs: metric names; `"acc"` finds whatever accuracy was logged.
        resumed_at: epoch (from 0) at which a resumed training began; a vertical line marks it.
        title: text above the panels.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
    """
    if isinstance(history, keras.callbacks.History):
        history = {**history.history, "epoch": history.epoch}
    if not isinstance(history, dict):
        raise TypeError(f"history: expected a keras History or a dict of lists, got {type(history).__name__}")
    picture = _HistoryPicture(graphs)
    picture.draw(history, resumed_at, title)
    return picture.figure


class _HistoryPicture:
    """The figure of `plot_history`. Its artists are made once and then moved, which is cheaper than plotting anew."""

    def __init__(self, graphs):
        if isinstance(graphs, str) or not graphs or not all(isinstance(name, str) and name for name in graphs):
            raise ValueError(f'graphs: expected a list of metric names such as ["acc", "loss"], got {graphs!r}')
        width, self.panels = 4.8 * len(graphs), []
        self.figure = Figure(figsize=(width, 4), dpi=100)
        FigureCanvasAgg(self.figure)
        self.title = self.figure.text(0.5, 0.97, "", ha="center", va="top")
        for index, graph in enumerate(graphs):
            ax = self.figure.add_axes(((4.8 * index + 0.75) / width, 0.13, 3.9 / width, 0.62))
            ax.grid(alpha=0.3)
            ax.spines[["top", "right"]].set_visible(False)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
            ax.set_xlabel("epoch")
            (training,) = ax.plot([], [], color=TRAINING, label="training", ms=3)
            (validation,) = ax.plot([], [], color=VALIDATION, label="validation", ms=3, ls="--")
            (best,) = ax.plot([], [], "o", color="black", ms=8, mfc="none", mew=1.8, zorder=3)
            seam = ax.axvline(np.nan, color=MUTED, lw=1.2, ls=":")
            note = ax.text(0.5, 0.5, "", transform=ax.transAxes, ha="center", va="center", color=MUTED)
            self.panels.append((graph, ax, training, validation, best, seam, note))

    def draw(self, history, resumed_at=None, title="", running=(0, {})):
        """Moves every artist to `history`; `running` holds the epochs done, as a fraction, and the logs so far."""
        self.title.set_text(title)
        names = [name for name in {**history, **running[1]} if name != "epoch"]
        for graph, ax, training, validation, best, seam, note in self.panels:
            name, lines = _metric_name(graph, names), []
            for line, key in ((training, name), (validation, f"val_{name}")):
                y = np.asarray(history.get(key, []), float)
                x = 1.0 + np.asarray(history.get("epoch", range(len(y))), float)[: len(y)]
                x, y = x[np.isfinite(y)], y[np.isfinite(y)]
                if len(y):
                    scored, scored_x, scored_y = key, x, y
                    lines.append(line)
                if line is training and name in running[1]:
                    x, y = np.append(x, running[0]), np.append(y, _number(running[1][name]))
                line.set(data=(x, y), marker="o" if len(y) < 25 else "")
            best.set_data([], [])
            if lines:
                index = scored_y.argmax() if _higher_is_better(scored) else scored_y.argmin()
                best.set(data=([scored_x[index]], [scored_y[index]]))
                best.set_label(f"best {scored_y[index]:.4g}, epoch {scored_x[index]:.0f}")
                lines.append(best)
            seam.set_xdata([math.nan if resumed_at is None else resumed_at + 0.5] * 2)
            if resumed_at is not None:
                seam.set_label(f"resumed after epoch {resumed_at}")
                lines.append(seam)
            missing = bool(names) and name is None
            note.set_text(f"no {graph!r} was logged, only\n" + ",\n".join(names[:8]) if missing else "")
            ax.set_ylabel(name or graph)
            ax.legend(handles=lines, loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=2, frameon=False, fontsize=9)
            x, y = np.concatenate([line.get_data() for line in (training, validation)], axis=1)
            ax.set_xlim(0, 1.03 * x.max(initial=1))
            if np.isfinite(y).any():
                low, high = np.nanmin(y), np.nanmax(y)
                margin = 0.06 * ((high - low) or abs(low) or 1)
                ax.set_ylim(low - margin, high + margin)


def _metric_name(graph, names):
    """The logged name that `graph` stands for, or None: Keras 2 logged `acc`, Keras 3 logs `accuracy` and its kin."""
    if graph in ("acc", "accuracy") and graph not in names:
        return next((n for n in names if not n.startswith("val_") and (n == "acc" or n.endswith("accuracy"))), None)
    return graph if graph in names else None


def plot_confusion_matrix(matrix, classes, normalize=False, cmap="Blues", title="Confusion Matrix", ax=None):
    """Draws a confusion matrix, with each class's recall beside its name. Returns the Matplotlib Figure drawn in.

    Args:
        matrix: counts of shape (classes, classes); `matrix[i, j]` counts the images of class i that were called j.
        classes: the names, in the order of the matrix.
        normalize: show shares of the true class (the row) instead of counts.
        cmap: name of a colormap, or a colormap.
        title: text above the matrix.
        ax: a Matplotlib axes to draw in, instead of a new figure.

    Raises:
        ValueError: an argument is wrong; the message names it.
    """
    picture = _MatrixPicture(classes, normalize, cmap, ax)
    picture.draw(matrix, title)
    return picture.figure


class _MatrixPicture:
    """The figure of `plot_confusion_matrix`, whose artists are made once and then changed."""

    def __init__(self, classes, normalize, cmap, ax=None):
        if isinstance(classes, str) or len(classes) < 2:
            raise ValueError(f"classes: expected at least two names, got {classes!r}")
        if not callable(cmap) and cmap not in matplotlib.colormaps:
            raise ValueError(f"cmap: expected a colormap or the name of one, got {cmap!r}")
        self.classes, self.normalize = [str(name) for name in classes], bool(normalize)
        self.cmap = cmap if callable(cmap) else matplotlib.colormaps[cmap]
        count = len(self.classes)
        font = max(4, min(10, 420 / count))
        if ax is None:
            # Margins that hold the longest name, so that the axes keep their place from one drawing to the next.
            side, margin = max(2.6, min(0.5 * count, 8.2)), 0.6 + 0.0088 * font * max(map(len, self.classes))
            width, height = side + margin + 1.3, side + margin + 0.5
            figure = Figure(figsize=(width, height), dpi=100)
            FigureCanvasAgg(figure)
            ax = figure.add_axes(((margin + 0.4) / width, margin / height, side / width, side / height))
            bar = figure.add_axes(((margin + side + 0.5) / width, margin / height, 0.12 / width, side / height))
        else:
            bar = ax.inset_axes((1.02, 0, 0.04, 1))
        self.ax, self.figure = ax, ax.figure
        self.image = ax.imshow(np.zeros((count, count)), cmap=self.cmap)
        self.figure.colorbar(self.image, cax=bar).set_label("share of the true class" if normalize else "images")
        ax.set(xlabel="predicted class", ylabel="true class, recall", xticks=range(count), yticks=range(count))
        ax.set_xticklabels(self.classes, rotation=90, fontsize=font)
        # Numbers only while four digits fit into a cell.
        cells = np.ndindex(count, count) if count <= 20 else ()
        style = {"ha": "center", "va": "center", "fontsize": min(10, 170 / count)}
        self.texts = {(i, j): ax.text(j, i, "", **style) for i, j in cells}

    def draw(self, matrix, title):
        matrix, count = np.asarray(matrix, float), len(self.classes)
        if matrix.shape != (count, count) or (matrix < 0).any():
            raise ValueError(f"matrix: expected counts of shape {(count, count)}, got an array of shape {matrix.shape}")
        shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        shown = shares if self.normalize else matrix
        self.image.set(data=shown, clim=(0, 1 if self.normalize else max(matrix.max(), 1)))
        recalls = [f"{name} {share:4.0%}" for name, share in zip(self.classes, shares.diagonal())]
        self.ax.set_yticklabels(recalls, fontsize=self.ax.get_xticklabels()[0].get_fontsize())
        self.ax.set_title(title)
        for cell, text in self.texts.items():
            red, green, blue, _ = self.cmap(self.image.norm(shown[cell]))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            text.set(text=f"{shown[cell]:.2f}" if self.normalize else f"{shown[cell]:.0f}", color="w" if dark else "k")


class _Screen:
    """Where one plotter shows its one picture: a display of its own in a kernel, else (or also) a PNG file."""

    def __init__(self, path, save):
        self.path, self.save, self.handle, self.cell = Path(path), save, None, None

    def show(self, figure):
        buffer = io.BytesIO()
        # Light compression: most of a redraw's time would otherwise go into making the file a little smaller.
        figure.canvas.print_png(buffer, pil_kwargs={"compress_level": 1})
        shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
        in_kernel = hasattr(
            shell, "kernel"
        )  # Jupyter, Colab or a notebook runner, as opposed to a script or a terminal
        if in_kernel:
            from IPython.display import Image, display

            width, height = figure.canvas.get_width_height()
            image = Image(buffer.getvalue(), format="png", width=width, height=height)
            if self.handle and self.cell == shell.execution_count:
                self.handle.update(image)
            else:
                self.handle, self.cell = display(image, display_id=True), shell.execution_count
        if self.save or not in_kernel:
            with contextlib.suppress(OSError):  # a full disk costs a picture, never the training
                partial = self.path.with_name(f"{self.path.stem}.tmp.png")
                partial.write_bytes(buffer.getvalue())
                partial.replace(self.path)


def _duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


class AccLossPlotter(_Recorder):
    """Redraws the accuracy and loss curves while a model trains, with the best epoch and the resume seam marked.

    Inside a long epoch the running values are shown every two seconds, with the time left for the whole run.

    Args:
        graphs: the panels, by metric name; `"acc"` stands for whatever accuracy is logged.
        save_graph: also keep the picture current in a file. Without a kernel (a plain script) it always is.
        title: text above the panels, before the progress.
        path: the file for the picture.
        verbose: 1 prints one line an epoch, 0 nothing.

    Raises:
        ValueError: an argument is wrong; the message names it.
    """

    def __init__(self, graphs=("acc", "loss"), save_graph=False, title="", path="training_acc_loss.png", verbose=1):
        super().__init__()
        if verbose not in (0, 1):
            raise ValueError(f"verbose: expected 0 or 1, got {verbose!r}")
        self.title, self.verbose = title, verbose
        self._picture, self._screen = _HistoryPicture(graphs), _Screen(path, save_graph)

    def on_train_begin(self, logs=None):
        self._began, self._seconds, self._resumed_at = time.monotonic(), [], None
        self._draw("starting")  # the first sign of life: compiling may take a while

    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch, logs)
        if not self._seconds:
            self._resumed_at = epoch or None
        self._epoch, self._epoch_began = epoch, time.monotonic()
        self._position = f"{epoch + 1}/{self.params['epochs']}"

    def on_train_batch_end(self, batch, logs=None):
        now, steps = time.monotonic(), self.params.get("steps")
        if now - self._drawn < 2 or not steps:
            return
        done = (batch + 1) / steps
        # While no epoch has finished since the start, or since the resume, the pace of this one has to do.
        pace = np.median(self._seconds[-5:]) if self._seconds else (now - self._epoch_began) / done
        left = _duration(pace * (self.params["epochs"] - self._epoch - done))
        self._draw(f"{done:.0%} of epoch {self._position}, {left} left", (self._epoch + done, logs or {}))

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        self._seconds.append(time.monotonic() - self._epoch_began)
        left = _duration(np.median(self._seconds[-5:]) * (self.params["epochs"] - epoch - 1))
        self._draw(f"epoch {self._position}, {left} left")
        if self.verbose:
            values = "  ".join(f"{name} {_number(value):.4f}" for name, value in (logs or {}).items())
            print(f"epoch {self._position}  {values}  {_duration(self._seconds[-1])}, {left} left", flush=True)

    def on_train_end(self, logs=None):
        records, seconds = _records(self.model), time.monotonic() - self._began
        took = f" in {_duration(seconds)}" if self._seconds and not self._resumed_at else ""
        self._draw(f"{records[-1]['epoch'] + 1} epochs{took}" if records else "nothing was trained")

    def _draw(self, progress, running=(0, {})):
        parts = [self.title, progress] if self.title else [progress]
        with contextlib.suppress(AttributeError, TypeError, ValueError):  # not every optimizer has one learning rate
            parts.append(f"learning rate {float(self.model.optimizer.learning_rate):.3g}")
        self._picture.draw(_columns(_records(self.model)), self._resumed_at, " · ".join(parts), running)
        self._screen.show(self._picture.figure)
        self._drawn = time.monotonic()


class ConfusionMatrixPlotter(_Recorder):
    """Redraws the confusion matrix of a validation set after each epoch.

    Compile `keras.metrics.OneHotMeanIoU(len(classes))` (`MeanIoU` for integer labels) as a metric and validate on the
    same images: that metric then holds the matrix, and nothing is predicted a second time.

    Args:
        X_val: images, an array whose first axis counts them.
        Y_val: their labels: integers of shape (n,) or (n, 1), or one-hot of shape (n, classes).
        classes: the class names, in the order of the labels.
        normalize: show shares of the true class instead of counts.
        cmap: name of a colormap, or a colormap.
        title: text above the matrix; the epoch is added.
        every: redraw after every so many epochs.
        save_graph: also keep the picture current in a file. Without a kernel (a plain script) it always is.
        path: that file.

    Raises:
        ValueError: an argument is wrong; the message names it.
    """

    def __init__(
        self, X_val, Y_val, classes, normalize=False, cmap="Blues", title="Confusion Matrix", every=1, save_graph=False,
        path="confusion_matrix.png",
    ):  # fmt: skip
        super().__init__()
        self._picture, self._screen = _MatrixPicture(classes, normalize, cmap), _Screen(path, save_graph)
        labels, count = np.asarray(Y_val), len(classes)
        if labels.ndim == 2 and labels.shape[1] in (1, count):
            labels = labels.argmax(axis=1) if labels.shape[1] == count else labels[:, 0]
        if labels.ndim != 1 or len(labels) != len(X_val):
            shapes = f"({len(X_val)},) or one-hot of shape ({len(X_val)}, {count})"
            raise ValueError(f"Y_val: expected labels of shape {shapes}, as X_val has it, got shape {np.shape(Y_val)}")
        if not len(labels) or (labels != labels.astype(int)).any() or labels.min() < 0 or labels.max() >= count:
            raise ValueError(f"Y_val: expected whole numbers from 0 to {count - 1}, one for each of classes")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every: expected a whole number of epochs, at least 1, got {every!r}")
        self.X_val, self.labels, self.title, self.every = X_val, labels.astype(int), title, every

    def on_train_begin(self, logs=None):
        self._drawn_epoch = None
        self._picture.draw(np.zeros((len(self._picture.classes),) * 2), f"{self.title} · starting")
        self._screen.show(self._picture.figure)

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        if (epoch + 1) % self.every == 0:
            self._draw(epoch)

    def on_train_end(self, logs=None):
        records = _records(self.model)
        if records and records[-1]["epoch"] != self._drawn_epoch:  # the last epoch, or a finished run shown again
            self._draw(records[-1]["epoch"])

    def _draw(self, epoch):
        self._drawn_epoch = epoch
        self._picture.draw(self.confusion_matrix(), f"{self.title} · epoch {epoch + 1}")
        self._screen.show(self._picture.figure)

    def confusion_matrix(self):
        """Counts of shape (classes, classes), true class by row, of the model as it is now."""
        count = len(self._picture.classes)
        images = np.bincount(self.labels, minlength=count)
        metrics = [m for metric in self.model.metrics for m in [metric, *getattr(metric, "metrics", [])]]
        for held in _values(m.total_cm for m in metrics if hasattr(m, "total_cm")):
            if held.shape == (count, count) and (held.sum(axis=1) == images).all():  # it is of these very images
                return held
        scores = np.asarray(self.model.predict(self.X_val, batch_size=500, verbose=0)).reshape(len(self.labels), -1)
        if scores.shape[1] not in (count, 1 if count == 2 else count):
            raise ValueError(f"classes: {count} names, but the model has {scores.shape[1]} outputs")
        predicted = scores.argmax(axis=1) if scores.shape[1] > 1 else scores[:, 0] > 0.5
        return np.bincount(self.labels * count + predicted, minlength=count * count).reshape(count, count)


class _Unusable(Exception):
    """A checkpoint file that cannot be continued from; the message says why."""


class ResumableCheckpoint(_Recorder):
    """Saves a training after every epoch so exactly that continuing it equals never having stopped.

    `saved_model.hdf5` is renewed after every epoch, `best_model.hdf5` when the monitored value improves. Plain Keras
    opens both, by `model.load_weights(path)` and by `keras.models.load_model(path)`, which returns an uncompiled model:
    the optimizer is in a group of our own, with the seed states of dropout and augmentation layers, the epoch, history,
    best value, counters of `callbacks`, random states of Python, NumPy and PyTorch, and a SHA-256 of the whole file.
    There is one way to use it, which starts a training, continues it and at last only shows the curves::

        checkpoint = ResumableCheckpoint("runs/first", callbacks=[early_stopping], settings={"batch_size": 250})
        model.fit(..., initial_epoch=checkpoint.restore(model), callbacks=[early_stopping, checkpoint])

    Its place in the list does not matter: an epoch is saved when the next one begins or training ends. That the data
    comes in the same order again is the caller's part, as Keras keeps no state of its own shuffling: pass
    `shuffle=False` and a `keras.utils.PyDataset` that derives order and augmentation from a seed and the epoch.

    Args:
        directory: where the two files live, one directory a training; made if missing.
        monitor: the logged value that `best_model.hdf5` goes by.
        callbacks: the other callbacks of the same `fit` whose counters are kept (EarlyStopping, ReduceLROnPlateau,
            ModelCheckpoint): a callback cannot see its neighbours.
        settings: a dict of whatever else must be the same on resuming: batch size, seed, number of epochs, data.
        mode: `"min"`, `"max"`, or `"auto"` to go by the name of `monitor`.
        verbose: 1 says where training continues, 0 nothing; warnings are given in any case.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it. OSError: the directory cannot be made.
    """

    def __init__(self, directory, monitor="val_loss", callbacks=(), settings=None, mode="auto", verbose=1):
        super().__init__()
        if not isinstance(monitor, str) or mode not in ("auto", "min", "max"):
            raise ValueError(f'monitor, mode: expected a name and "auto", "min" or "max", got {monitor!r}, {mode!r}')
        if not isinstance(callbacks, (list, tuple)) or not all(hasattr(c, "on_epoch_end") for c in callbacks):
            raise TypeError(f"callbacks: expected a list of Keras callbacks, got {callbacks!r}")
        try:
            self.settings = _plain(dict(settings or {}))
        except (TypeError, ValueError) as error:
            raise TypeError(f"settings: expected a dict of numbers, strings and lists, got {settings!r}") from error
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.saved_path, self.best_path = self.directory / "saved_model.hdf5", self.directory / "best_model.hdf5"
        self.monitor, self.callbacks, self.verbose = monitor, list(callbacks), verbose
        self._maximise = mode == "max" or mode == "auto" and _higher_is_better(monitor)
        self._restored, self._next_epoch, self.best, self.best_epoch = None, None, None, None

    def restore(self, model):
        """Loads the saved state into a compiled model.

        Args:
            model: a built and compiled model, the same as the saved one but for its weights.

        Returns:
            The epoch to pass to `fit` as `initial_epoch`: 0 where nothing is saved yet, the last epoch of a `fit` that
            had finished, so that nothing more is trained.

        Raises:
            ValueError: the model is not compiled or not built; or model, optimizer, loss or settings differ from the
                saved ones (each difference is listed); or no file can be used. No file is changed then.
        """
        if not getattr(model, "compiled", False):
            raise ValueError("model: compile it before restore(model), so that the optimizer's state has a place to go")
        self._restored, self._next_epoch, self.best, self.best_epoch = None, 0, None, None
        _records(model).clear()
        problems = {}
        for path in filter(Path.exists, (self.saved_path, self.best_path)):
            try:
                state, arrays = _read(path, model)
                saved, now = state["fingerprint"], self._fingerprint(model)
                differing = [name for name in {**saved, **now} if saved.get(name, "none") != now.get(name, "none")]
                if differing:
                    lines = [f"  {n}: saved {saved.get(n, 'none')!r}, now {now.get(n, 'none')!r}" for n in differing]
                    raise _Unusable("\n".join(["it belongs to another training:", *lines]))
                _load(path, model, arrays)
            except _Unusable as problem:
                problems[path] = problem
                continue
            self._adopt(model, state, arrays, path, problems)
            return self._next_epoch
        if problems:
            listed = "\n".join(f"{path}: {problem}" for path, problem in problems.items())
            remedy = "To continue, undo the differences; to start anew, use another directory or move these files away."
            raise ValueError(f"There is no state to continue from, and nothing was changed.\n{listed}\n{remedy}")
        return 0

    def _adopt(self, model, state, arrays, path, problems):
        """Takes over a state that was loaded into `model`, and says so."""
        self._restored = (weakref.ref(model), state, arrays)
        _records(model).extend(state["records"])
        self._next_epoch, self.best, self.best_epoch = state["next_epoch"], state["best"], state["best_epoch"]
        if path == self.best_path:
            why = f"{self.saved_path} is missing."
            for bad, problem in problems.items():
                aside = bad.with_name(f"{bad.stem}.unusable-{time.time_ns()}{bad.suffix}")
                bad.replace(aside)
                why = f"{bad} cannot be used: {problem}\nIt was kept as {aside}."
            lost = f"Continuing from {path}, epoch {state['epoch'] + 1}; what was trained after that epoch is lost."
            warnings.warn(f"{why} {lost}", stacklevel=3)
        if self.verbose:
            done = "This training is complete" if state["finished"] else "Continuing"
            best = "" if self.best is None else f", best {self.monitor} {self.best:.4f} in epoch {self.best_epoch + 1}"
            print(f"{done} after epoch {state['epoch'] + 1}{best} [{self.directory}]", flush=True)

    def _fingerprint(self, model):
        """All that must be the same for a resumed training to equal an uninterrupted one, each value by its path."""
        names = {layer.name: f"layer {i}" for i, layer in enumerate(_all_layers(model))}
        # Layers are called by their position, as a model built again in the same kernel has other generated names.
        architecture = re.sub(r'"([^"\\]*)"', lambda m: json.dumps(names.get(m[1], m[1])), model.to_json())
        loss = model.loss if isinstance(model.loss, str) else keras.saving.serialize_keras_object(model.loss)
        kinds = {"model": json.loads(architecture), "loss": loss, "settings": self.settings}
        kinds["optimizer"] = keras.saving.serialize_keras_object(model.optimizer)
        kinds["callbacks"] = [type(callback).__name__ for callback in self.callbacks]
        kinds["monitor"] = f"{self.monitor} ({'max' if self._maximise else 'min'})"
        return _flat(_plain(kinds))

    def on_train_begin(self, logs=None):
        if self._restored and self._restored[0]() is not self.model:
            raise ValueError("restore(model) was called with another model than the one that is now being trained")
        _check_that_hdf5_holds(self.model)
        self._began = self._told_nan = False
        self._pending = self._failure = self._best_model = self._best_file = None
        if self._restored:
            self.model.history.history.clear()
            for record in _records(self.model):
                for name, value in record["logs"].items():
                    self.model.history.history.setdefault(name, []).append(value)
        self._watch_for_interrupt()

    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch, logs)
        if self._began:
            self._save()
            return
        # Before the first epoch of this `fit`: by now every other callback has reset itself.
        if epoch != self._next_epoch and (self.saved_path.exists() or self.best_path.exists()):
            remedy = (
                "To continue it, use fit(..., initial_epoch=checkpoint.restore(model)); to start anew, another folder."
            )
            raise ValueError(f"fit began at epoch {epoch}, but {self.directory} holds a training unlike that. {remedy}")
        self._began, self._next_epoch = True, epoch
        if self._restored:
            _, state, arrays = self._restored
            self.model.history.epoch = [record["epoch"] for record in _records(self.model)]
            for index, (callback, counters) in enumerate(zip(self.callbacks, state["counters"])):
                if isinstance(counters.get("best_weights"), int):
                    count = counters["best_weights"]
                    counters["best_weights"] = [arrays[f"callbacks/{index}/{i}"] for i in range(count)]
                vars(callback).update(counters)
            _set_random_state(state["random"])
            self._restored = None  # from here on, the live objects are ahead of it

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        names, self._pending = list(logs or {}), epoch
        # An epoch without validation may lack it; one that validated may not.
        if self.monitor not in names and (
            not self.monitor.startswith("val_") or any(n.startswith("val_") for n in names)
        ):
            raise ValueError(f"monitor: {self.monitor!r} was not logged, only {', '.join(names)}")
        value = _number((logs or {}).get(self.monitor))
        if math.isfinite(value) and (self.best is None or (value > self.best if self._maximise else value < self.best)):
            self.best, self.best_epoch = value, epoch
            # Taken now: at the very end, averaged weights (EMA) or EarlyStopping's best ones replace these.
            self._best_model = _keras_part(self.model)

    def on_train_end(self, logs=None):
        if not self._began:  # nothing was left to train
            self.model.history.epoch = [record["epoch"] for record in _records(self.model)]
            return
        for callback in self.callbacks:
            # EarlyStopping does the same in its own on_train_end, which may come after ours.
            if getattr(callback, "restore_best_weights", False) and callback.best_weights is not None:
                self.model.set_weights(callback.best_weights)
        self._save(finished=self.params["epochs"])
        if self.best is None:
            warnings.warn(f"{self.monitor} was never logged as a finite number, so there is no {self.best_path}")
        if self._failure:
            warnings.warn(f"Training ended, but nothing after epoch {self._next_epoch} is saved: {self._failure}")

    def _save(self, finished=None):
        epoch = self._pending
        if epoch is None:
            return
        problem = _not_finite(self.model)
        if problem:
            kept = f"The last finite state (after epoch {self._next_epoch}) is kept."
            again = "An exact resume will meet the same again: lower the learning rate."
            if not self._told_nan:
                warnings.warn(f"Epoch {epoch + 1} is not saved, as {problem}. {kept} {again}")
            self._told_nan = True
            return
        try:
            state, arrays = self._state(epoch, finished)
            if self._best_model is not None:
                self._best_file, self._best_model = _with_state(self._best_model, state, arrays), None
            # The best one first: were it second, a stop in between would leave a state that takes it for written.
            if self._best_file is not None:
                _write(self.best_path, self._best_file)
                self._best_file = None  # only now, so that a failed save of it is made up for later
            _write(self.saved_path, _with_state(_keras_part(self.model), state, arrays))
        except OSError as error:
            if not self._failure:
                warnings.warn(f"Could not save epoch {epoch + 1}: {error}. Training goes on; each epoch tries again.")
            self._failure = str(error)
            return
        if self._failure:
            print(f"Saving works again: epoch {epoch + 1} is in {self.saved_path}.", flush=True)
        self._failure = self._pending = None
        self._next_epoch = state["next_epoch"]

    def _state(self, epoch, finished):
        """What Keras leaves out: plain data for a JSON text, and arrays by name."""
        arrays = {f"optimizer/{i}": v for i, v in enumerate(_values(self.model.optimizer.variables))}
        arrays |= {f"seeds/{i}": v for i, v in enumerate(_values(_seeds(self.model)))}
        counters = [{name: getattr(c, name) for name in _COUNTERS if hasattr(c, name)} for c in self.callbacks]
        for index, values in enumerate(counters):
            if values.get("best_weights") is not None:
                arrays |= {f"callbacks/{index}/{i}": v for i, v in enumerate(values["best_weights"])}
                values["best_weights"] = len(values["best_weights"])
        state = {"epoch": epoch, "next_epoch": finished or epoch + 1, "finished": bool(finished), "counters": counters}
        state |= {"best": self.best, "best_epoch": self.best_epoch, "records": _records(self.model)}
        state |= {"random": _random_state(), "fingerprint": self._fingerprint(self.model), "format": 1}
        return state, arrays

    def _watch_for_interrupt(self):
        """Says at Ctrl-C (or Jupyter's Stop) where training will continue: Keras calls no callback then."""
        if threading.current_thread() is not threading.main_thread():
            return
        previous = signal.getsignal(signal.SIGINT)
        previous = getattr(previous, "previous", previous)

        def handler(number, frame):
            signal.signal(signal.SIGINT, previous)
            # Only where a fit of our model is going on: an error may have ended it without our knowing.
            while frame and frame.f_locals.get("self") is not self.model:
                frame = frame.f_back
            if frame:
                where = f"Run again to continue after epoch {self._next_epoch}. [{self.directory}]"
                print(f"\nStopped. {where if self._next_epoch else 'No epoch was finished yet.'}", flush=True)
            (previous if callable(previous) else signal.default_int_handler)(number, frame)

        handler.previous = previous
        signal.signal(signal.SIGINT, handler)


_GROUP = "resumable_checkpoint"
_MARK = b"SHA-256 of this file, with zeros for the 64 digits that follow: "
# What Keras's callbacks count and compare from epoch to epoch. `min_delta` is left alone: Keras changes its sign later.
_COUNTERS = ("best", "wait", "cooldown_counter", "best_epoch", "stopped_epoch", "best_weights")
_STATE = {"epoch", "next_epoch", "finished", "counters", "best", "best_epoch", "records", "random", "fingerprint"}
# A config without generated names, seeds (their states are restored) and what is no part of a training.
_GENERATED = {"name", "seed", "shared_object_id", "build_config", "compile_config", "keras_version", "backend"}


def _plain(value):
    """The same as JSON would give it back: tuples as lists, arrays and NumPy numbers as lists and numbers."""
    return json.loads(json.dumps(value, default=_jsonable))


def _jsonable(value):  # os.fspath gives the text of a path, and a TypeError for anything else
    return np.asarray(value).tolist() if hasattr(value, "__array__") else os.fspath(value)


def _all_layers(model):
    for layer in model.layers:
        yield layer
        yield from _all_layers(layer) if hasattr(layer, "layers") else ()


def _flat(value, path=""):
    """Plain data as `{path: value}`, without what is generated and the current learning rate."""
    if not value or not isinstance(value, (dict, list)):
        return {} if path.endswith(".learning_rate") and isinstance(value, (int, float)) else {path: value}
    items = value.items() if isinstance(value, dict) else ((f"[{i}]", item) for i, item in enumerate(value))
    parts = (_flat(item, f"{path}.{key}".strip(".").replace(".[", "[")) for key, item in items if key not in _GENERATED)
    return {name: item for part in parts for name, item in part.items()}


def _values(variables):
    return [np.asarray(keras.ops.convert_to_numpy(variable)) for variable in variables]


def _seeds(model):
    """The states of the seed generators inside layers: variables that are not weights."""
    weights = {id(variable) for variable in model.weights}
    return [variable for variable in model.variables if id(variable) not in weights]


def _not_finite(model):
    """What of the last epoch is NaN or infinite, or None."""
    loss = _number(_records(model)[-1]["logs"].get("loss", 0.0))
    if not math.isfinite(loss):
        return f"its loss is {loss}"
    for variable, values in zip(model.weights, _values(model.weights)):
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            return f"{variable.path} is not finite"
    return None


def _random_state():
    state = {"python": random.getstate(), "numpy": np.random.get_state(legacy=False)}
    if keras.backend.backend() == "torch":
        import torch

        state["torch"] = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
    return _plain(state)


def _set_random_state(state):
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(state["numpy"])
    if keras.backend.backend() == "torch" and "torch" in state:
        import torch

        cpu, *devices = (torch.tensor(values, dtype=torch.uint8) for values in state["torch"])
        torch.set_rng_state(cpu)
        if len(devices) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(devices)


def _keras_part(model):
    """The bytes of the HDF5 file that `model.save` writes, without its warning that HDF5 is a legacy format."""
    logger, quiet = logging.getLogger("absl"), logging.Filter()
    quiet.filter = lambda record: "HDF5" not in record.getMessage()
    logger.addFilter(quiet)
    try:
        with tempfile.TemporaryDirectory() as folder:
            # Without the optimizer, which Keras would strip from the live model's compile config.
            model.save(Path(folder, "model.hdf5"), include_optimizer=False)
            return Path(folder, "model.hdf5").read_bytes()
    finally:
        logger.removeFilter(quiet)


def _check_that_hdf5_holds(model):
    """Refuses, before training starts, a model that Keras cannot save to HDF5, or saves but cannot load again."""
    kept = _random_state()
    try:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "model.hdf5").write_bytes(_keras_part(model))
            own = {type(layer).__name__: type(layer) for layer in _all_layers(model)}
            keras.models.load_model(Path(folder, "model.hdf5"), custom_objects=own, compile=False, safe_mode=False)
    except OSError as error:
        warnings.warn(f"Could not try out whether this model can be saved: {error}")
    except Exception as error:  # whatever Keras raises is the reason to pass on
        remedy = "Build it as a Sequential or Functional model, from layers only."
        raise ValueError(f"model: HDF5 cannot hold {model.name!r}. {remedy} Keras says: {error}") from error
    finally:
        _set_random_state(kept)


def _with_state(keras_part, state, arrays):
    """The bytes of a Keras HDF5 file with our group added, and in it a SHA-256 of the result."""
    buffer = io.BytesIO(keras_part)
    with h5py.File(buffer, "r+") as file:
        group = file.create_group(_GROUP)
        # A dataset, as HDF5 limits attributes to 64 KB.
        group["state"] = np.frombuffer(json.dumps(state, default=_jsonable).encode(), np.uint8)
        for name, values in arrays.items():
            group[f"arrays/{name}"] = values
        group["sha256"] = np.frombuffer(_MARK + b"0" * 64, np.uint8)
    data = buffer.getvalue()
    at = data.index(_MARK) + len(_MARK)
    return data[:at] + hashlib.sha256(data).hexdigest().encode() + data[at + 64 :]


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
        if os.name == "posix":  # makes the rename last through a power cut; Windows has no such call
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def _read(path, model):
    """The state and the arrays of a checkpoint, read only after every byte of the file was found to be as written.

    Raises _Unusable if the file is damaged, is not ours, or would make HDF5 open other files or take much memory.
    """
    try:
        most = 2**26 + 12 * sum(values.nbytes for values in _values(model.variables))
        if path.stat().st_size > most:
            raise _Unusable(f"it has {path.stat().st_size:,} bytes; a checkpoint of this model has at most {most:,}")
        data = path.read_bytes()
    except OSError as error:
        raise _Unusable(f"it cannot be read: {error}") from error
    if not data.startswith(b"\x89HDF\r\n\x1a\n"):
        raise _Unusable("it is not an HDF5 file, or its beginning is damaged" if data else "it is empty")
    at = data.find(_MARK) + len(_MARK)
    digest = hashlib.sha256(data[:at] + b"0" * 64 + data[at + 64 :]).hexdigest().encode()
    if at < len(_MARK) or data[at : at + 64] != digest:
        raise _Unusable("its checksum is missing or wrong: it is cut short, damaged, or not written by this callback")
    try:
        with h5py.File(io.BytesIO(data), "r") as file:
            arrays = _walk(file, len(data))
        state = json.loads(arrays.pop("state").tobytes())
        if state["format"] != 1 or not _STATE <= state.keys():
            raise _Unusable(f"its format ({state['format']}) is unknown to this version of visual_callbacks.py")
    except (OSError, KeyError, ValueError, RuntimeError, TypeError) as error:
        raise _Unusable(f"its contents are not those of a checkpoint: {error}") from error
    return state, {name.removeprefix("arrays/"): values for name, values in arrays.items()}


def _walk(file, size):
    """The arrays of our group by name, after a walk over the whole HDF5 file that follows nothing to elsewhere."""
    arrays = {}

    def look(name, link):
        item = file[name] if isinstance(link, h5py.HardLink) else None
        if isinstance(item, h5py.Dataset) and not item.is_virtual and not item.external:
            if item.dtype.hasobject or item.nbytes > size:
                raise _Unusable(f"{name} claims shape {item.shape} of {item.dtype}, more than the file holds")
            if name.startswith(f"{_GROUP}/"):
                arrays[name.removeprefix(f"{_GROUP}/")] = item[()]
        elif not isinstance(item, h5py.Group):
            raise _Unusable(f"{name} takes its data from elsewhere, which is not read")

    file.visititems_links(look)
    return arrays


def _load(path, model, arrays):
    """Puts the weights, the seed states and the optimizer's variables of a checkpoint into `model`."""
    if not model.built:
        raise ValueError("model: build it before restore(model); begin it with keras.Input(shape), for example")
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    try:
        model.load_weights(path)
        for kind, variables in (("optimizer", model.optimizer.variables), ("seeds", _seeds(model))):
            for index, variable in enumerate(variables):
                variable.assign(arrays[f"{kind}/{index}"])
    except Exception as error:  # whatever Keras raises is the reason to pass on
        raise _Unusable(f"its contents do not fit this model: {error}") from error
