"""A cache per segment: given and generated text and image tokens of one decode under different policies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unidiff.decoding.cache.base import Policy, RefreshPolicy, check_settings
from unidiff.decoding.cache.held import HeldGuidance
from unidiff.decoding.cache.modality import ModalityCache
from unidiff.decoding.cache.none import NoCache
from unidiff.decoding.cache.rows import Part, merged
from unidiff.decoding.state import DecodeState, ModalityProgress
from unidiff.models.partial import CachePlan
from unidiff.models.store import StoreOptions
from unidiff.tokens import Modality, TokenBatch

SEGMENTS = ("text", "image", "text_prompt", "image_prompt")


class Segment(NamedTuple):
    """Positions bool `[B, L]` of a row that follow one policy, and the modality whose blocks it goes by (None: all).

    rows: bool `[B]`, rows that have any; None for all.
    """

    where: Tensor
    modality: Modality | None
    policy: RefreshPolicy
    rows: Tensor | None = None

    def view(self, state: DecodeState) -> DecodeState:
        """The decode as this segment's policy sees it: the targets and the clock of its own modality."""
        if self.modality is None:
            return state
        progress: dict[Modality, ModalityProgress] = {m: c for m, c in state.progress.items() if m == self.modality}
        given = state.batch.given | (state.batch.valid & ~self.where)
        return replace(state, batch=state.batch.replace(given=given), progress=progress)


@dataclass
class SegmentCache(Policy):
    """Every segment of a row refreshes by its own policy; a pass recomputes the union of what they ask for.

    For example a long prompt every 20 passes, the block of the text in every pass, and the image tokens whose logits
    are low: `SegmentCache(text=DualCache(), image=MaxLogitCache(), text_prompt=IntervalCache(20), ...)`. Each policy
    sees the blocks, steps and candidates of its own modality only, so text and image do not compete in one ranking.
    Passes are counted by rows, whatever modality makes them. When one segment compares features layer by layer
    (`AdaptiveCache`), its `full_layers` are computed for all segments of the rows that have this one.

    Args:
        text, image: policies of the targets of either modality.
        text_prompt, image_prompt: policies of the given tokens.

    Raises:
        ValueError: a policy that speaks for whole rows: block-causal, modality-alternating, guidance intervals, segments.
    """

    text: RefreshPolicy = field(default_factory=NoCache)
    image: RefreshPolicy = field(default_factory=NoCache)
    text_prompt: RefreshPolicy = field(default_factory=NoCache)
    image_prompt: RefreshPolicy = field(default_factory=NoCache)
    _segments: tuple[Segment, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        check_settings(self)
        for name, policy in self._policies().items():
            if policy.append_only or isinstance(policy, (HeldGuidance, ModalityCache, SegmentCache)):
                raise ValueError(f"{type(policy).__name__} decides for whole rows and cannot be the policy of {name!r}")

    @property
    def store(self) -> StoreOptions | None:  # type: ignore[override]
        """What any of the policies needs."""
        return StoreOptions.all_of(policy.store for policy in self._policies().values())

    @property
    def max_logits(self) -> str | None:  # type: ignore[override]
        """The widest that any of the policies needs."""
        wanted = {policy.max_logits for policy in self._policies().values()}
        return "everywhere" if "everywhere" in wanted else "candidates" if "candidates" in wanted else None

    def start(self, batch: TokenBatch, model: Any) -> SegmentCache:
        """See `RefreshPolicy.start`."""
        started = {name: policy.start(batch, model) for name, policy in self._policies().items()}
        request = SegmentCache(**started)
        known = batch.valid & batch.given
        text, image = (batch.modality == m for m in (Modality.TEXT, Modality.IMAGE))
        parts = {
            "text": (batch.targets & text, Modality.TEXT),
            "image": (batch.targets & image, Modality.IMAGE),
            "text_prompt": (known & text, None),
            "image_prompt": (known & image, None),
        }
        request._segments = tuple(
            Segment(where, modality, started[name], None if bool(rows.all()) else rows)
            for name, (where, modality) in parts.items()
            if bool((rows := where.any(1)).any())
        )
        return request

    def plan(self, state: DecodeState, candidates: Tensor) -> CachePlan:
        """See `RefreshPolicy.plan`."""
        plans = [s.policy.plan(s.view(state), candidates & s.where) for s in self._segments]
        shown = torch.zeros_like(candidates)
        for segment, plan in zip(self._segments, plans, strict=True):
            own = candidates & segment.where
            shown = shown | (own if plan.logits is None else own & plan.logits)
        alike = state.alike()
        made: dict[tuple[int, ...], CachePlan] = {}
        of_stream: dict[int, CachePlan] = {}
        for stream, same in zip(state.streams, alike, strict=True):
            own_plans = [plan.of(stream) for plan in plans]
            key = (0 if same else stream, *map(id, own_plans))  # streams that do the same share a plan and a call
            if key not in made:
                made[key] = self._merge(state, shown, stream, own_plans)
            of_stream[stream] = made[key]
        first = of_stream.pop(0)
        others: Mapping[int, CachePlan] = {s: plan for s, plan in of_stream.items() if plan is not first}
        return first.with_streams(others) if others else first

    def select(self, layer: int, similarity: Tensor) -> Tensor | None:
        """Each policy picks among the compared positions of its own segment."""
        chosen = None
        for segment in self._segments:
            where = segment.where.repeat(len(similarity) // len(segment.where), 1)  # rows of all streams in the call
            own = segment.policy.select(layer, similarity.masked_fill(~where, torch.nan))
            if own is not None:
                chosen = own & where if chosen is None else chosen | (own & where)
        return chosen

    def observe(self, state: DecodeState, plan: CachePlan) -> None:
        """See `RefreshPolicy.observe`."""
        for segment in self._segments:
            segment.policy.observe(segment.view(state), plan)

    def _policies(self) -> dict[str, RefreshPolicy]:
        return {
            "text": self.text,
            "image": self.image,
            "text_prompt": self.text_prompt,
            "image_prompt": self.image_prompt,
        }

    def _merge(self, state: DecodeState, shown: Tensor, stream: int, plans: list[CachePlan | None]) -> CachePlan:
        """One plan of what all segments recompute in the rows that have a use for the stream."""
        parts = []
        for segment, plan in zip(self._segments, plans, strict=True):
            assert plan is not None  # only HeldGuidance, which is outside of this, leaves a stream out
            parts.append(Part(segment.where, plan, segment.rows))
        return merged(state, shown, state.users[stream], parts)
