"""What the documents show: every command has a test that runs it in a short form, and every snippet works."""

import os
import re
import shutil
import subprocess
import sys

import keras
import nbformat
import numpy as np
import pytest
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
    'CIFAR10_NPZ="JPEG copy.npz" make run SEED=1': "test_make_run_with_other_knobs_data_and_backend",
    'CIFAR10_NPZ="JPEG copy.npz" make run PRESET=full': "test_make_run_with_other_knobs_data_and_backend",
    "make lab": "test_make_has_these_targets",
    "make test": "test_make_has_these_targets",
    "make test-all": "test_make_has_these_targets",
    "make test-colab": "test_make_has_these_targets",
    "make test-oldest": "test_make_has_these_targets",
    "make test-jax": "test_make_has_these_targets",
    "make test-torch": "test_make_has_these_targets",
    "make release REPOSITORY=owner/name": "test_a_badge_is_there_only_with_an_address",
    "python benchmarks/resume.py": "test_the_comparison_of_ways_to_resume",
    "python benchmarks/kill.py 200": "test_random_kills",
    "python benchmarks/live_view.py": "test_the_comparison_of_live_views",
    'CIFAR10_NPZ="JPEG copy.npz" python benchmarks/throughput.py': "test_the_throughput",
    'CIFAR10_NPZ="JPEG copy.npz" python benchmarks/ablation.py': "test_the_ablation_and_the_race",
    'CIFAR10_NPZ="JPEG copy.npz" python benchmarks/ablation.py race': "test_the_ablation_and_the_race",
    'CIFAR10_NPZ="JPEG copy.npz" PYTHONPATH=. python scripts/further_training.py FIRST FOLDER [SEED]': (
        "test_it_goes_on_from_the_first_weights"
    ),
    'CIFAR10_NPZ="JPEG copy.npz" python scripts/ship.py FILE FILE...': (
        "test_the_shipped_network_answers_with_the_mean_of_several"
    ),
    "PYTHONPATH=. python scripts/several_machines.py 0 2 HOST:PORT": "test_one_training_by_two_processes",
    "PYTHONPATH=. python scripts/several_machines.py 1 2 HOST:PORT": "test_one_training_by_two_processes",
    ".venv/bin/python -m pytest tests/test_old_weights.py": "test_load_weights_into_a_matching_network",
    "pip install tensorboard": INSTALLS,
    ".venv/bin/pip install jax": INSTALLS,
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
        lines = [line for block in re.findall(r"```(?:sh|bat)\n(.*?)```", text, re.S) for line in block.splitlines()]
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


def test_every_link_leads_somewhere():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:)([^)#]*)", document.read_text()):
            assert (document.parent / target).exists(), f"{document}: {target}"


def test_the_first_page_is_read_in_three_minutes():
    assert len((ROOT / "README.md").read_text().split()) <= 800


# The commands, in a short form ----


def run(command, cwd=None, **environment):
    """Runs a command with this Python; returns what it printed."""
    env = {**os.environ, "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"], **environment}
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


def test_make_has_these_targets():
    for target in ("lab", "test", "test-all", "test-colab", "test-oldest", "test-jax", "test-torch"):
        said = run(f"make -n {target}", cwd=ROOT)
        assert "pytest" in said if target != "lab" else "jupyter lab CIFAR_10_Classification.ipynb" in said
    assert run("jupyter lab --version").startswith("4.")
    collected = run("python -m pytest --collect-only -q -m 'not slow' tests/test_documents.py", cwd=ROOT)
    assert "test_make_has_these_targets" in collected


@pytest.mark.slow
def test_make_run_with_other_knobs_data_and_backend(project, small_data):
    knobs = "EPOCHS=1 'WIDTHS=[8,8,8]' BATCH_SIZE=200 PRESET=full SEED=1"
    said = run(f"make run VENV='{ROOT}/.venv' {knobs}", cwd=project, KERAS_BACKEND="jax", CIFAR10_NPZ=str(small_data))
    assert "(CIFAR-10, made up)" in said and "full-1-epochs" in said
    said = run(f"make run VENV='{ROOT}/.venv' {knobs} DATA_FILE='{small_data}'", cwd=project)
    assert "(CIFAR-10, made up)" in said


