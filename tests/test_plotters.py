"""The plotters outside a kernel: what they draw, what they write, what they refuse."""

import contextlib
import copy
import datetime
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import keras
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import CLASSES, ROOT
from matplotlib.testing.compare import compare_images

import visual_callbacks
from visual_callbacks import (
    AccLossPlotter,
    ConfusionMatrixPlotter,
    ResumableCheckpoint,
    plot_confusion_matrix,
    plot_history,
    plot_predictions,
)


def fit(model, x, y, callbacks, epochs=2, validation=True, **more):
    validation_data = (x[:30], y[:30]) if validation else None
    return model.fit(
        x, y, 30, epochs, verbose=0, validation_data=validation_data, callbacks=callbacks, **more
    )


def curve(figure, panel, label):
    """The x and y of the line called `label`."""
    (line,) = (line for line in figure.axes[panel].lines if line.get_label() == label)
    return list(line.get_xdata()), list(line.get_ydata())


def key(axes):
    """What the key above the curves says."""
    names = [text for text in axes.texts if text.get_gid().startswith("name of ")]
    return [text.get_text() for text in names if text.get_text()]


@pytest.mark.stack
@pytest.mark.parametrize("labels", ["one-hot", "integers", "integer column"])
def test_both_plotters_write_their_pictures_every_epoch(data, build, labels, tmp_path, capsys):
    x, y = data
    y = {"one-hot": np.eye(3)[y], "integers": y, "integer column": y[:, None]}[labels]
    written = []

    class Watch(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            written.append([path.read_bytes() for path in sorted(tmp_path.glob("*.png"))])

    model = build(
        "categorical_crossentropy" if labels == "one-hot" else "sparse_categorical_crossentropy"
    )
    graphs = ["loss"] if labels == "integers" else ("acc", "loss")
    fit(
        model,
        x,
        y,
        [AccLossPlotter(graphs), ConfusionMatrixPlotter(x, y, CLASSES), Watch()],
        epochs=3,
    )
    assert [len(pictures) for pictures in written] == [2, 2, 2]
    assert (
        len({pictures[0] for pictures in written})
        == len({pictures[1] for pictures in written})
        == 3
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "confusion_matrix.png",
        "training_acc_loss.png",
    ]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    drawn = (
        ["loss", "val_loss"]
        if labels == "integers"
        else ["accuracy", "val_accuracy", "loss", "val_loss"]
    )
    assert all(line.split()[2 : 2 + 2 * len(drawn) : 2] == drawn for line in lines)
    assert [line.endswith("left") for line in lines] == [True, True, False]
    assert all(line.count(".") == len(drawn) for line in lines)
    assert not plt.get_fignums()


@pytest.mark.versions
def test_the_curves_are_what_keras_recorded(data, build):
    x, y = data
    plotter = AccLossPlotter(verbose=0)
    history = fit(build(), x, np.eye(3)[y], [plotter], epochs=4)
    figure = plotter.figure
    assert curve(figure, 0, "training") == ([1, 2, 3, 4], history.history["accuracy"])
    assert curve(figure, 0, "validation") == ([1, 2, 3, 4], history.history["val_accuracy"])
    assert curve(figure, 1, "training") == ([1, 2, 3, 4], history.history["loss"])
    assert curve(figure, 1, "validation") == ([1, 2, 3, 4], history.history["val_loss"])
    again = plot_history(history)
    assert curve(again, 1, "validation") == curve(figure, 1, "validation")


def test_epochs_without_validation_are_left_out_of_its_curve(data, build):
    x, y = data
    plotter = AccLossPlotter(verbose=0)
    history = fit(build(), x, np.eye(3)[y], [plotter], epochs=5, validation_freq=2)
    assert curve(plotter.figure, 1, "validation")[0] == [2, 4]
    drawn = plot_history(history, validation_freq=2)
    assert curve(drawn, 1, "validation") == curve(plotter.figure, 1, "validation")
    assert curve(plot_history(history), 1, "validation")[0] == [2, 4]  # the plotter was there
    plain = fit(build(), x, np.eye(3)[y], [], epochs=5, validation_freq=2)
    for unknown in (None, 1, [1, 2, 3]):
        with pytest.raises(ValueError, match="history: val_accuracy has 2 values for 5"):
            plot_history(plain, validation_freq=unknown)
    for wrong in (0, "2", 2.5):
        with pytest.raises(ValueError, match="validation_freq: expected"):
            plot_history(plain, validation_freq=wrong)
    assert curve(plot_history(plain, validation_freq=np.int64(2)), 1, "validation")[0] == [2, 4]
    in_list = fit(build(), x, np.eye(3)[y], [], epochs=4, validation_freq=[1, 4])
    drawn = plot_history(in_list, validation_freq=[1, 4])
    assert curve(drawn, 1, "validation")[0] == [1, 4]
    others = {"loss": [3, 2], "learning_rate": 0.1, "logged_later": [1]}  # are not drawn
    assert curve(plot_history(others, ["loss"]), 0, "training") == ([1, 2], [3, 2])


@pytest.mark.versions
def test_a_history_is_drawn_as_it_is_though_the_model_was_trained_again(data, build):
    model = build()
    trainings = []
    for callbacks in ([AccLossPlotter(verbose=0)], []):
        trainings.append(fit(model, data[0], np.eye(3)[data[1]], callbacks, epochs=2))
    for history in trainings:
        assert curve(plot_history(history), 1, "training")[1] == history.history["loss"]


@pytest.mark.versions
def test_small_and_large_numbers_are_told(data, build, capsys):
    plotter = AccLossPlotter(["loss"])
    small = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: logs.update(loss=0.00002, val_loss=3e9)
    )
    fit(build(), data[0], np.eye(3)[data[1]], [small, plotter])
    assert "loss 2e-05  val_loss 3e+09" in capsys.readouterr().out
    panel = plot_history({"loss": [3e-4, 2e-4]}, ["loss"]).axes[0]
    assert panel.get_ylabel() == f"loss ({panel.yaxis.get_major_formatter().get_offset()})"
    assert "4" in panel.get_ylabel() and not panel.yaxis.offsetText.get_visible()
    (note,) = [text.get_text() for text in panel.texts if text.get_gid() == "note"]
    assert note == ""
    panel = plot_history({"loss": [np.nan, np.inf]}, ["loss"]).axes[0]
    (note,) = [text.get_text() for text in panel.texts if text.get_gid() == "note"]
    assert note == "no value is a finite number"


