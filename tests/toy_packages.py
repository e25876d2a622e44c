"""A package of one module that offers an entry to one of unidiff's registries, and a process that has it installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_with(folder: Path, kind: str, package: str, program: str) -> None:
    """Run `program` where the module of source `package` is an entry point of `unidiff.<kind>`; its argument is `folder`."""
    name = f"toy_{kind}"
    (folder / f"{name}.py").write_text(package)
    about = folder / f"{name}-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (about / "entry_points.txt").write_text(f"[unidiff.{kind}]\ntoy = {name}\n")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}
    done = subprocess.run([sys.executable, "-c", program, str(folder)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
