"""`unidiff profile-cache`: watch a pipeline's tasks, write what was measured, and recommend a cache for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.table import Table

from unidiff.decoding.cache.combined import SEGMENTS
from unidiff.evaluation.cache_profile.advice import Advice, advise
from unidiff.evaluation.cache_profile.profile import FEATURES, PAIRS, TaskProfile, Watcher, watch
from unidiff.evaluation.charts import heat_map
from unidiff.evaluation.report import table_of, write_json
from unidiff.models.denoiser import DenoiserTraits
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.sheet import Cell, draw_sheet, save_image

TASKS = ("text_to_image", "caption", "inpaint")


def profile_pipeline(
    pipe: UniDiffPipeline,
    prompts: Sequence[str],
    tasks: Sequence[str] = TASKS,
    steps: int | None = None,
    seed: int = 0,
    keep: float = 0.95,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, TaskProfile]:
    """Draw the prompts, describe what was drawn, and repaint its left half.

    Args:
        pipe: any pipeline.
        prompts: captions to draw, all in one batch.
        tasks: some of `TASKS`.
        steps: passes; the pipeline's own settings for each task when None.
        seed: of the decodes.
        keep: see `TaskProfile`.

    Raises:
        ValueError: an unknown task, a keep outside (0, 1), prompts that the pipeline cannot take, or a decode of one pass.
    """
    if unknown := [task for task in tasks if task not in TASKS]:
        raise ValueError(f"unknown task {unknown[0]!r}; expected some of {', '.join(TASKS)}")
    if not 0 < keep < 1:
        raise ValueError(f"keep is {keep}; expected a cosine between 0 and 1")
    options: dict[str, Any] = {"generator": list(range(seed, seed + len(prompts))), "steps": steps, "output_type": "pt"}
    profiles: dict[str, TaskProfile] = {}

    def watched(task: str, call: Callable[..., Any], *args: Any) -> Any:
        progress(task)
        with watch(pipe.transformer, Watcher(keep)) as watcher:
            out = call(*args, policy=watcher, **options)
        if task in tasks:
            profiles[task] = watcher.profile()
        return out

    pictures = watched("text_to_image", pipe.text_to_image, list(prompts)).images  # [B, 3, H, W]
    if "caption" in tasks:
        watched("caption", pipe.caption, pictures)
    if "inpaint" in tasks:
        half = torch.zeros(len(pictures), *pipe.image_size, dtype=torch.bool)
        half[..., : pipe.image_size[1] // 2] = True
        watched("inpaint", pipe.inpaint, list(pictures), list(half), list(prompts))
    return profiles


def write(folder: Path, model: str, traits: DenoiserTraits, profiles: dict[str, TaskProfile]) -> list[Path]:
    """`profile.json`, and a sheet of heat maps for every task and segment."""
    data: dict[str, Any] = {}
    files = [folder / "profile.json"]
    for task, profile in profiles.items():
        advice = advise(profile, traits)
        data[task] = {
            "keep": profile.keep,
            "passes": profile.similarity.shape[2] + 1,
            "layers": profile.similarity.shape[3],
            "segments": profile.to_dict(),
            "recommended": advice.cache.to_dict(),
            "bound": advice.bound,
            "reason": advice.reason,
        }
        for segment in profile.segments:
            files.append(folder / f"{task}.{segment}.png")
            save_image(_sheet(profile, SEGMENTS.index(segment), f"{task}, {segment}"), files[-1])
    write_json(files[0], {"model": model, "tasks": data})
    return files


def summary(profiles: dict[str, TaskProfile], traits: DenoiserTraits) -> tuple[Table, dict[str, Advice]]:
    """Mean similarities and correlations of every task and segment, and the advice for each task."""
    title = "Mean cosine between successive passes; correlation of changes"
    table = table_of(title, "task", "segment", "tokens", *FEATURES, *PAIRS, left=2)
    for task, profile in profiles.items():
        for segment, numbers in profile.to_dict().items():
            mean = ["" if m is None else f"{m:.3f}" for m in numbers["mean"].values()]
            table.add_row(task, segment, f"{numbers['tokens']:.0f}", *mean)
    return table, {task: advise(profile, traits) for task, profile in profiles.items()}


def _sheet(profile: TaskProfile, segment: int, title: str) -> Image.Image:
    """Heat maps with layers down and passes across, two in a line."""
    least = lambda values: min(0.9, float(values.nan_to_num(0.9).min()))  # noqa: E731
    maps = [(f"cosine of {n}", v, least(v)) for n, v in zip(FEATURES, profile.similarity[:, segment], strict=True)]
    related = zip(PAIRS, profile.correlation[:, segment], strict=True)
    maps += [(f"correlation of changes, {name}", values, -1.0) for name, values in related]
    cells = [
        Cell((heat_map(values.T, low, 1.0),), f"{name}: dark {low:.3g}, bright 1, grey: none")
        for name, values, low in maps
    ]
    side = max(300, *(cell.images[0].width for cell in cells))
    return draw_sheet(
        [cells[i : i + 2] for i in range(0, len(cells), 2)], side, f"{title}; down: layers, across: passes"
    )
