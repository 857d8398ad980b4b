"""The real notebook, executed as `make run` executes it: end to end on the stand-in, and on every bad input."""

import ast
import copy
import functools
import http.server
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import threading
import zlib
from pathlib import Path
from zipfile import BadZipFile

import h5py
import keras
import nbformat
import numpy as np
import papermill
import pytest
import training
from conftest import ROOT, needs
from PIL import Image
from release import FIGURES, NOTEBOOK, clean, code_digest, printed, set_repository, with_badge_to

from visual_callbacks import ResumableCheckpoint

SMALL = {"EPOCHS": 2, "WIDTHS": [8, 8, 16], "BATCH_SIZE": 200}
NO_NETWORK = (
    "http://127.0.0.1:9"  # where nobody listens: a proxy that refuses every connection at once
)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of what the notebook needs, with an empty home and no network."""
    for name in (NOTEBOOK.name, "visual_callbacks.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("Makefile", "requirements.txt"):
        shutil.copy2(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", NO_NETWORK)
    monkeypatch.setenv("no_proxy", "")
    return tmp_path


def leave_out_demos(path):
    """Takes the small trainings that explain something out of a notebook."""
    source = nbformat.read(path, as_version=4)
    source.cells = [cell for cell in source.cells if "demo" not in cell.metadata.get("tags", [])]
    nbformat.write(source, path)


def shorten_demos(path):
    """Makes the longest of those small trainings a tenth as long; `.ci/run` runs them in full."""
    source = nbformat.read(path, as_version=4)
    demo = source.cells[cell_with(source, "def train_on_few(")]
    assert "epochs=40" in demo.source
    demo.source = demo.source.replace("epochs=40", "epochs=4")
    nbformat.write(source, path)


def execute(folder, demo=False, **knobs):
    """Runs the notebook in `folder`, and returns it, executed; without its small trainings unless asked for."""
    path = folder / NOTEBOOK.name
    if not demo:
        leave_out_demos(path)
    options = {
        "kernel_name": "python3",
        "cwd": str(folder),
        "progress_bar": False,
        "execution_timeout": 1200,
    }
    papermill.execute_notebook(str(path), str(folder / "out.ipynb"), {**SMALL, **knobs}, **options)
    return nbformat.read(folder / "out.ipynb", as_version=4)


def pictures(notebook, i):
    return [output for output in notebook.cells[i].outputs if "image/png" in output.get("data", {})]


def cell_with(notebook, text):
    (index,) = (
        i for i, c in enumerate(notebook.cells) if c.cell_type == "code" and text in c.source
    )
    return index


def until(checkout, text, more=""):
    """Cuts the notebook in `checkout` off after the cell with `text`, and adds a cell with `more`."""
    source = nbformat.read(checkout / NOTEBOOK.name, as_version=4)
    source.cells = source.cells[: cell_with(source, text) + 1]
    if more:
        source.cells.append(nbformat.v4.new_code_cell(more))
    nbformat.write(source, checkout / NOTEBOOK.name)


def run(checkout, **knobs):
    """`make run`, with this environment; returns the executed notebook and what was printed."""
    arguments = [f"{name}={value}" for name, value in {**SMALL, **knobs}.items()]
    # Make that runs these tests would have the inner one print its directory.
    command = ["make", "--no-print-directory", "run", f"VENV={ROOT / '.venv'}", *arguments]
    result = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    executed = result.stdout.split("Executed notebook: ")[1].splitlines()[0]
    return nbformat.read(checkout / executed, 4), result.stdout


@pytest.mark.slow
def test_end_to_end_on_the_stand_in_and_again(checkout):
    shorten_demos(checkout / NOTEBOOK.name)
    notebook, said = run(checkout)
    text = printed(notebook)
    assert "Weights and losses are equal bit for bit." in text
    assert "Training on" in text and "the same numbers to the last bit" in text
    assert "DIGITS as a stand-in" in text and "training   (1197, 32, 32, 3)" in text
    assert "validation (300, 32, 32, 3)" in text and "300 to test with" in text
    assert "epoch 1/2 " in text and "epoch 2/2 " in text and "Test accuracy with flips: " in text
    # What a person needs, and first the number by which runs are compared.
    last = said.splitlines()[-4:]
    assert [line.split(":")[0] for line in last] == [
        "Validation accuracy",
        "Test accuracy",
        "Test accuracy with flips",
        "Executed notebook",
    ]
    assert "epoch 2/2 " in said and "equal bit for bit" in said and "This run is kept in" in said
    for noise in ("Executing", "Ending Cell", "object>", "block1_conv2", "added up"):
        assert noise not in said, said
    fit = cell_with(notebook, "history = model.fit(")
    assert len(pictures(notebook, fit)) == 1  # of all plotters, however often it was redrawn
    for index, cell in enumerate(notebook.cells):
        titled = "title=" in cell.source or "title(" in cell.source
        if cell.cell_type == "code" and titled and pictures(notebook, index):
            assert "data_name" in cell.source or "show_" in cell.source, cell.source
    (folder,) = (checkout / "models" / "runs").iterdir()
    assert {*FIGURES, "saved_model.hdf5", "best_model.hdf5"} <= {
        path.name for path in folder.iterdir()
    }
    shown = float(text.split("Test accuracy: ")[1].split()[0])
    loaded = keras.models.load_model(folder / "best_model.hdf5", compile=False)
    assert loaded.output_shape == (None, 10)
    leave_out_demos(checkout / NOTEBOOK.name)
    again, _ = run(checkout, TENSORBOARD=False, KEEP_ON_DRIVE=False)  # no settings of the training
    assert len(list(folder.glob("*.ipynb"))) == 2  # neither was overwritten
    text = printed(again)
    assert "This training is complete after epoch 2" in text and "epoch 1/2 " not in text
    assert len(pictures(again, cell_with(again, "history = model.fit("))) == 1
    assert float(text.split("Test accuracy: ")[1].split()[0]) == shown


@pytest.mark.stack
@pytest.mark.slow
@pytest.mark.colab
def test_it_learns_on_the_stand_in_from_end_to_end(checkout):
    """On other sets of versions; on this one, the test above runs all cells, and `.ci/run` sees that it learns."""
    another = checkout / "models" / "runs" / "another"  # another run's beginning
    another.mkdir(parents=True)
    (another / "settings.json").write_text("{}")
    shorten_demos(checkout / NOTEBOOK.name)
    text = printed(execute(checkout, demo=True, EPOCHS=8, WIDTHS=[16, 32, 32]))
    assert float(text.split("Test accuracy: ")[1].split()[0]) > 0.6  # ten digits: chance is 0.1
    assert (
        "Keras" in text and f"on {keras.backend.backend()}" in text and "equal bit for bit" in text
    )
    # Other settings, another folder.
    assert len(list((checkout / "models" / "runs").iterdir())) == 2


@pytest.mark.slow
def test_an_interrupted_notebook_continues_to_the_same_result(checkout):
    until(checkout, "history = model.fit(")
    execute(checkout, EPOCHS=4)
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
    until(checkout, "history = model.fit(")
    text = printed(execute(checkout, EPOCHS=4))
    assert "Continuing after epoch 2" in text and "epoch 3/4 " in text and "epoch 2/4 " not in text
    for name in ("saved_model.hdf5", "best_model.hdf5"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes()


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


BAD_FILES = (
    missing,
    empty,
    truncated,
    damaged_inside,
    wrong_shape,
    wrong_dtype,
    fewer_labels,
    label_out_of_range,
)
BAD_FILES += (array_missing, pickled_file, pickled_array)


def source_of(text):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    return notebook.cells[cell_with(notebook, text)].source


@pytest.mark.parametrize("make", BAD_FILES)
def test_bad_data_files_are_errors_that_name_the_file(make, tmp_path):
    make(tmp_path / "given.npz")
    names = {"np": np, "zlib": zlib, "BadZipFile": BadZipFile, "DATA_FILE": "given.npz"}
    names |= {"Path": Path}
    exec(source_of("def read_file"), names)
    said = "^DATA_FILE given.npz cannot be used: .*Expected an .npz.*Name another file"
    with pytest.raises(ValueError, match=f"(?s){said}"):
        exec(source_of("def read_digits"), names)  # the cell that reads DATA_FILE


def test_a_named_file_is_used_and_named_in_the_results(checkout, monkeypatch):
    array_file(checkout / "my_copy.npz", count=800)
    monkeypatch.setenv("CIFAR10_NPZ", str(checkout / "my_copy.npz"))
    until(checkout, "black_to_red")
    notebook = execute(checkout)
    assert "CIFAR-10, my copy: 800 images" in printed(notebook) and "stand-in" not in printed(
        notebook
    )
    assert pictures(notebook, len(notebook.cells) - 1)


@pytest.mark.slow
def test_a_network_that_never_answers_is_given_up(checkout, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections, says nothing
        for scheme in ("http", "https"):
            monkeypatch.setenv(f"{scheme}_proxy", f"http://127.0.0.1:{silent.getsockname()[1]}")
        source = nbformat.read(checkout / NOTEBOOK.name, as_version=4)
        source.cells = source.cells[: cell_with(source, "def read_digits") + 1]
        nbformat.write(source, checkout / NOTEBOOK.name)
        assert "DIGITS as a stand-in" in printed(execute(checkout))


# Machines of our users ----


def run_first_cells(last, before="", after="", **environment):
    """Runs the notebook's cells up to the one with the text `last` as a script; returns what it printed."""
    source = nbformat.read(NOTEBOOK, as_version=4)
    cells = [
        cell.source
        for cell in source.cells[: cell_with(source, last) + 1]
        if cell.cell_type == "code"
    ]
    env = {**os.environ, **environment}
    env = {name: value for name, value in env.items() if value is not None}
    text = "\n".join([before, *cells, after])
    result = subprocess.run(
        [sys.executable, "-c", text], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


HIDE = "import sys\nfor name in {}: sys.modules[name] = None  # as if it were not installed"


@pytest.mark.parametrize(
    "hidden, environment, config, expected",
    [
        (["tensorflow"], {}, "", "jax"),
        (["tensorflow", "jax"], {}, "", "torch"),
        (["tensorflow"], {}, '{"backend": "tensorflow"}', "jax"),
        (["tensorflow"], {}, '{"backend": "torch"}', "None"),  # which was chosen there
        (["tensorflow"], {"KERAS_BACKEND": "torch"}, "", "torch"),
        ([], {}, "", "None"),
    ],
)
def test_without_tensorflow_another_backend_is_taken_if_none_is_chosen(
    tmp_path, hidden, environment, config, expected
):
    if config:
        (tmp_path / "keras.json").write_text(config)
    environment = {"KERAS_BACKEND": None, "KERAS_HOME": str(tmp_path), **environment}
    look = "print('CHOSEN', os.environ.get('KERAS_BACKEND'))"
    said = run_first_cells("keras.json", HIDE.format(hidden), look, **environment)
    assert said.split("CHOSEN ")[1].strip() == expected


def test_certificates_are_certifis_where_there_are_none(tmp_path):
    missing = str(tmp_path / "none")
    look = "print('FILE', os.environ.get('SSL_CERT_FILE'), bool(ssl.create_default_context().get_ca_certs()))"
    said = run_first_cells("certifi", after=look, SSL_CERT_FILE=missing, SSL_CERT_DIR=missing)
    assert "cacert.pem True" in said.split("FILE ")[1]
    own = tmp_path / "own.pem"
    own.write_text("")
    said = run_first_cells("certifi", after=look, SSL_CERT_FILE=str(own), SSL_CERT_DIR=missing)
    assert said.split("FILE ")[1].startswith(str(own))  # whoever has some keeps them


LOOK_AT_THE_NETWORK = """
for layer in model.layers:
    for name, value in vars(layer).items():
        if isinstance(value, (np.ndarray, np.generic)):
            print("NUMPY", layer.name, name, value.dtype)
print("LOOKED", len(model.layers))
"""
LOOK_AT_THE_REDS = (
    "print('REDS', [[float(c) for c in black_to_red(v)[:3]] for v in (0, 40, 231, 255)])"
)


@pytest.mark.slow
def test_the_first_cells_say_why_there_is_no_data_and_prepare_what_every_machine_can_use(checkout):
    source = nbformat.read(checkout / NOTEBOOK.name, as_version=4)
    source.cells = source.cells[: cell_with(source, "def build_model") + 1]
    source.cells.append(nbformat.v4.new_code_cell(LOOK_AT_THE_NETWORK))
    source.cells.append(nbformat.v4.new_code_cell(LOOK_AT_THE_REDS))
    nbformat.write(source, checkout / NOTEBOOK.name)
    said = printed(execute(checkout))
    why = said[
        said.index("CIFAR-10 could not be had, because:") : said.index("DIGITS as a stand-in")
    ]
    assert "Connection refused" in why and "DATA_FILE" in said.split("DIGITS as a stand-in")[1]
    # PyTorch refuses float64 on Apple's GPU; a NumPy number in a layer's argument is enough.
    assert "LOOKED" in said and "float64" not in said, said
    reds = ast.literal_eval(said.split("REDS ")[1].splitlines()[0])
    brightness = [red for red, green, blue in reds]
    assert brightness == sorted(brightness) and brightness[0] == 0 and brightness[-1] == 1
    assert all(green == blue == 0 for _, green, blue in reds)


def test_more_workers_are_refused_by_the_data_set():
    names = {"keras": keras, "np": np, "SEED": 0, "SHIFT": 2, "data_name": "made up"}
    exec(source_of("class AugmentedImages"), names)
    data = names["AugmentedImages"](np.zeros((100, 32, 32, 3)), np.zeros((100, 10)), 50)
    data.workers = 2
    with pytest.raises(AssertionError, match="workers: expected 1"):
        data.start_epoch(1)


NO_CUT = "PowerCut.on_train_batch_end = lambda self, batch, logs=None: None"
FORGETS = """
class Forgetful(ResumableCheckpoint):
    def restore(self, model):
        epoch = super().restore(model)
        if epoch:
            model.set_weights([weights + 0.01 for weights in model.get_weights()])
        return epoch

ResumableCheckpoint = Forgetful
"""


def run_the_drill(change=""):
    """Runs the two cells of the notebook's drill, with a change between them."""
    source = nbformat.read(NOTEBOOK, as_version=4)
    at = cell_with(source, "class PowerCut")
    names = {"keras": keras, "layers": keras.layers, "Path": Path, "tempfile": tempfile}
    names |= {"ResumableCheckpoint": ResumableCheckpoint, "SEED": 0, "classes": range(10)}
    names["few"] = np.random.default_rng(0).random((1000, 32, 32, 3), "float32")
    names["few_labels"] = np.eye(10, dtype="float32")[np.arange(1000) % 10]
    for text in (source.cells[at].source, change, source.cells[at + 1].source):
        exec(text, names)


def test_the_drill_announces_only_what_it_found(capsys):
    training.prepare()
    run_the_drill()
    assert "equal bit for bit" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="does not continue exactly"):
        run_the_drill(FORGETS)
    assert "equal bit for bit" not in capsys.readouterr().out
    with pytest.raises(AssertionError, match="the power was not cut"):
        run_the_drill(NO_CUT)


