"""Small deterministic models and data, and the environment that every test runs in."""

import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.pop("CIFAR10_NPZ", None)

import keras  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from keras import layers  # noqa: E402
from paths import ROOT  # noqa: E402, F401

CLASSES = ["ant", "bee", "cow"]


def wait_until(condition, limit=120):
    """Waits for a condition that another thread or process brings about; fails after `limit` seconds."""
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"waited {limit} s in vain"
        time.sleep(0.02)


def needs(available, what):
    """Skips a test loudly where this machine lacks `what`; under CI=true that is a failure."""
    if not available:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"NOT TESTED: {what} is not available here")


@pytest.fixture
def data():
    """Ninety vectors of three classes that a small network can learn: x (90, 8) and integer labels (90,)."""
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    return (rng.normal(size=(90, 8)) + 2 * np.eye(3, 8)[labels]).astype("float32"), labels


@pytest.fixture
def build():
    """A function that makes a compiled classifier; the same seed gives the same weights."""

    def build_model(loss="categorical_crossentropy", outputs=3, metrics=("accuracy",), optimizer=None):
        keras.utils.set_random_seed(1)
        last = "softmax" if outputs > 1 else "sigmoid"
        stack = [keras.Input((8,)), layers.Dense(12), layers.BatchNormalization(), layers.Dropout(0.2)]
        model = keras.Sequential([*stack, layers.Dense(outputs, activation=last)])
        # Eagerly, as tracing takes longer than the few steps of these trainings.
        model.compile(optimizer or keras.optimizers.Adam(0.02), loss, metrics=list(metrics), run_eagerly=True)
        return model

    return build_model


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Each test works in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)


def pytest_collection_modifyitems(items):
    """The fast tests first; but of the slow ones the longest, so that it runs beside all others."""
    order = "plotters old_weights checkpoint documents kernel notebook shipping browser kill".split()
    items.sort(key=lambda item: order.index(item.module.__name__.removeprefix("test_")))
    items.sort(key=lambda item: item.name != "test_random_kills")
