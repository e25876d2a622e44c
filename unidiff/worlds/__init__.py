"""Synthetic worlds, one folder each; `unidiff.world.WORLDS` finds them."""
