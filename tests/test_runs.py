"""What is kept of what was shown, and how it is seen again: read_run, compare_runs, replay, live.html."""

import base64
import gc
import io
import json
import re
import shutil
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import training
from conftest import CLASSES, ROOT
from PIL import Image

import visual_callbacks
from visual_callbacks import (
    AccLossPlotter,
    ConfusionMatrixPlotter,
    PredictionPlotter,
    compare_runs,
    read_run,
    replay,
)

SAVED = "saved_model.hdf5"


def plotters():
    x, _ = training.images()
    labels = np.arange(96) % 3
    return [
        AccLossPlotter(verbose=0, title="made up"),
        ConfusionMatrixPlotter(x[:30], labels[:30], CLASSES, title="Validation"),
        PredictionPlotter(x[:6], labels[:6], CLASSES, title="Validation"),
    ]


def train(folder, epochs=3, looking=True, config="small", stop=None, **options):
    extra = plotters() if looking else []
    if stop:
        extra.append(keras.callbacks.LambdaCallback(on_epoch_begin=stop))
    return training.train(config, folder, epochs=epochs, extra=extra, **options)


def stop_in(epoch):
    def stop(now, logs):
        if now == epoch:
            raise InterruptedError

    return stop


def contents(path):
    """All datasets of a file by name, but for the checksum."""
    found = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: found.update(
                {name: item[()].tobytes()} if hasattr(item, "dtype") else {}
            )
        )
    del found["resumable_checkpoint/sha256"]
    return found


# What is kept ----


@pytest.mark.stack
def test_all_that_was_measured_is_in_the_file():
    _, history, _ = train("run")
    run = read_run("run")
    assert (
        run["history"] == history.history
        and run["epoch"] == [0, 1, 2]
        and run["epochs"] == 3
        and run["finished"]
    )
    assert (
        run["settings"] == {"batch": training.BATCH}
        and run["monitor"] == "val_loss"
        and run["mode"] == "min"
    )
    assert run["best"] == min(history.history["val_loss"]) and run["resumes"] == []
    assert run["best_epoch"] == int(np.argmin(history.history["val_loss"]))
    measured = run["measured"]
    matrices = measured["confusion_matrix"]
    assert list(matrices) == [0, 1, 2] and matrices[0].dtype == np.uint8 and matrices[0].sum() == 30
    accuracy = [np.trace(matrix) / 30 for matrix in matrices.values()]
    assert np.allclose(accuracy, history.history["val_accuracy"])
    assert [kept.shape for kept in measured["predictions probabilities"].values()] == [(6, 3)] * 3
    assert {kept.dtype for kept in measured["predictions falls"].values()} == {np.dtype(np.int8)}
    json.dumps({key: value for key, value in run.items() if key != "measured"})


def test_after_a_stop_the_record_is_that_of_an_undisturbed_training():
    train("whole", epochs=5)
    with pytest.raises(InterruptedError):
        train("parts", epochs=5, stop=stop_in(2))
    train("parts", epochs=5)
    assert Path("whole", SAVED).read_bytes() == Path("parts", SAVED).read_bytes()
    assert [resume["verdict"] for resume in read_run("parts")["resumes"]] == ["not compared"]


def test_a_resumed_training_draws_what_was_recorded_and_measures_nothing_twice(monkeypatch):
    train("run", epochs=2)
    asked = []
    predict = keras.Model.predict
    monkeypatch.setattr(
        keras.Model, "predict", lambda *given, **more: asked.append(1) or predict(*given, **more)
    )
    monkeypatch.setattr(keras.Sequential, "predict", keras.Model.predict, raising=False)
    names = ("confusion_matrix.png", "predictions.png")
    before = [Path(name).read_bytes() for name in names]
    for name in names:
        Path(name).unlink()
    train("run", epochs=2)  # which is complete
    assert not asked
    assert [Path(name).read_bytes() for name in names] == before


@pytest.mark.slow
@pytest.mark.stack
def test_looking_adds_to_a_file_and_changes_nothing_in_it():
    train("seen")
    train("unseen", looking=False)
    seen, unseen = contents("seen/" + SAVED), contents("unseen/" + SAVED)
    added = {name for name in seen if name not in unseen}
    assert added and all(name.startswith("resumable_checkpoint/measured/") for name in added)
    assert {name: values for name, values in seen.items() if name not in added} == unseen


