"""Small deterministic models and data, and the environment that every test runs in."""

import gc
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.pop("CIFAR10_NPZ", None)

import keras  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from keras import layers  # noqa: E402
from paths import ROOT  # noqa: E402, F401

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    # To optimise the graph of a small network takes longer than to run it.
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})

CLASSES = ["ant", "bee", "cow"]
# Seconds after which a test gives up waiting: TensorFlow's start takes minutes on a machine that does much else.
LIMIT = 600


def wait_until(condition, limit=LIMIT):
    """Waits for a condition that another thread or process brings about; fails after `limit` seconds."""
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"waited {limit} s in vain"
        time.sleep(0.02)


def needs(available, what):
    """Skips a test loudly where this machine lacks `what`; under CI=true that is a failure."""
    if not available:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(
            f"NOT TESTED: {what} is not available here"
        )


@pytest.fixture
def data():
    """Ninety vectors of three classes that a small network can learn: x (90, 8) and integer labels (90,)."""
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    return (rng.normal(size=(90, 8)) + 2 * np.eye(3, 8)[labels]).astype("float32"), labels


@pytest.fixture
def build():
    """A function that makes a compiled classifier; the same seed gives the same weights."""

    def build_model(
        loss="categorical_crossentropy", outputs=3, metrics=("accuracy",), optimizer=None
    ):
        keras.utils.set_random_seed(1)
        last = "softmax" if outputs > 1 else "sigmoid"
        stack = [
            keras.Input((8,)),
            layers.Dense(12),
            layers.BatchNormalization(),
            layers.Dropout(0.2),
        ]
        model = keras.Sequential([*stack, layers.Dense(outputs, activation=last)])
        # Eagerly, as tracing takes longer than the few steps of these trainings.
        model.compile(
            optimizer or keras.optimizers.Adam(0.02), loss, metrics=list(metrics), run_eagerly=True
        )
        return model

    return build_model


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Each test works in an empty folder of its own, and begins with the same random state."""
    monkeypatch.chdir(tmp_path)
    keras.utils.set_random_seed(0)


def pytest_collection_finish():
    """What the imports left is passed over by the garbage collector, which else costs a fifth of the time."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser):
    parser.addoption("--part", default="1/1", help="K/N: every N-th test from the K-th on")


@pytest.hookimpl(trylast=True)  # what is left after the choice by marks
def pytest_collection_modifyitems(config, items):
    """The fast tests first; but of the slow ones the longest, so that it runs beside all others."""
    order = (
        "plotters inside runs old_weights checkpoint exactness documents kernel notebook".split()
    )
    order += ["shipping", "browser", "kill"]
    items.sort(key=lambda item: order.index(item.module.__name__.removeprefix("test_")))
    items.sort(key=lambda item: item.name != "test_random_kills")
    first, step = map(int, config.getoption("part").split("/"))
    items[:] = items[first - 1 :: step]
