"""Runs the notebook without a person, and keeps it with its outputs: what `make run` does.

    python scripts/run_notebook.py [KNOB=VALUE ...]

The knobs are those of the notebook's cell of parameters. What the cells tagged `report` print appears here as well.
The executed notebook is kept in the run's own folder under a name of its own, so that none is ever overwritten.
"""

import logging
import re
import sys
import time
from pathlib import Path

import nbformat
import papermill
import yaml
from nbclient.exceptions import DeadKernelError

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "CIFAR_10_Classification.ipynb"
RUNS = Path("models", "runs")
AGAIN = "Run the same command again to continue."
STOPPED = f"Stopped. {AGAIN}"


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


class OnlyReports(logging.Filter):
    """Of all that papermill logs, leaves what cells tagged `report` print, and warnings."""

    def __init__(self, has_knobs):
        super().__init__()
        self.tags = []
        for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
            self.tags.append(cell.metadata.get("tags", []))
            if has_knobs and "parameters" in self.tags[-1]:
                self.tags.append([])  # the cell in which papermill sets the knobs
        self.is_report = False

    def filter(self, record):
        text = record.getMessage()
        begun = re.match(r"Executing Cell (\d+)-", text)
        if begun:
            self.is_report = "report" in self.tags[int(begun[1]) - 1]
        is_note = re.match(
            r"Executing |Ending Cell|Input Notebook|Output Notebook|<_?Figure |<.* object>", text
        )
        is_printed = self.is_report and text.strip() and not is_note
        return bool(is_printed) or record.levelno >= logging.WARNING


def execute(knobs):
    """Runs the notebook with these knobs; returns where it is kept, and what has ended it early (or None)."""
    RUNS.mkdir(parents=True, exist_ok=True)
    executed = new_path()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    only_reports = OnlyReports(bool(knobs))
    for handler in logging.getLogger().handlers:
        handler.addFilter(only_reports)
        handler.terminator = ""  # what cells print ends its lines itself
    options = {"kernel_name": "python3", "progress_bar": False, "log_output": True}
    problem = None
    try:
        papermill.execute_notebook(str(NOTEBOOK), str(executed), knobs, **options)
    except papermill.PapermillExecutionError as error:
        problem = STOPPED if error.ename == "KeyboardInterrupt" else str(error)
    except KeyboardInterrupt:
        problem = STOPPED
    except DeadKernelError:
        problem = f"The kernel died, perhaps as the memory was full. {AGAIN}"
    executed = into_its_folder(executed)
    result = r"(?:Validation accuracy|Test accuracy[a-z ]*): [01][^\"\\]*"
    text = executed.read_text(encoding="utf-8")
    for line in dict.fromkeys(re.findall(result, text)):
        print(line)
    print(f"Executed notebook: {executed}")
    return executed, problem


if __name__ == "__main__":
    _, problem = execute(read_knobs(sys.argv[1:]))
    sys.exit(problem)
