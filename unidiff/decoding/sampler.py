"""The sampler: one loop that unmasks any part of a sequence, text or image or both."""

from __future__ import annotations

import time as wall
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from unidiff.decoding import draw
from unidiff.decoding.arguments import banned_offsets, check_ends, check_request, check_sampler
from unidiff.decoding.cache import NoCache, RefreshPolicy
from unidiff.decoding.commit.base import CommitRule, check_rules
from unidiff.decoding.commit.remask import remdm_sigma, unsure_tokens
from unidiff.decoding.config import SamplerConfig
from unidiff.decoding.graphs import CudaRecorder, PassGraphs, Record
from unidiff.decoding.request import PassWork, Request
from unidiff.decoding.state import Callback, DecodeView, ModalityProgress, declines, own_copy
from unidiff.decoding.stats import DecodeStats
from unidiff.models.denoiser import Denoiser
from unidiff.tokens import Modality, TokenBatch, Vocabulary


@dataclass(frozen=True)
class SamplerOutput:
    """A finished decode.

    Attributes:
        batch: the request with every target filled.
        confidence: float32 `[B, L]`, probability of each decoded token when it was committed (guided, at temperature 1,
            before filters); 1 at known tokens and end-of-text fill.
        nfe: network evaluations of a row; a guided pass counts once per stream.
        seconds: wall-clock time.
        trajectory: int64 `[B, L]` ids, all hidden first, then after each pass; None unless recorded.
        steps: passes of the loop, those that needed no forward included.
        stats: what the decode cost.
    """

    batch: TokenBatch
    confidence: Tensor
    nfe: int
    seconds: float
    trajectory: list[Tensor] | None = None
    steps: int = 0
    stats: DecodeStats = field(default_factory=DecodeStats)


