"""The settings that come with the package, and its version."""

from __future__ import annotations

import subprocess
import sys

import unidiff
from unidiff.config import CONFIGS
from unidiff.train.config import read_config


def test_settings_are_listed_copied_and_named(run, tmp_path):
    status, said, _ = run("configs", "list")
    assert status == 0 and {line.split()[0] for line in said.splitlines()} == {p.stem for p in CONFIGS.glob("*.yaml")}
    status, said, _ = run("configs", "copy", "emoji", tmp_path)
    assert status == 0 and read_config(tmp_path / "emoji.yaml") == read_config("emoji")
    status, _, err = run("configs", "copy", "emoji", tmp_path / "emoji.yaml")
    assert status == 1 and "is there already" in err
    status, _, err = run("train", "emojis")
    assert status == 1 and "config 'emojis' does not exist; there are block-diffusion, emoji" in err


def test_the_version_is_said(run):
    assert run("--version") == (0, f"unidiff {unidiff.__version__}\n", "")
    done = subprocess.run([sys.executable, "-m", "unidiff", "--version"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == f"unidiff {unidiff.__version__}\n"
