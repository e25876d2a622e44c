"""The sampler: one loop that unmasks any part of a sequence, text or image or both."""

from __future__ import annotations

import time as wall
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unidiff.decoding import draw
from unidiff.decoding.cache import RefreshPolicy
from unidiff.decoding.commit.ancestral import remdm_sigma
from unidiff.decoding.commit.base import CommitRule, RuleMaker, unsure_tokens
from unidiff.decoding.config import SamplerConfig
from unidiff.decoding.foretold import can_be_foretold, foretell
from unidiff.decoding.graphs import Record
from unidiff.decoding.request import Request
from unidiff.decoding.state import Callback, DecodeView, ModalityProgress, PassWork
from unidiff.decoding.stats import SamplerOutput
from unidiff.models.denoiser import Denoiser, PartialDenoiser, takes_features
from unidiff.tokens import Modality, TokenBatch, Vocabulary
from unidiff.tokens.batch import CONTINUOUS

_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
_KINDS = (torch.int64, torch.int64, torch.bool, torch.bool, torch.int64, torch.int64)  # of a batch's fields


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
        rules: Mapping[Modality, CommitRule | RuleMaker] | None = None,
        graphs: bool | Record = False,
    ) -> None:
        check_sampler(model, vocabulary, config, policy, rules, graphs)
        self.model, self.vocabulary, self.config = model, vocabulary, config
        self.policy, self.rules, self.graphs = policy, dict(rules or {}), graphs
        banned = partial(banned_offsets, vocabulary)
        self.banned = {m: banned(m, own.forbid, not own.writes_mask) for m in Modality if (own := config.of(m))}
        self.banned_last = {m: banned(m, config.of(m).forbid) for m in Modality}  # in a pass that fills everything

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
                shape and targets, or fewer, where what is given stays. Several for guidance in several directions:
                `guidance.scale` is for the first, `further` for the others.

        Raises:
            ValueError: an argument of another kind or shape, ids outside the vocabulary, or logits that cannot be drawn from;
                the message says whether the model or a setting makes them so.
        """
        begun = wall.perf_counter()
        checked = self.model, self.vocabulary, self.config, batch, seeds, condition, callback, record, unconditional
        host, others, known = check_request(*checked)
        # 1. hide the targets; open the progress of each modality, the guidance streams and the noise
        request = Request(self, batch, host, seeds, condition, others)
        state, policy, model = request.state, request.policy, request.open_model(condition, others)
        if host is not batch and can_be_foretold(request):
            request.foretold = foretell(self, Request(self, host, host, seeds.cpu(), condition, known))
        trajectory = [state.ids.clone()] if record else None
        while True:
            # 2. which positions may be filled now: blocks, order, and rules that need no look at the model
            work = [self.begin(request, progress) for progress in state.progress.values()]
            # 3. plan: what to recompute and where logits are wanted; the only host synchronisation of a pass
            plan = request.plan(work)
            if plan is None:
                break
            busy = [w for w in work if w.width]
            if busy:
                shown, time = sum(w.width for w in busy), request.time(work)
                for streams, part in self.config.guidance.turns(state.streams, busy):
                    # 4. forward: features [B, L, D] of every guidance stream in use
                    model.run(state.ids, plan, streams, time, request.unfinished, shown)
                    # 5. logits, guidance, tokens, commit: each modality by its own rules
                    for w in part:
                        self._fill(request, w, w.shown(plan.logits))
                state.nfe = model.stats.evaluations
            # 6. remask: committed tokens become fresh work
            for w in work:
                self.remask(request, w)
            # 7. close finished texts, move on, let policy and callback look
            request.end_pass()
            if callback is not None:
                state.recomputed = plan.recomputed(state.batch.valid & bool(busy))
            if callback is not None and state.heed(callback(state.step - 1, DecodeView(state)), self.vocabulary):
                request.foretold = iter(())
            if busy and policy is not None:
                policy.observe(state, plan)
            if trajectory is not None:
                trajectory.append(state.ids.clone())
        seconds = wall.perf_counter() - begun
        tokens = (state.batch.targets & ~state.frozen).sum(1) / request.passes.clamp_min(1).double()  # [B]
        cost = trajectory, state.step, model.stats, tokens
        return SamplerOutput(state.batch, state.confidence, state.nfe, seconds, *cost)

    def begin(self, request: Request, progress: ModalityProgress) -> PassWork:
        """What one modality may fill in this pass, and all at once where the model does not matter."""
        state, rule = request.state, progress.rule
        now = request.before_end(progress, progress.begin_pass(state.masked, request.waiting(progress)))
        time, count = progress.time(state.masked), rule.count(now)  # [B]
        decided = rule.early(now, count, partial(request.noise, state.step))
        if state.finishing:
            decided = state.masked & progress.targets
        candidates = rule.looked_at(now.active | progress.ahead, count) if decided is None else decided
        if progress.edits is not None and not state.finishing:
            candidates = candidates | (progress.editable(state.masked) & ~state.frozen)
        scale = self.config.guidance.scale_at(progress.modality, time)
        return PassWork(progress, candidates, decided is not None, count, time, scale)

    def _fill(self, request: Request, work: PassWork, targets: Tensor) -> None:
        """Draw tokens at `targets` bool `[B, L]` of one modality, and commit those that its rule picks."""
        state, progress, rule = request.state, work.progress, work.progress.rule
        settings, modality, streams = progress.settings, progress.modality, request.streams_of(work)
        guidance = self.config.guidance
        banned = (request.banned_last if state.finishing else request.banned)[modality]
        blend = draw.Blend(work.scale, guidance.directions, banned, guidance.chained)
        rows = request.unfinished if rule.adjusts is None else None  # what changes logits looks at all rows
        mix = blend.weights(len(streams))  # [S, B]
        logits = request.model.logits(modality, targets, work.width, streams, mix, rows, guidance.rescale)
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
        pick, token = real, choice.token + self.vocabulary.range_of(modality)[0]
        if not work.decided:
            confidence = score = choice.confidence
            if settings.choice_temperature:
                score = rule.rank(confidence, work.time, noise(draw.CHOICE).gather(1, index))
            ahead = real & progress.ahead.gather(1, index)  # in blocks to come: by a threshold of their own
            known = ~real if progress.edits is None else real & ~state.masked.gather(1, index)
            pick = rule.picked(choice, score, real & ~ahead & ~known, work.quota, index)
            pick = pick | (ahead & (confidence >= settings.flight_threshold))
            if progress.edits is not None:
                pick = pick | progress.edits.replaced(known, confidence, token != state.ids.gather(1, index))
        stays = (
            self.vocabulary.mask_of(modality) if settings.writes_mask else -1
        )  # the id that leaves a position masked
        state.write(index, pick, token, choice.probability, stays)

    def remask(self, request: Request, work: PassWork) -> None:
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


def _check_is(name: str, value: object, kind: Any, expected: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {_name(value)}; expected {expected}")


def check_sampler(model: Any, vocabulary: Any, config: Any, policy: Any, rules: Any, graphs: Any) -> None:
    """Raise `ValueError` unless a `Sampler` can be made of these."""
    _check_methods("model", model, ("hidden", "head"), "see `Denoiser`")
    _check_is("vocabulary", vocabulary, Vocabulary, "a Vocabulary")
    _check_is("config", config, SamplerConfig, "a SamplerConfig (SamplerConfig.from_dict reads plain data)")
    if policy is not None:
        _check_methods("policy", policy, ("start", "plan"), "see `RefreshPolicy`; CacheConfig(name).build() makes one")
    _check_is("rules", rules, Mapping | None, "a mapping or nothing (null)")
    for modality, rule in (rules or {}).items():
        if not callable(rule) and not hasattr(rule, "start"):
            raise ValueError(f"rules has {rule!r} as a rule; expected a function, see `CommitRule`")
        if not isinstance(modality, Modality):
            raise ValueError(f"rules has the key {modality!r}; expected Modality.TEXT or Modality.IMAGE")
    if not isinstance(graphs, bool) and not callable(graphs):
        raise ValueError(f"graphs is {_name(graphs)}; expected true or false, or a `Record`")
    if isinstance(model, PartialDenoiser) and model.traits.ids < vocabulary.size:
        raise ValueError(
            f"the model has {model.traits.ids} ids, the vocabulary {vocabulary.size}; give the vocabulary that the "
            "model was made for"
        )
    _check_ids("ends", config.ends, vocabulary)
    (start, stop), masks = vocabulary.text, (vocabulary.mask_id, vocabulary.image_mask)
    if config.fill is not None and (not start <= config.fill < stop or config.fill in masks):
        raise ValueError(f"fill is id {config.fill}; expected a text id from {start} to {stop - 1} that is not [MASK]")


def check_request(
    model: Any,
    vocabulary: Vocabulary,
    config: SamplerConfig,
    batch: Any,
    seeds: Any,
    condition: Any,
    callback: Any,
    record: Any,
    unconditional: Any,
) -> tuple[TokenBatch, tuple[TokenBatch, ...], list[TokenBatch]]:
    """Raise `ValueError` unless a `Sampler` can be called with these; returns the batch on the CPU, the unconditional ones, and
    those on the CPU."""
    host = _check_batch("batch", batch, vocabulary)
    rows, length = batch.shape
    _check_tensor("seeds", seeds, _INTEGERS, (rows,), f"an int64 tensor [{rows}], one per row", plural=True)
    if condition is not None:
        _check_tensor("condition", condition, (torch.bool,), (rows, length), f"a bool tensor {batch.shape}")
    if callback is not None and not callable(callback):
        raise ValueError(f"callback is {_name(callback)}; expected a function of (step, state)")
    _check_is("record", record, bool, "true or false")
    several = isinstance(unconditional, Sequence) and not isinstance(unconditional, str)
    others = tuple(unconditional) if several else () if unconditional is None else (unconditional,)
    on_host = [_check_batch("unconditional", other, vocabulary) for other in others]
    if others and condition is not None:
        raise ValueError("condition and unconditional both say what the unconditional stream sees; give one of them")
    if max(1, len(others)) != 1 + len(config.guidance.further):
        raise ValueError(
            f"guidance has {1 + len(config.guidance.further)} scales for {len(others)} unconditional batches; "
            "`Guidance.further` takes a scale for each after the first"
        )
    for other in on_host:
        if other.shape != batch.shape:
            raise ValueError(f"unconditional has shape {other.shape}; expected {batch.shape}, that of the batch")
        if bool((other.targets & ~host.targets).any()):
            raise ValueError(
                "unconditional has other targets than the batch; align the rows, for instance by left padding"
            )
    if any(rows.features is not None for rows in (host, *on_host)) and not takes_features(model):
        raise ValueError(
            f"the batch has continuous features, but {type(model).__name__} reads ids alone; its hidden needs an argument "
            "`features`, see `Denoiser`"
        )
    return host, others, on_host


def _check_batch(name: str, batch: Any, vocabulary: Vocabulary) -> TokenBatch:
    """The batch on the CPU, brought in one go."""
    if not isinstance(batch, TokenBatch):
        raise ValueError(f"{name} is {_name(batch)}; expected a TokenBatch")
    shape = tuple(getattr(batch.ids, "shape", ())[:2])
    for f, kind in zip(fields(TokenBatch), _KINDS, strict=False):
        value, own = getattr(batch, f.name), (*shape, 3) if f.name == "positions" else shape
        expected = f"{kind} {list(own)}"
        _check_tensor(f"{name} {f.name}", value, (kind,), own, expected, plural=True)
        if value.device != batch.ids.device:
            raise ValueError(f"{name} {f.name} are on {value.device}; expected {batch.ids.device}, that of the ids")
    if len(shape) != 2 or not batch.ids.numel():
        raise ValueError(f"{name} has shape {shape}; expected at least one row of at least one token")
    if (features := batch.features) is not None:
        width = features.shape[-1:] if isinstance(features, Tensor) else ()
        floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        _check_tensor(f"{name} features", features, floats, (*shape, *width), f"floats {[*shape, 'D']}", plural=True)
        if features.device != batch.ids.device:
            raise ValueError(f"{name} features are on {features.device}; expected {batch.ids.device}, that of the ids")
    host = batch.to("cpu")
    known = host.valid & host.given if features is None else host.valid & host.given & (host.ids != CONTINUOUS)
    low, high = map(int, torch.where(known, host.ids, 0).aminmax())
    first, last = map(int, torch.where(host.valid, host.modality, 0).aminmax())
    if not 0 <= low <= high < vocabulary.size:
        raise ValueError(
            f"{name} gives ids from {low} to {high}, but the vocabulary has ids 0 to {vocabulary.size - 1}"
        )
    if not 0 <= first <= last < len(Modality):
        raise ValueError(f"{name} has modalities from {first} to {last}; expected 0 (text) and 1 (image)")
    return host


def _check_tensor(
    name: str, value: Any, kinds: Sequence[torch.dtype], shape: tuple[int, ...], expected: str, plural: bool = False
) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} {'are' if plural else 'is'} {_name(value)}; expected {expected}")
    if value.layout != torch.strided or value.is_meta or value.is_quantized:
        kind = "on the meta device, without values" if value.is_meta else str(value.layout).removeprefix("torch.")
        raise ValueError(f"{name} is a tensor {kind}; expected a plain one (`.to_dense()`, or real values)")
    if value.dtype not in kinds or value.shape != shape:
        found = f"shape {tuple(value.shape)} and dtype {value.dtype}"
        raise ValueError(f"{name} {'have' if plural else 'has'} {found}; expected {expected}")


def _check_methods(name: str, value: object, methods: Sequence[str], hint: str) -> None:
    if missing := [m for m in methods if not hasattr(value, m)]:
        raise ValueError(f"{name} is {_name(value)} without {' and '.join(missing)}; {hint}")


def _name(value: object) -> str:
    shown = repr(value) if isinstance(value, bool | int | float | str | type(None)) else f"a {type(value).__name__}"
    return shown if len(shown) < 80 else f"{shown[:77]}..."


def banned_offsets(vocabulary: Vocabulary, modality: Modality, forbid: tuple[int, ...], masks: bool = True) -> Tensor:
    """Offsets in the modality's slice that may not be emitted, int64; [MASK] among them where `masks` says so."""
    _check_ids("forbid", forbid, vocabulary)
    start, stop = vocabulary.range_of(modality)
    offsets = {i - start for i in forbid if start <= i < stop}
    offsets |= set(vocabulary.forbidden(modality)) if masks else set()
    if stop > start and len(offsets) == stop - start:
        raise ValueError(f"every {modality.name.lower()} id is forbidden; leave at least one to emit")
    return torch.tensor(sorted(offsets), dtype=torch.long)


def _check_ids(name: str, ids: Sequence[int], vocabulary: Vocabulary) -> None:
    if outside := [i for i in ids if not 0 <= i < vocabulary.size]:
        raise ValueError(f"{name} names id {outside[0]}, but the vocabulary has ids 0 to {vocabulary.size - 1}")
