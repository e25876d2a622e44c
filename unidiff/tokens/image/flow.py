"""Codes to pictures by flow matching in the latents of an autoencoder: the pixel decoder of LLaDA2.0-Uni (arXiv 2604.20796).

The network is Z-Image's, the autoencoder and the scheduler are diffusers'; here are what the network sees of the codes, and
guidance. With x_t = t x_1 + (1 - t) noise the network gives v = x_1 - noise (Lipman et al. 2022, arXiv 2210.02747).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.attention import FeedForward
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from unidiff.schema import Between, Positive, check_fields

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x_t `[B, C, F, H, W]`, t as a scalar) to the velocity, of the same shape."""
PREVIEW = 4
"""Passes of a preview."""


@dataclass(frozen=True)
class FlowSettings:
    """How a decoder samples; the defaults are those of the released `decoder`, `TURBO` those of `decoder-turbo`.

    Args:
        steps: passes of the network (twice as many rows with guidance).
        guidance_scale: s in uncond + s (cond - uncond), where uncond sees features that are all 0; 1 is off. The reference
            writes cond + g (cond - uncond), so its g = 1 is 2 here.
        shift: of the times, t = u / (u + shift (1 - u)) for u on an even grid; 1 keeps the grid.
        fresh_noise: every step goes to its estimate of the picture and adds new noise; otherwise Euler's rule.
        upscale: pixels of the picture along each side, divided by those that the codes were made of.
    """

    steps: Annotated[int, Between(1, 1000)] = 49
    guidance_scale: Annotated[float, Between(0, 1000)] = 2.0
    shift: Positive = 6.0
    fresh_noise: bool = False
    upscale: Annotated[int, Between(1, 8)] = 2

    def __post_init__(self) -> None:
        check_fields(self, "decoder")

    def quick(self) -> FlowSettings:
        """For a preview: at most `PREVIEW` passes, without guidance."""
        return replace(self, steps=min(self.steps, PREVIEW), guidance_scale=1.0)


TURBO = FlowSettings(steps=8, guidance_scale=1.0, shift=1.0, fresh_noise=True)


class CodeFeatures(nn.Module):
    """Codes int64 `[B, h, w]` to features `[B, 4 h w, width]` (upstream: SigVQ): each code twice in both directions, embedded,
    and sent through a small network.
    """

    def __init__(self, codebook_size: int, width: int, inner: int | None = None) -> None:
        super().__init__()
        self.prior_token_embedding = nn.Embedding(codebook_size, width)
        self.prior_projector = FeedForward(width, width, inner_dim=inner or width, activation_fn="linear-silu")

    def forward(self, codes: Tensor) -> Tensor:
        return self.prior_projector(self.prior_token_embedding(doubled(codes)))


def doubled(codes: Tensor) -> Tensor:
    """Codes `[B, h, w]`, each twice in both directions, row by row: `[B, 4 h w]`."""
    return codes.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)


def guided_velocity(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """uncond + scale (cond - uncond) for one picture, made as short as `cond` where it is longer."""
    moved = uncond + scale * (cond - uncond)
    most, length = torch.linalg.vector_norm(cond), torch.linalg.vector_norm(moved)
    return torch.where(length > most, moved * (most / length), moved)


def flow_states(
    velocity: Velocity,
    noise: Tensor,
    settings: FlowSettings,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Iterator[Tensor]:
    """The state after each step from `noise` (t = 0) on, float32; the last one is the result.

    Args:
        generator: of what `fresh_noise` draws, one or one for each row.
    """
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=settings.shift, stochastic_sampling=settings.fresh_noise)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, settings.steps + 1)[:-1].tolist(), device=noise.device)
    scheduler.set_begin_index(0)
    state = noise.float()
    for timestep, sigma in zip(
        scheduler.timesteps, scheduler.sigmas, strict=False
    ):  # sigma = 1 - t; one more at the end
        backwards = -velocity(state, 1 - sigma).float()  # the scheduler runs from data to noise
        state = scheduler.step(backwards, timestep, state, generator=generator).prev_sample
        yield state


class FlowDecoder(nn.Module):
    """One picture from codes.

    Args:
        features: of codes. transformer: a `ZImageTransformer2DModel`, which sees them where it saw words. vae: an
            `AutoencoderKL`.
    """

    def __init__(self, features: CodeFeatures, transformer: Any, vae: Any) -> None:
        super().__init__()
        self.features, self.transformer, self.vae = features, transformer, vae

    @torch.no_grad()
    def forward(self, codes: Tensor, side: int, generator: torch.Generator, settings: FlowSettings) -> Tensor:
        """Codes `[h, w]` to pixels float32 `[3, h * side, w * side]`, around 0 to 1 and not clipped.

        Args:
            side: pixels for each code. generator: of all noise.

        Raises:
            ValueError: a side that latents do not divide, or more codes than the network has positions for.
        """
        network, vae, patch = self.transformer, self.vae, int(self.transformer.config.all_patch_size[0])
        shrink = 2 ** (len(vae.config.block_out_channels) - 1)
        height, width = (n * side // shrink for n in codes.shape)
        if side % (shrink * patch):
            raise ValueError(
                f"a code is {side} pixels wide, which latent patches of {shrink * patch} pixels do not divide"
            )
        most = network.config.axes_lens
        if 4 * codes.numel() + 64 > most[0] or height > patch * most[1] or width > patch * most[2]:
            raise ValueError(
                f"{codes.shape[0]} x {codes.shape[1]} codes are too many for the pixel decoder; draw a smaller picture"
            )
        given = self.features(codes[None])[0].to(network.dtype)  # [4 h w, width]
        shape = (1, int(network.config.in_channels), 1, height, width)
        noise = randn_tensor(shape, generator=generator, device=given.device, dtype=torch.float32)
        guide = settings.guidance_scale != 1
        streams = [given, torch.zeros_like(given)] if guide else [given]

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            rows = [x[0].to(network.dtype)] * len(streams)
            frames = int(network.config.all_f_patch_size[0])
            found = network(
                rows, t.expand(len(rows)).to(x.device), streams, patch_size=patch, f_patch_size=frames
            ).sample
            if not guide:
                return found[0].float()[None]
            return guided_velocity(found[0].float(), found[1].float(), settings.guidance_scale)[None]

        *_, latents = flow_states(velocity, noise, settings, generator)
        latents = latents[:, :, 0] / vae.config.scaling_factor + (vae.config.shift_factor or 0)
        return vae.decode(latents.to(vae.dtype)).sample[0].float() / 2 + 0.5