class Sampler:
    """Fills the targets of a batch by masked diffusion.

    Args:
        model: anything with `hidden` and `head` (see `Denoiser`), in evaluation mode.
        vocabulary: id layout; `specials["eos"]`, where present, ends text rows.
        config: see `SamplerConfig`.
        policy: what each pass recomputes; no cache when left out.
        rules: commit rules of one's own, by modality, in place of the settings' `rule`.
        graphs: record the passes of a `PartialDenoiser` as CUDA graphs and replay them, see `unidiff.decoding.graphs`;
            the tokens are the same. Worth it where starting kernels takes longer than running them: deep models,
            few rows, many passes. Every request records its own. Without CUDA nothing is recorded. A `Record`
            in place of True records by other means, on any device.

    Raises:
        ValueError: an argument of another kind; `forbid` or `ends` names an id outside the vocabulary; `forbid` leaves a modality
            without tokens; `fill` is no text id.
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
        check_sampler(model, vocabulary, config, policy, graphs)
        self.model, self.vocabulary, self.config = model, vocabulary, config
        self.policy: RefreshPolicy = NoCache() if policy is None else policy
        self.rules, self.graphs = check_rules(rules), graphs
        self.banned = {
            Modality.TEXT: banned_offsets(vocabulary, Modality.TEXT, config.text.forbid),
            Modality.IMAGE: banned_offsets(vocabulary, Modality.IMAGE, config.image.forbid),
        }
        check_ends(vocabulary, config)

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
                False fills the rest in one last pass. What it raises ends the decode.
            record: keep the ids after each pass.
            unconditional: the rows of the unconditional stream where they are not `batch` with tokens hidden: another
                prompt, other padding and positions, but the same shape and targets. Overrides `guidance.hide`.
                Several for guidance in several directions: `guidance.scale` is for the first, `further` for the others.

        Raises:
            ValueError: an argument of another kind or shape, ids outside the vocabulary, or logits that cannot be drawn from;
                the message says whether the model or a setting makes them so.
        """
        begun = wall.perf_counter()
        others = check_request(self.vocabulary, self.config, batch, seeds, condition, callback, record, unconditional)
        batch, seeds = own_copy(batch), seeds.clone()  # nothing the caller does meanwhile reaches the decode
        # 1. hide the targets; open the progress of each modality, the guidance streams and the noise
        policy, graphs = self.policy.start(batch, self.model), self._graphs(batch)
        request = Request(
            self.model, self.vocabulary, self.config, batch, seeds, condition, policy, others, graphs, self.rules
        )
        state, model = request.state, request.model
        blame = partial(request.complaint, self.vocabulary, self.config.guidance, self.banned)
        trajectory = [state.ids.clone()] if record else None
        while True:
            # 2. which positions may be filled now: blocks, order, and rules that need no look at the model
            work = [self._begin(request, progress) for progress in state.progress.values()]
            if not request.synchronise(work, blame):  # the only host synchronisation of a pass
                break
            busy = [w for w in work if w.width]
            state.just_unmasked = torch.zeros_like(state.masked)
            if busy:
                # 3. plan: what to recompute and where logits are wanted
                request.open_streams(busy)
                plan = policy.plan(state, torch.stack([w.candidates for w in busy]).any(0))
                # 4. forward: features [B, L, D] of every guidance stream in use
                model.run(state.ids, plan, state.streams, request.time(work), request.unfinished)
                state.nfe = model.stats.evaluations
                # 5. logits, guidance, tokens, commit: each modality by its own rules
                for w in busy:
                    self._fill(request, w, w.shown(plan.logits))
            # 6. remask: committed tokens become fresh work
            for w in work:
                self._remask(request, w)
            # 7. close finished texts, move on, let policy and callback look
            request.end_pass()
            if busy:
                policy.observe(state, plan)
            if trajectory is not None:
                trajectory.append(state.ids.clone())
            if callback is not None and declines(callback(state.step - 1, DecodeView(state))):
                state.finishing = True
        seconds = wall.perf_counter() - begun
        return SamplerOutput(state.batch, state.confidence, state.nfe, seconds, trajectory, state.step, model.stats)

    def _graphs(self, batch: TokenBatch) -> PassGraphs | None:
        """What records the passes of a request, if anything does."""
        if self.graphs is True:
            return PassGraphs(CudaRecorder(batch.ids.device)) if batch.ids.is_cuda else None
        return PassGraphs(self.graphs) if self.graphs else None

    def _begin(self, request: Request, progress: ModalityProgress) -> PassWork:
        """What one modality may fill in this pass, and all at once where the model does not matter."""
        state, settings, rule = request.state, progress.settings, progress.rule
        now = progress.begin_pass(state.masked, request.waiting(progress.modality))
        time = progress.time(state.masked)  # [B]
        sigma = torch.zeros_like(time)
        if settings.remask == "remdm":
            sigma = remdm_sigma(settings.schedule, now.step, now.steps, settings.remask_cap)
        count = rule.count(now)
        if state.finishing:
            decided: Tensor | None = state.masked & progress.targets
        else:
            decided = rule.early(now, count, sigma, partial(request.noise, state.step))
        candidates = progress.active | progress.ahead if decided is None else decided
        scale = self.config.guidance.scale_at(progress.modality, time)
        return PassWork(progress, candidates, decided is not None, count, sigma, time, scale)

    def _fill(self, request: Request, work: PassWork, targets: Tensor) -> None:
        """Draw tokens at the targets bool `[B, L]` of one modality and commit those that its rule picks."""
        state, progress, rule = request.state, work.progress, work.progress.rule
        settings, modality, streams = progress.settings, progress.modality, request.streams_of(work)
        banned = self.banned[modality] = self.banned[modality].to(targets.device)
        blend = draw.Blend(work.scale, self.config.guidance.further, banned if len(banned) else None)
        rows = request.unfinished if rule.adjusts is None else None  # what changes logits looks at all rows
        logits = request.model.logits(modality, targets, work.width, streams, blend.weights(len(streams)), rows)
        blend = replace(blend, scale=logits.select_rows(blend.scale))
        noise, index = partial(request.noise, state.step), logits.index  # [B, n]
        is_real, u = logits.select_rows(logits.is_real), logits.select_rows(noise(draw.TOKEN).gather(1, index))
        order_noise, choice_noise = logits.select_rows(noise(draw.ORDER).gather(1, index)), noise(draw.CHOICE)
        if rule.adjusts is None:
            choice = draw.choose(logits.values, is_real, settings, u, order_noise, blend)
        else:
            values = rule.adjust(blend(logits.values), index, is_real)  # [B, n, V]
            choice = draw.choose(values[None], is_real, settings, u, order_noise)
        choice = choice.scatter_rows(logits.rows, len(state.masked))
        request.is_finite &= choice.is_finite
        pick = logits.is_real
        if not work.decided:
            confidence = score = choice.confidence
            if settings.choice_temperature:
                base = score.log() if settings.confidence == "probability" else score
                score = base + settings.choice_temperature * work.time[:, None] * draw.gumbel(
                    choice_noise.gather(1, index)
                )
            if settings.blocks_in_flight == 1:
                pick = rule.pick(confidence, score, pick, work.quota, index)
            else:  # by a threshold of their own in blocks ahead
                ahead = pick & progress.ahead.gather(1, index)
                pick = rule.pick(confidence, score, pick & ~ahead, work.quota, index)
                pick = pick | (ahead & (confidence >= settings.flight_threshold))
        start, _ = self.vocabulary.range_of(modality)
        state.write(index, pick, choice.token + start, choice.probability)

    def _remask(self, request: Request, work: PassWork) -> None:
        """Mask committed tokens of one modality again, where its settings ask for it."""
        state, progress, settings = request.state, work.progress, work.progress.settings
        if settings.remask == "none" or state.finishing:
            return
        earlier = state.committed & ~state.just_unmasked
        if settings.remask == "remdm":
            again = earlier & progress.in_block & (request.noise(state.step, draw.REMASK) < work.sigma[:, None])
        else:
            candidates = earlier & progress.targets & progress.running[:, None]
            budget = settings.remask_budget - progress.remasked
            again = unsure_tokens(state.confidence, candidates, settings.remask_threshold, budget)
        progress.remasked = progress.remasked + again.sum(1)
        progress.rule.forget(again)
        state.mask_again(again, self.vocabulary.mask_of(progress.modality))
