"""Runs the notebook without a person, and keeps it with its outputs: what `make run` does.

    python scripts/run_notebook.py [KNOB=VALUE ...]

The knobs are those of the notebook's cell of parameters. What its cells print appears here as well. The executed
notebook is kept in the run's own folder under a name of its own, so that none is ever overwritten.
"""

import logging
import re
import sys
import time
from pathlib import Path

import papermill
import yaml

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "CIFAR_10_Classification.ipynb"
RUNS = Path("models", "runs")


def read_knobs(arguments):
    """The knobs as a dict; ends the program where one is unknown."""
    known = [name for name in papermill.inspect_notebook(str(NOTEBOOK)) if name.isupper()]
    knobs = {}
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in known:
            sys.exit(f"{name} is not a knob of the notebook. The knobs are: {' '.join(known)}")
        knobs[name] = yaml.safe_load(value)
    return knobs


def new_path():
    """Where the notebook is kept while it runs, named after this second."""
    while True:
        path = RUNS / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}.ipynb"
        try:
            path.touch(exist_ok=False)
            return path
        except FileExistsError:  # another run began in this second
            time.sleep(1)


def into_its_folder(executed):
    """Moves an executed notebook into the folder of its run, if it came so far as to name one; returns its place."""
    named = re.search(r"This run is kept in (models[^\"\\]*)", executed.read_text(encoding="utf-8"))
    return executed.replace(Path(named[1], executed.name)) if named else executed


def main(arguments):
    knobs = read_knobs(arguments)
    RUNS.mkdir(parents=True, exist_ok=True)
    executed = new_path()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = {"kernel_name": "python3", "progress_bar": False, "log_output": True}
    problem = None
    try:
        papermill.execute_notebook(str(NOTEBOOK), str(executed), knobs, **options)
    except papermill.PapermillExecutionError as error:
        problem = str(error)
    except KeyboardInterrupt:
        problem = "Stopped. Run the same command again to continue."
    executed = into_its_folder(executed)
    for line in re.findall(r"(?:This run is kept in models|Test accuracy[a-z ]*: [01])[^\"\\]*", executed.read_text()):
        print(line)
    print(f"Executed notebook: {executed}")
    sys.exit(problem)


if __name__ == "__main__":
    main(sys.argv[1:])
