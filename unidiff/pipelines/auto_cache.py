"""The cache of a call: the one asked for, or with "auto" one that suits what is decoded, where it can pay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from unidiff.decoding import CacheConfig, ModalityDecoding, RefreshPolicy, SamplerConfig
from unidiff.decoding.bounds import Schedule, Segment, expected_passes
from unidiff.decoding.policies import HeldGuidance
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Modality, TokenBatch

OVERHEAD_TOKENS = 80
"""A pass costs about as much as this many tokens, however few it computes."""
ROW_TOKENS = 45
"""And so much for every row that takes part: head and draws. Both from the embedded model, which drew 1 and 16 rows at once with
and without a cache on one CPU core."""
LEAST_GAIN = 1.5
"""Decodes that a cache would make faster by less than this are not worth its approximation."""
_TOKENS_PER_PASS = 3  # of rules that end by themselves: Fast-dLLM reports 3.3 at a threshold of 0.9

AUTO = {
    "text": CacheConfig("dual", {"interval": 8}),
    "text beside a picture": CacheConfig("none"),
    "image": CacheConfig("interval", {"interval": 8}, guidance_interval=2, guidance_warmup=2),
    "both": CacheConfig(
        segments={
            "prompt": CacheConfig("interval", {"interval": 8}),
            "text": CacheConfig("dual", {"interval": 8}),
            "image": CacheConfig("interval", {"interval": 8}),
        },
        guidance_interval=2,
        guidance_warmup=2,
    ),
}
"""What "auto" takes by what there is to decode. Text: only the block, everything every 8 passes. (Fast-dLLM,
which refreshes once per block of 32, reports 1.3 and 3.5 points of GSM8K lost with LLaDA; not measured here.)
Beside a picture (captions, answers) nothing is kept: a picture that is kept while its caption is written costs the
embedded model 14 of 100 captions at a refresh every 8 passes, and 5 at every second.
Pictures: open positions and those just written, everything every 8 passes, and guidance evaluated in every second.
`max-logit` loses too much there: it skips open positions whose logits are low.
Both (inpainting, joint generation): the same for each, and what is given every 8 passes."""


@dataclass(frozen=True)
class CacheChoice:
    """The policy of a call, the config that made it (None for a policy of the caller's own), and why."""

    policy: RefreshPolicy | None
    config: CacheConfig | None
    note: str = ""


def choose_cache(
    cache: str | CacheConfig | None,
    policy: RefreshPolicy | None,
    batch: TokenBatch,
    config: SamplerConfig,
    model: Any,
) -> CacheChoice:
    """The cache of a call.

    "auto" takes `block-causal` for block-causal weights, which is exact, and otherwise what `AUTO` says, as long as
    `expected_gain` reaches `LEAST_GAIN`; the note tells which and by how much.

    Args:
        cache: see `DecodeOptions`. policy: the caller's own.
        batch: the request. config: how it is decoded.

    Raises:
        ValueError: both are given, or an unknown cache.
    """
    if policy is not None:
        if cache is not None:
            raise ValueError("cache and policy both say what is kept between passes; give one of them")
        return CacheChoice(policy, None)
    if cache != "auto":
        named = CacheConfig.of("none" if cache is None else cache)
        return CacheChoice(named.build(), named)
    none = CacheConfig("none")
    if not isinstance(model, MaskedTransformer):
        return CacheChoice(none.build(), none, f"none: {type(model).__name__} computes whole rows only")
    if model.config.attention == "block_causal":
        if model.config.time_conditioning and model.config.constant_time is None:
            return CacheChoice(none.build(), none, "none: features of this model change with the time")
        exact = CacheConfig("block-causal")
        return CacheChoice(exact.build(), exact, "block-causal: exact for these weights")
    hidden = {m: int((batch.targets & (batch.modality == m)).sum(1).max()) for m in Modality}
    kind = "both" if all(hidden.values()) else "text" if hidden[Modality.TEXT] else "image"
    if kind == "text" and bool((batch.valid & (batch.modality == Modality.IMAGE)).any()):
        kind = "text beside a picture"
    if AUTO[kind] == none:
        return CacheChoice(none.build(), none, "none: texts lose too much where the picture that they describe is kept")
    gain = expected_gain(kind, hidden, batch, config)
    if gain < LEAST_GAIN:
        short = (
            f"none: at {int(batch.valid.sum(1).max())} tokens per row a cache makes decodes {gain:.2f} times as fast"
        )
        return CacheChoice(none.build(), none, f"{short}, less than {LEAST_GAIN}")
    chosen = AUTO[kind]
    name = "segments" if chosen.segments else chosen.policy
    return CacheChoice(
        chosen.build(), chosen, f"{name}: makes decodes about {gain:.2f} times as fast, at some approximation"
    )


def expected_gain(kind: str, hidden: dict[Modality, int], batch: TokenBatch, config: SamplerConfig) -> float:
    """Time of a decode without a cache over that with `AUTO[kind]`, from the tokens of each pass, `ROW_TOKENS` and
    `OVERHEAD_TOKENS`.

    Where both modalities are decoded, that of the image alone.

    Args:
        hidden: most targets of a row, by modality.
    """
    modality = Modality.TEXT if kind == "text" else Modality.IMAGE
    settings = config.text if kind == "text" else config.image
    length, size = int(batch.valid.sum(1).max()), hidden[modality]
    block = min(settings.block_length or size, size)
    known = (Segment(length - size, given=True),) if length > size else ()
    schedule = Schedule((*known, Segment(size, 1, modality)), block, _passes_of_a_block(settings, size, block))
    policy = AUTO["text" if kind == "text" else "image"].build()
    scales = {config.guidance.scale, config.guidance.text_scale, config.guidance.image_scale}
    guided, rows = bool(scales - {None, 1.0}), batch.shape[0]
    work, fixed = 0, rows * ROW_TOKENS + OVERHEAD_TOKENS
    for number, w in enumerate(passes := expected_passes(policy, schedule, 1)):
        held = isinstance(policy, HeldGuidance) and not policy.renews(number)
        work += rows * (2 if guided and not held else 1) * w.layers[0].out + fixed
    return len(passes) * (rows * (2 if guided else 1) * length + fixed) / work


def _passes_of_a_block(settings: ModalityDecoding, size: int, block: int) -> int | Fraction:
    """Passes per full block, so that all blocks together make `steps` where the rule keeps them."""
    if settings.rule in ("quota", "ancestral"):
        return Fraction(settings.steps * block, size)
    return block if settings.rule == "first_hitting" else math.ceil(block / _TOKENS_PER_PASS)
