"""Refresh policies: one file per cache."""

from unidiff.decoding.policies.base import RefreshPolicy
from unidiff.decoding.policies.none import NoCache

__all__ = ["NoCache", "RefreshPolicy"]
