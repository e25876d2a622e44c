"""Optimiser and learning-rate schedule from settings."""

from __future__ import annotations

import math
import re
from contextlib import nullcontext

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from unidiff.train.config import OptimiserConfig, ScheduleConfig
from unidiff.train.low_bit import adamw_8bit, packed, uncompiled, unpacked
from unidiff.train.run.distributed import whole

_INSIDE_BLOCK = re.compile(r"(^|\.)(blocks|layers)\.\d+\.")


def learning_rate_factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """Factor on the peak rate at `step` (0-based) of `steps`: linear warm-up, then the named shape down to `floor`."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.name == "constant":
        return 1.0
    if config.name == "cosine":
        done = (step - config.warmup) / max(1, steps - config.warmup)
        shape = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    else:
        start = max(config.warmup, steps - round(config.decay * steps))
        shape = 1.0 if step < start else 1 - math.sqrt(min(1.0, (step - start) / max(1, steps - start)))
    return config.floor + (1 - config.floor) * shape


class Optimisers:
    """One or two torch optimisers that step together. Every parameter belongs to exactly one.

    Muon takes the matrices inside blocks (names with `blocks.N.` or `layers.N.`); AdamW takes the rest, with weight decay
    on matrices only, never on norms, biases and embeddings' one-dimensional companions. With `state_bits` 8, AdamW's moments
    are torchao's (see `unidiff.train.low_bit`) and Muon's stay in 32 bits.

    Raises:
        ValueError: torchao is missing, or does not go with how the model is spread.
    """

    def __init__(self, model: nn.Module, config: OptimiserConfig) -> None:
        self.config = config
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        inner = [p for n, p in named if p.ndim == 2 and _INSIDE_BLOCK.search(n) and "embed" not in n]
        muon = {id(p) for p in inner} if config.name == "muon" else set()
        rest = [p for _, p in named if id(p) not in muon]
        groups = [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [g for g in groups if g["params"]]
        self.low_bit = config.state_bits == 8
        self.optimisers: dict[str, Optimizer] = {
            "adamw": adamw_8bit(groups, config)
            if self.low_bit
            else AdamW(groups, config.lr, (config.beta1, config.beta2), config.eps, fused=True)
        }
        self._peaks = {"adamw": config.lr, "muon": config.muon_lr or config.lr}
        if muon:
            self.optimisers["muon"] = Muon(
                inner, self._peaks["muon"], config.weight_decay, config.momentum, adjust_lr_fn="match_rms_adamw"
            )

    def set_rate(self, factor: float) -> float:
        """Scale every group's peak rate; returns AdamW's rate."""
        for name, optimiser in self.optimisers.items():
            for group in optimiser.param_groups:
                rate = self._peaks[name] * factor
                # a tensor's value changes in place: compiled updates hold on to it
                group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], torch.Tensor) else rate
        return self._peaks["adamw"] * factor

    def clip(self) -> torch.Tensor:
        """Clip the gradients' global norm, over all shards, to `config.clip`; returns the norm before (0-d tensor)."""
        return whole(nn.utils.clip_grad_norm_(self.parameters, self.config.clip))

    def step(self) -> None:
        with uncompiled(self.parameters) if self.low_bit else nullcontext():
            for optimiser in self.optimisers.values():
                optimiser.step()

    def zero_grad(self) -> None:
        for optimiser in self.optimisers.values():
            optimiser.zero_grad(set_to_none=True)

    def state(self) -> dict[str, torch.Tensor]:
        """Every state tensor, named `optimiser.parameter number.field`; scalars as 0-d tensors, 8-bit fields in two parts."""
        flat = {}
        for name, optimiser in self.optimisers.items():
            for number, entry in optimiser.state_dict()["state"].items():
                for key, value in (unpacked(entry) if self.low_bit else entry).items():
                    flat[f"{name}.{number}.{key}"] = torch.as_tensor(value)
        return flat

    def owner(self, key: str) -> nn.Parameter | None:
        """The parameter that the state tensor `key` (a name of `state`) belongs to; None for a name of another run."""
        name, number, _ = key.split(".", 2)
        groups = self.optimisers[name].param_groups if name in self.optimisers else []
        owned = [p for group in groups for p in group["params"]]
        return owned[int(number)] if int(number) < len(owned) else None

    def load_state(self, flat: dict[str, torch.Tensor]) -> None:
        """Inverse of `state`. Raises ValueError when it belongs to another optimiser or model."""
        if stray := {k.split(".")[0] for k in flat} - set(self.optimisers):
            raise ValueError(
                f"the checkpoint holds the state of {sorted(stray)}, this run uses {sorted(self.optimisers)}"
            )
        if not self.low_bit and any(key.endswith(".codes") for key in flat):
            raise ValueError("the checkpoint's AdamW state has 8 bits, this run's 32; set optimiser.state_bits=8")
        for name, optimiser in self.optimisers.items():
            state: dict[int, dict[str, torch.Tensor]] = {}
            for key, value in flat.items():
                owner, number, entry = key.split(".", 2)
                if owner == name:
                    state.setdefault(int(number), {})[entry] = value.clone()
            owned = [p for group in optimiser.param_groups for p in group["params"]]
            if state and len(state) != len(owned):
                raise ValueError(
                    f"the checkpoint's {name} state has {len(state)} parameters, the model has {len(owned)}"
                )
            if self.low_bit and name == "adamw":
                state = {number: packed(entry, owned[number]) for number, entry in state.items()}
            optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
