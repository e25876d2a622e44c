"""Time caches against no cache: python inference/benchmark.py --suite cpu-25m --json out/cpu-25m.json"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from unidiff.evaluation.decode_benchmark import Options, run_suite
from unidiff.evaluation.decode_benchmark_emoji import run_emoji
from unidiff.evaluation.decode_benchmark_report import tables, write
from unidiff.evaluation.decode_benchmark_suites import EMBEDDED, NAMES
from unidiff.pipeline import UniDiffPipeline


def main() -> None:
    parser = argparse.ArgumentParser(description="Time caches against no cache, paired, with their bounds.")
    parser.add_argument("--suite", required=True, choices=NAMES)
    parser.add_argument("--json", type=Path, required=True, help="also writes .csv and .png beside it")
    parser.add_argument("--only", action="append", default=[], metavar="POLICY", help="compare this one; repeatable")
    parser.add_argument("--blocks", type=int, help="decode so many blocks of each row only, for a quick look")
    parser.add_argument("--runs", type=int, help="paired runs")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--device", help="in place of the suite's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=50, help="emoji: cases per category")
    parser.add_argument("--model", default="emoji", help="emoji: folder of the pipeline")
    given = vars(parser.parse_args())
    suite, path, model = given.pop("suite"), given.pop("json"), given.pop("model")
    options = Options(**given | {"only": tuple(given["only"])})
    say = Console(stderr=True).print
    if suite == EMBEDDED:
        result = run_emoji(UniDiffPipeline.from_pretrained(model), options, say)
    else:
        result = run_suite(suite, options, say)
    for file in write(result, path):
        say(file)
    Console(width=110).print(tables(result))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"benchmark: {error}")
