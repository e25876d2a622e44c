"""Models: the masked transformer, its parts, and what a cached pass of it needs."""
