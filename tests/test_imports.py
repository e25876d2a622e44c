"""The recipe folders must not shadow Hugging Face's packages: `tokenizers/` at the root has the name of one."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_hugging_face_packages_are_found_from_the_root():
    program = (
        "import tokenizers, transformers; "
        "from tokenizers import Tokenizer; "
        "print(tokenizers.__file__); print(transformers.__file__)"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    for line in run.stdout.split():
        path = Path(line)
        assert "site-packages" in path.parts
        assert path.parent != ROOT / "tokenizers"


@pytest.mark.parametrize("folder", ["tokenizers", "training", "inference"])
def test_recipe_folders_are_not_packages(folder):
    assert not list((ROOT / folder).rglob("__init__.py"))


@pytest.mark.parametrize("folder", ["tokenizers", "training"])
def test_recipes_import_only_unidiff_of_this_repository(folder):
    recipes = sorted((ROOT / folder).glob("*.py"))
    assert recipes
    for recipe in recipes:
        for line in recipe.read_text(encoding="utf-8").splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]) and len(words) > 1:
                assert words[1].split(".")[0] not in ("training", "inference", "tests"), f"{recipe.name}: {line}"
                assert not words[1].startswith("."), f"{recipe.name}: {line}"
