"""The sampler: one loop that unmasks any part of a sequence, text or image or both."""

from __future__ import annotations

import time as wall
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from unidiff.decoding import draw
from unidiff.decoding.arguments import check_request, check_sampler
from unidiff.decoding.cache import NoCache, RefreshPolicy
from unidiff.decoding.commit.choose import decide, decide_early, quota, unmask_chance
from unidiff.decoding.commit.remask import remdm_sigma, unsure_tokens
from unidiff.decoding.commit.rules import CommitRule, check_rules, guarded
from unidiff.decoding.config import SamplerConfig
from unidiff.decoding.forward import PositionLogits
from unidiff.decoding.graphs import CudaRecorder, PassGraphs, Record
from unidiff.decoding.guidance import scale_at
from unidiff.decoding.request import Request
from unidiff.decoding.state import Clock
from unidiff.decoding.stats import DecodeStats
from unidiff.decoding.unusable import complaint
from unidiff.decoding.watch import Callback, DecodeView, declines, own_copy
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


@dataclass
class Work:
    """What one modality does in one pass.

    Attributes:
        candidates: bool `[B, L]`, positions whose logits are wanted.
        decided: all candidates are filled whatever the model says (rules that do not look at confidences).
        quota: int64 `[B]`. sigma: float64 `[B]`, ReMDM's chance. time: float64 `[B]`. scale: guidance `[B]`.
        width: most candidates in a row, rounded up so that few different shapes occur. guided: some row has scale != 1.
    """

    clock: Clock
    candidates: Tensor
    decided: bool
    quota: Tensor
    sigma: Tensor
    time: Tensor
    scale: Tensor
    width: int = 0
    guided: bool = False

    def shown(self, logits: Tensor) -> Tensor:
        """Candidates whose logits the cache policy shows, bool `[B, L]`; the clock of rows without any stands still."""
        shown = self.candidates & logits
        self.clock.hold(self.candidates.any(1) & ~shown.any(1))
        return shown


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
        settings = {Modality.TEXT: config.text, Modality.IMAGE: config.image}
        self._banned = {m: _banned_offsets(vocabulary, m, s.forbid) for m, s in settings.items()}
        _check_ends(vocabulary, config)

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
        check_request(self.vocabulary, batch, seeds, condition, callback, record, unconditional)
        batch, seeds = own_copy(batch), seeds.clone()  # nothing the caller does meanwhile reaches the decode
        # 1. hide the targets; open the clocks, the guidance streams and the noise
        policy = self.policy.start(batch, self.model)
        own = condition, policy, unconditional, self._graphs(batch)
        request = Request.open(self.model, self.vocabulary, self.config, batch, seeds, *own)
        state, forward = request.state, request.forward
        blame = partial(complaint, self.model, self.vocabulary, self.config, self._banned)
        trajectory = [state.ids.clone()] if record else None
        while True:
            # 2. which positions may be filled now: blocks, order, and rules that need no look at the model
            work = [self._begin(request, clock) for clock in state.clocks.values()]
            if not request.synchronise(work, blame):  # the only host synchronisation of a pass
                break
            busy = [w for w in work if w.width]
            state.written = torch.zeros_like(state.open)
            if busy:
                # 3. plan: what to recompute and where logits are wanted
                state.streams, state.users = tuple(request.streams(busy)), request.users(busy)
                plan = policy.plan(state, torch.stack([w.candidates for w in busy]).any(0))
                # 4. forward: features [B, L, D] of every guidance stream in use
                forward.run(state.ids, plan, state.streams, request.time(work), request.unfinished)
                state.nfe = forward.stats.evaluations
                # 5. logits, guidance, tokens, commit: each modality by its own rules
                for w in busy:
                    self._fill(request, w, w.candidates if plan.logits is None else w.shown(plan.logits))
            # 6. remask: committed tokens become fresh work
            for w in work:
                self._remask(request, w)
            # 7. close finished texts, move the clocks, let policy and callback look
            request.end_pass()
            if busy:
                policy.observe(state, plan)
            if trajectory is not None:
                trajectory.append(state.ids.clone())
            if callback is not None and declines(callback(state.step - 1, DecodeView(state))):
                state.finishing = True
        seconds = wall.perf_counter() - begun
        return SamplerOutput(state.batch, state.confidence, state.nfe, seconds, trajectory, state.step, forward.stats)

    def _graphs(self, batch: TokenBatch) -> PassGraphs | None:
        """What records the passes of a request, if anything does."""
        if self.graphs is True:
            return PassGraphs(CudaRecorder(batch.ids.device)) if batch.ids.is_cuda else None
        return PassGraphs(self.graphs) if self.graphs else None

    def _begin(self, request: Request, clock: Clock) -> Work:
        """Candidates of one modality, with everything its rules need to know about the clock."""
        state, settings = request.state, clock.settings
        clock.begin_pass(state.open, request.waiting(clock.modality))
        step, steps = clock.step, clock.steps
        time = clock.time(state.open)
        sigma = torch.zeros_like(time)
        if settings.remask == "remdm":
            sigma = remdm_sigma(settings.schedule, step, steps, settings.remask_cap)
        count = clock.remaining
        if settings.rule == "quota":
            count = quota(settings.schedule, clock.start, clock.remaining, step, steps)
        decided = None
        if state.finishing:
            decided = state.open & clock.wanted
        elif clock.modality in self.rules:
            pass  # a rule of one's own always looks
        elif settings.rule == "ancestral":
            chance = unmask_chance(settings.schedule, step, steps, sigma)
            decided = clock.active & (request.noise(state.step, draw.UNMASK) < chance[:, None])
        else:
            decided = decide_early(settings, clock.active, count, request.noise(state.step, draw.ORDER))
        candidates = clock.active | clock.ahead if decided is None else decided
        scale = scale_at(self.config.guidance, clock.modality, time)
        return Work(clock, candidates, decided is not None, count, sigma, time, scale)

    def _fill(self, request: Request, work: Work, wanted: Tensor) -> None:
        """Draw tokens at the wanted positions `[B, L]` of one modality and commit those that its rule picks."""
        state, settings, modality = request.state, work.clock.settings, work.clock.modality
        streams = [0, request.stream_of[modality], *request.further] if work.guided else [0]
        banned = self._banned[modality] = self._banned[modality].to(wanted.device)
        blend = draw.Blend(work.scale, self.config.guidance.further, banned if len(banned) else None)
        rows = None if work.clock.credit is not None else request.unfinished  # credit is kept for all rows
        logits = request.forward.logits(modality, wanted, work.width, streams, blend.weights(len(streams)), rows)
        blend = replace(blend, scale=logits.own(blend.scale))
        token_noise, order_noise, choice_noise = (
            request.noise(state.step, use).gather(1, logits.index) for use in (draw.TOKEN, draw.ORDER, draw.CHOICE)
        )  # [B, n]
        live, noises = logits.own(logits.live), (logits.own(token_noise), logits.own(order_noise))
        if work.clock.credit is None:
            choice = draw.choose_blended(logits.values, blend, live, settings, *noises)
        else:
            values = work.clock.credit.add(blend(logits.values), logits.index, live)  # [B, n, V]
            choice = draw.choose(values, live, settings, *noises)
        choice = choice.spread(logits.rows, len(state.open))
        request.sound &= choice.sound
        pick = logits.live
        if not work.decided:
            score = choice.confidence
            if settings.choice_temperature:
                base = score.log() if settings.confidence == "probability" else score
                score = base + settings.choice_temperature * work.time[:, None] * draw.gumbel(choice_noise)
            pick = self._pick(work, logits, choice.confidence, score)
        start, _ = self.vocabulary.range_of(modality)
        state.written |= state.write(logits.index, pick, choice.token + start, choice.probability)

    def _pick(self, work: Work, logits: PositionLogits, confidence: Tensor, score: Tensor) -> Tensor:
        """Candidates `[B, n]` to fill: by the rule in the current block, by a threshold of their own in blocks ahead."""
        settings, live = work.clock.settings, logits.live
        own = self.rules.get(work.clock.modality)
        rule: Callable[..., Tensor] = partial(decide, settings) if own is None else guarded(own, settings)
        if settings.blocks_in_flight == 1:
            return rule(confidence, score, live, work.quota, logits.index)
        ahead = live & work.clock.ahead.gather(1, logits.index)
        pick = rule(confidence, score, live & ~ahead, work.quota, logits.index)
        return pick | (ahead & (confidence >= settings.flight_threshold))

    def _remask(self, request: Request, work: Work) -> None:
        """Mask committed tokens of one modality again, where its settings ask for it."""
        state, clock, settings = request.state, work.clock, work.clock.settings
        if settings.remask == "none" or state.finishing:
            return
        earlier = state.committed & ~state.written
        if settings.remask == "remdm":
            again = earlier & clock.in_block & (request.noise(state.step, draw.REMASK) < work.sigma[:, None])
        else:
            candidates = earlier & clock.wanted & clock.running[:, None]
            budget = settings.remask_budget - clock.remasked
            again = unsure_tokens(state.confidence, candidates, settings.remask_threshold, budget)
        clock.remasked = clock.remasked + again.sum(1)
        if clock.credit is not None:
            clock.credit.forget(again)
        state.mask_again(again, self.vocabulary.mask_of(clock.modality))


