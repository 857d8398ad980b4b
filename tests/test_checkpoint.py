"""ResumableCheckpoint in one process: what equals what, what is refused, what is said."""

import contextlib
import copy
import ctypes
import errno
import hashlib
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import training
from conftest import LIMIT, ROOT, needs, wait_until
from keras import layers
from training import CONFIGS, EPOCHS, images, train

import visual_callbacks
from visual_callbacks import AccLossPlotter, ResumableCheckpoint

training.prepare()
SAVED, BEST = "saved_model.hdf5", "best_model.hdf5"
MS_RDONLY, MS_REMOUNT, MNT_DETACH = 1, 32, 2  # flags of Linux's mount and umount2


class Stop(keras.callbacks.Callback):
    """Ends a training in the middle of an epoch, by an error or by whatever `act` does."""

    def __init__(self, epoch, act=None):
        super().__init__()
        self.at, self.act = epoch, act

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.epoch == self.at and batch == 2:
            if self.act:
                return self.act()
            raise InterruptedError


def interrupt(config, folder, epoch, **options):
    with pytest.raises(InterruptedError):
        train(config, folder, extra=[Stop(epoch)], **options)


@pytest.fixture(scope="session")
def stopped_once(tmp_path_factory):
    """The directory of a training that was interrupted in its fourth epoch; not to be changed."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    interrupt("small", folder, 3)
    return folder


@pytest.fixture
def stopped_run(stopped_once):
    """A copy of it in this test's own folder, as `run`."""
    shutil.copytree(stopped_once, "run")


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """The directory of the same training, never interrupted; not to be changed."""
    folder = tmp_path_factory.mktemp("never stopped") / "run"
    train("small", folder)
    return folder


def same(folder, other):
    return [
        (Path(folder) / name).read_bytes() == (Path(other) / name).read_bytes()
        for name in (SAVED, BEST)
    ]


def variables(model):
    return [
        np.asarray(keras.ops.convert_to_numpy(v))
        for v in [*model.variables, *model.optimizer.variables]
    ]


# Exactly equal ----


OFTEN = ("small", "sgd", "plateau")  # the others take their time, too
LAST = [
    pytest.param(
        config,
        False,
        id=f"{config}, checkpoint last",
        marks=pytest.mark.stack if config in OFTEN else pytest.mark.slow,
    )
    for config in CONFIGS
    if config != "small with adam"
]
# Where the checkpoint stands, matters to these two: others count beside it, or change the weights at the end.
FIRST = [
    pytest.param(config, True, id=f"{config}, checkpoint first", marks=pytest.mark.slow)
    for config in ("plateau", "ema")
]


@pytest.mark.parametrize("config, first", LAST + FIRST)
def test_resumed_equals_uninterrupted_to_the_last_byte(config, first):
    model, history, _ = train(config, "whole", first=first)
    interrupt(config, "parts", 2, first=first)
    interrupt(config, "parts", 4, first=first)
    resumed, continued, _ = train(config, "parts", first=first)
    assert all((a == b).all() for a, b in zip(variables(model), variables(resumed), strict=True))
    assert continued.history == history.history and continued.epoch == history.epoch == list(
        range(EPOCHS)
    )
    assert same("whole", "parts") == [True, True]
    if config == "plateau":
        callbacks = saved_state(f"parts/{SAVED}")["callbacks"]
        counters = {state["class"]: state["counters"] for state in callbacks}
        assert counters["ReduceLROnPlateau"]["best"] < np.inf
        assert counters["EarlyStopping"]["best"] > 0


def test_the_place_in_the_list_does_not_matter():
    train("plateau", "first", first=True)
    train("plateau", "last")
    assert same("first", "last") == [True, True]


def saved_state(path):
    with h5py.File(path) as file:
        return json.loads(file["resumable_checkpoint/state"][()].tobytes())


def losses(path):
    return [record["logs"]["loss"] for record in saved_state(path)["records"]]


@pytest.mark.slow
def test_a_checkpoint_of_one_backend_continues_on_another():
    """One training on three backends in turn, and back on the first; a second one stays there."""
    needs(importlib.util.find_spec("jax") and importlib.util.find_spec("torch"), "JAX or PyTorch")

    def run(backend, *arguments):
        command = [sys.executable, str(ROOT / "tests" / "training.py"), "adamw", *arguments]
        env = {**os.environ, "KERAS_BACKEND": backend}
        return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout

    run("tensorflow", "whole", "8")
    run("tensorflow", "run", "3")
    for backend, done, epochs in (("jax", 3, 5), ("torch", 5, 7), ("tensorflow", 7, 8)):
        said = run(backend, "run", str(epochs))
        began = [int(line.split()[1]) for line in said.splitlines() if line.startswith("began")]
        assert f"after epoch {done}" in said and began == list(range(done, epochs))
    whole, continued = losses(Path("whole", SAVED)), losses(Path("run", SAVED))
    assert continued[:3] == whole[:3] and len(continued) == len(whole) == 8
    # Not bit for bit, as dropout draws other numbers; but far from beginning anew.
    for epoch in range(3, 8):
        assert abs(continued[epoch] - whole[epoch]) < 0.3 * (whole[0] - whole[epoch])


