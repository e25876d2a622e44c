"""Training batches from samples."""
