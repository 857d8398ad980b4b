"""What matters, from the first version's network upwards: one change at a time, each with the same compute.

    CIFAR10_NPZ=cifar10.npz python benchmarks/ablation.py [SEEDS [VARIANT...]]
                                                                 trains what is missing, prints the table, draws it
    CIFAR10_NPZ=cifar10.npz python benchmarks/ablation.py race [MINUTES]         time to a validation accuracy of 0.76

Each training gets as many operations (three times the forward pass's, times the images seen) as one epoch of the
notebook's default preset, and is judged by its validation accuracy at the end; the test images are not used. What is
finished stands in benchmarks/ablation.json, what was interrupted continues from its checkpoint in models/runs/ablation.

The first version trained with batches of 64, SGD of constant learning rate 0.001 and momentum 0.9, images shifted by up
to a tenth and mirrored. Its convolutions took the image's rows for channels; `Permute` does the same on every backend.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from paths import ROOT

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402
import numpy as np  # noqa: E402
from keras import layers  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from notebook_cells import cells_before_training, forward_flop  # noqa: E402

from visual_callbacks import ResumableCheckpoint  # noqa: E402

FIRST_VERSION = dict(
    axes_fixed=False,
    learning_rate=0.001,
    falling=False,
    augment=True,
    batch_norm=True,
    dropout=True,
)
FIRST_VERSION |= dict(depth=2, width=1, label_smoothing=0.0)
FIXED = FIRST_VERSION | dict(axes_fixed=True)
SCHEDULE = FIXED | dict(learning_rate=0.05, falling=True)
VARIANTS = {  # name: (settings, the name of what it is compared with)
    "the first version": (FIRST_VERSION, None),
    "axis mix-up fixed": (FIXED, "the first version"),
    "… and a schedule": (SCHEDULE, "axis mix-up fixed"),
    "… without augmentation": (SCHEDULE | dict(augment=False), "… and a schedule"),
    "… without BatchNorm": (SCHEDULE | dict(batch_norm=False), "… and a schedule"),
    "… without Dropout": (SCHEDULE | dict(dropout=False), "… and a schedule"),
    "… with three convolutions a block": (SCHEDULE | dict(depth=3), "… and a schedule"),
    "… twice as wide": (SCHEDULE | dict(width=2), "… and a schedule"),
    "… with label smoothing 0.1": (SCHEDULE | dict(label_smoothing=0.1), "… and a schedule"),
    "this notebook": (None, "… and a schedule"),
}
BATCH_SIZE, PARTS = 64, 10
RESULTS, FIGURE = ROOT / "benchmarks" / "ablation.json", ROOT / "Images" / "ablation.png"


def network(axes_fixed, depth, width, batch_norm, dropout, **_):
    """The first version's network or a variant: three blocks of convolutions, pooling and dropout, a dense layer."""

    def norm(x):
        return layers.BatchNormalization()(x) if batch_norm else x

    def conv(x, filters):
        x = x if axes_fixed else layers.Permute((2, 3, 1))(x)
        x = layers.Conv2D(
            filters, 3, padding="same", activation="relu", kernel_initializer="he_uniform"
        )(x)
        return x if axes_fixed else layers.Permute((3, 1, 2))(x)

    inputs = x = keras.Input((32, 32, 3))
    for filters, rate in ((32, 0.2), (64, 0.3), (128, 0.4)):
        for _ in range(depth):
            x = norm(conv(x, filters * width))
        x = layers.MaxPooling2D()(x)
        x = layers.Dropout(rate if dropout else 0)(x)
    x = layers.Dense(128, activation="relu", kernel_initializer="he_uniform")(layers.Flatten()(x))
    x = layers.Dropout(0.5 if dropout else 0)(norm(x))
    return keras.Model(inputs, layers.Dense(10, activation="softmax")(x))


