"""The code in docs/loading.md runs, on a tiny model in place of the reader's."""

from __future__ import annotations

import pytest
from doc_code import blocks
from tiny_pipeline import tiny_pipeline

from unidiff.train.build import add_adapters, export_adapter
from unidiff.train.config import LoraConfig


def test_the_code_runs(tmp_path, monkeypatch):
    pytest.importorskip("peft"), pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    tiny_pipeline().save_pretrained("model")
    for name in ("run", "other"):
        model = tiny_pipeline().transformer
        add_adapters(model, LoraConfig(rank=2))
        export_adapter(model, tmp_path / name / "adapter")
    names: dict = {}
    for block in blocks("loading.md"):
        exec(compile(block.text, f"loading.md, {block.heading}", "exec"), names)
    assert (tmp_path / "foxes" / "README.md").is_file() and names["image"].size == (24, 16)