def test_global_random_states_continue():
    drawn = {}

    class Draw(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            drawn[epoch] = random.random(), np.random.rand()

    train("small", "whole", 4, extra=[Draw()])
    whole = dict(drawn)
    drawn.clear()
    with pytest.raises(InterruptedError):
        train("small", "parts", 4, extra=[Draw(), Stop(2)])
    random.seed(99)
    np.random.seed(99)
    train("small", "parts", 4, extra=[Draw()])
    assert drawn == whole


def test_averaged_weights_are_in_the_finished_file_and_not_in_the_best():
    model, history, checkpoint = train("ema", "run")
    averaged = [np.asarray(v) for v in model.get_weights()]
    assert not all(
        (a == b).all()
        for a, b in zip(averaged, keras.models.load_model("run/" + BEST).get_weights())
    )
    assert all(
        (a == b).all()
        for a, b in zip(averaged, keras.models.load_model("run/" + SAVED).get_weights())
    )
    best = keras.models.load_model("run/" + BEST)
    best.compile(loss="categorical_crossentropy")
    x, y = images()
    assert best.evaluate(x[:30], y[:30], verbose=0) == pytest.approx(
        min(history.history["val_loss"]), abs=1e-5
    )


# One way to use it ----


def test_a_finished_training_trains_nothing_and_shows_its_curves(capsys):
    _, history, _ = train("small", "run")
    before = Path("run", SAVED).read_bytes()
    plotter = AccLossPlotter(verbose=0)
    capsys.readouterr()
    model, again, checkpoint = train("small", "run", extra=[plotter])
    assert again.history == history.history and again.epoch == history.epoch
    assert "This training is complete after epoch 6, best val_loss" in capsys.readouterr().out
    assert list(plotter.figure.axes[1].lines[0].get_ydata()) == history.history["loss"]
    assert Path("run", SAVED).read_bytes() == before


def test_early_stopping_is_final(monkeypatch):
    stopping = [
        keras.callbacks.EarlyStopping("loss", min_delta=9, patience=2, restore_best_weights=True)
    ]
    monkeypatch.setitem(
        CONFIGS, "stopping", (training.small, lambda: training.ADAM(0.01), lambda: stopping)
    )
    for first in (True, False):
        model, history, _ = train("stopping", f"run{first}", first=first)
        assert history.epoch in ([0, 1], [0, 1, 2])  # Keras 3.13 stops one epoch sooner than 3.15
        weights = keras.models.load_model(f"run{first}/{SAVED}").get_weights()
        assert all((a == b).all() for a, b in zip(weights, model.get_weights()))
        again, more, _ = train("stopping", f"run{first}", first=first)
        assert more.epoch == history.epoch and more.history == history.history
        assert all((a == b).all() for a, b in zip(again.get_weights(), model.get_weights()))


def test_the_curve_continues_with_its_seam(stopped_run):
    plotter = AccLossPlotter(verbose=0)
    _, history, _ = train("small", "run", extra=[plotter])
    lines = {line.get_gid(): line for line in plotter.figure.axes[1].lines}
    training_line, seam = lines["training"], lines["seam"]
    assert (
        list(training_line.get_ydata()) == history.history["loss"] and len(history.epoch) == EPOCHS
    )
    assert seam.get_xdata()[0] == 3 and seam.get_label() == "resumed after epoch 3"


def test_the_best_is_not_overwritten_by_worse_epochs_after_a_resume():
    # So the first epoch is the best, and all later ones are worse.
    options = {"monitor": "loss", "mode": "max"}
    interrupt("small", "run", 3, **options)
    best = Path("run", BEST).read_bytes()
    _, history, checkpoint = train("small", "run", **options)
    assert checkpoint.best == history.history["loss"][0] == max(history.history["loss"])
    assert checkpoint.best_epoch == 0 and Path("run", BEST).read_bytes() == best


# What is better ----


@pytest.mark.parametrize(
    "monitor, best",
    [
        ("val_accent_loss", min),
        ("f1_loss", min),
        ("val_iou_loss", min),
        ("val_auction_price_error", min),
    ]
    + [
        ("MAE", min),
        ("val_Accuracy", max),
        ("val_top_k_categorical_accuracy", max),
        ("val_acc", max),
    ],
)
def test_a_name_that_everyone_knows_says_what_is_better(monitor, best):
    """Values go down and up again, so that the smallest and the largest are neither the first nor the last."""
    values = [3.0, 1.0, 5.0, 4.0]
    report = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: logs.update({monitor: values[epoch]})
    )
    *_, checkpoint = train("small", "run", epochs=4, monitor=monitor, extra=[report])
    assert checkpoint.best == best(values) and checkpoint.best_epoch == values.index(best(values))


class Overlap(keras.metrics.OneHotMeanIoU):
    """A metric of Keras's under a name that says nothing."""

    def __init__(self):
        super().__init__(3, name="overlap")


class Unknown(keras.metrics.Metric):
    """A metric of which Keras does not know what is better."""

    def update_state(self, y_true, y_pred, sample_weight=None):
        pass

    def result(self):
        return 0.5


def fit_with_metric(metric, monitor, **options):
    model, (x, y) = training.small(), images()
    model.compile(training.SGD(0.05), "categorical_crossentropy", metrics=[metric])
    checkpoint = ResumableCheckpoint("run", monitor=monitor, **options)
    first = checkpoint.restore(model)
    model.fit(
        x, y, 16, 3, initial_epoch=first, verbose=0, validation_data=(x, y), callbacks=[checkpoint]
    )
    return model, checkpoint, first


@pytest.mark.stack
def test_keras_is_asked_what_is_better_of_a_compiled_metric():
    model, checkpoint, _ = fit_with_metric(Overlap(), "val_overlap")
    values = model.history.history["val_overlap"]
    assert checkpoint.best == max(values) != min(values)
    *_, first = fit_with_metric(Overlap(), "val_overlap")  # a file knows before Keras can be asked
    assert first == 3
    with pytest.raises(ValueError, match="mode: saved 'max', now 'min'"):
        fit_with_metric(Overlap(), "val_overlap", mode="min")


