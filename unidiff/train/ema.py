"""Exponential moving average of the weights, with a decay that warms up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from unidiff.train.run.distributed import local


class EMA:
    """float32 averages of a model's parameters, sharded where they are.

    After update n (counted from 0) the decay is min(decay, (1 + n) / (warmup + n)), so early averages follow the model.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: float = 10.0) -> None:
        self.decay, self.warmup, self.updates = decay, warmup, 0
        self._source = dict(model.named_parameters())
        self.average: dict[str, Tensor] = {n: p.detach().clone().float() for n, p in self._source.items()}

    @torch.no_grad()
    def update(self) -> float:
        """Fold the current weights in; returns the decay used."""
        decay = min(self.decay, (1 + self.updates) / (self.warmup + self.updates))
        current = [local(p.detach()).float() for p in self._source.values()]
        torch._foreach_lerp_([local(a) for a in self.average.values()], current, 1 - decay)
        self.updates += 1
        return decay

    @torch.no_grad()
    def load(self, average: dict[str, Tensor], updates: int) -> None:
        """Take over saved averages. Raises ValueError when names disagree."""
        if set(average) != set(self.average):
            raise ValueError(f"saved averages name other parameters: {sorted(set(average) ^ set(self.average))[:4]}")
        for name, value in average.items():
            self.average[name].copy_(value)
        self.updates = updates

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model holds the averages; afterwards the exact training weights again."""
        kept = {n: local(p.detach()).clone() for n, p in self._source.items()}
        try:
            with torch.no_grad():
                for name, parameter in self._source.items():
                    local(parameter).copy_(local(self.average[name]))
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._source.items():
                    local(parameter).copy_(kept[name])
