"""The real notebook, executed as `make run` executes it: end to end on the stand-in, and on every bad input."""

import ast
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import keras
import nbformat
import numpy as np
import papermill
import pytest
from conftest import ROOT, needs
from release import FIGURES, NOTEBOOK, clean, code_digest, printed

SMALL = {"EPOCHS": 2, "WIDTHS": [8, 8, 16], "BATCH_SIZE": 200}
NO_NETWORK = "http://127.0.0.1:9"  # where nobody listens: a proxy that refuses every connection at once


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of what the notebook needs, with an empty home and no network."""
    for name in (NOTEBOOK.name, "visual_callbacks.py"):
        shutil.copy(ROOT / name, tmp_path)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", NO_NETWORK)
    monkeypatch.setenv("no_proxy", "")
    return tmp_path


def execute(folder, **knobs):
    """Runs the notebook in `folder` and returns it, executed."""
    options = {"kernel_name": "python3", "cwd": str(folder), "progress_bar": False, "execution_timeout": 600}
    papermill.execute_notebook(str(folder / NOTEBOOK.name), str(folder / "out.ipynb"), {**SMALL, **knobs}, **options)
    return nbformat.read(folder / "out.ipynb", as_version=4)


def pictures(notebook, i):
    return [output for output in notebook.cells[i].outputs if "image/png" in output.get("data", {})]


def cell_with(notebook, text):
    (index,) = (i for i, c in enumerate(notebook.cells) if c.cell_type == "code" and text in c.source)
    return index


def test_end_to_end_on_the_stand_in_and_again(checkout):
    notebook = execute(checkout)
    text = printed(notebook)
    assert "DIGITS as a stand-in" in text and "training   (1197, 32, 32, 3)" in text
    assert "validation (300, 32, 32, 3)" in text and "300 to test with" in text
    assert "epoch 1/2 " in text and "epoch 2/2 " in text and "Test accuracy with flips: " in text
    fit = cell_with(notebook, "history = model.fit(")
    assert len(pictures(notebook, fit)) == 2  # one picture a plotter, however often it was redrawn
    for index, cell in enumerate(notebook.cells):
        titled = "suptitle" in cell.source or "ax.set(title" in cell.source
        assert not titled or "data_name" in cell.source or not pictures(notebook, index), cell.source
    (folder,) = (checkout / "models" / "runs").iterdir()
    assert {*FIGURES, "saved_model.hdf5", "best_model.hdf5"} <= {path.name for path in folder.iterdir()}
    shown = float(text.split("Test accuracy: ")[1].split()[0])
    loaded = keras.models.load_model(folder / "best_model.hdf5", compile=False)
    assert loaded.output_shape == (None, 10)
    again = execute(checkout)
    text = printed(again)
    assert "This training is complete after epoch 2" in text and "epoch 1/2 " not in text
    assert len(pictures(again, cell_with(again, "history = model.fit("))) == 2
    assert float(text.split("Test accuracy: ")[1].split()[0]) == shown
    learned = execute(checkout, EPOCHS=8, WIDTHS=[16, 32, 32])
    assert float(printed(learned).split("Test accuracy: ")[1].split()[0]) > 0.6  # ten digits: chance is 0.1
    assert len(list(folder.parent.iterdir())) == 2  # other settings, another folder


def test_an_interrupted_notebook_continues_to_the_same_result(checkout):
    whole = execute(checkout, EPOCHS=4)
    (folder,) = (checkout / "models" / "runs").iterdir()
    expected = folder.rename(checkout / "expected")
    source = nbformat.read(checkout / NOTEBOOK.name, as_version=4)
    callbacks = source.cells[cell_with(source, "callbacks = [")]
    callbacks.source += (
        "\nimport signal"
        "\nkill = lambda epoch, logs: epoch == 2 and os.kill(os.getpid(), signal.SIGKILL)"
        "\ncallbacks.append(keras.callbacks.LambdaCallback(on_epoch_begin=kill))"
    )
    nbformat.write(source, checkout / NOTEBOOK.name)
    with pytest.raises(Exception, match="[Kk]ernel"):
        execute(checkout, EPOCHS=4)
    shutil.copy(ROOT / NOTEBOOK.name, checkout)
    resumed = execute(checkout, EPOCHS=4)
    text = printed(resumed)
    assert "Continuing after epoch 2" in text and "epoch 3/4 " in text and "epoch 2/4 " not in text
    for name in ("saved_model.hdf5", "best_model.hdf5"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes()
    assert text.split("Test accuracy: ")[1] == printed(whole).split("Test accuracy: ")[1]


def array_file(path, count=600, **changes):
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8),
        "y_train": np.arange(count)[:, None] % 10,
    }
    arrays |= {"x_test": arrays["x_train"][:300], "y_test": arrays["y_train"][:300], **changes}
    np.savez(path, **{name: values for name, values in arrays.items() if values is not None})


def missing(path):
    pass


def truncated(path):
    array_file(path)
    path.write_bytes(path.read_bytes()[:-5000])


def damaged_inside(path):
    array_file(path)
    data = bytearray(path.read_bytes())
    data[20_000:20_100] = bytes(100)
    path.write_bytes(data)


def wrong_shape(path):
    array_file(path, x_train=np.zeros((600, 28, 28), np.uint8))


def wrong_dtype(path):
    array_file(path, x_train=np.zeros((600, 32, 32, 3), np.float32))


def fewer_labels(path):
    array_file(path, y_train=np.zeros((599, 1), np.uint8))


def label_out_of_range(path):
    array_file(path, y_test=np.full((300, 1), 10))


def array_missing(path):
    array_file(path, x_test=None)


def pickled_file(path):
    path.write_bytes(pickle.dumps({"x_train": 1}))


def pickled_array(path):
    array_file(path, y_train=np.array([{"label": 1}] * 600, dtype=object))


def empty(path):
    path.write_bytes(b"")


BAD_FILES = (missing, empty, truncated, damaged_inside, wrong_shape, wrong_dtype, fewer_labels, label_out_of_range)
BAD_FILES += (array_missing, pickled_file, pickled_array)


def test_bad_data_files_are_errors_that_name_the_file(checkout):
    """One kernel reads them all, by the notebook's own cell; the first also ends a whole run of the notebook."""
    for make in BAD_FILES:
        make(checkout / f"{make.__name__}.npz")
    source = nbformat.read(checkout / NOTEBOOK.name, as_version=4)
    index = cell_with(source, "def read_file")
    reads = "\n".join(
        f"try:\n    read_file('{make.__name__}.npz'); print('ACCEPTED {make.__name__}')\n"
        "except ValueError as error:\n    print('REFUSED', error)"
        for make in BAD_FILES
    )
    source.cells = [*source.cells[: index + 1], nbformat.v4.new_code_cell(reads)]
    nbformat.write(source, checkout / NOTEBOOK.name)
    lines = [line for line in printed(execute(checkout)).splitlines() if line.startswith(("REFUSED", "ACCEPTED"))]
    assert len(lines) == len(BAD_FILES)
    for make, line in zip(BAD_FILES, lines):
        assert line.startswith(f"REFUSED DATA_FILE {make.__name__}.npz cannot be used: "), line
        assert "Expected an .npz file with x_train" in line and "Name another file" in line
    shutil.copy(ROOT / NOTEBOOK.name, checkout)
    with pytest.raises(papermill.PapermillExecutionError, match="DATA_FILE missing.npz cannot be used"):
        execute(checkout, DATA_FILE="missing.npz")