@pytest.mark.stack
@pytest.mark.parametrize(
    "metric", [Unknown(name="dice"), "accuracy"], ids=["compiled", "logged by a callback"]
)
def test_where_nobody_knows_what_is_better_it_is_asked_for(metric):
    batches = []

    class Count(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            batches.append(batch)

    model, (x, y) = training.sequential(), images()
    model.compile("sgd", "categorical_crossentropy", metrics=[metric])
    checkpoint = ResumableCheckpoint("run", monitor="val_dice")
    with pytest.raises(
        ValueError, match="monitor: cannot tell .*'val_dice'.*mode=.min. or mode=.max."
    ):
        model.fit(x, y, 16, verbose=0, validation_data=(x, y), callbacks=[Count(), checkpoint])
    assert batches == [0]  # not after hours
    if metric != "accuracy":
        *_, checkpoint, _ = fit_with_metric(metric, "val_dice", mode="max")
        assert checkpoint.best == 0.5


def test_with_several_outputs_keras_is_not_asked():
    """It would look for the metric's own name; what is logged has the output's name before it."""
    image = keras.Input((8, 8, 3))
    flat = layers.Flatten()(image)
    model = keras.Model(
        image, {"a": layers.Dense(3, name="a")(flat), "b": layers.Dense(3, name="b")(flat)}
    )
    metrics = {
        "a": [keras.metrics.OneHotMeanIoU(3, name="q")],
        "b": [keras.metrics.KLDivergence(name="a_q")],
    }
    model.compile("sgd", {"a": "mse", "b": "mse"}, metrics=metrics)
    x, y = images()
    with pytest.raises(ValueError, match="monitor: cannot tell"):
        model.fit(
            x, {"a": y, "b": y}, verbose=0, callbacks=[ResumableCheckpoint("run", monitor="a_q")]
        )


# Data ----


@pytest.mark.parametrize("workers", [1, 2])
def test_a_data_set_that_reads_ahead_is_warned_of(workers):
    x, y = images()
    data = training.Batches(x, y)
    data.workers = workers
    model = compiled()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(
            data, verbose=0, shuffle=False, callbacks=[ResumableCheckpoint("run", monitor="loss")]
        )
    said = [str(warning.message) for warning in caught if "workers" in str(warning.message)]
    assert len(said) == (workers > 1) and all("Use workers=1" in text for text in said)


# Copies of the callback, more epochs ----


def test_it_can_be_copied_deeply_as_tuners_do():
    checkpoint = copy.deepcopy(ResumableCheckpoint("run", monitor="val_overlap", copy_to="copies"))
    model, (x, y) = training.sequential(), images()
    model.compile("sgd", "categorical_crossentropy", metrics=[Overlap()])
    model.fit(x, y, 16, 1, verbose=0, validation_data=(x, y), callbacks=[checkpoint])
    assert Path("run", SAVED).read_bytes() == Path("copies", SAVED).read_bytes()


def test_more_epochs_after_an_early_stop_go_on_where_it_stopped(monkeypatch, capsys):
    def stopping():
        return [keras.callbacks.EarlyStopping("loss", min_delta=9, patience=patience)]

    monkeypatch.setitem(
        CONFIGS, "stopping", (training.small, lambda: training.ADAM(0.01), stopping)
    )
    patience = 1
    _, stopped, checkpoint = train("stopping", "run", epochs=30)
    last = stopped.epoch[-1]
    assert last < 3
    early = rf"stopped early, after epoch {last + 1}.*initial_epoch={last + 1}\)"
    with pytest.raises(ValueError, match=early):  # in the same process, without `restore`
        model = stopped.model
        model.fit(*images(), epochs=32, initial_epoch=30, verbose=0, callbacks=[checkpoint])
    patience = 3
    with pytest.raises(ValueError, match=early):
        train("stopping", "run", epochs=32)
    assert (
        f"(it was stopped early; to train on, pass initial_epoch={last + 1})"
        in capsys.readouterr().out
    )

    monkeypatch.setattr(
        ResumableCheckpoint,
        "restore",
        lambda *a, restore=ResumableCheckpoint.restore: min(restore(*a), last + 1),
    )
    _, history, _ = train("stopping", "run", epochs=32)
    assert history.epoch == list(range(len(history.epoch))) and len(history.epoch) > last + 1


# How it is used ----


def test_fit_from_epoch_0_into_a_folder_with_a_state_is_refused():
    interrupt("small", "run", 2)
    before = Path("run", SAVED).read_bytes()
    x, y = images()
    model = training.sequential()
    model.compile("sgd", "categorical_crossentropy")
    with pytest.raises(ValueError, match=r"initial_epoch=checkpoint.restore\(model\)"):
        model.fit(x, y, verbose=0, validation_split=0.2, callbacks=[ResumableCheckpoint("run")])
    assert Path("run", SAVED).read_bytes() == before


def test_plain_keras_opens_both_files():
    model, *_ = train("adamw", "run")
    text = (
        "import keras, sys, numpy as np\n"
        "assert 'visual_callbacks' not in sys.modules\n"
        "saved, best = (keras.models.load_model(f'run/{n}_model.hdf5') for n in ('saved', 'best'))\n"
        "best.load_weights('run/saved_model.hdf5')\n"
        "x = np.ones((2, 8, 8, 3))\n"
        "assert (saved.predict(x, verbose=0) == best.predict(x, verbose=0)).all()\n"
        "print(saved.predict(x, verbose=0).tolist())"
    )
    result = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert np.allclose(
        json.loads(result.stdout), model.predict(np.ones((2, 8, 8, 3)), verbose=0), atol=1e-6
    )


def test_saving_is_silent_and_leaves_the_live_model_alone(capfd, caplog):
    model, *_ = train("adam", "run")
    assert "HDF5" not in capfd.readouterr().err + caplog.text
    model.save("after.keras")
    assert isinstance(keras.models.load_model("after.keras").optimizer, keras.optimizers.Adam)
    assert sorted(path.name for path in Path("run").iterdir()) == [BEST, "resume_check.json", SAVED]


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"monitor": 3}, "monitor"),
        ({"mode": "best"}, "mode"),
        ({"callbacks": keras.callbacks.History()}, "callbacks"),
        ({"callbacks": ["EarlyStopping"]}, "callbacks"),
        ({"settings": {"x": object()}}, "settings"),
        ({"settings": 3}, "settings"),
        ({"keep": 3}, "keep"),
        ({"verbose": "no"}, "verbose"),
        ({"directory": None}, "directory"),
    ],
)
def test_wrong_arguments_are_named(arguments, name):
    with pytest.raises(
        (TypeError, ValueError), match=rf"^{name}: |unexpected keyword argument '{name}'"
    ):
        ResumableCheckpoint(**{"directory": "run"} | arguments)


def test_a_monitor_that_is_not_logged_is_an_error():
    with pytest.raises(ValueError, match="monitor: 'val_los' was not logged, only accuracy, loss"):
        train("small", "run", monitor="val_los", mode="min")


def test_uncompiled_unbuilt_and_foreign_models_are_refused():
    with pytest.raises(ValueError, match="compile it"):
        ResumableCheckpoint("run").restore(training.sequential())
    train("small", "run", epochs=1)
    model = keras.Sequential([layers.Dense(3)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="model"):
        ResumableCheckpoint("run").restore(model)


# Models that HDF5 cannot hold ----


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)

    def call(self, inputs):
        return self.dense(inputs)


