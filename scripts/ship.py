"""Several networks in one file, whose answer is the mean of theirs: how `best_model.hdf5` is put together.

    CIFAR10_NPZ=cifar10.npz python scripts/ship.py FILE FILE...

FILE: an HDF5 file with a whole model, such as the `best_model.hdf5` of a training. Prints the accuracy of each and of
the new file, which then replaces models/best_model.hdf5.
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
    """One network that holds all of these, for images of shape (n, height, width, 3), and answers with their mean."""
    image = keras.Input((None, None, 3), name="image")
    parts = [keras.Model(model.input, model.output, name=f"part_{k}") for k, model in enumerate(models, 1)]
    answers = [part(image) for part in parts]
    return keras.Model(image, layers.average(answers), name="first_steps_cnn")


def rounded(weights):
    """Filters with the eight binary digits that bfloat16 has, at most 0.4% away: half the file. All else as it is."""
    return ops.convert_to_numpy(ops.cast(ops.cast(weights, "bfloat16"), "float32")) if weights.ndim == 4 else weights


def save(model, path):
    """Saves a model without its optimizer's state, packed, and without arguments that Keras 3.13 does not know."""
    newer = ', "(input_axes|output_axes|renorm|renorm_clipping|renorm_momentum)": [^,}]*'  # all at their defaults
    with tempfile.TemporaryDirectory() as folder, h5py.File(path, "w") as packed:

        def copy(name, item):
            if isinstance(item, h5py.Dataset):
                packing = dict(compression="gzip", compression_opts=9, shuffle=True) if item.shape else {}
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


def main(paths):
    data = Path(os.environ["CIFAR10_NPZ"])
    with np.load(data) as file:
        x, y, x_test, y_test = (file[name] for name in ("x_train", "y_train", "x_test", "y_test"))
    models = [keras.models.load_model(path, compile=False) for path in paths]
    for model in models:
        model.set_weights([rounded(weights) for weights in model.get_weights()])
    new = TARGET.with_name(f"new_{TARGET.name}")
    save(mean_of(models), new)
    shipped = keras.models.load_model(new, compile=False)
    named = {f"Validation, {path}": (model, x[-5000:], y[-5000:]) for path, model in zip(paths, models)}
    named |= {"Validation, the mean": (shipped, x[-5000:], y[-5000:]), "Test, the mean": (shipped, x_test, y_test)}
    for name, (model, images, labels) in named.items():
        images = images.astype("float32") / 255
        answers = [model.predict(side, batch_size=500, verbose=0) for side in (images, images[:, :, ::-1])]
        plain, flips = (np.mean(a.argmax(axis=1) == labels.reshape(-1)) for a in (answers[0], sum(answers)))
        print(f"{name}: accuracy {plain:.4f}, with flips {flips:.4f} (CIFAR-10, {data.stem.replace('_', ' ')})")
    new.replace(TARGET)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    if not Path(os.environ.get("CIFAR10_NPZ", "")).is_file():
        sys.exit("CIFAR10_NPZ: set it to the array file of the real data.")
    for path in sys.argv[1:]:
        if not Path(path).is_file():
            sys.exit(f"FILE: there is no file {path}. Name the HDF5 files of trained networks.")
    main(sys.argv[1:])
