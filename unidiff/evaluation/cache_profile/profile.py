"""The premise of every cache, measured: how little features change from pass to pass.

A decode without a cache is watched. For every pass, layer and segment of the rows:

- the cosine, in float32 over the full width, between a position's features in successive passes, for the keys K (after
  QK norm), the values V, and what attention and feed-forward add to the residual stream (as a `FeatureStore` keeps them);
- Pearson's correlation over the positions between the change of V (1 - cosine) and the change of either output: what the
  comparison of values in `AdaptiveCache` relies on (dLLM-Cache, arXiv 2506.06295, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from unidiff.decoding import DecodeState, NoCache
from unidiff.decoding.cache.combined import SEGMENTS
from unidiff.models.partial import CachePlan, cosine
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Modality

FEATURES = ("K", "V", "AttnOut", "FFNOut")
PAIRS = ("V with AttnOut", "V with FFNOut")
_FEWEST = 3  # positions that a correlation needs


@dataclass(frozen=True)
class TaskProfile:
    """What one task's decode showed; NaN where a segment has no (or for correlations too few) positions.

    Attributes:
        similarity: float32 `[4, segments, passes, layers]` by `FEATURES`, mean cosine with the pass before.
        correlation: float32 `[2, segments, passes, layers]` by `PAIRS`.
        moved: float32 `[segments, passes, layers]`, share of positions whose AttnOut has a cosine below `keep`.
        tokens: mean number of positions of each segment in a row.
        keep: cosine down to which a feature counts as unchanged.

    The segments are `SEGMENTS`; the first pass has nothing to be compared with and is not among the passes.
    """

    similarity: Tensor
    correlation: Tensor
    moved: Tensor
    tokens: dict[str, float]
    keep: float

    @property
    def segments(self) -> list[str]:
        """Those that have positions."""
        return [name for name, count in self.tokens.items() if count > 0]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data: per segment and feature, `[passes][layers]`, None for NaN."""
        data: dict[str, Any] = {}
        for name in self.segments:
            s = SEGMENTS.index(name)
            own = dict(zip(FEATURES, self.similarity[:, s], strict=True))  # [passes, layers] each
            pairs = dict(zip(PAIRS, self.correlation[:, s], strict=True))
            data[name] = {
                "tokens": self.tokens[name],
                "mean": {key: _known(float(values.nanmean())) for key, values in (own | pairs).items()},
                "similarity": {key: _listed(values) for key, values in own.items()},
                "correlation": {key: _listed(values) for key, values in pairs.items()},
                "moved": _listed(self.moved[s]),
            }
        return data


