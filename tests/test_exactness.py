"""What a resume finds out about itself, and what would make it inexact: repaired, told at once, or refused."""

import collections
import contextlib
import datetime
import functools
import gc
import importlib.util
import json
import os
import re
import shutil
import signal
import tempfile
import threading
import time
import warnings
import weakref
from pathlib import Path

import exactness
import h5py
import keras
import numpy as np
import pytest
import training
from conftest import ROOT, wait_until
from exactness import interrupt_in
from keras import layers, optimizers
from planted import KINDS
from test_checkpoint import forge

import visual_callbacks
from visual_callbacks import BEST, SAVED, ResumableCheckpoint, read_run

training.prepare()
ROWS = {
    f"{kind}: {name}": row for kind, rows in exactness.ROWS.items() for name, row in rows.items()
}
OFTEN = (  # the others take their time, too
    "PyDataset with a generator of its own",
    "mixed_float16, a loss scale that changes",
    "compile anew",
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if any(often in n for often in OFTEN) else pytest.mark.slow)
        for n in ROWS
    ],
)
def test_the_table_of_exactness(name, tmp_path):
    table = (ROOT / "docs" / "exactness.md").read_text()
    (verdict,) = re.findall(rf"^\| {re.escape(name)} \| (\w+) \|$", table, re.M)
    assert ROWS[name].verdict(tmp_path)[0] == verdict


def test_the_table_of_exactness_is_complete():
    table = (ROOT / "docs" / "exactness.md").read_text()
    listed = re.findall(r"^\| ([^|]*) \| (exact|told|refused) \|$", table, re.M)
    assert [name for name, _ in listed] == list(ROWS)


# Small trainings that can be interrupted ----


def new_model(*extra, loss="sparse_categorical_crossentropy", optimizer=None):
    keras.backend.clear_session()
    keras.utils.set_random_seed(1)
    return exactness.dense(layers.Dropout(0.3), *extra, loss=loss, optimizer=optimizer)


def fit(model, folder="run", epochs=4, stop=None, callbacks=(), **options):
    """Trains or continues a model; raises Interruption in the middle of epoch `stop`."""
    options = {"monitor": "loss"} | options
    checkpoint = ResumableCheckpoint(folder, **options)
    listed = [*callbacks, checkpoint] + ([] if stop is None else [interrupt_in(stop)])
    first = checkpoint.restore(model)
    model.fit(
        exactness.X,
        exactness.LABELS,
        8,
        epochs,
        verbose=0,
        shuffle=False,
        initial_epoch=first,
        callbacks=listed,
    )
    return checkpoint


def interrupt(model, folder="run", stop=2, **options):
    with pytest.raises(exactness.Interruption):
        fit(model, folder, stop=stop, **options)


def all_values(model):
    return [
        np.asarray(keras.ops.convert_to_numpy(v))
        for v in [*model.variables, *model.optimizer.variables]
    ]


def equal(model, other):
    return all((a == b).all() for a, b in zip(all_values(model), all_values(other), strict=True))


def state_of(name=SAVED, folder="run"):
    with h5py.File(Path(folder, name)) as file:
        return json.loads(file["resumable_checkpoint/state"][()].tobytes())


@contextlib.contextmanager
def nothing_said():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    ours = (visual_callbacks.__file__, __file__)  # `restore` warns in its caller's name
    assert not [str(warning.message) for warning in caught if warning.filename in ours]


@pytest.fixture(scope="session")
def interrupted_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    interrupt(new_model(), folder)
    return folder


# The self-check ----


@pytest.mark.stack
def test_a_resume_says_that_it_continues_exactly_as_before(capsys):
    interrupt(new_model(), stop=1)
    interrupt(new_model(), stop=2)
    with nothing_said():
        checkpoint = fit(new_model())
    assert checkpoint.resumes == [
        {"epoch": epoch, "verdict": "equal", "batches": 5} for epoch in (1, 2)
    ]
    said = capsys.readouterr().out
    assert "Continuing with epoch 3, exactly as before, as its first 5 batches show. [run]" in said
    assert fit(new_model()).resumes == checkpoint.resumes  # which trains nothing more


