"""Makes models/best_model.hdf5 of a trained network: small, calibrated, float32. `make release PRESET=full` calls it.

    CIFAR10_NPZ=cifar10.npz python scripts/ship.py FILE

FILE: the `best_model.hdf5` of a run of the notebook. Prints how good the network is that was shipped before, the one in
FILE, and the new one, and how far their probabilities are from the shares of right answers (calibration error).
"""

import json
import os
import re
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import h5py  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402
from keras import ops  # noqa: E402
from sklearn.metrics import log_loss  # noqa: E402

TARGET = Path(__file__).parent.parent / "models" / "best_model.hdf5"


def rounded(weights):
    """Filters with the eight binary digits that bfloat16 has, at most 0.4% away: half the file. All else as it is."""
    if weights.ndim != 4:
        return weights
    return ops.convert_to_numpy(ops.cast(ops.cast(weights, "bfloat16"), "float32"))


def pack(source, target, temperature=1.0):
    """Copies a network's file: its filters rounded, compressed, without what only a training needs.

    The copy computes in float32, and its layer `logits` divides them by the temperature.
    """
    with h5py.File(source) as file, h5py.File(target, "w") as packed:

        def copy(name, item):
            if isinstance(item, h5py.Dataset):
                options = {"compression": "gzip", "compression_opts": 9, "shuffle": True}
                new = packed.create_dataset(name, data=rounded(item[()]), **options)
            else:
                new = packed.require_group(name)
            new.attrs.update(item.attrs)

        copy("model_weights", file["model_weights"])
        file["model_weights"].visititems(lambda name, item: copy(f"model_weights/{name}", item))
        config = json.loads(
            re.sub(r'"(mixed_)?b?float16"', '"float32"', file.attrs["model_config"])
        )
        layers = [layer["config"] for layer in config["config"]["layers"]]
        (logits,) = [layer for layer in layers if layer["name"] == "logits"]
        logits["scale"] /= temperature
        packed.attrs["model_config"] = json.dumps(config)
        packed.attrs["backend"] = file.attrs["backend"]
        packed.attrs["keras_version"] = file.attrs["keras_version"]


def best_temperature(probabilities, labels):
    """That by which the logits must be divided for the smallest log loss (Guo and others, 2017)."""
    candidates = np.linspace(0.2, 2, 91)
    losses = []
    for temperature in candidates:
        powers = probabilities.astype("float64") ** (1 / temperature)
        tempered = powers / powers.sum(axis=1, keepdims=True)
        losses.append(log_loss(labels, tempered, labels=np.arange(tempered.shape[1])))
    return float(candidates[np.argmin(losses)])


def calibration_error(answers, labels, bins=15):
    """The expected calibration error: how far probabilities are from the shares of right answers, on average."""
    confidence = answers.max(axis=1)
    is_right = answers.argmax(axis=1) == labels
    places = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(places, is_right - confidence)
    return np.abs(gaps).sum() / len(labels)


def show(name, model, images, labels):
    """Prints how good a network's answers to images and to their mirror images are; returns those to the images."""
    images = images.astype("float32") / 255
    plain = model.predict(images, batch_size=500, verbose=0)
    both = plain + model.predict(images[:, :, ::-1], batch_size=500, verbose=0)
    accuracy = np.mean(plain.argmax(axis=1) == labels)
    with_flips = np.mean(both.argmax(axis=1) == labels)
    error = calibration_error(plain, labels)
    print(
        f"{name}: accuracy {accuracy:.4f}, with flips {with_flips:.4f}, calibration error {error:.4f}"
    )
    return plain


def main(path):
    if not Path(os.environ.get("CIFAR10_NPZ", "")).is_file():
        sys.exit("CIFAR10_NPZ: set it to the array file of the real data.")
    if not Path(path).is_file():
        sys.exit(f"FILE: there is no file {path}. Name the best_model.hdf5 of a run.")
    data = Path(os.environ["CIFAR10_NPZ"])
    data_name = f"CIFAR-10, {data.stem.replace('_', ' ')}"
    with np.load(data) as file:
        x_val, y_val = file["x_train"][-5000:], file["y_train"][-5000:].reshape(-1)
        x_test, y_test = file["x_test"], file["y_test"].reshape(-1)
    if TARGET.exists():
        before = keras.models.load_model(TARGET, compile=False)
        show(f"Validation, shipped before ({data_name})", before, x_val, y_val)
    trained = keras.models.load_model(path, compile=False)
    as_trained = show(f"Validation, as trained ({data_name})", trained, x_val, y_val)

    with tempfile.TemporaryDirectory(dir=TARGET.parent) as folder:
        new = Path(folder, TARGET.name)
        pack(path, new)
        packed = keras.models.load_model(new, compile=False)
        answers = show(f"Validation, packed ({data_name})", packed, x_val, y_val)
        print(f"largest change of a probability by that: {abs(answers - as_trained).max():.4f}")
        temperature = best_temperature(answers, y_val)
        pack(path, new, temperature)
        shipped = keras.models.load_model(new, compile=False)
        name = f"temperature {temperature:.2f} ({data_name})"
        show(f"Validation, {name}", shipped, x_val, y_val)
        answers = show(f"Test, {name}", shipped, x_test, y_test).argmax(axis=1)
        recall = [np.mean(answers[y_test == label] == label) for label in range(10)]
        print("recall of each class:", " ".join(f"{share:.2f}" for share in recall))
        new.replace(TARGET)
    print(f"Renewed {TARGET}: {TARGET.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
