"""A package beside unidiff with one entry of every kind."""
