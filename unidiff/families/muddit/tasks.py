"""Text to image, and image to text (captions, answers), as loops over the MM-DiT and the MaskGIT commit rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor

from unidiff.decoding.arguments import check_logits
from unidiff.decoding.draw import UNMASK, RowNoise
from unidiff.families.muddit.scheduler import Draws, MaskGitSchedule, starting_ratio
from unidiff.families.muddit.text import ClipText, TextFeatures
from unidiff.models.mmdit import MMDiT
from unidiff.schema import Between, check_fields

TIME_CONVENTIONS = ("fraction", "index", "training")
_Moderate = Annotated[float, Between(-1e6, 1e6)]


@dataclass(frozen=True)
class MudditSettings:
    """How to sample; the defaults are Muddit's.

    Args:
        steps: network passes (two streams each with guidance).
        guidance_scale: s in uncond + s (cond - uncond) on image logits; off at 1 or below. Text is never guided.
        temperature, masking: see `MaskGitSchedule`.
        time: what the network is told at step k of N, see `network_time`: "fraction" (Muddit), "index" (Meissonic) or
            "training".
        aesthetic_score, crop: micro conditions; `crop` is (top, left) in pixels.
        compat: None, or "upstream" for the reference's defects: those of `MaskGitSchedule`, starting ratios averaged
            over the batch, and answers read from the last logits instead of the sampled tokens.
    """

    steps: Annotated[int, Between(1, 100_000)] = 48
    guidance_scale: _Moderate = 9.0
    temperature: float | Sequence[float] = (2.0, 0.0)
    masking: str = "cosine"
    time: str = "fraction"
    aesthetic_score: _Moderate = 6.0
    crop: tuple[_Moderate, _Moderate] = (0.0, 0.0)
    compat: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "")
        if self.time not in TIME_CONVENTIONS:
            raise ValueError(f"time = {self.time!r:.80}; expected one of {list(TIME_CONVENTIONS)}")
        if self.compat not in (None, "upstream"):
            raise ValueError(f"compat = {self.compat!r:.80}; expected None or 'upstream'")
        self.schedule()

    def schedule(self) -> MaskGitSchedule:
        return MaskGitSchedule(self.steps, self.temperature, self.masking, compat=self.compat is not None)


@dataclass(frozen=True)
class StepReport:
    """What a callback sees after a step, in copies.

    Attributes:
        step: k, from 0. time: `[1]` or `[B]`, what the network was told.
        tokens: int64, the state after the step, `[B, h, w]` or `[B, T]`.
        logits: float `[B, L, C]` as the commit rule saw them, guided.
        text: the features of the conditional stream.
    """

    step: int
    time: Tensor
    tokens: Tensor
    logits: Tensor
    text: TextFeatures


Callback = Callable[[StepReport], None]


@dataclass(frozen=True)
class TextResult:
    """Outcome of `write_text`.

    Attributes:
        tokens: int64 `[B, T]`, question and sampled answer.
        last_choice: int64 `[B, T]`, the likeliest ids in the last pass.
        answers: ids after the question, per row: sampled and cut before the end token, or (compat) `last_choice`.
    """

    tokens: Tensor
    last_choice: Tensor
    answers: list[list[int]] = field(default_factory=list)


def network_time(convention: str, step: int, steps: int, hidden: Tensor) -> Tensor:
    """What the network is told before step k of N; it multiplies by 1000 itself.

    Args:
        convention: "fraction": (N - 1 - k) / N; "index": N - 1 - k; "training": 1000 times the share of hidden tokens,
            which is what the training script passes.
        hidden: bool `[B, ...]`, the state.
    Returns:
        float32 `[1]`, or `[B]` for "training".
    """
    left = steps - 1 - step
    if convention == "training":
        return 1000 * hidden.flatten(1).float().mean(1)
    value = left if convention == "index" else left / steps
    return torch.tensor([value], dtype=torch.float32, device=hidden.device)


def micro_conditions(height: int, width: int, settings: MudditSettings, device: torch.device | None = None) -> Tensor:
    """float32 `[1, 5]`: width, height, crop top, crop left in pixels, aesthetic score."""
    values = [width, height, *settings.crop, settings.aesthetic_score]
    return torch.tensor([values], dtype=torch.float32, device=device)


@torch.no_grad()
def generate_image(
    model: MMDiT,
    text: TextFeatures,
    tokens: Tensor,
    settings: MudditSettings,
    draws: Draws,
    factor: int = 16,
    negative: TextFeatures | None = None,
    callback: Callback | None = None,
    first_step: int = 0,
) -> Tensor:
    """Fill the hidden codes of images from text.

    Args:
        model: the network, in evaluation mode.
        text: features of the prompts.
        tokens: int64 `[B, h, w]`, codes, and `vocab_size - 1` where hidden: everywhere for a new image, in a region for
            inpainting. Known codes never change.
        factor: pixels per code, for the micro conditions.
        negative: features for the unconditional stream (one row or B); needed with guidance.
        first_step: the step to begin with, where `tokens` are as hidden as the steps before it leave them.

    Returns:
        int64 `[B, h, w]` codes.

    Raises:
        ValueError: guidance without `negative`, or batch sizes that do not fit.
    """
    guided = settings.guidance_scale > 1
    if guided and negative is None:
        raise ValueError(
            f"guidance_scale = {settings.guidance_scale} needs features of a negative prompt; pass `negative`"
        )
    # 1. what stays the same over all steps
    schedule, mask_id, grid = settings.schedule(), model.config.vocab_size - 1, tokens.shape[1:]
    text = text.rows(len(tokens))
    streams = [text] if not guided or negative is None else [negative.rows(len(tokens)), text]  # unconditional first
    sequence, pooled = (torch.cat(parts) for parts in zip(*streams, strict=True))
    micro = micro_conditions(grid[0] * factor, grid[1] * factor, settings, tokens.device)
    share = starting_ratio(tokens == mask_id, schedule.compat)
    start = share if first_step == 0 else share / schedule.ratios()[first_step - 1].to(share.device)
    for k in range(first_step, settings.steps):
        # 2. logits of both streams
        time = network_time(settings.time, k, settings.steps, tokens == mask_id)
        times = time if len(time) == 1 else time.repeat(len(streams))
        features = model.features(tokens.repeat(len(streams), 1, 1), sequence, pooled, micro, times)
        logits = model.image_head(features.image).flatten(1, 2)  # [S * B, h * w, C]
        # 3. guidance
        alone = logits
        if guided:
            without, given = logits.chunk(2)
            logits = without + settings.guidance_scale * (given - without)
        check_logits(logits, alone, f"guidance_scale = {settings.guidance_scale:g}")
        # 4. commit
        tokens = schedule.step(logits, tokens.flatten(1), mask_id, k, draws, start).tokens.unflatten(1, grid)
        if callback is not None:
            callback(StepReport(k, time.clone(), tokens.clone(), logits.clone(), text))
    return tokens


def hide_codes(
    codes: Tensor, mask_id: int, settings: MudditSettings, strength: float, seeds: Tensor, region: Tensor | None = None
) -> tuple[Tensor, int]:
    """Hide as much of an image as redrawing it with `strength` asks for (aMUSEd's image-to-image and inpainting).

    Args:
        codes: int64 `[B, h, w]`, whole images.
        strength: share of the steps to run, in (0, 1]; 1 hides everything.
        seeds: int64 `[B]`, of the rows.
        region: bool `[B, h, w]`, the codes that may change; all if None.

    Returns:
        `tokens` and `first_step` for `generate_image`: codes are hidden by a coin each, with the share that the steps
        before `first_step` leave hidden.

    Raises:
        ValueError: a strength outside (0, 1], or one that leaves no step to run.
    """
    run = int(settings.steps * strength)
    if not 0 < strength <= 1 or run < 1:
        raise ValueError(
            f"strength = {strength} runs {max(run, 0)} of {settings.steps} steps; expected a number in (0, 1] that runs at least one"
        )
    first = settings.steps - run
    ratio = 1.0 if first == 0 else float(settings.schedule().ratios()[first - 1])
    noise = RowNoise(seeds, torch.ones_like(codes.flatten(1), dtype=torch.bool))
    hidden = (noise(first, UNMASK) < ratio).view(codes.shape)
    return torch.where(hidden if region is None else hidden & region, mask_id, codes), first


@torch.no_grad()
def write_text(
    model: MMDiT,
    encoder: ClipText,
    codes: Tensor,
    tokens: Tensor,
    settings: MudditSettings,
    draws: Draws,
    factor: int = 16,
    callback: Callback | None = None,
) -> TextResult:
    """Fill the hidden words of texts about images; the text encoder reads the partly hidden text anew in every step.

    Args:
        model: the network, with a text head.
        encoder: with a mask embedding.
        codes: int64 `[B, h, w]`, whole images.
        tokens: int64 `[B, T]`, see `question_rows`. Known words never change.
        factor: pixels per code, for the micro conditions.

    Raises:
        ValueError: a model without a text head, or batch sizes that do not fit.
    """
    schedule, mask_id = settings.schedule(), encoder.mask_id
    micro = micro_conditions(codes.shape[1] * factor, codes.shape[2] * factor, settings, codes.device)
    question = (tokens != mask_id).long().cumprod(1).sum(1)  # length of the known beginning
    logits = tokens
    for k in range(settings.steps):
        # 1. read the text as it is now
        text = encoder(tokens)
        # 2. logits of every word
        time = network_time(settings.time, k, settings.steps, tokens == mask_id)
        features = model.features(codes, text.sequence.to(codes.device), text.pooled.to(codes.device), micro, time)
        logits = model.text_head(features.text)  # [B, T, V]
        check_logits(logits, logits, "text")
        # 3. commit
        tokens = schedule.step(logits, tokens, mask_id, k, draws).tokens
        if callback is not None:
            callback(StepReport(k, time.clone(), tokens.clone(), logits.clone(), text))
    choice = logits.argmax(-1)
    if schedule.compat:
        answers = [row[n:].tolist() for row, n in zip(choice, question, strict=True)]
    else:
        end = encoder.end_id
        answers = [_before(row[n:].tolist(), end) for row, n in zip(tokens, question, strict=True)]
    return TextResult(tokens, choice, answers)


def _before(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
