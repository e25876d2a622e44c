"""Time caches against no cache: python inference/benchmark.py --suite cpu-25m --json out/cpu-25m.json"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from unidiff.errors import exit_status
from unidiff.evaluation.benchmark.compare import contrast_tables
from unidiff.evaluation.benchmark.decode import Options, run_suite
from unidiff.evaluation.benchmark.report import check_path, tables, write
from unidiff.evaluation.benchmark.settings import QUALITY
from unidiff.evaluation.benchmark.suites import EMBEDDED, NAMES
from unidiff.pipeline import UniDiffPipeline
from unidiff.process import keep_freed_memory, parsed
from unidiff.worlds.emoji.benchmark import PARTS, EmojiOptions, run_emoji


def arguments() -> argparse.ArgumentParser:
    """All options; those of another suite than the one that is run are left alone."""
    parser = argparse.ArgumentParser(description="Time caches against no cache, paired, with their bounds.")
    several = {"action": "append", "default": []}
    parser.add_argument("--suite", required=True, choices=NAMES)
    parser.add_argument("--json", type=Path, required=True, help="also writes .csv and .png beside it")
    parser.add_argument("--only", **several, metavar="POLICY", help="compare this one; repeatable")
    parser.add_argument("--shape", **several, help="rows of this many text and image tokens, as 128+1024; repeatable")
    parser.add_argument("--blocks", type=int, help="decode so many blocks of each row only, for a quick look")
    parser.add_argument("--runs", type=int, help="paired runs")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--device", help="in place of the suite's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--graphs", action="store_true", help="CUDA graphs; not of the emoji suite")
    parser.add_argument(
        "--cells",
        type=Path,
        help="folder of finished measurements, for going on after an interruption; default: beside the JSON",
    )
    emoji = parser.add_argument_group("emoji", "the suite with a trained model; goes on where it was interrupted")
    emoji.add_argument("--model", default="emoji", help="folder of the pipeline")
    emoji.add_argument("--dtype", default="float32", help="how the model computes")
    emoji.add_argument("--task", **several, choices=list(QUALITY), help="repeatable")
    emoji.add_argument(
        "--setting", **several, help="model, passes-16, threshold-0.9, factor-1, passes-16/8; repeatable"
    )
    emoji.add_argument("--batch", **several, type=int, help="rows at once for the timing; repeatable")
    emoji.add_argument("--cases", type=int, default=2000, help="least number of cases of a task")
    emoji.add_argument("--large", type=int, default=64, help="rows at once for the quality")
    emoji.add_argument("--rows", type=int, default=8, help="rows in a timed run")
    emoji.add_argument("--part", **several, choices=PARTS, help="measure this part only")
    return parser


def emoji_options(given: argparse.Namespace) -> EmojiOptions:
    """What was asked for; the rest keeps its default."""
    asked = {
        "caches": tuple(given.only),
        "tasks": tuple(given.task),
        "settings": tuple(given.setting),
        "batches": tuple(given.batch),
        "parts": tuple(given.part),
        "runs": given.runs,
        "device": given.device,
    }
    return EmojiOptions(
        given.cells or given.json.with_suffix(".cells"),
        cases=given.cases,
        quality_batch=given.large,
        rows=given.rows,
        threads=given.threads,
        seed=given.seed,
        **{name: value for name, value in asked.items() if value not in (None, ())},
    )


def main() -> None:
    given, say = parsed(arguments()), Console(stderr=True).print
    keep_freed_memory()
    check_path(given.json)
    if given.suite == EMBEDDED:
        options = emoji_options(given)
        result = run_emoji(UniDiffPipeline.from_pretrained(given.model, dtype=given.dtype), options, say)
        if not result.rows:
            say(f"kept in {options.cells}; run again without --part for the table")
            return
    else:
        names = ("blocks", "runs", "threads", "device", "seed", "graphs")
        cells = given.cells or given.json.with_suffix(".cells")
        options = Options(
            tuple(given.only), **{name: getattr(given, name) for name in names}, shapes=tuple(given.shape), cells=cells
        )
        result = run_suite(given.suite, options, say)
    for file in write(result, given.json):
        say(file)
    emoji = given.suite == EMBEDDED
    Console(width=180 if emoji else 110).print((contrast_tables if emoji else tables)(result))


if __name__ == "__main__" and (status := exit_status(main, program="benchmark")):
    sys.exit(status)
