"""The folder of a run: what may be in it when a run begins, and what an export may replace."""

from __future__ import annotations

from pathlib import Path

from unidiff.owned import others_in_model
from unidiff.train.config import TrainConfig

MARK = "# Settings of the last start of this run, written by unidiff.\n"
EXPORTS = ("model", "model-best")
_REPLACED = (*EXPORTS, "pipeline")  # the last one by training/finetune.py


def check_run_folder(config: TrainConfig) -> None:
    """Raise ValueError, naming it, for an output folder in which a run would spoil something else.

    That is a pipeline or the starting weights, a `config.yaml` of a person's own, exports with other files among them, or
    the model of a run whose checkpoints are gone.
    """
    out = Path(config.output)
    check_output(out, "output", config.checkpoint.init_from)
    checkpoints, settings = out / "checkpoints", out / "config.yaml"
    ours = checkpoints.is_dir() or (out / "metrics.jsonl").is_file()
    if settings.exists() and not ours and not (settings.is_file() and settings.read_bytes().startswith(MARK.encode())):
        raise ValueError(f"'{settings}' is of no run and would be replaced; name another output=, or move it")
    for name in EXPORTS:
        check_replaceable(out / name)
        if holds_something(out / name) and not holds_something(checkpoints):
            raise ValueError(
                f"{str(out)!r} holds a {name} and no checkpoint to go on from; name another output= (the {name} would be "
                "replaced)"
            )


def check_output(out: Path, setting: str, started_from: str | None) -> None:
    """Raise ValueError for the output of a run that is a file, in a pipeline, or among its own starting weights.

    Args:
        setting: what a person types for `out`. started_from: folder of the starting weights, if any.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{setting}={str(out)!r} is a file or a device; name a folder")
    checkpoints, place = out / "checkpoints", out.resolve()
    if checkpoints.exists() and not checkpoints.is_dir():
        raise ValueError(f"{str(checkpoints)!r} is a file where the run puts its checkpoints; move it")
    for folder in (place, *place.parents):
        if (folder / "model_index.json").exists():
            raise ValueError(f"{setting}={str(out)!r} is in the pipeline folder {str(folder)!r}; name another folder")
    if not started_from:
        return
    start = Path(started_from).resolve()
    if place == start or start in place.parents:
        raise ValueError(f"{setting}={str(out)!r} is in the folder of the starting weights; name another folder")
    for name in _REPLACED:
        target = (place / name).resolve()
        if target == start or target in start.parents:
            raise ValueError(
                f"the starting weights, {started_from!r}, would be replaced by this run's own {name}; name another {setting}="
            )


def holds_something(path: Path) -> bool:
    """Whether `path` is a file, or a folder that is not empty."""
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def check_replaceable(folder: Path) -> None:
    """Raise ValueError where `folder` holds anything that is no export of a run."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file where the run puts its model; move it")
    if folder.exists() and (foreign := others_in_model(folder)):
        raise ValueError(
            f"{str(folder)!r} holds {', '.join(foreign[:3])}, which the run's export would remove; move it elsewhere"
        )