def brightness():
    """Keras cannot write the config of this layer into an HDF5 file."""
    flat = [layers.RandomBrightness(0.2, value_range=(0, 1)), layers.Flatten(), layers.Dense(3)]
    return keras.Sequential([keras.Input((4,)), layers.Reshape((2, 2, 1)), *flat])


def operators():
    inputs = keras.Input((4,))
    return keras.Model(inputs, layers.Dense(3)(inputs * 0.5))


@pytest.mark.parametrize("make", [Subclassed, operators, brightness])
def test_what_keras_saves_and_cannot_load_is_continued_all_the_same(make):
    """A resume needs the weights only."""
    x = np.ones((8, 4), "float32")

    def run(folder, epochs):
        keras.utils.set_random_seed(1)
        model = make()
        model.compile("adam", "mse", run_eagerly=True)
        model(x)  # builds it
        checkpoint = ResumableCheckpoint(folder, monitor="loss")
        first = checkpoint.restore(model)
        with pytest.warns(
            UserWarning, match="load_model cannot open the saved files: (?s:.*)restore"
        ):
            model.fit(
                x, x[:, :3], epochs=epochs, initial_epoch=first, verbose=0, callbacks=[checkpoint]
            )
        return model

    whole = run("whole", 3)
    run("parts", 2)
    resumed = run("parts", 3)
    assert all((a == b).all() for a, b in zip(variables(whole), variables(resumed), strict=True))


def test_a_model_that_hdf5_cannot_hold_is_refused_before_training():
    class TwoOfOneName(layers.Layer):
        def build(self, shape):
            self.a, self.b = (self.add_weight((2,), name="same") for _ in range(2))

        def call(self, inputs):
            return inputs

    model = keras.Sequential([keras.Input((4,)), TwoOfOneName(), layers.Dense(3)])
    model.compile("sgd", "mse", run_eagerly=True)
    before = model.get_weights()
    x = np.ones((8, 4), "float32")
    with pytest.raises(ValueError, match="HDF5 cannot hold the weights.*of one name"):
        model.fit(x, x[:, :3], verbose=0, callbacks=[ResumableCheckpoint("run", monitor="loss")])
    assert all((a == b).all() for a, b in zip(before, model.get_weights()))


@keras.saving.register_keras_serializable()
class Double(layers.Layer):
    def call(self, inputs):
        return inputs * 2


def test_own_registered_layers_and_metrics_are_no_obstacle():
    class Half(keras.metrics.MeanAbsoluteError):
        def result(self):
            return super().result() / 2

    model = keras.Sequential([keras.Input((4,)), Double(), layers.Dense(3)])
    model.compile("sgd", lambda t, p: keras.ops.mean((t - p) ** 2), metrics=[Half()])
    checkpoint = ResumableCheckpoint("run", monitor="loss")
    x = np.ones((8, 4), "float32")
    model.fit(
        x, x[:, :3], verbose=0, initial_epoch=checkpoint.restore(model), callbacks=[checkpoint]
    )
    assert ResumableCheckpoint("run", monitor="loss").restore(model) == 1


def test_an_own_layer_inside_of_another_is_no_obstacle():
    class Mine(layers.Layer):
        def call(self, inputs):
            return inputs * 2

        def compute_output_shape(self, shape):
            return shape

    stack = [layers.TimeDistributed(Mine()), layers.Dense(4)]
    model = keras.Sequential([keras.Input((3, 4)), *stack])
    model.compile("sgd", "mse", run_eagerly=True)
    x = np.ones((8, 3, 4), "float32")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.fit(x, x, verbose=0, callbacks=[ResumableCheckpoint("run", monitor="loss")])
    own = {"Mine": Mine}
    loaded = keras.models.load_model(Path("run", SAVED), custom_objects=own, compile=False)
    assert (loaded.predict(x, verbose=0) == model.predict(x, verbose=0)).all()


def test_a_model_that_its_first_batch_builds_is_saved_and_continued_once_it_is_built():
    class Mine(layers.Layer):  # of whose output's shape Keras knows nothing
        def call(self, inputs):
            return inputs * 2

    x = np.ones((8, 3, 4), "float32")

    def run(folder, epochs, is_called=True):
        keras.utils.set_random_seed(1)
        stack = [layers.TimeDistributed(Mine()), layers.Dense(4)]
        model = keras.Sequential([keras.Input((3, 4)), *stack])
        model.compile("adam", "mse", run_eagerly=True)
        if is_called:
            model(x)
        checkpoint = ResumableCheckpoint(folder, monitor="loss")
        first = checkpoint.restore(model) if is_called else 0
        model.fit(x, x, epochs=epochs, initial_epoch=first, verbose=0, callbacks=[checkpoint])
        return model

    whole = run("whole", 2, is_called=False)
    run("parts", 1)
    resumed = run("parts", 2)
    assert all((a == b).all() for a, b in zip(variables(whole), variables(resumed), strict=True))


@pytest.mark.skipif(
    not keras.__version__.startswith("3.15."), reason="other versions describe layers differently"
)
def test_a_file_of_an_earlier_version_of_this_module_is_continued():
    """Written with Keras 3.15.1 by the module as it was at commit 68ed87f, after three epochs."""
    Path("run").mkdir()
    shutil.copy(ROOT / "tests" / "reference" / "saved_at_68ed87f.hdf5", Path("run", SAVED))
    _, history, _ = train("sgd", "run", monitor="loss")
    assert history.epoch == list(range(EPOCHS))


@pytest.mark.stack
@pytest.mark.versions
def test_plain_keras_of_every_version_opens_what_the_newest_wrote():
    """The `best_model.hdf5` of a training with Keras 3.15.1; the numbers are what that version predicted."""
    path = ROOT / "tests" / "reference" / "saved_by_keras_3_15.hdf5"
    model = keras.models.load_model(path, compile=False)
    probabilities = model.predict(np.ones((1, 6, 6, 3)), verbose=0)
    np.testing.assert_allclose(probabilities, [[0.544214, 0.444293, 0.011493]], atol=1e-5)


