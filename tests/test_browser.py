"""The live view in a real browser: Chromium, driven by Playwright, against real JupyterLab and Notebook servers.

Where Notebook 6.5 is installed, as in Colab's set of versions, it takes the place of JupyterLab 4 and Notebook 7.
Screenshots are kept in tests/artefacts.
"""

import json
import shutil
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec

import nbformat
import pytest
from conftest import ROOT, needs, wait_until

pytestmark = pytest.mark.browser
ARTEFACTS = ROOT / "tests" / "artefacts"
EPOCHS = 6
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"
SETUP = """
import keras, numpy as np, time
from visual_callbacks import AccLossPlotter, ConfusionMatrixPlotter
keras.utils.set_random_seed(0)
labels = np.arange(90) % 3
x, y = np.random.normal(size=(90, 8)) + 2 * np.eye(3, 8)[labels], np.eye(3)[labels]
model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3, activation="softmax")])
model.compile(keras.optimizers.Adam(0.03), "categorical_crossentropy", metrics=["accuracy"])
def mine(epoch, logs):
    print("my own line", epoch + 1)
    time.sleep(0.6)
"""
TRAIN = f"""
print("before training")
callbacks = [AccLossPlotter(verbose=0), ConfusionMatrixPlotter(x, y, ["ant", "bee", "cow"])]
callbacks.append(keras.callbacks.LambdaCallback(on_epoch_end=mine))
model.fit(x, y, epochs={EPOCHS}, validation_data=(x, y), verbose=0, callbacks=callbacks)
print("after training")
"""
# Of each front end: where the notebook is, what its server and its page are told, and where outputs are.
JUPYTER = {
    "ready": "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'",
    "run": "window.jupyterapp.commands.execute('notebook:run-all-cells')",
    "restart": "window.jupyterapp.commands.execute('notebook:restart-run-all')",
    "confirm": ".jp-Dialog .jp-mod-accept",
    "save": "window.jupyterapp.commands.execute('docmanager:save')",
    "output": ".jp-OutputArea-output",
}
OPEN = ["--IdentityProvider.token=", "--ServerApp.port_retries=0"]
FRONT_ENDS = {
    "lab": JUPYTER | {"url": "lab/tree/live.ipynb", "server": [*OPEN, "--LabApp.expose_app_in_browser=True"]},
    "notebook": JUPYTER
    | {"url": "notebooks/live.ipynb", "server": [*OPEN, "--JupyterNotebookApp.expose_app_in_browser=True"]},
    "notebook 6": {
        "url": "notebooks/live.ipynb",
        "server": ["--NotebookApp.token=", "--NotebookApp.port_retries=0"],
        "ready": "window.Jupyter?.notebook?._fully_loaded && window.Jupyter.notebook.kernel?.is_connected()",
        "run": "Jupyter.notebook.execute_all_cells()",
        "restart": "Jupyter.notebook.restart_run_all({confirm: false})",
        "save": "Jupyter.notebook.save_notebook()",
        "output": ".output_area",
    },
}
OLD = bool(find_spec("notebook") and find_spec("notebook.notebookapp"))
# Notes each state of the pictures, at every change of the page: how many there are, how high, and which.
WATCH = """output => {
  const outputs = () => [...document.querySelectorAll(output + ' img')];
  window.seen = [];
  const note = () => {
    const images = outputs();
    const look = i => [Math.round(i.getBoundingClientRect().height), i.src.length + ':' + i.src.slice(-400)];
    const state = images.map(look);
    const last = window.seen[window.seen.length - 1];
    if (!last || JSON.stringify(last) !== JSON.stringify(state)) {
      window.seen.push(state);
      window.changed = performance.now();
    }
  };
  new MutationObserver(note).observe(document.body, {childList: true, subtree: true, attributes: true});
}"""


