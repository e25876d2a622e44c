"""Comparing a model with the published values of its family (`unidiff.families.verify.published_values`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import VQModel
from torch import nn

from unidiff.families.dream.weights import dream_config
from unidiff.families.image_tokenizers.llamagen import llamagen_config
from unidiff.families.image_tokenizers.magvit import magvit_config
from unidiff.families.llada.weights import llada_config
from unidiff.families.mdlm.weights import mdlm_config
from unidiff.families.mmada.weights import mmada_config
from unidiff.families.muddit.weights import muddit_config
from unidiff.families.registry import FAMILIES
from unidiff.families.unidisc.weights import unidisc_config
from unidiff.families.verify.published_values import RELEASES, Release, Settings
from unidiff.models.mmdit import MMDiT
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens.image.conv import ConvVQModel
from unidiff.tokens.image.lfq import LFQModel
from unidiff.tokens.vocabulary import Vocabulary

__all__ = [
    "RELEASES",
    "Difference",
    "Release",
    "build_empty",
    "closest_release",
    "differences",
    "releases_of",
    "vocabulary_of",
]


@dataclass(frozen=True)
class Difference:
    """A setting that is not the published one."""

    name: str
    published: Any
    found: Any

    def __str__(self) -> str:
        return f"{self.name} is {self.found!r}, published {self.published!r}"


_Map = Callable[[Mapping[str, Any]], dict[str, Any]]
_CONFIG_MAPS: dict[str, tuple[type[nn.Module], _Map]] = {
    "unidisc": (MaskedTransformer, unidisc_config),
    "mdlm": (MaskedTransformer, mdlm_config),
    "llada": (MaskedTransformer, llada_config),
    "dream": (MaskedTransformer, dream_config),
    "mmada": (MaskedTransformer, mmada_config),
    "lumina": (MaskedTransformer, llada_config),
    "muddit": (MMDiT, muddit_config),
    "meissonic": (MMDiT, muddit_config),
    "llamagen": (ConvVQModel, llamagen_config),
    "magvit": (LFQModel, magvit_config),
    "vq_model": (cast(Any, VQModel), lambda config: {k: v for k, v in config.items() if not k.startswith("_")}),
}


def releases_of(family: str) -> tuple[Release, ...]:
    """The published models of a family, in the order of their size; empty where nothing is published."""
    return tuple(release for release in RELEASES if release.family == family)


def build_empty(release: Release) -> nn.Module:
    """The network that our config map makes of the published configuration, on the meta device (no memory)."""
    make, config_map = _CONFIG_MAPS[release.family]
    with torch.device("meta"):
        return make(**config_map(release.config))


def vocabulary_of(release: Release) -> Vocabulary | None:
    """The id layout that our vocabulary map makes of the published configuration; None for an image tokenizer."""
    make = FAMILIES[release.family].vocabulary
    return None if make is None else make(release.config)


def differences(release: Release, settings: Settings, vocabulary: Vocabulary | None = None) -> list[Difference]:
    """Where a model differs from a published one: settings first, then the vocabulary.

    Args:
        settings: the configuration of our model; a setting that it does not name differs.
        vocabulary: its id layout, where the release has one.
    """
    pairs = [(name, value, settings.get(name)) for name, value in release.settings.items()]
    if vocabulary is not None:
        for name, value in release.vocabulary.items():
            if name == "specials":
                pairs += [(f"vocabulary.{n}", i, vocabulary.specials.get(n)) for n, i in value.items()]
            else:
                pairs.append((f"vocabulary.{name}", value, getattr(vocabulary, name)))
    return [Difference(name, value, found) for name, value, found in pairs if _plain(found) != _plain(value)]


def closest_release(
    family: str, settings: Settings, vocabulary: Vocabulary | None = None
) -> tuple[Release, list[Difference]] | None:
    """The published model of a family that differs least, and how; None where nothing of the family is published."""
    found = [(release, differences(release, settings, vocabulary)) for release in releases_of(family)]
    return min(found, key=lambda pair: len(pair[1])) if found else None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
