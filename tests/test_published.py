"""`docs/published.md`: every published number has its commands, which the real command line reads, and a tolerance that holds water."""

from __future__ import annotations

import math
import re
import shlex
import sys
from typing import Any
from unittest.mock import patch

import pytest
import typer
from doc_code import Block, blocks

from unidiff.cli.app import app
from unidiff.evaluation.harness.settings import HarnessSettings
from unidiff.evaluation.metrics.base import METRICS
from unidiff.evaluation.suites.base import SUITES

NUMBERS = {
    "UniDisc GenEval": 0.42,
    "Muddit 512 GenEval": 0.61,
    "Muddit 512 COCO CIDEr": 59.9,
    "Muddit 512 VQAv2": 68,
    "Muddit 512 MME": 1104.6,
    "Muddit 1024 COCO CIDEr": 60.1,
    "Muddit 1024 VQAv2": 70.2,
    "Muddit 1024 MME": 1139.2,
    "Muddit 1024 GQA": 57.8,
    "Muddit 1024 MMMU": 28.7,
    "MMaDA GenEval": 0.63,
    "MMaDA DPG-Bench": 70,
    "MMaDA VQAv2": 76.7,
    "MMaDA MMMU": 30.2,
    "Lumina-DiMOO GenEval": 0.88,
    "Lumina-DiMOO DPG-Bench": 86,
    "Lumina-DiMOO MMMU": 58.6,
    "Lumina-DiMOO MMBench": 84.5,
    "D-DiT GenEval": 0.65,
    "D-DiT POPE": 84,
    "D-DiT MME": 1124.7,
    "Dynin-Omni GenEval": 0.87,
    "Dynin-Omni MME": 1733.6,
    "LLaDA2.0-Uni GenEval": 0.89,
    "LLaDA2.0-Uni DPG-Bench": 87.8,
    "LLaDA2.0-Uni MMMU": 50.1,
    "LLaDA 8B GSM8K": 79,
    "LLaDA 8B dual GSM8K": 78,
}
"""As published."""
TAGS = {"GenEval": (80, 99, 80, 94, 100, 100)}  # prompts of each tag
PICTURES = (30, 30, 30, 30, 147, 170, 200, 200, 200, 20)  # of MME's tasks of perception
CASES = {"VQAv2": 214_354, "MMMU": 847, "DPG-Bench": 1065, "GSM8K": 1319, "GQA": 12_578, "MMBench": 1164, "POPE": 3000}
"""Cases behind a share; of MMMU's 900 those about one picture."""
BLOCKS = blocks("published.md", "bash")


def number_of(block: Block) -> tuple[str, float, float]:
    found = re.fullmatch(r"# (.+): ([\d.]+) \+- ([\d.]+)", block.text.splitlines()[0])
    assert found, block.text
    return found[1], float(found[2]), float(found[3])


def test_every_number_is_there():
    assert {name: value for name, value, _ in map(number_of, BLOCKS)} == NUMBERS


def parse(words: list[str]) -> dict:
    """What `unidiff eval ...` would be called with; a word that it does not know raises."""
    program: Any = typer.main.get_command(app)
    program.commands["eval"].commands[words[1]].callback = lambda **values: values
    return program.main(words, standalone_mode=False)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: number_of(block)[0])
def test_the_command_line_reads_the_commands(block):
    outs = []
    for line in block.text.splitlines()[1:]:
        program, *words = shlex.split(line)
        assert program == "unidiff" and words[0] == "eval" and words[1] in ("run", "score", "lm-eval")
        if words[1] == "lm-eval":  # of another program; its settings are ours
            outs.append(check_harness(words[2:]))
            continue
        params = parse(words)
        if words[1] == "run":
            suite = SUITES[params["suite"]]
            assert suite.needs_pictures == (params["pictures"] is not None)
            outs.append(params["out"])
        else:
            metric = METRICS[params["metric"]]
            assert bool(metric.against) == (params["against"] is not None) and params["made"] in outs
    assert len(outs) == 1


def check_harness(words: list[str]) -> str:
    """The place of the results, once the harness's own reader and ours know every word."""
    pytest.importorskip("lm_eval")
    from lm_eval._cli.harness import HarnessCLI

    with patch.object(sys, "argv", ["lm_eval", "run", "--model", "unidiff", *words]):
        arguments = HarnessCLI().parse_args()
    settings = HarnessSettings.of(**arguments.model_args)
    assert settings.pretrained and arguments.tasks
    return arguments.output_path


def test_a_wrong_command_is_not_read():
    with pytest.raises(Exception, match=r"No such option:? '?--prompt"):
        parse(["eval", "run", "geneval", "--prompt", "x"])


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: number_of(block)[0])
def test_tolerances_are_those_of_the_number_of_cases(block):
    name, value, tolerance = number_of(block)
    kind = name.split()[-1]
    if kind == "CIDEr":  # 5,000 pictures whose scores spread about as widely as their mean is high
        least = 1.96 * value / math.sqrt(5000)
    elif kind == "GenEval":  # the mean of six tags
        least = 1.96 * math.sqrt(sum(value * (1 - value) / n for n in TAGS[kind])) / len(TAGS[kind])
    elif kind == "MME":  # a sum of ten tasks of 200 points each, whose pictures have all of them or none at the worst
        mean = value / len(PICTURES)
        least = 1.96 * math.sqrt(sum(mean * (200 - mean) / n for n in PICTURES))
    else:
        least = 196 * math.sqrt(value / 100 * (1 - value / 100) / CASES[kind])
    assert 0.6 * least <= tolerance <= max(2.0 * least, 1.0)
    assert kind != "VQAv2" or tolerance == 1  # another split
