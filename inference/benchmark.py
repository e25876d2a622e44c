"""Time caches against no cache: python inference/benchmark.py --suite cpu-25m --json out/cpu-25m.json

Or our decodes against another program's: python inference/benchmark.py --against FOLDER
Or a mixture of experts beside dense products: python inference/benchmark.py --mixture 1024
Or a picture block after block, as LLaDA2.0-Uni draws: python inference/benchmark.py --block-picture 32
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from unidiff.errors import exit_status
from unidiff.evaluation.benchmark.against import compare, comparison_table
from unidiff.evaluation.benchmark.block_pictures import BlockPicture, measure_block_picture, picture_table
from unidiff.evaluation.benchmark.measure import measure_mixture, thread_count
from unidiff.evaluation.benchmark.random_weights import SUITES, SuiteOptions, run_suite
from unidiff.evaluation.benchmark.result import check_path, tables, write
from unidiff.evaluation.benchmark.systems import SYSTEMS
from unidiff.evaluation.benchmark.trained import PARTS, TrainedOptions, run_trained
from unidiff.evaluation.benchmark.trials import TARGETS, contrast_tables
from unidiff.models.config import TransformerConfig
from unidiff.pipeline import UniDiffPipeline
from unidiff.process import keep_freed_memory, parsed, pick_device
from unidiff.world import WORLDS

T = TypeVar("T")


def arguments() -> argparse.ArgumentParser:
    """All options; those of another suite than the one that is run are left alone."""
    parser = argparse.ArgumentParser(description="Time caches against no cache, paired, with their bounds.")
    several: dict[str, Any] = {"action": "append"}
    parser.add_argument("--suite", choices=(*SUITES, *WORLDS))
    parser.add_argument("--json", type=Path, help="of a suite; also writes .csv and .png beside it")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="FOLDER",
        help="a checkout of Fast-dLLM, dLLM-Cache, Lumina-DiMOO, UniDisc or diffusers, whose decodes are timed beside ours "
        "on the same random weights, in place of a suite. This runs the code in that folder: name only what you trust",
    )
    parser.add_argument(
        "--mixture",
        type=int,
        metavar="WIDTH",
        help="8 of 64 experts of this width, on 1,024 tokens in bf16, in place of a suite",
    )
    parser.add_argument(
        "--block-picture",
        type=int,
        metavar="SIDE",
        help="a guided picture of SIDE x SIDE codes by a reduced LLaDA2.0-Uni, with the exact cache and in its program's ways, "
        "in place of a suite",
    )
    parser.add_argument("--only", **several, metavar="POLICY", help="compare this one; repeatable")
    parser.add_argument(
        "--shape", **several, dest="shapes", help="rows of this many text and image tokens, as 128+1024; repeatable"
    )
    parser.add_argument("--blocks", type=int, help="decode so many blocks of each row only, for a quick look")
    parser.add_argument("--runs", type=int, help="paired runs")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--device", help="in place of the suite's")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--graphs", action="store_true", help="CUDA graphs; not of trained models")
    parser.add_argument(
        "--cells",
        type=Path,
        help="folder of finished measurements, for going on after an interruption; default: beside the JSON",
    )
    world = parser.add_argument_group("worlds", "suites with a trained model, which go on where they were interrupted")
    world.add_argument("--model", help="folder of the pipeline; default: the world's own")
    world.add_argument("--dtype", default="float32", help="how the model computes")
    world.add_argument("--task", **several, dest="tasks", choices=list(TARGETS), help="repeatable")
    world.add_argument(
        "--setting",
        **several,
        dest="settings",
        help="model, passes-16, threshold-0.9, factor-1, passes-16/8; repeatable",
    )
    world.add_argument("--batch", **several, dest="batches", type=int, help="rows at once for the timing; repeatable")
    world.add_argument("--cases", type=int, help="least number of cases of a task; default: 2000")
    world.add_argument("--large", type=int, dest="quality_batch", help="rows at once for the quality; default: 64")
    world.add_argument("--rows", type=int, help="rows in a timed run; default: 8")
    world.add_argument("--part", **several, dest="parts", choices=PARTS, help="measure this part only")
    return parser


def options_of(kind: type[T], given: argparse.Namespace) -> T:
    """What was asked for; the rest keeps its default."""
    asked = {**vars(given), "caches": given.only, "cells": given.cells or given.json.with_suffix(".cells")}
    names = [field.name for field in fields(kind) if asked.get(field.name) is not None]  # type: ignore[arg-type]
    return kind(**{name: tuple(v) if isinstance(v := asked[name], list) else v for name in names})


def compared(given: argparse.Namespace, say: Callable[[str], None]) -> Table:
    """Our decodes beside those of another program."""
    device = pick_device(given.device or "cpu")
    with thread_count(given.threads):
        system, found = compare(given.against, SYSTEMS, device, given.runs or 5, say=say)
        threads, kind = torch.get_num_threads(), "processor" if device.type == "cpu" else "wall-clock"
        about = f"float32, {threads} threads, {kind} seconds, median of {given.runs or 5} paired runs"
    return comparison_table(system, found, about)


def mixture(given: argparse.Namespace) -> str:
    """The rate of a mixture of experts, and of dense products of as many operations."""
    device = pick_device(given.device or "cpu")
    shape = {"num_heads": 1, "rope": "1d", "num_experts": 64, "experts_per_token": 8, "expert_size": given.mixture}
    with thread_count(given.threads):
        config = TransformerConfig(1, hidden_size=given.mixture, **shape)
        found = measure_mixture(config, 1024, torch.bfloat16, device, given.runs or 5)
        about = f"{torch.get_num_threads()} threads" if device.type == "cpu" else device.type
    rates = f"{found.mixture / 1e9:.0f} GFLOP/s, dense products {found.dense / 1e9:.0f} GFLOP/s"
    return f"mixture of experts {rates}: {100 * found.share:.0f} % ({about}, median of {given.runs or 5} paired runs)"


def block_picture(given: argparse.Namespace) -> Table:
    """The exact cache beside the program's loop and its "Sprint"."""
    device, picture, runs = pick_device(given.device or "cpu"), BlockPicture(given.block_picture), given.runs or 3
    with thread_count(given.threads):
        found = measure_block_picture(picture, device, runs, tuple(given.only or ()))
        where = f"{torch.get_num_threads()} threads" if device.type == "cpu" else device.type
    kind = "processor" if device.type == "cpu" else "wall-clock"
    return picture_table(picture, found, f"float32, {where}, {kind} seconds, median of {runs} paired runs")


def main() -> None:
    parser, say = arguments(), Console(stderr=True).print
    given = parsed(parser)
    keep_freed_memory()
    if given.against:
        Console(width=110).print(compared(given, say))
        return
    if given.mixture:
        Console(width=110).print(mixture(given))
        return
    if given.block_picture:
        Console(width=110).print(block_picture(given))
        return
    if not (given.suite and given.json):
        parser.error("give --suite and --json, or --against with a folder")
    check_path(given.json)
    if given.suite in WORLDS:
        options = options_of(TrainedOptions, given)
        pipe = UniDiffPipeline.from_pretrained(given.model or given.suite, dtype=given.dtype)
        result = run_trained(given.suite, WORLDS[given.suite].benchmark(), pipe, options, say)
        if not result.rows:
            say(f"kept in {options.cells}; run again without --part for the table")
            return
        shown = contrast_tables(result)
    else:
        result = run_suite(given.suite, options_of(SuiteOptions, given), say)
        shown = tables(result)
    for file in write(result, given.json):
        say(file)
    Console(width=180 if given.suite in WORLDS else 110).print(shown)


if __name__ == "__main__" and (status := exit_status(main, program="benchmark")):
    sys.exit(status)
