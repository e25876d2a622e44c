"""Released image tokenizers."""
