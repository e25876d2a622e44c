"""Benchmarks of pictures that are drawn from words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from unidiff.errors import check_regular, reading
from unidiff.evaluation.suites.base import Result, Suite, put_picture, read_lines, read_object
from unidiff.files import write_json
from unidiff.pipelines.batch import Row
from unidiff.pipelines.sheet import save_image

PER_PROMPT = 4  # GenEval and DPG-Bench
_COMPBENCH = 10


def _drawn(prompts: Sequence[str], each: int) -> list[Row]:
    return [{"prompt": prompt, "task": "text_to_image"} for prompt in prompts for _ in range(each)]


def _geneval(path: Path) -> list[str]:
    return [entry["prompt"] for entry in read_lines(path, ("tag", "include", "prompt"))]


def _write_geneval(path: Path, results: Sequence[Result], folder: Path) -> None:
    """`00000/metadata.jsonl`, one object, and `00000/samples/0000.png` for every line of the prompts."""
    for index, entry in enumerate(read_lines(path, ("tag", "include", "prompt"))):
        own = folder / f"{index:05d}"
        for number in range(PER_PROMPT):
            put_picture(results[index * PER_PROMPT + number], own / "samples" / f"{number:05d}.png")
        (own / "metadata.jsonl").write_text(json.dumps(entry), encoding="utf-8")


GENEVAL = Suite(
    "geneval",
    lambda path: _drawn(_geneval(path), PER_PROMPT),
    _write_geneval,
    "evaluation/evaluate_images.py FOLDER --outfile results.jsonl, then evaluation/summary_scores.py results.jsonl",
)


def _geneval2(path: Path) -> list[str]:
    prompts = [entry["prompt"] for entry in read_lines(path, ("prompt", "vqa_list"))]
    if len(set(prompts)) < len(prompts):
        raise ValueError(f"{str(path)!r} names a prompt twice, but the scorer knows pictures by their prompt")
    return prompts


def _write_geneval2(path: Path, results: Sequence[Result], folder: Path) -> None:
    """`paths.json`: a picture for every prompt."""
    places = {}
    for number, (prompt, result) in enumerate(zip(_geneval2(path), results, strict=True)):
        put_picture(result, folder / "images" / f"{number:05d}.png")
        places[prompt] = f"images/{number:05d}.png"
    write_json(folder / "paths.json", places)


GENEVAL2 = Suite(
    "geneval2",
    lambda path: _drawn(_geneval2(path), 1),
    _write_geneval2,
    "from inside FOLDER: evaluation.py --benchmark_data DATA.jsonl --image_filepath_data paths.json --method soft_tifa_gm",
)


def _texts(folder: Path) -> list[Path]:
    """The prompts of DPG-Bench: a folder with a text for every picture."""
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder; name dpg_bench/prompts, which has a .txt for each picture")
    paths = sorted(folder.glob("*.txt"))
    for path in paths:
        check_regular(path)
        if "." in path.stem:
            raise ValueError(f"{str(path)!r} has a dot in its name, at which the scorer would cut it; rename it")
    return paths


def _dpg(folder: Path) -> list[str]:
    texts = []
    for path in _texts(folder):
        with reading(path, "a prompt in UTF-8"):
            texts.append(path.read_text(encoding="utf-8").strip())
    return texts


def _write_dpg(path: Path, results: Sequence[Result], folder: Path) -> None:
    """`NAME.png` with four pictures in two rows, and nothing else."""
    for index, text in enumerate(_texts(path)):
        parts = []
        for result in results[index * PER_PROMPT : (index + 1) * PER_PROMPT]:
            assert result.picture is not None
            with Image.open(result.picture) as picture:
                parts.append(picture.convert("RGB"))
        width, height = parts[0].size
        sheet = Image.new("RGB", (2 * width, 2 * height))
        for number, part in enumerate(parts):
            sheet.paste(part, (number % 2 * width, number // 2 * height))
        save_image(sheet, folder / f"{text.stem}.png")


DPG = Suite(
    "dpg",
    lambda path: _drawn(_dpg(path), PER_PROMPT),
    _write_dpg,
    "dpg_bench/dist_eval.sh FOLDER SIDE, with --res-path elsewhere: FOLDER may hold pictures only",
)


def _compbench(path: Path) -> list[str]:
    """The prompts of T2I-CompBench, one a line."""
    check_regular(path)
    with reading(path, "prompts in UTF-8"):
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for prompt in prompts:
        if bad := set("_/\0") & set(prompt):
            raise ValueError(
                f"the prompt {prompt!r:.80} has {min(bad)!r}, which the scorer's names of files cannot hold"
            )
        if len(prompt.encode()) > 240:
            raise ValueError(f"the prompt {prompt!r:.80} is too long for the name of a file, which the scorer wants")
    return prompts


def _write_compbench(path: Path, results: Sequence[Result], folder: Path) -> None:
    """`samples/PROMPT_000000.png`; numbers go on from prompt to prompt, by which the scorer sorts."""
    for index, prompt in enumerate(_compbench(path)):
        for number in range(index * _COMPBENCH, (index + 1) * _COMPBENCH):
            put_picture(results[number], folder / "samples" / f"{prompt}_{number:06d}.png")


COMPBENCH = Suite(
    "t2i-compbench",
    lambda path: _drawn(_compbench(path), _COMPBENCH),
    _write_compbench,
    "the scorer of the category in T2I-CompBench, with FOLDER as its --out_dir",
)


def _mjhq(path: Path) -> dict[str, tuple[str, str]]:
    """The category and the prompt of every picture of MJHQ-30K, by name."""
    found = {}
    for name, entry in read_object(path).items():
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("category", "prompt")):
            raise ValueError(f"{str(path)!r}: {name!r:.80} has no category and prompt; name meta_data.json of MJHQ-30K")
        for part in (name, entry["category"]):
            if not part or part in (".", "..") or "/" in part or "\0" in part:
                raise ValueError(f"{str(path)!r}: {part!r:.80} is no name of a file; name meta_data.json of MJHQ-30K")
        found[name] = entry["category"], entry["prompt"]
    return found


def _write_mjhq(path: Path, results: Sequence[Result], folder: Path) -> None:
    """`CATEGORY/NAME.png`."""
    for (name, (category, _)), result in zip(_mjhq(path).items(), results, strict=True):
        put_picture(result, folder / category / f"{name}.png")


MJHQ = Suite(
    "mjhq",
    lambda path: _drawn([prompt for _, prompt in _mjhq(path).values()], 1),
    _write_mjhq,
    "clean-fid between FOLDER and the pictures of MJHQ-30K, whole and by category",
)
