"""The UniDisc family."""
