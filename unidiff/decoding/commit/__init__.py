"""Commit rules: which masked positions a pass fills."""
