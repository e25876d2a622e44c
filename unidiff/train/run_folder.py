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

    That is a pipeline or the starting weights, a `config.yaml` of a person's own, or exports with other files among them.
    """
    out = Path(config.output)
    if out.exists() and not out.is_dir():
        raise ValueError(f"output = {config.output!r} is a file; name a folder")
    place = out.resolve()
    for folder in (place, *place.parents):
        if (folder / "model_index.json").exists():
            raise ValueError(
                f"output = {config.output!r} is in the pipeline folder {str(folder)!r}; name another folder"
            )
    if config.checkpoint.init_from:
        start = Path(config.checkpoint.init_from).resolve()
        if place == start or start in place.parents:
            raise ValueError(
                f"output = {config.output!r} is in the folder of the starting weights; name another folder"
            )
        for name in _REPLACED:
            target = (place / name).resolve()
            if target == start or target in start.parents:
                raise ValueError(
                    f"the starting weights, {config.checkpoint.init_from!r}, would be replaced by this run's own "
                    f"{name}; name another output="
                )
    settings = out / "config.yaml"
    ours = (out / "checkpoints").is_dir() or (out / "metrics.jsonl").is_file()
    if settings.exists() and not ours and not (settings.is_file() and settings.read_bytes().startswith(MARK.encode())):
        raise ValueError(f"'{settings}' is of no run and would be replaced; name another output=, or move it")
    for name in EXPORTS:
        check_replaceable(out / name)


def check_replaceable(folder: Path) -> None:
    """Raise ValueError where `folder` holds anything that is no export of a run."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file where the run puts its model; move it")
    if folder.exists() and (foreign := others_in_model(folder)):
        raise ValueError(
            f"{str(folder)!r} holds {', '.join(foreign[:3])}, which the run's export would remove; move it elsewhere"
        )
