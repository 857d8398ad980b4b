"""How a trained network becomes the shipped file."""

import json
import re

import h5py
import keras
import nbformat
import numpy as np
import pytest
import release
import ship


@pytest.fixture
def trained(tmp_path):
    """The file of a small network of the notebook's kind, whose answers are right, but too modest."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        image = keras.Input((32, 32, 3), name="image")
        x = keras.layers.Conv2D(64, 3, name="conv")(image)
        x = keras.layers.GlobalMaxPooling2D()(x)
        x = keras.layers.Dense(10, name="dense")(x)
        x = keras.layers.Rescaling(1 / 9, name="logits")(x)
        model = keras.Model(image, keras.layers.Softmax(dtype="float32")(x))
    finally:
        keras.config.set_dtype_policy("float32")
    path = tmp_path / "trained.hdf5"
    model.compile("adam", "categorical_crossentropy")  # with an optimizer's state
    model.save(path)
    return path


@pytest.fixture
def images(tmp_path, trained, monkeypatch):
    """300 images, with the labels that the network gives nine of ten; 200 of them are for validation, too."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 255, (300, 1, 1, 3), "uint8") + np.zeros((1, 32, 32, 1), "uint8")
    model = keras.models.load_model(trained, compile=False)
    y = model.predict(x.astype("float32") / 255, verbose=0).argmax(axis=1)
    y[::10] = (y[::10] + 1) % 10
    path = tmp_path / "made_up.npz"
    np.savez(path, x_train=x[:200], y_train=y[:200, None], x_test=x[200:], y_test=y[200:, None])
    monkeypatch.setenv("CIFAR10_NPZ", str(path))
    monkeypatch.setattr(ship, "TARGET", tmp_path / "shipped.hdf5")
    return x.astype("float32") / 255, y


def test_the_shipped_network_is_the_trained_one_calibrated(trained, images, capsys):
    x, y = images
    ship.main(trained)
    shipped = keras.models.load_model(ship.TARGET, compile=False)
    assert {layer.compute_dtype for layer in shipped.layers} == {"float32"}
    printed = capsys.readouterr().out
    temperature = float(re.search(r"temperature ([0-9.]+)", printed)[1])
    assert temperature < 0.95

    model = keras.models.load_model(trained, compile=False)
    filters, bias, *dense = model.get_weights()
    expected = [ship.rounded(filters), bias, *dense]
    for new, old in zip(shipped.get_weights(), expected, strict=True):
        np.testing.assert_array_equal(new, old)
    logits = keras.Model(shipped.input, shipped.get_layer("dense").output).predict(x, verbose=0) / 9
    powers = np.exp(logits / temperature)
    answers = shipped.predict(x, verbose=0)
    np.testing.assert_allclose(answers, powers / powers.sum(axis=1, keepdims=True), atol=1e-5)

    before, after = re.findall(r"Validation, .*calibration error ([0-9.]+)", printed)
    assert float(after) < float(before)
    shown = float(re.search(r"Test, .*: accuracy ([0-9.]+)", printed)[1])
    assert shown == round(float((answers[200:].argmax(axis=1) == y[200:]).mean()), 4)
    assert printed.count("(CIFAR-10, made up)") == 3

    ship.main(trained)  # a second time, there is one that was shipped before
    assert "Validation, shipped before (CIFAR-10, made up)" in capsys.readouterr().out
    assert not ship.TARGET.with_name("new_shipped.hdf5").exists()


def test_the_shipped_file_is_small_and_the_same_each_time(trained, tmp_path):
    ship.pack(trained, tmp_path / "first.hdf5", 0.5)
    ship.pack(trained, tmp_path / "second.hdf5", 0.5)
    assert (tmp_path / "first.hdf5").read_bytes() == (tmp_path / "second.hdf5").read_bytes()
    with h5py.File(tmp_path / "first.hdf5") as file:
        assert set(file) == {"model_weights"}  # without what only a resumed training needs
        config = json.loads(file.attrs["model_config"])
    (scale,) = [
        layer["config"]["scale"]
        for layer in config["config"]["layers"]
        if layer["config"]["name"] == "logits"
    ]
    assert scale == pytest.approx(2 / 9)


def test_rounded_filters_are_near_and_half_as_large(tmp_path):
    rng = np.random.default_rng(0)
    filters = rng.normal(size=(3, 3, 64, 128)).astype("float32")
    bias = rng.normal(size=128).astype("float32")
    near = ship.rounded(filters)
    assert near.dtype == np.float32 and 0 < np.abs(near / filters - 1).max() <= 2**-8
    np.testing.assert_array_equal(ship.rounded(bias), bias)
    image = keras.Input((None, None, 64))
    model = keras.Model(image, keras.layers.Conv2D(128, 3)(image))
    model.set_weights([filters, bias])
    model.save(tmp_path / "plain.hdf5")
    ship.pack(tmp_path / "plain.hdf5", tmp_path / "packed.hdf5")
    loaded = keras.models.load_model(tmp_path / "packed.hdf5", compile=False)
    np.testing.assert_array_equal(loaded.get_weights()[0], near)
    assert (tmp_path / "packed.hdf5").stat().st_size < 0.6 * filters.nbytes


def test_the_temperature_is_that_of_the_logits():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20_000, 10)) * 2
    powers = np.exp(logits)
    probabilities = powers / powers.sum(axis=1, keepdims=True)
    labels = np.array([rng.choice(10, p=row) for row in probabilities])
    modest = np.exp(logits / 2)
    modest /= modest.sum(axis=1, keepdims=True)
    assert ship.best_temperature(modest, labels) == pytest.approx(0.5, abs=0.03)
    assert ship.best_temperature(probabilities, labels) == pytest.approx(1, abs=0.03)


def test_the_calibration_error_is_the_mean_distance_from_the_share_of_right_answers():
    answers = np.array([[0.9, 0.1]] * 10 + [[0.4, 0.6]] * 10)
    labels = np.array([0] * 9 + [1] + [1] * 3 + [0] * 7)  # right: 90% of the first, 30% of the rest
    assert ship.calibration_error(answers, labels) == pytest.approx((0 + 0.3) / 2)


@pytest.mark.parametrize(
    ("knobs", "complaint"),
    [
        ('PRESET = "full"\nPRECISION = "mixed_bfloat16"', None),
        ('PRESET = "full"\nEPOCHS = 2', "has others: EPOCHS = 2"),
        ('PRECISION = "mixed_bfloat16"', "The notebook shows a run without knobs"),
    ],
)
def test_a_release_ships_a_run_of_the_full_preset(knobs, complaint, tmp_path, monkeypatch):
    cell = nbformat.v4.new_code_cell(f"# Parameters\n{knobs}\n")
    cell.metadata.tags = ["injected-parameters"]
    where = nbformat.v4.new_output("stream", text="This run is kept in models/runs/a_run\n")
    resumed = nbformat.v4.new_code_cell("train()", outputs=[where])
    executed = tmp_path / "executed.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell, resumed]), executed)
    shipped = []
    monkeypatch.setattr(ship, "main", shipped.append)
    monkeypatch.setattr(release.sys, "argv", ["release.py", str(executed)])
    if complaint:
        with pytest.raises(SystemExit, match=complaint):
            release.main()
        assert not shipped
    else:
        release.main()
        assert shipped == [release.ROOT / "models" / "runs" / "a_run" / "best_model.hdf5"]