# Colab ----

# A stand-in for what a Colab runtime has: google.colab, and the way to GitHub, where the helper file comes from.
COLAB = """
import io, pathlib, sys, types, urllib.request

class Drive:
    def mount(self, path):
        print("MOUNTED", path)
        pathlib.Path(path, "MyDrive").mkdir(parents=True, exist_ok=True)

class Files:
    def upload(self):
        pathlib.Path("uploaded.png").write_bytes(pathlib.Path("pictures", "square.png").read_bytes())
        return {"uploaded.png": b""}

def urlopen(address, **options):
    if address == "https://raw.githubusercontent.com/someone/cnn/main/visual_callbacks.py":
        print("FETCHED", address)
        return io.BytesIO(pathlib.Path(HELPER).read_bytes())
    return real_urlopen(address, **options)

real_urlopen, urllib.request.urlopen = urllib.request.urlopen, urlopen
colab = types.ModuleType("google.colab")
colab.drive, colab.files = Drive(), Files()
sys.modules["google.colab"] = colab
"""


def on_colab(folder, **knobs):
    """Runs the notebook, and nothing beside it, as on a fresh Colab runtime whose Drive is `folder`/drive."""
    source = nbformat.read(NOTEBOOK, as_version=4)
    set_repository(source, "someone/cnn")
    source.cells.insert(
        0, nbformat.v4.new_code_cell(f"HELPER = {str(ROOT / 'visual_callbacks.py')!r}\n" + COLAB)
    )
    for left in ("visual_callbacks.py", "models"):
        shutil.rmtree(folder / left, ignore_errors=True)
        (folder / left).unlink(missing_ok=True)
    nbformat.write(source, folder / NOTEBOOK.name)
    until(folder, "history = model.fit(")
    return execute(folder, KEEP_ON_DRIVE=True, **knobs)


