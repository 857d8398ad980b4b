"""Renews what is committed from an executed run; `make release` and `make release PRESET=full` call it.

    python scripts/release.py EXECUTED.ipynb
    python scripts/release.py --repository OWNER/NAME     writes the address into badge and first cell, before a run

A run of the default preset gives the notebook's outputs and the figures; one of the `full` preset the shipped weights
(by ship.py). The tests import `code_digest` from here, to notice a code cell edited since.
"""

import base64
import hashlib
import io
import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path

import nbformat
from PIL import Image

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "CIFAR_10_Classification.ipynb"
# Where this machine keeps the libraries (with their example photographs): of no interest to a reader.
LIBRARIES = sysconfig.get_path("purelib") + os.sep
MOST_EXACT = 150_000  # characters of Base64, up to which a picture keeps all its colours
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
        tags = cell.metadata.get("tags", [])
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
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


def main():
    if sys.argv[1] == "--repository":
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        set_repository(notebook, sys.argv[2])
        nbformat.write(notebook, NOTEBOOK)
        readme = ROOT / "README.md"
        readme.write_text(with_badge_to(readme.read_text(), sys.argv[2]))
        return
    notebook = nbformat.read(sys.argv[1], as_version=4)
    text = printed(notebook)
    folder = ROOT / re.search(r"This run is kept in (\S+)", text)[1]
    if "STAND-IN" in text:
        sys.exit("This run used the stand-in; a release shows real data. Set CIFAR10_NPZ.")
    injected = [
        cell.source
        for cell in notebook.cells
        if "injected-parameters" in cell.metadata.get("tags", [])
    ]
    knobs = [line for line in "".join(injected).splitlines() if line and not line.startswith("#")]
    others = [line for line in knobs if not line.startswith(("PRESET =", "PRECISION ="))]
    if others:
        sys.exit(
            f"A release has a preset's knobs, this run ({folder}) has others: {', '.join(others)}"
        )
    if 'PRESET = "full"' in knobs:
        import ship  # with Keras, which takes seconds

        ship.main(folder / "best_model.hdf5")
        return
    if knobs:
        sys.exit(
            f"The notebook shows a run without knobs, this one ({folder}) has {', '.join(knobs)}"
        )
    if "epoch 1/" not in text:
        sys.exit(
            f"This run trained nothing, as {folder} holds a finished one. Move that folder away and run again."
        )
    clean(notebook)
    nbformat.write(notebook, NOTEBOOK)
    (ROOT / "Images").mkdir(exist_ok=True)
    for name in FIGURES:
        shutil.copy(folder / name, ROOT / "Images" / name)
    print(f"Renewed {NOTEBOOK.name} and Images/ from {folder}")


if __name__ == "__main__":
    main()
