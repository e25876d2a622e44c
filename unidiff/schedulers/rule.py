"""A discrete scheduler of diffusers as the commit rule of a modality: it draws the tokens and says which of them stay.

Masked positions are to it what it denoises. What it would renoise (`EntropyBoundScheduler`, `DiscreteDDIMScheduler`) stays
masked: of the uniform process only the noise differs, the chance that a position is settled is the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unidiff.decoding import ModalityDecoding, SamplerConfig
from unidiff.decoding.commit.base import BlockPass, NamedRule, RuleMaker
from unidiff.decoding.config import RULES
from unidiff.decoding.draw import Choice
from unidiff.pipelines.options import DecodeOptions
from unidiff.tokens import Modality

DISCRETE = ("BlockRefinementScheduler", "EntropyBoundScheduler", "DiscreteDDIMScheduler", "AmusedScheduler")
_SECOND_LOOKS = ("editing_threshold", "corrector_steps")  # settings that change tokens which are no longer masked
_SEEDS = 1 << 53


@dataclass(frozen=True)
class SchedulerRule:
    """Makes a `ScheduledRows` for each request.

    Raises:
        ValueError: a scheduler that is none of `DISCRETE`, or one that changes tokens a second time.
    """

    scheduler: Any

    def __post_init__(self) -> None:
        kinds, name = {kind.__name__ for kind in type(self.scheduler).__mro__}, type(self.scheduler).__name__
        if not kinds & set(DISCRETE):
            raise ValueError(
                f"the scheduler is a {name}; expected an UnmaskingScheduler or one of {', '.join(DISCRETE)}"
            )
        for setting in _SECOND_LOOKS:
            if (value := self.scheduler.config.get(setting)) and value > 0:
                raise ValueError(f"{setting} of {name} is {value}, but tokens of a mask are drawn once; leave it out")

    def start(self, settings: ModalityDecoding, targets: Tensor) -> NamedRule:
        return ScheduledRows(settings, targets, self.scheduler)


def scheduled_options(scheduler: Any) -> DecodeOptions:
    """What a scheduler's config says about every decode: passes and blocks; ours says more itself."""
    if hasattr(scheduler, "options"):
        return scheduler.options
    return DecodeOptions(
        steps=scheduler.config.get("num_inference_steps"), block_length=scheduler.config.get("block_length")
    )


def with_scheduler(scheduler: Any, config: SamplerConfig) -> tuple[SamplerConfig, Mapping[Modality, RuleMaker]]:
    """Settings and rules with which a scheduler of diffusers decides; ours has said everything in its options."""
    if hasattr(scheduler, "options"):
        return config, {}
    rule = SchedulerRule(scheduler)
    text, image = (
        replace(RULES[own.rule].in_steps(own, own.steps, own.schedule), rule="quota", remask="none")
        for own in (config.text, config.image)
    )
    return replace(config, text=text, image=image), dict.fromkeys((Modality.TEXT, Modality.IMAGE), rule)


class ScheduledRows(NamedRule):
    """Each row has a copy of the scheduler, begun anew with each block, and a generator from the row's noise.

    So a row is decoded alone as in a batch. It takes part in as many passes as its settings have steps, of which the last
    takes all that is left. Every row and pass is a call on the host.
    """

    name = "scheduler"
    planned = capped = True
    compares = False
    adjusts = "temperature"

    def __init__(self, settings: ModalityDecoding, targets: Tensor, scheduler: Any) -> None:
        super().__init__(settings, targets)
        self._scheduler, self._rows = scheduler, [scheduler] * len(targets)
        takes = inspect.signature(scheduler.step).parameters
        known = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
        self._settings = {name: value for name, value in known.items() if name in takes}
        self._takes_mask = "mask_token_id" in takes
        self._now: BlockPass | None = None
        self._pick = torch.zeros(0)

    def count(self, now: BlockPass) -> Tensor:
        self._now = now
        return now.remaining

    def choose(self, logits: Tensor, index: Tensor, is_real: Tensor, u: Tensor, noise: Tensor) -> Choice:
        assert self._now is not None
        token, pick = torch.zeros_like(index), torch.zeros_like(is_real)
        starts, steps, made = (x.tolist() for x in (self._now.start, self._now.steps, self._now.step))
        finite = logits.amax(-1).isfinite() | ~is_real
        for row in (is_real & finite).any(1).nonzero()[:, 0].tolist():
            own = is_real[row]
            if made[row] == 0:
                self._rows[row] = self._begun(steps[row], starts[row], logits)
            seed = int(u[row][own][0] * _SEEDS)
            last = made[row] + 1 >= steps[row]
            drawn, settled = self._step(row, logits[row][own], starts[row], min(made[row], steps[row] - 1), seed)
            token[row, own], pick[row, own] = drawn, settled | last
        self._pick = pick
        probability = logits.double().softmax(-1).gather(-1, token[..., None])[..., 0]
        return Choice(token, probability, probability, finite.all())

    def pick(self, confidence: Tensor, score: Tensor, is_real: Tensor, count: Tensor, index: Tensor) -> Tensor:
        return self._pick & is_real

    def _begun(self, steps: int, size: int, logits: Tensor) -> Any:
        """A scheduler at the start of a block of `size` positions."""
        kind = type(self._scheduler)
        said = {**self._scheduler.config, "mask_token_id": logits.shape[-1], "block_length": size}
        new = kind(**{name: said[name] for name in inspect.signature(kind).parameters if name in said})
        takes_temperature = "temperature" in inspect.signature(new.set_timesteps).parameters
        own = {"temperature": (self.settings.choice_temperature, 0)} if takes_temperature else {}
        new.set_timesteps(steps, device=logits.device, **own)
        return new

    def _step(self, row: int, logits: Tensor, size: int, step: int, seed: int) -> tuple[Tensor, Tensor]:
        """Tokens int64 `[n]` and bool `[n]`, which of them stay, of logits `[n, V]` at the masked positions of a block.

        The scheduler sees the whole block: what is known already is a token that is sure.
        """
        open_, width = len(logits), logits.shape[-1]
        block = torch.full((1, max(size, open_), width), -torch.inf, device=logits.device)
        block[0, :open_], block[0, open_:, 0] = logits.float(), 0.0
        sample = torch.zeros(block.shape[:2], dtype=torch.long, device=logits.device)
        sample[0, :open_] = width  # no token: whatever it draws differs from it
        scheduler, generator = self._rows[row], torch.Generator(logits.device).manual_seed(seed)
        more = {"mask_token_id": width} if self._takes_mask else {}
        backwards = hasattr(scheduler, "temperatures")  # AmusedScheduler counts down
        timestep = len(scheduler.timesteps) - 1 - step if backwards else step
        out = scheduler.step(block, timestep, sample, generator=generator, **self._settings, **more)
        drawn = out.pred_original_sample if backwards else out.sampled_tokens
        settled = out.accepted_index if hasattr(out, "accepted_index") else out.prev_sample == drawn
        return drawn[0, :open_], settled[0, :open_]