@pytest.mark.colab
@pytest.mark.slow
def test_after_a_disconnect_of_colab_run_all_is_all_it_takes(checkout):
    whole = printed(on_colab(checkout, EPOCHS=3))
    assert (
        "FETCHED https://raw" in whole
        and f"MOUNTED {checkout / 'drive'}" in whole
        and "Continuing" not in whole
    )
    (kept,) = (checkout / "drive" / "MyDrive").iterdir()
    kept.rename(checkout / "expected")
    shutil.copytree(checkout / "expected", kept)
    # On a new machine, only the Drive is as it was.
    again = printed(on_colab(checkout, EPOCHS=3))
    assert "This training is complete after epoch 3" in again and "epoch 1/3" not in again
    (run,) = (checkout / "models" / "runs").iterdir()
    for name in ("saved_model.hdf5", "best_model.hdf5"):
        expected = (checkout / "expected" / name).read_bytes()
        assert (run / name).read_bytes() == (kept / name).read_bytes() == expected


@pytest.mark.colab
def test_without_the_helper_file_and_an_address_it_is_an_error_that_says_what_to_do(checkout):
    (checkout / "visual_callbacks.py").unlink()
    with pytest.raises(
        papermill.PapermillExecutionError,
        match="visual_callbacks.py is not beside this notebook. Put",
    ):
        execute(checkout)


