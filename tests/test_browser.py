"""The live view in a real browser: Chromium, driven by Playwright, against real JupyterLab and Notebook servers.

Where Notebook 6.5 is installed, as in Colab's set of versions, it takes the place of JupyterLab 4 and Notebook 7.
Screenshots are kept in tests/artefacts.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from importlib.util import find_spec

import nbformat
import pytest
from conftest import LIMIT, ROOT, needs, wait_until
from release import NOTEBOOK

from visual_callbacks import read_run

pytestmark = pytest.mark.browser
ARTEFACTS = ROOT / "tests" / "artefacts"
EPOCHS = 6
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"
SETUP = """
import keras, numpy as np, os, time
from visual_callbacks import AccLossPlotter, ConfusionMatrixPlotter, PredictionPlotter, ResumableCheckpoint, replay
keras.utils.set_random_seed(0)
names = "airplane automobile bird cat deer dog frog horse ship truck".split()
labels = np.arange(200) % 10
x = np.random.default_rng(0).random((200, 16, 16, 3)).astype("float32")
x = x / 2
x[np.arange(200), labels] += 0.5
y = np.eye(10)[labels]
model = keras.Sequential([keras.Input((16, 16, 3)), keras.layers.Flatten(), keras.layers.Dense(10, "softmax")])
model.compile(keras.optimizers.Adam(0.003), "categorical_crossentropy", metrics=["accuracy"])
def mine(epoch, logs):
    print("my own line", epoch + 1)
    time.sleep(float(open("pause.txt").read()))
    while os.path.exists(f"hold {epoch + 1}"):
        time.sleep(0.05)
"""
TRAIN = f"""
print("before training")
checkpoint = ResumableCheckpoint("run", verbose=0)
callbacks = [
    AccLossPlotter(verbose=0),
    ConfusionMatrixPlotter(x, y, names, title="Validation images"),
    PredictionPlotter(x[:8], y[:8], names, title="Eight validation images"),
    keras.callbacks.LambdaCallback(on_epoch_end=mine),
    checkpoint,
]
history = model.fit(x, y, epochs={EPOCHS}, initial_epoch=checkpoint.restore(model), validation_data=(x, y), verbose=0,
                    shuffle=False, callbacks=callbacks)