@pytest.fixture(scope="module")
def browser():
    needs(CHROMIUM, "Chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield chromium
        chromium.close()


@pytest.fixture(params=["notebook 6"] if OLD else ["lab", pytest.param("notebook", marks=pytest.mark.slow)])
def page(request, browser, tmp_path):
    """A page with the notebook opened in a front end, its kernel ready."""
    shutil.copy(ROOT / "visual_callbacks.py", tmp_path)
    cells = [nbformat.v4.new_code_cell(SETUP.strip()), nbformat.v4.new_code_cell(TRAIN.strip())]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "live.ipynb")
    front, port = FRONT_ENDS[request.param], 18888 + list(FRONT_ENDS).index(request.param)
    command = [sys.executable, "-m", "jupyter", request.param.split()[0], "--no-browser", "--allow-root"]
    command += [f"--port={port}", "--ip=127.0.0.1", *front["server"]]
    server = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}/"
        for _ in range(480):  # a busy machine takes its time
            try:
                urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url + "api/status", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        view = browser.new_page(viewport={"width": 1200, "height": 1500})
        view.name, view.front = request.param.replace(" ", "_"), front
        view.goto(url + front["url"])
        view.wait_for_function(front["ready"], timeout=120_000)
        yield view
        view.close()
    finally:
        server.terminate()
        server.wait()


def command(page, name):
    page.evaluate("command => { new Function(command)(); }", page.front[name])


def text(page):
    every = "output => [...document.querySelectorAll(output)].map(e => e.innerText).join('\\n')"
    return page.evaluate(every, page.front["output"])


def wait_for_the_end(page):
    said = "output => [...document.querySelectorAll(output)].some(e => e.innerText.includes('after training'))"
    page.wait_for_function(said, arg=page.front["output"], timeout=180_000)
    # The last update of a picture travels apart from the text.
    page.wait_for_function("performance.now() - window.changed > 2000", timeout=60_000)
    return page.evaluate("window.seen")


def check(states):
    """One picture a plotter from the moment both are there, never none, never moving what is below them."""
    both = next(i for i, state in enumerate(states) if len(state) == 2)
    assert {len(state) for state in states[both:]} == {2}
    for plotter in (0, 1):
        heights = {state[plotter][0] for state in states[both:]} - {0}
        assert len(heights) == 1, heights
        pictures = {state[plotter][1] for state in states[both:]}
        assert len(pictures) >= EPOCHS, len(pictures)  # the pixels change with every epoch


def saved_outputs(path):
    """What the notebook's file holds as outputs, as text; nothing while it is being written."""
    try:
        return json.dumps(nbformat.read(path, as_version=4).cells[-1].outputs)
    except (ValueError, nbformat.reader.NotJSONError):
        return ""


def test_the_live_view(page, tmp_path):
    page.evaluate(WATCH, page.front["output"])
    command(page, "run")
    states = wait_for_the_end(page)
    page.screenshot(path=_artefact(f"{page.name}_trained.png"))
    check(states)
    expected = ["before training", *(f"my own line {epoch + 1}" for epoch in range(EPOCHS)), "after training"]
    assert [line for line in text(page).splitlines() if line.strip()][-len(expected) :] == expected

    command(page, "restart")
    if "confirm" in page.front:
        page.wait_for_selector(page.front["confirm"]).click()
    gone = "output => ![...document.querySelectorAll(output)].some(e => e.innerText.includes('after'))"
    page.wait_for_function(gone, arg=page.front["output"])
    page.evaluate("window.seen.length = 0")
    check(wait_for_the_end(page))

    last = page.evaluate("window.seen[window.seen.length - 1].map(state => state[1])")
    command(page, "save")
    wait_until(lambda: saved_outputs(tmp_path / "live.ipynb").count("image/png") >= 2)
    page.reload()
    both = "output => document.querySelectorAll(output + ' img').length >= 2"
    page.wait_for_function(both, arg=page.front["output"], timeout=60_000)
    page.evaluate(WATCH, page.front["output"])
    page.evaluate("document.body.setAttribute('data-look', '1')")
    page.wait_for_function("window.seen.length > 0")
    page.screenshot(path=_artefact(f"{page.name}_reloaded.png"))
    assert [state[1] for state in page.evaluate("window.seen[0]")] == last
    assert "my own line 1" in text(page)


def _artefact(name):
    ARTEFACTS.mkdir(exist_ok=True)
    return str(ARTEFACTS / name)
