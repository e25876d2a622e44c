"""Refresh policies: one file per cache."""

from unidiff.decoding.cache.adaptive import AdaptiveCache
from unidiff.decoding.cache.base import NoCache, Policy, RefreshPolicy
from unidiff.decoding.cache.block_causal import BlockCausalCache
from unidiff.decoding.cache.block_refresh import DualCache, PrefixCache, VicinityCache
from unidiff.decoding.cache.combined import CacheByRow, HeldGuidance, SegmentCache
from unidiff.decoding.cache.interval import IntervalCache
from unidiff.decoding.cache.max_logit import MaxLogitCache
from unidiff.decoding.cache.modality import ModalityCache
from unidiff.decoding.cache.sprint import SprintCache

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
    "SprintCache",
    "VicinityCache",
]
