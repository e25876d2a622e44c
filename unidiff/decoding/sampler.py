"""The sampler: one loop that unmasks any part of a sequence, text or image or both, and what one call of it owns."""

from __future__ import annotations

import math
import time as wall
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from unidiff.decoding import draw
from unidiff.decoding.cache import NoCache, RefreshPolicy
from unidiff.decoding.commit.ancestral import remdm_sigma
from unidiff.decoding.commit.base import CommitRule, unsure_tokens
from unidiff.decoding.config import SamplerConfig, banned_offsets, check_request, check_sampler
from unidiff.decoding.forward import StreamedModel
from unidiff.decoding.graphs import CudaRecorder, PassGraphs, Record
from unidiff.decoding.state import (
    Callback,
    DecodeState,
    DecodeView,
    EndOfText,
    ModalityProgress,
    PassWork,
    own_copy,
)
from unidiff.decoding.stats import DecodeStats
from unidiff.models.denoiser import Denoiser
from unidiff.tokens import Modality, TokenBatch, Vocabulary

UNUSABLE = "the model returned NaN or infinite logits; check the weights and the dtype (float16 may overflow)"
_AT_ONCE = 256  # positions whose logits are looked at for a complaint
_PATIENCE = 64  # passes in a row in which a policy may withhold every logit
_WIDTHS = 8  # different gather widths per modality; varying shapes cost memory and recompilation


@dataclass(frozen=True)
class SamplerOutput:
    """A finished decode.

    Attributes:
        batch: the request with every target filled.
        confidence: float32 `[B, L]`, probability of each decoded token when it was committed (guided, at temperature 1,
            before filters); 1 at known tokens and end-of-text fill.
        nfe: network evaluations of a row; a guided pass counts once per stream. seconds: wall-clock time.
        trajectory: int64 `[B, L]` ids, all hidden first, then after each pass; None unless recorded.
        steps: passes of the loop, those that needed no forward included. stats: what the decode cost.
        tokens_per_forward: float64 `[B]`, decoded tokens of a row (not what fills it up behind an end) per pass that it took part in.
    """

    batch: TokenBatch
    confidence: Tensor
    nfe: int
    seconds: float
    trajectory: list[Tensor] | None = None
    steps: int = 0
    stats: DecodeStats = field(default_factory=DecodeStats)
    tokens_per_forward: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.double))