def _banned_offsets(vocabulary: Vocabulary, modality: Modality, forbid: tuple[int, ...]) -> Tensor:
    """Offsets in the modality's slice that may not be emitted, int64."""
    if outside := [i for i in forbid if not 0 <= i < vocabulary.size]:
        raise ValueError(f"forbid names id {outside[0]}, but the vocabulary has ids 0 to {vocabulary.size - 1}")
    start, stop = vocabulary.range_of(modality)
    offsets = {i - start for i in forbid if start <= i < stop} | set(vocabulary.forbidden(modality))
    if stop > start and len(offsets) == stop - start:
        raise ValueError(f"every {modality.name.lower()} id is forbidden; leave at least one to emit")
    return torch.tensor(sorted(offsets), dtype=torch.long)


def _check_ends(vocabulary: Vocabulary, config: SamplerConfig) -> None:
    """Raise `ValueError` for ends that no id is, and for a fill that may not be emitted."""
    if outside := [i for i in config.ends if i >= vocabulary.size]:
        raise ValueError(f"ends names id {outside[0]}, but the vocabulary has ids 0 to {vocabulary.size - 1}")
    start, stop = vocabulary.text
    if config.fill is not None and (
        not start <= config.fill < stop or config.fill in (vocabulary.mask_id, vocabulary.image_mask)
    ):
        raise ValueError(f"fill is id {config.fill}; expected a text id from {start} to {stop - 1} that is not [MASK]")
