"""What MMaDA-Parallel's programs drew, put into the package's own decode, and what that did, for comparison."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from unidiff.decoding import Sampler, SamplerOutput
from unidiff.decoding.commit import base
from unidiff.decoding.commit.base import BlockPass, NamedRule
from unidiff.decoding.config import ModalityDecoding
from unidiff.decoding.draw import Choice
from unidiff.families.layout import DecodeRequest
from unidiff.families.parallel import DefectiveTimed, WithDefects
from unidiff.tokens import Modality


@dataclass
class Draws:
    """Recorded noise of one modality.

    Args:
        tokens: `[draws, n, V]`, None for the best token. gumbel: from these and logits to a score; the best one is drawn.
        confidence: `[draws, n]`, what stands in the place of the model's; None for the model's. ranking: `[draws, n]` on scores.
    """

    tokens: Tensor | None = None
    score: Any = None
    confidence: Tensor | None = None
    ranking: Tensor | None = None


@dataclass
class Step:
    """What one modality did in one pass: positions that were masked, guided logits `[n, V]`, drawn tokens, probabilities, scale of
    the noise on the ranking, positions that were filled and how many were to stay."""

    number: int
    open: Tensor
    logits: Tensor
    token: Tensor
    confidence: Tensor
    noise_scale: float = 0.0
    score: Tensor | None = None
    filled: Tensor | None = None
    quota: int = 0
    kept: int = 0


@dataclass
class Tape:
    """Recorded noise of a modality in, its steps out."""

    draws: Draws
    places: Tensor  # int64 [n], positions in the row
    steps: list[Step] = field(default_factory=list)


class TapedRule(DefectiveTimed):
    """The package's rule with draws that were recorded."""

    tape: Tape
    _now: BlockPass

    def count(self, now: BlockPass) -> Tensor:
        self._now = now
        self._quota = super().count(now)
        return self._quota

    @property
    def over(self) -> bool:
        return bool(self._now.step[0] >= self._now.steps[0])

    def choose(self, logits: Tensor, index: Tensor, is_real: Tensor, u: Tensor, noise: Tensor) -> Choice:
        assert len(logits) == 1
        if self.over:
            return super().choose(logits, index, is_real, u, noise)
        tape, draws, n = self.tape, self.tape.draws, len(self.tape.steps)
        real = is_real[0]
        places = torch.searchsorted(tape.places, index[0, real])
        values = logits[0, real]  # [m, V]
        token = values.argmax(-1)
        if draws.tokens is not None:
            token = draws.score(values, draws.tokens[n][places]).argmax(-1)
        sure = values.double().softmax(-1).gather(-1, token[:, None])[:, 0]
        if draws.confidence is not None:
            sure = draws.confidence[n][places].double()
        tape.steps.append(Step(int(self._now.step[0]), places, values, token, sure, quota=int(self._quota[0])))
        tape.steps[-1].kept = int(self.kept(self._now)[0]) if self.settings.own_passes is not None else 0

        def drawn(_values: Tensor, _real: Tensor, *_: Any) -> Choice:
            full = [torch.zeros(is_real.shape, dtype=x.dtype) for x in (token, sure, sure)]
            for out, own in zip(full, (token, sure, sure), strict=True):
                out[0, real] = own
            return Choice(*full, is_finite=torch.ones((), dtype=torch.bool))

        kept, base.choose = base.choose, drawn
        try:
            return super().choose(logits, index, is_real, u, noise)
        finally:
            base.choose = kept

    def rank(self, confidence: Tensor, time: Tensor, u: Tensor) -> Tensor:
        if self.over:
            return confidence
        step = self.tape.steps[-1]
        step.noise_scale = float(self.settings.choice_temperature * (time[0] - 1 / self.settings.steps))
        score, m = confidence.log(), len(step.open)
        assert self.tape.draws.ranking is not None
        noise = self.tape.draws.ranking[len(self.tape.steps) - 1][step.open]
        score[0, :m] = score[0, :m] + step.noise_scale * noise
        return score

    def pick(self, confidence: Tensor, score: Tensor, is_real: Tensor, count: Tensor, index: Tensor) -> Tensor:
        pick = super().pick(confidence, score, is_real, count, index)
        if not self.over:
            step = self.tape.steps[-1]
            step.score = score[0, : len(step.open)]
            step.filled = step.open[pick[0, : len(step.open)]]
        return pick


@dataclass(frozen=True)
class TapedDefects(WithDefects):
    """Makes `TapedRule`s."""

    tape: Any = None

    def start(self, settings: ModalityDecoding, targets: Tensor) -> NamedRule:
        rule = TapedRule(settings, targets, self)
        rule.tape = self.tape
        return rule


def taped_run(
    model: Any, layout: Any, request: DecodeRequest, text: Tape, image: Tape, seed: int = 0
) -> tuple[SamplerOutput, list[Tensor]]:
    """Decode a request of one row with recorded draws; the ids that the network saw come back too, one tensor for each call."""
    config = request.needs.keep_in(request.config)
    seeds, pipe = torch.tensor([seed]), SimpleNamespace(transformer=model)
    ready = layout.prepared(pipe, request, config, seeds)
    rules = {}
    for modality, tape in ((Modality.TEXT, text), (Modality.IMAGE, image)):
        made = ready.rules[modality]
        rules[modality] = TapedDefects(made.defects, made.mask, made.positions, tape)
    spy = Spy(model)
    sampler = Sampler(spy, ready.vocabulary or layout.vocabulary, ready.config, rules=rules)
    out = sampler(ready.request.batch, seeds, record=True, unconditional=ready.request.unconditional)
    return out, spy.seen


class Spy:
    """A denoiser that keeps what it sees."""

    def __init__(self, model: Any) -> None:
        self.model, self.seen = model, list[Tensor]()

    def hidden(self, ids: Tensor, *rest: Any) -> Tensor:
        self.seen.append(ids.clone())
        return self.model.hidden(ids, *rest)

    def head(self, *about: Any) -> Tensor:
        return self.model.head(*about)
