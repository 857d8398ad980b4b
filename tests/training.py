"""A short training with everything random in it, for tests that interrupt it. Also a program:

PYTHONPATH=. python tests/training.py CONFIG FOLDER [EPOCHS]   trains, or continues, and prints one line an epoch
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers

from visual_callbacks import ResumableCheckpoint

EPOCHS, BATCH = 6, 16
SGD, ADAM, ADAMW = keras.optimizers.SGD, keras.optimizers.Adam, keras.optimizers.AdamW


class Batches(keras.utils.PyDataset):
    """Images in an order that follows from the epoch."""

    def __init__(self, x, y):
        super().__init__()
        self.x, self.y, self.order = x, y, np.arange(len(x))

    def start_epoch(self, epoch):
        self.order = np.random.default_rng(epoch).permutation(len(self.x))

    def __len__(self):
        return len(self.x) // BATCH

    def __getitem__(self, index):
        chosen = self.order[index * BATCH : (index + 1) * BATCH]
        return self.x[chosen], self.y[chosen]


def images():
    rng = np.random.default_rng(0)
    labels = np.arange(96) % 3
    x = rng.random((96, 8, 8, 3)) + 0.5 * np.eye(3)[labels][:, None, None]
    return x.astype("float32"), np.eye(3, dtype="float32")[labels]


def small():
    """A network that trains in a moment, for tests of what goes on around a training."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Flatten(),
            layers.Dense(4, activation="relu"),
            layers.BatchNormalization(),
            layers.Dropout(0.3),
            layers.Dense(3, activation="softmax"),
        ]
    )


def sequential():
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.RandomFlip(),
            layers.RandomTranslation(0.1, 0.1),
            layers.GaussianNoise(0.1),
            layers.Conv2D(4, 3),
            layers.Activation(
                "relu"
            ),  # which Keras calls "activation": the key of its setting, too
            layers.BatchNormalization(),
            layers.Dropout(0.3),
            layers.Flatten(),
            layers.Dense(3, activation="softmax"),
        ]
    )


def functional():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, padding="same")(inputs)
    x = layers.Add()([x, layers.Dropout(0.2, seed=3)(layers.BatchNormalization()(x))])
    branch = keras.Sequential(
        [keras.Input((8, 8, 4)), layers.GlobalAveragePooling2D(), layers.Dropout(0.1)]
    )
    return keras.Model(inputs, layers.Dense(3, activation="softmax")(branch(x)))


def cosine():
    return keras.optimizers.schedules.CosineDecay(
        0.01, EPOCHS * 6, warmup_target=0.1, warmup_steps=6
    )


def plateau():
    return [
        keras.callbacks.ReduceLROnPlateau(
            monitor="loss", factor=0.5, patience=1, min_delta=0.2, cooldown=1
        ),
        keras.callbacks.EarlyStopping(
            monitor="val_accuracy", patience=9, restore_best_weights=True
        ),
        keras.callbacks.ModelCheckpoint(
            "best.weights.h5", save_best_only=True, save_weights_only=True
        ),
    ]


CONFIGS = {  # name: model, optimizer, other callbacks
    "small": (small, lambda: SGD(0.05, momentum=0.9, nesterov=True), list),
    "small with adam": (small, lambda: ADAM(0.01), list),
    "sgd": (sequential, lambda: SGD(0.05, momentum=0.9, nesterov=True), list),
    "adam": (sequential, lambda: ADAM(0.01), list),
    "adamw": (functional, lambda: ADAMW(0.01, weight_decay=0.01), list),
    "schedule": (functional, lambda: SGD(cosine(), momentum=0.9), list),
    "plateau": (sequential, lambda: ADAM(0.02), plateau),
    "ema": (sequential, lambda: ADAM(0.02, use_ema=True, ema_momentum=0.8), list),
}


def train(config, folder, epochs=EPOCHS, extra=(), first=False, settings=None, **options):
    """Trains a fresh model of a config, or continues it; returns (model, history, checkpoint)."""
    make_model, make_optimizer, make_callbacks = CONFIGS[config]
    keras.backend.clear_session()  # generated names begin anew, as in a fresh process
    keras.utils.set_random_seed(7)
    model, others = make_model(), make_callbacks()
    is_small = make_model is small
    # The small network eagerly: to trace it takes longer than its few steps.
    model.compile(
        make_optimizer(), "categorical_crossentropy", metrics=["accuracy"], run_eagerly=is_small
    )
    x, y = images()
    if is_small:
        x, y = x[:48], y[:48]
    data = Batches(x, y)
    checkpoint = ResumableCheckpoint(
        folder, callbacks=others, settings=settings or {"batch": BATCH}, **options
    )
    order = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: data.start_epoch(epoch)
    )
    callbacks = (
        [checkpoint, order, *others, *extra] if first else [order, *others, *extra, checkpoint]
    )
    history = model.fit(
        data,
        epochs=epochs,
        initial_epoch=checkpoint.restore(model),
        validation_data=(x[:30], y[:30]),
        shuffle=False,
        verbose=0,
        callbacks=callbacks,
    )
    return model, history, checkpoint


def prepare():
    """Deterministic operations, where the backend has to be asked for them."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()


def train_by_itself(config, folder):
    """Trains or continues as the only thing that a process does."""
    prepare()
    train(config, folder, monitor="loss")


if __name__ == "__main__":
    prepare()
    report = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: print("began", epoch, flush=True)
    )
    train(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]), extra=[report], monitor="loss")
    print("finished", flush=True)
