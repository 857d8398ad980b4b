"""Runs the notebook and renews by it what is committed: what `make release` does.

    CIFAR10_NPZ=cifar10.npz python scripts/release.py [REPOSITORY=OWNER/NAME]
    CIFAR10_NPZ=cifar10.npz python scripts/release.py PRESET=full [PRECISION=mixed_bfloat16]

A run of the default preset gives the notebook's outputs and the figures (with REPOSITORY, after the address was written
into the badge and the first cell); one of the `full` preset gives the shipped weights, by ship.py. The tests import
`code_digest` from here, to notice a code cell edited since.
"""

import base64
import hashlib
import io
import os
import re
import shutil
import sys
import sysconfig

import nbformat
from PIL import Image
from run_notebook import NOTEBOOK, ROOT, RUNS, execute, read_knobs

# Where this machine keeps the libraries (with their example photographs): of no interest to a reader.
LIBRARIES = sysconfig.get_path("purelib") + os.sep
MOST_EXACT = 150_000  # characters of Base64, up to which a picture keeps all its colours
# Of a cell's metadata: its tags, and whether it is folded in Jupyter and in Colab.
KEPT = ("tags", "jupyter", "cellView")
FIGURES = (
    "sample.png",
    "loss.png",
    "confusion_matrix.png",
    "results.png",
    "filters.png",
    "training.gif",
)


def code_digest(notebook):
    """SHA-256 of all code cells, to tell whether one was edited after the outputs were made."""
    sources = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(sources.encode()).hexdigest()


def with_badge_to(text, repository):
    """The text of a first page with a badge below its title: it opens this repository's notebook in Colab."""
    address = f"https://colab.research.google.com/github/{repository}/blob/main/{NOTEBOOK.name}"
    badge = (
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({address})"
    )
    title, rest = text.split("\n\n", 1)
    if rest.startswith("[![Open in Colab]"):
        rest = rest.split("\n\n", 1)[1]
    return f"{title}\n\n{badge}\n\n{rest}"


def set_repository(notebook, repository):
    """Writes the repository's address, owner/name on GitHub, into a badge and into the cell that needs it."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        sys.exit(f"REPOSITORY: expected owner/name, got {repository!r}")
    first_page, first_code = notebook.cells[:2]
    first_page.source = with_badge_to(first_page.source, repository)
    first_code.source = re.sub(
        r'repository = "[^"]*"', f'repository = "{repository}"', first_code.source
    )


def printed(notebook):
    """All text that the notebook's cells printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(output.text for output in outputs if output.output_type == "stream")


def packed(png):
    """The picture, in Base64 as it came, with the compression that takes longest; a large one in 256 colours."""
    buffer, picture = io.BytesIO(), Image.open(io.BytesIO(base64.b64decode(png)))
    # Nothing in it is transparent.
    if picture.mode == "RGBA" and picture.getextrema()[3] == (255, 255):
        picture = picture.convert("RGB")
    if len(png) > MOST_EXACT:
        picture = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    picture.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def clean(notebook):
    """Drops what the runner and the machine left behind (metadata, start-up lines, folders); packs the pictures."""
    for cell in notebook.cells:
        kept = {key: cell.metadata[key] for key in KEPT if cell.metadata.get(key)}
        cell.metadata = nbformat.from_dict(kept)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "text" in output:
                    output.text = output.text.replace(LIBRARIES, "")
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = packed(output.data["image/png"])
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "code_digest": code_digest(notebook),
        }
    )


def check(knobs, repository):
    """Ends the program where these knobs make no release, before anything is trained."""
    names = " ".join(f"{name}={value}" for name, value in knobs.items())
    if not os.environ.get("CIFAR10_NPZ"):
        sys.exit("CIFAR10_NPZ: set it to the array file of the real data.")
    if knobs.get("PRESET") == "full":
        if repository or set(knobs) - {"PRESET", "PRECISION"}:
            sys.exit(f"Weights are shipped with no other knobs than PRESET and PRECISION: {names}")
    elif knobs:
        sys.exit(f"The committed notebook shows a run without knobs: {names}")
    elif runs := list(RUNS.glob("*/saved_model.hdf5")):
        reason = "the notebook lists all runs, and shows a training from its beginning"
        sys.exit(f"{runs[0].parent} is there, but {reason}. Move it away.")


def set_address(repository):
    """Writes the repository's address, owner/name on GitHub, into the notebook and the first page."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    set_repository(notebook, repository)
    nbformat.write(notebook, NOTEBOOK)
    readme = ROOT / "README.md"
    readme.write_text(with_badge_to(readme.read_text(), repository))


def renew_notebook(executed):
    """Takes the outputs and figures of an executed notebook; texts may have been edited since it began."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    run = nbformat.read(executed, as_version=4)
    if "STAND-IN" in printed(run):
        sys.exit("This run used the stand-in; a release shows real data. Set CIFAR10_NPZ.")
    if code_digest(run) != code_digest(notebook):
        sys.exit(f"The notebook's code was edited while {executed} ran. Run it again.")
    new = {cell.id: cell for cell in run.cells}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = new[cell.id].outputs
            cell.execution_count = new[cell.id].execution_count
    clean(notebook)
    (ROOT / "Images").mkdir(exist_ok=True)
    for name in FIGURES:
        shutil.copy(executed.parent / name, ROOT / "Images" / name)
    nbformat.write(notebook, NOTEBOOK)
    print(f"Renewed {NOTEBOOK.name} and Images/ from {executed.parent}")


def main(arguments):
    repository = ""
    for argument in arguments:
        if argument.startswith("REPOSITORY="):
            repository = argument.partition("=")[2]
            arguments = [other for other in arguments if other != argument]
    os.chdir(ROOT)
    knobs = read_knobs(arguments)
    check(knobs, repository)
    if repository:
        set_address(repository)
    executed, problem = execute(knobs)
    if problem:
        sys.exit(problem)
    if knobs:
        import ship  # with Keras, which takes seconds

        ship.main(executed.parent / "best_model.hdf5")
    else:
        renew_notebook(executed)


if __name__ == "__main__":
    main(sys.argv[1:])
