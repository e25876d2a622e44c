"""MMaDA's two decoders: images by its MaskGIT loop, text by LLaDA's semi-autoregressive blocks through the sampler.

Upstream's oddities are off unless named in `MMaDACompat`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from unidiff.decoding.commit.choose import take_best
from unidiff.decoding.config import Guidance, ModalityDecoding, SamplerConfig
from unidiff.decoding.draw import CHOICE, TOKEN, RowNoise, gumbel, inverse_cdf
from unidiff.decoding.sampler import Sampler, SamplerOutput
from unidiff.decoding.unusable import check_logits
from unidiff.diffusion.schedules import get_schedule
from unidiff.models.denoiser import Denoiser
from unidiff.schema import Between, check_fields
from unidiff.tokens import Modality, TokenBatch, Vocabulary


@dataclass(frozen=True)
class MMaDACompat:
    """Upstream's behaviour where it differs from the default.

    Args:
        cumulative_temperature: the choice temperature is multiplied by the remaining share of steps again and again
            (0.8, 0.48, 0.19, ... of 5 steps); default: T (1 - (s + 1) / S).
        count_known: how many positions stay masked is a share of all image positions, so that an inpainted image
            reveals one position at a time at first; default: a share of the positions that were unknown.
        disturb_known: a row without unknown positions loses one known code in every step; default: known codes stay.
        ignore_mask: with guidance, text decoding lets padding be seen; default: padding is invisible.
        any_id: text decoding may emit image ids and prompt marks; default: text ids only.
    """

    cumulative_temperature: bool = False
    count_known: bool = False
    disturb_known: bool = False
    ignore_mask: bool = False
    any_id: bool = False

    @classmethod
    def upstream(cls) -> MMaDACompat:
        return cls(True, True, True, True, True)


@dataclass(frozen=True)
class ImageSettings:
    """Settings of text-to-image decoding.

    Args:
        steps: passes. guidance: g in (1 + g) conditional - g unconditional; 0 for none.
        temperature: of the Gumbel noise on log p(code), which decides what stays. schedule: of `unidiff.diffusion.schedules`.
    """

    steps: Annotated[int, Between(1, 100_000)] = 15
    guidance: Annotated[float, Between(0, 1e6)] = 3.5
    temperature: Annotated[float, Between(0, 1e30)] = 1.0
    schedule: str = "cosine"

    def __post_init__(self) -> None:
        check_fields(self, "image")
        get_schedule(self.schedule)


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


Draw = Callable[[int, Tensor], Tensor]  # (step, probabilities [B, N, K]) -> codes int64 [B, N]
Choice = Callable[[int], Tensor]  # step -> Gumbel noise [B, N]


def step_temperature(settings: ImageSettings, step: int, compat: MMaDACompat) -> float:
    """Choice temperature of a pass, from 0; the last pass has none."""
    left = settings.temperature
    for s in range(step + 1) if compat.cumulative_temperature else (step,):
        left *= 1 - (s + 1) / settings.steps
    return left


def masked_after(unknown: Tensor, start: Tensor, settings: ImageSettings, step: int, compat: MMaDACompat) -> Tensor:
    """How many positions of each row are hidden after a pass, int64 `[B]`.

    min(unknown - 1, floor(n share((s + 1) / S))) and not negative, n the positions that were unknown at the start, or
    all image positions (`count_known`). Upstream it is at least 1 besides (`disturb_known`).

    Args:
        unknown: bool `[B, N]`, hidden before the pass. start: bool `[B, N]`, hidden at the start.
    """
    done, left, times = (step + 1) / settings.steps, unknown.sum(1), get_schedule(settings.schedule)
    if compat.count_known:  # in float32 as upstream, where 16 cos(pi / 3) is a little less than 8
        share = times.masked_share(torch.tensor(done, dtype=torch.float32).double()).float()
        keep = (unknown.shape[1] * share).floor().long().expand_as(left)
    else:
        share = times.masked_share(torch.tensor(done, dtype=torch.float64))
        keep = (start.sum(1) * share + 1e-9).floor().long()
    return torch.minimum(left - 1, keep).clamp_min(1 if compat.disturb_known else 0)


def choose_masked(
    selected: Tensor, unknown: Tensor, keep: Tensor, noise: Tensor, temperature: float, compat: MMaDACompat
) -> Tensor:
    """bool `[B, N]`: the `keep[b]` positions of lowest log(selected) + temperature * noise (strictly below the next one)."""
    score = selected.clamp_min(1e-20).log() + temperature * noise
    if not compat.disturb_known:
        return take_best(-score, unknown, keep)
    cut = score.sort(dim=1).values.gather(1, keep[:, None].clamp_max(score.shape[1] - 1))
    return score < cut


@torch.no_grad()
def generate_codes(
    model: Denoiser,
    vocabulary: Vocabulary,
    batch: TokenBatch,
    unconditional: TokenBatch | None,
    seeds: Tensor,
    settings: ImageSettings,
    compat: MMaDACompat | None = None,
    draw: Draw | None = None,
    choice: Choice | None = None,
    observe: Callable[[int, ImageStep], None] | None = None,
) -> Tensor:
    """Image codes int64 `[B, N]` (without the vocabulary's offset) for rows of `MMaDAPrompts.text_to_image`.

    Args:
        batch: known codes stay, hidden ones are filled: generation, inpainting or outpainting.
        unconditional: rows without their captions, needed with guidance; image tokens are taken from `batch`.
        seeds: int64 `[B]`; a row's result depends on its own seed and tokens only.
        draw, choice: recorded noise in place of the seeds.
        observe: called after each pass.

    Raises:
        ValueError: rows whose images lie at different places, or guidance without unconditional rows.
    """
    compat = compat or MMaDACompat()
    place = _image_places(batch)
    guided = settings.guidance > 0
    if guided and (unconditional is None or not torch.equal(_image_places(unconditional), place)):
        raise ValueError(
            "guidance needs unconditional rows with the image at the same places; give them, or guidance=0"
        )
    noise = RowNoise(seeds, batch.valid)
    draw = draw or (lambda step, p: inverse_cdf(p, noise(step, TOKEN)[:, place]))
    choice = choice or (lambda step: gumbel(noise(step, CHOICE)[:, place]).float())
    streams = TokenBatch.cat([batch, unconditional]) if guided and unconditional is not None else batch
    mask, offset = streams.attention_mask(), vocabulary.image[0]
    image = batch.ids[:, place].clone()  # [B, N]
    start, codes = image == vocabulary.image_mask, image - offset
    for step in range(settings.steps):
        unknown = image == vocabulary.image_mask
        if not (compat.disturb_known or bool(unknown.any())):
            break
        # 1. forward, both streams with the same image; guidance over the image slice
        copies = len(streams.ids) // len(image)
        ids = streams.ids.index_copy(1, place, image.repeat(copies, 1))
        hidden = model.hidden(ids, streams.modality, streams.positions, mask)[:, place]  # [S B, N, D]
        alone = model.head(hidden, *vocabulary.image)
        logits = _guided(alone, settings.guidance)
        check_logits(logits, alone, f"guidance = {settings.guidance:g}")
        p = logits.softmax(-1)  # [B, N, K]
        # 2. a code everywhere; known ones stay
        codes = torch.where(unknown, draw(step, p), image - offset)
        chosen = p.gather(-1, codes[..., None])[..., 0]
        selected = torch.where(unknown, chosen, torch.finfo(torch.float32).max)
        # 3. hide the least sure again
        keep = masked_after(unknown, start, settings, step, compat)
        temperature = step_temperature(settings, step, compat)
        hide = choose_masked(selected, unknown, keep, choice(step), temperature, compat)
        image = torch.where(hide, vocabulary.image_mask, codes + offset)
        if observe is not None:
            observe(step, ImageStep(ids[: len(image)], p, selected, codes.clone(), hide, keep, temperature))
    return codes


def _guided(logits: Tensor, guidance: float) -> Tensor:
    """`[S B, N, K]`, conditional rows first, to `[B, N, K]`."""
    if guidance == 0:
        return logits
    conditional, unconditional = logits.chunk(2)
    return (1 + guidance) * conditional - guidance * unconditional


def _image_places(batch: TokenBatch) -> Tensor:
    """int64 `[N]`: columns of the image tokens."""
    image = batch.modality == Modality.IMAGE
    if not bool((image == image[:1]).all()):
        raise ValueError("the rows have their images at different places; build them with one text_length")
    return image[0].nonzero()[:, 0]


def image_config(settings: ImageSettings) -> SamplerConfig:
    """The same decoding for `Sampler`, with every cache policy: give it the unconditional rows as `unconditional`.

    Differs from `generate_codes` in the choice noise only, whose temperature falls from T (1 - 0) to T / S.
    """
    image = ModalityDecoding(steps=settings.steps, schedule=settings.schedule, choice_temperature=settings.temperature)
    return SamplerConfig(image=image, guidance=Guidance(scale=1 + settings.guidance, hide="text"))


def answer_config(
    vocabulary: Vocabulary,
    steps: int = 512,
    block_length: int = 128,
    temperature: float = 0.0,
    guidance: float = 0.0,
) -> SamplerConfig:
    """Sampler settings for understanding and text: LLaDA's fixed quota per block, ranked by probability.

    Marks that only occur in prompts are never emitted.

    Args:
        steps: passes for the whole answer. block_length: tokens per block.
        guidance: upstream `cfg_scale`; the unconditional stream sees [MASK] for everything given.
    """
    kept = {vocabulary.specials.get(name) for name in ("eos", "eot")}
    marks = sorted(i for i in vocabulary.specials.values() if i not in kept)
    text = ModalityDecoding(
        steps=steps,
        rule="quota",
        schedule="fixed",
        temperature=temperature,
        block_length=block_length,
        forbid=tuple(marks),
    )
    return SamplerConfig(text=text, guidance=Guidance(scale=1 + guidance, hide="given"))


def generate_text(
    model: Denoiser,
    vocabulary: Vocabulary,
    batch: TokenBatch,
    seeds: Tensor,
    config: SamplerConfig,
    compat: MMaDACompat | None = None,
    record: bool = False,
) -> SamplerOutput:
    """Fill the text targets of `batch` (rows of `MMaDAPrompts.question`, or any rows) by the sampler.

    Args:
        config: see `answer_config`.
        compat: `ignore_mask` and `any_id` (which also decodes past end-of-text).
        record: keep the ids after each pass.
    """
    compat = compat or MMaDACompat()
    if compat.ignore_mask and config.guidance.scale != 1:
        seen = torch.ones_like(batch.valid)
        batch = batch.replace(valid=seen, sample_ids=torch.zeros_like(batch.sample_ids))
    if compat.any_id:
        size = vocabulary.size
        vocabulary = Vocabulary(size, (0, size), (size, size), vocabulary.mask_id)
        config = replace(config, text=replace(config.text, forbid=()))
    return Sampler(model, vocabulary, config)(batch, seeds, record=record)
