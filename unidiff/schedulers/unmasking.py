"""`UnmaskingScheduler`: settings of a decode as a scheduler component, which also steps in loops of diffusers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from unidiff.decoding import ModalityDecoding, SamplerConfig, draw
from unidiff.decoding.commit.base import BlockPass, NamedRule
from unidiff.decoding.config import RULES
from unidiff.pipelines.options import DecodeOptions, one_of, whole

_MOST_STEPS = 100_000


@dataclass
class UnmaskingSchedulerOutput(BaseOutput):
    """After a step: int64 `[B, L]` ids with [MASK] where open, bool `[B, L]` of what the step settled, and at every position
    the token that was drawn, int64 `[B, L]`, and its probability, float64 `[B, L]`."""

    prev_sample: Tensor
    transfer_index: Tensor
    sampled_tokens: Tensor
    sampled_probs: Tensor


class UnmaskingScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """How masked tokens are filled. As `pipe.scheduler` it holds for every call that says nothing else: a whole `SamplerConfig`
    in place of each task's own, and single settings on top of it. Its config holds what was said, and no defaults.

    In a loop of diffusers:

        scheduler.set_timesteps(8)
        for t in scheduler.timesteps:
            sample = scheduler.step(model(sample), t, sample).prev_sample

    Args:
        mask_token_id: the id of [MASK], for `step`.
        modality: whose settings `step` goes by: "text" or "image".
        sampler: a `SamplerConfig`, or its plain data.
        num_inference_steps, temperature, threshold, block_length: see `DecodeOptions`.

    Raises:
        ValueError: a value of another kind or out of range.
    """

    order = 1
    _compatibles = ["BlockRefinementScheduler", "EntropyBoundScheduler", "DiscreteDDIMScheduler", "AmusedScheduler"]  # noqa: RUF012

    def __init__(
        self,
        mask_token_id: int | None = None,
        modality: str = "image",
        sampler: SamplerConfig | Mapping[str, Any] | None = None,
        num_inference_steps: int | None = None,
        temperature: float | None = None,
        threshold: float | None = None,
        block_length: int | None = None,
    ) -> None:
        one_of(modality, "modality", ("text", "image"))
        if mask_token_id is not None:
            whole(mask_token_id, "mask_token_id", 0, 2**31)
        own = SamplerConfig.from_dict(sampler) if isinstance(sampler, Mapping) else sampler
        self.options = DecodeOptions(
            steps=num_inference_steps,
            temperature=temperature,
            sampler=own,
            block_length=block_length,
            threshold=threshold,
        )
        self.sampler = self.options.apply(SamplerConfig(), drawn=modality == "image")
        self.changes = self.options != DecodeOptions()
        said: dict[str, Any] = {
            "num_inference_steps": num_inference_steps,
            "temperature": temperature,
            "threshold": threshold,
        }
        said |= {"block_length": block_length, "sampler": own and own.to_dict(), "mask_token_id": mask_token_id}
        said["modality"] = None if modality == "image" else modality
        self.register_to_config(**{k: v for k, v in said.items() if v is not None})
        self._rule: NamedRule | None = None
        self._start = torch.zeros(0)
        self.set_timesteps(self.settings.steps)

    @property
    def settings(self) -> ModalityDecoding:
        """Of the modality that `step` fills."""
        return self.sampler.text if self.config.get("modality") == "text" else self.sampler.image

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Begin a decode of so many steps: `timesteps` counts them from 0."""
        self.num_inference_steps = whole(num_inference_steps, "num_inference_steps", 1, _MOST_STEPS)
        self.timesteps = torch.arange(num_inference_steps, device=device)
        self._rule = None

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        mask_token_id: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> UnmaskingSchedulerOutput | tuple[Tensor, ...]:
        """Fill some of the masked positions, by the commit rule of the settings; in the last step all.

        Args:
            model_output: logits `[B, L, V]` of one block; guidance is the caller's.
            timestep: one of `timesteps`.
            sample: int64 `[B, L]`, ids with [MASK] where open.
            mask_token_id: of this call, in place of the config's.
            generator: one for all rows, or a list of one for each, with which rows do not depend on each other.

        Raises:
            ValueError: no id of [MASK], tensors that do not fit together, or settings that mask tokens again.
        """
        mask = self.config.get("mask_token_id") if mask_token_id is None else mask_token_id
        if mask is None:
            raise ValueError("mask_token_id is not known; give it to the scheduler or to step")
        if model_output.ndim != 3 or model_output.shape[:2] != sample.shape:
            shapes = f"{tuple(model_output.shape)} and sample {tuple(sample.shape)}"
            raise ValueError(f"model_output has shape {shapes}; expected [B, L, V] and [B, L]")
        settings = replace(self.settings, steps=self.num_inference_steps)
        if settings.remask != "none":
            raise ValueError(f"remask is {settings.remask!r}, which pipelines of unidiff can do, but no step alone")
        made, masked = int(timestep), sample == mask
        if self._rule is None or made == 0:
            self._rule, self._start = RULES[settings.rule](settings, masked), masked.sum(1)
        rule, noise = self._rule, _noise(generator, sample)
        left = masked.sum(1)
        steps = torch.full_like(left, self.num_inference_steps)
        now = BlockPass(masked, self._start, left, torch.full_like(left, made), steps)
        count = rule.count(now)
        decided = rule.early(now, count, lambda use: noise[use])
        never = [i for i in (mask, *settings.forbid) if i < model_output.shape[-1]]
        logits = model_output.index_fill(-1, torch.tensor(never, device=sample.device, dtype=torch.long), -torch.inf)
        places = torch.arange(sample.shape[1], device=sample.device).expand_as(sample)
        choice = rule.choose(logits, places, masked, noise[draw.TOKEN], noise[draw.ORDER])
        time = 1 - now.step.double() / steps if rule.planned else left.double() / self._start.clamp_min(1)
        score = draw.ranking(choice.confidence, settings, time, noise[draw.CHOICE])
        if made + 1 >= self.num_inference_steps:
            pick = masked
        else:
            pick = decided if decided is not None else rule.pick(choice.confidence, score, masked, count, places)
        ids = torch.where(pick, choice.token, sample)
        out = UnmaskingSchedulerOutput(ids, pick, choice.token, choice.probability)
        return out if return_dict else out.to_tuple()


def _noise(generator: torch.Generator | Sequence[torch.Generator] | None, sample: Tensor) -> Tensor:
    """float64 `[uses, B, L]` in (0, 1)."""
    several = isinstance(generator, list | tuple)
    owners: list[Any] = [*generator] if isinstance(generator, list | tuple) else [generator]
    counts = [1] * len(sample) if several else [len(sample)]
    if len(owners) != len(counts):
        raise ValueError(f"generator lists {len(owners)} for {len(sample)} rows; give one per row")
    drawn = [
        torch.rand(
            draw.REMASK + 1, count, sample.shape[1], dtype=torch.double, generator=own, device=own and own.device
        )
        for own, count in zip(owners, counts, strict=True)
    ]
    return torch.cat(drawn, 1).to(sample.device).clamp(2**-54, 1 - 2**-53)