print("after training")
"""
# Of each front end: where the notebook is, what its server and its page are told, and where outputs are.
JUPYTER = {
    # The cells are there, and the kernel waits for them.
    "ready": "window.jupyterapp?.shell.currentWidget?.context?.isReady"
    " && window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'",
    "run": "window.jupyterapp.commands.execute('notebook:run-all-cells')",
    "restart": "window.jupyterapp.commands.execute('notebook:restart-run-all')",
    "confirm": ".jp-Dialog .jp-mod-accept",
    "save": "window.jupyterapp.commands.execute('docmanager:save')",
    "output": ".jp-OutputArea-output",
    "reopen": "{base}/lab/tree/live.ipynb",
    "loaded": "window.jupyterapp?.serviceManager !== undefined",
    "live": "window.jupyterapp.serviceManager.contents.getDownloadUrl('run/live.html')",
    "shut down": "window.jupyterapp.serviceManager.sessions.shutdownAll()",
}
OPEN = ["--IdentityProvider.token=", "--ServerApp.port_retries=0"]
FRONT_ENDS = {
    "lab": JUPYTER
    | {"url": "lab/tree/live.ipynb", "server": [*OPEN, "--LabApp.expose_app_in_browser=True"]},
    "notebook": JUPYTER
    | {
        "reopen": "{base}/notebooks/live.ipynb",
        "url": "notebooks/live.ipynb",
        "server": [*OPEN, "--JupyterNotebookApp.expose_app_in_browser=True"],
    },
    "notebook 6": {
        "url": "notebooks/live.ipynb",
        "server": ["--NotebookApp.token=", "--NotebookApp.port_retries=0"],
        "ready": "window.Jupyter?.notebook?._fully_loaded && window.Jupyter.notebook.kernel?.is_connected()",
        "run": "Jupyter.notebook.execute_all_cells()",
        "restart": "Jupyter.notebook.restart_run_all({confirm: false})",
        "save": "Jupyter.notebook.save_notebook()",
        "output": ".output_area",
        "reopen": "{base}/notebooks/live.ipynb",
        "loaded": "window.Jupyter?.notebook !== undefined",
        "live": "new URL('/files/run/live.html', location).href",
        "shut down": "new Promise(done => Jupyter.notebook.session.delete(done))",
    },
}
OLD = bool(find_spec("notebook") and find_spec("notebook.notebookapp"))
FIRST = "notebook 6" if OLD else "lab"
# What does not depend on the front end is looked at in one of them.
in_one_front_end = pytest.mark.parametrize("page", [FIRST], indirect=True)
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


@pytest.fixture(
    params=[FIRST] if OLD else [FIRST, pytest.param("notebook", marks=pytest.mark.slow)]
)
def page(request, browser, tmp_path):
    """A page with the notebook opened in a front end, its kernel ready."""
    shutil.copy(ROOT / "visual_callbacks.py", tmp_path)
    (tmp_path / "pause.txt").write_text("0.6")
    cells = [nbformat.v4.new_code_cell(source.strip()) for source in (SETUP, TRAIN)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "live.ipynb")
    front = FRONT_ENDS[request.param]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "jupyter",
        request.param.split()[0],
        "--no-browser",
        "--allow-root",
    ]
    command += [f"--port={port}", "--ip=127.0.0.1", *front["server"]]
    server = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        url = f"http://127.0.0.1:{port}/"
        wait_until(lambda: server.poll() is not None or answers(f"{url}api/status"))
        assert server.poll() is None, "the server ended"
        view = browser.new_context(viewport={"width": 1200, "height": 1500}).new_page()
        view.context.set_default_timeout(LIMIT * 1000)
        view.name, view.front = request.param.replace(" ", "_"), front
        view.goto(url + front["url"])
        view.wait_for_function(front["ready"])
        yield view
        view.context.close()
    finally:
        server.terminate()
        server.wait()


def answers(address):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with contextlib.suppress(OSError):
        return opener.open(address, timeout=5).status == 200


def command(page, name):
    page.evaluate("command => { new Function(command)(); }", page.front[name])


def text(page):
    every = "output => [...document.querySelectorAll(output)].map(e => e.innerText).join('\\n')"
    return page.evaluate(every, page.front["output"])


def wait_for_the_end(page):
    said = "output => [...document.querySelectorAll(output)].some(e => e.innerText.includes('after training'))"
    page.wait_for_function(said, arg=page.front["output"])
    # The last update of a picture travels apart from the text.
    page.wait_for_function("performance.now() - window.changed > 2000")
    return page.evaluate("window.seen")


def check(states):
    """One picture with all three in it, from the first on, never none, never moving what is below it."""
    first = next(i for i, state in enumerate(states) if len(state) == 1)
    assert {len(state) for state in states[first:]} == {1}
    heights = {state[0][0] for state in states[first:]} - {0}
    assert len(heights) == 1, heights
    pictures = {state[0][1] for state in states[first:]}
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
    expected = [
        "before training",
        *(f"my own line {epoch + 1}" for epoch in range(EPOCHS)),
        "after training",
    ]
    assert [line for line in text(page).splitlines() if line.strip()][-len(expected) :] == expected

    shutil.rmtree(tmp_path / "run")
    command(page, "restart")
    if "confirm" in page.front:
        page.wait_for_selector(page.front["confirm"]).click()
    gone = (
        "output => ![...document.querySelectorAll(output)].some(e => e.innerText.includes('after'))"
    )
    page.wait_for_function(gone, arg=page.front["output"])
    page.evaluate("window.seen.length = 0")
    check(wait_for_the_end(page))

    last = page.evaluate("window.seen[window.seen.length - 1].map(state => state[1])")
    command(page, "save")
    wait_until(lambda: saved_outputs(tmp_path / "live.ipynb").count("image/png") >= 1)
    page.reload()
    there = "output => document.querySelectorAll(output + ' img').length >= 1"
    page.wait_for_function(there, arg=page.front["output"])
    page.evaluate(WATCH, page.front["output"])
    page.evaluate("document.body.setAttribute('data-look', '1')")
    page.wait_for_function("window.seen.length > 0")
    page.screenshot(path=_artefact(f"{page.name}_reloaded.png"))
    assert [state[1] for state in page.evaluate("window.seen[0]")] == last
    assert "my own line 1" in text(page)


@pytest.mark.slow
@pytest.mark.skipif(OLD, reason="JupyterLab's screen is the smallest")
@pytest.mark.parametrize("page", ["lab"], indirect=True)
def test_the_whole_view_fits_one_screen(page, tmp_path):
    """JupyterLab at 1280 x 720 with the file browser open, light and dark: no picture has to be scrolled to."""
    page.set_viewport_size({"width": 1280, "height": 720})
    command(page, "run")
    page.wait_for_selector(".jp-DirListing", state="visible")  # the file browser
    wait_for_the_end_of_training(page)
    image = page.locator(".jp-OutputArea-output img").first
    image.evaluate("image => image.scrollIntoView({block: 'end'})")
    page.wait_for_timeout(500)
    box = image.bounding_box()
    panel = page.locator(".jp-WindowedPanel-outer").first.bounding_box()
    assert box["width"] > 750, box  # not shrunk until nobody can read it
    assert box["y"] >= panel["y"] - 1 and panel["y"] + panel["height"] <= 720, (box, panel)
    assert box["y"] + box["height"] <= panel["y"] + panel["height"] + 1, (box, panel)
    assert box["x"] + box["width"] <= 1280
    for theme in ("Light", "Dark"):
        page.evaluate(
            f"window.jupyterapp.commands.execute('apputils:change-theme', {{theme: 'JupyterLab {theme}'}})"
        )
        page.wait_for_timeout(1500)
        page.screenshot(path=_artefact(f"one_screen_{theme.lower()}.png"))


def wait_for_the_end_of_training(page):
    said = "output => [...document.querySelectorAll(output)].some(e => e.innerText.includes('after training'))"
    page.wait_for_function(said, arg=page.front["output"])
    page.wait_for_timeout(1000)


@pytest.mark.slow
@in_one_front_end
def test_after_a_reload_live_html_shows_the_epoch_that_runs(page, tmp_path):
    """The page of the notebook is reloaded while it trains: what it would have shown is lost, the training is not."""
    (tmp_path / "pause.txt").write_text("0")
    holds = [tmp_path / f"hold {epoch}" for epoch in range(2, EPOCHS + 1)]
    for hold in holds:
        hold.touch()  # the training waits at the end of these epochs
    command(page, "run")
    wait_until(lambda: epochs_trained(tmp_path) == 1)
    page.reload()
    page.wait_for_function(page.front["loaded"])
    live = page.context.new_page()
    live.goto(page.evaluate(page.front["live"]))  # as "Open in New Browser Tab" does
    last = ""

    def is_shown_anew():
        picture = picture_in(tmp_path)
        with contextlib.suppress(Exception):  # while the page reads itself anew
            shown = live.locator("img").get_attribute("src", timeout=1000)
            return picture != last and shown.endswith(picture)

    for hold in holds:
        wait_until(is_shown_anew)
        last = picture_in(tmp_path)
        hold.unlink()
    live.screenshot(path=_artefact(f"{page.name}_live_html.png"))
    wait_until(lambda: read_run(tmp_path / "run")["finished"])
    wait_until(lambda: picture_in(tmp_path) in (live.locator("img").get_attribute("src") or ""))
    live.close()
    # The same training, undisturbed, in a process of its own.
    program = SETUP + TRAIN.replace('"run"', '"undisturbed"')
    (tmp_path / "pause.txt").write_text("0")
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True)
    saved = [
        (tmp_path / folder / "saved_model.hdf5").read_bytes() for folder in ("run", "undisturbed")
    ]
    assert saved[0] == saved[1]


def picture_in(folder):
    """The picture that live.html shows, as Base64."""
    (picture,) = re.findall('base64,([^"]+)', (folder / "run" / "live.html").read_text())
    return picture


def epochs_trained(folder):
    """How many epochs the training's file holds; 0 while there is none that can be read."""
    try:
        return read_run(folder / "run")["epochs"]
    except (OSError, ValueError):
        return 0


