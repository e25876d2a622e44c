"""`CacheConfig`: which cache a decode uses, as plain data; and `choose_cache`, which knows one for "auto"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache as once
from functools import lru_cache
from typing import Annotated, Any, NamedTuple

import torch

from unidiff.decoding.cache.base import Policy, RefreshPolicy, expected_passes
from unidiff.decoding.cache.combined import SEGMENTS, CacheByRow, HeldGuidance, SegmentCache
from unidiff.decoding.config import RULES, SamplerConfig
from unidiff.decoding.row_decode import RowDecode, TokenRun
from unidiff.models.denoiser import PartialDenoiser
from unidiff.registry import Registry
from unidiff.schema import Between, check_fields, check_value, from_data
from unidiff.tokens import Modality, TokenBatch


def _name_of(value: object) -> str | None:
    return vars(value).get("name") or None if isinstance(value, type) and issubclass(value, Policy) else None


CACHES: Registry[type[Policy]] = Registry("caches", "unidiff.decoding.cache", _name_of)
"""Policies by name."""
_PARTS = {"prompt": ("text_prompt", "image_prompt")}
OVERHEAD_TOKENS = 125
"""A pass of one row costs about as much as this many tokens, however few it computes: 80 of the pass, and 45 of head and
draws. From the embedded model, which drew 1 and 16 rows at once with and without a cache on one CPU core."""
LEAST_GAIN = 1.5
"""Decodes that a cache would make faster by less than this are not worth its approximation."""


@dataclass(frozen=True)
class CacheConfig:
    """A cache policy and its settings; `build` makes it.

    All but `none` and `block-causal` are approximations: docs/decoding.md has what each recomputes and costs, and
    `unidiff profile-cache` measures for a model how much changes between passes.

    Args:
        policy: one of `CACHES`; with `segments`, of those that are not named there.
        options: settings of the policy by name, refresh rules included; the rest keep their defaults.
        segments: a cache per segment of the rows (`SegmentCache`): `text` and `image` for the tokens to decode,
            `text_prompt` and `image_prompt` for the given ones, or `prompt` for both of these.
        guidance_interval: passes between two evaluations of the unconditional streams, see `HeldGuidance`; 1 evaluates
            them in every pass. guidance_warmup: first passes, all of which evaluate them.

    Raises:
        ValueError: an unknown policy, segment or setting, or a setting outside its range.
    """

    policy: str = "none"
    options: Mapping[str, Any] = field(default_factory=dict)
    segments: Mapping[str, CacheConfig] = field(default_factory=dict)
    guidance_interval: Annotated[int, Between(1)] = 1
    guidance_warmup: Annotated[int, Between(0)] = 5

    def __post_init__(self) -> None:
        check_value(self.policy, str, "cache policy")
        if self.policy not in CACHES:
            raise ValueError(
                f"cache policy is {self.policy!r}; expected one of {', '.join(sorted(CACHES))}; pipelines take auto as well"
            )
        for name in ("options", "segments"):
            check_value(getattr(self, name), Mapping[str, Any], f"cache {name}")
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in self.options.items()}
        object.__setattr__(self, "options", options)
        if unknown := sorted(set(self.segments) - {*SEGMENTS, *_PARTS}):
            raise ValueError(f"unknown cache segments {unknown}; expected some of {[*SEGMENTS, *_PARTS]}")
        _check_flat(self.segments)
        segments = {name: CacheConfig.of(value) for name, value in self.segments.items()}
        object.__setattr__(self, "segments", segments)
        check_fields(self, "cache")
        self.build()  # refuse bad settings now, not in the middle of a call

    @classmethod
    def of(cls, value: str | Mapping[str, Any] | CacheConfig) -> CacheConfig:
        """A config from a policy's name, or from plain data."""
        if isinstance(value, CacheConfig):
            return value
        if isinstance(value, str):
            return cls(value)
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        raise ValueError(
            f"cache is a {type(value).__name__}; expected a CacheConfig or one of {', '.join(sorted(CACHES))} (for a policy "
            "object of your own there is policy=)"
        )

    def build(self) -> Policy:
        """The policy, ready for `Sampler`."""
        make = CACHES[self.policy]
        known: list[str] = [f.name for f in fields(make) if f.init] if is_dataclass(make) else []
        if unknown := sorted(set(self.options) - set(known)):
            raise ValueError(f"cache policy {self.policy!r} has no settings {unknown}; expected some of {known}")
        policy = make(**self.options)
        if self.segments:
            chosen: dict[str, RefreshPolicy] = dict.fromkeys(SEGMENTS, policy)
            for name in sorted(self.segments, key=lambda segment: segment not in _PARTS):  # single segments win
                chosen |= dict.fromkeys(_PARTS.get(name, (name,)), self.segments[name].build())
            policy = SegmentCache(**chosen)
        if self.guidance_interval == 1:
            return policy
        return HeldGuidance(policy, self.guidance_interval, self.guidance_warmup)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data; `from_dict` reads it back."""
        data = asdict(self)
        data["options"] = {k: list(v) if isinstance(v, tuple) else v for k, v in self.options.items()}
        data["segments"] = {name: own.to_dict() for name, own in self.segments.items()}
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CacheConfig:
        """Inverse of `to_dict`. Keys left out keep their defaults; an unknown key is an error."""
        if isinstance(data, Mapping) and isinstance(segments := data.get("segments"), Mapping):
            _check_flat(segments)
            data = {**data, "segments": {name: cls.of(value) for name, value in segments.items()}}
        return from_data(cls, data, "cache")


def _check_flat(segments: Mapping[str, Any]) -> None:
    """Raise `ValueError` where a segment has segments, before anything goes into them."""
    owns = {
        name: v.get("segments") if isinstance(v, Mapping) else getattr(v, "segments", None)
        for name, v in segments.items()
    }
    if nested := sorted(str(name) for name, own in owns.items() if own):
        raise ValueError(f"cache segments {nested} have segments of their own; name a policy for each instead")


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


@once
def no_cache() -> CacheChoice:
    """For a call that says nothing of a cache."""
    return CacheChoice(None, CacheConfig())


def choose_cache(
    cache: str | CacheConfig | None, policy: RefreshPolicy | None, batch: TokenBatch, config: SamplerConfig, model: Any
) -> CacheChoice:
    """The cache of a call.

    None and "auto" take what is exact for the model, if anything is. Otherwise None takes nothing, and "auto" what is
    `suited` to each row, as long as `expected_gain` reaches `LEAST_GAIN` for the row alone: what a row gets does not depend on
    the others. The note tells which and by how much. Rows of one batch that differ are decoded together, each by its own policy.

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
    exact = exact_cache(model) if cache in (None, "auto") else None
    if exact is not None:
        return CacheChoice(exact.build(), exact, f"{exact.policy}: exact for these weights")
    if cache != "auto":
        named = CacheConfig() if cache is None else CacheConfig.of(cache)
        return CacheChoice(named.build(), named)
    none = no_cache()
    if not isinstance(model, PartialDenoiser):
        return replace(none, note=f"none: {type(model).__name__} computes whole rows only")
    if model.traits.block_length is not None:
        return replace(none, note="none: features of this model change with the time")
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


def exact_cache(model: Any) -> CacheConfig | None:
    """The cache that changes nothing for a model, if there is one."""
    if not isinstance(model, PartialDenoiser):
        return None
    return next((CacheConfig(name) for name, own in CACHES.items() if own.exact_for(model.traits)), None)


class DecodeShape(NamedTuple):
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


def _shapes(batch: TokenBatch) -> list[DecodeShape]:
    picture = batch.valid & (batch.modality == Modality.IMAGE)
    hidden = [(batch.targets & (batch.modality == m)).sum(1) for m in (Modality.TEXT, Modality.IMAGE)]
    columns = torch.stack([batch.valid.sum(1), *hidden, picture.any(1).long()], 1)
    return [DecodeShape(length, text, image, bool(pictured)) for length, text, image, pictured in columns.tolist()]


@lru_cache(maxsize=256)
def _choose(row: DecodeShape, config: SamplerConfig) -> tuple[str, str]:
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


def expected_gain(row: DecodeShape, config: SamplerConfig) -> float:
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
