"""What Dynin-Omni's program drew, put into the package's own decode, and what that did, for comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from unidiff.decoding import Sampler, SamplerConfig, SamplerOutput
from unidiff.decoding.commit.base import NamedRule
from unidiff.decoding.config import ModalityDecoding
from unidiff.decoding.draw import Choice
from unidiff.families.layout import DecodeRequest
from unidiff.tokens import Modality


@dataclass(frozen=True)
class Pass:
    """What one modality did in a pass, all `[B, n]` over its places in the row.

    masked: before it. logits: `[B, n, V]`, guided. token: drawn where masked. probability: of that. picked: what was filled.
    """

    masked: Tensor
    logits: Tensor
    token: Tensor
    probability: Tensor
    picked: Tensor


@dataclass
class Tape:
    """Recorded noise in, passes out.

    places: int64 `[n]`, positions of the modality in the row. exponential: `[passes, B, n, V]`, for the tokens.
    uniform: `[passes, B, n]`, for the ranking; None for none. make: settings and targets to the rule that is watched.
    """

    places: Tensor
    exponential: Tensor
    make: Callable[[ModalityDecoding, Tensor], NamedRule]
    uniform: Tensor | None = None
    passes: list[Pass] = field(default_factory=list)

    def start(self, settings: ModalityDecoding, targets: Tensor) -> NamedRule:
        """See `RuleMaker`."""
        return TapedRule(settings, targets, self)


class TapedRule(NamedRule):
    """A rule with draws that were recorded."""

    planned = True
    adjusts = "recorded"

    def __init__(self, settings: ModalityDecoding, targets: Tensor, tape: Tape) -> None:
        super().__init__(settings, targets)
        self._rule, self._tape = tape.make(settings, targets), tape

    def count(self, now: Any) -> Tensor:
        return self._rule.count(now)

    def choose(self, logits: Tensor, index: Tensor, is_real: Tensor, u: Tensor, noise: Tensor) -> Choice:
        tape, number = self._tape, len(self._tape.passes)
        slot = self._slot = self._slots(index)
        p = logits.softmax(-1)
        drawn = tape.exponential[number].gather(1, slot[..., None].expand(p.shape))
        token = (p / drawn).argmax(-1)
        sure = p.gather(-1, token[..., None])[..., 0].double()
        self._drawn = logits, token, sure
        return Choice(token, sure, sure, torch.ones((), dtype=torch.bool))

    def looked_at(self, candidates: Tensor, count: Tensor) -> Tensor:
        return self._rule.looked_at(candidates, count)

    def rank(self, confidence: Tensor, time: Tensor, u: Tensor) -> Tensor:
        tape = self._tape
        drawn = u if tape.uniform is None else tape.uniform[len(tape.passes)].double()
        return self._rule.rank(confidence, time, drawn if tape.uniform is None else drawn.gather(1, self._slot))

    def pick(self, confidence: Tensor, score: Tensor, is_real: Tensor, count: Tensor, index: Tensor) -> Tensor:
        tape, slot = self._tape, self._slot
        picked = self._rule.pick(confidence, score, is_real, count, index)
        size = (len(slot), len(tape.places) + 1)  # one more for what is not real
        put = torch.where(is_real, slot, len(tape.places))

        def full(values: Tensor) -> Tensor:
            out = values.new_zeros(*size, *values.shape[2:])
            where = put.reshape(*put.shape, *[1] * (values.ndim - 2)).expand(values.shape)
            return out.scatter(1, where, values)[:, :-1]

        logits, token, sure = self._drawn
        tape.passes.append(Pass(*map(full, (is_real, logits, token, sure, picked & is_real))))
        return picked

    def _slots(self, index: Tensor) -> Tensor:
        return torch.searchsorted(self._tape.places, index.contiguous()).clamp_max(len(self._tape.places) - 1)


class Spy:
    """A denoiser that keeps what it sees."""

    def __init__(self, model: Any) -> None:
        self.model, self.seen = model, list[Tensor]()

    def hidden(self, ids: Tensor, *rest: Any) -> Tensor:
        self.seen.append(ids.clone())
        return self.model.hidden(ids, *rest)

    def head(self, *about: Any) -> Tensor:
        return self.model.head(*about)


def taped_run(
    model: Any, layout: Any, request: DecodeRequest, config: SamplerConfig, tapes: dict[Modality, Tape]
) -> tuple[SamplerOutput, list[Tensor]]:
    """Decode a request with recorded draws; the ids that the network saw come back too, one `[streams B, L]` for each pass."""
    seeds, pipe = torch.zeros(len(request.batch.ids), dtype=torch.long), SimpleNamespace(transformer=model)
    ready = layout.prepared(pipe, request, request.needs.keep_in(config), seeds)
    spy = Spy(model)
    guided = config.guidance.scale != 1
    run = Sampler(spy, getattr(ready, "vocabulary", None) or layout.vocabulary, ready.config, rules=tapes)
    out = run(ready.request.batch, seeds, unconditional=ready.request.unconditional if guided else None)
    return out, spy.seen