class Sampler:
    """Fills the targets of a batch by masked diffusion.

    Args:
        model: anything with `hidden` and `head` (see `Denoiser`), in evaluation mode.
        vocabulary: id layout; `specials["eos"]`, where present, ends text rows.
        config: see `SamplerConfig`.
        policy: what each pass recomputes; no cache when left out.
        rules: commit rules of one's own, by modality, in place of the settings' `rule`.
        graphs: on CUDA, record the passes of a `PartialDenoiser` as graphs and replay them, see `unidiff.decoding.graphs`;
            the tokens are the same. Worth it where starting kernels takes longer than running them: deep models,
            few rows, many passes. A `Record` in place of True records by other means, on any device.

    Raises:
        ValueError: an argument of another kind; `forbid` or `ends` names an id outside the vocabulary; `forbid` leaves a
            modality without tokens; `fill` is no text id.
    """

    def __init__(
        self,
        model: Denoiser,
        vocabulary: Vocabulary,
        config: SamplerConfig,
        policy: RefreshPolicy | None = None,
        rules: Mapping[Modality, CommitRule] | None = None,
        graphs: bool | Record = False,
    ) -> None:
        check_sampler(model, vocabulary, config, policy, rules, graphs)
        self.model, self.vocabulary, self.config = model, vocabulary, config
        self.policy: RefreshPolicy = NoCache() if policy is None else policy
        self.rules, self.graphs = dict(rules or {}), graphs
        self.banned = {m: banned_offsets(vocabulary, m, config.of(m).forbid) for m in Modality}

    @torch.no_grad()
    def __call__(
        self,
        batch: TokenBatch,
        seeds: Tensor,
        condition: Tensor | None = None,
        callback: Callback | None = None,
        record: bool = False,
        unconditional: TokenBatch | Sequence[TokenBatch] | None = None,
    ) -> SamplerOutput:
        """Decode every target (`valid & ~given`). Known tokens never change and [MASK] is never emitted.

        Args:
            batch: the request; ids at targets do not matter.
            seeds: int64 `[B]`; a row's result depends on its own seed and tokens only.
            condition: bool `[B, L]`, given positions that the unconditional guidance stream does not see; overrides
                `guidance.hide`.
            callback: called after each pass as `callback(step, view)` with a `DecodeView`, whose tensors are copies; returning
                False fills the rest in one last pass; see `Callback` for what it may change. What it raises ends the decode.
            record: keep the ids after each pass.
            unconditional: the rows of the unconditional stream where they are not `batch` with tokens hidden, of the same
                shape and targets. Several for guidance in several directions: `guidance.scale` is for the first, `further`
                for the others.

        Raises:
            ValueError: an argument of another kind or shape, ids outside the vocabulary, or logits that cannot be drawn from;
                the message says whether the model or a setting makes them so.
        """
        begun = wall.perf_counter()
        others = check_request(self.vocabulary, self.config, batch, seeds, condition, callback, record, unconditional)
        # 1. hide the targets; open the progress of each modality, the guidance streams and the noise
        request = Request(self, batch, seeds, condition, others)
        state, model, policy = request.state, request.model, request.policy
        trajectory = [state.ids.clone()] if record else None
        while True:
            # 2. which positions may be filled now: blocks, order, and rules that need no look at the model
            work = [self._begin(request, progress) for progress in state.progress.values()]
            if not request.synchronise(work):  # the only host synchronisation of a pass
                break
            busy = [w for w in work if w.width]
            state.just_unmasked = torch.zeros_like(state.masked)
            if busy:
                # 3. plan: what to recompute and where logits are wanted
                request.open_streams(busy)
                plan = policy.plan(state, torch.stack([w.candidates for w in busy]).any(0))
                # 4. forward: features [B, L, D] of every guidance stream in use
                shown = sum(w.width for w in busy)
                model.run(state.ids, plan, state.streams, request.time(work), request.unfinished, shown)
                state.nfe = model.stats.evaluations
                # 5. logits, guidance, tokens, commit: each modality by its own rules
                for w in busy:
                    self._fill(request, w, plan.logits)
            # 6. remask: committed tokens become fresh work
            for w in work:
                self._remask(request, w)
            # 7. close finished texts, move on, let policy and callback look
            request.end_pass()
            if callback is not None:
                state.heed(callback(state.step - 1, DecodeView(state)), self.vocabulary)
            if busy:
                policy.observe(state, plan)
            if trajectory is not None:
                trajectory.append(state.ids.clone())
        seconds = wall.perf_counter() - begun
        tokens = (state.batch.targets & ~state.frozen).sum(1) / request.passes.clamp_min(1).double()  # [B]
        cost = trajectory, state.step, model.stats, tokens
        return SamplerOutput(state.batch, state.confidence, state.nfe, seconds, *cost)

    def _begin(self, request: Request, progress: ModalityProgress) -> PassWork:
        """What one modality may fill in this pass, and all at once where the model does not matter."""
        state, rule = request.state, progress.rule
        now = progress.begin_pass(state.masked, request.waiting(progress))
        time, count = progress.time(state.masked), rule.count(now)  # [B]
        decided = rule.early(now, count, partial(request.noise, state.step))
        if state.finishing:
            decided = state.masked & progress.targets
        candidates = progress.active | progress.ahead if decided is None else decided
        scale = self.config.guidance.scale_at(progress.modality, time)
        return PassWork(progress, candidates, decided is not None, count, time, scale)

    def _fill(self, request: Request, work: PassWork, shown: Tensor | None) -> None:
        """Draw tokens at the candidates of one modality that the policy shows, `[B, L]`, and commit those that its rule picks."""
        state, progress, rule = request.state, work.progress, work.progress.rule
        settings, modality, streams = progress.settings, progress.modality, request.streams_of(work)
        targets = work.candidates
        if shown is not None:
            targets = targets & shown
            progress.hold(work.candidates.any(1) & ~targets.any(1))
        banned = self.banned[modality] = self.banned[modality].to(targets.device)
        blend = draw.Blend(work.scale, self.config.guidance.further, banned if len(banned) else None)
        rows = request.unfinished if rule.adjusts is None else None  # what changes logits looks at all rows
        logits = request.model.logits(modality, targets, work.width, streams, blend.weights(len(streams)), rows)
        blend = replace(blend, scale=logits.select_rows(blend.scale))
        index, real = logits.index, logits.is_real  # [B, n]
        noise = partial(request.noise, state.step)
        token_noise, order_noise = (noise(use).gather(1, index) for use in (draw.TOKEN, draw.ORDER))
        own_real, u, order = (logits.select_rows(x) for x in (real, token_noise, order_noise))
        if rule.adjusts is None:
            choice = draw.choose(logits.values, own_real, settings, u, order, blend)
        else:
            choice = rule.choose(blend(logits.values), index, own_real, u, order)
        choice = choice.scatter_rows(logits.rows, len(state.masked))
        request.is_finite &= choice.is_finite
        pick = real
        if not work.decided:
            confidence = score = choice.confidence
            if settings.choice_temperature:
                score = draw.ranking(confidence, settings, work.time, noise(draw.CHOICE).gather(1, index))
            ahead = real & progress.ahead.gather(1, index)  # in blocks to come: by a threshold of their own
            pick = rule.pick(confidence, score, real & ~ahead, work.quota, index)
            pick = pick | (ahead & (confidence >= settings.flight_threshold))
        state.write(index, pick, choice.token + self.vocabulary.range_of(modality)[0], choice.probability)

    def _remask(self, request: Request, work: PassWork) -> None:
        """Mask committed tokens of one modality again, where its settings ask for it."""
        state, progress, settings = request.state, work.progress, work.progress.settings
        if settings.remask == "none" or state.finishing:
            return
        earlier = state.committed & ~state.just_unmasked
        if settings.remask == "remdm":
            sigma = remdm_sigma(settings.schedule, progress.step, progress.steps, settings.remask_cap)  # [B]
            again = earlier & progress.in_block & (request.noise(state.step, draw.REMASK) < sigma[:, None])
        else:
            candidates = earlier & progress.targets & progress.running[:, None]
            budget = settings.remask_budget - progress.remasked
            again = unsure_tokens(state.confidence, candidates, settings.remask_threshold, budget)
        progress.remasked = progress.remasked + again.sum(1)
        progress.rule.forget(again)
        state.mask_again(again, self.vocabulary.mask_of(progress.modality))


