"""Tokens: the shared vocabulary, batches, and the text and image tokenizers."""

from unidiff.tokens.batch import Span, TokenBatch
from unidiff.tokens.visibility import Visibility
from unidiff.tokens.vocabulary import Modality, Vocabulary

__all__ = ["Modality", "Span", "TokenBatch", "Visibility", "Vocabulary"]
