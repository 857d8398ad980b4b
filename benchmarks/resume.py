"""What is equal to an uninterrupted training after a kill at epoch 5 of 10, for us and for what Keras offers.

    python benchmarks/resume.py [METHOD ...]     prints a table, and what a save costs beside Keras's

METHOD: ours, backup, load_keras, load_hdf5 or csv; all of them, if none is named. The sizes of the networks whose saves
are timed, in MB of weights, are set by the environment variable SIZES ("8 300").

Each method trains the same small network (Adam, Dropout, GaussianNoise, augmentation layers, ReduceLROnPlateau,
EarlyStopping) three times, in processes of its own: uninterrupted, killed by SIGKILL when epoch 5 begins, and resumed.
"""

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
SIZES = [float(size) for size in os.environ.get("SIZES", "8 300").split()]
METHODS = {
    "ours": "ResumableCheckpoint",
    "backup": "BackupAndRestore + ModelCheckpoint(save_best_only)",
    "load_keras": "ModelCheckpoint(.keras), load_model + fit",
    "load_hdf5": "model.save(.hdf5) each epoch, load_model + fit",
    "csv": "CSVLogger(append=True) + load_model + fit",
}
ASPECTS = [
    "weights",
    "optimizer",
    "dropout state",
    "best value",
    "counters",
    "history",
    "final weights",
]


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
    used = [
        callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: data.start_epoch(epoch)),
        reduce_rate,
        stopping,
    ]
    if method == "ours":
        used.append(keeper := ResumableCheckpoint(folder, verbose=0))
        initial_epoch = keeper.restore(model)
    elif method == "backup":
        used += [best, callbacks.BackupAndRestore(folder / "backup")]
    else:
        used += (
            [best, callbacks.CSVLogger(csv, append=initial_epoch > 0)]
            if method == "csv"
            else [best]
        )
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
            "counters": [
                reduce_rate.best,
                reduce_rate.wait,
                stopping.best,
                stopping.wait,
                stopping.best_epoch,
            ],
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


def network(megabytes):
    """A compiled model whose weights take about so many megabytes: four times that with Adam's and with the file."""
    import keras
    from keras import layers

    units = round((megabytes * 1e6 / 4 / 2) ** 0.5)
    model = keras.Sequential(
        [keras.Input((8,)), *[layers.Dense(units) for _ in range(3)], layers.Dense(10)]
    )
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def megabytes_of(name):
    """What Linux says of this process's memory: VmRSS, or its peak since the last reset, VmHWM."""
    (line,) = [
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)
    ]
    return int(line.split()[1]) / 1000


def cost(megabytes, saves=5):
    """Prints time and memory of one save: ours, ModelCheckpoint's and OrbaxCheckpoint's, in turn in one process."""
    import keras

    from visual_callbacks import ResumableCheckpoint

    model = network(megabytes)
    with tempfile.TemporaryDirectory() as work:
        # The loss grows, so that ours writes one file, too; it falls, and it writes two.
        methods = {
            "ours": (ResumableCheckpoint(f"{work}/ours", monitor="loss", verbose=0), 1),
            "ours, with best_model.hdf5": (
                ResumableCheckpoint(f"{work}/best", monitor="loss", verbose=0),
                -1,
            ),
            "ModelCheckpoint, .keras": (keras.callbacks.ModelCheckpoint(f"{work}/peer.keras"), 1),
        }
        try:
            import orbax.checkpoint  # noqa: F401

            orbax = keras.callbacks.OrbaxCheckpoint(f"{work}/orbax", max_to_keep=1)
            methods["OrbaxCheckpoint"] = (orbax, 1)
        except (ImportError, AttributeError):
            print("OrbaxCheckpoint was left out: orbax-checkpoint is not installed")
        lists = {}
        for name, (callback, _) in methods.items():
            lists[name] = keras.callbacks.CallbackList(
                [callback], model=model, epochs=saves + 2, steps=1
            )
            lists[name].on_train_begin()
        seconds, memory, check = ({name: [] for name in methods} for _ in range(3))
        for epoch in range(saves + 1):
            for name, (_, sign) in methods.items():
                began = time.perf_counter()
                lists[name].on_epoch_begin(epoch)
                for batch in range(10):
                    lists[name].on_train_batch_begin(batch)
                    lists[name].on_train_batch_end(batch, {"loss": 1.0})
                check[name].append(time.perf_counter() - began)
                before = megabytes_of("VmRSS")
                Path("/proc/self/clear_refs").write_text("5")  # resets the peak
                began = time.perf_counter()
                lists[name].on_epoch_end(epoch, {"loss": 100.0 + sign * epoch})
                seconds[name].append(time.perf_counter() - began)
                memory[name].append(megabytes_of("VmHWM") - before)
        size = Path(work, "ours", "saved_model.hdf5").stat().st_size / 1e6
        for callback_list in lists.values():
            callback_list.on_train_end()
    print(
        f"\nOne save of {megabytes:.0f} MB of weights, with Adam's variables a file of {size:.0f} MB:\n"
    )
    print("| method | seconds | times ModelCheckpoint | memory at its peak, MB | times the file |")
    print("| --- | ---: | ---: | ---: | ---: |")
    reference = statistics.median(seconds["ModelCheckpoint, .keras"][1:])
    for name in methods:
        median, peak = statistics.median(seconds[name][1:]), max(memory[name])
        print(
            f"| {name} | {median:.3f} | {median / reference:.2f} | {peak:.0f} | {peak / size:.2f} |",
            flush=True,
        )
    print(f"\nOur self-check adds {1000 * statistics.median(check['ours']):.0f} ms to an epoch.")


def history_cost():
    """Prints the time of a save after 5,000 epochs of 20 metrics, beside that after 10."""
    import keras

    from visual_callbacks import ResumableCheckpoint

    medians = []
    for epochs in (10, 5000):
        model = network(0.1)
        with tempfile.TemporaryDirectory() as work:
            keeper = ResumableCheckpoint(work, monitor="loss", mode="max", verbose=0)
            keeper.restore(model)
            callbacks = keras.callbacks.CallbackList(
                [keeper], model=model, epochs=epochs + 6, steps=1
            )
            for epoch in range(epochs):
                keeper._records[epoch] = {f"metric_{i}": 1 / (epoch + i + 1) for i in range(20)} | {
                    "loss": 1.0
                }
            keeper._next_epoch = epochs
            callbacks.on_train_begin()
            times = []
            for epoch in range(epochs, epochs + 6):
                callbacks.on_epoch_begin(epoch)
                began = time.perf_counter()
                callbacks.on_epoch_end(epoch, {"loss": 1.0 - epoch / 1e5})
                times.append(time.perf_counter() - began)
            medians.append(statistics.median(times[1:]))
    more = 1000 * (medians[1] - medians[0])
    print(
        f"\n5,000 epochs of 20 metrics in the history: {more:.0f} ms more a save than with 10 epochs"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:])
    else:
        methods = sys.argv[1:] or list(METHODS)
        unknown = set(methods) - set(METHODS)
        if unknown:
            sys.exit(f"METHOD: expected some of {', '.join(METHODS)}, got {', '.join(unknown)}")
        table(methods)
        for megabytes in SIZES:
            cost(megabytes)
        history_cost()
