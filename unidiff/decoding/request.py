"""`Request`: everything that one call of a sampler owns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unidiff.decoding import draw
from unidiff.decoding.commit.base import BlockPass, BlockShares
from unidiff.decoding.complaint import complaint
from unidiff.decoding.end_of_text import EndOfText
from unidiff.decoding.forward import StreamedModel
from unidiff.decoding.graphs import CudaRecorder, PassGraphs
from unidiff.decoding.state import DecodeState, ModalityProgress, PassWork, own_copy
from unidiff.models.denoiser import CachePlan
from unidiff.models.store import FeatureStore, Width
from unidiff.tokens import Modality, TokenBatch
from unidiff.tokens.batch import moved

_PATIENCE = 64  # passes in a row in which a policy may withhold every logit
_WIDTHS = 8  # different gather widths per modality; varying shapes cost memory and recompilation


class Request:
    """Everything one call of the sampler owns: nothing of it lives in the sampler, the model or the process.

    Args:
        sampler: a `Sampler`. host: `batch` on the CPU. condition, others: see there.
    Attributes:
        store: of the model that `open_model` opens, where there is one.
        stream_of: unconditional stream of each modality with targets. further: those that are mixed in besides.
        banned: by modality, int64, offsets of ids that may not be drawn; None for none. banned_last: in a pass that fills everything.
        passes: int64 `[B]`, those in which the network ran for a row.
        is_finite: bool scalar, False once a model returned logits that cannot be used.
        unfinished: int64, rows that are not finished, and some that are so that their number takes few values; None for all.
        foretold: what the passes to come would read, as far as it is known, and whether they read it nevertheless.
        numbers: what the last pass read.
    """

    def __init__(
        self,
        sampler: Any,
        batch: TokenBatch,
        host: TokenBatch,
        seeds: Tensor,
        condition: Tensor | None,
        others: Sequence[TokenBatch],
    ) -> None:
        batch = own_copy(batch)  # nothing the caller does meanwhile reaches the decode
        config, vocabulary = sampler.config, sampler.vocabulary
        self.sampler, self.noise = sampler, draw.RowNoise(seeds.clone(), batch.valid)
        self.policy = None if sampler.policy is None else sampler.policy.start(batch, sampler.model)
        found: dict[Modality, ModalityProgress] = {}
        self._block_size: dict[Modality, int] = {}  # most positions of a block
        self._most_passes = 0  # that may write: one per token, those of the plan, and one per token masked again
        for modality in Modality:
            size = (host.targets & (host.modality == modality)).sum(1)
            if not (most := int(size.max())):
                continue
            start, stop = vocabulary.range_of(modality)
            if start == stop:
                raise ValueError(f"the batch has {modality.name.lower()} targets, but the vocabulary has no such ids")
            settings = config.of(modality)
            found[modality] = progress = ModalityProgress(modality, settings, batch, sampler.rules.get(modality), host)
            self._block_size[modality] = min(most, settings.block_length or most)
            planned = BlockShares(settings.steps, size, settings.block_length, progress.rule.capped).total + 1
            again = len(size) * settings.remask_budget + progress.most_edits
            self._most_passes += int(size.sum() + planned.max()) + again
        # one unconditional stream serves both modalities unless each is hidden from the other
        shared = bool(others) or condition is not None or config.guidance.hide != "other"
        self.stream_of = {modality: 1 if shared else number for number, modality in enumerate(found, 1)}
        self.further = tuple(range(2, 2 + len(config.guidance.directions))) if others else ()
        self.state = DecodeState.start(batch.hide_targets(vocabulary), found, [other.valid for other in others])
        ends = [i for i in (vocabulary.specials.get("eos"), *config.ends) if i is not None]
        closes = config.stop_at_eos and Modality.TEXT in found and bool(ends)
        samples = 1 + int(host.sample_ids.max())
        own = (batch, samples, ends, ends[0] if config.fill is None else config.fill) if closes else None
        self.end_of_text = None if own is None else EndOfText(*own)
        self.banned, self.banned_last = (
            {m: banned if len(banned) else None for m, banned in own.items()}
            for own in moved((sampler.banned, sampler.banned_last), batch.ids.device)
        )
        self.is_finite = torch.ones((), dtype=torch.bool, device=batch.ids.device)
        self.unfinished: Tensor | None = None
        self.passes = torch.zeros_like(seeds, device=batch.ids.device)
        self.foretold: Iterator[tuple[Sequence[int], bool]] = iter(())
        self.numbers: Sequence[int] = ()
        self.store: FeatureStore | None = None
        self._wrote = 0  # passes that wrote tokens
        self._stalled = 0  # passes in a row that asked for logits and wrote nothing
        self._busy = False  # the coming pass asks for logits

    def open_model(self, condition: Tensor | None, others: Sequence[TokenBatch]) -> StreamedModel:
        """The model with a stream for each guidance condition."""
        sampler, guidance, batch = self.sampler, self.sampler.config.guidance, self.state.batch
        masks = {s: guidance.uncond_mask(m, batch, condition) for m, s in self.stream_of.items()}
        others = others[: 1 + len(self.further)]
        if not any(map(guidance.guides, self.stream_of)):  # no memory for unused streams
            masks, others = {}, ()
        recorder = CudaRecorder(batch.ids.device) if sampler.graphs is True and batch.ids.is_cuda else sampler.graphs
        graphs, peaks = PassGraphs(recorder) if callable(recorder) else None, self.state.max_logits
        streams = sampler.model, sampler.vocabulary, batch, list(masks.values()), self.policy, peaks, others, graphs
        self.model = StreamedModel(*streams)
        self.store = self.model.store
        return self.model

    def waiting(self, own: ModalityProgress) -> Tensor:
        """bool `[B]`: rows whose other modality goes first, or is behind, and is not complete."""
        state, order = self.state, self.sampler.config.order
        leader = next((p for p in state.progress.values() if p is not own), None)
        if leader is not None and not state.finishing:
            if order == "level":
                return own.left(state.masked) < leader.left(state.masked)
            if order == f"{leader.modality.name.lower()}_first":
                return (state.masked & leader.targets).any(1) | leader.pending
        return torch.zeros_like(own.running)

    def plan(self, work: Sequence[PassWork]) -> CachePlan | None:
        """What the coming pass computes, None when nothing is left to do. It is worked out on the device, and one read brings
        all that the host has to know of it.

        Raises:
            ValueError: the last pass met logits that cannot be used.
            RuntimeError: a policy withholds every logit, pass after pass.
        """
        if not work:
            return None
        known, asks = next(self.foretold, (None, True))
        state, read = self.state, PassRead(None if asks else known)
        alive = state.unfinished  # [B]
        left = state.masked.any(1) if state.finishing else alive
        wrote, streams = state.just_unmasked, state.streams
        flags = read(3, lambda: [self.is_finite, left.sum(), wrote.any()])
        answers = [self._open(w, read) for w in work]
        self._open_streams(work)
        state.just_unmasked, nowhere = torch.zeros_like(wrote), torch.zeros_like(wrote)
        candidates = sum((w.candidates for w in work), nowhere)
        plan = CachePlan(logits=candidates) if self.policy is None else self.policy.plan(state, candidates)
        sizes = PlanSizes(read, plan, state.streams, state.batch.valid, alive, self.store)
        self.numbers = read.read()
        if known not in (None, self.numbers):
            self.foretold = iter(())
        is_finite, remaining, has_written = flags()
        if not is_finite:
            raise ValueError(complaint(self, streams))
        for w, answer in zip(work, answers, strict=True):
            most, *guided = answer()
            unit = math.ceil(self._block_size[w.progress.modality] / _WIDTHS)
            w.width = min(unit * math.ceil(most / unit), state.masked.shape[1])
            w.guided = w.guided and all(guided)
        self._count_passes(has_written, remaining, any(w.width for w in work))
        if not remaining:
            return None
        rows, unit = len(alive), math.ceil(len(alive) / _WIDTHS)
        kept = unit * math.ceil(remaining / unit)
        self.unfinished = (~left).long().argsort(stable=True)[:kept] if kept < rows else None
        state.streams = tuple(sorted({0, *(s for w in work if w.width for s in self.streams_of(w))}))
        return sizes.plan(state.streams)

    def _open(self, work: PassWork, read: PassRead) -> Callable[[], Sequence[int]]:
        """Which rows a modality and its guidance are busy in; asks for its most candidates in a row and whether it is guided."""
        work.guided = self.sampler.config.guidance.guides(work.progress.modality)
        work.rows = work.guided_rows = work.candidates.any(1)
        numbers: list[Callable[[], Tensor]] = [lambda: work.candidates.sum(1).max()]
        if work.guided and not self.further and self.sampler.config.guidance.mode != "constant":
            work.guided_rows = work.rows & (work.scale != 1)
            numbers.append(lambda: work.guided_rows.any())
        return read(len(numbers), lambda: [number() for number in numbers])

    def _count_passes(self, wrote: int, left: int, busy: bool) -> None:
        """Raise for a decode that never ends."""
        self._stalled = 0 if wrote or not self._busy else self._stalled + 1
        self._wrote, self._busy = self._wrote + wrote, busy
        if self._wrote > self._most_passes + self.state.reopened:
            if any(p.settings.writes_mask for p in self.state.progress.values()):
                raise ValueError(
                    f"more than {self._most_passes} passes wrote [MASK] or changed tokens again and again, as the program that "
                    "writes_mask follows would for ever; leave it out"
                )
            raise ValueError(
                f"more than {self._most_passes} passes wrote tokens, which no settings ask for; a cache policy of your own "
                "writes in the state of the decode, which it may only read"
            )
        if left and self._stalled > _PATIENCE:
            raise RuntimeError(
                f"nothing was decoded in {self._stalled} passes; the cache policy never asks for logits at the open positions"
            )

    def streams_of(self, work: PassWork) -> list[int]:
        """The conditional stream, and the unconditional ones that are mixed in for one modality."""
        return [0, self.stream_of[work.progress.modality], *self.further] if work.guided else [0]

    def _open_streams(self, work: Sequence[PassWork]) -> None:
        """Tell the state which streams this pass may mix in, and bool `[B]` for each which rows have a use for it."""
        parts: dict[int, list[Tensor]] = {0: []}
        for w in work:
            for stream in self.streams_of(w):
                parts.setdefault(stream, []).append(w.guided_rows if stream else w.rows)
        same: dict[tuple[int, ...], Tensor] = {}
        users = {}
        for stream, rows in sorted(parts.items()):
            key = tuple(map(id, rows))
            if key not in same:
                same[key] = rows[0] if len(rows) == 1 else torch.stack(rows).any(0)
            users[stream] = same[key]
        self.state.streams, self.state.users = tuple(users), users
        self.passes = self.passes + users[0]

    def before_end(self, progress: ModalityProgress, now: BlockPass) -> BlockPass:
        """The pass without what stands behind the first end that was written, where the settings ask for that."""
        state, end = self.state, self.end_of_text
        if end is None or not self.sampler.config.first_end or progress.modality != Modality.TEXT:
            return now
        behind = end.behind(state.ids, state.masked)
        progress.ahead = progress.ahead & ~behind
        return now._replace(active=now.active & ~behind)

    def time(self, work: Sequence[PassWork]) -> Tensor:
        """Diffusion time `[B]` for time-conditioned models: that of the row's modality which is furthest behind.

        A modality of which a row has nothing to fill, or nothing left, does not count.
        """
        busy = [(self.state.masked & w.progress.targets).any(1) | w.progress.pending for w in work]
        return torch.stack([torch.where(row, w.time, 0.0) for row, w in zip(busy, work, strict=True)]).amax(0)

    def end_pass(self) -> None:
        """Close finished texts and move on."""
        state = self.state
        for progress in state.progress.values():
            progress.end_pass()
            if progress.settings.writes_mask:
                state.leave(progress.given_up(state.masked))
        if (end := self.end_of_text) is not None:
            text, whole = state.progress[Modality.TEXT], self.sampler.config.whole_blocks
            settled = text.settled(state.masked) if whole or text.edits is not None else None
            state.freeze(end.closed(state.ids, state.masked, settled), end.fill)
        state.step += 1


Sized = Callable[[], CachePlan | None]
"""A plan with its sizes, once they are read; None where it evaluates no row."""


class PassRead:
    """Numbers that the host has to know of a pass: asked by whoever needs them, and read from the device together.

    Args:
        known: their values in the order of asking, where they are known beforehand: nothing is worked out or read then.
    """

    def __init__(self, known: Sequence[int] | None = None) -> None:
        self._asked: list[Tensor] = []
        self._count = 0
        self.values = known

    def __call__(self, count: int, numbers: Callable[[], Sequence[Tensor]]) -> Callable[[], Sequence[int]]:
        """Ask for `count` int64 or bool scalars; the answer has their values after `read`."""
        start, self._count = self._count, self._count + count
        if self.values is None:
            self._asked += numbers()
        return lambda: self._known()[start : start + count]

    def read(self) -> Sequence[int]:
        """All values; waits for the device, unless they are known."""
        if self.values is None:
            self.values = torch.stack([x.long() for x in self._asked]).tolist()
        return self.values

    def _known(self) -> Sequence[int]:
        assert self.values is not None, "numbers of a pass are used before they are read"
        return self.values


class PlanSizes:
    """The sizes of what the streams of a pass do, which a policy says on the device alone.

    Args:
        read: asked for them. plan: a policy's, for `streams`.
        valid: bool `[B, L]`. alive: bool `[B]`, rows that are not complete.
        store: counts what a query means in it, where there is one.
    """

    def __init__(
        self,
        read: PassRead,
        plan: CachePlan,
        streams: Sequence[int],
        valid: Tensor,
        alive: Tensor,
        store: FeatureStore | None,
    ) -> None:
        self._read, self._valid, self._alive, self._store = read, valid, alive, store
        self._asked: dict[int, Sized] = {}  # by identity: streams that share a plan do so afterwards
        self._plans = {stream: plan.of(stream) for stream in streams}
        for stream, own in self._plans.items():
            if own is not None and id(own) not in self._asked:
                sized = self._ask(own)
                self._asked[id(own)] = self._ask_same(own, sized, plan) if stream else sized

    def plan(self, streams: Sequence[int]) -> CachePlan:
        """After the read: what those of the streams do that are in use."""
        made = {key: sized() for key, sized in self._asked.items()}
        return CachePlan.joined({stream: made.get(id(self._plans[stream])) for stream in streams})

    def _ask(self, plan: CachePlan) -> Sized:
        """A full plan where every row that is alive recomputes everything; otherwise `plan` with its sizes."""
        read, rows, query, verify, fresh = self._read, plan.rows, plan.query, plan.verify, plan.fresh
        evaluated = None if rows is None else read(1, lambda: [rows.any()])
        if plan.full or query is None or plan.width is not None:
            return lambda: None if evaluated is not None and not evaluated()[0] else plan

        def numbers() -> list[Tensor]:
            whole = (query == self._valid).all(1) if fresh is None else fresh
            own = self._counts(query)
            found = [(self._alive & ~whole).any(), *(n.max() for n in own)]
            if fresh is not None:
                found.append(fresh.sum())
            if verify is not None:
                compared = verify & ~query
                more = self._counts(compared)
                most = None if plan.quota is None else plan.quota(compared.sum(1))
                some = more if most is None else [torch.minimum(n, most) for n in more]
                found += [compared.any(), *((n + m).max() for extra in (more, some) for n, m in zip(own, extra))]
            return found

        parts = 2 if self._store is not None and self._store.layout.border else 1
        answer = read(1 + parts + (fresh is not None) + (1 + 2 * parts) * (verify is not None), numbers)

        def sized() -> CachePlan | None:
            values = iter(answer())

            def width() -> Width:
                return next(values) if parts == 1 else (next(values), next(values))

            if evaluated is not None and not evaluated()[0]:
                return None
            if not next(values):
                return CachePlan(logits=plan.logits, rows=rows)
            own, apart = width(), 0 if fresh is None else next(values)
            known = replace(plan, width=own, fresh=fresh if apart else None, apart=apart or None, others={})
            if verify is None or not next(values):
                return replace(known, verify=None)
            return replace(known, compared=width(), chosen=width())

        return sized

    def _ask_same(self, own: CachePlan, sized: Sized, first: CachePlan) -> Sized:
        """Streams whose layers recompute positions of their own run together where these are the same."""
        masks = [(getattr(own, name), getattr(first, name)) for name in ("query", "verify", "full_rows")]
        if not own.full_layers and own.verify is None:
            return sized
        if own.full_layers != first.full_layers or any((a is None) != (b is None) for a, b in masks):
            return sized
        same = self._read(1, lambda: [torch.stack([(a == b).all() for a, b in masks if a is not None]).all()])

        def joined() -> CachePlan | None:
            made, like = sized(), self._asked[id(first)]()
            if made is None or like is None or made.full or not same()[0]:
                return made
            return replace(like, rows=own.rows, logits=own.logits)

        return joined

    def _counts(self, where: Tensor) -> list[Tensor]:
        """int64 `[B]`, of each part of a row."""
        return [where.sum(1)] if self._store is None else self._store.counts(self._store.tokens_of(where))
