"""Keras callbacks that show a training as it happens and make sure that it is never lost.

Copy this one file beside any Keras 3 notebook or script (TensorFlow, JAX or PyTorch backend)::

    checkpoint = ResumableCheckpoint("runs/first", callbacks=[early_stopping], settings={"batch_size": 250})
    model.fit(x_train, y_train, batch_size=250, epochs=30, verbose=0, shuffle=False, validation_data=(x_val, y_val),
              callbacks=[early_stopping, AccLossPlotter(), ConfusionMatrixPlotter(x_val, y_val, classes), checkpoint],
              initial_epoch=checkpoint.restore(model))

A wrong argument is named at once in a ValueError or TypeError. The plotters take the arguments of chasingbob's
keras-visuals; the idea to record apart from drawing is livelossplot's, that of a backup Keras's BackupAndRestore's.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import random
import re
import signal
import sys
import tempfile
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import keras
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["AccLossPlotter", "ConfusionMatrixPlotter", "ResumableCheckpoint", "plot_confusion_matrix", "plot_history"]

TRAINING, VALIDATION, MUTED = "#0072B2", "#D55E00", "#595959"  # Okabe and Ito's colours, safe for colour-blind readers
_HIGHER_IS_BETTER = re.compile("acc|auc|precision|recall|f1|fbeta|iou|r2|similarity|true_")
_GROUP = "resumable_checkpoint"
_MARK = b"SHA-256 of this file, with zeros for the 64 digits that follow: "
# What Keras's callbacks count and compare from epoch to epoch. `min_delta` is left alone: Keras changes its sign later.
_COUNTERS = ("best", "wait", "cooldown_counter", "best_epoch", "stopped_epoch", "best_weights")
_STATE = {"epoch", "next_epoch", "finished", "counters", "best", "best_epoch", "records", "random", "fingerprint"}
# A config without generated names, seeds (their states are restored) and what depends on version or backend.
_GENERATED = {"name", "seed", "shared_object_id", "build_config", "compile_config", "keras_version", "backend"}
_GENERATED |= {"module", "registered_name"}
torch = sys.modules["torch"] if keras.backend.backend() == "torch" else None


def _expect(good, argument, wanted, got, error=ValueError):
    if not good:
        raise error(f"{argument}: expected {wanted}, got {got!r}")


def _number(value):
    # NumPy makes nan of None, but would take its time over the floats of thousands of epochs.
    return value if isinstance(value, float) else float(np.mean(np.asarray(value, float)))


class _Recorder(keras.callbacks.Callback):
    """Keeps the epochs of each model for all our callbacks: so plotters know those that `restore` brought back."""

    _of_models = weakref.WeakKeyDictionary()

    @property
    def _records(self):  # the logs by epoch, from 0
        return self._of_models.setdefault(self.model, {})

    def on_epoch_begin(self, epoch, logs=None):
        self._of_models[self.model] = {past: logs for past, logs in self._records.items() if past < epoch}

    def on_epoch_end(self, epoch, logs=None):
        self._records[epoch] = {} if logs is None else logs  # no copy: callbacks later in the list add to it


def plot_history(history, graphs=("acc", "loss"), resumed_at=None, title="", figure=None):
    """Draws one panel a graph: the training curve, the validation curve, the best epoch. Returns a Matplotlib Figure.

    Args:
        history: what `fit` returned, or a dict of lists by metric name; `"epoch"` may list the epochs, from 0.
        graphs: metric names; `"acc"` finds whatever accuracy was logged.
        resumed_at: epoch (from 0) at which a resumed training began; a vertical line marks it.
        title: text above the panels.
        figure: what an earlier call for the same graphs returned, to draw in it again; quicker than a new one.
    """
    if isinstance(history, keras.callbacks.History):
        history = {**history.history, "epoch": history.epoch}
    _expect(isinstance(history, dict), "history", "a keras History or a dict of lists", history, TypeError)
    named = not isinstance(graphs, str) and graphs and all(isinstance(name, str) and name for name in graphs)
    _expect(named, "graphs", 'a list of metric names such as ["acc", "loss"]', graphs)
    names = [name for name in history if name != "epoch"]
    # Keras 2 logged `acc`, Keras 3 logs `accuracy` and its kin.
    accuracies = [name for name in names if re.fullmatch("acc|(?!val_).*accuracy", name)]
    figure = figure or _empty_panels(len(graphs))  # whose artists are then moved: quicker than plotting anew
    figure.texts[0].set_text(title)
    for ax, graph in zip(figure.axes, graphs):
        training, validation, best, seam, *samples = ax.lines
        note, *labels = ax.texts
        others = accuracies if graph in ("acc", "accuracy") else []
        name = next((name for name in [graph, *others] if name in names), None)
        best.set_data([], [])
        for line, key in ((training, name), (validation, f"val_{name}")):
            y = np.asarray(history.get(key, []), float)
            x = 1.0 + np.asarray(history.get("epoch", range(len(y))), float)[: len(y)]
            x, y = x[np.isfinite(y)], y[np.isfinite(y)]
            line.set(data=(x, y), markersize=3 if len(y) < 25 else 0)
            x, y = x[x % 1 == 0], y[x % 1 == 0]  # an epoch that is going on has a fraction, and cannot be the best yet
            if len(y):  # of the two curves, the later one decides: validation, where there is any
                index = y.argmax() if _HIGHER_IS_BETTER.search(key) else y.argmin()
                best.set(data=([x[index]], [y[index]]), label=f"best {y[index]:.4g}, epoch {x[index]:.0f}")
        ends = ([resumed_at + 0.5] * 2, [0, 1]) if resumed_at else ([], [])
        seam.set(data=ends, label=f"resumed after epoch {resumed_at}")
        ax.relim()
        ax.set(xlim=(0, 1.03 * max(1, ax.dataLim.x1)), ylabel=name or graph)
        ax.autoscale_view(scalex=False)
        note.set_text(f"no {graph!r} was logged, only\n" + ",\n".join(names[:8]) if names and not name else "")
        for line, sample, text in zip(ax.lines, samples, labels):
            text.set_text(line.get_label() if len(line.get_xdata()) else "")
            sample.set_visible(bool(text.get_text()))
    return figure


def _empty_panels(count):
    figure = FigureCanvasAgg(Figure(figsize=(4.8 * count, 4), dpi=100)).figure
    figure.text(0.5, 0.97, "", ha="center", va="top")
    for index in range(count):
        ax = figure.add_axes(((index + 0.156) / count, 0.13, 0.812 / count, 0.62), xlabel="epoch", ymargin=0.06)
        ax.grid(alpha=0.3)
        ax.tick_params(bottom=False, left=False)
        ax.spines[["top", "right"]].set_visible(False)
        ax.locator_params(nbins=5)
        ax.locator_params("x", integer=True)
        ax.plot([], [], color=TRAINING, label="training", marker="o", ms=0)
        ax.plot([], [], color=VALIDATION, label="validation", marker="o", ms=0, ls="--")
        ax.plot([], [], "o", color="black", ms=8, mfc="none", mew=1.8, zorder=3)
        ax.axvline(0, color=MUTED, lw=1.2, ls=":")
        ax.text(0.5, 0.5, "", transform=ax.transAxes, ha="center", va="center", color=MUTED)
        # The key above the curves: Matplotlib's Legend would take a third of the time of a redraw.
        for place, line in enumerate(list(ax.lines)):
            x, y = 0.43 * (place // 2), 1.16 - 0.08 * (place % 2)
            (sample,) = ax.plot([x, x + 0.035, x + 0.07], [y] * 3)
            sample.update_from(line)
            sample.set(transform=ax.transAxes, clip_on=False, markevery=[1], label="_key")
            ax.text(x + 0.09, y, "", transform=ax.transAxes, va="center", fontsize=9)
    return figure


def plot_confusion_matrix(matrix, classes, normalize=False, cmap="Blues", title="Confusion Matrix", ax=None):
    """Draws a confusion matrix, with each class's recall beside its name. Returns the Matplotlib Figure drawn in.

    Args:
        matrix: counts of shape (classes, classes); `matrix[i, j]` counts the images of class i that were called j.
        classes: the names, in the order of the matrix.
        normalize: show shares of the true class (the row) instead of counts.
        cmap: name of a colormap, or a colormap.
        title: text above the matrix.
        ax: a Matplotlib axes to draw in, instead of a new figure; an earlier drawing in it is changed in place.
    """
    matrix, count = np.asarray(matrix, float), len(classes)
    _expect(not isinstance(classes, str) and count > 1, "classes", "at least two names", classes)
    _expect(matrix.shape == (count, count) and (matrix >= 0).all(), "matrix", f"{count} x {count} counts", matrix)
    names, font = [str(name) for name in classes], max(4, min(10, 420 / count))
    if ax is None:
        # Margins that hold the longest name, so that the axes keep their place from one drawing to the next.
        side, margin = max(2.6, min(0.5 * count, 8.2)), 0.6 + 0.0088 * font * max(map(len, names))
        width, height = side + margin + 1.3, side + margin + 0.5
        figure = FigureCanvasAgg(Figure(figsize=(width, height), dpi=100)).figure
        ax = figure.add_axes(((margin + 0.4) / width, margin / height, side / width, side / height))
    if not ax.images:
        image = ax.imshow(matrix, cmap=cmap)
        inch = ax.figure.dpi / ax.bbox.width
        bar = ax.figure.colorbar(image, cax=ax.inset_axes((1 + 0.1 * inch, 0, 0.12 * inch, 1)))
        bar.set_label("share of the true class" if normalize else "images")
        ax.set(xlabel="predicted class", ylabel="true class, recall")
        ax.set_xticks(range(count), names, rotation=90, fontsize=font)
        for i, j in np.ndindex(count, count) if count <= 20 else ():  # only while four digits fit into a cell
            ax.text(j, i, "", ha="center", va="center", fontsize=min(10, 170 / count))
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    shown, (image,) = shares if normalize else matrix, ax.images
    image.set(data=shown, clim=(0, 1 if normalize else max(matrix.max(), 1)))
    ax.set_title(title)
    ax.set_yticks(range(count), [f"{name} {s:4.0%}" for name, s in zip(names, shares.diagonal())], fontsize=font)
    for text, value, colour in zip(ax.texts, shown.flat, image.cmap(image.norm(shown)).reshape(-1, 4)):
        dark = colour[:3] @ (0.299, 0.587, 0.114) < 0.5
        text.set(text=f"{value:.2f}" if normalize else f"{value:.0f}", color="w" if dark else "k")
    return ax.figure


class _Plotter(_Recorder):
    """Shows one picture: in a display of its own where there is a kernel, else (or also) in a PNG file."""

    def __init__(self, path, save_graph):
        super().__init__()
        self._path, self._save_graph, self._figure, self._handle, self._cell = Path(path), save_graph, None, None, None

    def _show(self, figure):
        self._figure, buffer = figure, io.BytesIO()
        # A new canvas, as one keeps the size of every text it ever drew; light compression, as more takes longest.
        FigureCanvasAgg(figure).print_png(buffer, pil_kwargs={"compress_level": 1})
        ipython = sys.modules.get("IPython")
        shell = ipython and ipython.get_ipython()
        in_kernel = hasattr(shell, "kernel")  # Jupyter, Colab or a notebook runner; not a script or a terminal
        if in_kernel:
            width, height = map(int, figure.bbox.size)
            image = ipython.display.Image(buffer.getvalue(), width=width, height=height)
            if self._handle and self._cell == shell.execution_count:
                self._handle.update(image)
            else:
                self._handle, self._cell = ipython.display.display(image, display_id=True), shell.execution_count
        with contextlib.suppress(OSError):  # a full disk costs a picture, never the training
            if self._save_graph or not in_kernel:
                partial = self._path.with_name(f"{self._path.stem}.tmp.png")
                partial.write_bytes(buffer.getvalue())
                partial.replace(self._path)


def _duration(seconds):
    m, s = divmod(round(seconds), 60)
    return f"{m // 60} h {m % 60} min" if m >= 60 else f"{m} min" if m >= 10 else f"{m} min {s} s" if m else f"{s} s"


class AccLossPlotter(_Plotter):
    """Redraws the curves after each epoch, and every two seconds inside a long one, with best epoch, seam, time left.

    Args:
        graphs: the panels, by metric name; `"acc"` stands for whatever accuracy is logged.
        save_graph: also keep the picture current in the file `path`. Without a kernel (a plain script) it always is.
        title: text above the panels, before the progress.
        verbose: 1 prints one line an epoch, with the values drawn, 0 nothing.
    """

    def __init__(self, graphs=("acc", "loss"), save_graph=False, title="", path="training_acc_loss.png", verbose=1):
        super().__init__(path, save_graph)
        _expect(verbose in (0, 1), "verbose", "0 or 1", verbose)
        plot_history({}, graphs)  # which checks them
        self._graphs, self.title, self.verbose = list(graphs), title, verbose

    def on_train_begin(self, logs=None):
        self._began, self._seconds, self._resumed_at = time.monotonic(), [], None
        self._draw("starting")  # the first sign of life: compiling may take a while

    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch, logs)
        self._resumed_at = self._resumed_at if self._seconds else epoch or None
        self._epoch, self._epoch_began = epoch, time.monotonic()
        self._position = f"{epoch + 1}/{self.params['epochs']}"

    def on_train_batch_end(self, batch, logs=None):
        if (steps := self.params.get("steps")) and time.monotonic() - self._drawn >= 2:
            done = (batch + 1) / steps
            progress = f"{done:.0%} of epoch {self._position}, {self._left(done)} left"
            self._draw(progress, {self._epoch + done - 1: logs or {}})

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        self._seconds.append(time.monotonic() - self._epoch_began)
        left = self._left(1)
        self._draw(f"epoch {self._position}, {left} left")
        if self.verbose:
            drawn = [name for ax in self._figure.axes for name in (ax.get_ylabel(), f"val_{ax.get_ylabel()}")]
            values = "  ".join(f"{name} {_number(logs[name]):.4f}" for name in drawn if name in (logs or {}))
            print(f"epoch {self._position}  {values}  {_duration(self._seconds[-1])}, {left} left", flush=True)

    def on_train_end(self, logs=None):
        took = f" in {_duration(time.monotonic() - self._began)}" if self._seconds and not self._resumed_at else ""
        self._draw(f"{max(self._records) + 1} epochs{took}" if self._records else "nothing was trained")

    def _left(self, done):
        pace = np.median(self._seconds[-5:] or (time.monotonic() - self._epoch_began) / done)  # at first, of this epoch
        return _duration(pace * (self.params["epochs"] - self._epoch - done))

    def _draw(self, progress, running=()):
        parts = [self.title, progress] if self.title else [progress]
        with contextlib.suppress(AttributeError, TypeError, ValueError):  # not every optimizer has one learning rate
            parts.append(f"learning rate {float(self.model.optimizer.learning_rate):.3g}")
        records = self._records | dict(running)
        names = dict.fromkeys(name for logs in records.values() for name in logs)
        history = {n: [_number(logs.get(n)) for logs in records.values()] for n in names} | {"epoch": list(records)}
        self._show(plot_history(history, self._graphs, self._resumed_at, " · ".join(parts), self._figure))
        self._drawn = time.monotonic()


class ConfusionMatrixPlotter(_Plotter):
    """Redraws the confusion matrix of a validation set after each epoch.

    Compile `keras.metrics.OneHotMeanIoU(len(classes))` (`MeanIoU` for integer labels) as a metric and validate on the
    same images: that metric then holds the matrix, and nothing is predicted a second time.

    Args:
        X_val: images, an array whose first axis counts them.
        Y_val: their labels: integers of shape (n,) or (n, 1), or one-hot of shape (n, classes).
        classes: the class names, in the order of the labels.
        normalize, cmap, title: as for `plot_confusion_matrix`. save_graph, path: as for `AccLossPlotter`.
        every: redraw after every so many epochs.
    """

    def __init__(self, X_val, Y_val, classes, normalize=False, cmap="Blues", title="Confusion Matrix", every=1,
                 save_graph=False, path="confusion_matrix.png"):  # fmt: skip
        super().__init__(path, save_graph)
        labels, size, count, self._style = np.asarray(Y_val), len(X_val), len(classes), (classes, normalize, cmap)
        plot_confusion_matrix(np.zeros((count, count)), *self._style)  # which checks them
        if labels.shape[1:] in ((1,), (count,)):
            labels = labels.argmax(axis=1) if labels.shape[1] == count else labels[:, 0]
        _expect(labels.shape == (size,), "Y_val", f"shape {(size,)} or, one-hot, {(size, count)}", np.shape(Y_val))
        _expect(size and np.isin(labels, range(count)).all(), "Y_val", f"whole numbers from 0 to {count - 1}", labels)
        _expect(type(every) is int and every > 0, "every", "a whole number of epochs, at least 1", every)
        self.X_val, self.labels, self.title, self.every = X_val, labels.astype(int), title, every
        self._images = np.bincount(self.labels, minlength=count)  # of each class

    def on_train_begin(self, logs=None):
        self._draw(max(self._records, default=None))  # where a resumed training stands

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        if (epoch + 1) % self.every == 0:
            self._draw(epoch)

    def on_train_end(self, logs=None):
        if (last := max(self._records, default=None)) != self._drawn_epoch:  # `every` left it out
            self._draw(last)

    def _draw(self, epoch):
        self._drawn_epoch, when = epoch, "starting" if epoch is None else f"epoch {epoch + 1}"
        matrix = np.diag(0 * self._images) if epoch is None else self.confusion_matrix()
        ax = self._figure.axes[0] if self._figure else None
        self._show(plot_confusion_matrix(matrix, *self._style, f"{self.title} · {when}", ax))

    def confusion_matrix(self):
        """Counts of shape (classes, classes), true class by row, of the model as it is now."""
        count = len(self._images)
        metrics = [m for metric in self.model.metrics for m in [metric, *getattr(metric, "metrics", [])]]
        for held in _values(m.total_cm for m in metrics if hasattr(m, "total_cm")):
            if held.shape == (count, count) and (held.sum(axis=1) == self._images).all():  # it is of these very images
                return held
        scores = np.asarray(self.model.predict(self.X_val, batch_size=500, verbose=0)).reshape(len(self.labels), -1)
        if scores.shape[1] not in (count, 1 if count == 2 else count):
            raise ValueError(f"classes: {count} names, but the model has {scores.shape[1]} outputs")
        predicted = scores.argmax(axis=1) if scores.shape[1] > 1 else scores[:, 0] > 0.5
        return np.bincount(self.labels * count + predicted, minlength=count * count).reshape(count, count)


class ResumableCheckpoint(_Recorder):
    """Saves a training after every epoch so exactly that continuing it equals never having stopped.

    `saved_model.hdf5` is renewed after every epoch, `best_model.hdf5` when the monitored value improves. Plain Keras
    opens both, by `load_weights` or `load_model`, which returns an uncompiled model: a group of our own holds the
    optimizer, seed states of layers, epoch, history, best value, counters of `callbacks`, the global random states of
    Python, NumPy and PyTorch, and a SHA-256 of the whole file.

    Keras keeps no state of its shuffling, so that data comes in the same order again is the caller's part: pass
    `shuffle=False` and a `keras.utils.PyDataset` that derives order and augmentation from a seed and the epoch.

    Args:
        directory: where the two files live, one directory a training; made if missing.
        monitor: the logged value that `best_model.hdf5` goes by.
        callbacks: the other callbacks of this `fit` whose counters are kept (EarlyStopping, ReduceLROnPlateau, ...).
        settings: a dict of whatever else must be the same on resuming: batch size, seed, number of epochs, data.
        mode: `"min"`, `"max"`, or `"auto"` to go by the name of `monitor`.
        verbose: 1 says where training continues, 0 nothing; warnings are given in any case.
        copy_to: a second directory (on Google Drive, say) for copies of both files, made in the background and compared
            byte for byte. While it is slow, full or gone, training goes on. `restore` takes whichever file is further.
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
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.copy_to, folders = Path(copy_to) if copy_to else None, [self.directory]
        if copy_to:
            self.copy_to.mkdir(exist_ok=True)  # without its parents: where a Drive is not mounted, that is an error
            folders.append(self.copy_to)
        self.saved_path, self.best_path = self.directory / "saved_model.hdf5", self.directory / "best_model.hdf5"
        self._files = [folder / path.name for path in (self.saved_path, self.best_path) for folder in folders]
        self.monitor, self.callbacks, self.verbose = monitor, list(callbacks), verbose
        self._maximise = mode == "max" or mode == "auto" and bool(_HIGHER_IS_BETTER.search(monitor))
        self._restored = self._next_epoch = self.best = self.best_epoch = self._copying = None
        self._pool, self._patience = ThreadPoolExecutor(1), 300  # seconds that the end of a training waits for a copy

    def restore(self, model):
        """Loads the saved state into a built and compiled model; returns the epoch to pass to `fit` as `initial_epoch`.

        That is 0 where nothing is saved yet, and the last epoch of a `fit` that had finished: nothing more is trained.

        Raises:
            ValueError: the model is not compiled or not built; or model, optimizer, loss or settings differ from the
                saved ones (the first ten differences are listed); or no file can be used. No file is changed then.
        """
        if not (getattr(model, "compiled", False) and model.built):
            raise ValueError("model: compile it and build it (begin it with keras.Input(shape)) before restore(model)")
        self._restored = self._next_epoch = self.best = self.best_epoch = None
        self.set_model(model)
        self._records.clear()
        usable, problems = [], {}
        for path in filter(Path.exists, self._files):
            try:
                usable.append((path, *self._read(path)))
            except Exception as error:  # whatever HDF5 raises is the reason to pass on
                problems[path] = error if isinstance(error, ValueError) else f"it cannot be used: {error!r}"
        if problems and not usable:
            listed = "\n".join(f"{path}: {problem}" for path, problem in problems.items())
            remedy = "To continue, undo the differences; to start anew, use another directory or move these files away."
            raise ValueError(f"There is no state to continue from, and nothing was changed.\n{listed}\n{remedy}")
        if not usable:
            self._next_epoch = 0
            return 0
        # The best one comes second even if it is further: callbacks may have changed the model after it was taken.
        path, state, arrays = max(usable, key=lambda file: (file[0].name == self.saved_path.name, file[1]["epoch"]))
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        model.load_weights(path)
        for kind, variables in (("optimizer", model.optimizer.variables), ("seeds", self._seeds())):
            for index, variable in enumerate(variables):
                variable.assign(arrays[f"{kind}/{index}"])
        self._restored = model, state, arrays
        self._records.update((record["epoch"], record["logs"]) for record in state["records"])
        self._next_epoch, self.best, self.best_epoch = state["next_epoch"], state["best"], state["best_epoch"]
        if problems or path.name == self.best_path.name:
            why = "" if problems else f"{self.saved_path} is missing. "
            for bad, problem in problems.items():
                aside = bad.replace(bad.with_name(f"{bad.stem}.unusable-{time.time_ns()}{bad.suffix}"))
                why += f"{bad} cannot be used: {problem}\nIt was kept as {aside}. "
            lost = f"Continuing from {path}, epoch {state['epoch'] + 1}; what was trained after it (if at all) is lost."
            warnings.warn(f"{why}{lost}", stacklevel=2)
        for copy in filter(Path.exists, self._files[::-2] if path.parent == self.copy_to else ()):  # bring them back
            _write(self.directory / copy.name, copy.read_bytes())
        if self.verbose:
            done = "This training is complete" if state["finished"] else "Continuing"
            best = "" if self.best is None else f", best {self.monitor} {self.best:.4f} in epoch {self.best_epoch + 1}"
            print(f"{done} after epoch {state['epoch'] + 1}{best} [{self.directory}]", flush=True)
        return self._next_epoch

    def _read(self, path):
        """State and arrays of a file of this training, from it alone, once every byte was found to be as written."""
        most = 2**26 + 12 * sum(values.nbytes for values in _values(self.model.variables))
        if path.stat().st_size > most:
            raise ValueError(f"it has {path.stat().st_size:,} bytes; a checkpoint of this model has at most {most:,}")
        data = path.read_bytes()
        at = data.find(_MARK) + len(_MARK)
        digest = hashlib.sha256(data[:at] + b"0" * 64 + data[at + 64 :]).hexdigest().encode()
        if _MARK not in data or data[at : at + 64] != digest:
            raise ValueError("its checksum is missing or wrong: it is empty, cut short, damaged, or not one of ours")
        arrays, links = {}, []
        with h5py.File(io.BytesIO(data), "r") as file:
            file.visititems_links(lambda *link: links.append(link))
            for name, link in links:  # to every object in the file, following nothing to elsewhere
                item = file[name] if isinstance(link, h5py.HardLink) else None
                if isinstance(item, h5py.Dataset) and not item.is_virtual and not item.external:
                    if item.dtype.hasobject or item.nbytes > len(data):
                        raise ValueError(f"{name} claims shape {item.shape} of {item.dtype}, more than the file holds")
                    if name.startswith(f"{_GROUP}/"):
                        arrays[name.removeprefix(f"{_GROUP}/").removeprefix("arrays/")] = item[()]
                elif not isinstance(item, h5py.Group):
                    raise ValueError(f"{name} takes its data from elsewhere, which is not read")
        state = json.loads(arrays.pop("state").tobytes())
        if state["format"] != 1 or not _STATE <= state.keys():
            raise ValueError(f"its format ({state['format']}) is unknown to this version of visual_callbacks.py")
        saved, now = state["fingerprint"], self._fingerprint()
        pairs = {name: (saved.get(name, "none"), now.get(name, "none")) for name in {**saved, **now}}
        lines = [f"  {name}: saved {old!r}, now {new!r}" for name, (old, new) in pairs.items() if old != new]
        if lines:
            more = [f"  and {len(lines) - 10} more"] * (len(lines) > 10)
            raise ValueError("\n".join(["it belongs to another training:", *lines[:10], *more]))
        return state, arrays

    def _seeds(self):
        """The states of the seed generators inside layers: variables that are not weights."""
        weights = {id(variable) for variable in self.model.weights}
        return [variable for variable in self.model.variables if id(variable) not in weights]

    def _fingerprint(self):
        """All that must be the same for a resumed training to equal an uninterrupted one, each value by its path."""
        # Layers go by their position, as generated names differ in a model built again. Keys ("activation":) do not.
        names = {f'"{layer.name}"': f'"layer {i}"' for i, layer in enumerate(_all_layers(self.model))}
        architecture = re.sub(r'"[^"\\]*":?', lambda m: names.get(m[0], m[0]), self.model.to_json())
        kinds = {"callbacks": [type(c).__name__ for c in self.callbacks], "model": json.loads(architecture)}
        kinds |= {n: keras.saving.serialize_keras_object(getattr(self.model, n)) for n in ("loss", "optimizer")}
        kinds["monitor"] = f"{self.monitor} ({'max' if self._maximise else 'min'})"
        return {f"settings.{name}": value for name, value in self.settings.items()} | dict(_flat(_plain(kinds)))

    def on_train_begin(self, logs=None):
        if self._restored and self._restored[0] is not self.model:
            raise ValueError("restore(model) was called with another model than the one that is now being trained")
        kept = _random_state()
        try:
            self._keras_part(load_again=True)
        except OSError as error:
            warnings.warn(f"Could not try out whether this model can be saved: {error}")
        except Exception as error:  # whatever Keras raises is the reason to pass on
            remedy = "Build it as a Sequential or Functional model, from layers only."
            raise ValueError(f"model: HDF5 cannot hold {self.model.name!r}. {remedy} Keras says: {error}") from error
        finally:
            _random_state(kept)  # loading made a model, whose weights were drawn at random
        self._began = self._failure = self._best_model = self._best_file = None
        if self._restored:
            names = dict.fromkeys(name for logs in self._records.values() for name in logs)
            self.model.history.history = {n: [logs[n] for logs in self._records.values() if n in logs] for n in names}
        with contextlib.suppress(ValueError):  # only the main thread may handle signals
            if getattr(signal.getsignal(signal.SIGINT), "__name__", "") in ("default_int_handler", "_interrupt"):
                signal.signal(signal.SIGINT, self._interrupt)

    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch, logs)
        if self._began:
            return self._save()
        # Before the first epoch of this `fit`: by now every other callback has reset itself.
        if epoch != self._next_epoch and any(map(Path.exists, self._files)):
            remedy = "To continue it, use fit(..., initial_epoch=checkpoint.restore(model)); else, another directory."
            raise ValueError(f"fit began at epoch {epoch}, but {self.directory} holds a training unlike that. {remedy}")
        self._began, self._next_epoch = True, epoch
        if self._restored:
            _, state, arrays = self._restored
            self.model.history.epoch = list(self._records)
            for index, (callback, counters) in enumerate(zip(self.callbacks, state["counters"])):
                if isinstance(count := counters.get("best_weights"), int):
                    counters["best_weights"] = [arrays[f"callbacks/{index}/{i}"] for i in range(count)]
                vars(callback).update(counters)
            _random_state(state["random"])
            self._restored = None  # from here on, the live objects are ahead of it

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        logs = logs or {}
        # An epoch without validation may lack it; one that validated may not.
        due = not self.monitor.startswith("val_") or any(name.startswith("val_") for name in logs)
        if due and self.monitor not in logs:
            raise ValueError(f"monitor: {self.monitor!r} was not logged, only {', '.join(logs)}")
        value = _number(logs.get(self.monitor))
        if np.isfinite(value) and (self.best is None or (value > self.best if self._maximise else value < self.best)):
            self.best, self.best_epoch = value, epoch
            self._best_model = self._keras_part()  # now, as averaged weights (EMA) replace these at the very end

    def on_train_end(self, logs=None):
        if not self._began:  # nothing was left to train
            self.model.history.epoch = list(self._records)
            return
        for callback in self.callbacks:  # what EarlyStopping does in its own on_train_end, which may come after ours
            if getattr(callback, "restore_best_weights", False) and callback.best_weights is not None:
                self.model.set_weights(callback.best_weights)
        self._save(finished=self.params["epochs"])
        if self.best is None:
            warnings.warn(f"{self.monitor} was never logged as a finite number, so there is no {self.best_path}")
        if self._failure:
            warnings.warn(f"Training ended, but nothing after epoch {self._next_epoch} is saved: {self._failure}")
        if self.copy_to:
            try:
                self._pool.submit(self._copy).result(timeout=self._patience)
            except OSError as error:  # a timeout is one, too
                warnings.warn(f"Training ended, but its end is not in {self.copy_to}: {error!r}")
        self._began = None

    def _save(self, finished=None):
        epoch, model = max(self._records), self.model
        values = [np.array(_number(self._records[epoch].get("loss", 0.0))), *_values(model.weights)]
        numbers = zip(["its loss", *(variable.path for variable in model.weights)], values)
        bad = [name for name, values in numbers if values.dtype.kind == "f" and not np.isfinite(values).all()]
        if bad:
            again = "An exact resume will meet the same again: lower the learning rate."
            warnings.warn(f"Nothing after epoch {self._next_epoch} is saved, as {bad[0]} is nan or infinite. {again}")
            return
        arrays = {f"optimizer/{i}": v for i, v in enumerate(_values(model.optimizer.variables))}
        arrays |= {f"seeds/{i}": v for i, v in enumerate(_values(self._seeds()))}
        counters = [{name: getattr(c, name) for name in _COUNTERS if hasattr(c, name)} for c in self.callbacks]
        for index, values in enumerate(counters):
            if values.get("best_weights") is not None:
                arrays |= {f"callbacks/{index}/{i}": v for i, v in enumerate(values["best_weights"])}
                values["best_weights"] = len(values["best_weights"])
        state = {"epoch": epoch, "next_epoch": finished or epoch + 1, "finished": bool(finished), "format": 1}
        state |= {"best": self.best, "best_epoch": self.best_epoch, "counters": counters, "random": _random_state()}
        state["records"] = [{"epoch": past, "logs": logs} for past, logs in self._records.items()]
        state["fingerprint"] = self._fingerprint()
        try:
            if self._best_model is not None:
                self._best_file, self._best_model = _with_state(self._best_model, state, arrays), None
            # The best one first: were it second, a stop in between would leave a state that takes it for written.
            if self._best_file is not None:
                _write(self.best_path, self._best_file)
                self._best_file = None  # only now, so that a failed save of it is made up for later
            _write(self.saved_path, _with_state(self._keras_part(), state, arrays))
        except OSError as error:
            if not self._failure:
                warnings.warn(f"Could not save epoch {epoch + 1}: {error}. Training goes on; each epoch tries again.")
            self._failure = str(error)
            return
        if self._failure:
            print(f"Saving works again: epoch {epoch + 1} is in {self.saved_path}.", flush=True)
        self._failure, self._next_epoch = None, state["next_epoch"]
        if self.copy_to and (self._copying is None or self._copying.done()):  # a slow Drive gets what is newest then
            if self._copying and (error := self._copying.exception()):
                warnings.warn(f"Could not copy to {self.copy_to}: {error}. Training goes on; each epoch tries again.")
            self._copying = self._pool.submit(self._copy)

    def _keras_part(self, load_again=False):
        """The bytes of the HDF5 file that `model.save` writes; with `load_again`, only if Keras can load it again."""
        logger, quiet = logging.getLogger("absl"), lambda record: "HDF5" not in record.getMessage()
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as afterwards:
            logger.addFilter(quiet)
            afterwards.callback(logger.removeFilter, quiet)  # Keras calls HDF5 a legacy format at each save
            path = Path(folder, "model.hdf5")
            self.model.save(path, include_optimizer=False)  # else Keras strips it from the live model's compile config
            if load_again:
                own = {type(layer).__name__: type(layer) for layer in _all_layers(self.model)}
                keras.models.load_model(path, custom_objects=own, compile=False, safe_mode=False)
            return path.read_bytes()

    def _copy(self):
        # Read in the opposite order of writing: the copy of the best one may be newer than the other, but not older.
        files = [(path.name, path.read_bytes()) for path in (self.saved_path, self.best_path) if path.exists()]
        for name, data in reversed(files):
            target = self.copy_to / name
            if not (target.exists() and target.read_bytes() == data):
                _write(target, data)

    def _interrupt(self, number, frame):
        """Says at Ctrl-C (or Jupyter's Stop) where training will continue: Keras calls no callback then."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._began:
            print(f"\nStopped. Run again to continue with epoch {self._next_epoch + 1}. [{self.directory}]", flush=True)
        stop = KeyboardInterrupt()
        stop._render_traceback_ = lambda: ["KeyboardInterrupt"]  # all that IPython shows: nothing is broken
        raise stop


def _plain(value):
    """The same as JSON would give it back: tuples as lists, arrays and NumPy numbers as lists and numbers."""
    return json.loads(json.dumps(value, default=lambda item: np.asarray(item).tolist()))


def _all_layers(model):
    return [found for layer in getattr(model, "layers", ()) for found in (layer, *_all_layers(layer))]


def _flat(value, path=""):
    """Pairs of path and value of plain data, without what is generated and the current learning rate."""
    if value and isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if key not in _GENERATED:
                yield from _flat(item, f"{path}.{key}" if isinstance(value, dict) else f"{path}[{key}]")
    elif not (path.endswith(".learning_rate") and isinstance(value, (int, float))):
        yield path.strip("."), value


def _values(variables):
    return [np.asarray(keras.ops.convert_to_numpy(variable)) for variable in variables]


def _random_state(state=None):
    """The global random states of Python, NumPy and PyTorch as plain data; with `state`, sets them to it first."""
    if state:
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        np.random.set_state(state["numpy"])
        if torch and state.get("torch"):
            cpu, *devices = (torch.tensor(values, dtype=torch.uint8) for values in state["torch"])
            torch.set_rng_state(cpu)
            torch.cuda.set_rng_state_all(devices[: torch.cuda.device_count()])
    states = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()] if torch else []
    return _plain({"python": random.getstate(), "numpy": np.random.get_state(legacy=False), "torch": states})


def _with_state(keras_part, state, arrays):
    """The bytes of a Keras HDF5 file with our group added, and in it a SHA-256 of the result."""
    buffer = io.BytesIO(keras_part)
    with h5py.File(buffer, "r+") as file:
        file[f"{_GROUP}/state"] = np.frombuffer(json.dumps(_plain(state)).encode(), np.uint8)  # attributes end at 64 KB
        for name, values in arrays.items():
            file[f"{_GROUP}/arrays/{name}"] = values
        file[f"{_GROUP}/sha256"] = np.frombuffer(_MARK + b"0" * 64, np.uint8)
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
        with contextlib.suppress(OSError):  # on Windows and some network drives, folders cannot be flushed
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)  # makes the rename last through a power cut
            os.close(folder)
    finally:
        partial.unlink(missing_ok=True)  # after a failure; else it was renamed
