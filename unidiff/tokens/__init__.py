"""Tokens: the shared vocabulary, batches, and the text and image tokenizers."""

from unidiff.tokens.batch import Modality, Span, TokenBatch, Vocabulary
from unidiff.tokens.visibility import Visibility

__all__ = ["Modality", "Span", "TokenBatch", "Visibility", "Vocabulary"]
