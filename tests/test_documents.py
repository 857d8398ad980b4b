"""What the documents show: every command has a test that runs it in a short form, and every snippet works."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys

import keras
import nbformat
import numpy as np
import pytest
import run_notebook
from conftest import ROOT
from PIL import Image
from training import images

import visual_callbacks

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS += [ROOT / "benchmarks" / "README.md", ROOT / "models" / "README.md"]
BEGINNINGS = r"(?:[A-Z0-9_]+=(?:\"[^\"]*\"|\S+) )*(?:make|python|pip|py|jupyter|\.venv\S+)\b"
# Each command shown, and the test here or elsewhere that runs it (its name), or why none can.
INSTALLS, WINDOWS = "installs packages", "needs Windows"
COMMANDS = {
    "make run": "test_end_to_end_on_the_stand_in_and_again",
    "make run EPOCHS=1": "test_end_to_end_on_the_stand_in_and_again",
    "make run EPOCHS=32 'WIDTHS=[64,128,256]'": "test_end_to_end_on_the_stand_in_and_again",
    "make run DATA_FILE=cifar10.npz": "test_make_run_with_other_knobs_data_and_backend",
    "make run PRESET=full": "test_make_run_with_other_knobs_data_and_backend",
    'CIFAR10_NPZ="JPEG copy.npz" make run': "test_make_run_with_other_knobs_data_and_backend",
    "KERAS_BACKEND=jax make run": "test_make_run_with_other_knobs_data_and_backend",
    "make run SEED=1": "test_make_run_with_other_knobs_data_and_backend",
    "make run SEED=2": "test_make_run_with_other_knobs_data_and_backend",
    "make run PRECISION=mixed_float16": (
        "test_in_half_precision_weights_and_probabilities_stay_float32"
    ),
    "make run PRECISION=mixed_bfloat16": (
        "test_in_half_precision_weights_and_probabilities_stay_float32"
    ),
    "python scripts/run_notebook.py EPOCHS=1": "test_end_to_end_on_the_stand_in_and_again",
    "make lab": "test_make_has_these_targets",
    "make test": "test_make_has_these_targets",
    "make test-all": "test_make_has_these_targets",
    "make test-colab": "test_make_has_these_targets",
    "make test-oldest": "test_make_has_these_targets",
    "make test-jax": "test_make_has_these_targets",
    "make test-torch": "test_make_has_these_targets",
    "make release REPOSITORY=owner/name": "test_a_badge_is_there_only_with_an_address",
    "python benchmarks/resume.py": "test_the_comparison_of_ways_to_resume",
    "python benchmarks/kill.py 1000": "test_random_kills",
    "python benchmarks/exactness.py": "test_the_table_of_exactness",
    "python benchmarks/planted.py 200": "test_a_planted_difference_is_told",
    "python benchmarks/live_view.py": "test_the_comparison_of_live_views",
    'CIFAR10_NPZ="JPEG copy.npz" python benchmarks/throughput.py': "test_the_throughput",
    'CIFAR10_NPZ="JPEG copy.npz" python benchmarks/ablation.py': "test_the_ablation_and_the_race",
    'CIFAR10_NPZ="JPEG copy.npz" python benchmarks/ablation.py race': "test_the_ablation_and_the_race",
    'CIFAR10_NPZ="JPEG copy.npz" make release PRESET=full PRECISION=mixed_bfloat16': (
        "test_a_release_of_the_full_preset_ships_its_weights"
    ),
    "PYTHONPATH=. python scripts/several_machines.py 0 2 HOST:PORT": "test_one_training_by_two_processes",
    "PYTHONPATH=. python scripts/several_machines.py 1 2 HOST:PORT": "test_one_training_by_two_processes",
    ".venv/bin/python -m pytest tests/test_old_weights.py": "test_load_weights_into_a_matching_network",
    "pip install tensorboard": INSTALLS,
    "pip install keras tensorflow pillow": INSTALLS,
    "pip install pillow-heif": INSTALLS,
    ".venv/bin/pip install jax": INSTALLS,
    "pip install jax": INSTALLS,
    '.venv/bin/pip install "tensorflow[and-cuda]"': INSTALLS,
    "pip install -r requirements.txt": INSTALLS,
    "py -3.11 -m venv .venv": WINDOWS,
    r".venv\Scripts\activate": WINDOWS,
    "jupyter lab CIFAR_10_Classification.ipynb": "test_make_has_these_targets",
}


def shown_commands():
    found = set()
    for document in DOCUMENTS:
        text = document.read_text()
        lines = [
            line
            for block in re.findall(r"```(?:sh|bat)\n(.*?)```", text, re.S)
            for line in block.splitlines()
        ]
        for piece in [*lines, *re.findall(r"`([^`\n]+)`", text)]:
            piece = piece.split("  #")[0].strip()
            if re.match(BEGINNINGS, piece) and piece not in ("make", "python", "pip"):
                found.add(piece)
    return found


def test_every_command_shown_has_a_test_that_runs_it():
    assert shown_commands() == set(COMMANDS)
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for command, name in COMMANDS.items():
        assert name in (INSTALLS, WINDOWS) or f"def {name}(" in tests, command


RUNS = [command for command in COMMANDS if re.search(r"make run|run_notebook\.py", command)]


@pytest.mark.parametrize("command", RUNS)
def test_the_knobs_of_every_run_shown_are_knobs(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, after = re.split(r"make run|run_notebook\.py", command)
    run_notebook.read_knobs(shlex.split(after))  # ends the program at an unknown one


def test_every_link_leads_somewhere():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:)([^)#]*)", document.read_text()):
            assert (document.parent / target).exists(), f"{document}: {target}"


def test_the_first_page_is_read_in_three_minutes():
    assert len((ROOT / "README.md").read_text().split()) <= 800


# The commands, in a short form ----


def run(command, cwd=None, **environment):
    """Runs a command with this Python; returns what it printed."""
    env = {
        **os.environ,
        "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"],
        **environment,
    }
    result = subprocess.run(command, shell=True, cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


@pytest.fixture
def project(tmp_path):
    """A copy of the project's files, to run commands that write into it."""
    leave = shutil.ignore_patterns(".*", "runs", "__pycache__", "artefacts", "best_model.hdf5")
    return shutil.copytree(ROOT, tmp_path / "project", ignore=leave)


