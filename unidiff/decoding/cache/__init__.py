"""Refresh policies: one file per cache."""

from unidiff.decoding.cache.adaptive import AdaptiveCache
from unidiff.decoding.cache.base import Policy, RefreshPolicy
from unidiff.decoding.cache.block_causal import BlockCausalCache
from unidiff.decoding.cache.combined import CacheByRow, HeldGuidance, SegmentCache
from unidiff.decoding.cache.dual import DualCache
from unidiff.decoding.cache.interval import IntervalCache
from unidiff.decoding.cache.max_logit import MaxLogitCache
from unidiff.decoding.cache.modality import ModalityCache
from unidiff.decoding.cache.none import NoCache
from unidiff.decoding.cache.prefix import PrefixCache
from unidiff.decoding.cache.vicinity import VicinityCache

__all__ = [
    "AdaptiveCache",
    "BlockCausalCache",
    "CacheByRow",
    "DualCache",
    "HeldGuidance",
    "IntervalCache",
    "MaxLogitCache",
    "ModalityCache",
    "NoCache",
    "Policy",
    "PrefixCache",
    "RefreshPolicy",
    "SegmentCache",
    "VicinityCache",
]
