"""What an image tokenizer is worth on pictures that it was not trained on: numbers, and a sheet to look at."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from unidiff.tokens.image.vq import VQImageTokenizer
from unidiff.train.image_tokenizer.losses import psnr

_ROWS = 64  # pictures at once
_SHOWN = 12


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
        return torch.nn.functional.avg_pool2d(v, window, stride=1)

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
