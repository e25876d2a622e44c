"""Public benchmarks: rows to decode, and their results in the layout that each one's own scorer reads; a file each."""