def test_where_keras_prints_no_lines_are_added(data, build, capsys):
    options = dict(epochs=1, callbacks=[AccLossPlotter()])
    build().fit(data[0], np.eye(3)[data[1]], 30, verbose=2, **options)
    assert "epoch 1/1" not in capsys.readouterr().out


def test_pictures_are_of_the_kind_that_their_name_says(data, build, tmp_path):
    fit(build(), data[0], np.eye(3)[data[1]], [AccLossPlotter(path="x.jpg")], epochs=1)
    assert (tmp_path / "x.jpg").read_bytes().startswith(b"\xff\xd8")


def test_a_title_is_never_cut_at_the_edge():
    long = "Confusion matrix (a data set with a long name) · epoch 10"
    figure = plot_confusion_matrix(np.eye(3), CLASSES, title=long)
    title = figure.axes[0].title.get_window_extent()
    assert 0 <= title.x0 and title.x1 <= figure.bbox.width
    part, _ = matplotlib.figure.Figure(figsize=(6, 3)).subfigures(1, 2)
    plot_confusion_matrix(np.eye(3), CLASSES, title=long, ax=part.add_subplot())
    assert 0 <= part.axes[0].title.get_window_extent().x0


def test_without_validation_data_the_training_curve_is_marked(data, build):
    x, y = data
    plotter = AccLossPlotter(verbose=0)
    history = fit(
        build(), x, np.eye(3)[y], [plotter, ConfusionMatrixPlotter(x, y, CLASSES)], validation=False
    )
    axes = plotter.figure.axes[1]
    best = min(history.history["loss"])
    assert key(axes) == [
        "training",
        f"best {best:.4g}, epoch {np.argmin(history.history['loss']) + 1}",
    ]


@pytest.mark.parametrize("logged", ["acc", "accuracy"])
def test_accuracy_is_found_under_both_names(logged):
    figure = plot_history(
        {logged: [0.1, 0.4], f"val_{logged}": [0.2, 0.3], "loss": [2, 1]}, graphs=["acc", "loss"]
    )
    assert curve(figure, 0, "validation") == ([1, 2], [0.2, 0.3])
    assert "best 0.3, epoch 2" in key(figure.axes[0])


def test_a_metric_that_is_not_logged_is_said_to_be_missing():
    figure = plot_history({"loss": [2, 1]}, graphs=["acc", "loss"])
    assert any("no 'acc' was logged" in text.get_text() for text in figure.axes[0].texts)
    assert not any("was logged" in text.get_text() for text in figure.axes[1].texts)


def test_the_seam_of_a_resumed_training_is_marked(data, build):
    x, y = data
    plotter, model = AccLossPlotter(verbose=0), build()
    fit(model, x, np.eye(3)[y], [plotter], epochs=2)
    fit(model, x, np.eye(3)[y], [plotter], epochs=4, initial_epoch=2)
    assert curve(plotter.figure, 1, "training")[0] == [1, 2, 3, 4]
    assert curve(plotter.figure, 1, "resumed after epoch 2")[0] == [2, 2]
    fit(model, x, np.eye(3)[y], [plotter], epochs=2)  # from the start again: the old curve is gone
    assert curve(plotter.figure, 1, "training")[0] == [1, 2]


# What is better ----


@pytest.mark.parametrize(
    "name, epoch",
    [("accent_loss", 2), ("f1_loss", 2), ("iou_loss", 2), ("mae", 2), ("accuracy", 3), ("auc", 3)]
    + [("dice", None), ("psnr", None), ("accents", None)],
)
def test_the_best_epoch_is_marked_where_it_is_known_what_is_better(name, epoch):
    said = key(plot_history({name: [3.0, 1.0, 5.0]}, [name]).axes[0])
    assert [text.split()[-1] for text in said if text.startswith("best")] == (
        [str(epoch)] if epoch else []
    )


@pytest.mark.stack
def test_keras_is_asked_what_is_better_of_a_compiled_metric(data, build):
    plotter = AccLossPlotter(["overlap"], verbose=0)
    model = build(metrics=[keras.metrics.OneHotMeanIoU(3, name="overlap")])
    history = fit(model, data[0], np.eye(3)[data[1]], [plotter], epochs=4)
    best = max(history.history["val_overlap"])
    for figure in (plotter.figure, plot_history(history, ["overlap"])):
        assert any(text.startswith(f"best {best:.4g}") for text in key(figure.axes[0]))


# Nothing that only draws ends a training ----

ODD = {
    "a string": "warm-up",
    "a date": datetime.datetime(2026, 1, 1),
    "a dict": {"a": 1},
    "ragged": [[1], [1, 2]],
    "complex": 1 + 2j,
    "too large": 1e308,
    "None": None,
    "empty": np.zeros(0),
    "too large for a float": 10**400,
}


@pytest.mark.parametrize("name", [pytest.param("phase", marks=pytest.mark.slow), "loss"])
def test_a_value_that_cannot_be_drawn_is_said_once_and_the_rest_is_drawn(data, build, name):
    x, y = data[0], np.eye(3)[data[1]]
    model = build()
    for odd, value in ODD.items():

        def add(epoch, logs, odd=odd, value=value):
            logs[name] = -value if odd == "too large" and epoch == 1 else value

        plotter = AccLossPlotter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            history = fit(model, x, y, [keras.callbacks.LambdaCallback(on_epoch_end=add), plotter])
        said = [str(warning.message) for warning in caught if "drawn" in str(warning.message)]
        assert len(said) == (name == "loss"), (odd, said)
        assert curve(plotter.figure, 0, "validation")[1] == history.history["val_accuracy"], odd
    again = AccLossPlotter(verbose=0)  # and a later training of this model is not harmed
    history = fit(model, x, y, [again], epochs=2)
    assert curve(again.figure, 1, "training")[1] == history.history["loss"]


