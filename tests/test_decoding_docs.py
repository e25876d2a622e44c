"""`docs/decoding.md` says the truth: snippets run, commands exist, names and numbers are right."""

from __future__ import annotations

import re

import pytest
from doc_code import DOCS, blocks, run
from tiny_pipeline import tiny_pipeline

from unidiff import hub
from unidiff.decoding.cache.config import CACHES
from unidiff.decoding.config import RULES
from unidiff.evaluation.benchmark.random_weights import SUITES, cache_named
from unidiff.world import WORLDS

NAME = "decoding.md"
TEXT = (DOCS / NAME).read_text(encoding="utf-8")


def test_snippets_run(tmp_path, monkeypatch, capsys):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(hub, "embedded_models", lambda: {"emoji": tmp_path / "model"})
    printed = []
    for block in blocks(NAME):
        run(block, NAME, {})
        printed.append(capsys.readouterr().out.splitlines())
    assert len(printed) == 2 and len(printed[0]) == 1
    dual, prefix = (tuple(map(float, line.split())) for line in printed[1])
    assert dual[1] == pytest.approx(8.7, abs=0.05) and prefix[1] == pytest.approx(1.8, abs=0.05)
    assert dual[0] < dual[1] and prefix[0] < prefix[1]  # the head


def test_tables_are_complete():
    named = re.findall(r"^\| `([a-z_-]+)` \|", TEXT, re.MULTILINE)
    assert set(named) == {*RULES, *CACHES} and len(named) == len(set(named))


def test_commands_exist():
    suites = re.findall(r"--suite ([\w.-]+)", TEXT)
    assert set(suites) <= {*SUITES, *WORLDS} and {"cpu-25m", "gpu-1.4b", "gpu-8b", "emoji"} <= set(suites)
    assert all(cache_named(name) for name in re.findall(r"--only ([\w-]+)", TEXT))
    files = ("inference/benchmark.py", "inference/gpu_check.py", "unidiff/cli/tools.py", "unidiff/cli/evaluation.py")
    source = "".join((DOCS.parent / file).read_text(encoding="utf-8") for file in files)
    for option in set(re.findall(r"(--(?!out|keep)[a-z][a-z-]+)", TEXT)):
        assert f'"{option}"' in source, option
