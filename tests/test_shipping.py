"""How a trained network becomes the shipped file."""

import json
import re
import shlex
import subprocess
import sys

import h5py
import keras
import nbformat
import numpy as np
import pytest
import release
import ship
from conftest import ROOT

from visual_callbacks import ResumableCheckpoint


@pytest.fixture
def trained(tmp_path):
    """The checkpoint of a small network of the notebook's kind, whose answers are too modest."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        image = keras.Input((32, 32, 3), name="image")
        x = keras.layers.Normalization(mean=[0.5] * 3, variance=[0.1] * 3)(image)
        x = keras.layers.Conv2D(64, 3, name="conv")(x)
        x = keras.layers.BatchNormalization(scale=False)(x)
        x = keras.layers.SpatialDropout2D(0.1)(x)
        x = keras.layers.GlobalMaxPooling2D()(x)
        x = keras.layers.Dense(10, name="dense")(x)
        x = keras.layers.Rescaling(1 / 9, name="logits")(x)
        model = keras.Model(image, keras.layers.Softmax(dtype="float32")(x))
    finally:
        keras.config.set_dtype_policy("float32")
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "sparse_categorical_crossentropy")
    checkpoint = ResumableCheckpoint(tmp_path / "run", monitor="loss", verbose=False)
    x = np.random.default_rng(0).random((20, 32, 32, 3), "float32")
    model.fit(x, np.arange(20) % 10, shuffle=False, verbose=0, callbacks=[checkpoint])
    return checkpoint.best_path


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
    filters, *others = model.get_weights()
    assert not np.array_equal(filters, ship.rounded(filters))
    expected = [ship.rounded(filters), *others]
    for new, old in zip(shipped.get_weights(), expected, strict=True):
        np.testing.assert_array_equal(new, old)
    logits = keras.Model(shipped.input, shipped.get_layer("dense").output).predict(x, verbose=0) / 9
    powers = np.exp(logits / temperature)
    answers = shipped.predict(x, verbose=0)
    np.testing.assert_allclose(answers, powers / powers.sum(axis=1, keepdims=True), atol=1e-5)

    before, packed, after = re.findall(r"Validation, .*calibration error ([0-9.]+)", printed)
    assert float(after) < float(packed)
    assert 0 < float(re.search(r"change of a probability by that: ([0-9.]+)", printed)[1]) < 0.01
    shown = float(re.search(r"Test, .*: accuracy ([0-9.]+)", printed)[1])
    assert shown == round(float((answers[200:].argmax(axis=1) == y[200:]).mean()), 4)
    assert printed.count("(CIFAR-10, made up)") == 4

    ship.main(trained)  # a second time, there is one that was shipped before
    assert "Validation, shipped before (CIFAR-10, made up)" in capsys.readouterr().out


def test_an_error_leaves_what_was_shipped_before(trained, images, monkeypatch):
    ship.main(trained)
    before = ship.TARGET.read_bytes()
    names = set(ship.TARGET.parent.iterdir())
    # A file of another kind, without logits.
    image = keras.Input((32, 32, 3))
    x = keras.layers.GlobalMaxPooling2D()(image)
    keras.Model(image, keras.layers.Dense(10, "softmax")(x)).save(trained)
    with pytest.raises(ValueError, match="unpack"):
        ship.main(trained)
    assert ship.TARGET.read_bytes() == before and set(ship.TARGET.parent.iterdir()) == names


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
    x = keras.layers.Conv2D(128, 3)(image)
    model = keras.Model(image, keras.layers.Rescaling(1.0, name="logits")(x))
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


# The command ----


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder with a notebook of two cells, instead of this repository."""
    code = nbformat.v4.new_code_cell("print('made up')")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("A text."), code])
    nbformat.write(notebook, tmp_path / "notebook.ipynb")
    monkeypatch.setattr(release, "ROOT", tmp_path)
    monkeypatch.setattr(release, "NOTEBOOK", tmp_path / "notebook.ipynb")
    monkeypatch.setattr(
        release, "read_knobs", lambda arguments: dict(a.split("=") for a in arguments)
    )
    monkeypatch.setenv("CIFAR10_NPZ", "made up.npz")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def executes(root, monkeypatch, output="epoch 1/10", problem=None):
    """Lets the notebook be executed with this output; returns the list of knobs that it is executed with."""
    run = root / "models" / "runs" / "a_run"
    calls = []

    def execute(knobs):
        calls.append(knobs)
        notebook = nbformat.read(release.NOTEBOOK, 4)
        notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text=output)]
        notebook.cells[1].execution_count = 1
        run.mkdir(parents=True)
        for name in release.FIGURES:
            (run / name).write_text("new")
        nbformat.write(notebook, run / "executed.ipynb")
        return run / "executed.ipynb", problem

    monkeypatch.setattr(release, "execute", execute)
    return calls


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["PRESET=full", "EPOCHS=2"], "with no other knobs than PRESET and PRECISION: .*EPOCHS=2"),
        (["PRESET=full", "REPOSITORY=a/b"], "with no other knobs"),
        (["PRECISION=mixed_bfloat16"], "shows a run without knobs: PRECISION=mixed_bfloat16"),
    ],
)
def test_a_release_with_wrong_knobs_is_refused_before_it_trains(
    arguments, complaint, root, monkeypatch
):
    calls = executes(root, monkeypatch)
    with pytest.raises(SystemExit, match=complaint):
        release.main(arguments)
    assert not calls


