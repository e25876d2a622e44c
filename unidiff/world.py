"""`World`: what generic code may ask of a synthetic world; `WORLDS` finds all of them by looking into `unidiff.worlds`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from unidiff.registry import Registry


@dataclass(frozen=True)
class TaskExample:
    """What a person may ask of a model.

    Args:
        task: a method of the pipeline. words: its prompt, question or text. picture: a PIL image of the model's size.
        hole: of the same size, white where to repaint.
    """

    task: str
    words: str = ""
    picture: Any = None
    hole: Any = None


@dataclass(frozen=True)
class World:
    """Scenes, words about them, and an exact reader. The `__init__` of its folder makes one, of `later` functions.

    Attributes:
        name: of its model, of `unidiff eval MODEL --suite NAME` and of the benchmark's suite.
        model: folder of the pipeline that ships with it.
        prompts: () -> sentences that its models can draw.
        demo: (pipe, folder, seed) -> the files it wrote; `demo_files` are their names.
        evaluate: (pipe, seed, n, per_task, tasks, batch_size, tick, kept, options of every decode) -> `EvaluationReport`;
            `tasks` may name metrics, tick(more, total, what) is told how many cases are done, of how many, and what comes
            next, and `kept` is a `KeptRows` of what is done already.
        benchmark: () -> `JudgedTasks`, what the benchmark of decodes asks.
        reward: (pipe, seed, kinds) -> a reward of prompts and pictures, and prompts by number.
        pictures: (profile, kinds, seed) -> a picture by number, float32 `[3, H, W]` in [0, 1].
        examples: (pipe) -> `TaskExample`s of what its models can do.
        cells: (profile, factor) -> every cell of every object on all backgrounds, and the cells of these alone.
    """

    name: str
    model: Path | None
    prompts: Callable[[], list[str]]
    demo: Callable[..., tuple[Path, ...]]
    demo_files: tuple[str, ...]
    evaluate: Callable[..., Any]
    benchmark: Callable[[], Any]
    reward: Callable[..., tuple[Any, Callable[[int], str]]]
    pictures: Callable[..., Callable[[int], Any]]
    cells: Callable[..., tuple[Any, Any]]
    examples: Callable[[Any], Sequence[TaskExample]] = lambda pipe: ()


def later(place: str) -> Callable[..., Any]:
    """A function named `module:function` that is imported when it is called, so that to list worlds costs nothing."""
    module, _, name = place.partition(":")
    return lambda *args, **options: getattr(import_module(module), name)(*args, **options)


WORLDS: Registry[World] = Registry("worlds", "unidiff.worlds", lambda v: v.name if isinstance(v, World) else None)
