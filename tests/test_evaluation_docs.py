"""`docs/evaluation.md` says the truth: its snippets run, and its tables have every benchmark and metric."""

import re

import pytest
from doc_code import DOCS, blocks, run
from emoji_fakes import tiny_emoji_pipeline
from tiny_pipeline import tiny_pipeline

from unidiff import hub
from unidiff.evaluation.metrics.base import METRICS
from unidiff.evaluation.suites.base import SUITES

TEXT = (DOCS / "evaluation.md").read_text(encoding="utf-8")


def test_snippets_run(tmp_path, monkeypatch, capsys):
    tiny_pipeline(text_length=40).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(hub, "embedded_models", lambda: {"emoji": tmp_path / "model"})
    names: dict = {}
    headings = ("Likelihood", "Which text belongs to which picture", "The best of several")
    for block in blocks("evaluation.md"):
        if block.heading in headings:
            run(block, "evaluation.md", names)
    assert capsys.readouterr().out.count("[3]") == 3
    assert names["gap"].value.shape == (2,) and names["pairs"].group.n == 1 and len(names["answers"].scores) == 2
    monkeypatch.chdir(tmp_path)
    report = next(block for block in blocks("evaluation.md") if block.heading == "A report of a model")
    run(report, "evaluation.md", {"pipe": tiny_emoji_pipeline()})
    assert "n=4" in capsys.readouterr().out and (tmp_path / "small-report" / "report.html").is_file()


def test_the_snippet_of_scores_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch_fidelity")
    monkeypatch.chdir(tmp_path)
    own = next(block for block in blocks("evaluation.md") if block.heading.startswith("Scores of"))
    run(own, "evaluation.md", {})
    said = capsys.readouterr().out
    assert "True" in said and "'modes': {'L': 40}" in said and (tmp_path / "fid.json").is_file()


def test_the_table_is_complete():
    listed = set(re.findall(r"^\| `([a-z0-9-]+)` \|", TEXT, re.MULTILINE))
    scores = {name for name, metric in METRICS.items() if metric.score is not None}
    assert listed == set(SUITES) | scores
    assert set(re.findall(r"eval score ([a-z]+)", TEXT)) <= scores
    assert set(re.findall(r"eval run ([a-z0-9-]+)", TEXT)) <= set(SUITES)
    assert set(re.findall(r"--task (\w+)", TEXT)) <= set(METRICS)
