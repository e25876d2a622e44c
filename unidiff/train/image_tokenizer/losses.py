"""What an image tokenizer is trained by, a reconstruction loss with an edge-aware term, and what it is worth on other pictures.
No pre-trained network is involved."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unidiff.tokens.image.cell import CellVQModel
from unidiff.tokens.image.vq import VQImageTokenizer, coder_of
from unidiff.train.image_tokenizer.config import VQLossWeights

_ROWS = 64  # pictures at once
_SHOWN = 12


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


@torch.no_grad()
def measure(model, validation: Tensor) -> dict:
    """PSNR (dB), SSIM (7 x 7 uniform window), the share of codes used, and the share of codes that stay the same when a
    reconstruction is encoded again, on `validation` `[N, 3, H, W]`. The model computes where it is."""
    tokenizer = VQImageTokenizer(model)
    codes, outputs, kept = [], [], []
    for chunk in validation.split(_ROWS):
        own = tokenizer.encode(chunk)
        output = tokenizer.decode(own)
        kept.append((tokenizer.encode(output) == own).float().cpu())
        codes.append(own.cpu())
        outputs.append(output.cpu())
    output, used = torch.cat(outputs), torch.cat(codes).unique().numel()
    return {
        "codes_kept": round(float(torch.cat(kept).mean()), 4),
        "psnr": round(psnr(float((output - validation).square().mean())), 3),
        "ssim": round(float(ssim(output, validation)), 4),
        "codes_used": used,
        "code_usage": round(used / tokenizer.codebook_size, 4),
    }


def ssim(x: Tensor, y: Tensor, window: int = 7) -> Tensor:
    """Mean structural similarity (Wang et al. 2004, eq. 13) of images `[N, 3, H, W]` in [0, 1], uniform window.

    The window is as large as the picture where that is smaller.
    """
    window = min(window, *x.shape[-2:])

    def mean(v: Tensor) -> Tensor:
        return F.avg_pool2d(v, window, stride=1)

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (score / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean()


def reconstruction_sheet(model, validation: Tensor) -> Image.Image:
    """The first pictures of `validation` `[N, 3, H, W]` above, their reconstructions below."""
    tokenizer = VQImageTokenizer(model)
    shown = validation[:_SHOWN]
    pair = torch.cat([shown, tokenizer.decode(tokenizer.encode(shown)).cpu()], 2)
    sheet = torch.cat(list(pair), 2).permute(1, 2, 0).mul(255).round().byte().numpy()
    picture = Image.fromarray(sheet)
    scale = max(1, 128 // shown.shape[-1])
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
