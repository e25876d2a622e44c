"""A training run on disk and on devices."""
