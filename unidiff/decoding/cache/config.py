"""`CacheConfig`: which cache a decode uses, as plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any

from unidiff.decoding import cache as policies
from unidiff.decoding.cache import RefreshPolicy, SegmentCache
from unidiff.decoding.cache.segments import SEGMENTS
from unidiff.schema import Between, check_fields, check_value, from_data

_POLICIES: dict[str, Callable[..., RefreshPolicy]] = {
    "none": policies.NoCache,
    "prefix": policies.PrefixCache,
    "dual": policies.DualCache,
    "vicinity": policies.VicinityCache,
    "interval": policies.IntervalCache,
    "adaptive": policies.AdaptiveCache,
    "max-logit": policies.MaxLogitCache,
    "modality": policies.ModalityCache,
    "block-causal": policies.BlockCausalCache,
}
CACHES = tuple(_POLICIES)
_PARTS = {"prompt": ("text_prompt", "image_prompt")}


@dataclass(frozen=True)
class CacheConfig:
    """A cache policy and its settings; `build` makes it.

    S tokens in a row, B in the block or blocks being decoded, n passes per block. All but `none` and `block-causal` are
    approximations; `unidiff profile-cache` measures for a model how much changes between passes.

    | policy | recomputed in a pass | passes of a block cost, in full passes | suits |
    |---|---|---|---|
    | `none` | everything | n | short rows; the reference |
    | `prefix` | the block and all behind it, which begins at s | 1 + (n - 1) (S - s) / S | late blocks |
    | `dual` | the block | 1 + (n - 1) B / S | short blocks in long rows: captions, answers |
    | `vicinity` | the block and its neighbourhood | between `dual` and `none` | text |
    | `interval` | what is open, and just written | depends on what is open | long prompts |
    | `adaptive` | the least similar share of the response (dLLM-Cache) | see `AdaptiveCache` | long prompts |
    | `max-logit` | open positions of low best logit (ML-Cache) | see `MaxLogitCache` | pictures |
    | `modality` | one modality, the other every few passes (UniDisc) | see `ModalityCache` | joint decodes |
    | `block-causal` | what a changed token can reach; exact | see `BlockCausalCache` | block-causal weights only |

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
        if self.policy not in _POLICIES:
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

    def build(self) -> RefreshPolicy:
        """The policy, ready for `Sampler`."""
        held = policies.HeldGuidance(self._build_rows(), self.guidance_interval, self.guidance_warmup)
        return held.policy if self.guidance_interval == 1 else held

    def _build_rows(self) -> RefreshPolicy:
        own = self._build_own()
        if not self.segments:
            return own
        chosen = dict.fromkeys(SEGMENTS, own)
        for name in sorted(self.segments, key=lambda segment: segment not in _PARTS):  # single segments win
            chosen |= dict.fromkeys(_PARTS.get(name, (name,)), self.segments[name].build())
        return SegmentCache(**chosen)

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

    def _build_own(self) -> RefreshPolicy:
        make = _POLICIES[self.policy]
        known = [] if self.policy == "none" else [f.name for f in fields(make) if f.init]  # type: ignore[arg-type]
        if unknown := sorted(set(self.options) - set(known)):
            raise ValueError(f"cache policy {self.policy!r} has no settings {unknown}; expected some of {known}")
        return make(**self.options)


def _check_flat(segments: Mapping[str, Any]) -> None:
    """Raise `ValueError` where a segment has segments, before anything goes into them."""
    owns = {
        name: v.get("segments") if isinstance(v, Mapping) else getattr(v, "segments", None)
        for name, v in segments.items()
    }
    if nested := sorted(str(name) for name, own in owns.items() if own):
        raise ValueError(f"cache segments {nested} have segments of their own; name a policy for each instead")
