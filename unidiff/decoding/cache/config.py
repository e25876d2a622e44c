"""`CacheConfig`: which cache a decode uses, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Annotated, Any

from unidiff.decoding.cache.base import Policy, RefreshPolicy
from unidiff.decoding.cache.combined import SEGMENTS, HeldGuidance, SegmentCache
from unidiff.registry import Registry
from unidiff.schema import Between, check_fields, check_value, from_data


def _name_of(value: object) -> str | None:
    return vars(value).get("name") or None if isinstance(value, type) and issubclass(value, Policy) else None


CACHES: Registry[type[Policy]] = Registry("caches", "unidiff.decoding.cache", _name_of)
"""Policies by name."""
_PARTS = {"prompt": ("text_prompt", "image_prompt")}


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
                f"cache policy is {self.policy!r}; expected one of {', '.join(CACHES)}; pipelines take auto as well"
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
            f"cache is a {type(value).__name__}; expected a CacheConfig or one of {', '.join(CACHES)} (for a policy "
            "object of your own there is policy=)"
        )

    def build(self) -> Policy:
        """The policy, ready for `Sampler`."""
        make = CACHES[self.policy]
        known = [f.name for f in fields(make) if f.init] if is_dataclass(make) else []
        if unknown := sorted(set(self.options) - set(known)):
            raise ValueError(f"cache policy {self.policy!r} has no settings {unknown}; expected some of {known}")
        policy = make(**self.options)
        if self.segments:
            chosen: dict[str, RefreshPolicy] = dict.fromkeys(SEGMENTS, policy)
            for name in sorted(self.segments, key=lambda segment: segment not in _PARTS):  # single segments win
                chosen |= dict.fromkeys(_PARTS.get(name, (name,)), self.segments[name].build())
            policy = SegmentCache(**chosen)
        held = HeldGuidance(policy, self.guidance_interval, self.guidance_warmup)
        return policy if self.guidance_interval == 1 else held

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
