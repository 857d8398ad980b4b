"""Time, memory and notebook size of the live view, ours beside livelossplot 0.6.1 and the plain recipe.

    python benchmarks/live_view.py          needs livelossplot==0.6.1, nbclient; prints tables, draws live_view.png

All are driven by the same ready-made logs, in one real Jupyter kernel each cell after the other. Then ours alone for
2,000 epochs. A redraw is timed from the call until the picture is handed to the kernel's messaging.
"""

import json
import statistics
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
COMMON = f"""
import json, os, statistics, sys, time
sys.path.insert(0, {str(ROOT)!r})
import matplotlib.pyplot as plt, numpy as np
from IPython.display import clear_output
from visual_callbacks import AccLossPlotter

def logs(epoch):
    rng, x = np.random.default_rng(epoch), 1 / (1 + epoch / 20)
    return {{"loss": 2 * x + rng.random() / 20, "val_loss": 2.1 * x + rng.random() / 10,
            "accuracy": 1 - x * 0.9 - rng.random() / 40, "val_accuracy": 0.95 - x * 0.85 - rng.random() / 20}}

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

class Model:  # what a plotter asks of a model
    optimizer = None

def ours(epochs):
    plotter = AccLossPlotter(verbose=0)
    plotter.set_params({{"epochs": epochs, "steps": None}})
    plotter.set_model(model := Model())
    plotter.on_train_begin()
    def redraw(epoch):
        plotter.on_epoch_begin(epoch)
        plotter.on_epoch_end(epoch, logs(epoch))
    redraw.keep = model
    return redraw

def livelossplot(epochs):
    from livelossplot import PlotLosses
    from livelossplot.outputs import MatplotlibPlot
    groups = {{"accuracy": ["accuracy", "val_accuracy"], "loss": ["loss", "val_loss"]}}
    plot = PlotLosses(groups=groups, outputs=[MatplotlibPlot()])
    def redraw(epoch):
        plot.update(logs(epoch))
        plot.send()
    return redraw

def recipe(epochs):
    history = {{name: [] for name in logs(0)}}
    def redraw(epoch):
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
    return redraw

def measure(make, epochs):
    redraw, times, memory = make(epochs), [], []
    for epoch in range(epochs):
        began = time.perf_counter()
        redraw(epoch)
        times.append(time.perf_counter() - began)
        memory.append(resident())
    around = lambda n: statistics.median(times[max(0, n - 9) : n]) * 1000
    marks = [n for n in (10, 20, 50, 100, 600, 2000) if n <= epochs]
    print("RESULT" + json.dumps({{"ms": {{n: around(n) for n in marks}}, "growth": memory[-1] - memory[49],
                                 "figures": len(plt.get_fignums())}}), file=sys.stderr)
"""


def execute(name, epochs):
    """A notebook that runs one method; returns its result and the size of what was saved, in kB."""
    sizes, result = {}, None
    for count in (6, epochs):
        cells = [nbformat.v4.new_code_cell(COMMON), nbformat.v4.new_code_cell(f"measure({name}, {max(count, 60)})")]
        if count == 6:
            cells[1].source = f"redraw = {name}(6)\nfor epoch in range(6): redraw(epoch)"
        notebook = nbformat.v4.new_notebook(cells=cells)
        NotebookClient(notebook, timeout=None, kernel_name="python3").execute()
        for output in notebook.cells[1].outputs:
            if output.get("name") == "stderr" and "RESULT" in output.text:
                result = json.loads(output.text.split("RESULT")[1].splitlines()[0])
        sizes[count] = len(nbformat.writes(notebook)) / 1000
    return result, sizes


def together(epochs=600):
    """All methods in one kernel, each in a cell of its own."""
    names = ["ours", "livelossplot", "recipe"]
    cells = [nbformat.v4.new_code_cell(COMMON)]
    cells += [nbformat.v4.new_code_cell(f"measure({name}, {epochs})") for name in names]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=None, kernel_name="python3").execute()
    found = {}
    for name, cell in zip(names, notebook.cells[1:]):
        text = "".join(output.text for output in cell.outputs if output.get("name") == "stderr")
        found[name] = json.loads(text.split("RESULT")[1].splitlines()[0])
        found[name]["kB"] = len(json.dumps(cell)) / 1000
    return found


def main():
    found = together()
    reference = found["livelossplot"]["ms"]
    print(
        "| 600 epochs | ms at 10 | at 100 | at 600 | of livelossplot's | MB grown | saved output, kB | open figures |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, result in found.items():
        ms = [result["ms"][n] for n in ("10", "100", "600")]
        share = statistics.median(result["ms"][n] / reference[n] for n in ("10", "100", "600"))
        cells = [*(f"{value:.0f}" for value in ms), f"{share:.2f}", f"{result['growth']:.1f}", f"{result['kB']:.0f}"]
        print(f"| {name} |", " | ".join([*cells, str(result["figures"])]), "|")
    result, sizes = execute("ours", 2000)
    ratio = result["ms"]["2000"] / result["ms"]["20"]
    grown, figures, larger = result["growth"], result["figures"], sizes[2000] - sizes[6]
    print(f"\nours, 2,000 epochs: {grown:.1f} MB grown after the first 50; {figures} pyplot figures open;")
    print(f"a redraw at the end takes {ratio:.2f} times one at epoch 20; the saved notebook is {larger:.0f} kB larger.")
    draw(found)


def draw(found):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.6), layout="constrained")
    ax = figure.add_subplot()
    labels = {
        "ours": "AccLossPlotter",
        "livelossplot": "livelossplot 0.6.1",
        "recipe": "clear_output, plt.plot, plt.show",
    }
    for index, (name, colour) in enumerate(zip(found, ("#0072B2", "#E69F00", "#999999"))):
        values = [found[name]["ms"][n] for n in ("10", "100", "600")]
        bars = ax.bar([x + 0.27 * (index - 1) for x in range(3)], values, 0.25, color=colour, label=labels[name])
        ax.bar_label(bars, fmt="%.0f", fontsize=8)
    ax.set_xticks(range(3), ["10 epochs", "100 epochs", "600 epochs"])
    ax.set(ylabel="ms a redraw", title="Time of one redraw, same logs, same kernel")
    ax.margins(y=0.15)
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(ROOT / "Images" / "live_view.png", dpi=100)


if __name__ == "__main__":
    sys.exit(main())
