"""One training by several processes, on one machine or on several: Keras on JAX. docs/running.md says what was tried.

PYTHONPATH=. python scripts/several_machines.py 1 2 & PYTHONPATH=. python scripts/several_machines.py 0 2
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"

import keras  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402

from visual_callbacks import ResumableCheckpoint  # noqa: E402

# A third argument, if there is one, says where process 0 can be reached.
process, processes = (int(sys.argv[1]), int(sys.argv[2]))
# Of process 0; the others begin with a copy of it, or they may differ by an epoch.
directory = Path("models/runs/several_machines")
directory.parent.mkdir(parents=True, exist_ok=True)
if process:
    scratch = tempfile.TemporaryDirectory()
    if directory.exists():
        shutil.copytree(directory, scratch.name, dirs_exist_ok=True)
    directory = scratch.name
keras.utils.set_random_seed(0)
# This waits for all processes.
keras.distribution.initialize((sys.argv[3:] or ["127.0.0.1:12345"])[0], processes, process)
keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))

digits = load_digits()
images, labels = digits.images[:1792, ..., None].astype("float32") / 16, digits.target[:1792]
# This process's share, as long as the others'.
images, labels = (images[process::processes], labels[process::processes])
val_images, images, val_labels, labels = images[-128:], images[:-128], labels[-128:], labels[:-128]
layers = [
    keras.layers.Conv2D(16, 3),
    keras.layers.BatchNormalization(),
    keras.layers.ReLU(),
    keras.layers.Flatten(),
]
model = keras.Sequential(
    [keras.Input((8, 8, 1)), *layers, keras.layers.Dropout(0.2), keras.layers.Dense(10)]
)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(keras.optimizers.Adam(0.001), loss, metrics=["accuracy"])
checkpoint = ResumableCheckpoint(directory, settings={"processes": processes}, verbose=process == 0)
first = checkpoint.restore(model)
rest = {
    "validation_data": (val_images, val_labels),
    "callbacks": [checkpoint],
    "verbose": 0 if process else 2,
}
model.fit(images, labels, 64 // processes, epochs=10, shuffle=False, initial_epoch=first, **rest)
