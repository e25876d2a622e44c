"""What an image tokenizer learns by, and what it is worth: a reconstruction loss with an edge-aware term, and two ways to a
codebook, a moving average of latents or codes of single cells. No pre-trained network is involved.

A cell at the edge of an object has other pixels on every background. If it has other codes as well, a transformer has to
learn each object once per background, and an object on a background that it was never seen on needs codes that were
never seen together. `CellTrainer` teaches the encoder by contrast (InfoNCE, van den Oord et al. 2018, arXiv 1807.03748, eq. 4)
that the cell on one background is the cell on another; the decoder takes the colour of the background from the cells that
show nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unidiff.tokens.batch import moved
from unidiff.tokens.image.vq import CellVQModel, VQImageTokenizer, coder_of
from unidiff.train.image_tokenizer.config import CellCodes, VQLossWeights

SAME = 0.97
"""Cells whose latents have at least this cosine share a code."""
_ROWS = 64  # pictures at once
_SHOWN = 12


class VQStep(NamedTuple):
    """What the forward of a step gives; `latents` for `CodebookAverage`, where the model has such a codebook."""

    loss: Tensor
    mse: Tensor
    codes: Tensor  # int64 [B, h, w]
    latents: Tensor | None


def image_gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    """Forward differences down and right, zero-padded to the shape of `x` `[B, C, H, W]`."""
    return F.pad(x[..., 1:, :] - x[..., :-1, :], (0, 0, 0, 1)), F.pad(x[..., 1:] - x[..., :-1], (0, 1))


Mean = Callable[[Tensor], Tensor]
"""A number of this process to its mean over all processes, without a gradient."""


def _of_one(value: Tensor) -> Tensor:
    return value


def reconstruction_loss(output: Tensor, target: Tensor, weights: VQLossWeights, mean: Mean = _of_one) -> Tensor:
    """w1 |e| + w2 e^2 + wg |grad e|, each averaged with weight 1 + edge_focus * |grad target| (its local mean).

    The weights' sum is that of the pictures of all processes, so the mean of their losses is the loss of one process."""
    error = output.float() - target
    down, right = image_gradients(target)
    strength = (down.abs() + right.abs()).amax(1, keepdim=True).clamp(max=1.0)
    focus = 1 + weights.edge_focus * F.max_pool2d(strength, 3, stride=1, padding=1)
    gradient_down, gradient_right = image_gradients(error)
    terms = weights.l1 * error.abs() + weights.l2 * error.square()
    terms = terms + weights.gradient * (gradient_down.abs() + gradient_right.abs())
    return (terms * focus).mean() / mean(focus.mean())


def cycle_loss(model: CellVQModel, output: Tensor, codes: Tensor, temperature: float = 0.05) -> Tensor:
    """Cross-entropy of `codes` `[B, h, w]` under softmax(cosine / temperature) of the encoded `output` `[B, 3, H, W]`."""
    latents = model.latents(output.clamp(0, 1)).movedim(1, -1)  # [B, h, w, d]
    cosine = latents.flatten(0, -2) @ model.codebook.float().T  # [N, codes]
    return F.cross_entropy(cosine / temperature, codes.flatten())


def vq_forward(model: Any, images: Tensor, weights: VQLossWeights, bf16: bool, mean: Mean = _of_one) -> VQStep:
    """The forward and the loss of a step."""
    coder: Any = coder_of(model)
    autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=bf16)
    done = coder.reconstruct(images, autocast)
    loss = reconstruction_loss(done.output, images, weights, mean) + weights.commitment * done.commitment
    if weights.cycle:
        with autocast:
            loss = loss + weights.cycle * cycle_loss(model, done.output, done.codes)
    mse = F.mse_loss(done.output.detach().float(), images)
    return VQStep(loss, mse, done.codes, done.latents)


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
    """Mean structural similarity (Wang et al. 2004, eq. 13) of images `[N, 3, H, W]` in [0, 1], uniform window."""
    window = min(window, *x.shape[-2:])  # of small pictures

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


class CellTrainer:
    """The encoder's training, step by step; `place_codes` comes after it.

    Args:
        cells: `[N, views, 3, f, f]`, the same cell in all its views. flat: `[M, 3, f, f]`, one cell of each background;
            see `World.cells`.
    """

    def __init__(
        self, model: CellVQModel, cells: Tensor, flat: Tensor, config: CellCodes, bf16: bool, generator: torch.Generator
    ) -> None:
        device = model.codebook.device
        self.model, self.config, self.bf16, self.generator = model, config, bf16, generator
        self.cells, self.flat = cells.to(device), flat.to(device)
        parameters = model.encoder.parameters()
        self.optimiser = torch.optim.AdamW(parameters, config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self, step: int) -> Tensor:
        """Update the weights once; the loss, a scalar."""
        config = self.config
        rate = min(1.0, (step + 1) / 20) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / config.steps)))
        for group in self.optimiser.param_groups:
            group["lr"] = config.learning_rate * rate
        chosen = torch.randperm(len(self.cells), generator=self.generator)[: config.batch]
        chosen = moved(chosen, self.cells.device)
        with torch.autocast(self.cells.device.type, torch.bfloat16, enabled=self.bf16):
            views = _latents(self.model, self.cells[chosen].flatten(0, 1))
            views = views.unflatten(0, (len(chosen), -1))  # [n, views, d]
            ground = _latents(self.model, self.flat)  # [M, d]
        loss = contrast_loss(views, ground, config.temperature)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        return loss.detach()


