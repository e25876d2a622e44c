"""What `pip install 'unidiff[...]'` brings is what is imported: nothing is missing, and nothing is there for no reason."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ROOMS = {"eval": "evaluation", "demo": "studio"}
IMPORTS = {"pillow": "PIL", "pyyaml": "yaml", "lm-eval": "lm_eval", "lmms-eval": "lmms_eval"}
"""Distributions whose module has another name than theirs with underscores."""
BROUGHT = {
    "tokenizers": "transformers",
    "braceexpand": "webdataset",
    "triton": "torch",
    "starlette": "gradio",
    "anyio": "gradio",
    "tqdm": "huggingface_hub",
}
"""Modules that come with what is asked for."""


def modules_of(requirements: list[str]) -> set[str]:
    names = (re.match(r"[A-Za-z0-9._-]+", requirement)[0] for requirement in requirements)
    return {IMPORTS.get(name, name.replace("-", "_")) for name in names}


def imported(folder: Path) -> Iterator[tuple[str, str]]:
    """Top-level modules of others that a folder imports, anywhere in it, and the files that do."""
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("import_extra", "import_module"):
                first = node.args[0]
                if isinstance(first, ast.JoinedStr):  # "package.{part}"
                    first = first.values[0]
                if isinstance(first, ast.Constant):
                    names = [first.value]
            for name in names:
                top = name.split(".")[0]
                if top != "unidiff" and top not in sys.stdlib_module_names:
                    yield top, path.name


CORE = modules_of(PROJECT["dependencies"])


@pytest.mark.parametrize("extra", list(ROOMS))
def test_an_extra_is_what_its_room_imports(extra):
    room = ROOT / "unidiff" / ROOMS[extra]
    assert room.is_dir()
    known = modules_of(PROJECT["optional-dependencies"][extra])
    others = set().union(*(modules_of(own) for name, own in PROJECT["optional-dependencies"].items() if name != "dev"))
    found = {BROUGHT.get(name, name) for name, _ in imported(room)} - CORE
    assert known == found - (others - known)


def test_every_import_is_a_dependency():
    known = set(CORE)
    for name, requirements in PROJECT["optional-dependencies"].items():
        known |= modules_of(requirements) if name != "dev" else set()
    found = {(BROUGHT.get(name, name), file) for name, file in imported(ROOT / "unidiff")}
    assert not {f"{file} imports {name}" for name, file in found if name not in known}


def test_the_test_suite_has_what_it_asks_for():
    """The development extra holds every library without which tests of the extra `eval` are skipped, but for the large one."""
    assert modules_of(PROJECT["optional-dependencies"]["eval"]) - {"pycocoevalcap"} <= modules_of(
        PROJECT["optional-dependencies"]["dev"]
    )