@pytest.mark.parametrize("renorm", [False, True])
def test_arguments_that_older_versions_do_not_know_are_left_out_at_their_defaults(renorm):
    given = {"renorm": True, "renorm_momentum": 0.5} if renorm else {}
    model = keras.Sequential([keras.Input((4,)), layers.BatchNormalization(**given)])
    model.add(layers.Dense(3, kernel_initializer="he_normal"))
    model.compile("sgd", "mse")
    checkpoint = ResumableCheckpoint("run", monitor="loss")
    start = checkpoint.restore(model)
    model.fit(np.ones((4, 4)), np.ones((4, 3)), initial_epoch=start, callbacks=[checkpoint])
    with h5py.File(checkpoint.best_path) as file:
        config = file.attrs["model_config"]
    assert "input_axes" not in config
    assert ("renorm" in config) == ('"renorm_momentum": 0.5' in config) == renorm
    loaded = keras.models.load_model(checkpoint.best_path, compile=False)
    assert loaded.get_config() == model.get_config()


@keras.saving.register_keras_serializable("tests")
class Gated(layers.Layer):
    """A layer of the user's own, with an argument that some of Keras's have, too, at another default."""

    def __init__(self, use_gate=True, **options):
        super().__init__(**options)
        self.use_gate = use_gate

    def call(self, inputs):
        return inputs if self.use_gate else 2 * inputs

    def get_config(self):
        return super().get_config() | {"use_gate": self.use_gate}


class MultiHeadAttention(Gated):
    """Named like one of Keras's, and not registered."""


@pytest.mark.parametrize("kind", [Gated, MultiHeadAttention])
def test_arguments_of_the_user_s_own_layers_stay(kind):
    model = keras.Sequential([keras.Input((4,)), kind(use_gate=False)])
    model.compile("sgd", "mse")
    checkpoint = ResumableCheckpoint("run", monitor="loss")
    start = checkpoint.restore(model)
    model.fit(np.ones((4, 4)), np.ones((4, 4)), initial_epoch=start, callbacks=[checkpoint])
    names = {"MultiHeadAttention": MultiHeadAttention}
    loaded = keras.models.load_model(checkpoint.best_path, names, compile=False)
    assert loaded.layers[-1].use_gate is False


@pytest.mark.parametrize("where", ["run", "copies"])
def test_a_disk_that_fails_is_no_damage(where, monkeypatch):
    """What cannot be read now may be sound: it is neither moved nor overwritten, and nothing older is taken."""
    model, *_ = train("small", "run", epochs=2, monitor="loss")
    shutil.copytree("run", "copies")
    read = Path.read_bytes

    def failing(path):
        if path.parent.name == where and path.name == SAVED:
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*.hdf5")}
    checkpoint = ResumableCheckpoint("run", monitor="loss", copy_to="copies")
    with pytest.raises(OSError, match=f"{where}/{SAVED} could not be read: Input/output error"):
        checkpoint.restore(model)
    assert before == {path: path.stat().st_mtime_ns for path in Path().rglob("*.hdf5")}


# Damaged files ----


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "empty":
        data = b""
    elif how == "not HDF5":
        data = b"These are not the weights you are looking for. " * 100
    elif how[0] == "cut":
        data = data[: int(len(data) * how[1])]
    else:
        data[int(len(data) * how[1])] ^= 0x10
    path.write_bytes(data)


DAMAGES = [
    "empty",
    "not HDF5",
    *(("cut", s) for s in (0.0001, 0.01, 0.3, 0.5, 0.9, 0.999)),
    *(("flip", s / 17) for s in range(17)),
]


def compiled(config="small"):
    """A fresh compiled model of a config, as `train` makes it."""
    keras.backend.clear_session()
    make_model, make_optimizer, _ = CONFIGS[config]
    model = make_model()
    model.compile(make_optimizer(), "categorical_crossentropy", metrics=["accuracy"])
    return model


def test_a_damaged_file_is_replaced_by_the_best_with_a_warning_and_kept(stopped_once):
    best = keras.models.load_model(stopped_once / BEST).get_weights()
    model = compiled()
    for how in DAMAGES:
        shutil.rmtree("run", ignore_errors=True)
        shutil.copytree(stopped_once, "run")
        damage(Path("run", SAVED), how)
        bad = Path("run", SAVED).read_bytes()
        said = r"saved_model.hdf5 cannot be used.*(?s:.*)what was trained after .* is lost"
        with pytest.warns(UserWarning, match=said):
            epoch = ResumableCheckpoint("run", settings={"batch": 16}).restore(model)
        assert 0 < epoch <= 3, how
        assert all((a == b).all() for a, b in zip(model.get_weights(), best, strict=True)), how
        (aside,) = Path("run").glob("saved_model.unusable-*.hdf5")
        assert aside.read_bytes() == bad, how


def test_after_a_damage_training_goes_on_from_the_best(stopped_run):
    damage(Path("run", SAVED), ("cut", 0.5))
    with pytest.warns(UserWarning, match="what was trained after .* is lost"):
        _, history, _ = train("small", "run")
    assert history.epoch == list(range(EPOCHS))


def test_if_nothing_is_usable_it_is_an_error_and_nothing_is_overwritten(stopped_run):
    for name in (SAVED, BEST):
        damage(Path("run", name), ("flip", 0.5))
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    with pytest.raises(
        ValueError,
        match="(?s)There is no state.*saved_model.hdf5: its checksum.*best_model.hdf5: its",
    ):
        train("small", "run")
    assert {path.name: path.read_bytes() for path in Path("run").iterdir()} == before


def test_a_missing_saved_file_is_said(stopped_run):
    Path("run", SAVED).unlink()
    with pytest.warns(UserWarning, match="saved_model.hdf5 is missing. Continuing from"):
        train("small", "run")


def test_weights_that_keras_saved_itself_are_refused_and_kept():
    Path("run").mkdir()
    training.sequential().save("run/" + SAVED)
    with pytest.raises(ValueError, match="checksum is missing or wrong"):
        train("small", "run")


# Mismatches ----