@dataclass
class Watcher(NoCache):
    """Watches a decode without a cache; give it to a pipeline as its policy, inside `watch`.

    Args:
        keep: see `TaskProfile`.
    """

    keep: float = 0.95
    _now: dict[tuple[int, str], Tensor] = field(default_factory=dict, init=False, repr=False)
    _before: dict[tuple[int, str], Tensor] = field(default_factory=dict, init=False, repr=False)
    _passes: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list, init=False, repr=False)
    _counts: list[Tensor] = field(default_factory=list, init=False, repr=False)

    def start(self, batch: Any, model: Any) -> Watcher:
        """A request begins: nothing in it is compared with another one."""
        self._now, self._before = {}, {}
        return self

    def plan(self, state: DecodeState, candidates: Tensor) -> CachePlan:
        """See `RefreshPolicy.plan`."""
        return replace(super().plan(state, candidates), every_row=True)

    def note(self, layer: int, name: str, feature: Tensor) -> None:
        """A feature `[streams x B, L, D]` of the running pass."""
        self._now[layer, name] = feature

    def observe(self, state: DecodeState, plan: CachePlan) -> None:
        """See `RefreshPolicy.observe`: compare the pass with the one before, in rows that took part."""
        rows = len(state.ids)
        now = {key: feature[:rows].float() for key, feature in self._now.items()}  # the conditional stream
        if self._before:
            where = segments_of(state) & state.users[0][None, :, None]  # [segments, B, L]
            self._passes.append(self._compare(now, where))
            self._counts.append(where.sum((1, 2)) / state.users[0].sum().clamp_min(1))
        self._before = now

    def _compare(self, now: dict[tuple[int, str], Tensor], where: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Similarity `[4, segments, layers]`, correlation `[2, ...]` and moved share `[segments, layers]` of a pass."""
        layers = 1 + max(layer for layer, _ in now)
        similar, related, moved = [], [], []
        for layer in range(layers):
            own = torch.stack([cosine(now[layer, f], self._before[layer, f]) for f in FEATURES])  # [4, B, L]
            parts = [own[:, inside] for inside in where]  # [4, n] each
            similar.append(torch.stack([part.mean(1) for part in parts], 1))
            pairs = [torch.stack([pearson(1 - part[1], 1 - part[2 + i]) for i in range(2)]) for part in parts]
            related.append(torch.stack(pairs, 1))
            moved.append(torch.stack([(part[2] < self.keep).float().mean() for part in parts]))
        return torch.stack(similar, -1), torch.stack(related, -1), torch.stack(moved, -1)

    def profile(self) -> TaskProfile:
        """All passes so far.

        Raises:
            ValueError: no decode of at least two passes was watched.
        """
        if not self._passes:
            raise ValueError("nothing was compared; a profile needs a decode of at least 2 passes")
        similarity, correlation, moved = (torch.stack(parts, -2).cpu() for parts in zip(*self._passes, strict=True))
        mean = torch.stack(self._counts).mean(0).tolist()
        return TaskProfile(similarity, correlation, moved, dict(zip(SEGMENTS, mean, strict=True)), self.keep)


@contextmanager
def watch(model: MaskedTransformer, watcher: Watcher) -> Iterator[Watcher]:
    """Inside the block, `watcher` is told the features of every pass of the model."""
    handles = []

    def listen(module: nn.Module, layer: int, names: Sequence[str], pick: Callable[[Tensor], Sequence[Tensor]]) -> None:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            for name, feature in zip(names, pick(output), strict=True):
                watcher.note(layer, name, feature)

        handles.append(module.register_forward_hook(hook))

    for layer, block in enumerate(model.blocks):
        attention: Any = block.attention
        kv = attention.num_kv_heads * attention.head_dim
        listen(attention.qkv, layer, ("K", "V"), partial(_keys_and_values, kv))
        if attention.qk_norm != "none":  # runs behind the projection and replaces what was noted of it
            listen(attention.k_norm, layer, ("K",), lambda x: (x.flatten(2),))
        listen(block.attention_out_norm or attention.out, layer, ("AttnOut",), lambda x: (x,))  # type: ignore[arg-type]
        listen(block.ffn_out_norm or block.feed_forward, layer, ("FFNOut",), lambda x: (x,))  # type: ignore[arg-type]
    try:
        yield watcher
    finally:
        for handle in handles:
            handle.remove()


def _keys_and_values(width: int, projected: Tensor) -> Sequence[Tensor]:
    """The last two parts of a qkv projection `[B, L, ...]`, each `width` wide."""
    return projected[..., -2 * width :].split(width, -1)


def segments_of(state: DecodeState) -> Tensor:
    """bool `[segments, B, L]`, by `SEGMENTS`."""
    batch = state.batch
    image, prompt = batch.modality == Modality.IMAGE, batch.valid & batch.given
    return torch.stack([batch.targets & ~image, batch.targets & image, prompt & ~image, prompt & image])


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of two float vectors `[n]`; NaN where there are too few entries or one does not vary."""
    if a.numel() < _FEWEST:
        return torch.full((), torch.nan, device=a.device)
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    return ((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()).float()


def _known(value: float) -> float | None:
    return None if value != value else value


def _listed(values: Tensor) -> list[list[float | None]]:
    return [[_known(round(v, 6)) for v in line] for line in values.tolist()]
