"""MMaDA's settings: images by MaskGIT's quota, text by LLaDA's semi-autoregressive blocks; both for the one sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from unidiff.decoding.config import Guidance, ModalityDecoding, SamplerConfig
from unidiff.diffusion.schedules import get_schedule
from unidiff.schema import Between, check_fields
from unidiff.tokens import Vocabulary


@dataclass(frozen=True)
class ImageSettings:
    """Settings of text-to-image decoding.

    Args:
        steps: passes. guidance: g in (1 + g) conditional - g unconditional; 0 for none.
        temperature: of the Gumbel noise on log p(code), which decides what stays. schedule: see `ModalityDecoding`.
    """

    steps: Annotated[int, Between(1, 100_000)] = 15
    guidance: Annotated[float, Between(0, 1e6)] = 3.5
    temperature: Annotated[float, Between(0, 1e30)] = 1.0
    schedule: str = "cosine"

    def __post_init__(self) -> None:
        check_fields(self, "image")
        get_schedule(self.schedule)


def image_config(settings: ImageSettings) -> SamplerConfig:
    """Sampler settings for images; give the sampler the rows without captions as `unconditional`.

    The temperature of the choice noise falls from T to T / S; the reference's from T (1 - 1 / S) to 0.
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
