"""What a feature network is; `NETWORKS` finds those that need no weights from outside."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from unidiff.registry import Registry

if TYPE_CHECKING:  # a world names its own network, and to list worlds loads no torch
    from torch import Tensor


@dataclass(frozen=True)
class FeatureNetwork:
    """A network that pictures are looked at with.

    Attributes:
        name: for reports.
        features: float32 `[B, 3, H, W]` in [0, 1] -> `[B, D]`; rows must not look at each other.
        logits: likewise -> `[B, C]`, of classes; None where it knows none.
        size: (height, width) that pictures are brought to first (bicubic, antialiased); None takes each as it is.
    """

    name: str
    features: Callable[[Tensor], Tensor]
    logits: Callable[[Tensor], Tensor] | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class NamedNetwork:
    """A network that needs no weights from outside: its name, and device -> network."""

    name: str
    load: Callable[[str], FeatureNetwork]


NETWORKS: Registry[NamedNetwork] = Registry(
    "feature_networks",
    ("unidiff.evaluation.networks", "unidiff.worlds"),
    lambda value: value.name if isinstance(value, NamedNetwork) else None,
)
NetworkSource = str | os.PathLike[str] | FeatureNetwork | Callable[..., Any]
