"""What is equal to an uninterrupted training after a kill at epoch 5 of 10, for us and for what Keras offers.

    python benchmarks/resume.py [METHOD ...]     prints a table, and what a save costs beside ModelCheckpoint's

METHOD: ours, backup, load_keras, load_hdf5 or csv; all of them, if none is named.

Each method trains the same small network (Adam, Dropout, GaussianNoise, augmentation layers, ReduceLROnPlateau,
EarlyStopping) three times, in processes of its own: uninterrupted, killed by SIGKILL when epoch 5 begins, and resumed.
"""

import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import paths  # noqa: F401

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
EPOCHS, KILL = 10, 5
METHODS = {
    "ours": "ResumableCheckpoint",
    "backup": "BackupAndRestore + ModelCheckpoint(save_best_only)",
    "load_keras": "ModelCheckpoint(.keras), load_model + fit",
    "load_hdf5": "model.save(.hdf5) each epoch, load_model + fit",
    "csv": "CSVLogger(append=True) + load_model + fit",
}
ASPECTS = ["weights", "optimizer", "dropout state", "best value", "counters", "history", "final weights"]


def child(method, folder):
    """Trains, or resumes, in `folder` and leaves there what it found at the kill's epoch and at the end."""
    import keras
    import numpy as np
    import training

    from visual_callbacks import ResumableCheckpoint

    training.prepare()
    keras.utils.set_random_seed(7)
    callbacks = keras.callbacks
    x, y = training.images()
    data = training.Batches(x, y)
    reduce_rate, stopping, _ = training.plateau()
    folder = Path(folder)
    file = folder / {"load_hdf5": "model.hdf5"}.get(method, "model.keras")
    best = callbacks.ModelCheckpoint(folder / "best.keras", save_best_only=True)
    csv, initial_epoch = folder / "log.csv", 0
    if method.startswith(("load", "csv")) and file.exists():
        model = keras.models.load_model(file)
        initial_epoch = int((folder / "epoch").read_text())
    else:
        model = training.sequential()
        model.compile(training.ADAM(0.02), "categorical_crossentropy", metrics=["accuracy"])
    used = [callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: data.start_epoch(epoch)), reduce_rate, stopping]
    if method == "ours":
        used.append(keeper := ResumableCheckpoint(folder, callbacks=[reduce_rate, stopping], verbose=0))
        initial_epoch = keeper.restore(model)
    elif method == "backup":
        used += [best, callbacks.BackupAndRestore(folder / "backup")]
    else:
        used += [best, callbacks.CSVLogger(csv, append=initial_epoch > 0)] if method == "csv" else [best]
        note = lambda epoch, logs: (model.save(file), (folder / "epoch").write_text(str(epoch + 1)))  # noqa: E731
        used.append(callbacks.LambdaCallback(on_epoch_end=note))

    weights = {id(variable) for variable in model.weights}
    seeds = [variable for variable in model.variables if id(variable) not in weights]

    def snapshot():
        arrays = lambda variables: [np.asarray(keras.ops.convert_to_numpy(v)) for v in variables]  # noqa: E731
        return {
            "weights": arrays(model.weights),
            "optimizer": arrays(model.optimizer.variables),
            "dropout state": arrays(seeds),
            "best value": keeper.best if method == "ours" else best.best,
            "counters": [reduce_rate.best, reduce_rate.wait, stopping.best, stopping.wait, stopping.best_epoch],
        }

    taken = {}

    class Look(callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            print("began", epoch, flush=True)
            self.epoch = epoch

        def on_train_batch_begin(self, batch, logs=None):
            if batch == 0 and self.epoch == KILL:
                taken.update(snapshot())

    history = model.fit(
        data, epochs=EPOCHS, initial_epoch=initial_epoch, validation_data=(x[:30], y[:30]), shuffle=False, verbose=0,
        callbacks=[*used, Look()],
    )  # fmt: skip
    taken["history"] = history.history if method != "csv" else csv.read_text()
    taken["final weights"] = snapshot()["weights"]
    (folder / "taken.pickle").write_bytes(pickle.dumps(taken))


def run(method, folder, kill=False):
    command = [sys.executable, __file__, "child", method, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if kill and line == f"began {KILL}\n":
            time.sleep(0.02)
            process.kill()
    errors = process.stderr.read()
    if process.wait() and not kill:
        return None, errors.strip().splitlines()[-1][:160]
    return (pickle.loads((folder / "taken.pickle").read_bytes()) if not kill else None), None


def equal(a, b):
    import numpy as np

    if a is None or b is None:
        return False
    if isinstance(a, list) and a and isinstance(a[0], np.ndarray):
        return len(a) == len(b) and all(np.array_equal(left, right) for left, right in zip(a, b))
    return a == b


def table(methods):
    print("| method |", " | ".join(ASPECTS), "|")
    print("| --- |" + " --- |" * len(ASPECTS))
    for method in methods:
        name = METHODS[method]
        with tempfile.TemporaryDirectory() as work:
            folders = [Path(work, "whole"), Path(work, "parts")]
            for folder in folders:
                folder.mkdir()
            whole, _ = run(method, folders[0])
            run(method, folders[1], kill=True)
            resumed, error = run(method, folders[1])
        if resumed is None:
            print(f"| {name} | cannot be resumed: {error} |" + " |" * (len(ASPECTS) - 1))
            continue
        cells = ["equal" if equal(whole.get(a), resumed.get(a)) else "**differs**" for a in ASPECTS]
        print(f"| {name} |", " | ".join(cells), "|", flush=True)


def network(**options):
    """One of the size of the notebook's, compiled."""
    import keras
    from keras import layers

    stack = [keras.Input((32, 32, 3)), layers.Conv2D(24, 2)]
    for filters in (64, 256, 256):
        stack += [layers.Conv2D(filters, 3, padding="same", use_bias=False), layers.MaxPooling2D()]
        stack += [layers.BatchNormalization(), layers.Conv2D(filters, 3, padding="same", use_bias=False)]
        stack += [layers.BatchNormalization(), layers.Activation("gelu"), layers.Dropout(0.05)]
    model = keras.Sequential([*stack, layers.GlobalMaxPooling2D(), layers.Dense(10, activation="softmax")])
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "categorical_crossentropy", **options)
    return model


def cost():
    """Time of one save of the notebook's network, ours against ModelCheckpoint's, in turn in one process."""
    import keras
    import numpy as np

    from visual_callbacks import ResumableCheckpoint

    model = network()
    x, y = np.zeros((8, 32, 32, 3), "float32"), np.eye(10, dtype="float32")[np.zeros(8, int)]
    times = {"ours": [], "ours, also best": [], "ModelCheckpoint": []}
    with tempfile.TemporaryDirectory() as work:
        keeper = ResumableCheckpoint(f"{work}/ours", monitor="loss", verbose=0)
        peer = keras.callbacks.ModelCheckpoint(f"{work}/peer.keras")
        model.fit(x, y, verbose=0, callbacks=[keeper, peer])
        keeper.on_train_begin()  # a second training, of which only the saves are done
        keeper.on_epoch_begin(1)
        for epoch in range(1, 16):
            for name, logs in (("ours", {"loss": 99.0}), ("ours, also best", {"loss": 1.0 / epoch})):
                if name == "ours, also best":
                    keeper.best = None
                began = time.perf_counter()
                keeper.on_epoch_end(epoch, logs)
                keeper.on_epoch_begin(epoch + 1)
                times[name].append(time.perf_counter() - began)
            began = time.perf_counter()
            peer.on_epoch_end(epoch, {"loss": 1.0})
            times["ModelCheckpoint"].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in times.items()}
    reference = medians["ModelCheckpoint"]
    for name, seconds in medians.items():
        print(f"{name}: {seconds * 1000:.0f} ms a save, {seconds / reference:.2f} times ModelCheckpoint's")
    print(json.dumps({"seconds": medians, "parameters": model.count_params()}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:])
    else:
        methods = sys.argv[1:] or list(METHODS)
        unknown = set(methods) - set(METHODS)
        if unknown:
            sys.exit(f"METHOD: expected some of {', '.join(METHODS)}, got {', '.join(unknown)}")
        table(methods)
        cost()
