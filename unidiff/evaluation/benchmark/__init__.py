"""Timings of decodes, measured side by side."""
