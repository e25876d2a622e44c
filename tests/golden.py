"""Finding golden sets: `UNIDIFF_GOLDEN` names the folder that holds them (default: `../shared/golden`)."""

from __future__ import annotations

import os
from pathlib import Path

_DEFAULT = Path(__file__).resolve().parents[2] / "shared" / "golden"


def golden_root() -> Path:
    return Path(os.environ.get("UNIDIFF_GOLDEN", _DEFAULT))


def golden_folders(name: str) -> list[Path]:
    """Every folder of the set `name` that holds data files, the set's own folder included; empty if absent."""
    root = golden_root() / name
    if not root.is_dir():
        return []
    folders = [root, *sorted(p for p in root.rglob("*") if p.is_dir())]
    return [f for f in folders if any(p.suffix in {".json", ".safetensors"} for p in f.iterdir())]
