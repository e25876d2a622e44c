"""From a measured profile to a cache: intervals that the features can bear, and whether the row is long enough to gain."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from unidiff.decoding.cache.combined import SEGMENTS
from unidiff.decoding.cache.config import CacheConfig
from unidiff.evaluation.cache_profile.profile import PAIRS, TaskProfile
from unidiff.models.denoiser import DenoiserTraits

LONGEST = 100
"""Most passes that anything is kept without being computed again."""
LEAST_GAIN = 1.2
"""A cache that cannot save more than this is not worth its error."""
RELATED = 0.3
"""Correlation of the changes of V and AttnOut above which comparing values finds what has changed."""


class Advice(NamedTuple):
    """A cache, the speed-up that its FLOPs allow, and why."""

    cache: CacheConfig
    bound: float
    reason: str


def advise(profile: TaskProfile, traits: DenoiserTraits) -> Advice:
    """The adaptive cache with measured settings, or none where it cannot pay.

    The angle between a feature's directions in successive passes is at most added up from pass to pass, so features
    with a mean cosine c stay above `keep` for acos(keep) / acos(c) passes. That gives the two intervals, by the fastest
    feature of given and of generated tokens. The share to recompute in between is the share of generated positions
    that moved by more than that in one pass; where the changes of values and outputs do not go together, comparing
    values is no use, and nothing is compared.

    Args:
        profile: measured.
        traits: of the model.
    """
    prompt, answer = (_interval(profile, names) for names in (("text_prompt", "image_prompt"), ("text", "image")))
    related = _targets(profile, profile.correlation[PAIRS.index("V with AttnOut")])
    moved = _targets(profile, profile.moved)
    ratio = min(0.5, max(0.05, math.ceil(20 * moved) / 20)) if related >= RELATED else 0.0
    layer = traits.layers[0]
    tokens = profile.tokens
    given, made = tokens["text_prompt"] + tokens["image_prompt"], tokens["text"] + tokens["image"]
    checked = ratio + (1 - ratio) * layer.value / layer.token if ratio else 0.0
    share = (given / prompt + made / answer + made * (1 - 1 / answer) * checked) / (given + made)
    first = 1 / len(traits.layers)
    bound = 1 / (first + (1 - first) * share)
    why = (
        f"given tokens keep a cosine of {profile.keep} for {prompt} passes and generated ones for {answer}; "
        f"{moved:.0%} of the generated move further in one pass, and the changes of values and attention outputs "
        f"correlate by {related:.2f}; a row has {given + made:.0f} tokens"
    )
    if bound < LEAST_GAIN:
        return Advice(CacheConfig("none"), 1.0, f"{why}: adaptive at most {bound:.2f} times faster, which does not pay")
    options = {"prompt_interval": prompt, "response_interval": answer, "ratio": ratio}
    return Advice(CacheConfig("adaptive", options), bound, f"{why}: adaptive at most {bound:.2f} times faster")


def _interval(profile: TaskProfile, names: tuple[str, str]) -> int:
    """Passes that the fastest of the features of these segments can be kept; the longest where there are none."""
    found = [profile.similarity[:, SEGMENTS.index(name)] for name in names if name in profile.segments]
    cosines = [float(feature.nanmean()) for segment in found for feature in segment]
    angle = math.acos(min(1.0, max(-1.0, min(cosines, default=1.0))))
    return LONGEST if angle == 0 else max(1, min(LONGEST, int(math.acos(profile.keep) / angle)))


def _targets(profile: TaskProfile, values: torch.Tensor) -> float:
    """Mean of `[segments, passes, layers]` over the generated tokens; layer 0, whose values never change alone, apart."""
    later = values[..., 1:] if values.shape[-1] > 1 else values
    means = {
        name: float(later[SEGMENTS.index(name)].nanmean()) for name in ("text", "image") if name in profile.segments
    }
    weights = {name: profile.tokens[name] for name, mean in means.items() if not math.isnan(mean)}
    return sum(means[name] * w for name, w in weights.items()) / sum(weights.values()) if weights else 0.0