@pytest.mark.stack
def test_with_nothing_to_compare_it_says_so(capsys):
    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise exactness.Interruption

    with pytest.raises(exactness.Interruption):
        fit(new_model(), callbacks=[Stop()])
    checkpoint = fit(new_model())
    assert checkpoint.resumes == [{"epoch": 2, "verdict": "not compared", "batches": 0}]
    assert (
        "with nothing to compare: none of its batches was trained before" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "content",
    ["", "{", "[" * 200_000, "[]", '{"epoch": 2}', '{"epoch": 2, "before": 3, "batches": [3]}'],
)
def test_a_damaged_file_of_the_check_costs_the_check_only(content, interrupted_once):
    shutil.copytree(interrupted_once, "run")
    Path("run", "resume_check.json").write_text(content)
    assert fit(new_model()).resumes == [{"epoch": 2, "verdict": "not compared", "batches": 0}]


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_difference_is_told(kind, tmp_path):
    """One of each kind; benchmarks/planted.py plants more."""
    import random

    import planted

    planted.train(tmp_path / "start")
    assert planted.is_told(tmp_path / "start", tmp_path / "run", KINDS[kind](random.Random(1)))


# What is put back ----


@pytest.mark.stack
def test_a_training_stopped_in_its_first_epoch_begins_anew_with_the_same_weights(capsys):
    whole = new_model()
    fit(whole, "whole")
    model = new_model()  # the cell with `fit` is run again, the one that builds the model is not
    interrupt(model, stop=0)
    checkpoint = fit(model)
    assert equal(model, whole) and checkpoint.resumes[0]["verdict"] == "equal"
    assert (
        "Beginning again with the same weights, as no epoch was completed [run]"
        in capsys.readouterr().out
    )


def test_before_the_first_epoch_ends_everything_can_still_be_changed():
    model = new_model()
    interrupt(model, stop=0)
    # This model was trained on.
    with pytest.raises(ValueError, match="settings.batch: saved 'none', now 8"):
        fit(model, settings={"batch": 8})
    fit(new_model(layers.Dense(5)), settings={"batch": 8})
    assert state_of()["epoch"] == 3


def test_stopped_between_the_last_epoch_and_the_end(tmp_path):
    """EarlyStopping puts the best weights back at the very end."""

    def stopping():
        return keras.callbacks.EarlyStopping(
            "loss", patience=1, min_delta=9, restore_best_weights=True
        )

    class Stop(keras.callbacks.Callback):
        def on_train_end(self, logs=None):
            raise exactness.Interruption

    whole = new_model()
    fit(whole, "whole", callbacks=[stopping()])
    with pytest.raises(exactness.Interruption):
        fit(new_model(), "parts", callbacks=[stopping(), Stop()])
    assert not state_of(folder="parts")["finished"]
    resumed = new_model()
    fit(resumed, "parts", callbacks=[stopping()])
    assert equal(whole, resumed)
    assert Path("whole", SAVED).read_bytes() == Path("parts", SAVED).read_bytes()


@pytest.mark.stack
def test_a_phase_that_is_complete_is_passed_over(capsys):
    def train(stop=None):
        model = new_model()
        for last, rate in ((2, 0.01), (4, 0.001)):
            model.compile(
                optimizers.Adam(rate), "sparse_categorical_crossentropy", run_eagerly=True
            )
            fit(model, epochs=last, stop=stop)
        return model

    with pytest.raises(exactness.Interruption):
        train(stop=3)
    capsys.readouterr()
    model = train()
    said = capsys.readouterr().out
    assert "This phase is complete after epoch 2; the weights are those of a later one" in said
    assert model.history.epoch == [0, 1, 2, 3] and len(state_of()["phases"]) == 1
    assert not list(Path("run").glob("*unusable*"))
    model = new_model()
    model.compile(optimizers.Adam(0.01), "sparse_categorical_crossentropy", run_eagerly=True)
    with pytest.raises(
        ValueError, match="This phase is complete after epoch 2, and a later one was begun"
    ):
        fit(model, epochs=3)
    # As it would be in another process.
    with pytest.raises(ValueError, match="compiled learning_rate: saved 0.001"):
        fit(new_model(optimizer=optimizers.Adam(0.1)), epochs=6)


def test_fit_without_restore_after_an_interruption_is_refused():
    model = new_model()
    checkpoint = ResumableCheckpoint("run", monitor="loss")
    options = dict(batch_size=8, epochs=4, verbose=0, shuffle=False)
    with pytest.raises(exactness.Interruption):
        model.fit(exactness.X, exactness.LABELS, callbacks=[checkpoint, interrupt_in(2)], **options)
    with pytest.raises(ValueError, match=r"was interrupted: call checkpoint.restore\(model\)"):
        model.fit(exactness.X, exactness.LABELS, initial_epoch=2, callbacks=[checkpoint], **options)


def test_compiling_after_restore_is_refused():
    interrupt(new_model())
    model = new_model()
    checkpoint = ResumableCheckpoint("run", monitor="loss")
    first = checkpoint.restore(model)
    model.compile("adam", "sparse_categorical_crossentropy")
    with pytest.raises(ValueError, match=r"compiled after restore\(model\)"):
        model.fit(
            exactness.X,
            exactness.LABELS,
            8,
            4,
            initial_epoch=first,
            verbose=0,
            callbacks=[checkpoint],
        )