class Images(keras.utils.PyDataset):
    """Batches in random order, the same whenever they are asked for; `part` is one of the equal parts of a training."""

    def __init__(self, images, labels, steps, seed, augment):
        super().__init__()
        self.images, self.labels = images, labels
        self.steps, self.seed, self.augment, self.part = steps, seed, augment, 0

    def __len__(self):
        return self.steps

    def __getitem__(self, batch):
        step = self.part * self.steps + batch
        turn, place = divmod(step, len(self.labels) // BATCH_SIZE)
        if turn != getattr(self, "turn", None):
            self.turn, self.order = (
                turn,
                np.random.default_rng([self.seed, turn]).permutation(len(self.labels)),
            )
        chosen = self.order[place * BATCH_SIZE : (place + 1) * BATCH_SIZE]
        images, rng = self.images[chosen], np.random.default_rng([self.seed, turn, place])
        if self.augment:
            padded = np.pad(images, ((0, 0), (3, 3), (3, 3), (0, 0)), mode="edge")
            moves, mirror = rng.integers(0, 7, (BATCH_SIZE, 2)), rng.random(BATCH_SIZE) < 0.5
            images = np.stack(
                [image[y : y + 32, x : x + 32] for image, (y, x) in zip(padded, moves)]
            )
            images[mirror] = images[mirror, :, ::-1]
        return images, self.labels[chosen]


def notebook(**knobs):
    """The notebook's names after its cells up to the training, executed in a folder of their own."""
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        names = cells_before_training(**knobs)
        os.chdir(here)
    return names


def prepare(names, settings, seed, flop=None, parts=1):
    """A compiled network of these settings, and its images for so many parts of so many operations (or of an epoch)."""
    keras.utils.set_random_seed(seed)
    model, steps = network(**settings), len(names["y_train"]) // BATCH_SIZE
    if flop:
        steps = round(flop / (3 * forward_flop(model) * BATCH_SIZE * parts))
    rate, total = settings["learning_rate"], steps * parts
    if settings["falling"]:
        warmup = dict(warmup_target=rate, warmup_steps=total // 5)
        rate = keras.optimizers.schedules.CosineDecay(rate / 10, total - total // 5, **warmup)
    loss = keras.losses.CategoricalCrossentropy(label_smoothing=settings["label_smoothing"])
    model.compile(keras.optimizers.SGD(rate, momentum=0.9), loss, metrics=["accuracy"])
    return model, Images(names["x_train"], names["y_train"], steps, seed, settings["augment"])


def train(name, seed, names, flop):
    """Trains one variant to its end, continuing where an earlier call was stopped; returns its validation accuracy."""
    settings, _ = VARIANTS[name]
    if settings is None:
        names = notebook(SEED=seed, EPOCHS=1)
        model, images, fit = names["model"], names["train_data"], dict(epochs=1)
        start = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda part, logs: images.start_epoch(part)
        )
    else:
        model, images = prepare(names, settings, seed, flop, PARTS)
        fit = dict(epochs=PARTS)
        start = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda part, logs: setattr(images, "part", part)
        )
    folder = ROOT / "models" / "runs" / "ablation" / f"{list(VARIANTS).index(name)}-{seed}"
    about = {"name": name, "seed": seed, "steps": len(images)}
    if settings is None:
        about |= names["settings"]  # the notebook's recipe as it is today
    checkpoint = ResumableCheckpoint(folder, monitor="loss", settings=about)
    fit |= dict(
        initial_epoch=checkpoint.restore(model),
        callbacks=[start, checkpoint],
        shuffle=False,
        verbose=0,
    )
    model.fit(images, **fit)
    _, accuracy = model.evaluate(names["x_val"], names["y_val"], batch_size=500, verbose=0)[:2]
    return accuracy


def finished(results):
    """(name, its finished seeds' accuracies) of every variant with at least one."""
    rows = [[results.get(f"{name}, seed {seed}") for seed in range(9)] for name in VARIANTS]
    rows = [
        (name, [value for value in row if value is not None]) for name, row in zip(VARIANTS, rows)
    ]
    return [(name, values) for name, values in rows if values]


def table(results):
    """The results as a Markdown table: docs/experiments.md and the notebook show it."""
    rows = finished(results)
    means = {name: statistics.mean(values) for name, values in rows}
    lines = [
        "| | validation accuracy | lowest to highest | seeds | change |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, values in rows:
        base, spread = VARIANTS[name][1], f"{min(values):.3f} to {max(values):.3f}"
        change = f"{means[name] - means[base]:+.3f}" if base in means else ""
        lines.append(f"| {name} | {means[name]:.3f} | {spread} | {len(values)} | {change} |")
    return "\n".join(lines)


def draw(results):
    """Images/ablation.png: a bar for each variant's mean, a dot for each seed."""
    rows, data_name = finished(results), results["data"]
    figure = Figure(figsize=(7.2, 4), dpi=100, layout="constrained")
    ax = figure.add_subplot()
    for place, (name, values) in enumerate(rows):
        mean = statistics.mean(values)
        ax.barh(place, mean, color="#0072B2" if VARIANTS[name][0] else "#D55E00", height=0.6)
        ax.plot(values, [place] * len(values), "o", color="black", ms=3.5)
        ax.text(max(values) + 0.01, place, f"{mean:.3f}", va="center", fontsize=9)
    ax.set_yticks(range(len(rows)), [name for name, _ in rows])
    ax.invert_yaxis()
    ax.set(xlim=(0, 1), xlabel="validation accuracy: mean (bar) and each seed (dot)")
    figure.suptitle(f"One change at a time, each with the same compute ({data_name})", fontsize=11)
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(FIGURE)


def ablation(seeds, variants):
    names = notebook()
    flop = 3 * forward_flop(names["model"]) * len(names["y_train"])
    results = (
        json.loads(RESULTS.read_text())
        if RESULTS.exists()
        else {"data": names["data_name"], "flop": flop}
    )
    if (results["data"], results["flop"]) != (names["data_name"], flop):
        sys.exit(f"{RESULTS} is of other data or another compute: move it away to begin anew.")
    for seed in range(seeds):
        for name in variants:
            if f"{name}, seed {seed}" not in results:
                began = time.monotonic()
                results[f"{name}, seed {seed}"] = round(train(name, seed, names, flop), 4)
                print(
                    name,
                    seed,
                    results[f"{name}, seed {seed}"],
                    f"{time.monotonic() - began:.0f} s",
                    flush=True,
                )
                RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    print(table(results))
    draw(results)


class UntilGood(keras.callbacks.Callback):
    """Stops when the validation accuracy is 0.76, or when the time is up; prints each epoch."""

    def __init__(self, name, limit):
        super().__init__()
        self.name, self.limit, self.began = name, limit, time.monotonic()

    def on_epoch_end(self, epoch, logs=None):
        self.minutes, self.accuracy = (time.monotonic() - self.began) / 60, logs["val_accuracy"]
        print(
            f"{self.name}: epoch {epoch + 1}, {self.minutes:.1f} min, {self.accuracy:.4f}",
            flush=True,
        )
        self.model.stop_training = self.accuracy >= 0.76 or self.minutes >= self.limit


def race(minutes):
    """The notebook's training, in a single epoch, against the first version's, on the same images, until 0.76."""
    names, ran = notebook(EPOCHS=1), []
    model, images = names["model"], names["train_data"]
    start = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: images.start_epoch(epoch)
    )
    first, own = prepare(names, FIRST_VERSION, 0)
    part = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: setattr(own, "part", epoch)
    )
    for name, network, data, callback in (
        ("ours", model, images, start),
        ("the first version", first, own, part),
    ):
        until = UntilGood(name, minutes)
        validation = dict(
            validation_data=(names["x_val"], names["y_val"]), validation_batch_size=500
        )
        network.fit(
            data, epochs=10_000, shuffle=False, verbose=0, callbacks=[callback, until], **validation
        )
        ran.append(until)
    ours, theirs = ran
    reached = (
        ""
        if theirs.accuracy >= 0.76
        else f", which has {theirs.accuracy:.3f} by then: a lower bound"
    )
    print(
        f"{theirs.minutes / ours.minutes:.1f} times as long takes the first version{reached} ({names['data_name']})"
    )


if __name__ == "__main__":
    if os.environ.get("CIFAR10_NPZ"):
        os.environ["CIFAR10_NPZ"] = str(Path(os.environ["CIFAR10_NPZ"]).absolute())
    if sys.argv[1:2] == ["race"]:
        race(float(sys.argv[2]) if len(sys.argv) > 2 else 60)
    else:
        variants = sys.argv[2:] or list(VARIANTS)
        unknown = set(variants) - set(VARIANTS)
        if unknown:
            sys.exit(f"VARIANT: expected some of {', '.join(VARIANTS)}, got {', '.join(unknown)}")
        ablation(int(sys.argv[1]) if len(sys.argv) > 1 else 3, variants)
