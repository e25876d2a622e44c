"""Refresh policies: one file per cache."""

from unidiff.decoding.policies.adaptive import AdaptiveCache
from unidiff.decoding.policies.base import Policy, RefreshPolicy
from unidiff.decoding.policies.block_causal import BlockCausalCache
from unidiff.decoding.policies.by_row import CacheByRow
from unidiff.decoding.policies.dual import DualCache
from unidiff.decoding.policies.held import HeldGuidance
from unidiff.decoding.policies.interval import IntervalCache
from unidiff.decoding.policies.max_logit import MaxLogitCache
from unidiff.decoding.policies.modality import ModalityCache
from unidiff.decoding.policies.none import NoCache
from unidiff.decoding.policies.prefix import PrefixCache
from unidiff.decoding.policies.segments import SegmentCache
from unidiff.decoding.policies.vicinity import VicinityCache

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