def contrast_loss(views: Tensor, ground: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each view's own cell among the means of all cells, and of each background among them.

    Args:
        views: unit latents `[n, views, d]`. ground: unit latents `[M, d]`, a single view each.
    """
    keys = torch.cat([F.normalize(views.mean(1), dim=-1), ground])  # [n + M, d]
    queries = torch.cat([views.flatten(0, 1), ground])
    own = torch.arange(len(views), device=views.device).repeat_interleave(views.shape[1])
    target = torch.cat([own, torch.arange(len(ground), device=views.device) + len(views)])
    return F.cross_entropy(queries @ keys.T / temperature, target)


@torch.no_grad()
def place_codes(model: CellVQModel, cells: Tensor, flat: Tensor) -> dict:
    """Write the codebook: the backgrounds, then the mean of each cell that is not `SAME` as an earlier one. In place.

    Returns `cell_codes`, codes in use, and `cells_shared`, the share of the cells that have one code in all views. Raises
    ValueError where there are more different cells than codes.
    """
    views = torch.stack([_latents(model, view) for view in cells.unbind(1)], 1)  # [N, views, d]
    means = torch.cat([_latents(model, flat), F.normalize(views.mean(1), dim=-1)])
    cosine = (means @ means.T).cpu()
    kept: list[int] = []
    for number in range(len(means)):
        if not kept or number < len(flat) or float(cosine[number, kept].max()) < SAME:
            kept.append(number)
    size = len(model.codebook)
    if len(kept) > size:
        raise ValueError(f"{len(kept)} cells look different but there are {size} codes; raise model.codebook_size")
    model.codebook[: len(kept)] = means[moved(torch.tensor(kept), means.device)].to(model.codebook.dtype)
    model.codebook[len(kept) :] = 0  # left over: at a right angle to everything, so nothing is encoded as one of them
    codes = (views @ model.codebook.float().T).argmax(-1)  # [N, views]
    shared = (codes == codes[:, :1]).all(1).float().mean()
    return {"cell_codes": len(kept), "cells_shared": round(float(shared), 4)}


def _latents(model: CellVQModel, cells: Tensor) -> Tensor:
    """Unit latents `[N, d]` of single cells `[N, 3, f, f]`."""
    return model.latents(cells)[..., 0, 0]


class CodebookAverage:
    """Moving averages of the latents assigned to each code (van den Oord et al. 2017, appendix A.1), and revival of codes that
    nothing chooses. The model's `codebook` is rewritten in place.

    Args:
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
            self.started, every = True, torch.ones_like(self.counts, dtype=torch.bool)
            revived = self._place(every, flat, torch.zeros_like(fit), generator)
        else:
            ones = torch.ones(len(chosen), device=chosen.device)
            counts = torch.zeros_like(self.counts).index_add_(0, chosen, ones)
            sums = torch.zeros_like(self.sums).index_add_(0, chosen, flat)
            self.counts.mul_(self.decay).add_(counts, alpha=1 - self.decay)
            self.sums.mul_(self.decay).add_(sums, alpha=1 - self.decay)
            dead = self.counts < self.revive_below * len(chosen) / len(self.counts)
            revived = self._place(dead, flat, fit, generator) if revive else 0
        self.model.codebook.copy_(F.normalize(self.sums, dim=-1).to(self.model.codebook.dtype))
        return revived

    def _place(self, where: Tensor, flat: Tensor, fit: Tensor, generator: torch.Generator) -> int:
        """Move the marked codes onto latents drawn by their misfit, with a share of use that lets them prove themselves.
        Returns how many there are; the host waits once."""
        places, misfit = moved((where, (1 - fit).clamp(min=1e-5)), "cpu")  # where the generator is
        places = places.nonzero()[:, 0]
        if not len(places):
            return 0
        pick = torch.multinomial(misfit, len(places), replacement=True, generator=generator)
        places, pick = moved((places, pick), flat.device)
        share = len(flat) / len(self.counts) * 0.3
        self.sums[places] = flat[pick] * share
        self.counts[places] = share
        return len(pick)
