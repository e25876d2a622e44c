"""Optimisers, their learning rate, and the moving average of the weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Muon, Optimizer

from unidiff.errors import import_extra
from unidiff.train.config import OptimiserConfig, ScheduleConfig
from unidiff.train.run.distributed import local, whole

_INSIDE_BLOCK = re.compile(r"(^|[._])(blocks?|layers)\.\d+\.")


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

    Muon takes the matrices inside blocks (names with `block.N.`, `blocks.N.` or `layers.N.`); AdamW takes the rest, with weight decay
    on matrices only, never on norms, biases and embeddings' one-dimensional companions. With `state_bits` 8, AdamW's moments
    are torchao's (see `_adamw_8bit`) and Muon's stay in 32 bits.
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
            "adamw": _adamw_8bit(groups, config)
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
                group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate
        return self._peaks["adamw"] * factor

    def clip(self) -> Tensor:
        """Clip the gradients' global norm, over all shards, to `config.clip`; returns the norm before (0-d tensor)."""
        return whole(nn.utils.clip_grad_norm_(self.parameters, self.config.clip))

    def step(self, taken: Tensor | None = None) -> None:
        """Change the weights, unless `taken`, a bool scalar beside them, is False: fused AdamW finds that out on the device,
        for others the host waits."""
        if taken is not None and not all(o.defaults.get("fused") for o in self.optimisers.values()) and not bool(taken):
            return
        with uncompiled(self.parameters) if self.low_bit else nullcontext():
            for optimiser in self.optimisers.values():
                if taken is not None and optimiser.defaults.get("fused"):
                    optimiser.found_inf = (~taken).float()  # type: ignore[attr-defined]  # as GradScaler says it
                optimiser.step()

    def zero_grad(self) -> None:
        for optimiser in self.optimisers.values():
            optimiser.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Every state tensor, named `optimiser.parameter number.field`; scalars as 0-d tensors, 8-bit fields in two parts."""
        flat: dict[str, Tensor] = {}
        for name, optimiser in self.optimisers.items():
            for number, entry in optimiser.state_dict()["state"].items():
                for key, value in entry.items():
                    parts = {f".{p}": getattr(value, p) for p in _PARTS} if hasattr(value, "codes") else {"": value}
                    flat |= {f"{name}.{number}.{key}{end}": torch.as_tensor(part) for end, part in parts.items()}
        return flat

    def owner(self, key: str) -> nn.Parameter | None:
        """The parameter that the state tensor `key` (a name of `state`) belongs to; None for a name of another run."""
        name, number, _ = key.split(".", 2)
        owned = self._owned(name)
        return owned[int(number)] if int(number) < len(owned) else None

    def _owned(self, name: str) -> list[nn.Parameter]:
        groups = self.optimisers[name].param_groups if name in self.optimisers else []
        return [p for group in groups for p in group["params"]]

    def load_state(self, flat: dict[str, Tensor]) -> None:
        """Inverse of `state`. Raises ValueError when it belongs to another optimiser or model."""
        if stray := {k.split(".")[0] for k in flat} - set(self.optimisers):
            raise ValueError(
                f"the checkpoint holds the state of {sorted(stray)}, this run uses {sorted(self.optimisers)}"
            )
        if not self.low_bit and any(key.endswith(".codes") for key in flat):
            raise ValueError("the checkpoint's AdamW state has 8 bits, this run's 32; set optimiser.state_bits=8")
        for name, optimiser in self.optimisers.items():
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in flat.items():
                owner, number, entry = key.split(".", 2)
                if owner == name:
                    state.setdefault(int(number), {})[entry] = value.clone()
            owned = self._owned(name)
            if state and len(state) != len(owned):
                raise ValueError(
                    f"the checkpoint's {name} state has {len(state)} parameters, the model has {len(owned)}"
                )
            if self.low_bit and name == "adamw":
                state = {number: _packed(entry, owned[number]) for number, entry in state.items()}
            optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


class EMA:
    """float32 averages of a model's parameters, sharded where they are.

    After update n (counted from 0) the decay is min(decay, (1 + n) / (warmup + n)), so early averages follow the model.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: float = 10.0) -> None:
        self.decay, self.warmup = decay, warmup
        self._source = dict(model.named_parameters())
        self.average: dict[str, Tensor] = {n: p.detach().clone().float() for n, p in self._source.items()}
        self._updates = torch.zeros((), dtype=torch.float64, device=next(iter(self.average.values())).device)

    @property
    def updates(self) -> int:
        """Updates done; the host waits for the device to say it."""
        return int(self._updates)

    @torch.no_grad()
    def update(self, taken: Tensor | None = None) -> Tensor:
        """Fold the current weights in, unless `taken`, a bool scalar beside them, is False; returns the decay, a scalar."""
        decay = ((1 + self._updates) / (self.warmup + self._updates)).clamp_max(self.decay)
        one = torch.ones_like(decay) if taken is None else taken.double()
        share = (one * (1 - decay)).float()
        for average, source in zip(self.average.values(), self._source.values(), strict=True):
            local(average).lerp_(local(source.detach()).float(), share)
        self._updates += one
        return decay

    @torch.no_grad()
    def load(self, average: dict[str, Tensor], updates: int) -> None:
        """Take over saved averages. Raises ValueError when names disagree."""
        if set(average) != set(self.average):
            raise ValueError(f"saved averages name other parameters: {sorted(set(average) ^ set(self.average))[:4]}")
        for name, value in average.items():
            self.average[name].copy_(value)
        self._updates.fill_(updates)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model holds the averages; afterwards the exact training weights again."""
        kept = {n: local(p.detach()).clone() for n, p in self._source.items()}
        try:
            self._put(self.average)
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self._source.items():
            local(parameter).copy_(local(weights[name]))


_BLOCK, _SMALLEST = 256, 4096
_PARTS = ("codes", "scale")  # uint8, of the parameter's shape; float32, one per block. The table of levels is fixed.


def _adamw_8bit(groups: list[dict[str, Any]], config: OptimiserConfig) -> Optimizer:
    """AdamW whose moments are kept in 8 bits, by torchao (Dettmers et al. 2021, arXiv 2110.02861).

    256 neighbouring values share a float32 scale. Moments of parameters with fewer than 4,096 values, or not made of whole
    blocks, stay in float32; so do the weights, and the arithmetic of an update. Raises ValueError where torchao is not
    installed, or parameters are sharded: blocks would not fit another number of shards.
    """
    absent = "needs torchao; run pip install 'unidiff[quantise]' or set optimiser.state_bits=32"
    optimisers = import_extra("torchao.optim", f"optimiser.state_bits = 8 {absent}")
    if any(isinstance(p, DTensor) for group in groups for p in group["params"]):
        raise ValueError(
            "optimiser.state_bits = 8 does not go with parallel.mode=fsdp, which shards the state already; "
            "set parallel.mode=ddp or optimiser.state_bits=32"
        )
    return optimisers.AdamW8bit(groups, config.lr, (config.beta1, config.beta2), config.eps, block_size=_BLOCK)


def uncompiled(parameters: list[nn.Parameter]) -> AbstractContextManager[object]:
    """Around `step`: torchao compiles the update, which is wanted on CUDA and needs a C++ compiler on the CPU."""
    if any(p.device.type == "cuda" for p in parameters):
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _packed(entry: dict[str, Tensor], parameter: nn.Parameter) -> dict[str, Any]:
    """The state of `parameter` with moments in two parts put together. Raises ValueError where they were kept in 32 bits."""
    from torchao.optim.subclass_8bit import OptimState8bit

    large = parameter.numel() >= _SMALLEST and parameter.numel() % _BLOCK == 0
    if large and "exp_avg" in entry:
        raise ValueError("the checkpoint's AdamW state has 32 bits, this run's 8; set optimiser.state_bits=32")
    state: dict[str, Any] = {key: value for key, value in entry.items() if "." not in key}
    for key in {key.split(".")[0] for key in entry} - set(state):
        # the first moment has a sign, the second has none
        value = OptimState8bit.zeros(parameter.shape, key == "exp_avg", _BLOCK, parameter.device, parameter.dtype)
        for part in _PARTS:
            getattr(value, part).copy_(entry[f"{key}.{part}"])
        state[key] = value
    return state