def test_a_badge_is_there_only_with_an_address():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    first_page, readme = notebook.cells[0].source, (ROOT / "README.md").read_text()
    if 'repository = ""' in notebook.cells[1].source:
        for text in (first_page, readme):
            assert "colab.research.google.com" not in text and "Upload" in text
    set_repository(notebook, "someone/cnn")
    set_repository(notebook, "someone/else")  # and can be changed
    address = "https://colab.research.google.com/github/someone/else/blob/main/CIFAR_10_Classification.ipynb"
    for text in (notebook.cells[0].source, with_badge_to(readme, "someone/else")):
        title, badge = text.split("\n\n")[:2]
        assert (
            title.startswith("# ")
            and badge.startswith("[![Open in Colab]")
            and badge.endswith(f"]({address})")
        )
        assert text.count("[![") == 1
    assert 'repository = "someone/else"' in notebook.cells[1].source
    with pytest.raises(SystemExit, match="owner/name"):
        set_repository(notebook, "nobody")


# Several devices ----


@pytest.mark.slow
@pytest.mark.devices
def test_two_devices_share_the_work_and_a_checkpoint(checkout, monkeypatch):
    source = nbformat.read(checkout / NOTEBOOK.name, as_version=4)
    if keras.backend.backend() == "jax":
        monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
        count = "keras.distribution.distribution().device_mesh.shape[0]"
    else:
        two = "tf.config.set_logical_device_configuration(tf.config.list_physical_devices('CPU')[0], [{}, {}])".format(
            *["tf.config.LogicalDeviceConfiguration()"] * 2
        )
        source.cells.insert(0, nbformat.v4.new_code_cell(f"import tensorflow as tf\n{two}"))
        count = "tf.distribute.get_strategy().num_replicas_in_sync"
    source.cells.append(nbformat.v4.new_code_cell(f"print({count}, 'DEVICES')"))
    nbformat.write(source, checkout / NOTEBOOK.name)
    text = printed(execute(checkout, EPOCHS=1))
    assert "2 DEVICES" in text and "epoch 1/1" in text
    source.cells = source.cells[: cell_with(source, "history = model.fit(") + 1] + source.cells[-1:]
    nbformat.write(source, checkout / NOTEBOOK.name)
    text = printed(execute(checkout, EPOCHS=1))
    assert "2 DEVICES" in text and "This training is complete after epoch 1" in text