@pytest.mark.slow
def test_the_replay_needs_no_kernel(browser, tmp_path):
    """In a page from a file, and in a saved notebook that is opened without a kernel: the slider shows its epoch."""
    program = SETUP + TRAIN + 'print(replay("run").path)'
    (tmp_path / "pause.txt").write_text("0")
    subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        env=with_module(),
    )
    page = browser.new_page(viewport={"width": 960, "height": 720})
    page.goto((tmp_path / "run" / "replay.html").as_uri())
    check_the_slider(page)
    page.screenshot(path=_artefact("replay.png"))
    page.close()


def with_module():
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def check_the_slider(page):
    """`page` is a page or a frame that holds a replay."""

    def shown():
        images = page.eval_on_selector_all(
            "#others img", "images => images.map(image => image.src)"
        )
        line = page.eval_on_selector("#curves div", "line => line.style.left")
        return page.inner_text("#where"), page.inner_text("#logged"), tuple(images), line

    slider = page.locator("#epoch")
    states = []
    for epoch in range(EPOCHS):
        slider.evaluate(f"slider => {{ slider.value = {epoch}; slider.oninput(); }}")
        states.append(shown())
        assert states[-1][0] == f"epoch {epoch + 1} of {EPOCHS}"
        assert page.evaluate(
            "[...document.querySelectorAll('#others img')].every(i => i.src.startsWith('data:'))"
        )
    assert len({state[2] for state in states}) == len({state[3] for state in states}) == EPOCHS
    assert len({state[1] for state in states}) == EPOCHS
    away = page.evaluate("""() => {
      const image = document.querySelector('#curves img').getBoundingClientRect();
      return [...document.querySelectorAll('#curves div')].map((line, number) => {
        const [left, step] = data.lines[number];
        const epoch = data.epochs[data.epochs.length - 1];
        return line.getBoundingClientRect().x - image.x - image.width * (left + step * epoch);
      });
    }""")
    assert all(abs(pixels) < 1 for pixels in away)  # each line stands at its epoch in the picture
    slider.press("ArrowLeft")
    assert shown() == states[-2]
    slider.press("Home")
    page.locator("#logged").click()
    page.locator("#play").click()  # from the first epoch to the last
    page.wait_for_function(
        f"document.getElementById('where').textContent === 'epoch {EPOCHS} of {EPOCHS}'"
    )
    assert shown() == states[-1]
    assert page.inner_text("#play") == "Play"