class Broken:
    """An object of which nothing can be had."""

    def __float__(self):
        raise RuntimeError("no number")

    __array__ = __repr__ = __float__


@pytest.mark.slow
def test_whatever_goes_wrong_costs_no_training(data, build, monkeypatch, tmp_path):
    """Objects that raise, names that are no strings, output that cannot be written, a list that says no epochs."""
    x, y = data[0], np.eye(3)[data[1]]
    model = build()
    for odd in ({"loss": Broken()}, {0: 0.5}, {None: 0.5}):
        add = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs, odd=odd: logs.update(odd)
        )
        assert fit(model, x, y, [add, AccLossPlotter()]).epoch == [0, 1]
    own = keras.callbacks.CallbackList([AccLossPlotter()], model=model, add_history=True)
    assert fit(model, x, y, own).epoch == [0, 1]
    with monkeypatch.context() as patch, open("/dev/full", "w") as full:
        patch.setattr("sys.stdout", full)
        assert fit(model, x, y, [AccLossPlotter()]).epoch == [0, 1]
        patch.setattr(full, "flush", lambda: None)
        with contextlib.suppress(OSError):
            full.close()
    os.mkfifo(tmp_path / "pipe")
    plot = AccLossPlotter(verbose=0, path=tmp_path / "pipe")
    assert fit(model, x, y, [plot]).epoch == [0, 1] and (tmp_path / "pipe").is_fifo()
    assert plot_history(keras.callbacks.History()).axes


@pytest.mark.versions
def test_names_are_not_read_as_mathematics(data, build):
    x, y = data
    names = ["5$_^$", "a$b", "$\\frac{1$"]
    plotter, curves = (
        ConfusionMatrixPlotter(x, y, names, title="5$_^$"),
        AccLossPlotter(["5$_^$"], title="5$_^$"),
    )
    add = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: logs.update({"5$_^$": 1.0})
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(build(), x, np.eye(3)[y], [add, plotter, curves], epochs=1)
    assert plotter.figure.axes[0].get_xticklabels()[0].get_text() == "5$_^$"


def test_a_picture_that_fails_is_said_once_and_tried_again(data, build, monkeypatch):
    model, plotter = build(), ConfusionMatrixPlotter(*data, CLASSES)

    def fail(*_, **__):
        raise RuntimeError("no memory")

    monkeypatch.setattr(type(model), "predict", fail)
    with pytest.warns(
        UserWarning, match="ConfusionMatrixPlotter cannot draw: RuntimeError.*Training goes on"
    ) as said:
        history = fit(model, data[0], np.eye(3)[data[1]], [plotter], epochs=3)
    said = [warning for warning in said if "cannot draw" in str(warning.message)]
    assert len(said) == 1 and history.epoch == [0, 1, 2]


def test_a_metric_with_a_value_a_class_is_drawn_by_its_mean(data, build):
    plotter = AccLossPlotter(["f1_score"], verbose=0)
    history = fit(build(metrics=[keras.metrics.F1Score()]), data[0], np.eye(3)[data[1]], [plotter])
    means = [float(np.mean(values)) for values in history.history["f1_score"]]
    for figure in (plotter.figure, plot_history(history, ["f1_score"])):
        assert np.allclose(curve(figure, 0, "training")[1], means)


def test_plotters_can_be_copied_deeply_as_tuners_do(data, build):
    x, y = data
    plotters = [AccLossPlotter(verbose=0), ConfusionMatrixPlotter(x, y, CLASSES)]
    for _ in range(2):
        plotters = copy.deepcopy(plotters)  # the second time, they have drawn
        fit(build(), x, np.eye(3)[y], plotters, epochs=1)
    assert curve(plotters[0].figure, 1, "training")[0] == [1]
    assert plotters[1].figure is not None


def curves(epochs):
    x = 1 / (1 + np.arange(epochs) / 9)
    return {
        "accuracy": 1 - 0.9 * x,
        "val_accuracy": 0.95 - 0.85 * x,
        "loss": 2 * x,
        "val_loss": 0.1 + 2 * x**1.3,
    }


MATRIX = np.random.default_rng(0).integers(0, 40, (10, 10)) + 400 * np.eye(10, dtype=int)
NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()
PHOTOS = np.random.default_rng(0).random((3, 6, 6, 3))
THOUGHTS = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.4, 0.35, 0.25]])
EVIDENCE = np.linspace(-0.1, 0.5, 3 * 36).reshape(3, 6, 6)
PICTURES = {
    "predictions": lambda again: plot_predictions(
        PHOTOS, THOUGHTS, CLASSES, [0, 0, 1], EVIDENCE, "made up"
    ),
    "history": lambda again: plot_history(
        curves(40), resumed_at=12, title="made up · epoch 40/99", figure=again
    ),
    "first_epochs": lambda again: plot_history(curves(4), ["loss"], figure=again),
    "confusion_matrix": lambda again: plot_confusion_matrix(
        MATRIX, NAMES, ax=again and again.axes[0]
    ),
    "shares": lambda again: plot_confusion_matrix(
        np.eye(2), ["no", "yes"], True, "Greens", ax=again and again.axes[0]
    ),
}
REDRAWN = [name for name in PICTURES if name != "predictions"]
OTHERS = {  # of the same shape, with other contents
    "history": lambda: plot_history(curves(60), resumed_at=3),
    "first_epochs": lambda: plot_history(curves(60), ["loss"], resumed_at=3),
    "confusion_matrix": lambda: plot_confusion_matrix(np.ones((10, 10)), NAMES, title="Other"),
    "shares": lambda: plot_confusion_matrix(
        np.ones((2, 2)), ["no", "yes"], True, "Greens", "Other"
    ),
}


