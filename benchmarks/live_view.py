"""Time, memory and notebook size of the live view: ours, livelossplot 0.6.1 and the plain recipe, on the same logs.

    python benchmarks/live_view.py [EPOCHS]     needs livelossplot==0.6.1; prints three tables

With the 600 epochs that it draws unless told otherwise, it draws Images/live_view.png, too; with others, what follows
is of a small network, and no number to report.

All three redraw the curves after each of 600 epochs in one real Jupyter kernel, each in a cell of its own, in turn and
twice over. A redraw is timed from the call until the picture is handed to the kernel's messaging. Then ours alone for
2,000 epochs in a fresh kernel. Each time is the median of the ten redraws up to that epoch. At last, what the plotters
and their record add to an epoch of the notebook's training.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path

import nbformat
from matplotlib.figure import Figure
from nbclient import NotebookClient
from paths import ROOT

SETUP = """
import os, time
import keras, matplotlib.pyplot as plt, numpy as np
from IPython.display import clear_output
from livelossplot import PlotLosses
from livelossplot.outputs import MatplotlibPlot
from visual_callbacks import AccLossPlotter

noise = np.random.default_rng(0).random((2000, 4)) / 20

def logs(epoch):
    x, (a, b, c, d) = 1 / (1 + epoch / 20), noise[epoch]
    losses = {"loss": 2 * x + a, "val_loss": 2.1 * x + b}
    return {**losses, "accuracy": 1 - 0.9 * x - c, "val_accuracy": 0.95 - 0.85 * x - d}

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

def ours(epochs):
    plotter, model = AccLossPlotter(verbose=0), keras.Sequential()
    plotter.set_params({"epochs": epochs, "steps": None})
    plotter.set_model(model)
    plotter.on_train_begin()
    for epoch in range(epochs):
        plotter.on_epoch_begin(epoch)
        plotter.on_epoch_end(epoch, logs(epoch))
        yield

def livelossplot(epochs):
    groups = {"accuracy": ["accuracy", "val_accuracy"], "loss": ["loss", "val_loss"]}
    plot = PlotLosses(groups=groups, outputs=[MatplotlibPlot()])
    for epoch in range(epochs):
        plot.update(logs(epoch))
        plot.send()
        yield

def recipe(epochs):
    history = {name: [] for name in logs(0)}
    for epoch in range(epochs):
        for name, value in logs(epoch).items():
            history[name].append(value)
        clear_output(wait=True)
        figure, axes = plt.subplots(1, 2, figsize=(9.6, 4))
        for ax, name in zip(axes, ("accuracy", "loss")):
            ax.plot(history[name], label="training")
            ax.plot(history["val_" + name], label="validation")
            ax.set_title(name)
            ax.legend()
        plt.show()
        yield

def measure(method, epochs):
    redraws, ms, memory = method(epochs), [], []
    for epoch in range(epochs):
        began = time.perf_counter()
        next(redraws)
        ms.append((time.perf_counter() - began) * 1000)
        memory.append(resident())
    ends = [n for n in (10, 20, 100, 600, 2000) if n <= epochs] + [epochs]
    times = {str(n): np.median(ms[n - 10 : n]) for n in ends}
    return {"ms": times, "grown": memory[-1] - memory[min(50, epochs) - 1], "open": len(plt.get_fignums())}