@pytest.mark.slow
@in_one_front_end
def test_a_replay_in_a_notebook_without_a_kernel(page, tmp_path):
    """The notebook is run and saved; opened anew, with its kernel shut down, the slider still moves."""
    notebook = nbformat.read(tmp_path / "live.ipynb", as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell('replay("run")'))
    nbformat.write(notebook, tmp_path / "live.ipynb")
    page.reload()
    page.wait_for_function(page.front["ready"])
    command(page, "run")
    frame = "output => document.querySelectorAll(output + ' iframe').length >= 1"
    page.wait_for_function(frame, arg=page.front["output"])
    command(page, "save")
    wait_until(lambda: "srcdoc" in saved_outputs(tmp_path / "live.ipynb"))
    base = page.url.split("/lab")[0].split("/notebooks")[0]
    page.evaluate(page.front["shut down"])
    page.goto("about:blank")
    page.goto(page.front["reopen"].format(base=base))
    page.wait_for_function(frame, arg=page.front["output"])
    inside = page.wait_for_selector(page.front["output"] + " iframe").content_frame()
    inside.wait_for_selector("#where")
    check_the_slider(inside)
    page.screenshot(path=_artefact(f"{page.name}_replay.png"))


@pytest.mark.slow
def test_the_first_minutes_are_quiet(page, tmp_path):
    """The course's own first cells, on a machine without a GPU: nothing in red, and the device is named."""
    course = nbformat.read(NOTEBOOK, as_version=4)
    (last,) = [i for i, cell in enumerate(course.cells) if "enable_op_determinism" in cell.source]
    course.cells = course.cells[: last + 1]
    for cell in course.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    nbformat.write(course, tmp_path / "live.ipynb")
    page.reload()
    page.wait_for_function(page.front["ready"])
    command(page, "run")
    wait_until(lambda: "Training on" in text(page) or "Error" in text(page))
    page.wait_for_function(page.front["ready"])  # the kernel is idle: nothing more will come
    page.screenshot(path=_artefact(f"{page.name}_first_cells.png"))
    assert "Training on /device:CPU:0 with tensorflow" in text(page)
    red = "[data-mime-type='application/vnd.jupyter.stderr'], .output_stderr"
    assert [element.inner_text() for element in page.query_selector_all(red)] == []


def _artefact(name):
    ARTEFACTS.mkdir(exist_ok=True)
    return str(ARTEFACTS / name)
