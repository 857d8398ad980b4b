"""Of which trainings a resume is exact: tries each kind, interrupted in the middle of an epoch and continued.

    python benchmarks/exactness.py [ROW ...]        prints the table of docs/exactness.md, or the rows that are named

Each row trains a small network three times: in one go; until it is interrupted in its third epoch; and continued with
a model that was built anew. "Exact" means that all weights, the optimizer's variables and the whole history are equal,
bit for bit, to those of the training in one go. "Told" means that they are not, and that a warning said so at once.
"Refused" means that training did not begin. A row that is none of these would be silent; then the exit status is 1.
"""

import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import paths  # noqa: F401

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import callbacks, layers, optimizers

from visual_callbacks import (
    AccLossPlotter,
    ConfusionMatrixPlotter,
    PredictionPlotter,
    ResumableCheckpoint,
)

EPOCHS, BATCH, STOP = 5, 8, 2
RNG = np.random.default_rng(0)
LABELS = np.arange(64) % 3
X = (RNG.normal(size=(64, 6)) + np.eye(3, 6)[LABELS]).astype("float32")
IMAGES = RNG.random((64, 8, 8, 3)).astype("float32")
SERIES = RNG.normal(size=(64, 4, 3)).astype("float32")


class Interruption(Exception):
    pass


def interrupt_in(epoch):
    """A callback that raises in the middle of an epoch."""

    def count(batch, logs):
        if len(model_of(callback).history.epoch) == epoch and batch == 6:
            raise Interruption

    callback = callbacks.LambdaCallback(on_train_batch_end=count)
    return callback


# Data ----


class InOrderOfEpoch(keras.utils.PyDataset):
    """Its order follows from the epoch, which a callback tells it."""

    def __init__(self, **options):
        super().__init__(**options)
        self.start_epoch(0)

    def start_epoch(self, epoch):
        self.order = np.random.default_rng(epoch).permutation(len(X))

    def __len__(self):
        return len(X) // BATCH

    def __getitem__(self, index):
        chosen = self.order[index * BATCH : (index + 1) * BATCH]
        return X[chosen], LABELS[chosen]


class ShufflesItself(InOrderOfEpoch):
    """Draws a new order after each epoch, from a generator of its own."""

    def __init__(self):
        self.rng = np.random.default_rng(7)
        super().__init__()

    def start_epoch(self, epoch):
        self.order = self.rng.permutation(len(X))

    def on_epoch_end(self):
        self.start_epoch(None)


class DrawsGlobally(InOrderOfEpoch):
    """Draws each batch from NumPy's global generator, whose state is saved."""

    def __getitem__(self, index):
        chosen = np.random.permutation(len(X))[:BATCH]
        return X[chosen], LABELS[chosen]


def endless():
    rng = np.random.default_rng(3)
    while True:
        chosen = rng.permutation(len(X))[:BATCH]
        yield X[chosen], LABELS[chosen]


def told_the_epoch(dataset):
    return callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: dataset.start_epoch(epoch))


def tf_data(change):
    import tensorflow as tf

    return change(tf.data.Dataset.from_tensor_slices((X, LABELS)))


def with_data(make, tell=False, **options):
    def fit(model):
        data = make()
        others = [told_the_epoch(data)] if tell else []
        return dict(x=data, y=None, batch_size=None, shuffle=False, **options), others

    return Row(fit=fit)


# Callbacks ----


class Warmup(callbacks.Callback):
    """Changes the learning rate by a counter of its own."""

    count = 0

    def __init__(self):
        super().__init__()
        self.count = 0

    def on_epoch_end(self, epoch, logs=None):
        self.count += 1
        self.model.optimizer.learning_rate = 0.01 / (1 + self.count)


class WarmupThatTells(Warmup):
    def get_state(self):
        return self.count

    def set_state(self, state):
        self.count = state


def hidden_counter():
    """A counter that nobody can see from outside."""
    counted = []

    def count(epoch, logs):
        counted.append(epoch)
        if len(counted) % 2:
            model_of(callback).optimizer.learning_rate = 0.01 / len(counted)

    callback = callbacks.LambdaCallback(on_epoch_begin=count)
    return callback


