"""`RefreshPolicy`: decides what each pass recomputes. A cache is a policy; the sampler does not know which."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from unidiff.decoding.state import DecodeState
from unidiff.models.partial import CachePlan


class RefreshPolicy(Protocol):
    """One object per sampler; state belongs to a request and starts afresh in `plan` at `state.nfe == 0`."""

    def plan(self, state: DecodeState, candidates: Tensor) -> CachePlan:
        """What the coming pass computes.

        Args:
            state: the decode so far.
            candidates: bool `[B, L]`, positions whose logits the commit rules would like to see.
        Returns:
            `query`: positions to recompute (others keep their last features; an empty one makes no pass);
            `logits`: candidates that may be committed now, None for all.
        """
        ...

    def select(self, layer: int, similarity: Tensor) -> Tensor | None:
        """Positions bool `[B, L]` that a layer recomputes, given how alike old and new values are `[B, L]`; None for
        those of the plan. Called by models that verify features layer by layer."""
        ...

    def observe(self, state: DecodeState, plan: CachePlan) -> None:
        """After commit and remask: `state.written` holds what the pass filled."""
        ...
