"""The plotters in a real Jupyter kernel, without a browser: what the saved notebook holds."""

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = [pytest.mark.colab, pytest.mark.xdist_group("one kernel")]
SETUP = """
import keras, numpy as np
from visual_callbacks import AccLossPlotter, ConfusionMatrixPlotter
x, y = np.random.default_rng(0).normal(size=(30, 4)).astype("float32"), np.eye(3)[np.arange(30) % 3]
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="softmax")])
model.compile("sgd", "categorical_crossentropy", metrics=["accuracy", keras.metrics.OneHotMeanIoU(3)])
def fit(epochs, *callbacks):
    if isinstance(callbacks[0], keras.callbacks.CallbackList):
        (callbacks,) = callbacks
    model.fit(x, y, batch_size=30, epochs=epochs, verbose=0, validation_data=(x, y), callbacks=callbacks)
def plotters(verbose=0):
    return AccLossPlotter(verbose=verbose), ConfusionMatrixPlotter(x, y, ["ant", "bee", "cow"])
"""


STOPPED = """
def stop(epoch, logs):
    if epoch == 1:
        raise KeyboardInterrupt
stopped = plotters()
fit(4, *stopped, keras.callbacks.LambdaCallback(on_epoch_begin=stop))
"""


def execute(*sources):
    cells = [nbformat.v4.new_code_cell(source) for source in (SETUP, *sources)]
    for cell in cells:
        cell.metadata.tags = ["raises-exception"] if cell.source == STOPPED else []
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    return notebook


def images(cell):
    return [
        output["data"]["image/png"]
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]


@pytest.fixture(scope="module")
def notebook():
    """One kernel: six epochs, thirty, each plotter alone, the same ones again, the user's own output between."""
    return execute(
        "fit(6, *plotters())",
        "fit(30, *plotters())",
        "print('mine'); fit(2, plotters(verbose=1)[0]); print('mine too')",
        "fit(2, plotters()[1])",
        "both = plotters(); fit(2, *both)",
        "fit(3, *both)",
        "fit(2, *both); fit(2, *both)",
        "import matplotlib.pyplot as plt; print(plt.get_fignums())",
        STOPPED,
        "print(stopped[0].figure.texts[0].get_text())",
        "fit(1, *stopped); print(stopped[0].figure.texts[0].get_text())",
        "own = keras.callbacks.CallbackList(plotters(), model=model); fit(2, own)",
        "fit(2, own)",
        "from visual_callbacks import plot_history; plot_history({'loss': [2, 1]}, ['loss'])",
    )


def check_one_picture(few, many):
    assert len(images(few)) == len(images(many)) == 1 == len(many.outputs)
    size = [sum(len(output) for output in images(cell)) for cell in (few, many)]
    assert size[1] - size[0] < 100_000


def test_many_epochs_are_saved_as_one_picture(notebook):
    check_one_picture(notebook.cells[1], notebook.cells[2])


def test_a_picture_has_its_size_in_pixels(notebook):
    for output in notebook.cells[2].outputs:
        assert (
            output.metadata["image/png"]["width"] > 400
            and output.metadata["image/png"]["height"] > 300
        )


def test_the_users_own_output_stays(notebook):
    text = "".join(
        output.text for output in notebook.cells[3].outputs if output.output_type == "stream"
    )
    lines = text.splitlines()
    assert (
        lines[0] == "mine"
        and lines[-1] == "mine too"
        and [line.split()[1] for line in lines[1:-1]] == ["1/2", "2/2"]
    )
    assert len(images(notebook.cells[3])) == len(images(notebook.cells[4])) == 1


def test_plotters_used_again_show_in_the_new_cell_and_leave_the_old_one_alone(notebook):
    first, again = notebook.cells[5], notebook.cells[6]
    assert len(images(first)) == len(images(again)) == 1
    assert images(first)[0] != images(again)[0]
    assert len(images(notebook.cells[7])) == 1  # two trainings in one cell: still one picture


def test_a_callback_list_used_again_shows_in_the_new_cell(notebook):
    first, again = notebook.cells[12], notebook.cells[13]
    assert len(images(first)) == len(images(again)) == 1
    assert images(first)[0] != images(again)[0]


def test_a_figure_is_shown_without_pyplot(notebook):
    assert len(images(notebook.cells[14])) == 1


def test_no_pyplot_figure_is_open(notebook):
    assert notebook.cells[8].outputs[0].text.strip() == "[]"


def test_after_a_stop_the_picture_says_in_which_epoch(notebook):
    raised = [output.get("ename") for output in notebook.cells[9].outputs]
    assert "KeyboardInterrupt" in raised and len(images(notebook.cells[9])) == 1
    assert notebook.cells[10].outputs[0].text.startswith("stopped in epoch 2/4 ")
    # The next training is not called stopped.
    assert notebook.cells[11].outputs[-1].text.startswith("1 epoch in ")