def test_a_named_file_is_used_and_named_in_the_results(checkout, monkeypatch):
    array_file(checkout / "my_copy.npz")
    monkeypatch.setenv("CIFAR10_NPZ", str(checkout / "my_copy.npz"))
    text = printed(execute(checkout, EPOCHS=1))
    assert "CIFAR-10, my copy: 600 images" in text and "stand-in" not in text
    assert "(CIFAR-10, my copy)" in text.split("Test accuracy: ")[1]


def test_a_network_that_never_answers_is_given_up(checkout, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections, says nothing
        for scheme in ("http", "https"):
            monkeypatch.setenv(f"{scheme}_proxy", f"http://127.0.0.1:{silent.getsockname()[1]}")
        source = nbformat.read(checkout / NOTEBOOK.name, as_version=4)
        source.cells = source.cells[: cell_with(source, "def load_data") + 1]
        nbformat.write(source, checkout / NOTEBOOK.name)
        assert "DIGITS as a stand-in" in printed(execute(checkout))


def test_make_run_refuses_an_unknown_knob_and_lists_the_valid_ones():
    needs(shutil.which("make") and (ROOT / ".venv").exists(), "make with its environment")
    result = subprocess.run(["make", "run", "EPOCH=1"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode and "EPOCH is not a knob" in result.stderr
    assert "PRESET DATA_FILE SEED EPOCHS SMALL_SHARE" in result.stderr and "Executing" not in result.stderr


def test_the_parameters_cell_holds_literals_only():
    (cell,) = (c for c in nbformat.read(NOTEBOOK, 4).cells if "parameters" in c.metadata.get("tags", []))
    names = {}
    exec(cell.source, {"__builtins__": {}}, names)  # no name and no function is known: only literals pass
    assert all(name.isupper() for name in names)
    presets = [value for value in names.values() if isinstance(value, dict)]
    assert presets and all(value.keys() == {"default", "full"} for value in presets)


def test_a_preset_decides_what_was_not_set_and_an_unknown_one_is_refused(checkout):
    source = nbformat.read(checkout / NOTEBOOK.name, as_version=4)
    source.cells = source.cells[: cell_with(source, "settings = {") + 1]
    nbformat.write(source, checkout / NOTEBOOK.name)
    text = printed(execute(checkout, PRESET="full"))
    settings = ast.literal_eval(text[text.index("{") : text.index("}") + 1])
    assert settings["PRESET"] == "full" and {name: settings[name] for name in SMALL} == SMALL
    (cell,) = (c for c in source.cells if "parameters" in c.metadata.get("tags", []))
    knobs = {}
    exec(cell.source, {}, knobs)
    expected = {name: value["full"] if isinstance(value, dict) else value for name, value in knobs.items()}
    del expected["DATA_FILE"]
    assert settings == {**expected, **SMALL, "PRESET": "full"}
    with pytest.raises(papermill.PapermillExecutionError, match="PRESET: expected .default. or .full., got .large."):
        execute(checkout, PRESET="large")


def test_a_batch_size_that_leaves_one_batch_is_refused(checkout):
    source = nbformat.read(checkout / NOTEBOOK.name, as_version=4)
    source.cells = source.cells[: cell_with(source, "x_train, x_val = np.split") + 1]
    nbformat.write(source, checkout / NOTEBOOK.name)
    with pytest.raises(papermill.PapermillExecutionError, match="BATCH_SIZE: expected less than the 1,197 training"):
        execute(checkout, BATCH_SIZE=1197)


def test_the_notebook_keeps_to_its_shape():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(notebook.cells) <= 40
    assert max(len([line for line in cell.source.splitlines() if line.strip()]) for cell in code) <= 25
    assert "Callback)" not in "".join(cell.source for cell in code)


def test_the_committed_outputs_are_those_of_the_committed_code():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert notebook.metadata.get("code_digest") == code_digest(notebook), "code was edited: run `make release`"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    text = printed(notebook)
    assert "JPEG copy" in text and "STAND-IN" not in text and "cpu_feature_guard" not in json.dumps(notebook)
    assert "papermill" not in json.dumps(notebook.metadata) and NOTEBOOK.stat().st_size < 2_000_000
    for claim in ("Test accuracy: ", "Test accuracy with flips: "):
        assert text.split(claim)[1].split()[0] in (ROOT / "README.md").read_text()


def test_clean_drops_what_the_runner_left():
    cell = nbformat.v4.new_code_cell("1", metadata={"papermill": {"duration": 1}, "tags": ["parameters"]})
    cell.outputs = [nbformat.v4.new_output("stream", name="stderr", text="I0000 cpu_feature_guard")]
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"papermill": {"version": "2"}})
    clean(notebook)
    assert "papermill" not in json.dumps(notebook) and not cell.outputs and cell.metadata.tags == ["parameters"]
    edited = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("2")])
    assert notebook.metadata.code_digest == code_digest(notebook) != code_digest(edited)


def test_the_shipped_weights_load_in_plain_keras():
    text = (
        "import keras, numpy\n"
        "model = keras.models.load_model('models/best_model.hdf5', compile=False)\n"
        "print(model.predict(numpy.zeros((2, 32, 32, 3), 'float32'), verbose=0).sum(1).round(4).tolist())"
    )
    env = {**os.environ, "PYTHONPATH": ""}
    result = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, env=env)
    assert result.stdout.strip() == "[1.0, 1.0]", result.stderr
    assert Path(ROOT, "models", "best_model.hdf5").stat().st_size < 40e6
