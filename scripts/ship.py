"""One or several networks in one file, which answers with their mean: how models/best_model.hdf5 is put together.

    CIFAR10_NPZ=cifar10.npz python scripts/ship.py FILE...

FILE: an HDF5 file with a whole model of the notebook's kind, such as the `best_model.hdf5` of a training. Prints the
accuracy of each network and of the new file, and how far its probabilities are from the shares of right answers. The
new file then replaces models/best_model.hdf5.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import h5py  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402
from keras import layers, ops  # noqa: E402

TARGET = Path(__file__).parent.parent / "models" / "best_model.hdf5"


def mean_of(models):
    """One network that holds all of these, for images of shape (n, height, width, 3), and answers with their mean.

    Networks that were trained with label smoothing are too modest. So the mean of their probabilities is squared and
    divided by its sum, which changes no answer: a temperature of 0.5 (Guo and others, 2017).
    """
    image = keras.Input((None, None, 3), name="image")
    answers = []
    for number, model in enumerate(models, 1):
        part = keras.Model(model.input, model.output, name=f"part_{number}")
        answers.append(part(image))
    length_1 = layers.UnitNormalization(name="length_1")(layers.average(answers))
    probabilities = layers.Multiply(name="probabilities")([length_1, length_1])
    return keras.Model(image, probabilities, name="first_steps_cnn")


def rounded(weights):
    """Filters with the eight binary digits that bfloat16 has, at most 0.4% away: half the file. All else as it is."""
    if weights.ndim != 4:
        return weights
    return ops.convert_to_numpy(ops.cast(ops.cast(weights, "bfloat16"), "float32"))


def calibration_error(answers, labels, bins=15):
    """The expected calibration error: how far probabilities are from the shares of right answers, on average."""
    confidence = answers.max(axis=1)
    is_right = answers.argmax(axis=1) == labels
    places = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(places, is_right - confidence)
    return np.abs(gaps).sum() / len(labels)


def save(model, path):
    """Saves a model without its optimizer's state, packed, and without arguments that Keras 3.13 does not know."""
    newer = ', "(input_axes|output_axes|renorm|renorm_clipping|renorm_momentum)": [^,}]*'  # all at their defaults
    with tempfile.TemporaryDirectory() as folder, h5py.File(path, "w") as packed:

        def copy(name, item):
            if isinstance(item, h5py.Dataset):
                packing = (
                    dict(compression="gzip", compression_opts=9, shuffle=True) if item.shape else {}
                )
                target = packed.create_dataset(name, data=item[()], **packing)
            else:
                target = packed.require_group(name)
            target.attrs.update(item.attrs)

        plain = Path(folder, "plain.hdf5")
        keras.Model(model.input, model.output, name=model.name).save(plain)
        with h5py.File(plain) as file:
            file.visititems(copy)
            packed.attrs.update(file.attrs)
            packed.attrs["model_config"] = re.sub(newer, "", file.attrs["model_config"])


def load(path):
    """The network in a file, its filters rounded."""
    model = keras.models.load_model(path, compile=False)
    model.set_weights([rounded(weights) for weights in model.get_weights()])
    return model


def show(name, answers, labels):
    """Prints how good the answers to images and to their mirror images are."""
    plain, mirrored = answers
    both = (plain + mirrored) / 2
    accuracy = np.mean(plain.argmax(axis=1) == labels)
    with_flips = np.mean(both.argmax(axis=1) == labels)
    error = calibration_error(plain, labels)
    print(
        f"{name}: accuracy {accuracy:.4f}, with flips {with_flips:.4f}, calibration error {error:.4f}"
    )


def main(paths):
    data = Path(os.environ["CIFAR10_NPZ"])
    data_name = f"CIFAR-10, {data.stem.replace('_', ' ')}"
    with np.load(data) as file:
        x_val, y_val = file["x_train"][-5000:], file["y_train"][-5000:].reshape(-1)
        x_test, y_test = file["x_test"], file["y_test"].reshape(-1)

    def answers_to(images, model):
        images = images.astype("float32") / 255
        mirrored = images[:, :, ::-1]
        return [model.predict(side, batch_size=500, verbose=0) for side in (images, mirrored)]

    models = [load(path) for path in paths]
    for path, model in zip(paths, models):
        show(f"Validation, {path} ({data_name})", answers_to(x_val, model), y_val)
    new = TARGET.with_name(f"new_{TARGET.name}")
    save(mean_of(models), new)
    shipped = keras.models.load_model(new, compile=False)
    show(f"Validation, the mean ({data_name})", answers_to(x_val, shipped), y_val)
    show(f"Test, the mean ({data_name})", answers_to(x_test, shipped), y_test)
    new.replace(TARGET)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    if not Path(os.environ.get("CIFAR10_NPZ", "")).is_file():
        sys.exit("CIFAR10_NPZ: set it to the array file of the real data.")
    for path in sys.argv[1:]:
        if not Path(path).is_file():
            sys.exit(f"FILE: there is no file {path}. Name the HDF5 files of trained networks.")
    main(sys.argv[1:])
