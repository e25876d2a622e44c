"""Run the notebooks again and store them with their results.

python docs/scripts/run_notebooks.py [NAME ...]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from unidiff.errors import exit_status
from unidiff.files import replace_text
from unidiff.process import parsed

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def main() -> None:
    import nbformat
    from nbclient import NotebookClient

    names = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*names, []], default=names, metavar="NAME")
    for name in parsed(parser).names:
        path, start = NOTEBOOKS / f"{name}.ipynb", time.perf_counter()
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            NotebookClient(notebook, timeout=900, resources={"metadata": {"path": folder}}).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times of this machine
        replace_text(path, nbformat.writes(notebook) + "\n")
        print(f"{path.name}: {time.perf_counter() - start:.0f} s, {path.stat().st_size // 1000} kB")


if __name__ == "__main__" and (status := exit_status(main, failed=2)):
    sys.exit(status)
