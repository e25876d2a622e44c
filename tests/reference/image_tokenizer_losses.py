"""What the released image tokenizers were trained with: the quantizer's losses, which the golden files hold values of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unidiff.tokens.image.conv import ConvVQModel


@dataclass(frozen=True)
class VQLosses:
    """Scalars: codebook, commitment (times beta), entropy (times its ratio)."""

    codebook: Tensor
    commitment: Tensor
    entropy: Tensor


def vq_losses(model: ConvVQModel, latents: Tensor, beta: float = 0.25, entropy_ratio: float = 0.1) -> VQLosses:
    """Codebook, commitment and entropy terms of latents `[B, d, h, w]` of a model with unit vectors."""
    found = model.quantize(latents)
    compared = F.normalize(latents.float().movedim(1, -1), dim=-1).flatten(0, -2)
    affinity = 2 * compared @ F.normalize(model.codebook.float(), dim=-1).T - 2
    return VQLosses(
        F.mse_loss(found.vectors, found.latents.detach()),
        beta * F.mse_loss(found.latents, found.vectors.detach()),
        entropy_ratio * affinity_entropy(affinity),
    )


def affinity_entropy(affinity: Tensor, temperature: float = 0.01) -> Tensor:
    """Mean entropy of each row's softmax minus the entropy of the mean softmax (MaskGIT's entropy loss), of `[n, K]`.

    1e-5 keeps the logarithm of an unused code finite, as upstream.
    """
    scaled = affinity / temperature
    p = scaled.softmax(-1)
    mean = p.mean(0)
    return -(p * scaled.log_softmax(-1)).sum(-1).mean() + (mean * (mean + 1e-5).log()).sum()


def codebook_usage(codes: Tensor, window: Tensor, codebook_size: int) -> tuple[float, Tensor]:
    """Share of the codebook in the last codes, and the window `[W]` of these with `codes` pushed in."""
    window = torch.cat([window, codes.flatten().to(window.dtype)])[-len(window) :]
    return len(window.unique()) / codebook_size, window


@dataclass(frozen=True)
class LFQLosses:
    """Scalars: (1 + beta) mean (q - z)^2 in value, beta weighing the part that moves the encoder; and the entropy term."""

    quantizer: Tensor
    entropy: Tensor


def lfq_losses(latents: Tensor, beta: float = 0.25, multiplier: float = 0.1) -> LFQLosses:
    """Commitment and entropy terms of latents `[B, d, h, w]`, both times `multiplier`.

    A bit's probabilities are the softmax of minus the squared distances to +1 and to -1.
    """
    z = latents.float()
    signs = torch.where(z > 0, 1.0, -1.0)
    through = z + (signs - z).detach()  # straight-through: the value of the signs, the gradient of z
    quantizer = F.mse_loss(through, z.detach()) + beta * F.mse_loss(through.detach(), z)
    p = torch.stack([-(z - 1).square(), -(z + 1).square()], -1).softmax(-1)  # [B, d, h, w, 2]
    bit = -torch.xlogy(p, p).sum(-1).mean()
    mean = p.mean((0, 2, 3))  # [d, 2]
    entropy = bit + torch.xlogy(mean, mean).sum(-1).mean()
    return LFQLosses(multiplier * quantizer, multiplier * entropy)