def model_of(callback):
    return callback.model


# Models ----


class OwnSeed(layers.Layer):
    """Draws from a seed generator that Keras knows."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seed = keras.random.SeedGenerator(1)

    def call(self, inputs):
        return inputs + 0.1 * keras.random.normal(keras.ops.shape(inputs), seed=self.seed)


class HiddenSeed(OwnSeed):
    """Draws from a seed generator that is hidden in a dict of a list."""

    def __init__(self, **options):
        layers.Layer.__init__(self, **options)
        generator = keras.random.SeedGenerator(1)
        self.kept = lambda: generator

    def call(self, inputs):
        return inputs + 0.1 * keras.random.normal(keras.ops.shape(inputs), seed=self.kept())


class ScaledLoss(keras.losses.Loss):
    """A loss with a variable of its own, which each batch changes."""

    def __init__(self):
        super().__init__()
        self.scale = keras.Variable(1.0, name="scale")

    def call(self, y_true, y_pred):
        self.scale.assign(self.scale * 1.01)
        return self.scale * keras.losses.sparse_categorical_crossentropy(y_true, y_pred)


class OwnOptimizer(optimizers.SGD):
    """An optimizer with a variable of its own."""

    def build(self, variables):
        super().build(variables)
        self.damping = keras.Variable(1.0, name="damping")

    def update_step(self, gradient, variable, learning_rate):
        self.damping.assign(self.damping * 0.999)
        super().update_step(gradient * self.damping, variable, learning_rate)


def dense(*extra, loss="sparse_categorical_crossentropy", optimizer=None):
    model = keras.Sequential(
        [keras.Input((6,)), layers.Dense(8, "relu"), *extra, layers.Dense(3, "softmax")]
    )
    model.compile(optimizer or optimizers.Adam(0.01), loss, metrics=["accuracy"])
    return model


def on(inputs, *stack, batch_size=None):
    """A model of these layers on images or series."""

    def build():
        flat = [layers.Flatten(), layers.Dense(3, "softmax")]
        made = [layer() for layer in stack]
        model = keras.Sequential(
            [keras.Input(inputs.shape[1:], batch_size=batch_size), *made, *flat]
        )
        model.compile(
            optimizers.Adam(0.01),
            "sparse_categorical_crossentropy",
            metrics=["accuracy"],
        )
        return model

    return Row(
        build=build, fit=lambda model: (dict(x=inputs, validation_data=None), []), monitor="loss"
    )


def attention():
    inputs = keras.Input(SERIES.shape[1:])
    x = layers.MultiHeadAttention(2, 3, dropout=0.2)(inputs, inputs)
    x = layers.Attention(dropout=0.1, use_scale=True)([x, inputs])
    model = keras.Model(inputs, layers.Dense(3, "softmax")(layers.Flatten()(x)))
    model.compile("adam", "sparse_categorical_crossentropy")
    return model


class Row:
    """One kind of training: how its model is built, and what differs from fit(X, LABELS, shuffle=False)."""

    def __init__(
        self,
        build=dense,
        fit=lambda model: ({}, []),
        others=list,
        policy="float32",
        first=False,
        **options,
    ):
        self.build, self.fit, self.others, self.policy, self.first = (
            build,
            fit,
            others,
            policy,
            first,
        )
        self.monitor = options.get("monitor", "val_loss")

    def train(self, folder, interrupt=False, epochs=EPOCHS, extra=()):
        """Trains or continues; returns the values of all variables, the history and the checkpoint."""
        keras.backend.clear_session()
        keras.utils.set_random_seed(1)
        keras.config.set_dtype_policy(self.policy)
        model = self.build()
        options = dict(
            x=X, y=LABELS, batch_size=BATCH, shuffle=False, validation_data=(X[:24], LABELS[:24])
        )
        changed, others = self.fit(model)
        options |= changed
        others = others + self.others()
        checkpoint = ResumableCheckpoint(folder, monitor=self.monitor, verbose=0)
        listed = [checkpoint, *others] if self.first else [*others, checkpoint]
        listed += [*extra, interrupt_in(STOP)] if interrupt else [*extra]
        first_epoch = checkpoint.restore(model)
        history = model.fit(
            epochs=epochs, verbose=0, initial_epoch=first_epoch, callbacks=listed, **options
        )
        arrays = [np.asarray(keras.ops.convert_to_numpy(v), "float64") for v in model.variables]
        arrays += [
            np.asarray(keras.ops.convert_to_numpy(v), "float64") for v in model.optimizer.variables
        ]
        return arrays, history.history, checkpoint

    def verdict(self, folder):
        folder = Path(folder)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                arrays, history, _ = self.train(folder / "whole")
                try:
                    self.train(folder / "parts", interrupt=True)
                    return "**not interrupted**", ""
                except Interruption:
                    pass
                resumed_arrays, resumed_history, _ = self.train(folder / "parts")
            except ValueError as error:
                return "refused", str(error).split("\n")[0]
            finally:
                keras.config.set_dtype_policy("float32")
        said = [
            str(warning.message)
            for warning in caught
            if warning.filename.endswith("visual_callbacks.py")
        ]
        # That warning is not about the resume.
        said = [text for text in said if "keras.models.load_model" not in text]
        is_exact = str(history) == str(resumed_history) and len(history["loss"]) == len(
            resumed_history["loss"]
        )
        is_exact = is_exact and all(
            np.array_equal(a, b, True) for a, b in zip(arrays, resumed_arrays, strict=True)
        )
        if is_exact:
            return "exact", said[0] if said else ""
        return ("told", said[-1]) if said else ("**silent**", "")


class Phases(Row):
    """A network trained with a frozen layer, compiled anew, and trained further: in one directory."""

    def train(self, folder, interrupt=False):
        keras.backend.clear_session()
        keras.utils.set_random_seed(1)
        model = self.build()
        model.layers[0].trainable = False
        history = {}
        for last, rate in ((STOP, 0.01), (EPOCHS, 0.001)):
            model.compile(optimizers.Adam(rate), "sparse_categorical_crossentropy")
            checkpoint = ResumableCheckpoint(folder, monitor="loss", verbose=0)
            listed = [checkpoint] + ([interrupt_in(STOP)] if interrupt else [])
            first_epoch = checkpoint.restore(model)
            options = dict(batch_size=BATCH, shuffle=False, verbose=0, callbacks=listed)
            history = model.fit(
                X, LABELS, epochs=last, initial_epoch=first_epoch, **options
            ).history
            model.layers[0].trainable = True
        arrays = [
            np.asarray(keras.ops.convert_to_numpy(v))
            for v in [*model.variables, *model.optimizer.variables]
        ]
        return arrays, history, checkpoint


def optimizer(make):
    return Row(build=lambda: dense(layers.Dropout(0.2), optimizer=make()))


def layer(*make):
    return Row(build=lambda: dense(*[one() for one in make]))


def neighbour(*make, first=False, build=dense):
    return Row(build=build, others=lambda: [one() for one in make], first=first)


def watched():
    """A training that all three plotters show, on images."""
    row = on(IMAGES, lambda: layers.RandomFlip(), lambda: layers.Dropout(0.2))
    names = ["ant", "bee", "cow"]
    row.others = lambda: [
        AccLossPlotter(verbose=0, path=f"{FOLDER}/curves.png"),
        ConfusionMatrixPlotter(IMAGES[:24], LABELS[:24], names, path=f"{FOLDER}/matrix.png"),
        PredictionPlotter(IMAGES[:6], LABELS[:6], names, path=f"{FOLDER}/predictions.png"),
    ]
    return row


def averaged():
    return dense(optimizer=optimizers.Adam(0.01, use_ema=True, ema_momentum=0.8))


def changing_scale():
    """The loss scale is halved at first, as gradients overflow, then doubled after every third step."""
    scaled = optimizers.LossScaleOptimizer(
        optimizers.Adam(0.01), initial_scale=2.0**20, dynamic_growth_steps=3
    )
    return dense(optimizer=scaled)


def schedule():
    return optimizers.schedules.CosineDecay(0.05, EPOCHS * 8)


def halve(epoch, rate):
    return rate if epoch < 1 else rate * 0.5


ROWS = {
    "Data": {
        "arrays, shuffle=False": Row(),
        "arrays, shuffle=True, after set_random_seed": Row(
            fit=lambda model: ({"shuffle": True}, [])
        ),
        "validation_split, class_weight": Row(
            fit=lambda model: (
                {"validation_data": None, "validation_split": 0.2, "class_weight": {1: 2.0}},
                [],
            )
        ),
        "PyDataset that is told the epoch": with_data(InOrderOfEpoch, tell=True),
        "PyDataset that is told the epoch, workers=2": with_data(
            lambda: InOrderOfEpoch(workers=2), tell=True
        ),
        "PyDataset with a generator of its own": with_data(ShufflesItself),
        "PyDataset that draws from NumPy's global generator": with_data(DrawsGlobally),
        "Python generator": with_data(endless, steps_per_epoch=8),
        "arrays, steps_per_epoch below their length": Row(
            fit=lambda model: ({"steps_per_epoch": 7}, [])
        ),
        "tf.data, batched": with_data(lambda: tf_data(lambda data: data.batch(BATCH))),
        "tf.data, repeat, steps_per_epoch": with_data(
            lambda: tf_data(lambda data: data.batch(BATCH).shuffle(8, seed=1).repeat()),
            steps_per_epoch=8,
        ),
        "tf.data, shuffled anew each epoch": with_data(
            lambda: tf_data(lambda data: data.shuffle(64, 1).batch(BATCH))
        ),
    },
    "Optimizers": {
        "SGD, momentum, nesterov": optimizer(
            lambda: optimizers.SGD(0.05, momentum=0.9, nesterov=True)
        ),
        "SGD with a schedule": optimizer(lambda: optimizers.SGD(schedule())),
        "Adam": optimizer(lambda: optimizers.Adam(0.01)),
        "Adam, amsgrad, clipnorm": optimizer(
            lambda: optimizers.Adam(0.01, amsgrad=True, clipnorm=1.0)
        ),
        "Adam, gradients accumulated over 3 batches": optimizer(
            lambda: optimizers.Adam(0.01, gradient_accumulation_steps=3)
        ),
        "Adam, averaged weights": optimizer(
            lambda: optimizers.Adam(0.01, use_ema=True, ema_overwrite_frequency=5)
        ),
        "AdamW": optimizer(lambda: optimizers.AdamW(0.01)),
        "Adamax": optimizer(lambda: optimizers.Adamax(0.01)),
        "Nadam": optimizer(lambda: optimizers.Nadam(0.01)),
        "RMSprop, centered": optimizer(
            lambda: optimizers.RMSprop(0.01, centered=True, momentum=0.5)
        ),
        "Adagrad": optimizer(lambda: optimizers.Adagrad(0.05)),
        "Adadelta": optimizer(lambda: optimizers.Adadelta(0.5)),
        "Adafactor": optimizer(lambda: optimizers.Adafactor(0.01)),
        "Ftrl": optimizer(lambda: optimizers.Ftrl(0.05)),
        "Lion": optimizer(lambda: optimizers.Lion(0.005)),
        "Lamb": optimizer(lambda: optimizers.Lamb(0.01)),
        "Muon": optimizer(lambda: optimizers.Muon(0.01)),
        "LossScaleOptimizer": optimizer(
            lambda: optimizers.LossScaleOptimizer(optimizers.Adam(0.01))
        ),
        "one with a variable of its own": optimizer(lambda: OwnOptimizer(0.05)),
        "a loss with a variable of its own": Row(build=lambda: dense(loss=ScaledLoss())),
    },
    "Callbacks beside it": {
        "EarlyStopping, ReduceLROnPlateau": neighbour(
            lambda: callbacks.EarlyStopping(
                "val_loss", patience=1, min_delta=0.05, restore_best_weights=True
            ),
            lambda: callbacks.ReduceLROnPlateau("loss", patience=1, factor=0.5, min_delta=0.1),
        ),
        "LearningRateScheduler(f(epoch, lr)), before it": neighbour(
            lambda: callbacks.LearningRateScheduler(halve)
        ),
        "LearningRateScheduler(f(epoch, lr)), behind it": neighbour(
            lambda: callbacks.LearningRateScheduler(halve), first=True
        ),
        "SwapEMAWeights(swap_on_epoch=True), before it": neighbour(
            lambda: callbacks.SwapEMAWeights(swap_on_epoch=True), build=averaged
        ),
        "SwapEMAWeights(swap_on_epoch=True), behind it": neighbour(
            lambda: callbacks.SwapEMAWeights(swap_on_epoch=True), build=averaged, first=True
        ),
        "ModelCheckpoint(save_best_only=True)": neighbour(
            lambda: callbacks.ModelCheckpoint(f"{FOLDER}/best.keras", save_best_only=True)
        ),
        "one of your own with get_state and set_state": neighbour(WarmupThatTells),
        "one of your own without them, which counts": neighbour(Warmup),
        "LambdaCallback with a counter in its function": neighbour(hidden_counter),
        "all three plotters": watched(),
    },
    "Layers": {
        "Dropout, GaussianNoise, BatchNormalization": layer(
            lambda: layers.Dropout(0.3),
            lambda: layers.GaussianNoise(0.1),
            layers.BatchNormalization,
        ),
        "RandomFlip, RandomTranslation, RandomBrightness": on(
            IMAGES,
            layers.RandomFlip,
            lambda: layers.RandomTranslation(0.1, 0.1),
            lambda: layers.RandomBrightness(0.2, value_range=(0, 1)),
        ),
        "RandomShear, RandomErasing": on(
            IMAGES,
            lambda: layers.RandomShear(0.1, 0.1),
            lambda: layers.RandomErasing(value_range=(0, 1)),
        ),
        "MultiHeadAttention, Attention": Row(
            build=attention,
            fit=lambda model: (dict(x=SERIES, validation_data=None), []),
            monitor="loss",
        ),
        "LSTM with dropout, Bidirectional": on(
            SERIES, lambda: layers.Bidirectional(layers.LSTM(4, dropout=0.2, recurrent_dropout=0.2))
        ),
        "LSTM, stateful": on(SERIES, lambda: layers.LSTM(4, stateful=True), batch_size=BATCH),
        "RNN of cells": on(SERIES, lambda: layers.RNN([layers.LSTMCell(3), layers.GRUCell(3)])),
        "SpectralNormalization": layer(lambda: layers.SpectralNormalization(layers.Dense(4))),
        "Lambda": layer(lambda: layers.Lambda(lambda x: x * 2)),
        "one of your own with a SeedGenerator": layer(OwnSeed),
        "one of your own that hides its SeedGenerator": layer(HiddenSeed),
    },
    "Precision": {
        "mixed_bfloat16": Row(policy="mixed_bfloat16"),
        "mixed_float16": Row(policy="mixed_float16"),
        "mixed_float16, a loss scale that changes": Row(changing_scale, policy="mixed_float16"),
        "float64": Row(policy="float64"),
        "bfloat16": Row(policy="bfloat16"),
    },
    "More than one fit": {"fit, compile anew, fit": Phases()},
}
FOLDER = tempfile.mkdtemp()


def main(wanted):
    unknown = set(wanted) - {name for rows in ROWS.values() for name in rows}
    if unknown:
        sys.exit(f"ROW: expected some of those in the table, got {', '.join(sorted(unknown))}")
    silent = []
    try:
        print("| training | a resume is |")
        print("| --- | --- |")
        for kind, rows in ROWS.items():
            for name, row in rows.items():
                if wanted and name not in wanted:
                    continue
                shutil.rmtree(FOLDER, ignore_errors=True)
                verdict, said = row.verdict(FOLDER)
                print(f"| {kind}: {name} | {verdict} |", flush=True)
                if said:
                    print(f"    {said}", file=sys.stderr, flush=True)
                if "**" in verdict:
                    silent.append(name)
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)
    sys.exit(f"silently inexact: {silent}" if silent else 0)


if __name__ == "__main__":
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()
    main(sys.argv[1:])
