"""MMaDA's decoders as they are, oddities included; the package decodes MMaDA with its own sampler.

Images (a MaskGIT loop): the choice temperature is multiplied by the remaining share of steps again and again (0.8, 0.48, 0.19,
... of 5 steps); how many positions stay masked is a share of all image positions, so that an inpainted image reveals one
position at a time at first; a row without unknown positions loses one known code in every step.
Text: with guidance, padding is seen; image ids and prompt marks may be emitted, and what follows an end of text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unidiff.decoding import Sampler, SamplerConfig, SamplerOutput
from unidiff.diffusion.schedules import get_schedule
from unidiff.families.mmada import ImageSettings
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Modality, TokenBatch, Vocabulary


@dataclass(frozen=True)
class ImageStep:
    """One pass over the image tokens of `[B, N]`.

    Attributes:
        inputs: int64 `[B, L]`, what the conditional stream saw.
        probabilities: `[B, N, K]`, guided. selected: `[B, N]`, of the code, the largest float32 where it was known.
        codes: int64 `[B, N]`, every position filled. masked: bool `[B, N]`, hidden again afterwards.
        keep: int64 `[B]`, how many were to be hidden. temperature: of this pass.
    """

    inputs: Tensor
    probabilities: Tensor
    selected: Tensor
    codes: Tensor
    masked: Tensor
    keep: Tensor
    temperature: float


def step_temperature(settings: ImageSettings, step: int) -> float:
    """Choice temperature of a pass, from 0; the last pass has none."""
    left = settings.temperature
    for s in range(step + 1):
        left *= 1 - (s + 1) / settings.steps
    return left


def masked_after(unknown: Tensor, settings: ImageSettings, step: int) -> Tensor:
    """How many positions of each row are hidden after a pass, int64 `[B]`: max(1, min(unknown - 1, floor(N share))).

    In float32, where 16 cos(pi / 3) is a little less than 8.

    Args:
        unknown: bool `[B, N]`, hidden before the pass.
    """
    done = torch.tensor((step + 1) / settings.steps, dtype=torch.float32)
    keep = (unknown.shape[1] * get_schedule(settings.schedule).masked_share(done.double()).float()).floor().long()
    return torch.minimum(unknown.sum(1) - 1, keep).clamp_min(1)


@torch.no_grad()
def generate_codes(
    model: MaskedTransformer,
    vocabulary: Vocabulary,
    batch: TokenBatch,
    unconditional: TokenBatch | None,
    settings: ImageSettings,
    draw: Callable[[int, Tensor], Tensor],
    choice: Callable[[int], Tensor],
    observe: Callable[[ImageStep], None] = lambda step: None,
) -> Tensor:
    """Image codes int64 `[B, N]` (without the vocabulary's offset) for rows of `MMaDAPrompts.text_to_image`.

    Args:
        unconditional: rows without their captions, with guidance; image tokens are taken from `batch`.
        draw: step and probabilities `[B, N, K]` to codes int64 `[B, N]`. choice: step to Gumbel noise `[B, N]`.
    """
    place = (batch.modality[0] == Modality.IMAGE).nonzero()[:, 0]
    streams = batch if unconditional is None else TokenBatch.cat([batch, unconditional])
    mask, offset = streams.attention_mask(), vocabulary.image[0]
    image = batch.ids[:, place].clone()  # [B, N]
    codes = image - offset
    for step in range(settings.steps):
        unknown = image == vocabulary.image_mask
        # 1. forward, both streams with the same image; guidance over the image slice
        ids = streams.ids.index_copy(1, place, image.repeat(len(streams.ids) // len(image), 1))
        logits = model.head(model.hidden(ids, streams.modality, streams.positions, mask)[:, place], *vocabulary.image)
        if unconditional is not None:
            conditional, without = logits.chunk(2)
            logits = (1 + settings.guidance) * conditional - settings.guidance * without
        p = logits.softmax(-1)  # [B, N, K]
        # 2. a code everywhere; known ones stay
        codes = torch.where(unknown, draw(step, p), image - offset)
        chosen = p.gather(-1, codes[..., None])[..., 0]
        selected = torch.where(unknown, chosen, torch.finfo(torch.float32).max)
        # 3. hide the least sure again
        keep, temperature = masked_after(unknown, settings, step), step_temperature(settings, step)
        score = selected.clamp_min(1e-20).log() + temperature * choice(step)
        hide = score < score.sort(dim=1).values.gather(1, keep[:, None].clamp_max(score.shape[1] - 1))
        image = torch.where(hide, vocabulary.image_mask, codes + offset)
        observe(ImageStep(ids[: len(image)], p, selected, codes.clone(), hide, keep, temperature))
    return codes


def generate_text(
    model: MaskedTransformer,
    vocabulary: Vocabulary,
    batch: TokenBatch,
    seeds: Tensor,
    config: SamplerConfig,
    sees_padding: bool = True,
    any_id: bool = True,
    record: bool = False,
) -> SamplerOutput:
    """Fill the text targets of `batch` by the package's sampler, with the text decoder's oddities or some of them."""
    if sees_padding and config.guidance.scale != 1:
        batch = batch.replace(valid=torch.ones_like(batch.valid), sample_ids=torch.zeros_like(batch.sample_ids))
    if any_id:
        size = vocabulary.size
        vocabulary = Vocabulary(size, (0, size), (size, size), vocabulary.mask_id)
        config = replace(config, text=replace(config.text, forbid=()))
    return Sampler(model, vocabulary, config)(batch, seeds, record=record)