@pytest.mark.slow
def test_the_comparison_of_ways_to_resume():
    said = run("python benchmarks/resume.py ours load_keras", cwd=ROOT)
    ours, theirs = [line for line in said.splitlines() if line.startswith(("| Resumable", "| ModelCheckpoint"))]
    assert ours.count("| equal") == 7 and theirs.count("| equal") == 2 and theirs.count("**differs**") == 5
    assert "times ModelCheckpoint's" in said


@pytest.mark.slow
def test_the_comparison_of_live_views(project):
    said = run("python benchmarks/live_view.py 24", cwd=project)
    assert "| livelossplot 0.6.1 |" in said and "| AccLossPlotter, 24 epochs |" in said
    assert "held by the compiled metric: adds to the default epoch" in said


@pytest.mark.slow
def test_the_throughput(project, small_data):
    knobs = "BATCHES=2 PRODUCTS=1 SIDE=256 'WIDTHS=[8,8,8]' BATCH_SIZE=100"
    said = run(f"python benchmarks/throughput.py {knobs}", cwd=project, CIFAR10_NPZ=str(small_data))
    assert "images a second" in said and "share of the matrix product's rate" in said


@pytest.mark.slow
def test_the_ablation_and_the_race(project, small_data):
    (project / "benchmarks" / "ablation.json").unlink()
    command = "python benchmarks/ablation.py 1 'the first version' 'this notebook'"
    said = run(command, cwd=project, CIFAR10_NPZ=str(small_data))
    assert said.count("| 1 |") == 2 and (project / "Images" / "ablation.png").exists()
    said = run("python benchmarks/ablation.py race 0.02", cwd=project, CIFAR10_NPZ=str(small_data))
    assert "times as long takes the first version" in said


@pytest.mark.slow
def test_one_training_by_two_processes(project):
    command = "PYTHONPATH=. python scripts/several_machines.py {} 2 127.0.0.1:12355"
    both = f"{command.format(1)} & {command.format(0)} && wait"
    run(both, cwd=project)
    assert "Continuing" not in run(both, cwd=project)
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


def test_the_first_page_reads_a_photograph_as_the_notebook_does(tmp_path, capsys):
    (text,) = [snippet for snippet in snippets(ROOT / "README.md") if "photograph.jpg" in snippet]
    os.symlink(ROOT / "models", "models")
    notebook = nbformat.read(ROOT / "CIFAR_10_Classification.ipynb", 4)
    (reading,) = [cell.source for cell in notebook.cells if "def open_picture" in cell.source]
    names = {}
    exec("import io, urllib.request, numpy as np\nfrom PIL import Image, ImageOps\nfrom pathlib import Path", names)
    exec(reading, names)
    for name in pictures(tmp_path):
        shutil.copy(name, "photograph.jpg")
        shown = {}
        exec(text, shown)
        expected = names["ImageOps"].fit(names["open_picture"](name), (32, 32))
        assert np.array_equal(shown["image"], np.asarray(expected, "float32") / 255), name
        if name == "turned.jpg":
            assert shown["image"][0, :, 0].min() > 0.9 and shown["image"][-1].max() < 0.1  # red above, black below
        assert re.fullmatch(r"[a-z]+ \d+%\n", capsys.readouterr().out)


def test_the_recipes_to_reuse_the_callbacks_work():
    """The first page's, and the one at the top of visual_callbacks.py."""
    (first,) = [snippet for snippet in snippets(ROOT / "README.md") if "ResumableCheckpoint(" in snippet]
    first = first.replace("    ...,\n", "    x_train, y_train, verbose=0, validation_data=(x_val, y_val),\n")
    first = first.replace("epochs=20", "epochs=2")
    second = visual_callbacks.__doc__.split("Quick start::\n")[1].split("Each callback works alone")[0]
    second = "\n".join(line[4:] for line in second.splitlines()).replace("epochs=30", "epochs=2")
    for recipe in (first, second):
        shutil.rmtree("runs", ignore_errors=True)
        for epochs in ([0, 1], [0, 1]):  # the second time, it is complete
            x, y = images()
            model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(3)])
            model.compile("adam", "mse", run_eagerly=True)
            names = {name: getattr(visual_callbacks, name) for name in visual_callbacks.__all__}
            names |= {"model": model, "x_train": x, "y_train": y, "x_val": x[:30], "y_val": y[:30]}
            names |= {"classes": ["ant", "bee", "cow"], "early_stopping": keras.callbacks.EarlyStopping(patience=9)}
            exec(recipe, names)
            assert model.history.epoch == epochs
