"""Shared test set-up: helper modules of this folder are importable, and GPU tests skip without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).resolve().parent))

import golden

golden.watch_reads()
settings.register_profile("unidiff", deadline=None)  # a loaded machine is slow, not wrong
settings.load_profile("unidiff")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: Path(str(item.path)).stem == "test_golden_coverage")  # it looks back at the others
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command in this process: (exit status, stdout, stderr)."""

    from unidiff import cli

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["unidiff", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
            sys.exit(0)
        out = capsys.readouterr()
        return int(left.value.code or 0), out.out, out.err

    return call