"""
NAMES = {
    "ours": "AccLossPlotter",
    "livelossplot": "livelossplot 0.6.1",
    "recipe": "clear_output, plt.plot, plt.show",
}


def execute(*measurements):
    """Runs (method, epochs) pairs, each in a cell, in one kernel; returns their results, with what the cell saves."""
    cells = [nbformat.v4.new_code_cell(SETUP)]
    for method, epochs in measurements:
        cells.append(nbformat.v4.new_code_cell(f"result = measure({method}, {epochs})"))
        cells.append(nbformat.v4.new_code_cell("import json; print(json.dumps(result))"))
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=None, kernel_name="python3").execute()
    return [
        {**json.loads(printed.outputs[0].text), "kB": len(json.dumps(drawn.outputs)) / 1000}
        for drawn, printed in zip(notebook.cells[1::2], notebook.cells[2::2])
    ]


def main(epochs=600):
    results = execute(*[(name, epochs) for name in NAMES] * 2)
    lengths = [n for n in ("10", "100", "600") if int(n) <= epochs]
    ms = {  # of both rounds
        name: {
            n: statistics.mean(result["ms"][n] for result in results[i :: len(NAMES)])
            for n in lengths
        }
        for i, name in enumerate(NAMES)
    }
    columns = " | ".join(f"ms at {n}" for n in lengths)
    print(
        f"| {epochs} epochs | {columns} | of livelossplot's time | MB grown | output, kB | open figures |"
    )
    print("| --- " * (len(lengths) + 5) + "|")
    for name, first, second in zip(NAMES, results, results[len(NAMES) :]):
        shares = " ".join(f"{ms[name][n] / ms['livelossplot'][n]:.2f}" for n in lengths)
        times = " | ".join(f"{ms[name][n]:.0f}" for n in lengths)
        grown = f"{first['grown']:.1f}, {second['grown']:.1f}"
        print(
            f"| {NAMES[name]} | {times} | {shares} | {grown} | {second['kB']:.0f} | {second['open']} |"
        )
    longest = 2000 if epochs == 600 else epochs
    (six,), (many,) = execute(("ours", 6)), execute(("ours", longest))
    print(f"\n| AccLossPlotter, {longest:,} epochs | |\n| --- | --- |")
    print(f"| memory grown after the first 50 | {many['grown']:.1f} MB |")
    print(
        "| time of a redraw at the end, divided by that at epoch 20 |",
        f"{many['ms'][str(longest)] / many['ms']['20']:.2f} |",
    )
    print(f"| notebook larger than after 6 epochs | {many['kB'] - six['kB']:.0f} kB |")
    print(f"| pyplot figures open | {many['open']} |")
    if epochs == 600:
        draw(ms, lengths)
    what_an_epoch_costs((64, 256, 256), 250) if epochs == 600 else what_an_epoch_costs(
        (8, 8, 8), 20
    )


def network(widths, **options):
    """One like the notebook's, compiled."""
    import keras
    from keras import layers

    stack = [keras.Input((32, 32, 3)), layers.Conv2D(24, 2)]
    for filters in widths:
        stack += [layers.Conv2D(filters, 3, padding="same", use_bias=False), layers.MaxPooling2D()]
        stack += [
            layers.BatchNormalization(),
            layers.Conv2D(filters, 3, padding="same", use_bias=False),
        ]
        stack += [layers.BatchNormalization(), layers.Activation("gelu"), layers.Dropout(0.05)]
    model = keras.Sequential(
        [*stack, layers.GlobalMaxPooling2D(), layers.Dense(10, activation="softmax")]
    )
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "categorical_crossentropy", **options)
    return model


