"""LLaDA2.0-Uni's "Sprint" (inclusionAI 2026): the passes of a block look at a part of what stands before it.

For comparisons: it recomputes everything before a block when this begins, where `BlockCausalCache` keeps it, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from unidiff.decoding.cache.base import StoringPolicy, StreamPlan
from unidiff.decoding.state import DecodeState
from unidiff.models.denoiser import PartialDenoiser
from unidiff.models.store import FeatureStore, KeysSeen
from unidiff.schema import Between
from unidiff.tokens import Modality, TokenBatch

Share = Annotated[float, Between(0, 1)]
_AT_ONCE = 64  # positions whose logits over all ids are held at once


@runtime_checkable
class PruningPolicy(Protocol):
    """A cache whose passes look at some keys alone."""

    def open(self, store: FeatureStore) -> None:
        """Before the first pass: the empty store of all streams."""
        ...

    def keys_seen(self, stream: int) -> KeysSeen | None:
        """Which keys the coming pass of a stream looks at, in rows where these are not all that it may see."""
        ...

    def keep(self, stream: int, ids: Tensor, store: FeatureStore, head: Callable[[Tensor], Tensor]) -> None:
        """After a pass of a stream: its tokens int64 `[B, L]`, its features, and what makes logits over all ids of these."""
        ...


@dataclass
class SprintCache(StoringPolicy):
    """The first `warmup` passes of a block recompute it and everything before it. The others recompute the block alone, which then
    sees, in every layer, a share of the tokens before it: pinned ones, and those of the largest

        importance = weight |key| / mean |key| + (1 - weight) (probability of the best token),

    whose keys are averaged over their heads. Where anything is pinned, the mean is infinite and keys play no part: so it is in
    the reference implementation. Unlike there, rows share batches.

    As in the reference implementation, padding before the unconditional rows is kept and seen like tokens, all of it at the place of
    the first token.

    Args:
        keep_ratio: share of the tokens before a block that it sees, those that are pinned among them; at least these.
        warmup: passes of a block that recompute everything.
        weight: of the keys' lengths, against the probabilities.
        keep_text, keep_images: pin all tokens of a modality (upstream's ratios of 1; other values of these change nothing).
        first_code: id from which on a token counts as one of an image; None goes by the modality of its position.
    """

    name = "sprint"
    append_only = whole_rows = by_stream = True
    keep_ratio: Share = 0.7
    warmup: Annotated[int, Between(1)] = 2
    weight: Share = 0.5
    keep_text: bool = True
    keep_images: bool = False
    first_code: Annotated[int, Between(0)] | None = None
    rotated: bool = True
    _blocks: Tensor = field(init=False, repr=False, compare=False)  # [B, L], attention block of every position
    _image: Tensor = field(init=False, repr=False, compare=False)  # [B, L], positions of images
    _seen: dict[int, KeysSeen] = field(init=False, repr=False, compare=False)
    _before: dict[int, Tensor] = field(init=False, repr=False, compare=False)  # [B, L], what stands before the block
    _block: dict[int, Tensor] = field(init=False, repr=False, compare=False)  # [B, L], the block
    _due: dict[int, Tensor] = field(init=False, repr=False, compare=False)  # [B], rows that choose after this pass

    def start(self, batch: TokenBatch, model: Any) -> Self:
        """See `RefreshPolicy.start`; `ValueError` for a model that is not block-causal."""
        length = model.traits.block_length if isinstance(model, PartialDenoiser) else None
        if length is None:
            raise ValueError("SprintCache needs a model with attention='block_causal'; use PrefixCache or DualCache")
        request = super().start(batch, model)
        request._blocks = torch.div(batch.positions[..., 0], length, rounding_mode="floor")
        request._image = batch.modality == Modality.IMAGE
        request._seen, request._before, request._block, request._due = {}, {}, {}, {}
        return request

    def plan_stream(self, state: DecodeState, candidates: Tensor, stream: int, rows: Tensor) -> StreamPlan:
        notes, exists = self.past(state, stream).notes, state.exists
        last = torch.where(candidates, self._blocks, -1).amax(1)  # [B]
        known = notes.get("block", torch.full_like(last, -1))
        rows = rows & (last >= 0)
        begun = rows & (last != known)
        made = torch.where(begun, 0, notes.get("made", torch.zeros_like(last)))
        before, block = (exists & (self._blocks < last[:, None])), exists & (self._blocks == last[:, None])
        pruned = rows & (made >= self.warmup) & before.any(1)
        self._before[stream], self._block[stream] = before, block
        self._due[stream] = rows & (made == self.warmup - 1) & before.any(1)
        if stream in self._seen:
            self._seen[stream] = self._seen[stream]._replace(rows=pruned)
        query = (block | (before & ~pruned[:, None])) & rows[:, None]
        noted = {"block": torch.where(rows, last, known), "made": made + rows.long()}
        return StreamPlan(query, torch.zeros_like(rows), notes=noted)

    def open(self, store: FeatureStore) -> None:
        assert store.allowed is not None  # of a block-causal network
        seen = store.allowed.any(2)[:, 0]  # [B, L], keys that some query sees
        first = seen.long().argmax(1)  # [B]
        for name in ("cos", "signed_sin"):
            table = store.inputs[name]
            own = table[torch.arange(len(first), device=table.device), first]
            where = seen.view(*seen.shape, *[1] * (table.ndim - 2))
            store.inputs[name] = torch.where(where, table, own[:, None])

    def keys_seen(self, stream: int) -> KeysSeen | None:
        return self._seen.get(stream)

    def keep(self, stream: int, ids: Tensor, store: FeatureStore, head: Callable[[Tensor], Tensor]) -> None:
        due, before = self._due[stream], self._before[stream]
        if not bool(due.any()):
            return
        hidden = store.hidden[:, :-1].split(_AT_ONCE, dim=1)
        sure = torch.cat([_best_probability(head(part)) for part in hidden], dim=1)  # [B, L]
        image = self._image if self.first_code is None else ids >= self.first_code
        pinned = before & torch.where(image, self.keep_images, self.keep_text)
        count = before.sum(1)  # [B]
        wanted = count if self.keep_ratio >= 1 else (count.double() * self.keep_ratio).floor().long().clamp_min(1)
        wanted = torch.maximum(wanted, pinned.sum(1))
        layers = [self._chosen(layer, store, sure, pinned, wanted, before) for layer in range(store.layers)]
        seen = torch.stack(layers) | self._block[stream]  # [layers, B, L]
        if (then := self._seen.get(stream)) is not None:
            seen = torch.where(due[:, None], seen, then.keys)
        self._seen[stream] = KeysSeen(due, seen)

    def _chosen(
        self, layer: int, store: FeatureStore, sure: Tensor, pinned: Tensor, wanted: Tensor, before: Tensor
    ) -> Tensor:
        """bool `[B, L]`: what a layer looks at."""
        length = store.keys(layer).float().norm(dim=-1).mean(1)  # [B, L]
        mean = (length * before).sum(1, keepdim=True) / before.sum(1, keepdim=True).clamp_min(1)
        value = self.weight * length / mean.clamp_min(1e-6) + (1 - self.weight) * sure
        if self.weight < 1:
            value = torch.where(pinned.any(1, keepdim=True), (1 - self.weight) * sure, value)
        value = value.masked_fill(pinned, torch.inf).masked_fill(~before, -torch.inf)
        rank = value.argsort(dim=1, descending=True, stable=True).argsort(1)
        return before & (rank < wanted[:, None])


def keys_seen_by(streams: Sequence[KeysSeen | None]) -> KeysSeen | None:
    """Those of all rows of some streams; a stream of which nothing is said looks at all that it may see."""
    known = next((own for own in streams if own is not None), None)
    if known is None:
        return None
    whole = KeysSeen(torch.zeros_like(known.rows), known.keys)
    rows, keys = zip(*(own or whole for own in streams), strict=True)
    return KeysSeen(torch.cat(rows), torch.cat(keys, dim=1))


def _best_probability(logits: Tensor) -> Tensor:
    """`[..., V]` to `[...]`."""
    return (logits.amax(-1) - logits.logsumexp(-1)).exp()
