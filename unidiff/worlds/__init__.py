"""Synthetic worlds whose pictures an exact reader can check."""
