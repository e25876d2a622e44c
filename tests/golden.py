"""Finding golden sets: `UNIDIFF_GOLDEN` names the folder that holds them (default: `../shared/golden`).

What tests read from them is noted, so that `test_golden_coverage` can tell what nobody looked at.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

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


def golden_cases(name: str, *more: Any, having: str = "") -> list[Any]:
    """The folders of a set as parameters of tests, those that hold a file `having`; one that is skipped if absent.

    Args:
        more: further arguments of a skipped case.
    """
    found = [pytest.param(f, id=f.name) for f in golden_folders(name) if (f / having).exists()]
    return found or [absent_set(name, *more)]


def absent_set(name: str, *more: Any) -> Any:
    """A case that is skipped because its set is not there."""
    return pytest.param(None, *more, marks=pytest.mark.skip(reason=f"golden set {name} is not there"))


# ------------------------------------------------------------------------------------------------- what tests have read

_READS: dict[Path, dict[str, set[str]]] = {}  # file -> test -> names of the tensors that it took


class Watched(dict):
    """Tensors of a golden file; notes which of them a test takes."""

    def __init__(self, tensors: Mapping[str, Any], seen: set[str]) -> None:
        super().__init__(tensors)
        self._seen = seen

    def __getitem__(self, name: str) -> Any:
        self._seen.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self._seen.add(name)
        return super().get(name, default)

    def pop(self, name: str, *default: Any) -> Any:
        self._seen.add(name)
        return super().pop(name, *default)

    def items(self) -> Any:
        self._seen.update(self)
        return super().items()

    def values(self) -> Any:
        self._seen.update(self)
        return super().values()

    def __reduce__(self) -> tuple[Any, ...]:
        """Saved as an ordered dictionary, which reads back without this class."""
        return OrderedDict, (), None, None, iter(self.items())


def watch_reads() -> None:
    """From now on `safetensors.torch.load_file` notes what is read below the golden root, and by which test.

    Has to be called before modules import `load_file` by name.
    """
    load = safetensors.torch.load_file

    def load_file(filename: str | os.PathLike[str], *args: Any, **kwargs: Any) -> dict[str, Any]:
        tensors, path = load(filename, *args, **kwargs), Path(filename).absolute()
        if not path.is_relative_to(golden_root().absolute()):  # by name: a set may be a link
            return tensors
        test = os.environ.get("PYTEST_CURRENT_TEST", "collection").partition(" ")[0]
        return Watched(tensors, _READS.setdefault(path, {}).setdefault(test, set()))

    safetensors.torch.load_file = load_file


def reads_of(path: Path) -> dict[str, set[str]]:
    """Names of the tensors of a file that tests of this session took so far, by test."""
    return _READS.get(path.absolute(), {})
