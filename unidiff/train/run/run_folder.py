"""The folder of a run: what may be in it when a run begins, and the exports that are written into it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from unidiff.files import flush_to_disk, replacing_folder
from unidiff.models.trained_on import TrainedOn
from unidiff.models.transformer import MaskedTransformer
from unidiff.pipelines.owned import others_in_model
from unidiff.tokens import Vocabulary
from unidiff.train.run.checkpoint import holds_checkpoints

MARK = "# Settings of the last start of this run, written by unidiff.\n"
SETTINGS = "config.yaml"
WRITTEN = (SETTINGS, "model", "model-best")
"""What a model's training replaces in its folder."""
_REPLACED = (*WRITTEN[1:], "pipeline")  # the last one by training/finetune.py


def check_run_folder(out: Path, setting: str, started_from: str | None, written: Iterable[str] = WRITTEN) -> None:
    """Raise ValueError, naming it, for an output folder in which a run would spoil something else.

    That is a pipeline or the starting weights, a `config.yaml` of a person's own, exports with other files among them, or
    the model of a run whose checkpoints are gone.

    Args:
        setting: what a person types for `out`. started_from: folder of the starting weights, if any.
        written: names that the run replaces in `out`, folders (of models) without an ending.
    """
    _check_place(out, setting, started_from)
    checkpoints = out / "checkpoints"
    for path in (out / name for name in written):
        if path.name == SETTINGS:
            ours = checkpoints.is_dir() or (out / "metrics.jsonl").is_file() or not path.exists()
            if not ours and not (path.is_file() and path.read_bytes().startswith(MARK.encode())):
                raise ValueError(f"'{path}' is of no run and would be replaced; name another {setting}=, or move it")
            continue
        if not path.suffix:
            check_replaceable(path)
        if holds_something(path) and not holds_checkpoints(checkpoints):
            kind = path.name if path.suffix else f"a {path.name}"
            raise ValueError(
                f"{str(out)!r} holds {kind} and no checkpoint to go on from; name another {setting}= (the {path.name} would "
                "be replaced)"
            )


def _check_place(out: Path, setting: str, started_from: str | None) -> None:
    """Raise ValueError for the output of a run that is a file, in a pipeline, or among its own starting weights."""
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


def write_export(
    folder: Path, model: MaskedTransformer, vocabulary: Vocabulary, trained: TrainedOn, started_from: str = ""
) -> None:
    """Write `folder` for `MaskedTransformer.from_pretrained`, with `vocabulary.json`; it appears whole or not at all.

    Args:
        trained: what the rows were. started_from: folder of the starting weights, if any.

    Raises:
        ValueError: weights that are not finite, or a folder that holds something else than an export.
        OSError: a full or read-only disk and the like.
    """
    for name, value in model.state_dict().items():
        if not torch.isfinite(value).all():
            hint = "set checkpoint.export_dtype=bfloat16, or " if value.dtype == torch.float16 else ""
            raise ValueError(
                f"the averaged weights {name} are not finite in {str(value.dtype)[6:]}, so nothing is exported; "
                f"{hint}lower optimiser.lr"
            )
    check_replaceable(folder)
    with replacing_folder(folder) as temporary:
        model.save_pretrained(temporary)
        (temporary / "vocabulary.json").write_text(json.dumps(vocabulary.to_dict(), indent=1), encoding="utf-8")
        trained.save(temporary, started_from=started_from or None)
        for path in temporary.iterdir():
            flush_to_disk(path)
