"""Fused GPU kernels, each with a plain torch twin. Triton is optional: it is imported when a kernel is first launched."""