def test_another_configuration_is_refused_with_the_differences(stopped_run):
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    with pytest.raises(ValueError, match=r"settings.batch: saved 16, now 32"):
        train("small", "run", settings={"batch": 32})
    # These names count here, though not in a config.
    for name in ("seed", "name", "backend", "learning_rate"):
        with pytest.raises(ValueError, match=f"settings.{name}: saved 'none', now 0.5"):
            train("small", "run", settings={"batch": 16, name: 0.5})
    with pytest.raises(ValueError, match=r"(?s)optimizer.*saved 'SGD', now 'Adam'.*"):
        train("small with adam", "run")
    with pytest.raises(
        ValueError, match=r"(?s)model\.class_name: saved 'Sequential', now 'Functional'"
    ) as refusal:
        train("adamw", "run", settings={"batch": 32})
    listed = [line for line in str(refusal.value).splitlines() if ": saved" in line]
    # What a person changed comes first.
    assert listed[0].endswith("settings.batch: saved 16, now 32")
    # Ten for each of two files.
    assert len(listed) == 20 and re.search(r"\n  and \d+ more\n", str(refusal.value))
    with pytest.raises(ValueError, match=r"monitor: saved 'val_loss', now 'val_accuracy'"):
        train("small", "run", monitor="val_accuracy")
    stopping = keras.callbacks.EarlyStopping("loss")
    with pytest.raises(
        ValueError,
        match=r"callbacks: expected those that it was saved with, \[\], got .*EarlyStopping",
    ):
        train("small", "run", extra=[stopping])
    assert {path.name: path.read_bytes() for path in Path("run").iterdir()} == before
    train("small", "run")


def test_one_changed_number_in_a_layer_or_a_schedule_is_named(monkeypatch):
    interrupt("schedule", "run", 2)
    monkeypatch.setattr(training, "EPOCHS", 9)
    with pytest.raises(
        ValueError, match=r"optimizer.config.learning_rate.config.decay_steps: saved 36, now 54"
    ):
        train("schedule", "run")


def test_generated_names_and_the_current_learning_rate_do_not_count():
    interrupt("plateau", "run", 4)
    x, y = images()
    for _ in range(2):  # built again in the same kernel: other generated names
        model, others = training.sequential(), training.plateau()
        model.compile(training.ADAM(0.02), "categorical_crossentropy", metrics=["accuracy"])
        checkpoint = ResumableCheckpoint("run", callbacks=others, settings={"batch": 16})
        assert checkpoint.restore(model) == 4 and float(model.optimizer.learning_rate) < 0.02


def test_the_learning_rate_that_it_was_compiled_with_counts():
    interrupt("plateau", "run", 2)
    model = training.sequential()
    model.compile(training.ADAM(0.01), "categorical_crossentropy", metrics=["accuracy"])
    with pytest.raises(ValueError, match=r"compiled learning_rate: saved 0.0199\d+, now 0.0099\d+"):
        ResumableCheckpoint("run", settings={"batch": 16}).restore(model)


# Failed saves ----


