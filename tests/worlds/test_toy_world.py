"""A world is one folder or module: nothing of unidiff names it; its model, demo, evaluation, benchmark and pictures are found."""

from __future__ import annotations

from toy_packages import run_with

PACKAGE = """
from pathlib import Path

import torch

from unidiff.evaluation.benchmark.trials import JudgedTasks
from unidiff.evaluation.report import Estimate, EvaluationReport
from unidiff.world import World, later


def prompts():
    return ["a fox"]


def demo(pipe, folder, seed):
    path = Path(folder) / "toy.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(pipe.text_to_image(prompts(), steps=1, generator=seed).texts[0])
    return (path,)


def evaluate(pipe, seed, n, tick, **options):
    report = EvaluationReport(about={"seed": seed})
    report.add("drawn", Estimate.share([len(pipe.text_to_image(prompts(), steps=1).images) == 1] * n))
    return report


def judge(pipe, task, cases, seed, batch, **options):
    report = EvaluationReport()
    report.add("right", Estimate.share([True] * cases))
    return report


def decode(pipe, task, rows, seed, batch, on_output, **options):
    for start in range(0, rows, batch):
        on_output(pipe.text_to_image(prompts() * min(batch, rows - start), **options))


def benchmark():
    tasks = ("text_to_image",)
    return JudgedTasks({tasks[0]: "right"}, tasks, {tasks[0]: ("passes-2",)}, judge, decode, lambda: "toy")


def pictures(profile, kinds, seed):
    return lambda index: torch.full((3, 16, 16), (index % 97) / 97)


def cells(profile, factor):
    flat = torch.zeros(1, 3, factor, factor)
    return flat[None], flat


WORLD = World(
    "toy", model=None, prompts=prompts, demo=later("toy_worlds:demo"), demo_files=("toy.txt",), evaluate=evaluate,
    benchmark=benchmark, reward=lambda *asked: None, pictures=pictures, cells=cells,
)
"""

RUN = """
import json
import runpy
import sys
from pathlib import Path

from unidiff import cli

folder = Path(sys.argv[1])


def unidiff(*words):
    sys.argv = ["unidiff", *map(str, words)]
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code, words


unidiff("demo", "--world", "toy", "-o", folder / "demo")
assert (folder / "demo" / "toy.txt").read_text() == "a fox"
unidiff("eval", "toy", "--n", 3, "--json", folder / "eval.json")
assert json.loads((folder / "eval.json").read_text())["drawn"] == 1.0

sys.argv = ["benchmark", "--suite", "toy", "--model", "emoji", "--json", str(folder / "b.json"), "--only", "dual"]
sys.argv += ["--batch", "1", "--cases", "2", "--rows", "1", "--runs", "1"]
try:
    runpy.run_path(str(Path(cli.__file__).parents[2] / "inference" / "benchmark.py"), run_name="__main__")
except SystemExit as end:
    assert not end.code
assert [row["policy"] for row in json.loads((folder / "b.json").read_text())["rows"]] == ["none", "dual"]

from unidiff.train.image_tokenizer.data import ImageData, open_pictures

found = open_pictures(ImageData(world="toy", validation_images=4), 0, 8)
assert found.held_out.shape == (4, 3, 16, 16) and next(found.stream()).shape == (3, 16, 16)
"""


def test_a_world_of_another_package(tmp_path):
    run_with(tmp_path, "worlds", PACKAGE, RUN)
