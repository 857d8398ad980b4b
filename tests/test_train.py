"""The trainings that follow for the shipped weights: what they do to a batch, and a small one from end to end."""

import os
import subprocess
import sys

import keras
import numpy as np
from conftest import ROOT

sys.path.insert(0, str(ROOT / "models"))
import train


def test_labels_are_mixed_in_the_shares_of_the_pixels():
    labels = np.eye(10, dtype="float32")[np.arange(9)]
    images = np.broadcast_to(labels[:, None, None], (9, 32, 32, 10)).copy()  # an image shows its label in every pixel
    before, kinds = images.copy(), set()
    for seed in range(40):
        mixed, mixed_labels = train.mixed(images, labels, np.random.default_rng(seed))
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
        f"import sys; sys.path.insert(0, {str(ROOT / 'models')!r}); import train, training\n"
        "train.KNOBS.update(WIDTHS=[8, 8, 16], BATCH_SIZE=200, EPOCHS=2, FILTER_RATE=0.001)\n"
        "model = training.cells_before_training(**train.KNOBS)['model']\n"
        "model.set_weights([-w if w.ndim == 4 else w for w in model.get_weights()])\n"  # not what it begins with anyway
        "train.keras.Model(model.input, model.output).save('first.hdf5')\n"
        "train.main('first.hdf5', 'second')"
    )
    env = {**os.environ, "CIFAR10_NPZ": str(tmp_path / "made up.npz")}
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, env=env)
    for line in ("Validation accuracy: ", "Test accuracy: ", "Test accuracy with flips: "):
        assert line + "0." in result.stdout and "(CIFAR-10, made up)" in result.stdout, result.stderr
    paths = (tmp_path / name for name in ("first.hdf5", "second/best_model.hdf5", "second/shipped.hdf5"))
    first, best, shipped = (keras.models.load_model(path, compile=False) for path in paths)
    parts = [shipped.get_layer(name) for name in ("part_1", "part_2")]
    for part, model in zip(parts, (first, best)):
        assert {layer.dtype_policy.name for layer in part.layers} == {"float32"}
        assert all(np.array_equal(a, b) for a, b in zip(part.get_weights(), model.get_weights(), strict=True))
    filters = [(a, b) for a, b in zip(first.get_weights(), best.get_weights()) if a.ndim == 4]
    assert all(np.corrcoef(a.flat, b.flat)[0, 1] > 0.9 and not np.array_equal(a, b) for a, b in filters)
    images = arrays["x_test"][:50].astype("float32") / 255
    one, other, both = (model.predict(images, verbose=0) for model in (*parts, shipped))
    np.testing.assert_allclose(both, (one + other) / 2, atol=1e-6)
    assert np.abs(one - other).max() > 1e-3