@pytest.fixture
def mount(tmp_path):
    """A function that mounts a small tmpfs; unmounted afterwards."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

    def call(options, flags=0):
        where = str(folder).encode()
        return libc is not None and libc.mount(b"tmpfs", where, b"tmpfs", flags, options) == 0

    needs(call(b"size=400k"), "mounting a tmpfs")
    call.folder = folder
    yield call
    libc.umount2(str(folder).encode(), MNT_DETACH)


def test_a_full_disk_is_said_once_and_training_goes_on(mount, capsys, whole_run):
    filler = mount.folder / "filler"

    class Fill(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                with contextlib.suppress(OSError), open(filler, "wb") as file:
                    for _ in range(1000):
                        file.write(bytes(1024))
                        file.flush()
            if epoch == 4:
                filler.unlink()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train("small", mount.folder / "run", extra=[Fill()])
    said = [str(w.message) for w in caught if "Could not save" in str(w.message)]
    assert len(said) == 1 and "epoch 2" in said[0] and "No space left" in said[0]
    assert "Saving works again: epoch 5" in capsys.readouterr().out
    assert same(whole_run, mount.folder / "run") == [True, True]


def test_a_read_only_mount_keeps_the_last_state_and_the_end_says_what_is_missing(mount):
    readonly = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: epoch == 2 and mount(b"size=400k", MS_RDONLY | MS_REMOUNT)
    )
    with pytest.warns(
        UserWarning, match="Training ended, but nothing after epoch 2 is saved: .*Read-only"
    ):
        train("small", mount.folder / "run", extra=[readonly])
    checkpoint = ResumableCheckpoint(mount.folder / "run", settings={"batch": 16})
    assert checkpoint.restore(compiled()) == 2


def test_a_folder_that_vanishes_is_made_again(whole_run):
    away = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: os.rename("run", "gone") if epoch == 2 else None
    )
    train("small", "run", extra=[away])
    assert Path("run", SAVED).read_bytes() == (whole_run / SAVED).read_bytes()


def test_a_best_file_that_vanishes_is_told_at_the_end():
    away = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: epoch == 2 and os.unlink("run/" + BEST)
    )
    with pytest.warns(
        UserWarning, match="Training ended; the best loss was that of epoch 1, but .* was lost"
    ):
        train("small", "run", monitor="loss", mode="max", extra=[away])


# Copies on a Drive ----


@pytest.fixture
def drive(tmp_path):
    """A folder that stands for a mounted Drive; copies go to `copies` in it."""
    (tmp_path / "drive").mkdir()
    return tmp_path / "drive" / "copies"


def test_a_lost_machine_is_made_up_for_by_the_copies(drive, capsys, whole_run):
    interrupt("small", "first machine", 3, copy_to=drive)
    _, history, checkpoint = train("small", "second machine", copy_to=drive)
    assert "Continuing after epoch 3" in capsys.readouterr().out and history.epoch == list(
        range(EPOCHS)
    )
    for folder in ("second machine", drive):
        assert same(whole_run, folder) == [True, True]
    shutil.rmtree("second machine")
    train("small", "third machine", copy_to=drive)  # where nothing is left to train
    assert "This training is complete" in capsys.readouterr().out and same(
        whole_run, "third machine"
    ) == [True, True]


@pytest.mark.parametrize(
    "ahead", ["the copies", pytest.param("the machine", marks=pytest.mark.slow)]
)
def test_whichever_is_further_is_continued(drive, ahead, capsys, whole_run):
    interrupt("small", "run", 2, copy_to=drive)
    shutil.copytree(drive, "older")
    interrupt("small", "run", 4, copy_to=drive)
    behind = Path("run") if ahead == "the copies" else drive
    shutil.rmtree(behind)
    shutil.copytree("older", behind)
    train("small", "run", copy_to=drive)
    assert "Continuing after epoch 4" in capsys.readouterr().out.splitlines()[-2]
    assert same(whole_run, "run") == same(whole_run, drive) == [True, True]


def test_a_damaged_file_is_replaced_by_its_copy(drive, whole_run):
    interrupt("small", "run", 4, copy_to=drive)
    damage(Path("run", SAVED), ("flip", 0.5))
    with pytest.warns(UserWarning, match="saved_model.hdf5 cannot be used: its checksum"):
        train("small", "run", copy_to=drive)
    assert same(whole_run, "run") == same(whole_run, drive) == [True, True]


def test_copies_of_another_training_are_refused_and_left_alone(drive):
    train("small", "other", copy_to=drive)
    before = {path.name: path.read_bytes() for path in drive.iterdir()}
    with pytest.raises(ValueError, match="settings.batch: saved 16, now 32"):
        train("small", "run", settings={"batch": 32}, copy_to=drive)
    assert {path.name: path.read_bytes() for path in drive.iterdir()} == before
    checkpoint = ResumableCheckpoint("run", copy_to=drive)  # nor may one forget `restore`
    model = training.sequential()
    model.compile("sgd", "categorical_crossentropy")
    with pytest.raises(ValueError, match="fit began at epoch 0"):
        model.fit(*images(), verbose=0, callbacks=[checkpoint])


def test_a_drive_that_goes_away_and_returns(drive, whole_run):
    aside = drive.with_name("gone")

    def away(epoch, logs):
        wait_until(
            lambda: (
                not [
                    thread for thread in threading.enumerate() if thread.name == "copy checkpoints"
                ]
            )
        )
        if epoch == 2:
            drive.rename(aside)
        if epoch == 4:
            aside.rename(drive)

    away = keras.callbacks.LambdaCallback(on_epoch_end=away)
    with pytest.warns(UserWarning, match=f"Could not copy to {drive}: .*No such file"):
        train("small", "run", copy_to=drive, extra=[away])
    assert same(whole_run, "run") == same(whole_run, drive) == [True, True]


def test_a_full_drive_costs_the_training_nothing(mount, whole_run):
    (mount.folder / "filler").write_bytes(bytes(360_000))
    with pytest.warns(UserWarning, match="its end is not in .*No space left"):
        train("small", "run", copy_to=mount.folder / "copies")
    assert same(whole_run, "run") == [True, True]
    (mount.folder / "filler").unlink()
    train("plateau", "more", monitor="loss", copy_to=mount.folder / "copies")
    assert same("more", mount.folder / "copies") == [True, True]


def test_a_copy_that_stops_halfway_is_never_ahead_of_its_best_model(drive, monkeypatch):
    """Else a machine that continues from it would take a best model for written that is not there."""
    found, write = [], visual_callbacks._write

    def observed(path, data):
        write(path, data)
        if path.parent == drive and (drive / SAVED).exists():
            best_epoch = saved_state(drive / SAVED)["best_epoch"]
            found.append(best_epoch is None or saved_state(drive / BEST)["epoch"] >= best_epoch)

    monkeypatch.setattr(visual_callbacks, "_write", observed)
    train("small", "run", copy_to=drive)
    assert len(found) > 3 and all(found)


def test_a_slow_drive_holds_up_nothing_but_the_end(drive, monkeypatch, whole_run):
    answers, write = threading.Event(), visual_callbacks._write

    def slow_write(path, data):
        if path.parent == drive:
            answers.wait(60)
        write(path, data)

    monkeypatch.setattr(visual_callbacks, "_write", slow_write)
    monkeypatch.setattr(visual_callbacks, "COPY_PATIENCE", 0.1)
    with pytest.warns(UserWarning, match="its end is not in .*TimeoutError"):
        train("small", "run", copy_to=drive)
    assert same(whole_run, "run") == [True, True] and not list(drive.iterdir())
    answers.set()  # what waits is then written, the newest last
    wait_until(lambda: (drive / SAVED).exists() and same(whole_run, drive) == [True, True])


def test_a_drive_that_is_not_mounted_is_an_error_before_training():
    with pytest.raises(FileNotFoundError, match="no such drive"):
        ResumableCheckpoint("run", copy_to="no such drive/copies")


# NaN ----


def test_nan_is_neither_best_nor_saved(whole_run):
    class Poison(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 3:
                self.model.layers[-1].kernel.assign(self.model.layers[-1].kernel * np.nan)

    with pytest.warns(
        UserWarning, match="Nothing after epoch 3 is saved, as .*kernel is nan.*meet the same again"
    ):
        _, _, checkpoint = train("small", "run", extra=[Poison()], first=True)
    assert checkpoint.best_epoch < 3
    for name in (SAVED, BEST):
        assert all(
            np.isfinite(w).all() for w in keras.models.load_model(f"run/{name}").get_weights()
        )
    _, history, _ = train("small", "run")
    assert same(whole_run, "run") == [True, True]


# Ctrl-C ----


@pytest.fixture
def interrupts():
    """Python's own handler, which a process that was started in the background lacks."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def test_ctrl_c_says_where_it_continues_and_is_raised(capsys, interrupts, whole_run):
    press = lambda: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
    with pytest.raises(KeyboardInterrupt) as stop:
        train("small", "run", extra=[Stop(3, press)])
    # IPython's way to a short report.
    assert stop.value._render_traceback_() == ["KeyboardInterrupt"]
    assert "Stopped. Run again to continue with epoch 4. [run]" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train("small", "run")
    assert same(whole_run, "run") == [True, True]
    with pytest.raises(KeyboardInterrupt):  # after training: nothing is said
        os.kill(os.getpid(), signal.SIGINT)
    assert "Stopped" not in capsys.readouterr().out


def test_training_outside_the_main_thread():
    result = []
    thread = threading.Thread(target=lambda: result.append(train("small", "run", epochs=1)))
    thread.start(), thread.join()
    assert len(result) == 1