# Own pictures ----


def draw_pictures(folder):
    """Pictures of many kinds in `folder`: black below, their upper half red, or grey where there is no colour."""
    folder.mkdir()
    picture = Image.new("RGB", (60, 80), "black")
    picture.paste("red", (0, 0, 60, 40))
    picture.crop((0, 0, 60, 60)).save(folder / "square.png")
    picture.convert("L").save(folder / "grey.png")
    Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 256).save(
        folder / "grey16.png"
    )
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.quantize(4).save(folder / "palette.gif", transparency=0)
    clear = picture.convert("RGBA")
    clear.putalpha(0)
    clear.save(folder / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # held sideways: to be turned by 90 degrees clockwise
    picture.rotate(90, expand=True).save(folder / "rotated.jpg", exif=exif, quality=95)
    Image.new("RGB", (1, 1), "red").save(folder / "tiny.png")
    phone = Image.new("L", (10_000, 20_000))  # as many pixels as the largest cameras of phones have
    phone.paste(76, (0, 0, 10_000, 10_000))
    phone.save(folder / "phone grey.jpg")
    good = sorted(path.name for path in folder.iterdir())
    (folder / "broken.png").write_bytes((folder / "grey.png").read_bytes()[:60])
    (folder / "notes.txt").write_text("no picture")
    (folder / "iphone.heic").write_bytes(bytes(4) + b"ftypheic" + bytes(200))
    Image.new("1", (20_000, 20_000)).save(folder / "wide.png")
    shutil.copy(folder / "square.png", folder / "heavy.png")
    os.truncate(folder / "heavy.png", 200_000_001)
    return good, ["broken.png", "notes.txt", "iphone.heic", "wide.png", "heavy.png"]


@pytest.mark.colab
@pytest.mark.slow
def test_pictures_of_any_kind_are_classified_and_others_are_named_and_skipped(
    checkout, monkeypatch
):
    good, bad = draw_pictures(checkout / "pictures")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = functools.partial(
        http.server.SimpleHTTPRequestHandler, directory=str(checkout / "pictures")
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        source = nbformat.read(checkout / NOTEBOOK.name, as_version=4)
        # The network stays untrained: what it answers does not matter here.
        built = cell_with(source, "def build_model")
        begin = cell_with(source, "def find_pictures")
        end = cell_with(source, "classify(PICTURES")
        source.cells = [*source.cells[: built + 1], *source.cells[begin : end + 1]]
        source.cells.insert(0, nbformat.v4.new_code_cell(f"HELPER = ''\n{COLAB}"))
        source.cells.append(nbformat.v4.new_code_cell("classify('pictures/grey.png')"))
        look = "print('SEEN', {n: np.asarray(open_picture(f'pictures/{n}'))[[5, -5], 5].tolist() for n in GOOD})"
        source.cells.append(
            nbformat.v4.new_code_cell(
                look.replace("GOOD", repr([n for n in good if n != "tiny.png"]))
            )
        )
        nbformat.write(source, checkout / NOTEBOOK.name)
        web = [f"{address}/cmyk.jpg", f"{address}/none.jpg", f"{address}/notes.txt"]
        notebook = execute(checkout, EPOCHS=1, PICTURES=["pictures", "missing.jpg", *web, "upload"])
        server.shutdown()
    skipped = [line for line in printed(notebook).splitlines() if line.startswith("Skipped ")]
    for name in [*(f"pictures/{name}" for name in bad), "missing.jpg", *web[1:]]:
        assert sum(line.startswith(f"Skipped {name}: ") for line in skipped) == 1, (name, skipped)
    assert len(skipped) == len(bad) + 3
    (heic,) = [line for line in skipped if "iphone.heic" in line]
    assert "HEIC needs pillow-heif" in heic
    assert "it is no picture that can be read" in "".join(skipped)
    shown = pictures(notebook, cell_with(notebook, "classify(PICTURES"))
    # Each as it is, and as the network sees it; one from the web, one uploaded.
    assert len(shown) == 2 * (len(good) + 2)
    assert len(pictures(notebook, len(notebook.cells) - 2)) == 2  # one name instead of a list
    seen = ast.literal_eval(printed(notebook).split("SEEN ")[1].splitlines()[0])
    for name, (above, below) in seen.items():
        if name == "palette.gif":  # one of its two colours is transparent, and so white
            assert [255, 255, 255] in (above, below)
            continue
        upper = [76, 76, 76] if "grey" in name else [254, 0, 0]
        lower = [0, 0, 0]
        if name == "clear.png":
            upper = lower = [255, 255, 255]
        assert np.allclose(above, upper, atol=6), (name, above)
        assert np.allclose(below, lower, atol=6), (name, below)


def test_make_run_refuses_an_unknown_knob_and_lists_the_valid_ones():
    needs(shutil.which("make") and (ROOT / ".venv").exists(), "make with its environment")
    result = subprocess.run(["make", "run", "EPOCH=1"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode and "EPOCH is not a knob" in result.stderr
    assert (
        "PRESET DATA_FILE PICTURES KEEP_ON_DRIVE TENSORBOARD FINAL SEED EPOCHS" in result.stderr
        and "Executing" not in result.stderr
    )


def test_the_parameters_cell_holds_literals_only():
    (cell,) = (
        c for c in nbformat.read(NOTEBOOK, 4).cells if "parameters" in c.metadata.get("tags", [])
    )
    names = {}
    # No name and no function is known: only literals pass.
    exec(cell.source, {"__builtins__": {}}, names)
    assert all(name.isupper() for name in names)
    presets = [value for value in names.values() if isinstance(value, dict)]
    assert presets and all(value.keys() == {"default", "full"} for value in presets)


def first_cells(last, **changes):
    """Executes the notebook's cells up to the one with `last`, each knob changed; returns its names."""
    names = {"__name__": "__main__"}
    source = nbformat.read(NOTEBOOK, as_version=4)
    for cell in source.cells[: cell_with(source, last) + 1]:
        tags = cell.metadata.get("tags", ())
        if cell.cell_type == "code" and not {"demo", "report"} & set(tags):
            exec(cell.source, names)
        if "parameters" in tags:
            names.update(changes)
    return names


def test_a_preset_decides_what_was_not_set_and_an_unknown_one_is_refused(tmp_path, monkeypatch):
    shutil.copy(ROOT / "visual_callbacks.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    settings = first_cells("settings = {", PRESET="full", **SMALL)["settings"]
    (cell,) = (
        c for c in nbformat.read(NOTEBOOK, 4).cells if "parameters" in c.metadata.get("tags", [])
    )
    knobs = {}
    exec(cell.source, {}, knobs)
    expected = {}
    for name, value in knobs.items():
        expected[name] = value["full"] if isinstance(value, dict) else value
    # These are no settings of the training, or are printed before them.
    for name in ("DATA_FILE", "PICTURES", "KEEP_ON_DRIVE", "TENSORBOARD", "FINAL", "PRESET"):
        del expected[name]
    assert settings == {**expected, **SMALL}
    with pytest.raises(ValueError, match="PRESET: expected .default. or .full., got .large."):
        first_cells("settings = {", PRESET="large")


@pytest.mark.parametrize(
    "knob, value, expected",
    [
        ("EPOCHS", 0, "EPOCHS: expected a whole number from 1 to 10000, got 0."),
        ("EPOCHS", "three", "EPOCHS: expected a whole number from 1 to 10000, got 'three'."),
        ("EPOCHS", 2.5, "EPOCHS: expected a whole number"),
        ("EPOCHS", True, "EPOCHS: expected a whole number"),
        ("LEARNING_RATE", 0, "LEARNING_RATE: expected a number from 1e-06 to 10.0, got 0."),
        ("WIDTHS", [], "WIDTHS: expected a list of one to four numbers, got"),
        ("WIDTHS", 64, "WIDTHS: expected a list of one to four numbers, got 64"),
        ("WIDTHS", [64, "x"], "WIDTHS, number 2: expected a whole number from 1"),
        ("SHIFT", -1, "SHIFT: expected a whole number from 0"),
        ("PRECISION", "float16", 'PRECISION: expected "float32", "mixed_float16" or "mixed_bfl'),
        ("EPOCH", 3, "EPOCH is not a knob; EPOCHS is. Correct it, restart the kernel"),
        ("LEARNING_RATES", 0.1, "LEARNING_RATES is not a knob; LEARNING_RATE is."),
    ],
)
def test_wrong_knobs_are_refused_before_anything_is_written(
    tmp_path, monkeypatch, knob, value, expected
):
    shutil.copy(ROOT / "visual_callbacks.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(expected)):
        first_cells("meant = difflib", **{knob: value})
    assert [path.name for path in tmp_path.iterdir()] == ["visual_callbacks.py"]


def test_a_scratch_variable_is_no_knob(tmp_path, monkeypatch):
    shutil.copy(ROOT / "visual_callbacks.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    settings = first_cells("meant = difflib")["settings"]
    assert first_cells("meant = difflib", N=5, X_TRAIN=[1])["settings"] == settings


def test_the_defaults_by_which_a_run_is_named_are_those_of_the_knobs(tmp_path, monkeypatch):
    shutil.copy(ROOT / "visual_callbacks.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    names = first_cells("meant = difflib")
    for name, value, default, *_ in names["knobs"]:
        assert value == default or name.startswith("WIDTHS, "), name
    assert names["WIDTHS"] == [64, 256, 256]  # as the cell that names the folder has them


@pytest.mark.slow
def test_run_all_in_the_same_kernel_continues(checkout):
    """After the Stop button, no kernel is restarted: everything is built again beside the old."""
    source = nbformat.read(checkout / NOTEBOOK.name, as_version=4)
    until_trained = source.cells[: cell_with(source, "history = model.fit(") + 1]
    until_trained = [c for c in until_trained if "demo" not in c.metadata.get("tags", [])]
    (parameters,) = (c for c in until_trained if "parameters" in c.metadata.get("tags", ()))
    small = {**SMALL, "EPOCHS": 3}
    parameters.source += "".join(f"\n{name} = {value}" for name, value in small.items())
    again = copy.deepcopy(until_trained)
    until_trained[-1].source = (
        "try:\n"
        + textwrap.indent(
            until_trained[-1].source.replace(
                "callbacks=callbacks", "callbacks=[*callbacks, Stop()]"
            ),
            "    ",
        )
        + "\nexcept KeyboardInterrupt:\n    pass"
    )
    stop = nbformat.v4.new_code_cell(
        "class Stop(keras.callbacks.Callback):\n"
        "    def on_batch_end(self, batch, logs=None):\n"
        "        if len(self.model.history.epoch) == 1:\n"
        "            raise KeyboardInterrupt"
    )
    source.cells = [*until_trained[:-1], stop, until_trained[-1], *again]
    for i, cell in enumerate(source.cells):
        cell.id = str(i)
    nbformat.write(source, checkout / NOTEBOOK.name)
    text = printed(execute(checkout, **small))
    assert "Continuing after epoch 1" in text and "epoch 3/3" in text


def test_a_batch_size_that_leaves_less_than_two_batches_is_refused():
    images = np.zeros((1497, 32, 32, 3), "uint8")
    names = {"np": np, "classes": list("0123456789"), "BATCH_SIZE": 599}
    names |= {"x_all": images, "y_all": np.arange(1497) % 10, "x_test": images[:300]}
    with pytest.raises(ValueError, match="BATCH_SIZE: expected at most half of the 1,197"):
        exec(source_of("x_train, x_val = np.split"), names)


IN_HALF_PRECISION = """
import sys
import numpy as np
from notebook_cells import cells_before_training
half = sys.argv[1]  # float16 or bfloat16
names = cells_before_training(PRECISION=f"mixed_{half}", WIDTHS=[8, 8, 16], BATCH_SIZE=100)
model = names["model"]
assert model.get_layer("block1_conv1").compute_dtype == half
assert model.get_layer("probabilities").compute_dtype == "float32"
assert {weight.dtype for weight in model.weights} == {"float32"}
assert names["small_network"]().layers[0].compute_dtype == "float32"
assert f"mixed_{half}" in names["run_folder"].name
loss = model.train_on_batch(*names["train_data"][0])[0]
# Only float16 needs an optimizer that scales the loss.
optimizer = model.optimizer.inner_optimizer if half == "float16" else model.optimizer
assert np.isfinite(loss) and int(optimizer.iterations) == 1
print("as expected")
"""


@pytest.mark.slow
@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_in_half_precision_weights_and_probabilities_stay_float32(half, tmp_path):
    array_file(tmp_path / "made up.npz")
    env = {
        **os.environ,
        "CIFAR10_NPZ": str(tmp_path / "made up.npz"),
        "PYTHONPATH": str(ROOT / "scripts"),
    }
    command = [sys.executable, "-c", IN_HALF_PRECISION, half]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert ran.stdout.endswith("as expected\n"), ran.stderr


@pytest.mark.slow
def test_images_are_standardised_however_many_there_are(tmp_path):
    """A sum in float32 stops growing at 2**24: 20 million bright pixels had a mean that was a seventh too small."""
    arrays = {
        "x_train": np.full((20_000, 32, 32, 3), 250, "uint8"),
        "x_test": np.zeros((10, 32, 32, 3), "uint8"),
    }
    arrays["x_train"][:, 8:24] = 240
    np.savez(
        tmp_path / "bright.npz", **arrays, y_train=np.arange(20_000) % 10, y_test=np.arange(10)
    )
    script = (
        "from notebook_cells import cells_before_training\n"
        "names = cells_before_training(WIDTHS=[8, 8, 8]); layer = names['model'].layers[1]\n"
        "seen = names['keras'].ops.convert_to_numpy(layer(names['x_train'][:100])).astype('float64')\n"
        "print('mean and variance', seen.mean().round(4), seen.var().round(4))"
    )
    env = {
        **os.environ,
        "CIFAR10_NPZ": str(tmp_path / "bright.npz"),
        "PYTHONPATH": str(ROOT / "scripts"),
    }
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, env=env
    )
    mean, variance = map(float, ran.stdout.split("mean and variance")[1].split())
    assert abs(mean) < 0.01 and abs(variance - 1) < 0.01, ran.stdout


def test_the_notebook_keeps_to_its_shape():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert (
        max(len([line for line in cell.source.splitlines() if line.strip()]) for cell in code) <= 25
    )
    # A folded cell is folded in Jupyter and in Colab, and its first line says what it does.
    in_jupyter = [cell for cell in code if cell.metadata.get("jupyter", {}).get("source_hidden")]
    in_colab = [cell for cell in code if cell.metadata.get("cellView") == "form"]
    titled = [cell for cell in code if cell.source.startswith("# @title ")]
    assert in_jupyter == in_colab == titled and len(titled) > 5


def test_the_committed_outputs_are_those_of_the_committed_code():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert notebook.metadata.get("code_digest") == code_digest(notebook), (
        "code was edited: run `make release`"
    )
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [
        output
        for output in outputs
        if output.output_type == "error" or output.get("name") == "stderr"
    ]
    text = printed(notebook)
    assert (
        "JPEG copy" in text
        and "STAND-IN" not in text
        and "cpu_feature_guard" not in json.dumps(notebook)
    )
    assert "papermill" not in json.dumps(notebook.metadata) and NOTEBOOK.stat().st_size < 3_000_000
    for claim in ("Test accuracy: ", "Test accuracy with flips: "):
        assert text.split(claim)[1].split()[0] in (ROOT / "README.md").read_text()


def test_the_tables_of_what_matters_are_those_of_the_results():
    """benchmarks/ablation.py prints the table; a document and the notebook show it, and all three seeds are in."""
    import ablation

    table = ablation.table(json.loads(ablation.RESULTS.read_text()))
    assert table.count("| 3 |") == 10
    assert table in (ROOT / "docs" / "experiments.md").read_text()
    assert any(table in cell.source for cell in nbformat.read(NOTEBOOK, 4).cells)


def test_clean_drops_what_the_runner_left():
    cell = nbformat.v4.new_code_cell(
        "1",
        metadata={"papermill": {"duration": 1}, "tags": ["parameters"], "cellView": "form"},
    )
    example = sysconfig.get_path("purelib") + "/sklearn/china.jpg: ship"
    cell.outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="I0000 cpu_feature_guard"),
        nbformat.v4.new_output("stream", name="stdout", text=example),
    ]
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"papermill": {"version": "2"}})
    clean(notebook)
    assert (
        "papermill" not in json.dumps(notebook)
        and [output.text for output in cell.outputs] == ["sklearn/china.jpg: ship"]
        and cell.metadata == {"tags": ["parameters"], "cellView": "form"}
    )
    edited = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("2")])
    assert notebook.metadata.code_digest == code_digest(notebook) != code_digest(edited)


@pytest.mark.stack
def test_the_shipped_weights_load_in_plain_keras():
    """Two made-up images: white above black, and a red square. The numbers are those of this file, on any backend."""
    text = (
        "import keras, numpy\n"
        "model = keras.models.load_model('models/best_model.hdf5', compile=False)\n"
        "images = numpy.zeros((2, 32, 32, 3), 'float32')\n"
        "images[0, :16] = 1\n"
        "images[1, 8:24, 8:24] = [0.9, 0.1, 0.1]\n"
        "print(model.predict(images, verbose=0).tolist())"
    )
    env = {**os.environ, "PYTHONPATH": ""}
    result = subprocess.run(
        [sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, env=env
    )
    assert result.returncode == 0, result.stderr
    expected = [
        [0.1141, 0.0419, 0.0443, 0.052, 0.0626, 0.0272, 0.0327, 0.0448, 0.5377, 0.0427],
        [0.0031, 0.0147, 0.003, 0.0038, 0.0035, 0.0023, 0.0028, 0.004, 0.0034, 0.9594],
    ]
    np.testing.assert_allclose(json.loads(result.stdout), expected, atol=0.002)
    path = ROOT / "models" / "best_model.hdf5"
    card = (ROOT / "models" / "README.md").read_text()
    assert f"({path.stat().st_size / 1e6:.1f} MB)" in card
    with h5py.File(path) as file:
        assert set(file) == {"model_weights"}  # and no optimizer's state
        assert "float16" not in file.attrs["model_config"]
