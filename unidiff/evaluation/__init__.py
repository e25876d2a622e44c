"""Evaluation: the exact picture reader, EmojiEval, likelihoods and reports."""