# Hostile files ----


def forge(change):
    """A checkpoint with a right checksum in which `change(file)` has put something hostile."""
    path = Path("run", SAVED)
    data = path.read_bytes()
    mark = visual_callbacks._MARK
    path.write_bytes(data.replace(mark, b"x" * len(mark)))
    with h5py.File(path, "r+") as file:
        change(file)
        del file["resumable_checkpoint/sha256"]
        file["resumable_checkpoint/sha256"] = np.frombuffer(mark + b"0" * 64, np.uint8)
    data = path.read_bytes()
    at = data.index(mark) + len(mark)
    path.write_bytes(data[:at] + hashlib.sha256(data).hexdigest().encode() + data[at + 64 :])


def external_link(file):
    file["model_weights/other"] = h5py.ExternalLink("secret.hdf5", "/secret")


def soft_link(file):
    file["model_weights/other"] = h5py.SoftLink("/resumable_checkpoint")


def virtual_dataset(file):
    layout = h5py.VirtualLayout(shape=(3,), dtype="f4")
    layout[:] = h5py.VirtualSource("secret.hdf5", "secret", shape=(3,))
    file.create_virtual_dataset("resumable_checkpoint/arrays/extra", layout)


def external_storage(file):
    file.create_dataset(
        "resumable_checkpoint/arrays/extra", (3,), "f4", external=[("secret.bin", 0, 12)]
    )


def absurd_shape(file):
    file.create_dataset("resumable_checkpoint/arrays/extra", (2**40,), "f4", chunks=(1024,))


def endless_groups(file):
    file["model_weights/again"] = file["model_weights"]


def broken_state(file):
    del file["resumable_checkpoint/state"]
    file["resumable_checkpoint/state"] = np.frombuffer(b'{"format": 1}', np.uint8)


ELSEWHERE = "takes its data from elsewhere"
HOSTILE = [
    (external_link, ELSEWHERE),
    (soft_link, ELSEWHERE),
    (virtual_dataset, ELSEWHERE),
    (external_storage, ELSEWHERE),
    (absurd_shape, "claims shape"),
    (broken_state, "KeyError"),
]


@pytest.mark.parametrize("change, why", HOSTILE)
def test_a_hostile_file_is_refused_for_what_it_does(change, why, stopped_run):
    with h5py.File("secret.hdf5", "w") as file:
        file["secret"] = np.ones(3, "f4")
    Path("secret.bin").write_bytes(bytes(12))
    Path("run", BEST).unlink()
    forge(change)
    with pytest.raises(ValueError, match=f"(?s)There is no state to continue from.*{why}"):
        train("small", "run")


@pytest.mark.parametrize("change", [lambda file: None, endless_groups])
def test_a_forged_checksum_alone_is_accepted_so_that_the_tests_above_test_something(
    change, stopped_run
):
    """A group that contains itself is harmless, as long as it is walked only once."""
    Path("run", BEST).unlink()  # which would take over, were the forged one refused
    forge(change)
    assert ResumableCheckpoint("run", settings={"batch": 16}).restore(compiled()) == 3


def test_an_unusable_file_gives_way_to_the_best_one(stopped_run):
    with h5py.File("secret.hdf5", "w") as file:
        file["secret"] = np.ones(3, "f4")
    forge(external_link)
    with pytest.warns(UserWarning, match="takes its data from elsewhere"):
        train("small", "run")


def test_a_lambda_layer_in_the_file_runs_no_code(stopped_run):
    layer = layers.Lambda(lambda inputs: open("it ran", "w") and inputs)
    evil = keras.saving.serialize_keras_object(layer)

    def change(file):
        config = json.loads(file.attrs["model_config"])
        config["config"]["layers"].append(evil)
        file.attrs["model_config"] = json.dumps(config)

    Path("run", BEST).unlink()  # which would take over, were this file refused
    forge(change)
    assert ResumableCheckpoint("run", settings={"batch": 16}).restore(compiled()) == 3
    assert not Path("it ran").exists()


def test_a_huge_file_is_not_read(stopped_run):
    Path("run", BEST).unlink()
    with open(Path("run", SAVED), "r+b") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="it has 1,099,511,627,776 bytes"):
        train("small", "run")


def test_copies_in_the_same_directory_are_refused(tmp_path):
    with pytest.raises(ValueError, match="^copy_to: expected another directory"):
        ResumableCheckpoint(tmp_path / "run", copy_to=tmp_path / "run")


def test_a_drive_that_is_slower_than_the_epochs_has_one_thread(tmp_path, monkeypatch):
    """Each epoch asks for copies; while one goes on, no second thread waits, and at the end the newest is there."""
    may_go_on = threading.Event()
    real = visual_callbacks._Files._copy_once
    copied = []

    def copy_once(files):
        copied.append(1)
        may_go_on.wait(LIMIT)
        real(files)

    monkeypatch.setattr(visual_callbacks._Files, "_copy_once", copy_once)
    files = visual_callbacks._Files(tmp_path / "run", tmp_path / "copy")
    before = threading.active_count()
    for epoch in range(20):
        files.write("saved_model.hdf5", bytes([epoch]))
        files.start_copying(once_more=True)
        assert threading.active_count() <= before + 1
    may_go_on.set()
    files.finish_copying()
    assert (tmp_path / "copy" / "saved_model.hdf5").read_bytes() == bytes([19])
    assert len(copied) == 3  # the first, one more for all that asked, and that of the end


def test_after_a_training_that_failed_ctrl_c_is_pythons_again(tmp_path, monkeypatch):
    """In a notebook, the cell ends with the error; what another cell does when it is stopped is not ours to say."""
    at_the_end_of_the_cell = []
    monkeypatch.setattr(visual_callbacks, "_call_when_the_cell_ends", at_the_end_of_the_cell.append)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
    model.compile("sgd", "mse")
    checkpoint = ResumableCheckpoint(tmp_path, monitor="loss", verbose=0)
    fail = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.fit(np.zeros((4, 2)), np.zeros(4), verbose=0, callbacks=[fail, checkpoint])
    assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    for function in at_the_end_of_the_cell:
        function()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