def test_a_release_of_the_notebook_is_refused_where_other_runs_are(root, monkeypatch):
    calls = executes(root, monkeypatch)
    (root / "models" / "runs" / "older").mkdir(parents=True)
    (root / "models" / "runs" / "older" / "saved_model.hdf5").touch()
    with pytest.raises(SystemExit, match="older is there, but .* Move it away"):
        release.main([])
    monkeypatch.delenv("CIFAR10_NPZ")
    with pytest.raises(SystemExit, match="CIFAR10_NPZ: set it to"):
        release.main(["PRESET=full"])
    assert not calls


def test_a_release_of_the_full_preset_ships_its_weights(root, monkeypatch):
    calls = executes(root, monkeypatch)
    shipped = []
    monkeypatch.setattr(ship, "main", shipped.append)
    before = release.NOTEBOOK.read_bytes()
    release.main(["PRESET=full", "PRECISION=mixed_bfloat16"])
    assert calls == [{"PRESET": "full", "PRECISION": "mixed_bfloat16"}]
    assert shipped == [root / "models" / "runs" / "a_run" / "best_model.hdf5"]
    assert release.NOTEBOOK.read_bytes() == before


def test_a_stopped_training_is_no_release(root, monkeypatch):
    shipped = []
    monkeypatch.setattr(ship, "main", shipped.append)
    before = release.NOTEBOOK.read_bytes()
    executes(root, monkeypatch, problem="Stopped.")
    with pytest.raises(SystemExit, match="Stopped."):
        release.main(["PRESET=full"])
    assert not shipped and release.NOTEBOOK.read_bytes() == before


def test_a_release_renews_the_notebook_s_outputs_and_keeps_its_texts(root, monkeypatch):
    executes(root, monkeypatch)
    execute = release.execute

    def edits_the_text(knobs):
        result = execute(knobs)
        notebook = nbformat.read(release.NOTEBOOK, 4)
        notebook.cells[0].source = "A better text."
        nbformat.write(notebook, release.NOTEBOOK)
        return result

    monkeypatch.setattr(release, "execute", edits_the_text)
    release.main([])
    notebook = nbformat.read(release.NOTEBOOK, 4)
    assert notebook.cells[0].source == "A better text."
    assert notebook.cells[1].outputs[0].text == "epoch 1/10"
    assert notebook.cells[1].execution_count == 1
    assert notebook.metadata.code_digest == release.code_digest(notebook)
    assert (root / "Images" / "training.gif").read_text() == "new"


@pytest.mark.parametrize("what", ["the stand-in", "edited code"])
def test_a_release_refuses(what, root, monkeypatch):
    output = "digits STAND-IN, not CIFAR-10" if what == "the stand-in" else "epoch 1/10"
    executes(root, monkeypatch, output)
    execute = release.execute

    def edits_the_code(knobs):
        result = execute(knobs)
        notebook = nbformat.read(release.NOTEBOOK, 4)
        notebook.cells[1].source = "print('edited')"
        nbformat.write(notebook, release.NOTEBOOK)
        return result

    if what == "edited code":
        monkeypatch.setattr(release, "execute", edits_the_code)
    complaint = {"the stand-in": "used the stand-in", "edited code": "code was edited while"}[what]
    with pytest.raises(SystemExit, match=complaint):
        release.main([])
    assert not nbformat.read(release.NOTEBOOK, 4).cells[1].outputs


@pytest.mark.skipif(sys.platform == "win32", reason="needs make")
def test_make_release_hands_over_its_knobs():
    command = ["make", "-n", "release", "PRESET=full", "PRECISION=mixed_bfloat16"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in shown.splitlines() if "release.py" in line]
    assert set(shlex.split(line)[2:]) == {"PRESET=full", "PRECISION=mixed_bfloat16"}
    command = ["make", "-n", "release", "REPOSITORY=owner/name"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "release.py 'REPOSITORY=owner/name'" in shown
