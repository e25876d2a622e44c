"""What a person imports first: public names resolve, and importing the package alone does not load torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import unidiff
from unidiff.config import load_config
from unidiff.train.config import read_config
from unidiff.train.image_tokenizer.config import ImageTokenizerConfig, new_network

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def test_public_names_resolve() -> None:
    for name in unidiff.__all__:
        assert getattr(unidiff, name) is not None
    assert set(unidiff.__all__) <= set(dir(unidiff))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = unidiff.Nothing


def test_import_is_light() -> None:
    code = "import sys, unidiff; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_config_is_valid(path: Path) -> None:
    if "tokenizer" in path.stem:
        assert new_network(load_config(ImageTokenizerConfig, path).model) is not None
    else:
        assert read_config(path).steps > 0


def test_yaml_problems_are_one_sentence(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("steps: 1\nsteps: 2\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_config(ImageTokenizerConfig, broken)
    broken.write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="holds a list"):
        load_config(ImageTokenizerConfig, broken)
