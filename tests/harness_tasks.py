"""Task files, data and calls for the command lines of lm-evaluation-harness and lmms-eval; nothing is fetched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def write_task(folder: Path, name: str, kind: str, rows: Sequence[dict[str, Any]], **settings: Any) -> Path:
    """A task file beside its data; JSON is YAML, and a setting that begins with "!function " is a function there."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": kind,
        **settings,
    }
    lines = [f"{k}: {v if str(v).startswith('!function ') else json.dumps(v)}" for k, v in task.items()]
    file = folder / f"{name}.yaml"
    file.write_text("\n".join(lines) + "\n")
    return file


def run_program(home: Path, *words: object, path: Sequence[Path] = (), fails: bool = False) -> str:
    """What `python -m ...` prints, without network; status 0 unless it `fails`."""
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    places = os.pathsep.join(map(str, (ROOT, *path)))
    settings = {**os.environ, **offline, "HF_HOME": str(home / "hf"), "PYTHONPATH": places, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *map(str, words)]
    run = subprocess.run(command, cwd=home, env=settings, capture_output=True, text=True, timeout=500)
    assert (run.returncode != 0) == fails, run.stdout + run.stderr
    return run.stdout + run.stderr


def one(folder: Path, pattern: str) -> Path:
    """The one file below a folder with such a name."""
    [found] = folder.rglob(pattern)
    return found


def samples(folder: Path, task: str) -> list[dict[str, Any]]:
    """Logged samples of a task, in the order of its data."""
    lines = one(folder, f"*samples_{task}*.jsonl").read_text().splitlines()
    return sorted(map(json.loads, lines), key=lambda sample: sample["doc_id"])
