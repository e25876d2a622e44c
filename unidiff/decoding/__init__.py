"""Decoding: one sampler for text and image tokens, made of small objects."""

from unidiff.decoding.cache import NoCache, RefreshPolicy
from unidiff.decoding.cache.config import CacheConfig
from unidiff.decoding.config import Guidance, ModalityDecoding, SamplerConfig
from unidiff.decoding.sampler import Sampler
from unidiff.decoding.state import DecodeState, DecodeView
from unidiff.decoding.stats import DecodeStats, SamplerOutput

__all__ = [
    "CacheConfig",
    "DecodeState",
    "DecodeStats",
    "DecodeView",
    "Guidance",
    "ModalityDecoding",
    "NoCache",
    "RefreshPolicy",
    "Sampler",
    "SamplerConfig",
    "SamplerOutput",
]
