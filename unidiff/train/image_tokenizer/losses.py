"""Training an image tokenizer: reconstruction loss with an edge-aware term, codebook by moving averages, revival.

The codebook of `CellVQModel` is a moving average of its latents (van den Oord et al. 2017, appendix A.1), that of others
learns by gradient. No pre-trained network is involved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unidiff.tokens.image.cell import CellVQModel
from unidiff.tokens.image.vq import coder_of
from unidiff.train.image_tokenizer.config import VQLossWeights


@dataclass(frozen=True)
class VQStep:
    """Scalars of one step: loss, mean squared error, and the codes used, int64 `[B, h, w]`."""

    loss: Tensor
    mse: Tensor
    codes: Tensor


def image_gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    """Forward differences down and right, zero-padded to the shape of `x` `[B, C, H, W]`."""
    return F.pad(x[..., 1:, :] - x[..., :-1, :], (0, 0, 0, 1)), F.pad(x[..., 1:] - x[..., :-1], (0, 1))


def reconstruction_loss(output: Tensor, target: Tensor, weights: VQLossWeights) -> Tensor:
    """w1 |e| + w2 e^2 + wg |grad e|, each averaged with weight 1 + edge_focus * |grad target| (its local mean)."""
    error = output.float() - target
    down, right = image_gradients(target)
    strength = (down.abs() + right.abs()).amax(1, keepdim=True).clamp(max=1.0)
    focus = 1 + weights.edge_focus * F.max_pool2d(strength, 3, stride=1, padding=1)
    gradient_down, gradient_right = image_gradients(error)
    terms = weights.l1 * error.abs() + weights.l2 * error.square()
    terms = terms + weights.gradient * (gradient_down.abs() + gradient_right.abs())
    return (terms * focus).mean() / focus.mean()


def cycle_loss(model: CellVQModel, output: Tensor, codes: Tensor, temperature: float = 0.05) -> Tensor:
    """Cross-entropy of `codes` `[B, h, w]` under softmax(cosine / temperature) of the encoded `output` `[B, 3, H, W]`."""
    latents = model.latents(output.clamp(0, 1)).movedim(1, -1)  # [B, h, w, d]
    cosine = latents.flatten(0, -2) @ model.codebook.float().T  # [N, codes]
    return F.cross_entropy(cosine / temperature, codes.flatten())


class CodebookAverage:
    """Moving averages of the latents assigned to each code, and revival of codes that nothing chooses.

    Args:
        model: its `codebook` buffer is rewritten in place.
        decay: of the averages, per step.
        revive_below: a code whose average share of a step's cells falls below this fraction of a uniform share is
            moved onto a latent of the step, the likelier the farther that latent is from its own code.
    """

    def __init__(self, model: CellVQModel, decay: float = 0.98, revive_below: float = 0.05) -> None:
        self.model, self.decay, self.revive_below = model, decay, revive_below
        self.counts = torch.ones(len(model.codebook), device=model.codebook.device)
        self.sums = model.codebook.clone().float()
        self.started = False

    def state(self) -> dict[str, Tensor]:
        """What `load` goes on from."""
        return {"counts": self.counts, "sums": self.sums, "started": torch.tensor(self.started)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state`. Raises ValueError where it is of another codebook."""
        for name in ("counts", "sums"):
            if name not in state or state[name].shape != getattr(self, name).shape:
                raise ValueError(f"the codebook's {name} are missing, or of another codebook")
            getattr(self, name).copy_(state[name])
        self.started = bool(state.get("started", True))

    @torch.no_grad()
    def update(self, codes: Tensor, latents: Tensor, generator: torch.Generator, revive: bool) -> int:
        """Take one step's assignments `codes [B, h, w]`, `latents [B, d, h, w]`; returns the number of revived codes."""
        flat = latents.movedim(1, -1).reshape(-1, latents.shape[1])  # [N, d]
        chosen = codes.reshape(-1)
        fit = (flat * self.model.codebook[chosen]).sum(-1)  # [N] cosine to the own code
        if not self.started:  # data initialisation: codes start on latents
            self.started = True
            self._place(torch.ones_like(self.counts, dtype=torch.bool), flat, torch.zeros_like(fit), generator)
            self._write()
            return len(self.counts)
        ones = torch.ones(len(chosen), device=chosen.device)
        counts = torch.zeros_like(self.counts).index_add_(0, chosen, ones)
        sums = torch.zeros_like(self.sums).index_add_(0, chosen, flat)
        self.counts.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        self.sums.mul_(self.decay).add_(sums, alpha=1 - self.decay)
        dead = self.counts < self.revive_below * len(chosen) / len(self.counts)
        revived = int(dead.sum()) if revive else 0
        if revived:
            self._place(dead, flat, fit, generator)
        self._write()
        return revived

    def _place(self, where: Tensor, flat: Tensor, fit: Tensor, generator: torch.Generator) -> None:
        """Move the marked codes onto latents drawn by their misfit, with a share of use that lets them prove themselves."""
        misfit = (1 - fit).clamp(min=1e-5).cpu()  # where the generator is
        pick = torch.multinomial(misfit, int(where.sum()), replacement=True, generator=generator).to(flat.device)
        share = len(flat) / len(self.counts) * 0.3
        self.sums[where] = flat[pick] * share
        self.counts[where] = share

    def _write(self) -> None:
        self.model.codebook.copy_(F.normalize(self.sums, dim=-1).to(self.model.codebook.dtype))


def vq_forward(model: Any, images: Tensor, weights: VQLossWeights, bf16: bool) -> tuple[VQStep, Tensor | None]:
    """The forward and the loss of a step; also the latents for `CodebookAverage`, where the model has such a codebook."""
    coder: Any = coder_of(model)
    autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=bf16)
    done = coder.reconstruct(images, autocast)
    loss = reconstruction_loss(done.output, images, weights) + weights.commitment * done.commitment
    if weights.cycle:
        with autocast:
            loss = loss + weights.cycle * cycle_loss(model, done.output, done.codes)
    mse = F.mse_loss(done.output.detach().float(), images)
    return VQStep(loss, mse, done.codes), done.latents


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error, for images in [0, 1]."""
    return -10 * math.log10(max(mse, 1e-12))
