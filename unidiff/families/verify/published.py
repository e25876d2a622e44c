"""Comparing a model with the published ones of its family (`Family.releases`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unidiff.families.family import Family, Release
from unidiff.tokens.vocabulary import Vocabulary

_IDS = ("size", "text", "image", "mask_id", "image_mask_id")


@dataclass(frozen=True)
class OtherSetting:
    """A setting that is not the published one."""

    name: str
    published: Any
    found: Any

    def __str__(self) -> str:
        return f"{self.name} is {self.found!r}, published {self.published!r}"


def differences(
    family: Family, release: Release, settings: Mapping[str, Any], vocabulary: Vocabulary | None = None
) -> list[OtherSetting]:
    """Where a model differs from a published one: settings first, then the vocabulary.

    Args:
        settings: the configuration of our model; a setting that it does not name differs.
        vocabulary: its id layout, where the family has one.
    """
    published = family.settings(release.config)
    pairs = [(name, value, settings.get(name)) for name, value in published.items() if name not in family.unstated]
    if vocabulary is not None and family.vocabulary is not None:
        ids = family.vocabulary(release.config)
        pairs += [(f"vocabulary.{name}", getattr(ids, name), getattr(vocabulary, name)) for name in _IDS]
        pairs += [(f"vocabulary.{name}", i, vocabulary.specials.get(name)) for name, i in ids.specials.items()]
    return [OtherSetting(name, value, found) for name, value, found in pairs if _plain(found) != _plain(value)]


def closest_release(
    family: Family, settings: Mapping[str, Any], vocabulary: Vocabulary | None = None
) -> tuple[Release, list[OtherSetting]] | None:
    """The published model of a family that differs least, and how; None where nothing of the family is published."""
    found = [(release, differences(family, release, settings, vocabulary)) for release in family.releases]
    return min(found, key=lambda pair: len(pair[1])) if found else None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
