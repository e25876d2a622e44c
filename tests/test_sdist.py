"""The source distribution holds recipes, docs and tests, and a wheel built from it is the wheel of the tree."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2]))"
LEFT = {
    ".git",
    ".venv",
    "out",
    "runs",
    "data",
    "build",
    "dist",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
    ".hypothesis",
}


def tracked() -> list[str]:
    """Files of the repository, by git, or all of an unpacked source distribution."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        done = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return [name for name in done.stdout.splitlines() if (ROOT / name).exists()]
    files = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return [
        str(path) for path in files if not {"__pycache__", *LEFT} & set(path.parts) and ".egg-info" not in str(path)
    ]


def build(kind: str, tree: Path, out: Path) -> Path:
    out.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(out)], cwd=tree, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


def content(wheel: Path) -> dict[str, str]:
    """A hash of every file of a wheel, by name."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A copy of the tree, its source distribution, and that unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    tree = folder / "tree"
    for name in tracked():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)
    sdist = build("sdist", tree, folder / "dist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return tree, sdist, unpacked


@pytest.mark.slow
def test_the_source_distribution_holds_everything(built):
    _, sdist, unpacked = built
    held = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    wanted = [name for name in tracked() if not name.startswith((".git", ".ci"))]
    assert not [name for name in wanted if name not in held and not (unpacked / name).is_dir()]  # configs is a link
    for name in (
        "docs/index.md",
        "docs/assets/demo.png",
        "docs/notebooks/caches.ipynb",
        "tests/conftest.py",
        "training/pretrain.py",
    ):
        assert name in held
    assert {"tokenizers", "training", "inference", "configs", "docs", "tests", "unidiff"} <= {
        name.split("/")[0] for name in held
    }
    assert not [name for name in held if name.endswith(".pyc") or "/__pycache__/" in name]
    assert sdist.stat().st_size < 60_000_000


@pytest.mark.slow
def test_its_wheel_is_the_wheel_of_the_tree(built, tmp_path):
    tree, _, unpacked = built
    of_tree, of_sdist = content(build("wheel", tree, tmp_path / "a")), content(build("wheel", unpacked, tmp_path / "b"))
    assert of_tree == of_sdist
    packages = {name.split("/")[0] for name in of_tree}
    assert {name for name in packages if "dist-info" not in name} == {"unidiff"}
    assert "unidiff/py.typed" in of_tree and "unidiff/assets/emoji/model/model_index.json" in of_tree
