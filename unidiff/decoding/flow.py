"""Pictures by flow matching: Euler steps of diffusers' scheduler from noise to latents, with guidance and with known parts.

x_s = (1 - s) x0 + s e,   v = e - x0,   x_next = x + (s_next - s) v      (Rectified Flow, arXiv 2209.03003)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(latents `[B, C, H, W]`, time float `[B]` from 1000 to 0) to the velocity, guided."""


@dataclass
class FlowDraw:
    """The latents of B pictures between two steps.

    Args:
        scheduler: a `FlowMatchEulerDiscreteScheduler`; a copy of its own is made.
        latents: float32 `[B, C, H, W]`, noise, where the drawing begins.
        steps: N. sigmas: N levels of noise of one's own, before the scheduler's shift; None for even ones.
        known: float32 `[B, C, H, W]`, latents of given pictures. holes: bool, broadcastable to that: what is drawn anew.
            What is known follows its own way from noise to the picture, and is exact at the end.
    """

    scheduler: Any
    latents: Tensor
    steps: int
    sigmas: Sequence[float] | None = None
    known: Tensor | None = None
    holes: Tensor | None = None
    done: int = field(default=0, init=False)
    _noise: Tensor = field(init=False)

    def __post_init__(self) -> None:
        own = type(self.scheduler).from_config(self.scheduler.config)
        more: dict[str, Any] = {}
        if own.config.use_dynamic_shifting:
            more["mu"] = dynamic_shift(own.config, self.latents.shape[-2] * self.latents.shape[-1])
        count = {"sigmas": list(self.sigmas)} if self.sigmas is not None else {"num_inference_steps": self.steps}
        own.set_timesteps(**count, device=self.latents.device, **more)
        self.scheduler, self._noise = own, self.latents
        self._keep_known()

    @property
    def left(self) -> int:
        """Steps to come."""
        return len(self.scheduler.timesteps) - self.done

    @property
    def sigma(self) -> Tensor:
        """The present level of noise, a scalar; 0 at the end."""
        return self.scheduler.sigmas[self.done]

    @property
    def time(self) -> Tensor:
        """float32 `[B]`, of the coming step, 1000 for noise."""
        return self.scheduler.timesteps[self.done].to(self.latents).expand(len(self.latents))

    def advance(self, velocity: Tensor) -> None:
        """Take a step along a velocity `[B, C, H, W]`."""
        moment = self.scheduler.timesteps[self.done]
        self.latents = self.scheduler.step(velocity.float(), moment, self.latents, return_dict=False)[0]
        self.done += 1
        self._keep_known()

    def finish(self, velocity: Velocity) -> Tensor:
        """All steps to come; the latents."""
        while self.left:
            self.advance(velocity(self.latents, self.time))
        return self.latents

    def stop(self, velocity: Tensor) -> None:
        """Go to the end in one step, along a velocity of the present latents."""
        self.latents, self.done = self.latents - self.sigma * velocity.float(), len(self.scheduler.timesteps)
        self._keep_known()

    def _keep_known(self) -> None:
        if self.known is None or self.holes is None:
            return
        own = (1 - self.sigma) * self.known + self.sigma * self._noise
        self.latents = torch.where(self.holes, self.latents, own)


def dynamic_shift(config: Any, tokens: int) -> float:
    """mu of a scheduler whose shift depends on the number of image tokens: linear between those that its config names."""
    low, high = config.base_image_seq_len, config.max_image_seq_len
    share = (tokens - low) / (high - low)
    return float(config.base_shift + share * (config.max_shift - config.base_shift))


def guided(velocity: Tensor, scale: float) -> Tensor:
    """Velocities `[2 B, ...]`, away from (first half) and towards, to away + scale (towards - away)."""
    away, towards = velocity.chunk(2)
    return away + scale * (towards - away)


def row_normals(seeds: Tensor, shape: Sequence[int]) -> Tensor:
    """float32 `[B, *shape]` of standard normals; a row depends on its own seed, int64 `[B]`, alone."""
    rows = [torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds.tolist()]
    return torch.stack(rows)
