"""`docs/harnesses.md` says the truth: its arguments exist, its list of them is complete, and its snippet runs."""

import re

import pytest
from doc_code import DOCS, blocks, run

from unidiff.evaluation.harness.settings import OPTIONS, HarnessSettings

TEXT = (DOCS / "harnesses.md").read_text(encoding="utf-8")


def test_arguments_exist_and_all_are_named():
    lines = re.findall(r"--model_args (\S+)", TEXT + (DOCS / "evaluation.md").read_text(encoding="utf-8"))
    given = [dict(pair.split("=") for pair in line.split(",")) for line in lines if "NAME=VALUE" not in line]
    assert len(given) >= 6
    for one in given:
        numbers = {name: int(value) if value.isdecimal() else value for name, value in one.items()}
        HarnessSettings.of(**numbers)
    listed = set(re.findall(r"`(\w+)`", TEXT[TEXT.index("## Settings") :]))
    assert {*HarnessSettings.__dataclass_fields__} - {"options"} | {*OPTIONS} <= listed


def test_the_snippet_runs():
    pytest.importorskip("lm_eval")
    (block,) = blocks("harnesses.md")
    run(block, "harnesses.md", {})