def seconds(function, times, *arguments):
    """The median of so many calls, after one that does what is done once."""
    function(*arguments)
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        function(*arguments)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def what_an_epoch_costs(widths, predictions, images=1000):
    """What the plotters add to an epoch of 45,000 images in batches of 500, and 5,000 for validation.

    How long that takes is measured with 1,000 of each.
    """
    import keras
    import numpy as np
    import tensorflow as tf

    from visual_callbacks import (
        AccLossPlotter,
        ConfusionMatrixPlotter,
        PredictionPlotter,
        _Board,
        _Measured,
        _pack,
    )

    x = np.random.default_rng(0).random((images, 32, 32, 3)).astype("float32")
    y = np.eye(10, dtype="float32")[np.arange(images) % 10]
    metric = keras.metrics.OneHotMeanIoU(10)
    model, update = network(widths, metrics=["accuracy", metric]), tf.function(metric.update_state)
    epoch = 45 * seconds(lambda: model.fit(x, y, 500, verbose=0), 3)
    epoch += 5 * seconds(lambda: model.evaluate(x, y, 500, verbose=0), 3)
    classes = "airplane automobile bird cat deer dog frog horse ship truck".split()
    curves = AccLossPlotter(verbose=0)
    held, other = (
        ConfusionMatrixPlotter(x, y, classes),
        ConfusionMatrixPlotter(x[1:], y[1:], classes),
    )
    looked = PredictionPlotter(x[:8], y[:8], classes)
    logs = {"loss": 1.0, "accuracy": 0.5, "val_loss": 1.0, "val_accuracy": 0.5}

    def end_epoch(plotter):
        """The end of a new epoch: nothing is measured yet."""
        plotter.number = getattr(plotter, "number", -1) + 1
        plotter.on_epoch_begin(plotter.number)
        plotter.on_epoch_end(plotter.number, dict(logs))

    took = {}
    for name, plotter in (
        ("matrix", held),
        ("predicted", other),
        ("looked", looked),
        ("curves", curves),
    ):
        plotter.set_model(model)
        plotter.on_train_begin()
        if plotter is held:  # as at the end of a validation pass
            held.confusion_matrix = lambda: np.diag(held._class_sizes)
        took[name] = seconds(end_epoch, 5, plotter)
    took["predicted"] *= 5
    # The updates in training and in validation.
    took["matrix"] += 10 * 5000 / 500 * seconds(update, 50, y[:500], y[:500])
    board = _Board([curves, held, looked])
    board.live_path = Path("live.html").absolute()
    took["live"] = seconds(board.show, 9)
    inside = 1 / 150  # of the time at most: so long a plotter pauses after a drawing
    rows = {
        "AccLossPlotter, inside of epochs, at most": inside,
        "AccLossPlotter, at the end": took["curves"] / epoch,
        "ConfusionMatrixPlotter, held by the compiled metric": took["matrix"] / epoch,
        "PredictionPlotter, eight images and their evidence": took["looked"] / epoch,
        "all on one picture, and `live.html`": took["live"] / epoch,
    }
    print(f"\n| an epoch of {epoch:.0f} s | adds |\n| --- | --- |")
    for name, share in rows.items():
        print(f"| {name} | {share:.2%} |")
    print(f"| **together** | **{sum(rows.values()):.2%}** |")
    print(f"| ConfusionMatrixPlotter, by a second `predict` | {took['predicted'] / epoch:.2%} |")
    measured = _Measured()
    for number in range(2000):
        measured.keep("confusion_matrix", number, np.zeros((100, 100), np.uint16))
        measured.keep("predictions probabilities", number, np.zeros((12, 100), np.uint16))
        measured.keep("predictions falls", number, np.zeros((12, 7, 7), np.int8))

    def save(with_record):
        record = measured.arrays() if with_record else {}
        return len(
            _pack(
                model, True, "{}", [(f"measured/{name}", values) for name, values in record.items()]
            )
        )

    more = save(True) - save(False)
    longer = seconds(save, 9, True) - seconds(save, 9, False)
    print(
        f"| the record of 2,000 epochs of 100 classes: {more / 1e6:.1f} MB in the file | {longer / epoch:.3%} |"
    )
    small = ConfusionMatrixPlotter(x[:250], y[:250], classes)
    small.set_model(model)
    memory = []
    for _ in range(predictions):
        small.confusion_matrix()
        memory.append(resident())
    grown = memory[-1] - memory[min(49, predictions // 2)]
    print(
        f"\nMemory grown by {predictions} predictions, after the first {min(50, predictions // 2)}: {grown:.1f} MB"
    )


def draw(ms, lengths):
    figure = Figure(figsize=(7.2, 2.5), dpi=100, layout="constrained")
    ax = figure.add_subplot()
    for index, (name, colour) in enumerate(zip(NAMES, ("#0072B2", "#E69F00", "#8C8C8C"))):
        places = [x + 0.28 * (index - 1) for x in range(len(lengths))]
        bars = ax.bar(places, [ms[name][n] for n in lengths], 0.25, color=colour, label=NAMES[name])
        ax.bar_label(bars, fmt="%.0f", fontsize=8)
    ax.set_xticks(range(len(lengths)), [f"{n} epochs" for n in lengths])
    ax.set(ylabel="ms", title="One redraw of the curves, same logs, same kernel")
    ax.spines[["top", "right"]].set_visible(False)
    ax.margins(y=0.15)
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(ROOT / "Images" / "live_view.png")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
