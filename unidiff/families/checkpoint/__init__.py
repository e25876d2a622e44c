"""Checkpoint files of released families: reading, names, writing."""
