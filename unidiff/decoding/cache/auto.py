"""The cache of a call: the one asked for, or with "auto" one that suits what is decoded, where it can pay."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache as once
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from unidiff.decoding.cache.base import RefreshPolicy
from unidiff.decoding.cache.bounds import expected_passes
from unidiff.decoding.cache.combined import CacheByRow, HeldGuidance
from unidiff.decoding.cache.config import CACHES, CacheConfig
from unidiff.decoding.config import RULES, SamplerConfig
from unidiff.decoding.row_decode import RowDecode, TokenRun
from unidiff.models.denoiser import PartialDenoiser
from unidiff.tokens import Modality, TokenBatch

OVERHEAD_TOKENS = 125
"""A pass of one row costs about as much as this many tokens, however few it computes: 80 of the pass, and 45 of head and
draws. From the embedded model, which drew 1 and 16 rows at once with and without a cache on one CPU core."""
LEAST_GAIN = 1.5
"""Decodes that a cache would make faster by less than this are not worth its approximation."""


@once
def suited(kind: str) -> CacheConfig:
    """What "auto" takes for the `kind` of a row: each part the policy that says it suits it (`Policy.auto`).

    Beside a picture (captions, answers) nothing is kept: a picture that is kept while its caption is written costs the
    embedded model 14 of 100 captions at a refresh every 8 passes, and 5 at every second. With pictures to decode,
    guidance is evaluated in every second pass. `max-logit` loses too much there: it skips open positions whose logits
    are low. Both (inpainting, joint generation): the same for each, and for what is given.
    """
    found = {part: CacheConfig(name, own.auto[part]) for name, own in CACHES.items() for part in own.auto}
    if kind == "text":
        return found["text"]
    image = found["image"]
    if kind == "image":
        return CacheConfig(image.policy, image.options, guidance_interval=2, guidance_warmup=2)
    return (
        CacheConfig(segments=found, guidance_interval=2, guidance_warmup=2) if kind == "both" else CacheConfig("none")
    )


@dataclass(frozen=True)
class CacheChoice:
    """The policy of a call, the config that made it (None for a policy of the caller's own), and why.

    Where "auto" takes several, the config is that of most rows; the note names all.
    """

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

    "auto" takes what is exact for the model, if anything is, and otherwise what is `suited` to each row, as
    long as `expected_gain` reaches `LEAST_GAIN` for the row alone: what a row gets does not depend on the others. The note
    tells which and by how much. Rows of one batch that differ are decoded together, each by its own policy.

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
    none = suited("none")
    if not isinstance(model, PartialDenoiser):
        return CacheChoice(none.build(), none, f"none: {type(model).__name__} computes whole rows only")
    traits = model.traits
    for name, own in CACHES.items():
        if own.exact_for(traits):
            exact = CacheConfig(name)
            return CacheChoice(exact.build(), exact, f"{name}: exact for these weights")
    if traits.block_length is not None:
        return CacheChoice(none.build(), none, "none: features of this model change with the time")
    rows = [_choose(row, config) for row in _shapes(batch)]
    found = list(dict.fromkeys(choice for choice, _ in rows))  # in the order of the rows
    notes = {choice: note for choice, note in reversed(rows)}
    builds = [suited(kind) for kind in found]
    if len(found) == 1:
        return CacheChoice(builds[0].build(), builds[0], notes[found[0]])
    order = [found.index(choice) for choice, _ in rows]
    counts = [order.count(i) for i in range(len(found))]
    note = "; ".join(f"{n} of {len(rows)} rows {notes[kind]}" for n, kind in zip(counts, found, strict=True))
    return CacheChoice(CacheByRow([own.build() for own in builds], order), builds[counts.index(max(counts))], note)


class RowShape(NamedTuple):
    """What "auto" knows of a row: its tokens, how many of them are hidden by modality, and whether it has a picture."""

    length: int
    text: int
    image: int
    pictured: bool

    @property
    def kind(self) -> str:
        """See `suited`."""
        if self.text and self.image:
            return "both"
        return "image" if self.image else "text beside a picture" if self.pictured else "text"


def _shapes(batch: TokenBatch) -> list[RowShape]:
    picture = batch.valid & (batch.modality == Modality.IMAGE)
    hidden = [(batch.targets & (batch.modality == m)).sum(1) for m in (Modality.TEXT, Modality.IMAGE)]
    columns = torch.stack([batch.valid.sum(1), *hidden, picture.any(1).long()], 1)
    return [RowShape(length, text, image, bool(pictured)) for length, text, image, pictured in columns.tolist()]


@lru_cache(maxsize=256)
def _choose(row: RowShape, config: SamplerConfig) -> tuple[str, str]:
    """What suits a row: its kind or "none", and why."""
    if not (row.text or row.image):
        return "none", "none: nothing is left to decode"
    chosen = suited(row.kind)
    if chosen == suited("none"):
        return "none", "none: texts lose too much where the picture that they describe is kept"
    gain = expected_gain(row, config)
    if gain < LEAST_GAIN:
        short = f"none: at {row.length} tokens per row a cache makes decodes {gain:.2f} times as fast"
        return "none", f"{short}, less than {LEAST_GAIN}"
    name = "segments" if chosen.segments else chosen.policy
    return row.kind, f"{name}: makes decodes about {gain:.2f} times as fast, at some approximation"


def expected_gain(row: RowShape, config: SamplerConfig) -> float:
    """Time of a decode without a cache over that with the cache of the row's kind, for the row alone, from the tokens of each
    pass and `OVERHEAD_TOKENS`. Where both modalities are decoded, that of the image alone."""
    modality = Modality.IMAGE if row.image else Modality.TEXT
    settings, size = (config.image, row.image) if row.image else (config.text, row.text)
    block = min(settings.block_length or size, size)
    known = (TokenRun(row.length - size, given=True),) if row.length > size else ()
    decode = RowDecode(
        (*known, TokenRun(size, 1, modality)), block, RULES[settings.rule].passes_of_a_block(settings, size, block)
    )
    policy = suited("image" if row.image else "text").build()
    scales = {config.guidance.scale, config.guidance.text_scale, config.guidance.image_scale}
    guided, work = bool(scales - {None, 1.0}), 0
    for number, w in enumerate(passes := expected_passes(policy, decode, 1)):
        held = isinstance(policy, HeldGuidance) and not policy.renews(number)
        work += (2 if guided and not held else 1) * w.layers[0].out + OVERHEAD_TOKENS
    return len(passes) * ((2 if guided else 1) * row.length + OVERHEAD_TOKENS) / work
