"""Tokens: the shared vocabulary, batches, and the text and image tokenizers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unidiff.tokens.batch import Span, TokenBatch
    from unidiff.tokens.visibility import Visibility
    from unidiff.tokens.vocabulary import Modality, Vocabulary

__all__ = ["Modality", "Span", "TokenBatch", "Visibility", "Vocabulary"]


def __getattr__(name: str) -> Any:
    """On first use: texts are looked at (`tokens.text`) without waiting for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'unidiff.tokens' has no attribute {name!r}")
    return getattr(import_module("unidiff.tokens." + ("visibility" if name == "Visibility" else "batch")), name)