@pytest.mark.parametrize("name", PICTURES)
def test_the_pictures_look_as_they_did(name, tmp_path):
    """But for letters, to which each version of Matplotlib gives another size; other tests read them.

    To renew tests/reference after a wished-for change: look at what this test leaves in tests/artefacts, and copy it.
    """
    artefact, figure = ROOT / "tests" / "artefacts" / f"{name}.png", PICTURES[name](None)
    figure.canvas.draw()
    for text in figure.findobj(matplotlib.text.Text):
        text.set_visible(False)
    artefact.parent.mkdir(exist_ok=True)
    figure.savefig(artefact)
    # Root mean square of the differences, of 255: a curve or a marker that is missing makes more than 2.
    assert not compare_images(ROOT / "tests" / "reference" / f"{name}.png", artefact, tol=1)


@pytest.mark.versions
@pytest.mark.parametrize("name", REDRAWN)
def test_drawing_again_in_the_same_figure_equals_drawing_anew(name):
    others = OTHERS[name]()
    again, anew = PICTURES[name](others), PICTURES[name](None)
    assert again is others
    pixels = []
    for figure in (again, anew):
        figure.canvas.draw()
        pixels.append(np.asarray(figure.canvas.buffer_rgba()))
    assert (pixels[0] == pixels[1]).all()


def test_each_plotter_keeps_its_one_figure(data, build):
    x, y = data
    plotters = [AccLossPlotter(verbose=0), ConfusionMatrixPlotter(x, y, CLASSES)]
    figures = [set(), set()]
    for plotter, seen in zip(plotters, figures):
        plotter._keep_picture = lambda plotter=plotter, seen=seen: seen.add(id(plotter.figure))
    fit(build(), x, np.eye(3)[y], plotters, epochs=3)
    assert [len(seen) for seen in figures] == [1, 1]


