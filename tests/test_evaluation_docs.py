"""`docs/evaluation.md` says the truth: its snippet runs, and its table has every benchmark."""

import re

from doc_code import DOCS, blocks, run
from tiny_pipeline import tiny_pipeline

from unidiff import hub
from unidiff.evaluation.metrics.base import METRICS
from unidiff.evaluation.suites.base import SUITES

TEXT = (DOCS / "evaluation.md").read_text(encoding="utf-8")


def test_snippets_run(tmp_path, monkeypatch, capsys):
    tiny_pipeline(text_length=40).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(hub, "embedded_models", lambda: {"emoji": tmp_path / "model"})
    (block,) = blocks("evaluation.md")
    run(block, "evaluation.md", {})
    assert capsys.readouterr().out.count("[3]") == 2


def test_the_table_is_complete():
    assert set(re.findall(r"^\| `([a-z0-9-]+)` \|", TEXT, re.MULTILINE)) == set(SUITES)
    assert set(re.findall(r"eval run ([a-z0-9-]+)", TEXT)) <= set(SUITES)
    assert set(re.findall(r"--task (\w+)", TEXT)) <= set(METRICS)
