"""Schedulers as diffusers has them: ours in its loops, and its discrete ones as commit rules of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers

from unidiff.errors import read_json
from unidiff.schedulers.rule import DISCRETE
from unidiff.schedulers.unmasking import UnmaskingScheduler

__all__ = ["DISCRETE", "UnmaskingScheduler", "load_scheduler"]


def load_scheduler(folder: Path) -> Any:
    """The scheduler that a pipeline folder holds; None for a folder without one.

    Raises:
        ValueError: a scheduler that does not work in tokens, or one that the installed diffusers does not have.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return None
    config = read_json(path, "a scheduler's config")
    if (name := config.get("_class_name")) == UnmaskingScheduler.__name__:
        return UnmaskingScheduler.from_config(config)
    if name not in DISCRETE or not hasattr(diffusers, name):
        known = [UnmaskingScheduler.__name__, *(other for other in DISCRETE if hasattr(diffusers, other))]
        raise ValueError(f"{path} names the scheduler {name!r:.80}; expected one of {', '.join(known)}")
    return getattr(diffusers, name).from_config(config)