class Titles(list):
    """What stands above the curves at each redraw of a plotter, on a clock that a test can move."""

    def __init__(self, plotter, monkeypatch):
        self.now, self.last_x, self.plotter = 0.0, [], plotter
        monkeypatch.setattr(visual_callbacks, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(plotter, "_keep_picture", self.note)

    def note(self):
        figure = self.plotter.figure
        self.append(figure.texts[0].get_text())
        (inside,) = (line for line in figure.axes[1].lines if line.get_gid() == "inside")
        if len(inside.get_xdata()):
            self.last_x.append(float(inside.get_xdata()[-1]))

    def slow_batches(self, seconds, first=0, test=0):
        """Each training batch takes so long, the first of all `first` longer; a validation batch takes `test`."""
        still_to_compile = [first]

        def pass_by(batch, logs):
            self.now += seconds
            if still_to_compile:
                self.now += still_to_compile.pop()

        def test_batch(batch, logs):
            self.now += test

        return keras.callbacks.LambdaCallback(
            on_train_batch_begin=pass_by, on_test_batch_begin=test_batch
        )

    def left(self):
        """The seconds that are left by each title that says so, with the time when it did."""
        units = {"h": 3600, "min": 60, "s": 1}
        said = []
        for title in self:
            if "left" in title:
                words = title.split(", ")[1].split(" left")[0].split()
                said.append(
                    sum(int(number) * units[unit] for number, unit in zip(words[::2], words[1::2]))
                )
        return said


def test_a_long_epoch_shows_its_running_values_and_the_time_left(data, build, monkeypatch):
    x, y = data[0], np.eye(3)[data[1]]
    plotter, model = AccLossPlotter(verbose=0), build()
    titles = Titles(plotter, monkeypatch)
    callbacks = [titles.slow_batches(0.7, first=100), plotter]
    model.fit(x, y, 10, 2, verbose=0, callbacks=callbacks)
    assert [title.split(" · ")[0] for title in titles] == [
        "starting",  # before the first batch
        "11% of epoch 1/2",  # which says nothing of how fast the others will be
        "44% of epoch 1/2, 10 s left",
        "78% of epoch 1/2, 8 s left",
        "epoch 1/2, 6 s left",
        "33% of epoch 2/2, 4 s left",
        "67% of epoch 2/2, 2 s left",
        "100% of epoch 2/2, 0 s left",
        "epoch 2/2",
        "2 epochs in 1 min 53 s",
    ]
    assert np.allclose(titles.last_x, [1 / 9, 4 / 9, 7 / 9, 1, 4 / 3, 5 / 3, 2, 2, 2], atol=0.05)
    titles.clear()
    model.fit(x, y, 10, 10, verbose=0, callbacks=callbacks, initial_epoch=5)
    assert titles[2].startswith("67% of epoch 6/10, 27 s left")  # right after a resume, too
    assert titles[-1].startswith("10 epochs · ")  # how long the first five took is not known


def test_a_long_epoch_of_unknown_length_shows_its_running_values(data, build, monkeypatch):
    x, y = data[0], np.eye(3)[data[1]]
    plotter, model = AccLossPlotter(verbose=0), build()
    titles = Titles(plotter, monkeypatch)
    batches = ((x[start : start + 10], y[start : start + 10]) for start in range(0, 90, 10))
    model.fit(batches, verbose=0, callbacks=[titles.slow_batches(2.5), plotter])
    shown = [title.split(" · ")[0] for title in titles]
    assert shown[:3] == ["starting", "batch 1 of epoch 1/1", "batch 2 of epoch 1/1"]


@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param([1, 1, 1, 1], id="even", marks=pytest.mark.slow),
        pytest.param([1, 3, 3, 3], id="longer"),
        pytest.param([3, 1, 1, 1], id="shorter", marks=pytest.mark.slow),
    ],
)
def test_the_time_left_is_right_after_a_tenth_of_an_epoch(data, build, monkeypatch, seconds):
    """Within 25%, as soon as a tenth of an epoch of this length was seen; with a validation, and with compiling."""
    x, y = data[0], np.eye(3)[data[1]]
    plotter, model = AccLossPlotter(verbose=0), build()
    titles = Titles(plotter, monkeypatch)
    clock = titles.slow_batches(0, first=300, test=2)
    spoken = []

    class Epochs(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.seconds = seconds[epoch]

        def on_train_batch_begin(self, batch, logs=None):
            titles.now += 2 * self.seconds

    note = titles.note

    def at(*_):
        note()
        spoken.append((titles.now, titles[-1]))

    monkeypatch.setattr(plotter, "_keep_picture", at)
    callbacks = [clock, Epochs(), plotter]
    model.fit(
        x,
        y,
        3,
        4,
        verbose=0,
        validation_data=(x[:30], y[:30]),
        validation_batch_size=10,
        callbacks=callbacks,
    )
    end = titles.now
    checked = 0
    for now, title in spoken:
        share, _, rest = title.partition("% of epoch ")
        epoch = int(rest.split("/")[0]) - 1 if rest else None
        if rest and int(share) >= 14 and len(set(seconds[epoch:])) == 1:
            titles[:] = [title]
            (left,) = titles.left()
            assert abs(left - (end - now)) <= 0.25 * (end - now) + 1, (title, end - now)
            checked += 1
    assert checked > 60


def test_the_first_epochs_are_a_curve(data, build):
    """Samples inside an epoch, at the same places however fast the training is; of later epochs none are kept."""
    x, y = data[0], np.eye(3)[data[1]]
    plotter, model = AccLossPlotter(verbose=0), build()
    model.run_eagerly = False
    plotter._keep_picture = lambda: None
    history = model.fit(x, y, 3, 20, verbose=0, callbacks=[plotter])
    (inside,) = (line for line in plotter.figure.axes[1].lines if line.get_gid() == "inside")
    across, values = inside.get_data()
    is_there = ~np.isnan(values)
    assert np.allclose(across[is_there], np.arange(1, 15 * 20 + 1) / 20)
    at_ends = dict(zip(np.round(across[is_there], 6), values[is_there]))
    assert np.allclose([at_ends[epoch] for epoch in range(1, 16)], history.history["loss"][:15])


def test_the_axis_of_an_accuracy_does_not_follow_it(data, build):
    def limits(values):
        return plot_history({"accuracy": values}, ["acc"]).axes[0].get_ylim()

    assert limits([0.1]) == limits([0.1, 0.49]) == limits([0.1, 0.12, 0.13]) == (0, 1.02)
    low, high = limits([0.93, 0.95, 0.96])  # a closer look
    assert 0.9 < low < 0.93 and 0.96 < high < 1
    plotter = AccLossPlotter(verbose=0)
    fit(build(), data[0], np.eye(3)[data[1]], [plotter])
    (line,) = (line for line in plotter.figure.axes[0].lines if line.get_gid() == "guessing")
    assert list(line.get_ydata()) == [1 / 3, 1 / 3]
    assert "guessing: 33%" in [text.get_text() for text in plotter.figure.axes[0].texts]
    assert plot_history({"loss": [2.0, 1.0]}, ["loss"]).axes[0].get_ylim() != (0, 1.02)


STOPPED = """
import keras, numpy as np
from visual_callbacks import AccLossPlotter
model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
model.compile("sgd", "mse", run_eagerly=True)
plotter = AccLossPlotter(["loss"], verbose=0)
def stop(epoch, logs):
    if epoch == 2:
        raise KeyboardInterrupt
import atexit
atexit.register(lambda: print(plotter.figure.texts[0].get_text()))  # called last, as it is registered first
model.fit(np.zeros((4, 2)), np.zeros(4), epochs=5, verbose=0,
          callbacks=[plotter, keras.callbacks.LambdaCallback(on_epoch_begin=stop)])
"""


def test_after_a_stop_the_picture_says_so(tmp_path):
    """Here in a script, which stops at Ctrl-C; in a kernel, see test_kernel.py."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", STOPPED], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert "KeyboardInterrupt" in result.stderr
    assert (tmp_path / "training_acc_loss.png").exists()
    assert result.stdout.startswith("stopped in epoch 3/5"), result.stdout


GONE_ON = STOPPED.replace("model.fit(", "def train(*others):\n    model.fit(").replace(
    "callbacks=[plotter, keras.callbacks.LambdaCallback(on_epoch_begin=stop)]",
    "callbacks=[plotter, *others]",
)
GONE_ON += """
try:
    train(keras.callbacks.LambdaCallback(on_epoch_begin=stop))
except KeyboardInterrupt:
    train()
"""


def test_a_training_that_went_on_after_a_stop_is_not_called_stopped(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", GONE_ON]
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.startswith("5 epochs in "), result.stdout + result.stderr


def test_short_epochs_are_drawn_once(data, build, monkeypatch):
    plotter = AccLossPlotter(verbose=0)
    titles = Titles(plotter, monkeypatch)
    callbacks = [titles.slow_batches(0.2), plotter]
    build().fit(data[0], np.eye(3)[data[1]], 10, 3, verbose=0, callbacks=callbacks)
    assert len(titles) == 1 + 3 + 1


@pytest.mark.stack
def test_the_learning_rate_is_shown_as_it_changes(data, build, monkeypatch):
    plotter = AccLossPlotter(verbose=0)
    titles = Titles(plotter, monkeypatch)
    halve = keras.callbacks.LearningRateScheduler(lambda epoch: 0.5 ** (epoch + 1))
    fit(build(), data[0], np.eye(3)[data[1]], [halve, plotter], epochs=2)
    assert [title.split(" · ")[-1] for title in titles[1:]] == [
        f"learning rate {rate}" for rate in (0.5, 0.25, 0.25)
    ]


def test_any_logged_metric_gets_a_panel_on_request(data, build):
    plotter = AccLossPlotter(["loss", "mean_io_u", "recall"], verbose=0)
    model = build(
        metrics=[
            keras.metrics.OneHotMeanIoU(3, name="mean_io_u"),
            keras.metrics.Recall(name="recall"),
        ]
    )
    history = fit(model, data[0], np.eye(3)[data[1]], [plotter], epochs=3)
    for panel, name in enumerate(("loss", "mean_io_u", "recall")):
        assert plotter.figure.axes[panel].get_ylabel() == name
        assert curve(plotter.figure, panel, "validation")[1] == history.history[f"val_{name}"]


@pytest.mark.versions
def test_text_stays_inside_the_picture_and_apart():
    history = {
        "accuracy": [0.1, 0.9],
        "val_accuracy": [0.2, 0.8],
        "loss": [2, 1],
        "val_loss": [200.0, 100.0],
    }
    figures = [
        plot_history(
            history,
            resumed_at=1,
            title="data · 90% of epoch 100/100, 2 h 3 min left · learning rate 1e-05",
        )
    ]
    figures += [
        plot_confusion_matrix(np.eye(n) * 5000, [f"{'long ' * (n < 20)}name {i}" for i in range(n)])
        for n in (2, 10, 100)
    ]
    for figure in figures:
        drawn, whole = figure.get_tightbbox(), figure.bbox_inches
        assert drawn.x0 >= 0 and drawn.y0 >= 0 and drawn.x1 <= whole.x1 and drawn.y1 <= whole.y1, (
            drawn
        )
    boxes = [
        text.get_window_extent()
        for text in figures[0].findobj(matplotlib.text.Text)
        if text.get_text().strip()
    ]
    boxes = [box.padded(-1) for box in boxes if figures[0].bbox.overlaps(box) and box.x0 > 0]
    assert len(boxes) > 20
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if a.overlaps(b)]


@pytest.mark.stack
def test_binary_output(data, build):
    x, y = data
    y = (y == 1).astype(int)
    plotter = ConfusionMatrixPlotter(x, y, ["no", "yes"])
    model = build("binary_crossentropy", outputs=1)
    fit(model, x, y, [plotter], epochs=1)
    predicted = model.predict(x, verbose=0)[:, 0] > 0.5
    assert plotter.confusion_matrix().tolist() == [
        [int(((y == i) & (predicted == j)).sum()) for j in (0, 1)] for i in (0, 1)
    ]


@pytest.mark.stack
@pytest.mark.parametrize("one_hot", [True, False])
def test_the_compiled_metric_saves_the_second_prediction(data, build, one_hot, monkeypatch):
    x, y = data
    if one_hot:
        y, loss, metric = np.eye(3)[y], "categorical_crossentropy", keras.metrics.OneHotMeanIoU(3)
    else:
        loss, metric = (
            "sparse_categorical_crossentropy",
            keras.metrics.MeanIoU(3, sparse_y_pred=False),
        )
    model, plotter = (
        build(loss, metrics=["accuracy", metric]),
        ConfusionMatrixPlotter(x[:30], y[:30], CLASSES),
    )
    matrices = []

    class Watch(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            matrices.append(plotter.confusion_matrix())

    with monkeypatch.context() as patch:
        patch.setattr(
            type(model), "predict", lambda *_, **__: pytest.fail("predicted a second time")
        )
        fit(model, x, y, [plotter, Watch()], epochs=1)
    predicted, true = model.predict(x[:30], verbose=0).argmax(1), data[1][:30]
    assert matrices[0].tolist() == [
        [int(((true == i) & (predicted == j)).sum()) for j in range(3)] for i in range(3)
    ]


class Matrices(keras.callbacks.Callback):
    """What a plotter takes for the matrix at the end of each epoch, and what it is."""

    def __init__(self, plotter, x, y):
        super().__init__()
        self.plotter, self.x, self.y = plotter, x, y
        self.shown, self.right = [], []

    def on_epoch_end(self, epoch, logs=None):
        self.shown.append(self.plotter.confusion_matrix().tolist())
        predicted = self.model.predict(self.x, verbose=0).argmax(1)
        self.right.append(
            [[int(((self.y == i) & (predicted == j)).sum()) for j in range(3)] for i in range(3)]
        )


@pytest.mark.stack
@pytest.mark.parametrize(
    "validation", ["other images", "none", "every second epoch", "weighted", "other images before"]
)
def test_a_compiled_metrics_matrix_of_other_images_is_not_taken(data, build, validation):
    """All these sets have as many images of each class."""
    x, y = data
    ours, labels = -x[30:60], y[30:60]
    plotter = ConfusionMatrixPlotter(ours, labels, CLASSES)
    look = Matrices(plotter, ours, labels)
    model = build(metrics=[keras.metrics.OneHotMeanIoU(3)])
    one_hot = np.eye(3)
    options = {
        "other images": {"validation_data": (x[:30], one_hot[y[:30]])},
        "none": {},
        "every second epoch": {"validation_data": (ours, one_hot[labels]), "validation_freq": 2},
        "weighted": {
            "validation_data": (ours, one_hot[labels], np.r_[np.full(15, 2.0), np.zeros(15)])
        },
        "other images before": {"validation_data": (ours, one_hot[labels])},
    }[validation]
    callbacks = [plotter, look]
    if validation == "other images before":  # which the metric holds when the plotter is asked
        other = lambda epoch, logs: model.evaluate(x[:30], one_hot[y[:30]], verbose=0)  # noqa: E731
        callbacks.insert(0, keras.callbacks.LambdaCallback(on_epoch_end=other))
    model.fit(x[30:60], one_hot[y[30:60]], 10, 4, verbose=0, callbacks=callbacks, **options)
    assert look.shown == look.right
    plotter.model.set_weights([-weights for weights in model.get_weights()])
    look.on_epoch_end(4)
    assert look.shown == look.right  # after training, too


def test_the_matrix_of_a_compiled_metric_is_only_of_the_pass_that_ended(data, build):
    """Not of what another callback has evaluated since, nor of a training that was interrupted; and it is a copy."""
    x, y = data
    one_hot = np.eye(3)[y]
    model = build(metrics=[keras.metrics.OneHotMeanIoU(3)])
    plotter = ConfusionMatrixPlotter(x[:30], y[:30], CLASSES)
    look = Matrices(plotter, x[:30], y[:30])
    other = keras.callbacks.Callback()
    other.on_test_end = lambda logs=None: model.evaluate(-x[30:60], one_hot[30:60], verbose=0)
    stop = keras.callbacks.Callback()

    def end(epoch, logs=None):
        plotter.confusion_matrix()[:] = 7
        assert plotter.confusion_matrix().max() != 7
        raise InterruptedError

    stop.on_epoch_end = end
    for callbacks in ([other, plotter, look], [plotter, look, stop]):
        with contextlib.suppress(InterruptedError):
            model.fit(
                x,
                one_hot,
                30,
                1,
                verbose=0,
                validation_data=(x[:30], one_hot[:30]),
                callbacks=callbacks,
            )
        model.set_weights([-weights for weights in model.get_weights()])
        look.on_epoch_end(0)
        model.evaluate(x[:30], one_hot[:30], verbose=0, callbacks=[plotter])
        model.set_weights([-weights for weights in model.get_weights()])
        look.on_epoch_end(0)
    assert look.shown == look.right and len(look.shown) == 6


def test_several_labels_an_image_are_refused(data):
    labels = np.eye(3)[data[1]]
    labels[5, :2] = 1
    with pytest.raises(ValueError, match="Y_val: expected one label per image"):
        ConfusionMatrixPlotter(data[0], labels, CLASSES)
    with pytest.raises(ValueError, match="Y_val: expected one label per image"):
        ConfusionMatrixPlotter(data[0], 0.9 * np.eye(3)[data[1]], CLASSES)


@pytest.mark.parametrize(
    "loss, middle",
    [
        (keras.losses.BinaryCrossentropy(from_logits=True), 0.0),
        (keras.losses.BinaryCrossentropy(), 0.5),
        ("binary_crossentropy", 0.5),
        ("mse", 0.5),  # whose scores may be below 0 or above 1
        ("hinge", 0.0),
        (
            lambda true, scores: keras.ops.mean((true - scores) ** 2),
            0.0,
        ),  # as far as its scores tell
    ],
)
def test_one_output_is_cut_where_its_loss_has_the_middle(data, build, loss, middle):
    x, y = data
    y = (y == 1).astype(int)
    model = build(loss, outputs=1)
    if middle == 0 or loss == "mse":
        model.layers[-1].activation = keras.activations.linear
    model.layers[-1].bias.assign([0.3 - middle])
    plotter = ConfusionMatrixPlotter(x, y, ["no", "yes"])
    plotter.set_model(model)
    predicted = model.predict(x, verbose=0)[:, 0] > middle
    expected = [[int(((y == i) & (predicted == j)).sum()) for j in (0, 1)] for i in (0, 1)]
    assert plotter.confusion_matrix().tolist() == expected


@pytest.mark.versions
def test_a_confusion_matrix_shows_counts_shares_and_recall():
    matrix = [[3, 1, 0], [0, 4, 0], [2, 0, 0]]
    axes = plot_confusion_matrix(matrix, CLASSES).axes[0]
    assert [text.get_text() for text in axes.texts] == ["3", "1", "0", "0", "4", "0", "2", "0", "0"]
    assert [label.get_text().split() for label in axes.get_yticklabels()] == [
        ["ant", "75%"],
        ["bee", "100%"],
        ["cow", "0%"],
    ]
    shares = plot_confusion_matrix(matrix, CLASSES, normalize=True).axes[0]
    assert shares.texts[0].get_text() == "0.75" and np.allclose(
        shares.images[0].get_array()[0], [0.75, 0.25, 0]
    )
    assert not plot_confusion_matrix(np.eye(100), range(100)).axes[0].texts
    ax = plt.figure().add_subplot()
    assert plot_confusion_matrix(matrix, CLASSES, ax=ax, cmap=plt.cm.Greens) is ax.figure
    plt.close("all")


@pytest.mark.versions
def test_a_matrix_is_changed_in_place_with_all_that_is_asked_for():
    figure = plot_confusion_matrix([[3, 1], [0, 4]], ["ant", "bee"])
    ax = figure.axes[0]
    plot_confusion_matrix([[3, 1], [0, 4]], ["ant", "bee"], normalize=True, cmap="Reds", ax=ax)
    assert ax.images[0].get_cmap().name == "Reds"
    assert ax.images[0].colorbar.ax.get_ylabel() == "share of the true class"
    with pytest.raises(ValueError, match=r"ax: expected .* one of \(3, 3\), got \(2, 2\)"):
        plot_confusion_matrix(np.eye(3), CLASSES, ax=ax)


class Inside(keras.callbacks.Callback):
    """Calls other callbacks, as that of a library may."""

    def __init__(self, *others):
        super().__init__()
        self.others = others

    def set_model(self, model):
        super().set_model(model)
        for other in self.others:
            other.set_model(model)

    def set_params(self, params):
        super().set_params(params)
        for other in self.others:
            other.set_params(params)

    def on_train_begin(self, logs=None):
        for other in self.others:
            other.on_train_begin(logs)

    def on_epoch_begin(self, epoch, logs=None):
        for other in self.others:
            other.on_epoch_begin(epoch, logs)

    def on_epoch_end(self, epoch, logs=None):
        for other in self.others:
            other.on_epoch_end(epoch, logs)


def test_plotters_inside_of_another_callback_draw_their_own(data, build):
    x, y = data
    first = ConfusionMatrixPlotter(x[:30], y[:30], CLASSES)
    second = ConfusionMatrixPlotter(x[30:], y[30:], CLASSES)
    third = ConfusionMatrixPlotter(x[:50], y[:50], CLASSES)
    model = build()
    fit(model, x, np.eye(3)[y], [Inside(first, second), third])
    for plotter in (first, second, third):
        shown = [int(text.get_text()) for text in plotter.figure.axes[0].texts]
        assert shown == plotter.confusion_matrix().ravel().tolist()


def test_a_model_that_answers_nan_is_not_drawn_as_if_it_answered(data, build):
    x, y = data
    model, plotter = build(), ConfusionMatrixPlotter(x, y, CLASSES)

    def break_it(epoch, logs):
        if epoch == 1:
            model.layers[0].bias.assign(np.full(12, np.nan))

    breaking = keras.callbacks.LambdaCallback(on_epoch_end=break_it)
    with pytest.warns(UserWarning, match="cannot draw: .*bias is nan or infinite"):
        fit(model, x, np.eye(3)[y], [breaking, plotter], epochs=2)


def test_every_n_epochs_and_the_last(data, build):
    x, y = data
    plotter, drawn = ConfusionMatrixPlotter(x, y, CLASSES, every=2), []
    plotter._keep_picture = lambda: drawn.append(plotter.figure.axes[0].get_title())
    fit(build(), x, np.eye(3)[y], [plotter], epochs=5)
    assert drawn == [
        "Confusion Matrix · " + when for when in ("after epoch 2", "epoch 2", "epoch 4", "epoch 5")
    ]


def test_the_epoch_in_which_another_callback_stops_the_training_is_drawn(data, build):
    x, y = data
    plotter, model = ConfusionMatrixPlotter(x, y, CLASSES, every=3), build()

    def stop(epoch, logs):
        model.stop_training = epoch == 1

    callbacks = [keras.callbacks.LambdaCallback(on_epoch_end=stop), plotter]
    fit(model, x, np.eye(3)[y], callbacks, epochs=9)
    assert plotter.figure.axes[0].get_title().endswith("epoch 2")


@pytest.mark.stack
def test_a_resumed_training_begins_with_the_matrix_of_where_it_stands(data, build, tmp_path):
    x, y = data
    shown = []

    def show(plotter):
        axes = plotter.figure.axes[0]
        shown.append((axes.get_title().split("· ")[1], [text.get_text() for text in axes.texts]))

    for _ in range(2):
        model, plotter = build(), ConfusionMatrixPlotter(x, y, CLASSES)
        plotter._keep_picture = lambda plotter=plotter: show(plotter)
        checkpoint = ResumableCheckpoint(tmp_path, monitor="loss")
        initial_epoch = checkpoint.restore(model)
        fit(
            model,
            x,
            np.eye(3)[y],
            [plotter, checkpoint],
            epochs=initial_epoch + 2,
            initial_epoch=initial_epoch,
        )
    assert [when for when, _ in shown] == [
        "after epoch 1",
        "epoch 1",
        "epoch 2",
        "epoch 2",
        "epoch 3",
        "epoch 4",
    ]
    assert shown[2] == shown[3]
    assert set(shown[0][1]) == {""}  # nothing is shown that was not measured


@pytest.mark.versions
def test_old_calls_of_keras_visuals_work_unchanged(data, build):
    x, y = data
    y = np.eye(3)[y]
    plotters = [
        AccLossPlotter(graphs=["acc", "loss"], save_graph=True),
        ConfusionMatrixPlotter(
            X_val=x, classes=CLASSES, Y_val=y, normalize=True, cmap=plt.cm.Blues, title="Matrix"
        ),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a plotter that fails only warns
        fit(build(), x, y, plotters, epochs=1)
    for name in ("confusion_matrix.png", "training_acc_loss.png"):
        assert Path(name).exists()


@pytest.mark.parametrize(
    "make, name",
    [
        (lambda x, y: AccLossPlotter(graphs="loss"), "graphs"),
        (lambda x, y: AccLossPlotter(graphs=[]), "graphs"),
        (lambda x, y: AccLossPlotter(graphs=None), "graphs"),
        (lambda x, y: AccLossPlotter(graphs=["val_loss"]), "graphs"),
        (lambda x, y: AccLossPlotter(path=None), "path"),
        (lambda x, y: AccLossPlotter(path="x.svg"), "path"),
        (lambda x, y: ConfusionMatrixPlotter(list(x), y, CLASSES), "X_val"),
        (lambda x, y: AccLossPlotter(verbose=2), "verbose"),
        (lambda x, y: AccLossPlotter(colour="red"), "colour"),
        (lambda x, y: ConfusionMatrixPlotter(x, y[:5], CLASSES), "Y_val"),
        (lambda x, y: ConfusionMatrixPlotter(x, np.zeros((90, 5)), CLASSES), "Y_val"),
        (lambda x, y: ConfusionMatrixPlotter(x, y + 1, CLASSES), "Y_val"),
        (lambda x, y: ConfusionMatrixPlotter(x, y + 0.5, CLASSES), "Y_val"),
        (lambda x, y: ConfusionMatrixPlotter(x[:0], y[:0], CLASSES), "Y_val"),
        (lambda x, y: ConfusionMatrixPlotter(x, y, "abc"), "classes"),
        (lambda x, y: ConfusionMatrixPlotter(x, y, 3), "classes"),
        (lambda x, y: ConfusionMatrixPlotter(x, y, CLASSES, cmap="no such map"), "cmap"),
        (lambda x, y: ConfusionMatrixPlotter(x, y, CLASSES, every=0), "every"),
        (lambda x, y: ConfusionMatrixPlotter(x, y, CLASSES, size=3), "size"),
        (lambda x, y: plot_confusion_matrix(np.eye(2), CLASSES), "matrix"),
        (lambda x, y: plot_confusion_matrix(-np.eye(3), CLASSES), "matrix"),
        (lambda x, y: plot_history([1, 2]), "history"),
    ],
)
def test_wrong_arguments_are_named(data, make, name):
    with pytest.raises(
        (TypeError, ValueError), match=rf"^{name}: |argument '{name}'|value for {name}"
    ):
        make(*data)


def test_classes_that_do_not_match_the_model_are_an_error_before_training(data, build):
    x, y = data
    began = []
    note = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: began.append(epoch))
    with pytest.raises(ValueError, match="classes: 4 names, but the model has 3 outputs"):
        fit(
            build(),
            x,
            np.eye(3)[y],
            [note, ConfusionMatrixPlotter(x, y, [*CLASSES, "dog"])],
            epochs=1,
        )
    assert not began
