"""What an image tokenizer's run goes on from: plain data, and the state of AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW


@dataclass(frozen=True)
class TokenizerRunState:
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
    return {f"{n}.{key}": torch.as_tensor(value) for n, entry in state.items() for key, value in entry.items()}


def load_adamw_state(optimiser: AdamW, flat: Mapping[str, Tensor]) -> None:
    """Inverse of `adamw_state`. Moments get their parameters' strides, with which they were computed.

    Raises:
        ValueError, LookupError: the state is of other parameters.
    """
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    expected = {f"{name.partition('.')[0]}.{key}" for name in flat for key in ("exp_avg", "exp_avg_sq", "step")}
    if set(flat) != expected:
        raise ValueError("the checkpoint holds no state of AdamW")
    for name, value in flat.items():
        number, _, key = name.partition(".")
        parameter = parameters[int(number)]
        if key != "step" and value.shape != parameter.shape:
            raise ValueError("the checkpoint holds AdamW's state of another model")
        kept = value.clone() if key == "step" else torch.empty_like(parameter).copy_(value)
        optimiser.state[parameter][key] = kept.detach()
