"""Where the project's modules are. The scripts beside this one import it first; pytest finds them by pyproject.toml."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests")]
sys.path[:0] = FOLDERS
os.environ["PYTHONPATH"] = str(ROOT)  # for kernels and other processes that a script starts
