"""The trainings that follow for the shipped weights, a small one from end to end, and how they become one file."""

import os
import subprocess
import sys

import further_training
import h5py
import keras
import numpy as np
import pytest
import ship
from conftest import ROOT

pytestmark = pytest.mark.slow


def test_labels_are_mixed_in_the_shares_of_the_pixels():
    labels = np.eye(10, dtype="float32")[np.arange(9)]
    # An image shows its label in every pixel.
    images = np.broadcast_to(labels[:, None, None], (9, 32, 32, 10)).copy()
    before, kinds = images.copy(), set()
    for seed in range(40):
        mixed, mixed_labels = further_training.mixed(images, labels, np.random.default_rng(seed))
        assert mixed.dtype == mixed_labels.dtype == np.float32 and np.array_equal(images, before)
        np.testing.assert_allclose(mixed.mean((1, 2), dtype="float64"), mixed_labels, atol=1e-6)
        assert (mixed_labels.argmax(1) == np.arange(9)).all()  # the image itself has at least half
        changed = (mixed != images).any(-1)[0].mean()
        kinds.add("as it is" if changed == 0 else "blended" if changed == 1 else "a square")
    assert kinds == {"as it is", "blended", "a square"}


def test_it_goes_on_from_the_first_weights(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, size in (("train", 1000), ("test", 200)):
        arrays[f"x_{part}"] = rng.integers(0, 255, (size, 32, 32, 3), "uint8")
        arrays[f"y_{part}"] = np.arange(size) % 10
    np.savez(tmp_path / "made up.npz", **arrays)
    program = (
        "import further_training as train, notebook_cells\n"
        "train.KNOBS.update(WIDTHS=[8, 8, 16], BATCH_SIZE=200, EPOCHS=2, FILTER_RATE=0.001)\n"
        "model = notebook_cells.cells_before_training(**train.KNOBS)['model']\n"
        "model.set_weights([-w if w.ndim == 4 else w for w in model.get_weights()])\n"  # not what it begins with anyway
        "train.keras.Model(model.input, model.output).save('first.hdf5')\n"
        "train.main('first.hdf5', 'second')\n"
        "model.set_weights([w / 2 for w in model.get_weights()])\n"
        "train.keras.Model(model.input, model.output).save('other.hdf5')\n"
        "train.main('other.hdf5', 'second')"
    )
    env = {**os.environ, "CIFAR10_NPZ": str(tmp_path / "made up.npz")}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "scripts")])
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, env=env
    )
    assert "Validation accuracy: 0." in result.stdout and "(CIFAR-10, made up)" in result.stdout, (
        result.stderr
    )
    # The folder is another training's.
    assert "first" in result.stderr.partition("ValueError")[2], result.stderr
    paths = (
        tmp_path / name for name in ("first.hdf5", "second/best_model.hdf5", "second/trained.hdf5")
    )
    first, best, trained = (keras.models.load_model(path, compile=False) for path in paths)
    assert {layer.dtype_policy.name for layer in trained.layers} == {"float32"}
    with h5py.File(tmp_path / "second" / "trained.hdf5") as file:
        assert set(file) == {"model_weights"}  # without what only a resumed training needs
    assert all(
        np.array_equal(a, b) for a, b in zip(trained.get_weights(), best.get_weights(), strict=True)
    )
    filters = [(a, b) for a, b in zip(first.get_weights(), best.get_weights()) if a.ndim == 4]
    assert all(
        np.corrcoef(a.flat, b.flat)[0, 1] > 0.9 and not np.array_equal(a, b) for a, b in filters
    )


@pytest.mark.parametrize("how_many", [1, 3])
def test_the_shipped_network_answers_with_the_mean_of_several(
    how_many, tmp_path, monkeypatch, capsys
):
    rng, models, paths = np.random.default_rng(0), [], []
    arrays = {
        "x_train": rng.integers(0, 255, (60, 32, 32, 3), "uint8"),
        "y_train": np.arange(60) % 10,
    }
    np.savez(
        tmp_path / "made_up.npz",
        **arrays,
        x_test=arrays["x_train"],
        y_test=arrays["y_train"][:, None],
    )
    for number in range(how_many):
        keras.utils.set_random_seed(number)
        image = keras.Input((None, None, 3))
        x = keras.layers.ZeroPadding2D(2)(image)
        for _ in range(3):
            x = keras.layers.Conv2D(10, 3, activation="relu", kernel_initializer="he_normal")(x)
        x = keras.layers.GlobalMaxPooling2D()(x)
        models.append(keras.Model(image, keras.layers.Softmax()(x)))
        paths.append(str(tmp_path / f"{number}.hdf5"))
        models[-1].save(paths[-1])
    monkeypatch.setenv("CIFAR10_NPZ", str(tmp_path / "made_up.npz"))
    monkeypatch.setattr(ship, "TARGET", tmp_path / "shipped.hdf5")
    ship.main(paths)
    shipped = keras.models.load_model(ship.TARGET, compile=False)
    images, labels = arrays["x_train"].astype("float32") / 255, arrays["y_train"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == how_many + 2 and all("(CIFAR-10, made up)" in line for line in lines)
    for model in models:
        model.set_weights([ship.rounded(weights) for weights in model.get_weights()])
    answers = np.array([model.predict(images, verbose=0) for model in models])
    assert all(np.abs(answers[0] - other).max() > 0.01 for other in answers[1:])
    mean = answers.mean(axis=0)
    expected = mean**2 / (mean**2).sum(axis=1, keepdims=True)
    answer = shipped.predict(images, verbose=0)
    np.testing.assert_allclose(answer, expected, atol=1e-5)
    assert (answer.argmax(axis=1) == mean.argmax(axis=1)).all()
    assert not ship.TARGET.with_name("new_shipped.hdf5").exists()
    shown = float(lines[-1].split(": accuracy ")[1].split(",")[0])
    assert shown == round(float((answer.argmax(1) == labels).mean()), 4)
    with h5py.File(ship.TARGET) as file:
        config = file.attrs["model_config"]
    assert "kernel_initializer" in config and "input_axes" not in config


def test_the_calibration_error_is_the_mean_distance_from_the_share_of_right_answers():
    answers = np.array([[0.9, 0.1]] * 10 + [[0.4, 0.6]] * 10)
    labels = np.array(
        [0] * 9 + [1] + [1] * 3 + [0] * 7
    )  # right: 90% of the first, 30% of the others
    assert ship.calibration_error(answers, labels) == pytest.approx((0 + 0.3) / 2)


def test_rounded_filters_are_near_and_half_as_large(tmp_path):
    rng = np.random.default_rng(0)
    filters, bias = (
        rng.normal(size=(3, 3, 64, 128)).astype("float32"),
        rng.normal(size=128).astype("float32"),
    )
    near = ship.rounded(filters)
    assert near.dtype == np.float32 and 0 < np.abs(near / filters - 1).max() <= 2**-8
    assert np.array_equal(ship.rounded(bias), bias)
    image = keras.Input((None, None, 64))
    model = keras.Model(image, keras.layers.Conv2D(128, 3)(image))
    sizes = []
    for weights in (filters, near):
        model.set_weights([weights, bias])
        ship.save(model, tmp_path / "packed.hdf5")
        sizes.append((tmp_path / "packed.hdf5").stat().st_size)
        loaded = keras.models.load_model(tmp_path / "packed.hdf5", compile=False)
        assert np.array_equal(loaded.get_weights()[0], weights)
    assert sizes[1] < 0.5 * sizes[0]
