"""`logits = forward(plan)`: the one place where the sampler reaches the model, with one stream per guidance condition."""

from __future__ import annotations

import time as wall
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from unidiff.decoding.cache.base import NoCache, RefreshPolicy
from unidiff.decoding.cache.sprint import PruningPolicy, keys_seen_by
from unidiff.decoding.draw import CHUNK, PositionLogits, gather_positions, spread_ratio
from unidiff.decoding.graphs import PassGraphs, recordable
from unidiff.decoding.stats import DecodeStats
from unidiff.models.denoiser import CachePlan, Denoiser, LayerWork, PartialDenoiser, check_features, check_head
from unidiff.models.parts import gather_rows, query_index
from unidiff.models.store import FeatureStore
from unidiff.tokens import Modality, TokenBatch, Visibility, Vocabulary


class StreamedModel:
    """Runs the model for one request and keeps the features of every guidance stream.

    A stream is B rows of one `FeatureStore`; streams that do the same in a pass run together. Where the policy asks for
    no store, or the model is no `PartialDenoiser`, a partial pass computes whole rows and keeps the queried positions.

    Args:
        model: see `Denoiser`.
        vocabulary: for [MASK] and the modality slices.
        batch: the request; its layout does not change.
        uncond_masks: bool `[B, L]` per unconditional stream, what it does not see.
        policy: of this request; no cache when left out.
        unconditional: the rows of streams 1, 2, ... where hiding does not make them, see `Sampler`.
        max_logits: filled with the largest logits where the policy wants them, see `DecodeState.max_logits`.
        graphs: record and replay passes of a `PartialDenoiser`; None runs all of them as they are.
    """

    def __init__(
        self,
        model: Denoiser,
        vocabulary: Vocabulary,
        batch: TokenBatch,
        uncond_masks: Sequence[Tensor],
        policy: RefreshPolicy | None = None,
        max_logits: dict[int, Tensor] | None = None,
        unconditional: Sequence[TokenBatch] = (),
        graphs: PassGraphs | None = None,
    ) -> None:
        self._partial = model if isinstance(model, PartialDenoiser) else None
        self._traits = None if self._partial is None else self._partial.traits
        self._graphs = graphs if self._traits is not None and self._traits.recordable else None
        share = 1 if self._traits is None else self._traits.codes_per_token
        images = int((batch.modality[0] == Modality.IMAGE).sum()) if share > 1 else 0
        self._tokens = batch.shape[1] - images + images // share  # of a row, in the layers
        self.denoiser, self._vocabulary, self._layout = model, vocabulary, batch
        self._policy: RefreshPolicy = NoCache() if policy is None else policy
        self._mask_ids = batch.mask_ids(vocabulary)
        nothing = torch.zeros_like(batch.given)
        self._uncond_masks = [nothing, *([nothing] * len(unconditional) if unconditional else uncond_masks)]
        self._layouts = [batch, *unconditional] if unconditional else [batch] * len(self._uncond_masks)
        self._joined: dict[tuple[int, ...], tuple[TokenBatch, Tensor | None]] = {}  # streams -> their rows and mask
        self._visible: list[Visibility | None] = []  # of each stream
        self._features: dict[int, Tensor] = {}  # stream -> [B, L, D]
        # streams in which rows keep their difference from the conditional one in this pass -> rows that do not, bool [B]
        self._held: dict[int, Tensor | None] = {}
        self._evaluated: dict[int, Tensor] = {}  # stream -> those rows, where not all do the same
        self._beside: dict[int, Tensor] = {}  # stream -> conditional features when its rows were last evaluated
        self._max_logits = {} if max_logits is None else max_logits
        self._narrow: dict[int, Tensor] = {}  # stream -> [B, L + 1, D], the same of some positions, with a spare one
        self._widest = 0  # positions whose logits a recorded pass showed
        self._targets: Tensor | None = None  # int64 [B, m], all positions whose features are ever read
        self._pruning = self._policy if isinstance(self._policy, PruningPolicy) else None
        everywhere = self._policy.max_logits == "everywhere" or self._pruning is not None
        self._narrows = self._traits is not None and self._traits.narrows and not everywhere
        if self._narrows and not self._policy.reads_shown:
            self._targets = query_index(batch.targets)
        self.store: FeatureStore | None = None
        if self._policy.store is not None and self._partial is not None:
            self.store = self._partial.make_store(TokenBatch.cat(self._layouts), self._policy.store)
            if self._pruning is not None:
                self._pruning.open(self.store)
        else:  # asked now, and not in the middle of a pass
            own, *away = (layout.visibility() for layout in (batch, *unconditional))
            self._visible = [own, *(away or [own] * len(uncond_masks))]
        self.stats = DecodeStats(store_bytes=0 if self.store is None else self.store.nbytes)

    def run(
        self,
        ids: Tensor,
        plan: CachePlan,
        streams: Sequence[int],
        time: Tensor,
        unfinished: Tensor | None = None,
        shown: int | None = None,
    ) -> None:
        """Compute the features of the plan in the given streams; elsewhere those of earlier passes stay.

        Args:
            ids: int64 `[B, L]`, current tokens.
            streams: 0 is the conditional one, k the k-th of `uncond_masks`.
            time: `[B]`, diffusion time.
            unfinished: int64 `[n]`, the rows that still need features, None for all. Passes over whole rows leave the
                others out, unless they are recorded.
            shown: most positions in a row whose logits the plan shows; None where nobody knows.
        """
        asked = {s: plan.of(s) for s in streams}
        self._evaluated = {s: own.rows for s, own in asked.items() if own is not None and own.rows is not None}
        held = (s for s, own in asked.items() if own is None or s in self._evaluated)
        self._held = {s: self._evaluated.get(s) for s in held if s in self._features}
        plans = {s: own for s in streams if (own := self._plan_of(s, plan)) is not None}
        begun = wall.perf_counter()
        wanted = self._targets if self._narrows and not plan.every_row else None
        if wanted is None and self._narrows and plan.logits is not None and shown is not None and not plan.every_row:
            if self._graphs is not None:  # one width for all recorded passes
                self._widest = shown = max(shown, self._widest)
            wanted = query_index(plan.logits, shown)
        for group in self._groups(plans):
            rows = torch.cat([self._ids_of(s, ids) for s in group])  # [S B, L]
            together, times = CachePlan.stacked([plans[s] for s in group]), time.float().repeat(len(group))
            at = None if wanted is None else wanted.repeat(len(group), 1)  # [S B, m]
            if self.store is not None:
                self._run_partial(rows, replace(together, wanted=at), group, times)
                continue
            at = at if together.full else None
            layout, mask = self._layout_of(tuple(group))
            if self._graphs is not None:
                fresh = self._graphs.hidden(self.denoiser, rows, layout, mask, times, tuple(group), at)
                self._keep(fresh, together, group, None, at)
                continue
            kept = None if plan.every_row or any(s not in self._features for s in group) else unfinished
            modality, positions = layout.modality, layout.positions
            if kept is not None:
                kept = torch.cat([kept + i * len(ids) for i in range(len(group))])
                rows, modality, positions, times = (x[kept] for x in (rows, modality, positions, times))
                mask, at = (None if x is None else x[kept] for x in (mask, at))
            more = {name: x if kept is None else x[kept] for name, x in layout.continuous().items()}
            fresh = self.denoiser.hidden(rows, modality, positions, mask, times, *(() if at is None else (at,)), **more)
            check_features(fresh, rows if at is None else at)  # [n, L or m, D]
            self._keep(fresh, together, group, kept, at)
        full = all(p.full for p in plans.values())
        self.stats.full_passes += full and bool(plans)
        self.stats.partial_passes += not full
        self.stats.reused_passes += not plans
        self.stats.forward_seconds += wall.perf_counter() - begun if plans else 0.0
        for s in (
            s for s in streams if s and plan.others
        ):  # rows that were evaluated differ from now on by what they do now
            row = self._evaluated.get(s)
            if row is not None and s in self._beside:
                self._beside[s] = torch.where(row[:, None, None], self._features[0], self._beside[s])
            elif s in plans or row is not None:
                self._beside[s] = self._features[0].clone()

    def _ids_of(self, stream: int, ids: Tensor) -> Tensor:
        """What a stream sees, int64 `[B, L]`."""
        layout = self._layouts[stream]
        if layout is not self._layout:
            return torch.where(layout.targets, ids, layout.ids)
        return torch.where(self._uncond_masks[stream], self._mask_ids, ids)

    def _plan_of(self, stream: int, plan: CachePlan) -> CachePlan | None:
        """What a stream does in this pass, None for nothing; one without features computes all of them."""
        own = plan.of(stream)
        if stream not in self._features and not (self.store is not None and self._policy.append_only):
            return CachePlan()
        if own is None or own.full:
            return own
        by_layer = own.verify is not None or bool(own.full_layers)
        if by_layer and self.store is None:
            return own.by_whole_rows()
        nothing = own.width in (0, (0, 0)) and own.fresh is None and not by_layer
        return None if nothing else own

    def _groups(self, plans: Mapping[int, CachePlan]) -> list[list[int]]:
        """Streams that can run in one call: plans that stack, and rows next to each other where there is a store."""
        groups: list[list[int]] = []
        for stream, own in plans.items():
            if groups:
                together = self.store is None or groups[-1][-1] + 1 == stream
                if together and own.stacks_with(plans[groups[-1][0]]):
                    groups[-1].append(stream)
                    continue
            groups.append([stream])
        return groups

    def _layout_of(self, streams: tuple[int, ...]) -> tuple[TokenBatch, Tensor | None]:
        """The rows of some streams and their attention mask."""
        if streams not in self._joined:
            joined = TokenBatch.cat([self._layouts[s] for s in streams])
            visible = [self._visible[s] for s in streams]
            mask = None
            if any(v is not None for v in visible):
                alone = all(v is None or v.alone for v in visible)
                mask = Visibility(joined.sample_ids.masked_fill(~joined.valid, -1), alone=alone).dense()
            self._joined[streams] = joined, mask
        return self._joined[streams]

    def _keep(self, fresh: Tensor, plan: CachePlan, streams: list[int], rows: Tensor | None, at: Tensor | None) -> None:
        """Features `[n, L, D]` of whole rows, those of int64 `[n]` or all, become those of the streams where the plan says;
        with `at`, int64 `[n, m]`, features `[n, m, D]` become those of these positions."""
        n = len(streams)
        self._count(n, len(fresh), len(fresh) * self._tokens, self._whole_work(at))
        if at is not None:
            size, length = self._layout.shape
            lines = (torch.arange(size, device=fresh.device) if rows is None else rows.chunk(n)[0])[:, None]
            for stream, own, places in zip(streams, fresh.chunk(n), at.chunk(n), strict=True):
                if stream not in self._narrow:
                    held = self._narrow[stream] = fresh.new_zeros(size, length + 1, fresh.shape[2])
                    if stream in self._features:
                        held[:, :-1] = self._features[stream]
                    self._features[stream] = held[:, :-1]
                self._narrow[stream][lines, places] = own
            return
        if rows is not None:
            fresh = torch.cat([self._features[s] for s in streams]).index_copy(0, rows, fresh)
        asked = plan.query if plan.query is None or plan.fresh is None else plan.query | plan.fresh[:, None]
        queries = [None] * n if asked is None else asked.chunk(n)
        for stream, features, query in zip(streams, fresh.chunk(n), queries, strict=True):
            if query is not None and stream in self._features:
                features = torch.where(query[..., None], features, self._features[stream])
            self._features[stream] = features
            self._narrow.pop(stream, None)

    def _run_partial(self, ids: Tensor, plan: CachePlan, streams: list[int], times: Tensor) -> None:
        assert self.store is not None and self._partial is not None and self._traits is not None
        n, size = len(streams), len(self._layout.ids)
        store = self.store.narrow(streams[0] * size, (streams[-1] + 1) * size)
        select = self._policy.select
        if self._pruning is not None:
            store.keys_seen = keys_seen_by([self._pruning.keys_seen(stream) for stream in streams])
        if self._graphs is not None and recordable(plan) and self._pruning is None:
            work, apart = self._graphs.partial(self._partial, ids, plan, store, times, select, tuple(streams)), 0
        else:
            out = self._partial.partial(ids, plan, store, times, select)
            work, apart = out.work, out.fresh
        self._count(n, n * size, n * (size * sum(w.k for w in work) // len(work)), work)
        if apart:  # rows computed in features of their own
            self._count(0, apart, apart * self._tokens, self._whole_work(plan.wanted))
            held = self.store.nbytes
            self.stats.store_bytes = max(self.stats.store_bytes, held + held * apart // self.store.shape[0])
        for i, stream in enumerate(streams):
            hidden = store.hidden[i * size : (i + 1) * size, :-1]
            features = self._partial.shifted(hidden, self._layouts[stream].positions)
            if (rows := self._evaluated.get(stream)) is not None:  # the others keep theirs, whatever the store has
                known = self._features.get(stream)
                features = features.clone() if known is None else torch.where(rows[:, None, None], features, known)
            self._features[stream] = features
            if self._pruning is not None:
                own = store.narrow(i * size, (i + 1) * size)
                self._pruning.keep(stream, ids[i * size : (i + 1) * size], own, self._every_logit)

    def _every_logit(self, features: Tensor) -> Tensor:
        """Logits over all ids, `[..., D]` to `[..., V]`."""
        return self.denoiser.head(features, 0, self._vocabulary.size)

    def _whole_work(self, wanted: Tensor | None) -> tuple[LayerWork, ...]:
        """Every position in every layer, behind the last one those of int64 `[B, m]`."""
        layers = 0 if self._traits is None else len(self._traits.layers)
        work = (LayerWork(*(self._tokens,) * 3),) * layers
        return work if wanted is None else (*work[:-1], replace(work[-1], out=min(wanted.shape[1], self._tokens)))

    def _count(self, streams: int, rows: int, tokens: int, work: Sequence[LayerWork]) -> None:
        """A call with `rows` rows, of `streams` streams; `tokens` of all went through the layers, see `DecodeStats`."""
        stats = self.stats
        stats.evaluations += streams
        stats.model_tokens += tokens
        for layer, w in zip(() if self._traits is None else self._traits.layers, work, strict=True):
            stats.key_tokens += rows * w.k
            stats.value_tokens += rows * w.v
            stats.query_tokens += rows * w.out
            stats.linear_flops += rows * layer.linear(w)
            stats.attention_flops += rows * layer.attention(w, self._tokens)

    def features(self, stream: int) -> Tensor:
        """`[B, L, D]`, final hidden states at their last computation."""
        return self._features[stream]

    def logits(
        self,
        modality: Modality,
        targets: Tensor,
        count: int,
        streams: Sequence[int],
        weights: Tensor | None = None,
        unfinished: Tensor | None = None,
        rescale: float = 0.0,
    ) -> PositionLogits:
        """The head of `modality`, at the target positions `[B, L]` only (at most `count` per row).

        Args:
            weights: `[S, B]`, of the streams in the sum that the caller draws from. Where logits are affine in the features
                that sum comes back as the only stream, from one call of the head.
            unfinished: int64 `[R]`, the only rows with target positions; None for all. A policy that looks at the largest
                logits gets all.
            rescale: see `Guidance`; the logits of every stream come multiplied by what this takes.
        """
        index, is_real = gather_positions(targets, count)
        rows = None if self._policy.max_logits is not None else unfinished
        taken = index if rows is None else index[rows]
        affine = self._traits is not None and self._traits.affine_head
        own = self._features[0]  # stands in for a stream that no row has used so far: none uses it now
        features = [self._moved(s) if affine and s in self._held else self._features.get(s, own) for s in streams]
        mix = weights if weights is None or rows is None else weights[:, rows]
        spread = None
        if rescale and mix is not None and len(features) > 1:
            spread = (rescale * self._spread(features, taken, mix, rows) + (1 - rescale))[..., None]  # [R, n, 1]
        if affine and mix is not None and self._policy.max_logits is None:
            values = self._head(modality, features, taken, mix, rows)  # [1, R, n, V]
            return PositionLogits(index, is_real, values if spread is None else values * spread, rows)
        values = self._head(modality, features, taken, rows=rows)  # [S, R, n, V]
        if held := [] if affine else [i for i, s in enumerate(streams) if s in self._held]:
            beside = self._head(modality, [self._beside[streams[i]] for i in held], taken, rows=rows)
            for i, then in zip(held, beside, strict=True):
                kept = values[i] + (values[0] - then)  # cond - (cond then - uncond then)
                now = self._held[streams[i]]
                if now is not None:  # rows that were evaluated in this pass
                    kept = torch.where((now if rows is None else now[rows])[:, None, None], values[i], kept)
                values[i] = kept
        if self._policy.max_logits is not None:
            self._note_max_logits(modality, index, is_real, values, streams, weights)
        return PositionLogits(index, is_real, values if spread is None else values * spread, rows)

    def _spread(self, features: Sequence[Tensor], index: Tensor, weights: Tensor, rows: Tensor | None) -> Tensor:
        """`[R, n]`: standard deviation over all ids of the conditional logits over that of the mixed ones, 1 in rows that mix
        nothing in. Of a part of the positions at a time, since all ids are many."""
        picked = torch.stack([gather_rows(f if rows is None else f[rows], index) for f in features])  # [S, R, n, D]
        width = max(1, CHUNK // (len(picked) * picked.shape[1] * self._vocabulary.size))
        parts = []
        for part in picked.split(width, dim=2):
            parts.append(spread_ratio(self._every_logit(part), weights))
            self.stats.head_tokens += part[..., 0].numel()
            if self._traits is not None:
                self.stats.head_flops += self._traits.head_flops(part[..., 0].numel(), self._vocabulary.size)
        return torch.cat(parts, -1)

    def _moved(self, stream: int) -> Tensor:
        """Features of a held stream, moved as the conditional ones since it was evaluated: cond - (cond then - uncond then).

        Rows that were evaluated in this pass do not move, to the last bit.
        """
        return self._features[stream] + (self._features[0] - self._beside[stream])

    def _head(
        self,
        modality: Modality,
        features: Sequence[Tensor],
        index: Tensor,
        weights: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Logits `[S, R, n, V]` of the features' streams in `rows`, or `[1, R, n, V]` of their weighted sum."""
        begun = wall.perf_counter()
        start, stop = self._vocabulary.range_of(modality)
        picked = torch.stack([gather_rows(f if rows is None else f[rows], index) for f in features])
        if weights is not None and len(features) > 1:
            wide = torch.promote_types(picked.dtype, torch.float32)
            picked = (picked.to(wide) * weights.to(wide)[..., None, None]).sum(0, keepdim=True).to(picked.dtype)
        tokens = len(picked) * index.numel()
        logits = self.denoiser.head(picked, start, stop)
        check_head(logits, picked, start, stop)
        self.stats.head_tokens += tokens
        if self._traits is not None:
            self.stats.head_flops += self._traits.head_flops(tokens, stop - start)
        self.stats.forward_seconds += wall.perf_counter() - begun
        return logits

    def _note_max_logits(
        self,
        modality: Modality,
        index: Tensor,
        is_real: Tensor,
        values: Tensor,
        streams: Sequence[int],
        weights: Tensor | None,
    ) -> None:
        """Largest logits at the candidates, or at all positions over this modality's slice, of rows that mix a stream in."""
        best = values.amax(-1)  # [S, B, n]
        everywhere = self._policy.max_logits == "everywhere"
        if everywhere:
            index = torch.arange(self._layout.shape[1], device=index.device).expand(self._layout.shape)
            best = self._head(modality, [self._features[s] for s in streams], index).amax(-1)
        for i, (stream, peak) in enumerate(zip(streams, best, strict=True)):
            known = self._max_logits.get(stream)
            if known is None:
                known = torch.full(self._layout.shape, torch.nan, dtype=peak.dtype, device=peak.device)
            fresh = self._layouts[stream].valid & is_real.any(1, keepdim=True) if everywhere else is_real
            if stream and weights is not None:
                fresh = fresh & (weights[i] != 0)[:, None]
            self._max_logits[stream] = known.scatter(1, index, torch.where(fresh, peak, known.gather(1, index)))
