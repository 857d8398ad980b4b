"""The later trainings of the shipped weights: what they do to a batch, and small ones of them from end to end."""

import os
import subprocess
import sys

import h5py
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


def test_two_trainings_go_on_from_the_first_weights(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, size in (("train", 1000), ("test", 200)):  # 200 of the 1000 are for validation
        arrays[f"x_{part}"] = rng.integers(0, 255, (size, 32, 32, 3), "uint8")
        arrays[f"y_{part}"] = np.arange(size) % 10
    np.savez(tmp_path / "made up.npz", **arrays)
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'models')!r}); import train, training\n"
        "small = dict(WIDTHS=[8, 8, 16], BATCH_SIZE=200, EPOCHS=2, FILTER_RATE=0.001)\n"
        "train.SECOND.update(small), train.THIRD.update(small)\n"
        "model = training.cells_before_training(**train.SECOND)['model']\n"
        "model.set_weights([-w if w.ndim == 4 else w for w in model.get_weights()])\n"  # not what it begins with anyway
        "train.keras.Model(model.input, model.output).save('first.hdf5')\n"
        "train.main('first.hdf5', 'later')"
    )
    env = {**os.environ, "CIFAR10_NPZ": str(tmp_path / "made up.npz")}
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert "Test accuracy with flips: 0." in result.stdout and "(CIFAR-10, made up)" in result.stdout, result.stderr
    names = ("../first.hdf5", "second/best_model.hdf5", "third/saved_model.hdf5", "shipped.hdf5")
    paths = [tmp_path / "later" / name for name in names]
    first, second, third, shipped = (keras.models.load_model(path, compile=False) for path in paths)

    def alike(network, other):
        pairs = [(a, b) for a, b in zip(network.get_weights(), other.get_weights()) if a.ndim == 4]  # the filters
        return min(np.corrcoef(a.flat, b.flat)[0, 1] for a, b in pairs)

    assert 0.9 < alike(first, second) < 1 and alike(first, third) < alike(second, third) < 1
    for name, batches in (("second", 4), ("third", 5)):
        with h5py.File(tmp_path / "later" / name / "saved_model.hdf5") as file:
            steps = file["resumable_checkpoint/arrays/optimizer/0"][()]
        assert steps == 2 * batches  # the third training sees the validation images as well
    assert {layer.dtype_policy.name for layer in shipped.layers} == {"float32"}
    assert all(map(np.array_equal, shipped.get_weights(), third.get_weights()))
