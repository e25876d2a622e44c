"""Metrics, one file each; `METRICS` in `base` finds them."""
