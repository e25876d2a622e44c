"""Training an image tokenizer: reconstruction loss with an edge-aware term, codebook by moving averages, revival.

Works for `CellVQModel` (codebook as a moving average of its latents, van den Oord et al. 2017, appendix A.1) and for
diffusers' `VQModel` (codebook by gradient, its own quantiser). No pre-trained network is involved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import VQModel
from torch import Tensor

from unidiff.schema import check_fields
from unidiff.tokens.image.cell import CellVQModel


@dataclass(frozen=True)
class VQModelConfig:
    """Fields of `CellVQModel` (`kind: cell`) or of diffusers' `VQModel` (`kind: vqmodel`)."""

    kind: str = "cell"
    factor: int = 8
    codebook_size: int = 2048
    code_dim: int = 8
    encoder_width: int = 256
    encoder_depth: int = 2
    decoder_widths: list[int] = field(default_factory=lambda: [192, 64])
    decoder_depths: list[int] = field(default_factory=lambda: [3, 2])
    decoder_context: bool = False  # cell only
    norm_num_groups: int = 8  # vqmodel only

    def __post_init__(self) -> None:
        check_fields(self, "model")
        if self.kind not in ("cell", "vqmodel"):
            raise ValueError(f"tokenizer kind {self.kind!r} is unknown; expected 'cell' or 'vqmodel'")
        if self.factor not in (1, 2, 4, 8, 16, 32, 64, 128):
            raise ValueError(f"model.factor is {self.factor}; expected a power of two from 1 to 128")
        sizes: dict[str, tuple[int, ...]] = {
            "codebook_size": (self.codebook_size,),
            "code_dim": (self.code_dim,),
            "encoder_width": (self.encoder_width,),
        }
        sizes |= {"decoder_widths": tuple(self.decoder_widths), "norm_num_groups": (self.norm_num_groups,)}
        for name, values in sizes.items():
            if not values or min(values) < 1 or max(values) > 2**22:
                raise ValueError(f"model.{name} is {getattr(self, name)}; expected numbers from 1 to {2**22}")
        for name, depths in {"encoder_depth": [self.encoder_depth], "decoder_depths": self.decoder_depths}.items():
            if not depths or min(depths) < 0 or max(depths) > 1024:
                raise ValueError(f"model.{name} is {getattr(self, name)}; expected numbers from 0 to 1024")
        if self.kind == "vqmodel" and (odd := [w for w in self.decoder_widths if w % self.norm_num_groups]):
            raise ValueError(
                f"model.decoder_widths holds {odd[0]}, which norm_num_groups={self.norm_num_groups} must divide"
            )

    def build(self) -> Any:
        """A freshly initialised model (torch's global generator)."""
        if self.kind == "cell":
            return CellVQModel(
                self.factor, self.codebook_size, self.code_dim, self.encoder_width, self.encoder_depth,
                tuple(self.decoder_widths), tuple(self.decoder_depths), self.decoder_context,
            )  # fmt: skip
        levels = int(math.log2(self.factor)) + 1
        if len(self.decoder_widths) != levels:
            raise ValueError(
                f"vqmodel with factor {self.factor} needs {levels} decoder_widths, got {self.decoder_widths}"
            )
        model: Any = VQModel(
            down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(self.decoder_widths), latent_channels=self.code_dim,
            num_vq_embeddings=self.codebook_size, norm_num_groups=self.norm_num_groups,
            mid_block_add_attention=False,
        )  # fmt: skip
        model.quantize.legacy = False  # diffusers puts beta on the codebook term otherwise
        return model


@dataclass(frozen=True)
class VQLossWeights:
    """Weights of the reconstruction terms; `edge_focus` multiplies errors near strong gradients of the target.

    `cycle` asks that an encoded reconstruction gets the codes it was decoded from (`CellVQModel` only): pictures that a
    transformer draws are then read back as the tokens it drew.
    """

    l1: float = 1.0
    l2: float = 2.0
    gradient: float = 0.5
    commitment: float = 0.25
    edge_focus: float = 4.0
    cycle: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "loss")
        for name, value in vars(self).items():
            if not 0 <= value <= 1e9:
                raise ValueError(f"loss.{name} is {value}; expected a weight from 0 to 1e9")


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
    """Encode, quantise in float32, decode, and the loss; also the latents for `CodebookAverage` (`CellVQModel` only)."""
    autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=bf16)
    latents: Tensor | None = None
    cycle: Tensor | float = 0.0
    if isinstance(model, CellVQModel):
        with autocast:
            latents = model.latents(images)  # [B, d, h, w] float32
        quantized = model.quantize(latents)
        vectors = latents + (quantized.vectors - latents).detach()  # straight-through gradient
        with autocast:
            output = model.decode_vectors(vectors)
            if weights.cycle:
                cycle = cycle_loss(model, output, quantized.codes)
        commitment, codes = (1 - (latents * quantized.vectors).sum(1)).mean(), quantized.codes
    else:  # diffusers' VQModel: its forward would quantise in bf16, so encode, quantise and decode apart
        with autocast:
            hidden = model.encode(images).latents
        vectors, commitment, (_, _, flat) = model.quantize(hidden.float())
        with autocast:
            output = model.decode(vectors, force_not_quantize=True).sample
        codes = flat.reshape(hidden.shape[0], *hidden.shape[-2:])
    loss = reconstruction_loss(output, images, weights) + weights.commitment * commitment + weights.cycle * cycle
    mse = F.mse_loss(output.detach().float(), images)
    return VQStep(loss, mse, codes), latents.detach() if latents is not None else None


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error, for images in [0, 1]."""
    return -10 * math.log10(max(mse, 1e-12))