class Request:
    """Everything one call of the sampler owns: nothing of it lives in the sampler, the model or the process.

    Attributes:
        stream_of: unconditional stream of each modality with targets. further: those that are mixed in besides.
        passes: int64 `[B]`, those in which the network ran for a row.
        is_finite: bool scalar, False once a model returned logits that cannot be used.
        unfinished: int64, rows that are not finished, and some that are so that their number takes few values; None for all.
    """

    def __init__(
        self, sampler: Sampler, batch: TokenBatch, seeds: Tensor, condition: Tensor | None, others: Sequence[TokenBatch]
    ) -> None:
        batch = own_copy(batch)  # nothing the caller does meanwhile reaches the decode
        config, vocabulary = sampler.config, sampler.vocabulary
        self.sampler, self.noise = sampler, draw.RowNoise(seeds.clone(), batch.valid)
        self.policy = sampler.policy.start(batch, sampler.model)
        found: dict[Modality, ModalityProgress] = {}
        self._block_size: dict[Modality, int] = {}  # most positions of a block
        uncond_masks: list[Tensor] = []
        self._most_passes = 0  # that may write: one per token, those of the plan, and one per token masked again
        for modality in Modality:
            settings = config.of(modality)
            progress = ModalityProgress(modality, settings, batch, sampler.rules.get(modality))
            size = progress.targets.sum(1)
            most, total, planned = torch.stack([size.max(), size.sum(), progress.shares.total.max()]).tolist()
            if not most:
                continue
            start, stop = vocabulary.range_of(modality)
            if start == stop:
                raise ValueError(f"the batch has {modality.name.lower()} targets, but the vocabulary has no such ids")
            found[modality], self._block_size[modality] = progress, min(most, settings.block_length or most)
            uncond_masks.append(config.guidance.uncond_mask(modality, batch, condition))
            self._most_passes += total + planned + len(size) * settings.remask_budget
        self.stream_of = {modality: number for number, modality in enumerate(found, 1)}
        if len(found) == 2 and (others or bool((uncond_masks[0] == uncond_masks[1]).all())):  # one serves both
            uncond_masks.pop()
            self.stream_of = dict.fromkeys(found, 1)
        guided = any(config.guidance.full_scale(modality) != 1 for modality in found)
        if not guided and not config.guidance.further:  # no memory for unused streams
            uncond_masks, others = [], ()
        self.further = tuple(range(2, 1 + len(others)))
        self.state = DecodeState.start(batch.hide_targets(vocabulary), found)
        ends = [i for i in (vocabulary.specials.get("eos"), *config.ends) if i is not None]
        fills = config.stop_at_eos and Modality.TEXT in found and bool(ends)
        self._end_of_text = EndOfText(batch, ends, ends[0] if config.fill is None else config.fill) if fills else None
        recorder = CudaRecorder(batch.ids.device) if sampler.graphs is True and batch.ids.is_cuda else sampler.graphs
        graphs, peaks = PassGraphs(recorder) if callable(recorder) else None, self.state.max_logits
        streams = sampler.model, vocabulary, batch, uncond_masks, self.policy, peaks, others, graphs
        self.model = StreamedModel(*streams)
        self.is_finite = torch.ones((), dtype=torch.bool, device=batch.ids.device)
        self.unfinished: Tensor | None = None
        self.passes = torch.zeros_like(seeds, device=batch.ids.device)
        self._wrote = 0  # passes that wrote tokens
        self._stalled = 0  # passes in a row that asked for logits and wrote nothing
        self._busy = False  # the coming pass asks for logits

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

    def synchronise(self, work: Sequence[PassWork]) -> bool:
        """Read the flags of a pass from the device in one go; False when nothing is left to do.

        Raises:
            ValueError: the last pass met logits that cannot be used.
            RuntimeError: a policy withholds every logit, pass after pass.
        """
        state = self.state
        alive = state.masked.any(1) if state.finishing else state.unfinished  # [B]
        flags = [alive.sum(), self.is_finite, state.just_unmasked.any()]
        for w in work:
            flags += [w.candidates.sum(1).max(), (w.scale != 1).any()]
        left, is_finite, wrote, *rest = torch.stack([f.long() for f in flags]).tolist()
        if not is_finite:
            raise ValueError(self._complaint())
        self._stalled = 0 if wrote or not self._busy else self._stalled + 1
        self._wrote += wrote
        if self._wrote > self._most_passes + state.reopened:
            raise ValueError(
                f"more than {self._most_passes} passes wrote tokens, which no settings ask for; a cache policy of your own "
                "writes in the state of the decode, which it may only read"
            )
        for w, most, guided in zip(work, rest[::2], rest[1::2], strict=True):
            unit = math.ceil(self._block_size[w.progress.modality] / _WIDTHS)
            w.width = min(unit * math.ceil(most / unit), state.masked.shape[1])
            w.guided = bool(guided) or bool(self.further)
        self._busy = any(w.width for w in work)
        if left and self._stalled > _PATIENCE:
            raise RuntimeError(
                f"nothing was decoded in {self._stalled} passes; the cache policy never asks for logits at the open positions"
            )
        rows, unit = len(alive), math.ceil(len(alive) / _WIDTHS)
        kept = unit * math.ceil(left / unit)
        self.unfinished = (~alive).long().argsort(stable=True)[:kept] if kept < rows else None
        return bool(left)

    def streams_of(self, work: PassWork) -> list[int]:
        """The conditional stream, and the unconditional ones that are mixed in for one modality."""
        return [0, self.stream_of[work.progress.modality], *self.further] if work.guided else [0]

    def open_streams(self, work: Sequence[PassWork]) -> None:
        """Tell the state which streams this pass mixes in, and bool `[B]` for each which rows have a use for it."""
        users: dict[int, Tensor] = {}
        for w in work:
            own = w.candidates.any(1)  # [B]
            guided = own if self.further else own & (w.scale != 1)
            for stream in self.streams_of(w):
                rows = guided if stream else own
                users[stream] = users[stream] | rows if stream in users else rows
        self.state.streams, self.state.users = tuple(sorted(users)), users
        self.passes = self.passes + users[0]

    def time(self, work: Sequence[PassWork]) -> Tensor:
        """Diffusion time `[B]` for time-conditioned models: that of the row's modality which is furthest behind.

        A modality of which a row has nothing to fill, or nothing left, does not count.
        """
        busy = [(self.state.masked & w.progress.targets).any(1) | w.progress.pending for w in work]
        return torch.stack([torch.where(row, w.time, 0.0) for row, w in zip(busy, work, strict=True)]).amax(0)

    def end_pass(self) -> None:
        """Close finished texts and move on."""
        state = self.state
        if self._end_of_text is not None:
            state.freeze(self._end_of_text.closed(state.ids, state.masked), self._end_of_text.fill)
        for progress in state.progress.values():
            progress.end_pass()
        state.step += 1

    def _complaint(self) -> str:
        """The sentence for a pass that met unusable logits: looks at each guidance stream alone, without settings."""
        state, model, guidance = self.state, self.model, self.sampler.config.guidance
        for modality, progress in state.progress.items():
            start, stop = self.sampler.vocabulary.range_of(modality)
            for stream in state.streams:
                for features in model.features(stream)[progress.targets].split(_AT_ONCE):  # [n, D]
                    logits = model.denoiser.head(features, start, stop)  # [n, V]
                    top = logits.amax(-1)
                    if bool((top.isnan() | (top == torch.inf)).any()):
                        return UNUSABLE
                    left = logits.index_fill(-1, self.sampler.banned[modality].to(logits.device), -torch.inf).amax(-1)
                    if stream == 0 and bool((left == -torch.inf).any()):
                        return (
                            f"the model gives no {modality.name.lower()} id that may be emitted any probability at some position; "
                            "check the weights, and what `forbid` excludes"
                        )
        blamed = []
        if state.streams != (0,):
            scales = {name: getattr(guidance, name) for name in ("scale", "text_scale", "image_scale")}
            blamed = [f"guidance.{name} = {value:g}" for name, value in scales.items() if value is not None]
            blamed += [f"guidance.further = {guidance.further}"] if guidance.further else []
        for modality, progress in state.progress.items():
            if (name := progress.rule.adjusts) is not None:
                blamed.append(f"{modality.name.lower()}.{name} = {getattr(progress.settings, name):g}")
        if not blamed:
            return UNUSABLE
        dtype = str(model.features(0).dtype).removeprefix("torch.")
        return (
            f"the settings take logits beyond what {dtype} holds, although the model's own are finite: "
            f"{', '.join(blamed)}; lower them, or use a wider dtype"
        )