def test_a_loop_of_ones_own_with_a_list_of_callbacks():
    def train(folder, epochs):
        model = new_model()
        checkpoint = ResumableCheckpoint(folder, monitor="loss", verbose=0)
        first = checkpoint.restore(model)
        callbacks = keras.callbacks.CallbackList([checkpoint], model=model, epochs=4)
        callbacks.on_train_begin()
        for epoch in range(first, epochs):
            callbacks.on_epoch_begin(epoch)
            logs = model.train_on_batch(exactness.X, exactness.LABELS, return_dict=True)
            callbacks.on_train_batch_end(0, logs)
            callbacks.on_epoch_end(epoch, logs)
        if epochs == 4:
            callbacks.on_train_end()
        return model

    train("parts", 2)
    assert equal(train("whole", 4), train("parts", 4))


def test_a_loop_that_tells_no_batches_is_asked_what_is_better_when_an_epoch_ends():
    model = new_model()
    checkpoint = ResumableCheckpoint("run", monitor="liking", verbose=0)
    checkpoint.restore(model)
    callbacks = keras.callbacks.CallbackList([checkpoint], model=model, epochs=4)
    callbacks.on_train_begin()
    callbacks.on_epoch_begin(0)
    with pytest.raises(ValueError, match="monitor: cannot tell whether a lower or a higher"):
        callbacks.on_epoch_end(0, {"liking": 0.5})


def test_what_is_logged_and_is_no_plain_data_costs_no_save():
    def log(epoch, logs):
        logs["when"] = datetime.datetime(2020, 1, epoch + 1)

    logger = keras.callbacks.LambdaCallback(on_epoch_end=log)
    with pytest.warns(UserWarning, match=r"logs\['when'\] is not kept .* but datetime"):
        interrupt(new_model(), stop=2, callbacks=[logger])
    history = read_run("run")["history"]
    assert len(history["loss"]) == 2 and history["when"] == [None, None]


# Other callbacks ----


def test_callbacks_that_count_must_be_there_again():
    stopping = keras.callbacks.EarlyStopping("loss", patience=3)
    interrupt(new_model(), callbacks=[stopping])
    with pytest.raises(
        ValueError,
        match=r"callbacks: expected .*EarlyStopping\(monitor='loss', patience=3.*, got \[\]",
    ):
        fit(new_model())
    with pytest.raises(ValueError, match=r"patience=3.*, got .*patience=4"):
        fit(new_model(), callbacks=[keras.callbacks.EarlyStopping("loss", patience=4)])
    # A ModelCheckpoint changes nothing in a training.
    fit(new_model(), callbacks=[stopping, keras.callbacks.ModelCheckpoint("best.keras")])


def test_counters_go_to_the_callback_with_the_same_arguments():
    def both():
        return [keras.callbacks.EarlyStopping(name, patience=9) for name in ("loss", "accuracy")]

    interrupt(new_model(), callbacks=both())
    loss, accuracy = both()
    interrupt(new_model(), callbacks=[accuracy, loss], stop=3)
    assert loss.best != accuracy.best and loss.best == min(loss.model.history.history["loss"])