@pytest.fixture
def small_data(tmp_path):
    """An array file like CIFAR-10's, with few made-up images."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, size in (("train", 1300), ("test", 150)):
        arrays[f"x_{part}"] = rng.integers(0, 255, (size, 32, 32, 3), "uint8")
        arrays[f"y_{part}"] = np.arange(size) % 10
    np.savez(tmp_path / "made up.npz", **arrays)
    return tmp_path / "made up.npz"


@pytest.mark.slow
def test_make_has_these_targets():
    for target in (
        "lab",
        "test",
        "test-all",
        "test-colab",
        "test-oldest",
        "test-jax",
        "test-torch",
    ):
        said = run(f"make -n {target}", cwd=ROOT)
        expected = "pytest"
        if target == "lab":
            expected = r"jupyter lab (--allow-root )?CIFAR_10_Classification.ipynb"
        assert re.search(expected, said), said
    assert run("jupyter lab --version").startswith("4.")


@pytest.mark.slow
def test_make_run_with_other_knobs_data_and_backend(project, small_data):
    course = nbformat.read(project / "CIFAR_10_Classification.ipynb", as_version=4)
    (last,) = [i for i, cell in enumerate(course.cells) if "history = model.fit(" in cell.source]
    kept = [
        cell for cell in course.cells[: last + 1] if "demo" not in cell.metadata.get("tags", [])
    ]
    course.cells = kept
    nbformat.write(course, project / "CIFAR_10_Classification.ipynb")
    knobs = "EPOCHS=1 'WIDTHS=[8,8,8]' BATCH_SIZE=200 PRESET=full SEED=1"
    command = f"make run VENV='{ROOT}/.venv' {knobs} DATA_FILE='{small_data}'"
    # The file that is named comes before that of the environment.
    said = run(command, cwd=project, KERAS_BACKEND="jax", CIFAR10_NPZ="no such file.npz")
    assert "CIFAR-10, made up" in said and "full_seed-1_epochs-1_batch_size-200" in said


@pytest.mark.slow
def test_the_comparison_of_ways_to_resume():
    said = run("python benchmarks/resume.py ours load_keras", cwd=ROOT, SIZES="2")
    ours, theirs = [
        line for line in said.splitlines() if line.startswith(("| Resumable", "| ModelCheckpoint("))
    ]
    assert (
        ours.count("| equal") == 7
        and theirs.count("| equal") == 2
        and theirs.count("**differs**") == 5
    )
    assert "| ours, with best_model.hdf5 |" in said and "Our self-check adds" in said
    assert "5,000 epochs of 20 metrics in the history" in said


@pytest.mark.slow
def test_the_comparison_of_live_views(project):
    said = run("python benchmarks/live_view.py 24", cwd=project)
    assert "| livelossplot 0.6.1 |" in said and "| AccLossPlotter, 24 epochs |" in said
    assert "| **together** |" in said and "the record of 2,000 epochs of 100 classes" in said


@pytest.mark.slow
def test_the_throughput(project, small_data):
    knobs = "BATCHES=2 PRODUCTS=1 SIDE=256 'WIDTHS=[8,8,8]' BATCH_SIZE=100"
    said = run(f"python benchmarks/throughput.py {knobs}", cwd=project, CIFAR10_NPZ=str(small_data))
    assert "augmentation alone: " in said and "share of the matrix product's rate" in said
    assert "between two epochs: " in said


@pytest.mark.slow
def test_the_ablation_and_the_race(project, small_data):
    (project / "benchmarks" / "ablation.json").unlink()
    notebook = project / "CIFAR_10_Classification.ipynb"
    text, widths = notebook.read_text(), "[64, 256, 256]"
    assert widths in text
    notebook.write_text(text.replace(widths, "[8, 16, 16]"))
    command = "python benchmarks/ablation.py 1 'the first version' 'this notebook'"
    said = run(command, cwd=project, CIFAR10_NPZ=str(small_data))
    assert said.count("| 1 |") == 2 and (project / "Images" / "ablation.png").exists()
    said = run("python benchmarks/ablation.py race 0.02", cwd=project, CIFAR10_NPZ=str(small_data))
    assert "times as long takes the first version" in said


@pytest.mark.slow
def test_one_training_by_two_processes(project):
    def both():
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = f"PYTHONPATH=. python scripts/several_machines.py {{}} 2 127.0.0.1:{port}"
        return f"{command.format(1)} & {command.format(0)} && wait $!"  # its status, too

    run(both(), cwd=project)
    assert "This training is complete after epoch" in run(both(), cwd=project)
    assert (project / "models" / "runs" / "several_machines" / "saved_model.hdf5").exists()


# The snippets ----


def snippets(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.S)


def pictures(folder):
    """Pictures as people have them: turned by a note in the file, partly transparent, grey."""
    picture = Image.new("RGB", (60, 80), "black")
    picture.paste("red", (0, 0, 60, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # held sideways
    picture.rotate(90, expand=True).save(folder / "turned.jpg", exif=exif, quality=95)
    clear = picture.convert("RGBA")
    clear.putalpha(Image.new("L", picture.size, 100))
    clear.save(folder / "clear.png")
    picture.convert("L").save(folder / "grey.png")
    picture.quantize(4).save(folder / "palette.gif", transparency=0)
    return ["turned.jpg", "clear.png", "grey.png", "palette.gif"]


def reader_of(path):
    """The snippet of a document that reads a photograph and names what it shows."""
    (snippet,) = [snippet for snippet in snippets(path) if "photograph.jpg" in snippet]
    return snippet


def test_the_first_page_and_the_card_read_a_photograph_as_the_notebook_does(tmp_path, capsys):
    snippet = reader_of(ROOT / "README.md")
    assert reader_of(ROOT / "models" / "README.md") == snippet.replace("models/best", "best")
    os.symlink(ROOT / "models", "models")
    notebook = nbformat.read(ROOT / "CIFAR_10_Classification.ipynb", 4)
    imports = (
        "import importlib.util, io, urllib.request, numpy as np\n"
        "from pathlib import Path\n"
        "from PIL import Image, ImageOps, UnidentifiedImageError"
    )
    names = {}
    exec(imports, names)
    for cell in notebook.cells:
        if "def read_bytes" in cell.source or "def open_picture" in cell.source:
            exec(cell.source, names)
        if "def classify" in cell.source:
            exec(cell.source, names)
    names |= {"classes": [str(number) for number in range(10)], "data_name": "made up"}
    names["devices"] = ["the only one"]
    # What it draws is looked at elsewhere.
    names |= dict.fromkeys(["display", "plot_images", "plot_predictions"], lambda *a, **k: None)
    names["occlusion_map"] = lambda model, images: None
    seen = []

    class Model:
        def predict(self, images, verbose):
            seen.append(images[0])
            return np.eye(1, 10)

    names["model"] = Model()
    for name in pictures(tmp_path):
        shutil.copy(name, "photograph.jpg")
        shown = {}
        exec(snippet, shown)
        assert re.fullmatch(r"[a-z]+ \d+%\n", capsys.readouterr().out)
        names["classify"](name)
        assert f"{name}: 0 100% (made up)" in capsys.readouterr().out
        assert np.array_equal(shown["image"], seen.pop()), name
        if name == "turned.jpg":  # red above, black below
            assert shown["image"][0, :, 0].min() > 0.9
            assert shown["image"][-1].max() < 0.1


def test_the_recipes_to_reuse_the_callbacks_work():
    """The first page's, and the one at the top of visual_callbacks.py."""
    (first,) = [
        snippet for snippet in snippets(ROOT / "README.md") if "ResumableCheckpoint(" in snippet
    ]
    first = first.replace(
        "    ...,\n", "    x_train, y_train, verbose=0, validation_data=(x_val, y_val),\n"
    )
    first = first.replace("epochs=20", "epochs=2")
    second = visual_callbacks.__doc__.split("Quick start::\n")[1].split(
        "Each callback works alone"
    )[0]
    second = "\n".join(line[4:] for line in second.splitlines()).replace("epochs=30", "epochs=2")
    for recipe in (first, second):
        shutil.rmtree("runs", ignore_errors=True)
        for epochs in ([0, 1], [0, 1]):  # the second time, it is complete
            x, y = images()
            model = keras.Sequential(
                [keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(3)]
            )
            model.compile("adam", "mse", run_eagerly=True)
            names = {name: getattr(visual_callbacks, name) for name in visual_callbacks.__all__}
            names |= {"model": model, "x_train": x, "y_train": y, "x_val": x[:30], "y_val": y[:30]}
            names |= {
                "classes": ["ant", "bee", "cow"],
                "early_stopping": keras.callbacks.EarlyStopping(patience=9),
            }
            exec(recipe, names)
            assert model.history.epoch == epochs
