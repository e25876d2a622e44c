"""Re-implementations of other programs, for comparison in tests only."""
