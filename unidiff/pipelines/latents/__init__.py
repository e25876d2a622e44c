"""Decoding of families whose pictures are continuous latents."""
