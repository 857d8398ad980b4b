"""How the shipped networks came about: after the notebook's `full` preset, further trainings, each from the one before.

    CIFAR10_NPZ=cifar10.npz PYTHONPATH=. python scripts/further_training.py FIRST FOLDER [SEED]

FIRST: the `best_model.hdf5` of `make run PRESET=full`, then, with SEED 1, the `trained.hdf5` of the second training.
FOLDER: where the checkpoint files go; interrupted, it continues from there. Runs the notebook's own cells up to its
training, then trains on what is harder to learn by heart: a third of the batches are as the notebook makes them; in a
third each image is blended with another one (mixup, Zhang and others, 2017); in a third a square of another image
covers a part of it (CutMix, Yun and others, 2019). The labels have the same shares. The blocks' convolutions compute in
bfloat16, which some CPUs and GPUs do faster. Writes FOLDER/trained.hdf5, the network with the best weights, in float32,
and prints its validation accuracy. Shipped is what ship.py makes of several such files.
"""

import contextlib
import os
import sys
import tempfile
import zlib
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import keras  # noqa: E402
import numpy as np  # noqa: E402
from notebook_cells import cells_before_training  # noqa: E402
from ship import save  # noqa: E402

from visual_callbacks import AccLossPlotter, ResumableCheckpoint  # noqa: E402

# What differs from the preset: half of its first corrections, as the weights are good ones, and fewer epochs.
KNOBS = dict(PRESET="full", EPOCHS=25, LEARNING_RATE=0.25, FILTER_RATE=0.04)


def mixed(images, labels, rng):
    """The batch as it is, or each image and label with a share, at most half, of those at the batch's other end."""
    kind, share, side = rng.integers(3), rng.uniform(0, 0.5), images.shape[1]
    if kind == 0:
        return images, labels
    if kind == 1:
        images = images + np.float32(share) * (images[::-1] - images)
    else:
        edge = round(side * share**0.5)
        top, left = rng.integers(0, side - edge + 1, 2)
        square = np.s_[:, top : top + edge, left : left + edge]
        others, images, share = images[::-1], images.copy(), edge**2 / side**2
        images[square] = others[square]
    return images, labels + np.float32(share) * (labels[::-1] - labels)


def in_bfloat16(conv):
    """The notebook's `conv`, its convolution computed in bfloat16; weights, and what comes after it, stay float32."""

    def faster(x, filters, name):
        keras.config.set_dtype_policy("mixed_bfloat16")
        x = conv(x, filters, name)
        keras.config.set_dtype_policy("float32")
        return x

    return faster


def main(first, folder, seed="0"):
    first, folder = Path(first).absolute(), Path(folder).absolute()
    os.environ["CIFAR10_NPZ"] = str(Path(os.environ["CIFAR10_NPZ"]).absolute())
    # The notebook's pictures go to `work`.
    with tempfile.TemporaryDirectory() as work, contextlib.chdir(work):
        names = cells_before_training(SEED=int(seed), **KNOBS)

    class Mixed(type(names["train_data"])):
        def start_epoch(self, epoch):
            super().start_epoch(epoch)
            self.epoch = epoch

        def __getitem__(self, batch):
            return mixed(
                *super().__getitem__(batch),
                np.random.default_rng([names["SEED"], self.epoch, batch]),
            )

    train_data = Mixed(names["x_train"], names["y_train"], names["BATCH_SIZE"])
    plain = names["model"]
    names["conv"] = in_bfloat16(names["conv"])
    model = names["build_model"]()
    model.load_weights(first)
    model.compile(plain.optimizer, plain.loss, metrics=["accuracy"])
    settings = names["settings"] | {"first": zlib.crc32(first.read_bytes())}
    checkpoint = ResumableCheckpoint(folder, monitor="val_accuracy", settings=settings)
    model.fit(
        train_data,
        epochs=names["EPOCHS"],
        initial_epoch=checkpoint.restore(model),
        validation_data=(names["x_val"], names["y_val"]),
        validation_batch_size=500,
        shuffle=False,
        verbose=0,
        callbacks=[
            keras.callbacks.LambdaCallback(
                on_epoch_begin=lambda epoch, logs: train_data.start_epoch(epoch)
            ),
            AccLossPlotter(save_graph=True, path=folder / "loss.png", title=names["data_name"]),
            checkpoint,
        ],
    )
    plain.load_weights(checkpoint.best_path)
    save(plain, folder / "trained.hdf5")
    answers = plain.predict(names["x_val"], batch_size=500, verbose=0).argmax(axis=1)
    accuracy = (answers == names["y_val"].argmax(axis=1)).mean()
    print(f"Validation accuracy: {accuracy:.4f} ({names['data_name']})")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    if not Path(os.environ.get("CIFAR10_NPZ", "")).is_file():
        sys.exit("CIFAR10_NPZ: set it to the array file of the real data.")
    if not Path(sys.argv[1]).is_file():
        sys.exit(
            f"FIRST: there is no file {sys.argv[1]}. `make run PRESET=full` makes one and names its folder."
        )
    if len(sys.argv) == 4 and not sys.argv[3].isdecimal():
        sys.exit(f"SEED: expected a whole number, got {sys.argv[3]}")
    main(*sys.argv[1:])