@pytest.mark.slow
def test_a_training_that_goes_on_without_plotters_keeps_their_record():
    train("run", epochs=2)
    before = read_run("run")["measured"]
    train("run", epochs=3, looking=False)
    after = read_run("run")["measured"]
    assert before.keys() == after.keys()
    for name, kept in before.items():
        assert kept.keys() == after[name].keys()
        assert all(
            np.array_equal(kept[epoch], after[name][epoch], equal_nan=kept[epoch].dtype.kind == "f")
            for epoch in kept
        )
    train("run", epochs=4)
    assert sorted(read_run("run")["measured"]["confusion_matrix"]) == [0, 1, 3]


def test_other_images_forget_what_was_measured_of_the_old_ones():
    train("run", epochs=2)
    x, _ = training.images()
    other = PredictionPlotter(x[6:12], np.arange(6, 12) % 3, CLASSES)
    training.train("small", "run", epochs=3, extra=[other])
    kept = read_run("run")["measured"]
    assert list(kept["predictions probabilities"]) == [2]
    assert list(kept["confusion_matrix"]) == [0, 1]


@pytest.mark.parametrize("stop", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_epochs_that_are_left_out_are_not_measured_by_a_resume(stop):
    """Every second one, as without the stop; and of other validation images the old matrices are forgotten."""
    x, _ = training.images()
    labels = np.arange(96) % 3

    def look(images=30):
        return [ConfusionMatrixPlotter(x[:images], labels[:images], CLASSES, every=2)]

    def fit(folder, *more):
        return training.train("small", folder, epochs=4, extra=[*look(), *more])

    fit("whole")
    stopping = keras.callbacks.LambdaCallback(on_epoch_begin=stop_in(stop))
    with pytest.raises(InterruptedError):
        fit("parts", stopping)
    fit("parts")
    assert Path("whole", SAVED).read_bytes() == Path("parts", SAVED).read_bytes()
    assert list(read_run("parts")["measured"]["confusion_matrix"]) == [1, 3]
    training.train("small", "parts", epochs=6, extra=look(images=12))
    matrices = read_run("parts")["measured"]["confusion_matrix"]
    assert list(matrices) == [5] and matrices[5].sum() == 12


def test_no_model_is_kept_alive():
    """Nor its plotters, nor what they hold: by nothing of ours, once the user has let go of them."""
    trained = train("run", epochs=2)
    kept = weakref.ref(trained[0])
    del trained
    gc.collect()
    assert kept() is None


def test_it_is_bounded():
    """2,000 epochs of 100 classes: evenly thinned out, and below 20 MB."""
    measured = visual_callbacks._Measured()
    for epoch in range(2000):
        measured.keep("confusion_matrix", epoch, np.full((100, 100), epoch, np.uint16))
        measured.keep("predictions probabilities", epoch, np.zeros((12, 100), np.uint8))
        measured.keep("predictions falls", epoch, np.zeros((12, 7, 7), np.int8))
    kept = measured.epochs["confusion_matrix"]
    steps = np.diff(list(kept))
    assert len(kept) >= 100 and set(steps[:-1]) == {steps[0]} and list(kept)[-1] == 1999
    assert all((values == epoch).all() for epoch, values in kept.items())
    assert sum(values.nbytes for values in measured.arrays().values()) < 20e6
    again = visual_callbacks._Measured()
    again.set_arrays(measured.arrays())
    assert all((again.epochs["confusion_matrix"][epoch] == kept[epoch]).all() for epoch in kept)


@pytest.mark.slow
def test_a_record_that_cannot_be_read_costs_no_training(monkeypatch):
    train("run", epochs=2)
    with monkeypatch.context() as patch:
        patch.setattr(
            visual_callbacks._Measured, "arrays", lambda self: {"about": np.zeros(3, np.uint8)}
        )
        train("run", epochs=3)
    with pytest.warns(UserWarning, match="What the plotters have measured could not be read"):
        _, history, _ = train("run", epochs=4)
    assert len(history.epoch) == 4
    with pytest.raises(ValueError, match="run/saved_model.hdf5 cannot be used"):
        Path("run", SAVED).write_bytes(b"no HDF5")
        read_run("run")


# live.html ----


def test_live_html_has_the_pictures_and_reads_itself_anew():
    seen = []

    class Look(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(Path("run", "live.html").read_text())

    shown = plotters()
    training.train("small", "run", epochs=3, extra=[*shown, Look()])
    page = Path("run", "live.html").read_text()
    assert 'http-equiv="refresh" content="2"' in page
    assert len(set(seen)) == 3
    picture = Image.open(io.BytesIO(base64.b64decode(re.search('base64,([^"]+)', page)[1])))
    assert picture.width <= visual_callbacks._Board.WIDTH
    # The last pictures of all three: the curves, and below them the matrix and the predictions.
    assert shown[0].figure.texts[0].get_text().startswith("made up · 3 epochs in ")
    pixels = np.asarray(picture.convert("RGB"))
    curves, matrix, predictions = [plotter.picture for plotter in shown]
    top, left = len(curves), matrix.shape[1]
    right = left + predictions.shape[1]
    assert (pixels[:top, : curves.shape[1]] == curves).all()
    assert (pixels[top : top + len(matrix), :left] == matrix).all()
    assert (pixels[top : top + len(predictions), left:right] == predictions).all()
    assert not list(Path("run").glob("*tmp*"))


def test_without_a_checkpoint_there_is_no_page(data, build, tmp_path):
    x, y = data
    build().fit(x, np.eye(3)[y], 30, 1, verbose=0, callbacks=[AccLossPlotter(verbose=0)])
    assert [path.name for path in tmp_path.iterdir()] == ["training_acc_loss.png"]


# compare_runs ----


@pytest.fixture(scope="module")
def three_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, config, epochs in (("a", "small", 3), ("b", "small with adam", 4), ("c", "ema", 2)):
        settings = {"batch": 16, "config": config, "epochs": epochs}
        train(
            folder / name,
            epochs,
            looking=False,
            config=config,
            settings=settings,
            monitor="val_accuracy",
        )
    return folder


@pytest.mark.xdist_group("three runs")
def test_runs_side_by_side(three_runs):
    compared = compare_runs(three_runs)
    best = [run["best"] for run in compared.runs]
    assert best == sorted(best, reverse=True) and len(best) == 3 and not compared.left_out
    head = str(compared).splitlines()[0]
    # Only the settings that differ.
    assert "config" in head and "epochs" in head and "batch" not in head
    (row,) = (line for line in str(compared).splitlines() if "  small with adam  " in line)
    run = read_run(three_runs / "b")
    assert f"{run['best']:.4f}" in row and row.split()[-1] == "yes"
    shown = compared._repr_html_()
    assert "data:image/png" in shown and "<th>config</th>" in shown and "<td>ema</td>" in shown
    lines = [line for line in compared.figure.axes[0].lines if len(line.get_xdata()) > 1]
    assert sorted(len(line.get_xdata()) for line in lines) == [2, 3, 4]
    assert [run["directory"] for run in compare_runs([three_runs / "a", three_runs / "b"]).runs]


@pytest.mark.xdist_group("three runs")
def test_what_cannot_be_compared_is_named_and_left_out(three_runs, tmp_path):
    shutil.copytree(three_runs, "runs")
    Path("runs", "a", SAVED).write_bytes(Path("runs", "a", SAVED).read_bytes()[:-100])
    Path("runs", "empty <b>").mkdir()
    Path("runs", "being written").mkdir()
    Path("runs", "being written", "saved_model.tmp.hdf5").write_bytes(b"half")
    train("runs/other", 2, looking=False, monitor="loss")
    with pytest.raises(InterruptedError):
        train("runs/untrained", 2, looking=False, monitor="val_accuracy", stop=stop_in(0))
    compared = compare_runs("runs")
    assert [Path(run["directory"]).name for run in compared.runs] in (["b", "c"], ["c", "b"])
    why = {Path(name).name: reason for name, reason in compared.left_out.items()}
    assert set(why) == {"a", "empty <b>", "being written", "other", "untrained"}
    assert (
        "checksum" in why["a"]
        and "nothing was saved" in why["empty <b>"]
        and "monitors loss" in why["other"]
    )
    assert "no epoch is complete" in why["untrained"]
    assert "&lt;b&gt;" in compared._repr_html_() and "<b>" not in compared._repr_html_()
    assert len(compare_runs("runs", monitor="loss").runs) == 1
    with pytest.raises(ValueError, match="no run to compare"):
        compare_runs("runs", monitor="val_f1")
    with pytest.raises(FileNotFoundError, match="no folder nowhere"):
        compare_runs("nowhere")


@pytest.mark.xdist_group("three runs")
def test_runs_can_be_compared_while_one_is_written(three_runs):
    shutil.copytree(three_runs, "runs")
    problems, left_out = [], []

    class Compare(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.is_over = threading.Event()
            self.thread = threading.Thread(target=self.compare)
            self.thread.start()

        def compare(self):
            try:
                while not self.is_over.is_set():
                    left_out.append(compare_runs("runs").left_out)
            except Exception as error:  # it would end the thread, and nobody would see it
                problems.append(error)

        def on_train_end(self, logs=None):
            self.is_over.set()
            self.thread.join()

    training.train("small", "runs/d", epochs=6, extra=[Compare()], monitor="val_accuracy")
    assert not problems and len(left_out) > 3
    for directory, why in (item for each in left_out for item in each.items()):
        assert Path(directory).name == "d"
        assert "nothing was saved" in why or "no epoch is complete" in why, why


def test_a_run_whose_file_grows_while_it_is_looked_at_is_read(monkeypatch):
    train("run", looking=False, epochs=1)
    saved = Path("run", SAVED)
    later = []
    for epochs in (3, 6, 9):
        train(f"after {epochs}", looking=False, epochs=epochs)
        later.append(Path(f"after {epochs}", SAVED))
    sizes = [path.stat().st_size for path in [saved, *later]]
    assert sizes == sorted(set(sizes))
    real_stat = Path.stat

    def stat(path, **options):
        result = real_stat(path, **options)
        if path == saved and later:
            later.pop(0).replace(saved)  # as a training does that saves an epoch at this moment
        return result

    monkeypatch.setattr(Path, "stat", stat)
    assert read_run("run")["epochs"] in (3, 6, 9) and len(later) < 3


# replay ----


@pytest.mark.stack
def test_a_replay_is_one_page_that_needs_nothing_else():
    train("run", epochs=3)
    shown = replay("run")
    page = shown.path.read_text()
    assert shown.path == Path("run", "replay.html") and "http" not in page and "<script>" in page
    data = json.loads(re.search("const data = (.*);\n", page)[1])
    assert data["epochs"] == [1, 2, 3] and [len(frames) for frames in data["others"]] == [3, 3]
    assert len(set(data["others"][0])) == 3
    assert all("val_accuracy" in said for said in data["logged"])
    assert "<iframe srcdoc=" in shown._repr_html_() and "const data" in shown._repr_html_()
    shown.save("training.gif")
    with Image.open("training.gif") as picture:
        assert picture.n_frames == 3 and picture.width <= 900


@pytest.mark.slow
def test_a_replay_of_fifty_epochs_is_small():
    """Of pictures as large as the notebook's."""
    rng = np.random.default_rng(0)
    x = rng.random((8, 32, 32, 3)).astype("float32")
    x = keras.ops.convert_to_numpy(
        keras.ops.image.resize(x[:, ::8, ::8], (32, 32), interpolation="bicubic")
    )
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    train("run", epochs=2)
    run, measured = visual_callbacks._read_run("run", with_measured=True)
    run["epoch"] = list(range(50))
    run["history"] = {name: list(rng.random(50)) for name in run["history"]}
    measured = visual_callbacks._Measured()
    about = {"classes": names, "normalize": False, "cmap": "Blues"}
    measured.describe("confusion_matrix", about, "Validation images")
    pictures = {"images": np.uint8(255 * np.clip(x, 0, 1)), "labels": np.arange(8)}
    measured.describe("predictions", {"classes": names}, "Validation images", **pictures)
    for epoch in range(50):
        measured.keep("confusion_matrix", epoch, rng.integers(0, 500, (10, 10)).astype(np.uint16))
        measured.keep(
            "predictions probabilities", epoch, rng.integers(0, 65535, (8, 10)).astype(np.uint16)
        )
        measured.keep("predictions falls", epoch, rng.integers(-20, 100, (8, 7, 7)).astype(np.int8))
    pages = visual_callbacks.Replay.__new__(visual_callbacks.Replay)
    pages._run, pages._measured = run, measured
    pages._graphs, pages._facts, pages._inside = pages._what_curves_show()
    assert len(pages._make_page()) < 1.5e6
    pages.save("training.gif")
    assert Path("training.gif").stat().st_size < 2e6


def test_a_replay_without_plotters_has_the_curves():
    train("run", epochs=2, looking=False)
    data = json.loads(
        re.search("const data = (.*);\n", replay("run", "page.html").path.read_text())[1]
    )
    assert data["others"] == [] and len(data["lines"]) == 2
    with pytest.raises(InterruptedError):
        train("other", 2, looking=False, stop=stop_in(0))
    with pytest.raises(ValueError, match="no epoch is recorded in other"):
        replay("other")
    with pytest.raises(FileNotFoundError, match="nothing was saved there"):
        replay("nowhere")


def test_a_run_in_the_working_directory_has_its_name(monkeypatch):
    train("run", epochs=1, looking=False)
    monkeypatch.chdir("run")
    assert "  run  " in str(compare_runs(["."]))
    assert "<title>Replay of run</title>" in replay(".").path.read_text()


PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from visual_callbacks import compare_runs, read_run, replay
assert read_run("run")["epochs"] == 2
print(compare_runs(["run"]))
print(replay("run").path)
"""


@pytest.mark.slow
def test_runs_are_read_in_a_fresh_process():
    train("run", epochs=2)
    program = PROGRAM.format(root=str(ROOT))
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert "best val_loss" in said and said.splitlines()[-1] == str(Path("run", "replay.html"))