def test_a_warm_up_that_sets_the_learning_rate_as_training_begins_is_no_difference():
    class Warm(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.model.optimizer.learning_rate = 1e-5

    interrupt(new_model(), callbacks=[Warm()])
    with nothing_said():
        checkpoint = fit(new_model(), callbacks=[Warm()])
    assert checkpoint.resumes[0]["verdict"] == "equal"


class Odd(keras.callbacks.Callback):
    """Attributes and logs of all kinds."""

    def __init__(self):
        super().__init__()
        self.scalar, self.kept = np.array(0.5), []

    def on_train_batch_end(self, batch, logs=None):
        logs |= {"tag": {1, 2}, "seconds": time.perf_counter()}

    def on_epoch_end(self, epoch, logs=None):
        self.kept.append(list(range(epoch)))
        self.weights = self.model.get_weights()


def test_odd_attributes_and_logs_of_others_cost_nothing():
    interrupt(new_model(), callbacks=[Odd()])
    assert fit(new_model(), callbacks=[Odd()]).resumes[0]["verdict"] == "equal"


def test_two_checkpoints_in_one_training():
    model = new_model()
    both = [ResumableCheckpoint(folder, monitor="loss") for folder in ("a", "b")]
    model.fit(exactness.X, exactness.LABELS, 8, 3, verbose=0, shuffle=False, callbacks=both)
    assert state_of(folder="a")["finished"] and state_of(folder="b")["finished"]
    for name in (SAVED, BEST):
        assert Path("a", name).read_bytes() == Path("b", name).read_bytes()


@pytest.mark.stack
def test_a_callback_that_changes_and_does_not_tell_is_named_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(new_model(), callbacks=[exactness.Warmup()])
    said = [
        str(warning.message)
        for warning in caught
        if "A resume will not continue" in str(warning.message)
    ]
    assert len(said) == 1 and "Warmup.count" in said[0] and "get_state()" in said[0]


@pytest.mark.parametrize("how", ["attribute", "get_state"])
def test_a_counter_that_is_no_plain_data_is_left_out_with_a_warning(how):
    class Mine(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.best = datetime.datetime.now()

    if how == "get_state":
        Mine.get_state = lambda self: datetime.datetime.now()
    with pytest.warns(UserWarning, match=r"Mine.(best|get_state\(\)) is not kept for a resume"):
        fit(new_model(), callbacks=[Mine()])
    assert state_of()["epoch"] == 3


def test_best_weights_in_bfloat16_come_back():
    def new():
        keras.utils.set_random_seed(2)
        return new_model(layers.Dense(4, dtype="bfloat16", name="half"))

    def best():
        return [keras.callbacks.EarlyStopping("loss", restore_best_weights=True)]

    interrupt(new(), "stopped", callbacks=best())
    model, undisturbed = new(), new()
    fit(model, "stopped", callbacks=best())
    fit(undisturbed, "undisturbed", callbacks=best())
    assert equal(model, undisturbed)


def test_an_epoch_that_a_callback_cuts_short_is_told():
    def stop(batch, logs):
        model.stop_training = batch == 2

    model = new_model()
    cut = keras.callbacks.LambdaCallback(on_train_batch_end=stop)
    with pytest.warns(UserWarning, match="stopped epoch 1 after batch 3 of 8. It counts as an"):
        fit(model, callbacks=[cut])


class Forgetful(keras.callbacks.Callback):
    """Changes an attribute after each epoch, and does not tell."""

    def __init__(self, kept):
        super().__init__()
        self.kept = kept

    def on_epoch_end(self, epoch, logs=None):
        if isinstance(self.kept, np.random.Generator):
            self.kept.random()
        elif isinstance(self.kept, np.ndarray):
            self.kept = self.kept + 1
        elif isinstance(self.kept, keras.Variable):
            self.kept.assign_add(1)
        else:
            self.kept.append(epoch)


KEPT = {
    "deque": lambda: collections.deque(maxlen=3),
    "generator": lambda: np.random.default_rng(1),
    "large array": lambda: np.zeros(300_000),
    "variable": lambda: keras.Variable(0.0),
}


@pytest.mark.parametrize("kind", KEPT)
def test_whatever_a_callback_changes_and_does_not_tell_is_named(kind):
    with pytest.warns(UserWarning, match="A resume will not continue Forgetful.kept"):
        fit(new_model(), epochs=1, callbacks=[Forgetful(KEPT[kind]())])


def test_what_the_training_itself_changes_is_no_attribute_of_a_callback():
    model = new_model()

    class Looks(keras.callbacks.Callback):
        part = None

        def on_train_begin(self, logs=None):
            self.part = model.layers[0]
            self.optimizer = model.optimizer

    with nothing_said():
        fit(model, epochs=2, callbacks=[Looks()])


def test_keys_of_a_state_that_are_no_texts_are_told():
    class Mine(keras.callbacks.Callback):
        def get_state(self):
            return {"seen": {0: 0.9}}

        def set_state(self, state):
            pass

    with pytest.warns(
        UserWarning, match=r"Mine.get_state\(\) has a dict with keys that are no texts"
    ):
        fit(new_model(), epochs=1, callbacks=[Mine()])


def test_odd_methods_and_properties_of_callbacks_cost_nothing():
    class Odd(keras.callbacks.Callback):
        def get_state(self, key):
            return key

        def set_state(self, state):
            pass

        @property
        def best(self):
            return max([])

    with pytest.warns(UserWarning, match=r"its get_state\(\) fails"):
        interrupt(new_model(), stop=1, callbacks=[Odd()])
        checkpoint = fit(new_model(), callbacks=[Odd()])
    assert state_of()["epoch"] == 3 and checkpoint.resumes[0]["verdict"] == "equal"


def test_what_is_not_saved_is_named_before_training():
    model = new_model()
    model.other = keras.optimizers.SGD()
    with pytest.warns(UserWarning, match="Not saved.*: Sequential.other. Only model.optimizer"):
        fit(model, epochs=1)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="needs TensorFlow")
def test_a_variable_of_tensorflow_is_named_before_training():
    import tensorflow as tf

    model = new_model()
    model.layers[0].steps = tf.Variable(0)
    with pytest.warns(UserWarning, match="Not saved, so that a resume is not exact: Dense.steps"):
        fit(model, epochs=1)


def test_a_training_that_had_ended_is_checked_when_it_is_extended():
    fit(new_model(), epochs=1)
    interrupt(new_model(), epochs=3, stop=1)
    checkpoint = ResumableCheckpoint("run", monitor="loss")
    model = new_model()
    first = checkpoint.restore(model)
    backwards = exactness.X[::-1].copy(), exactness.LABELS[::-1].copy()
    with pytest.warns(UserWarning, match="Epoch 2 does not continue exactly as before"):
        model.fit(
            *backwards, 8, 3, shuffle=False, verbose=0, initial_epoch=first, callbacks=[checkpoint]
        )
    verdicts = [resume["verdict"] for resume in checkpoint.resumes]
    assert verdicts == ["not compared", "different"]


def test_a_training_that_had_ended_with_averaged_weights_is_not_extended_in_silence():
    def averaging():
        return new_model(optimizer=optimizers.Adam(0.01, use_ema=True))

    fit(averaging(), epochs=2)
    with nothing_said():
        fit(averaging(), epochs=2)  # complete
    with pytest.warns(UserWarning, match="had ended with averaged weights, or those of its best"):
        fit(averaging(), epochs=3)


def test_values_under_names_of_ones_own_are_compared():
    class Own(keras.Model):
        def train_step(self, data):
            return {"mine": super().train_step(data)["loss"]}

    def new():
        keras.backend.clear_session()
        keras.utils.set_random_seed(1)
        inputs = keras.Input((6,))
        model = Own(inputs, layers.Dense(3, "softmax")(inputs))
        model.compile("sgd", "sparse_categorical_crossentropy")
        return model

    def run(x, stop=None):
        model, checkpoint = new(), ResumableCheckpoint("run", monitor="mine", mode="min")
        callbacks = [checkpoint] + ([] if stop is None else [interrupt_in(stop)])
        first = checkpoint.restore(model)
        options = {"shuffle": False, "verbose": 0, "initial_epoch": first, "callbacks": callbacks}
        model.fit(x, exactness.LABELS, 8, 3, **options)
        return checkpoint.resumes

    with pytest.raises(exactness.Interruption):
        run(exactness.X, stop=1)
    with pytest.warns(UserWarning, match="mine is .* and was"):
        run(exactness.X + 1)


def test_keras_s_own_random_numbers_go_on():
    class Draws(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            drawn.append(float(keras.random.uniform(())))

    drawn = []
    fit(new_model(), "whole", callbacks=[Draws()])
    whole = drawn.copy()
    drawn.clear()
    interrupt(new_model(), "parts", callbacks=[Draws()])
    fit(new_model(), "parts", callbacks=[Draws()])
    assert drawn == whole and len(set(drawn)) == 4


def test_a_screen_that_cannot_be_printed_on_costs_no_training(monkeypatch):
    class Full:
        encoding = "ascii"

        def write(self, text):
            raise OSError(28, "No space left on device")

        def flush(self):
            pass

    interrupt(new_model(), stop=1)
    monkeypatch.setattr("sys.stdout", Full())
    checkpoint = fit(new_model())
    assert checkpoint.resumes[0]["verdict"] == "equal"


def test_a_value_that_is_not_logged_in_every_epoch_can_be_monitored():
    class Sometimes(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch % 2 == 0:
                logs["map"] = float(epoch)

    checkpoint = fit(new_model(), callbacks=[Sometimes()], monitor="map", mode="max")
    assert (checkpoint.best, checkpoint.best_epoch) == (2.0, 2) and state_of()["epoch"] == 3


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="needs TensorFlow")
def test_a_model_made_for_several_devices_is_continued_outside_of_its_scope():
    import tensorflow as tf

    def made_in_scope():
        keras.utils.set_random_seed(1)
        with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
            return exactness.dense(layers.Dropout(0.3))

    interrupt(made_in_scope(), stop=1)
    assert fit(made_in_scope()).resumes[0]["verdict"] == "equal"


def test_two_checkpoints_in_one_directory_are_refused():
    second = ResumableCheckpoint("run", monitor="accuracy")
    with pytest.raises(ValueError, match="^directory: expected one for each checkpoint"):
        fit(new_model(), callbacks=[second])


def test_a_later_phase_may_add_weights():
    def model_with(*extra):
        keras.backend.clear_session()
        keras.utils.set_random_seed(1)
        return exactness.dense(*extra)

    def both(stop=None):
        model = model_with()
        fit(model, epochs=2)
        model.layers[0].enable_lora(2)
        model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
        return fit(model, epochs=4, stop=stop)

    with pytest.raises(exactness.Interruption):
        both(stop=3)
    assert both().resumes[-1]["verdict"] == "equal"


def test_an_adapted_normalization_is_restored_without_adapting_it_anew():
    def normalizing(is_adapted):
        layer = layers.Normalization()
        model = new_model()
        model = keras.Sequential([keras.Input((6,)), layer, *model.layers])
        if is_adapted:
            layer.adapt(3 * exactness.X + 5)
        model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
        return model

    interrupt(normalizing(is_adapted=True), stop=1)
    assert fit(normalizing(is_adapted=False)).resumes[0]["verdict"] == "equal"


# What must match ----


def lambda_from(name, factor, comment=""):
    """A lambda that stands in a file of this name."""
    path = Path(f"{name}.py")
    path.write_text(
        f"import keras{comment}\nmade = lambda t, p: {factor} * keras.losses.sparse_categorical_crossentropy(t, p)\n"
    )
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.made


def test_what_a_lambda_does_counts_and_not_where_it_stands():
    interrupt(new_model(loss=lambda_from("first", 2)))
    with pytest.raises(ValueError, match=r"loss.*lambda: saved '\w{16}', now '\w{16}'"):
        fit(new_model(loss=lambda_from("changed", 3)))
    with nothing_said():
        assert (
            fit(new_model(loss=lambda_from("second", 2, "\n\n# elsewhere"))).resumes[0]["verdict"]
            == "equal"
        )


def two_outputs(weights):
    inputs = keras.Input((6,))
    model = keras.Model(
        inputs, {"a": layers.Dense(3, name="a")(inputs), "b": layers.Dense(3, name="b")(inputs)}
    )
    model.compile("adam", {"a": "mse", "b": "mse"}, loss_weights=weights, run_eagerly=True)
    return model


def test_loss_weights_and_precision_count():
    x, y = exactness.X, {name: np.eye(3)[exactness.LABELS] for name in "ab"}
    two_outputs({"a": 1.0, "b": 0.5}).fit(
        x, y, verbose=0, callbacks=[ResumableCheckpoint("a", monitor="loss")]
    )
    with pytest.raises(ValueError, match="loss_weights.b: saved 0.5, now 0.25"):
        ResumableCheckpoint("a", monitor="loss").restore(two_outputs({"a": 1.0, "b": 0.25}))
    interrupt(new_model())
    for policy in ("mixed_bfloat16", "float64"):
        keras.config.set_dtype_policy(policy)
        try:
            with pytest.raises(ValueError, match=rf"(?s)policy: saved 'float32', now '{policy}'"):
                fit(exactness.dense(layers.Dropout(0.3)))
        finally:
            keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize(
    "make",
    [lambda: layers.Softmax(), lambda: layers.ELU(), lambda: layers.Dense(4, name='größe "a"')],
)
def test_a_model_built_again_in_one_kernel_is_the_same(make):
    """Its generated names differ, whatever else has the same text."""

    def build():
        keras.utils.set_random_seed(1)
        stack = [layers.Dropout(0.3), layers.Dense(4, "softmax"), layers.Dense(4, "elu"), make()]
        return exactness.dense(*stack)

    first = build()
    first.run_eagerly = True  # a graph of TensorFlow's takes no name with such letters
    interrupt(first)
    model = build()
    assert [layer.name for layer in model.layers] != [layer.name for layer in first.layers]
    assert ResumableCheckpoint("run", monitor="loss").restore(model) == 2


class WithoutConfig(optimizers.schedules.LearningRateSchedule):
    def __call__(self, step):
        return 0.01


def scaled(y_true, y_pred, factor):
    return factor * keras.losses.sparse_categorical_crossentropy(y_true, y_pred)


@pytest.mark.parametrize(
    "part, changes",
    [
        ("optimizer", {"optimizer": lambda: optimizers.Adam(WithoutConfig())}),
        ("loss", {"loss": lambda: functools.partial(scaled, factor=2.0)}),
    ],
)
def test_what_cannot_be_compared_is_left_out_with_a_warning_before_training(part, changes):
    def model():
        return new_model(**{name: make() for name, make in changes.items()})

    with pytest.warns(
        UserWarning, match=f"Whether the {part} is the same cannot be checked on a resume"
    ):
        interrupt(model())
    whole, resumed = model(), model()
    fit(whole, "whole")
    fit(resumed)
    assert equal(whole, resumed)


def test_nan_in_the_settings_equals_itself():
    interrupt(new_model(), settings={"x": float("nan")})
    fit(new_model(), settings={"x": float("nan")})


# Files ----


def test_a_relative_directory_stays_where_it_was(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    away = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: os.chdir(tmp_path / "elsewhere")
    )
    fit(new_model(), callbacks=[away])
    assert (tmp_path / "run" / SAVED).exists() and not list((tmp_path / "elsewhere").iterdir())


def test_a_full_temporary_folder_costs_nothing(monkeypatch):
    """On many machines it is on the disk that fills up."""
    monkeypatch.setattr(tempfile, "tempdir", "/proc/there is no room here")
    with pytest.warns(UserWarning, match="Could not try out whether keras.models.load_model"):
        fit(new_model())
    assert state_of()["epoch"] == 3


@pytest.mark.parametrize(
    "error", [RuntimeError("h5py failed"), MemoryError(), OSError("disk full")]
)
def test_whatever_saving_raises_training_goes_on(error, monkeypatch, capsys):
    pack, calls = visual_callbacks._pack, []

    def fail_once(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise error
        return pack(*arguments)

    monkeypatch.setattr(visual_callbacks, "_pack", fail_once)
    with pytest.warns(UserWarning, match="Could not save epoch 2: "):
        fit(new_model())
    assert "Saving works again: epoch 3" in capsys.readouterr().out and state_of()["epoch"] == 3


def test_a_file_that_restore_would_refuse_as_too_large_is_not_written(monkeypatch):
    monkeypatch.setattr(visual_callbacks, "_most_bytes", lambda model: 20_000)
    with pytest.warns(UserWarning, match="more than a checkpoint of this model may have"):
        fit(new_model())
    assert not list(Path("run").glob("*.hdf5"))


@pytest.mark.parametrize("what", ["missing", "damaged"])
def test_a_best_file_is_made_again_from_the_other(what):
    interrupt(new_model())  # its loss falls, so that the last epoch is the best
    before = Path("run", BEST).read_bytes()
    Path("run", BEST).unlink()
    if what == "damaged":
        Path("run", BEST).write_bytes(before[:-9])
    with pytest.warns(
        UserWarning, match="best_model.hdf5 was made again from .*saved_model.hdf5"
    ) as caught:
        ResumableCheckpoint("run", monitor="loss").restore(new_model())
    assert not any("is lost" in str(warning.message) for warning in caught)
    assert Path("run", BEST).read_bytes() == before


def test_a_best_file_of_an_earlier_epoch_that_is_missing_is_told():
    interrupt(new_model(), mode="max")
    Path("run", BEST).unlink()
    with pytest.warns(UserWarning, match="of epoch 1, is missing; the next better epoch writes it"):
        with pytest.warns(
            UserWarning, match="Training ended; the best loss was that of epoch 1.*was lost"
        ):
            fit(new_model(), mode="max")


def test_a_missing_best_file_comes_back_from_its_copy():
    interrupt(new_model(), mode="max", copy_to="drive")
    wait_until(
        lambda: (
            not [thread for thread in threading.enumerate() if thread.name == "copy checkpoints"]
        )
    )
    shutil.copytree("run", "drive", dirs_exist_ok=True)
    before = Path("run", BEST).read_bytes()
    Path("run", BEST).unlink()
    with pytest.warns(UserWarning, match="made again from .*drive"):
        fit(new_model(), mode="max", copy_to="drive")
    assert Path("run", BEST).read_bytes() == before


def test_the_best_file_of_an_earlier_phase_stays():
    model = new_model()
    fit(model, epochs=2, mode="max")  # by which the first epoch is the best
    before = Path("run", BEST).read_bytes()
    model.compile(optimizers.SGD(1e-3), "sparse_categorical_crossentropy", run_eagerly=True)
    with nothing_said():
        fit(model, epochs=4, mode="max")
    assert Path("run", BEST).read_bytes() == before
    assert sorted(os.listdir("run")) == [BEST, "resume_check.json", SAVED]


def test_a_copy_that_runs_out_of_memory_is_told(monkeypatch):
    def fail(*arguments):
        raise MemoryError

    monkeypatch.setattr(visual_callbacks, "_holds", fail)
    Path("drive").mkdir()
    Path("drive", SAVED).write_bytes(b"")
    monkeypatch.setattr(visual_callbacks, "_write", lambda path, data: path.write_bytes(data))
    with pytest.warns(UserWarning, match="its end is not in .*MemoryError"):
        model = new_model()
        model.fit(
            exactness.X, exactness.LABELS, 8, 2, verbose=0,
            callbacks=[ResumableCheckpoint("run", monitor="loss", copy_to="copies")],
        )  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
def test_a_folder_that_cannot_be_flushed_leaves_no_file_open(monkeypatch):
    fsync = os.fsync

    def refuse_folders(number):
        if Path(f"/proc/self/fd/{number}").resolve().is_dir():
            raise OSError("folders cannot be flushed here")
        fsync(number)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    visual_callbacks._write(Path("file.bin").absolute(), b"1")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        visual_callbacks._write(Path("file.bin").absolute(), b"2")
    assert len(os.listdir("/proc/self/fd")) == before


def test_after_training_the_handler_is_gone_and_the_model_can_be_freed():
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        model = new_model()
        during = []
        look = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: during.append(signal.getsignal(signal.SIGINT))
        )
        fit(model, callbacks=[look])
        assert during[0] is not signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        alive = weakref.ref(model)
        look.set_model(None)
        del model
        keras.backend.clear_session()
        gc.collect()
        assert alive() is None
    finally:
        signal.signal(signal.SIGINT, previous)


# Hostile files, with a right checksum ----


ARRAYS = "resumable_checkpoint/arrays/"


def hard_links(file):
    file[ARRAYS + "x"] = np.ones(10_000)
    for index in range(500):
        file[f"{ARRAYS}x{index}"] = file[ARRAYS + "x"]


def unallocated(file):
    for index in range(200):
        file.create_dataset(f"{ARRAYS}x{index}", (1000,), "u1", chunks=(100,))


def zipped(file):
    file.create_dataset(ARRAYS + "x", data=np.zeros(50_000, np.uint8), compression="gzip")


def deep(file):
    group = file
    for _ in range(500):
        group = group.create_group("g")


def many_links(file):
    for index in range(120_000):
        file[f"m/{index}"] = file["model_weights"]


def replace(name, make):
    def change(file):
        old = file[name][()]
        del file[name]
        file[name] = make(old)

    return change


def state_with(**changes):
    def change(old):
        state = json.loads(old.tobytes()) | changes
        return np.frombuffer(json.dumps(state).encode(), np.uint8)

    return replace("resumable_checkpoint/state", change)


HOSTILE = {
    "500 names of one array": hard_links,
    "arrays that take no room": unallocated,
    "compressed": zipped,
    "500 levels": deep,
    "120,000 links": many_links,
    "another shape": replace(ARRAYS + "optimizer/2", lambda old: np.zeros((99, 99), "f4")),
    "another type": replace(ARRAYS + "optimizer/2", lambda old: old.astype("f8")),
    "a text": replace(ARRAYS + "optimizer/2", lambda old: np.bytes_(b"abc")),
    "lists for ever": replace(
        "resumable_checkpoint/state", lambda old: np.frombuffer(b"[" * 200_000, np.uint8)
    ),
    "no state": state_with(records="abc"),
    "epochs before 0": state_with(records=[{"epoch": -1, "logs": {}}]),
    "next epoch before this one": state_with(next_epoch=-5),
    "best without its epoch": state_with(best_epoch=None),
    "best that is nan": state_with(best=float("nan")),
    "a record without logs": state_with(records=[{"epoch": 0, "logs": 5}]),
    "phases that are none": state_with(phases=[{"fingerprint": {}, "next_epoch": "x"}]),
    "random state": state_with(random={"python": [3, [1, 2, 3], None], "numpy": {}}),
    "weights that are not there": state_with(weights=["resumable_checkpoint/sha256"] * 4),
    "a number of 100,000 digits": replace(
        "resumable_checkpoint/state",
        lambda old: np.frombuffer(b'{"format": ' + b"9" * 100_000 + b"}", np.uint8),
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_error_that_names_it_and_changes_nothing(name, interrupted_once):
    shutil.copytree(interrupted_once, "run")
    Path("run", BEST).unlink()
    forge(HOSTILE[name])
    model = new_model()
    before = all_values(model)
    with pytest.raises(
        ValueError, match="(?s)There is no state to continue from.*saved_model.hdf5: "
    ):
        ResumableCheckpoint("run", monitor="loss").restore(model)
    assert all((a == b).all() for a, b in zip(before, all_values(model)))
    assert {*os.listdir("run")} == {*os.listdir(interrupted_once)} - {BEST}


def test_without_a_change_the_forged_file_is_accepted(interrupted_once):
    shutil.copytree(interrupted_once, "run")
    Path("run", BEST).unlink()
    forge(lambda file: None)
    with pytest.warns(UserWarning, match="made again"):
        assert ResumableCheckpoint("run", monitor="loss").restore(new_model()) == 2


def test_attributes_are_never_read_as_hdf5_may_read_them_for_ever(monkeypatch, interrupted_once):
    def fail(*_):
        raise AssertionError("an attribute was read")

    model = new_model()
    monkeypatch.setattr(h5py.Group, "attrs", property(fail))
    monkeypatch.setattr(h5py.Dataset, "attrs", property(fail))
    shutil.copytree(interrupted_once, "run")
    Path("run", BEST).unlink()
    with pytest.warns(UserWarning, match="made again"):
        assert ResumableCheckpoint("run", monitor="loss").restore(model) == 2
