"""What one model pass is asked to compute: the seam between a cache policy and the sampler."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class CachePlan:
    """Which positions a pass recomputes and where logits are wanted.

    Attributes:
        query: bool `[B, L]`, positions whose features are recomputed; None for all of them.
        logits: bool `[B, L]`, positions whose logits the caller reads; None for all of them.
        full: True when every feature is computed afresh, so nothing stored from earlier passes is used.
    """

    query: Tensor | None = None
    logits: Tensor | None = None
    full: bool = True

    def __post_init__(self) -> None:
        for name, positions in (("query", self.query), ("logits", self.logits)):
            if positions is not None and (positions.ndim != 2 or positions.dtype.is_floating_point):
                raise ValueError(
                    f"CachePlan.{name} has shape {tuple(positions.shape)} and dtype {positions.dtype}; expected bool [B, L]"
                )
        if self.full and self.query is not None:
            raise ValueError("a full CachePlan recomputes every position; leave query out or set full=False")
