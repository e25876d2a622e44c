"""Models: the masked transformer, its parts, and the restricted heads."""

from unidiff.models.partial import CachePlan, PartialHidden
from unidiff.models.store import FeatureStore, StoreOptions
from unidiff.models.transformer import MaskedTransformer

__all__ = [
    "CachePlan",
    "FeatureStore",
    "MaskedTransformer",
    "PartialHidden",
    "StoreOptions",
]
