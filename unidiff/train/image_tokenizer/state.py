"""What an image tokenizer's run goes on from: a `RunCheckpoint` with the state of AdamW and of the codebook."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from unidiff.files import file_stamp

FREE = ("out", "steps", "device", "threads", "log_every", "validate_every", "checkpoint_every", "fallback")
"""Settings that may be others when a run goes on."""


@dataclass(frozen=True)
class RunState:
    """Plain data of a checkpoint.

    Attributes:
        step: taken so far, those of the encoder alone (`cells.steps`) included.
        settings: of the run by dotted name. facts: about its data and its first weights.
        position: in the pictures. random: state of the generator, in hexadecimal.
        level: of the spike guard, None before its first step; skipped: steps that it left out.
        best: PSNR of the kept model, None before the first. found: about the codes of single cells. seconds: of work.
        sums: named by checkpoints themselves.
    """

    step: int
    settings: dict[str, Any]
    facts: dict[str, Any]
    position: dict[str, Any]
    random: str
    level: float | None
    skipped: int
    best: float | None
    found: dict[str, Any]
    seconds: float
    sums: str = ""


def adamw_state(optimiser: AdamW) -> dict[str, Tensor]:
    """Every state tensor, named `parameter number.field`."""
    state = optimiser.state_dict()["state"]
    return {
        f"{number}.{key}": torch.as_tensor(value) for number, entry in state.items() for key, value in entry.items()
    }


def load_adamw_state(optimiser: AdamW, flat: Mapping[str, Tensor]) -> None:
    """Inverse of `adamw_state`. Moments get their parameters' strides, with which they were computed.

    Raises:
        ValueError: the state is of other parameters.
    """
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    fields = ("exp_avg", "exp_avg_sq", "step")
    expected = {f"{number}.{key}" for number in {int(name.partition(".")[0]) for name in flat} for key in fields}
    if set(flat) != expected:
        raise ValueError("the checkpoint holds no state of AdamW")
    for name, value in flat.items():
        number, _, key = name.partition(".")
        if int(number) >= len(parameters) or (key != "step" and value.shape != parameters[int(number)].shape):
            raise ValueError("the checkpoint holds AdamW's state of another model")
        parameter = parameters[int(number)]
        kept = value.clone() if key == "step" else torch.empty_like(parameter).copy_(value)
        optimiser.state[parameter][key] = kept.detach()


def flat_settings(config: Any) -> dict[str, Any]:
    """Every setting by its dotted name, as plain JSON data."""
    found: dict[str, Any] = {}

    def visit(values: Mapping[str, Any], before: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                visit(value, f"{before}{name}.")
            else:
                found[f"{before}{name}"] = list(value) if isinstance(value, tuple) else value

    visit(asdict(config), "")
    return found


def check_same(old: RunState, settings: Mapping[str, Any], facts: Mapping[str, Any], folder: Path) -> None:
    """Raise `ValueError` with both values where a run differs from the one that wrote a checkpoint."""
    for kind, before, now in (("", old.settings, settings), ("the content of ", old.facts, facts)):
        there = {*now} if kind == "" else {*before, *now}  # settings that are no more changed nothing
        for name in sorted(there - set(FREE)):
            if before.get(name) != now.get(name):
                raise ValueError(
                    f"the run in {str(folder)!r} has {kind}{name} = {before.get(name)!r}, this one {now.get(name)!r}; "
                    "use the same to continue it, or another out= (with init_from= to train its model on)"
                )


def weights_stamp(folder: str | None) -> dict[str, str]:
    """Hashes of the weights files in a folder, to know them again."""
    files = sorted(Path(folder).glob("*.safetensors")) if folder else []
    return {path.name: str(file_stamp(path)["hash"]) for path in files}
